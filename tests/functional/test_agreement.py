from __future__ import annotations

import itertools
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpsteer2.functional import agreement as a

quick = settings(max_examples=200, deadline=None)
likert = st.integers(0, 4)
raters = st.lists(likert, min_size=1, max_size=6)
pairs = st.lists(st.tuples(likert, likert), min_size=1, max_size=40)


def deviation(values):
    mean = Fraction(sum(values), len(values))
    return sum((value - mean) ** 2 for value in values)


def best_subset(ratings, keep):
    """The rule as it is stated, by trying everything."""
    subsets = list(itertools.combinations(range(len(ratings)), min(keep, len(ratings))))
    values = {s: [ratings[i] for i in s] for s in subsets}
    return sorted(subsets, key=lambda s: (np.ptp(values[s]), deviation(values[s]), s))[0]


def kappa_by_definition(first, second):
    """1 − Σ w·observed / Σ w·expected over the table of counts."""
    n = len(first)
    observed = np.zeros((5, 5))
    for x, y in zip(first, second, strict=True):
        observed[x, y] += 1
    expected = np.outer(observed.sum(axis=1), observed.sum(axis=0)) / n
    weights = (np.arange(5)[:, None] - np.arange(5)[None]) ** 2
    below = (weights * expected).sum()
    return 1 - (weights * observed).sum() / below if below else float("nan")


@quick
@given(raters, st.integers(1, 4))
def test_raters_kept_are_those_of_the_stated_rule(ratings, keep):
    assert a.most_agreeing(ratings, keep) == best_subset(ratings, keep)


@quick
@given(st.lists(likert, min_size=4, max_size=6), st.integers(-3, 3))
def test_who_agrees_does_not_depend_on_where_the_scale_begins_or_points(ratings, shift):
    kept = a.most_agreeing(ratings)
    assert a.most_agreeing([shift - rating for rating in ratings]) == kept


@pytest.mark.parametrize(
    ("ratings", "kept"),
    [
        ([0, 4, 4, 3, 0], (1, 2, 3)),
        ([4, 0, 2, 3, 2], (2, 3, 4)),
        ([2, 2, 2, 2], (0, 1, 2)),  # all the same: the first three
        ([1, 2, 3, 2, 1], (0, 1, 3)),  # 1 2 2 before 1 2 1, 2 3 2 and 2 2 1
        ([0, 1, 2, 2], (1, 2, 3)),  # 0 1 2 spreads more
        ([0, 2, 1, 2, 4, 2], (1, 3, 5)),
        ([0, 4], (0, 1)),
        ([], ()),
    ],
)
def test_raters_kept_in_cases_worked_by_hand(ratings, kept):
    assert a.most_agreeing(ratings) == kept


def test_what_cannot_be_asked_is_refused():
    for call in (
        lambda: a.spread([]),
        lambda: a.rounded_mean([]),
        lambda: a.most_agreeing([1, 2], keep=0),
        lambda: a.divergence([], []),
        lambda: a.divergence([1], [1, 2]),
        lambda: a.aggregate_ratings([]),
        lambda: a.aggregate_ratings([[1, 2], [1]]),
        lambda: a.aggregate_preference([]),
        lambda: a.quadratic_kappa([1, 2], [1]),
        lambda: a.quadratic_kappa([[1, 2]], [[1, 2]]),
    ):
        with pytest.raises(ValueError, match=r".+"):
            call()


@quick
@given(st.lists(st.integers(-3, 4), min_size=1, max_size=6))
def test_halves_are_rounded_away_from_zero(ratings):
    mean = Decimal(sum(ratings)) / len(ratings)
    assert a.rounded_mean(ratings) == int(mean.quantize(Decimal(1), ROUND_HALF_UP))
    assert a.rounded_mean([-rating for rating in ratings]) == -a.rounded_mean(ratings)


def test_rounding_of_halves_in_plain_numbers():
    assert [a.rounded_mean(two) for two in ([0, 1], [1, 2], [2, 3], [3, 4])] == [1, 2, 3, 4]
    assert [a.rounded_mean(two) for two in ([0, -1], [-1, -2], [1, -1])] == [-1, -2, 0]


def test_three_whole_numbers_never_leave_a_half():
    for ratings in itertools.product(range(-3, 5), repeat=3):
        assert a.rounded_mean(ratings) == round(sum(ratings) / 3)


@quick
@given(
    st.integers(2, 5).flatmap(
        lambda n: st.lists(st.lists(likert, min_size=n, max_size=n), min_size=2, max_size=5)
    )
)
def test_labels_are_rounded_means_of_the_raters_who_agree_on_helpfulness(ratings):
    found = a.aggregate_ratings(ratings)
    kept = best_subset(ratings[0], 3)
    assert found.kept == kept
    means = [Fraction(sum(row[i] for i in kept), len(kept)) for row in ratings]
    assert list(found.labels) == [int(mean + Fraction(1, 2)) for mean in means]
    assert found.spread == max(ratings[0][i] for i in kept) - min(ratings[0][i] for i in kept)
    assert found.agrees == (found.spread <= 2)
    by_second = a.aggregate_ratings(ratings, reference=1)
    assert by_second.kept == best_subset(ratings[1], 3)


