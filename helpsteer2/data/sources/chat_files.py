"""Conversations in chat JSONL: with ``messages``, or with NeMo-Aligner's ``conversations``.

A line of the one and of the other::

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"system": "", "mask": "User",
     "conversations": [{"from": "User", "value": "…"}, {"from": "Assistant", "value": "…"}]}

Source: NVIDIA/NeMo-Aligner, docs/user-guide/sft.rst and examples/nlp/data/steerlm; NVIDIA/NeMo,
nemo/collections/nlp/data/language_modeling/megatron/gpt_sft_chat_dataset.py.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from helpsteer2.data.checks import RowCheck, shown
from helpsteer2.data.groups import Group, Message, Report, Role, unmarked
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.data.rows import Row, first_part, read_part
from helpsteer2.data.sources.base import MAX_CHARACTERS, RowSource, group_id, place
from helpsteer2.data.sources.each_answer import each_answer
from helpsteer2.errors import UserError

_LOG = logging.getLogger(__name__)

Form = Literal["messages", "conversations"]

_KEYS: dict[Form, tuple[str, str]] = {
    "messages": ("role", "content"),
    "conversations": ("from", "value"),
}
"""Where a message of each form has its role and its text."""

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",  # as ShareGPT calls them
    "assistant": "assistant",
    "gpt": "assistant",
}


class _Turn(Message, total=False):
    """A message, and of an answer its label where labels are read; no group has that key."""

    label: AttributeLabel | None


@dataclass(frozen=True)
class ChatFiles(RowSource):
    """A conversation a row: what it says last is the response, all before it the prompt.

    Earlier answers are marked for supervised fine-tuning, which so learns each answer of a
    conversation once. ``"weight": 0`` at a message of the assistant leaves it out, as in OpenAI's
    chat format. The response is the last answer that is learned; what follows it, such as a last
    question without an answer, is left out and counted, and so is an answer before any question.
    Sampling answers the last question, so for it a file may hold questions alone.

    In ``conversations`` the ``mask`` has to be the user, which is also its default. An answer may
    have a ``label`` there (``"helpfulness:4,verbosity:2"``). With ``labels`` every learned answer
    becomes a group of its own with its label. One that has none is learned without, as NeMo-Aligner
    does; unlike there, the earlier answers in a prompt stand without theirs, as they do when a
    policy is asked. The prompt to sample from has the label of the answer that the file gives to
    it. Without ``labels`` such rows are counted.

    Args:
        path: Folder with ``train`` and ``validation`` files, a single file, or a Hub id.
        form: Which of the two a file holds; None looks at its first row.
        max_characters: Longest message taken.
        labels: Whether the labels of answers are read.
    """

    path: str
    form: Form | None = None
    max_characters: int = MAX_CHARACTERS
    labels: bool = False

    @property
    def schema(self) -> str:
        """Schema of the rows, which is the name of the column that holds the messages."""
        return self._form

    @cached_property
    def _form(self) -> Form:
        """The form asked for, else that of the first row that can be read."""
        if self.form is not None:
            return self.form
        for row in read_part(self.path, first_part(self.path), lambda problem: None):
            if row.values is not None:
                return "messages" if row.values.get("conversations") is None else "conversations"
        return "messages"

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """None: nothing is rated."""
        return ()

    def groups(self, rows: Iterable[Row], split: str, report: Report) -> Iterator[Group]:
        """One group a row."""
        numbers = itertools.count()
        counts: Counter[str] = Counter()
        for check, messages in self._conversations(rows, report):
            kept = _learnable(messages, counts)
            if not kept:
                check.fail(self.schema, "has no message of the assistant to learn")
                continue
            group = Group(
                id=group_id(split, next(numbers)),
                source=place(check.row),
                prompt=tuple(kept[:-1]),
                responses=(kept[-1]["content"],),
            )
            if self.labels:
                yield from _labelled(group, kept, counts)
            else:
                counts["with labels"] += _is_labelled(check.row)
                yield group
        self._log(split, counts)

    def prompts(self, split: str, report: Report) -> Iterator[Group]:
        """Stream the conversations of a split up to their last question, answered or not."""
        numbers = itertools.count()
        counts: Counter[str] = Counter()
        for check, messages in self._conversations(self.rows(split, report), report):
            asked = _up_to_last(messages, lambda message: message["role"] == "user", counts)
            if not asked:
                check.fail(self.schema, "has no message of the user to answer")
                continue
            group = Group(
                id=group_id(split, next(numbers)),
                source=place(check.row),
                prompt=tuple(asked),
                responses=(),
            )
            if self.labels:
                # The last message is the question itself, or the answer to it.
                group = replace(unmarked(group), label=messages[-1].get("label"))
            yield group
        self._log(split, counts)

    def fingerprint(self, split: str) -> str:
        """Hash of everything that ``read`` depends on (see ``RowSource``)."""
        of_rows = super().fingerprint(split)
        if not self.labels:
            return of_rows
        return hashlib.sha256(f"labels {of_rows}".encode()).hexdigest()

    def _conversations(
        self, rows: Iterable[Row], report: Report
    ) -> Iterator[tuple[RowCheck, list[_Turn]]]:
        """The rows that are in order, with their messages."""
        if self.labels and self._form != "conversations":
            raise UserError(
                f"{self.path}: labels=true reads labels of `conversations`, and this file has "
                "`messages`, where there are none: labels=false, or data=groups with labels"
            )
        for row in rows:
            check = RowCheck(row, report, self.max_characters)
            messages = self._messages(check)
            _check_turns(check, self._form, messages)
            if check.ok:
                yield check, messages

    def _messages(self, check: RowCheck) -> list[_Turn]:
        """The messages of a row, learned answers marked; every mistake is reported."""
        other = "messages" if self._form == "conversations" else "conversations"
        values = check.row.values or {}
        if values.get(other) is not None:
            check.fail(other, f"a file has {self._form} or {other}, and this one has {self._form}")
        given = check.value(self._form)
        if not isinstance(given, list) and self._form in values:
            check.fail(self._form, f"expected a list of messages, got {shown(given)}")
        messages: list[_Turn] = []
        if self._form == "conversations":
            messages += _system(check)
            _check_mask(check)
        for i, item in enumerate(given if isinstance(given, list) else []):
            message = self._message(check, f"{self._form}[{i}]", item)
            messages += [message] if message is not None else []
        return messages

    def _message(self, check: RowCheck, field: str, item: Any) -> _Turn | None:
        """One message; None after a report."""
        if not isinstance(item, dict):
            check.fail(field, f"expected a message, got {shown(item)}")
            return None
        role_key, text_key = _KEYS[self._form]
        name = item.get(role_key)
        role = _ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            check.fail(f"{field}.{role_key}", f"expected user or assistant, got {shown(name)}")
        text = check.text_of(f"{field}.{text_key}", item.get(text_key))
        weight = item.get("weight", 1)
        if weight not in (0, 1, None):
            check.fail(f"{field}.weight", f"expected 0 or 1, got {shown(weight)}")
        if role is None or text is None:
            return None
        turn = _Turn(role=role, content=text)
        if role == "assistant" and weight != 0:
            turn["train"] = True
        if role == "assistant" and self.labels:
            turn["label"] = _label(check, f"{field}.label", item.get("label"))
        return turn

    def _log(self, split: str, counts: Counter[str]) -> None:
        """Say once what was left out of a split."""
        notes = {
            "trailing": "what follows the last learned answer was left out of %d conversations",
            "leading": "an answer before any question was left out of %d conversations",
            "with labels": "%d conversations have labels, which data.labels=true reads",
            "without label": "%d answers have no label and are learned without one",
        }
        for key, note in notes.items():
            if counts[key]:
                _LOG.warning("%s, split %s: " + note, self.path, split, counts[key])


def _label(check: RowCheck, field: str, given: Any) -> AttributeLabel | None:
    """The label of an answer; None if it has none, or after a report."""
    if given is None:
        return None
    if not isinstance(given, str):
        check.fail(field, f"expected a label such as 'helpfulness:4', got {shown(given)}")
        return None
    try:
        return AttributeLabel.parse(given)
    except UserError as error:
        check.fail(field, str(error))
        return None


def _labelled(group: Group, kept: Sequence[_Turn], counts: Counter[str]) -> Iterator[Group]:
    """A group for each learned answer of a conversation, with its label."""
    learned = [turn for turn in kept if turn.get("train")]
    for answer, turn in zip(each_answer(group), learned, strict=True):
        label = turn.get("label")
        counts["without label"] += label is None
        yield replace(answer, label=label)


def _system(check: RowCheck) -> list[_Turn]:
    """The column ``system``, which NeMo-Aligner leaves empty where there is none."""
    text = (check.row.values or {}).get("system")
    if text is None or (isinstance(text, str) and not text.strip()):
        return []
    content = check.text_of("system", text)
    return [] if content is None else [_Turn(role="system", content=content)]


def _check_mask(check: RowCheck) -> None:
    """Refuse rows that teach anything but the answers."""
    values = check.row.values or {}
    mask, kind = values.get("mask"), values.get("type")
    if mask is not None and _ROLES.get(str(mask).lower()) != "user":
        check.fail("mask", f"expected 'User', whose turns are not learned, got {shown(mask)}")
    if kind not in (None, "VALUE_TO_TEXT"):
        check.fail("type", f"expected VALUE_TO_TEXT, answers to learn, got {shown(kind)}")


def _check_turns(check: RowCheck, form: Form, messages: list[_Turn]) -> None:
    """Users and assistants take turns; a system message only comes first."""
    if not check.ok:
        return  # a message that could not be read is missing here
    extra = len(messages) - len((check.row.values or {})[form])  # the column ``system``
    for i, (before, message) in enumerate(itertools.pairwise(messages), start=1 - extra):
        field = f"{form}[{i}].{_KEYS[form][0]}"
        if message["role"] == "system":
            check.fail(field, "a system message has to be the first, and the only one")
        elif message["role"] == before["role"]:
            check.fail(field, f"two messages of the {message['role']} in a row")


def _learnable(messages: list[_Turn], counts: Counter[str]) -> list[_Turn]:
    """From the first question to the last learned answer; empty if there is none."""
    kept = _up_to_last(messages, lambda message: message.get("train", False), counts)
    counts["trailing"] += bool(kept) and kept[-1] is not messages[-1]
    return kept


def _up_to_last(
    messages: list[_Turn], ends: Callable[[_Turn], bool], counts: Counter[str]
) -> list[_Turn]:
    """From the first question to the last message that is an end; empty if there is none."""
    places = [i for i, message in enumerate(messages) if ends(message)]
    kept = messages[: places[-1] + 1] if places else []
    system = [message for message in kept if message["role"] == "system"]
    turns = kept[len(system) :]
    first = 1 if turns and turns[0]["role"] == "assistant" else 0
    if not turns[first:]:
        return []
    counts["leading"] += first
    return [*system, *turns[first:]]


def _is_labelled(row: Row) -> bool:
    """Whether an answer has a label of SteerLM."""
    turns = (row.values or {}).get("conversations") or []
    return any(turn.get("label") is not None for turn in turns)
