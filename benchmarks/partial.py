"""What a partial wrapper costs over its inner method, for every way to pick and to redraw.

A fraction of 0.1 in every layer, around random labels on D_f and D_r with momentum. What each
optimiser step adds (keeping the old values, choosing, putting back) is timed inside a real run and
divided by the rest of that step. For the small networks, the whole request over the bare inner
method stands beside it, which also holds what is done once: a copy of the weights, and for
``gradient`` and ``saliency`` a gradient over D_f and D_r.

    python benchmarks/partial.py [--quick]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from measure import compared, judged, line, one_thread, rounds, steady_memory, write
from torch import nn

import efface
from efface.fitting import Fit, Params
from efface.networks import AirNet, DigitsCNN, ResNet18
from efface.unlearn import LayerwisePartial, RandomLabel
from efface.unlearn.places import Pick, Redraw

QUICK = "--quick" in sys.argv
PICKS: tuple[Pick, ...] = get_args(Pick)
REDRAWS: tuple[Redraw, ...] = get_args(Redraw)
MOST = 0.05


@dataclass(frozen=True)
class Case:
    """A network, its images, and how long to train."""

    name: str
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    records: int
    batch: int
    epochs: int

    def make(self) -> tuple[efface.TrainedModel, efface.Split]:
        """A model of random images, and a class of ten to forget."""
        draw = torch.Generator().manual_seed(0)
        images = torch.randint(
            0, 256, (self.records, *self.shape), dtype=torch.uint8, generator=draw
        )
        data = (images if self.shape[0] == 3 else images / 255, torch.arange(self.records) % 10)
        settings = efface.Settings(epochs=1, batch_size=self.batch, lr=0.01, weight_decay=5e-4)
        task = efface.Task(self.network, data, data, fit=settings)
        return efface.TrainedModel(task, task.network()), efface.Split.by_class(task, 3)


CASES = (
    Case("ResNet-18, batches of 64", ResNet18, (3, 32, 32), 256, 64, 2),
    Case("ResNet-18, batches of 128", ResNet18, (3, 32, 32), 256, 128, 3),
    Case("AirNet, batches of 125", AirNet, (3, 32, 32), 1000, 125, 2),
    Case("DigitsCNN, batches of 64", DigitsCNN, (1, 8, 8), 1152, 64, 6),
)


class Timed:
    """Constraints before and after the guard's, which time what lies between them."""

    def __init__(self) -> None:
        self.spent: list[float] = []
        self.steps: list[float] = []
        self.at = self.last = 0.0

    def begin(self, params: Params) -> None:
        """The clock starts; the guard's part comes next."""
        self.at = time.process_time()
        if self.last:
            self.steps.append(self.at - self.last)
        self.last = self.at

    def end(self, params: Params) -> None:
        """The optimiser has moved: again the guard's part comes next."""
        self.at = time.process_time()

    def took(self) -> None:
        """The guard's part is over."""
        self.spent.append(time.process_time() - self.at)


class After:
    """The constraint behind the guard."""

    def __init__(self, clock: Timed) -> None:
        self.begin = self.end = lambda params: clock.took()


@dataclass(frozen=True)
class Spied:
    """An inner method with the clock behind the guard."""

    inner: RandomLabel
    clock: Timed

    name = title = paper = "spied"
    needs = frozenset({"retain", "forget"})

    def __call__(self, trained: efface.TrainedModel, split: efface.Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        self.inner(trained, split, fit.with_(constraint=After(self.clock)))


def per_step(
    case: Case, model: efface.TrainedModel, split: efface.Split, pick: Pick, redraw: Redraw
) -> dict[str, Any]:
    """What a step's guard takes, over the rest of that step; the first of a run left out."""
    clock = Timed()
    copy = model.copy()
    inner: Any = Spied(RandomLabel(epochs=3 if QUICK else case.epochs), clock)
    fit = Fit(model.task, 0, subject=copy).with_(constraint=clock)
    LayerwisePartial(inner, 0.1, pick, redraw)(copy, split, fit)
    parts = [a + b for a, b in zip(clock.spent[::2], clock.spent[1::2], strict=True)]
    ratios = [1 + p / (s - p) for p, s in zip(parts[1:], clock.steps[1:], strict=False)]
    name = f"{case.name}: a step with {pick}, {redraw} / without"
    fact = {"guard_ms": round(1e3 * sorted(parts)[len(parts) // 2], 3)}
    return judged(name, ratios, at_most=1 + MOST, clock="cpu", steps=len(ratios), **fact)


def whole(
    case: Case, model: efface.TrainedModel, split: efface.Split, pairs: list[tuple[Pick, Redraw]]
) -> list[dict[str, Any]]:
    """Requests over the bare inner method, in turn."""
    inner = RandomLabel(epochs=1 if QUICK else case.epochs)
    arms: dict[str, Callable[[], object]] = {"inner": lambda: efface.forget(model, split, inner)}
    for pick, redraw in pairs:
        method = LayerwisePartial(inner, 0.1, pick, redraw)
        arms[f"{pick}, {redraw}"] = lambda m=method: efface.forget(model, split, m)  # type: ignore[misc]
    done = rounds(arms, 1 if QUICK else 3)
    return [
        compared(f"{case.name}: a whole request with {arm} / inner", done, arm, "inner")
        for arm in arms
        if arm != "inner"
    ]


def main() -> None:
    one_thread()
    steady_memory()
    checks: list[dict[str, Any]] = []
    for case in CASES[3:] if QUICK else CASES:
        case = replace(case, records=128) if QUICK else case
        model, split = case.make()
        pairs = [(pick, redraw) for redraw in REDRAWS for pick in PICKS]
        checks += [per_step(case, model, split, *pair) for pair in pairs]
        if "ResNet" not in case.name:
            checks += whole(case, model, split, pairs)
    if QUICK:  # a look at whether it runs, no result
        print(*map(line, checks), sep="\n")
    else:
        write("partial", __doc__.split("\n    python")[0], checks)


if __name__ == "__main__":
    main()
