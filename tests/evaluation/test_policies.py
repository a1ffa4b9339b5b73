"""Policies that are evaluated are really sampled, and judge their own samples as they drew them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import Group, read_all
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.evaluation.policies import EvaluatedPolicy
from helpsteer2.evaluation.steerability import SteerabilityEvaluation
from helpsteer2.evaluation.world_policy import WorldPolicyEvaluation
from helpsteer2.generation.local import LocalEngine
from helpsteer2.generation.sampling import Sample, SamplingParams
from helpsteer2.models.attention import implementation_name
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec
from helpsteer2.world.source import WorldSource

DATA = WorldSource(groups=1, seed=5, validation_groups=6)
SAMPLING = SamplingParams(n=3, max_tokens=9)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of four policies: three of one tokenizer, one of them with labels; one of another."""
    root = tmp_path_factory.mktemp("policies")
    texts = dict.fromkeys(("one", "two", "labelled"), "We have pet dog.")
    texts["other"] = "So, we note job."
    for seed, (name, text) in enumerate(texts.items()):
        tokenizer = TrainedTokenizer(300).build(lambda text=text: iter([text]), root / "cache")
        config = AutoConfig.for_model(
            "llama", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32,
            num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation_name("sdpa")
        )
        labels = ("helpfulness", "verbosity") if name == "labelled" else ()
        limits = LengthLimits(400, 100)
        spec = PolicySpec(ChatFormat().bind(tokenizer), limits, "random", label_attributes=labels)
        Policy(model, spec).save_pretrained(root / name, tokenizer)
    return root


@pytest.fixture
def policy(policies: Path) -> Callable[[str], EvaluatedPolicy]:
    return lambda name: EvaluatedPolicy(str(policies / name), LocalEngine(max_rows=6))


def as_groups(groups: list[Group], samples: list[list[Sample]], ids_hash: str) -> list[Group]:
    return [
        replace(
            group,
            responses=tuple(one.text for one in drawn),
            response_ids=tuple(one.ids for one in drawn),
            finish_reasons=tuple(one.finish_reason for one in drawn),
            tokenizer=ids_hash,
        )
        for group, drawn in zip(groups, samples, strict=True)
    ]


