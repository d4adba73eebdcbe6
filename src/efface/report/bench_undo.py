"""What a bench says of undoing logged updates: forgotten or damaged, against keep, on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efface.report.bench_masks import is_base
from efface.report.plots import COLOURS, DASHES, LINE, MUTED, canvas
from efface.report.words import DASH, interval, number, significant

Entry = Mapping[str, Any]

SIDES = {
    "memory": "Still remembered of D_f",
    "damage": "Lost beside it",
}
_TONES = {"forgets": "good", "remembers": "bad", "over-forgets": "bad"}
_PLACES = (1, 3, 4)
_SHOWN = ("bf16", "int8")


def undo_section(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the page shows beside the usual tables; None for a bench without a log.

    Args:
        document: What ``results.json`` holds.
    """
    kept = document.get("storage")
    if not kept:
        return None
    names = list(dict.fromkeys(line["scenario"] for line in document["over_keep"]))
    figures = []
    for i, name in enumerate(names):
        lines = [line for line in document["over_keep"] if line["scenario"] == name]
        figures += [
            {"title": name or "the forget set", **_figure(part, f"keep{i}-{k}")}
            for k, part in enumerate(_parts(lines))
        ]
    return {"storage": _storage(kept), "figures": figures}


def undone(entries: Sequence[Entry]) -> dict[str, Any] | None:
    """The table that tells forgetting from damage, of one model in one scenario.

    Returns:
        ``rows``, and whether there is a ``target`` class; None where no row was measured for it.
    """
    if not any("moved" in entry["metrics"] for entry in entries):
        return None
    target = any("target_test_accuracy" in entry["metrics"] for entry in entries)
    return {"target": target, "rows": [_row(entry) for entry in entries]}


def _row(entry: Entry) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        found: float | None = entry["metrics"].get(name, {}).get("mean")
        return found

    distance = mean("weight_distance")
    word = "" if is_base(entry["method"]) else entry.get("verdict", "")
    tone = "warn" if "damaged" in word else _TONES.get(word, "flat")
    return {
        "method": entry["method"],
        "base": is_base(entry["method"]),
        "word": word,
        "tone": tone,
        "icon": {"good": "✓", "bad": "✗", "warn": "!"}.get(tone, "?"),
        **{kind: number(entry[kind]["mean"], "percent", False) for kind in SIDES},
        **{
            f"{kind}_interval": interval(entry[kind]["low"], entry[kind]["high"], "percent")
            for kind in SIDES
        },
        "target": number(mean("target_test_accuracy"), "percent", False),
        "other": number(mean("other_test_accuracy"), "percent", False),
        "share": number(mean("steps_share"), "percent", False),
        "moved": number(mean("moved"), "percent", False),
        "distance": DASH if distance is None else f"{significant(distance)} ×",
    }


# -- against the keep fraction ------------------------------------------------------------------


def _parts(lines: Sequence[Entry]) -> list[Sequence[Entry]]:
    """A few lines to a figure."""
    size = len(_PLACES)
    return [lines[i : i + size] for i in range(0, len(lines), size)]


def _figure(lines: Sequence[Entry], salt: str) -> dict[str, Any]:
    many = len({line["series"] for line in lines}) > 1
    labels = [f"{line['model']}, {line['series']}" if many else line["model"] for line in lines]
    return {
        "legend": [
            {"label": label, "place": place} for label, place in zip(labels, _PLACES, strict=False)
        ],
        "panels": [
            {"title": f"{text}, points", "svg": over_keep(lines, kind, f"{salt}-{kind}")}
            for kind, text in SIDES.items()
        ],
    }


def over_keep(lines: Sequence[Entry], kind: str, salt: str) -> str:
    """What is remembered, or lost, against the keep fraction, with intervals over seeds.

    Args:
        lines: ``model`` and ``points`` (``keep`` and the two sides as spreads).
        kind: ``memory`` or ``damage``.
        salt: Unique on the page.
    """
    names = ", ".join(line["model"] for line in lines)
    alt = f"{SIDES[kind]}, in points, against the share of each update that is kept: {names}."
    with canvas(3.5, 2.7, alt, salt) as (axes, out):
        axes.axhline(0.0, color=MUTED, lw=1.2, ls=(0, (4, 2)))
        for place, line in zip(_PLACES, lines, strict=False):
            colour = COLOURS[place]
            there = [p for p in line["points"] if p[kind]["mean"] is not None]
            x = [100 * p["keep"] for p in there]
            y = [100 * p[kind]["mean"] for p in there]
            axes.plot(x, y, "o", color=colour, ls=DASHES[place], lw=1.6, ms=3.5)
            for at, point in zip(x, there, strict=True):
                if point[kind]["low"] is not None:
                    ends = [100 * point[kind][end] for end in ("low", "high")]
                    axes.plot([at, at], ends, color=colour, lw=1.2, alpha=0.45)
        _keep_axis(axes)
    return out[0]


def _keep_axis(axes: Any) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("kept of each layer's update, %")


# -- on disk ------------------------------------------------------------------------------------


def _storage(kept: Sequence[Entry]) -> dict[str, Any]:
    """Bytes of a step for each model and keep fraction: a table and a picture."""
    rows = [
        {
            "model": entry["model"],
            "keep": number(entry["keep"], "percent"),
            "cells": [_bytes(entry["bytes"][kind]["mean"]) for kind in _SHOWN],
            "smaller": [f"{significant(entry['smaller'][kind]['mean'])} ×" for kind in _SHOWN],
            "norm": number(entry["norm"]["mean"], "percent"),
        }
        for entry in kept
    ]
    return {"kinds": _SHOWN, "rows": rows, "whole": _whole(kept), "svg": on_disk(kept, "on-disk")}


def _whole(kept: Sequence[Entry]) -> str:
    """The size of a whole update; of networks with and without batch norm, both."""
    return " or ".join(_bytes(size) for size in sorted({entry["whole"] for entry in kept}))


def _bytes(size: float) -> str:
    """A size with three digits.

    >>> _bytes(51234), _bytes(900)
    ('51.2 kB', '900 B')
    """
    for unit, scale in (("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{significant(size / scale)} {unit}"
    return f"{significant(size)} B"


def on_disk(kept: Sequence[Entry], salt: str) -> str:
    """Bytes of a step against the keep fraction, bf16 values: a thin line for each model.

    Args:
        kept: ``model``, ``keep``, ``bytes``, ``whole``.
        salt: Unique on the page.
    """
    alt = "Bytes of a logged step against the share of each layer's update that is kept."
    with canvas(5.2, 2.9, alt, salt) as (axes, out):
        for size in {entry["whole"] for entry in kept}:
            axes.axhline(size / 1e3, color=LINE, lw=1.4)
        for place, kind in zip(_PLACES, _SHOWN, strict=False):
            for model in dict.fromkeys(entry["model"] for entry in kept):
                mine = [entry for entry in kept if entry["model"] == model]
                x = [100 * entry["keep"] for entry in mine]
                y = [entry["bytes"][kind]["mean"] / 1e3 for entry in mine]
                style: dict[str, Any] = {"color": COLOURS[place], "ls": DASHES[place]}
                axes.plot(x, y, "o", lw=1.3, ms=3, alpha=0.6, **style)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_ylabel("kB per step")
        _keep_axis(axes)
    return out[0]
