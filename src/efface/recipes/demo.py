"""The demo: the whole story on built-in data, from training to one report.

Two scenarios, side by side in two processes: forget one class, and forget a random tenth. Each
trains a network, prunes a copy, retrains references, forgets with every method, dense and sparse,
and audits every cell. Models are kept as they are made, so that a killed demo goes on.
"""

from __future__ import annotations

import concurrent.futures as futures
import contextlib
import datetime
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from efface import verbs
from efface.auditing import Cache
from efface.checkpoint import load
from efface.console import Run, bars
from efface.cost import Stopwatch, versions
from efface.datasets import cifar10, digits, with_wrong_labels
from efface.errors import InputError, MismatchError, OutputError, nearest
from efface.files import canonical, check_output, digest, write_atomic
from efface.fitting import Progress
from efface.journal import Journal
from efface.recipes.probe import seconds_per_image
from efface.recipes.story import story, table
from efface.report import AuditResult, story_page
from efface.sparsify import OneShot
from efface.task import Split, Task
from efface.trained import TrainedModel
from efface.unlearn import build

SCHEMA = "efface.demo/1"
METHODS = ("finetune", "l1-sparse", "gradient-ascent", "neggrad-plus", "random-label")
SPARSITY = 0.9
CLASS = 3
FRACTION = 0.1
WRONG = 0.2


@dataclass(frozen=True)
class Plan:
    """What the demo does, and to what: everything that its results depend on.

    Args:
        task: ``digits`` or ``cifar10``.
        scenario: ``class`` or ``random``.
        full: All of CIFAR-10.
        references: Retrained models per density.
        seed: Of everything.
    """

    task: str
    scenario: str
    full: bool
    references: int
    seed: int

    def build(self) -> tuple[Task, Split]:
        """The task and what is to be forgotten."""
        task = digits() if self.task == "digits" else cifar10(None if self.full else 20_000)
        if self.scenario == "class":
            return task, Split.by_class(task, CLASS)
        split = Split.random(task, FRACTION, seed=self.seed)
        if self.task != "digits":
            return task, split
        noisy = with_wrong_labels(task, split.forget, WRONG, seed=self.seed)
        return noisy, replace(split, task=noisy)

    def methods(self) -> list[str]:
        """The methods of this scenario."""
        return [*METHODS, *(["logit-off"] if self.scenario == "class" else [])]

    def stages(self) -> int:
        """How many models are made, and cells audited."""
        per_density = 1 + self.references + len(self.methods())
        return 2 * per_density + 2 * (2 + len(self.methods()))


def run_demo(run: Run, task: str, out: Path, *, full: bool = False) -> None:
    """Run the demo, print its tables, write results.json, report.html and an audit per cell.

    Raises:
        InputError: If there is no such built-in task.
        OutputError: If ``out`` holds the results of another demo, without ``--force``.
    """
    if task not in ("digits", "cifar10"):
        raise InputError(f"the demo has no task {task!r}; {nearest(task, ['digits', 'cifar10'])}")
    references = 4 if task == "digits" else 2
    plans = [Plan(task, s, full, references, run.seed) for s in ("class", "random")]
    _prepare(run, out, plans)
    watch = Stopwatch()
    if task != "digits":
        run.say(
            f"This will take {_estimate(plans[0])} on two cores; it may be stopped and run again."
        )
    sections = _both(run, plans, out)
    command = "efface " + " ".join(sys.argv[1:]) if sys.argv[1:2] == ["demo"] else "efface demo"
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "task": task,
        "command": command,
        "seed": run.seed,
        "sparsity": SPARSITY,
        "plans": [asdict(plan) for plan in plans],
        "versions": versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cost": watch.read(),
        "sections": sections,
    }
    write_atomic(out / "report.html", story_page(story(results, out)).encode())
    text = json.dumps(results, indent=1, allow_nan=False, sort_keys=True) + "\n"
    write_atomic(out / "results.json", text.encode())
    tables = [table(run, section) for section in sections]
    seconds = results["cost"]["wall"]
    run.result(results, "\n\n".join([*tables, f"{seconds:.0f} s. Report: {out / 'report.html'}"]))


