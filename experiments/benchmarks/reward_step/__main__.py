"""Measure one reward-model training step against TRL's RewardTrainer.

    python -m experiments.benchmarks.reward_step --size S M --dtype fp32 bf16 --rounds 12

``experiments/benchmarks/README.md`` says what is measured and how.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.benchmarks.reward_step.cases import (
    OURS,
    WIDTH,
    best_peer,
    measure_case,
    parser,
    record_of,
)
from experiments.benchmarks.reward_step.cost import SIZES
from experiments.benchmarks.reward_step.job import load_corpus, make_job
from experiments.benchmarks.reward_step.summary import table
from helpsteer2.records import write_json_atomic

HERE = "experiments.benchmarks.reward_step"

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
    arguments = parser(HERE, (__doc__ or "").splitlines()[0], list(PEERS)).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    corpus = load_corpus(os.environ.get("HELPSTEER2_REAL_DATA"), Path(arguments.cache_dir))
    ours = {OURS: (f"{HERE}.ours", {})}
    peers = {name: (f"{HERE}.peer", PEERS[name]) for name in arguments.peers}
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
                cases.append(measure_case(size, job, ours, peers, arguments, console))
            # After every case: a long run that is stopped keeps what it has.
            write_json_atomic(arguments.output, record_of(HERE, arguments, argv, corpus, cases))
    for case in cases:
        console.print(table(case))
        console.print(best_peer(case, peers))
    console.print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
