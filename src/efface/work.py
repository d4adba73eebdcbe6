"""Work on a model: a fit bound to a model, and the step of lineage that it will have been."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from efface.cost import Stopwatch, versions
from efface.data import Cohorts
from efface.errors import MethodError
from efface.fitting import Clock, Fit, History, Progress, warm_up
from efface.journal import Journal, State
from efface.lineage import Forgotten, Step, data_facts
from efface.mask import Mask
from efface.placement import pick_device
from efface.replay import initial_weights
from efface.seeds import own_seed
from efface.task import Task
from efface.trained import TrainedModel, blank_network, weights_digest
from efface.unlearn.retrain import train_from
from efface.updates.cohorts import facts

if TYPE_CHECKING:
    from efface.updates.recorder import Recorder


@dataclass(frozen=True)
class How:
    """Where a verb computes, whom it tells, and where it keeps its state."""

    device: str = "auto"
    progress: Progress | None = None
    journal: Journal | None = None


class Work:
    """A fit bound to a model, and the step that it will have been."""

    def __init__(self, model: TrainedModel, verb: str, seed: int, how: How) -> None:
        warm_up()
        self.model, self.verb, self.seed = model, verb, seed
        self.watch = Stopwatch()
        self.parent = model.digest if model.lineage else None
        self.fit = Fit(
            model.task,
            own_seed(seed) if verb == "retrain" else seed,
            pick_device(how.device),
            subject=model,
            path="train" if verb == "retrain" else verb,
            progress=how.progress,
            journal=how.journal,
        )

    def close(
        self,
        method: Mapping[str, Any] | None = None,
        forgotten: Forgotten | None = None,
        **detail: Any,
    ) -> TrainedModel:
        """Record what was done."""
        model, fit = self.model, self.fit
        if model.mask is not None:  # methods that never call the loop are held to it, too
            model.set_mask(model.mask)
        cost = self.watch.read()
        cost["images"] = sum(fit.meter.images.values())
        for key in ("wall", "cpu"):  # of fits that a killed run had finished or begun
            cost[key] += getattr(fit.meter, f"{key}_before")
        step = Step(
            verb=self.verb,
            method=method,
            settings=_settings(model.task),
            seed=self.seed,
            parent=self.parent,
            cost=cost,
            data=data_facts(model.task),
            versions=versions(),
            detail={
                "images": dict(fit.meter.images),
                "placement": fit.meter.placement,
                "fits": fit.meter.fits,
                **fit.meter.facts,
                **detail,
            },
        )
        model.lineage = (*model.lineage, step)
        model.forgotten = forgotten or model.forgotten
        return model


def _settings(task: Task) -> dict[str, Any]:
    own = getattr(task.train_fn, "func", task.train_fn)  # of a functools.partial
    if own is None:
        return task.fit.to_dict()
    named = own if hasattr(own, "__qualname__") else type(own)
    return task.fit.to_dict() | {"train_fn": f"{named.__module__}.{named.__qualname__}"}


def from_scratch(
    task: Task,
    positions: Tensor,
    verb: str,
    seed: int,
    how: How,
    *,
    forgotten: Forgotten | None = None,
    rewind: int | None = None,
    mask: Mask | None = None,
    start: Mapping[str, Tensor] | None = None,
    origin: TrainedModel | None = None,
    recorder: Recorder | None = None,
    cohorts: Cohorts | None = None,
    **detail: Any,
) -> TrainedModel:
    """Train from fresh (or given) weights on these records; from those of ``origin``, if there."""
    if rewind is not None and (task.train_fn is not None or not 0 < rewind <= task.fit.epochs):
        raise MethodError(
            f"rewind must be one of the {task.fit.epochs} epochs of efface's own loop, "
            f"not {rewind}."
        )
    if rewind is not None:
        detail["rewind_epoch"] = rewind
    if cohorts is not None:
        detail["cohorts"] = facts(cohorts)
    work = Work(TrainedModel(task, blank_network(task)), verb, seed, how)
    model = work.model = _fresh_model(work.fit, mask, start, origin)
    fit = replace(work.fit, subject=model)
    if rewind:
        fit = fit.with_(hook=Rewind(model, rewind, how.journal))
    recording = recorder.begin(fit, model.network, cohorts) if recorder else None
    try:
        fit = replace(fit, recorder=recording)
        train_from(fit, model.network, positions, label=verb, cohorts=cohorts)
        if recording:
            detail["log"] = recording.finish(model.digest)
            model.log = recording.log.folder
    finally:
        if recording:
            recording.close()
    if rewind and model.rewind is None and how.journal:
        kept = how.journal.read("rewind")  # by the run that was killed
        model.rewind = kept.tensors if kept else None
    return work.close(None, forgotten, **detail)


def _fresh_model(
    fit: Fit,
    mask: Mask | None,
    start: Mapping[str, Tensor] | None,
    origin: TrainedModel | None,
) -> TrainedModel:
    network = fit.fresh()
    if start is not None:
        network.load_state_dict(dict(start))
        return TrainedModel(fit.task, network, mask=mask)
    kept = None
    initial: Any = {"seed": fit.seed, "digest": weights_digest(network.state_dict())}
    if origin is not None:
        network.load_state_dict(initial_weights(origin, fit))
        initial, kept = origin.initial, origin.initial_weights
    return TrainedModel(fit.task, network, mask=mask, initial=initial, initial_weights=kept)


@dataclass(frozen=True)
class Rewind:
    """A hook that keeps the weights after an epoch."""

    model: TrainedModel
    epoch: int
    journal: Journal | None

    def __call__(self, network: torch.nn.Module, clock: Clock, history: History) -> None:
        """Keep them, in the journal too."""
        if clock.epoch + 1 != self.epoch:
            return
        kept = {name: t.detach().cpu().clone() for name, t in network.state_dict().items()}
        self.model.rewind = kept
        if self.journal:
            self.journal.write("rewind", State(kept, {}))
