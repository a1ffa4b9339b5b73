"""Every learned answer as a group of its own: none lost, none twice, none that sees its future."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpsteer2.data.groups import Group, Message, read_all
from helpsteer2.data.sources.chat_files import ChatFiles
from helpsteer2.data.sources.each_answer import EachAnswer
from helpsteer2.data.sources.folds import PromptFolds
from helpsteer2.data.sources.group_files import GroupFiles, write_groups
from helpsteer2.errors import DataError


def user(text: str) -> Message:
    return Message(role="user", content=text)


def answer(text: str, learned: bool = True) -> Message:
    message = Message(role="assistant", content=text)
    return {**message, "train": True} if learned else message


SYSTEM = Message(role="system", content="s")
CONVERSATION = Group(
    "a", "file:7",
    (SYSTEM, user("u1"), answer("a1"), user("u2"), answer("a2", False), user("u3"),
     answer("a3"), user("u4")),
    ("r1", "r2"), attributes=((1.0,), (2.0,)),
)  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> GroupFiles:
    path = tmp_path / "groups.jsonl"
    plain = Group("b", "file:8", (user("v1"),), ("r",), attributes=((3.0,),))
    write_groups(path, [CONVERSATION, plain], ["helpfulness"])
    return GroupFiles(str(path))


def test_learned_answers_become_groups_and_the_rest_stays(source: GroupFiles) -> None:
    groups = list(read_all(EachAnswer(source), "train"))
    found = [(g.id, [m["content"] for m in g.prompt], g.responses) for g in groups]
    assert found == [
        ("a/turn1", ["s", "u1"], ("a1",)),
        ("a/turn3", ["s", "u1", "a1", "u2", "a2", "u3"], ("a3",)),
        ("a", ["s", "u1", "a1", "u2", "a2", "u3", "a3", "u4"], ("r1", "r2")),
        ("b", ["v1"], ("r",)),
    ]
    assert not any("train" in message for group in groups for message in group.prompt)
    assert [group.attributes for group in groups] == [None, None, ((1.0,), (2.0,)), ((3.0,),)]
    assert {group.source for group in groups[:3]} == {"file:7"}
    assert all(group.label is None for group in groups)
    # All that was learned before, and each of it once.
    learned = [m["content"] for m in CONVERSATION.prompt if m.get("train")]
    responses = [text for group in groups for text in group.responses]
    assert sorted(responses) == sorted([*learned, "r1", "r2", "r"])


def test_cutting_again_changes_nothing(source: GroupFiles) -> None:
    once = EachAnswer(source)
    assert list(read_all(EachAnswer(once), "train")) == list(read_all(once, "train"))


def test_the_rest_is_as_of_the_source(source: GroupFiles) -> None:
    each = EachAnswer(source)
    assert each.attribute_names == ("helpfulness",)
    prompts = list(each.prompts("train", print))
    assert prompts == list(source.prompts("train", print))
    assert [group.id for group in prompts] == ["a", "b"]


def test_fingerprint_knows_the_content_and_the_cutting(source: GroupFiles, tmp_path: Path) -> None:
    before = EachAnswer(source).fingerprint("train")
    assert before != source.fingerprint("train")
    assert before == EachAnswer(GroupFiles(source.path)).fingerprint("train")
    write_groups(tmp_path / "groups.jsonl", [CONVERSATION], ["helpfulness"])
    assert EachAnswer(GroupFiles(source.path)).fingerprint("train") != before


def test_it_is_streamed() -> None:
    class Endless:
        attribute_names = ()

        def read(self, split, report):  # type: ignore[no-untyped-def]
            while True:
                yield CONVERSATION

    groups = EachAnswer(Endless()).read("train", print)  # type: ignore[arg-type]
    assert [next(groups).id for _ in range(4)] == ["a/turn1", "a/turn3", "a", "a/turn1"]


@pytest.mark.parametrize(
    "prompt",
    [
        (answer("a0"), user("u1")),
        (SYSTEM, answer("a0"), user("u1")),
        (user("u1"), answer("a1", False), answer("a2"), user("u2")),
    ],
)
def test_an_answer_to_no_question_is_named(tmp_path: Path, prompt: tuple[Message, ...]) -> None:
    path = tmp_path / "train.jsonl"
    good = Group("b", "chats.jsonl:2", (user("v1"), answer("b1"), user("v2")), ("r",))
    write_groups(path, [good, Group("c", "chats.jsonl:3", prompt, ("r",))], ())
    groups = read_all(EachAnswer(GroupFiles(str(tmp_path))), "train")
    with pytest.raises(DataError, match=r"chats\.jsonl:3: 'c/turn.': .*must follow a question"):
        list(groups)


def test_problems_of_the_source_are_told(source: GroupFiles) -> None:
    with Path(source.path).open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=r"groups\.jsonl:3: "):
        list(read_all(EachAnswer(source), "train"))


def test_conversations_of_chat_files_in_folds(tmp_path: Path) -> None:
    rows = []
    for i in range(40):
        texts = [f"{kind}{i}.{turn}" for turn in range(1 + i % 3) for kind in "ua"]
        roles = ["user", "assistant"] * (1 + i % 3)
        turns = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        rows.append({"messages": turns})
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folds = PromptFolds(ChatFiles(str(path)), ["train"], folds=4, fold=0)
    sides = [list(read_all(EachAnswer(folds), split)) for split in ("train", "validation")]
    groups = [group for side in sides for group in side]
    assert len({group.id for group in groups}) == len(groups)
    for group in groups:
        (response,) = group.responses
        assert group.prompt[-1]["content"] == response.replace("a", "u")
        assert len(group.prompt) == 2 * int(response.split(".")[1]) + 1
    expected = sum(1 + i % 3 for i in range(40))
    assert len({group.responses for group in groups}) == len(groups) == expected
    # A conversation is on one side as a whole.
    numbers = [{group.id.partition("/")[0] for group in side} for side in sides]
    assert numbers[0]
    assert numbers[1]
    assert not numbers[0] & numbers[1]
