"""On-policy training that cannot work is refused before anything is loaded; what can is not."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.config.checked import check
from helpsteer2.config.compose import composer
from helpsteer2.config.on_policy import vocabulary
from helpsteer2.config.validate import Mistake, plain, validate
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.errors import ConfigError, UserError
from helpsteer2.losses.kl_penalty import KLPenalty
from helpsteer2.rollouts.advantages import AgainstBaseline, ResponseRewards

TRAIN = CONFIG_COMMANDS["train"]
GIVEN = ["backbone=local", "backbone.path=some/policy", "reward_model=some/model"]

LORA = {"_target_": "helpsteer2.models.lora.Lora", "rank": 8}
CLIPPED = "helpsteer2.losses.policy_gradient.ClippedLoss"
ADVANTAGES = "helpsteer2.rollouts.advantages"
SCORER = "helpsteer2.rewards.scorer.RewardScorer.from_pretrained"
CLIENT = "helpsteer2.rewards.client.RewardClient"
ENGINE = "helpsteer2.generation.local.LocalEngine"
SERVER = "http://127.0.0.1:8000"


@cache
def composed(module: str) -> dict[str, Any]:
    """A good configuration, as plain containers."""
    with composer(TRAIN.config_name, TRAIN.target, None, None) as hydra:
        composition = hydra.compose([f"module={module}", *GIVEN])
    assert composition.config is not None
    config, mistakes = plain(composition.config)
    assert not mistakes
    return config


def mistakes(module: str, **changes: Any) -> list[Mistake]:
    """What is wrong with a configuration after changes; ``__`` stands for a dot."""
    config = copy.deepcopy(composed(module))
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = config
        for key in parents:
            node = node.setdefault(key, {})
        if value is None and path == "rollouts":
            del node[last]
        else:
            node[last] = value
    return validate(config, TRAIN.target)[1]


def scored_by(model: str) -> dict[str, Any]:
    """Changes that ``reward_model=MODEL`` makes."""
    return {"reward_model": model, "rollouts__rewarder__path": model}


@pytest.mark.parametrize("module", ["ppo", "reinforce"])
def test_adapters_of_a_policy_that_samples_have_no_dropout(module: str) -> None:
    assert mistakes(module, backbone__lora=LORA) == []
    (found,) = mistakes(module, backbone__lora={**LORA, "dropout": 0.1})
    assert found.path == "backbone.lora.dropout"


@pytest.mark.parametrize("module", ["ppo", "reinforce"])
def test_a_module_with_a_policy_and_a_reward_model_is_a_whole_configuration(module: str) -> None:
    assert mistakes(module) == []
    (job,) = check(TRAIN, [f"module={module}", *GIVEN]).jobs
    assert job["model._target_"] == "helpsteer2.models.start.PolicyStart"
    assert (job["rollouts.sampling.temperature"], job["rollouts.sampling.n"]) == (1.0, 4)
    assert job["weights.name"] == "helpsteer2_rlhf"


@pytest.mark.parametrize(
    ("module", "changes", "path"),
    [
        ("ppo", {"rollouts": None}, "rollouts"),
        ("sft", {"reward_model": "some/model"}, "reward_model"),
        ("ppo", {"schedule__validate_every": 5}, "schedule.validate_every"),
        ("ppo", {"optimized_metric": "val/loss"}, "optimized_metric"),
        ("reinforce", {"rollouts__sampling__temperature": 0.7}, "rollouts.sampling.temperature"),
        ("reinforce", {"rollouts__sampling__temperature": 0}, "rollouts.sampling.temperature"),
        ("ppo", {"rollouts__sampling__top_p": 0.9}, "rollouts.sampling.top_p"),
        ("ppo", {"rollouts__sampling__top_k": 50}, "rollouts.sampling.top_k"),
        ("ppo", {"rollouts__sampling__seed": 3}, "rollouts.sampling.seed"),
        ("reinforce", {"rollouts__sampling__n": 1}, "rollouts.sampling.n"),
        (
            "reinforce",
            {"rollouts__sampling__n": 1, "module__advantages__normalise": True},
            "rollouts.sampling.n",
        ),
        (
            "reinforce",
            {"module__advantages__normalise": True, "module__advantages__baseline": "batch_mean"},
            "module.advantages.normalise",
        ),
        (
            "reinforce",
            {"module__advantages": {"_target_": f"{ADVANTAGES}.GAE"}},
            "module.advantages",
        ),
        ("ppo", {"module__advantages__gamma": 1.1}, "module.advantages.gamma"),
        ("ppo", {"module__advantages__lam": -0.1}, "module.advantages.lam"),
        ("ppo", {"module__kl__place": "loss"}, "module.kl.estimator"),
        ("ppo", {"module__kl__coefficient": -1.0}, "module.kl.coefficient"),
        ("ppo", {"module__kl__target": 6.0, "module__kl__coefficient": 0}, "module.kl.target"),
        ("ppo", {"module__kl__target": 0}, "module.kl.target"),
        ("ppo", {"module__kl__horizon": 0, "module__kl__target": 6.0}, "module.kl.horizon"),
        ("ppo", {"module__kl__horizon": 1000}, "module.kl.horizon"),
        ("ppo", {"module__kl__estimator": "k4"}, "module.kl.estimator"),
        ("ppo", {"module__loss__clip": 1.0}, "module.loss.clip"),
        ("ppo", {"module__loss__clip_high": 0.0}, "module.loss.clip_high"),
        ("reinforce", {"module__loss__entropy": -0.1}, "module.loss.entropy"),
        ("ppo", {"module__value_loss__clip": 0.0}, "module.value_loss.clip"),
        ("ppo", {"module__critic_lr": 0.0}, "module.critic_lr"),
        ("ppo", {"module__critic_first_steps": -1}, "module.critic_first_steps"),
        ("ppo", {"module__critic_warmup_steps": -1}, "module.critic_warmup_steps"),
        ("ppo", {"module__critic_gradient_clip": 0.0}, "module.critic_gradient_clip"),
        ("ppo", {"module__critic__lora": LORA}, "module.critic.lora"),
        (
            "ppo",
            {"module__critic__lora": LORA | {"rank": 0}, "module__critic__init_from": "some/model"},
            "module.critic.lora.rank",
        ),
        ("ppo", {"module__optimizer__lr": 0.0}, "module.optimizer.lr"),
        ("ppo", {"batching__global_batch": 24}, "rollouts.prompts"),
        ("ppo", {"batching__global_batch": 128}, "rollouts.prompts"),
        ("ppo", {"batching__epochs": None}, "batching.epochs"),
        ("ppo", {"rollouts__prompts": 0}, "rollouts.prompts"),
        ("ppo", {"rollouts__epochs": 0}, "rollouts.epochs"),
        ("ppo", {"rollouts__max_kl": 0.0}, "rollouts.max_kl"),
        ("ppo", {"rollouts__beyond_max_kl": "shrink"}, "rollouts.beyond_max_kl"),
        (
            "ppo",
            {"rollouts__engine": {"_target_": ENGINE, "device": "cpu"}},
            "rollouts.engine.device",
        ),
        ("ppo", {"rollouts__unfinished": "penalise", "rollouts__penalty": -1}, "rollouts.penalty"),
        ("ppo", {"rollouts__penalty": 2.0}, "rollouts.penalty"),
        ("ppo", {"rollouts__statistics": "./no/such.json"}, "rollouts.statistics"),
        ("ppo", {"rollouts__reference": "./no/such/model"}, "rollouts.reference"),
        ("ppo", {"rollouts__reference": SERVER}, "rollouts.reference"),
        ("ppo", {"module__critic__init_from": SERVER}, "module.critic.init_from"),
        ("ppo", {"reference": "some/reference"}, "reference"),
        ("ppo", {"trainer__strategy": "fsdp"}, "trainer.strategy"),
        ("ppo", {"model": {"_target_": "helpsteer2.models.start.RewardStart"}}, "model"),
        ("ppo", scored_by(SERVER), "reward_model"),
        ("ppo", scored_by("/no/such/model"), "reward_model"),
        (
            "ppo",
            {
                "rollouts__watch__other": {
                    "_target_": CLIENT,
                    "_partial_": True,
                    "url": "some/other",
                }
            },
            "rollouts.watch.other.url",
        ),
        (
            "ppo",
            {
                "rollouts__engine": {
                    "_target_": "helpsteer2.generation.openai.OpenAIEngine",
                    "base_url": "http://127.0.0.1:8000/v1",
                    "server": "vllm",
                }
            },
            "rollouts.engine",
        ),
    ],
)
def test_what_cannot_work_is_refused_once(module: str, changes: dict[str, Any], path: str) -> None:
    assert [mistake.path for mistake in mistakes(module, **changes)] == [path]


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        ("reinforce", {"rollouts__sampling__n": 1, "module__advantages__baseline": "batch_mean"}),
        ("reinforce", {"module__advantages__normalise": True}),
        ("reinforce", {"module__loss": {"_target_": CLIPPED}}),
        ("ppo", {"rollouts__sampling__n": 1}),
        ("ppo", {"module__kl__place": "loss", "module__kl__estimator": "k3"}),
        ("ppo", {"module__kl__target": 6.0, "module__kl__horizon": 1000}),
        ("ppo", {"module__critic__init_from": "some/model", "module__critic__lora": LORA}),
        ("ppo", {"module__critic__init_from": "some/model", "rollouts__reference": "some/policy"}),
        ("ppo", {"rollouts__unfinished": "penalise", "rollouts__penalty": 0.5}),
        ("ppo", {"rollouts__statistics": "outputs/later/statistics.json"}),
        ("ppo", {"batching__epochs": None, "batching__max_steps": 3}),
        ("ppo", {"batching__global_batch": 16, "rollouts__max_kl": 10.0}),
        ("ppo", {"rollouts__max_kl": 10.0, "rollouts__beyond_max_kl": "shrink"}),
        ("ppo", {"rollouts__engine": {"_target_": ENGINE, "max_rows": 64}}),
        ("ppo", {"backbone__dtype": "bfloat16", "backbone__lora": LORA}),
        ("ppo", {"optimized_metric": None, "weights": None}),
        (
            "ppo",
            {
                "reward_model": SERVER,
                "rollouts__rewarder": {"_target_": CLIENT, "_partial_": True, "url": SERVER},
            },
        ),
    ],
)  # fmt: skip
def test_what_can_work_is_allowed(module: str, changes: dict[str, Any]) -> None:
    assert mistakes(module, **changes) == []


def test_who_learns_from_groups_that_are_there_samples_none() -> None:
    found = [mistake.path for mistake in mistakes("sft", rollouts=composed("ppo")["rollouts"])]
    assert found == ["rollouts", "reward_model"]


@pytest.mark.parametrize("scorer", ["local", "http", "oracle"])
def test_every_scorer_can_give_the_reward_and_watch(scorer: str) -> None:
    address = SERVER if scorer == "http" else "some/model"
    overrides = [f"scorer@rollouts.rewarder={scorer}", f"+scorer@rollouts.watch.other={scorer}"]
    (job,) = check(TRAIN, ["module=ppo", *GIVEN, *overrides, f"reward_model={address}"]).jobs
    assert job["rollouts.watch.other._target_"] == job["rollouts.rewarder._target_"]


def test_a_critic_that_follows_the_reward_model_starts_from_no_server() -> None:
    given = ["experiment=on_policy/world_ppo", "backbone.path=some/policy"]
    given += ["rollouts.statistics=some/statistics.json"]
    given += ["scorer@rollouts.rewarder=http", f"reward_model={SERVER}"]
    with pytest.raises(ConfigError) as caught:
        check(TRAIN, given)
    (line,) = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert line.startswith(f"module.critic.init_from: {SERVER}")
    for start in ("null", "some/model"):
        (job,) = check(TRAIN, [*given, f"module.critic.init_from={start}"]).jobs
        assert job["rollouts.rewarder.url"] == SERVER


def test_all_comes_together_with_the_place_of_each() -> None:
    wrong = ["reference=some/reference", "schedule.validate_every=5", "module.kl.place=loss"]
    wrong += ["engine@rollouts.engine=openai"]
    with pytest.raises(ConfigError) as caught:
        check(TRAIN, ["module=ppo", *GIVEN, *wrong])
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    paths = ["reference", "schedule.validate_every", "module.kl.estimator", "rollouts.engine"]
    assert sorted(line.partition(":")[0] for line in lines) == sorted(paths)
    assert sum("[command line]" in line for line in lines) >= 2
    assert any("rollouts.reference=POLICY" in line for line in lines)


@pytest.mark.parametrize("place", ["reward", "loss"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_penalties_are_refused_exactly_where_the_class_refuses_them(
    place: str, estimator: str
) -> None:
    for coefficient, target in itertools.product((0.0, 0.1), (None, 6.0)):
        values: dict[str, Any] = {
            "place": place, "estimator": estimator, "coefficient": coefficient, "target": target,
        }  # fmt: skip
        changes = {f"module__kl__{name}": value for name, value in values.items()}
        assert bool(mistakes("reinforce", **changes)) == refuses(lambda: KLPenalty(**values))  # noqa: B023


def refuses(make: Callable[[], object]) -> bool:
    try:
        make()
    except UserError:
        return True
    return False


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("baseline", ["none", "batch_mean", "leave_one_out"])
def test_one_sample_is_refused_where_nothing_would_be_learned(
    baseline: Any, normalise: bool
) -> None:
    changes = {"module__advantages__baseline": baseline, "module__advantages__normalise": normalise}
    found = {mistake.path for mistake in mistakes("reinforce", **changes, rollouts__sampling__n=1)}
    if refuses(lambda: AgainstBaseline(baseline, normalise)):
        assert found == {"module.advantages.normalise"}
        return
    rewards = np.random.default_rng(0).normal(size=(5, 1))
    earned = ResponseRewards(rewards, np.zeros((5, 1)), np.ones((5, 1), bool))
    advantages = AgainstBaseline(baseline, normalise).of_responses(earned)
    assert (found == {"rollouts.sampling.n"}) == (not advantages.any())


def export(folder: Path, file: str, **content: Any) -> str:
    """A folder with the small files of an export."""
    folder.mkdir(parents=True)
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


def test_a_policy_scores_nothing_and_a_reward_model_samples_nothing(tmp_path: Path) -> None:
    policy, model = (
        export(tmp_path / "p", "policy.json"),
        export(tmp_path / "r", "reward_model.json"),
    )
    (found,) = mistakes("ppo", **scored_by(policy), module__critic__init_from=policy)
    assert found.path == "reward_model"
    watcher = {"_target_": SCORER, "_partial_": True, "path": policy}
    (found,) = mistakes("reinforce", rollouts__watch__other=watcher)
    assert found.path == "rollouts.watch.other.path"
    paths = ["backbone.path", "rollouts.reference"]
    found_paths = [m.path for m in mistakes("ppo", backbone__path=model, rollouts__reference=model)]
    assert found_paths == paths
    good = {**scored_by(model), "backbone__path": policy, "rollouts__reference": policy}
    assert mistakes("ppo", **good, module__critic__init_from=model) == []


def test_weights_name_what_the_reward_model_scores(tmp_path: Path) -> None:
    two = export(tmp_path / "two", "reward_model.json", attribute_names=["helpfulness", "wit"])
    one = export(tmp_path / "one", "reward_model.json", attribute_names=["quality"])
    (found,) = mistakes("ppo", **scored_by(two))
    assert found.path == "weights.values"
    assert "correctness" in found.message
    (found,) = mistakes("ppo", **scored_by(two), weights=None)
    assert found.path == "weights"
    values = {"wit": 1.0, "correctness": 0.0}
    assert mistakes("ppo", **scored_by(two), weights__values=values) == []
    # The only score is the reward.
    assert (
        mistakes("ppo", **scored_by(one)) == mistakes("ppo", **scored_by(one), weights=None) == []
    )


def with_tokens(folder: Path, extra: str) -> Path:
    """A folder with the tokenizer of an export, with a token of its own."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.add_special_tokens([AddedToken(extra, special=True)])
    words.save(str(folder / "tokenizer.json"))
    return folder


