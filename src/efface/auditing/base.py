"""Subject: what is audited; Finding: one audited number."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from efface.errors import MismatchError
from efface.keys import load_key, tags
from efface.lineage import Step
from efface.mask import Mask
from efface.predict import logits
from efface.seeds import rng
from efface.shapes import plan_of
from efface.stats import Interval
from efface.task import Split
from efface.trained import TrainedModel

Part = Literal["forget", "retain", "test"]
Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Finding:
    """One audited number.

    Args:
        name: Its name in ``audit.json``.
        value: For the model after forgetting; rates are fractions; None when not ``ok``.
        low: Lower end of the 95 % interval, or None where a single measurement has none.
        high: Upper end.
        n: How many records (or runs) it rests on.
        direction: ``match`` the reference, ``lower`` or ``higher`` is better, or ``info``.
        status: ``ok``, ``undefined`` or ``not_estimable``.
        sentence: What it says, in plain words; why, when it is not ``ok``.
        reference: Mean over the retrained models.
        gap: Absolute difference to that mean.
        floor: Largest difference between two retrained models (for distances: their mean distance).
        original: For the untouched original.
        series: Histograms, bars or curves for the report.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    direction: Literal["match", "lower", "higher", "info"] = "match"
    status: Literal["ok", "undefined", "not_estimable"] = "ok"
    sentence: str = ""
    reference: float | None = None
    gap: float | None = None
    floor: float | None = None
    original: float | None = None
    series: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self)


def absent(name: str, why: str, status: Literal["undefined", "not_estimable"]) -> Finding:
    """A finding that cannot be had, with the reason."""
    return Finding(name, None, status=status, sentence=why)


T = TypeVar("T")


