"""The critic's loss, against TRL's formulas and worked-out numbers, and what must not count."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from helpsteer2.data.tokens import RolloutTokens
from helpsteer2.errors import UserError
from helpsteer2.losses.value import ValueLoss, explained_variance

from .enumerable import random_rollout, spoiled, spoiled_rollout

LOSSES = (ValueLoss(), ValueLoss(0.5), ValueLoss(None))


def new_values(rollout: RolloutTokens[Tensor], seed: int = 1) -> Tensor:
    """What the critic says after some steps."""
    generator = torch.Generator().manual_seed(seed)
    return rollout.values + 0.4 * torch.randn(len(rollout.values), generator=generator)


def gradient_of(loss: ValueLoss, values: Tensor, rollout: RolloutTokens[Tensor]) -> Tensor:
    leaf = values.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, rollout)[0], leaf)[0]


def test_loss_gradient_and_share_clipped_are_those_of_trl() -> None:
    """``PPOTrainer.train`` of TRL 1.12, trl/experimental/ppo/ppo_trainer.py, on padded rows."""
    lengths = (5, 1, 7, 3, 4)
    _, _, rollout = random_rollout(lengths)
    rollout = replace(rollout, counted=torch.ones(20, dtype=torch.bool))

    def padded(values: Tensor) -> Tensor:
        return pad_sequence(list(values.split(lengths)), True)

    mask = padded(rollout.counted)
    leaf = new_values(rollout).requires_grad_()
    vpred, values, returns = map(padded, (leaf, rollout.values, rollout.returns))
    clipped = torch.clamp(vpred, values - 0.2, values + 0.2)
    vf_losses1, vf_losses2 = torch.square(vpred - returns), torch.square(clipped - returns)

    def masked_mean(values: Tensor) -> Tensor:
        return (values * mask).sum() / mask.sum()

    theirs = 0.5 * masked_mean(torch.max(vf_losses1, vf_losses2))
    share = masked_mean((vf_losses2 > vf_losses1).float())

    loss = ValueLoss(0.2)
    total, sums = loss(new_values(rollout), rollout)
    count = loss.count(rollout)
    torch.testing.assert_close(total / count, theirs)
    ours = gradient_of(loss, new_values(rollout), rollout) / count
    torch.testing.assert_close(ours, torch.autograd.grad(theirs, leaf)[0])
    assert sums["clipped"] / sums["tokens"] == share > 0


@pytest.mark.parametrize(
    ("clip", "value", "loss", "slope"),
    [
        # The old value is 1, the return 2.
        (0.25, 1.125, 0.3828125, -0.875),
        (0.25, 1.75, 0.28125, 0.0),  # as if it were 1.25
        (0.25, 0.5, 1.125, -1.5),  # gone the wrong way: pulled back
        (0.25, 4.0, 2.0, 2.0),  # gone too far: pulled back
        (None, 1.75, 0.03125, -0.25),
    ],
)
def test_hand_numbers(clip: float | None, value: float, loss: float, slope: float) -> None:
    one, counted = torch.ones(1), torch.tensor([True])
    rollout = RolloutTokens(one, one, one, counted, values=one, returns=2 * one)
    total, sums = ValueLoss(clip)(torch.tensor([value]), rollout)
    assert total.item() == loss
    assert gradient_of(ValueLoss(clip), torch.tensor([value]), rollout).item() == slope
    assert sums["clipped"].item() == (slope == 0)
    assert sums["squared_error"].item() == (value - 2) ** 2


def test_the_clipped_tokens_are_those_without_a_gradient() -> None:
    _, _, rollout = random_rollout((400, 30, 700))
    values = new_values(rollout)
    sums = ValueLoss(0.2)(values, rollout)[1]
    silent = rollout.counted & (gradient_of(ValueLoss(0.2), values, rollout) == 0)
    assert sums["clipped"].item() == silent.sum().item() > 100
    moved = (values - rollout.values).abs()
    assert (moved[silent] > 0.2).all()
    # Values within the range are learned as if there were no clipping, to the last bit.
    within = moved < 0.2
    plain = gradient_of(ValueLoss(None), values, rollout)
    assert torch.equal(gradient_of(ValueLoss(0.2), values, rollout)[within], plain[within])
    assert ValueLoss(None)(values, rollout)[1]["clipped"] == 0
    small = values / 1000  # new − old is rounded
    wide = ValueLoss(1e3)(small, rollout)
    assert wide[1]["clipped"] == 0
    assert wide[0] == ValueLoss(None)(small, rollout)[0]


@pytest.mark.parametrize("loss", LOSSES)
def test_tokens_that_do_not_count_leak_nothing(loss: ValueLoss) -> None:
    _, _, rollout = random_rollout()
    counted, values = rollout.counted, new_values(rollout)
    alone = rollout.map(lambda column: column[counted])
    wild, wild_rollout = spoiled(values, counted), spoiled_rollout(rollout)
    torch.testing.assert_close(loss(wild, wild_rollout), loss(values[counted], alone))
    gradient = gradient_of(loss, wild, wild_rollout)
    assert (gradient[~counted] == 0).all()
    assert torch.equal(gradient[counted], gradient_of(loss, values[counted], alone))
    assert loss.count(rollout) == loss(values, rollout)[1]["tokens"] == counted.sum()
    assert loss.count(rollout).dtype == torch.int64
    filler = replace(wild_rollout, counted=torch.zeros_like(counted))
    total, sums = loss(wild, filler)
    assert total == loss.count(filler) == 0
    assert all(value == 0 for value in sums.values())
    assert (gradient_of(loss, wild, filler) == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_changes_nothing(loss: ValueLoss) -> None:
    _, _, rollout = random_rollout()
    values = new_values(rollout).requires_grad_()
    total, sums = loss(values, rollout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, under_sums = loss(values, rollout)
    assert torch.equal(under, total)
    assert under.dtype == torch.float32
    for name, value in under_sums.items():
        assert value.dtype == torch.float32
        assert not value.requires_grad
        assert torch.equal(value, sums[name])


def test_explained_variance() -> None:
    _, _, rollout = random_rollout((300, 20, 500))
    rollout = replace(rollout, returns=rollout.returns + 3)
    counted, returns = rollout.counted, rollout.returns

    def explained(values: Tensor, rows: RolloutTokens[Tensor] = rollout) -> float:
        parts = [rows.map(lambda column, use=use: column[use]) for use in halves]
        sums = [ValueLoss()(values[use], part)[1] for use, part in zip(halves, parts, strict=True)]
        return explained_variance({name: float(sum(s[name] for s in sums)) for name in sums[0]})

    halves = (slice(0, 350), slice(350, None))  # micro-batches
    mean = returns[counted].mean().expand(len(returns))
    assert explained(returns) == pytest.approx(1, abs=1e-6)
    assert explained(mean) == pytest.approx(0, abs=1e-4)
    assert explained(mean + 5) < -1
    values = new_values(rollout)
    r, v = (tensor[counted].double().numpy() for tensor in (returns, values))
    assert explained(values) == pytest.approx(1 - np.square(r - v).mean() / r.var(), abs=1e-4)
    same = replace(rollout, returns=torch.full_like(returns, 2.3))
    assert math.isnan(explained(values, same))


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf])
def test_a_clip_that_is_no_range_is_refused(clip: float) -> None:
    with pytest.raises(UserError, match=r"module\.value_loss\.clip has"):
        ValueLoss(clip)


@pytest.mark.parametrize("missing", ["values", "returns"])
def test_rollouts_without_a_critic_are_refused(missing: str) -> None:
    _, _, rollout = random_rollout()
    with pytest.raises(ValueError, match="without a critic"):
        ValueLoss()(torch.zeros(20), replace(rollout, **{missing: None}))
