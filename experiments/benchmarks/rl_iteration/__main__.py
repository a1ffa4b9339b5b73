"""Measure an on-policy iteration against TRL: RLOO and PPO.

    python -m experiments.benchmarks.rl_iteration --kind rloo --size S --rounds 3
    python -m experiments.benchmarks.rl_iteration --kind ppo --size S --rounds 3 \\
        --trl-ppo-python venv_trl_1_12/bin/python

An iteration samples responses to prompts, scores them with a reward model, computes log-probs of
policy and reference, and updates. TRL's RLOOTrainer runs in this environment. Its PPOTrainer left
TRL with 1.13, so it needs an environment of its own:

    python3.11 -m venv venv_trl_1_12
    printf 'torch==2.13.0\\ntransformers==5.23.0\\n' > trl_1_12.txt
    venv_trl_1_12/bin/pip install -c trl_1_12.txt torch trl==1.12.0

The contenders take turns, one iteration each, in processes of their own. All start from the same
random models, with the same prompts, responses a prompt, limit of their length, passes over them
and optimizer steps, in fp32 on the same number of threads. A random policy stops with a
probability of about one in the vocabulary at each token, so nearly all responses run to the limit,
for every contender alike; the record says how many ended before.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.benchmarks.reward_step.cost import SIZES
from experiments.benchmarks.reward_step.job import LIMITS, Corpus, load_corpus
from experiments.benchmarks.rl_iteration.folder import make_job
from experiments.benchmarks.rl_iteration.job import Job
from experiments.benchmarks.rl_iteration.processes import Entry, take_turns
from experiments.benchmarks.rl_iteration.summary import OURS, best_peer, summarise, table
from helpsteer2.records import environment, write_json_atomic

HERE = "experiments.benchmarks.rl_iteration"

DEFAULTS = {
    "rloo": {"prompts": 32, "samples": 4, "epochs": 1},
    "ppo": {"prompts": 128, "samples": 1, "epochs": 4},
}
"""Of each kind, 128 responses; the epochs of PPO are TRL's default."""

