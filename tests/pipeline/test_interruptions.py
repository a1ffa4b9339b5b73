"""Real processes that are killed, asked to stop, or in each other's way."""

from __future__ import annotations

import os
import pty
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.pipeline.process import _chunks
from tests.pipeline.conftest import Place
from tests.pipeline.processes import children, wait_for

SLOWLY = ("+pipeline.first.seconds=0.1", "+pipeline.second.seconds=0.1")
"""Three steps of a tenth of a second each in both models."""


def outputs(place: Place) -> dict[str, Any]:
    return {entry["name"]: entry["outputs"] for entry in place.manifest()}


def progress(place: Place) -> int:
    """Steps done so far in all stages."""
    files = place.stages_dir.glob("*/progress.txt") if place.stages_dir.exists() else ()
    return sum(len(file.read_text().split()) for file in files)


@pytest.fixture
def whole(place: Place) -> dict[str, Any]:
    """Outputs of a run that nothing disturbed; its traces are removed."""
    process = place.start(*SLOWLY)
    assert process.wait(100) == 0, process.communicate()[0]
    made = outputs(place)
    assert all(made.values())
    shutil.rmtree(place.stages_dir)
    shutil.rmtree(place.folder / "run")
    return made


def kill_pipeline(process: subprocess.Popen[str]) -> None:
    """Its stage lives on."""
    process.kill()


def kill_all(process: subprocess.Popen[str]) -> None:
    both = [process.pid, *children(process)]
    for number in both:
        os.kill(number, signal.SIGKILL)


def kill_stage(process: subprocess.Popen[str]) -> None:
    """The pipeline notices."""
    for number in children(process):
        os.kill(number, signal.SIGKILL)


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_goes_on(place: Place, whole: dict[str, Any]) -> None:
    for kill in (kill_pipeline, kill_all, kill_stage):
        at, delay = random.randrange(6), random.uniform(0, 0.3)
        process = place.start(*SLOWLY)
        wait_for(lambda at=at: progress(place) >= at, process)  # type: ignore[misc]
        time.sleep(delay)
        kill(process)
        process.wait(100)
        again = place.start(*SLOWLY)
        text = again.communicate(timeout=100)[0]
        assert again.returncode == 0, f"{kill.__name__} at {at} + {delay:.2f} s: {text}"
        assert outputs(place) == whole
        shutil.rmtree(place.stages_dir)


def test_a_killed_pipeline_leaves_its_stage_to_the_next_one(place: Place) -> None:
    place.hold.touch()
    process = place.start()
    wait_for(lambda: progress(place), process)
    kill_pipeline(process)
    process.wait(100)
    again = place.start()
    assert again.stdout is not None
    assert f"first: process {process.pid} is at it, waiting for its end" in again.stdout.readline()
    place.hold.unlink()
    text = again.communicate(timeout=100)[0]
    assert again.returncode == 0, text
    assert "first: was interrupted, goes on" in text
    assert all(outputs(place).values())


def test_two_pipelines_run_a_stage_once(place: Place) -> None:
    ran = [place.start(f"run_dir={place.folder / name}", *SLOWLY) for name in ("a", "b")]
    texts = [process.communicate(timeout=100)[0] for process in ran]
    assert [process.returncode for process in ran] == [0, 0], texts
    assert list(place.starts().values()) == [1, 1, 1]
    statuses = [[entry["status"] for entry in place.manifest(name)] for name in ("a", "b")]
    assert sorted(status for pair in zip(*statuses, strict=True) for status in pair) == sorted(
        ["run", "skipped"] * 3
    )
    assert any("is at it, waiting for its end" in text for text in texts)


@pytest.mark.parametrize(
    ("number", "code", "understood"),
    [
        (signal.SIGINT, 130, "SIGINT"),
        (signal.SIGTERM, 143, "SIGTERM"),
        # Torchrun and commands do not know both of these.
        (signal.SIGHUP, 129, "SIGTERM"),
        (signal.SIGUSR1, 138, "SIGTERM"),
    ],
)
def test_a_signal_reaches_the_stage(place: Place, number: int, code: int, understood: str) -> None:
    place.hold.touch()
    process = place.start()
    wait_for(lambda: progress(place), process)
    stages = children(process)
    process.send_signal(number)
    text = process.communicate(timeout=20)[0]
    assert process.returncode == code, text
    assert f"stopped by {signal.Signals(number).name}: the same command goes on" in text
    assert "Traceback" not in text
    assert stages
    assert not any(Path(f"/proc/{stage}").exists() for stage in stages)
    assert place.manifest()[0]["status"] == "running"
    assert (place.stage("first") / "stage.log").read_text().endswith(f"stopped by {understood}\n")


def test_a_terminal_shows_what_stages_print(place: Place) -> None:
    ours, theirs = pty.openpty()
    process = place.start(stdout=theirs)
    os.close(theirs)
    shown = b"".join(_chunks(ours)).decode()
    os.close(ours)
    assert process.wait(100) == 0, shown
    assert shown.count("learning from") == 2
    assert "[3/3] third: done in" in shown
    log = (place.stage("first") / "stage.log").read_text()
    assert log.splitlines() == [f"learning from {place.data}", "learned"]


def test_a_terminal_that_goes_away_stops_no_stage(place: Place) -> None:
    place.hold.touch()
    ours, theirs = pty.openpty()
    process = place.start(stdout=theirs)
    os.close(theirs)
    wait_for(lambda: progress(place), process)
    os.close(ours)
    place.hold.unlink()
    process.wait(100)
    assert [entry["status"] for entry in place.manifest()] == ["run"] * 3
    for name in ("first", "second"):
        assert (place.stage(name) / "stage.log").read_text().endswith("learned\n")
    assert (place.folder / "run" / "result.json").exists()
