"""What a recipe asks for at one size: task, forget sets, models, methods. Unknown keys are errors.

A size has one forget set (``forget``, and ``proxy`` to search on), or several by name
(``scenarios``), which share what does not depend on them: the original models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from efface.errors import MethodError
from efface.options import changed, merged
from efface.recipes.sources import Part, Selection, Source
from efface.sparsify import build_pruner
from efface.unlearn import Frugal, build
from efface.unlearn.frugal import check_fraction

if TYPE_CHECKING:
    from efface.updates.recorder import Recorder

Kind = Literal["dense", "same-mask", "rewound", "repruned"]
"""Kinds of retrained models; see :func:`efface.retrain`."""


class Model(Part):
    """A model to forget with: dense, or pruned.

    ``like`` is the kind of retrained model that gaps are measured against; ``references`` are
    further kinds, each a row ``retrain-KIND`` of its own. ``keep_dense`` keeps the weights that
    pruning removed. ``scenarios`` are those that it takes part in: all where none is named.

    A dense model may be trained otherwise than the size's task says: ``fit`` and
    ``network_options`` are laid over the task's. With ``cohort_epochs`` the records of D_f share
    batches, and come in the last so many epochs only.
    """

    name: str
    pruner: Mapping[str, Any] | None = None
    like: Kind = "dense"
    references: tuple[Kind, ...] = ()
    sparsities: tuple[float, ...] = ()
    keep_dense: bool = False
    scenarios: tuple[str, ...] = ()
    fit: Mapping[str, Any] = {}
    network_options: Mapping[str, Any] = {}
    cohort_epochs: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _buildable(self) -> Model:
        if self.pruner is not None:
            if self.fit or self.network_options or self.cohort_epochs:
                raise ValueError(f"model {self.name!r} is pruned: say how to train for the size")
            for model in self.expanded():
                model.make_pruner()
        elif self.like != "dense" or self.sparsities or self.references or self.keep_dense:
            raise ValueError(f"model {self.name!r} has no pruner")
        if self.like in self.references or len(set(self.references)) < len(self.references):
            raise ValueError(f"model {self.name!r} has a reference of one kind twice")
        return self

    def expanded(self) -> list[Model]:
        """One model for each sparsity."""
        if not self.sparsities:
            return [self]
        made = []
        for s in self.sparsities:
            pruner = {**(self.pruner or {}), "sparsity": s}
            name = f"{self.name}-{100 * s:g}"
            changes = {"name": name, "pruner": pruner, "sparsities": ()}
            made.append(self.model_copy(update=changes))
        return made

    def make_pruner(self) -> Any:
        """The pruner."""
        options = dict(self.pruner or {})
        if "method" not in options:
            raise MethodError(f'the pruner of model {self.name!r} names no method = "…"')
        return build_pruner(options.pop("method"), options)


class Method(Part):
    """An unlearner with its options; ``search`` holds a grid of values for some of them.

    A searched option of an inner method is named with a dot (``"inner.lr"``). ``models`` holds
    options that differ from model to model, ``within`` those that differ from scenario to scenario,
    ``seeds`` the number of training seeds where it is not the recipe's. ``on`` and ``scenarios``
    are the models and scenarios that it takes part in: all where none is named. ``keeps`` makes it
    several methods, ``NAME-100``, ``NAME-10`` and so on: one for each value of its option ``keep``.
    ``fractions`` makes it several, ``NAME@100``, ``NAME@13`` and so on: a family, each member of
    which is given that ``fraction`` of D_r (see :class:`efface.unlearn.Frugal`).
    """

    method: str
    options: Mapping[str, Any] = {}
    search: Mapping[str, tuple[Any, ...]] = {}
    models: Mapping[str, Mapping[str, Any]] = {}
    within: Mapping[str, Mapping[str, Any]] = {}
    seeds: int | None = None
    on: tuple[str, ...] = ()
    scenarios: tuple[str, ...] = ()
    keeps: tuple[float, ...] = ()
    fractions: tuple[float, ...] = ()
    fraction: float | None = None

    def expanded(self, name: str) -> dict[str, Method]:
        """One method for each ``keep`` or fraction of D_r, by name."""
        made = {}
        for fraction in self.fractions:
            alone = {"fraction": fraction, "fractions": ()}
            made[f"{name}@{100 * fraction:g}"] = self.model_copy(update=alone)
        for keep in self.keeps:
            changes = {"options": {**self.options, "keep": keep}, "keeps": ()}
            made[f"{name}-{100 * keep:g}"] = self.model_copy(update=changes)
        return made or {name: self}

    @model_validator(mode="after")
    def _buildable(self) -> Method:
        if any(not values for values in self.search.values()):
            raise ValueError("search needs at least one value for each option")
        if sum(bool(given) for given in (self.keeps, self.fractions, self.fraction)) > 1:
            raise ValueError("give one of keeps, fractions and fraction")
        for fraction in (*self.fractions, *([] if self.fraction is None else [self.fraction])):
            check_fraction("a method", fraction)
        for one in self.expanded("").values():
            for options in (*self.grid(), *self.models.values(), *self.within.values()):
                build(self.method, merged(one.options, _nested(options)))
        return self

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of searched values; one empty one where nothing is searched."""
        return [dict(zip(self.search, row, strict=True)) for row in product(*self.search.values())]

    def made(self, model: str, chosen: Mapping[str, Any], scenario: str = "") -> Any:
        """The unlearner for a model in a scenario, with what the search chose."""
        options = merged(self.options, _nested(chosen))
        for more in (self.within.get(scenario, {}), self.models.get(model, {})):
            options = merged(options, more)
        made = build(self.method, options)
        return made if self.fraction is None else Frugal(made, self.fraction)


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with dots in their names as groups.

    >>> _nested({"inner.lr": 0.1, "p": 0.2})
    {'inner': {'lr': 0.1}, 'p': 0.2}
    """
    made: dict[str, Any] = {}
    for name, value in options.items():
        first, dot, rest = name.partition(".")
        made = merged(made, {first: _nested({rest: value})} if dot else {name: value})
    return made


class Transfer(Part):
    """A downstream task: classes held out of the training, learnt by a linear probe."""

    source: tuple[int, ...]
    downstream: tuple[int, ...]
    per_class: int = 100
    influence_seeds: int = 2


def recorder(folder: Path, options: Mapping[str, Any]) -> Recorder:
    """The recorder that a size asks for.

    Raises:
        MethodError: For an unknown option, or a value of the wrong type.
    """
    from efface.updates.recorder import Recorder

    if "folder" in options:
        raise MethodError("record: the folder lies beside the kept model; leave it out.")
    made: Recorder = changed("record", Recorder(folder), options)
    return made


class Scenario(Part):
    """A forget set that is reported, and another one to search values on."""

    forget: Selection
    proxy: Selection | None = None


class Size(Part):
    """One size of a recipe: with one forget set, or with several as scenarios.

    ``initial`` says where references begin: ``own`` initial weights, or those of the ``model``,
    with another batch order. ``orders`` is how many of the first kind are trained per seed, each
    with batches in another order: gaps are measured against the first, and the second is a row,
    ``retrain-again``. ``originals`` is how many originals there are per seed, each from the same
    initial weights in another order: with two, the trace is also measured from both sides, as what
    models of one kind share more with one another than with the other kind. ``balances`` are
    shares of members at which the released attack is fitted, to see what that does to its numbers.
    ``record`` are the options of the recorder (see :class:`efface.updates.Recorder`) that keeps the
    updates of every original, for methods that need a log.

    With ``shared_search`` values are looked for once for a family of methods and for all scenarios:
    at the fraction next to ``search_fraction``, in the first scenario that has a proxy.
    ``search_seed`` is the training seed of the search. With ``per_class`` rows have ``ra_worst``,
    the accuracy on the records of D_r of the class that fares worst. ``probed`` are the methods
    whose rows, beside those of the original and the retrained model, say what can be found of the
    class, or brought back, afterwards. With ``pooled`` results are also given as means over the
    scenarios, which are then alike; ``subject`` is the family to compare with the best of others.
    """

    task: Source
    forget: Selection | None = None
    proxy: Selection | None = None
    scenarios: Mapping[str, Scenario] = {}
    search_metric: Literal["average_gap", "gap_a"] = "gap_a"
    seeds: int = Field(3, ge=1)
    rewind: int | None = None
    initial: Literal["own", "model"] = "own"
    orders: int = Field(1, ge=1, le=20)
    originals: int = Field(1, ge=1, le=20)
    balances: tuple[float, ...] = ()
    transfer: Transfer | None = None
    record: Mapping[str, Any] | None = None
    search_fraction: float = Field(0.13, gt=0, le=1)
    search_seed: int = Field(0, ge=0)
    shared_search: bool = False
    per_class: bool = False
    probed: tuple[str, ...] = ()
    pooled: bool = False
    subject: str | None = None
    models: tuple[Model, ...]
    methods: Mapping[str, Method]

    @field_validator("models")
    @classmethod
    def _spread(cls, models: tuple[Model, ...]) -> tuple[Model, ...]:
        return tuple(one for model in models for one in model.expanded())

    @field_validator("methods")
    @classmethod
    def _each_keep(cls, methods: Mapping[str, Method]) -> dict[str, Method]:
        found: dict[str, Method] = {}
        for name, method in methods.items():
            more = method.expanded(name)
            if set(more) & set(found):
                raise ValueError(f"{name!r} makes a method that is there already")
            found |= more
        return found

    @model_validator(mode="after")
    def _recordable(self) -> Size:
        if self.record is not None:
            recorder(Path("log"), self.record)
            if any(model.pruner is not None for model in self.models):
                raise ValueError("record is for dense models: what pruning does is not logged")
        elif any(model.cohort_epochs for model in self.models):
            raise ValueError("cohort_epochs need record")
        return self

    @model_validator(mode="after")
    def _named(self) -> Size:
        """Names are there once, and none speaks of what is not there."""
        names = [model.name for model in self.models]
        if not names or len(set(names)) < len(names):
            raise ValueError("models must be one or more, each with a name of its own")
        if (self.forget is None) == (not self.scenarios) or (self.scenarios and self.proxy):
            raise ValueError("say forget (and proxy), or scenarios with a forget set each")
        if "" in self.scenarios:
            raise ValueError("every scenario needs a name")
        if not all(0 < share < 1 for share in self.balances):
            raise ValueError("balances are shares of members, between 0 and 1")
        for model in self.models:
            self._known(f"model {model.name!r}", "scenario", model.scenarios, self.scenarios)
        for name, method in self.methods.items():
            if name == "original" or name.split("-")[0] == "retrain":
                raise ValueError(f"a method cannot be called {name!r}: the bench has such a row")
            said = (*method.scenarios, *method.within)
            self._known(f"method {name!r}", "scenario", said, self.scenarios)
            self._known(f"method {name!r}", "model", (*method.models, *method.on), names)
        if self.shared_search and any(model.scenarios for model in self.models):
            raise ValueError("a shared search needs models that take part in all scenarios")
        self._known("probed", "method", self.probed, self.methods)
        if self.subject is not None:
            self._known("subject", "method", [self.subject], map(self.family, self.methods))
        return self

    @staticmethod
    def _known(who: str, what: str, said: Iterable[str], known: Iterable[str]) -> None:
        strange = set(said) - set(known)
        if strange:
            raise ValueError(f"{who} speaks of a {what} {strange.pop()!r}")

    @model_validator(mode="after")
    def _searchable(self) -> Size:
        for name, one in self.cases.items():
            if one.proxy == one.forget:
                raise ValueError("the proxy must be another forget set than the one reported")
            searched = [m for m, method in self.methods.items() if method.search]
            searched = [m for m in searched if self.takes_part(m, name)]
            if self.shared_search:
                searched = [m for m in searched if not self._proxied(m)]
            if searched and one.proxy is None:
                raise ValueError(f"{', '.join(searched)} search values, but there is no proxy")
        harmful = [one for one in self.cases.values() if one.forget.harmful is not None]
        if bool(harmful) != (self.transfer is not None) or (harmful and self.scenarios):
            raise ValueError("forget.harmful and transfer belong together")
        return self

    @property
    def cases(self) -> dict[str, Scenario]:
        """Scenarios by name; a size with one forget set has one, without a name."""
        if self.forget is None:
            return dict(self.scenarios)
        return {"": Scenario(forget=self.forget, proxy=self.proxy)}

    def case(self, name: str) -> Scenario:
        """A scenario; the first one where no name is given."""
        return self.cases[name] if name else next(iter(self.cases.values()))

    def takes_part(self, method: str, scenario: str, model: str | None = None) -> bool:
        """Whether a method is measured in a scenario, on a model."""
        mine = self.methods[method]
        there = not mine.scenarios or scenario in mine.scenarios
        return there and (model is None or not mine.on or model in mine.on)

    def models_in(self, scenario: str) -> list[Model]:
        """The models that take part in a scenario."""
        return [m for m in self.models if not m.scenarios or scenario in m.scenarios]

    def family(self, method: str) -> str:
        """What a method is called without its fraction of D_r."""
        one = self.methods.get(method)
        named = None if one is None or one.fraction is None else method.rpartition("@")[0]
        return named or method

    def members(self, family: str) -> list[str]:
        """The methods of a family: one, where no fractions are asked for."""
        return [name for name in self.methods if self.family(name) == family]

    def searched_at(self, method: str, scenario: str) -> tuple[str, str]:
        """The scenario, and the member of its family, that a method's values are looked for with.

        Both are its own, unless the search is shared.
        """
        if not self.shared_search:
            return scenario, method
        family = self.members(self.family(method))
        member = min(
            family, key=lambda m: abs((self.methods[m].fraction or 1) - self.search_fraction)
        )
        return next(iter(self._proxied(member)), scenario), member

    def _proxied(self, method: str) -> list[str]:
        """The scenarios with a proxy that a method takes part in."""
        return [n for n, one in self.cases.items() if one.proxy and self.takes_part(method, n)]

    def methods_of(self, model: Model, scenario: str) -> list[str]:
        """The rows of a model in a scenario: original, retrained models, methods."""
        again = ["retrain-again"] if self.orders > 1 else []
        kinds = [f"retrain-{kind}" for kind in model.references]
        mine = [name for name in self.methods if self.takes_part(name, scenario, model.name)]
        return ["original", "retrain", *again, *kinds, *mine]

    def seeds_of(self, method: str) -> int:
        """Training seeds of a method's rows."""
        own = self.methods[method].seeds if method in self.methods else None
        return max(self.seeds, own or 0)

    def most_seeds(self) -> int:
        """Training seeds of the original models."""
        return max([self.seeds, *(self.seeds_of(m) for m in self.methods)])
