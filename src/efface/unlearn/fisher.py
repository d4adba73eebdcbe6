"""Fisher forgetting: noise where the retained data does not need the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from efface.curvature import Labels, diagonal_fisher, evaluating
from efface.errors import DivergedError, MethodError
from efface.fitting import Fit
from efface.mask import Mask, classifier_name
from efface.task import Split
from efface.trained import TrainedModel

EPS = 1e-8
CEILING, HEAD_CEILING = 1e3, 1e2
"""Largest 1/F of a weight, and of a weight of the classifier."""

BOOST = 10.0
"""Factor of the variance of the classifier and of tensors with one dimension."""

ROW = 1e-4
"""Variance, before the boost, of the classifier's row of a class that is reset."""

SHARE = 0.1
"""Size of the noise against the weights, where no alpha is given."""

BATCH = 32
"""Batch size of the released arithmetic."""

RESET_SIZES = {(4500, 10), (450, 100)}
"""Sizes of D_f and numbers of classes for which the released code resets a row."""


@dataclass(frozen=True)
class FisherForgetting:
    """FF: add normal noise of variance α/F_j to every weight (Golatkar et al. 2020).

    F is the diagonal of the Fisher information on D_r: noise is large where the retained data does
    not mind. 1/F is bounded by 1e3 (1e2 in the classifier), averaged over dimension 1 of tensors
    that have one, and ten-fold in the classifier and in tensors with one dimension, as in the code
    of Jia et al. 2023. Reads D_r only. Pruned weights get no noise.

    Args:
        alpha: Factor α of the variance; ``None``: the task's default, else such that the noise is
            expected to be a tenth as long as the weights.
        flavour: ``"exact"``: the true diagonal, from per-sample gradients; ``"jia-code"``: the
            released arithmetic, squares of gradients averaged over batches of 32 in file order,
            with its reset of a classifier's row at certain sizes of D_f.
        labels: Of the exact flavour: squares of the gradients of the observed label, of a label
            sampled from the model, or their expectation over the model's labels.
        records: Records of D_r to use at most: drawn by the seed, or, as released, the first ones;
            ``None``: all.
        reset_class: Of the exact flavour and a split made by class: set the class's row of the
            classifier to zero, and give it noise of variance 1e-3 whatever α is, as released.
        memory: Bytes that a pass may hold.
    """

    name: ClassVar[str] = "fisher-forgetting"
    title: ClassVar[str] = "Fisher forgetting (FF)"
    paper: ClassVar[str] = "Golatkar et al. 2020; Jia et al. 2023"
    needs: ClassVar[frozenset[str]] = frozenset({"retain"})

    alpha: float | None = None
    flavour: Literal["exact", "jia-code"] = "exact"
    labels: Literal["observed", "sampled", "expected"] = "expected"
    records: int | None = None
    reset_class: bool = True
    memory: int = 256 * 2**20

    def __post_init__(self) -> None:
        rules = {
            "alpha": ("0 or more", self.alpha is None or 0 <= self.alpha < math.inf),
            "records": ("1 or more", self.records is None or self.records >= 1),
            "memory": ("positive", self.memory > 0),
        }
        for option, (rule, holds) in rules.items():
            if not holds:
                value = getattr(self, option)
                raise MethodError(f"{self.name}: {option} must be {rule}, not {value!r}.")

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        released = self.flavour == "jia-code"
        positions = _some(split.retain, self.records, fit, first=released)
        network, mask = trained.network, trained.mask
        if released:
            fisher = batch_fisher(fit, network, positions, mask)
        else:
            kind: Labels = self.labels
            fisher = diagonal_fisher(fit, network, positions, labels=kind, memory=self.memory)
        heads = _heads(network, fit, by_shape=released)
        spread = variances(
            {n: f.cpu() for n, f in fisher.items()}, heads, None if released else mask
        )
        row = self._row(split, fit.task.classes)
        perturb(network, spread, self.alpha, fit, mask, None if row is None else (row, heads))

    def _row(self, split: Split, classes: int) -> int | None:
        """The row of the classifier that is set to zero."""
        if self.flavour == "jia-code":
            special = (len(split.forget), classes) in RESET_SIZES
            return (-1 if split.label is None else split.label) if special else None
        return split.label if self.reset_class else None


def _some(positions: Tensor, most: int | None, fit: Fit, first: bool) -> Tensor:
    """At most so many positions: the first, or a draw of the seed's, in file order."""
    if most is None or most >= len(positions):
        return positions
    if first:
        return positions[:most]
    drawn = torch.randperm(len(positions), generator=fit.generator("records"))[:most]
    return positions[drawn.sort().values]


