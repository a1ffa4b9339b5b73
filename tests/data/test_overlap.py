"""Held-out groups that stand in train: found by texts and by ids, and named by their rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import sample_tokenizers as sample

from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import Group, Message, Report
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.overlap import GroupHashes, Overlap, name_twins
from helpsteer2.data.sources.folds import PromptFolds
from helpsteer2.data.sources.helpsteer import HelpSteer2
from helpsteer2.data.tokenise import tokenise
from helpsteer2.errors import Problem
from helpsteer2.world.source import WorldSource

LIMITS = LengthLimits(60, 40)


@dataclass(frozen=True)
class Splits:
    """Two splits as they are given."""

    train: tuple[Group, ...]
    validation: tuple[Group, ...]
    attribute_names: tuple[str, ...] = ()

    def read(self, split: str, report: Report) -> Iterator[Group]:
        report(Problem("rows.jsonl", 1, None, "a bad row"))
        yield from self.train if split == "train" else self.validation

    def fingerprint(self, split: str) -> str:
        return repr((split, self.train, self.validation))


def group(i: int, *responses: str) -> Group:
    prompt = (Message(role="user", content=f"question {i}"),)
    return Group(f"id-{i}", f"rows.jsonl:{i + 2}", prompt, responses or (f"yes {i}", "no"))


def by_texts(groups: Iterable[Group]) -> GroupHashes:
    hashes = GroupHashes()
    for one in groups:
        hashes.add_texts(one)
    return hashes


TRAIN = tuple(group(i) for i in range(50))
HELD_OUT = (
    group(60),
    group(7),
    group(9, "no", "yes 9"),
    group(11, "yes 11", "perhaps"),
    group(13, "yes 13"),
    group(15, "no"),
    group(61, "yes 1", "no"),
)
FOUND = Overlap(whole={1: 7, 2: 9}, prompt_alone={3: 11, 4: 13, 5: 15})


def test_groups_are_told_by_prompt_and_responses_in_any_order() -> None:
    assert by_texts(HELD_OUT).found_in(by_texts(TRAIN)) == FOUND


def test_what_cuts_a_prompt_or_the_responses_otherwise_is_another_group() -> None:
    def turns(*texts: str) -> tuple[Message, ...]:
        return tuple(Message(role="user", content=text) for text in texts)

    one = Group("a", "x:1", turns("ab", "c"), ("de", "f"))
    others = [
        replace(one, prompt=turns("a", "bc")),
        replace(one, responses=("d", "ef")),
        replace(one, responses=("def",)),
        replace(one, responses=("de", "f", "f")),
    ]
    assert not by_texts(others).found_in(by_texts([one])).whole
    labelled = replace(one, id="b", source="y:2", preference_strength=3)
    assert by_texts([labelled]).found_in(by_texts([one])).whole == {0: 0}


def test_the_first_of_several_twins_is_named() -> None:
    train = by_texts([group(3), *TRAIN, group(3)])
    assert by_texts([group(3)]).found_in(train).whole == {0: 0}


def test_nothing_is_found_in_nothing() -> None:
    assert GroupHashes().found_in(by_texts(TRAIN)) == Overlap({}, {})
    assert by_texts(TRAIN).found_in(GroupHashes()) == Overlap({}, {})


def test_ids_from_the_cache_tell_the_same_as_texts(tmp_path: Path) -> None:
    chat, source = ChatFormat().bind(sample.llama3_like()), Splits(TRAIN, HELD_OUT)

    class Good(Splits):
        def read(self, split: str, report: Report) -> Iterator[Group]:
            return super().read(split, lambda problem: None)

    good = Good(source.train, source.validation)
    for _ in range(2):
        train, held_out = (
            tokenise(good, split, chat, LIMITS, (), tmp_path) for split in ("train", "validation")
        )
        assert held_out.hashes().found_in(train.hashes()) == FOUND
    # A selection has places of its own, and knows those of the data set.
    kept = train.select(np.array([9, 11]), {})
    assert held_out.hashes().found_in(kept.hashes()) == Overlap({2: 0}, {3: 1})
    assert kept.indices.tolist() == [9, 11]


def test_twins_are_named_by_their_rows() -> None:
    source = Splits(TRAIN, HELD_OUT)
    problems = list(name_twins(source, "validation", {1: 7, 2: 9}, "learned"))
    assert [str(problem) for problem in problems] == [
        "rows.jsonl:9: learned (rows.jsonl:9)",
        "rows.jsonl:11: learned (rows.jsonl:11)",
    ]


def overlap_of(source: WorldSource | PromptFolds | HelpSteer2) -> Overlap:
    held_out, train = (
        by_texts(source.read(split, pytest.fail)) for split in ("validation", "train")
    )
    assert len(held_out) > 0
    return held_out.found_in(train)


def test_the_world_repeats_nothing() -> None:
    world = WorldSource(groups=600, seed=3, validation_groups=200, responses=2)
    assert overlap_of(world) == Overlap({}, {})


def test_real_rows_are_not_repeated(real_data: Path) -> None:
    folder = real_data / "helpsteer2_slice"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    for source in (HelpSteer2(str(folder)), HelpSteer2(str(folder), config="disagreements")):
        assert not overlap_of(source).whole
    folds = PromptFolds(HelpSteer2(str(folder)), ["train", "validation"], folds=5, fold=0)
    assert overlap_of(folds) == Overlap({}, {})
