"""Whole groups laid end to end in one row, no padding, every prompt stored once.

A row is ``[prompt 1][response 1.1][response 1.2]…[prompt 2][response 2.1]…``. Each response attends
to its own prompt and to itself, and its positions continue from the end of its prompt.

A prompt may hold answers that supervised fine-tuning learns beside the responses.
``layout.trained_tokens`` lists their tokens: content and closing tokens, as a response has them.
Each is predicted by the token before it in the same prompt. Other losses do not look at them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from helpsteer2.data.tokens import RolloutTokens, TokenGroup


@dataclass(frozen=True)
class ResponseTokens:
    """The N response tokens of a row, response after response, as indices on the host.

    Attributes:
        positions: ``(N,)`` int64, place of each in the row.
        predictors: ``(N,)`` int64, place of the token that predicts it: the one before it in its
            response, and for the first of a response the last one of its prompt.
        responses: ``(N,)`` int64, the response 0 … R−1 it belongs to.
    """

    positions: npt.NDArray[np.int64]
    predictors: npt.NDArray[np.int64]
    responses: npt.NDArray[np.int64]


@dataclass(frozen=True)
class TrainedTokens:
    """The K learned tokens of the prompts of a row, prompt after prompt, as indices on the host.

    Attributes:
        positions: ``(K,)`` int64, place of each in the row.
        predictors: ``(K,)`` int64, place of the token that predicts it: the one before it.
    """

    positions: npt.NDArray[np.int64]
    predictors: npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackedLayout:
    """Where the segments of a packed row are, as plain integers.

    They stay on the host, so that the attention backends can cut segments without waiting for the
    device.

    Attributes:
        prompt_lengths: Tokens of each of the G prompts, all ≥ 1.
        response_lengths: Tokens of each group's responses, all ≥ 1.
        padding: Tokens behind the last group that belong to nobody.
        prompt_masks: For each prompt ``(P,)`` bool, its learned tokens, or None; empty if no prompt
            has any.
    """

    prompt_lengths: tuple[int, ...]
    response_lengths: tuple[tuple[int, ...], ...]
    padding: int = 0
    prompt_masks: tuple[npt.NDArray[np.bool_] | None, ...] = field(default=(), compare=False)

    @cached_property
    def n_tokens(self) -> int:
        """Tokens of the groups: T without the padding."""
        return sum(self.prompt_lengths) + self.n_response_tokens

    @cached_property
    def n_responses(self) -> int:
        """R, the number of responses in the row."""
        return sum(map(len, self.response_lengths))

    @cached_property
    def n_response_tokens(self) -> int:
        """N, the tokens of all responses."""
        return sum(map(sum, self.response_lengths))

    @cached_property
    def group_starts(self) -> tuple[int, ...]:
        """Index of the first prompt token of each group, and the end of the last."""
        lengths = (
            prompt + sum(responses)
            for prompt, responses in zip(self.prompt_lengths, self.response_lengths, strict=True)
        )
        return (0, *accumulate(lengths))

    def segments(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Start, prompt length and response lengths of each group; padding is a lone prompt."""
        yield from zip(self.group_starts, self.prompt_lengths, self.response_lengths, strict=False)
        if self.padding:
            yield self.n_tokens, self.padding, ()

    @cached_property
    def max_span(self) -> int:
        """Longest prompt plus one response: one more than the largest position."""
        return max(
            prompt + max(responses)
            for prompt, responses in zip(self.prompt_lengths, self.response_lengths, strict=True)
        )

    @cached_property
    def response_tokens(self) -> ResponseTokens:
        """The response tokens, and what predicts each of them."""
        positions, predictors = [], []
        for start, prompt, responses in self.segments():
            first = start + prompt
            for length in responses:
                positions.append(np.arange(first, first + length))
                predictors.append(positions[-1] - 1)
                predictors[-1][0] = start + prompt - 1
                first += length
        lengths = [len(part) for part in positions]
        return ResponseTokens(
            np.concatenate(positions),
            np.concatenate(predictors),
            np.repeat(np.arange(len(lengths)), lengths),
        )

    @cached_property
    def trained_tokens(self) -> TrainedTokens:
        """The prompt tokens that supervised fine-tuning learns, and what predicts each of them."""
        positions = [np.zeros(0, np.int64)]
        for start, mask in zip(self.group_starts, self.prompt_masks, strict=False):
            if mask is not None:
                positions.append(start + np.flatnonzero(mask))
        places = np.concatenate(positions)
        return TrainedTokens(places, places - 1)

    @cached_property
    def learned_tokens(self) -> ResponseTokens:
        """All that supervised fine-tuning learns: the response tokens, then those of the prompts.

        A token of a prompt counts as one of the first response to it.
        """
        tokens, trained = self.response_tokens, self.trained_tokens
        groups = np.searchsorted(self.group_starts, trained.positions, side="right") - 1
        first_responses = np.cumsum([0, *map(len, self.response_lengths)])
        return ResponseTokens(
            np.concatenate([tokens.positions, trained.positions]),
            np.concatenate([tokens.predictors, trained.predictors]),
            np.concatenate([tokens.responses, first_responses[groups]]),
        )