SMOKE = {
    "size": "XS", "prompts": 4, "samples": 2, "max_tokens": 8, "rounds": 1, "warmup": 1,
    "microbatches": [4], "rollout_batch": 8,
}  # fmt: skip
"""So small that it only shows that everything runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every kind, write the record and print the tables."""
    arguments = _parser().parse_args(argv)
    if arguments.smoke:
        vars(arguments).update(SMOKE)
    if "ppo" in arguments.kind and "trl" in arguments.contenders and not arguments.trl_ppo_python:
        raise SystemExit(
            "TRL's PPOTrainer needs --trl-ppo-python, the Python of an environment with TRL 1.12: "
            f"see the top of {HERE}.__main__"
        )
    if OURS in arguments.contenders and arguments.warmup < 1:
        # Lightning asks for its first data before training begins, hence before the first turn.
        raise SystemExit("--warmup has to be 1 or more: our first rollouts are not in its time")
    console = Console()
    if not console.is_terminal:
        console.width = 140
    corpus = load_corpus(os.environ.get("HELPSTEER2_REAL_DATA"), Path(arguments.cache_dir))
    cases = []
    for kind in arguments.kind:
        cases.append(_measure(kind, corpus, arguments, console))
        write_json_atomic(arguments.output, _record(arguments, argv, corpus, cases))
    for case in cases:
        console.print(table(case))
        if case["fastest_peer"] is not None:
            console.print(f"TRL's fastest setting: {case['fastest_peer']}")
    console.print(f"written to {arguments.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {HERE}", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--kind", nargs="+", choices=["rloo", "ppo"], default=["rloo", "ppo"])
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--contenders", nargs="+", choices=[OURS, "trl"], default=[OURS, "trl"])
    parser.add_argument("--rounds", type=int, default=3, help="measured iterations of each")
    parser.add_argument("--warmup", type=int, default=1, help="iterations before them")
    parser.add_argument("--prompts", type=int, help="of an iteration (RLOO 32, PPO 128)")
    parser.add_argument("--samples", type=int, help="responses to a prompt (RLOO 4, PPO 1)")
    parser.add_argument("--max-tokens", type=int, default=128, help="longest response")
    parser.add_argument("--epochs", type=int, help="passes over an iteration (RLOO 1, PPO 4)")
    parser.add_argument("--minibatches", type=int, default=1, help="optimizer steps of an epoch")
    parser.add_argument(
        "--microbatches", type=int, nargs="+", default=[8, 16, 32],
        help="TRL's, in responses; each is a contender, the fastest one counts",
    )  # fmt: skip
    parser.add_argument(
        "--rollout-batch", type=int, default=64, help="responses that TRL's PPO samples at a time"
    )
    parser.add_argument("--trl-ppo-python", help="the Python of an environment with TRL 1.12")
    parser.add_argument("--smoke", action="store_true", help="as small as can be, to see it run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="experiments/benchmarks/results/rl_iteration.json")
    parser.add_argument(
        "--cache-dir", default=os.environ.get("HELPSTEER2_CACHE", "~/.cache/helpsteer2")
    )
    return parser


def _measure(
    kind: Any, corpus: Corpus, arguments: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Measure one kind."""
    chosen = {
        name: given if (given := getattr(arguments, name)) is not None else default
        for name, default in DEFAULTS[kind].items()
    }
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(
            corpus,
            Path(folder),
            kind=kind,
            size=arguments.size,
            rounds=arguments.rounds,
            warmup=arguments.warmup,
            max_tokens=arguments.max_tokens,
            minibatches=arguments.minibatches,
            **chosen,
        )
        title = f"{kind} {arguments.size}"
        entries = _entries(kind, arguments)
        turns, versions = take_turns(title, entries, job, arguments.threads, console)
    figures = summarise({name: own[job.warmup :] for name, own in turns.items()})
    return {
        **_setting(job),
        "rounds": arguments.rounds,
        "contenders": figures,
        "versions": versions,
        "options": {name: entry.options for name, entry in entries.items()},
        "fastest_peer": best_peer(figures),
    }


def _entries(kind: str, arguments: argparse.Namespace) -> dict[str, Entry]:
    """The contenders by name."""
    entries = {}
    if OURS in arguments.contenders:
        entries[OURS] = Entry(sys.executable, f"{HERE}.ours")
    if "trl" in arguments.contenders:
        python = sys.executable if kind == "rloo" else arguments.trl_ppo_python
        extra = {} if kind == "rloo" else {"rollout_batch": arguments.rollout_batch}
        for microbatch in arguments.microbatches:
            options = {"microbatch": microbatch, **extra}
            entries[f"trl_{microbatch}"] = Entry(python, f"{HERE}.trl_{kind}", options)
    return entries


def _setting(job: Job) -> dict[str, Any]:
    """What all contenders did."""
    lengths = [len(ids) for prompts in job.prompts[job.warmup :] for ids in prompts]
    return {
        "kind": job.kind,
        "size": job.size,
        "dtype": "fp32",
        "model": SIZES[job.size].config(),
        "prompts": len(job.prompts[0]),
        "samples": job.samples,
        "max_tokens": job.max_tokens,
        "epochs": job.epochs,
        "minibatches": job.minibatches,
        "kl_coefficient": job.kl_coefficient,
        "prompt_tokens": {"mean": sum(lengths) / len(lengths), "longest": max(lengths)},
    }


def _record(
    arguments: argparse.Namespace,
    argv: Sequence[str] | None,
    corpus: Corpus,
    cases: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    given = list(sys.argv[1:] if argv is None else argv)
    if arguments.trl_ppo_python:  # no paths of the user in the record
        given = ["PYTHON" if word == arguments.trl_ppo_python else word for word in given]
    return {
        "command": shlex.join(["python", "-m", HERE, *given]),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "threads": arguments.threads,
        "data": {"source": corpus.description, "max_prompt_tokens": LIMITS.max_prompt_tokens},
        "cases": list(cases),
    }


if __name__ == "__main__":
    sys.exit(main())
