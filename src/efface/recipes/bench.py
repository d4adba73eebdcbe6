"""``efface bench``: run a recipe over training seeds, resume after a kill, write what was found."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from efface.console import Run
from efface.cost import versions
from efface.errors import EffaceError, InputError, OutputError, nearest
from efface.files import canonical, check_output, digest, write_atomic
from efface.placement import pick_device
from efface.recipes import recipe as recipes
from efface.recipes.jobs import Bench, Job, Which, kept, original_key, reference_key, run
from efface.recipes.probe import Spent, seconds_per_image
from efface.recipes.recipe import Size
from efface.recipes.summary import curves, judge, spread, summarise
from efface.recipes.tables import tables
from efface.recipes.transfer import least_useful
from efface.report import bench_page

SCHEMA = "efface.bench/1"
MOST = 1000
"""Training seeds, at most."""


def run_bench(
    console: Run,
    name: str,
    out: Path,
    *,
    size: str | None = None,
    seeds: int | None = None,
    store: Path | None = None,
    jobs: int = 0,
) -> None:
    """Run a recipe, print its tables, write ``results.json`` and ``report.html``.

    Args:
        console: Options, messages and progress.
        name: A recipe that comes along, or a TOML file.
        out: The output folder; run again with the same recipe, what is done is not done again.
        size: Which size of the recipe; the first by default.
        seeds: Training seeds instead of the recipe's.
        store: Where models are kept; ``out/models`` by default. Share it between recipes to train
            the originals once.
        jobs: Processes; 0 takes one per core, two at most without a larger machine.

    Raises:
        InputError: If the recipe or the size is unknown, or a key of it is wrong.
        OutputError: If ``out`` holds something else, or finished results without ``--force``.
    """
    text, recipe = recipes.source(name)
    size = size or next(iter(recipe.size))
    if size not in recipe.size:
        raise InputError(f"recipe {recipe.name} has no size {size!r}; {nearest(size, recipe.size)}")
    if seeds is not None and not 1 <= seeds <= MOST:
        raise InputError(f"--seeds must be 1 to {MOST}, not {seeds}.")
    workers = _workers(jobs, console.device)
    bench = Bench(
        text, recipe.name, size, out, store or out / "models", console.device, console.seed
    )
    plan = with_seeds(bench.plan, seeds)
    check_plan(bench, plan)
    _prepare(console, bench, seeds)
    spent = Spent(out / "seconds.json")
    stages = Stages(console, bench, plan, workers, spent)
    with console.progress() as progress:
        rows, search = stages.all(progress)
    document = _document(bench, plan, stages, rows, search)
    document |= {
        "command": _command(name, size, seeds, console.seed),
        "environment": environment(workers),
        "cost": spent.read(),
    }
    write_atomic(out / "report.html", bench_page(document).encode())
    whole = json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomic(out / "results.json", whole.encode())
    seconds = document["cost"]["wall"]
    console.result(
        document, f"{tables(console, document)}\n{seconds:.0f} s. Report: {out / 'report.html'}"
    )


def _document(
    bench: Bench, plan: Size, stages: Stages, rows: list[dict[str, Any]], search: list[Any]
) -> dict[str, Any]:
    """What was run and what was found, as ``results.json`` holds it."""
    recipe = bench.recipe
    return {
        "schema": SCHEMA,
        "recipe": recipe.name,
        "size": bench.size,
        "title": recipe.title,
        "source": recipe.source,
        "about": recipe.about,
        "seed": bench.seed,
        "seeds": plan.seeds,
        "code": bench.code,
        "plan": plan.model_dump(mode="json", by_alias=True),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "search": search,
        "influence": stages.influence,
        "rows": rows,
        "summary": summarise(recipe, rows),
        "claims": judge(recipe.claims, rows),
        "curves": curves(recipe, rows),
    }


def with_seeds(plan: Size, seeds: int | None) -> Size:
    """The plan with another number of training seeds, for every method."""
    if seeds is None:
        return plan
    methods = {n: m.model_copy(update={"seeds": None}) for n, m in plan.methods.items()}
    return plan.model_copy(update={"seeds": seeds, "methods": methods})


def at_edge(grid: Mapping[str, Sequence[Any]], chosen: Mapping[str, Any]) -> list[str]:
    """Searched options whose chosen value is the least or the greatest: a wider grid may do better.

    >>> at_edge({"lr": [0.1, 0.2, 0.3], "epochs": [1, 2]}, {"lr": 0.3, "epochs": 1})
    ['lr']
    """
    ends = {name: (min(v), max(v)) for name, v in grid.items() if len(v) > 2}
    return [name for name, both in ends.items() if chosen[name] in both]


def environment(workers: int) -> dict[str, Any]:
    """Versions, processes and threads."""
    return {**versions(), "processes": workers, "threads": 1, "cores": os.cpu_count()}


def _workers(jobs: int, device: str) -> int:
    if jobs < 0:
        raise InputError(f"--jobs must be 0 or more, not {jobs}.")
    on_gpu = pick_device(device).type != "cpu"
    return jobs or (1 if on_gpu else min(2, os.cpu_count() or 1))


def _command(name: str, size: str, seeds: int | None, seed: int) -> str:
    """The command that does this again; without the paths of the machine where it was run."""
    words = [f"efface bench {Path(name).name} --size {size}"]
    words += [f"--seeds {seeds}"] if seeds is not None else []
    words += [f"--seed {seed}"] if seed else []
    return " ".join([*words, f"--out {Path(name).stem}-{size}"])


def check_plan(bench: Bench, plan: Size) -> None:
    """Check what can be known before anything is trained: data, rewinding, proxy, cache.

    Raises:
        InputError: Naming what does not fit together.
    """
    task, split = bench.data("forget")
    if plan.rewind is not None and not 0 < plan.rewind <= task.fit.epochs:
        raise InputError(f"rewind = {plan.rewind} is none of the {task.fit.epochs} epochs.")
    for model in plan.models:
        needs = model.make_pruner().requires if model.pruner is not None else ()
        if plan.rewind is None and "rewind" in needs:
            raise InputError(f"model {model.name!r} rewinds; say rewind = EPOCH for this size.")
    if plan.proxy is not None:
        _, proxy = bench.data("proxy")
        if proxy.forget.equal(split.forget):
            raise InputError("the proxy is the forget set that is reported; choose another.")
    check_output(bench.store / "model", force=True)


def _prepare(console: Run, bench: Bench, seeds: int | None) -> None:
    """Check the output folder: new, empty, or of the same recipe and size."""
    out, mark = bench.out, bench.out / "bench.json"
    check_output(out / "results.json", console.force)
    foreign = [p for p in out.glob("*") if not p.name.startswith(".")] if out.is_dir() else []
    if foreign and not mark.exists():
        raise OutputError(f"{out} holds other files than a bench's; give a new or empty folder.")
    mine = {"recipe": bench.name, "size": bench.size}
    if mark.exists():
        try:
            theirs = json.loads(mark.read_text())
        except ValueError:
            theirs = None
        if not isinstance(theirs, dict):
            raise OutputError(f"{mark} is damaged; delete it to go on, or give another folder.")
        if {k: theirs.get(k) for k in mine} != mine:
            raise OutputError(
                f"{out} holds a bench of {theirs.get('recipe')}, size {theirs.get('size')}; give "
                "another folder."
            )
        console.say(f"going on where an earlier run stopped ({out}).")
    write_atomic(mark, canonical({**mine, "seeds": seeds}).encode())


class Stages:
    """The jobs of a bench in the order of what they need.

    Args:
        console: For messages.
        bench: What is run.
        plan: The size, with the seeds that are asked for.
        workers: Processes.
        spent: Read after every job, which writes down what has been spent.
    """

    def __init__(self, console: Run, bench: Bench, plan: Size, workers: int, spent: Spent) -> None:
        self.console, self.bench, self.plan = console, bench, plan
        self.workers, self.spent = workers, spent
        self.task, _ = bench.data("forget")
        self.records = len(self.task.records)
        self.training = float(self.task.fit.epochs * self.records)
        self.influence: dict[str, Any] | None = None

    def all(self, progress: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Run everything that is missing; returns the rows, and what the search has found."""
        models = self.models()
        trials = list(self.trials())
        rows = len(list(self.rows({})))
        weights = sum(job.weight for stage in models for job in stage)
        total = weights + sum(t.weight for t in trials) + rows * self.weight()
        if self.plan.transfer:
            total += sum(job.weight for job in self.influences())
        self._estimate(total)
        done = 0.0

        def finish(stage: Iterable[Job]) -> None:
            nonlocal done
            for job in self._run(list(stage)):
                done += job.weight
                progress(f"bench {self.bench.name}", int(done), int(total))

        for stage in models[:1] if self.plan.transfer else models:
            finish(stage)
        if self.plan.transfer:
            finish(self.influences())
            self._choose_classes()
            for stage in self.models()[1:]:
                finish(stage)
        finish(trials)
        chosen, search = self.chosen(trials)
        found = list(self.rows(chosen))
        finish(found)
        return [self._value(job) for job in found], search

    def _value(self, job: Job) -> dict[str, Any]:
        value = kept(self.bench, job)
        if value is None:
            raise EffaceError(f"{job.label} left no result in {self.bench.out}; run bench again.")
        return value

    def _estimate(self, images: float) -> None:
        seconds = images * seconds_per_image(self.task, self.bench.device) / self.workers
        if seconds > 60:
            self.console.say(
                f"this will take about {seconds / 60:.0f} minutes on {self.workers} processes, "
                "less what is there already; it may be stopped and run again."
            )

    def weight(self) -> float:
        """About what measuring a method costs, in images of a training step."""
        return 2.0 * self.records

    def models(self) -> list[list[Job]]:
        """Originals and references, without those that two forget sets share."""
        plan, weight = self.plan, self.training
        both: list[Which] = ["forget", "proxy"] if self._searches() else ["forget"]
        stages: list[list[Job]] = [[], [], []]
        seen: set[str] = set()
        for which in both:
            for model in plan.models:
                sparse = model.pruner is not None
                last = 1 if which == "proxy" else plan.most_seeds()
                for seed in range(last):
                    job = Job("original", model.name, seed, which, weight=weight)
                    kinds = [(job, int(sparse), original_key(self.bench, job))]
                    if seed < (1 if which == "proxy" else plan.seeds):
                        job = replace(job, kind="reference")
                        after = 2 if model.like != "dense" else 1
                        kinds.append((job, after, reference_key(self.bench, job)))
                    for job, place, key in kinds:
                        name = digest(key)
                        if name not in seen:
                            seen.add(name)
                            stages[place].append(job)
        for seed in range(plan.most_seeds()):  # what is pruned is trained first
            job = Job("original", self._dense().name, seed, "forget", weight=weight)
            if digest(original_key(self.bench, job)) not in seen:
                stages[0].append(job)
        return stages

    def influences(self) -> list[Job]:
        """A probe for every source class left out, and for none, over a few seeds."""
        transfer = self.plan.transfer
        assert transfer is not None
        left_out = ["", *map(str, transfer.source)]
        name, weight = self._dense().name, self.training
        seeds = range(min(transfer.influence_seeds, self.plan.most_seeds()))
        return [
            Job("influence", name, s, "forget", c, weight=weight if c else self.weight())
            for s in seeds
            for c in left_out
        ]

    def _choose_classes(self) -> None:
        """The source classes to forget: those whose removal helps the probe most."""
        found: dict[str, list[float]] = {}
        for job in self.influences():
            found.setdefault(job.method, []).append(self._value(job)["metrics"]["probe"]["value"])
        whole = found.pop("")
        without = {int(c): values for c, values in found.items()}
        remove = self.plan.forget.harmful or 1
        classes, influence = least_useful(whole, without, remove)
        self.bench = replace(self.bench, classes=classes)
        self.influence = {
            "chosen": list(classes),
            "whole": spread(whole),
            "classes": {str(c): spread(values) for c, values in influence.items()},
        }

    def _dense(self) -> Any:
        dense = [m for m in self.plan.models if m.pruner is None]
        return dense[0] if dense else self.plan.models[0]

    def _searches(self) -> bool:
        return any(method.search for method in self.plan.methods.values())

    def trials(self) -> Iterator[Job]:
        """A job for every value of every search, on the proxy forget set."""
        for model in self.plan.models:
            for name, method in self.plan.methods.items():
                for options in method.grid() if method.search else ():
                    yield Job("trial", model.name, 0, "proxy", name, options, self.weight())

    def chosen(self, trials: list[Job]) -> tuple[dict[tuple[str, str], Any], list[dict[str, Any]]]:
        """For each model and method the values with the smallest gap on the proxy forget set."""
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for job in trials:
            trial = self._value(job)
            entry = {"options": trial["options"], "gap": trial.get("gap")}
            entry["metrics"] = {k: m["value"] for k, m in trial["metrics"].items()}
            found.setdefault((job.model, job.method), []).append(entry)
        chosen, search = {}, []
        for (model, method), tried in found.items():
            best = min(tried, key=lambda t: float("inf") if t["gap"] is None else t["gap"])
            chosen[model, method] = best["options"]
            search.append(
                {
                    "model": model,
                    "method": method,
                    "metric": self.plan.search_metric,
                    "chosen": best["options"],
                    "edge": at_edge(self.plan.methods[method].search, best["options"]),
                    "tried": tried,
                }
            )
        return chosen, search

    def rows(self, chosen: dict[tuple[str, str], Any]) -> Iterator[Job]:
        """A job for every row that is reported."""
        for model in self.plan.models:
            for name in ("original", "retrain", *self.plan.methods):
                options = chosen.get((model.name, name), {})
                for seed in range(self.plan.seeds_of(name)):
                    yield Job("row", model.name, seed, "forget", name, options, self.weight())

    def _run(self, stage: list[Job]) -> Iterator[Job]:
        """Jobs side by side, the longest first; what has been done is not done again."""
        waiting = []
        for job in stage:
            if job.kind in ("trial", "row", "influence") and kept(self.bench, job) is not None:
                yield job
            else:
                waiting.append(job)
        if not waiting:
            return
        from joblib import Parallel, delayed

        waiting.sort(key=lambda job: -job.weight)
        pool = Parallel(self.workers, backend="loky", return_as="generator_unordered")
        for job, said in pool(delayed(run)(self.bench, job) for job in waiting):
            self.spent.read()
            for sentence in said:
                self.console.say(sentence)
            yield job
