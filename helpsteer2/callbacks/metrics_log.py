"""The run's own record of metrics: a CSV file that a resumed run continues exactly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from helpsteer2.callbacks.checkpoints import validation_metrics
from helpsteer2.callbacks.wandb import WandbView
from helpsteer2.errors import UserError
from helpsteer2.records import append, reason, write_atomic

HEADER = b"step,metric,value\n"


class MetricsLog(pl.Callback):
    """Appends ``step,metric,value`` rows to a CSV file, and shows the metrics on W&B.

    ``step`` counts finished optimizer steps. No time is in it, so a run that was killed and resumed
    leaves the same bytes as one that was not: resuming cuts the file back to the checkpoint's step,
    and before every checkpoint the rows are forced to disk. Read it wide with
    ``pandas.read_csv(path).pivot(index="step", columns="metric", values="value")``.

    Args:
        path: The CSV file.
        view: A W&B run that gets the same metrics; the run does not depend on it.

    Attributes:
        latest: Metrics of the latest step.
    """

    def __init__(self, path: Path, view: WandbView | None = None) -> None:
        self.path = path
        self.view = view
        self.latest: dict[str, float] = {}
        self._file: FileIO | None = None

    def state_dict(self) -> dict[str, Any]:
        """Metrics of the latest step, for a run that was killed after its last one."""
        return {"latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self.latest = state_dict["latest"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut the file back to the step that training starts from, and open it."""
        if trainer.is_global_zero:
            cut_back(self.path, trainer.global_step)
            self._file = self.path.open("ab", buffering=0)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Mapping[str, Any],
        *args: Any,
    ) -> None:
        """Write the metrics of a step."""
        self.latest = dict(outputs["metrics"])
        self._write(trainer, self.latest)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the metrics of a validation."""
        self._write(trainer, validation_metrics(trainer))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Force the rows to disk before the checkpoint that counts on them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the file."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the file."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            return
        step = trainer.global_step
        rows = "".join(f"{step},{name},{_number(value)}\n" for name, value in metrics.items())
        try:
            append(self._file, rows.encode("utf-8"))
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {reason(error)}") from error
        if self.view is not None:
            self.view.log_metrics(metrics, step)


def _number(value: float) -> str:
    """Integers whole, floats to the 9 digits that tell all float32 apart."""
    return str(value) if isinstance(value, int) else f"{value:.9g}"


def cut_back(path: Path, step: int) -> None:
    """Drop the rows of a metrics file that are later than a step, and a torn last row.

    Args:
        path: The file; made with its header if it is not there.
        step: Last step to keep.

    Raises:
        UserError: If it cannot be written.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines[1:] if line.endswith(b"\n") and _step_of(line) <= step]
    content = HEADER + b"".join(kept)
    if content == b"".join(lines):
        return

    def write(file: Any) -> None:
        file.write(content)

    write_atomic(path, write)


def _step_of(line: bytes) -> float:
    number = line.split(b",", 1)[0]
    return int(number) if number.isdigit() else float("inf")
