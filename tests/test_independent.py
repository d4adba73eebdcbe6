"""Second opinions: methods again, from their papers' definitions, as loops in float64.

Written without a look at the implementations, and sharing no code with them: one record at a time
with autograd, dense matrices, sorting in Python, a hand-written optimiser. The order of batches,
which is the loop's own affair, is read off the calls of the network.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import efface
from efface import Fit, Settings, Split, Task, TrainedModel, unlearn
from efface.curvature import diagonal_fisher, gradient, inverse_fisher_product
from efface.data import Batch
from efface.fitting import warm_up
from efface.mask import Mask, scope_names
from efface.sparsify import IMP, OMP, AtInit, Grasp, OneShot, Snip, SynFlow, Taylor, select
from efface.unlearn import FisherForgetting, Influence

Tensors = dict[str, Tensor]


class Odd(nn.Module):
    """One weight in two layers, called twice and outside them; a weight of no layer; an unused."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.w, self.scale = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = self.a(x)
        hidden = torch.tanh(self.b(torch.tanh(self.a(torch.tanh(self.a(x))))))
        return self.scale * (F.linear(hidden, self.a.weight) + shift) @ self.w


def layers(kind: str) -> list[nn.Module]:
    if kind in ("mlp", "frozen"):
        return [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]
    if kind == "no bias":
        return [
            nn.Linear(4, 8, bias=False),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(8, 3, bias=False),
        ]
    if kind == "integers":
        first = [nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 5), nn.ReLU(), nn.LayerNorm(5)]
        return [*first, nn.Flatten(), nn.Linear(30, 3)]
    first = [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    if kind == "conv":
        return [*first, nn.Flatten(), nn.Linear(64, 3)]
    grouped = nn.Conv2d(4, 4, 2, stride=2, groups=2)
    return [*first, nn.Dropout(0.5), grouped, nn.Flatten(), nn.Linear(16, 3)]


def network(kind: str) -> nn.Module:
    made = Odd() if kind == "odd" else nn.Sequential(*layers(kind))
    for name in ("0.weight", "2.bias") if kind == "frozen" else ():
        made.get_parameter(name).requires_grad_(False)
    return made


AWKWARD = ["mlp", "grouped", "no bias", "frozen", "integers", "odd"]


def records(n: int, shape: tuple[int, ...], classes: int = 3) -> tuple[Tensor, Tensor]:
    targets = torch.arange(n) % classes
    centres = torch.randn(classes, *shape, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))
    return centres[targets] + 0.9 * noise, targets


def task_of(kind: str, n: int = 40, **changes: Any) -> Task:
    x, y = records(n, (2, 6, 6) if kind in ("conv", "grouped") else (4,))
    if kind == "integers":
        x = torch.randint(0, 7, (n, 6), generator=torch.Generator().manual_seed(1))
    fit = Settings(epochs=3, batch_size=8, lr=0.05, weight_decay=1e-2)
    options = {"network": lambda: network(kind), "train": (x, y), "test": (x, y), "fit": fit}
    return Task(**options | {"ids": [f"r{i}" for i in range(n)]} | changes)


def split_of(task: Task, label: int | None) -> Split:
    return Split.random(task, 0.25) if label is None else Split.by_class(task, label)


# --- the definitions' parts
def named(net: nn.Module) -> Tensors:
    return {n: p.detach().double() for n, p in net.named_parameters()}


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors.values()])


def unflat(values: Tensor, like: Tensors) -> Tensors:
    parts = values.split([t.numel() for t in like.values()])
    return {n: p.view_as(t) for (n, t), p in zip(like.items(), parts, strict=True)}


def distance(got: Tensors, want: Tensors) -> float:
    """Relative to the length of what is wanted."""
    assert set(got) == set(want)
    return float((flat({n: got[n] for n in want}) - flat(want)).norm() / flat(want).norm())


def logits(task: Task, net: nn.Module, i: int) -> Tensor:
    x = task.records.inputs[i : i + 1]
    return net(x.double() if x.is_floating_point() else x)


