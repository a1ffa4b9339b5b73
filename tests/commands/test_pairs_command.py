from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands.launch import launch
from helpsteer2.config.checked import check
from helpsteer2.data.groups import Group, read_all
from helpsteer2.data.sources.group_files import GroupFiles, write_groups
from helpsteer2.errors import ConfigError, DataError, UserError
from helpsteer2.world.source import WorldSource
from tests.full_disk import largest_file

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(sys, "argv", ["helpsteer2"])

    def call(*overrides: str) -> dict[str, Any]:
        try:
            given = [f"run_dir={tmp_path / 'run'}", *overrides]
            assert launch(CONFIG_COMMANDS["pairs"], given) == 0
        finally:
            GlobalHydra.instance().clear()
        result: dict[str, Any] = json.loads((tmp_path / "run" / "result.json").read_text())
        return result

    return call


def read_back(folder: Path, split: str = "train") -> list[Group]:
    return list(read_all(GroupFiles(str(folder / "run")), split))


def test_pairs_of_any_data_set_are_groups_that_can_be_read(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["data=world", "data.groups=40", "data.seed=3", "data.ratings=annotators"]
    result = run(*overrides, "data.validation_groups=30")
    groups = list(read_all(WorldSource(groups=40, seed=3, validation_groups=30), "train"))
    decided = [g for g in groups if g.attributes and g.attributes[0][0] != g.attributes[1][0]]
    metrics = result["metrics"]["train"]
    assert (metrics["groups"], metrics["pairs"]) == (40, len(decided))
    assert metrics["ties"] == 40 - len(decided) > 0
    assert result["kind"] == "pairs"
    assert result["config"]["by"] == "ratings"
    assert {"packages", "git", "hardware"} <= result["environment"].keys()
    pairs = read_back(tmp_path)
    assert [pair.id for pair in pairs] == [group.id for group in decided]
    for pair, group in zip(pairs, decided, strict=True):
        assert pair.attributes == group.attributes
        assert group.attributes is not None
        helpfulness = [ratings[0] for ratings in group.attributes]
        assert list(pair.rewards or ()) == helpfulness
        better = helpfulness.index(max(helpfulness))  # type: ignore[type-var]
        assert ((pair.preference_strength or 0) > 0) == (better == 1)
    held_out = read_back(tmp_path, "validation")
    assert len(held_out) == result["metrics"]["validation"]["pairs"]
    assert not {pair.id for pair in held_out} & {pair.id for pair in pairs}
    output = capsys.readouterr().out
    assert "pairs of 'validation' by ratings" in output
    assert f"{metrics['ties']}" in output
    assert "all responses are worth the same" in output
    assert max(len(line) for line in output.splitlines() if "wrote" not in line) <= 100


def test_a_preference_is_taken_as_it_is(run: Run, tmp_path: Path) -> None:
    metrics = run("data=world", "data.groups=30", "by=preference")["metrics"]["train"]
    source = WorldSource(groups=30, seed=0, validation_groups=1)
    strengths = {g.id: g.preference_strength for g in read_all(source, "train")}
    pairs = read_back(tmp_path)
    assert metrics["pairs"] == len(pairs) == sum(map(bool, strengths.values()))
    assert all(pair.preference_strength == strengths[pair.id] for pair in pairs)
    assert all(pair.rewards is None for pair in pairs)


def sampled(n: int) -> list[Group]:
    """Groups as a sampler and a reward model leave them."""
    return [
        Group(
            id=str(i),
            source="made up",
            prompt=({"role": "user", "content": f"question {i}"},),
            responses=tuple(f"answer {j}" for j in range(3)),
            response_ids=tuple((i, j, 2) for j in range(3)),
            tokenizer="hash",
            finish_reasons=("stop", "length", "stop"),
            logprobs=tuple((-0.5, -0.25, float(-j)) for j in range(3)),
            scores=tuple((float(j * (-1) ** i), 0.5, 0.5, 7.0, -3.0) for j in range(3)),
            score_names=HELPSTEER2_ATTRIBUTES,
        )
        for i in range(n)
    ]


def test_scored_samples_keep_their_ids_and_log_probabilities(run: Run, tmp_path: Path) -> None:
    write_groups(tmp_path / "samples.jsonl", sampled(4), ())
    path = tmp_path / "samples.jsonl"
    overrides = ["data=groups", f"data.path={path}", "by=scores", "splits=[train]"]
    result = run(*overrides, "weights=helpsteer2_rlhf", "min_gap=1.2")
    metrics = result["metrics"]["train"]
    assert metrics["pairs"] == 4
    for group, pair in zip(sampled(4), read_back(tmp_path), strict=True):
        assert pair.responses == ("answer 0", "answer 2")
        assert pair.response_ids == (group.response_ids or ())[::2]
        assert pair.logprobs == (group.logprobs or ())[::2]
        assert pair.finish_reasons == ("stop", "stop")
        assert pair.tokenizer == "hash"
        assert pair.preference_strength == (1 if int(group.id) % 2 == 0 else -1)
        expected = [0.65 * group.scores[j][0] + 0.625 for j in (0, 2)]  # type: ignore[index]
        assert list(pair.rewards or ()) == pytest.approx(expected)
    with pytest.raises(UserError, match=r"no pair is left.*4 difference below min_gap"):
        run(*overrides, "weights=helpsteer2_rlhf", "min_gap=1.4")


def test_what_cannot_be_paired_leaves_the_older_pairs_as_they_were(
    run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "samples.jsonl"
    write_groups(path, sampled(2), ())
    overrides = ["data=groups", f"data.path={path}", "splits=[train]", "by=scores"]
    run(*overrides)
    kept = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="'helpfulness_only' need helpfulness, but the ratings"):
        run(*overrides[:3], "by=ratings")
    with pytest.raises(UserError, match=r"no pair is left.*2 ratings, scores or preference miss"):
        run(*overrides[:3], "by=preference")
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(DataError):
        run(*overrides)
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == kept


def test_a_full_disk_is_told_and_leaves_the_older_pairs(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("data=world", "data.groups=20")
    kept = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    message = r"cannot write .*train\.jsonl: .*; make room"
    with largest_file(10_000), pytest.raises(UserError, match=message):
        run("data=world", "data.groups=40")
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == kept
    result = run("data=world", "data.groups=40")
    assert len(read_back(tmp_path)) == result["metrics"]["train"]["pairs"]


def test_no_split_of_other_settings_stays_beside_new_pairs(run: Run, tmp_path: Path) -> None:
    overrides = ["data=world", "data.groups=20", "data.validation_groups=20"]
    run(*overrides)
    kept = (tmp_path / "run" / "train.jsonl").read_bytes()
    # Of one split nothing is left: the other one, whole by then, is not put in place either.
    with pytest.raises(UserError, match="no pair is left of the split 'validation'"):
        run("data=world", "data.groups=40", "data.validation_groups=1", "min_gap=3.9")
    assert (tmp_path / "run" / "train.jsonl").read_bytes() == kept
    run(*overrides, "splits=[train]", "min_gap=1")
    assert sorted(path.name for path in (tmp_path / "run").glob("*.jsonl")) == ["train.jsonl"]
    with pytest.raises(UserError, match="splits is empty"):
        run(*overrides, "splits=[]")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("by=rating", "did you mean ratings"),
        ("min_gap=high", "min_gap: expected float"),
        ("weights=helpfulnes_only", "weights"),
        ("split=train", "did you mean splits"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(CONFIG_COMMANDS["pairs"], [override])
    assert message in str(error.value)
