"""DPO and its kin: losses on how much a policy prefers one response, against a reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from helpsteer2.errors import UserError
from helpsteer2.losses.preference import decided


def preferred_first(values: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """Split a value of each response into that of the preferred one and that of the other.

    Args:
        values: ``(2P,)``, the two responses of a pair one after the other.
        strength: ``(P,)`` −3 (the first response is much better) … 3 (the second is); 0 is no
            preference, NaN is unknown.

    Returns:
        Two ``(P,)`` of the same dtype, both 0 where neither response is preferred, so that nothing
        can come of a value there, not even of a NaN.
    """
    first, second = values.reshape(-1, 2).unbind(dim=1)
    chosen = torch.where(strength > 0, second, first)
    rejected = torch.where(strength > 0, first, second)
    known, zero = decided(strength), torch.zeros_like(first)
    return torch.where(known, chosen, zero), torch.where(known, rejected, zero)


@dataclass(frozen=True)
class PairLogprobs:
    """What a policy and its reference say of P pairs; a pair without a winner is all zeros.

    Attributes:
        chosen: ``(P,)`` float32, log-probability of the preferred response under the policy: the
            sum over its tokens, in nats.
        rejected: ``(P,)`` of the other response.
        ref_chosen: ``(P,)`` of the preferred response under the reference.
        ref_rejected: ``(P,)`` of the other one.
        chosen_tokens: ``(P,)`` int64, tokens of the preferred response.
        rejected_tokens: ``(P,)`` of the other one.
        reward_gap: ``(P,)`` float32, known reward of the preferred response minus that of the
            other, NaN where unknown.
        strength: ``(P,)`` float32, how strong the preference is: 1, 2 or 3; 0 without a winner.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reward_gap: Tensor
    strength: Tensor

    @classmethod
    def of(
        cls,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        n_tokens: Tensor,
        rewards: Tensor,
        strength: Tensor,
    ) -> PairLogprobs:
        """Put the preferred response of every pair first.

        Args:
            logprobs: ``(2P,)`` sums under the policy, the two responses of a pair in turn.
            ref_logprobs: ``(2P,)`` sums under the reference.
            n_tokens: ``(2P,)`` int64, tokens of each response.
            rewards: ``(2P,)`` known rewards, NaN where unknown.
            strength: ``(P,)`` −3 … 3, 0 or NaN without a winner.
        """
        reward_chosen, reward_rejected = preferred_first(rewards, strength)
        return cls(
            *preferred_first(logprobs, strength),
            *preferred_first(ref_logprobs, strength),
            *preferred_first(n_tokens, strength),
            reward_chosen - reward_rejected,
            torch.where(decided(strength), strength.abs(), 0.0),
        )

    @property
    def has_winner(self) -> Tensor:
        """``(P,)`` bool."""
        return self.strength > 0

    def gap(self, average_logprobs: bool = False) -> Tensor:
        """D: log-ratio of policy to reference of the preferred response, minus the other's.

        Args:
            average_logprobs: Divide each log-ratio by the tokens of its response.

        Returns:
            ``(P,)`` float32, in nats.
        """
        chosen, rejected = self.chosen - self.ref_chosen, self.rejected - self.ref_rejected
        if average_logprobs:
            chosen = chosen / self.chosen_tokens.clamp(min=1)
            rejected = rejected / self.rejected_tokens.clamp(min=1)
        return chosen - rejected


