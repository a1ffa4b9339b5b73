"""What it costs a policy to go away from its reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from helpsteer2.data.tokens import RolloutTokens
from helpsteer2.errors import UserError
from helpsteer2.functional.kl import KLEstimator, kl_estimate
from helpsteer2.functional.logprobs import TokenLogprobs

Reduction = Literal["sum", "mean"]
"""How the estimates of a response's tokens become its penalty."""

Place = Literal["reward", "loss"]
"""Where the penalty stands: taken off the rewards, or added to the loss."""


@dataclass(frozen=True)
class KLPenalty:
    """Coefficient × the sum, or the mean, of the divergence at the tokens of a response.

    Taken off the rewards, the penalty is a number: the policy gradient makes later tokens' penalty
    count for the earlier ones, so it descends KL(π ‖ π_ref) of whole responses with ``k1``. Added
    to the loss it is differentiated: each token answers for the distribution that it was chosen
    from, not for where it leads, and the estimators descend different divergences
    (``kl_estimate``).

    ``token_penalties`` and ``loss_sum`` leave out the coefficient, since an adaptive one changes.

    Args:
        coefficient: Price of one nat, in units of the reward; the first one if it is adaptive.
        estimator: Of KL(π ‖ π_ref) at a token.
        reduction: NeMo-Aligner's PPO takes the sum, its REINFORCE the mean over tokens.
        place: Where the penalty stands.
        target: Nats a response that an adaptive coefficient aims at; None keeps it.
        horizon: Responses over which an adaptive coefficient changes by at most a fifth.

    Raises:
        UserError: If an argument is out of range, or two of them do not go together.

    Source: arXiv 1909.08593, equation 2; arXiv 2402.03300, equation 4 (``k3`` in the loss);
    NVIDIA/NeMo-Aligner, ppo_utils.py and reinforce.py.
    """

    coefficient: float = 0.01
    estimator: KLEstimator = "k1"
    reduction: Reduction = "sum"
    place: Place = "reward"
    target: float | None = None
    horizon: int = 10_000

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("estimator", self.estimator, get_args(KLEstimator)),
            ("reduction", self.reduction, get_args(Reduction)),
            ("place", self.place, get_args(Place)),
        ):
            if value not in allowed:
                raise UserError(
                    f"module.kl.{name} has to be one of {', '.join(allowed)}, got {value}"
                )
        if not 0 <= self.coefficient < math.inf:
            raise UserError(
                f"module.kl.coefficient has to be a number of 0 or more, got {self.coefficient}"
            )
        if self.place == "loss" and self.estimator == "k1":
            raise UserError(
                "module.kl.estimator=k1 cannot stand in the loss, where its gradient is 0 in "
                "expectation: take module.kl.estimator=k2, or module.kl.place=reward"
            )
        if self.horizon < 1:
            raise UserError(f"module.kl.horizon has to be 1 or more, got {self.horizon}")
        if self.target is None:
            return
        if not 0 < self.target < math.inf:
            raise UserError(
                f"module.kl.target has to be a number above 0, or null, got {self.target}"
            )
        if self.coefficient == 0:
            raise UserError(
                "module.kl.target adapts module.kl.coefficient by a factor, and 0 stays 0: begin "
                "with a coefficient above 0"
            )

    @property
    def objective(self) -> str:
        """The penalty in words, for the model card; empty if there is none."""
        if self.coefficient == 0:
            return ""
        adaptive = "" if self.target is None else f", adapted to {self.target:g} nats a response"
        return (
            f"KL penalty of {self.coefficient:g} × the {self.reduction} of {self.estimator} over "
            f"the tokens, in the {self.place}{adaptive}"
        )

    def token_penalties(
        self, log_ratio: npt.ArrayLike, lengths: npt.ArrayLike
    ) -> npt.NDArray[np.float64]:
        """Penalty of each token, without the coefficient; those of a response add up to its own.

        Args:
            log_ratio: ``(N,)`` log π − log π_ref in nats, response after response.
            lengths: ``(R,)`` tokens of each response, N in all; a response may have none.

        Returns:
            ``(N,)`` nats.

        Raises:
            ValueError: If the lengths do not fit.
        """
        ratios, n = np.asarray(log_ratio, np.float64), np.asarray(lengths, np.int64)
        if len(ratios) != n.sum():
            raise ValueError(f"{len(ratios)} log-ratios for responses of {n.sum()} tokens")
        estimates = kl_estimate(ratios, self.estimator)
        return estimates if self.reduction == "sum" else estimates / np.repeat(n, n)

    def loss_sum(
        self, tokens: TokenLogprobs, rollout: RolloutTokens[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the penalties of the responses, without the coefficient, to be differentiated.

        Over an optimizer step a sum over tokens is divided by what the policy gradient is divided
        by, means by the responses that have a counted token. The tokens that do not count reach
        neither loss nor gradient, not even as a NaN.

        Args:
            tokens: What the policy says of N response tokens.
            rollout: Columns of the same tokens.

        Returns:
            The sum ``()`` float32 in nats, and detached float32 sums over the counted tokens:
            ``k1`` and ``k3``, two estimates of KL(π ‖ π_ref) whichever is trained on, in nats.
        """
        counted = rollout.counted
        zero = torch.zeros_like(tokens.logprobs)
        with torch.autocast(counted.device.type, enabled=False):
            new = torch.where(counted, tokens.logprobs, zero)
            log_ratio = new - torch.where(counted, rollout.ref_logprobs, zero)
            penalties = kl_estimate(log_ratio, self.estimator)
            if self.reduction == "mean":
                lengths = tokens.sum_by_response(counted).clamp(min=1)
                penalties = penalties / lengths[tokens.responses]
            log_ratio = log_ratio.detach()
            sums = {"k1": log_ratio.sum(), "k3": kl_estimate(log_ratio, "k3").sum()}
        return penalties.sum(), {name: value.float() for name, value in sums.items()}

    def next_coefficient(self, coefficient: float, kl: float, samples: int) -> float:
        """Coefficient of the next iteration: more if the policy has gone too far, or else less.

        Args:
            coefficient: That of the iteration.
            kl: Mean over its responses of the sum of ``k1`` over their tokens, in nats.
            samples: Its responses. More of them than the horizon change as much as the horizon, so
                that the factor never leaves 0.8 … 1.2.

        Returns:
            The same coefficient if there is no target.

        Source: arXiv 1909.08593, section 2.2; ``AdaptiveKLController`` in huggingface/trl 0.11.
        """
        if self.target is None:
            return coefficient
        error = float(np.clip(kl / self.target - 1, -0.2, 0.2))
        return coefficient * (1 + error * min(1.0, samples / self.horizon))
