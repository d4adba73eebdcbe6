"""What the processes of a bench do: make a model, try a value of a search, measure a row.

Every job is a pure function of the bench and writes one file, whole or not at all: a bench that
was killed goes on with the files that are missing.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from efface import verbs
from efface.auditing import Subject
from efface.auditing.base import Finding
from efface.auditing.membership import HeldOutAUC, JiaSVC, Margin
from efface.auditing.utility import ForgottenClass, Utility
from efface.checkpoint import TrainedModel
from efface.datasets import triggered_test
from efface.errors import DivergedError, EffaceError
from efface.files import canonical, digest, write_atomic
from efface.journal import Journal
from efface.placement import pick_device
from efface.predict import logits
from efface.recipes.recipe import Model, Recipe, Selection, Size, parse
from efface.recipes.store import TRAINING, Store, code_digest, identity, records_digest
from efface.recipes.transfer import Downstream, downstream, kept_accuracy, probe, restricted
from efface.signals import attack_success_rate
from efface.stats import rate
from efface.task import Split, Task
from efface.unlearn import to_json

Which = Literal["forget", "proxy"]
GAPS = {"average_gap": ("ua", "mia_efficacy", "ra", "ta"), "gap_a": ("ua", "mia_auc", "ra", "ta")}


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
        """A model of the plan."""
        return next(m for m in self.plan.models if m.name == name)

    def selection(self, which: Which) -> Selection:
        """What is to be forgotten: in the rows that are reported, or in the search."""
        chosen = self.plan.forget if which == "forget" else self.plan.proxy
        assert chosen is not None
        if chosen.harmful is not None:  # before they are chosen: any
            classes = self.classes or self.plan.transfer.source[:1]  # type: ignore[union-attr]
            return Selection.model_validate({"classes": classes})
        return chosen

    def data(self, which: Which) -> tuple[Task, Split]:
        """Task and split, made once per process."""
        return _data(self.plan, self.selection(which))

    def identity(self, job: Job) -> dict[str, Any]:
        """What the model of a training seed depends on."""
        task, _ = self.data(job.which)
        return {**identity(task, self.seed + job.seed), "code": self.training}


@lru_cache(maxsize=4)
def _parsed(text: str, name: str) -> Recipe:
    return parse(text, name)


_made: dict[str, tuple[Task, Split]] = {}


def _data(plan: Size, selection: Selection) -> tuple[Task, Split]:
    held = plan.transfer and plan.transfer.source
    key = canonical([plan.task.model_dump(), selection.model_dump(), held])
    if key not in _made:
        task = plan.task.build()
        _made[key] = selection.apply(restricted(task, held) if held else task)
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
        weight: About how many images it costs.
    """

    kind: Literal["original", "reference", "trial", "row", "influence"]
    model: str
    seed: int
    which: Which = "forget"
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def label(self) -> str:
        """For progress and errors."""
        parts = [self.kind, self.model, self.method, f"seed {self.seed}"]
        return " ".join(part for part in parts if part)


def run(bench: Bench, job: Job) -> tuple[Job, list[str]]:
    """Do a job in a process of its own; returns it with what there is to say."""
    _end_with(bench.process)
    torch.set_num_threads(1)
    said: list[str] = []
    try:
        if job.kind == "original":
            original(bench, job, said.append)
        elif job.kind == "reference":
            reference(bench, job, said.append)
        elif job.kind == "influence":
            _influence(bench, job, said.append)
        else:
            _measured(bench, job, said.append)
    except Exception as error:
        raise type(error)(f"{job.label}: {error}") from error
    return job, said


# -- models -----------------------------------------------------------------------------------


def original_key(bench: Bench, job: Job) -> dict[str, Any]:
    """What the model before any request is."""
    key = {"verb": "train", "rewind": bench.plan.rewind, **bench.identity(job)}
    pruner = bench.model(job.model).pruner
    return key if pruner is None else {"verb": "prune", "pruner": dict(pruner), "of": key}


