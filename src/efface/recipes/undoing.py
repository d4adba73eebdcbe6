"""What undoing logged updates does to a model, and what a log of them takes on disk.

Forgetting and damage are told apart here: what is still remembered of D_f is one number, what was
lost beside it another, both against a model retrained without D_f.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from efface.auditing import Subject
from efface.recipes.plan import Size
from efface.recipes.sources import Selection
from efface.recipes.spread import spread
from efface.stats import rate
from efface.trained import TrainedModel

if TYPE_CHECKING:
    from efface.updates.codec import Kind
    from efface.updates.layout import Layout
    from efface.updates.pruning import Update

Row = Mapping[str, Any]
Spread = Mapping[str, Any]

UNDONE = (
    *("target_test_accuracy", "other_test_accuracy"),
    *("moved", "weight_distance", "steps_share"),
)
"""What a row of a recorded model says beside the usual metrics, as far as it applies."""

SIDES = {"memory": ("ua",), "damage": ("ra", "ta")}
"""The metrics that tell what is remembered of D_f, and those that tell what was lost beside it.

No attack is among them: damage moves the records that it compares D_f with.
"""
KEEPS = (1.0, 0.6, 0.3, 0.1, 0.05, 0.01)
KINDS: tuple[Kind, ...] = ("bf16", "int8")
"""How values are stored when measured; finer kinds would only tell how the log was rounded."""
SAMPLE = 24
"""Steps of a log that its storage is measured on."""
POINT = 0.01
"""What is smaller is called neither remembered nor damaged, however certain it is."""


# -- a row ------------------------------------------------------------------------------------


def undo_metrics(
    selection: Selection,
    subject: Subject,
    model: TrainedModel,
    before: TrainedModel,
    retrained: TrainedModel | None,
) -> dict[str, dict[str, Any]]:
    """What a row of a recorded model says beside the usual metrics.

    Args:
        selection: What was to be forgotten: of a class, or a part of one, the accuracy on the test
            records of that class and of all others is given.
        subject: Of this model.
        model: The model of the row.
        before: Its original: ``moved`` is ‖θ′ − θ‖ / ‖θ‖, over trainable parameters.
        retrained: ``weight_distance`` is ‖θ′ − θᵣ‖ / ‖θ − θᵣ‖: 1 for the original; ``None``: not
            asked for.
    """
    found: dict[str, dict[str, Any]] = {}
    if selection.label is not None:
        answers, targets = subject.logits(model, "test").argmax(1), subject.targets("test")
        for name, here in (
            ("target_test_accuracy", targets == selection.label),
            ("other_test_accuracy", targets != selection.label),
        ):
            found[name] = asdict(rate(int((answers == targets)[here].sum()), int(here.sum())))
    here, there = weights(model), weights(before)
    values = {"moved": _over(here - there, there)}
    if retrained is not None:
        goal = weights(retrained)
        values["weight_distance"] = _over(here - goal, there - goal)
    detail = model.lineage[-1].detail
    if "removed" in detail:
        total = (before.trained_by().detail["log"])["steps"]  # type: ignore[union-attr]
        values["steps_share"] = sum(entry["n"] for entry in detail["removed"]) / total
    return found | {
        k: {"value": v, "low": None, "high": None, "n": None} for k, v in values.items()
    }


def weights(model: TrainedModel) -> npt.NDArray[np.float64]:
    """All trainable parameters in one vector, in the order of ``named_parameters``."""
    own = [p.detach().cpu() for p in model.network.parameters() if p.requires_grad]
    return np.concatenate([p.double().numpy().ravel() for p in own])


def _over(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    whole = float(np.linalg.norm(b))
    return float(np.linalg.norm(a)) / whole if whole else 0.0


# -- storage ----------------------------------------------------------------------------------


def stored(folder: Path, steps: int = SAMPLE) -> dict[str, Any]:
    """What a step takes at each keep fraction, measured: logged updates are pruned and encoded.

    Args:
        folder: A finished log.
        steps: How many of its steps, evenly spaced.

    Returns:
        ``whole``: bytes of an update in fp32; ``disk``: bytes of the log over its steps, ``keep``
        its keep fraction; ``kept``: for each keep fraction that the log allows the mean ``bytes``
        for each kind of values, and ``norm``, the share of the squared norm of a step (of trainable
        parameters) that is left.
    """
    from efface.updates.codec import decode, encode
    from efface.updates.layout import Layout
    from efface.updates.log import UpdateLog
    from efface.updates.pruning import prune_update

    with UpdateLog.open(folder) as log:
        info, layout = log.info(), Layout.from_json(log.manifest["layout"])
        which = np.unique(np.linspace(0, info["steps"] - 1, steps).round().astype(np.int64))
        updates = [decode(payload) for _, _, payload in log.frames(which)]
        keep = float(log.manifest["keep"])
    kept = []
    for fraction in (k for k in KEEPS if k <= keep):
        pruned = [prune_update(update, layout, fraction) for update in updates]
        sizes = {
            kind: float(np.mean([len(encode(p, kind, layout.bounds)) for p in pruned]))
            for kind in KINDS
        }
        norms = [
            _squares(p, layout) / whole
            for p, u in zip(pruned, updates, strict=True)
            if (whole := _squares(u, layout))
        ]
        kept.append({"keep": fraction, "bytes": sizes, "norm": float(np.mean(norms or [0.0]))})
    disk = info["bytes"] / info["steps"]
    return {"whole": 4 * layout.total, "disk": disk, "keep": keep, "kept": kept}


def _squares(update: Update, layout: Layout) -> float:
    """Squared norm of an update, without the buffers at its end."""
    own = sum(int(np.prod(shape, dtype=np.int64)) for _, shape in layout.dense)
    parts = (update.values, update.dense[:own])
    return float(sum(np.sum(part.astype(np.float64) ** 2) for part in parts))


def storage(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each model and keep fraction: bytes of a step, how many times smaller than fp32, norm.

    Args:
        rows: Those of originals say what their log takes.
    """
    there = [row for row in rows if row.get("storage")]
    found = []
    for model in dict.fromkeys(row["model"] for row in there):
        mine = [row["storage"] for row in there if row["model"] == model]
        for i, first in enumerate(mine[0]["kept"]):
            same = [one["kept"][i] for one in mine]
            kinds = {kind: spread([one["bytes"][kind] for one in same]) for kind in first["bytes"]}
            both = list(zip(mine, same, strict=True))
            smaller = {k: spread([m["whole"] / one["bytes"][k] for m, one in both]) for k in kinds}
            found.append(
                {
                    "model": model,
                    "keep": first["keep"],
                    "whole": mine[0]["whole"],
                    "bytes": kinds,
                    "smaller": smaller,
                    "norm": spread([one["norm"] for one in same]),
                }
            )
    return found


