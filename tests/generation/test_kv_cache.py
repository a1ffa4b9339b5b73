"""What ended samples leave behind: room that is given back, and the same samples as without."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from helpsteer2.generation import kv_cache
from helpsteer2.generation.kv_cache import CohortCache
from helpsteer2.generation.local import LocalEngine, LocalSampler
from helpsteer2.generation.sampling import SamplingParams

from .local_policies import make_policy, make_prompts

LAYERS, HEADS, WIDTH = 2, 2, 8
N_SAMPLES, MAX_TOKENS, LONGEST = 4, 40, 50


def make_cache(lengths: Sequence[int]) -> CohortCache:
    cache = CohortCache(lengths, N_SAMPLES, MAX_TOKENS, LAYERS, torch.device("cpu"))
    for layer in range(LAYERS):
        for kind in range(2):
            values = torch.randn(len(lengths), HEADS, max(lengths), WIDTH)
            cache.store_prompts(layer, kind, 0, values)
    return cache


def held_bytes(cache: CohortCache) -> int:
    """Memory that stays taken as long as the cache is there, but for numbers about its samples."""
    tensors = [value for value in vars(cache).values() if isinstance(value, Tensor)]
    return sum(t.untyped_storage().nbytes() for t in tensors if t.is_floating_point())


def attended(cache: CohortCache) -> Tensor:
    """What a further token of every sample attends to, in the last layer."""
    cache.begin_token()
    query, key, value = (torch.randn(cache.rows, HEADS, WIDTH) for _ in range(3))
    return [cache.attend(layer, query, key, value, 0.3) for layer in range(LAYERS)][-1]


@pytest.mark.parametrize("seed", range(5))
def test_what_is_held_is_less_than_twice_what_is_counted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = make_cache([LONGEST] * 6)
    a_token = 2 * LAYERS * HEADS * WIDTH * 4
    tokens = 0
    while cache.rows > 1:
        for _ in range(min(int(rng.integers(0, 8)), MAX_TOKENS - tokens)):
            attended(cache)
            tokens += 1
        ended = rng.choice(cache.rows, rng.integers(1, min(cache.rows, 8)), replace=False)
        cache.remove(sorted(ended.tolist()))
        assert held_bytes(cache) < 2 * cache.reserved_tokens * a_token
    assert cache.reserved_tokens == LONGEST + MAX_TOKENS


def test_giving_room_back_changes_no_bit_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [[3], [0, 1, 2, 21, 20], [5, 9, 11, 12], [0, 1, 2, 3, 4, 5, 6], [2, 4], [0, 1], [1]]
    lengths = [LONGEST, 7, 20, 33, 2, 49]

    def outputs() -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        cache = make_cache(lengths)
        found = [attended(cache)]
        for ended in ends:
            cache.remove(ended)
            found += [attended(cache) for _ in range(4)]
        return found, held_bytes(cache)

    given_back, few = outputs()
    monkeypatch.setattr(kv_cache, "SLACK", 10**9)
    kept, many = outputs()
    assert few < many / 3
    assert all(torch.equal(one, other) for one, other in zip(given_back, kept, strict=True))


def test_giving_room_back_changes_no_bit_of_samples(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, prompts = make_policy(tokenizer, initializer_range=0.15), make_prompts(12, turns=2)
    params = SamplingParams(n=6, max_tokens=40, stop_token_ids=tuple(range(6, 26)))

    def samples() -> list[object]:
        return list(LocalSampler(policy, LocalEngine(max_rows=40)).sample(prompts, params))

    given_back = samples()
    monkeypatch.setattr(kv_cache, "SLACK", 10**9)
    assert given_back == samples()
