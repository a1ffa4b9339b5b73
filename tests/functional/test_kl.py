"""Estimators of the divergence, against the divergence of policies small enough to enumerate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from helpsteer2.functional.kl import KLEstimator, kl_estimate

LOGITS = torch.tensor([0.4, -0.7, 1.1, 0.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.0, 0.5, 0.2, -0.3], dtype=torch.float64).log_softmax(0)


def divergence(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(0)
    return (logp.exp() * (logp - REFERENCE)).sum()


def expected(estimator: KLEstimator, logits: Tensor) -> Tensor:
    """Mean of the estimate over tokens of the policy, which are drawn without a gradient."""
    logp = logits.log_softmax(0)
    return (logp.exp().detach() * kl_estimate(logp - REFERENCE, estimator)).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_divergence(estimator: KLEstimator) -> None:
    assert expected(estimator, LOGITS).item() == pytest.approx(divergence(LOGITS).item())


def test_all_estimators_vanish_for_equal_policies_and_all_but_one_are_never_negative() -> None:
    log_ratio = torch.linspace(-3, 3, 41, dtype=torch.float64)
    for estimator in get_args(KLEstimator):
        assert kl_estimate(torch.zeros(3), estimator).tolist() == [0.0] * 3
        assert estimator == "k1" or kl_estimate(log_ratio, estimator).min() >= 0


def backward_divergence(logits: Tensor) -> Tensor:
    return (REFERENCE.exp() * (REFERENCE - logits.log_softmax(0))).sum()


def total_difference(logits: Tensor) -> Tensor:
    return (logits.softmax(0) - REFERENCE.exp()).abs().sum()


def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0]


@pytest.mark.parametrize(
    ("estimator", "descended"),
    [
        ("k1", lambda logits: 0 * logits.sum()),
        ("k2", divergence),
        ("k3", backward_divergence),
        ("abs", total_difference),
    ],
)
def test_the_mean_gradient_of_each_estimator_is_that_of_another_divergence(
    estimator: KLEstimator, descended: Callable[[Tensor], Tensor]
) -> None:
    ours = gradient(partial(expected, estimator))
    assert torch.allclose(ours, gradient(descended), atol=1e-12)
    assert torch.allclose(ours, gradient(divergence), atol=1e-2) == (estimator == "k2")


@pytest.mark.parametrize("estimator", get_args(KLEstimator))
def test_arrays_and_tensors_are_estimated_alike(estimator: KLEstimator) -> None:
    log_ratio = np.array([[-2.0, -1e-5, 0.0], [1e-5, 0.7, 3.0]])
    found = kl_estimate(log_ratio, estimator)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, kl_estimate(torch.from_numpy(log_ratio), estimator).numpy())


def test_close_policies_have_a_k2_close_to_the_divergence() -> None:
    near = REFERENCE + 1e-3 * torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    assert expected("k2", near).item() == pytest.approx(divergence(near).item(), rel=1e-2)
    assert expected("abs", near).item() > divergence(near).item()
