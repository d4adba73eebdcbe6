"""What overlaps of masks say about D_f: the trace, the share removed, membership; with intervals.

Everything is computed from tables of overlaps (:func:`efface.auditing.topology.overlaps`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import scipy  # submodules load when touched

from efface.stats import Interval

Floats = npt.NDArray[np.float64]

MOST_LABELLINGS = 20_000
"""As many ways to call masks "with" and "without" are tried; where there are more, at random."""


def ceiling_interval(pairs: Floats) -> Interval:
    """The mean overlap of two references, with an interval over references (95 %).

    A reference takes part in R − 1 of the pairs, so that pairs are not independent. With the mean
    c_r of reference r over its pairs, (2(R − 1)/(R − 2))² · var(c) / R is the jackknife's variance
    of a mean over pairs (Arvesen 1969); the limits are Student's with R − 1 degrees of freedom.

    Args:
        pairs: IoU of references with one another ``[R, R]``; the diagonal is not read.

    Raises:
        ValueError: With fewer than three references.
    """
    each = _means(pairs)
    half = 2 * _student(len(each)) * math.sqrt(_spread(each) / len(each))
    return _around(float(each.mean()), half, len(each))


def trace_interval(own: Floats, pairs: Floats) -> Interval:
    """The trace: how much more references overlap with one another than with another mask.

    The question is what D_f did, not how this one model's training happened to go: the mask that is
    compared is one draw of many, as each reference is. If it were one more reference, the
    difference would have the variance V(1 + 1/R), where V is that of a single mask's mean overlap:
    ((R − 1)/(R − 2))² · var(c), with c_r as in :func:`ceiling_interval`. The limits are Student's
    with R − 1 degrees of freedom. (Treating the c_r − b_r as independent values covers 30 to 90 %
    of the time instead of 95: they share masks.)

    Args:
        own: IoU of the mask with each reference ``[R]``.
        pairs: IoU of references with one another ``[R, R]``; the diagonal is not read.

    Raises:
        ValueError: With fewer than three references.

    Example:
        >>> pairs = np.array([[1, 0.9, 0.91], [0.9, 1, 0.9], [0.91, 0.9, 1]])
        >>> found = trace_interval(np.array([0.7, 0.71, 0.7]), pairs)
        >>> round(found.value, 3), round(found.low, 3), found.n
        (0.2, 0.171, 3)
    """
    each = _means(pairs)
    n = len(each)
    half = _student(n) * math.sqrt(_spread(each) * (1 + 1 / n))
    return _around(float(each.mean() - own.mean()), half, n)


def removed_interval(after: Floats, before: Floats, pairs: Floats) -> Interval | None:
    """The share of a trace that is gone: (IoU_after − IoU_before) / (ceiling − IoU_before).

    Fieller's interval (1954) for a ratio of two means over the same references: every share ρ for
    which numerator − ρ · denominator cannot be told from zero by Student's t. Variances are the
    jackknife's over references; the two masks are held fixed.

    Args:
        after: IoU of the updated mask with each reference ``[R]``.
        before: The same of the un-updated mask ``[R]``.
        pairs: IoU of references with one another ``[R, R]``; the diagonal is not read.

    Returns:
        The share, 0 for none and 1 for as much as retraining removes, or None where the
        denominator cannot be told from zero.

    Raises:
        ValueError: With fewer than three references.

    Example:
        >>> pairs = np.array([[1, 0.9, 0.91], [0.9, 1, 0.9], [0.91, 0.9, 1]])
        >>> before = np.array([0.7, 0.71, 0.7])
        >>> found = removed_interval(before + 0.1, before, pairs)
        >>> round(found.value, 2), found.low < 0.5 < found.high
        (0.5, True)
    """
    each = _means(pairs)
    n = len(each)
    gained = after - before
    # pseudo-values: n · mean − (n − 1) · mean without one reference, up to a constant
    others = (before.sum() - before) / (n - 1)
    trace = 2 * (n - 1) / (n - 2) * (each - (before + others) / 2)
    (va, cov), (_, vb) = np.cov(gained, trace) / n * _student(n) ** 2
    a, b = float(gained.mean()), float(each.mean() - before.mean())
    square, linear, constant = b * b - vb, a * b - cov, a * a - va
    if square <= 0 or b <= 0:
        return None
    root = math.sqrt(max(linear**2 - square * constant, 0.0))
    return Interval(a / b, float((linear - root) / square), float((linear + root) / square), n)


def between_interval(table: Floats, seen: int) -> Interval:
    """How much more masks of one kind overlap with one another than with the other kind (95 %).

    Half the mean overlap ``w`` among models with D_f plus half that among models without it,
    ``o``, less that across, less ``(√w − √o)²``. It is zero if D_f leaves nothing, and, unlike
    :func:`trace_interval`, hardly touched by one kind being trained with less noise, or by a single
    training that went astray (its mask overlaps less with *all* others, which cancels). The last
    term is for noise that differs much: the overlap across two kinds is then near the geometric
    mean of the two, which is below the arithmetic one. Variances are the jackknife's over the masks
    of each kind (the last term held fixed); the limits are Student's, with one degree of freedom
    less than masks in the smaller kind.

    Args:
        table: IoU of all masks with one another ``[n, n]``, those with D_f first.
        seen: How many of them are with D_f; at least three, as of the others.

    Raises:
        ValueError: With fewer than three masks of a kind.

    Example:
        >>> table = np.kron(np.array([[0.9, 0.7], [0.7, 0.9]]), np.ones((3, 3)))
        >>> round(between_interval(table, 3).value, 3)
        0.2
    """
    across = table[:seen, seen:]
    within = [float(_means(own).mean()) for own in (table[:seen, :seen], table[seen:, seen:])]
    value, variance = -unequal(*within), 0.0
    for own, other in ((table[:seen, :seen], across), (table[seen:, seen:], across.T)):
        each, n = _means(own), len(own)
        pseudo = (n - 1) / (n - 2) * each - other.mean(1)  # half of the mean over pairs
        value += float(each.mean() - other.mean()) / 2
        variance += float(pseudo.var(ddof=1)) / n
    n = min(seen, len(table) - seen)
    return _around(value, _student(n) * math.sqrt(variance), len(table))


def unequal(with_: float, without: float) -> float:
    """How much of a difference between kinds can be that one is trained with less noise.

    Twice the distance between the arithmetic and the geometric mean of the overlaps within kinds.

    >>> unequal(0.5, 0.5), round(unequal(0.64, 0.36), 3)
    (0.0, 0.04)
    """
    return float((math.sqrt(with_) - math.sqrt(without)) ** 2)


def _means(pairs: Floats) -> Floats:
    """For each reference its mean overlap with the others."""
    n = len(pairs)
    if n < 3:
        raise ValueError(f"an interval over references needs three of them, not {n}.")
    return np.asarray((pairs.sum(1) - np.diag(pairs)) / (n - 1), dtype=np.float64)


def _spread(each: Floats) -> float:
    """The variance of one mask's mean overlap: means over the same pairs lie closer together."""
    n = len(each)
    return float(((n - 1) / (n - 2)) ** 2 * each.var(ddof=1))


