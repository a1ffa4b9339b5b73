"""The project's own files: what is written is read back, bad rows are named, writes are whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.data.groups import Group, Message, read_all, read_prompts
from helpsteer2.data.sources.group_files import GroupFiles, write_groups
from helpsteer2.errors import DataError, Problem, UserError

NAMES = ("helpfulness", "wit")
needs_parquet = pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")
KINDS = ("jsonl", "jsonl.gz", pytest.param("parquet", marks=needs_parquet))


def groups(n: int) -> list[Group]:
    """Groups of two and three responses, with and without each optional column."""
    prompt = (
        Message(role="system", content="é\u2028"),
        Message(role="user", content="a"),
        Message(role="assistant", content="b"),
        Message(role="user", content="c"),
    )
    made = []
    for i in range(n):
        size = 2 + i % 2
        rated = i % 3 != 1
        made.append(
            Group(
                id=f"g{i}",
                source=f"somewhere:{i}",
                prompt=prompt[i % 2 :],
                responses=tuple(f"r{i} {j}\n" for j in range(size)),
                attributes=((0.0, None), (3.5, 4.0), (1 / 3, 2.0))[:size] if rated else None,
                annotations=(((0, 4), ()), ((1,), (2, 3)), ((), ()))[:size] if i % 4 == 0 else None,
                preference_strength=(-3, 0, 3)[i % 3] if size == 2 else None,
            )
        )
    return made


def read(path: Path) -> tuple[list[Group], list[Problem]]:
    problems: list[Problem] = []
    return list(GroupFiles(str(path)).read("train", problems.append)), problems


@pytest.mark.parametrize("kind", KINDS)
def test_written_groups_come_back(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"train.{kind}"
    expected = groups(600)
    assert write_groups(file, iter(expected), NAMES) == 600
    source = GroupFiles(str(tmp_path))
    assert source.attribute_names == NAMES
    assert list(read_all(source, "train")) == expected
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("kind", KINDS)
def test_groups_without_attributes(tmp_path: Path, kind: str) -> None:
    expected = [
        Group("a", "b", (Message(role="user", content="c"),), ("d",), preference_strength=None)
    ]
    write_groups(tmp_path / f"train.{kind}", expected, ())
    assert GroupFiles(str(tmp_path)).attribute_names == ()
    assert list(read_all(GroupFiles(str(tmp_path)), "train")) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_same_groups_give_the_same_fingerprint(tmp_path: Path, kind: str) -> None:
    prints = []
    for name, n in (("a", 5), ("b", 5), ("c", 6)):
        write_groups(tmp_path / name / f"train.{kind}", groups(n), NAMES)
        prints.append(GroupFiles(str(tmp_path / name)).fingerprint("train"))
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("kind", KINDS)
def test_failing_write_leaves_the_old_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"train.{kind}"
    write_groups(file, groups(3), NAMES)
    before = file.read_bytes()

    def broken() -> Iterator[Group]:
        yield from groups(400)
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_groups(file, broken(), NAMES)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown kind of file"):
        write_groups(tmp_path / "train.csv", groups(1), NAMES)


def row(**other: Any) -> dict[str, Any]:
    return {
        "id": "x",
        "prompt": [{"role": "user", "content": "q"}],
        "responses": ["a", "b"],
        "attributes": [{"helpfulness": 1, "wit": None}, {"helpfulness": 2}],
        **other,
    }


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": "first"}, "id"),
        ({"id": 3}, "id"),
        ({"id": ""}, "id"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "q"}, "prompt"),
        ({"prompt": [USER, {"role": "assistant", "content": "a"}]}, "prompt"),
        ({"prompt": [{"role": "human", "content": "q"}, USER]}, "prompt[0].role"),
        ({"prompt": [USER, {"role": "system", "content": "s"}, USER]}, "prompt[1].role"),
        ({"prompt": ["q", USER]}, "prompt[0].role"),
        ({"prompt": [{"role": "user", "content": " "}]}, "prompt[0].content"),
        ({"responses": []}, "responses"),
        ({"responses": "a"}, "responses"),
        ({"responses": ["a", ""]}, "responses[1]"),
        ({"responses": ["a", "x" * 2_000_000]}, "responses[1]"),
        ({"attributes": [{"helpfulness": 1}]}, "attributes"),
        ({"attributes": [[1], [2]]}, "attributes[0]"),
        ({"attributes": [{"helpfulness": 5}, None]}, "attributes[0].helpfulness"),
        ({"attributes": [None, {"wit": "3"}]}, "attributes[1].wit"),
        ({"attributes": [{"helpfullness": 1}, {}]}, "attributes[0].helpfullness"),
        ({"annotations": [{"wit": [1, 9]}, {}]}, "annotations[0].wit[1]"),
        ({"preference_strength": 4}, "preference_strength"),
        ({"preference_strength": 1, "responses": ["a"], "attributes": None}, "preference_strength"),
    ],
)  # fmt: skip
def test_bad_group_is_named(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    rows = [
        row(id="first"),
        row(id="second", **{**change}) if "id" not in change else row(**change),
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found, problems = read(tmp_path)
    assert [g.id for g in found] == ["first"]
    assert (2, field) in [(p.line, p.field) for p in problems]


def test_left_out_attributes_are_null_and_the_source_is_the_line(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(row()) + "\n")
    (group,), problems = read(tmp_path)
    assert problems == []
    assert group.attributes == ((1.0, None), (2.0, None))
    assert group.source == f"{file}:1"


def test_misspelt_optional_column_would_lose_the_ratings(tmp_path: Path) -> None:
    rows = [{("atributes" if k == "attributes" else k): v for k, v in row().items()}]
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    found, problems = read(tmp_path)
    assert found == []
    assert [p.field for p in problems] == ["attributes"]
    assert "'atributes'" in problems[0].message


@pytest.mark.parametrize("rest", [{}, {"responses": []}, {"responses": ["a"]}, {"responses": 7}])
def test_prompts_are_read_with_and_without_responses(tmp_path: Path, rest: dict[str, Any]) -> None:
    rows = [{"id": f"p{i}", "prompt": [USER], **rest} for i in range(3)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = GroupFiles(str(tmp_path / "prompts.jsonl"))
    groups = list(read_prompts(source, "train"))
    assert [group.id for group in groups] == ["p0", "p1", "p2"]
    assert all(group.prompt == (USER,) and group.responses == () for group in groups)
    assert groups[1].source.endswith("prompts.jsonl:2")


def test_prompts_without_responses_are_no_groups(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in (row(), row(id="y", responses=[]))))
    with pytest.raises(DataError, match=r"train\.jsonl:2: responses: has no response: .*sample"):
        list(read_all(GroupFiles(str(file)), "train"))
    file.write_text(json.dumps({"id": "x", "prompt": [USER]}) + "\n")
    with pytest.raises(DataError, match=r"train\.jsonl: responses: the column is missing"):
        list(read_all(GroupFiles(str(file)), "train"))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"id": "x", "prompt": [USER]}] * 2, ":2: id: the id 'x' was there before"),
        ([{"id": "x", "prompt": "q"}], ":1: prompt: expected a list, got the text"),
        ([{"id": "x", "prompt": []}], ":1: prompt: expected at least one message"),
        ([{"prompt": [USER]}], "id: the column is missing"),
        ([{"messages": [USER]}], "read it with data=chat"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, rows: list[Any], words: str) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError) as error:
        list(read_prompts(GroupFiles(str(tmp_path)), "train"))
    assert words in str(error.value)
