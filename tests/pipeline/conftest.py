"""A pipeline of tiny commands, in this process or in one of its own."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

import helpsteer2.commands.pipeline as pipeline_command
from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands.launch import launch
from helpsteer2.pipeline import contents as contents_module
from helpsteer2.pipeline.plan import Commands
from helpsteer2.pipeline.stages import Pipeline
from tests.pipeline import recipe, tiny
from tests.pipeline.processes import Start, command, finish, kill_with_children

ROOT = Path(__file__).parents[2]


def hear_hang_ups() -> None:
    """Tests that run under nohup would hand on that a hang-up is ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@dataclass(frozen=True)
class Place:
    """Where a test's pipelines run.

    Attributes:
        folder: Holds the data file, the configuration, the stages and the runs.
    """

    folder: Path

    @property
    def stages_dir(self) -> Path:
        return self.folder / "stages"

    @property
    def data(self) -> Path:
        return self.folder / "data.txt"

    def run(
        self,
        seed: int = 1,
        dry_run: bool = False,
        kind: Callable[..., Pipeline] = recipe.Recipe,
        **of_recipe: Any,
    ) -> float | None:
        """Run the pipeline in this process, its stages in theirs."""
        given = {"data": str(self.data)} | of_recipe
        return pipeline_command.pipeline(
            str(self.folder / "run"), seed, kind(**given), str(self.stages_dir), dry_run
        )

    def arguments(self, *overrides: str) -> list[str]:
        return [
            f"--config-path={self.folder / 'conf'}", "pipeline=tiny",
            f"stages_dir={self.stages_dir}", f"run_dir={self.folder / 'run'}",
            f"pipeline.data={self.data}", *overrides,
        ]  # fmt: skip

    def launch(self, *overrides: str) -> None:
        """Run the pipeline as the command line does."""
        try:
            assert launch(CONFIG_COMMANDS["pipeline"], self.arguments(*overrides)) == 0
        finally:
            GlobalHydra.instance().clear()

    def start(self, *overrides: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start the pipeline in a process that can be killed."""
        return subprocess.Popen(
            [sys.executable, "-m", "tests.pipeline.recipe", "pipeline",
             *self.arguments(*overrides)],
            cwd=ROOT, stdout=stdout, stderr=subprocess.STDOUT, text=True, preexec_fn=hear_hang_ups,
        )  # fmt: skip

    @property
    def hold(self) -> Path:
        """While this file is there, no stage gets past its first step."""
        return self.folder / f"starts{tiny.HOLD}"

    def starts(self) -> Counter[str]:
        """How often a stage was started, by folder."""
        path = self.folder / "starts"
        return Counter(path.read_text().split()) if path.exists() else Counter()

    def manifest(self, run: str = "run") -> list[dict[str, Any]]:
        content = json.loads((self.folder / run / "manifest.json").read_text())
        entries: list[dict[str, Any]] = content["stages"]
        return entries

    def stage(self, name: str, run: str = "run") -> Path:
        (entry,) = (entry for entry in self.manifest(run) if entry["name"] == name)
        return Path(entry["folder"])


def remember_compositions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose nothing twice: that takes longer than a stage."""
    composed: dict[str, Any] = {}
    settings = Commands.settings

    def remembered(self: Commands, *arguments: Any) -> Any:
        if repr(arguments) not in composed:
            composed[repr(arguments)] = settings(self, *arguments)
        return composed[repr(arguments)]

    monkeypatch.setattr(Commands, "settings", remembered)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    conf = recipe.write_conf(tmp_path)
    (tmp_path / "data.txt").write_text("what everything depends on")
    commands = Commands(recipe.COMMANDS, tiny.PROGRAM, conf)
    remember_compositions(monkeypatch)
    monkeypatch.setattr(pipeline_command, "commands_of_run", lambda: commands)
    monkeypatch.setattr(sys, "argv", ["helpsteer2"])
    monkeypatch.setenv(tiny.STARTS, str(tmp_path / "starts"))
    monkeypatch.setenv("COLUMNS", "200")
    handlers, level = list(logging.root.handlers), logging.root.level
    yield Place(tmp_path)
    # Hydra's logging holds the captured output.
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def hashed_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every file whose content is read to be hashed, also one that has just been written."""
    names: list[str] = []
    real = contents_module._digest

    def counted(name: str) -> str:
        names.append(name)
        return real(name)

    monkeypatch.setattr(contents_module, "_SETTLED_NS", 0)
    monkeypatch.setattr(contents_module, "_digest", counted)
    return names


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process; what a failing test leaves is killed."""
    started = []

    def call(arguments: Sequence[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return process

    yield call
    for process in started:
        if process.poll() is None:
            kill_with_children(process)


@pytest.fixture
def models(start: Start, tmp_path: Path) -> Path:
    """Folder of two runs, ``sft`` and ``regression``: a tiny policy and a tiny reward model."""
    small = (
        "backbone=tiny", "data.groups=32", "data.validation_groups=8", "batching.max_steps=2",
        "batching.global_batch=8",
    )  # fmt: skip
    trained = [
        start(command("train", *small, f"module={module}", f"run_dir={tmp_path / module}"))
        for module in ("sft", "regression")
    ]
    for process in trained:
        finish(process)
    return tmp_path
