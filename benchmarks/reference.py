"""efface against public reference code: the same methods, on the same data and networks.

The reference is what Jia et al. (2023) released (OPTML-Group/Unlearn-Sparse, MIT licence), imported
from a checkout and run as it is, at its default loader batch of 256, over tensors in memory. Its
``.cuda()`` calls are no-ops here and its progress bars are left out.

    python benchmarks/reference.py --reference-code CHECKOUT [epochs] [fisher] [influence] [attacks]

Writes ``results/reference_<part>.json`` for each part.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import compared, judged, one_thread, rounds, steady_memory, write
from reference_bench import Bench, Check, loaders, ours, part, trained
from reference_code import BATCH, Released, loader
from reference_curvature import fisher, influence, influence_parts
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn import functional as F

import efface
from efface.auditing import Subject
from efface.auditing.membership import HeldOutAUC, JiaSVC
from efface.networks import ThreeConv
from efface.placement import rule
from efface.predict import logits
from efface.signals import margin
from efface.stats import auc
from efface.unlearn import FineTune, GradientAscent, L1Sparse

CPU = torch.device("cpu")

# -- an epoch of the iterative methods -------------------------------------------------------------

ITERATIVE: dict[str, tuple[Any, str, str, float]] = {
    "FT": (FineTune(epochs=1, lr=0.01), "FT", "retain", 0.01),
    "l1-sparse": (L1Sparse(epochs=1, lr=0.01, alpha=5e-4), "FT_l1", "retain", 0.01),
    "GA": (GradientAscent(epochs=1, lr=1e-6, cap=50.0, bn="train"), "GA", "forget", 1e-6),
}
"""Name → efface's method, the released function, the part that it passes over, its rate."""


