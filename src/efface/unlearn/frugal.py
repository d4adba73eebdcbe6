"""A fraction of the retained data: how much of D_r does a method need?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from efface.data import queue
from efface.errors import MethodError
from efface.fitting import Fit
from efface.seeds import generator
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.base import Unlearner, inside
from efface.unlearn.finetune import FineTune


def check_fraction(name: str, fraction: float) -> None:
    """Check a share of D_r.

    Raises:
        MethodError: If it is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise MethodError(f"{name}: fraction must be in (0, 1], not {fraction!r}.")


def share(split: Split, fraction: float, fit: Fit) -> Split:
    """The same request with a part of D_r: max(1, round(fraction · n)) records.

    Drawn by class, in proportion, and nested: what is in one hundredth is in two. Which records
    those are depends on ``fit.seed`` and the split, not on ``fit.path``: every method with the same
    fraction is given the same ones.

    Args:
        split: The request.
        fraction: Share of D_r in (0, 1]; with 1 the split is returned as it is.
        fit: Supplies the seed.

    Warns:
        UserWarning: Where a class that D_r has gets no record.

    Raises:
        MethodError: If the fraction is out of range.

    Example:
        ``share(split, 0.13, fit).retain``
    """
    check_fraction("a share of D_r", fraction)
    if fraction == 1:
        return split
    records = split.task.records
    # every record of the task draws: whom a request leaves out shifts nobody else
    luck = torch.randperm(len(records), generator=generator(fit.seed, "share"))[split.retain]
    targets = records.targets[split.retain]
    count = max(1, round(fraction * len(targets)))
    taken = queue(targets, luck)[:count].sort().values
    part = replace(split, retain=split.retain[taken])
    lacking = sorted(set(targets.tolist()) - set(targets[taken].tolist()))
    if lacking:
        warnings.warn(_sentence(lacking, count, len(targets)), stacklevel=3)
    return part


def _sentence(lacking: Sequence[int], count: int, total: int) -> str:
    names = (
        f"class {lacking[0]}" if len(lacking) == 1 else f"classes {', '.join(map(str, lacking))}"
    )
    records = "1 record" if count == 1 else f"{count} records"
    return (
        f"the part of D_r that is used ({records} of {total}) has none of {names}, which may be "
        "forgotten, too; take a larger fraction."
    )


@dataclass(frozen=True)
class Frugal:
    """Give the inner method a fraction of D_r only, drawn by class.

    For comparisons on equal data: every inner method gets the same records, and a smaller fraction
    lies within a larger one. An epoch of the inner method is a pass over that fraction. A batch
    that holds more than all of it shrinks.

    Args:
        inner: Any unlearner but ``replay``, which trains on what the log has recorded.
        fraction: Share of D_r, in (0, 1].
    """

    name: ClassVar[str] = "frugal"
    title: ClassVar[str] = "With a fraction of the retained data"
    paper: ClassVar[str] = "after Sajith U and Keserwani 2026"
    needs: ClassVar[frozenset[str]] = frozenset({"retain"})

    inner: Unlearner = field(default_factory=FineTune)
    fraction: float = 0.13

    def __post_init__(self) -> None:
        check_fraction(self.name, self.fraction)

    def check(self, trained: TrainedModel, split: Split) -> None:
        """Raise for an inner method that does not take its data from the split."""
        if any(method.name == "replay" for method in inside(self.inner)):
            raise MethodError(
                "frugal cannot go around replay, which trains on all that the log has recorded but "
                "D_f; take replay alone."
            )

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        part = share(split, self.fraction, fit)
        fit.meter.facts["frugal"] = {"records": len(part.retain), "of": len(split.retain)}
        self.inner(trained, part, fit)
