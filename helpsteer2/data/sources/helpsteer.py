"""HelpSteer2 (default, preference, disagreements) and HelpSteer, from the Hub or from files."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.data.checks import RowCheck
from helpsteer2.data.groups import Group, Message, Report, Role
from helpsteer2.data.rows import Part, Row, local_path, read_part
from helpsteer2.data.sources.base import MAX_CHARACTERS, RowSource, group_id, place
from helpsteer2.errors import Problem

MAX_HELPSTEER1_RESPONSES = 4
"""HelpSteer has up to four responses a prompt."""

_TURN = re.compile(r"\n<extra_id_1>(User|Assistant)\n")
_ROLES: dict[str, Role] = {"User": "user", "Assistant": "assistant"}
_SPLIT_NAMES = {"train": "train", "validation": "validation", "val": "validation"}


def parse_turns(prompt: str) -> tuple[Message, ...]:
    r"""Split a prompt of the HelpSteer data sets into its turns.

    The first turn is the user's and has no marker; later ones are introduced by
    ``\n<extra_id_1>Assistant\n`` and ``\n<extra_id_1>User\n``.

    Args:
        prompt: The prompt column.

    Returns:
        The turns, their text unchanged.

    Source: dataset card of nvidia/HelpSteer2.
    """
    pieces = _TURN.split(prompt)
    roles: list[Role] = ["user", *(_ROLES[name] for name in pieces[1::2])]
    return tuple(
        Message(role=role, content=text) for role, text in zip(roles, pieces[::2], strict=True)
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    """One row of the default schema: a response with its ratings."""

    row: Row
    prompt: str | None
    turns: tuple[Message, ...]
    response: str
    ratings: tuple[float | None, ...]
    annotations: tuple[tuple[int, ...], ...] | None
    ok: bool


def _prompt(check: RowCheck) -> tuple[str | None, tuple[Message, ...]]:
    """The prompt as text (to compare) and as turns (to use)."""
    prompt = check.text("prompt")
    if prompt is None:
        return None, ()
    turns = parse_turns(prompt)
    if turns[-1]["role"] != "user":
        check.fail(
            "prompt", "the prompt must end in a turn of the user, it ends in one of the assistant"
        )
    elif not turns[-1]["content"].strip():
        check.fail("prompt", "the last turn of the user is empty")
    return prompt, turns


def _answer(row: Row, report: Report, max_characters: int, lists: bool) -> _Answer:
    """Check one row of the default schema.

    With ``lists`` a rating is a list, one number an annotator, and the label is their mean rounded
    half up: on rows known in both forms this agrees with the published label more often than
    rounding half to even.
    """
    check = RowCheck(row, report, max_characters)
    if row.values is None:
        return _Answer(row, None, (), "", (), None, ok=False)
    prompt, turns = _prompt(check)
    response = check.text("response")
    ratings: list[float | None] = []
    annotations = []
    for name in HELPSTEER2_ATTRIBUTES:
        value = check.value(name)
        if lists:
            given = check.annotations_of(name, value)
            annotations.append(given)
            ratings.append(float(math.floor(sum(given) / len(given) + 0.5)) if given else None)
        else:
            ratings.append(check.rating_of(name, value))
    kept = tuple(annotations) if lists else None
    return _Answer(row, prompt, turns, response or "", tuple(ratings), kept, check.ok)


def _group(answers: list[_Answer], number: int, split: str) -> Group:
    annotations = tuple(a.annotations for a in answers if a.annotations is not None)
    return Group(
        id=group_id(split, number),
        source=place(answers[0].row),
        prompt=answers[0].turns,
        responses=tuple(a.response for a in answers),
        attributes=tuple(a.ratings for a in answers),
        annotations=annotations or None,
    )


def _pairs(answers: Iterable[_Answer], report: Report) -> Iterator[tuple[_Answer, _Answer]]:
    """Pair consecutive rows that share a prompt.

    A row whose partner is missing is reported alone and pairing goes on with the next one, so a
    lost line costs one message and not one for every pair after it.
    """
    first: _Answer | None = None
    for second in answers:
        if first is None:
            first = second
        elif first.prompt is None or second.prompt is None or first.prompt == second.prompt:
            if first.ok and second.ok:
                yield first, second
            first = None
        else:
            _report_alone(first.row, "the next row has another prompt", report)
            first = second
    if first is not None:
        _report_alone(first.row, "the file ends here (an odd number of rows)", report)


def _report_alone(row: Row, why: str, report: Report) -> None:
    if row.values is not None:
        message = f"no partner: two consecutive rows are a pair and share their prompt, but {why}"
        report(Problem(row.file, row.line, "prompt", message))


@dataclass(frozen=True)
class HelpSteer2(RowSource):
    """HelpSteer2: two rated responses a prompt, or their preference.

    Args:
        path: Hub id, folder with ``train`` and ``validation`` (and ``preference`` or
            ``disagreements``) as ``.jsonl``, ``.jsonl.gz`` or ``.parquet``, or a single file.
        config: ``default``: rated pairs. ``preference``: a strength −3 … 3 a pair, zeros kept; the
            one table holds both splits, told apart by its ``split`` column. ``disagreements``: the
            ratings of the single annotators; the table has no splits, so pairs whose prompt is in
            the validation split belong there. Read from a single file it is all ``train``.
        max_characters: Longest prompt or response taken.

    Source: arXiv 2406.08673 and 2410.01257; dataset card of nvidia/HelpSteer2.
    """

    path: str = "nvidia/HelpSteer2"
    config: Literal["default", "preference", "disagreements"] = "default"
    max_characters: int = MAX_CHARACTERS

    @property
    def schema(self) -> str:
        """Schema of the rows."""
        return "helpsteer2" if self.config == "default" else self.config

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """The five attributes; none in the preference table."""
        return () if self.config == "preference" else HELPSTEER2_ATTRIBUTES

    def parts(self, split: str) -> tuple[Part, ...]:
        """The split's own table, or the one table of the configuration."""
        if self.config == "default":
            return super().parts(split)
        table = Part(stem=self.config, hub_split="train", hub_dir=self.config)
        if self.config == "preference" or self._single_file:
            return (table,)
        return (table, *super().parts("validation"))

    def groups(self, rows: Iterable[Row], split: str, report: Report) -> Iterator[Group]:
        """Pair the rows, or read a pair from each row of the preference table."""
        if self.config == "preference":
            yield from self._preferences(rows, split, report)
            return
        lists = self.config == "disagreements"
        belongs = self._belongs(split, report) if lists else None
        answers = (_answer(row, report, self.max_characters, lists) for row in rows)
        numbers = itertools.count()
        for pair in _pairs(answers, report):
            if belongs is None or belongs(pair[0].prompt or ""):
                yield _group(list(pair), next(numbers), split)

    @property
    def _single_file(self) -> bool:
        local = local_path(self.path)
        return local is not None and local.is_file()

    def _belongs(self, split: str, report: Report) -> Callable[[str], bool]:
        """Which prompts of the disagreements table are in a split: it says so nowhere itself."""
        if self._single_file:
            if split != "train":
                message = (
                    f"a single file of disagreements is all 'train': give a folder for {split!r}"
                )
                report(Problem(self.path, None, None, message))
            return lambda prompt: split == "train"
        held_out: set[bytes] = set()
        for row in read_part(self.path, self.parts(split)[1], report):
            if row.values is not None and isinstance(prompt := row.values.get("prompt"), str):
                held_out.add(_digest(prompt))
        return lambda prompt: (_digest(prompt) in held_out) == (split == "validation")

    def _preferences(self, rows: Iterable[Row], split: str, report: Report) -> Iterator[Group]:
        numbers = itertools.count()
        for row in rows:
            check = RowCheck(row, report, self.max_characters)
            if row.values is None:
                continue
            _, turns = _prompt(check)
            responses = (check.text("response_1") or "", check.text("response_2") or "")
            strength = check.whole_of(
                "preference_strength", check.value("preference_strength"), -3, 3
            )
            named = check.value("split")
            if not isinstance(named, str) or named not in _SPLIT_NAMES:
                check.fail("split", f"expected 'train' or 'validation', got {named!r}"[:120])
            elif check.ok and _SPLIT_NAMES[named] == split:
                yield Group(
                    id=group_id(split, next(numbers)),
                    source=place(row),
                    prompt=turns,
                    responses=responses,
                    preference_strength=strength,
                )


@dataclass(frozen=True)
class HelpSteer1(RowSource):
    """HelpSteer: up to four rated responses a prompt, in consecutive rows.

    Args:
        path: Hub id, folder with ``train`` and ``validation`` files, or a single file.
        max_characters: Longest prompt or response taken.

    Source: arXiv 2311.09528; dataset card of nvidia/HelpSteer.
    """

    path: str = "nvidia/HelpSteer"
    max_characters: int = MAX_CHARACTERS

    @property
    def schema(self) -> str:
        """Schema of the rows."""
        return "helpsteer"

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """The five attributes."""
        return HELPSTEER2_ATTRIBUTES

    def groups(self, rows: Iterable[Row], split: str, report: Report) -> Iterator[Group]:
        """Gather consecutive rows that share a prompt, four at most."""
        numbers = itertools.count()
        members: list[_Answer] = []
        for row in rows:
            answer = _answer(row, report, self.max_characters, lists=False)
            if not answer.ok:
                continue
            full = len(members) == MAX_HELPSTEER1_RESPONSES
            if members and (full or answer.prompt != members[0].prompt):
                yield _group(members, next(numbers), split)
                members = []
            members.append(answer)
        if members:
            yield _group(members, next(numbers), split)


def _digest(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=16).digest()