@dataclass(frozen=True)
class PackedBatch:
    """One packed row of G groups with R responses and T tokens.

    Attributes:
        input_ids: ``(T,)`` int64.
        position_ids: ``(T,)`` int64; prompts count from 0, responses go on from their prompt.
        segment_ids: ``(T,)`` int32; 0 in prompts, 1 … n in a group's responses.
        group_ids: ``(T,)`` int32, 0 … G−1, and G in the padding.
        last_tokens: ``(R,)`` int64, index of each response's last token.
        response_groups: ``(R,)`` int64, the group 0 … G−1 of each response.
        attributes: ``(R, A)`` float32 ratings 0–4, NaN where unknown.
        preference_strength: ``(G,)`` float32, NaN where unknown.
        rewards: ``(R,)`` float32, NaN where unknown.
        ref_logprobs: ``(R,)`` float32 nats, what the reference gives each response, NaN where
            unknown; a filler keeps them, they are no labels.
        group_indices: ``(G,)`` int64, position of each group in its data set.
        layout: The segment table on the host.
        rollout: Of the response tokens, in the order of ``layout.response_tokens``; None outside
            policy optimisation.
        filler: Whether it only keeps a rank in step with the others: its labels are all unknown.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    group_ids: Tensor
    last_tokens: Tensor
    response_groups: Tensor
    attributes: Tensor
    preference_strength: Tensor
    rewards: Tensor
    ref_logprobs: Tensor
    group_indices: Tensor
    layout: PackedLayout
    rollout: RolloutTokens[Tensor] | None = None
    filler: bool = False

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Copy every tensor to a device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        columns: dict[str, Any] = {
            column.name: moved(value)
            for column in fields(self)
            if isinstance(value := getattr(self, column.name), Tensor)
        }
        rollout = None if self.rollout is None else self.rollout.map(moved)
        return replace(self, **columns, rollout=rollout)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name."""
        own = {column.name: getattr(self, column.name) for column in fields(self)}
        tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        return {**tensors, **dict(() if self.rollout is None else self.rollout.items())}

    def as_filler(self) -> PackedBatch:
        """The same row with every label unknown: it weighs nothing in any loss."""
        return replace(
            self,
            filler=True,
            attributes=torch.full_like(self.attributes, torch.nan),
            preference_strength=torch.full_like(self.preference_strength, torch.nan),
            rewards=torch.full_like(self.rewards, torch.nan),
            rollout=None
            if self.rollout is None
            else replace(self.rollout, counted=torch.zeros_like(self.rollout.counted)),
        )


