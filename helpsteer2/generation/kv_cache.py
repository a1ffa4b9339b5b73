"""Keys and values of prompts that began together, and of their samples.

A *cohort* is a few prompts with n samples each. Its live samples are all equally long, so their
keys lie in one dense slab without mask or padding; a prompt's keys lie there once for its samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from helpsteer2.generation.partial_attention import attend, joined

FIRST_CAPACITY = 32
"""Tokens of a sample there is room for at first; doubled whenever it is full."""

SLACK = 2
"""Room is kept for so many times the live samples (or prompts) at the most. It is given back by a
copy of what is live, which is then no more than what has ended since the last one."""

Indices = npt.NDArray[np.int64]


class CohortCache:
    """Keys and values of a cohort: G prompts, and B live samples that are t tokens long.

    What it holds is less than twice ``reserved_tokens``, except while it is copied.

    Args:
        prompt_lengths: Tokens of each prompt.
        n_samples: Samples of each prompt, which begin side by side.
        max_tokens: Longest sample.
        n_layers: Layers of the decoder.
        device: Of the keys and values.

    Attributes:
        rows: B, the live samples.
        longest_prompt: P, tokens of the longest prompt.
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        n_samples: int,
        max_tokens: int,
        n_layers: int,
        device: torch.device,
    ) -> None:
        self.rows = len(prompt_lengths) * n_samples
        self.longest_prompt = max(prompt_lengths)
        self._lengths = torch.tensor(prompt_lengths)
        self._n_samples = n_samples
        self._max_tokens = max_tokens
        self._n_layers = n_layers
        self._device = device
        self._n_tokens = 0
        self._prompts: Tensor | None = None  # (2, layers, ≥ G, Hkv, P, D), keys and values
        self._tails = torch.empty(0)  # (2, layers, ≥ B, Hkv, ≥ t, D), keys and values
        self._mask: Tensor | None = None  # (G, 1, 1, P)
        # Of each row its place among all G·n samples. The same on the device, and the row at each
        # place (any for one that has ended); None as long as rows and places are the same.
        self._place_of: Indices = np.arange(self.rows)
        self._places: tuple[Tensor, Tensor] | None = None

    @property
    def span(self) -> int:
        """Tokens of the longest prompt with the longest sample."""
        return self.longest_prompt + self._max_tokens

    @property
    def reserved_tokens(self) -> int:
        """Tokens that the prompts take and the live samples may take."""
        return self._n_prompts * self.longest_prompt + self.rows * self._max_tokens

    @property
    def _n_prompts(self) -> int:
        return len(self._lengths)

    def store_prompts(self, layer: int, kind: int, first: int, values: Tensor) -> None:
        """Keep what a layer made of some prompts.

        Args:
            layer: Of the decoder.
            kind: 0 for keys, 1 for values.
            first: Number of the first of the prompts.
            values: ``(g, Hkv, P, D)``, anything behind the end of a prompt.
        """
        if self._prompts is None:
            self._prompts = self._allocated(values)
        self._prompts[kind, layer, first : first + len(values)] = values

    def _allocated(self, like: Tensor) -> Tensor:
        """Room for everything, once a layer has said how wide its keys are."""
        _, heads, longest, width = like.shape
        capacity = min(FIRST_CAPACITY, self._max_tokens)
        self._tails = like.new_empty(2, self._n_layers, self.rows, heads, capacity, width)
        if int(self._lengths.min()) < longest:
            behind = torch.arange(longest) >= self._lengths[:, None]
            mask = torch.zeros(behind.shape, dtype=like.dtype).masked_fill_(behind, -torch.inf)
            self._mask = mask[:, None, None].to(self._device)
        return like.new_empty(2, self._n_layers, self._n_prompts, heads, longest, width)

    def begin_token(self) -> None:
        """Make room for the next token of every sample."""
        capacity = self._tails.shape[4]
        if self._n_tokens == capacity:
            kept = self._tails[:, :, : self.rows]
            room = min(2 * capacity, self._max_tokens)
            self._tails = kept.new_empty(*kept.shape[:4], room, kept.shape[5])
            self._tails[..., :capacity, :] = kept
        self._n_tokens += 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of the newest token of every sample, to its prompt and to the sample.

        Args:
            layer: Of the decoder.
            query: ``(B, H, D)``.
            key: ``(B, Hkv, D)``, kept.
            value: Like ``key``.
            scale: Factor of the scores before the softmax.

        Returns:
            ``(B, H, D)``.
        """
        assert self._prompts is not None
        rows, heads, width = key.shape
        keys, values = self._tails[:, layer, :rows, :, : self._n_tokens].unbind()
        keys[:, :, -1], values[:, :, -1] = key, value
        own, own_lse = attend(query.unflatten(1, (heads, -1)), keys, values, scale)
        prompt_keys, prompt_values = self._prompts[:, layer, : self._n_prompts].unbind()
        shared, shared_lse = attend(
            self._by_prompt(query, heads), prompt_keys, prompt_values, scale, self._mask
        )
        out = joined(own, own_lse, self._by_row(shared), self._by_row(shared_lse))
        return out.reshape(rows, -1, width)

    def _by_prompt(self, query: Tensor, heads: int) -> Tensor:
        """``(B, H, D)`` to ``(G, Hkv, n·H/Hkv, D)``."""
        if self._places is not None:
            query = query[self._places[1]]
        by_prompt = query.unflatten(1, (heads, -1)).unflatten(0, (-1, self._n_samples))
        return by_prompt.transpose(1, 2).flatten(2, 3)

    def _by_row(self, values: Tensor) -> Tensor:
        """``(G, Hkv, n·H/Hkv, …)`` to ``(B, Hkv, H/Hkv, …)``."""
        by_place = values.unflatten(2, (self._n_samples, -1)).transpose(1, 2).flatten(0, 1)
        return by_place if self._places is None else by_place[self._places[0]]

    def remove(self, ended: Sequence[int]) -> Indices:
        """Let samples go, and the prompts that have none left; the last ones take their place.

        Args:
            ended: Rows, not all there are.

        Returns:
            Of each row that is left, the row it had before.
        """
        assert self._prompts is not None
        order = _closed_up(self.rows, ended)
        self._tails = _reordered(self._tails, order, self._n_tokens)
        self.rows = len(order)
        prompts, samples = np.divmod(self._place_of[order], self._n_samples)
        gone = sorted(set(range(self._n_prompts)) - set(prompts.tolist()))
        if gone:
            kept = _closed_up(self._n_prompts, gone)
            self._prompts = _reordered(self._prompts, kept, self.longest_prompt)
            self._mask = None if self._mask is None else self._mask[torch.from_numpy(kept)]
            self._lengths = self._lengths[torch.from_numpy(kept)]
            prompts = np.argsort(kept)[np.searchsorted(np.sort(kept), prompts)]
        self._place_of = prompts * self._n_samples + samples
        row_at = np.zeros(self._n_prompts * self._n_samples, np.int64)
        row_at[self._place_of] = np.arange(self.rows)
        self._places = (
            torch.from_numpy(self._place_of).to(self._device),
            torch.from_numpy(row_at).to(self._device),
        )
        return order


def _closed_up(size: int, gone: Sequence[int]) -> Indices:
    """Which of so many things stands where, once the last ones have taken the place of some."""
    left = size - len(gone)
    lost = set(gone)
    order = np.arange(left)
    order[[i for i in range(left) if i in lost]] = [i for i in range(left, size) if i not in lost]
    return order


def _reordered(slab: Tensor, order: Indices, n_tokens: int) -> Tensor:
    """A slab whose dimension 2 begins with these of its things: a smaller one, or itself changed.

    Args:
        slab: ``(2, layers, ≥ len(order), Hkv, ≥ n_tokens, D)``.
        order: Which of its things stands where.
        n_tokens: Tokens of each thing so far; what lies behind them is left to chance.
    """
    if SLACK * len(order) <= slab.shape[2]:
        return slab.index_select(2, torch.from_numpy(order).to(slab.device))
    (moved,) = np.nonzero(order != np.arange(len(order)))
    if len(moved):
        used = slab[..., :n_tokens, :]
        used[:, :, torch.from_numpy(moved)] = used[:, :, torch.from_numpy(order[moved])]
    return slab
