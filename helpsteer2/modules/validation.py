"""The columns of a whole validation split, gathered from packed batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor


def gather_split(
    batches: Sequence[tuple[Tensor, ...]], trainer: pl.Trainer
) -> tuple[np.ndarray, ...]:
    """Put together what every rank has collected; all ranks have to call this together.

    Args:
        batches: This rank's columns, one tuple a batch: first the ``(N,)`` index of each row's
            group in the data set, then others of the same length.
        trainer: Knows the ranks.

    Returns:
        The columns over all batches of all ranks, in the order of the data, not of the ranks: sums
        in floating point depend on it.
    """
    mine = [torch.cat(columns).cpu().numpy() for columns in zip(*batches, strict=True)]
    parts: list[Any] = [mine]
    if trainer.world_size > 1:
        parts = [None] * trainer.world_size
        dist.all_gather_object(parts, mine)
    columns = [np.concatenate(column) for column in zip(*filter(None, parts), strict=True)]
    order = np.argsort(columns[0], kind="stable")
    return tuple(column[order] for column in columns)
