"""The process of a stage: its output in a log and on the terminal, signals passed on to it."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from helpsteer2.errors import UserError
from helpsteer2.records import append, reason

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask a run to stop; commands save what they have and end."""

_CHUNK = 1 << 16
_TAIL_BYTES = 1 << 14
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()].")


class StageProcess:
    """Runs one process at a time; signals that reach us reach it.

    Used as a context around a pipeline. Without a process a signal ends ours at once; with one it
    is passed on, and our end is left to whoever waits for it.

    Attributes:
        received: Number of the first signal; None if there was none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._starting = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StageProcess:
        # Only the main thread may set handlers; what is ignored (nohup) stays ignored.
        if threading.current_thread() is threading.main_thread():
            for number in PASSED_ON:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, arguments: Sequence[str], log: Path, keep_open: int) -> int:
        """Run a process to its end.

        Args:
            arguments: The program and its arguments.
            log: File that its output is appended to; a terminal of ours shows it as well.
            keep_open: File descriptor of a lock that shall last as long as the process does, also
                if ours is killed.

        Returns:
            Its exit code, the negative number of a signal that ended it.

        Raises:
            UserError: If it cannot be started, or the log cannot be written.
        """
        try:
            with log.open("ab") as file:
                if sys.stdout.isatty():
                    return self._run_in_terminal(arguments, file, keep_open)
                self._start(arguments, file, keep_open)
                return self._wait()
        except OSError as error:
            raise UserError(f"{log}: {error.strerror or error}") from error

    def _start(self, arguments: Sequence[str], output: int | BinaryIO, keep_open: int) -> None:
        self._starting = True
        try:
            # In a session of its own a Ctrl-C of the terminal reaches it once: through us.
            self._child = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(keep_open,),
            )
        finally:
            self._starting = False
        if self.received is not None:
            self._child.send_signal(_as_understood(self.received))

    def _wait(self) -> int:
        assert self._child is not None
        try:
            return self._child.wait()
        finally:
            self._child = None

    def _run_in_terminal(self, arguments: Sequence[str], log: BinaryIO, keep_open: int) -> int:
        """Give it a terminal, so that it draws progress bars, and copy what it draws."""
        ours, theirs = pty.openpty()
        try:
            size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
            self._start(arguments, theirs, keep_open)
        finally:
            os.close(theirs)
        try:
            for chunk in _chunks(ours):
                with suppress(OSError):  # a terminal that has gone away shall not stop the stage
                    os.write(sys.stdout.fileno(), chunk)
                log.write(chunk)
                log.flush()
            return self._wait()
        finally:
            os.close(ours)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if self._child is not None:
            self._child.send_signal(_as_understood(number))
        elif not self._starting:
            raise SystemExit(128 + number)


def _as_understood(number: int) -> int:
    """The signal that asks a stage to stop as this one does.

    Ctrl-C and SIGTERM are known to every command, and torchrun passes them on to its workers; of
    SIGUSR1 it would die without them.
    """
    return number if number == signal.SIGINT else signal.SIGTERM


def _chunks(terminal: int) -> Iterator[bytes]:
    """Whatever is written to a pseudo-terminal, until its other side is closed."""
    while True:
        try:
            chunk = os.read(terminal, _CHUNK)
        except OSError as error:
            if error.errno == errno.EIO:  # how Linux tells that nobody has it open any more
                return
            raise
        if not chunk:
            return
        yield chunk


def last_lines(log: Path, count: int) -> str:
    """The last lines of a log, without what moves a terminal's cursor.

    Args:
        log: The file.
        count: How many lines at most.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    # Of a line drawn over and over, what stood there last.
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in _CONTROL.sub("", text).split("\n")]
    return "\n".join([line.rstrip() for line in lines if line.strip()][-count:])


@contextmanager
def locked(path: Path, waiting: Any) -> Iterator[int]:
    """Keep other processes out until the end of the block; wait for one that is there.

    The lock belongs to the open file: a process that gets the descriptor keeps it, even if the one
    that made it is killed.

    Args:
        path: File of the lock; holds the number of the process that has it.
        waiting: Called with that number before waiting.

    Yields:
        The descriptor.

    Raises:
        UserError: If the file cannot be made, or its file system has no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            waiting(file.read().decode().strip() or "another")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{path} is on a file system without locks ({error.strerror}): choose a "
                "stages_dir elsewhere"
            ) from error
        try:
            file.truncate(0)
            append(file, str(os.getpid()).encode())
        except OSError as error:
            raise UserError(f"cannot write {path}: {reason(error)}") from error
        yield file.fileno()
