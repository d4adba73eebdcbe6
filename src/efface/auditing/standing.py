"""Which models count for what when pruned topologies are compared; read from their lineages.

Two trainings in the same batch order share the noise of stochastic gradient descent, and their
masks resemble each other for that reason alone. A mask that was handed over says nothing of the
model that received it. And masks of networks that began with other initial weights hardly overlap.
So only models that made their own mask, from the original's initial weights, in another batch
order, are scored against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from efface.auditing.base import Subject
from efface.lineage import Step
from efface.mask import Mask
from efface.seeds import own_seed
from efface.trained import TrainedModel
from efface.unlearn import PruneFirst

_AT_ONCE = {"one-shot", "omp"}
_BY_WEIGHTS = {"magnitude", "l1", "l2", "geometric-median"}


@dataclass(frozen=True)
class Standing:
    """What an audit of the topology rests on.

    Args:
        after: The mask that is audited.
        before: The original's, or None where it cannot be compared with.
        scored: Masks of the references that count.
        others: Masks of references with other initial weights.
        seen: Masks of models trained with D_f, the original's first; empty without it.
        left_out: A phrase for each model that is not compared with.
    """

    after: Mask
    before: Mask | None
    scored: tuple[Mask, ...]
    others: tuple[Mask, ...]
    seen: tuple[Mask, ...]
    left_out: tuple[str, ...]


def standing(subject: Subject) -> Standing | None:
    """Sort the models of an audit; None where the audited model has no mask."""
    after, before = subject.after.mask, subject.before.mask
    if after is None:
        return None
    before = before if before is not None and alike(before, after) else None
    original = subject.before if before is not None else subject.after
    taken = _orders(subject.before)
    left_out: list[str] = []
    sides: dict[str, list[Mask]] = {"scored": [], "others": [], "seen": [before] if before else []}

    def sort(models: Sequence[TrainedModel], word: str, same: str, other: str | None) -> None:
        for number, model in enumerate(models, 1):
            why = _unfit(model, original, after, taken)
            side = same if _same_initial(model, subject.before) else other
            if why is None and side is None:
                why = "began with other initial weights"
            if why is not None or side is None or model.mask is None:
                left_out.append(f"{word} {number} {why}")
                continue
            taken.update(_orders(model))
            sides[side].append(model.mask)

    sort(subject.references, "retrained model", "scored", "others")
    if before is not None:
        sort(subject.originals, "model with the records", "seen", None)
    kept = {side: tuple(masks) for side, masks in sides.items()}
    return Standing(after, before, **kept, left_out=tuple(left_out))


def alike(a: Mask, b: Mask) -> bool:
    """Whether two masks are over the same weights."""
    return {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}


def _unfit(
    model: TrainedModel, original: TrainedModel, mask: Mask, taken: set[tuple[str, int]]
) -> str | None:
    """Why a model's mask says nothing here, or None."""
    training = _training(model)
    if model.mask is None or not alike(model.mask, mask):
        return "has no mask over the same weights"
    if training is None or _given(model, training):
        kind = None if training is None else model.lineage[training].detail.get("like")
        return "was given its mask" + (f" ({kind})" if kind else "")
    ours, theirs = _pruning(original), _pruning(model)
    if ours is not None and (theirs is None or dict(ours) != dict(theirs)):
        return "was pruned in another way than the original"
    if model.lineage[training].detail.get("order") == "same" or taken & _orders(model):
        return "shares a batch order, and so the noise of training, with a model that counts"
    return None


def _same_initial(a: TrainedModel, b: TrainedModel) -> bool:
    return bool(a.initial and b.initial and a.initial["digest"] == b.initial["digest"])


def _training(model: TrainedModel) -> int | None:
    """Which step of the lineage trained a model's weights from their initial values."""
    for place in reversed(range(len(model.lineage))):
        step = model.lineage[place]
        if step.verb in ("train", "retrain") or (step.method or {}).get("method") == "retrain":
            return place
    return None


def _given(model: TrainedModel, training: int) -> bool:
    """Whether a model's mask came from elsewhere than its own training."""
    pruned = [place for place, step in enumerate(model.lineage) if step.verb == "prune"]
    like = model.lineage[training].detail.get("like")
    return not pruned or pruned[0] < training or like in ("same-mask", "rewound")


def _pruning(model: TrainedModel) -> Mapping[str, Any] | None:
    """The pruner that made a model's mask, from its lineage."""
    for step in reversed(model.lineage):
        method = step.method or {}
        if step.verb == "prune":
            return method
        if method.get("method") == PruneFirst.name:
            return dict(method["pruner"])
    return None


def _orders(model: TrainedModel) -> set[tuple[str, int]]:
    """Whose seeds gave the order of the batches in which a model's mask was made."""
    found: set[tuple[str, int]] = set()
    training = _training(model)
    for step in model.lineage[training:] if training is not None else ():
        if step.verb == "prune" and not _decided(step):
            found.add(("prune", int(step.detail.get("order_seed", step.seed))))
        elif step.verb == "train":
            found.add(("train", step.seed))
        elif step.verb != "prune" and step is model.lineage[training or 0]:
            found.add(("train", own_seed(step.seed)))
    return found


def _decided(step: Step) -> bool:
    """Whether a pruner reads its mask off the trained weights, before it trains or draws itself."""
    method = dict(step.method or {})
    return method.get("method") in _AT_ONCE and method.get("criterion") in _BY_WEIGHTS
