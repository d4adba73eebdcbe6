"""Un-pruning: what was deleted shaped the topology, too; move the mask, around any unlearner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from efface.errors import MethodError, NeedsError
from efface.fitting import Fit
from efface.mask import Mask
from efface.replay import initial_weights
from efface.sparsify import CRITERIA, AtInit, made_by
from efface.sparsify.filters import FILTER_CRITERIA
from efface.sparsify.parts import install
from efface.sparsify.units import Places, Units, best, counts, refreshed_statistics
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.base import Unlearner
from efface.unlearn.finetune import FineTune

Weights = Mapping[str, Tensor]
Values = Literal["initial", "rewind", "random", "zero"]

SMALL = 0.1
"""Size of ``values="random"``, relative to the root mean square of a layer's kept weights."""


@dataclass(frozen=True)
class Unprune:
    """Un-pruning of Xiao et al. 2025: thaw, grow, unlearn, prune again.

    Some of what the mask has dropped gets values again (*thaw*) and is switched on (*grow*), the
    inner method runs under the denser mask, and the criterion that made the old mask drops as much
    again as was grown. Density is restored exactly. Units are single weights, or whole filters
    where the mask drops nothing else.

    The paper leaves open how large ``p`` is, how often and in which order the steps are repeated,
    and what is compared with what; the ablation behind these defaults, and what the method does
    and does not do, are in ``docs/methods/unprune.md``.

    Args:
        inner: Any unlearner; nothing in it changes except the mask on its updates.
        p: Fraction of the dropped units to grow, in (0, 1]; with ``order=drop`` of the kept ones.
        values: What grown units begin with: the ``initial`` weights, the ``rewind`` weights,
            ``random`` ones (normal, a tenth of the layer's kept weights in size), or ``zero``.
        pick: Which units grow: those with the largest ``magnitude`` of these values, with the
            largest ``gradient`` of the loss on D_r (of a filter that begins with these values, of
            a weight where it is), or ``random`` ones.
        rounds: How often.
        order: ``once``: grow and unlearn in every round, prune again after the last; ``every``:
            prune again in every round; ``drop``: drop the least first, grow as many, then unlearn,
            as RigL does (Evci et al. 2020).
        granularity: Count and compare in every ``layer`` by itself, or over all of them
            (``global``; filters are always compared within their group).
        criterion: What prunes again: by default the criterion that made the mask. Needed where that
            is not known: for a model that was adopted.

    Example:
        ``efface.forget(trained, split, Unprune(L1Sparse(), p=0.2, values="initial"))``
    """

    name: ClassVar[str] = "unprune"
    title: ClassVar[str] = "Un-pruning"
    paper: ClassVar[str] = "Xiao et al. 2025"

    inner: Unlearner = field(default_factory=FineTune)
    p: float = 0.2
    values: Values = "initial"
    pick: Literal["magnitude", "gradient", "random"] = "magnitude"
    rounds: int = 1
    order: Literal["once", "every", "drop"] = "once"
    granularity: Literal["layer", "global"] = "layer"
    criterion: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise MethodError(f"{self.name}: p must lie in (0, 1], not {self.p}.")
        if self.rounds < 1:
            raise MethodError(f"{self.name}: rounds must be 1 or more, not {self.rounds}.")
        if self.values == "zero" and self.pick == "magnitude":
            raise MethodError(
                f"{self.name}: values=zero leaves pick=magnitude nothing to compare; take "
                "pick=gradient or pick=random."
            )

    @property
    def needs(self) -> frozenset[str]:
        """The retained data, a mask, and the values that grown units begin with."""
        return frozenset({"retain", "mask"} | {self.values} & {"initial", "rewind"})

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        criterion, old = remaker(self.criterion, trained), Units.of(trained)
        if old.groups is not None and self.values == "zero":
            raise MethodError(
                "whole filters cannot grow from zero: no gradient reaches them; take "
                "values=initial, rewind or random."
            )
        begin = thawed(self.values, trained, fit)
        for k in range(self.rounds):
            here, units = fit.at(f"round-{k}"), old.now(trained)
            alive = units.alive
            if self.order == "drop":
                scores = units.scores(criterion, trained, split.retain, here)
                gone = self._share(units, alive)
                alive = best(scores, alive, _less(counts(alive), gone))
                many = gone
            else:
                many = self._share(units, {name: ~keep for name, keep in alive.items()})
            scores = self._preference(units, begin, trained, split, here.at("pick"))
            grown = best(scores, {name: ~keep for name, keep in alive.items()}, many)
            switch_on(trained, units, alive, grown, begin)
            if units.groups is not None:
                refreshed_statistics(trained, split.retain, here)
            self.inner(trained, split, here.at("inner"))
            trained.set_mask(trained.mask)  # also around methods that never call the loop
            if self.order == "every" or (self.order == "once" and k == self.rounds - 1):
                granularity = "layer" if old.groups is not None else self.granularity
                among = old.now(trained).alive
                prune_again(trained, old, criterion, granularity, split, here, among)
        fit.meter.facts["topology"] = moved(old, trained)

    def _share(self, units: Units, places: Places) -> dict[str, int] | int:
        """The fraction p of some places: in every layer, or altogether."""
        many = counts(places)
        if units.groups is not None or self.granularity == "layer":
            return {name: round(self.p * n) for name, n in many.items()}
        return round(self.p * sum(many.values()))

    def _preference(
        self, units: Units, begin: Weights, trained: TrainedModel, split: Split, fit: Fit
    ) -> dict[str, Tensor]:
        """Which units are switched on first: those with the highest values."""
        if self.pick == "magnitude":
            return units.sizes(begin)
        if self.pick == "random":
            return units.scores("random", trained, split.retain, fit)
        seen = trained
        if units.groups is not None:
            seen = _all_thawed(trained, units, begin)
            refreshed_statistics(seen, split.retain, fit)  # a dead channel has no variance
        return units.scores("gradient", seen, split.retain, fit)


