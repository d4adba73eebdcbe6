"""Partial updates: exactly so many entries move, the others stay bit for bit, around any method."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import efface
from efface.curvature import gradient
from efface.data import Stream, order
from efface.errors import MethodError
from efface.fitting import Fit
from efface.journal import Journal
from efface.mask import Mask
from efface.recipes.plan import Method
from efface.sparsify import OneShot
from efface.sparsify.selection import highest
from efface.task import Settings
from efface.unlearn import (
    SSD,
    Chain,
    FineTune,
    FisherForgetting,
    GradientAscent,
    Influence,
    LayerwisePartial,
    PruneFirst,
    RandomLabel,
    Retrain,
    SalUn,
    Unlearner,
    build,
    catalogue,
    presets,
    to_json,
)
from efface.unlearn.ascent import Ball, Clipped
from efface.unlearn.base import check_ranges, filled, fit_settings, needs_of
from efface.unlearn.partial import Frozen
from efface.unlearn.places import CPU, FEW, Row, Rule, around, selected, some, top
from efface.unlearn.relabel import wrong_labels

from . import oracles

NewTask = Callable[..., efface.Task]
Named = dict[str, Tensor]
PICKS = ["random", "block", "magnitude", "gradient", "saliency"]
SEED = 7


def weights(network: nn.Module) -> Named:
    return {n: p.detach().clone() for n, p in network.named_parameters()}


def count(fraction: float, n: int) -> int:
    return min(n, max(1, round(fraction * n)))


def first_best(scores: Sequence[float], k: int) -> set[int]:
    """Places of the largest scores, the first of equal ones."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


# --- which entries --------------------------------------------------------------------------------


