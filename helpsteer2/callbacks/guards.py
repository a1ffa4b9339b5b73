"""What stands between a run and an accident: signals that ask to stop, and batches gone wrong."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors.torch import save
from torch import Tensor

from helpsteer2.errors import UserError
from helpsteer2.modules.step import NonFiniteError
from helpsteer2.records import write_atomic

logger = logging.getLogger(__name__)

# Slurm's --signal=USR1@120 warns before the time limit; Lightning would save in mid-step.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

ECHO_SECONDS = 0.5
"""A signal so soon after the first is its echo: launchers pass on what the terminal sent too."""


class StopRequested(Exception):
    """The run was asked to stop and has saved what is needed to go on.

    Attributes:
        signal: Number of the signal; the exit code is 128 more.
    """

    def __init__(self, signal_number: int) -> None:
        self.signal = signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")


class StopSignals(pl.Callback):
    """Turns Ctrl-C, SIGTERM and SIGUSR1 into a wish to stop at the next safe place.

    Used as a context around a run, and as a callback of its Trainer, because Lightning replaces the
    handlers when it starts. Outside a fit a signal raises ``StopRequested`` at once: nothing is at
    stake there. During a fit it is remembered; ``Checkpoints`` asks ``agreed`` after each step. A
    second signal ends the process at once; files are written whole or not at all.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._fitting = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        # Only the main thread may set handlers; a run in another one leaves signals to its caller.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in SIGNALS}
        self._install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the handlers back from Lightning, whose own saves nothing and broadcasts midway."""
        self._fitting = True
        self._install()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Signals act at once again."""
        self._fitting = False

    def agreed(self, trainer: pl.Trainer) -> int | None:
        """Signal that any rank received, the same answer on every rank; None if none did.

        All ranks have to call this together.
        """
        number = self.received or 0
        if trainer.world_size > 1:
            numbers = torch.tensor(number, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
            number = int(numbers)
        return number or None

    def _install(self) -> None:
        for number in self._previous:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() - self._received_at < ECHO_SECONDS:
                return
            # Not through logging: the main thread may hold its lock.
            os.write(sys.stderr.fileno(), b"stopped at once; the last checkpoint is intact\n")
            os._exit(128 + number)
        if not self._fitting:
            raise StopRequested(number)
        self.received, self._received_at = number, time.monotonic()
        os.write(
            sys.stderr.fileno(),
            b"\nstopping after this step and saving; a second signal stops at once\n",
        )


class BadBatch(pl.Callback):
    """Keeps the batch whose loss or gradient was not finite.

    Args:
        folder: Made when needed; one file a rank.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._batches: list[Any] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: list[Any], batch_idx: int
    ) -> None:
        """Hold on to the micro-batches of the step."""
        self._batches = batch

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Let them go."""
        self._batches = []

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save the batch of a ``NonFiniteError`` and tell the error where."""
        if not isinstance(exception, NonFiniteError):
            return
        path = self.folder / f"step_{exception.step:06d}_rank_{trainer.global_rank}.safetensors"
        try:
            write_bad_batch(path, self._batches)
        except UserError as error:
            logger.warning("the batch could not be kept: %s", error)
            return
        exception.batch_file = path


def write_bad_batch(path: Path, batches: list[Any]) -> None:
    """Write every tensor of packed batches to a safetensors file.

    Tensors are named ``<micro-batch>.<field>``; the metadata lists the data set's group indices.

    Args:
        path: The file.
        batches: Packed batches, on any device.

    Raises:
        UserError: If it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    groups: list[list[int]] = []
    for i, batch in enumerate(batches):
        for name, value in batch.tensors().items():
            tensors[f"{i}.{name}"] = value.detach().cpu().contiguous()
        groups.append(batch.group_indices.tolist())
    content = save(tensors, metadata={"group_indices": json.dumps(groups)})

    def write(file: Any) -> None:
        file.write(content)

    write_atomic(path, write)
