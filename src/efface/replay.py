"""Replay: the first epochs of a training once more, in the recorded order, without some records.

The index stream is a function of (seed, purpose, epoch) alone, so that nothing has to be stored:
every batch comes again with the records that it held, less those that are left out. All that
differs between the training and its replay is then what those records did.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from efface.cost import Meter
from efface.data import Cohorts, Stream, chunks
from efface.errors import MismatchError, NeedsError
from efface.fitting import Fit
from efface.journal import Journal, State
from efface.seeds import own_seed
from efface.task import Settings
from efface.trained import TrainedModel, weights_digest


def initial_weights(trained: TrainedModel, fit: Fit) -> dict[str, Tensor]:
    """The state dict that a model's training began with: kept, or made again from its seed.

    Raises:
        NeedsError: If nobody knows: the model was trained elsewhere.
        MismatchError: If the network that the task makes today begins otherwise.
    """
    if trained.initial_weights is not None:
        return dict(trained.initial_weights)
    if trained.initial is None or "seed" not in trained.initial:
        raise NeedsError(
            "the initial weights are not known for a model that was adopted or began from given "
            "weights; train it with efface train, or adopt it with --initial FILE."
        )
    state = replace(fit, seed=int(trained.initial["seed"])).fresh().state_dict()
    if weights_digest(state) != trained.initial["digest"]:
        raise MismatchError(
            "the task's network no longer begins with this model's initial weights (another "
            "version of torch, or a changed network); train the model again, with --keep-initial "
            "to be independent of that."
        )
    return state


def training_seed(trained: TrainedModel) -> int:
    """The seed that the order of a model's training derives from.

    Raises:
        NeedsError: If the model was not trained by efface's own loop.
    """
    for step in reversed(trained.lineage if trained.task.train_fn is None else ()):
        if step.verb == "train":
            return step.seed
        if step.verb == "retrain" or (step.method or {}).get("method") == "retrain":
            return own_seed(step.seed)
    raise NeedsError(
        "the order of this model's training is not known (it was adopted, or trained by a routine "
        "of your own); train it with efface train."
    )


def recorded_settings(trained: TrainedModel) -> Settings:
    """The settings of a model's training, from its lineage."""
    step = trained.trained_by()
    values: dict[str, Any] = dict(step.settings) if step is not None else {}
    values.pop("train_fn", None)
    return Settings(**values)


def _check_cohorts(trained: TrainedModel, cohorts: Cohorts | None) -> None:
    step = trained.trained_by()
    if cohorts is None and step is not None and "cohorts" in step.detail:
        raise NeedsError(
            "this model was trained with cohorts, and only the log of its training knows which; "
            "give it (--log LOGDIR)."
        )


def replay(
    trained: TrainedModel,
    positions: Tensor,
    within: Tensor,
    fit: Fit,
    epochs: int,
    *,
    matched: bool = False,
    cohorts: Cohorts | None = None,
    start: State | None = None,
    label: str = "replay",
) -> nn.Module:
    """Train a network from a model's initial weights on its first epochs, without some records.

    Args:
        trained: Whose training is replayed; left as it is.
        positions: The records to train on.
        within: The records of the training, whose batches are planned; those not in ``positions``
            leave holes.
        fit: Device, progress, journal and counting; seed and order are the training's.
        epochs: How many of the training's epochs.
        matched: Lower the rate by the number of steps that a training on ``positions`` alone has,
            over that of the recorded one: batches with holes take more steps over fewer records.
        cohorts: Those of the training.
        start: A recorded state of the training to go on from, instead of its initial weights.
        label: What progress calls it.

    Returns:
        The network after those epochs, dense, on the CPU.

    Raises:
        NeedsError: If initial weights or order are not known, or cohorts are missing.
        MismatchError: If the task's network begins otherwise today.
    """
    _check_cohorts(trained, cohorts)
    network = replace(fit, seed=0).fresh()
    if start is None:
        network.load_state_dict(initial_weights(trained, fit))
    else:  # what the training had spent until then is not the replay's
        start = State(start.tensors, {**start.values, "images": {"retain": 0}, "wall": 0, "cpu": 0})
    whole = recorded_settings(trained)
    settings = replace(whole, epochs=epochs, ahead=whole.epochs - epochs)
    if matched:
        steps = [len(chunks(which, whole.batch_size)) for which in (positions, within)]
        settings = replace(settings, lr=whole.lr * steps[0] / steps[1])
    journal = fit.journal
    if journal is not None:
        journal = Journal(journal.folder / label, {"key": journal.key}, journal.seconds)
    meter = Meter()  # its first fit, as the training was: the noise of a step is that of the step
    again = replace(
        fit,
        seed=training_seed(trained),
        subject=None,
        path="train",
        journal=journal,
        meter=meter,
        constraints=(),
        hooks=(),
        start=start,
    )
    everyone = None if torch.equal(within, positions) else within
    again(
        network,
        again.descend,
        {"retain": Stream(positions, within=everyone, cohorts=cohorts)},
        settings,
        label=label,
    )
    fit.meter.add(meter)
    return network
