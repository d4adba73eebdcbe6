"""From rows (one per model, method and training seed) to means, gaps, and tested claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efface.recipes.jobs import GAPS, gap
from efface.recipes.recipe import MEASURED, TOPOLOGY, Claim, Curve, Recipe
from efface.recipes.spread import spread, word
from efface.recipes.traces import trace_removed, trace_removed_between
from efface.recipes.undoing import SIDES, UNDONE, side, verdict

Row = Mapping[str, Any]


class Table:
    """Rows, by scenario, model and method.

    Args:
        rows: As the jobs wrote them.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [row for row in rows if row["status"] == "ok"]
        named = [(row.get("scenario", ""), row["model"], row["method"]) for row in rows]
        self.named = list(dict.fromkeys(named))
        self.scenarios = list(dict.fromkeys(scenario for scenario, _, _ in named))
        self._of: dict[tuple[str, str, str], dict[int, Row]] = {}
        for row in sorted(self.rows, key=lambda r: r["seed"]):
            key = (row.get("scenario", ""), row["model"], row["method"])
            self._of.setdefault(key, {})[row["seed"]] = row

    def of(self, model: str, method: str, scenario: str = "") -> dict[int, Row]:
        """Seed → row."""
        return dict(self._of.get((scenario, model, method), {}))

    def values(self, model: str, method: str, metric: str, scenario: str = "") -> dict[int, float]:
        """Seed → value of a metric, or of a gap to the mean of the retrained models.

        What is remembered or lost is the difference to the retrained model of the same seed.
        """
        rows = self.of(model, method, scenario)
        if metric in SIDES:
            return self._sides(rows, self.of(model, "retrain", scenario), metric)
        if metric in GAPS:
            middle = self.reference(model, scenario)
            found = {seed: gap(row["metrics"], middle, metric) for seed, row in rows.items()}
            return {seed: value for seed, value in found.items() if value is not None}
        if metric == "seconds":
            return {s: row["cost"]["wall"] for s, row in rows.items()}
        if metric == "cost":
            whole = _images(self.of(model, "retrain", scenario))
            return {s: n / whole[s] for s, n in _images(rows).items() if whole.get(s)}
        return {s: r["metrics"][metric]["value"] for s, r in rows.items() if metric in r["metrics"]}

    def pooled(
        self, model: str, method: str, metric: str, scenarios: Sequence[str] | None = None
    ) -> dict[int, float]:
        """Seed → mean of a metric over scenarios: all that a method has rows in, or those named.

        A seed that lacks one of them is left out.
        """
        if scenarios is None:
            scenarios = [s for s in self.scenarios if (s, model, method) in self.named]
        found = [self.values(model, method, metric, s) for s in scenarios]
        shared = [s for s in found[0] if all(s in one for one in found)] if found else []
        return {s: float(np.mean([one[s] for one in found])) for s in shared}

    @staticmethod
    def _sides(rows: dict[int, Row], retrained: dict[int, Row], kind: str) -> dict[int, float]:
        shared = [seed for seed in rows if seed in retrained and rows[seed] is not retrained[seed]]
        found = {}
        for seed in shared:
            theirs = {n: m["value"] for n, m in retrained[seed]["metrics"].items()}
            found[seed] = side(kind, rows[seed], theirs)
        return {seed: value for seed, value in found.items() if value is not None}

    def apart(self, model: str, method: str, metric: str, scenario: str = "") -> list[float]:
        """Differences to the retrained model of the same seed."""
        mine = self.values(model, method, metric, scenario)
        theirs = self.values(model, "retrain", metric, scenario)
        return [mine[seed] - theirs[seed] for seed in mine if seed in theirs]

    def reference(self, model: str, scenario: str = "") -> dict[str, Any]:
        """The mean of the retrained models of a model, in the form of a row's metrics."""
        values = {n: self.values(model, "retrain", n, scenario).values() for n in MEASURED}
        return {n: {"value": float(np.mean(list(v)))} for n, v in values.items() if v}


def _images(rows: Mapping[int, Row]) -> dict[int, float]:
    """Seed → images of training steps, those of all streams."""
    counted = {seed: row["cost"].get("images") for seed, row in rows.items()}
    return {seed: float(n) for seed, n in counted.items() if n is not None}


