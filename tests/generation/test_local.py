"""The local engine says what plain transformers says, whatever runs side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from helpsteer2.data.groups import Group
from helpsteer2.generation.local import LocalEngine, LocalSampler
from helpsteer2.generation.sampling import Sample, SamplingParams
from helpsteer2.models.policy import Policy

from .local_policies import make_policy, make_prompts, plain_model, policy_logprobs

Samples = dict[str, list[Sample]]


def sample(policy: Policy, prompts: list[Group], engine: dict[str, Any], **params: Any) -> Samples:
    sampler = LocalSampler(policy, LocalEngine(**engine))
    pairs = sampler.sample(prompts, SamplingParams(**params))
    found = {group.id: samples for group, samples in pairs}
    assert found.keys() == {group.id for group in prompts}
    assert all(len(samples) == params.get("n", 1) for samples in found.values())
    return found


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4}),
        ("qwen3", {}),
        ("gpt2", {}),  # learned positions
    ],
)
def test_greedy_output_is_that_of_generate(
    tokenizer: PreTrainedTokenizerFast, model_type: str, options: dict[str, Any]
) -> None:
    policy = make_policy(tokenizer, model_type, **options)
    prompts = make_prompts(7, turns=3)
    ours = sample(policy, prompts, {"max_rows": 5}, temperature=0, max_tokens=40)
    plain, stop = plain_model(policy), policy.spec.stop_token_id
    for group in prompts:
        ids = torch.tensor([policy.spec.chat.prompt_ids(group.prompt)])
        theirs = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False,
            eos_token_id=stop, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        assert list(ours[group.id][0].ids) == theirs[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("n", [1, 2, 10])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_logprobs_are_those_that_training_sees(
    tokenizer: PreTrainedTokenizerFast, model_type: str, n: int
) -> None:
    policy = make_policy(tokenizer, model_type, initializer_range=0.1)
    prompts = make_prompts(7, turns=3)
    options = {"n": n, "temperature": 0.8, "top_p": 0.95, "max_tokens": 40, "seed": 3}
    samples = sample(policy, prompts, {"max_rows": 25}, **options)
    for group in prompts:
        known = policy_logprobs(policy, group, samples[group.id])
        for one, logprobs in zip(samples[group.id], known, strict=True):
            assert one.logprobs is not None
            np.testing.assert_allclose(one.logprobs, logprobs, rtol=0, atol=1e-5)


def test_batches_and_order_change_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of 1,152 samples one may differ: where rounding decides between two tokens."""
    policy = make_policy(tokenizer, initializer_range=0.15)
    prompts = make_prompts(16, turns=2)
    engines: list[dict[str, Any]] = [
        {"max_rows": 5},
        {"max_rows": 33, "prompts_per_block": 7},
        {"max_rows": 1000, "prefill_tokens": 1},
        {"max_rows": 64, "cache_tokens": 600},
    ]
    same = []
    for params in ({}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 20, "top_p": 0.8}):
        options = {"n": 6, "max_tokens": 25, "stop_token_ids": tuple(range(6, 20)), **params}
        wanted = sample(policy, prompts, {"max_rows": 64}, **options)
        assert len({len(one.ids) for samples in wanted.values() for one in samples}) > 5
        for engine, order in zip(engines, (1, -1, -1, 1), strict=True):
            found = sample(policy, prompts[::order], engine, **options)
            same += [
                one.ids == other.ids
                for group in prompts
                for one, other in zip(found[group.id], wanted[group.id], strict=True)
            ]
    assert len(same) == 1152
    assert np.mean(same) >= 0.999
    other_seed = sample(policy, prompts, {}, **options, seed=1)
    assert np.mean([other_seed[g.id][0].ids == wanted[g.id][0].ids for g in prompts]) < 0.5


