"""Packed attention from torch's own CPU kernel, exact and without any T×T mask.

A response attends to its prompt (all of it) and to itself (causally). Both parts are calls of the
fused kernel, merged by their log-sum-exp, so a prompt is read by n responses but computed once.

The kernel is called below autograd on purpose. Merging two calls *inside* autograd is right forward
and silently wrong backward: each call's own backward would normalise by its own log-sum-exp. Here
the one backward hands the kernel the merged output and the merged log-sum-exp, which makes each
part's gradient exact: P = exp(QKᵀ − lse) and δ = rowsum(dO ∘ O) are then those of the whole row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from helpsteer2.data.packing import PackedLayout

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, window: int | None
) -> Tensor:
    """Attention of one packed row on the CPU.

    Args:
        q: Queries ``(1, H, T, D)``, fp32 or bf16.
        k: Keys ``(1, Hkv, T, D)`` with H a multiple of Hkv, of the same dtype.
        v: Values, like ``k``.
        layout: The segment table of the row.
        scale: Factor of the scores before the softmax.
        window: A query sees keys less than ``window`` positions behind its own; None for all.

    Returns:
        ``(1, T, H, D)``, of the dtype of ``q``.
    """
    # The CPU kernel takes longer in bf16 than in fp32: forward 1.4 times, backward 1.9 times.
    dtype = q.dtype
    q, k, v = q.float(), k.float(), v.float()
    if k.shape[1] != q.shape[1]:  # the kernel's backward wants one key head a query head
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    if window is not None and window < layout.max_span:
        return _windowed(q, k, v, layout, scale, window).to(dtype)
    return _SharedPromptAttention.apply(q, k, v, layout, scale).to(dtype)  # type: ignore[no-any-return]


def _segments(layout: PackedLayout) -> Iterator[tuple[slice, slice, list[slice]]]:
    """Of each group: the prompt, all its responses together, and each response."""
    for start, prompt, responses in layout.segments():
        parts, at = [], start + prompt
        for length in responses:
            parts.append(slice(at, at + length))
            at += length
        yield slice(start, start + prompt), slice(start + prompt, at), parts


class _SharedPromptAttention(torch.autograd.Function):
    """Attention of a packed row: q, k, v ``(1, H, T, D)`` to ``(1, T, H, D)``."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float
    ) -> Tensor:
        output = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
        out = output.transpose(1, 2)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        for prompt, responses, parts in _segments(layout):
            for own in (prompt, *parts):
                out[:, :, own], lse[:, :, own] = _forward(
                    q[:, :, own], k[:, :, own], v[:, :, own], 0.0, True, scale=scale
                )
            if not parts:
                continue
            shared, shared_lse = _forward(
                q[:, :, responses], k[:, :, prompt], v[:, :, prompt], 0.0, False, scale=scale
            )
            # softmax over both parts: out = own + w (shared − own) with w = σ(lse_shared − lse_own)
            weight = torch.sigmoid(shared_lse - lse[:, :, responses]).unsqueeze(-1)
            out[:, :, responses].lerp_(shared, weight.to(out.dtype))
            lse[:, :, responses] = torch.logaddexp(lse[:, :, responses], shared_lse)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        grad, out = grads[0].transpose(1, 2), output.transpose(1, 2)
        # Laid out as (1, T, H, D), the way the projections read them next.
        dq, dk, dv = (torch.empty_like(output).transpose(1, 2) for _ in range(3))
        for prompt, responses, parts in _segments(ctx.layout):
            for own in (prompt, *parts):
                dq[:, :, own], dk[:, :, own], dv[:, :, own] = _backward(
                    grad[:, :, own], q[:, :, own], k[:, :, own], v[:, :, own],
                    out[:, :, own], lse[:, :, own], 0.0, True, scale=ctx.scale,
                )  # fmt: skip
            if not parts:
                continue
            shared_dq, shared_dk, shared_dv = _backward(
                grad[:, :, responses], q[:, :, responses], k[:, :, prompt], v[:, :, prompt],
                out[:, :, responses], lse[:, :, responses], 0.0, False, scale=ctx.scale,
            )  # fmt: skip
            dq[:, :, responses] += shared_dq
            dk[:, :, prompt] += shared_dk
            dv[:, :, prompt] += shared_dv
        return dq, dk, dv, None, None


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, window: int
) -> Tensor:
    """The same with a sliding window: one masked call a segment, mask m×(p+m) at the most."""
    outputs = []
    for prompt, _, parts in _segments(layout):
        for own in (prompt, *parts):
            context = 0 if own is prompt else prompt.stop - prompt.start
            keys = torch.cat([k[:, :, prompt][:, :, :context], k[:, :, own]], 2)
            values = torch.cat([v[:, :, prompt][:, :, :context], v[:, :, own]], 2)
            length = own.stop - own.start
            behind = (
                torch.arange(context, context + length, device=q.device)[:, None]
                - torch.arange(context + length, device=q.device)[None]
            )
            mask = (behind >= 0) & (behind < window)
            outputs.append(
                F.scaled_dot_product_attention(
                    q[:, :, own], keys, values, attn_mask=mask, scale=scale
                )
            )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()  # some decoders take a view of it
