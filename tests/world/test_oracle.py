"""Ratings of texts that were worked out by hand, and what must not change them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, AttributeWeights
from helpsteer2.errors import UserError
from helpsteer2.world.answers import best_answer, random_answer
from helpsteer2.world.lexicon import FACTS, NAMES, STYLES, VALUES
from helpsteer2.world.oracle import rate, rate_answer
from helpsteer2.world.source import draw_task
from helpsteer2.world.tasks import Request, Task, parse_task

KNOWN = {
    "job": "baker", "food": "figs", "home": "Oslo", "pet": "cat", "drink": "milk", "colour": "red",
}  # fmt: skip
TASK = Task("Ada", KNOWN, (Request(("pet", "job"), "Be brief."),))
RIGHT = "We have pet cat. We have job baker."


def rated(text: str, task: Task = TASK) -> dict[str, float]:
    return dict(zip(HELPSTEER2_ATTRIBUTES, rate_answer(task, text), strict=True))


def drawn(number: int, seed: str = "") -> list[tuple[Task, str]]:
    made = []
    for i in range(number):
        rng = random.Random(f"{seed}{i}")
        task = draw_task(rng, marked=0.3)
        made.append((task, random_answer(rng, task)))
    return made


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # helpfulness, correctness, coherence, complexity, verbosity
        (RIGHT, (4, 4, 4, 0, 2)),
        ("We note animal cat. We note work baker.", (4, 4, 4, 2, 2)),
        ("We observe companion cat. We have job baker.", (4, 4, 4, 2, 2)),
        # one of two, half as long: 0.7·2 + 0.3·4 − 0.35·2
        ("We have pet cat.", (1.9, 2, 4, 0, 0)),
        # one of two is wrong: 0.7·2 + 0.3·4
        ("We have pet dog. We have job baker.", (2.6, 2, 4, 0, 2)),
        # other order: 0.7·4 + 0.3·3
        ("We have job baker. We have pet cat.", (3.7, 4, 3, 0, 2)),
        # one more that is false: 2 of {pet, job, drink}; 12 words for 8
        ("We have pet cat. We have job baker. We have drink tea.", (2.6572, 2.6667, 4, 0, 3.1699)),
        # an unasked truth is neither wrong nor wanted
        ("We have pet cat. We have job baker. We have food figs.", (3.5905, 4, 4, 0, 3.1699)),
        # said again
        ("We have pet cat. We have job baker. We have pet cat.", (3.2905, 4, 3, 0, 3.1699)),
        # contradicted: not told any more, and less coherent
        ("We have pet cat. We have job baker. We have pet dog.", (1.7405, 2, 2.5, 0, 3.1699)),
        # a filler only adds length: 2 + 2·log2(11/8)
        ("We have pet cat. We have job baker. That is all.", (3.6784, 4, 4, 0, 2.9189)),
        # one sentence of two is broken, and the other word order is no claim
        ("We have pet cat. The job baker is.", (2, 2, 2, 0, 2)),
        # the last sentence has no end: it counts as broken too
        ("We have pet cat. We have job baker", (1.7, 2, 1, 0, 2)),
        ("", (0, 0, 0, 0, 0)),
        ("...", (0, 0, 0, 0, 0)),
        ("I am a language model and cannot help.", (0, 0, 0, 0, 2)),
    ],
)
def test_texts_rated_by_hand(text: str, expected: tuple[float, ...]) -> None:
    assert rate_answer(TASK, text) == pytest.approx(expected, abs=6e-5)


def test_length_is_judged_by_what_was_asked_for() -> None:
    tasks = {style: replace(TASK, requests=(Request(("pet", "job"), style),)) for style in STYLES}
    ten_words = "So, we have pet cat. Well, we have job baker."
    verbosity = {style: rated(ten_words, task)["verbosity"] for style, task in tasks.items()}
    # 2 + 2·log2(10/8), 2 and 2 + 2·log2(10/14)
    assert verbosity == {"Be brief.": 2.6439, "": 2, "At length.": 1.0291}
    # Twice as long as expected is as far as the scale goes.
    long = "If you ask, we have pet cat. As you asked, we have job baker. That is all."
    assert rated(long)["verbosity"] == 4


def test_only_the_last_turn_is_to_be_answered() -> None:
    follow_up = Task(
        "Ada", KNOWN, (Request(("food",)), Request(("pet", "job"), "Be brief.")), ("x",)
    )
    assert rated(RIGHT, follow_up)["helpfulness"] == 4
    assert rated("We have food figs.", follow_up)["correctness"] == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("We have pet cat right. We have job baker right.", (4, 4, 4, 0, 2)),
        # a false claim that is marked as such tells nothing, and is no lie
        ("We have pet cat right. We have job cook wrong.", (2.6, 2, 4, 0, 2)),
        # to call a truth wrong is a lie, and so is to call a lie right
        ("We have pet cat right. We have job baker wrong.", (2.6, 2, 4, 0, 2)),
        ("We have pet cat right. We have job cook right.", (2.6, 2, 4, 0, 2)),
        # both sides of the same thing: it has been told
        ("We have pet dog wrong. We have pet cat right.", (2.15, 2, 2.5, 0, 2)),
        # no marks: 0.7·4 + 0.3·3 − 0.35·(2 − (2 + 2·log2(8/10)))
        ("We have pet cat. We have job baker.", (3.4747, 4, 3, 0, 1.3561)),
    ],
)
def test_marks_rated_by_hand(text: str, expected: tuple[float, ...]) -> None:
    marked = replace(TASK, requests=(replace(TASK.requests[0], marked=True),))
    assert rate_answer(marked, text) == pytest.approx(expected, abs=6e-5)


def test_marks_that_nobody_asked_for_cost_coherence() -> None:
    assert rated("We have pet cat right. We have job baker right.")["coherence"] == 3


def test_a_value_of_another_property_is_a_false_claim() -> None:
    ratings = rated("We have pet baker. We have job cat.")
    assert (ratings["correctness"], ratings["coherence"]) == (0, 4)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_best_answer_is_the_best_in_any_wording(level: int) -> None:
    for task, _ in drawn(200):
        ratings = rate_answer(task, best_answer(task, level))
        assert ratings == (4, 4, 4, 2 * level, 2)


def test_ratings_are_within_their_range_and_vary() -> None:
    made = [rate_answer(task, text) for task, text in drawn(500)]
    assert all(0 <= rating <= 4 for ratings in made for rating in ratings)
    for column in zip(*made, strict=True):
        assert len(set(column)) > 5
        assert min(column) < 1
        assert max(column) == 4


def test_renaming_everybody_changes_nothing() -> None:
    """A world that differs by names alone gives the same ratings."""
    others = dict(zip(NAMES, (*NAMES[1:], NAMES[0]), strict=True))
    renamed = {others[name]: facts for name, facts in FACTS.items()}
    for task, text in drawn(300):
        there = replace(task, entity=others[task.entity])
        assert parse_task(there.messages, renamed) == there
        assert rate_answer(parse_task(there.messages, renamed), text) == rate_answer(task, text)


def test_the_same_answer_is_as_good_in_two_prompts_that_ask_the_same() -> None:
    """Neither who is asked about nor an earlier turn matters, only what is asked and true."""
    for task, text in drawn(300):
        alone = replace(task, requests=task.requests[-1:], answers=())
        assert rate_answer(alone, text) == rate_answer(task, text)


def test_the_same_answer_is_worse_where_it_is_false() -> None:
    other = replace(TASK, facts={**KNOWN, "pet": "dog", "job": "cook"})
    assert rated(RIGHT, other)["correctness"] == 0
    assert rated(RIGHT, other)["coherence"] == rated(RIGHT)["coherence"]


def test_nothing_said_earns_no_more_than_a_small_part_of_the_reward() -> None:
    """A policy must not do well by being coherent about nothing."""
    weights = AttributeWeights("", {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45})
    values = weights.vector(HELPSTEER2_ATTRIBUTES)

    def reward(text: str) -> float:
        return sum(w * r for w, r in zip(values, rate_answer(TASK, text), strict=True))

    assert reward("I hope this helps. Please ask again.") < 0.4 * reward(RIGHT)
    assert reward("") == 0


def test_an_answer_is_rated_by_what_is_true_of_the_entity_of_its_prompt() -> None:
    for name, facts in FACTS.items():
        prompt = ({"role": "user", "content": f"Tell me pet of {name}. Be brief."},)
        for value in VALUES["pet"]:
            correctness = rate(prompt, f"We have pet {value}.")[1]
            assert correctness == (4 if facts["pet"] == value else 0)


def test_a_prompt_of_another_world_is_refused() -> None:
    with pytest.raises(UserError, match="not a prompt of the made-up world"):
        rate(({"role": "user", "content": "Who was Ada Lovelace?"},), RIGHT)
