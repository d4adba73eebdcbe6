"""Accuracies on D_f, D_r and D_t, in total and per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from efface.auditing.base import Finding, Part, Subject, absent, compared
from efface.stats import Interval, rate
from efface.trained import TrainedModel


def _correct(subject: Subject, model: TrainedModel, part: Part) -> np.ndarray[Any, Any]:
    answers: np.ndarray[Any, Any] = subject.logits(model, part).argmax(1) == subject.targets(part)
    return answers


@dataclass(frozen=True)
class Utility:
    """An accuracy with its Clopper–Pearson interval: ``ua`` = 1 − accuracy on D_f, ``ra``, ``ta``.

    ``ta`` leaves the class out exactly when the split was made by class. Source: Jia et al. 2023.
    """

    name: str

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        part: Part = {"ua": "forget", "ra": "retain", "ta": "test"}[self.name]  # type: ignore[assignment]

        def measure(model: TrainedModel) -> Interval:
            hits = _correct(subject, model, part)
            hits = hits[subject.seen_test] if part == "test" else hits
            wins = len(hits) - int(hits.sum()) if self.name == "ua" else int(hits.sum())
            return rate(wins, len(hits))

        finding = compared(subject, self.name, measure)
        sentences = {
            "ua": "Share of the forgotten records that the model now gets wrong",
            "ra": "Share of the retained records that it gets right",
            "ta": "Share of unseen test records that it gets right",
        }
        without = (
            " (without the forgotten class)"
            if self.name == "ta" and subject.split.label is not None
            else ""
        )
        text = f"{sentences[self.name]}{without}: {finding.value:.1%}"
        return _with(finding, sentence=_versus(text, finding))


def _versus(text: str, finding: Finding) -> str:
    if finding.reference is None:
        return f"{text}; no retrained model was given to compare with."
    return (
        f"{text}; retrained models: {finding.reference:.1%}, the original: {finding.original:.1%}."
    )


def _with(finding: Finding, **changes: Any) -> Finding:
    from dataclasses import replace

    return replace(finding, **changes)


def shown(subject: Subject) -> list[tuple[str, TrainedModel]]:
    """The models that pictures show: before, after, and the first retrained one."""
    models = [("before", subject.before), ("after", subject.after)]
    return [*models, *(("retrained", model) for model in subject.references[:1])]


@dataclass(frozen=True)
class PerClass:
    """Test accuracy of every class; the value is that of the retained class served worst."""

    name: str = "accuracy_per_class"

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        labels = subject.targets("test")
        classes = [c for c in range(subject.split.task.classes) if (labels == c).any()]
        kept = [c for c in classes if c != subject.split.label]
        if not kept:
            return absent(self.name, "no retained class has a test record.", "undefined")

        def by_class(model: TrainedModel) -> dict[int, float]:
            hits = _correct(subject, model, "test")
            return {c: float(hits[labels == c].mean()) for c in classes}

        def measure(model: TrainedModel) -> Interval:
            hits = _correct(subject, model, "test")
            worst = min(kept, key=lambda c: float(hits[labels == c].mean()))
            return rate(int(hits[labels == worst].sum()), int((labels == worst).sum()))

        groups = [
            {"label": label, "values": list(by_class(model).values())}
            for label, model in shown(subject)
        ]
        after = by_class(subject.after)
        worst = min(kept, key=lambda c: after[c])
        return compared(
            subject,
            self.name,
            measure,
            sentence=f"The retained class served worst is {worst}: {after[worst]:.1%} of its test "
            "records are right.",
            series={
                "kind": "bars",
                "x_label": "class",
                "y_label": "test accuracy",
                "labels": [str(c) for c in classes],
                "groups": groups,
            },
        )


@dataclass(frozen=True)
class ForgottenClass:
    """Test accuracy on the forgotten class: 0 for a model that never saw it."""

    name: str = "forget_class_test_accuracy"

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        inside = subject.targets("test") == subject.split.label
        if subject.split.label is None or not inside.any():
            return absent(
                self.name, "only defined when one class is forgotten and tested.", "undefined"
            )

        def measure(model: TrainedModel) -> Interval:
            hits = _correct(subject, model, "test")[inside]
            return rate(int(hits.sum()), len(hits))

        finding = compared(subject, self.name, measure)
        text = (
            f"Share of unseen records of the forgotten class still named right: {finding.value:.1%}"
        )
        return _with(finding, sentence=_versus(text, finding))


def accuracies(names: Sequence[str] = ("ua", "ra", "ta")) -> list[Utility]:
    """The three accuracies of the field."""
    return [Utility(name) for name in names]
