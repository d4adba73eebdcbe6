"""The diagonal of the Fisher information, from true per-sample gradients, and the mean gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from efface.curvature.passes import Passes
from efface.curvature.persample import evaluating, loss_gradients, trainable
from efface.data import Batch
from efface.errors import MethodError
from efface.fitting import Fit
from efface.task import Task

Labels = Literal["observed", "sampled", "expected"]
"""Whose gradients are squared: of the true label, of one drawn from the model, or of all."""

NEGLIGIBLE = 1e-9
"""Directions that carry a smaller part of a batch's trace are left out: below rounding."""


def diagonal_fisher(
    fit: Fit,
    network: nn.Module,
    positions: Tensor,
    *,
    labels: Labels = "observed",
    memory: int = 256 * 2**20,
    stream: str = "retain",
) -> dict[str, Tensor]:
    """Mean over the records of the squared per-sample gradient of the loss.

    In eval mode, in fp32, on un-augmented records; modes, gradients and random state are left as
    found. What a record costs depends neither on the number of records nor on any batch size.

    Args:
        fit: Supplies records, loss, device, seed and meter.
        network: The network.
        positions: Which records ``[n]``.
        labels: ``"observed"``: of the records' own labels (the empirical Fisher); ``"sampled"``:
            one label per record, drawn from the model's softmax; ``"expected"``:
            Σ_y p(y|x) g_y², exact, with a backward pass for every class but one, or fewer where
            the model is sure.
        memory: Bytes that a pass may hold beside the network and the result.
        stream: Under which name the records are counted.

    Returns:
        Name → float32 tensor of the parameter's shape, contiguous, on the fit's device, for every
        parameter that requires a gradient.

    Raises:
        MethodError: If there are no records, or a layer mixes the records of a batch.

    Example:
        >>> import torch, efface
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> task = efface.Task(lambda: torch.nn.Linear(2, 2), (x, y), (x, y))
        >>> found = diagonal_fisher(efface.Fit(task), task.network(), torch.arange(2))
        >>> {name: tuple(t.shape) for name, t in found.items()}
        {'weight': (2, 2), 'bias': (2,)}
    """
    if labels not in ("observed", "sampled", "expected"):
        raise MethodError(f"labels must be observed, sampled or expected, not {labels!r}.")
    with evaluating(network, fit.device):
        passes = Passes(fit, network, positions, memory, "diagonal Fisher", stream)
        exact = torch.float32 if fit.device.type == "mps" else torch.float64  # MPS has none
        sums = {n: torch.zeros(s, device=fit.device) for n, s in passes.shapes.items()}
        totals = {name: t.to(exact) for name, t in sums.items()}
        draws = torch.rand(len(positions), generator=fit.generator("labels")).to(fit.device)
        done = 0
        for batch in passes.batches():
            logits = passes.route.forward(batch)
            drawn = draws[done : done + len(logits)]
            done += len(logits)
            for cotangents in _cotangents(fit.task, logits, batch, labels, drawn):
                for name, _, block in passes.route.pull(cotangents):
                    _add_squares(sums[name], block)
            for name, total in totals.items():  # few additions in fp32, the many in float64
                total += sums[name]
                sums[name].zero_()
    return {n: (t / len(positions)).float().contiguous() for n, t in totals.items()}


def _add_squares(total: Tensor, block: Tensor) -> None:
    if len(block) == 1:  # no copy of a large weight's gradient
        total.addcmul_(block[0], block[0])
    else:
        total += block.square().sum(0)


def _cotangents(
    task: Task, logits: Tensor, batch: Batch, labels: Labels, drawn: Tensor
) -> Iterator[Tensor]:
    """What is pulled back: the sum of the squares of what comes of it is the Fisher's diagonal."""
    if labels == "observed":
        yield loss_gradients(task, logits, batch.targets)
    elif labels == "sampled":
        yield loss_gradients(task, logits, _sampled(logits, drawn).to(batch.targets.dtype))
    else:
        yield from _expected(task, logits, batch.targets)


def _sampled(logits: Tensor, drawn: Tensor) -> Tensor:
    """A label per record from its own uniform number: the same however records are batched."""
    below = logits.softmax(1).cumsum(1) <= drawn[:, None] * (1 - 1e-6)
    return below.sum(1).clamp(max=logits.shape[1] - 1)


