"""The world as the files of HelpSteer2: the three tables of the Hub, in their own columns."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.data.groups import Group, Message
from helpsteer2.errors import UserError
from helpsteer2.records import write_atomic
from helpsteer2.world.annotators import Verdict
from helpsteer2.world.source import WorldSource

SPLITS = ("train", "validation")

Judged = tuple[Group, Verdict]
Row = dict[str, Any]

_ROLE_MARKS = {"user": "User", "assistant": "Assistant"}
_DEGREES = {1: "slightly better", 2: "better", 3: "much better"}


def write_tables(source: WorldSource, folder: str | Path) -> list[Path]:
    """Write the splits of a world as HelpSteer2's files.

    Args:
        source: Two responses a prompt.
        folder: Where to; files of the same name are replaced.

    Returns:
        The files: ``train.jsonl.gz``, ``validation.jsonl.gz``, ``preference/preference.jsonl.gz``
        and ``disagreements/disagreements.jsonl.gz``. The last two hold both splits.

    Raises:
        UserError: If a group has not two responses, or a file cannot be written.

    Source: dataset card of nvidia/HelpSteer2.
    """
    if source.responses != 2:
        raise UserError(
            f"HelpSteer2's files hold pairs, and this world has {source.responses} responses a "
            "prompt: set data.responses=2"
        )
    folder = Path(folder).expanduser()
    judged = {split: list(source.judged(split)) for split in SPLITS}
    tables: dict[str, Iterable[Row]] = {
        f"{split}.jsonl.gz": (row for pair in judged[split] for row in _rated_rows(pair[0]))
        for split in SPLITS
    }
    tables["preference/preference.jsonl.gz"] = (
        _preference_row(split, *pair) for split in SPLITS for pair in judged[split]
    )
    tables["disagreements/disagreements.jsonl.gz"] = (
        row for split in SPLITS for pair in judged[split] for row in _annotated_rows(pair[0])
    )
    for name, rows in tables.items():
        _write_table(folder / name, rows)
    return [folder / name for name in tables]


def prompt_text(messages: Iterable[Message]) -> str:
    r"""A prompt as HelpSteer2 writes it: later turns behind ``\n<extra_id_1>Assistant\n`` or User.

    Args:
        messages: Chat messages, the first one from the user.

    Returns:
        The text of the prompt column.
    """
    first, *later = messages
    marked = (f"\n<extra_id_1>{_ROLE_MARKS[m['role']]}\n{m['content']}" for m in later)
    return first["content"] + "".join(marked)


def _rated_rows(group: Group) -> Iterator[Row]:
    """A row of the default table for each response; whole ratings as whole numbers."""
    assert group.attributes is not None
    for response, ratings in zip(group.responses, group.attributes, strict=True):
        plain = [int(r) if r is not None and r == int(r) else r for r in ratings]
        yield _row(group, response, plain)


def _annotated_rows(group: Group) -> Iterator[Row]:
    """The same with the list of all raters in place of each rating."""
    assert group.annotations is not None
    for response, given in zip(group.responses, group.annotations, strict=True):
        yield _row(group, response, [list(ratings) for ratings in given])


def _row(group: Group, response: str, ratings: Iterable[Any]) -> Row:
    named = dict(zip(HELPSTEER2_ATTRIBUTES, ratings, strict=True))
    return {"prompt": prompt_text(group.prompt), "response": response, **named}


def _preference_row(split: str, group: Group, verdict: Verdict) -> Row:
    """A row of the preference table; the texts of the annotators are made from their strengths."""
    strength = verdict.preference_strength
    assert strength is not None
    return {
        "split": split,
        "prompt": prompt_text(group.prompt),
        "response_1": group.responses[0],
        "response_2": group.responses[1],
        "preference_strength": strength,
        "preference_statement": _statement(strength),
        "preference_elaboration": None,
        "three_most_similar_preferences": [
            {"statement": _statement(one), "elaboration": None, "strength": one}
            for one in verdict.most_similar
        ],
        "all_preferences_unprocessed": [
            {"strength": one, "justification": _statement(one)} for one in verdict.preferences
        ],
    }


def _statement(strength: int) -> str | None:
    """What a strength means in words; None for no preference."""
    if strength == 0:
        return None
    better, worse = (1, 2) if strength < 0 else (2, 1)
    return f"Response {better} is {_DEGREES[abs(strength)]} than Response {worse}."


def _write_table(path: Path, rows: Iterable[Row]) -> None:
    def write(file: BinaryIO) -> None:
        # No name and no time in the header: the same rows give the same bytes.
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
            for row in rows:
                packed.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"))

    write_atomic(path, write)
