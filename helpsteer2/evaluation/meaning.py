"""What a reward model's scores mean, as its export tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpsteer2.attributes import AttributeWeights

if TYPE_CHECKING:
    from helpsteer2.models.spec import RewardSpec

OWN_REWARD = "own_reward"
"""The row that models of any number of scores share: the reward that each is meant to give."""

LEARNED_FROM_RATINGS = "on ratings"
"""How an objective ends, in an export's words, whose scores are predicted ratings."""


@dataclass(frozen=True)
class ScoreMeaning:
    """What an export tells of its scores.

    Attributes:
        weights: The weighting stored with the model, None if there is none.
        are_ratings: Whether scores are predicted ratings, 0–4. Those learned from preferences or
            extrapolated are right up to their order alone: they have no distance to a rating.
    """

    weights: AttributeWeights | None = None
    are_ratings: bool = True

    @classmethod
    def of(cls, spec: RewardSpec) -> ScoreMeaning:
        """Read it from an export.

        A model of another project tells no objective: there the names of its scores are believed.
        """
        learned = not spec.objective or spec.objective.endswith(LEARNED_FROM_RATINGS)
        return cls(spec.weights, learned and spec.extrapolation is None)

    def own_weights(self, attribute_names: tuple[str, ...]) -> AttributeWeights | None:
        """The reward that the model is meant to give.

        Args:
            attribute_names: Names of the model's scores.

        Returns:
            The stored weighting, or else the single score; None of several scores without one.
        """
        if self.weights is None and len(attribute_names) == 1:
            return single_score(attribute_names)
        return self.weights


def single_score(attribute_names: tuple[str, ...]) -> AttributeWeights:
    """The reward of a model of one score, whatever its name."""
    return AttributeWeights("score", {attribute_names[0]: 1.0})
