"""Checks of raw rows: columns, texts, ratings. A mistake becomes a ``Problem``, never a crash."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, RATING_MAX, RATING_MIN
from helpsteer2.data.groups import Report
from helpsteer2.data.rows import Row
from helpsteer2.errors import Problem

_RATED = ("prompt", "response", *HELPSTEER2_ATTRIBUTES)

SCHEMAS: dict[str, tuple[str, ...]] = {
    "helpsteer2": _RATED,
    "preference": ("split", "prompt", "response_1", "response_2", "preference_strength"),
    "disagreements": _RATED,
    "helpsteer": _RATED,
    "open_assistant": ("message_id", "parent_id", "text", "role", "labels"),
    "hh_rlhf": ("chosen", "rejected"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "groups": ("id", "prompt", "responses"),
}
"""Columns that every row of a schema must have."""

OPTIONAL_COLUMNS: dict[str, tuple[str, ...]] = {
    "groups": (
        *("source", "attributes", "annotations", "preference_strength", "response_ids"),
        *("tokenizer", "finish_reasons", "logprobs", "scores", "rewards", "label"),
    ),
}

SELECTED_BY = {
    "helpsteer2": "data=helpsteer2",
    "preference": "data=helpsteer2 data.config=preference",
    "disagreements": "data=helpsteer2 data.config=disagreements",
    "helpsteer": "data=helpsteer",
    "open_assistant": "data=open_assistant",
    "hh_rlhf": "data=hh_rlhf",
    "messages": "data=chat",
    "conversations": "data=chat",
    "groups": "data=groups",
}
"""What to write on the command line to read a schema."""

PEEKED_ROWS = 20
"""Rows that are looked at together to tell a wrong schema from one bad row."""


def detect_schema(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Name the schema of some rows.

    HelpSteer 1 and 2 have the same columns: there the number of consecutive rows with one prompt
    decides (two in HelpSteer2, mostly four in HelpSteer 1).

    Args:
        rows: The first readable rows of a file.

    Returns:
        A key of ``SCHEMAS``, or None if a column of every schema is missing.
    """
    columns = _columns(rows)
    one_look = ("groups", "preference", "open_assistant", "hh_rlhf", "messages", "conversations")
    for name in one_look:
        if columns.issuperset(SCHEMAS[name]):
            return name
    if not columns.issuperset(_RATED):
        return None
    if _has_lists(rows):
        return "disagreements"
    runs = [len(list(run)) for _, run in itertools.groupby(str(row.get("prompt")) for row in rows)]
    whole = runs[:-1] or runs  # The last run may go on after the rows seen.
    return "helpsteer2" if sum(run == 2 for run in whole) * 2 >= len(whole) else "helpsteer"


def check_columns(
    rows: Iterable[Row], schema: str, report: Report, unused: Collection[str] = ()
) -> Iterator[Row]:
    """Hand rows on, unless the first ones show that the whole file has another schema.

    Args:
        rows: Rows of one table.
        schema: The schema expected, a key of ``SCHEMAS``.
        report: Called once for each column that is missing from all the first rows.
        unused: Columns that may be missing.

    Yields:
        The rows, or none if the schema is wrong.
    """
    stream = iter(rows)
    peeked: list[Row] = []
    for row in stream:
        peeked.append(row)
        if len(peeked) == PEEKED_ROWS:
            break
    readable = [row for row in peeked if row.values is not None]
    problems = schema_problems(readable, schema, unused) if readable else []
    for problem in problems:
        report(problem)
    if not problems:
        yield from itertools.chain(peeked, stream)


def schema_problems(
    rows: Sequence[Row], schema: str | None, unused: Collection[str] = ()
) -> list[Problem]:
    """What keeps some rows from being of a schema.

    Args:
        rows: The first readable rows of a file.
        schema: The schema expected; None for any.
        unused: Columns that may be missing.

    Returns:
        One problem for each missing or misspelt column, or a single one if the file is in
        another schema; empty if the rows fit.
    """
    file = rows[0].file
    values = [row.values for row in rows if row.values is not None]
    columns = _columns(values)
    expected = schema or closest_schema(columns)
    missing = [name for name in SCHEMAS[expected] if name not in {*columns, *unused}]
    if not missing:
        return _misspelt_columns(file, columns, expected) + _wrong_content(file, values, expected)
    found = f"found {', '.join(sorted(columns))}"
    unknown = sorted(columns.difference(SCHEMAS[expected]))
    names = {name: did_you_mean(name, unknown) for name in missing}
    actual, closest = detect_schema(values), closest_schema(columns)
    if actual is not None:
        hint = f"the file is in another schema: read it with {SELECTED_BY[actual]}"
    elif schema is None or SCHEMAS[closest] != SCHEMAS[schema] or len(unknown) == len(columns):
        hint = f"unknown schema; closest is {closest} ({', '.join(SCHEMAS[closest])})"
    else:
        return [
            Problem(file, None, name, f"the column is missing{near}; {found}")
            for name, near in names.items()
        ]
    lacking = ", ".join(f"{name}{near}" for name, near in names.items())
    return [Problem(file, None, None, f"{hint}; missing {lacking}; {found}")]


def closest_schema(columns: Iterable[str]) -> str:
    """The schema that shares the largest part of its columns, a misspelt one counting half."""
    names = set(columns)

    def share(schema: str) -> float:
        required = SCHEMAS[schema]
        hits = [1.0 if c in names else 0.5 if did_you_mean(c, names) else 0.0 for c in required]
        return sum(hits) / len(required)

    return max(SCHEMAS, key=share)


