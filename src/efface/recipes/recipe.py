"""Recipes: an experiment of a paper in one TOML file, every hyper-parameter in it.

A recipe has sizes (the same experiment on other data), each with models (dense, pruned), methods
with their options and, where a value was searched, the grid and the proxy forget set of the
search. Unknown keys are errors.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from efface import networks
from efface.datasets import Patch, cifar10, digits, load_task, with_trigger, with_wrong_labels
from efface.errors import InputError, MethodError, nearest
from efface.options import changed
from efface.sparsify import build_pruner
from efface.task import Split, Task
from efface.unlearn import build

MEASURED = (
    *("ua", "ra", "ta", "mia_efficacy", "mia_auc", "margin_forget"),
    *("forget_class_test_accuracy", "asr", "asr_paper", "probe", "kept_accuracy"),
)
"""What a row holds, as far as it applies."""

METRICS = (*MEASURED, "average_gap", "gap_a", "seconds")
"""What a claim or a curve can be about."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Selection(_Part):
    """What is to be forgotten: classes, a random fraction, or the poisoned records.

    Of poisoned records, ``poison`` is the fraction, ``target`` the attacker's label and
    ``trigger`` the options of the patch. ``harmful`` asks for so many source classes, those whose
    removal helps a downstream task most. ``wrong_labels`` is the share of D_f that gets a wrong
    label, where a network remembers too little of single records for their loss to be seen.
    """

    label: int | None = Field(None, alias="class")
    random: float | None = None
    seed: int = 0
    poison: float | None = None
    target: int = 0
    trigger: Mapping[str, Any] = {}
    wrong_labels: float = 0.0
    classes: tuple[int, ...] = ()
    harmful: int | None = None

    @model_validator(mode="after")
    def _one(self) -> Selection:
        one = (self.label, self.random, self.poison, self.harmful, self.classes or None)
        if sum(value is not None for value in one) != 1:
            raise ValueError("give exactly one of class, classes, random, poison, harmful")
        self.patch()
        return self

    def apply(self, task: Task) -> tuple[Task, Split]:
        """The task, relabelled or poisoned where that is asked for, and its split."""
        if self.label is not None:
            return task, Split.by_class(task, self.label)
        if self.random is not None:
            split = Split.random(task, self.random, seed=self.seed)
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

    def patch(self) -> Patch:
        """The trigger of poisoned records; the paper's where nothing is said of it."""
        patch: Patch = changed("the trigger", Patch(), self.trigger)
        return patch


class Source(_Part):
    """A task: a built-in name or ``module:attribute``, and what is changed of it."""

    name: str
    records: int | None = None
    validation: int = 2000
    network: str | None = None
    fit: Mapping[str, Any] = {}

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
            task = replace(task, network=_network(self.network))
        return replace(task, fit=changed("the fit", task.fit, self.fit), defaults={})


def _network(name: str) -> Any:
    """A network of efface that can be made without arguments, by its name."""
    factory = getattr(networks, name, None)
    try:
        made = factory() if callable(factory) else None
    except TypeError:
        made = None
    if not isinstance(made, nn.Module):
        raise InputError(
            f"efface.networks has no network {name!r} that can be made without arguments; give a "
            "task of your own as module:attribute."
        )
    return factory


class Model(_Part):
    """A model to forget with: dense, or pruned; ``like`` names the kind of its reference."""

    name: str
    pruner: Mapping[str, Any] | None = None
    like: Literal["dense", "same-mask", "rewound", "repruned"] = "dense"
    sparsities: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _buildable(self) -> Model:
        if self.pruner is not None:
            for model in self.expanded():
                model.make_pruner()
        elif self.like != "dense" or self.sparsities:
            raise ValueError(f"model {self.name!r} has no pruner")
        return self

    def expanded(self) -> list[Model]:
        """One model for each sparsity."""
        if not self.sparsities:
            return [self]
        made = []
        for s in self.sparsities:
            pruner = {**(self.pruner or {}), "sparsity": s}
            name = f"{self.name}-{100 * s:g}"
            made.append(Model(name=name, pruner=pruner, like=self.like))
        return made

    def make_pruner(self) -> Any:
        """The pruner."""
        options = dict(self.pruner or {})
        if "method" not in options:
            raise MethodError(f'the pruner of model {self.name!r} names no method = "…"')
        return build_pruner(options.pop("method"), options)


