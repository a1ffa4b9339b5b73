from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from helpsteer2.commands.quickstart import policies, policies_table, reward_tables, steered

PROGRAM = [sys.executable, "-m", "helpsteer2", "quickstart"]
SMALL = [
    "pipeline.sft.data.groups=64",
    "+pipeline.sft.data.validation_groups=8",
    "+pipeline.sft.batching.max_steps=3",
    "pipeline.reward.data.groups=64",
    "+pipeline.reward.data.validation_groups=8",
    "+pipeline.reward.batching.max_steps=3",
    "pipeline.pairs.data.groups=64",
    "+pipeline.train.batching.max_steps=2",
    "pipeline.iterations=1",
    "pipeline.train.batching.global_batch=4",
    "pipeline.sample.max_prompts=8",
    "pipeline.sample.sampling.n=3",
    "pipeline.sample.sampling.max_tokens=12",
    "pipeline.prompts.data.groups=64",
    *(
        f"{key}.{value}"
        for key in ("+pipeline.methods.ppo", "+pipeline.methods.rloo")
        for value in (
            "rollouts.prompts=4",
            "rollouts.sampling.n=2",
            "rollouts.sampling.max_tokens=12",
            "batching.global_batch=4",
        )
    ),
    "pipeline.methods.ppo.batching.max_steps=4",
    "pipeline.methods.rloo.batching.max_steps=2",
    "pipeline.annotate_sft.data.groups=8",
    "+pipeline.steerlm.batching.max_steps=2",
    "pipeline.label_prompts.data.groups=8",
    "pipeline.steerlm2_iterations=1",
    "pipeline.sample_steered.sampling.n=3",
    "pipeline.sample_steered.sampling.max_tokens=12",
    "+pipeline.steerlm2.batching.global_batch=4",
    "+pipeline.steerlm2.batching.max_steps=2",
]


