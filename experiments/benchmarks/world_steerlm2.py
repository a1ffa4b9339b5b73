"""Are the answers of SteerLM and SteerLM 2.0 better, and as asked for, in the made-up world?

    python -m experiments.benchmarks.world_steerlm2 --seeds 1 2 3 --jobs 2

For each seed, with the command line: ``experiment=pipeline/world_steerlm2``. Then every policy
answers prompts that none of them has seen, asked for the paper's attributes, and the oracle rates
the answers as in ``world_iterative_dpo``; and every policy is asked for each level of each
attribute (``evaluator=steerability``). ``evaluator=label_likelihood`` tells which concentration the
reward model's errors ask for. Intervals are 95 %, over prompts, and those of differences between
policies are paired. What is done is not done again: the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.benchmarks.world_iterative_dpo import WEIGHTS, pipeline, table
from experiments.benchmarks.world_steerlm2_tables import TABLES, claims
from helpsteer2.attributes import RATING_MAX, RATING_MIN
from helpsteer2.evaluation.steerability_tables import steerability_figures
from helpsteer2.plots import bars, save
from helpsteer2.records import environment, write_json_atomic

RESULT = Path(__file__).parent / "results" / "world_steerlm2.json"
STAGES = {
    "SFT": "sft",
    "SteerLM": "steerlm",
    "iteration 1": "steerlm2_1",
    "iteration 2": "steerlm2_2",
}
ITERATIONS = ("1", "2")
PROMPTS_SEED = 1000
"""Seed of unseen rated answers, that of the evaluators' own prompts."""

READING = "C"
"""Scaling and bin edges that ``weigh`` uses."""


def the_one(pattern: str, seed: int) -> str:
    """The folder that a pattern with ``{seed}`` and ``*`` stands for."""
    found = sorted(glob(pattern.format(seed=seed)))
    if len(found) != 1:
        raise SystemExit(f"{pattern} is no one folder for seed {seed}: {found}")
    return str(Path(found[0]).resolve())


