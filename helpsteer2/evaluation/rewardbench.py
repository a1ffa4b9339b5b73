"""RewardBench: does the model prefer the chosen response? Many weightings from one scoring pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
from rich.table import Table

from helpsteer2.errors import UserError
from helpsteer2.evaluation.benchmark_tables import headlines, rewardbench_tables
from helpsteer2.evaluation.comparisons import Aggregate, Comparison, Wins, compare
from helpsteer2.evaluation.preference_files import load_pairs, load_sets
from helpsteer2.evaluation.scoring import EvaluationContext, ModelKind, told_together
from helpsteer2.records import plain
from helpsteer2.rewards.rewarder import Scorer

SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat-Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 447,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
"""Prompts of each subset in the ``filtered`` split, by section."""

COUNTS = {subset: n for subsets in SECTIONS.values() for subset, n in subsets.items()}

WEIGHTS = {**COUNTS, "math-prm": 984}
"""Weight of a subset in its section: its prompts, but maths weighs as much as the six languages.

Source: allenai/reward-bench, rewardbench/constants.py@05a9005.
"""

WEIGHTS_BEFORE_2024_09 = {**WEIGHTS, "xstest-should-refuse": 250, "xstest-should-respond": 154}
"""The leaderboard's weights until 10 September 2024, with the two XSTest counts interchanged.

They were in force when Table 3 of arXiv 2406.08673 was made. Source: allenai/reward-bench@6552e93.
"""

PRIOR_SETS = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")


def section_accuracy(
    section: str, accuracies: Mapping[str, Any], weights: Mapping[str, int] = WEIGHTS
) -> Any:
    """Weighted mean over the subsets of a section.

    Args:
        section: A key of ``SECTIONS``.
        accuracies: Accuracy of each subset (a number, or arrays of one shape); NaN if not known.
        weights: Weight of each subset.

    Returns:
        The accuracy, NaN if any subset of the section is not known: never a mean over fewer.
    """
    subsets = SECTIONS[section]
    total = sum(weights[subset] for subset in subsets)
    return sum(accuracies.get(subset, np.nan) * weights[subset] for subset in subsets) / total


def section_mean(accuracies: Mapping[str, Any], weights: Mapping[str, int] = WEIGHTS) -> Any:
    """Plain mean of the four sections: the overall score of the HelpSteer2 papers."""
    return sum(section_accuracy(section, accuracies, weights) for section in SECTIONS) / 4


def prior_sets_accuracy(accuracies: Mapping[str, Any]) -> Any:
    """Plain mean of the four prior sets."""
    return sum(accuracies.get(subset, np.nan) for subset in PRIOR_SETS) / len(PRIOR_SETS)


def leaderboard_score(accuracies: Mapping[str, Any]) -> Any:
    """The leaderboard's score: four sections and, at half their weight, the prior sets."""
    sections = 2 * sum(section_accuracy(section, accuracies) for section in SECTIONS)
    return (sections + prior_sets_accuracy(accuracies)) / 9


def macro_average(accuracies: Mapping[str, Any]) -> Any:
    """Plain mean of the 23 subsets."""
    return sum(accuracies.get(subset, np.nan) for subset in COUNTS) / len(COUNTS)


def micro_average(accuracies: Mapping[str, Any]) -> Any:
    """Mean over all prompts of the 23 subsets, each weighing the same."""
    total = sum(COUNTS.values())
    return sum(accuracies.get(subset, np.nan) * n for subset, n in COUNTS.items()) / total


AVERAGES: dict[str, Aggregate] = {
    "section_mean": section_mean,
    "micro_average": micro_average,
    "macro_average": macro_average,
    "section_mean_before_2024_09": lambda a: section_mean(a, WEIGHTS_BEFORE_2024_09),
    "safety_before_2024_09": lambda a: section_accuracy("Safety", a, WEIGHTS_BEFORE_2024_09),
}


