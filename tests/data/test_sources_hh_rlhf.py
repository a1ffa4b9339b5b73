"""HH-RLHF: two dialogues become a prompt with two answers, the chosen one first."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.data.groups import Group
from helpsteer2.data.sources.hh_rlhf import HHRLHF
from helpsteer2.errors import Problem

ASK = "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"


def read(
    path: Path, rows: list[Any], split: str = "train", name: str = "train"
) -> tuple[list[Group], list[Problem]]:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    problems: list[Problem] = []
    return list(HHRLHF(str(path)).read(split, problems.append)), problems


def test_shared_turns_are_the_prompt(tmp_path: Path) -> None:
    rows = [{"chosen": f"{ASK} Because.\n\nReally.", "rejected": f"{ASK} But no."}]
    (group,), problems = read(tmp_path, rows)
    assert problems == []
    assert group.responses == ("Because.\n\nReally.", "But no.")
    assert group.preference_strength == -1
    assert group.attributes is None
    assert [(m["role"], m["content"]) for m in group.prompt] == [
        ("user", "Hi there"),
        ("assistant", "Hello."),
        ("user", "Why?"),
    ]


def test_swapping_the_dialogues_swaps_the_answers(tmp_path: Path) -> None:
    one, other = f"{ASK} yes", f"{ASK} no"
    (a,), _ = read(tmp_path, [{"chosen": one, "rejected": other}])
    (b,), _ = read(tmp_path, [{"chosen": other, "rejected": one}])
    assert a.responses == b.responses[::-1]
    assert a.prompt == b.prompt


def test_answer_that_begins_like_the_other_is_not_cut(tmp_path: Path) -> None:
    (group,), _ = read(tmp_path, [{"chosen": f"{ASK} yes", "rejected": f"{ASK} yes, but"}])
    assert group.responses == ("yes", "yes, but")


def test_published_rows_without_two_answers_are_counted_not_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    early = "\n\nHuman: Hi there\n\nAssistant: Go.\n\nHuman: Ok\n\nAssistant: Bye"
    rows = [
        {"chosen": f"{ASK} yes", "rejected": early},
        {"chosen": f"{ASK} yes", "rejected": f"{ASK} "},
        {"chosen": f"{ASK} yes", "rejected": f"{ASK} yes"},
        {"chosen": f"{ASK} yes", "rejected": "\n\nHuman: Other\n\nAssistant: no"},
        {"chosen": f"{ASK} yes", "rejected": f"{ASK} no"},
    ]
    with caplog.at_level(logging.WARNING):
        groups, problems = read(tmp_path, rows)
    assert len(groups) == 1
    assert problems == []
    assert "4 rows left out" in caplog.text


@pytest.mark.parametrize("value", ["", "  ", None, 3, ["x"], "no markers", "x" * 2_000_000])
def test_bad_row(tmp_path: Path, value: Any) -> None:
    good = {"chosen": f"{ASK} yes", "rejected": f"{ASK} no"}
    groups, problems = read(tmp_path, [good, {**good, "rejected": value}, good])
    assert len(groups) == 2
    assert [(p.line, p.field) for p in problems] == [(2, "rejected")]


def test_test_split_serves_as_validation(tmp_path: Path) -> None:
    good = {"chosen": f"{ASK} yes", "rejected": f"{ASK} no"}
    groups, problems = read(tmp_path, [good], "validation", "test")
    assert (len(groups), problems) == (1, [])
    assert HHRLHF("owner/name").parts("validation")[0].hub_split == "test"
    (tmp_path / "test.jsonl.gz").rename(tmp_path / "validation.jsonl.gz")
    problems = []
    assert len(list(HHRLHF(str(tmp_path)).read("validation", problems.append))) == 1
    assert problems == []
