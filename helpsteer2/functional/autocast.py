"""Casting weights once for many passes, where autocast would cast them for each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def cached_casts(device_type: str) -> Iterator[None]:
    """Keep what autocast casts until the end of the block; Lightning's context does not.

    The weights must not change inside. Blocks with gradients and blocks without are apart: a cast
    kept from one without would cut the weights off from their gradients.

    Args:
        device_type: ``cpu`` or ``cuda``. Without autocast there nothing happens.
    """
    dtype = torch.get_autocast_dtype(device_type)
    enabled = torch.is_autocast_enabled(device_type)
    with torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=True):
        yield
    torch.clear_autocast_cache()
