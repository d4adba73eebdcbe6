"""Checkpoint difference: what the forget set did to the first epochs, undone in the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from efface.errors import MethodError, NeedsError
from efface.fitting import Fit
from efface.replay import replay
from efface.sparsify import rewind_epoch
from efface.sparsify.units import refreshed_statistics
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.base import positive_or_none
from efface.unlearn.ledger import open_log, same_run
from efface.unlearn.replaying import recorded_cohorts


@dataclass(frozen=True)
class CheckpointDifference:
    """Replay the first K epochs without D_f, and move the weights by the difference.

    θ ← θ + c (θ′_K − θ_K), where θ_K are the rewind weights (kept after K epochs of training on D),
    and θ′_K comes from the same initial weights by the same K epochs, in the recorded order, batch
    by batch, the records of D_f left out of theirs. Nothing but D_f differs between the two, so
    that hardly any noise of SGD is in the difference. In the network as it is; a mask that it has
    holds. To move the mask, too, put it into :class:`~efface.unlearn.FromDense`.

    The model then keeps θ′_K as its rewind weights, which have never seen D_f: the next request can
    be met in the same way, and rewinding stays possible. Of a model that was trained with cohorts,
    the log of its training is needed, too: the order was theirs.

    Args:
        scale: Factor c. Larger ones than 1 move the mask less well.
        rate: Learning rates of the replay: ``matched`` lowers them by the steps per epoch that a
            training on D_r alone has, over those of the recorded one, so that the replay goes as
            far in an epoch as retraining does; ``recorded`` takes them as they were.
    """

    name: ClassVar[str] = "checkpoint-difference"
    title: ClassVar[str] = "Difference of early checkpoints"
    paper: ClassVar[str] = "efface"
    needs: ClassVar[frozenset[str]] = frozenset({"retain", "initial", "rewind"})

    scale: float = 1.0
    rate: Literal["matched", "recorded"] = "matched"

    def __post_init__(self) -> None:
        if not positive_or_none(self.scale):
            raise MethodError(f"{self.name}: scale must be positive, not {self.scale}.")

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        epochs = rewind_epoch(trained)
        if epochs is None or trained.rewind is None:
            raise NeedsError(
                "at which epoch the rewind weights were kept is not known; train with --rewind K."
            )
        step = trained.trained_by()
        everyone = torch.arange(len(trained.task.records))
        if step is not None and step.verb == "retrain":
            everyone = torch.cat([split.retain, split.forget]).sort().values
        cohorts = None
        if trained.log is not None:
            with open_log(trained) as log:
                same_run(log, trained)
                cohorts = recorded_cohorts(log)
        matched, left = self.rate == "matched", split.retain
        network = replay(trained, left, everyone, fit, epochs, matched=matched, cohorts=cohorts)
        again = network.state_dict()
        with torch.no_grad():
            for name, weight in trained.network.named_parameters():
                apart = again[name].double() - trained.rewind[name].double()
                weight.copy_(weight.double() + self.scale * apart)
        trained.set_mask(trained.mask)
        refreshed_statistics(trained, split.retain, fit)  # those of batch norm do not add up
        trained.rewind = {n: t.detach().cpu().clone() for n, t in again.items()}
