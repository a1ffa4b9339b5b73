"""Supervised fine-tuning: a policy learns to give the answers of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from helpsteer2.data.packing import PackedBatch
from helpsteer2.losses.sft import SFTLoss
from helpsteer2.modules.step import Decay, OptimizerFactory, StepModule

if TYPE_CHECKING:
    from helpsteer2.models.policy import Policy


class SFTModule(StepModule):
    """Teaches a policy every response of every group; ratings and preferences are not read.

    The answers inside a prompt that are marked to be learned are learned too, in the same pass.

    Args:
        model: The policy.
        loss: The loss of the learned tokens.
        optimizer: Makes the optimizer from parameter groups.
        warmup_steps: Step s (0-based) runs at ``lr · min(1, (s + 1) / warmup_steps)``.
        decay: The rate after the warm-up: ``constant``, or ``linear`` to 0.
        gradient_clip: Largest gradient norm; None does not clip.
    """

    model: Policy

    def __init__(
        self,
        model: Policy,
        *,
        loss: SFTLoss,
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
        self.loss = loss
        self.objective = loss.objective

    def count(self, batch: PackedBatch) -> Tensor:
        """Learned tokens of a micro-batch."""
        return self.loss.count(batch)

    def loss_sums(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Losses of the tokens; logged are those guessed right and their number."""
        loss, sums = self.loss(self.model.learned_logprobs(batch), batch)
        return loss.reshape(1), torch.stack([sums["greedy"], sums["tokens"].float()])

    def step_metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Share of the learned tokens that were the most likely ones."""
        greedy, tokens = sums
        return {"train/token_accuracy": greedy / tokens}

    def validation_columns(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """A row a response: sum of the log-probabilities of its learned tokens, and two counts."""
        tokens = self.model.learned_logprobs(batch)
        groups = batch.group_indices[batch.response_groups]
        if batch.filler:
            groups = groups[:0]
        values = (tokens.logprobs, tokens.greedy, torch.ones_like(tokens.logprobs))
        return groups, *(tokens.sum_by_response(value)[: len(groups)] for value in values)

    def validation_metrics(self, groups: np.ndarray, *columns: np.ndarray) -> dict[str, float]:
        """Loss, perplexity, and the share of the tokens that were the most likely ones."""
        logprobs, greedy, tokens = columns
        n = float(tokens.sum(dtype=float))
        loss = -float(logprobs.sum(dtype=float)) / n
        return {
            "val/loss": loss,
            # Beyond any model that learns; exp would raise at 710.
            "val/perplexity": math.exp(min(loss, 700.0)),
            "val/token_accuracy": float(greedy.sum(dtype=float)) / n,
        }
