"""Answers to prompts of the made-up world as its oracle rates them, and the best there are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, AttributeWeights
from helpsteer2.world.answers import best_answer
from helpsteer2.world.oracle import rate_answer
from helpsteer2.world.tasks import Task

if TYPE_CHECKING:
    from helpsteer2.generation.sampling import Sample

Array = npt.NDArray[np.float64]

LEVELS = (0, 1, 2)
"""Wordings of the best answer; which of them is worth most depends on the weighting."""


@dataclass(frozen=True)
class RatedAnswers:
    """Answers of a policy to P prompts, n to each.

    Attributes:
        samples: The answers.
        ratings: ``(P, n, A)`` of the oracle.
    """

    samples: Sequence[Sequence[Sample]]
    ratings: Array

    @classmethod
    def of(cls, tasks: Iterable[Task], samples: Sequence[Sequence[Sample]]) -> RatedAnswers:
        """Rate answers.

        Args:
            tasks: What each prompt asks.
            samples: Answers to each prompt.
        """
        ratings = [
            [rate_answer(task, sample.text) for sample in drawn]
            for task, drawn in zip(tasks, samples, strict=True)
        ]
        return cls(samples, np.array(ratings, dtype=np.float64))

    @property
    def tokens(self) -> Array:
        """``(P,)`` mean length in tokens, the closing one included."""
        return np.array([np.mean([len(one.ids) for one in drawn]) for drawn in self.samples])

    @property
    def unfinished(self) -> Array:
        """``(P,)`` share of the answers that were cut by the limit of their length."""
        cut = [[one.finish_reason == "length" for one in drawn] for drawn in self.samples]
        return np.array(cut, dtype=np.float64).mean(1)


def score(ratings: Array, weights: AttributeWeights) -> Array:
    """Weighted mean of ratings: the reward divided by the sum of the weights, taken as positive.

    Args:
        ratings: ``(…, A)``.
        weights: The weighting.

    Returns:
        ``(…)``, 0–4 if no weight is negative.
    """
    total = sum(map(abs, weights.values.values()))
    return np.asarray(weights.reward(ratings, HELPSTEER2_ATTRIBUTES) / total)


def best_scores(tasks: Iterable[Task], weights: AttributeWeights) -> Array:
    """``(P,)`` score of the best answer to each prompt, in the wording that scores highest.

    NaN for a weighting under which another length than the one asked for, or a worse answer, may
    score higher: one that weighs verbosity, or that weighs helpfulness, correctness or coherence
    below 0.
    """
    tasks = list(tasks)
    values = dict(weights.values)
    values.pop("complexity", None)
    if values.pop("verbosity", 0.0) or any(value < 0 for value in values.values()):
        return np.full(len(tasks), np.nan)
    ratings = [[rate_answer(task, best_answer(task, level)) for level in LEVELS] for task in tasks]
    return score(np.array(ratings, dtype=np.float64), weights).max(1)