class Method(_Part):
    """An unlearner with its options; ``search`` holds a grid of values for some of them.

    ``models`` holds options that differ from model to model, ``seeds`` the number of training
    seeds where it is not the recipe's.
    """

    method: str
    options: Mapping[str, Any] = {}
    search: Mapping[str, tuple[Any, ...]] = {}
    models: Mapping[str, Mapping[str, Any]] = {}
    seeds: int | None = None

    @model_validator(mode="after")
    def _buildable(self) -> Method:
        if any(not values for values in self.search.values()):
            raise ValueError("search needs at least one value for each option")
        for options in (*self.grid(), *self.models.values()):
            build(self.method, {**self.options, **options})
        return self

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of searched values; one empty one where nothing is searched."""
        return [dict(zip(self.search, row, strict=True)) for row in product(*self.search.values())]

    def made(self, model: str, chosen: Mapping[str, Any]) -> Any:
        """The unlearner for a model, with what the search chose."""
        return build(self.method, {**self.options, **chosen, **self.models.get(model, {})})


class Transfer(_Part):
    """A downstream task: classes held out of the training, learnt by a linear probe."""

    source: tuple[int, ...]
    downstream: tuple[int, ...]
    per_class: int = 100
    influence_seeds: int = 2


class Claim(_Part):
    """A claim to test: a metric of one (model, method) is less than that of another."""

    text: str
    metric: str
    less: tuple[str, str]
    than: tuple[str, str]


class Curve(_Part):
    """A plot against sparsity: one line for each of some methods (``original`` is one)."""

    metric: str
    methods: tuple[str, ...]


class Size(_Part):
    """One size of a recipe."""

    task: Source
    forget: Selection
    proxy: Selection | None = None
    search_metric: Literal["average_gap", "gap_a"] = "gap_a"
    seeds: int = Field(3, ge=1)
    rewind: int | None = None
    transfer: Transfer | None = None
    models: tuple[Model, ...]
    methods: Mapping[str, Method]

    @field_validator("models")
    @classmethod
    def _spread(cls, models: tuple[Model, ...]) -> tuple[Model, ...]:
        return tuple(one for model in models for one in model.expanded())

    @model_validator(mode="after")
    def _searchable(self) -> Size:
        names = [model.name for model in self.models]
        if not names or len(set(names)) < len(names):
            raise ValueError("models must be one or more, each with a name of its own")
        taken = {"original", "retrain"} & set(self.methods)
        if taken:
            raise ValueError(f"a method cannot be called {taken.pop()!r}: every bench has that row")
        for name, method in self.methods.items():
            strange = set(method.models) - set(names)
            if strange:
                raise ValueError(f"method {name!r} speaks of a model {strange.pop()!r}")
        searched = [name for name, method in self.methods.items() if method.search]
        if searched and self.proxy is None:
            raise ValueError(f"{', '.join(searched)} search values, but there is no proxy")
        if self.proxy is not None and self.proxy == self.forget:
            raise ValueError("the proxy must be another forget set than the one reported")
        if (self.forget.harmful is not None) != (self.transfer is not None):
            raise ValueError("forget.harmful and transfer belong together")
        return self

    def seeds_of(self, method: str) -> int:
        """Training seeds of a method's rows."""
        own = self.methods[method].seeds if method in self.methods else None
        return max(self.seeds, own or 0)

    def most_seeds(self) -> int:
        """Training seeds of the original models."""
        return max([self.seeds, *(self.seeds_of(m) for m in self.methods)])


class Recipe(_Part):
    """An experiment; see ``efface/recipes/*.toml`` for those that come along."""

    name: str
    title: str
    source: str
    about: str
    claims: tuple[Claim, ...] = ()
    curves: tuple[Curve, ...] = ()
    paper: Mapping[str, Mapping[str, Mapping[str, tuple[float, ...] | float]]] = {}
    size: Mapping[str, Size] = Field(min_length=1)

    @model_validator(mode="after")
    def _named(self) -> Recipe:
        """Claims and curves speak of metrics, models and methods that some size has."""
        rows = {
            (model.name, method)
            for size in self.size.values()
            for model in size.models
            for method in ("original", "retrain", *size.methods)
        }
        said = [(claim.metric, pair) for claim in self.claims for pair in (claim.less, claim.than)]
        for metric, pair in said:
            if pair not in rows:
                raise ValueError(f"a claim speaks of {' · '.join(pair)}, which no size has")
            if metric not in METRICS:
                raise ValueError(f"a claim's metric {metric!r} is unknown")
        for curve in self.curves:
            strange = set(curve.methods) - {method for _, method in rows}
            if strange or curve.metric not in METRICS:
                raise ValueError(f"a curve speaks of {strange or {curve.metric}}, which is unknown")
        return self


def names() -> list[str]:
    """The recipes that come along."""
    folder = resources.files("efface.recipes")
    found = (Path(f.name) for f in folder.iterdir() if f.name.endswith(".toml"))
    return sorted(path.stem for path in found)


def source(recipe: str) -> tuple[str, Recipe]:
    """A recipe by its name, or from a TOML file: its text, and what it says.

    Raises:
        InputError: If there is none of that name, or the file is no recipe; the sentence names the
            key that is wrong.
    """
    if recipe.endswith(".toml"):
        path = Path(recipe)
        try:
            text = path.read_text()
        except OSError as error:
            raise InputError(f"{recipe} cannot be read ({error.strerror}); check it.") from None
    elif recipe in names():
        text = (resources.files("efface.recipes") / f"{recipe}.toml").read_text()
    else:
        raise InputError(
            f"recipe {recipe!r} is unknown; {nearest(recipe, names())} One of your own is given "
            "as FILE.toml."
        )
    return text, parse(text, Path(recipe).stem)


def parse(text: str, name: str) -> Recipe:
    """A recipe from TOML.

    Raises:
        InputError: If it is no TOML, or holds an unknown key or a value that does not fit.
    """
    try:
        values = tomllib.loads(text)
        return Recipe(name=name, **_with_common(values))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"recipe {name} is not TOML ({error}); correct it.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the recipe"
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            what = "this key is unknown"
        raise InputError(f"recipe {name}, {where}: {what}; correct it.") from None
    except MethodError as error:
        raise InputError(f"recipe {name}: {error}") from None


def _with_common(values: dict[str, Any]) -> dict[str, Any]:
    """Sizes with what the recipe says for all of them: ``[common]`` lies beneath each size."""
    from efface.options import merged

    common = values.pop("common", {})
    sizes = values.get("size", {})
    if isinstance(common, Mapping) and isinstance(sizes, Mapping):
        values["size"] = {
            n: merged(common, s) if isinstance(s, Mapping) else s for n, s in sizes.items()
        }
    return values
