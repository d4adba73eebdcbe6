"""Pruners: criterion × selection × schedule × recovery."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from efface.checkpoint import TrainedModel
from efface.data import Stream
from efface.errors import MethodError
from efface.fitting import Fit
from efface.mask import scope_names
from efface.sparsify.criteria import CRITERIA
from efface.sparsify.selection import Granularity, select


@dataclass(frozen=True)
class OneShot:
    """Prune once, then recover by training under the mask.

    Args:
        sparsity: Fraction of the scope to prune, in [0, 1).
        criterion: Name of the criterion.
        granularity: Compare scores over all weights (``global``) or per weight (``layer``).
        scope: ``weights`` (two or more dimensions, without the classifier), ``conv`` or ``all``.
        recovery: Epochs of training under the mask; ``None`` takes half of the task's.
        lr: Peak rate of the recovery; ``None`` takes the task's.

    Example:
        ``efface.prune(trained, efface.sparsify.OneShot(sparsity=0.9))``
    """

    name: ClassVar[str] = "one-shot"
    title: ClassVar[str] = "One-shot pruning with recovery training"
    paper: ClassVar[str] = "Han et al. 2015; Jia et al. 2023"

    sparsity: float = 0.9
    criterion: str = "magnitude"
    granularity: Granularity = "global"
    scope: Literal["weights", "conv", "all"] = "weights"
    recovery: int | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise MethodError(f"sparsity must lie in [0, 1), not {self.sparsity}.")
        if self.recovery is not None and self.recovery < 0:
            raise MethodError(f"recovery must be 0 epochs or more, not {self.recovery}.")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise MethodError(f"lr must be positive, not {self.lr}.")
        if self.criterion not in CRITERIA:
            known = ", ".join(CRITERIA)
            raise MethodError(f"criterion {self.criterion!r} is unknown; known: {known}.")

    def __call__(self, trained: TrainedModel, positions: Tensor, fit: Fit) -> None:
        """Prune a model in place; ``positions`` are the records that the recovery may see."""
        scores = CRITERIA[self.criterion]()(trained.network, ())
        scope = scope_names(trained.network, self.scope, fit.task.classifier)
        mask = select(scores, self.sparsity, scope, self.granularity)
        for layer in mask.layers():
            if layer["kept"] == 0:
                warnings.warn(
                    f"{layer['name']} lost all of its weights at sparsity {self.sparsity}; prune "
                    "less, or per layer.",
                    stacklevel=2,
                )
        trained.set_mask(mask)
        base = fit.task.fit
        epochs = -(-base.epochs // 2) if self.recovery is None else self.recovery
        settings = replace(base, epochs=epochs, lr=base.lr if self.lr is None else self.lr)
        fit.at("recovery")(
            trained.network,
            fit.descend,
            {"retain": Stream(positions)},
            settings,
            label="recover",
        )
