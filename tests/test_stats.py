from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special
from scipy import stats as scipy_stats
from scipy.spatial.distance import jensenshannon

from efface import signals, stats

from . import oracles

LEVELS = st.sampled_from([0.8, 0.9, 0.95, 0.99])
# Few distinct values, so that ties within and between the classes are the rule.
TIED = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=25)
CONTINUOUS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=25)
SCORES = st.one_of(TIED, CONTINUOUS)


def assert_covers(hits: int, draws: int, level: float, at_least: bool = False) -> None:
    """Judge a simulated coverage by the binomial distribution it has if the claim is true."""
    low, high = scipy_stats.binom.interval(0.9999, draws, level)
    assert hits >= low, f"covered {hits} of {draws}, expected {low:.0f} or more"
    assert at_least or hits <= high, f"covered {hits} of {draws}, expected {high:.0f} or fewer"


# --- rate -----------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 60), LEVELS)
def test_rate_is_clopper_pearson(data: st.DataObject, n: int, level: float) -> None:
    k = data.draw(st.integers(0, n))
    found = stats.rate(k, n, level)
    assert (found.low, found.high) == pytest.approx(oracles.clopper_pearson(k, n, level), abs=1e-9)
    assert found.value == k / n
    assert found.n == n


def test_rate_by_hand() -> None:
    # Of 10 with no success: (1 - p)^10 = 0.025.
    none = stats.rate(0, 10)
    assert (none.low, none.high) == pytest.approx((0, 1 - 0.025**0.1))
    every = stats.rate(10, 10)
    assert (every.low, every.high) == pytest.approx((0.025**0.1, 1))
    assert stats.rate(1, 1).low == pytest.approx(0.025)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_rate_covers_at_least_its_level_for_every_p(n: int) -> None:
    intervals = [stats.rate(k, n) for k in range(n + 1)]
    for p in np.linspace(0.001, 0.999, 199):
        chance = scipy_stats.binom.pmf(np.arange(n + 1), n, p)
        covered = [found.low <= p <= found.high for found in intervals]
        assert chance[covered].sum() >= 0.95 - 1e-12


@pytest.mark.parametrize(("k", "n", "level"), [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95)])
def test_rate_refuses(k: int, n: int, level: float) -> None:
    with pytest.raises(ValueError, match="successes"):
        stats.rate(k, n, level)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, -0.1, math.nan])
def test_a_level_lies_between_0_and_1(level: float) -> None:
    refusing: list[Callable[[], object]] = [
        lambda: stats.rate(1, 2, level),
        lambda: stats.auc([1.0], [0.0], level),
        lambda: stats.bootstrap([1.0, 2.0], np.random.default_rng(0), level=level),
        lambda: stats.mean_interval([1.0, 2.0], level),
        lambda: stats.prediction_interval([1.0, 2.0], level),
    ]
    for call in refusing:
        with pytest.raises(ValueError, match="level"):
            call()


# --- auc and roc ----------------------------------------------------------------------------------


@given(SCORES, SCORES, LEVELS)
def test_auc_is_pairwise_with_delongs_interval(
    pos: list[float], neg: list[float], level: float
) -> None:
    found = stats.auc(pos, neg, level)
    assert found.value == pytest.approx(oracles.pairwise_auc(pos, neg), abs=1e-12)
    assert found.n == len(pos) + len(neg)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high
    if min(len(pos), len(neg)) > 1 and (variance := oracles.delong_variance(pos, neg)) > 1e-12:
        half = scipy_stats.norm.ppf((1 + level) / 2) * math.sqrt(variance)
        assert found.low == pytest.approx(max(0.0, found.value - half), abs=1e-9)
        assert found.high == pytest.approx(min(1.0, found.value + half), abs=1e-9)


@given(SCORES, SCORES)
def test_auc_turns_round_with_the_classes(pos: list[float], neg: list[float]) -> None:
    there, back = stats.auc(pos, neg), stats.auc(neg, pos)
    assert (there.value, there.low, there.high) == pytest.approx(
        (1 - back.value, 1 - back.high, 1 - back.low), abs=1e-12
    )


def test_delong_by_hand() -> None:
    # pos 2, 4 against neg 1, 3: V10 = (1/2, 1), V01 = (1, 1/2), S10 = S01 = 1/8, variance 1/8.
    found = stats.auc([2, 4], [1, 3], level=0.5)
    assert found.value == 0.75
    assert found.low == pytest.approx(0.75 - 0.6744897501960817 * math.sqrt(1 / 8))