def original(bench: Bench, job: Job, say: Callable[[str], None]) -> TrainedModel:
    """The model before any request: trained, and pruned where the plan's model is."""
    task, _ = bench.data(job.which)
    model, seed = bench.model(job.model), bench.seed + job.seed
    store = Store(bench.store, say)

    def trained(journal: Journal) -> TrainedModel:
        rewind = bench.plan.rewind
        return verbs.train(task, seed=seed, rewind=rewind, device=bench.device, journal=journal)

    def pruned(journal: Journal) -> TrainedModel:
        key = original_key(bench, job)["of"]
        dense = store.get(key, task, trained)
        pruner = model.make_pruner()
        return verbs.prune(dense, pruner, seed=seed, device=bench.device, journal=journal)

    make = trained if model.pruner is None else pruned
    return store.get(original_key(bench, job), task, make)


def reference_key(bench: Bench, job: Job) -> dict[str, Any]:
    """What the retrained model is."""
    _, split = bench.data(job.which)
    like = bench.model(job.model).like
    base = bench.identity(job)
    if like != "dense":
        base = {"of": original_key(bench, job)}
    return {"verb": "retrain", "like": like, "without": records_digest(split), **base}


def reference(bench: Bench, job: Job, say: Callable[[str], None]) -> TrainedModel:
    """The model retrained on D_r, of the kind that the plan's model asks for."""
    task, split = bench.data(job.which)
    like = bench.model(job.model).like

    def make(journal: Journal) -> TrainedModel:
        model = original(bench, job, say) if like != "dense" else None
        return verbs.retrain(
            task,
            split,
            model=model,
            like=like,
            seed=bench.seed + job.seed,
            device=bench.device,
            journal=journal,
        )

    return Store(bench.store, say).get(reference_key(bench, job), task, make)


# -- rows -------------------------------------------------------------------------------------


def result_path(bench: Bench, job: Job) -> Path:
    """Where a row or a trial is kept; its name is the digest of everything that it depends on."""
    _, split = bench.data(job.which)
    if job.kind == "influence":
        key: dict[str, Any] = {"influence": job.method, "code": bench.code}
        key["of"] = original_key(bench, job)
        return bench.out / "influence" / f"{digest(key)[:24]}.json"
    key = {
        **{k: v for k, v in asdict(job).items() if k != "weight"},
        "original": original_key(bench, job),
        "reference": reference_key(bench, job) if job.kind == "trial" else None,
        "without": records_digest(split),
        "unlearner": _settings(bench, job),
        "code": bench.code,
        "selection": bench.selection(job.which).model_dump(mode="json"),
    }
    folder = "search" if job.kind == "trial" else "rows"
    return bench.out / folder / f"{digest(key)[:24]}.json"


def _method(bench: Bench, job: Job) -> Any:
    if job.method in ("original", "retrain"):
        return None
    return bench.plan.methods[job.method].made(job.model, job.options)


def kept(bench: Bench, job: Job) -> dict[str, Any] | None:
    """What a job has found, where it has been done; a file that is damaged counts as absent."""
    try:
        value = json.loads(result_path(bench, job).read_text())
    except (OSError, ValueError):
        return None
    keys = {"metrics"} if job.kind == "influence" else {"metrics", "status", "options", "seed"}
    whole = isinstance(value, dict) and keys <= value.keys() and isinstance(value["metrics"], dict)
    return value if whole else None


def _measured(bench: Bench, job: Job, say: Callable[[str], None]) -> None:
    if kept(bench, job) is not None:
        return
    row: dict[str, Any] = {"model": job.model, "method": job.method, "seed": job.seed}
    row |= {"options": dict(job.options), "status": "ok", "sentence": ""}
    try:
        model, split = _model_of(bench, job, say), bench.data(job.which)[1]
        row |= {"metrics": measure(bench, job, model, split), "settings": _settings(bench, job)}
        row |= {"sparsity": model.sparsity, "cost": _cost(model)}
    except EffaceError as error:  # one method that cannot run is no reason to stop the others
        word = "diverged" if isinstance(error, DivergedError) else "failed"
        row |= {"metrics": {}, "status": word, "sentence": str(error)}
    if job.kind == "trial" and row["metrics"]:
        theirs = measure(bench, job, reference(bench, job, say), bench.data(job.which)[1])
        row["gap"] = gap(row["metrics"], theirs, bench.plan.search_metric)
    write_atomic(result_path(bench, job), json.dumps(row, indent=1, allow_nan=False).encode())


