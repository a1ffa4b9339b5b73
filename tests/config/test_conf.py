"""The files of ``conf``: every one composes, validates, and says nothing twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.config.annotations import TARGET
from helpsteer2.config.checked import check
from helpsteer2.config.compose import conf_dir
from helpsteer2.config.signatures import read_signature
from helpsteer2.errors import ConfigError

CONF = conf_dir()
GROUPS = ("backbone", "data", "logger", "lora", "module", "trainer", "weights")
NEEDS = {
    "backbone=local": ["backbone.path=some/model"],
    "data=local": ["data.path=some/folder"],
    "data=groups": ["data.path=some/folder"],
    "data=chat": ["data.path=some/folder"],
    "experiment=reward/local_slice": ["data.path=some/folder"],
    "experiment=reward/world": ["backbone.path=some/model"],
    "experiment=sft/local_chat": ["data.path=some/folder"],
    "experiment=reward/helpsteer2_preference_scaled_from_regression": [
        "model.init_from=some/export"
    ],
    "experiment=dpo/world": ["backbone.path=some/model", "reference=some/reference"],
    "experiment=steerlm/helpsteer2_llama3_70b_sft": ["data.path=some/folder"],
    "experiment=steerlm/helpsteer2_llama3_70b": [
        "backbone.path=some/model", "data.path=some/folder", "reference=some/reference"
    ],
    "experiment=steerlm/world_sft": ["backbone.path=some/model", "data.path=some/folder"],
    "experiment=steerlm/world": [
        "backbone.path=some/model", "data.path=some/folder", "reference=some/reference"
    ],
    **{
        f"experiment=dpo/{name}": [
            "backbone.path=some/model", "data.path=some/folder", "reference=some/reference"
        ]
        for name in ("helpsteer2_llama3_70b", "helpsteer2_llama3_70b_iteration", "local_slice")
    },
    **{
        f"experiment=on_policy/{name}": [
            "backbone.path=some/model", "reward_model=some/export",
            "rollouts.statistics=some/statistics.json",
        ]
        for name in ("helpsteer2_llama3_70b_ppo", "world_ppo", "world_rloo")
    },
    **{
        choice: ["reward_model=some/export"]
        for choice in (
            "experiment=on_policy/helpsteer2_preference_reinforce", "module=ppo",
            "module=reinforce",
        )
    },
    **{
        f"module={name}": ["reference=some/reference"]
        for name in (
            "dpo", "dpo_hinge", "dpo_ipo", "dpo_margin", "dpo_robust", "dpo_scaled",
            "dpo_smoothed", "rpo", "rpo_forward_kl", "rpo_squared", "steerlm2",
        )
    },
}  # fmt: skip
"""What has to be given with a choice that leaves something open."""


def options(group: str) -> list[str]:
    folder = CONF / group
    files = folder.rglob("*.yaml")
    return sorted(f"{group}={file.relative_to(folder).with_suffix('')}" for file in files)


@pytest.mark.parametrize("choice", options("experiment"))
def test_every_experiment_composes_and_validates(choice: str) -> None:
    command = "pipeline" if choice.startswith("experiment=pipeline/") else "train"
    (job,) = check(CONFIG_COMMANDS[command], [choice, *NEEDS.get(choice, [])]).jobs
    assert job["run_dir"].startswith(f"outputs/{command}/")


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_composes_and_validates(group: str) -> None:
    for choice in options(group):
        check(CONFIG_COMMANDS["train"], [choice, *NEEDS.get(choice, [])])


def test_a_module_brings_the_kind_of_model_that_it_trains() -> None:
    command, kinds = CONFIG_COMMANDS["train"], {"sft": "PolicyStart", "regression": "RewardStart"}
    for module, kind in kinds.items():
        (job,) = check(command, [f"module={module}"]).jobs
        assert job["model._target_"] == f"helpsteer2.models.start.{kind}"
    assert {choice.partition("=")[2] for choice in options("start")} == {"policy", "reward"}
    (job,) = check(command, ["module=regression", "model.init_from=some/export"]).jobs
    assert job["model.init_from"] == "some/export"
    with pytest.raises(ConfigError, match=r"model: builds a RewardModel, but SFTModule trains a"):
        check(command, ["module=sft", "start@model=reward"])


def test_evaluate_takes_every_evaluator_and_weighting() -> None:
    names = [choice.partition("=")[2] for choice in options("evaluator")]
    (job,) = check(
        CONFIG_COMMANDS["evaluate"], ["model=some/export", f"evaluator=[{','.join(names)}]"]
    ).jobs
    assert sorted(job["evaluators"]) == names
    weightings = {option.partition("=")[2] for option in options("weights")}
    assert set(job["weightings"]) == weightings
    assert all(job[f"weightings.{name}.name"] == name for name in weightings)


def test_the_paper_recipe_has_the_paper_values() -> None:
    (job,) = check(CONFIG_COMMANDS["train"], ["experiment=reward/helpsteer2_llama3_70b"]).jobs
    # arXiv 2406.08673, appendix H: 128 rows a step are 64 pairs, for two passes.
    assert job["batching.global_batch"] == 64
    assert job["batching.epochs"] == 2
    assert 2 * 10_162 // job["batching.global_batch"] == 317
    assert job["module.optimizer.lr"] == 2e-6
    assert job["module.optimizer.betas"] == [0.9, 0.98]
    assert job["lengths.max_prompt_tokens"] + job["lengths.max_response_tokens"] == 4096
    assert job["backbone.path"] == job["backbone.tokenizer.path"] == "meta-llama/Meta-Llama-3-70B"
    assert job["weights.values"] == {
        "helpfulness": 0.65,
        "correctness": 0.80,
        "coherence": 0.45,
        "complexity": 0.55,
        "verbosity": -0.40,
    }


def test_adapters_are_one_word_away_and_may_stand_beside_bf16_weights() -> None:
    command = CONFIG_COMMANDS["train"]
    (job,) = check(command, []).jobs
    assert job["backbone.lora"] is None
    (job,) = check(command, ["lora=default", "backbone.dtype=bfloat16"]).jobs
    assert job["backbone.lora.rank"] == 16
    (job,) = check(command, ["lora=default", "backbone.lora.target_modules=all-linear"]).jobs
    assert job["backbone.lora.target_modules"] == "all-linear"
    for wrong in ("backbone.lora.target_modules=all", "backbone.lora.rnk=3", "lora=big"):
        with pytest.raises(ConfigError, match="lora"):
            check(command, ["lora=default", wrong])


def test_the_recipe_of_the_preference_chain_has_its_values() -> None:
    names = ("regression", "bradley_terry", "margin", "scaled", "scaled_from_regression")
    jobs = {}
    for name in names:
        choice = f"experiment=reward/helpsteer2_preference_{name}"
        (jobs[name],) = check(CONFIG_COMMANDS["train"], [choice, *NEEDS.get(choice, [])]).jobs
    base = "meta-llama/Llama-3.1-70B-Instruct"
    assert {job["backbone.path"] for job in jobs.values()} == {base}
    assert {job["batching.global_batch"] for job in jobs.values()} == {64}
    first, *pairs = jobs.values()
    # arXiv 2410.01257; NeMo-Aligner, docs/user-guide/steerlm.rst: 317 steps, then 105.
    assert (first["module.optimizer.lr"], first["attributes"]) == (2e-6, ["helpfulness"])
    assert 10_162 * first["batching.epochs"] // 64 == 317
    for job in pairs:
        assert job["module.optimizer.lr"] == 1e-6
        assert job["module.warmup_steps"] == 10
        assert 6_766 * job["batching.epochs"] // 64 == 105
        assert job["data.config"] == "preference"
    losses = [job["module.loss._target_"].rpartition(".")[2] for job in pairs]
    scaled = "ScaledBradleyTerry"
    assert losses == ["BradleyTerry", "MarginBradleyTerry", scaled, scaled]
    assert [job["attributes"] for job in pairs] == [["reward"]] * 3 + [["helpfulness"]]
    assert [job["model.init_from"] for job in pairs] == [None] * 3 + ["some/export"]


def test_the_recipes_of_supervised_fine_tuning_have_their_values() -> None:
    command, jobs = CONFIG_COMMANDS["train"], []
    for name in ("daring_anteater", "open_assistant"):
        jobs += check(command, [f"experiment=sft/{name}_llama3_70b"]).jobs
    for job in jobs:
        assert job["backbone.path"] == "meta-llama/Meta-Llama-3-70B"
        assert job["model._target_"] == "helpsteer2.models.start.PolicyStart"
        assert (job["module.optimizer.lr"], job["schedule.checkpoint_every"]) == (2e-6, 200)
        assert job["lengths.max_prompt_tokens"] + job["lengths.max_response_tokens"] == 4096
    anteater, assistant = jobs
    # arXiv 2406.08673, section 4: 384 and 128 answers a step, for about 2 and 4 epochs.
    assert (anteater["batching.max_steps"], assistant["batching.max_steps"]) == (1600, 2400)
    assert round(384 / 2.88) == anteater["batching.global_batch"]
    assert round(4 * 56_000 / 2400) == assistant["batching.global_batch"]
    assert anteater["data.of.path"] == "nvidia/Daring-Anteater"
    assert assistant["data.conversations"] is True


def test_the_recipes_of_dpo_have_their_values() -> None:
    jobs = []
    for name in ("helpsteer2_llama3_70b", "helpsteer2_llama3_70b_iteration"):
        choice = f"experiment=dpo/{name}"
        jobs += check(CONFIG_COMMANDS["train"], [choice, *NEEDS[choice]]).jobs
    for job in jobs:
        # arXiv 2406.08673, section 4: 128 pairs a step, β = 1e-3.
        assert (job["batching.global_batch"], job["module.loss.beta"]) == (128, 1e-3)
        assert job["module.loss._target_"] == "helpsteer2.losses.dpo.DPOLoss"
        assert job["module.optimizer.weight_decay"] == 0.1
        assert job["lengths.max_prompt_tokens"] + job["lengths.max_response_tokens"] == 4096
    first, iteration = jobs
    assert (first["batching.epochs"], first["module.optimizer.lr"]) == (7, 2e-7)
    assert first["schedule.checkpoint_every"] == 25
    assert 7 * 7221 // 128 == 394
    assert (iteration["batching.epochs"], iteration["module.optimizer.lr"]) == (3, 9e-8)


def test_the_recipes_of_on_policy_training_have_their_values() -> None:
    jobs = []
    for name in ("helpsteer2_llama3_70b_ppo", "helpsteer2_preference_reinforce"):
        choice = f"experiment=on_policy/{name}"
        jobs += check(CONFIG_COMMANDS["train"], [choice, *NEEDS[choice]]).jobs
    for job in jobs:
        longest = job["lengths.max_prompt_tokens"] + job["rollouts.sampling.max_tokens"]
        assert (longest, job["rollouts.unfinished"], job["rollouts.epochs"]) == (4096, "mask", 1)
        # NeMo-Aligner: |log-ratio|, off the reward.
        assert (job["module.kl.estimator"], job["module.kl.place"]) == ("abs", "reward")
    ppo, reinforce = jobs
    # arXiv 2406.08673, section 4.3: 128 responses a step and an iteration, 64 steps.
    samples = ppo["rollouts.sampling.n"]
    assert samples * ppo["batching.global_batch"] == samples * ppo["rollouts.prompts"] == 128
    assert (ppo["batching.max_steps"], ppo["schedule.export_every"]) == (64, 4)
    assert (ppo["module.optimizer.lr"], ppo["module.kl.coefficient"]) == (1e-7, 3e-3)
    assert ppo["weights.name"] == "helpsteer2_rlhf"
    assert ppo["module.critic.init_from"] == ppo["reward_model"]
    # NeMo-Aligner, docs/user-guide/reinforce.rst: 313 iterations of 32 prompts, with 32 responses
    # a step.
    samples = reinforce["rollouts.sampling.n"]
    assert (samples, reinforce["batching.global_batch"] * samples) == (4, 32)
    responses = reinforce["batching.max_steps"] * reinforce["batching.global_batch"] * samples
    assert responses == 313 * reinforce["rollouts.prompts"] * samples == 313 * 32 * 4
    assert (reinforce["module.optimizer.lr"], reinforce["module.kl.coefficient"]) == (1e-6, 0.01)
    assert reinforce["module.advantages.baseline"] == "leave_one_out"
    assert reinforce["module.kl.reduction"] == "mean"


def test_a_preference_module_alone_is_a_whole_configuration() -> None:
    for name in ("bradley_terry", "margin_bradley_terry", "scaled_bradley_terry"):
        (job,) = check(CONFIG_COMMANDS["train"], [f"module={name}"]).jobs
        assert job["attributes"] == ["reward"]
        assert job["weights"] is None
    given = ["module=bradley_terry", "attributes=[verbosity]", "weights=uniform"]
    with pytest.raises(ConfigError, match="names helpfulness"):
        check(CONFIG_COMMANDS["train"], given)


PAPER_RECIPES = (
    "dpo/helpsteer2_llama3_70b",
    "dpo/helpsteer2_llama3_70b_iteration",
    "on_policy/helpsteer2_llama3_70b_ppo",
    "on_policy/helpsteer2_preference_reinforce",
    "reward/helpsteer2_llama3_70b",
    "reward/helpsteer2_preference_bradley_terry",
    "reward/helpsteer2_preference_regression",
    "sft/daring_anteater_llama3_70b",
    "sft/open_assistant_llama3_70b",
)


@pytest.mark.parametrize("recipe", PAPER_RECIPES)
def test_every_value_of_a_paper_recipe_names_its_source(recipe: str) -> None:
    text = (CONF / f"experiment/{recipe}.yaml").read_text(encoding="utf-8")
    body = text[text.index("batching:") :].splitlines()
    source = ""
    for line in body:
        source = line if line.strip().startswith("#") else source
        is_value = ":" in line and not line.rstrip().endswith(":")
        if is_value and not line.strip().startswith("#"):
            has_source = "HS2" in line or "NeMo" in line
            assert has_source or ("NeMo" in source and "_tokens" in line), line


def target_nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if TARGET in node:
            yield node
        for value in node.values():
            yield from target_nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from target_nodes(value)


@pytest.mark.parametrize(
    "file",
    [file for file in sorted(CONF.rglob("*.yaml")) if "experiment" not in file.parts],
    ids=lambda file: str(file.relative_to(CONF)),
)
def test_no_key_restates_a_default(file: Path) -> None:
    # An experiment may: it pins the values of its source.
    for node in target_nodes(yaml.safe_load(file.read_text(encoding="utf-8"))):
        signature = read_signature(node[TARGET])
        assert signature is not None, f"{node[TARGET]} cannot be read"
        restated = {
            key: value
            for key, value in node.items()
            if key in signature.parameters
            and type(value) is type(signature.parameters[key].default)
            and value == signature.parameters[key].default
        }
        assert not restated
