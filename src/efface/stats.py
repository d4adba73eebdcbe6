"""Intervals, ROC and distances: no number without its n and its interval.

Rates get exact intervals, areas under the ROC curve DeLong's, statistics over records a bootstrap,
statistics over training seeds Student's t. Everything is float64 and draws only from the generator
that it is handed. Scores may be infinite (a margin can be); NaN is always refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy  # submodules load when touched

Array = npt.NDArray[np.float64]

# At most so many numbers of a bootstrap are drawn at once (8 MiB as float64).
_DRAWN_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Interval:
    """A number, its confidence limits, and how many records (or seeds) it rests on."""

    value: float
    low: float
    high: float
    n: int


def rate(successes: int, n: int, level: float = 0.95) -> Interval:
    """A proportion with its exact interval (Clopper & Pearson 1934): covers ``level`` or more.

    Args:
        successes: Number of records that count, between 0 and ``n``.
        n: Number of records.
        level: Confidence level, between 0 and 1.

    Raises:
        ValueError: If ``n`` is 0, ``successes`` is not within 0…n, or ``level`` is no level.

    >>> found = rate(0, 10)
    >>> found.value, found.low, round(found.high, 4), found.n
    (0.0, 0.0, 0.3085, 10)
    """
    tail = _tail(level)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a rate needs 0 <= successes <= n and n >= 1, not {successes} of {n}.")
    low = scipy.special.betaincinv(successes, n - successes + 1, tail) if successes > 0 else 0.0
    high = (
        scipy.special.betaincinv(successes + 1, n - successes, 1 - tail) if successes < n else 1.0
    )
    return Interval(successes / n, float(low), float(high), int(n))


def auc(positive: npt.ArrayLike, negative: npt.ArrayLike, level: float = 0.95) -> Interval:
    """Probability that a positive scores higher than a negative (ties count half), after DeLong.

    DeLong et al. 1988, with the structural components as differences of mid-ranks (Sun & Xu 2014),
    read off two sorted arrays in O(n log n). Limits are the normal ones, clipped to [0, 1].
    They are too narrow for a small class far from 1/2: of nominal 95 %, with 1000 records in the
    other class, 20 records gave 94 % at AUC 0.50 but 86 % at 0.92, and 50 gave 94 % and 92 %.

    Where DeLong's variance is zero or undefined (perfect separation, everything tied, one record
    in a class) the limits are ones that hold for every distribution. The AUC is a U-statistic, and
    so is bounded like a mean over k independent pairs, k the size of the smaller class (Hoeffding
    1963, section 5): at 0 and 1 that gives the Clopper-Pearson limit for 0 or k of k, elsewhere
    ± sqrt(ln(2/α) / 2k). One record that is neither above nor below all others gives [0, 1].

    Args:
        positive: Scores of the positives (members, say), 1-D.
        negative: Scores of the negatives, 1-D.
        level: Confidence level, between 0 and 1.

    Raises:
        ValueError: If either is empty, holds NaN or is not 1-D, or ``level`` is no level.

    >>> auc([3.0, 2.0], [1.0, 2.0]).value
    0.875
    >>> found = auc(range(10, 20), range(10))
    >>> found.value, round(found.low, 4), found.high, found.n
    (1.0, 0.6915, 1.0, 20)
    """
    tail = _tail(level)
    pos, neg = np.sort(_vector("positive", positive)), np.sort(_vector("negative", negative))
    m, n = pos.size, neg.size
    # Counts, not fractions: halves are exact, so that a constant has a variance of exactly zero.
    won, lost = _below(pos, neg), _below(neg, pos)
    value = float(won.sum() / (m * n))
    variance = 0.0
    if min(m, n) > 1:
        variance = float(won.var(ddof=1) / n**2 / m + lost.var(ddof=1) / m**2 / n)
    if variance == 0:
        return _bounded(value, min(m, n), m + n, level)
    half = -float(scipy.special.ndtri(tail)) * math.sqrt(variance)
    return Interval(value, max(0.0, value - half), min(1.0, value + half), m + n)


def _below(scores: Array, others: Array) -> Array:
    """For each score how many of the sorted others lie below it, ties half."""
    sides = [np.searchsorted(others, scores, side) for side in ("left", "right")]
    return np.asarray((sides[0] + sides[1]) / 2, dtype=np.float64)


def _bounded(value: float, pairs: int, n: int, level: float) -> Interval:
    """Limits for an AUC that rests on so many independent pairs, whatever the distribution."""
    if value in (0.0, 1.0):
        exact = rate(int(value) * pairs, pairs, level)
        return Interval(value, exact.low, exact.high, n)
    half = math.sqrt(-math.log(_tail(level)) / (2 * pairs))
    return Interval(value, max(0.0, value - half), min(1.0, value + half), n)


def roc(positive: npt.ArrayLike, negative: npt.ArrayLike) -> tuple[Array, Array]:
    """False- and true-positive rates at every distinct threshold ("score >= threshold" is flagged).

    Args:
        positive: Scores of the positives, 1-D.
        negative: Scores of the negatives, 1-D.

    Returns:
        Two arrays of equal length, ascending, from (0, 0) to (1, 1).

    Raises:
        ValueError: If either is empty, holds NaN or is not 1-D.

    >>> fpr, tpr = roc([3.0, 2.0], [1.0, 2.0])
    >>> fpr.tolist(), tpr.tolist()
    ([0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0])
    """
    pos, neg = np.sort(_vector("positive", positive)), np.sort(_vector("negative", negative))
    thresholds = np.unique(np.concatenate([pos, neg]))[::-1]
    fpr, tpr = ((s.size - np.searchsorted(s, thresholds, "left")) / s.size for s in (neg, pos))
    return np.append(0.0, fpr), np.append(0.0, tpr)


def tpr_at_fpr(
    positive: npt.ArrayLike,
    negative: npt.ArrayLike,
    fpr: float = 0.01,
    *,
    generator: np.random.Generator,
    level: float = 0.95,
) -> Interval | None:
    """True-positive rate at a low false-positive rate, with cross-fitted thresholds.

    Both classes are halved at random. Each half of the negatives sets a threshold, the lowest of
    its scores that no more than the share ``fpr`` of that half exceeds, and one half of the
    positives is judged by it ("score > threshold"). So every positive is judged once, and the
    counts are pooled. The Clopper-Pearson limits hold given the two thresholds: how far those
    would move with other negatives is not in them.

    Args:
        positive: Scores of the positives (members, say), 1-D.
        negative: Scores of the negatives, 1-D.
        fpr: False-positive rate, between 0 and 1.
        generator: Draws the halves.
        level: Confidence level, between 0 and 1.

    Returns:
        The rate with n = number of positives, or None where it is not estimable: a half with fewer
        than 1/fpr negatives.

    Raises:
        ValueError: If either is empty, holds NaN or is not 1-D, or if ``fpr`` or ``level`` is out
            of range.

    >>> scores = np.arange(200.0)
    >>> tpr_at_fpr(scores + 500, scores, generator=np.random.default_rng(0)).value
    1.0
    >>> tpr_at_fpr(scores, scores[:198], generator=np.random.default_rng(0)) is None
    True
    """
    if not 0 < fpr < 1:
        raise ValueError(f"a false-positive rate lies between 0 and 1, {fpr} does not.")
    pos = generator.permutation(_vector("positive", positive))
    neg = generator.permutation(_vector("negative", negative))
    hits = 0
    for judged, judge in zip(_halves(pos), _halves(neg), strict=True):
        allowed = math.floor(fpr * judge.size + 1e-9)  # 0.29 * 100 is 28.999…
        if allowed < 1:
            return None
        threshold = np.sort(judge)[judge.size - 1 - allowed]
        hits += int((judged > threshold).sum())
    return rate(hits, pos.size, level)


def _halves(values: Array) -> tuple[Array, Array]:
    return values[: values.size // 2], values[values.size // 2 :]


def bootstrap(
    values: npt.ArrayLike,
    generator: np.random.Generator,
    statistic: Callable[[Array], float] | None = None,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """A statistic with its percentile interval over records drawn again with replacement (Efron).

    Memory is bounded: about a million values are drawn at once (or one resample, if that is more).
    Values that are all equal give an interval without width; for a proportion use :func:`rate`.

    Args:
        values: One number per record, finite, 1-D, at least two.
        generator: Draws the resamples, row after row.
        statistic: Any function from a 1-D array to a number; the mean (much faster) if None.
        resamples: How often to draw.
        level: Confidence level, between 0 and 1.

    Raises:
        ValueError: If there are fewer than two values (one says nothing about its spread, and an
            interval without width would claim the opposite), if they are not finite or not 1-D, or
            if ``resamples`` or ``level`` is out of range.

    >>> found = bootstrap([1.0, 2.0, 3.0, 4.0], np.random.default_rng(0))
    >>> found.value, found.low < 2.5 < found.high, found.n
    (2.5, True, 4)
    """
    tail = _tail(level)
    x = _finite(values, "a bootstrap")
    if resamples < 1:
        raise ValueError(f"a bootstrap needs at least one resample, not {resamples}.")
    rows = max(1, _DRAWN_AT_ONCE // x.size)
    found: list[Array] = []
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), x.size)
        found.append(_per_row(x[generator.integers(0, x.size, shape)], statistic))
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return Interval(float(_per_row(x[None], statistic)[0]), float(low), float(high), x.size)


def _per_row(draws: Array, statistic: Callable[[Array], float] | None) -> Array:
    if statistic is None:
        return np.asarray(draws.mean(axis=1), dtype=np.float64)
    return np.array([statistic(row) for row in draws], dtype=np.float64)


def prediction_interval(values: npt.ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Where one further draw from the same normal population falls: mean ± t·s·sqrt(1 + 1/k).

    It answers "could this be one more retrained model?" from k retrained ones. Values that are all
    equal give an interval without width, which is a limit of the formula and no certainty.

    Args:
        values: One finite number per training seed, k >= 2 of them.
        level: Share of further draws that fall inside, between 0 and 1.

    Raises:
        ValueError: If there are fewer than two values, if they are not finite or not 1-D, or if
            ``level`` is no level.

    >>> low, high = prediction_interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-2.968, 6.968)
    """
    x = _finite(values, "a prediction interval")
    half = _student(x, level) * math.sqrt(1 + 1 / x.size)
    return float(x.mean() - half), float(x.mean() + half)


