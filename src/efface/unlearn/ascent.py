"""Gradient ascent on the forgotten data: GA and NegGrad+, both with a capped forget loss.

Without a cap, climbing the loss on D_f either does nothing or destroys the network. With one,
climbing stops where records look like records that were never seen. That does not make GA safe:
with nothing to hold the rest in place it can still wreck it (see the CIFAR-10 demo's results).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from efface.data import Batch, chunks
from efface.fitting import Clock, Fit
from efface.placement import preserved
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.base import check_ranges, fit_settings, positive_or_none, streams

CLASS_CAP = 8.0
"""Cap where D_f holds all records of its classes: e⁻⁸ is what a class never seen gets."""


def pick_cap(given: float | None, trained: TrainedModel, split: Split, fit: Fit) -> float:
    """The cap of the forget loss.

    The one given; else 8 where D_r holds no record of the classes in D_f; else the loss on the
    task's validation records, which were never trained on; else, without any, ln(classes)/2.
    """
    cap = given if given is not None else _natural_cap(trained, split, fit)
    fit.meter.facts["cap"] = cap
    return cap


def _natural_cap(trained: TrainedModel, split: Split, fit: Fit) -> float:
    targets = fit.task.records.targets
    if not torch.isin(targets[split.retain], targets[split.forget]).any():
        return CLASS_CAP
    if fit.task.validation is None:
        return math.log(fit.task.classes) / 2
    from efface.data import as_records

    records = as_records(fit.task.validation, collate=fit.task.collate)
    network = fit.teacher(trained)
    total = 0.0
    with preserved(network), torch.no_grad():
        for batch in records.batches(chunks(torch.arange(len(records)), 500), fit.device):
            total += float(fit.loss(network, batch)) * len(batch.targets)
    return total / len(records)


@dataclass(frozen=True)
class GradientAscent:
    """GA: climb the loss on D_f (Thudi et al. 2022; Graves et al. 2021).

    Loss = −min(CE(D_f), cap). Reads D_f only. Batch-norm statistics stay frozen by default: on
    batches of one class they would drift towards it and damage everything else for that reason
    alone.

    Args:
        epochs: Passes over D_f; ``None``: the task's default, else 5 as in Jia et al. 2023.
        lr: Peak rate; ``None``: the task's default, else a hundredth of the training's peak.
        cap: The forget loss is not climbed beyond; ``None``: see :func:`pick_cap`.
        bn: What happens to batch-norm statistics.
    """

    name: ClassVar[str] = "gradient-ascent"
    title: ClassVar[str] = "Gradient ascent (GA)"
    paper: ClassVar[str] = "Thudi et al. 2022"
    needs: ClassVar[frozenset[str]] = frozenset({"forget"})

    epochs: int | None = None
    lr: float | None = None
    cap: float | None = None
    bn: Literal["train", "frozen"] = "frozen"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            cap=("positive", positive_or_none(self.cap)),
        )

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        cap = pick_cap(self.cap, trained, split, fit)

        def objective(network: nn.Module, batches: dict[str, Batch], clock: Clock) -> Tensor:
            return -fit.loss(network, batches["forget"]).clamp(max=cap)

        epochs = 5 if self.epochs is None else self.epochs
        lr = fit.task.fit.lr / 100 if self.lr is None else self.lr
        settings = fit_settings(fit, self, epochs=epochs, lr=lr, bn=self.bn)
        fit(trained.network, objective, streams(split, "forget"), settings, label=self.name)


@dataclass(frozen=True)
class NegGradPlus:
    """NegGrad+: descend on D_r, climb on D_f (Kurmanji et al. 2023).

    Loss = CE(D_r) − β min(CE(D_f), cap): every step takes a batch of each.

    Args:
        beta: Weight β of the ascent.
        cap: The forget loss is not climbed beyond; ``None``: see :func:`pick_cap`.
        epochs: Passes over D_r; ``None``: the task's default, else a tenth of its training's.
        lr: Peak rate; ``None``: the task's default, else half of its training's peak.
        bn: What happens to batch-norm statistics.
    """

    name: ClassVar[str] = "neggrad-plus"
    title: ClassVar[str] = "NegGrad+ (capped)"
    paper: ClassVar[str] = "Kurmanji et al. 2023"
    needs: ClassVar[frozenset[str]] = frozenset({"retain", "forget"})

    beta: float = 0.5
    cap: float | None = None
    epochs: int | None = None
    lr: float | None = None
    bn: Literal["train", "frozen", "recalibrate"] = "train"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            beta=("0 or more", 0 <= self.beta < math.inf),
            cap=("positive", positive_or_none(self.cap)),
        )

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        cap = pick_cap(self.cap, trained, split, fit)

        def objective(network: nn.Module, batches: dict[str, Batch], clock: Clock) -> Tensor:
            forget = fit.loss(network, batches["forget"]).clamp(max=cap)
            return fit.loss(network, batches["retain"]) - self.beta * forget

        settings = fit_settings(fit, self, epochs=self.epochs, lr=self.lr, bn=self.bn)
        both = streams(split, "retain", "forget")
        fit(trained.network, objective, both, settings, label=self.name)
