"""When to validate and save, and files that survive being killed at any moment."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from helpsteer2.callbacks.guards import StopRequested, StopSignals
from helpsteer2.errors import UserError
from helpsteer2.records import write_atomic

logger = logging.getLogger(__name__)

LAST, BEST, NEXT_BEST = "last.ckpt", "best.ckpt", "best.next.ckpt"


@dataclass(frozen=True)
class Cadence:
    """How often a run looks up, in optimizer steps; the final step always validates and saves.

    Args:
        validate_every: Steps between validations; None never validates.
        checkpoint_every: Steps between saves of ``last.ckpt``: what a kill can cost.
        export: Weights that ``run_dir/export`` holds at the end: of the lowest validation loss, as
            in the paper, or of the last step. Without validation it is the last step.
        export_every: Steps between exports kept in ``run_dir/exports``, each as large as the model;
            ``helpsteer2 select`` chooses among them. None keeps none.
    """

    validate_every: int | None = 10
    checkpoint_every: int = 10
    export: Literal["best", "last"] = "best"
    export_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("validate_every", "checkpoint_every", "export_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"schedule.{name} must be at least 1, got {value}")

    def validates(self, step: int, final: bool) -> bool:
        """Whether validation runs after ``step`` optimizer steps."""
        return self.validate_every is not None and (final or step % self.validate_every == 0)

    def saves(self, step: int, final: bool) -> bool:
        """Whether ``last.ckpt`` is written after ``step`` optimizer steps."""
        return final or step % self.checkpoint_every == 0

    def exports(self, step: int, final: bool) -> bool:
        """Whether the weights after ``step`` optimizer steps are exported."""
        return self.export_every is not None and (final or step % self.export_every == 0)


class AtomicCheckpointIO(CheckpointIO):
    """Writes checkpoints whole or not at all, and reads them without running any code of theirs."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write aside, fsync, rename, fsync the folder.

        Raises:
            UserError: If it cannot be written; an older checkpoint stays as it was.
        """
        try:
            write_atomic(path, lambda file: torch.save(checkpoint, file))
        # torch hides an OSError of the file behind a RuntimeError of its own archive writer.
        except (UserError, RuntimeError) as error:
            raise UserError(
                f"the checkpoint could not be saved ({error}). An older one there is intact: free "
                "some space, then run the same command to go on from it"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read tensors and plain containers.

        Raises:
            UserError: If the file is damaged.
        """
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, memory-mapped.

    Args:
        path: A file written by ``AtomicCheckpointIO``.

    Returns:
        Its content: tensors and plain containers.

    Raises:
        UserError: If the file is damaged or holds anything else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    # torch has no error class of its own for a damaged archive.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read ({reason}): delete it to start again, or restore a copy"
        ) from error
    assert isinstance(checkpoint, dict)
    return checkpoint


