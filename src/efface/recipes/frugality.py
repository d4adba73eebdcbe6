"""How much of D_r a method needs: results over all scenarios, against the fraction and the time.

The scenarios of such a recipe are alike (every class is forgotten in turn): a training seed counts
once, with its mean over them. Intervals are over training seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from efface.auditing import Subject
from efface.recipes.plan import Size
from efface.recipes.spread import spread, word
from efface.stats import rate

if TYPE_CHECKING:
    from efface.recipes.summary import Table

Entry = dict[str, Any]

AFTER = ("linear_probe", "relearn_retain")
"""What a row of a probed method says besides: what can be found of the class, or comes back."""
POOLED = (
    *("ra", "ua", "ta", "forget_class_test_accuracy", "ra_worst", "gap_a", "seconds"),
    *AFTER,
)
"""What is given as a mean over scenarios, as far as it was measured."""
BASES = ("original", "retrain")
NEAR = 0.05
"""A method has forgotten where its UA is as near as this to that of the retrained model."""
GAIN, TIME = 0.4, 0.12
"""What Sajith U and Keserwani 2026 claim: so much more RA, and so much of the time."""
ENOUGH = 0.95
"""Of the original's RA."""


# -- a row ------------------------------------------------------------------------------------


def worst_class(subject: Subject) -> Entry:
    """Accuracy on the records of D_r of the class that fares worst, with its exact interval.

    The interval is that of the class as if it had been named beforehand.
    """
    labels = subject.targets("retain")
    hits = subject.logits(subject.after, "retain").argmax(1) == labels
    there = np.unique(labels).tolist()
    worst = min(there, key=lambda c: float(hits[labels == c].mean()))
    mine = hits[labels == worst]
    return {**asdict(rate(int(mine.sum()), len(mine))), "class": int(worst)}


def after_forgetting(plan: Size, method: str, subject: Subject) -> dict[str, Entry]:
    """What a linear probe finds of the class, and how much of it comes back by fine-tuning on D_r.

    Nothing for rows that are not probed, or where no class is forgotten.
    """
    if not plan.probed or method not in (*BASES, *plan.probed) or subject.split.label is None:
        return {}
    from efface.auditing.probing import LinearProbe
    from efface.auditing.relearning import Relearn

    return {
        "linear_probe": asdict(LinearProbe().measure(subject, subject.after)),
        "relearn_retain": asdict(Relearn().measure(subject, subject.after)),
    }


# -- results ----------------------------------------------------------------------------------


def frugality(plan: Size, table: Table) -> Entry | None:
    """Pooled results of every method, and the best of the others beside the subject.

    Args:
        plan: The size.
        table: Its rows.

    Returns:
        ``fraction``, the one that tables show; ``lines``, for each model and family the ``method``
        that it is, its ``points`` (``name``, ``fraction`` or None, and the spread over training
        seeds of every metric and of ``seconds_ratio``, the time over retraining's) and ``enough``,
        the least fraction with nearly the original's RA; ``shown``, the methods of a table;
        ``scenarios``, their RA and UA in each scenario by itself; ``best``, see :func:`best`. None
        where the size does not pool its scenarios.
    """
    if not plan.pooled:
        return None
    lines = [_line(plan, table, *named) for named in _families(plan, table)]
    for line in lines:
        line["enough"] = _enough(line, lines)
    return {
        "fraction": plan.search_fraction,
        "subject": plan.subject,
        "lines": lines,
        "shown": shown(plan, [method for _, _, method in table.named]),
        "scenarios": _by_scenario(plan, table),
        "best": best(plan, table, lines),
    }


def _families(plan: Size, table: Table) -> list[tuple[str, str]]:
    found = [(model, plan.family(method)) for _, model, method in table.named]
    return list(dict.fromkeys(found))


def _line(plan: Size, table: Table, model: str, family: str) -> Entry:
    names = plan.members(family) or [family]
    points = [_point(plan, table, model, name) for name in names]
    points.sort(key=lambda p: 0.0 if p["fraction"] is None else p["fraction"])
    made = plan.methods[names[0]].method if names[0] in plan.methods else ""
    return {"model": model, "family": family, "method": made, "points": points}


def _point(plan: Size, table: Table, model: str, name: str) -> Entry:
    method = plan.methods.get(name)
    point: Entry = {"name": name, "fraction": method.fraction if method else None}
    for metric in POOLED:
        values = table.pooled(model, name, metric)
        if values:
            point[metric] = spread(list(values.values()))
    point["seconds_ratio"] = spread(_over(table, model, name, "retrain", "seconds"))
    return point


