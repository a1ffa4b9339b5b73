"""Does SteerLM 2.0 arrive at the posterior, and how biased are its gradients? By listing all.

    python -m experiments.benchmarks.steerlm2_exact

Some prompts, a vocabulary of four tokens, responses of three: 64 outcomes, each with a random prior
P(y|x) and a random likelihood P(a|x,y). So the posterior, KL(P ‖ Q) and its gradient are sums. The
policy is a table of logits for every prompt and prefix, which can be any distribution over the
outcomes, or one for every position, which cannot. ``SteerLM2Loss`` trains it; the last runs train a
real Llama by ``SteerLM2Module`` on the responses of ``exact_optima``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.steerlm2_exact.gradient import (
    bias,
    largest_push_at_the_posterior,
    slope,
)
from experiments.benchmarks.steerlm2_exact.training import llama, trainings
from experiments.benchmarks.steerlm2_exact.world import World, tables_of
from helpsteer2 import plots
from helpsteer2.records import environment, write_json_atomic

HERE = "experiments.benchmarks.steerlm2_exact"
RESULT = Path(__file__).parents[1] / "results" / "steerlm2_exact.json"

SHARPNESS = (0.5, 1.0, 2.0, 4.0)
"""Worlds: mean nats that a label costs."""

TRAINED = 2.0
"""The world of the trainings."""

SIZES = (2, 3, 10, 30, 100, 300, 1000, 3000)
"""Responses a prompt. The draws are the same ones in all worlds."""

FIT_FROM = (30, 300)
"""Responses a prompt from which on a power is fitted: with less than 300, 1/n² is seen too."""


def biases(worlds: list[World], groups: int, seed: int) -> list[dict[str, Any]]:
    """A row for each world, policy and number of responses."""
    rows = []
    for world in worlds:
        halfway = (world.proposal + tables_of(world.posterior)) / 2
        for at, tables in (("proposal", world.proposal), ("halfway", halfway)):
            for n in SIZES:
                found = bias(world, tables, n, groups, seed)
                rows.append({"sharpness": world.sharpness, "at": at, "n": n, **found})
            told(f"bias, {world.sharpness:g} nats, {at}")
    return rows


def fits(rows: list[dict[str, Any]], worlds: list[World]) -> list[dict[str, Any]]:
    """The exponent of the bias for each world and policy, from ``FIT_FROM`` responses on."""
    found = []
    for world, at, first in product(worlds, ("proposal", "halfway"), FIT_FROM):
        used = [r for r in rows if (r["sharpness"], r["at"]) == (world.sharpness, at)]
        key = {"sharpness": world.sharpness, "at": at, "ess_share": world.ess_share, "from": first}
        found.append({**key, **slope(used, first)})
    return found


def bias_table(rows: list[dict[str, Any]], at: str) -> Table:
    """A row for each number of responses, a column for each world."""
    shown = Table(title=f"bias of the gradient, {at} (its term in 1/n), noise of one group")
    for column in ("n", *(f"label costs {sharpness:g} nats" for sharpness in SHARPNESS)):
        shown.add_column(column)
    for n in SIZES:
        found = [row for row in rows if (row["at"], row["n"]) == (at, n)]
        cells = (
            f"{r['bias']:.2%} ± {r['standard_error']:.2%} ({r['predicted']:.2%}), {r['noise']:.0%}"
            for r in found
        )
        shown.add_row(str(n), *cells)
    return shown


def training_table(rows: list[dict[str, Any]]) -> Table:
    """A row a training."""
    shown = Table(title="KL(P ‖ Q) in nats at the start, and after each iteration")
    for column in ("training", "start", "iterations"):
        shown.add_column(column)
    for row in rows:
        first, *others = row["divergence"]
        shown.add_row(row["name"], f"{first:.3f}", ", ".join(f"{value:.5f}" for value in others))
    return shown


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot bias against n at the proposal, and its term in 1/n."""
    lines = {}
    for sharpness in SHARPNESS:
        used = [r for r in rows if (r["sharpness"], r["at"]) == (sharpness, "proposal")]
        lines[f"label costs {sharpness:g} nats"] = [r["bias"] or None for r in used]
    figure = plots.curves(
        {name: list(SIZES) for name in lines},
        lines,
        labels=("responses a prompt", "bias of the gradient / its norm"),
        title="Self-normalised gradients of SteerLM 2.0, at the proposal",
    )
    (axes,) = figure.axes
    axes.set(xscale="log", yscale="log")
    # The style takes a $ for a $, which matplotlib's own names of powers are written with.
    axes.set_xticks(SIZES, [f"{n:,}" for n in SIZES], minor=False)
    axes.set_xticks([], minor=True)
    shares = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    axes.set_yticks(shares, [f"{share:.1%}" for share in shares], minor=False)
    axes.set_yticks([], minor=True)
    plots.save(figure, path)


def told(text: str) -> None:
    """Say how far it is."""
    sys.stderr.write(f"{time.monotonic() - STARTED:.0f} s: {text}\n")


STARTED = time.monotonic()


def main() -> None:
    """Measure, train, print the tables, write the record and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--groups", type=int, default=20_000, help="of each prompt, for a bias")
    parser.add_argument("--steps", type=int, default=500, help="of the shortest training")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    worlds = [World(sharpness, options.seed) for sharpness in SHARPNESS]
    trained_in = World(TRAINED, options.seed)
    at_posterior = {w.sharpness: largest_push_at_the_posterior(w, options.seed) for w in worlds}
    bias_rows = biases(worlds, options.groups, options.seed)
    training_rows = []
    for training in trainings(options.steps):
        found = training.run(trained_in, options.seed)
        training_rows.append({"name": training.name, "divergence": found})
        told(training.name)
    for name, n in (("Llama, all responses", None), ("Llama, n = 10", 10)):
        found = llama(options.steps, n, options.seed)
        training_rows.append({"name": name, "divergence": found})
        told(name)
    fitted = fits(bias_rows, worlds)
    console = Console(width=150)
    for at in ("proposal", "halfway"):
        console.print(bias_table(bias_rows, at))
    console.print(training_table(training_rows))
    for row in fitted:
        console.print(
            f"label costs {row['sharpness']:g} nats, {row['ess_share']:.0%} of many samples count, "
            f"{row['at']}, n ≥ {row['from']}: bias ∝ n^({row['slope']:.3f} ± "
            f"{row['standard_error']:.3f})"
        )
    console.print(f"largest gradient at the posterior: {max(at_posterior.values()):.1e}")
    record = {
        "command": shlex.join(["python", "-m", HERE, *sys.argv[1:]]),
        "bounds": {
            "exact groups, and Llama with all responses: divergence": "<= 0.01",
            "largest_gradient_at_the_posterior": "<= 1e-10",
            "n >= 300: bias - predicted": "within 3 standard errors",
        },
        "seed": options.seed,
        "trained_in": TRAINED,
        "groups": options.groups,
        "steps": options.steps,
        "bias": bias_rows,
        "fits": fitted,
        "largest_gradient_at_the_posterior": max(at_posterior.values()),
        "trainings": training_rows,
        "seconds": round(time.monotonic() - STARTED),
        "environment": environment(),
    }
    write_json_atomic(options.output, record)
    draw(bias_rows, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
