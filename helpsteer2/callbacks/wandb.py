"""Weights & Biases as a view of a run: never needed, never in the way."""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer2.records import write_atomic

if TYPE_CHECKING:
    from pytorch_lightning.loggers import WandbLogger

logger = logging.getLogger(__name__)

ID_FILE = "wandb_id"


@dataclass(frozen=True)
class WandbRun:
    """Shows a run on W&B: online if there is a key, else in files that ``wandb sync`` uploads.

    Args:
        project: W&B project.
        entity: User or team; None for the key's own.
        name: Name of the run; None for the run folder's.
        tags: Tags of the run.
    """

    project: str = "helpsteer2"
    entity: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()

    def open(self, run_dir: Path, config: Mapping[str, Any]) -> WandbLogger | None:
        """Start the W&B run, or go on with the one of this folder.

        Args:
            run_dir: The run's folder; W&B's files go there too.
            config: Shown as the run's configuration.

        Returns:
            A logger, or None if W&B does not even work offline.
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
            return opened
        return None

    def _start(self, run_dir: Path, config: Mapping[str, Any], mode: str) -> WandbLogger:
        import wandb
        from pytorch_lightning.loggers import WandbLogger

        run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.name or run_dir.name,
            tags=list(self.tags),
            dir=run_dir,
            id=_run_id(run_dir),
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            config=dict(config),
        )
        return WandbLogger(experiment=run)


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
    with contextlib.suppress(Exception):
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code)
