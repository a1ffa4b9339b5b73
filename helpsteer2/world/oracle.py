"""What any answer to a prompt of the world deserves, computed from its text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from helpsteer2.attributes import RATING_MAX, RATING_MIN
from helpsteer2.data.groups import Message
from helpsteer2.world.lexicon import CLAIM_WORDS, STYLES
from helpsteer2.world.sentences import Claim, Reading, read_text
from helpsteer2.world.tasks import Task, parse_task

DIGITS = 4
"""Decimals of a rating: the last bits of a logarithm are not the same on every machine."""


def rate(messages: Sequence[Message], response: str) -> tuple[float, ...]:
    """Rate any text as the answer to a prompt of the world.

    Args:
        messages: The prompt.
        response: Any text.

    Returns:
        Five ratings 0–4, continuous, in the order of ``HELPSTEER2_ATTRIBUTES``.

    Raises:
        UserError: If the messages are no prompt of the world.
    """
    return rate_answer(parse_task(messages), response)


def rate_answer(task: Task, response: str) -> tuple[float, ...]:
    """Rate any text as the answer to a task.

    Helpfulness is ``0.7·correctness + 0.3·coherence − 0.35·|verbosity − 2|``, within 0–4: true and
    complete first, then in good order, and as long as was asked for. Wording does not enter.

    Args:
        task: What the prompt tells and asks.
        response: Any text.

    Returns:
        Five ratings 0–4, continuous, in the order of ``HELPSTEER2_ATTRIBUTES``.
    """
    reading = read_text(response)
    correct = correctness(task, reading)
    coherent = coherence(task, reading)
    verbose = verbosity(task, reading)
    helpful = _clip(0.7 * correct + 0.3 * coherent - 0.35 * abs(verbose - 2))
    ratings = (helpful, correct, coherent, complexity(reading), verbose)
    return tuple(round(rating, DIGITS) for rating in ratings)


def correctness(task: Task, reading: Reading) -> float:
    """``4·|told| / |asked ∪ wrong|``, 0–4.

    *Told* are the properties asked for of which something true is stated and nothing false; *wrong*
    those of which anything false is stated, asked for or not. To mark a claim as wrong is to deny
    it: false if the claim is true, and nothing told if it is false.
    """
    wrong, told = set(), set()
    for claim in reading.claims:
        states = claim.mark is not False
        if states != (task.facts[claim.topic] == claim.value):
            wrong.add(claim.topic)
        elif states:
            told.add(claim.topic)
    return 4 * len(told.intersection(task.asked) - wrong) / len(wrong.union(task.asked))


def coherence(task: Task, reading: Reading) -> float:
    """4 less what is amiss in the text itself, 0–4; 0 for an empty one.

    Less 1 for every sentence that says again what was said, 1 if the properties asked for come in
    another order than asked, 1.5 for every further value of a property, 4 times the share of broken
    sentences, 1 if the last sentence is not finished, and 1 if claims are marked where nobody asked
    for marks, or the other way round.
    """
    if not reading.sentences:
        return RATING_MIN
    said = [(claim.topic, claim.value) for claim in reading.claims]
    repeats = len(said) - len(set(said)) + len(reading.fillers) - len(set(reading.fillers))
    contradictions = len(set(said)) - len({name for name, _ in said})
    penalty = 1.0 * repeats + 1.5 * contradictions + 4.0 * reading.broken / reading.sentences
    penalty += any((claim.mark is not None) != task.marked for claim in reading.claims)
    return _clip(4.0 - penalty - _disordered(task, reading.claims) - reading.unfinished)


def complexity(reading: Reading) -> float:
    """Twice the mean wording level of the claims, 0–4; 0 without a claim."""
    levels = [claim.level for claim in reading.claims]
    return 2 * sum(levels) / len(levels) if levels else RATING_MIN


def verbosity(task: Task, reading: Reading) -> float:
    """``2 + 2·log2(words / expected)``, 0–4: 2 is right, 4 is twice as long as asked for.

    Expected is one claim for each property asked for, with the prefix that suits the style, and its
    mark if marks were asked for.
    """
    expected = len(task.asked) * (CLAIM_WORDS + STYLES[task.style] + task.marked)
    if not reading.words:
        return RATING_MIN
    return _clip(2 + 2 * math.log2(reading.words / expected))


def _disordered(task: Task, claims: Sequence[Claim]) -> bool:
    """Whether the properties asked for are first stated in another order than asked."""
    stated = list(dict.fromkeys(c.topic for c in claims if c.topic in task.asked))
    return stated != [name for name in task.asked if name in stated]


def _clip(rating: float) -> float:
    return min(RATING_MAX, max(RATING_MIN, rating))
