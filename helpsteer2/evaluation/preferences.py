"""Held-out preferences: how often the preferred response has the higher reward, by strength."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from rich.table import Table

from helpsteer2.data.groups import Group, GroupSource, read_all
from helpsteer2.errors import UserError
from helpsteer2.evaluation.comparisons import Aggregate, Comparison, compare
from helpsteer2.evaluation.report import (
    keep_whole,
    named_table,
    number,
    percent,
    percent_with_interval,
)
from helpsteer2.evaluation.scoring import EvaluationContext, ModelKind, Scorer
from helpsteer2.functional.statistics import pearson
from helpsteer2.records import plain


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

    def evaluate(self, scorer: Scorer, context: EvaluationContext) -> dict[str, Any]:
        """Score all pairs once and compute every figure under every weighting.

        Args:
            scorer: The model.
            context: Weightings, seed, and the folder that keeps the scores.

        Returns:
            ``weightings`` (each with ``accuracy``, ``half_credit_accuracy``, ``ties``,
            ``strength_pearson`` and ``subsets``, one a strength), and the counts.

        Raises:
            DataError: If a row of the data is bad.
            UserError: If no pair is decided, no weighting fits, or a score is not finite.
        """
        groups = list(read_all(self.data, self.split))
        decided = [group for group in groups if group.preference_strength]
        unknown = sum(group.preference_strength is None for group in groups)
        undecided = len(groups) - len(decided) - unknown
        if not decided:
            raise UserError(
                f"no preference of the split {self.split!r} has a winner: {undecided} pairs have "
                f"strength 0, {unknown} groups have no preference_strength"
            )
        strength = np.array([abs(group.preference_strength or 0) for group in decided])
        subsets = [_subset(m) for m in np.unique(strength)]
        comparisons = [_comparison(group) for group in decided]
        name = f"preferences-{self.split}"
        compared = compare(name, comparisons, subsets, scorer, context, self.resamples)
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
                "half_credit_accuracy": (counts["right"] + counts["ties"] / 2) / len(decided),
                "strength_pearson": pearson(gain * _sign(decided), strength * _sign(decided)),
                "subsets": by_strength,
            }
        result = {
            "split": self.split,
            "pairs": len(decided),
            "undecided": undecided,
            "without_preference": unknown,
            **compared.record,
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


def _sign(groups: list[Group]) -> np.ndarray:
    """Which response is preferred: −1 the first, 1 the second."""
    return np.sign([group.preference_strength or 0 for group in groups])


def _over_all(subsets: Mapping[str, Mapping[str, Any]]) -> Aggregate:
    """Mean over all pairs from the accuracies of the strengths."""
    pairs = {name: figures["prompts"] for name, figures in subsets.items()}
    return lambda accuracies: (
        sum(accuracies[name] * n for name, n in pairs.items()) / sum(pairs.values())
    )
