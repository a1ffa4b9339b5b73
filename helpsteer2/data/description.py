"""Running statistics of groups: ratings, lengths, ties. One pass, memory flat."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from helpsteer2.data.groups import Group

REFERENCE = "helpfulness"
"""The attribute that every column is correlated with, as in table 2 of the HelpSteer2 paper."""


@dataclass(slots=True)
class Moments:
    """Sums of a quantity x, and of its pairs with a reference y where both are known."""

    n: int = 0
    sum_x: float = 0.0
    sum_xx: float = 0.0
    pairs: int = 0
    pair_sums: list[float] = field(default_factory=lambda: [0.0] * 5)

    def add(self, x: float | None, y: float | None = None) -> None:
        """Take one value in; unknown ones are left out."""
        if x is None:
            return
        self.n += 1
        self.sum_x += x
        self.sum_xx += x * x
        if y is not None:
            self.pairs += 1
            for i, term in enumerate((x, y, x * x, y * y, x * y)):
                self.pair_sums[i] += term

    def mean(self) -> float:
        """Mean, NaN without values."""
        return self.sum_x / self.n if self.n else math.nan

    def std(self) -> float:
        """Sample standard deviation (n − 1), NaN below two values."""
        if self.n < 2:
            return math.nan
        return math.sqrt(max(0.0, (self.sum_xx - self.sum_x**2 / self.n) / (self.n - 1)))

    def pearson(self) -> float:
        """Correlation of x and y where both are known, NaN if one of them is constant."""
        if self.pairs < 2:
            return math.nan
        x, y, xx, yy, xy = (total / self.pairs for total in self.pair_sums)
        variances = (xx - x * x) * (yy - y * y)
        return (xy - x * y) / math.sqrt(variances) if variances > 1e-18 else math.nan


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
    """What ``data describe`` tells of a split.

    Args:
        attribute_names: Names of the rating columns.

    Attributes:
        groups: Number of groups.
        responses: Responses a group.
        attributes: Ratings of each attribute, against helpfulness.
        ties: Ties of each attribute, and of ``preference`` (strength 0).
        lengths: Turns and characters of the prompt and characters of the response, each counted
            once a response, against helpfulness.
    """

    def __init__(self, attribute_names: Sequence[str]) -> None:
        self.attribute_names = tuple(attribute_names)
        self.groups = 0
        self.responses = Moments()
        self.fewest, self.most = 0, 0
        self.attributes = {name: Moments() for name in attribute_names}
        self.ties = {name: Ties() for name in attribute_names}
        self.preference = Ties()
        self.lengths = {
            name: Moments() for name in ("prompt turns", "prompt characters", "response characters")
        }

    def add(self, group: Group) -> None:
        """Take in one group."""
        n = len(group.responses)
        self.groups += 1
        self.responses.add(n)
        self.fewest = min(self.fewest or n, n)
        self.most = max(self.most, n)
        if group.preference_strength is not None:
            self.preference.pairs += 1
            self.preference.equal += group.preference_strength == 0
        ratings = group.attributes or ((None,) * len(self.attribute_names),) * n
        for i, name in enumerate(self.attribute_names):
            self.ties[name].add([row[i] for row in ratings])
        characters = sum(len(message["content"]) for message in group.prompt)
        at = self.attribute_names.index(REFERENCE) if REFERENCE in self.attribute_names else None
        for response, row in zip(group.responses, ratings, strict=True):
            reference = None if at is None else row[at]
            for name, value in zip(self.attribute_names, row, strict=True):
                self.attributes[name].add(value, reference)
            lengths = (len(group.prompt), characters, len(response))
            for moments, length in zip(self.lengths.values(), lengths, strict=True):
                moments.add(length, reference)
