"""Random groups, and what plain transformers makes of them one response at a time or padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from helpsteer2.data.packing import PackedBatch
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.models.attention import implementation_name, packed_hidden_states

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    # Large weights: an attention mistake shows.
    "initializer_range": 0.3,
}


def make_groups(responses: Sequence[int], seed: int = 0, prompt: int = 40) -> list[TokenGroup]:
    """One group for each number of responses, of random ids and uneven lengths."""
    rng = np.random.default_rng(seed)

    def ids(longest: int) -> np.ndarray:
        return rng.integers(1, VOCABULARY, rng.integers(1, longest + 1)).astype(np.int32)

    return [
        TokenGroup(
            ids(prompt),
            tuple(ids(30) for _ in range(n)),
            rng.integers(0, 5, (n, 5)).astype(np.float32),
            float("nan"),
            index,
        )
        for index, n in enumerate(responses)
    ]


def twins(model_type: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same random decoder twice: packed, and as transformers has it."""
    models = []
    for implementation in (implementation_name("sdpa"), "sdpa"):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**SIZES, **options})
        models.append(AutoModel.from_config(config, attn_implementation=implementation).train())
    return models[0], models[1]


def sequences(groups: Sequence[TokenGroup]) -> list[Tensor]:
    """Prompt plus response, once for every response."""
    return [
        torch.from_numpy(np.concatenate([group.prompt_ids, response])).long()
        for group in groups
        for response in group.response_ids
    ]


def last_states_one_by_one(model: PreTrainedModel, groups: Sequence[TokenGroup]) -> Tensor:
    """``(R, H)`` hidden states of the last tokens, one forward a response."""
    return torch.cat(
        [
            model(input_ids=ids[None], use_cache=False).last_hidden_state[:, -1]
            for ids in sequences(groups)
        ]
    )


def last_states_padded(model: PreTrainedModel, groups: Sequence[TokenGroup]) -> Tensor:
    """``(R, H)`` hidden states of the last tokens, one right-padded batch."""
    rows = sequences(groups)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    states = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return states[torch.arange(len(rows)), lengths - 1]


def last_states_packed(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """``(R, H)`` hidden states of the last tokens of a packed row."""
    return packed_hidden_states(model, batch)[batch.last_tokens]


def gradients(model: PreTrainedModel, states: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of the states, by parameter name."""
    torch.manual_seed(1)
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = (states * torch.randn(states.shape)).square().sum()
    values = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: v for n, v in zip(names, values, strict=True) if v is not None}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    return float((ours - theirs).detach().norm() / theirs.detach().norm().clamp_min(1e-12))
