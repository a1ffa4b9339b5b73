"""What the local engine refuses, and what it says then."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from helpsteer2.data.groups import Group
from helpsteer2.errors import UserError
from helpsteer2.generation.local import LocalEngine, LocalSampler
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.models.policy import Policy

from .local_policies import make_policy, make_prompts

LONG = Group("long", "made up", ({"role": "user", "content": "why " * 80},), ())


def run(policy: Policy, engine: LocalEngine | None = None, **params: Any) -> None:
    sampler = LocalSampler(policy, engine or LocalEngine())
    list(sampler.sample(make_prompts(3), SamplingParams(**params)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"temperature": -1.0}, "temperature is"),
        ({"temperature": float("nan")}, "temperature is"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"stop_token_ids": (-2,)}, "stop_token_ids"),
        ({"seed": -1}, "seed is -1"),
        ({"n": 0, "top_p": 2.0}, "n is 0.*top_p is 2"),
        ({"n": 2, "temperature": 0.0}, "same response"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingParams(**wrong)


@pytest.mark.parametrize("name", ["max_rows", "cache_tokens", "prefill_tokens"])
def test_limits_below_one(name: str) -> None:
    with pytest.raises(UserError, match=f"engine.{name}"):
        LocalEngine(**{name: 0})


def test_a_cache_too_small_for_one_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"cache_tokens=50 is too small.*prompt-"):
        run(make_policy(tokenizer), LocalEngine(cache_tokens=50), n=2, max_tokens=40)


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("mistral", {"sliding_window": 100}, "attends to 100 tokens.*engine=openai"),
        (
            "qwen2",
            {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1},
            "attends to 100 tokens.*engine=openai",
        ),
        ("gpt2", {"n_positions": 100}, "positions for 100 tokens"),
        (
            "llama",
            {
                "max_position_embeddings": 100,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            },
            "beyond 100 tokens",
        ),
    ],
)
def test_a_late_prompt_that_is_too_long_for_the_model_is_told_before_any_is_sampled(
    tokenizer: PreTrainedTokenizerFast, model_type: str, options: dict[str, Any], message: str
) -> None:
    policy = make_policy(tokenizer, model_type, **options)
    params = SamplingParams(max_tokens=4)
    samples = LocalSampler(policy, LocalEngine()).sample([*make_prompts(80), LONG], params)
    with pytest.raises(UserError, match=f"^prompt long: .*{message}") as raised:
        next(samples)
    assert "lower sampling.max_tokens or max_prompt_tokens" in str(raised.value)
    run(policy, max_tokens=4)


def test_a_window_that_is_switched_off_or_wide_enough_is_no_limit(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    off = {"sliding_window": 3, "use_sliding_window": False}
    run(make_policy(tokenizer, "qwen2", **off), max_tokens=3)
    run(make_policy(tokenizer, "mistral", sliding_window=400), max_tokens=3)


def test_a_window_that_the_configuration_does_not_tell_is_refused_by_its_layer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    policy = make_policy(tokenizer, "mistral", sliding_window=30)
    policy.backbone.config.layer_types = ["full_attention"] * 2
    with pytest.raises(UserError, match=r"Mistral\w+ attends to 30 tokens.*engine=openai"):
        run(policy, max_tokens=40)


def test_a_late_prompt_that_is_too_long_for_the_cache_is_told_before_any_is_sampled(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    sampler = LocalSampler(make_policy(tokenizer), LocalEngine(cache_tokens=100))
    samples = sampler.sample([*make_prompts(80), LONG], SamplingParams(max_tokens=4))
    with pytest.raises(UserError, match="prompt long with n=1"):
        next(samples)


@pytest.mark.parametrize("forward", [1, 4])
def test_too_little_memory(tokenizer: PreTrainedTokenizerFast, forward: int) -> None:
    """In the pass of the prompts, or in a later one."""
    policy, passes = make_policy(tokenizer), itertools.count(1)

    def allocate(*_: Any) -> None:
        if next(passes) == forward:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    policy.backbone.layers[0].register_forward_pre_hook(allocate)
    wanted = r"out of memory.*engine\.cache_tokens=.*engine\.max_rows=.*engine\.prefill_tokens="
    with pytest.raises(UserError, match=wanted):
        run(policy, max_tokens=8)


def test_weights_that_are_no_numbers(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(tokenizer)
    with torch.no_grad():
        policy.backbone.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="logits are not finite"):
        run(policy, max_tokens=4)


def test_a_prompt_that_the_template_refuses(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = Group("bad", "made up", ({"role": "user", "content": "\ud800"},), ())
    sampler = LocalSampler(make_policy(tokenizer), LocalEngine())
    with pytest.raises(UserError, match="not valid Unicode"):
        list(sampler.sample([bad], SamplingParams()))


def test_a_model_without_chat_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    policy = make_policy(tokenizer)
    policy.causal_lm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        LocalEngine().open(str(tmp_path))
