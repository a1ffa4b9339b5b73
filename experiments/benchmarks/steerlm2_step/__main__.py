"""Measure scoring and training of SteerLM 2.0 against plain transformers on padded sequences.

    python -m experiments.benchmarks.steerlm2_step --size S --rounds 4

``experiments/benchmarks/README.md`` says what is measured and how.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.benchmarks.dpo_step.__main__ import MALLOC, STATE_BYTES
from experiments.benchmarks.reward_step.cases import WIDTH
from experiments.benchmarks.reward_step.cost import SIZES
from experiments.benchmarks.reward_step.job import LIMITS, Corpus, load_corpus
from experiments.benchmarks.reward_step.turns import Report, Worker
from experiments.benchmarks.steerlm2_step.job import RESPONSES, SteerLM2Job, lengths_of, make_job
from experiments.benchmarks.steerlm2_step.padded import Setting
from experiments.benchmarks.steerlm2_step.summary import (
    OURS,
    PHASES,
    SCORING,
    SINGLE,
    TOLERANCE,
    TRAINING,
    USUAL,
    differences,
    slower_ones,
    summarise,
    table,
)
from helpsteer2.records import environment, write_json_atomic

HERE = "experiments.benchmarks.steerlm2_step"

PEERS: dict[str, dict[str, Setting]] = {
    SCORING: {
        USUAL: Setting(rows=RESPONSES, careful=False),
        SINGLE: Setting(rows=1),
        **{f"sorted_{rows}": Setting(rows) for rows in (4, 8, 16)},
    },
    TRAINING: {
        USUAL: Setting(rows=RESPONSES, careful=False),
        SINGLE: Setting(rows=1),
        **{f"sorted_{rows}": Setting(rows) for rows in (2, 5, 10)},
        "two_passes_4": Setting(rows=4, two_passes=True),
    },
}
"""Settings of the peers, by phase; ``padded.Setting`` says what they mean."""

WEIGHT_BYTES = 4
"""Of a parameter in fp32: all that scoring has to hold of it."""

Contender = tuple[str, str]
"""Phase and name."""

Rounds = dict[str, dict[str, list[Report]]]
"""By phase and name, a report a round."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run every case, write the record and print the tables."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.peaks:
        os.environ.setdefault("GLIBC_TUNABLES", MALLOC)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    corpus = load_corpus(os.environ.get("HELPSTEER2_REAL_DATA"), Path(arguments.cache_dir))
    cases = []
    for size in arguments.size:
        with tempfile.TemporaryDirectory() as folder:
            job = make_job(
                corpus,
                Path(folder) / "groups",
                size=replace(SIZES[size], groups_per_step=arguments.prompts),
                warmup_steps=arguments.warmup,
                measured_steps=arguments.rounds,
                tokens_per_microbatch=arguments.tokens_per_microbatch,
                conversations=arguments.conversations,
            )
            cases.append(_case(size, job, arguments, console))
        write_json_atomic(arguments.output, _record(arguments, argv, corpus, cases))
        console.print(table(cases[-1]))
    console.print(f"written to {arguments.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").splitlines()[0]
    names = sorted({name for peers in PEERS.values() for name in peers})
    made = argparse.ArgumentParser(prog=f"python -m {HERE}", description=summary)
    made.add_argument("--size", nargs="+", choices=SIZES, default=["S"])
    made.add_argument("--prompts", type=int, default=8, help="of a step, with 10 responses each")
    made.add_argument("--rounds", type=int, default=4, help="measured steps of each contender")
    made.add_argument("--warmup", type=int, default=1, help="steps before them")
    made.add_argument("--peers", nargs="+", choices=names, default=names)
    made.add_argument(
        "--keep", type=int, default=1,
        help="so many of the settings that pad, and so many of all, go on after the warm-up, "
        "beside the usual one",
    )  # fmt: skip
    made.add_argument(
        "--conversations", metavar="FILE",
        help="conversations in NeMo-Aligner's form, whose prompts are taken instead",
    )  # fmt: skip
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--tokens-per-microbatch", type=int, default=4096, help="of ours")
    made.add_argument("--peaks", action="store_true", help="measure memory: the clock is off then")
    made.add_argument("--output", default="experiments/benchmarks/results/steerlm2_step.json")
    made.add_argument(
        "--cache-dir", default=os.environ.get("HELPSTEER2_CACHE", "~/.cache/helpsteer2")
    )
    return made


