"""What is known of a stage from its folder: ``stage.json``, and whether its outputs are intact."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from helpsteer2.errors import UserError
from helpsteer2.pipeline.contents import Contents, combined
from helpsteer2.pipeline.fingerprint import changes
from helpsteer2.pipeline.plan import PlannedStage
from helpsteer2.pipeline.stages import OUTPUTS
from helpsteer2.records import write_json_atomic

FILE = "stage.json"

RESULT = "result.json"
"""What a command writes last: without it a stage has not finished."""


@dataclass(frozen=True)
class Record:
    """``stage.json``.

    Attributes:
        name: The stage's name.
        fingerprint: Hash of ``depends_on``.
        depends_on: What its result depends on, by dotted key.
        command_line: Arguments of its process.
        state: ``running`` also after the process was killed.
        reads: Hash of every output that it reads, by folder and path.
        outputs: Hash of every file that others may read, once it is finished.
        started: When it was started last, in ISO 8601.
        wall_seconds: How long the last start took, once it is finished.
    """

    name: str
    fingerprint: str
    depends_on: Mapping[str, Any]
    command_line: tuple[str, ...]
    state: Literal["running", "failed", "finished"]
    reads: Mapping[str, str]
    outputs: Mapping[str, str] = field(default_factory=dict)
    started: str | None = None
    wall_seconds: float | None = None

    @classmethod
    def of(cls, folder: Path) -> Record | None:
        """Read the record of a folder; None if there is none.

        Raises:
            UserError: If it is damaged.
        """
        path = folder / FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**content, "command_line": tuple(content["command_line"])})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} is damaged ({error}): delete {folder}, and the stage runs again"
            ) from error

    def write(self, folder: Path) -> None:
        """Write the record into a folder.

        Raises:
            UserError: If it cannot be written.
        """
        write_json_atomic(folder / FILE, asdict(self))

    def digest(self, path: str) -> str | None:
        """Hash of one output, a file or a folder; None if the stage did not make it."""
        files = {
            name: digest
            for name, digest in self.outputs.items()
            if name == path or name.startswith(f"{path}/")
        }
        return combined(files) if files else None


def hash_outputs(folder: Path, contents: Contents) -> dict[str, str]:
    """Hashes of all files of a stage that others may read.

    Args:
        folder: The stage's folder.
        contents: Makes the hashes.
    """
    found: dict[str, str] = {}
    for name in OUTPUTS:
        found |= contents.of_files(folder, name)
    return found


@dataclass(frozen=True)
class Status:
    """What has to be done about a stage.

    Attributes:
        kind: ``done``; ``run``; ``unneeded``, as everything that reads it is done; or ``edited``:
            its outputs are no longer what it made.
        why: In a few words.
        is_stale: Whether it is of other inputs than there are now, so that what was made of it is
            as well.
    """

    kind: Literal["done", "run", "unneeded", "edited"]
    why: str
    is_stale: bool = False


def status_of(stage: PlannedStage, contents: Contents) -> Status:
    """Find out whether a stage has to run.

    Args:
        stage: The stage.
        contents: Hashes its outputs.

    Raises:
        UserError: If its record is damaged, or a file cannot be read.
    """
    record = Record.of(stage.folder)
    if record is None:
        return Status("run", _why_never(stage))
    changed = changed_reads(stage, record)
    if changed:
        why = f"{', '.join(changed)} was made again and is not the same"
        return Status("run", why, is_stale=True)
    if record.state == "failed":
        return Status("run", "failed last time")
    if record.state == "running":
        return Status("run", "was interrupted, goes on")
    if not (stage.folder / RESULT).is_file():
        return Status("run", f"its {RESULT} is gone")
    edited = _edited(record.outputs, hash_outputs(stage.folder, contents))
    if edited:
        return Status("edited", ", ".join(edited))
    return Status("done", f"finished {record.started}" if record.started else "finished")


def changed_reads(stage: PlannedStage, record: Record) -> list[str]:
    """Outputs of earlier stages that are not those which a stage read when it ran.

    One whose stage is not finished, or whose folder is gone, is not among them.
    """
    now = digests_of_reads(stage)
    return [name for name, digest in record.reads.items() if now.get(name, digest) != digest]


def digests_of_reads(stage: PlannedStage) -> dict[str, str]:
    """Hash of every output that a stage reads, by folder and path, of finished stages alone."""
    found = {}
    for earlier, path in stage.reads:
        record = Record.of(earlier.folder)
        digest = record.digest(path) if record is not None else None
        if digest is not None:
            found[f"{earlier.folder.name}/{path}"] = digest
    return found


def needed(stages: list[PlannedStage], statuses: Mapping[str, Status]) -> dict[str, Status]:
    """Leave out stages that would run although everything that reads them is done.

    So intermediate folders can be deleted to save space.

    Args:
        stages: In their order.
        statuses: Status of each, by name.

    Returns:
        The statuses, some of them now ``unneeded``.
    """
    result = dict(statuses)
    for stage in reversed(stages):
        readers = [other for other in stages if any(e.name == stage.name for e, _ in other.reads)]
        is_read = any(result[reader.name].kind == "run" for reader in readers)
        status = result[stage.name]
        if readers and not is_read and status.kind == "run" and not status.is_stale:
            result[stage.name] = Status("unneeded", "all that reads it is done")
    return result


def _edited(made: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Files that changed, vanished or came since a stage was finished."""
    return sorted(name for name in made.keys() | found.keys() if made.get(name) != found.get(name))


def _why_never(stage: PlannedStage) -> str:
    """Why a stage has no folder yet: nothing like it ever ran, or something differs."""
    folders = [
        folder
        for folder in stage.folder.parent.glob(f"{stage.name}-{'[0-9a-f]' * 12}")
        if (folder / FILE).is_file()
    ]
    if not folders:
        return "never ran"
    latest = max(folders, key=lambda folder: os.stat(folder / FILE).st_mtime_ns)
    try:
        record = Record.of(latest)
    except UserError:
        return "never ran"
    assert record is not None
    differing = changes(record.depends_on, stage.depends_on)
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    return f"{'; '.join(differing[:3])}{more} (since {latest.name})"
