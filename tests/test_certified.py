"""CU against literal twins, dense Hessians and loops in float64; its bound, noise, sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor, nn
from torch.nn import functional as F

import efface
from efface.cli import main
from efface.curvature import Krylov, LossCurvature, evaluating, lanczos, lissa
from efface.errors import DivergedError, MethodError
from efface.fitting import Fit
from efface.mask import Mask
from efface.unlearn import Certified, Chain, FineTune, build
from efface.unlearn import certified as certified_module
from efface.unlearn.certified import Bound, Step, estimated_bound, settle, spread

NewTask = Callable[..., efface.Task]
EXACT = {"iterations": 400, "records": 1000}
DECAY = 1e-2


def linear_net() -> nn.Module:
    return nn.Linear(6, 3).double()


def curved_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture
def double_task(new_task: NewTask) -> Callable[..., efface.Task]:
    def make(network: Callable[[], nn.Module], **changes: Any) -> efface.Task:
        base = new_task()
        x, y = base.train
        fit = replace(base.fit, weight_decay=DECAY)
        more = {"train": (x.double(), y), "network": network, "fit": fit}
        return new_task(**more | changes)

    return make


def dense(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).double() for p in network.parameters()])


def loss_of(network: nn.Module, x: Tensor, y: Tensor, decay: float, loss: Any = F.cross_entropy):
    """The regularised loss as a function of a flat vector."""
    shapes = {n: p.shape for n, p in network.named_parameters()}

    def value(w: Tensor) -> Tensor:
        parts, at = {}, 0
        for name, shape in shapes.items():
            parts[name] = w[at : at + shape.numel()].reshape(shape)
            at += shape.numel()
        z = torch.func.functional_call(network, parts, (x,))
        return loss(z, y) + decay / 2 * (w * w).sum()

    return value


def derivatives(network: nn.Module, task: efface.Task, positions: Tensor, **options: Any):
    """Gradient and Hessian, dense."""
    x, y = task.train
    value = loss_of(network, x[positions], y[positions], task.fit.weight_decay, **options)
    w = dense(network).requires_grad_()
    (gradient,) = torch.autograd.grad(value(w), w)
    hessian = torch.autograd.functional.hessian(value, w.detach())
    return gradient.numpy(), hessian.numpy()


def gauss_newton(network: nn.Module, task: efface.Task, positions: Tensor) -> Any:
    """Mean of JᵀAJ over records, one after another, A = diag(p) − ppᵀ."""
    x, _ = task.train
    params = list(network.parameters())
    total = np.zeros((sum(p.numel() for p in params),) * 2)
    for i in positions.tolist():
        z = network(x[i : i + 1])[0]
        rows = [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(out, params, retain_graph=True)])
            for out in z
        ]
        j, p = torch.stack(rows).numpy(), z.detach().softmax(0).numpy()
        total += j.T @ (np.diag(p) - np.outer(p, p)) @ j
    return total / len(positions) + task.fit.weight_decay * np.eye(len(total))


def run(method: Any, model: efface.TrainedModel, split: efface.Split, seed: int = 7):
    """Weights afterwards, and what was recorded."""
    after = efface.forget(model, split, method, seed=seed)
    return dense(after.network), after.lineage[-1].detail


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "damping"), [(linear_net, 0.0), (linear_net, 0.3), (curved_net, 0.5)]
)
def test_step_is_the_dense_solve(double_task: Any, network: Any, damping: float) -> None:
    task = double_task(network)
    model = efface.train(task)
    split = efface.Split.by_class(task, 1)
    g, h = derivatives(model.network, task, split.retain)
    wanted = dense(model.network).numpy() - np.linalg.solve(h + damping * np.eye(len(h)), g)
    found, detail = run(Certified("cg", damping=damping, **EXACT), model, split)
    assert np.abs(found.numpy() - wanted).max() < 1e-6 * np.abs(wanted).max()
    facts = detail["certified"]
    assert facts["residual"] < 1e-9
    assert facts["damping"] == damping
    assert not facts["damping_raised"]
    values = np.linalg.eigvalsh(h)
    assert values[0] - 1e-9 <= facts["smallest_curvature"]  # seen from within
    assert damping or facts["smallest_curvature"] == pytest.approx(values[0], rel=1e-3)
    assert facts["largest_curvature"] == pytest.approx(values[-1], rel=1e-6)


def test_gauss_newton_is_the_dense_solve(double_task: Any) -> None:
    task = double_task(curved_net)
    model = efface.train(task)
    split = efface.Split.by_class(task, 1)
    g, _ = derivatives(model.network, task, split.retain)
    matrix = gauss_newton(model.network, task, split.retain)
    wanted = dense(model.network).numpy() - np.linalg.solve(matrix + 0.1 * np.eye(len(g)), g)
    found, _ = run(Certified("gauss-newton", damping=0.1, **EXACT), model, split)
    assert np.abs(found.numpy() - wanted).max() < 1e-6 * np.abs(wanted).max()


def ridge(x: Tensor, y: Tensor, decay: float) -> Tensor:
    """Where the mean of (⟨w, x⟩ + b − y)² + decay/2 ‖(w, b)‖² is least."""
    rows = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    left = 2 * rows.T @ rows / len(x) + decay * torch.eye(rows.shape[1]).double()
    return torch.linalg.solve(left, 2 * rows.T @ y.double() / len(x))


def squared(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits[:, 0] - targets.to(logits.dtype)).square().mean()


@pytest.mark.parametrize("solver", ["cg", "gauss-newton"])
def test_a_quadratic_loss_is_retrained_exactly(double_task: Any, solver: Any) -> None:
    task = double_task(lambda: nn.Linear(6, 1).double(), loss=squared)
    x, y = task.train
    model = efface.train(task)
    with torch.no_grad():
        optimum = ridge(x, y, DECAY)
        model.network.weight.copy_(optimum[None, :6])
        model.network.bias.copy_(optimum[6:])
    split = efface.Split.by_class(task, 1)
    wanted = ridge(x[split.retain], y[split.retain], DECAY)
    assert float((dense(model.network) - wanted).norm()) > 0.05
    found, detail = run(Certified(solver, damping=0.0, **EXACT), model, split)
    assert torch.allclose(found, wanted, atol=1e-10)
    assert "none" in detail["assumptions"][0]
    if solver == "cg":  # and the bound knows: no curvature changes, nothing is left over
        _, detail = run(Certified(damping=0.0, epsilon=1.0, **EXACT), model, split)
        assert detail["certified"]["solver"] == "cg"
        assert detail["certified"]["bound"] < 1e-8
        assert detail["certified"]["lipschitz"] < 1e-8


def test_pruned_weights_are_no_coordinates(double_task: Any) -> None:
    task = double_task(curved_net)
    model = efface.train(task)
    draw = torch.Generator().manual_seed(1)
    keep = {
        n: torch.rand(p.shape, generator=draw) > 0.4
        for n, p in model.network.named_parameters()
        if p.ndim > 1
    }
    model.set_mask(Mask(keep))
    split = efface.Split.by_class(task, 1)
    g, h = derivatives(model.network, task, split.retain)
    kept = dense(model.network).numpy() != 0
    wanted = dense(model.network).numpy()
    wanted[kept] -= np.linalg.solve((h + 5 * np.eye(len(h)))[np.ix_(kept, kept)], g[kept])
    found, detail = run(Certified("cg", damping=5.0, **EXACT), model, split)
    assert not detail["certified"]["damping_raised"]
    assert np.abs(found.numpy() - wanted).max() < 1e-6
    noisy, _ = run(Certified("cg", damping=5.0, sigma=0.1, **EXACT), model, split)
    for weights in (found, noisy):
        gone = weights[torch.from_numpy(~kept)]
        assert (gone == 0).all()
        assert not torch.signbit(gone).any()


def test_negative_curvature_raises_the_damping(double_task: Any) -> None:
    task = double_task(curved_net, fit=efface.Settings(epochs=1, lr=0.01, weight_decay=0.0))
    model = efface.train(task)
    split = efface.Split.by_class(task, 1)
    g, h = derivatives(model.network, task, split.retain)
    low = np.linalg.eigvalsh(h)[0]
    assert low < -1e-3
    found, detail = run(Certified("cg", damping=-low / 2, **EXACT), model, split)
    facts = detail["certified"]
    assert facts["damping_raised"]
    assert facts["damping"] == pytest.approx(-2 * low, rel=0.02)
    damped = h + facts["damping"] * np.eye(len(h))
    wanted = dense(model.network).numpy() - np.linalg.solve(damped, g)
    assert np.abs(found.numpy() - wanted).max() < 1e-6
    # enough of it is left alone
    _, detail = run(Certified("cg", damping=-1.5 * low, **EXACT), model, split)
    assert detail["certified"]["damping"] == pytest.approx(-1.5 * low)
    assert not detail["certified"]["damping_raised"]


def test_the_rule_for_the_damping() -> None:
    assert settle(None, 0.1, 50.0, 0.01) == pytest.approx(0.5)
    assert settle(None, -3.0, 50.0, 0.01) == 6.0
    assert settle(0.0, 0.1, 50.0, 0.01) == 0.0
    assert settle(4.0, -3.0, 50.0, 0.01) == 4.0
    assert settle(3.0, -3.0, 50.0, 0.01) == 6.0
    assert settle(0.0, 0.0, 0.0, 0.01) > 0


@pytest.mark.parametrize("solver", ["cg", "lissa", "gauss-newton"])
def test_damping_is_a_share_of_the_largest_curvature(double_task: Any, solver: Any) -> None:
    task = double_task(linear_net)
    split = efface.Split.by_class(task, 1)
    _, detail = run(Certified(solver, iterations=20), efface.train(task), split)
    facts = detail["certified"]
    share = facts["damping"] / facts["largest_curvature"]
    assert share == pytest.approx(certified_module.RELATIVE[solver])
    assert facts["solver"] == solver


def test_float32_is_close_and_convolutions_work(
    conv_trained: efface.TrainedModel, conv_task: efface.Task
) -> None:
    split = efface.Split.by_class(conv_task, 0)
    single = conv_trained.copy()
    method = Certified("cg", damping=8.0, iterations=60, records=1000)
    found, detail = run(method, single, split)
    assert detail["certified"]["residual"] < 1e-5
    assert not detail["certified"]["damping_raised"]
    x, y = conv_task.train
    wide = replace(conv_task, train=(x.double(), y))
    twin = efface.TrainedModel(wide, single.copy().network.double())
    after = efface.forget(twin, replace(split, task=wide), method, seed=7)
    step = dense(after.network) - dense(single.network)
    assert float((found - dense(after.network)).norm()) < 1e-4 * float(step.norm())
    buffers = dict(single.network.named_buffers())
    kept = efface.forget(single, split, method).network.named_buffers()
    assert all(torch.equal(b, buffers[n]) for n, b in kept)


def test_only_some_records_are_in_the_curvature(double_task: Any) -> None:
    task = double_task(linear_net)
    model = efface.train(task)
    split = efface.Split.by_class(task, 1)
    g, _ = derivatives(model.network, task, split.retain)
    draw = Fit(task, 7, path="forget").generator("records")
    chosen = split.retain[torch.randperm(len(split.retain), generator=draw)[:20].sort().values]
    _, h = derivatives(model.network, task, chosen)
    wanted = dense(model.network).numpy() - np.linalg.solve(h + 0.1 * np.eye(len(h)), g)
    after = efface.forget(
        model, split, Certified("cg", damping=0.1, iterations=50, records=20), seed=7
    )
    assert np.abs(dense(after.network).numpy() - wanted).max() < 1e-8
    # D_r once for the gradient, the chosen ones once for every product
    facts = after.lineage[-1].detail
    assert facts["images"] == {"retain": len(split.retain) + 20 * facts["certified"]["iterations"]}


def test_forgotten_records_are_never_read(new_task: NewTask) -> None:
    task = new_task()
    model = efface.train(task)
    split = efface.Split.by_class(task, 1)
    x, y = task.train
    poisoned = x.clone()
    poisoned[split.forget] = float("nan")
    other = new_task(train=(poisoned, y))
    blind = efface.TrainedModel(other, model.copy().network)
    for solver in ("cg", "gauss-newton", "lissa"):
        method = Certified(solver, iterations=5, sigma=1e-3)
        clean = efface.forget(model, split, method)
        found = efface.forget(blind, replace(split, task=other), method)
        assert found.digest == clean.digest


# --- the solvers ----------------------------------------------------------------------------------


def some_system(n: int, low: float) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=draw).double())
    values = torch.linspace(low, 5.0, n).double()
    return q @ values.diag() @ q.T, torch.randn(n, generator=draw).double()


def conjugate_gradients(a: Tensor, b: Tensor, steps: int) -> Tensor:
    x, r = torch.zeros_like(b), b.clone()
    p = r.clone()
    for _ in range(steps):
        alpha = (r @ r) / (p @ a @ p)
        x = x + alpha * p
        after = r - alpha * (a @ p)
        p = after + (after @ after) / (r @ r) * p
        r = after
    return x


@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize("damping", [0.1, 2.0])
def test_lanczos_is_conjugate_gradients_for_any_damping(steps: int, damping: float) -> None:
    a, b = some_system(12, 0.2)
    found = lanczos(lambda v: a @ v, b, steps, lambda _: 0.0)
    shifted = a + damping * torch.eye(12)
    wanted = conjugate_gradients(shifted, b, steps)
    assert torch.allclose(found.solution(damping), wanted, atol=1e-10)
    left = float((shifted @ wanted - b).norm() / b.norm())
    assert found.residual(damping) == pytest.approx(left, rel=1e-8)
    low, high = found.extremes()
    assert 0.2 - 1e-9 <= low <= high <= 5 + 1e-9


def test_lanczos_ends_where_it_is_exact() -> None:
    a, b = some_system(12, -1.0)
    calls = []

    def product(v: Tensor) -> Tensor:
        calls.append(1)
        return a @ v

    found = lanczos(product, b, 100, lambda _: 2.0)
    assert len(calls) == 12
    assert found.extremes() == pytest.approx((-1.0, 5.0))
    assert torch.allclose((a + 2 * torch.eye(12)) @ found.solution(2.0), b, atol=1e-9)
    calls.clear()
    lanczos(product, torch.linalg.eigh(a)[1][:, 3], 100, lambda _: 2.0)
    assert len(calls) == 1
    nothing = lanczos(product, torch.zeros(12).double(), 5, lambda _: 2.0)
    assert nothing.solution(1.0).norm() == 0
    assert (nothing.extremes(), nothing.residual(1.0)) == ((0.0, 0.0), 0.0)
    assert isinstance(nothing, Krylov)
    with pytest.raises(DivergedError, match="not finite"):
        lanczos(lambda v: v * math.nan, b, 3, lambda _: 1.0)


def test_lissa_is_its_loop_and_converges() -> None:
    a, b = some_system(8, 0.5)
    other = a + 0.1 * torch.eye(8)
    found = lissa(lambda v, j: (a if j % 2 else other) @ v, b, 9, 6.0, 1e6)
    h = b.clone()
    for j in range(9):
        h = h + b - (a if j % 2 else other) @ h / 6.0
    assert torch.allclose(found, h / 6.0)
    exact = lissa(lambda v, j: a @ v, b, 500, 6.0, 1e6)
    assert torch.allclose(a @ exact, b, atol=1e-9)
    with pytest.raises(DivergedError, match="at a scale of 2:"):
        lissa(lambda v, j: a @ v, b, 500, 2.0, 100 * float(b.norm()))


def test_lissa_solver_is_the_recursion_on_batches(double_task: Any) -> None:
    task = double_task(linear_net)
    model = efface.train(task)
    split = efface.Split.by_class(task, 1)
    found, detail = run(Certified("lissa", damping=0.2, iterations=40, records=25), model, split)
    facts = detail["certified"]
    fit = Fit(task, 7, path="forget")
    drawn = torch.randperm(len(split.retain), generator=fit.generator("records"))[:25]
    chosen = split.retain[drawn.sort().values]
    rows = torch.randint(25, (40, certified_module.BATCH), generator=fit.generator("batches"))
    g, whole = derivatives(model.network, task, split.retain)
    _, whole = derivatives(model.network, task, chosen)
    scale = certified_module.HEADROOM * (0.2 + np.linalg.eigvalsh(whole)[-1])
    assert facts["scale"] == pytest.approx(scale, rel=0.05)
    h = g.copy()
    for batch in rows:
        _, a = derivatives(model.network, task, chosen[batch])
        h = h + g - (a + 0.2 * np.eye(len(a))) @ h / facts["scale"]
    wanted = dense(model.network).numpy() - h / facts["scale"]
    assert np.abs(found.numpy() - wanted).max() < 1e-9
    left = (whole + 0.2 * np.eye(len(whole))) @ (h / facts["scale"]) - g
    assert facts["residual"] == pytest.approx(np.linalg.norm(left) / np.linalg.norm(g))


def test_lissa_on_all_records_converges_to_cg(double_task: Any) -> None:
    task = double_task(curved_net)
    model = efface.train(task)
    split = efface.Split.by_class(task, 1)
    few = {"records": certified_module.BATCH, "damping": 0.5}
    wanted, _ = run(Certified("cg", iterations=400, **few), model, split)
    near, _ = run(Certified("lissa", iterations=20, **few), model, split)
    there, detail = run(Certified("lissa", iterations=800, **few), model, split)
    distances = [float((w - wanted).norm()) for w in (near, there)]
    assert distances[1] < 1e-9 < distances[0]
    assert detail["certified"]["residual"] < 1e-8


def test_lissa_tries_larger_scales_and_then_gives_up(
    double_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = double_task(linear_net)
    model = efface.train(task)
    split = efface.Split.by_class(task, 1)
    monkeypatch.setattr(certified_module, "HEADROOM", 0.1)
    method = Certified("lissa", damping=0.1, iterations=300)
    _, detail = run(method, model, split)
    facts = detail["certified"]
    first = 0.1 * (0.1 + facts["largest_curvature"])
    assert facts["scale"] / first in (4.0, 16.0, 64.0)
    monkeypatch.setattr(certified_module, "TRIES", 1)
    with pytest.raises(DivergedError, match=r"diverged in step .* at a scale of"):
        run(method, model, split)


def test_products_over_batches_are_those_over_all(double_task: Any) -> None:
    x, y = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)).double(), None
    y = torch.arange(300) % 3
    task = double_task(curved_net, train=(x, y), ids=None, subjects=None, columns={})
    network = task.network()
    fit = Fit(task)
    v = torch.randn(dense(network).shape, generator=torch.Generator().manual_seed(1)).double()
    with evaluating(network, fit.device):
        found = LossCurvature(fit, network, decay=0.1)
        product, gradient = found.product(v, torch.arange(300)), found.gradient(torch.arange(300))
    g, h = derivatives(
        network, replace(task, fit=efface.Settings(weight_decay=0.1)), torch.arange(300)
    )
    assert np.allclose(product.numpy(), h @ v.numpy())
    assert np.allclose(gradient.numpy(), g)
    assert fit.meter.images == {"retain": 600}
    with pytest.raises(MethodError, match="no records"):
        found.gradient(torch.arange(0))


class Once(torch.autograd.Function):
    """A square that has one derivative only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class OnceNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(self.inner(x))


