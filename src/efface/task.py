"""Task: what a user brings; and Split: which of its records are to be forgotten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efface.data import Augment, Records, as_records, as_strings, fingerprint
from efface.errors import SelectionError, TaskError, listed, nearest
from efface.seeds import generator
from efface.where import evaluate, redacted


@dataclass(frozen=True)
class Settings:
    """How the one loop trains.

    Args:
        epochs: Passes over the first stream.
        batch_size: Records per batch.
        lr: Peak learning rate.
        optimizer: ``"sgd"`` (Nesterov when there is momentum), ``"adam"`` or ``"adamw"``.
        momentum: For SGD.
        weight_decay: Applied to every parameter.
        schedule: Learning rate after the warm-up: ``"constant"``, ``"linear"`` (to zero),
            ``"cosine"`` (to zero) or ``"step"`` (a tenth at 50 % and at 75 %, as Jia et al. 2023).
        warmup: Fraction of all steps in which the rate rises linearly from zero.
        bn: What the fit does to batch-norm statistics: ``"train"`` updates them as usual,
            ``"frozen"`` leaves them alone, ``"recalibrate"`` recomputes them afterwards on the
            first stream. Where a stream has a single record they are left alone in any case.
        begun: Epochs of the schedule that are behind the fit already.
        ahead: Epochs of the schedule that come after the fit: it gets the rates of the ``epochs``
            in the middle of ``begun + epochs + ahead``.
        micro_batch: Records per forward and backward pass, where a batch does not fit in memory:
            a step's gradients are added up over the passes (batch norm sees each by itself).
            0 takes a batch whole.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["constant", "linear", "cosine", "step"] = "linear"
    warmup: float = 0.0
    bn: Literal["train", "frozen", "recalibrate"] = "train"
    begun: int = 0
    ahead: int = 0
    micro_batch: int = 0

    def __post_init__(self) -> None:
        wrong = {
            "epochs must be 0 or more": self.epochs < 0,
            "batch_size must be 1 or more": self.batch_size < 1,
            "lr must be positive": not self.lr > 0,
            "momentum must lie in [0, 1)": not 0 <= self.momentum < 1,
            "weight_decay must be 0 or more": not self.weight_decay >= 0,
            "warmup must lie in [0, 1]": not 0 <= self.warmup <= 1,
            "begun must be 0 or more": self.begun < 0,
            "ahead must be 0 or more": self.ahead < 0,
            "micro_batch must be 0 or more": self.micro_batch < 0,
        }
        for sentence, is_wrong in wrong.items():
            if is_wrong:
                raise TaskError(f"{sentence}; correct it in the fit settings.")

    def to_dict(self) -> dict[str, Any]:
        """As a JSON value; a fit that has a schedule of its own, as nearly every one, is silent."""
        silent = [k for k in ("begun", "ahead", "micro_batch") if not getattr(self, k)]
        return {k: v for k, v in asdict(self).items() if k not in silent}


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def _call(network: nn.Module, inputs: Any) -> Tensor:
    logits: Tensor = network(inputs)
    return logits