# -- forgetting, or damage --------------------------------------------------------------------


def side(kind: str, row: Row, reference: Mapping[str, float]) -> float | None:
    """What is still remembered of D_f, or what was lost beside it: signed, 0 as retrained.

    The mean over the metrics of :data:`SIDES` of what the retrained model has more: above zero, D_f
    is answered as in training more often (``memory``), or everything else worse (``damage``).

    >>> row = {"metrics": {"ra": {"value": 0.9}, "ta": {"value": 0.8}}}
    >>> round(side("damage", row, {"ra": 1.0, "ta": 0.9}), 3)
    0.1
    """
    names, values = SIDES[kind], row["metrics"]
    if not all(name in values and name in reference for name in names):
        return None
    apart = [reference[name] - values[name]["value"] for name in names]
    return float(np.mean(apart))


def verdict(memory: Spread, damage: Spread, original: Spread) -> str:
    """What a method did, in words, from 95 % intervals over training seeds.

    Args:
        memory: What is still remembered, over seeds.
        damage: What was lost beside it.
        original: What the untouched model remembers.

    >>> alike = {"mean": 0.0, "low": -0.004, "high": 0.004}
    >>> much = {"mean": 0.4, "low": 0.3, "high": 0.5}
    >>> verdict(alike, alike, much), verdict(alike, much, much), verdict(much, alike, much)
    ('forgets', 'forgets, damaged', 'remembers')
    >>> verdict(alike, much, alike)
    'not measurable, damaged'
    """
    if any(entry["low"] is None for entry in (memory, damage, original)):
        return ""
    lost = damage["low"] > 0 and damage["mean"] >= POINT
    return _remembered(memory, original) + (", damaged" if lost else "")


def _remembered(memory: Spread, original: Spread) -> str:
    there = original["mean"]
    if not (original["low"] > 0 and there >= POINT):  # nothing that could be seen to go
        return "not measurable"
    if memory["low"] > 0 and memory["mean"] >= max(POINT, 0.1 * there):
        return "remembers"
    if memory["high"] < 0 and memory["mean"] <= -POINT:
        return "over-forgets"
    return "forgets" if memory["high"] < 0.5 * there else "unclear"


def curves_over_keep(plan: Size, summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is remembered and lost against the keep fraction: a line for each model and series.

    A series is the methods that differ in ``keep`` alone: ``NAME-100``, ``NAME-10`` and so on.
    """
    points: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for entry in summary:
        method = plan.methods.get(entry["method"])
        series, _, percent = entry["method"].rpartition("-")
        keep = method.options.get("keep") if method else None
        if keep is None or percent != f"{100 * keep:g}":
            continue
        sides = {kind: entry[kind] for kind in SIDES}
        key = (entry["scenario"], entry["model"], series)
        points.setdefault(key, []).append({"keep": keep, **sides})
    return [
        {"scenario": at, "model": model, "series": series, "points": line}
        for (at, model, series), line in points.items()
        if len(line) > 2
    ]
