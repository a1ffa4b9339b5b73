"""``helpsteer2 quickstart``: iterative DPO in the made-up world, from nothing to a table."""

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
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.evaluation.report import named_table
from helpsteer2.pipeline.stages import override_text

WEIGHTING = "helpsteer2_rlhf"
PROMPTS = 128
EXAMPLE = {
    "prompt": "Tell me pet and job of Ada.",
    "response": "So, we have pet goat. Well, we have job baker.",
}


def main(argv: Sequence[str]) -> int:
    """Run the pipeline, evaluate its policies and sum it all up.

    The same command with the same folder goes on where it was stopped.

    Args:
        argv: ``--run-dir DIR`` and overrides of ``experiment=pipeline/quickstart``.

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
    console.print(
        "A small language model learns to speak of a made-up world; a reward model learns from it "
        "what\nannotators like; DPO makes its answers better, on rated pairs and on its own "
        f"samples.\nTo go on after a stop: {_program()} quickstart --run-dir "
        f"{shlex.quote(str(run_dir))}",
        highlight=False,
        soft_wrap=True,
    )
    overrides = [
        "experiment=pipeline/quickstart",
        override_text("run_dir", str(run_dir)),
        override_text("stages_dir", str(run_dir / "stages")),
        *arguments.overrides,
    ]
    code = launch(CONFIG_COMMANDS["pipeline"], overrides)
    result = RunFolder(run_dir).result()
    if code or result is None:
        return code
    exports = _policies(result)
    metrics = _evaluated(run_dir / "evaluation", exports, console)
    console.print(policies_table(metrics))
    seconds, folder = time.monotonic() - started, run_dir / "evaluation"
    told = f"{seconds:.0f} s in all; more figures, answers and a plot are in {folder}\n"
    console.print(told, soft_wrap=True, highlight=False)
    steps = _next_steps(list(exports.values())[-1], _export(result, "reward_model", "reward_model"))
    console.print(steps, soft_wrap=True, markup=False, highlight=False)
    return 0


def _policies(result: Mapping[str, Any]) -> dict[str, str]:
    """Folders of the policies of a pipeline, by their names in the table."""
    exports = {
        "SFT": _export(result, "sft", "policy"),
        "DPO on pairs": _export(result, "dpo"),
    }
    for number in range(1, result["config"]["pipeline"]["iterations"] + 1):
        exports[f"iteration {number}"] = _export(result, f"dpo_{number}")
    return exports


def _export(result: Mapping[str, Any], stage: str, given: str = "") -> str:
    """The model that a stage has made, or that the pipeline was given in its place."""
    if stage in result["folders"]:
        return str(Path(result["folders"][stage]) / "export")
    return str(result["config"]["pipeline"][given])


def _evaluated(folder: Path, exports: Mapping[str, str], console: Console) -> dict[str, Any]:
    """Metrics of every policy, by its name in the table; read again if they are there."""
    paths = list(exports.values())
    record = RunFolder(folder).result()
    # The name of a stage's folder stands for all that its policy depends on.
    if record is None or [model["path"] for model in record["models"].values()] != paths:
        console.print(f"the oracle rates the answers of {len(paths)} policies to unseen prompts")
        settings: dict[str, Any] = {
            "run_dir": str(folder),
            "model": paths,
            "evaluator": ["world_policy"],
            "evaluators.world_policy.data.validation_groups": PROMPTS,
            "evaluators.world_policy.sampling.max_tokens": 64,
            "evaluators.world_policy.baseline": paths[0],
            "evaluators.world_policy.reference": paths[0],
        }
        # Its tables hold far more than a first look wants; its record keeps all.
        with redirect_stdout(io.StringIO()):
            overrides = [override_text(key, value) for key, value in settings.items()]
            launch(CONFIG_COMMANDS["evaluate"], overrides)
        record = RunFolder(folder).result()
    assert record is not None
    by_path = {
        model["path"]: record["metrics"][name]["world_policy"]
        for name, model in record["models"].items()
    }
    return {name: by_path[path] for name, path in exports.items()}


def policies_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """What each step has brought.

    Args:
        results: By name of the policy, as made by ``WorldPolicyEvaluation.evaluate``; the first
            one is the baseline of all.

    Returns:
        A row a policy, one for the best of the baseline's n answers, and one for the best answers.
    """
    first = next(iter(results.values()))
    start = first["weightings"][WEIGHTING]
    table = named_table(
        f"answers to {first['prompts']} unseen prompts, scored 0–4 by the oracle",
        ["", "score", "gap closed", "KL to SFT, nats", "tokens"],
        caption=(
            f"score: mean of the ratings weighted as in {WEIGHTING}, over {first['samples']} "
            "samples a prompt. Gap: from SFT to the best answers. In brackets 95 % intervals over "
            "prompts; of one seed."
        ),
    )
    for name, result in results.items():
        figures = result["weightings"][WEIGHTING]
        table.add_row(
            name,
            _with_ends(figures["sampled"], ".2f"),
            "" if result is first else _with_ends(figures["gap_closed"], ".0%"),
            "" if result is first else _with_ends(result["kl"], ".1f"),
            format(result["tokens"]["sampled"]["value"], ".1f"),
        )
        if result is first:
            table.add_row(
                f"best of {result['samples']}, SFT",
                _with_ends(figures["best_of_n"], ".2f"),
                _with_ends(figures["best_of_n_gap_closed"], ".0%"),
            )
    table.add_section()
    table.add_row("the best answers", _with_ends(start["best_answer"], ".2f"), "100%")
    return table


def _with_ends(figure: Mapping[str, float | None], form: str) -> str:
    """A figure with its interval in brackets."""
    value, low, high = (figure[key] for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "–"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="helpsteer2 quickstart",
        description="Iterative DPO on made-up data: language model, reward model, DPO, table.",
    )
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        default=f"outputs/quickstart/{datetime.now():%Y-%m-%d_%H-%M-%S}",
        help="folder of the run (outputs/quickstart/ and the time)",
    )
    parser.add_argument(
        "overrides", nargs="*", help="overrides of experiment=pipeline/quickstart: key=value"
    )
    return parser


def _program() -> str:
    """How the program was called, so that commands can be copied as they are."""
    program = sys.argv[0]
    if program == shutil.which("helpsteer2"):
        return "helpsteer2"
    return "python -m helpsteer2" if program.endswith(".py") else program


def _next_steps(policy: str, reward_model: str) -> str:
    """Commands to try next."""
    program, example = _program(), shlex.quote(json.dumps(EXAMPLE))
    policy, reward_model = shlex.quote(policy), shlex.quote(reward_model)
    return "\n".join(
        [
            "Next:",
            f"  echo {example} \\",
            f"    | {program} score --model {reward_model}",
            f"  {program} sample model={policy} data=world max_prompts=5 sampling.n=3",
            f"  {program} pipeline experiment=pipeline/world_iterative_dpo  # the whole of it",
            f"  {program} data describe world                               # what is in the data",
            f"  {program} train experiment=reward/local_slice data.path=DIR # your own ratings",
            f"  {program} check experiment=reward/helpsteer2_llama3_70b     # the paper's recipe",
        ]
    )
