"""A run that is killed or asked to stop goes on to the very same end."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from helpsteer2.callbacks.checkpoints import BEST, LAST, read_checkpoint
from helpsteer2.commands.train import train
from helpsteer2.errors import UserError
from tests.training.runs import Child, arguments, run, start

pytestmark = pytest.mark.slow

STEP_SECONDS = 0.02


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    start(run_dir).join()
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path, uninterrupted: Path) -> Path:
    """A folder for a run on data that is tokenised already."""
    shutil.copytree(uninterrupted.parent / "cache", tmp_path / "cache")
    return tmp_path / "run"


def rows(run_dir: Path) -> int:
    path = run_dir / "metrics.csv"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def step_of_last(run_dir: Path) -> int:
    path = run_dir / "checkpoints" / LAST
    return int(read_checkpoint(path)["global_step"]) if path.exists() else 0


def assert_same(a: Any, b: Any, place: str = "") -> None:
    """Equal to the last bit."""
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{place}[{i}]")
    else:
        assert a == b, place


def assert_same_run(run_dir: Path, whole: Path) -> None:
    """Weights, optimizer, schedule, counters, best weights, log and export are the same."""
    for name, parts in ((LAST, ("optimizer_states", "lr_schedulers", "seen")), (BEST, ())):
        ours = read_checkpoint(run_dir / "checkpoints" / name)
        theirs = read_checkpoint(whole / "checkpoints" / name)
        for part in ("state_dict", "global_step", *parts):
            assert_same(ours[part], theirs[part], f"{name} {part}")
    assert (run_dir / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    weights = "export/model.safetensors"
    assert (run_dir / weights).read_bytes() == (whole / weights).read_bytes()
    results = [json.loads((path / "result.json").read_text()) for path in (run_dir, whole)]
    for key in ("metrics", "steps", "exported_step", "last_validation", "optimized_metric"):
        assert results[0][key] == results[1][key], key
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [BEST, LAST]


@pytest.mark.parametrize("part", [0, 1, 2])
def test_killed_and_resumed_equals_uninterrupted(
    run_dir: Path, uninterrupted: Path, part: int
) -> None:
    # Somewhere in each third of the run, another place at every call of the test.
    total = rows(uninterrupted)
    target = random.uniform(total * part / 3, total * (part + 1) / 3 - 8)
    delay = random.uniform(0, 3 * STEP_SECONDS)
    child = start(run_dir, step_seconds=STEP_SECONDS)
    child.wait_for(lambda: rows(run_dir) >= target)
    time.sleep(delay)
    child.signal(signal.SIGKILL)
    child.process.join(60)
    assert child.process.exitcode == -signal.SIGKILL, child.text
    assert not (run_dir / "result.json").exists()
    start(run_dir).join()
    assert_same_run(run_dir, uninterrupted)


@pytest.mark.parametrize("module", ["preference", "sft"])
def test_killed_run_of_another_module_equals_uninterrupted(tmp_path: Path, module: str) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    start(whole, module=module).join()
    target = random.uniform(0, rows(whole) - 8)
    child = start(run_dir, module=module, step_seconds=STEP_SECONDS)
    child.wait_for(lambda: rows(run_dir) >= target)
    child.signal(signal.SIGKILL)
    child.process.join(60)
    assert child.process.exitcode == -signal.SIGKILL, child.text
    start(run_dir, module=module).join()
    assert_same_run(run_dir, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_the_step_and_exits(
    run_dir: Path, uninterrupted: Path, number: int, code: int
) -> None:
    child = start(run_dir, step_seconds=STEP_SECONDS, checkpoint_every=1000)
    child.wait_for(lambda: rows(run_dir) >= 10)
    child.signal(number)
    text = child.join(code)
    assert f"run_dir={run_dir} goes on" in text
    assert "Traceback" not in text
    saved = step_of_last(run_dir)
    assert 0 < saved < 12
    last_row = (run_dir / "metrics.csv").read_text().splitlines()[-1]
    assert last_row.startswith(f"{saved},")  # the very step that was running
    start(run_dir).join()
    assert_same_run(run_dir, uninterrupted)


def test_second_signal_stops_at_once(run_dir: Path) -> None:
    child = start(run_dir, step_seconds=5.0)
    child.wait_for(lambda: (run_dir / "metrics.csv").exists())
    time.sleep(0.2)
    child.signal(signal.SIGINT)
    time.sleep(0.7)
    sent = time.monotonic()
    child.signal(signal.SIGINT)
    child.join(130)
    assert time.monotonic() - sent < 4
    assert step_of_last(run_dir) == 0


def test_second_process_is_refused_and_the_first_goes_on(
    run_dir: Path, uninterrupted: Path
) -> None:
    first = start(run_dir, step_seconds=STEP_SECONDS)
    first.wait_for(lambda: rows(run_dir) > 1)
    second = Child(run, run_dir.with_suffix(".second"), run_dir, {})
    text = second.join(1)
    assert f"in use by process {first.process.pid}" in text
    first.join()
    assert_same_run(run_dir, uninterrupted)


def test_finished_run_tells_what_it_recorded(uninterrupted: Path, capsys) -> None:
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*.*") if "run." not in p.name}
    value = train(**arguments(uninterrupted))
    recorded = json.loads((uninterrupted / "result.json").read_text())
    assert "is finished" in capsys.readouterr().out
    assert value == recorded["metrics"]["val/loss"]
    assert all(p.stat().st_mtime_ns == before[p] for p in before)


def test_other_settings_are_refused_by_name(uninterrupted: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(**arguments(uninterrupted, lr=1.0, seed=5))
    assert "module.optimizer.lr: 0.003 there, 1.0 now" in str(caught.value)
    assert "seed: 1 there, 5 now" in str(caught.value)
    assert (uninterrupted / "result.json").exists()


def test_other_data_and_fewer_steps_are_refused(run_dir: Path, uninterrupted: Path) -> None:
    shutil.copytree(uninterrupted, run_dir)
    (run_dir / "result.json").unlink()
    with pytest.raises(UserError, match=r"other data: .*train"):
        train(**arguments(run_dir, data_seed=3))
    with pytest.raises(UserError, match="already at step 12, 7 were asked for"):
        train(**arguments(run_dir, max_steps=7))


def test_finished_run_can_be_extended(run_dir: Path, uninterrupted: Path, capsys) -> None:
    train(**arguments(run_dir, max_steps=7))
    train(**arguments(run_dir, max_steps=12))
    assert "resuming after step 7 of 12" in capsys.readouterr().out
    ours, theirs = (read_checkpoint(d / "checkpoints" / LAST) for d in (run_dir, uninterrupted))
    assert_same(ours["state_dict"], theirs["state_dict"])
    assert_same(ours["optimizer_states"], theirs["optimizer_states"])
    steps = {line.split(",")[0] for line in (run_dir / "metrics.csv").read_text().splitlines()[1:]}
    assert steps == {str(step) for step in range(1, 13)}


def test_finished_run_exports_anew_without_training(run_dir: Path, uninterrupted: Path) -> None:
    shutil.copytree(uninterrupted, run_dir)
    train(**arguments(run_dir, export="last"))
    result = json.loads((run_dir / "result.json").read_text())
    assert result["exported_step"] == 12
    name = "metrics.csv"
    assert (run_dir / name).read_bytes() == (uninterrupted / name).read_bytes()
