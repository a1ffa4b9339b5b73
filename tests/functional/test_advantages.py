"""Advantages equal their definitions, and baselines leave the expected gradient alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from helpsteer2.functional.advantages import Whitening, gae, group_normalised, leave_one_out


def by_definition(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> list[float]:
    """Equation 16 of arXiv 1506.02438, written out for one response."""
    following = [*values[1:], 0.0]
    delta = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [
        sum((gamma * lam) ** (later - t) * delta[later] for later in range(t, len(delta)))
        for t in range(len(delta))
    ]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_gae_is_its_definition_for_responses_of_any_length(gamma: float, lam: float) -> None:
    rng = np.random.default_rng(0)
    lengths = np.array([5, 1, 0, 7, 1])
    rewards, values = rng.normal(size=(2, lengths.sum()))
    expected = []
    for start, n in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
        span = slice(start, start + n)
        if n:
            expected += by_definition(rewards[span], values[span], gamma, lam)
    found = gae(rewards, values, lengths, gamma=gamma, lam=lam)
    assert found == pytest.approx(np.array(expected), abs=1e-12)


def test_gae_with_lambda_1_is_reward_to_go_less_value_and_with_0_one_step() -> None:
    rewards, values = np.array([0.0, 0.0, 4.0, 1.0]), np.array([1.0, 2.0, 3.0, 5.0])
    whole = gae(rewards, values, [3, 1], gamma=1.0, lam=1.0)
    assert whole.tolist() == [3.0, 2.0, 1.0, -4.0]
    step = gae(rewards, values, [3, 1], gamma=1.0, lam=0.0)
    assert step.tolist() == [1.0, 1.0, 1.0, -4.0]


def test_gae_of_nothing_is_nothing_and_lengths_have_to_fit() -> None:
    assert gae([], [], [], gamma=1.0, lam=0.95).shape == (0,)
    with pytest.raises(ValueError, match=r"2 rewards and 2 values for 1 responses of 3 tokens"):
        gae([1, 2], [1, 2], [3], gamma=1.0, lam=0.95)


def whitened(*parts: np.ndarray) -> list[np.ndarray]:
    whitening = Whitening()
    for part in parts:
        whitening.add(part)
    return [whitening(part) for part in parts]


def test_whitened_values_have_mean_0_and_standard_deviation_1_however_they_come() -> None:
    values = np.random.default_rng(0).normal(3.0, 5.0, 1000)
    (found,) = whitened(values)
    assert (found.mean(), found.std()) == pytest.approx((0.0, 1.0), abs=1e-12)
    assert found == pytest.approx(whitened(7 * values - 2)[0])
    in_parts = whitened(values[:1], values[1:300], values[300:300], values[300:])
    assert np.concatenate(in_parts) == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e9])
def test_values_that_are_all_the_same_whiten_to_zeros(value: float) -> None:
    assert whitened(np.full(7, value))[0].tolist() == [0.0] * 7
    assert whitened(np.full(1, value))[0].tolist() == [0.0]
    assert whitened(np.array([]))[0].tolist() == []


def test_leaving_one_out_keeps_the_expected_gradient() -> None:
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    worth = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    p = logits.softmax(0)
    (truth,) = torch.autograd.grad(p @ worth, logits)
    # All triples that three samples can be, each with its probability.
    expected = torch.zeros(3, dtype=torch.float64)
    for drawn in itertools.product(range(3), repeat=3):
        picked = list(drawn)
        advantage = worth[picked] - torch.from_numpy(leave_one_out(worth[picked][None])[0])
        logp = logits.log_softmax(0)[picked]
        (gradient,) = torch.autograd.grad((advantage * logp).mean(), logits)
        expected += p[picked].prod().detach() * gradient
    assert torch.allclose(expected, truth, atol=1e-12)


def test_only_counted_rewards_stand_in_the_baseline_of_others() -> None:
    rewards = [[1.0, 2.0, 6.0], [1.0, 2.0, 6.0], [4.0, 5.0, 6.0]]
    counted = [[True, True, True], [True, True, False], [False, True, False]]
    found = leave_one_out(rewards, counted)
    assert found.tolist() == [[4.0, 3.5, 1.5], [2.0, 1.0, 1.5], [5.0, 5.0, 5.0]]


def test_group_normalisation_looks_at_order_and_distance_within_a_prompt_alone() -> None:
    rewards = np.random.default_rng(1).normal(size=(4, 5))
    found = group_normalised(rewards)
    assert found.mean(axis=1) == pytest.approx(np.zeros(4), abs=1e-12)
    assert found == pytest.approx(group_normalised(rewards + np.arange(4)[:, None] * 10), abs=1e-9)
    assert found == pytest.approx(group_normalised(100 * rewards), rel=1e-3)
    assert group_normalised([[2.0, 2.0]]).tolist() == [[0.0, 0.0]]


def test_group_normalisation_leaves_out_what_does_not_count() -> None:
    counted = np.array([[True, True, True, False], [True, False, False, False]])
    found = group_normalised([[1.0, 2.0, 6.0, 90.0], [3.0, 7.0, 8.0, 9.0]], counted)
    assert found[0, :3] == pytest.approx(group_normalised([[1.0, 2.0, 6.0]])[0])
    assert found[1].tolist() == [0.0] * 4