def test_a_response_worked_by_hand():
    helpfulness, verbosity = [4, 0, 3, 1, 4], [0, 4, 1, 4, 1]
    found = a.aggregate_ratings([helpfulness, verbosity])
    # 4, 3, 4 agree most; their verbosity is 0, 1, 1.
    assert found == a.Aggregate(kept=(0, 2, 4), labels=(4, 1), spread=1)
    assert not a.aggregate_ratings([[0, 2, 4], [2, 2, 2]]).agrees


@pytest.mark.parametrize(
    ("strengths", "label"),
    [
        ([1, 1, 2], 1),
        ([-3, -3, -2, 3, 3], -3),
        ([-1, 1, 0], 0),
        ([-1, 1, -1], 0),
        ([2, 2, 1, -3], 2),
        ([-3, 0, 3], None),
        ([3, -3], None),
        ([-1, -2], -2),
    ],
)
def test_preferences_worked_by_hand(strengths, label):
    assert a.aggregate_preference(strengths) == label


@quick
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=5))
def test_preference_of_the_responses_in_the_other_order_is_the_opposite(strengths):
    label = a.aggregate_preference(strengths)
    opposite = a.aggregate_preference([-strength for strength in strengths])
    assert opposite == (None if label is None else -label)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([2, 3], [2, 3], "tied"),
        ([2, 3], [2, 4], "one-sided"),
        ([4, 3, 4], [2, 3, 0], "one-sided"),
        ([2, 3], [3, 2], "diverging"),
        ([0, 3], [4, 2], "diverging"),  # only one of them by 2 or more
        ([0, 4, 2], [2, 2, 2], "substantially diverging"),
    ],
)
def test_divergence_worked_by_hand(first, second, expected):
    assert a.divergence(first, second) == expected
    assert a.divergence(second, first) == expected


@quick
@given(pairs)
def test_kappa_is_what_its_definition_says(data):
    first, second = zip(*data, strict=True)
    ours = a.quadratic_kappa(first, second)
    assert ours == pytest.approx(kappa_by_definition(first, second), abs=1e-12, nan_ok=True)
    assert a.quadratic_kappa(second, first) == pytest.approx(ours, abs=1e-12, nan_ok=True)
    assert np.isnan(ours) or -1.0 <= ours <= 1.0


# Made by scikit-learn 1.9.1: cohen_kappa_score(…, weights="quadratic", labels=range(5)).
SKLEARN_KAPPAS = [
    ([0, 1, 2, 3, 4, 4, 3, 2, 1, 0], [0, 2, 2, 3, 3, 4, 1, 2, 1, 1], 0.7878787878787878),
    ([2, 2, 3, 1, 4, 0, 3, 3], [2, 3, 3, 1, 4, 1, 2, 4], 0.8181818181818181),
    ([3, 3, 3, 3, 2], [3, 3, 3, 2, 3], -0.25),
]


@pytest.mark.parametrize(("first", "second", "kappa"), SKLEARN_KAPPAS)
def test_kappa_equals_scikit_learn(first, second, kappa):
    assert a.quadratic_kappa(first, second) == pytest.approx(kappa, abs=1e-12)


def test_kappa_of_agreement_of_the_opposite_and_of_chance():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 5, 20_000)
    assert a.quadratic_kappa(first, first) == 1.0
    assert a.quadratic_kappa(first, 4 - first) == pytest.approx(-1.0, abs=0.05)
    assert a.quadratic_kappa(first, rng.integers(0, 5, 20_000)) == pytest.approx(0.0, abs=0.03)


def test_kappa_of_a_constant_is_not_a_number_and_of_two_constants_is_zero():
    assert np.isnan(a.quadratic_kappa([3, 3, 3], [3, 3, 3]))
    assert np.isnan(a.quadratic_kappa([], []))
    assert a.quadratic_kappa([3, 3, 3], [1, 1, 1]) == 0.0


@quick
@given(st.lists(st.lists(likert, max_size=5), min_size=1, max_size=8))
def test_terms_of_samples_add_up_to_kappa_over_all_pairs(samples):
    terms = np.sum([a.pair_terms(ratings) for ratings in samples], axis=0).astype(float)
    listed = [pair for ratings in samples for pair in itertools.combinations(ratings, 2)]
    first, second = zip(*listed, strict=True) if listed else ((), ())
    in_order = a.quadratic_kappa(first, second)
    swapped = a.quadratic_kappa(first + second, second + first)
    assert terms[0] == len(listed)
    assert float(a.kappa_of_terms(terms)) == pytest.approx(in_order, abs=1e-12, nan_ok=True)
    both = float(a.kappa_of_terms(a.both_orders(terms)))
    assert both == pytest.approx(swapped, abs=1e-12, nan_ok=True)
