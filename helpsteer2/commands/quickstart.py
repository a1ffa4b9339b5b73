"""``helpsteer2 quickstart``: a policy and a reward model of the made-up world, evaluated."""

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
from contextlib import nullcontext, redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands.launch import launch

EXAMPLE = {
    "prompt": "Tell me pet and job of Ada.",
    "response": "So, we have pet goat. Well, we have job baker.",
}


def main(argv: Sequence[str]) -> int:
    """Train a policy and a reward model from it, evaluate the latter, and sum it all up.

    Args:
        argv: ``--run-dir DIR`` and overrides of both trainings.

    Returns:
        The exit code: 0, or that of the command that failed.

    Raises:
        UserError: As one of the commands raises it.
    """
    arguments = _parser().parse_args(argv)
    run_dir, console = Path(arguments.run_dir), Console()
    started = time.monotonic()
    # Threads that spin while they wait would slow a small model down wherever cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    policy, reward, evaluation = (run_dir / name for name in ("policy", "reward", "evaluation"))
    data = [override for override in arguments.overrides if override.startswith("data.")]
    stages = [
        (
            "a small language model learns to speak of the made-up world",
            "train",
            ["experiment=sft/world", _override("run_dir", policy), *arguments.overrides],
        ),
        (
            "a reward model starts from it and learns what the annotators say",
            "train",
            [
                "experiment=reward/world",
                _override("backbone.path", policy / "export"),
                _override("run_dir", reward),
                "data.groups=19200",  # half of the experiment's, for a first look
                *arguments.overrides,
            ],
        ),
        (
            "it is evaluated on prompts it has never seen",
            "evaluate",
            [
                _override("model", reward / "export"),
                _override("run_dir", evaluation),
                "evaluator=[ratings,preferences]",
                "data@evaluators.ratings.data=world",
                "evaluators.ratings.data.ratings=oracle",  # the truth, not the annotators'
                "data@evaluators.preferences.data=world",
                *(f"evaluators.{part}.{o}" for part in ("ratings", "preferences") for o in data),
            ],
        ),
    ]
    for number, (what, command, overrides) in enumerate(stages, 1):
        console.print(f"[bold]{number}/{len(stages)}[/] {what}")
        # The tables of an evaluation hold far more than a first look wants; its record keeps all.
        quiet = redirect_stdout(io.StringIO()) if command == "evaluate" else nullcontext()
        with quiet:
            code = launch(CONFIG_COMMANDS[command], overrides)
        if code:
            return code

    record = evaluation / "result.json"
    metrics = json.loads(record.read_text(encoding="utf-8"))["metrics"]
    console.print(ratings_table(metrics["ratings"]))
    console.print(preferences_table(metrics["preferences"]["weightings"]["helpfulness_only"]))
    console.print(f"{time.monotonic() - started:.0f} s in all; every figure is in {record}")
    console.print(f"plots: {', '.join(map(str, sorted((reward / 'plots').glob('*.png'))))}\n")
    console.print(_next_steps(run_dir), soft_wrap=True, markup=False, highlight=False)
    return 0


def ratings_table(ratings: Mapping[str, Any]) -> Table:
    """The few figures of a rating evaluation that a first look needs.

    Args:
        ratings: As made by ``RatingEvaluation.evaluate``.

    Returns:
        A row an attribute: squared error beside the mean predictor's, correlation, and how often
        the model orders two responses as their ratings do, beside a predictor that knows their
        length alone.
    """
    table = Table(title=f"{ratings['responses']} held-out responses, rated 0–4 by the oracle")
    for column in ("attribute", "MSE", "of the mean", "Pearson", "pairs right", "by length"):
        table.add_column(column, justify="left" if column == "attribute" else "right")
    for name, figures in ratings["attributes"].items():
        model, mean, length = (figures["predictors"][key] for key in ("model", "mean", "length"))
        table.add_row(
            name,
            _number(model["mse"]["value"], ".2f"),
            _number(mean["mse"]["value"], ".2f"),
            _number(model["pearson"]["value"], ".2f"),
            _number(model["pairs"]["accuracy"]["value"], ".0%"),
            _number(length["pairs"]["accuracy"]["value"], ".0%"),
        )
    return table


def preferences_table(figures: Mapping[str, Any]) -> Table:
    """How often the preferred response gets the higher helpfulness, by strength of preference.

    Args:
        figures: Of one weighting, as made by ``PreferenceEvaluation.evaluate``.

    Returns:
        A row a strength, and one for all.
    """
    table = Table(title="held-out preferences")
    for column in ("preferred response is", "pairs", "scored higher"):
        table.add_column(column, justify="left" if column != "pairs" else "right")
    for name, subset in figures["subsets"].items():
        table.add_row(name, str(subset["prompts"]), _number(subset["accuracy"]["value"], ".0%"))
    total = sum(subset["prompts"] for subset in figures["subsets"].values())
    table.add_row("all", str(total), _number(figures["accuracy"]["value"], ".0%"))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="helpsteer2 quickstart",
        description="Train a small policy and a reward model on made-up data, evaluate it.",
    )
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        default=f"outputs/quickstart/{datetime.now():%Y-%m-%d_%H-%M-%S}",
        help="folder of the run (outputs/quickstart/ and the time)",
    )
    parser.add_argument("overrides", nargs="*", help="overrides of both trainings: key=value")
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
    export = shlex.quote(str(run_dir / "reward" / "export"))
    return "\n".join(
        [
            "Next:",
            f"  echo {shlex.quote(json.dumps(EXAMPLE))} \\",
            f"    | {program} score --model {export}",
            f"  {program} data describe world                                # what is in the data",
            f"  {program} train experiment=reward/local_slice data.path=DIR  # your own ratings",
            f"  {program} train -m backbone=tiny,small seed=1,2              # a sweep",
            f"  {program} check experiment=reward/helpsteer2_llama3_70b      # the paper's recipe",
        ]
    )
