"""Measure a training step that trains adapters against the step that trains all weights.

    python -m experiments.benchmarks.lora_step --size M --rounds 12

``experiments/benchmarks/README.md`` says what is measured and how.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import peft  # noqa: F401  # here, so that its memory counts among the imports of both
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.reward_step import ours
from experiments.benchmarks.reward_step.cost import SIZES
from experiments.benchmarks.reward_step.job import LIMITS, Job, load_corpus, make_job
from experiments.benchmarks.reward_step.summary import spread
from experiments.benchmarks.reward_step.turns import Turns, take_turns
from helpsteer2.models.lora import Lora
from helpsteer2.records import environment, write_json_atomic

HERE = "experiments.benchmarks.lora_step"
FULL = "full"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTERS: dict[str, Lora] = {
    "default": Lora(),
    "attention": Lora(target_modules=ATTENTION),
    "all_linear": Lora(target_modules="all-linear"),
}
"""Contenders beside the step that trains all weights."""

MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=2097152"
"""Has freed blocks of 2 MiB and more go back to the system, so that peaks count no holes."""


def run(turns: Turns, job: Job, lora: Lora | None) -> None:
    """A contender: ours, with adapters or without; every contender imports the same."""
    ours.run(turns, job, lora)


def main(argv: Sequence[str] | None = None) -> int:
    """Run every size and precision, write the record and print the tables."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("GLIBC_TUNABLES", MALLOC)
    console = Console()
    if not console.is_terminal:
        console.width = 120
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
                turns = _turns(f"{size} {dtype}", job, arguments, console)
            cases.append({"size": size, "dtype": dtype, "contenders": summarise(turns)})
    record = {
        "command": shlex.join(["python", "-m", HERE, *(sys.argv[1:] if argv is None else argv)]),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "peft": version("peft"),
        "malloc": os.environ["GLIBC_TUNABLES"],
        "threads": arguments.threads,
        "tokens_per_microbatch": arguments.tokens_per_microbatch,
        "rounds": arguments.rounds,
        "data": {
            "source": corpus.description,
            "max_prompt_tokens": LIMITS.max_prompt_tokens,
            "max_response_tokens": LIMITS.max_response_tokens,
        },
        "cases": cases,
    }
    write_json_atomic(arguments.output, record)
    for case in cases:
        console.print(table(case))
    console.print(f"written to {arguments.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {HERE}", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["M"])
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    parser.add_argument("--rounds", type=int, default=12, help="measured steps of each contender")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens-per-microbatch", type=int, default=2048)
    parser.add_argument("--output", default="experiments/benchmarks/results/lora_step.json")
    parser.add_argument(
        "--cache-dir", default=os.environ.get("HELPSTEER2_CACHE", "~/.cache/helpsteer2")
    )
    return parser


def _turns(
    title: str, job: Job, arguments: argparse.Namespace, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """The measured steps of every contender, one step each in turn."""
    adapters = {FULL: None, **{name: ADAPTERS[name] for name in arguments.adapters}}
    contenders = {name: (HERE, {"lora": lora}) for name, lora in adapters.items()}
    turns = take_turns(title, contenders, job, arguments.threads, console)
    return {name: rounds[job.warmup_steps :] for name, rounds in turns.items()}


def summarise(turns: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Figures of every contender over the measured rounds.

    All contenders train on the same groups in the same round, so their seconds are compared within
    it: a drift of the machine cancels out, and a stall moves no median.

    Args:
        turns: Of each contender, what it reported in each round; ``full`` is among them.

    Returns:
        Of each contender its figures. ``full_over_own`` says how many times as fast as ``full`` it
        is: ``per_round`` the median ratio of a round, ``medians`` the ratio of the medians,
        ``total`` that of the times of the whole run. ``memory_share`` is its peak over ``full``'s.

    Raises:
        ValueError: If the contenders did not have the same groups.
    """
    read = {name: [turn["real_tokens"] for turn in own] for name, own in turns.items()}
    if len({tuple(tokens) for tokens in read.values()}) > 1:
        raise ValueError("the contenders read different groups")
    seconds = {name: np.array([turn["seconds"] for turn in own]) for name, own in turns.items()}
    peaks = {name: max(turn["peak_mib"] for turn in own) for name, own in turns.items()}
    full = seconds[FULL]
    return {
        name: {
            "seconds": spread(own),
            "real_tokens_per_second": spread(np.array(read[name]) / own),
            "peak_mib": peaks[name],
            "memory_share": peaks[name] / peaks[FULL],
            "full_over_own": {
                "per_round": spread(full / own),
                "medians": float(np.median(full) / np.median(own)),
                "total": float(full.sum() / own.sum()),
            },
            "rounds": own.tolist(),
        }
        for name, own in seconds.items()
    }


def table(case: Mapping[str, Any]) -> Table:
    """The figures of a case for the terminal."""
    result = Table(
        title=f"{case['size']} {case['dtype']}",
        caption="medians; faster: per round \\[quartiles] / ratio of medians / of total times",
    )
    result.add_column("")
    for column in ("seconds", "tokens/s", "peak MiB", "of full", "faster than full"):
        result.add_column(column, justify="right", no_wrap=True)
    for name, figures in case["contenders"].items():
        faster = figures["full_over_own"]
        middle = faster["per_round"]
        result.add_row(
            name,
            f"{figures['seconds']['median']:.2f}",
            f"{figures['real_tokens_per_second']['median']:,.0f}",
            f"{figures['peak_mib']:,.0f}",
            f"{figures['memory_share']:.0%}",
            f"{middle['median']:.2f}× [{middle['q1']:.2f}–{middle['q3']:.2f}] / "
            f"{faster['medians']:.2f}× / {faster['total']:.2f}×",
        )
    return result


if __name__ == "__main__":
    sys.exit(main())