@dataclass(frozen=True)
class RewardBench:
    """Accuracy on RewardBench's pairs, strictly: equal rewards are a miss, and counted apart.

    One pass scores all responses; every weighting is computed from it, and so is a baseline that
    prefers the longer response. Intervals are 95 % and resample prompts within subsets.

    Args:
        path: Hub id, or a local JSONL or Parquet file (or its folder) with the columns ``prompt``,
            ``chosen``, ``rejected`` and ``subset``.
        split: Split on the Hub, and the stem of the file in a folder.
        prior_sets: The four prior sets, for the leaderboard's score: a Hub id
            (``allenai/pref-test-sets``), a folder with a file a set, or a file with a ``subset``
            column. None leaves that score out.
        resamples: Bootstrap draws.

    Source: arXiv 2403.13787; allenai/reward-bench@05a9005.
    """

    path: str = "allenai/reward-bench"
    split: str = "filtered"
    prior_sets: str | None = None
    resamples: int = 1000

    takes: ClassVar[ModelKind] = "reward model"

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise UserError("resamples must be at least 1")

    def check(self) -> None:
        """Read all pairs, of which any model is then scored.

        Raises:
            UserError: If the data cannot be found, or a row is bad.
        """
        told_together(lambda: self._pairs, lambda: self._prior_pairs)

    def evaluate(self, scorer: Scorer, context: EvaluationContext) -> dict[str, Any]:
        """Score all pairs once and compute every figure under every weighting.

        Args:
            scorer: The model.
            context: Weightings, seed, and the folder that keeps the scores.

        Returns:
            ``weightings`` (each with ``subsets``, ``sections``, the averages) and the counts.

        Raises:
            DataError: If a row is bad, or its subset unknown.
            UserError: If the data cannot be found, no weighting fits, or a score is not finite.
        """
        pairs = self._pairs + self._prior_pairs
        subsets = tuple(COUNTS) if self.prior_sets is None else (*COUNTS, *PRIOR_SETS)
        compared = compare("rewardbench", pairs, subsets, scorer, context, self.resamples)
        result = {
            "pairs": len(pairs),
            **compared.record,
            "unusual_counts": compared.unusual_counts(COUNTS),
            "weightings": {
                name: {
                    **_summary(wins, with_prior_sets=self.prior_sets is not None),
                    "subsets": compared.subset_figures(name),
                }
                for name, wins in compared.wins.items()
            },
        }
        return dict(plain(result))

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Show a result of ``evaluate`` within 100 columns."""
        return rewardbench_tables(result)

    def headlines(self, result: Mapping[str, Any]) -> dict[str, str]:
        """Overall accuracy, the mean of the sections, under every weighting."""
        return headlines(result, {"overall": "section_mean"})

    @cached_property
    def _pairs(self) -> tuple[Comparison, ...]:
        return load_pairs(self.path, self.split, tuple(COUNTS), "evaluators.rewardbench.path")

    @cached_property
    def _prior_pairs(self) -> tuple[Comparison, ...]:
        if self.prior_sets is None:
            return ()
        return load_sets(self.prior_sets, PRIOR_SETS, "evaluators.rewardbench.prior_sets")


def _summary(wins: Wins, with_prior_sets: bool) -> dict[str, Any]:
    """Sections and averages, each with its interval, or why it cannot be computed."""
    every = tuple(COUNTS)
    summary: dict[str, Any] = {
        "sections": {
            section: wins.figure(partial(section_accuracy, section), tuple(SECTIONS[section]))
            for section in SECTIONS
        }
    }
    summary |= {name: wins.figure(aggregate, every) for name, aggregate in AVERAGES.items()}
    if with_prior_sets:
        summary["prior_sets"] = wins.figure(prior_sets_accuracy, PRIOR_SETS)
        summary["leaderboard_score"] = wins.figure(leaderboard_score, every + PRIOR_SETS)
    return summary