def did_you_mean(wanted: str, found: Iterable[str]) -> str:
    """`` (is it 'x', misspelt?)`` if one of the names found is near, else nothing."""
    near = difflib.get_close_matches(wanted, list(found), n=1, cutoff=0.75)
    return f" (is it {near[0]!r}, misspelt?)" if near else ""


def _columns(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    return set().union(*(row.keys() for row in rows))


def _has_lists(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether most ratings are lists: a few may be mistakes of single rows."""
    ratings = [row.get(name) for row in rows for name in HELPSTEER2_ATTRIBUTES]
    lists = sum(isinstance(rating, list) for rating in ratings)
    return lists * 2 > sum(rating is not None for rating in ratings)


def _misspelt_columns(file: str, columns: set[str], schema: str) -> list[Problem]:
    """Optional columns that are absent while a near name is there: content would be lost."""
    known = {*SCHEMAS[schema], *OPTIONAL_COLUMNS.get(schema, ())}
    unknown = sorted(columns - known)
    problems = []
    for name in OPTIONAL_COLUMNS.get(schema, ()):
        if name not in columns and (hint := did_you_mean(name, unknown)):
            problems.append(Problem(file, None, name, f"the column is missing{hint}"))
    return problems


def _wrong_content(file: str, rows: Sequence[Mapping[str, Any]], schema: str) -> list[Problem]:
    """Tell apart schemas that share their columns: ratings or lists of them, prompt or none."""
    if schema in ("helpsteer2", "helpsteer") and _has_lists(rows):
        message = f"ratings are lists: read it with {SELECTED_BY['disagreements']}"
    elif schema == "disagreements" and not _has_lists(rows):
        message = f"ratings are no lists: read it with {SELECTED_BY['helpsteer2']}"
    elif schema == "hh_rlhf" and any("prompt" in row for row in rows):
        message = "unknown schema: HH-RLHF has no column 'prompt', its dialogues begin with it"
    else:
        return []
    return [Problem(file, None, None, message)]


class RowCheck:
    """Takes the columns of one row and reports every one that cannot be used.

    Args:
        row: The row; if it has no values nothing more is reported.
        report: Called with every problem.
        max_characters: Longest text allowed.

    Attributes:
        ok: False as soon as one problem was found.
    """

    def __init__(self, row: Row, report: Report, max_characters: int) -> None:
        self.row = row
        self.ok = row.values is not None
        self._values: Mapping[str, Any] = row.values or {}
        self._report = report
        self._max_characters = max_characters

    def fail(self, field: str | None, message: str) -> None:
        """Report one problem of this row."""
        self.ok = False
        if self.row.values is not None:
            self._report(Problem(self.row.file, self.row.line, field, message))

    def value(self, column: str) -> Any:
        """Content of a column that must be there; None after a report if it is not."""
        if column not in self._values:
            self.fail(column, f"the column is missing{did_you_mean(column, self._values)}")
        return self._values.get(column)

    def text(self, column: str) -> str | None:
        """A text column that must not be empty; None after a report."""
        if column not in self._values:
            self.value(column)
            return None
        return self.text_of(column, self._values[column])

    def text_of(self, field: str, value: Any, may_be_empty: bool = False) -> str | None:
        """A text; None after a report."""
        if not isinstance(value, str):
            self.fail(field, f"expected a text, got {shown(value)}")
        elif not may_be_empty and (not value or value.isspace()):
            self.fail(field, "the text is empty" + (" (only white space)" if value else ""))
        elif len(value) > self._max_characters:
            limit = f"more than max_characters={self._max_characters:,}"
            self.fail(field, f"the text has {len(value):,} characters, {limit}")
        elif not _is_unicode(value):
            self.fail(field, "the text holds half of a surrogate pair, which is no valid Unicode")
        else:
            return value
        return None

    def rating_of(self, field: str, value: Any) -> float | None:
        """A rating 0–4; None where unknown, or after a report."""
        if value is None:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and RATING_MIN <= value <= RATING_MAX:  # False for NaN.
            return float(value)
        self.fail(field, f"expected a number from 0 to 4 or null, got {shown(value)}")
        return None

    def annotations_of(self, field: str, value: Any) -> tuple[int, ...]:
        """Whole ratings 0–4, one an annotator; empty where unknown, or after a report."""
        if value is None:
            return ()
        if not isinstance(value, list):
            self.fail(field, f"expected a list of ratings, one an annotator, got {shown(value)}")
            return ()
        ratings: list[int] = []
        for i, item in enumerate(value):
            rating = self.whole_of(f"{field}[{i}]", item, int(RATING_MIN), int(RATING_MAX))
            if rating is not None:
                ratings.append(rating)
        return tuple(ratings)

    def whole_of(self, field: str, value: Any, low: int, high: int) -> int | None:
        """A whole number in a range (also written 3.0); None after a report."""
        whole = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and value in range(low, high + 1)
        )
        if not whole:
            self.fail(field, f"expected a whole number from {low} to {high}, got {shown(value)}")
            return None
        return int(value)


def shown(value: Any) -> str:
    """A value as a message shows it: short, and the text "3" unlike the number 3."""
    if isinstance(value, str):
        return f"the text {value[:40]!r}" + ("…" if len(value) > 40 else "")
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if value is None or isinstance(value, bool | int | float):
        return {"None": "null", "True": "true", "False": "false"}.get(
            text := repr(value)[:20], text
        )
    return type(value).__name__


def _is_unicode(text: str) -> bool:
    """JSON may escape half of a surrogate pair; such a text cannot be encoded later."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
