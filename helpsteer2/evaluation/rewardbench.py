"""RewardBench: does the model prefer the chosen response? Many weightings from one scoring pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from helpsteer2.errors import UserError
from helpsteer2.evaluation.preference_files import (
    PreferencePair,
    fingerprint,
    load_pairs,
    load_sets,
)
from helpsteer2.evaluation.report import rewardbench_tables
from helpsteer2.evaluation.scoring import (
    EvaluationContext,
    Scorer,
    score_groups,
    usable_weightings,
)
from helpsteer2.functional.statistics import (
    FloatArray,
    cluster_bootstrap,
    percentile_interval,
)
from helpsteer2.records import plain

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

Aggregate = Callable[[Mapping[str, Any]], Any]


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

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise UserError("resamples must be at least 1")

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
        chosen = usable_weightings(context.weightings, scorer.attribute_names)
        pairs = self._load()
        data_key = fingerprint(pairs)
        scores = score_groups(
            "rewardbench",
            data_key,
            lambda: (pair.group for pair in pairs),
            np.full(len(pairs), 2, dtype=np.int64),
            scorer,
            context,
        ).astype(np.float64)
        rewards = {
            weights.name: np.asarray(weights.reward(scores, scorer.attribute_names))
            for weights in chosen.weightings
        }
        rewards["longer_response"] = np.array(
            [float(len(text)) for pair in pairs for text in pair.group.responses]
        )
        counts = {subset: 0 for subset in self._subsets()}
        for pair in pairs:
            counts[pair.subset] += 1
        return dict(
            plain(
                {
                    "pairs": len(pairs),
                    "fingerprint": data_key,
                    "unusual_counts": {
                        subset: {"found": counts[subset], "usual": n}
                        for subset, n in COUNTS.items()
                        if counts[subset] != n
                    },
                    "outputs": _outputs(scores, scorer.attribute_names),
                    "weightings": self._figures(pairs, rewards, context.seed),
                    "skipped_weightings": chosen.skipped,
                }
            )
        )

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Show a result of ``evaluate`` within 100 columns."""
        return rewardbench_tables(result)

    def _subsets(self) -> tuple[str, ...]:
        return (*COUNTS, *PRIOR_SETS) if self.prior_sets is not None else tuple(COUNTS)

    def _load(self) -> tuple[PreferencePair, ...]:
        pairs = load_pairs(self.path, self.split, tuple(COUNTS), "evaluators.rewardbench.path")
        if self.prior_sets is None:
            return pairs
        return pairs + load_sets(self.prior_sets, PRIOR_SETS, "evaluators.rewardbench.prior_sets")

    def _figures(
        self, pairs: Sequence[PreferencePair], rewards: Mapping[str, FloatArray], seed: int
    ) -> dict[str, Any]:
        """Every figure under every weighting, from the same draws."""
        subsets = self._subsets()
        of_pair = np.array([subsets.index(pair.subset) for pair in pairs])
        margins = np.stack(
            [
                reward.reshape(-1, 2)[:, 0] - reward.reshape(-1, 2)[:, 1]
                for reward in rewards.values()
            ]
        )
        right = (margins > 0.0).astype(np.float64)

        def accuracies(rows: Any) -> FloatArray:
            seen = of_pair[rows]
            n = np.bincount(seen, minlength=len(subsets))
            won = [np.bincount(seen, weights=r[rows], minlength=len(subsets)) for r in right]
            return np.where(n > 0, np.stack(won) / np.maximum(n, 1), np.nan)

        draws = cluster_bootstrap(
            accuracies,
            [pair.prompt_key for pair in pairs],
            strata=of_pair,
            resamples=self.resamples,
            seed=seed,
        ).reshape(self.resamples, len(rewards), len(subsets))
        exact = accuracies(slice(None))
        return {
            name: {
                **_summary(
                    dict(zip(subsets, exact[i], strict=True)),
                    dict(zip(subsets, draws[:, i].T, strict=True)),
                    with_prior_sets=self.prior_sets is not None,
                ),
                "subsets": {
                    subset: _subset(margins[i, of_pair == j], exact[i, j], draws[:, i, j])
                    for j, subset in enumerate(subsets)
                },
            }
            for i, name in enumerate(rewards)
        }


def _summary(
    exact: Mapping[str, float], draws: Mapping[str, FloatArray], with_prior_sets: bool
) -> dict[str, Any]:
    """Sections and averages, each with its interval, or why it cannot be computed."""

    def figure(aggregate: Aggregate, needed: Sequence[str]) -> dict[str, Any]:
        missing = [subset for subset in needed if np.isnan(exact[subset])]
        interval = plain(percentile_interval(float(aggregate(exact)), aggregate(draws)))
        return {
            **interval,
            "not_computable": f"no prompts of {', '.join(missing)}" if missing else None,
        }

    every = tuple(COUNTS)
    summary: dict[str, Any] = {
        "sections": {
            section: figure(_section_aggregate(section), tuple(SECTIONS[section]))
            for section in SECTIONS
        }
    }
    summary |= {name: figure(aggregate, every) for name, aggregate in AVERAGES.items()}
    if with_prior_sets:
        summary["prior_sets"] = figure(prior_sets_accuracy, PRIOR_SETS)
        summary["leaderboard_score"] = figure(leaderboard_score, every + PRIOR_SETS)
    return summary


def _section_aggregate(section: str) -> Aggregate:
    return lambda accuracies: section_accuracy(section, accuracies)


def _subset(margins: FloatArray, accuracy: float, draws: FloatArray) -> dict[str, Any]:
    """Counts and accuracies of one subset."""
    n, right, ties = len(margins), int((margins > 0.0).sum()), int((margins == 0.0).sum())
    interval = percentile_interval(accuracy, draws)
    return {
        "prompts": n,
        "right": right,
        "wrong": n - right - ties,
        "ties": ties,
        "accuracy": interval,
        "half_credit_accuracy": (right + 0.5 * ties) / n if n else float("nan"),
    }


def _outputs(scores: FloatArray, attribute_names: Sequence[str]) -> dict[str, Any]:
    """Mean and standard deviation of each score over all responses."""
    return {
        name: {"mean": scores[:, i].mean(), "std": scores[:, i].std()}
        for i, name in enumerate(attribute_names)
    }
