"""Values over training seeds in short."""

from __future__ import annotations

from collections.abc import Sequence
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
