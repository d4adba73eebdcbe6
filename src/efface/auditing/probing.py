"""What a linear probe still finds of a forgotten class in a network's features."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from efface.auditing.base import Finding, Floats, Part, Subject, absent, compared
from efface.auditing.membership import LEAST
from efface.data import queue
from efface.errors import EffaceError, MethodError, NeedsError
from efface.mask import classifier_name
from efface.predict import features
from efface.seeds import generator as seeded
from efface.stats import Interval, rate
from efface.trained import TrainedModel


def class_only(subject: Subject) -> str:
    """Why a finding about a forgotten class cannot be had, or nothing."""
    if subject.split.label is None:
        return "only defined when one class is forgotten and tested."
    if not (subject.targets("test") == subject.split.label).any():
        return f"only defined for a class with test records; class {subject.split.label} has none."
    return ""


def forgotten_class(subject: Subject) -> int:
    """The class that was forgotten and is tested.

    Raises:
        NeedsError: If there is none.
    """
    why, label = class_only(subject), subject.split.label
    if why or label is None:
        raise NeedsError(f"what is left of a class is {why} Select with --class.")
    return label


def drawn(targets: Tensor, positions: Tensor, count: int, purpose: str) -> Tensor:
    """Up to ``count`` of some records, by class in proportion: the same ones for every model.

    Args:
        targets: Classes of all records ``[N]``.
        positions: Which of them are drawn from ``[n]``.
        count: How many.
        purpose: Of the draw, which depends on nothing else.

    Returns:
        Positions, ascending.

    >>> drawn(torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(4), 2, "x").tolist() in (
    ...     [[a, b] for a in (0, 1) for b in (2, 3)])
    True
    """
    luck = torch.randperm(len(targets), generator=seeded(0, f"audit/{purpose}"))[positions]
    return positions[queue(targets[positions], luck)[:count]].sort().values


def beyond(after: Interval, references: list[float]) -> int:
    """1 where the whole interval lies above all retrained models, −1 where below all, else 0.

    >>> beyond(Interval(0.9, 0.8, 0.95, 50), [0.5, 0.7]), beyond(Interval(0.7, 0.6, 0.8, 50), [0.7])
    (1, 0)
    """
    if not references:
        return 0
    return int(after.low > max(references)) - int(after.high < min(references))


def balanced(inside: npt.ArrayLike, outside: npt.ArrayLike) -> Interval:
    """The mean of two rates, of records inside and outside of a class.

    Limits: the exact ones of both rates, put together as variances are (Zou and Donner 2008).

    Args:
        inside: Which records of the class are answered right ``[n]``.
        outside: Which of the others are ``[m]``.

    >>> found = balanced([True] * 10, [True] * 5 + [False] * 5)
    >>> found.value, found.low < 0.75 < found.high, found.n
    (0.75, True, 20)
    """
    one, two = (rate(int(np.sum(h)), int(np.size(h))) for h in (inside, outside))
    value = (one.value + two.value) / 2
    down = math.hypot(one.value - one.low, two.value - two.low) / 2
    up = math.hypot(one.high - one.value, two.high - two.value) / 2
    return Interval(value, value - down, value + up, one.n + two.n)


@dataclass(frozen=True)
class LinearProbe:
    """Can a linear probe on the features still find the forgotten class?

    The features are what the output layer is given. A logistic regression on standardised features
    is fitted on *training* records, a few of D_f against as many of D_r, and judged on *test*
    records: the mean of the share of the class that it finds and the share of the others that it
    leaves alone. It is fitted on few records on purpose: given many, it learns the class from the
    features of any network, one that never saw the class among them.

    Args:
        records: How many of D_f, and of D_r, it is fitted on, at most.
        tested: How many test records of the class, and of the others, it is judged on, at most.
        strength: C of the logistic regression.

    Example:
        ``LinearProbe().measure(subject, subject.after).value``
    """

    name: ClassVar[str] = "linear_probe"

    records: int = 50
    tested: int = 1000
    strength: float = 0.1

    def __post_init__(self) -> None:
        for option in ("records", "tested"):
            if getattr(self, option) < LEAST:
                raise MethodError(
                    f"{self.name}: {option} must be {LEAST} or more, not {getattr(self, option)}."
                )

    def __call__(self, subject: Subject, generator: np.random.Generator) -> Finding:
        """The finding."""
        why = class_only(subject)
        if why:
            return absent(self.name, why, "undefined")
        try:
            finding = compared(subject, repr(self), lambda model: self.measure(subject, model))
        except EffaceError as error:
            return absent(self.name, str(error), "not_estimable")
        references = [self.measure(subject, model).value for model in subject.references]
        fitted = len(self._places(subject)[0])
        return replace(
            finding,
            name=self.name,
            sentence=f"A linear probe on the features, fitted on {fitted} forgotten and as many "
            "retained records, tells unseen records of the forgotten class from others in "
            f"{finding.value:.1%} of cases"
            + _versus(finding, beyond(self.measure(subject, subject.after), references)),
        )

    def measure(self, subject: Subject, model: TrainedModel) -> Interval:
        """Balanced accuracy of the probe, with its 95 % interval over test records.

        Raises:
            NeedsError: If the split is not by class, a side has too few records, or the features
                cannot be read.
        """
        return subject.remember(f"{self!r} measured", model, lambda: self._probe(subject, model))

    def _probe(self, subject: Subject, model: TrainedModel) -> Interval:
        forget, retain, inside, outside = self._places(subject)
        known = np.concatenate([seen(subject, model, "retain", p) for p in (forget, retain)])
        wanted = np.r_[np.ones(len(forget)), np.zeros(len(retain))]
        probe = _fitted(known, wanted, self.strength)
        answers = [probe.predict(seen(subject, model, "test", p)) for p in (inside, outside)]
        return balanced(answers[0] == 1, answers[1] == 0)

    def _places(self, subject: Subject) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Positions: training records of D_f and of D_r, test records of the class and others."""
        label, split, task = forgotten_class(subject), subject.split, subject.split.task
        known, there = task.records.targets, task.test_records.targets
        n = min(self.records, len(split.forget), len(split.retain))
        mine = torch.eq(there, label)
        found = (
            drawn(known, split.forget, n, "probe forget"),
            drawn(known, split.retain, n, "probe retain"),
            drawn(there, mine.nonzero().flatten(), self.tested, "probe inside"),
            drawn(there, (~mine).nonzero().flatten(), self.tested, "probe outside"),
        )
        if min(map(len, found)) < LEAST:
            raise NeedsError(
                f"{n} forgotten records and {len(found[2])} test records of the class, "
                f"{len(found[3])} of others: a linear probe needs {LEAST} of each."
            )
        return found