def _expected(task: Task, logits: Tensor, targets: Tensor) -> Iterator[Tensor]:
    """Σ_y p_y c_y c_yᵀ, with c_y the loss's gradient by the logits, as few outer products.

    The diagonal of Jᵀ A J depends on A alone, so that its eigenvectors serve as well as the C
    weighted gradients. There are C − 1 of them for the cross-entropy, whose A has no more rank,
    and few that matter where the model is sure of its answer.
    """
    classes = logits.shape[1]
    p = logits.cpu().double().softmax(1)  # small matrices, in float64, which not all devices have
    slopes = torch.stack(
        [loss_gradients(task, logits, torch.full_like(targets, y)) for y in range(classes)], 1
    )
    slopes = slopes.cpu().double()
    values, vectors = torch.linalg.eigh(torch.einsum("ny,nya,nyb->nab", p, slopes, slopes))
    values = values.clamp(min=0)
    trace = float(values.sum())
    for k in reversed(range(classes)):
        if float(values[:, : k + 1].sum()) <= NEGLIGIBLE * trace:
            return
        yield (vectors[:, :, k] * values[:, k, None].sqrt()).to(logits)


def gradient(
    fit: Fit,
    network: nn.Module,
    positions: Tensor,
    *,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    batch_size: int | None = None,
    stream: str = "retain",
) -> dict[str, Tensor]:
    """The mean gradient of the records' losses, or a weighted sum of them.

    In eval mode, in fp32, on un-augmented records; modes, gradients and random state are left as
    found.

    Args:
        fit: Supplies records, loss, device and meter.
        network: The network.
        positions: Which records ``[n]``.
        weights: A factor for each of them ``[n]``; ``None``: 1/n.
        labels: Labels for each of them ``[n]``; ``None``: their own.
        batch_size: Records per pass; by default 125 on a CPU and 500 elsewhere.
        stream: Under which name the records are counted.

    Returns:
        Name → float32 tensor of the parameter's shape, contiguous, on the fit's device, for every
        parameter that requires a gradient.

    Raises:
        MethodError: If there are no records, or weights or labels are not one for each.

    Example:
        >>> import torch, efface
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> task = efface.Task(lambda: torch.nn.Linear(2, 2), (x, y), (x, y))
        >>> found = gradient(efface.Fit(task), task.network(), torch.arange(2))
        >>> found["bias"].shape
        torch.Size([2])
    """
    n = len(positions)
    for what, given in {"weights": weights, "labels": labels}.items():
        if given is not None and given.shape != (n,):
            raise MethodError(
                f"gradient: {what} must be one for each of the {n} records, not of shape "
                f"{tuple(given.shape)}."
            )
    if n == 0:
        raise MethodError("gradient: there are no records; give one at least.")
    size = batch_size or (125 if fit.device.type == "cpu" else 500)
    scale = torch.full((n,), 1 / n) if weights is None else weights
    with evaluating(network, fit.device):
        params = trainable(network)
        total = [
            torch.zeros_like(p, memory_format=torch.contiguous_format) for p in params.values()
        ]
        plan, done = torch.split(positions, size), 0
        for batch in fit.task.records.batches(plan, fit.device):
            part = slice(done, done + len(batch.targets))
            targets = batch.targets if labels is None else labels[part].to(batch.targets)
            found = _weighted(fit, network, batch, targets, scale[part], list(params.values()))
            for t, g in zip(total, found, strict=True):
                t += g
            done = part.stop
            fit.meter.images[stream] = fit.meter.images.get(stream, 0) + len(batch.targets)
            if fit.progress:
                fit.progress("gradient", done, n)
    return {name: t.detach().float() for name, t in zip(params, total, strict=True)}


def _weighted(
    fit: Fit,
    network: nn.Module,
    batch: Batch,
    targets: Tensor,
    weights: Tensor,
    params: list[nn.Parameter],
) -> tuple[Tensor, ...]:
    """The weighted sum of a batch's gradients, in one backward pass."""
    with torch.enable_grad():
        logits = fit.logits(network, batch).float()
    slopes = loss_gradients(fit.task, logits.detach(), targets)
    return torch.autograd.grad(
        logits, params, slopes * weights.to(slopes)[:, None], materialize_grads=True
    )
