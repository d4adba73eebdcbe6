"""How the demo's results are told: the report's story and the printed table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from efface.console import Run


def story(results: dict[str, Any], out: Path) -> dict[str, Any]:
    """What the report's template takes."""
    sections = []
    for section in results["sections"]:
        paths = [out / "audits" / cell / "audit.json" for cell in section["cells"]]
        sections.append(section | {"cells": [json.loads(path.read_text()) for path in paths]})
    first = results["sections"][0]["split"]
    return {
        "title": f"Forgetting on {results['task']}",
        "intro": "A network was trained, a copy of it pruned to "
        f"{results['sparsity']:.0%}, and both were made to forget. Every method is compared with "
        "models retrained without the forgotten records: the nearer to them, the better.",
        "task": f"{results['task']}, {first['forget'] + first['retain']:,} training records",
        "command": results["command"],
        "seed": results["seed"],
        "versions": results["versions"],
        "created": results["created"],
        "duration_seconds": results["cost"]["wall"],
        "notes": [
            "One training seed: intervals are over records, not over trainings.",
            "Hyper-parameters were chosen on other forget sets than these, never on the retrained "
            "models shown here.",
            "Sparse models are compared with models retrained under the same mask.",
        ],
        "sections": sections,
        "not_shown": [
            "That no trace of the records is left in the weights: the audit looks at behaviour.",
            "What an attacker with many shadow models could find about single records.",
            "How results vary over training seeds and over other forget sets.",
        ],
        "reproduce": [results["command"]],
    }


def table(run: Run, section: dict[str, Any]) -> str:
    """The table of one scenario: value (gap) per metric, gaps, time, verdict."""

    def cell(row: dict[str, Any], metric: str) -> str:
        found = row[metric]
        if found["value"] is None:
            return "—"
        gap = "" if found["gap"] is None else f" ({found['gap'] * 100:.1f})"
        return f"{found['value'] * 100:.1f}{gap}"

    def points(value: float | None) -> str:
        return "—" if value is None else f"{value * 100:.1f}"

    rows = [
        [
            row["model"],
            row["method"],
            *(cell(row, m) for m in ("ua", "ra", "ta", "mia_efficacy", "mia_auc")),
            points(row["average_gap"]),
            points(row["gap_a"]),
            "—" if row["rte_seconds"] is None else f"{row['rte_seconds']:.2f}",
            row["verdict"],
        ]
        for row in section["rows"]
    ]
    columns = [
        "model",
        "method",
        "UA",
        "RA",
        "TA",
        "MIA-eff",
        "MIA AUC",
        "gap",
        "gap-A",
        "s",
        "verdict",
    ]
    title = f"{section['heading']}: per cent, gap to retrain in brackets"
    return run.table(title, columns, rows)
