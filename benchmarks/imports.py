"""What importing efface costs beside torch, and how soon the command line answers.

Fresh interpreters, taking turns; seconds are of the child. ``efface --help`` must not import torch
and is judged by the clock on the wall.

    python benchmarks/imports.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

from measure import compared, judged, one_thread, rounds, write

TOUCH = "import efface; [getattr(efface, name) for name in efface.__all__]"
HELP = "import sys; sys.argv = ['efface', '--help']; from efface.__main__ import main; main()"
LOOK = f"""
try:
    {HELP}
except SystemExit:
    pass
print('torch' in sys.modules, file=sys.stderr)
"""


def python(code: str) -> None:
    """Run code in a fresh interpreter."""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def help_seconds() -> float:
    """Wall seconds of one ``efface --help``."""
    started = time.perf_counter()
    python(HELP)
    return time.perf_counter() - started


def help_imports_torch() -> bool:
    """Whether ``efface --help`` leaves torch among the imported modules."""
    done = subprocess.run([sys.executable, "-c", LOOK], check=True, capture_output=True, text=True)
    return done.stderr.strip().endswith("True")


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    one_thread()
    arms = {
        "efface": partial(python, TOUCH),
        "torch": partial(python, "import torch"),
        "nothing": partial(python, "pass"),
    }
    done = rounds(arms, 7)
    before = os.times()
    seconds = [help_seconds() for _ in range(7)]
    after = os.times()
    cpu = (after.children_user + after.children_system) - (
        before.children_user + before.children_system
    )
    facts: dict[str, Any] = {
        "cpu_seconds_each": round(cpu / len(seconds), 3),
        "interpreter_alone_seconds": round(
            statistics.median(each["nothing"].wall for each in done), 3
        ),
    }
    imported = float(help_imports_torch())
    checks = [
        compared("import efface, every public name", done, "efface", "torch", at_most=1.3),
        judged("efface --help, wall seconds", seconds, at_most=0.5, **facts),
        judged("efface --help imports torch (0: no, 1: yes)", [imported], at_most=0.0),
    ]
    write("imports", __doc__.split("\n    python")[0], checks)


if __name__ == "__main__":
    main()
