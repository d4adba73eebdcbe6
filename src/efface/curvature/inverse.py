"""The product of an inverse Fisher matrix with a vector.

The matrix λI + (1/n) Σ g_i g_iᵀ is never formed: with the per-sample gradients as the rows of G,
its product with x is λx + Gᵀ(Gx)/n. Rows are kept as far as the memory allows, and the others
computed anew in every iteration of conjugate gradients. The kept rows alone give a good inverse
through their Gram matrix (Woodbury), which preconditions the iterations: where all of them are
kept, two or three are left, which take away the rounding of that solution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from efface.curvature.passes import Passes, dropped, flat, named
from efface.curvature.persample import evaluating, loss_gradients
from efface.data import Batch
from efface.errors import DivergedError, MethodError
from efface.fitting import Fit
from efface.mask import Mask

TOLERANCE, ACCEPTED, ITERATIONS = 1e-9, 1e-4, 1000
"""Residual at which it is done, at which it may stop, and iterations at most."""

PASS = 256 * 2**20
"""Bytes of a pass's activations and gradients, at most."""

GRAM = 1000
"""Rows in the preconditioner, at most: its cost grows with the square of their number."""

CACHED = 2**21
"""Numbers that a processor's cache holds, roughly."""


def inverse_fisher_product(
    fit: Fit,
    network: nn.Module,
    positions: Tensor,
    vector: Mapping[str, Tensor],
    *,
    damping: float,
    memory: int = 2 * 2**30,
    mask: Mask | None = None,
    stream: str = "retain",
) -> dict[str, Tensor]:
    """(λI + (1/n) Σ g_i g_iᵀ)⁻¹ v over the given records, exact to rounding.

    In eval mode, in fp32, on un-augmented records; modes, gradients and random state are left as
    found. ``fit.meter.facts["inverse"]`` tells iterations, residual and what was kept.

    Args:
        fit: Supplies records, loss, device and meter.
        network: The network.
        positions: Which records ``[n]``.
        vector: v: name → tensor, for every parameter that requires a gradient.
        damping: λ; the smaller, the more iterations.
        memory: Bytes that per-sample gradients may take (n · parameters · 4 keeps them all).
        mask: Pruned weights are no coordinates of the problem: v and all g_i are zero there.
        stream: Under which name the records are counted.

    Returns:
        Name → float32 tensor of the parameter's shape, contiguous, on the fit's device.

    Raises:
        MethodError: If the damping is not positive, there are no records, or the vector is not one
            of this network's parameters.
        DivergedError: If the iterations do not converge: the damping is too small for float32.

    Example:
        >>> import torch, efface
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> task = efface.Task(lambda: torch.nn.Linear(2, 2), (x, y), (x, y))
        >>> v = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
        >>> fit, everyone = efface.Fit(task), torch.arange(2)
        >>> found = inverse_fisher_product(fit, task.network(), everyone, v, damping=0.5)
        >>> found["bias"].shape
        torch.Size([2])
    """
    if not 0 < damping < math.inf:
        raise MethodError(f"damping must be positive, not {damping!r}.")
    home, fit = fit.device, _with_float64(fit)
    with evaluating(network, fit.device):
        label = "inverse Fisher product"
        passes = Passes(fit, network, positions, min(memory, PASS), label, stream)
        v = flat({n: t.to(fit.device) for n, t in vector.items()}, passes.shapes)
        pruned = dropped(mask, passes.shapes, fit.device)
        if pruned is not None:
            v.masked_fill_(pruned, 0.0)
        rows = _Rows(passes, memory, pruned)
        precondition = rows.preconditioner(damping)
        solved = _solve(lambda x: damping * x + rows.product(x) / len(positions), precondition, v)
    fit.meter.facts["inverse"] = {
        "iterations": solved.iterations,
        "residual": solved.residual,
        "kept": rows.kept,
        "dtype": str(rows.dtype).removeprefix("torch."),
    }
    return named(solved.x.to(home, torch.float32), passes.shapes)


def _with_float64(fit: Fit) -> Fit:
    """A handle on a device that has float64."""
    return replace(fit, device=torch.device("cpu")) if fit.device.type == "mps" else fit