def _student(n: int) -> float:
    return float(scipy.special.stdtrit(n - 1, 0.975))


def _around(value: float, half: float, n: int) -> Interval:
    return Interval(value, value - half, value + half, n)


@dataclass(frozen=True)
class Membership:
    """Can one tell from a mask whether D_f was in the data?

    Args:
        auc: Probability that a mask from without D_f scores higher than one from with it.
        p: Probability of such an AUC, or a higher one, if the two kinds do not differ.
        labellings: How many ways to call the masks "with" and "without" that rests on.
        least: The smallest p that so many masks can give.
        seen: Mean score of the masks of models that saw D_f.
        unseen: Mean score of those that did not.
    """

    auc: float
    p: float
    labellings: int
    least: float
    seen: float
    unseen: float

    def position(self, score: float) -> float | None:
        """Where a score lies: 0 as the models that saw D_f, 1 as those that did not; None if lost.

        >>> Membership(1.0, 0.1, 10, 0.1, seen=-0.2, unseen=0.2).position(-0.1)
        0.25
        """
        way = self.unseen - self.seen
        return min(1.0, max(0.0, (score - self.seen) / way)) if way > 0 else None


def membership(table: Floats, seen: int, generator: np.random.Generator) -> Membership:
    """The test: masks with D_f against masks without, each scored by all others.

    A mask's score is its mean overlap with the masks of models without D_f less that with the masks
    of models with it, itself left out. If D_f leaves nothing, all labellings of the masks are alike
    (a permutation test; exact up to ``MOST_LABELLINGS`` of them).

    Args:
        table: IoU of all masks with one another ``[n, n]``, those with D_f first.
        seen: How many of them are with D_f; at least two, as of the others.
        generator: Draws labellings where there are too many.

    Raises:
        ValueError: With fewer than two masks of a kind.

    Example:
        >>> table = np.kron(np.array([[0.9, 0.7], [0.7, 0.9]]), np.ones((3, 3)))
        >>> found = membership(table, 3, np.random.default_rng(0))
        >>> found.auc, found.p, found.labellings
        (1.0, 0.1, 20)
    """
    n = len(table)
    if seen < 2 or n - seen < 2:
        raise ValueError(f"a membership test needs two masks of each kind, not {seen}, {n - seen}.")
    labels = _labellings(n, seen, generator)
    scores = _scores(table, labels)
    found = _aucs(scores, labels)
    high = float((found[1:] >= found[0] - 1e-12).sum())
    exact = len(labels) - 1 == math.comb(n, seen)
    # where the kinds are equally many, a labelling and its reverse give the same AUC
    ways = math.comb(n, seen) / (2 if 2 * seen == n else 1)
    return Membership(
        auc=float(found[0]),
        p=high / (len(labels) - 1) if exact else (1 + high) / len(labels),
        labellings=len(labels) - 1,
        least=1 / ways,
        seen=float(scores[0][:seen].mean()),
        unseen=float(scores[0][seen:].mean()),
    )


