"""Retraining from fresh weights on the retained data: exact, and the yardstick of all others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from efface.data import Cohorts, Stream
from efface.errors import NeedsError
from efface.fitting import Fit, History
from efface.placement import preserved
from efface.seeds import own_seed, seed_for, seed_torch
from efface.task import Split
from efface.trained import TrainedModel, weights_digest


def train_from(
    fit: Fit,
    network: nn.Module,
    positions: Tensor,
    *,
    label: str = "train",
    cohorts: Cohorts | None = None,
) -> History:
    """Train a network as the task trains, on these records: the loop, or the owner's routine.

    Raises:
        NeedsError: If the task has a routine of its own and the model has a mask.
    """
    task = fit.task
    if task.train_fn is None:
        return fit(
            network,
            fit.descend,
            {"retain": Stream(positions, cohorts=cohorts)},
            task.fit,
            label=label,
        )
    if fit.recorder is not None or cohorts is not None:
        raise NeedsError(
            "a routine of your own (train_fn) takes its own steps: no log and no cohorts; leave "
            "train_fn out to record."
        )
    if fit.subject is not None and fit.subject.mask is not None:
        raise NeedsError(
            "a routine of your own (train_fn) cannot keep a mask; retrain a dense model, or leave "
            "train_fn out."
        )
    pair = isinstance(task.train, tuple) and len(task.train) == 2
    dataset = TensorDataset(*task.train) if pair else task.train
    with preserved(network):
        seed_torch(seed_for(fit.seed, "train_fn"), torch.device("cpu"))
        task.train_fn(network, Subset(dataset, positions.tolist()), fit.seed)
    fit.meter.images["retain"] = fit.meter.images.get("retain", 0) + len(positions)
    return []


def refresh(network: nn.Module, fresh: nn.Module) -> None:
    """Give a network the weights and all buffers of a fresh one, batch-norm's included."""
    there = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            tensor.copy_(there[name])


@dataclass(frozen=True)
class Retrain:
    """Train anew on D_r, from fresh weights, with a seed of its own.

    A pruned model keeps its mask (the *same-mask* reference): note that the mask was shaped by D_f
    too. Costs as much as the first training.
    """

    name: ClassVar[str] = "retrain"
    title: ClassVar[str] = "Retrain from scratch"
    paper: ClassVar[str] = "the gold standard"
    needs: ClassVar[frozenset[str]] = frozenset({"retain"})

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        fit = replace(fit, seed=own_seed(fit.seed), path="train")
        fresh = fit.fresh()
        trained.initial = {"seed": fit.seed, "digest": weights_digest(fresh.state_dict())}
        trained.initial_weights = None
        refresh(trained.network, fresh)
        trained.set_mask(trained.mask)
        train_from(fit, trained.network, split.retain, label=self.name)
