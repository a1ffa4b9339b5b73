"""``helpsteer2 annotate``: every response is scored once, and a killed run gives the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra

from helpsteer2.commands import CONFIG_COMMANDS, annotate
from helpsteer2.commands.launch import launch
from helpsteer2.config.checked import check
from helpsteer2.data.groups import Group, read_all
from helpsteer2.data.sources.group_files import GroupFiles, write_groups
from helpsteer2.errors import ConfigError, DataError, UserError
from helpsteer2.rewards.scorer import RewardScorer
from helpsteer2.rewards.standardise import ScoreStatistics
from tests.full_disk import largest_file
from tests.rewards.tiny import WEIGHTS, group, some_groups, tiny_reward_model

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reward_model(tmp_path_factory.mktemp("annotate"))


def the_groups() -> list[Group]:
    """Rated ones, sampled ones (an empty and an unfinished response among them), and plain ones."""
    groups = [replace(one, id=f"g-{i}", source=f"x:{i}") for i, one in enumerate(some_groups(20))]
    n = len(groups[0].responses)
    groups[0] = replace(groups[0], attributes=((4.0, None),) * n)
    sampled = group("To be?", "", "Yes and", "Yes.", identity="sampled")
    groups.append(replace(sampled, finish_reasons=("stop", "length", "stop")))
    return groups


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("groups") / "groups.jsonl"
    write_groups(path, the_groups(), ("helpfulness", "verbosity"))
    return path


@pytest.fixture
def run(folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(sys, "argv", ["helpsteer2"])
    monkeypatch.setattr(annotate, "CHUNK", 4)

    def call(*overrides: str, run_dir: str = "run", model: Path | None = folder) -> dict[str, Any]:
        given = [f"run_dir={tmp_path / run_dir}", f"data.path={data}"]
        given += [] if model is None else [f"model={model}"]
        try:
            assert launch(CONFIG_COMMANDS["annotate"], [*given, *overrides]) == 0
        finally:
            GlobalHydra.instance().clear()
        record: dict[str, Any] = json.loads((tmp_path / run_dir / "result.json").read_text())
        return record

    return call


def annotated(path: Path) -> list[Group]:
    return list(read_all(GroupFiles(str(path / "groups.jsonl")), "train"))


def test_every_response_has_the_scores_of_the_model(
    run: Run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run()
    scorer = RewardScorer.from_pretrained(folder)
    groups = the_groups()
    expected = list(scorer.score(groups))
    got = annotated(tmp_path / "run")
    assert len(got) == len(groups)
    for one, before, scores in zip(got, groups, expected, strict=True):
        assert one.score_names == scorer.attribute_names
        np.testing.assert_allclose(one.scores, scores, rtol=0, atol=1e-5)
        assert replace(one, scores=None, score_names=None) == before
    every = np.concatenate(expected)
    rewards = WEIGHTS.reward(every, scorer.attribute_names)
    metrics = result["metrics"]
    assert metrics["groups"] == len(groups)
    assert metrics["responses"] == len(every)
    assert (metrics["empty_responses"], metrics["unfinished_responses"]) == (1, 1)
    assert metrics["attributes"]["coherence"]["mean"] == pytest.approx(every[:, 2].mean(), abs=1e-5)
    assert metrics["weightings"]["uniform"]["std"] == pytest.approx(every.sum(1).std(), abs=1e-5)
    assert result["model"]["hash"] == scorer.model_hash
    assert result["kind"] == "annotate"
    statistics = ScoreStatistics.load(tmp_path / "run" / "statistics.json")
    assert statistics.model_hash == scorer.model_hash
    assert statistics.of_reward(WEIGHTS)[0] == pytest.approx(rewards.mean(), abs=1e-5)
    output = capsys.readouterr().out
    assert "1 empty responses" in output
    assert "helpfulness_only" in output


KILLED = """
import os, sys
from helpsteer2.__main__ import main
from helpsteer2.commands import annotate

add, calls = annotate._Store.add, []

def dying(self, scores, before):
    calls.append(before)
    if len(calls) == 3:
        add(self, scores[:1], before)
        os.kill(os.getpid(), 9)
    add(self, scores, before)

