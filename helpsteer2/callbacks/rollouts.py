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
from helpsteer2.rollouts.store import Rollouts

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
    """

    def __init__(self, run_dir: Path, view: WandbView | None) -> None:
        self.run_dir, self.view = run_dir, view
        self._rollouts: Rollouts | None = None
        self._since = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Tell of rollouts that are new."""
        found = _datamodule(trainer).rollouts
        if found is None or found is self._rollouts:
            return
        self._rollouts, self._since = found, time.perf_counter()
        if self.view is not None:
            step = trainer.global_step
            self.view.log_table("rollouts", *response_table(found), step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell how the iteration was and where its time went."""
        data = _datamodule(trainer)
        # An iteration that ends the run has no step.
        if data.rollouts is None or data.rollouts is not self._rollouts:
            return
        seconds = {
            **self._rollouts.record["seconds"],
            UPDATE: time.perf_counter() - self._since,
        }
        number = data.rollouts.number + 1
        logger.info("iteration %d: %s; %s", number, told(self._rollouts), times_told(seconds))
        if self.view is not None:
            times = {f"time/{stage}": spent for stage, spent in seconds.items()}
            self.view.log_metrics(times, trainer.global_step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what was won against what it cost, also if all steps were made before."""
        if not trainer.is_global_zero:
            return
        metrics = [one.metrics for one in iterations(_datamodule(trainer).maker.folder)]
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


def iterations(folder: Path) -> list[Rollouts]:
    """The finished iterations of a run, in order.

    Args:
        folder: The run's ``rollouts``.
    """
    return [
        Rollouts(path) for path in sorted(folder.glob("iteration_*")) if Rollouts.is_whole(path)
    ]


def summary_of(folder: Path, seconds_in_steps: float) -> dict[str, Any]:
    """What a run's record keeps of its rollouts.

    Args:
        folder: The run's ``rollouts``.
        seconds_in_steps: Time of all steps, the making of rollouts included.

    Returns:
        ``iterations``, the metrics of the ``first`` and the ``last`` of them, and ``seconds`` by
        stage over all.
    """
    found = iterations(folder)
    seconds: dict[str, float] = {}
    for rollouts in found:
        for stage, spent in rollouts.record["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    seconds[UPDATE] = max(0.0, seconds_in_steps - sum(seconds.values()))
    ends = {"first": found[0], "last": found[-1]} if found else {}
    metrics = {name: dict(rollouts.metrics) for name, rollouts in ends.items()}
    return {"iterations": len(found), **metrics, "seconds": seconds}


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
