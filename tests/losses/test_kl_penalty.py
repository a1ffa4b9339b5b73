"""KL penalties: which divergence each of them descends, in expectations that are exact."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from helpsteer2.errors import UserError
from helpsteer2.functional.kl import KLEstimator
from helpsteer2.losses.kl_penalty import KLPenalty
from helpsteer2.losses.policy_gradient import PolicyGradientLoss

from .enumerable import (
    LENGTHS,
    LONGEST,
    RESPONSES,
    STATES,
    VOCABULARY,
    all_strings,
    by_response,
    probabilities,
    random_rollout,
    random_table,
    reward_to_go,
    spoiled,
    spoiled_rollout,
    token_logprobs,
    tokens_of,
)

TABLE, REFERENCE = random_table(1), random_table(2)
ESTIMATORS = get_args(KLEstimator)


def in_the_loss(estimator: KLEstimator, **options: Any) -> KLPenalty:
    return KLPenalty(estimator=estimator, place="loss", **options)


def expected_gradient(penalty: KLPenalty) -> Tensor:
    """Mean gradient of a response's penalty in the loss, over responses of the policy."""
    rollout = all_strings(TABLE, REFERENCE, torch.zeros(len(STATES)))
    leaf = TABLE.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for response, weight in enumerate(probabilities(TABLE)):
        only = replace(rollout, counted=response == RESPONSES)
        cost, _ = penalty.loss_sum(tokens_of(token_logprobs(leaf), RESPONSES), only)
        total = total + weight * cost
    return torch.autograd.grad(total, leaf)[0]


def visits() -> Tensor:
    """How often the policy comes to each state; a constant."""
    frequency = torch.zeros(len(TABLE), dtype=torch.float64)
    return frequency.index_add(0, STATES, probabilities(TABLE)[RESPONSES])


def gradient_of(divergence: Any) -> Tensor:
    """Gradient of a divergence of the two distributions at each state, by visits."""
    leaf = TABLE.clone().requires_grad_()
    pi, ref = leaf.softmax(dim=1), REFERENCE.softmax(dim=1)
    return torch.autograd.grad((visits() * divergence(pi, ref).sum(dim=1)).sum(), leaf)[0]


def forward_kl(pi: Tensor, ref: Tensor) -> Tensor:
    return pi * (pi / ref).log()


def sequence_kl_gradient() -> Tensor:
    """Gradient of KL(π ‖ π_ref) of whole responses."""
    leaf = TABLE.clone().requires_grad_()
    p, log_ratio = probabilities(leaf), token_logprobs(leaf) - token_logprobs(REFERENCE)
    return torch.autograd.grad((p * by_response(log_ratio)).sum(), leaf)[0]


@pytest.mark.parametrize(
    ("estimator", "divergence"),
    [
        ("k2", forward_kl),
        ("k3", lambda pi, ref: forward_kl(ref, pi)),
        ("abs", lambda pi, ref: (pi - ref).abs()),
    ],
)
def test_in_the_loss_each_estimator_descends_its_own_divergence(
    estimator: KLEstimator, divergence: Any
) -> None:
    ours = expected_gradient(in_the_loss(estimator))
    torch.testing.assert_close(ours, gradient_of(divergence), rtol=1e-6, atol=1e-9)
    # The three are not the same, and none is that of whole responses: in the loss no token answers
    # for where it leads.
    if estimator != "k2":
        assert not torch.allclose(ours, gradient_of(forward_kl), atol=1e-2)
    assert not torch.allclose(ours, sequence_kl_gradient(), atol=1e-2)


def test_at_the_last_token_k2_descends_the_divergence_of_whole_responses() -> None:
    places = reward_to_go(torch.ones(len(STATES)))  # tokens to come, itself with them
    deepest = STATES[(LENGTHS[RESPONSES] == LONGEST) & (places == 1)].unique()
    assert len(deepest) == (VOCABULARY - 1) ** (LONGEST - 1)
    ours = expected_gradient(in_the_loss("k2"))
    torch.testing.assert_close(ours[deepest], sequence_kl_gradient()[deepest])


def test_k1_in_the_loss_would_have_no_gradient_in_expectation() -> None:
    refused = in_the_loss("k2")
    object.__setattr__(refused, "estimator", "k1")
    assert expected_gradient(refused).abs().max() < 1e-12
    with pytest.raises(UserError, match=r"module\.kl\.estimator=k1 .* gradient is 0"):
        in_the_loss("k1")


