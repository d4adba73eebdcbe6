"""Criteria against loops written from their definitions, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import efface
from efface.data import Batch
from efface.errors import MethodError
from efface.sparsify import CRITERIA, Grasp, Random, Snip, SynFlow, Taylor
from efface.steps import batch_norms


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def conv() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)
    )
    norm = batch_norms(net)[0]
    norm.running_mean = torch.tensor([0.2, -0.3])
    norm.running_var = torch.tensor([0.7, 1.4])
    nn.init.normal_(norm.weight, 1.0, 0.2)
    return net


SHAPES: dict[Callable[[], nn.Module], tuple[int, ...]] = {mlp: (3,), conv: (1, 4, 4)}
NETS = pytest.mark.parametrize("make", SHAPES, ids=lambda make: make.__name__)


def setting(make: Callable[[], nn.Module]) -> tuple[nn.Module, list[Batch]]:
    """A network in float64 and three batches of unequal size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = make().double()
        x = torch.randn(11, *SHAPES[make], dtype=torch.float64)
        y = torch.randint(0, 3, (11,))
    parts = torch.arange(11).split([4, 5, 2])
    return network, [Batch(x[p], y[p], p) for p in parts]


def weights(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.ndim >= 2}


def slow_gradient(network: nn.Module, batch: Batch, by: float = 1.0) -> dict[str, Tensor]:
    """The gradient by central differences of the loss, entry by entry."""
    network = copy.deepcopy(network).eval()
    found = {}
    with torch.no_grad():
        for name, p in weights(network).items():
            g = torch.zeros_like(p)
            for i in range(p.numel()):
                flat, step = p.view(-1), 1e-5
                old = float(flat[i])
                values = []
                for moved in (old + step, old - step):
                    flat[i] = moved
                    loss = F.cross_entropy(network(batch.inputs) / by, batch.targets)
                    values.append(float(loss))
                flat[i] = old
                g.view(-1)[i] = (values[0] - values[1]) / (2 * step)
            found[name] = g
    return found


def summed(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-6) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        scale = float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=rtol * scale)


@NETS
def test_snip_sums_the_gradient_first(make: Callable[[], nn.Module]) -> None:
    network, data = setting(make)
    g = summed([slow_gradient(network, batch) for batch in data])
    close(
        Snip()(network, data), {n: (p.detach() * g[n]).abs() for n, p in weights(network).items()}
    )


@NETS
def test_taylor_squares_each_batch(make: Callable[[], nn.Module]) -> None:
    network, data = setting(make)
    parts = [slow_gradient(network, batch) for batch in data]
    products = [{n: (p.detach() * g[n]) ** 2 for n, p in weights(network).items()} for g in parts]
    close(Taylor()(network, data), summed(products))


@NETS
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_grasp_is_weight_times_hessian_times_gradient(
    make: Callable[[], nn.Module], temperature: float
) -> None:
    """The Hessian column by column, from the definition; the product is not differentiated."""
    network, data = setting(make)
    params = weights(network)
    names, sizes = list(params), [p.numel() for p in params.values()]
    twin = copy.deepcopy(network).eval()

    def loss(flat: Tensor) -> Tensor:
        parts = dict(zip(names, flat.split(sizes), strict=True))
        state = {n: parts[n].view(params[n].shape) for n in names}
        values = [
            F.cross_entropy(
                torch.func.functional_call(twin, state, (b.inputs,)) / temperature, b.targets
            )
            for b in data
        ]
        return torch.stack(values).sum()

    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])
    hessian: Any = torch.autograd.functional.hessian(loss, flat)  # type: ignore[no-untyped-call]
    g = torch.cat(
        [
            t.reshape(-1)
            for t in summed([slow_gradient(network, b, temperature) for b in data]).values()
        ]
    )
    scores = torch.zeros_like(flat)
    for i in range(len(flat)):
        scores[i] = flat[i] * sum(hessian[i, j] * g[j] for j in range(len(flat)))
    wanted = dict(zip(names, scores.split(sizes), strict=True))
    close(
        Grasp(temperature=temperature)(network, data),
        {n: wanted[n].view(params[n].shape) for n in names},
        rtol=1e-5,
    )


