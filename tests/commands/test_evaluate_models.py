"""What ``evaluate`` promises of several evaluators and models: checked before, comparable after."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, AttributeWeights
from helpsteer2.commands.evaluate import evaluate
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.data.groups import Group, Report
from helpsteer2.data.lengths import CutReport
from helpsteer2.errors import Problem, UserError
from helpsteer2.evaluation import judge_bench, rewardbench, rm_bench
from helpsteer2.evaluation.judge_bench import JudgeBench
from helpsteer2.evaluation.preferences import PreferenceEvaluation
from helpsteer2.evaluation.ratings import RatingEvaluation
from helpsteer2.evaluation.rewardbench import RewardBench
from helpsteer2.evaluation.rm_bench import RMBench

RESAMPLES = 20
SPECS = {
    "regression": SimpleNamespace(
        attribute_names=HELPSTEER2_ATTRIBUTES,
        weights=AttributeWeights("stored", {"helpfulness": 1.0, "verbosity": -0.5}),
        objective="masked mean squared error on ratings",
        extrapolation=None,
    ),
    "pairs": SimpleNamespace(
        attribute_names=("reward",),
        weights=None,
        objective="scaled Bradley–Terry loss on preferences of strength m",
        extrapolation=None,
    ),
    "expo": SimpleNamespace(
        attribute_names=("helpfulness",),
        weights=None,
        objective="masked mean squared error on ratings",
        extrapolation=SimpleNamespace(alpha=1.52),
    ),
}
HEADLINES = {
    "ratings": ["own_reward, pairs by helpfulness %"],
    "preferences": ["own_reward, all %"],
    "rewardbench": ["own_reward, overall %"],
    "rm_bench": ["own_reward, overall %", "own_reward, micro %"],
    "judge_bench": ["own_reward, micro %", "own_reward, macro %"],
}


class Source:
    """Two responses to each of ten prompts; of eight the longer one is better."""

    attribute_names = HELPSTEER2_ATTRIBUTES

    def __init__(self, bad_row: bool = False) -> None:
        self.bad_row = bad_row
        self.reads = 0

    def read(self, split: str, report: Report) -> Iterator[Group]:
        self.reads += 1
        if self.bad_row:
            report(Problem(f"{split}.jsonl", 3, "response", "is empty"))
        for i in range(10):
            sign = 1 if i < 8 else -1
            prompt = ({"role": "user", "content": f"{split} {i}"},)
            ratings = ((2.0 - sign,) * 5, (2.0 + sign,) * 5)
            yield Group(
                str(i), f"{split}.jsonl:{i}", prompt, ("short", "much longer"), ratings,
                preference_strength=2 * sign,
            )  # fmt: skip

    prompts = read

    def fingerprint(self, split: str) -> str:
        return split


class Scorer:
    """Stands for a loaded model: that of pairs likes short responses, the others long ones."""

    loads: list[str]
    chat = SimpleNamespace(template_name="plain", template_hash="abc")
    cuts = CutReport()

    def __init__(self, name: str) -> None:
        self.model = SimpleNamespace(spec=SPECS[name])
        self.attribute_names = SPECS[name].attribute_names
        self.sign = -1 if name == "pairs" else 1

    @classmethod
    def from_pretrained(cls, path: str, **settings: Any) -> Scorer:
        cls.loads.append(path)
        return cls(Path(path).name)

    def score(self, groups: Iterable[Group]) -> Iterator[np.ndarray]:
        for group in groups:
            rows = [[self.sign * len(text)] * len(self.attribute_names) for text in group.responses]
            yield np.array(rows, dtype=np.float32)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    module = ModuleType("helpsteer2.rewards.scorer")
    module.RewardScorer = Scorer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "helpsteer2.rewards.scorer", module)
    Scorer.loads = []
    return Scorer.loads


def benchmark_rows() -> dict[str, list[dict[str, Any]]]:
    """A prompt of every subset."""
    return {
        "rewardbench": [
            {"prompt": subset, "chosen": "longer one", "rejected": "short", "subset": subset}
            for subset in rewardbench.COUNTS
        ],
        "rm_bench": [
            {"prompt": domain, "chosen": ["longer one"] * 3, "rejected": ["short"] * 3,
             "domain": domain}
            for domain in rm_bench.COUNTS
        ],
        "judge_bench": [
            {"question": source, "response_A": "longer one", "response_B": "short",
             "label": "A>B", "source": source}
            for source in judge_bench.SOURCES.values()
        ],
    }  # fmt: skip


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, loads: list[str]) -> Run:
    """Evaluate models on all evaluators, with bad rows in those that are named."""

    def call(*models: str, bad: tuple[str, ...] = (), data: Source | None = None) -> dict[str, Any]:
        files = {}
        for name, rows in benchmark_rows().items():
            if name in bad:
                rows[1][{"rewardbench": "chosen", "rm_bench": "prompt"}.get(name, "response_A")] = (
                    ""
                )
            files[name] = tmp_path / f"{name}.jsonl"
            files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
        evaluators = {
            "ratings": RatingEvaluation(Source("ratings" in bad), resamples=RESAMPLES),
            "preferences": PreferenceEvaluation(
                data or Source("preferences" in bad), resamples=RESAMPLES
            ),
            "rewardbench": RewardBench(str(files["rewardbench"]), resamples=RESAMPLES),
            "rm_bench": RMBench(str(files["rm_bench"]), resamples=RESAMPLES),
            "judge_bench": JudgeBench(str(files["judge_bench"]), resamples=RESAMPLES),
        }
        evaluate(
            run_dir=str(tmp_path / "run"),
            seed=1,
            model=[str(tmp_path / name) for name in models],
            evaluators=evaluators,
            weightings={"a": AttributeWeights("helpfulness_only", {"helpfulness": 1.0})},
            engine=None,  # type: ignore[arg-type]  # reward models sample nothing
            dtype="float32",
            attention="auto",
            tokens_per_microbatch=512,
        )
        result = RunFolder(tmp_path / "run").result()
        assert result is not None
        return result

    return call


@pytest.mark.parametrize("bad", HEADLINES)
def test_a_bad_row_of_any_evaluator_is_told_before_a_model_is_loaded(
    run: Run, loads: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    with pytest.raises(UserError, match=r"\.jsonl:[23]: (chosen|prompt|response)"):
        run("regression", "pairs", bad=(bad,))
    assert loads == []
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_problems_of_several_evaluators_and_splits_come_together(
    run: Run, loads: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        run("regression", "pairs", bad=("ratings", "rewardbench", "judge_bench"))
    told = str(error.value)
    for place in ("rewardbench.jsonl:2: chosen", "judge_bench.jsonl:2: response_A"):
        assert place in told
    for split in ("train", "validation"):
        assert f"{split}.jsonl:3: response" in told
    assert loads == []


def test_the_rows_are_read_once_for_all_models(run: Run, loads: list[str]) -> None:
    data = Source()
    run("regression", "pairs", data=data)
    assert len(loads) == 2
    assert data.reads == 1


def test_every_model_fills_the_row_of_its_own_reward(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run("regression", "pairs", "expo")
    output = capsys.readouterr().out
    tables = output[output.index("side by side") :]
    for evaluator, rows in HEADLINES.items():
        begin = tables.index(f"{evaluator}: models side by side")
        table = [line.strip() for line in tables[begin:].splitlines()]
        first = next(i for i, line in enumerate(table) if line.startswith("own_reward"))
        for line, row in zip(table[first::2], rows, strict=False):  # intervals stand between
            assert line.startswith(row)
            cells = line.removeprefix(row).split()
            assert len(cells) == 3
            assert all(float(cell) >= 0 for cell in cells)
        for of_model in result["metrics"].values():
            assert next(iter(of_model[evaluator]["weightings"])) == "own_reward"
    models = result["models"]
    assert models["regression"]["own_reward"]["name"] == "stored"
    assert models["pairs"]["own_reward"]["values"] == {"reward": 1.0}
    assert "weighted by stored" in output
    assert max(map(len, output[: output.index("wrote ")].splitlines())) <= 100


def test_the_gain_on_the_first_model_is_told_with_its_interval(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    gains = run("regression", "pairs", "expo")["gains"]
    assert set(gains) == {"preferences"}
    gain = gains["preferences"]["pairs"]
    assert gain["value"] == pytest.approx(0.2 - 0.8)
    assert gain["low"] < gain["value"] < gain["high"]
    # Two models that decide alike do not differ, however few pairs there are.
    assert gains["preferences"]["expo"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    (row,) = [
        line for line in capsys.readouterr().out.splitlines() if "points over regression" in line
    ]
    assert row.split()[-3:] == ["–", "-60.0", "0.0"]


def test_scores_without_a_unit_have_no_error(run: Run) -> None:
    result = run("regression", "pairs", "expo")
    unit = {name: model["scores_are_ratings"] for name, model in result["models"].items()}
    assert unit == {"regression": True, "pairs": False, "expo": False}
    mse = {
        name: found["ratings"]["attributes"]["helpfulness"]["predictors"]["model"]["mse"]["value"]
        for name, found in result["metrics"].items()
        if name != "pairs"
    }
    assert mse["regression"] is not None
    assert mse["expo"] is None
