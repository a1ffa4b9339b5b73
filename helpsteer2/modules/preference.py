"""Training a reward model with one score on preferences between two responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from helpsteer2.data.packing import PackedBatch
from helpsteer2.data.pairs import decided_pairs
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.errors import UserError
from helpsteer2.functional.preferences import STRENGTHS, count_preferences
from helpsteer2.functional.statistics import pearson
from helpsteer2.losses.preference import BradleyTerry
from helpsteer2.modules.scored import ScoredSplit
from helpsteer2.modules.step import Decay, OptimizerFactory, StepModule

if TYPE_CHECKING:
    from helpsteer2.models.reward import RewardModel


class PreferenceModule(StepModule):
    """Teaches a reward model to score the preferred one of two responses higher.

    Every group is a decided pair: those without a winner are left out of training and validation
    before the first step, so that they take no place in one.

    Args:
        model: The reward model, with one score: a new head, or one attribute of a regression model
            that training goes on from.
        loss: The loss on a pair.
        optimizer: Makes the optimizer from parameter groups.
        warmup_steps: Step s (0-based) runs at ``lr · min(1, (s + 1) / warmup_steps)``.
        decay: The rate after the warm-up: ``constant`` as in the paper, or ``linear`` to 0.
        gradient_clip: Largest gradient norm; None does not clip.

    Raises:
        UserError: If the model has several scores.

    Source: arXiv 2410.01257.
    """

    def __init__(
        self,
        model: RewardModel,
        *,
        loss: BradleyTerry,
        optimizer: OptimizerFactory,
        warmup_steps: int = 10,
        decay: Decay = "constant",
        gradient_clip: float | None = 1.0,
    ) -> None:
        super().__init__(
            model,
            optimizer=optimizer,
            warmup_steps=warmup_steps,
            decay=decay,
            gradient_clip=gradient_clip,
        )
        names = model.spec.attribute_names
        if len(names) != 1:
            raise UserError(
                f"a preference is learned by one score, the model has {len(names)} "
                f"({', '.join(names)}): name one, attributes=[{names[0]}] for example"
            )
        self.loss = loss
        self.objective = loss.objective

    @classmethod
    def usable(cls, groups: TokenisedGroups, split: str) -> TokenisedGroups:
        """The decided pairs: no step, and no figure of validation, counts the others."""
        return decided_pairs(groups, split)

    def count(self, batch: PackedBatch) -> Tensor:
        """Decided pairs of a micro-batch."""
        return self.loss.count(batch.preference_strength)

    def loss_sums(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Losses of the pairs; logged are those won and their number."""
        loss, sums = self.loss(self._differences(batch), batch.preference_strength)
        return loss.reshape(1), torch.stack([sums["won"], sums["decided"]]).float()

    def step_metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Share of the pairs whose preferred response has the higher score; a tie is a miss."""
        won, pairs = sums
        return {"train/pair_accuracy": won / pairs if pairs else float("nan")}

    def _differences(self, batch: PackedBatch) -> Tensor:
        """Score of the second response minus that of the first, ``(G,)`` float32."""
        first, second = self.model(batch).reshape(-1, 2).unbind(dim=1)
        return second - first

    def validation_columns(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """A row a pair: difference of the scores, and strength of the preference."""
        return batch.group_indices, self._differences(batch), batch.preference_strength

    def validation_metrics(self, groups: np.ndarray, *columns: np.ndarray) -> dict[str, float]:
        """Loss, and how the scores agree with the preferences; strengths of fillers are NaN."""
        difference, strength = columns
        known = ~np.isnan(strength)
        self.scored = _second_wins(groups[known], difference[known], strength[known])
        strengths = torch.from_numpy(strength)
        loss, _ = self.loss(torch.from_numpy(difference), strengths)
        counts = count_preferences(difference, strength)
        metrics = {
            "val/loss": float(loss / self.loss.count(strengths)),
            # Equal scores are misses, as in every evaluation, and beside it counted apart.
            "val/pair_accuracy": counts.accuracy,
            "val/predicted_ties": float(counts.predicted_ties),
            "val/strength_pearson": pearson(difference, strength),
        }
        for m in STRENGTHS:
            chosen = np.abs(strength) == m
            if chosen.any():
                of_strength = count_preferences(difference[chosen], strength[chosen])
                metrics[f"val/strength_{m}/pair_accuracy"] = of_strength.accuracy
        return metrics


def _second_wins(groups: np.ndarray, difference: np.ndarray, strength: np.ndarray) -> ScoredSplit:
    """How likely the second response of ``(P,)`` pairs is the better one, and whether it is."""
    probability = torch.from_numpy(difference).sigmoid().numpy()
    won = np.where(strength == 0, np.float32("nan"), strength > 0).astype(np.float32)
    return ScoredSplit(
        ("second is better",), groups, probability[:, None], won[:, None], "probability"
    )
