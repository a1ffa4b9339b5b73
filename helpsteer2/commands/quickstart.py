"""``helpsteer2 quickstart``: a tiny reward model on made-up data, trained and evaluated."""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands.launch import launch

EXAMPLE = {
    "prompt": "Notes on Leo: food soup, job pilot. Tell me two facts.",
    "response": "The food is soup. The job is pilot.",
}


def main(argv: Sequence[str]) -> int:
    """Run ``train`` and ``evaluate`` one after the other and sum them up.

    Args:
        argv: ``--run-dir DIR`` and overrides of the training.

    Returns:
        The exit code: 0, or that of the command that failed.

    Raises:
        UserError: As one of the commands raises it.
    """
    arguments = _parser().parse_args(argv)
    run_dir, console = Path(arguments.run_dir), Console()
    started = time.monotonic()
    # A model this small gains nothing from more threads, and loses much where cores are shared.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    console.print("[bold]1/2[/] training a tiny model on made-up data")
    code = launch(
        CONFIG_COMMANDS["train"],
        ["experiment=reward/quickstart", _override("run_dir", run_dir), *arguments.overrides],
    )
    if code:
        return code

    console.print("[bold]2/2[/] evaluating the exported model on prompts it has never seen")
    evaluation = run_dir / "evaluation"
    # Its own tables hold far more than a first look wants; the record keeps all of it.
    with redirect_stdout(io.StringIO()):
        code = launch(
            CONFIG_COMMANDS["evaluate"],
            [
                _override("model", run_dir / "export"),
                _override("run_dir", evaluation),
                "data@evaluators.ratings.data=world",
                *(f"evaluators.ratings.{o}" for o in arguments.overrides if o.startswith("data.")),
            ],
        )
    if code:
        return code

    record = evaluation / "result.json"
    metrics = json.loads(record.read_text(encoding="utf-8"))["metrics"]
    console.print(summary(metrics["ratings"]))
    console.print(f"{time.monotonic() - started:.0f} s in all; every figure is in {record}\n")
    console.print(_next_steps(run_dir), soft_wrap=True, markup=False, highlight=False)
    return 0


def summary(ratings: Mapping[str, Any]) -> Table:
    """The few figures of a rating evaluation that a first look needs.

    Args:
        ratings: As made by ``RatingEvaluation.evaluate``.

    Returns:
        A row an attribute: squared error beside the mean predictor's, and how often the model
        orders two responses as their ratings do, beside a predictor that knows their length alone.
    """
    table = Table(title=f"{ratings['responses']} held-out responses")
    for column in ("attribute", "MSE", "of the mean", "pairs right", "by length", "pairs"):
        table.add_column(column, justify="left" if column == "attribute" else "right")
    for name, figures in ratings["attributes"].items():
        predictors = figures["predictors"]
        model, mean, length = (predictors[key] for key in ("model", "mean", "length"))
        table.add_row(
            name,
            _number(model["mse"]["value"], ".2f"),
            _number(mean["mse"]["value"], ".2f"),
            _number(model["pairs"]["accuracy"]["value"], ".0%"),
            _number(length["pairs"]["accuracy"]["value"], ".0%"),
            str(model["pairs"]["decided"]),
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="helpsteer2 quickstart",
        description="Train a tiny reward model on made-up data, evaluate it, show a table.",
    )
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        default=f"outputs/quickstart/{datetime.now():%Y-%m-%d_%H-%M-%S}",
        help="folder of the run (outputs/quickstart/ and the time)",
    )
    parser.add_argument("overrides", nargs="*", help="overrides of the training: key=value")
    return parser


def _override(key: str, path: Path) -> str:
    """A path as a Hydra override, safe for spaces, commas and quotes."""
    escaped = str(path).replace("'", "\\'")
    return f"{key}='{escaped}'"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _next_steps(run_dir: Path) -> str:
    """Commands that can be copied as they are, whether or not the program is on the path."""
    program = sys.argv[0]
    if program == shutil.which("helpsteer2"):
        program = "helpsteer2"
    elif program.endswith(".py"):
        program = "python -m helpsteer2"
    return "\n".join(
        [
            "Next:",
            f"  echo {shlex.quote(json.dumps(EXAMPLE))} \\",
            f"    | {program} score --model {shlex.quote(str(run_dir / 'export'))}",
            f"  {program} train experiment=reward/local_slice data.path=DIR   # your own ratings",
            f"  {program} train experiment=reward/quickstart seed=1,2,3 -m    # a sweep",
            f"  {program} check experiment=reward/helpsteer2_llama3_70b       # the paper's recipe",
        ]
    )
