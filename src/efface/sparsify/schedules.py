"""Pruners that start from the trained weights: at once, or gradually while training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from efface.errors import MethodError
from efface.fitting import Clock, Fit, History
from efface.sparsify.filters import Choice
from efface.sparsify.parts import Scope, check_pruner, install, recover
from efface.sparsify.selection import Granularity
from efface.trained import TrainedModel


def half(epochs: int) -> int:
    """Half of the task's epochs, rounded up: what a recovery takes by default."""
    return -(-epochs // 2)


@dataclass(frozen=True)
class OneShot:
    """Prune once, then recover by training under the mask.

    Args:
        sparsity: Fraction of the scope to prune, in [0, 1).
        criterion: Name of the criterion; for filters also ``l1``, ``l2``, ``geometric-median``,
            ``block-fisher``, ``block-taylor``, ``block-activation``.
        granularity: Compare scores over all weights (``global``), per weight (``layer``), or within
            groups (``2:4`` keeps 2 of every 4 inputs); or prune whole filters (``filter``), the
            same fraction of every group.
        scope: ``weights`` (two or more dimensions, without the classifier), ``conv`` or ``all``.
        recovery: Epochs of training under the mask; ``None`` takes half of the task's.
        lr: Peak rate of the recovery; ``None`` takes the task's.
        allow_dead_layers: Go on with a warning where a layer loses all of its weights.

    Example:
        ``efface.prune(trained, efface.sparsify.OneShot(sparsity=0.9))``
    """

    name: ClassVar[str] = "one-shot"
    title: ClassVar[str] = "One-shot pruning with recovery training"
    paper: ClassVar[str] = "Han et al. 2015; Jia et al. 2023"
    requires: ClassVar[frozenset[str]] = frozenset()

    sparsity: float = 0.9
    criterion: str = "magnitude"
    granularity: Granularity = "global"
    scope: Scope = "weights"
    recovery: int | None = None
    lr: float | None = None
    allow_dead_layers: bool = False

    def __post_init__(self) -> None:
        check_pruner(self)

    def __call__(self, trained: TrainedModel, positions: Tensor, fit: Fit) -> None:
        """Prune a model in place; ``positions`` are the records that the recovery may see."""
        mask = Choice.of(self, trained, fit).mask(self.sparsity, fit, positions)
        install(trained, mask, self.allow_dead_layers)
        epochs = half(fit.task.fit.epochs) if self.recovery is None else self.recovery
        recover(trained, positions, fit.at("recovery"), "recover", epochs=epochs, lr=self.lr)


@dataclass(frozen=True)
class Gradual:
    """Prune while training on, a little after every epoch (Zhu & Gupta 2017).

    After a fraction ``t`` of the pruning epochs the sparsity is ``s + (s₀ − s)(1 − t)³``, where
    ``s₀`` is what the model has pruned already: fast at first, slowly towards the end. The mask
    only ever shrinks, and is fixed in the last epochs. Magnitude decides.

    Args:
        sparsity: Final fraction of the scope to prune, in [0, 1).
        granularity: ``global``, ``layer``, a pattern such as ``2:4``, or ``filter``.
        scope: ``weights`` (two or more dimensions, without the classifier), ``conv`` or ``all``.
        epochs: All epochs of training; ``None`` takes half of the task's.
        lr: Peak rate; ``None`` takes the task's.
        hold: Fraction of the epochs, at the end, in which the mask is fixed, in [0, 1).
        allow_dead_layers: Go on with a warning where a layer loses all of its weights.

    Example:
        ``efface.prune(trained, efface.sparsify.Gradual(sparsity=0.9, epochs=8))``
    """

    name: ClassVar[str] = "gradual"
    title: ClassVar[str] = "Gradual pruning on a cubic schedule"
    paper: ClassVar[str] = "Zhu & Gupta 2017"
    requires: ClassVar[frozenset[str]] = frozenset()

    sparsity: float = 0.9
    granularity: Granularity = "global"
    scope: Scope = "weights"
    epochs: int | None = None
    lr: float | None = None
    hold: float = 0.25
    allow_dead_layers: bool = False

    def __post_init__(self) -> None:
        check_pruner(self)
        if not 0 <= self.hold < 1:
            raise MethodError(f"hold must lie in [0, 1), not {self.hold}.")

    def __call__(self, trained: TrainedModel, positions: Tensor, fit: Fit) -> None:
        """Prune a model in place; ``positions`` are the records that it is trained on."""
        epochs = half(fit.task.fit.epochs) if self.epochs is None else self.epochs
        choice = Choice.of(self, trained, fit)
        narrowing = _Narrowing(self, choice, fit, epochs, choice.pruned())
        if epochs == 0:
            narrowing.to(1.0)
        recover(
            trained,
            positions,
            fit.at("gradual").with_(hook=narrowing),
            "prune",
            epochs=epochs,
            lr=self.lr,
        )


@dataclass(frozen=True)
class _Narrowing:
    """The hook that renews the mask after every epoch.

    It keeps no state of its own, only the model's mask, which a commit holds: a killed run goes on.
    """

    pruner: Gradual
    choice: Choice
    fit: Fit
    epochs: int
    begin: float

    def __call__(self, network: nn.Module, clock: Clock, history: History) -> None:
        """Narrow the mask as far as the schedule says."""
        ramp = max(1, self.epochs - round(self.pruner.hold * self.epochs))
        if clock.epoch < ramp:
            self.to((clock.epoch + 1) / ramp)

    def to(self, t: float) -> None:
        """Narrow it to a fraction of the way."""
        final = self.pruner.sparsity
        goal = final + (self.begin - final) * (1 - t) ** 3
        mask = self.choice.mask(goal, self.fit)
        install(self.choice.trained, mask, self.pruner.allow_dead_layers)