annotate._Store.add, annotate.CHUNK = dying, 4
sys.argv = ["helpsteer2", *sys.argv[1:]]
sys.exit(main())
"""


def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    run: Run, folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(run_dir="whole")
    arguments = ["annotate", f"run_dir={tmp_path / 'run'}", f"data.path={data}", f"model={folder}"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "groups.jsonl").exists()
    scored: list[int] = []
    score = RewardScorer.score
    monkeypatch.setattr(
        RewardScorer,
        "score",
        lambda self, groups: scored.append(len(groups)) or score(self, groups),
    )
    result = run()
    assert sum(scored) == len(the_groups()) - 2 * 4  # the third chunk was torn
    assert 0 < result["responses_of_earlier_runs"] < result["metrics"]["responses"]
    for name in ("groups.jsonl", "statistics.json", "scores.bin"):
        kept, whole = ((tmp_path / run / name).read_bytes() for run in ("run", "whole"))
        assert kept == whole, name
    # A finished run is repeated without scoring anything.
    monkeypatch.setattr(RewardScorer, "score", None)
    assert run()["metrics"] == result["metrics"]


@pytest.mark.parametrize("n_bytes", [20, 250])
def test_a_full_disk_is_told_and_the_same_command_goes_on(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], n_bytes: int
) -> None:
    whole = run(run_dir="whole")
    message = r"cannot write .*scores\.bin: .*; make room"
    with largest_file(n_bytes), pytest.raises(UserError, match=message):
        run(run_dir="full")
    assert not (tmp_path / "full" / "groups.jsonl").exists()
    result = run(run_dir="full")
    assert bool(result["responses_of_earlier_runs"]) == (n_bytes > 20)
    assert result["metrics"] == whole["metrics"]
    for name in ("groups.jsonl", "statistics.json", "scores.bin"):
        assert (tmp_path / "full" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_scores_of_another_model_are_not_gone_on_with(run: Run, tmp_path: Path) -> None:
    run()
    other = tiny_reward_model(tmp_path, seed=1)
    before = (tmp_path / "run" / "groups.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"scores\.bin holds scores of another model or other data"):
        run(model=other)
    assert (tmp_path / "run" / "groups.jsonl").read_bytes() == before


def test_a_server_scores_as_this_process_does(run: Run, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="needs the extra serve")
    from tests.rewards.serving import serving

    run()
    with serving(folder) as running:
        over_http = ["rewarder=http", f"rewarder.url={running.url}"]
        result = run(*over_http, run_dir="http", model=None)
    assert result["model"]["path"] == running.url
    for one, other in zip(annotated(tmp_path / "run"), annotated(tmp_path / "http"), strict=True):
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=1e-5)


def test_bad_rows_and_scores_leave_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any, **__: Any) -> RewardScorer:
        raise AssertionError("the model was opened")

    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "1", "prompt": [], "responses": ["a"]}\n')
    with monkeypatch.context() as patched:
        patched.setattr(RewardScorer, "from_pretrained", opened)  # rows come first
        with pytest.raises(DataError, match=r"bad\.jsonl:1"):
            run(f"data.path={bad}")

    def nan(self: RewardScorer, groups: list[Group]) -> Any:
        return (np.full((len(one.responses), 5), np.nan, np.float32) for one in groups)

    monkeypatch.setattr(RewardScorer, "score", nan)
    with pytest.raises(UserError, match="scores of group 'g-0' are not finite"):
        run()
    assert not (tmp_path / "run" / "groups.jsonl").exists()
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "model: has no value yet"),
        (["model=/nowhere/at/all"], "there is no file or folder /nowhere/at/all"),
        (["model=x", "rewarder.dtype=half"], "rewarder.dtype"),
        (["model=x", "rewarder.tokens_per_microbatch=a"], "rewarder.tokens_per_microbatch"),
        (["rewarder=http"], "rewarder.url: has no value yet"),
        (["rewarder=http", "rewarder.url=http://x", "rewarder.attempt=3"], "attempt"),
        (["model=x", "data=wrold"], "did you mean"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(CONFIG_COMMANDS["annotate"], ["data.path=y", *overrides])
    assert message in str(error.value)
