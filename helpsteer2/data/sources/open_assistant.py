"""Open Assistant: message trees, read as prompts with the sibling answers to each."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from helpsteer2.data.checks import RowCheck, shown
from helpsteer2.data.groups import Group, Message, Report, Role
from helpsteer2.data.rows import Row
from helpsteer2.data.sources.base import MAX_CHARACTERS, RowSource, group_id, place

ATTRIBUTES = ("quality", "toxicity", "humor", "creativity", "helpfulness")
"""Labels kept, in the order of NeMo-Aligner (which takes the first four from this data set)."""

_SCALE = 4
"""Labels lie in 0 … 1 and are brought to the rating scale 0 … 4."""

_ROLES: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}


@dataclass(slots=True)
class _Node:
    """One message of a tree."""

    row: Row
    id: str
    parent: str | None
    message: Message | None
    ratings: tuple[float | None, ...]
    deleted: bool
    answers: list[_Node] = field(default_factory=list)


@dataclass(frozen=True)
class OpenAssistant(RowSource):
    """Open Assistant conversations (oasst1, oasst2) in the Hub's table of messages.

    Every prompter message with assistant replies is a group: the path from the root to it is the
    prompt, its replies are the responses. Labels are scaled by 4 and rounded half to even.
    The rows of a tree must follow each other, as they do on the Hub; messages marked as deleted
    are left out with everything below them. Only one tree is held in memory.

    With ``conversations`` a group is a whole conversation, for supervised fine-tuning: a path from
    the root to an answer after which there is no other, that answer is the response, and those
    before it are marked to be learned. As in NeMo-Aligner, an answer that several paths share is
    learned in each of them; without ``conversations`` each answer is learned once.

    Args:
        path: Hub id, folder with ``train`` and ``validation`` files, or a single file.
        max_characters: Longest message taken.
        conversations: Whether a group is a conversation, not a question with all its answers.

    Source: arXiv 2304.07327; scaling and paths as in NVIDIA/NeMo-Aligner,
    examples/nlp/data/steerlm/preprocess_openassistant_data.py.
    """

    path: str = "OpenAssistant/oasst1"
    max_characters: int = MAX_CHARACTERS
    conversations: bool = False

    @property
    def schema(self) -> str:
        """Schema of the rows."""
        return "open_assistant"

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Labels kept."""
        return ATTRIBUTES

    def groups(self, rows: Iterable[Row], split: str, report: Report) -> Iterator[Group]:
        """Gather the messages of one tree after the other."""
        numbers = itertools.count()
        for tree in self._trees(rows, report):
            for turns, answers in _answered(tree, self.conversations):
                yield Group(
                    id=group_id(split, next(numbers)),
                    source=place(answers[0].row),
                    prompt=turns,
                    responses=tuple(a.message["content"] for a in answers if a.message),
                    attributes=tuple(a.ratings for a in answers),
                )

    def fingerprint(self, split: str) -> str:
        """Hash of everything that ``read`` depends on (see ``RowSource``)."""
        of_rows = super().fingerprint(split)
        if not self.conversations:
            return of_rows
        return hashlib.sha256(f"conversations {of_rows}".encode()).hexdigest()

    def _trees(self, rows: Iterable[Row], report: Report) -> Iterator[dict[str, _Node]]:
        """Messages by id, one tree at a time, replies hung under what they reply to."""
        tree: dict[str, _Node] = {}
        key: object = None
        for row in rows:
            if row.values is None:
                continue
            check = RowCheck(row, report, self.max_characters)
            node = self._node(check)
            if node is None:
                continue
            root = node.id if node.parent is None else key
            new_key = row.values.get("message_tree_id") or root
            if new_key != key:
                yield _hang(tree, report, self.max_characters)
                tree, key = {}, new_key
            if node.id in tree:
                check.fail("message_id", f"the id {node.id!r} is there twice")
            else:
                tree[node.id] = node
        yield _hang(tree, report, self.max_characters)

    def _node(self, check: RowCheck) -> _Node | None:
        """Check one message; a bad one keeps its place so that its replies are not orphans."""
        assert check.row.values is not None
        identity, parent = check.text("message_id"), check.value("parent_id")
        if parent is not None:
            parent = check.text("parent_id")
        text, role = check.text("text"), check.value("role")
        if not isinstance(role, str) or role not in _ROLES:
            check.fail("role", f"expected 'prompter' or 'assistant', got {shown(role)}")
        ratings = _ratings(check, check.value("labels"))
        if identity is None:
            return None
        good = check.ok and text is not None
        message = Message(role=_ROLES[role], content=text or "") if good else None
        deleted = check.row.values.get("deleted") is True
        return _Node(check.row, identity, parent, message, ratings, deleted)


