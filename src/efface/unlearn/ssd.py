"""SSD, selective synaptic dampening: shrink the weights that the forgotten data leans on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from efface.curvature import diagonal_fisher
from efface.errors import MethodError
from efface.fitting import Fit
from efface.placement import placed, preserved
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.base import positive_or_none

PAPER_ALPHA = 10.0
"""The paper's threshold for image classifiers."""


def squared_batch_gradients(
    fit: Fit, network: nn.Module, positions: Tensor, size: int, purpose: str
) -> dict[str, Tensor]:
    """Mean over batches of the squared gradient of a *batch's* loss, as released codes take it.

    Not the Fisher information: squaring after averaging lets gradients of a batch cancel, so the
    value depends on the batch size. Cheaper than per-record gradients, and what the papers' own
    thresholds were found with. Batches are shuffled, un-augmented, in eval mode and fp32.

    Args:
        fit: Supplies task, device, randomness and the count of images.
        network: Left as found.
        positions: Which records ``[n]``.
        size: Records per batch.
        purpose: Names the shuffle, and what the images are counted under.

    Returns:
        Name → float32 tensor of the parameter's shape, for every parameter that takes gradients.
    """
    draw = torch.randperm(len(positions), generator=fit.generator(f"batches/{purpose}"))
    plan = torch.split(positions[draw], size)
    named = {n: p for n, p in network.named_parameters() if p.requires_grad}
    with preserved(network), placed(network, fit.device, train=False):
        network.eval()
        total = {n: torch.zeros_like(p) for n, p in named.items()}
        for done, batch in enumerate(fit.task.records.batches(plan, fit.device), 1):
            loss = fit.loss(network, batch)
            found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
            for sum_, g in zip(total.values(), found, strict=True):
                sum_.addcmul_(g, g, value=1 / len(plan))
            if fit.progress:
                fit.progress(purpose, done, len(plan))
    images = fit.meter.images
    images[purpose] = images.get(purpose, 0) + len(positions)
    return {n: t.contiguous() for n, t in total.items()}


def dampen_(
    weights: Mapping[str, Tensor],
    forget: Mapping[str, Tensor],
    everyone: Mapping[str, Tensor],
    alpha: float,
    lam: float,
) -> int:
    """Shrink, in place, weights with I_f > α I_D by min(λ I_D / I_f, 1).

    Args:
        weights: Name → weights.
        forget: Name → importance I_f on D_f.
        everyone: Name → importance I_D on all data.
        alpha: Threshold α of the selection.
        lam: Strength λ: the smaller, the harder.

    Returns:
        How many weights were selected.

    >>> w = {"w": torch.tensor([1.0, 1.0, 1.0])}
    >>> dampen_(w, {"w": torch.tensor([8.0, 1.0, 0.0])}, {"w": torch.tensor([2.0, 1.0, 0.0])}, 3, 1)
    1
    >>> w["w"]
    tensor([0.2500, 1.0000, 1.0000])
    """
    count = 0
    with torch.no_grad():
        for name, weight in weights.items():
            own, all_ = forget[name].to(weight.device), everyone[name].to(weight.device)
            chosen = own > alpha * all_
            factor = (lam * all_ / own).clamp(max=1.0)
            weight.copy_(torch.where(chosen, weight * factor, weight))
            count += int(chosen.sum())
    return count


@dataclass(frozen=True)
class SSD:
    """SSD: dampen the weights that matter much more to D_f than to the data as a whole.

    Selective synaptic dampening of Foster et al. 2024. Importance is the diagonal of the Fisher
    information, I_f on D_f and I_D on D_f ∪ D_r. Where I_f > α I_D, θ ← θ · min(λ I_D / I_f, 1).
    No training, no epochs: one pass over the data. Batch-norm scales and biases are weights, too.

    Per record, I_D holds D_f's share: I_f / I_D never exceeds n / n_f, so that the paper's α = 10
    selects nothing in a tenth of the data. It was found with the squares of batch averages.

    Args:
        alpha: Threshold α; ``None``: the task's default, else √(n / n_f), at most 10, and 10 with
            ``batched``, as in the paper.
        lam: Strength λ; the smaller, the harder. The paper's is 1.
        batched: ``None``: exact per-record gradients of the observed label. A number: square the
            average gradient of batches of that size, as the released code does.
    """

    name: ClassVar[str] = "ssd"
    title: ClassVar[str] = "Selective synaptic dampening (SSD)"
    paper: ClassVar[str] = "Foster et al. 2024"
    needs: ClassVar[frozenset[str]] = frozenset({"retain", "forget"})

    alpha: float | None = None
    lam: float = 1.0
    batched: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "alpha": ("positive", positive_or_none(self.alpha)),
            "lam": ("0 or more", 0 <= self.lam < math.inf),
            "batched": ("1 or more", self.batched is None or self.batched >= 1),
        }
        for option, (rule, holds) in rules.items():
            if not holds:
                value = getattr(self, option)
                raise MethodError(f"ssd: {option} must be {rule}, not {value!r}.")

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        forget, everyone = self._importances(trained, split, fit)
        alpha = self._threshold(split)
        weights = {n: p for n, p in trained.network.named_parameters() if n in forget}
        selected = dampen_(weights, forget, everyone, alpha, self.lam)
        fit.meter.facts |= {"alpha": alpha, "dampened": selected}

    def _threshold(self, split: Split) -> float:
        if self.alpha is not None:
            return self.alpha
        if self.batched is not None:
            return PAPER_ALPHA
        n = len(split.forget) + len(split.retain)
        return min(PAPER_ALPHA, math.sqrt(n / len(split.forget)))

    def _importances(
        self, trained: TrainedModel, split: Split, fit: Fit
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """I_f and I_D."""
        network = trained.network
        if self.batched is not None:
            everyone = torch.cat([split.retain, split.forget])
            return (
                squared_batch_gradients(fit, network, split.forget, self.batched, "forget"),
                squared_batch_gradients(fit, network, everyone, self.batched, "all"),
            )
        own = diagonal_fisher(fit, network, split.forget, stream="forget")
        rest = diagonal_fisher(fit, network, split.retain)
        share = len(split.forget) / (len(split.forget) + len(split.retain))
        # a mean over records: D's is the weighted mean of its parts', so no record is read twice
        return own, {n: share * own[n] + (1 - share) * rest[n] for n in own}
