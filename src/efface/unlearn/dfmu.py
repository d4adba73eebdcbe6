"""DFMU: one forward and one backward pass find the blocks that carry D_f; they are turned down."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from efface.errors import MethodError, listed
from efface.fitting import Fit
from efface.sparsify.blocks import (
    BlockChoice,
    Blocks,
    BlockScore,
    Carried,
    Patch,
    Weighed,
    carried,
    choose,
    contrast,
    described,
    draw,
    dropped,
    factors,
    find_blocks,
    reach,
    rescalings,
    strength_for,
    turn_down_,
    weigh,
)
from efface.sparsify.units import refreshed_statistics
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.base import Unlearner
from efface.unlearn.finetune import FineTune
from efface.unlearn.frugal import share

DOUBT = 0.05
"""Above this p the blocks are taken not to know D_f."""
LITTLE = 1.5
"""Below this many times its margin, D_f is likely to be answered as before."""
WRONG_TOOL = "replay and amnesiac undo single records, l1-sparse and unprune take any"


def _one_epoch() -> Unlearner:
    return FineTune(epochs=1)


@dataclass(frozen=True)
class DFMU:
    """DFMU: turn down the blocks that carry D_f and not the rest; recover on a part of D_r.

    After Sajith U and Keserwani 2026 (data-frugal machine unlearning). One forward and one backward
    pass over a few records of D_f and D_r score every block; blocks with I_f/I_r above a threshold
    are multiplied by β = min(1, λ I_r/I_f), on batch norm's scale and shift where one follows; then
    a short recovery on a small fraction of D_r. Nothing else of D_r is read.

    The paper's text was not at hand: its abstract and section titles say that blocks are scored in
    one pass each way, that knowledge is preserved, and that weights are rescaled. Score, rule,
    factor and recovery are choices of ours, each an option.

    Blocks carry what many records share: a class, a sub-class, a manner of writing. Random records
    share nothing; they are refused without ``force``. Whether blocks tell D_f from the rest is
    tested, and noted with the model.

    Args:
        score: How blocks are scored: ``score.kind``, ``score.granularity``, ``score.signal``,
            ``score.sample``, ``score.preserve``; see
            :class:`~efface.sparsify.blocks.BlockScore`.
        select: Which are chosen: ``select.by``, ``select.amount``, ``select.cap``; see
            :class:`~efface.sparsify.blocks.BlockChoice`.
        action: ``dampen`` by β; ``prune``: β = 0; ``reinit``: as in a freshly initialised network.
            Where β is 0, a mask holds all that the block owns at zero.
        strength: λ: the smaller, the harder; ``None``: the task's default, else the gentlest, 1 at
            most, at which the margin on D_f should be gone
            (:func:`~efface.sparsify.blocks.strength_for`).
        fraction: Share of D_r that may be read, in (0, 1]; stratified by class.
        inner: The recovery, on that share: any unlearner.
        force: Go on with random records.
    """

    name: ClassVar[str] = "dfmu"
    title: ClassVar[str] = "Data-frugal machine unlearning (DFMU)"
    paper: ClassVar[str] = "after Sajith U and Keserwani 2026"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain"})

    score: BlockScore = field(default_factory=BlockScore)
    select: BlockChoice = field(default_factory=BlockChoice)
    action: Literal["dampen", "prune", "reinit"] = "dampen"
    strength: float | None = None
    fraction: float = 0.13
    inner: Unlearner = field(default_factory=_one_epoch)
    force: bool = False

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 <= self.strength < math.inf:
            raise MethodError(f"{self.name}: strength must be 0 or more, not {self.strength}.")
        if not 0 < self.fraction <= 1:
            raise MethodError(f"{self.name}: fraction must lie in (0, 1], not {self.fraction}.")

    def check(self, trained: TrainedModel, split: Split) -> None:
        """Raise for random records, and for a network without blocks."""
        if split.selector.get("kind") == "random" and not self.force:
            raise MethodError(
                f"{self.name} turns down what carries a class or another trait, and random records "
                f"have none in common: {WRONG_TOOL}; go on all the same with --force."
            )
        find_blocks(trained.task, trained.network, self.score.granularity)

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        split = share(split, self.fraction, fit)
        blocks = find_blocks(trained.task, trained.network, self.score.granularity)
        forget, retain = self._sample(split, fit)
        found = carried(trained.network, blocks, self.score, forget, retain, fit)
        weighed = weigh(found, blocks, self.score.preserve)
        chosen = choose(weighed, blocks, self.select)
        apart = contrast(found, blocks, fit.generator("contrast"))
        strength = self._strength(found, weighed, chosen.blocks, apart["p"])
        beta = factors(weighed, chosen.blocks, strength)
        facts = described(blocks, weighed, chosen, beta) | apart
        facts |= {"kind": self.score.kind, "signal": self.score.signal, "action": self.action}
        facts |= {"strength": strength, "reach": reach(found, beta)}
        if self.action == "reinit":  # no factor says what fresh weights carry
            facts |= {"strength": None, "factor": None, "reach": None}
        facts |= {"records": {"forget": len(forget), "retain": len(retain)}}
        fit.meter.facts["blocks"] = facts
        self._say(facts)
        self._edit(trained, blocks, chosen.blocks, beta, split, fit)
        self.inner(trained, split, fit.at("inner"))

    def _strength(self, found: Carried, weighed: Weighed, chosen: Tensor, p: float) -> float:
        """λ: what was asked for, else by the margin; gentle where blocks do not know D_f."""
        if self.action == "prune":
            return 0.0
        if self.strength is not None:
            return self.strength
        return strength_for(found, weighed, chosen) if p <= DOUBT else 1.0

    def _sample(self, split: Split, fit: Fit) -> tuple[Tensor, Tensor]:
        """The records that are scored, of D_f and of D_r."""
        count = self.score.sample
        forget = draw(fit, split.forget, count, "scored/forget")
        retain = draw(fit, split.retain, count, "scored/retain")
        labels = fit.task.records.targets
        there, seen = set(labels[split.retain].tolist()), set(labels[retain].tolist())
        if there - seen:
            warnings.warn(
                f"the {len(retain)} scored records of D_r hold none of class "
                f"{listed(sorted(there - seen))}, whose blocks nothing protects; give a larger "
                "score.sample.",
                stacklevel=2,
            )
        return forget, retain

    def _say(self, facts: Mapping[str, Any]) -> None:
        """Say what a user should know before looking at the result."""
        fewer = "select.amount" if self.select.by == "budget" else "select.cap"
        notes = []
        if not facts["selected"]:
            notes.append(
                "no block was selected, so that only the recovery changes the model; "
                "select.by=budget takes some in any case."
            )
        if facts["kept"]:
            notes.append(
                f"every block of {listed(facts['kept'])} was selected; the one that carries least "
                f"of D_f stays as it is: a lower {fewer} takes fewer."
            )
        if facts["p"] > DOUBT:
            notes.append(
                "the blocks tell D_f from the rest no better than they tell random records apart "
                f"(p = {facts['p']:.2g}), so that turning blocks down is the wrong tool here: "
                f"{WRONG_TOOL}."
            )
        elif facts["reach"] is not None and facts["reach"] < LITTLE and facts["selected"]:
            notes.append(
                f"the {facts['selected']} blocks that were turned down carry {facts['reach']:.2g} "
                "times the margin that D_f has: much of it may stay; lower select.amount or "
                "strength, or take another method."
            )
        for note in notes:
            warnings.warn(note, stacklevel=3)

    def _edit(
        self,
        trained: TrainedModel,
        blocks: Blocks,
        chosen: Tensor,
        beta: Tensor,
        split: Split,
        fit: Fit,
    ) -> None:
        """Change the chosen blocks; statistics of batch norm are taken anew on D_r's share."""
        if self.action == "reinit":
            _drawn_anew(trained, blocks.territory(chosen, trained.network), fit)
        else:
            asked = {k: v for k, v in split.selector.items() if k in ("kind", "class")}
            changes = rescalings(trained.network, blocks, beta)
            trained.patch = Patch(tuple(changes), trained.digest, {"method": self.name, **asked})
            turn_down_(trained.network, changes)
            off = chosen & (beta == 0)
            if bool(off.any()):
                trained.set_mask(dropped(blocks, off, trained.network, trained.mask))
        if bool(chosen.any()):
            refreshed_statistics(trained, split.retain, fit)


def _drawn_anew(trained: TrainedModel, where: Mapping[str, Tensor], fit: Fit) -> None:
    """Put weights of a freshly initialised network there; what the mask drops stays dropped."""
    fresh = dict(fit.fresh().named_parameters())
    with torch.no_grad():
        for name, p in trained.network.named_parameters():
            if name in where:
                p.copy_(torch.where(where[name].to(p.device), fresh[name].to(p), p))
    trained.set_mask(trained.mask)
