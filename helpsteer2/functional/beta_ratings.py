"""How probable each whole rating 0–4 is, given a predicted one: a Beta distribution cut into five.

The prediction becomes a mean u in (0, 1), and the probability of level n is the mass of
Beta(c·u, c·(1 − u)) between the n-th and the next bin edge. The paper leaves open how a prediction
is scaled and where the edges are; ``READINGS`` has the three ways that make sense of it.

Everything is float64 on the CPU. scipy is imported inside functions, as that takes a while.

Source: arXiv 2406.08673, section 4.5 (P(a|x, y) of SteerLM 2.0, with c = 24).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from helpsteer2.functional.statistics import FloatArray

LEVELS = 5
"""Whole ratings: 0, 1, 2, 3 and 4."""

PAPER_CONCENTRATION = 24.0
"""α + β of the paper."""

CONCENTRATIONS = (0.5, 2000.0)
"""Least and greatest concentration that a fit considers: worse than no idea, and never wrong."""

LOG_TINY = math.log(sys.float_info.min)
"""−708.4 nats: below that, float64 cannot tell a mass from 0."""

Scaling = Literal["quarter", "centred"]
"""How a rating r becomes u: r/4 fills [0, 1]; (r + ½)/5 is the centre of level r's fifth."""

Edges = Literal["nearest", "fifths"]
"""Where levels end: ``nearest`` halfway between their r/4, ``fifths`` at equal parts of [0, 1]."""

BIN_EDGES: Mapping[Edges, tuple[float, ...]] = {
    "nearest": (0.0, 0.125, 0.375, 0.625, 0.875, 1.0),
    "fifths": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
}


@dataclass(frozen=True)
class Reading:
    """One way to read the paper.

    Args:
        scaling: How a rating becomes the mean u of the distribution.
        edges: Where its levels end.
        clamp: u stays this far from 0 and 1, where there is no Beta distribution.

    Raises:
        ValueError: If an option is out of range, or the edges do not belong to the scaling.
    """

    scaling: Scaling
    edges: Edges
    clamp: float = 0.01

    def __post_init__(self) -> None:
        for value, kind in ((self.scaling, Scaling), (self.edges, Edges)):
            if value not in get_args(kind):
                raise ValueError(f"{value!r} is none of {', '.join(get_args(kind))}")
        if (self.scaling, self.edges) == ("centred", "nearest"):
            raise ValueError(
                "scaling=centred puts the levels in the middle of fifths, edges=nearest is for "
                "scaling=quarter: choose edges=fifths, or scaling=quarter"
            )
        if not 0.0 < self.clamp < 0.1:
            raise ValueError(f"clamp={self.clamp} has to be above 0 and below 0.1")

    def unit(self, ratings: npt.ArrayLike) -> FloatArray:
        """Scale ratings to the means of their distributions.

        Args:
            ratings: Of any shape, in rating units; below 0 counts as 0, above 4 as 4.

        Returns:
            The same shape, from ``clamp`` to 1 − ``clamp``.
        """
        clipped = np.clip(np.asarray(ratings, dtype=np.float64), 0.0, LEVELS - 1)
        u = clipped / (LEVELS - 1) if self.scaling == "quarter" else (clipped + 0.5) / LEVELS
        return np.asarray(np.clip(u, self.clamp, 1.0 - self.clamp))


READINGS: Mapping[str, Reading] = {
    "A": Reading("quarter", "nearest"),
    "B": Reading("quarter", "fifths"),
    "C": Reading("centred", "fifths"),
}
"""A and C are even-handed: a rating halfway between two levels gives both about the same. B, the
paper word by word, is not: at r = 1 level 0 has 30.5 % and level 2 has 5.4 %, as the mean 1/4 lies
beside the edge 1/5."""


