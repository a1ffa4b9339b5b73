"""How far a run is and how fast: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from helpsteer2.callbacks.checkpoints import validation_metrics

logger = logging.getLogger(__name__)

WINDOW_STEPS = 20
"""Speed is the mean over so many of the latest steps."""

SILENT_SECONDS = 30.0
"""Longest time without a line in the log while rollouts are made."""


class Throughput:
    """Groups and tokens a second, without the time of validation and saving.

    Attributes:
        seconds: Time spent in all steps so far.
        groups: Groups of all steps so far, over all ranks.
        tokens: Their tokens, every prompt counted once.
    """

    def __init__(self) -> None:
        self.seconds, self.groups, self.tokens = 0.0, 0, 0
        self._window: deque[tuple[float, int, int]] = deque(maxlen=WINDOW_STEPS)

    def add(self, seconds: float, groups: int, tokens: int) -> None:
        """Count one step."""
        self.seconds += seconds
        self.groups += groups
        self.tokens += tokens
        self._window.append((seconds, groups, tokens))

    def recent(self) -> tuple[float, float, float]:
        """Steps, groups and tokens a second over the latest steps."""
        seconds = max(sum(step[0] for step in self._window), 1e-9)
        groups = sum(step[1] for step in self._window)
        tokens = sum(step[2] for step in self._window)
        return len(self._window) / seconds, groups / seconds, tokens / seconds

    def summary(self) -> dict[str, float]:
        """Figures of the whole run, for the record."""
        seconds = max(self.seconds, 1e-9)
        return {
            "seconds_in_steps": self.seconds,
            "groups_per_second": self.groups / seconds,
            "tokens_per_second": self.tokens / seconds,
        }

    def state_dict(self) -> dict[str, float]:
        """The sums, without the window."""
        return {"seconds": self.seconds, "groups": self.groups, "tokens": self.tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the sums."""
        self.seconds, self.groups, self.tokens = (
            state["seconds"], state["groups"], state["tokens"],
        )  # fmt: skip


class ProgressReport(pl.Callback):
    """Shows step, speed, loss and time left; rank zero only.

    Args:
        console: Where the bar goes if it is a terminal; otherwise lines go to the log.
        line_every: Steps between lines of the log.
    """

    def __init__(self, console: Console, line_every: int = 10) -> None:
        self.console = console
        self.line_every = line_every
        self.throughput = Throughput()
        self._bar: Progress | None = None
        self._validation = ""
        self._since = 0.0
        self._interrupted = False
        self._seen = (0, 0)
        self._told = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the bar where training starts."""
        self._seen = (pl_module.groups_seen, pl_module.tokens_seen)
        self._since = time.perf_counter()
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            transient=True,
        )
        self._bar.start()
        self._bar.add_task("train", total=trainer.max_steps, completed=trainer.global_step, text="")

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Start the clock anew if the time since the last step went elsewhere."""
        if self._interrupted:
            self._since, self._interrupted = time.perf_counter(), False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The time of a validation is not that of a step."""
        self._interrupted = True

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Nor is that of a save."""
        self._interrupted = True

    def state_dict(self) -> dict[str, Any]:
        """Times so far, so that a resumed run reports the whole."""
        return self.throughput.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.throughput.load_state_dict(state_dict)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Mapping[str, Any],
        *args: Any,
    ) -> None:
        """Move on by one step."""
        metrics = outputs["metrics"]
        now = time.perf_counter()
        seen = (metrics["groups_seen"], metrics["tokens_seen"])
        self.throughput.add(now - self._since, seen[0] - self._seen[0], seen[1] - self._seen[1])
        self._since, self._seen = now, seen
        if not trainer.is_global_zero:
            return
        step, total = trainer.global_step, trainer.max_steps
        text = self._text(metrics["train/loss"], total - step)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, text=text)
        if step % self.line_every == 0 or step == total:
            # The bar shows it already: then the line is for the log file alone.
            level = logging.INFO if self._bar is None else logging.DEBUG
            logger.log(level, "step %d/%d  %s", step, total, text)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the validation loss from now on."""
        loss = validation_metrics(trainer)["val/loss"]
        self._validation = f"  val loss {loss:.4f}"
        if trainer.is_global_zero:
            logger.info("step %d/%d  val loss %.4f", trainer.global_step, trainer.max_steps, loss)

    def show_stage(self, stage: str, done: int, total: int) -> None:
        """Show how far the rollouts of an iteration are.

        Args:
            stage: What is made of them.
            done: Responses that have it.
            total: Responses of the iteration.
        """
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], text=f"{stage} {done}/{total}")
        elif time.monotonic() - self._told > SILENT_SECONDS:
            self._told = time.monotonic()
            logger.info("rollouts: %s %d/%d", stage, done, total)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the bar."""
        self._stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Remove the bar, so that the message of the error stands alone."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _text(self, loss: float, steps_left: int) -> str:
        steps, groups, tokens = self.throughput.recent()
        left = timedelta(seconds=round(steps_left / steps))
        return (
            f"loss {loss:.4f}  {groups:.1f} groups/s  {tokens:,.0f} tokens/s  ETA {left}"
            f"{self._validation}"
        )
