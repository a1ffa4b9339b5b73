"""Learning from rollouts: what PPO and REINFORCE share."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from helpsteer2.data.packing import PackedBatch
from helpsteer2.data.tokens import RolloutTokens
from helpsteer2.losses.kl_penalty import KLPenalty
from helpsteer2.losses.policy_gradient import PolicyGradientLoss, counted_responses
from helpsteer2.modules.step import Decay, OptimizerFactory, StepModule
from helpsteer2.rollouts.advantages import Advantages
from helpsteer2.rollouts.store import Rollouts

if TYPE_CHECKING:
    from helpsteer2.models.critic import Critic
    from helpsteer2.models.policy import Policy

POLICY_SUMS = ("tokens", "ratio", "clipped", "approx_kl", "entropy")
"""What a ``PolicyGradientLoss`` sums, in the order in which a step adds them up over ranks."""


class OnPolicyModule(StepModule):
    """Trains a policy on responses that it has sampled itself.

    A Trainer epoch is an iteration: the data module makes its rollouts and hands them to
    ``begin_iteration``, then every step of the epoch learns from some of them.

    Args:
        model: The policy.
        loss: The policy gradient.
        advantages: What makes advantages of rewards.
        kl: The penalty on leaving the reference.
        optimizer: Makes the optimizer from parameter groups.
        warmup_steps: Step s (0-based) runs at ``lr · min(1, (s + 1) / warmup_steps)``.
        decay: The rate after the warm-up: ``constant`` as in the paper, or ``linear`` to 0.
        gradient_clip: Largest norm of the policy's gradient; None does not clip.
    """

    loss_names: ClassVar[tuple[str, ...]] = ("policy_loss", "kl_loss")
    model: Policy

    def __init__(
        self,
        model: Policy,
        *,
        loss: PolicyGradientLoss,
        advantages: Advantages,
        kl: KLPenalty,
        optimizer: OptimizerFactory,
        warmup_steps: int = 0,
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
        self.loss, self.advantages, self.kl = loss, advantages, kl
        self.objective = "; ".join(filter(None, (loss.objective, kl.objective)))
        # Expects rewards; of a module that needs one.
        self.critic: Critic | None = None
        self._iteration: Mapping[str, Any] = {}

    def begin_iteration(self, rollouts: Rollouts) -> None:
        """Learn from other rollouts from here on.

        Args:
            rollouts: Those of the iteration that begins, or goes on.
        """
        self._iteration = rollouts.record

    @property
    def kl_coefficient(self) -> float:
        """Price of a nat in this iteration."""
        return float(self._iteration.get("kl_coefficient", self.kl.coefficient))

    def count(self, batch: PackedBatch) -> Tensor:
        """Denominators of the policy gradient and of the KL penalty: ``(2,)`` int64.

        A sum over tokens is divided as the policy gradient is, so that a nat costs its coefficient
        however long responses are; a mean over the tokens of a response by the responses.
        """
        rollout, responses = rollout_of(batch)
        count = self.loss.count(rollout, responses)
        if self.kl.reduction == "sum":
            return torch.stack([count, count])
        return torch.stack([count, counted_responses(rollout, responses)])

    def loss_sums(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """The policy gradient, and the KL penalty if it stands in the loss."""
        rollout, _ = rollout_of(batch)
        tokens = self.model.response_logprobs(batch, entropy=self.loss.entropy > 0)
        loss, sums = self.loss(tokens, rollout)
        penalty, divergence = self.kl.loss_sum(tokens, rollout)
        if self.kl.place == "reward":
            penalty = torch.zeros_like(penalty)
        logged = [*(sums[name] for name in POLICY_SUMS), divergence["k1"]]
        return torch.stack([loss, self.kl_coefficient * penalty]), torch.stack(logged)

    def step_metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """How far the policy is from the one that sampled, and the figures of the iteration.

        Returns:
            Means over learned tokens: ``ratio`` (π over the policy that sampled), ``clip_fraction``
            (share that clipping has stopped), ``approx_kl`` (nats a token from the policy that
            sampled), ``entropy`` (nats a token) and ``kl_per_token`` (k1, nats from the reference).
        """
        tokens, *means = sums
        ratio, clipped, approx_kl, entropy, divergence = (one / max(tokens, 1.0) for one in means)
        return {
            "train/ratio": ratio,
            "train/clip_fraction": clipped,
            "train/approx_kl": approx_kl,
            "train/entropy": entropy,
            "train/kl_per_token": divergence,
            **self._iteration.get("metrics", {}),
        }

    def update(self, optimizer: Optimizer) -> None:
        """Make the step, a smaller one if the policy has gone too far from its reference."""
        with scaled_rates(optimizer, self._iteration.get("rate_factor", 1.0)):
            optimizer.step()

    def validation_columns(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """Not there: every iteration samples anew, and evaluators judge exports."""
        raise NotImplementedError("on-policy training validates on its own samples alone")

    @abstractmethod
    def set_up(self, seed: int) -> None:
        """Make what trains beside the policy, once that is on its device.

        Args:
            seed: Seed of new weights.

        Raises:
            UserError: If it cannot be made.
        """

    def validation_metrics(self, groups: np.ndarray, *columns: np.ndarray) -> dict[str, float]:
        """Not there either."""
        raise NotImplementedError("on-policy training validates on its own samples alone")


def rollout_of(batch: PackedBatch) -> tuple[RolloutTokens[Tensor], Tensor]:
    """Columns of the response tokens of a batch, and the ``(N,)`` response of each.

    Args:
        batch: Made of rollouts.
    """
    assert batch.rollout is not None
    responses = torch.from_numpy(batch.layout.response_tokens.responses)
    return batch.rollout, responses.to(batch.input_ids.device)


@contextlib.contextmanager
def scaled_rates(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Multiply every learning rate, for as long as the block lasts.

    Args:
        optimizer: The optimizer.
        factor: By what.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= factor
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
