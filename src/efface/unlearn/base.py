"""The contract of an unlearner, and the wrappers that make variants of any.

An unlearner is a frozen dataclass of hyper-parameters: ``method(trained, split, fit)`` edits the
copy that it was given. Where a hyper-parameter is ``None``, the task's default holds
(``Task(defaults=…)``), else the rule that the docstring gives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from efface.data import Stream
from efface.errors import MethodError, NeedsError
from efface.fitting import Fit
from efface.mask import Mask
from efface.options import check_known
from efface.sparsify import OneShot, Pruner
from efface.task import Settings, Split, Task
from efface.trained import TrainedModel


@runtime_checkable
class Unlearner(Protocol):
    """Turns a trained model into one that has forgotten D_f."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """What must be there: keys of :data:`NEEDS`."""

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit, /) -> None:
        """Edit ``trained`` in place."""


@runtime_checkable
class Checked(Protocol):
    """A method that can tell beforehand whether it would refuse a model or a split."""

    def check(self, trained: TrainedModel, split: Split, /) -> None:
        """Raise for everything that can be known of the untouched model."""


NEEDS: dict[str, tuple[str, str]] = {
    "retain": ("the retain set D_r", "keep the retained records in the task's data"),
    "forget": (
        "the forget set D_f",
        "keep the records in the task's data until they are forgotten",
    ),
    "class": ("a split made by class", "select with --class, or take another method"),
    "mask": ("a pruned model", "prune it first: efface prune"),
    "rewind": (
        "rewind weights",
        "train with --rewind EPOCH (a model that was made to forget keeps none)",
    ),
    "initial": (
        "initial weights",
        "train it with efface train, or adopt it with --initial FILE; unprune can also take "
        "values=random or values=zero",
    ),
    "log": (
        "the update log of the model's training",
        "give it with --log LOGDIR; efface train --record LOGDIR writes it",
    ),
    "dense": ("the dense weights", "prune with --keep-dense (a model that forgot keeps none)"),
}


def needs_of(method: Unlearner) -> frozenset[str]:
    """What a method and everything inside it needs, without what one of them provides before."""
    there: frozenset[str] = getattr(method, "provides", frozenset())
    needs = method.needs
    for value in vars(method).values():
        if isinstance(value, Unlearner):
            needs |= needs_of(value) - there
            there |= _provides(value)
        elif isinstance(value, Pruner):
            needs |= value.requires
    return needs


def _provides(method: Unlearner) -> frozenset[str]:
    """What a method leaves for those that come after it."""
    own: frozenset[str] = getattr(method, "provides", frozenset())
    inner = [value for value in vars(method).values() if isinstance(value, Unlearner)]
    return own.union(*(_provides(m) for m in inner))


def check_needs(method: Unlearner, trained: TrainedModel, split: Split) -> None:
    """Check what a method needs before anything runs.

    Methods that have a ``check`` of their own are asked, too.

    Raises:
        NeedsError: Naming what is missing and how to get it.
    """
    there = {
        "retain": len(split.retain) > 0,
        "forget": len(split.forget) > 0,
        "class": split.label is not None,
        "mask": trained.mask is not None,
        "rewind": trained.rewind is not None,
        "initial": trained.initial is not None,
        "dense": trained.dense is not None,
        "log": trained.log is not None,
    }
    for need in sorted(needs_of(method)):
        if not there[need]:
            what, how = NEEDS[need]
            raise NeedsError(f"{method.name} needs {what}, and lacks that; {how}.")
    for inner in inside(method):
        if isinstance(inner, Checked):
            inner.check(trained, split)


def inside(method: Unlearner) -> Iterator[Unlearner]:
    """A method and every method inside it."""
    yield method
    for value in vars(method).values():
        if isinstance(value, Unlearner):
            yield from inside(value)


def forced(method: Any) -> Any:
    """The same method, told to go on: ``force=True`` wherever it, or one inside it, can be told.

    >>> from efface.unlearn import Amnesiac, Chain
    >>> forced(Chain(Amnesiac())).first.force
    True
    """
    changes: dict[str, Any] = {
        option: forced(value)
        for option, value in vars(method).items()
        if isinstance(value, Unlearner)
    }
    if isinstance(getattr(method, "force", None), bool):
        changes["force"] = True
    return replace(method, **changes) if changes else method


def fit_settings(
    fit: Fit, method: Unlearner, *, epochs: int | None, lr: float | None, **more: Any
) -> Settings:
    """The settings of an unlearner's fit: the task's, with this method's epochs and rate.

    ``None`` takes a tenth of the training's epochs (one at least) and half of its peak rate.
    """
    base = fit.task.fit
    epochs = max(1, round(base.epochs / 10)) if epochs is None else epochs
    lr = base.lr / 2 if lr is None else lr
    return replace(base, epochs=epochs, lr=lr, warmup=0.0, **more)


def filled(method: Any, task: Task) -> Any:
    """A method whose open (``None``) options have the task's defaults, inner methods included.

    Raises:
        MethodError: If the task has a default for an option that the method does not have.
    """
    changes: dict[str, Any] = {}
    for option, value in task.defaults.get(method.name, {}).items():
        check_known(method.name, option, type(method))
        if getattr(method, option) is None:
            changes[option] = value
    for option, value in vars(method).items():
        if isinstance(value, Unlearner):
            changes[option] = filled(value, task)
    return replace(method, **changes) if changes else method


def check_ranges(method: Any, **rules: tuple[str, bool]) -> None:
    """Raise for the first value that is out of range: epochs and rate, and what is given.

    Args:
        method: A method with the options ``epochs`` and ``lr``.
        rules: Option → what it must be, and whether it is.

    Raises:
        MethodError: Naming method, option, rule and value.
    """
    common = {
        "epochs": ("0 or more", method.epochs is None or method.epochs >= 0),
        "lr": ("positive", positive_or_none(method.lr)),
    }
    for option, (rule, holds) in (common | rules).items():
        if not holds:
            value = getattr(method, option)
            raise MethodError(f"{method.name}: {option} must be {rule}, not {value!r}.")


def positive_or_none(value: float | None) -> bool:
    """Whether a rate or the like is open or positive."""
    return value is None or 0 < value < math.inf


def to_json(method: Any) -> dict[str, Any]:
    """A method and everything inside it as a JSON value, its name under ``"method"``."""
    values: dict[str, Any] = {"method": method.name}
    for f in dataclasses.fields(method):
        value = getattr(method, f.name)
        if isinstance(value, Mask):
            value = {"digest": value.digest}
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = to_json(value)
        values[f.name] = value
    return values


# -- wrappers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masked:
    """Install a mask, then unlearn under it.

    Args:
        inner: Any unlearner.
        mask: Installed before; it holds from then on.
    """

    name: ClassVar[str] = "masked"
    title: ClassVar[str] = "Under a given mask"
    paper: ClassVar[str] = "Jia et al. 2023"
    needs: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset({"mask"})

    inner: Unlearner
    mask: Mask

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        trained.set_mask(self.mask)
        trained.maker = {}
        self.inner(trained, split, fit)


def _fine_tune() -> Unlearner:
    from efface.unlearn.finetune import FineTune

    return FineTune()


@dataclass(frozen=True)
class PruneFirst:
    """Prune first, then unlearn (Jia et al. 2023).

    The recovery after pruning sees D_r only: a deletion request is no occasion to train on the
    records to be deleted. (Rewind weights, which ``omp`` and ``imp`` go back to, have seen D_f.)
    To prune on all data, as in the paper, prune the model beforehand.

    Args:
        pruner: How to prune; any pruner.
        inner: Any unlearner.
    """

    name: ClassVar[str] = "prune-first"
    title: ClassVar[str] = "Prune first, then unlearn"
    paper: ClassVar[str] = "Jia et al. 2023"
    needs: ClassVar[frozenset[str]] = frozenset({"retain"})
    provides: ClassVar[frozenset[str]] = frozenset({"mask"})

    pruner: Pruner = field(default_factory=OneShot)
    inner: Unlearner = field(default_factory=_fine_tune)

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        self.pruner(trained, split.retain, fit.at("prune"))
        trained.maker = to_json(self.pruner)
        self.inner(trained, split, fit.at("inner"))


@dataclass(frozen=True)
class Chain:
    """One unlearner after another.

    Args:
        first: Runs first.
        second: Runs on its result.
    """

    name: ClassVar[str] = "chain"
    title: ClassVar[str] = "One after another"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()

    first: Unlearner = field(default_factory=_fine_tune)
    second: Unlearner = field(default_factory=_fine_tune)

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        self.first(trained, split, fit.at("first"))
        self.second(trained, split, fit.at("second"))


def streams(split: Split, *names: str, **options: Mapping[str, Any]) -> dict[str, Stream]:
    """Streams over parts of a split: ``streams(split, "retain", "forget")``."""
    return {name: Stream(getattr(split, name), **options.get(name, {})) for name in names}
