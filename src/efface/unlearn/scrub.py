"""SCRUB: a student that disobeys its teacher on the forgotten data and obeys on the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from efface.data import Batch
from efface.fitting import Clock, Fit
from efface.steps import rate
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.ascent import pick_cap
from efface.unlearn.base import check_ranges, fit_settings, positive_or_none, streams

TEMPERATURE = 4.0
"""Logits are divided by it in both distributions, as in the released code."""


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) at temperature 4, times its square, mean over the records.

    Args:
        student: Logits ``[B, C]``.
        teacher: Logits ``[B, C]``.

    Returns:
        A scalar, 0 where both answer alike.

    >>> z = torch.tensor([[1.0, -2.0]])
    >>> float(divergence(z, z))
    0.0
    """
    log_student = (student.float() / TEMPERATURE).log_softmax(1)
    log_teacher = (teacher.float() / TEMPERATURE).log_softmax(1)
    return TEMPERATURE**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(1).mean()


@dataclass(frozen=True)
class Scrub:
    """SCRUB: climb away from the trained model's answers on D_f, keep to them on D_r.

    Kurmanji et al. 2023. The teacher is the trained model, the student starts from it. Each of
    the first ``max_epochs`` epochs begins with a pass over D_f that maximises KL(teacher ‖
    student); every epoch ends with a pass over D_r that minimises γ CE + α KL. A batch of D_f
    whose loss has reached the cap adds no gradient (momentum and weight decay go on). The rate
    follows the task's schedule from epoch to epoch; every pass starts with fresh momentum.
    SCRUB+R's rewinding is not done: the cap serves its end.

    At the teacher's own weights the divergence has no slope. What gets the first pass away from
    there is batch norm in training mode, or dropout; a network with neither first climbs in the
    second epoch.

    Args:
        gamma: Weight γ of the cross-entropy on D_r.
        alpha: Weight α of the divergence on D_r.
        max_epochs: Epochs that begin with a pass over D_f.
        cap: Loss on D_f from which on a batch is not climbed; ``None``: see
            :func:`efface.unlearn.ascent.pick_cap`.
        epochs: Passes over D_r; ``None``: the task's default, else 3 as in the released code.
        lr: Peak rate; ``None``: the task's default, else a hundredth of the training's peak.
        bn: What happens to batch-norm statistics.
    """

    name: ClassVar[str] = "scrub"
    title: ClassVar[str] = "SCRUB"
    paper: ClassVar[str] = "Kurmanji et al. 2023"
    needs: ClassVar[frozenset[str]] = frozenset({"retain", "forget"})

    gamma: float = 0.99
    alpha: float = 0.001
    max_epochs: int = 2
    cap: float | None = None
    epochs: int | None = None
    lr: float | None = None
    bn: Literal["train", "frozen", "recalibrate"] = "train"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            gamma=("0 or more", 0 <= self.gamma < math.inf),
            alpha=("0 or more", 0 <= self.alpha < math.inf),
            max_epochs=("0 or more", self.max_epochs >= 0),
            cap=("positive", positive_or_none(self.cap)),
        )

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        teacher, cap = fit.teacher(trained), pick_cap(self.cap, trained, split, fit)

        def both(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            """Loss on a batch, and divergence from the teacher."""
            logits = fit.logits(network, batch).float()
            with torch.no_grad():
                wanted = fit.logits(teacher, batch)
            return fit.task.loss(logits, batch.targets), divergence(logits, wanted)

        def disobey(network: nn.Module, batches: dict[str, Batch], clock: Clock) -> Tensor:
            loss, distance = both(network, batches["forget"])
            return -distance * (loss.detach() < cap)

        def obey(network: nn.Module, batches: dict[str, Batch], clock: Clock) -> Tensor:
            loss, distance = both(network, batches["retain"])
            return self.gamma * loss + self.alpha * distance

        running = "frozen" if self.bn == "frozen" else "train"  # recalibrated once, at the end
        epochs = 3 if self.epochs is None else self.epochs
        lr = fit.task.fit.lr / 100 if self.lr is None else self.lr
        whole = fit_settings(fit, self, epochs=epochs, lr=lr, bn=running)
        for epoch in range(epochs):
            now = lr * rate(whole, epoch / epochs, epochs)
            one = replace(whole, epochs=1, lr=now, schedule="constant")
            if epoch < self.max_epochs:
                away = fit.at(f"max/{epoch}")
                away(trained.network, disobey, streams(split, "forget"), one, label="scrub max")
            if epoch == epochs - 1:
                one = replace(one, bn=self.bn)
            back = fit.at(f"min/{epoch}")
            back(trained.network, obey, streams(split, "retain"), one, label="scrub min")
