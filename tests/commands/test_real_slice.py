"""Real HelpSteer2 rows, from the files to scores, with the commands a user types."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES

pytestmark = pytest.mark.slow


def helpsteer2(*arguments: str, given: bytes = b"") -> bytes:
    done = subprocess.run(
        [sys.executable, "-m", "helpsteer2", *arguments],
        input=given,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


def logged(file: Path, metric: str) -> list[float]:
    lines = (line.split(",") for line in file.read_text().splitlines())
    return [float(value) for _, name, value in lines if name == metric]


def test_the_real_slice_end_to_end(real_data: Path, tmp_path: Path) -> None:
    slice_dir = real_data / "helpsteer2_slice"
    if not slice_dir.is_dir():
        pytest.skip(f"{slice_dir} is not there")
    run, held_out = tmp_path / "run", tmp_path / "evaluation"
    train = [
        "train", "experiment=reward/local_slice", f"data.path={slice_dir}", f"run_dir={run}",
        f"cache_dir={tmp_path / 'cache'}", "trainer=cpu", "batching.epochs=null",
        "batching.global_batch=8", "lengths.max_response_tokens=256", "schedule.validate_every=40",
    ]  # fmt: skip
    helpsteer2(*train, "batching.max_steps=40")
    trained = result(run)
    assert trained["steps"] == 40
    losses = logged(run / "metrics.csv", "train/loss")
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    plain = AutoModelForSequenceClassification.from_pretrained(run / "export")
    assert tuple(plain.config.id2label.values()) == HELPSTEER2_ATTRIBUTES

    helpsteer2(
        "evaluate", f"model={run / 'export'}", f"run_dir={held_out}",
        f"evaluators.ratings.data.path={slice_dir}",
    )  # fmt: skip
    ratings = result(held_out)["metrics"]["ratings"]
    rows = gzip.decompress((slice_dir / "validation.jsonl.gz").read_bytes())
    parsed = [json.loads(line) for line in rows.splitlines()]
    assert ratings["responses"] == len(parsed)
    assert len(ratings["weightings"]) == 6  # the five and the own reward

    output = helpsteer2("score", f"--model={run / 'export'}", given=rows)
    scored = [json.loads(line) for line in output.splitlines()]
    assert [row["response"] for row in scored] == [row["response"] for row in parsed]
    for name in HELPSTEER2_ATTRIBUTES:
        known = sum(row[name] is not None for row in parsed)
        assert ratings["attributes"][name]["known"] == known
        mean = np.mean([row["scores"][name] for row in scored])
        assert ratings["attributes"][name]["outputs"]["mean"] == pytest.approx(mean, abs=1e-4)
