"""DPO and its kin, against numbers worked out by hand, TRL's and NeMo's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from helpsteer2.errors import UserError
from helpsteer2.losses.dpo import (
    DPOLoss,
    HingeDPOLoss,
    IPOLoss,
    MarginDPOLoss,
    PairLogprobs,
    RobustDPOLoss,
    ScaledDPOLoss,
    SmoothedDPOLoss,
    preferred_first,
)
from helpsteer2.losses.rpo import BackwardKLRPOLoss, ForwardKLRPOLoss, SquaredRPOLoss

NAN = math.nan
LOSSES = (
    DPOLoss(0.3), SmoothedDPOLoss(0.3), RobustDPOLoss(0.3), IPOLoss(0.3), HingeDPOLoss(0.3),
    MarginDPOLoss(0.3), ScaledDPOLoss(0.3), SquaredRPOLoss(0.3), BackwardKLRPOLoss(0.3),
    ForwardKLRPOLoss(0.3),
)  # fmt: skip
AVERAGING = (DPOLoss(0.3, True), IPOLoss(0.3, True), BackwardKLRPOLoss(0.3, True))


def pair(gap: float, strength: float = 1.0, reward_gap: float = NAN) -> PairLogprobs:
    """One pair whose D is ``gap``, the second response better."""
    return PairLogprobs.of(
        torch.tensor([-7.0, -4.0 + gap]),
        torch.tensor([-7.0, -4.0]),
        torch.tensor([3, 2]),
        torch.tensor([0.0, reward_gap]),
        torch.tensor([strength]),
    )


def columns(n: int = 24, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random arguments of ``PairLogprobs.of``."""
    generator = torch.Generator().manual_seed(0)
    strength = torch.randint(1, 4, (n,), generator=generator)
    sign = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    ref_logprobs = -20 - 10 * torch.rand(2 * n, generator=generator, dtype=dtype)
    return {
        "logprobs": ref_logprobs + 4 * torch.randn(2 * n, generator=generator, dtype=dtype),
        "ref_logprobs": ref_logprobs,
        "n_tokens": torch.randint(1, 12, (2 * n,), generator=generator),
        "rewards": torch.randn(2 * n, generator=generator, dtype=dtype),
        "strength": (strength * sign).to(dtype),
    }


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # D = ln 3 / 0.5, so βD = ln 3 and σ(βD) = 3/4.
        (DPOLoss(0.5), math.log(4 / 3)),
        (SmoothedDPOLoss(0.5, label_smoothing=0.2), 0.8 * math.log(4 / 3) + 0.2 * math.log(4)),
        (
            RobustDPOLoss(0.5, label_smoothing=0.2),
            (0.8 * math.log(4 / 3) - 0.2 * math.log(4)) / 0.6,
        ),
        (HingeDPOLoss(0.5), 0.0),  # ln 3 > 1
        (HingeDPOLoss(0.25), 1 - math.log(3) / 2),
        # 2 ln 3 − 1/(2·0.5) = 1.197225.
        (IPOLoss(0.5), 1.433347),
        # σ(ln 3 − 2) = 1 / (1 + e²/3).
        (MarginDPOLoss(0.5), math.log1p(math.exp(2) / 3)),
        (ScaledDPOLoss(0.5), 2 * math.log(4 / 3)),
    ],
)
def test_hand_numbers(loss: DPOLoss, expected: float) -> None:
    total, _ = loss(pair(2 * math.log(3), strength=2.0))
    assert total.item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # βD = 0 and g = η·(r_chosen − r_rejected) = 1.
        (SquaredRPOLoss(0.1, eta=0.5), 1.0),
        # σ(1) = 0.731059: ln 2 − H(0.731059) = 0.693147 − 0.582203.
        (BackwardKLRPOLoss(0.1, eta=0.5), 0.110944),
        # −ln 2 − (ln 0.731059 + ln 0.268941) / 2.
        (ForwardKLRPOLoss(0.1, eta=0.5), 0.120115),
    ],
)
def test_hand_numbers_of_rpo(loss: SquaredRPOLoss, expected: float) -> None:
    assert loss(pair(0.0, reward_gap=2.0))[0].item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("loss", [SquaredRPOLoss, BackwardKLRPOLoss, ForwardKLRPOLoss])
