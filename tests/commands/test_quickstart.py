from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helpsteer2.commands.quickstart import policies_table

PROGRAM = [sys.executable, "-m", "helpsteer2", "quickstart"]
SMALL = [
    "+pipeline.sft.data.groups=64",
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
]


def interval(value: float | None) -> dict[str, float | None]:
    if value is None:
        return {"value": None, "low": None, "high": None}
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def test_the_table_has_every_policy_and_what_is_best() -> None:
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

    results = {"SFT": result(2.0, None, 0.0), "DPO": result(2.5, 0.25, 3.5)}
    console = Console(width=100, file=io.StringIO())
    console.print(policies_table(results))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 100
    rows = [line.split() for line in text.splitlines()]
    assert ["SFT", "2.00", "[1.90,", "2.10]", "12.3"] in rows
    assert any(row[:5] == ["best", "of", "10,", "SFT", "3.25"] for row in rows)
    (dpo,) = (row for row in rows if row[:1] == ["DPO"])
    assert dpo[1:] == [
        "2.50", "[2.40,", "2.60]", "25%", "[15%,", "35%]", "3.5", "[3.4,", "3.6]", "12.3",
    ]  # fmt: skip
    assert any(row[:4] == ["the", "best", "answers", "4.00"] for row in rows)


@pytest.mark.slow
def test_quickstart_ends_in_a_table_goes_on_and_says_what_to_try_next(tmp_path: Path) -> None:
    # A folder that a shell and Hydra's grammar would both trip over.
    run_dir = tmp_path / "it's a, first run"
    command = [*PROGRAM, "--run-dir", str(run_dir), *SMALL]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr

    record = json.loads((run_dir / "evaluation" / "result.json").read_text(encoding="utf-8"))
    results = [metrics["world_policy"] for metrics in record["metrics"].values()]
    assert len(results) == 3
    assert (run_dir / "evaluation" / "plots" / "world_policy_ratings.png").is_file()
    rows = [line.strip() for line in ran.stdout.splitlines()]
    shown = ("SFT ", "DPO on pairs ", "iteration 1 ")
    for name, result in zip(shown, results, strict=True):
        (row,) = (line for line in rows if line.startswith(name))
        figures = result["weightings"]["helpsteer2_rlhf"]
        assert f"{figures['sampled']['value']:.2f} [" in row
        assert name == shown[0] or f"{result['kl']['value']:.1f} [" in row
    assert any(line.startswith("the best answers  ") and "4.00" in line for line in rows)

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
    names = (*shown, "best of", "the best answers")
    tables = [
        [line for line in told.splitlines() if line.strip().startswith(names)]
        for told in (ran.stdout, again.stdout)
    ]
    assert tables[0] == tables[1]
    assert ran.stdout.split("Next:\n")[1] == again.stdout.split("Next:\n")[1]


@pytest.mark.slow
def test_quickstart_refuses_a_misspelt_override() -> None:
    ran = subprocess.run([*PROGRAM, "pipeline.iteration=3"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "iterations" in ran.stderr
