"""FF and IU against literal twins: loops over records and batches, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import efface
from efface.errors import DivergedError, MethodError
from efface.fitting import Fit
from efface.sparsify import OneShot
from efface.unlearn import FisherForgetting, Influence, build
from efface.unlearn import influence as influence_module
from efface.unlearn.fisher import batch_fisher, perturb, variances
from efface.unlearn.influence import released, removal

Named = dict[str, Tensor]
NewTask = Callable[..., efface.Task]


def named(network: nn.Module) -> Named:
    return {n: p.detach().clone() for n, p in network.named_parameters()}


def dense(values: Named) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in values.values()])


def slow_gradient(network: nn.Module, task: efface.Task, positions: list[int]) -> Named:
    """Mean loss gradient of some records, in float64."""
    own = dict(network.named_parameters())
    x, y = task.train
    loss = F.cross_entropy(network(x[positions].double()), y[positions])
    return dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))


def in_double(model: efface.TrainedModel) -> nn.Module:
    return copy.deepcopy(model.network).double().eval()


def gap(found: Named, wanted: Named) -> float:
    return float((dense(found) - dense(wanted)).norm() / dense(wanted).norm())


# --- FF -------------------------------------------------------------------------------------------


def literal_batch_fisher(network: nn.Module, task: efface.Task, positions: list[int]) -> Named:
    """Batches of 32 in file order; squares of the batch's mean gradient for every class."""
    x, _ = task.train
    own = dict(network.named_parameters())
    total = {n: torch.zeros_like(p) for n, p in own.items()}
    batches = [positions[i : i + 32] for i in range(0, len(positions), 32)]
    for batch in batches:
        logits = network(x[batch].double())
        p = logits.softmax(1)
        for y in range(logits.shape[1]):
            loss = F.cross_entropy(logits, torch.full((len(batch),), y))
            found = torch.autograd.grad(loss, list(own.values()), retain_graph=True)
            for n, g in zip(own, found, strict=True):
                total[n] += float(p[:, y].mean().detach()) * g**2
    return {n: t / len(batches) for n, t in total.items()}


def literal_variance(fisher: Tensor, alpha: float, classes: int) -> Tensor:
    """Steps 2 and 4 of the released arithmetic."""
    v = (1 / (fisher + 1e-8)).clamp(max=1e3)
    if len(fisher) == classes:
        v = v.clamp(max=1e2)
    v = alpha * v
    if v.ndim > 1:
        v = v.mean(dim=1, keepdim=True).expand_as(fisher).clone()
    if len(fisher) == classes or v.ndim == 1:
        v = v * 10
    return v


def test_batch_fisher_is_the_released_arithmetic(
    trained: efface.TrainedModel, split: efface.Split, conv_trained: efface.TrainedModel
) -> None:
    for model, positions in ((trained, split.retain), (conv_trained, torch.arange(40))):
        found = batch_fisher(Fit(model.task), model.network, positions, None)
        wanted = literal_batch_fisher(in_double(model), model.task, positions.tolist())
        assert list(found) == list(wanted)
        for name, f in found.items():
            assert torch.allclose(f.double(), wanted[name], rtol=1e-3, atol=1e-9), name


def test_variances_are_the_released_ones(trained: efface.TrainedModel, split: efface.Split) -> None:
    model = efface.forget(trained, split, FisherForgetting(flavour="jia-code", alpha=1e-5), seed=3)
    fisher = literal_batch_fisher(in_double(trained), trained.task, split.retain.tolist())
    fit = Fit(trained.task, seed=3, path="forget")
    draw = fit.generator("noise")
    for name, before in named(trained.network).items():
        v = literal_variance(fisher[name], 1e-5, trained.task.classes)
        wanted = before.double() + v.sqrt() * torch.randn(before.shape, generator=draw).double()
        after = model.network.get_parameter(name).double()
        assert torch.allclose(after, wanted, rtol=1e-4, atol=1e-6), name


def released_row(n_forget: int, classes: int, label: int | None) -> int | None:
    """The row that the released code resets."""
    if (n_forget == 4500 and classes == 10) or (n_forget == 450 and classes == 100):
        return -1 if label is None else label
    return None


