"""What a bench says of the masks of pruned models: a sentence, a picture, and the trace removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efface.report.plots import COLOURS, DASHES, canvas
from efface.report.words import interval, number

Entry = Mapping[str, Any]

LEVELS = (
    ("mask_iou_before", "the original's old mask", 0),
    ("mask_iou_ceiling", "two retrained models with one another", 2),
    ("mask_iou_initial", "the mask of the largest initial weights", 3),
    ("mask_iou_chance", "chance", 4),
)


def masks(entries: Sequence[Entry], salt: str) -> dict[str, Any] | None:
    """The section on masks of one model in one scenario.

    Args:
        entries: Its entries of the summary.
        salt: Unique on the page.

    Returns:
        ``lead`` and ``other`` in words, ``levels`` (label, value, place), ``rows`` of a table and
        ``svg``; None where the entries say nothing of masks.
    """
    base = next((e for e in entries if e["method"] == "original"), None)
    if base is None or "mask_iou_ceiling" not in base["metrics"]:
        return None
    found = base["metrics"]
    there = [(name, label, place) for name, label, place in LEVELS if name in found]
    scored = [e for e in entries if "mask_iou" in e["metrics"]]
    rows = [
        {"label": e["method"], **e["metrics"]["mask_iou"]}
        for e in scored
        if not is_base(e["method"])
    ]
    lines = [{"value": found[name]["mean"], "place": place} for name, _, place in there]
    return {
        "lead": " ".join(filter(None, (_lead(base), _both_sides(base)))),
        "both": "mask_trace_between" in found,
        "levels": [
            {"label": label, "value": number(found[name]["mean"], "score"), "place": place}
            for name, label, place in there
        ],
        "other": _other(found),
        "rows": [_row(entry) for entry in scored],
        "svg": overlaps(rows, lines, salt) if rows else "",
    }


def is_base(method: str) -> bool:
    """Whether a row is the original or a retrained model."""
    return method == "original" or method.split("-")[0] == "retrain"


def _lead(base: Entry) -> str:
    """Whether there is a trace, in words."""
    found = base["metrics"]
    ceiling, before = found["mask_iou_ceiling"]["mean"], found["mask_iou_before"]["mean"]
    trace = found["mask_trace"]
    said = interval(trace["low"], trace["high"], "score")
    both = f"{number(trace['mean'], 'score')} {said}".strip()
    share = base.get("trace_removed") or {}
    if share.get("value") is not None:
        return (
            f"The mask holds a trace of the forgotten records: two retrained models agree on "
            f"{number(ceiling, 'score')} of the connections that either keeps, but with the "
            f"original only on {number(before, 'score')}. The trace is {both}."
        )
    why = str(share.get("reason") or "")
    kind, _, rest = why.partition(": ")
    if kind == "no trace":
        return (
            f"No trace here: {rest}. Two retrained models share {number(ceiling, 'score')} of the "
            f"connections that either keeps, each of them and the original "
            f"{number(before, 'score')}; the difference is {both}. So no share of it that a "
            "method removes can be stated."
        )
    return f"The trace in the mask is {both}; {why or 'more seeds are needed to say more'}."


def _both_sides(base: Entry) -> str:
    """The trace measured from both sides, in words; nothing where it was not."""
    trace = base["metrics"].get("mask_trace_between")
    if trace is None:
        return ""
    said = interval(trace["low"], trace["high"], "score")
    there = trace["low"] is not None and trace["low"] > 0
    kinds = "Models trained with the records, and models trained without them, overlap "
    if there:
        return (
            f"{kinds}more with their own kind than with the other, by "
            f"{number(trace['mean'], 'score')} {said}: measured from both sides, the topology "
            "tells whether the records were there."
        )
    return f"{kinds}no more with their own kind than with the other: {said or 'few seeds'}."


def _other(found: Mapping[str, Any]) -> str:
    """The overlap with models of other initial weights, in words."""
    if "mask_iou_other_init" not in found:
        return ""
    return (
        "With a retrained model that began with other initial weights the original shares "
        f"{number(found['mask_iou_other_init']['mean'], 'score')}: whoever does not have the "
        "initial weights sees nothing in the mask."
    )


def _row(entry: Entry) -> dict[str, Any]:
    """What a method buys, and what it costs."""
    found, gone = entry["metrics"], entry.get("trace_removed") or {}
    none = str(gone.get("reason") or "").startswith("no trace")
    return {
        "method": entry["method"],
        "base": is_base(entry["method"]),
        "iou": _spread(found["mask_iou"], "score"),
        "iom": _spread(found["mask_iom"], "score"),
        "trace": "no trace" if none else number(gone.get("value"), "percent"),
        "interval": interval(gone.get("low"), gone.get("high"), "percent"),
        **_between(entry.get("trace_removed_between") or {}),
        "average": number(entry["average_gap"]["value"], "percent", False),
        "gap_a": number(entry["gap_a"]["value"], "percent", False),
        "cost": number((entry.get("cost") or {}).get("mean"), "percent"),
    }


def _between(gone: Mapping[str, Any]) -> dict[str, str]:
    """The share of the trace that is gone, measured from both sides."""
    none = str(gone.get("reason") or "").startswith("no trace")
    return {
        "between": "no trace" if none else number(gone.get("value"), "percent"),
        "between_interval": interval(gone.get("low"), gone.get("high"), "percent"),
    }


def _spread(found: Mapping[str, Any], kind: str) -> str:
    text = number(found["mean"], kind)
    return text if found["std"] is None else f"{text} ± {number(found['std'], kind)}"


def overlaps(
    rows: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], salt: str
) -> str:
    """Mask IoU of every method with its interval, and upright lines to read it against.

    Args:
        rows: ``label``, ``mean``, ``low`` and ``high``.
        lines: ``value`` and ``place``, the colour and dash.
        salt: Unique on the page.
    """
    label = "Overlap (IoU) with the masks of retrained models, by method."
    with canvas(7.4, 0.85 + 0.25 * len(rows), label, salt) as (axes, out):
        for line in lines:
            place = line["place"]
            axes.axvline(line["value"], color=COLOURS[place], ls=DASHES[place], lw=1.7)
        for y, row in enumerate(rows):
            if row["low"] is not None:
                ends = [max(0.0, row["low"]), min(1.0, row["high"])]
                axes.plot(ends, [y, y], color=COLOURS[1], lw=2, alpha=0.45)
            axes.plot(row["mean"], y, "o", color=COLOURS[1], ms=6.5)
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        most = max([row["mean"] for row in rows] + [line["value"] for line in lines])
        axes.set_xlim(0, min(1.02, 1.12 * most))
        axes.set_xlabel("mask IoU with models retrained and pruned again (right is closer)")
    return out[0]
