"""The curvature of a mean loss: products with its Hessian, and two ways to a damped inverse.

No matrix is formed. A product with the Hessian is a derivative of the gradient along a direction;
one with the Gauss–Newton matrix JᵀAJ (J: of the logits by the weights, A: the Hessian of the loss
by the logits) pushes the direction forward and pulls it back. The latter is never indefinite where
the loss is convex in the logits, and takes half the time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from efface.curvature.passes import dropped, offsets
from efface.curvature.persample import CANNOT, Apply, trainable
from efface.data import Batch
from efface.errors import DivergedError, MethodError
from efface.fitting import Fit
from efface.mask import Mask

Kind = Literal["hessian", "gauss-newton"]
"""Which matrix stands for the curvature."""

EXACT = {torch.float64: 1e-11, torch.float32: 1e-6}
"""Relative residual at which a solution is exact to rounding, by the precision of the passes."""


class LossCurvature:
    """F(θ) = mean loss + decay/2 ‖θ‖² around a network's weights: its gradient and curvature.

    In eval mode, on un-augmented records. Vectors are flat, in float64, over all parameters that
    require a gradient; passes are in the precision of the weights. Pruned weights are no
    coordinates of the problem: vectors are zero there.

    Args:
        fit: Supplies records, loss, device, meter and progress.
        network: In eval mode on the fit's device, as :func:`evaluating` makes it.
        decay: Weight decay, per step and unit of rate as optimisers have it.
        mask: Pruned weights, or None.
        kind: Which matrix :meth:`product` multiplies with.
        stream: Under which name records are counted.

    Example:
        >>> import torch, efface
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> task = efface.Task(lambda: torch.nn.Linear(2, 2), (x, y), (x, y))
        >>> fit, network, everyone = efface.Fit(task), task.network().eval(), torch.arange(2)
        >>> found = LossCurvature(fit, network, decay=1e-3)
        >>> gradient = found.gradient(everyone)
        >>> float(gradient @ found.product(gradient, everyone)) > 0
        True
    """

    def __init__(
        self,
        fit: Fit,
        network: nn.Module,
        *,
        decay: float = 0.0,
        mask: Mask | None = None,
        kind: Kind = "hessian",
        stream: str = "retain",
    ) -> None:
        self.fit, self.network, self.decay, self.kind = fit, network, decay, kind
        self.stream, self._checked = stream, False
        self.params = trainable(network)
        self.shapes = {name: p.shape for name, p in self.params.items()}
        self.pruned = dropped(mask, self.shapes, fit.device)
        self.dtype = torch.float32
        if all(p.dtype == torch.float64 for p in self.params.values()):
            self.dtype = torch.float64

    @property
    def weights(self) -> Tensor:
        """The weights as a vector ``[P]``."""
        return _flat(p.detach() for p in self.params.values())

    def write(self, weights: Tensor) -> None:
        """Give the network other weights; pruned ones become exactly zero."""
        weights = self._kept(weights.clone())
        places = offsets(self.shapes)
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(weights[places[name]].reshape(p.shape))

    def gradient(self, positions: Tensor) -> Tensor:
        """∇F over some records ``[P]``, in one pass."""
        params = list(self.params.values())

        def one(batch: Batch) -> Tensor:
            with torch.enable_grad():
                loss = self._loss(self.network, batch)
            return _flat(torch.autograd.grad(loss, params, materialize_grads=True))

        return self._kept(self._mean(positions, one, "gradient") + self.decay * self.weights)

    def product(self, vector: Tensor, positions: Tensor) -> Tensor:
        """The curvature over some records, weight decay included, times a vector ``[P]``.

        Raises:
            MethodError: If the loss cannot be differentiated twice.
        """
        direction = self._named(vector)
        one = self._hessian if self.kind == "hessian" else self._gauss_newton
        try:
            found = self._mean(positions, lambda batch: one(batch, direction), "curvature")
        except torch.cuda.OutOfMemoryError:
            raise
        except CANNOT as problem:
            raise MethodError(
                "a product with the curvature of this network's loss cannot be computed "
                f"({str(problem).strip().splitlines()[0][:200]}); take the other matrix (Hessian "
                "or Gauss–Newton), or a method that needs gradients only."
            ) from problem
        return self._kept(found + self.decay * vector)

    def _hessian(self, batch: Batch, direction: dict[str, Tensor]) -> Tensor:
        """The derivative of ⟨gradient, direction⟩."""
        params = list(self.params.values())
        with torch.enable_grad():
            first = torch.autograd.grad(
                self._loss(self.network, batch), params, create_graph=True, materialize_grads=True
            )
        if not self._checked:
            _check_twice(first)
            self._checked = True
        bent = [i for i, g in enumerate(first) if g.requires_grad]  # not what F is linear in
        if not bent:
            return torch.zeros_like(_flat(first))
        into = list(direction.values())
        return _flat(
            torch.autograd.grad(
                [first[i] for i in bent], params, [into[i] for i in bent], materialize_grads=True
            )
        )

    def _gauss_newton(self, batch: Batch, direction: dict[str, Tensor]) -> Tensor:
        """Forward along the direction, through the loss's own Hessian, and back."""
        forward = Apply(self.network, self.fit.task)

        def logits(weights: dict[str, Tensor]) -> Tensor:
            swapped = {f"network.{name}": w for name, w in weights.items()}
            return self._wide(functional_call(forward, swapped, (batch.inputs,)))

        def loss(z: Tensor) -> Tensor:
            return self.fit.task.loss(z, batch.targets)

        weights = {name: p.detach() for name, p in self.params.items()}
        z, moved = _pushed(logits, weights, direction)
        _, bent = _pushed(grad(loss), z, moved)
        with torch.enable_grad():
            again = self._wide(self.fit.logits(self.network, batch))
        params = list(self.params.values())
        return _flat(torch.autograd.grad(again, params, bent, materialize_grads=True))

    def _loss(self, network: nn.Module, batch: Batch) -> Tensor:
        return self.fit.task.loss(self._wide(self.fit.logits(network, batch)), batch.targets)

    def _wide(self, logits: Tensor) -> Tensor:
        return logits.to(self.dtype)

    def _mean(self, positions: Tensor, one: Callable[[Batch], Tensor], label: str) -> Tensor:
        """The mean over records of what is a mean over each batch."""
        fit, n, done = self.fit, len(positions), 0
        if n == 0:
            raise MethodError("curvature: there are no records; give one at least.")
        plan = torch.split(positions, 125 if fit.device.type == "cpu" else 500)
        total = torch.zeros(sum(s.numel() for s in self.shapes.values()), dtype=torch.float64)
        total = total.to(fit.device)
        with sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no second derivative
            for batch in fit.task.records.batches(plan, fit.device):
                total += one(batch) * (len(batch.targets) / n)
                done += len(batch.targets)
                fit.meter.images[self.stream] = fit.meter.images.get(self.stream, 0) + len(
                    batch.targets
                )
                if fit.progress:
                    fit.progress(label, done, n)
        return total

    def _named(self, vector: Tensor) -> dict[str, Tensor]:
        places = offsets(self.shapes)
        return {
            name: vector[places[name]].reshape(p.shape).to(p.dtype)
            for name, p in self.params.items()
        }

    def _kept(self, vector: Tensor) -> Tensor:
        return vector if self.pruned is None else vector.masked_fill_(self.pruned, 0.0)


