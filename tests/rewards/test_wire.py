"""Bodies of /score: groups go through unchanged; what is wrong is told whole, short and bounded."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpsteer2.data.groups import Group, Message
from helpsteer2.rewards.wire import (
    MAX_PROBLEMS,
    Refusal,
    RequestLimits,
    parse_request,
    request_body,
)
from tests.rewards.tiny import group

LIMITS = RequestLimits(max_body_bytes=10_000, max_rows=5, max_characters=50)
GOOD = {"prompt": [{"role": "user", "content": "Hi"}], "responses": ["Hello"]}


def refused(content: Any) -> Refusal:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(Refusal) as caught:
        parse_request(body, LIMITS)
    return caught.value


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(texts, min_size=1, max_size=4), texts)
def test_groups_go_through(responses: list[str], prompt: str) -> None:
    messages: list[Message] = [
        {"role": "system", "content": "Be."},
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": "So?", "train": True},
        {"role": "user", "content": "So."},
    ]
    sent = Group("1", "file:1", tuple(messages), tuple(responses))
    for one in (sent, replace(sent, response_ids=((1,),) * len(responses), tokenizer="x")):
        (got,) = parse_request(request_body([one]), LIMITS)
        assert got.responses == one.responses
        assert [(m["role"], m["content"]) for m in got.prompt] == [
            (m["role"], m["content"]) for m in one.prompt
        ]
        assert got.sampled == one.sampled


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["groups: is missing"]),
    ({"groups": []}, ["groups: is an empty list"]),
    ({"groups": [GOOD], "n": 1}, ["body: has an unknown key 'n'"]),
    ({"groups": "x"}, ["groups: expected a list, got the text 'x'"]),
    ({"groups": [3]}, ["groups[0]: expected an object, got 3"]),
    ({"groups": [GOOD, {**GOOD, "responses": []}]}, ["groups[1].responses: is an empty list"]),
    ({"groups": [{**GOOD, "responses": "ab"}]}, ["groups[0].responses: expected a list"]),
    ({"groups": [{**GOOD, "prompt": "Hi"}]}, ["groups[0].prompt: expected a list"]),
    (
        {"groups": [{"prompt": [{"role": "assistant", "content": "a"}], "responses": [None, 4]}]},
        [
            "groups[0].prompt: has to end in a message of the user",
            "groups[0].responses[0]: is missing",
            "groups[0].responses[1]: expected a text, got 4",
        ],
    ),
    (
        {
            "groups": [
                {
                    "prompt": [
                        {"role": "user", "content": "a"},
                        {"role": ["system"], "content": "b"},
                        {"role": "system", "content": {}},
                    ],
                    "responses": ["c"],
                    "finish_reasons": ["stop", "end"],
                }
            ]
        },
        [
            "groups[0].prompt[1].role: expected user or assistant (or system first), got a list",
            "groups[0].prompt[2].role: expected user or assistant",
            "groups[0].prompt[2].content: expected a text, got an object",
            "groups[0].finish_reasons[1]: expected stop or length, got the text 'end'",
            "groups[0].finish_reasons: has to be as long as responses",
        ],
    ),
]


@pytest.mark.parametrize(("content", "problems"), BAD)
def test_every_problem_is_told(content: dict[str, Any], problems: list[str]) -> None:
    refusal = refused(content)
    assert refusal.status == 422
    assert len(refusal.problems) == len(problems)
    for told, wanted in zip(refusal.problems, problems, strict=True):
        assert told.startswith(wanted)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b'{"groups": NaN}', b"[" * 100_000, b"1" * 9000, b"nul"]
)
def test_what_is_no_json(body: bytes) -> None:
    refusal = refused(body)
    assert refusal.status in (400, 422)
    assert len(refusal.message) < 200


def test_a_million_problems_are_a_few() -> None:
    refusal = refused({"groups": [0] * 1_000_000})
    assert len(refusal.problems) == MAX_PROBLEMS
    long = "k" * 1_000_000
    refusal = refused({"groups": [{long: 1, "prompt": [{"role": long}], "responses": [1]}]})
    assert sum(map(len, refusal.problems)) < 1000


def test_too_much_in_one_request() -> None:
    assert refused(json.loads(request_body([group("Hi", *"abcdef")]))).status == 413
    # Long conversations are counted before anything is made of them, whatever they hold.
    many = {"groups": [{"prompt": [None] * 1025, "responses": ["a"]}]}
    assert refused(many).message == "1,025 messages in one request, at most 1,024"
    refusal = refused(json.loads(request_body([group("Hi", "a" * 51)])))
    assert (refusal.status, refusal.message) == (
        413, "a text of 51 characters in the request, at most 50",
    )  # fmt: skip
    assert refused(json.loads(request_body([group("a" * 51, "Hi")]))).status == 413
    assert len(parse_request(request_body([group("Hi", *"abcde")]), LIMITS)) == 1
