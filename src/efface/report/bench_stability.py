"""How far the numbers of membership inference move, as pictures, a table and a paragraph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efface.report.plots import COLOURS, DASHES, LINE, MUTED, canvas, role
from efface.report.words import DASH, interval, number

_MEASURES = {
    "accuracy": "accuracy of the attack",
    "mia_efficacy": "MIA-efficacy",
    "auc": "AUC, members of the attack",
    "mia_auc": "AUC, forgotten against unseen",
    "mia_tpr_at_1fpr": "hits at 1 % false alarms",
    "mask_trace": "trace in the mask (IoU)",
}
_FITTED = ("accuracy", "mia_efficacy")
_OVER_SHARES = ("mia_efficacy", "mia_auc", "mia_tpr_at_1fpr", "mask_trace")
_PANELS = ("accuracy", "mia_efficacy", "auc")


def stability_section(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the page shows of a bench with balances; None for one without.

    Args:
        found: ``stability`` of ``results.json``.
    """
    if found is None:
        return None
    names = list(dict.fromkeys((line["model"], line["method"]) for line in found["lines"]))
    figures = []
    for i, (model, method) in enumerate(names):
        mine = [x for x in found["lines"] if (x["model"], x["method"]) == (model, method)]
        panels = []
        for measure in _PANELS:
            lines = [x for x in mine if x["measure"] == measure]
            svg = panel(lines, measure, f"stability{i}{measure}")
            panels.append({"title": _title(measure), "svg": svg})
        figures.append({"title": f"{method} · {model}", "panels": panels})
    shares = [share for share in found["shares"].values() if share is not None]
    return {
        "text": sentences(found),
        "figures": figures,
        "tables": [_table(found, names, along) for along in ("balance", "share")],
        "by_share": _by_share(found),
        "shares": " to ".join(f"{100 * s:g}" for s in (min(shares), max(shares))),
    }


def _table(
    found: Mapping[str, Any], names: Sequence[tuple[str, str]], along: str
) -> dict[str, Any]:
    """The ranges along balances or shares: a row for each method, a column for each measure."""
    cells = {(e["model"], e["method"], e["measure"]): e[along] for e in found["spreads"]}
    there = [m for m in _MEASURES if any(cells.get((*n, m)) for n in names)]
    rows = []
    for model, method in names:
        parts = [cells.get((model, method, measure)) or {} for measure in there]
        rows.append(
            {
                "method": method,
                "model": model,
                "cells": [
                    (
                        number(p.get("mean"), "score"),
                        interval(p.get("low"), p.get("high"), "score"),
                    )
                    for p in parts
                ],
            }
        )
    about = "balances" if along == "balance" else "shares deleted"
    return {"about": about, "columns": [_MEASURES[m] for m in there], "rows": rows}


def _by_share(found: Mapping[str, Any]) -> dict[str, Any]:
    """Against the share deleted: a panel for each measure, a line for each method."""
    names = list(dict.fromkeys(line["method"] for line in found["by_share"]))
    names = [name for name in names if name != "retrain-again"]
    places = {name: role(name, (1, 3, 4)[i % 3]) for i, name in enumerate(names)}
    panels = []
    for measure in _OVER_SHARES:
        lines = [x for x in found["by_share"] if x["measure"] == measure and x["method"] in places]
        if lines:
            svg = against_share(lines, places, measure, f"share-{measure}")
            panels.append({"title": _title(measure), "svg": svg})
    legend = [{"label": name, "place": place} for name, place in places.items()]
    return {"panels": panels, "legend": legend}


