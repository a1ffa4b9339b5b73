"""What a reward model has to beat: predictors that read nothing, or the length alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from helpsteer2.data.groups import GroupSource, read_all
from helpsteer2.functional.statistics import FloatArray, IntArray


@dataclass(frozen=True)
class RatedSplit:
    """The numbers of a split, without its texts.

    Attributes:
        ratings: ``(R, A)`` ratings 0–4 of all responses, NaN where unknown.
        characters: ``(R,)`` length of each response.
        prompts: ``(R,)`` number of the group of each response.
        sizes: ``(G,)`` responses of each group.
    """

    ratings: FloatArray
    characters: FloatArray
    prompts: IntArray
    sizes: IntArray


def read_rated(data: GroupSource, split: str) -> RatedSplit:
    """Read the ratings and lengths of a split.

    Args:
        data: Where to read.
        split: Which split.

    Returns:
        Its numbers.

    Raises:
        DataError: If a row is bad.
    """
    width = len(data.attribute_names)
    unrated = (None,) * width
    ratings: list[tuple[float | None, ...]] = []
    characters: list[int] = []
    sizes: list[int] = []
    for group in read_all(data, split):
        ratings.extend(group.attributes or [unrated] * len(group.responses))
        characters.extend(len(response) for response in group.responses)
        sizes.append(len(group.responses))
    return RatedSplit(
        ratings=np.array(ratings, dtype=np.float64).reshape(-1, width),
        characters=np.array(characters, dtype=np.float64),
        prompts=np.repeat(np.arange(len(sizes)), sizes),
        sizes=np.array(sizes, dtype=np.int64),
    )


def mean_predictor(train: RatedSplit, test: RatedSplit) -> FloatArray:
    """Predict the mean training rating of each attribute, whatever the text.

    Args:
        train: Where the means are taken.
        test: What is predicted.

    Returns:
        ``(R, A)`` predictions; NaN for an attribute without a training rating.
    """
    return _least_squares(np.ones((len(train.ratings), 1)), train, np.ones((len(test.ratings), 1)))


def length_predictor(train: RatedSplit, test: RatedSplit) -> FloatArray:
    """Predict each attribute from the length of the response alone.

    Least squares on the number of characters and its logarithm: enough to bend, too little to
    overfit.

    Args:
        train: Where it is fitted, each attribute on the responses that have its rating.
        test: What is predicted.

    Returns:
        ``(R, A)`` predictions; NaN for an attribute without a training rating.
    """
    return _least_squares(_length_features(train), train, _length_features(test))


def _length_features(split: RatedSplit) -> FloatArray:
    """Constant, logarithm and thousands of characters: ``(R, 3)``."""
    length = split.characters
    return np.stack([np.ones_like(length), np.log1p(length), length / 1000.0], axis=1)


def _least_squares(features: FloatArray, train: RatedSplit, targets: FloatArray) -> FloatArray:
    """Fit each attribute on its known ratings and predict it from ``targets``."""
    predicted = np.full((len(targets), train.ratings.shape[1]), np.nan)
    for column, rating in enumerate(train.ratings.T):
        known = ~np.isnan(rating)
        if known.any():
            weights = np.linalg.lstsq(features[known], rating[known], rcond=None)[0]
            # Row by row, so that equal lengths give bit-equal predictions: ties must stay ties.
            predicted[:, column] = (targets * weights).sum(axis=1)
    return predicted
