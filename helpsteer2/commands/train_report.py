"""What a finished training run records and tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from helpsteer2.callbacks.rollouts import REWARD_PLOT, times_told
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.models.spec import SPEC_FILE
from helpsteer2.records import environment


def result_of(
    *,
    metrics: Mapping[str, float],
    step: int,
    exported_step: int,
    last_validation: Mapping[str, float],
    optimized: tuple[str | None, float | None],
    fingerprints: Mapping[str, Any],
    reports: Mapping[str, Any],
    speed: Mapping[str, float],
    wall_seconds: float,
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The content of ``result.json``.

    Args:
        metrics: Of the exported weights, and the training metrics of the last step.
        step: Optimizer steps of the run.
        exported_step: Step of the exported weights.
        last_validation: Metrics of the last validation.
        optimized: Name and value of the optimized metric.
        fingerprints: Hashes of data, tokenizer and template.
        reports: What tokenising counted, by split and over both.
        speed: Throughput over all steps of the run.
        wall_seconds: Time of the process that finished the run.
        config: The whole configuration.

    Returns:
        Plain data.
    """
    name, value = optimized
    return {
        "kind": "train",
        "metrics": dict(metrics),
        "optimized_metric": None if name is None else {"name": name, "value": value},
        "steps": step,
        "exported_step": exported_step,
        "last_validation": dict(last_validation),
        "speed": dict(speed),
        "wall_seconds": round(wall_seconds, 3),
        "fingerprints": dict(fingerprints),
        "data": dict(reports),
        "environment": environment(),
        "config": None if config is None else dict(config),
    }


def print_summary(console: Console, folder: RunFolder, result: Mapping[str, Any]) -> None:
    """Print the validation figures, where the model is, and what can be done next.

    Args:
        console: Where to.
        folder: The run's folder.
        result: As made by ``result_of``.
    """
    figures = {
        name.removeprefix("val/"): value
        for name, value in result["metrics"].items()
        if name.startswith("val/")
    }
    if figures:
        console.print(
            f"validation of the exported weights, step {result['exported_step']} of "
            f"{result['steps']}",
            highlight=False,
        )
        console.print(_table(figures))
    if "first" in result.get("rollouts", {}):
        console.print(_rollouts_table(result["rollouts"]))
        console.print(times_told(result["rollouts"]["seconds"]), soft_wrap=True, highlight=False)
    shared = result["data"].get("validation_prompts_in_train")
    if shared:
        console.print(
            f"prompts of {shared} validation groups also stand in train: figures on new prompts "
            "may be worse",
            soft_wrap=True,
            highlight=False,
        )
    plot = folder.path / "plots" / REWARD_PLOT
    if plot.exists():
        console.print(f"plot     {plot}", soft_wrap=True, highlight=False)
    lines = [f"model    {folder.export}", f"record   {folder.path / 'result.json'}"]
    if (folder.export / SPEC_FILE).exists():
        lines.append(f"next     helpsteer2 evaluate model={folder.export}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _rollouts_table(rollouts: Mapping[str, Any]) -> Table:
    """The first and the last iteration beside each other."""
    table = Table(title=f"rollouts of {rollouts['iterations']} iterations", title_justify="left")
    table.add_column()
    for column in ("first", "last"):
        table.add_column(column, justify="right")
    for name, first in rollouts["first"].items():
        last = rollouts["last"].get(name)
        shown = "" if last is None else f"{last:.4g}"
        table.add_row(name.removeprefix("rollout/"), f"{first:.4g}", shown)
    return table


def _table(figures: Mapping[str, float]) -> Table:
    """Figures called ``row/column`` in rows and columns, the others in rows of their own."""
    rows = list(dict.fromkeys(name.rpartition("/")[0] for name in figures))
    columns = list(dict.fromkeys(name.rpartition("/")[2] for name in figures if "/" in name))
    table = Table(show_header=bool(columns))
    table.add_column()
    for column in columns or [""]:
        table.add_column(column, justify="right")
    for row in filter(None, rows):
        cells = (figures.get(f"{row}/{column}") for column in columns)
        table.add_row(row, *("" if cell is None else f"{cell:.4f}" for cell in cells))
    for name, value in figures.items():
        if "/" not in name:
            table.add_row(name, f"{value:.4f}", style="bold" if name == "loss" else None)
    return table
