"""Measure one DPO step against TRL's DPOTrainer.

    python -m experiments.benchmarks.dpo_step --size S M --dtype fp32 bf16 --rounds 12

``experiments/benchmarks/README.md`` says what is measured and how.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.benchmarks.dpo_step.job import BETA, DPOJob, make_job
from experiments.benchmarks.reward_step.cases import (
    OURS,
    WIDTH,
    best_peer,
    measure_case,
    parser,
    record_of,
)
from experiments.benchmarks.reward_step.cost import SIZES, VOCABULARY
from experiments.benchmarks.reward_step.job import load_corpus
from experiments.benchmarks.reward_step.summary import table
from helpsteer2.records import write_json_atomic

HERE = "experiments.benchmarks.dpo_step"

_NO_CHECKPOINTING = {"gradient_checkpointing": False}
PEERS: dict[str, dict[str, Any]] = {
    "trl_defaults": {"grouped": False, "precomputed": False, "options": {}},
    "trl_precomputed": {"grouped": False, "precomputed": True, "options": {}},
    "trl_no_checkpointing": {"grouped": False, "precomputed": True, "options": _NO_CHECKPOINTING},
    **{
        f"trl_grouped_{batch}": {
            "grouped": True,
            "precomputed": True,
            "options": {**_NO_CHECKPOINTING, "per_device_train_batch_size": batch},
        }
        for batch in (4, 8)
    },
}
"""TRL as shipped (8 pairs a micro-batch, gradient checkpointing, a reference model beside the
policy), with precomputed reference log-probs, without the checkpointing as well, and its best
setting: length-grouped besides, at two sizes of the micro-batch."""

ALWAYS = {
    OURS: (f"{HERE}.ours", {}),
    "ours_reference": (f"{HERE}.ours", {"reference_alone": True}),
}

MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=2097152"
"""Has freed blocks of 2 MiB and more go back to the system, so that peaks count no holes."""

STATE_BYTES = 16
"""Of a parameter in fp32: weight, gradient, and the two moments of Adam."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run every case, write the record and print the tables."""
    made = parser(HERE, (__doc__ or "").splitlines()[0], list(PEERS))
    made.add_argument("--vocabulary", type=int, default=VOCABULARY, help="rows of the LM head")
    made.add_argument("--peaks", action="store_true", help="measure memory: the clock is off then")
    arguments = made.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.peaks:
        os.environ.setdefault("GLIBC_TUNABLES", MALLOC)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    corpus = load_corpus(os.environ.get("HELPSTEER2_REAL_DATA"), Path(arguments.cache_dir))
    peers = {name: (f"{HERE}.peer", PEERS[name]) for name in arguments.peers}
    cases = []
    for size in arguments.size:
        for dtype in arguments.dtype:
            with tempfile.TemporaryDirectory() as folder:
                job = make_job(
                    corpus,
                    Path(folder) / "groups",
                    arguments.vocabulary,
                    size=SIZES[size],
                    dtype=dtype,
                    warmup_steps=arguments.warmup,
                    measured_steps=arguments.rounds,
                    tokens_per_microbatch=arguments.tokens_per_microbatch,
                )
                case = measure_case(size, job, ALWAYS, peers, arguments, console)
                cases.append({**case, "beta": BETA, "memory": memory(job, case)})
            record = record_of(HERE, arguments, argv, corpus, cases)
            write_json_atomic(arguments.output, {**record, "peaks": arguments.peaks})
    for case in cases:
        console.print(table(case))
        console.print(best_peer(case, peers))
        for name, above in case["memory"]["peak_above_state_mib"].items():
            console.print(f"{name}: {above:,.0f} MiB above weights, gradients and optimizer")
    console.print(f"written to {arguments.output}")
    return 0


def memory(job: DPOJob, case: Mapping[str, Any]) -> dict[str, Any]:
    """Peaks above what every training holds: weights, gradients and the state of the optimizer."""
    state = job.n_parameters * STATE_BYTES / 2**20
    above = {
        name: figures["peak_mib"] - state
        for name, figures in case["contenders"].items()
        if name != "ours_reference"
    }
    return {"state_mib": state, "peak_above_state_mib": above}


if __name__ == "__main__":
    sys.exit(main())
