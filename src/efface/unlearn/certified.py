"""Certified unlearning: one damped Newton step on D_r, and noise with what it does not prove."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from efface.curvature import LossCurvature, evaluating, lanczos, lissa
from efface.errors import DivergedError, MethodError
from efface.fitting import Fit
from efface.mask import Mask
from efface.task import Split
from efface.trained import TrainedModel

RECORDS = 250
"""Records of D_r in the curvature, where no number is given."""

STEPS, LISSA_STEPS = 10, 1000
"""Iterations, where no number is given."""

RELATIVE = {"gauss-newton": 3e-3, "cg": 3e-2, "lissa": 3e-2}
"""Damping against the largest curvature, where none is given."""

BATCH = 10
"""Records in a step of LiSSA, as released."""

HOPELESS = 10.0
"""Length of calibrated noise against the weights beyond which it is refused."""

HEADROOM, PATIENCE, TRIES = 2.0, 10.0, 5
"""LiSSA's first scale against the largest curvature, the length at which it has diverged against
the longest result that it can have, and how often it is tried with a scale four times as large."""


@dataclass(frozen=True)
class Certified:
    """CU: θ − (H + λI)⁻¹ ∇F(θ), then normal noise (Zhang et al. 2024).

    F is the mean loss on D_r plus its weight decay, H its Hessian at θ. D_f is never read: at the
    end of the training its gradient is what ∇F lacks. One Newton step leads to the model retrained
    on D_r where F is quadratic in between, which a network's is not: **nothing is certified
    here**. What noise would stand for, and under which assumptions, is recorded and printed with
    the result. In eval mode; pruned weights stay zero, and batch-norm statistics as they are.

    Args:
        solver: ``"gauss-newton"``: conjugate gradients on the Gauss–Newton matrix in the place of
            H, never indefinite and half as dear; ``"cg"``: the same on the Hessian; ``"lissa"``:
            the released recursion on Hessians of batches of ten. ``None``: the task's default,
            else ``"gauss-newton"``, but ``"cg"`` where ``epsilon`` is given.
        damping: λ; ``None``: the task's default, else 0.003 times the largest curvature seen, of
            the Hessian 0.03 times, or twice the most negative one if that is more. One that leaves
            negative curvature is raised to the latter.
        iterations: Products with the curvature; ``None``: 10, of LiSSA 1,000.
        records: Records of D_r in the curvature, drawn by the seed; ``None``: 250.
        sigma: Standard deviation of the noise in every weight.
        epsilon: Choose ``sigma`` such that an estimated bound on the distance to the retrained
            model would hide the difference up to (ε, δ): on networks, so much that nothing is left.
        delta: δ, with ``epsilon``.
    """

    name: ClassVar[str] = "certified"
    title: ClassVar[str] = "Certified unlearning (CU)"
    paper: ClassVar[str] = "Zhang et al. 2024; Agarwal et al. 2017"
    needs: ClassVar[frozenset[str]] = frozenset({"retain"})

    solver: Literal["cg", "lissa", "gauss-newton"] | None = None
    damping: float | None = None
    iterations: int | None = None
    records: int | None = None
    sigma: float = 0.0
    epsilon: float | None = None
    delta: float = 1e-5

    def __post_init__(self) -> None:
        rules = {
            "damping": ("0 or more", self.damping is None or 0 <= self.damping < math.inf),
            "iterations": ("1 or more", self.iterations is None or self.iterations >= 1),
            "records": ("1 or more", self.records is None or self.records >= 1),
            "sigma": ("0 or more", 0 <= self.sigma < math.inf),
            "epsilon": ("above 0 and at most 1", self.epsilon is None or 0 < self.epsilon <= 1),
            "delta": ("between 0 and 1", 0 < self.delta < 1),
        }
        for option, (rule, holds) in rules.items():
            if not holds:
                value = getattr(self, option)
                raise MethodError(f"{self.name}: {option} must be {rule}, not {value!r}.")
        if self.epsilon is not None and self.sigma:
            raise MethodError(f"{self.name}: sigma and epsilon both set the noise; give one.")
        if self.epsilon is not None and self.solver == "gauss-newton":
            raise MethodError(
                f"{self.name}: the bound behind epsilon is one for steps with the Hessian; take "
                "solver=cg, or give sigma."
            )

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        if fit.device.type == "mps":  # it has no float64
            fit = replace(fit, device=torch.device("cpu"))
        network, mask, bound = trained.network, trained.mask, None
        drawn = torch.randperm(len(split.retain), generator=fit.generator("records"))
        chosen = split.retain[drawn[: self.records or RECORDS].sort().values]
        kind: Any = "gauss-newton" if self._solver == "gauss-newton" else "hessian"
        decay = fit.task.fit.weight_decay
        with evaluating(network, fit.device):
            curvature = LossCurvature(fit, network, decay=decay, mask=mask, kind=kind)
            start = curvature.weights
            gradient = curvature.gradient(split.retain)
            step = self._solve(curvature, gradient, chosen, fit)
            straight = self._straight(curvature, step, chosen)
            curvature.write(start - step.x)
            if straight is not None:
                bend = float((curvature.gradient(chosen) - straight).norm())
                bound = estimated_bound(bend, step, float(start.norm()), float(gradient.norm()))
        sigma = self.sigma
        if bound is not None:
            sigma = self._calibrated(bound, start)
        add_noise(network, sigma, mask, fit)
        size, length = float(start.norm()), float(step.x.norm())
        fit.meter.facts |= {
            "certified": {"solver": self._solver}
            | step.facts()
            | {"step": length / size if size else 0.0, "sigma": sigma, "records": len(chosen)}
            | (bound.facts() if bound else {}),
            "assumptions": self._assumptions(network, sigma, bound, len(chosen), trained),
        }

    @property
    def _solver(self) -> str:
        return self.solver or ("gauss-newton" if self.epsilon is None else "cg")

    def _straight(self, curvature: LossCurvature, step: Step, chosen: Tensor) -> Tensor | None:
        """The gradient at the end of the step if the loss were quadratic, where it is asked for."""
        if self.epsilon is None:
            return None
        return curvature.gradient(chosen) - curvature.product(step.x, chosen)

    def _calibrated(self, bound: Bound, start: Tensor) -> float:
        """σ for ε and δ.

        Raises:
            MethodError: If nothing of the model would be left.
        """
        assert self.epsilon is not None
        sigma = spread(bound.distance, self.epsilon, self.delta)
        size = max(float(start.norm()), 1e-12)
        length = sigma * math.sqrt(int((start != 0).sum()))
        if not length <= HOPELESS * size:
            raise MethodError(
                f"{self.name}: epsilon={self.epsilon:g} asks for noise of σ = {sigma:.2g} (the "
                f"bound is {bound.distance:.2g}), {length / size:.2g} times as long "
                "as the weights, which would leave nothing of the model; give sigma and do "
                "without a bound, or retrain."
            )
        return sigma

    def _solve(self, curvature: LossCurvature, gradient: Tensor, chosen: Tensor, fit: Fit) -> Step:
        """(H + λI)⁻¹ ∇F by one of the solvers."""
        recursive = self._solver == "lissa"
        relative = RELATIVE[self._solver]
        products = self.iterations or (LISSA_STEPS if recursive else STEPS)
        krylov = lanczos(
            lambda v: curvature.product(v, chosen),
            gradient,
            STEPS if recursive else products,
            lambda found: settle(self.damping, *found.extremes(), relative),
            curvature.dtype,
        )
        low, high = krylov.extremes()
        damping = settle(self.damping, low, high, relative)
        asked = damping if self.damping is None else self.damping
        if not recursive:
            x, done = krylov.solution(damping), len(krylov.diagonal)
            return Step(x, damping, asked, low, high, done, krylov.residual(damping), None)
        x, scale = self._recur(curvature, gradient, chosen, damping, (low, high), products, fit)
        left = curvature.product(x, chosen) + damping * x - gradient
        length = float(gradient.norm())
        residual = float(left.norm()) / length if length else 0.0
        return Step(x, damping, asked, low, high, products, residual, scale)

    def _recur(
        self,
        curvature: LossCurvature,
        gradient: Tensor,
        chosen: Tensor,
        damping: float,
        extremes: tuple[float, float],
        steps: int,
        fit: Fit,
    ) -> tuple[Tensor, float]:
        """LiSSA on batches of ten; where it diverges, again with a larger scale."""
        low, high = extremes
        shape = (steps, min(BATCH, len(chosen)))
        rows = torch.randint(len(chosen), shape, generator=fit.generator("batches"))
        if len(chosen) <= BATCH:
            rows = torch.arange(len(chosen)).expand(steps, -1)
        limit = PATIENCE * float(gradient.norm()) / (damping + low)

        def product(v: Tensor, step: int) -> Tensor:
            return curvature.product(v, chosen[rows[step]]) + damping * v

        scale, tries = HEADROOM * (damping + high), TRIES
        while True:
            try:
                return lissa(product, gradient, steps, scale, limit), scale
            except DivergedError:
                tries -= 1
                if not tries:
                    raise
                scale *= 4

    def _assumptions(
        self,
        network: nn.Module,
        sigma: float,
        bound: Bound | None,
        records: int,
        trained: TrainedModel,
    ) -> list[str]:
        """What the noise would stand for, and what would have to hold: sentences to print."""
        if bound is None:
            why = "no noise was added"
            if sigma:
                why = f"the noise (σ = {sigma:.3g}) was chosen, not derived from a bound"
            return [f"certificate: none, because {why}."]
        lines = [
            f"certificate: none, because nothing below was proven. Only under these assumptions "
            f"would the noise (σ = {sigma:.3g}) hide the difference to a retrained model up to "
            f"ε = {self.epsilon:g}, δ = {self.delta:g}.",
            "The retrained model is the one minimum of the loss on D_r that the step aims at, gets "
            "the same noise, and is at most "
            f"{bound.radius:.3g} away from the weights before the step.",
            f"Between the two the Hessian changes by at most {bound.lipschitz:.3g} per unit of "
            "distance: measured along the step alone.",
            f"The smallest curvature is {bound.smallest:.3g}: the smallest seen in a few products "
            f"over {records} records, taken for all of D_r.",
            "The training minimised the loss of eval mode on un-augmented records, with weight "
            "decay on every weight.",
            f"Then the step ends within {bound.distance:.3g} of it.",
        ]
        if bound.distance >= bound.radius:
            lines.append(
                "That is no closer than the weights before the step were assumed to be: here the "
                "bound gives the step no credit, and the noise alone does the hiding."
            )
        if any(getattr(m, "running_mean", None) is not None for m in network.modules()):
            lines.append("Running statistics of batch norm do not tell of D_f: they were kept.")
        if trained.forgotten.requests:
            lines.append("Earlier requests are not counted: only this one is.")
        return lines


@dataclass(frozen=True)
class Step:
    """What a solver found.

    Attributes:
        x: The step ``[P]``.
        damping: λ that was used.
        asked: λ that was asked for.
        low: Smallest curvature seen, without λ.
        high: Largest.
        iterations: Products, or steps of the recursion.
        residual: ‖(H + λI)x − ∇F‖ against ‖∇F‖.
        scale: Of LiSSA.
    """

    x: Tensor
    damping: float
    asked: float
    low: float
    high: float
    iterations: int
    residual: float
    scale: float | None

    def facts(self) -> dict[str, Any]:
        """For the lineage."""
        found = {
            "damping": self.damping,
            "damping_raised": self.damping > self.asked,
            "smallest_curvature": self.low,
            "largest_curvature": self.high,
            "iterations": self.iterations,
            "residual": self.residual,
        }
        return found if self.scale is None else found | {"scale": self.scale}


def settle(given: float | None, low: float, high: float, relative: float) -> float:
    """λ: the one given, or a share of the largest curvature, unless that leaves a negative one.

    Args:
        given: λ, or None for the rule.
        low: Smallest curvature seen.
        high: Largest.
        relative: The share.

    >>> settle(None, -0.1, 8.0, 0.01), settle(None, 0.1, 8.0, 0.01), settle(0.05, -0.1, 8.0, 0.01)
    (0.2, 0.08, 0.2)
    """
    damping = relative * high if given is None else given
    if given is None or damping + low <= 0:
        damping = max(damping, -2 * low)
    return damping if damping + low > 0 else relative  # flat: any λ is as good


# -- noise ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """How far the step may end from the retrained weights, under assumptions (Zhang et al. 2024).

    With w the weights before the step and w* those where ∇F(w*) = 0, the step ends at

        (H + λI)⁻¹ ((H + λI)(w − w*) − (∇F(w) − ∇F(w*)) + r)

    from w*. The gradients differ by the mean Hessian in between times w − w*; where the Hessian
    changes by M per unit of distance at most, that is within M R²/2 of H(w − w*), R = ‖w − w*‖.

    Attributes:
        radius: R.
        lipschitz: M.
        damping: λ.
        smallest: λ_min, the smallest eigenvalue of H.
        residual: ‖r‖, what the solver left over.
    """

    radius: float
    lipschitz: float
    damping: float
    smallest: float
    residual: float

    @property
    def distance(self) -> float:
        """Δ = (R (M R/2 + λ) + ‖r‖) / (λ + λ_min)."""
        inner = self.radius * (self.lipschitz * self.radius / 2 + self.damping)
        return (inner + self.residual) / (self.damping + self.smallest)

    def facts(self) -> dict[str, float]:
        """For the lineage."""
        return {"radius": self.radius, "lipschitz": self.lipschitz, "bound": self.distance}


def estimated_bound(bend: float, step: Step, size: float, slope: float) -> Bound:
    """The bound, with its constants as far as they can be seen.

    R is twice the norm of the weights: those of the retrained model are assumed to be no longer.
    Where all curvature seen is positive, ‖∇F‖/λ_min is another one, and the smaller is taken.

    Args:
        bend: Distance between the gradient after the step and the one that a quadratic loss
            would have there: M ‖x‖²/2 at most.
        step: The step x.
        size: Norm of the weights before it.
        slope: Norm of the gradient before it.
    """
    length = float(step.x.norm())
    lipschitz = 2 * bend / length**2 if length else 0.0
    radius = 2 * size
    if step.low > 0:
        radius = min(radius, slope / step.low)
    return Bound(radius, lipschitz, step.damping, step.low, step.residual * slope)


def spread(distance: float, epsilon: float, delta: float) -> float:
    """σ = Δ √(2 ln(1.25/δ)) / ε: the Gaussian mechanism (Dwork & Roth 2014), for ε up to 1.

    >>> round(spread(1.0, 1.0, 1e-5), 3)
    4.845
    """
    return distance * math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def add_noise(network: nn.Module, sigma: float, mask: Mask | None, fit: Fit) -> None:
    """Add normal noise to every weight that is trained and kept, in place.

    Raises:
        DivergedError: If a weight is not finite afterwards.
    """
    draw = fit.generator("noise")
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.requires_grad and sigma:
                noise = sigma * torch.randn(p.shape, generator=draw)
                if mask is not None and name in mask:
                    noise.masked_fill_(~mask[name], 0.0)
                p.add_(noise.to(p))
            if not bool(torch.isfinite(p).all()):
                raise DivergedError(f"certified: {name!r} is not finite; raise the damping.")
