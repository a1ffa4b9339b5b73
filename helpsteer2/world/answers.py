"""Answers to a task: the best one, and ones of random quality."""

from __future__ import annotations

import random
from dataclasses import replace

from helpsteer2.world.lexicon import FILLERS, PREFIXES, STYLES, VALUES
from helpsteer2.world.sentences import Claim
from helpsteer2.world.tasks import Task

TRUTH = {1.0: 5, 0.5: 2, 0.0: 3}
"""How likely a writer states each fact truly, with the weight of such writers."""


def best_answer(task: Task, level: int = 0) -> str:
    """The answer that the oracle rates 4 on helpfulness.

    Args:
        task: What the prompt tells and asks.
        level: Wording, 0 (plain) to 2 (learned).

    Returns:
        A claim for each property asked for, in order, each with the prefix that suits the style.
    """
    prefix, mark = PREFIXES[STYLES[task.style]][0], True if task.marked else None
    claims = [Claim(name, task.facts[name], level, level, prefix, mark) for name in task.asked]
    return " ".join(claim.text for claim in claims)


def random_answer(rng: random.Random, task: Task) -> str:
    """An answer of random quality.

    Its writer is more or less truthful, may leave out, add, repeat or contradict facts, change
    their order, mix wordings, choose another length than asked for, and break a sentence. How long
    the answer is says next to nothing on how true it is. Marks, where asked for, are right: who
    marks knows.

    Args:
        rng: Where chance comes from.
        task: What the prompt tells and asks.

    Returns:
        At least one sentence.
    """
    sentences = [claim.text for claim in _worded(rng, task, _facts_told(rng, task))]
    for filler in rng.sample(FILLERS, rng.choices((0, 1, 2), (7, 2, 1))[0]):
        sentences.insert(rng.choice((0, len(sentences))), filler)
    if rng.random() < 0.1:
        place = rng.randrange(len(sentences))
        sentences[place] = _broken(rng, sentences[place])
    text = " ".join(sentences)
    if rng.random() < 0.03:
        words = text.split()
        return " ".join(words[: rng.randint(1, len(words))]).rstrip(".")
    return text


def _facts_told(rng: random.Random, task: Task) -> list[tuple[str, str]]:
    """Properties and values in the order of the answer."""
    kept = rng.choices((1.0, 0.6), (6, 4))[0]
    names = [name for name in task.asked if rng.random() < kept] or [rng.choice(task.asked)]
    if rng.random() < 0.2:
        rng.shuffle(names)
    if rng.random() < 0.2:
        other = rng.choice([name for name in VALUES if name not in task.asked])
        names.insert(rng.randint(0, len(names)), other)
    truth = rng.choices(tuple(TRUTH), tuple(TRUTH.values()))[0]
    told = []
    for name in names:
        true = rng.random() < truth
        told.append((name, task.facts[name] if true else _wrong_value(rng, task, name)))
    if rng.random() < 0.1:
        told.append(rng.choice(told))
    if rng.random() < 0.05:
        name, stated = rng.choice(told)
        told.append((name, rng.choice([value for value in VALUES[name] if value != stated])))
    return told


def _wrong_value(rng: random.Random, task: Task, name: str) -> str:
    return rng.choice([value for value in VALUES[name] if value != task.facts[name]])


def _worded(rng: random.Random, task: Task, told: list[tuple[str, str]]) -> list[Claim]:
    """Claims in the wording and length of their writer."""
    level, mixed_level = rng.randrange(3), rng.random() < 0.2
    length = STYLES[task.style] if rng.random() < 0.5 else rng.choice(tuple(PREFIXES))
    mixed_length = rng.random() < 0.2
    claims = []
    for name, value in told:
        own = rng.choice(tuple(PREFIXES)) if mixed_length else length
        mark = task.facts[name] == value if task.marked else None
        claim = Claim(name, value, level, level, rng.choice(PREFIXES[own]), mark)
        if mixed_level:
            claim = replace(claim, noun_level=rng.randrange(3), verb_level=rng.randrange(3))
        claims.append(claim)
    return claims


def _broken(rng: random.Random, sentence: str) -> str:
    """A sentence with a word lost or two exchanged."""
    words = sentence.rstrip(".").split()
    place = rng.randrange(len(words) - 1)
    if rng.random() < 0.5:
        words.pop(place)
    else:
        words[place], words[place + 1] = words[place + 1], words[place]
    return " ".join(words) + "."
