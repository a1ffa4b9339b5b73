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
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.evaluation.policies import EvaluatedPolicy
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
    """Folder of three policies: two of one tokenizer, one of another."""
    root = tmp_path_factory.mktemp("policies")
    texts = {"one": "We have pet dog.", "two": "We have pet dog.", "other": "So, we note job."}
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
        spec = PolicySpec(ChatFormat().bind(tokenizer), LengthLimits(400, 100), "random")
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
    told = np.array([[sum(s.logprobs or ()) for s in drawn] for drawn in samples])
    np.testing.assert_allclose(own, told, atol=1e-4)
    # In the order of the prompts, whatever else is sampled beside them.
    again = one.sample("x", groups[::-1], SAMPLING, context.console)
    assert [[s.ids for s in drawn] for drawn in again[::-1]] == [
        [s.ids for s in drawn] for drawn in samples
    ]
    assert np.abs(np.array(list(one.beside(policy("two").path).logprobs(sampled))) - own).max() > 1


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