def record_gradient(task: Task, net: nn.Module, i: int, label: int | None = None) -> Tensors:
    twin = copy.deepcopy(net).double().eval()
    params = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    target = task.records.targets[i : i + 1] if label is None else torch.tensor([label])
    loss = F.cross_entropy(logits(task, twin, i), target)
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    pairs = zip(params.items(), found, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


def probabilities(task: Task, net: nn.Module, i: int) -> Tensor:
    return torch.softmax(logits(task, copy.deepcopy(net).double().eval(), i), 1)[0].detach()


def total(parts: list[Tensors]) -> Tensors:
    return {n: torch.stack([p[n] for p in parts]).sum(0) for n in parts[0]}


def fisher(task: Task, net: nn.Module, positions: Tensor, labels: str = "observed") -> Tensors:
    parts = []
    for i in positions.tolist():
        if labels == "observed":
            parts.append({n: g**2 for n, g in record_gradient(task, net, i).items()})
            continue
        for y, p in enumerate(probabilities(task, net, i)):
            parts.append({n: p * g**2 for n, g in record_gradient(task, net, i, y).items()})
    return {n: t / len(positions) for n, t in total(parts).items()}


def dense_solve(
    task: Task, net: nn.Module, positions: Tensor, vector: Tensors, damping: float, mask: Any = ()
) -> Tensor:
    keep = flat({n: torch.ones(t.shape) for n, t in vector.items()} | dict(mask))
    rows = [flat(record_gradient(task, net, i)) * keep for i in positions.tolist()]
    matrix = damping * torch.eye(len(keep), dtype=torch.double)
    for row in rows:
        matrix += torch.outer(row, row) / len(rows)
    return torch.linalg.solve(matrix, flat(vector) * keep)


def snapshot(net: nn.Module) -> Any:
    """Everything that a call must leave as it found it."""
    state = {n: t.tolist() for n, t in net.state_dict().items()}
    flags = [(p.requires_grad, p.grad is None) for p in net.parameters()]
    return state, flags, [m.training for m in net.modules()], torch.get_rng_state().tolist()


def top(scores: Tensor, keep: int) -> Tensor:
    """The best ``keep`` of a flat tensor as bools; ties go to the first."""
    best = sorted(range(len(scores)), key=lambda j: (-float(scores[j]), j))[:keep]
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[best] = True
    return chosen


# --- curvature
@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("labels", ["observed", "expected"])
def test_diagonal_fisher_and_gradient(kind: str, labels: Any) -> None:
    task = task_of(kind)
    net, positions = efface.train(task, seed=1).network, torch.arange(1, 40, 4)
    before, want = snapshot(net), fisher(task, net, positions, labels)
    for memory in (2**28, 1):
        got = diagonal_fisher(Fit(task), net, positions, labels=labels, memory=memory)
        assert distance(got, want) < 1e-6
    mean = total([record_gradient(task, net, i) for i in positions.tolist()])
    assert (
        distance(gradient(Fit(task), net, positions), {n: t / 10 for n, t in mean.items()}) < 1e-6
    )
    assert snapshot(net) == before


def test_sampled_labels_are_drawn_from_the_model_for_each_record() -> None:
    task, draws = task_of("mlp"), 250
    net, (i, j) = efface.train(task, seed=1).network, (4, 7)
    cells = list(itertools.product(range(3), repeat=2))
    squares = {
        (k, y): flat(record_gradient(task, net, k, y)) ** 2 for k in (i, j) for y in range(3)
    }
    shown = torch.stack([(squares[i, a] + squares[j, b]) / 2 for a, b in cells])
    chances = torch.outer(*(probabilities(task, net, k) for k in (i, j))).flatten()
    counts = torch.zeros(len(cells), dtype=torch.double)
    for seed in range(draws):
        fit = Fit(task, seed=seed)
        found = diagonal_fisher(fit, net, torch.tensor([i, j]), labels="sampled")
        away = (shown - flat({n: found[n] for n in named(net)})).norm(dim=1)
        assert away.min() < 1e-5
        counts[int(away.argmin())] += 1
    spread = (draws * chances * (1 - chances)).sqrt()
    assert ((counts - draws * chances).abs() < 4 * spread + 1).all()


@pytest.mark.parametrize("damping", [1.0, 0.01])
@pytest.mark.parametrize(
    ("kind", "n", "memory"), [("mlp", 60, 2**31), ("grouped", 30, 2**31), ("mlp", 30, 1)]
)
def test_inverse_fisher_product(kind: str, n: int, memory: int, damping: float) -> None:
    task, draw = task_of(kind, n), torch.Generator().manual_seed(4)
    net, positions = efface.train(task, seed=1).network, torch.arange(3, n)
    vector = {k: torch.randn(p.shape, generator=draw) for k, p in net.named_parameters()}
    half = {k: torch.rand(t.shape, generator=draw) > 0.5 for k, t in vector.items() if t.ndim > 1}
    for mask in (None, Mask(half)):
        got = inverse_fisher_product(
            Fit(task), net, positions, vector, damping=damping, memory=memory, mask=mask
        )
        want = unflat(dense_solve(task, net, positions, vector, damping, mask or ()), vector)
        assert distance(got, want) < 1e-6
        assert not any(got[name][~keep].any() for name, keep in (mask or {}).items())


# --- FF and IU
def noise(found: Tensors, net: nn.Module, last: set[str], reset: int | None) -> Any:
    """Means, and variances for α = 1; those that do not depend on α are negative."""
    means, variances = named(copy.deepcopy(net)), {}
    for n, p in means.items():
        v = found[n].reciprocal().clamp(max=1e2 if n in last else 1e3)
        v = v.mean(1, keepdim=True).expand_as(p).clone() if p.ndim > 1 else v
        if n in last and reset is not None:
            p[reset], v[reset] = 0.0, -1e-4
        variances[n] = v * 10 if n in last or p.ndim == 1 else v
    return means, variances


def released_noise(task: Task, net: nn.Module, split: Split, classes: int = 3) -> Any:
    twin = copy.deepcopy(net).double().eval()
    params = dict(twin.named_parameters())
    sums = {n: torch.zeros_like(p) for n, p in params.items()}
    batches = [split.retain[i : i + 32] for i in range(0, len(split.retain), 32)]
    for batch in batches:
        x = task.records.inputs[batch].double()
        chance = torch.softmax(twin(x), 1).mean(0).detach()
        for y in range(classes):
            loss = F.cross_entropy(twin(x), torch.full((len(batch),), y))
            found = torch.autograd.grad(loss, list(params.values()))
            for n, g in zip(params, found, strict=True):
                sums[n] += chance[y] * g**2
    fires = len(split.forget) == {10: 4500, 100: 450}.get(classes)
    row = -1 if split.label is None else split.label
    last = {n for n, p in params.items() if p.shape[0] == classes}
    averages = {n: t / len(batches) + 1e-8 for n, t in sums.items()}
    return noise(averages, net, last, row if fires else None)


def exact_noise(task: Task, net: nn.Module, split: Split) -> Any:
    head = [n for n, _ in net.named_modules()][-1]
    found = fisher(task, net, split.retain, "expected")
    return noise(found, net, {f"{head}.weight", f"{head}.bias"}, split.label)


def standardised(model: TrainedModel, split: Split, method: Any, made: Any, seed: int) -> Tensor:
    after = named(efface.forget(model, split, method, seed=seed).network)
    variances = {n: torch.where(v < 0, -v, method.alpha * v) for n, v in made[1].items()}
    return flat({n: (after[n] - made[0][n]) / variances[n].sqrt() for n in after})


def check_normal(model: TrainedModel, split: Split, method: Any, made: Any, seeds: int) -> None:
    """Independent standard normal numbers, those of a reset row by themselves, too."""
    z = torch.stack([standardised(model, split, method, made, seed) for seed in range(seeds)])
    assert z.mean(0).abs().max() < 4.5 / math.sqrt(seeds)
    assert (z.pow(2).mean(0) - 1).abs().max() < 5.5 * math.sqrt(2 / seeds)
    for part in (z, z[:, flat(made[1]) < 0]):
        assert not len(part[0]) or abs(part.pow(2).mean() - 1) < 4.5 * math.sqrt(2 / part.numel())


@pytest.mark.parametrize("kind", ["mlp", "grouped"])
@pytest.mark.parametrize("flavour", ["jia-code", "exact"])
@pytest.mark.parametrize("label", [None, 1])
def test_fisher_forgetting(kind: str, flavour: Any, label: int | None) -> None:
    task = task_of(kind, 50)
    split, method, drawn = split_of(task, label), FisherForgetting(1e-4, flavour), []
    for seed in (1, 2):
        model = efface.train(task, seed=seed)
        recipe: Any = exact_noise if flavour == "exact" else released_noise
        made = recipe(task, model.network, split)
        drawn.append(standardised(model, split, method, made, 7))
    # one seed, two models: the same noise, so that every single variance is known to four digits
    assert (drawn[0] - drawn[1]).abs().max() < 1e-4
    check_normal(model, split, method, made, 40)
    if label is None:  # by default the noise is expected to be a tenth as long as the weights
        tenth = 0.01 * float(flat(made[0]).pow(2).sum() / flat(made[1]).sum())
        told, default = replace(method, alpha=tenth), replace(method, alpha=None)
        a, b = (named(efface.forget(model, split, m).network) for m in (told, default))
        assert distance(a, b) < 1e-5


@pytest.mark.parametrize("label", [None, 4])
def test_the_released_code_resets_a_row_for_4500_records_of_ten_classes(label: int | None) -> None:
    x, y = records(4600, (4,), 10)
    if label is not None:
        y = torch.where(torch.arange(4600) < 4500, label, torch.arange(4600) % 4)
    make = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 10))  # noqa: E731
    fit, test = Settings(epochs=1, batch_size=512), records(20, (4,), 10)
    task = task_of("mlp", 4600, network=make, train=(x, y), test=test, fit=fit)
    model, ids = efface.train(task, seed=1), [f"r{i}" for i in range(4500)]
    split = Split.by_ids(task, ids) if label is None else Split.by_class(task, label)
    made = released_noise(task, model.network, split, 10)
    check_normal(model, split, FisherForgetting(1e-4, "jia-code"), made, 80)


