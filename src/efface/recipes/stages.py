"""The jobs of a bench in the order of what they need, side by side in processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from efface.console import Run
from efface.errors import EffaceError
from efface.files import digest
from efface.recipes.jobs import kept, run
from efface.recipes.models import BASE, Bench, Job, Which, original_key, reference_key
from efface.recipes.plan import Model, Size
from efface.recipes.probe import Spent, seconds_per_image
from efface.recipes.spread import spread
from efface.recipes.transfer import least_useful
from efface.sparsify import IMP

Chosen = Mapping[tuple[str, str, str], Any]


def at_edge(grid: Mapping[str, Sequence[Any]], chosen: Mapping[str, Any]) -> list[str]:
    """Searched options whose chosen value is the least or the greatest: a wider grid may do better.

    >>> at_edge({"lr": [0.1, 0.2, 0.3], "epochs": [1, 2]}, {"lr": 0.3, "epochs": 1})
    ['lr']
    """
    ends = {name: (min(v), max(v)) for name, v in grid.items() if len(v) > 2}
    return [name for name, both in ends.items() if chosen[name] in both]


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
        self.task, _ = bench.data()
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
        """Originals and references, without those that two forget sets or models share."""
        stages: list[list[Job]] = [[], [], []]
        seen: set[str] = set()
        for place, job in self._all_models():
            make = original_key if job.kind == "original" else reference_key
            name = f"{job.kind} {digest(make(self.bench, job))}"
            if name not in seen:
                seen.add(name)
                stages[place].append(job)
        return stages

    def _all_models(self) -> Iterator[tuple[int, Job]]:
        """Every model that some row or trial needs, with the stage that it can be made in."""
        plan = self.plan
        for which, scenario, model in self._asked():
            proxy = which == "proxy"
            names = plan.methods_of(model, scenario)
            last = max(plan.seeds_of(name) for name in names)
            base = Job("original", model.name, 0, which, scenario=scenario)
            for seed in [plan.search_seed] if proxy else range(last):
                job = replace(base, seed=seed, weight=self._training_of(model))
                if model.pruner is not None:  # what is pruned is trained first
                    yield 0, replace(job, model=BASE.name, weight=self.training)
                yield int(model.pruner is not None), job
                if model.like == "repruned" and not proxy and seed < plan.seeds:
                    for order in range(1, plan.originals):  # after the first: its initial weights
                        yield 1, replace(job, model=BASE.name, order=order, weight=self.training)
                        yield 2, replace(job, order=order)
                if proxy or seed < plan.seeds:
                    for again in self._references(job, model, 1 if proxy else plan.orders):
                        yield 1 if (again.like or model.like) == "dense" else 2, again

    def _asked(self) -> Iterator[tuple[Which, str, Model]]:
        """Forget sets, scenarios and models, those of the rows first."""
        sets: list[Which] = ["forget", "proxy"]
        for which in sets:
            for scenario in self.plan.cases:
                for model in self.plan.models_in(scenario):
                    if which == "forget" or self._searched(scenario, model):
                        yield which, scenario, model

    def _references(self, job: Job, model: Model, orders: int) -> Iterator[Job]:
        """The retrained models of a model: its first kind in several orders, then other kinds."""
        whole = self._training_of(model) + (self.training if model.pruner is not None else 0)
        job = replace(job, kind="reference")
        for order in range(orders):
            weight = whole if model.like == "repruned" else self.training
            yield replace(job, order=order, weight=weight)
        for kind in model.references if job.which == "forget" else ():
            weight = whole if kind == "repruned" else self.training
            yield replace(job, like=kind, weight=weight)

    def _training_of(self, model: Model) -> float:
        """About what making an original costs, in images: iterative pruning trains many times."""
        pruner = model.make_pruner() if model.pruner is not None else None
        return self.training * (len(pruner.rounds()) if isinstance(pruner, IMP) else 1)

    def influences(self) -> list[Job]:
        """A probe for every source class left out, and for none, over a few seeds."""
        transfer = self.plan.transfer
        assert transfer is not None
        left_out = ["", *map(str, transfer.source)]
        weight = self.training
        seeds = range(min(transfer.influence_seeds, self.plan.most_seeds()))
        return [
            Job("influence", BASE.name, s, "forget", c, weight=weight if c else self.weight())
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
        remove = self.plan.case("").forget.harmful or 1
        classes, influence = least_useful(whole, without, remove)
        self.bench = replace(self.bench, classes=classes)
        self.influence = {
            "chosen": list(classes),
            "whole": spread(whole),
            "classes": {str(c): spread(values) for c, values in influence.items()},
        }

    def _searched(self, scenario: str, model: Model) -> list[str]:
        """The methods that search values on a model in a scenario."""
        plan = self.plan
        here = [n for n in plan.methods if plan.takes_part(n, scenario, model.name)]
        here = [n for n in here if plan.searched_at(n, scenario) == (scenario, n)]
        return [name for name in here if plan.methods[name].search]

    def _search_of(self, scenario: str, model: Model, method: str) -> tuple[str, str, str]:
        """The search whose values a row takes."""
        if method not in self.plan.methods:
            return scenario, model.name, method
        at, member = self.plan.searched_at(method, scenario)
        return at, model.name, member

    def trials(self) -> Iterator[Job]:
        """A job for every value of every search, on the proxy forget set."""
        for which, scenario, model in self._asked():
            for name in self._searched(scenario, model) if which == "proxy" else ():
                seed = self.plan.search_seed
                for options in self.plan.methods[name].grid():
                    yield Job(
                        *("trial", model.name, seed, which, name, options, scenario),
                        weight=self.weight(),
                    )

    def chosen(self, trials: list[Job]) -> tuple[Chosen, list[dict[str, Any]]]:
        """For each method the values with the smallest gap on the proxy forget set."""
        found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for job in trials:
            trial = self._value(job)
            entry = {"options": trial["options"], "gap": trial.get("gap")}
            entry["metrics"] = {k: m["value"] for k, m in trial["metrics"].items()}
            found.setdefault((job.scenario, job.model, job.method), []).append(entry)
        chosen, search = {}, []
        for (scenario, model, method), tried in found.items():
            best = min(tried, key=lambda t: float("inf") if t["gap"] is None else t["gap"])
            chosen[scenario, model, method] = best["options"]
            search.append(
                {
                    "scenario": scenario,
                    "model": model,
                    "method": method,
                    "metric": self.plan.search_metric,
                    "chosen": best["options"],
                    "edge": at_edge(self.plan.methods[method].search, best["options"]),
                    "tried": tried,
                }
            )
        return chosen, search

    def rows(self, chosen: Chosen) -> Iterator[Job]:
        """A job for every row that is reported."""
        for which, scenario, model in self._asked():
            for name in self.plan.methods_of(model, scenario) if which == "forget" else ():
                options = chosen.get(self._search_of(scenario, model, name), {})
                kind = name.removeprefix("retrain-")
                like: Any = kind if kind in model.references else ""
                order = int(name == "retrain-again")
                for seed in range(self.plan.seeds_of(name)):
                    yield Job(
                        *("row", model.name, seed, which, name, options, scenario, like, order),
                        weight=self.weight(),
                    )

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
