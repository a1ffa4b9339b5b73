"""How differences agree with preferences: ties never win, and the order told does not matter."""

from __future__ import annotations

import math

import numpy as np
import pytest

from helpsteer2.functional.preferences import count_preferences, preference_wins

NAN = math.nan


def test_every_case_by_hand() -> None:
    difference = [1.0, -0.5, 0.0, -2.0, 3.0, 1.0, 0.0]
    strength = [2.0, 1.0, -3.0, -1.0, 0.0, NAN, 0.0]
    wins = preference_wins(difference, strength)
    assert wins[:4].tolist() == [1.0, 0.0, 0.5, 1.0]
    assert np.isnan(wins[4:]).all()
    counts = count_preferences(difference, strength)
    assert (counts.right, counts.wrong, counts.predicted_ties) == (2, 1, 1)
    assert (counts.rating_ties, counts.unknown) == (2, 1)
    assert counts.accuracy == pytest.approx(2 / 4)  # a tie is a miss here
    assert counts.half_credit_accuracy == pytest.approx(2.5 / 4)


def test_a_model_that_scores_everything_alike_never_wins() -> None:
    counts = count_preferences(np.zeros(5), [1, -2, 3, 0, -1])
    assert (counts.right, counts.accuracy, counts.half_credit_accuracy) == (0, 0.0, 0.5)


def test_swapping_the_responses_changes_nothing_and_reversing_one_side_everything() -> None:
    rng = np.random.default_rng(0)
    difference, strength = rng.normal(size=50).round(0), rng.integers(-3, 4, 50)
    counts = count_preferences(difference, strength)
    assert count_preferences(-difference, -strength) == counts
    reversed_counts = count_preferences(-difference, strength)
    assert (reversed_counts.right, reversed_counts.wrong) == (counts.wrong, counts.right)
    assert counts.decided + counts.rating_ties == 50


def test_an_unknown_difference_is_unknown() -> None:
    counts = count_preferences([NAN, 1.0], [1.0, 1.0])
    assert (counts.right, counts.unknown, counts.decided) == (1, 1, 1)
