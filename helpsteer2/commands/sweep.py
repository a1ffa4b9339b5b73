"""Many jobs from one command: a failing one stops no other, and a table tells of all of them."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.errors import UserError
from helpsteer2.records import write_json_atomic

logger = logging.getLogger(__name__)

WIDTH = 120
"""Columns of the table where the output is no terminal."""

STYLES = {
    "finished": "green",
    "failed": "red",
    "killed": "red",
    "stopped": "yellow",
    "running": "yellow",
}


_CHILD = """
import pickle, sys
sys.path, sys.argv = pickle.load(sys.stdin.buffer)
call, *arguments = pickle.load(sys.stdin.buffer)
call(*arguments)
"""


@dataclass(frozen=True)
class Job:
    """What became of one job of a sweep.

    Attributes:
        number: Its place in the sweep, from 0; the name of its folder.
        folder: Its own folder.
        swept: Value of each key in which the jobs differ.
        status: ``stopped`` by a signal that it heeded, ``killed`` by one that it could not; a job
            that is still ``running`` when the sweep is over was killed with its launcher.
        metric: Name of the optimized metric.
        value: Its value; None without a metric, and until the job is finished.
        seconds: How long it took.
        error: Why it failed or what killed it; a traceback if the mistake is not the user's.
    """

    number: int
    folder: str
    swept: dict[str, str]
    status: Literal["running", "finished", "failed", "killed", "stopped"] = "running"
    metric: str | None = None
    value: float | None = None
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Sweep:
    """The jobs that one command starts, one after the other or in processes of their own.

    A job notes what became of it in ``folder/jobs/NUMBER.json``, because it may run in another
    process, or on another machine. Where a launcher has brought it to another process it runs in a
    child of that one, whose death is no more than the failure of one job: launchers give up all
    their jobs if one of their own processes dies. In the process of the sweep itself a job that is
    killed ends the sweep, and the same command goes on with that job.

    Args:
        folder: Holds a folder for each job.
        fixed: Keys that have one value for all jobs.
    """

    folder: Path
    fixed: frozenset[str] = frozenset()
    process: int = field(default_factory=os.getpid)

    @classmethod
    def of(cls, folder: Path, overrides: Sequence[str]) -> Sweep:
        """The sweep that overrides ask for.

        Args:
            folder: Holds a folder for each job.
            overrides: As typed.
        """
        from hydra.core.override_parser.overrides_parser import OverridesParser

        parsed = OverridesParser.create().parse_overrides(list(overrides))
        keys = (_key(o.get_key_element()) for o in parsed if not o.is_sweep_override())
        return cls(folder, frozenset(keys))

    @property
    def notes(self) -> Path:
        """Folder of the jobs' notes."""
        return self.folder / "jobs"

    def location(self) -> str:
        """The folder as an override for Hydra, so that a time in its name is read once."""
        escaped = str(self.folder).replace("'", "\\'")
        return f"hydra.sweep.dir='{escaped}'"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep other processes out of the folder until the end of the block; tell how it went.

        Raises:
            UserError: If the folder is in use, if this is one rank of several or, at the end, if a
                job did not finish.
            OSError: If the folder cannot be made.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "every rank would run the whole sweep: start it without torchrun, and each job "
                "that needs several devices with torchrun and without -m"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with RunFolder(self.folder).locked():
            shutil.rmtree(self.notes, ignore_errors=True)
            cause = None
            try:
                yield
            except UserError:
                raise
            except Exception as error:
                if all(job.status != "running" for job in self.jobs()):
                    raise
                # A process of the launcher was killed, and it has given up.
                cause = error
            finally:
                jobs = self.jobs()
                self._tell(jobs)
        unfinished = [str(job.number) for job in jobs if job.status != "finished"]
        if unfinished:
            given_up = f"\nThe launcher gave up and began no other: {cause}" if cause else ""
            raise UserError(
                f"{len(unfinished)} of {len(jobs)} jobs did not finish ({', '.join(unfinished)}); "
                f"what they said is in {self.notes}. The same command with run_dir={self.folder} "
                f"runs them again and leaves the others{given_up}"
            ) from cause

    def jobs(self) -> list[Job]:
        """The jobs that were started, by number."""
        notes = [json.loads(path.read_text(encoding="utf-8")) for path in self.notes.glob("*.json")]
        return sorted((Job(**note) for note in notes), key=lambda job: job.number)

    def run(self, metric: str | None, call: Callable[[Job], Any]) -> float | None:
        """Run the job that Hydra has set up, and note what becomes of it.

        Args:
            metric: Name of the optimized metric.
            call: Does the job and returns the metric, if there is one; can be pickled.

        Returns:
            The metric; None if the job fails under Hydra's own sweeper, which would start no
            further batch after an error.

        Raises:
            UserError: If it fails under another sweeper, which may go on or give up. It holds
                nothing but text, so that it comes back from other processes.
            SystemExit: If it was asked to stop, which ends the sweep.
        """
        from hydra.core.hydra_config import HydraConfig

        config = HydraConfig.get()
        given = {_key(text): text.partition("=")[2] for text in config.overrides.task}
        swept = {key: value for key, value in given.items() if key not in self.fixed}
        job = Job(int(config.job.num), str(config.runtime.output_dir), swept, metric=metric)
        self._note(job)
        attempt = self._attempt if os.getpid() == self.process else self._attempt_apart
        job = attempt(job, call)
        if job.error is not None:
            logger.error("job %d %s: %s", job.number, job.status, job.error)
            if not str(config.sweeper._target_).endswith(".BasicSweeper"):
                raise UserError(job.error)
        return job.value

    def _attempt(self, job: Job, call: Callable[[Job], Any]) -> Job:
        """Do a job, and note and return what became of it."""
        started = time.monotonic()
        try:
            value = call(job)
            job = replace(job, status="finished", value=None if value is None else float(value))
        except UserError as error:
            job = replace(job, status="failed", error=str(error))
        except Exception:
            job = replace(job, status="failed", error=traceback.format_exc())
        except BaseException:
            job = replace(job, status="stopped")
            raise
        finally:
            job = replace(job, seconds=round(time.monotonic() - started, 1))
            self._note(job)
        return job

    def _attempt_apart(self, job: Job, call: Callable[[Job], Any]) -> Job:
        """The same in a new process, so that its death takes nothing else along."""
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        started = time.monotonic()
        # Plain: it holds classes of plugins, which Hydra imports twice, and pickle refuses those.
        config = OmegaConf.to_container(HydraConfig.instance().cfg)
        given = pickle.dumps((sys.path, sys.argv))
        given += pickle.dumps((_apart, config, self, job, call))
        # Not by multiprocessing: a launcher's process may have a start method of the launcher's own
        # that new processes do not know. No buffer: it would be emptied once more at the end.
        program = [sys.executable, "-c", _CHILD]
        with subprocess.Popen(program, stdin=subprocess.PIPE, bufsize=0) as process:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(given)
            # The pipe stays open: its end tells the child that this process is gone.
            exit_code = process.wait()
        job = next((noted for noted in self.jobs() if noted.number == job.number), job)
        if job.status == "stopped":
            raise SystemExit(exit_code)
        if job.status == "running":
            seconds = round(time.monotonic() - started, 1)
            job = replace(job, status="killed", seconds=seconds, error=_death(exit_code))
            self._note(job)
        return job

    def _note(self, job: Job) -> None:
        try:
            write_json_atomic(self.notes / f"{job.number}.json", asdict(job))
        except UserError as error:
            logger.warning("job %d: %s", job.number, error)

    def _tell(self, jobs: Sequence[Job]) -> None:
        """Print a table of the jobs, and the first line of what went wrong."""
        if not jobs:
            return
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)
        console.print(table(jobs))
        for job in jobs:
            if job.error is not None:
                # A traceback ends with what was raised, a message of ours begins with it.
                lines = job.error.strip().splitlines()
                line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
                text = f"job {job.number} {job.status}: {line}"
                console.print(text, soft_wrap=True, markup=False, highlight=False)


