"""What a mask keeps or drops, one by one: single weights, or whole filters.

Un-pruning switches some of what a mask has dropped on again, and later drops as many once more. It
does not matter to it what they are: here both kinds have names, places, scores and a way back to a
:class:`~efface.Mask`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from efface.data import order
from efface.errors import MethodError
from efface.fitting import Fit
from efface.mask import Mask
from efface.placement import placed, preserved
from efface.sparsify.filters import filter_scores, vectors
from efface.sparsify.groups import Group, filter_groups, is_structured, kept_filters, mask_of
from efface.sparsify.parts import score, shown
from efface.sparsify.selection import Granularity, highest, pattern, select
from efface.steps import batch_norms, recalibrate_bn
from efface.trained import TrainedModel

ENOUGH = 512
"""Records that batch-norm statistics are taken on."""

Places = Mapping[str, Tensor]
"""Layer (or filter group) → bool, one entry for each weight (or filter)."""


@dataclass(frozen=True)
class Units:
    """The weights, or the filters, of a masked model.

    Args:
        alive: What the mask keeps; layer → bool of the weight's shape, group → bool ``[size]``.
        groups: The filter groups, or None where units are single weights.
        held: What else the mask names (biases of filters, where units are single weights): it
            stays as it is.
    """

    alive: dict[str, Tensor]
    groups: tuple[Group, ...] | None = None
    held: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, trained: TrainedModel) -> Units:
        """Those of a model: filters where its mask drops whole filters and nothing else.

        Raises:
            MethodError: If nothing is pruned.
        """
        mask = trained.mask
        if mask is None or mask.kept == mask.total:
            raise MethodError(
                "nothing is pruned in this model, so that there is no topology to move; prune it "
                "first (efface prune), or take the inner method alone."
            )
        groups = _groups(trained, mask)
        if groups:
            return cls(dict(kept_filters(mask, groups)), groups)
        held = {name: keep for name, keep in mask.items() if keep.ndim < 2}
        return cls({name: keep for name, keep in mask.items() if keep.ndim >= 2}, None, held)

    def now(self, trained: TrainedModel) -> Units:
        """The same units, as a model's mask keeps them now; what it does not name is kept."""
        mask = trained.mask or Mask({})
        if self.groups is not None:
            return replace(self, alive=dict(kept_filters(mask, self.groups)))
        kept = {n: mask[n] if n in mask else torch.ones_like(t) for n, t in self.alive.items()}
        return replace(self, alive=kept)

    def mask(self, alive: Places, network: nn.Module) -> Mask:
        """The mask that keeps these."""
        if self.groups is not None:
            return mask_of(self.groups, alive, network)
        return Mask({**alive, **self.held})

    def scores(
        self, criterion: str, trained: TrainedModel, positions: Tensor, fit: Fit
    ) -> dict[str, Tensor]:
        """How much each of them matters in a model, whatever its mask says, on the CPU."""
        batches = shown(criterion, positions, fit)
        if self.groups is None:
            found = score(criterion, trained, batches, fit)
            return {name: found[name].cpu() for name in self.alive}
        return filter_scores(criterion, trained, self.groups, batches, fit)

    def sizes(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The magnitude of each in other weights: absolute value, or L2 norm of a filter."""
        if self.groups is None:
            return {name: weights[name].detach().abs().cpu() for name in self.alive}
        return {group.name: vectors(group, weights).norm(dim=1) for group in self.groups}

    def again(
        self, scores: Mapping[str, Tensor], granularity: Granularity, among: Places | None = None
    ) -> dict[str, Tensor]:
        """As many as are alive here, those with the highest scores.

        Args:
            scores: One for each.
            among: What to choose from; by default everything.
            granularity: ``layer`` keeps as many in every layer as now, ``global`` altogether, a
                pattern such as ``2:4`` as many in every group of inputs.
        """
        among = among or {name: torch.ones_like(keep) for name, keep in self.alive.items()}
        shape = pattern(granularity) if self.groups is None else None
        if shape is not None:
            ranked = {n: s.masked_fill(~among[n], -torch.inf) for n, s in scores.items()}
            return dict(select(ranked, 1 - shape[0] / shape[1], list(self.alive), granularity))
        many = counts(self.alive)
        return best(scores, among, many if granularity == "layer" else sum(many.values()))


def counts(places: Places) -> dict[str, int]:
    """How many places there are in each layer."""
    return {name: int(where.sum()) for name, where in places.items()}


def best(
    scores: Mapping[str, Tensor], among: Places, many: Mapping[str, int] | int
) -> dict[str, Tensor]:
    """The places with the highest scores, ties to the first: so many per layer, or altogether.

    >>> scores, here = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([False, True, True])
    >>> best({"w": scores}, {"w": here}, {"w": 1})["w"].tolist()
    [False, False, True]
    """
    ranked = {n: s.double().masked_fill(~among[n], -torch.inf) for n, s in scores.items()}
    if not isinstance(many, int):
        return {name: highest(ranked[name], many[name]) for name in among}
    chosen = highest(torch.cat([ranked[name].reshape(-1) for name in among]), many)
    parts = torch.split(chosen, [among[name].numel() for name in among])
    return {n: part.reshape(among[n].shape) for n, part in zip(among, parts, strict=True)}


def _groups(trained: TrainedModel, mask: Mask) -> tuple[Group, ...]:
    """The filter groups that a mask is made of; none where it is made of single weights."""
    if not is_structured(mask):
        return ()
    try:
        groups = filter_groups(trained.task, trained.network).prunable
    except MethodError:  # the forward pass cannot be traced: rows, but no filters
        return ()
    named = tuple(g for g in groups if g.name in mask)
    same = named and mask_of(named, kept_filters(mask, named), trained.network) == mask
    return named if same else ()


def refreshed_statistics(trained: TrainedModel, positions: Tensor, fit: Fit) -> None:
    """Take batch-norm statistics anew, on up to 512 of these records; counted as images."""
    network, task = trained.network, trained.task
    if not batch_norms(network):
        return
    where = order(fit.seed, f"{fit.path}/statistics", 0, positions, len(task.records))[:ENOUGH]
    with preserved(network), placed(network, fit.device, train=False):
        recalibrate_bn(network, task, where, task.fit.batch_size, fit.device)
    seen = fit.meter.images
    seen["statistics"] = seen.get("statistics", 0) + len(where)
