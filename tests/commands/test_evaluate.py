from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, AttributeWeights
from helpsteer2.commands.evaluate import evaluate, find_metric, short_names
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.data.groups import Group
from helpsteer2.data.lengths import CutReport
from helpsteer2.data.sources.helpsteer import HelpSteer2
from helpsteer2.errors import UserError
from helpsteer2.evaluation import rewardbench as rb
from helpsteer2.evaluation.policies import EvaluatedPolicy
from helpsteer2.evaluation.ratings import RatingEvaluation
from helpsteer2.evaluation.rewardbench import RewardBench
from helpsteer2.plots import bars

METRIC = "ratings/attributes/helpfulness/predictors/model/mse/value"


class Source:
    attribute_names = HELPSTEER2_ATTRIBUTES

    def read(self, split, report):
        for index in range(20):
            rows = ((float(index % 5),) * 5, (float((index + 2) % 5),) * 5)
            texts = tuple("x" * int(1 + row[0]) for row in rows)
            prompt = ({"role": "user", "content": f"{split} {index}"},)
            yield Group(str(index), f"{split}:{index}", prompt, texts, rows)

    def fingerprint(self, split):
        return split


class LengthScorer:
    """Stands in for a loaded reward model; its score is the rating of ``Source``."""

    loads: list[dict]
    scored: list[str]
    attribute_names = HELPSTEER2_ATTRIBUTES
    chat = SimpleNamespace(template_name="plain", template_hash="abc")
    cuts = CutReport(responses_cut=3)
    model = SimpleNamespace(
        spec=SimpleNamespace(
            weights=AttributeWeights("stored", {"helpfulness": 1.0}),
            objective="",
            extrapolation=None,
        )
    )

    @classmethod
    def from_pretrained(cls, path, **settings):
        cls.loads.append({"path": path, **settings})
        return cls()

    def score(self, groups):
        for group in groups:
            self.scored.append(group.id)
            rows = [[len(text) - 1] * 5 for text in group.responses]
            yield np.array(rows, dtype=np.float32)


@pytest.fixture
def scorer(monkeypatch):
    module = ModuleType("helpsteer2.rewards.scorer")
    module.RewardScorer = LengthScorer
    monkeypatch.setitem(sys.modules, "helpsteer2.rewards.scorer", module)
    LengthScorer.loads, LengthScorer.scored = [], []
    return LengthScorer


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return str(folder)


@pytest.fixture
def arguments(tmp_path, model):
    rows = [
        {"prompt": f"{subset} {i}", "chosen": "longer", "rejected": "short", "subset": subset}
        for subset, n in rb.COUNTS.items()
        for i in range(n)
    ]
    path = tmp_path / "filtered.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return {
        "run_dir": str(tmp_path / "run"),
        "seed": 1,
        "model": model,
        "evaluators": {
            "ratings": RatingEvaluation(Source(), resamples=20),
            "rewardbench": RewardBench(str(path), resamples=20),
        },
        "weightings": {
            "a": AttributeWeights("helpfulness_only", {"helpfulness": 1.0}),
            "b": AttributeWeights("brief", {"verbosity": -1.0}),
        },
        "engine": None,  # reward models sample nothing
        "dtype": "float32",
        "attention": "auto",
        "tokens_per_microbatch": 512,
        "optimized_metric": None,
        "config": {"seed": 1, "model": model},
    }


def test_one_load_serves_every_evaluator_and_the_record_is_complete(
    scorer, arguments, tmp_path, capsys
):
    assert evaluate(**arguments) is None
    (load,) = scorer.loads
    assert load["tokens_per_microbatch"] == 512
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert set(result["metrics"]) == {"ratings", "rewardbench"}
    assert find_metric(result["metrics"], METRIC) == 0.0
    bench = result["metrics"]["rewardbench"]["weightings"]
    assert bench["helpfulness_only"]["section_mean"]["value"] == 1.0
    assert bench["brief"]["section_mean"]["value"] == 0.0
    assert result["config"] == arguments["config"]
    assert result["model"]["template_hash"] == "abc"
    assert result["model"]["cuts_in_this_run"]["responses_cut"] == 3
    assert {"python", "packages", "git", "hardware", "platform"} == set(result["environment"])
    assert result["wall_seconds"] >= 0
    assert set(result["fingerprints"]) == {"ratings", "rewardbench"}
    output = capsys.readouterr().out
    assert "ETA" in output
    assert "groups/s" in output
    assert max(len(line) for line in output.splitlines() if "result.json" not in line) <= 100


def test_a_second_run_scores_nothing_unless_the_model_changed(scorer, arguments, model):
    evaluate(**arguments)
    first = len(scorer.scored)
    evaluate(**arguments)
    assert len(scorer.scored) == first == 20 + 2985
    with open(f"{model}/model.safetensors", "ab") as file:
        file.write(b"!")
    evaluate(**arguments)
    assert len(scorer.scored) == 2 * first
    evaluate(**{**arguments, "dtype": "bfloat16"})
    assert len(scorer.scored) == 3 * first