class DPOLoss:
    """``−log σ(βD)`` of every pair with a winner; the others weigh nothing.

    D is how much more than the reference the policy prefers the right response, in nats
    (``PairLogprobs.gap``). Over an optimizer step the loss is the sum over all micro-batches of
    all ranks, divided by the number of pairs of the step. Swapping the two responses and the sign
    of the preference changes nothing.

    Args:
        beta: How strongly the policy is held to the reference, per nat: a small one lets it go far.
        average_logprobs: Divide log-probabilities by the length of their response. Off in the
            paper; IPO and SimPO-like losses are often trained with it.

    Raises:
        UserError: If ``beta`` is not a positive number.

    Source: arXiv 2305.18290, equation 7; NVIDIA/NeMo-Aligner at af2b3bd9, megatron_gpt_dpo_model.py
    (``dpo``, ``preference_average_log_probs``).
    """

    formula = "DPO loss −log σ(βD) on preferences"

    def __init__(self, beta: float = 0.1, average_logprobs: bool = False) -> None:
        if not 0 < beta < math.inf:
            raise UserError(f"module.loss.beta has to be a number above 0, got {beta}")
        self.beta = beta
        self.average_logprobs = average_logprobs

    @property
    def objective(self) -> str:
        """The loss in words, for the model card."""
        lengths = ", averaged over the tokens of each response" if self.average_logprobs else ""
        return f"{self.formula}, β = {self.beta:g}{lengths}"

    def terms(self, gap: Tensor, pairs: PairLogprobs) -> Tensor:
        """Loss of each pair.

        Args:
            gap: ``(P,)`` float32, D in nats.
            pairs: What else is known of the pairs.

        Returns:
            ``(P,)`` float32.
        """
        return -logsigmoid(self.beta * gap)

    def count(self, strength: Tensor) -> Tensor:
        """Number of pairs with a winner, the denominator of the loss.

        Args:
            strength: ``(P,)`` float32, −3 … 3; 0 is no preference, NaN is unknown.

        Returns:
            ``()`` int64.
        """
        return decided(strength).sum()

    def __call__(self, pairs: PairLogprobs) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the losses of the pairs with a winner, whatever autocast says.

        Args:
            pairs: Log-probabilities of P pairs.

        Returns:
            The loss sum ``()`` float32, and detached sums over the pairs with a winner:
            ``won`` (pairs with D > 0; a tie is no win), ``margin`` (βD), ``chosen`` and
            ``rejected`` (log-probabilities under the policy, nats), ``kl`` (mean of
            log π_ref − log π over the two responses, nats), ``pairs`` and ``chosen_tokens``.
        """
        with torch.autocast(pairs.chosen.device.type, enabled=False):
            gap = pairs.gap(self.average_logprobs)
            zero = torch.zeros_like(gap)
            loss = torch.where(pairs.has_winner, self.terms(gap, pairs), zero).sum()
            gap = gap.detach()
            ratios = pairs.chosen - pairs.ref_chosen + pairs.rejected - pairs.ref_rejected
            sums = {
                "won": (pairs.has_winner & (gap > 0)).sum(),
                "margin": self.beta * gap.sum(),
                "chosen": pairs.chosen.detach().sum(),
                "rejected": pairs.rejected.detach().sum(),
                "kl": -ratios.detach().sum() / 2,
                "pairs": pairs.has_winner.sum(),
                "chosen_tokens": pairs.chosen_tokens.sum(),
            }
        return loss, sums


class SmoothedDPOLoss(DPOLoss):
    """``−(1−ε) log σ(βD) − ε log σ(−βD)``: DPO where a share ε of the preferences may be wrong.

    Args:
        beta: As in ``DPOLoss``.
        average_logprobs: As in ``DPOLoss``.
        label_smoothing: ε, 0 … 0.5.

    Raises:
        UserError: If ``beta`` or ``label_smoothing`` is out of range.

    Source: Eric Mitchell, «A note on DPO with noisy preferences and relationship to IPO» (2023),
    which calls it conservative DPO.
    """

    formula = "DPO loss with smoothed labels on preferences"

    def __init__(
        self, beta: float = 0.1, average_logprobs: bool = False, label_smoothing: float = 0.1
    ) -> None:
        super().__init__(beta, average_logprobs)
        if not 0 <= label_smoothing < 0.5:
            raise UserError(
                f"module.loss.label_smoothing has to be 0 or more and below 0.5, got "
                f"{label_smoothing}"
            )
        self.label_smoothing = label_smoothing

    @property
    def objective(self) -> str:
        """The loss in words, for the model card."""
        return f"{super().objective}, ε = {self.label_smoothing:g}"

    def terms(self, gap: Tensor, pairs: PairLogprobs) -> Tensor:
        """Loss of each pair; arguments and result as in ``DPOLoss.terms``."""
        right, wrong = logsigmoid(self.beta * gap), logsigmoid(-self.beta * gap)
        return -(1 - self.label_smoothing) * right - self.label_smoothing * wrong


class RobustDPOLoss(SmoothedDPOLoss):
    """``(−(1−ε) log σ(βD) + ε log σ(−βD)) / (1−2ε)``: unbiased if a share ε is flipped.

    Unlike smoothing it has no minimum at a finite D: what the flipped preferences add is taken
    away in expectation.

    Source: arXiv 2403.00409; ``robust`` in TRL.
    """

    formula = "robust DPO loss on preferences"

    def terms(self, gap: Tensor, pairs: PairLogprobs) -> Tensor:
        """Loss of each pair; arguments and result as in ``DPOLoss.terms``."""
        right, wrong = logsigmoid(self.beta * gap), logsigmoid(-self.beta * gap)
        share = self.label_smoothing
        return (-(1 - share) * right + share * wrong) / (1 - 2 * share)


class IPOLoss(DPOLoss):
    """``(D − 1/(2β))²``: the preference shall be 1/(2β) nats stronger than the reference's.

    NeMo-Aligner takes sums of log-probabilities; TRL divides them by the lengths, which its authors
    say is what the paper of IPO did: ``average_logprobs=true``. The right β differs by the length.

    Source: arXiv 2310.12036, equation 17 (β is its τ); NeMo-Aligner as in ``DPOLoss`` (``ipo``).
    """

    formula = "IPO loss (D − 1/(2β))² on preferences"

    def terms(self, gap: Tensor, pairs: PairLogprobs) -> Tensor:
        """Loss of each pair; arguments and result as in ``DPOLoss.terms``."""
        return (gap - 1 / (2 * self.beta)).square()


class HingeDPOLoss(DPOLoss):
    """``max(0, 1 − βD)``: a pair that is told apart well enough teaches nothing more.

    Source: arXiv 2305.10425 (SLiC), in the form of arXiv 2309.06657.
    """

    formula = "hinge loss max(0, 1 − βD) on preferences"

    def terms(self, gap: Tensor, pairs: PairLogprobs) -> Tensor:
        """Loss of each pair; arguments and result as in ``DPOLoss.terms``."""
        return torch.relu(1 - self.beta * gap)


class MarginDPOLoss(DPOLoss):
    """``−log σ(βD − m)``: a preference of strength m asks for a margin of more than m.

    Source: arXiv 2402.10571 (DPO with an offset), with the margin of arXiv 2410.01257.
    """

    formula = "margin DPO loss −log σ(βD − m) on preferences of strength m"

    def terms(self, gap: Tensor, pairs: PairLogprobs) -> Tensor:
        """Loss of each pair; arguments and result as in ``DPOLoss.terms``."""
        return -logsigmoid(self.beta * gap - pairs.strength)


class ScaledDPOLoss(DPOLoss):
    """``−m·log σ(βD)``: a preference of strength m counts as the same pair m times over.

    The sum is divided by the number of pairs, not by Σm: a step of strong preferences is larger.

    Source: arXiv 2410.01257 (scaled Bradley–Terry), on the implicit reward of DPO.
    """

    formula = "scaled DPO loss −m·log σ(βD) on preferences of strength m"

    def terms(self, gap: Tensor, pairs: PairLogprobs) -> Tensor:
        """Loss of each pair; arguments and result as in ``DPOLoss.terms``."""
        return -pairs.strength * logsigmoid(self.beta * gap)
