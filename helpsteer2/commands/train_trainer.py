"""The Lightning Trainer of a run, its settings checked before anything slow."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy

from helpsteer2.callbacks.checkpoints import AtomicCheckpointIO
from helpsteer2.config.rules import SET_BY_RUN
from helpsteer2.errors import UserError


def make_trainer(factory: Callable[..., pl.Trainer], run_dir: Path, validates: bool) -> pl.Trainer:
    """Make the Trainer with what the run sets itself.

    Args:
        factory: Makes it from further arguments, with those of the configuration in ``keywords``.
        run_dir: Folder of the run.
        validates: Whether there are validations.

    Returns:
        A Trainer that leaves steps, checkpoints and logs to the run.

    Raises:
        UserError: If an argument is one that the run sets, or asks for what is not supported.
    """
    given = dict(getattr(factory, "keywords", {}))
    for name, place in SET_BY_RUN.items():
        if given.get(name) not in (None, False):
            raise UserError(f"trainer.{name} is set by this project: use {place}")
    for package in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    trainer = factory(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=1,
        limit_val_batches=1.0 if validates else 0,
        default_root_dir=str(run_dir),
        plugins=[*(given.get("plugins") or []), AtomicCheckpointIO()],
    )
    _check_precision(trainer, given)
    _check_devices(trainer)
    return trainer


def _check_precision(trainer: pl.Trainer, given: dict[str, Any]) -> None:
    # On the CPU Lightning makes bf16-mixed of 16-mixed without asking.
    asked = str(given.get("precision", trainer.precision))
    if trainer.precision not in ("32-true", "bf16-mixed") or asked.startswith("16"):
        raise UserError(
            f"trainer.precision={asked} keeps no fp32 weights or needs loss "
            "scaling: use 32-true or bf16-mixed"
        )


def _check_devices(trainer: pl.Trainer) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != trainer.world_size and "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(
            f"torchrun started {started} processes for {trainer.world_size} devices: set "
            "trainer.devices (and num_nodes) to match, and trainer.strategy=ddp"
        )
    ranks = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.world_size > 1 and not (ranks and ranks.creates_processes_externally):
        raise UserError(
            f"{trainer.world_size} devices need one process each: start them with torchrun "
            f"--nproc-per-node={trainer.num_devices} -m helpsteer2 train …, or with srun"
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise UserError(
            f"trainer.strategy={type(trainer.strategy).__name__} is not supported: use auto or ddp"
        )