def test_the_optimized_metric_is_returned_and_a_misspelt_one_gets_a_hint(scorer, arguments):
    assert evaluate(**{**arguments, "optimized_metric": METRIC}) == 0.0
    with pytest.raises(UserError, match=METRIC):
        evaluate(**{**arguments, "optimized_metric": METRIC.replace("helpfulness", "helpfulnes")})


def test_a_metric_that_could_not_be_computed_is_nan():
    assert np.isnan(find_metric({"a": {"b": None}}, "a/b"))
    with pytest.raises(UserError, match="no figure 'a'"):
        find_metric({"a": {"b": 1.0}}, "a")


def test_a_failing_evaluator_leaves_the_older_result_as_it_was(scorer, arguments, tmp_path):
    evaluate(**arguments)
    before = (tmp_path / "run" / "result.json").read_bytes()
    arguments["evaluators"]["rewardbench"] = RewardBench(str(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError, match="no such file"):
        evaluate(**arguments)
    assert (tmp_path / "run" / "result.json").read_bytes() == before


def test_no_evaluator_and_an_unwritable_folder_are_refused_before_the_model_loads(
    scorer, arguments, tmp_path
):
    with pytest.raises(UserError, match="at least one"):
        evaluate(**{**arguments, "evaluators": {}})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        evaluate(**{**arguments, "run_dir": str(tmp_path / "file" / "run")})
    assert scorer.loads == []


class PolicyEvaluation:
    """Stands for an evaluator of policies."""

    takes = "policy"

    def check(self):
        pass

    def evaluate(self, policy, context):
        assert isinstance(policy, EvaluatedPolicy)
        return {"fingerprint": "data", "path": policy.path, "length": len(policy.path)}

    def tables(self, result):
        return []

    def headlines(self, result):
        return {"length": str(result["length"])}

    def figures(self, results):
        values = [{"value": of["length"], "low": 1, "high": 999} for of in results.values()]
        return {"lengths": bars({"a": values}, list(results), title="", limits=(0, 999))}


@dataclass(frozen=True)
class FakeEngine:
    """Opens a policy of which the chat format alone is looked at."""

    def open(self, model, dtype, attention):
        return SimpleNamespace(chat=LengthScorer.chat)


def test_policies_are_evaluated_by_what_takes_policies(scorer, arguments, tmp_path, model):
    mine = {**arguments, "engine": FakeEngine(), "evaluators": {"mine": PolicyEvaluation()}}
    evaluate(**mine)
    result = RunFolder(tmp_path / "run").result()
    assert result["metrics"]["mine"]["path"] == model
    assert result["model"] == {"path": model, "template_name": "plain", "template_hash": "abc"}
    assert (tmp_path / "run" / "plots" / "mine_lengths.png").stat().st_size > 0
    evaluate(**{**mine, "model": [model, f"{model}/other"]})
    assert set(RunFolder(tmp_path / "run").result()["metrics"]) == set(
        short_names([model, f"{model}/other"])
    )
    assert scorer.loads == []


def test_evaluators_of_both_kinds_and_models_of_the_wrong_one_are_refused(scorer, arguments, model):
    rewards, policies = arguments["evaluators"], {"mine": PolicyEvaluation()}
    with pytest.raises(UserError, match=r"ratings takes a reward model, .*mine takes a policy"):
        evaluate(**{**arguments, "evaluators": {**rewards, **policies}})
    Path(model, "policy.json").write_text("{}")
    with pytest.raises(UserError, match=r"model=.* is a policy, but ratings, rewardbench takes"):
        evaluate(**arguments)
    Path(model, "policy.json").rename(Path(model, "reward_model.json"))
    for models in (model, [f"{model}/other", model]):
        with pytest.raises(UserError, match=r"is a reward model, but mine takes a policy.*ratings"):
            evaluate(**{**arguments, "evaluators": policies, "model": models})
    assert scorer.loads == []


def test_data_out_of_reach_is_told_with_the_key_that_mends_it(scorer, arguments, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    evaluators = {"mine": RatingEvaluation(HelpSteer2("nobody/no-such-data"))}
    with pytest.raises(UserError, match=r" evaluators\.mine\.data\.path=DIR, a folder that holds"):
        evaluate(**{**arguments, "evaluators": evaluators})


@pytest.mark.parametrize(
    "data",
    [
        "evaluators.ratings.data.path=somewhere",
        "data@evaluators.ratings.data=world",
        "data@evaluators.ratings.data=open_assistant",
    ],
)
def test_the_configuration_takes_any_data_set(data):
    from helpsteer2.commands import CONFIG_COMMANDS
    from helpsteer2.config.checked import check

    overrides = [
        "model=x",
        "evaluator=[ratings,rewardbench]",
        data,
        "evaluators.ratings.resamples=9",
    ]
    (job,) = check(CONFIG_COMMANDS["evaluate"], overrides, multirun=False).jobs
    assert job["evaluators.ratings.resamples"] == 9


def test_the_command_line_builds_what_the_function_takes(
    scorer, arguments, tmp_path, model, monkeypatch, capsys
):
    from hydra.core.global_hydra import GlobalHydra

    from helpsteer2.commands import CONFIG_COMMANDS
    from helpsteer2.commands.launch import launch

    monkeypatch.setattr(sys, "argv", ["helpsteer2"])
    bench = arguments["evaluators"]["rewardbench"].path
    try:
        code = launch(
            CONFIG_COMMANDS["evaluate"],
            [
                f"run_dir={tmp_path / 'cli'}",
                f"model={model}",
                "evaluator=[rewardbench]",
                f"evaluators.rewardbench.path={bench}",
                "evaluators.rewardbench.resamples=10",
                "optimized_metric=rewardbench/weightings/uniform/section_mean/value",
            ],
        )
    finally:
        GlobalHydra.instance().clear()
    assert code == 0
    result = RunFolder(tmp_path / "cli").result()
    assert result["config"]["evaluators"]["rewardbench"]["path"] == bench
    assert len(result["metrics"]["rewardbench"]["weightings"]) == 7
    assert "helpsteer2_llama3_70b" in capsys.readouterr().out


def test_several_models_stand_side_by_side(scorer, arguments, tmp_path, monkeypatch, capsys):
    paths = []
    for name in ("regression", "pairs"):
        folder = tmp_path / "runs" / name / "export"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(name.encode())
        paths.append(str(folder))

    class OneScore(LengthScorer):
        """A model of one score, which prefers the longer response too."""

        attribute_names = ("reward",)
        model = SimpleNamespace(
            spec=SimpleNamespace(weights=None, objective="", extrapolation=None)
        )

        def score(self, groups):
            return (rows[:, :1] for rows in super().score(groups))

    class ByPath:
        @staticmethod
        def from_pretrained(path, **settings):
            kind = OneScore if "pairs" in path else LengthScorer
            return kind.from_pretrained(path, **settings)

    monkeypatch.setattr(sys.modules["helpsteer2.rewards.scorer"], "RewardScorer", ByPath)
    metric = f"regression/{METRIC}"
    assert evaluate(**{**arguments, "model": paths, "optimized_metric": metric}) == 0.0
    result = RunFolder(tmp_path / "run").result()
    assert set(result["metrics"]) == {"regression", "pairs"}
    assert {name: model["path"] for name, model in result["models"].items()} == dict(
        zip(("regression", "pairs"), paths, strict=True)
    )
    assert set(result["fingerprints"]) == {"ratings", "rewardbench"}
    assert "model" not in result
    output = capsys.readouterr().out
    table = output[output.index("rewardbench: models side by side") :]
    header = next(line for line in table.splitlines() if "regression" in line)
    assert header.split() == ["rewardbench", "regression", "pairs"]
    rows = {line.split(",")[0].strip(): line.split()[2:] for line in table.splitlines()}
    assert rows["helpfulness_only"][-2:] == ["100.0", "–"]
    assert rows["own_reward"][-2:] == ["100.0", "100.0"]
    # The scores of each are kept apart and found again.
    scored = len(scorer.scored)
    evaluate(**{**arguments, "model": paths[::-1]})
    assert len(scorer.scored) == scored


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["outputs/a/export", "outputs/b/export"], ["a", "b"]),
        (["org/one", "org/two"], ["one", "two"]),
        (["x", "y/x"], ["x", "y/x"]),
        (["run/export", "run/checkpoint"], ["export", "checkpoint"]),
        (["only/export"], ["export"]),
    ],
)
def test_models_are_named_by_what_tells_them_apart(models, names):
    assert short_names(models) == dict(zip(names, models, strict=True))


@pytest.mark.parametrize("models", [[], ["a/b", "a/b"], ["a/b/", "a/b"]])
def test_no_model_and_one_named_twice_are_refused(scorer, arguments, models):
    with pytest.raises(UserError, match="each once"):
        evaluate(**{**arguments, "model": models})
    assert scorer.loads == []


def test_the_configuration_takes_a_list_of_models():
    from helpsteer2.commands import CONFIG_COMMANDS
    from helpsteer2.config.checked import check

    (job,) = check(CONFIG_COMMANDS["evaluate"], ["model=[runs/a/export,runs/b/export]"]).jobs
    assert job["model"] == ["runs/a/export", "runs/b/export"]
