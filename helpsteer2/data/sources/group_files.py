"""The project's own files of groups: reading them, and writing them atomically.

A line of JSONL (or a row of Parquet with the same columns)::

    {"id": "train-0", "source": "train.jsonl:1",
     "prompt": [{"role": "user", "content": "…"}],
     "responses": ["…", "…"],
     "attributes": [{"helpfulness": 3, "verbosity": null}, {"helpfulness": 1}],
     "annotations": [{"helpfulness": [3, 4, 3]}, {"helpfulness": [1, 1, 2]}],
     "preference_strength": -2,
     "response_ids": [[17, 4, 2], [17, 9, 9]], "tokenizer": "5d41…",
     "finish_reasons": ["stop", "length"],
     "logprobs": [[-0.1, -2.5, -0.3], [-0.1, -0.7, -1.2]],
     "scores": [{"helpfulness": 3.1, "verbosity": 1.9}, {"helpfulness": 0.2, "verbosity": 2.2}],
     "rewards": [3.1, 0.2],
     "label": {"helpfulness": 4, "verbosity": 2}}

``id``, ``prompt`` and ``responses`` must be there; the rest may be left out or null. A message of
the assistant inside the prompt may have ``"train": true``. ``Group`` says what the columns mean.
Prompts to sample from need no ``responses``.
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
from typing import Any, BinaryIO, TypeVar

from helpsteer2.data.checks import RowCheck, check_columns, did_you_mean, shown
from helpsteer2.data.groups import Group, Report
from helpsteer2.data.rows import SUFFIXES, Row, first_part, read_part
from helpsteer2.data.sources.base import MAX_CHARACTERS, RowSource, place
from helpsteer2.data.sources.group_rows import (
    group_row,
    is_sampled,
    items,
    label,
    messages,
    parquet_schema,
    sampled_columns,
)
from helpsteer2.errors import UserError
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
        for row in read_part(self.path, first_part(self.path), lambda problem: None):
            rated = (row.values or {}).get("attributes")
            if isinstance(rated, list) and rated and isinstance(rated[0], dict):
                return tuple(rated[0])
        return ()

    def groups(self, rows: Iterable[Row], split: str, report: Report) -> Iterator[Group]:
        """One group a row, refusing an id that was there before."""
        for check, identity in self._identified(rows, report):
            group = self._group(check, identity)
            if check.ok:
                yield group

    def prompts(self, split: str, report: Report) -> Iterator[Group]:
        """Stream the prompts of a split; of responses and their ratings nothing is read."""
        rows = read_part(self.path, self.parts(split)[0], report)
        rows = check_columns(rows, self.schema, report, unused=("responses",))
        for check, identity in self._identified(rows, report):
            group = Group(
                identity, _source(check), messages(check), responses=(), label=label(check)
            )
            if check.ok:
                yield group

    def _identified(self, rows: Iterable[Row], report: Report) -> Iterator[tuple[RowCheck, str]]:
        """Rows with their ids."""
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
            yield check, identity or ""

    def _group(self, check: RowCheck, identity: str) -> Group:
        values = check.row.values or {}
        responses = items(check, "responses", check.value("responses"))
        if not responses:
            check.fail("responses", "has no response: `helpsteer2 sample` makes some")
        may_be_empty = is_sampled(check)
        texts = [
            check.text_of(f"responses[{i}]", response, may_be_empty) or ""
            for i, response in enumerate(responses)
        ]
        attributes = self._matrix(check, "attributes", len(texts), check.rating_of, None)
        annotations = self._matrix(check, "annotations", len(texts), check.annotations_of, ())
        strength = values.get("preference_strength")
        if strength is not None:
            strength = check.whole_of("preference_strength", strength, -3, 3)
            if len(texts) != 2:
                check.fail("preference_strength", f"needs two responses, there are {len(texts)}")
        return Group(
            id=identity,
            source=_source(check),
            prompt=messages(check),
            responses=tuple(texts),
            attributes=attributes,
            annotations=annotations,
            preference_strength=strength,
            label=label(check),
            **sampled_columns(check, len(texts)),
        )

    def _matrix(
        self, check: RowCheck, column: str, n: int, take: Any, missing: _Cell
    ) -> tuple[tuple[_Cell, ...], ...] | None:
        """A column with an object a response, as rows in the order of ``attribute_names``."""
        given = (check.row.values or {}).get(column)
        if given is None:
            return None
        objects = items(check, column, given)
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


def _source(check: RowCheck) -> str:
    """Where a group comes from: what its row says, else the row itself."""
    source = (check.row.values or {}).get("source")
    return source if isinstance(source, str) else place(check.row)


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
            yield group_row(group, names)

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


def _write_jsonl(file: BinaryIO | gzip.GzipFile, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def _write_parquet(file: BinaryIO, rows: Iterable[dict[str, Any]], names: tuple[str, ...]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = iter(rows)
    batch = list(itertools.islice(stream, _WRITE_BATCH))
    scores = next((_score_names(row) for row in batch if "scores" in row), ())
    labels = next((tuple(row["label"]) for row in batch if "label" in row), ())
    schema = parquet_schema(names, scores, labels)
    with pq.ParquetWriter(file, schema) as writer:
        while batch:
            for row in batch:
                if "scores" in row and set(_score_names(row)) != set(scores):
                    raise UserError(
                        f"group {row['id']!r} has other scores ({', '.join(_score_names(row))}) "
                        f"than the groups before it ({', '.join(scores) or 'none'}): Parquet wants "
                        "the same for all, and known from the first "
                        f"{_WRITE_BATCH} groups; write JSONL instead"
                    )
                if "label" in row and tuple(row["label"]) != labels:
                    raise UserError(
                        f"group {row['id']!r} has a label of other attributes than the groups "
                        "before it: Parquet wants the same for all; write JSONL instead"
                    )
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            batch = list(itertools.islice(stream, _WRITE_BATCH))


def _score_names(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row["scores"][0])
