"""Time: a few timed steps for estimates told before the work, and what the work has taken."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from efface.cost import Stopwatch
from efface.data import Stream
from efface.files import write_atomic
from efface.fitting import Fit
from efface.placement import pick_device
from efface.task import Task


def seconds_per_image(task: Task, device: str = "auto", steps: int = 6) -> float:
    """Seconds that one image costs in a training step of a task, here, on a device."""
    fit, size = Fit(task, device=pick_device(device)), min(task.fit.batch_size, len(task.records))
    network, settings = fit.fresh(), replace(task.fit, epochs=1)

    def few(count: int) -> float:
        start = time.monotonic()
        positions = torch.arange(min(count * size, len(task.records)))
        fit(network, fit.descend, {"all": Stream(positions)}, settings)
        return (time.monotonic() - start) / len(positions)

    few(1)
    return few(steps)


class Spent:
    """What a command has cost, runs before this one included: killed ones up to their last reading.

    Args:
        path: Keeps the wall seconds.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.watch = path, Stopwatch()
        try:
            self.earlier = float(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            self.earlier = 0.0

    def read(self) -> dict[str, Any]:
        """The cost so far; its wall seconds are written down."""
        cost = self.watch.read()
        cost["wall"] += self.earlier
        write_atomic(self.path, json.dumps(cost["wall"]).encode())
        return cost
