"""What pruners share: the contract, checks, scores of a model, the way back to early weights."""

from __future__ import annotations

import dataclasses
import math
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from efface.data import Batch, Stream, chunks, order
from efface.errors import MethodError, NeedsError, listed, nearest
from efface.fitting import Fit, History
from efface.mask import Mask, scope_names
from efface.replay import initial_weights
from efface.sparsify.block_criteria import BLOCK_CRITERIA
from efface.sparsify.criteria import CRITERIA, Criterion
from efface.sparsify.norms import NORMS
from efface.sparsify.selection import check_granularity, dead_layers
from efface.trained import TrainedModel

Scope = Literal["weights", "conv", "all"]
To = Literal["rewind", "initial", "none"]

PER_CLASS, AT_MOST = 10, 512
"""Records that a criterion is shown: of each class, and altogether."""


@runtime_checkable
class Pruner(Protocol):
    """Prunes a model in place; ``positions`` are the records that it may see."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]

    @property
    def requires(self) -> frozenset[str]:
        """What the model must have: ``"rewind"`` or ``"initial"`` weights, or nothing."""

    def __call__(self, trained: TrainedModel, positions: Tensor, fit: Fit, /) -> None:
        """Prune ``trained`` in place."""


def check_pruner(pruner: Any) -> None:
    """Raise for the first option of a pruner that is out of range.

    Raises:
        MethodError: Naming pruner, option, rule and value.
    """
    check_granularity(pruner.sparsity, pruner.granularity)
    options = vars(pruner)
    for option, kind in (("scope", Scope), ("to", To)):
        known = typing.get_args(kind)
        if option in options and options[option] not in known:
            raise MethodError(
                f"{pruner.name}: {option} must be one of {', '.join(known)}, not "
                f"{options[option]!r}."
            )
    for option in ("epochs", "recovery"):
        epochs = options.get(option)
        if epochs is not None and epochs < 0:
            raise MethodError(f"{option} must be 0 epochs or more, not {epochs}.")
    lr = options.get("lr")
    if lr is not None and not 0 < lr < math.inf:
        raise MethodError(f"lr must be positive, not {lr}.")
    criterion = options.get("criterion", "magnitude")
    whole = (*NORMS, *BLOCK_CRITERIA)
    if criterion not in CRITERIA and criterion not in whole:
        hint = nearest(criterion, [*CRITERIA, *whole])
        raise MethodError(f"criterion {criterion!r} is unknown; {hint}")
    if criterion in whole and pruner.granularity != "filter":
        raise MethodError(
            f"{pruner.name}: criterion {criterion!r} scores whole filters; take granularity=filter."
        )


def scope_of(trained: TrainedModel, scope: str) -> list[str]:
    """Names of the weights that a pruner may touch."""
    return scope_names(trained.network, scope, trained.task.classifier)


def sparsity_within(mask: Mask | None, trained: TrainedModel, scope: list[str]) -> float:
    """How much of a scope a mask has pruned already."""
    sizes = {name: p.numel() for name, p in trained.network.named_parameters()}
    gone = sum(int((~mask[name]).sum()) for name in scope if name in mask) if mask else 0
    return gone / sum(sizes[name] for name in scope) if scope else 0.0


def denser(pruner: Any, there: float) -> float:
    """The sparsity that a model has, which must not be above a pruner's.

    Raises:
        MethodError: If it is.
    """
    if there > pruner.sparsity:
        raise MethodError(
            f"{pruner.name}: the model is pruned to {there:.4g} already, beyond {pruner.sparsity}; "
            "ask for a higher sparsity, or start from the dense model."
        )
    return there


def score(
    name: str, trained: TrainedModel, batches: Sequence[Batch], fit: Fit, *, fresh: bool = False
) -> dict[str, Tensor]:
    """A criterion's scores of a model.

    Args:
        name: Of the criterion, one for weights.
        trained: The model.
        batches: What :func:`shown` gives for the criterion.
        fit: Supplies loss, device and randomness.
        fresh: The network is at initialisation: batch norm uses the batches' own statistics.
    """
    cls = CRITERIA[name]
    fields = {f.name for f in dataclasses.fields(cls)}
    options: dict[str, Any] = {}
    if "seed" in fields:
        options["seed"] = fit.generator("score").initial_seed()
    if fresh and "batch_stats" in fields:
        options["batch_stats"] = True
    criterion: Criterion = cls(**options)
    away = bool(batches) and fit.device.type != "cpu"
    network = fit.teacher(trained) if away else trained.network
    return criterion(network, batches, fit.loss)


def shown(name: str, positions: Tensor, fit: Fit) -> list[Batch]:
    """The batches that a criterion is shown: none if it needs no data.

    Up to ten records of each class (512 at most), drawn from the positions, un-augmented, in
    batches of the task's size.
    """
    if name in NORMS or (name in CRITERIA and not CRITERIA[name].needs_data):
        return []
    plan = chunks(score_records(positions, fit), fit.task.fit.batch_size)
    return list(fit.task.records.batches(plan, fit.device))


def score_records(positions: Tensor, fit: Fit) -> Tensor:
    """Positions of the records that a criterion is shown."""
    total = len(fit.task.records)
    mixed = order(fit.seed, f"{fit.path}/score", 0, positions, total)
    labels = fit.task.records.targets[mixed]
    chosen = torch.zeros(len(mixed), dtype=torch.bool)
    for label in range(fit.task.classes):
        chosen[(labels == label).nonzero().flatten()[:PER_CLASS]] = True
    return mixed[chosen][:AT_MOST]


def install(trained: TrainedModel, mask: Mask, allow_dead_layers: bool) -> None:
    """Install a mask.

    Raises:
        MethodError: If a layer would lose all of its weights, and that is not allowed.
    """
    dead = dead_layers(mask)
    if dead:
        lost = f"{listed(dead)} lost all weights at a sparsity of {mask.sparsity:.4g}"
        if not allow_dead_layers:
            raise MethodError(
                f"{lost}: no signal passes; prune less, take granularity=layer, or allow it with "
                "--allow-dead-layers (allow_dead_layers=true)."
            )
        warnings.warn(f"{lost}; no signal passes.", stacklevel=2)
    trained.set_mask(mask)


def recover(trained: TrainedModel, positions: Tensor, fit: Fit, label: str, **own: Any) -> History:
    """Train under the mask as the task trains, with some settings changed (None: the task's)."""
    changes = {option: value for option, value in own.items() if value is not None}
    return fit(
        trained.network,
        fit.descend,
        {"retain": Stream(positions)},
        replace(fit.task.fit, **changes),
        label=label,
    )


# -- early weights --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Where the training of a pruned network begins.

    Args:
        weights: State dict with all buffers, or None to go on from where the network is.
        epoch: Epochs of the schedule that these weights have behind them.
    """

    weights: Mapping[str, Tensor] | None
    epoch: int

    def restore(self, trained: TrainedModel) -> None:
        """Put the weights and all buffers back; masked entries, too, until a mask is installed."""
        if self.weights is not None:
            trained.network.load_state_dict(dict(self.weights))


def start_of(trained: TrainedModel, to: To, fit: Fit) -> Start:
    """The weights to which a pruner goes back.

    Raises:
        NeedsError: If the model does not have them, or if its rewind weights have seen what an
            earlier request made it forget.
        MismatchError: If the task's network does not begin with the model's initial weights.
    """
    if to == "none":
        return Start(None, 0)
    if to == "initial":
        return Start(initial_weights(trained, fit), 0)
    if trained.rewind is None and any(step.verb == "forget" for step in trained.lineage):
        raise NeedsError(
            "early weights were trained on records that the model has forgotten since, would bring "
            "them back, and are gone; take to=initial, to=none, or one-shot."
        )
    epoch = rewind_epoch(trained)
    if trained.rewind is None or epoch is None:
        raise NeedsError(
            "rewinding needs weights kept early in training, and their epoch; train with "
            "--rewind EPOCH, or take to=initial."
        )
    return Start(trained.rewind, epoch)


def rewind_epoch(trained: TrainedModel) -> int | None:
    """After which epoch the rewind weights were kept, from the lineage."""
    step = trained.trained_by()
    epoch = step.detail.get("rewind_epoch") if step is not None else None
    return None if epoch is None or trained.rewind is None else int(epoch)
