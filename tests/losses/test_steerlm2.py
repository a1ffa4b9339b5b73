"""SteerLM 2.0's loss, against its definition, the paper's gradient and NeMo-Aligner's."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpsteer2.errors import UserError
from helpsteer2.losses.steerlm2 import SteerLM2Loss, WeighedResponses
from tests.losses.enumerable import (
    LENGTHS,
    by_response,
    probabilities,
    random_table,
    spoiled,
    token_logprobs,
)

NAN, INF = math.nan, math.inf
SIZES = (3, 10, 1, 2, 6)
BOTH_FORMS = pytest.mark.parametrize("form", ["kl", "score"])
COLUMNS = ("logprobs", "ref_logprobs", "log_targets")


def random_responses(
    dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = SIZES
) -> WeighedResponses:
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    # Of one group lie apart as well: nothing is said of the order.
    owners = owners[torch.randperm(len(owners), generator=generator)]
    proposal = -60 + 20 * torch.randn(len(owners), generator=generator, dtype=dtype)
    noise = torch.randn(2, len(owners), generator=generator, dtype=dtype)
    return WeighedResponses(
        logprobs=(proposal + noise[0]).requires_grad_(),
        ref_logprobs=proposal,
        log_targets=proposal + 2 * noise[1] - 300,
        n_tokens=torch.randint(1, 40, (len(owners),), generator=generator),
        owners=owners,
        n_groups=len(sizes),
    )


def weights_of(responses: WeighedResponses, column: str) -> np.ndarray:
    """Self-normalised weights by their definition, in numpy."""
    values = getattr(responses, column).detach().double() - responses.ref_logprobs.double()
    owners = responses.owners.numpy()
    weights = np.empty(len(owners))
    for group in range(responses.n_groups):
        part = np.exp((values.numpy() - values.numpy()[owners == group].max())[owners == group])
        weights[owners == group] = part / part.sum()
    return weights


def gradient(loss: SteerLM2Loss, responses: WeighedResponses) -> Tensor:
    return torch.autograd.grad(loss(responses)[0], responses.logprobs)[0]


@BOTH_FORMS
def test_the_loss_is_the_divergence_of_the_weights(form: Any) -> None:
    responses = random_responses()
    w, b = (weights_of(responses, column) for column in ("log_targets", "logprobs"))
    loss, sums = SteerLM2Loss(form)(responses)
    assert loss.item() == pytest.approx((w * np.log(w / b)).sum(), rel=1e-10)
    assert loss.item() == pytest.approx(sums["distance"].item(), rel=1e-12)
    assert sums["groups"] == len(SIZES)
    assert not sums["distance"].requires_grad


@BOTH_FORMS
def test_the_gradient_is_the_papers(form: Any) -> None:
    responses = random_responses()
    w, b = (weights_of(responses, column) for column in ("log_targets", "logprobs"))
    np.testing.assert_allclose(gradient(SteerLM2Loss(form), responses), b - w, atol=1e-12)


@BOTH_FORMS
def test_at_the_proposal_every_response_weighs_the_same(form: Any) -> None:
    responses = random_responses()
    responses = replace(responses, logprobs=responses.ref_logprobs.clone().requires_grad_())
    n = torch.tensor(SIZES)[responses.owners].double()
    np.testing.assert_allclose(responses.log_policy_weights.detach().exp(), 1 / n, rtol=1e-12)
    expected = 1 / n.numpy() - weights_of(responses, "log_targets")
    np.testing.assert_allclose(gradient(SteerLM2Loss(form), responses), expected, atol=1e-12)
    _, sums = SteerLM2Loss(form)(responses)
    assert sums["start_distance"].item() == pytest.approx(sums["distance"].item())
    assert sums["policy_ess_share"].item() == pytest.approx(len(SIZES))
    assert sums["kl_to_reference"].item() == 0


@BOTH_FORMS
def test_at_the_posterior_nothing_is_to_learn_whatever_was_sampled(form: Any) -> None:
    for sizes in (SIZES, (2, 2, 2), (10,)):
        responses = random_responses(sizes=sizes)
        constants = torch.linspace(-500, 500, len(sizes), dtype=torch.float64)
        posterior = responses.log_targets - constants[responses.owners]
        responses = replace(responses, logprobs=posterior.requires_grad_())
        loss, _ = SteerLM2Loss(form)(responses)
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert gradient(SteerLM2Loss(form), responses).abs().max().item() < 1e-12


def test_with_every_response_listed_it_is_the_divergence_from_the_posterior() -> None:
    """Of a uniform proposal that has sampled each response once, over all 15 there are."""
    posterior = probabilities(random_table(1)) ** 2
    posterior = posterior / posterior.sum()
    table = random_table(2).requires_grad_()
    logprobs = by_response(token_logprobs(table))
    loss, _ = SteerLM2Loss()(
        WeighedResponses(
            logprobs=logprobs,
            ref_logprobs=torch.zeros_like(logprobs),
            log_targets=posterior.log() - 7,
            n_tokens=LENGTHS,
            owners=torch.zeros(len(logprobs), dtype=torch.int64),
            n_groups=1,
        )
    )
    divergence = (posterior * (posterior.log() - logprobs)).sum()
    assert loss.item() == pytest.approx(divergence.item(), rel=1e-12)
    ours, exact = (torch.autograd.grad(x, table, retain_graph=True)[0] for x in (loss, divergence))
    np.testing.assert_allclose(ours, exact, atol=1e-14)


@BOTH_FORMS
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("size", [3.0, -1e4])
def test_constants_of_a_prompt_change_nothing(form: Any, column: str, size: float) -> None:
    loss, responses = SteerLM2Loss(form), random_responses()
    shifts = size * torch.arange(responses.n_groups, dtype=torch.float64)[responses.owners]
    moved = getattr(responses, column).detach() + shifts
    changed = replace(responses, **{column: moved.requires_grad_(column == "logprobs")})
    assert loss(changed)[0].item() == pytest.approx(loss(responses)[0].item(), rel=1e-9)
    np.testing.assert_allclose(gradient(loss, changed), gradient(loss, responses), atol=1e-9)


def test_what_is_known_of_it_is_weighed_and_not_learned() -> None:
    responses = random_responses()
    known = [getattr(responses, column).detach().requires_grad_() for column in COLUMNS[1:]]
    loss, _ = SteerLM2Loss()(replace(responses, ref_logprobs=known[0], log_targets=known[1]))
    loss.backward()
    assert known[1].grad is None  # w′ is constant


@BOTH_FORMS
def test_group_mean_divides_every_group_by_the_mean_length_of_its_responses(form: Any) -> None:
    responses = random_responses()
    owners, tokens = responses.owners.numpy(), responses.n_tokens.numpy()
    means = np.array([tokens[owners == group].mean() for group in range(len(SIZES))])
    plain = gradient(SteerLM2Loss(form), responses).numpy()
    normalised = SteerLM2Loss(form, "group_mean")
    np.testing.assert_allclose(gradient(normalised, responses), plain / means[owners], rtol=1e-10)
    w, b = (weights_of(responses, column) for column in ("log_targets", "logprobs"))
    loss, sums = normalised(responses)
    assert loss.item() == pytest.approx((w * np.log(w / b) / means[owners]).sum())
    assert sums["distance"].item() == pytest.approx((w * np.log(w / b)).sum())


def test_group_mean_has_the_gradient_of_nemo_aligner() -> None:
    """Its loss of a prompt: (w′ − b′) · NLL of the tokens, over the mean of their number."""
    responses = random_responses(sizes=(10,))
    w, b = (weights_of(responses, column) for column in ("log_targets", "logprobs"))
    nll = -responses.logprobs
    theirs = (torch.tensor(w - b) * nll).sum() / responses.n_tokens.double().mean()
    expected = torch.autograd.grad(theirs, responses.logprobs)[0]
    found = gradient(SteerLM2Loss("kl", "group_mean"), responses)
    np.testing.assert_allclose(found, expected, atol=1e-13)


@BOTH_FORMS
@pytest.mark.parametrize("normalisation", ["none", "group_mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_without_targets_weigh_nothing(form: Any, normalisation: Any, dtype: Any) -> None:
    """Fillers have none, one response may lack its own, or none may be possible."""
    loss, responses = SteerLM2Loss(form, normalisation), random_responses(dtype)
    targets = responses.log_targets.clone()
    targets[(responses.owners == 0).nonzero()[1]] = NAN
    targets[responses.owners == 1] = NAN
    targets[responses.owners == 4] = -INF
    counts = (responses.owners == 2) | (responses.owners == 3)
    rubbish = [spoiled(getattr(responses, name), counts) for name in COLUMNS[:2]]
    spoilt = replace(
        responses,
        logprobs=rubbish[0].requires_grad_(),
        ref_logprobs=rubbish[1],
        log_targets=targets,
    )
    assert loss.count(targets, responses.owners, 5) == 2
    value, sums = loss(spoilt)
    assert sums["groups"] == 2
    found = torch.autograd.grad(value, spoilt.logprobs)[0]
    assert not found[~counts].any()

    alone = WeighedResponses(
        *(getattr(responses, name).detach()[counts] for name in COLUMNS),
        responses.n_tokens[counts],
        responses.owners[counts] - 2,
        2,
    )
    alone.logprobs.requires_grad_()
    expected, expected_sums = loss(alone)
    assert value.item() == pytest.approx(expected.item())
    for name, of_counted in expected_sums.items():
        assert sums[name].item() == pytest.approx(of_counted.item()), name
    np.testing.assert_allclose(found[counts], gradient(loss, alone), rtol=1e-5)


@BOTH_FORMS
def test_a_response_that_cannot_be_meant_is_pushed_away_and_nothing_is_nan(form: Any) -> None:
    responses = random_responses()
    targets = responses.log_targets.clone()
    impossible = (responses.owners == 1).nonzero()[:2, 0]
    targets[impossible] = -INF
    changed = replace(responses, log_targets=targets)
    loss, sums = SteerLM2Loss(form)(changed)
    assert loss.isfinite()
    assert all(value.isfinite() for value in sums.values())
    found = gradient(SteerLM2Loss(form), changed)
    b = weights_of(responses, "logprobs")
    np.testing.assert_allclose(found[impossible], b[impossible], rtol=1e-10)


@BOTH_FORMS
def test_steps_down_the_gradient_reach_the_posterior(form: Any) -> None:
    """Of three responses to a prompt, from the proposal, by plain gradient descent."""
    responses = random_responses(sizes=(3, 3))
    logprobs = responses.ref_logprobs.clone().requires_grad_()
    loss = SteerLM2Loss(form)
    for _ in range(1500):
        (step,) = torch.autograd.grad(loss(replace(responses, logprobs=logprobs))[0], logprobs)
        logprobs = (logprobs - 3 * step).detach().requires_grad_()
    w = weights_of(responses, "log_targets")
    b = weights_of(replace(responses, logprobs=logprobs), "logprobs")
    np.testing.assert_allclose(b, w, atol=1e-3)


def test_figures_tell_how_even_the_weights_are() -> None:
    ref = torch.zeros(7)
    targets = torch.tensor([2.0, 2, 2, 2, 50, 0, -50])
    logprobs = torch.tensor([-1.0, -2, -3, -4, 0, 3, 0])
    owners = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    _, sums = SteerLM2Loss()(
        WeighedResponses(logprobs, ref, targets, torch.ones(7).long(), owners, 2)
    )
    expected = {
        "groups": 2,
        "ess": 4 + 1,
        "ess_share": 1 + 1 / 3,
        "collapsed": 1,
        "start_distance": 0 + math.log(3),
        "kl_to_reference": 2.5 - 1,
    }
    for name, value in expected.items():
        assert sums[name].item() == pytest.approx(value, rel=1e-5), name
    assert 1 / 4 + 1 / 3 < sums["policy_ess_share"].item() < 2


def test_autocast_and_float32_do_not_blur_it() -> None:
    exact = random_responses(torch.float32)
    double = replace(exact, **{name: getattr(exact, name).detach().double() for name in COLUMNS})
    double.logprobs.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = SteerLM2Loss()(exact)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(SteerLM2Loss()(double)[0].item(), rel=1e-5)
    for form in ("kl", "score"):
        found = gradient(SteerLM2Loss(form), exact)
        np.testing.assert_allclose(found, gradient(SteerLM2Loss("kl"), double), atol=2e-6)


def test_other_settings_are_refused_and_the_card_says_what_was_done() -> None:
    for wrong in ({"form": "forward"}, {"length_normalisation": "mean"}):
        (name,) = wrong
        with pytest.raises(UserError, match=rf"module\.loss\.{name} has to be .* or .*, got"):
            SteerLM2Loss(**wrong)  # type: ignore[arg-type]
    assert "mean length" not in SteerLM2Loss().objective
    assert "mean length" in SteerLM2Loss(length_normalisation="group_mean").objective
