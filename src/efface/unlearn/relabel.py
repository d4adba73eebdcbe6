"""Random labels on the forgotten data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from efface.data import Stream
from efface.fitting import Fit
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.base import check_ranges, fit_settings


@dataclass(frozen=True)
class RandomLabel:
    """Train on D_r as it is and on D_f with wrong labels.

    Golatkar et al. 2020; Graves et al. 2021.

    Every record of D_f gets one label, drawn once, never its own.

    Args:
        epochs: Passes over D_f ∪ D_r; ``None``: the task's default, else a tenth of its training's.
        lr: Peak rate; ``None``: the task's default, else half of its training's peak.
        bn: What happens to batch-norm statistics.
    """

    name: ClassVar[str] = "random-label"
    title: ClassVar[str] = "Random labels"
    paper: ClassVar[str] = "Golatkar et al. 2020"
    needs: ClassVar[frozenset[str]] = frozenset({"retain", "forget"})

    epochs: int | None = None
    lr: float | None = None
    bn: Literal["train", "frozen", "recalibrate"] = "train"

    def __post_init__(self) -> None:
        check_ranges(self)

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        labels = wrong_labels(fit.task.records.targets, split.forget, fit.task.classes, fit)

        everyone = torch.cat([split.retain, split.forget]).sort().values
        settings = fit_settings(fit, self, epochs=self.epochs, lr=self.lr, bn=self.bn)
        stream = {"all": Stream(everyone, targets=labels)}
        fit(trained.network, fit.descend, stream, settings, label=self.name)


def wrong_labels(targets: Tensor, forget: Tensor, classes: int, fit: Fit) -> Tensor:
    """All labels ``[N]``, those at ``forget`` replaced by another class each, uniformly."""
    shift = torch.randint(1, classes, (len(targets),), generator=fit.generator("labels"))
    labels = targets.clone()
    labels[forget] = (targets[forget] + shift[forget]) % classes
    return labels
