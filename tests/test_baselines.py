"""SalUn, SSD, SCRUB, SFRon and proximal l1: each again by hand, from its formulas, in float64."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import efface
from efface.data import order
from efface.errors import MethodError
from efface.fitting import Fit
from efface.journal import Journal
from efface.mask import Mask
from efface.task import Settings
from efface.unlearn import (
    SSD,
    FineTune,
    ProximalL1,
    RandomLabel,
    SalUn,
    Scrub,
    SFRon,
    Unlearner,
    build,
)
from efface.unlearn.partial import Frozen
from efface.unlearn.proximal import SoftThreshold
from efface.unlearn.relabel import wrong_labels
from efface.unlearn.scrub import divergence
from efface.unlearn.sfron import adaptive, record_losses, weighted_ascent
from efface.unlearn.ssd import dampen_, squared_batch_gradients

from . import oracles

NewTask = Callable[..., efface.Task]
Named = dict[str, Tensor]

SEED = 7


# --- what the twins share -------------------------------------------------------------------------


def weights(network: nn.Module) -> Named:
    return {n: p.detach().clone() for n, p in network.named_parameters()}


def record_loss(network: nn.Module, x: Tensor, label: int) -> Tensor:
    """Cross-entropy of one record, in the network's own type."""
    z = network(x[None].to(next(network.parameters()).dtype))[0]
    return z.exp().sum().log() - z[label]


def mean_loss(network: nn.Module, task: efface.Task, positions: Any, labels: Any) -> Tensor:
    rows = [record_loss(network, task.train[0][p], int(labels[p])) for p in positions]
    return torch.stack(rows).mean()


