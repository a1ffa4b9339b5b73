"""Drawing tokens, with random numbers that depend on a key and a counter alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BLOCK = 64
"""Columns of a distribution that are summed first, so that its CDF is searched in two short steps
and never written down whole."""

ATTEMPTS = 16
"""Draws of a token by rejection before its row is sorted; random numbers of one position."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def stream_key(seed: int, name: str, index: int) -> int:
    """The key of a stream of random numbers.

    Args:
        seed: Seed of all streams.
        name: Whom the stream is for.
        index: The stream of that name.

    Returns:
        64 bits: streams of other arguments have nothing in common.
    """
    text = f"{seed}/{index}/{name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniforms(keys: npt.NDArray[np.uint64], counters: npt.NDArray[np.uint64]) -> Tensor:
    """A random number for each key and counter, whatever stands beside it.

    Args:
        keys: ``(B,)``, from ``stream_key``.
        counters: ``(B,)``, the place in each stream.

    Returns:
        ``(B,)`` float64 on the CPU, 0 ≤ u < 1.

    Source: SplitMix64 (Steele, Lea, Flood 2014), whose state is a counter times a constant.
    """
    state = keys + (counters + np.uint64(1)) * _GOLDEN
    for shift, factor in zip(_SHIFTS, _MIX, strict=False):
        state = (state ^ (state >> shift)) * factor
    state ^= state >> _SHIFTS[2]
    # 52 bits: u times a sum is then below the sum, also after rounding.
    return torch.from_numpy((state >> np.uint64(12)).astype(np.float64) * 2.0**-52)


@dataclass(frozen=True)
class Truncation:
    """Which distribution is drawn from: that of the logits, made sharper and cut off.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Only so many of the likeliest tokens; 0 for all.
        top_p: Of those, only the likeliest whose share sums up to this; 1 for all. A token stays
            if those that are likelier have less than this share together.
    """

    temperature: float
    top_k: int
    top_p: float


def draw(
    logits: Tensor,
    truncation: Truncation,
    keys: npt.NDArray[np.uint64],
    positions: npt.NDArray[np.int64],
) -> tuple[Tensor, Tensor]:
    """Draw a token for each row.

    Args:
        logits: ``(B, V)`` float32.
        truncation: What to draw from.
        keys: ``(B,)``, the stream of each row.
        positions: ``(B,)``, the token's place in its response.

    Returns:
        Tokens ``(B,)`` int64, and their log-probabilities ``(B,)`` float32 in nats, of the
        logits as they are: without temperature and truncation.

    Raises:
        ValueError: If the largest logit of a row is not finite, or one of them is NaN.
    """
    top = logits.amax(dim=1, keepdim=True)
    if not bool(top.isfinite().all()):
        raise ValueError("the logits are not finite")
    if truncation.temperature == 0:
        tokens = logits.argmax(dim=1)
        totals = (logits - top).exp_().sum(dim=1)
        return tokens, _logprobs(logits, tokens, top, totals)
    candidates, ids = logits, None
    if 0 < truncation.top_k < logits.shape[1]:
        candidates, ids = logits.topk(truncation.top_k, dim=1)
    weights = _weights(candidates, top, truncation.temperature)
    if ids is None and truncation.temperature == 1:
        totals = weights.sum(dim=1)
    else:
        totals = (logits - top).exp_().sum(dim=1)
    counters = positions.astype(np.uint64) * np.uint64(ATTEMPTS)
    tokens = _draw_nucleus(weights, truncation.top_p, keys, counters)
    if ids is not None:
        tokens = ids.gather(1, tokens[:, None]).squeeze(1)
    return tokens, _logprobs(logits, tokens, top, totals)


def _weights(logits: Tensor, top: Tensor, temperature: float) -> Tensor:
    """``exp((logits − top) / temperature)``, zeros behind it up to a multiple of ``BLOCK``."""
    rows, columns = logits.shape
    weights = logits.new_empty(rows, columns + -columns % BLOCK)
    used = weights[:, :columns]
    torch.sub(logits, top, out=used)
    if temperature != 1:
        used /= temperature
    used.exp_()
    weights[:, columns:] = 0
    return weights


def _logprobs(logits: Tensor, tokens: Tensor, top: Tensor, totals: Tensor) -> Tensor:
    chosen = logits.gather(1, tokens[:, None])
    return (chosen - top).squeeze(1) - totals.log()


def _draw_nucleus(
    weights: Tensor,
    top_p: float,
    keys: npt.NDArray[np.uint64],
    counters: npt.NDArray[np.uint64],
) -> Tensor:
    """Draw columns ``(B,)`` in proportion to their weights, among the likeliest of share ``top_p``.

    By rejection: what is drawn from all columns and lies among the likeliest is a fair draw from
    them. It needs no sorting, and the first draw is good with a probability of ``top_p`` or more.
    """
    columns = _draw_column(weights, uniforms(keys, counters))
    if top_p >= 1:
        return columns
    allowed = top_p * weights.sum(dim=1)
    rows = _rejected(weights, columns, allowed)
    for attempt in range(1, ATTEMPTS):
        if not len(rows):
            return columns
        host = rows.cpu().numpy()
        left = weights[rows]
        if attempt == ATTEMPTS - 1:
            left = _only_nucleus(left, allowed[rows])
        again = _draw_column(left, uniforms(keys[host], counters[host] + np.uint64(attempt)))
        columns[rows] = again
        if attempt < ATTEMPTS - 1:
            rows = rows[_rejected(left, again, allowed[rows])]
    return columns


def _rejected(weights: Tensor, columns: Tensor, allowed: Tensor) -> Tensor:
    """Rows whose column has likelier ones with the allowed weight or more together."""
    own = weights.gather(1, columns[:, None])
    above = (weights * (weights > own)).sum(dim=1)
    return (above >= allowed).nonzero().squeeze(1)


def _only_nucleus(weights: Tensor, allowed: Tensor) -> Tensor:
    """Zero in place of the weights that ``_rejected`` would reject."""
    ordered, order = weights.sort(dim=1, descending=True)
    above = ordered.cumsum(dim=1) - ordered
    ordered[above >= allowed[:, None]] = 0
    return torch.zeros_like(weights).scatter_(1, order, ordered)


def _draw_column(weights: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF: the column ``(B,)`` where the running sum passes ``uniform`` of the total."""
    uniform = uniform.to(weights.device)
    blocks = weights.view(len(weights), -1, BLOCK)
    sums = blocks.sum(dim=2).cumsum(dim=1, dtype=torch.float64)
    target = (uniform * sums[:, -1])[:, None]
    block = torch.searchsorted(sums, target, right=True)
    before = sums.gather(1, (block - 1).clamp_min(0)) * (block > 0)
    rows = torch.arange(len(weights), device=weights.device)
    inner = blocks[rows, block.squeeze(1)].cumsum(dim=1, dtype=torch.float64)
    # The block's sum and that of its columns differ by rounding, and no zero may be drawn.
    rest = torch.minimum(target - before, inner[:, -1:] * (1 - 2.0**-40))
    return (block * BLOCK + torch.searchsorted(inner, rest, right=True)).squeeze(1)