class _Rows:
    """Per-sample gradients as the rows of a matrix ``[n, P]``.

    The first ones are kept, as the memory allows, the others computed anew in every pass.
    """

    def __init__(self, passes: Passes, memory: int, pruned: Tensor | None = None) -> None:
        self.passes, self.pruned = passes, pruned
        self.width = sum(shape.numel() for shape in passes.shapes.values())
        n, room = len(passes.positions), memory // (4 * self.width)
        double = 2 * n <= room and 8 * n * self.width <= PASS
        self.dtype = torch.float64 if double else torch.float32
        self.kept = n if n <= room else room * 3 // 4
        self.size = max(1, min(passes.size, room - self.kept))
        self._matrix: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """The rows that are kept ``[k, P]``."""
        if self._matrix is None:
            device = self.passes.fit.device
            self._matrix = torch.empty(self.kept, self.width, dtype=self.dtype, device=device)
            done, first = 0, self.passes.positions[: self.kept]
            for batch in self.passes.batches(first) if self.kept else ():
                done += len(self._fill(batch, self._matrix[done : done + len(batch.targets)]))
        return self._matrix

    def __iter__(self) -> Iterator[Tensor]:
        """All rows, a few at a time: as many of the kept ones as stay in the cache."""
        yield from torch.split(self.matrix, max(1, CACHED // self.width))
        if len(rest := self.passes.positions[self.kept :]) == 0:
            return
        for batch in self.passes.batches(rest, self.size):
            shape = (len(batch.targets), self.width)
            yield self._fill(batch, torch.empty(shape, dtype=self.dtype, device=self.matrix.device))

    def _fill(self, batch: Batch, out: Tensor) -> Tensor:
        route, task = self.passes.route, self.passes.fit.task
        self.passes.rows(loss_gradients(task, route.forward(batch), batch.targets), out)
        return out if self.pruned is None else out.masked_fill_(self.pruned, 0.0)

    def product(self, x: Tensor) -> Tensor:
        """Gᵀ(Gx), in one pass over the rows."""
        total, thin = torch.zeros_like(x), x.to(self.dtype)
        for rows in self:
            total += (rows @ thin) @ rows
        return total

    def preconditioner(self, damping: float) -> Callable[[Tensor], Tensor]:
        """The inverse of λI + GᵀG/k by some of the kept rows, through their Gram matrix."""
        g = self.matrix[:: max(1, -(-self.kept // GRAM))]
        k = len(g)
        if k == 0:
            return lambda r: r / damping
        gram = torch.empty(k, k, dtype=torch.float64, device=g.device)
        for where in torch.split(torch.arange(k), max(1, -(-k // 8))):
            upto = int(where[-1]) + 1
            block = (g[int(where[0]) : upto] @ g[:upto].T).double()
            gram[int(where[0]) : upto, :upto] = block
            gram[:upto, int(where[0]) : upto] = block.T
        gram /= k
        if not bool(torch.isfinite(gram).all()):
            raise DivergedError(
                "per-sample gradients are not finite; the network is broken, load another."
            )
        rounding = 1e-6 if self.dtype == torch.float32 else 1e-13
        gram.diagonal().add_(damping + rounding * float(gram.diagonal().max()))
        lower = torch.linalg.cholesky(gram)

        def apply(r: Tensor) -> Tensor:
            y = torch.cholesky_solve((g @ r.to(self.dtype)).double()[:, None], lower)[:, 0]
            return (r - (y.to(self.dtype) @ g).double() / k) / damping

        return apply


@dataclass
class _Solved:
    x: Tensor
    iterations: int
    residual: float


def _solve(
    product: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], v: Tensor
) -> _Solved:
    """Preconditioned conjugate gradients from zero; vectors in float64."""
    x, r = torch.zeros_like(v), v.clone()
    z = precondition(r)
    p, rz = z.clone(), float(r @ z)
    start, norm, done = float(v.norm()), float(v.norm()), 0
    while norm > TOLERANCE * start and done < ITERATIONS:
        ap = product(p)
        alpha = rz / float(p @ ap)
        x += alpha * p
        r -= alpha * ap
        z = precondition(r)
        before, rz = rz, float(r @ z)
        p.mul_(rz / before).add_(z)
        norm, done = float(r.norm()), done + 1
    residual = norm / start if start else 0.0
    if not residual <= ACCEPTED:
        raise DivergedError(
            f"the inverse Fisher product did not converge (residual {residual:.1e} after {done} "
            "iterations); raise the damping, or the memory."
        )
    return _Solved(x, done, residual)


def projections(
    fit: Fit,
    network: nn.Module,
    positions: Tensor,
    vectors: Sequence[Mapping[str, Tensor]],
    *,
    memory: int = PASS,
    stream: str = "retain",
) -> Tensor:
    """The products ⟨g_i, u⟩ of every record's loss gradient with some vectors.

    Args:
        fit: Supplies records, loss, device and meter.
        network: The network.
        positions: Which records ``[n]``.
        vectors: The k vectors u: name → tensor, for every parameter that requires a gradient.
        memory: Bytes that a pass may hold.
        stream: Under which name the records are counted.

    Returns:
        float64 ``[n, k]``, on the CPU.

    Raises:
        MethodError: If there are no records, or a vector is not one of this network's parameters.
    """
    fit = _with_float64(fit)
    with evaluating(network, fit.device):
        passes = Passes(fit, network, positions, memory, "projections", stream)
        rows = _Rows(passes, 1)  # each is needed once: none is kept
        rows.size = passes.size
        columns = [
            flat({n: t.to(fit.device) for n, t in u.items()}, passes.shapes) for u in vectors
        ]
        thin = torch.stack(columns, 1).to(rows.dtype)
        return torch.cat([(g @ thin).double().cpu() for g in rows])
