"""What a bench says of all its scenarios together: against the fraction of D_r, and the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efface.report import plots
from efface.report.bench_masks import is_base
from efface.report.plots import COLOURS, LINE, MUTED, canvas
from efface.report.words import NBSP, interval, number, significant

Entry = Mapping[str, Any]

COLUMNS = {
    "ra": "RA",
    "ua": "UA",
    "gap_a": "Gap-A",
    "ta": "TA",
    "forget_class_test_accuracy": "Class TA",
    "ra_worst": "RA, worst class",
    "linear_probe": "Probe",
    "relearn_retain": "Re-learned",
}
"""Columns of the table, where they were measured; all are fractions."""
_MARKS = "s^DvPX<>*hpd"
_PLACES = (3, 4, 0)
_FOUND = {"holds": "held", "reversed": "not held", "not shown": "not shown"}


def frugality_section(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the page shows of pooled results; None for a bench without.

    Args:
        document: What ``results.json`` holds.

    Returns:
        ``tables`` of the methods at the fraction of the search, ``figures``, sentences on the
        ``best`` of the others, and the ``scenarios`` by themselves.
    """
    found = document.get("frugality")
    if not found:
        return None
    models = list(dict.fromkeys(line["model"] for line in found["lines"]))
    return {
        "fraction": _share(found["fraction"]),
        "many": any(len(line["points"]) > 1 for line in found["lines"]),
        "tables": [_table(found, model) for model in models],
        "figures": [fig for i, model in enumerate(models) for fig in _figures(found, model, i)],
        "best": [_sentence(entry) for entry in found["best"]],
        "scenarios": [_scenarios(found, model) for model in models],
    }


# -- tables -----------------------------------------------------------------------------------


def _table(found: Entry, model: str) -> dict[str, Any]:
    lines = [line for line in found["lines"] if line["model"] == model]
    points = [(line, p) for line in lines for p in line["points"] if p["name"] in found["shown"]]
    there = [name for name in COLUMNS if any(name in p for _, p in points)]
    return {
        "model": model,
        "columns": [COLUMNS[name] for name in there],
        "enough": any(line["enough"] for line in lines),
        "rows": [
            {
                "name": p["name"],
                "base": is_base(p["name"]),
                "n": p.get("ra", {}).get("n"),
                "cells": [_cell(p.get(name)) for name in there],
                "seconds": number(p.get("seconds", {}).get("mean"), "seconds"),
                "ratio": _ratio(p["seconds_ratio"]),
                "enough": _share(line["enough"]) if line["enough"] else "",
            }
            for line, p in points
        ],
    }


def _cell(entry: Entry | None) -> dict[str, str]:
    if entry is None:
        return {"value": number(None), "interval": ""}
    return {
        "value": number(entry["mean"], "percent", False),
        "interval": interval(entry["low"], entry["high"], "percent"),
    }


def _share(fraction: float) -> str:
    """A fraction as people write it.

    >>> _share(0.13).replace(NBSP, " "), _share(0.005).replace(NBSP, " ")
    ('13 %', '0.5 %')
    """
    return f"{100 * fraction:g}{NBSP}%"


def _ratio(entry: Entry) -> str:
    return "" if entry["mean"] is None else f"{significant(entry['mean'])} ×"


def _scenarios(found: Entry, model: str) -> dict[str, Any]:
    """RA and UA of every method in every scenario."""
    mine = [entry for entry in found["scenarios"] if entry["model"] == model]
    columns = list(dict.fromkeys(entry["scenario"] for entry in mine))
    rows: dict[str, dict[str, Any]] = {}
    for entry in mine:
        cells = rows.setdefault(entry["name"], dict.fromkeys(columns))
        cells[entry["scenario"]] = {
            metric: number(entry[metric]["mean"], "percent", False) for metric in ("ra", "ua")
        }
    return {
        "model": model,
        "columns": columns,
        "rows": [
            {"name": name, "base": is_base(name), "cells": list(cells.values())}
            for name, cells in rows.items()
        ],
    }


