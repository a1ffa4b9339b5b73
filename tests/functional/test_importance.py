"""Weights of a group are those of its definition, whatever its size and scale."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from helpsteer2.functional.importance import effective_sample_size, group_log_softmax

INF = math.inf
OWNERS = torch.tensor([2, 0, 2, 2, 4, 0, 2, 3, 3, 2])
"""Groups of any size in any order; nothing is of group 1."""

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


def random_values(dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(len(OWNERS), generator=generator, dtype=dtype)


def by_definition(values: Tensor) -> np.ndarray:
    weights, owners = np.exp(values.double().numpy()), OWNERS.numpy()
    return weights / np.array([weights[owners == owner].sum() for owner in owners])


@BOTH
def test_weights_are_a_softmax_of_each_group(dtype: torch.dtype) -> None:
    values = random_values(dtype)
    found = group_log_softmax(values, OWNERS, 5)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.exp(), by_definition(values), rtol=TOLERANCE[dtype])


@BOTH
@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_constants_of_a_group_change_nothing_however_large(dtype: torch.dtype, size: float) -> None:
    values = random_values(dtype).round(decimals=1)
    shifts = size * torch.tensor([1.0, 1, 0.5, -1, 2], dtype=dtype)
    found = group_log_softmax(values + shifts[OWNERS], OWNERS, 5)
    # What the sum of value and constant has lost is no fault of the softmax.
    lost = 1e-3 if dtype == torch.float32 else 1e-11
    np.testing.assert_allclose(found.exp(), by_definition(values), rtol=3 * lost)
    far = torch.tensor([0.0, size], dtype=dtype)
    expected = [0.0, -INF] if size < 0 else [-INF, 0.0]
    found = group_log_softmax(far, torch.zeros(2, dtype=torch.int64), 1)
    assert found.exp().tolist() == np.exp(expected).tolist()
    assert found.isfinite().all()


def test_an_impossible_response_weighs_nothing_and_has_no_gradient() -> None:
    values = random_values(torch.float64)
    values[[0, 4]] = -INF  # one of five in group 2, the only one of group 4
    values.requires_grad_()
    found = group_log_softmax(values, OWNERS, 5)
    rest = (torch.arange(len(OWNERS)) != 0) & (OWNERS == 2)
    assert found[rest].exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert found[[0, 4]].tolist() == [-INF, -INF]
    others = found.isfinite()
    (gradient,) = torch.autograd.grad((found[others] * torch.arange(8)).sum(), values)
    assert gradient.isfinite().all()
    assert gradient[[0, 4]].tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(effective_sample_size(values, OWNERS, 5).sum(), values)
    assert gradient.isfinite().all()


def test_a_nan_stays_in_its_group() -> None:
    values = random_values(torch.float32)
    values[3] = math.nan
    found = group_log_softmax(values, OWNERS, 5)
    assert found.isnan().tolist() == (OWNERS == 2).tolist()


@pytest.mark.parametrize("function", [group_log_softmax, effective_sample_size])
def test_gradients_are_those_of_finite_differences(function: Callable[..., Tensor]) -> None:
    values = random_values(torch.float64, 1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: function(v, OWNERS, 5), values)


@BOTH
def test_effective_samples_are_all_of_equal_weight_and_one_of_a_lone_weight(
    dtype: torch.dtype,
) -> None:
    owners = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 4])
    values = torch.tensor([7, 7, 7, 7, 9000, 1, 2, 5, -INF, -3, -INF, -INF], dtype=dtype)
    found = effective_sample_size(values, owners, 6)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, [4, 1, 1, 1, 0, 0], rtol=1e-6)


def test_effective_samples_are_the_squared_sum_over_the_sum_of_squares() -> None:
    values = random_values(torch.float64)
    weights, owners = np.exp(values.numpy()), OWNERS.numpy()
    parts = [weights[owners == group] for group in (0, 2, 3, 4)]
    expected = [part.sum() ** 2 / (part**2).sum() for part in parts]
    found = effective_sample_size(values, OWNERS, 5)[[0, 2, 3, 4]]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
