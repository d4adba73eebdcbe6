"""Series to inline SVG, drawn by matplotlib, coloured by the page's own style sheet.

Every function returns one ``<svg>`` element. Colours become CSS variables and the typeface the
page's, so that the same picture suits light and dark screens and paper. Ids carry a salt of their
own for each figure: several can share a page, and equal input gives equal bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholders, replaced by the style sheet's variables once the SVG is written.
_INK, MUTED, LINE, PAPER = "#a0b001", "#a0b002", "#a0b003", "#a0b00e"
COLOURS = ("#a0b004", "#a0b005", "#a0b006", "#a0b007", "#a0b008")
_VARIABLES = {
    _INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAPER: "var(--card)",
    **{colour: f"var(--s{index})" for index, colour in enumerate(COLOURS)},
}
_ROLES = {"before": 0, "original": 0, "after": 1, "retrained": 2, "retrain": 2}
DASHES: tuple[Any, ...] = ((0, (1.5, 1.5)), "-", (0, (5, 2)), (0, (4, 1.5, 1, 1.5)), "-")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def role(label: str, index: int) -> int:
    """Which of the page's series colours a group has: by its role, else by its place.

    >>> role("before", 2), role("after", 0), role("retrained", 0), role("something", 3)
    (0, 1, 2, 3)
    """
    return _ROLES.get(label, index % len(COLOURS))


def histogram(panel: Mapping[str, Any], x_label: str, salt: str) -> str:
    """One panel of a histogram series: the share of records per bin, one outline per group."""
    from matplotlib.ticker import MaxNLocator

    groups = panel["groups"]
    label = f"Histogram of {x_label} on the {panel['title']}: {_names(groups)}."
    with canvas(3.7, 2.6, label, salt) as (axes, out):
        for index, group in enumerate(groups):
            counts = np.asarray(group["counts"], dtype=float)
            if not counts.sum():
                continue
            share = 100 * counts / counts.sum()
            place = role(group["label"], index)
            if place == 1:
                axes.stairs(share, panel["edges"], fill=True, color=COLOURS[1], alpha=0.22)
            axes.stairs(
                share, panel["edges"], color=COLOURS[place], ls=DASHES[place], lw=1.6, zorder=3
            )
        axes.grid(axis="x", visible=False)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_title(panel["title"], loc="left")
        axes.set_xlabel(x_label)
        axes.set_ylabel("records, %")
    return out[0]


def bars(series: Mapping[str, Any], salt: str, mark: str | None = None) -> str:
    """Groups of upright bars, values as percent; a missing value is drawn as a dash.

    Args:
        series: A series of kind ``bars``; its values are fractions.
        salt: Unique on the page.
        mark: The label to point out: the forgotten class.
    """
    labels, groups = [str(label) for label in series["labels"]], series["groups"]
    width = 0.8 / max(len(groups), 1)
    alt = f"Bars of {series['y_label']} by {series['x_label']}: {_names(groups)}."
    with canvas(max(7.4, 0.34 * len(labels)), 2.9, alt, salt) as (axes, out):
        for index, group in enumerate(groups):
            at = np.arange(len(labels)) + (index - (len(groups) - 1) / 2) * width
            values = [None if v is None else 100 * v for v in group["values"]]
            colour = COLOURS[role(group["label"], index)]
            axes.bar(at, [v or 0 for v in values], width * 0.86, color=colour)
            for x, value in zip(at, values, strict=True):
                if value is None:
                    axes.text(x, 1, "–", ha="center", color=colour, fontsize=12)
        axes.grid(axis="x", visible=False)
        turned = len(labels) > 0 and max(map(len, labels)) > 70 / len(labels)
        shown = [f"{label} (forgotten)" if label == mark else label for label in labels]
        axes.set_xticks(
            range(len(labels)),
            shown,
            rotation=40 if turned else 0,
            ha="right" if turned else "center",
        )
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.set_ylim(0, 100)
        axes.set_xlabel(series["x_label"])
        axes.set_ylabel(f"{series['y_label']}, %")
    return out[0]


def curve(series: Mapping[str, Any], salt: str) -> str:
    """Lines through points, one for each group."""
    groups = series["groups"]
    alt = f"{series['y_label']} against {series['x_label']}: {_names(groups)}."
    with canvas(5.6, 3.0, alt, salt) as (axes, out):
        for index, group in enumerate(groups):
            place = role(group["label"], index)
            axes.plot(group["x"], group["y"], color=COLOURS[place], ls=DASHES[place], lw=1.7)
        if series.get("log_x"):
            _log_x(axes)
        axes.set_xlabel(series["x_label"])
        axes.set_ylabel(series["y_label"])
    return out[0]


def lying_bars(
    labels: Sequence[str],
    groups: Sequence[tuple[str, Sequence[float | None]]],
    x_label: str,
    salt: str,
    limit: float | None = None,
) -> str:
    """Groups of bars that lie on their side, first label on top.

    Args:
        labels: One for each row.
        groups: Name and values; the name decides the colour.
        x_label: Quantity and unit.
        salt: Unique on the page.
        limit: Right end of the axis.
    """
    height = 0.8 / max(len(groups), 1)
    alt = f"Bars of {x_label} for {', '.join(labels)}: {', '.join(name for name, _ in groups)}."
    tall = 0.75 + max(0.28, 0.17 * len(groups)) * len(labels)
    with canvas(7.4, tall, alt, salt) as (axes, out):
        for index, (name, values) in enumerate(groups):
            at = np.arange(len(labels)) + (index - (len(groups) - 1) / 2) * height
            lengths = [value or 0 for value in values]
            axes.barh(at, lengths, height * 0.86, color=COLOURS[role(name, index)])
        axes.grid(axis="y", visible=False)
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(labels) - 0.45, -0.55)
        axes.set_xlim(0, limit)
        axes.set_xlabel(x_label)
    return out[0]


def gap_dots(rows: Sequence[Mapping[str, Any]], floor: float | None, salt: str) -> str:
    """Average gap (disc) and gap-A (ring) of each method, with retraining's own noise.

    Args:
        rows: ``label``, ``average_gap`` and ``gap_a`` (fractions or ``None``).
        floor: Retraining's own average gap, a band from zero.
        salt: Unique on the page.
    """
    alt = "Average gap to retraining and gap-A in points, by method."
    with canvas(7.4, 0.85 + 0.27 * len(rows), alt, salt) as (axes, out):
        if floor is not None:
            axes.axvspan(0, 100 * floor, color=COLOURS[2], alpha=0.14, lw=0)
        for y, row in enumerate(rows):
            ends = [100 * row[key] for key in ("average_gap", "gap_a") if row[key] is not None]
            if len(ends) == 2:
                axes.plot(ends, [y, y], color=LINE, lw=2, zorder=1)
            if row["average_gap"] is not None:
                axes.plot(100 * row["average_gap"], y, "o", color=COLOURS[1], ms=7)
            if row["gap_a"] is not None:
                ring: dict[str, Any] = {"mfc": PAPER, "mec": COLOURS[3], "mew": 1.8, "ms": 6.5}
                axes.plot(100 * row["gap_a"], y, "D", **ring)
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel("gap to retraining, points (left is better)")
    return out[0]


def time_and_gap(rows: Sequence[Mapping[str, Any]], salt: str) -> str:
    """Time against average gap: fast and close is lower left.

    Args:
        rows: ``method``, ``rte_seconds`` (above zero), ``average_gap``, ``sparse`` (an open mark)
            and ``place`` (the colour). Rows of one method are joined by a line and named once.
        salt: Unique on the page.
    """
    methods: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        point = (row["rte_seconds"], 100 * row["average_gap"])
        methods.setdefault(row["method"], []).append(point)
    alt = "Time of each method against its average gap to retraining."
    with canvas(7.4, 3.7, alt, salt) as (axes, out):
        for points in methods.values():
            axes.plot(*zip(*points, strict=True), color=MUTED, lw=0.8, alpha=0.5, zorder=1)
        for row in rows:
            colour = COLOURS[row["place"]]
            fill = PAPER if row["sparse"] else colour
            style: dict[str, Any] = {"color": colour, "mfc": fill, "mew": 1.8, "ms": 7}
            axes.plot(row["rte_seconds"], 100 * row["average_gap"], "o", **style)
        _log_x(axes)
        axes.margins(x=0.12, y=0.12)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("time, seconds (log scale; left is faster)")
        axes.set_ylabel("average gap, points")
        _label_points(axes, methods)
    return out[0]


def interval_dots(rows: Sequence[Mapping[str, Any]], x_label: str, salt: str) -> str:
    """A value with its interval for each row (disc and line), beside a published one (ring).

    Args:
        rows: ``label``, ``value``, ``low``, ``high`` and ``paper`` (fractions or ``None``), and
            ``open`` (an open disc).
        x_label: Quantity and unit.
        salt: Unique on the page.
    """
    with canvas(7.4, 0.85 + 0.27 * len(rows), f"{x_label}, by method.", salt) as (axes, out):
        for y, row in enumerate(rows):
            if row["low"] is not None:
                ends = [100 * row["low"], 100 * row["high"]]
                axes.plot(ends, [y, y], color=COLOURS[1], lw=2, alpha=0.45, zorder=1)
            if row["value"] is not None:
                fill = PAPER if row["open"] else COLOURS[1]
                disc: dict[str, Any] = {"mfc": fill, "mec": COLOURS[1], "mew": 1.8, "ms": 6.5}
                axes.plot(100 * row["value"], y, "o", **disc)
            if row["paper"] is not None:
                ring: dict[str, Any] = {"mfc": "none", "mec": COLOURS[3], "mew": 1.8, "ms": 7}
                axes.plot(100 * row["paper"], y, "D", **ring)
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        most = max([100 * (row[k] or 0) for row in rows for k in ("value", "paper")], default=1)
        axes.set_xlim(0, 1.15 * most or 1)
        axes.set_xlabel(x_label)
    return out[0]


def against(
    groups: Sequence[Mapping[str, Any]],
    places: Sequence[int],
    x_label: str,
    y_label: str,
    salt: str,
) -> str:
    """Points with intervals joined by a line for each group; published points as rings.

    Args:
        groups: ``label``, ``points`` (``x``, ``mean``, ``low``, ``high``; fractions) and ``paper``
            (``x``, ``y`` in per cent).
        places: Which of the page's series colours each group has.
        x_label: Quantity and unit.
        y_label: The same.
        salt: Unique on the page.
    """
    alt = f"{y_label} against {x_label}: {_names(groups)}."
    with canvas(6.4, 3.2, alt, salt) as (axes, out):
        top = 5.0
        for place, group in zip(places, groups, strict=True):
            colour = COLOURS[place]
            x = [100 * point["x"] for point in group["points"]]
            y = [100 * point["mean"] for point in group["points"]]
            top = max([top, *y])
            axes.plot(x, y, "o", color=colour, ls=DASHES[place], lw=1.7, ms=4.5)
            for at, point in zip(x, group["points"], strict=True):
                if point["low"] is not None:
                    ends = [100 * point["low"], 100 * point["high"]]
                    axes.plot([at, at], ends, color=colour, lw=1.4, alpha=0.5)
            for point in group["paper"]:
                axes.plot(100 * point["x"], point["y"], "D", mfc="none", mec=colour, ms=7)
        axes.set_ylim(0, min(103, 1.1 * top))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    return out[0]


def _log_x(axes: Axes) -> None:
    """A logarithmic axis with numbers as people write them."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")


