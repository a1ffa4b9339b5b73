"""Commands that take no time, and a recipe of them.

Their signatures are read from here; their processes run this file, which therefore imports nothing
slow. A stage counts its starts, works in steps that survive a kill, and its result depends on its
settings and on what it reads alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Literal

import yaml

PROGRAM = (__file__,)
STARTS = "HELPSTEER2_TEST_STARTS"
"""Environment variable: file that gets a line for every start of a stage."""

HOLD = ".hold"
"""Ending of a file beside it: while it is there, no stage gets past its first step."""

ROOT = """
defaults:
  - _self_
  - hydra_settings
run_dir: runs/one
"""

KEYS = {
    "learn": "seed: 0\ndata: null\nsteps: 3\nrate: 0.1\nseconds: 0.0\nbehaviour: good\n",
    "weigh": "weights: {}\nmodel: ???\n",
}
"""What each command's YAML file holds beside ``ROOT``."""


def learn(
    run_dir: str,
    seed: int = 0,
    data: str | None = None,
    steps: int = 3,
    rate: float = 0.1,
    seconds: float = 0.0,
    behaviour: Literal["good", "fails", "silent", "noisy"] = "good",
) -> None:
    """Digest a file into ``export`` and ``groups.jsonl``, a step at a time."""
    folder = _started(run_dir)
    print(f"learning from {data}", flush=True)
    if behaviour == "fails":
        print("\x1b[31mthe loss\x1b[0m is not finite", flush=True)
        sys.exit("this stage always fails")
    progress = folder / "progress.txt"
    done = progress.read_text().split() if progress.exists() else []
    text = "" if data is None else _content(Path(data))
    for step in range(len(done), steps):
        time.sleep(seconds)
        while step == 1 and Path(os.environ[STARTS] + HOLD).exists():
            time.sleep(0.02)
        start = os.urandom(8).hex() if behaviour == "noisy" else "start"
        previous = done[-1] if done else start
        whole = f"{text} {seed} {rate} {step} {previous}"
        done.append(hashlib.sha256(whole.encode()).hexdigest())
        _write(progress, " ".join(done))
    print("learned", flush=True)
    if behaviour == "silent":
        return
    (folder / "export").mkdir(exist_ok=True)
    _write(folder / "export" / "weights.txt", done[-1])
    _write(folder / "groups.jsonl", " ".join(done))
    _write(folder / "result.json", json.dumps({"metrics": {"loss": int(done[-1][:4], 16)}}))


def weigh(
    run_dir: str, model: str, weights: dict[str, float], extra: list[str] | None = None
) -> None:
    """Something cheap behind the training."""
    folder = _started(run_dir)
    text = f"{_content(Path(model))} {sorted(weights.items())} {extra}"
    _write(folder / "groups.jsonl", hashlib.sha256(text.encode()).hexdigest())
    _write(folder / "result.json", json.dumps({"metrics": {"weight": sum(weights.values())}}))


def _started(run_dir: str) -> Path:
    """The stage's folder; nobody else may be at work in it."""
    folder = Path(run_dir)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, _stop)
    # Open, and so locked, as long as this process lives. Its number would tell less: that of a
    # killed orphan stays in /proc until init has asked for it, for two seconds on some machines.
    lock = os.open(folder / "process", os.O_CREAT | os.O_WRONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"two processes at once in {folder}")
    with open(os.environ[STARTS], "a", encoding="utf-8") as file:
        file.write(f"{folder.name}\n")
    return folder


def _stop(number: int, frame: FrameType | None) -> None:
    """Say which signal came, and end as commands do."""
    print(f"stopped by {signal.Signals(number).name}", flush=True)
    sys.exit(128 + number)


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}")
    aside.write_text(text)
    os.replace(aside, path)


def _content(path: Path) -> str:
    files = [path] if path.is_file() else sorted(path.rglob("*.*"))
    return " ".join(file.read_text() for file in files)


def run(arguments: Sequence[str]) -> None:
    """Run the command that arguments name, as Hydra would."""
    pairs = (text.lstrip("+").split("=", 1) for text in arguments[1:] if text[:2] != "--")
    given = {key: yaml.safe_load(value) for key, value in pairs}
    globals()[arguments[0]](**given)


if __name__ == "__main__":
    run(sys.argv[1:])
