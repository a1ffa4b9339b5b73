"""Packed attention from FlexAttention: one kernel over the row, with a block mask (GPU)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from helpsteer2.data.packing import PackedBatch

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_function(batch: PackedBatch, window: int | None) -> MaskFunction:
    """Who may attend to whom, as FlexAttention's ``mask_mod``.

    Args:
        batch: The packed row.
        window: A query sees keys less than ``window`` positions behind its own; None for all.

    Returns:
        Function of (batch, head, query index, key index) to bool.
    """
    groups, segments, positions = batch.group_ids, batch.segment_ids, batch.position_ids

    def may_attend(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = (
            (query >= key)
            & (groups[query] == groups[key])
            & ((segments[key] == 0) | (segments[query] == segments[key]))
        )
        if window is None:
            return visible
        return visible & (positions[query] - positions[key] < window)

    return may_attend


@cache
def _compiled() -> Any:
    """FlexAttention compiled once a process; the row length changes from batch to batch."""
    return torch.compile(flex_attention, dynamic=True)


class FlexMasks:
    """Block masks of one batch, one for each window, built once for all layers."""

    def __init__(self, batch: PackedBatch) -> None:
        self._batch = batch
        self._masks: dict[int | None, BlockMask] = {}

    def __getitem__(self, window: int | None) -> BlockMask:
        """The block mask for a window (None: full attention)."""
        if window not in self._masks:
            length = len(self._batch.input_ids)
            self._masks[window] = create_block_mask(
                mask_function(self._batch, window),
                B=None,
                H=None,
                Q_LEN=length,
                KV_LEN=length,
                device=self._batch.input_ids.device,
            )
        return self._masks[window]


def attention(
    q: Tensor, k: Tensor, v: Tensor, masks: FlexMasks, scale: float, window: int | None
) -> Tensor:
    """Attention of one packed row on a GPU.

    Args:
        q: Queries ``(1, H, T, D)``.
        k: Keys ``(1, Hkv, T, D)``, of the same dtype.
        v: Values, like ``k``.
        masks: Block masks of the batch.
        scale: Factor of the scores before the softmax.
        window: Length of the sliding window in positions, or None.

    Returns:
        ``(1, T, H, D)``.
    """
    # CPU has no backward kernel; the plain function is what the mask is tested with there.
    function = _compiled() if q.is_cuda else flex_attention
    out = function(
        q, k, v, block_mask=masks[window], scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).contiguous()  # type: ignore[no-any-return]
