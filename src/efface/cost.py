"""What a piece of work cost: wall and CPU seconds, threads, and what else the machine was doing."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from dataclasses import dataclass, field
from typing import Any

import torch


class Stopwatch:
    """Measures from its making to :meth:`read`."""

    def __init__(self) -> None:
        self.wall, self.cpu, self.machine = time.monotonic(), time.process_time(), _machine_busy()

    def read(self) -> dict[str, Any]:
        """Seconds of wall and CPU, torch threads, and foreign load in cores (None if unknown)."""
        wall, cpu = time.monotonic() - self.wall, time.process_time() - self.cpu
        busy = _machine_busy()
        foreign = None
        if busy is not None and self.machine is not None and wall > 0.05:
            foreign = round(max(0.0, (busy - self.machine - cpu) / wall), 2)
        return {
            "wall": wall,
            "cpu": cpu,
            "threads": torch.get_num_threads(),
            "foreign_load": foreign,
            "machine": machine(),
        }


def _machine_busy() -> float | None:
    """CPU seconds that all processes of the machine have used, where the system tells."""
    try:
        with open("/proc/stat") as file:
            fields = [int(v) for v in file.readline().split()[1:]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _wait, irq, soft = fields[:7]
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def machine() -> str:
    """A short fingerprint of processor kind, number of cores and GPU: times compare only within."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    text = f"{platform.machine()}/{_processor()}/{os.cpu_count()}/{gpu}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    import numpy

    import efface

    return {
        "efface": efface.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


@dataclass
class Meter:
    """What a command has done so far; shared by all handles derived from one fit.

    ``wall_before`` and ``cpu_before`` are seconds that a killed run of the command had spent.
    """

    images: dict[str, int] = field(default_factory=dict)
    calls: int = 0
    wall_before: float = 0.0
    cpu_before: float = 0.0
    placement: str = ""
    fits: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Meter) -> None:
        """Count what another meter counted, as of one further fit for each of its own."""
        for name, n in other.images.items():
            self.images[name] = self.images.get(name, 0) + n
        self.wall_before += other.wall_before
        self.cpu_before += other.cpu_before
        self.placement = other.placement or self.placement
        self.fits += other.fits
