"""efface's loop against a raw torch loop written by hand: the limit.

Both train the same network from the same weights on the same batches, in the precision and layout
of efface's own rule, with ``torch.optim.SGD`` as it comes. The raw loop does nothing else: no
loss is read, nothing is seeded, checked or counted. The pruned networks (90 % of the weights) are
compared with the raw loop without any mask, and with one that multiplies by the mask after every
step. For the times, the C library is kept from handing memory back to the system between steps,
which else slows down either loop by luck; memory is measured with its usual settings.

    python benchmarks/loop.py
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from measure import compared, judged, one_thread, rounds, steady_memory, write
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import efface
from efface.mask import scope_names
from efface.networks import MLP, AirNet, DigitsCNN, ResNet20, ThreeConv
from efface.placement import rule
from efface.unlearn.retrain import train_from

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A network and how much work a run of it is."""

    network: Callable[[], nn.Module]
    records: int
    batch: int
    epochs: int
    pairs: int
    dense: float
    masked: float

    @property
    def digits(self) -> bool:
        """Whether it takes digits rather than colour images."""
        return self.network in (DigitsCNN, DIGITS_MLP)


DIGITS_MLP = partial(MLP, (64, 128, 64, 10))

CASES = {
    "AirNet": Case(AirNet, 750, 125, 1, 9, 1.03, 1.05),
    "ThreeConv": Case(ThreeConv, 1250, 125, 1, 9, 1.03, 1.05),
    "ResNet20": Case(ResNet20, 600, 100, 1, 9, 1.03, 1.05),
    "DigitsCNN": Case(DigitsCNN, 1147, 64, 3, 15, 1.15, 1.25),
    "MLP": Case(DIGITS_MLP, 1147, 64, 15, 15, 1.15, 1.25),
}


def make_task(case: Case) -> efface.Task:
    """A task on the embedded digits, or on random images."""
    if case.digits:
        records = efface.datasets.digits().records
        data = (records.inputs[: case.records], records.targets[: case.records])  # type: ignore[union-attr]
    else:
        draw = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (case.records, 3, 32, 32), dtype=torch.uint8, generator=draw)
        data = (images, torch.arange(case.records) % 10)
    settings = efface.Settings(
        epochs=case.epochs, batch_size=case.batch, lr=0.01, schedule="constant"
    )
    return efface.Task(case.network, data, data, fit=settings)


def make_model(task: efface.Task, sparsity: float = 0.0) -> efface.TrainedModel:
    """A network, always from the same weights; a random mask where it is to be sparse."""
    torch.manual_seed(0)
    network = task.network()
    if sparsity == 0:
        return efface.TrainedModel(task, network)
    own, scope = dict(network.named_parameters()), scope_names(network)
    keep = {n: torch.rand(own[n].shape) >= sparsity for n in scope}
    return efface.TrainedModel(task, network, mask=efface.Mask(keep))


def with_efface(model: efface.TrainedModel) -> None:
    """A fit as ``efface.train`` runs it."""
    fit = efface.Fit(model.task, subject=model)
    train_from(fit, model.network, torch.arange(len(model.task.records)))


def batches_of(task: efface.Task) -> list[Tensor]:
    """The batches that efface trains on, as positions."""
    seen: list[Tensor] = []

    def objective(network: nn.Module, batches: dict[str, Any], _clock: object) -> Tensor:
        seen.append(batches["retain"].positions)
        return F.cross_entropy(network(batches["retain"].inputs), batches["retain"].targets)

    stream = {"retain": efface.Stream(torch.arange(len(task.records)))}
    efface.Fit(task)(task.network(), objective, stream, task.fit)
    return seen


