"""Tiny random policies, prompts, and what plain transformers makes of them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import Group, Message
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.packing import pack
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.generation.sampling import Sample
from helpsteer2.models.attention import implementation_name
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    # Large weights: an attention mistake shows.
    "initializer_range": 0.3,
}


def make_policy(
    tokenizer: PreTrainedTokenizerFast, model_type: str = "llama", **options: Any
) -> Policy:
    """A random policy with the tokenizer's own chat template."""
    known = AutoConfig.for_model(model_type).to_dict()
    sizes = {key: value for key, value in SIZES.items() if key in known}
    config = AutoConfig.for_model(model_type, **{**sizes, **options})
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation_name("sdpa")
    )
    causal_lm.generation_config.eos_token_id = None
    spec = PolicySpec(ChatFormat().bind(tokenizer), LengthLimits(400, 100), "random")
    return Policy(causal_lm.eval(), spec).eval()


def plain_model(policy: Policy) -> PreTrainedModel:
    """The same weights as plain transformers runs them."""
    config = copy.deepcopy(policy.causal_lm.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.load_state_dict(policy.causal_lm.state_dict())
    return model.eval()


def make_prompts(n: int, turns: int = 1) -> list[Group]:
    """Prompts of uneven lengths; every third one with more turns."""
    rng = np.random.default_rng(n)
    groups = []
    for i in range(n):
        messages: list[Message] = []
        for turn in range(turns if i % 3 == 0 else 1):
            if turn:
                messages.append({"role": "assistant", "content": "I see."})
            words = " ".join(rng.choice(["to", "be", "or", "not", "why"], rng.integers(1, 25)))
            messages.append({"role": "user", "content": words})
        groups.append(Group(f"prompt-{i}", "made up", tuple(messages), ()))
    return groups


def policy_logprobs(policy: Policy, group: Group, samples: list[Sample]) -> list[list[float]]:
    """Log-probabilities of samples by the path that trains on them."""
    ids = np.asarray(policy.spec.chat.prompt_ids(group.prompt), np.int32)
    row = TokenGroup(
        prompt_ids=ids,
        response_ids=tuple(np.asarray(one.ids, np.int32) for one in samples),
        attributes=np.empty((len(samples), 0), np.float32),
        preference_strength=float("nan"),
        index=0,
    )
    with torch.no_grad():
        found = policy.response_logprobs(pack([row])).logprobs
    return [part.tolist() for part in found.split([len(one.ids) for one in samples])]
