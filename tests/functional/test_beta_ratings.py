from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
from scipy import stats

from helpsteer2.functional.beta_ratings import (
    BIN_EDGES,
    LOG_TINY,
    READINGS,
    Reading,
    fit_concentration,
    log_mass,
    log_masses,
    mean_nll,
    minimum_on_grid,
)

A, B, C = READINGS["A"], READINGS["B"], READINGS["C"]
ANY = pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS)
EXACT_EDGES = {
    "nearest": [Fraction(n, 8) for n in (0, 1, 3, 5, 7, 8)],
    "fifths": [Fraction(n, 5) for n in range(6)],
}


def exact_masses(alpha: int, beta: int, edges: list[Fraction]) -> list[Fraction]:
    """Of a Beta with whole parameters: P(X < x) = P(at least α of α + β − 1 coins of x)."""
    n = alpha + beta - 1

    def below(x: Fraction) -> Fraction:
        terms = (math.comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(alpha, n + 1))
        return sum(terms, Fraction(0))

    at = [below(edge) for edge in edges]
    return [high - low for low, high in pairwise(at)]


def rating_of(u: Fraction, reading: Reading) -> float:
    """The rating whose mean is u."""
    return float(u * 4 if reading.scaling == "quarter" else u * 5 - Fraction(1, 2))


def drawn_levels(ratings, concentration, reading, seed):
    """Whole ratings drawn from a Beta, cut at the edges, without the function under test."""
    u = reading.unit(ratings)
    x = np.random.default_rng(seed).beta(concentration * u, concentration * (1.0 - u))
    return np.searchsorted(BIN_EDGES[reading.edges][1:-1], x)


@ANY
@pytest.mark.parametrize("concentration", [0.5, 2.0, 24.0, 300.0, 2000.0])
def test_masses_sum_to_one(reading, concentration):
    masses = np.exp(log_masses(np.linspace(-1.0, 5.0, 301), concentration, reading))
    assert masses.shape == (301, 5)
    assert masses.sum(axis=-1) == pytest.approx(1.0, abs=1e-12)


@ANY
@pytest.mark.parametrize("whole", range(3, 22, 3))
def test_masses_are_those_of_exact_fractions_in_both_tails(reading, whole):
    u = Fraction(whole, 24)
    logs = log_masses(rating_of(u, reading), 24.0, reading)
    exact = exact_masses(whole, 24 - whole, EXACT_EDGES[reading.edges])
    assert logs == pytest.approx([math.log(mass) for mass in exact], rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("reading", [A, C], ids="AC")
def test_masses_far_out_in_a_tail_are_exact_too(reading):
    u = Fraction(1, 8)
    exact = exact_masses(50, 350, EXACT_EDGES[reading.edges])
    logs = log_masses(rating_of(u, reading), 400.0, reading)
    assert exact[4] < 1e-135
    assert logs == pytest.approx([math.log(mass) for mass in exact], rel=1e-11, abs=1e-11)


@ANY
def test_masses_are_differences_of_the_distribution_function_where_that_is_exact(reading):
    for rating, concentration in product((0.0, 0.7, 1.5, 2.0, 3.3, 4.0), (1.3, 7.0, 24.0)):
        u = rating / 4 if reading.scaling == "quarter" else (rating + 0.5) / 5
        u = min(max(u, reading.clamp), 1.0 - reading.clamp)
        below = stats.beta.cdf(
            BIN_EDGES[reading.edges], concentration * u, concentration * (1.0 - u)
        )
        masses = np.exp(log_masses(rating, concentration, reading))
        assert masses == pytest.approx(np.diff(below), abs=1e-13)


@ANY
@pytest.mark.parametrize("concentration", [3.0, 24.0, 100.0])
def test_a_higher_rating_makes_high_levels_more_probable(reading, concentration):
    logs = log_masses(np.linspace(0.05, 3.95, 157), concentration, reading)
    assert (np.diff(logs[:, 4]) > 0.0).all()
    assert (np.diff(logs[:, 0]) < 0.0).all()
    assert (np.diff(np.exp(logs) @ np.arange(5)) > 0.0).all()


@ANY
def test_the_scale_has_no_favoured_end(reading):
    ratings = np.linspace(0.0, 4.0, 81)
    logs = log_masses(ratings, 24.0, reading)
    assert logs == pytest.approx(log_masses(4.0 - ratings, 24.0, reading)[:, ::-1], rel=1e-10)


@ANY
def test_ratings_outside_count_as_the_end_of_the_scale(reading):
    outside, ends = log_masses([-3.0, 4.001, 9.0], 24.0, reading), [0.0, 4.0, 4.0]
    assert np.array_equal(outside, log_masses(ends, 24.0, reading))


def test_a_clamp_never_touches_reading_c_and_decides_the_ends_of_a():
    ratings = np.linspace(0.0, 4.0, 41)
    for reading, changes in ((C, np.zeros(41, dtype=bool)), (A, np.isin(ratings, [0.0, 4.0]))):
        tight = Reading(reading.scaling, reading.edges, clamp=1e-6)
        same = log_masses(ratings, 24.0, reading) == log_masses(ratings, 24.0, tight)
        assert np.array_equal(~same.all(axis=-1), changes)


def test_the_published_remarks_on_the_three_readings():
    level = {name: np.exp(log_masses([1.0, 2.0, 3.6], 24.0, of)) for name, of in READINGS.items()}
    assert level["B"][0, 0] == pytest.approx(0.305, abs=5e-4)
    assert level["B"][2, 4] == pytest.approx(0.93, abs=5e-3)
    assert level["A"][1, 4] == pytest.approx(5.1e-6, abs=5e-8)
    for name in "AC":
        # Halfway between two levels, neither is much more probable.
        half = np.exp(log_masses([0.5, 1.5, 2.5, 3.5], 24.0, READINGS[name]))
        lower = np.arange(4)
        odds = half[lower, lower] / half[lower, lower + 1]
        assert (np.abs(np.log(odds)) < 0.35).all()


@ANY
def test_the_likeliest_level_of_a_whole_rating_is_that_rating(reading):
    assert np.array_equal(log_masses(np.arange(5), 24.0, reading).argmax(axis=-1), np.arange(5))


def test_one_level_each_is_that_of_all_five_and_shapes_broadcast():
    ratings = np.array([0.2, 3.1, 2.0])
    levels = np.array([4, 3, 0])
    every = log_masses(ratings, 24.0, C)
    assert np.array_equal(log_mass(ratings, levels, 24.0, C), every[np.arange(3), levels])
    grid = log_mass(ratings[:, None], levels[:, None], np.array([5.0, 24.0]), C)
    assert grid.shape == (3, 2)
    assert np.array_equal(grid[:, 1], every[np.arange(3), levels])


def test_what_float64_cannot_tell_from_nothing_is_the_floor_and_never_infinite():
    assert log_mass(0.0, 4, 2000.0, A) == LOG_TINY
    assert log_mass(0.0, 4, 24.0, A, floor=-20.0) == -20.0
    assert log_mass(0.0, 0, 24.0, A, floor=-20.0) > -0.01
    assert np.isnan(log_mass(np.nan, 0, 24.0, A))


@pytest.mark.parametrize("levels", [[5], [-1], [1.0], [True]])
def test_levels_that_are_none_are_refused(levels):
    with pytest.raises(ValueError, match="whole numbers 0 to 4"):
        log_mass([1.0], np.array(levels), 24.0, C)


@pytest.mark.parametrize(
    "options",
    [
        ("centred", "nearest"),
        ("halves", "fifths"),
        ("quarter", "sixths"),
        ("quarter", "nearest", 0.0),
        ("quarter", "nearest", 0.1),
        ("quarter", "nearest", float("nan")),
    ],
)
def test_readings_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=r"none of|levels in the middle|clamp="):
        Reading(*options)


