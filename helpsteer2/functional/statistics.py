"""How far predictions are from ratings, how often they order pairs rightly, and how sure we are.

Every function is pure, takes ``float`` arrays in which NaN means *unknown*, and leaves unknown
entries out in pairs. A number that cannot be computed (no known entry, a constant) is NaN, never 0.
This module imports NumPy alone: evaluations run on the CPU in float64 and need no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def _known(*columns: npt.ArrayLike) -> tuple[FloatArray, ...]:
    """The columns as float64 at the positions where none of them is NaN."""
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1:
        raise ValueError(f"need 1-d arrays of one length, got {[array.shape for array in arrays]}")
    known = ~np.isnan(np.stack(arrays)).any(axis=0)
    return tuple(array[known] for array in arrays)


def mse(predicted: npt.ArrayLike, rating: npt.ArrayLike) -> float:
    """Mean squared error.

    Args:
        predicted: ``(N,)`` predictions, NaN where unknown.
        rating: ``(N,)`` ratings, NaN where unknown.

    Returns:
        Mean over the known entries, in squared rating units; NaN if there is none.
    """
    p, r = _known(predicted, rating)
    return float(np.mean((p - r) ** 2)) if p.size else float("nan")


def mae(predicted: npt.ArrayLike, rating: npt.ArrayLike) -> float:
    """Mean absolute error; arguments and result as in ``mse``, in rating units."""
    p, r = _known(predicted, rating)
    return float(np.mean(np.abs(p - r))) if p.size else float("nan")


def r2(predicted: npt.ArrayLike, rating: npt.ArrayLike) -> float:
    """Share of the ratings' variance that is explained, ``1 − SSE / SST``.

    Args:
        predicted: ``(N,)`` predictions, NaN where unknown.
        rating: ``(N,)`` ratings, NaN where unknown.

    Returns:
        At most 1; below 0 if the mean of these ratings would have done better; NaN if the known
        ratings are all equal.
    """
    p, r = _known(predicted, rating)
    if r.size == 0 or np.ptp(r) == 0.0:
        return float("nan")
    return float(1.0 - np.sum((p - r) ** 2) / np.sum((r - r.mean()) ** 2))


def pearson(predicted: npt.ArrayLike, rating: npt.ArrayLike) -> float:
    """Linear correlation in [−1, 1]; NaN if either side is constant or nothing is known."""
    p, r = _known(predicted, rating)
    # A constant column minus its mean can leave rounding noise that correlates with anything.
    if p.size == 0 or np.ptp(p) == 0.0 or np.ptp(r) == 0.0:
        return float("nan")
    p, r = p - p.mean(), r - r.mean()
    scale = float(np.linalg.norm(p) * np.linalg.norm(r))
    return float(np.clip(np.dot(p, r) / scale, -1.0, 1.0)) if scale > 0.0 else float("nan")


def average_ranks(values: npt.ArrayLike) -> FloatArray:
    """Ranks from 1 in which equal values share the mean of their places.

    Args:
        values: ``(N,)`` without NaN.

    Returns:
        ``(N,)`` ranks.
    """
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2.0)[place], dtype=np.float64)


def spearman(predicted: npt.ArrayLike, rating: npt.ArrayLike) -> float:
    """Rank correlation in [−1, 1] with average ranks for ties; NaN as in ``pearson``."""
    p, r = _known(predicted, rating)
    return pearson(average_ranks(p), average_ranks(r)) if p.size else float("nan")


@dataclass(frozen=True, slots=True)
class PairCounts:
    """How a predictor ordered pairs of responses to one prompt.

    Attributes:
        right: Pairs whose predicted order is the rated one.
        wrong: Pairs whose predicted order is the opposite.
        predicted_ties: Pairs rated unequal and predicted equal. Never a win.
        rating_ties: Pairs rated equal; left out of every accuracy.
        unknown: Pairs with an unknown rating or prediction; left out of every accuracy.
    """

    right: int
    wrong: int
    predicted_ties: int
    rating_ties: int
    unknown: int

    @property
    def decided(self) -> int:
        """Pairs that the ratings decide: the denominator of both accuracies."""
        return self.right + self.wrong + self.predicted_ties

    @property
    def accuracy(self) -> float:
        """Strict accuracy: a predicted tie counts as a miss. NaN if no pair is decided."""
        return self.right / self.decided if self.decided else float("nan")

    @property
    def half_credit_accuracy(self) -> float:
        """Accuracy in which a predicted tie counts one half. NaN if no pair is decided."""
        won = self.right + 0.5 * self.predicted_ties
        return won / self.decided if self.decided else float("nan")


def pairs_within(groups: npt.ArrayLike) -> IntArray:
    """All pairs of rows that belong to one group.

    Args:
        groups: ``(N,)`` group of each row.

    Returns:
        ``(P, 2)`` row numbers; the first row of a pair comes first in the input.
    """
    groups = np.asarray(groups)
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    found = [np.empty((0, 2), dtype=np.int64)]
    for step in range(1, len(order)):
        same = np.flatnonzero(ordered[step:] == ordered[:-step])
        if same.size == 0:
            break
        found.append(np.stack([order[same], order[same + step]], axis=1))
    return np.concatenate(found)


def pair_wins(predicted: npt.ArrayLike, rating: npt.ArrayLike, pairs: IntArray) -> FloatArray:
    """Whether each pair is ordered as it is rated.

    Args:
        predicted: ``(N,)`` predictions, NaN where unknown.
        rating: ``(N,)`` ratings, NaN where unknown.
        pairs: ``(P, 2)`` row numbers.

    Returns:
        ``(P,)``: 1 right, 0 wrong, 0.5 predicted tie, NaN where the ratings do not decide.
    """
    predicted, rating = (np.asarray(x, dtype=np.float64) for x in (predicted, rating))
    rated = np.sign(rating[pairs[:, 0]] - rating[pairs[:, 1]])
    guess = np.sign(predicted[pairs[:, 0]] - predicted[pairs[:, 1]])
    return np.where(rated == 0.0, np.nan, (rated * guess + 1.0) / 2.0)


def strict_wins(predicted: npt.ArrayLike, rating: npt.ArrayLike, pairs: IntArray) -> FloatArray:
    """As ``pair_wins`` with 0 for a predicted tie: its mean is the strict accuracy."""
    wins = pair_wins(predicted, rating, pairs)
    return np.where(wins == 0.5, 0.0, wins)


def count_pairs(predicted: npt.ArrayLike, rating: npt.ArrayLike, pairs: IntArray) -> PairCounts:
    """Count how pairs are ordered; arguments as in ``pair_wins``."""
    wins = pair_wins(predicted, rating, pairs)
    rating = np.asarray(rating, dtype=np.float64)
    rating_ties = rating[pairs[:, 0]] == rating[pairs[:, 1]]
    return PairCounts(
        right=int(np.sum(wins == 1.0)),
        wrong=int(np.sum(wins == 0.0)),
        predicted_ties=int(np.sum(wins == 0.5)),
        rating_ties=int(np.sum(rating_ties)),
        unknown=int(np.sum(np.isnan(wins) & ~rating_ties)),
    )


@dataclass(frozen=True, slots=True)
class Calibration:
    """Mean prediction against mean rating in bins of about equal count.

    Attributes:
        counts: ``(bins,)`` entries in each bin that holds any.
        mean_predicted: ``(bins,)`` mean prediction of each bin, rising.
        mean_rating: ``(bins,)`` mean rating of each bin.
    """

    counts: IntArray
    mean_predicted: FloatArray
    mean_rating: FloatArray

    @property
    def error(self) -> float:
        """Expected calibration error: the mean |prediction − rating| of the bins, by count."""
        if self.counts.size == 0:
            return float("nan")
        gaps = np.abs(self.mean_predicted - self.mean_rating)
        return float(np.average(gaps, weights=self.counts))


def calibration(predicted: npt.ArrayLike, rating: npt.ArrayLike, bins: int = 10) -> Calibration:
    """Bin by prediction and compare the mean prediction with the mean rating.

    Args:
        predicted: ``(N,)`` predictions, NaN where unknown.
        rating: ``(N,)`` ratings, NaN where unknown.
        bins: Most bins; edges are quantiles of the predictions, and equal predictions share a bin,
            so there may be fewer.

    Returns:
        The bins that hold an entry.
    """
    p, r = _known(predicted, rating)
    if p.size == 0:
        empty = np.empty(0)
        return Calibration(np.empty(0, dtype=np.int64), empty, empty)
    inner_edges = np.quantile(p, np.arange(1, bins) / bins)
    _, place = np.unique(np.searchsorted(inner_edges, p, side="left"), return_inverse=True)
    counts = np.bincount(place)
    return Calibration(
        counts=counts.astype(np.int64),
        mean_predicted=np.bincount(place, weights=p) / counts,
        mean_rating=np.bincount(place, weights=r) / counts,
    )


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the interval it lies in.

    Attributes:
        value: The figure on all rows.
        low: Lower end; NaN if unknown.
        high: Upper end; NaN if unknown.
    """

    value: float
    low: float
    high: float