def _title(measure: str) -> str:
    text = _MEASURES[measure]
    return text[:1].upper() + text[1:]


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What moves, by how much and why, from the data alone."""
    low, high = min(found["balances"]), max(found["balances"])
    facts = found["facts"]
    over = {m: _mean(found, m, "balance") for m in _MEASURES}
    along = {m: _mean(found, m, "share") for m in _MEASURES}
    said = [
        f"With {low:.0%} to {high:.0%} members among the records that the attack is fitted on, its "
        f"accuracy moves by {_points(over['accuracy'])} points and MIA-efficacy by "
        f"{_points(over['mia_efficacy'])}, on the very same models; the AUC of the same records "
        f"moves by {_points(over['auc'])} (mean over methods, shares and seeds){_noise(facts)}."
    ]
    if facts["explained"] is not None:
        said.append(
            "Whoever always names the larger side is right max(balance, 1 − balance) of the time. "
            f"That alone explains {max(0.0, facts['explained']):.1%} of the accuracy's variance; "
            f"the attack is {100 * facts['above']:.1f} points better than it on average."
        )
    if facts["order"] is not None:
        first, last = facts["efficacy"]
        follows = "follows" if facts["order"] < -0.5 else "does not simply follow"
        said.append(
            f"MIA-efficacy {follows} the balance: {first:.0%} of the forgotten records are called "
            f"non-members where {low:.0%} of the attack's records are members, {last:.0%} where "
            f"{high:.0%} are (rank correlation {_signed(facts['order'])} within a row). The "
            "classifier puts its threshold where errors are cheapest for the shares that it was "
            "shown."
        )
    moved = [f"{_MEASURES[m]} {_points(v)}" for m, v in along.items() if v is not None]
    said.append(
        "Between the shares deleted, at a fixed balance, the ranges are, in points: "
        f"{'; '.join(moved)}. A range over few forgotten records holds sampling noise, too."
    )
    ratio = _ratio(over)
    if ratio is not None:
        verdict = (
            "The numbers with a fitted threshold depend on choices of the auditor, the ranking does"
            " not: report AUC, or hits at a fixed rate of false alarms with a held-out threshold."
            if ratio > 3
            else "In this run the ranking moves nearly as much as what has a fitted threshold."
        )
        said.append(verdict)
    return said


def _noise(facts: Mapping[str, Any]) -> str:
    """Whether the AUC goes with the balance, or only with which records were drawn."""
    order = facts["auc_order"]
    if order is None or abs(order) > 0.3:
        return (
            ""
            if order is None
            else f", and goes with the balance (rank correlation {_signed(order)})"
        )
    return (
        f", with no trend (rank correlation with the balance {_signed(order)}): that is the noise "
        "of which records were drawn"
    )


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _mean(found: Mapping[str, Any], measure: str, along: str) -> float | None:
    """The mean range of a measure over models and methods."""
    parts = [e[along] for e in found["spreads"] if e["measure"] == measure and e[along]]
    means = [part["mean"] for part in parts if part["mean"] is not None]
    return sum(means) / len(means) if means else None


def _ratio(over: Mapping[str, float | None]) -> float | None:
    """How much more the fitted numbers move with the balance than the ranking does."""
    fitted = [v for m in _FITTED if (v := over[m]) is not None]
    rank = over["auc"]
    return min(fitted) / rank if fitted and rank else None


def _points(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}"


def panel(lines: Sequence[Mapping[str, Any]], measure: str, salt: str) -> str:
    """One measure against the balance: a line for each share, darker for larger shares.

    Args:
        lines: ``scenario`` and ``points`` (``x``, ``mean``, ``low``, ``high``), smallest share
            first.
        measure: Which.
        salt: Unique on the page.
    """
    names = ", ".join(line["scenario"] for line in lines)
    alt = f"{_MEASURES[measure]} against the share of members, for {names} deleted."
    with canvas(3.3, 2.7, alt, salt) as (axes, out):
        if measure == "accuracy":
            ends = [[0.0, 0.5, 1.0], [1.0, 0.5, 1.0]]
            axes.plot(*ends, color=MUTED, ls=(0, (4, 2)), lw=1.2)
        if measure == "auc":
            axes.axhline(0.5, color=LINE, lw=1.2)
        for k, line in enumerate(lines):
            alpha = 0.25 + 0.75 * (k + 1) / len(lines)
            x = [point["x"] for point in line["points"]]
            axes.plot(x, [p["mean"] for p in line["points"]], color=COLOURS[1], lw=1.6, alpha=alpha)
        for at, point in ((p["x"], p) for p in lines[-1]["points"]):
            if point["low"] is not None:
                axes.plot(
                    [at, at], [point["low"], point["high"]], color=COLOURS[1], lw=1, alpha=0.6
                )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("share of members")
    return out[0]


def against_share(
    lines: Sequence[Mapping[str, Any]], places: Mapping[str, int], measure: str, salt: str
) -> str:
    """One measure against the share deleted, with intervals: a line for each method.

    Args:
        lines: ``method`` and ``points`` (``x``, ``mean``, ``low``, ``high``).
        places: Method → colour and dash.
        measure: Which.
        salt: Unique on the page.
    """
    names = ", ".join(line["method"] for line in lines)
    with canvas(3.3, 2.7, f"{_MEASURES[measure]} against the share deleted: {names}.", salt) as (
        axes,
        out,
    ):
        if measure == "mia_auc":
            axes.axhline(0.5, color=LINE, lw=1.2)
        for line in lines:
            place = places[line["method"]]
            colour = COLOURS[place]
            x = [100 * point["x"] for point in line["points"]]
            y = [point["mean"] for point in line["points"]]
            axes.plot(x, y, "o", color=colour, ls=DASHES[place], lw=1.6, ms=3.5)
            for at, point in zip(x, line["points"], strict=True):
                if point["low"] is not None:
                    ends = [point["low"], point["high"]]
                    axes.plot([at, at], ends, color=colour, lw=1.2, alpha=0.45)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("deleted, %")
        if measure == "mask_trace":
            axes.axhline(0.0, color=LINE, lw=1.2)
        else:
            axes.set_ylim(0, 1.02)
    return out[0]