@pytest.mark.parametrize(
    ("pos", "neg", "value", "low", "high"),
    [
        ([2.0] * 30, [1.0] * 40, 1.0, 0.025 ** (1 / 30), 1.0),
        ([1.0] * 30, [2.0] * 40, 0.0, 0.0, 1 - 0.025 ** (1 / 30)),
        ([3.0], [1.0, 2.0], 1.0, 0.025, 1.0),
        ([1.5], [1.0, 2.0, 3.0], 1 / 3, 0.0, 1.0),
        ([1.0] * 50, [1.0] * 60, 0.5, 0.5 - math.sqrt(math.log(40) / 100), 0.5 + 0.19206),
        ([math.inf] * 3, [-math.inf] * 3, 1.0, 0.025 ** (1 / 3), 1.0),
    ],
)
def test_auc_without_a_variance_stays_wide(
    pos: list[float], neg: list[float], value: float, low: float, high: float
) -> None:
    found = stats.auc(pos, neg)
    assert (found.value, found.low, found.high) == pytest.approx((value, low, high), abs=1e-5)


def test_auc_everything_tied_has_width_for_awkward_sizes() -> None:
    for m, n in [(3, 7), (10, 49), (97, 1013)]:
        found = stats.auc(np.full(m, 0.1), np.full(n, 0.1))
        assert found.high - found.low > 1 / math.sqrt(m)


@given(SCORES, SCORES)
def test_roc_has_every_threshold_and_the_area(pos: list[float], neg: list[float]) -> None:
    fpr, tpr = stats.roc(pos, neg)
    assert list(zip(fpr.tolist(), tpr.tolist(), strict=True)) == oracles.roc_points(pos, neg)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(tpr, fpr) == pytest.approx(stats.auc(pos, neg).value, abs=1e-12)


# --- tpr at fpr -----------------------------------------------------------------------------------


@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.sampled_from([0.05, 0.1, 0.29, 0.5]),
    st.booleans(),
    st.integers(0, 100),
)
def test_tpr_at_fpr_is_cross_fitted(
    positives: int, negatives: int, fpr: float, tied: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pos, neg = rng.normal(1, 1, positives), rng.normal(0, 1, negatives)
    if tied:
        pos, neg = pos.round(), neg.round()
    found = stats.tpr_at_fpr(pos, neg, fpr, generator=np.random.default_rng(seed))
    if negatives // 2 < 1 / fpr:
        assert found is None
        return
    again = np.random.default_rng(seed)
    p, n = again.permutation(pos).tolist(), again.permutation(neg).tolist()
    a, b = positives // 2, negatives // 2
    hits, rates = oracles.cross_fitted_hits([(p[:a], n[:b]), (p[a:], n[b:])], fpr)
    assert found == stats.rate(hits, positives)
    assert max(rates) <= fpr + 1e-9


def test_tpr_at_fpr_finds_what_it_should() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=20_000)
    chance = stats.tpr_at_fpr(rng.normal(size=20_000), scores, 0.01, generator=rng)
    assert chance is not None
    assert chance.value == pytest.approx(0.01, abs=0.003)
    # Shifted by 1: P(Z > 2.3263 - 1) = 0.0924.
    shifted = stats.tpr_at_fpr(rng.normal(1, 1, 20_000), scores, 0.01, generator=rng)
    assert shifted is not None
    assert shifted.value == pytest.approx(0.0924, abs=0.015)


def test_tpr_at_fpr_allows_29_of_100_at_29_percent() -> None:
    # 0.29 * 100 is 28.999… in floating point.
    pos, neg = np.arange(200.0), np.arange(200.0)
    found = stats.tpr_at_fpr(pos, neg, 0.29, generator=np.random.default_rng(0))
    again = np.random.default_rng(0)
    p, n = again.permutation(pos).tolist(), again.permutation(neg).tolist()
    hits, rates = oracles.cross_fitted_hits([(p[:100], n[:100]), (p[100:], n[100:])], 0.29)
    assert rates == [0.29, 0.29]
    assert found == stats.rate(hits, 200)


