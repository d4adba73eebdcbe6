"""What all benchmarks share: paired runs, foreign load, environment, and results as JSON.

Every comparison is made inside one process with one torch thread, its arms taking turns (A B A B),
and is read as the median of the ratios within a round: what slows the machine down for a while
slows down both. Ratios are of CPU seconds of the process, which for one thread that never waits is
what the clock of a quiet machine shows; ratios of wall seconds stand beside them.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parent / "results"
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
"""Processor features that matter for these numbers."""


@dataclass(frozen=True)
class Spent:
    """Seconds of one run, and CPU seconds that everything else on the machine used meanwhile."""

    wall: float
    cpu: float
    foreign: float


Round = Mapping[str, Spent]


def one_thread() -> None:
    """Hold torch to one thread; to be called before anything is timed."""
    import torch

    torch.set_num_threads(1)


def steady_memory() -> bool:
    """Keep glibc from handing memory back between steps, for all arms alike; whether it could.

    Else large batches are freed to the system and faulted in again at every step or not, as the
    heap happens to lie: up to a tenth of the time, in either arm, by luck.
    """
    trim_threshold, mmap_threshold, plenty = -1, -3, 1 << 30
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(k, plenty) for k in (trim_threshold, mmap_threshold))


def _children_cpu() -> float:
    """CPU seconds of finished children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _machine_cpu() -> float:
    """CPU seconds of all processes since the machine started; 0 where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
    except OSError:
        return 0.0
    user, nice, system, _idle, _wait, irq, soft = map(int, fields)
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def timed(work: Callable[[], object]) -> Spent:
    """Run once; work that returns what it spent itself (of a part of what it did) is believed."""
    gc.collect()
    machine, children = _machine_cpu(), _children_cpu()
    wall, cpu = time.perf_counter(), time.process_time()
    part = work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    children, used = _children_cpu() - children, _machine_cpu() - machine
    foreign = max(0.0, used - cpu - children)
    if isinstance(part, Spent):
        return Spent(part.wall, part.cpu, foreign * part.wall / wall)
    return Spent(wall, cpu + children, foreign)


def rounds(arms: Mapping[str, Callable[[], object]], n: int, warm: int = 1) -> list[Round]:
    """Run the arms in turn, ``n`` times over, after ``warm`` unmeasured turns."""
    for _ in range(warm):
        for work in arms.values():
            work()
    return [{name: timed(work) for name, work in arms.items()} for _ in range(n)]


def compared(
    name: str,
    measured: Sequence[Round],
    over: str,
    under: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    clock: Literal["cpu", "wall"] = "cpu",
    work: tuple[float, float] = (1, 1),
    **facts: Any,
) -> dict[str, Any]:
    """A check: the ratio of two arms' seconds, round by round, against its target.

    Args:
        name: What is compared.
        measured: From :func:`rounds`.
        over: The arm whose seconds are divided.
        under: The arm that they are divided by.
        at_most: The target, or
        at_least: the target; neither for a ratio that is only reported.
        clock: Which seconds the target is held against.
        work: How much the two arms do (samples, say) where they do unequal amounts: the ratio is
            then of seconds for one.
        facts: More to keep with the check.
    """
    pairs: list[dict[str, Any]] = []
    for both in measured:
        a, b = both[over], both[under]
        scale = work[1] / work[0]
        pairs.append(
            {
                "cpu": round(scale * a.cpu / b.cpu, 4),
                "wall": round(scale * a.wall / b.wall, 4),
                "seconds": [round(getattr(a, clock), 4), round(getattr(b, clock), 4)],
                "foreign_load": round((a.foreign + b.foreign) / (a.wall + b.wall), 2),
            }
        )
    return judged(
        name,
        [p[clock] for p in pairs],
        at_most=at_most,
        at_least=at_least,
        clock=clock,
        ratio=f"{over} / {under}",
        wall_median=round(statistics.median(p["wall"] for p in pairs), 4),
        foreign_load=round(statistics.median(p["foreign_load"] for p in pairs), 2),
        pairs=pairs,
        **({} if work == (1, 1) else {"work": list(work)}),
        **facts,
    )


def judged(
    name: str,
    values: Sequence[float],
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """A check: the median of values against its target (``passed`` is None without one)."""
    median = statistics.median(values)
    target = at_most if at_most is not None else at_least
    passed = None
    if at_most is not None:
        passed = median <= at_most
    elif at_least is not None:
        passed = median >= at_least
    return {
        "name": name,
        "bound": None if target is None else "at most" if at_most is not None else "at least",
        "target": target,
        "measured": short(median),
        "min": short(min(values)),
        "max": short(max(values)),
        "passed": passed,
        **facts,
    }


def short(value: float) -> float:
    """Four decimals, and of small numbers three digits.

    >>> short(1.23456), short(0.0000123456)
    (1.2346, 1.23e-05)
    """
    return round(value, 4) if abs(value) >= 0.01 else float(f"{value:.3g}")


def environment() -> dict[str, Any]:
    """Processor, versions and threads; nothing that names the machine."""
    import numpy
    import torch

    import efface

    model, flags = _processor()
    return {
        "processor": model,
        "flags": flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "efface": efface.__version__,
    }


def _processor() -> tuple[str, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor(), []
    rows = dict(line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in rows.items()}
    there = known.get("flags", known.get("Features", "")).split()
    return known.get("model name", platform.processor()), [f for f in FLAGS if f in there]


def write(benchmark: str, about: str, checks: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Write ``results/<benchmark>.json``, with anything more to keep, and print what came out."""
    RESULTS.mkdir(exist_ok=True)
    document = {
        "schema": "efface.benchmark/1",
        "benchmark": benchmark,
        "about": " ".join(about.split()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "checks": list(checks),
        **more,
    }
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    (RESULTS / f"{benchmark}.json").write_text(text + "\n")
    for check in checks:
        print(line(check), flush=True)


def line(check: Mapping[str, Any]) -> str:
    """A check in a line of text."""
    word = {True: "pass", False: "MISS", None: "    "}[check["passed"]]
    target = "" if check["target"] is None else f"  target {check['bound']} {check['target']}"
    spread = f"({check['min']} … {check['max']})"
    return f"{word}  {check['name']}: {check['measured']} {spread}{target}"
