"""Sums kept while rows stream by: moments, bootstrap draws, a sample. Memory does not grow.

NaN means *unknown*. This module imports NumPy alone.
"""

from __future__ import annotations

import numpy as np

from helpsteer2.functional.statistics import FloatArray, IntArray

_ROUNDING = 1e-12
"""Share of the squares below which a variance is nothing but rounding."""


class PairwiseMoments:
    """Means, standard deviations and correlations of columns, each pair where both are known.

    Values are taken relative to the first known one of their column, so that a large mean costs
    no digits.

    Args:
        columns: Number C of columns.
    """

    def __init__(self, columns: int) -> None:
        self._shift = np.full(columns, np.nan)
        # Entry (i, j) sums over the rows where i and j are known; x is column i, y column j.
        self._n, self._x, self._xx, self._xy = (np.zeros((columns, columns)) for _ in range(4))

    def add(self, rows: FloatArray) -> None:
        """Take rows in.

        Args:
            rows: ``(N, C)``, NaN where unknown.
        """
        known = ~np.isnan(rows)
        unset = np.isnan(self._shift) & known.any(axis=0)
        first = np.take_along_axis(rows, known.argmax(axis=0)[None], axis=0)[0]
        self._shift[unset] = first[unset]
        values, mask = np.where(known, rows - self._shift, 0.0), known.astype(np.float64)
        self._n += mask.T @ mask
        self._x += values.T @ mask
        self._xx += (values**2).T @ mask
        self._xy += values.T @ values

    def counts(self) -> IntArray:
        """``(C,)`` number of known values."""
        return np.diag(self._n).astype(np.int64)

    def means(self) -> FloatArray:
        """``(C,)`` means, NaN without values."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self._shift + np.diag(self._x) / np.diag(self._n))

    def stds(self) -> FloatArray:
        """``(C,)`` sample standard deviations (n − 1), NaN below two values."""
        n, x, xx = (np.diag(sums) for sums in (self._n, self._x, self._xx))
        with np.errstate(divide="ignore", invalid="ignore"):
            variance = np.maximum(xx - x**2 / n, 0.0) / (n - 1.0)
            return np.where(n < 2, np.nan, np.sqrt(variance))

    def correlations(self) -> FloatArray:
        """``(C, C)`` Pearson correlations, NaN where a side is constant or nothing is known."""
        variance = self._n * self._xx - self._x**2
        variance[variance <= _ROUNDING * self._n * self._xx] = np.nan
        covariance = self._n * self._xy - self._x * self._x.T
        return np.clip(covariance / np.sqrt(variance * variance.T), -1.0, 1.0)


class BootstrapSums:
    """Sums of terms over clusters, and over bootstrap draws of the clusters, in one pass.

    A cluster enters every draw as often as a Poisson variable of mean 1 says. For many clusters
    that is drawing as many with replacement as there are, and none has to be kept.

    Args:
        terms: Number K of terms.
        resamples: Number of draws.
        seed: Seed of the draws.

    Source: Hanley and MacGibbon, Creating non-parametric bootstrap samples using Poisson
    frequencies, Computer Methods and Programs in Biomedicine 83 (2006).
    """

    def __init__(self, terms: int, resamples: int, seed: int) -> None:
        self.total: FloatArray = np.zeros(terms)
        self.draws: FloatArray = np.zeros((resamples, terms))
        self._rng = np.random.default_rng(seed)

    def add(self, terms: FloatArray) -> None:
        """Take clusters in.

        Args:
            terms: ``(N, K)``, a row a cluster.
        """
        self.total += terms.sum(axis=0)
        # Cluster by cluster, so that the draws do not depend on how clusters come in batches.
        times = self._rng.poisson(1.0, (len(terms), len(self.draws)))
        self.draws += times.T.astype(np.float64) @ terms


class UniformSample:
    """At most so many rows of a stream, every choice of them equally likely.

    Args:
        columns: Number C of columns.
        size: Most rows kept.
        seed: Seed of the choice.
    """

    def __init__(self, columns: int, size: int, seed: int) -> None:
        self._size = size
        self._rng = np.random.default_rng(seed)
        self._rows: FloatArray = np.empty((0, columns))
        self._keys: FloatArray = np.empty(0)

    def add(self, rows: FloatArray) -> None:
        """Take rows in.

        Args:
            rows: ``(N, C)``.
        """
        # The rows with the smallest of independent keys are a uniform sample.
        keys = self._rng.random(len(rows))
        if len(self._keys) == self._size:
            few = keys < self._keys.max()
            rows, keys = rows[few], keys[few]
        self._rows, self._keys = np.concatenate([self._rows, rows]), np.append(self._keys, keys)
        if len(self._keys) > self._size:
            chosen = np.argpartition(self._keys, self._size)[: self._size]
            self._rows, self._keys = self._rows[chosen], self._keys[chosen]

    def rows(self) -> FloatArray:
        """``(M, C)`` rows kept, in no particular order; all of them if there were no more."""
        return self._rows