def mean_interval(values: npt.ArrayLike, level: float = 0.95) -> Interval:
    """The mean over training seeds with Student's interval: mean ± t·s / sqrt(k).

    Args:
        values: One finite number per training seed, k >= 2 of them.
        level: Confidence level, between 0 and 1.

    Raises:
        ValueError: If there are fewer than two values, if they are not finite or not 1-D, or if
            ``level`` is no level.

    >>> found = mean_interval([1.0, 2.0, 3.0])
    >>> found.value, round(found.low, 3), round(found.high, 3), found.n
    (2.0, -0.484, 4.484, 3)
    """
    x = _finite(values, "a mean over seeds")
    half = _student(x, level) / math.sqrt(x.size)
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half), x.size)


def _student(values: Array, level: float) -> float:
    """The standard deviation times Student's quantile."""
    return float(scipy.special.stdtrit(values.size - 1, 1 - _tail(level)) * values.std(ddof=1))


def js_distance(p: npt.ArrayLike, q: npt.ArrayLike) -> Array:
    """Jensen-Shannon distance of each row: the square root of the base-2 divergence, in [0, 1].

    Args:
        p: Probabilities, (n, classes); zeros are allowed, rows sum to 1 (to 1e-3: half precision).
        q: Probabilities of the same shape.

    Returns:
        One distance per row, (n,): 0 for equal rows, 1 for rows without a common class.

    Raises:
        ValueError: If the shapes differ or a row holds no probabilities.

    >>> js_distance([[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]).tolist()
    [1.0, 0.0]
    """
    first, second = _probabilities("p", p), _probabilities("q", q)
    if first.shape != second.shape:
        raise ValueError(f"p and q differ in shape: {first.shape} and {second.shape}.")
    # Twice the midpoint: half of the smallest float would be zero, and the logarithm infinite.
    total = first + second
    nats = (
        scipy.special.rel_entr(2 * first, total) + scipy.special.rel_entr(2 * second, total)
    ).sum(axis=1)
    return np.asarray(np.sqrt(np.clip(nats / (4 * math.log(2)), 0.0, 1.0)), dtype=np.float64)


def _probabilities(name: str, rows: npt.ArrayLike) -> Array:
    x = np.asarray(rows, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"{name} must be (n, classes), not {x.shape}.")
    total = x.sum(axis=1, keepdims=True)
    if not ((x >= 0).all() and (np.abs(total - 1) <= 1e-3).all()):  # NaN fails both
        raise ValueError(f"{name} must hold probabilities: rows of numbers >= 0 that sum to 1.")
    return np.asarray(x / total, dtype=np.float64)


def _tail(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"a confidence level lies between 0 and 1, {level} does not.")
    return (1 - level) / 2


def _vector(name: str, values: npt.ArrayLike) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{name} must be a 1-D array with at least one value, not {x.shape}.")
    if np.isnan(x).any():
        raise ValueError(f"{name} holds {int(np.isnan(x).sum())} NaN of {x.size} values.")
    return x


def _finite(values: npt.ArrayLike, purpose: str) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size < 2:
        raise ValueError(f"{purpose} needs a 1-D array of at least two values, not {x.shape}.")
    if not np.isfinite(x).all():
        raise ValueError(f"{purpose} needs finite values; {int((~np.isfinite(x)).sum())} are not.")
    return x
