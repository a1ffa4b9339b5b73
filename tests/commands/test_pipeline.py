"""The recipes of ``helpsteer2 pipeline``: what they run, with which settings, and a run of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands import check as check_command
from helpsteer2.commands.launch import build
from helpsteer2.config.checked import check
from helpsteer2.config.compose import conf_dir
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.errors import ConfigError
from helpsteer2.models.spec import RewardSpec
from helpsteer2.pipeline.contents import Contents
from helpsteer2.pipeline.dpo import DPO
from helpsteer2.pipeline.iterative_dpo import IterativeDPO
from helpsteer2.pipeline.plan import Commands, PlannedStage, plan
from helpsteer2.pipeline.stages import Output, Pipeline, Stage

COMMANDS = Commands(CONFIG_COMMANDS, ("-m", "helpsteer2"))
RECIPES = sorted(path.stem for path in (conf_dir() / "experiment" / "pipeline").glob("*.yaml"))
GIVEN: dict[str, Any] = {
    "policy": "some/policy",
    "reward_model": "some/model",
    "train": {"choose": {"module": "dpo"}},
}


def recipe(name: str) -> Pipeline:
    (job,) = check(CONFIG_COMMANDS["pipeline"], [f"experiment=pipeline/{name}"]).jobs
    made: Pipeline = build({"pipeline": job.given("pipeline")})["pipeline"]
    return made


def planned(
    pipeline: Pipeline, folder: Path, commands: Commands = COMMANDS
) -> dict[str, PlannedStage]:
    stages = plan(pipeline.stages(1), commands, folder / "stages", Contents(folder / "memory"))
    return {stage.name: stage for stage in stages}


def mistakes(pipeline: Pipeline, folder: Path) -> str:
    """What planning says of a recipe that cannot work."""
    with pytest.raises(ConfigError) as caught:
        planned(pipeline, folder)
    return str(caught.value)


def reward_model(folder: Path, *names: str) -> str:
    """A reward model's folder as far as planning looks at it."""
    folder.mkdir()
    limits = LengthLimits(100, 100)
    RewardSpec(names, "chatml", "…", "hash", None, limits, "hash", "base").write(folder)
    return str(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_of_every_recipe_is_valid(name: str, tmp_path: Path) -> None:
    stages = planned(recipe(name), tmp_path)
    assert next(iter(stages)) == "sft"
    for name, stage in stages.items():
        if name.startswith("dpo"):
            # The reference is of the same ids, in the same precision.
            other = stages[name.replace("dpo", "reference")].depends_on
            ours = stage.depends_on
            for key in ("data.path", "lengths.max_prompt_tokens", "lengths.max_response_tokens"):
                assert ours[key] == other[key]
            assert ours["trainer.precision"] == other["precision"]
            assert ours["backbone.dtype"] == other["dtype"]


def test_the_paper_recipe_has_the_paper_values(tmp_path: Path) -> None:
    # arXiv 2406.08673, section 4.3.
    stages = {
        k: v.depends_on for k, v in planned(recipe("helpsteer2_iterative_dpo"), tmp_path).items()
    }
    sampling = {key: stages["sample_1"][f"sampling.{key}"] for key in ("n", "temperature", "top_p")}
    assert sampling == {"n": 10, "temperature": 0.7, "top_p": 0.9}
    assert stages["sample_1"]["max_prompts"] == 20_000
    assert stages["pairs"]["weights.values.helpfulness"] == 1.0
    goodness = {key: value for key, value in stages["pairs_1"].items() if "weights.values" in key}
    assert list(goodness.values()) == [0.65, 0.8, 0.45]
    for name, epochs, rate in (("dpo", 7, 2e-7), ("dpo_1", 3, 9e-8)):
        assert stages[name]["batching.epochs"] == epochs
        assert stages[name]["batching.global_batch"] == 128
        assert stages[name]["module.optimizer.lr"] == rate
        assert stages[name]["module.loss.beta"] == 1e-3


def of(stages: list[Stage], name: str) -> Mapping[str, Any]:
    (stage,) = (stage for stage in stages if stage.name == name)
    return stage.overrides


def test_iterations_go_on_from_the_policy_before() -> None:
    stages = list(IterativeDPO(**GIVEN, iterations=2).stages(3))
    assert [stage.name for stage in stages] == [
        "pairs", "reference", "dpo",
        "sample_1", "annotate_1", "pairs_1", "reference_1", "dpo_1",
        "sample_2", "annotate_2", "pairs_2", "reference_2", "dpo_2",
    ]  # fmt: skip
    assert of(stages, "dpo")["backbone.path"] == "some/policy"
    for name, before in (("dpo_1", "dpo"), ("dpo_2", "dpo_1")):
        policy = Output(before, "export")
        assert of(stages, name)["backbone.path"] == policy
        assert of(stages, name.replace("dpo", "sample"))["model"] == policy
        assert of(stages, name.replace("dpo", "reference"))["model"] == policy
    assert {of(stages, f"sample_{i}")["seed"] for i in (1, 2)} == {3001, 3002}
    initial = IterativeDPO(**GIVEN, iterations=2, reference="initial").stages(3)
    assert of(list(initial), "reference_2")["model"] == "some/policy"
    assert of(list(initial), "dpo_2")["backbone.path"] == Output("dpo_1", "export")


def test_what_select_chose_is_what_follows_go_on_from() -> None:
    stages = list(IterativeDPO(**GIVEN, select={"metric": "x/y"}, evaluate={}).stages(1))
    assert of(stages, "select")["candidates"] == Output("dpo", "exports")
    assert of(stages, "sample_1")["model"] == Output("select", "export")
    assert of(stages, "evaluate_dpo_1")["model"] == Output("select_1", "export")
    assert of(stages, "evaluate_sft")["model"] == "some/policy"


def test_weights_leave_everything_before_the_pairs_as_it_is(tmp_path: Path) -> None:
    one, other = (
        planned(IterativeDPO(**GIVEN, weights=weights), tmp_path)
        for weights in ("helpsteer2_rlhf", "uniform")
    )
    shared = {name for name in one if one[name].folder == other[name].folder}
    assert shared == {"pairs", "reference", "dpo", "sample_1", "annotate_1"}


def test_a_model_is_either_given_or_trained() -> None:
    for wrong in ({}, {"policy": "x", "sft": {}}):
        with pytest.raises(ConfigError, match=r"pipeline\.policy: give either"):
            DPO(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"pipeline\.reward_model: give either"):
        IterativeDPO(policy="x")
    with pytest.raises(ConfigError, match=r"stage dpo: schedule\.validate_every"):
        DPO(policy="x", train={"schedule": {"validate_every": 5}}).stages(1)
    with pytest.raises(ConfigError, match="1 or more"):
        IterativeDPO(**GIVEN, iterations=0)


def test_mistakes_name_their_stage(tmp_path: Path) -> None:
    wrong = DPO(
        policy="x", train={"module": {"optimizer": {"lr": "fast"}}}, pairs={"bye": "ratings"}
    )
    text = mistakes(wrong, tmp_path)
    assert "stage pairs: 1 mistake" in text
    assert "did you mean by" in text
    assert "stage dpo: " in text


def test_a_reward_model_without_the_weighted_attributes_is_told_at_once(tmp_path: Path) -> None:
    given = reward_model(tmp_path / "given", "helpfulness", "verbosity")
    text = mistakes(IterativeDPO(**GIVEN | {"reward_model": given}), tmp_path)
    assert "stage pairs_1: weights 'helpsteer2_rlhf' need correctness, coherence" in text
    assert "the model scores helpfulness, verbosity" in text
    assert given in text
    reward = {"choose": {"weights": "helpfulness_only"}, "attributes": ["helpfulness", "clarity"]}
    trained: dict[str, Any] = {"policy": "some/policy", "reward": reward}
    text = mistakes(IterativeDPO(**trained), tmp_path)
    assert "stage pairs_1: weights 'helpsteer2_rlhf' need correctness, coherence" in text
    assert "the model scores helpfulness, clarity" in text
    assert "the model is that of stage reward_model" in text
    own = reward_model(tmp_path / "own", "politeness", "depth")
    text = mistakes(IterativeDPO(**GIVEN | {"reward_model": own}), tmp_path)
    assert "stage annotate_1: no weighting fits the model" in text
    # What fits runs; the score of a model with a single one is its reward, whatever its name.
    assert planned(IterativeDPO(**trained, weights="helpfulness_only"), tmp_path)
    single = reward_model(tmp_path / "single", "preference")
    assert planned(IterativeDPO(**GIVEN | {"reward_model": single}), tmp_path)


def test_a_model_of_the_wrong_kind_is_told_at_once(tmp_path: Path) -> None:
    rewarding = reward_model(tmp_path / "rewarding", "helpfulness")
    (tmp_path / "empty").mkdir()
    (tmp_path / "untold").mkdir()
    (tmp_path / "untold" / "config.json").write_text("{}")
    for policy, problem in {
        rewarding: "is a reward model",
        str(tmp_path / "empty"): "is no policy",
        str(tmp_path / "untold"): "has no chat template",
        "outputs/no/such/folder": "no such folder",
    }.items():
        text = mistakes(DPO(policy=policy), tmp_path)
        assert text.startswith("stage reference: ")
        assert policy in text
        assert problem in text
    (tmp_path / "untold" / "chat_template.jinja").write_text("")
    assert planned(DPO(policy=str(tmp_path / "untold")), tmp_path)
    text = mistakes(DPO(sft={}), tmp_path)
    assert "stage reference: needs a policy, but stage sft trains a reward model" in text
    assert "choose.module=sft" in text
    text = mistakes(
        IterativeDPO(policy="some/policy", reward={"choose": {"module": "sft"}}), tmp_path
    )
    assert "stage annotate_1: needs a reward model, but stage reward_model trains a policy" in text


def test_a_selection_needs_exports_to_choose_among(tmp_path: Path) -> None:
    select = {"metric": "ratings/x"}
    text = mistakes(DPO(policy="some/policy", select=select), tmp_path)
    assert text.startswith("stage select: reads the exports of stage dpo, which keeps none: ")
    assert "+pipeline.train.schedule.export_every=STEPS" in text
    own = tmp_path / "own" / "experiment" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(
        "# @package _global_\ndefaults:\n  - override /module: dpo\nschedule: {export_every: 25}\n"
    )
    commands = Commands(CONFIG_COMMANDS, ("-m", "helpsteer2"), extra_dir=str(own.parents[1]))
    mine: dict[str, Any] = {"choose": {"experiment": "mine"}}
    for train in (mine, {"schedule": {"export_every": 25}}):
        chosen = DPO(policy="some/policy", select=select, train=train)
        assert "select" in planned(chosen, tmp_path, commands)
    none = DPO(policy="a/b", select=select, train={**mine, "schedule": {"export_every": None}})
    with pytest.raises(ConfigError, match="stage dpo, which keeps none"):
        planned(none, tmp_path, commands)


def test_numbers_that_no_stage_could_use_are_told_together(tmp_path: Path) -> None:
    wrong = IterativeDPO(
        **GIVEN | {"train": {"choose": {"module": "dpo_smoothed"},
                            "module": {"loss": {"label_smoothing": 0.6}}}},
        pairs={"min_gap": -1.0},
        sample={"max_prompts": 0, "sampling": {"n": 10, "temperature": 0.0, "top_p": 1.5}},
    )  # fmt: skip
    text = mistakes(wrong, tmp_path)
    for stage, key in {
        "pairs": "min_gap",
        "dpo": "module.loss.label_smoothing",
        "sample_1": "sampling.n",
        "dpo_1": "module.loss.label_smoothing",
    }.items():
        assert f"  {key}: " in text.partition(f"stage {stage}: ")[2].partition("stage ")[0]
    for key in ("max_prompts", "sampling.top_p"):
        assert f"  {key}: has to be " in text


def test_where_stages_lie_changes_no_fingerprint(tmp_path: Path) -> None:
    one, other = (
        {name: stage.fingerprint for name, stage in planned(DPO(policy="a/b"), folder).items()}
        for folder in (tmp_path / "one", tmp_path / "other")
    )
    assert one == other


def test_an_experiment_may_choose_another_module(tmp_path: Path) -> None:
    own = tmp_path / "own" / "experiment" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\ndefaults:\n  - override /module: rpo\n")
    commands = Commands(CONFIG_COMMANDS, ("-m", "helpsteer2"), extra_dir=str(own.parents[1]))
    train = {"choose": {"experiment": "mine"}}
    chosen = planned(DPO(policy="some/policy", train=train), tmp_path, commands)["dpo"]
    assert chosen.depends_on["module._target_"].endswith(".RPOModule")
    plain = planned(DPO(policy="some/policy"), tmp_path)["dpo"]
    assert plain.depends_on["module._target_"].endswith(".DPOModule")


def test_check_looks_at_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["pipeline", "pipeline=iterative_dpo", "pipeline.policy=some/policy"]
    given = reward_model(tmp_path / "given", "helpfulness", "verbosity")
    with pytest.raises(ConfigError, match="stage pairs_1: weights 'helpsteer2_rlhf' need"):
        check_command.main([*wanted, f"pipeline.reward_model={given}"])
    assert check_command.main([*wanted, "pipeline.reward_model=some/model", "--dry-run"]) == 0
    assert "sample_1, annotate_1, pairs_1" in capsys.readouterr().out


def test_several_devices_are_started_by_torchrun(tmp_path: Path) -> None:
    train = {"choose": {"module": "dpo", "trainer": "ddp"}, "trainer": {"devices": 4}}
    stages = planned(DPO(policy="some/policy", train=train), tmp_path)
    line = list(stages["dpo"].command_line)
    assert line[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m"]
    assert stages["pairs"].command_line[1:4] == ("-m", "helpsteer2", "pairs")
    one = planned(DPO(policy="some/policy"), tmp_path)
    assert one["dpo"].command_line[1:4] == ("-m", "helpsteer2", "train")


def test_planning_is_quick_and_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from helpsteer2.__main__ import main; code = main(); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules); sys.exit(code)"
    )
    arguments = [
        "pipeline", "pipeline=dpo", "pipeline.policy=some/policy", "--dry-run",
        f"run_dir={tmp_path / 'run'}", f"stages_dir={tmp_path / 'stages'}",
    ]  # fmt: skip
    before = os.times()
    shown = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    after = os.times()
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("would run") == 3
    assert list(tmp_path.iterdir()) == []
    # Processor time, as other processes may be in the way; loose, as machines differ.
    assert after.children_user - before.children_user < 8


