"""How much of the gap to the best answers do PPO and RLOO close in the made-up world?

    python -m experiments.benchmarks.world_on_policy --seeds 1 2 3

For each seed, with the command line: ``experiment=pipeline/world_on_policy``. With ``--models DIR``
the language models and reward models are those that ``world_iterative_dpo --out DIR`` has trained,
so that the methods start from the same. Policies are judged as there, on the same prompts. The plot
beside the result shows for every iteration of every seed what the oracle gives the samples that
training was on, against their KL divergence from the SFT policy.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.benchmarks.world_iterative_dpo import judged, pipeline, table
from helpsteer2.plots import curves, save
from helpsteer2.records import environment, write_json_atomic

RESULT = Path(__file__).parent / "results" / "world_on_policy.json"
METHODS = {"PPO": "ppo", "RLOO": "rloo"}
SHOWN = ("rollout/kl", "rollout/weighted_score", "rollout/watch/oracle")
"""Figures of an iteration that the result keeps."""


def trainings(exports: Mapping[str, str]) -> dict[str, Any]:
    """Seconds of every training, and the figures of its iterations."""
    found = {}
    for name in METHODS:
        folder = Path(exports[name]).parent
        result = json.loads((folder / "result.json").read_text())
        records = sorted((folder / "rollouts").glob("iteration_*/record.json"))
        metrics = [json.loads(path.read_text())["metrics"] for path in records]
        found[name] = {
            "seconds": result["wall_seconds"],
            "iterations": {key: [of[key] for of in metrics] for key in SHOWN},
        }
    return found


def trained_before(folder: Path) -> list[str]:
    """Overrides that take the models of another benchmark's run instead of training them."""
    stages = json.loads((folder / "result.json").read_text())["folders"]
    return [
        *("pipeline.sft=null", f"pipeline.policy={stages['sft']}/export"),
        *("pipeline.reward=null", f"pipeline.reward_model={stages['reward_model']}/export"),
    ]


def plot(seeds: Mapping[str, Any], path: Path) -> None:
    """Draw the oracle's score against the divergence, a line a training."""
    lines = {
        f"{name}, seed {seed}": training["iterations"]
        for seed, run in seeds.items()
        for name, training in run["trainings"].items()
    }
    figure = curves(
        {name: of["rollout/kl"] for name, of in lines.items()},
        {name: of["rollout/watch/oracle"] for name, of in lines.items()},
        labels=("KL divergence from SFT, nats a response", "oracle's weighted score"),
        title="mean over the samples of each iteration",
    )
    save(figure, path)


def main() -> None:
    """Run every seed, print the table, write record and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--prompts", type=int, default=512, help="prompts that policies answer")
    parser.add_argument("--out", type=Path, default=Path("outputs/world_on_policy"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--models", type=Path, help="--out of world_iterative_dpo, to start there")
    parser.add_argument("--overrides", nargs="*", default=[], help="of every pipeline")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    seeds: dict[str, Any] = {}
    for seed in options.seeds:
        folder = options.out.resolve() / f"seed_{seed}"
        overrides, names = list(options.overrides), {"SFT": "sft", **METHODS}
        exports = {}
        if options.models is not None:
            before = options.models / f"seed_{seed}"
            overrides += trained_before(before)
            stages = json.loads((before / "result.json").read_text())["folders"]
            exports["SFT"] = f"{stages[names.pop('SFT')]}/export"
        run = pipeline(folder, seed, overrides, "pipeline/world_on_policy", names)
        exports |= run["exports"]
        policies = judged(exports, options.prompts, seed, folder / "scores")
        seeds[str(seed)] = {"policies": policies, "trainings": trainings(exports)}
    console = Console(width=120)
    console.print(table(seeds))
    for seed, run in seeds.items():
        for name, training in run["trainings"].items():
            console.print(f"seed {seed}, {name}: {training['seconds']:.0f} s")
    record = {
        "command": " ".join(["python -m experiments.benchmarks.world_on_policy", *sys.argv[1:]]),
        "bounds": {"gap_closed": ">= 0.25 each", "kl": "<= 15", "seconds": "<= 480 each"},
        "seeds": seeds,
        "environment": environment(),
    }
    write_json_atomic(options.result, record)
    plot(seeds, options.result.with_suffix(".png"))


if __name__ == "__main__":
    main()
