"""Sentences of an answer: how a claim is written, and what is read from any text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from helpsteer2.world.lexicon import (
    FILLERS,
    MARKS,
    NOUN_MEANINGS,
    NOUNS,
    PREFIXES,
    PROPERTY_OF,
    VERBS,
)

_SENTENCE = re.compile(r"[^.!?]*[.!?]|[^.!?]+$")
_CLAIM = re.compile(
    r"(?:(?P<prefix>[^,]+,) we|We) (?P<verb>\w+) (?P<noun>\w+) (?P<value>\w+)(?: (?P<mark>\w+))?\."
)
_PREFIXES = {form for forms in PREFIXES.values() for form in forms}


@dataclass(frozen=True)
class Claim:
    """A sentence that states a value of a property.

    Attributes:
        topic: What it is about, a key of ``VALUES``.
        value: The value stated, true or not; any value of the lexicon.
        noun_level: Wording of the property, 0 (plain) to 2 (learned).
        verb_level: Wording of the verb, 0 to 2.
        prefix: Words in front that say nothing, with their comma, or nothing.
        mark: Whether it is marked as true or as false; None without a mark.
    """

    topic: str
    value: str
    noun_level: int = 0
    verb_level: int = 0
    prefix: str = ""
    mark: bool | None = None

    @property
    def level(self) -> float:
        """Wording level, 0 to 2."""
        return (self.noun_level + self.verb_level) / 2

    @property
    def text(self) -> str:
        """The sentence."""
        start = f"{self.prefix} we" if self.prefix else "We"
        noun, verb = NOUNS[self.topic][self.noun_level], VERBS[self.verb_level]
        mark = "" if self.mark is None else f" {MARKS[self.mark]}"
        return f"{start} {verb} {noun} {self.value}{mark}."


@dataclass(frozen=True)
class Reading:
    """What a text says.

    Attributes:
        claims: Its claims, in order.
        fillers: Its sentences without a fact, in order.
        broken: Number of sentences that are neither, with an unfinished one.
        unfinished: Whether the text ends within a sentence.
        words: Number of words.
    """

    claims: tuple[Claim, ...]
    fillers: tuple[str, ...]
    broken: int
    unfinished: bool
    words: int

    @property
    def sentences(self) -> int:
        """Number of sentences."""
        return len(self.claims) + len(self.fillers) + self.broken


def read_text(text: str) -> Reading:
    """Split any text into sentences and read each.

    Args:
        text: Any text.

    Returns:
        What it says.
    """
    claims: list[Claim] = []
    fillers: list[str] = []
    broken, unfinished = 0, False
    for sentence in map(str.strip, _SENTENCE.findall(text.strip())):
        claim = _read_claim(sentence)
        if claim is not None:
            claims.append(claim)
        elif sentence in FILLERS:
            fillers.append(sentence)
        elif sentence:
            broken += 1
            unfinished = sentence[-1] not in ".!?"
    return Reading(tuple(claims), tuple(fillers), broken, unfinished, len(text.split()))


def _read_claim(sentence: str) -> Claim | None:
    """The claim that a sentence makes, None if it makes none."""
    match = _CLAIM.fullmatch(sentence)
    if match is None:
        return None
    prefix, noun, verb, value = match["prefix"] or "", match["noun"], match["verb"], match["value"]
    marks: dict[str | None, bool | None] = {None: None, **{word: m for m, word in MARKS.items()}}
    if not (
        noun in NOUN_MEANINGS
        and verb in VERBS
        and value in PROPERTY_OF
        and prefix in _PREFIXES
        and match["mark"] in marks
    ):
        return None
    topic, level = NOUN_MEANINGS[noun]
    return Claim(topic, value, level, VERBS.index(verb), prefix, marks[match["mark"]])
