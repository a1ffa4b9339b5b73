"""The project's own files of groups: reading them, and writing them atomically.

A line of JSONL (or a row of Parquet with the same columns)::

    {"id": "train-0", "source": "train.jsonl:1",
     "prompt": [{"role": "user", "content": "…"}],
     "responses": ["…", "…"],
     "attributes": [{"helpfulness": 3, "verbosity": null}, {"helpfulness": 1}],
     "annotations": [{"helpfulness": [3, 4, 3]}, {"helpfulness": [1, 1, 2]}],
     "preference_strength": -2}

``id``, ``prompt`` and ``responses`` must be there; the rest may be left out or null.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast, get_args

from helpsteer2.data.checks import RowCheck, did_you_mean, shown
from helpsteer2.data.groups import Group, Message, Report, Role
from helpsteer2.data.rows import (
    SPLITS,
    SUFFIXES,
    Part,
    Row,
    find_files,
    local_path,
    read_part,
    split_of,
)
from helpsteer2.data.sources.base import MAX_CHARACTERS, RowSource, place
from helpsteer2.errors import DataError, UserError
from helpsteer2.records import write_atomic

_Cell = TypeVar("_Cell")
_WRITE_BATCH = 256


@dataclass(frozen=True)
class GroupFiles(RowSource):
    """Groups from files in the project's own schema.

    The names of the attributes are those of the first rated row; a later row may leave some out
    but may not bring new ones. To find an id that is there twice, a hash of 8 bytes an id is kept.

    Args:
        path: Folder with ``train`` and ``validation`` files, a single file, or a Hub id.
        max_characters: Longest message or response taken.
    """

    path: str
    max_characters: int = MAX_CHARACTERS

    @property
    def schema(self) -> str:
        """Schema of the rows."""
        return "groups"

    @cached_property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the attributes of the first rated row; none if no row is rated."""
        for row in read_part(self.path, self._first_part(), lambda problem: None):
            rated = (row.values or {}).get("attributes")
            if isinstance(rated, list) and rated and isinstance(rated[0], dict):
                return tuple(rated[0])
        return ()

    def _first_part(self) -> Part:
        """The table whose first rated row names the attributes."""
        local = local_path(self.path)
        if local is not None and local.is_file():
            return Part(split_of(local), split_of(local))
        for split in SPLITS:
            try:
                if local is None or find_files(local, Part(split, split)):
                    return Part(split, split)
            except DataError:
                continue
        return Part("train", "train")

    def groups(self, rows: Iterable[Row], split: str, report: Report) -> Iterator[Group]:
        """One group a row, refusing an id that was there before."""
        seen: set[int] = set()
        for row in rows:
            check = RowCheck(row, report, self.max_characters)
            if row.values is None:
                continue
            identity = check.text("id")
            if identity is not None:
                digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
                key = int.from_bytes(digest, "little")
                if key in seen:
                    check.fail("id", f"the id {identity[:80]!r} was there before")
                seen.add(key)
            group = self._group(check, identity or "")
            if check.ok:
                yield group

    def _group(self, check: RowCheck, identity: str) -> Group:
        values = check.row.values or {}
        responses = _list(check, "responses", check.value("responses"))
        if not responses:
            check.fail("responses", "expected at least one response")
        texts = [check.text_of(f"responses[{i}]", r) or "" for i, r in enumerate(responses)]
        attributes = self._matrix(check, "attributes", len(texts), check.rating_of, None)
        annotations = self._matrix(check, "annotations", len(texts), check.annotations_of, ())
        strength = values.get("preference_strength")
        if strength is not None:
            strength = check.whole_of("preference_strength", strength, -3, 3)
            if len(texts) != 2:
                check.fail("preference_strength", f"needs two responses, there are {len(texts)}")
        source = values.get("source")
        return Group(
            id=identity,
            source=source if isinstance(source, str) else place(check.row),
            prompt=_messages(check),
            responses=tuple(texts),
            attributes=attributes,
            annotations=annotations,
            preference_strength=strength,
        )

    def _matrix(
        self, check: RowCheck, column: str, n: int, take: Any, missing: _Cell
    ) -> tuple[tuple[_Cell, ...], ...] | None:
        """A column with an object a response, as rows in the order of ``attribute_names``."""
        given = (check.row.values or {}).get(column)
        if given is None:
            return None
        objects = _list(check, column, given)
        if len(objects) != n:
            check.fail(column, f"expected one object a response ({n}), got {len(objects)}")
        rows = []
        for i, item in enumerate(objects):
            cells = item if isinstance(item, dict) else {}
            if item is not None and not isinstance(item, dict):
                check.fail(f"{column}[{i}]", f"expected an object of attributes, got {shown(item)}")
            for name in cells.keys() - set(self.attribute_names):
                known = f"the first rated row has {', '.join(self.attribute_names)}"
                hint = did_you_mean(name, self.attribute_names)
                check.fail(f"{column}[{i}].{name}", f"unknown attribute{hint}; {known}")
            rows.append(
                tuple(
                    missing
                    if cells.get(name) is None
                    else take(f"{column}[{i}].{name}", cells[name])
                    for name in self.attribute_names
                )
            )
        return tuple(rows)