@ANY
@pytest.mark.parametrize("concentration", [4.0, 24.0])
def test_the_fit_finds_the_concentration_that_ratings_were_drawn_with(reading, concentration):
    ratings = np.random.default_rng(1).uniform(0.3, 3.7, 10_000)
    levels = drawn_levels(ratings, concentration, reading, seed=2)
    fitted = fit_concentration(ratings, levels, reading)
    assert fitted == pytest.approx(concentration, rel=0.06)
    best = mean_nll(ratings, levels, fitted, reading)
    assert best <= min(mean_nll(ratings, levels, c, reading) for c in fitted * np.geomspace(0.5, 2))


def test_the_fit_stays_within_its_bounds():
    perfect = np.arange(5.0)
    # Any large one is as good as another: float64 knows no probability nearer to 1.
    assert 500.0 < fit_concentration(perfect, np.arange(5), A) <= 2000.0
    assert fit_concentration([4.0, 0.0], [0, 4], C) == pytest.approx(0.5, rel=1e-3)
    assert fit_concentration(perfect, np.arange(5), A, bounds=(1.0, 20.0)) == pytest.approx(
        20.0, rel=1e-3
    )


def test_no_idea_costs_log_five():
    # Beta(1, 1) is the uniform distribution, and fifths are equal parts of it.
    levels = np.arange(5)
    assert mean_nll(np.full(5, 2.0), levels, 2.0, C) == pytest.approx(math.log(5.0), rel=1e-12)


def test_a_minimum_between_the_points_of_a_grid_is_that_of_the_fit():
    ratings = np.random.default_rng(3).uniform(0.3, 3.7, 3000)
    levels = drawn_levels(ratings, 10.0, C, seed=4)
    grid = np.geomspace(0.5, 2000.0, 51)
    curve = [mean_nll(ratings, levels, c, C) for c in grid]
    assert minimum_on_grid(curve, grid) == pytest.approx(
        fit_concentration(ratings, levels, C), 5e-3
    )
    assert minimum_on_grid([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]) == pytest.approx(1.0)
    assert minimum_on_grid([3.0, 2.0, 1.0], [1.0, 2.0, 4.0]) == pytest.approx(4.0)
    assert minimum_on_grid([1.0, 0.0, 1.0], [1.0, 2.0, 4.0]) == pytest.approx(2.0)
