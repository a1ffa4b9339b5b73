"""Tells of the rollouts of every iteration: a line, a table on W&B, and a plot in the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from helpsteer2.callbacks.wandb import WandbView
from helpsteer2.data.groups import Group
from helpsteer2.plots import curves, save
from helpsteer2.rollouts.datamodule import RolloutDataModule
from helpsteer2.rollouts.store import RECORD, Rollouts, read_record

logger = logging.getLogger(__name__)

SHOWN_PROMPTS = 8
"""Prompts whose responses stand in the table of an iteration."""

REWARD_PLOT = "reward_against_kl.png"

UPDATE = "update"
"""What the steps themselves are called beside the stages of the rollouts."""


class RolloutReport(pl.Callback):
    """Rank zero only.

    Args:
        run_dir: Folder of the run; the plot goes to its ``plots``.
        view: An open W&B run, or None.

    Attributes:
        update_seconds: Time of all optimizer steps so far.
    """

    def __init__(self, run_dir: Path, view: WandbView | None) -> None:
        self.run_dir, self.view = run_dir, view
        self.update_seconds = 0.0
        self._rollouts: Rollouts | None = None
        self._of_iteration = self._since = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Times so far, so that a resumed run reports the whole."""
        return {"update_seconds": self.update_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.update_seconds = state_dict["update_seconds"]

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Show rollouts that are new, and start the clock of a step."""
        self._show_new(trainer)
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop the clock."""
        spent = time.perf_counter() - self._since
        self.update_seconds += spent
        self._of_iteration += spent

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell how the iteration was and where its time went."""
        # An iteration that ends the run has no step.
        self._show_new(trainer)
        if self._rollouts is None or not trainer.is_global_zero:
            return
        seconds = {**self._rollouts.record["seconds"], UPDATE: self._of_iteration}
        number = self._rollouts.number + 1
        logger.info("iteration %d: %s; %s", number, told(self._rollouts), times_told(seconds))
        if self.view is not None:
            times = {f"time/{stage}": spent for stage, spent in seconds.items()}
            self.view.log_metrics(times, trainer.global_step)

    def _show_new(self, trainer: pl.Trainer) -> None:
        found = _datamodule(trainer).rollouts
        if found is None or found is self._rollouts:
            return
        self._rollouts, self._of_iteration = found, 0.0
        if self.view is not None:
            self.view.log_table("rollouts", *response_table(found), trainer.global_step)
            self.view.log_metrics(found.metrics, trainer.global_step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what was won against what it cost, also if all steps were made before."""
        if not trainer.is_global_zero:
            return
        try:
            self._draw(trainer)
        # The model is trained and not exported yet: no picture is worth losing that.
        except Exception as error:
            logger.warning("the plot of the rollouts could not be made: %s", error, exc_info=True)

    def _draw(self, trainer: pl.Trainer) -> None:
        metrics = [record["metrics"] for record in records(_datamodule(trainer).maker.folder)]
        if not metrics:
            return
        names = _curves(metrics[0])
        figure = curves(
            {name: [of["rollout/kl"] for of in metrics] for name in names},
            {name: [of[key] for of in metrics] for name, key in names.items()},
            labels=("KL divergence from the reference, nats a response", "weighted score"),
            title="mean over the rollouts of each iteration",
        )
        path = self.run_dir / "plots" / REWARD_PLOT
        save(figure, path)
        if self.view is not None:
            self.view.log_image("reward against KL", path, trainer.global_step)


def _datamodule(trainer: pl.Trainer) -> RolloutDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, RolloutDataModule)
    return data


def records(folder: Path) -> list[dict[str, Any]]:
    """Records of the finished iterations of a run, in order.

    Args:
        folder: The run's ``rollouts``. Of an iteration that was learned from nothing else has to
            be there any more.
    """
    return [read_record(path.parent) for path in sorted(folder.glob(f"iteration_*/{RECORD}"))]


def summary_of(folder: Path, update_seconds: float) -> dict[str, Any]:
    """What a run's record keeps of its rollouts.

    Args:
        folder: The run's ``rollouts``.
        update_seconds: Time of the optimizer steps.

    Returns:
        ``iterations``, the metrics of the ``first`` and the ``last`` of them, and ``seconds`` by
        stage over all.
    """
    found = records(folder)
    seconds: dict[str, float] = {}
    for record in found:
        for stage, spent in record["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    ends = {"first": found[0], "last": found[-1]} if found else {}
    metrics = {name: record["metrics"] for name, record in ends.items()}
    return {"iterations": len(found), **metrics, "seconds": {**seconds, UPDATE: update_seconds}}


def _curves(metrics: Mapping[str, float]) -> dict[str, str]:
    """Names of curves, and the metrics that they show: all in the unit of weighted scores."""
    watched = [
        name.removeprefix("rollout/watch/")
        for name in metrics
        if name.startswith("rollout/watch/") and not name.endswith("_correlation")
    ]
    return {
        "reward model": "rollout/weighted_score",
        **{name: f"rollout/watch/{name}" for name in watched},
    }


def told(rollouts: Rollouts) -> str:
    """An iteration in a line.

    Args:
        rollouts: The iteration.
    """
    of = {name.removeprefix("rollout/"): value for name, value in rollouts.metrics.items()}
    text = (
        f"reward {of['reward']:.3f}, KL {of['kl']:.2f} nats, {of['tokens']:.1f} tokens, "
        f"{of['unfinished']:.1%} unfinished"
    )
    watched = [name.removeprefix("watch/") for name in of if name.startswith("watch/")]
    for name in watched:
        if not name.endswith("_correlation"):
            text += f", {name} {of[f'watch/{name}']:.3f}"
    return text


def times_told(seconds: Mapping[str, float]) -> str:
    """Where time went.

    Args:
        seconds: By stage.
    """
    total = sum(seconds.values()) or 1.0
    parts = (f"{stage} {spent:.1f} s ({spent / total:.0%})" for stage, spent in seconds.items())
    return ", ".join(parts)


def response_table(rollouts: Rollouts) -> tuple[list[str], list[list[Any]]]:
    """Some responses of an iteration, as W&B shows them.

    Args:
        rollouts: The iteration.

    Returns:
        Names of the columns, and the rows: a response each.
    """
    groups = list(islice(rollouts.groups(), SHOWN_PROMPTS))
    names = list(groups[0].score_names or ())
    columns = ["prompt", "response", *names, "reward", "KL, nats", "tokens", "finish reason"]
    rows: list[list[Any]] = []
    for index, group in enumerate(groups):
        tokens = rollouts[index].rollout
        assert tokens is not None
        log_ratio = tokens.logprobs - tokens.ref_logprobs
        first = 0
        for i, ids in enumerate(group.response_ids or ()):
            kl = float(log_ratio[first : first + len(ids)].sum(dtype=float))
            first += len(ids)
            rows.append([_text(group), group.responses[i], *_numbers(group, i), kl, len(ids)])
            rows[-1].append((group.finish_reasons or ())[i])
    return columns, rows


def _text(group: Group) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in group.prompt)


def _numbers(group: Group, i: int) -> list[float]:
    """Scores and reward of a response."""
    return [*(group.scores or ())[i], (group.rewards or ())[i]]