def test_a_prompt_is_computed_once_for_its_samples(tokenizer: PreTrainedTokenizerFast) -> None:
    policy, prompts = make_policy(tokenizer), make_prompts(9)
    sampler = LocalSampler(policy, LocalEngine(max_rows=40))
    assert len(list(sampler.sample(prompts, SamplingParams(n=10, max_tokens=3)))) == 9
    lengths = [len(policy.spec.chat.prompt_ids(group.prompt)) for group in prompts]
    assert sampler.prefilled_tokens == sum(lengths)


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.6}, {"temperature": 0.8, "top_p": 0.7}, {"top_k": 3, "top_p": 0.9}],
)
def test_samples_follow_the_distribution_of_the_model(
    tokenizer: PreTrainedTokenizerFast, params: dict[str, Any]
) -> None:
    """Two tokens, so that the second one comes from the decode step; a vocabulary of few words."""
    policy = make_policy(tokenizer, initializer_range=0.5)
    with torch.no_grad():  # all but ten tokens are out of reach
        policy.causal_lm.lm_head.bias = torch.nn.Parameter(torch.full((300,), -100.0))
        policy.causal_lm.lm_head.bias[40:50] = 0.0
        policy.causal_lm.lm_head.weight.mul_(0.2)
    group, draws = make_prompts(1)[0], 2000
    samples = sample(policy, [group], {"max_rows": 50}, n=draws, max_tokens=2, **params)[group.id]
    prompt = policy.spec.chat.prompt_ids(group.prompt)
    wanted = {}
    plain = next_logits(policy)
    for first, share in truncated(plain, prompt, **params).items():
        for second, other in truncated(plain, [*prompt, first], **params).items():
            wanted[first, second] = share * other * draws
    seen = dict.fromkeys(wanted, 0)
    for one in samples:
        seen[one.ids] += 1  # a token that is cut off is a KeyError
    rare = [pair for pair, count in wanted.items() if count < 5]
    for counts in (seen, wanted):
        counts["rare"] = sum(counts.pop(pair) for pair in rare)
    kinds = [kind for kind in wanted if wanted[kind] > 0]
    assert len(kinds) > 3
    assert chisquare([seen[k] for k in kinds], [wanted[k] for k in kinds]).pvalue > 1e-3


def next_logits(policy: Policy) -> Callable[[list[int]], Tensor]:
    """Logits of the next token, by plain transformers' decoder."""
    bias, policy.causal_lm.lm_head.bias = policy.causal_lm.lm_head.bias, None
    model = plain_model(policy)

    def logits(ids: list[int]) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1] + bias

    return logits


def truncated(
    logits: Callable[[list[int]], Tensor],
    ids: list[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> dict[int, float]:
    """The next token's distribution, by definition."""
    shares = (logits(ids).double() / temperature).softmax(0).sort(descending=True)
    kept: dict[int, float] = {}
    limit = shares.values[: top_k or None].sum() * top_p
    above = 0.0
    for share, token in zip(shares.values.tolist(), shares.indices.tolist(), strict=True):
        if above >= limit or (top_k and len(kept) == top_k) or share < 1e-30:
            break
        kept[token] = share
        above += share
    return {token: share / sum(kept.values()) for token, share in kept.items()}


def test_stop_tokens_end_a_sample_and_are_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(tokenizer)
    stops = tuple(range(6, 20))
    samples = sample(policy, make_prompts(6), {}, n=4, max_tokens=25, stop_token_ids=stops)
    reasons = set()
    for one in (one for of_prompt in samples.values() for one in of_prompt):
        reasons.add(one.finish_reason)
        ends = {*stops, policy.spec.stop_token_id, tokenizer.eos_token_id}
        assert not ends & set(one.ids[:-1])
        assert (one.finish_reason == "stop") == (one.ids[-1] in ends)
        assert one.finish_reason == "stop" or len(one.ids) == 25
        content = one.ids[:-1] if one.finish_reason == "stop" else one.ids
        assert one.text == tokenizer.decode(content, skip_special_tokens=True)
        assert one.logprobs is not None
        assert len(one.logprobs) == len(one.ids)
    assert reasons == {"stop", "length"}


def test_one_token_is_enough(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(tokenizer)
    samples = sample(policy, make_prompts(11), {"max_rows": 2}, n=2, max_tokens=1)
    assert {len(one.ids) for of_prompt in samples.values() for one in of_prompt} == {1}


def test_bf16_weights_give_logprobs_near_those_of_fp32(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(tokenizer, initializer_range=0.1)
    policy.causal_lm.to(torch.bfloat16)
    prompts = make_prompts(5)
    samples = sample(policy, prompts, {}, n=3, max_tokens=20)
    policy.causal_lm.float()
    for group in prompts:
        for one, known in zip(
            samples[group.id], policy_logprobs(policy, group, samples[group.id]), strict=True
        ):
            np.testing.assert_allclose(one.logprobs, known, rtol=0, atol=0.2)