def test_tpr_at_fpr_needs_enough_negatives_in_each_half() -> None:
    pos, neg = np.ones(10), np.zeros(200)
    rng = np.random.default_rng(0)
    assert stats.tpr_at_fpr(pos, neg, 0.01, generator=rng) is not None
    assert stats.tpr_at_fpr(pos, neg[:199], 0.01, generator=rng) is None
    with pytest.raises(ValueError, match="false-positive"):
        stats.tpr_at_fpr(pos, neg, 1.0, generator=rng)


@pytest.mark.parametrize(
    ("pos", "neg"), [([], [1.0]), ([1.0], []), ([math.nan], [1.0]), ([[1.0]], [1.0])]
)
def test_scores_are_checked(pos: list[float], neg: list[float]) -> None:
    with pytest.raises(ValueError, match=r"positive|negative"):
        stats.auc(pos, neg)
    with pytest.raises(ValueError, match=r"positive|negative"):
        stats.roc(pos, neg)
    with pytest.raises(ValueError, match=r"positive|negative"):
        stats.tpr_at_fpr(pos, neg, generator=np.random.default_rng(0))


# --- bootstrap and Student ------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20),
    st.integers(1, 50),
    LEVELS,
    st.integers(0, 1000),
    st.sampled_from([1, 64, 1 << 20]),
)
def test_bootstrap_is_the_percentile_bootstrap(
    values: list[float], resamples: int, level: float, seed: int, at_once: int
) -> None:
    rng = np.random.default_rng
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "_DRAWN_AT_ONCE", at_once)  # the parts never show in the result
        mean = stats.bootstrap(values, rng(seed), resamples=resamples, level=level)
        top = stats.bootstrap(values, rng(seed), lambda x: float(x.max()), resamples, level)
    assert (mean.low, mean.high) == pytest.approx(
        oracles.percentile_bootstrap(
            values, rng(seed), lambda v: math.fsum(v) / len(v), resamples, level
        ),
        abs=1e-9,
    )
    assert (top.low, top.high) == pytest.approx(
        oracles.percentile_bootstrap(values, rng(seed), max, resamples, level), abs=1e-9
    )
    assert mean.value == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
    assert (top.value, top.n) == (max(values), len(values))


def test_bootstrap_memory_is_bounded() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    tracemalloc.start()
    stats.bootstrap(values, np.random.default_rng(0), resamples=30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # all at once: 48 MB, of a thousand resamples 1.6 GB


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf], [[1.0, 2.0]]])
def test_too_few_or_infinite_values_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="bootstrap needs"):
        stats.bootstrap(values, np.random.default_rng(0))
    with pytest.raises(ValueError, match="prediction interval needs"):
        stats.prediction_interval(values)
    with pytest.raises(ValueError, match="mean over seeds needs"):
        stats.mean_interval(values)


def test_bootstrap_needs_a_resample() -> None:
    with pytest.raises(ValueError, match="resample"):
        stats.bootstrap([1.0, 2.0], np.random.default_rng(0), resamples=0)


def test_student_by_hand() -> None:
    # t(1, 97.5 %) = 12.7062; of 0 and 2 the mean is 1 and s = sqrt(2).
    mean = stats.mean_interval([0.0, 2.0])
    assert (mean.value, mean.low, mean.high) == pytest.approx((1, -11.7062, 13.7062), abs=1e-4)
    assert mean.n == 2
    low, high = stats.prediction_interval([0.0, 2.0])
    assert (low, high) == pytest.approx((1 - 12.7062 * 3**0.5, 1 + 12.7062 * 3**0.5), abs=1e-3)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20), LEVELS)
def test_mean_interval_agrees_with_scipy(values: list[float], level: float) -> None:
    found = stats.mean_interval(values, level)
    scale = np.std(values, ddof=1) / math.sqrt(len(values))
    half = scipy_stats.t.ppf((1 + level) / 2, len(values) - 1) * scale
    assert (found.low, found.high) == pytest.approx(
        (np.mean(values) - half, np.mean(values) + half), rel=1e-7, abs=1e-7
    )


# --- Jensen-Shannon -------------------------------------------------------------------------------


@st.composite
def distributions(draw: st.DrawFn) -> tuple[stats.Array, stats.Array]:
    """Two (n, classes) arrays of probabilities, with zeros."""
    shape = draw(st.tuples(st.integers(0, 5), st.integers(1, 6)))
    share = st.one_of(st.just(0.0), st.floats(1e-12, 1.0))
    pair = []
    for _ in range(2):
        weights = draw(hnp.arrays(np.float64, shape, elements=share))
        weights[:, 0] += weights.sum(axis=1) == 0
        pair.append(weights / weights.sum(axis=1, keepdims=True))
    return pair[0], pair[1]


