"""Does a forgotten class come back? A copy is trained on D_r alone, or with a few of D_f."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from efface.auditing.base import Finding, Floats, Subject, absent, spread
from efface.auditing.probing import beyond, class_only, drawn, forgotten_class
from efface.data import Stream
from efface.errors import DivergedError
from efface.fitting import Clock, Fit, History
from efface.predict import logits
from efface.stats import Interval, rate
from efface.trained import TrainedModel
from efface.unlearn.base import check_ranges

SEED = 0
"""Of the order of batches in every such training, whatever the audit's own seed."""


@dataclass(frozen=True)
class Curve:
    """Which test records of the forgotten class are right, before and after every epoch.

    Args:
        steps: Optimiser steps taken by then ``[epochs + 1]``, from 0.
        right: One row for each of them ``[epochs + 1, n]``.
    """

    steps: tuple[int, ...]
    right: npt.NDArray[np.bool_]

    @property
    def accuracy(self) -> Floats:
        """Share of the records that are right ``[epochs + 1]``."""
        found: Floats = self.right.mean(axis=1)
        return found

    def passes(self, level: float) -> int | None:
        """Steps until the accuracy first lies above a level; None where it never does.

        >>> Curve((0, 4), np.array([[False, False], [True, False]])).passes(0.4)
        4
        """
        above = np.flatnonzero(self.accuracy > level)
        return self.steps[above[0]] if len(above) else None