def test_rpo_is_at_rest_where_the_rewards_differ_as_told(loss: type[SquaredRPOLoss]) -> None:
    pairs = pair(3.0, reward_gap=0.75)
    chosen = pairs.chosen.clone().requires_grad_()
    total, _ = loss(0.5, eta=2.0)(replace(pairs, chosen=chosen))  # βD = g = 1.5
    (gradient,) = torch.autograd.grad(total, chosen)
    assert total.item() == pytest.approx(0, abs=1e-7)
    assert gradient.item() == pytest.approx(0, abs=1e-6)
    # And it pulls back what has gone too far, which DPO never does.
    further = replace(pairs, chosen=(pairs.chosen + 1).requires_grad_())
    assert torch.autograd.grad(loss(0.5, eta=2.0)(further)[0], further.chosen)[0].item() > 0


def test_a_policy_that_is_its_reference_costs_ln_2() -> None:
    arguments = columns()
    arguments["logprobs"] = arguments["ref_logprobs"]
    pairs = PairLogprobs.of(**arguments)
    for loss in (DPOLoss(0.3), DPOLoss(7.0, True), SmoothedDPOLoss(0.3)):
        total, sums = loss(pairs)
        assert total.item() / 24 == pytest.approx(math.log(2), abs=1e-6)
        assert sums["won"].item() == 0
        assert sums["margin"].item() == sums["kl"].item() == 0


@pytest.mark.parametrize("loss", [*LOSSES, *AVERAGING])
def test_swapping_the_responses_and_the_sign_changes_nothing(loss: DPOLoss) -> None:
    arguments = columns()

    def swap(values: Tensor) -> Tensor:
        return values.reshape(-1, 2).flip(1).reshape(-1)

    swapped = {name: swap(values) for name, values in arguments.items() if name != "strength"}
    ours = loss(PairLogprobs.of(**arguments))
    theirs = loss(PairLogprobs.of(**swapped, strength=-arguments["strength"]))
    assert ours[0].item() == theirs[0].item()
    assert all(torch.equal(ours[1][key], theirs[1][key]) for key in ours[1])
    # The sign alone does matter, unless known rewards say which one is better, and by how much.
    other = loss(PairLogprobs.of(**{**arguments, "strength": -arguments["strength"]}))
    same = other[0].item() == pytest.approx(ours[0].item())
    assert same == isinstance(loss, SquaredRPOLoss)


@pytest.mark.parametrize("loss", [*LOSSES, *AVERAGING])
def test_gradients_in_fp64(loss: DPOLoss) -> None:
    arguments = columns(6, torch.float64)
    logprobs = arguments.pop("logprobs").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logprobs: loss(PairLogprobs.of(logprobs, **arguments))[0], logprobs
    )


@pytest.mark.parametrize("loss", LOSSES[:3] + LOSSES[5:7])
def test_descent_raises_the_preferred_response_and_lowers_the_other_as_much(loss: DPOLoss) -> None:
    arguments = columns()
    logprobs = arguments.pop("ref_logprobs").clone().requires_grad_()
    loss(PairLogprobs.of(ref_logprobs=logprobs.detach(), **{**arguments, "logprobs": logprobs}))[
        0
    ].backward()
    assert logprobs.grad is not None
    first, second = logprobs.grad.reshape(-1, 2).unbind(1)
    assert torch.equal(-second.sign(), arguments["strength"].sign())
    assert torch.equal(first, -second)


