"""Fisher information and influence unlearning, efface's beside the released code's.

Measured by ``benchmarks/reference.py``, which says what is compared.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from measure import compared, judged, rounds
from reference_bench import Bench, Check, flat, loaders, ours, part, relative, stacked, trained
from reference_code import BATCH, Released, loader
from torch import Tensor, nn
from torch.nn import functional as F

import efface
from efface.curvature import diagonal_fisher, inverse_fisher_product
from efface.unlearn import Influence
from efface.unlearn.influence import released as released_step

# -- diagonal Fisher information -------------------------------------------------------------------


def plain_fisher(network: nn.Module, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """One record at a time, nothing else."""
    network.eval()
    parameters = list(network.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for x, y in zip(torch.split(inputs, 1), torch.split(targets, 1), strict=True):
        loss = F.cross_entropy(network(x), y)
        for sums, g in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            sums.addcmul_(g, g)
    return [sums / len(targets) for sums in total]


def fisher(released: Released, title: str, bench: Bench, timed: tuple[int, int]) -> list[Check]:
    """Observed labels against ``fisher``, the expectation over the classes against ``fisher_new``.

    ``timed`` is how many samples of the released functions are timed.
    """
    task = bench.task()
    fit, model = efface.Fit(task), trained(task)
    network, everyone, few = model.network.eval(), torch.arange(bench.retain), timed[0]
    inputs, targets = part(task, everyone)
    arms: dict[str, Callable[[], object]] = {
        "efface": lambda: diagonal_fisher(fit, network, everyone),
        "plain": lambda: plain_fisher(network, inputs, targets),
        "released": lambda: released.fisher_seconds(network, loader(inputs, targets), few),
        "released, batch 32": lambda: released.fisher_seconds(
            network, loader(inputs, targets, batch=32), few
        ),
    }
    done = rounds(arms, 5)
    work, words = (few, bench.retain), f"{title}, diagonal Fisher, observed labels: "
    per_arm = {arm: few if "released" in arm else bench.retain for arm in arms}
    facts: dict[str, Any] = {
        "milliseconds_per_sample": {
            arm: round(1e3 * statistics.median(each[arm].cpu for each in done) / n, 3)
            for arm, n in per_arm.items()
        },
        "released_samples_timed": few,
    }
    return [
        compared(
            words + f"released at batch {BATCH} / efface",
            done,
            "released",
            "efface",
            at_least=100,
            work=work,
            **facts,
        ),
        compared(
            words + "released at batch 32 / efface",
            done,
            "released, batch 32",
            "efface",
            work=work,
        ),
        compared(words + "plain loop / efface", done, "plain", "efface", at_least=1.4),
        *same_fisher(released, words, task, network),
        *expected_fisher(released, title, fit, network, timed[1]),
    ]


def same_fisher(
    released: Released, words: str, task: efface.Task, network: nn.Module
) -> list[Check]:
    """How far efface's result lies from the released one; in fp32 both have errors of their own."""
    inputs, targets = part(task, torch.arange(64))
    found: dict[str, Tensor] = {}
    for kind, dtype in {"fp32": torch.float32, "float64": torch.float64}.items():
        twin = copy.deepcopy(network).to(dtype)
        data = (inputs.to(dtype), targets)
        fit = efface.Fit(replace(task, train=data, test=data))
        theirs = released.fisher(twin, loader(*data, batch=32))
        found[f"released, {kind}"] = torch.cat([t.flatten() for t in theirs])
        found[f"efface, {kind}"] = stacked(diagonal_fisher(fit, twin, torch.arange(64)))
    truth = found["released, float64"]
    errors = {kind: relative(value, truth) for kind, value in found.items()}
    apart = relative(found["efface, fp32"], found["released, fp32"])
    return [
        judged(
            words + "relative difference to released, network in float64",
            [errors["efface, float64"]],
            at_most=1e-5,
        ),
        judged(words + "relative difference to released, in fp32", [apart], at_most=1e-5),
        judged(words + "released in fp32 to released in float64", [errors["released, fp32"]]),
        judged(words + "efface in fp32 to released in float64", [errors["efface, fp32"]]),
    ]