def seen(subject: Subject, model: TrainedModel, part: Part, positions: Tensor) -> Floats:
    """Features ``[n, F]`` of training (``forget``, ``retain``) or test records.

    Raises:
        NeedsError: If the output layer is no layer by itself, or the features are not finite.
    """
    task = subject.split.task
    records = task.test_records if part == "test" else task.records
    weight = classifier_name(model.network, task.classifier)
    layer = model.network.get_submodule(weight.rpartition(".")[0])
    try:
        found = features(model.network, task, records, positions, device=subject.device)
    except (RuntimeError, ValueError, IndexError):  # nothing was caught: it was never called
        found = np.empty((0, 0), dtype=np.float32)
    if len(found) != len(positions) or any(True for _ in layer.children()):
        raise NeedsError(
            f"a linear probe reads what the output layer is given, and {weight} is not the weight "
            "of a layer that is called once with its input; name another as Task(classifier=…)."
        )
    if not np.isfinite(found).all():
        raise NeedsError("the features are not finite: the network diverged; nothing to probe.")
    return found.astype(np.float64)


def _fitted(known: Floats, wanted: Floats, strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged in 500 steps is near enough for a probe
        return probe.fit(known, wanted)


def _versus(finding: Finding, side: int) -> str:
    if finding.reference is None:
        return "; no retrained model was given to compare with."
    told = {
        1: "The features hold more of the class than those of any retrained model.",
        0: "On these records that is no more than in retrained models.",
        -1: "The features hold less of the class than those of any retrained model.",
    }
    return (
        f"; with retrained models: {finding.reference:.1%}, with the original: "
        f"{finding.original:.1%}. {told[side]}"
    )
