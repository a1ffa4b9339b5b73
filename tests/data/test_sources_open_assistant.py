"""Open Assistant: trees of messages become prompts with sibling answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.data.groups import Group
from helpsteer2.data.sources.open_assistant import ATTRIBUTES, OpenAssistant
from helpsteer2.errors import Problem

LABELS = {"quality": 1.0, "toxicity": 0.0, "humor": 0.4, "spam": 0.0}


def message(
    identity: str, parent: str | None, text: str, labels: Any = None, **other: Any
) -> dict[str, Any]:
    """One row in the Hub's schema; the role follows from the depth written in the id."""
    role = "prompter" if len(identity) % 2 else "assistant"
    return {
        "message_id": identity,
        "parent_id": parent,
        "text": text,
        "role": role,
        "lang": "en",
        "deleted": False,
        "message_tree_id": identity[0],
        "labels": labels,
        **other,
    }


def hub_labels(values: dict[str, float]) -> dict[str, list[Any]]:
    return {"name": list(values), "value": list(values.values()), "count": [3] * len(values)}


def tree(root: str) -> list[dict[str, Any]]:
    """A question, two answers, a further question to the second, and one answer to it."""
    return [
        message(root, None, f"{root}?"),
        message(root + "x", root, "first", hub_labels(LABELS)),
        message(root + "y", root, "second", hub_labels({"quality": 0.375})),
        message(root + "yz", root + "y", "and?", role="prompter"),
        message(root + "yzw", root + "yz", "third", role="assistant"),
    ]


def read(path: Path, rows: list[Any]) -> tuple[list[Group], list[Problem]]:
    file = path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems: list[Problem] = []
    return list(OpenAssistant(str(path)).read("train", problems.append)), problems


def test_siblings_are_the_responses_and_the_path_is_the_prompt(tmp_path: Path) -> None:
    groups, problems = read(tmp_path, tree("a") + tree("b"))
    assert problems == []
    assert [g.responses for g in groups] == [("first", "second"), ("third",)] * 2
    deep = groups[1].prompt
    assert [m["role"] for m in deep] == ["user", "assistant", "user"]
    assert [m["content"] for m in deep] == ["a?", "second", "and?"]
    assert len({g.id for g in groups}) == 4
    assert groups[2].source.endswith("train.jsonl:7")


def test_labels_are_scaled_and_missing_ones_null(tmp_path: Path) -> None:
    groups, _ = read(tmp_path, tree("a"))
    ratings = [dict(zip(ATTRIBUTES, row, strict=True)) for row in groups[0].attributes or ()]
    assert ratings[0] == {
        "quality": 4.0, "toxicity": 0.0, "humor": 2.0, "creativity": None, "helpfulness": None
    }  # fmt: skip
    # 1.5 is rounded to even, as Python's round does in NeMo-Aligner.
    assert ratings[1]["quality"] == 2.0
    assert set(groups[1].attributes or ()) == {(None,) * len(ATTRIBUTES)}


@pytest.mark.parametrize(
    "labels",
    [
        hub_labels({"quality": 0.5, "humor": 1}),
        {"quality": {"value": 0.5, "count": 1}, "humor": {"value": 1, "count": 1}, "spam": None},
        [{"name": "quality", "value": 0.5, "count": 1}, {"name": "humor", "value": 1, "count": 1}],
    ],
)
def test_every_published_form_of_labels_is_read(tmp_path: Path, labels: Any) -> None:
    groups, problems = read(tmp_path, [message("a", None, "?"), message("ax", "a", "!", labels)])
    assert problems == []
    assert groups[0].attributes == ((2.0, None, 4.0, None, None),)


