"""Per-sample curvature against plain loops over single records.

The diagonal Fisher information (observed labels) against a loop that calls autograd once per
record and adds up squares; the inverse-Fisher product over 1,000 records against the released
recursion as a literal loop, which carries two vectors of all weights along. Random 32×32 images.
The table of sizes has seconds and MiB of tensors for the diagonal; where ``extrapolated`` is true,
the seconds are those of a timed part, scaled.

    python benchmarks/curvature.py [--quick]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from measure import compared, judged, line, one_thread, rounds, timed, write
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import efface
from efface.curvature import diagonal_fisher, gradient, inverse_fisher_product
from efface.networks import AirNet, ResNet18, ResNet20, ThreeConv
from efface.unlearn.influence import RELEASED

QUICK = "--quick" in sys.argv
TIMED = {"0.1 M": 20_000, "0.3 M": 20_000, "11 M": 200}
"""Records that are timed at most, for the table of sizes."""


@dataclass(frozen=True)
class Case:
    """A network, the records of a round, and the target of the diagonal."""

    network: Callable[[], nn.Module]
    records: int
    at_least: float | None


CASES = {
    "ThreeConv": Case(ThreeConv, 600, 1.4),
    "ResNet20": Case(ResNet20, 300, 1.4),
    "AirNet": Case(AirNet, 400, 1.4),
    "ResNet18": Case(ResNet18, 64, None),
}
SIZES: dict[str, Callable[[], nn.Module]] = {"0.1 M": ThreeConv, "0.3 M": AirNet, "11 M": ResNet18}


def make(network: Callable[[], nn.Module], records: int) -> tuple[efface.Fit, nn.Module]:
    """A handle on random images, and a network whose batch norms have seen some."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (records, 3, 32, 32), dtype=torch.uint8, generator=draw)
    data = (images, torch.arange(records) % 10)
    task = efface.Task(network, data, data)
    torch.manual_seed(0)
    made = task.network()
    with torch.no_grad():
        for _ in range(20):
            made(images[:64])
    return efface.Fit(task), made.eval()


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def record_gradients(fit: efface.Fit, network: nn.Module, position: int) -> tuple[Tensor, ...]:
    images, labels = fit.task.train
    x, y = images[position : position + 1], labels[position : position + 1]
    return torch.autograd.grad(F.cross_entropy(network(x), y), list(network.parameters()))


def plain_fisher(fit: efface.Fit, network: nn.Module, records: int) -> list[Tensor]:
    """One record at a time, nothing else."""
    total = [torch.zeros_like(p) for p in network.parameters()]
    for i in range(records):
        for sums, g in zip(total, record_gradients(fit, network, i), strict=True):
            sums.addcmul_(g, g)
    return [sums / records for sums in total]


def plain_recursion(fit: efface.Fit, network: nn.Module, records: int, v: Tensor) -> Tensor:
    """The released recursion: v and a multiple of the first record's gradient."""
    k, o = v.clone(), flat(record_gradients(fit, network, 0))
    for i in range(1, records):
        g = flat(record_gradients(fit, network, i))
        t = torch.dot(o, g)
        k -= torch.dot(k, g) / (RELEASED + t) * o
        o -= t / (RELEASED + t) * o
    return k


def diagonal(name: str, case: Case) -> dict[str, Any]:
    """The diagonal against the plain loop."""
    n = max(8, case.records // 10) if QUICK else case.records
    fit, network = make(case.network, n)
    everyone = torch.arange(n)
    mine = flat(diagonal_fisher(fit, network, everyone).values())
    wanted = flat(plain_fisher(fit, network, n))
    arms: dict[str, Callable[[], object]] = {
        "loop": lambda: plain_fisher(fit, network, n),
        "efface": lambda: diagonal_fisher(fit, network, everyone),
    }
    done = rounds(arms, 2 if QUICK else 5)
    milliseconds = {
        arm: round(1e3 * statistics.median(each[arm].cpu for each in done) / n, 3) for arm in arms
    }
    return compared(
        f"{name}, diagonal Fisher, plain loop / efface",
        done,
        "loop",
        "efface",
        at_least=case.at_least,
        records=n,
        weights=len(mine),
        route=fit.meter.facts["gradients"],
        milliseconds_per_sample=milliseconds,
        relative_error=float((mine - wanted).norm() / wanted.norm()),
    )


def inverse(name: str, damping: float) -> dict[str, Any]:
    """The exact inverse-Fisher product against the released loop, which computes something else."""
    n = 100 if QUICK else 1000
    fit, network = make(CASES[name].network, n)
    everyone = torch.arange(n)
    v = gradient(fit, network, everyone[:50])
    start = flat(v.values())
    arms: dict[str, Callable[[], object]] = {
        "efface": lambda: inverse_fisher_product(fit, network, everyone, v, damping=damping),
        "loop": lambda: plain_recursion(fit, network, n, start),
    }
    done = rounds(arms, 1 if QUICK else 3)
    return compared(
        f"{name}, inverse-Fisher product, λ = {damping:g}, efface / released recursion",
        done,
        "efface",
        "loop",
        at_most=1.2,
        records=n,
        solved=fit.meter.facts["inverse"],
    )


def tensor_peak(work: Callable[[], object]) -> int:
    """Most bytes of tensors that were alive at once, of those that the work made."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak: int = max(accumulate(n for _, n in changes))
    return peak


def size(weights: str, records: int) -> dict[str, Any]:
    """Seconds and MiB of the diagonal at a size."""
    part = min(records, 16 if QUICK else TIMED[weights])
    fit, network = make(SIZES[weights], max(part, 64))
    positions = torch.arange(part)
    diagonal_fisher(fit, network, positions[:8])
    spent = timed(lambda: diagonal_fisher(fit, network, positions))
    peak = tensor_peak(lambda: diagonal_fisher(fit, network, positions[:64]))
    return judged(
        f"diagonal Fisher, {weights} weights, {records:,} records: seconds",
        [spent.cpu * records / part],
        mib_of_tensors=round(peak / 2**20, 1),
        extrapolated=part < records,
        records_timed=part,
        foreign_load=round(spent.foreign / spent.wall, 2),
    )


def main() -> None:
    one_thread()
    checks = [diagonal(name, case) for name, case in CASES.items()]
    checks += [inverse(name, 1.0) for name in ("ResNet20", "AirNet", "ThreeConv")]
    checks += [size(weights, n) for weights in SIZES for n in (1000, 5000, 20_000)]
    if QUICK:  # a look at whether it runs, no result
        print(*map(line, checks), sep="\n")
    else:
        write("curvature", __doc__.split("\n    python")[0], checks)


if __name__ == "__main__":
    main()
