"""The report's section on what is left of a class, and on whether blocks stand for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efface.report.plots import COLOURS, DASHES, MUTED, canvas, role

CLASS = ("linear_probe", "relearn_retain", "relearn_forget")
BLOCKS = "block_contrast"
CURVES = {"relearn_retain": "kept records only", "relearn_forget": "with a few forgotten records"}


def is_after(row: Mapping[str, Any]) -> bool:
    """Whether a finding belongs to this section."""
    return row["name"] in (*CLASS, BLOCKS)


def silent(finding: Mapping[str, Any]) -> bool:
    """Whether a finding of this section has no meaning here: no class, no blocks."""
    return is_after(finding) and finding.get("status") == "undefined"


def section(
    findings: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], salt: str
) -> dict[str, Any]:
    """All that the section shows; without a class or blocks those parts are empty.

    Args:
        findings: Of an audit.
        rows: The same as texts.
        salt: Unique on the page.
    """
    told = {f["name"]: f for f in findings if is_after(f) and not silent(f)}
    curves = [(told[n], title) for n, title in CURVES.items() if (told.get(n) or {}).get("series")]
    blocks = told.get(BLOCKS) or {}
    series = blocks.get("series") or {}
    groups = curves[0][0]["series"]["groups"] if curves else []
    return {
        "rows": [row for row in rows if row["name"] in CLASS and row["name"] in told],
        "curves": [relearn(f["series"], title, f"{salt}-{f['name']}") for f, title in curves],
        "legend": [
            {"label": g["label"], "place": role(g["label"], at)} for at, g in enumerate(groups)
        ],
        "blocks": blocks.get("sentence") or "",
        "ratios": ratios(series, f"{salt}-ratios") if series else "",
        "layers": [
            (layer["layer"], f"{layer['selected']:,} of {layer['blocks']:,}")
            for layer in series.get("layers", ())
        ],
    }


def relearn(series: Mapping[str, Any], title: str, salt: str) -> str:
    """How much of the class each model answers right while a copy is trained on.

    Args:
        series: A series of kind ``relearn``; its values are fractions.
        title: On what it is trained.
        salt: Unique on the page.
    """
    from matplotlib.ticker import MaxNLocator

    groups = series["groups"]
    names = ", ".join(str(group["label"]) for group in groups)
    label = f"{series['y_label']} against {series['x_label']}, {title}: {names}."
    with canvas(3.7, 2.8, label, salt) as (axes, out):
        axes.axhline(100 * series["half"], color=MUTED, lw=0.9, ls=(0, (1, 2)))
        for index, group in enumerate(groups):
            place = role(group["label"], index)
            y = [100 * value for value in group["y"]]
            style: dict[str, Any] = {"color": COLOURS[place], "ls": DASHES[place], "lw": 1.7}
            axes.plot(group["x"], y, "o", ms=3.5, **style)
        axes.set_ylim(-4, 104)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_title(title, loc="left")
        axes.set_xlabel(series["x_label"])
        axes.set_ylabel("class answered right, %")
    return out[0]


def ratios(series: Mapping[str, Any], salt: str) -> str:
    """The histogram of the blocks' ratios, and how far from 1 they lie on average, with chance.

    Args:
        series: A series of kind ``ratios``: ``edges`` in powers of ten, ``counts``, and the means
            ``contrast`` and ``chance`` (mean, 95 % point) of |ln ratio|.
        salt: Unique on the page.
    """
    label = f"Histogram of {series['x_label']} over the blocks, with the average by chance."
    with canvas(6.4, 2.8, label, salt) as (axes, out):
        chance, found = (v / math.log(10) for v in (series["chance"][0], series["contrast"]))
        axes.axvspan(-chance, chance, color=COLOURS[2], alpha=0.18, lw=0)
        counts, edges = np.asarray(series["counts"], dtype=float), series["edges"]
        axes.stairs(counts, edges, fill=True, color=COLOURS[1], alpha=0.55)
        for at in (-found, found):
            axes.axvline(at, color=COLOURS[1], lw=1.7)
        axes.grid(axis="x", visible=False)
        axes.set_ylim(bottom=0)
        there = np.flatnonzero(counts)
        low = min(-found, float(edges[there[0]]) if len(there) else 0.0) - 0.05
        high = max(found, float(edges[there[-1] + 1]) if len(there) else 0.0) + 0.05
        shown = _round(10**low, 10**high)
        axes.set_xticks([math.log10(value) for value in shown], [f"{v:g}" for v in shown])
        axes.set_xlim(low, high)
        axes.set_xlabel(f"{series['x_label']} (log scale)")
        axes.set_ylabel("blocks")
    return out[0]


def _round(low: float, high: float) -> list[float]:
    """Round numbers between two, as a logarithmic axis has them.

    >>> _round(0.15, 12.0), _round(0.8, 1.6)
    ([0.2, 0.5, 1.0, 2.0, 5.0, 10.0], [0.8, 1.0, 1.2, 1.5])
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps: tuple[float, ...] = (1, 2, 5) if len(powers) <= 5 else (1,)
    if high < 8 * low:
        steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    found = (float(f"{step * 10.0**power:.3g}") for power in powers for step in steps)
    return [value for value in found if low <= value <= high]
