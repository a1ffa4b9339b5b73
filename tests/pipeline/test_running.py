"""What runs, what is skipped, and what is refused, with stages that take no time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpsteer2.errors import ConfigError, UserError
from tests.pipeline import recipe
from tests.pipeline.conftest import Place

SWEEP = ("-m", "+pipeline.weights={helpfulness: 1.0},{helpfulness: 0.5}")


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was said of each stage."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    return [line.partition("] ")[2].partition(";")[0].partition(",")[0] for line in lines]


def test_stages_run_once_in_order(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.run()
    assert [line.partition(":")[0] for line in said(capsys)] == [
        name for name in ("first", "second", "third") for _ in range(2)
    ]
    entries = place.manifest()
    assert [entry["status"] for entry in entries] == ["run"] * 3
    assert list(place.starts().values()) == [1, 1, 1]
    first, second, third = entries
    assert list(second["inputs"]) == [f"{Path(first['folder']).name}/export"]
    assert set(first["outputs"]) == {"export/weights.txt", "groups.jsonl"}
    assert all(entry["wall_seconds"] > 0 for entry in entries)
    result = json.loads((place.folder / "run" / "result.json").read_text())
    assert result["metrics"] == {"third": {"weight": 1.0}}
    assert (place.stage("second") / "stage.log").read_text().startswith("learning from /")
    assert third["command_line"].split()[2] == "weigh"

    before = {file: file.stat().st_mtime_ns for file in place.stages_dir.rglob("*.txt")}
    place.run()
    assert said(capsys) == ["first: done before", "second: done before", "third: done before"]
    assert place.starts().total() == 3
    assert [entry["status"] for entry in place.manifest()] == ["skipped"] * 3
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())


def test_a_sweep_of_weights_trains_the_models_once(place: Place) -> None:
    place.launch("optimized_metric=third/weight", *SWEEP)
    names = [name.partition("-")[0] for name in place.starts().elements()]
    assert sorted(names) == ["first", "second", "third", "third"]
    assert place.stage("second", "run/0") == place.stage("second", "run/1")
    assert place.stage("third", "run/0") != place.stage("third", "run/1")
    # What a sweeper sees.
    notes = [json.loads(p.read_text()) for p in sorted((place.folder / "run/jobs").glob("*.json"))]
    assert [note["value"] for note in notes] == [1.0, 0.5]


def test_seed_and_data_decide_where_a_stage_lies(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.run()
    folder = place.stage("third")
    place.run(seed=2)
    assert place.stage("third") != folder
    place.data.write_text("something else")
    capsys.readouterr()
    place.run(dry_run=True)
    table = capsys.readouterr().out
    assert "data: the input changed; seed: 2 → 1 (since first-" in table
    assert "model: the input changed (since third-" in table
    assert place.starts().total() == 6
    place.run()
    assert place.starts().total() == 9
    # A copy of the old data is the old data.
    copy = place.folder / "copy.txt"
    copy.write_text("what everything depends on")
    place.run(data=str(copy))
    assert place.starts().total() == 9
    assert place.stage("third") == folder


def test_dry_run_tells_why_and_leaves_nothing(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.run(dry_run=True)
    assert capsys.readouterr().out.count("never ran") == 3
    assert not place.stages_dir.exists()
    assert not (place.folder / "run").exists()
    place.run()
    capsys.readouterr()
    place.run(dry_run=True, second={"rate": 0.2})
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [row[3].strip() for row in rows] == ["done", "would run", "would run"]
    assert "rate: 0.1 → 0.2 (since second-" in rows[1][4]


def test_dry_run_may_be_typed_as_a_flag(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.launch("--dry-run")
    assert capsys.readouterr().out.count("never ran") == 3
    assert not place.stages_dir.exists()


def test_every_mistake_of_every_stage_comes_before_the_first_runs(place: Place) -> None:
    with pytest.raises(ConfigError) as caught:
        place.run(first={"rat": 1}, second={"steps": "many"}, third={"exta": 1})
    text = str(caught.value)
    assert "stage first: " in text
    assert "did you mean rate?" in text
    assert "stage second: " in text
    assert "steps" in text
    assert "stage third: " in text
    assert not place.stages_dir.exists()


def test_a_failing_stage_is_told_with_its_last_lines(place: Place) -> None:
    with pytest.raises(UserError) as caught:
        place.run(second={"behaviour": "fails"})
    text = str(caught.value)
    assert "stage second failed with exit code 1" in text
    assert "stage.log" in text
    assert "\nthe loss is not finite\nthis stage always fails\n" in text
    assert [entry["status"] for entry in place.manifest()] == ["run", "failed", "waiting"]
    with pytest.raises(UserError, match="second failed"):
        place.run(second={"behaviour": "fails"})
    assert [count for _, count in sorted(place.starts().items())] == [1, 2]


def test_a_stage_without_result_has_not_finished(place: Place) -> None:
    with pytest.raises(UserError, match=r"first ended without a result\.json"):
        place.run(first={"behaviour": "silent"})


def test_an_edited_output_is_named(place: Place) -> None:
    place.run()
    weights = place.stage("first") / "export" / "weights.txt"
    before = weights.read_text()
    weights.write_text("better ones")
    (place.stage("second") / "groups.jsonl").unlink()
    for dry_run in (True, False):
        with pytest.raises(UserError) as caught:
            place.run(dry_run=dry_run)
        assert f"{place.stage('first')}: export/weights.txt" in str(caught.value)
        assert f"{place.stage('second')}: groups.jsonl" in str(caught.value)
        assert "delete the folder" in str(caught.value)
    weights.write_text(before)
    for name in ("second", "third"):
        shutil.rmtree(place.stage(name))
    place.run()
    names = [name.partition("-")[0] for name in place.starts().elements()]
    assert sorted(names) == ["first", "second", "second", "third", "third"]


def test_a_record_of_times_and_versions_is_no_output(place: Place) -> None:
    place.run()
    # As the stage's own command line writes it, run once more by hand.
    folder = place.stage("third")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "wall_seconds": 12.5}))
    place.run()
    assert place.starts().total() == 3
    with pytest.raises(ConfigError, match=r"'result\.json' is no output of a stage"):
        place.run(third={"extra": ["@first/result.json"]})
    # The pipeline tells its metrics: without it the stage is not done.
    (folder / "result.json").unlink()
    place.run()
    assert place.starts()[folder.name] == 2


@pytest.mark.parametrize("name", ["second", "third"])
def test_a_stage_of_other_inputs_is_set_aside(
    name: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    # Also one whose readers are done: they are of the old inputs too.
    place.run()
    stage = place.stage(name)
    record = stage / "stage.json"
    content = json.loads(record.read_text())
    content["reads"] = dict.fromkeys(content["reads"], "of an earlier run of the stage before")
    record.write_text(json.dumps(content))
    place.run()
    assert "was made again and is not the same" in capsys.readouterr().out
    assert (stage.with_name(f"{stage.name}.old1") / "groups.jsonl").exists()
    assert place.starts()[stage.name] == 2
    place.run()
    assert place.starts()[stage.name] == 2


def test_deleted_intermediate_stages_are_not_made_again(place: Place) -> None:
    place.run()
    shutil.rmtree(place.stage("first"))
    place.run()
    assert place.starts().total() == 3
    assert [e["status"] for e in place.manifest()] == ["unneeded", "skipped", "skipped"]
    shutil.rmtree(place.stage("third"))
    place.run()
    assert place.starts().total() == 4
    shutil.rmtree(place.stage("second"))
    shutil.rmtree(place.stage("third"))
    place.run()
    assert place.starts().total() == 7


def test_what_was_not_needed_is_made_if_another_stage_comes_out_differently(place: Place) -> None:
    place.run(kind=recipe.Apart)
    weighed = place.stage("both")
    for name in ("steady", "noisy"):
        shutil.rmtree(place.stage(name))
    # At first only the noisy model is wanted; then what was weighed of it is out of date.
    for status in ("run", "skipped"):
        place.run(kind=recipe.Apart, is_read_again=True)
        assert [entry["status"] for entry in place.manifest()] == [status] * 4
        starts = {name.partition("-")[0]: count for name, count in place.starts().items()}
        assert starts == {"steady": 2, "noisy": 2, "both": 2, "again": 1}
    assert weighed.with_name(f"{weighed.name}.old1").is_dir()


def test_no_file_is_hashed_twice(place: Place, hashed_files: list[str]) -> None:
    place.stages_dir.mkdir()
    place.run(dry_run=True)
    assert hashed_files == [str(place.data)]
    place.run()
    place.run(dry_run=True)
    place.run()
    assert len(hashed_files) == len(set(hashed_files)) > 1


def test_a_damaged_record_is_named(place: Place) -> None:
    place.run()
    record = place.stage("second") / "stage.json"
    record.write_text(record.read_text()[:-20])
    with pytest.raises(UserError, match=r"second-[0-9a-f]+/stage\.json is damaged"):
        place.run()


def test_an_unwritable_folder_is_named(place: Place) -> None:
    place.stages_dir.write_text("a file is in the way")
    for dry_run in (True, False):
        with pytest.raises(ConfigError) as caught:
            place.run(dry_run=dry_run)
        assert str(caught.value) == f"stages_dir: {place.stages_dir} is a file, not a folder"


def test_what_lies_in_the_working_directory_is_in_nobodys_way(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = place.folder / "here"
    here.mkdir()
    (here / "run").write_text("a file of the user")
    monkeypatch.chdir(here)
    place.run(dry_run=True)


def test_a_full_disk_is_told_and_can_be_mended(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from helpsteer2.pipeline import process

    def full(self: process.StageProcess, *arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(process.StageProcess, "_start", full)
        with pytest.raises(UserError, match="No space left on device"):
            place.run()
    place.run()
    assert list(place.starts().values()) == [1, 1, 1]