@given(distributions())
def test_js_distance_agrees_with_loops(pair: tuple[stats.Array, stats.Array]) -> None:
    p, q = pair
    found = stats.js_distance(p, q)
    assert found.shape == (len(p),)
    # The square root turns rounding of 1e-16 into 1e-8 where the rows are all but equal.
    for row, a, b in zip(found, p, q, strict=True):
        assert row**2 == pytest.approx(oracles.js_distance(a, b) ** 2, abs=1e-14)
        assert 0 <= row <= 1
    np.testing.assert_array_equal(found, stats.js_distance(q, p))
    np.testing.assert_array_equal(stats.js_distance(p, p), 0)


def test_js_distance_agrees_with_scipy() -> None:
    # Not on drawn rows: scipy takes the root of a rounded, negative sum where these are equal.
    p, q = np.random.default_rng(0).dirichlet([0.3] * 10, (2, 100))
    np.testing.assert_allclose(stats.js_distance(p, q), jensenshannon(p, q, base=2, axis=1))


def test_js_distance_of_almost_equal_rows_is_no_root_of_a_negative_number() -> None:
    p = np.random.default_rng(0).dirichlet([1.0] * 10, 1000)
    q = p * (1 + 1e-15 * np.random.default_rng(1).normal(size=p.shape))
    assert (stats.js_distance(p, q) < 1e-6).all()


def test_js_distance_by_hand() -> None:
    # (1, 0) against (1/2, 1/2): midpoint (3/4, 1/4), divergence 0.311278 bit.
    assert stats.js_distance([[1, 0]], [[0.5, 0.5]]) == pytest.approx(math.sqrt(0.3112781))
    assert stats.js_distance([[1, 0]], [[0, 1]]) == 1
    tiny = 5e-324  # half of it is zero
    assert stats.js_distance([[1, tiny]], [[1, 0]]) == 0


@pytest.mark.parametrize("bad", [[[0.5, 0.6]], [[-0.5, 1.5]], [[math.nan, 1.0]], [0.5, 0.5]])
def test_js_distance_refuses_what_is_no_probability(bad: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="p must"):
        stats.js_distance(bad, [[0.5, 0.5]])
    with pytest.raises(ValueError, match="shape"):
        stats.js_distance([[0.5, 0.5]], [[0.2, 0.3, 0.5]])


# --- signals --------------------------------------------------------------------------------------


@st.composite
def labelled_logits(draw: st.DrawFn) -> tuple[stats.Array, list[int]]:
    shape = draw(st.tuples(st.integers(1, 5), st.integers(2, 6)))
    logits = draw(hnp.arrays(np.float64, shape, elements=st.floats(-15, 15)))
    classes = st.integers(0, shape[1] - 1)
    return logits, draw(st.lists(classes, min_size=shape[0], max_size=shape[0]))


@given(labelled_logits())
def test_signals_agree_with_loops(case: tuple[stats.Array, list[int]]) -> None:
    logits, targets = case
    p = signals.softmax(logits)
    np.testing.assert_allclose(p.sum(axis=1), 1)
    np.testing.assert_allclose(np.log(p), signals.log_softmax(logits), atol=1e-12)
    every = zip(
        logits,
        p,
        targets,
        signals.margin(logits, targets),
        signals.confidence(p, targets),
        signals.entropy(p),
        signals.modified_entropy(p, targets),
        strict=True,
    )
    for z, row, y, margin, confidence, entropy, modified in every:
        weights = np.exp(z)
        assert row == pytest.approx(weights / weights.sum(), rel=1e-12)
        assert margin == pytest.approx(oracles.margin(z, y), rel=1e-9, abs=1e-9)
        assert confidence == row[y]
        assert entropy == pytest.approx(-math.fsum(v * math.log(v) for v in row), abs=1e-12)
        assert modified == pytest.approx(oracles.modified_entropy(row, y), abs=1e-9)


