"""On-policy training as a LightningDataModule: an epoch is an iteration of rollouts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import cast

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from helpsteer2.data.datamodule import Batching, StepStream, row_multiple
from helpsteer2.data.packing import PackedBatch
from helpsteer2.data.planner import StepPlan
from helpsteer2.errors import UserError
from helpsteer2.functional.sampling import stream_key
from helpsteer2.generation.local import LocalSampler
from helpsteer2.models.attention import AttentionChoice
from helpsteer2.rollouts.maker import Learner, Ranks, Report, RolloutMaker
from helpsteer2.rollouts.reference import ReferencePolicy
from helpsteer2.rollouts.store import Rollouts

logger = logging.getLogger(__name__)


class RolloutDataModule(pl.LightningDataModule):
    """Makes the rollouts of an iteration where its epoch begins, and cuts them into steps.

    What an epoch holds is decided by the number of steps done and by what lies on the disk. So a
    run goes on from any checkpoint: rollouts that are there are learned from further, others are
    made from the weights of the checkpoint, which then is that of an iteration's start.

    Args:
        maker: Makes iterations.
        batching: How groups become steps; an epoch of it is a pass over the prompts.
        seed: Seed of the order.
        longest_prompt_tokens: Tokens of the longest prompt.
        report: Told how far an iteration is.

    Attributes:
        steps_per_iteration: Optimizer steps of an iteration.
        total_steps: Of the run.
        rollouts: Those of the current iteration, None before the first one.

    Raises:
        UserError: If an iteration's rollouts are no whole number of steps, or the run would have no
            step.
    """

    def __init__(
        self,
        maker: RolloutMaker,
        batching: Batching,
        seed: int,
        longest_prompt_tokens: int,
        report: Report = lambda stage, done, total: None,
    ) -> None:
        super().__init__()
        self.maker, self.batching, self.seed, self.report = maker, batching, seed, report
        self.longest_prompt_tokens = longest_prompt_tokens
        settings = maker.settings
        if settings.prompts % batching.global_batch:
            raise UserError(
                f"rollouts.prompts={settings.prompts} are no whole number of steps of "
                f"batching.global_batch={batching.global_batch} prompts: choose a multiple"
            )
        self.steps_per_iteration = settings.prompts * settings.epochs // batching.global_batch
        self.total_steps = self._total_steps()
        self.rollouts: Rollouts | None = None

    def _total_steps(self) -> int:
        if self.batching.max_steps is not None:
            return self.batching.max_steps
        if self.batching.epochs is None:
            raise UserError("batching: give epochs or max_steps")
        iterations = int(self.batching.epochs * self.maker.prompts.iterations_per_pass)
        if iterations == 0:
            raise UserError(
                f"batching: {self.batching.epochs} passes over {len(self.maker.prompts.groups)} "
                f"prompts are less than one iteration of rollouts.prompts="
                f"{self.maker.settings.prompts}: lower it"
            )
        return iterations * self.steps_per_iteration

    def start_from(
        self, learner: Learner, device: torch.device, attention: AttentionChoice
    ) -> None:
        """Make what the learner needs beside the policy, before its first step.

        Args:
            learner: With the policy as it starts.
            device: Where it will run.
            attention: Attention backend of another reference.

        Raises:
            UserError: If the critic or the reference cannot be used, or the policy cannot sample
                answers to one of the prompts.
        """
        learner.set_up(self.seed)
        settings = self.maker.settings
        sampler = LocalSampler(learner.model, settings.engine)
        sampler.check(self.longest_prompt_tokens, settings.sampling, "the longest prompt")
        self.maker.reference = ReferencePolicy(
            learner.model, settings.reference, device, attention, settings.offload
        )

    def train_dataloader(self) -> DataLoader[list[PackedBatch]]:
        """One item an optimizer step; one pass is what is left of an iteration."""
        return DataLoader(_Iteration(self), batch_size=None)

    def begin(self) -> tuple[Rollouts, int]:
        """Make or open the rollouts that the next step learns from, and tell the module of them.

        Returns:
            The rollouts, and the steps that were made of them already.
        """
        trainer = self.trainer
        assert trainer is not None
        iteration, first = divmod(trainer.global_step, self.steps_per_iteration)
        learner = cast("Learner", trainer.lightning_module)
        if first and not Rollouts.is_whole(self.maker.folder_of(iteration)):
            raise UserError(
                f"{self.maker.folder_of(iteration)} is not whole, and {first} steps were made on "
                "it: the weights that sampled it are gone. Restore it, or choose another run_dir"
            )
        strategy = trainer.strategy
        self.maker.ranks = Ranks(
            trainer.global_rank, trainer.world_size, strategy.barrier, strategy.broadcast
        )
        autocast = trainer.precision_plugin.forward_context
        self.rollouts = self.maker.make(iteration, learner, autocast, self.report)
        learner.begin_iteration(self.rollouts)
        return self.rollouts, first

    def steps(self) -> Iterator[list[PackedBatch]]:
        """The steps that are left of the current iteration."""
        trainer = self.trainer
        assert trainer is not None
        if trainer.global_step >= self.total_steps:
            return  # Lightning asks before it looks whether anything is left to do
        rollouts, first = self.begin()
        if rollouts.record["stops"]:
            self._tell_of_stop(rollouts, trainer)
            trainer.should_stop = True
            return
        plan = StepPlan(
            rollouts.lengths,
            global_batch=self.batching.global_batch,
            tokens_per_microbatch=self.batching.tokens_per_microbatch,
            total_steps=self.steps_per_iteration,
            seed=stream_key(self.seed, "steps", trainer.global_step // self.steps_per_iteration),
            world_size=trainer.world_size,
        )
        yield from StepStream(rollouts, plan, trainer.global_rank, first, row_multiple(trainer))

    def _tell_of_stop(self, rollouts: Rollouts, trainer: pl.Trainer) -> None:
        """Say why the run ends.

        Raises:
            UserError: If it has made no step.
        """
        far = (
            f"the KL divergence from the reference is {rollouts.metrics['rollout/kl']:.3g} nats a "
            f"response, beyond rollouts.max_kl={self.maker.settings.max_kl:g}"
        )
        if trainer.global_step == 0:
            raise UserError(
                f"{far}, before the first step: raise it, or choose another rollouts.reference"
            )
        if trainer.is_global_zero:
            logger.info("%s: the run ends after step %d", far, trainer.global_step)


class _Iteration(IterableDataset[list[PackedBatch]]):
    """What is left of the current iteration, every time it is asked."""

    def __init__(self, data: RolloutDataModule) -> None:
        self._data = data

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        return self._data.steps()
