"""Random labels on the forgotten data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from efface.data import Stream
from efface.fitting import Fit
from efface.task import Settings, Split
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
        retain: Train on D_r, too, as Graves et al. 2021 do; else on D_f with wrong labels alone.
    """

    name: ClassVar[str] = "random-label"
    title: ClassVar[str] = "Random labels"
    paper: ClassVar[str] = "Golatkar et al. 2020"

    epochs: int | None = None
    lr: float | None = None
    bn: Literal["train", "frozen", "recalibrate"] = "train"
    retain: bool = True

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def needs(self) -> frozenset[str]:
        """D_f, and D_r where it is trained on."""
        return frozenset({"forget"} | ({"retain"} if self.retain else set()))

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        settings = fit_settings(fit, self, epochs=self.epochs, lr=self.lr, bn=self.bn)
        train_relabelled(trained, split, fit, settings, label=self.name, retain=self.retain)


def train_relabelled(
    trained: TrainedModel,
    split: Split,
    fit: Fit,
    settings: Settings,
    *,
    label: str,
    retain: bool = True,
) -> None:
    """Train a model on D_f with a wrong label each, and on D_r as it is."""
    labels = wrong_labels(fit.task.records.targets, split.forget, fit.task.classes, fit)
    everyone = torch.cat([split.retain, split.forget]).sort().values
    stream = {"all": Stream(everyone if retain else split.forget, targets=labels)}
    fit(trained.network, fit.descend, stream, settings, label=label)


def wrong_labels(targets: Tensor, forget: Tensor, classes: int, fit: Fit) -> Tensor:
    """All labels ``[N]``, those at ``forget`` replaced by another class each, uniformly."""
    shift = torch.randint(1, classes, (len(targets),), generator=fit.generator("labels"))
    labels = targets.clone()
    labels[forget] = (targets[forget] + shift[forget]) % classes
    return labels