@dataclass(frozen=True, eq=False)
class Task:
    """What a user brings.

    Args:
        network: Makes a freshly initialised network; called once per model.
        train: Map-style data set of un-augmented ``(input, target)``; targets are class indices.
        test: The same, never trained on.
        validation: The same; optional, never trained on, never audited on.
        ids: A stable ID per training record, or the name of a column. ``None`` takes positions.
        subjects: Whose record it is (a person may own several), or the name of a column.
        columns: Further columns for ``Split.where``: name → values ``[N]``.
        augment: A batch transform used in training only (see :class:`efface.data.Augment`).
        loss: ``(logits [B, C], targets [B]) → scalar``.
        forward: ``(network, inputs) → logits``, where inputs are not simply passed on.
        fit: How the task trains.
        train_fn: The owner's own routine, ``(network, dataset, seed) → None``: it trains the
            network in place on the data set given. Used wherever a model is trained from scratch.
        defaults: Values for options that a method leaves open, e.g.
            ``{"l1-sparse": {"alpha": 2e-3}}``.
        classifier: Name of the output layer's weight; found by itself when ``None``.
        workers: Loader processes, for data that does not fit in memory.
        collate: How a list of records becomes a batch, where PyTorch's default does not do.
        name: What reports call the task.

    Raises:
        TaskError: When IDs, subjects or columns have another length than the data, or IDs repeat.

    Example:
        >>> import torch, efface
        >>> x, y = torch.randn(20, 4), torch.arange(20) % 2
        >>> task = efface.Task(lambda: torch.nn.Linear(4, 2), (x, y), (x, y))
        >>> len(task.ids_), task.classes
        (20, 2)
    """

    network: Callable[[], nn.Module]
    train: Any
    test: Any
    validation: Any = None
    ids: Sequence[Any] | str | None = None
    subjects: Sequence[Any] | str | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    augment: Augment | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = _cross_entropy
    forward: Callable[[nn.Module, Any], Tensor] = _call
    fit: Settings = field(default_factory=Settings)
    train_fn: Callable[[nn.Module, Any, int], None] | None = None
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    classifier: str | None = None
    workers: int = 0
    collate: Callable[[list[Any]], Any] | None = None
    name: str = "task"

    def __post_init__(self) -> None:
        n = _length(self.train)
        given = {"ids": self.ids, "subjects": self.subjects, **self.columns}
        for name, values in given.items():
            if isinstance(values, str):
                if values not in self.columns:
                    hint = nearest(values, self.columns)
                    raise TaskError(f"{name} names a column {values!r} that is not there: {hint}")
            elif values is not None and len(values) != n:
                raise TaskError(
                    f"{name} has {len(values)} entries but the training data has {n} records; "
                    "give one per record, in the same order."
                )
        self._check_unique()

    def _check_unique(self) -> None:
        seen: set[str] = set()
        twice = []
        for record in self.ids_ if self.ids is not None else ():
            if record in seen:
                twice.append(record)
            seen.add(record)
        if twice:
            raise TaskError(
                f"{len(twice)} record IDs occur more than once ({listed(twice)}); give every "
                "record an ID of its own (use subjects= for what several records share)."
            )

    @cached_property
    def ids_(self) -> list[str]:
        """The ID of every training record, as strings."""
        if self.ids is None:
            return [str(i) for i in range(_length(self.train))]
        return as_strings(self.columns[self.ids] if isinstance(self.ids, str) else self.ids)

    @cached_property
    def subjects_(self) -> list[str] | None:
        """The subject of every training record, or None."""
        if self.subjects is None:
            return None
        values = self.columns[self.subjects] if isinstance(self.subjects, str) else self.subjects
        return as_strings(values)

    @property
    def private(self) -> set[str]:
        """Columns that identify people or records: their values are never written down."""
        named = {c for c in (self.ids, self.subjects) if isinstance(c, str)}
        return {"id", "subject", *named}

    @property
    def positional(self) -> bool:
        """Whether records are known only by their position."""
        return self.ids is None

    @cached_property
    def records(self) -> Records:
        """The training records, checked: the same at every read."""
        return as_records(self.train, workers=self.workers, collate=self.collate)

    @cached_property
    def test_records(self) -> Records:
        """The test records."""
        return as_records(self.test, workers=self.workers, collate=self.collate)

    @cached_property
    def classes(self) -> int:
        """Number of classes: the largest label of training and test data, plus one."""
        return int(max(self.records.targets.max(), self.test_records.targets.max())) + 1

    @cached_property
    def data_fingerprint(self) -> str:
        """A digest that changes when records are reordered, changed, added or removed."""
        return fingerprint(self.records)

    def table(self) -> dict[str, np.ndarray[Any, Any]]:
        """The columns that ``Split.where`` can ask for: id, target, subject and the task's own."""
        columns = {name: np.asarray(values) for name, values in self.columns.items()}
        columns["id"] = np.asarray(self.ids_)
        columns["target"] = self.records.targets.numpy()
        if self.subjects_ is not None:
            columns["subject"] = np.asarray(self.subjects_)
        return columns


def _length(dataset: Any) -> int:
    """Records in a data set, in any of the forms that a task takes."""
    if not hasattr(dataset, "__len__"):
        raise TaskError(
            f"{type(dataset).__name__} is not a map-style data set; give one with __len__ and "
            "__getitem__ that returns (input, target)."
        )
    return len(dataset[1]) if isinstance(dataset, tuple) and len(dataset) == 2 else len(dataset)


