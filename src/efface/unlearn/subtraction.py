"""What amnesiac unlearning and its controls share: admission, sums of updates, subtraction."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from efface.errors import LogError, MethodError
from efface.fitting import Fit
from efface.sparsify.units import refreshed_statistics
from efface.steps import batch_norms
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.ledger import (
    Case,
    Steps,
    check_trajectory,
    check_weights,
    entries,
    joined,
    trained_since,
    unseal,
)

if TYPE_CHECKING:
    from efface.updates.layout import Layout
    from efface.updates.log import UpdateLog
    from efface.updates.pruning import Update

Flat = np.ndarray[Any, np.dtype[np.float32]]
BN = Literal["recalibrate", "subtract", "keep"]

GO, WARN = 0.01, 0.10
"""Shares of a training's steps: up to the first, subtracting is safe without a repair (Graves et
al. 2021); above the second, it destroys the model."""


# -- before anything runs --------------------------------------------------------------------------


def admission(share: float) -> Literal["go", "warn", "refuse"]:
    """Whether so large a share of a training's steps may be subtracted.

    >>> [admission(share) for share in (0.01, 0.1, 0.11)]
    ['go', 'warn', 'refuse']
    """
    return "go" if share <= GO else "warn" if share <= WARN else "refuse"


def check_options(name: str, gamma: float, keep: float | None) -> None:
    """Raise a MethodError for a factor or a fraction that is out of range."""
    if not 0 < gamma < math.inf:
        raise MethodError(f"{name}: gamma must be positive, not {gamma}.")
    if keep is not None and not 0 < keep <= 1:
        raise MethodError(f"{name}: keep must lie in (0, 1], not {keep}.")


def begin(
    log: UpdateLog,
    trained: TrainedModel,
    split: Split,
    fit: Fit | None,
    *,
    name: str,
    force: bool,
    taking: bool = True,
) -> Case:
    """A request as the log sees it, admitted.

    Args:
        log: Open for reading.
        trained: Whose training it logs.
        split: What is to be forgotten.
        fit: The running fit: warnings are said; None: only ask, of an untouched model.
        name: The method's, for what is said.
        force: Whether too large a share of the training may go.
        taking: Whether anything is to be subtracted at all.

    Raises:
        MismatchError: If log and model do not belong together.
        LogError: If the log is not whole.
        MethodError: If too many steps would be gone.
    """
    check_trajectory(trained, fit)
    case = joined(log, trained, split, fit)
    if fit is None:
        check_weights(log, trained)
    if not taking:
        return case
    share = len(np.union1d(case.due, case.removed)) / case.total
    verdict = admission(share) if len(case.due) else "go"
    earlier = f", {len(case.removed)} of them by earlier requests" if len(case.removed) else ""
    if verdict == "refuse" and not force:
        raise MethodError(
            f"{name} would take back {len(case.due)} of {case.total} steps, and {percent(share)} "
            f"of the training would be gone{earlier}; more than {percent(WARN)} undoes the "
            "training rather than D_f: take l1-sparse or finetune, or replay (exact; efface log "
            "show tells what it costs), train deletable records as a cohort next time (--cohort), "
            "or go on with --force (force=true)."
        )
    check_there(case, case.due)
    if fit is not None:
        if verdict != "go":
            _say(
                f"{name} takes back {len(case.due)} of {case.total} steps: {percent(share)} of the "
                f"training is gone{earlier}; expect damage, audit the result, and repair it "
                "(repair=1)."
            )
        _say_what_came_since(case, trained, fit)
    return case


def _say_what_came_since(case: Case, trained: TrainedModel, fit: Fit) -> None:
    """Warn of a training that is not in the log; none matters where its last weights are back."""
    further = trained_since(trained, fit)
    if further and case.info["finished"].get("weights") != trained.digest:
        _say(
            f"this model was trained further after its log ended ({', '.join(further)}): those "
            "updates are not in the log, and what they hold of D_f stays."
        )


def say_what_went_before(
    case: Case, trained: TrainedModel, fit: Fit, gamma: float, keep: float | None
) -> None:
    """Warn where nothing is left to subtract, or where less was taken back than is asked for now.

    A step is never subtracted twice, so that what a weaker request left of it stays.
    """
    if case.per_record:
        return

    def strength(gamma: float, keep: float | None) -> tuple[float, float]:
        return gamma, float(case.log.manifest["keep"]) if keep is None else keep

    now = strength(gamma, keep)
    earlier: dict[tuple[float, float], Steps] = {}
    for made in entries(trained, fit, case.log.id):
        shared = np.intersect1d(case.steps, unseal(made["steps"], case.log.id))
        if len(shared):
            own = strength(made["gamma"], made.get("keep"))
            earlier[own] = np.union1d(earlier.get(own, shared), shared)
    weaker = {own: steps for own, steps in earlier.items() if own[0] < now[0] or own[1] < now[1]}
    done = len(case.steps) > 0 and not len(case.due)
    if not (done or weaker):
        return
    named = earlier if done else weaker
    gone = len(np.unique(np.concatenate(list(named.values()))))
    _say(
        f"{'all' if done else f'{gone} of'} {len(case.steps)} steps with D_f were taken back by an "
        f"earlier request ({'; '.join(_strength(*own) for own in named)})"
        f"{f', weaker than this one ({_strength(*now)})' if weaker else ''}: "
        f"{'nothing is' if done else 'they are not'} subtracted again."
    )


def _strength(gamma: float, keep: float) -> str:
    return f"gamma {gamma:g}, keep {keep:g}"


def _say(sentence: str) -> None:
    warnings.warn(sentence, UserWarning, stacklevel=5)


def check_there(case: Case, steps: Steps) -> None:
    """Check that the log has the updates of these steps; nothing overrides this.

    Raises:
        LogError: Naming the steps and why they are gone.
    """
    states = np.array(case.log.states(steps))
    gone = {why: steps[states == why] for why in np.unique(states) if why != "live"}
    if gone:
        words = "; ".join(
            f"{len(which)} {_REASONS.get(str(why), str(why))} (the first is step {which[0]})"
            for why, which in gone.items()
        )
        raise LogError(
            f"the log {case.log.folder} lacks updates of {sum(map(len, gone.values()))} of the "
            f"{len(steps)} steps with D_f: {words}; a part of them would forget a part, so take "
            "another method (replay, l1-sparse or finetune)."
        )


_REASONS = {
    "unrecorded": "were never recorded",
    "purged": "were purged for an earlier request",
    "expired": "have expired",
    "thinned": "were thinned out to keep the budget",
}


def check_keep(name: str, log: UpdateLog, keep: float | None, *, whole: bool = False) -> None:
    """Check that a log holds as much of every layer as is wanted of it.

    Args:
        name: The method's, for what is said.
        log: The log.
        keep: The fraction that is wanted; None: whatever there is.
        whole: Whether everything is needed to choose it from.

    Raises:
        MethodError: If the log holds less.
    """
    lowered = [event["new"] for event in log.info()["events"] if event["kind"] == "keep"]
    there, pick = min([float(log.manifest["keep"]), *lowered]), log.manifest["pick"]
    if keep is None or (there == 1 if whole else keep == there):
        return
    if whole or keep > there or pick != "magnitude":
        wanted = 1.0 if whole else keep
        raise MethodError(
            f"{name}: keep={keep:g} cannot be had from the log {log.folder}, which holds {there:g} "
            f"of each layer, by {pick}; leave keep out, or train with --record-set keep={wanted:g}."
        )


def percent(share: float) -> str:
    """A share in words.

    >>> percent(0.1234), percent(0.0123)
    ('12 %', '1.2 %')
    """
    return f"{100 * share:.{0 if share >= 0.0995 else 1}f} %"


# -- adding up -------------------------------------------------------------------------------------

Cut = Callable[[bytes], "Update"]
"""Reads a stored update, pruned further."""


def cut(case: Case, keep: float | None, draw: np.random.Generator | None = None) -> Cut | None:
    """How to prune a stored update to a fraction; None where it is to stay as it is.

    Args:
        case: Of which log.
        keep: Fraction of each layer; None leaves the update as it is.
        draw: Keeps random entries instead of the largest.
    """
    from efface.updates.codec import decode
    from efface.updates.pruning import Pick, prune_update

    if keep is None or (draw is None and keep == case.log.manifest["keep"]):
        return None
    pick: Pick = "magnitude" if draw is None else "random"
    return lambda payload: prune_update(decode(payload), case.layout, keep, pick, generator=draw)


def sums(case: Case, steps: Steps, *cuts: Cut | None) -> list[Flat]:
    """Sums of the updates of some steps, one for each way of cutting them, in one pass.

    Memory: a vector of the network's size for each, one update, and what reading takes.
    """
    from efface.updates.codec import add_all, add_to

    totals = [np.zeros(case.layout.total, dtype=np.float32) for _ in cuts]
    records = case.numbers if case.per_record else None
    frames = case.log.frames(steps, records) if len(steps) else iter(())
    if cuts == (None,):  # the log has checked what it read
        add_all(((payload, 1.0) for _, _, payload in frames), totals[0], checked=True)
        return totals
    for _, _, payload in frames:
        for total, pruned in zip(totals, cuts, strict=True):
            if pruned is None:
                add_to(payload, total)
                continue
            update = pruned(payload)
            total[update.indices] += update.values
            total[update.size :] += update.dense
    return totals


def norm(total: Flat, layout: Layout) -> float:
    """Euclidean norm of what a sum changes in the parameters; batch-norm statistics are none."""
    params = {name for name, _ in (*layout.sparse, *layout.dense)}
    parts = [part for name, part in layout.parts(total).items() if name in params]
    return math.sqrt(sum(float(np.square(part, dtype=np.float64).sum()) for part in parts))


def unaffected(case: Case, draw: np.random.Generator) -> Steps:
    """As many steps without D_f, drawn among those that the log has; fewer where there are not."""
    everyone = case.log.steps_of(np.arange(case.log.manifest["n"]))
    others = np.setdiff1d(everyone, np.union1d(case.steps, case.removed))
    others = others[np.array(case.log.states(others)) == "live"]
    chosen = draw.choice(others, min(len(case.due), len(others)), replace=False)
    return np.sort(chosen)


def take(trained: TrainedModel, layout: Layout, total: Flat, gamma: float, buffers: bool) -> None:
    """θ ← θ − γ · sum, in place, of the parameters and, if asked for, the statistics of batch norm.

    The mask stays exact; a variance stays at zero or above.
    """
    network = trained.network
    here: dict[str, torch.Tensor] = dict(network.named_parameters())
    here |= dict(network.named_buffers()) if buffers else {}
    with torch.no_grad():
        for name, part in layout.parts(total).items():
            if name in here:
                change = torch.from_numpy(part).to(here[name].device, here[name].dtype)
                here[name].sub_(change, alpha=gamma)
        for layer in batch_norms(network):
            if layer.running_var is not None:
                layer.running_var.clamp_(min=0.0)
    trained.set_mask(trained.mask)


def finish(trained: TrainedModel, split: Split, fit: Fit, bn: BN) -> None:
    """Take batch-norm statistics anew where that is asked for."""
    if bn == "recalibrate":
        refreshed_statistics(trained, split.retain, fit)
