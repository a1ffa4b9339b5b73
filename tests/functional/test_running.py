from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from helpsteer2.functional import statistics
from helpsteer2.functional.running import BootstrapSums, PairwiseMoments, UniformSample

tables = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 30), st.integers(1, 4)),
    elements=st.sampled_from([0.0, 1.0, 2.0, 2.5, 4.0, float("nan")]),
)


def moments(table, batches=1):
    made = PairwiseMoments(table.shape[1])
    for batch in np.array_split(table, batches):
        if len(batch):
            made.add(batch)
    return made


@settings(max_examples=100, deadline=None)
@given(tables, st.integers(1, 4))
def test_moments_equal_those_of_the_whole_table(table, batches):
    made = moments(table, batches)
    np.testing.assert_array_equal(made.counts(), (~np.isnan(table)).sum(axis=0))
    for i, column in enumerate(table.T):
        known = column[~np.isnan(column)]
        mean = known.mean() if known.size else np.nan
        std = known.std(ddof=1) if known.size > 1 else np.nan
        assert made.means()[i] == pytest.approx(mean, abs=1e-9, nan_ok=True)
        assert made.stds()[i] == pytest.approx(std, abs=1e-9, nan_ok=True)
        for j, other in enumerate(table.T):
            expected = statistics.pearson(column, other)
            found = made.correlations()[i, j]
            assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_a_large_mean_costs_no_digits_and_a_constant_has_no_correlation():
    rng = np.random.default_rng(0)
    small = rng.normal(size=(500, 3))
    small[:, 2] = 0.1
    made, shifted = moments(small, 3), moments(small + 1e9, 3)
    np.testing.assert_allclose(shifted.stds(), made.stds(), atol=1e-6)
    np.testing.assert_allclose(shifted.correlations(), made.correlations(), atol=1e-6)
    assert np.isnan(made.correlations()[2]).all()
    assert np.isnan(made.correlations()[:, 2]).all()
    assert made.stds()[2] == 0.0


def test_bootstrap_sums_do_not_depend_on_batches_and_repeat_with_their_seed():
    terms = np.random.default_rng(0).normal(size=(40, 3))
    made = [BootstrapSums(3, 20, seed) for seed in (1, 1, 2)]
    made[0].add(terms)
    for batch in np.array_split(terms, 7):
        made[1].add(batch)
    made[2].add(terms)
    np.testing.assert_allclose(made[0].total, terms.sum(axis=0))
    np.testing.assert_allclose(made[0].draws, made[1].draws)
    assert not np.allclose(made[0].draws, made[2].draws)


def test_interval_of_a_ratio_is_that_of_the_ordinary_bootstrap():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 4, 2000)
    clusters = np.repeat(np.arange(2000), sizes)
    values = rng.normal(size=2000)[clusters] + rng.normal(size=clusters.size)
    sums = BootstrapSums(2, 2000, seed=0)
    sums.add(np.stack([sizes, np.bincount(clusters, weights=values)], axis=1))
    ours = statistics.percentile_interval(
        sums.total[1] / sums.total[0], sums.draws[:, 1] / sums.draws[:, 0]
    )
    theirs = statistics.mean_interval(values, clusters, resamples=2000, seed=1)
    assert ours.value == pytest.approx(theirs.value)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.008)


def test_sample_is_everything_while_it_fits():
    rows = np.arange(20.0).reshape(10, 2)
    sample = UniformSample(2, 10, seed=0)
    for batch in np.array_split(rows, 3):
        sample.add(batch)
    np.testing.assert_array_equal(np.sort(sample.rows(), axis=0), rows)


def test_every_row_is_as_likely_to_be_in_the_sample():
    times = np.zeros(60)
    for seed in range(1000):
        sample = UniformSample(1, 12, seed)
        for batch in np.array_split(np.arange(60.0)[:, None], 9):
            sample.add(batch)
        rows = sample.rows()[:, 0].astype(int)
        assert len(set(rows)) == 12
        times[rows] += 1
    # 200 expected; the standard deviation of each count is 12.6.
    assert abs(times - 200).max() < 60
    assert abs(times[:30].mean() - times[30:].mean()) < 10