class Attending(nn.Module):
    """Fused attention, which has no second derivative of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.reshape(len(x), 1, 3, 8) for t in [self.inner(x)] * 3)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


@pytest.mark.parametrize("solver", ["cg", "gauss-newton"])
def test_what_cannot_be_differentiated_twice_is_said(new_task: NewTask, solver: Any) -> None:
    task = new_task(network=OnceNet)
    model = efface.TrainedModel(task, task.network())
    split = efface.Split.by_class(task, 1)
    with pytest.raises(MethodError, match="other matrix"):
        efface.forget(model, split, Certified(solver))
    assert model.network.inner.weight.grad is None
    task = new_task(network=Attending)
    model = efface.TrainedModel(task, task.network())
    backends = torch.backends.cuda.flash_sdp_enabled()
    after = efface.forget(model, split, Certified(solver, damping=0.5))
    assert after.digest != model.digest
    assert torch.backends.cuda.flash_sdp_enabled() == backends


# --- noise and what it does not prove -------------------------------------------------------------


def test_noise_is_normal_and_depends_on_the_seed_alone(
    trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    plain, _ = run(Certified(), trained, class_split)
    noisy, detail = run(Certified(sigma=0.5), trained, class_split)
    noise = (noisy - plain).numpy()
    assert abs(noise.std() / 0.5 - 1) < 0.15
    assert abs(noise.mean()) < 0.1
    again, _ = run(Certified(sigma=0.5), trained, class_split)
    other, _ = run(Certified(sigma=0.5), trained, class_split, seed=8)
    assert torch.equal(noisy, again)
    assert not torch.equal(noisy, other)
    assert detail["certified"]["sigma"] == 0.5
    assert detail["assumptions"] == [
        "certificate: none, because the noise (σ = 0.5) was chosen, not derived from a bound."
    ]


def hidden(distance: float, sigma: float, epsilon: float) -> float:
    """The smallest δ at ε of two normal distributions so far apart, by quadrature."""

    def density(x: float, centre: float) -> float:
        return math.exp(-(((x - centre) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))

    def over(x: float) -> float:
        return max(0.0, density(x, distance) - math.exp(epsilon) * density(x, 0.0))

    reach = distance + 12 * sigma
    return integrate.quad(over, -reach, reach, limit=500, epsabs=1e-12)[0]


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5])
def test_the_noise_hides_what_it_says(epsilon: float, delta: float) -> None:
    assert hidden(2.0, spread(2.0, epsilon, delta), epsilon) <= delta
    assert hidden(2.0, spread(2.0, epsilon, delta) / 4, epsilon) > delta


def newton(network: nn.Module, task: efface.Task, positions: Tensor) -> Tensor:
    """The minimum on some records, by undamped Newton steps."""
    own = task.network()
    own.load_state_dict(network.state_dict())
    for _ in range(8):
        g, h = derivatives(own, task, positions)
        torch.nn.utils.vector_to_parameters(
            dense(own) - torch.from_numpy(np.linalg.solve(h, g)), own.parameters()
        )
    assert np.linalg.norm(derivatives(own, task, positions)[0]) < 1e-10
    return dense(own)


def test_the_bound_holds_where_its_assumptions_do(double_task: Any) -> None:
    task = double_task(linear_net, fit=efface.Settings(weight_decay=0.3, epochs=6, lr=0.1))
    model = efface.train(task)
    split = efface.Split.random(task, 0.05, seed=1)
    everyone = torch.arange(len(task.records))
    start = newton(model.network, task, everyone)
    torch.nn.utils.vector_to_parameters(start, model.network.parameters())
    wanted = newton(model.network, task, split.retain)
    found, detail = run(Certified(damping=0.0, epsilon=1.0, **EXACT), model, split)
    plain, _ = run(Certified("cg", damping=0.0, **EXACT), model, split)
    facts = detail["certified"]
    apart = float((plain - wanted).norm())
    assert 0 < apart <= facts["bound"] < facts["radius"]
    assert float((dense(model.network) - wanted).norm()) <= facts["radius"]
    assert facts["sigma"] == pytest.approx(spread(facts["bound"], 1.0, 1e-5))
    spreading = float((found - plain).std())
    assert spreading == pytest.approx(facts["sigma"], rel=0.5)
    text = " ".join(detail["assumptions"])
    assert text.startswith("certificate: none, because nothing below was proven.")
    assert "ε = 1, δ = 1e-05" in text
    assert "no credit" not in text
    assert "batch norm" not in text


def test_the_bound_is_its_formula() -> None:
    bound = Bound(radius=3.0, lipschitz=0.5, damping=0.2, smallest=-0.1, residual=0.01)
    assert bound.distance == pytest.approx((3 * (0.5 * 3 / 2 + 0.2) + 0.01) / 0.1)
    step = Step(torch.tensor([3.0, 4.0]), 0.2, 0.2, -0.1, 5.0, 10, 0.5, None)
    found = estimated_bound(25.0, step, size=7.0, slope=0.4)
    assert found == Bound(14.0, 2.0, 0.2, -0.1, 0.2)
    assert estimated_bound(25.0, replace(step, low=0.1), 7.0, 0.4).radius == pytest.approx(4.0)


def test_a_network_would_need_more_noise_than_it_can_bear(
    conv_trained: efface.TrainedModel,
) -> None:
    split = efface.Split.by_class(conv_trained.task, 0)
    with pytest.raises(MethodError, match="nothing of the model"):
        efface.forget(conv_trained, split, Certified(epsilon=1.0))


def test_assumptions_name_what_was_not_looked_at(
    conv_trained: efface.TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certified_module, "HOPELESS", math.inf)
    task = conv_trained.task
    first = efface.forget(conv_trained, efface.Split.by_ids(task, ["c001"]), FineTune(epochs=0))
    after = efface.forget(first, efface.Split.by_class(task, 0), Certified(epsilon=1.0))
    text = " ".join(after.lineage[-1].detail["assumptions"])
    assert "no credit" in text  # no bound of a network is better than that of not moving
    assert "batch norm" in text
    assert "Earlier requests" in text


def test_sentences_reach_lineage_audit_report_and_file(
    trained: efface.TrainedModel, class_split: efface.Split, tmp_path: Path
) -> None:
    method = Chain(Certified(sigma=1e-3), FineTune(epochs=1))
    after = efface.forget(trained, class_split, method)
    (sentence,) = after.lineage[-1].detail["assumptions"]
    after.save(tmp_path / "after.safetensors")
    loaded = efface.load(tmp_path / "after.safetensors", trained.task)
    result = efface.audit(trained, loaded, class_split)
    assert result.subject["assumptions"] == [sentence]
    result.save(tmp_path / "audit")
    assert json.loads((tmp_path / "audit/audit.json").read_text())["subject"]["assumptions"]
    page = (tmp_path / "audit/report.html").read_text(encoding="utf-8")
    assert "Certificate: none, because the noise" in page
    other = efface.forget(trained, class_split, FineTune(epochs=1))
    plain = efface.audit(trained, other, class_split)
    assert plain.subject["assumptions"] == []
    plain.save(tmp_path / "plain")
    assert "ertificate" not in (tmp_path / "plain/report.html").read_text(encoding="utf-8")


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"damping": -1.0}, "damping must be 0 or more"),
        ({"damping": math.nan}, "damping must be"),
        ({"iterations": 0}, "iterations must be 1 or more"),
        ({"records": 0}, "records must be 1 or more"),
        ({"sigma": -0.1}, "sigma must be 0 or more"),
        ({"epsilon": 0.0}, "epsilon must be above 0"),
        ({"epsilon": 2.0}, "at most 1"),
        ({"delta": 1.0}, "delta must be between 0 and 1"),
        ({"epsilon": 1.0, "sigma": 0.1}, "give one"),
        ({"epsilon": 1.0, "solver": "gauss-newton"}, "solver=cg"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        Certified(**options)


def test_options_as_text_and_the_alias() -> None:
    assert build("cu", {"solver": "lissa", "damping": "0.1"}) == Certified("lissa", damping=0.1)
    with pytest.raises(MethodError, match="solver must be one of cg, lissa, gauss-newton"):
        build("cu", {"solver": "newton"})


def test_broken_weights_are_reported(
    trained: efface.TrainedModel, class_split: efface.Split
) -> None:
    broken = trained.copy()
    with torch.no_grad():
        next(broken.network.parameters()).fill_(math.inf)
    with pytest.raises(DivergedError, match="not finite"):
        efface.forget(broken, class_split, Certified())


def test_the_command_line_prints_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def efface_(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["efface", *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    efface_("train", "digits", "--set", "epochs=1", "--out", "m.safetensors")
    head = ("forget", "digits", "--model", "m.safetensors", "--class", "3", "--method", "cu")
    plain = efface_(*head, "--out", "a.safetensors")
    assert plain.splitlines()[1] == "certificate: none, because no noise was added."
    told = efface_(*head, "--set", "sigma=0.01", "--json", "--out", "b.safetensors")
    assert "was chosen" in json.loads(told)["assumptions"][0]