def _labellings(n: int, seen: int, generator: np.random.Generator) -> npt.NDArray[np.bool_]:
    """True where a mask is called "with": the real labelling first, then all others, or a draw."""
    if math.comb(n, seen) <= MOST_LABELLINGS:
        chosen = list(combinations(range(n), seen))
    else:
        draws = generator.random((MOST_LABELLINGS, n)).argsort(1)[:, :seen]
        chosen = [tuple(row) for row in draws.tolist()]
    labels = np.zeros((len(chosen) + 1, n), dtype=bool)
    labels[0, :seen] = True
    np.put_along_axis(labels[1:], np.array(chosen), True, axis=1)
    return labels


def _scores(table: Floats, labels: npt.NDArray[np.bool_]) -> Floats:
    """For each labelling the score of each mask ``[labellings, n]``."""
    others = table - np.diag(np.diag(table))
    sums = labels @ others
    rest = others.sum(0) - sums
    count = labels.sum(1, keepdims=True) - labels
    left = labels.shape[1] - 1 - count
    return np.asarray(rest / left - sums / count, dtype=np.float64)


def _aucs(scores: Floats, labels: npt.NDArray[np.bool_]) -> Floats:
    """For each labelling the share of pairs in which the mask without scores higher, ties half."""
    seen = int(labels[0].sum())
    low = scores[labels].reshape(len(scores), seen, 1)
    high = scores[~labels].reshape(len(scores), 1, -1)
    wins = (high > low + 1e-12).sum((1, 2)) + 0.5 * (abs(high - low) <= 1e-12).sum((1, 2))
    return np.asarray(wins / (low.shape[1] * high.shape[2]), dtype=np.float64)
