"""Rows of a data set, each with its file and line: JSONL, gzip, Parquet, folders, and the Hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from helpsteer2.data import hub
from helpsteer2.data.groups import Report
from helpsteer2.errors import DataError, Problem, UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
"""Kinds of files that are read."""

SPLITS = ("train", "validation", "test")

MAX_LINE_BYTES = 64 * 2**20
"""A longer line is reported and skipped in pieces, so one line never fills the memory."""

_PARQUET_BATCH = 64
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stands.

    Attributes:
        file: Path of the file, or the Hub id with its split.
        line: 1-based line; the row's number in Parquet and on the Hub.
        values: The columns; None if the row could not be read (and was reported). Such a row is
            still handed on because it keeps its place in a pair.
    """

    file: str
    line: int
    values: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Part:
    """One table of a data set, under its local and its Hub name.

    Attributes:
        stem: File name without suffix in a local folder.
        hub_split: Split on the Hub.
        hub_dir: Folder on the Hub that holds the table, None for the data set's own root.
    """

    stem: str
    hub_split: str
    hub_dir: str | None = None

    def wanted_files(self) -> str:
        """Names that a local folder may use for this table."""
        return " or ".join(f"{self.stem}{suffix}" for suffix in SUFFIXES)


def problem_at(place: str, message: str) -> Problem:
    """A problem of a group as a whole.

    Args:
        place: Where it was read, as ``Group.source`` has it: ``file:line``, or what stands for it
            where there is no file.
        message: What is wrong.
    """
    file, _, line = place.rpartition(":")
    if file and line.isdigit():
        return Problem(file, int(line), None, message)
    return Problem(place, None, None, message)


