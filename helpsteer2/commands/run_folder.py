"""The folder of a run: one process at a time, one configuration, and its record."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.logging import RichHandler

from helpsteer2.errors import UserError
from helpsteer2.records import append, plain, reason, write_atomic, write_json_atomic

LOGGED = ("helpsteer2", "pytorch_lightning", "py.warnings")
"""Loggers whose messages belong to a run."""


class _LogFile(logging.FileHandler):
    """A log without which a run goes on: whoever cannot write what matters says so itself."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing of a message that is lost; the console has it."""

    def close(self) -> None:
        """Close the file, whether or not the last messages can be written."""
        with contextlib.suppress(OSError):
            super().close()


class RunFolder:
    """Where a run keeps its files.

    Args:
        path: The folder; made when it is locked.

    Attributes:
        checkpoints: Folder of ``last.ckpt`` and ``best.ckpt``.
        export: Folder of the exported model.
        exports: Folder of the exports of steps on the way.
        metrics: The metrics file.
        bad_batch: Folder of batches gone wrong.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"
        self.exports = self.path / "exports"
        self.metrics = self.path / "metrics.csv"
        self.bad_batch = self.path / "bad_batch"

    @contextlib.contextmanager
    def locked(self, command: str | None = None) -> Iterator[None]:
        """Keep other processes out, as long as this one lives or until the end of the block.

        Args:
            command: Command whose record the folder is for; None writes no record.

        Raises:
            UserError: If another process has it (its number is named), it holds the record of
                another command, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "run.lock").open("a+b", buffering=0)
        except OSError as error:
            raise UserError(f"run_dir={self.path} cannot be written: {reason(error)}") from error
        with file:
            self._lock(file)
            self._refuse_record_of_another(command)
            yield

    def _refuse_record_of_another(self, command: str | None) -> None:
        """Writing over it would lose what a model or a data set was made of."""
        made_by = (self.result() or {}).get("kind", command)
        if command is not None and made_by != command:
            raise UserError(
                f"run_dir={self.path} holds the result of `helpsteer2 {made_by}`: choose another "
                "run_dir"
            )

    def _lock(self, file: FileIO) -> None:
        # A lock of the process: workers it forks do not keep it alive, as they would with flock.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            owner = file.read().decode().strip() or "unknown"
            raise UserError(
                f"run_dir={self.path} is in use by process {owner}: wait for it, stop it, or "
                "choose another run_dir"
            ) from error
        except OSError as error:
            raise UserError(
                f"run_dir={self.path} is on a file system without locks ({error.strerror}): "
                "choose a run_dir elsewhere"
            ) from error
        try:
            file.truncate(0)
            append(file, str(os.getpid()).encode())
        except OSError as error:
            raise UserError(f"cannot write {self.path}/run.lock: {reason(error)}") from error

    @contextlib.contextmanager
    def logging(self, console: Console) -> Iterator[None]:
        """Send messages to ``run.log`` and to the console until the end of the block."""
        to_file = _LogFile(self.path / "run.log", encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        to_console: logging.Handler
        if console.is_terminal:
            # Prints above a progress bar instead of through it.
            to_console = RichHandler(console=console, show_path=False, show_time=False)
        else:
            to_console = logging.StreamHandler(console.file)
        to_console.setLevel(logging.INFO)
        previous = {}
        for name in LOGGED:
            logger = logging.getLogger(name)
            previous[name] = (logger.level, logger.propagate, list(logger.handlers))
            # Warnings of other packages are for the file: few of them ask anything of the user.
            logger.handlers = [to_file] if name == "py.warnings" else [to_file, to_console]
            logger.propagate = False
            logger.setLevel(logging.DEBUG if name == "helpsteer2" else logging.WARNING)
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            for name, (level, propagate, handlers) in previous.items():
                logger = logging.getLogger(name)
                logger.setLevel(level)
                logger.propagate, logger.handlers = propagate, handlers
            to_file.close()

    def keep(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a YAML file."""
        text = yaml.safe_dump(plain(content), sort_keys=False, allow_unicode=True)

        def write(file: Any) -> None:
            file.write(text.encode("utf-8"))

        write_atomic(self.path / name, write)

    def kept(self, name: str) -> dict[str, Any] | None:
        """Read a YAML file written by ``keep``; None if there is none."""
        path = self.path / name
        if not path.exists():
            return None
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert isinstance(content, dict)
        return content

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``, the record of a finished run."""
        write_json_atomic(self.path / "result.json", result)

    def result(self) -> dict[str, Any] | None:
        """Read ``result.json``; None if the run is not finished."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(content, dict)
        return content
