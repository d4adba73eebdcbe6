"""Run the benchmarks one after the other, each in a process of its own, and write README.md.

    python benchmarks/run.py [loop] [data] [default_path] [imports] [audit]

Exit code 0 also when a target is missed: the tables say so. Run it on a machine that does little
else; the load that others caused is in the results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMES = ("loop", "data", "default_path", "imports", "audit")

INTRO = """# Benchmarks

`make bench` (or `python benchmarks/run.py [NAME …]`) runs them and writes `results/*.json` and this
file. Every comparison is paired: both arms take turns in one process with one torch thread, and the
number is the median of the ratios within a round, of CPU seconds where nothing else is said, with
the smallest and the largest in brackets. *Load* is what other processes used meanwhile, in cores.
The JSON files hold every round, versions and environment.

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
    return [*rows, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the benchmarks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    names = parser.parse_args().names or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "EFFACE_KEY": "benchmark"}
    for name in names:
        print(f"# {name}", flush=True)
        subprocess.run([sys.executable, HERE / f"{name}.py"], check=True, env=environment)
    files = [HERE / "results" / f"{name}.json" for name in NAMES]
    documents = [json.loads(file.read_text()) for file in files if file.is_file()]
    text = "\n".join([INTRO, *(row for document in documents for row in table(document))])
    (HERE / "README.md").write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
