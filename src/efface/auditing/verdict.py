"""The verdict: from two statistics fixed in advance, never from a choice of metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from efface.auditing.base import Subject
from efface.auditing.membership import LEAST, margins
from efface.stats import auc, prediction_interval
from efface.trained import TrainedModel

Word = Literal["under-forgotten", "indistinguishable", "over-forgotten", "not measurable"]

LEAST_MARGIN = 0.1
"""Differences of mean margins below this many nats are never called."""


FEW = " With fewer than three retrained models their noise is hardly known: make more."


@dataclass(frozen=True)
class Verdict:
    """A word and the reason for it."""

    word: Word
    sentence: str


def decide(subject: Subject) -> Verdict:
    """Compare with the retrained models, and say what that allows.

    1. The mean margin on D_f against the 95 % prediction interval for one further retrained model
       (Student's t over references; two at least).
    2. The MIA AUC's 95 % interval against the range of the references' AUCs (20 forgotten and 20
       matching test records at least: for fewer, the interval is too narrow).

    Outside on the side of the untouched original, in either: under-forgotten. Else outside on the
    other side, in either: over-forgotten. Where a statistic does not tell the original from
    retraining, above counts as the original's side. The same two statistics
    must be able to tell the untouched original from retraining; if not, nothing was there to see
    and the word is *not measurable*, whatever the method did.
    """
    if not subject.references:
        return Verdict("not measurable", "No retrained model was given to compare with.")
    if compare(subject, subject.before) == "indistinguishable":
        return Verdict(
            "not measurable",
            "Even the untouched original cannot be told from retrained models on these records, so "
            "this audit cannot show that anything was forgotten."
            + (FEW if len(subject.references) < 3 else ""),
        )
    word = compare(subject, subject.after)
    k = len(subject.references)
    basis = f"{k} retrained models" if k > 1 else "one retrained model (their noise is unknown)"
    sentences = {
        "under-forgotten": "The model has not forgotten the records: it differs from "
        f"{basis} in the direction of the untouched original.",
        "over-forgotten": f"The model went past {basis}, away from the untouched original: it does "
        "not treat the forgotten records as records that it never saw, and the deletion itself may "
        "be visible.",
        "indistinguishable": f"On the forgotten records the model cannot be told from {basis} by "
        "the two statistics fixed in advance.",
    }
    return Verdict(word, sentences[word])


def compare(subject: Subject, model: TrainedModel) -> Word:
    """Where a model lies against the retrained ones, seen from the untouched original."""
    sides = {
        side(subject, model) * (side(subject, subject.before) or 1)
        for side in (margin_side, auc_side)
    }
    if 1 in sides:
        return "under-forgotten"
    return "over-forgotten" if -1 in sides else "indistinguishable"


def margin_side(subject: Subject, model: TrainedModel) -> int:
    """1 above, −1 below, 0 within what a further retrained model would show."""
    references = [float(margins(subject, r, "forget").mean()) for r in subject.references]
    if len(references) < 2:
        return 0
    low, high = prediction_interval(references)
    centre, half = (low + high) / 2, max((high - low) / 2, LEAST_MARGIN)
    value = float(margins(subject, model, "forget").mean())
    return (value > centre + half) - (value < centre - half)


def auc_side(subject: Subject, model: TrainedModel) -> int:
    """1 above, −1 below, 0 when the AUC's interval meets the range of the references'."""
    matched = subject.matched_test
    if matched is None or min(len(matched), len(subject.split.forget)) < 2 * LEAST:
        return 0

    def measure(m: TrainedModel) -> tuple[float, float, float]:
        found = auc(margins(subject, m, "forget"), margins(subject, m, "test")[matched])
        return found.value, found.low, found.high

    references = [measure(r)[0] for r in subject.references]
    _, low, high = measure(model)
    return (low > max(references)) - (high < min(references))
