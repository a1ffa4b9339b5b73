"""Samples, scores and rewards in the project's files: they come back, and bad ones are named."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpsteer2.data.groups import Group, Message, read_all
from helpsteer2.data.sources.group_files import GroupFiles, write_groups
from helpsteer2.errors import DataError, UserError

needs_parquet = pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")
KINDS = ("jsonl", "jsonl.gz", pytest.param("parquet", marks=needs_parquet))
PROMPT = (
    Message(role="user", content="a"),
    Message(role="assistant", content="b", train=True),
    Message(role="user", content="c"),
    Message(role="assistant", content="d", train=False),
    Message(role="user", content="e"),
    Message(role="assistant", content="f"),
    Message(role="user", content="g"),
)
FULL: dict[str, Any] = {
    "response_ids": ((5, 6, 2), (7, 2**31 - 1)),
    "tokenizer": "5d41",
    "finish_reasons": ("stop", "length"),
    "logprobs": ((-0.1, -2.5, 0.0), (-1e-9, -40.0)),
    "scores": ((-3.25, 1 / 3), (1e30, 0.0)),
    "score_names": ("helpfulness", "wit"),
    "rewards": (-1e9, 4.5),
}


def sample(i: int, *names: str) -> Group:
    return Group(f"g{i}", f"s:{i}", PROMPT, ("r", ""), **{name: FULL[name] for name in names})


def samples(n: int) -> list[Group]:
    """Groups with every combination of columns that may stand without the others."""
    units = [("response_ids", "tokenizer"), ("scores", "score_names"), ("rewards",), ("logprobs",)]
    made = []
    for i in range(n):
        chosen = [name for k, unit in enumerate(units) if i >> k & 1 for name in unit]
        if "logprobs" in chosen and "response_ids" not in chosen:
            chosen.remove("logprobs")
        made.append(sample(i, "finish_reasons", *chosen))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_every_column_comes_back(tmp_path: Path, kind: str) -> None:
    expected = samples(600)
    write_groups(tmp_path / f"train.{kind}", expected, ())
    assert list(read_all(GroupFiles(str(tmp_path)), "train")) == expected


@given(rewards=st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=2))
def test_numbers_come_back_to_the_last_digit(tmp_path_factory: Any, rewards: list[float]) -> None:
    folder = tmp_path_factory.mktemp("numbers")
    group = Group("a", "b", PROMPT, ("r", "s"), rewards=tuple(rewards))
    write_groups(folder / "train.jsonl", [group], ())
    assert list(read_all(GroupFiles(str(folder)), "train")) == [group]


def test_what_is_not_known_is_not_written(tmp_path: Path) -> None:
    write_groups(tmp_path / "train.jsonl", [Group("a", "b", PROMPT[-1:], ("r",))], ())
    row = json.loads((tmp_path / "train.jsonl").read_text())
    assert not row.keys() & FULL.keys()
    assert row["prompt"] == [{"role": "user", "content": "g"}]


@needs_parquet
@pytest.mark.parametrize("first", [(), ("scores", "score_names")])
def test_parquet_refuses_scores_that_it_would_lose(tmp_path: Path, first: tuple[str, ...]) -> None:
    late = Group("late", "s", PROMPT, ("r",), scores=((1.0,),), score_names=("verbosity",))
    groups = [*(sample(i, "finish_reasons", *first) for i in range(256)), late]
    with pytest.raises(UserError, match="'late' has other scores"):
        write_groups(tmp_path / "train.parquet", groups, ())
    assert list(tmp_path.iterdir()) == []


def row(**other: Any) -> dict[str, Any]:
    return {
        "id": "x",
        "prompt": [{"role": "user", "content": "q"}],
        "responses": ["a", ""],
        "response_ids": [[5, 6], [2]],
        "tokenizer": "5d41",
        "finish_reasons": ["length", "stop"],
        "logprobs": [[-0.5, 0], [-2]],
        "scores": [{"wit": 1, "tact": 2.5}, {"tact": -1e5, "wit": 0}],
        "rewards": [3, -1e5],
        **other,
    }


def problems(tmp_path: Path, *rows: dict[str, Any]) -> list[tuple[int | None, str | None, str]]:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    try:
        list(read_all(GroupFiles(str(tmp_path)), "train"))
    except DataError as error:
        return [(p.line, p.field, p.message) for p in error.problems]
    return []


def test_a_good_row_is_good(tmp_path: Path) -> None:
    assert problems(tmp_path, row()) == []
    (group,) = read_all(GroupFiles(str(tmp_path)), "train")
    assert group.score_names == ("wit", "tact")
    assert group.scores == ((1.0, 2.5), (0.0, -1e5))
    assert group.logprobs == ((-0.5, 0.0), (-2.0,))
    nulls = {name: None for name in FULL if name != "score_names"}
    assert problems(tmp_path, row(**nulls, responses=["a", "b"])) == []


NAN, INFINITY = float("nan"), float("inf")
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"response_ids": [[5, 6]]}, "response_ids", "one item a response (2), got 1"),
        ({"response_ids": 3}, "response_ids", "expected a list"),
        ({"response_ids": [[5, 6], 2]}, "response_ids[1]", "expected a list"),
        ({"response_ids": [[5, 6], []]}, "response_ids[1]", "at least one id"),
        ({"response_ids": [[5, -1], [2]]}, "response_ids[0][1]", "from 0 to 2147483647, got -1"),
        ({"response_ids": [[5, 2**31], [2]]}, "response_ids[0][1]", "from 0 to 2147483647"),
        ({"response_ids": [[5, True], [2]]}, "response_ids[0][1]", "got true"),
        ({"response_ids": [[5, 6.5], [2]]}, "response_ids[0][1]", "got 6.5"),
        ({"response_ids": [[5, "6"], [2]]}, "response_ids[0][1]", "got the text"),
        ({"tokenizer": None}, "tokenizer", "if and only if"),
        ({"tokenizer": ""}, "tokenizer", "the text is empty"),
        ({"tokenizer": 3}, "tokenizer", "expected a text"),
        ({"response_ids": None, "logprobs": None}, "tokenizer", "if and only if"),
        ({"response_ids": None, "tokenizer": None}, "logprobs", "the row has none"),
        ({"finish_reasons": ["length"]}, "finish_reasons", "one item a response"),
        ({"finish_reasons": ["length", "eos"]}, "finish_reasons[1]", "stop or length, got the te"),
        ({"finish_reasons": ["length", None]}, "finish_reasons[1]", "got null"),
        ({"finish_reasons": ["length", ["stop"]]}, "finish_reasons[1]", "got a list"),
        ({"logprobs": [[-0.5, 0]]}, "logprobs", "one item a response"),
        ({"logprobs": [[-0.5], [-2]]}, "logprobs[0]", "each of the 2 ids, got 1"),
        ({"logprobs": [[-0.5, 0], []]}, "logprobs[1]", "each of the 1 ids, got 0"),
        ({"logprobs": [[-0.5, 0.1], [-2]]}, "logprobs[0][1]", "at most 0, got 0.1"),
        ({"logprobs": [[-0.5, NAN], [-2]]}, "logprobs[0][1]", "got NaN"),
        ({"logprobs": [[-0.5, -INFINITY], [-2]]}, "logprobs[0][1]", "got -inf"),
        ({"logprobs": [[-0.5, None], [-2]]}, "logprobs[0][1]", "got null"),
        ({"scores": [{"wit": 1}]}, "scores", "one item a response"),
        ({"scores": [{"wit": 1}, None]}, "scores[1]", "expected an object"),
        ({"scores": [{}, {}]}, "scores[0]", "expected an object"),
        ({"scores": [{"wit": 1}, {"tact": 1}]}, "scores[1]", "first response (wit), got tact"),
        ({"scores": [{"wit": 1}, {"wit": 1, "a": 2}]}, "scores[1]", "first response (wit)"),
        ({"scores": [{"wit": 1}, {"wit": INFINITY}]}, "scores[1].wit", "finite number"),
        ({"scores": [{"wit": 1}, {"wit": None}]}, "scores[1].wit", "got null"),
        ({"rewards": [1]}, "rewards", "one item a response"),
        ({"rewards": {"a": 1}}, "rewards", "expected a list"),
        ({"rewards": [1, NAN]}, "rewards[1]", "finite number, got NaN"),
        ({"rewards": [1, 10**400]}, "rewards[1]", "finite number"),
        ({"rewards": [1, 1e39]}, "rewards[1]", "finite number"),
        ({"rewards": [1, False]}, "rewards[1]", "got false"),
        ({"prompt": [{**USER, "train": True}]}, "prompt[0].train", "only a message of the assist"),
        ({"prompt": [USER, {**ANSWER, "train": 1}, USER]}, "prompt[1].train", "true or false"),
        (
            {"response_ids": None, "tokenizer": None, "logprobs": None, "finish_reasons": None},
            "responses[1]",
            "the text is empty",
        ),
    ],
)
def test_a_bad_row_is_named(
    tmp_path: Path, change: dict[str, Any], field: str, message: str
) -> None:
    found = problems(tmp_path, row(id="good"), row(**change))
    assert {line for line, _, _ in found} == {2}
    assert any(f == field and message in text for _, f, text in found), found


def test_a_long_row_of_bad_numbers_is_one_problem(tmp_path: Path) -> None:
    bad = row(response_ids=[[-1] * 1000, [2]], logprobs=None)
    assert len(problems(tmp_path, bad)) == 1


@pytest.mark.parametrize("name", ["reward", "score", "response_id", "logprob", "finish_reason"])
def test_a_misspelt_column_is_not_lost(tmp_path: Path, name: str) -> None:
    changed = row()
    changed[name] = changed.pop(name + "s")
    assert [field for _, field, _ in problems(tmp_path, changed)] == [name + "s"]
