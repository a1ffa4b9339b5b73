"""How far the annotators of a data set agree: κ under several poolings, diverging preferences.

The HelpSteer2 paper gives quadratic κ (table 1) and not how pairs of raters are pooled, so all
sensible poolings are computed. One pass; intervals are 95 % and resample prompts.

Source: arXiv 2406.08673, table 1 (κ) and section 2.1 (final filter); arXiv 2410.14632 (divergence).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from helpsteer2.functional.agreement import (
    KAPPA_TERMS,
    LARGEST_SPREAD,
    Divergence,
    both_orders,
    divergence,
    kappa_of_terms,
    most_agreeing,
    pair_terms,
    spread,
)
from helpsteer2.functional.running import BootstrapSums
from helpsteer2.functional.statistics import FloatArray, Interval, percentile_interval

POOLINGS = {
    "file_order": "every pair of raters of a response, the one that stands first in the file first",
    "both_orders": "every pair of raters of a response in both orders, so both margins are equal",
    "one_pair": "as both orders, but every response weighs the same however many raters it has: "
    "what one random pair a response gives on average",
}
"""Ways to pool pairs of raters into one κ."""

STAGES = {
    "all": "every annotated prompt",
    "final_filter": "prompts that the paper's last filter keeps: helpfulness of the three raters "
    f"who agree most spreads by at most {LARGEST_SPREAD} for every response",
}
"""Sets of prompts that are told of."""

DIVERGENCES: tuple[Divergence, ...] = (
    "tied",
    "one-sided",
    "diverging",
    "substantially diverging",
)

Annotations = Sequence[Sequence[Sequence[int]]]

_REFERENCE = "helpfulness"
_BATCH = 256
# Of each attribute: rated responses, their raters, and the terms of κ summed by pair and by
# response. Then annotated responses, their raters, pairs not comparable, and the four divergences.
_OF_ATTRIBUTE = 2 + 2 * KAPPA_TERMS
_OF_RESPONSES = 2
_OF_PAIRS = 1 + len(DIVERGENCES)


class RaterAgreement:
    """Agreement of raters, summed up prompt by prompt.

    Args:
        attribute_names: Names of the A attributes.
        resamples: Bootstrap draws.
        seed: Seed of the draws.
    """

    def __init__(self, attribute_names: Sequence[str], *, resamples: int, seed: int) -> None:
        self._names = tuple(attribute_names)
        self._reference = self._names.index(_REFERENCE) if _REFERENCE in self._names else None
        width = 1 + len(self._names) * _OF_ATTRIBUTE + _OF_RESPONSES + _OF_PAIRS
        self._sums = {stage: BootstrapSums(width, resamples, seed) for stage in STAGES}
        self._pending: dict[str, list[list[float]]] = {stage: [] for stage in STAGES}

    def add(self, annotations: Annotations) -> None:
        """Take in one prompt.

        Args:
            annotations: n × A × raters whole ratings; raters may be none, and may differ in number.
        """
        if not any(ratings for response in annotations for ratings in response):
            return
        terms = self._terms(annotations)
        stages = ["all", "final_filter"] if self._stays(annotations) else ["all"]
        for stage in stages:
            self._pending[stage].append(terms)
            if len(self._pending[stage]) == _BATCH:
                self._flush(stage)

    def _flush(self, stage: str) -> None:
        if self._pending[stage]:
            self._sums[stage].add(np.array(self._pending[stage], dtype=np.float64))
            self._pending[stage].clear()

    def _stays(self, annotations: Annotations) -> bool:
        """Whether the final filter keeps a prompt; one rater alone cannot tell."""
        if self._reference is None:
            return False
        of_responses = [response[self._reference] for response in annotations]
        return all(
            len(ratings) > 1
            and spread([ratings[i] for i in most_agreeing(ratings)]) <= LARGEST_SPREAD
            for ratings in of_responses
        )

    def _terms(self, annotations: Annotations) -> list[float]:
        """The sums that one prompt adds; the first is the prompt itself."""
        terms: list[float] = [1.0]
        for attribute in range(len(self._names)):
            rated = [response[attribute] for response in annotations if response[attribute]]
            by_pair = [pair_terms(ratings) for ratings in rated]
            by_response = [[term / of[0] for term in of] for of in by_pair if of[0]]
            terms += [len(rated), sum(map(len, rated))]
            terms += _column_sums(by_pair) + _column_sums(by_response)
        # Ratings of some raters may be missing: there were at least as many as rated any attribute.
        raters = [max(map(len, response)) for response in annotations]
        terms += [sum(number > 0 for number in raters), sum(raters)]
        return terms + self._divergences(annotations)

    def _divergences(self, annotations: Annotations) -> list[float]:
        """Pairs of responses that cannot be compared rater by rater, and those of each class."""
        if self._reference is None:
            return [0.0] * _OF_PAIRS
        of_responses = [response[self._reference] for response in annotations]
        counts = dict.fromkeys(DIVERGENCES, 0)
        not_comparable = 0
        for first, second in itertools.combinations(of_responses, 2):
            if len(first) != len(second) or len(first) < 2:
                not_comparable += 1
            else:
                counts[divergence(first, second)] += 1
        return [not_comparable, *counts.values()]

    def result(self) -> dict[str, Any] | None:
        """Figures of each of ``STAGES`` that has a prompt; None if nothing is annotated.

        Returns:
            For each stage ``prompts``, ``raters_a_response``, ``attributes`` with ``rated``
            responses, ``raters`` a response, ``pairs`` of raters and ``kappa`` by pooling, and
            ``preferences`` (None without an attribute helpfulness) with ``compared`` pairs of
            responses, those ``not_comparable``, and ``shares`` by class (None if no pair is
            compared). Figures with an interval are ``Interval``; NaN where one cannot be computed.
        """
        for stage in STAGES:
            self._flush(stage)
        found = {stage: sums for stage, sums in self._sums.items() if sums.total[0]}
        return {stage: self._stage(sums) for stage, sums in found.items()} or None

    def _stage(self, sums: BootstrapSums) -> dict[str, Any]:
        """Read the figures off the sums of a stage."""
        # Row 0 is the data, the others are the draws.
        table = np.concatenate([sums.total[None], sums.draws])
        widths = [1, *[_OF_ATTRIBUTE] * len(self._names), _OF_RESPONSES, _OF_PAIRS]
        prompts, *attributes, responses, pairs = np.split(table, np.cumsum(widths)[:-1], axis=1)
        return {
            "prompts": int(prompts[0, 0]),
            "raters_a_response": _interval(_ratio(responses[:, 1], responses[:, 0])),
            "attributes": {
                name: _attribute(columns)
                for name, columns in zip(self._names, attributes, strict=True)
            },
            "preferences": None if self._reference is None else _preferences(pairs),
        }


def _column_sums(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)] if rows else [0.0] * KAPPA_TERMS


def _attribute(columns: FloatArray) -> dict[str, Any]:
    """Figures of one attribute from its sums, ``(1 + resamples, _OF_ATTRIBUTE)``."""
    by_pair, by_response = columns[:, 2 : 2 + KAPPA_TERMS], columns[:, 2 + KAPPA_TERMS :]
    kappas = {
        "file_order": kappa_of_terms(by_pair),
        "both_orders": kappa_of_terms(both_orders(by_pair)),
        "one_pair": kappa_of_terms(both_orders(by_response)),
    }
    return {
        "rated": int(columns[0, 0]),
        "raters": _interval(_ratio(columns[:, 1], columns[:, 0])),
        "pairs": int(by_pair[0, 0]),
        "kappa": {pooling: _interval(values) for pooling, values in kappas.items()},
    }


def _preferences(columns: FloatArray) -> dict[str, Any]:
    """Shares of the classes of divergence from their sums, ``(1 + resamples, _OF_PAIRS)``."""
    not_comparable, classes = columns[:, 0], columns[:, 1:]
    compared = int(classes[0].sum())
    return {
        "compared": compared,
        "not_comparable": int(not_comparable[0]),
        "shares": _shares(classes) if compared else None,
    }


def _shares(classes: FloatArray) -> dict[str, Interval]:
    """Share of each class of divergence from their counts, ``(1 + resamples, classes)``."""
    compared = classes.sum(axis=1)
    shares: dict[str, Interval] = {
        name: _interval(_ratio(counts, compared))
        for name, counts in zip(DIVERGENCES, classes.T, strict=True)
    }
    # The published share of diverging pairs holds the substantial ones too.
    shares["diverging"] = _interval(_ratio(classes[:, 2] + classes[:, 3], compared))
    return shares


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    with np.errstate(invalid="ignore"):
        return np.asarray(numerator / denominator)


def _interval(values: FloatArray) -> Interval:
    """The figure in row 0 with the interval that the draws in the other rows give."""
    return percentile_interval(float(values[0]), values[1:])