@dataclass(frozen=True, eq=False)
class Split:
    """Which training records are to be forgotten (D_f) and which are kept (D_r).

    Make one with :meth:`by_ids`, :meth:`by_class`, :meth:`random` or :meth:`where`. Positions are
    sorted. ``retain`` never holds what an earlier request made the model forget: the functions
    that take a split and a model see to that.

    Args:
        task: The task that the positions refer to.
        forget: Positions of D_f.
        retain: Positions of D_r.
        selector: How D_f was chosen, as a JSON value without IDs.
    """

    task: Task
    forget: Tensor
    retain: Tensor
    selector: Mapping[str, Any]

    @classmethod
    def of(cls, task: Task, forget: Tensor, selector: Mapping[str, Any]) -> Split:
        """A split from a boolean tensor ``[N]``.

        Raises:
            SelectionError: If nothing, or everything, would be forgotten.
        """
        n = int(forget.sum())
        if n == 0:
            raise SelectionError("the forget set is empty: the selection matches no record.")
        if n == len(forget):
            raise SelectionError(
                f"the forget set is everything ({n} records); nothing would be left to retain."
            )
        return cls(task, forget.nonzero().flatten(), (~forget).nonzero().flatten(), dict(selector))

    @classmethod
    def by_ids(cls, task: Task, ids: Sequence[Any]) -> Split:
        """Forget the records with these IDs.

        Raises:
            SelectionError: If IDs are unknown or given twice, or the list is empty or complete.
        """
        wanted = as_strings(list(ids))
        place = {record: i for i, record in enumerate(task.ids_)}
        unknown = [record for record in wanted if record not in place]
        if unknown:
            raise SelectionError(
                f"{len(unknown)} of {len(wanted)} IDs are not in the training data "
                f"({listed(unknown)}); check the list against the task's IDs."
            )
        repeated = (
            sorted({record for record in wanted if wanted.count(record) > 1})
            if len(set(wanted)) < len(wanted)
            else []
        )
        if repeated:
            raise SelectionError(
                f"{len(repeated)} IDs are given twice ({listed(repeated)}); list each once."
            )
        chosen = torch.zeros(len(task.ids_), dtype=torch.bool)
        chosen[[place[record] for record in wanted]] = True
        return cls.of(task, chosen, {"kind": "ids", "n": len(wanted)})

    @classmethod
    def by_class(cls, task: Task, label: int) -> Split:
        """Forget every record of a class.

        Raises:
            SelectionError: If no record has this label, or all have.
        """
        chosen = task.records.targets == label
        if not bool(chosen.any()):
            there = sorted(set(task.records.targets.tolist()))
            raise SelectionError(f"class {label} does not exist; classes: {listed(there, 20)}.")
        return cls.of(task, chosen, {"kind": "class", "class": int(label)})

    @classmethod
    def random(cls, task: Task, fraction: float, seed: int = 0) -> Split:
        """Forget a random fraction of all records.

        Raises:
            SelectionError: If the fraction is not between 0 and 1, or rounds to no record.
        """
        if not 0 < fraction < 1:
            raise SelectionError(f"the fraction must lie between 0 and 1, not {fraction}.")
        n = len(task.ids_)
        chosen = torch.zeros(n, dtype=torch.bool)
        take = torch.randperm(n, generator=generator(seed, "split"))[: round(fraction * n)]
        chosen[take] = True
        return cls.of(task, chosen, {"kind": "random", "fraction": fraction, "seed": seed})

    @classmethod
    def where(cls, task: Task, expression: str) -> Split:
        """Forget the records for which an expression over the task's columns holds.

        Args:
            task: The task.
            expression: Comparisons joined by ``and``, ``or``, ``not``, e.g.
                ``"age < 30 and subject != 'p017'"``; parsed, never evaluated as code.

        Raises:
            SelectionError: If it cannot be parsed, names an unknown column, or matches nothing.
        """
        chosen = torch.from_numpy(evaluate(expression, task.table()))
        safe = redacted(expression, task.private)
        return cls.of(task, chosen, {"kind": "where", "expression": safe})

    @property
    def label(self) -> int | None:
        """The class to forget, when the split was made by class."""
        return self.selector["class"] if self.selector.get("kind") == "class" else None

    def without(self, earlier: Tensor) -> Split:
        """The split with records that are gone already taken out of D_f and D_r.

        Args:
            earlier: Positions forgotten by earlier requests.

        Raises:
            SelectionError: If nothing is left to forget.
        """
        if len(earlier) == 0:
            return self
        forget = self.forget[~torch.isin(self.forget, earlier)]
        if len(forget) == 0:
            raise SelectionError("all of these records have been forgotten by an earlier request.")
        retain = self.retain[~torch.isin(self.retain, earlier)]
        if len(retain) == 0:
            raise SelectionError("nothing would be left to retain after this request.")
        return replace(self, forget=forget, retain=retain)

    def sizes(self) -> dict[str, int]:
        """Numbers of records in D_f, D_r and D_t."""
        return {
            "forget": len(self.forget),
            "retain": len(self.retain),
            "test": len(self.task.test_records),
        }
