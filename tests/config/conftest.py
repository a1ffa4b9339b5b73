from __future__ import annotations

import importlib
import itertools
import logging
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpsteer2.config.checked import Checked, check
from helpsteer2.config.command import ConfigCommand
from helpsteer2.errors import ConfigError

NUMBERS = itertools.count()

PARTS = """
from __future__ import annotations
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Optional, Protocol
import fixture_does_not_exist  # reading this file must never run it

Size = Literal["small", "large"]
Sizes = Optional[Size]

@dataclass
class Base:
    width: int
    kind: ClassVar[str] = "base"

@dataclass(frozen=True)
class Engine(Base):
    rate: float = 0.5
    size: Sizes = None
    hidden: list[int] = field(default_factory=list)
    made: int = field(init=False, default=3)

class Turbo(Engine):
    pass

class Wheel:
    def __init__(self, count: int, *, names: Sequence[str] = ()) -> None: ...

class Drives(Protocol):
    def drive(self) -> None: ...

def build(size: Size, **extra: int) -> Engine: ...
"""

COMMAND = """
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from {package}.parts import Drives, Engine, Wheel

def run(
    run_dir: str,
    seed: int,
    engine: Engine,
    wheel: Callable[..., Wheel],
    weights: Mapping[str, float],
    driver: Drives | None = None,
    note: str | None = None,
    flag: bool = False,
    config: Mapping[str, Any] | None = None,
) -> float:
    ...
"""

ROOT = """
defaults:
  - _self_
  - engine: small
  - experiment: null
run_dir: out/run
seed: 1
wheel: {_target_: PACKAGE.parts.Wheel, _partial_: true, names: [a, b]}
weights: {good: 1.0, bad: -0.5}
hydra:
  run: {dir: '${run_dir}'}
  sweep: {dir: '${run_dir}', subdir: '${hydra.job.num}'}
  output_subdir: null
"""


@dataclass
class Project:
    """A package with a command and a conf folder, none of which can be imported by accident."""

    package: str
    folder: Path
    command: ConfigCommand

    def check(self, *overrides: str, multirun: bool = False) -> Checked:
        return check(self.command, overrides, multirun=multirun, conf=self.folder / "conf")

    def mistakes(self, *overrides: str, multirun: bool = False) -> list[str]:
        """The lines of the error, without its headline."""
        with pytest.raises(ConfigError) as caught:
            self.check(*overrides, multirun=multirun)
        assert caught.value.exit_code == 2
        return [line.strip() for line in str(caught.value).splitlines()[1:]]

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).replace("PACKAGE", self.package), encoding="utf-8")
        return path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    # A new name each time, since found modules are kept for the life of the process.
    package = f"fixture_project_{next(NUMBERS)}"
    command = ConfigCommand("run", "for tests", f"{package}.command.run", "root")
    made = Project(package, tmp_path, command)
    made.write(f"{package}/__init__.py", "raise RuntimeError('imported')\n")
    made.write(f"{package}/parts.py", PARTS)
    made.write(f"{package}/command.py", COMMAND.replace("{package}", package))
    made.write("conf/root.yaml", ROOT)
    made.write("conf/engine/small.yaml", "_target_: PACKAGE.parts.Engine\nwidth: 3\n")
    made.write("conf/engine/large.yaml", "_target_: PACKAGE.parts.Engine\nwidth: 9\nsize: large\n")
    made.write("conf/engine/open.yaml", "_target_: PACKAGE.parts.Engine\nwidth: ???\n")
    made.write("conf/experiment/deep/fast.yaml", "# @package _global_\nseed: 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    handlers = list(logging.root.handlers)
    yield made
    # Hydra's logging holds on to the captured standard output of this test.
    logging.root.handlers[:] = handlers
    for name in [name for name in sys.modules if name.startswith(package)]:
        del sys.modules[name]
