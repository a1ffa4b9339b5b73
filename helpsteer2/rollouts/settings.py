"""What an iteration of rollouts is, as configured: the ``rollouts`` of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from helpsteer2.errors import UserError
from helpsteer2.generation.local import LocalEngine
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.rewards.rewarder import Rewarder

AS_IT_IS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""How a policy is sampled if nothing is done to its distribution."""


@dataclass(frozen=True)
class RolloutSettings:
    """How rollouts are made and learned from.

    Args:
        prompts: Prompts of an iteration, each with ``sampling.n`` responses.
        sampling: How to draw. The loss is the gradient of the policy as it is, so the temperature
            is 1 and nothing is cut off.
        rewarder: Opens the reward model, in this process or behind a server.
        engine: Samples in this process, from the weights that train.
        epochs: Passes over the rollouts before the next iteration.
        statistics: File ``statistics.json`` of ``helpsteer2 annotate`` over some data set, by which
            rewards get its mean 0 and standard deviation 1, as in arXiv 2406.08673, section 4.3;
            None takes the weighted scores as they are.
        unfinished: Responses cut by ``sampling.max_tokens``: ``mask`` learns nothing from them (as
            NeMo-Aligner), ``penalise`` takes ``penalty`` from their reward, ``keep`` does neither.
        penalty: What ``penalise`` takes, in units of the reward.
        reference: Folder of the policy that KL divergences are measured from; None is the one that
            training starts from. Of a policy with adapters that is itself without them, so that
            there is no second copy of the weights.
        offload: Keep reference and reward model on the CPU while they are not used.
        watch: Other scorers that rate the rollouts and decide nothing: where their rewards fall
            while the trained one rises, the policy exploits its reward model.
        max_kl: Most KL divergence from the reference, mean over the responses of an iteration, in
            nats a response; None for any.
        beyond_max_kl: Beyond it ``stop`` ends the run; ``shrink`` halves the learning rates from
            there on, again at every iteration that is beyond it.

    Raises:
        UserError: If a value makes no sense.
    """

    prompts: int
    sampling: SamplingParams
    rewarder: Callable[[], Rewarder]
    engine: LocalEngine = field(default_factory=LocalEngine)
    epochs: int = 1
    statistics: str | None = None
    unfinished: Literal["keep", "mask", "penalise"] = "mask"
    penalty: float = 1.0
    reference: str | None = None
    offload: bool = False
    watch: Mapping[str, Callable[[], Rewarder]] = field(default_factory=dict)
    max_kl: float | None = None
    beyond_max_kl: Literal["stop", "shrink"] = "stop"

    def __post_init__(self) -> None:
        for name in ("prompts", "epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"rollouts.{name} has to be 1 or more, got {getattr(self, name)}")
        if self.penalty < 0:
            raise UserError(f"rollouts.penalty has to be 0 or more, got {self.penalty}")
        if self.max_kl is not None and not self.max_kl > 0:
            raise UserError(f"rollouts.max_kl has to be above 0, got {self.max_kl}")
        for name, wanted in AS_IT_IS.items():
            if getattr(self.sampling, name) != wanted:
                raise UserError(
                    f"rollouts.sampling.{name} has to be {wanted:g}: the loss is of the policy as "
                    "it is, not of another distribution that is drawn from"
                )
