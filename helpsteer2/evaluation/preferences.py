"""Held-out preferences: how often the preferred response has the higher reward, by strength."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from rich.table import Table

from helpsteer2.data.groups import Group, GroupSource, read_all
from helpsteer2.errors import UserError
from helpsteer2.evaluation.comparisons import Aggregate, Comparison, compare
from helpsteer2.evaluation.meaning import OWN_REWARD
from helpsteer2.evaluation.report import (
    keep_whole,
    named_table,
    number,
    percent,
    percent_with_interval,
)
from helpsteer2.evaluation.scoring import EvaluationContext, ModelKind
from helpsteer2.functional.statistics import (
    FloatArray,
    IntArray,
    cluster_bootstrap,
    pearson,
    percentile_interval,
)
from helpsteer2.records import plain
from helpsteer2.rewards.rewarder import Scorer


@dataclass(frozen=True)
class DecidedPairs:
    """The preferences of a split that have a winner.

    Attributes:
        comparisons: The pairs, the preferred response first.
        strength: ``(N,)`` as it is told: below 0 the first response of the data is preferred.
        undecided: How many pairs have strength 0.
        unknown: How many groups have no preference.
    """

    comparisons: tuple[Comparison, ...]
    strength: IntArray
    undecided: int
    unknown: int

    @classmethod
    def read(cls, data: GroupSource, split: str) -> DecidedPairs:
        """Read a split.

        Raises:
            DataError: If a row is bad.
            UserError: If no pair is decided, or a preference is not between two.
        """
        decided: list[Group] = []
        counts = {0: 0, None: 0}
        for group in read_all(data, split):
            if group.preference_strength:
                decided.append(group)
            else:
                counts[group.preference_strength] += 1
        if not decided:
            raise UserError(
                f"no preference of the split {split!r} has a winner: {counts[0]} pairs have "
                f"strength 0, {counts[None]} groups have no preference_strength"
            )
        strength = np.array([group.preference_strength for group in decided], dtype=np.int64)
        return cls(tuple(map(_comparison, decided)), strength, counts[0], counts[None])


@dataclass(frozen=True)
class PreferenceEvaluation:
    """Compare rewards with held-out preferences between two responses.

    Strictly: equal rewards are a miss, with half credit beside it. Pairs of which neither response
    is preferred (strength 0) are left out and counted. Under every weighting, and for a baseline
    that prefers the longer response. Intervals are 95 % and resample prompts within strengths.

    Args:
        data: Groups with a ``preference_strength``.
        split: Split to evaluate on.
        resamples: Bootstrap draws.
    """

    data: GroupSource
    split: str = "validation"
    resamples: int = 1000

    takes: ClassVar[ModelKind] = "reward model"

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise UserError("resamples must be at least 1")

    @cached_property
    def _pairs(self) -> DecidedPairs:
        return DecidedPairs.read(self.data, self.split)

    def check(self) -> None:
        """Read all pairs, of which any model is then scored.

        Raises:
            UserError: If a row is bad, or no pair is decided.
        """
        _ = self._pairs

    def evaluate(self, scorer: Scorer, context: EvaluationContext) -> dict[str, Any]:
        """Score all pairs once and compute every figure under every weighting.

        Args:
            scorer: The model.
            context: Weightings, seed, and the folder that keeps the scores.

        Returns:
            ``weightings`` (each with ``accuracy``, ``half_credit_accuracy``, ``ties``,
            ``strength_pearson`` and ``subsets``, one a strength), ``outcomes`` of the own reward (a
            character a pair: ``1`` right, ``0`` wrong, ``=`` equal), and the counts.

        Raises:
            DataError: If a row of the data is bad.
            UserError: If no pair is decided, no weighting fits, or a score is not finite.
        """
        pairs = self._pairs
        subsets = [_subset(m) for m in np.unique(np.abs(pairs.strength))]
        name = f"preferences-{self.split}"
        compared = compare(name, pairs.comparisons, subsets, scorer, context, self.resamples)
        weightings = {}
        for weighting, wins in compared.wins.items():
            by_strength = compared.subset_figures(weighting)
            counts = {
                key: sum(figures[key] for figures in by_strength.values())
                for key in ("right", "wrong", "ties")
            }
            gain = wins.margins[:, 0, 0]
            weightings[weighting] = {
                **counts,
                "accuracy": wins.figure(_over_all(by_strength), subsets),
                "half_credit_accuracy": (counts["right"] + counts["ties"] / 2) / len(gain),
                "strength_pearson": pearson(gain * np.sign(pairs.strength), pairs.strength),
                "subsets": by_strength,
            }
        own = compared.wins.get(OWN_REWARD)
        result = {
            "split": self.split,
            "pairs": len(pairs.comparisons),
            "undecided": pairs.undecided,
            "without_preference": pairs.unknown,
            **compared.record,
            "outcomes": _outcomes(own.margins[:, 0, 0]) if own is not None else None,
            "weightings": weightings,
        }
        return dict(plain(result))

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Show a result of ``evaluate`` within 100 columns."""
        weightings = result["weightings"]
        subsets = next(iter(weightings.values()))["subsets"]
        table = named_table(
            f"preferences of {result['split']!r}, {result['pairs']:,} pairs: accuracy in %",
            [
                "weighting",
                "all",
                "ties ½",
                "ties",
                "r",
                *(f"{name} ({figures['prompts']:,})" for name, figures in subsets.items()),
            ],
            caption=(
                "equal rewards (ties) miss, and are half a win under 'ties ½'. r: of the rewards' "
                "difference with the strength. Second line: 95 % interval over prompts. Left out: "
                f"{result['undecided']:,} pairs without a winner, "
                f"{result['without_preference']:,} groups without a preference."
            ),
        )
        for name, figures in weightings.items():
            table.add_row(
                name,
                percent_with_interval(figures["accuracy"]),
                percent(figures["half_credit_accuracy"]),
                f"{figures['ties']:,}",
                number(figures["strength_pearson"], 2),
                *(percent_with_interval(of["accuracy"]) for of in figures["subsets"].values()),
            )
        for name in result["skipped_weightings"]:
            table.add_row(name, "skipped")
        keep_whole(table, list(weightings))
        return [table]

    def headlines(self, result: Mapping[str, Any]) -> dict[str, str]:
        """Accuracy over all pairs under every weighting."""
        return {
            f"{name}, all %": percent_with_interval(figures["accuracy"])
            for name, figures in result["weightings"].items()
        }

    def gains(self, results: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
        """Accuracy of each model's own reward minus that of the first model, pair by pair.

        Args:
            results: Of ``evaluate``, by model.
            seed: Seed of the bootstrap.

        Returns:
            ``value``, ``low`` and ``high`` of each model but the first; unknown where one of the
            two has no own reward.
        """
        pairs = self._pairs.comparisons
        wins = np.stack([_wins(of["outcomes"], len(pairs)) for of in results.values()], axis=1)
        differences = wins[:, 1:] - wins[:, :1]
        draws = cluster_bootstrap(
            lambda rows: differences[rows].mean(0),
            [pair.prompt_key for pair in pairs],
            strata=[pair.subset for pair in pairs],
            resamples=self.resamples,
            seed=seed,
        )
        columns = zip(list(results)[1:], differences.mean(0), draws.T, strict=True)
        return {name: plain(percentile_interval(gain, of)) for name, gain, of in columns}


def _outcomes(margins: FloatArray) -> str:
    """A character a pair."""
    return "".join("0=1"[int(sign)] for sign in np.sign(margins) + 1)


def _wins(outcomes: str | None, n: int) -> FloatArray:
    """``(n,)`` 1 for a right pair and 0 for others; NaN if nothing is known of any."""
    if outcomes is None:
        return np.full(n, np.nan)
    return np.array([float(outcome == "1") for outcome in outcomes])


def _subset(strength: int) -> str:
    return f"strength {strength}"


def _comparison(group: Group) -> Comparison:
    """The preferred response first."""
    strength = group.preference_strength or 0
    if len(group.responses) != 2:
        raise UserError(
            f"{group.source}: a preference_strength and {len(group.responses)} responses: a "
            "preference is between two"
        )
    better, worse = group.responses if strength < 0 else group.responses[::-1]
    return Comparison(
        _subset(abs(strength)), Group(group.id, group.source, group.prompt, (better, worse))
    )


def _over_all(subsets: Mapping[str, Mapping[str, Any]]) -> Aggregate:
    """Mean over all pairs from the accuracies of the strengths."""
    pairs = {name: figures["prompts"] for name, figures in subsets.items()}
    return lambda accuracies: (
        sum(accuracies[name] * n for name, n in pairs.items()) / sum(pairs.values())
    )
