"""Forgetting in dense weights, and the difference of checkpoints, against slow twins; bad input."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import efface
from efface.data import order, uniforms
from efface.mask import Mask
from efface.seeds import own_seed, seed_for
from efface.sparsify import OMP, OneShot
from efface.task import Settings, Split
from efface.trained import TrainedModel
from efface.unlearn import Chain, CheckpointDifference, FromDense, Unprune

from . import oracles
from .conftest import make_conv_task, make_task
from .test_unprune_oracles import (
    LOG,
    Shift,
    Spy,
    State,
    Unit,
    best,
    dense,
    filters,
    first_of,
    initial_of,
    kept_in,
    norms,
    pattern,
    run,
    same,
    single,
    state_of,
    zeroed,
)
from .test_unprune_oracles2 import RESIDUAL, SCORES, SETTINGS, Small, averages


@pytest.fixture(scope="module")
def whole() -> TrainedModel:
    """A dense MLP with rewind weights."""
    task = make_task(fit=Settings(epochs=4, batch_size=32, lr=0.1))
    return efface.train(task, seed=0, rewind=2)


@pytest.fixture(scope="module")
def plain() -> TrainedModel:
    """Two convolutions with batch norm."""
    return efface.train(make_conv_task(fit=SETTINGS), seed=0, rewind=1)


@pytest.fixture(scope="module")
def residual() -> TrainedModel:
    return efface.train(make_conv_task(network=Small, fit=SETTINGS), seed=0, rewind=1)


# --- dense weights --------------------------------------------------------------------------------


def moved(state: State, names: list[str]) -> State:
    """What ``Shift`` makes of it."""
    return {n: t + pattern(n, t.shape) if n in names else t for n, t in state.items()}


@pytest.mark.parametrize("weights", ["new", "dense", "sparse", "moved"])
@pytest.mark.parametrize("granularity", ["layer", "global"])
@pytest.mark.parametrize("kind", ["layer", "global", "convolution", "l1", "l2"])
def test_forgetting_in_dense_weights_equals_its_twin(
    whole: TrainedModel, residual: TrainedModel, weights: Any, granularity: Any, kind: str
) -> None:
    """No mask inside; as many are kept as before; what is kept comes from where the page says."""
    by_filter = kind in SCORES
    full = residual if by_filter or kind == "convolution" else whole
    how: dict[str, Any] = {"granularity": kind} if kind in ("layer", "global") else {}
    if by_filter:
        how = {"granularity": "filter", "criterion": kind}
    model = efface.prune(full, OneShot(sparsity=0.6, recovery=1, **how), keep_dense=True)
    old, start = state_of(model.network), state_of(full.network)
    same(dense(model.dense or {}), start)
    units = filters(model, RESIDUAL) if by_filter else single(model, granularity)
    LOG.clear()
    method = FromDense(Spy(Shift()), weights=weights, granularity=granularity)
    split = first_of(model, 24)
    after = efface.forget(model, split, method)
    ((mask, before, behind),) = LOG
    new = moved(start, [n for n, _ in model.network.named_parameters()])
    assert not mask
    same(before, start)
    same(behind, new)
    scores, there = SCORES.get(kind, norms)(new, units), kept_in(model.mask or {}, units)
    kept: set[Unit] = set()
    for pool in units.pools:
        kept |= best(pool, scores, len([u for u in pool if u in there]))
    assert kept_in(after.mask or {}, units) == kept != there
    lent = {n: t.clone() for n, t in old.items()}
    for unit in kept - there:
        for name, i in units.entries[unit]:
            lent[name].view(-1)[i] = new[name].view(-1)[i]
    went = {n: t + (new[n] - start[n]) if t.is_floating_point() else t for n, t in old.items()}
    for unit in kept - there:
        for name, i in units.entries[unit]:
            went[name].view(-1)[i] = new[name].view(-1)[i]
    laid = {"new": new, "dense": start, "sparse": lent, "moved": went}[weights]
    found = state_of(after.network)
    anew = full is residual  # it has batch norm, whose statistics are taken anew
    same(found, zeroed(laid, units, kept), buffers=not anew)
    for name, mean in averages(model, found, split.retain).items() if anew else ():
        assert torch.allclose(found[name].double(), mean, rtol=1e-4, atol=1e-5), name
    same(dense(after.dense or {}), new)  # for the next request


def test_filters_that_come_back_to_sparse_weights_have_statistics(plain: TrainedModel) -> None:
    pruner = OneShot(sparsity=0.6, criterion="l2", granularity="filter", recovery=60)
    model = efface.prune(plain, pruner, keep_dense=True)
    after = efface.forget(model, first_of(model, 24), FromDense(Shift(), weights="sparse"))
    back = (after.mask or {})["1.weight"] & ~(model.mask or {})["1.weight"]
    assert back.any()
    wanted = averages(after, state_of(after.network), torch.arange(24))["1.running_var"][back]
    found = state_of(after.network)["1.running_var"][back].double()
    assert torch.allclose(found, wanted, rtol=0.5)


def test_the_second_request_begins_where_the_first_ended(whole: TrainedModel) -> None:
    model = efface.prune(whole, OneShot(sparsity=0.6, recovery=1), keep_dense=True)
    LOG.clear()
    once = efface.forget(model, first_of(model, 60), FromDense(Spy(Shift()), weights="sparse"))
    twice = efface.forget(once, first_of(model, 27), FromDense(Spy(Shift())))
    same(LOG[1][1], LOG[0][2])
    assert (twice.mask or Mask({})).kept == (model.mask or Mask({})).kept
    assert model.dense is not None
    same(dense(model.dense), state_of(whole.network))


# --- masks that are neither of weights nor of filters ---------------------------------------------


def test_rows_without_their_biases(plain: TrainedModel) -> None:
    """As ``torch.nn.utils.prune.ln_structured`` makes them: the density is what it was."""
    network = copy.deepcopy(plain.network)
    for layer, share in ((network[0], 0.5), (network[4], 0.4)):
        torch_prune.ln_structured(layer, "weight", share, n=2, dim=0)
    model = efface.adopt(plain.task, network.state_dict(), initial=initial_of(plain))
    method = Unprune(Spy(Shift()), criterion="magnitude")
    after = run(model, first_of(model, 24), method)
    for name, keep in (model.mask or {}).items():
        assert int((after.mask or {})[name].sum()) == int(keep.sum())


@pytest.mark.parametrize("method", [Unprune(Spy(Shift())), FromDense(Spy(Shift()))], ids=type)
def test_single_weights_after_filters(plain: TrainedModel, method: Any) -> None:
    by_filter = OneShot(sparsity=0.4, criterion="l2", granularity="filter", recovery=1)
    by_weight = OneShot(sparsity=0.7, granularity="layer", recovery=1)
    model = efface.prune(efface.prune(plain, by_filter, keep_dense=True), by_weight)
    after = efface.forget(model, first_of(model, 24), method)
    for name in ("0.weight", "4.weight"):
        assert int((after.mask or {})[name].sum()) == int((model.mask or {})[name].sum())


# --- the difference of checkpoints ----------------------------------------------------------------


def in_double(task: efface.Task) -> efface.Task:
    """The task in float64 and without dropout."""

    def network() -> nn.Module:
        net = task.network().double()
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return net

    return dataclasses.replace(task, network=network, train=(task.train[0].double(), task.train[1]))


@dataclasses.dataclass
class Replay:
    """The first epochs of a training again, by hand: SGD with Nesterov momentum, number by number.

    Args:
        task: In float64.
        epochs: K.
        seed: Of the training.
        plan: The records that the training had.
    """

    task: efface.Task
    epochs: int
    seed: int = 0
    plan: Tensor | None = None

    def batches(self, epoch: int) -> list[list[int]]:
        """Those of the training."""
        n = len(self.task.train[1])
        plan = torch.arange(n) if self.plan is None else self.plan
        mixed = order(self.seed, "train/retain", epoch, plan, n)
        return oracles.cut(mixed.tolist(), self.task.fit.batch_size)

    def without(self, gone: Sequence[int], rate: str = "matched") -> State:
        """The weights after K epochs; the records that are gone are left out of their batches."""
        task, s = self.task, self.task.fit
        torch.manual_seed(seed_for(self.seed, "init"))
        network = task.network().train()
        optimizer = oracles.ScalarOptimizer("sgd", s.momentum, s.weight_decay)
        steps = len(self.batches(0))
        left = [p for batch in self.batches(0) for p in batch if p not in gone]
        factor = len(oracles.cut(left, s.batch_size)) / steps if rate == "matched" else 1.0
        for epoch in range(self.epochs):
            for i, batch in enumerate(self.holed(epoch, gone)):
                if batch:
                    step = epoch * steps + i
                    lr = oracles.learning_rate(step, s.epochs * steps, s.lr, s.schedule, s.warmup)
                    self.one_step(network, optimizer, epoch, batch, lr * factor)
        return state_of(network)

    def holed(self, epoch: int, gone: Sequence[int]) -> list[list[int]]:
        """The batches without what is gone; a record that is left alone joins those before it."""
        holed = [[p for p in batch if p not in gone] for batch in self.batches(epoch)]
        for i, batch in enumerate(holed):
            if len(batch) == 1:
                there = [*range(i - 1, -1, -1), *range(i + 1, len(holed))]
                where = next((j for j in there if holed[j]), None)
                if where is not None:
                    holed[where], holed[i] = [*holed[where], *batch], []
        return holed

    def one_step(
        self, network: nn.Module, optimizer: Any, epoch: int, batch: list[int], lr: float
    ) -> None:
        inputs, targets = self.task.train
        rows = [inputs[p : p + 1] for p in batch]
        augment = self.task.augment
        if augment is not None:
            table = uniforms(self.seed, epoch, len(inputs), augment.draws)
            rows = [augment(row, table[p : p + 1]) for row, p in zip(rows, batch, strict=True)]
        logits = network(torch.cat(rows))
        each = [-row.log_softmax(0)[targets[p]] for row, p in zip(logits, batch, strict=True)]
        named = dict(network.named_parameters())
        found = torch.autograd.grad(torch.stack(each).mean(), [*named.values()])
        for (name, p), g in zip(named.items(), found, strict=True):
            new = optimizer.updated(name, p.flatten().tolist(), g.flatten().tolist(), lr)
            p.data = torch.tensor(new, dtype=p.dtype).reshape(p.shape)


def close(found: Any, wanted: State) -> None:
    """Equal up to the loss being taken in float32."""
    assert wanted
    for name, tensor in wanted.items():
        if "num_batches" not in name:
            assert torch.allclose(dense(found)[name], tensor, rtol=0, atol=2e-7), name


def shifted(base: State, model: TrainedModel, new: State, old: State, by: float = 1.0) -> State:
    """θ + c (θ′ − θ_K), for parameters."""
    names = [n for n, _ in model.network.named_parameters()]
    return {n: base[n] + by * (new[n] - old[n]) for n in names}


BASE = Settings(epochs=5, batch_size=16, lr=0.1, weight_decay=1e-3)
CHANGES: list[dict[str, Any]] = [
    {},
    {"batch_size": 17, "momentum": 0.0},
    {"schedule": "cosine", "weight_decay": 0.05},
    {"schedule": "linear", "warmup": 0.3},
    {"schedule": "step", "epochs": 3},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize(("rate", "scale"), [("matched", 1.0), ("recorded", 2.5)])
def test_difference_equals_a_replay_by_hand(changes: Any, rate: Any, scale: float) -> None:
    task = in_double(make_task(fit=dataclasses.replace(BASE, **changes)))
    split = Split.random(task, 0.15, seed=1)
    trained, replay = efface.train(task, seed=4, rewind=2), Replay(task, 2, seed=4)
    old, new = replay.without([], "recorded"), replay.without(split.forget.tolist(), rate)
    close(trained.rewind, old)
    after = efface.forget(trained, split, CheckpointDifference(scale, rate), seed=9)
    close(after.rewind, new)
    base = state_of(trained.network)
    close(after.network.state_dict(), shifted(base, trained, new, old, scale))


def holes(replay: Replay, *left: int) -> list[int]:
    """Records to forget, so that this many are left of each of the first batches."""
    return [p for batch, keep in zip(replay.batches(0), left, strict=False) for p in batch[keep:]]


@pytest.mark.parametrize(
    "left",
    [
        (16, 0, 16),
        (16, 16, 1, 16),
        (1, 16, 16),
        (0, 16, 16, 0, 5),
        (16, 0, 1, 16),
        (16, 1, 1, 16),
    ],
    ids=str,
)
def test_batches_of_which_little_is_left(left: tuple[int, ...]) -> None:
    """An empty batch is no step; nobody is left alone, since batch norm needs two."""
    task = in_double(make_task(fit=BASE))
    replay = Replay(task, 1)
    gone = holes(replay, *left)
    trained = efface.train(task, rewind=1)
    split = Split.by_ids(task, [task.ids_[p] for p in gone])
    close(efface.forget(trained, split, CheckpointDifference()).rewind, replay.without(gone))


def test_nobody_is_alone_before_batch_norm() -> None:
    network = lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))  # noqa: E731
    task = make_task(network=network, fit=Settings(epochs=2, batch_size=4, lr=0.05))
    trained = efface.train(task, rewind=1)
    efface.forget(trained, Split.random(task, 0.5, seed=0), CheckpointDifference())


def test_difference_with_augmentation_and_batch_norm() -> None:
    """Parameters move by the difference; statistics are averages over D_r, un-augmented."""
    task = in_double(make_conv_task(fit=Settings(epochs=2, batch_size=40, lr=0.05)))
    split, replay = Split.random(task, 0.25, seed=1), Replay(task, 1)
    trained = efface.train(task, rewind=1)
    old, new = replay.without([], "recorded"), replay.without(split.forget.tolist())
    close(trained.rewind, old)
    after = efface.forget(trained, split, CheckpointDifference())
    close(after.rewind, new)
    close(after.network.state_dict(), shifted(state_of(trained.network), trained, new, old))
    found = state_of(after.network)
    close(found, averages(after, found, split.retain))


def test_difference_under_a_mask_inside_from_dense_and_a_second_time(tmp_path: Path) -> None:
    task = in_double(make_task(fit=BASE))
    one, two = Split.random(task, 0.1, seed=1), Split.random(task, 0.15, seed=2)
    trained, replay = efface.train(task, rewind=2), Replay(task, 2)
    old, base = replay.without([], "recorded"), state_of(trained.network)
    new = replay.without(one.forget.tolist())
    newest = replay.without([*one.forget.tolist(), *two.forget.tolist()])

    once = efface.forget(trained, one, CheckpointDifference(), seed=1)
    other = dataclasses.replace(task, fit=Settings(epochs=3, batch_size=7, lr=0.5))
    loaded = efface.load(once.save(tmp_path / "once.safetensors"), other)
    twice = efface.forget(loaded, two, CheckpointDifference(), seed=2)  # settings of the lineage
    close(twice.rewind, newest)
    close(twice.network.state_dict(), shifted(base, trained, newest, old))
    chained = efface.forget(trained, one, Chain(CheckpointDifference(), CheckpointDifference()))
    close(chained.network.state_dict(), state_of(once.network))

    sparse = efface.prune(trained, OMP(sparsity=0.5), keep_dense=True)
    units = single(sparse, "global")
    there = shifted(state_of(sparse.network), trained, new, old)
    after = efface.forget(sparse, one, CheckpointDifference())
    assert after.mask == sparse.mask
    close(after.network.state_dict(), zeroed(there, units, kept_in(sparse.mask or {}, units)))

    method = FromDense(CheckpointDifference(), weights="new", granularity="global")
    after = efface.forget(efface.forget(sparse, one, method), two, method)
    full = shifted(base, trained, newest, old)
    kept = best(units.pools[0], norms(full, units), (sparse.mask or Mask({})).kept)
    assert kept_in(after.mask or {}, units) == kept
    close(after.network.state_dict(), zeroed(full, units, kept))
    close(after.dense, full)
    close(after.rewind, newest)


def test_difference_of_a_retrained_model() -> None:
    """Its batches were those of what it was trained on, in an order of its own."""
    task = in_double(make_task(fit=BASE))
    one, two = Split.random(task, 0.1, seed=1), Split.random(task, 0.15, seed=2)
    pruned = efface.prune(efface.train(task, rewind=2), OMP(sparsity=0.5))
    model = efface.retrain(task, one, model=pruned, like="repruned", seed=4)
    replay = Replay(task, 2, own_seed(4), one.retain)
    close(model.rewind, replay.without([], "recorded"))
    after = efface.forget(model, two, CheckpointDifference())
    close(after.rewind, replay.without(two.forget.tolist()))
