"""SalUn: random labels on the forgotten data, in the weights that matter to it only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from efface.fitting import Fit
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.base import check_ranges, fit_settings
from efface.unlearn.partial import confine
from efface.unlearn.places import Rule
from efface.unlearn.relabel import train_relabelled


@dataclass(frozen=True)
class SalUn:
    """SalUn: random labels on D_f, changing only the weights that D_f is most sensitive to.

    Saliency unlearning of Fan et al. 2024. Salient is the given fraction of all weights with the
    largest |∇ CE(D_f)| in the trained model; every other weight keeps its value exactly. Then as
    random-label: D_f with a wrong label each, D_r as it is. In a pruned model the fraction is of
    the weights that are kept. The same as layerwise-partial around random-label with
    ``pick=gradient``, ``redraw=fixed``, ``scope=global``.

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
        rule = Rule(self.fraction, "gradient", "fixed", "global")
        held, guard = confine(rule, trained, split, fit)
        fit.meter.facts["salient"] = guard.size()["selected"]
        settings = fit_settings(fit, self, epochs=self.epochs, lr=self.lr, bn=self.bn)
        train_relabelled(trained, split, held, settings, label=self.name)
        guard.settle(fit.meter.calls)
