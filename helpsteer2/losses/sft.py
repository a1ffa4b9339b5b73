"""Negative log-likelihood of answers."""

from __future__ import annotations

import torch
from torch import Tensor

from helpsteer2.data.packing import PackedBatch
from helpsteer2.functional.logprobs import TokenLogprobs


class SFTLoss:
    """``−log p`` of every learned token, in nats: of the responses, and of answers in the prompts.

    Over an optimizer step the loss is the sum over all micro-batches of all ranks, divided by the
    number of learned tokens of the step. So it is a mean over tokens, not over answers: long ones
    weigh more, and the result does not change with the size of the micro-batches, nor with whether
    the answers of a conversation stand in one group or in one each.

    Source: arXiv 2203.02155, section 3.5 (supervised fine-tuning); the sum and the count apart as
    in fairseq2's train units.
    """

    objective = "negative log-likelihood of the answers' tokens"
    """The loss in words, for the model card."""

    def count(self, batch: PackedBatch) -> Tensor:
        """Number of learned tokens, the denominator of the loss: ``()`` int64, 0 for fillers."""
        n = 0 if batch.filler else len(batch.layout.learned_tokens.positions)
        return torch.tensor(n, device=batch.input_ids.device)

    def __call__(
        self, tokens: TokenLogprobs, batch: PackedBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the losses of the tokens.

        Args:
            tokens: What the policy says of the learned tokens of the batch.
            batch: The packed row; a filler weighs nothing.

        Returns:
            The loss sum ``()`` float32, and the detached sums ``greedy`` ``()`` float32 (tokens
            than which none was more likely) and ``tokens`` ``()`` int64.
        """
        weight = 0.0 if batch.filler else 1.0
        loss = -weight * tokens.logprobs.sum()
        return loss, {"greedy": weight * tokens.greedy.sum(), "tokens": self.count(batch)}