def _model_of(bench: Bench, job: Job, say: Callable[[str], None]) -> TrainedModel:
    if job.method == "retrain":
        return reference(bench, job, say)
    before = original(bench, job, say)
    if job.method == "original":
        return before
    _, split = bench.data(job.which)
    seed = bench.seed + job.seed
    return verbs.forget(before, split, _method(bench, job), seed=seed, device=bench.device)


def _settings(bench: Bench, job: Job) -> dict[str, Any] | None:
    method = _method(bench, job)
    return None if method is None else to_json(method)


def _cost(model: TrainedModel) -> dict[str, Any]:
    cost = model.lineage[-1].cost if model.lineage else {}
    return {k: cost.get(k) for k in ("wall", "cpu", "images", "threads", "foreign_load", "machine")}


def measure(bench: Bench, job: Job, model: TrainedModel, split: Split) -> dict[str, Any]:
    """The numbers of a row, each with the interval over records that a single model allows."""
    subject = Subject(model, model, split, device=pick_device(bench.device))
    draw = np.random.default_rng(0)
    findings = [Utility(name)(subject, draw) for name in ("ua", "ra", "ta")]
    findings += [HeldOutAUC()(subject, draw), Margin()(subject, draw)]
    if job.kind == "row" or bench.plan.search_metric == "average_gap":
        findings.append(JiaSVC()(subject, draw))
    if split.label is not None:
        findings.append(ForgottenClass()(subject, draw))
    metrics = {f.name: _plain(f) for f in findings if f.status == "ok"}
    selection = bench.selection(job.which)
    if selection.poison is not None:
        metrics |= attack(bench, selection, model)
    if bench.plan.transfer is not None:
        data = _downstream(bench.text, bench.name, bench.size)
        metrics["probe"] = probe(model, data, data.report)
        metrics["kept_accuracy"] = kept_accuracy(model, bench.classes)
    return metrics


def _plain(finding: Finding) -> dict[str, Any]:
    return {k: getattr(finding, k) for k in ("value", "low", "high", "n")}


def _influence(bench: Bench, job: Job, say: Callable[[str], None]) -> None:
    """How well a probe does on the features of a model trained without a class, or with all."""
    if kept(bench, job) is not None:
        return
    if job.method:
        model = reference(replace(bench, classes=(int(job.method),)), job, say)
    else:
        model = original(bench, job, say)
    data = _downstream(bench.text, bench.name, bench.size)
    found = {"metrics": {"probe": probe(model, data, data.choose)}}
    write_atomic(result_path(bench, job), json.dumps(found, allow_nan=False).encode())


def attack(bench: Bench, selection: Selection, model: TrainedModel) -> dict[str, Any]:
    """Attack success rate: without the target's own class (``asr``), and as in the paper's code."""
    task = model.task
    records = triggered_test(task, selection.patch())
    answers = logits(model.network, task, records, device=pick_device(bench.device))
    found = {}
    for name, exclude in (("asr", True), ("asr_paper", False)):
        wins, n = attack_success_rate(
            answers, records.targets.numpy(), selection.target, exclude=exclude
        )
        found[name] = asdict(rate(wins, n))
    return found


def gap(
    metrics: Mapping[str, Any], reference: Mapping[str, Any], kind: str = "average_gap"
) -> float | None:
    """Mean absolute difference over four metrics; None where one of them is missing."""
    names = GAPS[kind]
    if not all(name in metrics and name in reference for name in names):
        return None
    apart = [abs(metrics[name]["value"] - reference[name]["value"]) for name in names]
    return float(np.mean(apart))


_watched = False


def _end_with(parent: int) -> None:
    """In a worker: end when the bench does, however that ends: nobody is left behind."""
    global _watched
    if _watched or os.getpid() == parent:
        return
    if os.getppid() != parent:  # the bench was gone before this worker's first job
        os._exit(1)
    _watched = True

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
