"""Losses on the difference of two scores: Bradley–Terry, with a margin, and scaled."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def decided(strength: Tensor) -> Tensor:
    """Which pairs have a winner.

    Args:
        strength: ``(P,)`` float32, −3 … 3; 0 is no preference, NaN is unknown.

    Returns:
        ``(P,)`` bool.
    """
    return ~(strength.isnan() | (strength == 0))


class BradleyTerry:
    """``−log σ(Δ)`` of every decided pair; the others weigh nothing.

    Δ is the score of the preferred response minus that of the other. Over an optimizer step the
    loss is the sum over all micro-batches of all ranks, divided by the number of decided pairs of
    the step. Swapping the two responses and the sign of the strength changes nothing.

    Source: arXiv 2410.01257 (Bradley–Terry); NVIDIA/NeMo-Aligner at af2b3bd9,
    megatron_gpt_regression_reward_model.py.
    """

    objective = "Bradley–Terry loss −log σ(Δ) on preferences"
    """The loss in words, for the model card."""

    def terms(self, gain: Tensor, strength: Tensor) -> Tensor:
        """Loss of each pair.

        Args:
            gain: ``(P,)`` float32, Δ.
            strength: ``(P,)`` float32, how strong the preference is: 1, 2 or 3.

        Returns:
            ``(P,)`` float32.
        """
        return -logsigmoid(gain)

    def count(self, strength: Tensor) -> Tensor:
        """Number of decided pairs, the denominator of the loss.

        Args:
            strength: ``(P,)`` float32, −3 … 3; 0 is no preference, NaN is unknown.

        Returns:
            ``()`` int64.
        """
        return decided(strength).sum()

    def __call__(self, difference: Tensor, strength: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the losses of the decided pairs, in fp32 whatever autocast says.

        Args:
            difference: ``(P,)`` float, score of the second response minus that of the first.
            strength: ``(P,)`` float32, −3 (the first response is much better) … 3 (the second is);
                0 is no preference, NaN is unknown.

        Returns:
            The loss sum ``()`` float32, and the detached sums ``won`` ``()`` int64 (pairs whose
            preferred response has the higher score; equal scores are a miss) and ``decided`` ``()``
            int64.

        Raises:
            ValueError: If the shapes differ.
        """
        if difference.shape != strength.shape:
            raise ValueError(
                f"differences are {tuple(difference.shape)}, strengths {tuple(strength.shape)}"
            )
        with torch.autocast(difference.device.type, enabled=False):
            known = decided(strength)
            # Zero before the loss: NaN · 0 is NaN, also in the gradient.
            strength = torch.where(known, strength.float(), 0.0)
            gain = torch.where(known, difference.float() * strength.sign(), 0.0)
            loss = torch.where(known, self.terms(gain, strength.abs()), 0.0).sum()
        return loss, {"won": (gain.detach() > 0).sum(), "decided": known.sum()}


class MarginBradleyTerry(BradleyTerry):
    """``−log σ(Δ − m)``: a preference of strength m asks for a difference of more than m.

    Source: arXiv 2410.01257 (the margin of Llama 2, arXiv 2307.09288, section 3.2.2).
    """

    objective = "margin Bradley–Terry loss −log σ(Δ − m) on preferences of strength m"

    def terms(self, gain: Tensor, strength: Tensor) -> Tensor:
        """Loss of each pair; arguments and result as in ``BradleyTerry.terms``."""
        return -logsigmoid(gain - strength)


class ScaledBradleyTerry(BradleyTerry):
    """``−m·log σ(Δ)``: a preference of strength m counts as the same pair m times over.

    The sum is divided by the number of pairs, not by Σm, as in NeMo-Aligner: so a step of strong
    preferences is a larger one.

    Source: arXiv 2410.01257; NVIDIA/NeMo-Aligner at af2b3bd9,
    megatron_gpt_regression_reward_model.py.
    """

    objective = "scaled Bradley–Terry loss −m·log σ(Δ) on preferences of strength m"

    def terms(self, gain: Tensor, strength: Tensor) -> Tensor:
        """Loss of each pair; arguments and result as in ``BradleyTerry.terms``."""
        return -strength * logsigmoid(gain)
