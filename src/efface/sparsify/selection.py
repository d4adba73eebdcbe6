"""Selection: from scores to a mask, at an exact sparsity."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from efface.errors import MethodError, MismatchError, listed
from efface.mask import Mask

Granularity = str
"""``"global"``, ``"layer"``, a pattern such as ``"2:4"``, or ``"filter"`` (whole filters)."""


def select(
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: Sequence[str],
    granularity: Granularity = "global",
) -> Mask:
    """Keep the weights with the highest scores.

    Exactly ``round(sparsity × n)`` of the ``n`` entries in scope are pruned: over all of them
    together (``"global"``), or in each weight by itself (``"layer"``). Ties go to the entry that
    comes first.

    A pattern ``"n:m"`` keeps the ``n`` best of every ``m`` consecutive inputs of a unit. The inputs
    of a convolution are counted with the channel innermost: (kernel row, kernel column, channel),
    the order in which sparse hardware reads them. Where ``m`` does not divide their number, the
    ``r`` inputs that are left over keep ``⌈r·n/m⌉``, so that the mask can be a little denser than
    ``1 − n/m``.

    Args:
        scores: Name → scores of the weight's shape.
        sparsity: Fraction of the scope to prune, in [0, 1); ``1 − n/m`` for a pattern.
        scope: Names of the weights in scope.
        granularity: What is compared with what.

    Raises:
        MethodError: If the sparsity is not in [0, 1), or not that of the pattern, or filters are
            asked for (:func:`efface.sparsify.filters.select_filters`).
        MismatchError: If scores are missing for a name, or the scope is empty.

    Example:
        >>> mask = select({"w": torch.tensor([3.0, 1.0, 2.0, 0.0])}, 0.5, ["w"])
        >>> mask["w"].tolist()
        [True, False, True, False]
    """
    check_granularity(sparsity, granularity)
    if granularity == "filter":
        raise MethodError("filters are not chosen by single weights; take select_filters.")
    absent = [name for name in scope if name not in scores]
    if not scope:
        raise MismatchError("the scope holds no weights to prune; take scope=all or weights.")
    if absent:
        raise MismatchError(f"no scores for {listed(absent)}; score every weight in scope.")
    broken = [name for name in scope if bool(torch.isnan(scores[name]).any())]
    if broken:
        raise MismatchError(f"scores of {broken} hold NaN; the network is broken, load another.")
    shape = pattern(granularity)
    if shape is not None:
        return Mask({name: _keep_groups(scores[name], *shape) for name in scope})
    if granularity == "layer":
        return Mask({name: _keep(scores[name], sparsity) for name in scope})
    flat = torch.cat([scores[name].detach().reshape(-1).cpu().double() for name in scope])
    sizes = [scores[name].numel() for name in scope]
    parts = torch.split(_keep(flat, sparsity), sizes)
    return Mask({n: part.reshape(scores[n].shape) for n, part in zip(scope, parts, strict=True)})


def narrow(
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: Sequence[str],
    granularity: Granularity,
    within: Mask | None,
) -> Mask:
    """A stage on the way to a sparse mask: what an earlier mask dropped goes first.

    Masks of rising sparsity are nested. With a pattern, a stage drops the lowest of the entries
    that the pattern does not hold, until at its own sparsity nothing else is left.

    Args:
        scores: As for :func:`select`.
        sparsity: Of this stage; for a pattern at most ``1 − n/m``.
        scope: As for :func:`select`.
        granularity: As for :func:`select`.
        within: The mask so far, or None for a dense model.

    Raises:
        MethodError: As :func:`select`.
        MismatchError: As :func:`select`.

    Example:
        >>> scores = {"w": torch.tensor([[3.0, 1.0, 2.0, 0.5]])}
        >>> half = narrow(scores, 0.5, ["w"], "global", Mask({"w": scores["w"] != 3.0}))
        >>> half["w"].tolist()
        [[False, True, True, False]]
    """
    if within is not None:
        scores = {
            name: s.masked_fill(~within[name].to(s.device), -math.inf) if name in within else s
            for name, s in scores.items()
        }
    shape = pattern(granularity)
    if shape is None:
        return select(scores, sparsity, scope, granularity)
    held = select(scores, 1 - shape[0] / shape[1], scope, granularity)
    lifted = {n: scores[n].masked_fill(held[n].to(scores[n].device), math.inf) for n in scope}
    return select(lifted, min(sparsity, held.sparsity), scope, "global")


def pattern(granularity: Granularity) -> tuple[int, int] | None:
    """``n`` and ``m`` of a pattern, or None for ``global``, ``layer`` and ``filter``.

    Raises:
        MethodError: If it is neither.

    >>> pattern("2:4"), pattern("layer")
    ((2, 4), None)
    """
    if granularity in ("global", "layer", "filter"):
        return None
    found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", granularity)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise MethodError(
            "granularity must be global, layer, filter or a pattern such as 2:4, not "
            f"{granularity!r}."
        )
    return int(found[1]), int(found[2])


def check_granularity(sparsity: float, granularity: Granularity) -> None:
    """Check a sparsity, and that it is the one of the pattern where there is one.

    Raises:
        MethodError: Naming the sparsity that fits.
    """
    if not 0 <= sparsity < 1:
        raise MethodError(f"sparsity must lie in [0, 1), not {sparsity}.")
    shape = pattern(granularity)
    if shape is not None and abs(sparsity - (1 - shape[0] / shape[1])) > 1e-6:
        fits = round(1 - shape[0] / shape[1], 6)
        raise MethodError(
            f"granularity {granularity} is a sparsity of {fits}, not {sparsity}; give "
            f"sparsity={fits}, or another granularity."
        )


def dead_layers(mask: Mask) -> list[str]:
    """Names of the weights that have nothing left.

    >>> dead_layers(Mask({"a": torch.tensor([True, False]), "b": torch.tensor([False])}))
    ['b']
    """
    return [name for name, keep in mask.items() if not bool(keep.any())]


def highest(scores: Tensor, count: int) -> Tensor:
    """Where the highest scores are: bool of their shape, ties to the first, on the CPU.

    >>> highest(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2).tolist()
    [False, True, True, False]
    """
    flat = scores.detach().reshape(-1)
    keep = torch.zeros(flat.numel(), dtype=torch.bool)
    keep[torch.sort(flat, descending=True, stable=True).indices[:count].cpu()] = True
    return keep.reshape(scores.shape)


def _keep(scores: Tensor, sparsity: float) -> Tensor:
    return highest(scores, scores.numel() - round(sparsity * scores.numel()))


def _keep_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Per unit (dim 0) the n best of every m inputs; the rest of a unit keeps its share."""
    inner = scores.detach().cpu()
    inner = inner.movedim(1, -1) if inner.ndim > 2 else inner
    rows = inner.reshape(len(inner) if inner.ndim > 1 else 1, -1)
    length, groups = rows.shape[1], -(-rows.shape[1] // m)
    padded = rows.new_full((len(rows), groups * m), -math.inf)
    padded[:, :length] = rows
    order = padded.view(len(rows), groups, m).sort(dim=-1, descending=True, stable=True).indices
    rank = order.argsort(dim=-1)  # what pads comes last: the sort is stable
    quota = torch.full((groups, 1), n)
    quota[-1] = -(-(length - (groups - 1) * m) * n // m)
    keep = (rank < quota).reshape(len(rows), -1)[:, :length].reshape(inner.shape)
    return keep.movedim(-1, 1) if scores.ndim > 2 else keep
