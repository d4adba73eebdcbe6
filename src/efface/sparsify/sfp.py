"""Soft filter pruning: filters are set to zero after every epoch, and may come back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from efface.errors import MethodError
from efface.fitting import Clock, Fit, History, Params
from efface.mask import Mask
from efface.sparsify.filters import Choice, filter_scores, select_filters, staying
from efface.sparsify.groups import zero_filters
from efface.sparsify.norms import NORMS
from efface.sparsify.parts import Scope, To, check_pruner, install, recover, start_of
from efface.trained import TrainedModel


@dataclass(frozen=True)
class SFP:
    """Soft filter pruning (He et al. 2018).

    After every epoch of ordinary training the filters with the smallest norm, the same fraction of
    every group, are set to zero. Training goes on without a mask, so that a filter that is worth it
    comes back. What is zero after the last epoch is pruned for good.

    On the way only the weights of a filter are set to zero. Its bias, its batch norm and the
    optimiser's momentum are left alone, as in the released code: behind a scale of zero, or a ReLU
    at zero, no gradient would reach it again. Its channel is therefore a constant until the final
    mask sets everything to zero. Batch-norm statistics are then averaged anew over the training
    records, without a step, unless there is a recovery.

    Batch norm divides by a variance that is zero for a filter at zero, so that its first gradients
    are hundreds of times those of the others, and it comes back with a norm that crowds out
    trained filters. ``capped`` bounds the gradient of the filters that would be pruned now by the
    largest of the others in the layer; without it the method is He et al.'s.

    Args:
        sparsity: Fraction of the filters of every group to prune, in [0, 1); 1 − ``rate`` of the
            released code.
        criterion: ``l2``, ``l1``, or ``geometric-median`` (He et al. 2019).
        scope: Groups whose first layer is in ``weights`` (all but the classifier), ``conv`` or
            ``all``.
        to: Begin with the ``initial`` weights, as He et al., with the ``rewind`` weights, or go on
            from the trained ones (``none``).
        epochs: Epochs of training; ``None`` takes the task's, or what is left after rewinding.
        recovery: Further epochs under the final mask.
        capped: Bound the gradients of filters that are about to be pruned.

    Example:
        ``efface.prune(trained, efface.sparsify.SFP(sparsity=0.3))``
    """

    name: ClassVar[str] = "sfp"
    title: ClassVar[str] = "Soft filter pruning"
    paper: ClassVar[str] = "He et al. 2018"
    granularity: ClassVar[str] = "filter"

    sparsity: float = 0.3
    criterion: str = "l2"
    scope: Scope = "weights"
    to: To = "none"
    epochs: int | None = None
    recovery: int = 0
    capped: bool = True

    def __post_init__(self) -> None:
        check_pruner(self)
        if self.criterion not in NORMS:
            raise MethodError(
                f"sfp: criterion must be one of {', '.join(NORMS)}, not {self.criterion!r}."
            )

    @property
    def requires(self) -> frozenset[str]:
        """The weights to begin with."""
        return frozenset() if self.to == "none" else frozenset({self.to})

    def __call__(self, trained: TrainedModel, positions: Tensor, fit: Fit) -> None:
        """Prune a model in place; ``positions`` are the records that it is trained on."""
        choice = Choice.of(self, trained, fit)
        choice.pruned()
        start = start_of(trained, self.to, fit)
        start.restore(trained)
        epochs = fit.task.fit.epochs - start.epoch if self.epochs is None else self.epochs
        softening = _Softening(choice, fit)
        if epochs == 0:
            softening.finish()
        cap = _Cap(choice) if self.capped else None
        soft = fit.at("soft").with_(constraint=cap, hook=softening)
        renewed = fit.task.fit.bn == "train" and not self.recovery
        bn = "recalibrate" if renewed else None
        recover(trained, positions, soft, "prune softly", epochs=epochs, begun=start.epoch, bn=bn)
        recover(trained, positions, fit.at("recovery"), "recover", epochs=self.recovery)


@dataclass(frozen=True)
class _Softening:
    """The hook that sets filters to zero after every epoch, and prunes them after the last.

    It keeps no state of its own: a killed run goes on.
    """

    choice: Choice
    fit: Fit

    def __call__(self, network: nn.Module, clock: Clock, history: History) -> None:
        """Set the filters that matter least to zero."""
        if clock.epoch + 1 == clock.epochs:
            self.finish()
            return
        mask, params = self.mask(), dict(network.named_parameters())
        for group in self.choice.groups or ():
            for name, _ in group.weights:
                gone = mask.dropped(params[name].device)[name]
                params[name].detach().masked_fill_(gone, 0.0)

    def finish(self) -> None:
        """Prune them for good."""
        install(self.choice.trained, self.mask(), allow_dead_layers=False)

    def mask(self) -> Mask:
        """Without the filters that matter least; what is at zero already goes first."""
        pruner, trained, groups = self.choice.pruner, self.choice.trained, self.choice.groups or ()
        scores = filter_scores(pruner.criterion, trained, groups, (), self.fit)
        for name, zero in zero_filters(groups, trained.network).items():
            scores[name] = scores[name].masked_fill(zero, -math.inf)
        network, within = trained.network, trained.mask
        return select_filters(scores, pruner.sparsity, groups, network, within=within)


@dataclass(frozen=True)
class _Cap:
    """The step constraint that keeps filters near zero from larger gradients than all others.

    The others are the filters of the layer that have the largest norm, as many as are to stay.
    """

    choice: Choice

    def begin(self, params: Params) -> None:
        """Scale gradients down where they are too large."""
        for group in self.choice.groups or ():
            most = staying(group.size, self.choice.pruner.sparsity)
            for name, rows in group.weights:
                gradient = params[name].grad if name in params else None
                if gradient is None:
                    continue
                where = rows.to(gradient.device)
                norms = params[name].detach()[where].flatten(1).norm(dim=1)
                sizes = gradient[where].flatten(1).norm(dim=1)
                large = norms.topk(most).indices
                factor = (sizes[large].max() / sizes.clamp(min=1e-30)).clamp(max=1.0)
                factor[large] = 1.0
                gradient[where] *= factor.view(-1, *[1] * (gradient.ndim - 1))

    def end(self, params: Params) -> None:
        """Nothing to do after the step."""
