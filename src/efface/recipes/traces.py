"""The topology of pruned models: masks beside those of retrained models, and the trace removed.

A mask is scored against references that began with the original's initial weights and saw the
batches in another order; what they agree on less with the original than with one another is the
trace of D_f.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from efface.auditing.topology import initial_mask, topology
from efface.auditing.trace import unequal
from efface.errors import EffaceError
from efface.fitting import Fit
from efface.mask import Mask
from efface.recipes.models import Bench, Job, original, reference
from efface.replay import initial_weights
from efface.stats import mean_interval
from efface.trained import TrainedModel

Floats = npt.NDArray[np.float64]

NAMES = {
    "iou": "mask_iou",
    "iom": "mask_iom",
    "before": "mask_iou_before",
    "chance": "mask_iou_chance",
    "initial": "mask_iou_initial",
    "ceiling": "mask_iou_ceiling",
    "other_init": "mask_iou_other_init",
}


_SHOWN = "the masks of retrained models cannot be shown to agree more with one another"
_NONE = "the masks of retrained models agree no more with one another"


def masks_beside(bench: Bench, job: Job) -> list[Job]:
    """The models whose masks a row is measured against.

    References of all orders, one of another seed, and originals of other orders.
    """
    plan, seeds = bench.plan, bench.seeds or bench.plan.seeds
    if job.kind != "row" or bench.model(job.model).like != "repruned" or job.seed >= seeds:
        return []
    plain = replace(job, kind="reference", method="", options={}, like="")
    found = [replace(plain, order=k) for k in range(plan.orders)]
    if seeds > 1:  # of another training seed: it has other initial weights
        found.append(replace(plain, seed=job.seed - 1 if job.seed else 1, order=0))
    whole = replace(plain, kind="original")
    return found + [replace(whole, order=k) for k in range(1, plan.originals)]


def mask_metrics(
    bench: Bench, job: Job, model: TrainedModel, say: Callable[[str], None]
) -> dict[str, Any]:
    """What a row of a pruned model says of its mask; nothing where there is none to compare with.

    ``mask_iou`` of a reference is measured against the others only.
    """
    beside = masks_beside(bench, job)
    if not beside or model.mask is None:
        return {}
    masks = [(o, _made(bench, o, say).mask) for o in beside]
    again = [m for o, m in masks if o.kind == "original" and m is not None]
    masks = [(o, m) for o, m in masks if o.kind == "reference"]
    alike = {o.order: m for o, m in masks if o.seed == job.seed and m is not None}
    others = [m for o, m in masks if o.seed != job.seed and m is not None]
    before = original(bench, job, say)
    assert before.mask is not None
    first = _initial_mask(before)
    found = topology(model.mask, before.mask, list(alike.values()), first, others)
    itself = job.method in ("retrain", "retrain-again")
    rest = [mask for order, mask in alike.items() if not itself or order != job.order]
    if itself:
        own = topology(model.mask, before.mask, rest, None, ()) if rest else {}
        found |= {name: own.get(name, float("nan")) for name in ("iou", "iom")}
    values = {NAMES[name]: value for name, value in found.items() if value == value}
    if "ceiling" in found:
        values["mask_trace"] = found["ceiling"] - found["before"]
    if again and len(alike) > 1 and rest:
        values |= _leans(model.mask, before.mask, rest, list(alike.values()), again)
    return {k: {"value": v, "low": None, "high": None, "n": None} for k, v in values.items()}


def _made(bench: Bench, job: Job, say: Callable[[str], None]) -> TrainedModel:
    return (original if job.kind == "original" else reference)(bench, job, say)


def _leans(
    after: Mask,
    before: Mask,
    rest: Sequence[Mask],
    without: Sequence[Mask],
    seen: Sequence[Mask],
) -> dict[str, float]:
    """To which side masks lean: towards models without D_f (above zero) or with it.

    A mask's lean is its mean overlap with retrained models less that with *other* originals. What
    makes a mask overlap more or less with all others, such as the noise of its training, cancels.
    """

    def lean(mask: Mask, towards: Sequence[Mask]) -> float:
        there, here = ([mask.iou(o) for o in masks] for masks in (towards, seen))
        return float(np.mean(there) - np.mean(here))

    goal = float(np.mean([lean(m, [o for o in without if o is not m]) for m in without]))
    start = lean(before, without)
    alike = float(np.mean([m.iou(before) for m in seen])), whole_overlap(without)
    return {
        "mask_lean": lean(after, rest),
        "mask_lean_before": start,
        "mask_lean_goal": goal,
        "mask_trace_between": (goal - start) / 2 - unequal(*alike),
    }


def whole_overlap(masks: Sequence[Mask]) -> float:
    """Mean overlap of all pairs."""
    return float(np.mean([a.iou(b) for a, b in combinations(masks, 2)]))


def _initial_mask(before: TrainedModel) -> Mask | None:
    """The mask of the largest initial weights, where these can be had."""
    assert before.mask is not None
    try:
        return initial_mask(initial_weights(before, Fit(before.task)), before.mask)
    except EffaceError:
        return None


def ratio_interval(
    above: Sequence[float], below: Sequence[float], level: float = 0.95
) -> tuple[float, float, float]:
    """A ratio of two means over the same seeds, with Fieller's interval.

    The interval holds every ratio r for which the mean of ``above − r · below`` cannot be told from
    zero by Student's t; it is bounded where the mean of ``below`` can be told from zero.

    Args:
        above: One value per seed ``[n]``, n ≥ 2.
        below: The same seeds ``[n]``.
        level: Of confidence.

    Returns:
        Ratio, low, high; the last two are infinite where the interval is not bounded.

    Source: Fieller 1954.

    >>> [round(v, 2) for v in ratio_interval([1.0, 1.1, 0.9], [2.0, 2.2, 1.8])]
    [0.5, 0.5, 0.5]
    """
    n = len(above)
    (va, cov), (_, vb) = np.cov(above, below) / n * stats.t.ppf((1 + level) / 2, n - 1) ** 2
    a, b = float(np.mean(above)), float(np.mean(below))
    # the r with (a − r b)² ≤ va − 2 r cov + r² vb
    square, linear, constant = b * b - vb, a * b - cov, a * a - va
    if square <= 0:
        return a / b if b else float("nan"), -float("inf"), float("inf")
    root = float(np.sqrt(max(linear**2 - square * constant, 0.0)))
    return a / b, float((linear - root) / square), float((linear + root) / square)


def trace_removed(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The share of the trace that a method has removed: 0 none, 1 as much as retraining does.

    Args:
        rows: Metrics of a method's rows, one per training seed.

    Returns:
        ``value``, ``low``, ``high`` (95 %, over seeds), ``n``, and the ``reason`` where there is no
        value; None where the rows say nothing of masks.
    """
    names = ("mask_iou", "mask_iou_before", "mask_iou_ceiling")
    found = [[row[n]["value"] for n in names] for row in rows if all(n in row for n in names)]
    if not found:
        return None
    after, before, ceiling = np.array(found).T
    trace = ceiling - before
    first = [row["mask_iou_initial"]["value"] for row in rows if "mask_iou_initial" in row]
    gone = _removed(after - before, trace, trace, f"no trace: {_SHOWN} than with the original's")
    if gone["value"] is not None and first and np.mean(first) >= np.mean(ceiling):
        return _absent(found, f"no trace: {_NONE} than with the largest initial weights")
    return gone


