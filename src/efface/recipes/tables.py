"""A bench's results as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from efface.console import Run

COLUMNS = {
    "ua": "UA",
    "mia_efficacy": "MIA-eff",
    "ra": "RA",
    "ta": "TA",
    "mia_auc": "MIA AUC",
    "asr": "ASR",
    "probe": "probe",
}


def tables(console: Run, document: Mapping[str, Any]) -> str:
    """Rows (mean ± std, gap in brackets), and the claims."""
    summary = document["summary"]
    shown = [name for name in COLUMNS if any(name in e["metrics"] for e in summary)]
    rows = [
        [
            entry["model"],
            entry["method"],
            *(_cell(entry["metrics"].get(name)) for name in shown),
            _percent(entry["average_gap"]["value"]),
            _percent(entry["gap_a"]["value"]),
            "—" if entry["seconds"]["mean"] is None else f"{entry['seconds']['mean']:.2f}",
            str(entry["n"]),
        ]
        for entry in summary
    ]
    names = ["model", "method", *(COLUMNS[n] for n in shown), "gap", "gap-A", "s", "seeds"]
    parts = [console.table(f"{document['title']}: per cent, gap in brackets", names, rows)]
    if document["claims"]:
        claims = [
            [
                claim["text"],
                claim["metric"],
                _difference(claim),
                claim["verdict"],
            ]
            for claim in document["claims"]
        ]
        parts.append(console.table("", ["claim", "metric", "difference", "found"], claims))
    return "\n".join(parts)


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
