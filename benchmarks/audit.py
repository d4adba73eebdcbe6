"""Auditing one model against its forward passes.

10,000 records of 10 classes: 1,000 to forget, 4,000 retained, 5,000 of test; the untouched original
and two retrained models are audited already, as in a table of many methods. The support-vector
attack and the bootstrap are left out (stubbed); what a whole audit costs with them is reported.

    python benchmarks/audit.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from measure import compared, one_thread, rounds, write
from torch import Tensor, nn

import efface
from efface.auditing import Cache
from efface.networks import MLP, ThreeConv
from efface.predict import logits
from efface.stats import Interval

N = 5_000
"""Training records, and as many for test."""


def records(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Random images whose brightness tells a little about their label."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(N) % 10
    noise = torch.rand(N, *shape, generator=draw)
    return 0.7 * noise + 0.03 * labels.view(-1, *[1] * len(shape)), labels


def no_bootstrap(values: Any, *_args: object, **_options: object) -> Interval:
    """The mean, without an interval."""
    mean = float(np.mean(values))
    return Interval(mean, mean, mean, len(values))


class Bench:
    """Models of one task, and the two arms."""

    def __init__(self, network: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
        settings = efface.Settings(epochs=1, batch_size=250, lr=0.02)
        task = efface.Task(network, records(shape, 0), records(shape, 1), fit=settings)
        self.split = efface.Split.random(task, 0.2)
        self.before = efface.train(task)
        method = efface.unlearn.FineTune(epochs=1, lr=0.01)
        self.after = efface.forget(self.before, self.split, method)
        self.references = [efface.retrain(task, self.split, seed=s) for s in (1, 2)]
        self.cache = Cache()
        self.audit()

    def audit(self) -> None:
        """Audit the model, never seen before: its weights are a little different every time."""
        with torch.no_grad():
            next(self.after.network.parameters()).mul_(1 + 1e-6)
        efface.audit(self.before, self.after, self.split, self.references, cache=self.cache)

    def without_svc_and_bootstrap(self) -> None:
        """The same with these two stubbed."""
        places = ("membership.bootstrap", "distance.bootstrap")
        with ExitStack() as stack:
            for place in places:
                stack.enter_context(patch(f"efface.auditing.{place}", no_bootstrap))
            stub = patch("efface.auditing.membership.svc_efficacy", lambda *_: 0)
            stack.enter_context(stub)
            self.audit()

    def forward(self) -> None:
        """The forward passes alone: D_f, D_r and D_t."""
        task, network = self.split.task, self.after.network
        for positions in (self.split.forget, self.split.retain):
            logits(network, task, task.records, positions)
        logits(network, task, task.test_records)


def measure(
    name: str, network: Callable[[], nn.Module], shape: tuple[int, ...], target: float | None
) -> list[dict[str, Any]]:
    """The ratio, and that of a whole audit."""
    bench = Bench(network, shape)
    short = rounds({"audit": bench.without_svc_and_bootstrap, "forward": bench.forward}, 5)
    whole = rounds({"audit": bench.audit, "forward": bench.forward}, 1, warm=0)
    return [
        compared(
            f"{name}, audit without SVC, bootstrap", short, "audit", "forward", at_most=target
        ),
        compared(f"{name}, whole audit", whole, "audit", "forward"),
    ]


def main() -> None:
    os.environ.setdefault("EFFACE_KEY", "benchmark")
    one_thread()
    checks = measure("ThreeConv, 32×32 images", ThreeConv, (3, 32, 32), 1.5)
    checks += measure("MLP, 8×8 images", partial(MLP, (64, 128, 64, 10)), (1, 8, 8), None)
    write("audit", __doc__.split("\n    python")[0], checks)


if __name__ == "__main__":
    main()
