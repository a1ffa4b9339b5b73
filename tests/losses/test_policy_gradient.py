"""Policy gradients: exact ones of an enumerable policy, TRL's formulas, and what must not count."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from helpsteer2.data.tokens import RolloutTokens
from helpsteer2.errors import UserError
from helpsteer2.losses.policy_gradient import ClippedLoss, PolicyGradientLoss

from .enumerable import (
    RESPONSES,
    STATES,
    STRINGS,
    all_strings,
    probabilities,
    random_rollout,
    random_table,
    spoiled,
    spoiled_rollout,
    token_logprobs,
    tokens_of,
)

LOSSES = (PolicyGradientLoss(), ClippedLoss())
REWARDS = torch.linspace(-1, 2, len(STRINGS), dtype=torch.float64).sin()


def gradient_of(loss: PolicyGradientLoss, logprobs: Tensor, rollout: RolloutTokens) -> Tensor:
    """Gradient of the loss sum by the log-probability of each token."""
    leaf = logprobs.detach().clone().requires_grad_()
    responses = torch.zeros(len(leaf), dtype=torch.int64)
    return torch.autograd.grad(loss(tokens_of(leaf, responses), rollout)[0], leaf)[0]


def expected_gradient(loss: PolicyGradientLoss, table: Tensor, advantages: Tensor) -> Tensor:
    """Mean loss gradient over all responses, each as often as the policy gives it.

    The losses are linear in the advantages, so the probabilities can go there.
    """
    weights = probabilities(table)[RESPONSES]
    rollout = all_strings(table, table, weights * advantages)
    leaf = table.clone().requires_grad_()
    total, _ = loss(tokens_of(token_logprobs(leaf), RESPONSES), rollout)
    return torch.autograd.grad(total, leaf)[0]


def expected_reward(table: Tensor) -> float:
    return float((probabilities(table) * REWARDS).sum())


def finite_difference(function: Callable[[Tensor], float], table: Tensor) -> Tensor:
    steps = 1e-5 * torch.eye(table.numel(), dtype=torch.float64).reshape(-1, *table.shape)
    slopes = [(function(table + step) - function(table - step)) / 2e-5 for step in steps]
    return torch.tensor(slopes, dtype=torch.float64).reshape(table.shape)


def test_the_enumerable_policy_is_one() -> None:
    assert len(STRINGS) == 15
    assert len(STATES) == 41
    assert probabilities(random_table(0)).sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_expected_step_climbs_the_expected_reward(loss: PolicyGradientLoss) -> None:
    table = random_table(1)
    slope = finite_difference(expected_reward, table)
    ours = expected_gradient(loss, table, REWARDS[RESPONSES])
    torch.testing.assert_close(-ours, slope, rtol=1e-6, atol=1e-9)
    assert slope.abs().max() > 0.05


@pytest.mark.parametrize("loss", LOSSES)
def test_a_baseline_changes_nothing_in_expectation(loss: PolicyGradientLoss) -> None:
    table = random_table(2)
    rewards = REWARDS[RESPONSES]
    plain = expected_gradient(loss, table, rewards)
    torch.testing.assert_close(expected_gradient(loss, table, rewards - 7.0), plain)
    # Nor does one that knows what has been said before the token, as a critic's does.
    values = torch.linspace(-3, 3, int(STATES.max()) + 1, dtype=torch.float64)
    torch.testing.assert_close(expected_gradient(loss, table, rewards - values[STATES]), plain)
    # One that knows the token itself does.
    token = token_logprobs(table)
    assert not torch.allclose(expected_gradient(loss, table, rewards - token), plain, atol=1e-3)


@pytest.mark.parametrize("average", ["tokens", "responses"])
def test_at_ratio_one_the_clipped_gradient_is_that_of_reinforce(average: str) -> None:
    _, responses, rollout = random_rollout()
    clipped, plain = ClippedLoss(average=average), PolicyGradientLoss(average)
    ours = gradient_of(clipped, rollout.logprobs, rollout)
    assert torch.equal(ours, gradient_of(plain, rollout.logprobs, rollout))
    assert torch.equal(ours, -torch.where(rollout.counted, rollout.advantages, 0.0))
    assert clipped.count(rollout, responses) == plain.count(rollout, responses)


def test_counts_are_of_counted_tokens_and_of_their_responses() -> None:
    _, responses, rollout = random_rollout((5, 1, 7, 3, 4))
    tokens, several = PolicyGradientLoss("tokens"), PolicyGradientLoss("responses")
    assert tokens.count(rollout, responses).dtype == several.count(rollout, responses).dtype
    assert tokens.count(rollout, responses).item() == 5 + 7 + 4
    assert several.count(rollout, responses).item() == 3
    nothing = replace(rollout, counted=torch.zeros_like(rollout.counted))
    assert tokens.count(nothing, responses).item() == several.count(nothing, responses).item() == 0
    one = replace(rollout, counted=torch.arange(len(responses)) == 8)
    assert several.count(one, responses).item() == 1
    assert several.count(one, responses).dtype == torch.int64


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (2.0, 1.1, -2.2, -2.2),  # d r / d log π = r
        (2.0, 1.5, -2.4, 0.0),  # further than the range: held
        (2.0, 0.5, -1.0, -1.0),  # gone the wrong way: pulled back
        (-2.0, 0.5, 1.6, 0.0),
        (-2.0, 1.5, 3.0, 3.0),
        (0.0, 9.0, 0.0, 0.0),
    ],
)
def test_hand_numbers(advantage: float, ratio: float, loss: float, slope: float) -> None:
    logprobs = torch.tensor([math.log(ratio) - 1.0])
    rollout = RolloutTokens(
        torch.tensor([-1.0]), torch.zeros(1), torch.tensor([advantage]), torch.tensor([True])
    )
    total, sums = ClippedLoss(0.2)(tokens_of(logprobs, torch.zeros(1, dtype=int)), rollout)
    assert total.item() == pytest.approx(loss, abs=1e-6)
    found = gradient_of(ClippedLoss(0.2), logprobs, rollout).item()
    assert found == pytest.approx(slope, abs=1e-6)
    assert sums["clipped"].item() == (slope == 0 and advantage != 0)
    assert sums["ratio"].item() == pytest.approx(ratio, rel=1e-6)


def test_the_clipped_tokens_are_those_without_a_gradient() -> None:
    logprobs, responses, rollout = random_rollout((400, 30, 700))
    loss = ClippedLoss(0.1, clip_high=0.4)
    sums = loss(tokens_of(logprobs, responses), rollout)[1]
    silent = rollout.counted & (gradient_of(loss, logprobs, rollout) == 0)
    assert sums["clipped"].item() == silent.sum().item()
    ratio, up = (logprobs - rollout.logprobs).exp(), rollout.advantages > 0
    outside = torch.where(up, ratio > 1.4, ratio < 0.9)
    assert torch.equal(silent, rollout.counted & outside)
    assert silent[up].any()
    assert silent[~up].any()
    # A wider range on one side stops fewer tokens.
    narrow = ClippedLoss(0.1)(tokens_of(logprobs, responses), rollout)[1]
    assert narrow["clipped"] > sums["clipped"]


def test_loss_gradient_and_share_clipped_are_those_of_trl() -> None:
    """``PPOTrainer.train`` of TRL 1.12, trl/experimental/ppo/ppo_trainer.py, on padded rows."""
    lengths = (5, 1, 7, 3, 4)
    logprobs, responses, rollout = random_rollout(lengths)
    rollout = replace(rollout, counted=torch.ones(20, dtype=torch.bool))

    def padded(values: Tensor, filling: float) -> Tensor:
        return pad_sequence(list(values.split(lengths)), True, filling)

    mask = padded(rollout.counted, False)
    leaf = logprobs.clone().requires_grad_()
    invalid = 1.0  # INVALID_LOGPROB, for both policies
    ratio = torch.exp(padded(leaf, invalid) - padded(rollout.logprobs, invalid))
    advantages = padded(rollout.advantages, 0.0)
    pg_losses = -advantages * ratio
    pg_losses2 = -advantages * torch.clamp(ratio, 1.0 - 0.2, 1.0 + 0.2)

    def masked_mean(values: Tensor) -> Tensor:
        return (values * mask).sum() / mask.sum()

    theirs = masked_mean(torch.max(pg_losses, pg_losses2))
    share = masked_mean((pg_losses2 > pg_losses).float())

    loss = ClippedLoss(0.2)
    count = loss.count(rollout, responses)
    total, sums = loss(tokens_of(logprobs, responses), rollout)
    torch.testing.assert_close(total / count, theirs)
    torch.testing.assert_close(
        gradient_of(loss, logprobs, rollout) / count, torch.autograd.grad(theirs, leaf)[0]
    )
    assert sums["clipped"] / sums["tokens"] == share > 0


@pytest.mark.parametrize("loss", [*LOSSES, PolicyGradientLoss(entropy=0.5), ClippedLoss(entropy=1)])
def test_tokens_that_do_not_count_leak_nothing(loss: PolicyGradientLoss) -> None:
    logprobs, responses, rollout = random_rollout()
    counted, entropy = rollout.counted, logprobs.abs()

    def result(
        logprobs: Tensor, entropy: Tensor, responses: Tensor, rollout: RolloutTokens
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        leaves = [values.clone().requires_grad_() for values in (logprobs, entropy)]
        total, sums = loss(tokens_of(leaves[0], responses, leaves[1]), rollout)
        grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return total.detach(), sums, torch.stack(grads)

    total, sums, gradient = result(
        spoiled(logprobs, counted), spoiled(entropy, counted), responses, spoiled_rollout(rollout)
    )
    assert (gradient[:, ~counted] == 0).all()
    alone = rollout.map(lambda column: column[counted])
    expected = result(logprobs[counted], entropy[counted], responses[counted], alone)
    torch.testing.assert_close((total, sums, gradient[:, counted]), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_filler_weighs_nothing_but_has_gradients(loss: PolicyGradientLoss) -> None:
    logprobs, responses, rollout = random_rollout()
    rollout = replace(rollout, counted=torch.zeros_like(rollout.counted))
    leaf = logprobs.clone().requires_grad_()
    total, sums = loss(tokens_of(leaf, responses), rollout)
    total.backward()  # the ranks wait for each other's gradients
    assert total == 0
    assert all(value == 0 for value in sums.values())
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_an_entropy_bonus_pulls_the_entropy_of_counted_tokens_up() -> None:
    logprobs, responses, rollout = random_rollout()
    entropy = logprobs.abs().requires_grad_()
    without, _ = ClippedLoss()(tokens_of(logprobs, responses, entropy), rollout)
    total, sums = ClippedLoss(entropy=0.25)(tokens_of(logprobs, responses, entropy), rollout)
    assert (without - total).item() == pytest.approx(0.25 * sums["entropy"].item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(total, entropy)
    assert torch.equal(gradient, -0.25 * rollout.counted)
    assert sums["entropy"].item() == pytest.approx(entropy[rollout.counted].sum().item(), rel=1e-6)
    with pytest.raises(ValueError, match="entropy"):
        ClippedLoss(entropy=0.25)(tokens_of(logprobs, responses), rollout)


def test_sums_are_exact_means_over_a_sample_that_is_exact() -> None:
    """Four tokens as the old policy gives them: 0 twice as often as 1 and 2."""
    choices = torch.tensor([0, 0, 1, 2])
    old = torch.tensor([0.5, 0.25, 0.25])
    new = torch.tensor([0.3, 0.6, 0.1])
    rollout = RolloutTokens(
        old.log()[choices], torch.zeros(4), torch.ones(4), torch.ones(4, dtype=torch.bool)
    )
    for loss in LOSSES:
        _, sums = loss(tokens_of(new.log()[choices], torch.arange(4)), rollout)
        assert sums["ratio"].item() / 4 == pytest.approx(1, abs=1e-6)
        divergence = (old * (old / new).log()).sum().item()
        assert sums["approx_kl"].item() / 4 == pytest.approx(divergence, abs=1e-6)
        # Where the policy has not moved, −log π is the entropy on average.
        _, sums = loss(tokens_of(old.log()[choices], torch.arange(4)), rollout)
        assert sums["entropy"].item() / 4 == pytest.approx(1.5 * math.log(2), abs=1e-6)
        assert sums["approx_kl"].item() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_changes_nothing(loss: PolicyGradientLoss) -> None:
    logprobs, responses, rollout = random_rollout()
    total, sums = loss(tokens_of(logprobs, responses), rollout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, under_sums = loss(tokens_of(logprobs, responses), rollout)
    assert under.dtype == torch.float32
    assert torch.equal(under, total)
    assert all(value.dtype == torch.float32 for value in under_sums.values())
    assert all(torch.equal(under_sums[name], value) for name, value in sums.items())
    assert not any(value.requires_grad for value in under_sums.values())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ClippedLoss(0.0), "module.loss.clip"),
        (lambda: ClippedLoss(1.0), "module.loss.clip"),
        (lambda: ClippedLoss(math.nan), "module.loss.clip"),
        (lambda: ClippedLoss(0.2, 0.0), "module.loss.clip_high"),
        (lambda: ClippedLoss(0.2, math.inf), "module.loss.clip_high"),
        (lambda: ClippedLoss(average="token"), "module.loss.average"),
        (lambda: PolicyGradientLoss("all"), "module.loss.average"),
        (lambda: PolicyGradientLoss(entropy=-0.1), "module.loss.entropy"),
        (lambda: ClippedLoss(entropy=math.nan), "module.loss.entropy"),
    ],
)
def test_what_is_out_of_range_is_refused(make: Callable[[], object], name: str) -> None:
    with pytest.raises(UserError, match=name + " has"):
        make()
