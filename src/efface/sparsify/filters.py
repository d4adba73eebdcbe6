"""Whole filters as units: how much they matter, and which of them are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efface.data import Batch
from efface.errors import MethodError, MismatchError, listed, nearest
from efface.fitting import Fit
from efface.mask import Mask
from efface.sparsify.block_criteria import BLOCK_CRITERIA, block_scores
from efface.sparsify.criteria import CRITERIA
from efface.sparsify.groups import Group, filter_groups, kept_filters, mask_of
from efface.sparsify.norms import NORMS
from efface.sparsify.parts import denser, scope_of, score, shown, sparsity_within
from efface.sparsify.selection import highest, narrow
from efface.trained import TrainedModel

FILTER_CRITERIA: Mapping[str, Any] = {**NORMS, **BLOCK_CRITERIA}
"""Criteria for whole filters: norms of their weights, and what they carry of records; those for
weights can be summed over a filter besides (see :func:`filter_scores`)."""


def filter_scores(
    name: str, trained: TrainedModel, groups: Sequence[Group], batches: Sequence[Batch], fit: Fit
) -> dict[str, Tensor]:
    """How much every filter matters; the higher, the rather it is kept.

    A filter is the vector of all weights that its layers have in it: of one layer, or of all that
    are added. Biases and batch norm do not count.

    Args:
        name: ``l1`` or ``l2`` norm (Li et al. 2017; He et al. 2018), ``geometric-median`` (the sum
            of the distances to the other filters of the group; He et al. 2019), ``magnitude``
            (``l2``), one of :data:`~efface.sparsify.block_criteria.BLOCK_CRITERIA`, or another
            criterion for weights, whose scores are summed.
        trained: The model.
        groups: Of its network.
        batches: What :func:`efface.sparsify.parts.shown` gives for the criterion.
        fit: Supplies loss, device and randomness.

    Returns:
        Group name → float64 ``[size]``, on the CPU.

    Raises:
        MethodError: If the criterion is unknown, or cannot score this network.

    Example:
        ``filter_scores("l2", trained, filter_groups(task, trained.network).prunable, [], fit)``
    """
    known = {**CRITERIA, **FILTER_CRITERIA}
    if name not in known:
        raise MethodError(f"criterion {name!r} is unknown; {nearest(name, known)}")
    if name == "magnitude":
        name = "l2"
    if name in BLOCK_CRITERIA:
        seen = [batch.positions.cpu() for batch in batches]
        found = block_scores(name, trained, torch.cat(seen or [torch.empty(0)]).long(), fit)
        return {group.name: found[group.name] for group in groups}
    if name in NORMS:
        values: Mapping[str, Tensor] = dict(trained.network.named_parameters())
        measure: Callable[[Tensor], Tensor] = NORMS[name]
    else:
        values, measure = score(name, trained, batches, fit), _total
    return {group.name: measure(vectors(group, values)) for group in groups}


def _total(scores: Tensor) -> Tensor:
    return scores.sum(1)


def vectors(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """The filters of a group as vectors: float64 ``[size, d]``, on the CPU."""
    parts = [weights[name].detach().cpu()[rows].flatten(1) for name, rows in group.weights]
    return torch.cat(parts, 1).double()


def select_filters(
    scores: Mapping[str, Tensor],
    sparsity: float,
    groups: Sequence[Group],
    network: nn.Module,
    *,
    within: Mask | None = None,
) -> Mask:
    """Drop the filters with the lowest scores, the same fraction of every group.

    ``round(sparsity × size)`` filters of each group go, but one always stays. Ties go to the filter
    that comes first.

    Args:
        scores: Group name → ``[size]``.
        sparsity: Fraction of the filters to drop, in [0, 1).
        groups: What to choose from.
        network: Supplies the shapes.
        within: The mask so far: filters that it dropped go first, and single weights that it
            dropped stay away, also those in layers outside of the groups.

    Raises:
        MethodError: If the sparsity is not in [0, 1).
        MismatchError: If scores are missing or NaN, or there are no groups.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> rows = (("weight", torch.arange(3)), ("bias", torch.arange(3)))
        >>> scores = {"weight": torch.tensor([1.0, 3.0, 2.0])}
        >>> select_filters(scores, 0.3, [Group("weight", 3, rows)], net)["bias"].tolist()
        [False, True, True]
    """
    if not 0 <= sparsity < 1:
        raise MethodError(f"sparsity must lie in [0, 1), not {sparsity}.")
    if not groups:
        raise MismatchError("there are no filters to prune in this scope; take scope=weights.")
    absent = [group.name for group in groups if group.name not in scores]
    if absent:
        raise MismatchError(f"no scores for {listed(absent)}; score every group.")
    broken = [group.name for group in groups if bool(torch.isnan(scores[group.name]).any())]
    if broken:
        raise MismatchError(f"scores of {broken} hold NaN; the network is broken, load another.")
    before = kept_filters(within, groups) if within is not None else {}
    keep = {}
    for group in groups:
        ranked = scores[group.name].detach().cpu().double()
        if within is not None:
            ranked = ranked.masked_fill(~before[group.name], -math.inf)
        keep[group.name] = highest(ranked, staying(group.size, sparsity))
    mask = mask_of(groups, keep, network)
    return mask if within is None else _both(mask, within, network)


def staying(size: int, sparsity: float) -> int:
    """How many filters of a group stay: all but ``round(sparsity × size)``, and at least one.

    >>> staying(10, 0.3), staying(4, 0.99)
    (7, 1)
    """
    return max(1, size - round(sparsity * size))


def _both(mask: Mask, within: Mask, network: nn.Module) -> Mask:
    """What two masks keep; an entry that one does not name is for the other to decide."""
    names = [name for name, _ in network.named_parameters() if name in mask or name in within]
    masks = (mask, within)
    return Mask({name: torch.stack([m[name] for m in masks if name in m]).all(0) for name in names})


def groups_of(trained: TrainedModel, scope: str, fit: Fit) -> tuple[Group, ...]:
    """The filter groups that a pruner may touch: those whose first layer is in its scope.

    Layers in scope that are kept whole are noted, with the reason, in the model's lineage.

    Raises:
        MethodError: If the forward pass cannot be traced, or no group is in scope; layers that are
            kept whole are named.
    """
    found = filter_groups(trained.task, trained.network)
    names = set(scope_of(trained, scope))
    groups = tuple(group for group in found.prunable if group.name in names)
    if not groups:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(found.whole.items())[:5])
        raise MethodError(
            f"no filters can be pruned in scope={scope} ({why or 'no layers'}); prune weights "
            "instead: granularity=layer."
        )
    whole = {name: why for name, why in found.whole.items() if f"{name}.weight" in names}
    if whole:
        fit.meter.facts["kept_whole"] = whole
    return groups


@dataclass(frozen=True)
class Choice:
    """What a pruner chooses from in a model: single weights, or whole filters.

    Args:
        pruner: Says what is compared with what.
        trained: The model.
        scope: Names of the weights in scope.
        groups: The filter groups in scope, or None where single weights are chosen.
    """

    pruner: Any
    trained: TrainedModel
    scope: list[str]
    groups: tuple[Group, ...] | None

    @classmethod
    def of(cls, pruner: Any, trained: TrainedModel, fit: Fit) -> Choice:
        """That of a pruner in a model.

        Raises:
            MethodError: If filters are asked for and there are none, or the network cannot be
                traced.
        """
        whole = pruner.granularity == "filter"
        groups = groups_of(trained, pruner.scope, fit) if whole else None
        return cls(pruner, trained, scope_of(trained, pruner.scope), groups)

    def pruned(self) -> float:
        """The fraction that the model's mask has dropped already.

        Raises:
            MethodError: If it is more than the pruner asks for.
        """
        mask = self.trained.mask
        if self.groups is None:
            return denser(self.pruner, sparsity_within(mask, self.trained, self.scope))
        kept = kept_filters(mask, self.groups).values() if mask is not None else ()
        gone = sum(int((~keep).sum()) for keep in kept)
        return denser(self.pruner, gone / sum(group.size for group in self.groups))

    def mask(self, sparsity: float, fit: Fit, positions: Tensor | None = None) -> Mask:
        """The mask at a sparsity; what the model's mask dropped goes first.

        Args:
            sparsity: Of this stage.
            fit: Supplies loss, device and randomness.
            positions: Records that a criterion may see; None where it needs none.
        """
        model, criterion = self.trained, getattr(self.pruner, "criterion", "magnitude")
        batches = shown(criterion, positions, fit) if positions is not None else []
        if self.groups is not None:
            scores = filter_scores(criterion, model, self.groups, batches, fit)
            return select_filters(scores, sparsity, self.groups, model.network, within=model.mask)
        scores = score(criterion, model, batches, fit)
        mask = narrow(scores, sparsity, self.scope, self.pruner.granularity, model.mask)
        held = {n: t for n, t in (model.mask or {}).items() if t.ndim == 1 and n not in mask}
        return Mask({**mask, **held}) if held else mask  # of filters that were dropped before
