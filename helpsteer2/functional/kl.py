"""Estimating how far a policy has gone from its reference, from tokens that it has sampled."""

from __future__ import annotations

from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "abs"]

Values = TypeVar("Values", Tensor, npt.NDArray[np.float64])
"""Rollouts are arrays, losses need tensors."""


def kl_estimate(log_ratio: Values, estimator: KLEstimator) -> Values:
    """Estimate KL(π ‖ π_ref) token by token.

    On tokens sampled from π the mean of ``k1`` and ``k3`` is the divergence; ``k3`` varies less and
    is never negative. ``k2`` is close to it where the policies are close, and ``abs`` is above it
    (NeMo-Aligner's ``use_absolute_kl``).

    The mean of their gradients is another matter, for it knows nothing of how π changes what is
    sampled: that of ``k2`` is the gradient of KL(π ‖ π_ref), that of ``k3`` of KL(π_ref ‖ π), that
    of ``abs`` of ``Σ |π − π_ref|``, and that of ``k1`` is 0.

    Args:
        log_ratio: log π − log π_ref of each token, any shape, in nats.
        estimator: ``k1`` is x, ``k2`` x²/2, ``k3`` e^−x − 1 + x, ``abs`` ``|x|``.

    Returns:
        The same shape.

    Source: Schulman, "Approximating KL divergence" (2020); NVIDIA/NeMo-Aligner, ppo_utils.py.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio * log_ratio / 2
    if estimator == "k3":
        if isinstance(log_ratio, Tensor):
            return torch.expm1(-log_ratio) + log_ratio
        return np.asarray(np.expm1(-log_ratio) + log_ratio)
    return abs(log_ratio)
