"""What the local engine refuses, and what it says then."""

from __future__ import annotations

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


def test_a_window_shorter_than_the_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(tokenizer, "mistral", sliding_window=30)
    with pytest.raises(UserError, match=r"attends to 30 tokens.*engine=openai"):
        run(policy, max_tokens=20)
    wide = make_policy(tokenizer, "mistral", sliding_window=400)
    run(wide, max_tokens=3)


def test_texts_beyond_learned_positions(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(tokenizer, "gpt2", n_positions=40)
    with pytest.raises(UserError, match="positions for 40 tokens"):
        run(policy, max_tokens=60)


def test_a_late_prompt_that_is_too_long_is_told_before_any_is_sampled(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    long = Group("long", "made up", ({"role": "user", "content": "why " * 80},), ())
    sampler = LocalSampler(make_policy(tokenizer), LocalEngine(cache_tokens=100))
    samples = sampler.sample([*make_prompts(80), long], SamplingParams(max_tokens=4))
    with pytest.raises(UserError, match="prompt long with n=1"):
        next(samples)


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
