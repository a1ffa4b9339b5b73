from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_quickstart_trains_evaluates_and_says_what_to_try_next(tmp_path: Path) -> None:
    # A folder that a shell and Hydra's grammar would both trip over.
    run_dir = tmp_path / "it's a, first run"
    command = [sys.executable, "-m", "helpsteer2", "quickstart", "--run-dir", str(run_dir)]
    small = ["data.groups=64", "data.validation_groups=32", "batching.max_steps=3"]
    ran = subprocess.run([*command, *small], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr

    record = json.loads((run_dir / "evaluation" / "result.json").read_text(encoding="utf-8"))
    assert record["metrics"]["ratings"]["responses"] == 64
    assert "64 held-out responses" in ran.stdout
    for name in ("helpfulness", "correctness", "coherence", "complexity", "verbosity"):
        figures = record["metrics"]["ratings"]["attributes"][name]["predictors"]["model"]
        row = next(line for line in ran.stdout.splitlines() if f"│ {name} " in line and "%" in line)
        assert f"{figures['mse']['value']:.2f}" in row
    decided = record["metrics"]["preferences"]["pairs"]
    assert any("│ all " in line and str(decided) in line for line in ran.stdout.splitlines())

    # The first thing it tells to try works when pasted into a shell.
    example = ran.stdout.split("Next:\n")[1].split("\n  python -m helpsteer2 data")[0]
    shell = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    scored = subprocess.run(
        ["bash", "-c", example], cwd=tmp_path, capture_output=True, text=True, env={"PATH": shell}
    )
    assert scored.returncode == 0, scored.stderr
    assert (run_dir / "reward" / "plots" / "scatter.png").is_file()
    assert set(json.loads(scored.stdout)["scores"]) == set(
        record["metrics"]["ratings"]["attributes"]
    )


@pytest.mark.slow
def test_quickstart_refuses_a_misspelt_override() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "helpsteer2", "quickstart", "batching.max_stepz=3"],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert "max_steps" in ran.stderr
