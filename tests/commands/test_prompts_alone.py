"""Prompts without responses: whoever needs responses refuses them with file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helpsteer2.attributes import AttributeWeights
from helpsteer2.commands.annotate import annotate
from helpsteer2.commands.data import validate
from helpsteer2.commands.pairs import pairs
from helpsteer2.commands.train import train
from helpsteer2.data.groups import GroupSource
from helpsteer2.data.sources.chat_files import ChatFiles
from helpsteer2.data.sources.group_files import GroupFiles
from helpsteer2.errors import DataError
from helpsteer2.evaluation.baselines import read_rated
from tests.training.runs import arguments

QUESTION = {"role": "user", "content": "Why is the sky blue?"}
HELPFULNESS = AttributeWeights("helpfulness_only", {"helpfulness": 1.0})


def train_on(data: GroupSource, folder: Path) -> None:
    train(**arguments(folder / "run", module="sft") | {"data": data})


def score(data: GroupSource, folder: Path) -> None:
    def opened() -> None:
        pytest.fail("the model was opened before the rows were read")

    annotate(str(folder / "run"), data, "train", "model", opened, {})  # type: ignore[arg-type]


def pair(data: GroupSource, folder: Path) -> None:
    pairs(str(folder / "run"), data, ["train"], "preference", HELPFULNESS, 0.0)


def evaluate(data: GroupSource, folder: Path) -> None:
    read_rated(data, "train")


@pytest.mark.parametrize("need", [train_on, score, pair, evaluate])
def test_prompts_are_refused(need: Callable[[GroupSource, Path], None], tmp_path: Path) -> None:
    groups, chats = tmp_path / "groups.jsonl", tmp_path / "chats.jsonl"
    rows = [{"id": "a", "prompt": [QUESTION], "responses": responses} for responses in (["x"], [])]
    rows[1]["id"] = "b"
    groups.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = {"role": "assistant", "content": "It scatters."}
    turns = ([QUESTION, answer], [QUESTION])
    chats.write_text("".join(json.dumps({"messages": row}) + "\n" for row in turns))
    with pytest.raises(DataError, match=r"groups\.jsonl:2: responses: has no response"):
        need(GroupFiles(str(groups)), tmp_path)
    with pytest.raises(DataError, match=r"chats\.jsonl:2: messages: has no message of the assist"):
        need(ChatFiles(str(chats)), tmp_path)


def test_validate_says_who_makes_responses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "groups.jsonl"
    path.write_text(json.dumps({"id": "a", "prompt": [QUESTION], "responses": []}) + "\n")
    assert validate(str(path)) == 1
    told = "groups.jsonl:1: responses: has no response: `helpsteer2 sample` makes some"
    assert told in capsys.readouterr().out
