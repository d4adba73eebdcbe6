"""Findings about the pruned topology: overlap with retrained models, trace, membership."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from efface.auditing.base import Finding, Subject, absent
from efface.auditing.standing import Standing, standing
from efface.auditing.topology import chance, initial_mask, layers, overlaps
from efface.auditing.trace import Floats, ceiling_interval
from efface.errors import EffaceError
from efface.fitting import Fit
from efface.mask import Mask
from efface.replay import initial_weights
from efface.stats import mean_interval

DENSE = "the model is not pruned: it has no topology to look at."
HOW_WITHOUT = "efface retrain --like repruned --initial model --seed N"


def audited(
    name: str,
    subject: Subject,
    find: Callable[[Standing], Finding],
    scored: int = 0,
    before: bool = False,
) -> Finding:
    """A finding about the topology, or why there is none.

    Args:
        name: Of the finding.
        subject: The models.
        find: Makes the finding.
        scored: How many references it needs that count.
        before: Whether it needs the original's mask.
    """
    here = standing(subject)
    if here is None:
        return absent(name, DENSE, "undefined")
    if before and here.before is None:
        why = "the original has no mask over the same weights: there is no topology to start from."
        return absent(name, why, "undefined")
    if len(here.scored) < scored:
        many = {1: "a reference", 2: "two references", 3: "three references"}[scored]
        why = f"needs {many} pruned by itself, begun with the original's initial weights, in "
        why += f"another batch order ({HOW_WITHOUT}); {_count(len(here.scored))}."
        return absent(name, why + left_out(here), "not_estimable")
    return find(here)


def _count(n: int) -> str:
    return f"{n} of the given ones count" if n != 1 else "1 of the given ones counts"


def left_out(here: Standing) -> str:
    """Which models were not compared with, and why, as a sentence."""
    return f" Not compared with: {'; '.join(here.left_out)}." if here.left_out else ""


def _over(values: Floats | Sequence[float]) -> tuple[float, float | None, float | None]:
    """A mean over references with its limits, where there are three of them or more."""
    found = np.asarray(values, dtype=np.float64)
    if len(found) < 3:
        return float(found.mean()), None, None
    interval = mean_interval(found)
    return interval.value, interval.low, interval.high


@dataclass(frozen=True)
class MaskOverlap:
    """Overlap of the pruned topology with that of models retrained and pruned again.

    As intersection over union (IoU) or over the smaller of the two (IoM), averaged over the
    references that count; the interval is over references.
    """

    measure: Literal["iou", "iom"] = "iou"

    @property
    def name(self) -> str:
        """Of the finding."""
        return f"mask_{self.measure}"

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        return audited(self.name, subject, self._find, scored=1)

    def _find(self, here: Standing) -> Finding:
        def mean(mask: Mask, beside: Sequence[Mask]) -> list[float]:
            return [getattr(mask, self.measure)(other) for other in beside]

        value, low, high = _over(mean(here.after, here.scored))
        n = len(here.scored)
        pairs = [v for i, m in enumerate(here.scored) for v in mean(m, here.scored[i + 1 :])]
        ceiling = float(np.mean(pairs)) if pairs else None
        iou = self.measure == "iou"
        words = "intersection over union" if iou else "intersection over the smaller of the two"
        return Finding(
            self.name,
            value,
            low,
            high,
            n,
            direction="higher",
            reference=ceiling,
            gap=abs(value - ceiling) if ceiling is not None else None,
            original=float(np.mean(mean(here.before, here.scored))) if here.before else None,
            series=picture(here) if iou else None,
            sentence=f"The pruned topology overlaps with retrained models' by {value:.3f} "
            f"({words}; {n} of them)." + (left_out(here) if iou else ""),
        )


def picture(here: Standing) -> dict[str, Any] | None:
    """What the update kept, removed and regrew in each layer, for the report."""
    if here.before is None:
        return None
    rows = layers(here.after, here.before, here.scored)
    # biases and norms live and die with the filters of the weights
    weights = [row for row in rows if here.after[row["name"]].ndim > 1]
    return {"kind": "topology", "references": len(here.scored), "layers": weights or rows}


@dataclass(frozen=True)
class MaskChance:
    """What the overlap would be by chance: random masks with as many entries kept in each layer."""

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        return audited("mask_iou_chance", subject, self._find, scored=1)

    def _find(self, here: Standing) -> Finding:
        density = here.after.kept / here.after.total
        value = float(np.mean([chance(here.after, r) for r in here.scored]))
        return Finding(
            "mask_iou_chance",
            value,
            n=here.after.total,
            direction="info",
            sentence="Random masks that keep as much of each layer as these overlap by "
            f"{value:.3f} on average (by {density / (2 - density):.3f} if layers are not told "
            "apart).",
        )


@dataclass(frozen=True)
class MaskInitial:
    """Overlap of the largest initial weights with retrained models: a mask that saw no data."""

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""

        def find(here: Standing) -> Finding:
            found = initial_overlap(subject, here)
            if isinstance(found, str):
                return absent("mask_iou_initial", found, "not_estimable")
            value, low, high = _over(found)
            return Finding(
                "mask_iou_initial",
                value,
                low,
                high,
                len(found),
                direction="info",
                sentence="The mask of the largest initial weights, which saw no data, overlaps "
                f"with retrained models' by {value:.3f}.",
            )

        return audited("mask_iou_initial", subject, find, scored=1)


def initial_overlap(subject: Subject, here: Standing) -> Floats | str:
    """IoU of the |θ₀| mask with each reference that counts, or why it cannot be had."""
    like = here.before if here.before is not None else here.after
    model = subject.before
    try:
        weights = subject.remember(
            "initial weights", model, lambda: initial_weights(model, Fit(model.task))
        )
    except EffaceError as error:
        return str(error)
    return row(initial_mask(weights, like), here.scored)


def row(mask: Mask, others: Sequence[Mask]) -> Floats:
    """IoU of a mask with each of the others ``[R]``."""
    found: Floats = overlaps([mask], others)[0]
    return found


@dataclass(frozen=True)
class MaskCeiling:
    """Overlap of two retrained models: more cannot be expected."""

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        return audited("mask_iou_ceiling", subject, self._find, scored=2)

    def _find(self, here: Standing) -> Finding:
        pairs = overlaps(here.scored, here.scored)
        n = len(pairs)
        value = float(pairs[np.triu_indices(n, 1)].mean())
        interval = ceiling_interval(pairs) if n > 2 else None
        return Finding(
            "mask_iou_ceiling",
            value,
            None if interval is None else interval.low,
            None if interval is None else interval.high,
            n,
            direction="info",
            sentence=f"Masks of two retrained models overlap by {value:.3f}: the same initial "
            "weights and the same records, another batch order.",
        )


@dataclass(frozen=True)
class MaskOtherInit:
    """Overlap with references that began with other initial weights: what a stranger would see."""

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        return audited("mask_iou_other_init", subject, self._find)

    def _find(self, here: Standing) -> Finding:
        name = "mask_iou_other_init"
        if not here.others:
            why = "needs a reference pruned by itself with initial weights of its own (efface "
            why += "retrain --like repruned)." + left_out(here)
            return absent(name, why, "not_estimable")
        value = float(row(here.after, here.others).mean())
        return Finding(
            name,
            value,
            n=len(here.others),
            direction="info",
            reference=float(overlaps(here.scored, here.others).mean()) if here.scored else None,
            original=float(row(here.before, here.others).mean()) if here.before else None,
            sentence="With retrained models that began with other initial weights it overlaps by "
            f"{value:.3f}: whoever lacks the initial weights sees no more than that.",
        )
