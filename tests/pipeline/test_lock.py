from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpsteer2.errors import UserError
from helpsteer2.pipeline.process import locked
from tests.full_disk import largest_file


def test_a_full_disk_is_told_and_the_lock_is_free_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "stage"
    full = largest_file(0)
    with full, pytest.raises(UserError, match=r"stage: .*; make room"), locked(path, pytest.fail):
        pytest.fail("the number of this process is not in the lock")
    with locked(path, pytest.fail):
        assert path.read_text() == str(os.getpid())
