"""Runs of ``helpsteer2 train`` on the world: where they arrive, and where they should."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch

from experiments.benchmarks.exact_optima.theory import (
    driven_out,
    in_the_loss,
    priced_by_length,
    tilted,
    total_variation,
)
from experiments.benchmarks.exact_optima.world import (
    SHAPE,
    Array,
    FixedRewards,
    OnePrompt,
    Responses,
    write_tokenizer,
)
from helpsteer2.callbacks.checkpoints import Cadence
from helpsteer2.commands.train import train
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.datamodule import Batching
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.tokenizer import PretrainedTokenizer
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.losses.kl_penalty import KLPenalty
from helpsteer2.losses.policy_gradient import ClippedLoss, PolicyGradientLoss
from helpsteer2.losses.value import ValueLoss
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.critic import CriticStart
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec
from helpsteer2.models.start import PolicyStart
from helpsteer2.modules.ppo import PPOModule
from helpsteer2.modules.reinforce import ReinforceModule
from helpsteer2.modules.step import StepModule
from helpsteer2.rollouts.advantages import GAE, AgainstBaseline
from helpsteer2.rollouts.settings import RolloutSettings

LIMITS = LengthLimits(max_prompt_tokens=8, max_response_tokens=8)

SAMPLES = 32
"""Responses to each copy of the prompt."""


@dataclass(frozen=True)
class Run:
    """A training, one optimizer step an iteration; learning rates fall to 0.

    Args:
        algorithm: ``ppo``, or ``reinforce`` with leave-one-out.
        kl: The penalty.
        longest: Tokens of a response.
        iterations: How many.
        copies: Of the prompt, each with 32 responses.
        lr: Rate of the policy at the start.
        critic_lr: Rate of PPO's critic at the start.
        advantages: Of PPO.
        seed: Of weights and samples.
    """

    algorithm: Literal["ppo", "reinforce"]
    kl: KLPenalty = KLPenalty(coefficient=0.0)  # noqa: RUF009 – frozen
    longest: int = 2
    iterations: int = 100
    copies: int = 4
    lr: float = 0.003
    critic_lr: float = 0.01
    advantages: GAE = GAE(lam=1.0, whiten=False)  # noqa: RUF009 – frozen
    seed: int = 1

    def module(self) -> partial[StepModule]:
        """What makes the LightningModule around the policy."""
        # Short memories: what the first steps were like says little of the last ones.
        optimizer = partial(
            torch.optim.AdamW, lr=self.lr, betas=(0.8, 0.98), weight_decay=0.0, fused=True
        )
        if self.algorithm == "reinforce":
            return partial(
                ReinforceModule,
                loss=PolicyGradientLoss(),
                advantages=AgainstBaseline("leave_one_out"),
                kl=self.kl,
                optimizer=optimizer,
                decay="linear",
            )
        return partial(
            PPOModule,
            loss=ClippedLoss(),
            value_loss=ValueLoss(clip=None),
            advantages=self.advantages,
            kl=self.kl,
            critic=CriticStart(),
            critic_lr=self.critic_lr,
            optimizer=optimizer,
            decay="linear",
        )

    def train(self, folder: Path) -> Policy:
        """Run it as the command does, and read the policy that it exports.

        Args:
            folder: Gets the run.
        """
        arguments: dict[str, Any] = {
            "run_dir": str(folder / "run"),
            "seed": self.seed,
            "model": PolicyStart(),
            "backbone": backbone(folder),
            "data": OnePrompt(self.copies),
            "chat": ChatFormat(),
            "lengths": LIMITS,
            "batching": Batching(self.copies, 2**16, max_steps=self.iterations),
            "attributes": [],
            "module": self.module(),
            "trainer": partial(pl.Trainer, accelerator="cpu", devices=1, precision="32-true"),
            "schedule": Cadence(validate_every=None, checkpoint_every=self.iterations),
            "cache_dir": str(folder / "cache"),
            "rollouts": RolloutSettings(
                prompts=self.copies,
                sampling=SamplingParams(n=SAMPLES, max_tokens=self.longest),
                rewarder=FixedRewards,
                unfinished="keep",
            ),
        }
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train(**arguments)
            return Policy.from_pretrained(folder / "run" / "export")[0]

    def destination(self, responses: Responses, reference: Array, rewards: Array) -> Array | None:
        """``(R,)`` probabilities that theory has the policy arrive at; None if it cannot tell.

        Args:
            responses: All responses.
            reference: ``(S, V)`` log-probabilities of the policy at the start.
            rewards: ``(R,)``.
        """
        kl, whole = self.kl, responses.logprobs(reference)
        if kl.place == "loss":
            return in_the_loss(responses, reference, rewards, kl.coefficient, kl.estimator)
        if kl.coefficient == 0 or kl.estimator != "k1":
            return None
        if kl.reduction == "mean":
            return priced_by_length(whole, rewards, responses.lengths, kl.coefficient)
        return tilted(whole, rewards, kl.coefficient)


def backbone(folder: Path) -> Backbone:
    """The decoder that all runs start from, with its tokenizer.

    Args:
        folder: Gets the tokenizer.
    """
    tokenizer = PretrainedTokenizer(write_tokenizer(folder / "tokenizer"))
    return Backbone(tokenizer, init="random", config=SHAPE)


def start(folder: Path, seed: int) -> Policy:
    """The policy that a run of this seed starts from.

    Args:
        folder: Gets the tokenizer.
        seed: Of the run.
    """
    decoder = backbone(folder)
    tokenizer = decoder.tokenizer.build(lambda: iter(()), folder)
    spec = PolicySpec(ChatFormat().bind(tokenizer), LIMITS, "random llama")
    return Policy(decoder.build(tokenizer, seed, lm_head=True), spec).eval()


@dataclass(frozen=True)
class Arrival:
    """Where a run has come to; distances are total variations over all responses.

    Attributes:
        start_reward: Expected reward of the policy at the start.
        reward: Expected reward of the trained one.
        best_reward: Largest reward of a response.
        to_destination: From the trained policy to where theory has it arrive; None if that is not
            known.
        to_optimum: From the trained policy to π_ref·exp(r/β); None without a penalty.
        start_to_optimum: From the policy at the start; None likewise.
        destination_to_optimum: From where theory has it arrive; None if there is none of the two.
        driven_out: Share of the reference on responses that are as good as gone.
    """

    start_reward: float
    reward: float
    best_reward: float
    to_destination: float | None
    to_optimum: float | None
    start_to_optimum: float | None
    destination_to_optimum: float | None
    driven_out: float

    @property
    def share_of_best(self) -> float:
        """Expected reward over the largest one; rewards are 0 to 1."""
        return self.reward / self.best_reward


def arrive(run: Run, folder: Path) -> Arrival:
    """Train, and measure by enumeration.

    Args:
        run: The training.
        folder: Gets it; has to be empty.
    """
    responses = Responses(run.longest)
    rewards = responses.rewards(FixedRewards())
    table = responses.table(start(folder, run.seed))
    reference = np.exp(responses.logprobs(table))
    trained = np.exp(responses.logprobs(responses.table(run.train(folder))))
    destination = run.destination(responses, table, rewards)
    optimum = None
    if run.kl.coefficient:
        optimum = tilted(responses.logprobs(table), rewards, run.kl.coefficient)
    return Arrival(
        start_reward=float(reference @ rewards),
        reward=float(trained @ rewards),
        best_reward=float(rewards.max()),
        to_destination=_distance(trained, destination),
        to_optimum=_distance(trained, optimum),
        start_to_optimum=_distance(reference, optimum),
        destination_to_optimum=_distance(destination, optimum),
        driven_out=driven_out(trained, reference),
    )


def _distance(p: Array | None, q: Array | None) -> float | None:
    """Total variation, if both are there."""
    return None if p is None or q is None else total_variation(p, q)
