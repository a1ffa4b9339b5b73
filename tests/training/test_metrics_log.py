"""The metrics file is cut back to a checkpoint and goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpsteer2.callbacks.metrics_log import cut_back

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
