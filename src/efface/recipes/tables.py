"""A bench's results as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efface.console import Run
from efface.report.bench import said

COLUMNS = {
    "ua": "UA",
    "mia_efficacy": "MIA-eff",
    "ra": "RA",
    "ta": "TA",
    "mia_auc": "MIA AUC",
    "asr": "ASR",
    "probe": "probe",
    "mask_iou": "mask IoU",
}


def tables(console: Run, document: Mapping[str, Any]) -> str:
    """Rows (mean ± std, gap in brackets) for each scenario, or pooled ones, and the claims."""
    summary = document["summary"]
    scenarios = list(dict.fromkeys(entry.get("scenario", "") for entry in summary))
    parts = []
    if document.get("frugality"):
        title = f"{document['title']}, all scenarios: per cent"
        parts.append(console.table(title, *_pooled(document["frugality"])))
    for scenario in scenarios if not parts else ():
        mine = [entry for entry in summary if entry.get("scenario", "") == scenario]
        about = f", {scenario}" if scenario else ""
        title = f"{document['title']}{about}: per cent, gap in brackets"
        parts.append(console.table(title, *_rows(mine)))
    if document["claims"]:
        claims = [
            [
                *([claim["scenario"] or "all"] if len(scenarios) > 1 else []),
                claim["text"],
                claim["metric"],
                _difference(claim),
                said(claim),
            ]
            for claim in document["claims"]
        ]
        names = ["claim", "metric", "difference", "found"]
        names = ["scenario", *names] if len(scenarios) > 1 else names
        parts.append(console.table("", names, claims))
    return "\n".join(parts)


def _rows(entries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and the rows; what has become of the mask where there is one."""
    shown = [name for name in COLUMNS if any(name in e["metrics"] for e in entries)]
    masks = any(entry.get("trace_removed") for entry in entries)
    both = any(entry.get("trace_removed_between") for entry in entries)
    rows = [
        [
            entry["model"],
            entry["method"],
            *(_cell(entry["metrics"].get(name)) for name in shown),
            *([_trace(entry["trace_removed"])] if masks else []),
            *([_trace(entry["trace_removed_between"])] if both else []),
            *([_share(entry["cost"])] if masks else []),
            _percent(entry["average_gap"]["value"]),
            _percent(entry["gap_a"]["value"]),
            "—" if entry["seconds"]["mean"] is None else f"{entry['seconds']['mean']:.2f}",
            str(entry["n"]),
        ]
        for entry in entries
    ]
    more = [*(["both sides"] if both else []), "cost"]
    more = ["trace removed", *more] if masks else []
    names = ["model", "method", *(COLUMNS[n] for n in shown), *more, "gap", "gap-A", "s", "seeds"]
    return names, rows


def _pooled(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row for each method and fraction."""
    shown = {"ra": "RA", "ua": "UA", "ta": "TA", "gap_a": "gap-A"}
    rows = [
        [
            line["model"],
            point["name"],
            *(_cell(point.get(name)) for name in shown),
            "—" if "seconds" not in point else f"{point['seconds']['mean']:.2f}",
            str(point.get("ra", {"n": 0})["n"]),
        ]
        for line in found["lines"]
        for point in line["points"]
    ]
    return ["model", "method", *shown.values(), "s", "seeds"], rows


def _trace(found: Mapping[str, Any] | None) -> str:
    """The share of the trace that is gone, or that there is none."""
    if found is None:
        return "—"
    if found["value"] is None:
        return "no trace" if found["reason"].startswith("no trace") else "—"
    return f"{_percent(found['value'])} {_interval(found)}"


def _share(cost: Mapping[str, Any] | None) -> str:
    return "—" if cost is None else _percent(cost["mean"])


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.1f}"


def _interval(entry: Mapping[str, Any]) -> str:
    if entry["low"] is None:
        return ""
    return f"[{_percent(entry['low'])}, {_percent(entry['high'])}]"


def _difference(claim: Mapping[str, Any]) -> str:
    """Points, or seconds."""
    found = claim["difference"]
    if claim["metric"] == "seconds":
        found = {k: found[k] and found[k] / 100 for k in ("mean", "low", "high")}
    return f"{_percent(found['mean'])} {_interval(found)}".strip()


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "—"
    text = _percent(entry["mean"])
    if entry["std"] is not None:
        text += f" ± {_percent(entry['std'])}"
    return text if "gap" not in entry else f"{text} ({_percent(entry['gap'])})"