def _case(
    size: str, job: SteerLM2Job, arguments: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Measure one model size."""
    contenders: dict[Contender, tuple[str, Report]] = {}
    for phase in PHASES:
        contenders[phase, OURS] = (f"{HERE}.ours", {"phase": phase})
        for name, setting in PEERS[phase].items():
            if name in arguments.peers:
                options = {"phase": phase, "setting": setting}
                contenders[phase, name] = (f"{HERE}.peer", options)
    rounds, equality = _take_turns(job, contenders, arguments, console)
    measured = {
        phase: {
            name: turns[job.warmup_steps :]
            for name, turns in rounds[phase].items()
            if len(turns) == job.total_steps
        }
        for phase in PHASES
    }
    figures = summarise(measured)
    return {
        "size": size,
        "dtype": job.dtype,
        "model": {**job.config(), "parameters": job.n_parameters},
        "rounds": job.measured_steps,
        "prompts_per_step": job.size.groups_per_step,
        "responses": RESPONSES,
        "lengths": lengths_of(job.groups()),
        "settings": {
            phase: {name: asdict(setting) for name, setting in PEERS[phase].items()}
            for phase in PHASES
        },
        "warmup_seconds": {
            phase: {
                name: [turn["seconds"] for turn in turns[: job.warmup_steps]]
                for name, turns in rounds[phase].items()
            }
            for phase in PHASES
        },
        "equality": {"tolerance": TOLERANCE, "largest_differences": equality},
        "memory": _memory(job, figures["phases"]),
        **figures,
    }


def _take_turns(
    job: SteerLM2Job,
    contenders: Mapping[Contender, tuple[str, Report]],
    arguments: argparse.Namespace,
    console: Console,
) -> tuple[Rounds, dict[str, dict[str, dict[str, float]]]]:
    """Give every contender one step in turn, and see that all compute the same.

    Returns:
        The reports, and how far the numbers of each peer were from ours: log-probabilities in all
        rounds, loss and gradient norm in the first one.
    """
    rounds: Rounds = {phase: {} for phase in PHASES}
    apart: dict[str, dict[str, dict[str, float]]] = {phase: {} for phase in PHASES}
    with ExitStack() as stack:
        workers: dict[Contender, Worker] = {}
        for (phase, name), (module, options) in contenders.items():
            worker = Worker(f"{phase} {name}", module, arguments.threads, job=job, **options)
            stack.callback(worker.close)
            workers[phase, name] = worker
        for worker in workers.values():
            worker.wait_ready()
        for round_number in range(job.total_steps):
            reports = _round(workers, round_number)
            for phase in PHASES:
                for name, report in reports[phase].items():
                    rounds[phase].setdefault(name, []).append(report)
                if phase == SCORING or round_number == 0:
                    for name, found in differences(phase, reports[phase]).items():
                        known = apart[phase].setdefault(name, found)
                        known.update({key: max(known[key], found[key]) for key in found})
                seconds = {name: report["seconds"] for name, report in reports[phase].items()}
                told = "  ".join(f"{name} {value:.2f}s" for name, value in seconds.items())
                title = f"{round_number + 1}/{job.total_steps} {phase}"
                console.print(f"{title}  {told}", soft_wrap=True)
                if round_number + 1 == job.warmup_steps:
                    for name in slower_ones(seconds, arguments.keep):
                        workers.pop((phase, name)).close()
    return rounds, apart


def _round(workers: Mapping[Contender, Worker], number: int) -> dict[str, dict[str, Report]]:
    """A turn of each; every round starts with another, so that nobody always follows the same."""
    order = list(workers)
    first = number % len(order)
    reports: dict[str, dict[str, Report]] = {phase: {} for phase in PHASES}
    for phase, name in order[first:] + order[:first]:
        reports[phase][name] = workers[phase, name].turn()
    return reports


def _memory(job: SteerLM2Job, phases: Mapping[str, Any]) -> dict[str, Any]:
    """Peaks above what every contender of a phase holds: weights; in training, Adam's state too."""
    held = {SCORING: WEIGHT_BYTES, TRAINING: STATE_BYTES}
    return {
        phase: {
            "state_mib": (state := job.n_parameters * held[phase] / 2**20),
            "peak_above_state_mib": {
                name: own["peak_mib"] - state for name, own in phases[phase].items()
            },
        }
        for phase in PHASES
    }


def _record(
    arguments: argparse.Namespace,
    argv: Sequence[str] | None,
    corpus: Corpus,
    cases: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What is written: enough to run it again and to judge it."""
    given = list(sys.argv[1:] if argv is None else argv)
    return {
        "command": shlex.join(["python", "-m", HERE, *given]),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "threads": arguments.threads,
        "tokens_per_microbatch": arguments.tokens_per_microbatch,
        "peaks": arguments.peaks,
        "data": {
            "source": corpus.description,
            "max_prompt_tokens": LIMITS.max_prompt_tokens,
            "max_response_tokens": LIMITS.max_response_tokens,
            "vocabulary": len(corpus.tokenizer),
        },
        "cases": list(cases),
    }


if __name__ == "__main__":
    sys.exit(main())
