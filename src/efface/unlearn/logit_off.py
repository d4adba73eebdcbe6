"""The trivial baseline that every class-wise method must be compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from efface.errors import NeedsError
from efface.fitting import Fit
from efface.mask import classifier_name
from efface.task import Split
from efface.trained import TrainedModel

SHIFT = 100.0


@dataclass(frozen=True)
class LogitOff:
    """Switch off the output of the forgotten class: lower its bias by 100.

    Forgets nothing: the class is only never named. It scores a near-zero average gap at no cost,
    which is why a class-wise result is read together with the MIA AUC *inside* the class.
    """

    name: ClassVar[str] = "logit-off"
    title: ClassVar[str] = "Output switched off"
    paper: ClassVar[str] = "a control"
    needs: ClassVar[frozenset[str]] = frozenset({"class"})

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        weight = classifier_name(trained.network, fit.task.classifier)
        bias = dict(trained.network.named_parameters()).get(weight.removesuffix("weight") + "bias")
        if bias is None or split.label is None:
            raise NeedsError("logit-off needs an output layer with a bias; take another method.")
        with torch.no_grad():
            bias[split.label] -= SHIFT
