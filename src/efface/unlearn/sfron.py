"""SFRon: weighted ascent on the forgotten data, in the weights that it owns, amid fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from efface.data import Batch
from efface.fitting import Clock, Fit
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.ascent import pick_cap
from efface.unlearn.base import check_ranges, fit_settings, positive_or_none, streams
from efface.unlearn.ssd import squared_batch_gradients

EXPONENT = 0.5
"""Records weigh loss^−½ in the ascent: those known best are climbed most."""

LARGEST_NORM = 7.0
"""The masked, weighted gradient of the ascent is clipped to this norm, as in the released code."""

TINY = 1e-15


def record_losses(fit: Fit, logits: Tensor, targets: Tensor) -> Tensor:
    """The task's loss of every record by itself ``[B]``.

    Args:
        fit: Supplies the loss.
        logits: ``[B, C]``.
        targets: ``[B]``.
    """

    def one(z: Tensor, y: Tensor) -> Tensor:
        return fit.task.loss(z[None], y[None])

    try:
        losses: Tensor = torch.vmap(one)(logits, targets)
    except RuntimeError:  # a loss of the user's whose control flow depends on values
        losses = torch.stack([one(z, y) for z, y in zip(logits, targets, strict=True)])
    return losses


def adaptive(losses: Tensor, cap: float) -> Tensor:
    """Mean of the losses, each capped and weighted by loss^−½; the weights' mean is 1.

    >>> round(float(adaptive(torch.tensor([1.0, 4.0]), cap=9.0)), 6)  # weights 4/3 and 2/3
    2.0
    """
    weights = 1 / (losses.detach() ** EXPONENT + TINY)
    return (weights / weights.mean() * losses.clamp(max=cap)).mean()


def owned(forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], threshold: float) -> Tensor:
    """Which weights matter at least ``threshold`` times as much to D_f as to D_r, flat ``[P]``."""
    return torch.cat(
        [((forget[n] + TINY) / (retain[n] + TINY) >= threshold).reshape(-1) for n in forget]
    )


@dataclass(frozen=True)
class SFRon:
    """SFRon: fine-tune on D_r, and in every ``period``-th step also climb on D_f.

    Saliency-forgetting in the remain-preserving manifold, online (Huang et al. 2024). The ascent's
    loss weighs records of D_f by loss^−½, so that those known best go first; its gradient is
    restricted to weights whose squared gradients on D_f are at least ``threshold`` times those on
    D_r, clipped to norm 7, and its weight falls as a cosine to zero. Records stop counting at the
    cap.

    Args:
        alpha: Weight of the ascent at the start.
        period: Steps from one ascent to the next.
        threshold: Ratio γ from which on a weight takes part in the ascent.
        cap: Loss of a record beyond which it is not climbed; ``None``: see
            :func:`efface.unlearn.ascent.pick_cap`.
        epochs: Passes over D_r; ``None``: the task's default, else a tenth of its training's.
        lr: Peak rate; ``None``: the task's default, else a tenth of the training's peak.
        bn: What happens to batch-norm statistics.
    """

    name: ClassVar[str] = "sfron"
    title: ClassVar[str] = "SFRon"
    paper: ClassVar[str] = "Huang et al. 2024"
    needs: ClassVar[frozenset[str]] = frozenset({"retain", "forget"})

    alpha: float | None = None
    period: int = 5
    threshold: float = 1.0
    cap: float | None = None
    epochs: int | None = None
    lr: float | None = None
    bn: Literal["train", "frozen", "recalibrate"] = "train"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            alpha=("0 or more", self.alpha is None or 0 <= self.alpha < math.inf),
            period=("1 or more", self.period >= 1),
            threshold=("0 or more", 0 <= self.threshold < math.inf),
            cap=("positive", positive_or_none(self.cap)),
        )

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        alpha = 25.0 if self.alpha is None else self.alpha
        cap, size = pick_cap(self.cap, trained, split, fit), fit.task.fit.batch_size
        shares = [
            squared_batch_gradients(fit, trained.network, getattr(split, part), size, part)
            for part in ("forget", "retain")
        ]
        own = owned(shares[0], shares[1], self.threshold).to(fit.device)
        fit.meter.facts["salient"] = int(own.sum())

        def objective(network: nn.Module, batches: dict[str, Batch], clock: Clock) -> Tensor:
            loss = fit.loss(network, batches["retain"])
            if "forget" not in batches:
                return loss
            weight = alpha * (1 + math.cos(math.pi * clock.progress)) / 2
            return loss - weighted_ascent(fit, network, batches["forget"], own, weight, cap)

        lr = fit.task.fit.lr / 10 if self.lr is None else self.lr
        settings = fit_settings(fit, self, epochs=self.epochs, lr=lr, bn=self.bn)
        every = streams(split, "retain", "forget", forget={"period": self.period})
        fit(trained.network, objective, every, settings, label=self.name)


def weighted_ascent(
    fit: Fit, network: nn.Module, batch: Batch, own: Tensor, weight: float, cap: float
) -> Tensor:
    """A scalar of value 0 whose gradient is the ascent's: weighted, restricted and clipped.

    The restriction concerns this part alone, so it cannot be a constraint on the step: the
    gradient is taken here, and enters the objective as a linear function of the weights.

    Args:
        fit: Supplies loss and batch adapter.
        network: Whose weights take gradients.
        batch: Of D_f.
        own: Which weights take part, flat ``[P]``.
        weight: Factor of the ascent.
        cap: Loss of a record beyond which it does not count.
    """
    params = [p for p in network.parameters() if p.requires_grad]
    losses = record_losses(fit, fit.logits(network, batch).float(), batch.targets)
    climb = weight * adaptive(losses, cap)
    found = torch.autograd.grad(climb, params, materialize_grads=True)
    sizes = [p.numel() for p in params]
    flat = torch.cat([g.float().reshape(-1) for g in found]) * own
    flat = flat * (LARGEST_NORM / flat.norm().clamp(min=LARGEST_NORM))
    slopes = flat.split(sizes)
    linear = torch.stack(
        [(g.reshape(p.shape) * (p - p.detach())).sum() for g, p in zip(slopes, params, strict=True)]
    )
    return linear.sum()
