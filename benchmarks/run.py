"""Run the benchmarks one after the other, each in a process of its own, and write README.md.

    python benchmarks/run.py [NAME …] [--reference-code CHECKOUT] [--tables]

``reference`` compares with public code and runs only where a checkout of it is given; ``--tables``
runs nothing and writes README.md from the results that are there. Exit code 0 also when a target is
missed: the tables say so. Run it on a machine that does little else; the load that others caused is
in the results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMES = (
    "loop",
    "data",
    "default_path",
    "imports",
    "audit",
    "curvature",
    "scaling",
    "compact",
    "unprune",
    "updates",
    "recording",
    "log_index",
    "partial",
    "topology",
    "dfmu",
    "reference",
)

INTRO = """# Benchmarks

`make bench` (or `python benchmarks/run.py [NAME …]`) runs them and writes `results/*.json` and this
file. Every comparison is paired: both arms take turns in one process with one torch thread, and the
number is the median of the ratios within a round, of CPU seconds where nothing else is said, with
the smallest and the largest in brackets. *Load* is what other processes used meanwhile, in cores.
The JSON files hold every round, versions and environment.

`reference` runs only with `--reference-code CHECKOUT`, a checkout of OPTML-Group/Unlearn-Sparse,
which is imported from there and no part of this repository.

`proxy_defaults.py` is not about speed: it chose the built-in tasks' defaults.
"""


def table(document: Mapping[str, Any]) -> list[str]:
    """A benchmark's part of the README."""
    env = document["environment"]
    rows = [
        f"## {document['benchmark']}",
        "",
        document["about"],
        "",
        f"{document['date'][:10]}, {env['processor']} ({env['cores']} cores; "
        f"{', '.join(env['flags'])}), torch {env['torch']}, Python {env['python']}, "
        f"efface {env['efface']}.",
        "",
        "| what | target | measured | | load |",
        "| --- | --- | --- | --- | --- |",
    ]
    for check in document["checks"]:
        bound = {"at most": "≤", "at least": "≥", None: ""}[check["bound"]]
        target = "–" if check["target"] is None else f"{bound} {check['target']:g}"
        measured = f"{check['measured']:.3g} ({check['min']:.3g} … {check['max']:.3g})"
        word = {True: "met", False: "**missed**", None: "reported"}[check["passed"]]
        load = check.get("foreign_load", "")
        rows.append(f"| {check['name']} | {target} | {measured} | {word} | {load} |")
    rows += ["", *curve(document.get("curve", ()))]
    return [*rows, *exponents(document.get("fits", ()), document.get("picture"))]


def curve(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row per point: what was varied, and what came out."""
    if not points:
        return []
    rows = [f"| {' | '.join(points[0])} |", f"|{' --- |' * len(points[0])}"]
    for point in points:
        cells = [f"{v:,}" if isinstance(v, int) else str(v) for v in point.values()]
        rows.append(f"| {' | '.join(cells)} |")
    return [*rows, ""]


def exponents(fits: Sequence[Mapping[str, Any]], picture: str | None) -> list[str]:
    """A row per method: how its time grows along each axis, and what the largest size took."""
    if not fits:
        return []
    axes = list(dict.fromkeys(fit["axis"] for fit in fits))
    rows = [
        f"| method | {' | '.join(f'exponent, {axis}' for axis in axes)} | seconds at the largest |",
        f"| --- |{' --- |' * (len(axes) + 1)}",
    ]
    for name in dict.fromkeys(fit["method"] for fit in fits):
        own = {fit["axis"]: fit for fit in fits if fit["method"] == name}
        cells = [f"{own[axis]['exponent']:.2f}" for axis in axes]
        longest = ", ".join(f"{own[axis]['seconds'][-1]:.2g}" for axis in axes)
        rows.append(f"| {name} | {' | '.join(cells)} | {longest} |")
    return [*rows, "", *([f"![time against size]({picture})", ""] if picture else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the benchmarks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--reference-code", type=Path, metavar="CHECKOUT")
    parser.add_argument("--tables", action="store_true", help="run nothing, write README.md")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(NAMES)):
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    if "reference" in given.names and not given.reference_code:
        parser.error("reference needs --reference-code CHECKOUT")
    names = given.names or [n for n in NAMES if n != "reference" or given.reference_code]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "EFFACE_KEY": "benchmark"}
    for name in () if given.tables else names:
        print(f"# {name}", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py")]
        if name == "reference":
            command += ["--reference-code", str(given.reference_code)]
        subprocess.run(command, check=True, env=environment)
    results = HERE / "results"
    files = [results / f"{name}.json" for name in NAMES if (results / f"{name}.json").is_file()]
    files += sorted(results.glob("reference_*.json"))
    documents = [json.loads(file.read_text()) for file in files]
    text = "\n".join([INTRO, *(row for document in documents for row in table(document))])
    (HERE / "README.md").write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