def interval(value: float | None) -> dict[str, float | None]:
    if value is None:
        return {"value": None, "low": None, "high": None}
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def shown(table: Table) -> list[list[str]]:
    """The words of every line of a table."""
    console = Console(width=100, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 100
    return [line.split() for line in text.splitlines()]


def test_the_policies_table_has_every_policy_and_what_is_best() -> None:
    def result(score: float, closed: float | None, kl: float) -> dict[str, Any]:
        figures = {
            "sampled": interval(score),
            "gap_closed": interval(closed),
            "best_of_n": interval(3.25),
            "best_of_n_gap_closed": interval(0.5),
            "best_answer": interval(4.0),
        }
        return {
            "prompts": 7,
            "samples": 10,
            "kl": interval(kl),
            "tokens": {"sampled": interval(12.3)},
            "weightings": {"helpsteer2_rlhf": figures},
        }

    rows = shown(policies_table({"SFT": result(2.0, None, 0.0), "DPO": result(2.5, 0.25, 3.5)}))
    assert ["SFT", "2.00", "[1.90,", "2.10]", "12.3"] in rows
    assert any(row[:5] == ["best", "of", "10,", "SFT", "3.25"] for row in rows)
    (dpo,) = (row for row in rows if row[:1] == ["DPO"])
    assert dpo[1:] == [
        "2.50", "[2.40,", "2.60]", "25%", "[15%,", "35%]", "3.5", "[3.4,", "3.6]", "12.3",
    ]  # fmt: skip
    assert any(row[:4] == ["the", "best", "answers", "4.00"] for row in rows)


def test_policies_stand_in_the_order_in_which_they_are_told_of() -> None:
    stages = (
        *("sft", "dpo", "reward_model", "dpo_1", "dpo_2", "statistics", "ppo", "rloo"),
        *("steerlm", "steerlm2_1", "steerlm2_2"),
    )
    pipeline = {
        "iterations": 2,
        "methods": {"ppo": {}, "own": None, "rloo": {}},
        "steerlm2_iterations": 2,
    }
    result: dict[str, Any] = {
        "folders": {stage: f"stages/{stage}-0" for stage in stages},
        "config": {"pipeline": pipeline},
    }
    found = policies(result)
    rows = [
        *("SFT", "DPO on pairs", "iteration 1", "iteration 2", "PPO", "RLOO"),
        *("SteerLM", "SteerLM 2.0, 1", "SteerLM 2.0, 2"),
    ]
    assert list(steered(found)) == ["SFT", *rows[-3:]]
    assert list(found) == rows
    exports = [f"stages/{stage}-0/export" for stage in stages if stage[:3] not in ("rew", "sta")]
    assert list(found.values()) == exports
    # A policy that was given is not trained.
    result["folders"].pop("sft")
    result["config"]["pipeline"]["policy"] = "some/policy"
    assert policies(result) == {**found, "SFT": "some/policy"}


def predictor(mse: float, pearson: float | None, right: float) -> dict[str, Any]:
    return {
        "mse": interval(mse),
        "pearson": interval(pearson),
        "pairs": {"accuracy": interval(right)},
    }


def test_the_reward_model_stands_beside_simple_predictors() -> None:
    predictors = {
        "model": predictor(0.25, 0.875, 0.9),
        "mean": predictor(1.0, None, 0.5),
        "length": predictor(0.9, 0.1, 0.55),
    }
    subsets = {
        "strength 1": {"prompts": 3, "accuracy": interval(1 / 3)},
        "strength 2": {"prompts": 5, "accuracy": interval(0.8)},
        "strength 3": {"prompts": 0, "accuracy": interval(None)},
    }
    preferences = {"accuracy": interval(0.625), "subsets": subsets}
    metrics: dict[str, Any] = {
        "ratings": {"responses": 12, "attributes": {"helpfulness": {"predictors": predictors}}},
        "preferences": {"weightings": {"uniform": {}, "own_reward": preferences}},
    }
    ratings, compared = map(shown, reward_tables(metrics))
    assert ["helpfulness", "0.25", "1.00", "0.88", "90%", "55%"] in ratings
    for row in ("strength 1 3 33%", "strength 2 5 80%", "strength 3 0 –", "all 8 62%"):
        assert row.split() in compared

    # One score is no rating, and a model without weights of its own gets those of the policies.
    metrics["ratings"]["attributes"] = {"reward": {"outputs": {}}}
    metrics["preferences"]["weightings"] = {"helpsteer2_rlhf": preferences}
    (compared,) = map(shown, reward_tables(metrics))
    assert ["all", "8", "62%"] in compared


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 35 stages, five minutes of processor time
def test_quickstart_ends_in_a_table_goes_on_and_says_what_to_try_next(tmp_path: Path) -> None:
    # A folder that a shell and Hydra's grammar would both trip over.
    run_dir = tmp_path / "it's a, first run"
    command = [*PROGRAM, "--run-dir", str(run_dir), *SMALL]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr

    record = json.loads((run_dir / "evaluation" / "result.json").read_text(encoding="utf-8"))
    results = [metrics["world_policy"] for metrics in record["metrics"].values()]
    assert len(results) == 7
    scores, steering = ran.stdout.split("labels: rank correlation")
    rows = [line.strip() for line in scores.splitlines()]
    names = (
        *("SFT ", "DPO on pairs ", "iteration 1 ", "PPO ", "RLOO ", "SteerLM  "),
        "SteerLM 2.0, 1 ",
    )
    for name, result in zip(names, results, strict=True):
        (row,) = (line for line in rows if line.startswith(name) and " [" in line)
        figures = result["weightings"]["helpsteer2_rlhf"]
        assert f"{figures['sampled']['value']:.2f} [" in row
        assert name == names[0] or f"{result['kl']['value']:.1f} [" in row
    assert any(line.startswith("the best answers  ") and "4.00" in line for line in rows)

    record = json.loads(next(run_dir.glob("evaluation_of_steering/result.json")).read_text("utf-8"))
    followed = [metrics["steerability"] for metrics in record["metrics"].values()]
    lines = [line.split() for line in steering.splitlines()]
    gaps = [line[-2] for line in lines if line[:1] in (["SFT"], ["SteerLM"])]
    assert gaps == [f"{result['gap']['value']:.2f}" for result in followed]
    assert next(result["attributes"]["verbosity"]["spearman"]["value"] for result in followed) == 0

    # The reward model by the oracle, which the annotators whom it learned from are not.
    record = json.loads((run_dir / "evaluation_of_rewards" / "result.json").read_text("utf-8"))
    judged = record["metrics"]
    assert f"{judged['ratings']['responses']} responses, rated" in ran.stdout
    trained = json.loads(next(run_dir.glob("stages/reward_model-*/result.json")).read_text("utf-8"))
    for evaluator in record["config"]["evaluators"].values():  # its checkpoint was chosen on others
        assert evaluator["data"]["seed"] != trained["config"]["data"]["seed"]
    for name, figures in judged["ratings"]["attributes"].items():
        (row,) = (line for line in rows if line.startswith(f"{name} ") and "%" in line)
        assert f" {figures['predictors']['model']['mse']['value']:.2f} " in row
    total = ["all", str(judged["preferences"]["pairs"])]
    assert total in [line.split()[:2] for line in rows]
    told = ran.stdout.split("answers and plots:\n")[1].split("\n\nNext:")[0]
    pictures = {
        path.name for line in told.splitlines() for path in Path(line.strip()).rglob("*.png")
    }
    of_steering = {"steerability_asked_got.png", "steerability_cross_talk.png"}
    assert pictures >= {"scatter.png", "world_policy_ratings.png"} | of_steering

    # The first thing it tells to try works when pasted into a shell.
    example = ran.stdout.split("Next:\n")[1].split("\n  python -m helpsteer2 sample")[0]
    shell = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    scored = subprocess.run(
        ["bash", "-c", example], cwd=tmp_path, capture_output=True, text=True, env={"PATH": shell}
    )
    assert scored.returncode == 0, scored.stderr
    assert len(json.loads(scored.stdout)["scores"]) == 5

    # Once more: everything is done, and told again.
    written = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.safetensors")}
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in written} == written
    told_of = (*names, *judged["ratings"]["attributes"], "all", "best of", "the best answers")
    tables = [
        [line for line in told.splitlines() if line.strip().startswith(told_of)]
        for told in (ran.stdout, again.stdout)
    ]
    assert tables[0] == tables[1]
    assert ran.stdout.split("Next:\n")[1] == again.stdout.split("Next:\n")[1]


@pytest.mark.slow
def test_quickstart_refuses_a_misspelt_override() -> None:
    ran = subprocess.run([*PROGRAM, "pipeline.iteration=3"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "iterations" in ran.stderr
