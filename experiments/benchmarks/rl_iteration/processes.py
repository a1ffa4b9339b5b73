"""The driver's side: contenders as processes of whatever Python, exactly one of them working."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.benchmarks.rl_iteration.job import Job

ROOT = Path(__file__).resolve().parents[3]
"""Of the checkout: contenders import this package from there."""

CONTENDER = "experiments.benchmarks.rl_iteration.contender"

Report = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A contender.

    Attributes:
        python: What runs it.
        module: Its ``run(job, turns, **options)`` is the contender.
        options: Of ``run``, as JSON can write them.
    """

    python: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Process:
    """The process of a contender; it starts at once.

    Args:
        name: For messages.
        entry: What runs.
        job: What it does.
        threads: Of the process.
    """

    def __init__(self, name: str, entry: Entry, job: Job, threads: int) -> None:
        self.name = name
        self._errors = job.folder / f"{name}.log"
        command = [entry.python, "-m", CONTENDER, str(job.folder), entry.module]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        with self._errors.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [*command, json.dumps(dict(entry.options))],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
            )
        self.versions = self.receive()

    def turn(self) -> Report:
        """Let the contender do one iteration."""
        self._send("go")
        return self.receive()

    def receive(self) -> Report:
        """The next report.

        Raises:
            RuntimeError: If the contender failed.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            told = self._errors.read_text(encoding="utf-8", errors="replace")[-4000:]
            raise RuntimeError(
                f"{self.name} died with exit code {code}; -9 means that memory ran out: give fewer "
                f"--microbatches\n{told}"
            )
        report: Report = json.loads(line)
        if "error" in report:
            raise RuntimeError(f"{self.name} failed:\n{report['error']}")
        return report

    def close(self) -> None:
        """End the process, finished or not."""
        with suppress(OSError):  # it may be dead
            self._send("stop")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20)
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(OSError):
                stream.close()

    def _send(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()


def take_turns(
    title: str, entries: Mapping[str, Entry], job: Job, threads: int, console: Console
) -> tuple[dict[str, list[Report]], dict[str, Report]]:
    """Give every contender one iteration in turn, as often as the job has some.

    Args:
        title: Stands before each round's line on the console.
        entries: The contenders by name.
        job: What all of them do.
        threads: Of each process.
        console: Shows every round.

    Returns:
        The reports of each contender, warm-up included, and on what versions it ran.
    """
    turns: dict[str, list[Report]] = {name: [] for name in entries}
    with ExitStack() as stack:
        processes = []
        for name, entry in entries.items():
            process = Process(name, entry, job, threads)
            stack.callback(process.close)
            process.receive()  # it is built, and nothing else is being built meanwhile
            processes.append(process)
        for round_number in range(len(job.prompts)):
            first = round_number % len(processes)  # nobody always comes after the same one
            for process in processes[first:] + processes[:first]:
                turns[process.name].append(process.turn())
            seconds = "  ".join(f"{n} {own[-1]['seconds']:.1f}s" for n, own in turns.items())
            line = f"{title} {round_number + 1}/{len(job.prompts)}  {seconds}"
            console.print(line, soft_wrap=True)
        versions = {process.name: process.versions for process in processes}
    return turns, versions
