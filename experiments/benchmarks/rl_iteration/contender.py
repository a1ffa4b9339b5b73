"""The process of a contender: ``python -m … FOLDER MODULE OPTIONS``, one iteration a turn.

It reads turns from its standard input and writes a line of JSON for each to its standard output.
What libraries print goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from experiments.benchmarks.reward_step.turns import Turns
from experiments.benchmarks.rl_iteration.job import Job

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "trl", "helpsteer2")

Function = TypeVar("Function", bound=Callable[..., Any])


class JsonLines:
    """What ``Turns`` speaks through.

    Args:
        lines_in: Where turns come from.
        lines_out: Where reports go.
    """

    def __init__(self, lines_in: TextIO, lines_out: TextIO) -> None:
        self._in, self._out = lines_in, lines_out

    def send(self, report: dict[str, Any]) -> None:
        """Write a report."""
        self._out.write(json.dumps(report) + "\n")
        self._out.flush()

    def recv(self) -> str:
        """Wait for what comes next.

        Raises:
            EOFError: If the driver is gone.
        """
        line = self._in.readline()
        if not line:
            raise EOFError
        return line.strip()


class PhaseClock:
    """Seconds of an iteration by phase: ``sampling``, ``scoring``, ``logprobs``, ``values``."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    def timed(self, phase: str | Callable[..., str | None], function: Function) -> Function:
        """Wrap a function so that its time counts as a phase's.

        Args:
            phase: Its name, or what finds it (None: not counted) from the arguments of a call.
            function: Calls no other wrapped function.
        """

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            name = phase if isinstance(phase, str) else phase(*args, **kwargs)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if name is not None:
                    self._seconds[name] += time.perf_counter() - start

        return cast(Function, wrapped)

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken


def main() -> None:
    """Be the contender that the command line names."""
    folder, module, options = sys.argv[1:]
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lines = JsonLines(sys.stdin, reports)
    lines.send({"python": platform.python_version(), "packages": _versions()})
    try:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        contender = importlib.import_module(module)
        # Peaks are those of the whole process: nothing is taken off.
        turns = Turns(lines, 0.0)  # type: ignore[arg-type]
        contender.run(Job.read(Path(folder)), turns, **json.loads(options))
    except EOFError:  # the driver is gone
        return
    except Exception:
        lines.send({"error": traceback.format_exc()})


def _versions() -> dict[str, str]:
    """Versions of the packages that are installed for this Python."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