def log_mass(
    ratings: npt.ArrayLike,
    levels: npt.ArrayLike,
    concentration: npt.ArrayLike,
    reading: Reading,
    floor: float = LOG_TINY,
) -> FloatArray:
    """Log-probability of one level for each predicted rating.

    Exact to rounding in both tails: a small mass is the difference of two numbers of its own size.

    Args:
        ratings: Predicted ratings in rating units, of any shape; NaN gives NaN.
        levels: Whole numbers 0–4, of a shape that fits.
        concentration: α + β, above 0, of a shape that fits.
        reading: Scaling and edges.
        floor: The least log-probability, in nats.

    Returns:
        Nats, at most 0, in the shape that all fit into.

    Raises:
        ValueError: If a level is none of 0–4.
    """
    from scipy.special import betainc

    level = np.asarray(levels)
    if level.size and not (
        np.issubdtype(level.dtype, np.integer) and level.min() >= 0 and level.max() < LEVELS
    ):
        raise ValueError(f"levels have to be whole numbers 0 to {LEVELS - 1}")
    edges = np.array(BIN_EDGES[reading.edges])
    u = reading.unit(ratings)
    # 1 − X has parameters swapped, and the edges lie evenly: right of the mean, the mirrored level
    # has its mass in the lower tail, where the distribution function has all its digits.
    mirrored = edges[level] + edges[level + 1] > 2.0 * u
    place = np.where(mirrored, LEVELS - 1 - level, level)
    alpha = concentration * np.where(mirrored, 1.0 - u, u)
    beta = concentration * np.where(mirrored, u, 1.0 - u)
    mass = betainc(alpha, beta, edges[place + 1]) - betainc(alpha, beta, edges[place])
    return np.asarray(np.maximum(np.log(np.maximum(mass, sys.float_info.min)), floor))


def log_masses(
    ratings: npt.ArrayLike,
    concentration: float,
    reading: Reading,
    floor: float = LOG_TINY,
) -> FloatArray:
    """Log-probabilities of all five levels: ``(…, 5)``; arguments as of ``log_mass``."""
    values = np.asarray(ratings, dtype=np.float64)[..., None]
    return log_mass(values, np.arange(LEVELS), concentration, reading, floor)


def mean_nll(
    ratings: npt.ArrayLike, levels: npt.ArrayLike, concentration: float, reading: Reading
) -> float:
    """Mean negative log-likelihood of whole ratings.

    Args:
        ratings: ``(N,)`` predicted ratings, N ≥ 1.
        levels: ``(N,)`` whole numbers 0–4: the ratings given.
        concentration: α + β.
        reading: Scaling and edges.

    Returns:
        Nats a rating; log 5 = 1.609 is what someone without an idea gets.
    """
    return float(-log_mass(ratings, levels, concentration, reading).mean())


def fit_concentration(
    ratings: npt.ArrayLike,
    levels: npt.ArrayLike,
    reading: Reading,
    bounds: tuple[float, float] = CONCENTRATIONS,
) -> float:
    """The concentration under which whole ratings are most likely.

    Args:
        ratings: ``(N,)`` predicted ratings, N ≥ 1.
        levels: ``(N,)`` whole numbers 0–4: the ratings given.
        reading: Scaling and edges.
        bounds: Least and greatest concentration; a value near one of them means that the data ask
            for one beyond.

    Returns:
        α + β.
    """
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_c: mean_nll(ratings, levels, math.exp(log_c), reading),
        bounds=(math.log(bounds[0]), math.log(bounds[1])),
        method="bounded",
        options={"xatol": 1e-5},
    )
    return math.exp(found.x)


def minimum_on_grid(values: npt.ArrayLike, grid: npt.ArrayLike) -> float:
    """Where a curve is lowest, between the points that it is known at: the vertex of a parabola.

    Resamples of a likelihood differ in the weights of their rows alone, so rows computed once on a
    grid give the fit of each resample without computing any row again.

    Args:
        values: ``(K,)`` heights, K ≥ 3.
        grid: ``(K,)`` places above 0, a constant factor apart.

    Returns:
        The place; an end of the grid if the curve is lowest there.
    """
    y, x = np.asarray(values, dtype=np.float64), np.log(np.asarray(grid, dtype=np.float64))
    i = int(y.argmin())
    if i in (0, y.size - 1):
        return math.exp(x[i])
    bend = y[i - 1] - 2.0 * y[i] + y[i + 1]
    shift = 0.0 if bend == 0.0 else (y[i - 1] - y[i + 1]) / (2.0 * bend)
    return math.exp(x[i] + shift * (x[1] - x[0]))
