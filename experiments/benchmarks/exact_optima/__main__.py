"""Does on-policy training arrive where theory has it arrive? Answered by listing all responses.

    python -m experiments.benchmarks.exact_optima

A Llama of one layer answers one prompt in a vocabulary of ten tokens, and every text has a fixed
reward between 0 and 1. So expected rewards and distances between policies are sums over all
responses (91 of up to two tokens, finished or cut), and so are the policies that the objectives
lead to. Training is ``helpsteer2 train`` as it is: it samples, writes rollouts to the disk and
learns from them, one optimizer step an iteration.

First without a penalty, where the best is to give the one best response; then with penalties of all
kinds, on responses of up to two tokens and of one.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.exact_optima.runs import SAMPLES, Arrival, Run, arrive
from helpsteer2.losses.kl_penalty import KLPenalty
from helpsteer2.records import environment, write_json_atomic
from helpsteer2.rollouts.advantages import GAE

HERE = "experiments.benchmarks.exact_optima"
RESULT = Path(__file__).parents[1] / "results" / "exact_optima.json"

BETA = 0.3
"""Price of a nat; rewards are 0 to 1."""


def cases(iterations: int, copies: int, seed: int) -> Iterator[tuple[str, Run]]:
    """All runs, and their names."""

    def run(algorithm: Any, *penalty: Any, longest: int = 2, **options: Any) -> Run:
        kl = KLPenalty(BETA, *penalty) if penalty else KLPenalty(0.0)
        return Run(algorithm, kl, longest, iterations, copies, seed=seed, **options)

    yield "PPO", run("ppo")
    yield "RLOO", run("reinforce")
    for longest in (2, 1):
        yield "PPO", run("ppo", "k1", longest=longest)
        yield "RLOO", run("reinforce", "k1", longest=longest)
        for estimator in ("k2", "k3", "abs"):
            yield "RLOO", run("reinforce", estimator, "sum", "loss", longest=longest)
        for estimator in ("k2", "k3", "abs"):
            yield "RLOO", run("reinforce", estimator, longest=longest)
    yield "RLOO", run("reinforce", "k1", "mean")
    yield "PPO, λ .95, whitened", run("ppo", "k1", advantages=GAE())


def table(rows: list[dict[str, Any]]) -> Table:
    """A row a run."""
    shown = Table(title="total variations and expected rewards, over all responses")
    columns = ("", "penalty", "tokens", "reward", "to its destination", "to π_ref·exp(r/β)")
    for column in (*columns, "of its destination", "driven out"):
        shown.add_column(column)
    for row in rows:
        numbers = ("to_destination", "to_optimum", "destination_to_optimum")
        shown.add_row(
            row["name"],
            row["penalty"],
            str(row["tokens"]),
            f"{row['start_reward']:.3f} → {row['reward']:.3f} of {row['best_reward']:.3f}",
            *("–" if row[name] is None else f"{row[name]:.2%}" for name in numbers),
            f"{row['driven_out']:.0%}",
        )
    return shown


def described(name: str, run: Run, found: Arrival, seconds: float) -> dict[str, Any]:
    """A run and its figures, as plain data."""
    kl = run.kl
    reduced = ", mean over tokens" if kl.reduction == "mean" else ""
    return {
        "name": name,
        "penalty": f"{kl.estimator} in the {kl.place}{reduced}" if kl.coefficient else "none",
        "tokens": run.longest,
        **asdict(found),
        "seconds": seconds,
    }


def main() -> None:
    """Train, print the table, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--copies", type=int, default=8, help=f"{SAMPLES} responses each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, run in cases(options.iterations, options.copies, options.seed):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = arrive(run, Path(folder))
        rows.append(described(name, run, found, time.monotonic() - started))
        sys.stderr.write(f"{len(rows)}: {rows[-1]['seconds']:.0f} s\n")
    Console(width=140).print(table(rows))
    record = {
        "command": shlex.join(["python", "-m", HERE, *sys.argv[1:]]),
        "bounds": {
            "no penalty: reward / best_reward": ">= 0.95",
            "k1 in the reward, and k2 in the loss on one token: to_optimum": "<= 0.02",
        },
        "beta": BETA,
        "iterations": options.iterations,
        "samples_an_iteration": options.copies * SAMPLES,
        "seed": options.seed,
        "runs": rows,
        "environment": environment(),
    }
    write_json_atomic(options.output, record)


if __name__ == "__main__":
    main()
