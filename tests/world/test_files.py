"""The tables come back from the project's own reader as they were made."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.data.checks import detect_schema
from helpsteer2.data.groups import Group, read_all
from helpsteer2.data.sources.helpsteer import HelpSteer2
from helpsteer2.errors import UserError
from helpsteer2.world.files import SPLITS, write_tables
from helpsteer2.world.source import WorldSource

SOURCE = WorldSource(groups=60, seed=3, validation_groups=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_tables(SOURCE, folder)
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def without(group: Group, *names: str) -> Group:
    return replace(group, id="", source="", **dict.fromkeys(names))


@pytest.mark.parametrize("split", SPLITS)
def test_every_table_reads_back_equal(folder: Path, split: str) -> None:
    made = list(read_all(SOURCE, split))
    assert any(len(group.prompt) > 1 for group in made)
    default = read_all(HelpSteer2(str(folder)), split)
    for read, group in zip(default, made, strict=True):
        assert without(read) == without(group, "annotations", "preference_strength")
    preference = read_all(HelpSteer2(str(folder), "preference"), split)
    for read, group in zip(preference, made, strict=True):
        assert without(read) == without(group, "annotations", "attributes")
    disagreements = read_all(HelpSteer2(str(folder), "disagreements"), split)
    for read, group in zip(disagreements, made, strict=True):
        assert without(read, "attributes") == without(group, "attributes", "preference_strength")


def test_the_schemas_are_the_hubs(folder: Path) -> None:
    tables = {
        "helpsteer2": "train.jsonl.gz",
        "preference": "preference/preference.jsonl.gz",
        "disagreements": "disagreements/disagreements.jsonl.gz",
    }
    for schema, name in tables.items():
        assert detect_schema(rows(folder / name)) == schema
    for row in rows(folder / tables["preference"]):
        unprocessed = [one["strength"] for one in row["all_preferences_unprocessed"]]
        similar = [one["strength"] for one in row["three_most_similar_preferences"]]
        assert len(unprocessed) in (3, 4, 5)
        assert len(similar) == 3
        assert round(sum(similar) / 3) == row["preference_strength"]
        assert (row["preference_statement"] is None) == (row["preference_strength"] == 0)
    assert all(isinstance(row["helpfulness"], int) for row in rows(folder / "train.jsonl.gz"))


def test_statements_say_what_the_strength_means(folder: Path) -> None:
    for row in rows(folder / "preference/preference.jsonl.gz"):
        if row["preference_strength"] == -3:
            assert row["preference_statement"] == "Response 1 is much better than Response 2."
        if row["preference_strength"] == 1:
            assert row["preference_statement"] == "Response 2 is slightly better than Response 1."


def test_the_same_world_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    for path in write_tables(SOURCE, tmp_path):
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes()


def test_oracle_ratings_are_written_as_they_are(tmp_path: Path) -> None:
    source = replace(SOURCE, ratings="oracle")
    write_tables(source, tmp_path)
    read = read_all(HelpSteer2(str(tmp_path)), "train")
    assert [g.attributes for g in read] == [g.attributes for g in read_all(source, "train")]


def test_only_pairs_fit_the_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.responses=2"):
        write_tables(replace(SOURCE, responses=4), tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_tables(SOURCE, tmp_path / "file")
