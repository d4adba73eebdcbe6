"""Whole filters: which live and die together, how they are scored and chosen, and every pruner."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import efface
from efface.errors import MethodError, MismatchError, NeedsError
from efface.fitting import Fit
from efface.journal import Journal
from efface.mask import Mask
from efface.networks import MLP, AirNet, DigitsCNN, ResNet18, ResNet20, ThreeConv, ViT
from efface.networks.residual import ResNet
from efface.networks.vgg import VGG16BN
from efface.sparsify import IMP, OMP, SFP, AtInit, Gradual, OneShot, build_pruner, select
from efface.sparsify.criteria import CRITERIA
from efface.sparsify.filters import FILTER_CRITERIA, filter_scores, select_filters, vectors
from efface.sparsify.groups import (
    Group,
    filter_groups,
    is_structured,
    kept_filters,
    mask_of,
    zero_filters,
)
from efface.sparsify.parts import shown
from efface.steps import recalibrate_bn
from efface.unlearn import FineTune, PruneFirst, build, catalogue

from .conftest import blobs
from .test_cli import done, workplace, write_task

NewTask = Callable[..., efface.Task]

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: MLP([64, 24, 12, 3]), (1, 8, 8)),
    "digits": (lambda: DigitsCNN(3), (1, 8, 8)),
    "three": (lambda: ThreeConv(3), (3, 16, 16)),
    "air": (lambda: AirNet(3, widths=(8, 12, 16)), (3, 16, 16)),
    "resnet20": (lambda: ResNet20(3), (3, 8, 8)),
    "resnet18": (lambda: ResNet((2, 2, 2, 2), (6, 8, 10, 12), 3), (3, 16, 16)),
    "imagenet stem": (lambda: ResNet((1, 1), (6, 8), 3, stem="imagenet"), (3, 32, 32)),
    "vgg": (lambda: VGG16BN(3, width=4), (3, 32, 32)),
    "vit": (lambda: ViT(3, image=16, width=16, depth=2), (3, 16, 16)),
    "vit mean": (lambda: ViT(3, image=16, width=16, depth=1, pool="mean"), (3, 16, 16)),
}
"""Every network of the package, small, and the shape of its records."""


def task_of(network: Callable[[], nn.Module], shape: tuple[int, ...], n: int = 12) -> efface.Task:
    settings = efface.Settings(epochs=2, batch_size=16, lr=0.05)
    return efface.Task(network, blobs(n, 0, shape), blobs(12, 1, shape), fit=settings)


def unsettled(network: nn.Module, seed: int = 0) -> nn.Module:
    """A network in eval mode whose biases, scales and statistics are what training might leave."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in network.state_dict().items():
            if t.ndim == 1 and t.is_floating_point():
                t.copy_(torch.rand(t.shape, generator=draw) + (0.5 if "var" in name else -0.3))
    return network.eval()


