"""Attention over one stretch of keys, with what it takes to join it with that over another."""

from __future__ import annotations

import torch
from torch import Tensor

_cpu_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention without any order: every query sees every key that is not masked.

    Args:
        query: ``(B, H, Q, D)``.
        key: ``(B, H, K, D)`` of the same dtype.
        value: Like ``key``.
        scale: Factor of the scores before the softmax.
        mask: ``(B, 1, 1, K)`` of the same dtype, 0 or −∞, added to the scores; None for all keys.

    Returns:
        ``(B, H, Q, D)``, and the log-sum-exp of the scores ``(B, H, Q)`` float32.
    """
    if query.device.type == "cpu":
        out, lse = _cpu_kernel(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
        return out, lse
    scores = (query @ key.transpose(2, 3)).float() * scale
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(dim=3)
    weights = (scores - lse.unsqueeze(3)).exp_().to(value.dtype)
    return weights @ value, lse


def joined(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> Tensor:
    """Attention over two stretches of keys from that over each.

    Args:
        first: ``(…, D)`` of one stretch; overwritten.
        first_lse: Its log-sum-exp ``(…)``.
        second: ``(…, D)`` of the other.
        second_lse: Its log-sum-exp ``(…)``.

    Returns:
        ``(…, D)``: softmax over both is ``first + w (second − first)``, w = σ(lse₂ − lse₁).
    """
    weight = torch.sigmoid(second_lse - first_lse).unsqueeze(-1)
    return first.lerp_(second, weight.to(first.dtype))
