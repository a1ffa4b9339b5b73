from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.errors import UserError
from helpsteer2.pipeline.contents import Contents
from helpsteer2.pipeline.fingerprint import CONTENT, changes, dependencies, fingerprint_of


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    return Contents(tmp_path / "memory" / "contents.json")


def test_a_folder_is_known_by_its_files(tmp_path: Path, contents: Contents) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "one.txt").write_text("1")
        (tmp_path / name / "inner" / "two.txt").write_text("2")
        (tmp_path / name / f".{name}").write_text(name)
    digest = contents.of_path(tmp_path / "a")
    assert contents.of_path(tmp_path / "b") == digest
    for change in (
        lambda: (tmp_path / "b" / "one.txt").write_text("2"),
        lambda: (tmp_path / "b" / "one.txt").rename(tmp_path / "b" / "uno.txt"),
        lambda: (tmp_path / "b" / "three.txt").write_text(""),
    ):
        before = contents.of_path(tmp_path / "b")
        change()
        assert contents.of_path(tmp_path / "b") not in (before, digest)


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, hashed_files: list[str]) -> None:
    file, memory = tmp_path / "big", tmp_path / "contents.json"
    file.write_text("one")

    def digest() -> str:
        time.sleep(0.01)
        hashed = Contents(memory)
        value = hashed.of_file(file)
        hashed.save()
        return value

    assert digest() == digest()
    assert len(hashed_files) == 1
    # Same size, and the time of the change put back.
    times = file.stat()
    before = digest()
    file.write_text("two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest() != before
    memory.write_text("{damaged")
    assert digest() != before
    with pytest.raises(UserError, match="cannot read"):
        Contents(memory).of_file(tmp_path / "missing")


def test_a_file_is_read_once_in_a_process(
    tmp_path: Path, contents: Contents, hashed_files: list[str]
) -> None:
    file = tmp_path / "big"
    file.write_text("one")
    time.sleep(0.01)
    assert len({contents.of_file(file) for _ in range(3)}) == 1
    assert len(hashed_files) == 1
    # What is remembered of a folder that nothing has run in does not make it.
    contents.save()
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_just_changed_is_read_again(tmp_path: Path, contents: Contents) -> None:
    file = tmp_path / "file"
    (tmp_path / "memory").mkdir()
    digests = set()
    for text in "abcdefgh":
        file.write_text(text)
        digests.add(contents.of_file(file))
        contents.save()
    assert len(digests) == 8


def config(**changed: Any) -> dict[str, Any]:
    return {
        "run_dir": "x",
        "seed": 1,
        "data": {"path": "hub/name", "split": "train"},
        "trainer": {"devices": 1, "precision": "32-true"},
        "models": ["stage:sft-0123456789ab/export"],
    } | changed


def test_a_fingerprint_follows_what_decides_the_result(tmp_path: Path, contents: Contents) -> None:
    def of(**changed: Any) -> str:
        return fingerprint_of(dependencies("train", config(**changed), contents))

    same = of()
    trainer = {"devices": 8, "precision": "32-true"}
    assert of(run_dir="y", cache_dir="z", logger={"a": 1}, trainer=trainer) == same
    others = [
        of(seed=2),
        of(trainer={"devices": 1, "precision": "bf16-mixed"}),
        of(models=["stage:sft-ba9876543210/export"]),
        of(data={"path": "hub/other", "split": "train"}),
        fingerprint_of(dependencies("evaluate", config(), contents)),
    ]
    assert len({same, *others}) == 6


def test_a_path_stands_for_what_lies_there(
    tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("{}")
    # A word that happens to be the name of a folder is no path.
    (tmp_path / "train").mkdir()
    found = {
        path: dependencies("train", config(data={"path": path, "split": "train"}), contents)
        for path in ("one", str(tmp_path / "two"), "two/train.jsonl")
    }
    assert found["one"]["data.split"] == "train"
    assert found["one"]["data.path"].startswith(CONTENT)
    assert found["one"] == found[str(tmp_path / "two")] != found["two/train.jsonl"]
    (tmp_path / "one" / "train.jsonl").write_text("{ }")
    now = dependencies("train", config(data={"path": "one", "split": "train"}), contents)
    assert changes(found["one"], now) == ["data.path: the input changed"]
    assert changes(now, {**now, "seed": 2}) == ["seed: 1 → 2"]
