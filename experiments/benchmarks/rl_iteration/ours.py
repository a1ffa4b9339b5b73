"""Contender: this project's on-policy training, one iteration a turn."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch

from experiments.benchmarks.reward_step.job import LIMITS
from experiments.benchmarks.reward_step.turns import Turns
from experiments.benchmarks.rl_iteration.job import SEED, Job
from helpsteer2.attributes import AttributeWeights
from helpsteer2.callbacks.checkpoints import Cadence
from helpsteer2.commands.train import train
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.datamodule import Batching
from helpsteer2.data.groups import Group, Message
from helpsteer2.data.sources.group_files import GroupFiles, write_groups
from helpsteer2.data.tokenizer import PretrainedTokenizer
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.losses.kl_penalty import KLPenalty
from helpsteer2.losses.policy_gradient import ClippedLoss, PolicyGradientLoss
from helpsteer2.losses.value import ValueLoss
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.critic import CriticStart
from helpsteer2.models.start import PolicyStart
from helpsteer2.modules.on_policy import OnPolicyModule
from helpsteer2.modules.ppo import PPOModule
from helpsteer2.modules.reinforce import ReinforceModule
from helpsteer2.rewards.scorer import RewardScorer
from helpsteer2.rollouts.advantages import GAE, AgainstBaseline
from helpsteer2.rollouts.datamodule import RolloutDataModule
from helpsteer2.rollouts.prompts import Prompts
from helpsteer2.rollouts.settings import RolloutSettings

PHASES = {"sampling": "sampling", "scoring": "scoring", "log-probs": "logprobs"}
"""Stages of the rollouts, by the names that all contenders use; PPO's values are in the last."""

TOKENS_PER_MICROBATCH = 8192

WEIGHTS = AttributeWeights("uniform", dict.fromkeys(("helpfulness", "correctness"), 1.0))


def run(job: Job, turns: Turns) -> None:
    """Run ``helpsteer2 train module=reinforce`` (``rloo``) or ``module=ppo``, one iteration a turn.

    The time of an iteration holds all that a user waits for: the checkpoint at its end, too.

    Args:
        job: What is done.
        turns: The turns.
    """
    prompts = len(job.prompts[0])
    path = job.folder / "prompts" / "train.jsonl"
    groups = _prompts(job)
    write_groups(path, groups, ())

    def of_iteration(self: Prompts, iteration: int) -> list[Group]:
        return groups[iteration * prompts : (iteration + 1) * prompts]

    # All contenders answer the same prompts in each iteration.
    Prompts.of_iteration = of_iteration  # type: ignore[method-assign]
    train(
        run_dir=str(job.folder / "ours"),
        seed=SEED,
        model=PolicyStart(),
        backbone=Backbone(PretrainedTokenizer(str(job.policy)), path=str(job.policy)),
        data=GroupFiles(str(path)),
        chat=ChatFormat(),
        lengths=LIMITS,
        batching=Batching(
            global_batch=prompts // job.minibatches,
            tokens_per_microbatch=TOKENS_PER_MICROBATCH,
            max_steps=len(job.prompts) * job.epochs * job.minibatches,
        ),
        attributes=[],
        module=_module(job),
        trainer=partial(pl.Trainer, accelerator="cpu", devices=1, callbacks=[_Turn(turns, job)]),
        schedule=Cadence(validate_every=None, checkpoint_every=10**9),
        cache_dir=str(job.folder / "cache"),
        weights=WEIGHTS,
        rollouts=RolloutSettings(
            prompts=prompts,
            sampling=SamplingParams(n=job.samples, max_tokens=job.max_tokens),
            rewarder=partial(RewardScorer.from_pretrained, job.reward_model, device="cpu"),
            epochs=job.epochs,
            unfinished="keep",
        ),
    )


def _prompts(job: Job) -> list[Group]:
    """The prompts as text again, which takes a few tokens more in a chat template."""
    tokenizer = PretrainedTokenizer(str(job.policy)).build(lambda: iter(()), str(job.folder))
    texts = [
        tokenizer.decode(ids, skip_special_tokens=True) for batch in job.prompts for ids in batch
    ]
    return [
        Group(f"prompt-{i}", "prompts", (Message(role="user", content=text),), ("",))
        for i, text in enumerate(texts)
    ]


def _module(job: Job) -> partial[OnPolicyModule]:
    optimizer = partial(torch.optim.AdamW, lr=job.learning_rate, fused=True)
    kl = KLPenalty(job.kl_coefficient)
    if job.kind == "rloo":
        loss, advantages = PolicyGradientLoss(), AgainstBaseline()
        return partial(
            ReinforceModule, loss=loss, advantages=advantages, kl=kl, optimizer=optimizer
        )
    return partial(
        PPOModule,
        loss=ClippedLoss(),
        value_loss=ValueLoss(),
        advantages=GAE(),
        kl=kl,
        critic=CriticStart(str(job.reward_model)),
        optimizer=optimizer,
        critic_lr=job.learning_rate,
    )


class _Turn(pl.Callback):
    """A turn ends with the last optimizer step of an iteration."""

    def __init__(self, turns: Turns, job: Job) -> None:
        self._turns, self._job = turns, job

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the first turn."""
        self._turns.wait_first()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Report an iteration that is complete."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, RolloutDataModule)
        if trainer.global_step % data.steps_per_iteration == 0:
            self._turns.end(partial(self._details, data))

    def _details(self, data: RolloutDataModule) -> dict[str, Any]:
        rollouts = data.rollouts
        assert rollouts is not None
        lengths = [len(ids) for group in rollouts.groups() for ids in group.response_ids or ()]
        seconds = rollouts.record["seconds"]
        return {
            "samples": len(lengths),
            "completion_tokens": sum(lengths),
            "prompt_tokens": int(rollouts.lengths.sum()) - sum(lengths),
            "ended": sum(length < self._job.max_tokens for length in lengths),
            "phases": {name: seconds.get(stage, 0.0) for stage, name in PHASES.items()},
        }