@pytest.mark.parametrize("loss", [*LOSSES, *AVERAGING])
@pytest.mark.parametrize("undecided", [0.0, NAN])
def test_pairs_without_a_winner_weigh_nothing_and_have_no_gradient(
    loss: DPOLoss, undecided: float
) -> None:
    arguments = columns(2)
    arguments["strength"][1] = undecided
    if math.isnan(undecided):  # a filler, whose other columns may be unknown too
        arguments["rewards"][2:] = NAN
        arguments["ref_logprobs"][2:] = NAN
    logprobs = arguments["logprobs"].requires_grad_()
    pairs = PairLogprobs.of(**arguments)
    total, sums = loss(pairs)
    alone, _ = loss(PairLogprobs(*(values[:1] for values in vars(pairs).values())))
    assert total.item() == alone.item()
    assert loss.count(arguments["strength"]).item() == sums["pairs"].item() == 1
    (gradient,) = torch.autograd.grad(total, logprobs)
    assert torch.equal(gradient[2:], torch.zeros(2))
    assert torch.isfinite(gradient).all()
    assert all(math.isfinite(value.item()) for value in sums.values())


@pytest.mark.parametrize("loss", [*LOSSES, *AVERAGING])
def test_cutting_a_batch_changes_neither_sum_nor_count(loss: DPOLoss) -> None:
    pairs = PairLogprobs.of(**columns())
    parts = [
        PairLogprobs(*(values[part] for values in vars(pairs).values()))
        for part in (slice(0, 7), slice(7, 8), slice(8, 24))
    ]
    total = sum(loss(part)[0].item() for part in parts)
    assert total == pytest.approx(loss(pairs)[0].item(), rel=1e-6)
    assert sum(loss(part)[1]["pairs"].item() for part in parts) == 24


def test_sums_are_those_of_the_pairs() -> None:
    arguments = columns()
    pairs = PairLogprobs.of(**arguments)
    _, sums = DPOLoss(0.3)(pairs)
    chosen, rejected = preferred_first(arguments["logprobs"], arguments["strength"])
    assert torch.equal(sums["chosen"], chosen.sum())
    assert torch.equal(sums["rejected"], rejected.sum())
    ratios = arguments["logprobs"] - arguments["ref_logprobs"]
    assert sums["kl"].item() == pytest.approx(-ratios.sum().item() / 2, rel=1e-5)
    gap = torch.subtract(*preferred_first(ratios, arguments["strength"]))
    assert sums["margin"].item() == pytest.approx(0.3 * gap.sum().item(), rel=1e-5)
    assert sums["won"].item() == (gap > 0).sum()
    chosen_tokens, _ = preferred_first(arguments["n_tokens"], arguments["strength"])
    assert sums["chosen_tokens"].item() == chosen_tokens.sum()


def test_scaled_is_the_pair_repeated_as_often_as_it_is_strong() -> None:
    pairs = PairLogprobs.of(**columns())
    times = pairs.strength.long()
    repeated = PairLogprobs(*(values.repeat_interleave(times) for values in vars(pairs).values()))
    ours, theirs = ScaledDPOLoss(0.3)(pairs)[0], DPOLoss(0.3)(repeated)[0]
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_robust_is_unbiased_under_flipped_preferences() -> None:
    arguments, share = columns(), 0.2
    flipped = {**arguments, "strength": -arguments["strength"]}
    loss = RobustDPOLoss(0.3, label_smoothing=share)
    right, wrong = (loss(PairLogprobs.of(**a))[0].item() for a in (arguments, flipped))
    expected = (1 - share) * right + share * wrong
    truth = DPOLoss(0.3)(PairLogprobs.of(**arguments))[0].item()
    assert expected == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_finite_far_out_and_fp32_under_autocast(loss: DPOLoss) -> None:
    for gap in (-5000.0, 5000.0):
        pairs = pair(gap, reward_gap=1.0)
        chosen = pairs.chosen.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            total, _ = loss(replace(pairs, chosen=chosen))
        assert total.dtype == torch.float32
        assert torch.isfinite(total)
        assert torch.isfinite(torch.autograd.grad(total, chosen)[0])


