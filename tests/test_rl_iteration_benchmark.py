"""The benchmark of an on-policy iteration counts right and runs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks.rl_iteration.contender import PhaseClock
from experiments.benchmarks.rl_iteration.job import Job
from experiments.benchmarks.rl_iteration.summary import best_peer, summarise

ROOT = Path(__file__).resolve().parent.parent


def turns(speed: float, samples: int = 8) -> list[dict[str, Any]]:
    """Rounds on a machine that drifts."""
    return [
        {
            "seconds": samples / speed * slow,
            "samples": samples,
            "completion_tokens": 16 * samples,
            "ended": 2,
            "peak_mib": 1.0,
            "phases": {"sampling": samples / speed * slow / 4},
        }
        for slow in (1.0, 3.0, 0.5)
    ]


def test_figures_do_not_feel_drifts_of_the_machine() -> None:
    figures = summarise({"ours": turns(8.0), "trl_8": turns(2.0), "trl_16": turns(1.0)})
    faster = figures["trl_8"]["ours_is_faster"]
    assert faster["per_round"]["q1"] == pytest.approx(4.0)
    assert faster["per_round"]["q3"] == pytest.approx(4.0)
    assert faster["total"] == pytest.approx(4.0)
    assert best_peer(figures) == "trl_8"
    phases = figures["ours"]["phase_seconds"]
    assert phases["update"] == pytest.approx(3 * phases["sampling"])
    assert sum(phases.values()) == pytest.approx(1.0)  # the median round
    assert figures["ours"]["ended_share"] == 0.25


def test_contenders_that_made_other_numbers_of_samples_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different numbers"):
        summarise({"ours": turns(8.0), "trl_8": turns(2.0, samples=9)})


def test_only_named_phases_are_timed_and_each_iteration_starts_anew() -> None:
    clock = PhaseClock()
    add = clock.timed(lambda a, b: "scoring" if a else None, lambda a, b: a + b)
    assert add(0, 2) == 2
    assert clock.take() == {}
    assert add(1, 2) == 3
    assert clock.take()["scoring"] >= 0
    assert clock.take() == {}


def test_a_job_reads_as_it_was_written(tmp_path: Path) -> None:
    prompts = (((1, 2), (3,)), ((4,), (5, 6)))
    job = Job(tmp_path, "ppo", "S", prompts, 1, samples=4, max_tokens=8, epochs=2, minibatches=1)
    job.write()
    assert Job.read(tmp_path) == job
    assert job.responses == 8


def test_contenders_need_nothing_that_the_peers_python_lacks() -> None:
    code = (
        "import sys; import experiments.benchmarks.rl_iteration.contender as c; "
        "print([m for m in sys.modules if m.partition('.')[0] in ('helpsteer2', 'omegaconf')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_rl_iteration_runs(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    command = [sys.executable, "-m", "experiments.benchmarks.rl_iteration", "--smoke"]
    command += ["--kind", "rloo", "--contenders", "trl", "--threads", "1", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("HELPSTEER2_REAL_DATA", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [case] = json.loads(output.read_text(encoding="utf-8"))["cases"]
    figures = case["contenders"]["trl_4"]
    assert figures["samples_per_second"]["median"] > 0
    assert figures["completion_tokens_per_sample"] <= 8
    assert all(
        seconds > 0 for phase, seconds in figures["phase_seconds"].items() if phase != "values"
    )
    assert {"torch", "trl", "transformers"} <= set(case["versions"]["trl_4"]["packages"])
