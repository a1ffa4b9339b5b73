"""Losses on pairs, against numbers worked out by hand and against each other."""

from __future__ import annotations

import math
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from helpsteer2.losses.preference import (
    BradleyTerry,
    MarginBradleyTerry,
    ScaledBradleyTerry,
    decided,
)

LOSSES = (BradleyTerry(), MarginBradleyTerry(), ScaledBradleyTerry())
NAN = math.nan


def sample(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(n, generator=generator) * 2
    return difference, torch.randint(-3, 4, (n,), generator=generator).float()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # Response 2 better by strength 2 and ahead by ln 3: σ = 3/4.
        (BradleyTerry(), math.log(4 / 3)),
        # ln 3 − 2 = −0.901388: σ = 0.288764.
        (MarginBradleyTerry(), 1.242145),
        (ScaledBradleyTerry(), 2 * math.log(4 / 3)),
    ],
)
def test_hand_numbers(loss: BradleyTerry, expected: float) -> None:
    ahead = torch.tensor([math.log(3)])
    assert loss(ahead, torch.tensor([2.0]))[0].item() == pytest.approx(expected, rel=1e-5)
    # The same pair told the other way round: response 1 better and ahead.
    assert loss(-ahead, torch.tensor([-2.0]))[0].item() == pytest.approx(expected, rel=1e-5)


def test_equal_scores_cost_ln_2_times_what_the_loss_makes_of_the_strength() -> None:
    equal, strength = torch.zeros(3), torch.tensor([-1.0, 2.0, 3.0])
    assert BradleyTerry()(equal, strength)[0].item() == pytest.approx(3 * math.log(2))
    assert ScaledBradleyTerry()(equal, strength)[0].item() == pytest.approx(6 * math.log(2))
    margin = sum(math.log1p(math.exp(m)) for m in (1, 2, 3))
    assert MarginBradleyTerry()(equal, strength)[0].item() == pytest.approx(margin)


@pytest.mark.parametrize("loss", LOSSES)
def test_swapping_the_responses_and_the_sign_changes_nothing(loss: BradleyTerry) -> None:
    difference, strength = sample()
    total, sums = loss(difference, strength)
    swapped, swapped_sums = loss(-difference, -strength)
    assert total.item() == swapped.item()
    assert all(torch.equal(sums[key], swapped_sums[key]) for key in sums)
    # And the sign alone does matter.
    assert loss(difference, -strength)[0].item() != pytest.approx(total.item())


def test_scaled_is_the_pair_repeated_as_often_as_it_is_strong() -> None:
    difference, strength = sample()
    difference.requires_grad_()
    scaled, _ = ScaledBradleyTerry()(difference, strength)
    (of_scaled,) = torch.autograd.grad(scaled, difference)
    times = strength.abs().long()
    repeated, _ = BradleyTerry()(
        difference.repeat_interleave(times), strength.repeat_interleave(times)
    )
    (of_repeated,) = torch.autograd.grad(repeated, difference)
    assert scaled.item() == pytest.approx(repeated.item(), rel=1e-6)
    assert torch.allclose(of_scaled, of_repeated, rtol=1e-6)
    # But it is divided by the pairs, not by the repetitions.
    assert ScaledBradleyTerry().count(strength) == (strength != 0).sum()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_raises_the_preferred_response(loss: BradleyTerry) -> None:
    first, second = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    strength = torch.tensor([-3.0, -1.0, 1.0, 2.0])
    loss(second - first, strength)[0].backward()
    assert first.grad is not None
    assert second.grad is not None
    # Descending the gradient raises the score of the better one and lowers the other as much.
    assert torch.equal(-second.grad.sign(), strength.sign())
    assert torch.equal(-first.grad, second.grad)


