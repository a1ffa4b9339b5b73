"""What a sampling run has so far, on the disk: a group a line, in the order of completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

from helpsteer2.data.groups import Group
from helpsteer2.data.sources.group_rows import group_row
from helpsteer2.errors import UserError
from helpsteer2.records import append, reason, write_atomic


class SampleStore:
    """Groups by their place among the prompts; each is on the disk once ``add`` is back.

    A line is the place, a tab, and the row that the finished file will have. The last line of a
    killed run may be torn: it is cut off.

    Args:
        path: The file.

    Raises:
        UserError: If it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Of each place, where its row begins in the file and how long it is. A later line counts.
        self._rows: dict[int, tuple[int, int]] = {}
        try:
            self._file = path.open("ab", buffering=0)
            self._end = self._read()
        except OSError as error:
            raise UserError(f"cannot write {path}: {reason(error)}") from error

    def __enter__(self) -> SampleStore:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _read(self) -> int:
        """Find the rows of an earlier run; where the last whole line ends."""
        end = 0
        with self._path.open("rb") as file:
            for line in file:
                place, tab, row = line.partition(b"\t")
                if not line.endswith(b"\n"):
                    break
                if not tab or not place.isdigit():
                    raise UserError(f"{self._path} is damaged: remove it and start again")
                self._rows[int(place)] = (end + len(place) + 1, len(row))
                end += len(line)
        self._file.truncate(end)
        return end

    @property
    def places(self) -> set[int]:
        """Places of the groups that are there."""
        return set(self._rows)

    def add(self, place: int, group: Group) -> None:
        """Keep a group.

        Args:
            place: Among the prompts.
            group: With its samples, and no ratings.

        Raises:
            UserError: If it cannot be written (disk full).
        """
        row = json.dumps(group_row(group, ()), ensure_ascii=False, allow_nan=False).encode()
        head = f"{place}\t".encode()
        try:
            append(self._file, head + row + b"\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {reason(error)}; the groups before are kept"
            ) from error
        self._rows[place] = (self._end + len(head), len(row) + 1)
        self._end += len(head) + len(row) + 1

    def write(self, path: Path) -> dict[str, Any]:
        """Write the groups in the order of their prompts, whole or not at all.

        Args:
            path: The JSONL file.

        Returns:
            What the samples are: ``groups``, ``samples``, ``tokens``, ``mean_tokens``,
            ``finish_reasons``, ``empty_samples``, and ``samples_without_logprobs``.

        Raises:
            UserError: If it cannot be written.
        """
        counts = _Counts()

        def write(file: BinaryIO) -> None:
            with self._path.open("rb") as rows:
                for place in sorted(self._rows):
                    start, length = self._rows[place]
                    rows.seek(start)
                    line = rows.read(length)
                    counts.add(json.loads(line))
                    file.write(line)

        write_atomic(path, write)
        return counts.figures()

    def remove(self) -> None:
        """Remove the file: the run is finished."""
        self._path.unlink()


class _Counts:
    """What the samples of a file are."""

    def __init__(self) -> None:
        self.groups = self.samples = self.tokens = self.empty = self.without_logprobs = 0
        self.finish_reasons = {"stop": 0, "length": 0}

    def add(self, row: dict[str, Any]) -> None:
        self.groups += 1
        self.samples += len(row["responses"])
        self.tokens += sum(map(len, row["response_ids"]))
        self.empty += sum(not text.strip() for text in row["responses"])
        for ending in row["finish_reasons"]:
            self.finish_reasons[ending] += 1
        if "logprobs" not in row:
            self.without_logprobs += len(row["responses"])

    def figures(self) -> dict[str, Any]:
        return {
            "groups": self.groups,
            "samples": self.samples,
            "tokens": self.tokens,
            "mean_tokens": round(self.tokens / self.samples, 3) if self.samples else None,
            "finish_reasons": self.finish_reasons,
            "empty_samples": self.empty,
            "unfinished_samples": self.finish_reasons["length"],
            "samples_without_logprobs": self.without_logprobs,
        }
