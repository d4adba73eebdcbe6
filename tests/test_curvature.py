"""Curvature against slow twins: loops over records, in float64, and dense matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import efface
from efface.curvature import (
    diagonal_fisher,
    gradient,
    inverse_fisher_product,
    per_sample_gradients,
    projections,
)
from efface.curvature import layers as layer_formulas
from efface.curvature.inverse import _Rows
from efface.curvature.passes import Passes
from efface.curvature.persample import ByLayer, OneByOne, Vectorised, choose, within
from efface.data import Batch, LoadedRecords
from efface.errors import DivergedError, MethodError
from efface.fitting import Fit

Named = dict[str, Tensor]
CLASSES = 4


# --- networks of all kinds ------------------------------------------------------------------------


class Residual(nn.Module):
    """Convolutions of several shapes, batch norms, in-place activations and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2)
        self.short = nn.Conv2d(4, 6, 1, stride=2, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = self.act(self.norm2(self.down(x)) + self.short(x))
        return self.fc(x.mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers over a sequence, a batch norm over channels, a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 6)
        self.norm = nn.BatchNorm1d(8)
        self.mix = nn.Linear(6, 5, bias=False)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.embed(x[:, 0])))
        return self.head(torch.tanh(self.mix(x)).mean(1))


class Attention(nn.Module):
    """Layers without a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x[:, 0]))
        weights = (self.scale * x @ x.transpose(1, 2)).softmax(-1)
        return self.head((weights @ x).mean(1))


class Tied(nn.Module):
    """A layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x[:, 0].mean(1))))))


class Borrowed(nn.Module):
    """A weight used once more outside of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(x[:, 0].mean(1)))
        return self.head(F.linear(x, self.inner.weight.T))


class Branching(nn.Module):
    """A path that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, CLASSES)
        self.second = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.first(x) if bool(x.sum() > 0) else self.second(x) + self.first(x)


class WholeBatch(nn.Module):
    """Depends on the rest of the batch: a record alone is something else."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(x - 0.5 * x.mean(0))


def pruned() -> nn.Module:
    """With live pruning: the parameter is ``weight_orig``."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    nn.utils.prune.random_unstructured(network[1], "weight", 0.5)  # type: ignore[no-untyped-call]
    return network


KINDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "residual": (Residual, "by layer"),
    "tokens": (Tokens, "by layer"),
    "attention": (Attention, "vectorised"),
    "tied": (Tied, "vectorised"),
    "borrowed": (Borrowed, "vectorised"),
    "whole batch": (WholeBatch, "vectorised"),
    "live pruning": (pruned, "vectorised"),
    "branching": (Branching, "record by record"),
}
N = 14


def make(kind: str, **options: Any) -> tuple[Fit, nn.Module]:
    torch.manual_seed(3)
    network = KINDS[kind][0]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean = torch.randn(module.num_features) * 0.2
            module.running_var = torch.rand(module.num_features) + 0.5
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(N, 1, 8, 8, generator=draw)
    data = (x, torch.randint(0, CLASSES, (N,), generator=draw))
    task = efface.Task(KINDS[kind][0], data, data, **options)
    return Fit(task, seed=4), network


# --- slow twins -----------------------------------------------------------------------------------


def record_gradient(fit: Fit, network: nn.Module, position: int, label: int | None = None) -> Named:
    """The loss gradient of one record in float64; ``network`` is in float64."""
    x, y = fit.task.train
    target = y[position : position + 1] if label is None else torch.tensor([label])
    loss = fit.task.loss(network(x[position : position + 1].double()), target)
    named = {n: p for n, p in network.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return dict(zip(named, found, strict=True))


def slow(network: nn.Module) -> nn.Module:
    for module in network.modules():  # a pruned weight that is part of a graph cannot be copied
        if hasattr(module, "weight_orig"):
            module.weight = (module.weight_orig * module.weight_mask).detach()
    return copy.deepcopy(network).double().eval()


def slow_fisher(fit: Fit, network: nn.Module, positions: Tensor, labels: str) -> Named:
    network, x = slow(network), fit.task.train[0]
    totals: Named = {}
    drawn = torch.rand(len(positions), generator=fit.generator("labels")).double()
    for i, position in enumerate(positions.tolist()):
        p = network(x[position : position + 1].double())[0].softmax(0).tolist()
        if labels == "observed":
            weighted = [(1.0, record_gradient(fit, network, position))]
        elif labels == "sampled":
            below = [sum(p[: y + 1]) for y in range(CLASSES)]
            chosen = next(y for y in range(CLASSES) if below[y] > drawn[i])
            weighted = [(1.0, record_gradient(fit, network, position, chosen))]
        else:
            weighted = [(p[y], record_gradient(fit, network, position, y)) for y in range(CLASSES)]
        for weight, g in weighted:
            for name, value in g.items():
                totals[name] = totals.get(name, 0) + weight * value**2 / len(positions)
    return totals


def dense(named: Named) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in named.values()])


