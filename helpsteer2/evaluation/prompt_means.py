"""Means over prompts, figures made of them, and how sure we are of those."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from helpsteer2.functional.statistics import (
    FloatArray,
    Interval,
    cluster_bootstrap,
    percentile_interval,
)


class PromptMeans:
    """Means over prompts of several columns, with figures made of them and their intervals.

    Args:
        columns: ``(P,)`` values by name.
        prompts: ``(P,)`` the same for equal prompts, which are drawn together.
        resamples: Bootstrap draws; all figures see the same ones, so that they are paired.
        seed: Seed of the draws.
    """

    def __init__(
        self, columns: Mapping[str, FloatArray], prompts: npt.ArrayLike, resamples: int, seed: int
    ) -> None:
        values = np.stack(list(columns.values()), axis=1)
        draws = cluster_bootstrap(
            lambda rows: values[rows].mean(0), prompts, resamples=resamples, seed=seed
        )
        self._means = dict(zip(columns, values.mean(0), strict=True))
        self._draws = dict(zip(columns, draws.T, strict=True))

    def of(self, column: str) -> Interval:
        """The mean of a column with its 95 % interval."""
        return self.figure(lambda means: means[column])

    def figure(self, compute: Callable[[Mapping[str, Any]], Any]) -> Interval:
        """A figure made of means, with its 95 % interval.

        Args:
            compute: From means by name, numbers or arrays over draws alike.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return percentile_interval(float(compute(self._means)), compute(self._draws))

    def share_of_gap(self, column: str, start: str, best: str) -> Interval:
        """How much of the way from one mean to a better one a third has gone: 1 is all of it."""
        return self.figure(
            lambda means: (means[column] - means[start]) / (means[best] - means[start])
        )
