"""Which splits a source has, also behind what changes its groups one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpsteer2.commands.data_source import passes, silent, splits_of
from helpsteer2.data.groups import Group, GroupSource, Message, Unlabelled
from helpsteer2.data.sources.each_answer import EachAnswer
from helpsteer2.data.sources.folds import PromptFolds
from helpsteer2.data.sources.group_files import GroupFiles, write_groups
from helpsteer2.data.sources.helpsteer import HelpSteer2
from helpsteer2.errors import Problem


def shown(problem: Problem) -> None:
    raise AssertionError("nothing is read here")


@pytest.mark.parametrize(
    "wrap", [EachAnswer, Unlabelled, lambda source: Unlabelled(EachAnswer(source))]
)
@pytest.mark.parametrize("kind", ["train alone", "both", "a file", "one table", "folds"])
def test_splits_are_those_of_the_source_behind(
    tmp_path: Path, kind: str, wrap: Callable[[GroupSource], GroupSource]
) -> None:
    group = Group("a", "b", (Message(role="user", content="q"),), ("r",))
    names = {"both": ("train", "validation"), "a file": ("validation",)}.get(kind, ("train",))
    for name in names:
        write_groups(tmp_path / f"{name}.jsonl", [group], ())
    source: GroupSource = GroupFiles(str(tmp_path))
    if kind == "a file":
        source = GroupFiles(str(tmp_path / "validation.jsonl"))
    elif kind == "one table":
        source = HelpSteer2(str(tmp_path), config="preference")
    elif kind == "folds":
        source = PromptFolds(source, ["train"], 2, 0)
    expected = {"train alone": ["train"], "a file": ["validation"]}
    assert splits_of(wrap(source)) == splits_of(source)
    assert splits_of(source) == expected.get(kind, ["train", "validation"])
    told = [report is silent for _, report in passes(wrap(source), None, shown)]
    # What is read as a whole for each split tells its problems once.
    whole = kind in ("one table", "folds")
    assert told == [False, *[whole] * (len(told) - 1)]
