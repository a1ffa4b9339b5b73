"""HelpSteer2 and HelpSteer: pairs, splits, multi-turn prompts, and every kind of bad row."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES as NAMES
from helpsteer2.data.groups import Group, read_all
from helpsteer2.data.sources.base import RowSource
from helpsteer2.data.sources.helpsteer import HelpSteer1, HelpSteer2, parse_turns
from helpsteer2.errors import DataError, Problem

REAL = os.environ.get("HELPSTEER2_REAL_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="HELPSTEER2_REAL_DATA is not set")


def row(prompt: str = "p", response: str = "r", **other: Any) -> dict[str, Any]:
    """One row of the default schema."""
    return {"prompt": prompt, "response": response, **dict.fromkeys(NAMES, 3), **other}


def pairs(n: int) -> list[dict[str, Any]]:
    return [row(f"p{i // 2}", f"r{i}") for i in range(2 * n)]


def write(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSONL; texts are written as they are."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    text = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def read(source: RowSource, split: str = "train") -> tuple[list[Group], list[Problem]]:
    problems: list[Problem] = []
    return list(source.read(split, problems.append)), problems


def test_consecutive_rows_are_a_pair(tmp_path: Path) -> None:
    rows = [
        row("a", "x", helpfulness=0, verbosity=None),
        row("a", "y", helpfulness=4.0),
        row("b", "z"),
        row("b", "w"),
    ]
    write(tmp_path / "train.jsonl", rows)
    groups, problems = read(HelpSteer2(str(tmp_path)))
    assert problems == []
    assert [g.responses for g in groups] == [("x", "y"), ("z", "w")]
    assert groups[0].attributes == ((0.0, 3.0, 3.0, 3.0, None), (4.0, 3.0, 3.0, 3.0, 3.0))
    assert groups[1].source == f"{tmp_path / 'train.jsonl'}:3"
    assert len({g.id for g in groups}) == 2
    assert groups[0].prompt == ({"role": "user", "content": "a"},)


def test_parquet_gives_the_same_groups(tmp_path: Path) -> None:
    """There a column with nulls is often one of floats."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [row(f"p{i // 2}", f"r{i}", verbosity=None if i % 3 else 2) for i in range(200)]
    (tmp_path / "jsonl").mkdir()
    write(tmp_path / "jsonl" / "train.jsonl", rows)
    table = pa.Table.from_pylist(rows)
    at = table.schema.get_field_index("verbosity")
    table = table.set_column(at, "verbosity", table["verbosity"].cast(pa.float64()))
    pq.write_table(table, tmp_path / "train.parquet")
    expected, _ = read(HelpSteer2(str(tmp_path / "jsonl")))
    groups, problems = read(HelpSteer2(str(tmp_path)))
    assert problems == []
    assert [(g.id, g.responses, g.attributes) for g in groups] == [
        (g.id, g.responses, g.attributes) for g in expected
    ]


def test_ids_differ_between_splits(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", pairs(3))
    source = HelpSteer2(str(tmp_path))
    ids = [g.id for split in ("train", "validation") for g in read(source, split)[0]]
    assert len(set(ids)) == 6


def test_turns_are_split_at_markers_and_kept_to_the_letter() -> None:
    prompt = " one\n\n<extra_id_1>Assistant\ntwo\n \n<extra_id_1>User\nthree <extra_id_1>User "
    turns = parse_turns(prompt)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert [turn["content"] for turn in turns] == [" one\n", "two\n ", "three <extra_id_1>User "]


BAD_ROWS: list[tuple[dict[str, Any], str, str]] = [
    ({"helpfulness": 5}, "helpfulness", "got 5"),
    ({"correctness": -1}, "correctness", "got -1"),
    ({"coherence": "3"}, "coherence", "got the text '3'"),
    ({"complexity": float("nan")}, "complexity", "got NaN"),
    ({"complexity": float("inf")}, "complexity", "got inf"),
    ({"verbosity": True}, "verbosity", "got true"),
    ({"verbosity": 10**400}, "verbosity", "expected a number"),
    ({"verbosity": {}}, "verbosity", "got an object"),
    ({"response": ""}, "response", "empty"),
    ({"response": " \n\t "}, "response", "empty"),
    ({"prompt": " "}, "prompt", "empty"),
    ({"response": None}, "response", "got null"),
    ({"response": 7}, "response", "got 7"),
    ({"response": "x" * 2_000_000}, "response", "2,000,000 characters"),
    ({"response": "\ud800"}, "response", "surrogate"),
    ({"prompt": "u\n<extra_id_1>Assistant\na"}, "prompt", "must end in a turn of the user"),
    ({"prompt": "u\n<extra_id_1>Assistant\n"}, "prompt", "must end in a turn of the user"),
]


@pytest.mark.parametrize(("change", "field", "says"), BAD_ROWS)
def test_bad_row_is_named_and_only_its_pair_is_lost(
    tmp_path: Path, change: dict[str, Any], field: str, says: str
) -> None:
    rows = pairs(3)
    rows[3].update(change)
    if "prompt" in change:
        rows[2].update(change)  # A pair shares its prompt.
    file = write(tmp_path / "train.jsonl", rows)
    groups, problems = read(HelpSteer2(str(tmp_path)))
    assert [g.responses[0] for g in groups] == ["r0", "r4"]
    assert {(p.file, p.field) for p in problems} == {(str(file), field)}
    assert [p.line for p in problems] == ([3, 4] if "prompt" in change else [4])
    assert all(says in p.message for p in problems)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    rows = pairs(20)
    rows[0].update(helpfulness=9, response="", verbosity="x")
    rows[39].update(coherence=True)
    write(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError) as error:
        list(read_all(HelpSteer2(str(tmp_path)), "train"))
    places = {(p.line, p.field) for p in error.value.problems}
    assert places == {(1, "helpfulness"), (1, "response"), (1, "verbosity"), (40, "coherence")}


def test_longest_text_is_configurable(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [row("p", "x" * 11), row("p", "x" * 10)])
    assert [p.line for p in read(HelpSteer2(str(tmp_path), max_characters=10))[1]] == [1]
    assert read(HelpSteer2(str(tmp_path), max_characters=11))[1] == []


def test_column_missing_in_one_row(tmp_path: Path) -> None:
    rows = pairs(30)
    rows[25]["helpfulnes"] = rows[25].pop("helpfulness")
    write(tmp_path / "train.jsonl", rows)
    groups, problems = read(HelpSteer2(str(tmp_path)))
    assert len(groups) == 29
    assert [(p.line, p.field) for p in problems] == [(26, "helpfulness")]
    assert "helpfulnes'" in problems[0].message


def test_misspelt_column_is_told_once_with_the_near_miss(tmp_path: Path) -> None:
    rows = [{("verbocity" if k == "verbosity" else k): v for k, v in r.items()} for r in pairs(50)]
    write(tmp_path / "train.jsonl", rows)
    groups, problems = read(HelpSteer2(str(tmp_path)))
    assert groups == []
    assert [(p.line, p.field) for p in problems] == [(None, "verbosity")]
    assert "is it 'verbocity'" in problems[0].message
    assert "coherence" in problems[0].message  # The columns found.


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"chosen": "a", "rejected": "b"}, "data=hh_rlhf"),
        ({"id": "a", "prompt": [], "responses": []}, "data=groups"),
        ({"question": "a", "answer": "b"}, "unknown schema"),
        (row(**{name: [1, 2] for name in NAMES}), "data.config=disagreements"),
    ],
)
def test_file_of_another_schema_is_one_message_not_thousands(
    tmp_path: Path, content: dict[str, Any], says: str
) -> None:
    write(tmp_path / "train.jsonl", [content] * 100)
    groups, problems = read(HelpSteer2(str(tmp_path)))
    assert groups == []
    assert [p.line for p in problems] == [None]
    assert says in problems[0].message


