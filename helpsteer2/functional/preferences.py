"""How differences of two scores agree with preferences. Pure functions on NumPy arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from helpsteer2.functional.statistics import FloatArray, PairCounts

STRENGTHS = (1, 2, 3)
"""Slightly better, better, much better (arXiv 2410.01257)."""


def preference_wins(difference: npt.ArrayLike, strength: npt.ArrayLike) -> FloatArray:
    """Whether the preferred response has the higher score.

    Args:
        difference: ``(P,)`` score of the second response minus that of the first.
        strength: ``(P,)`` −3 (the first is much better) … 3 (the second is); 0 is no preference,
            NaN is unknown.

    Returns:
        ``(P,)``: 1 right, 0 wrong, 0.5 for equal scores, NaN where neither response is preferred.
    """
    difference, strength = (np.asarray(x, dtype=np.float64) for x in (difference, strength))
    agreement = np.sign(difference) * np.sign(strength)
    return np.where(strength == 0.0, np.nan, (agreement + 1.0) / 2.0)


def count_preferences(difference: npt.ArrayLike, strength: npt.ArrayLike) -> PairCounts:
    """Count how pairs are ordered; arguments as in ``preference_wins``.

    Returns:
        The counts; ``rating_ties`` are the pairs of strength 0, equal scores ``predicted_ties``.
    """
    wins = preference_wins(difference, strength)
    undecided = np.asarray(strength) == 0.0
    return PairCounts(
        right=int(np.sum(wins == 1.0)),
        wrong=int(np.sum(wins == 0.0)),
        predicted_ties=int(np.sum(wins == 0.5)),
        rating_ties=int(np.sum(undecided)),
        unknown=int(np.sum(np.isnan(wins) & ~undecided)),
    )