def raw(
    task: efface.Task, plan: Sequence[Tensor], keep: Mapping[str, Tensor] | None = None
) -> Callable[[], nn.Module]:
    """The loop written by hand; ``keep`` multiplies these weights by 0 or 1 after every step."""
    network = make_model(task).network
    placement, settings = rule(network, CPU, train=True), task.fit
    images, labels = task.train
    if placement.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    own = dict(network.named_parameters())
    factors = [(own[name], mask.float()) for name, mask in (keep or {}).items()]

    def run() -> nn.Module:
        optimizer = torch.optim.SGD(
            network.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=True,
        )
        network.train()
        for where in plan:
            inputs, targets = images[where], labels[where]
            optimizer.zero_grad()
            context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
            if placement.bf16:
                context = torch.autocast("cpu", dtype=torch.bfloat16)
            with context:
                loss = F.cross_entropy(network(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                for weight, factor in factors:
                    weight.mul_(factor)
        return network

    return run


def difference(mine: nn.Module, other: nn.Module) -> float:
    """Largest difference of a weight: 0 where both did the same work."""
    theirs = dict(other.named_parameters())
    gaps = [(p - theirs[n]).detach().abs().max() for n, p in mine.named_parameters()]
    return float(torch.stack(gaps).max())


def measure(name: str, case: Case) -> list[dict[str, Any]]:
    """Dense and pruned, against the limit."""
    task = make_task(case)
    plan = batches_of(task)
    dense, sparse = make_model(task), make_model(task, 0.9)
    assert sparse.mask is not None
    by_hand = raw(task, plan)
    with_efface(dense)
    facts: dict[str, Any] = {
        "placement": str(rule(dense.network, CPU, train=True)),
        "steps": len(plan),
        "batch": case.batch,
        "records": "digits" if case.digits else "random 32×32 images",
        "largest_weight_difference_after_one_run": difference(dense.network, by_hand()),
    }
    arms: dict[str, Callable[[], object]] = {
        "efface": partial(with_efface, dense),
        "raw": by_hand,
        "efface, masked": partial(with_efface, sparse),
        "raw, multiplied": raw(task, plan, sparse.mask),
    }
    done = rounds(arms, case.pairs)
    return [
        compared(f"{name}, dense", done, "efface", "raw", at_most=case.dense, **facts),
        compared(
            f"{name}, 90 % masked", done, "efface, masked", "raw", at_most=case.masked, **facts
        ),
        compared(
            f"{name}, 90 % masked, against multiplying by the mask",
            done,
            "efface, masked",
            "raw, multiplied",
            **facts,
        ),
    ]


# -- memory: in children, since a process's peak never falls ---------------------------------------


def child(arm: str, name: str) -> None:
    """Print bytes: resident peak of this process, and peak of the tensors that the loop made."""
    task = make_task(CASES[name])
    model, by_hand = make_model(task), raw(task, batches_of(task))
    work = by_hand if arm == "raw" else partial(with_efface, model)
    Path("/proc/self/clear_refs").write_text("5")  # forget the resident peak so far
    work()
    rows = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(row.split()[1]) * 1024 for row in rows if row.startswith("VmHWM"))
    print(json.dumps({"process": resident, "tensors": tensor_peak(work)}))


def tensor_peak(work: Callable[[], object]) -> int:
    """Most bytes of tensors that were alive at once, of those that the work made."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak: int = max(accumulate(n for _, n in changes))
    return peak


def memory(name: str, pairs: int = 2) -> list[dict[str, Any]]:
    """Peak memory of processes that only run the loop."""
    peaks: dict[str, list[dict[str, int]]] = {"efface": [], "raw": []}
    for arm in list(peaks) * pairs:
        command = [sys.executable, __file__, "--child", arm, name]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[arm].append(json.loads(out))
    found = []
    for kind, words in {"tensors": "tensors of the loop", "process": "whole process"}.items():
        mine, theirs = ([p[kind] / 2**20 for p in peaks[arm]] for arm in ("efface", "raw"))
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        mib = [[round(a, 2), round(b, 2)] for a, b in zip(mine, theirs, strict=True)]
        title = f"{name}, peak memory, {words}"
        found.append(judged(title, ratios, at_most=1.05, ratio="efface / raw", mib=mib))
    return found


def main() -> None:
    one_thread()
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
        return
    steady_memory()
    wanted = sys.argv[1:] or list(CASES)
    checks = [check for name in wanted for check in measure(name, CASES[name])]
    if Path("/proc/self/clear_refs").exists():
        checks += [check for name in ("AirNet", "DigitsCNN") for check in memory(name)]
    write("loop", __doc__.split("\n    python")[0], checks)


if __name__ == "__main__":
    main()