def pack(groups: Sequence[TokenGroup], multiple: int = 1) -> PackedBatch:
    """Lay groups end to end.

    Args:
        groups: At least one group; prompts and responses have at least one token each.
        multiple: The row is padded to a multiple of this, by tokens that attend to themselves
            alone. Kernels compiled for each length then meet few of them.

    Returns:
        The packed row, on the CPU.

    Raises:
        ValueError: If there is no group, a segment is empty, or a mask does not fit its prompt.
    """
    if not groups:
        raise ValueError("a packed batch needs at least one group")
    layout = PackedLayout(
        tuple(len(group.prompt_ids) for group in groups),
        tuple(tuple(map(len, group.response_ids)) for group in groups),
        -sum(group.n_tokens for group in groups) % multiple,
        _prompt_masks(groups),
    )
    segments: list[np.ndarray] = []
    starts: list[int] = []  # position of each segment's first token
    kinds: list[int] = []  # 0 for prompts, 1 … n for responses
    owners: list[int] = []
    for g, group in enumerate(groups):
        if not group.response_ids:
            raise ValueError(f"group {group.index} has no response")
        for kind, ids in enumerate((group.prompt_ids, *group.response_ids)):
            if len(ids) == 0:
                raise ValueError(f"group {group.index} has an empty prompt or response")
            segments.append(ids)
            starts.append(len(group.prompt_ids) if kind else 0)
            kinds.append(kind)
            owners.append(g)
    if layout.padding:
        segments.append(np.zeros(layout.padding, np.int32))
        starts.append(0)
        kinds.append(0)
        owners.append(len(groups))
    lengths = np.fromiter(map(len, segments), np.int64, len(segments))
    ends = np.cumsum(lengths)
    is_response = np.array(kinds) > 0
    positions = np.arange(ends[-1]) + np.repeat(np.array(starts) - (ends - lengths), lengths)
    positions[layout.n_tokens :] = 0  # padding must not ask for positions that no group has
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(segments).astype(np.int64)),
        position_ids=torch.from_numpy(positions),
        segment_ids=torch.from_numpy(np.repeat(np.array(kinds, np.int32), lengths)),
        group_ids=torch.from_numpy(np.repeat(np.array(owners, np.int32), lengths)),
        last_tokens=torch.from_numpy(ends[is_response] - 1),
        response_groups=torch.from_numpy(np.array(owners, np.int64)[is_response]),
        attributes=torch.from_numpy(np.concatenate([group.attributes for group in groups])),
        preference_strength=torch.tensor(
            [group.preference_strength for group in groups], dtype=torch.float32
        ),
        rewards=_by_response(groups, [group.rewards for group in groups]),
        ref_logprobs=_by_response(groups, [group.ref_logprobs for group in groups]),
        group_indices=torch.tensor([group.index for group in groups]),
        layout=layout,
        rollout=_rollout(groups),
    )


def _rollout(groups: Sequence[TokenGroup]) -> RolloutTokens[Tensor] | None:
    """The columns of all groups end to end; None if the first has none, as then all have none."""
    first = groups[0].rollout
    if first is None:
        return None
    columns = [dict(group.rollout.items()) for group in groups if group.rollout is not None]
    joined = {
        name: torch.from_numpy(np.concatenate([of_group[name] for of_group in columns]))
        for name, _ in first.items()
    }
    return RolloutTokens(**joined)


def _prompt_masks(groups: Sequence[TokenGroup]) -> tuple[npt.NDArray[np.bool_] | None, ...]:
    """Learned tokens of each prompt, each of which needs a token before it."""
    masks = tuple(group.prompt_mask for group in groups)
    for group, mask in zip(groups, masks, strict=True):
        if mask is not None and (len(mask) != len(group.prompt_ids) or mask[0]):
            raise ValueError(f"group {group.index}: the mask does not fit its prompt")
    return masks


def _by_response(
    groups: Sequence[TokenGroup], columns: Sequence[npt.NDArray[np.float32] | None]
) -> Tensor:
    """A number a response ``(R,)`` float32, NaN where a group has none."""
    values = [
        np.full(len(group.response_ids), np.nan, np.float32) if column is None else column
        for group, column in zip(groups, columns, strict=True)
    ]
    return torch.from_numpy(np.concatenate(values))