def expected_fisher(
    released: Released, title: str, fit: efface.Fit, network: nn.Module, n: int
) -> list[Check]:
    """The expectation over all classes beside the released sums."""
    inputs, targets = part(fit.task, torch.arange(n))
    arms: dict[str, Callable[[], object]] = {
        "efface": lambda: diagonal_fisher(fit, network, torch.arange(n), labels="expected"),
        "released": lambda: released.fisher_new(network, inputs, targets),
    }
    done = rounds(arms, 3)
    theirs = stacked(released.fisher_new(network, inputs, targets))
    mine = stacked(diagonal_fisher(fit, network, torch.arange(n), labels="expected"))
    facts: dict[str, Any] = {
        "samples": n,
        "sum_of_released_over_sum_of_efface": round(float(theirs.sum() / mine.sum()), 4),
    }
    title = f"{title}, Fisher expected over the classes: released fisher_new / efface per sample"
    return [compared(title, done, "released", "efface", **facts)]


# -- influence unlearning --------------------------------------------------------------------------


def influence(released: Released, title: str, bench: Bench, pairs: int) -> list[Check]:
    """The whole call of IU as released, timed."""
    task = bench.task()
    split, network = bench.split(task), trained(task).network.eval()
    arms: dict[str, Callable[[], object]] = {
        "efface": partial(ours, jia(1e-9), copy.deepcopy(network), split),
        "released": partial(released.influence, copy.deepcopy(network), loaders(split), 1e-9),
    }
    done = rounds(arms, pairs, warm=0)
    words = f"{title}, IU with {bench.forget:,} + {bench.retain:,} records: "
    return [
        compared(
            words + "released Wfisher / efface in its flavour",
            done,
            "released",
            "efface",
            at_least=2,
        )
    ]


def jia(alpha: float) -> Influence:
    """IU in the released code's flavour."""
    return Influence(flavour="jia-code", alpha=alpha)


def influence_parts(released: Released, title: str, bench: Bench, pairs: int) -> list[Check]:
    """Whether the two steps are the same, and the products of an inverse Fisher matrix alone."""
    task = bench.task()
    split, network = bench.split(task), trained(task).network.eval()
    fit, few = efface.Fit(task), split.retain[:1002]
    inputs, targets = part(task, few)
    vector = {name: torch.randn_like(p).detach() for name, p in network.named_parameters()}
    one_vector = stacked(vector)
    arms: dict[str, Callable[[], object]] = {
        "exact": lambda: inverse_fisher_product(fit, network, few[:1000], vector, damping=1.0),
        "closed form": lambda: released_step(fit, network, few, vector, None, 2**28),
        "recursion": lambda: released.influence_product(network, inputs, targets, one_vector),
    }
    done = rounds(arms, pairs, warm=0)
    words = f"{title}, inverse-Fisher product, 1,000 records: "
    kinds = {"float64": torch.float64, "fp32": torch.float32}
    apart = {k: 1 - _cosine(released, network, split, dtype) for k, dtype in kinds.items()}
    same = f"{title}, IU: 1 − cosine of efface's step and the released one, "
    return [
        judged(same + "network in float64", [apart["float64"]], at_most=1e-9),
        judged(same + "in fp32", [apart["fp32"]], at_most=1e-9),
        compared(
            words + "released recursion / efface's closed form of it",
            done,
            "recursion",
            "closed form",
            at_least=2,
        ),
        compared(
            words + "efface's exact product / released recursion",
            done,
            "exact",
            "recursion",
            at_most=1.2,
            facts=fit.meter.facts,
        ),
    ]


def _cosine(
    released: Released, network: nn.Module, split: efface.Split, dtype: torch.dtype
) -> float:
    """Of the two steps, long enough that what rounding does to the weights is nothing."""
    inputs, targets = split.task.train
    data = (inputs.to(dtype), targets)
    split = replace(split, task=replace(split.task, train=data, test=data))
    start = copy.deepcopy(network).to(dtype)
    mine, theirs = copy.deepcopy(start), copy.deepcopy(start)
    ours(jia(1e6), mine, split)
    released.influence(theirs, loaders(split), 1e6)
    steps = [flat(moved) - flat(start) for moved in (mine, theirs)]
    return float(steps[0] @ steps[1] / (steps[0].norm() * steps[1].norm()))
