"""A packed row holds every token of its groups once, at the right position."""

from __future__ import annotations

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
