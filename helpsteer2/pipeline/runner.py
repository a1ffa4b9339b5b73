"""Running the stages of a plan in their order, each by one process at a time."""

from __future__ import annotations

import errno
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from helpsteer2.errors import UserError
from helpsteer2.pipeline.contents import Contents
from helpsteer2.pipeline.plan import PlannedStage
from helpsteer2.pipeline.process import StageProcess, last_lines, locked
from helpsteer2.pipeline.record import (
    RESULT,
    Record,
    Status,
    changed_reads,
    digests_of_reads,
    hash_outputs,
    needed,
    status_of,
)

SHOWN_LINES = 15
"""Lines of a failed stage's output that are shown."""

LOG = "stage.log"


def statuses_of(stages: Sequence[PlannedStage], contents: Contents) -> dict[str, Status]:
    """What has to be done about each stage, by name.

    Args:
        stages: The plan.
        contents: Hashes their outputs, and remembers it.

    Raises:
        UserError: If a record is damaged, or a file cannot be read or written.
    """
    statuses = {stage.name: status_of(stage, contents) for stage in stages}
    contents.save()
    return needed(list(stages), statuses)


def refuse_edited(stages: Sequence[PlannedStage], statuses: dict[str, Status]) -> None:
    """Stop where somebody changed what a stage has made.

    Args:
        stages: The plan.
        statuses: Of each stage, by name.

    Raises:
        UserError: If there is such a stage; all of them are named, and every file.
    """
    lines = [
        f"  {stage.folder}: {statuses[stage.name].why}"
        for stage in stages
        if statuses[stage.name].kind == "edited"
    ]
    if lines:
        raise UserError(
            "these files are not what their stage has made:\n" + "\n".join(lines) + "\n"
            "Put them back; or delete the folder, and the stage runs again if something needs it; "
            "or give an edited file to a pipeline as an input of its own"
        )