def test_grasp_keeps_what_the_gradient_needs() -> None:
    """Removing a weight changes |g|² as 2·S(−θ) says, and what has the highest S goes first."""
    network, data = setting(mlp)
    scores = Grasp(temperature=1.0)(network, data)

    def norm(net: nn.Module) -> float:
        g = summed([slow_gradient(net, batch) for batch in data])
        return sum(float((t**2).sum()) for t in g.values())

    step, name = 1e-3, "0.weight"
    for place in [(0, 0), (3, 2), (1, 1)]:
        moved = copy.deepcopy(network)
        with torch.no_grad():
            weights(moved)[name][place] *= 1 - step  # a little way towards its removal
        change = (norm(moved) - norm(network)) / step
        assert change == pytest.approx(2 * float(-scores[name][place]), rel=2e-2)


def slow_flow(network: nn.Module, ones: Tensor) -> float:
    """R of the network with the absolute value of its whole state."""
    twin = copy.deepcopy(network).eval()
    twin.load_state_dict({n: t.abs() for n, t in twin.state_dict().items()})
    with torch.no_grad():
        return float(twin(ones).sum())


@NETS
def test_synflow_is_weight_times_change_of_flow(make: Callable[[], nn.Module]) -> None:
    network, data = setting(make)
    ones = torch.ones(1, *SHAPES[make], dtype=torch.float64)
    wanted = {}
    for name, p in weights(network).items():
        score = torch.zeros_like(p).detach()
        for i in range(p.numel()):
            values = []
            for step in (1e-4, -1e-4):
                moved = copy.deepcopy(network)
                flat = weights(moved)[name].detach().view(-1)
                flat[i] += step * flat[i].sign()
                values.append(slow_flow(moved, ones))
            score.view(-1)[i] = abs(float(p.detach().view(-1)[i])) * (values[0] - values[1]) / 2e-4
        wanted[name] = score
    close(SynFlow()(network, data), wanted, rtol=1e-6)


def test_synflow_of_a_network_beyond_float32() -> None:
    deep = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(40)])
    for layer in deep:
        nn.init.constant_(layer.weight, 1.0)  # each layer multiplies the flow by 64
    data = [Batch(torch.zeros(2, 64), torch.tensor([0, 1]), torch.arange(2))]
    assert not torch.isfinite(deep(torch.ones(1, 64))).all()
    scores = SynFlow()(deep, data)
    exact = 64.0**40 * 64 / 64**2  # every weight of a layer carries the same share of R
    assert all(torch.equal(s, torch.full_like(s, exact)) for s in scores.values())
    assert next(iter(scores.values())).dtype == torch.float64


def test_synflow_beyond_float64_is_refused() -> None:
    deep = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(12)])
    for layer in deep:
        nn.init.constant_(layer.weight, 1e30)
    data = [Batch(torch.zeros(2, 8), torch.tensor([0, 1]), torch.arange(2))]
    with pytest.raises(MethodError, match="float64"):
        SynFlow()(deep, data)


def test_synflow_looks_at_no_value_of_the_data(conv_trained: efface.TrainedModel) -> None:
    x = torch.randn(4, 1, 8, 8)
    labels = torch.arange(4) % 3
    one = SynFlow()(conv_trained.network, [Batch(x, labels, labels)])
    two = SynFlow()(conv_trained.network, [Batch(x * 9 - 1, labels * 0, labels)])
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_synflow_goes_through_the_task_s_adapter(conv_trained: efface.TrainedModel) -> None:
    network = conv_trained.network
    x, y = torch.randn(4, 8, 8), torch.arange(4) % 3

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(net(batch.inputs[:, None]).float(), batch.targets)

    plain = SynFlow()(network, [Batch(x[:, None], y, y)])
    through = SynFlow()(network, [Batch(x, y, y)], loss)
    assert all(torch.equal(plain[name], through[name]) for name in plain)


