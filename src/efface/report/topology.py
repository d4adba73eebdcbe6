"""The report's section on the pruned topology: numbers beside each other, and layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efface.report.plots import COLOURS, LINE, PAPER, canvas
from efface.report.words import number

PREFIX = "mask_"
KINDS = {"kept": 4, "removed": 3, "regrown": 1}
"""What an update did with a connection → the page's series colour."""
POINTS = {"before": (0, "o"), "after": (1, "o"), "ceiling": (2, "D")}
"""Whose overlap a mark shows → series colour and shape."""


def is_topology(row: Mapping[str, Any]) -> bool:
    """Whether a finding belongs to this section."""
    return str(row["name"]).startswith(PREFIX)


def section(
    findings: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], salt: str
) -> dict[str, Any] | None:
    """All that the section shows; None for a model without a topology.

    Args:
        findings: Of an audit.
        rows: The same as texts, in the same order.
        salt: Unique on the page.
    """
    mine = {f["name"]: f for f in findings if is_topology(f)}
    if all(f.get("status") == "undefined" for f in mine.values()):
        return None
    said = [(mine.get(name) or {}).get("sentence") for name in ("mask_trace", "mask_iou")]
    lead, _, more = next((text for text in said if text), "").partition(". ")
    series = next((f["series"] for f in mine.values() if f.get("series")), None)
    drawn = series["layers"] if series else []
    return {
        "lead": lead + "." * bool(more),
        "more": more,
        "rows": [row for row in rows if is_topology(row)],
        "svg": picture(drawn, salt) if drawn else "",
        "layers": [_layer(layer) for layer in drawn],
        "legend": [
            {"label": label, "place": KINDS[kind]}
            for kind, label in (
                ("kept", "kept by the update"),
                ("removed", "removed by it"),
                ("regrown", "regrown by it"),
            )
        ],
        "marks": [
            {"label": "before", "place": 0, "shape": "disc"},
            {"label": "after", "place": 1, "shape": "disc"},
            {"label": "two retrained models", "place": 2, "shape": "diamond"},
        ],
    }


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    """One layer's numbers as texts."""
    counts = {
        kind: (f"{layer[kind]:,}", _share(layer[f"{kind}_agree"], layer[kind])) for kind in KINDS
    }
    overlaps = {kind: number(layer[f"iou_{kind}"], "score") for kind in POINTS}
    return {"name": layer["name"], "total": f"{layer['total']:,}", **counts, **overlaps}


def _share(part: float, whole: float) -> str:
    return number(part / whole, "percent") if whole else ""


def picture(layers: Sequence[Mapping[str, Any]], salt: str) -> str:
    """For every layer what was kept, removed and regrown, and its overlap with retrained models.

    Args:
        layers: Names, counts and overlaps, as :func:`efface.auditing.topology.layers` gives them.
        salt: Unique on the page.

    Returns:
        One SVG element: bars (full colour where retrained models decide the same way, pale where
        they do not) and marks.
    """
    label = (
        "For each layer: bars of connections kept, removed and regrown by the update, in full "
        "colour where retrained models decide alike; and marks of the overlap with retrained "
        "models before, after, and between two of these."
    )
    with canvas(7.6, 0.8 + 0.3 * len(layers), label, salt) as (whole, out):
        figure: Any = whole.figure
        whole.remove()
        bars, marks = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        figure.get_layout_engine().set(wspace=0.06)
        for y, layer in enumerate(layers):
            _bar(bars, y, layer)
            _marks(marks, y, layer)
        for axes in (bars, marks):
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
        bars.set_yticks(range(len(layers)), [layer["name"] for layer in layers])
        bars.set_ylim(len(layers) - 0.45, -0.55)
        bars.set_xlim(0, 100)
        bars.set_xlabel("connections kept before or after, %")
        marks.set_xlim(-0.02, 1.02)
        marks.set_xlabel("overlap with retrained models (IoU)")
    return out[0]


def _bar(axes: Any, y: int, layer: Mapping[str, Any]) -> None:
    whole, start = sum(layer[kind] for kind in KINDS) or 1, 0.0
    for kind, place in KINDS.items():
        alike = layer[f"{kind}_agree"]
        for count, alpha in ((alike, 1.0), (layer[kind] - alike, 0.38)):
            width = 100 * count / whole
            if width:
                style: dict[str, Any] = {"color": COLOURS[place], "alpha": alpha, "lw": 0}
                axes.barh(y, width, 0.62, left=start, **style)
            start += width


def _marks(axes: Any, y: int, layer: Mapping[str, Any]) -> None:
    found = {kind: layer[f"iou_{kind}"] for kind in POINTS if layer[f"iou_{kind}"] is not None}
    axes.plot([min(found.values()), max(found.values())], [y, y], color=LINE, lw=2, zorder=1)
    for kind, value in found.items():
        place, shape = POINTS[kind]
        ring: dict[str, Any] = {"mfc": COLOURS[place], "mec": COLOURS[place], "ms": 6.5}
        if kind == "ceiling":
            ring |= {"mfc": PAPER, "mew": 1.8, "ms": 6}
        axes.plot(value, y, shape, **ring)
