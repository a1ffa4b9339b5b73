"""How far raters agree, and one label from several ratings, as HelpSteer2 was annotated.

A *sample* is one response; its ratings of one attribute are whole numbers, one a rater. This module
imports NumPy alone.

Source: arXiv 2406.08673, section 2.1 and table 1; dataset card of nvidia/HelpSteer2.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from helpsteer2.functional.statistics import FloatArray

FIRST_RATERS = 3
"""Raters that every sample gets."""

ADDED_RATERS = 2
"""Raters added where the first ones spread by more than ``LARGEST_SPREAD`` on helpfulness."""

RATERS_KEPT = 3
"""Raters whose mean is the label: those that agree most."""

LARGEST_SPREAD = 2
"""Largest max − min of raters who count as agreeing."""

SUBSTANTIAL = 2
"""Smallest |difference of two ratings| that counts as a substantial preference. This is our
reading: the threshold of arXiv 2410.14632 could not be checked."""

KAPPA_TERMS = 6
"""Number of sums over pairs of ratings (a, b) that κ needs: 1, a, b, a², b², ab."""

Divergence = Literal["tied", "one-sided", "diverging", "substantially diverging"]


def spread(ratings: Sequence[int]) -> int:
    """Largest minus smallest rating.

    Args:
        ratings: Ratings of one sample, at least one.

    Raises:
        ValueError: If there is none.
    """
    if not ratings:
        raise ValueError("no ratings, so no spread")
    return max(ratings) - min(ratings)


def most_agreeing(ratings: Sequence[int], keep: int = RATERS_KEPT) -> tuple[int, ...]:
    """Choose the raters that agree most.

    Of all subsets of ``keep`` raters: those of the smallest spread, of these the ones with the
    smallest sum of squared deviations from their mean, of these the first in lexicographic order.
    The paper does not say how equally close raters are told apart.

    Args:
        ratings: One rating a rater.
        keep: Number of raters to keep; all are kept if there are no more.

    Returns:
        Positions of the raters kept, rising.

    Raises:
        ValueError: If ``keep`` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    if len(ratings) <= keep:
        return tuple(range(len(ratings)))

    def disagreement(raters: tuple[int, ...]) -> tuple[int, int]:
        values = [ratings[rater] for rater in raters]
        # keep times the sum of squared deviations, exact in whole numbers.
        squares = keep * sum(value * value for value in values) - sum(values) ** 2
        return spread(values), squares

    # Subsets come in lexicographic order, and `min` returns the first of equal ones.
    return min(itertools.combinations(range(len(ratings)), keep), key=disagreement)


def rounded_mean(ratings: Sequence[int]) -> int:
    """Mean rounded to the nearest whole number, .5 away from zero.

    Away from zero treats two responses alike (−0.5 → −1 as 0.5 → 1) and is rounding up for
    ratings. The mean of three never ends in .5; that of two can.

    Args:
        ratings: At least one whole number.

    Raises:
        ValueError: If there is none.
    """
    if not ratings:
        raise ValueError("no ratings, so no mean")
    total, n = sum(ratings), len(ratings)
    magnitude = (2 * abs(total) + n) // (2 * n)
    return magnitude if total >= 0 else -magnitude


@dataclass(frozen=True, slots=True)
class Aggregate:
    """The labels of one response.

    Attributes:
        kept: Positions of the raters kept, rising.
        labels: One label an attribute.
        spread: Spread of the kept raters on the reference attribute.
    """

    kept: tuple[int, ...]
    labels: tuple[int, ...]
    spread: int

    @property
    def agrees(self) -> bool:
        """Whether the kept raters agree. A prompt stays in HelpSteer2 if all its responses do."""
        return self.spread <= LARGEST_SPREAD


def aggregate_ratings(ratings: Sequence[Sequence[int]], reference: int = 0) -> Aggregate:
    """Labels of one response: the rounded mean of the three raters that agree most.

    The three are those that agree most on the reference attribute, and they are the same for every
    attribute. The paper keeps "annotators" and measures their agreement on helpfulness; that both
    are meant together is our reading.

    Args:
        ratings: A × raters whole ratings, every row in the same order of raters.
        reference: Row by which raters are chosen; helpfulness is the first of HelpSteer2.

    Returns:
        Raters kept, labels, and the spread that decides whether the prompt stays.

    Raises:
        ValueError: If there is no rater, or an attribute lacks one.
    """
    if len({len(row) for row in ratings}) != 1:
        raise ValueError("every attribute needs a rating of every rater")
    kept = most_agreeing(ratings[reference])
    labels = tuple(rounded_mean([row[rater] for rater in kept]) for row in ratings)
    return Aggregate(kept, labels, spread([ratings[reference][rater] for rater in kept]))