def test_parquet_in_the_hubs_schema(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = tree("a")
    for row in rows:
        row["labels"] = row["labels"] or None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001-b42.parquet")
    problems: list[Problem] = []
    groups = list(OpenAssistant(str(tmp_path)).read("train", problems.append))
    assert problems == []
    (tmp_path / "jsonl").mkdir()
    expected, _ = read(tmp_path / "jsonl", rows)
    assert [(g.prompt, g.responses, g.attributes) for g in groups] == [
        (g.prompt, g.responses, g.attributes) for g in expected
    ]


def test_deleted_messages_are_left_out_with_what_hangs_below(tmp_path: Path) -> None:
    rows = tree("a")
    rows[2]["deleted"] = True
    groups, problems = read(tmp_path, rows)
    assert problems == []
    assert [g.responses for g in groups] == [("first",)]


@pytest.mark.parametrize(
    ("at", "change", "field"),
    [
        (1, {"labels": hub_labels({"quality": 1.5})}, "labels.quality"),
        (1, {"labels": hub_labels({"humor": True})}, "labels.humor"),
        (1, {"labels": {"name": ["quality"], "value": []}}, "labels"),
        (1, {"labels": "quality"}, "labels"),
        (1, {"text": " "}, "text"),
        (1, {"text": None}, "text"),
        (1, {"role": "user"}, "role"),
        (1, {"role": "prompter"}, "role"),
        (1, {"parent_id": "nobody"}, "parent_id"),
        (1, {"parent_id": 3}, "parent_id"),
        (1, {"message_id": None}, "message_id"),
        (2, {"message_id": "ax"}, "message_id"),
        (0, {"role": "assistant"}, "role"),
    ],
)
def test_bad_message_is_named(tmp_path: Path, at: int, change: dict[str, Any], field: str) -> None:
    rows = tree("a")[:3] + tree("b")
    rows[at].update(change)
    groups, problems = read(tmp_path, rows)
    assert (at + 1, field) in {(p.line, p.field) for p in problems}
    assert [g.responses for g in groups][-2:] == [("first", "second"), ("third",)]


def test_bad_message_makes_no_orphans(tmp_path: Path) -> None:
    rows = tree("a")
    rows[2]["text"] = ""
    groups, problems = read(tmp_path, rows)
    assert [(p.line, p.field) for p in problems] == [(3, "text")]
    assert [g.responses for g in groups] == [("first",)]


def test_messages_that_reply_in_a_circle_end(tmp_path: Path) -> None:
    rows = tree("a")
    rows[0]["parent_id"] = "ayzw"
    rows[0]["message_tree_id"] = "a"
    groups, _ = read(tmp_path, rows)
    assert groups == []


def test_rows_of_a_tree_that_are_scattered_are_told(tmp_path: Path) -> None:
    rows = [*tree("a")[:2], *tree("b"), *tree("a")[2:]]
    _, problems = read(tmp_path, rows)
    assert {p.field for p in problems} == {"parent_id"}
    assert "follow each other" in problems[0].message


def conversations(path: Path, rows: list[Any]) -> list[list[str]]:
    """Texts of each conversation, those that are learned in capitals."""
    file = path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems: list[Problem] = []
    source = OpenAssistant(str(path), conversations=True)
    groups = list(source.read("train", problems.append))
    assert problems == []
    return [
        [m["content"].upper() if m.get("train") else m["content"] for m in group.prompt]
        + [response.upper() for response in group.responses]
        for group in groups
    ]


def test_a_conversation_is_a_path_to_an_answer_that_is_the_last(tmp_path: Path) -> None:
    assert conversations(tmp_path, tree("a") + tree("b")) == [
        ["a?", "FIRST"],
        ["a?", "SECOND", "and?", "THIRD"],
        ["b?", "FIRST"],
        ["b?", "SECOND", "and?", "THIRD"],
    ]


def test_questions_without_an_answer_end_no_conversation(tmp_path: Path) -> None:
    rows = tree("a")
    rows.append(message("axq", "ax", "more?", role="prompter"))
    rows.append(message("alone", None, "anybody?", message_tree_id="alone", role="prompter"))
    rows[4]["deleted"] = True
    assert conversations(tmp_path, rows) == [["a?", "FIRST"], ["a?", "SECOND"]]


def test_answers_that_paths_share_are_learned_in_each(tmp_path: Path) -> None:
    rows = [*tree("a"), message("ayzv", "ayz", "fourth", role="assistant")]
    assert conversations(tmp_path, rows)[1:] == [
        ["a?", "SECOND", "and?", "THIRD"],
        ["a?", "SECOND", "and?", "FOURTH"],
    ]


def test_conversations_and_questions_are_cached_apart(tmp_path: Path) -> None:
    read(tmp_path, tree("a"))
    sources = [OpenAssistant(str(tmp_path), conversations=whole) for whole in (False, True)]
    assert len({source.fingerprint("train") for source in sources}) == 2
