"""Policy gradients on sampled tokens: REINFORCE, and PPO's clipped objective."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from helpsteer2.data.tokens import RolloutTokens
from helpsteer2.errors import UserError
from helpsteer2.functional.kl import kl_estimate
from helpsteer2.functional.logprobs import TokenLogprobs

Average = Literal["tokens", "responses"]
"""What the loss of a step is divided by: its counted tokens, or its responses that have any."""


def counted_responses(rollout: RolloutTokens[Tensor], responses: Tensor) -> Tensor:
    """Number of responses with a token that counts: ``()`` int64.

    Args:
        rollout: Columns of N response tokens.
        responses: ``(N,)`` int64, the response each of them belongs to.
    """
    return (responses[rollout.counted].bincount() > 0).sum()


class PolicyGradientLoss:
    """``−A_t·log π(t)`` of every counted token; the others weigh nothing.

    A is given, so this is REINFORCE, RLOO or a part of GRPO by the way the advantages were made.
    Over an optimizer step the loss is the sum over all micro-batches of all ranks, divided by the
    responses of the step, which makes it an estimate of the gradient of the expected reward, or by
    its tokens, which makes a step independent of how long responses are. The gradient is that of
    the expected reward only where the responses were sampled by the policy that is trained: in the
    first step of an iteration, and about so in the next ones.

    Args:
        average: What the sum is divided by.
        entropy: Coefficient of the bonus for undecided policies: this times the entropy of the
            distribution at each counted token is taken off the loss, and divided likewise.

    Raises:
        UserError: If an argument is out of range.

    Source: Williams, "Simple statistical gradient-following algorithms" (1992); arXiv 2402.14740.
    """

    formula = "policy gradient −A·log π"

    def __init__(self, average: Average = "responses", entropy: float = 0.0) -> None:
        if average not in get_args(Average):
            raise UserError(
                f"module.loss.average has to be {' or '.join(get_args(Average))}, got {average}"
            )
        if not 0 <= entropy < math.inf:
            raise UserError(f"module.loss.entropy has to be a number of 0 or more, got {entropy}")
        self.average = average
        self.entropy = entropy

    @property
    def objective(self) -> str:
        """The loss in words, for the model card."""
        bonus = f", with an entropy bonus of {self.entropy:g}" if self.entropy else ""
        return f"{self.formula}, averaged over {self.average}{bonus}"

    def terms(self, logprobs: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each token.

        Args:
            logprobs: ``(N,)`` float32 nats under the policy; 0 where the token does not count, as
                the other two are.
            old: ``(N,)`` under the policy that the iteration began with.
            advantages: ``(N,)``.

        Returns:
            The losses ``(N,)`` float32, and ``(N,)`` bool, whether clipping has stopped the token.
        """
        return -advantages * logprobs, torch.zeros_like(logprobs, dtype=torch.bool)

    def count(self, rollout: RolloutTokens[Tensor], responses: Tensor) -> Tensor:
        """Counted tokens, or responses with a counted token: the denominator of the loss.

        Args:
            rollout: Columns of N response tokens.
            responses: ``(N,)`` int64, the response each of them belongs to.

        Returns:
            ``()`` int64.
        """
        if self.average == "tokens":
            return rollout.counted.sum()
        return counted_responses(rollout, responses)

    def __call__(
        self, tokens: TokenLogprobs, rollout: RolloutTokens[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the losses of the counted tokens, whatever autocast says.

        What stands at the other tokens reaches neither loss nor gradient, not even a NaN.

        Args:
            tokens: What the policy says of N response tokens, with entropies if there is a bonus
                for them.
            rollout: Columns of the same tokens.

        Returns:
            The loss sum ``()`` float32, and detached float32 sums over the counted tokens:
            ``tokens`` (how many), ``ratio`` (r, π over the policy that the iteration began with),
            ``clipped`` (tokens that clipping has stopped: they have no gradient, because r has
            left the range in the direction in which A pushes), ``approx_kl`` (r − 1 − log r, whose
            mean over tokens sampled from the old policy is KL(old ‖ π), nats) and ``entropy``
            (nats; where the entropies were not computed it is −log π of the sampled tokens, whose
            mean over tokens sampled from π is the same).

        Raises:
            ValueError: If there is an entropy bonus, and no entropy.
        """
        counted = rollout.counted
        zero = torch.zeros_like(tokens.logprobs)
        with torch.autocast(counted.device.type, enabled=False):
            # Before any arithmetic: 0 · NaN is NaN, also in a gradient.
            logprobs = torch.where(counted, tokens.logprobs, zero)
            old = torch.where(counted, rollout.logprobs, zero)
            advantages = torch.where(counted, rollout.advantages, zero)
            losses, stopped = self.terms(logprobs, old, advantages)
            loss = losses.sum()
            entropy = -logprobs.sum()
            if tokens.entropy is not None:
                entropy = torch.where(counted, tokens.entropy, zero).sum()
            if self.entropy:
                if tokens.entropy is None:
                    raise ValueError("a bonus for the entropy needs the entropy of every token")
                loss = loss - self.entropy * entropy
            log_ratio = (logprobs - old).detach()
            sums = {
                "tokens": counted.sum(),
                "ratio": torch.where(counted, log_ratio.exp(), zero).sum(),
                "clipped": stopped.sum(),
                "approx_kl": kl_estimate(-log_ratio, "k3").sum(),
                "entropy": entropy.detach(),
            }
        return loss, {name: value.float() for name, value in sums.items()}


class ClippedLoss(PolicyGradientLoss):
    """``max(−A·r, −A·clip(r, 1−ε, 1+ε′))`` of every counted token, r = π/π_old.

    A token whose probability has already changed by more than the range, in the direction in which
    its advantage pushes, teaches nothing more; one that has gone the wrong way is always pulled
    back. So several steps can be taken on responses that the policy sampled before the first of
    them. In that first one r is 1 and the gradient is REINFORCE's.

    Args:
        clip: ε, how far below 1 the ratio may go, and above 1 if ``clip_high`` is not given.
        clip_high: ε′, how far above 1 it may go.
        average: As in ``PolicyGradientLoss``.
        entropy: As in ``PolicyGradientLoss``.

    Raises:
        UserError: If an argument is out of range.

    Source: arXiv 1707.06347, equation 7; arXiv 2503.14476, section 3.1, for the two ranges.
    """

    formula = "PPO's clipped policy gradient"

    def __init__(
        self,
        clip: float = 0.2,
        clip_high: float | None = None,
        average: Average = "tokens",
        entropy: float = 0.0,
    ) -> None:
        super().__init__(average, entropy)
        if not 0 < clip < 1:
            raise UserError(f"module.loss.clip has to be between 0 and 1, got {clip}")
        if clip_high is not None and not 0 < clip_high < math.inf:
            raise UserError(f"module.loss.clip_high has to be a number above 0, got {clip_high}")
        self.clip = clip
        self.clip_high = clip if clip_high is None else clip_high

    @property
    def objective(self) -> str:
        """The loss in words, for the model card."""
        return f"{super().objective}, ratios in {1 - self.clip:g} … {1 + self.clip_high:g}"

    def terms(self, logprobs: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each token; arguments and result as in ``PolicyGradientLoss.terms``."""
        ratio = torch.exp(logprobs - old)
        plain = -advantages * ratio
        clipped = -advantages * ratio.clamp(1 - self.clip, 1 + self.clip_high)
        return torch.maximum(plain, clipped), clipped > plain
