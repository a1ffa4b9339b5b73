"""Real commands in processes of their own: started, watched, killed, and what they have made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Start = Callable[[Sequence[str]], subprocess.Popen[str]]
"""Starts a process that does not outlive its test."""

OF_THE_RUN = {"tokens_in_this_run", "tokens_per_second"}
"""Metrics that tell how a stage went, not what it made."""


def command(name: str, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "helpsteer2", name, *overrides]


def in_folder(folder: Path) -> list[str]:
    return [f"run_dir={folder / 'run'}", f"stages_dir={folder / 'stages'}"]


def wait_for(
    condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 100
) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the end, which has to be a good one; what was printed."""
    text = process.communicate(timeout=1000)[0]
    assert process.returncode == 0, text
    return text


def children(process: subprocess.Popen[str]) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in path.read_text().split()]


def kill_with_children(process: subprocess.Popen[str]) -> None:
    stages = children(process)
    process.kill()
    for number in stages:
        os.killpg(number, signal.SIGKILL)  # it leads a session of its own
    process.communicate()


def manifest(folder: Path) -> list[dict[str, Any]]:
    """What a run in a folder says of its stages."""
    content = json.loads((folder / "run" / "manifest.json").read_text())
    entries: list[dict[str, Any]] = content["stages"]
    return entries


def made(folder: Path) -> dict[str, Any]:
    """All that the stages have made but times, by stage."""
    stages = {}
    for entry in manifest(folder):
        result = json.loads((Path(entry["folder"]) / "result.json").read_text())
        metrics = {key: value for key, value in result["metrics"].items() if key not in OF_THE_RUN}
        stages[entry["name"]] = (entry["outputs"], metrics)
    return stages
