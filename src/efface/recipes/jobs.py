"""What the processes of a bench do: make a model, try a value of a search, measure a row.

Every job is a pure function of the bench and writes one file, whole or not at all: a bench that
was killed goes on with the files that are missing.
"""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from efface import verbs
from efface.auditing import Subject
from efface.auditing.base import Finding
from efface.auditing.membership import HeldOutAUC, JiaSVC, LowFPR, Margin
from efface.auditing.utility import ForgottenClass, Utility
from efface.datasets import triggered_test
from efface.errors import DivergedError, EffaceError
from efface.files import digest, write_atomic
from efface.placement import pick_device
from efface.predict import logits
from efface.recipes.frugality import after_forgetting, worst_class
from efface.recipes.models import Bench, Job, original, original_key, reference, reference_key
from efface.recipes.sources import Selection
from efface.recipes.stability import at_balances
from efface.recipes.store import records_digest
from efface.recipes.traces import mask_metrics, masks_beside
from efface.recipes.transfer import kept_accuracy, probe
from efface.recipes.undoing import stored, undo_metrics
from efface.signals import attack_success_rate
from efface.stats import rate
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn import to_json

GAPS = {"average_gap": ("ua", "mia_efficacy", "ra", "ta"), "gap_a": ("ua", "mia_auc", "ra", "ta")}


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


# -- rows -------------------------------------------------------------------------------------


def result_path(bench: Bench, job: Job) -> Path:
    """Where a row or a trial is kept; its name is the digest of everything that it depends on."""
    _, split = bench.data_of(job)
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
        "selection": bench.selection(job.which, job.scenario, job.seed).model_dump(mode="json"),
        "beside": [reference_key(bench, other) for other in masks_beside(bench, job)],
    }
    folder = "search" if job.kind == "trial" else "rows"
    return bench.out / folder / f"{digest(key)[:24]}.json"


def _method(bench: Bench, job: Job) -> Any:
    if job.method not in bench.plan.methods:  # original, retrain, retrain-…
        return None
    return bench.plan.methods[job.method].made(job.model, job.options, job.scenario)


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
    row |= {"scenario": job.scenario}
    try:
        model, split = _model_of(bench, job, say), bench.data_of(job)[1]
        metrics = measure(bench, job, model, split) | mask_metrics(bench, job, model, say)
        metrics |= _undone(bench, job, model, split, say)
        row |= {"metrics": metrics, "settings": _settings(bench, job)}
        row |= {"sparsity": model.sparsity, "cost": _cost(job, model)}
        if bench.plan.balances and job.kind == "row":
            row["balances"] = at_balances(bench, model, split)
        if _shows_storage(bench, job) and model.log is not None:
            row["storage"] = stored(model.log)
    except EffaceError as error:  # one method that cannot run is no reason to stop the others
        word = "diverged" if isinstance(error, DivergedError) else "failed"
        row |= {"metrics": {}, "status": word, "sentence": str(error)}
    if job.kind == "trial" and row["metrics"]:
        theirs = measure(bench, job, reference(bench, job, say), bench.data_of(job)[1])
        row["gap"] = gap(row["metrics"], theirs, bench.plan.search_metric)
    write_atomic(result_path(bench, job), json.dumps(row, indent=1, allow_nan=False).encode())


def _model_of(bench: Bench, job: Job, say: Callable[[str], None]) -> TrainedModel:
    method = _method(bench, job)
    if method is None:
        make = original if job.method == "original" else reference
        return make(bench, job, say)
    _, split = bench.data_of(job)
    seed, before = bench.seed + job.seed, original(bench, job, say)
    with warnings.catch_warnings():
        if bench.plan.record is not None:  # it is the recipe's point to take too many steps back
            warnings.simplefilter("ignore", UserWarning)
        return verbs.forget(before, split, method, seed=seed, device=bench.device)


def _shows_storage(bench: Bench, job: Job) -> bool:
    """Whether a row says what the log takes: originals of the first scenario do."""
    asked = (job.kind, job.method, job.scenario)
    return asked == ("row", "original", next(iter(bench.plan.cases)))


def _undone(
    bench: Bench, job: Job, model: TrainedModel, split: Split, say: Callable[[str], None]
) -> dict[str, Any]:
    """What a row of a recorded model says of undoing; nothing for others."""
    if bench.plan.record is None or job.kind != "row":
        return {}
    subject = Subject(model, model, split, device=pick_device(bench.device))
    known = bench.model(job.model).references
    plain = replace(job, kind="reference", method="", options={}, like="", order=0)
    is_one = job.method.removeprefix("retrain-") in ("retrain", "again", *known)
    goal = None if is_one else reference(bench, plain, say)
    chosen = bench.selection(job.which, job.scenario, job.seed)
    return undo_metrics(chosen, subject, model, original(bench, job, say), goal)


def _settings(bench: Bench, job: Job) -> dict[str, Any] | None:
    method = _method(bench, job)
    return None if method is None else to_json(method)


def _cost(job: Job, model: TrainedModel) -> dict[str, Any]:
    """What the last step has cost; of a retrained model all of its steps, pruning included."""
    if not model.lineage:
        return dict.fromkeys(("wall", "cpu", "images", "threads", "foreign_load", "machine"))
    last = model.lineage[-1].cost
    cost = {k: last.get(k) for k in ("wall", "cpu", "images", "threads", "foreign_load", "machine")}
    if job.method.startswith("retrain"):
        for key in ("wall", "cpu", "images"):
            cost[key] = sum(step.cost.get(key, 0) for step in model.lineage)
    return cost


def measure(bench: Bench, job: Job, model: TrainedModel, split: Split) -> dict[str, Any]:
    """The numbers of a row, each with the interval over records that a single model allows."""
    subject = Subject(model, model, split, device=pick_device(bench.device))
    draw = np.random.default_rng(0)
    findings = [Utility(name)(subject, draw) for name in ("ua", "ra", "ta")]
    findings += [HeldOutAUC()(subject, draw), Margin()(subject, draw)]
    wanted = job.kind == "row" and not bench.plan.pooled  # it takes as long as all the others
    if wanted or bench.plan.search_metric == "average_gap":
        findings.append(JiaSVC()(subject, draw))
    if bench.plan.balances:
        findings.append(LowFPR()(subject, draw))
    if split.label is not None:
        findings.append(ForgottenClass()(subject, draw))
    metrics = {f.name: _plain(f) for f in findings if f.status == "ok"}
    if bench.plan.per_class:
        metrics["ra_worst"] = worst_class(subject)
    if job.kind == "row":
        metrics |= after_forgetting(bench.plan, job.method, subject)
    selection = bench.selection(job.which, job.scenario, job.seed)
    if selection.poison is not None:
        metrics |= attack(bench, selection, model)
    if bench.plan.transfer is not None:
        data = bench.downstream()
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
    data = bench.downstream()
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
