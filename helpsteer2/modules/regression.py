"""Training a multi-attribute reward model by regression on ratings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from helpsteer2.data.groups import GroupSource
from helpsteer2.data.packing import PackedBatch
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.errors import UserError
from helpsteer2.functional import statistics
from helpsteer2.losses.regression import RegressionLoss
from helpsteer2.modules.scored import ScoredSplit
from helpsteer2.modules.step import Decay, OptimizerFactory, StepModule

if TYPE_CHECKING:
    from helpsteer2.models.reward import RewardModel


logger = logging.getLogger(__name__)


class RegressionModule(StepModule):
    """Fits a reward model's scores to ratings.

    Args:
        model: The reward model; its ``spec.attribute_names`` order the scores and the ratings.
        loss: The loss, given by the config without names; it is bound to the model's here.
        optimizer: Makes the optimizer from parameter groups.
        warmup_steps: Step s (0-based) runs at ``lr · min(1, (s + 1) / warmup_steps)``.
        decay: The rate after the warm-up: ``constant`` as in the paper, or ``linear`` to 0.
        gradient_clip: Largest gradient norm; None does not clip.

    Raises:
        UserError: If the loss weighs an attribute that the model does not have.
    """

    objective = "masked mean squared error on ratings"

    def __init__(
        self,
        model: RewardModel,
        *,
        loss: RegressionLoss,
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
        self.attribute_names = tuple(model.spec.attribute_names)
        self.loss = loss.bind(self.attribute_names)

    @classmethod
    def check_source(cls, source: GroupSource, attribute_names: Sequence[str]) -> None:
        """Refuse data without a column for any of the attributes."""
        if not set(attribute_names) & set(source.attribute_names):
            raise UserError(
                f"the data rates {', '.join(source.attribute_names) or 'nothing'}, and none of the "
                f"wanted attributes {', '.join(attribute_names)}: set attributes to names that it "
                "has"
            )

    @classmethod
    def usable(cls, groups: TokenisedGroups, split: str) -> TokenisedGroups:
        """All groups, if some response is rated on one of the attributes."""
        names, means = groups.attribute_names, groups.rating_means()
        unrated = [name for name, mean in zip(names, means, strict=True) if np.isnan(mean)]
        if unrated:
            data = "training" if split == "train" else split
            message = f"no response of the {data} data is rated on {', '.join(unrated)}"
            if len(unrated) == len(names):
                raise UserError(f"{message}: there is nothing to learn or to measure")
            logger.warning("%s", message)
        return groups

    def count(self, batch: PackedBatch) -> Tensor:
        """Known ratings of a micro-batch."""
        return self.loss.count(batch.attributes)

    def loss_sums(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Weighted squared errors; logged are each attribute's own and its known ratings."""
        loss, sums = self.loss(self.model(batch), batch.attributes)
        return loss.reshape(1), torch.cat([sums["squared_error"], sums["known"].float()])

    def step_metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Mean squared error of each attribute; NaN where the step had no rating of it."""
        a = len(self.attribute_names)
        return {
            f"train/{name}/mse": sums[i] / sums[a + i] if sums[a + i] else float("nan")
            for i, name in enumerate(self.attribute_names)
        }

    def validation_columns(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """A row a response: ``(N, A)`` scores and ratings."""
        groups = batch.group_indices[batch.response_groups]
        return groups, self.model(batch).float(), batch.attributes

    def validation_metrics(self, groups: np.ndarray, *columns: np.ndarray) -> dict[str, float]:
        """Loss and each attribute's figures; ratings are NaN where unknown.

        Raises:
            UserError: If the whole split has no rating.
        """
        scores, ratings = columns
        self.scored = ScoredSplit(self.attribute_names, groups, scores, ratings, "0–4")
        known = (~np.isnan(ratings)).sum(axis=0)
        if not known.any():
            raise UserError(
                f"no response of the validation split is rated on {', '.join(self.attribute_names)}"
            )
        metrics = {"val/loss": 0.0}
        for i, name in enumerate(self.attribute_names):
            mse = statistics.mse(scores[:, i], ratings[:, i])
            metrics[f"val/{name}/mse"] = mse
            metrics[f"val/{name}/pearson"] = statistics.pearson(scores[:, i], ratings[:, i])
            if known[i]:
                assert self.loss.weights is not None
                metrics["val/loss"] += self.loss.weights[i] * mse * known[i] / known.sum()
        return metrics