def test_in_the_reward_k1_descends_the_divergence_of_whole_responses() -> None:
    log_ratio = (token_logprobs(TABLE) - token_logprobs(REFERENCE)).numpy()
    penalties = torch.from_numpy(KLPenalty().token_penalties(log_ratio, LENGTHS.numpy()))
    weights = probabilities(TABLE)[RESPONSES]
    rollout = all_strings(TABLE, REFERENCE, -weights * reward_to_go(penalties))
    leaf = TABLE.clone().requires_grad_()
    loss, _ = PolicyGradientLoss()(tokens_of(token_logprobs(leaf), RESPONSES), rollout)
    (ours,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(ours, sequence_kl_gradient(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_penalty_of_a_response_is_a_sum_or_a_mean_over_its_tokens(
    estimator: KLEstimator,
) -> None:
    lengths = (3, 0, 1, 4)
    log_ratio = np.array([0.5, -1.0, 2.0, 0.25, -0.5, 0.0, 1.5, -2.0])
    estimate = {
        "k1": log_ratio,
        "k2": log_ratio**2 / 2,
        "k3": np.exp(-log_ratio) - 1 + log_ratio,
        "abs": np.abs(log_ratio),
    }[estimator]
    borders = np.cumsum(lengths)[:-1]
    responses = np.split(estimate, borders)
    for reduction, scale in (("sum", 1), ("mean", np.maximum(lengths, 1))):
        penalty = KLPenalty(5.0, estimator, reduction)  # the coefficient stays out
        found = penalty.token_penalties(log_ratio, lengths)
        assert found.dtype == np.float64
        sums = [part.sum() for part in np.split(found, borders)]
        np.testing.assert_allclose(sums, np.array([r.sum() for r in responses]) / scale)
    with pytest.raises(ValueError, match="8 log-ratios for responses of 7 tokens"):
        KLPenalty().token_penalties(log_ratio, [3, 4])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("estimator", ["k2", "k3", "abs"])
def test_loss_and_reward_know_the_same_penalty(estimator: KLEstimator, reduction: Any) -> None:
    lengths = (5, 1, 7, 3, 4)
    logprobs, responses, rollout = random_rollout(lengths)
    penalty = in_the_loss(estimator, reduction=reduction)
    total, sums = penalty.loss_sum(tokens_of(logprobs, responses), rollout)
    log_ratio = (logprobs - rollout.ref_logprobs).double()
    counted = rollout.counted
    per_token = penalty.token_penalties(log_ratio.numpy(), lengths)
    assert total.item() == pytest.approx(per_token[counted.numpy()].sum(), rel=1e-5)
    assert sums["k1"].item() == pytest.approx(log_ratio[counted].sum().item(), rel=1e-5)
    k3 = KLPenalty(estimator="k3").token_penalties(log_ratio.numpy(), lengths)
    assert sums["k3"].item() == pytest.approx(k3[counted.numpy()].sum(), rel=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("estimator", ["k2", "k3", "abs"])
def test_tokens_that_do_not_count_leak_nothing(estimator: KLEstimator, reduction: Any) -> None:
    logprobs, responses, rollout = random_rollout()
    penalty, counted = in_the_loss(estimator, reduction=reduction), rollout.counted
    leaf = spoiled(logprobs, counted).requires_grad_()
    total, sums = penalty.loss_sum(tokens_of(leaf, responses), spoiled_rollout(rollout))
    clean = logprobs.clone().requires_grad_()
    expected, expected_sums = penalty.loss_sum(tokens_of(clean, responses), rollout)
    torch.testing.assert_close((total, sums), (expected, expected_sums))
    (gradient,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, clean)[0])
    assert (gradient[~counted] == 0).all()
    assert (gradient[counted] != 0).all()
    filler = replace(spoiled_rollout(rollout), counted=torch.zeros_like(counted))
    nothing, sums = penalty.loss_sum(tokens_of(leaf, responses), filler)
    assert nothing == sums["k1"] == sums["k3"] == 0
    assert (torch.autograd.grad(nothing, leaf)[0] == 0).all()


def test_autocast_changes_nothing() -> None:
    logprobs, responses, rollout = random_rollout()
    penalty = in_the_loss("k3", reduction="mean")
    total, sums = penalty.loss_sum(tokens_of(logprobs, responses), rollout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, under_sums = penalty.loss_sum(tokens_of(logprobs, responses), rollout)
    assert total.dtype == under.dtype == torch.float32
    assert torch.equal(total, under)
    assert all(torch.equal(under_sums[name], value) for name, value in sums.items())


def test_an_adaptive_coefficient_follows_the_published_controller() -> None:
    """``AdaptiveKLController`` of TRL 0.11: value *= 1 + clip(kl/target − 1, ±0.2) · n/horizon."""
    penalty = KLPenalty(0.1, target=6.0, horizon=1000)
    kls = np.linspace(-2, 20, 45)
    found = np.array([penalty.next_coefficient(0.1, kl, 256) for kl in kls])
    expected = 0.1 * (1 + np.clip(kls / 6 - 1, -0.2, 0.2) * 256 / 1000)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert (np.diff(found) >= 0).all()
    assert penalty.next_coefficient(0.1, 6.0, 256) == 0.1
    assert penalty.next_coefficient(0.1, 4.0, 256) < 0.1 < penalty.next_coefficient(0.1, 7.0, 256)
    # However large the iteration, it stays a coefficient.
    assert penalty.next_coefficient(0.1, 0.0, 10**6) == pytest.approx(0.08)
    assert KLPenalty(0.1).next_coefficient(0.1, 50.0, 256) == 0.1
    # A divergence that is no number shall not pass for a large one.
    assert math.isnan(penalty.next_coefficient(0.1, math.nan, 256))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficient": -0.1}, "coefficient has"),
        ({"coefficient": math.nan}, "coefficient has"),
        ({"coefficient": math.inf}, "coefficient has"),
        ({"estimator": "k4"}, "estimator has to be one of k1, k2, k3, abs"),
        ({"reduction": "max"}, "reduction has to be one of sum, mean"),
        ({"place": "both"}, "place has to be one of reward, loss"),
        ({"target": 0.0}, "target has"),
        ({"target": math.nan}, "target has"),
        ({"horizon": 0}, "horizon has"),
        ({"coefficient": 0.0, "target": 6.0}, "target adapts module.kl.coefficient by a factor"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"module\.kl\." + message):
        KLPenalty(**options)