def slow_rows(fit: Fit, network: nn.Module, positions: Tensor) -> Tensor:
    network = slow(network)
    return torch.stack([dense(record_gradient(fit, network, p)) for p in positions.tolist()])


def check(found: Named, wanted: Named, tolerance: float = 2e-5) -> None:
    assert list(found) == list(wanted)
    whole = float(dense(wanted).norm())
    for name, t in found.items():
        assert t.dtype == torch.float32
        assert t.is_contiguous()
        assert t.shape == wanted[name].shape
        gap = float((t.double() - wanted[name]).norm())
        assert gap <= tolerance * float(wanted[name].norm()) + 2e-7 * whole, name


SOME = torch.tensor([0, 2, 3, 5, 6, 9, 10, 12, 13])


# --- per-sample gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients_are_those_of_single_records(kind: str) -> None:
    fit, network = make(kind)
    network.eval()
    batch = next(iter(fit.task.records.batches([SOME], fit.device)))
    found = per_sample_gradients(network, fit.task, batch)
    for i, position in enumerate(SOME.tolist()):
        wanted = record_gradient(fit, slow(network), position)
        check({name: rows[i] for name, rows in found.items()}, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_route_is_the_fastest_that_is_right(kind: str) -> None:
    fit, network = make(kind)
    diagonal_fisher(fit, network, SOME)
    fact = fit.meter.facts["gradients"]
    assert fact.split(":")[0] == KINDS[kind][1]
    assert (fact == "by layer") or len(fact.split(": ", 1)[1]) > 5  # it says why


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("few", [0, 10_000])
def test_every_formula_of_a_convolution(
    monkeypatch: pytest.MonkeyPatch, large: bool, few: int
) -> None:
    monkeypatch.setattr(layer_formulas, "LARGE", 1 if large else 10**9)
    monkeypatch.setattr(layer_formulas, "FEW", few)
    fit, network = make("residual")
    check(diagonal_fisher(fit, network, SOME), slow_fisher(fit, network, SOME, "observed"))
    assert fit.meter.facts["gradients"] == "by layer"


def test_frozen_parameters_are_left_out() -> None:
    fit, network = make("residual")
    for name in ("stem.weight", "norm.bias", "fc.weight"):
        network.get_parameter(name).requires_grad_(False)
    found = diagonal_fisher(fit, network, SOME)
    check(found, slow_fisher(fit, network, SOME, "observed"))
    assert "stem.weight" not in found
    network.requires_grad_(False)
    with pytest.raises(MethodError, match="unfreeze"):
        diagonal_fisher(fit, network, SOME)


def test_a_layer_that_mixes_or_is_random_is_refused_by_name() -> None:
    fit, network = make("residual")
    batch = next(iter(fit.task.records.batches([SOME], fit.device)))
    network.eval()
    network.norm2.train()
    with pytest.raises(MethodError, match=r"'norm2'.*statistics of the batch"):
        per_sample_gradients(network, fit.task, batch)
    whole = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, CLASSES))
    with pytest.raises(MethodError, match="'1' drops at random"):
        per_sample_gradients(whole, fit.task, batch)
    untracked = nn.Sequential(
        nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(64, CLASSES)
    )
    with pytest.raises(MethodError, match="'0'"):
        diagonal_fisher(fit, untracked, SOME)


def test_route_is_settled_on_a_single_record_too() -> None:
    fit, network = make("residual")
    found = diagonal_fisher(fit, network, SOME[:1])
    check(found, slow_fisher(fit, network, SOME[:1], "observed"))