def aggregate_preference(strengths: Sequence[int]) -> int | None:
    """One preference from several: the rounded mean of the three that are most similar.

    Args:
        strengths: Strengths −3 (the first response is much better) … 3, one a rater, at least one.

    Returns:
        The strength, 0 for no preference; None if the three spread by more than
        ``LARGEST_SPREAD``: such a pair is dropped.

    Raises:
        ValueError: If there is no strength.

    Source: arXiv 2410.01257; dataset card of nvidia/HelpSteer2.
    """
    kept = [strengths[rater] for rater in most_agreeing(strengths)]
    return rounded_mean(kept) if spread(kept) <= LARGEST_SPREAD else None


def divergence(first: Sequence[int], second: Sequence[int]) -> Divergence:
    """Whether raters of two responses prefer different ones.

    A rater prefers the response that he or she rated higher. Raters diverge if at least one prefers
    each response, substantially so if both by ``SUBSTANTIAL`` or more; one-sided is a preference
    that nobody opposes. The classes are arXiv 2410.14632's, their thresholds our reading.

    Args:
        first: Ratings of the first response, one a rater.
        second: Ratings of the second response, by the same raters in the same order.

    Raises:
        ValueError: If the numbers of raters differ or there is none.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    if not differences:
        raise ValueError("no ratings to compare")
    low, high = min(differences), max(differences)
    if low <= -SUBSTANTIAL and high >= SUBSTANTIAL:
        return "substantially diverging"
    if low < 0 < high:
        return "diverging"
    return "one-sided" if low or high else "tied"


def quadratic_kappa(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Cohen's κ with quadratic weights: 1 − observed / expected squared difference.

    What is expected is the mean over every rating of one side with every rating of the other. This
    is scikit-learn's ``cohen_kappa_score(a, b, weights="quadratic", labels=range(low, high + 1))``:
    without ``labels`` that function weighs places among the labels that occur, which is another
    figure if a label in between never does.

    Args:
        a: ``(N,)`` ratings.
        b: ``(N,)`` ratings of the same things by somebody else.

    Returns:
        At most 1; NaN without ratings, or if all on both sides are one and the same number.

    Raises:
        ValueError: If the shapes differ or are not 1-d.

    Source: Cohen, Weighted kappa, Psychological Bulletin 70 (1968).
    """
    first, second = (np.asarray(side, dtype=np.float64) for side in (a, b))
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"need 1-d arrays of one length, got {first.shape} and {second.shape}")
    sums = [first.size, first.sum(), second.sum(), first @ first, second @ second, first @ second]
    return float(kappa_of_terms(np.asarray(sums)))


def kappa_of_terms(terms: FloatArray) -> FloatArray:
    """Quadratic κ from sums over pairs of ratings, so that it can be summed up as data streams by.

    Args:
        terms: ``(..., KAPPA_TERMS)`` sums of 1, a, b, a², b², ab.

    Returns:
        ``(...,)`` κ; NaN where the expected squared difference is 0.
    """
    n, a, b, aa, bb, ab = np.moveaxis(terms, -1, 0)
    # Both are n² times a mean: exact for sums of whole ratings.
    observed = n * (aa + bb - 2.0 * ab)
    expected = n * (aa + bb) - 2.0 * a * b
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(expected > 0.0, 1.0 - observed / expected, np.nan))


def pair_terms(ratings: Sequence[int]) -> tuple[int, ...]:
    """Terms of κ over all pairs of raters of one sample, the earlier rater first.

    Args:
        ratings: One rating a rater.

    Returns:
        ``KAPPA_TERMS`` sums; the first is the number of pairs, 0 below two raters.
    """
    pairs = list(itertools.combinations(ratings, 2))
    return (
        len(pairs),
        sum(a for a, _ in pairs),
        sum(b for _, b in pairs),
        sum(a * a for a, _ in pairs),
        sum(b * b for _, b in pairs),
        sum(a * b for a, b in pairs),
    )


def both_orders(terms: FloatArray) -> FloatArray:
    """Terms of κ with every pair (a, b) counted as (b, a) too, which makes both margins equal.

    Args:
        terms: ``(..., KAPPA_TERMS)``.

    Returns:
        ``(..., KAPPA_TERMS)``.
    """
    n, a, b, aa, bb, ab = np.moveaxis(terms, -1, 0)
    return np.stack([2.0 * n, a + b, a + b, aa + bb, aa + bb, 2.0 * ab], axis=-1)
