"""Values over training seeds in short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efface.stats import mean_interval


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation over training seeds, and Student's 95 % interval of the mean."""
    if not values:
        return {"mean": None, "std": None, "low": None, "high": None, "n": 0}
    if len(values) == 1:
        return {"mean": float(values[0]), "std": None, "low": None, "high": None, "n": 1}
    found = mean_interval(np.asarray(values, dtype=float))
    return {
        "mean": found.value,
        "std": float(np.std(values, ddof=1)),
        "low": found.low,
        "high": found.high,
        "n": len(values),
    }


def word(apart: Mapping[str, Any]) -> str:
    """What a difference shows of a claim that it is below zero.

    Args:
        apart: The spread of the difference.

    Returns:
        ``holds`` where the whole interval is below zero, ``reversed`` where it is above, else ``not
        shown``: zero lies in it, or there are fewer than two seeds.

    >>> word(spread([-0.2, -0.21])), word(spread([0.2, 0.21])), word(spread([0.1]))
    ('holds', 'reversed', 'not shown')
    """
    if apart["low"] is None:
        return "not shown"
    if apart["high"] < 0:
        return "holds"
    return "reversed" if apart["low"] > 0 else "not shown"
