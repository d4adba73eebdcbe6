"""How long training takes here: a few timed steps, for estimates that are told before the work."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from efface.data import Stream
from efface.fitting import Fit
from efface.task import Task


def seconds_per_image(task: Task, steps: int = 6) -> float:
    """Seconds that one image costs in a training step of a task on this machine's CPU."""
    fit, size = Fit(task), min(task.fit.batch_size, len(task.records))
    network, settings = fit.fresh(), replace(task.fit, epochs=1)

    def few(count: int) -> float:
        start = time.monotonic()
        positions = torch.arange(min(count * size, len(task.records)))
        fit(network, fit.descend, {"all": Stream(positions)}, settings)
        return (time.monotonic() - start) / len(positions)

    few(1)
    return few(steps)