def test_odd_number_of_rows(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", pairs(3)[:-1])
    groups, problems = read(HelpSteer2(str(tmp_path)))
    assert len(groups) == 2
    assert [(p.line, p.field) for p in problems] == [(5, "prompt")]
    assert "odd number" in problems[0].message


def test_lost_row_costs_one_message_and_the_rest_still_pairs(tmp_path: Path) -> None:
    rows = pairs(50)
    del rows[10]
    write(tmp_path / "train.jsonl", rows)
    groups, problems = read(HelpSteer2(str(tmp_path)))
    assert len(groups) == 49
    assert all(int(g.responses[1][1:]) - int(g.responses[0][1:]) == 1 for g in groups)
    assert [p.line for p in problems] == [11]


def test_pair_with_two_prompts_names_both_rows(tmp_path: Path) -> None:
    rows = pairs(3)
    rows[3]["prompt"] = "another"
    write(tmp_path / "train.jsonl", rows)
    groups, problems = read(HelpSteer2(str(tmp_path)))
    assert len(groups) == 2
    assert [p.line for p in problems] == [3, 4]
    assert all("partner" in p.message for p in problems)


def test_unreadable_row_keeps_its_place_in_the_pair(tmp_path: Path) -> None:
    rows: list[Any] = pairs(5)
    rows[2] = '{"prompt": '
    rows[7] = "7"
    write(tmp_path / "train.jsonl", rows)
    groups, problems = read(HelpSteer2(str(tmp_path)))
    assert [g.responses for g in groups] == [("r0", "r1"), ("r4", "r5"), ("r8", "r9")]
    assert [p.line for p in problems] == [3, 8]


def preference(split: Any, strength: Any = -2, **other: Any) -> dict[str, Any]:
    return {
        "split": split,
        "prompt": f"p {split}",
        "response_1": "a",
        "response_2": "b",
        "preference_strength": strength,
        **other,
    }


@pytest.fixture
def preferences(tmp_path: Path) -> Callable[[list[Any]], HelpSteer2]:
    def make(rows: list[Any]) -> HelpSteer2:
        folder = tmp_path / "preference"
        folder.mkdir()
        write(folder / "preference.jsonl.gz", rows)
        return HelpSteer2(str(tmp_path), config="preference")

    return make


def test_preference_splits_never_mix_and_zeros_stay(
    preferences: Callable[[list[Any]], HelpSteer2],
) -> None:
    """The Hub hands out both splits under the name of train: the column decides."""
    source = preferences([preference("train"), preference("validation", 0), preference("train", 3)])
    train, problems = read(source)
    validation, _ = read(source, "validation")
    assert problems == []
    assert [g.preference_strength for g in train] == [-2, 3]
    assert [g.preference_strength for g in validation] == [0]
    assert {g.prompt[0]["content"] for g in train} == {"p train"}
    assert source.attribute_names == ()
    assert source.fingerprint("train") != source.fingerprint("validation")


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (preference("train", 4), "preference_strength"),
        (preference("train", 1.5), "preference_strength"),
        (preference("train", None), "preference_strength"),
        (preference("train", True), "preference_strength"),
        (preference("training"), "split"),
        (preference(None), "split"),
        (preference("train", response_2=" "), "response_2"),
    ],
)
def test_bad_preference(
    preferences: Callable[[list[Any]], HelpSteer2], bad: dict[str, Any], field: str
) -> None:
    groups, problems = read(preferences([preference("train"), bad]))
    assert len(groups) == 1
    assert [(p.line, p.field) for p in problems] == [(2, field)]


