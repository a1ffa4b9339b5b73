"""SteerLM and SteerLM 2.0 as pipelines: what their stages read, what is refused, and a run."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands import check as check_command
from helpsteer2.errors import ConfigError
from helpsteer2.pipeline.contents import Contents
from helpsteer2.pipeline.plan import Commands, PlannedStage, plan
from helpsteer2.pipeline.record import Record
from helpsteer2.pipeline.stages import Pipeline
from helpsteer2.pipeline.steerlm import SteerLM, SteerLM2
from tests.pipeline.conftest import remember_compositions
from tests.pipeline.processes import (
    Start,
    command,
    finish,
    in_folder,
    kill_with_children,
    made,
    manifest,
    wait_for,
)

WORLD: dict[str, Any] = {"choose": {"data": "world"}, "data": {"groups": 50}}
GIVEN: dict[str, Any] = {
    "policy": "some/policy",
    "reward_model": "some/model",
    "annotate_sft": WORLD,
    "max_prompt_tokens": 111,
    "max_response_tokens": 99,
}
GIVEN2: dict[str, Any] = {
    **GIVEN,
    "label_prompts": {"choose": {"data": "world"}, "data": {"groups": 20, "seed": 2}},
    "sample_steered": {"sampling": {"n": 10, "max_tokens": 99}},
}
STEERING: dict[str, Any] = {
    **GIVEN2["sample_steered"], "steering": {"helpfulness": 4, "verbosity": 2}
}  # fmt: skip
FIRST = ["annotate_sft", "label", "steerlm"]
BOOTSTRAP = ["bootstrap_sample", "bootstrap_annotate", "bootstrap_label", "steerlm_bootstrap"]
WEIGHED = ["steered", "annotate_steered", "prior", "proposal", "weigh", "steerlm2"]


@pytest.fixture(scope="module", autouse=True)
def compositions() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        remember_compositions(patch)
        yield


def planned(pipeline: Pipeline) -> dict[str, PlannedStage]:
    """The stages of a recipe, each composed and checked, as if they lay beside the tests."""
    commands = Commands(CONFIG_COMMANDS, ("-m", "helpsteer2"))
    folder = Path("no/such/stages").absolute()
    stages = plan(pipeline.stages(7), commands, folder, Contents(folder / "memory"))
    assert not folder.exists()
    return {stage.name: stage for stage in stages}


def names(pipeline: Pipeline) -> list[str]:
    return [stage.name for stage in pipeline.stages(7)]


def reads(stages: Mapping[str, PlannedStage]) -> dict[str, set[str]]:
    """The outputs that each stage reads."""
    return {
        name: {f"{earlier.name}/{path}" for earlier, path in stage.reads}
        for name, stage in stages.items()
    }


def iteration(number: int, *before: str) -> list[str]:
    return [f"{name}_{number}" for name in (*before, *WEIGHED)]


class TestStages:
    def test_steerlm(self) -> None:
        stages = planned(SteerLM(**GIVEN))
        assert list(stages) == FIRST
        assert reads(stages) == {
            "annotate_sft": set(),
            "label": {"annotate_sft/groups.jsonl"},
            "steerlm": {"label/train.jsonl"},
        }
        assert stages["annotate_sft"].depends_on["data.groups"] == 50
        assert stages["label"].depends_on["by"] == "scores"
        train = stages["steerlm"].depends_on
        assert str(train["module._target_"]).endswith(".SFTModule")
        assert train["backbone.path"] == "some/policy"

    def test_a_round_on_its_own_answers(self) -> None:
        own = {"sample": {"sampling": {"n": 3}}, "train": {"batching": {"epochs": 5}}}
        stages = planned(SteerLM(**GIVEN, steerlm={"batching": {"epochs": 2}}, bootstrap=own))
        assert list(stages) == [*FIRST, *BOOTSTRAP]
        read = reads(stages)
        assert read["bootstrap_sample"] == {"label/train.jsonl", "steerlm/export"}
        assert read["bootstrap_annotate"] == {"bootstrap_sample/groups.jsonl"}
        assert read["bootstrap_label"] == {"bootstrap_annotate/groups.jsonl"}
        assert read["steerlm_bootstrap"] == {"bootstrap_label/train.jsonl", "steerlm/export"}
        assert stages["bootstrap_sample"].depends_on["sampling.n"] == 3
        assert stages["bootstrap_sample"].depends_on["max_prompt_tokens"] == 111
        epochs = [stages[of].depends_on["batching.epochs"] for of in ("steerlm", BOOTSTRAP[-1])]
        assert epochs == [2, 5]
        assert names(SteerLM(**GIVEN, bootstrap={})) == list(stages)

    def test_iterations_of_steerlm2(self) -> None:
        stages = planned(SteerLM2(**GIVEN2, steerlm2_iterations=2))
        assert list(stages) == [*FIRST, *iteration(1, "targets"), *iteration(2, "targets")]
        read = reads(stages)
        for number, policy in ((1, "steerlm/export"), (2, "steerlm2_1/export")):
            samples = f"steered_{number}/groups.jsonl"
            assert read[f"targets_{number}"] == {"label/train.jsonl"}
            assert read[f"steered_{number}"] == {f"targets_{number}/train.jsonl", policy}
            assert read[f"annotate_steered_{number}"] == {samples}
            assert read[f"proposal_{number}"] == {samples, policy}
            # P(y|x) stays that of the policy before any label, whatever the iteration.
            assert read[f"prior_{number}"] == {samples}
            prior = stages[f"prior_{number}"].depends_on
            assert (prior["model"], prior["labels"]) == ("some/policy", False)
            assert stages[f"proposal_{number}"].depends_on["labels"] is True
            terms = {f"{name}_{number}/reference" for name in ("prior", "proposal")}
            scores = f"annotate_steered_{number}/groups.jsonl"
            assert read[f"weigh_{number}"] == {scores, policy, *terms}
            assert read[f"steerlm2_{number}"] == {
                f"weigh_{number}/groups.jsonl", policy, f"proposal_{number}/reference"
            }  # fmt: skip

    def test_all_that_has_to_be_the_same_is(self) -> None:
        recipe = SteerLM2(**GIVEN2, precision="bf16-mixed", steerlm2_iterations=1)
        stages = {name: stage.depends_on for name, stage in planned(recipe).items()}
        trained = stages["steerlm2_1"]
        assert str(trained["module._target_"]).endswith(".SteerLM2Module")
        for name in ("prior_1", "proposal_1"):
            for key in ("lengths.max_prompt_tokens", "lengths.max_response_tokens"):
                assert stages[name][key] == trained[key] == stages["steerlm"][key]
            assert stages[name]["precision"] == trained["trainer.precision"] == "bf16-mixed"
            assert stages[name]["dtype"] == trained["backbone.dtype"]
        assert stages["steered_1"]["max_prompt_tokens"] == 111
        assert stages["steered_1"]["seed"] == stages["targets_1"]["seed"] == 7001
        assert trained["seed"] == 7

    def test_iterations_draw_other_labels_and_samples(self) -> None:
        stages = planned(SteerLM2(**GIVEN2, steerlm2_iterations=2))
        for name in ("targets", "steered"):
            seeds = {stages[f"{name}_{number}"].depends_on["seed"] for number in (1, 2)}
            assert len(seeds) == 2

    def test_labels_of_the_data_itself(self) -> None:
        recipe = {key: value for key, value in GIVEN2.items() if key != "label_prompts"}
        stages = planned(SteerLM2(**recipe, targets="data", steerlm2_iterations=1))
        assert list(stages) == [*FIRST, *iteration(1)]
        assert reads(stages)["steered_1"] == {"label/train.jsonl", "steerlm/export"}

    def test_one_label_for_all(self) -> None:
        recipe = GIVEN2 | {"sample_steered": STEERING}
        stages = planned(SteerLM2(**recipe, targets="fixed", steerlm2_iterations=2))
        assert list(stages) == [*FIRST, *iteration(1), *iteration(2)]
        assert reads(stages)["steered_1"] == {"steerlm/export"}
        for number in (1, 2):
            steered = stages[f"steered_{number}"].settings
            assert steered["steering"] == {"helpfulness": 4, "verbosity": 2}
            assert (steered["data.groups"], steered["data.seed"]) == (20, 2)

    def test_with_bootstrap_selection_and_evaluation(self) -> None:
        exports = {"schedule": {"export_every": 5}}
        recipe = GIVEN2 | {"policy": None, "sft": {"choose": {"module": "sft"}}}
        stages = planned(
            SteerLM2(
                **recipe, bootstrap={}, steerlm=exports, steerlm2=exports, steerlm2_iterations=1,
                select={"metric": "x/y"}, evaluate={},
            )
        )  # fmt: skip
        evaluated = ["sft", "steerlm", "steerlm_bootstrap", "steerlm2_1"]
        assert [n for n in stages if n.startswith("evaluate_")] == [
            f"evaluate_{name}" for name in evaluated
        ]
        read = reads(stages)
        assert read["steerlm"] == {"label/train.jsonl", "sft/export"}
        assert read["prior_1"] == {"steered_1/groups.jsonl", "sft/export"}
        assert "select/export" in read["bootstrap_sample"]
        assert "select_bootstrap/export" in read["steered_1"] & read["steerlm2_1"]
        assert read["evaluate_steerlm2_1"] == {"select_steerlm2_1/export"}

    def test_another_likelihood_trains_nothing_before_again(self) -> None:
        one, other = (
            planned(SteerLM2(**GIVEN2, steerlm2_iterations=1, weigh=weigh))
            for weigh in ({}, {"likelihood": {"concentration": 5.0}})
        )
        assert {name for name in one if one[name].folder != other[name].folder} == {
            "weigh_1", "steerlm2_1"
        }  # fmt: skip


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"steerlm2_iterations": 0}, r"pipeline\.steerlm2_iterations: .*pipeline=steerlm"),
            ({"label_prompts": {}}, r"pipeline\.label_prompts: targets=distribution needs prompts"),
            ({"targets": "fixed"}, r"pipeline\.sample_steered\.steering: is for targets=fixed"),
            ({"targets": "fixed", "label_prompts": {}}, r"targets=fixed needs prompts"),
            ({"sample_steered": STEERING}, r"sample_steered\.steering: .* targets is distribution"),
            ({"targets": "data", "sample_steered": STEERING}, r"steering: .*; targets is data"),
            (
                {"sample_steered": {"sampling": {"max_tokens": 100}}},
                r"sample_steered\.sampling\.max_tokens: 100 .*_response_tokens=99",
            ),
            (
                {"sample_steered": {"max_prompt_tokens": 112}},
                r"sample_steered\.max_prompt_tokens: 112 .*_prompt_tokens=111",
            ),
            ({"policy": None}, r"pipeline\.policy: give either"),
            ({"reward_model": None}, r"pipeline\.reward_model: give either"),
        ],
    )
    def test_settings_that_do_not_go_together(self, settings: dict[str, Any], told: str) -> None:
        with pytest.raises(ConfigError, match=told):
            SteerLM2(**GIVEN2 | settings)

    @pytest.mark.parametrize(
        ("key", "stage"),
        [("steerlm", "steerlm"), ("bootstrap", "steerlm_bootstrap"), ("steerlm2", "steerlm2_1")],
    )
    def test_a_training_that_shall_validate(self, key: str, stage: str) -> None:
        validate: dict[str, Any] = {"schedule": {"validate_every": 5}}
        settings = {"train": validate} if key == "bootstrap" else validate
        with pytest.raises(
            ConfigError, match=rf"stage {stage}: schedule\.validate_every: .*one sp"
        ):
            SteerLM2(**GIVEN2, **{key: settings}).stages(1)

    def test_bootstrapped_samples_that_training_would_cut(self) -> None:
        sample = {"sample": {"sampling": {"max_tokens": 100}}}
        with pytest.raises(
            ConfigError, match=r"bootstrap\.sample\.sampling\.max_tokens: 100 is ab"
        ):
            SteerLM(**GIVEN, bootstrap=sample)

    def test_a_round_of_its_own_answers_has_no_other_settings(self) -> None:
        with pytest.raises(
            ConfigError, match=r"pipeline\.bootstrap: .*'steerlm'.*sample, annotate"
        ):
            SteerLM(**GIVEN, bootstrap={"steerlm": {}})

    def test_the_command_line_tells_them_as_well(self) -> None:
        given = [
            "pipeline",
            "pipeline=steerlm2",
            "pipeline.policy=a/b",
            "pipeline.reward_model=a/c",
        ]
        assert check_command.main([*given, "--dry-run"]) == 0
        for wrong, told in {
            "pipeline.steerlm2_iterations=0": "steerlm2_iterations",
            "pipeline.targets=mine": "pipeline.targets",
            "+pipeline.weigh.likelihood.concentration=0": r"stage weigh_1(.|\n)*0\.5 to 2000",
        }.items():
            with pytest.raises(ConfigError, match=told):
                check_command.main([*given, wrong])
        steering = "+pipeline.sample_steered.steering={helpfulness: 4, verbosity: 2}"
        assert check_command.main([*given, "pipeline.targets=fixed", steering]) == 0


RECIPE = """
defaults:
  - steerlm2