def local_path(path: str) -> Path | None:
    """Resolve a path given by a user.

    Args:
        path: A folder, a file, or a Hub id.

    Returns:
        The local folder or file, or None for a Hub id.

    Raises:
        UserError: If there is nothing there and the text cannot be a Hub id.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    if _HUB_ID.fullmatch(path) and not path.endswith((*SUFFIXES, ".json", ".gz")):
        return None
    raise UserError(
        f"{path}: no such file or folder (a Hub id looks like owner/name, a local path may be "
        f"absolute or relative to {Path.cwd()})"
    )


def split_of(file: Path) -> str:
    """Split that a single file holds: the one its name begins with, else ``train``."""
    match = re.match(rf"({'|'.join(SPLITS)})(?=[.\-_]|$)", file.name)
    return match.group(1) if match else "train"


def find_files(path: Path, part: Part) -> list[Path]:
    """Files of one table.

    A folder may hold the table itself, or have it in ``data/`` (Parquet from the Hub) or in a
    folder of the table's own name, as a clone of a Hub repository does.

    Args:
        path: An existing folder or file.
        part: The table wanted.

    Returns:
        One file, or the shards of one Parquet table in order.

    Raises:
        DataError: If the table is not there, or is there twice.
    """
    if path.is_file():
        if part.stem in SPLITS and split_of(path) != part.stem:
            message = (
                f"this single file holds the split {split_of(path)!r}, not {part.stem!r}: give a "
                f"folder that holds {part.wanted_files()}"
            )
            raise DataError([Problem(str(path), None, None, message)])
        return [path]
    for folder in (path, path / "data", path / part.stem):
        single = [folder / f"{part.stem}{suffix}" for suffix in SUFFIXES]
        tables = [[file] for file in single if file.is_file()]
        shards = sorted(folder.glob(f"{part.stem}-*-of-*.parquet"))
        tables += [shards] if shards else []
        if len(tables) > 1:
            names = ", ".join(table[0].name for table in tables)
            message = f"the same table is here more than once ({names}): keep one"
            raise DataError([Problem(str(folder), None, None, message)])
        if tables:
            return tables[0]
    held = sorted(entry.name for entry in path.iterdir())[:8]
    message = f"no {part.wanted_files()} in this folder; it holds {', '.join(held) or 'nothing'}"
    raise DataError([Problem(str(path), None, None, message)])


def first_part(path: str) -> Part:
    """The first table that a path holds, for what has to be known before a split is chosen.

    Args:
        path: A folder, a file, or a Hub id.

    Returns:
        The one table of a file, else the first of ``SPLITS`` that is there, else ``train``.

    Raises:
        UserError: If ``path`` does not exist.
    """
    local, train = local_path(path), Part("train", "train")
    if local is None:
        return train
    if local.is_file():
        return Part(split_of(local), split_of(local))
    for split in SPLITS:
        try:
            if find_files(local, Part(split, split)):
                return Part(split, split)
        except DataError:
            continue
    return train


def read_part(path: str, part: Part, report: Report) -> Iterator[Row]:
    """Stream the rows of one table in order.

    Args:
        path: A folder, a file, or a Hub id.
        part: The table wanted.
        report: Called with every problem found.

    Yields:
        Rows; memory does not grow with their number.

    Raises:
        UserError: If ``path`` does not exist, or the Hub cannot be reached and no copy is cached.
    """
    local = local_path(path)
    if local is None:
        yield from _read_hub(path, part, report)
        return
    try:
        files = find_files(local, part)
    except DataError as error:
        for problem in error.problems:
            report(problem)
        return
    for file in files:
        yield from read_file(file, report)


def digest_part(path: str, part: Part) -> str:
    """Hash of a table's content: the files' bytes, or the revision that the Hub resolved.

    Args:
        path: A folder, a file, or a Hub id.
        part: The table wanted.

    Returns:
        A hexadecimal digest.

    Raises:
        UserError: If the table cannot be found.
    """
    local = local_path(path)
    if local is None:
        return hub.fingerprint(path, part.hub_split, part.hub_dir, part.wanted_files())
    digest = hashlib.sha256()
    for file in find_files(local, part):
        file_digest = hashlib.sha256()
        with file.open("rb") as stream:
            while piece := stream.read(2**20):
                file_digest.update(piece)
        digest.update(file_digest.digest())
    return digest.hexdigest()


def read_file(file: Path, report: Report) -> Iterator[Row]:
    """Stream one JSONL (plain or gzip) or Parquet file.

    Args:
        file: The file; its name tells its kind.
        report: Called with every line that cannot be read.

    Yields:
        Rows, also one without values for each line that could not be read.

    Raises:
        UserError: If the name ends in none of ``SUFFIXES``.
    """
    if not file.name.endswith(SUFFIXES):
        raise UserError(f"{file}: unknown kind of file: expected one of {', '.join(SUFFIXES)}")
    empty = True

    def noting(problem: Problem) -> None:
        nonlocal empty
        empty = False
        report(problem)

    reader = _read_parquet if file.name.endswith(".parquet") else _read_jsonl
    for row in reader(file, noting):
        empty = False
        yield row
    if empty:
        report(Problem(str(file), None, None, "the file is empty"))


def _read_jsonl(file: Path, report: Report) -> Iterator[Row]:
    """Read line by line; a damaged stream ends the file with one problem."""
    name, number = str(file), 0
    try:
        with _open(file) as stream:
            while True:
                number += 1
                line = stream.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                if len(line) > MAX_LINE_BYTES:
                    _skip_line(stream, line)
                    limit = f"the line is longer than {MAX_LINE_BYTES:,} bytes"
                    report(Problem(name, number, None, limit))
                    yield Row(name, number, None)
                elif not line.isspace():
                    yield Row(name, number, _parse(line, name, number, report))
    except EOFError:
        report(Problem(name, number, None, "the gzip stream ends early: the file is truncated"))
    except (OSError, zlib.error) as error:
        report(Problem(name, number, None, f"cannot be read from here on: {error}"))


def _open(file: Path) -> IO[bytes]:
    """Open for bytes, through gzip if the name says so."""
    return gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def _skip_line(stream: IO[bytes], piece: bytes) -> None:
    """Read past the end of the current line in pieces."""
    while piece and not piece.endswith(b"\n"):
        piece = stream.readline(2**20)


def _parse(line: bytes, file: str, number: int, report: Report) -> dict[str, Any] | None:
    """One JSON object, or None after a report."""
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        values = json.loads(text)
    except UnicodeDecodeError as error:
        byte = line[error.start]
        message = f"not UTF-8: byte 0x{byte:02x} at position {error.start + 1} of the line"
    except json.JSONDecodeError as error:
        message = f"not valid JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        # Numbers of thousands of digits and absurdly deep nesting.
        message = f"not readable JSON: {error}"
    else:
        if isinstance(values, dict):
            return values
        message = f"expected a JSON object with named columns, got {type(values).__name__}"
    report(Problem(file, number, None, message))
    return None


def _read_parquet(file: Path, report: Report) -> Iterator[Row]:
    """Read batch by batch; a damaged file ends with one problem."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow") from error
    name, number = str(file), 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH):
                for i in range(batch.num_rows):
                    number += 1
                    try:
                        values = batch.slice(i, 1).to_pylist()[0]
                    except UnicodeDecodeError as error:
                        report(Problem(name, number, None, f"not UTF-8: {error.reason}"))
                        values = None
                    yield Row(name, number, values)
    except (pa.ArrowException, OSError) as error:
        line = number + 1 if number else None
        report(Problem(name, line, None, f"not a readable Parquet file: {error}"))


def _read_hub(path: str, part: Part, report: Report) -> Iterator[Row]:
    """Rows of a Hub data set, from its memory-mapped cache."""
    table = hub.load(path, part.hub_split, part.hub_dir, part.wanted_files())
    name = f"{path}[{part.hub_dir or part.hub_split}]"
    number = 0
    for number, values in enumerate(table, start=1):
        yield Row(name, number, values)
    if number == 0:
        report(Problem(name, None, None, "the table is empty"))