def _over(table: Table, model: str, less: str, than: str, metric: str) -> list[float]:
    """Ratios of two methods' pooled values over the training seeds that both have."""
    a, b = (table.pooled(model, name, metric) for name in (less, than))
    return [a[seed] / b[seed] for seed in a if b.get(seed)]


def _enough(line: Entry, lines: Sequence[Entry]) -> float | None:
    """The least fraction at which the mean RA is nearly the original's."""
    for base in lines:
        if (base["model"], base["family"]) == (line["model"], "original"):
            goal = ENOUGH * _mean(base["points"][0], "ra")
            reached = [p["fraction"] for p in line["points"] if _mean(p, "ra") >= goal]
            return min([f for f in reached if f is not None], default=None)
    return None


def _mean(point: Mapping[str, Any], metric: str) -> float:
    value = point.get(metric, {}).get("mean")
    return float("-inf") if value is None else float(value)


def shown(plan: Size, names: Sequence[str]) -> list[str]:
    """The methods that tables show: of every family the member next to the fraction of the search.

    Args:
        plan: The size.
        names: Methods and rows of the bench.
    """
    found = []
    for family in dict.fromkeys(plan.family(name) for name in names):
        members = plan.members(family) or [family]
        near = {m: plan.methods[m].fraction if m in plan.methods else None for m in members}
        found.append(min(members, key=lambda m: abs((near[m] or 1) - plan.search_fraction)))
    return found


def _by_scenario(plan: Size, table: Table) -> list[Entry]:
    """RA and UA of each scenario by itself, over training seeds."""
    found = []
    wanted = set(shown(plan, [method for _, _, method in table.named]))
    for scenario, model, name in table.named:
        if name in wanted:
            entry: Entry = {"scenario": scenario, "model": model, "name": name}
            for metric in ("ra", "ua"):
                entry[metric] = spread(list(table.values(model, name, metric, scenario).values()))
            found.append(entry)
    return found


# -- the best of the others -------------------------------------------------------------------


def best(plan: Size, table: Table, lines: Sequence[Entry]) -> list[Entry]:
    """For each fraction the competitor with the highest mean RA, beside the subject of the recipe.

    Once among all (``of = "all"``), once among those that have ``forgotten``: their mean UA is
    within 5 points of the retrained model's. Methods that read no D_r stand at every fraction;
    other settings of the subject's own method are no competitors. Naming the best after the fact
    favours it a little.

    Returns:
        ``model``, ``fraction``, ``of``, ``name`` of the best with its ``ra`` and ``ua``, ``mine``
        (the subject's name, ``ra``, ``ua``), and over shared training seeds ``difference`` of RA,
        its ``relative`` gain, the ratio of ``time``, and for each whether the paper's claim holds.
    """
    found = []
    for line in lines:
        if line["family"] != plan.subject:
            continue
        goal = table.pooled(line["model"], "retrain", "ua")
        for mine in line["points"]:
            others = list(_others(plan, lines, line["model"], mine["fraction"]))
            middle = float(np.mean(list(goal.values()))) if goal else float("nan")
            gone = [p for p in others if abs(_mean(p, "ua") - middle) <= NEAR]
            for of, among in (("all", others), ("forgotten", gone)):
                if among:
                    other = max(among, key=lambda p: _mean(p, "ra"))
                    beside = _beside(table, line["model"], mine, other)
                    found.append({"model": line["model"], "of": of, **beside})
    return found


def _others(
    plan: Size, lines: Sequence[Entry], model: str, fraction: float | None
) -> Iterator[Entry]:
    """The points of all competitors at a fraction."""
    own = plan.methods[plan.members(plan.subject or "")[0]].method
    for line in lines:
        if line["model"] != model or line["family"] not in map(plan.family, plan.methods):
            continue
        for point in line["points"]:
            same = plan.methods[point["name"]].method == own
            if not same and "ra" in point and point["fraction"] in (None, fraction):
                yield point


def _beside(table: Table, model: str, mine: Entry, other: Entry) -> Entry:
    a, b = (table.pooled(model, point["name"], "ra") for point in (mine, other))
    apart = [a[seed] - b[seed] for seed in a if seed in b]
    more = _over(table, model, mine["name"], other["name"], "ra")
    times = _over(table, model, mine["name"], other["name"], "seconds")
    return {
        "fraction": mine["fraction"],
        "name": other["name"],
        "ra": other["ra"],
        "ua": other["ua"],
        "mine": {key: mine.get(key) for key in ("name", "ra", "ua")},
        "difference": spread(apart),
        "relative": spread([value - 1 for value in more]),
        "time": spread(times),
        "claims": {
            "points": word(spread([GAIN - value for value in apart])),
            "relative": word(spread([GAIN + 1 - value for value in more])),
            "time": word(spread([value - TIME for value in times])),
        },
    }