def test_signals_keep_to_extreme_logits() -> None:
    logits = [[1e4, 0.0, -np.inf], [0.0, 1e4, 0.0], [3.0, -np.inf, -np.inf]]
    assert signals.margin(logits, [0, 0, 0]).tolist() == [1e4, -1e4, np.inf]
    assert signals.margin(logits, [2, 1, 1]).tolist() == [-np.inf, 1e4 - math.log(2), -np.inf]
    assert signals.log_softmax(logits)[0].tolist() == [0, -1e4, -np.inf]
    p = signals.softmax(logits)
    assert p.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]
    # Certain and right: 0. Certain and wrong: both logarithms stop at that of 1e-30.
    assert signals.modified_entropy(p, [0, 1, 0]).tolist() == [0, 0, 0]
    assert signals.modified_entropy(p[:1], [1]) == pytest.approx(60 * math.log(10))


def test_modified_entropy_by_hand_takes_each_rows_own_class() -> None:
    p = [[0.2, 0.8], [0.2, 0.8]]
    # -(0.8 log 0.2 + 0.8 log 0.2) and -(0.2 log 0.8 + 0.2 log 0.8)
    expected = [-1.6 * math.log(0.2), -0.4 * math.log(0.8)]
    assert signals.modified_entropy(p, [0, 1]) == pytest.approx(expected)


@pytest.mark.parametrize("row", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_unusable_logits_are_refused(row: list[float]) -> None:
    for call in (signals.softmax, signals.log_softmax, lambda z: signals.margin(z, [0])):
        with pytest.raises(ValueError, match="logits"):
            call([row])


def test_unusable_targets_and_shapes_are_refused() -> None:
    p = [[0.5, 0.5]]
    for targets in ([-1], [2], [0.0], [0, 1], 0):
        for call in (signals.margin, signals.confidence, signals.modified_entropy):
            with pytest.raises(ValueError, match="targets"):
                call(p, targets)
    for bad in ([0.5, 0.5], [[0.5, -0.1]], [[1.1, 0.0]], [[math.nan, 0.5]]):
        with pytest.raises(ValueError, match="probabilities"):
            signals.entropy(bad)
    assert signals.entropy([[1 + 1e-4, 0.0]]).tolist() == [0]  # half precision rounds
    with pytest.raises(ValueError, match="two classes"):
        signals.margin([[1.0]], [0])
    with pytest.raises(ValueError, match="logits"):
        signals.softmax([1.0, 2.0])


# --- claims about uncertainty, tested statistically -----------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n", "shift"), [(200, 200, 0.0), (100, 400, 1.0)])
def test_auc_interval_covers(m: int, n: int, shift: float) -> None:
    rng = np.random.default_rng(1)
    truth = float(special.ndtr(shift / math.sqrt(2)))
    hits = 0
    for _ in range(2000):
        found = stats.auc(rng.normal(shift, 1, m), rng.normal(0, 1, n))
        hits += found.low <= truth <= found.high
    # Asymptotic: at these sizes within a point of 95 %.
    assert_covers(hits, 2000, 0.945)


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.01, 0.3, 0.95])
def test_rate_interval_covers(p: float) -> None:
    draws = np.random.default_rng(2).binomial(60, p, 4000)
    found = [stats.rate(int(k), 60) for k in draws]
    assert_covers(sum(i.low <= p <= i.high for i in found), 4000, 0.95, at_least=True)


@pytest.mark.slow
def test_bootstrap_interval_covers() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(2000):
        found = stats.bootstrap(rng.exponential(1.0, 300), rng, resamples=500)
        hits += found.low <= 1.0 <= found.high
    assert_covers(hits, 2000, 0.945)


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 3, 8])
def test_students_intervals_cover(k: int) -> None:
    rng = np.random.default_rng(4)
    means, further = 0, 0
    for draws in rng.normal(5, 2, (4000, k + 1)):
        mean = stats.mean_interval(draws[:k])
        low, high = stats.prediction_interval(draws[:k])
        means += mean.low <= 5 <= mean.high
        further += low <= draws[k] <= high
    assert_covers(means, 4000, 0.95)
    assert_covers(further, 4000, 0.95)


@pytest.mark.slow
def test_auc_fallback_covers_near_perfect_separation() -> None:
    rng = np.random.default_rng(5)
    hits, fell_back = 0, 0
    truth = 0.95  # two classes in 8 records: perfect separation is common, the truth below 1
    shift = float(special.ndtri(truth)) * math.sqrt(2)
    for _ in range(4000):
        found = stats.auc(rng.normal(shift, 1, 8), rng.normal(0, 1, 8))
        if found.value == 1:
            fell_back += 1
            hits += found.low <= truth
    assert fell_back > 500
    assert hits == fell_back
