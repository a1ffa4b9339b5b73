"""Files of preference benchmarks, local or on the Hub: rows, and pairs of chosen and rejected."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from helpsteer2.data.checks import PEEKED_ROWS, RowCheck
from helpsteer2.data.groups import Group, Message, Report
from helpsteer2.data.rows import SUFFIXES, Part, Row, find_files, local_path, read_file, read_part
from helpsteer2.errors import DataError, Problem, UserError
from helpsteer2.evaluation.comparisons import Comparison

MAX_CHARACTERS = 1_000_000

JSON_SUFFIXES = (".json", ".json.gz")
"""Files that hold one array of rows; some benchmarks are published so."""

_ROLES = ("system", "user", "assistant")
_COLUMNS = ("prompt", "chosen", "rejected")
_BLANK = re.compile(r"\s*")


def read_table(
    path: str, part: Part, columns: Sequence[str], problems: list[Problem], setting: str
) -> Iterator[Row]:
    """Stream the rows of one table, none if the first ones lack a column.

    Args:
        path: A JSONL, JSON (one array) or Parquet file, a folder that holds one, or a Hub id.
        part: The table wanted in a folder or on the Hub.
        columns: The columns that every row must have.
        problems: Gets whatever is wrong.
        setting: Config key of ``path``, for messages.

    Yields:
        Rows in order; one without values for each that could not be read.

    Raises:
        UserError: If the path does not exist, or the Hub cannot be asked.
    """
    try:
        rows = _rows(path, part, problems.append)
        peeked = list(itertools.islice(rows, PEEKED_ROWS))
        readable = [row for row in peeked if row.values is not None]
        found = sorted({name for row in readable for name in row.values or ()})
        missing = [name for name in columns if readable and name not in found]
        for name in missing:
            message = f"the column is missing; found {', '.join(found)}"
            problems.append(Problem(readable[0].file, None, name, message))
        if not missing:
            yield from itertools.chain(peeked, rows)
    except DataError:
        raise
    except UserError as error:
        # The reader of data sets names its own key.
        raise UserError(str(error).replace("data.path=", f"{setting}=")) from error


def holds(folder: Path, stem: str) -> bool:
    """Whether a folder has the table of a name, in any kind of file that is read."""
    if _json_file(folder, stem) is not None:
        return True
    try:
        find_files(folder, Part(stem, stem))
    except DataError:
        return False
    return True


def _rows(path: str, part: Part, report: Report) -> Iterator[Row]:
    """Rows of a single file, whatever its name, or of a table by its name."""
    local = local_path(path)
    if local is None:
        return read_part(path, part, report)
    array = _json_file(local, part.stem)
    if array is not None:
        return _read_array(array, report)
    return read_file(local, report) if local.is_file() else read_part(path, part, report)


def _json_file(path: Path, stem: str) -> Path | None:
    """The JSON array that a path stands for, None if it stands for another kind of file."""
    if path.is_file():
        return path if path.name.endswith(JSON_SUFFIXES) else None
    places = itertools.product((path, path / "data"), JSON_SUFFIXES)
    files = (folder / f"{stem}{suffix}" for folder, suffix in places)
    return next((file for file in files if file.is_file()), None)


def _read_array(file: Path, report: Report) -> Iterator[Row]:
    """Rows of a JSON array, each with the line that it begins on."""
    name = str(file)
    try:
        content = file.read_bytes()
        text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8-sig")
        for line, value in _items(text):
            if not isinstance(value, dict):
                message = f"expected an object with named columns, got {type(value).__name__}"
                report(Problem(name, line, None, message))
            yield Row(name, line, value if isinstance(value, dict) else None)
    except json.JSONDecodeError as error:
        message = f"not valid JSON from here on: {error.msg} at column {error.colno}"
        report(Problem(name, error.lineno, None, message))
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        report(Problem(name, None, None, f"cannot be read: {error}"))


def _items(text: str) -> Iterator[tuple[int, Any]]:
    """Items of a JSON array with their lines; raises at the first thing that is no JSON."""
    decoder, line, last = json.JSONDecoder(), 1, 0
    place = _after_blanks(text, 0)
    if not text.startswith("[", place):
        raise json.JSONDecodeError("expected an array of rows", text, place)
    place = _after_blanks(text, place + 1)
    if text.startswith("]", place):
        raise json.JSONDecodeError("the array is empty", text, place)
    while True:
        line, last = line + text.count("\n", last, place), place
        value, place = decoder.raw_decode(text, place)
        yield line, value
        place = _after_blanks(text, place)
        if text.startswith("]", place):
            return
        if not text.startswith(",", place):
            raise json.JSONDecodeError("expected a comma or the end of the array", text, place)
        place = _after_blanks(text, place + 1)


def _after_blanks(text: str, start: int) -> int:
    match = _BLANK.match(text, start)
    assert match is not None  # it matches nothing at all as well
    return match.end()


def load_pairs(
    path: str, split: str, subsets: Sequence[str] | None, setting: str
) -> tuple[Comparison, ...]:
    """Load pairs of a chosen and a rejected response.

    Args:
        path: A JSONL (plain or gzip) or Parquet file, a folder that holds one named after the
            split, or a Hub id. Columns: ``prompt`` (text or chat messages), ``chosen``,
            ``rejected``, ``subset``.
        split: The Hub's split, and the stem of the file in a folder.
        subsets: The subsets that may occur; None takes every pair as of one subset, ``split``, and
            needs no such column.
        setting: Config key of ``path``, for messages.

    Returns:
        The pairs, in order.

    Raises:
        DataError: If a row is bad; all bad rows are listed.
        UserError: If the path does not exist, or the Hub cannot be asked.
    """
    problems: list[Problem] = []
    columns, subset = ((*_COLUMNS, "subset"), None) if subsets is not None else (_COLUMNS, split)
    rows = read_table(path, Part(split, split), columns, problems, setting)
    return finished([_pair(row, subset, subsets or (), problems) for row in rows], problems)


def load_sets(path: str, subsets: Sequence[str], setting: str) -> tuple[Comparison, ...]:
    """Load pairs of which each subset is a split (Hub) or a file (local) of its own.

    Args:
        path: A folder with a file for each subset, named after it; one file with a ``subset``
            column; or a Hub id whose splits are the subsets.
        subsets: The subsets to load. Those that a local folder lacks are left out.
        setting: Config key of ``path``, for messages.

    Returns:
        The pairs, subset by subset.

    Raises:
        DataError: If a row is bad; all bad rows are listed.
        UserError: If the path does not exist, the folder has none of the files, or the Hub cannot
            be asked.
    """
    local = local_path(path)
    if local is not None and local.is_file():
        return load_pairs(path, "train", subsets, setting)
    found = [name for name in subsets if local is None or holds(local, name)]
    if not found:
        raise UserError(
            f"{setting}: {path} has none of the files {', '.join(subsets)} ({', '.join(SUFFIXES)})"
        )
    problems: list[Problem] = []
    pairs = [
        _pair(row, name, subsets, problems)
        for name in found
        for row in read_table(path, Part(name, name), _COLUMNS, problems, setting)
    ]
    return finished(pairs, problems)


def _pair(
    row: Row, subset: str | None, subsets: Sequence[str], problems: list[Problem]
) -> Comparison | None:
    """Check one row; ``subset`` None reads it from the column."""
    check = RowCheck(row, problems.append, MAX_CHARACTERS)
    if row.values is None:
        return None
    chosen, rejected = check.text("chosen"), check.text("rejected")
    prompt = _prompt(check, check.value("prompt"))
    if subset is None:
        subset = one_of(check, "subset", subsets)
    if not check.ok or chosen is None or rejected is None or subset is None:
        return None
    return comparison(row, subset, prompt, (chosen, rejected))


def one_of(check: RowCheck, column: str, known: Sequence[str]) -> str | None:
    """A text column that holds one of some names; None after a report."""
    value = check.text(column)
    if value is not None and value not in known:
        check.fail(column, f"unknown {column} {value!r}; known: {', '.join(known)}")
    return value


def comparison(
    row: Row,
    subset: str,
    prompt: str | tuple[Message, ...],
    responses: tuple[str, ...],
    better: int = 1,
) -> Comparison:
    """A comparison made of a checked row.

    Args:
        row: Where it was read.
        subset: Part of the benchmark.
        prompt: Chat messages, or the text of the only one.
        responses: The better responses, then the others.
        better: How many are better.
    """
    place = f"{row.file}:{row.line}"
    if isinstance(prompt, str):
        prompt = ({"role": "user", "content": prompt},)
    return Comparison(subset, Group(place, place, prompt, responses), better)


def _prompt(check: RowCheck, value: Any) -> tuple[Message, ...]:
    """Chat messages from a text or a list of messages; empty after a report."""
    if not isinstance(value, list):
        text = check.text_of("prompt", value) if "prompt" in (check.row.values or {}) else None
        return () if text is None else ({"role": "user", "content": text},)
    messages: list[Message] = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            check.fail(f"prompt[{i}]", "expected {role: system|user|assistant, content: text}")
            continue
        content = check.text_of(f"prompt[{i}].content", message.get("content"))
        messages.append({"role": message["role"], "content": content or ""})
    if not messages or messages[-1]["role"] != "user":
        check.fail("prompt", "the last message must be the user's")
    return tuple(messages)


def finished(
    comparisons: Sequence[Comparison | None], problems: list[Problem]
) -> tuple[Comparison, ...]:
    """The comparisons, if no row was bad.

    Raises:
        DataError: With every problem.
    """
    if problems:
        raise DataError(problems)
    return tuple(found for found in comparisons if found is not None)
