"""Passes over records, a bounded number at a time: read, counted, reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from efface.curvature.persample import Route, choose, trainable
from efface.data import Batch
from efface.errors import MethodError
from efface.fitting import Fit
from efface.mask import Mask


class Passes:
    """Passes over some records by the fastest route, for a network in eval mode on its device.

    Args:
        fit: Supplies records, device, meter and progress.
        network: In eval mode, on the fit's device.
        positions: The records.
        memory: Bytes that a pass may hold.
        label: What progress calls it.
        stream: Under which name the records are counted.

    Raises:
        MethodError: If there are no records, or ``memory`` is not positive.
    """

    def __init__(
        self, fit: Fit, network: nn.Module, positions: Tensor, memory: int, label: str, stream: str
    ) -> None:
        if len(positions) == 0:
            raise MethodError(f"{label}: there are no records; give one at least.")
        if memory <= 0:
            raise MethodError(f"{label}: memory must be positive (bytes), not {memory!r}.")
        self.fit, self.positions, self.label, self.stream = fit, positions, label, stream
        probe = next(iter(fit.task.records.batches([positions[:2]], fit.device)))
        self.route: Route
        self.route, why = choose(network, fit.task, probe)
        self.size = self.route.records(memory)
        self.shapes = {name: p.shape for name, p in trainable(network).items()}
        fit.meter.facts["gradients"] = f"{self.route.name}{f': {why}' if why else ''}"

    def batches(self, positions: Tensor | None = None, size: int | None = None) -> Iterator[Batch]:
        """Records, a few at a time; each batch is counted and reported when it is done.

        Args:
            positions: Some of the records; by default all.
            size: At most so many at a time.
        """
        fit, size = self.fit, min(self.size, size or self.size)
        positions = self.positions if positions is None else positions
        done = 0
        for batch in fit.task.records.batches(torch.split(positions, size), fit.device):
            yield batch
            n = len(batch.targets)
            done += n
            fit.meter.images[self.stream] = fit.meter.images.get(self.stream, 0) + n
            if fit.progress:
                fit.progress(self.label, done, len(positions))

    def rows(self, cotangents: Tensor, out: Tensor) -> None:
        """Write the per-sample gradients of the last forward pass into a matrix ``[B, P]``."""
        out.zero_()  # parameters that the forward pass does not use stay so
        places = offsets(self.shapes)
        for name, start, block in self.route.pull(cotangents):
            columns = places[name]
            out[start : start + len(block), columns] = block.reshape(len(block), -1).to(out.dtype)


def offsets(shapes: Mapping[str, torch.Size]) -> dict[str, slice]:
    """Where each parameter lies in a vector of all."""
    places, at = {}, 0
    for name, shape in shapes.items():
        places[name] = slice(at, at + shape.numel())
        at += shape.numel()
    return places


def flat(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> Tensor:
    """Named tensors as one vector in float64, in the order of the shapes.

    Raises:
        MethodError: If names or shapes are not those of the network.
    """
    given = {name: t.shape for name, t in tensors.items()}
    if given != dict(shapes):
        wrong = sorted(n for n in given.keys() | shapes if given.get(n) != shapes.get(n))
        raise MethodError(
            f"the vector is not one of this network's parameters ({', '.join(wrong[:5])}); give a "
            "tensor of its shape for every parameter that requires a gradient."
        )
    return torch.cat([tensors[name].detach().reshape(-1).double() for name in shapes])


def named(vector: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """A vector as named tensors in float32."""
    return {
        name: vector[where].reshape(shapes[name]).float().contiguous()
        for name, where in offsets(shapes).items()
    }


def dropped(
    mask: Mask | None, shapes: Mapping[str, torch.Size], device: torch.device
) -> Tensor | None:
    """Which entries of a vector of all parameters are pruned; None without a mask."""
    if mask is None:
        return None
    gone, places = mask.dropped(device), offsets(shapes)
    vector = torch.zeros(sum(s.numel() for s in shapes.values()), dtype=torch.bool, device=device)
    for name in gone.keys() & places.keys():
        vector[places[name]] = gone[name].reshape(-1)
    return vector