def cluster_bootstrap(
    statistic: Callable[[IntArray], npt.ArrayLike],
    clusters: npt.ArrayLike,
    *,
    resamples: int,
    seed: int,
    strata: npt.ArrayLike | None = None,
) -> FloatArray:
    """Recompute figures on rows drawn anew, whole clusters at a time.

    Responses to one prompt are not independent, so prompts are resampled and take all their rows
    along. Figures computed together see the same draws: differences between them are paired.

    Args:
        statistic: Takes ``(M,)`` row numbers (with repetitions), returns ``(K,)`` figures.
        clusters: ``(N,)`` cluster (prompt) of each row.
        resamples: Number of draws, at least 1.
        seed: Seed of the draws.
        strata: ``(N,)`` stratum of each row, one for all rows of a cluster; clusters are drawn
            within their stratum. None draws from all clusters.

    Returns:
        ``(resamples, K)`` figures.

    Raises:
        ValueError: If there are no rows, or a cluster lies in two strata.
    """
    names, of_cluster = np.unique(np.asarray(clusters), return_inverse=True)
    if names.size == 0:
        raise ValueError("nothing to resample: there are no rows")
    order = np.argsort(of_cluster, kind="stable")
    sizes = np.bincount(of_cluster)
    starts = np.cumsum(sizes) - sizes
    pools = _pools(of_cluster, order[starts], strata)
    rng = np.random.default_rng(seed)
    figures = []
    for _ in range(resamples):
        drawn = np.concatenate([pool[rng.integers(pool.size, size=pool.size)] for pool in pools])
        taken = sizes[drawn]
        within = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
        figures.append(statistic(order[np.repeat(starts[drawn], taken) + within]))
    return np.asarray(figures, dtype=np.float64).reshape(resamples, -1)


