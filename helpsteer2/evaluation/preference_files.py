"""Pairs of a chosen and a rejected response, from local files or the Hub."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpsteer2.data.checks import PEEKED_ROWS, RowCheck
from helpsteer2.data.groups import Group, Message
from helpsteer2.data.rows import SUFFIXES, Part, Row, find_files, local_path, read_part
from helpsteer2.errors import DataError, Problem, UserError

MAX_CHARACTERS = 1_000_000
_ROLES = ("system", "user", "assistant")
_COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt with a better and a worse response.

    Attributes:
        subset: Part of the benchmark it belongs to.
        group: The prompt with two responses, the chosen one first.
    """

    subset: str
    group: Group

    @property
    def prompt_key(self) -> str:
        """Equal for pairs of one subset with one prompt."""
        return json.dumps([self.subset, self.group.prompt], ensure_ascii=False)


def fingerprint(pairs: Iterable[PreferencePair]) -> str:
    """Hash of all texts, in order."""
    hashed = hashlib.sha256()
    for pair in pairs:
        hashed.update(repr((pair.group.prompt, pair.group.responses)).encode())
    return hashed.hexdigest()


def load_pairs(
    path: str, split: str, subsets: Sequence[str], setting: str
) -> tuple[PreferencePair, ...]:
    """Load pairs that carry their subset in a column.

    Args:
        path: A JSONL (plain or gzip) or Parquet file, a folder that holds one named after the
            split, or a Hub id. Columns: ``prompt`` (text or chat messages), ``chosen``,
            ``rejected``, ``subset``.
        split: The Hub's split, and the stem of the file in a folder.
        subsets: The subsets that may occur.
        setting: Config key of ``path``, for messages.

    Returns:
        The pairs, in order.

    Raises:
        DataError: If a row is bad; all bad rows are listed.
        UserError: If the path does not exist, or the Hub cannot be asked.
    """
    problems: list[Problem] = []
    rows = _read(path, Part(split, split), (*_COLUMNS, "subset"), problems, setting)
    return _finish([_pair(row, None, subsets, problems) for row in rows], problems)


def load_sets(path: str, subsets: Sequence[str], setting: str) -> tuple[PreferencePair, ...]:
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
    found = [name for name in subsets if local is None or _has(local, name)]
    if not found:
        raise UserError(
            f"{setting}: {path} has none of the files {', '.join(subsets)} ({', '.join(SUFFIXES)})"
        )
    problems: list[Problem] = []
    pairs = [
        _pair(row, name, subsets, problems)
        for name in found
        for row in _read(path, Part(name, name), _COLUMNS, problems, setting)
    ]
    return _finish(pairs, problems)


def _read(
    path: str, part: Part, columns: Sequence[str], problems: list[Problem], setting: str
) -> Iterator[Row]:
    """Rows of one table, none if the first ones lack a column; messages name our own config key."""
    try:
        rows = read_part(path, part, problems.append)
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
        raise UserError(str(error).replace("data.path=", f"{setting}=")) from error


def _has(folder: Path, stem: str) -> bool:
    try:
        find_files(folder, Part(stem, stem))
    except DataError:
        return False
    return True


def _pair(
    row: Row, subset: str | None, subsets: Sequence[str], problems: list[Problem]
) -> PreferencePair | None:
    """Check one row; ``subset`` None reads it from the column."""
    check = RowCheck(row, problems.append, MAX_CHARACTERS)
    if row.values is None:
        return None
    chosen, rejected = check.text("chosen"), check.text("rejected")
    prompt = _prompt(check, check.value("prompt"))
    if subset is None:
        subset = check.text("subset")
        if subset is not None and subset not in subsets:
            check.fail("subset", f"unknown subset {subset!r}; known: {', '.join(subsets)}")
    if not check.ok or chosen is None or rejected is None or subset is None:
        return None
    place = f"{row.file}:{row.line}"
    return PreferencePair(subset, Group(place, place, prompt, (chosen, rejected)))


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


def _finish(
    pairs: Sequence[PreferencePair | None], problems: list[Problem]
) -> tuple[PreferencePair, ...]:
    if problems:
        raise DataError(problems)
    return tuple(pair for pair in pairs if pair is not None)
