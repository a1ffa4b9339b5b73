"""The loss of learned tokens: a sum with a count that is known before any forward."""

from __future__ import annotations

import numpy as np
import torch

from helpsteer2.data.packing import PackedBatch, pack
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.functional.logprobs import TokenLogprobs
from helpsteer2.losses.sft import SFTLoss


def batch_of(*lengths: int) -> PackedBatch:
    ids = tuple(np.arange(1, n + 1, dtype=np.int32) for n in lengths)
    ratings = np.zeros((len(lengths), 0), np.float32)
    return pack([TokenGroup(np.ones(4, np.int32), ids, ratings, float("nan"), 0)], multiple=16)


def tokens_of(batch: PackedBatch, logprobs: torch.Tensor) -> TokenLogprobs:
    responses = torch.from_numpy(batch.layout.response_tokens.responses)
    return TokenLogprobs(logprobs, logprobs > -1, responses, batch.layout.n_responses)


def test_every_response_token_counts_once_and_nothing_else_does() -> None:
    batch = batch_of(3, 1, 5)
    logprobs = -torch.arange(9.0)
    loss, sums = SFTLoss()(tokens_of(batch, logprobs), batch)
    assert SFTLoss().count(batch) == 9
    assert loss == 36
    assert sums["tokens"] == 9
    assert sums["greedy"] == 1


def test_a_filler_weighs_nothing_but_has_gradients() -> None:
    batch = batch_of(2, 2).as_filler()
    logprobs = (-torch.ones(4)).requires_grad_()
    loss, sums = SFTLoss()(tokens_of(batch, logprobs), batch)
    loss.backward()  # the ranks wait for each other's gradients
    assert SFTLoss().count(batch) == loss == sums["greedy"] == 0
    assert torch.equal(logprobs.grad, torch.zeros(4))


def test_learned_tokens_of_prompts_count_once_and_with_their_own_group() -> None:
    ratings, nan = np.zeros((2, 0), np.float32), float("nan")
    responses = (np.full(2, 8, np.int32), np.full(3, 9, np.int32))
    mask = np.array([False, True, True, False, True, False])
    groups = [
        TokenGroup(np.arange(4, dtype=np.int32), responses, ratings, nan, 0),
        TokenGroup(np.arange(6, dtype=np.int32), responses, ratings, nan, 1, prompt_mask=mask),
        TokenGroup(np.arange(4, dtype=np.int32), responses, ratings, nan, 2),
    ]
    batch = pack(groups, multiple=16)
    tokens, n = batch.layout.learned_tokens, batch.layout.n_response_tokens
    assert SFTLoss().count(batch) == n + 3
    assert batch.input_ids[tokens.positions[n:]].tolist() == [1, 2, 4]
    assert (tokens.predictors[n:] == tokens.positions[n:] - 1).all()
    assert batch.group_ids[tokens.positions[n:]].tolist() == [1, 1, 1]
    assert batch.response_groups[tokens.responses].tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [1] * 3
    assert len(set(tokens.positions)) == len(tokens.positions)
    for name, of_responses in vars(batch.layout.response_tokens).items():
        assert (getattr(tokens, name)[:n] == of_responses).all()
