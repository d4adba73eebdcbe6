"""Selection: from scores to a mask, at an exact sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from efface.errors import MethodError, MismatchError
from efface.mask import Mask

Granularity = Literal["global", "layer"]


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

    Args:
        scores: Name → scores of the weight's shape.
        sparsity: Fraction of the scope to prune, in [0, 1).
        scope: Names of the weights in scope.
        granularity: What is compared with what.

    Raises:
        MethodError: If the sparsity is not in [0, 1).
        MismatchError: If scores are missing for a name, or the scope is empty.

    Example:
        >>> mask = select({"w": torch.tensor([3.0, 1.0, 2.0, 0.0])}, 0.5, ["w"])
        >>> mask["w"].tolist()
        [True, False, True, False]
    """
    if not 0 <= sparsity < 1:
        raise MethodError(f"sparsity must lie in [0, 1), not {sparsity}.")
    absent = [name for name in scope if name not in scores]
    if absent or not scope:
        raise MismatchError(f"no weights to prune: scope {list(scope)}, without scores {absent}.")
    broken = [name for name in scope if bool(torch.isnan(scores[name]).any())]
    if broken:
        raise MismatchError(f"scores of {broken} hold NaN; the network is broken, load another.")
    if granularity == "layer":
        return Mask({name: _keep(scores[name], sparsity) for name in scope})
    flat = torch.cat([scores[name].detach().reshape(-1).cpu().double() for name in scope])
    sizes = [scores[name].numel() for name in scope]
    parts = torch.split(_keep(flat, sparsity), sizes)
    return Mask({n: part.reshape(scores[n].shape) for n, part in zip(scope, parts, strict=True)})


def _keep(scores: Tensor, sparsity: float) -> Tensor:
    flat = scores.detach().reshape(-1)
    kept = flat.numel() - round(sparsity * flat.numel())
    keep = torch.zeros(flat.numel(), dtype=torch.bool)
    keep[torch.sort(flat, descending=True, stable=True).indices[:kept].cpu()] = True
    return keep.reshape(scores.shape)
