"""Measure one reward-model training step against TRL's RewardTrainer.

    python -m experiments.benchmarks.reward_step --size S M --dtype fp32 bf16 --rounds 12

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
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.benchmarks.reward_step.cost import SIZES, VOCABULARY
from experiments.benchmarks.reward_step.job import LIMITS, Corpus, Job, load_corpus, make_job
from experiments.benchmarks.reward_step.summary import RATES, Heat, spread, summarise, table
from experiments.benchmarks.reward_step.turns import take_turns
from helpsteer2.records import environment, write_json_atomic

HERE = "experiments.benchmarks.reward_step"
WIDTH = 120
"""Of the output where it is no terminal."""

OURS = "ours"
MATMUL = "matmul"
PEERS: dict[str, dict[str, Any]] = {
    "trl_defaults": {"grouped": False, "options": {}},
    "trl_no_checkpointing": {"grouped": False, "options": {"gradient_checkpointing": False}},
    **{
        f"trl_grouped_{batch}": {
            "grouped": True,
            "options": {"gradient_checkpointing": False, "per_device_train_batch_size": batch},
        }
        for batch in (4, 8, 16)
    },
}
"""TRL as shipped (8 pairs a micro-batch, gradient checkpointing), without the checkpointing, and
its best setting: length-grouped as well, at three sizes of the micro-batch."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run every case, write the record and print the tables."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    corpus = load_corpus(os.environ.get("HELPSTEER2_REAL_DATA"), Path(arguments.cache_dir))
    cases = []
    for size in arguments.size:
        for dtype in arguments.dtype:
            with tempfile.TemporaryDirectory() as folder:
                job = make_job(
                    corpus,
                    Path(folder) / "groups",
                    size=SIZES[size],
                    dtype=dtype,
                    warmup_steps=arguments.warmup,
                    measured_steps=arguments.rounds,
                    tokens_per_microbatch=arguments.tokens_per_microbatch,
                )
                cases.append(_case(size, job, arguments, console))
            # After every case: a long run that is stopped keeps what it has.
            write_json_atomic(arguments.output, _record(arguments, argv, corpus, cases))
    for case in cases:
        console.print(table(case))
        console.print(_best(case))
    console.print(f"written to {arguments.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {HERE}", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["S", "M"])
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=12, help="measured steps of each contender")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--at-once", type=int, default=2, help="peers alive together with ours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens-per-microbatch", type=int, default=4096, help="of ours")
    parser.add_argument("--output", default="experiments/benchmarks/results/reward_step.json")
    parser.add_argument(
        "--cache-dir", default=os.environ.get("HELPSTEER2_CACHE", "~/.cache/helpsteer2")
    )
    return parser


def _case(size: str, job: Job, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure one model size in one precision."""
    peers, n = arguments.peers, arguments.at_once
    heats = [
        _heat(f"{size} {job.dtype}", job, peers[i : i + n], arguments.threads, console)
        for i in range(0, max(len(peers), 1), n)
    ]
    return {
        "size": size,
        "dtype": job.dtype,
        "model": {**job.size.config(), "linear_parameters": job.size.linear_parameters},
        "rounds": job.measured_steps,
        "groups_per_step": job.size.groups_per_step,
        "matmul_flops_per_second": {
            name: spread([rate[name] for heat in heats for rate in heat.rates]) for name in RATES
        },
        "contenders": summarise(heats, OURS),
    }


def _heat(title: str, job: Job, peers: Sequence[str], threads: int, console: Console) -> Heat:
    """Measure ours and some peers, one step each in turn."""
    contenders: dict[str, tuple[str, dict[str, Any]]] = {
        OURS: (f"{HERE}.ours", {}),
        **{name: (f"{HERE}.peer", PEERS[name]) for name in peers},
        MATMUL: (f"{HERE}.matmul", {}),
    }
    turns = take_turns(title, contenders, job, threads, console)
    measured = {name: rounds[job.warmup_steps :] for name, rounds in turns.items()}
    rates = measured.pop(MATMUL)
    return Heat(measured, rates)


def _best(case: Mapping[str, Any]) -> str:
    """Which of TRL's settings is the fastest on the same groups."""
    peers = {name: c for name, c in case["contenders"].items() if name != OURS}
    if not peers:
        return ""
    best = max(peers, key=lambda name: peers[name]["groups_per_second"]["median"])
    return f"TRL's fastest setting: {best}"


def _record(
    arguments: argparse.Namespace, argv: Sequence[str] | None, corpus: Corpus, cases: list[Any]
) -> dict[str, Any]:
    """What is written: enough to run it again and to judge it."""
    given = list(sys.argv[1:] if argv is None else argv)
    where = environment()
    where["packages"].update({name: version(name) for name in ("trl", "accelerate")})
    return {
        "command": shlex.join(["python", "-m", HERE, *given]),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": where,
        "threads": arguments.threads,
        "tokens_per_microbatch": arguments.tokens_per_microbatch,
        "data": {
            "source": corpus.description,
            "max_prompt_tokens": LIMITS.max_prompt_tokens,
            "max_response_tokens": LIMITS.max_response_tokens,
            "vocabulary": VOCABULARY,
            **corpus.groups.report,
        },
        "cases": cases,
    }


if __name__ == "__main__":
    sys.exit(main())
