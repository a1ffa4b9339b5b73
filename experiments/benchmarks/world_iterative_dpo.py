"""How much of the gap to the best answers does iterative DPO close in the made-up world?

    python -m experiments.benchmarks.world_iterative_dpo --seeds 1 2 3

For each seed, with the command line: ``experiment=pipeline/world_iterative_dpo``. Then every policy
answers prompts that none of them has seen, and the oracle rates the answers: the score is the mean
of its ratings weighted as in ``helpsteer2_rlhf``, the gap is that from the SFT policy to the best
answers. Intervals are 95 %, over prompts, and those of gains are paired.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from helpsteer2.attributes import AttributeWeights
from helpsteer2.evaluation.policies import EvaluatedPolicy
from helpsteer2.evaluation.scoring import EvaluationContext
from helpsteer2.evaluation.world_policy import WorldPolicyEvaluation
from helpsteer2.generation.local import LocalEngine
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.records import environment, plain, write_json_atomic
from helpsteer2.world.source import WorldSource

RESULT = Path(__file__).parent / "results" / "world_iterative_dpo.json"
WEIGHTS = AttributeWeights(
    "helpsteer2_rlhf", {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45}
)
STAGES = {"SFT": "sft", "DPO": "dpo", "iteration 1": "dpo_1", "iteration 2": "dpo_2"}
SAMPLES = 10
PROMPTS_SEED = 1003
"""Seed of the prompts that policies answer; those of validation are in the training of no seed."""


def pipeline(
    folder: Path,
    seed: int,
    overrides: Sequence[str],
    experiment: str = "pipeline/world_iterative_dpo",
    names: Mapping[str, str] = STAGES,
) -> dict[str, Any]:
    """Run a pipeline, or go on with it: the folder of every policy and the seconds it took."""
    command = [
        *(sys.executable, "-m", "helpsteer2", "pipeline"),
        f"experiment={experiment}",
        *(f"run_dir={folder}", f"stages_dir={folder / 'stages'}", f"seed={seed}"),
        "pipeline.evaluate=null",
        *overrides,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    stages = json.loads((folder / "result.json").read_text())["folders"]
    exports = {name: str(Path(stages[stage]) / "export") for name, stage in names.items()}
    return {"seconds": time.monotonic() - start, "exports": exports}


def judged(exports: Mapping[str, str], prompts: int, seed: int, cache: Path) -> dict[str, Any]:
    """What the oracle says of every policy, and what each has gained on the one before it."""
    evaluation = WorldPolicyEvaluation(
        WorldSource(groups=1, seed=PROMPTS_SEED, validation_groups=prompts),
        SamplingParams(n=SAMPLES, max_tokens=96, seed=seed),
        baseline=exports["SFT"],
        reference=exports["SFT"],
    )
    context = EvaluationContext((WEIGHTS,), cache, None, 0, Console())
    figures: dict[str, Any] = {}
    before = exports["SFT"]
    for name, path in exports.items():
        policy = EvaluatedPolicy(path, LocalEngine())
        result = evaluation.evaluate(policy, context)
        scores = result["weightings"][WEIGHTS.name]
        step = replace(evaluation, baseline=before, reference=None).evaluate(policy, context)
        figures[name] = {
            "score": scores["sampled"],
            "gap_closed": scores["gap_closed"],
            "gain_on_the_one_before": step["weightings"][WEIGHTS.name]["gain"],
            "best_of_10": scores["best_of_n"],
            "best_of_10_of_sft_gap_closed": scores["baseline_best_of_n_gap_closed"],
            "greedy": scores["greedy"],
            "best_answer": scores["best_answer"],
            **{key: result[key] for key in ("kl", "tokens", "unfinished", "attributes")},
        }
        before = path
    return dict(plain(figures))


def table(seeds: Mapping[str, Any]) -> Table:
    """A row a policy of every seed."""
    shown = Table(title="oracle's score, weighted as in helpsteer2_rlhf")
    for column in ("seed", "policy", "score", "gap closed", "gain on the one before", "KL, nats"):
        shown.add_column(column)
    for seed, run in seeds.items():
        for name, figures in run["policies"].items():
            gap, gain = figures["gap_closed"], figures["gain_on_the_one_before"]
            shown.add_row(
                seed,
                name,
                f"{figures['score']['value']:.3f}",
                f"{gap['value']:.1%} [{gap['low']:.1%}, {gap['high']:.1%}]",
                f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]",
                f"{figures['kl']['value']:.2f}",
            )
    return shown


def main() -> None:
    """Run every seed, print the table, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--prompts", type=int, default=512, help="prompts that policies answer")
    parser.add_argument("--out", type=Path, default=Path("outputs/world_iterative_dpo"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--overrides", nargs="*", default=[], help="of every pipeline")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    seeds: dict[str, Any] = {}
    for seed in options.seeds:
        folder = options.out.resolve() / f"seed_{seed}"
        run = pipeline(folder, seed, options.overrides)
        policies = judged(run["exports"], options.prompts, seed, folder / "scores")
        seeds[str(seed)] = {"seconds": run["seconds"], "policies": policies}
    Console(width=120).print(table(seeds))
    record = {
        "command": "python -m experiments.benchmarks.world_iterative_dpo " + " ".join(sys.argv[1:]),
        "bounds": {
            "gap_closed by iteration 2": ">= 0.25",
            "order": "iteration 2 >= iteration 1 >= DPO",
        },
        "seeds": seeds,
        "environment": environment(),
    }
    write_json_atomic(options.result, record)


if __name__ == "__main__":
    main()
