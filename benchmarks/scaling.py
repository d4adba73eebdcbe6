"""How the time of every unlearner grows: with |D_f|, with |D_r|, and with the network.

Every method that needs no more than D_f and D_r runs with its own defaults, on random images, one
epoch where it trains (GA: five). One size changes at a time: |D_f| and |D_r| on ThreeConv, the
number of parameters by the widths of AirNet. A time is the smallest of the repetitions, which are
spread over the run, in CPU seconds of one thread. The exponent is the slope of a straight line
through log(seconds) over log(size): 0 where the size does not matter, 1 where time is proportional
to it; fixed costs draw it below 1. IU looks at no more than 1,000 records of D_r one by one.

    python benchmarks/scaling.py [METHOD …]
"""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from measure import RESULTS, Spent, judged, one_thread, steady_memory, timed, write
from torch import nn

import efface
from efface.errors import EffaceError
from efface.networks import AirNet, ThreeConv
from efface.unlearn import build, methods
from efface.unlearn.base import Unlearner, needs_of

FORGET, RETAIN = 64, 256
REPETITIONS = 2
BUDGET = 300.0
"""Seconds after which no further repetition is begun."""

AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "forget": ("records of D_f", (32, 64, 128, 256, 512)),
    "retain": ("records of D_r", (128, 256, 512, 1024)),
    "parameters": ("parameters", (8, 16, 32, 64)),
}
"""Axis → what it is, and its values (for the network: the width of AirNet's first block)."""

LIMIT = 1.1
"""No method may grow faster than in proportion (with some room for noise)."""


@dataclass(frozen=True)
class Point:
    """One size of everything."""

    axis: str
    value: int

    @property
    def forget(self) -> int:
        """Records of D_f."""
        return self.value if self.axis == "forget" else FORGET

    @property
    def retain(self) -> int:
        """Records of D_r."""
        return self.value if self.axis == "retain" else RETAIN

    def network(self) -> nn.Module:
        """A fresh network."""
        if self.axis != "parameters":
            return ThreeConv()
        return AirNet(widths=(self.value, 2 * self.value, 4 * self.value))

    @property
    def size(self) -> int:
        """Where the point lies on its axis."""
        if self.axis != "parameters":
            return self.value
        return sum(p.numel() for p in self.network().parameters())


POINTS = [Point(axis, value) for axis, (_, values) in AXES.items() for value in values]


@cache
def case(point: Point) -> tuple[efface.Split, nn.Module]:
    """Data, and a network that has seen them once."""
    n = point.forget + point.retain
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 10
    images = torch.randint(0, 206, (n, 3, 32, 32), dtype=torch.uint8, generator=draw)
    images += (5 * labels).to(torch.uint8).view(-1, 1, 1, 1)
    settings = efface.Settings(epochs=1, batch_size=64, lr=0.01, schedule="constant")
    task = efface.Task(point.network, (images, labels), (images, labels), fit=settings)
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[torch.linspace(0, n - 1, point.forget).long()] = True
    split = efface.Split.of(task, chosen, {"kind": "ids", "n": point.forget})
    return split, efface.train(task, device="cpu").network


def run(method: Unlearner, point: Point) -> Callable[[], object]:
    """The method as ``efface.forget`` runs it, without copy and lineage."""
    split, start = case(point)
    model = efface.TrainedModel(split.task, copy.deepcopy(start))
    return partial(method, model, split, efface.Fit(split.task, subject=model))


