"""The ``label`` column of group files: it comes back, and bad ones are named."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.data.groups import Group, Message, read_all, read_prompts
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.data.sources.group_files import GroupFiles, write_groups
from helpsteer2.errors import DataError, UserError

needs_parquet = pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")
KINDS = ("jsonl", "jsonl.gz", pytest.param("parquet", marks=needs_parquet))
ASK = (Message(role="user", content="q"),)


def group(i: int, **label: int) -> Group:
    made = AttributeLabel.of(label) if label else None
    return Group(f"g{i}", f"s:{i}", ASK, ("r",), label=made)


def problems(
    folder: Path, *labels: Any, prompts: bool = False
) -> list[tuple[int | None, str | None, str]]:
    rows = [
        {"id": str(i), "prompt": list(ASK), "responses": ["a"], "label": label}
        for i, label in enumerate(labels)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        list((read_prompts if prompts else read_all)(GroupFiles(str(folder)), "train"))
    except DataError as error:
        return [(p.line, p.field, p.message) for p in error.problems]
    return []


@pytest.mark.parametrize("kind", KINDS)
def test_labels_come_back(tmp_path: Path, kind: str) -> None:
    groups = [
        group(i, verbosity=i % 5, helpfulness=4 - i % 5) if i % 3 else group(i) for i in range(600)
    ]
    write_groups(tmp_path / f"train.{kind}", groups, ())
    source = GroupFiles(str(tmp_path))
    assert list(read_all(source, "train")) == groups
    prompts = list(read_prompts(source, "train"))
    assert [(p.id, p.label) for p in prompts] == [(g.id, g.label) for g in groups]
    assert all(prompt.responses == () for prompt in prompts)


def test_a_row_has_ratings_by_attribute_in_the_order_of_labels(tmp_path: Path) -> None:
    write_groups(tmp_path / "train.jsonl", [group(0, verbosity=2, wit=1, helpfulness=4)], ())
    row = json.loads((tmp_path / "train.jsonl").read_text())
    assert list(row["label"].items()) == [("helpfulness", 4), ("verbosity", 2), ("wit", 1)]
    write_groups(tmp_path / "train.jsonl", [group(0)], ())
    assert "label" not in json.loads((tmp_path / "train.jsonl").read_text())


def test_the_order_in_a_file_does_not_matter(tmp_path: Path) -> None:
    # Nor how a whole number is written, nor what Parquet fills in where a row says nothing.
    one, other = {"helpfulness": 4, "verbosity": 1}, {"verbosity": 1.0, "wit": None}
    assert problems(tmp_path, one, {**other, "helpfulness": 4}, None) == []
    first, second, third = read_all(GroupFiles(str(tmp_path)), "train")
    assert first.label == second.label == AttributeLabel(("helpfulness", "verbosity"), (4, 1))
    assert third.label is None


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize(
    ("label", "told"),
    [
        ({"helpfulness": 2.5}, "helpfulness is 2.5, must be a whole number 0 to 4"),
        ({"helpfulness": 5}, "helpfulness is 5, must"),
        ({"helpfulness": -1}, "helpfulness is -1, must"),
        ({"helpfulness": "4"}, "helpfulness is '4', must"),
        ({"helpfulness": True}, "helpfulness is True, must"),
        ({"helpfulness": float("nan")}, "helpfulness is nan, must"),
        ({"helpfulness": [4]}, "helpfulness is [4], must"),
        ({"helpfulness": 3, "a,b": 1}, "'a,b' is no name of an attribute"),
        ({}, "it names no attribute"),
        ({"helpfulness": None}, "it names no attribute"),
        ("helpfulness:4", "expected an object of ratings by attribute, got the text"),
        ([4, 4], "expected an object of ratings by attribute, got a list"),
        (4, "expected an object of ratings by attribute, got 4"),
    ],
)
def test_a_bad_label_is_named(tmp_path: Path, label: Any, told: str, prompts: bool) -> None:
    good = {"helpfulness": 4}
    ((line, field, message),) = problems(tmp_path, good, label, good, prompts=prompts)
    assert (line, field) == (2, "label")
    assert told in message


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, {"a": 9, "b": 7}, {"a": 1}, "x")
    assert [line for line, _, _ in found] == [1, 3]
    assert "a is 9" in found[0][2]
    assert "b is 7" in found[0][2]


def test_a_misspelt_column_is_not_lost(tmp_path: Path) -> None:
    row = {"id": "a", "prompt": list(ASK), "responses": ["a"], "labels": {"helpfulness": 4}}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"label: .*is it 'labels', misspelt"):
        list(read_all(GroupFiles(str(tmp_path)), "train"))


@needs_parquet
@pytest.mark.parametrize("first", [{}, {"helpfulness": 4}, {"helpfulness": 4, "wit": 1, "tact": 1}])
def test_parquet_refuses_labels_that_it_would_lose(tmp_path: Path, first: dict[str, int]) -> None:
    late = group(300, helpfulness=1, wit=3)
    groups = [*(group(i, **first) for i in range(256)), late]
    with pytest.raises(UserError, match="'g300' has a label of other attributes"):
        write_groups(tmp_path / "train.parquet", groups, ())
    assert list(tmp_path.iterdir()) == []
    write_groups(tmp_path / "train.jsonl", groups, ())
    assert list(read_all(GroupFiles(str(tmp_path)), "train")) == groups
