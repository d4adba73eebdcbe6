"""Fine-tuning on the retained data, plain (FT) and with an l1 penalty (l1-sparse)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from efface.data import Batch
from efface.fitting import Clock, Fit
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.base import check_ranges, fit_settings, streams


@dataclass(frozen=True)
class FineTune:
    """FT: go on training on D_r and rely on forgetting what is no longer rehearsed.

    Cheap and gentle; on its own it forgets little (Jia et al. 2023, main table: UA 22.5 % where
    retraining has 100 %). Source: Warnecke et al. 2021; Golatkar et al. 2020.

    Args:
        epochs: Passes over D_r; ``None``: the task's default, else a tenth of its training's.
        lr: Peak rate; ``None``: the task's default, else half of its training's peak.
        bn: What happens to batch-norm statistics.
    """

    name: ClassVar[str] = "finetune"
    title: ClassVar[str] = "Fine-tuning (FT)"
    paper: ClassVar[str] = "Warnecke et al. 2021"
    needs: ClassVar[frozenset[str]] = frozenset({"retain"})

    epochs: int | None = None
    lr: float | None = None
    bn: Literal["train", "frozen", "recalibrate"] = "train"

    def __post_init__(self) -> None:
        check_ranges(self)

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        settings = fit_settings(fit, self, epochs=self.epochs, lr=self.lr, bn=self.bn)
        fit(trained.network, fit.descend, streams(split, "retain"), settings, label=self.name)


def l1_norm(network: nn.Module) -> Tensor:
    """Sum of absolute values of every trainable parameter, as the paper's code takes it."""
    return torch.stack([p.abs().sum() for p in network.parameters() if p.requires_grad]).sum()


@dataclass(frozen=True)
class L1Sparse:
    """l1-sparse: fine-tune on D_r under an l1 penalty, loss = CE(D_r) + γ_e ‖θ‖₁.

    Sparsity-aware unlearning of Jia et al. 2023. By default γ falls linearly, γ_e =
    α(1 − e/E) in epoch e of E, as in the released code. The penalty acts through plain
    sub-gradients, as there: weights shrink, none becomes exactly zero.

    Args:
        alpha: Weight α of the penalty; ``None``: the task's default, else 5e-4, which others use
            for a ResNet-18 with 11 M weights (a small network needs more in a few epochs).
        schedule: ``decay`` α(1 − e/E), ``constant`` α, or ``grow`` α e/E.
        epochs: Passes over D_r; ``None``: the task's default, else a tenth of its training's.
        lr: Peak rate; ``None``: the task's default, else half of its training's peak.
        bn: What happens to batch-norm statistics.
    """

    name: ClassVar[str] = "l1-sparse"
    title: ClassVar[str] = "l1-sparse fine-tuning"
    paper: ClassVar[str] = "Jia et al. 2023"
    needs: ClassVar[frozenset[str]] = frozenset({"retain"})

    alpha: float | None = None
    schedule: Literal["decay", "constant", "grow"] = "decay"
    epochs: int | None = None
    lr: float | None = None
    bn: Literal["train", "frozen", "recalibrate"] = "train"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            alpha=("0 or more", self.alpha is None or 0 <= self.alpha < math.inf),
        )

    def gamma(self, alpha: float, epoch: int, epochs: int) -> float:
        """The penalty's weight in an epoch.

        >>> [L1Sparse().gamma(1.0, e, 4) for e in range(4)]
        [1.0, 0.75, 0.5, 0.25]
        """
        factors = {"decay": 1 - epoch / epochs, "constant": 1.0, "grow": epoch / epochs}
        return alpha * factors[self.schedule]

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        alpha = 5e-4 if self.alpha is None else self.alpha

        def objective(network: nn.Module, batches: dict[str, Batch], clock: Clock) -> Tensor:
            gamma = self.gamma(alpha, clock.epoch, clock.epochs)
            return fit.descend(network, batches, clock) + gamma * l1_norm(network)

        settings = fit_settings(fit, self, epochs=self.epochs, lr=self.lr, bn=self.bn)
        fit(trained.network, objective, streams(split, "retain"), settings, label=self.name)