def slopes(network: nn.Module, loss: Tensor) -> Named:
    named = dict(network.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def fisher(network: nn.Module, task: efface.Task, positions: Tensor) -> Named:
    """Mean of squared gradients, one record after the other."""
    total = {n: torch.zeros_like(p) for n, p in network.named_parameters()}
    for p in positions.tolist():
        loss = record_loss(network, task.train[0][p], int(task.train[1][p]))
        for name, g in slopes(network, loss).items():
            total[name] += g**2 / len(positions)
    return total


def batches(path: str, positions: Tensor, epoch: int, n: int, size: int) -> list[list[int]]:
    """Batches of a pass of the stream with this path."""
    return oracles.cut(order(SEED, path, epoch, positions, n).tolist(), size)


def step_by_hand(
    network: nn.Module, loss: Tensor, optimizer: oracles.ScalarOptimizer, lr: float
) -> None:
    """One optimiser step over every number."""
    named = dict(network.named_parameters())
    found = slopes(network, loss)
    for name, p in named.items():
        new = optimizer.updated(name, p.flatten().tolist(), found[name].flatten().tolist(), lr)
        p.data = torch.tensor(new, dtype=p.dtype).reshape(p.shape)


def scalar_optimizer(settings: Settings) -> oracles.ScalarOptimizer:
    return oracles.ScalarOptimizer(settings.optimizer, settings.momentum, settings.weight_decay)


def check_close(found: nn.Module, wanted: nn.Module, atol: float = 1e-5) -> None:
    for (name, p), q in zip(found.named_parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(p.detach().double(), q.detach(), atol=atol), name


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its split, a fit bound to it, and its network in float64."""

    model: efface.TrainedModel
    split: efface.Split
    fit: Fit
    twin: nn.Module

    @property
    def task(self) -> efface.Task:
        return self.model.task


@pytest.fixture
def case(trained: efface.TrainedModel, class_split: efface.Split) -> Case:
    model = trained.copy()
    fit = Fit(model.task, SEED, subject=model)
    return Case(model, class_split, fit, copy.deepcopy(model.network).double())


@pytest.fixture
def whole_case(
    new_task: NewTask, trained: efface.TrainedModel, class_split: efface.Split
) -> Callable[..., Case]:
    """A case with one batch an epoch, other settings changed at will."""

    def make(**changes: Any) -> Case:
        plain = {"momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "batch_size": 500}
        task = new_task(fit=Settings(**{"epochs": 6, "lr": 0.1} | plain | changes))
        model = efface.TrainedModel(task, copy.deepcopy(trained.network))
        split = efface.Split(task, class_split.forget, class_split.retain, class_split.selector)
        fit = Fit(task, SEED, subject=model)
        return Case(model, split, fit, copy.deepcopy(model.network).double())

    return make


class Recorder:
    """A constraint that keeps weights and gradient of every step."""

    def __init__(self) -> None:
        self.gradients: list[Named] = []
        self.weights: list[Named] = []

    def begin(self, params: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in params.items()})
        self.weights.append({n: p.detach().clone() for n, p in params.items()})

    def end(self, params: Any) -> None:
        pass


# --- SalUn ----------------------------------------------------------------------------------------


def top(scores: Sequence[float], count: int) -> set[int]:
    """Places of the largest scores, the first of equal ones."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def salient_by_hand(case: Case, fraction: float) -> Named:
    loss = mean_loss(case.twin, case.task, case.split.forget.tolist(), case.task.train[1])
    found = {n: g.abs() for n, g in slopes(case.twin, loss).items()}
    flat = torch.cat([g.flatten() for g in found.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[list(top(flat.tolist(), round(fraction * len(flat))))] = True
    parts = chosen.split([g.numel() for g in found.values()])
    return {n: t.reshape(found[n].shape) for n, t in zip(found, parts, strict=True)}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_salun_moves_salient_weights_only_whatever_the_optimiser(
    new_task: NewTask, trained: efface.TrainedModel, class_split: efface.Split, optimizer: Any
) -> None:
    settings = Settings(epochs=6, batch_size=16, lr=0.05, weight_decay=0.1, optimizer=optimizer)
    task = new_task(fit=settings)
    model = efface.TrainedModel(task, copy.deepcopy(trained.network))
    split = efface.Split(task, class_split.forget, class_split.retain, class_split.selector)
    twin = copy.deepcopy(model.network).double()
    salient = salient_by_hand(Case(model, split, Fit(task), twin), 0.3)
    after = weights(efface.forget(model, split, SalUn(0.3, epochs=2, lr=0.01)).network)
    for name, old in weights(model.network).items():
        assert torch.equal(after[name][~salient[name]], old[~salient[name]]), name
        moved = after[name][salient[name]] != old[salient[name]]
        assert moved.float().mean() > 0.99 or not salient[name].any(), name


def test_zeroing_gradients_instead_would_not_hold_them(case: Case) -> None:
    """The error that the constraint is there to avoid: the test above must be able to see it."""
    salient = salient_by_hand(case, 0.3)

    class Zeroed:
        def begin(self, params: Any) -> None:
            for name, p in params.items():
                p.grad.mul_(salient[name])

        def end(self, params: Any) -> None:
            pass

    before = weights(case.model.network)
    FineTune(epochs=1, lr=0.01)(case.model, case.split, case.fit.with_(constraint=Zeroed()))
    after = weights(case.model.network)
    assert any((after[n][~salient[n]] != before[n][~salient[n]]).any() for n in before)


def test_salun_by_hand(case: Case) -> None:
    salient = salient_by_hand(case, 0.4)
    n, s = len(case.task.train[1]), case.task.fit
    labels = wrong_labels(case.task.train[1], case.split.forget, 3, case.fit)
    SalUn(0.4, epochs=2, lr=0.03)(case.model, case.split, case.fit)
    assert case.fit.meter.facts["salient"] == sum(int(t.sum()) for t in salient.values())
    optimizer, kept, step = scalar_optimizer(s), weights(case.twin), 0
    steps = 2 * len(oracles.cut(range(n), s.batch_size))
    for epoch in range(2):
        for batch in batches("fit/all", torch.arange(n), epoch, n, s.batch_size):
            lr = oracles.learning_rate(step, steps, 0.03, s.schedule, 0.0)
            step_by_hand(case.twin, mean_loss(case.twin, case.task, batch, labels), optimizer, lr)
            for name, p in case.twin.named_parameters():
                p.data[~salient[name]] = kept[name][~salient[name]]
            step += 1
    check_close(case.model.network, case.twin)


def test_salun_with_all_weights_is_random_labels(
    trained: efface.TrainedModel, split: efface.Split
) -> None:
    every = efface.forget(trained, split, SalUn(1.0, epochs=2, lr=0.03), seed=3)
    plain = efface.forget(trained, split, RandomLabel(epochs=2, lr=0.03), seed=3)
    assert every.digest == plain.digest


def test_salun_counts_kept_weights_of_a_pruned_model(
    pruned: efface.TrainedModel, split: efface.Split
) -> None:
    after = efface.forget(pruned, split, SalUn(0.25, epochs=1, lr=0.05))
    total = sum(p.numel() for p in pruned.network.parameters())
    assert pruned.mask is not None
    alive = total - pruned.mask.total + pruned.mask.kept
    assert after.lineage[-1].detail["salient"] == round(0.25 * alive)
    old, new = weights(pruned.network), weights(after.network)
    moved = sum(int((old[n] != new[n]).sum()) for n in old)
    assert 0.8 * round(0.25 * alive) < moved <= round(0.25 * alive)


def test_frozen_holds_parameters_that_are_not_named() -> None:
    net = nn.Linear(2, 2)
    old = weights(net)
    keep = Frozen(net, {"bias": torch.tensor([True, False])})
    with torch.no_grad():
        for p in net.parameters():
            p += 1
    keep.begin(dict(net.named_parameters()))
    keep.end(dict(net.named_parameters()))
    assert torch.equal(net.weight, old["weight"])
    assert torch.equal(net.bias, old["bias"] + torch.tensor([1.0, 0.0]))


# --- SSD ------------------------------------------------------------------------------------------


def dampened(old: Named, forget: Named, everyone: Named, alpha: float, lam: float) -> Named:
    """One number at a time."""
    new = {}
    for name, w in old.items():
        rows = zip(
            w.flatten().tolist(),
            forget[name].flatten().tolist(),
            everyone[name].flatten().tolist(),
            strict=True,
        )
        values = [v * min(lam * d / f, 1.0) if f > alpha * d else v for v, f, d in rows]
        new[name] = torch.tensor(values, dtype=torch.float64).reshape(w.shape)
    return new


@pytest.mark.parametrize(("alpha", "lam"), [(None, 1.0), (1.3, 0.5), (1.0, 1.8)])
def test_ssd_by_hand(case: Case, alpha: float | None, lam: float) -> None:
    everyone = torch.cat([case.split.retain, case.split.forget])
    used = math.sqrt(120 / 40) if alpha is None else alpha
    parts = [fisher(case.twin, case.task, p) for p in (case.split.forget, everyone)]
    old = weights(case.twin)
    wanted = dampened(old, parts[0], parts[1], used, lam)
    SSD(alpha, lam)(case.model, case.split, case.fit)
    changed = 0
    for name, new in weights(case.model.network).items():
        assert torch.allclose(new.double(), wanted[name], rtol=1e-4, atol=1e-7), name
        same = wanted[name] == old[name]
        assert torch.equal(new[same].double(), old[name][same]), name
        changed += int((~same).sum())
    assert 0 < changed < sum(w.numel() for w in old.values())
    assert case.fit.meter.facts["alpha"] == used
    assert case.fit.meter.facts["dampened"] >= changed
    assert case.fit.meter.images == {"forget": 40, "retain": 80}


def test_ssd_of_single_records_in_batches_is_the_exact_one(
    trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    exact = weights(efface.forget(trained, class_split, SSD(1.5)).network)
    single = weights(efface.forget(trained, class_split, SSD(1.5, batched=1)).network)
    assert all(torch.allclose(exact[n], single[n], rtol=1e-4, atol=1e-7) for n in exact)
    other = weights(efface.forget(trained, class_split, SSD(1.5, batched=16)).network)
    assert not all(torch.allclose(exact[n], other[n], rtol=1e-2) for n in exact)


def test_squared_batch_gradients_by_hand(case: Case) -> None:
    positions = case.split.forget[:23]
    draw = torch.randperm(23, generator=case.fit.generator("batches/forget"))
    cuts = torch.split(positions[draw], 8)
    total = {n: torch.zeros_like(p) for n, p in case.twin.named_parameters()}
    for batch in cuts:
        loss = mean_loss(case.twin, case.task, batch.tolist(), case.task.train[1])
        for name, g in slopes(case.twin, loss).items():
            total[name] += g**2 / len(cuts)
    found = squared_batch_gradients(case.fit, case.model.network, positions, 8, "forget")
    assert case.fit.meter.images == {"forget": 23}
    for name, t in total.items():
        assert torch.allclose(found[name].double(), t, rtol=1e-4, atol=1e-9), name


def test_the_papers_threshold_selects_nothing_per_record(
    trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    """Per record I_D ≥ (n_f / n) I_f: above α = n / n_f nothing can be selected."""
    bound = 120 / 40
    after = efface.forget(trained, class_split, SSD(bound * 1.001))
    assert after.digest == trained.digest
    assert efface.forget(trained, class_split, SSD(bound * 0.7)).digest != trained.digest


def test_ssd_leaves_statistics_and_modes_alone(conv_trained: efface.TrainedModel) -> None:
    split = efface.Split.by_class(conv_trained.task, 0)
    for method in (SSD(1.2), SSD(1.2, batched=8)):
        after = efface.forget(conv_trained, split, method)
        assert after.digest != conv_trained.digest
        found = dict(after.network.named_buffers())
        assert all(torch.equal(found[n], b) for n, b in conv_trained.network.named_buffers())
        images = after.lineage[-1].detail["images"]
        assert sum(images.values()) == (48 if method.batched is None else 48 + 16)


def test_dampening_where_importance_is_zero_or_infinite_ratio() -> None:
    w = {"w": torch.tensor([2.0, 2.0, 2.0])}
    forget, everyone = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    assert dampen_(w, {"w": forget}, {"w": everyone}, alpha=1.5, lam=1.0) == 1
    assert w["w"].tolist() == [0.0, 2.0, 2.0]


# --- SCRUB ----------------------------------------------------------------------------------------


def divergence_by_hand(student: Tensor, teacher: Tensor) -> Tensor:
    """T² Σ_c p_c (log p_c − log q_c), p the teacher's answer at temperature 4; loops."""
    rows = []
    for s, t in zip(student, teacher, strict=True):
        s_sum, t_sum = (s / 4).exp().sum(), (t / 4).exp().sum()
        terms = [
            (t[c] / 4).exp() / t_sum * ((t[c] - s[c]) / 4 - t_sum.log() + s_sum.log())
            for c in range(len(s))
        ]
        rows.append(16 * torch.stack(terms).sum())
    return torch.stack(rows).mean()


def test_divergence_by_hand() -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = 5 * torch.randn(2, 7, 4, generator=draw, dtype=torch.float64)
    wanted = float(divergence_by_hand(student, teacher))
    assert float(divergence(student, teacher)) == pytest.approx(wanted, rel=1e-5)
    assert wanted > 0
    # and it is the one of the field, in its direction
    field = 16 * F.kl_div(
        (student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean"
    )
    assert wanted == pytest.approx(float(field))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "step", "constant"])
def test_scrub_by_hand(
    new_task: NewTask, trained: efface.TrainedModel, class_split: efface.Split, schedule: Any
) -> None:
    task = new_task(fit=Settings(epochs=6, batch_size=16, lr=0.1, schedule=schedule))
    model = efface.TrainedModel(task, copy.deepcopy(trained.network))
    split = efface.Split(task, class_split.forget, class_split.retain, class_split.selector)
    case = Case(model, split, Fit(task, SEED, subject=model), copy.deepcopy(model.network).double())
    teacher, peak, labels = copy.deepcopy(case.twin), 0.01, task.train[1]
    method = Scrub(gamma=0.7, alpha=0.3, max_epochs=2, cap=1e3, epochs=3, lr=peak)
    method(case.model, case.split, case.fit)

    def one_pass(path: str, positions: Tensor, lr: float, climb: bool) -> None:
        optimizer = scalar_optimizer(task.fit)
        for batch in batches(path, positions, 0, 120, 16):
            inputs = task.train[0][batch].double()
            loss = mean_loss(case.twin, task, batch, labels)
            distance = divergence_by_hand(case.twin(inputs), teacher(inputs).detach())
            total = -distance if climb else 0.7 * loss + 0.3 * distance
            step_by_hand(case.twin, total, optimizer, lr)

    for epoch in range(3):
        lr = oracles.learning_rate(epoch, 3, peak, schedule, 0.0)
        if epoch < 2:
            one_pass(f"fit/max/{epoch}/forget", split.forget, lr, climb=True)
        one_pass(f"fit/min/{epoch}/retain", split.retain, lr, climb=False)
    check_close(case.model.network, case.twin, atol=2e-4)
    assert case.fit.meter.images == {"forget": 80, "retain": 240}


@dataclasses.dataclass(frozen=True)
class Taught(Fit):
    """A fit whose teacher is another network than the model that it trains."""

    by: nn.Module = dataclasses.field(default_factory=nn.Identity)

    def teacher(self, trained: efface.TrainedModel) -> nn.Module:
        return self.by


@pytest.mark.parametrize("cap", [1e3, 1e-6])
def test_scrub_stops_climbing_at_the_cap(whole_case: Callable[..., Case], cap: float) -> None:
    case = whole_case()
    teacher = case.fit.teacher(case.model)
    with torch.no_grad():  # away from the teacher's weights, where there is no slope
        case.model.network[0].weight[0, 0] += 0.5
    before = weights(case.model.network)
    method = Scrub(gamma=0.0, alpha=0.0, max_epochs=3, cap=cap, epochs=3, lr=0.01)
    method(case.model, case.split, Taught(case.task, SEED, subject=case.model, by=teacher))
    after = weights(case.model.network)
    assert any((after[n] != before[n]).any() for n in before) == (cap > 1)


def test_scrub_recalibrates_once_and_freezes_when_asked(conv_trained: efface.TrainedModel) -> None:
    split = efface.Split.by_class(conv_trained.task, 0)
    after = efface.forget(conv_trained, split, Scrub(epochs=3, lr=0.01, bn="recalibrate"))
    modes = [fit["bn"] for fit in after.lineage[-1].detail["fits"]]
    assert modes == ["train", "train", "train", "train", "recalibrate"]
    frozen = efface.forget(conv_trained, split, Scrub(epochs=2, lr=0.01, bn="frozen"))
    found = dict(frozen.network.named_buffers())
    assert all(torch.equal(found[n], b) for n, b in conv_trained.network.named_buffers())


# --- SFRon ----------------------------------------------------------------------------------------


def test_adaptive_weights_by_hand() -> None:
    losses = torch.tensor([0.04, 0.5, 1.0, 9.0], dtype=torch.float64, requires_grad=True)
    raw = [1 / math.sqrt(v) for v in losses.tolist()]
    share = [r / sum(raw) for r in raw]
    found = adaptive(losses, cap=2.0)
    capped = [min(v, 2.0) for v in losses.tolist()]
    assert float(found.detach()) == pytest.approx(
        sum(s * v for s, v in zip(share, capped, strict=True))
    )
    (slope,) = torch.autograd.grad(found, losses)
    assert slope.tolist() == pytest.approx([*share[:3], 0.0])  # weights themselves have no slope


def test_losses_of_single_records(task: efface.Task, new_task: NewTask) -> None:
    draw = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(9, 3, generator=draw), torch.arange(9) % 3
    wanted = F.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(record_losses(Fit(task), logits, targets), wanted)

    def branching(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) * (2.0 if float(z.max()) > 0.5 else 1.0)

    doubled = record_losses(Fit(new_task(loss=branching)), logits, targets)
    assert torch.allclose(doubled, wanted * (1 + (logits.max(1).values > 0.5)))


def squared(case: Case, part: Tensor) -> Named:
    loss = mean_loss(case.twin, case.task, part.tolist(), case.task.train[1])
    return {n: g**2 for n, g in slopes(case.twin, loss).items()}


def ratios(case: Case) -> Named:
    """Squared gradients on D_f over those on D_r, one batch each."""
    forget, retain = squared(case, case.split.forget), squared(case, case.split.retain)
    return {n: (forget[n] + 1e-15) / (retain[n] + 1e-15) for n in forget}


def ascent_by_hand(case: Case, own: Named, weight: float, cap: float) -> Named:
    """The weighted, restricted and clipped slope of the ascent at the twin's weights."""
    inputs, labels = case.task.train
    rows = [record_loss(case.twin, inputs[p], int(labels[p])) for p in case.split.forget.tolist()]
    raw = [1 / math.sqrt(float(r.detach())) for r in rows]
    terms = [r / sum(raw) * row.clamp(max=cap) for r, row in zip(raw, rows, strict=True)]
    found = slopes(case.twin, weight * torch.stack(terms).sum())
    kept = {n: g * own[n] for n, g in found.items()}
    norm = math.sqrt(sum(float((g**2).sum()) for g in kept.values()))
    return {n: g * min(1.0, 7 / norm) if norm else g for n, g in kept.items()}


@pytest.mark.parametrize(
    ("alpha", "threshold", "cap", "clips"),
    [(0.5, 1.0, 8.0, False), (2e4, 1.0, 8.0, True), (0.5, 0.0, 8.0, False), (0.5, 2.0, 0.3, False)],
)
def test_sfron_by_hand(
    whole_case: Callable[..., Case], alpha: float, threshold: float, cap: float, clips: bool
) -> None:
    case = whole_case()
    own = {n: r >= threshold for n, r in ratios(case).items()}
    recorder = Recorder()
    method = SFRon(alpha, period=2, threshold=threshold, cap=cap, epochs=4, lr=0.001)
    method(case.model, case.split, case.fit.with_(constraint=recorder))
    assert case.fit.meter.facts["salient"] == sum(int(t.sum()) for t in own.values())
    for step, (now, found) in enumerate(zip(recorder.weights, recorder.gradients, strict=True)):
        case.twin.load_state_dict(now)
        retain = case.split.retain.tolist()
        wanted = slopes(case.twin, mean_loss(case.twin, case.task, retain, case.task.train[1]))
        if step % 2 == 0:
            weight = alpha * (1 + math.cos(math.pi * step / 4)) / 2
            climb = ascent_by_hand(case, own, weight, cap)
            norm = math.sqrt(sum(float((g**2).sum()) for g in climb.values()))
            assert (norm == pytest.approx(7)) == clips
            wanted = {n: g - climb[n] for n, g in wanted.items()}
        for name, g in found.items():
            assert torch.allclose(g.double(), wanted[name], atol=1e-5, rtol=1e-4), (step, name)


def test_sfron_above_the_cap_is_fine_tuning(whole_case: Callable[..., Case]) -> None:
    case, plain = whole_case(), whole_case()
    SFRon(epochs=3, lr=0.01, cap=1e-9)(case.model, case.split, case.fit)
    FineTune(epochs=3, lr=0.01)(plain.model, plain.split, plain.fit)
    assert case.model.digest == plain.model.digest


def test_the_ascent_alone_is_restricted(case: Case) -> None:
    (batch,) = case.task.records.batches([case.split.forget], torch.device("cpu"))
    network = case.model.network
    count = sum(p.numel() for p in network.parameters())
    own = torch.arange(count) % 3 == 0
    value = weighted_ascent(case.fit, network, batch, own, 2.0, 8.0)
    assert float(value.detach()) == 0.0
    found = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(network.parameters()))])
    assert (found[~own] == 0).all()
    assert (found[own] != 0).any()


# --- proximal l1 ----------------------------------------------------------------------------------


def test_soft_threshold_by_hand() -> None:
    draw = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(40, generator=draw))
    other = nn.Parameter(torch.ones(2))
    with torch.no_grad():
        w[:3] = torch.tensor([0.25, -0.25, -0.0])
    wanted = [math.copysign(max(abs(v) - 0.25, 0.0), v) for v in w.tolist()]
    prox = SoftThreshold(["w", "not there"])
    prox.by = 0.25
    prox.begin({"w": w})
    prox.end({"w": w, "other": other})
    found = w.detach()
    assert found.tolist() == pytest.approx(wanted, abs=1e-7)
    assert (found == 0).tolist() == [abs(v) < 1e-6 for v in wanted]
    assert not torch.signbit(found[found == 0]).any()
    assert 5 < int((found == 0).sum()) < 35
    assert other.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("schedule", ["decay", "constant", "grow"])
def test_proximal_l1_by_hand(case: Case, schedule: Any) -> None:
    s, alpha, peak, epochs = case.task.fit, 0.2, 0.02, 3
    ProximalL1(alpha, schedule, epochs=epochs, lr=peak)(case.model, case.split, case.fit)
    optimizer, step = scalar_optimizer(s), 0
    per_epoch = len(oracles.cut(range(80), s.batch_size))
    for epoch in range(epochs):
        factor = {"decay": 1 - epoch / epochs, "constant": 1.0, "grow": epoch / epochs}[schedule]
        for batch in batches("fit/retain", case.split.retain, epoch, 120, s.batch_size):
            lr = oracles.learning_rate(step, epochs * per_epoch, peak, s.schedule, 0.0)
            loss = mean_loss(case.twin, case.task, batch, case.task.train[1])
            step_by_hand(case.twin, loss, optimizer, lr)
            for p in case.twin.parameters():
                if p.ndim >= 2:
                    by = lr * alpha * factor
                    p.data = p.data.sign() * (p.data.abs() - by).clamp(min=0)
            step += 1
    check_close(case.model.network, case.twin)
    found = [p.detach() for p in case.model.network.parameters() if p.ndim >= 2]
    share = sum(int((p == 0).sum()) for p in found) / sum(p.numel() for p in found)
    assert case.fit.meter.facts["zeros"] == share
    assert share > 0.01


def test_without_penalty_it_is_fine_tuning(
    trained: efface.TrainedModel, split: efface.Split
) -> None:
    none = efface.forget(trained, split, ProximalL1(alpha=0.0, epochs=2, lr=0.03))
    assert none.digest == efface.forget(trained, split, FineTune(epochs=2, lr=0.03)).digest


STRONG: dict[str, Any] = {"alpha": 1e3, "schedule": "constant", "epochs": 1}


@pytest.mark.parametrize(
    ("scope", "gone"),
    [("conv", {"0.weight", "4.weight"}), ("weights", {"0.weight", "4.weight"}),
     ("all", {"0.weight", "4.weight", "9.weight"})],
)  # fmt: skip
def test_scopes_leave_biases_and_batch_norm_alone(
    conv_trained: efface.TrainedModel, scope: Any, gone: set[str]
) -> None:
    split = efface.Split.by_class(conv_trained.task, 0)
    after = efface.forget(conv_trained, split, ProximalL1(scope=scope, **STRONG))
    zero = {n for n, p in after.network.named_parameters() if (p == 0).all()}
    assert zero == gone
    assert after.lineage[-1].detail["zeros"] == 1.0


def test_a_scope_that_the_network_lacks_is_refused(
    trained: efface.TrainedModel, split: efface.Split
) -> None:
    with pytest.raises(MethodError, match="no weight in the scope 'conv'"):
        efface.forget(trained, split, ProximalL1(scope="conv"))


def test_zeros_become_the_mask_and_stay(
    trained: efface.TrainedModel, pruned: efface.TrainedModel, split: efface.Split
) -> None:
    method = ProximalL1(alpha=0.3, epochs=2, lr=0.1, keep_mask=True)
    after = efface.forget(trained, split, method, seed=1)
    assert after.mask is not None
    for name, keep in after.mask.items():
        assert torch.equal(keep, dict(after.network.named_parameters())[name] != 0)
    assert after.sparsity == pytest.approx(after.lineage[-1].detail["zeros"])
    assert after.sparsity > 0.02
    plain = efface.forget(trained, split, dataclasses.replace(method, keep_mask=False), seed=1)
    assert plain.mask is None
    assert plain.digest == after.digest
    # they stay through further training
    again = efface.forget(after, efface.Split.by_ids(after.task, ["r000"]), FineTune(epochs=1))
    assert again.mask == after.mask
    # a mask that was there is part of the new one, also where the scope is narrower
    narrow = dataclasses.replace(method, alpha=2.0, scope="weights")
    assert pruned.mask is not None
    both = efface.forget(pruned, split, narrow, seed=1).mask
    assert both is not None
    assert all(not (both[n] & ~keep).any() for n, keep in pruned.mask.items())
    assert both.kept < pruned.mask.kept


def test_a_mask_outside_the_scope_is_kept(trained: efface.TrainedModel) -> None:
    model = trained.copy()
    keep = torch.ones(3, 12, dtype=torch.bool)
    keep[0, :5] = False
    model.set_mask(Mask({"4.weight": keep}))
    split = efface.Split.random(model.task, 0.2)
    method = ProximalL1(alpha=0.3, scope="weights", epochs=1, keep_mask=True)
    after = efface.forget(model, split, method)
    assert after.mask is not None
    assert set(after.mask) == {"0.weight", "2.weight", "4.weight"}
    assert torch.equal(after.mask["4.weight"], keep)


# --- all five -------------------------------------------------------------------------------------

SMALL: list[Unlearner] = [
    SalUn(epochs=2),
    SSD(1.5),
    Scrub(epochs=2, lr=0.01),
    SFRon(epochs=2),
    ProximalL1(alpha=0.05, epochs=2, keep_mask=True),
]


class StopError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("method", SMALL, ids=lambda m: m.name)
def test_a_killed_command_ends_as_if_it_had_not_been(
    conv_trained: efface.TrainedModel, tmp_path: Path, method: Unlearner
) -> None:
    split = efface.Split.by_class(conv_trained.task, 1)
    whole = efface.forget(conv_trained, split, method, seed=5)
    seen = 0

    def killer(at: int) -> Callable[[str, int, int], None]:
        def progress(label: str, step: int, steps: int) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                raise StopError

        return progress

    for at in (2, 4, 9):
        seen = 0
        journal = Journal(tmp_path / "j", {"run": 1}, seconds=0.0)
        journal.start()
        try:
            found = efface.forget(
                conv_trained, split, method, seed=5, journal=journal, progress=killer(at)
            )
        except StopError:
            continue
        break
    else:
        journal = Journal(tmp_path / "j", {"run": 1}, seconds=0.0)
        found = efface.forget(conv_trained, split, method, seed=5, journal=journal)
    assert found.digest == whole.digest
    assert found.mask == whole.mask


@pytest.fixture(scope="module")
def digits_model() -> efface.TrainedModel:
    return efface.train(efface.datasets.digits(), seed=0)


@pytest.mark.parametrize(
    "method",
    [
        SalUn(epochs=2, lr=0.1),
        SSD(),
        Scrub(epochs=3, lr=0.03),
        SFRon(alpha=25.0, epochs=3, lr=0.1),
        ProximalL1(alpha=0.1, epochs=4, lr=0.1),
    ],
    ids=lambda m: m.name,
)
def test_a_class_is_forgotten_and_the_rest_is_not(
    digits_model: efface.TrainedModel, method: Unlearner
) -> None:
    task = digits_model.task
    split = efface.Split.by_class(task, 5)
    after = efface.forget(digits_model, split, method, seed=1).network.eval()
    inputs, targets = task.train
    with torch.no_grad():
        right = after(inputs).argmax(1) == targets
    assert float(right[split.forget].float().mean()) < 0.2
    assert float(right[split.retain].float().mean()) > 0.95


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("salun", {"fraction": 0}),
        ("salun", {"fraction": 1.01}),
        ("salun", {"epochs": -1}),
        ("ssd", {"alpha": 0}),
        ("ssd", {"alpha": "nan"}),
        ("ssd", {"lam": -0.1}),
        ("ssd", {"batched": 0}),
        ("scrub", {"gamma": -1}),
        ("scrub", {"alpha": "inf"}),
        ("scrub", {"max_epochs": -1}),
        ("scrub", {"cap": 0}),
        ("sfron", {"alpha": -1}),
        ("sfron", {"period": 0}),
        ("sfron", {"threshold": "nan"}),
        ("sfron", {"cap": -1}),
        ("proximal-l1", {"alpha": -1e-3}),
        ("proximal-l1", {"schedule": "sideways"}),
        ("proximal-l1", {"scope": "biases"}),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        build(name, options)
