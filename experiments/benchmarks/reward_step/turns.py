"""One process a contender, all alive, exactly one of them working at a time.

The speed of a shared machine drifts by a factor of two within a minute, so contenders take turns,
one optimizer step each. A waiting process blocks on a pipe and costs nothing.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from experiments.benchmarks.reward_step.job import Job

Report = dict[str, Any]


class Turns:
    """The contender's side: it is given a turn, does one step, and reports.

    Args:
        connection: To the driver.
        start_mib: Memory of the process before it built anything.
    """

    def __init__(self, connection: Connection, start_mib: float) -> None:
        self._connection, self._start_mib = connection, start_mib
        self._since = 0.0

    def wait_first(self) -> None:
        """Say that everything is built, and wait for the first turn."""
        self._connection.send({"ready": True})
        self._wait()

    def end(self, details: Callable[[], Report]) -> None:
        """Report the step that just ended, and wait for the next turn.

        Args:
            details: Makes what else to report, once the clock has stopped.
        """
        seconds = time.perf_counter() - self._since
        peak = _memory_mib("VmHWM") - self._start_mib
        self._connection.send({"seconds": seconds, "peak_mib": peak, **details()})
        self._wait()

    def _wait(self) -> None:
        if self._connection.recv() == "stop":
            raise SystemExit
        self._since = time.perf_counter()


class Worker:
    """The driver's side of a contender.

    Args:
        name: For messages.
        module: Module whose ``run(turns, **arguments)`` is the contender. It is imported in the new
            process alone, so its imports may be slow.
        threads: Threads of the process.
        **arguments: Passed on; they have to pickle.
    """

    def __init__(self, name: str, module: str, threads: int, **arguments: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, far_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(far_end, module, threads, arguments), name=name, daemon=True
        )
        # Read when the libraries load, hence before the process starts.
        os.environ.update(
            {
                "OMP_NUM_THREADS": str(threads),
                "MKL_NUM_THREADS": str(threads),
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
            }
        )
        self._process.start()
        far_end.close()

    def wait_ready(self) -> None:
        """Wait until the contender is built."""
        self._receive()

    def turn(self) -> Report:
        """Let the contender do one step.

        Returns:
            ``seconds``, ``peak_mib`` (largest memory so far above that before building anything)
            and what the contender adds.
        """
        self._connection.send("go")
        return self._receive()

    def close(self) -> None:
        """End the process, finished or not."""
        with suppress(OSError):  # it may be dead
            self._connection.send("stop")
        self._process.join(timeout=20)
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self) -> Report:
        try:
            report: Report = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"{self.name} died with exit code {self._process.exitcode}; -9 means that memory "
                "ran out: lower --at-once"
            ) from None
        if "error" in report:
            raise RuntimeError(f"{self.name} failed:\n{report['error']}")
        return report


def take_turns(
    title: str,
    contenders: Mapping[str, tuple[str, Report]],
    job: Job,
    threads: int,
    console: Console,
) -> dict[str, list[Report]]:
    """Give every contender one step in turn, as often as the job has steps.

    Args:
        title: Stands before each round's line on the console.
        contenders: Module and arguments of each, by name.
        job: What all of them train on.
        threads: Of each process.
        console: Shows every round.

    Returns:
        The reports of each contender, warm-up included.
    """
    turns: dict[str, list[Report]] = {name: [] for name in contenders}
    with ExitStack() as stack:
        workers = []
        for name, (module, arguments) in contenders.items():
            workers.append(Worker(name, module, threads, job=job, **arguments))
            stack.callback(workers[-1].close)
        for worker in workers:
            worker.wait_ready()
        for round_number in range(job.total_steps):
            first = round_number % len(workers)  # nobody always comes after the same one
            for worker in workers[first:] + workers[:first]:
                turns[worker.name].append(worker.turn())
            seconds = "  ".join(f"{n} {t[-1]['seconds']:.2f}s" for n, t in turns.items())
            line = f"{title} {round_number + 1}/{job.total_steps}  {seconds}"
            console.print(line, soft_wrap=True)
    return turns


def _serve(connection: Connection, module: str, threads: int, arguments: Report) -> None:
    """Run a contender in its own process."""
    try:
        import torch

        torch.set_num_threads(threads)
        contender = importlib.import_module(module)
        contender.run(Turns(connection, _memory_mib("VmRSS")), **arguments)
    except EOFError:  # the driver is gone
        return
    except Exception:
        connection.send({"error": traceback.format_exc()})


def _memory_mib(field: str) -> float:
    """A field of Linux's account of this process; NaN elsewhere."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return float("nan")
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else float("nan")