def _less(many: dict[str, int], gone: dict[str, int] | int) -> dict[str, int] | int:
    """What is left of some counts."""
    if isinstance(gone, int):
        return sum(many.values()) - gone
    return {name: n - gone[name] for name, n in many.items()}


def remaker(given: str | None, trained: TrainedModel) -> str:
    """The criterion that prunes a model again: the one that made its mask, else the given one.

    Raises:
        NeedsError: If it is not known and not given.
        MethodError: If it is not the one that made the mask, or looked at weights before training.
    """
    maker = made_by(trained)
    known = (*CRITERIA, *FILTER_CRITERIA)
    if given is not None and given not in known:
        raise MethodError(f"criterion {given!r} is unknown; one of {', '.join(known)}.")
    if maker is None:
        if given is None:
            raise NeedsError(
                "which criterion made this mask is not known (it was given, or came with an "
                "adopted model); say criterion=magnitude, or whichever did."
            )
        return given
    made: str = getattr(maker, "criterion", "magnitude")
    if isinstance(maker, AtInit) or made == "random":
        raise MethodError(
            f"the mask was made by {made} before training, or at random, and trained weights do "
            "not tell what it would be without the records; make it again on D_r with "
            "prune-first, or take the inner method alone."
        )
    if given not in (None, made):
        raise MethodError(
            f"the mask was made by the criterion {made}, not {given}: pruning again by another "
            f"compares what does not belong together; leave criterion out, or say {made}."
        )
    return made


def thawed(values: Values, trained: TrainedModel, fit: Fit) -> Weights:
    """What grown units begin with: parameter → tensor."""
    if values == "initial":
        return initial_weights(trained, fit)
    if values == "rewind":
        assert trained.rewind is not None
        return trained.rewind
    params = {n: p.detach().cpu() for n, p in trained.network.named_parameters()}
    if values == "zero":
        return {name: torch.zeros_like(p) for name, p in params.items()}
    draw = fit.generator("thaw")
    made = {}
    for name, keep in (trained.mask or Mask({})).items():
        kept = params[name][keep].double()
        size = float(kept.square().mean().sqrt()) if len(kept) else 0.0
        noise = torch.randn(keep.shape, generator=draw, dtype=params[name].dtype)
        made[name] = SMALL * size * noise
    return made


def switch_on(
    trained: TrainedModel, units: Units, alive: Places, grown: Places, begin: Weights
) -> None:
    """Install the mask with what has grown, which begins with its values."""
    before = units.mask(alive, trained.network)
    after = units.mask({n: alive[n] | grown[n] for n in alive}, trained.network)
    trained.set_mask(after)
    params = dict(trained.network.named_parameters())
    with torch.no_grad():
        for name, keep in after.items():
            new = (keep & ~before[name]).to(params[name].device)
            params[name][new] = begin[name].to(params[name])[new]


def _all_thawed(trained: TrainedModel, units: Units, begin: Weights) -> TrainedModel:
    """A copy in which everything that was dropped has its values."""
    twin = trained.copy()
    gone = {name: ~keep for name, keep in units.alive.items()}
    switch_on(twin, units, units.alive, gone, begin)
    return twin


def prune_again(
    trained: TrainedModel,
    old: Units,
    criterion: str,
    granularity: str,
    split: Split,
    fit: Fit,
    among: Places | None = None,
) -> None:
    """Keep as many units as before, those with the highest scores now.

    Raises:
        MethodError: If there are not as many any more among those to choose from.
    """
    wanted, there = counts(old.alive), counts(among if among is not None else {})
    short = [name for name, n in there.items() if n < wanted[name]]
    if granularity != "layer":  # layers may lose to others
        short = short if sum(there.values()) < sum(wanted.values()) else []
    if short:
        raise MethodError(
            "the inner method pruned further than the mask was before, so that its density cannot "
            "be restored; prune first (prune-first or efface prune), then un-prune."
        )
    scores = old.scores(criterion, trained, split.retain, fit.at("again"))
    shape = getattr(made_by(trained), "granularity", granularity)
    pattern = shape if ":" in shape else granularity
    mask = old.mask(old.again(scores, pattern, among), trained.network)
    install(trained, mask, allow_dead_layers=True)
    if old.groups is not None:
        refreshed_statistics(trained, split.retain, fit.at("again"))


def moved(old: Units, trained: TrainedModel) -> dict[str, int]:
    """How many units a model keeps, and how many of them are others than before."""
    new = old.now(trained).alive
    kept = sum(counts(new).values())
    both = sum(int((new[name] & old.alive[name]).sum()) for name in new)
    return {"kept": kept, "moved": kept - both, "filters": int(old.groups is not None)}
