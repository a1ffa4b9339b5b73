"""How much each token of the rollouts is worth: by a critic, or against the other responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

from helpsteer2.errors import UserError
from helpsteer2.functional.advantages import gae, group_normalised, leave_one_out

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ResponseRewards:
    """What the responses of an iteration have earned.

    Attributes:
        rewards: ``(G, k)`` rewards, without any KL penalty.
        penalties: ``(G, k)`` KL penalties, coefficient included; 0 if the loss has them instead.
        counted: ``(G, k)`` bool, which responses are learned from.
    """

    rewards: Array
    penalties: Array
    counted: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TokenBlock:
    """The tokens of some prompts in a row.

    Attributes:
        prompts: Which of the G prompts.
        lengths: ``(R,)`` tokens of each response.
        penalties: ``(N,)`` KL penalty of each token, coefficient included.
        values: ``(N,)`` what the critic expected before each token; None without a critic.
    """

    prompts: slice
    lengths: npt.NDArray[np.int64]
    penalties: Array
    values: Array | None


class Advantages(Protocol):
    """Turns what responses have earned into advantages of their tokens."""

    @property
    def whiten(self) -> bool:
        """Whether an iteration's advantages are brought to mean 0 and standard deviation 1."""
        ...

    needs_critic: ClassVar[bool]

    def __call__(self, earned: ResponseRewards, block: TokenBlock) -> tuple[Array, Array | None]:
        """Advantages ``(N,)`` of the tokens of a block, and the returns a critic shall learn."""
        ...


@dataclass(frozen=True)
class GAE:
    """Generalised advantage estimation: the reward comes with the last token of a response.

    Each token costs its KL penalty, and the critic's values say what was expected. Behind the last
    token there is nothing more to earn, whether the response was finished or cut.

    Args:
        gamma: γ, 1 in RLHF: a reward is worth the same whenever it comes.
        lam: λ: 1 gives reward-to-go minus value, 0 the one-step error.
        whiten: Bring the advantages of the iteration's learned tokens to mean 0 and standard
            deviation 1.

    Raises:
        UserError: If γ or λ is not from 0 to 1.

    Source: arXiv 1506.02438; defaults of NVIDIA/NeMo-Aligner at af2b3bd9, gpt_ppo_actor.yaml.
    """

    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True

    needs_critic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"module.advantages.{name} has to be 0 to 1")

    def __call__(self, earned: ResponseRewards, block: TokenBlock) -> tuple[Array, Array | None]:
        """Advantages and returns, both ``(N,)``."""
        assert block.values is not None
        rewards = -block.penalties
        rewards[np.cumsum(block.lengths) - 1] += earned.rewards[block.prompts].reshape(-1)
        advantages = gae(rewards, block.values, block.lengths, gamma=self.gamma, lam=self.lam)
        return advantages, advantages + block.values


@dataclass(frozen=True)
class AgainstBaseline:
    """The reward of a whole response less its KL penalty, against a baseline: no critic.

    Every token of a response has the same advantage.

    Args:
        baseline: What is taken from the reward: nothing, the mean over the iteration's responses,
            or the mean over the other responses to the same prompt (RLOO). Responses that are
            masked count in no mean.
        normalise: Divide by the standard deviation of the prompt's responses, after taking their
            mean away (GRPO); the baseline has to be ``leave_one_out``, whose advantages differ
            from those by a factor alone.
        whiten: Bring the advantages of the iteration's learned tokens to mean 0 and standard
            deviation 1.

    Raises:
        UserError: If ``normalise`` goes with another baseline.

    Source: arXiv 2402.14740 (RLOO); arXiv 2410.01257 (leave one out of 4); arXiv 2402.03300 (GRPO).
    """

    baseline: Literal["none", "batch_mean", "leave_one_out"] = "leave_one_out"
    normalise: bool = False
    whiten: bool = False

    needs_critic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.normalise and self.baseline != "leave_one_out":
            raise UserError(
                f"module.advantages.normalise compares the responses to one prompt, which baseline="
                f"{self.baseline} does not: set module.advantages.baseline=leave_one_out"
            )

    def __call__(self, earned: ResponseRewards, block: TokenBlock) -> tuple[Array, Array | None]:
        """Advantages ``(N,)``, and no returns."""
        of_responses = self.of_responses(earned)[block.prompts].reshape(-1)
        return np.repeat(of_responses, block.lengths), None

    def of_responses(self, earned: ResponseRewards) -> Array:
        """``(G, k)`` advantages of whole responses."""
        totals = earned.rewards - earned.penalties
        if self.normalise:
            return group_normalised(totals, earned.counted)
        if self.baseline == "leave_one_out":
            return totals - leave_one_out(totals, earned.counted)
        if self.baseline == "batch_mean" and earned.counted.any():
            return np.asarray(totals - totals[earned.counted].mean())
        return totals