def _prepare(run: Run, out: Path, plans: list[Plan]) -> None:
    """Check the output folder: new, empty, or a demo's; only what a demo wrote is ever removed."""
    check_output(out / "results.json", run.force)
    key = digest([asdict(plan) for plan in plans] + [versions()])
    name, finished = out / "demo.json", (out / "results.json").exists()
    foreign = [p for p in out.glob("*") if not p.name.startswith(".")] if out.is_dir() else []
    if foreign and not name.exists():
        raise OutputError(f"{out} holds other files than a demo's; give a new or empty folder.")
    try:
        same = json.loads(name.read_text())["key"] == key
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if same and not finished:
        run.say(f"going on where an earlier run stopped ({out}).")
        return
    if name.exists() and not finished and not run.force:
        raise OutputError(
            f"{out} holds an unfinished demo with other settings; give --force, or another folder."
        )
    for part in ("models", "audits"):
        shutil.rmtree(out / part, ignore_errors=True)
    (out / "results.json").unlink(missing_ok=True)
    write_atomic(name, canonical({"key": key}).encode())


def _both(run: Run, plans: list[Plan], out: Path) -> list[dict[str, Any]]:
    """Both scenarios side by side, with a progress bar each."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    with futures.ProcessPoolExecutor(2, context, _begin, (queue,)) as pool:
        jobs = [pool.submit(play, plan, out, run.device) for plan in plans]
        try:
            _watch(jobs, queue, plans)
            return [job.result() for job in jobs]
        except BaseException:  # Ctrl-C, or one of the two failed: the other need not go on
            for process in multiprocessing.active_children():
                process.terminate()
            raise


_queue: Any = None
"""Where a worker process tells how far it is; set when it begins."""


def _begin(queue: Any) -> None:
    """Start a worker: it ends when its parent does, however that ends."""
    global _queue
    _queue = queue
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _watch(jobs: list[futures.Future[Any]], queue: Any, plans: list[Plan]) -> None:
    with bars() if sys.stderr.isatty() else contextlib.nullcontext() as bar:
        tasks = (
            {p.scenario: bar.add_task(p.scenario, total=p.stages()) for p in plans} if bar else {}
        )
        while not all(job.done() for job in jobs):
            time.sleep(0.1)
            while not queue.empty():
                scenario, label, done = queue.get()
                if bar:
                    words = f"{scenario:6} {label:34}"
                    bar.update(tasks[scenario], description=words, completed=done)
            for job in jobs:
                if job.done() and job.exception():
                    return


class _Stages:
    """Makes models one after another, keeps each in a file, and tells how far it is."""

    def __init__(self, plan: Plan, task: Task, folder: Path, tell: Callable[..., None]) -> None:
        self.plan, self.task, self.folder, self.tell = plan, task, folder, tell
        self.done = 0

    def make(self, name: str, work: Callable[..., TrainedModel]) -> TrainedModel:
        """The model of this name: from its file, or made now, resuming where that was cut short."""
        path = self.folder / f"{name}.safetensors"
        with self.stage(name) as progress:
            if path.exists():
                with contextlib.suppress(InputError, MismatchError):
                    return load(path, self.task)
            journal = Journal(path.with_suffix(".partial"), {"name": name, **asdict(self.plan)})
            journal.start()
            model = work(progress=progress, journal=journal)
            model.save(path, force=True)
            journal.clear()
            return model

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """One step of the bar."""
        self.tell(name, self.done)
        last = time.monotonic()

        def progress(label: str, done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > 0.3:
                last = time.monotonic()
                self.tell(name, self.done + done / total)

        yield progress
        self.done += 1
        self.tell(name, self.done)


def play(plan: Plan, out: Path, device: str) -> dict[str, Any]:
    """One scenario, in a process of its own."""
    torch.set_num_threads(1)
    task, split = plan.build()
    folder = out / "models" / plan.scenario
    stages = _Stages(plan, task, folder, lambda *step: _queue.put((plan.scenario, *step)))
    common: dict[str, Any] = {"device": device}

    def trained(**more: Any) -> TrainedModel:
        return verbs.train(task, seed=plan.seed, **common, **more)

    def pruned(**more: Any) -> TrainedModel:
        return verbs.prune(dense, OneShot(sparsity=SPARSITY), seed=plan.seed, **common, **more)

    dense = stages.make("dense-original", trained)
    sparse = stages.make("sparse-original", pruned)
    rows, cells = [], []
    for density, original, like in (("dense", dense, "dense"), ("sparse", sparse, "same-mask")):
        references = []
        for i in range(plan.references):

            def fresh(i: int = i, like: Any = like, original: Any = original, **more: Any) -> Any:
                seed = plan.seed + 1 + i
                return verbs.retrain(
                    task, split, model=original, like=like, seed=seed, **common, **more
                )

            references.append(stages.make(f"{density}-retrain-{i + 1}", fresh))
        found = _cells(plan, stages, density, original, references, split, out, common)
        rows += [row for row, _ in found]
        cells += [cell for _, cell in found]
    return _section(plan, split, rows, cells)


def _cells(
    plan: Plan,
    stages: _Stages,
    density: str,
    original: TrainedModel,
    references: list[TrainedModel],
    split: Split,
    out: Path,
    common: dict[str, Any],
) -> list[tuple[dict[str, Any], str]]:
    """A row, and the path of an audit, for the original, retrain, and every method."""
    cache = Cache()
    found = []

    def audited(title: str, after: TrainedModel, others: list[TrainedModel]) -> None:
        name = f"{plan.scenario}-{density}-{title}"
        with stages.stage(f"audit {density} {title}"):
            result = verbs.audit(
                original,
                after,
                split,
                others,
                seed=plan.seed,
                cache=cache,
                note=_note(plan),
                reproduce=[f"efface demo --task {plan.task} --seed {plan.seed}"],
            )
            result.save(out / "audits" / name, force=True)
        found.append((_row(title, density, result, name), name))

    audited("original", original, references)
    audited("retrain", references[0], references[1:])
    for name in plan.methods():

        def forgotten(name: str = name, **more: Any) -> TrainedModel:
            return verbs.forget(original, split, build(name), seed=plan.seed, **common, **more)

        audited(name, stages.make(f"{density}-{name}", forgotten), references)
    return found


def _note(plan: Plan) -> str | None:
    if plan.scenario == "random" and plan.task == "digits":
        return (
            f"{WRONG:.0%} of the forgotten records carry a wrong label on purpose: this network "
            "hardly remembers single digits, and without them there would be nothing to see."
        )
    return None


def _row(title: str, density: str, result: AuditResult, name: str) -> dict[str, Any]:
    keys = ("value", "low", "high", "n", "gap", "reference", "floor", "status")
    metrics = {
        metric: {key: result[metric][key] for key in keys}
        for metric in ("ua", "ra", "ta", "mia_efficacy", "mia_auc", "margin_forget")
    }
    plain = {k: result[k]["value"] for k in ("js_forget", "rte_seconds", "rte_ratio")}
    return {
        "method": title,
        "model": density if density == "dense" else f"sparse {SPARSITY:.0%}",
        **metrics,
        **plain,
        "average_gap": result.average_gap,
        "gap_a": result.gap_a,
        "verdict": result.verdict,
        "sentence": result.subject["verdict_sentence"],
        "href": f"audits/{name}/report.html",
    }


def _section(
    plan: Plan, split: Split, rows: list[dict[str, Any]], cells: list[str]
) -> dict[str, Any]:
    n = len(split.forget)
    if plan.scenario == "class":
        heading = f"Forget one class (class {CLASS}, {n} records)"
        text = (
            "Every record of one class is to be forgotten. Switching off one output (logit-off) "
            "scores a near-zero average gap at no cost and forgets nothing: hence the MIA AUC "
            "inside the class, and gap-A, stand beside it."
        )
    else:
        heading = f"Forget a random {FRACTION:.0%} ({n} records)"
        text = "Records of all classes are to be forgotten. " + (_note(plan) or "")
    return {
        "scenario": plan.scenario,
        "heading": heading,
        "text": text,
        "split": split.sizes(),
        "rows": rows,
        "cells": [
            cell for cell in cells if cell.endswith(("dense-l1-sparse", "dense-neggrad-plus"))
        ],
    }


def _estimate(plan: Plan) -> str:
    """About how long the demo will take, from a few timed steps."""
    task, split = plan.build()
    per_image = seconds_per_image(task)
    n, epochs = len(task.records), task.fit.epochs
    full = epochs * (1.5 + 2 * plan.references) * n
    methods = 2 * len(METHODS) * n * max(1, epochs / 10) * 1.5
    evaluated = plan.stages() / 2 * (n + len(task.test_records)) * 0.4
    attacks = plan.stages() / 2 * 9.0 * (min(len(split.retain), len(task.test_records)) / 1e4) ** 2
    minutes = (per_image * (full + methods + evaluated) + attacks) / 60
    return f"about {max(1, round(minutes))} minutes"
