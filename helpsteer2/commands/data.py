"""``helpsteer2 data describe|validate``: look at a data set before training on it."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from helpsteer2.commands.data_source import (
    SOURCES,
    detect,
    open_source,
    passes,
    progress,
    silent,
)
from helpsteer2.data.checks import SCHEMAS
from helpsteer2.data.description import DataStatistics
from helpsteer2.data.groups import GroupSource, Report
from helpsteer2.data.overlap import GroupHashes, name_twins
from helpsteer2.data.rows import SPLITS, Row
from helpsteer2.data.sources.base import RowSource
from helpsteer2.errors import DataError, Problem, UserError

WIDTH = 100
"""Columns of the tables where the output is no terminal."""

EVERY_SPLIT = "all"
"""Name under which several splits are described together."""

DESCRIBE_HELP = """\
Print tables of ratings, lengths, ties, preferences and the agreement of raters, and write them with
figures to a folder: description.json, description.md and PNGs.

SOURCE is a file, a folder, a Hub id, or a name of conf/data with overrides of its keys:
  helpsteer2 data describe DIR
  helpsteer2 data describe DIR --schema disagreements
  helpsteer2 data describe world data.groups=500
  helpsteer2 data describe helpsteer2 data.config=disagreements
"""


def main(argv: list[str]) -> int:
    """Run ``data describe`` or ``data validate``.

    Args:
        argv: Arguments after ``helpsteer2 data``.

    Returns:
        0, or 1 if a row is bad (``validate``) or no group was found.

    Raises:
        UserError: If there is nothing to read under the name given, or nothing can be written.
    """
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    # Overrides may stand behind options, where argparse does not take them.
    if arguments.command == "validate" or any(text.startswith("-") for text in overrides):
        arguments = parser.parse_args(argv)
    try:
        if arguments.command == "validate":
            return validate(arguments.path, arguments.schema, arguments.split)
        overrides = [*arguments.overrides, *overrides]
        source, kind = open_source(arguments.source, arguments.schema, overrides)
        command = shlex.join(["helpsteer2", "data", *argv])
        about = {"data": arguments.source, "kind": kind, "command": command}
        return describe(source, about, _folder(arguments.out), arguments.split)
    except BrokenPipeError:  # The reader of our output, say `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def validate(path: str, schema: str | None = None, split: str | None = None) -> int:
    """Print every bad row as ``file:line: field: message``, then one line that sums up.

    Groups of other splits that stand in train are told too, as a warning if only the prompt does.

    Args:
        path: A file, a folder, or a Hub id.
        schema: A key of ``SOURCES``; found out from the first rows if None.
        split: The split to read; every split there is if None.

    Returns:
        1 if there was any problem, else 0.
    """
    bad: set[tuple[str, int | None]] = set()
    rows = problems = warnings = 0
    hashes: dict[str, GroupHashes] = {}

    def show(problem: Problem) -> None:
        nonlocal problems
        problems += 1
        bad.add((problem.file, problem.line))
        print(problem)

    try:
        schema = schema or detect(path)
    except DataError as error:
        for problem in error.problems:
            show(problem)
    else:
        source = SOURCES[schema](path)
        for part, report in passes(source, split, show):
            hashes[part] = GroupHashes()
            with progress(f"validating {part}", "rows") as step:
                counted = _Counted(source.rows(part, report), step)
                for group in source.groups(counted, part, report):
                    hashes[part].add_texts(group)
                # A table that holds every split is read again for each.
                rows = max(rows, counted.count) if report is silent else rows + counted.count
        warnings = _tell_of_twins(source, hashes, show)
    lines = len([line for _, line in bad if line is not None])
    name = f" ({schema})" if schema else ""
    groups = sum(map(len, hashes.values()))
    counts = {"row": rows, "group": groups, "bad row": lines, "problem": problems}
    counts |= {"warning": warnings} if warnings else {}
    print(f"{path}{name}: {', '.join(_count(n, noun) for noun, n in counts.items())}")
    return 1 if problems else 0


def _tell_of_twins(source: RowSource, hashes: Mapping[str, GroupHashes], report: Report) -> int:
    """Report groups of other splits that stand in train; print and count those by prompt alone."""
    if "train" not in hashes:
        return 0
    whole = "prompt and responses also stand in train"
    alone = "warning: the prompt also stands in train, with other responses"
    warnings = 0
    for split, held_out in hashes.items():
        if split == "train":
            continue
        found = held_out.found_in(hashes["train"])
        for problem in name_twins(source, split, found.whole, whole):
            report(problem)
        for warning in name_twins(source, split, found.prompt_alone, alone):
            print(warning)
        warnings += len(found.prompt_alone)
    return warnings


def describe(
    source: GroupSource, about: Mapping[str, str], folder: Path, split: str | None = None
) -> int:
    """Read every group once, write tables and figures, and print the tables.

    Args:
        source: The data.
        about: ``data``, ``kind`` and ``command``, kept in the description.
        folder: Where ``description.json``, ``description.md`` and figures go; made if need be.
        split: The split to read; every split there is, and all together, if None.

    Returns:
        1 if no group was found, and nothing is written then; else 0.

    Raises:
        UserError: If the data cannot be read or the folder cannot be written.
    """
    from rich.console import Console

    from helpsteer2.commands.data_report import CONVENTIONS, printed
    from helpsteer2.records import environment, plain

    statistics, problems = _read(source, split)
    whole = list(statistics.values())[-1]
    figures = {part: of_part.result() for part, of_part in statistics.items()}
    for part, of_part in statistics.items():
        if part != EVERY_SPLIT and of_part.groups:
            figures[part]["fingerprint"] = source.fingerprint(part)
    description = plain(
        {
            **about,
            "problems": problems,
            "conventions": CONVENTIONS,
            "splits": figures,
            "environment": environment(),
        }
    )
    # Before anything is printed: whoever reads our output may go away.
    if whole.groups:
        _write(folder, description, whole)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for sheet in printed(description):
        console.print(sheet.rich())
    if whole.groups:
        console.print(f"wrote {folder}", soft_wrap=True, markup=False, highlight=False)
    if problems:
        print(f"{_count(problems, 'problem')} left out{_who_lists(source)}", file=sys.stderr)
    return 0 if whole.groups else 1


def _who_lists(source: GroupSource) -> str:
    """The command that lists the problems of files, ready to be copied."""
    if not isinstance(source, RowSource):
        return ""
    arguments = shlex.join([source.path, "--schema", source.schema])
    return f": `helpsteer2 data validate {arguments}` lists them"


def _read(source: GroupSource, split: str | None) -> tuple[dict[str, DataStatistics], int]:
    """Statistics of each split, then of all of several together, and the number of problems."""
    problems = 0

    def count(problem: Problem) -> None:
        nonlocal problems
        problems += 1

    parts = list(passes(source, split, count))
    names = [part for part, _ in parts] + [EVERY_SPLIT] * (len(parts) > 1)
    statistics = {name: DataStatistics(source.attribute_names) for name in names}
    for part, report in parts:
        taking = [statistics[name] for name in names if name in (part, EVERY_SPLIT)]
        with progress(f"reading {part}", "groups") as step:
            for group in source.read(part, report):
                for one in taking:
                    one.add(group)
                step()
    return statistics, problems


def _write(folder: Path, description: Mapping[str, Any], whole: DataStatistics) -> None:
    """Write figures, Markdown and JSON, the record last."""
    from helpsteer2.commands.data_report import markdown, write_figures
    from helpsteer2.records import write_atomic, write_json_atomic

    split, figures = list(description["splits"].items())[-1]
    title = f"{description['data']}, {split}"
    images = write_figures(folder, title, figures, whole.columns())
    text = markdown(description, images).encode()

    def write(file: BinaryIO) -> None:
        file.write(text)

    write_atomic(folder / "description.md", write)
    write_json_atomic(folder / "description.json", description)


def _folder(out: str | None) -> Path:
    """The folder asked for, or one named after the time."""
    if out is None:
        return Path("outputs", "describe", datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} is a file, not a folder")
    return folder


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="helpsteer2 data")
    parser.description = "Look at a data set before training on it."
    commands = parser.add_subparsers(dest="command", required=True, metavar="describe|validate")
    describing = commands.add_parser(
        "describe",
        help="tables and figures of ratings, lengths, ties and the agreement of raters",
        description=DESCRIBE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    describing.add_argument("source", metavar="SOURCE", help="a path, a Hub id, or a name")
    describing.add_argument(
        "overrides", metavar="data.KEY=VALUE", nargs="*", help="of a name of conf/data"
    )
    describing.add_argument(
        "--out", metavar="DIR", help="where to write; default: outputs/describe/TIME"
    )
    text = "list every bad row, and held-out groups that stand in train; exit 1 if there is one"
    validating = commands.add_parser("validate", help=text, description=text)
    validating.add_argument("path", metavar="PATH", help="a file, a folder, or a Hub id")
    for command in (describing, validating):
        command.add_argument(
            "--schema", choices=sorted(SCHEMAS), help="of a path; default: from the first rows"
        )
        command.add_argument("--split", choices=SPLITS, help="default: every split there is")
    return parser


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