def summarise(recipe: Recipe, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each scenario, model and method: every metric over seeds, its gap, what the paper has.

    A gap is the difference of means, as in the papers; ``apart`` is the difference by seed, with
    its sign and interval. The average gap is given twice: of means (``value``), and per training
    seed (``mean``, ``std`` and interval). ``memory`` is what is still remembered of D_f beyond what
    retrained models know of it, ``damage`` what was lost beside it, ``verdict`` both in words.
    """
    table = Table(rows)
    return [_entry(recipe, table, *named) for named in table.named]


def _entry(recipe: Recipe, table: Table, scenario: str, model: str, method: str) -> dict[str, Any]:
    middle = table.reference(model, scenario)
    paper = recipe.paper.get(model, {}).get(method, {})
    theirs = recipe.paper.get(model, {}).get("retrain", {})
    metrics: dict[str, Any] = {}
    for name in MEASURED:
        values = list(table.values(model, method, name, scenario).values())
        if not values:
            continue
        entry = spread(values)
        if method != "retrain" and name in middle and name not in (*TOPOLOGY, *UNDONE):
            entry["gap"] = abs(entry["mean"] - middle[name]["value"])
            entry["apart"] = spread(table.apart(model, method, name, scenario))
        if name in paper:
            entry["paper"] = _paper(paper[name], theirs.get(name))
        metrics[name] = entry
    seconds = spread(list(table.values(model, method, "seconds", scenario).values()))
    full = spread(list(table.values(model, "retrain", "seconds", scenario).values()))["mean"]
    found = table.of(model, method, scenario)
    entry = {
        "scenario": scenario,
        "model": model,
        "method": method,
        "n": len(found),
        "sparsity": spread([row["sparsity"] for row in found.values()])["mean"],
        "metrics": metrics,
        "seconds": seconds,
        "seconds_ratio": seconds["mean"] / full if full and seconds["mean"] is not None else None,
        "cost": _cost(table, scenario, model, method),
        "trace_removed": trace_removed([row["metrics"] for row in found.values()]),
        "trace_removed_between": trace_removed_between([r["metrics"] for r in found.values()]),
    }
    sides = {k: spread(list(table.values(model, method, k, scenario).values())) for k in SIDES}
    whole = spread(list(table.values(model, "original", "memory", scenario).values()))
    entry |= {**sides, "verdict": verdict(sides["memory"], sides["damage"], whole)}
    for kind in GAPS:
        means = {name: {"value": m["mean"]} for name, m in metrics.items()}
        value = gap(means, middle, kind) if method != "retrain" else None
        per_seed = spread(list(table.values(model, method, kind, scenario).values()))
        entry[kind] = {"value": value, **per_seed}
        if kind in paper:
            entry[kind]["paper"] = paper[kind]
    return entry


def _cost(table: Table, scenario: str, model: str, method: str) -> dict[str, Any] | None:
    """Images of a method's training steps over those of the reference; not of what is no method."""
    if method == "original":
        return None
    found = spread(list(table.values(model, method, "cost", scenario).values()))
    return found if found["n"] else None


def _paper(cell: Any, reference: Any) -> dict[str, Any]:
    """Mean, deviation and gap of a published value; values in the recipe are per cent."""
    mean, *rest = cell if isinstance(cell, tuple | list) else (cell,)
    base = (reference[0] if isinstance(reference, tuple | list) else reference) or None
    return {
        "mean": mean / 100,
        "std": rest[0] / 100 if rest else None,
        "gap": abs(mean - base) / 100 if base is not None else None,
    }


def judge(claims: Sequence[Claim], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Test claims: the difference over shared training seeds, with Student's interval.

    A claim *holds* where the whole interval is below zero, is *reversed* where it is above, and is
    *not shown* where zero lies in it or there are fewer than two seeds. A claim about rows that
    this size does not have is left out. One that is ``pooled`` is tested once, on means over the
    scenarios that have both.
    """
    table = Table(rows)
    found = []
    for claim in claims:
        there = [
            scenario
            for scenario in table.scenarios
            if {(scenario, *claim.less), (scenario, *claim.than)} <= set(table.named)
            and claim.scenario in (None, scenario)
        ]
        if claim.pooled:
            found += [_judged(claim, table, there)] if there else []
        else:
            found += [_judged(claim, table, [s]) for s in there]
    return found


def _judged(claim: Claim, table: Table, scenarios: Sequence[str]) -> dict[str, Any]:
    less = table.pooled(*claim.less, claim.metric, scenarios)
    than = table.pooled(*claim.than, claim.metric, scenarios)
    shared = sorted(set(less) & set(than))
    apart = spread([less[s] + claim.by - claim.times * than[s] for s in shared])
    found = {
        "text": claim.text,
        "scenario": "" if claim.pooled else scenarios[0],
        "metric": claim.metric,
        "less": {"of": list(claim.less), **spread([less[s] for s in shared])},
        "than": {"of": list(claim.than), **spread([than[s] for s in shared])},
        "difference": apart,
        "verdict": word(apart),
    }
    more = {"pooled": claim.pooled, "by": claim.by, "times": claim.times}
    plain = {"pooled": False, "by": 0.0, "times": 1.0}
    return found | {key: value for key, value in more.items() if value != plain[key]}


def curves(recipe: Recipe, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Metrics against sparsity: a line for each method and way of pruning, with intervals.

    A way of pruning is what is left of a model's name without its sparsity (``omp`` of ``omp-95``);
    every line begins at the dense model.
    """
    table = Table(rows)
    drawn = []
    for curve in recipe.curves:
        for scenario in table.scenarios:
            groups = _groups(recipe, table, curve, scenario)
            drawn.append({"metric": curve.metric, "scenario": scenario, "groups": groups})
    return drawn


def _groups(recipe: Recipe, table: Table, curve: Curve, scenario: str) -> list[dict[str, Any]]:
    """The lines of a curve."""
    models = list(dict.fromkeys(model for at, model, _ in table.named if at == scenario))
    ways: dict[str, list[str]] = {}
    for model in models:
        way, _, percent = model.rpartition("-")
        if percent.replace(".", "").isdigit():
            ways.setdefault(way, [m for m in models if m == "dense"]).append(model)
    ways = ways or {"": models}
    groups = []
    for way, members in ways.items():
        for method in curve.methods:
            label = f"{way}, {method}" if len(ways) > 1 else method
            line = _line(recipe, table, members, method, curve.metric, scenario)
            groups.append(line | {"label": label})
    return groups


def _line(
    recipe: Recipe,
    table: Table,
    models: Sequence[str],
    method: str,
    metric: str,
    scenario: str,
) -> dict[str, Any]:
    points = []
    for model in models:
        found = table.of(model, method, scenario)
        values = table.values(model, method, metric, scenario)
        if values:
            at = float(np.mean([row["sparsity"] for row in found.values()]))
            points.append({"x": at, "model": model, **spread(list(values.values()))})
    points.sort(key=lambda p: p["x"])
    published = {m: recipe.paper.get(m, {}).get(method, {}).get(metric) for m in models}
    paper = [{"x": p["x"], "y": published[p["model"]]} for p in points if published[p["model"]]]
    return {"points": points, "paper": paper}
