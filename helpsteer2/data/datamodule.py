"""From tokenised groups to packed micro-batches, as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset, IterableDataset

from helpsteer2.data.packing import PackedBatch, pack
from helpsteer2.data.planner import MicroBatch, StepPlan, consecutive_bins, steps_for_epochs
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.errors import UserError


@dataclass(frozen=True)
class Batching:
    """How groups become optimizer steps.

    Args:
        global_batch: Groups of one optimizer step over all devices (two rows of HelpSteer2 are one
            group).
        tokens_per_microbatch: Tokens that go through the model at once; memory grows with it,
            results do not change.
        epochs: Passes over the data; ignored if ``max_steps`` is given.
        max_steps: Optimizer steps.
    """

    global_batch: int
    tokens_per_microbatch: int
    epochs: float | None = None
    max_steps: int | None = None

    def total_steps(self, n_groups: int) -> tuple[int, int]:
        """Optimizer steps, and the groups left over of a partial last step.

        Args:
            n_groups: Groups in the training data.

        Raises:
            UserError: If neither ``epochs`` nor ``max_steps`` is given, or they give no full step.
        """
        if self.max_steps is not None:
            return self.max_steps, 0
        if self.epochs is None:
            raise UserError("batching: give epochs or max_steps")
        steps, dropped = steps_for_epochs(n_groups, self.global_batch, self.epochs)
        if steps == 0:
            raise UserError(
                f"batching: {self.epochs} epochs of {n_groups} groups are less than one step of "
                f"global_batch={self.global_batch}: lower it"
            )
        return steps, dropped


ROW_MULTIPLE = 256
"""Rows are padded to a multiple of this on the CPU in bf16: oneDNN compiles its matrix products for
every length anew."""


class Groups(Protocol):
    """Groups of ids by their position."""

    def __getitem__(self, index: int, /) -> TokenGroup: ...


def row_multiple(trainer: pl.Trainer) -> int:
    """What a Trainer's rows are padded to a multiple of."""
    on_cpu = trainer.strategy.root_device.type == "cpu"
    return ROW_MULTIPLE if on_cpu and trainer.precision == "bf16-mixed" else 1


def _pack(groups: Groups, micro_batch: MicroBatch, multiple: int = 1) -> PackedBatch:
    batch = pack([groups[index] for index in micro_batch.groups], multiple)
    return batch if micro_batch.counted else batch.as_filler()


class StepStream(IterableDataset[list[PackedBatch]]):
    """The optimizer steps of one rank, from any step on.

    Args:
        groups: Training data.
        plan: The schedule.
        rank: Which rank's micro-batches to give.
        first_step: Step to start at (the optimizer steps already done).
        multiple: Rows are padded to a multiple of this.
    """

    def __init__(
        self, groups: Groups, plan: StepPlan, rank: int, first_step: int, multiple: int = 1
    ) -> None:
        self._groups, self._plan = groups, plan
        self._rank, self._first_step, self._multiple = rank, first_step, multiple

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        """Yield one list of micro-batches a step."""
        for step in range(self._first_step, self._plan.total_steps):
            batches = self._plan.step(step)[self._rank]
            yield [_pack(self._groups, batch, self._multiple) for batch in batches]


class PackedGroups(Dataset[PackedBatch]):
    """A whole split in packed rows, for evaluation.

    Args:
        groups: The split.
        tokens_per_batch: Tokens of a row.
        rank: Which rank's rows to give.
        world_size: Number of ranks; every rank gets the same number of rows, fillers unlabelled.
    """

    def __init__(
        self, groups: TokenisedGroups, tokens_per_batch: int, rank: int = 0, world_size: int = 1
    ) -> None:
        bins = consecutive_bins(groups.lengths, tokens_per_batch)
        batches = [MicroBatch(tuple(members)) for members in bins]
        while len(batches) % world_size:
            batches.append(MicroBatch((0,), counted=False))
        self._groups, self._batches = groups, batches[rank::world_size]

    def __len__(self) -> int:
        """Number of rows of this rank."""
        return len(self._batches)

    def __getitem__(self, index: int) -> PackedBatch:
        """One packed row."""
        return _pack(self._groups, self._batches[index])


class GroupDataModule(pl.LightningDataModule):
    """Training steps and validation rows.

    Args:
        train: Training groups.
        validation: Validation groups, or None.
        batching: How groups become steps.
        seed: Seed of the order.
    """

    def __init__(
        self,
        train: TokenisedGroups,
        validation: TokenisedGroups | None,
        batching: Batching,
        seed: int,
    ) -> None:
        super().__init__()
        self.train, self.validation = train, validation
        self.batching, self.seed = batching, seed
        self.total_steps, self.dropped_groups = batching.total_steps(len(train))

    def plan(self, world_size: int) -> StepPlan:
        """The schedule for a number of ranks."""
        return StepPlan(
            self.train.lengths,
            global_batch=self.batching.global_batch,
            tokens_per_microbatch=self.batching.tokens_per_microbatch,
            total_steps=self.total_steps,
            seed=self.seed,
            world_size=world_size,
        )

    def train_dataloader(self) -> DataLoader[list[PackedBatch]]:
        """One item an optimizer step: this rank's micro-batches, from the trainer's step on."""
        trainer = self.trainer
        assert trainer is not None
        stream = StepStream(
            self.train,
            self.plan(trainer.world_size),
            trainer.global_rank,
            trainer.global_step,
            row_multiple(trainer),
        )
        return DataLoader(stream, batch_size=None)

    def val_dataloader(self) -> DataLoader[PackedBatch] | list[object]:
        """One item a packed row of the validation split; none without that split."""
        if self.validation is None:
            return []
        trainer = self.trainer
        assert trainer is not None
        rows = PackedGroups(
            self.validation,
            self.batching.tokens_per_microbatch,
            trainer.global_rank,
            trainer.world_size,
        )
        return DataLoader(rows, batch_size=None)