@pytest.mark.parametrize("size", [4500, 450, 4499, 24])
@pytest.mark.parametrize("classes", [10, 100, 3])
@pytest.mark.parametrize("label", [None, 1])
def test_released_reset_depends_on_the_size_of_the_forget_set(
    task: efface.Task, size: int, classes: int, label: int | None
) -> None:
    kind = {"kind": "random"} if label is None else {"kind": "class", "class": label}
    split = efface.Split(task, torch.arange(size), torch.arange(5), kind)
    method = FisherForgetting(flavour="jia-code")
    assert method._row(split, classes) == released_row(size, classes, label)
    assert FisherForgetting()._row(split, classes) == label
    assert FisherForgetting(reset_class=False)._row(split, classes) is None


@pytest.mark.parametrize("row", [-1, 1])
def test_reset_row_is_noise_around_zero(trained: efface.TrainedModel, row: int) -> None:
    spread = {n: torch.ones_like(p) for n, p in named(trained.network).items()}
    model = trained.copy()
    heads = {"4.weight", "4.bias"}
    perturb(model.network, spread, 0.0, Fit(trained.task), None, (row, heads))
    draw = Fit(trained.task).generator("noise")
    for name, before in named(trained.network).items():
        noise = torch.randn(before.shape, generator=draw)
        after = model.network.get_parameter(name)
        if name in heads:
            assert torch.allclose(after[row], math.sqrt(1e-3) * noise[row])
            before, after = (torch.cat([t[:row], t[row:][1:]]) for t in (before, after))
        assert torch.equal(after, before)


