"""Folds: every prompt on one side, every group held out once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from helpsteer2.data.groups import Group, Message, Report
from helpsteer2.data.sources.folds import PromptFolds
from helpsteer2.errors import Problem, UserError


@dataclass(frozen=True)
class Fake:
    """A source with repeated prompts and one bad row in each split."""

    n: int = 400

    @property
    def attribute_names(self) -> tuple[str, ...]:
        return ("a",)

    def read(self, split: str, report: Report) -> Iterator[Group]:
        report(Problem(split, 1, None, "bad"))
        for i in range(self.n):
            prompt = (Message(role="user", content=f"prompt {i % 300}"),)
            yield Group(f"{split}-{i}", "", prompt, ("x",))

    def prompts(self, split: str, report: Report) -> Iterator[Group]:
        return (replace(group, responses=()) for group in self.read(split, report))

    def fingerprint(self, split: str) -> str:
        return f"{split} {self.n}"


def test_every_group_is_held_out_exactly_once() -> None:
    source = Fake()
    held_out: list[str] = []
    for fold in range(5):
        folds = PromptFolds(source, ["train", "validation"], folds=5, fold=fold)
        train, validation = (list(folds.read(s, lambda p: None)) for s in ("train", "validation"))
        assert len(train) + len(validation) == 800
        prompts = [{g.prompt[0]["content"] for g in side} for side in (train, validation)]
        assert not prompts[0] & prompts[1]
        # 60 prompts are expected, with a standard deviation of 7.
        assert 30 < len(prompts[1]) < 90
        held_out += [g.id for g in validation]
    assert len(held_out) == len(set(held_out)) == 800


def test_a_new_group_moves_no_other() -> None:
    few, many = (
        {g.id for g in PromptFolds(Fake(n), ["train"], 3, 1).read("train", lambda p: None)}
        for n in (200, 400)
    )
    assert few < many


def test_problems_come_from_every_split() -> None:
    problems: list[Problem] = []
    list(PromptFolds(Fake(), ["train", "validation"], 2, 0).read("train", problems.append))
    assert [p.file for p in problems] == ["train", "validation"]


def test_fingerprint_knows_content_and_cut() -> None:
    prints = {
        PromptFolds(source, splits, folds, fold).fingerprint(split)
        for source in (Fake(10), Fake(11))
        for splits in (["train"], ["train", "validation"])
        for folds, fold in ((5, 0), (5, 1), (4, 0))
        for split in ("train", "validation")
    }
    assert len(prints) == 24


@pytest.mark.parametrize(
    ("splits", "folds", "fold"),
    [([], 5, 0), (["train"], 1, 0), (["train"], 5, 5), (["train"], 5, -1), (["a", "a"], 5, 0)],
)
def test_impossible_cut(splits: list[str], folds: int, fold: int) -> None:
    with pytest.raises(UserError):
        PromptFolds(Fake(), splits, folds, fold)


def test_unknown_split() -> None:
    folds = PromptFolds(Fake(), ["train"], 2, 0)
    with pytest.raises(UserError, match="test"):
        list(folds.read("test", print))
    with pytest.raises(UserError, match="test"):
        folds.fingerprint("test")


def test_prompts_are_cut_as_groups_are() -> None:
    folds = PromptFolds(Fake(), ["train", "validation"], folds=5, fold=1)
    for split in ("train", "validation"):
        problems: list[Problem] = []
        prompts = list(folds.prompts(split, problems.append))
        assert [g.id for g in prompts] == [g.id for g in folds.read(split, lambda p: None)]
        assert not any(group.responses for group in prompts)
        assert len(problems) == 2