def _pools(
    of_cluster: IntArray, first_rows: IntArray, strata: npt.ArrayLike | None
) -> list[npt.NDArray[Any]]:
    """Cluster numbers of each stratum."""
    if strata is None:
        return [np.arange(first_rows.size)]
    _, of_row = np.unique(np.asarray(strata), return_inverse=True)
    of_stratum = of_row[first_rows]
    if not np.array_equal(of_stratum[of_cluster], of_row):
        raise ValueError("a cluster lies in two strata")
    return [np.flatnonzero(of_stratum == stratum) for stratum in range(of_stratum.max() + 1)]


def percentile_interval(value: float, resampled: npt.ArrayLike, level: float = 0.95) -> Interval:
    """Percentile bootstrap interval of one figure.

    Args:
        value: The figure on all rows.
        resampled: ``(resamples,)`` figures of the draws; NaN draws are left out.
        level: Share of the draws that lies inside.

    Returns:
        The interval; its ends are NaN if more than half of the draws are.
    """
    draws = np.asarray(resampled, dtype=np.float64)
    if np.isnan(value) or np.isnan(draws).sum() * 2 > draws.size:
        return Interval(float(value), float("nan"), float("nan"))
    low, high = np.nanquantile(draws, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(value), float(low), float(high))


def mean_interval(
    values: npt.ArrayLike,
    clusters: npt.ArrayLike,
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """Mean of the known values, with a cluster bootstrap interval.

    Pass the difference of two columns to get the interval of a paired mean difference.

    Args:
        values: ``(N,)``, NaN where unknown.
        clusters: ``(N,)`` cluster (prompt) of each row.
        resamples: Number of draws.
        seed: Seed of the draws.
        level: Share of the draws that lies inside.

    Returns:
        The mean and its interval; all NaN if nothing is known.
    """
    values = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(values)
    if not known.any():
        return Interval(float("nan"), float("nan"), float("nan"))
    kept = values[known]
    draws = cluster_bootstrap(
        lambda rows: kept[rows].mean(),
        np.asarray(clusters)[known],
        resamples=resamples,
        seed=seed,
    )
    return percentile_interval(float(kept.mean()), draws[:, 0], level)