def _heads(network: nn.Module, fit: Fit, by_shape: bool) -> set[str]:
    """Names of the classifier's tensors; the released code takes all with a row per class."""
    weight = classifier_name(network, fit.task.classifier)
    bias = weight.removesuffix("weight") + "bias"
    return {
        name
        for name, p in network.named_parameters()
        if (p.shape[:1] == (fit.task.classes,) if by_shape else name in (weight, bias))
    }


def batch_fisher(
    fit: Fit, network: nn.Module, positions: Tensor, mask: Mask | None
) -> dict[str, Tensor]:
    """The released arithmetic: Σ_y mean_B p(y|x) (∇ mean_B loss(·, y))², averaged over batches.

    Squares of averaged gradients of batches of 32 in file order: biased low against the diagonal
    of the Fisher information. Weights behind a mask have no gradient.
    """
    plan = torch.split(positions, BATCH)
    with evaluating(network, fit.device):
        params = {n: p for n, p in network.named_parameters() if p.requires_grad}
        totals = {n: torch.zeros(p.shape, device=fit.device) for n, p in params.items()}
        for i, batch in enumerate(fit.task.records.batches(plan, fit.device)):
            with torch.enable_grad():
                logits = fit.logits(network, batch).float()
            chances = logits.detach().softmax(1).mean(0)
            for y, chance in enumerate(chances):
                with torch.enable_grad():
                    loss = fit.task.loss(logits, torch.full_like(batch.targets, y))
                found = torch.autograd.grad(
                    loss, list(params.values()), retain_graph=True, materialize_grads=True
                )
                for total, g in zip(totals.values(), found, strict=True):
                    total += chance * g.square()
            fit.meter.images["retain"] = fit.meter.images.get("retain", 0) + len(batch.targets)
            if fit.progress:
                fit.progress("batch Fisher", i + 1, len(plan))
        if mask is not None:
            for name, gone in mask.dropped(fit.device).items():
                if name in totals:
                    totals[name].masked_fill_(gone, 0.0)
    return {name: total / len(plan) for name, total in totals.items()}


def variances(
    fisher: Mapping[str, Tensor], heads: set[str], mask: Mask | None
) -> dict[str, Tensor]:
    """Variances for α = 1: bounded 1/F, averaged over dimension 1, boosted.

    Args:
        fisher: Name → diagonal of the Fisher information.
        heads: Names of the classifier's tensors.
        mask: Pruned weights are left out of the averages; ``None``: all count.
    """
    found = {}
    for name, f in fisher.items():
        v = (1 / (f + EPS)).clamp(max=HEAD_CEILING if name in heads else CEILING)
        if v.ndim > 1:
            keep = torch.ones_like(v) if mask is None or name not in mask else mask[name].to(v)
            count = keep.sum(1, keepdim=True).clamp(min=1)
            v = ((v * keep).sum(1, keepdim=True) / count).expand_as(f)
        found[name] = v * (BOOST if name in heads or v.ndim == 1 else 1)
    return found


def perturb(
    network: nn.Module,
    spread: Mapping[str, Tensor],
    alpha: float | None,
    fit: Fit,
    mask: Mask | None,
    reset: tuple[int, set[str]] | None,
) -> None:
    """Add the noise, in place.

    Args:
        network: Its weights are moved.
        spread: Variances for α = 1.
        alpha: Factor α, or None for its rule.
        fit: Supplies randomness and meter.
        mask: Pruned weights get no noise.
        reset: A row, and the tensors in which it is set to zero.

    Raises:
        DivergedError: If a weight is no longer finite.
    """
    own = dict(network.named_parameters())
    kept = {n: (v if mask is None or n not in mask else v * mask[n]) for n, v in spread.items()}
    size = math.sqrt(sum(float(own[n].detach().double().square().sum()) for n in kept))
    whole = sum(float(v.double().sum()) for v in kept.values())
    if alpha is None:
        alpha = (SHARE * size) ** 2 / whole if whole else 0.0
    moved, draw = 0.0, fit.generator("noise")
    with torch.no_grad():
        for name, v in kept.items():
            mean, v = own[name].detach().cpu().clone(), alpha * v
            if reset is not None and name in reset[1]:
                mean[reset[0]] = 0.0
                v[reset[0]] = ROW * BOOST
            new = mean + v.sqrt() * torch.randn(v.shape, generator=draw)
            if mask is not None and name in mask:
                new.masked_fill_(~mask[name], 0.0)
            if not bool(torch.isfinite(new).all()):
                raise DivergedError(f"fisher-forgetting broke {name!r}; use a smaller alpha.")
            moved += float((new - mean).double().square().sum())
            own[name].copy_(new)
    fit.meter.facts |= {"alpha": alpha, "noise": math.sqrt(moved) / size if size else 0.0}