def test_exact_flavour_by_its_definition(
    trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    for labels in ("observed", "expected"):
        method = FisherForgetting(alpha=1e-4, labels=labels)  # type: ignore[arg-type]
        after = efface.forget(trained, class_split, method, seed=2)
        network, task = in_double(trained), trained.task
        positions = class_split.retain.tolist()
        fisher: Named = {}
        own = dict(network.named_parameters())
        for position in positions:
            logits = network(task.train[0][position : position + 1].double())
            for y, p in enumerate(logits.detach()[0].softmax(0).tolist()):
                weight = p if labels == "expected" else float(y == task.train[1][position])
                loss = F.cross_entropy(logits, torch.tensor([y]))
                found = torch.autograd.grad(loss, list(own.values()), retain_graph=True)
                for n, g in zip(own, found, strict=True):
                    fisher[n] = fisher.get(n, 0) + weight * g**2 / len(positions)
        draw = Fit(task, seed=2, path="forget").generator("noise")
        for name, before in named(trained.network).items():
            head = name.startswith("4.")
            v = 1e-4 * (1 / (fisher[name] + 1e-8)).clamp(max=1e2 if head else 1e3)
            v = v.mean(1, keepdim=True).expand_as(before) if v.ndim > 1 else v
            v = v * (10 if head or v.ndim == 1 else 1)
            mean = before.double()
            if head:
                v, mean[1] = v.clone(), 0
                v[1] = 1e-3
            wanted = mean + v.sqrt() * torch.randn(before.shape, generator=draw).double()
            after_p = after.network.get_parameter(name).double()
            assert torch.allclose(after_p, wanted, rtol=1e-3, atol=1e-5), (labels, name)


def test_noise_is_as_long_as_promised(trained: efface.TrainedModel, split: efface.Split) -> None:
    for flavour in ("exact", "jia-code"):
        lengths = []
        for seed in range(12):
            after = efface.forget(trained, split, FisherForgetting(flavour=flavour), seed=seed)  # type: ignore[arg-type]
            lengths.append(gap(named(after.network), named(trained.network)))
            fact = after.lineage[-1].detail
            assert fact["noise"] == pytest.approx(lengths[-1], rel=1e-3)
            assert fact["alpha"] > 0
        assert sum(lengths) / len(lengths) == pytest.approx(0.1, rel=0.1)


def test_pruned_weights_count_for_nothing(pruned: efface.TrainedModel) -> None:
    mask = pruned.mask
    assert mask is not None
    fisher = {n: torch.rand(p.shape) for n, p in named(pruned.network).items()}
    poisoned = {n: f.clone() for n, f in fisher.items()}
    for name, keep in mask.items():
        poisoned[name][~keep] = 1e-12  # would give the largest variance
    one, other = (variances(f, set(), mask) for f in (fisher, poisoned))
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert not torch.equal(variances(poisoned, set(), None)["0.weight"], other["0.weight"])


def test_fewer_records(trained: efface.TrainedModel, split: efface.Split) -> None:
    def images(**options: object) -> int:
        after = efface.forget(trained, split, build("ff", options))
        return int(after.lineage[-1].detail["images"]["retain"])

    assert images() == len(split.retain)
    assert images(records=10) == images(records=10, flavour="jia-code") == 10
    digests = {
        efface.forget(trained, split, FisherForgetting(records=10), seed=s).digest for s in range(3)
    }
    assert len(digests) == 3


def test_what_ff_refuses(trained: efface.TrainedModel, split: efface.Split) -> None:
    for wrong in ({"alpha": -1.0}, {"records": 0}, {"memory": 0}):
        with pytest.raises(MethodError, match=rf"fisher-forgetting: {next(iter(wrong))} must be"):
            FisherForgetting(**wrong)  # type: ignore[arg-type]
    spread = {n: torch.full_like(p, math.inf) for n, p in named(trained.network).items()}
    with pytest.raises(DivergedError, match="smaller alpha"):
        perturb(trained.copy().network, spread, 1.0, Fit(trained.task), None, None)


# --- IU -------------------------------------------------------------------------------------------


def slow_removal(model: efface.TrainedModel, split: efface.Split) -> Tensor:
    network, n = in_double(model), len(split.forget) + len(split.retain)
    up = dense(slow_gradient(network, model.task, split.forget.tolist())) * len(split.forget)
    down = dense(slow_gradient(network, model.task, split.retain.tolist())) * len(split.retain)
    return up / n - down * len(split.forget) / (n * len(split.retain))


def literal_recursion(
    model: efface.TrainedModel, positions: list[int], v: Tensor, constant: float, keep: Tensor
) -> Tensor:
    """The released loop, its vectors carried along."""
    network = in_double(model)
    o, k = torch.empty(0), v.clone()
    for i, position in enumerate(positions):
        g = dense(slow_gradient(network, model.task, [position])) * keep
        if i == 0:
            o = g.clone()
            continue
        t = o @ g
        k = k - (k @ g) / (constant + t) * o
        o = o - t / (constant + t) * o
        if i > constant:
            break
    return k


@pytest.mark.parametrize("constant", [1000, 20])
@pytest.mark.parametrize("sparse", [False, True])
def test_closed_form_is_the_released_recursion(
    monkeypatch: pytest.MonkeyPatch,
    trained: efface.TrainedModel,
    pruned: efface.TrainedModel,
    split: efface.Split,
    constant: int,
    sparse: bool,
) -> None:
    monkeypatch.setattr(influence_module, "RELEASED", constant)
    model = pruned if sparse else trained
    keep = torch.ones(len(dense(named(model.network))), dtype=torch.float64)
    if model.mask is not None:
        parts = [
            model.mask[n] if n in model.mask else torch.ones_like(p, dtype=torch.bool)
            for n, p in named(model.network).items()
        ]
        keep = torch.cat([p.flatten() for p in parts]).double()
    fit = Fit(model.task, subject=model)
    v = removal(fit, model.network, split, model.mask)
    wanted_v = slow_removal(model, split) * keep
    assert float((dense(v) - wanted_v).norm() / wanted_v.norm()) < 1e-5
    positions = split.retain[: constant + 2]
    found = dense(released(fit, model.network, positions, v, model.mask, 2**28))
    wanted = literal_recursion(model, split.retain.tolist(), dense(v), constant, keep)
    assert float(found @ wanted / found.norm() / wanted.norm()) >= 1 - 1e-9
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert float((wanted - dense(v)).norm()) > 1e-6 * float(dense(v).norm())  # it does something
    first = dense(slow_gradient(in_double(model), model.task, [int(positions[0])])) * keep
    rest = wanted - dense(v)
    assert abs(float(rest @ first / rest.norm() / first.norm())) > 1 - 1e-9


def test_released_recursion_stops_after_its_constant_and_two(
    monkeypatch: pytest.MonkeyPatch, trained: efface.TrainedModel, split: efface.Split
) -> None:
    monkeypatch.setattr(influence_module, "RELEASED", 20)
    after = efface.forget(trained, split, Influence(flavour="jia-code"))
    # v over everyone, the first record's gradient, and two products for each of the other 21
    images = after.lineage[-1].detail["images"]
    assert images == {"forget": len(split.forget), "retain": len(split.retain) + 22}


@pytest.mark.parametrize("damping", [1.0, 1e-2])
def test_exact_step_equals_a_dense_solve(
    trained: efface.TrainedModel, split: efface.Split, damping: float
) -> None:
    method = Influence(alpha=0.7, damping=damping)
    after = efface.forget(trained, split, method)
    network = in_double(trained)
    rows = torch.stack(
        [dense(slow_gradient(network, trained.task, [p])) for p in split.retain.tolist()]
    )
    matrix = damping * torch.eye(rows.shape[1], dtype=torch.float64) + rows.T @ rows / len(rows)
    wanted = 0.7 * torch.linalg.solve(matrix, slow_removal(trained, split))
    found = dense(named(after.network)) - dense(named(trained.network))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4  # weights are float32
    assert after.lineage[-1].detail["alpha"] == 0.7


@pytest.mark.parametrize("flavour", ["exact", "jia-code"])
def test_the_loss_rises_on_what_is_forgotten_and_not_on_the_rest(
    trained: efface.TrainedModel, class_split: efface.Split, flavour: str
) -> None:
    def losses(model: efface.TrainedModel) -> list[float]:
        x, y = model.task.train
        with torch.no_grad():
            z = model.network.eval()(x)
        parts = (class_split.forget, class_split.retain)
        return [float(F.cross_entropy(z[p], y[p])) for p in parts]

    method = build("iu", {"flavour": flavour})
    before = losses(trained)
    forget, retain = losses(efface.forget(trained, class_split, method))
    assert forget > before[0] + 0.05
    assert retain < before[1] + 0.05
    small = efface.forget(trained, class_split, replace(method, alpha=0.01))
    assert losses(small)[0] > before[0]
    assert losses(small)[1] < before[1]


def test_step_is_as_long_as_promised(trained: efface.TrainedModel, split: efface.Split) -> None:
    for flavour in ("exact", "jia-code"):
        after = efface.forget(trained, split, Influence(flavour=flavour))  # type: ignore[arg-type]
        share = influence_module.SHARE
        assert gap(named(after.network), named(trained.network)) == pytest.approx(share, rel=1e-3)
        assert after.lineage[-1].detail["step"] == pytest.approx(share, rel=1e-6)


def test_little_memory_gives_the_same_step(
    trained: efface.TrainedModel, split: efface.Split
) -> None:
    plenty, little = (
        efface.forget(trained, split, Influence(memory=memory)) for memory in (2**31, 1)
    )
    assert gap(named(little.network), named(plenty.network)) < 1e-6
    assert little.lineage[-1].detail["inverse"]["kept"] == 0


def test_defaults_of_a_task_count(new_task: NewTask, split: efface.Split) -> None:
    task = new_task(defaults={"influence": {"alpha": 3.0}, "fisher-forgetting": {"alpha": 1e-7}})
    model = efface.TrainedModel(task, task.network())
    chosen = efface.Split(task, split.forget, split.retain, split.selector)
    for method, alpha in ((Influence(), 3.0), (FisherForgetting(), 1e-7)):
        after = efface.forget(model, chosen, method)
        assert after.lineage[-1].detail["alpha"] == alpha


@pytest.mark.parametrize("scope", ["conv", "weights"])
def test_images_with_a_mask(conv_trained: efface.TrainedModel, scope: str) -> None:
    model = efface.prune(conv_trained, OneShot(0.5, scope=scope, recovery=0))
    split = efface.Split.by_class(model.task, 0)
    for name in ("ff", "iu"):
        for flavour in ("exact", "jia-code"):
            after = efface.forget(model, split, build(name, {"flavour": flavour}))
            assert after.mask == model.mask
            assert after.lineage[-1].detail["gradients" if name == "iu" else "alpha"]


def test_what_iu_refuses(trained: efface.TrainedModel, split: efface.Split) -> None:
    for wrong in ({"alpha": math.inf}, {"records": 0}, {"damping": 0.0}, {"memory": 0}):
        with pytest.raises(MethodError, match=rf"influence: {next(iter(wrong))} must be"):
            Influence(**wrong)  # type: ignore[arg-type]
    broken = trained.copy()
    with torch.no_grad():
        broken.network.get_parameter("0.weight").fill_(math.nan)
    with pytest.raises(DivergedError):
        efface.forget(broken, split, Influence())
