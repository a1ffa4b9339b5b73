"""The words of the world: who there is, what is true of them, and in which ways it can be said.

Words are short and few: a byte-level vocabulary of 1,024 tokens has one token for nearly each.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

NAMES = tuple("Ada Ben Cleo Dan Eve Finn Ida Leo".split())
"""The entities."""

VALUES = {
    "job": "baker cook judge nurse".split(),
    "food": "bread figs rice soup".split(),
    "home": "Cairo Lima Oslo Perth".split(),
    "pet": "bird cat dog goat".split(),
    "drink": "cider juice milk tea".split(),
    "colour": "black blue green red".split(),
}
"""The values of every property; none stands under two properties."""

Facts = Mapping[str, Mapping[str, str]]
"""Entity to property to value."""


def _facts() -> dict[str, dict[str, str]]:
    """Give every value to as many entities as any other: a value alone is never likelier true."""
    facts: dict[str, dict[str, str]] = {name: {} for name in NAMES}
    for topic, values in VALUES.items():
        dealt = list(values) * (len(NAMES) // len(values))
        random.Random(f"facts/{topic}").shuffle(dealt)
        for name, value in zip(NAMES, dealt, strict=True):
            facts[name][topic] = value
    return facts


FACTS: Facts = _facts()
"""What is true in this world. No prompt tells it: a model learns it from many answers."""

NOUNS = {
    "job": ("job", "work", "vocation"),
    "food": ("food", "meal", "cuisine"),
    "home": ("home", "town", "domicile"),
    "pet": ("pet", "animal", "companion"),
    "drink": ("drink", "cup", "beverage"),
    "colour": ("colour", "shade", "hue"),
}
"""Three words for every property, from plain to learned; prompts use the plain one."""

VERBS = ("have", "note", "observe")
"""The verb of a claim, from plain to learned."""

PREFIXES = {
    0: ("",),
    1: ("So,", "Well,", "Now,"),
    3: ("If you ask,", "As you asked,", "To be exact,"),
}
"""Words that a claim can begin with, by their number: they lengthen it and say nothing."""

FILLERS = ("I hope this helps.", "Please ask again.", "That is all.", "Let me see.")
"""Sentences without a fact."""

MARKING = "Mark each."
"""Asks for a mark behind every claim."""

MARKS = {True: "right", False: "wrong"}
"""The mark of a claim that is true, and of one that is not."""

STYLES = {"Be brief.": 0, "": 1, "At length.": 3}
"""What a prompt says on length, with the length of the prefix that is then right."""

CLAIM_WORDS = 4
"""Words of a claim without a prefix: we, verb, noun, value."""

NOUN_MEANINGS = {
    noun: (name, level) for name, nouns in NOUNS.items() for level, noun in enumerate(nouns)
}
"""Property and level of every noun."""

PROPERTY_OF = {value: name for name, values in VALUES.items() for value in values}
"""Property of every value."""
