"""What a critic learns: the return to expect before each token."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from helpsteer2.data.tokens import RolloutTokens
from helpsteer2.errors import UserError


class ValueLoss:
    """``½·max((V − R)², (V_clipped − R)²)`` of every counted token; the others weigh nothing.

    V_clipped is V held within ``clip`` of what the critic said when the responses were sampled: a
    value that has moved further than that towards R teaches nothing more. Over an optimizer step
    the loss is the sum over all micro-batches of all ranks, divided by the counted tokens.

    Args:
        clip: How far a value may move in an iteration, in units of the return; None lets it go.

    Raises:
        UserError: If ``clip`` is not a positive number.

    Source: the implementation of arXiv 1707.06347 in openai/baselines (ppo2); the same in
    huggingface/trl 1.12 (ppo_trainer.py) and NVIDIA/NeMo-Aligner, which halve it and take the mean
    over tokens too.
    """

    def __init__(self, clip: float | None = 0.2) -> None:
        if clip is not None and not 0 < clip < math.inf:
            raise UserError(
                f"module.value_loss.clip has to be a number above 0, or null, got {clip}"
            )
        self.clip = clip

    @property
    def objective(self) -> str:
        """The loss in words, for the model card."""
        held = "" if self.clip is None else f", values clipped to ±{self.clip:g} of the old ones"
        return f"half the squared error of the critic's values{held}"

    def count(self, rollout: RolloutTokens[Tensor]) -> Tensor:
        """Number of counted tokens, the denominator of the loss: ``()`` int64."""
        return rollout.counted.sum()

    def __call__(
        self, values: Tensor, rollout: RolloutTokens[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the losses of the counted tokens, whatever autocast says.

        What stands at the other tokens reaches neither loss nor gradient, not even a NaN.

        Args:
            values: ``(N,)`` float32, what the critic expects before each response token.
            rollout: Columns of the same tokens, with old values and returns.

        Returns:
            The loss sum ``()`` float32, and detached float32 sums over the counted tokens:
            ``tokens`` (how many), ``clipped`` (tokens whose loss is that of the clipped value and
            larger than that of the value itself: they have no gradient), ``squared_error``
            ((V − R)²), ``returns`` (R) and ``squared_returns`` (R²).

        Raises:
            ValueError: If the rollout has no values and returns.
        """
        if rollout.values is None or rollout.returns is None:
            raise ValueError("these responses were sampled without a critic")
        counted = rollout.counted
        zero = torch.zeros_like(values)
        with torch.autocast(counted.device.type, enabled=False):
            new = torch.where(counted, values, zero)
            old = torch.where(counted, rollout.values, zero)
            returns = torch.where(counted, rollout.returns, zero)
            errors = (new - returns).square()
            losses, stopped = errors, torch.zeros_like(counted)
            if self.clip is not None:
                # Not old + clamp(new − old), which would round values that are within the range.
                held = new.clamp(old - self.clip, old + self.clip)
                of_held = (held - returns).square()
                losses, stopped = torch.maximum(errors, of_held), of_held > errors
            sums = {
                "tokens": counted.sum(),
                "clipped": stopped.sum(),
                "squared_error": errors.detach().sum(),
                "returns": returns.sum(),
                "squared_returns": returns.square().sum(),
            }
            loss = losses.sum() / 2
        return loss, {name: value.float() for name, value in sums.items()}


def explained_variance(sums: Mapping[str, float]) -> float:
    """Share of the variance of the returns that a critic explains.

    Args:
        sums: What ``ValueLoss`` sums over at least one token.

    Returns:
        1 for a critic that is always right, 0 for one that always says the mean of the returns,
        below 0 for a worse one; NaN if the returns are all the same.
    """
    spread = sums["squared_returns"] - sums["returns"] ** 2 / sums["tokens"]
    # What is left of equal returns after subtracting fp32 sums is rounding.
    if spread <= 1e-6 * sums["squared_returns"]:
        return math.nan
    return 1 - sums["squared_error"] / spread