class Checkpoints(Checkpoint):
    """Saves ``last.ckpt`` (all state) and ``best.ckpt`` (weights of the lowest validation loss).

    Resuming from ``last.ckpt`` equals never having stopped. Two rules make it so. Where a step
    validates, ``last.ckpt`` is written after the validation, since a resumed run does not repeat
    it. And ``best.ckpt`` is only replaced once a ``last.ckpt`` that knows of it is on disk: until
    then the new weights wait in ``best.next.ckpt``.

    Args:
        folder: Where the files are.
        cadence: When to validate and save.
        stop: Asked after each step whether to stop.
        required: Metric that the first validation must give, if it is one of validation.
        export: Exports the model under a name, where the cadence asks for it.
        iteration_steps: Steps of an iteration of rollouts, each of which has to begin with a
            checkpoint: they are made anew from its weights. None without rollouts.

    Attributes:
        best_step: Step of the lowest validation loss, None before any validation.
        best_metrics: Validation metrics of that step.
        last_metrics: Those of the latest validation.
    """

    def __init__(
        self,
        folder: Path,
        cadence: Cadence,
        stop: StopSignals,
        required: str | None = None,
        export: Callable[[str], None] | None = None,
        iteration_steps: int | None = None,
    ) -> None:
        self.folder = folder
        self.cadence = cadence
        self.stop = stop
        self.required = required
        self.export = export
        self.iteration_steps = iteration_steps
        self.best_step: int | None = None
        self.best_metrics: dict[str, float] = {}
        self.last_metrics: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know of the validations so far."""
        return {
            "best_step": self.best_step,
            "best_metrics": self.best_metrics,
            "last_metrics": self.last_metrics,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of ``last.ckpt``."""
        self.best_step = state_dict["best_step"]
        self.best_metrics = state_dict["best_metrics"]
        self.last_metrics = state_dict["last_metrics"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish or undo what a kill interrupted."""
        if not trainer.is_global_zero:
            return
        for leftover in self.folder.glob(".*.ckpt.*"):
            leftover.unlink()
        waiting = self.folder / NEXT_BEST
        if waiting.exists():
            if read_checkpoint(waiting)["global_step"] == self.best_step:
                self._promote()
            else:
                waiting.unlink()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run begins with a step, not with a validation."""
        self._set_validation(trainer, False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Save, unless a validation comes first; export before, as a resumed run does not."""
        final = _is_final(trainer)
        is_due = self.cadence.exports(trainer.global_step, final)
        if self.export is not None and is_due and trainer.is_global_zero:
            self.export(f"step_{trainer.global_step:06d}")
        due = self.cadence.validates(trainer.global_step, final)
        self._set_validation(trainer, due)
        if not due:
            self._save_last(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare with the best validation so far, then save.

        Raises:
            UserError: If the metric to be optimised is not among those of validation, or the loss
                is not finite.
        """
        metrics = validation_metrics(trainer)
        if not math.isfinite(metrics["val/loss"]):
            raise UserError(
                f"validation after step {trainer.global_step} gave a loss of "
                f"{metrics['val/loss']}: the last checkpoint is of an earlier step"
            )
        if self.required is not None and self.required.startswith("val/"):
            require_metric(self.required, metrics)
        self.last_metrics = metrics
        if self.best_step is None or metrics["val/loss"] < self.best_metrics["val/loss"]:
            self.best_step, self.best_metrics = trainer.global_step, metrics
            trainer.save_checkpoint(self.folder / NEXT_BEST, weights_only=True)
        self._save_last(trainer)

    def _set_validation(self, trainer: pl.Trainer, due: bool) -> None:
        # Lightning validates when the number of batches so far is a multiple of this.
        step = trainer.global_step
        trainer.val_check_batch = max(step, 1) if due else step + 1

    def _save_last(self, trainer: pl.Trainer) -> None:
        """Write ``last.ckpt`` if it is due or the run shall stop, and stop it then.

        Raises:
            StopRequested: If a signal asked for it; everything is saved.
        """
        stop, step = self.stop.agreed(trainer), trainer.global_step
        due = self.cadence.saves(step, _is_final(trainer))
        due = due or (self.iteration_steps is not None and step % self.iteration_steps == 0)
        if stop is not None or due:
            trainer.save_checkpoint(self.folder / LAST)
            if trainer.is_global_zero and (self.folder / NEXT_BEST).exists():
                self._promote()
        if stop is not None:
            raise StopRequested(stop)

    def _promote(self) -> None:
        os.replace(self.folder / NEXT_BEST, self.folder / BEST)


def _is_final(trainer: pl.Trainer) -> bool:
    """Whether this step is the last: planned so, or another callback ends the run."""
    return trainer.global_step == trainer.max_steps or trainer.should_stop


def validation_metrics(trainer: pl.Trainer) -> dict[str, float]:
    """The metrics that the latest validation logged, as plain numbers."""
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("val/")
    }


def require_metric(name: str, metrics: dict[str, float]) -> float:
    """Look a metric up.

    Args:
        name: Its name.
        metrics: What there is.

    Returns:
        Its value.

    Raises:
        UserError: If there is none of that name.
    """
    if name not in metrics:
        raise UserError(
            f"optimized_metric={name} is not logged; there is {', '.join(sorted(metrics))}"
        )
    return metrics[name]
