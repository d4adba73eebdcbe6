"""Findings about the trace of D_f in the pruned topology: is there one, and what is left of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from efface.auditing.base import Finding, Subject, absent
from efface.auditing.masks import audited, initial_overlap, left_out, row
from efface.auditing.standing import Standing
from efface.auditing.topology import overlaps
from efface.auditing.trace import (
    Floats,
    Membership,
    between_interval,
    membership,
    removed_interval,
    trace_interval,
)
from efface.mask import Mask
from efface.stats import Interval, prediction_interval

HOW_WITH = "efface train --initial MODEL --seed N, then efface prune as the original was"
ENOUGH = 3
"""Masks of a kind from which an interval can be had."""


@dataclass(frozen=True)
class Evidence:
    """All that an audit has on the trace; at least two references and the original's mask.

    Args:
        here: The masks.
        pairs: IoU of references with one another ``[R, R]``.
        before: IoU of the original's mask with each reference ``[R]``.
        after: The same of the audited mask.
        initial: The same of the |θ₀| mask, or None where it cannot be had.
    """

    here: Standing
    pairs: Floats
    before: Floats
    after: Floats
    initial: Floats | None

    @classmethod
    def of(cls, subject: Subject, here: Standing) -> Evidence:
        """What there is on a subject."""
        assert here.before is not None
        first = initial_overlap(subject, here)
        return cls(
            here,
            overlaps(here.scored, here.scored),
            row(here.before, here.scored),
            row(here.after, here.scored),
            None if isinstance(first, str) else first,
        )

    @property
    def ceiling(self) -> float:
        """Mean overlap of two references."""
        return float(self.pairs[np.triu_indices(len(self.pairs), 1)].mean())

    @property
    def value(self) -> float:
        """The trace: ceiling less the original's overlap."""
        return self.ceiling - float(self.before.mean())

    @property
    def trace(self) -> Interval | None:
        """The trace with its interval over references, where there are enough."""
        return trace_interval(self.before, self.pairs) if len(self.pairs) >= ENOUGH else None

    @cached_property
    def between(self) -> Interval | None:
        """By how much the two kinds of models differ, where there are enough of both."""
        if min(len(self.here.seen), len(self.here.scored)) < ENOUGH:
            return None
        return between_interval(self.table, len(self.here.seen))

    @cached_property
    def table(self) -> Floats:
        """IoU of all masks with one another, those of models with D_f first."""
        masks = [*self.here.seen, *self.here.scored]
        return overlaps(masks, masks)

    def score(self, mask: Mask) -> float:
        """Overlap of a descendant of the original with models without D_f, less that with others.

        The original itself is left out: what descends from it resembles it in any case.
        """
        return float(row(mask, self.here.scored).mean() - row(mask, self.here.seen[1:]).mean())

    @property
    def absent(self) -> str:
        """Why no trace is seen; nothing where one is."""
        trace, between = self.trace, self.between
        if between is not None and between.low > 0:
            return ""
        if trace is None:
            return (
                f"Retrained models overlap with each other by {self.ceiling:.3f}, with the "
                f"original by {self.before.mean():.3f}; {len(self.pairs)} of them give no "
                f"interval, {ENOUGH} would."
            )
        text = f"trace {trace.value:.3f} {span(trace)}, {trace.n} retrained models"
        if trace.low <= 0:
            return f"No trace here. The original lies within the noise of retraining ({text})."
        if self.initial is not None and self.ceiling < self.initial.mean():
            return (
                f"No trace here. Retrained models overlap less with each other ({self.ceiling:.3f})"
                f" than with the mask of the largest initial weights ({self.initial.mean():.3f}), "
                f"which saw no data, so that noise dominates ({text})."
            )
        return ""

    @property
    def left(self) -> bool:
        """Whether the audited mask still lies outside of what retraining gives."""
        between = self.between
        if between is not None and between.low > 0:
            seen = len(self.here.seen)
            cross = self.table[:seen, seen:].mean(0)
            own = (self.pairs.sum(1) - np.diag(self.pairs)) / (len(self.pairs) - 1)
            return self.score(self.here.after) < prediction_interval(own - cross)[0]
        return trace_interval(self.after, self.pairs).low > 0

    def sentence(self) -> str:
        """What it comes to, in plain words."""
        if self.absent:
            return self.absent
        between, verb = self.between, "still holds" if self.left else "no longer shows"
        apart = ""
        if between is not None:
            apart = " Models of one kind (with the records, or without) overlap by "
            apart += f"{between.value:.3f} {span(between)} more than models of different kinds."
        return (
            f"The pruned topology {verb} a trace of the forgotten records. Retrained models "
            f"overlap with each other by {self.ceiling:.3f}, with the original by "
            f"{self.before.mean():.3f} and with this model by {self.after.mean():.3f}.{apart}"
        )


def span(interval: Interval) -> str:
    """The limits of an interval in brackets."""
    return f"[{interval.low:.3f}, {interval.high:.3f}]"


