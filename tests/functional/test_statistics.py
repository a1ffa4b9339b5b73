from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from helpsteer2.functional import statistics as s

NAN = float("nan")
ratings = st.one_of(st.integers(0, 4).map(float), st.just(NAN))
predictions = st.one_of(st.floats(-2, 6, allow_nan=False), st.sampled_from([0.0, 1.0, 2.5, NAN]))
columns = st.lists(st.tuples(predictions, ratings), min_size=1, max_size=40).map(
    lambda rows: (np.array([p for p, _ in rows]), np.array([r for _, r in rows]))
)
quick = settings(max_examples=60, deadline=None)


def both_known(p, r):
    known = ~np.isnan(p) & ~np.isnan(r)
    return p[known], r[known]


def as_figures(p, r):
    calibration = s.calibration(p, r)
    return np.array(
        [s.mse(p, r), s.mae(p, r), s.r2(p, r), s.pearson(p, r), s.spearman(p, r), calibration.error]
    )


@quick
@given(columns)
def test_correlations_and_ranks_equal_scipy(data):
    p, r = both_known(*data)
    np.testing.assert_array_equal(s.average_ranks(p), stats.rankdata(p))
    # Columns that differ by rounding noise alone have no meaningful correlation on either side.
    if p.size < 3 or np.std(p) < 1e-9 or np.std(r) < 1e-9:
        return
    assert s.pearson(*data) == pytest.approx(stats.pearsonr(p, r)[0], abs=1e-9)
    assert s.spearman(*data) == pytest.approx(stats.spearmanr(p, r)[0], abs=1e-9)


@quick
@given(columns, st.randoms(use_true_random=False))
def test_order_of_rows_and_unknown_rows_do_not_matter(data, random):
    p, r = data
    order = np.array(random.sample(range(p.size), p.size))
    np.testing.assert_allclose(as_figures(p[order], r[order]), as_figures(p, r), atol=1e-9)
    padded = as_figures(np.append(p, [NAN, 3.0]), np.append(r, [1.0, NAN]))
    np.testing.assert_allclose(padded, as_figures(p, r), atol=1e-9)


def test_mse_mae_and_r2_against_figures_worked_by_hand():
    p, r = [1.0, 3.0, NAN, 2.0], [0.0, 4.0, 1.0, NAN]
    assert (s.mse(p, r), s.mae(p, r)) == (1.0, 1.0)
    assert s.r2(p, r) == pytest.approx(1 - 2 / 8)


def test_r2_is_one_if_perfect_zero_for_the_mean_and_negative_if_worse():
    r = np.array([0.0, 1.0, 4.0, 4.0])
    assert s.r2(r, r) == 1.0
    assert s.r2(np.full(4, r.mean()), r) == pytest.approx(0.0)
    assert s.r2(4.0 - r, r) < 0.0


def test_what_cannot_be_computed_is_nan_and_never_zero():
    nothing = as_figures(np.array([NAN, 1.0]), np.array([1.0, NAN]))
    assert np.isnan(nothing).all()
    constant = np.full(50, 2.8655)
    varied = np.tile([0.1, 0.7, 3.0, 4.0, 2.2], 10)
    assert np.isnan([s.pearson(constant, varied), s.spearman(constant, varied)]).all()
    assert np.isnan(s.r2(varied, constant))


def test_shapes_that_differ_are_refused_rather_than_broadcast():
    with pytest.raises(ValueError, match="one length"):
        s.mse(np.zeros(3), np.zeros(1))


def test_pairs_within_finds_every_pair_of_every_group_once():
    groups = np.array([7, 3, 7, 3, 7, 1])
    pairs = {tuple(pair) for pair in s.pairs_within(groups)}
    assert pairs == {(0, 2), (0, 4), (2, 4), (1, 3)}
    assert s.pairs_within(np.repeat(np.arange(3), 10)).shape == (3 * 45, 2)
    assert s.pairs_within([]).shape == (0, 2)


def test_pair_ties_are_counted_apart_and_are_never_wins():
    rating = np.array([2, 1, 2, 1, 3, 1, 2, 2, NAN, 1])
    predicted = np.array([5.0, 4, 1, 2, 7, 7, 0, 9, 1, 2])
    pairs = np.arange(10).reshape(-1, 2)
    counts = s.count_pairs(predicted, rating, pairs)
    assert counts == s.PairCounts(right=1, wrong=1, predicted_ties=1, rating_ties=1, unknown=1)
    assert counts.accuracy == pytest.approx(1 / 3)
    assert counts.half_credit_accuracy == pytest.approx(0.5)
    strict = s.strict_wins(predicted, rating, pairs)
    assert np.nanmean(strict) == pytest.approx(counts.accuracy)
    assert np.isnan(strict).sum() == 2