def _check_twice(gradients: Iterable[Tensor]) -> None:
    """Refuse functions that have one derivative only: a second one would silently be zero.

    Raises:
        RuntimeError: If there is one.
    """
    seen, left = set(), [g.grad_fn for g in gradients]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("autograd::Error"):  # what once_differentiable leaves behind
            raise RuntimeError("a function of it is differentiable once only")
        left.extend(following for following, _ in node.next_functions)


def _pushed(function: Callable[[Any], Tensor], at: Any, along: Any) -> tuple[Tensor, Tensor]:
    """A function's value, and its derivative along a direction."""
    with warnings.catch_warnings():  # PyTorch compiles parts with what it deprecates itself
        warnings.simplefilter("ignore", DeprecationWarning)
        found: tuple[Tensor, Tensor] = jvp(function, (at,), (along,))  # type: ignore[assignment]
        return found


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


@dataclass
class Krylov:
    """What some products with a symmetric matrix A tell about it, seen from a vector b.

    In the basis Q (rows) of the span of b, Ab, A²b, … the matrix is tridiagonal, T = Q A Qᵀ. So
    its extreme eigenvalues can be read off, and (A + λI)x = b be solved for any λ without a
    further product: by the very iterate that conjugate gradients reach in as many steps.

    Attributes:
        basis: Q, in the precision of the passes ``[k, P]``.
        diagonal: Of T.
        beside: Beside it; the last one leads out of the basis.
        length: Norm of b.
    """

    basis: Tensor
    diagonal: list[float]
    beside: list[float]
    length: float

    def matrix(self) -> Tensor:
        """T ``[k, k]``."""
        off = torch.tensor(self.beside[:-1], dtype=torch.float64)
        middle = torch.tensor(self.diagonal, dtype=torch.float64)
        return middle.diag() + off.diag(1) + off.diag(-1)

    def extremes(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue seen: from within those of A; 0 without any product."""
        if not self.diagonal:
            return 0.0, 0.0
        values = torch.linalg.eigvalsh(self.matrix())
        return float(values[0]), float(values[-1])

    def coordinates(self, damping: float) -> Tensor:
        """The solution in the basis ``[k]``."""
        k = len(self.diagonal)
        b = torch.zeros(k, dtype=torch.float64)
        b[:1] = self.length
        shifted = self.matrix() + damping * torch.eye(k, dtype=torch.float64)
        found: Tensor = torch.linalg.solve(shifted, b)
        return found

    def residual(self, damping: float) -> float:
        """‖(A + λI)x − b‖ against ‖b‖."""
        if not self.diagonal:
            return 0.0
        return self.beside[-1] * abs(float(self.coordinates(damping)[-1])) / self.length

    def solution(self, damping: float) -> Tensor:
        """The solution ``[P]``, in float64."""
        y = self.coordinates(damping).to(self.basis)
        return (y @ self.basis[: len(y)]).double()


def lanczos(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    steps: int,
    damping: Callable[[Krylov], float],
    precision: torch.dtype = torch.float64,
) -> Krylov:
    """Lanczos' iteration, every vector made orthogonal to all before it.

    Args:
        product: What the matrix A does to a vector ``[P]``.
        b: Where it starts ``[P]``, in float64.
        steps: Products at most.
        damping: λ, given what is known so far; it is done where the residual is down to rounding.
        precision: Of the products, and of the basis that is kept (steps · P numbers).

    Raises:
        DivergedError: If a product is not finite.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double(), torch.ones(2).double()
        >>> found = lanczos(lambda v: a @ v, b, 2, lambda krylov: 0.5)
        >>> torch.allclose((a + 0.5 * torch.eye(2)) @ found.solution(0.5), b)
        True
    """
    steps = min(steps, b.numel())
    basis = torch.empty(steps, b.numel(), dtype=precision, device=b.device)
    found = Krylov(basis, [], [], float(b.norm()))
    w, norm = b, found.length
    for k in range(steps if norm > 0 else 0):
        basis[k] = w / norm
        w = product(basis[k].double())
        along = float(basis[k].double() @ w)
        for _ in range(2):  # once leaves rounding behind
            w = w - ((basis[: k + 1] @ w.to(precision)) @ basis[: k + 1]).double()
        norm = float(w.norm())
        if not math.isfinite(along + norm):
            raise DivergedError(
                "a product with the curvature is not finite; the network is broken, load another."
            )
        found.diagonal.append(along)
        found.beside.append(norm)
        if norm == 0 or found.residual(damping(found)) <= EXACT[precision]:
            break
    return found


def lissa(
    product: Callable[[Tensor, int], Tensor], b: Tensor, steps: int, scale: float, limit: float
) -> Tensor:
    """LiSSA: h ← h + b − A_j h / s from h = b, and at the end h / s, an estimate of A⁻¹ b.

    A truncated Neumann series with a matrix A_j of its own in every step (Agarwal et al. 2017).
    It converges in the mean where the scale s is above half of the eigenvalues of all A_j, and
    takes s/λ_min steps or more to it.

    Args:
        product: What the matrix of a step does to a vector: ``(vector [P], step)``.
        b: The vector ``[P]``.
        steps: How many.
        scale: s.
        limit: Length of a result that cannot be right.

    Raises:
        DivergedError: If the result grows beyond the limit, naming the scale.

    Example:
        >>> import torch
        >>> a = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> lissa(lambda v, step: a @ v, torch.ones(2), 60, scale=3.0, limit=100.0)
        tensor([0.5000, 1.0000])
    """
    h = b.clone()
    for step in range(steps):
        h = h + b - product(h, step) / scale
        if not float(h.norm()) <= limit * scale:
            raise DivergedError(
                f"the LiSSA recursion diverged in step {step + 1} at a scale of {scale:.3g}: "
                "curvature beyond the scale, or below zero; raise the damping."
            )
    return h / scale
