"""What the released attack's numbers depend on: the balance of its records, and the share deleted.

An attack that is fitted on members and non-members puts its threshold where their shares tell it
to. Here the same attack is fitted at several balances, on models from which several shares of the
data were deleted, beside numbers for which no threshold is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from efface.auditing import Subject
from efface.auditing.membership import svc_at_balance
from efface.placement import pick_device
from efface.recipes.models import Bench
from efface.recipes.plan import Size
from efface.recipes.spread import spread
from efface.signals import confidence, softmax
from efface.task import Split
from efface.trained import TrainedModel

Row = Mapping[str, Any]
FITTED = ("accuracy", "mia_efficacy", "auc")
"""Measured at every balance; the last one fits no threshold."""
PLAIN = ("mia_auc", "mia_tpr_at_1fpr", "mask_trace")
"""Measured once for every share: of D_f against unseen records, and of the mask."""


def at_balances(bench: Bench, model: TrainedModel, split: Split) -> list[dict[str, float]]:
    """The released attack on a model, fitted at every balance on as many records.

    Members are drawn from D_r, non-members from the test records; as many as the most uneven
    balances leave of both.
    """
    subject = Subject(model, model, split, device=pick_device(bench.device))

    def sure(part: Any) -> npt.NDArray[np.float64]:
        return confidence(softmax(subject.logits(model, part)), subject.targets(part))

    inside, outside, forgotten = sure("retain"), sure("test")[subject.seen_test], sure("forget")
    shares = bench.plan.balances
    size = int(min(len(inside) / max(shares), len(outside) / (1 - min(shares))))
    found = []
    for i, share in enumerate(shares):
        draw = np.random.default_rng([0, i])
        said = svc_at_balance(inside, outside, forgotten, share, size, draw)
        found.append({"balance": share, "records": size, **said})
    return found


def stability(plan: Size, rows: Sequence[Row]) -> dict[str, Any] | None:
    """How far each number moves with the balance, and with the share of the data that is deleted.

    Returns:
        ``lines``: for each model, method, measure and scenario the mean over seeds at every balance
        with its interval; ``by_share``: the same against the share deleted, at the balance that is
        nearest to a half where the measure takes one; ``spreads``: for each model, method and
        measure the range (largest minus smallest) over balances, averaged over scenarios, and over
        scenarios, averaged over balances, both per seed, with intervals over seeds; ``facts`` for
        the text. None for a plan without balances.
    """
    there = [row for row in rows if row.get("balances")]
    if not plan.balances or not there:
        return None
    names = list(dict.fromkeys((row["model"], row["method"]) for row in there))
    lines, by_share, spreads = [], [], []
    even = int(np.argmin(np.abs(np.array(plan.balances) - 0.5)))
    shares = {name: case.forget.random for name, case in plan.cases.items()}
    for model, method in names:
        mine = [row for row in there if (row["model"], row["method"]) == (model, method)]
        about = {"model": model, "method": method}
        for measure in FITTED:
            values = _cube(mine, measure, plan)
            for k, scenario in enumerate(plan.cases):
                points = [
                    {"x": b, **spread(_known(values[:, k, i]))} for i, b in enumerate(plan.balances)
                ]
                lines.append({**about, "measure": measure, "scenario": scenario, "points": points})
            spreads.append({**about, "measure": measure, **_ranges(values)})
            points = _against_share(values[:, :, even], shares)
            by_share.append({**about, "measure": measure, "points": points})
        for measure in PLAIN:
            once = _plain(mine, measure, plan)
            own = measure != "mask_trace" or method == "original"  # the others have the same
            if own and not np.isnan(once).all():
                spreads.append({**about, "measure": measure, **_ranges(once[:, :, None])})
                points = _against_share(once, shares)
                by_share.append({**about, "measure": measure, "points": points})
    return {
        "balances": list(plan.balances),
        "shares": shares,
        "lines": lines,
        "by_share": by_share,
        "spreads": spreads,
        "facts": facts(there),
    }


def _against_share(
    values: npt.NDArray[np.float64], shares: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Means with intervals over seeds, for the scenarios that delete a share; ``[seeds, …]``."""
    found = []
    for k, share in enumerate(shares.values()):
        known = _known(values[:, k])
        if share is not None and known:
            found.append({"x": share, **spread(known)})
    return found


