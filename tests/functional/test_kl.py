"""Estimators of the divergence, against the divergence of policies small enough to enumerate."""

from __future__ import annotations

from typing import get_args

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


def test_the_gradient_of_k2_is_that_of_the_divergence_and_k1_has_none() -> None:
    gradients = {}
    for estimator in get_args(KLEstimator):
        logits = LOGITS.clone().requires_grad_()
        (gradients[estimator],) = torch.autograd.grad(expected(estimator, logits), logits)
    logits = LOGITS.clone().requires_grad_()
    (truth,) = torch.autograd.grad(divergence(logits), logits)
    assert torch.allclose(gradients["k2"], truth, atol=1e-12)
    assert torch.allclose(gradients["k1"], torch.zeros(4, dtype=torch.float64), atol=1e-12)
    assert not torch.allclose(gradients["k3"], truth, atol=1e-2)
    assert not torch.allclose(gradients["abs"], truth, atol=1e-2)


def test_close_policies_have_a_k2_close_to_the_divergence() -> None:
    near = REFERENCE + 1e-3 * torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    assert expected("k2", near).item() == pytest.approx(divergence(near).item(), rel=1e-2)
    assert expected("abs", near).item() > divergence(near).item()
