"""``helpsteer2 quickstart``: every method in the made-up world, from nothing to a table."""

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
from helpsteer2.evaluation.meaning import OWN_REWARD
from helpsteer2.evaluation.report import named_table
from helpsteer2.pipeline.stages import override_text

WEIGHTING = "helpsteer2_rlhf"
PROMPTS = 128
STEERED_PROMPTS = 32
"""Each of them is answered behind 21 labels."""

STEERLM_2 = "SteerLM 2.0"
UNSEEN = 1000
"""Seed of the data that judge the reward model: others chose its checkpoint."""

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
    # Models this small lose more by waiting for a second thread than it takes off them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # loading them takes no time
    console.print(
        "A small language model learns to speak of a made-up world; a reward model learns from it "
        "what\nannotators like; DPO makes its answers better, on rated pairs and on its own "
        "samples; so do\nPPO and RLOO, by the reward itself; with SteerLM it answers as a label "
        "asks, and SteerLM 2.0\nmakes it listen better.\n"
        f"To go on after a stop: {_program()} quickstart --run-dir {shlex.quote(str(run_dir))}",
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
    exports = policies(result)
    reward_model = _export(result, "reward_model", "reward_model")
    console.print("evaluation on prompts that no training has seen")
    names = ("evaluation_of_rewards", "evaluation", "evaluation_of_steering")
    places = [run_dir / name for name in names]
    for table in reward_tables(_reward_metrics(places[0], reward_model)):
        console.print(table)
    console.print(policies_table(_policy_metrics(places[1], exports)))
    console.print(steering_table(_steering_metrics(places[2], steered(exports))))
    told = f"{time.monotonic() - started:.0f} s in all; more figures, answers and plots:"
    console.print(told, highlight=False)
    for folder in (*places, Path(reward_model).parent / "plots"):
        console.print(f"  {folder}", soft_wrap=True, highlight=False)
    steps = "\n" + _next_steps(list(exports.values())[-1], reward_model)
    console.print(steps, soft_wrap=True, markup=False, highlight=False)
    return 0


def policies(result: Mapping[str, Any]) -> dict[str, str]:
    """Find the policies of a pipeline.

    Args:
        result: ``result.json`` of ``pipeline=side_by_side``.

    Returns:
        Their folders by their names in the table, in its order.
    """
    pipeline = result["config"]["pipeline"]
    methods = [name for name, method in pipeline["methods"].items() if method is not None]
    iterations = pipeline["steerlm2_iterations"]
    stages = {
        "SFT": "sft",
        "DPO on pairs": "dpo",
        **{f"iteration {i}": f"dpo_{i}" for i in range(1, pipeline["iterations"] + 1)},
        **{name.upper(): name for name in methods},
        "SteerLM": "steerlm",
        **{f"{STEERLM_2}, {i}": f"steerlm2_{i}" for i in range(1, iterations + 1)},
    }
    return {name: _export(result, stage, "policy") for name, stage in stages.items()}


def steered(exports: Mapping[str, str]) -> dict[str, str]:
    """The policies that read labels, behind the one that all started from, which does not."""
    start = next(iter(exports))
    return {name: path for name, path in exports.items() if name == start or "SteerLM" in name}


def _export(result: Mapping[str, Any], stage: str, given: str) -> str:
    """The model that a stage has made, or that the pipeline was given in its place."""
    if stage in result["folders"]:
        return str(Path(result["folders"][stage]) / "export")
    return str(result["config"]["pipeline"][given])


def _reward_metrics(folder: Path, reward_model: str) -> dict[str, Any]:
    """Metrics of the reward model, by evaluator."""
    return dict(_evaluation(folder, {
        "model": reward_model,
        "evaluator": ["ratings", "preferences"],
        "data@evaluators.ratings.data": "world",
        "evaluators.ratings.data.seed": UNSEEN,
        "evaluators.ratings.data.ratings": "oracle",  # the truth, not the annotators'
        "data@evaluators.preferences.data": "world",
        "evaluators.preferences.data.seed": UNSEEN,
    })["metrics"])  # fmt: skip


def _policy_metrics(folder: Path, exports: Mapping[str, str]) -> dict[str, Any]:
    """Metrics of every policy, by its name in the table."""
    paths = list(exports.values())
    record = _evaluation(folder, {
        "model": paths,
        "evaluator": ["world_policy"],
        "evaluators.world_policy.data.validation_groups": PROMPTS,
        "evaluators.world_policy.sampling.max_tokens": 64,
        "evaluators.world_policy.baseline": paths[0],
        "evaluators.world_policy.reference": paths[0],
    })  # fmt: skip
    by_path = {
        model["path"]: record["metrics"][name]["world_policy"]
        for name, model in record["models"].items()
    }
    return {name: by_path[path] for name, path in exports.items()}


def _steering_metrics(folder: Path, exports: Mapping[str, str]) -> dict[str, Any]:
    """How closely policies follow their labels, by their names in the table."""
    record = _evaluation(folder, {
        "model": list(exports.values()),
        "evaluator": ["steerability"],
        "evaluators.steerability.data.validation_groups": STEERED_PROMPTS,
        "evaluators.steerability.sampling.n": 2,
        "evaluators.steerability.sampling.max_tokens": 64,
    })  # fmt: skip
    by_path = {
        model["path"]: record["metrics"][name]["steerability"]
        for name, model in record["models"].items()
    }
    return {name: by_path[path] for name, path in exports.items()}


def _evaluation(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate without a word, and read the record."""
    given = {"run_dir": str(folder), **settings}
    # Its tables hold far more than a first look wants; its record keeps all.
    with redirect_stdout(io.StringIO()):
        launch(CONFIG_COMMANDS["evaluate"], [override_text(*item) for item in given.items()])
    record = RunFolder(folder).result()
    assert record is not None
    return record


def reward_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """The few figures of a reward model that a first look needs.

    Args:
        metrics: ``ratings`` as made by ``RatingEvaluation.evaluate``, ``preferences`` as by
            ``PreferenceEvaluation.evaluate``.

    Returns:
        How near its scores are to ratings, if they are ratings, and how often the preferred
        response gets the higher reward.
    """
    rated = {
        name: figures["predictors"]
        for name, figures in metrics["ratings"]["attributes"].items()
        if "predictors" in figures
    }
    weightings = metrics["preferences"]["weightings"]
    preferences = _preferences_table(weightings.get(OWN_REWARD) or weightings[WEIGHTING])
    if not rated:
        return [preferences]
    return [_ratings_table(rated, metrics["ratings"]["responses"]), preferences]


def _ratings_table(rated: Mapping[str, Any], responses: int) -> Table:
    """A row an attribute, beside the mean rating and a predictor that knows the length alone."""
    table = named_table(
        f"reward model: {responses} responses, rated 0–4 by the oracle",
        ["", "MSE", "of the mean", "Pearson", "pairs right", "by length"],
    )
    for name, predictors in rated.items():
        model, mean, length = (predictors[key] for key in ("model", "mean", "length"))
        table.add_row(
            name,
            _number(model["mse"], ".2f"),
            _number(mean["mse"], ".2f"),
            _number(model["pearson"], ".2f"),
            _number(model["pairs"]["accuracy"], ".0%"),
            _number(length["pairs"]["accuracy"], ".0%"),
        )
    return table


def _preferences_table(figures: Mapping[str, Any]) -> Table:
    """A row a strength of the preference, and one for all."""
    subsets = figures["subsets"]
    table = named_table(
        "reward model: preferences of annotators", ["", "pairs", "preferred scored higher"]
    )
    for name, subset in subsets.items():
        table.add_row(name, str(subset["prompts"]), _number(subset["accuracy"], ".0%"))
    total = sum(subset["prompts"] for subset in subsets.values())
    table.add_row("all", str(total), _number(figures["accuracy"], ".0%"))
    return table


def _number(figure: Mapping[str, float | None], form: str) -> str:
    return "–" if figure["value"] is None else format(figure["value"], form)


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


def steering_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """How closely the answers follow what labels ask for.

    Args:
        results: By name of the policy, as made by ``SteerabilityEvaluation.evaluate``.
    """
    first = next(iter(results.values()))
    names = list(first["attributes"])
    table = named_table(
        f"labels: rank correlation of asked and got, {first['prompts']} unseen prompts",
        ["", *names, "gap", "cross-talk"],
        caption=(
            "gap: mean distance of the rating that was asked for to the oracle's, in points; "
            "cross-talk: points by which another rating moves for a point asked. The first row "
            "reads no label."
        ),
    )
    for name, result in results.items():
        ranks = [_number(result["attributes"][of]["spearman"], ".2f") for of in names]
        table.add_row(name, *ranks, *(_number(result[of], ".2f") for of in ("gap", "cross_talk")))
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
        description=(
            "A language model, a reward model, DPO and its iterations, PPO, RLOO, SteerLM and "
            "SteerLM 2.0 on made-up data, and a table of what each has brought."
        ),
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
            f"  {program} pipeline experiment=pipeline/world_iterative_dpo  # DPO, the whole of it",
            f"  {program} pipeline experiment=pipeline/world_on_policy      # PPO, RLOO likewise",
            f"  {program} pipeline experiment=pipeline/world_steerlm2       # SteerLM, SteerLM 2.0",
            f"  {program} data describe world                               # what is in the data",
            f"  {program} train experiment=reward/local_slice data.path=DIR # your own ratings",
            f"  {program} check experiment=reward/helpsteer2_llama3_70b     # the paper's recipe",
        ]
    )
