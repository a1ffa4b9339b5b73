"""``helpsteer2 data describe|validate PATH``: look at a data set before training on it."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer2.data.checks import SCHEMAS, detect_schema, schema_problems
from helpsteer2.data.description import DataStatistics, Moments
from helpsteer2.data.rows import SPLITS, Part, Row, find_files, local_path, read_part, split_of
from helpsteer2.data.sources.base import RowSource
from helpsteer2.data.sources.group_files import GroupFiles
from helpsteer2.data.sources.helpsteer import HelpSteer1, HelpSteer2
from helpsteer2.data.sources.hh_rlhf import HHRLHF
from helpsteer2.data.sources.open_assistant import OpenAssistant
from helpsteer2.errors import DataError, Problem

if TYPE_CHECKING:
    from rich.table import Table

SOURCES: dict[str, Callable[[str], RowSource]] = {
    "helpsteer2": HelpSteer2,
    "preference": lambda path: HelpSteer2(path, config="preference"),
    "disagreements": lambda path: HelpSteer2(path, config="disagreements"),
    "helpsteer": HelpSteer1,
    "open_assistant": OpenAssistant,
    "hh_rlhf": HHRLHF,
    "groups": GroupFiles,
}

_SEEN_TO_DETECT = 100
_TABLES = (*SPLITS, "preference", "disagreements")


def main(argv: list[str]) -> int:
    """Run ``data describe`` or ``data validate``.

    Args:
        argv: Arguments after ``helpsteer2 data``.

    Returns:
        0, or 1 if a row is bad (``validate``) or no group was found.

    Raises:
        UserError: If there is nothing to read at the path.
    """
    arguments = _parser().parse_args(argv)
    command = {"describe": describe, "validate": validate}[arguments.command]
    try:
        return command(arguments.path, arguments.schema, arguments.split)
    except BrokenPipeError:  # The reader of our output, say `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def validate(path: str, schema: str | None = None, split: str | None = None) -> int:
    """Print every bad row as ``file:line: field: message``, then one line that sums up.

    Args:
        path: A file, a folder, or a Hub id.
        schema: A key of ``SOURCES``; found out from the first rows if None.
        split: The split to read; every split there is if None.

    Returns:
        1 if there was any problem, else 0.
    """
    bad: set[tuple[str, int | None]] = set()
    rows = groups = problems = 0

    def show(problem: Problem) -> None:
        nonlocal problems
        problems += 1
        bad.add((problem.file, problem.line))
        print(problem)

    try:
        schema = schema or _detect(path)
    except DataError as error:
        for problem in error.problems:
            show(problem)
    else:
        for source, part, report in _passes(path, schema, split, show):
            with _progress(f"validating {part}") as step:
                counted = _Counted(source.rows(part, report), step)
                groups += sum(1 for _ in source.groups(counted, part, report))
                # A table that holds every split is read again for each.
                rows = max(rows, counted.count) if report is _silent else rows + counted.count
    lines = len([line for _, line in bad if line is not None])
    name = f" ({schema})" if schema else ""
    counts = {"row": rows, "group": groups, "bad row": lines, "problem": problems}
    print(f"{path}{name}: {', '.join(_counted(n, noun) for noun, n in counts.items())}")
    return 1 if problems else 0


def describe(path: str, schema: str | None = None, split: str | None = None) -> int:
    """Print a table of ratings, lengths and ties of each split.

    Args:
        path: A file, a folder, or a Hub id.
        schema: A key of ``SOURCES``; found out from the first rows if None.
        split: The split to read; every split there is if None.

    Returns:
        1 if no group was found, else 0.

    Raises:
        DataError: If the file is of no known schema.
    """
    from rich.console import Console

    schema = schema or _detect(path)
    problems = found = 0

    def count(problem: Problem) -> None:
        nonlocal problems
        problems += 1

    for source, part, report in _passes(path, schema, split, count):
        statistics = DataStatistics(source.attribute_names)
        with _progress(f"reading {part}") as step:
            rows = _Counted(source.rows(part, report), step)
            for group in source.groups(rows, part, report):
                statistics.add(group)
        found += statistics.groups
        Console().print(_table(statistics, f"{path}, {schema}, split {part}"))
    if problems:
        print(
            f"{_counted(problems, 'problem')} left out: `helpsteer2 data validate {path}` lists "
            f"{'it' if problems == 1 else 'them'}",
            file=sys.stderr,
        )
    return 0 if found else 1


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _table(statistics: DataStatistics, title: str) -> Table:
    """Statistics of one split as a table."""
    from rich.table import Table

    responses = f"{statistics.responses.mean():.2f} responses each"
    if statistics.fewest != statistics.most:
        responses += f" ({statistics.fewest} to {statistics.most})"
    caption = f"{statistics.groups:,} groups, {responses}" if statistics.groups else "no groups"
    if statistics.preference.pairs:
        share = statistics.preference.share()
        caption += f"; {statistics.preference.pairs:,} preferences, {share:.1%} ties"
    table = Table(title=title, caption=caption)
    for i, column in enumerate(("", "known", "mean", "std", "r with helpfulness", "ties")):
        table.add_column(column, justify="right" if i else "left")

    def add(name: str, moments: Moments, ties: float) -> None:
        cells = (moments.mean(), moments.std(), moments.pearson())
        numbers = ["–" if math.isnan(value) else f"{value:.4f}" for value in cells]
        table.add_row(name, f"{moments.n:,}", *numbers, "–" if math.isnan(ties) else f"{ties:.1%}")

    for name, moments in statistics.attributes.items():
        add(name, moments, statistics.ties[name].share())
    for name, moments in statistics.lengths.items():
        add(name, moments, math.nan)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="helpsteer2 data", description=main.__doc__)
    parser.description = "Look at a data set before training on it."
    commands = parser.add_subparsers(dest="command", required=True, metavar="describe|validate")
    for name, text in (
        ("describe", "a table of ratings, lengths and ties"),
        ("validate", "list every bad row; exit 1 if there is one"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", metavar="PATH", help="a file, a folder, or a Hub id")
        command.add_argument(
            "--schema", choices=sorted(SCHEMAS), help="default: found out from the first rows"
        )
        command.add_argument("--split", choices=SPLITS, help="default: every split there is")
    return parser


def _passes(
    path: str, schema: str, split: str | None, report: Callable[[Problem], None]
) -> Iterator[tuple[RowSource, str, Callable[[Problem], None]]]:
    """Source and split of every pass over the data, with whom to tell of its problems.

    The preference and disagreements tables hold every split at once: their problems are told once.
    """
    source = SOURCES[schema](path)
    shared = schema in ("preference", "disagreements")
    for i, part in enumerate([split] if split else _splits(source, shared)):
        yield source, part, _silent if shared and i else report


def _silent(problem: Problem) -> None:
    """Tell nobody."""


def _splits(source: RowSource, shared: bool) -> list[str]:
    """Splits that a source has; ``train`` if none is found, so that reading it says why."""
    local = local_path(source.path)
    if local is not None and local.is_file():
        return ["train", "validation"] if source.schema == "preference" else [split_of(local)]
    if local is None or shared:
        return ["train", "validation"]
    return [split for split in SPLITS if _has(local, Part(split, split))] or ["train"]


def _has(path: Path, part: Part) -> bool:
    """Whether a table is there, even if it is there twice."""
    try:
        return bool(find_files(path, part))
    except DataError as error:
        return "more than once" in str(error)


def _detect(path: str) -> str:
    """Schema of the first rows at a path.

    Raises:
        DataError: If they fit no schema; the problems name the columns and the closest schema.
    """
    local = local_path(path)
    stem = "train"
    if local is not None and local.is_dir():
        stem = next((name for name in _TABLES if _has(local, Part(name, name))), "train")
    elif local is not None:
        stem = split_of(local)
    rows = read_part(path, Part(stem, stem), _silent)
    readable = [row for row in itertools.islice(rows, _SEEN_TO_DETECT) if row.values is not None]
    if not readable:
        return "helpsteer2"  # Reading it tells what is wrong with every line.
    schema = detect_schema([row.values for row in readable if row.values is not None])
    if schema is None:
        raise DataError(schema_problems(readable, None))
    return schema


class _Counted:
    """Rows on their way, counted.

    Args:
        rows: The rows.
        step: Called after every row.
    """

    def __init__(self, rows: Iterable[Row], step: Callable[[], None]) -> None:
        self._rows = rows
        self._step = step
        self.count = 0

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            self.count += 1
            self._step()
            yield row


@contextmanager
def _progress(text: str) -> Iterator[Callable[[], None]]:
    """A row counter on standard error if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns: tuple[Any, ...] = (
        SpinnerColumn(),
        TextColumn("{task.description}: {task.completed:,.0f} rows"),
        TimeElapsedColumn(),
    )
    # Standard output is only drawn around the bar where both are the same terminal.
    with Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=False,
    ) as bar:
        task = bar.add_task(text, total=None)
        yield lambda: bar.advance(task)
