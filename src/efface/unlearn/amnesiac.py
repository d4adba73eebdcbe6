"""Amnesiac unlearning: take the logged updates of the steps that held D_f back; and its controls.

Approximate and behavioural: undoing step 1 of steps 0, 1, 2 is not training on steps 0 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from efface.errors import MethodError
from efface.fitting import Fit
from efface.seeds import rng
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.finetune import FineTune
from efface.unlearn.ledger import Case, Steps, entry, note, open_log, way_back
from efface.unlearn.subtraction import (
    BN,
    Flat,
    admission,
    begin,
    check_keep,
    check_options,
    cut,
    finish,
    norm,
    say_what_went_before,
    sums,
    take,
    unaffected,
)

if TYPE_CHECKING:
    from efface.updates.log import UpdateLog

Control = Literal["unaffected", "random", "same-norm", "bn-only"]


@dataclass(frozen=True)
class Amnesiac:
    """Subtract γ × the logged updates of the steps whose batch held a record of D_f.

    θ′ = θ − γ · Σ Δ_t over those steps, none of them twice (Graves et al. 2021); where the log, or
    ``keep``, leaves only the largest entries of each layer, this is partial amnesiac unlearning
    (Gogineni & Nadimi 2024). Approximate and behavioural, without a guarantee of any kind: its
    answers change, its weights stay about as far from the retrained model's as they were.

    Refuses where D_f touches more than 10 % of the training's steps (with what earlier requests
    took), and warns above 1 %.

    Args:
        gamma: Factor γ.
        keep: Prune every logged update again, to this fraction of each layer; ``None``: as logged.
        bn: Batch-norm statistics: ``recalibrate`` takes them anew on up to 512 records of D_r,
            ``subtract`` takes their logged changes back, too, ``keep`` leaves them alone.
        repair: Epochs of fine-tuning on D_r afterwards.
        force: Go on where D_f touches too many steps.

    Example:
        ``efface.forget(trained, split, Amnesiac(keep=0.1), log="log/")``
    """

    name: ClassVar[str] = "amnesiac"
    title: ClassVar[str] = "Amnesiac unlearning"
    paper: ClassVar[str] = "Graves et al. 2021"
    needs: ClassVar[frozenset[str]] = frozenset({"log", "retain"})

    gamma: float = 1.0
    keep: float | None = None
    bn: BN = "recalibrate"
    repair: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        check_options(self.name, self.gamma, self.keep)
        if self.repair < 0:
            raise MethodError(f"{self.name}: repair must be 0 or more, not {self.repair}.")

    def check(self, trained: TrainedModel, split: Split) -> None:
        """Raise for everything that can be known before anything runs."""
        with open_log(trained) as log:
            self._begin(log, trained, split, None)

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        with open_log(trained) as log:
            case = self._begin(log, trained, split, fit)
            say_what_went_before(case, trained, fit, self.gamma, self.keep)
            (total,) = sums(case, case.due, cut(case, self.keep))
        take(trained, case.layout, total, self.gamma, buffers=self.bn == "subtract")
        note(fit, entry(case, case.due, gamma=self.gamma, keep=self.keep))
        finish(trained, split, fit, self.bn)
        if self.repair:
            FineTune(epochs=self.repair)(trained, split, fit.at("repair"))

    def _begin(self, log: UpdateLog, trained: TrainedModel, split: Split, fit: Fit | None) -> Case:
        check_keep(self.name, log, self.keep)
        return begin(log, trained, split, fit, name=self.name, force=self.force)


@dataclass(frozen=True)
class AmnesiacControl:
    """What amnesiac unlearning must be compared with, so that damage does not pass for forgetting.

    Each takes from the model as amnesiac unlearning does, but the wrong thing.

    Args:
        control: ``unaffected``: as many steps that did *not* hold D_f, drawn at random;
            ``random``: D_f's steps, but of each layer a random ``keep`` instead of the largest;
            ``same-norm``: D_f's steps as logged, scaled to the norm that pruning to ``keep`` would
            have taken; ``bn-only``: nothing, only batch norm recalibrated.
        keep: Fraction of each layer, for ``random`` and ``same-norm``.
        gamma: Factor γ.
        bn: As for :class:`Amnesiac`.
        force: Go on where D_f touches too many steps.

    Example:
        ``efface.forget(trained, split, AmnesiacControl("unaffected"), log="log/")``
    """

    name: ClassVar[str] = "amnesiac-control"
    title: ClassVar[str] = "Controls of amnesiac unlearning"
    paper: ClassVar[str] = "a control"
    needs: ClassVar[frozenset[str]] = frozenset({"log", "retain"})

    control: Control = "unaffected"
    keep: float = 0.1
    gamma: float = 1.0
    bn: BN = "recalibrate"
    force: bool = False

    def __post_init__(self) -> None:
        check_options(self.name, self.gamma, self.keep)

    def check(self, trained: TrainedModel, split: Split) -> None:
        """Raise for everything that can be known before anything runs."""
        with open_log(trained) as log:
            self._begin(log, trained, split, None)

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        with open_log(trained) as log:
            case = self._begin(log, trained, split, fit)
            steps, cut_to = case.due, self.keep if self.control == "random" else None
            if self.control != "bn-only":
                say_what_went_before(case, trained, fit, self.gamma, cut_to)
            if self.control == "unaffected":
                steps = unaffected(case, rng(fit.seed, f"{fit.path}/unaffected"))
            elif self.control == "bn-only":
                steps = steps[:0]
            total, factor = self._sum(case, steps, fit)
        gamma = self.gamma * factor
        take(trained, case.layout, total, gamma, buffers=self.bn == "subtract")
        facts = {"control": self.control, "wanted": len(case.due)}
        note(fit, entry(case, steps, gamma=gamma, keep=cut_to, **facts))
        finish(trained, split, fit, "recalibrate" if self.control == "bn-only" else self.bn)

    def _begin(self, log: UpdateLog, trained: TrainedModel, split: Split, fit: Fit | None) -> Case:
        if self.control in {"random", "same-norm"}:
            check_keep(f"{self.name} {self.control}", log, self.keep, whole=True)
        if self.control == "unaffected" and log.manifest["attribution"] == "record":
            raise MethodError(
                f"{self.name}: control=unaffected needs whole steps, and the log {log.folder} "
                "holds the shares of sensitive records; record with attribution=batch."
            )
        taking = self.control != "bn-only"
        return begin(log, trained, split, fit, name=self.name, force=self.force, taking=taking)

    def _sum(self, case: Case, steps: Steps, fit: Fit) -> tuple[Flat, float]:
        """The sum to subtract, and a further factor of it."""
        if self.control == "random":
            draw = rng(fit.seed, f"{fit.path}/random")
            return sums(case, steps, cut(case, self.keep, draw))[0], 1.0
        if self.control == "same-norm":
            dense, pruned = sums(case, steps, None, cut(case, self.keep))
            size = norm(dense, case.layout)
            return dense, norm(pruned, case.layout) / size if size else 1.0
        return sums(case, steps, None)[0], 1.0


# -- what it would cost ---------------------------------------------------------------------------


def outlook(log: UpdateLog, numbers: Steps, removed: Steps | None = None) -> dict[str, Any]:
    """What each way of forgetting some records would cost; reads the index alone.

    Args:
        log: Open for reading.
        numbers: The records' numbers in it ``[n]``.
        removed: Steps that were subtracted from the model before; see
            :func:`efface.unlearn.ledger.removed_steps`.

    Returns:
        ``records``, ``total`` (steps of the training), ``steps`` (that held the records),
        ``removed`` (before), ``due`` (that a request would subtract), ``missing`` (of those, whose
        update the log lacks), ``share`` (of the training that would be gone), ``verdict`` (``go``,
        ``warn``, ``refuse`` or ``impossible``), ``reason`` (why it is impossible, or None),
        ``bytes`` (to read, from the mean size of an update), and under
        ``replay`` the epoch ``first`` that held the records, the epoch ``start`` to go on from, the
        ``epochs`` to train ``of`` those of the training, and their ``share``.

    Example:
        ``outlook(log, log.numbers(tags(["p017"], key)))["verdict"]``
    """
    before = np.empty(0, dtype=np.int64) if removed is None else np.asarray(removed, np.int64)
    steps = np.asarray(log.steps_of(numbers), dtype=np.int64)
    whole = log.manifest["attribution"] == "batch"
    due = np.setdiff1d(steps, before) if whole else steps
    info, live = log.info(), np.array(log.states(due)) == "live"
    total = int(info["steps"])
    share = len(np.union1d(due, before)) / total if total else 0.0
    missing = int((~live).sum())
    reason = _impossible(info, int((~log.seen(numbers)).sum()), missing)
    updates = live.sum() if whole else sum(len(log.steps_of([int(n)])) for n in numbers)
    return {
        "records": len(numbers),
        "total": total,
        "steps": len(steps),
        "removed": len(before),
        "due": len(due),
        "missing": missing,
        "share": share,
        "verdict": "impossible" if reason else admission(share) if len(due) else "go",
        "reason": reason,
        "bytes": round(info["bytes"] * updates / max(1, info["frames"])),
        "replay": way_back(log, numbers),
    }


def _impossible(info: Mapping[str, Any], unseen: int, missing: int) -> str | None:
    """Why subtraction would be refused whatever is said; asked in the order in which it is."""
    if info["failed"]:
        return f"recording ended early, at step {info['failed_at']}"
    if not info["finished"]:
        return "the log is not finished"
    if unseen:
        return f"{unseen:,} of the records {'is' if unseen == 1 else 'are'} in no step of the log"
    if missing:
        what = "update of these is" if missing == 1 else "updates of these are"
        return f"{missing:,} {what} not in the log"
    return None
