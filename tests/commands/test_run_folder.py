"""A run's folder: of one command, and on a full disk as good as it can be."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

import pytest
from rich.console import Console

from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.errors import UserError
from tests.full_disk import largest_file


def test_a_full_disk_is_told_and_the_lock_is_free_afterwards(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    full = largest_file(0)
    with full, pytest.raises(UserError, match=r"run\.lock: .*; make room"), folder.locked():
        pytest.fail("the number of this process is not in the lock")
    with folder.locked():
        assert (tmp_path / "run/run.lock").read_text() == str(os.getpid())


def test_a_log_on_a_full_disk_leaves_what_a_run_ends_with_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.StringIO()

    def run() -> None:
        with RunFolder(tmp_path).logging(Console(file=out)):
            logging.getLogger("helpsteer2").info("hello")
            raise UserError("what the run says")

    with largest_file(0), pytest.raises(UserError, match="what the run says"):
        run()
    assert "hello" in out.getvalue()
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="what the run says"):
        run()
    assert "hello" in (tmp_path / "run.log").read_text()


def test_a_command_does_not_write_over_what_another_has_made(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked("train"):
        folder.write_result({"kind": "train"})
    message = r"run holds the result of `helpsteer2 train`: choose another run_dir"
    with pytest.raises(UserError, match=message), folder.locked("pairs"):
        pytest.fail("pairs could write its record there")
    with folder.locked("train"):  # it may go on, or be done again
        assert folder.result() == {"kind": "train"}