def _hang(tree: dict[str, _Node], report: Report, max_characters: int) -> dict[str, _Node]:
    """Hang answers under their prompts; an unknown parent or a wrong role is a problem."""
    for node in tree.values():
        check = RowCheck(node.row, report, max_characters)
        if node.parent is None:
            if node.message and node.message["role"] == "assistant":
                check.fail("role", "the first message of a tree must be the prompter's")
            continue
        parent = tree.get(node.parent)
        if parent is None:
            message = "is not among the messages of its tree, whose rows must follow each other"
            check.fail("parent_id", f"the message {node.parent!r} {message}")
        elif parent.message and node.message and parent.message["role"] == node.message["role"]:
            check.fail("role", "a message and its reply have the same role")
        elif node.message and node.message["role"] == "assistant":
            parent.answers.append(node)
    return tree


def _answered(
    tree: dict[str, _Node], conversations: bool
) -> Iterator[tuple[tuple[Message, ...], list[_Node]]]:
    """Prompts with their answers, or conversations: a prompt with an answer that is the last."""
    found = []
    for prompter, turns in _prompts(tree):
        answers = [node for node in prompter.answers if node.message and not node.deleted]
        if answers:
            found.append((prompter, turns, answers))
    if not conversations:
        yield from ((turns, answers) for _, turns, answers in found)
        return
    goes_on = {prompter.parent for prompter, *_ in found}
    for _, turns, answers in found:
        marked = tuple(_learned(message) for message in turns)
        yield from ((marked, [answer]) for answer in answers if answer.id not in goes_on)


def _learned(message: Message) -> Message:
    """The message, marked to be learned if it is an answer."""
    return {**message, "train": True} if message["role"] == "assistant" else message


def _prompts(tree: dict[str, _Node]) -> Iterator[tuple[_Node, tuple[Message, ...]]]:
    """Prompter messages that were answered, with the turns from the root to them."""
    for node in tree.values():
        if not node.answers:
            continue
        turns: list[Message] = []
        step: _Node | None = node
        # A path longer than the tree runs in a circle.
        while step is not None and step.message and not step.deleted and len(turns) < len(tree):
            turns.append(step.message)
            if step.parent is None:
                yield node, tuple(reversed(turns))
                break
            step = tree.get(step.parent)


def _ratings(check: RowCheck, labels: Any) -> tuple[float | None, ...]:
    """Labels on the scale 0–4, None where there is none.

    The Hub's table has lists of names and of values; the project's own files have an object a name.
    """
    values: dict[str, Any] = {}
    if isinstance(labels, Mapping) and isinstance(labels.get("name"), list):
        given = labels.get("value")
        if isinstance(given, list) and len(given) == len(labels["name"]):
            values = dict(zip(map(str, labels["name"]), given, strict=True))
        else:
            check.fail("labels", "expected as many values as names")
    elif isinstance(labels, Mapping):
        values = {k: v.get("value") for k, v in labels.items() if isinstance(v, Mapping)}
    elif isinstance(labels, list):
        pairs = [item for item in labels if isinstance(item, Mapping)]
        values = {str(item.get("name")): item.get("value") for item in pairs}
    elif labels is not None:
        check.fail("labels", f"expected names with their values, got {shown(labels)}")
    return tuple(_rating(check, name, values.get(name)) for name in ATTRIBUTES)


def _rating(check: RowCheck, name: str, value: Any) -> float | None:
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and 0 <= value <= 1:
        return float(round(value * _SCALE))
    check.fail(f"labels.{name}", f"expected a number from 0 to 1, got {shown(value)}")
    return None
