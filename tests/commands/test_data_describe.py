"""``helpsteer2 data describe``: what it reads, prints and writes."""

from __future__ import annotations

import gzip
import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES as NAMES
from helpsteer2.commands import data_report
from helpsteer2.commands.data import main
from helpsteer2.errors import ConfigError, UserError

pytest.importorskip("matplotlib")

PNG = b"\x89PNG\r\n\x1a\n"
USER = {"role": "user", "content": "question"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds, and most tests do not look at figures."""
    monkeypatch.setattr(data_report, "write_figures", lambda *arguments: [])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def group(number: int, **other: Any) -> dict[str, Any]:
    return {"id": str(number), "prompt": [USER], "responses": ["a", "bcd"], **other}


def rated(number: int, first: int, second: int, **other: Any) -> dict[str, Any]:
    ratings = [{"helpfulness": first}, {"helpfulness": second}]
    return group(number, attributes=ratings, **other)


def describe(*arguments: str) -> dict[str, Any]:
    assert main(["describe", *arguments, "--out", "made"]) == 0
    found: dict[str, Any] = json.loads(Path("made/description.json").read_text())
    return found


@pytest.mark.usefixtures("no_figures")
def test_splits_are_described_one_by_one_and_together(tmp_path: Path) -> None:
    write(tmp_path / "data/train.jsonl", [rated(i, i % 5, 4) for i in range(10)])
    write(tmp_path / "data/validation.jsonl", [rated(i, 0, 1) for i in range(4)])
    found = describe("data")
    assert list(found["splits"]) == ["train", "validation", "all"]
    groups = {split: figures["groups"] for split, figures in found["splits"].items()}
    assert groups == {"train": 10, "validation": 4, "all": 14}
    values = [x for i in range(10) for x in (i % 5, 4)] + [0, 1] * 4
    together = found["splits"]["all"]["columns"]["helpfulness"]
    assert together["mean"] == pytest.approx(statistics.mean(values))
    assert together["std"] == pytest.approx(statistics.stdev(values))
    prints = {split: found["splits"][split].get("fingerprint") for split in groups}
    assert prints["train"] != prints["validation"]
    assert prints["all"] is None
    (alone,) = describe("data", "--split", "validation")["splits"]
    assert alone == "validation"


def test_everything_is_written_and_says_where_it_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = [{"helpfulness": [1, 2, 1]}, {"helpfulness": [2, 1, 4]}]
    rows = [
        rated(i, i % 3, 2, annotations=annotations, preference_strength=i % 7 - 3)
        for i in range(21)
    ]
    write(tmp_path / "train.jsonl", rows)
    found = describe(str(tmp_path))
    files = {path.name for path in Path("made").iterdir()}
    images = {"ratings.png", "lengths.png", "preferences.png", "correlations.png"}
    assert files == images | {"description.json", "description.md"}
    assert all((Path("made") / name).read_bytes().startswith(PNG) for name in images)
    assert found["command"] == f"helpsteer2 data describe {tmp_path} --out made"
    assert found["environment"]["packages"]["helpsteer2"]
    text = Path("made/description.md").read_text()
    assert all(f"({name})" in text for name in images)
    printed = capsys.readouterr().out
    for said in ("21 preferences, 14.3% ties", "raters a response", "κ, both orders", "diverging"):
        assert said in " ".join(printed.split())
        assert said in text
    assert "n − 1" in text
    # Raters differ by +1, −1 and +3.
    shares = found["splits"]["train"]["raters"]["all"]["preferences"]["shares"]
    assert shares["diverging"]["value"] == 1.0
    assert shares["substantially diverging"]["value"] == 0.0
    assert describe(str(tmp_path)) == found


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("annotations", "why"),
    [
        ([{"helpfulness": [1]}, {"helpfulness": [2]}], "none of the 3 has"),
        ([{"helpfulness": [1, 2]}, {"helpfulness": [2, 2, 1]}], "none of the 3 has"),
        ([{"helpfulness": [1, 2]}], "no prompt has two responses"),
        ([{"wit": [1, 2]}, {"wit": [2, 2]}], "no attribute is named helpfulness"),
    ],
)
def test_why_no_preferences_of_raters_are_compared_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], annotations: list[Any], why: str
) -> None:
    (name,) = annotations[0]
    ratings = [{name: 1.0}] * len(annotations)
    texts = ["a", "b"][: len(annotations)]
    rows = [
        group(i, responses=texts, attributes=ratings, annotations=annotations) for i in range(3)
    ]
    write(tmp_path / "train.jsonl", rows)
    describe(str(tmp_path))
    for text in (capsys.readouterr().out, Path("made/description.md").read_text()):
        said = " ".join(text.split())
        assert "preferences of single raters" in said
        assert "0 pairs compared: " in said
        assert why in said
        assert "one-sided |" not in said


@pytest.mark.usefixtures("no_figures")
def test_data_of_conf_with_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    found = describe("world", "data.groups=30", "data.validation_groups=10")
    assert found["kind"] == "WorldSource"
    assert found["splits"]["all"]["groups"] == 40
    # An override may stand behind an option as well.
    found = describe("world", "--split", "train", "data.groups=12")
    assert found["splits"]["train"]["groups"] == 12
    assert found["splits"]["train"]["columns"]["verbosity"]["known"] == 24


@pytest.mark.usefixtures("no_figures")
def test_folds_cut_what_they_are_given(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{i // 2}", "response": "r", **dict.fromkeys(NAMES, i % 5)} for i in range(60)
    ]
    write(tmp_path / "data/train.jsonl", rows)
    write(tmp_path / "data/validation.jsonl", [{**row, "prompt": "v"} for row in rows[:2]])
    found = describe("folds", "data@data.of=local", "data.of.path=data", "data.fold=1")
    groups = [figures["groups"] for figures in found["splits"].values()]
    assert groups[0] + groups[1] == groups[2] == 31
    assert groups[1] > 0


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["wrld"], UserError, "no such data: there are"),
        (["world", "--schema", "groups"], UserError, "--schema goes with a path"),
        (["./here.jsonl", "data.seed=1"], UserError, "go with a name of conf/data"),
        (["world", "data.sed=1"], ConfigError, "did you mean seed?"),
        (["world", "data.groups=few"], ConfigError, "data.groups: expected int"),
        (["local"], ConfigError, "data.path"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, arguments: list[str], error: type[UserError], says: str
) -> None:
    write(tmp_path / "here.jsonl", [group(1)])
    with pytest.raises(error, match=re.escape(says)):
        main(["describe", *arguments])
    assert not Path("outputs").exists()


@pytest.mark.usefixtures("no_figures")
def test_a_folder_named_like_a_name_is_read_as_a_path(tmp_path: Path) -> None:
    write(tmp_path / "world/train.jsonl", [group(1)])
    assert describe("./world")["kind"] == "groups"


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["describe", "world", "--bogus"], ["validate", "here.jsonl", "data.seed=1"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "unrecognized arguments" in capsys.readouterr().err


def test_nothing_is_written_where_there_is_nothing(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{**group(1), "responses": []}])
    assert main(["describe", "train.jsonl"]) == 1
    assert not Path("outputs").exists()


def test_a_file_is_no_folder_to_write_to(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [group(1)])
    with pytest.raises(UserError, match="is a file, not a folder"):
        main(["describe", "train.jsonl", "--out", "train.jsonl"])


@pytest.mark.usefixtures("no_figures")
def test_real_slice_against_figures_computed_from_the_file(real_data: Path) -> None:
    folder = real_data / "helpsteer2_slice"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    found = describe(str(folder), "--split", "validation")["splits"]["validation"]
    lines = gzip.decompress((folder / "validation.jsonl.gz").read_bytes()).splitlines()
    rows = [json.loads(line) for line in lines]
    helpfulness = np.array([row["helpfulness"] for row in rows], dtype=float)
    measured: dict[str, Any] = {name: [row[name] for row in rows] for name in NAMES}
    measured["response characters"] = [len(row["response"]) for row in rows]
    measured["prompt turns"] = [row["prompt"].count("<extra_id_1>") + 1 for row in rows]
    for name, values in measured.items():
        column = np.array(values, dtype=float)
        known = ~np.isnan(column)
        both = known & ~np.isnan(helpfulness)
        told = found["columns"][name]
        assert told["known"] == known.sum()
        assert told["mean"] == pytest.approx(column[known].mean())
        assert told["std"] == pytest.approx(column[known].std(ddof=1))
        correlation = np.corrcoef(column[both], helpfulness[both])[0, 1]
        assert told["pearson_with_helpfulness"] == pytest.approx(correlation)


@pytest.mark.usefixtures("no_figures")
def test_real_disagreements_have_a_kappa(
    real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = real_data / "helpsteer2_slice" / "disagreements.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    found = describe(str(file))
    raters = found["splits"]["train"]["raters"]["all"]
    assert raters["prompts"] > 500
    # One rater of helpfulness each: there is nothing to compare, which must not go unsaid.
    assert raters["preferences"]["compared"] == 0
    assert "0 pairs compared: a pair needs" in " ".join(capsys.readouterr().out.split())
    several = [of for of in raters["attributes"].values() if of["pairs"]]
    assert len(several) > 1
    for of_attribute in several:
        kappa = of_attribute["kappa"]["both_orders"]
        assert -1 <= kappa["low"] <= kappa["value"] <= kappa["high"] <= 1