def test_help_shows_the_flag_and_needs_no_recipe() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "helpsteer2", "pipeline", "--help"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "--dry-run" in shown.stdout
    assert "pipeline: dpo, iterative_dpo" in shown.stdout


@pytest.mark.slow
def test_a_tiny_iteration_runs_and_is_skipped(tmp_path: Path) -> None:
    small = [
        "experiment=pipeline/world_iterative_dpo", "pipeline.iterations=1",
        "+pipeline.sft.choose.backbone=tiny", "+pipeline.sft.data.groups=64",
        "+pipeline.sft.batching.max_steps=3", "+pipeline.sft.data.validation_groups=8",
        "+pipeline.reward.data.groups=32", "+pipeline.reward.batching.max_steps=2",
        "+pipeline.reward.data.validation_groups=8", "pipeline.pairs.data.groups=32",
        "pipeline.train.batching.global_batch=8", "pipeline.sample.max_prompts=16",
        "pipeline.sample.sampling.n=4", "pipeline.sample.sampling.max_tokens=16",
        "pipeline.evaluate=null",
        f"run_dir={tmp_path / 'run'}", f"stages_dir={tmp_path / 'stages'}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "helpsteer2", "pipeline", *small]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    entries = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    assert {entry["status"] for entry in entries} == {"run"}
    (policy,) = (entry for entry in entries if entry["name"] == "dpo_1")
    assert "export/model.safetensors" in policy["outputs"]
    started = time.monotonic()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.stdout.count("done before") == len(entries)
    assert time.monotonic() - started < 60
