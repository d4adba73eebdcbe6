"""Exact replay: the recorded training once more, from where D_f first came, without D_f."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from efface.cost import versions
from efface.data import Cohorts
from efface.errors import MethodError, MismatchError
from efface.fitting import Fit
from efface.journal import Journal, State
from efface.replay import replay
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.ledger import (
    check_key,
    check_weights,
    kept_epochs,
    open_log,
    same_run,
    training,
    way_back,
)

if TYPE_CHECKING:
    from efface.updates.log import UpdateLog


@dataclass(frozen=True)
class Replay:
    """Train again from the last recorded state that has never seen D_f, with D_f left out.

    Exact: on a CPU the result equals, byte for byte, a training in the same order that never held
    the records, each step's loss being the mean over those that are left in its batch. What earlier
    requests forgot is left out as well. Everything else that was done to the model since is
    replaced.

    Says beforehand what it costs: under shuffling D_f comes in the first epoch, and a replay costs
    what training does. Deletable records that were trained as a cohort in the last epochs
    (``efface train --cohort FILE --cohort-epochs N``) make it cheap.

    Args:
        force: Go on with another version of torch or numpy than the training's: the result has
            never seen D_f either, but need not be the same byte for byte.

    Example:
        ``efface.forget(trained, split, Replay(), log="log/")``
    """

    name: ClassVar[str] = "replay"
    title: ClassVar[str] = "Exact replay from a recorded state"
    paper: ClassVar[str] = "efface"
    needs: ClassVar[frozenset[str]] = frozenset({"log", "retain"})

    force: bool = False

    def check(self, trained: TrainedModel, split: Split) -> None:
        """Raise for everything that can be known before anything runs."""
        with open_log(trained) as log:
            _check_run(log, trained, self.force)
            check_weights(log, trained)

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        if trained.mask is not None:
            raise MethodError(
                "a replay gives dense weights, and this model is pruned; prune with --keep-dense "
                "and put from-dense around it (--method from-dense --set inner=replay)."
            )
        with open_log(trained) as log:
            _check_run(log, trained, self.force)
            out = torch.cat([split.forget, trained.forgotten.positions(trained.task)])
            cost, state = _from_where(log, out)
            cohorts = recorded_cohorts(log)
        everyone = torch.arange(len(trained.task.records))
        left = everyone[~torch.isin(everyone, out)]
        warnings.warn(_sentence(cost), stacklevel=3)
        network = replay(
            trained, left, everyone, fit, cost["of"], cohorts=cohorts, start=state, label=self.name
        )
        trained.network.load_state_dict(network.state_dict())
        fit.meter.facts["replayed"] = {"log": log.id} | cost


def recorded_cohorts(log: UpdateLog) -> Cohorts | None:
    """The cohorts of a recorded training; None where it had none."""
    found = log.cohorts()
    if not found:
        return None
    labels = torch.full((int(log.manifest["n"]),), -1, dtype=torch.long)
    labels[torch.tensor(list(found))] = torch.tensor(list(found.values()))
    return Cohorts(labels, int(log.manifest["cohorts_since"] or 0))


def _check_run(log: UpdateLog, trained: TrainedModel, force: bool) -> None:
    """Check that a model's training can be done again: same run, same records, same order.

    The key, too: without it the records of earlier requests cannot be told, and would come back.

    Raises:
        MismatchError: Naming what differs.
    """
    same_run(log, trained)
    check_key(log)
    step, task = training(trained), trained.task
    if step is None or step.verb != "train":
        raise MismatchError(
            "only a training on all records can be replayed (efface train --record); take retrain."
        )
    recorded, here = log.manifest["data"], task.data_fingerprint
    if recorded["fingerprint"] != here or recorded["n"] != len(task.records):
        raise MismatchError(
            f"the task's data ({len(task.records)} records, fingerprint {here[:12]}) is not what "
            f"was trained on ({recorded['n']} records, {recorded['fingerprint'][:12]}); a replay "
            "needs the same records in the same order, those to be left out included."
        )
    if len(log.cohorts()) != (step.detail.get("cohorts") or {}).get("records", 0):
        raise MismatchError(
            f"the log {log.folder} no longer knows who was in the cohorts of this training, so "
            "that its batches cannot be made again; take retrain."
        )
    then, now = log.manifest["versions"], versions()
    other = [f"{name} {then[name]}" for name in ("torch", "numpy") if then[name] != now[name]]
    if other and not force:
        raise MismatchError(
            f"the training ran with {' and '.join(other)}, and a replay with another version need "
            "not equal it byte for byte; install that version, or go on with --force (force=true)."
        )


def _from_where(log: UpdateLog, out: Tensor) -> tuple[dict[str, Any], State | None]:
    """What a replay costs, and the state to go on from: the last one that can be read."""
    cost = way_back(log, out.numpy().astype(np.int64))
    journal = Journal(log.folder / "checkpoints", {"log": log.id})
    for epoch in reversed([e for e in kept_epochs(log) if e <= cost["first"]]):
        state = journal.read(f"epoch-{epoch:04d}")
        if state is None and epoch == cost["start"] > 0:
            warnings.warn(
                f"the state at the start of epoch {epoch + 1} in {log.folder} is damaged: the "
                "replay goes on from an earlier one.",
                stacklevel=4,
            )
        if state is not None:
            left = cost["of"] - epoch
            return cost | {"start": epoch, "epochs": left, "share": left / cost["of"]}, state
    return cost | {"start": 0, "epochs": cost["of"], "share": 1.0}, None


def _sentence(cost: dict[str, Any]) -> str:
    """What a replay will cost, and what would have made it cheap.

    Cohorts would not have where D_f came late, and only the state from before it is missing.
    """
    cheap = (
        "; train deletable records as a cohort in the last epochs to make this cheap "
        "(--cohort FILE --cohort-epochs N)"
    )
    return (
        f"D_f appears from epoch {cost['first'] + 1} on: {cost['epochs']} of {cost['of']} epochs "
        f"are trained again, about {100 * cost['share']:.0f} % of a training"
        f"{cheap if cost['share'] > 0.5 and not cost['first'] else ''}."
    )
