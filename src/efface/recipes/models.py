"""What a bench is, what its jobs are, and the models that they are about.

A model is kept under the digest of what it depends on: scenarios and recipes share those that are
the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from efface import verbs
from efface.files import canonical
from efface.journal import Journal
from efface.recipes.plan import Kind, Model, Size, recorder
from efface.recipes.recipe import Recipe, parse
from efface.recipes.sources import Selection, Source
from efface.recipes.store import RECORDING, TRAINING, Store, code_digest, identity, records_digest
from efface.recipes.transfer import Downstream, downstream, restricted
from efface.task import Split, Task
from efface.trained import TrainedModel

Which = Literal["forget", "proxy"]
BASE = Model(name="")
"""What pruned models are pruned from, where the plan has no dense model."""
APART = 1000
"""Between the seeds of references that differ in their batch order."""


@dataclass(frozen=True)
class Bench:
    """A recipe at one size: what every job is given.

    Args:
        text: The recipe's TOML.
        name: Its name.
        size: Which of its sizes.
        out: The output folder; rows and search trials are kept in it.
        store: Where models are kept.
        device: Where to compute.
        seed: Added to every training seed.
        training: Digest of the code that decides how a model is trained.
        code: Digest of all of efface's code.
        classes: The source classes to forget, once they have been chosen (transfer).
        seeds: Training seeds that were asked for, where it is not the recipe's number.
        process: The process that runs the bench.
    """

    text: str
    name: str
    size: str
    out: Path
    store: Path
    device: str = "auto"
    seed: int = 0
    training: str = field(default_factory=lambda: code_digest(TRAINING))
    code: str = field(default_factory=lambda: code_digest(()))
    classes: tuple[int, ...] = ()
    seeds: int | None = None
    process: int = field(default_factory=os.getpid)

    @property
    def recipe(self) -> Recipe:
        """The recipe, parsed."""
        return _parsed(self.text, self.name)

    @property
    def plan(self) -> Size:
        """The size that is run."""
        return self.recipe.size[self.size]

    def model(self, name: str) -> Model:
        """A model of the plan; without a name, what pruned models are pruned from."""
        return next(m for m in (BASE, *self.plan.models) if m.name == name)

    def dense(self, name: str) -> str:
        """The model that a model was pruned from; itself, if it was not."""
        return name if self.model(name).pruner is None else BASE.name

    def selection(self, which: Which = "forget", scenario: str = "", seed: int = 0) -> Selection:
        """What is to be forgotten: in the rows that are reported, or in the search."""
        case = self.plan.case(scenario)
        chosen = case.forget if which == "forget" else case.proxy
        assert chosen is not None
        if chosen.harmful is not None:  # before they are chosen: any
            classes = self.classes or self.plan.transfer.source[:1]  # type: ignore[union-attr]
            return Selection.model_validate({"classes": classes})
        return chosen.at(seed)

    def data(
        self, which: Which = "forget", scenario: str = "", model: str = "", seed: int = 0
    ) -> tuple[Task, Split]:
        """Task and split of a model and a training seed, made once per process."""
        mine = self.model(model)
        source = self.plan.task.changed(mine.fit, mine.network_options)
        return _data(self.plan, source, self.selection(which, scenario, seed))

    def data_of(self, job: Job) -> tuple[Task, Split]:
        """Task and split of a job."""
        return self.data(job.which, job.scenario, job.model, job.seed)

    def identity(self, job: Job) -> dict[str, Any]:
        """What the model of a training seed depends on."""
        task, _ = self.data_of(job)
        return {**identity(task, self.seed + job.seed), "code": self.training}

    def downstream(self) -> Downstream:
        """The downstream task (transfer)."""
        return _downstream(self.text, self.name, self.size)


@lru_cache(maxsize=4)
def _parsed(text: str, name: str) -> Recipe:
    return parse(text, name)


_made: dict[str, tuple[Task, Split]] = {}
_tasks: dict[str, Task] = {}


def _data(plan: Size, source: Source, selection: Selection) -> tuple[Task, Split]:
    held = plan.transfer and plan.transfer.source
    about = canonical([source.model_dump(), held])
    if about not in _tasks:
        task = source.build()
        _tasks[about] = restricted(task, held) if held else task
    key = canonical([about, selection.model_dump()])
    if key not in _made:
        _made[key] = selection.apply(_tasks[about])
    return _made[key]


@lru_cache(maxsize=1)
def _downstream(text: str, name: str, size: str) -> Downstream:
    plan = _parsed(text, name).size[size]
    assert plan.transfer is not None
    return downstream(plan.task.build(), plan.transfer.downstream, plan.transfer.per_class)


@dataclass(frozen=True)
class Job:
    """A unit of work.

    Args:
        kind: ``original``, ``reference``, ``trial``, ``row``, or ``influence`` (of a class).
        model: A model of the plan.
        seed: Training seed, from 0.
        which: The forget set that is reported, or the proxy.
        method: For trials and rows; for influence the class that is left out, or nothing.
        options: Values that the search tries, or has chosen.
        scenario: A scenario of the plan.
        like: Of a reference: its kind, where it is not the model's own.
        order: Of an original or a reference: which of several that differ in their batch order
            alone, from 0.
        weight: About how many images it costs.
    """

    kind: Literal["original", "reference", "trial", "row", "influence"]
    model: str
    seed: int
    which: Which = "forget"
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    scenario: str = ""
    like: Kind | Literal[""] = ""
    order: int = 0
    weight: float = 1.0

    @property
    def label(self) -> str:
        """For progress and errors."""
        order = f"order {self.order}" if self.order else ""
        parts = [self.kind, self.model, self.method or self.like, self.scenario]
        parts += [f"seed {self.seed}", order]
        return " ".join(part for part in parts if part)


# -- models -----------------------------------------------------------------------------------


def original_key(bench: Bench, job: Job) -> dict[str, Any]:
    """What the model before any request is."""
    key = {"verb": "train", "rewind": bench.plan.rewind, **bench.identity(job)}
    key |= {"order": job.order} if job.order else {}
    model = bench.model(job.model)
    if bench.plan.record is not None:
        key["record"] = {**bench.plan.record, "code": code_digest(RECORDING)}
    if model.cohort_epochs is not None:
        key["cohort"] = [records_digest(bench.data_of(job)[1]), model.cohort_epochs]
    if model.pruner is None:
        return key
    more = {"keep_dense": True} if model.keep_dense else {}
    return {"verb": "prune", "pruner": dict(model.pruner), "of": key, **more}


def original(bench: Bench, job: Job, say: Callable[[str], None]) -> TrainedModel:
    """The model before any request: trained, and pruned where the plan's model is.

    One of another order begins with the same initial weights. Where the plan records, it knows its
    log; the job that makes it reads the whole log once more.
    """
    task, split = bench.data_of(job)
    model, seed = bench.model(job.model), bench.seed + job.seed + APART * job.order
    store, key = Store(bench.store, say), original_key(bench, job)
    cohort = [task.ids_[i] for i in split.forget.tolist()]

    def trained(journal: Journal | None) -> TrainedModel:
        first = original(bench, replace(job, order=0), say) if job.order else None
        keep = bench.plan.record
        return verbs.train(
            task,
            seed=seed,
            rewind=bench.plan.rewind,
            initial=first,
            device=bench.device,
            journal=journal,
            recorder=None if keep is None else recorder(store.log_path(key), keep),
            cohorts=cohort if model.cohort_epochs else None,
            cohort_epochs=model.cohort_epochs,
        )

    def pruned(journal: Journal | None) -> TrainedModel:
        dense = original(bench, replace(job, model=BASE.name), say)
        return verbs.prune(
            dense,
            model.make_pruner(),
            keep_dense=model.keep_dense,
            seed=seed,
            device=bench.device,
            journal=journal,
        )

    make = trained if model.pruner is None else pruned
    logged = bench.plan.record is not None
    return store.get(key, task, make, logged=logged, thorough=job.kind == "original")


def reference_key(bench: Bench, job: Job) -> dict[str, Any]:
    """What the retrained model is."""
    _, split = bench.data_of(job)
    like = job.like or bench.model(job.model).like
    base = bench.identity(job)
    if like != "dense":
        base = {"of": original_key(bench, replace(job, order=0))}
    more: dict[str, Any] = {"order": job.order} if job.order else {}
    if _begins_alike(bench, like):
        more["initial"] = "model"
    return {"verb": "retrain", "like": like, "without": records_digest(split), **base, **more}


def _begins_alike(bench: Bench, like: str) -> bool:
    """Whether a reference begins with the original's initial weights (rewound: with later ones)."""
    return bench.plan.initial == "model" and like != "rewound"


def reference(bench: Bench, job: Job, say: Callable[[str], None]) -> TrainedModel:
    """The model retrained on D_r, of the kind that the job or the plan's model asks for."""
    task, split = bench.data_of(job)
    like = job.like or bench.model(job.model).like
    alike = _begins_alike(bench, like)

    def make(journal: Journal | None) -> TrainedModel:
        model, first = None, replace(job, order=0)
        if like != "dense":
            model = original(bench, first, say)
        elif alike:  # it lends its initial weights, which any model of the seed has
            model = original(bench, replace(first, model=bench.dense(job.model)), say)
        return verbs.retrain(
            task,
            split,
            model=model,
            like=like,
            seed=bench.seed + job.seed + APART * job.order,
            device=bench.device,
            journal=journal,
            initial="model" if alike else "own",
        )

    return Store(bench.store, say).get(reference_key(bench, job), task, make)