def _sentence(entry: Entry) -> str:
    """The best of the others at a fraction, and what is found of the paper's claims."""
    among = "of the others" if entry["of"] == "all" else "of those that have forgotten"
    at = "" if entry["fraction"] is None else f"At {_share(entry['fraction'])} of D_r "
    apart, more, time = entry["difference"], entry["relative"], entry["time"]
    claims = {name: _FOUND[verdict] for name, verdict in entry["claims"].items()}
    return (
        f"{at}{'the' if at else 'The'} best {among} is {entry['name']}: RA "
        f"{number(entry['ra']['mean'], 'percent')}, UA {number(entry['ua']['mean'], 'percent')}. "
        f"{entry['mine']['name']} has {number(entry['mine']['ra']['mean'], 'percent')} and "
        f"{number(entry['mine']['ua']['mean'], 'percent')}: "
        f"{number(apart['mean'], 'percent', False)} points more RA "
        f"{interval(apart['low'], apart['high'], 'percent')}, which is "
        f"{number(more['mean'], 'percent')} of it, in {significant(time['mean'])} × the time "
        f"[{_plain(time['low'])}, {_plain(time['high'])}]. Claimed: 40 points more "
        f"({claims['points']}), or 40 % more ({claims['relative']}), in 0.12 × the time "
        f"({claims['time']})."
    )


def _plain(value: float | None) -> str:
    return number(None) if value is None else significant(value)


# -- figures ----------------------------------------------------------------------------------


def _figures(found: Entry, model: str, index: int) -> list[dict[str, str]]:
    lines = [line for line in found["lines"] if line["model"] == model]
    about = f", {model}" if index else ""
    if not any(len(line["points"]) > 1 for line in lines):
        return [_dots(lines, found["shown"], about, index)]
    drawn = styles([line for line in lines if not is_base(line["family"])], found["subject"])
    figures = [
        {
            "title": f"{text} against the fraction of D_r{about}",
            "svg": over_fraction(lines, drawn, metric, f"frugal-{metric}{index}"),
            "how": "Mean over all scenarios and 95\u00a0% interval over training seeds. Lines "
            "without marks: methods that read no D_r.",
        }
        for metric, text in (("ra", "RA"), ("ua", "UA"))
    ]
    figures.append(
        {
            "title": f"RA against time{about}",
            "svg": over_time(lines, drawn, f"frugal-time{index}"),
            "how": "Every mark is a fraction of D_r, the least on the left end of its line. Upper "
            "left is fast and harmless; look at UA for what was forgotten.",
        }
    )
    return figures


def _dots(lines: Sequence[Entry], names: Sequence[str], about: str, index: int) -> dict[str, str]:
    """Gap-A of every method, where there is one fraction only."""
    rows = [
        {
            "label": p["name"],
            "value": p["gap_a"]["mean"],
            "low": p["gap_a"]["low"] and max(0.0, p["gap_a"]["low"]),
            "high": p["gap_a"]["high"],
            "paper": None,
            "open": False,
        }
        for line in lines
        for p in line["points"]
        if "gap_a" in p and p["name"] in names
    ]
    label = "gap-A, points (left is better)"
    return {
        "title": f"Gap-A of every method{about}",
        "svg": plots.interval_dots(rows, label, f"frugal-dots{index}"),
        "how": "Mean over all scenarios and 95\u00a0% interval over training seeds.",
    }


