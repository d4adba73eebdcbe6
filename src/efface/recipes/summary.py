"""From rows (one per model, method and training seed) to means, gaps, and tested claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efface.recipes.jobs import GAPS, gap
from efface.recipes.recipe import MEASURED, Claim, Recipe
from efface.stats import mean_interval

Row = Mapping[str, Any]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation over training seeds, and Student's 95 % interval of the mean."""
    if not values:
        return {"mean": None, "std": None, "low": None, "high": None, "n": 0}
    if len(values) == 1:
        return {"mean": float(values[0]), "std": None, "low": None, "high": None, "n": 1}
    found = mean_interval(np.asarray(values, dtype=float))
    return {
        "mean": found.value,
        "std": float(np.std(values, ddof=1)),
        "low": found.low,
        "high": found.high,
        "n": len(values),
    }


class Table:
    """Rows, by model and method.

    Args:
        rows: As the jobs wrote them.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [row for row in rows if row["status"] == "ok"]
        pairs = [(row["model"], row["method"]) for row in rows]
        self.pairs = list(dict.fromkeys(pairs))

    def of(self, model: str, method: str) -> dict[int, Row]:
        """Seed → row."""
        found = [r for r in self.rows if (r["model"], r["method"]) == (model, method)]
        return {r["seed"]: r for r in sorted(found, key=lambda r: r["seed"])}

    def values(self, model: str, method: str, metric: str) -> dict[int, float]:
        """Seed → value of a metric, or of a gap to the mean of the retrained models."""
        rows = self.of(model, method)
        if metric in GAPS:
            middle = self.reference(model)
            found = {seed: gap(row["metrics"], middle, metric) for seed, row in rows.items()}
            return {seed: value for seed, value in found.items() if value is not None}
        if metric == "seconds":
            return {s: row["cost"]["wall"] for s, row in rows.items()}
        return {s: r["metrics"][metric]["value"] for s, r in rows.items() if metric in r["metrics"]}

    def reference(self, model: str) -> dict[str, Any]:
        """The mean of the retrained models of a model, in the form of a row's metrics."""
        values = {name: list(self.values(model, "retrain", name).values()) for name in MEASURED}
        return {n: {"value": float(np.mean(v))} for n, v in values.items() if v}


def summarise(recipe: Recipe, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each model and method: every metric over seeds, its gap, and what the paper has.

    A gap is the difference of means, as in the papers. The average gap is given twice: of means
    (``value``), and per training seed (``mean``, ``std`` and interval).
    """
    table = Table(rows)
    return [_entry(recipe, table, model, method) for model, method in table.pairs]


def _entry(recipe: Recipe, table: Table, model: str, method: str) -> dict[str, Any]:
    middle = table.reference(model)
    paper = recipe.paper.get(model, {}).get(method, {})
    theirs = recipe.paper.get(model, {}).get("retrain", {})
    metrics: dict[str, Any] = {}
    for name in MEASURED:
        values = list(table.values(model, method, name).values())
        if not values:
            continue
        entry = spread(values)
        if method != "retrain" and name in middle:
            entry["gap"] = abs(entry["mean"] - middle[name]["value"])
        if name in paper:
            entry["paper"] = _paper(paper[name], theirs.get(name))
        metrics[name] = entry
    seconds = spread(list(table.values(model, method, "seconds").values()))
    full = spread(list(table.values(model, "retrain", "seconds").values()))["mean"]
    found = table.of(model, method)
    entry = {
        "model": model,
        "method": method,
        "n": len(found),
        "sparsity": spread([row["sparsity"] for row in found.values()])["mean"],
        "metrics": metrics,
        "seconds": seconds,
        "seconds_ratio": seconds["mean"] / full if full and seconds["mean"] is not None else None,
    }
    for kind in GAPS:
        means = {name: {"value": m["mean"]} for name, m in metrics.items()}
        value = gap(means, middle, kind) if method != "retrain" else None
        per_seed = spread(list(table.values(model, method, kind).values()))
        entry[kind] = {"value": value, **per_seed}
        if kind in paper:
            entry[kind]["paper"] = paper[kind]
    return entry


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
    *not shown* where zero lies in it or there are fewer than two seeds.
    """
    table = Table(rows)
    return [_judged(claim, table) for claim in claims]


def _judged(claim: Claim, table: Table) -> dict[str, Any]:
    less = table.values(*claim.less, claim.metric)
    than = table.values(*claim.than, claim.metric)
    shared = sorted(set(less) & set(than))
    apart = spread([less[s] - than[s] for s in shared])
    word = "not shown"
    if apart["low"] is not None and apart["high"] < 0:
        word = "holds"
    elif apart["low"] is not None and apart["low"] > 0:
        word = "reversed"
    return {
        "text": claim.text,
        "metric": claim.metric,
        "less": {"of": list(claim.less), **spread([less[s] for s in shared])},
        "than": {"of": list(claim.than), **spread([than[s] for s in shared])},
        "difference": apart,
        "verdict": word,
    }


def curves(recipe: Recipe, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Metrics against sparsity: a line for each method and way of pruning, with intervals.

    A way of pruning is what is left of a model's name without its sparsity (``omp`` of ``omp-95``);
    every line begins at the dense model.
    """
    table = Table(rows)
    models = list(dict.fromkeys(model for model, _ in table.pairs))
    ways: dict[str, list[str]] = {}
    for model in models:
        way, _, percent = model.rpartition("-")
        if percent.replace(".", "").isdigit():
            ways.setdefault(way, [m for m in models if m == "dense"]).append(model)
    ways = ways or {"": models}
    drawn = []
    for curve in recipe.curves:
        groups = []
        for way, members in ways.items():
            for method in curve.methods:
                label = f"{way}, {method}" if len(ways) > 1 else method
                groups.append(
                    _line(recipe, table, members, method, curve.metric) | {"label": label}
                )
        drawn.append({"metric": curve.metric, "groups": groups})
    return drawn


def _line(
    recipe: Recipe, table: Table, models: Sequence[str], method: str, metric: str
) -> dict[str, Any]:
    points = []
    for model in models:
        found, values = table.of(model, method), table.values(model, method, metric)
        if values:
            at = float(np.mean([row["sparsity"] for row in found.values()]))
            points.append({"x": at, "model": model, **spread(list(values.values()))})
    points.sort(key=lambda p: p["x"])
    published = {m: recipe.paper.get(m, {}).get(method, {}).get(metric) for m in models}
    paper = [{"x": p["x"], "y": published[p["model"]]} for p in points if published[p["model"]]]
    return {"points": points, "paper": paper}
