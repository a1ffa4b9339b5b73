"""Two real processes over gloo: the run of one, and they stop and resume together."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

import pytest

from helpsteer2.callbacks.checkpoints import LAST, read_checkpoint
from helpsteer2.commands.train import train
from tests.training.runs import arguments, run, start_ranks

pytestmark = pytest.mark.slow


def metrics(run_dir: Path) -> dict[tuple[str, str], float]:
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    assert len(rows) == len({(step, name) for step, name, _ in rows})
    return {(step, name): float(value) for step, name, value in rows}


def test_two_ranks_stopped_and_resumed_are_one_process(tmp_path: Path) -> None:
    run_dir = tmp_path / "ranks"
    options = {"devices": 2, "precision": "32-true", "step_seconds": 0.05}
    ranks = start_ranks(run, tmp_path, run_dir, options)
    ranks[0].wait_for(
        lambda: (
            (run_dir / "metrics.csv").exists()
            and (run_dir / "metrics.csv").read_bytes().count(b"\n") > 20
        )
    )
    ranks[1].signal(signal.SIGTERM)  # only one of them is told
    for rank in ranks:
        rank.join(143)
    saved = read_checkpoint(run_dir / "checkpoints" / LAST)["global_step"]
    assert 0 < saved < 12
    for rank in start_ranks(run, tmp_path, run_dir, {"devices": 2}):
        assert "value " in rank.join()
    train(**arguments(tmp_path / "one"))
    ours, theirs = metrics(run_dir), metrics(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        exact = key[1] in ("lr", "groups_seen", "tokens_seen")
        assert ours[key] == (value if exact else pytest.approx(value, rel=1e-3, abs=1e-4)), key
