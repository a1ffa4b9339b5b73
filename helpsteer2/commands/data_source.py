"""Data named on the command line: a path, a Hub id, or a file of ``conf/data``."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpsteer2.config.command import ConfigCommand
from helpsteer2.data.checks import detect_schema, schema_problems
from helpsteer2.data.groups import GroupSource, Report, Unlabelled
from helpsteer2.data.rows import SPLITS, Part, find_files, local_path, read_part, split_of
from helpsteer2.data.sources.base import RowSource
from helpsteer2.data.sources.chat_files import ChatFiles
from helpsteer2.data.sources.each_answer import EachAnswer
from helpsteer2.data.sources.folds import PromptFolds
from helpsteer2.data.sources.group_files import GroupFiles
from helpsteer2.data.sources.helpsteer import HelpSteer1, HelpSteer2
from helpsteer2.data.sources.hh_rlhf import HHRLHF
from helpsteer2.data.sources.open_assistant import OpenAssistant
from helpsteer2.errors import DataError, Problem, UserError

SOURCES: dict[str, Callable[[str], RowSource]] = {
    "helpsteer2": HelpSteer2,
    "preference": lambda path: HelpSteer2(path, config="preference"),
    "disagreements": lambda path: HelpSteer2(path, config="disagreements"),
    "helpsteer": HelpSteer1,
    "open_assistant": OpenAssistant,
    "hh_rlhf": HHRLHF,
    "messages": lambda path: ChatFiles(path, "messages"),
    "conversations": lambda path: ChatFiles(path, "conversations"),
    "groups": GroupFiles,
}

_SEEN_TO_DETECT = 100
_TABLES = (*SPLITS, "preference", "disagreements")

_CONFIGURED = ConfigCommand(
    "data describe",
    "describe a data set",
    "helpsteer2.commands.data_source.configured",
    "describe",
)


def configured(data: GroupSource) -> GroupSource:
    """What ``conf/describe.yaml`` is for: its one key is the data."""
    return data


def open_source(
    text: str, schema: str | None = None, overrides: Sequence[str] = ()
) -> tuple[GroupSource, str]:
    """Find the data that a user names.

    Args:
        text: Name of a file in ``conf/data``; else a file, a folder, or a Hub id. A folder of the
            same name as a file in ``conf/data`` is written ``./name``.
        schema: A key of ``SOURCES`` for a path; found out from the first rows if None.
        overrides: Overrides such as ``data.seed=1``, for a name.

    Returns:
        The source, and its schema or class.

    Raises:
        DataError: If a file is of no known schema.
        UserError: If there is no such data, or the configuration is wrong.
    """
    if re.fullmatch(r"\w+", text):
        # Only here, because Hydra takes its time to import.
        from helpsteer2.config.compose import conf_dir

        names = sorted(file.stem for file in (conf_dir() / "data").glob("*.yaml"))
        if text in names:
            if schema is not None:
                raise UserError(f"--schema goes with a path; {text} is a name and has its own")
            source = _from_config(text, overrides)
            return source, type(source).__name__
        if not Path(text).exists():
            raise UserError(
                f"{text}: no such file or folder, and no such data: there are {', '.join(names)}"
            )
    if overrides:
        raise UserError(
            f"{' '.join(overrides)}: overrides go with a name of conf/data, such as world; "
            f"{text} is a path"
        )
    schema = schema or detect(text)
    return SOURCES[schema](text), schema


def _from_config(name: str, overrides: Sequence[str]) -> GroupSource:
    """Compose, validate and build a source of ``conf/data``."""
    from helpsteer2.commands.launch import build
    from helpsteer2.config.checked import check

    (job,) = check(_CONFIGURED, [f"data={name}", *overrides]).jobs
    return configured(**build({"data": job.given("data")}))


def passes(source: GroupSource, split: str | None, report: Report) -> Iterator[tuple[str, Report]]:
    """Split of every pass over the data, with whom to tell of its problems.

    Args:
        source: The data.
        split: The only split to read; every split there is if None.
        report: Told of every problem once.

    Yields:
        Splits. Some data are read as a whole for each: after the first, problems go to ``silent``.
    """
    rows = _behind(source)
    whole = isinstance(rows, PromptFolds) or _is_one_table(rows)
    for i, part in enumerate([split] if split else splits_of(source)):
        yield part, silent if whole and i else report


def silent(problem: Problem) -> None:
    """Tell nobody."""


def _behind(source: GroupSource) -> GroupSource:
    """The source whose splits these are; what changes single groups has none of its own."""
    while isinstance(source, EachAnswer | Unlabelled):
        source = source.of
    return source


def _is_one_table(source: GroupSource) -> bool:
    """Whether all splits lie in the same table."""
    return isinstance(source, RowSource) and source.schema in ("preference", "disagreements")


def splits_of(source: GroupSource) -> list[str]:
    """Splits of a source; ``train`` if none is found in a folder, so that reading it says why."""
    both, source = ["train", "validation"], _behind(source)
    if not isinstance(source, RowSource):
        return both
    local = local_path(source.path)
    if local is not None and local.is_file():
        return both if source.schema == "preference" else [split_of(local)]
    if local is None or _is_one_table(source):
        return both
    return [split for split in SPLITS if _has(local, Part(split, split))] or ["train"]


def _has(path: Path, part: Part) -> bool:
    """Whether a table is there, even if it is there twice."""
    try:
        return bool(find_files(path, part))
    except DataError as error:
        return "more than once" in str(error)


def detect(path: str) -> str:
    """Schema of the first rows at a path.

    Args:
        path: A file, a folder, or a Hub id.

    Returns:
        A key of ``SOURCES``.

    Raises:
        DataError: If they fit no schema; the problems name the columns and the closest schema.
    """
    local = local_path(path)
    stem = "train"
    if local is not None and local.is_dir():
        stem = next((name for name in _TABLES if _has(local, Part(name, name))), "train")
    elif local is not None:
        stem = split_of(local)
    rows = read_part(path, Part(stem, stem), silent)
    readable = [row for row in itertools.islice(rows, _SEEN_TO_DETECT) if row.values is not None]
    if not readable:
        return "helpsteer2"  # Reading it tells what is wrong with every line.
    schema = detect_schema([row.values for row in readable if row.values is not None])
    if schema is None:
        raise DataError(schema_problems(readable, None))
    return schema


@contextmanager
def progress(text: str, noun: str) -> Iterator[Callable[[], None]]:
    """A counter on standard error if that is a terminal.

    Args:
        text: What is done.
        noun: What is counted.

    Yields:
        What to call for each thing counted.
    """
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns: tuple[Any, ...] = (
        SpinnerColumn(),
        TextColumn("{task.description}: {task.completed:,.0f} " + noun),
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
