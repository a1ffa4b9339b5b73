"""What a finished training run records and tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from helpsteer2.commands.run_folder import RunFolder
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
        reports: What tokenising counted, by split.
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


def print_summary(
    console: Console, folder: RunFolder, result: Mapping[str, Any], attributes: Sequence[str]
) -> None:
    """Print the validation figures, where the model is, and what can be done next.

    Args:
        console: Where to.
        folder: The run's folder.
        result: As made by ``result_of``.
        attributes: Names of the scores.
    """
    metrics = result["metrics"]
    if "val/loss" in metrics:
        console.print(
            f"validation of the exported weights, step {result['exported_step']} of "
            f"{result['steps']}",
            highlight=False,
        )
        table = Table()
        table.add_column("attribute")
        table.add_column("MSE", justify="right")
        table.add_column("Pearson", justify="right")
        for name in attributes:
            row = (metrics[f"val/{name}/{figure}"] for figure in ("mse", "pearson"))
            table.add_row(name, *(f"{value:.4f}" for value in row))
        table.add_row("loss", f"{metrics['val/loss']:.4f}", "", style="bold")
        console.print(table)
    console.print(f"model    {folder.export}", soft_wrap=True, highlight=False)
    console.print(f"record   {folder.path / 'result.json'}", soft_wrap=True, highlight=False)
    console.print(
        f"next     helpsteer2 evaluate model={folder.export}", soft_wrap=True, highlight=False
    )
