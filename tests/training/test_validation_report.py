"""Samples and plots belong to the exported weights, whatever interrupts the run."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpsteer2 import plots
from helpsteer2.callbacks.checkpoints import LAST, read_checkpoint
from helpsteer2.callbacks.validation_report import SAMPLES, draw, samples, table
from helpsteer2.commands.train import train
from helpsteer2.data.groups import Group, read_all
from helpsteer2.modules.scored import ScoredSplit
from tests.training.runs import NAMES, ToyGroups, arguments

OVERSHOOTS: dict[str, Any] = {"max_steps": 6, "validate_every": 1, "lr": 0.5}
"""The last validation is not the best."""


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("export", ["best", "last"])
def test_samples_are_what_the_exported_model_says(tmp_path: Path, export: str) -> None:
    pytest.importorskip("matplotlib")
    run_dir = tmp_path / "run"
    train(**arguments(run_dir, export=export, **OVERSHOOTS))
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["exported_step"] == 6) is (export == "last")
    found = read_samples(run_dir)
    groups = list(islice(read_all(ToyGroups(), "validation"), SAMPLES))
    scorer = scorer_of(run_dir / "export")
    predicted = np.concatenate(list(scorer.score(groups)))
    for row, sample in zip(predicted, found, strict=True):
        assert [sample["predicted"][name] for name in NAMES] == pytest.approx(row, abs=1e-5)
    texts = [text for group in groups for text in group.responses]
    assert [sample["response"] for sample in found] == texts
    ratings = [row for group in groups for row in group.attributes or ()]
    for row, sample in zip(ratings, found, strict=True):
        assert [sample["rated"][name] for name in NAMES] == pytest.approx(row)
    assert found[0]["prompt"] == f"user: {groups[0].prompt[0]['content']}"
    for name in ("scatter", "calibration"):
        assert (run_dir / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG")


def scorer_of(export: Path) -> Any:
    from helpsteer2.rewards.scorer import RewardScorer

    return RewardScorer.from_pretrained(export)


def test_a_resumed_run_reports_the_same(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole/run", tmp_path / "resumed/run"
    train(**arguments(whole, **OVERSHOOTS))
    train(**arguments(resumed, **OVERSHOOTS | {"max_steps": 4}))
    state = read_checkpoint(resumed / "checkpoints" / LAST)["callbacks"]["ValidationReport"]
    assert state["step"] <= 4
    train(**arguments(resumed, **OVERSHOOTS))
    for name in ("samples.jsonl", "plots/scatter.png", "plots/calibration.png"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def test_a_report_that_fails_costs_no_model(tmp_path: Path, monkeypatch, caplog) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(plots, "scatter", broken)
    assert train(**arguments(tmp_path / "run", max_steps=2)) is not None
    assert (tmp_path / "run/export/model.safetensors").exists()
    assert "no font" in (tmp_path / "run/run.log").read_text()


def test_without_validation_there_is_no_report(tmp_path: Path) -> None:
    train(**arguments(tmp_path / "run", max_steps=2, validate_every=None, optimized_metric=None))
    assert not (tmp_path / "run/samples.jsonl").exists()
    assert not (tmp_path / "run/plots").exists()


def group(index: int, n: int) -> Group:
    prompt = ({"role": "user", "content": f"q{index}"}, {"role": "assistant", "content": "a"})
    return Group(f"g{index}", f"f:{index}", prompt, tuple(f"r{index}.{i}" for i in range(n)))


def scored(groups: list[int], ratings: list[float]) -> ScoredSplit:
    column = np.arange(len(groups), dtype=np.float32)[:, None]
    return ScoredSplit(
        ("x",), np.array(groups), column, np.array(ratings, np.float32)[:, None], "0–4"
    )


def test_rows_find_their_group() -> None:
    # A rank with nothing left to do has scored group 0 again; ranks may bring any order.
    split = scored([0, 0, 1, 2, 2, 2, 0, 0], [1, 2, 3, 4, np.nan, 0, np.nan, np.nan])
    found = samples([group(0, 2), group(1, 1), group(2, 3)], split)
    rows = [(s.response, s.predicted["x"], s.rated["x"]) for s in found]
    assert rows == [
        ("r0.0", 0, 1), ("r0.1", 1, 2), ("r1.0", 2, 3),
        ("r2.0", 3, 4), ("r2.1", 4, None), ("r2.2", 5, 0),
    ]  # fmt: skip
    assert found[0].prompt == "user: q0\n\nassistant: a"
    columns, cells = table(found, ["x"])
    assert columns == ["id", "prompt", "response", "rated x", "predicted x"]
    assert cells[4] == ["g2", "user: q2\n\nassistant: a", "r2.1", None, 4.0]


def test_a_group_rated_as_a_whole_is_one_sample() -> None:
    [sample] = samples([group(0, 2)], scored([0], [-3]))
    assert sample.response == "1: r0.0\n\n2: r0.1"
    assert (sample.rated, sample.predicted) == ({"x": -3.0}, {"x": 0.0})


def test_what_nobody_rated_is_not_plotted(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append((figure, path)))
    split = ScoredSplit(
        ("rated", "unrated"),
        np.arange(4),
        np.ones((4, 2), np.float32),
        np.array([[1, np.nan]] * 4, np.float32),
        "0–4",
    )
    assert draw(split, tmp_path, "t") == [tmp_path / "scatter.png", tmp_path / "calibration.png"]
    assert all(len(figure.axes) == 1 for figure, _ in drawn)
    assert draw(scored([0, 1], [np.nan, np.nan]), tmp_path, "t") == []


def test_preferences_are_reported_as_the_chance_that_the_second_is_better(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run_dir = tmp_path / "run"
    train(**arguments(run_dir, module="preference", max_steps=2))
    groups = {group.id: group for group in read_all(ToyGroups(), "validation")}
    found, scorer = read_samples(run_dir), scorer_of(run_dir / "export")
    assert len(found) >= 4
    for sample in found:
        group = groups[sample["id"]]
        [(first, second)] = [scores[:, 0] for scores in scorer.score([group])]
        chance = 1.0 / (1.0 + np.exp(first - second))
        assert sample["predicted"] == {"second is better": pytest.approx(chance, abs=1e-5)}
        strength = group.preference_strength
        assert strength is not None
        known = float(strength > 0) if strength else None
        assert sample["rated"] == {"second is better": known}
        assert sample["response"] == f"1: {group.responses[0]}\n\n2: {group.responses[1]}"
    assert (run_dir / "plots/calibration.png").exists()


def test_what_has_no_scores_has_no_report(tmp_path: Path) -> None:
    train(**arguments(tmp_path / "run", module="sft", max_steps=2))
    assert not (tmp_path / "run/samples.jsonl").exists()
