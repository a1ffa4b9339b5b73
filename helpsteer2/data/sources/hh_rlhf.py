"""HH-RLHF: chosen and rejected dialogues, read as a prompt with two responses."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from helpsteer2.data.checks import RowCheck
from helpsteer2.data.groups import Group, Message, Report, Role
from helpsteer2.data.rows import Part, Row, find_files, local_path
from helpsteer2.data.sources.base import MAX_CHARACTERS, RowSource, group_id, place
from helpsteer2.errors import DataError

_LOG = logging.getLogger(__name__)
_ANSWER = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def split_dialogues(chosen: str, rejected: str) -> tuple[tuple[Message, ...], str, str] | str:
    """Cut two dialogues into what they share and their last answers.

    Args:
        chosen: The dialogue that was preferred.
        rejected: The other one.

    Returns:
        The prompt's turns, the chosen and the rejected answer, all without outer white space; or,
        for dialogues that are no single prompt with two answers, the reason in words.
    """
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), None)  # noqa: B905
    cut = chosen[:shared].rfind(_ANSWER)
    if cut < 0:
        return "the dialogues differ before the first answer"
    tails = [text[cut + len(_ANSWER) :] for text in (chosen, rejected)]
    if any(_TURN.search(tail) for tail in tails):
        return "the dialogues differ before the last answer"
    answers = [tail.strip() for tail in tails]
    if not all(answers):
        return "an answer is empty"
    if answers[0] == answers[1]:
        return "the two answers are the same"
    pieces = _TURN.split(chosen[:cut])
    turns = tuple(
        Message(role=_ROLES[name], content=text.strip())
        for name, text in zip(pieces[1::2], pieces[2::2], strict=True)
    )
    if pieces[0].strip() or not turns or turns[-1]["role"] != "user" or not turns[-1]["content"]:
        return "the prompt does not begin with a marker or end in a turn of the user"
    return turns, answers[0], answers[1]


@dataclass(frozen=True)
class HHRLHF(RowSource):
    """Anthropic's helpful and harmless comparisons: which of two answers was chosen, no ratings.

    The published rows hold some that are no prompt with two different answers (the dialogues part
    ways earlier, an answer is empty). They are left out, and their number is logged.

    Args:
        path: Hub id, folder with ``train`` and ``test`` (or ``validation``) files, or a file.
        max_characters: Longest dialogue taken.

    Source: arXiv 2204.05862; dataset card of Anthropic/hh-rlhf.
    """

    path: str = "Anthropic/hh-rlhf"
    max_characters: int = MAX_CHARACTERS

    @property
    def schema(self) -> str:
        """Schema of the rows."""
        return "hh_rlhf"

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """None: nothing is rated."""
        return ()

    def parts(self, split: str) -> tuple[Part, ...]:
        """The published data call their second split ``test``; it serves as validation."""
        test = Part(stem="test", hub_split="test")
        if split != "validation":
            return super().parts(split)
        local = local_path(self.path)
        if local is None:
            return (test,)
        try:
            find_files(local, test)
        except DataError:
            return super().parts(split)
        return (test,)

    def groups(self, rows: Iterable[Row], split: str, report: Report) -> Iterator[Group]:
        """One group a row: the chosen answer first, so the preference is −1."""
        numbers = itertools.count()
        left_out: Counter[str] = Counter()
        for row in rows:
            check = RowCheck(row, report, self.max_characters)
            chosen, rejected = check.text("chosen"), check.text("rejected")
            for field, text in (("chosen", chosen), ("rejected", rejected)):
                if text is not None and _ANSWER not in text:
                    check.fail(field, r"the dialogue has no turn that begins with '\n\nAssistant:'")
            if chosen is None or rejected is None or not check.ok:
                continue
            cut = split_dialogues(chosen, rejected)
            if isinstance(cut, str):
                left_out[cut] += 1
                continue
            turns, better, worse = cut
            yield Group(
                id=group_id(split, next(numbers)),
                source=place(row),
                prompt=turns,
                responses=(better, worse),
                preference_strength=-1,
            )
        if left_out:
            reasons = "; ".join(f"{count} where {why}" for why, count in left_out.most_common())
            _LOG.warning(
                "%s, split %s: %d rows left out: %s", self.path, split, left_out.total(), reasons
            )
