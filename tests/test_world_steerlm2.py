"""The benchmark of SteerLM 2.0 in the world reads its figures right."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks import world_steerlm2
from experiments.benchmarks.world_steerlm2 import STAGES, distances, evaluated, judged, the_one
from experiments.benchmarks.world_steerlm2_tables import claims


def interval(value: float, margin: float) -> dict[str, float]:
    return {"value": value, "low": value - margin, "high": value + margin}


def seed_figures(gain: float, gap: float, spearman: float, difference: float) -> dict[str, Any]:
    correlations = {
        name: {"spearman": interval(spearman, 0.05)} for name in ("verbosity", "complexity")
    }
    return {
        "policies": {
            "iteration 1": {"gain_on_the_one_before": interval(0.3, 0.1)},
            "iteration 2": {
                "gain_on_the_one_before": interval(gain, 0.1),
                "gap_closed": interval(gap, 0.1),
            },
        },
        "steerability": {
            "iteration 2": {
                "attributes": correlations,
                "gap_difference": interval(difference, 0.1),
            }
        },
    }


def test_claims_of_differences_need_the_whole_interval_and_others_the_figure() -> None:
    good, poor = seed_figures(0.2, 0.25, 0.8, -0.2), seed_figures(0.05, 0.24, 0.79, -0.05)
    by_text = {claim["claim"]: claim for claim in claims({"1": good, "2": poor})}
    assert len(by_text) == 6
    for text, claim in by_text.items():
        assert claim["seeds"]["1"]["holds"], text
        same_in_both = text.startswith("score: iteration 1")
        assert claim["seeds"]["2"]["holds"] == claim["all"] == same_in_both, text


def test_a_correlation_that_is_not_known_is_no_success() -> None:
    figures = seed_figures(0.2, 0.5, 0.9, -0.2)
    unknown = {"value": None, "low": None, "high": None}
    figures["steerability"]["iteration 2"]["attributes"]["verbosity"]["spearman"] = unknown
    held = {claim["claim"]: claim["all"] for claim in claims({"1": figures})}
    assert [text for text, holds in held.items() if not holds] == ["Spearman of verbosity >= 0.8"]


def test_distances_are_of_the_first_and_the_last_steps(tmp_path: Path) -> None:
    lines = ["step,metric,value"]
    for step in range(1, 17):
        lines += [f"{step},train/loss,9", f"{step},train/distance,{2 - step / 10}"]
        lines += [f"{step},train/start_distance,{2 + step / 10}"]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    found = distances(tmp_path / "metrics.csv")
    assert found == pytest.approx(
        {"first": 1.9, "last": 0.4, "last_eighth": 0.45, "start_in_last_eighth": 3.55}
    )


def test_a_pattern_has_to_mean_one_folder(tmp_path: Path) -> None:
    for name in ("reward_model-ab/export", "other-1/export", "other-2/export"):
        (tmp_path / "seed_3" / name).mkdir(parents=True)
    found = the_one(f"{tmp_path}/seed_{{seed}}/reward_model-*/export", 3)
    assert Path(found) == (tmp_path / "seed_3" / "reward_model-ab" / "export").resolve()
    for wrong in ("other-*", "none-*"):
        with pytest.raises(SystemExit, match="seed 3"):
            the_one(f"{tmp_path}/seed_{{seed}}/{wrong}/export", 3)


def test_an_evaluation_is_done_again_only_for_other_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def run(command: list[str], **_: Any) -> None:
        started.append(command)
        (tmp_path / "result.json").write_text(json.dumps({"run": len(started)}))

    monkeypatch.setattr(subprocess, "run", run)
    assert [evaluated(tmp_path, ["seed=1"])["run"] for _ in range(2)] == [1, 1]
    assert [evaluated(tmp_path, ["seed=2"])["run"] for _ in range(2)] == [2, 2]
    assert evaluated(tmp_path, ["seed=1"])["run"] == 3


def test_gains_are_on_the_policy_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scores = {"a/sft": 1.0, "b/steerlm": 3.0, "c/first": 2.5, "d/second": 3.75}

    def of_policy(path: str, baseline: str) -> dict[str, Any]:
        figures = {
            "sampled": interval(scores[path], 0.1), "gap_closed": interval(0, 0),
            "gain": interval(scores[path] - scores[baseline], 0.1),
            "greedy": interval(0, 0), "best_answer": interval(4, 0),
        }  # fmt: skip
        rest: dict[str, Any] = {
            "attributes": {},
            "kl": None,
            "tokens": {},
            "unfinished": {},
            "steering": None,
        }
        return {"weightings": {"helpsteer2_rlhf": figures}, **rest}

    def canned(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
        values = dict(argument.split("=", 1) for argument in arguments)
        baseline = json.loads(values["evaluators.world_policy.baseline"])
        models = json.loads(values["model"])
        if isinstance(models, str):
            return {"metrics": {"world_policy": of_policy(models, baseline)}}
        assert json.loads(values["evaluators.steerability.baseline"]) == "b/steerlm"
        return {
            "metrics": {
                path[0]: {"world_policy": of_policy(path, baseline), "steerability": path}
                for path in reversed(models)
            },
            "models": {path[0]: {"path": path} for path in models},
            "wall_seconds": 1.0,
        }

    monkeypatch.setattr(world_steerlm2, "evaluated", canned)
    exports = dict(zip(STAGES, scores, strict=True))
    options = argparse.Namespace(prompts=2, steered_prompts=2, steered_samples=1)
    found = judged(exports, 1, options, tmp_path)
    gains = {name: of["gain_on_the_one_before"] for name, of in found["policies"].items()}
    assert {name: gain["value"] for name, gain in gains.items()} == {
        "SFT": 0, "SteerLM": 2, "iteration 1": -0.5, "iteration 2": 1.25
    }  # fmt: skip
    assert found["steerability"] == exports
