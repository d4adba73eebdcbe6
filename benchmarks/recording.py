"""Recording beside training: seconds of a step with the log over those without, and its memory.

Wall seconds, with a second core at hand: pruning and coding run in a thread beside the training.
CPU seconds of both threads stand in the results. Memory is the most that the process held in a fit
with the log, less that without, over the size of the network in float32: with one heap of the
allocator for all threads (MALLOC_ARENA_MAX=1), and as it comes.

    python benchmarks/recording.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Spent, compared, judged, one_thread, rounds, write

import efface
from efface.data import Stream
from efface.fitting import Fit
from efface.networks import ResNet18, ResNet20
from efface.task import Settings
from efface.trained import TrainedModel

KINDS: dict[str, tuple[Any, int, int]] = {
    "ResNet-18": (ResNet18, 128, 4),
    "ResNet-20": (ResNet20, 128, 12),
}
"""Network, records per step, steps per turn (the first is not counted)."""
ROUNDS = 7


def task_of(kind: str) -> efface.Task:
    """Random images: what they show does not matter here."""
    make, batch, steps = KINDS[kind]
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (batch * steps, 3, 32, 32), dtype=torch.uint8, generator=draw)
    y = torch.arange(len(x)) % 10
    settings = Settings(epochs=1, batch_size=batch, lr=0.01)
    return efface.Task(make, (x, y), (x[:10], y[:10]), fit=settings)


def steps(task: efface.Task, **options: Any) -> Spent:
    """Train for one epoch; what all steps but the first have taken."""
    marks = []

    def mark(label: str, step: int, total: int) -> None:
        marks.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as folder:
        fit = Fit(task, 0, path="train", progress=mark)
        model = TrainedModel(task, fit.fresh())
        recording = None
        if options:
            from efface.updates import Recorder

            recording = Recorder(Path(folder) / "log", **options).begin(fit, model.network)
        fit = replace(fit, recorder=recording)
        stream = {"retain": Stream(torch.arange(len(task.records)))}
        fit(model.network, fit.descend, stream, task.fit)
        if recording:
            recording.commit()
            end = time.perf_counter(), time.process_time()
            recording.finish("")
        else:
            end = marks[-1]
    return Spent(end[0] - marks[0][0], end[1] - marks[0][1], 0.0)


def peak(kind: str, keep: float, arenas: str) -> int:
    """Bytes that a process of its own held at most; keep 0 records nothing."""
    told = subprocess.run(
        [sys.executable, __file__, kind, str(keep)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | ({"MALLOC_ARENA_MAX": arenas} if arenas else {}),
    )
    return int(told.stdout)


def main() -> None:
    one_thread()
    checks = []
    for kind in KINDS:
        task = task_of(kind)
        arms = {"plain": partial(steps, task)}
        arms |= {f"keep {100 * k:g} %": partial(steps, task, keep=k) for k in (0.1, 0.01)}
        done = rounds(arms, ROUNDS)
        goals = {"keep 10 %": 0.05, "keep 1 %": 0.03} if kind == "ResNet-18" else {}
        for arm in list(arms)[1:]:
            most = 1 + goals.get(arm, 0.1)
            name = f"{kind}: step with the log / without, {arm}"
            checks.append(compared(name, done, arm, "plain", at_most=most, clock="wall"))
    size = 4 * sum(p.numel() for p in ResNet18().parameters())
    for arenas, which in (("1", "one heap for both threads"), ("", "a heap for each")):
        more = [
            (peak("ResNet-18", 0.1, arenas) - peak("ResNet-18", 0, arenas)) / size for _ in range(3)
        ]
        name = f"ResNet-18: memory of recording / network, keep 10 %, {which}"
        checks.append(judged(name, more, at_most=1.6))
    write("recording", __doc__.split("\n    python")[0], checks)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        one_thread()
        fraction = float(sys.argv[2])
        steps(task_of(sys.argv[1]), **({"keep": fraction} if fraction else {}))
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
    else:
        main()