def styles(lines: Sequence[Entry], subject: str | None) -> dict[str, dict[str, Any]]:
    """How every family is drawn: the subject and plain fine-tuning thick, the others thin.

    >>> [s["lw"] for s in styles([{"family": "a", "method": "ssd"}], "b").values()]
    [1.1]
    """
    made: dict[str, dict[str, Any]] = {}
    others = 0
    for line in lines:
        if line["family"] == subject:
            style = {"color": COLOURS[1], "marker": "o", "lw": 3.0, "ms": 6, "zorder": 5}
        elif line["method"] == "finetune":
            style = {"color": COLOURS[2], "marker": "o", "lw": 2.4, "ms": 5, "zorder": 4}
        else:
            place = COLOURS[_PLACES[others % len(_PLACES)]]
            mark = _MARKS[others % len(_MARKS)]
            dash = ("-", (0, (4, 2)), (0, (1.5, 1.5)))[others // len(_PLACES) % 3]
            style = {"color": place, "marker": mark, "ls": dash, "lw": 1.1, "ms": 4.2, "zorder": 3}
            others += 1
        made[line["family"]] = style
    return made


def over_fraction(
    lines: Sequence[Entry], drawn: Mapping[str, Mapping[str, Any]], metric: str, salt: str
) -> str:
    """A metric against the fraction of D_r, a line for each family.

    Args:
        lines: ``family`` and ``points`` (``fraction``, and spreads by metric; fractions of 1).
        drawn: Family → style; see :func:`styles`.
        metric: What is drawn.
        salt: Unique on the page.
    """
    alt = f"{COLUMNS[metric]} against the fraction of D_r: {', '.join(drawn)}."
    with canvas(7.6, 3.9, alt, salt) as (axes, out):
        _levels(axes, lines, metric)
        for line in lines:
            style = drawn.get(line["family"])
            points = [p for p in line["points"] if p.get(metric, {}).get("mean") is not None]
            if style is None or not points:
                continue
            if points[0]["fraction"] is None:
                flat = {k: v for k, v in style.items() if k not in ("marker", "ms")}
                axes.axhline(100 * points[0][metric]["mean"], label=line["family"], **flat)
                continue
            x = [100 * p["fraction"] for p in points]
            axes.plot(x, [100 * p[metric]["mean"] for p in points], label=line["family"], **style)
            _whiskers(axes, x, points, metric, style["color"])
        _log(axes, [100 * p["fraction"] for line in lines for p in line["points"] if p["fraction"]])
        _frame(axes, lines, metric)
        axes.set_xlabel("fraction of D_r, % (log scale)")
        axes.set_ylabel(f"{COLUMNS[metric]}, %")
        _legend(axes)
    return out[0]


def over_time(lines: Sequence[Entry], drawn: Mapping[str, Mapping[str, Any]], salt: str) -> str:
    """RA against wall seconds, a line for each family.

    Args:
        lines: As for :func:`over_fraction`.
        drawn: Family → style.
        salt: Unique on the page.
    """
    alt = f"RA against wall seconds: {', '.join(drawn)}."
    with canvas(7.6, 3.9, alt, salt) as (axes, out):
        _levels(axes, [line for line in lines if line["family"] == "original"], "ra")
        for line in lines:
            points = [p for p in line["points"] if "ra" in p and (p["seconds"]["mean"] or 0) > 0]
            style = drawn.get(line["family"])
            if line["family"] == "retrain":
                style = {"color": MUTED, "marker": "*", "lw": 0.0, "ms": 11, "zorder": 2}
            if style is None or not points:
                continue
            x = [p["seconds"]["mean"] for p in points]
            axes.plot(x, [100 * p["ra"]["mean"] for p in points], label=line["family"], **style)
            _whiskers(axes, x, points, "ra", style["color"])
            for p in points:
                if p["seconds"]["low"] is not None and p["seconds"]["low"] > 0:
                    ends = [p["seconds"]["low"], p["seconds"]["high"]]
                    y = 100 * p["ra"]["mean"]
                    axes.plot(ends, [y, y], color=style["color"], lw=1.0, alpha=0.4)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        _frame(axes, lines, "ra")
        axes.set_xlabel("wall seconds (log scale)")
        axes.set_ylabel("RA, %")
        _legend(axes)
    return out[0]


def _levels(axes: Any, lines: Sequence[Entry], metric: str) -> None:
    """Pale lines at the values of the original and of retraining."""
    for line in lines:
        value = line["points"][0].get(metric, {}).get("mean")
        if is_base(line["family"]) and value is not None:
            dash = (0, (1.5, 1.5)) if line["family"] == "original" else (0, (5, 2))
            name = line["family"]
            axes.axhline(100 * value, color=MUTED, lw=1.0, ls=dash, zorder=1, label=name)


def _whiskers(
    axes: Any, x: Sequence[float], points: Sequence[Entry], metric: str, colour: str
) -> None:
    for at, point in zip(x, points, strict=True):
        if point[metric]["low"] is not None:
            ends = [100 * min(1.0, max(0.0, point[metric][end])) for end in ("low", "high")]
            axes.plot([at, at], ends, color=colour, lw=1.2, alpha=0.45)


def _frame(axes: Any, lines: Sequence[Entry], metric: str) -> None:
    """Room for all means; of an interval as much as fits."""
    spreads = [p[metric] for line in lines for p in line["points"] if metric in p]
    low = min([100 * s["mean"] for s in spreads if s["mean"] is not None], default=0.0)
    axes.set_ylim(max(-3.0, low - 0.08 * (103 - low) - 0.5), 103)


def _log(axes: Any, ticks: Sequence[float]) -> None:
    axes.set_xscale("log")
    there = sorted(set(ticks))
    axes.set_xticks(there, [f"{tick:g}" for tick in there])
    axes.set_xticks([], minor=True)


def _legend(axes: Any) -> None:
    style: dict[str, Any] = {"frameon": False, "fontsize": 9, "handlelength": 2.6}
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), edgecolor=LINE, **style)