def test_random_scores_depend_on_seed_and_name_alone() -> None:
    big, small = mlp(), nn.Sequential(mlp()[0])
    one, two = Random(4)(big, ()), Random(4)(small, ())
    assert torch.equal(one["0.weight"], two["0.weight"])
    assert not torch.equal(one["0.weight"], Random(5)(big, ())["0.weight"])
    assert float(one["2.weight"].min()) >= 0
    assert float(one["2.weight"].max()) < 1


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_found(name: str, training: bool) -> None:
    network, data = setting(conv)
    network.train(training)
    weights(network)["0.weight"].requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    scores: dict[str, Tensor] = CRITERIA[name]()(network, data)
    assert {n: s.shape for n, s in scores.items()} == {
        n: p.shape for n, p in weights(network).items()
    }
    assert all(torch.isfinite(s).all() and not s.requires_grad for s in scores.values())
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())
    assert network.training is training
    assert [p.requires_grad for p in network.parameters()].count(False) == 1
    assert all(p.grad is None for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    again: dict[str, Tensor] = CRITERIA[name]()(network, iter(data))
    assert all(torch.equal(scores[n], again[n]) for n in scores)


@pytest.mark.parametrize("name", CRITERIA)
def test_what_needs_data_says_so(name: str) -> None:
    network, _ = setting(mlp)
    criterion: Any = CRITERIA[name]()
    if criterion.needs_data:
        with pytest.raises(MethodError, match=f"{name!r} needs data"):
            criterion(network, ())
    else:
        assert set(criterion(network, ())) == set(weights(network))


@pytest.mark.parametrize("criterion", [Snip, Taylor, Grasp])
def test_batch_statistics_are_those_of_training_mode(criterion: Any) -> None:
    network, data = setting(conv)
    twin = copy.deepcopy(network)
    norm = batch_norms(twin)[0]
    del norm.running_mean, norm.running_var  # then batch norm knows the batch alone
    norm.register_buffer("running_mean", None)
    norm.register_buffer("running_var", None)
    own = criterion(batch_stats=True)(network, data)
    close(own, criterion()(twin, data), rtol=1e-12)
    assert any(not torch.allclose(own[n], t) for n, t in criterion()(network, data).items())


class Flagged(nn.Module):
    """A network with a buffer of truth values, such as an attention mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.register_buffer("flag", torch.tensor([True, False, True]))

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = torch.where(self.get_buffer("flag"), self.inner(inputs), 0.0)
        return out


class Casting(nn.Sequential):
    """A network that insists on its own type."""

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = super().forward(inputs.float())
        return out


class Attending(nn.Module):
    """A network with fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        x = inputs.reshape(-1, 1, 4).expand(-1, 3, 4)
        seen, _ = self.attention(x, x, x, need_weights=False)
        out: Tensor = self.out(seen.mean(1))
        return out


def four(n: int = 6) -> list[Batch]:
    draw = torch.Generator().manual_seed(0)
    return [Batch(torch.randn(n, 4, generator=draw), torch.arange(n) % 3, torch.arange(n))]


def test_synflow_takes_buffers_without_a_sign() -> None:
    scores = SynFlow()(Flagged(), four())
    assert set(scores) == {"inner.weight"}


def test_synflow_says_why_a_network_cannot_be_scored() -> None:
    with pytest.raises(MethodError, match="float64"):
        SynFlow()(Casting(nn.Linear(4, 3)), four())


def test_grasp_scores_fused_attention() -> None:
    scores = Grasp()(Attending(), four())
    assert all(bool(torch.isfinite(s).all()) for s in scores.values())
    assert any(bool((s != 0).any()) for s in scores.values())