def table(jobs: Sequence[Job]) -> Table:
    """A row a job: the values it was given, what became of it, its metric and its folder.

    Args:
        jobs: At least one.
    """
    keys = list(dict.fromkeys(key for job in jobs for key in job.swept))
    metric = next((job.metric for job in jobs if job.metric is not None), None)
    shown = Table(title="jobs of the sweep")
    shown.add_column("job", justify="right")
    for key in keys:
        shown.add_column(escape(key), overflow="fold")
    shown.add_column("status")
    if metric is not None:
        shown.add_column(metric, justify="right")
    shown.add_column("seconds", justify="right")
    shown.add_column("folder", overflow="fold")
    for job in jobs:
        status = "killed" if job.status == "running" else job.status
        cells = [str(job.number), *(escape(job.swept.get(key, "")) for key in keys)]
        cells.append(f"[{STYLES[job.status]}]{status}[/]")
        if metric is not None:
            cells.append("–" if job.value is None else f"{job.value:.4f}")
        cells.append("–" if job.seconds is None else f"{job.seconds:.1f}")
        shown.add_row(*cells, escape(_short(job.folder)))
    return shown


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _short(folder: str) -> str:
    """A path from here, if it lies below."""
    path = Path(folder)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else folder


def _apart(config: dict[str, Any], sweep: Sweep, job: Job, call: Callable[[Job], Any]) -> None:
    """Do a job in a process that has just begun.

    Args:
        config: What Hydra has composed for the job, its own node included.
        sweep: The sweep it belongs to.
        job: The job.
        call: Does it.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import configure_log, setup_globals
    from omegaconf import OmegaConf

    threading.Thread(target=_stop_with_parent, daemon=True).start()
    with _marked(job.number):
        setup_globals()
        composed: Any = OmegaConf.create(config)
        HydraConfig.instance().cfg = composed
        configure_log(composed.hydra.job_logging, composed.hydra.verbose)
        try:
            sweep._attempt(job, call)
        except KeyboardInterrupt:
            # The process of the sweep has heard of it too and says so; a traceback says no more.
            raise SystemExit(128 + signal.SIGINT) from None


def _stop_with_parent() -> None:
    """Wait until the parent is gone, then ask this process to stop: nobody else would."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _death(exit_code: int) -> str:
    """What ended a process that left no word, in words."""
    if exit_code >= 0:
        return f"its process ended with exit code {exit_code} and no word"
    hint = ", as the system does when memory runs out" if -exit_code == signal.SIGKILL else ""
    return f"its process was ended by signal {-exit_code}{hint}"


@contextmanager
def _marked(number: int) -> Iterator[None]:
    """Put a job's number before its lines, where several jobs write to one terminal."""
    mark = f"[{number}] "
    with redirect_stdout(_Marked(sys.stdout, mark)), redirect_stderr(_Marked(sys.stderr, mark)):
        yield


class _Marked(io.TextIOBase):
    """Passes whole lines on, a mark before each; as it is no terminal, nobody draws bars in it."""

    def __init__(self, stream: TextIO, mark: str) -> None:
        self._stream, self._mark, self._rest = stream, mark, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        self._stream.write("".join(f"{self._mark}{line}\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()