def test_ipo_with_sums_is_that_of_nemo() -> None:
    """NeMo-Aligner, ``megatron_gpt_dpo_model.py``: rewards without β, of sums."""
    pairs = PairLogprobs.of(**columns())
    chosen_rewards = pairs.chosen - pairs.ref_chosen
    reject_rewards = pairs.rejected - pairs.ref_rejected
    theirs = torch.mean((chosen_rewards - reject_rewards - 1.0 / (2.0 * 0.3)) ** 2, 0)
    assert IPOLoss(0.3)(pairs)[0].item() / 24 == pytest.approx(theirs.item(), rel=1e-6)


def loss_of_trl(name: str, arguments: dict[str, Tensor], **settings: object) -> float:
    """TRL's DPOTrainer on these numbers: its method run on a model that only looks them up."""
    trl = pytest.importorskip("trl")
    lengths = torch.cat(preferred_first(arguments["n_tokens"], arguments["strength"]))
    sums = torch.cat(preferred_first(arguments["logprobs"], arguments["strength"]))
    ref = preferred_first(arguments["ref_logprobs"], arguments["strength"])
    places = torch.arange(int(lengths.max()) + 1)  # the first is the prompt
    mask = ((places >= 1) & (places <= lengths[:, None])).long()
    logprobs = (sums / lengths)[:, None] * mask[:, 1:]
    zeros = torch.zeros_like(logprobs)
    trainer = MagicMock()
    trainer.model.training = False
    trainer.precompute_ref_logps = True
    trainer.aux_loss_enabled = trainer.use_weighting = False
    trainer.ld_alpha, trainer.f_divergence_type = None, "reverse_kl"
    trainer.beta, trainer.loss_types, trainer.loss_weights = 0.3, [name], [1.0]
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer._total_train_tokens = 0
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda value: value
    for key, value in settings.items():
        setattr(trainer, key, value)

    def model(**inputs: object) -> SimpleNamespace:
        top = zeros.bool()
        return SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=top)

    inputs = {
        "input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1],
    }  # fmt: skip
    return float(trl.DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False))


@pytest.mark.parametrize(
    ("loss", "name", "settings"),
    [
        (DPOLoss(0.3), "sigmoid", {}),
        (DPOLoss(0.3, average_logprobs=True), "sigmoid_norm", {}),
        (HingeDPOLoss(0.3), "hinge", {}),
        (IPOLoss(0.3, average_logprobs=True), "ipo", {}),
        (RobustDPOLoss(0.3, label_smoothing=0.2), "robust", {"label_smoothing": 0.2}),
    ],
)
def test_the_loss_of_trl(loss: DPOLoss, name: str, settings: dict[str, float]) -> None:
    arguments = columns()
    ours = loss(PairLogprobs.of(**arguments))[0].item() / 24
    assert ours == pytest.approx(loss_of_trl(name, arguments, **settings), rel=1e-5)


def test_smoothing_is_that_of_trl() -> None:
    # TRL smooths so in a loss that sorts the batch beforehand, which changes nothing for one pair.
    loss = SmoothedDPOLoss(0.3, label_smoothing=0.2)
    for i in range(4):
        arguments = {
            name: values[i : i + 1] if name == "strength" else values[2 * i : 2 * i + 2]
            for name, values in columns().items()
        }
        ours = loss(PairLogprobs.of(**arguments))[0].item()
        assert ours == pytest.approx(loss_of_trl("aot", arguments, label_smoothing=0.2), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPOLoss(0.0), "beta has to be a number above 0"),
        (lambda: IPOLoss(NAN), "beta has to be a number above 0"),
        (lambda: SmoothedDPOLoss(label_smoothing=0.5), "below 0.5"),
        (lambda: SquaredRPOLoss(eta=-1.0), "eta has to be a number above 0"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], DPOLoss], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_objectives_say_what_was_minimised() -> None:
    assert DPOLoss(0.25).objective == "DPO loss −log σ(βD) on preferences, β = 0.25"
    assert IPOLoss(0.1, True).objective.endswith("averaged over the tokens of each response")
    assert len({loss.objective for loss in LOSSES}) == len(LOSSES)
