"""The two ways in which samplers attend: prompts in packed rows, then one token a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from helpsteer2.data.packing import PackedBatch
from helpsteer2.errors import UserError
from helpsteer2.generation.kv_cache import CohortCache
from helpsteer2.models.attention import PackedContext

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class PrefillContext:
    """Packed attention of prompts, whose keys and values go to a cache as they pass by.

    Args:
        batch: The packed prompts, on the model's device.
        cache: Of the cohort they belong to.
        first: Number of the first of them in the cohort.
    """

    def __init__(self, batch: PackedBatch, cache: CohortCache, first: int) -> None:
        self._packed = PackedContext(batch)
        self._cache = cache
        self._first = first
        starts = torch.tensor(batch.layout.group_starts[:-1])
        ends = torch.tensor(batch.layout.group_starts[1:])
        # Places in the row, (g, P); behind the end of a prompt its last token again.
        places = starts[:, None] + torch.arange(cache.longest_prompt)
        places = torch.minimum(places, ends[:, None] - 1)
        self._places = places.flatten().to(batch.input_ids.device)

    def attend(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attention of one layer; see ``AttentionContext``."""
        check_window(type(layer).__name__, window, self._cache.span)
        index = _index(layer)
        for kind, tensor in enumerate((key, value)):
            chosen = tensor[0].index_select(1, self._places)
            by_prompt = chosen.unflatten(1, (-1, self._cache.longest_prompt)).transpose(0, 1)
            self._cache.store_prompts(index, kind, self._first, by_prompt)
        return self._packed.attend(layer, query, key, value, scale, window)


class DecodeContext:
    """Attention of the newest tokens of all samples of some cohorts, one row a sample.

    Args:
        caches: Of the cohorts, in the order of their rows.
    """

    def __init__(self, caches: Sequence[CohortCache]) -> None:
        self._caches = caches
        self._span = max(cache.span for cache in caches)

    def attend(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attention of one layer; see ``AttentionContext``."""
        check_window(type(layer).__name__, window, self._span)
        index, sizes = _index(layer), [cache.rows for cache in self._caches]
        # (1, H, B, D) to (B, H, D), which is how it lies in memory.
        queries, keys, values = (
            tensor[0].transpose(0, 1).split(sizes) for tensor in (query, key, value)
        )
        attended = [
            cache.attend(index, queries[i], keys[i], values[i], scale)
            for i, cache in enumerate(self._caches)
        ]
        return (attended[0] if len(attended) == 1 else torch.cat(attended)).unsqueeze(0)


def _index(layer: nn.Module) -> int:
    index = getattr(layer, "layer_idx", None)
    if not isinstance(index, int):
        raise UserError(
            f"{type(layer).__name__} does not know its place among the layers, which sampling in "
            "process needs: sample from a server (engine=openai)"
        )
    return index


def sliding_window(config: PreTrainedConfig) -> int | None:
    """The sliding window of a decoder's layers, None if no layer has one.

    Args:
        config: Of the decoder.
    """
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    # Some configurations hold a window that is switched off.
    slides = "sliding_attention" in kinds and getattr(config, "use_sliding_window", True)
    window: int | None = getattr(config, "sliding_window", None)
    return window if slides else None


def check_window(who: str, window: int | None, span: int) -> None:
    """Refuse texts longer than a sliding window.

    Args:
        who: The layer or model that has it.
        window: Tokens that it attends to, None for all.
        span: Tokens of the longest prompt with its longest response.

    Raises:
        UserError: If the window is shorter.
    """
    if window is not None and window < span:
        raise UserError(
            f"{who} attends to {window} tokens at most, and a prompt with its response may take "
            f"{span}: sampling in process has no sliding windows; lower sampling.max_tokens or "
            "max_prompt_tokens, or sample from a server (engine=openai)"
        )
