"""Whether the blocks of a network tell the forgotten records from the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from efface.auditing.base import Finding, Subject, absent

CERTAIN = 0.05
"""Up to this p, blocks tell the forgotten records from the rest."""

OTHERS = "replay, amnesiac, l1-sparse or unprune"
"""Tools for requests whose records no block stands for."""


def scored(subject: Subject) -> Mapping[str, Any] | None:
    """What the last forgetting since the original left of its scores of blocks, or None."""
    if subject.after is subject.before:
        return None
    for step in reversed(subject.after.lineage[len(subject.before.lineage) :]):
        if step.verb == "forget":
            found: Mapping[str, Any] | None = step.detail.get("blocks")
            return found
    return None


@dataclass(frozen=True)
class BlockContrast:
    """Do blocks matter more, or less, for D_f than for the rest: the mean of |ln(I_f / I_r)|.

    Read from what the method scored. Chance is the same mean where the scored records are dealt
    out at random: ratios of two noisy scores are never 1. What belongs to no block in particular
    (random records, say) cannot be taken out by turning blocks down, and this finding says so.
    """

    name: ClassVar[str] = "block_contrast"

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        facts = scored(subject)
        if facts is None:
            return absent(self.name, "the method scored no blocks.", "undefined")
        value, (mean, most), p = facts["contrast"], facts["chance"], facts["p"]
        if not all(map(math.isfinite, (value, mean, most, p))):
            why = "the method's scores of blocks are not finite, so that there is no ratio."
            return absent(self.name, why, "not_estimable")
        return Finding(
            self.name,
            value,
            n=sum(facts["records"].values()),
            direction="info",
            sentence=_sentence(facts),
            series=_series(facts),
        )


def _sentence(facts: Mapping[str, Any]) -> str:
    mean = facts["chance"][0]
    numbers = (
        f"a block's importance for the forgotten records differs from that for the rest by a "
        f"factor of {math.exp(facts['contrast']):.2f} on average, and by {math.exp(mean):.2f} "
        f"where the same records are dealt out at random (p = {facts['p']:.2g} over "
        f"{facts['draws']:,} draws)"
    )
    kind = facts["granularity"]
    blocks = f"{facts['blocks']:,} blocks ({kind} by {kind})"
    if facts["p"] <= CERTAIN:
        return (
            f"The {blocks} tell the forgotten records from the rest: {numbers}. "
            f"{facts['selected']} of them were changed."
        )
    return (
        f"The {blocks} tell the forgotten records from the rest no better than "
        f"random records: {numbers}. To turn blocks down is the wrong tool for this request; take "
        f"{OTHERS}."
    )


def _series(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The histogram of ratios, what chance would give, and the blocks changed in each layer."""
    ratios = facts["ratios"]
    return {
        "kind": "ratios",
        "x_label": "importance for the forgotten records / for the rest",
        "edges": list(ratios["edges"]),
        "counts": list(ratios["counts"]),
        "contrast": facts["contrast"],
        "chance": list(facts["chance"]),
        "layers": [dict(layer) for layer in facts.get("layers", ())],
    }