def _label_points(axes: Axes, methods: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Write each name beside its first point, at the first place where it covers nothing."""
    figure: Any = axes.figure
    figure.canvas.draw()  # the places below are in points of the final layout
    scale = 72 / figure.dpi

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = axes.transData.transform(point) * scale
        return float(x), float(y)

    marks = [place(point) for points in methods.values() for point in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in marks]
    left, bottom, right, top = (float(edge) * scale for edge in axes.bbox.extents)
    for name, points in methods.items():
        x, y = place(points[0])
        width = 5 * len(name) + 2
        options = []
        for rise in (0, 9, -9, 16, -16, 24, -24):
            for side, start in (("left", x + 8), ("right", x - 8 - width)):
                box = (start, y + rise - 5, start + width, y + rise + 5)
                inside = left <= box[0] and box[2] <= right and bottom <= box[1] and box[3] <= top
                if inside and not any(_overlap(box, other) for other in taken):
                    options.append((side, rise, box))
        side, rise, box = options[0] if options else ("left", 0, (x + 8, y - 5, x + width, y + 5))
        taken.append(box)
        style: dict[str, Any] = {"ha": side, "va": "center", "fontsize": 8.5, "color": MUTED}
        shift = (8 if side == "left" else -8, rise)
        text = axes.annotate(name, points[0], shift, textcoords="offset points", **style)
        text.set_in_layout(False)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _names(groups: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(str(group["label"]) for group in groups)


@contextmanager
def canvas(width: float, height: float, label: str, salt: str) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on; on leaving, the SVG is in the list."""
    import matplotlib as mpl
    from matplotlib.figure import Figure  # no pyplot: no global figure, no display

    out: list[str] = []
    settings: Any = {**_STYLE, "svg.hashsalt": salt}
    with mpl.rc_context(settings), warnings.catch_warnings():
        # The page's typeface is the browser's: glyphs that matplotlib's lacks do not matter.
        warnings.filterwarnings("ignore", message=r"(?s).*Glyph .* missing")
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.add_subplot(), out
        out.append(_svg(figure, label))


def _svg(figure: Figure, label: str) -> str:
    """The figure as one SVG element without prolog, stray ids or colours of its own."""
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    assert found is not None  # matplotlib always writes it
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.S)  # it would reach the whole page
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # the same in every figure, and nobody refers to it
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.S)
    # The typeface is the page's: newer matplotlib writes "font-family: …", older "font: …".
    body = re.sub(r"font-family: 'DejaVu Sans'[^;\"]*;? ?", "", body)
    body = re.sub(r"(font: (?:[\w-]+ )*[\d.]+px) 'DejaVu Sans'[^;\"]*", r"\1 var(--font)", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    return (
        f'<svg viewBox="0 0 {found[1]} {found[2]}" style="--w:{float(found[1]):.0f}" role="img" '
        f'aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{body}'
    )