def evaluated(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """The result of ``helpsteer2 evaluate``; one of the same arguments that is there is taken."""
    told, result = folder / "arguments.json", folder / "result.json"
    given = {"arguments": list(arguments)}
    if not told.exists() or json.loads(told.read_text()) != given:
        folder.mkdir(parents=True, exist_ok=True)
        told.unlink(missing_ok=True)
        command = [sys.executable, "-m", "helpsteer2", "evaluate", f"run_dir={folder}", *arguments]
        with (folder / "log.txt").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
        write_json_atomic(told, given)
    return dict(json.loads(result.read_text()))


def quoted(path: str) -> str:
    """A path as a value of an override, whatever its characters."""
    return json.dumps(path)


def judged(
    exports: Mapping[str, str], seed: int, options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """What the oracle says of every policy, of its answers and of how it follows labels."""
    world, steered = "evaluators.world_policy", "evaluators.steerability"
    prompts = [f"seed={seed}", f"{world}.data.validation_groups={options.prompts}"]
    result = evaluated(
        folder / "evaluate",
        [
            f"model=[{','.join(map(quoted, exports.values()))}]",
            "evaluator=[world_policy,steerability]",
            *prompts,
            f"{world}.baseline={quoted(exports['SFT'])}",
            f"{world}.reference={quoted(exports['SFT'])}",
            f"{steered}.data.validation_groups={options.steered_prompts}",
            f"{steered}.sampling.n={options.steered_samples}",
            f"{steered}.baseline={quoted(exports['SteerLM'])}",
        ],
    )
    by_path = {result["models"][key]["path"]: of for key, of in result["metrics"].items()}
    metrics = {name: by_path[path] for name, path in exports.items()}
    policies, before = {}, "SFT"
    for name, of in metrics.items():
        scores = of["world_policy"]["weightings"][WEIGHTS.name]
        gain = scores["gain"]
        if before != "SFT":
            step = [
                f"model={quoted(exports[name])}",
                "evaluator=[world_policy]",
                *prompts,
                f"{world}.baseline={quoted(exports[before])}",
            ]
            found = evaluated(folder / f"evaluate_{name.replace(' ', '_')}", step)["metrics"]
            gain = found["world_policy"]["weightings"][WEIGHTS.name]["gain"]
        policies[name] = {
            "score": scores["sampled"],
            "gap_closed": scores["gap_closed"],
            "gain_on_sft": scores["gain"],
            "gain_on_the_one_before": gain,
            "greedy": scores["greedy"],
            "best_answer": scores["best_answer"],
            "attributes": {
                key: figures["sampled"] for key, figures in of["world_policy"]["attributes"].items()
            },
            **{key: of["world_policy"][key] for key in ("kl", "tokens", "unfinished", "steering")},
        }
        before = name
    return {
        "policies": policies,
        "steerability": {name: of["steerability"] for name, of in metrics.items()},
        "evaluation_seconds": result["wall_seconds"],
    }


def distances(metrics: Path) -> dict[str, Any]:
    """KL divergence of the weights from the policy, in nats, over the steps of a training.

    The mean over the last eighth of the steps stands beside that of the policy it started from on
    the same groups: a single step sees few of them.
    """
    series: dict[str, dict[int, float]] = {"train/distance": {}, "train/start_distance": {}}
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["metric"] in series:
                series[row["metric"]][int(row["step"])] = float(row["value"])
    own, start = ([of[step] for step in sorted(of)] for of in series.values())
    last = max(1, len(own) // 8)
    return {
        "first": own[0],
        "last": own[-1],
        "last_eighth": float(np.mean(own[-last:])),
        "start_in_last_eighth": float(np.mean(start[-last:])),
    }


def weighed(stages: Mapping[str, str], iteration: str) -> dict[str, Any]:
    """What the weights of an iteration were worth, and how closely they were learned."""
    record = json.loads((Path(stages[f"weigh_{iteration}"]) / "result.json").read_text())
    told = ("effective_samples", "largest_weight", "collapsed", "distance", "spread")
    return {
        **{key: record["metrics"][key] for key in told},
        "training": distances(Path(stages[f"steerlm2_{iteration}"]) / "metrics.csv"),
    }


def likelihood(reward_model: str, seed: int, rated: int, folder: Path) -> dict[str, Any]:
    """How probable the annotators' ratings are under P(a | x, y), at 24 and at its best."""
    data = "evaluators.label_likelihood.data"
    arguments = [
        *(f"model={quoted(reward_model)}", "evaluator=[label_likelihood]", f"seed={seed}"),
        *(f"data@{data}=world", f"{data}.validation_groups={rated}", f"{data}.seed={PROMPTS_SEED}"),
    ]
    found = evaluated(folder / "label_likelihood", arguments)["metrics"]["label_likelihood"]
    return {
        "prompts": found["prompts"],
        "concentration": found["concentration"],
        "all": found["all"],
        "attributes": {name: of["readings"][READING] for name, of in found["attributes"].items()},
    }


def run_seed(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate, or go on with it: every figure of a seed."""
    runs = options.runs.resolve()
    folder = runs / f"seed_{seed}"
    overrides = [f"stages_dir={runs / 'stages'}", *options.overrides]
    names, exports = dict(STAGES), {}
    if options.models is not None:
        policy, reward_model = (the_one(pattern, seed) for pattern in options.models)
        del names["SFT"]
        exports["SFT"] = policy
        overrides += [
            *("pipeline.sft=null", f"pipeline.policy={quoted(policy)}"),
            *("pipeline.reward=null", f"pipeline.reward_model={quoted(reward_model)}"),
        ]
    run = pipeline(folder, seed, overrides, "pipeline/world_steerlm2", names)
    exports |= run["exports"]
    stages = json.loads((folder / "result.json").read_text())["folders"]
    if options.models is None:
        reward_model = str(Path(stages["reward_model"]) / "export")
    seconds = {
        name: json.loads((Path(stage) / "stage.json").read_text())["wall_seconds"]
        for name, stage in stages.items()
    }
    return {
        **judged(exports, seed, options, folder),
        "iterations": {number: weighed(stages, number) for number in ITERATIONS},
        "likelihood": likelihood(reward_model, seed, options.rated, folder),
        "stage_seconds": seconds,
    }


def plots(seeds: Mapping[str, Any], path: Path) -> Iterable[Path]:
    """Draw every seed's scores, and how the first one's policies follow labels."""
    scores = {
        f"seed {seed}": [policy["score"] for policy in run["policies"].values()]
        for seed, run in seeds.items()
    }
    first = next(iter(seeds.values()))["steerability"]
    title = f"oracle's score of sampled answers, weighted as in {WEIGHTS.name}"
    drawn = {
        "": bars(scores, list(first), title=title, limits=(RATING_MIN, RATING_MAX)),
        **{f"_{name}": of for name, of in steerability_figures(first).items()},
    }
    for name, figure in drawn.items():
        target = path.with_name(f"{path.stem}{name}.png")
        save(figure, target)
        yield target


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    parser.add_argument("--prompts", type=int, default=256, help="prompts that policies answer")
    parser.add_argument("--steered-prompts", type=int, default=128, help="that labels are tried on")
    parser.add_argument("--steered-samples", type=int, default=4, help="answers to each label")
    parser.add_argument("--rated", type=int, default=1024, help="groups for label_likelihood")
    parser.add_argument("--runs", type=Path, default=Path("outputs/world_steerlm2"))
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument(
        "--models",
        nargs=2,
        metavar=("POLICY", "REWARD_MODEL"),
        help="exports to start from instead of training them; {seed} and * may stand in both",
    )
    parser.add_argument("--overrides", nargs="*", default=[], help="of every pipeline")
    return parser.parse_args()


def main() -> None:
    """Run every seed, print the tables, write record and plots."""
    options = arguments()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda seed: run_seed(seed, options), options.seeds))
    seeds = {str(seed): run for seed, run in zip(options.seeds, found, strict=True)}
    console = Console(width=150)
    console.print(table(seeds))
    for made in TABLES:
        console.print(made(seeds))
    record = {
        "command": " ".join(["python -m experiments.benchmarks.world_steerlm2", *sys.argv[1:]]),
        "claims": claims(seeds),
        "seeds": {seed: kept(run) for seed, run in seeds.items()},
        "environment": environment(),
    }
    write_json_atomic(options.output, record)
    for path in plots(seeds, options.output):
        console.print(f"wrote {path}", soft_wrap=True)


def kept(run: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a seed for the record: no answers, no folders, slopes without intervals."""
    left_out = ("attributes", "examples", "baseline")
    steerability = {}
    for name, of in run["steerability"].items():
        steerability[name] = {key: value for key, value in of.items() if key not in left_out}
        steerability[name]["attributes"] = {
            asked: {
                **figures,
                "slopes": {key: at["value"] for key, at in figures["slopes"].items()},
            }
            for asked, figures in of["attributes"].items()
        }
    return {**run, "steerability": steerability}


if __name__ == "__main__":
    main()