def raw_epoch(
    network: nn.Module, inputs: Tensor, targets: Tensor, name: str, lr: float
) -> Callable[[], None]:
    """The loop written by hand, in efface's precision and layout: nothing but the work."""
    placement = rule(network, CPU, train=True)
    if placement.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run() -> None:
        optimizer = torch.optim.SGD(
            network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        network.train()
        for where in torch.split(torch.randperm(len(targets)), BATCH):
            optimizer.zero_grad()
            with placement.autocast():
                loss = F.cross_entropy(network(inputs[where]).float(), targets[where])
                if name == "GA":
                    loss = -loss.clamp(max=50.0)
                if name == "l1-sparse":
                    weights = [p.abs().sum() for p in network.parameters()]
                    loss = loss + 5e-4 * torch.stack(weights).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return run


def epochs(released: Released, title: str, bench: Bench, pairs: int) -> list[Check]:
    """FT, l1-sparse and GA, one epoch each."""
    task = bench.task()
    split, start, checks = bench.split(task), trained(task).network, list[Check]()
    for name, (method, theirs, which, lr) in ITERATIVE.items():
        copies = [copy.deepcopy(start) for _ in range(4)]
        inputs, targets = part(task, getattr(split, which))
        options = {"unlearn_lr": lr, "alpha": 5e-4}
        arms: dict[str, Callable[[], object]] = {
            "efface": partial(ours, method, copies[0], split),
            "released": partial(released.epoch, theirs, copies[1], loaders(split), **options),
            "raw": raw_epoch(copies[2], inputs, targets, name, lr),
            "efface in fp32": partial(ours, method, copies[3], split, fp32=True),
        }
        done = rounds(arms, pairs)
        facts: dict[str, Any] = {
            "records": f"{len(targets)} of {task.name}",
            "placement": str(rule(start, CPU, train=True)),
            "records_per_cpu_second": {
                arm: round(len(targets) / statistics.median(each[arm].cpu for each in done))
                for arm in arms
            },
        }
        words = f"{title}, {name}, one epoch: "
        checks += [
            compared(
                words + "released / efface", done, "released", "efface", at_least=1.8, **facts
            ),
            compared(words + "released / efface in fp32", done, "released", "efface in fp32"),
            compared(words + "efface / raw loop", done, "efface", "raw", at_most=1.05),
        ]
    return checks


# -- membership attacks ----------------------------------------------------------------------------


def attacks(released: Released, bench: Bench) -> list[Check]:
    """The papers' attack, the same number; and the held-out attack, in milliseconds."""
    task = bench.task()
    split, model = bench.split(task), trained(task)
    draw = np.random.default_rng(0)

    def audit() -> float | None:
        return JiaSVC()(Subject(model, model, split), draw).value

    test, n = task.test, min(bench.test, bench.retain)
    members = part(task, split.retain[:n])
    whole: dict[str, Any] = {
        "shadow_train": loader(*members, shuffle=False),
        "shadow_test": loader(*test, shuffle=False),
        "target_train": None,
        "target_test": loader(*part(task, split.forget), shuffle=False),
    }
    mine, direct = audit(), direct_efficacy(model, split, n)
    theirs = float(released.attacks(whole, model.network)["confidence"])
    assert mine is not None
    arms: dict[str, Callable[[], object]] = {
        "efface": audit,
        "released": lambda: released.attacks(whole, model.network),
    }
    done = rounds(arms, 3, warm=0)
    facts: dict[str, Any] = {
        "members": n,
        "outsiders": bench.test,
        "forgotten": bench.forget,
        "efficacy": mine,
    }
    words = "MIA-efficacy (JiaSVC): "
    return [
        judged(
            words + "difference to scikit-learn called directly", [abs(mine - direct)], at_most=0
        ),
        judged(words + "difference to the released attack", [abs(mine - theirs)], **facts),
        compared(
            words + "released attack (five features) / efface (the one reported)",
            done,
            "released",
            "efface",
        ),
        *held_out(),
    ]


def direct_efficacy(model: efface.TrainedModel, split: efface.Split, n: int) -> float:
    """The same number without the audit: softmax, SVC, mean."""
    task = split.task

    def sure(records: Any, positions: Tensor) -> Any:
        rows = logits(model.network, task, records, positions).astype(np.float64)
        rows = np.exp(rows - rows.max(1, keepdims=True))
        p = rows / rows.sum(1, keepdims=True)
        return p[np.arange(len(p)), records.targets[positions].numpy()][:, None]

    inside = sure(task.records, split.retain[:n])
    outside = sure(task.test_records, torch.arange(len(task.test_records)))
    attack = SVC(C=3, gamma="auto", kernel="rbf")
    attack.fit(np.concatenate([inside, outside]), np.r_[np.ones(n), np.zeros(len(outside))])
    return float(1 - attack.predict(sure(task.records, split.forget)).mean())


def held_out(n: int = 10_000) -> list[Check]:
    """AUC with DeLong's interval from logits of n members and n outsiders; the audit's finding."""
    draw = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(3 * n, 10, generator=draw), torch.arange(3 * n) % 10
    data = (inputs[: 2 * n], labels[: 2 * n]), (inputs[2 * n :], labels[2 * n :])
    task = efface.Task(partial(nn.Linear, 10, 10), *data, fit=efface.Settings(epochs=1))
    chosen = torch.arange(2 * n) < n
    split = efface.Split.of(task, chosen, {"kind": "ids", "n": n})
    model = trained(task)
    inside = logits(model.network, task, task.records, split.forget)
    outside = logits(model.network, task, task.test_records)
    y, z = labels[:n].numpy(), labels[2 * n :].numpy()
    subject = Subject(model, model, split)
    subject.logits(model, "forget"), subject.logits(model, "test")

    def finding() -> None:
        """With curves for the report; logits are there, everything else is made anew."""
        kept = {k: v for k, v in subject.cache._kept.items() if k[0] == "logits"}
        subject.cache._kept = kept
        HeldOutAUC()(subject, np.random.default_rng(0))

    arms: dict[str, Callable[[], object]] = {
        "attack": lambda: auc(margin(inside, y), margin(outside, z)),
        "finding": finding,
    }
    done = rounds(arms, 9)
    times = {arm: [1e3 * each[arm].cpu for each in done] for arm in arms}
    words = f"held-out attack, {n:,} + {n:,} records, from logits, milliseconds: "
    return [
        judged(words + "margins, AUC, DeLong's interval", times["attack"], at_most=50),
        judged(words + "the audit's finding, with ROC curves", times["finding"], at_most=50),
    ]


# -- all of it -------------------------------------------------------------------------------------


ABOUT = {
    "epochs": """One epoch of FT, l1-sparse and GA against the released functions, and against a
    loop written by hand. efface runs with its own rule for precision and layout, which for these
    networks is bf16 where the processor has it; what the rest brings, the rows in fp32 tell.""",
    "fisher": """The diagonal of the Fisher information on 256 records, seconds per sample. The
    released function ``fisher`` carries every sample back through its whole batch, so that its cost
    grows with the loader's batch; few samples of it are timed, without their forward pass. A plain
    loop over single records is far faster than that. In fp32 both results have errors of their own
    (a unit near zero may fall on either side), which shows in the last rows; in float64 they agree.
    The released ``fisher_new`` squares gradients averaged over batches of 32, efface's expectation
    over the classes those of single records: another quantity, at the price of that quantity.""",
    "influence": """Influence unlearning, in fp32. The released recursion over single records comes
    to one multiple of the first record's gradient; efface's flavour ``jia-code`` computes that
    multiple and takes the same step. Time is saved in the recursion over 1,002 records, whose share
    of the call falls as the records grow: the rest is one gradient over all of them. efface's exact
    product is that of the true inverse of the damped Fisher matrix, which the recursion is not.""",
    "attacks": """Membership attacks. The papers' attack must give the very number that scikit-learn
    gives; the held-out attack is timed from logits to the interval.""",
}


def parts(released: Released) -> dict[str, Sequence[Callable[[], list[Check]]]]:
    """Name → what is measured under it."""
    rn20, three = ("ResNet-20", released.resnet20), ("ThreeConv", ThreeConv)
    both = (rn20, three)
    big, small = (4500, 500), (1100, 100)
    return {
        "epochs": [partial(epochs, released, n, Bench(net, 1280, 512), 3) for n, net in both],
        "fisher": [
            partial(fisher, released, n, Bench(net, 256, 20), timed)
            for (n, net), timed in zip(both, ((8, 64), (16, 128)), strict=True)
        ],
        "influence": [
            partial(measure, released, n, Bench(net, *size), 3)
            for n, net in both
            for measure, size in ((influence, big), (influence, small), (influence_parts, small))
        ],
        "attacks": [partial(attacks, released, Bench(ThreeConv, 2000, 500, 2000))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="efface against a checkout of Unlearn-Sparse")
    parser.add_argument("--reference-code", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ABOUT)}")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(ABOUT)):
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(ABOUT)}")
    os.environ.setdefault("EFFACE_KEY", "benchmark")
    one_thread()
    steady_memory()
    released = Released.load(given.reference_code.resolve())
    known = parts(released)
    for name in given.names or known:
        checks: list[Check] = []
        for measure in known[name]:
            checks += measure()
            print(f"# {name}: {len(checks)} checks done", flush=True)
        write(f"reference_{name}", ABOUT[name], checks, reference=released.facts)


if __name__ == "__main__":
    main()