# --- the diagonal ---------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["observed", "sampled", "expected"])
@pytest.mark.parametrize("kind", KINDS)
def test_diagonal_is_the_mean_of_squared_single_gradients(kind: str, labels: Any) -> None:
    fit, network = make(kind)
    found = diagonal_fisher(fit, network, SOME, labels=labels)
    check(found, slow_fisher(fit, network, SOME, labels))


@pytest.mark.parametrize("labels", ["observed", "expected"])
def test_any_loss_serves(labels: Any) -> None:
    def hinge(logits: Tensor, targets: Tensor) -> Tensor:
        true = logits.gather(1, targets[:, None])
        return (1 + logits - true).clamp(min=0).square().sum(1).mean()

    def weighted(logits: Tensor, targets: Tensor) -> Tensor:
        """The mean of a batch is no mean of its records' losses."""
        return F.cross_entropy(logits, targets, weight=torch.arange(1.0, 5.0).to(logits))

    def stubborn(logits: Tensor, targets: Tensor) -> Tensor:
        """Cannot be vectorised."""
        return F.cross_entropy(logits, targets) * (2.0 if int(targets[0]) % 2 else 1.0)

    for loss in (hinge, weighted, stubborn):
        fit, network = make("residual", loss=loss)
        found = diagonal_fisher(fit, network, SOME, labels=labels)
        check(found, slow_fisher(fit, network, SOME, labels))


def test_expected_labels_leave_out_only_what_is_below_rounding() -> None:
    fit, network = make("residual")
    with torch.no_grad():
        network.get_parameter("fc.weight").mul_(30)  # sure of its answers
    found = diagonal_fisher(fit, network, SOME, labels="expected")
    check(found, slow_fisher(fit, network, SOME, "expected"), 1e-4)


def test_the_bound_on_memory_sets_the_pass_and_changes_nothing_else() -> None:
    for kind in ("residual", "attention"):
        fit, network = make(kind)
        sizes = {}
        results = {}
        for memory in (1, 60_000, 256 * 2**20):
            network.eval()
            sizes[memory] = Passes(fit, network, SOME, memory, "x", "x").size
            results[memory] = diagonal_fisher(fit, network, SOME, labels="sampled", memory=memory)
            check(results[memory], slow_fisher(fit, network, SOME, "sampled"))
        assert sizes[1] == 1 < sizes[60_000] < sizes[256 * 2**20]
    cpu = torch.device("cpu")
    assert within(10**6, 11_000_000, 128, cpu) == 1  # at least one
    assert within(256 * 2**20, 2 * 270_000, 128, cpu) == 124
    assert within(2**40, 10, 32, cpu) == 32


def test_memory_of_a_pass_is_bounded() -> None:
    """No tensor of a vectorised pass is larger than the option allows."""
    fit, network = make("attention")
    memory, largest = 20_000, 0
    real = Vectorised.pull

    def watched(self: Vectorised, cotangents: Tensor) -> Any:
        nonlocal largest
        blocks = list(real(self, cotangents))
        largest = max(largest, sum(b.numel() * 4 for *_, b in blocks))
        yield from blocks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Vectorised, "pull", watched)
        diagonal_fisher(fit, network, torch.arange(2).repeat(20), memory=memory)
    assert 0 < largest <= memory


def test_everything_is_left_as_found_and_counted() -> None:
    fit, network = make("residual")
    network.train()
    network.norm2.eval()
    modes = [m.training for m in network.modules()]
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    buffers = copy.deepcopy(network.state_dict())
    torch.manual_seed(11)
    state = torch.get_rng_state()
    seen: list[tuple[str, int, int]] = []
    fit = replace(fit, progress=lambda *row: seen.append(row))
    vector = gradient(fit, network, SOME, stream="forget")
    diagonal_fisher(fit, network, SOME)
    inverse_fisher_product(fit, network, SOME, vector, damping=1.0)
    assert [m.training for m in network.modules()] == modes
    assert all(p.grad is not None and (p.grad == 1).all() for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    for name, t in network.state_dict().items():
        assert torch.equal(t, buffers[name])
    assert fit.meter.images == {"forget": 9, "retain": 18}
    assert {(label, done, total) for label, done, total in seen if done == total} == {
        ("gradient", 9, 9),
        ("diagonal Fisher", 9, 9),
        ("inverse Fisher product", 9, 9),
    }


def test_same_bytes_every_time_and_labels_follow_the_seed() -> None:
    fit, network = make("residual")

    def once(seed: int) -> Tensor:
        return dense(diagonal_fisher(Fit(fit.task, seed=seed), network, SOME, labels="sampled"))

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))