def test_a_critic_reads_the_ids_of_the_policy(tmp_path: Path) -> None:
    policy = export(tmp_path / "p", "policy.json", tokenizer_hash="1")
    same = export(tmp_path / "same", "reward_model.json", tokenizer_hash="1")
    template = export(tmp_path / "template", "reward_model.json", tokenizer_hash="2")
    other = export(tmp_path / "other", "reward_model.json", tokenizer_hash="3")
    for folder, token in ((policy, "<end>"), (template, "<end>"), (other, "<stop>")):
        with_tokens(Path(folder), token)
    given = {"backbone__path": policy, "backbone__tokenizer__path": policy}
    for critic, expected in ((same, []), (template, []), (other, ["module.critic.init_from"])):
        found = mistakes("ppo", **given, module__critic__init_from=critic)
        assert [mistake.path for mistake in found] == expected
    # As a scorer it reads text, and may have any tokenizer.
    assert mistakes("ppo", **given, **scored_by(other)) == []


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        ["some words of a text, and some more words"] * 9,
        trainers.UnigramTrainer(vocab_size=40, unk_token="?", special_tokens=["?"]),
    )
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def byte_level(folder: Path) -> PreTrainedTokenizerFast:
    return TrainedTokenizer(300).build(lambda: iter(["some words of a text"]), folder)


def test_vocabularies_are_those_that_a_tokenizer_has(tmp_path: Path) -> None:
    for kind, tokenizer in (
        ("bpe", byte_level(tmp_path / "cache")),
        ("unigram", PreTrainedTokenizerFast(tokenizer_object=unigram())),
    ):
        tokenizer.save_pretrained(tmp_path / kind)
        assert vocabulary(tmp_path / kind) == tokenizer.get_vocab()
    (tmp_path / "bpe" / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert vocabulary(tmp_path / "bpe") is vocabulary(tmp_path) is None
