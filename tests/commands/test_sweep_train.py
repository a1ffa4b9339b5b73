"""A sweep of real training runs: folders, W&B group, failures, and the same command again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from helpsteer2.commands.sweep import Sweep

ROOT = Path(__file__).parents[2]

JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")

# A response of one token leaves no room for what the template closes it with: these jobs fail.
FAILING = "lengths.max_response_tokens=128,1"
SETTINGS = (
    "trainer=cpu", "data.groups=48", "data.validation_groups=8", "batching.global_batch=8",
    "batching.max_steps=2", "schedule.validate_every=2", "logger=wandb",
)  # fmt: skip


def train(run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "helpsteer2", "train", "-m", *SETTINGS, *overrides,
         f"run_dir={run_dir}", f"cache_dir={run_dir.parent / 'cache'}"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip


def value_of(folder: Path) -> float:
    result: Mapping[str, float] = json.loads((folder / "result.json").read_text())["metrics"]
    return result["val/loss"]


def assert_alternate_jobs_finished(sweep: Path) -> None:
    """Every second job fails; the others are whole runs, in W&B too."""
    from tests.training.test_wandb import Offline

    jobs = Sweep(sweep).jobs()
    assert [job.status for job in jobs] == ["finished", "failed", "finished", "failed"]
    assert all("max_response_tokens" in str(job.error) for job in jobs[1::2])
    for job in jobs[::2]:
        folder = sweep / str(job.number)
        assert Path(job.folder) == folder
        assert job.value == value_of(folder)
        assert (folder / "export/model.safetensors").exists()
        assert (folder / "plots/scatter.png").exists()
        offline = Offline(folder)
        [run] = offline.runs
        assert run.run_group == sweep.name
        assert run.display_name == " ".join(f"{key}={value}" for key, value in job.swept.items())
        assert offline.exit_codes == [0]
    assert not list((sweep / "1").glob("wandb/offline-run-*"))


@pytest.mark.slow
def test_jobs_one_after_the_other(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    sweep = tmp_path / "my sweep"
    swept = ("weights=helpsteer2_llama3_70b,uniform", FAILING)
    done = train(sweep, *swept)
    assert done.returncode == 1, done.stderr
    assert "2 of 4 jobs did not finish (1, 3)" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert_alternate_jobs_finished(sweep)

    # A weighting is stored with the model, training does not see it.
    finished = [sweep / "0", sweep / "2"]
    models = [(folder / "export/model.safetensors").read_bytes() for folder in finished]
    assert models[0] == models[1]
    exports = [json.loads((folder / "export/reward_model.json").read_text()) for folder in finished]
    assert exports[0]["weights"] != exports[1]["weights"]

    before = [(folder / "result.json").stat().st_mtime_ns for folder in finished]
    values = [job.value for job in Sweep(sweep).jobs()]
    assert train(sweep, *swept).returncode == 1
    assert [(folder / "result.json").stat().st_mtime_ns for folder in finished] == before
    assert [job.value for job in Sweep(sweep).jobs()] == values


@pytest.mark.slow
def test_jobs_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = tmp_path / "sweep"
    done = train(sweep, "backbone=tiny,small", FAILING, *JOBLIB)
    assert done.returncode == 1, done.stderr
    assert "2 of 4 jobs did not finish (1, 3)" in done.stderr
    assert_alternate_jobs_finished(sweep)
    # Lines say whose they are.
    assert "\n[0] step 2/2" in done.stdout
    assert "\n[2] step 2/2" in done.stdout
