"""Influence unlearning: the step that a Newton method would take away from the forgotten data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from efface.curvature import gradient, inverse_fisher_product, projections
from efface.errors import DivergedError, MethodError
from efface.fitting import Fit
from efface.mask import Mask
from efface.task import Split
from efface.trained import TrainedModel

RELEASED = 1000
"""The constant of the released recursion; it stops after so many records and two."""

SHARE = 0.03
"""Length of the step against the weights, where no alpha is given."""


@dataclass(frozen=True)
class Influence:
    """IU: θ + α (λI + F)⁻¹ v, with F the Fisher information on D_r (Koh & Liang 2017).

    v = (1/n) Σ_{D_f} ∇ − (n_f/(n n_r)) Σ_{D_r} ∇: the change of the mean loss's gradient when the
    forgotten records lose their weight and the retained ones share it (Jia et al. 2023). So the
    step climbs the loss on D_f and descends on D_r. In eval mode; pruned weights stay zero.

    Args:
        alpha: Factor α of the step; ``None``: the task's default, else such that the step is 0.03
            times as long as the weights. 1 is the influence function's own.
        flavour: ``"exact"``: the true product with the inverse Fisher matrix of single records;
            ``"jia-code"``: the released recursion, which adds a multiple of the first record's
            gradient to v.
        records: Records of D_r in F, drawn by the seed; ``"jia-code"`` takes the first 1,002.
        damping: λ, of the exact flavour.
        memory: Bytes for per-sample gradients; those that do not fit are computed anew in every
            iteration.
    """

    name: ClassVar[str] = "influence"
    title: ClassVar[str] = "Influence unlearning (IU)"
    paper: ClassVar[str] = "Izzo et al. 2021; Koh & Liang 2017; Jia et al. 2023"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain"})

    alpha: float | None = None
    flavour: Literal["exact", "jia-code"] = "exact"
    records: int = 1000
    damping: float = 1e-2
    memory: int = 2 * 2**30

    def __post_init__(self) -> None:
        rules = {
            "alpha": ("finite", self.alpha is None or math.isfinite(self.alpha)),
            "records": ("1 or more", self.records >= 1),
            "damping": ("positive", 0 < self.damping < math.inf),
            "memory": ("positive", self.memory > 0),
        }
        for option, (rule, holds) in rules.items():
            if not holds:
                value = getattr(self, option)
                raise MethodError(f"{self.name}: {option} must be {rule}, not {value!r}.")

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        network, mask = trained.network, trained.mask
        v = removal(fit, network, split, mask)
        if self.flavour == "jia-code":
            step = released(fit, network, split.retain[: RELEASED + 2], v, mask, self.memory)
        else:
            drawn = torch.randperm(len(split.retain), generator=fit.generator("records"))
            chosen = split.retain[drawn[: self.records].sort().values]
            step = inverse_fisher_product(
                fit, network, chosen, v, damping=self.damping, memory=self.memory, mask=mask
            )
        move(network, step, self.alpha, fit)


def removal(fit: Fit, network: nn.Module, split: Split, mask: Mask | None) -> dict[str, Tensor]:
    """The vector (1/n) Σ_{D_f} ∇ − (n_f/(n n_r)) Σ_{D_r} ∇, zero where weights are pruned."""
    forget, retain = len(split.forget), len(split.retain)
    n = forget + retain
    up = torch.full((forget,), 1 / n)
    down = torch.full((retain,), -forget / (n * retain))
    v = gradient(fit, network, split.forget, weights=up, stream="forget")
    for name, g in gradient(fit, network, split.retain, weights=down).items():
        v[name] += g
    return masked(v, mask)


def masked(vector: dict[str, Tensor], mask: Mask | None) -> dict[str, Tensor]:
    """A vector whose entries at pruned weights are zero (in place)."""
    if mask is not None:
        for name, gone in mask.dropped(next(iter(vector.values())).device).items():
            if name in vector:
                vector[name].masked_fill_(gone, 0.0)
    return vector


def released(
    fit: Fit,
    network: nn.Module,
    positions: Tensor,
    v: Mapping[str, Tensor],
    mask: Mask | None,
    memory: int,
) -> dict[str, Tensor]:
    """What the released recursion comes to, without carrying its vectors.

    It goes o = g_1, k = v, and with t = ⟨o, g⟩ for each further record
    k ← k − ⟨k, g⟩/(N + t) o and o ← o − t/(N + t) o, N = 1000. As o is only ever
    rescaled, o = s g_1 and k = v + c g_1: two products per record, ⟨g_1, g_i⟩ and ⟨v, g_i⟩, are
    all that is needed.
    """
    start = masked(gradient(fit, network, positions[:1]), mask)
    if len(positions) == 1:
        return dict(v)
    s, c = 1.0, 0.0
    table = projections(fit, network, positions[1:], [start, v], memory=memory)
    for along, of_v in table.tolist():
        t = s * along
        c -= (of_v + c * along) / (RELEASED + t) * s
        s -= t / (RELEASED + t) * s
    return {name: v[name] + c * g for name, g in start.items()}


def move(network: nn.Module, step: Mapping[str, Tensor], alpha: float | None, fit: Fit) -> None:
    """θ + α · step, in place.

    Raises:
        DivergedError: If the step is not finite.
    """
    own = dict(network.named_parameters())
    size = math.sqrt(sum(float(own[n].detach().double().square().sum()) for n in step))
    length = math.sqrt(sum(float(g.double().square().sum()) for g in step.values()))
    if alpha is None:
        alpha = SHARE * size / length if length else 0.0
    if not math.isfinite(alpha * length):
        raise DivergedError("influence: the step is not finite; use a smaller alpha.")
    with torch.no_grad():
        for name, g in step.items():
            own[name].add_(g.to(own[name].device), alpha=alpha)
    fit.meter.facts |= {"alpha": alpha, "step": abs(alpha) * length / size if size else 0.0}