def test_records_that_are_loaded_one_by_one() -> None:
    fit, network = make("branching")
    pairs = list(zip(*fit.task.train, strict=True))
    loaded = efface.Task(Branching, LoadedRecords(pairs), LoadedRecords(pairs))
    found = diagonal_fisher(Fit(loaded), network, SOME)
    check(found, slow_fisher(fit, network, SOME, "observed"))


def test_wrong_arguments() -> None:
    fit, network = make("residual")
    nobody = torch.tensor([], dtype=torch.long)
    with pytest.raises(MethodError, match="no records"):
        diagonal_fisher(fit, network, nobody)
    with pytest.raises(MethodError, match="no records"):
        gradient(fit, network, nobody)
    with pytest.raises(MethodError, match="memory must be positive"):
        diagonal_fisher(fit, network, SOME, memory=0)
    with pytest.raises(MethodError, match="labels must be"):
        diagonal_fisher(fit, network, SOME, labels="all")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="weights must be one for each of the 9"):
        gradient(fit, network, SOME, weights=torch.ones(3))


# --- the gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("kind", ["residual", "tokens", "attention", "live pruning"])
def test_gradient_is_the_weighted_sum_of_single_gradients(
    kind: str, batch_size: int | None
) -> None:
    fit, network = make(kind)
    twin = slow(network)
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(len(SOME), generator=draw)
    labels = torch.randint(0, CLASSES, (len(SOME),), generator=draw)
    for w in (None, weights):
        for y in (None, labels):
            wanted: Named = {}
            for i, position in enumerate(SOME.tolist()):
                g = record_gradient(fit, twin, position, None if y is None else int(y[i]))
                factor = 1 / len(SOME) if w is None else float(w[i])
                for name, value in g.items():
                    wanted[name] = wanted.get(name, 0) + factor * value
            found = gradient(fit, network, SOME, weights=w, labels=y, batch_size=batch_size)
            check(found, wanted)


# --- the inverse product --------------------------------------------------------------------------


def solved(rows: Tensor, v: Tensor, damping: float) -> Tensor:
    matrix = rows.T @ rows / len(rows) + damping * torch.eye(rows.shape[1], dtype=torch.float64)
    return torch.linalg.solve(matrix, v)


def a_vector(network: nn.Module) -> Named:
    draw = torch.Generator().manual_seed(8)
    return {n: torch.randn(p.shape, generator=draw) for n, p in network.named_parameters()}


@pytest.mark.parametrize("damping", [1.0, 1e-1, 1e-2])
@pytest.mark.parametrize("kind", ["residual", "tokens", "attention", "branching"])
def test_inverse_product_equals_a_dense_solve(kind: str, damping: float) -> None:
    fit, network = make(kind)
    v = a_vector(network)
    found = inverse_fisher_product(fit, network, SOME, v, damping=damping)
    wanted = solved(slow_rows(fit, network, SOME), dense(v), damping)
    assert float((dense(found) - wanted).norm() / wanted.norm()) < 1e-6
    assert list(found) == list(v)
    assert fit.meter.facts["inverse"]["iterations"] <= 3


