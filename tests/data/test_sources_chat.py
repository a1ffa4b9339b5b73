"""Conversations: the last answer is the response, those before it are marked, the rest is told."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.data.groups import Group, read_prompts
from helpsteer2.data.sources.chat_files import ChatFiles
from helpsteer2.errors import DataError, Problem, UserError

NAMES = {"s": "system", "u": "user", "a": "assistant"}


def messages(*texts: str, **other: Any) -> dict[str, Any]:
    """A row in the form ``messages``; the first letter of a text is its role."""
    turns = [{"role": NAMES[text[0]], "content": text} for text in texts]
    return {"messages": turns, **other}


def conversations(*texts: str, **other: Any) -> dict[str, Any]:
    """The same as NeMo-Aligner writes it."""
    turns = [{"from": NAMES[t[0]].title(), "value": t, "label": None} for t in texts]
    return {"system": "", "mask": "User", "conversations": turns, **other}


def read(path: Path, *rows: Any, **options: Any) -> tuple[list[Group], list[Problem]]:
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems: list[Problem] = []
    return list(ChatFiles(str(path), **options).read("train", problems.append)), problems


def texts(group: Group) -> list[str]:
    """All texts in their order, those that are learned in capitals."""
    prompt = [m["content"].upper() if m.get("train") else m["content"] for m in group.prompt]
    return prompt + [response.upper() for response in group.responses]


@pytest.mark.parametrize("make", [messages, conversations])
def test_every_answer_is_learned_once(tmp_path: Path, make: Any) -> None:
    rows = [make("u1", "a1"), make("u1", "a1", "u2", "a2", "u3", "a3")]
    groups, problems = read(tmp_path, *rows)
    assert problems == []
    assert [texts(g) for g in groups] == [["u1", "A1"], ["u1", "A1", "u2", "A2", "u3", "A3"]]
    assert [m["role"] for m in groups[1].prompt] == ["user", "assistant"] * 2 + ["user"]
    assert len({g.id for g in groups}) == 2
    assert groups[1].source.endswith("train.jsonl:2")
    assert groups[1].attributes is None


def test_system_messages_of_both_forms(tmp_path: Path) -> None:
    (group,), _ = read(tmp_path, messages("s1", "u1", "a1"))
    assert [m["role"] for m in group.prompt] == ["system", "user"]
    rows = [conversations("u1", "a1", system=text) for text in ("", "  ", None, "s1")]
    groups, problems = read(tmp_path, *rows, conversations("s1", "u1", "a1"))
    assert problems == []
    roles = [[m["role"] for m in group.prompt] for group in groups]
    assert roles == [["user"]] * 3 + [["system", "user"]] * 2


def test_what_cannot_be_learned_is_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        messages("u1", "a1", "u2"),
        messages("a0", "u1", "a1"),
        messages("s1", "a0", "u1", "a1", "u2"),
        messages("u1", "a1"),
    ]
    with caplog.at_level(logging.WARNING):
        groups, problems = read(tmp_path, *rows)
    assert problems == []
    assert [texts(group)[-2:] for group in groups] == [["u1", "A1"]] * 4
    assert "what follows the last learned answer was left out of 2 conversations" in caplog.text
    assert "an answer before any question was left out of 2 conversations" in caplog.text


def test_messages_of_weight_zero_are_not_learned(tmp_path: Path) -> None:
    row = messages("u1", "a1", "u2", "a2", "u3", "a3")
    row["messages"][1]["weight"] = 0
    (group,), problems = read(tmp_path, row)
    assert problems == []
    assert texts(group) == ["u1", "a1", "u2", "A2", "u3", "A3"]
    row["messages"][5]["weight"] = 0
    (group,), _ = read(tmp_path, row)
    assert texts(group) == ["u1", "a1", "u2", "A2"]
    row["messages"][3]["weight"] = 0
    _, [problem] = read(tmp_path, row)
    assert problem.field == "messages"


def test_labels_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = conversations("u1", "a1", type="VALUE_TO_TEXT")
    row["conversations"][1]["label"] = "quality:4"
    with caplog.at_level(logging.WARNING):
        groups, problems = read(tmp_path, row, conversations("u1", "a1", type=None))
    assert problems == []
    assert [texts(group) for group in groups] == [["u1", "A1"]] * 2
    assert "1 conversations have labels, which data.labels=true reads" in caplog.text


def labelled(*labels: Any) -> dict[str, Any]:
    """A conversation whose answers have these labels."""
    row = conversations(*(f"{kind}{i}" for i in range(1, len(labels) + 1) for kind in "ua"))
    for turn, label in zip(row["conversations"][1::2], labels, strict=True):
        turn["label"] = label
    return row


def test_every_labelled_answer_is_a_group_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [labelled("quality:4", None, "verbosity:1,helpfulness:3"), labelled("humor:0")]
    with caplog.at_level(logging.WARNING):
        groups, problems = read(tmp_path, *rows, labels=True)
    assert problems == []
    # A text in capitals would be learned inside the prompt, where it has no label.
    found = [(g.id, texts(g), g.label and g.label.text) for g in groups]
    assert found == [
        ("train-0/turn1", ["u1", "A1"], "quality:4"),
        ("train-0/turn2", ["u1", "a1", "u2", "A2"], None),
        ("train-0", ["u1", "a1", "u2", "a2", "u3", "A3"], "helpfulness:3,verbosity:1"),
        ("train-1", ["u1", "A1"], "humor:0"),
    ]
    assert all(message.keys() == {"role", "content"} for g in groups for message in g.prompt)
    assert "1 answers have no label and are learned without one" in caplog.text
    assert "data.labels" not in caplog.text


def test_labels_belong_to_their_answers_whatever_is_left_out(tmp_path: Path) -> None:
    """An answer before any question, one of weight 0, and a last question without an answer."""
    row = conversations("a0", "u1", "a1", "u2", "a2", "u3", "a3", "u4", system="s")
    for turn in row["conversations"][::2]:
        turn["label"] = f"helpfulness:{turn['value'][1]}"
    row["conversations"][4]["weight"] = 0
    groups, problems = read(tmp_path, row, labels=True)
    assert problems == []
    assert [(texts(g), g.label and g.label.text) for g in groups] == [
        (["s", "u1", "A1"], "helpfulness:1"),
        (["s", "u1", "a1", "u2", "a2", "u3", "A3"], "helpfulness:3"),
    ]


def test_prompts_have_the_label_of_their_answer(tmp_path: Path) -> None:
    unanswered = labelled("quality:4", "quality:3")
    unanswered["conversations"].pop()
    read(tmp_path, labelled("quality:4", "quality:3"), unanswered, labelled("quality:2", None))
    prompts = list(read_prompts(ChatFiles(str(tmp_path), labels=True), "train"))
    assert [texts(group) for group in prompts] == [["u1", "a1", "u2"]] * 3
    assert [g.label and g.label.text for g in prompts] == ["quality:3", None, None]
    assert all(m.keys() == {"role", "content"} for g in prompts for m in g.prompt)
    assert all(g.label is None for g in read_prompts(ChatFiles(str(tmp_path)), "train"))


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("quality:5", "quality is 5, must be a whole number 0 to 4"),
        ("quality", "expected NAME:RATING"),
        ("", "expected NAME:RATING"),
        (4, "expected a label such as 'helpfulness:4', got 4"),
        ({"quality": 4}, "got an object"),
    ],
)
def test_a_bad_label_is_named(tmp_path: Path, label: Any, words: str) -> None:
    rows = [labelled("quality:4"), labelled("quality:4", label, "quality:4")]
    groups, [problem] = read(tmp_path, *rows, labels=True)
    assert len(groups) == 1
    assert (problem.line, problem.field) == (2, "conversations[3].label")
    assert words in problem.message
    assert read(tmp_path, *rows)[1] == []  # Nobody asked for it.


def test_reading_labels_is_another_source(tmp_path: Path) -> None:
    read(tmp_path, labelled("quality:4"))
    prints = [
        ChatFiles(str(tmp_path), labels=given).fingerprint("train") for given in (False, True)
    ]
    assert prints[0] != prints[1]
    with pytest.raises(UserError, match="labels=true reads labels of `conversations`"):
        read(tmp_path, messages("u1", "a1"), labels=True)


@pytest.mark.parametrize("name", ["human", "User", "USER"])
def test_names_that_others_give_to_roles(tmp_path: Path, name: str) -> None:
    turns = [{"from": name, "value": "u1"}, {"from": "gpt", "value": "a1"}]
    (group,), problems = read(tmp_path, {"conversations": turns})
    assert problems == []
    assert texts(group) == ["u1", "A1"]


def changed(row: dict[str, Any], **change: Any) -> dict[str, Any]:
    row["messages"][1].update(change)
    return row


@pytest.mark.parametrize(
    ("row", "field", "words"),
    [
        (messages("u1", "u2", "a1"), "messages[1].role", "two messages of the user in a row"),
        (messages("u1", "a1", "a2"), "messages[2].role", "two messages of the assistant"),
        (messages("u1", "s1", "a1"), "messages[1].role", "a system message has to be the first"),
        (changed(messages("u1", "a1"), content=" "), "messages[1].content", "is empty"),
        (changed(messages("u1", "a1"), content=None), "messages[1].content", "expected a text"),
        (changed(messages("u1", "a1"), role="tool"), "messages[1].role", "got the text 'tool'"),
        (changed(messages("u1", "a1"), role=None), "messages[1].role", "got null"),
        (changed(messages("u1", "a1"), weight=0.5), "messages[1].weight", "expected 0 or 1"),
        (messages("u1"), "messages", "no message of the assistant"),
        (messages("s1"), "messages", "no message of the assistant"),
        (messages("a1"), "messages", "no message of the assistant"),
        ({"messages": []}, "messages", "no message of the assistant"),
        ({"messages": "u1"}, "messages", "expected a list of messages, got the text"),
        ({"messages": None}, "messages", "expected a list of messages, got null"),
        ({"messages": ["u1"]}, "messages[0]", "expected a message, got the text"),
        ({**messages("u1", "a1"), **conversations("u1", "a1")}, "conversations", "this one has"),
        (conversations("u1", "a1"), "conversations", "this one has messages"),
        (conversations("u1", "a1"), "messages", "the column is missing"),
    ],
)
def test_bad_row_is_named(tmp_path: Path, row: dict[str, Any], field: str, words: str) -> None:
    groups, problems = read(tmp_path, messages("u1", "a1"), row, messages("u2", "a2"))
    assert [texts(group) for group in groups] == [["u1", "A1"], ["u2", "A2"]]
    assert {problem.line for problem in problems} == {2}
    assert any(p.field == field and words in p.message for p in problems), problems


@pytest.mark.parametrize(
    ("row", "field", "words"),
    [
        (conversations("u1", "a1", mask="Assistant"), "mask", "expected 'User'"),
        (conversations("u1", "a1", mask="Paula"), "mask", "got the text 'Paula'"),
        (conversations("u1", "a1", type="TEXT_TO_VALUE"), "type", "expected VALUE_TO_TEXT"),
        (conversations("u1", "a1", system=3), "system", "expected a text"),
        (conversations("u1", "u2", "a1"), "conversations[1].from", "in a row"),
        (conversations("s1", "u1", "a1", system="s0"), "conversations[0].from", "the only one"),
    ],
)
def test_bad_row_of_the_other_form_is_named(
    tmp_path: Path, row: dict[str, Any], field: str, words: str
) -> None:
    groups, [problem] = read(tmp_path, conversations("u1", "a1"), row)
    assert len(groups) == 1
    assert (problem.line, problem.field) == (2, field)
    assert words in problem.message


def test_the_form_can_be_given_and_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    groups, problems = read(tmp_path, conversations("u1", "a1"), form="messages")
    assert groups == []
    assert "data=chat" in problems[0].message
    read(tmp_path, messages("u1", "a1"))
    found, given = ChatFiles(str(tmp_path)), ChatFiles(str(tmp_path), "messages")
    assert found.fingerprint("train") == given.fingerprint("train")
    (tmp_path / "validation.jsonl").write_text(json.dumps(messages("u2", "a2")) + "\n")
    assert found.fingerprint("train") != found.fingerprint("validation")


def test_nemo_aligners_own_rows_are_read() -> None:
    data = os.environ.get("HELPSTEER2_REAL_DATA")
    if data is None:
        pytest.skip("HELPSTEER2_REAL_DATA is not set")
    file = Path(data) / "steerlm_format" / "sft_50_extra_id_format.jsonl"
    problems: list[Problem] = []
    groups = list(ChatFiles(str(file)).read("train", problems.append))
    assert problems == []
    assert len(groups) == 50
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [g.responses[0] for g in groups] == [r["conversations"][-1]["value"] for r in rows]
    labelled = list(ChatFiles(str(file), labels=True).read("train", problems.append))
    assert problems == []
    assert [g.responses for g in labelled] == [g.responses for g in groups]
    # Written again they are the labels of the file, letter by letter.
    given = [r["conversations"][-1]["label"] for r in rows]
    assert [g.label and g.label.text for g in labelled] == given
    assert all(label.startswith("helpfulness:") for label in given)


@pytest.mark.parametrize("make", [messages, conversations])
def test_sampling_answers_the_last_question(
    tmp_path: Path, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        make("u1"),
        make("s1", "u1"),
        make("u1", "a1"),
        make("u1", "a1", "u2"),
        make("a0", "u1", "a1", "u2", "a2"),
    ]
    read(tmp_path, *rows)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        groups = list(read_prompts(ChatFiles(str(tmp_path)), "train"))
    expected = [["u1"], ["s1", "u1"], ["u1"], ["u1", "A1", "u2"], ["u1", "A1", "u2"]]
    assert [texts(group) for group in groups] == expected
    assert {group.responses for group in groups} == {()}
    assert [group.id for group in groups] == [f"train-{i}" for i in range(5)]
    assert groups[1].source.endswith("train.jsonl:2")
    assert "an answer before any question was left out of 1 conversations" in caplog.text
    assert "what follows" not in caplog.text


@pytest.mark.parametrize("row", [messages("s1"), messages("a1"), messages(), messages("u1", "u2")])
def test_a_conversation_without_a_question_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    read(tmp_path, messages("u1"), row)
    words = r"train\.jsonl:2: messages.*: (has no message of the user|two messages of the user)"
    with pytest.raises(DataError, match=words):
        list(read_prompts(ChatFiles(str(tmp_path)), "train"))
