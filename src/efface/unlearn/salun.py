"""SalUn: random labels on the forgotten data, in the weights that matter to it only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from efface.curvature import gradient
from efface.data import Stream
from efface.fitting import Fit, Params
from efface.mask import Mask
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.base import check_ranges, fit_settings
from efface.unlearn.relabel import wrong_labels


class Frozen:
    """A step constraint: entries that are not selected keep their values, bit for bit.

    Values are put back after the step rather than gradients zeroed before it, so that neither
    momentum, nor Adam's moments, nor weight decay move them.

    Args:
        network: Its present weights are the ones kept.
        selected: Parameter name → bool tensor: which entries may move. Parameters that are not
            named do not move.

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> old = net.weight.detach().clone()
        >>> keep = Frozen(net, {"weight": torch.tensor([[True, False]])})
        >>> with torch.no_grad():
        ...     _ = net.weight.add_(1.0)
        >>> keep.end(dict(net.named_parameters()))
        >>> torch.equal(net.weight, old + torch.tensor([[1.0, 0.0]]))
        True
    """

    def __init__(self, network: nn.Module, selected: Mapping[str, Tensor]) -> None:
        self.kept = {n: p.detach().clone() for n, p in network.named_parameters()}
        self.selected = dict(selected)
        self._placed: dict[str, tuple[Tensor, Tensor]] = {}

    def begin(self, params: Params) -> None:
        """Nothing: the values are known."""

    def end(self, params: Params) -> None:
        """Put back what was not selected."""
        with torch.no_grad():
            for name, param in params.items():
                still, value = self._on(name, param)
                torch.where(still, value, param, out=param)

    def _on(self, name: str, param: Tensor) -> tuple[Tensor, Tensor]:
        """What stays and its value, on the parameter's device and in its layout."""
        if name not in self._placed or self._placed[name][0].device != param.device:
            some = self.selected.get(name, torch.zeros(param.shape, dtype=torch.bool))
            still = torch.empty_like(param, dtype=torch.bool).copy_(~some)
            self._placed[name] = still, torch.empty_like(param).copy_(self.kept[name])
        return self._placed[name]


def largest(
    scores: Mapping[str, Tensor], fraction: float, mask: Mask | None = None
) -> dict[str, Tensor]:
    """The largest scores over all tensors together.

    Exactly round(fraction · N) of the N entries that the mask keeps; ties go to the entry that
    comes first.

    Args:
        scores: Name → scores of a parameter's shape.
        fraction: Share to select, in [0, 1].
        mask: Entries that it drops are neither counted nor selected.

    Returns:
        Name → bool tensor.

    >>> largest({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.0])}, 0.5)
    {'a': tensor([ True, False]), 'b': tensor([ True, False])}
    """
    alive = {n: mask[n] if mask and n in mask else torch.ones(()).bool() for n in scores}
    flat = torch.cat(
        [t.cpu().masked_fill(~alive[n], -math.inf).reshape(-1) for n, t in scores.items()]
    )
    count = round(fraction * int((flat > -math.inf).sum()))
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:count]] = True
    parts = torch.split(chosen, [t.numel() for t in scores.values()])
    return {n: part.reshape(t.shape) for (n, t), part in zip(scores.items(), parts, strict=True)}


@dataclass(frozen=True)
class SalUn:
    """SalUn: random labels on D_f, changing only the weights that D_f is most sensitive to.

    Saliency unlearning of Fan et al. 2024. Salient is the given fraction of all weights with the
    largest |∇ CE(D_f)| in the trained model; every other weight keeps its value exactly. Then as
    random-label: D_f with a wrong label each, D_r as it is. In a pruned model the fraction is of
    the weights that are kept.

    Args:
        fraction: Share of the weights that may change, in (0, 1].
        epochs: Passes over D_f ∪ D_r; ``None``: the task's default, else a tenth of its training's.
        lr: Peak rate; ``None``: the task's default, else half of its training's peak.
        bn: What happens to batch-norm statistics.
    """

    name: ClassVar[str] = "salun"
    title: ClassVar[str] = "Saliency unlearning (SalUn)"
    paper: ClassVar[str] = "Fan et al. 2024"
    needs: ClassVar[frozenset[str]] = frozenset({"retain", "forget"})

    fraction: float = 0.5
    epochs: int | None = None
    lr: float | None = None
    bn: Literal["train", "frozen", "recalibrate"] = "train"

    def __post_init__(self) -> None:
        check_ranges(self, fraction=("in (0, 1]", 0 < self.fraction <= 1))

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        slope = gradient(fit, trained.network, split.forget, stream="forget")
        scores = {name: g.abs() for name, g in slope.items()}
        salient = largest(scores, self.fraction, trained.mask)
        fit.meter.facts["salient"] = sum(int(t.sum()) for t in salient.values())

        labels = wrong_labels(fit.task.records.targets, split.forget, fit.task.classes, fit)
        everyone = torch.cat([split.retain, split.forget]).sort().values
        settings = fit_settings(fit, self, epochs=self.epochs, lr=self.lr, bn=self.bn)
        held = fit.with_(constraint=Frozen(trained.network, salient))
        stream = {"all": Stream(everyone, targets=labels)}
        held(trained.network, fit.descend, stream, settings, label=self.name)
