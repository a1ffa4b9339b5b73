"""Tiny reward models, made on the spot."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerFast

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, AttributeWeights
from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.packing import PackedBatch, pack
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.models.attention import implementation_name
from helpsteer2.models.reward import RewardModel, RewardSpec

MakeModel = Callable[..., RewardModel]

WEIGHTS = AttributeWeights("two", {"helpfulness": 0.65, "verbosity": -0.4})


def texts() -> Iterator[str]:
    yield from ("What is the capital of France?", "The capital is Paris.", "Good morning to you!")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return TrainedTokenizer(300).build(texts, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make_backbone(tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    def make(model_type: str = "llama", **options: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            model_type,
            **{
                "vocab_size": 320,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "max_position_embeddings": 256,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                # Large weights: differences show.
                "initializer_range": 0.2,
                **options,
            },
        )
        return AutoModel.from_config(config, attn_implementation=implementation_name("sdpa"))

    return make


@pytest.fixture
def make_model(
    tokenizer: PreTrainedTokenizerFast, make_backbone: Callable[..., PreTrainedModel]
) -> MakeModel:
    def make(
        model_type: str = "llama",
        chat: ChatFormat | None = None,
        attribute_names: tuple[str, ...] = HELPSTEER2_ATTRIBUTES,
        weights: AttributeWeights | None = WEIGHTS,
        **options: Any,
    ) -> RewardModel:
        backbone = make_backbone(model_type, **options)
        spec = RewardSpec.of(
            attribute_names,
            (chat or ChatFormat()).bind(tokenizer),
            tokenizer,
            LengthLimits(64, 48),
            "random Llama",
            data="made-up rows",
            weights=weights,
            rating_means=tuple(float(i) for i in range(len(attribute_names))),
        )
        return RewardModel(backbone, spec).eval()

    return make


@pytest.fixture
def export(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> tuple[Path, RewardModel]:
    model = make_model()
    model.save_pretrained(tmp_path / "export", tokenizer)
    return tmp_path / "export", model


CONVERSATIONS = [
    (["What is the capital of France?"], ["The capital is Paris.", "Good morning, good morning!"]),
    (["Hi"], ["Hello"]),
    (["Good morning! " * 6], ["To you!", "The", "Paris, Paris, Paris and Paris."]),
    (["Good morning!", "To you!", "What is the capital?"], ["Paris.", "Paris and Paris."]),
]
"""Turns, the user's and the assistant's in turn, and the responses to the last."""


def pack_conversations(chat: BoundChat) -> tuple[PackedBatch, list[list[int]]]:
    groups, sequences = [], []
    for index, (turns, answers) in enumerate(CONVERSATIONS):
        messages = [
            {"role": role, "content": text}
            for role, text in zip(itertools.cycle(("user", "assistant")), turns, strict=False)
        ]
        prompt = chat.prompt_ids(messages)
        responses = [chat.response_ids(messages, answer)[0] for answer in answers]
        sequences += [prompt + response for response in responses]
        groups.append(
            TokenGroup(
                np.array(prompt, np.int32),
                tuple(np.array(ids, np.int32) for ids in responses),
                np.full((len(responses), 0), np.nan, np.float32),
                float("nan"),
                index,
            )
        )
    return pack(groups), sequences


@pytest.fixture
def packed() -> Callable[[BoundChat], tuple[PackedBatch, list[list[int]]]]:
    """Some conversations as one packed row, and as separate sequences."""
    return pack_conversations