def disagreement(prompt: str, ratings: Any) -> dict[str, Any]:
    return row(prompt, **dict.fromkeys(NAMES, ratings))


def test_disagreements_keep_every_annotator_and_round_their_mean(tmp_path: Path) -> None:
    rows = [disagreement("p", [0, 1]), row("p", **dict.fromkeys(NAMES[1:]), helpfulness=[4, 4, 3])]
    file = write(tmp_path / "disagreements.jsonl", rows)
    groups, problems = read(HelpSteer2(str(file), config="disagreements"))
    assert problems == []
    assert groups[0].attributes == ((1.0,) * 5, (4.0, None, None, None, None))
    assert groups[0].annotations == (((0, 1),) * 5, ((4, 4, 3), (), (), (), ()))


@pytest.mark.parametrize("ratings", [[5], [1.5], ["3"], [True], [None], "3", 3])
def test_bad_annotations(tmp_path: Path, ratings: Any) -> None:
    rows = [disagreement("p", [1, 2]), disagreement("p", [1, 2])]
    rows += [
        disagreement("q", [1]),
        row("q", **{**{name: [1] for name in NAMES}, "verbosity": ratings}),
    ]
    file = write(tmp_path / "disagreements.jsonl", rows)
    groups, problems = read(HelpSteer2(str(file), config="disagreements"))
    assert len(groups) == 1
    assert [p.line for p in problems] == [4]
    assert str(problems[0].field).startswith("verbosity")