@pytest.mark.parametrize("scratch", [None, torch.empty(1000)])
@pytest.mark.parametrize("levels", [1, 2, 7, 10_000])
def test_the_top_of_a_row_is_that_of_a_sort(levels: int, scratch: Tensor | None) -> None:
    draw = torch.Generator().manual_seed(levels)
    for n in (1, 2, 17, 300, 1000):
        scores = torch.randint(0, levels, (n,), generator=draw).float()
        for k in {1, n // 3 + 1, n}:
            found = top(scores, k, scratch).tolist()
            assert len(found) == k
            assert set(found) == first_best(scores.tolist(), k)
            assert set(found) == set(highest(scores, k).nonzero().flatten().tolist())


def test_the_top_counts_nan_as_the_largest_and_takes_any_precision() -> None:
    scores = torch.tensor([0.0, math.nan, 2.0, 1.0, math.nan])
    assert [sorted(top(scores, k).tolist()) for k in (1, 2, 3)] == [[1], [1, 4], [1, 2, 4]]
    assert sorted(top(torch.tensor([1.0, 3.0, 2.0]).bfloat16(), 2).tolist()) == [1, 2]


@pytest.mark.parametrize(("n", "k"), [(9, 1), (9, 9), (FEW, 5), (FEW + 1, 1), (FEW + 1, 1640)])
def test_random_places_are_different_and_exactly_so_many(n: int, k: int) -> None:
    for seed in range(5):
        found = some(n, k, np.random.default_rng(seed), CPU)
        again = some(n, k, np.random.default_rng(seed), CPU)
        assert len(set(found.tolist())) == k
        assert int(found.min()) >= 0
        assert int(found.max()) < n
        assert torch.equal(found, again)
    if 1 < k < n:
        other = some(n, k, np.random.default_rng(99), CPU)
        assert set(other.tolist()) != set(found.tolist())


@pytest.mark.parametrize(("n", "k"), [(40, 8), (FEW + 500, 1700), (FEW + 500, FEW + 400)])
def test_every_place_is_as_likely_as_any_other(n: int, k: int) -> None:
    draw, times = np.random.default_rng(0), 400
    hits = np.zeros(n)
    for _ in range(times):
        hits[some(n, k, draw, CPU).numpy()] += 1
    p = k / n
    spread = hits.std() / math.sqrt(times * p * (1 - p))
    assert hits.sum() == times * k
    assert abs(spread - 1) < 0.3  # of binomial counts it is 1
    halves = abs(hits[: n // 2].sum() / hits.sum() - (n // 2) / n)
    assert halves < 0.02


def test_blocks_go_round() -> None:
    assert [around(5, 2, s, CPU).tolist() for s in (0, 3, 4)] == [[0, 1], [3, 4], [4, 0]]


def places_by_hand(
    scores: Mapping[str, Tensor], fraction: float, scope: str, mask: Mapping[str, Tensor]
) -> dict[str, set[int]]:
    """One entry after the other, from the definition."""
    rows = {
        n: [(float(s), n, i) for i, s in enumerate(t.flatten()) if n not in mask or keep[i]]
        for n, t in scores.items()
        for keep in [mask[n].flatten() if n in mask else None]
    }
    groups = list(rows.values()) if scope == "layer" else [[e for r in rows.values() for e in r]]
    found: dict[str, set[int]] = {n: set() for n in scores}
    for group in groups:
        for at in first_best([s for s, _, _ in group], count(fraction, len(group))):
            found[group[at][1]].add(group[at][2])
    return found


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("fraction", [0.001, 0.07, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_select_as_many_as_the_fraction_of_what_the_mask_keeps(
    trained: efface.TrainedModel, scope: Any, fraction: float, masked: bool
) -> None:
    model, draw = trained.copy(), torch.Generator().manual_seed(3)
    shapes = {n: p.shape for n, p in model.network.named_parameters()}
    if masked:
        some_ = {n: torch.rand(s, generator=draw) > 0.4 for n, s in shapes.items() if len(s) > 1}
        model.set_mask(Mask(some_))
    scores = {n: torch.randint(0, 6, s, generator=draw).float() for n, s in shapes.items()}
    rule = Rule(fraction, "gradient", "fixed", scope)
    found = selected(rule, model, scores, np.random.default_rng(0))
    wanted = places_by_hand(scores, fraction, scope, model.mask or {})
    assert {n: set(t.flatten().nonzero().flatten().tolist()) for n, t in found.items()} == wanted


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("pick", ["random", "block"])
def test_chance_selects_as_many_and_only_what_is_alive(pick: Any, scope: Any) -> None:
    alive = [torch.tensor([1, 2, 5, 6, 9, 11]), None, torch.tensor([], dtype=torch.long)]
    rows = [Row(12, alive[0]), Row(7, alive[1]), Row(3, alive[2])]
    rule = Rule(0.34, pick, "step", scope)
    for turn in range(8):
        found = rule.choose(rows, None, np.random.default_rng(0), turn)
        sizes = [len(f) for f in found]
        assert sizes == [2, 2, 0] if scope == "layer" else sum(sizes) == 4
        for row, places in zip(rows, found, strict=True):
            there = range(row.size) if row.alive is None else row.alive.tolist()
            assert len(set(places.tolist())) == len(places)
            assert set(places.tolist()) <= set(there)


def test_blocks_reach_every_entry_in_turn() -> None:
    rule = Rule(0.25, "block", "step", "layer")
    draws = [rule.choose([Row(20)], None, np.random.default_rng(4), t)[0] for t in range(4)]
    assert sorted(torch.cat(draws).tolist()) == list(range(20))


# --- what moves -----------------------------------------------------------------------------------


class Watch:
    """A constraint that keeps the weights before every step, and its gradient."""

    def __init__(self) -> None:
        self.before: list[Named] = []
        self.slopes: list[Named] = []

    def begin(self, params: Any) -> None:
        self.before.append({n: p.detach().clone() for n, p in params.items()})
        self.slopes.append({n: p.grad.clone() for n, p in params.items()})

    def end(self, params: Any) -> None:
        pass


def watched(
    model: efface.TrainedModel, split: efface.Split, method: Any, seed: int = SEED
) -> tuple[efface.TrainedModel, list[Named], Fit]:
    """A method on a copy; the weights before every step and at the end."""
    model, watch = model.copy(), Watch()
    fit = Fit(model.task, seed, subject=model)
    method(model, split, fit.with_(constraint=watch))
    return model, [*watch.before, weights(model.network)], fit


def settings_of(optimizer: str) -> dict[str, Any]:
    kind, _, momentum = optimizer.partition("+")
    return {"optimizer": kind, "momentum": 0.9 if momentum else 0.0}


OPTIMIZERS = ["sgd", "sgd+momentum", "adam", "adamw"]


def model_with(
    new_task: NewTask, trained: efface.TrainedModel, optimizer: str, **more: Any
) -> efface.TrainedModel:
    changes = {"epochs": 6, "batch_size": 16, "lr": 0.05, "weight_decay": 0.1}
    task = new_task(fit=Settings(**changes | settings_of(optimizer) | more))
    return efface.TrainedModel(task, copy.deepcopy(trained.network))


def on(task: efface.Task, split: efface.Split) -> efface.Split:
    return efface.Split(task, split.forget, split.retain, split.selector)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("redraw", ["step", "fixed"])
@pytest.mark.parametrize("pick", PICKS)
def test_in_every_step_the_fraction_moves_and_the_rest_stays(
    new_task: NewTask,
    trained: efface.TrainedModel,
    split: efface.Split,
    optimizer: str,
    redraw: Any,
    pick: Any,
) -> None:
    model = model_with(new_task, trained, optimizer)
    inner = FineTune(epochs=2, lr=0.01)
    method = LayerwisePartial(inner, 0.3, pick, redraw)
    _, states, _ = watched(model, on(model.task, split), method)
    assert len(states) > 10
    changed = [{n: new[n] != old[n] for n in old} for old, new in pairwise(states)]
    total = 0
    for step in changed:
        for name, moved in step.items():
            assert int(moved.sum()) <= count(0.3, moved.numel()), name
            total += int(moved.sum())
    limit = sum(count(0.3, t.numel()) for t in states[0].values()) * len(changed)
    assert total > 0.8 * limit  # weight decay moves nearly everything that may move
    ever = {n: torch.stack([step[n] for step in changed]).any(0) for n in changed[0]}
    if redraw == "fixed":
        assert all(int(t.sum()) <= count(0.3, t.numel()) for t in ever.values())
    elif pick in ("random", "block"):
        assert torch.cat([t.flatten() for t in ever.values()]).float().mean() > 0.95


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("redraw", ["step", "fixed"])
def test_over_all_layers_together(
    trained: efface.TrainedModel, split: efface.Split, pick: Any, redraw: Any
) -> None:
    method = LayerwisePartial(FineTune(epochs=1, lr=0.01), 0.05, pick, redraw, "global")
    _, states, fit = watched(trained, split, method)
    n = sum(t.numel() for t in states[0].values())
    for old, new in pairwise(states):
        moved = sum(int((new[name] != old[name]).sum()) for name in old)
        assert 0.8 * count(0.05, n) <= moved <= count(0.05, n)
    assert fit.meter.facts["partial"] == {"selected": count(0.05, n), "of": n}


def record_loss(network: nn.Module, x: Tensor, label: int) -> Tensor:
    z = network(x[None].double())[0]
    return z.exp().sum().log() - z[label]


def slopes(network: nn.Module, task: efface.Task, positions: Sequence[int], labels: Any) -> Named:
    x = task.train[0]
    loss = torch.stack([record_loss(network, x[p], int(labels[p])) for p in positions]).mean()
    named = dict(network.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@dataclass
class Twin:
    """A partial run written out: a float64 network, one number at a time, others copied back."""

    task: efface.Task
    network: nn.Module
    split: efface.Split
    labels: Tensor
    pick: str
    fraction: float

    def scores(self, here: Named, start: Named, step: int) -> Named | None:
        if self.pick == "magnitude":
            return {n: p.detach().abs() for n, p in self.network.named_parameters()}
        if self.pick == "gradient":
            return {n: g.abs() for n, g in here.items()}
        return {n: g.abs() / (start[n].abs() + start[n].abs().mean()) for n, g in here.items()}

    def run(self, lr: float, epochs: int, path: str) -> None:
        s, n = self.task.fit, len(self.labels)
        optimizer = oracles.ScalarOptimizer(s.optimizer, s.momentum, s.weight_decay)
        start = slopes(self.network, self.task, self.split.retain.tolist(), self.task.train[1])
        everyone = torch.arange(n)
        for epoch in range(epochs):
            batches = oracles.cut(order(SEED, path, epoch, everyone, n).tolist(), s.batch_size)
            for k, batch in enumerate(batches):
                step, steps = epoch * len(batches) + k, epochs * len(batches)
                rate = oracles.learning_rate(step, steps, lr, s.schedule, 0.0)
                here = slopes(self.network, self.task, batch, self.labels)
                scores = self.scores(here, start, step)
                may = places_by_hand(scores, self.fraction, "layer", {})
                for name, p in self.network.named_parameters():
                    old = p.flatten().tolist()
                    new = optimizer.updated(name, old, here[name].flatten().tolist(), rate)
                    kept = [b if i in may[name] else a for i, (a, b) in enumerate(zip(old, new))]  # noqa: B905
                    p.data = torch.tensor(kept, dtype=p.dtype).reshape(p.shape)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("pick", ["magnitude", "gradient", "saliency"])
def test_a_whole_run_by_hand(
    new_task: NewTask,
    trained: efface.TrainedModel,
    split: efface.Split,
    optimizer: str,
    pick: Any,
) -> None:
    model = model_with(new_task, trained, optimizer, batch_size=40)
    split = on(model.task, split)
    fit = Fit(model.task, SEED, subject=model)
    labels = wrong_labels(model.task.train[1], split.forget, 3, fit)
    twin = Twin(
        model.task, copy.deepcopy(model.network).double(), split, labels, pick, fraction=0.2
    )
    LayerwisePartial(RandomLabel(epochs=2, lr=0.01), 0.2, pick)(model, split, fit)
    twin.run(0.01, 2, "fit/all")
    for (name, p), q in zip(model.network.named_parameters(), twin.network.parameters()):  # noqa: B905
        assert torch.allclose(p.detach().double(), q.detach(), atol=2e-5), name


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("redraw", ["step", "fixed"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_with_all_of_each_layer_it_is_the_inner_method(
    pruned: efface.TrainedModel, split: efface.Split, pick: Any, redraw: Any, scope: Any
) -> None:
    inner = RandomLabel(epochs=1)
    plain = efface.forget(pruned, split, inner, seed=3)
    whole = efface.forget(pruned, split, LayerwisePartial(inner, 1.0, pick, redraw, scope), seed=3)
    assert whole.digest == plain.digest


@pytest.mark.parametrize("pick", PICKS)
def test_of_a_convolution_the_chosen_are_chosen_where_they_lie(
    conv_trained: efface.TrainedModel, pick: Any
) -> None:
    """In the loop, images lie channels-last: scores must meet the weights that they are of."""
    split = efface.Split.by_class(conv_trained.task, 0)
    model, watch = conv_trained.copy(), Watch()
    fit = Fit(model.task, SEED, subject=model)
    method = LayerwisePartial(FineTune(epochs=1, lr=0.01), 0.2, pick)
    method(model, split, fit.with_(constraint=watch))
    states = [*watch.before, weights(model.network)]
    below = {n: g.abs() for n, g in gradient(fit, conv_trained.network, split.retain).items()}
    for old, new, slope in zip(states, states[1:], watch.slopes):  # noqa: B905
        for name, w in old.items():
            moved = (new[name] != w).contiguous().flatten()
            assert 0 < int(moved.sum()) <= count(0.2, w.numel())
            scores = {
                "magnitude": w.abs(),
                "gradient": slope[name].abs(),
                "saliency": slope[name].abs() / (below[name] + below[name].mean()),
            }.get(pick)
            if scores is None:
                continue
            flat = scores.contiguous().flatten()
            if len(flat.unique()) == len(flat):  # the order of equal ones is that in memory
                limit = flat.sort(descending=True).values[count(0.2, len(flat)) - 1]
                assert bool((flat[moved] >= limit * (1 - 1e-5)).all()), name


def test_seeds_decide_and_every_step_has_its_own(
    trained: efface.TrainedModel, split: efface.Split
) -> None:
    method = LayerwisePartial(FineTune(epochs=1, lr=0.01), 0.1)

    def moves(seed: int) -> list[Tensor]:
        states = watched(trained, split, method, seed)[1]
        return [b["0.weight"] != a["0.weight"] for a, b in pairwise(states)]

    one, again, other = moves(1), moves(1), moves(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in pairwise(one))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_nested_wrappers_choose_each_for_itself(
    trained: efface.TrainedModel, split: efface.Split
) -> None:
    inner = LayerwisePartial(FineTune(epochs=1, lr=0.01), 0.5)
    _, states, _ = watched(trained, split, LayerwisePartial(inner, 0.5))
    shares = [float((b["0.weight"] != a["0.weight"]).float().mean()) for a, b in pairwise(states)]
    assert 0.15 < sum(shares) / len(shares) < 0.35  # a quarter, and not a half


# --- around methods that never call the loop, and those that do more ------------------------------


@pytest.mark.parametrize("inner", [Influence(), FisherForgetting(), SSD(alpha=1.0)])
@pytest.mark.parametrize("redraw", ["step", "fixed"])
@pytest.mark.parametrize("pick", PICKS)
def test_edits_outside_of_the_loop_are_confined(
    trained: efface.TrainedModel, split: efface.Split, inner: Any, redraw: Any, pick: Any
) -> None:
    after = efface.forget(trained, split, LayerwisePartial(inner, 0.25, pick, redraw), seed=3)
    plain = weights(efface.forget(trained, split, inner, seed=3).network)
    old, new = weights(trained.network), weights(after.network)
    moved = {n: new[n] != old[n] for n in old}
    assert sum(int(t.sum()) for t in moved.values()) > 0
    for name, t in moved.items():
        assert int(t.sum()) <= count(0.25, t.numel())
        assert torch.equal(new[name][t], plain[name][t])
        if redraw == "step":  # of what the method edited, no fewer than there may be
            edited = int((plain[name] != old[name]).sum())
            assert int(t.sum()) == min(edited, count(0.25, t.numel()))


def test_what_is_edited_between_two_fits_counts_as_a_step(
    trained: efface.TrainedModel, split: efface.Split
) -> None:
    method = LayerwisePartial(Chain(Influence(), FineTune(epochs=1, lr=0.01)), 0.1)
    _, states, _ = watched(trained, split, method)
    first = {n: (t != weights(trained.network)[n]) for n, t in states[0].items()}
    assert sum(int(t.sum()) for t in first.values()) > 0
    assert all(int(t.sum()) <= count(0.1, t.numel()) for t in first.values())


@pytest.mark.parametrize("redraw", ["step", "fixed"])
def test_a_fit_of_another_network_is_let_be(
    trained: efface.TrainedModel, split: efface.Split, redraw: Any
) -> None:
    @dataclass(frozen=True)
    class Helper:
        """Trains a network of its own, then copies all of its weights."""

        name: ClassVar[str] = "helper"
        title: ClassVar[str] = ""
        paper: ClassVar[str] = ""
        needs: ClassVar[frozenset[str]] = frozenset()

        def __call__(self, model: Any, split: efface.Split, fit: Fit) -> None:
            other = copy.deepcopy(model.network)
            settings = fit_settings(fit, FineTune(), epochs=1, lr=0.1)
            fit(other, fit.descend, {"retain": Stream(split.retain)}, settings)
            changed = [
                bool((a != b).all())
                for a, b in zip(other.parameters(), model.network.parameters(), strict=True)
            ]
            assert all(changed)
            model.network.load_state_dict(other.state_dict())

    model = trained.copy()
    helper: Any = Helper()
    LayerwisePartial(helper, 0.2, redraw=redraw)(model, split, Fit(model.task, 1, subject=model))
    for name, new in weights(model.network).items():
        moved = int((new != weights(trained.network)[name]).sum())
        assert 0 < moved <= count(0.2, new.numel())


@pytest.mark.parametrize("redraw", ["step", "fixed"])
@pytest.mark.parametrize(
    "inner", [FineTune(epochs=1), Influence(), PruneFirst(OneShot(0.8, recovery=1)), Retrain()]
)
def test_masks_stay_exact_and_count_what_they_keep(
    pruned: efface.TrainedModel, split: efface.Split, inner: Any, redraw: Any
) -> None:
    method = LayerwisePartial(inner, 0.1, redraw=redraw)
    after = efface.forget(pruned, split, method, seed=2)
    assert pruned.mask is not None
    assert after.mask is not None
    assert after.mask == pruned.mask or isinstance(inner, PruneFirst)
    old, new = weights(pruned.network), weights(after.network)
    for name, keep in after.mask.items():
        assert (new[name][~keep] == 0).all()
        assert not torch.signbit(new[name][~keep]).any()
    if redraw == "fixed":
        for name, keep in pruned.mask.items():
            may = count(0.1, int(keep.sum()))
            assert int((new[name] != old[name])[after.mask[name]].sum()) <= may
    selected_ = after.lineage[-1].detail["partial"]["selected"]
    alive = {
        n: int(pruned.mask[n].sum()) if n in pruned.mask else t.numel() for n, t in old.items()
    }
    assert selected_ == sum(count(0.1, n) for n in alive.values())


@pytest.mark.parametrize("bn", ["train", "frozen", "recalibrate"])
def test_batch_norm_statistics_follow_the_inner_method(
    conv_trained: efface.TrainedModel, bn: Any
) -> None:
    split = efface.Split.by_class(conv_trained.task, 0)
    old = conv_trained.network[1].running_mean
    for method in (LayerwisePartial(FineTune(epochs=1, bn=bn)), SalUn(epochs=1, bn=bn)):
        after = efface.forget(conv_trained, split, method)
        assert torch.equal(after.network[1].running_mean, old) == (bn == "frozen")


class KilledError(Exception):
    pass


@pytest.mark.parametrize("redraw", ["step", "fixed"])
@pytest.mark.parametrize("pick", ["random", "block", "gradient"])
@pytest.mark.parametrize("at", [3, 9, 14])
def test_a_killed_run_goes_on_with_the_same_choices(
    trained: efface.TrainedModel,
    split: efface.Split,
    tmp_path: Path,
    redraw: Any,
    pick: Any,
    at: int,
) -> None:
    inner = Chain(FineTune(epochs=1), Chain(Influence(), RandomLabel(epochs=1)))
    method = LayerwisePartial(inner, 0.2, pick, redraw)
    whole = efface.forget(trained, split, method, seed=4)
    left = [at]

    def progress(label: str, done: int, total: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise KilledError

    with pytest.raises(KilledError):
        efface.forget(
            trained,
            split,
            method,
            seed=4,
            journal=Journal(tmp_path / "j", {}, 0.0),
            progress=progress,
        )
    again = efface.forget(trained, split, method, seed=4, journal=Journal(tmp_path / "j", {}, 0.0))
    assert again.digest == whole.digest


# --- what it needs, and its options ---------------------------------------------------------------


def test_it_needs_what_its_choice_looks_at() -> None:
    plain = FineTune()
    assert LayerwisePartial(plain).needs == frozenset()
    assert LayerwisePartial(plain, pick="gradient").needs == {"forget"}
    assert needs_of(LayerwisePartial(plain, pick="saliency")) == {"forget", "retain"}


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, math.nan])
def test_fractions_out_of_range_are_refused(fraction: float) -> None:
    with pytest.raises(MethodError, match=r"fraction must be in \(0, 1\]"):
        LayerwisePartial(fraction=fraction)


@pytest.mark.parametrize(
    ("option", "value"), [("pick", "best"), ("redraw", "never"), ("scope", "filter")]
)
def test_words_that_there_are_not_are_refused(option: str, value: str) -> None:
    with pytest.raises(MethodError, match=option):
        build("layerwise-partial", {option: value})


# --- SalUn, as it was -----------------------------------------------------------------------------


@dataclass(frozen=True)
class OldSalUn:
    """SalUn as it was before it became a wrapper, frozen here."""

    name: ClassVar[str] = "salun"
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"retain", "forget"})

    fraction: float = 0.5
    epochs: int | None = None
    lr: float | None = None
    bn: Any = "train"

    def __post_init__(self) -> None:
        check_ranges(self)

    def __call__(self, trained: efface.TrainedModel, split: efface.Split, fit: Fit) -> None:
        scores = {
            n: g.abs()
            for n, g in gradient(fit, trained.network, split.forget, stream="forget").items()
        }
        mask = trained.mask
        alive = {n: mask[n] if mask and n in mask else torch.ones(()).bool() for n in scores}
        flat = torch.cat(
            [t.masked_fill(~alive[n], -math.inf).reshape(-1) for n, t in scores.items()]
        )
        chosen = torch.zeros(len(flat), dtype=torch.bool)
        many = round(self.fraction * int((flat > -math.inf).sum()))
        chosen[flat.argsort(descending=True, stable=True)[:many]] = True
        parts = torch.split(chosen, [t.numel() for t in scores.values()])
        salient = {
            n: part.reshape(t.shape) for (n, t), part in zip(scores.items(), parts, strict=True)
        }
        fit.meter.facts["salient"] = int(chosen.sum())
        targets = fit.task.records.targets
        shift = torch.randint(
            1, fit.task.classes, (len(targets),), generator=fit.generator("labels")
        )
        labels = targets.clone()
        labels[split.forget] = (targets[split.forget] + shift[split.forget]) % fit.task.classes
        everyone = torch.cat([split.retain, split.forget]).sort().values
        settings = fit_settings(fit, self, epochs=self.epochs, lr=self.lr, bn=self.bn)
        held = fit.with_(constraint=Frozen(trained.network, salient))
        stream = {"all": Stream(everyone, targets=labels)}
        held(trained.network, fit.descend, stream, settings, label=self.name)


@pytest.mark.parametrize(
    "options", [{}, {"fraction": 0.07, "epochs": 2, "lr": 0.03}, {"fraction": 1.0, "bn": "frozen"}]
)
@pytest.mark.parametrize("which", ["dense", "pruned", "conv"])
def test_salun_is_what_it_was_byte_for_byte(
    trained: efface.TrainedModel,
    pruned: efface.TrainedModel,
    conv_trained: efface.TrainedModel,
    options: dict[str, Any],
    which: str,
) -> None:
    model = {"dense": trained, "pruned": pruned, "conv": conv_trained}[which]
    split = efface.Split.by_class(model.task, 1)
    old = efface.forget(model, split, OldSalUn(**options), seed=3)
    new = efface.forget(model, split, SalUn(**options), seed=3)
    assert new.digest == old.digest
    details = [{**m.lineage[-1].detail} for m in (old, new)]
    assert details[0] == details[1]
    assert new.lineage[-1].method == old.lineage[-1].method
    fraction, rest = (
        options.get("fraction", 0.5),
        {k: v for k, v in options.items() if k != "fraction"},
    )
    label = RandomLabel(**rest)
    wrapped = LayerwisePartial(label, fraction, "gradient", "fixed", "global")
    assert efface.forget(model, split, wrapped, seed=3).digest == old.digest


# --- random labels on D_f alone -------------------------------------------------------------------


def test_label_flips_on_the_forget_set_alone_by_hand(
    new_task: NewTask, trained: efface.TrainedModel, split: efface.Split
) -> None:
    model = model_with(new_task, trained, "sgd+momentum", batch_size=10)
    split = on(model.task, split)
    fit = Fit(model.task, SEED, subject=model)
    method = RandomLabel(epochs=2, lr=0.02, retain=False)
    assert method.needs == {"forget"}
    assert RandomLabel().needs == {"forget", "retain"}
    twin, s = copy.deepcopy(model.network).double(), model.task.fit
    labels = wrong_labels(model.task.train[1], split.forget, 3, fit)
    assert (labels[split.forget] != model.task.train[1][split.forget]).all()
    method(model, split, fit)
    assert fit.meter.images == {"all": 2 * len(split.forget)}
    optimizer = oracles.ScalarOptimizer("sgd", s.momentum, s.weight_decay)
    n = len(labels)
    for epoch in range(2):
        batches = oracles.cut(order(SEED, "fit/all", epoch, split.forget, n).tolist(), 10)
        for k, batch in enumerate(batches):
            here = slopes(twin, model.task, batch, labels)
            rate = oracles.learning_rate(
                epoch * len(batches) + k, 2 * len(batches), 0.02, s.schedule, 0.0
            )
            for name, p in twin.named_parameters():
                new = optimizer.updated(
                    name, p.flatten().tolist(), here[name].flatten().tolist(), rate
                )
                p.data = torch.tensor(new, dtype=p.dtype).reshape(p.shape)
    for p, q in zip(model.network.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.detach().double(), q.detach(), atol=1e-5)


def test_label_flips_on_the_forget_set_alone_never_read_the_rest(
    trained: efface.TrainedModel, split: efface.Split
) -> None:
    nobody = torch.tensor([], dtype=torch.long)
    alone = efface.Split(trained.task, split.forget, nobody, split.selector)
    fit = Fit(trained.task, 1)
    one, two = trained.copy(), trained.copy()
    RandomLabel(epochs=1, retain=False)(one, alone, fit)
    RandomLabel(epochs=1, retain=False)(two, split, fit)
    assert one.digest == two.digest != trained.digest


# --- guard rails of ascent ------------------------------------------------------------------------


def test_a_long_gradient_is_shortened_and_a_short_one_let_be() -> None:
    net = nn.Linear(3, 2)
    params = dict(net.named_parameters())
    draw = torch.Generator().manual_seed(0)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=draw)
    before = torch.cat([p.grad.flatten() for p in params.values()]).double()  # type: ignore[union-attr]
    length = math.sqrt(sum(float(g) ** 2 for g in before))
    Clipped(length * 1.01).begin(params)
    after = torch.cat([p.grad.flatten() for p in params.values()])  # type: ignore[union-attr]
    assert torch.equal(after.double(), before)
    Clipped(length / 4).begin(params)
    after = torch.cat([p.grad.flatten() for p in params.values()])  # type: ignore[union-attr]
    assert torch.allclose(after.double(), before / 4, rtol=1e-6)


def test_clipped_ascent_takes_steps_of_the_clipped_length(
    new_task: NewTask, trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    model = model_with(new_task, trained, "sgd", weight_decay=0.0, schedule="constant")
    split = on(model.task, class_split)
    method = GradientAscent(epochs=2, lr=0.1, cap=50.0, clip=0.01)
    _, states, _ = watched(model, split, method)
    for old, new in pairwise(states):
        step = math.sqrt(sum(float((new[n] - old[n]).double().square().sum()) for n in old))
        assert step <= 0.1 * 0.01 * (1 + 1e-3)
    free = watched(model, split, replace(method, clip=None))[0]
    assert watched(model, split, replace(method, clip=1e9))[0].digest == free.digest


def distance(old: Named, new: Named) -> float:
    return math.sqrt(sum(float((new[n] - old[n]).double().square().sum()) for n in old))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("masked", [False, True])
def test_ascent_stays_in_its_ball(
    new_task: NewTask,
    trained: efface.TrainedModel,
    class_split: efface.Split,
    optimizer: str,
    masked: bool,
) -> None:
    model = model_with(new_task, trained, optimizer)
    if masked:
        model = efface.prune(model, OneShot(0.5, recovery=0))
    start = weights(model.network)
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in start.values()))
    split = on(model.task, class_split)
    method = GradientAscent(epochs=4, lr=0.05, cap=50.0, radius=0.02)
    _, states, fit = watched(model, split, method)
    assert fit.meter.facts["radius"] == pytest.approx(0.02 * norm)
    far = [distance(start, s) for s in states]
    assert max(far) <= 0.02 * norm * (1 + 1e-4)
    assert max(far) > 0.0199 * norm  # the rail was reached
    free = watched(model, split, replace(method, radius=None))
    assert distance(start, free[1][-1]) > 0.03 * norm
    wide = watched(model, split, replace(method, radius=1e3))
    assert wide[0].digest == free[0].digest


def test_the_projection_is_the_nearest_point_of_the_ball_that_moves_no_more(
    trained: efface.TrainedModel,
) -> None:
    model = trained.copy()
    ball, params = Ball(model, 1.0), dict(model.network.named_parameters())
    draw = torch.Generator().manual_seed(1)
    start = weights(model.network)
    with torch.no_grad():  # somewhere inside
        for p in params.values():
            p += 0.02 * torch.randn(p.shape, generator=draw)
    ball.begin(params)
    here = weights(model.network)
    with torch.no_grad():  # out of it, in one tensor
        params["0.weight"] += torch.randn(params["0.weight"].shape, generator=draw)
    there = weights(model.network)
    ball.end(params)
    found = weights(model.network)
    for name, old in here.items():
        assert name == "0.weight" or torch.equal(found[name], old)
    assert distance(start, found) == pytest.approx(1.0, rel=1e-5)
    best = distance(there, found)
    for _ in range(200):  # no other point of the ball is nearer
        other = {n: t.clone() for n, t in found.items()}
        other["0.weight"] += 0.05 * torch.randn(other["0.weight"].shape, generator=draw)
        if distance(start, other) <= 1.0:
            assert distance(there, other) >= best - 1e-6


@pytest.mark.parametrize("pick", ["random", "gradient"])
def test_rails_and_partial_updates_hold_together(
    new_task: NewTask, trained: efface.TrainedModel, class_split: efface.Split, pick: Any
) -> None:
    model = model_with(new_task, trained, "adam")
    start = weights(model.network)
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in start.values()))
    inner = GradientAscent(epochs=4, lr=0.05, cap=50.0, clip=1.0, radius=0.02)
    split = on(model.task, class_split)
    _, states, _ = watched(model, split, LayerwisePartial(inner, 0.1, pick))
    for old, new in pairwise(states):
        assert distance(start, new) <= 0.02 * norm * (1 + 1e-4)
        for name, t in new.items():
            assert int((t != old[name]).sum()) <= count(0.1, t.numel())


@pytest.mark.parametrize("option", ["cap", "clip", "radius"])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_rails_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(MethodError, match=f"{option} must be positive"):
        GradientAscent(**{option: value})  # type: ignore[arg-type]


# --- presets --------------------------------------------------------------------------------------


def partial_presets() -> list[str]:
    return [n for n, p in presets().items() if p.method == "layerwise-partial"]


def test_presets_are_their_wrappers_with_other_defaults() -> None:
    assert {"partial-label-flip", "partial-ascent"} <= set(partial_presets())
    flip, ascent = build("partial-label-flip"), build("partial-ascent")
    assert isinstance(flip, LayerwisePartial)
    assert isinstance(flip.inner, RandomLabel)
    assert isinstance(ascent.inner, GradientAscent)
    for name, preset in presets().items():
        assert build(name) == build(preset.method, preset.options)


@pytest.mark.parametrize("name", ["partial-label-flip", "partial-ascent"])
def test_options_go_over_a_preset(name: str) -> None:
    plain = build(name)
    changed = build(name, {"fraction": "0.2", "inner": {"lr": "0.3"}})
    inner = replace(plain.inner, lr=0.3)
    assert changed == replace(plain, fraction=0.2, inner=inner)
    again = build(name, {"inner": {"method": plain.inner.name, "epochs": 3}})
    assert again == replace(plain, inner=replace(plain.inner, epochs=3))
    # another inner method brings its own options, not those of the preset's
    other = build(name, {"inner": {"method": "ft", "epochs": 1}})
    assert other == replace(plain, inner=FineTune(epochs=1))
    assert build(name, {"inner": "ft"}).inner == FineTune()
    assert build(name, {"inner": Influence()}).inner == Influence()
    options = to_json(plain)
    assert build(options.pop("method"), options) == plain
    with pytest.raises(MethodError, match="fraction"):
        build(name, {"fractions": 0.1})
    with pytest.raises(MethodError, match="lr"):
        build(name, {"inner": {"lrs": 0.1}})


def test_presets_nest() -> None:
    made = build("prune-first", {"inner": {"method": "partial-ascent", "inner": {"lr": 0.5}}})
    assert made.inner == replace(
        build("partial-ascent"), inner=replace(build("partial-ascent").inner, lr=0.5)
    )


def test_in_the_lineage_a_preset_is_what_it_is(
    trained: efface.TrainedModel, split: efface.Split
) -> None:
    after = efface.forget(trained, split, "partial-ascent", seed=1)
    made = filled(build("partial-ascent"), trained.task)
    assert after.lineage[-1].method == to_json(made)
    assert after.lineage[-1].method["method"] == "layerwise-partial"
    assert after.digest == efface.forget(trained, split, made, seed=1).digest


def test_the_catalogue_lists_presets_with_their_defaults() -> None:
    listed = {entry["name"]: entry for entry in catalogue()}
    assert set(presets()) <= set(listed)
    assert list(listed) == sorted(listed)
    for name, preset in presets().items():
        entry, made = listed[name], build(name)
        assert catalogue(name) == [entry]
        assert (entry["title"], entry["paper"]) == (preset.title, preset.paper)
        assert entry["needs"] == sorted(needs_of(made))
        assert preset.title
        assert entry["doc"].startswith(preset.doc[:20])
        for option in entry["options"]:
            value: Any = made
            for part in option["name"].split("."):
                value = getattr(value, part)
            shown = value.name if isinstance(value, Unlearner) else str(value)
            assert option["default"] == shown
    names = [o["name"] for o in listed["partial-ascent"]["options"]]
    assert {"inner", "inner.lr", "inner.radius", "fraction", "pick"} <= set(names)
    own = {o["name"] for e in catalogue("layerwise-partial") for o in e["options"]}
    assert not any("." in name for name in own)
    assert set(get_args(LayerwisePartial.__dataclass_fields__["pick"].type)) <= set(PICKS)


def test_recipes_take_presets() -> None:
    method = Method(method="partial-ascent", options={"fraction": 0.3}, search={"inner.lr": (0.1,)})
    made = method.made("model", {"inner.lr": 0.2})
    assert (made.fraction, made.inner.lr) == (0.3, 0.2)


@pytest.mark.parametrize("wrong", ["partial-assent", "partial-labelflip"])
def test_names_near_a_preset_are_told(wrong: str) -> None:
    with pytest.raises(MethodError, match=r"did you mean|partial-"):
        build(wrong)
    with pytest.raises(MethodError, match=r"did you mean|partial-"):
        catalogue(wrong)


def test_losses_agree_with_torch() -> None:
    """The twin's own loss is the cross-entropy."""
    net, x = nn.Linear(3, 4).double(), torch.randn(3)
    assert torch.allclose(
        record_loss(net, x, 2), F.cross_entropy(net(x[None].double()), torch.tensor([2]))
    )
