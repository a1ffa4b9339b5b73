"""Combinations that cannot work are refused, those that can are not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.config.rules import RULES, Settings

GOOD: dict[str, Any] = {
    "run_dir": "outputs/x",
    "seed": 1,
    "attributes": ["helpfulness", "verbosity"],
    "backbone": {
        "path": "some/model",
        "init": "pretrained",
        "config": None,
        "dtype": "float32",
        "attention": "auto",
        "tokenizer": {"_target_": "helpsteer2.data.tokenizer.PretrainedTokenizer"},
    },
    "batching": {
        "global_batch": 4,
        "tokens_per_microbatch": 100,
        "epochs": 0.5,
        "max_steps": None,
    },
    "lengths": {"max_prompt_tokens": 10, "max_response_tokens": 10},
    "module": {
        "loss": {"attribute_loss_weights": None},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.0},
        "warmup_steps": 0,
        "gradient_clip": None,
    },
    "weights": {"values": {"helpfulness": 1.0, "complexity": 0.0}},
    "schedule": {"validate_every": None, "checkpoint_every": 10},
    "trainer": {
        "precision": "bf16-mixed",
        "accelerator": "auto",
        "devices": 4,
        "num_nodes": 1,
        "strategy": "ddp",
    },
}


REWARD = {"_target_": "helpsteer2.models.start.RewardStart"}
POLICY = {"_target_": "helpsteer2.models.start.PolicyStart"}
REGRESSION = {"_target_": "helpsteer2.modules.regression.RegressionModule"}
SFT = {"_target_": "helpsteer2.modules.sft.SFTModule"}
DPO = {"_target_": "helpsteer2.modules.dpo.DPOModule"}
RPO = {"_target_": "helpsteer2.modules.dpo.RPOModule"}

SAMPLING = {
    "_target_": "helpsteer2.generation.sampling.SamplingParams",
    "n": 10, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 64, "seed": 1,
}  # fmt: skip


def of_policy(reference: str | None = None, **sampling: float) -> dict[str, Any]:
    """An evaluation of a policy."""
    target = "helpsteer2.evaluation.world_policy.WorldPolicyEvaluation"
    node = {"_target_": target, "reference": reference, "sampling": SAMPLING | sampling}
    return {"evaluators": {"mine": node}}


def findings(**changes: Any) -> list[str]:
    """Paths that the rules complain about; ``__`` stands for a dot."""
    config = copy.deepcopy(GOOD)
    for path, value in changes.items():
        node = config
        *parents, last = path.split("__")
        for key in parents:
            node = node[key]
        node[last] = value
    settings = Settings(config, config)
    return [path for rule in RULES for path, _ in rule(settings)]


def test_a_good_configuration_passes() -> None:
    assert findings() == []


def test_rules_have_nothing_to_say_about_what_is_not_there() -> None:
    settings = Settings({}, {})
    assert [finding for rule in RULES for finding in rule(settings)] == []


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"trainer__precision": "bf16-true"}, "trainer.precision"),
        ({"trainer__precision": "16-true"}, "trainer.precision"),
        ({"trainer__precision": "16-mixed"}, "trainer.precision"),
        ({"backbone__dtype": "bfloat16"}, "backbone.dtype"),
        ({"backbone__dtype": "bfloat16", "backbone__lora": None}, "backbone.dtype"),
        ({"backbone__lora": {"rank": 0}}, "backbone.lora.rank"),
        ({"backbone__lora": {"alpha": 0.0}}, "backbone.lora.alpha"),
        ({"backbone__lora": {"dropout": -0.1}}, "backbone.lora.dropout"),
        ({"backbone__lora": {"dropout": 1.0}}, "backbone.lora.dropout"),
        ({"trainer__precision": "bf16-true", "backbone__lora": {}}, "trainer.precision"),
        ({"backbone__path": None}, "backbone.path"),
        ({"backbone__path": None, "backbone__init": "random"}, "backbone.config"),
        (
            {"backbone__tokenizer___target_": "helpsteer2.data.tokenizer.TrainedTokenizer"},
            "backbone.tokenizer",
        ),
        ({"backbone__attention": "flash", "trainer__accelerator": "cpu"}, "backbone.attention"),
        ({"backbone__attention": "flex", "trainer__accelerator": "cpu"}, "backbone.attention"),
        ({"batching__global_batch": 3}, "batching.global_batch"),
        ({"trainer__num_nodes": 2}, "batching.global_batch"),
        ({"trainer__devices": [0, 1, 2, 3, 4]}, "batching.global_batch"),
        ({"batching__epochs": None}, "batching.epochs"),
        ({"batching__epochs": 0}, "batching.epochs"),
        ({"batching__max_steps": 0}, "batching.max_steps"),
        ({"schedule__validate_every": 0}, "schedule.validate_every"),
        ({"schedule__checkpoint_every": -1}, "schedule.checkpoint_every"),
        ({"lengths__max_prompt_tokens": 0}, "lengths.max_prompt_tokens"),
        ({"module__optimizer__lr": 0.0}, "module.optimizer.lr"),
        ({"module__gradient_clip": 0}, "module.gradient_clip"),
        ({"module__optimizer__lr": float("nan")}, "module.optimizer.lr"),
        ({"batching__epochs": float("inf")}, "batching.epochs"),
        ({"batching__global_batch": 0}, "batching.global_batch"),
        ({"model": "/no/such/model"}, "model"),
        ({"backbone__path": "./no/such/model"}, "backbone.path"),
        (
            {"evaluators": {"ratings": {"data": {"path": "~/no/such"}}}},
            "evaluators.ratings.data.path",
        ),
        ({"module__warmup_steps": -1}, "module.warmup_steps"),
        ({"seed": -1}, "seed"),
        ({"weights__values": {"complexity": 1.0}}, "weights.values"),
        ({"weights__values": {"helpfulness": 0.0}}, "weights.values"),
        (
            {"module__loss__attribute_loss_weights": {"quality": 1.0}},
            "module.loss.attribute_loss_weights",
        ),
        ({"attributes": ["helpfulness", "helpfulness"]}, "attributes"),
        ({"model": POLICY, "module": REGRESSION}, "model"),
        ({"model": REWARD, "module": SFT}, "model"),
        ({"model": POLICY, "module": DPO}, "reference"),
        ({"model": POLICY, "module": RPO}, "reference"),
        ({"model": POLICY, "module": SFT, "reference": "some/reference"}, "reference"),
        ({"model": POLICY, "module": DPO, "reference": "./no/such/folder"}, "reference"),
        ({"module__loss__beta": 0.0}, "module.loss.beta"),
        ({"module__sft_weight": -1.0}, "module.sft_weight"),
        ({"module__loss__label_smoothing": 0.5}, "module.loss.label_smoothing"),
        ({"min_gap": -1.0}, "min_gap"),
        ({"max_prompts": 0}, "max_prompts"),
        ({"sampling": SAMPLING | {"n": 0}}, "sampling.n"),
        ({"sampling": SAMPLING | {"top_p": 1.5}}, "sampling.top_p"),
        ({"sampling": SAMPLING | {"temperature": float("nan")}}, "sampling.temperature"),
        ({"sampling": SAMPLING | {"temperature": 0.0}}, "sampling.n"),
        (of_policy(top_k=-1), "evaluators.mine.sampling.top_k"),
        (of_policy(reference="a/b", top_k=5), "evaluators.mine.sampling.top_k"),
        (of_policy(reference="a/b", top_p=0.9), "evaluators.mine.sampling.top_p"),
        (of_policy(reference="a/b", temperature=0.7), "evaluators.mine.sampling.temperature"),
        ({"model": REWARD | {"init_from": "./no/such/model"}}, "model.init_from"),
        ({"attributes": [], "weights": None}, "attributes"),
        ({"module___target_": "helpsteer2.modules.preference.PreferenceModule"}, "attributes"),
        ({"model": ["some/model", "/no/such/model"]}, "model"),
        ({"trainer__max_steps": 5}, "trainer.max_steps"),
        ({"trainer__gradient_clip_val": 1.0}, "trainer.gradient_clip_val"),
        ({"trainer__strategy": "fsdp"}, "trainer.strategy"),
        ({"run_dir": "~/runs"}, "run_dir"),
        ({"run_dir": f"{__file__}/x"}, "run_dir"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], path: str) -> None:
    assert findings(**changes) == [path]


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone__init": "random"},
        {
            "backbone__init": "random",
            "backbone__path": None,
            "backbone__config": {"model_type": "llama"},
        },
        {"backbone__attention": "flash"},
        {"backbone__dtype": "bfloat16", "backbone__lora": {"rank": 8}},
        {"backbone__attention": "sdpa", "trainer__accelerator": "cpu"},
        {"batching__epochs": None, "batching__max_steps": 3},
        {"trainer__devices": "auto", "batching__global_batch": 1},
        {"trainer__precision": "32-true"},
        {"weights": None},
        {"module__loss__attribute_loss_weights": {"verbosity": 0.5}},
        {"trainer__logger": False},
        {"model": POLICY, "module": SFT},
        {"model": POLICY, "module": SFT, "attributes": []},
        {"model": POLICY, "module": DPO, "reference": "outputs/later/reference"},
        {"model": REWARD, "module": REGRESSION},
        # What is misspelt is told where the node itself is checked.
        {"model": {"_target_": "helpsteer2.models.start.NoSuchStart"}, "module": SFT},
        {"model": "outputs/later/export"},
        {"model": str(Path(__file__).parent)},
        {"sampling": SAMPLING | {"temperature": 0.0, "n": 1}, "max_prompts": None, "min_gap": 0},
        of_policy(top_k=5, temperature=0.7),
        of_policy(reference="a/b"),
    ],
)
def test_what_can_work_is_allowed(changes: dict[str, Any]) -> None:
    assert findings(**changes) == []
