"""The metrics file is cut back to a checkpoint and goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpsteer2.callbacks.metrics_log import MetricsLog, cut_back
from helpsteer2.errors import UserError
from tests.full_disk import largest_file

WHOLE = b"step,metric,value\n1,loss,4\n1,lr,0.1\n2,loss,3\n2,val/loss,5\n3,loss,2\n10,loss,1\n"


@pytest.mark.parametrize(
    ("step", "rows"), [(0, 0), (1, 2), (2, 4), (3, 5), (9, 5), (10, 6), (99, 6)]
)
def test_rows_after_the_step_go(tmp_path: Path, step: int, rows: int) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(WHOLE)
    cut_back(path, step)
    assert path.read_bytes() == b"".join(WHOLE.splitlines(keepends=True)[: rows + 1])


@pytest.mark.parametrize("lost", range(1, len(WHOLE) + 1))
def test_torn_rows_go(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(WHOLE[:-lost])
    cut_back(path, 99)
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines == WHOLE.splitlines(keepends=True)[: len(lines)]
    assert lines


def test_file_is_made_and_a_whole_one_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    cut_back(path, 0)
    assert path.read_bytes() == b"step,metric,value\n"
    path.write_bytes(WHOLE)
    before = path.stat().st_mtime_ns
    cut_back(path, 10)
    assert path.stat().st_mtime_ns == before


def test_a_full_disk_is_told_by_name_and_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, unused = tmp_path / "metrics.csv", Any
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=0)
    log = MetricsLog(path)
    log.on_train_start(trainer, unused)
    with largest_file(30), pytest.raises(UserError, match=r"metrics\.csv: .*; make room") as told:
        log.on_train_batch_end(trainer, unused, {"metrics": {"loss": 1.0, "accuracy": 0.5}})
    with largest_file(30):
        log.on_exception(trainer, unused, told.value)
    cut_back(path, 0)
    assert path.read_bytes() == b"step,metric,value\n0,loss,1\n"
