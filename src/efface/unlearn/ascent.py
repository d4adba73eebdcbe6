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
from efface.fitting import Clock, Fit, Params
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


class Clipped:
    """A step constraint: a gradient longer than ``limit`` is shortened to it, all tensors together.

    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> net.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> Clipped(1.0).begin(dict(net.named_parameters()))
    >>> net.weight.grad
    tensor([[0.6000, 0.8000]])
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def begin(self, params: Params) -> None:
        """Shorten the gradient."""
        slopes = [p.grad for p in params.values() if p.grad is not None]
        length = _length(slopes)
        if length > self.limit:
            torch._foreach_mul_(slopes, self.limit / length)

    def end(self, params: Params) -> None:
        """Nothing."""


class Ball:
    """A step constraint: weights stay within ``radius`` of where they began (Euclidean).

    What a step moved is projected: the nearest point of the ball that differs from where the step
    led in these entries only. So it holds together with constraints that let a part move.

    Args:
        trained: Its weights are the centre; what its mask drops is left out.
        radius: In units of the weights.
    """

    def __init__(self, trained: TrainedModel, radius: float) -> None:
        self.trained, self.radius = trained, radius
        self.centre = {n: p.detach().clone() for n, p in trained.network.named_parameters()}
        self.before: dict[str, Tensor] = {}

    def begin(self, params: Params) -> None:
        """Keep the old values."""
        self.before = {n: p.detach().clone() for n, p in params.items()}

    def end(self, params: Params) -> None:
        """Pull what moved towards the centre where the ball was left."""
        with torch.no_grad():
            if self.trained.mask is not None:
                device = next(iter(params.values())).device
                for name, gone in self.trained.mask.dropped(device).items():
                    params[name].masked_fill_(gone, 0.0)
            centre = {n: self.centre[n].to(p.device) for n, p in params.items()}
            moved = {n: p != self.before[n] for n, p in params.items()}
            away = {n: p - centre[n] for n, p in params.items()}
            free = _length([t * moved[n] for n, t in away.items()])
            rest = _length([t * ~moved[n] for n, t in away.items()])
            if not free or math.hypot(free, rest) <= self.radius:
                return
            scale = math.sqrt(max(0.0, self.radius**2 - rest**2)) / free
            for name, param in params.items():
                pulled = centre[name] + scale * away[name]
                param.copy_(torch.where(moved[name], pulled, param))


def _length(tensors: list[Tensor]) -> float:
    """Euclidean norm of all tensors together."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


@dataclass(frozen=True)
class GradientAscent:
    """GA: climb the loss on D_f (Thudi et al. 2022; Graves et al. 2021).

    Loss = −min(CE(D_f), cap). Reads D_f only. Batch-norm statistics stay frozen by default: on
    batches of one class they would drift towards it and damage everything else for that reason
    alone. Cap, clip and radius bound how far it climbs; each is off or on by itself.

    Args:
        epochs: Passes over D_f; ``None``: the task's default, else 5 as in Jia et al. 2023.
        lr: Peak rate; ``None``: the task's default, else a hundredth of the training's peak.
        cap: The forget loss is not climbed beyond; ``None``: see :func:`pick_cap`.
        bn: What happens to batch-norm statistics.
        clip: A longer gradient is shortened to this norm; ``None``: none is.
        radius: Weights go no further than this share of their own norm, ‖θ − θ_o‖ ≤ radius · ‖θ_o‖;
            ``None``: however far.
    """

    name: ClassVar[str] = "gradient-ascent"
    title: ClassVar[str] = "Gradient ascent (GA)"
    paper: ClassVar[str] = "Thudi et al. 2022"
    needs: ClassVar[frozenset[str]] = frozenset({"forget"})

    epochs: int | None = None
    lr: float | None = None
    cap: float | None = None
    bn: Literal["train", "frozen"] = "frozen"
    clip: float | None = None
    radius: float | None = None

    def __post_init__(self) -> None:
        options = ("cap", "clip", "radius")
        rules = {name: ("positive", positive_or_none(getattr(self, name))) for name in options}
        check_ranges(self, **rules)

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        cap = pick_cap(self.cap, trained, split, fit)

        def objective(network: nn.Module, batches: dict[str, Batch], clock: Clock) -> Tensor:
            return -fit.loss(network, batches["forget"]).clamp(max=cap)

        epochs = 5 if self.epochs is None else self.epochs
        lr = fit.task.fit.lr / 100 if self.lr is None else self.lr
        settings = fit_settings(fit, self, epochs=epochs, lr=lr, bn=self.bn)
        held = self._guarded(trained, fit)
        held(trained.network, objective, streams(split, "forget"), settings, label=self.name)

    def _guarded(self, trained: TrainedModel, fit: Fit) -> Fit:
        """The handle with the guard rails that are on."""
        if self.clip is not None:
            fit = fit.with_(constraint=Clipped(self.clip))
        if self.radius is not None:
            weights = [p.detach() for p in trained.network.parameters() if p.requires_grad]
            rho = fit.meter.facts["radius"] = self.radius * _length(weights)
            fit = fit.with_(constraint=Ball(trained, rho))
        return fit


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
