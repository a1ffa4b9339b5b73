"""What a prompt asks: to chat messages, and back from them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from helpsteer2.data.groups import Message
from helpsteer2.errors import UserError
from helpsteer2.world.lexicon import FACTS, MARKING, STYLES, VALUES, Facts

_OPENING = re.compile(r"Tell me (?P<asked>[^.]+) of (?P<entity>[^.]+)\.(?: (?P<style>.+))?")
_FOLLOW_UP = re.compile(r"And (?P<asked>[^?]+)\?(?: (?P<style>.+))?")


@dataclass(frozen=True)
class Request:
    """What one turn of the user asks for.

    Attributes:
        asked: Properties, in the order wanted.
        style: How long the answer shall be, a key of ``STYLES``.
        marked: Whether every claim of the answer shall be marked as right or wrong.
    """

    asked: tuple[str, ...]
    style: str = ""
    marked: bool = False

    @property
    def phrase(self) -> str:
        """The properties as the user lists them: ``pet, job and food``."""
        *first, last = self.asked
        return f"{', '.join(first)} and {last}" if first else last

    @property
    def wishes(self) -> str:
        """What follows the question, with a space in front of each."""
        wishes = (self.style, MARKING if self.marked else "")
        return "".join(f" {wish}" for wish in wishes if wish)


@dataclass(frozen=True)
class Task:
    """A prompt of the world.

    Attributes:
        entity: Whom it is about. Only the first turn says it, and no answer does: a response can
            only be judged beside its prompt.
        facts: Property to value: all that is true of the entity.
        requests: What each turn of the user asks; the last one is to be answered.
        answers: Text of the assistant's turns between them, one fewer.
    """

    entity: str
    facts: Mapping[str, str]
    requests: tuple[Request, ...]
    answers: tuple[str, ...] = ()

    @property
    def asked(self) -> tuple[str, ...]:
        """Properties that the answer shall tell, in order."""
        return self.requests[-1].asked

    @property
    def style(self) -> str:
        """How long the answer shall be."""
        return self.requests[-1].style

    @property
    def marked(self) -> bool:
        """Whether every claim of the answer shall be marked."""
        return self.requests[-1].marked

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt as chat messages; the last one is from the user."""
        first, *later = self.requests
        opening = f"Tell me {first.phrase} of {self.entity}.{first.wishes}"
        turns = [Message(role="user", content=opening)]
        for answer, request in zip(self.answers, later, strict=True):
            turns.append(Message(role="assistant", content=answer))
            turns.append(Message(role="user", content=f"And {request.phrase}?{request.wishes}"))
        return tuple(turns)


def parse_task(messages: Sequence[Message], facts: Facts = FACTS) -> Task:
    """Read a prompt back.

    Args:
        messages: Chat messages; the assistant's may hold any text.
        facts: What is true, and of whom.

    Returns:
        The task whose ``messages`` they are.

    Raises:
        UserError: If they are no prompt of the world; the message names the unknown entity,
            property or wish, or shows the text.
    """
    roles = [message["role"] for message in messages]
    expected = [("user", "assistant")[i % 2] for i in range(len(roles))]
    if len(roles) % 2 == 0 or roles != expected:
        raise UserError(
            "a prompt of the made-up world has turns of user, assistant, …, user, not "
            f"{', '.join(roles) or 'no turns at all'}"
        )
    texts = [message["content"] for message in messages]
    opening = _match(_OPENING, texts[0], "Tell me PROPERTY of NAME.")
    entity = opening["entity"]
    if entity not in facts:
        raise UserError(f"the made-up world knows nobody called {entity!r}")
    follow_ups = [_match(_FOLLOW_UP, text, "And PROPERTY?") for text in texts[2::2]]
    requests = tuple(map(_request, (opening, *follow_ups)))
    return Task(entity, facts[entity], requests, tuple(texts[1::2]))


def _match(form: re.Pattern[str], text: str, shown: str) -> re.Match[str]:
    match = form.fullmatch(text)
    if match is None:
        raise UserError(
            f"not a prompt of the made-up world: expected {shown!r}, got {text[:120]!r}"
        )
    return match


def _request(match: re.Match[str]) -> Request:
    asked: list[str] = []
    for topic in re.split(", | and ", match["asked"]):
        if topic not in VALUES:
            raise UserError(f"the made-up world has no property {topic!r} to ask for")
        if topic in asked:
            raise UserError(f"the prompt asks for the {topic} twice")
        asked.append(topic)
    wishes = match["style"] or ""
    style = wishes.removesuffix(MARKING).rstrip()
    if style not in STYLES:
        known = ", ".join(repr(wish) for wish in (*STYLES, MARKING) if wish)
        raise UserError(f"unknown wish {style!r}: the made-up world knows {known}")
    return Request(tuple(asked), style, wishes.endswith(MARKING))