annotate_sft:
  choose: {data: world}
  data: {groups: 32}
steerlm:
  choose: {trainer: cpu}
  batching: {global_batch: 8, max_steps: 4}
label_prompts:
  choose: {data: world}
  data: {groups: 24, seed: 2}
sample_steered:
  sampling: {n: 3, temperature: 1.0, top_p: 1.0, max_tokens: 8}
steerlm2:
  choose: {trainer: cpu}
  batching: {global_batch: 4, max_steps: 24}
  schedule: {checkpoint_every: 2}
max_prompt_tokens: 256
max_response_tokens: 256
"""


@pytest.mark.parametrize(
    ("reward", "names", "message"),
    [
        (
            {"choose": {"module": "bradley_terry"}, "attributes": ["helpfulness"]},
            None,
            "labels are ratings 0–4, which the reward model of stage reward_model does not predict",
        ),
        (
            {"choose": {"weights": "helpfulness_only"}, "attributes": ["helpfulness"]},
            ["helpfulness", "verbosity"],
            "labels of verbosity need a reward model that scores them; that of stage reward_model",
        ),
    ],
    ids=["preferences", "names"],
)
def test_labels_need_a_reward_model_that_predicts_them(
    reward: dict[str, Any], names: list[str] | None, message: str
) -> None:
    settings = {**GIVEN, "reward_model": None, "reward": reward}
    if names:
        settings["label"] = {"names": names}
    with pytest.raises(ConfigError, match=message):
        planned(SteerLM(**settings))


def first_step(folder: Path) -> dict[str, float]:
    """What a training logged at its first step."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {row["metric"]: float(row["value"]) for row in rows if row["step"] == "1"}