def test_log_probabilities_are_those_that_the_sampler_told(
    policy: Any, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helpsteer2.evaluation.policies.TOKENS_PER_PASS", 150)
    groups, one = list(read_all(DATA, "validation")), policy("one")
    samples = one.sample("x", groups, SAMPLING, context.console)
    assert [len(drawn) for drawn in samples] == [3] * 6
    sampled = as_groups(groups, samples, one.sampler.ids_hash)
    own = np.array(list(one.logprobs(sampled)))
    np.testing.assert_allclose(own, told(samples), atol=1e-4)
    # In the order of the prompts, whatever else is sampled beside them.
    again = one.sample("x", groups[::-1], SAMPLING, context.console)
    assert [[s.ids for s in drawn] for drawn in again[::-1]] == [
        [s.ids for s in drawn] for drawn in samples
    ]
    assert np.abs(np.array(list(one.beside(policy("two").path).logprobs(sampled))) - own).max() > 1


def told(samples: list[list[Sample]]) -> np.ndarray:
    return np.array([[sum(one.logprobs or ()) for one in drawn] for drawn in samples])


def test_a_policy_with_labels_judges_behind_them_and_one_without_drops_them(
    policy: Any, context: Any
) -> None:
    groups, labelled = list(read_all(DATA, "validation")), policy("labelled")
    brief = AttributeLabel.of({"verbosity": 0})
    samples = labelled.sample("x", groups, SAMPLING, context.console, brief)
    sampled = as_groups(groups, samples, labelled.sampler.ids_hash)

    def judged(path: str, label: AttributeLabel | None) -> np.ndarray:
        read = [replace(group, label=label) for group in sampled]
        return np.array(list(policy(path).logprobs(read)))

    own = judged("labelled", brief)
    np.testing.assert_allclose(own, told(samples), atol=1e-4)
    # What is left out has its usual value.
    whole = judged("labelled", AttributeLabel.of({"helpfulness": 4, "verbosity": 0}))
    np.testing.assert_array_equal(whole, own)
    usual = AttributeLabel.of({"helpfulness": 4, "verbosity": 2})
    np.testing.assert_array_equal(judged("labelled", None), judged("labelled", usual))
    assert np.abs(judged("labelled", None) - own).max() > 1e-3
    np.testing.assert_array_equal(judged("one", brief), judged("one", None))
    with pytest.raises(UserError, match="not trained with humor"):
        judged("labelled", AttributeLabel.of({"humor": 1}))


def test_labels_go_to_policies_that_were_trained_with_them(policy: Any, context: Any) -> None:
    groups, brief = list(read_all(DATA, "validation")), AttributeLabel.of({"verbosity": 0})
    assert policy("labelled").label_attributes == ("helpfulness", "verbosity")
    with pytest.raises(UserError, match="there is none"):
        policy("labelled").sample("x", groups, SAMPLING, context.console)
    with pytest.raises(UserError, match="trained without labels"):
        policy("one").sample("x", groups, SAMPLING, context.console, brief)
    own = [replace(group, label=brief) for group in groups]
    at_once = policy("labelled").sample("x", own, SAMPLING, context.console)
    steered = policy("labelled").sample("x", groups, SAMPLING, context.console, brief)
    assert [[s.ids for s in drawn] for drawn in at_once] == [
        [s.ids for s in drawn] for drawn in steered
    ]


@pytest.mark.parametrize(("path", "reference"), [("labelled", "one"), ("one", "labelled")])
def test_the_divergence_of_policies_of_which_one_reads_a_label(
    policy: Any, context: Any, path: str, reference: str
) -> None:
    """KL(Q(·|a, x) ‖ P(·|x)) and back, from its definition on the same samples."""
    asked = AttributeLabel.of({"verbosity": 0})
    evaluation = WorldPolicyEvaluation(
        DATA,
        SAMPLING,
        reference=policy(reference).path,
        resamples=50,
        steering=asked.as_dict(),
    )
    result = evaluation.evaluate(policy(path), context=context)
    groups, one = list(read_all(DATA, "validation")), policy(path)
    label = asked if path == "labelled" else None
    samples = one.sample("x", groups, SAMPLING, context.console, label)
    sampled = as_groups(groups, samples, one.sampler.ids_hash)
    read = [replace(group, label=asked) for group in sampled]
    other = np.array(list(policy(reference).logprobs(read)))
    assert result["kl"]["value"] == pytest.approx((told(samples) - other).mean(), abs=1e-4)
    if path == "labelled":
        assert result["steering"] == {"helpfulness": 4, "verbosity": 0}
    else:
        assert result["steering"] is None


def test_steerability_of_real_policies(policy: Any, context: Any) -> None:
    evaluation = SteerabilityEvaluation(
        DATA, SAMPLING, attributes=["verbosity"], baseline=policy("one").path, resamples=20
    )
    result = evaluation.evaluate(policy("labelled"), context=context)
    assert result["base"] == {"helpfulness": 4, "verbosity": 2}
    assert result["label_attributes"] == ["helpfulness", "verbosity"]
    assert result["baseline_gap"]["value"] is not None
    answers = result["examples"][0]["answers"]["verbosity"]
    assert len(set(answers.values())) > 1


def test_the_divergence_from_itself_is_nothing_and_from_another_something(
    policy: Any, context: Any
) -> None:
    def divergence(reference: str) -> dict[str, float]:
        evaluation = WorldPolicyEvaluation(
            DATA, SAMPLING, reference=policy(reference).path, resamples=50
        )
        result = evaluation.evaluate(policy("one"), context=context)
        kl: dict[str, float] = result["kl"]
        return kl

    assert abs(divergence("one")["value"]) < 1e-4
    assert divergence("two")["low"] > 0.5
    with pytest.raises(UserError, match="another tokenizer or chat template"):
        divergence("other")