@dataclass(frozen=True)
class MaskTrace:
    """The trace of D_f in the original's topology: ceiling less the original's overlap.

    There is none to speak of where its interval reaches zero, or where retrained models agree less
    with one another than with the mask of the largest initial weights (noise dominates there);
    unless models with and without D_f are seen to differ otherwise.
    """

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""

        def find(here: Standing) -> Finding:
            found = Evidence.of(subject, here)
            trace = found.trace
            return Finding(
                "mask_trace",
                found.value,
                None if trace is None else trace.low,
                None if trace is None else trace.high,
                len(here.scored),
                direction="info",
                sentence=found.sentence(),
            )

        return audited("mask_trace", subject, find, scored=2, before=True)


@dataclass(frozen=True)
class TraceBetween:
    """How much more models with D_f, and models without it, overlap among themselves than across.

    Needs further models trained with D_f. A trace that noise hides from the other measure shows
    here: what is trained with less noise lies nearer to everything, which cancels.
    """

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        name = "mask_trace_between"

        def find(here: Standing) -> Finding:
            if len(here.seen) < ENOUGH:
                return absent(name, few_originals(here, ENOUGH - 1), "not_estimable")
            found = between_interval(Evidence.of(subject, here).table, len(here.seen))
            return Finding(
                name,
                found.value,
                found.low,
                found.high,
                found.n,
                direction="info",
                sentence=f"Masks of models of one kind, with or without the records, overlap by "
                f"{found.value:.3f} {span(found)} more than masks of different kinds"
                + ("." if found.low > 0 else ": no more than noise."),
            )

        return audited(name, subject, find, scored=ENOUGH, before=True)


def few_originals(here: Standing, needed: int) -> str:
    """Why a comparison of the two kinds cannot be had."""
    many = {1: "a further model", 2: "two further models"}[needed]
    return (
        f"needs {many} trained with the records, from the original's initial weights in another "
        f"batch order ({HOW_WITH}), given as --original; {len(here.seen) - 1} of the given count."
        + left_out(here)
    )


@dataclass(frozen=True)
class TraceRemoved:
    """The share of the trace that is gone: 0 for none, 1 for as much as retraining removes."""

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        name = "mask_trace_removed"

        def find(here: Standing) -> Finding:
            found = Evidence.of(subject, here)
            if found.absent:
                return absent(name, found.absent, "not_estimable")
            share = removed_interval(found.after, found.before, found.pairs)
            if share is None:
                why = "retrained models do not overlap clearly more with each other than with the "
                why += "original, so that there is nothing to divide by; see mask_membership."
                return absent(name, why, "not_estimable")
            away = " (it moved away from retrained models')" if share.high < 0 else ""
            return Finding(
                name,
                share.value,
                share.low,
                share.high,
                share.n,
                direction="higher",
                original=0.0,
                sentence=f"The share of the trace that is gone: {share.value:.0%} "
                f"[{share.low:.0%}, {share.high:.0%}]{away}, measured with retrained models in "
                "other batch orders.",
            )

        return audited(name, subject, find, scored=ENOUGH, before=True)


@dataclass(frozen=True)
class MaskMembership:
    """Can one tell from the mask alone whether D_f was in the data, and where does this one fall?

    ``auc``: the test itself, between models trained with D_f (the original and further ones) and
    without. Else the place of the audited mask: 0 as the models that saw D_f, 1 as those that did
    not.
    """

    auc: bool = False

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        name = "mask_membership_auc" if self.auc else "mask_membership"

        def find(here: Standing) -> Finding:
            if len(here.seen) < 2:
                return absent(name, few_originals(here, 1), "not_estimable")
            found = Evidence.of(subject, here)
            test = membership(found.table, len(here.seen), generator)
            return self._told(name, test, len(found.table)) if self.auc else _placed(found, test)

        return audited(name, subject, find, scored=2, before=True)

    def _told(self, name: str, test: Membership, n: int) -> Finding:
        least = f"; {n} masks cannot give less than {test.least:.2f}" if test.least > 0.05 else ""
        can = "One can" if test.p <= 0.05 else "One cannot"
        return Finding(
            name,
            test.auc,
            n=n,
            direction="info",
            sentence=f"{can} tell from the mask alone whether the records were in the data: AUC "
            f"{test.auc:.2f}, p = {test.p:.2g} over {test.labellings:,} labellings{least}.",
        )


def _placed(found: Evidence, test: Membership) -> Finding:
    here = found.here
    assert here.before is not None
    place, start = (test.position(found.score(m)) for m in (here.after, here.before))
    if place is None:
        why = "masks of models with and without the records do not differ in the expected way."
        return absent("mask_membership", why, "not_estimable")
    doubt = f"; but the two kinds cannot be told apart (p = {test.p:.2g})" * (test.p > 0.05)
    return Finding(
        "mask_membership",
        place,
        n=len(found.table),
        direction="higher",
        original=start,
        sentence="Between models that saw the records (0) and models that did not (1) this mask "
        f"lies at {place:.2f}, the original's at {start:.2f}{doubt}.",
    )
