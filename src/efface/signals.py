"""Per-record signals from logits: what membership tests and distances look at.

Array functions in float64 over rows, one row a record; nothing here calls a network.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy  # submodules load when touched

Array = npt.NDArray[np.float64]

# Logarithms of smaller numbers are cut off there, as in the code that Song & Mittal released.
_FLOOR = 1e-30


def softmax(logits: npt.ArrayLike) -> Array:
    """Probabilities from logits, (n, classes) to (n, classes).

    Raises:
        ValueError: If the logits are not 2-D, or a row holds NaN, +inf, or nothing above -inf.

    >>> softmax([[0.0, 0.0], [1000.0, 0.0]]).tolist()
    [[0.5, 0.5], [1.0, 0.0]]
    """
    return np.asarray(scipy.special.softmax(_logits(logits), axis=1), dtype=np.float64)


def log_softmax(logits: npt.ArrayLike) -> Array:
    """Logarithms of the probabilities, exact where these round to 0 or 1.

    Raises:
        ValueError: As for :func:`softmax`.

    >>> log_softmax([[1000.0, 0.0]]).tolist()
    [[0.0, -1000.0]]
    """
    return np.asarray(scipy.special.log_softmax(_logits(logits), axis=1), dtype=np.float64)


def margin(logits: npt.ArrayLike, targets: npt.ArrayLike) -> Array:
    """True-class margin log(p_y / Σ_{c≠y} p_c) = z_y − logsumexp of the others.

    The signal of LiRA (Carlini et al. 2022, section VI-A) and of KLoM, without any probability
    that could round to 1. It is infinite only where a logit is −inf.

    Args:
        logits: (n, classes), at least two classes.
        targets: Class of each record, (n,).

    Returns:
        (n,), in nats: positive where the true class has more than half of the probability.

    Raises:
        ValueError: If the logits are unusable (see :func:`softmax`) or have fewer than two
            classes, or a target is no class.

    >>> margin([[2.0, 0.0], [0.0, 1000.0]], [0, 0]).tolist()
    [2.0, -1000.0]
    """
    z = _logits(logits)
    if z.shape[1] < 2:
        raise ValueError("a margin needs at least two classes.")
    rows, y = np.arange(len(z)), _targets(targets, z)
    others = z.copy()
    others[rows, y] = -np.inf
    return np.asarray(z[rows, y] - scipy.special.logsumexp(others, axis=1), dtype=np.float64)


def confidence(p: npt.ArrayLike, targets: npt.ArrayLike) -> Array:
    """Probability of the true class, (n,).

    Raises:
        ValueError: If ``p`` is not (n, classes) within [0, 1], or a target is no class.

    >>> confidence([[0.25, 0.75]], [1]).tolist()
    [0.75]
    """
    x = _shares(p)
    return x[np.arange(len(x)), _targets(targets, x)]


def entropy(p: npt.ArrayLike) -> Array:
    """Entropy of each row in nats, (n,).

    Raises:
        ValueError: If ``p`` is not (n, classes) within [0, 1].

    >>> entropy([[0.5, 0.5], [1.0, 0.0]]).round(4).tolist()
    [0.6931, 0.0]
    """
    return np.asarray(scipy.special.entr(_shares(p)).sum(axis=1), dtype=np.float64)


def modified_entropy(p: npt.ArrayLike, targets: npt.ArrayLike) -> Array:
    """−(1−p_y) log p_y − Σ_{c≠y} p_c log(1−p_c), with y of each row (Song & Mittal 2021, eq. 8).

    0 for a certain and right prediction, large for a certain and wrong one; always finite, because
    logarithms stop at that of 1e-30.

    Args:
        p: Probabilities, (n, classes).
        targets: Class of each record, (n,).

    Returns:
        (n,), in nats.

    Raises:
        ValueError: If ``p`` is not (n, classes) within [0, 1], or a target is no class.

    >>> modified_entropy([[0.5, 0.5], [1.0, 0.0]], [0, 0]).round(4).tolist()
    [0.6931, 0.0]
    """
    x = _shares(p)
    rows, y = np.arange(len(x)), _targets(targets, x)
    terms = -x * np.log(np.maximum(1 - x, _FLOOR))
    right = x[rows, y]
    terms[rows, y] = -(1 - right) * np.log(np.maximum(right, _FLOOR))
    return np.asarray(terms.sum(axis=1), dtype=np.float64)


def attack_success_rate(
    logits: npt.ArrayLike, targets: npt.ArrayLike, target: int, exclude: bool = True
) -> tuple[int, int]:
    """How often records that carry a trigger are taken for the class that an attacker wants.

    Args:
        logits: Of triggered records, (n, classes).
        targets: Their true classes, (n,).
        target: The attacker's class.
        exclude: Leave records out that belong to it: no attack is needed there. ``False`` counts
            all, as Jia et al. (2023) do; with K even classes a clean model then has about 1/K.

    Returns:
        Successes and the number of records counted, as :func:`efface.stats.rate` takes them.

    Raises:
        ValueError: If the logits are unusable (see :func:`softmax`), ``target`` or one of
            ``targets`` is no class, or no record is left to count.

    >>> attack_success_rate([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]], [1, 1, 0], target=0)
    (1, 2)
    >>> attack_success_rate([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]], [1, 1, 0], 0, exclude=False)
    (2, 3)
    """
    z = _logits(logits)
    y = _targets(targets, z)
    if not 0 <= target < z.shape[1]:
        raise ValueError(f"target must be a class 0…{z.shape[1] - 1}, not {target}.")
    counted = y != target if exclude else np.ones(len(y), dtype=bool)
    if not counted.any():
        raise ValueError(f"no record is left to count: all belong to the target {target}.")
    return int((z[counted].argmax(axis=1) == target).sum()), int(counted.sum())


def _logits(values: npt.ArrayLike) -> Array:
    z = np.asarray(values, dtype=np.float64)
    if z.ndim != 2 or z.shape[1] < 1:
        raise ValueError(f"logits must be (n, classes), not {z.shape}.")
    if not np.isfinite(z.max(axis=1)).all():  # NaN and +inf are a row's maximum
        raise ValueError("logits hold NaN, +inf, or a row of nothing but -inf.")
    return z


def _shares(values: npt.ArrayLike) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"probabilities must be (n, classes), not {x.shape}.")
    if not ((x >= 0) & (x <= 1 + 1e-3)).all():  # half precision may round above 1; NaN fails
        raise ValueError("probabilities must lie within [0, 1].")
    return np.minimum(x, 1.0)


def _targets(values: npt.ArrayLike, rows: Array) -> npt.NDArray[np.intp]:
    y = np.asarray(values)
    if y.shape != rows.shape[:1] or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"targets must be {len(rows)} whole numbers, not {y.dtype} of {y.shape}.")
    if y.size and not 0 <= y.min() <= y.max() < rows.shape[1]:
        raise ValueError(f"targets must be classes 0…{rows.shape[1] - 1}.")
    return y.astype(np.intp)