def test_stronger_preferences_pull_harder_under_margin_and_scaled_alone() -> None:
    strength = torch.tensor([1.0, 2.0, 3.0])
    pulls = []
    for loss in LOSSES:
        difference = torch.zeros(3, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(difference, strength)[0], difference)
        pulls.append((-gradient).tolist())
    plain, margin, scaled = pulls
    assert plain == pytest.approx([0.5] * 3)
    assert margin == pytest.approx([1 / (1 + math.exp(-m)) for m in (1, 2, 3)])
    assert scaled == pytest.approx([0.5, 1.0, 1.5])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("undecided", [0.0, NAN])
def test_undecided_pairs_weigh_nothing_and_have_no_gradient(
    loss: BradleyTerry, undecided: float
) -> None:
    difference = torch.tensor([0.3, NAN if math.isnan(undecided) else 5.0], requires_grad=True)
    strength = torch.tensor([1.0, undecided])
    total, sums = loss(difference, strength)
    alone, _ = loss(difference[:1].detach(), strength[:1])
    assert total.item() == alone.item()
    assert (sums["won"].item(), sums["decided"].item()) == (1, 1)
    assert loss.count(strength).item() == 1
    total.backward()
    assert difference.grad is not None
    assert difference.grad[1].item() == 0
    assert decided(strength).tolist() == [True, False]


def test_a_tie_of_scores_is_no_win() -> None:
    _, sums = BradleyTerry()(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([1.0, 1.0, -2.0]))
    assert sums["won"].item() == 1
    assert sums["decided"].item() == 3


def test_nothing_decided_is_zero_with_a_zero_gradient() -> None:
    difference = torch.randn(2, requires_grad=True)
    for loss in LOSSES:
        total, _ = loss(difference, torch.tensor([0.0, NAN]))
        assert total.item() == 0
        assert torch.equal(torch.autograd.grad(total, difference)[0], torch.zeros(2))


@pytest.mark.parametrize("loss", LOSSES)
def test_cutting_a_batch_changes_neither_sum_nor_count(loss: BradleyTerry) -> None:
    difference, strength = sample()
    parts = list(zip(difference.split(7), strength.split(7), strict=True))
    total = sum(loss(d, s)[0].item() for d, s in parts)
    assert total == pytest.approx(loss(difference, strength)[0].item(), rel=1e-6)
    assert sum(loss.count(s).item() for _, s in parts) == loss.count(strength).item()


@pytest.mark.parametrize("loss", LOSSES)
def test_fp32_under_autocast_and_finite_far_out(loss: BradleyTerry) -> None:
    difference = torch.tensor([-2000.0, 2000.0, 0.5], dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = loss(difference, torch.tensor([1.0, 1.0, 1.0]))
    assert total.dtype == torch.float32
    assert 1990 < total.item() < 2010
    total.backward()
    assert difference.grad is not None
    assert torch.isfinite(difference.grad).all()


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(2,\)"):
        BradleyTerry()(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize(("loss", "margins"), [(LOSSES[0], False), (LOSSES[1], True)])
def test_the_loss_of_trl(loss: BradleyTerry, margins: bool) -> None:
    """TRL's RewardTrainer on the same scores: its method run on a model that only looks them up."""
    trl = pytest.importorskip("trl")
    difference, strength = sample()
    kept = strength != 0
    difference, strength = difference[kept], strength[kept]
    second = torch.randn(len(difference), generator=torch.Generator().manual_seed(1))
    first = second - difference
    better = torch.where(strength > 0, second, first)
    worse = torch.where(strength > 0, first, second)
    scores = torch.cat([better, worse])
    inputs = {"input_ids": torch.zeros(len(scores), 1)}
    if margins:
        inputs["margin"] = strength.abs()
    trainer = MagicMock()
    trainer.model.training = False
    trainer.args.center_rewards_coefficient = None
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda value: value

    def model(**inputs: object) -> SimpleNamespace:
        return SimpleNamespace(logits=scores[:, None])

    theirs = trl.RewardTrainer.compute_loss(trainer, model, inputs)
    ours, sums = loss(difference, strength)
    assert (ours / loss.count(strength)).item() == pytest.approx(theirs.item(), rel=1e-6)
    accuracy = (better > worse).float().mean().item()
    assert (sums["won"] / sums["decided"]).item() == pytest.approx(accuracy)
