"""Un-pruning against its slow twin, continued.

Ties, criteria, random draws; whole filters, also of residual networks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import efface
from efface.errors import EffaceError, MethodError, NeedsError
from efface.fitting import Fit
from efface.networks.residual import BasicBlock
from efface.sparsify import AtInit, OneShot, build_pruner
from efface.task import Settings, Split
from efface.trained import TrainedModel
from efface.unlearn import CheckpointDifference, FineTune, FromDense, Unprune

from .conftest import CLASSES, make_conv_task, make_task
from .test_cli import done, provide_model, snapshot, workplace
from .test_cli import efface as command
from .test_unprune_oracles import (
    LOG,
    ORDERS,
    Parts,
    Shift,
    Spy,
    State,
    Unit,
    check,
    distances,
    filters,
    first_of,
    follow,
    gradients,
    norms,
    pattern,
    run,
    single,
    state_of,
    sums,
    values_of,
)


@pytest.fixture(scope="module")
def whole() -> TrainedModel:
    """A dense MLP with rewind weights."""
    task = make_task(fit=Settings(epochs=4, batch_size=32, lr=0.1))
    return efface.train(task, seed=0, rewind=2)


@pytest.fixture(scope="module")
def pruned(whole: TrainedModel) -> TrainedModel:
    """The same at 60 % in every layer."""
    return efface.prune(whole, OneShot(sparsity=0.6, recovery=1, granularity="layer"))


def test_ties_go_to_the_entry_that_comes_first() -> None:
    """Initial weights of two sizes only, and an inner method that makes them alike again."""

    def network() -> nn.Module:
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        for p in net.parameters():
            p.data = torch.where(p > 0, 0.25, -0.25) * (1 + (p.abs() > 0.2))
        return net

    task = make_task(network=network, fit=Settings(epochs=1, batch_size=32, lr=0.1))
    model = efface.prune(efface.train(task), OneShot(sparsity=0.5, recovery=0))
    for order, granularity, p in itertools.product(ORDERS, ("layer", "global"), (0.5, 1.0)):
        method = Unprune(Spy(Alike()), p, order=order, granularity=granularity, rounds=2)
        check(model, method, single(model, granularity))


@dataclass(frozen=True)
class Alike(Shift):
    """Makes every kept weight one of three numbers, none of them zero."""

    name: ClassVar[str] = "alike"

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        with torch.no_grad():
            for name, p in trained.network.named_parameters():
                new = 0.25 + 0.25 * pattern(name, p.shape).sign() + 0.5 * (p > 0)
                p.copy_(new.clamp(min=0.25) * (trained.mask or {}).get(name, True))


@pytest.mark.parametrize("criterion", ["snip", "taylor", "grasp"])
def test_prunes_again_by_the_criterion_that_made_the_mask(
    pruned: TrainedModel, criterion: str
) -> None:
    """Also where scores can be negative, below those of weights that are not there."""
    dense_model = efface.train(pruned.task, seed=0)
    pruner = OneShot(sparsity=0.6, recovery=1, granularity="layer", criterion=criterion)
    model = efface.prune(dense_model, pruner)
    split, units = first_of(model, 27), single(model, "layer")
    method = Unprune(Spy(Shift()), pick="gradient", values="zero")
    after = run(model, split, method)
    for name, keep in (after.mask or {}).items():
        assert not (keep & ~LOG[0][0][name]).any()
        assert int(keep.sum()) == int((model.mask or {})[name].sum())

    def score(state: State, _: set[Unit]) -> dict[Unit, float]:
        found = gradients(model.task, split.retain, state)
        made = {n: (g * state[n]).abs() for n, g in found.items()}
        return norms(made, units)

    def by_gradient(state: State, _: set[Unit]) -> dict[Unit, float]:
        return norms(gradients(model.task, split.retain, state), units)

    def flow(state: State, _: set[Unit]) -> dict[Unit, float]:
        """θ ⊙ Hg at temperature 200, which can be negative."""
        network = model.task.network().double().eval()
        network.load_state_dict(state)
        named = {n: p for n, p in network.named_parameters() if p.ndim > 1}
        inputs, targets = (t[split.retain] for t in model.task.train)
        loss = nn.functional.cross_entropy(network(inputs.double()) / 200, targets)
        first = torch.autograd.grad(loss, [*named.values()], create_graph=True)
        along = torch.stack([(g * g.detach()).sum() for g in first]).sum()
        second = torch.autograd.grad(along, [*named.values()])
        found = {n: state[n] * h for n, h in zip(named, second, strict=True)}
        return {(n, i): float(found[n].view(-1)[i]) for n, i in units.entries}

    prune = flow if criterion == "grasp" else score
    follow(model, after, method, units, values_of(model, "zero"), by_gradient, prune)


def test_random_choices_and_values(pruned: TrainedModel) -> None:
    """Drawn from the seed; every dropped weight alike; values a tenth of the kept in size."""
    split = first_of(pruned, 27)
    method = Unprune(Spy(Shift()), values="random", pick="random")
    assert run(pruned, split, method, seed=3).digest == run(pruned, split, method, seed=3).digest
    for name, keep in (pruned.mask or {}).items():
        picked, drawn = torch.zeros(keep.shape), []
        for seed in range(40):
            run(pruned, split, method, seed=seed)
            grown = LOG[0][0][name] & ~keep
            picked += grown
            drawn.append(LOG[0][1][name][grown])
        share = picked[~keep] / 40
        assert float(share.std()) == pytest.approx((0.2 * 0.8 / 40) ** 0.5, rel=0.35)
        kept = state_of(pruned.network)[name][keep]
        size = float(torch.cat(drawn).square().mean().sqrt())
        assert size == pytest.approx(0.1 * float(kept.square().mean().sqrt()), rel=0.08)


# --- whole filters --------------------------------------------------------------------------------


class Small(nn.Module):
    """A convolution, two residual blocks, one with a projection, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.same = BasicBlock(4, 4)
        self.wider = BasicBlock(4, 5, stride=2)
        self.classifier = nn.Linear(5, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.wider(self.same(self.bn(self.conv(images)).relu()))
        logits: Tensor = self.classifier(hidden.mean((2, 3)))
        return logits


PLAIN: Parts = {
    "0.weight": (["0.weight"], ["1.weight", "1.bias"]),
    "4.weight": (["4.weight"], ["5.weight", "5.bias"]),
}
RESIDUAL: Parts = {
    "conv.weight": (
        ["conv.weight", "same.conv2.weight"],
        ["conv.bias", "bn.weight", "bn.bias", "same.bn2.weight", "same.bn2.bias"],
    ),
    "same.conv1.weight": (["same.conv1.weight"], ["same.bn1.weight", "same.bn1.bias"]),
    "wider.conv1.weight": (["wider.conv1.weight"], ["wider.bn1.weight", "wider.bn1.bias"]),
    "wider.conv2.weight": (
        ["wider.conv2.weight", "wider.downsample.0.weight"],
        [
            f"wider.{layer}.{kind}"
            for layer in ("bn2", "downsample.1")
            for kind in ("weight", "bias")
        ],
    ),
}
SCORES = {"l1": sums, "l2": norms, "magnitude": norms, "geometric-median": distances}
SETTINGS = Settings(epochs=2, batch_size=48, lr=0.05)


@pytest.fixture(scope="module")
def plain() -> TrainedModel:
    """Two convolutions with batch norm."""
    return efface.train(make_conv_task(fit=SETTINGS), seed=0, rewind=1)


@pytest.fixture(scope="module")
def residual() -> TrainedModel:
    return efface.train(make_conv_task(network=Small, fit=SETTINGS), seed=0, rewind=1)


def averages(model: TrainedModel, state: State, positions: Tensor) -> State:
    """Batch-norm statistics of a state: plain averages over these records, un-augmented."""
    network = model.task.network().double().eval()
    network.load_state_dict(state)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
            layer.momentum = None
            layer.reset_running_stats()
    network(model.task.train[0][positions].double())
    return {n: t for n, t in state_of(network).items() if "running" in n}


def check_filters(model: TrainedModel, method: Unprune, groups: Parts, criterion: str) -> None:
    """Run an un-pruning of filters, and follow it."""
    split, units = first_of(model, 24), filters(model, groups)
    values = values_of(model, method.values)
    first = values or {}

    def by_gradient(state: State, kept: set[Unit]) -> dict[Unit, float]:
        for unit, entries in units.entries.items():
            for name, i in entries if unit not in kept else ():
                state[name].view(-1)[i] = first[name].view(-1)[i]
        state |= averages(model, state, split.retain)
        return sums(gradients(model.task, split.retain, state), units)

    def by_size(state: State, kept: set[Unit]) -> dict[Unit, float]:
        return norms(first, units)

    grow = {"magnitude": by_size, "gradient": by_gradient, "random": None}[method.pick]
    after = run(model, split, method)
    measure = SCORES[criterion]
    prune = lambda state, _: measure(state, units)  # noqa: E731
    follow(model, after, method, units, values, grow if values else None, prune, buffers=False)
    for _, before, _ in LOG:
        for name, mean in averages(model, before, split.retain).items():
            assert torch.allclose(before[name].double(), mean, rtol=1e-4, atol=1e-5), name


FILTER_WAYS = [
    (values, pick)
    for values in ("initial", "rewind", "random")
    for pick in ("magnitude", "gradient", "random")
]


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize(("values", "pick"), FILTER_WAYS)
def test_filters_equal_their_twin(
    kind: str, values: Any, pick: Any, request: pytest.FixtureRequest
) -> None:
    groups = {"plain": PLAIN, "residual": RESIDUAL}[kind]
    pruner = OneShot(sparsity=0.6, criterion="l2", granularity="filter", recovery=1)
    model = efface.prune(request.getfixturevalue(kind), pruner)
    for order, granularity in itertools.product(ORDERS, ("layer", "global")):
        rounds = 2 if granularity == "layer" else 1
        method = Unprune(Spy(Shift()), 0.5, values, pick, rounds, order, granularity)
        check_filters(model, method, groups, "l2")


@pytest.mark.parametrize("criterion", SCORES)
def test_filters_are_pruned_again_by_the_criterion_that_made_the_mask(
    residual: TrainedModel, criterion: str
) -> None:
    pruner = OneShot(sparsity=0.5, criterion=criterion, granularity="filter", recovery=0)
    model = efface.prune(residual, pruner)
    for p, rounds, order in (
        (1.0, 1, "once"),
        (0.4, 3, "every"),
        (1.0, 2, "drop"),
        (0.1, 1, "once"),
    ):
        check_filters(
            model, Unprune(Spy(Shift()), p, rounds=rounds, order=order), RESIDUAL, criterion
        )


def test_soft_pruned_filters(plain: TrainedModel) -> None:
    model = efface.prune(plain, build_pruner("sfp", {"sparsity": 0.5, "epochs": 1}))
    check_filters(model, Unprune(Spy(FineTune(epochs=1)), 0.5), PLAIN, "l2")


def test_residual_networks_stay_consistent() -> None:
    """In a ResNet-20 what is added has the same filters, as many as before."""
    task = make_conv_task(
        network=lambda: efface.networks.ResNet20(CLASSES, channels=1), fit=SETTINGS
    )
    pruner = OneShot(sparsity=0.5, criterion="l2", granularity="filter", recovery=0)
    model = efface.prune(efface.train(task), pruner)
    after = efface.forget(model, first_of(model, 24), Unprune(FineTune(epochs=1)))
    mask, old = after.mask or {}, model.mask or {}
    moved = 0
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        added = [f"layer{stage}.{k}.conv2.weight" for k in range(3)]
        added += ["conv1.weight"] if stage == 1 else [f"layer{stage}.0.downsample.0.weight"]
        rows = [mask[name].flatten(1) for name in added]
        for row in rows:
            assert torch.equal(row.all(1), row.any(1))
            assert torch.equal(row.all(1), rows[0].all(1))
        for name in [*added, *(f"layer{stage}.{k}.conv1.weight" for k in range(3))]:
            assert int(mask[name].flatten(1).all(1).sum()) == width // 2
            moved += int((mask[name] != old[name]).sum())
    assert moved > 0
    weights = state_of(after.network)
    assert all((weights[name][~keep] == 0).all() for name, keep in mask.items())


# --- bad input ------------------------------------------------------------------------------------


def refused(model: TrainedModel, method: Any, error: type[EffaceError], *said: str) -> None:
    """One sentence that says what was wrong; the model is as it was."""
    before = model.to_bytes()
    with pytest.raises(error) as caught:
        efface.forget(model, first_of(model, 24), method)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert caught.value.exit_code == 2
    for words in said:
        assert words in sentence
    assert model.to_bytes() == before


def test_models_that_cannot_be_unpruned(whole: TrainedModel, pruned: TrainedModel) -> None:
    refused(whole, Unprune(), NeedsError, "pruned model", "prune it first")
    nothing = efface.prune(whole, OneShot(sparsity=0.0, recovery=0))
    refused(nothing, Unprune(), MethodError, "nothing is pruned", "prune it first")
    adopted = efface.adopt(whole.task, pruned.network.state_dict())
    adopted.set_mask(pruned.mask)
    refused(adopted, Unprune(), NeedsError, "initial weights", "--initial", "values=random or ")
    refused(adopted, Unprune(values="rewind"), NeedsError, "--rewind")
    refused(adopted, Unprune(values="random"), NeedsError, "criterion")
    efface.forget(adopted, first_of(adopted, 24), Unprune(values="random", criterion="magnitude"))
    once = efface.forget(pruned, first_of(pruned, 60), FineTune(epochs=1))
    refused(once, Unprune(values="rewind"), NeedsError, "--rewind")  # those have seen D_f
    early = efface.prune(whole, AtInit(sparsity=0.5, criterion="snip", epochs=1))
    refused(early, Unprune(), MethodError, "snip", "prune-first")


def test_options_that_do_not_fit(pruned: TrainedModel, plain: TrainedModel) -> None:
    for p in (0.0, -0.2, 1.01, float("nan")):
        with pytest.raises(MethodError, match=r"p must lie in \(0, 1\]"):
            Unprune(p=p)
    with pytest.raises(MethodError, match="rounds must be 1 or more"):
        Unprune(rounds=0)
    with pytest.raises(MethodError, match=r"values=zero .* take pick=gradient or pick=random"):
        Unprune(values="zero")
    with pytest.raises(MethodError, match="scale must be positive"):
        CheckpointDifference(scale=0)
    refused(pruned, Unprune(criterion="snip"), MethodError, "magnitude", "not snip")
    refused(pruned, FromDense(criterion="snip"), NeedsError, "--keep-dense")
    by_filter = OneShot(sparsity=0.5, criterion="l1", granularity="filter", recovery=0)
    model = efface.prune(plain, by_filter)
    refused(model, Unprune(values="zero", pick="random"), MethodError, "initial, rewind or random")
    refused(model, Unprune(criterion="magnitude"), MethodError, "l1", "not magnitude")


@pytest.mark.parametrize("criterion", ["l1", "l2", "geometric-median"])
def test_the_criterion_of_filters_can_be_said(plain: TrainedModel, criterion: str) -> None:
    """As for a model that was adopted it must be."""
    by_filter = OneShot(sparsity=0.5, criterion=criterion, granularity="filter", recovery=0)
    model = efface.prune(plain, by_filter)
    method = Unprune(Spy(Shift()), criterion=criterion)
    assert run(model, first_of(model, 24), method).digest


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with workplace(tmp_path, monkeypatch) as folder:
        provide_model(folder)
        prune = "prune mine:task --model m.st --method magnitude --sparsity 0.5 --set recovery=0"
        done(f"{prune} --out s.st")
        before = snapshot(folder)
        start = "forget mine:task --class 1 --out x.st --model"
        for rest, words in {
            "m.st --method unprune": "prune it first",
            "s.st --method unprune --set p=0": "p must lie in (0, 1]",
            "s.st --method unprune --set values=zero": "take pick=gradient",
            "s.st --method unprune --set values=rewind": "--rewind",
            "s.st --method unprune --set order=sideways": "order",
            "s.st --method unprune --set criterion=taylor": "not taylor",
            "s.st --method from-dense": "--keep-dense",
            "s.st --method checkpoint-difference": "--rewind",
        }.items():
            answer = command(f"{start} {rest}")
            assert (answer.code, answer.out) == (2, ""), rest
            assert len(answer.err.splitlines()) == 1
            assert words in answer.err
            assert snapshot(folder) == before
        done(f"{start} s.st --method unprune --set inner.epochs=1 --set rounds=2")
