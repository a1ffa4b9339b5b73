"""From the scores of a reward model to one reward a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from helpsteer2.attributes import AttributeWeights
from helpsteer2.data.groups import Group
from helpsteer2.errors import UserError
from helpsteer2.rewards.rewarder import Rewarder
from helpsteer2.rewards.standardise import ScoreStatistics, Standardisation

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RewardFunction:
    """A reward model and what makes one reward of its scores.

    Attributes:
        rewarder: The reward model.
        weights: Weighting of its scores.
        standardisation: Brings rewards to mean 0 and standard deviation 1; None leaves them.
    """

    rewarder: Rewarder
    weights: AttributeWeights
    standardisation: Standardisation | None = None

    @classmethod
    def of(
        cls, rewarder: Rewarder, weights: AttributeWeights | None, statistics: str | None = None
    ) -> RewardFunction:
        """Check that the parts fit.

        Args:
            rewarder: The reward model.
            weights: Weighting; one of a single score is not asked for.
            statistics: File of ``ScoreStatistics``, or None.

        Raises:
            UserError: If the weighting wants a score that there is not, or the statistics are of
                another reward model.
        """
        names = rewarder.attribute_names
        if len(names) == 1:
            weights = AttributeWeights(names[0], {names[0]: 1.0})
        if weights is None:
            raise UserError(
                f"the reward model scores {', '.join(names)}: choose weights=… to make one reward "
                "of them"
            )
        weights.vector(names)
        if statistics is None:
            return cls(rewarder, weights)
        found = ScoreStatistics.load(statistics)
        if found.model_hash != rewarder.model_hash:
            raise UserError(
                f"rollouts.statistics={statistics} is of another reward model: annotate again with "
                "the one that gives the rewards"
            )
        return cls(rewarder, weights, found.standardisation(weights))

    def wait_on_cpu(self) -> None:
        """Move a reward model of this process off its device, until it is used."""
        model = getattr(self.rewarder, "model", None)
        if model is not None:
            model.to("cpu")

    def scores(self, groups: Sequence[Group]) -> npt.NDArray[np.float32]:
        """Score all responses of some groups, each once.

        Args:
            groups: n ≥ 1 responses each.

        Returns:
            ``(R, A)``.

        Raises:
            UserError: If a score is not finite, or as the reward model raises it.
        """
        found = []
        for group, scores in zip(groups, self.rewarder.score(groups), strict=True):
            if not np.isfinite(scores).all():
                raise UserError(
                    f"the reward model's scores of the responses to prompt {group.id!r} are not "
                    "finite: its weights are broken, or its dtype is too narrow for them"
                )
            found.append(scores)
        return np.concatenate(found)

    def plain(self, scores: npt.NDArray[np.float32]) -> Array:
        """Weighted scores ``(R,)`` of ``(R, A)``, not standardised."""
        names = self.rewarder.attribute_names
        return np.asarray(self.weights.reward(scores.astype(np.float64), names))

    def rewards(self, scores: npt.NDArray[np.float32]) -> Array:
        """Rewards ``(R,)`` of ``(R, A)`` scores."""
        plain = self.plain(scores)
        return plain if self.standardisation is None else np.asarray(self.standardisation(plain))
