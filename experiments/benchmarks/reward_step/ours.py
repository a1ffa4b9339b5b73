"""Contender: this project, wired as ``helpsteer2 train`` wires it."""

from __future__ import annotations

import io
import logging
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console

from experiments.benchmarks.reward_step.cost import Tally
from experiments.benchmarks.reward_step.job import LEARNING_RATE, SEED, Job
from experiments.benchmarks.reward_step.turns import Turns
from helpsteer2.callbacks.guards import BadBatch
from helpsteer2.callbacks.metrics_log import MetricsLog
from helpsteer2.callbacks.progress import ProgressReport
from helpsteer2.data.datamodule import Batching, GroupDataModule
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.losses.regression import RegressionLoss
from helpsteer2.models.lora import Lora
from helpsteer2.models.reward import RewardModel
from helpsteer2.modules.regression import RegressionModule
from helpsteer2.modules.step import StepModule


def run(turns: Turns, job: Job, lora: Lora | None = None) -> None:
    """Train all weights, or adapters beside them, one step a turn."""
    backbone = replace(job.backbone(), lora=lora)
    model = RewardModel(backbone.build(job.tokenizer, SEED), job.spec)
    module = RegressionModule(
        model,
        loss=RegressionLoss(),
        optimizer=partial(torch.optim.AdamW, lr=LEARNING_RATE, fused=True),
    )
    train_in_turns(turns, job, module, job.groups())


def train_in_turns(turns: Turns, job: Job, module: StepModule, groups: TokenisedGroups) -> None:
    """Train as ``helpsteer2 train`` does, metrics log and progress report included.

    Args:
        turns: The turns; one is an optimizer step.
        job: How many steps, of what size, in which precision.
        module: What trains.
        groups: The groups of the job.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    batching = Batching(
        job.size.groups_per_step, job.tokens_per_microbatch, max_steps=job.total_steps
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision="32-true" if job.dtype == "fp32" else "bf16-mixed",
        max_steps=job.total_steps,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(job.folder),
        callbacks=[
            BadBatch(job.folder / "bad_batch"),
            MetricsLog(job.folder / "metrics.csv"),
            ProgressReport(Console(file=io.StringIO())),
            _OneStepATurn(turns, job),
        ],
    )
    trainer.fit(module, datamodule=GroupDataModule(groups, None, batching, SEED))


class _OneStepATurn(pl.Callback):
    """Last of the callbacks: a turn ends when a step has."""

    def __init__(self, turns: Turns, job: Job) -> None:
        self._turns, self._job = turns, job

    def on_train_start(self, *args: Any) -> None:
        self._turns.wait_first()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        def details() -> dict[str, Any]:
            tally = Tally()
            for row in batch:
                tally.add_packed(self._job.size, row.layout)
            return asdict(tally)

        self._turns.end(details)
