"""What moving the mask costs: over the bare inner method, and against retraining and pruning again.

Un-pruning with two epochs of fine-tuning inside against those two epochs alone (what choosing,
switching on and pruning again add), and against the reference: training on the retained data and
pruning as the model was. The checkpoint difference is a replay of the first epochs, and a copy.
AirNet, 32×32 random images, one class of ten to forget.

    python benchmarks/unprune.py [--quick]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from measure import Round, compared, line, one_thread, rounds, timed, write

import efface
from efface.networks import AirNet
from efface.sparsify import IMP, OMP, OneShot, Pruner
from efface.unlearn import Chain, CheckpointDifference, FineTune, FromDense, Unlearner, Unprune

QUICK = "--quick" in sys.argv
RECORDS = 400 if QUICK else 1000
EPOCHS, KEPT = 14, 2
TWO = FineTune(epochs=2)


def make() -> tuple[efface.Task, efface.Split]:
    """A task of random images, and a class to forget."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (RECORDS, 3, 32, 32), dtype=torch.uint8, generator=draw)
    data = (images, torch.arange(RECORDS) % 10)
    settings = efface.Settings(epochs=EPOCHS, batch_size=125, lr=0.05)
    task = efface.Task(AirNet, data, data, fit=settings)
    return task, efface.Split.by_class(task, 3)


def overhead(task: efface.Task, split: efface.Split, kind: str, pruner: Pruner) -> dict[str, Any]:
    """Un-pruning against its inner method alone."""
    short = replace(task, fit=replace(task.fit, epochs=1))
    model = efface.prune(efface.train(short), pruner)
    arms: dict[str, Callable[[], object]] = {
        "unprune": lambda: efface.forget(model, split, Unprune(TWO)),
        "inner": lambda: efface.forget(model, split, TWO),
    }
    done = rounds(arms, 2 if QUICK else 5)
    name = f"un-pruning ({kind}) around two epochs / those two epochs"
    return compared(name, done, "unprune", "inner", at_most=1.1, records=RECORDS)


def against_retraining(task: efface.Task, split: efface.Split) -> list[dict[str, Any]]:
    """Ways to move the mask against the reference, and against that of IMP's many rounds."""
    dense = efface.train(task, rewind=KEPT)
    sparse = efface.prune(dense, OMP(sparsity=0.9), keep_dense=True)
    difference = FromDense(CheckpointDifference())
    ways: dict[str, Unlearner] = {
        "un-pruning, two epochs inside": Unprune(TWO),
        "checkpoint difference": difference,
        "checkpoint difference and one epoch": Chain(difference, FineTune(epochs=1)),
    }
    done: Round = {
        name: timed(lambda way=way: efface.forget(sparse, split, way))  # type: ignore[misc]
        for name, way in ways.items()
    }
    reference = dict(done)
    iterated = efface.prune(dense, IMP(sparsity=0.9))
    for name, model in (("OMP", sparse), ("IMP", iterated)):
        reference[name] = timed(
            lambda like=model: efface.retrain(  # type: ignore[misc]
                task, split, model=like, like="repruned", initial="model"
            )
        )
    checks = [
        compared(
            f"{name} / retraining and pruning again (OMP)", [reference], name, "OMP", at_most=0.1
        )
        for name in ways
    ]
    name = "un-pruning, two epochs inside"
    text = f"{name} / retraining and pruning again (IMP, {IMP().rate:g} a round to 0.9)"
    return [*checks, compared(text, [reference], name, "IMP", at_most=0.1)]


def main() -> None:
    one_thread()
    task, split = make()
    whole = OneShot(sparsity=0.9, recovery=0)
    filters = OneShot(sparsity=0.5, recovery=0, granularity="filter")
    checks = [overhead(task, split, "weights", whole), overhead(task, split, "filters", filters)]
    checks += against_retraining(task, split)
    if QUICK:  # a look at whether it runs, no result
        print(*map(line, checks), sep="\n")
    else:
        write("unprune", __doc__.split("\n    python")[0], checks)


if __name__ == "__main__":
    main()