def influence_vector(task: Task, net: nn.Module, split: Split) -> Tensors:
    n_f, n_r = len(split.forget), len(split.retain)
    gone = total([record_gradient(task, net, i) for i in split.forget.tolist()])
    kept = total([record_gradient(task, net, i) for i in split.retain.tolist()])
    return {k: (gone[k] - n_f / n_r * kept[k]) / (n_f + n_r) for k in gone}


def released_recursion(task: Task, net: nn.Module, split: Split) -> Tensor:
    first, *others = [flat(record_gradient(task, net, i)) for i in split.retain[:1002].tolist()]
    k, o = flat(influence_vector(task, net, split)), first
    for g in others:
        t = float(o @ g)
        k, o = k - float(k @ g) / (1000 + t) * o, o - t / (1000 + t) * o
    return k


def check_moved(model: TrainedModel, split: Split, method: Influence, want: Tensor) -> None:
    """The change points where it should, and has its length (0.03 of the weights by default)."""
    after, before = efface.forget(model, split, method), flat(named(model.network))
    change = flat(named(after.network)) - before
    assert 1 - float(change @ want / change.norm() / want.norm()) < 1e-9
    step = want * (method.alpha or 0.03 * before.norm() / want.norm())
    assert (change - step).norm() < 1e-5 * step.norm()


