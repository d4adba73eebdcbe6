"""TrainedModel: a network and what training left behind that an unlearner may need."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from efface.files import canonical, check_output, digest, write_atomic
from efface.lineage import Forgotten, Step
from efface.mask import Mask, pack
from efface.shapes import metadata as shape_metadata
from efface.task import Task

SCHEMA = "efface.model/1"

KEPT = ("initial", "rewind", "dense")
"""Further weights that a model may keep beside its own, each a whole state dict."""


class TrainedModel:
    """A network and what training left behind that an unlearner may need.

    Args:
        task: The task that it was trained on.
        network: The network; its pruned weights are zeroed at once.
        mask: Which weights are kept, or None for a dense model.
        initial: How its initial weights can be had again: ``{"seed", "digest"}``; without a seed
            they are those of ``initial_weights``.
        initial_weights: The initial weights themselves (state dict), where they were kept.
        rewind: Early weights (state dict), where training kept them.
        dense: The weights that it had before it was pruned (state dict), where pruning kept them.
        lineage: What was done to it, oldest first.
        forgotten: What it was made to forget.
    """

    def __init__(
        self,
        task: Task,
        network: nn.Module,
        *,
        mask: Mask | None = None,
        initial: Mapping[str, Any] | None = None,
        initial_weights: Mapping[str, Tensor] | None = None,
        rewind: Mapping[str, Tensor] | None = None,
        dense: Mapping[str, Tensor] | None = None,
        lineage: tuple[Step, ...] = (),
        forgotten: Forgotten | None = None,
    ) -> None:
        self.task = task
        self.network = network
        self.initial = initial
        self.initial_weights = initial_weights
        self.rewind = rewind
        self.dense = dense
        self.lineage = lineage
        self.forgotten = forgotten or Forgotten()
        self.maker: Mapping[str, Any] | None = None
        """Settings of the pruner that made the mask in a step that is not in the lineage yet;
        empty where that is nobody."""
        self.log: Path | None = None
        """Where the log of its training's updates lies, if it is at hand; not saved."""
        self.patch: Any = None
        """What the last method multiplied, as a :class:`~efface.sparsify.blocks.Patch`, where it
        made one; not saved with the model."""
        self._mask: Mask | None = None
        self.set_mask(mask)

    @property
    def mask(self) -> Mask | None:
        """Which weights are kept; change it with :meth:`set_mask`."""
        return self._mask

    def set_mask(self, mask: Mask | None) -> None:
        """Install a mask: weights that it drops become exactly zero.

        A running fit sees the change at its next step, and clears the optimiser's state there.

        Raises:
            MismatchError: If the mask is of another network.
        """
        if mask is not None:
            mask.check(self.network)
            mask.apply_(dict(self.network.named_parameters()))
        self._mask = mask

    @property
    def digest(self) -> str:
        """SHA-256 of the weights and buffers."""
        return weights_digest(self.network.state_dict())

    @property
    def sparsity(self) -> float:
        """Of the mask; 0 for a dense model."""
        return self._mask.sparsity if self._mask else 0.0

    def kept(self) -> dict[str, Mapping[str, Tensor]]:
        """The further weights that it keeps: kind (one of :data:`KEPT`) → state dict."""
        found = {"initial": self.initial_weights, "rewind": self.rewind, "dense": self.dense}
        return {kind: weights for kind, weights in found.items() if weights}

    def trained_by(self) -> Step | None:
        """The step that trained it from scratch, or None for an adopted model."""
        return next((s for s in self.lineage if s.verb in {"train", "retrain"}), None)

    def copy(self) -> TrainedModel:
        """A deep copy of the network; the rest is immutable and shared."""
        made = TrainedModel(
            self.task,
            copy.deepcopy(self.network),
            mask=self._mask,
            initial=self.initial,
            initial_weights=self.initial_weights,
            rewind=self.rewind,
            dense=self.dense,
            lineage=self.lineage,
            forgotten=self.forgotten,
        )
        made.maker, made.log = self.maker, self.log
        return made

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write one ``.safetensors`` file, whole or not at all.

        Raises:
            OutputError: If the file exists and ``force`` is not given.
            WriteError: If it cannot be written.
        """
        path = Path(path)
        check_output(path, force)
        write_atomic(path, self.to_bytes())
        return path

    def to_bytes(self) -> bytes:
        """The bytes of the model file."""
        network = {n: t.detach().cpu().contiguous() for n, t in self.network.state_dict().items()}
        prefix = _prefix(network)
        extra = {f"{prefix}mask.{n}": pack(t) for n, t in (self._mask or {}).items()}
        for kind, weights in self.kept().items():
            extra |= {f"{prefix}{kind}.{n}": t.cpu().contiguous() for n, t in weights.items()}
        # clone: tied weights share memory, which the format does not allow
        tensors = {name: t.clone() for name, t in (network | extra).items()}
        return sorted_header(save_bytes(tensors, self._metadata(prefix)))

    def _metadata(self, prefix: str) -> dict[str, str]:
        last = self.lineage[-1] if self.lineage else None
        shapes = {n: list(t.shape) for n, t in (self._mask or {}).items()}
        metadata = {
            "schema": SCHEMA,
            "prefix": prefix,
            "task": self.task.name,
            "run_id": digest([asdict(step) for step in self.lineage])[:12],
            "weights_digest": self.digest,
            "mask_digest": self._mask.digest if self._mask else "",
            "mask_shapes": canonical(shapes),
            "rewind_digest": weights_digest(self.rewind) if self.rewind else "",
            "initial_digest": weights_digest(self.initial_weights) if self.initial_weights else "",
            "dense_digest": weights_digest(self.dense) if self.dense else "",
            "parent_digest": (last.parent or "") if last else "",
            "method": canonical(last.method if last else None),
            "settings": canonical(last.settings if last else None),
            "seeds": canonical({f"{i}:{s.verb}": s.seed for i, s in enumerate(self.lineage)}),
            "versions": canonical(last.versions if last else {}),
            "cost": canonical(last.cost if last else {}),
            "initial": canonical(self.initial),
            "lineage": canonical([asdict(step) for step in self.lineage]),
            "forgotten": canonical(asdict(self.forgotten)),
            **shape_metadata(self.task),
        }
        return metadata | {"metadata_digest": digest(metadata)}


def sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its header in the order of names: equal models, equal bytes.

    The format's own writer puts metadata in an order that changes from run to run.
    """
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":"))
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _prefix(network: Mapping[str, Tensor]) -> str:
    """Nothing, or a dot where the user's network has a part called mask, rewind or the like.

    No name in a state dict begins with a dot, so the dotted name space cannot collide.
    """
    owned = {name.split(".")[0] for name in network}
    return "." if owned & {"mask", *KEPT} else ""


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and contiguous bytes, in the order of names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        total.update(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return total.hexdigest()


def blank_network(task: Task) -> nn.Module:
    """A network of the task to load weights into; the global random state is kept."""
    with torch.random.fork_rng(devices=[]):
        return task.network()
