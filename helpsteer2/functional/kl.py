"""Estimating how far a policy has gone from its reference, from tokens that it has sampled."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "abs"]


def kl_estimate(log_ratio: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate KL(π ‖ π_ref) token by token.

    On tokens sampled from π the mean of ``k1`` and ``k3`` is the divergence; ``k3`` varies less and
    is never negative. ``k2`` is close to it where the policies are close, and its gradient is that
    of the divergence; ``abs`` is above it (NeMo-Aligner's ``use_absolute_kl``).

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
        return log_ratio.square() / 2
    if estimator == "k3":
        return (-log_ratio).expm1() + log_ratio
    return log_ratio.abs()
