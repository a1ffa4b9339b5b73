"""A reward model of a few thousand weights, and groups for it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, AttributeWeights
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import Group
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.models.attention import implementation_name
from helpsteer2.models.reward import RewardModel, RewardSpec

WEIGHTS = AttributeWeights("two", {"helpfulness": 0.65, "verbosity": -0.4})


def tiny_reward_model(
    root: Path,
    names: tuple[str, ...] = HELPSTEER2_ATTRIBUTES,
    max_response_tokens: int = 40,
    weights: AttributeWeights | None = None,
    seed: int = 0,
) -> Path:
    """Write the export of a random model whose scores differ a lot, and give its folder."""
    torch.manual_seed(seed)
    tokenizer = TrainedTokenizer(300).build(lambda: iter(["to be or not to be"]), root)
    config = AutoConfig.for_model(
        "llama", vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    backbone = AutoModel.from_config(config, attn_implementation=implementation_name("sdpa"))
    chat = ChatFormat().bind(tokenizer)
    limits = LengthLimits(60, max_response_tokens)
    spec = RewardSpec.of(names, chat, tokenizer, limits, "random", weights=weights)
    RewardModel(backbone, spec).save_pretrained(root / "export", tokenizer)
    return root / "export"


def group(prompt: str, *responses: str, identity: str = "id") -> Group:
    return Group(identity, "here", ({"role": "user", "content": prompt},), responses)


def some_groups(n: int) -> list[Group]:
    """Groups of 1 to 3 different responses."""
    return [
        group(f"Question {i}?", *(f"Answer {i} {j} " * (1 + (i + j) % 5) for j in range(1 + i % 3)))
        for i in range(n)
    ]
