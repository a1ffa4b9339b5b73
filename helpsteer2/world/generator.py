"""Prompts about people and their notes, answers of known quality, and the ratings they deserve.

The facts that an answer can get right or wrong stand in its prompt, and they are the same in every
prompt about a person: a model can compare or remember. Remembering ten people is what a tiny model
trained from scratch manages within a minute.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.data.groups import Group, Message, Report
from helpsteer2.errors import UserError

NAMES = "Ada Ben Cleo Dan Edith Finn Greta Hugo Ines Jonas Kira Leo".split()

VALUES = {
    "colour": "amber blue crimson green indigo pink red silver violet white".split(),
    "food": "bread cheese dumplings figs lentils noodles olives pears rice soup".split(),
    "home": "Bergen Cairo Dakar Geneva Hanoi Lima Lisbon Oslo Quito Turin".split(),
    "job": "baker carpenter dentist farmer judge nurse painter pilot sailor tailor".split(),
    "pet": "canary cat dog ferret goat hamster lizard parrot rabbit turtle".split(),
    "sport": "archery boxing chess cycling fencing judo rowing rugby skiing tennis".split(),
}
"""The values of every property; none stands under two properties."""

IN_USE = 5
FACTS = {
    name: {key: random.Random(f"{name}/{key}").choice(VALUES[key][:IN_USE]) for key in VALUES}
    for name in NAMES
}
"""What is true in this world: the facts about every person, with the first values of a property."""

WORDINGS = {
    "colour": (
        "The colour is {}.",
        "The colour that {name} likes best is {}.",
        "Regarding chromatic preference, {name} invariably gravitates towards {}.",
    ),
    "food": (
        "The food is {}.",
        "When it comes to food, {name} likes {}.",
        "From a gastronomic perspective, {name} demonstrates considerable appreciation for {}.",
    ),
    "home": (
        "The home is {}.",
        "The place where {name} lives is {}.",
        "The municipality in which {name} currently maintains a residence is {}.",
    ),
    "job": (
        "The job is {}.",
        "To make a living, {name} works as a {}.",
        "In a professional capacity, {name} discharges the responsibilities of a {}.",
    ),
    "pet": (
        "The pet is a {}.",
        "The animal that {name} keeps at home is a {}.",
        "As a domesticated companion, {name} accommodates a conspicuously contented {}.",
    ),
    "sport": (
        "The sport is {}.",
        "In the free time, {name} goes in for {}.",
        "With respect to athletic endeavours, {name} assiduously practises {}.",
    ),
}
"""Three ways to state a property, from plain to learned."""

FILLERS = (
    "Let me tell you what the notes say.",
    "I hope that this is what you wanted to know.",
    "Please ask again if anything is not clear.",
)

COUNTS = {1: "one fact", 2: "two facts", 3: "three facts"}
STYLES = {"Keep it very short.": 5, "": 9, "Go into detail.": 14}
"""How short an answer is wanted, with the words that are then right for one fact."""


@dataclass(frozen=True)
class Notes:
    """What a prompt tells and asks.

    Attributes:
        name: Whom it is about.
        facts: Property to value, in the order of the prompt.
        asked: Number of facts asked for.
        style: How short the answer shall be, a key of ``STYLES``.
    """

    name: str
    facts: dict[str, str]
    asked: int
    style: str

    def text(self) -> str:
        """The prompt as the user would write it."""
        facts = ", ".join(f"{key} {value}" for key, value in self.facts.items())
        return f"Notes on {self.name}: {facts}. Tell me {COUNTS[self.asked]}. {self.style}".rstrip()


@dataclass(frozen=True)
class Claim:
    """One sentence of an answer.

    Attributes:
        key: The property it is about.
        value: The value it states, true or not.
        level: Its wording, 0 (plain) – 2 (learned).
    """

    key: str
    value: str
    level: int


def rate(notes: Notes, claims: list[Claim], words: int) -> tuple[float, ...]:
    """Ratings that an answer deserves, computed from what it is made of.

    Correctness is the share of true, distinct facts among those asked for or stated, whichever is
    more; coherence suffers from repetition, another order than the notes' and a mix of wordings;
    complexity is the wording; verbosity counts words against what was asked for (2 is right);
    helpfulness follows from correctness and coherence, less what is missing or too much in length.

    Args:
        notes: The prompt.
        claims: The sentences that state something, in order.
        words: Length of the whole answer in words.

    Returns:
        Five ratings 0–4 in the order of ``HELPSTEER2_ATTRIBUTES``.
    """
    true = {claim.key for claim in claims if notes.facts[claim.key] == claim.value}
    correctness = _nearest(4 * len(true) / max(notes.asked, len(claims)))

    levels = {claim.level for claim in claims}
    keys = list(dict.fromkeys(claim.key for claim in claims))
    repeats = len(claims) - len(keys)
    shuffled = keys != [key for key in notes.facts if key in keys]
    coherence = max(0, 4 - 2 * repeats - shuffled - (len(levels) > 1))

    complexity = _nearest(2 * sum(claim.level for claim in claims) / len(claims))
    ratio = words / (notes.asked * STYLES[notes.style])
    verbosity = sum(ratio > bound for bound in (0.5, 0.8, 1.25, 2.0))
    helpfulness = 0.6 * correctness + 0.4 * coherence - 0.5 * abs(verbosity - 2)
    ratings = (max(0, _nearest(helpfulness)), correctness, coherence, complexity, verbosity)
    return tuple(float(rating) for rating in ratings)


@dataclass(frozen=True)
class WorldSource:
    """Groups made on the spot, the same bytes for the same arguments on every machine.

    Args:
        groups: Number of groups of ``train``.
        seed: Another seed gives other groups.
        validation_groups: Number of groups of ``validation``; no prompt of it is in ``train``.
        responses: Responses a prompt.

    Raises:
        UserError: If a number is below 1.
    """

    groups: int
    seed: int
    validation_groups: int
    responses: int = 2

    def __post_init__(self) -> None:
        for name in ("groups", "validation_groups", "responses"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} must be at least 1, got {getattr(self, name)}")

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the rating columns."""
        return HELPSTEER2_ATTRIBUTES

    def read(self, split: str, report: Report) -> Iterator[Group]:
        """Make the groups of a split, one after the other.

        Args:
            split: ``train`` or ``validation``.
            report: Never called: what is made here is right.

        Yields:
            Groups, each from a random stream of its own.

        Raises:
            UserError: If the split is another one.
        """
        for index in range(self._size(split)):
            yield self._group(split, index)

    def fingerprint(self, split: str) -> str:
        """Hash of the arguments and of this file, since both decide what is made."""
        made_of = (split, self._size(split), self.seed, self.responses)
        return hashlib.sha256(Path(__file__).read_bytes() + repr(made_of).encode()).hexdigest()

    def _size(self, split: str) -> int:
        sizes = {"train": self.groups, "validation": self.validation_groups}
        if split not in sizes:
            raise UserError(f"the made-up data has the splits {', '.join(sizes)}, not {split!r}")
        return sizes[split]

    def _group(self, split: str, index: int) -> Group:
        rng = random.Random(f"{self.seed}/{split}/{index}")
        notes = _draw_notes(rng)
        while (_hash(notes.text()) % 8 == 0) != (split == "validation"):
            notes = _draw_notes(rng)
        answers: dict[str, tuple[float, ...]] = {}
        while len(answers) < self.responses:
            text, ratings = _draw_answer(rng, notes)
            answers[text] = ratings
        prompt: tuple[Message, ...] = ({"role": "user", "content": notes.text()},)
        return Group(
            id=f"{split}-{index}",
            source=f"world:{index + 1}",
            prompt=prompt,
            responses=tuple(answers),
            attributes=tuple(answers.values()),
        )


