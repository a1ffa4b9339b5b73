from __future__ import annotations

import random
from typing import Any

import pytest

from helpsteer2.data.groups import Message
from helpsteer2.errors import UserError
from helpsteer2.world.lexicon import FACTS, FILLERS, MARKS, NAMES, NOUNS, PREFIXES, VALUES
from helpsteer2.world.source import draw_task
from helpsteer2.world.tasks import Request, Task, parse_task


def user(*texts: str) -> list[Message]:
    roles: Any = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_prompt_reads_as_people_would_write_it() -> None:
    first = Request(("pet", "job", "food"), "Be brief.")
    second = Request(("home",), "At length.", marked=True)
    task = Task("Ada", FACTS["Ada"], (first, second), ("Well.",))
    assert [message["content"] for message in task.messages] == [
        "Tell me pet, job and food of Ada. Be brief.", "Well.", "And home? At length. Mark each.",
    ]  # fmt: skip
    assert (task.asked, task.style, task.marked) == (("home",), "At length.", True)


def test_prompts_are_read_back() -> None:
    turns, marked = set(), set()
    for i in range(500):
        task = draw_task(random.Random(i), marked=0.5)
        assert parse_task(task.messages) == task
        turns.add(len(task.messages))
        marked.add(task.marked)
    assert (turns, marked) == ({1, 3}, {True, False})


def test_an_earlier_answer_may_be_any_text() -> None:
    task = parse_task(user("Tell me pet of Ada.", "No idea…\n", "And job? Be brief."))
    assert task.answers == ("No idea…\n",)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        (["Tell me job of Zeus."], "nobody called 'Zeus'"),
        (["Tell me rank of Ada."], "no property 'rank'"),
        (["Tell me animal of Ada."], "no property 'animal'"),
        (["Tell me the pet of Ada."], "no property 'the pet'"),
        (["Tell me pet and pet of Ada."], "asks for the pet twice"),
        (["Tell me pet of Ada. Be funny."], "unknown wish 'Be funny.'"),
        (["Tell me pet of Ada. Mark each. Be brief."], "unknown wish"),
        (["What is the pet of Ada?"], "not a prompt of the made-up world"),
        (["Tell me pet of Ada.\n"], "not a prompt of the made-up world|unknown wish"),
        ([""], "not a prompt of the made-up world"),
        ([], "no turns at all"),
        (["Tell me pet of Ada.", "We have pet cat."], "not user, assistant"),
        (["Tell me pet of Ada.", "Cat.", "Thanks."], "expected 'And PROPERTY"),
    ],
)
def test_what_is_no_prompt_is_refused_by_name(prompt: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_task(user(*prompt))


def test_a_system_message_is_refused() -> None:
    with pytest.raises(UserError, match="not system, user"):
        parse_task([{"role": "system", "content": "Be kind."}, *user("Tell me pet of Ada.")])


def test_every_word_has_one_meaning() -> None:
    """Else a text could be read in two ways, and a model could not tell properties by values."""
    values = [value for of_property in VALUES.values() for value in of_property]
    nouns = [noun for levels in NOUNS.values() for noun in levels]
    assert len({*values, *nouns, *MARKS.values()}) == len(values) + len(nouns) + len(MARKS)
    assert NOUNS.keys() == VALUES.keys()
    assert all(NOUNS[name][0] == name for name in VALUES)
    for words, prefixes in PREFIXES.items():
        assert all(len(prefix.split()) == words for prefix in prefixes)
    assert all(filler.count(".") == 1 and filler.endswith(".") for filler in FILLERS)


def test_no_value_is_likelier_true_than_another() -> None:
    """Else the words of an answer would tell how true it is."""
    assert set(FACTS) == set(NAMES)
    for topic, values in VALUES.items():
        held = [FACTS[name][topic] for name in NAMES]
        assert {held.count(value) for value in values} == {len(NAMES) // len(values)}
    assert len({tuple(facts.values()) for facts in FACTS.values()}) == len(NAMES)
