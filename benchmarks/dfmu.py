"""DFMU: scoring over one plain pass, its memory, a whole request over retraining, and growth.

Scoring (512 records, half of D_f; hooks and sums included) against a plain forward and backward
pass for all weights over the same records in evaluation mode, in the same batches of 128; finding
the blocks is done before, and reported apart. Memory is what the process holds at most during the
pass, above what it held before, each in a process of its own. A whole request (copy, blocks,
scores, permutation test, edit, batch norm, recovery on 13 % of D_r, digests) against retraining:
``cifar10-small`` of the recipe ``dfmu2026``, on CIFAR-10 where it is at hand (see ``EFFACE_DATA``),
else on random images of its size. Retraining runs for two of its ten epochs, and counts five times.
Growth: 256 random images, filters as blocks.

    python benchmarks/dfmu.py [--quick]
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Round, compared, judged, line, one_thread, rounds, short, steady_memory, write
from torch import nn

import efface
from efface.data import chunks
from efface.errors import InputError
from efface.fitting import Fit
from efface.networks import MLP, AirNet, DigitsCNN, ResNet, ResNet18, ResNet20, ViT
from efface.placement import placed, preserved
from efface.recipes.recipe import source
from efface.sparsify.blocks import BlockScore, carried, contrast, draw, find_blocks
from efface.sparsify.units import refreshed_statistics
from efface.unlearn import DFMU, FineTune
from efface.unlearn.frugal import share

QUICK = "--quick" in sys.argv
BATCH, SAMPLE = 128, 512
KINDS = ("fisher", "activation")
PART = 2
"""Epochs of retraining that are run: time is in proportion."""
MOST_TIME, MOST_MEMORY, MOST_OF_RETRAINING = 1.1, 1.3, 0.05

SMALL, LARGE = (1, 8, 8), (3, 32, 32)
Case = tuple[Callable[[], nn.Module], tuple[int, ...]]
CASES: dict[str, Case] = {
    "DigitsCNN": (DigitsCNN, SMALL),
    "AirNet": (AirNet, LARGE),
    "ResNet-20": (ResNet20, LARGE),
    "ResNet-18": (ResNet18, LARGE),
    "ViT": (ViT, LARGE),
    "MLP 64-128-64-10": (partial(MLP, [64, 128, 64, 10]), SMALL),
    "MLP 3072-512-256-10": (partial(MLP, [3072, 512, 256, 10]), LARGE),
}


def _air(times: float) -> nn.Module:
    return AirNet(widths=tuple(int(times * w) for w in (32, 64, 128)))


def _residual(depth: int, width: int) -> nn.Module:
    return ResNet((depth,) * 3, (width, 2 * width, 4 * width))


GROWTH: dict[str, Case] = {
    **{f"AirNet, widths × {t:g}": (partial(_air, t), LARGE) for t in (0.5, 1, 2, 4)},
    **{f"ResNet-{6 * n + 2}": (partial(_residual, n, 16), LARGE) for n in (1, 3, 5, 9)},
    **{f"ResNet-20, widths × {t}": (partial(_residual, 3, 16 * t), LARGE) for t in (2, 3)},
    **{f"ViT, {d} blocks": (partial(ViT, depth=d), LARGE) for d in (2, 5, 10, 20)},
}


class Scored:
    """A network, random records, and the two passes over them."""

    def __init__(self, case: Case, records: int = SAMPLE) -> None:
        make, shape = case
        luck = torch.Generator().manual_seed(0)
        data = (torch.rand(records, *shape, generator=luck), torch.arange(records) % 10)
        settings = efface.Settings(epochs=1, batch_size=BATCH, lr=0.01)
        self.task = efface.Task(make, data, data, fit=settings)
        torch.manual_seed(0)
        self.network = self.task.network()
        self.fit = Fit(self.task, 0)
        self.blocks = find_blocks(self.task, self.network)
        self.order = torch.randperm(records, generator=luck)

    def score(self, kind: str, records: int | None = None) -> None:
        """What DFMU does."""
        where = self.order[:records]
        half = len(where) // 2
        score = BlockScore(kind=kind)  # type: ignore[arg-type]
        carried(self.network, self.blocks, score, where[:half], where[half:], self.fit)

    def plain(self, records: int | None = None) -> None:
        """A forward and a backward pass, and nothing else."""
        network, device = self.network, self.fit.device
        with preserved(network), placed(network, device, train=False):
            network.eval()
            plan = chunks(self.order[:records], BATCH)
            for batch in self.task.records.batches(plan, device):
                loss = self.task.loss(self.fit.logits(network, batch), batch.targets)
                loss.backward()  # type: ignore[no-untyped-call]
                network.zero_grad(set_to_none=True)

    def find(self) -> None:
        """The blocks."""
        find_blocks(self.task, self.network)


# -- time and memory of scoring -------------------------------------------------------------------


def times(name: str) -> list[dict[str, Any]]:
    """Scoring over the plain pass, for each kind; and finding the blocks."""
    made = Scored(CASES[name])
    arms: dict[str, Callable[[], object]] = {"plain pass": made.plain}
    arms |= {kind: partial(made.score, kind) for kind in KINDS} | {"find_blocks": made.find}
    small, slow = CASES[name][1] == SMALL, name == "ResNet-18"
    done = rounds(arms, 3 if QUICK or slow else 41 if small else 7)
    facts: dict[str, Any] = {"blocks": len(made.blocks), "records": SAMPLE}
    checks = [
        compared(
            f"{name}: scoring ({kind}) / plain pass",
            done,
            kind,
            "plain pass",
            at_most=MOST_TIME,
            **facts,
        )
        for kind in KINDS
    ]
    text = f"{name}: finding its {len(made.blocks)} blocks / plain pass"
    return [*checks, compared(text, done, "find_blocks", "plain pass", **facts)]


def memory(name: str) -> list[dict[str, Any]]:
    """Peak memory of scoring over that of the plain pass."""
    arms = ("fisher", "plain")
    found = [{arm: peak(name, arm) for arm in arms} for _ in range(1 if QUICK else 2)]
    return [
        judged(
            f"{name}: memory of scoring (fisher) / plain pass",
            [one["fisher"] / one["plain"] for one in found],
            at_most=MOST_MEMORY,
            mebibytes=[[short(one[arm] / 2**20) for arm in arms] for one in found],
        )
    ]


def peak(name: str, arm: str) -> int:
    """Bytes that a process of its own held more at most."""
    command = [sys.executable, __file__, "--peak", name, arm]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def tell_peak(name: str, arm: str) -> None:
    """Print by how many bytes the process grows in a pass; after a first one over four records."""
    made = Scored(CASES[name])
    run = made.plain if arm == "plain" else partial(made.score, arm)
    made.plain(4)
    run(records=4)
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _kibibytes("VmRSS")
    run()
    print(1024 * (_kibibytes("VmHWM") - before))


def _kibibytes(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


# -- a whole request ------------------------------------------------------------------------------


def small_cifar() -> tuple[efface.Task, str]:
    """The task of the recipe, or random images in its place; and which of them it is."""
    plan = source("dfmu2026")[1].size["cifar10-small"].task
    try:
        return plan.build(), "CIFAR-10"
    except InputError:
        luck = torch.Generator().manual_seed(0)
        labels = torch.arange(10_000) % 10
        images = torch.randint(0, 206, (10_000, *LARGE), dtype=torch.uint8, generator=luck)
        images += (5 * labels).to(torch.uint8).view(-1, 1, 1, 1)
        settings = replace(efface.Settings(), **plan.fit)
        return efface.Task(AirNet, (images, labels), (images, labels), fit=settings), "random"


def requests() -> list[dict[str, Any]]:
    """DFMU as it is by default and as in the recipe against retraining, in turn."""
    task, which = small_cifar()
    begun, part = (replace(task, fit=replace(task.fit, epochs=n)) for n in (1, PART))
    model = efface.TrainedModel(task, efface.train(begun).network)
    split = efface.Split.by_class(task, 3)
    ways = {
        "DFMU": DFMU(),
        "DFMU with three epochs": DFMU(inner=FineTune(epochs=3)),
        "DFMU without recovery": DFMU(inner=FineTune(epochs=0)),
    }
    arms: dict[str, Callable[[], object]] = {
        name: partial(efface.forget, model, split, way) for name, way in ways.items()
    }
    arms["DFMU"]()  # warm
    arms["retraining"] = partial(efface.retrain, part, efface.Split.by_class(part, 3))
    done = rounds(arms, 1 if QUICK else 3, warm=0)
    facts: dict[str, Any] = {"work": (task.fit.epochs, PART), "images": which}
    most = MOST_OF_RETRAINING
    checks = [
        compared(f"{way} / retraining", done, way, "retraining", at_most=most, **facts)
        for way in ways
    ]
    checks[0]["stages"] = stages(model, split)
    return checks


def stages(model: efface.TrainedModel, split: efface.Split) -> dict[str, float]:
    """CPU seconds of what DFMU does, each by itself: the median of five."""
    model, fit, method = model.copy(), Fit(split.task, 0), DFMU()
    part = share(split, method.fraction, fit)
    blocks = find_blocks(split.task, model.network)
    forget, retain = (draw(fit, where, 256, "scored") for where in (part.forget, part.retain))
    score: Callable[[], Any] = lambda: carried(  # noqa: E731
        model.network, blocks, method.score, forget, retain, fit
    )
    found = score()
    steps: dict[str, Callable[[], object]] = {
        "copy": model.copy,
        "digest": lambda: model.digest,
        "draw a part of D_r": lambda: share(split, method.fraction, fit),
        "find blocks": lambda: find_blocks(split.task, model.network),
        "score": score,
        "permutation test": lambda: contrast(found, blocks, fit.generator("contrast")),
        "batch norm": lambda: refreshed_statistics(model, part.retain, fit),
        "recovery": lambda: method.inner(model, part, fit),
    }
    done = rounds(steps, 1 if QUICK else 5)
    return {step: short(statistics.median(r[step].cpu for r in done)) for step in steps}


# -- growth ---------------------------------------------------------------------------------------


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time against the size of the network and the number of its blocks: a row for each."""
    for name, case in GROWTH.items():
        made = Scored(case, 2 * BATCH)
        arms: dict[str, Callable[[], object]] = {
            "plain pass": made.plain,
            "scoring": partial(made.score, "fisher"),
            "finding blocks": made.find,
        }
        done = rounds(arms, 1 if QUICK else 3)
        ratio = statistics.median(r["scoring"].cpu / r["plain pass"].cpu for r in done)
        size = sum(p.numel() for p in made.network.parameters())
        row = {"network": name, "parameters": size, "blocks": len(made.blocks)}
        row |= {f"{arm}, s": middle(done, arm) for arm in arms}
        rows.append({**row, "scoring / plain pass": short(ratio)})
        print(*rows[-1].values(), sep="  ", flush=True)
    ratios = [row["scoring / plain pass"] for row in rows]
    name = "scoring (fisher) / plain pass: median of the sizes below"
    return [judged(name, ratios, at_most=MOST_TIME)]


def middle(done: list[Round], arm: str) -> float:
    """The median of an arm's CPU seconds."""
    return short(statistics.median(r[arm].cpu for r in done))


def main() -> None:
    one_thread()
    steady_memory()
    warnings.simplefilter("ignore")  # of models that hardly know a class
    rows: list[dict[str, Any]] = []
    parts: list[Callable[[], list[dict[str, Any]]]] = [partial(times, name) for name in CASES]
    parts += [requests, partial(growth, rows), *(partial(memory, name) for name in CASES)]
    checks = []
    for part in parts:
        checks += (found := part())
        print(*map(line, found), sep="\n", flush=True)
    if not QUICK:  # which is a look at whether it runs, no result
        write("dfmu", __doc__.split("\n    python")[0], checks, curve=rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        one_thread()
        tell_peak(*sys.argv[2:4])
    else:
        main()
