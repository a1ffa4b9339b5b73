"""``helpsteer2 select``: the best of several exports, and what it was selected on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands import select as select_module
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.commands.select import best_of, candidate_models, select
from helpsteer2.config.checked import check
from helpsteer2.errors import ConfigError, UserError

METRIC = "fake/score/value"

Select = Callable[..., float]


def make_model(folder: Path, value: float) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(str(value))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the exports of three steps, the second of which is best."""
    for step, value in ((25, 0.4), (50, 0.9), (75, 0.6)):
        make_model(tmp_path / "run" / "exports" / f"step_{step:06d}", value)
    (tmp_path / "run" / "exports" / ".step_000100.writing").mkdir()
    return tmp_path / "run"


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were evaluated; a model's value is what its weights say."""
    names: list[str] = []

    def evaluate(run_dir: str, seed: int, model: str, *rest: Any, **more: Any) -> float:
        names.append(Path(model).name)
        value = float((Path(model) / "model.safetensors").read_text())
        metrics = {"fake": {"split": "validation", "score": {"value": value}}}
        RunFolder(run_dir).write_result({"metrics": metrics})
        return value

    monkeypatch.setattr(select_module, "evaluate", evaluate)
    return names


@pytest.fixture
def choose(tmp_path: Path, evaluated: list[str]) -> Select:
    def call(candidates: str | list[str], mode: Any = "max", **changed: Any) -> float:
        config = {"run_dir": "x", "candidates": candidates, "mode": mode, "metric": METRIC}
        return select(
            str(tmp_path / "selected"), 1, candidates, METRIC, mode, {"fake": None},  # type: ignore[dict-item]
            {}, None, "float32", "auto", 100, config | changed,  # type: ignore[arg-type]
        )  # fmt: skip

    return call


def test_the_best_candidate_is_exported_and_said_why(
    choose: Select, run: Path, tmp_path: Path
) -> None:
    assert choose(str(run)) == 0.9
    export = tmp_path / "selected" / "export"
    assert (export / "model.safetensors").read_text() == "0.9"
    result = json.loads((tmp_path / "selected" / "result.json").read_text())
    assert result["selected"]["name"] == "step_000050"
    assert result["selected_on"] == {
        "evaluator": "fake",
        "metric": METRIC,
        "mode": "max",
        "split": "validation",
        "values": {"step_000025": 0.4, "step_000050": 0.9, "step_000075": 0.6},
    }
    assert choose(str(run / "exports"), mode="min") == 0.4
    assert (export / "model.safetensors").read_text() == "0.4"


def test_a_candidate_is_evaluated_once(
    choose: Select, run: Path, evaluated: list[str], tmp_path: Path
) -> None:
    choose(str(run))
    assert len(evaluated) == 3
    # As after a kill in the middle.
    (tmp_path / "selected" / "candidates" / "step_000050" / "selection.json").unlink()
    choose(str(run))
    assert evaluated[3:] == ["step_000050"]
    (run / "exports" / "step_000075" / "model.safetensors").write_text("0.95")
    assert choose(str(run)) == 0.95
    assert evaluated[4:] == ["step_000075"]
    choose(str(run), seed=2)
    assert len(evaluated) == 8


def test_exports_can_be_listed(choose: Select, tmp_path: Path) -> None:
    for name, value in (("a", 0.1), ("b", 0.2)):
        make_model(tmp_path / name / "export", value)
    assert choose([str(tmp_path / "a" / "export"), str(tmp_path / "b" / "export")]) == 0.2
    result = json.loads((tmp_path / "selected" / "result.json").read_text())
    assert result["selected"]["name"] == "b"


def test_ties_go_to_the_first_and_nan_to_nobody() -> None:
    assert best_of({"a": 1.0, "b": 2.0, "c": 2.0}, "max", METRIC) == "b"
    assert best_of({"a": math.nan, "b": 2.0, "c": 2.0}, "min", METRIC) == "b"
    with pytest.raises(UserError, match="not a number for any of a, b"):
        best_of({"a": math.nan, "b": math.nan}, "max", METRIC)


def test_a_run_without_exports_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"schedule\.export_every"):
        candidate_models(str(make_model(tmp_path / "run" / "export", 1.0).parent / "missing"))
    with pytest.raises(UserError, match="missing: name folders of models"):
        candidate_models([str(tmp_path / "run" / "export"), "missing"])
    with pytest.raises(UserError, match="an empty list"):
        candidate_models([])


def test_the_metric_begins_with_an_evaluator(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="begin with the name of an evaluator: fake"):
        select(
            str(tmp_path), 1, "x", "other/value", "max", {"fake": None},  # type: ignore[dict-item]
            {}, None, "float32", "auto", 100,  # type: ignore[arg-type]
        )  # fmt: skip


def test_a_figure_that_is_not_there_is_told_of_metric(
    tmp_path: Path, run: Path, evaluated: list[str]
) -> None:
    with pytest.raises(UserError, match=r"^metric: there is no figure .*mean fake/score/value"):
        select(
            str(tmp_path), 1, str(run), "fake/scroe/value", "max", {"fake": None},  # type: ignore[dict-item]
            {}, None, "float32", "auto", 100,  # type: ignore[arg-type]
        )  # fmt: skip


def test_the_configuration_composes() -> None:
    given = ["candidates=some/run", "metric=world_policy/x", "evaluator=[world_policy]"]
    (job,) = check(CONFIG_COMMANDS["select"], given).jobs
    assert job["evaluators.world_policy.split"] == "validation"
    with pytest.raises(ConfigError, match="mode"):
        check(CONFIG_COMMANDS["select"], [*given, "mode=best"])