def folders(folder: Path) -> dict[str, Path]:
    return {entry["name"]: Path(entry["folder"]) for entry in manifest(folder)}


def labels_of(path: Path) -> Sequence[dict[str, int]]:
    return [json.loads(line)["label"] for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes of processor time, many more where cores are busy
def test_it_runs_and_killed_in_its_midst_makes_the_same(
    models: Path, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "short.yaml").write_text(RECIPE)
    pipeline = command(
        "pipeline", f"--config-dir={tmp_path / 'conf'}", "pipeline=short",
        f"pipeline.policy={models / 'sft' / 'export'}",
        f"pipeline.reward_model={models / 'regression' / 'export'}",
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start([*pipeline, *in_folder(whole)])  # meanwhile, on another core
    for name, sign in (("steerlm2_1", "checkpoints/last.ckpt"), ("weigh_2", "run.lock")):
        process = start([*pipeline, *in_folder(killed)])
        pattern = f"{name}-*/{sign}"
        wait_for(lambda p=pattern: any((killed / "stages").glob(p)), process, 800)  # type: ignore[misc]
        kill_with_children(process)
        (folder,) = (killed / "stages").glob(f"{name}-*")
        record = Record.of(folder)
        assert record is not None
        assert record.state == "running", name
    finish(start([*pipeline, *in_folder(killed)]))
    finish(undisturbed)
    assert made(killed) == made(whole)
    stages = folders(whole)
    assert list(stages) == [*FIRST, *iteration(1, "targets"), *iteration(2, "targets")]
    asked = [labels_of(stages[f"targets_{number}"] / "train.jsonl") for number in (1, 2)]
    learned = labels_of(stages["label"] / "train.jsonl")
    for number, labels in zip((1, 2), asked, strict=True):
        assert all(label in learned for label in labels)
        assert labels_of(stages[f"steered_{number}"] / "groups.jsonl") == labels
        # The policy is the proposal still: b' = 1/n, and D is what weigh said it would be.
        logged = first_step(stages[f"steerlm2_{number}"])
        assert logged["train/policy_ess_share"] == pytest.approx(1.0, abs=1e-5)
        assert logged["train/kl_to_reference"] == pytest.approx(0.0, abs=1e-4)
        assert logged["train/distance"] == pytest.approx(logged["train/start_distance"], abs=1e-4)
        steps = json.loads((stages[f"steerlm2_{number}"] / "result.json").read_text())
        assert steps["fingerprints"]["reference"]["is_initial_policy"] is True
    record = json.loads((stages["steerlm2_2"] / "export" / "policy.json").read_text())
    assert record["label_attributes"] == list(learned[0])
