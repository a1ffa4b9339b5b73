"""PPO: a clipped policy gradient, and a critic that learns what to expect at every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from helpsteer2.data.packing import PackedBatch
from helpsteer2.errors import UserError
from helpsteer2.losses.kl_penalty import KLPenalty
from helpsteer2.losses.policy_gradient import ClippedLoss
from helpsteer2.losses.value import ValueLoss, explained_variance
from helpsteer2.models.critic import Critic, CriticStart
from helpsteer2.modules.on_policy import OnPolicyModule, rollout_of
from helpsteer2.modules.step import Decay, OptimizerFactory, clip_norm, decay_groups, rate_factor
from helpsteer2.rollouts.advantages import GAE

if TYPE_CHECKING:
    from helpsteer2.models.policy import Policy

VALUE_SUMS = ("tokens", "clipped", "squared_error", "returns", "squared_returns")
"""What ``ValueLoss`` sums, in the order in which a step adds them up over ranks."""


class PPOModule(OnPolicyModule):
    """Trains a policy and its critic side by side, in one optimizer.

    Args:
        model: The policy.
        loss: The clipped policy gradient.
        value_loss: What the critic learns.
        advantages: Generalised advantage estimation.
        kl: The penalty on leaving the reference.
        critic: What the critic starts from.
        optimizer: Makes the optimizer from parameter groups; its rate is the policy's.
        critic_lr: The critic's learning rate.
        critic_first_steps: In so many steps at the beginning the critic learns alone.
        warmup_steps: Policy and critic warm up over so many steps, each from its own first one.
        critic_warmup_steps: Likewise of the critic; None for the policy's.
        decay: The rates after the warm-up: ``constant`` as in the paper, or ``linear`` to 0.
        gradient_clip: Largest norm of the policy's gradient; None does not clip.
        critic_gradient_clip: Of the critic's.

    Raises:
        UserError: If a value is out of range.

    Source: arXiv 1707.06347; arXiv 2203.02155 (per-token KL penalty, critic from the reward model);
    defaults of NVIDIA/NeMo-Aligner at af2b3bd9, gpt_ppo_actor.yaml and gpt_ppo_critic.yaml.
    """

    loss_names: ClassVar[tuple[str, ...]] = (*OnPolicyModule.loss_names, "value_loss")

    def __init__(
        self,
        model: Policy,
        *,
        loss: ClippedLoss,
        value_loss: ValueLoss,
        advantages: GAE,
        kl: KLPenalty,
        critic: CriticStart,
        optimizer: OptimizerFactory,
        critic_lr: float,
        critic_first_steps: int = 0,
        warmup_steps: int = 0,
        critic_warmup_steps: int | None = None,
        decay: Decay = "constant",
        gradient_clip: float | None = 1.0,
        critic_gradient_clip: float | None = 1.0,
    ) -> None:
        if critic_first_steps < 0 or not critic_lr > 0:
            raise UserError(
                "module.critic_first_steps has to be 0 or more and module.critic_lr above 0, got "
                f"{critic_first_steps} and {critic_lr}"
            )
        if critic_warmup_steps is not None and critic_warmup_steps < 0:
            raise UserError(
                f"module.critic_warmup_steps has to be 0 or more, got {critic_warmup_steps}"
            )
        super().__init__(
            model,
            loss=loss,
            advantages=advantages,
            kl=kl,
            optimizer=optimizer,
            warmup_steps=warmup_steps,
            decay=decay,
            gradient_clip=gradient_clip,
        )
        self.value_loss, self.critic_start = value_loss, critic
        self.critic_lr, self.critic_first_steps = critic_lr, critic_first_steps
        self.critic_warmup_steps = critic_warmup_steps
        self.critic_gradient_clip = critic_gradient_clip
        self.objective += f"; {value_loss.objective}"

    def set_up(self, seed: int) -> None:
        """Make the critic."""
        self.critic = self.critic_start.build(self.model, seed)

    @property
    def _critic(self) -> Critic:
        assert self.critic is not None
        return self.critic

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The policy's groups at the optimizer's rate, the critic's at their own."""
        of_critic = [{**group, "lr": self.critic_lr} for group in decay_groups(self._critic)]
        return [*decay_groups(self.model), *({**group, "critic": True} for group in of_critic)]

    def rate_factor(self, group: dict[str, Any], step: int) -> float:
        """Each part warms up from its own first step."""
        total, warmup = self.trainer.max_steps, self.warmup_steps
        if not group.get("critic"):
            # The decay is that of the whole run.
            start = self.critic_first_steps
            warm = rate_factor(max(step - start, 0), warmup, "constant", total)
            return warm * rate_factor(step, 0, self.decay, total)
        if self.critic_warmup_steps is not None:
            warmup = self.critic_warmup_steps
        return rate_factor(step, warmup, self.decay, total)

    def count(self, batch: PackedBatch) -> Tensor:
        """Denominators of the policy gradient, the KL penalty and the values: ``(3,)`` int64."""
        rollout, _ = rollout_of(batch)
        return torch.cat([super().count(batch), self.value_loss.count(rollout).reshape(1)])

    def loss_sums(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """The policy's losses, then the critic's."""
        losses, logged = super().loss_sums(batch)
        value_loss, sums = self.value_loss(self._critic(batch), rollout_of(batch)[0])
        of_values = torch.stack([sums[name] for name in VALUE_SUMS])
        return torch.cat([losses, value_loss.reshape(1)]), torch.cat([logged, of_values])

    def step_metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """As in ``OnPolicyModule``, and of the critic.

        Returns:
            Also ``value_error`` (mean squared error), ``value_clip_fraction`` and
            ``explained_variance`` (share of the variance of the returns; left out if they are all
            the same).
        """
        n = len(VALUE_SUMS)
        values = dict(zip(VALUE_SUMS, sums[-n:], strict=True))
        tokens = max(values["tokens"], 1.0)
        explained = explained_variance(values) if values["tokens"] else float("nan")
        return {
            **super().step_metrics(sums[:-n]),
            "train/value_error": values["squared_error"] / tokens,
            "train/value_clip_fraction": values["clipped"] / tokens,
            **({} if explained != explained else {"train/explained_variance": explained}),
        }

    def clip_gradients_of_step(self) -> dict[str, float]:
        """Policy and critic apart."""
        if self.global_step < self.critic_first_steps:
            # Not zero: an optimizer leaves alone what has no gradient, its moments included.
            for parameter in self.model.parameters():
                parameter.grad = None
        return {
            "train/grad_norm": clip_norm(self.model, self.gradient_clip),
            "train/critic_grad_norm": clip_norm(self._critic, self.critic_gradient_clip),
        }
