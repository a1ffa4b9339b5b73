"""Packed attention from a variable-length flash kernel (GPU): flash-attn, or torch's own.

The kernel knows nothing of shared prompts. So every response gets its prompt's keys and values
gathered in front of its own, and one call aligned to the bottom right does the rest: query i of a
response of m tokens behind p prompt tokens sees keys 0 … p + i. The gather costs memory traffic,
no FLOPs, and autograd adds up the gradients of a key that was gathered more than once.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from helpsteer2.data.packing import PackedLayout

DTYPES = (torch.float16, torch.bfloat16)
"""What the kernels compute in."""


@dataclass(frozen=True)
class VarlenTable:
    """What the kernel wants to know of a packed row.

    Attributes:
        keys: ``(K,)`` int64, index of the row's token behind each gathered key.
        query_offsets: ``(S + 1,)`` int32, where each segment's queries start.
        key_offsets: ``(S + 1,)`` int32, where each segment's keys start.
        max_queries: Longest segment in queries.
        max_keys: Longest segment in keys.
    """

    keys: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    max_queries: int
    max_keys: int

    @classmethod
    def build(cls, layout: PackedLayout, device: torch.device) -> VarlenTable:
        """Make the table of a layout on a device, without waiting for it."""
        keys: list[np.ndarray] = []
        queries: list[int] = []
        for start, prompt, responses in layout.segments():
            context = np.arange(start, start + prompt)
            keys.append(context)
            queries.append(prompt)
            at = start + prompt
            for length in responses:
                keys.append(np.concatenate([context, np.arange(at, at + length)]))
                queries.append(length)
                at += length
        key_lengths = list(map(len, keys))

        def offsets(lengths: list[int]) -> Tensor:
            table = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
            return table.to(device, non_blocking=True)

        return cls(
            torch.from_numpy(np.concatenate(keys)).to(device, non_blocking=True),
            offsets(queries),
            offsets(key_lengths),
            max(queries),
            max(key_lengths),
        )


Kernel = Callable[[Tensor, Tensor, Tensor, VarlenTable, float, int | None], Tensor]


@cache
def kernel() -> Kernel | None:
    """The kernel of this machine: flash-attn's if it is installed, else torch's, else None."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return None
    if importlib.util.find_spec("flash_attn") is not None:
        return _flash_attn
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return _torch_varlen
    return None


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, table: VarlenTable, scale: float, window: int | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    return flash_attn_varlen_func(  # type: ignore[no-any-return]
        q, k, v, table.query_offsets, table.key_offsets, table.max_queries, table.max_keys,
        softmax_scale=scale, causal=True, window_size=(-1 if window is None else window - 1, 0),
    )  # fmt: skip


@cache
def _varlen_arguments() -> frozenset[str]:
    """What torch's varlen attention takes, which differs between versions."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, table: VarlenTable, scale: float, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, object] = {"scale": scale}
    accepted = _varlen_arguments()
    if "window_size" in accepted:  # torch ≥ 2.11 says causality by a window of zero to the right
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise RuntimeError("this torch's varlen attention has no window: install flash-attn")
    heads, key_heads = q.shape[1], k.shape[1]
    if heads != key_heads:
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        else:
            k = k.repeat_interleave(heads // key_heads, 1)
            v = v.repeat_interleave(heads // key_heads, 1)
    return varlen_attn(  # type: ignore[return-value]
        q, k, v, table.query_offsets, table.key_offsets, table.max_queries, table.max_keys,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: VarlenTable,
    scale: float,
    window: int | None,
    call: Kernel,
) -> Tensor:
    """Attention of one packed row through a variable-length kernel.

    Args:
        q: Queries ``(1, H, T, D)``, fp16 or bf16 (what the kernels take).
        k: Keys ``(1, Hkv, T, D)``, of the same dtype.
        v: Values, like ``k``.
        table: Segment table of the batch.
        scale: Factor of the scores before the softmax.
        window: Length of the sliding window in positions, or None.
        call: The kernel, on ``(tokens, heads, D)``.

    Returns:
        ``(1, T, H, D)``.
    """
    gathered_k = k[0].transpose(0, 1)[table.keys]
    gathered_v = v[0].transpose(0, 1)[table.keys]
    return call(q[0].transpose(0, 1), gathered_k, gathered_v, table, scale, window).unsqueeze(0)
