"""Direct preference optimisation: a policy learns which of two responses is preferred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from helpsteer2.data.packing import PackedBatch
from helpsteer2.data.pairs import decided_pairs, different_pairs, rewarded_pairs
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.losses.dpo import DPOLoss, PairLogprobs, preferred_first
from helpsteer2.modules.step import Decay, OptimizerFactory, StepModule

if TYPE_CHECKING:
    from helpsteer2.models.policy import Policy

SUMS = ("won", "margin", "chosen", "rejected", "kl", "pairs", "chosen_tokens")
"""What ``DPOLoss`` sums, in the order in which a step adds them up over ranks."""


class DPOModule(StepModule):
    """Teaches a policy to prefer the right one of two responses, more than a reference does.

    Every group is a pair with a winner: those without one, and pairs of the same ids, are left out
    of training and validation before the first step. The log-probabilities of the reference are
    columns of the data (``helpsteer2 reference`` computes them), so no second model is in memory.

    The loss can be joined by that of supervised fine-tuning on the preferred responses, which is a
    mean over their tokens: ``sft_weight`` of it is added. (NeMo-Aligner adds the sum over the
    tokens: its weight times the mean length is ours.)

    Args:
        model: The policy.
        loss: The loss on a pair.
        optimizer: Makes the optimizer from parameter groups.
        sft_weight: Weight of the negative log-likelihood of the preferred responses.
        warmup_steps: Step s (0-based) runs at ``lr · min(1, (s + 1) / warmup_steps)``.
        decay: The rate after the warm-up: ``constant`` as in the paper, or ``linear`` to 0.
        gradient_clip: Largest gradient norm; None does not clip.

    Source: arXiv 2305.18290; arXiv 2406.08673, section 4.3.
    """

    needs_reference: ClassVar[bool] = True
    model: Policy

    def __init__(
        self,
        model: Policy,
        *,
        loss: DPOLoss,
        optimizer: OptimizerFactory,
        sft_weight: float = 0.0,
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
        self.sft_weight = sft_weight
        self.objective = loss.objective
        if sft_weight:
            self.objective += f", and {sft_weight:g} × SFT loss of the preferred responses"

    @classmethod
    def usable(cls, groups: TokenisedGroups, split: str) -> TokenisedGroups:
        """The pairs with a winner and a difference: no step and no figure counts the others."""
        return different_pairs(decided_pairs(groups, split), split)

    def count(self, batch: PackedBatch) -> Tensor:
        """Pairs of a micro-batch, and tokens of their preferred responses: ``(2,)`` int64."""
        strength = batch.preference_strength
        chosen_tokens, _ = preferred_first(_response_lengths(batch), strength)
        return torch.stack([self.loss.count(strength), chosen_tokens.sum()])

    def loss_sums(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Losses of the pairs, and of the tokens of the preferred responses."""
        pairs = self._pairs(batch)
        loss, sums = self.loss(pairs)
        sft = -self.sft_weight * pairs.chosen.sum()
        return torch.stack([loss, sft]), torch.stack([sums[name].float() for name in SUMS])

    def step_metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Means over the pairs of the step; see ``pair_metrics``."""
        named = dict(zip(SUMS, sums, strict=True))
        return {f"train/{name}": value for name, value in pair_metrics(named).items()}

    def _pairs(self, batch: PackedBatch) -> PairLogprobs:
        """Log-probabilities of policy and reference, the preferred response first."""
        tokens = self.model.response_logprobs(batch)
        return PairLogprobs.of(
            tokens.sum_by_response(tokens.logprobs),
            batch.ref_logprobs,
            _response_lengths(batch),
            batch.rewards,
            batch.preference_strength,
        )

    def validation_columns(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """A row a pair: the columns of ``PairLogprobs``."""
        pairs = self._pairs(batch)
        return batch.group_indices, *(getattr(pairs, field.name) for field in fields(pairs))

    def validation_metrics(self, groups: np.ndarray, *columns: np.ndarray) -> dict[str, float]:
        """Loss, and the figures of ``pair_metrics``."""
        pairs = PairLogprobs(*map(torch.from_numpy, columns))
        loss, sums = self.loss(pairs)
        metrics = pair_metrics({name: float(value) for name, value in sums.items()})
        mean = float(loss / sums["pairs"]) + self.sft_weight * metrics["sft_loss"]
        return {f"val/{name}": value for name, value in {"loss": mean, **metrics}.items()}


class RPOModule(DPOModule):
    """DPO towards known rewards: every pair has to bring the reward of both responses."""

    @classmethod
    def usable(cls, groups: TokenisedGroups, split: str) -> TokenisedGroups:
        """The pairs as in ``DPOModule``.

        Raises:
            UserError: If the reward of a response is not known.
        """
        return rewarded_pairs(super().usable(groups, split), split)


def pair_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over pairs.

    Args:
        sums: What ``DPOLoss`` sums over at least one pair.

    Returns:
        ``pair_accuracy`` (share with D > 0), ``reward_margin`` (βD),
        ``chosen_logprob`` and ``rejected_logprob`` (nats a response), ``sft_loss`` (nats a token of
        the preferred responses) and ``kl_to_reference``: the mean of log π_ref − log π over all
        responses, in nats a response. That is the k1 estimator of KL(π_ref ‖ π), unbiased where the
        reference has sampled the responses; on other responses it is a measure of drift, and may
        be negative.
    """
    pairs = sums["pairs"]
    return {
        "pair_accuracy": sums["won"] / pairs,
        "reward_margin": sums["margin"] / pairs,
        "chosen_logprob": sums["chosen"] / pairs,
        "rejected_logprob": sums["rejected"] / pairs,
        "sft_loss": -sums["chosen"] / sums["chosen_tokens"],
        "kl_to_reference": sums["kl"] / pairs,
    }


def _response_lengths(batch: PackedBatch) -> Tensor:
    """``(R,)`` int64, tokens of each response."""
    lengths = [length for group in batch.layout.response_lengths for length in group]
    return torch.tensor(lengths, device=batch.input_ids.device)