def trace_removed_between(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The share of the trace that is gone, measured from both sides.

    How far a mask's lean has gone from the original's to that of retrained models. It is what can
    still be read: a mask that was disturbed at random leans to neither side, which is half of the
    way. Where :func:`trace_removed` sees no trace because the original is trained with less noise
    than they, and so lies nearer to everything, this one still may.

    Args:
        rows: Metrics of a method's rows, one per training seed.

    Returns:
        As :func:`trace_removed`.
    """
    names = ("mask_lean", "mask_lean_before", "mask_lean_goal", "mask_trace_between")
    found = [[row[n]["value"] for n in names] for row in rows if all(n in row for n in names)]
    if not found:
        return None
    after, before, goal, trace = np.array(found).T
    why = "masks of models with and without the records are no more alike among themselves"
    return _removed(after - before, goal - before, trace, f"no trace: {why} than across")


def _removed(gained: Floats, whole: Floats, trace: Floats, why: str) -> dict[str, Any]:
    """The share of the way, over seeds, where the trace is more than noise; else why not."""
    if len(gained) < 2:
        return _absent(gained, "one training seed says nothing of the trace's spread")
    value, low, high = ratio_interval(list(gained), list(whole))
    if mean_interval(trace).low <= 0 or not np.isfinite([low, high]).all():
        return _absent(gained, why)
    return {"value": value, "low": low, "high": high, "n": len(gained), "reason": None}


def _absent(seeds: Sized, why: str) -> dict[str, Any]:
    return {"value": None, "low": None, "high": None, "n": len(seeds), "reason": why}
