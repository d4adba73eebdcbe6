"""The index of the update log: finding the steps of 1,000 records among a million logged steps.

A log of 10⁶ steps of 128 of 50,000 records (every epoch in a fresh order) is written through the
public API, with a commit per epoch and 64 bytes of payload a step, so that segments and digests are
there but weigh nothing. Then it is opened for reading and asked for the steps of 1,000 records
drawn anew each time. *Warm*: the file is in the system's cache, and CPU time is counted, which is
what the clock of a quiet machine shows; *cold*: the file was dropped from the cache first and the
log is opened anew, by the clock, foreign load included.

    python benchmarks/log_index.py [STEPS]

Takes about four minutes on a quiet machine, and half a gigabyte of disk.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from measure import judged, one_thread, write

from efface.updates.log import UpdateLog

STEPS, BATCH, RECORDS, ASKED = 1_000_000, 128, 50_000, 1_000
REPEATS = 15


def build(folder: Path, steps: int) -> dict[str, Any]:
    """Write the log; what it took."""
    draw = np.random.default_rng(0)
    payload = bytes(64)
    tags = [f"{number:016x}" for number in range(RECORDS)]
    begun, slowest, memory = time.perf_counter(), 0.0, _peak()
    cpu = time.process_time()
    with UpdateLog.create(folder, {}, tags, frames_per_segment=4096) as log:
        step = epoch = 0
        while step < steps:
            order = draw.permutation(RECORDS)
            for start in range(0, RECORDS, BATCH):
                if step < steps:
                    log.append(step, epoch, order[start : start + BATCH], payload, lr=0.1)
                    step += 1
            before = time.perf_counter()
            log.commit()
            slowest = max(slowest, time.perf_counter() - before)
            epoch += 1
        log.finish()
        info = log.info()
    return {
        "seconds": round(time.perf_counter() - begun, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "slowest_commit_seconds": round(slowest, 2),
        "peak_memory_growth_mib": round((_peak() - memory) / 1024, 1),
        "segments": info["segments"],
        "index_bytes": info["index_bytes"],
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def drop_from_cache(path: Path) -> None:
    """Let the system forget a file's pages."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def milliseconds(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall time of one run."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return 1000 * (time.process_time() - cpu), 1000 * (time.perf_counter() - wall)


class Times(NamedTuple):
    """Milliseconds of look-ups: cold ones by the clock, warm ones CPU and by the clock."""

    cold: list[float]
    warm: list[float]
    warm_wall: list[float]
    found: int


def looked_up(folder: Path, asked: int) -> Times:
    """Look up records drawn anew each time."""
    draw = np.random.default_rng(1)

    def numbers() -> npt.NDArray[np.int64]:
        return draw.choice(RECORDS, asked, replace=False)

    def opened(wanted: npt.NDArray[np.int64]) -> None:
        with UpdateLog.open(folder) as log:
            log.steps_of(wanted)

    cold = []
    for _ in range(REPEATS):
        drop_from_cache(folder / "index.sqlite")
        cold.append(milliseconds(partial(opened, numbers()))[1])
    (folder / "index.sqlite").read_bytes()
    with UpdateLog.open(folder) as log:
        times = [milliseconds(partial(log.steps_of, numbers())) for _ in range(REPEATS + 1)]
        found = len(log.steps_of(numbers()))
    return Times(cold, [cpu for cpu, _ in times[1:]], [wall for _, wall in times[1:]], found)


def main() -> None:
    """Build, look up, write the results."""
    one_thread()
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "log"
        built = build(folder, steps)
        many, one = looked_up(folder, ASKED), looked_up(folder, 1)
    pairs = steps * (RECORDS / -(-RECORDS // BATCH))
    setting = {"steps": steps, "batch": BATCH, "records": RECORDS}
    wall = {"wall_median": round(statistics.median(many.warm_wall), 1)}
    found = {"steps_found": many.found}
    checks = [
        judged("1,000 records, warm (ms)", many.warm, at_most=100, **setting, **found, **wall),
        judged("1,000 records, cold, with opening (ms)", many.cold),
        judged("one record, warm (ms)", one.warm),
        judged("one record, cold, with opening (ms)", one.cold),
        judged("index (GB)", [built["index_bytes"] / 1e9], at_most=0.3),
        judged("bytes per pair of record and step", [built["index_bytes"] / pairs]),
        judged("writing the log: CPU µs per step", [1e6 * built["cpu_seconds"] / steps], **built),
    ]
    write("log_index", __doc__ or "", checks)


if __name__ == "__main__":
    main()
