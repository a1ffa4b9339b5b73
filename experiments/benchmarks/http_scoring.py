"""Measure scoring over HTTP, 32 clients at once, against scoring in one process.

    python -m experiments.benchmarks.http_scoring --size S --rounds 12

``experiments/benchmarks/README.md`` says what is measured and how.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import queue
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from experiments.benchmarks.reward_step.cost import SIZES, Size
from experiments.benchmarks.reward_step.job import LIMITS, SEED, Corpus, load_corpus
from experiments.benchmarks.reward_step.summary import spread
from helpsteer2.data.groups import Group, read_all
from helpsteer2.data.sources.helpsteer import HelpSteer2
from helpsteer2.records import environment, write_json_atomic
from helpsteer2.rewards.scorer import RewardScorer
from helpsteer2.rewards.wire import request_body
from helpsteer2.world.source import WorldSource

HERE = "experiments.benchmarks.http_scoring"


@dataclass
class Turn:
    """One contender's pass over the groups of a round."""

    seconds: float
    scores: list[np.ndarray]
    latencies: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run every size, write the record and print its figures."""
    arguments = _parser().parse_args(argv)
    # A thread that waits must not take a core from the other process.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    console = Console()
    real_data = os.environ.get("HELPSTEER2_REAL_DATA")
    corpus = load_corpus(real_data, Path(arguments.cache_dir))
    rounds = _rounds(real_data, arguments)
    cases = []
    for size in arguments.size:
        with tempfile.TemporaryDirectory() as folder:
            _export(SIZES[size], corpus, Path(folder))
            turns = _take_turns(Path(folder), rounds, arguments, console)
        figures = summarise(rounds[arguments.warmup :], turns[arguments.warmup :])
        cases.append({"size": size, **figures})
        console.print({key: value for key, value in cases[-1].items() if key != "rounds"})
    record = {
        "command": shlex.join(["python", "-m", HERE, *(sys.argv[1:] if argv is None else argv)]),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "fastapi": version("fastapi"),
        "uvicorn": version("uvicorn"),
        "threads": arguments.threads,
        "clients": arguments.clients,
        "tokens_per_microbatch": arguments.tokens_per_microbatch,
        "data": {
            "source": corpus.description,
            "max_prompt_tokens": LIMITS.max_prompt_tokens,
            "max_response_tokens": LIMITS.max_response_tokens,
        },
        "cases": cases,
    }
    write_json_atomic(arguments.output, record)
    console.print(f"written to {arguments.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {HERE}", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["S"])
    parser.add_argument("--rounds", type=int, default=12, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--groups", type=int, default=256, help="groups of a round, one a request")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens-per-microbatch", type=int, default=4096)
    parser.add_argument("--output", default="experiments/benchmarks/results/http_scoring.json")
    parser.add_argument(
        "--cache-dir", default=os.environ.get("HELPSTEER2_CACHE", "~/.cache/helpsteer2")
    )
    return parser


def _rounds(real_data: str | None, arguments: argparse.Namespace) -> list[list[Group]]:
    """Groups of every round, drawn without replacement."""
    n_rounds = arguments.rounds + arguments.warmup
    if real_data is None:
        source: Any = WorldSource(n_rounds * arguments.groups, validation_groups=1, seed=0)
    else:
        source = HelpSteer2(path=str(Path(real_data) / "helpsteer2_slice"))
    groups = list(read_all(source, "train"))
    if len(groups) < n_rounds * arguments.groups:
        raise SystemExit(f"there are {len(groups)} groups: lower --rounds or --groups")
    drawn = iter(np.random.default_rng(SEED).permutation(len(groups)))
    return [[groups[i] for i in islice(drawn, arguments.groups)] for _ in range(n_rounds)]


def _export(size: Size, corpus: Corpus, folder: Path) -> None:
    """Write a random model of a size."""
    from transformers import AutoConfig, AutoModel

    from helpsteer2.models.attention import implementation_name
    from helpsteer2.models.reward import RewardModel

    torch.manual_seed(SEED)
    tokenizer = corpus.tokenizer
    config = AutoConfig.for_model(**size.config(), pad_token_id=tokenizer.pad_token_id)
    backbone = AutoModel.from_config(config, attn_implementation=implementation_name("sdpa"))
    RewardModel(backbone, corpus.spec).save_pretrained(folder / "export", tokenizer)


def _take_turns(
    folder: Path, rounds: list[list[Group]], arguments: argparse.Namespace, console: Console
) -> list[dict[str, Turn]]:
    """Both contenders, one round each in turn; each goes first every other time."""
    tokens = arguments.tokens_per_microbatch
    scorer = RewardScorer.from_pretrained(folder / "export", tokens_per_microbatch=tokens)
    turns = []
    with _serving(folder / "export", tokens) as address:
        for number, groups in enumerate(rounds):
            taken = {}
            order = ["in_process", "http"]
            for name in order if number % 2 == 0 else order[::-1]:
                if name == "in_process":
                    taken[name] = _in_process(scorer, groups)
                else:
                    taken[name] = _over_http(address, groups, arguments.clients)
            turns.append(taken)
            seconds = "  ".join(f"{name} {turn.seconds:.2f}s" for name, turn in taken.items())
            console.print(f"{number + 1}/{len(rounds)}  {seconds}")
    return turns


@contextmanager
def _serving(model: Path, tokens: int) -> Iterator[str]:
    """``helpsteer2 serve`` as a process of its own; yields host and port."""
    command = [sys.executable, "-m", "helpsteer2", "serve", "--model", str(model)]
    options = ["--port", "0", "--batch-tokens", str(tokens)]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = next(line for line in process.stdout if line.startswith("ready: "))
            yield ready.removeprefix("ready: http://").strip()
        finally:
            process.terminate()


def _in_process(scorer: RewardScorer, groups: Sequence[Group]) -> Turn:
    begin = time.perf_counter()
    scores = list(scorer.score(groups))
    return Turn(time.perf_counter() - begin, scores)


def _over_http(address: str, groups: Sequence[Group], clients: int) -> Turn:
    """Every client sends one group, waits for its scores, and takes the next."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(len(groups)):
        waiting.put(i)
    found: dict[int, tuple[float, np.ndarray]] = {}

    def client() -> None:
        connection = http.client.HTTPConnection(address)
        while True:
            try:
                i = waiting.get_nowait()
            except queue.Empty:
                return connection.close()
            begin = time.perf_counter()
            body = request_body([groups[i]])
            connection.request("POST", "/score", body, {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
            found[i] = time.perf_counter() - begin, np.array(answer["scores"][0])

    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(client) for _ in range(clients)]:
            done.result()
    seconds = time.perf_counter() - begin
    latencies, scores = zip(*(found[i] for i in range(len(groups))), strict=True)
    return Turn(seconds, list(scores), list(latencies))


def summarise(
    rounds: Sequence[Sequence[Group]], turns: Sequence[Mapping[str, Turn]]
) -> dict[str, Any]:
    """Figures over the measured rounds.

    Both contenders score the same groups in a round, so their seconds are compared within it.

    Args:
        rounds: The groups of each.
        turns: ``in_process`` and ``http`` of each.

    Returns:
        ``throughput_share``: over HTTP as a share of that in process, per round, by medians and by
        total times; responses a second of both; latencies of a request; the largest difference of
        two scores.
    """
    rows = np.array([sum(len(group.responses) for group in groups) for groups in rounds])
    ours, http_ = (np.array([t[name].seconds for t in turns]) for name in ("in_process", "http"))
    latencies = np.concatenate([turn["http"].latencies for turn in turns])
    differences = [
        np.abs(a - b).max()
        for turn in turns
        for a, b in zip(turn["in_process"].scores, turn["http"].scores, strict=True)
    ]
    return {
        "throughput_share": {
            "per_round": spread(ours / http_),
            "medians": float(np.median(ours) / np.median(http_)),
            "total": float(ours.sum() / http_.sum()),
        },
        "responses_per_second": {
            "in_process": spread(rows / ours),
            "http": spread(rows / http_),
        },
        "latency_seconds": {f"p{p}": float(np.percentile(latencies, p)) for p in (50, 99)},
        "largest_difference": float(max(differences)),
        "rounds": {"in_process": ours.tolist(), "http": http_.tolist()},
    }


if __name__ == "__main__":
    sys.exit(main())