def test_gradients_computed_anew_give_the_same_product() -> None:
    fit, network = make("residual")
    v, size = a_vector(network), sum(p.numel() for p in network.parameters())
    kept = inverse_fisher_product(fit, network, SOME, v, damping=0.3)
    assert fit.meter.facts["inverse"]["kept"] == len(SOME)
    counts = []
    for share in (1.0, 0.5, 1e-6):
        other = Fit(fit.task)
        memory = max(1, int(share * len(SOME) * size * 4))
        found = inverse_fisher_product(other, network, SOME, v, damping=0.3, memory=memory)
        assert float((dense(found) - dense(kept)).norm() / dense(kept).norm()) < 1e-6
        fact = other.meter.facts["inverse"]
        anew = (len(SOME) - fact["kept"]) * fact["iterations"]
        assert other.meter.images["retain"] == fact["kept"] + anew
        rows = _Rows(Passes(other, network.eval(), SOME, 2**28, "x", "x"), memory)
        assert rows.matrix.numel() * 4 + rows.size * size * 4 <= max(memory, size * 4) + size * 4
        counts.append(fact["kept"])
    assert counts[0] == len(SOME) > counts[1] > counts[2] == 0


def test_pruned_weights_are_no_coordinates() -> None:
    fit, network = make("residual")
    keep = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(2)) > 0.5
    mask = efface.Mask({"stem.weight": keep})
    mask.apply_(dict(network.named_parameters()))
    v = a_vector(network)
    found = inverse_fisher_product(fit, network, SOME, v, damping=0.05, mask=mask)
    everywhere = torch.ones(sum(p.numel() for p in network.parameters()), dtype=torch.bool)
    everywhere[: keep.numel()] = keep.flatten()  # the first parameter
    rows = slow_rows(fit, network, SOME)[:, everywhere]
    wanted = torch.zeros(len(everywhere), dtype=torch.float64)
    wanted[everywhere] = solved(rows, dense(v)[everywhere], 0.05)
    assert float((dense(found) - wanted).norm() / wanted.norm()) < 1e-6
    assert (found["stem.weight"][~keep] == 0).all()


def test_inverse_product_of_what_it_cannot_solve() -> None:
    fit, network = make("residual")
    v = a_vector(network)
    for damping in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(MethodError, match="damping must be positive"):
            inverse_fisher_product(fit, network, SOME, v, damping=damping)
    short = {n: t for n, t in v.items() if n != "fc.bias"}
    with pytest.raises(MethodError, match=r"fc\.bias"):
        inverse_fisher_product(fit, network, SOME, short, damping=1.0)
    nothing = {n: torch.zeros_like(t) for n, t in v.items()}
    found = inverse_fisher_product(fit, network, SOME, nothing, damping=1.0)
    assert all((t == 0).all() for t in found.values())
    broken = {n: t * float("nan") for n, t in v.items()}
    with pytest.raises(DivergedError, match="raise the damping"):
        inverse_fisher_product(fit, network, SOME, broken, damping=1.0)


@pytest.mark.parametrize("memory", [1, 2**28])
def test_projections(memory: int) -> None:
    fit, network = make("residual")
    u = [a_vector(network), gradient(fit, network, SOME)]
    found = projections(fit, network, SOME, u, memory=memory)
    rows = slow_rows(fit, network, SOME)
    wanted = torch.stack([rows @ dense(t) for t in u], 1)
    assert found.dtype == torch.float64
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


# --- what is used ---------------------------------------------------------------------------------


def test_choice_names_the_reason() -> None:
    def route(kind: str) -> tuple[type[Any], str]:
        fit, network = make(kind)
        batch = next(iter(fit.task.records.batches([SOME[:2]], fit.device)))
        chosen, why = choose(network.eval(), fit.task, batch)
        return type(chosen), why

    assert route("residual") == (ByLayer, "")
    assert route("tied")[0] is Vectorised
    assert "twice" in route("tied")[1]
    assert "do not hold" in route("borrowed")[1]
    assert "without a formula" in route("attention")[1]
    kind, why = route("branching")
    assert kind is OneByOne
    assert "vmap" in why


def test_a_batch_of_dictionaries() -> None:
    fit, network = make("residual")
    x, y = fit.task.train
    task = efface.Task(
        Residual,
        ({"image": x}, y),
        ({"image": x}, y),
        forward=lambda network, inputs: network(inputs["image"]),
    )
    for labels in ("observed", "expected"):
        found = diagonal_fisher(Fit(task), network, SOME, labels=labels)  # type: ignore[arg-type]
        check(found, slow_fisher(fit, network, SOME, labels))
    batch = Batch({"image": x[SOME]}, y[SOME], SOME)
    assert per_sample_gradients(network.eval(), task, batch)["fc.bias"].shape == (9, CLASSES)