def _draw_notes(rng: random.Random) -> Notes:
    keys = rng.sample(list(VALUES), rng.randint(3, 5))
    name = rng.choice(NAMES)
    facts = {key: FACTS[name][key] for key in keys}
    return Notes(name, facts, rng.choice(list(COUNTS)), rng.choice(list(STYLES)))


def _draw_answer(rng: random.Random, notes: Notes) -> tuple[str, tuple[float, ...]]:
    """An answer of random quality, with its ratings."""
    count = min(len(notes.facts), max(1, notes.asked + rng.choice((-1, 0, 0, 0, 1))))
    stated = rng.sample(list(notes.facts), count)
    keys = [key for key in notes.facts if key in stated]
    if rng.random() < 0.3:
        rng.shuffle(keys)
    if rng.random() < 0.2:
        keys.append(rng.choice(keys))
    truth = rng.choice((1.0, 1.0, 0.5, 0.0))
    level, mixed = rng.randint(0, 2), rng.random() < 0.2
    claims = []
    for key in keys:
        value = notes.facts[key]
        if rng.random() > truth:
            value = rng.choice([other for other in VALUES[key] if other != value])
        claims.append(Claim(key, value, rng.randint(0, 2) if mixed else level))
    sentences = [WORDINGS[c.key][c.level].format(c.value, name=notes.name) for c in claims]
    fillers = [filler for filler in FILLERS if rng.random() < 0.2]
    text = " ".join(sentences + fillers)
    return text, rate(notes, claims, len(text.split()))


def _nearest(value: float) -> int:
    """Round half up: Python's own rounding sends 0.5 to 0 and 1.5 to 2."""
    return int(value + 0.5) if value > 0 else 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