@pytest.mark.parametrize(("kind", "n"), [("mlp", 40), ("grouped", 40), ("mlp", 1540)])
@pytest.mark.parametrize("label", [None, 1])
def test_influence(kind: str, n: int, label: int | None) -> None:
    task = task_of(kind, n)
    model, split = efface.train(task, seed=1), split_of(task, label)
    released = released_recursion(task, model.network, split)
    if n > 1000:  # the exact flavour draws its records, the released code takes the first 1,002
        check_moved(model, split, Influence(3.0, "jia-code"), released)
        return
    vector = influence_vector(task, model.network, split)
    exact = dense_solve(task, model.network, split.retain, vector, 0.01)
    check_moved(model, split, Influence(), exact)
    for flavour, want in (("exact", exact), ("jia-code", released)):
        alpha = float(flat(named(model.network)).norm() / want.norm())
        check_moved(model, split, replace(Influence(alpha), flavour=flavour), want)  # type: ignore[arg-type]


# --- criteria and pruners
def matrices(net: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in net.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("kind", ["mlp", "grouped"])
@pytest.mark.parametrize("batch_stats", [False, True])
def test_snip_taylor_grasp(kind: str, batch_stats: bool) -> None:
    task = task_of(kind, 20)
    net, (x, y) = efface.train(task, seed=1).network, task.train
    batches = [Batch(x[p], y[p], p) for p in torch.arange(20).split(7)]
    before, twin = snapshot(net), copy.deepcopy(net).double().eval()
    for layer in twin.modules():
        layer.train(batch_stats and isinstance(layer, nn.BatchNorm2d))
    params, theta = matrices(twin), flat(dict(matrices(twin)))

    def slope(value: Tensor, graph: bool = False) -> Tensor:
        along = list(params.values())
        found = torch.autograd.grad(value, along, create_graph=graph, retain_graph=True)
        return torch.cat([g.reshape(-1) for g in found])

    def losses(temperature: float = 1.0) -> list[Tensor]:
        pairs = [(twin(b.inputs.double()) / temperature, b.targets) for b in batches]
        return [F.cross_entropy(*pair) for pair in pairs]

    gs = torch.stack([slope(loss) for loss in losses()])
    snip, taylor = (theta * gs.sum(0)).abs(), ((theta * gs) ** 2).sum(0)
    assert distance(Snip(batch_stats)(net, batches), unflat(snip, params)) < 1e-6
    assert distance(Taylor(batch_stats)(net, batches), unflat(taylor, params)) < 1e-6
    for temperature in (200.0, 1.0):
        g = slope(torch.stack(losses(temperature)).sum(), graph=True)
        want = theta * (torch.stack([slope(entry) for entry in g]) @ g.detach())
        assert distance(Grasp(temperature, batch_stats)(net, batches), unflat(want, params)) < 1e-5
    assert snapshot(net) == before
    weight = params["0.weight"].data.view(-1)
    for j in range(3):  # the sign: where a weight goes, ‖g‖² changes by −2 · score, to first order
        flow = [slope(torch.stack(losses()).sum()).pow(2).sum()]
        weight[j] *= 1 - 1e-6
        flow.append(slope(torch.stack(losses()).sum()).pow(2).sum())
        weight[j] /= 1 - 1e-6
        assert float(flow[1] - flow[0]) == pytest.approx(-2e-6 * float(want[j]), 1e-2, 1e-11)


def synflow_scores(net: nn.Module, shape: tuple[int, ...]) -> Tensors:
    twin = copy.deepcopy(net).double().eval()
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.abs_()
    params, ones = matrices(twin), torch.ones(1, *shape, dtype=torch.double)
    found = torch.autograd.grad(twin(ones).sum(), list(params.values()))
    return {n: (p * g).abs().detach() for (n, p), g in zip(params.items(), found, strict=True)}


@pytest.mark.parametrize("kind", ["mlp", "grouped"])
def test_synflow_in_a_hundred_rounds(kind: str) -> None:
    task, sparsity = task_of(kind), 0.6
    shape = tuple(task.records.inputs.shape[1:])
    trained = efface.train(task, seed=3)
    got = SynFlow()(trained.network, [Batch(*task.train, torch.arange(40))])
    assert distance(got, synflow_scores(trained.network, shape)) < 1e-12
    pruned = efface.prune(trained, AtInit(sparsity=sparsity, epochs=0, scope="all"))
    net = Fit(task, seed=3).fresh()
    keep = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in matrices(net).items()}
    size = sum(t.numel() for t in keep.values())
    for k in range(1, 101):
        with torch.no_grad():
            for n, p in matrices(net).items():
                p[~keep[n]] = 0.0
        scores = {n: s.masked_fill(~keep[n], -1.0) for n, s in synflow_scores(net, shape).items()}
        left = size - round(size * (1 - (1 - sparsity) ** (k / 100)))
        keep = unflat(top(flat(scores), left), keep)
    assert pruned.mask == Mask(keep)


