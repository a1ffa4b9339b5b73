"""Better responses against worse ones: one scoring pass, every weighting, ties apart, intervals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpsteer2.data.groups import Group
from helpsteer2.evaluation.scoring import EvaluationContext, model_weightings, score_groups
from helpsteer2.functional.statistics import (
    FloatArray,
    IntArray,
    cluster_bootstrap,
    percentile_interval,
)
from helpsteer2.records import plain
from helpsteer2.rewards.rewarder import Scorer

LONGER_RESPONSE = "longer_response"
"""The baseline beside the weightings: it prefers the response with more characters."""

Aggregate = Callable[[Mapping[str, Any]], Any]
"""From the accuracies of subsets (numbers, or arrays over bootstrap draws) to one figure."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt with better and worse responses.

    Attributes:
        subset: Part of the benchmark it belongs to.
        group: The prompt with its responses, the better ones first.
        better: How many responses are better; each is held against every other one.
    """

    subset: str
    group: Group
    better: int = 1

    @property
    def prompt_key(self) -> str:
        """Equal for comparisons of one subset with one prompt."""
        return json.dumps([self.subset, self.group.prompt], ensure_ascii=False)


def fingerprint(comparisons: Iterable[Comparison]) -> str:
    """Hash of all texts, in order."""
    hashed = hashlib.sha256()
    for comparison in comparisons:
        hashed.update(repr((comparison.group.prompt, comparison.group.responses)).encode())
    return hashed.hexdigest()


@dataclass(frozen=True)
class Wins:
    """How often one reward prefers the better response.

    Attributes:
        margins: ``(N, m, n)`` reward of each of m better responses minus that of each of n worse
            ones: right above 0, a tie at 0.
        accuracy: Of each subset, NaN without prompts. A number where m = n = 1, else ``(m, n)``.
        draws: Likewise for every bootstrap draw, ``(resamples,)`` or ``(resamples, m, n)``.
    """

    margins: FloatArray
    accuracy: dict[str, FloatArray]
    draws: dict[str, FloatArray]

    def figure(self, aggregate: Aggregate, needed: Sequence[str]) -> dict[str, Any]:
        """One figure made of the accuracies of subsets.

        Args:
            aggregate: How it is made.
            needed: The subsets that it is made of.

        Returns:
            ``value``, ``low``, ``high`` (95 %) and ``not_computable``: None, or the reason.
        """
        missing = [subset for subset in needed if np.isnan(self.accuracy[subset]).any()]
        interval = percentile_interval(float(aggregate(self.accuracy)), aggregate(self.draws))
        return {
            **plain(interval),
            "not_computable": f"no prompts of {', '.join(missing)}" if missing else None,
        }


@dataclass(frozen=True)
class Compared:
    """A benchmark under every weighting, from one scoring pass.

    Attributes:
        subsets: All subsets, with or without prompts.
        of_prompt: ``(N,)`` number of each prompt's subset.
        wins: By name of the weighting; the last one is ``LONGER_RESPONSE``.
        record: What every benchmark's result says: ``fingerprint``, ``outputs`` (mean and standard
            deviation of each score) and ``skipped_weightings``.
    """

    subsets: tuple[str, ...]
    of_prompt: IntArray
    wins: dict[str, Wins]
    record: dict[str, Any]

    @property
    def counts(self) -> dict[str, int]:
        """Prompts of each subset."""
        found = np.bincount(self.of_prompt, minlength=len(self.subsets)).tolist()
        return dict(zip(self.subsets, found, strict=True))

    def unusual_counts(self, usual: Mapping[str, int]) -> dict[str, Any]:
        """The subsets that do not have their published number of prompts."""
        counts = self.counts
        return {
            subset: {"found": counts[subset], "usual": n}
            for subset, n in usual.items()
            if counts[subset] != n
        }

    def subset_figures(self, weighting: str) -> dict[str, dict[str, Any]]:
        """Counts and accuracies of each subset under one weighting."""
        wins = self.wins[weighting]
        figures = {}
        for number, subset in enumerate(self.subsets):
            margins = wins.margins[self.of_prompt == number]
            n = margins.size
            right, ties = int((margins > 0.0).sum()), int((margins == 0.0).sum())
            draws = wins.draws[subset].reshape(len(wins.draws[subset]), -1).mean(1)
            figures[subset] = {
                "prompts": len(margins),
                "comparisons": n,
                "right": right,
                "wrong": n - right - ties,
                "ties": ties,
                "accuracy": percentile_interval(float(wins.accuracy[subset].mean()), draws),
                "half_credit_accuracy": (right + 0.5 * ties) / n if n else float("nan"),
            }
        return figures


def compare(
    name: str,
    comparisons: Sequence[Comparison],
    subsets: Sequence[str],
    scorer: Scorer,
    context: EvaluationContext,
    resamples: int,
) -> Compared:
    """Score all responses once and decide every comparison under every weighting.

    A comparison is won if the better response has the strictly higher reward: a tie is a miss.
    Prompts are resampled within subsets, with all comparisons they take part in; all weightings see
    the same draws.

    Args:
        name: Name of the benchmark, for the file of its scores.
        comparisons: At least one, all with the same numbers of better and worse responses.
        subsets: All subsets, in the order of the result.
        scorer: The model.
        context: Weightings, seed, and the folder that keeps the scores.
        resamples: Bootstrap draws.

    Returns:
        Accuracies with their draws, and what the result says of the pass.

    Raises:
        UserError: If no weighting fits, a score is not finite, or scores cannot be written.
    """
    chosen = model_weightings(context, scorer.attribute_names)
    data_key = fingerprint(comparisons)
    scores = score_groups(
        name,
        data_key,
        lambda: (comparison.group for comparison in comparisons),
        np.array([len(comparison.group.responses) for comparison in comparisons], dtype=np.int64),
        scorer,
        context,
    ).astype(np.float64)
    rewards = {
        weights.name: np.asarray(weights.reward(scores, scorer.attribute_names))
        for weights in chosen.weightings
    }
    rewards[LONGER_RESPONSE] = np.array(
        [float(len(text)) for comparison in comparisons for text in comparison.group.responses]
    )
    of_prompt = np.array([subsets.index(comparison.subset) for comparison in comparisons])
    record = {
        "fingerprint": data_key,
        "outputs": {
            attribute: {"mean": scores[:, i].mean(), "std": scores[:, i].std()}
            for i, attribute in enumerate(scorer.attribute_names)
        },
        "skipped_weightings": chosen.skipped,
    }
    wins = _decide(comparisons, tuple(subsets), of_prompt, rewards, resamples, context.seed)
    return Compared(tuple(subsets), of_prompt, wins, record)


def _decide(
    comparisons: Sequence[Comparison],
    subsets: tuple[str, ...],
    of_prompt: IntArray,
    rewards: Mapping[str, FloatArray],
    resamples: int,
    seed: int,
) -> dict[str, Wins]:
    """Margins, accuracies and draws of every reward."""
    n_prompts, better = len(comparisons), comparisons[0].better
    by_prompt = np.stack([reward.reshape(n_prompts, -1) for reward in rewards.values()])
    margins = by_prompt[:, :, :better, None] - by_prompt[:, :, None, better:]
    cells = margins.shape[2:] if margins[0, 0].size > 1 else ()
    won = (margins > 0.0).transpose(1, 0, 2, 3).reshape(n_prompts, -1).astype(np.float64)
    members = (of_prompt == np.arange(len(subsets))[:, None]).astype(np.float64)

    def accuracies(rows: IntArray) -> FloatArray:
        # A prompt drawn twice counts twice. Sums of whole numbers: no rounding, whatever the order.
        taken = members * np.bincount(rows, minlength=n_prompts)
        n = taken.sum(1, keepdims=True)
        return np.where(n > 0, taken @ won / np.maximum(n, 1), np.nan)

    shape = (len(subsets), len(rewards), *cells)
    draws = cluster_bootstrap(
        accuracies,
        [comparison.prompt_key for comparison in comparisons],
        strata=of_prompt,
        resamples=resamples,
        seed=seed,
    ).reshape(resamples, *shape)
    exact = accuracies(np.arange(n_prompts)).reshape(shape)
    return {
        name: Wins(
            margins[i],
            {subset: exact[k, i] for k, subset in enumerate(subsets)},
            {subset: draws[:, k, i] for k, subset in enumerate(subsets)},
        )
        for i, name in enumerate(rewards)
    }