@quick
@given(columns)
def test_pair_counts_of_the_negated_and_of_the_swapped_predictor(data):
    p, r = data
    pairs = s.pairs_within(np.arange(p.size) // 3)
    counts, negated = s.count_pairs(p, r, pairs), s.count_pairs(-p, r, pairs)
    total = counts.decided + counts.rating_ties + counts.unknown
    assert total == len(pairs)
    assert (counts.right, counts.wrong) == (negated.wrong, negated.right)
    assert s.count_pairs(p, r, pairs[:, ::-1]) == counts
    if counts.decided:
        assert counts.half_credit_accuracy + negated.half_credit_accuracy == pytest.approx(1.0)
        assert counts.accuracy + negated.accuracy <= 1.0


def test_a_constant_predictor_never_wins_but_gets_half_credit():
    rating = np.array([0.0, 1, 4, 2])
    counts = s.count_pairs(np.ones(4), rating, s.pairs_within([0, 0, 1, 1]))
    assert (counts.accuracy, counts.half_credit_accuracy) == (0.0, 0.5)


def test_pair_accuracy_of_one_group_is_kendalls_concordance():
    rng = np.random.default_rng(0)
    p, r = rng.normal(size=30), rng.normal(size=30)
    counts = s.count_pairs(p, r, s.pairs_within(np.zeros(30)))
    assert 2 * counts.accuracy - 1 == pytest.approx(stats.kendalltau(p, r)[0])


def test_calibration_error_of_shifted_predictions_is_the_shift():
    rating = np.random.default_rng(0).integers(0, 5, 500).astype(float)
    assert s.calibration(rating, rating).error == pytest.approx(0.0)
    assert s.calibration(rating + 0.7, rating).error == pytest.approx(0.7)
    assert s.calibration(np.full(500, rating.mean()), rating).error == pytest.approx(0.0)


def test_calibration_sees_overconfidence_that_the_mean_hides():
    rating = np.tile([0.0, 4.0], 200)
    predicted = np.where(rating == 0.0, -1.0, 5.0)
    assert np.mean(predicted - rating) == 0.0
    assert s.calibration(predicted, rating).error == pytest.approx(1.0)


@quick
@given(columns)
def test_calibration_bins_hold_every_known_row_once(data):
    bins = s.calibration(*data, bins=4)
    p, r = both_known(*data)
    assert bins.counts.sum() == p.size
    assert len(bins.counts) <= 4
    assert (np.diff(bins.mean_predicted) > 0).all()
    assert np.dot(bins.counts, bins.mean_rating) == pytest.approx(r.sum(), abs=1e-9)


def test_calibration_bins_of_distinct_predictions_are_of_equal_count():
    bins = s.calibration(np.linspace(0, 4, 100), np.zeros(100), bins=10)
    np.testing.assert_array_equal(bins.counts, np.full(10, 10))


def test_bootstrap_draws_whole_clusters_and_repeats_with_its_seed():
    clusters = np.array([5, 5, 2, 9, 9, 9, 2])
    seen = []

    def figure(rows):
        counts = np.bincount(rows, minlength=7)
        seen.append(counts)
        return counts

    first = s.cluster_bootstrap(figure, clusters, resamples=40, seed=1)
    for counts in seen:
        assert counts[0] == counts[1]
        assert counts[2] == counts[6]
        assert counts[3] == counts[4] == counts[5]
        assert counts[0] + counts[2] + counts[3] == 3
    np.testing.assert_array_equal(
        first, s.cluster_bootstrap(figure, clusters, resamples=40, seed=1)
    )
    assert (first != s.cluster_bootstrap(figure, clusters, resamples=40, seed=2)).any()


def test_bootstrap_within_strata_keeps_the_size_of_each():
    strata = np.array([0, 0, 0, 1, 1])
    draws = s.cluster_bootstrap(
        lambda rows: np.bincount(strata[rows], minlength=2),
        np.arange(5),
        strata=strata,
        resamples=30,
        seed=0,
    )
    np.testing.assert_array_equal(draws, np.tile([3, 2], (30, 1)))
    with pytest.raises(ValueError, match="two strata"):
        s.cluster_bootstrap(lambda rows: 0.0, [0, 0], strata=[0, 1], resamples=1, seed=0)


def test_bootstrap_of_clusters_is_wider_than_of_rows_if_rows_repeat():
    values = np.repeat(np.random.default_rng(0).normal(size=60), 10)

    def width(clusters):
        low, high = np.quantile(
            s.cluster_bootstrap(lambda rows: values[rows].mean(), clusters, resamples=300, seed=0),
            [0.025, 0.975],
        )
        return high - low

    by_prompt = width(np.repeat(np.arange(60), 10))
    assert by_prompt == pytest.approx(width(np.arange(600)) * np.sqrt(10), rel=0.2)


def test_paired_mean_difference_equals_scipys_t_interval_on_plenty_of_independent_rows():
    rng = np.random.default_rng(0)
    second = rng.normal(size=800)
    first = second + rng.normal(0.3, 0.5, size=800)
    ours = s.mean_interval(first - second, np.arange(800), resamples=2000, seed=0)
    theirs = stats.ttest_1samp(first - second, 0.0).confidence_interval(0.95)
    assert ours.value == pytest.approx((first - second).mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_paired_difference_is_exact_where_the_gain_is_the_same_everywhere():
    noise = np.random.default_rng(0).normal(size=50) * 100
    interval = s.mean_interval((noise + 1) - noise, np.arange(50), resamples=100, seed=0)
    assert (interval.value, interval.low, interval.high) == pytest.approx((1.0, 1.0, 1.0))


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        prompts = np.repeat(np.arange(60), 2)
        values = rng.normal(size=60)[prompts] + rng.normal(size=120)
        interval = s.mean_interval(values, prompts, resamples=200, seed=trial)
        held += interval.low <= 0.0 <= interval.high
    assert 0.88 <= held / 200 <= 0.99


def test_percentile_interval_says_nan_if_most_draws_are_not_computable():
    draws = np.array([1.0, NAN, NAN, NAN])
    assert np.isnan(s.percentile_interval(1.0, draws).low)
    assert np.isnan(s.percentile_interval(NAN, np.ones(4)).low)
    assert s.percentile_interval(1.0, [0.0, NAN, 2.0]) == s.Interval(
        1.0, pytest.approx(0.05), pytest.approx(1.95)
    )
    nothing = s.mean_interval([NAN], [0], resamples=5, seed=0)
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()
