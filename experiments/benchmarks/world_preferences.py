"""The preference chain of arXiv 2410.01257 in the made-up world, beside its oracle.

    python -m experiments.benchmarks.world_preferences --seeds 1 2 3

For every seed a policy learns the world's language, and every reward model starts from it and sees
the same groups, each rated and preferred by the same annotators: regression on helpfulness;
Bradley–Terry, margin and scaled; scaled from the regression; and ExPO between those two, its α
searched on other pairs. All are judged by the oracle, which none has seen, on the same
held-out prompts: how often is the answer that deserves more helpfulness scored higher?
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.world_acceptance import oracle_world
from helpsteer2.data.groups import Group
from helpsteer2.records import environment, write_json_atomic
from helpsteer2.rewards.scorer import RewardScorer

RESULT = Path(__file__).parent / "results" / "world_preferences.json"
HELD_OUT, HELD_OUT_SEED = 1000, 1003
PAIRS = 19_200
"""Pairs of each training: a quarter of experiment=reward/world, where losses still differ."""
CLEAR = 1.0
"""Oracle's difference in helpfulness from which a pair counts as clear."""

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t, two-sided 95 %, by the number of seeds."""

FIRST_STAGE: dict[str, list[str]] = {
    "regression": ["attributes=[helpfulness]", "weights=helpfulness_only"],
    "Bradley–Terry": ["module=bradley_terry", "attributes=[reward]"],
    "margin": ["module=margin_bradley_terry", "attributes=[reward]"],
    "scaled": ["module=scaled_bradley_terry", "attributes=[reward]"],
}
SECOND_STAGE = "scaled from regression"
EXPO = "scaled from regression + ExPO"


def main(argv: Sequence[str] | None = None) -> int:
    """Train, judge, write the record and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("outputs/world_preferences"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--overrides", nargs="*", default=[], help="of every training")
    options = parser.parse_args(argv)
    started = time.monotonic()
    held_out = oracle_world(HELD_OUT, HELD_OUT_SEED)
    figures: dict[str, dict[int, dict[str, float]]] = {}
    for seed in options.seeds:
        folder = options.out.resolve() / f"seed_{seed}"
        for name, export in chain(folder, seed, options.overrides):
            figures.setdefault(name, {})[seed] = judge(export, held_out)
            print(f"seed {seed}: {name}: {figures[name][seed]}", flush=True)
    summary = {name: summarise(list(by_seed.values())) for name, by_seed in figures.items()}
    Console(width=100).print(table(summary))
    record = {
        "command": "python -m experiments.benchmarks.world_preferences --seeds "
        + " ".join(map(str, options.seeds)),
        "pairs": PAIRS,
        "held_out_pairs": len(held_out),
        "clear_gap": CLEAR,
        "summary": summary,
        "seeds": figures,
        "seconds": round(time.monotonic() - started),
        "environment": environment(),
    }
    write_json_atomic(options.result, record)
    return 0


def chain(out: Path, seed: int, overrides: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Train everything of one seed; names and exports."""
    policy = run("train", out / "policy", ["experiment=sft/world", f"seed={seed}", *overrides])
    base = ["experiment=reward/world", f"data.groups={PAIRS}"]
    base += [f"backbone.path={policy}", f"seed={seed}", *overrides]
    for name, own in FIRST_STAGE.items():
        export = run("train", out / name, [*base, *own])
        yield name, export
        if name == "regression":
            weak = export
    second = ["module=scaled_bradley_terry", "attributes=[helpfulness]", f"model.init_from={weak}"]
    strong = run("train", out / SECOND_STAGE.replace(" ", "_"), [*base, *second])
    yield SECOND_STAGE, strong
    search = [f"weak={weak}", f"strong={strong}", "alpha=search", f"seed={seed}"]
    # Another seed of the world: other answers, though some prompts are the same.
    search += ["data@search.pairs.data=world", "search.pairs.data.seed=1004"]
    yield EXPO, run("expo", out / "expo", search)


def run(command: str, run_dir: Path, overrides: Sequence[str]) -> Path:
    """Run the command line; what is finished is not run again."""
    run_dir.mkdir(parents=True, exist_ok=True)
    arguments = [sys.executable, "-m", "helpsteer2", command, f"run_dir='{run_dir}'", *overrides]
    with (run_dir / "output.log").open("w") as log:
        subprocess.run(arguments, check=True, stdout=log, stderr=log)
    return run_dir / "export"


def judge(export: Path, groups: Sequence[Group]) -> dict[str, float]:
    """Share of pairs that a model orders as the oracle's helpfulness does; equal scores are wrong.

    Args:
        export: A model of one output.
        groups: Pairs with the oracle's ratings.

    Returns:
        ``pairs`` (all that differ) and ``clear_pairs`` (by at least ``CLEAR``).
    """
    scores = np.array(list(RewardScorer.from_pretrained(str(export)).score(groups)))[..., 0]
    truth = np.array([group.attributes for group in groups], dtype=np.float64)[..., 0]
    gap = truth[:, 0] - truth[:, 1]
    right = np.sign(scores[:, 0] - scores[:, 1]) == np.sign(gap)
    return {
        "pairs": float(right[gap != 0].mean()),
        "clear_pairs": float(right[np.abs(gap) >= CLEAR].mean()),
    }


def summarise(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean over seeds with its 95 % interval."""
    summary = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        half = None
        if len(values) > 1:
            half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
        summary[key] = {"mean": statistics.fmean(values), "half_width": half}
    return summary


def table(summary: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row a model."""
    result = Table(title="pairs ordered as the oracle's helpfulness does, mean over seeds ± 95 %")
    for column in ("model", "all pairs", f"apart by ≥ {CLEAR:g}"):
        result.add_column(column, justify="left" if column == "model" else "right")
    for name, figures in summary.items():
        result.add_row(name, _cell(figures["pairs"]), _cell(figures["clear_pairs"]))
    return result


def _cell(value: Mapping[str, Any]) -> str:
    half = "" if value["half_width"] is None else f" ± {value['half_width']:.1%}"
    return f"{value['mean']:.1%}{half}"


if __name__ == "__main__":
    sys.exit(main())
