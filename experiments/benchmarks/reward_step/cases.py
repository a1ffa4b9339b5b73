"""What benchmarks of a training step share: heats of contenders, the command line, the record."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from rich.console import Console

from experiments.benchmarks.reward_step.cost import SIZES
from experiments.benchmarks.reward_step.job import LIMITS, Corpus, Job
from experiments.benchmarks.reward_step.summary import RATES, Heat, spread, summarise
from experiments.benchmarks.reward_step.turns import take_turns
from helpsteer2.records import environment

WIDTH = 120
"""Of the output where it is no terminal."""

OURS = "ours"
MATMUL = "matmul"

Contenders = Mapping[str, tuple[str, dict[str, Any]]]
"""Module and arguments of each contender, by name."""


def parser(name: str, description: str, peers: Sequence[str]) -> argparse.ArgumentParser:
    """The command line of a benchmark.

    Args:
        name: Of its module.
        description: In a line.
        peers: Names of TRL's settings.
    """
    made = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    made.add_argument("--size", nargs="+", choices=SIZES, default=["S", "M"])
    made.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    made.add_argument("--rounds", type=int, default=12, help="measured steps of each contender")
    made.add_argument("--warmup", type=int, default=2, help="steps before them")
    made.add_argument("--peers", nargs="*", choices=peers, default=list(peers))
    made.add_argument("--at-once", type=int, default=2, help="peers alive together with ours")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--tokens-per-microbatch", type=int, default=4096, help="of ours")
    output = f"experiments/benchmarks/results/{name.rpartition('.')[2]}.json"
    made.add_argument("--output", default=output)
    made.add_argument(
        "--cache-dir", default=os.environ.get("HELPSTEER2_CACHE", "~/.cache/helpsteer2")
    )
    return made


def measure_case(
    size: str,
    job: Job,
    always: Contenders,
    peers: Contenders,
    arguments: argparse.Namespace,
    console: Console,
) -> dict[str, Any]:
    """Measure one model size in one precision.

    Args:
        size: Name of the model size.
        job: What all train on.
        always: Contenders that are alive in every heat; ``ours`` is what the others are compared
            with.
        peers: The others, a few of them in a heat.
        arguments: As ``parser`` makes them.
        console: Shows every round.
    """
    names, n = list(peers), arguments.at_once
    heats = []
    for i in range(0, max(len(names), 1), n):
        chosen = {**always, **{name: peers[name] for name in names[i : i + n]}}
        heats.append(_heat(f"{size} {job.dtype}", job, chosen, arguments.threads, console))
    return {
        "size": size,
        "dtype": job.dtype,
        "model": {**job.config(), "linear_parameters": job.size.linear_parameters},
        "rounds": job.measured_steps,
        "groups_per_step": job.size.groups_per_step,
        "matmul_flops_per_second": {
            name: spread([rate[name] for heat in heats for rate in heat.rates]) for name in RATES
        },
        "contenders": summarise(heats, OURS),
    }


def _heat(title: str, job: Job, contenders: Contenders, threads: int, console: Console) -> Heat:
    """Measure contenders and the yardstick, one step each in turn."""
    yardstick = (f"{__package__}.{MATMUL}", {})
    turns = take_turns(title, {**contenders, MATMUL: yardstick}, job, threads, console)
    measured = {name: rounds[job.warmup_steps :] for name, rounds in turns.items()}
    rates = measured.pop(MATMUL)
    return Heat(measured, rates)


def best_peer(case: Mapping[str, Any], peers: Contenders) -> str:
    """Which of TRL's settings is the fastest on the same groups."""
    figures = {name: c for name, c in case["contenders"].items() if name in peers}
    if not figures:
        return ""
    best = max(figures, key=lambda name: figures[name]["groups_per_second"]["median"])
    return f"TRL's fastest setting: {best}"


def record_of(
    name: str,
    arguments: argparse.Namespace,
    argv: Sequence[str] | None,
    corpus: Corpus,
    cases: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What is written: enough to run it again and to judge it.

    Args:
        name: Of the benchmark's module.
        arguments: As ``parser`` makes them.
        argv: What they were made of; None for the command line.
        corpus: The data.
        cases: As ``measure_case`` makes them.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    where = environment()
    where["packages"].update({package: version(package) for package in ("trl", "accelerate")})
    return {
        "command": shlex.join(["python", "-m", name, *given]),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": where,
        "threads": arguments.threads,
        "tokens_per_microbatch": arguments.tokens_per_microbatch,
        "data": {
            "source": corpus.description,
            "max_prompt_tokens": LIMITS.max_prompt_tokens,
            "max_response_tokens": LIMITS.max_response_tokens,
            "vocabulary": len(corpus.tokenizer),
            **corpus.groups.report,
        },
        "cases": list(cases),
    }