def able() -> dict[str, Unlearner]:
    """Every method that can run on this data: no wrappers, nothing that needs a class or a mask."""
    found: dict[str, Unlearner] = {}
    for name in methods():
        try:
            method = build(name)
        except EffaceError:  # an option without a default
            continue
        wraps = any(isinstance(value, Unlearner) for value in vars(method).values())
        if not wraps and needs_of(method) <= {"retain", "forget"}:
            found[name] = method
    return found


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Exponent of a power law, and its largest relative error at a point."""
    x, y = np.log(sizes), np.log(seconds)
    exponent, constant = np.polyfit(x, y, 1)
    return float(exponent), float(np.expm1(np.abs(y - exponent * x - constant).max()))


def measure(chosen: Mapping[str, Unlearner]) -> dict[tuple[str, Point], list[Spent]]:
    """Times of every method at every point."""
    times: dict[tuple[str, Point], list[Spent]] = {}
    for point in POINTS:
        case(point)
    for method in chosen.values():
        run(method, POINTS[0])()
    began = time.monotonic()
    for repetition in range(REPETITIONS):
        print(f"# repetition {repetition + 1}", flush=True)
        for point in POINTS:
            for name, method in chosen.items():
                if repetition == 0 or time.monotonic() - began < BUDGET:
                    times.setdefault((name, point), []).append(timed(run(method, point)))
    return times


def fits(
    names: Sequence[str], times: Mapping[tuple[str, Point], Sequence[Spent]]
) -> list[dict[str, Any]]:
    """A row per method and axis: sizes, seconds, exponent."""
    rows = []
    for name in names:
        for axis in AXES:
            points = [point for point in POINTS if point.axis == axis]
            seconds = [min(spent.cpu for spent in times[name, point]) for point in points]
            exponent, error = slope([point.size for point in points], seconds)
            rows.append(
                {
                    "method": name,
                    "axis": axis,
                    "exponent": round(exponent, 3),
                    "largest_error_of_fit": round(error, 3),
                    "sizes": [point.size for point in points],
                    "seconds": [round(value, 4) for value in seconds],
                }
            )
    return rows


def draw(rows: Sequence[Mapping[str, Any]]) -> None:
    """One panel per axis, both scales logarithmic: ``results/scaling.svg``."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    names = list(dict.fromkeys(row["method"] for row in rows))
    colours = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
    with mpl.rc_context({"svg.hashsalt": "scaling", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, (axis, (words, _)) in zip(
            figure.subplots(1, len(AXES), sharey=True), AXES.items(), strict=True
        ):
            for row in (row for row in rows if row["axis"] == axis):
                i = names.index(row["method"])
                style = {"color": colours[i % 20], "marker": "osD^v"[i % 5]}
                axes.loglog(row["sizes"], row["seconds"], lw=1.2, ms=4, label=names[i], **style)
            if axis != "parameters":
                sizes = AXES[axis][1]
                axes.set_xticks(sizes, labels=[str(size) for size in sizes])
                axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(words)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("CPU seconds, one thread")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
        RESULTS.mkdir(exist_ok=True)
        figure.savefig(RESULTS / "scaling.svg", format="svg", metadata={"Date": None})


def judgements(
    rows: Sequence[Mapping[str, Any]], times: Mapping[Any, Sequence[Spent]]
) -> list[dict[str, Any]]:
    """The steepest method along each axis."""
    everything = [spent for each in times.values() for spent in each]
    wall, foreign = sum(s.wall for s in everything), sum(s.foreign for s in everything)
    found = []
    for axis, (words, _) in AXES.items():
        here = {row["method"]: row["exponent"] for row in rows if row["axis"] == axis}
        steepest = max(here, key=lambda name: here[name])
        title = f"largest exponent in {words} ({steepest}), of {len(here)} methods"
        load = round(foreign / wall, 2)
        found.append(
            judged(title, list(here.values()), foreign_load=load)
            | {"bound": "at most", "target": LIMIT, "measured": here[steepest]}
            | {"passed": here[steepest] <= LIMIT}
        )
    return found


def main() -> None:
    os.environ.setdefault("EFFACE_KEY", "benchmark")
    one_thread()
    steady_memory()
    chosen = able()
    if sys.argv[1:]:
        chosen = {name: chosen[name] for name in sys.argv[1:]}
    times = measure(chosen)
    rows = fits(list(chosen), times)
    draw(rows)
    about = __doc__.split("\n    python")[0]
    write("scaling", about, judgements(rows, times), fits=rows, picture="results/scaling.svg")
    for row in rows:
        print(f"{row['method']:20} {row['axis']:11} {row['exponent']:6.2f} {row['seconds']}")
    assert all(math.isfinite(row["exponent"]) for row in rows)


if __name__ == "__main__":
    main()