@dataclass(frozen=True)
class Relearn:
    """Does the class come back faster than in a model that never saw it?

    A copy of each model is trained on for a few epochs on a few records of D_r, drawn by class,
    alone (``relearn_retain``) or with a few of D_f among them (``relearn_forget``), and after each
    epoch it answers the test records of the forgotten class. Every model gets the same batches.
    The settings are the task's, at a constant rate and without warm-up.

    Without records of D_f the value is the highest accuracy after any epoch: what came back by
    itself. With them it is the mean over the epochs, which is higher the earlier the class is back
    and, other than the number of steps that it takes, always there.

    Args:
        added: How many records of D_f are among them, at most.
        records: How many of D_r, at most.
        epochs: Passes over them.
        lr: Rate; ``None``: half of the peak rate of the task's training.

    Example:
        ``Relearn(added=10).measure(subject, subject.after).value``
    """

    added: int = 0
    records: int = 300
    epochs: int = 3
    lr: float | None = None

    def __post_init__(self) -> None:
        check_ranges(
            self,
            added=("0 or more", self.added >= 0),
            records=("1 or more", self.records >= 1),
            epochs=("1 or more", self.epochs >= 1),
        )

    @property
    def name(self) -> str:
        """Of the finding."""
        return "relearn_forget" if self.added else "relearn_retain"

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        why = class_only(subject)
        if why:
            return absent(self.name, why, "undefined")
        try:
            after, before = (self.measure(subject, m) for m in (subject.after, subject.before))
            references = [self.measure(subject, model).value for model in subject.references]
        except DivergedError as error:
            return absent(self.name, f"training a copy went astray: {error}", "not_estimable")
        mean = float(np.mean(references)) if references else None
        finding = Finding(
            self.name,
            after.value,
            after.low,
            after.high,
            after.n,
            reference=mean,
            gap=None if mean is None else abs(after.value - mean),
            floor=spread(references),
            original=before.value,
            series=self._series(subject),
        )
        text = self._said(subject, finding) + self._versus(finding, beyond(after, references))
        return replace(finding, sentence=text)

    def measure(self, subject: Subject, model: TrainedModel) -> Interval:
        """What came back, with its 95 % interval over test records (Clopper and Pearson 1934).

        For the mean over epochs the limits are too wide: each record counts as one toss, though
        its own mean over epochs varies less.

        Raises:
            NeedsError: If the split is not by class, or the class has no test record.
            DivergedError: If the loss became infinite.
        """
        accuracy = self.curve(subject, model).accuracy[1:]
        n = self.curve(subject, model).right.shape[1]
        value = float(accuracy.mean() if self.added else accuracy.max())
        limits = rate(round(value * n), n)
        return Interval(value, limits.low, limits.high, n)

    def curve(self, subject: Subject, model: TrainedModel) -> Curve:
        """What a copy of a model answers right, epoch after epoch; computed once.

        Raises:
            NeedsError: If the split is not by class, or the class has no test record.
            DivergedError: If the loss became infinite.
        """
        label = forgotten_class(subject)
        held = model.mask.digest if model.mask else ""
        key = f"{self!r} {subject.split.task.fit!r} {held}"
        return subject.remember(key, model, lambda: self._train(subject, model, label))

    def _train(self, subject: Subject, model: TrainedModel, label: int) -> Curve:
        task, twin = subject.split.task, model.copy()
        inside = torch.eq(task.test_records.targets, label).nonzero().flatten()
        steps, right = [0], [_right(subject, twin.network, inside)]

        def look(network: nn.Module, clock: Clock, history: History) -> None:
            steps.append(clock.step + 1)
            # of a copy: looking moves a network between layouts, which the fit need not know
            right.append(_right(subject, copy.deepcopy(network), inside))

        fit = Fit(task, SEED, subject.device, subject=twin, path="relearn").with_(hook=look)
        rate_ = task.fit.lr / 2 if self.lr is None else self.lr
        settings = replace(task.fit, epochs=self.epochs, lr=rate_, warmup=0.0, schedule="constant")
        fit(twin.network, fit.descend, {"records": Stream(self._records(subject))}, settings)
        return Curve(tuple(steps), np.stack(right))

    def _records(self, subject: Subject) -> Tensor:
        split, targets = subject.split, subject.split.task.records.targets
        kept = drawn(targets, split.retain, self.records, "relearn retain")
        gone = drawn(targets, split.forget, self.added, "relearn forget")
        return torch.cat([kept, gone]).sort().values

    def _series(self, subject: Subject) -> Mapping[str, Any]:
        """Curves of the original, the model, and the mean of the retrained ones."""
        sides: dict[str, Sequence[TrainedModel]] = {
            "before": [subject.before],
            "after": [subject.after],
            "retrained": subject.references,
        }
        groups = []
        for label, models in sides.items():
            curves = [self.curve(subject, model) for model in models]
            if curves:
                mean = np.mean([c.accuracy for c in curves], axis=0)
                groups.append({"label": label, "x": list(curves[0].steps), "y": mean.tolist()})
        return {
            "kind": "relearn",
            "x_label": "optimiser steps",
            "y_label": "new records of the class answered correctly",
            "half": self._half(subject),
            "groups": groups,
        }

    def _half(self, subject: Subject) -> float:
        """Half of the original's accuracy on the class, as it is."""
        return float(self.curve(subject, subject.before).accuracy[0]) / 2

    def _said(self, subject: Subject, finding: Finding) -> str:
        kept = min(self.records, len(subject.split.retain))
        if not self.added:
            return (
                f"Trained for {self.epochs} more epochs on {kept} retained records alone, it gets "
                f"up to {finding.value:.1%} of unseen records of the forgotten class right"
            )
        gone = min(self.added, len(subject.split.forget))
        return (
            f"Trained for {self.epochs} more epochs on {kept} retained and {gone} forgotten "
            f"records, it gets {finding.value:.1%} of unseen records of the forgotten class right "
            f"on average over the epochs ({self._steps(subject)})"
        )

    def _steps(self, subject: Subject) -> str:
        """When half of the original's accuracy is passed, by the model and the retrained ones."""
        level = self._half(subject)

        def told(model: TrainedModel) -> str:
            found = self.curve(subject, model).passes(level)
            return "never" if found is None else f"at step {found}"

        others = " and ".join(dict.fromkeys(map(told, subject.references)))
        return f"half of the original's accuracy is passed {told(subject.after)}" + (
            f", by retrained models {others}" if others else ""
        )

    def _versus(self, finding: Finding, side: int) -> str:
        if finding.reference is None:
            return "; no retrained model was given to compare with."
        more, less = ("sooner", "later") if self.added else ("more", "less")
        told = {
            1: f"That is {more} than in any retrained model: some of the class was still there.",
            0: f"On these records that is no {more} than in retrained models.",
            -1: f"That is {less} than in any retrained model, which can give the deletion away.",
        }
        return (
            f"; retrained models: {finding.reference:.1%}, the original: {finding.original:.1%}. "
            f"{told[side]}"
        )


def _right(subject: Subject, network: nn.Module, positions: Tensor) -> npt.NDArray[np.bool_]:
    """Which test records of the forgotten class are right ``[n]``; no number is wrong."""
    task = subject.split.task
    found = logits(network, task, task.test_records, positions, device=subject.device)
    hits = (found.argmax(1) == subject.split.label) & np.isfinite(found).all(1)
    return np.asarray(hits, dtype=bool)
