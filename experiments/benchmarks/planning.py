"""Measure the planner's time and the memory of tokenised data, which must not grow with it.

python -m experiments.benchmarks.planning
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from helpsteer2.data.packing import pack
from helpsteer2.data.planner import StepPlan
from helpsteer2.data.token_store import TokenWriter, open_store
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.records import environment, write_json_atomic

NAME = "experiments.benchmarks.planning"
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
GLOBAL_BATCH, TOKENS_PER_MICROBATCH = 64, 8192
READS = 2000
"""Groups read in each memory measurement, whatever the number there is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record and print it."""
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}")
    parser.add_argument("--groups", type=int, default=20_324, help="groups to plan, once each")
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000, 20_000, 200_000])
    parser.add_argument("--output", default="experiments/benchmarks/results/planning.json")
    parser.add_argument("--read", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.read:
        print(json.dumps(read(Path(arguments.read))))
        return 0
    given = list(sys.argv[1:] if argv is None else argv)
    record = {
        "command": shlex.join(["python", "-m", NAME, *given]),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "planning": planning(arguments.groups),
        "memory": [memory(rows) for rows in arguments.rows],
    }
    write_json_atomic(arguments.output, record)
    _show(record)
    return 0


def planning(n_groups: int) -> dict[str, Any]:
    """Time to plan one pass over some groups: 20,324 at 64 a step are 317 steps."""
    lengths = segment_lengths(n_groups).sum(axis=1)
    steps = n_groups // GLOBAL_BATCH
    started = time.perf_counter()
    plan = StepPlan(
        lengths,
        global_batch=GLOBAL_BATCH,
        tokens_per_microbatch=TOKENS_PER_MICROBATCH,
        total_steps=steps,
        seed=1,
    )
    rows = [len(ranks[0]) for ranks in map(plan.step, range(steps))]
    seconds = time.perf_counter() - started
    return {
        "groups": n_groups,
        "steps": steps,
        "groups_per_step": GLOBAL_BATCH,
        "tokens_per_microbatch": TOKENS_PER_MICROBATCH,
        "micro_batches": sum(rows),
        "filled": float(lengths[: steps * GLOBAL_BATCH].sum())
        / (sum(rows) * TOKENS_PER_MICROBATCH),
        "seconds": seconds,
    }


def segment_lengths(n_groups: int) -> npt.NDArray[np.int64]:
    """Made-up lengths ``(G, 3)`` of a prompt and two responses, with HelpSteer2's long tail."""
    rng = np.random.default_rng(0)
    # Medians and means as of the real slice with a vocabulary of 8,192.
    prompts = rng.lognormal(np.log(60), 1.3, (n_groups, 1))
    responses = rng.lognormal(np.log(300), 0.7, (n_groups, 2))
    return np.clip(np.hstack([prompts, responses]).astype(np.int64), 4, 2048)


def memory(rows: int) -> dict[str, Any]:
    """Memory of a fresh process that opens some rows (two a group) and packs some of them."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "groups"
        n_bytes = _write(store, rows // 2)
        command = [sys.executable, "-m", NAME, "--read", str(store)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"rows": rows, "mib_on_disk": n_bytes / 2**20, **json.loads(done.stdout)}


def _write(folder: Path, n_groups: int) -> int:
    """Write made-up groups; their size in bytes."""
    rng = np.random.default_rng(0)
    with TokenWriter(folder, ATTRIBUTES) as writer:
        for index, lengths in enumerate(segment_lengths(n_groups)):
            prompt, first, second = (rng.integers(0, 8192, size=n, dtype=np.int32) for n in lengths)
            ratings = np.full((2, len(ATTRIBUTES)), 3, dtype=np.float32)
            writer.add(TokenGroup(prompt, (first, second), ratings, 1.0, index), f"group-{index}")
        writer.finish("benchmark", {})
    return sum(file.stat().st_size for file in folder.iterdir())


def read(folder: Path) -> dict[str, float]:
    """Open the groups, plan over all of them and pack some spread over the whole file.

    Returns:
        ``open_seconds``, and growth of the process' memory in MiB: ``private_mib``, which is its
        own, and ``mapped_mib``, pages of the files that the system takes back when it needs them.
    """
    private, mapped = _resident("RssAnon"), _resident("RssFile")
    started = time.perf_counter()
    groups = open_store(folder, "benchmark")
    assert groups is not None
    opened = time.perf_counter() - started
    plan = StepPlan(
        groups.lengths, global_batch=8, tokens_per_microbatch=8192, total_steps=1, seed=1
    )
    plan.step(0)
    largest = 0.0
    for index in np.linspace(0, len(groups) - 1, min(READS, len(groups))).astype(int):
        pack([groups[int(index)]])
        largest = max(largest, _resident("RssAnon") - private)
    return {
        "open_seconds": opened,
        "private_mib": largest,
        "mapped_mib": _resident("RssFile") - mapped,
    }


def _resident(field: str) -> float:
    """A part of the process' memory, in MiB; NaN where the system is not Linux."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return float("nan")
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else float("nan")


def _show(record: dict[str, Any]) -> None:
    console, plan = Console(width=100), record["planning"]
    console.print(
        f"planned {plan['groups']:,} groups in {plan['steps']} steps: {plan['seconds']:.2f} s, "
        f"{plan['micro_batches']} micro-batches, {plan['filled']:.0%} filled"
    )
    table = Table(title=f"a process that opens tokenised rows and packs up to {READS:,} groups")
    for column in ("rows", "MiB on disk", "open s", "private MiB", "mapped MiB"):
        table.add_column(column, justify="right")
    for row in record["memory"]:
        table.add_row(
            f"{row['rows']:,}",
            f"{row['mib_on_disk']:,.0f}",
            f"{row['open_seconds']:.2f}",
            f"{row['private_mib']:,.1f}",
            f"{row['mapped_mib']:,.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
