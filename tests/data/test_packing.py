"""A packed row holds every token of its groups once, at the right position."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpsteer2.data.packing import pack
from helpsteer2.data.tokens import TokenGroup


def group(index: int, prompt: list[int], *responses: list[int]) -> TokenGroup:
    return TokenGroup(
        np.array(prompt, np.int32),
        tuple(np.array(ids, np.int32) for ids in responses),
        np.full((len(responses), 2), index, np.float32),
        float(index),
        index,
    )


def test_two_groups_by_hand() -> None:
    batch = pack([group(7, [1, 2, 3], [4, 5], [6]), group(9, [10], [11, 12, 13])])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 10, 11, 12, 13]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3]
    assert batch.segment_ids.tolist() == [0, 0, 0, 1, 1, 2, 0, 1, 1, 1]
    assert batch.group_ids.tolist() == [0] * 6 + [1] * 4
    assert batch.last_tokens.tolist() == [4, 5, 9]
    assert batch.response_groups.tolist() == [0, 0, 1]
    assert batch.group_indices.tolist() == [7, 9]
    assert batch.attributes.tolist() == [[7, 7], [7, 7], [9, 9]]
    assert batch.preference_strength.tolist() == [7, 9]
    assert (batch.layout.n_tokens, batch.layout.n_responses, batch.layout.max_span) == (10, 3, 5)
    assert batch.layout.group_starts == (0, 6, 10)


def test_a_filler_keeps_the_tokens_without_labels() -> None:
    batch = pack([group(1, [1], [2])])
    blank = batch.as_filler()
    assert blank.to("cpu").filler
    assert not batch.filler
    assert torch.equal(blank.input_ids, batch.input_ids)
    assert blank.attributes.isnan().all()
    assert blank.preference_strength.isnan().all()
    assert not batch.attributes.isnan().any()


def test_rewards_and_reference_are_unknown_where_a_group_has_none() -> None:
    known = replace(
        group(1, [1], [2], [3, 4]),
        rewards=np.array([1.5, -2], np.float32),
        ref_logprobs=np.array([-7, -9], np.float32),
    )
    batch = pack([known, group(2, [1], [2])])
    nan = float("nan")
    for column, expected in ((batch.rewards, [1.5, -2, nan]), (batch.ref_logprobs, [-7, -9, nan])):
        assert column.dtype == torch.float32
        assert torch.equal(column.nan_to_num(99), torch.tensor(expected).nan_to_num(99))
    blank = batch.as_filler()
    assert blank.rewards.isnan().all()
    assert torch.equal(blank.ref_logprobs[:2], batch.ref_logprobs[:2])


def masked(prompt: list[int], mask: list[int], *responses: list[int]) -> TokenGroup:
    return replace(group(0, prompt, *responses), prompt_mask=np.array(mask, bool))


def test_trained_tokens_by_hand() -> None:
    groups = [
        masked([1, 2, 3], [0, 1, 1], [4, 5], [6]),
        group(9, [10], [11, 12]),
        masked([13, 14, 15], [0, 0, 1], [16]),
    ]
    layout = pack(groups, 8).layout
    assert layout.trained_tokens.positions.tolist() == [1, 2, 11]
    assert layout.trained_tokens.predictors.tolist() == [0, 1, 10]
    none = pack([group(9, [10], [11, 12])]).layout.trained_tokens
    assert len(none.positions) == len(none.predictors) == 0
    assert none.positions.dtype == np.int64


@pytest.mark.parametrize("mask", [[1, 0, 0], [0, 1], [0, 1, 0, 0]])
def test_a_mask_that_does_not_fit_is_refused(mask: list[int]) -> None:
    with pytest.raises(ValueError, match="mask"):
        pack([masked([1, 2, 3], mask, [4])])


def test_empty_segments_are_refused() -> None:
    for bad in ([group(0, [], [1])], [group(0, [1], [])], [group(0, [1])], []):
        with pytest.raises(ValueError, match=r"empty|no response|at least one"):
            pack(bad)


def test_padding_belongs_to_nobody() -> None:
    groups = [group(7, [1, 2, 3], [4, 5], [6]), group(9, [10], [11, 12, 13])]
    plain, padded = pack(groups), pack(groups, 8)
    assert len(padded.input_ids) == 16
    assert (padded.layout.n_tokens, padded.layout.padding) == (10, 6)
    assert padded.group_ids.tolist()[10:] == [2] * 6
    assert padded.position_ids.tolist()[10:] == [0] * 6
    for name in ("last_tokens", "response_groups", "attributes", "group_indices"):
        assert torch.equal(getattr(plain, name), getattr(padded, name))
    assert pack(groups, 5).layout.padding == 0
