"""The masked squared error, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from helpsteer2.errors import UserError
from helpsteer2.losses.regression import RegressionLoss

NAMES = ("helpfulness", "verbosity")
NAN = math.nan


def bound(**weights: float) -> RegressionLoss:
    return RegressionLoss(weights).bind(NAMES)


def test_hand_numbers():
    scores = torch.tensor([[1.0, 2.0], [0.5, 7.0], [3.0, -1.0]])
    ratings = torch.tensor([[4.0, 2.5], [NAN, 4.0], [3.0, NAN]])
    loss, sums = bound()(scores, ratings)
    # (1−4)² + (3−3)² = 9 and (2−2.5)² + (7−4)² = 9.25
    assert loss.item() == pytest.approx(18.25)
    assert sums["squared_error"].tolist() == pytest.approx([9.0, 9.25])
    assert sums["known"].tolist() == [2, 2]
    assert bound().count(ratings).item() == 4
    weighted, sums = bound(verbosity=0.5)(scores, ratings)
    assert weighted.item() == pytest.approx(9 + 4.625)
    assert sums["squared_error"].tolist() == pytest.approx([9.0, 9.25])


def test_unknown_ratings_have_no_gradient():
    scores = torch.randn(3, 2, requires_grad=True)
    ratings = torch.tensor([[4.0, NAN], [NAN, NAN], [NAN, 1.0]])
    bound()(scores, ratings)[0].backward()
    known = ~ratings.isnan()
    assert scores.grad is not None
    assert torch.equal(scores.grad != 0, known)
    assert torch.allclose(scores.grad[known], 2 * (scores.detach() - ratings)[known])


def test_nothing_known_is_zero_with_a_zero_gradient():
    scores = torch.randn(2, 2, requires_grad=True)
    loss, _ = bound()(scores, torch.full((2, 2), NAN))
    loss.backward()
    assert loss.item() == 0
    assert scores.grad is not None
    assert torch.equal(scores.grad, torch.zeros(2, 2))
    assert bound().count(torch.full((2, 2), NAN)).item() == 0


def test_cutting_a_batch_changes_neither_sum_nor_count():
    scores, ratings = torch.randn(20, 2), torch.randint(0, 5, (20, 2)).float()
    ratings[torch.rand(20, 2) < 0.4] = NAN
    loss = bound(verbosity=0.3)
    parts = [(s, r) for s, r in zip(scores.split(7), ratings.split(7), strict=True)]
    total = sum(loss(s, r)[0].item() for s, r in parts)
    assert total == pytest.approx(loss(scores, ratings)[0].item(), rel=1e-6)
    assert sum(loss.count(r).item() for _, r in parts) == loss.count(ratings).item()


def test_fp32_under_autocast():
    scores = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16)
    ratings = torch.tensor([[1.001, 3.0]])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = bound()(scores, ratings)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1e-6, rel=1e-3)


def test_weights_of_unknown_attributes_are_refused():
    with pytest.raises(UserError, match="toxicity"):
        bound(toxicity=1.0)


@pytest.mark.parametrize("weight", [-1.0, NAN, math.inf])
def test_impossible_weights_are_refused(weight: float):
    with pytest.raises(UserError, match="verbosity"):
        RegressionLoss({"verbosity": weight})


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(UserError, match="every weight is 0"):
        bound(helpfulness=0.0, verbosity=0.0)


def test_shapes_must_agree_and_names_be_known():
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        bound()(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="bind"):
        RegressionLoss()(torch.zeros(3, 2), torch.zeros(3, 2))
