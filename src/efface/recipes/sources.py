"""What a recipe is about: the data and network of a size, and which records are to be forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from efface import networks
from efface.data import TensorRecords
from efface.datasets import Patch, cifar10, digits, load_task, with_trigger, with_wrong_labels
from efface.errors import InputError, SelectionError
from efface.options import changed
from efface.task import Split, Task


class Part(BaseModel):
    """A part of a recipe: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Selection(Part):
    """What is to be forgotten: classes, random records, or the poisoned ones.

    Random records are a fraction of all (``random``) or so many (``count``); with ``vary`` every
    training seed has others. ``alike`` makes a sub-class of a class: the share of it that is
    written alike, see :func:`written_alike`. Of poisoned records, ``poison`` is the fraction,
    ``target`` the attacker's label and ``trigger`` the options of the patch. ``harmful`` asks for
    so many source classes, those whose removal helps a downstream task most. ``wrong_labels`` is
    the share of D_f that gets a wrong label, where a network remembers too little of single
    records for their loss to be seen.
    """

    label: int | None = Field(None, alias="class")
    alike: float | None = Field(default=None, gt=0, lt=1)
    random: float | None = None
    count: int | None = Field(default=None, ge=1)
    seed: int = 0
    vary: bool = False
    poison: float | None = None
    target: int = 0
    trigger: Mapping[str, Any] = {}
    wrong_labels: float = 0.0
    classes: tuple[int, ...] = ()
    harmful: int | None = None

    @model_validator(mode="after")
    def _one(self) -> Selection:
        one = (self.label, self.random, self.count, self.poison, self.harmful, self.classes or None)
        if sum(value is not None for value in one) != 1:
            raise ValueError("give exactly one of class, classes, random, count, poison, harmful")
        if self.alike is not None and self.label is None:
            raise ValueError("alike is a share of a class; name the class")
        if self.vary and self.random is None and self.count is None:
            raise ValueError("vary is for random records: random or count")
        self.patch()
        return self

    def at(self, seed: int) -> Selection:
        """The selection of a training seed: another one where it varies."""
        return self.model_copy(update={"seed": self.seed + seed}) if self.vary and seed else self

    def apply(self, task: Task) -> tuple[Task, Split]:
        """The task, relabelled or poisoned where that is asked for, and its split."""
        if self.label is not None and self.alike is not None:
            positions = written_alike(task, self.label, self.alike)
            return task, Split.by_ids(task, [task.ids_[i] for i in positions.tolist()])
        if self.label is not None:
            return task, Split.by_class(task, self.label)
        if self.random is not None or self.count is not None:
            split = self._drawn(task)
            if self.wrong_labels:
                task = with_wrong_labels(task, split.forget, self.wrong_labels, seed=self.seed)
                split = replace(split, task=task)
            return task, split
        if self.classes:
            asked = " or ".join(f"target == {c}" for c in self.classes)
            return task, Split.where(task, asked)
        assert self.poison is not None
        task, positions = with_trigger(task, self.poison, self.patch(), self.target, self.seed)
        return task, Split.by_ids(task, [task.ids_[i] for i in positions.tolist()])

    def _drawn(self, task: Task) -> Split:
        n = len(task.ids_)
        if self.count is not None and self.count >= n:
            raise SelectionError(f"there are {n} records, and {self.count} are to be forgotten.")
        fraction = self.random if self.count is None else self.count / n
        assert fraction is not None
        return Split.random(task, fraction, seed=self.seed)

    def patch(self) -> Patch:
        """The trigger of poisoned records; the paper's where nothing is said of it."""
        patch: Patch = changed("the trigger", Patch(), self.trigger)
        return patch


def written_alike(task: Task, label: int, share: float) -> Tensor:
    """Positions of the records of a class that look alike: a sub-class, ascending.

    They are the share of the class that lies farthest out along the first principal component of
    its inputs, on the side of the longer tail. The rule knows of no model, and has no seed.

    Raises:
        InputError: If the data does not lie in memory.
        SelectionError: If there is no such class.
    """
    if not isinstance(task.records, TensorRecords):
        raise InputError("alike needs a task whose inputs lie in memory as one tensor.")
    mine = (task.records.targets == label).nonzero().flatten()
    if len(mine) < 2:
        raise SelectionError(f"class {label} has {len(mine)} records; alike needs two or more.")
    inputs = task.records.inputs[mine].flatten(1).double()
    inputs = inputs - inputs.mean(0)
    place = inputs @ torch.linalg.svd(inputs, full_matrices=False).Vh[0]
    if float((place**3).sum()) < 0:  # the sign of a principal component is anybody's choice
        place = -place
    take = max(1, round(share * len(mine)))
    return mine[place.argsort(descending=True, stable=True)[:take]].sort().values


class Source(Part):
    """A task: a built-in name or ``module:attribute``, and what is changed of it.

    ``network`` is a network of :mod:`efface.networks`, made with ``network_args`` and, by name,
    ``network_options``.
    """

    name: str
    records: int | None = None
    validation: int = 2000
    network: str | None = None
    network_args: tuple[Any, ...] = ()
    network_options: Mapping[str, Any] = {}
    fit: Mapping[str, Any] = {}

    def changed(self, fit: Mapping[str, Any], network_options: Mapping[str, Any]) -> Source:
        """The same task, trained otherwise."""
        if not fit and not network_options:
            return self
        more = {"fit": {**self.fit, **fit}}
        more["network_options"] = {**self.network_options, **network_options}
        return self.model_copy(update=more)

    def build(self) -> Task:
        """Make the task.

        Raises:
            InputError: If the data is not at hand, or the network is unknown.
        """
        if self.name == "digits":
            task = digits()
        elif self.name == "cifar10":
            task = cifar10(self.records, self.validation)
        else:
            task = load_task(self.name)
        if self.network is not None:
            made = _network(self.network, self.network_args, self.network_options)
            task = replace(task, network=made)
        elif self.network_args or self.network_options:
            raise InputError("network_args and network_options are of a network; name it, too.")
        return replace(task, fit=changed("the fit", task.fit, self.fit), defaults={})


def _network(name: str, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """A factory of one of efface's networks, by its name."""
    factory = getattr(networks, name, None)
    if callable(factory):
        made = partial(factory, *arguments, **options) if arguments or options else factory
        try:
            if isinstance(made(), nn.Module):
                return made
        except (TypeError, ValueError):
            pass
    how = f"with network_args = {list(arguments)}" if arguments else "without arguments"
    how += f" and network_options = {dict(options)}" if options else ""
    raise InputError(
        f"efface.networks has no network {name!r} that can be made {how}; give a task of your own "
        "as module:attribute."
    )