def test_disagreements_never_train_on_validation_prompts(tmp_path: Path) -> None:
    write(tmp_path / "validation.jsonl", [row("held out"), row("held out")])
    prompts = ["a", "held out", "b"]
    write(tmp_path / "disagreements.jsonl", [disagreement(p, [1]) for p in prompts for _ in "12"])
    source = HelpSteer2(str(tmp_path), config="disagreements")
    train, validation = read(source)[0], read(source, "validation")[0]
    assert [g.prompt[0]["content"] for g in train] == ["a", "b"]
    assert [g.prompt[0]["content"] for g in validation] == ["held out"]
    before = source.fingerprint("train")
    write(tmp_path / "validation.jsonl", [row("b"), row("b")])
    assert source.fingerprint("train") != before
    (tmp_path / "validation.jsonl").unlink()
    assert any("validation.jsonl" in p.message for p in read(source)[1])


def test_fingerprint_knows_settings(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", pairs(2))
    path = str(tmp_path)
    prints = {
        HelpSteer2(path).fingerprint("train"),
        HelpSteer2(path, max_characters=10).fingerprint("train"),
        HelpSteer1(path).fingerprint("train"),
    }
    assert len(prints) == 3


def test_helpsteer1_gathers_up_to_four(tmp_path: Path) -> None:
    prompts = ["a"] * 4 + ["b"] + ["c"] * 3 + ["d"] * 5
    write(tmp_path / "train.jsonl", [row(p, f"r{i}") for i, p in enumerate(prompts)])
    groups, problems = read(HelpSteer1(str(tmp_path)))
    assert problems == []
    assert [len(g.responses) for g in groups] == [4, 1, 3, 4, 1]
    assert [r for g in groups for r in g.responses] == [f"r{i}" for i in range(len(prompts))]


def real(path: str) -> str:
    return str(Path(REAL or "") / path)


@needs_real_data
def test_real_helpsteer2() -> None:
    source = HelpSteer2(real("helpsteer2_slice"))
    for split, n in (("train", 3895), ("validation", 248)):
        groups = list(read_all(source, split))
        assert len(groups) == n
        assert all(g.prompt[-1]["role"] == "user" for g in groups)
        roles = [[m["role"] for m in g.prompt] for g in groups]
        assert all(a != b for one in roles for a, b in itertools.pairwise(one))
        assert 0.15 < sum(len(one) > 1 for one in roles) / n < 0.35
        assert not any("<extra_id_1>" in m["content"] for g in groups for m in g.prompt)


@needs_real_data
def test_real_disagreements_agree_with_the_labels() -> None:
    """Half up is right more often than wrong where a mean of two ratings is exactly halfway."""
    folder = real("helpsteer2_slice")
    source = HelpSteer2(folder, config="disagreements")
    train, validation = (list(read_all(source, split)) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (1072, 72)
    default = {
        (g.prompt[-1]["content"], r): ratings
        for g in read_all(HelpSteer2(folder), "train")
        for r, ratings in zip(g.responses, g.attributes or (), strict=True)
    }
    right = halfway = 0
    for g in train:
        for r, ours, given in zip(
            g.responses, g.attributes or (), g.annotations or (), strict=True
        ):
            theirs = default[g.prompt[-1]["content"], r]
            for label, mine, ratings in zip(theirs, ours, given, strict=True):
                if ratings and (2 * sum(ratings) / len(ratings)) % 2 == 1:
                    halfway += 1
                    right += label == mine
    assert halfway > 1000
    assert right / halfway > 0.7


@needs_real_data
def test_real_single_files() -> None:
    first = list(
        read_all(HelpSteer2(real("helpsteer2_first100/helpsteer2_train_first100.jsonl")), "train")
    )
    assert len(first) == 50
    assert all(None not in ratings for g in first for ratings in g.attributes or ())
    one = list(read_all(HelpSteer1(real("helpsteer1_500/helpsteer1_sample500.jsonl")), "train"))
    assert sum(len(g.responses) for g in one) == 500
    assert max(len(g.responses) for g in one) == 4