def halves(groups: tuple[Group, ...], seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {g.name: torch.randperm(g.size, generator=draw) >= g.size // 2 for g in groups}


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_dropped_filter_is_dead(name: str) -> None:
    """What reads its channel may be anything: torch-pruning names the readers, we fill them."""
    network, shape = NETWORKS[name]
    task = task_of(network, shape)
    net = unsettled(task.network())
    groups = filter_groups(task, net).prunable
    keep = halves(groups)
    mask = mask_of(groups, keep, net)
    mask.apply_(dict(net.named_parameters()))
    x = task.records.inputs[:5]
    graph = tp.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph.build_dependency(net, x, verbose=False)
    before, readers = net(x).detach(), 0
    for group in groups:
        layer: Any = net.get_submodule(group.name.rpartition(".")[0])
        out = graph.get_pruner_of_module(layer).prune_out_channels
        gone = (~keep[group.name]).nonzero().flatten().tolist()
        for dep, indices in graph.get_pruning_group(layer, out, gone):
            reader = dep.target.module
            kind = isinstance(reader, nn.Conv2d | nn.Linear)
            if kind and graph.is_in_channel_pruning_fn(dep.handler):
                reader.weight.data[:, indices] = 1e3
                readers += 1
    assert readers >= len(groups) > 0
    assert torch.equal(net(x), before)
    assert before.std() > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_are_those_of_the_architecture_and_nothing_is_touched(name: str) -> None:
    network, shape = NETWORKS[name]
    task = task_of(network, shape)
    net = task.network().train()
    net.get_parameter(next(iter(dict(net.named_parameters())))).requires_grad_(False)
    state = {n: t.clone() for n, t in net.state_dict().items()}
    flags = [p.requires_grad for p in net.parameters()]
    random = torch.get_rng_state()
    found = filter_groups(task, net)
    assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())
    assert flags == [p.requires_grad for p in net.parameters()]
    assert all(p.grad is None for p in net.parameters())
    assert all(m.training for m in net.modules())
    assert torch.equal(random, torch.get_rng_state())
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()  # groups do not depend on the weights
        again = filter_groups(task, net)
    assert [(g.name, g.size) for g in again.prunable] == [(g.name, g.size) for g in found.prunable]
    assert again.whole == found.whole
    order = list(dict(net.named_parameters()))
    names = [g.name for g in found.prunable]
    assert names == sorted(names, key=order.index)
    held = {n.rpartition(".")[0] for g in found.prunable for n, _ in g.members}
    layers = {n.rpartition(".")[0] for n, p in net.named_parameters() if p.ndim >= 2}
    assert layers == (held & layers) | set(found.whole)
    assert not held & set(found.whole)


def test_what_is_added_is_one_group() -> None:
    task = task_of(*NETWORKS["resnet20"])
    groups = {g.name: g for g in filter_groups(task, task.network()).prunable}
    stream = groups["layer2.0.conv2.weight"]
    assert stream.size == 32
    blocks = ["layer2.0.bn2", "layer2.0.downsample.0", "layer2.0.downsample.1"]
    blocks += [f"layer2.{i}.{part}" for i in (1, 2) for part in ("conv2", "bn2")]
    held = {name.rpartition(".")[0] for name, _ in stream.members}
    assert held == {"layer2.0.conv2", *blocks}
    assert [name for name, _ in stream.weights] == [
        "layer2.0.conv2.weight",
        "layer2.0.downsample.0.weight",
        "layer2.1.conv2.weight",
        "layer2.2.conv2.weight",
    ]
    assert [name for name, _ in groups["layer2.1.conv1.weight"].members] == [
        "layer2.1.conv1.weight",
        "layer2.1.bn1.weight",
        "layer2.1.bn1.bias",
    ]
    assert len(groups) == 12


def test_hidden_neurons_of_a_transformer_can_go_its_stream_cannot() -> None:
    task = task_of(*NETWORKS["vit"])
    found = filter_groups(task, task.network())
    assert [g.name for g in found.prunable] == [
        "blocks.0.linear1.weight",
        "blocks.1.linear1.weight",
    ]
    assert found.whole["patches"] == "LayerNorm mixes its channels"
    assert "attention" in found.whole["blocks.0.attention.qkv"]
    assert found.whole["head"] == "it is the output layer"


def test_the_large_networks() -> None:
    for network, groups in ((ResNet18, 12), (VGG16BN, 13)):
        task = task_of(lambda make=network: make(3), (3, 32, 32), 4)
        assert len(filter_groups(task, task.network()).prunable) == groups


# --- networks of users ----------------------------------------------------------------------------


class Net(nn.Module):
    """Parts, and a function of the network and its inputs that runs them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inputs: int, outputs: int, size: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **more)


def end(net: Any, x: Tensor) -> Tensor:
    """Mean over the image, then the classifier."""
    logits: Tensor = net.fc(x.mean((2, 3)))
    return logits


def one(middle: Callable[[Any, Tensor], Tensor], channels: int = 8, **parts: Any) -> Net:
    """conv ``a`` (8 filters) → something → conv ``b`` → classifier."""
    return Net(
        lambda net, x: end(net, net.b(middle(net, net.a(x)))),
        a=parts.pop("a", conv(3, 8)),
        **parts,
        b=conv(channels, 6),
        fc=nn.Linear(6, 3),
    )


def dense() -> Net:
    """What is computed is concatenated with what was there, and normalised together."""

    def run(net: Any, x: Tensor) -> Tensor:
        first = net.a(x)
        both = torch.cat([first, net.b(F.relu(net.n1(first)))], 1)
        return end(net, net.c(F.relu(net.n2(both))))

    norms = {"n1": nn.BatchNorm2d(6), "n2": nn.BatchNorm2d(10)}
    return Net(run, a=conv(3, 6), b=conv(6, 4), **norms, c=conv(10, 8), fc=nn.Linear(8, 3))


def squeeze() -> Net:
    """Channels are scaled by gates (Hu et al. 2018)."""

    def run(net: Any, x: Tensor) -> Tensor:
        first = F.relu(net.n(net.a(x)))
        gate = torch.sigmoid(net.e2(F.relu(net.e1(first.mean((2, 3))))))
        return end(net, net.b(first * gate[:, :, None, None]))

    parts = {"n": nn.BatchNorm2d(8), "e1": nn.Linear(8, 4), "e2": nn.Linear(4, 8)}
    return Net(run, a=conv(3, 8), **parts, b=conv(8, 6), fc=nn.Linear(6, 3))


def mobile() -> Net:
    def run(net: Any, x: Tensor) -> Tensor:
        return end(net, net.b(F.relu(net.n2(net.d(F.relu(net.n1(net.a(x))))))))

    norms = {"n1": nn.BatchNorm2d(8), "n2": nn.BatchNorm2d(8)}
    depthwise = conv(8, 8, groups=8)
    return Net(run, a=conv(3, 8), d=depthwise, **norms, b=conv(8, 6, 1), fc=nn.Linear(6, 3))


def tied() -> Net:
    net = one(lambda net, x: net.d(net.c(x)), c=conv(8, 8), d=conv(8, 8))
    net.d.weight = net.c.weight
    return net


def two_halves(net: Any, x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return first * second


def shuffled(net: Any, x: Tensor) -> Tensor:
    return x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)


USABLE: dict[str, tuple[Callable[[], nn.Module], dict[str, list[str]]]] = {
    "dense": (
        dense,
        {
            "a.weight": ["a.weight", "a.bias", "n1.weight", "n1.bias", "n2.weight", "n2.bias"],
            "b.weight": ["b.weight", "b.bias", "n2.weight", "n2.bias"],
            "c.weight": ["c.weight", "c.bias"],
        },
    ),
    "gates": (
        squeeze,
        {
            "a.weight": ["a.weight", "a.bias", "n.weight", "n.bias", "e2.weight", "e2.bias"],
            "e1.weight": ["e1.weight", "e1.bias"],
            "b.weight": ["b.weight", "b.bias"],
        },
    ),
    "depthwise": (
        mobile,
        {
            "a.weight": [
                f"{n}.{leaf}" for n in ("a", "d", "n1", "n2") for leaf in ("weight", "bias")
            ],
            "b.weight": ["b.weight", "b.bias"],
        },
    ),
    "sigmoid": (
        lambda: one(lambda net, x: torch.sigmoid(x)),
        {"a.weight": ["a.weight", "a.bias"], "b.weight": ["b.weight", "b.bias"]},
    ),
    "twice": (
        lambda: one(lambda net, x: net.c(net.c(x)), c=conv(8, 8)),
        {
            "a.weight": ["a.weight", "a.bias", "c.weight", "c.bias"],
            "b.weight": ["b.weight", "b.bias"],
        },
    ),
    "flat norm": (
        lambda: Net(
            lambda net, x: net.fc(net.n(net.a(x).flatten(1))),
            a=conv(3, 4),
            n=nn.BatchNorm1d(4 * 36),
            fc=nn.Linear(4 * 36, 3),
        ),
        {"a.weight": ["a.weight", "a.bias", "n.weight", "n.bias"]},
    ),
    "log-softmax": (
        lambda: Net(
            lambda net, x: end(net, net.a(x)).log_softmax(1), a=conv(3, 8), fc=nn.Linear(8, 3)
        ),
        {"a.weight": ["a.weight", "a.bias"]},
    ),
    "branches on data": (
        lambda: one(lambda net, x: x if float(x.detach().sum()) > 0 else x.relu()),
        {"a.weight": ["a.weight", "a.bias"], "b.weight": ["b.weight", "b.bias"]},
    ),
}
"""Network and the members of its groups."""

WHOLE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "group norm": (lambda: one(lambda n, x: n.g(x), g=nn.GroupNorm(2, 8)), "a", "GroupNorm mixes"),
    "instance norm": (
        lambda: one(lambda n, x: n.g(x), g=nn.InstanceNorm2d(8, affine=True)),
        "a",
        "InstanceNorm2d mixes",
    ),
    "functional norm": (
        lambda: one(lambda n, x: F.layer_norm(x, (8, 6, 6))),
        "a",
        "do not stay apart",
    ),
    "no scale": (
        lambda: one(lambda n, x: n.g(x), g=nn.BatchNorm2d(8, affine=False)),
        "a",
        "no scale and shift",
    ),
    "grouped": (lambda: one(lambda n, x: n.g(x), g=conv(8, 8, groups=2)), "g", "grouped conv"),
    "multiplier": (
        lambda: one(lambda n, x: n.g(x), 16, g=conv(8, 16, groups=8)),
        "a",
        "grouped conv",
    ),
    "glu": (lambda: one(lambda n, x: F.glu(x, 1), 4), "a", "do not stay apart"),
    "softmax": (lambda: one(lambda n, x: x.softmax(1)), "a", "do not stay apart"),
    "centred": (
        lambda: one(lambda n, x: x - x.mean(1, keepdim=True)),
        "a",
        "do not stay apart",
    ),
    "shuffled": (lambda: one(shuffled), "a", "do not stay apart"),
    "pixel shuffle": (lambda: one(lambda n, x: F.pixel_shuffle(x, 2), 2), "a", "stay apart"),
    "chunks": (lambda: one(two_halves, 4), "a", "a split"),
    "slices": (lambda: one(lambda n, x: x[:, :4] + x[:, 4:], 4), "a", "ties its filters"),
    "added to the input": (
        lambda: Net(
            lambda n, x: end(n, n.b(x + n.a(x))), a=conv(3, 3), b=conv(3, 6), fc=nn.Linear(6, 3)
        ),
        "a",
        "do not stay apart",
    ),
    "parameter": (
        lambda: one(lambda n, x: x + n.p[:, None, None], p=nn.Parameter(torch.ones(8))),
        "a",
        "a parameter is added",
    ),
    "tied": (tied, "c", "shares its weight"),
    "computed": (lambda: one(lambda n, x: x, a=weight_norm(conv(3, 8))), "a", "is computed from"),
    "transposed": (
        lambda: one(lambda n, x: n.u(x), u=nn.ConvTranspose2d(8, 8, 2, 2)),
        "u",
        "transposed",
    ),
    "attention": (
        lambda: Net(
            lambda n, x: n.fc(n.t(n.a(x).flatten(2).transpose(1, 2)).mean(1)),
            a=conv(3, 8),
            t=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0),
            fc=nn.Linear(8, 3),
        ),
        "a",
        "LayerNorm mixes",
    ),
    "recurrent": (
        lambda: Net(
            lambda n, x: n.fc(n.r(n.a(x).flatten(2).transpose(1, 2))[0][:, -1]),
            a=conv(3, 8),
            r=nn.LSTM(8, 8, batch_first=True),
            fc=nn.Linear(8, 3),
        ),
        "r",
        "LSTM has no filters",
    ),
    "not used": (lambda: one(lambda n, x: x, spare=conv(8, 8)), "spare", "does not reach it"),
    "inner output": (
        lambda: Net(lambda n, x: n.a(x).mean((2, 3)), a=conv(3, 3), fc=nn.Linear(8, 3)),
        "a",
        "reach the network's output",
    ),
    "single": (lambda: one(lambda n, x: n.c(x), 1, c=conv(8, 1)), "c", "a single filter"),
}
"""Network, a layer that is kept whole, and a part of the reason."""


def user_task(network: Callable[[], nn.Module]) -> efface.Task:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return task_of(network, (3, 6, 6))


@pytest.mark.parametrize("name", USABLE)
def test_networks_of_users(name: str) -> None:
    network, members = USABLE[name]
    task = user_task(network)
    net = unsettled(task.network())
    found = filter_groups(task, net)
    assert {g.name: sorted(n for n, _ in g.members) for g in found.prunable} == {
        first: sorted(names) for first, names in members.items()
    }
    keep = halves(found.prunable)
    mask = mask_of(found.prunable, keep, net)
    assert {n: k.tolist() for n, k in kept_filters(mask, found.prunable).items()} == {
        n: k.tolist() for n, k in keep.items()
    }
    assert is_structured(mask)
    mask.apply_(dict(net.named_parameters()))
    seen: list[Tensor] = []
    reader: Any = net.b if hasattr(net, "b") else net.fc
    reader.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    net(task.records.inputs)
    gone = (seen[0] == seen[0][:1]).all(0).reshape(seen[0].shape[1], -1).all(1)
    assert int(gone.sum()) * 2 >= len(gone)  # constant over records


@pytest.mark.parametrize("name", WHOLE)
def test_layers_that_are_kept_whole(name: str) -> None:
    network, layer, reason = WHOLE[name]
    task = user_task(network)
    found = filter_groups(task, task.network())
    assert reason in found.whole[layer]
    members = {n for g in found.prunable for n, _ in g.members}
    assert not {n for n in members if n.startswith(f"{layer}.")}
    assert found.whole["fc"] == "it is the output layer" or name == "inner output"
    pruner = OneShot(0.5, granularity="filter", recovery=0)
    model = efface.TrainedModel(task, task.network())
    if not found.prunable:
        with pytest.raises(MethodError, match=r"no filters can be pruned in scope=weights \(.*: "):
            efface.prune(model, pruner)
        return
    after = efface.prune(model, pruner)
    assert after.mask is not None
    assert not [n for n in after.mask if n.startswith(f"{layer}.")]


def test_a_network_of_one_layer_has_nothing_to_prune(task: efface.Task) -> None:
    task = dataclasses.replace(task, network=lambda: nn.Linear(6, 3))
    found = filter_groups(task, task.network())
    assert found.prunable == ()
    assert dict(found.whole) == {"weight": "it is the output layer"}


UNTRACEABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "raises": (
        lambda: one(lambda net, x: [x][len(x)]),
        r"of Net cannot be traced \(IndexError: .*\); prune weights instead: granularity=layer\.$",
    ),
    "detached": (
        lambda: Net(lambda n, x: end(n, n.a(x)).detach(), a=conv(3, 8), fc=nn.Linear(8, 3)),
        r"cannot be traced \(TypeError: its output is not computed from its weights",
    ),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_a_forward_pass_that_cannot_be_traced(name: str) -> None:
    network, sentence = UNTRACEABLE[name]
    task = user_task(network)
    with pytest.raises(MethodError, match=sentence):
        filter_groups(task, task.network())
    model = efface.TrainedModel(task, task.network())
    for pruner in (SFP(0.5), OneShot(0.5, granularity="filter")):
        with pytest.raises(MethodError, match=sentence):
            efface.prune(model, pruner)


# --- scores ---------------------------------------------------------------------------------------


def filter_of(net: nn.Module, group: Group, c: int) -> list[float]:
    """All weights of a filter, layer by layer, as numbers."""
    params = dict(net.named_parameters())
    names = [name for name, _ in group.members if params[name].ndim >= 2]
    return [float(value) for name in names for value in params[name].detach()[c].flatten().tolist()]


def twin_scores(name: str, net: nn.Module, group: Group) -> list[float]:
    """From the definitions, number by number."""
    filters = [filter_of(net, group, c) for c in range(group.size)]

    def distance(v: list[float], w: list[float]) -> float:
        return sum((a - b) ** 2 for a, b in zip(v, w, strict=True)) ** 0.5

    nothing = [0.0] * len(filters[0])
    if name == "l1":
        return [sum(abs(a) for a in v) for v in filters]
    if name == "geometric-median":
        return [sum(distance(v, w) for w in filters) for v in filters]
    return [distance(v, nothing) for v in filters]


@pytest.fixture(scope="module")
def residual() -> efface.TrainedModel:
    """A ResNet of two stages, two epochs, the weights after the first kept."""
    task = task_of(lambda: ResNet((1, 2), (4, 8), 3, channels=1), (1, 8, 8), 48)
    return efface.train(task, seed=0, rewind=1)


@pytest.fixture(scope="module")
def digits() -> efface.TrainedModel:
    """DigitsCNN on images without meaning, the weights after the first of two epochs kept."""
    return efface.train(task_of(lambda: DigitsCNN(3), (1, 8, 8), 48), seed=0, rewind=1)


@pytest.mark.parametrize("name", ["l1", "l2", "geometric-median", "magnitude"])
def test_filter_criteria_are_their_definitions(residual: efface.TrainedModel, name: str) -> None:
    groups = filter_groups(residual.task, residual.network).prunable
    scores = filter_scores(name, residual, groups, [], Fit(residual.task))
    assert list(scores) == [g.name for g in groups]
    for group in groups:
        expected = torch.tensor(twin_scores(name, residual.network, group), dtype=torch.float64)
        torch.testing.assert_close(scores[group.name], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in CRITERIA if n != "magnitude"])
def test_criteria_for_weights_are_summed_over_a_filter(
    digits: efface.TrainedModel, name: str
) -> None:
    groups = filter_groups(digits.task, digits.network).prunable
    fit = Fit(digits.task, seed=3)
    batches = shown(name, torch.arange(48), fit)
    assert (batches == []) == (not CRITERIA[name].needs_data)
    found = filter_scores(name, digits, groups, batches, fit)
    options = {"seed": fit.generator("score").initial_seed()} if name == "random" else {}
    criterion: Any = CRITERIA[name](**options)
    scores = criterion(digits.network, batches, fit.loss)
    for group in groups:
        for c in range(group.size):
            total = float(scores[group.name][c].double().sum())
            assert float(found[group.name][c]) == pytest.approx(total, rel=1e-6)


def test_near_the_geometric_median_norms_do_not_count() -> None:
    """The middle one of three parallel vectors can go, not the shortest."""
    net = nn.Linear(2, 3, bias=False)
    net.weight.data = torch.tensor([[1.0, 0.0], [5.0, 0.0], [9.5, 0.0]])
    rows = (("weight", torch.arange(3)),)
    groups = [Group("weight", 3, rows, rows)]
    model: Any = type("Model", (), {"network": net})
    task: Any = None
    for name, lowest in (("geometric-median", 1), ("l2", 0), ("l1", 0)):
        scores = filter_scores(name, model, groups, [], task)
        assert int(scores["weight"].argmin()) == lowest
    with pytest.raises(MethodError, match=r"criterion 'l3' is unknown; did you mean 'l[12]'"):
        filter_scores("l3", model, groups, [], task)


# --- selection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.8, 0.97, 0.999])
def test_every_group_loses_its_lowest_filters(
    residual: efface.TrainedModel, sparsity: float
) -> None:
    net = residual.network
    groups = filter_groups(residual.task, net).prunable
    draw = torch.Generator().manual_seed(1)
    scores = {g.name: torch.randint(0, 5, (g.size,), generator=draw) for g in groups}  # with ties
    mask = select_filters(scores, sparsity, groups, net)
    kept = kept_filters(mask, groups)
    params = dict(net.named_parameters())
    for group in groups:
        values = scores[group.name].tolist()
        order = sorted(range(group.size), key=lambda c: (-values[c], c))
        stay = set(order[: max(1, group.size - round(sparsity * group.size))])
        assert set(kept[group.name].nonzero().flatten().tolist()) == stay
        for name, _ in group.members:
            for c in range(group.size):
                entries = mask[name][c].flatten().tolist()
                assert set(entries) == {c in stay}
                assert len(entries) == params[name][c].numel()
    assert set(mask) == {name for g in groups for name, _ in g.members}
    assert is_structured(mask)


def test_channels_that_are_added_are_dropped_together(residual: efface.TrainedModel) -> None:
    after = efface.prune(residual, OneShot(0.5, granularity="filter", recovery=1))
    assert after.mask is not None
    rows = [
        after.mask[f"layer2.{name}"].flatten(1).any(1)
        for name in ("0.conv2.weight", "0.downsample.0.weight", "1.conv2.weight")
    ]
    assert all(torch.equal(row, rows[0]) for row in rows)
    norms = ("0.bn2.weight", "0.bn2.bias", "0.downsample.1.weight", "1.bn2.bias")
    assert all(torch.equal(after.mask[f"layer2.{name}"], rows[0]) for name in norms)
    assert int(rows[0].sum()) == 4
    seen: list[Tensor] = []
    block: Any = after.network.get_submodule("layer2.1.conv1")
    handle = block.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    after.network.eval()(after.task.records.inputs)
    handle.remove()
    assert (seen[0][:, ~rows[0]] == 0).all()
    assert (seen[0][:, rows[0]] != 0).flatten(2).any(2).any(0).all()


def test_masks_and_filters_are_each_others_reverse(residual: efface.TrainedModel) -> None:
    groups = filter_groups(residual.task, residual.network).prunable
    keep = halves(groups, 4)
    mask = mask_of(groups, keep, residual.network)
    assert all(torch.equal(kept_filters(mask, groups)[n], k) for n, k in keep.items())
    some = mask_of(groups, {groups[0].name: keep[groups[0].name]}, residual.network)
    assert some[groups[1].name].all()
    name = groups[0].name
    entries = {n: k.clone() for n, k in mask.items()}
    gone = (~keep[name]).nonzero().flatten()
    entries[name][gone[0], 0, 0, 0] = True  # one weight of a dropped filter
    del entries["bn1.bias"]  # nothing is known of it: it is kept
    loose = Mask(entries)
    assert not is_structured(loose)
    assert kept_filters(loose, groups)[name].all()
    with pytest.raises(MismatchError, match=r"'fc.weight' are no filter groups"):
        mask_of(groups, {"fc.weight": torch.ones(3, dtype=torch.bool)}, residual.network)
    with pytest.raises(MismatchError, match="or of another size"):
        mask_of(groups, {name: torch.ones(3, dtype=torch.bool)}, residual.network)


def test_filters_at_zero_are_found(digits: efface.TrainedModel) -> None:
    model = digits.copy()
    groups = filter_groups(model.task, model.network).prunable
    assert not any(bool(zero.any()) for zero in zero_filters(groups, model.network).values())
    conv: Any = model.network.get_submodule("conv2")
    conv.weight.data[[2, 5]] = 0.0
    found = zero_filters(groups, model.network)
    assert found["conv2.weight"].nonzero().flatten().tolist() == [2, 5]
    assert not found["conv1.weight"].any()


def test_bad_scores_are_refused(digits: efface.TrainedModel) -> None:
    groups = filter_groups(digits.task, digits.network).prunable
    scores = {g.name: torch.rand(g.size) for g in groups}
    net = digits.network
    for wrong in (-0.1, 1.0):
        with pytest.raises(MethodError, match=r"sparsity must lie in \[0, 1\)"):
            select_filters(scores, wrong, groups, net)
    with pytest.raises(MismatchError, match=r"no scores for 'conv3.weight'"):
        select_filters({k: v for k, v in scores.items() if "3" not in k}, 0.5, groups, net)
    broken = scores | {"conv1.weight": torch.full((16,), torch.nan)}
    with pytest.raises(MismatchError, match="hold NaN"):
        select_filters(broken, 0.5, groups, net)
    with pytest.raises(MismatchError, match="no filters to prune"):
        select_filters(scores, 0.5, [], net)
    with pytest.raises(MethodError, match="take select_filters"):
        select({"w": torch.rand(3, 3)}, 0.5, ["w"], "filter")


# --- every pruner ---------------------------------------------------------------------------------

PRUNERS: dict[str, Any] = {
    "one-shot": OneShot(0.5, granularity="filter", recovery=1),
    "omp": OMP(0.5, granularity="filter"),
    "imp": IMP(0.5, rate=0.3, granularity="filter"),
    "gradual": Gradual(0.5, granularity="filter", epochs=3),
    "sfp": SFP(0.5, epochs=2, recovery=1),
}


@pytest.fixture(scope="module")
def models(
    digits: efface.TrainedModel, residual: efface.TrainedModel
) -> dict[str, efface.TrainedModel]:
    resnet20 = task_of(lambda: ResNet20(3, channels=1), (1, 8, 8), 24)
    return {
        "digits": digits,
        "residual": residual,
        "resnet20": efface.train(resnet20, seed=0, rewind=1),
    }


def params(model: efface.TrainedModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.network.named_parameters()}


def check_filters(model: efface.TrainedModel, sparsity: float) -> None:
    """Exactly so many whole filters of every group are gone, and at zero."""
    groups = filter_groups(model.task, model.network).prunable
    assert model.mask is not None
    assert is_structured(model.mask)
    for group, kept in zip(groups, kept_filters(model.mask, groups).values(), strict=True):
        assert int((~kept).sum()) == round(sparsity * group.size)
        for name, rows in group.members:
            assert not params(model)[name][rows[~kept]].any()
            there = params(model)[name][rows[kept]].reshape(int(kept.sum()), -1)
            assert there.any(1).all() or "bias" in name


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("network", ["digits", "residual", "resnet20"])
def test_every_pruner_prunes_filters(
    models: dict[str, efface.TrainedModel], network: str, name: str
) -> None:
    before = models[network]
    digest = before.digest
    after = efface.prune(before, PRUNERS[name], seed=1)
    check_filters(after, 0.5)
    assert before.digest == digest
    if network == "digits":
        assert efface.prune(before, PRUNERS[name], seed=1).digest == after.digest
    split = efface.Split.random(after.task, 0.2, seed=0)
    forgot = efface.forget(after, split, "finetune", seed=2)
    assert forgot.mask == after.mask
    check_filters(forgot, 0.5)


@pytest.mark.parametrize("name", [*PRUNERS, "rewound sfp"])
def test_references_are_pruned_as_the_model_was(digits: efface.TrainedModel, name: str) -> None:
    pruner = PRUNERS.get(name, SFP(0.25, "geometric-median", to="rewind", capped=False))
    model = efface.prune(digits, pruner)
    split = efface.Split.by_class(digits.task, 1)
    reference = efface.retrain(digits.task, split, model=model, like="repruned", seed=3)
    check_filters(reference, pruner.sparsity)
    assert reference.lineage[-1].method == model.lineage[-1].method
    assert reference.mask != model.mask
    again = efface.retrain(digits.task, split, model=model, like="repruned", seed=3)
    assert again.digest == reference.digest


@pytest.mark.parametrize("criterion", [*CRITERIA, *FILTER_CRITERIA])
def test_every_criterion_prunes_filters(digits: efface.TrainedModel, criterion: str) -> None:
    pruner = OneShot(0.25, criterion, "filter", recovery=0)
    after = efface.prune(digits, pruner)
    check_filters(after, 0.25)
    if criterion == "magnitude":
        assert after.mask == efface.prune(digits, OneShot(0.25, "l2", "filter", recovery=0)).mask


def test_scopes_choose_groups_by_their_first_layer() -> None:
    net = USABLE["gates"][0]
    task = user_task(net)
    model = efface.train(task)
    after = efface.prune(model, OneShot(0.5, granularity="filter", scope="conv", recovery=0))
    assert after.mask is not None
    assert "e2.weight" in after.mask  # it is one group with a convolution
    assert "e1.weight" not in after.mask
    every = efface.prune(model, OneShot(0.5, granularity="filter", scope="all", recovery=0))
    assert every.mask is not None
    assert "e1.weight" in every.mask
    mlp = efface.train(task_of(*NETWORKS["mlp"]))
    with pytest.raises(MethodError, match="no filters can be pruned in scope=conv"):
        efface.prune(mlp, OneShot(0.5, granularity="filter", scope="conv"))


def test_one_filter_always_stays(residual: efface.TrainedModel) -> None:
    after = efface.prune(residual, OneShot(0.999, granularity="filter", recovery=0))
    assert after.mask is not None
    groups = filter_groups(after.task, after.network).prunable
    assert {int(k.sum()) for k in kept_filters(after.mask, groups).values()} == {1}


def test_options_that_do_not_fit() -> None:
    with pytest.raises(MethodError, match="at-init prunes single weights only; for whole filters"):
        AtInit(0.5, granularity="filter")
    with pytest.raises(MethodError, match="one-shot: criterion 'l2' scores whole filters; take"):
        OneShot(0.5, "l2")
    with pytest.raises(MethodError, match="criterion 'l2' scores whole filters"):
        AtInit(0.5, "l2")
    with pytest.raises(MethodError, match="did you mean 'geometric-median'"):
        OMP(0.5, "geometric-mean", "filter")
    with pytest.raises(MethodError, match="layer, filter or a pattern"):
        OneShot(0.5, granularity="filters")
    with pytest.raises(MethodError, match="sfp: criterion must be one of l1, l2, geometric-median"):
        SFP(0.5, "taylor")
    with pytest.raises(MethodError, match="sparsity must lie in"):
        SFP(1.0)
    with pytest.raises(MethodError, match="recovery must be 0 epochs or more"):
        SFP(0.5, recovery=-1)
    with pytest.raises(MethodError, match="to must be one of rewind, initial, none"):
        build_pruner("sfp", {"to": "start"})
    assert build_pruner("sfp", {"sparsity": "0.4", "capped": "false"}) == SFP(0.4, capped=False)


# --- from a pruned model --------------------------------------------------------------------------


def test_filters_that_are_gone_go_first(digits: efface.TrainedModel) -> None:
    half = efface.prune(digits, OneShot(0.25, "random", "filter", recovery=0), seed=5)
    more = efface.prune(half, OneShot(0.5, granularity="filter", recovery=0))
    check_filters(more, 0.5)
    assert half.mask is not None
    assert more.mask is not None
    assert all(bool((half.mask[n] | ~more.mask[n]).all()) for n in more.mask)
    for pruner in (Gradual(0.1, granularity="filter"), IMP(0.1, granularity="filter"), SFP(0.1)):
        with pytest.raises(MethodError, match=r"is pruned to 0\.25 already, beyond 0\.1"):
            efface.prune(half, pruner)
    again = efface.prune(half, SFP(0.5, epochs=1))
    check_filters(again, 0.5)
    assert again.mask is not None
    assert all(bool((half.mask[n] | ~again.mask[n]).all()) for n in again.mask)


def test_single_weights_that_are_gone_stay_away(digits: efface.TrainedModel) -> None:
    loose = efface.prune(digits, OneShot(0.6, scope="all", recovery=0))
    after = efface.prune(loose, OneShot(0.25, granularity="filter", recovery=1))
    assert loose.mask is not None
    assert after.mask is not None
    groups = filter_groups(after.task, after.network).prunable
    for group, kept in zip(groups, kept_filters(after.mask, groups).values(), strict=True):
        assert int((~kept).sum()) == round(0.25 * group.size)
    assert all(bool((loose.mask[n] | ~after.mask[n]).all()) for n in loose.mask)
    assert torch.equal(after.mask["classifier.weight"], loose.mask["classifier.weight"])


def test_dropped_filters_stay_dead_when_weights_are_pruned_on(
    digits: efface.TrainedModel,
) -> None:
    filters = efface.prune(digits, OneShot(0.25, granularity="filter", recovery=0))
    after = efface.prune(filters, OneShot(0.6, recovery=1))
    assert filters.mask is not None
    assert after.mask is not None
    assert set(after.mask) == set(filters.mask)
    assert all(bool((filters.mask[n] | ~after.mask[n]).all()) for n in after.mask)
    assert not is_structured(after.mask)


# --- soft filter pruning --------------------------------------------------------------------------


def train_softly(
    model: efface.TrainedModel, seed: int, pruner: SFP
) -> tuple[efface.TrainedModel, list[dict[str, list[int]]]]:
    """He et al.'s procedure, epoch by epoch and filter by filter, and what it set to zero."""
    model = model.copy()
    groups = filter_groups(model.task, model.network).prunable
    gone: list[dict[str, list[int]]] = []

    def zero(network: nn.Module, clock: Any, history: Any) -> None:
        weights = dict(network.named_parameters())
        chosen = {}
        for group in groups:
            norms = twin_scores(pruner.criterion, network, group)
            is_zero = [not any(filter_of(network, group, c)) for c in range(group.size)]
            order = sorted(range(group.size), key=lambda c: (not is_zero[c], norms[c], -c))
            chosen[group.name] = order[: round(pruner.sparsity * group.size)]
            names = [n for n, _ in group.members if weights[n].ndim >= 2]
            if clock.epoch + 1 == clock.epochs:
                names = [n for n, _ in group.members]
            for name, c in itertools.product(names, chosen[group.name]):
                weights[name].data[c] = 0.0
        gone.append(chosen)

    fit = Fit(model.task, seed, subject=model, path="prune").at("soft").with_(hook=zero)
    settings = dataclasses.replace(model.task.fit, epochs=pruner.epochs)
    everyone = efface.data.Stream(torch.arange(len(model.task.records)))
    fit(model.network, fit.descend, {"retain": everyone}, settings)
    return model, gone


@pytest.mark.parametrize("criterion", ["l2", "l1", "geometric-median"])
def test_sfp_is_the_procedure_of_the_paper(residual: efface.TrainedModel, criterion: str) -> None:
    pruner = SFP(0.5, criterion, epochs=4, capped=False)
    after = efface.prune(residual, pruner, seed=2)
    twin, gone = train_softly(residual, 2, pruner)
    check_filters(after, 0.5)
    for name, p in params(after).items():
        torch.testing.assert_close(p, params(twin)[name], rtol=1e-5, atol=1e-6)
    assert after.mask is not None
    groups = filter_groups(after.task, after.network).prunable
    kept = kept_filters(after.mask, groups)
    for group in groups:
        dropped = (~kept[group.name]).nonzero().flatten().tolist()
        assert dropped == sorted(gone[-1][group.name])
    assert any(gone[i] != gone[i + 1] for i in range(3))  # some came back


def test_filters_come_back(digits: efface.TrainedModel) -> None:
    """What was zero after an epoch has weights again one step later, and a mask only at the end."""
    zeros, masks = list[int](), list[bool]()
    model = digits.copy()
    groups = filter_groups(model.task, model.network).prunable

    def progress(label: str, step: int, steps: int) -> None:
        found = zero_filters(groups, model.network).values()
        zeros.append(sum(int(zero.sum()) for zero in found))
        masks.append(model.mask is not None)

    fit = Fit(model.task, 0, subject=model, path="prune", progress=progress)
    SFP(0.5, epochs=3)(model, torch.arange(48), fit)
    assert zeros == [0] * 3 + zeros[3:6] + zeros[6:]
    assert max(zeros[3:]) < 32 // 2
    assert masks == [False] * 9
    check_filters(model, 0.5)


def test_scales_and_shifts_are_trained_until_the_end(digits: efface.TrainedModel) -> None:
    seen: list[Tensor] = []
    model = digits.copy()

    def watch(network: nn.Module, clock: Any, history: Any) -> None:
        seen.append(params(model)["norm2.bias"].clone())

    fit = Fit(model.task, 0, subject=model, path="prune").with_(hook=watch)
    SFP(0.5, epochs=2)(model, torch.arange(48), fit)
    assert (seen[0] != 0).all()
    assert int((params(model)["norm2.bias"] == 0).sum()) == 12


def test_statistics_behind_dropped_filters_are_averaged_anew(
    digits: efface.TrainedModel,
) -> None:
    after = efface.prune(digits, SFP(0.5, epochs=2))
    again = after.copy()
    recalibrate_bn(again.network, again.task, torch.arange(48), 16, torch.device("cpu"))
    for name in ("norm2.running_mean", "norm3.running_mean", "norm3.running_var"):
        averages = [m.network.get_buffer(name) for m in (after, again, digits)]
        torch.testing.assert_close(averages[0], averages[1])
        assert not torch.allclose(averages[0], averages[2])
    frozen = dataclasses.replace(digits.task.fit, bn="frozen")
    model = digits.copy()
    model.task = dataclasses.replace(digits.task, fit=frozen)
    kept = efface.prune(model, SFP(0.5, epochs=1)).network.get_buffer("norm3.running_mean")
    assert torch.equal(kept, digits.network.get_buffer("norm3.running_mean"))


def test_sfp_begins_where_it_is_told(digits: efface.TrainedModel) -> None:
    assert SFP().requires == frozenset()
    assert SFP(to="initial").requires == {"initial"}
    starts: dict[str, Tensor] = {}
    for to in ("none", "initial", "rewind"):
        model = digits.copy()

        def progress(label: str, step: int, steps: int, to: str = to) -> None:
            if step == 1:
                starts[f"{to} {steps}"] = params(model)["conv1.weight"].clone()  # noqa: B023

        fit = Fit(model.task, 0, subject=model, path="prune", progress=progress)
        pruner = SFP(0.5, to=to)  # type: ignore[arg-type]
        pruner(model, torch.arange(48), fit)
        check_filters(model, 0.5)
    assert list(starts) == ["none 6", "initial 6", "rewind 3"]  # the rest of the task's two epochs
    assert digits.rewind is not None
    early = digits.rewind["conv1.weight"]
    there = {to.split()[0]: float((w - early).norm()) for to, w in starts.items()}
    assert there["rewind"] < min(there["none"], there["initial"])
    adopted = efface.adopt(digits.task, digits.network.state_dict())
    with pytest.raises(NeedsError):
        efface.prune(adopted, SFP(0.5, to="initial"))
    check_filters(efface.prune(adopted, SFP(0.5, epochs=1)), 0.5)


def test_without_an_epoch_sfp_prunes_at_once(digits: efface.TrainedModel) -> None:
    after = efface.prune(digits, SFP(0.5, epochs=0))
    assert after.mask == efface.prune(digits, OneShot(0.5, "l2", "filter", recovery=0)).mask
    assert after.lineage[-1].cost["images"] == 0
    assert efface.prune(digits, SFP(0.5, epochs=1, recovery=2)).lineage[-1].cost["images"] == 144


def test_gradients_of_what_is_about_to_go_are_capped(residual: efface.TrainedModel) -> None:
    """Against loops: no larger than the largest of those that are to stay, in their layer."""
    from efface.sparsify.filters import Choice
    from efface.sparsify.sfp import _Cap

    model = residual.copy()
    choice = Choice.of(SFP(0.5), model, Fit(model.task))
    draw = torch.Generator().manual_seed(0)
    weights = dict(model.network.named_parameters())
    for group in choice.groups or ():
        for name, _ in group.weights:
            weights[name].data[: group.size // 4] = 0.0
    for p in weights.values():
        p.grad = torch.randn(p.shape, generator=draw) * 10 ** torch.randn(1, generator=draw)
    before = {name: p.grad.clone() for name, p in weights.items() if p.grad is not None}
    for name in before:
        if weights[name].ndim >= 2:
            weights[name].grad[0] *= 300  # type: ignore[index]
            before[name][0] *= 300
    _Cap(choice).begin(weights)
    capped = 0
    layers = {name for g in choice.groups or () for name, _ in g.weights}
    for name, gradient in before.items():
        now: Any = weights[name].grad
        if name not in layers:
            assert torch.equal(now, gradient)
            continue
        size = len(gradient)
        norms = [float(weights[name][c].detach().norm()) for c in range(size)]
        stay = sorted(range(size), key=lambda c: -norms[c])[: size - round(size / 2)]
        most = max(float(gradient[c].norm()) for c in stay)
        for c in range(size):
            length = float(gradient[c].norm())
            factor = 1.0 if c in stay else min(1.0, most / length)
            torch.testing.assert_close(now[c], gradient[c] * factor, rtol=1e-4, atol=0)
            capped += factor < 1
    assert capped >= len(layers)


def test_a_cap_keeps_filters_from_crowding_out_others(digits: efface.TrainedModel) -> None:
    """Behind batch norm a filter at zero has huge gradients: without the cap its norm shoots up."""
    largest = {}
    for capped in (True, False):
        model = digits.copy()
        groups = filter_groups(model.task, model.network).prunable
        norms: list[float] = []

        def progress(label: str, step: int, steps: int, model: Any = model) -> None:
            values = dict(model.network.named_parameters())
            found = [vectors(group, values).norm(dim=1).max() for group in groups]  # noqa: B023
            norms.append(float(max(found)))  # noqa: B023

        fit = Fit(model.task, 0, subject=model, path="prune", progress=progress)
        SFP(0.5, epochs=3, capped=capped)(model, torch.arange(48), fit)
        largest[capped] = max(norms) / norms[0]
    assert largest[True] < 1.5
    assert largest[False] > 3


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("kill", [2, 4, 11, 14])
@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_sfp_goes_on_after_a_kill(
    digits: efface.TrainedModel, tmp_path: Path, kill: int, seconds: float
) -> None:
    pruner = SFP(0.5, "geometric-median", epochs=4, recovery=1)
    steps = 0

    def progress(label: str, step: int, of: int) -> None:
        nonlocal steps
        steps += 1
        if steps == kill:
            raise KilledError

    whole = efface.prune(digits, pruner, seed=1)
    journal = Journal(tmp_path / "j", {}, seconds)
    with pytest.raises(KilledError):
        efface.prune(digits, pruner, seed=1, journal=journal, progress=progress)
    again = efface.prune(digits, pruner, seed=1, journal=Journal(tmp_path / "j", {}, seconds))
    assert again.digest == whole.digest
    assert again.mask == whole.mask


# --- around it ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", sorted({m["name"] for m in catalogue()} - {"masked", "prune-first"})
)
@pytest.mark.filterwarnings(
    "ignore:(every block of|the blocks tell|the .* blocks that were|no block was):UserWarning"
)
def test_filters_stay_dead_under_every_method(
    residual_half: efface.TrainedModel, name: str
) -> None:
    """What a mask drops is zero; methods that move the mask move whole filters."""
    split = efface.Split.by_class(residual_half.task, 1)
    try:
        after = efface.forget(residual_half, split, build(name), seed=1)
    except NeedsError:
        pytest.skip("needs what this model lacks")
    assert after.mask is not None
    if name in PRUNING:  # further filters: those that are dead stay so
        for part, keep in residual_half.mask.items():  # type: ignore[union-attr]
            assert not (after.mask[part] & ~keep).any()
            assert not after.network.get_parameter(part)[~after.mask[part]].any()
    else:
        check_filters(after, 0.5)


PRUNING = {"class-pruning", "dfmu"}


@pytest.fixture(scope="module")
def residual_half(residual: efface.TrainedModel) -> efface.TrainedModel:
    return efface.prune(residual, PRUNERS["sfp"])


def test_prune_first_takes_soft_pruning(digits: efface.TrainedModel) -> None:
    split = efface.Split.by_class(digits.task, 2)
    method = PruneFirst(SFP(0.25, epochs=1), FineTune(epochs=1))
    after = efface.forget(digits, split, method)
    check_filters(after, 0.25)
    nested = {"pruner": {"method": "sfp", "sparsity": "0.25", "epochs": 1}}
    assert build("prune-first", {**nested, "inner": {"method": "ft", "epochs": 1}}) == method


def test_a_mask_counts_filters() -> None:
    rows = torch.tensor([[True, False], [False, False], [True, True]])
    layers = Mask({"w": rows, "b": torch.tensor([True, False])}).layers()
    assert [(x["filters"], x["filters_kept"]) for x in layers] == [(3, 2), (None, None)]


def test_show_prints_filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with workplace(tmp_path, monkeypatch) as folder:
        write_task(folder)
        done("train", "mine:task", "--out", "m.st")
        words = "prune mine:task --model m.st --method sfp --sparsity 0.5 --set epochs=1 --out p.st"
        done(words)
        facts = done("show", "p.st", "--json").json
        counts = {x["name"]: (x["filters_kept"], x["filters"]) for x in facts["layers"]}
        assert counts
        weights = [n for n, (kept, of) in counts.items() if of is not None and 2 * kept == of]
        assert weights
        text = done("show", "p.st").out
        kept, of = counts[weights[0]]
        assert "filters" in text
        assert f"{kept} of {of}" in text


def test_a_filter_mask_survives_the_file(residual: efface.TrainedModel, tmp_path: Path) -> None:
    model = efface.prune(residual, PRUNERS["one-shot"])
    again = efface.load(model.save(tmp_path / "m.safetensors"), residual.task)
    assert again.mask == model.mask
    assert again.digest == model.digest
    check_filters(again, 0.5)