def _list(check: RowCheck, field: str, value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    if value is not None:
        check.fail(field, f"expected a list, got {shown(value)}")
    return []


def _messages(check: RowCheck) -> tuple[Message, ...]:
    """The prompt's messages; the last one must be the user's, a system message only the first."""
    messages: list[Message] = []
    for i, item in enumerate(_list(check, "prompt", check.value("prompt"))):
        content = item.get("content") if isinstance(item, dict) else None
        role = item.get("role") if isinstance(item, dict) else None
        if role not in get_args(Role) or (role == "system" and i > 0):
            check.fail(
                f"prompt[{i}].role",
                f"expected user or assistant (or system first), got {shown(role)}",
            )
        else:
            text = check.text_of(f"prompt[{i}].content", content)
            messages.append(Message(role=cast(Role, role), content=text or ""))
    if not messages:
        check.fail("prompt", "expected at least one message")
    elif messages[-1]["role"] != "user":
        check.fail(
            "prompt",
            f"must end in a turn of the user, it ends in one of the {messages[-1]['role']}",
        )
    return tuple(messages)


def write_groups(path: str | Path, groups: Iterable[Group], attribute_names: Sequence[str]) -> int:
    """Write groups as JSONL, gzip or Parquet; the file appears whole or not at all.

    Args:
        path: The file; its suffix (``.jsonl``, ``.jsonl.gz``, ``.parquet``) tells its kind.
        groups: The groups, streamed.
        attribute_names: Names of the A columns of every group's ratings.

    Returns:
        Number of groups written.

    Raises:
        UserError: If the suffix is unknown or the file cannot be written.
    """
    target = Path(path)
    if not target.name.endswith(SUFFIXES):
        raise UserError(f"{path}: unknown kind of file: expected one of {', '.join(SUFFIXES)}")
    names = tuple(attribute_names)
    count = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal count
        for count, group in enumerate(groups, start=1):  # noqa: B007
            yield _row(group, names)

    def write(file: BinaryIO) -> None:
        if target.name.endswith(".parquet"):
            _write_parquet(file, rows(), names)
        elif target.name.endswith(".gz"):
            # Without time and name the same groups give the same bytes.
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                _write_jsonl(packed, rows())
        else:
            _write_jsonl(file, rows())

    write_atomic(target, write)
    return count


def _row(group: Group, names: tuple[str, ...]) -> dict[str, Any]:
    """A group as a row of a file."""

    def objects(matrix: Sequence[Sequence[Any]] | None) -> list[dict[str, Any]] | None:
        if matrix is None:
            return None
        return [dict(zip(names, cells, strict=True)) for cells in matrix]

    return {
        "id": group.id,
        "source": group.source,
        "prompt": list(group.prompt),
        "responses": list(group.responses),
        "attributes": objects(group.attributes),
        "annotations": objects(group.annotations),
        "preference_strength": group.preference_strength,
    }


def _write_jsonl(file: BinaryIO | gzip.GzipFile, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def _write_parquet(file: BinaryIO, rows: Iterable[dict[str, Any]], names: tuple[str, ...]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: list[tuple[str, Any]] = [
        ("id", pa.string()),
        ("source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("responses", pa.list_(pa.string())),
        ("preference_strength", pa.int8()),
    ]
    if names:  # Parquet knows no object without fields.
        ratings = pa.list_(pa.struct([(name, pa.float64()) for name in names]))
        annotators = pa.list_(pa.struct([(name, pa.list_(pa.int8())) for name in names]))
        columns += [("attributes", ratings), ("annotations", annotators)]
    schema = pa.schema(columns)
    stream = iter(rows)
    with pq.ParquetWriter(file, schema) as writer:
        while batch := list(itertools.islice(stream, _WRITE_BATCH)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
