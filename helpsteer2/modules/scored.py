"""What a validation leaves for reports: the scores of a split beside its labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ScoredSplit:
    """Scores and labels of a validation split, in the order of the data.

    Attributes:
        names: Names of the A columns.
        groups: ``(N,)`` int64, position of each row's group in its split. A group has a row for
            each response, or one for all of them together.
        scores: ``(N, A)`` float32 predictions.
        ratings: ``(N, A)`` float32 labels in the same unit, NaN where unknown.
        unit: That unit, for the axes of plots.
    """

    names: Sequence[str]
    groups: np.ndarray
    scores: np.ndarray
    ratings: np.ndarray
    unit: str
