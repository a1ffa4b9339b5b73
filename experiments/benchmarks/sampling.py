"""Measure sampling in process against transformers' generate and against what memory allows.

    python -m experiments.benchmarks.sampling --size S M --rounds 5

``experiments/benchmarks/README.md`` says what is measured and how.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.reward_step.cost import SIZES
from experiments.benchmarks.reward_step.job import LIMITS, Corpus, load_corpus
from experiments.benchmarks.reward_step.summary import spread
from experiments.benchmarks.reward_step.turns import take_turns
from experiments.benchmarks.sampling_contenders import SEED, YARDSTICK, SamplingJob
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.records import environment, write_json_atomic

HERE = "experiments.benchmarks.sampling"
CONTENDERS = "experiments.benchmarks.sampling_contenders"


def main(argv: Sequence[str] | None = None) -> int:
    """Run every size, write the record and print the tables."""
    arguments = _parser().parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    corpus = load_corpus(os.environ.get("HELPSTEER2_REAL_DATA"), Path(arguments.cache_dir))
    params = SamplingParams(
        n=arguments.n,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        seed=SEED,
    )
    cases = []
    for size in arguments.size:
        job = SamplingJob(
            SIZES[size], arguments.dtype, corpus.tokenizer, _rounds(corpus, arguments), params
        )
        turns = take_turns(
            f"{size} {arguments.dtype}",
            _contenders(arguments),
            job,  # type: ignore[arg-type]
            arguments.threads,
            console,
        )
        counted = slice(arguments.warmup, arguments.warmup + arguments.rounds)
        figures = summarise({name: own[counted] for name, own in turns.items()})
        profiles = {name: own[-1]["profile"] for name, own in turns.items() if "profile" in own[-1]}
        cases.append({"size": size, "contenders": figures, "profiles": profiles})
    record = {
        "command": shlex.join(["python", "-m", HERE, *(sys.argv[1:] if argv is None else argv)]),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "prompts_per_round": arguments.prompts,
        "sampling": params,
        "data": {"source": corpus.description, "max_prompt_tokens": LIMITS.max_prompt_tokens},
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
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["S"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a round")
    parser.add_argument("--n", type=int, default=10, help="samples of a prompt")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-rows", type=int, nargs="+", default=[10, 40, 160])
    parser.add_argument(
        "--generate", type=int, nargs="+", default=[1, 4, 16], help="prompts of its batches"
    )
    parser.add_argument(
        "--caches", nargs="+", choices=["dynamic", "static"], default=["dynamic"],
        help="kinds of generate's cache",
    )  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="profile ours in a round more")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="experiments/benchmarks/results/sampling.json")
    parser.add_argument(
        "--cache-dir", default=os.environ.get("HELPSTEER2_CACHE", "~/.cache/helpsteer2")
    )
    return parser


def _rounds(corpus: Corpus, arguments: argparse.Namespace) -> tuple[Any, ...]:
    """Ids of the prompts of every round, drawn without replacement."""
    total = arguments.warmup + arguments.rounds + arguments.profile
    wanted = total * arguments.prompts
    if wanted > len(corpus.groups):
        raise SystemExit(f"{wanted} prompts are wanted, there are {len(corpus.groups)}")
    drawn = np.random.default_rng(SEED).permutation(len(corpus.groups))[:wanted]
    ids = [tuple(corpus.groups[int(index)].prompt_ids.tolist()) for index in drawn]
    size = arguments.prompts
    return tuple(tuple(ids[first : first + size]) for first in range(0, wanted, size))


def _contenders(arguments: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    """Module and arguments of each by name."""
    found: dict[str, dict[str, Any]] = {}
    for rows in arguments.max_rows:
        options = {"max_rows": rows, "profiled": arguments.profile}
        found[f"ours_{rows}"] = {"kind": "ours", **options}
    for cache in arguments.caches:
        for prompts in arguments.generate:
            found[f"generate_{prompts * arguments.n}_{cache}"] = {
                "kind": "generate",
                "prompts_at_once": prompts,
                "cache": None if cache == "dynamic" else cache,
            }
    found[YARDSTICK] = {"kind": YARDSTICK, "max_rows": max(arguments.max_rows)}
    return {name: (CONTENDERS, options) for name, options in found.items()}


def summarise(turns: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Figures of every contender over the measured rounds.

    Args:
        turns: Of each contender, what it reported in each round.

    Returns:
        Of each contender ``tokens_per_second``; of ours ``times_generate`` (against the fastest
        generate by its median, in the same round), and of its decode steps the share that reading
        weights and cache would take at the rate of the yardstick in that round (``read_floor``),
        that the products would take at its rate (``flops_floor``), and that the larger of the two
        would take in each step (``roofline``).
    """
    speeds = {
        name: np.array([turn["tokens"] / turn["seconds"] for turn in own])
        for name, own in turns.items()
        if name != YARDSTICK
    }
    peers = [name for name in speeds if name.startswith("generate")]
    best = max(peers, key=lambda name: float(np.median(speeds[name])), default=None)
    figures: dict[str, dict[str, Any]] = {
        YARDSTICK: {
            key: spread([turn[key] for turn in turns[YARDSTICK]])
            for key in ("bytes_per_second", "flops_per_second")
        }
    }
    for name, speed in speeds.items():
        own = turns[name]
        figures[name] = {
            "tokens_per_second": spread(speed),
            "peak_mib": max(turn["peak_mib"] for turn in own),
            "rounds": [turn["seconds"] for turn in own],
        }
        if not name.startswith("ours"):
            continue
        if best is not None:
            ratio = spread(speed / speeds[best])
            figures[name]["times_generate"] = {"fastest": best, "per_round": ratio}
        pairs = list(zip(own, turns[YARDSTICK], strict=True))
        figures[name] |= {
            "mean_rows": float(np.mean([np.mean(turn["rows"]) for turn in own])),
            "decode_share": spread([turn["step_seconds"] / turn["seconds"] for turn in own]),
            **{key: spread([_floors(*pair)[key] for pair in pairs]) for key in _floors(*pairs[0])},
        }
    return figures


def _floors(turn: Mapping[str, Any], rates: Mapping[str, float]) -> dict[str, float]:
    """Shares of the time of the decode steps that cannot be avoided."""
    read = np.array(turn["step_bytes"]) / rates["bytes_per_second"]
    computed = np.array(turn["step_flops"]) / rates["flops_per_second"]
    seconds = turn["step_seconds"]
    return {
        "read_floor": float(read.sum() / seconds),
        "flops_floor": float(computed.sum() / seconds),
        "roofline": float(np.maximum(read, computed).sum() / seconds),
    }


def table(case: Mapping[str, Any]) -> Table:
    """The figures of a case for the terminal."""
    result = Table(title=str(case["size"]), caption="medians; floors are shares of decode time")
    result.add_column("")
    for column in ("tokens/s", "× generate", "rows", "read floor", "FLOPs floor", "roofline"):
        result.add_column(column, justify="right", no_wrap=True)
    for name, figures in case["contenders"].items():
        if name == YARDSTICK:
            continue
        cells = [f"{figures['tokens_per_second']['median']:,.0f}"]
        if "times_generate" in figures:
            cells.append(f"{figures['times_generate']['per_round']['median']:.2f}×")
        if "mean_rows" in figures:
            cells.append(f"{figures['mean_rows']:.0f}")
            floors = ("read_floor", "flops_floor", "roofline")
            cells += [f"{figures[key]['median']:.0%}" for key in floors]
        result.add_row(name, *cells)
    return result


if __name__ == "__main__":
    sys.exit(main())