@dataclass
class Runner:
    """Runs a plan.

    Args:
        stages: The plan.
        contents: Hashes outputs.
        process: Runs one stage at a time.
        console: Where a line a stage is printed.
        changed: Called whenever a stage has begun or ended, with the entries of the manifest.
    """

    stages: Sequence[PlannedStage]
    contents: Contents
    process: StageProcess
    console: Console
    changed: Callable[[list[dict[str, Any]]], None]

    def run(self) -> list[dict[str, Any]]:
        """Run what has to run.

        Returns:
            The entries of the manifest, one a stage.

        Raises:
            UserError: If a stage fails, its outputs were edited, or something cannot be written.
            SystemExit: With 128 + the signal's number, after a signal asked to stop.
        """
        statuses = statuses_of(self.stages, self.contents)
        refuse_edited(self.stages, statuses)
        entries = [_entry(stage, "waiting") for stage in self.stages]
        waiting = list(range(len(self.stages)))
        while waiting:
            number = waiting.pop(0)
            stage = self.stages[number]
            said = f"[{number + 1}/{len(self.stages)}] {stage.name}"
            if statuses[stage.name].kind == "unneeded":
                self._say(f"{said}: not needed, {statuses[stage.name].why}")
                entries[number] = _entry(stage, "unneeded")
                continue
            entries[number] = _entry(stage, "running")
            self.changed(entries)
            try:
                ran = self._settle(stage, said)
            except UserError:
                entries[number] = _entry(stage, "failed")
                self.changed(entries)
                raise
            entries[number] = _entry(stage, "run" if ran else "skipped")
            self.changed(entries)
            if ran or statuses[stage.name].kind != "done":
                # What reads it may be of an earlier result, and then needs other stages as well.
                statuses = statuses_of(self.stages, self.contents)
                waiting = [
                    place
                    for place, other in enumerate(self.stages)
                    if place in waiting or statuses[other.name].kind not in ("done", "unneeded")
                ]
        return entries

    def _settle(self, stage: PlannedStage, said: str) -> bool:
        """See to it that a stage is done; whether it had to run."""

        def waiting(owner: str) -> None:
            self._say(f"{said}: process {owner} is at it, waiting for its end")

        lock = stage.folder.parent / ".locks" / stage.folder.name
        with locked(lock, waiting) as descriptor:
            # Another process may have done it since the plan was made.
            status = status_of(stage, self.contents)
            refuse_edited([stage], {stage.name: status})
            if status.kind == "done":
                self._say(f"{said}: done before, {stage.folder}")
                return False
            self._say(f"{said}: {status.why}; {stage.folder}")
            record = self._begin(stage)
            started = time.monotonic()
            code = self.process.run(stage.command_line, stage.folder / LOG, descriptor)
            seconds = time.monotonic() - started
            if code == 0 or self.process.received is None:
                self._end(stage, record, code, seconds)
            if self.process.received is not None:
                name = signal.Signals(self.process.received).name
                self._say(f"stopped by {name}: the same command goes on from here")
                raise SystemExit(128 + self.process.received)
            self._say(f"{said}: done in {seconds:.1f} s")
            return True

    def _begin(self, stage: PlannedStage) -> Record:
        """Note that a stage runs; a folder that was made from other inputs is set aside."""
        try:
            before = Record.of(stage.folder)
            if before is not None and changed_reads(stage, before):
                aside = _free_name(stage.folder)
                stage.folder.rename(aside)
                self._say(f"what it made from other inputs is kept in {aside}")
            stage.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {stage.folder}: {error.strerror or error}") from error
        record = Record(
            name=stage.name,
            fingerprint=stage.fingerprint,
            depends_on=stage.depends_on,
            command_line=stage.command_line,
            state="running",
            reads=digests_of_reads(stage),
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        record.write(stage.folder)
        self.contents.save()  # of what stages read, as there may have been no folder before
        return record

    def _end(self, stage: PlannedStage, record: Record, code: int, seconds: float) -> None:
        log = stage.folder / LOG
        problem = None if code == 0 else _how_it_ended(code)
        if code == 0 and not (stage.folder / RESULT).is_file():
            problem = f"ended without a {RESULT}"
        if problem is not None:
            replace(record, state="failed").write(stage.folder)
            raise UserError(
                f"stage {stage.name} {problem}. Its last lines, of {log}:\n"
                f"{last_lines(log, SHOWN_LINES)}\n"
                "Once the cause is mended, the same command goes on from here"
            )
        outputs = hash_outputs(stage.folder, self.contents)
        finished = replace(
            record, state="finished", outputs=outputs, wall_seconds=round(seconds, 3)
        )
        self._require_outputs(stage, finished)
        finished.write(stage.folder)
        self.contents.save()

    def _require_outputs(self, stage: PlannedStage, record: Record) -> None:
        wanted = {path for reader in self.stages for other, path in reader.reads if other is stage}
        missing = sorted(path for path in wanted if record.digest(path) is None)
        if missing:
            replace(record, state="failed").write(stage.folder)
            raise UserError(
                f"stage {stage.name} made no {', '.join(missing)}, which a later stage reads; see "
                f"{stage.folder / LOG}"
            )

    def _say(self, text: str) -> None:
        try:
            self.console.print(text, soft_wrap=True, markup=False, highlight=False)
        except OSError as error:
            if error.errno != errno.EIO:  # of a terminal that has gone away: the stages go on
                raise


def _how_it_ended(code: int) -> str:
    if code < 0:
        more = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{more}"
    return f"failed with exit code {code}"


def _free_name(folder: Path) -> Path:
    """A name beside a folder that nothing has yet."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    return aside


def _entry(stage: PlannedStage, status: str) -> dict[str, Any]:
    """What the manifest says of a stage."""
    record = Record.of(stage.folder)
    is_done = record is not None and record.state == "finished"
    return {
        "name": stage.name,
        "command": stage.stage.command,
        "status": status,
        "fingerprint": stage.fingerprint,
        "folder": str(stage.folder),
        "inputs": dict(record.reads) if record is not None else {},
        "outputs": dict(record.outputs) if record is not None and is_done else {},
        "wall_seconds": record.wall_seconds if record is not None and is_done else None,
        "command_line": shlex.join(stage.command_line),
    }
