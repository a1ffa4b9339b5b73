"""Weights & Biases as a view of a run: never needed, never in the way."""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpsteer2.records import write_atomic

logger = logging.getLogger(__name__)

ID_FILE = "wandb_id"

FINISH_SECONDS = 120.0
"""A service that is away at the end of a run is waited for so long; the files stay."""


@dataclass(frozen=True)
class WandbRun:
    """Shows a run on W&B: online if there is a key, else in files that ``wandb sync`` uploads.

    Args:
        project: W&B project.
        entity: User or team; None for the key's own.
        group: Runs shown together; None for the sweep's folder in a sweep, else for none.
        name: Name of the run; None for the swept values in a sweep, else for the run folder's.
        tags: Tags of the run.
    """

    project: str = "helpsteer2"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()

    def open(self, run_dir: Path, config: Mapping[str, Any]) -> WandbView | None:
        """Start the W&B run, or go on with the one of this folder.

        Args:
            run_dir: The run's folder; W&B's files go there too.
            config: Shown as the run's configuration.

        Returns:
            The open run, or None if W&B does not even work offline.
        """
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                opened = self._start(run_dir, config, attempt)
            # A service that is away raises errors of many kinds.
            except Exception as error:
                logger.warning("W&B does not start %s: %s", attempt, error)
                finish(1)
                continue
            where = (
                "" if attempt == "online" else f"; upload with: wandb sync {run_dir}/wandb/*run-*"
            )
            logger.info("W&B is %s%s", attempt, where)
            return WandbView(opened)
        return None

    def _start(self, run_dir: Path, config: Mapping[str, Any], mode: str) -> Any:
        import wandb

        return wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            name=self.name or run_dir.name,
            tags=list(self.tags),
            dir=run_dir,
            id=_run_id(run_dir),
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            config=dict(config),
            settings=wandb.Settings(finish_timeout=FINISH_SECONDS),
        )


class WandbView:
    """An open W&B run. Its first failure is told, and nothing is sent to it after that.

    W&B's own step is the optimizer step. It never goes back, so what a resumed run logs again is
    left out by the service.

    Args:
        run: What ``wandb.init`` returns.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._failed = False

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add metrics to the history.

        Args:
            metrics: Numbers by name.
            step: Optimizer steps done.
        """
        self._try(lambda: self._run.log(dict(metrics), step=step))

    def log_table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """Show a table.

        Args:
            name: Its place in the run.
            columns: Names of the columns.
            rows: Their texts and numbers, None where unknown.
            step: Optimizer steps done.
        """

        def log() -> None:
            import wandb

            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            self._run.log({name: table}, step=step)

        self._try(log)

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Show an image file.

        Args:
            name: Its place in the run.
            path: The file.
            step: Optimizer steps done.
        """

        def log() -> None:
            import wandb

            self._run.log({name: wandb.Image(str(path))}, step=step)

        self._try(log)

    def summarise(self, figures: Mapping[str, float]) -> None:
        """Put figures into the run's summary, which is what W&B compares runs by.

        Args:
            figures: Numbers by name.
        """
        self._try(lambda: self._run.summary.update(dict(figures)))

    def _try(self, send: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            send()
        # Whatever happens to a view of the run, the run goes on: its record is in its folder.
        except Exception as error:
            self._failed = True
            logger.warning("W&B failed, the run goes on without it: %s", error)


def _run_id(run_dir: Path) -> str:
    """The same id for every process that works on a folder, so that a resumed run is one run."""
    path = run_dir / ID_FILE
    if not path.exists():
        content = secrets.token_hex(4).encode()

        def write(file: Any) -> None:
            file.write(content)

        write_atomic(path, write)
    return path.read_text(encoding="utf-8").strip()


def has_key() -> bool:
    """Whether an API key is in the environment or in ``~/.netrc``."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return any("wandb" in host for host in netrc.netrc().hosts)
    return False


def finish(exit_code: int) -> None:
    """Close the W&B run of this process, if there is one, so that the next job gets its own."""
    wandb = sys.modules.get("wandb")  # not imported, nothing to close
    with contextlib.suppress(Exception):
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code)
