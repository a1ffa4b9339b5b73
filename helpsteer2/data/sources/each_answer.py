"""Every answer of a conversation as a group of its own, to be scored and labelled by itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from helpsteer2.data.groups import Group, GroupSource, Report, unmarked
from helpsteer2.data.rows import problem_at


@dataclass(frozen=True)
class EachAnswer:
    """The groups of another source, with the answers inside their prompts cut out.

    An answer that is marked ``train`` inside a prompt becomes a group with the messages before it
    as its prompt; in HelpSteer2 too every answer of a conversation is a sample. No mark is left,
    so each answer is still learned once. Earlier answers stand in a prompt without a label, as they
    do when a policy is asked.

    Args:
        of: Where the groups come from.
    """

    of: GroupSource

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the source's attributes."""
        return self.of.attribute_names

    def read(self, split: str, report: Report) -> Iterator[Group]:
        """Stream the groups of a split, those of the answers inside a prompt before its own.

        Args:
            split: ``train``, ``validation``, …
            report: Called with every problem: those of the source, and answers to no question.

        Yields:
            Groups whose prompts have no marks. Of answers cut out nothing is known but the text.
        """
        for group in self.of.read(split, report):
            for answer in each_answer(group):
                if answer.prompt and answer.prompt[-1]["role"] == "user":
                    yield answer
                else:
                    message = f"{answer.id!r}: an answer that is learned must follow a question"
                    report(problem_at(group.source, message))

    def prompts(self, split: str, report: Report) -> Iterator[Group]:
        """Stream the prompts of the source as they are."""
        return self.of.prompts(split, report)

    def fingerprint(self, split: str) -> str:
        """Hash of the source's content and of the cutting."""
        parts = json.dumps(["each answer", self.of.fingerprint(split)])
        return hashlib.sha256(parts.encode()).hexdigest()


def each_answer(group: Group) -> Iterator[Group]:
    """Cut a group at the marked answers of its prompt.

    Args:
        group: A prompt with n responses.

    Yields:
        A group for each of these answers, whose id ends in ``/turn`` and its number among all
        answers of the prompt; then the group itself. None has marks.
    """
    whole = unmarked(group)
    turn = 0
    for i, message in enumerate(group.prompt):
        turn += message["role"] == "assistant"
        if message.get("train"):
            identity, before = f"{group.id}/turn{turn}", whole.prompt[:i]
            yield Group(identity, group.source, before, responses=(message["content"],))
    yield whole