class Cache:
    """What was computed for a model on some records: logits, and measures of them.

    Keyed by weights digest and records, kept in memory, shared between audits of one task.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], Any] = {}

    def get(self, key: tuple[str, ...], compute: Callable[[], T]) -> T:
        """The value under a key, computed when it is not there."""
        if key not in self._kept:
            self._kept[key] = compute()
        value: T = self._kept[key]
        return value


@dataclass(frozen=True)
class Subject:
    """What an audit looks at.

    Args:
        before: The untouched original.
        after: The model that is said to have forgotten.
        split: D_f and D_r; D_r without what was forgotten earlier.
        references: Models retrained on D_r.
        originals: Further models trained with D_f, for tests that compare the two kinds.
        device: Where logits are computed.
        cache: What is computed once per model and records.
    """

    before: TrainedModel
    after: TrainedModel
    split: Split
    references: tuple[TrainedModel, ...] = ()
    originals: tuple[TrainedModel, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cache: Cache = field(default_factory=Cache)

    @cached_property
    def _digests(self) -> dict[int, str]:
        models = (self.before, self.after, *self.references, *self.originals)
        return {id(model): model.digest for model in models}

    def digest(self, model: TrainedModel) -> str:
        """The weights digest of one of the models, computed once."""
        return self._digests[id(model)]

    @cached_property
    def _positions(self) -> dict[str, Tensor]:
        return {
            "forget": self.split.forget,
            "retain": self.split.retain,
            "test": torch.arange(len(self.split.task.test_records)),
        }

    def logits(self, model: TrainedModel, part: Part) -> Logits:
        """Logits ``[n, C]`` of a part, in the order of positions."""
        task, where = self.split.task, self._positions[part]
        records = task.test_records if part == "test" else task.records
        return self.cache.get(
            ("logits", part, self.digest(model), self._key),
            lambda: logits(model.network, task, records, where, device=self.device),
        )

    def remember(self, name: str, model: TrainedModel, measure: Callable[[], T]) -> T:
        """A measure of a model, taken once for this split."""
        return self.cache.get((name, self.digest(model), self._key), measure)

    @cached_property
    def _key(self) -> str:
        """What the cached values rest on besides the weights: data and split."""
        positions = torch.cat([self.split.forget, torch.tensor([-1]), self.split.retain])
        content = hashlib.sha256(positions.numpy().tobytes()).hexdigest()
        return f"{self.split.task.data_fingerprint}/{content}/{self.split.label}"

    def targets(self, part: Part) -> npt.NDArray[np.int64]:
        """True labels of a part."""
        task = self.split.task
        records = task.test_records if part == "test" else task.records
        chosen: npt.NDArray[np.int64] = records.targets[self._positions[part]].numpy()
        return chosen

    @cached_property
    def seen_test(self) -> npt.NDArray[np.bool_]:
        """Test records that utility is measured on: all, without a class that was forgotten."""
        labels = self.targets("test")
        if self.split.label is None:
            return np.ones(len(labels), dtype=bool)
        return np.asarray(labels != self.split.label)

    @cached_property
    def matched_test(self) -> npt.NDArray[np.int64] | None:
        """Test records in the class proportions of D_f: the non-members that it is compared with.

        None when a class of D_f has no test record. Drawn once, the same for every model.
        """
        wanted, there = self.targets("forget"), self.targets("test")
        classes, counts = np.unique(wanted, return_counts=True)
        shares = counts / counts.sum()
        available = np.array([(there == c).sum() for c in classes])
        if (available == 0).any():
            return None
        scale = (available / shares).min()
        draw = rng(0, "matched-test")
        picks = [
            draw.choice(np.flatnonzero(there == c), size=int(scale * share + 1e-9), replace=False)
            for c, share in zip(classes, shares, strict=True)
        ]
        return np.sort(np.concatenate(picks))


class Audit(Protocol):
    """A frozen dataclass; ``audit(subject, generator) → Finding``."""

    def __call__(self, subject: Subject, generator: np.random.Generator, /) -> Finding:
        """The finding about a subject."""


def compared(
    subject: Subject, name: str, measure: Callable[[TrainedModel], Interval], **more: Any
) -> Finding:
    """A finding from a measure of one model, taken of every model."""

    def taken(model: TrainedModel) -> Interval:
        return subject.remember(name, model, lambda: measure(model))

    after = taken(subject.after)
    references = [taken(model).value for model in subject.references]
    mean = float(np.mean(references)) if references else None
    return Finding(
        name,
        after.value,
        after.low,
        after.high,
        after.n,
        reference=mean,
        gap=None if mean is None else abs(after.value - mean),
        floor=spread(references),
        original=taken(subject.before).value,
        **more,
    )


def spread(values: Sequence[float]) -> float | None:
    """The largest difference between two values; None for fewer than two."""
    return max((abs(a - b) for a, b in combinations(values, 2)), default=None)


def check_subject(subject: Subject) -> None:
    """Check that models, split and references belong together.

    Raises:
        MismatchError: Naming what does not.
    """
    before, after, split = subject.before, subject.after, subject.split
    new = set(after.forgotten.tags) - set(before.forgotten.tags)
    asked = set(tags((split.task.ids_[i] for i in split.forget.tolist()), load_key()))
    if after is not before and new != asked:
        raise MismatchError(
            f"the {len(asked)} records of the split are not what the model forgot by its lineage "
            f"({len(new)} records); audit with the selection that was forgotten, or with none."
        )
    for reference in subject.references:
        _check_reference(subject, reference, set(before.forgotten.tags) | asked)
    for original in subject.originals:
        _check_original(before, original)


def _check_reference(subject: Subject, reference: TrainedModel, gone: set[str]) -> None:
    if set(reference.forgotten.tags) != gone:
        raise MismatchError(
            "a reference was not trained without exactly the forgotten records; make one with "
            "efface retrain and the same selection."
        )
    theirs, ours = reference.trained_by(), subject.before.trained_by()
    if theirs is None or not _retrained(reference):
        raise MismatchError(
            "a reference was not trained from fresh weights without the forgotten records; make "
            "one with efface retrain."
        )
    if ours is not None and dict(theirs.settings) != dict(ours.settings):
        keys = sorted({*theirs.settings, *ours.settings})
        differ = [k for k in keys if theirs.settings.get(k) != ours.settings.get(k)]
        raise MismatchError(
            f"a reference was trained with other settings than the original ({', '.join(differ)}); "
            "retrain it with the original's."
        )
    if ours is not None and theirs.data["fingerprint"] != ours.data["fingerprint"]:
        raise MismatchError("a reference was trained on other data than the original; retrain it.")
    if plan_of(subject.after.task) or plan_of(reference.task):
        return  # the mask of a compacted model went into its shapes, or names other tensors
    mask, other = subject.after.mask, reference.mask
    blocks = any("blocks" in step.detail for step in subject.after.lineage)
    if subject.before.mask is None and other is None and blocks:
        return  # blocks that carried D_f were switched off: that is the method, not the model
    if not _alike(mask, other):
        raise MismatchError(
            f"a reference has {other.sparsity if other else 0:.1%} of its weights pruned, the "
            f"model {mask.sparsity if mask else 0:.1%}; use efface retrain --like same-mask, "
            "or dense for a dense model."
        )


def _alike(mask: Mask | None, other: Mask | None) -> bool:
    """Whether two masks are over the same weights, and keep as many."""
    if mask is None or other is None:
        return mask is other
    return mask.keys() == other.keys() and abs(mask.kept - other.kept) <= 1


def _check_original(before: TrainedModel, other: TrainedModel) -> None:
    ours, theirs = before.trained_by(), other.trained_by()
    if theirs is None or set(other.forgotten.tags) != set(before.forgotten.tags):
        raise MismatchError(
            "a further original must be trained with the records that were to be forgotten, and "
            "without what the original had forgotten before; make it with efface train."
        )
    if ours is not None and (
        dict(theirs.settings) != dict(ours.settings)
        or theirs.data["fingerprint"] != ours.data["fingerprint"]
    ):
        raise MismatchError(
            "a further original was trained with other settings or on other data than the "
            "original; train it as the original was."
        )


def last_step(model: TrainedModel) -> Step | None:
    """The last thing that was done to a model; that it was compacted does not count."""
    return next((step for step in reversed(model.lineage) if step.verb != "compact"), None)


def _retrained(model: TrainedModel) -> bool:
    """Whether all that a model has forgotten was left out of a training from fresh weights."""
    for step in reversed(model.lineage):
        if step.verb == "retrain" or (step.method or {}).get("method") == "retrain":
            return True
        if step.verb not in ("prune", "compact"):
            return False
    return False
