"""What a data set holds: ratings, lengths, correlations, ties, preferences. One pass, memory flat.

The columns are those of table 2 of the HelpSteer2 paper. Every response counts once, also for the
lengths of its prompt.

Source: arXiv 2406.08673, table 2.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpsteer2.attributes import RATING_MAX
from helpsteer2.data.groups import Group
from helpsteer2.data.rater_agreement import RaterAgreement
from helpsteer2.functional.running import PairwiseMoments, UniformSample
from helpsteer2.functional.statistics import FloatArray

REFERENCE = "helpfulness"
"""The attribute that every column is correlated with, as in table 2 of the HelpSteer2 paper."""

LENGTHS = ("prompt turns", "prompt characters", "response characters")
"""Turns are all messages but a system one; characters are those of the messages' text."""

SAMPLE_SIZE = 50_000
"""Responses kept for histograms."""

_BATCH = 512


@dataclass(slots=True)
class Ties:
    """Pairs of responses to one prompt with equal ratings."""

    pairs: int = 0
    equal: int = 0

    def add(self, values: Sequence[float | None]) -> None:
        """Take in the known ratings of one group."""
        for a, b in itertools.combinations((v for v in values if v is not None), 2):
            self.pairs += 1
            self.equal += a == b

    def share(self) -> float:
        """Share of ties, NaN without pairs."""
        return self.equal / self.pairs if self.pairs else math.nan


class DataStatistics:
    """What ``data describe`` tells of some groups.

    Args:
        attribute_names: Names of the rating columns.
        resamples: Bootstrap draws behind the intervals of the raters' agreement.
        seed: Seed of the draws and of the sample.

    Attributes:
        groups: Number of groups.
        column_names: The attributes, then ``LENGTHS``.
    """

    def __init__(
        self, attribute_names: Sequence[str], *, resamples: int = 1000, seed: int = 0
    ) -> None:
        self.attribute_names = tuple(attribute_names)
        self.column_names = (*self.attribute_names, *LENGTHS)
        self.groups = 0
        self._sizes: Counter[int] = Counter()
        self._strengths: Counter[int] = Counter()
        self._ties = {name: Ties() for name in self.attribute_names}
        self._ratings = np.zeros((len(self.attribute_names), int(RATING_MAX) + 1), dtype=np.int64)
        self._moments = PairwiseMoments(len(self.column_names))
        self._sample = UniformSample(len(self.column_names), SAMPLE_SIZE, seed)
        self._raters = RaterAgreement(self.attribute_names, resamples=resamples, seed=seed)
        self._pending: list[tuple[float | None, ...]] = []

    def add(self, group: Group) -> None:
        """Take in one group."""
        n = len(group.responses)
        self.groups += 1
        self._sizes[n] += 1
        if group.preference_strength is not None:
            self._strengths[group.preference_strength] += 1
        ratings = group.attributes or ((None,) * len(self.attribute_names),) * n
        for i, name in enumerate(self.attribute_names):
            self._ties[name].add([row[i] for row in ratings])
        if group.annotations is not None:
            self._raters.add(group.annotations)
        turns = sum(message["role"] != "system" for message in group.prompt)
        characters = sum(len(message["content"]) for message in group.prompt)
        for response, row in zip(group.responses, ratings, strict=True):
            self._pending.append((*row, turns, characters, len(response)))
        if len(self._pending) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        """Work off the responses that wait to be counted together."""
        if not self._pending:
            return
        rows = np.array(self._pending, dtype=np.float64)  # None becomes NaN.
        self._pending.clear()
        self._moments.add(rows)
        self._sample.add(rows)
        for counts, column in zip(self._ratings, rows.T, strict=False):
            known = column[~np.isnan(column)]
            counts += np.bincount(np.floor(known + 0.5).astype(np.int64), minlength=len(counts))

    def columns(self) -> dict[str, FloatArray]:
        """The known values of each column, of all responses or of a sample of ``SAMPLE_SIZE``."""
        self._flush()
        values = zip(self.column_names, self._sample.rows().T, strict=True)
        return {name: column[~np.isnan(column)] for name, column in values}

    def result(self) -> dict[str, Any]:
        """Every figure, as nested plain data; NaN where one cannot be computed.

        Returns:
            ``groups``; ``responses`` with their number a group; ``columns`` with the known values,
            mean, std (n − 1) and Pearson correlation with helpfulness of each, for attributes also
            the share of tied pairs and the counts of ratings by the nearest whole number;
            ``correlations`` of every two columns; ``preferences`` and ``raters``, None without any.
        """
        self._flush()
        counts, means, stds = self._moments.counts(), self._moments.means(), self._moments.stds()
        correlations = self._moments.correlations()
        reference = (
            correlations[self.column_names.index(REFERENCE)]
            if REFERENCE in self.attribute_names
            else np.full(len(self.column_names), np.nan)
        )
        columns: dict[str, dict[str, Any]] = {
            name: {
                "known": int(counts[i]),
                "mean": float(means[i]),
                "std": float(stds[i]),
                f"pearson_with_{REFERENCE}": float(reference[i]),
            }
            for i, name in enumerate(self.column_names)
        }
        for name, of_rating in zip(self.attribute_names, self._ratings, strict=True):
            columns[name]["ties"] = self._ties[name].share()
            columns[name]["counts"] = of_rating.tolist()
        return {
            "groups": self.groups,
            "responses": {
                "number": sum(n * times for n, times in self._sizes.items()),
                "fewest": min(self._sizes, default=0),
                "most": max(self._sizes, default=0),
            },
            "columns": columns,
            "correlations": {"columns": self.column_names, "matrix": correlations},
            "preferences": self._preferences(),
            "raters": self._raters.result(),
        }

    def _preferences(self) -> dict[str, Any] | None:
        """Groups with a preference, by its strength; None if there is no such group."""
        known = self._strengths.total()
        if not known:
            return None
        strengths = {strength: self._strengths[strength] for strength in range(-3, 4)}
        return {"known": known, "strengths": strengths, "ties": self._strengths[0] / known}