def _seeds(rows: Sequence[Row]) -> list[int]:
    return sorted({row["seed"] for row in rows})


def _cube(rows: Sequence[Row], measure: str, plan: Size) -> npt.NDArray[np.float64]:
    """Values ``[seeds, scenarios, balances]``; NaN where a row is missing."""
    seeds, names = _seeds(rows), list(plan.cases)
    found = np.full((len(seeds), len(names), len(plan.balances)), np.nan)
    for row in rows:
        at = seeds.index(row["seed"]), names.index(row["scenario"])
        found[at] = [point[measure] for point in row["balances"]]
    return found


def _plain(rows: Sequence[Row], measure: str, plan: Size) -> npt.NDArray[np.float64]:
    """Values ``[seeds, scenarios]`` of a measure that takes no balance."""
    seeds, names = _seeds(rows), list(plan.cases)
    found = np.full((len(seeds), len(names)), np.nan)
    for row in rows:
        if measure in row["metrics"]:
            at = seeds.index(row["seed"]), names.index(row["scenario"])
            found[at] = row["metrics"][measure]["value"]
    return found


def _known(values: npt.NDArray[np.float64]) -> list[float]:
    return [float(v) for v in values if not np.isnan(v)]


def _ranges(values: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Largest minus smallest along balances and along scenarios, per seed."""
    over_balance = np.ptp(values, axis=2).mean(axis=1) if values.shape[2] > 1 else None
    whole = values[:, ~np.isnan(values).any(axis=(0, 2))]  # scenarios that every seed has
    over_share = np.ptp(whole, axis=1).mean(axis=1) if whole.shape[1] > 1 else None
    return {
        "balance": None if over_balance is None else spread(_known(over_balance)),
        "share": None if over_share is None else spread(_known(over_share)),
    }


def facts(rows: Sequence[Row]) -> dict[str, Any]:
    """What the text rests on, over all rows.

    Returns:
        ``explained``: the share of the accuracy's variance that the accuracy of always naming the
        larger side explains; ``above``: how far the accuracy lies above it, on average; ``order``:
        Spearman's rank correlation of balance and MIA-efficacy, on average over rows;
        ``auc_order``: the same for the AUC; ``efficacy``: the mean of MIA-efficacy at the first and
        at the last balance.
    """
    base, accuracy, first, last = [], [], [], []
    for row in rows:
        points = sorted(row["balances"], key=lambda p: p["balance"])
        base += [max(p["balance"], 1 - p["balance"]) for p in points]
        accuracy += [p["accuracy"] for p in points]
        first.append(points[0]["mia_efficacy"])
        last.append(points[-1]["mia_efficacy"])
    apart = np.array(accuracy) - np.array(base)
    whole = float(np.var(accuracy))
    return {
        "explained": float(1 - np.var(apart) / whole) if whole else None,
        "above": float(np.mean(apart)),
        "order": _order(rows, "mia_efficacy"),
        "auc_order": _order(rows, "auc"),
        "efficacy": [float(np.mean(first)), float(np.mean(last))],
    }


def _order(rows: Sequence[Row], measure: str) -> float | None:
    """The mean over rows of the rank correlation of balance and measure."""
    found = []
    for row in rows:
        values = [point[measure] for point in row["balances"]]
        if len(set(values)) > 1:
            shares = [point["balance"] for point in row["balances"]]
            found.append(float(stats.spearmanr(shares, values)[0]))
    return float(np.mean(found)) if found else None
