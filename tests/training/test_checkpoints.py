"""Checkpoint files: whole or not at all, also where the disk is full or the process killed."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from helpsteer2.callbacks.checkpoints import (
    BEST,
    LAST,
    AtomicCheckpointIO,
    Cadence,
    read_checkpoint,
)
from helpsteer2.errors import UserError
from tests.training.runs import Child, run
from tests.training.test_resume import assert_same_run


def test_cadence() -> None:
    cadence = Cadence(validate_every=5, checkpoint_every=3)
    assert [s for s in range(1, 13) if cadence.validates(s, s == 12)] == [5, 10, 12]
    assert [s for s in range(1, 12) if cadence.saves(s, s == 11)] == [3, 6, 9, 11]
    never = Cadence(validate_every=None)
    assert not any(never.validates(s, s == 12) for s in range(1, 13))
    with pytest.raises(UserError, match="checkpoint_every"):
        Cadence(checkpoint_every=0)


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(
        {"a": torch.arange(5), "n": {"x": [1, "y"]}}, tmp_path / "c"
    )
    back = AtomicCheckpointIO().load_checkpoint(tmp_path / "c")
    assert torch.equal(back["a"], torch.arange(5))
    assert back["n"] == {"x": [1, "y"]}


def _save_on_a_full_disk(path: Path, limit: int) -> int:
    """The system itself refuses to write more than so many bytes to a file."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(200_000)}, path)
    except UserError as error:
        return 0 if "intact" in str(error) else 2
    return 1


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 1000, 500_000])
def test_full_disk_leaves_the_old_checkpoint(tmp_path: Path, limit: int) -> None:
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, tmp_path / "c.ckpt")
    child = Child(_save_on_a_full_disk, Path(os.devnull), tmp_path / "c.ckpt", limit)
    child.join()
    assert torch.equal(read_checkpoint(tmp_path / "c.ckpt")["a"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["c.ckpt"]


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_damaged_checkpoint_is_named(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"a": torch.ones(1000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=r"last\.ckpt cannot be read"):
        read_checkpoint(path)


def test_checkpoint_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"a": Path("x").joinpath}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / "last.ckpt")


def _run_until_rename(run_dir: Path, options: dict[str, Any], rename: int) -> int:
    """Train, and kill the process just after its n-th rename of a checkpoint."""
    real = os.replace
    seen = 0

    def replace(source: Any, target: Any) -> None:
        nonlocal seen
        mine = str(target).endswith(".ckpt")
        seen += mine
        real(source, target)
        if mine and seen == rename:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace  # type: ignore[assignment]
    return run(run_dir, options)


@pytest.mark.slow
def test_killed_at_every_rename(tmp_path: Path) -> None:
    options = {"max_steps": 4, "validate_every": 2, "checkpoint_every": 4}
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    Child(run, tmp_path / "whole.out", whole, options).join()
    # best.next at 2, best.next and last and best at 4.
    for rename in range(1, 5):
        shutil.rmtree(run_dir, ignore_errors=True)
        child = Child(_run_until_rename, tmp_path / "killed.out", run_dir, options, rename)
        child.process.join(100)
        assert child.process.exitcode == -signal.SIGKILL, child.text
        Child(run, tmp_path / "again.out", run_dir, options).join()
        assert_same_run(run_dir, whole)
        assert (run_dir / "checkpoints" / BEST).exists()
        assert (run_dir / "checkpoints" / LAST).exists()