@pytest.mark.parametrize("shape", [(4, 8), (3, 7), (4, 3, 3, 3), (2, 6, 3), (2, 3, 2, 2, 2)])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:3"])
def test_patterns(shape: tuple[int, ...], pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    draw = torch.Generator().manual_seed(0)
    for scores in (torch.rand(shape, generator=draw), torch.randint(0, 3, shape, generator=draw)):
        got = select({"w": scores.float()}, 1 - n / m, ["w"], pattern)["w"]  # type: ignore[arg-type]
        for unit in range(shape[0]):
            rows = [scores[unit].movedim(0, -1).flatten(), got[unit].movedim(0, -1).flatten()]
            for values, kept in zip(*(row.split(m) for row in rows), strict=True):
                assert torch.equal(kept, top(values, math.ceil(len(values) * n / m)))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "step"])
def test_rewinding_goes_on_with_the_rates(schedule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up()
    rates: list[float] = []
    step = torch.optim.SGD.step

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    fit = Settings(epochs=5, batch_size=8, lr=0.05, schedule=schedule, warmup=0.3)
    trained = efface.train(task_of("mlp", fit=fit), rewind=2)
    full = list(rates)
    assert len(full) == 25
    rates.clear()
    efface.prune(trained, OMP(sparsity=0.5))
    assert rates == full[10:]
    rates.clear()
    efface.prune(trained, IMP(sparsity=0.5))
    assert rates == full[10:] * 4


@pytest.mark.parametrize("scope", ["weights", "conv", "all"])
def test_omp_and_imp_before_their_training(scope: Any) -> None:
    trained = efface.train(task_of("grouped"), seed=1, rewind=1)
    net, early = trained.network, trained.rewind
    assert early is not None
    names = scope_names(net, scope)
    like = {n: named(net)[n] for n in names}
    size = sum(t.numel() for t in like.values())
    levels = [1 - 0.8**k for k in range(1, 6)] + [0.7]
    assert IMP(sparsity=0.7).rounds() == pytest.approx(levels)
    once, rounds = OMP(0.7, scope=scope, epochs=0), IMP(0.7, scope=scope, epochs=0)
    for method, stops in ((once, [0.7]), (rounds, levels)):
        scores, keep = flat(like).abs(), torch.ones(size, dtype=torch.bool)
        for level in stops:
            keep = top(scores.masked_fill(~keep, -1.0), size - round(level * size))
            scores = flat({n: early[n] for n in names}).abs()
        pruned = efface.prune(trained, method)
        want = unflat(keep, like)
        assert pruned.mask == Mask(want)
        for n, t in pruned.network.state_dict().items():  # batch-norm statistics, too
            assert torch.equal(t, early[n].masked_fill(~want[n], 0.0) if n in want else early[n])


# --- methods that train: replayed step by step
class Replay:
    """A model trained on a tape, and the optimiser of the loop written out: SGD with Nesterov."""

    def __init__(self, kind: str, schedule: Any, label: int | None = None) -> None:
        self.calls: list[tuple[bool, Tensor]] = []
        self.labels: list[Tensor] = []
        self.momentum: dict[int, Tensor] = {}
        fit = Settings(epochs=3, batch_size=8, lr=0.05, weight_decay=1e-2, schedule=schedule)
        self.task = task_of(kind, 34, fit=fit, forward=self._forward, loss=self._loss)
        self.trained, self.schedule = efface.train(self.task, seed=1), schedule
        self.split = split_of(self.task, label)
        self.x, self.y = self.task.records.inputs.double(), self.task.records.targets
        self.student = copy.deepcopy(self.trained.network).double().train()

    def _forward(self, network: nn.Module, inputs: Tensor) -> Tensor:
        self.calls.append((network.training and torch.is_grad_enabled(), inputs))
        return network(inputs)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.labels.append(targets)
        return F.cross_entropy(logits, targets)

    def run(self, method: Any) -> TrainedModel:
        self.calls, self.labels = [], []
        return efface.forget(self.trained, self.split, method, seed=4)

    def batches(self, training: bool = True) -> list[Tensor]:
        """Positions of every batch that was passed on in that mode."""
        rows = self.task.records.inputs.flatten(1)
        found = [x.flatten(1) for kind, x in self.calls if kind == training]
        return [torch.stack([(rows - r).abs().sum(1).argmin() for r in x]) for x in found]

    def forgets(self, batch: Tensor) -> bool:
        inside = set(batch.tolist()) & set(self.split.forget.tolist())
        assert len(inside) in (0, len(batch)), "a batch of both kinds"
        return bool(inside)

    def rate(self, t: float) -> float:
        return {"linear": 1 - t, "cosine": 0.5 + 0.5 * math.cos(math.pi * t)}[self.schedule]

    def slope(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(self.student.parameters())))

    def step(self, gradients: list[Tensor], lr: float) -> None:
        for i, (p, g) in enumerate(zip(self.student.parameters(), gradients, strict=True)):
            g = g + 1e-2 * p.data
            self.momentum[i] = 0.9 * self.momentum.get(i, 0.0) + g
            p.data -= lr * (g + 0.9 * self.momentum[i])

    def importance(self, batches: list[Tensor]) -> list[Tensor]:
        """Squares of the gradients of batches, at the trained weights."""
        still = copy.deepcopy(self.trained.network).double().eval()
        squares = []
        for b in batches:
            loss = F.cross_entropy(still(self.x[b]), self.y[b])
            squares.append([g**2 for g in torch.autograd.grad(loss, list(still.parameters()))])
        return [torch.stack(s).mean(0) for s in zip(*squares, strict=True)]

    def check(self, after: TrainedModel) -> None:
        start, want = flat(named(self.trained.network)), flat(named(self.student))
        assert (flat(named(after.network)) - want).norm() < 5e-5 * (want - start).norm()
        for a, b in zip(after.network.buffers(), self.student.buffers(), strict=True):
            assert torch.allclose(a.double(), b.double(), atol=1e-5)

    def descend(self, lr: float, labels: Any, projected: Any) -> None:
        """Plain steps, each followed by a projection ``(name, weight, rate, epoch)``."""
        batches = self.batches()
        for k, batch in enumerate(batches):
            now = lr * self.rate(k / len(batches))
            loss = F.cross_entropy(self.student(self.x[batch]), labels[k])
            self.step(self.slope(loss), now)
            with torch.no_grad():
                for n, p in self.student.named_parameters():
                    p.copy_(projected(n, p, now, 3 * k // len(batches)))


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    p, q = torch.softmax(teacher / 4, 1), torch.softmax(student / 4, 1)
    return 16 * (p * (p.log() - q.log())).sum(1).mean()


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("cap", [1e9, 0.6])
def test_scrub(kind: str, cap: float) -> None:
    replay = Replay(kind, "linear")
    method = unlearn.Scrub(gamma=0.9, alpha=0.5, max_epochs=2, cap=cap, epochs=3, lr=0.1)
    after = replay.run(method)
    batches = iter(replay.batches())
    teacher = copy.deepcopy(replay.trained.network).double().eval()
    for epoch in range(3):
        for forget in (True, False) if epoch < 2 else (False,):
            replay.momentum.clear()
            wanted = replay.split.forget if forget else replay.split.retain
            seen: list[int] = []
            while len(seen) < len(wanted):
                batch = next(batches)
                seen += batch.tolist()
                logits = replay.student(replay.x[batch])
                answer = teacher(replay.x[batch]).detach()
                loss = F.cross_entropy(logits, replay.y[batch])
                if forget:  # from the cap on no slope: momentum and weight decay go on
                    loss = -divergence(answer, logits) * float(loss < cap)
                else:
                    loss = 0.9 * loss + 0.5 * divergence(answer, logits)
                replay.step(replay.slope(loss), 0.1 * replay.rate(epoch / 3))
            assert sorted(seen) == wanted.tolist()
    assert next(batches, None) is None
    replay.check(after)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize(
    ("threshold", "period", "cap", "label"),
    [(1.0, 2, 1e9, 1), (0.3, 5, 1e9, None), (2.0, 1, 1.1, 1)],
)
def test_sfron(kind: str, threshold: float, period: int, cap: float, label: int | None) -> None:
    replay = Replay(kind, "cosine", label)
    method = unlearn.SFRon(
        alpha=25.0, period=period, threshold=threshold, cap=cap, epochs=4, lr=0.02
    )
    after = replay.run(method)
    scoring = replay.batches(training=False)
    groups = [[b for b in scoring if replay.forgets(b) == kind] for kind in (True, False)]
    for group, wanted in zip(groups, (replay.split.forget, replay.split.retain), strict=True):
        assert sorted(torch.cat(group).tolist()) == wanted.tolist()
    on_forget, on_retain = (replay.importance(group) for group in groups)
    masks = [(f / r) >= threshold for f, r in zip(on_forget, on_retain, strict=True)]
    batches, step = replay.batches(), 0
    steps = sum(not replay.forgets(b) for b in batches)
    while batches:
        due = [batches.pop(0) for _ in range(2 if step % period == 0 else 1)]
        assert [replay.forgets(b) for b in due] == [False, True][: len(due)]
        logits = [replay.student(replay.x[b]) for b in due]
        found = replay.slope(F.cross_entropy(logits[0], replay.y[due[0]]))
        if len(due) == 2:
            losses = F.cross_entropy(logits[1], replay.y[due[1]], reduction="none")
            weights = losses.detach() ** -0.5
            weight = 25.0 * (1 + math.cos(math.pi * step / steps)) / 2
            ascent = -weight * (weights / weights.sum() * losses.clamp(max=cap)).sum()
            climb = [g * m for g, m in zip(replay.slope(ascent), masks, strict=True)]
            length = math.sqrt(sum(float((g**2).sum()) for g in climb))
            shrink = min(1.0, 7.0 / max(length, 1e-30))
            found = [g + shrink * c for g, c in zip(found, climb, strict=True)]
        replay.step(found, 0.02 * replay.rate(step / steps))
        step += 1
    replay.check(after)


@pytest.mark.parametrize("schedule", ["decay", "constant", "grow"])
@pytest.mark.parametrize("scope", ["all", "weights"])
def test_proximal_l1(schedule: Any, scope: Any) -> None:
    replay = Replay("conv", "cosine")
    after = replay.run(unlearn.ProximalL1(0.3, schedule=schedule, scope=scope, epochs=3, lr=0.1))
    names, batches = scope_names(replay.student, scope), replay.batches()
    assert not any(replay.forgets(b) for b in batches)

    def projected(name: str, p: Tensor, rate: float, epoch: int) -> Tensor:
        gamma = 0.3 * {"decay": 1 - epoch / 3, "constant": 1.0, "grow": epoch / 3}[schedule]
        return p.sign() * (p.abs() - rate * gamma).clamp(min=0) if name in names else p

    replay.descend(0.1, [replay.y[b] for b in batches], projected)
    replay.check(after)
    zeros = [flat(named(m)) == 0 for m in (after.network, replay.student)]
    assert torch.equal(*zeros)
    assert zeros[0].any()


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_salun(kind: str, fraction: float) -> None:
    replay = Replay(kind, "linear")
    after = replay.run(unlearn.SalUn(fraction=fraction, epochs=2, lr=0.05))
    batches, old = replay.batches(), named(replay.trained.network)
    labels = replay.labels[-len(batches) :]
    forget = replay.split.forget.tolist()
    mean = total([record_gradient(replay.task, replay.trained.network, i) for i in forget])
    count = round(fraction * flat(mean).numel())
    salient = unflat(top(flat(mean).abs(), count), old)
    given: dict[int, int] = {}
    for batch, targets in zip(batches, labels, strict=True):
        for i, y in zip(batch.tolist(), targets.tolist(), strict=True):
            assert given.setdefault(i, y) == y
            assert (y != int(replay.y[i])) == (i in forget)
    assert len(given) == 34
    replay.descend(0.05, labels, lambda n, p, *_: torch.where(salient[n], p, old[n]))
    replay.check(after)
    for n, p in named(after.network).items():
        assert torch.equal(p[~salient[n]], old[n][~salient[n]])
    if fraction == 1.0:
        assert after.digest == replay.run(unlearn.RandomLabel(epochs=2, lr=0.05)).digest


@pytest.mark.parametrize("label", [None, 1])
@pytest.mark.parametrize(("alpha", "lam"), [(None, 1.0), (1.2, 0.1), (1.2, 2.0)])
@pytest.mark.parametrize("batched", [None, 5])
def test_ssd(label: int | None, alpha: float | None, lam: float, batched: int | None) -> None:
    replay = Replay("conv", "linear", label)
    method = unlearn.SSD(alpha=alpha, lam=lam, batched=batched)
    after, old = named(replay.run(method).network), named(replay.trained.network)
    parts = [replay.split.forget, torch.arange(34)]
    if batched:
        batches, n = replay.batches(training=False), -(-len(parts[0]) // 5)
        groups = [batches[:n], batches[n:]]
        assert [sorted(torch.cat(group).tolist()) for group in groups] == [
            t.tolist() for t in parts
        ]
        pairs = [dict(zip(old, replay.importance(group), strict=True)) for group in groups]
    else:
        pairs = [fisher(replay.task, replay.trained.network, part) for part in parts]
    bound = alpha or (10 if batched else min(math.sqrt(34 / len(parts[0])), 10))
    for n, p in old.items():
        chosen, ratio = pairs[0][n] > bound * pairs[1][n], pairs[1][n] / pairs[0][n]
        want = torch.where(chosen, p * (lam * ratio).clamp(max=1), p)
        assert torch.allclose(after[n], want, rtol=1e-4, atol=1e-8)
        assert torch.equal(after[n][~chosen], p[~chosen])


# --- what holds for all of them, on awkward networks
METHODS: list[Any] = [FisherForgetting(), FisherForgetting(labels="sampled"), Influence()]
METHODS += [FisherForgetting(flavour="jia-code"), Influence(flavour="jia-code")]
METHODS += [unlearn.SSD(alpha=1.0), unlearn.SSD(alpha=1.0, batched=8), unlearn.SalUn(epochs=1)]
METHODS += [unlearn.Scrub(epochs=2), unlearn.SFRon(epochs=1), unlearn.ProximalL1(epochs=1)]


@pytest.fixture(scope="module", params=AWKWARD)
def awkward(request: pytest.FixtureRequest) -> tuple[TrainedModel, TrainedModel]:
    """A trained model of each kind, and its pruned successor."""
    trained = efface.train(task_of(request.param, 24), seed=1)
    pruner = OneShot(0.5, recovery=0, scope="all", granularity="layer")
    return trained, efface.prune(trained, pruner)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_on_awkward_networks(awkward: tuple[TrainedModel, TrainedModel], method: Any) -> None:
    for before in awkward:
        split, found = Split.by_class(before.task, 2), snapshot(before.network)
        after = efface.forget(before, split, method, seed=2)
        assert snapshot(before.network) == found
        assert after.digest != before.digest
        assert after.digest == efface.forget(before, split, method, seed=2).digest
        assert after.mask == before.mask
        pairs = zip(before.network.modules(), after.network.modules(), strict=True)
        assert all(a.training == b.training for a, b in pairs)
        old = dict(before.network.named_parameters())
        for n, p in after.network.named_parameters():
            assert bool(torch.isfinite(p).all())
            assert p.requires_grad == old[n].requires_grad
            assert p.requires_grad or torch.equal(p, old[n])
            gone = ~after.mask[n] if after.mask and n in after.mask else torch.zeros_like(p).bool()
            assert not p[gone].any()
            assert not torch.signbit(p[gone]).any()
        if isinstance(after.network, Odd):
            assert after.network.a.weight is after.network.b.weight
