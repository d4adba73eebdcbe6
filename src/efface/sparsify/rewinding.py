"""Pruners that go back in time: train again from early weights under the new mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from efface.errors import MethodError
from efface.fitting import Fit
from efface.replay import initial_weights
from efface.sparsify.filters import Choice
from efface.sparsify.parts import (
    Scope,
    Start,
    To,
    check_pruner,
    install,
    recover,
    scope_of,
    score,
    shown,
    start_of,
)
from efface.sparsify.selection import Granularity, narrow
from efface.trained import TrainedModel


def _requires(to: To) -> frozenset[str]:
    return frozenset() if to == "none" else frozenset({to})


def _again(
    start: Start, trained: TrainedModel, positions: Tensor, fit: Fit, label: str, epochs: int | None
) -> None:
    """Train from early weights; the rate goes on where the schedule stood at that epoch."""
    rest = fit.task.fit.epochs - start.epoch if epochs is None else epochs
    recover(trained, positions, fit, label, epochs=rest, begun=start.epoch)


@dataclass(frozen=True)
class OMP:
    """One-shot magnitude pruning with rewinding (Jia et al. 2023; Frankle et al. 2020).

    Scores the trained weights, goes back to early weights (batch-norm statistics included),
    installs the mask, and trains again with a fresh optimiser, the learning rate going on from the
    epoch of those weights. The code of Jia et al. trains the full number of epochs again after
    rewinding; ``epochs`` can ask for that. They prune convolutions only: ``scope=conv``.

    Args:
        sparsity: Fraction of the scope to prune, in [0, 1).
        criterion: Name of the criterion; for filters also ``l1``, ``l2``, ``geometric-median``,
            ``block-fisher``, ``block-taylor``, ``block-activation``.
        granularity: ``global``, ``layer``, a pattern such as ``2:4``, or ``filter``.
        scope: ``weights`` (two or more dimensions, without the classifier), ``conv`` or ``all``.
        to: Go back to the ``rewind`` weights, the ``initial`` ones, or ``none`` (stay).
        epochs: Epochs of training under the mask; ``None`` takes what is left of the task's.
        allow_dead_layers: Go on with a warning where a layer loses all of its weights.

    Example:
        ``efface.prune(efface.train(task, rewind=2), efface.sparsify.OMP(sparsity=0.95))``
    """

    name: ClassVar[str] = "omp"
    title: ClassVar[str] = "One-shot magnitude pruning with rewinding"
    paper: ClassVar[str] = "Jia et al. 2023"

    sparsity: float = 0.9
    criterion: str = "magnitude"
    granularity: Granularity = "global"
    scope: Scope = "weights"
    to: To = "rewind"
    epochs: int | None = None
    allow_dead_layers: bool = False

    def __post_init__(self) -> None:
        check_pruner(self)

    @property
    def requires(self) -> frozenset[str]:
        """The weights to go back to."""
        return _requires(self.to)

    def __call__(self, trained: TrainedModel, positions: Tensor, fit: Fit) -> None:
        """Prune a model in place; ``positions`` are the records that it is trained on."""
        start = start_of(trained, self.to, fit)
        mask = Choice.of(self, trained, fit).mask(self.sparsity, fit, positions)
        start.restore(trained)
        install(trained, mask, self.allow_dead_layers)
        _again(start, trained, positions, fit.at("again"), "train again", self.epochs)


@dataclass(frozen=True)
class IMP:
    """Iterative magnitude pruning with rewinding: lottery tickets (Frankle & Carbin 2019).

    Every round prunes ``rate`` of what is left by magnitude, goes back to early weights and trains
    again, so that ``k`` rounds reach ``1 − (1 − rate)^k``; the last one stops exactly at
    ``sparsity``. A round costs what :class:`OMP` costs. A killed run goes on in the round in which
    it was killed.

    Args:
        sparsity: Final fraction of the scope to prune, in [0, 1).
        rate: Fraction of what is left that a round prunes, in (0, 1).
        granularity: ``global``, ``layer``, ``filter`` or a pattern such as ``2:4`` (reached in the
            last round).
        scope: ``weights`` (two or more dimensions, without the classifier), ``conv`` or ``all``.
        to: Go back to the ``rewind`` weights, the ``initial`` ones, or ``none`` (stay).
        epochs: Epochs of a round; ``None`` takes what is left of the task's.
        allow_dead_layers: Go on with a warning where a layer loses all of its weights.

    Example:
        ``efface.prune(efface.train(task, rewind=2), efface.sparsify.IMP(sparsity=0.8))``
    """

    name: ClassVar[str] = "imp"
    title: ClassVar[str] = "Iterative magnitude pruning with rewinding"
    paper: ClassVar[str] = "Frankle & Carbin 2019; Jia et al. 2023"

    sparsity: float = 0.9
    rate: float = 0.2
    granularity: Granularity = "global"
    scope: Scope = "weights"
    to: To = "rewind"
    epochs: int | None = None
    allow_dead_layers: bool = False

    def __post_init__(self) -> None:
        check_pruner(self)
        if not 0 < self.rate < 1:
            raise MethodError(f"rate must lie between 0 and 1, not {self.rate}.")

    @property
    def requires(self) -> frozenset[str]:
        """The weights to go back to."""
        return _requires(self.to)

    def rounds(self, there: float = 0.0) -> list[float]:
        """The sparsity after each round, from a model that has this much pruned.

        >>> [round(s, 3) for s in IMP(sparsity=0.5).rounds()]
        [0.2, 0.36, 0.488, 0.5]
        """
        goals = [1 - (1 - there) * (1 - self.rate)]
        while goals[-1] < self.sparsity - 1e-9:
            goals.append(1 - (1 - goals[-1]) * (1 - self.rate))
        return [*goals[:-1], self.sparsity]

    def __call__(self, trained: TrainedModel, positions: Tensor, fit: Fit) -> None:
        """Prune a model in place; ``positions`` are the records that it is trained on."""
        start = start_of(trained, self.to, fit)
        choice = Choice.of(self, trained, fit)
        goals = self.rounds(choice.pruned())
        for k, goal in enumerate(goals, 1):
            mask = choice.mask(goal, fit)
            start.restore(trained)
            install(trained, mask, self.allow_dead_layers)
            label = f"round {k} of {len(goals)}"
            _again(start, trained, positions, fit.at(f"round-{k}"), label, self.epochs)


@dataclass(frozen=True)
class AtInit:
    """Prune the initial weights, then train them under the mask.

    What the model has learnt is thrown away, and so is a mask that it had. ``synflow`` (Tanaka et
    al. 2020) looks at no value of the data; ``snip`` (Lee et al. 2019) and ``grasp`` (Wang et al.
    2020) look at ten records of each class, with batch norm on the batches' own statistics.

    Args:
        sparsity: Fraction of the scope to prune, in [0, 1).
        criterion: ``synflow``, ``snip``, ``grasp``, ``magnitude``, ``random`` or ``taylor``.
        granularity: ``global``, ``layer`` or a pattern such as ``2:4``.
        scope: ``weights`` (two or more dimensions, without the classifier), ``conv`` or ``all``.
        rounds: Score and prune this often, each time the same fraction ``1 − (1 − s)^(1/rounds)``
            of what is left; ``None`` takes 100 for ``synflow`` and 1 for the others.
        epochs: Epochs of training; ``None`` takes the task's.
        allow_dead_layers: Go on with a warning where a layer loses all of its weights.

    Example:
        ``efface.prune(trained, efface.sparsify.AtInit(sparsity=0.9, criterion="snip"))``
    """

    name: ClassVar[str] = "at-init"
    title: ClassVar[str] = "Pruning at initialisation, then training"
    paper: ClassVar[str] = "Tanaka et al. 2020; Lee et al. 2019; Wang et al. 2020"
    requires: ClassVar[frozenset[str]] = frozenset({"initial"})

    sparsity: float = 0.9
    criterion: str = "synflow"
    granularity: Granularity = "global"
    scope: Scope = "weights"
    rounds: int | None = None
    epochs: int | None = None
    allow_dead_layers: bool = False

    def __post_init__(self) -> None:
        check_pruner(self)
        if self.granularity == "filter":
            raise MethodError(
                "at-init prunes single weights only; for whole filters take sfp, or one-shot, omp, "
                "imp or gradual with granularity=filter."
            )
        if self.rounds is not None and self.rounds < 1:
            raise MethodError(f"rounds must be 1 or more, not {self.rounds}.")

    def __call__(self, trained: TrainedModel, positions: Tensor, fit: Fit) -> None:
        """Prune a model in place; ``positions`` are the records that it is trained on."""
        start = Start(initial_weights(trained, fit), 0)
        start.restore(trained)
        trained.set_mask(None)
        scope = scope_of(trained, self.scope)
        batches = shown(self.criterion, positions, fit)
        rounds = self.rounds or (100 if self.criterion == "synflow" else 1)
        for k in range(1, rounds + 1):
            left = (1 - self.sparsity) ** (k / rounds)
            goal = self.sparsity if k == rounds else 1 - left
            scores = score(self.criterion, trained, batches, fit, fresh=True)
            mask = narrow(scores, goal, scope, self.granularity, trained.mask)
            install(trained, mask, self.allow_dead_layers)
        _again(start, trained, positions, fit.at("again"), "train", self.epochs)
