"""Proximal l1: fine-tuning on the retained data whose l1 penalty makes weights exactly zero."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from efface.data import Batch
from efface.errors import MethodError
from efface.fitting import Clock, Fit, Params
from efface.mask import Mask, scope_names
from efface.steps import rate
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.base import check_ranges, fit_settings, streams
from efface.unlearn.finetune import L1Sparse


class SoftThreshold:
    """A step constraint: move weights towards zero by a step, and stop there.

    The proximal operator of s ‖θ‖₁: θ ← sign(θ) · max(|θ| − s, 0). What reaches zero is exactly
    zero (never −0.0).

    Args:
        names: Parameters that it acts on.

    Example:
        >>> prox = SoftThreshold({"w"})
        >>> prox.by = 0.5
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -0.25, -2.0]))
        >>> prox.end({"w": w})
        >>> w.tolist()
        [0.5, 0.0, -1.5]
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(names)
        self.by = 0.0

    def begin(self, params: Params) -> None:
        """Nothing: the step comes first."""

    def end(self, params: Params) -> None:
        """Shrink by ``by``."""
        if self.by == 0.0:
            return
        with torch.no_grad():
            for name in self.names & params.keys():
                weight = params[name]
                weight.sub_(weight.clamp(-self.by, self.by))


def zeros(network: nn.Module, names: Collection[str]) -> float:
    """Share of exact zeros in these parameters."""
    weights = [p.detach() for n, p in network.named_parameters() if n in names]
    total = sum(w.numel() for w in weights)
    return sum(int((w == 0).sum()) for w in weights) / total if total else 0.0


@dataclass(frozen=True)
class ProximalL1:
    """Proximal l1: l1-sparse with exact zeros, γ_e ‖θ‖₁ through its proximal operator.

    Fine-tunes on D_r; after every step at rate η each weight in scope moves towards zero by η γ_e
    and stops there (Parikh and Boyd 2014; the penalty is that of Jia et al. 2023). Biases and
    batch-norm scales are left out: a zero there kills a channel for no gain in sparsity. The share
    of zeros is recorded as ``zeros``.

    Args:
        alpha: Weight α of the penalty; ``None``: the task's default, else 5e-4. The operator acts
            outside momentum: at a momentum of 0.9 it takes about ten times the α of l1-sparse for
            the same pull.
        schedule: ``decay`` α(1 − e/E), ``constant`` α, or ``grow`` α e/E.
        scope: ``all`` weights with two dimensions or more, ``weights`` all of them but the
            classifier, or ``conv``.
        keep_mask: Install the zeros as the model's mask at the end, so that they stay.
        epochs: Passes over D_r; ``None``: the task's default, else a tenth of its training's.
        lr: Peak rate; ``None``: the task's default, else half of its training's peak.
        bn: What happens to batch-norm statistics.
    """

    name: ClassVar[str] = "proximal-l1"
    title: ClassVar[str] = "Proximal l1 fine-tuning"
    paper: ClassVar[str] = "Jia et al. 2023; Parikh and Boyd 2014"
    needs: ClassVar[frozenset[str]] = frozenset({"retain"})

    alpha: float | None = None
    schedule: Literal["decay", "constant", "grow"] = "decay"
    scope: Literal["all", "weights", "conv"] = "all"
    keep_mask: bool = False
    epochs: int | None = None
    lr: float | None = None
    bn: Literal["train", "frozen", "recalibrate"] = "train"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            alpha=("0 or more", self.alpha is None or 0 <= self.alpha < math.inf),
        )

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        alpha = 5e-4 if self.alpha is None else self.alpha
        penalty = L1Sparse(schedule=self.schedule)
        names = scope_names(trained.network, self.scope, fit.task.classifier)
        if not names:
            raise MethodError(
                f"proximal-l1: the network has no weight in the scope {self.scope!r}; use all."
            )
        settings = fit_settings(fit, self, epochs=self.epochs, lr=self.lr, bn=self.bn)
        shrink = SoftThreshold(names)

        def objective(network: nn.Module, batches: dict[str, Batch], clock: Clock) -> Tensor:
            gamma = penalty.gamma(alpha, clock.epoch, clock.epochs)
            shrink.by = gamma * settings.lr * rate(settings, clock.progress, clock.steps)
            return fit.descend(network, batches, clock)

        held = fit.with_(constraint=shrink)
        held(trained.network, objective, streams(split, "retain"), settings, label=self.name)
        fit.meter.facts["zeros"] = zeros(trained.network, names)
        if self.keep_mask:
            trained.set_mask(_with_zeros(trained, names))


def _with_zeros(trained: TrainedModel, names: Collection[str]) -> Mask:
    """The model's mask, and every zero of the named weights besides."""
    weights = dict(trained.network.named_parameters())
    old = dict(trained.mask or {})
    return Mask(old | {n: weights[n] != 0 for n in names})
