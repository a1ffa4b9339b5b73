"""Self-normalised importance weights: a softmax over the responses of each prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def group_log_softmax(values: Tensor, owners: Tensor, n_groups: int) -> Tensor:
    """Log-softmax over the values of each group, in their own dtype.

    A constant added to the values of a group changes nothing, so log-probabilities of which a term
    is left out, one of the prompt alone, give the same weights.

    Args:
        values: ``(R,)`` float32 or float64 nats, of any size. −∞ is a weight of 0. A group of
            nothing but −∞ has no distribution: its entries stay −∞, and have no gradient.
        owners: ``(R,)`` int64, the group 0 … G−1 of each value, in any order.
        n_groups: G; a group may have any number of values, or none.

    Returns:
        ``(R,)``; the exponentials of each group sum to 1. A NaN makes its whole group NaN, and no
        other.
    """
    # Where the largest one is subtracted, no exponential overflows; it is no part of the result.
    largest = values.new_full((n_groups,), -math.inf)
    largest = largest.scatter_reduce(0, owners, values.detach(), "amax")
    largest = torch.where(largest.isneginf(), 0.0, largest)
    shifted = values - largest[owners]
    totals = values.new_zeros(n_groups).index_add(0, owners, shifted.exp())
    # log 0 would make −∞ − (−∞) of a group without a weight.
    return shifted - torch.where(totals == 0, 1.0, totals).log()[owners]


def effective_sample_size(log_weights: Tensor, owners: Tensor, n_groups: int) -> Tensor:
    """How many equally weighted samples of each group are worth its weighted ones: ``1/Σw²``.

    Args:
        log_weights: ``(R,)`` float32 or float64 nats, up to a constant a group; −∞ is a weight of
            0.
        owners: ``(R,)`` int64, the group 0 … G−1 of each.
        n_groups: G.

    Returns:
        ``(G,)``, between 1 and the number of values; 0 for a group without a weight.

    Source: Kong, "A note on importance sampling using standardized weights" (1992).
    """
    squares = (2 * group_log_softmax(log_weights, owners, n_groups)).exp()
    totals = squares.new_zeros(n_groups).index_add(0, owners, squares)
    return 1 / torch.where(totals == 0, math.inf, totals)
