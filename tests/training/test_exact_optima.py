"""On-policy training where every response can be listed: gradients and optima are known exactly."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.benchmarks.exact_optima.runs import Run, arrive, start
from experiments.benchmarks.exact_optima.theory import in_the_loss, priced_by_length, tilted
from experiments.benchmarks.exact_optima.world import FixedRewards, OnePrompt, Responses
from helpsteer2.data.packing import pack
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.losses.kl_penalty import KLPenalty
from helpsteer2.losses.policy_gradient import ClippedLoss, PolicyGradientLoss
from helpsteer2.losses.value import ValueLoss
from helpsteer2.models.critic import CriticStart
from helpsteer2.models.policy import Policy
from helpsteer2.modules.on_policy import OnPolicyModule
from helpsteer2.modules.ppo import PPOModule
from helpsteer2.modules.reinforce import ReinforceModule
from helpsteer2.rollouts.advantages import GAE, AgainstBaseline
from helpsteer2.rollouts.maker import RolloutMaker
from helpsteer2.rollouts.prompts import Prompts
from helpsteer2.rollouts.reference import ReferencePolicy
from helpsteer2.rollouts.scoring import RewardFunction
from helpsteer2.rollouts.settings import RolloutSettings
from helpsteer2.rollouts.store import Rollouts

BETA = 0.4
RESPONSES = Responses(2)
REWARDS = RESPONSES.rewards(FixedRewards())


@pytest.fixture(autouse=True)
def no_power_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of iterations wait for the disk longer than they compute."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_without_a_penalty_expected_reward_comes_near_the_best_there_is(
    algorithm: Any, tmp_path: Path
) -> None:
    found = arrive(Run(algorithm, iterations=70), tmp_path)
    assert found.start_reward < 0.6 * found.best_reward
    assert found.share_of_best >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_with_k1_in_the_reward_the_policy_becomes_the_tilted_reference(
    algorithm: Any, tmp_path: Path
) -> None:
    found = arrive(Run(algorithm, KLPenalty(BETA), iterations=120), tmp_path)
    assert found.start_to_optimum is not None
    assert found.to_optimum is not None
    assert found.start_to_optimum > 0.2
    assert found.to_optimum <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "is_optimum"), [("k2", True), ("k3", False)])
def test_on_one_token_each_estimator_in_the_loss_arrives_where_its_divergence_leads(
    estimator: Any, is_optimum: bool, tmp_path: Path
) -> None:
    kl = KLPenalty(BETA, estimator, place="loss")
    found = arrive(Run("reinforce", kl, longest=1, iterations=60, copies=8), tmp_path)
    assert found.to_destination is not None
    assert found.to_optimum is not None
    assert found.to_destination <= 0.02
    assert found.to_optimum <= 0.02 if is_optimum else found.to_optimum > 0.1


def random_reference(seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(len(RESPONSES.prefixes), 10))
    return np.asarray(logits - np.logaddexp.reduce(logits, axis=1)[:, None])


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_where_theory_has_the_loss_lead_its_expected_gradient_is_zero(estimator: Any) -> None:
    reference = random_reference(1)
    arrived = in_the_loss(RESPONSES, reference, REWARDS, BETA, estimator)
    leaf = torch.tensor(table_of(arrived)).requires_grad_()
    gradients = []
    for table in (leaf, torch.tensor(reference).requires_grad_()):
        logprobs = table.log_softmax(dim=1)[RESPONSES.states, RESPONSES.choices]
        of_reference = torch.tensor(reference[RESPONSES.states, RESPONSES.choices])
        owner = torch.arange(len(REWARDS)).repeat_interleave(torch.tensor(RESPONSES.lengths))
        whole = torch.zeros(len(REWARDS), dtype=torch.float64).index_add(0, owner, logprobs)
        weights = whole.detach().exp()
        # By definition: -r log π + β f(log π/π_ref) of every token, of responses drawn from π.
        log_ratio = logprobs - of_reference
        kind = {"k2": log_ratio.square() / 2, "k3": (-log_ratio).exp() - 1 + log_ratio}[estimator]
        loss = (
            -(weights * torch.tensor(REWARDS) * whole).sum() + BETA * (weights[owner] * kind).sum()
        )
        gradients.append(torch.autograd.grad(loss, table)[0].abs().max().item())
    assert gradients[0] < 1e-12 < 1e-3 < gradients[1]


def table_of(probabilities: np.ndarray) -> np.ndarray:
    """``(S, V)`` log-probabilities of tokens, of a distribution over whole responses."""
    mass = np.zeros((len(RESPONSES.prefixes), 10))
    spread = np.repeat(probabilities, RESPONSES.lengths)
    np.add.at(mass, (RESPONSES.states, RESPONSES.choices), spread)
    return np.log(mass / mass.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs"])
def test_on_one_token_theory_has_the_loss_lead_to_the_best_distribution(estimator: Any) -> None:
    one = Responses(1)
    rewards, rng = one.rewards(FixedRewards()), np.random.default_rng(4)
    reference = np.log(rng.dirichlet(np.ones(len(rewards))))
    arrived = in_the_loss(one, reference[None], rewards, 0.2, estimator)

    def objective(p: np.ndarray) -> float:
        ref = np.exp(reference)
        nats = p + 1e-300
        divergence = {
            "k2": nats * (np.log(nats) - reference),
            "k3": ref * (reference - np.log(nats)),
            "abs": np.abs(p - ref),
        }[estimator]
        return float(p @ rewards - 0.2 * divergence.sum())

    for step in (1e-3, 0.1, 1.0):
        for other in rng.dirichlet(np.ones(len(rewards)), size=500):
            assert objective(arrived + step * (other - arrived)) < objective(arrived)


def test_where_theory_has_the_reward_lead_all_responses_earn_the_same() -> None:
    whole = RESPONSES.logprobs(random_reference(2))
    lengths = RESPONSES.lengths
    for arrived, price in (
        (tilted(whole, REWARDS, BETA), np.ones(len(lengths))),
        (priced_by_length(whole, REWARDS, lengths, BETA), 1 / lengths),
    ):
        assert arrived.sum() == pytest.approx(1, abs=1e-9)
        earned = REWARDS - BETA * price * (np.log(arrived) - whole)
        np.testing.assert_allclose(earned, earned[0], atol=1e-9)


def module_of(kind: str, policy: Policy) -> OnPolicyModule:
    optimizer: Any = partial(torch.optim.SGD, lr=1.0)
    kl = KLPenalty(BETA)
    if kind == "reinforce":
        return ReinforceModule(
            policy,
            loss=PolicyGradientLoss(),
            advantages=AgainstBaseline(),
            kl=kl,
            optimizer=optimizer,
        )
    module = PPOModule(
        policy,
        loss=ClippedLoss(average="responses"),
        value_loss=ValueLoss(),
        advantages=GAE(lam=1.0, whiten=False),
        kl=kl,
        critic=CriticStart(),
        critic_lr=1.0,
        optimizer=optimizer,
    )
    module.set_up(seed=0)
    assert module.critic is not None
    torch.nn.init.normal_(module.critic.head.weight, std=0.05)  # wrong values do not bias λ = 1
    return module


def shaken(policy: Policy) -> None:
    """Move a policy away from where it started."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def make_rollouts(folder: Path, module: OnPolicyModule, prompts: int) -> Rollouts:
    """An iteration of four responses a prompt, of a policy that is not its reference."""
    groups = list(OnePrompt(prompts).prompts("train", lambda problem: None))
    settings = RolloutSettings(
        prompts, SamplingParams(n=4, max_tokens=2), FixedRewards, unfinished="keep"
    )
    maker = RolloutMaker(
        folder,
        Prompts(groups, prompts, seed=0),
        settings,
        reward=RewardFunction.of(FixedRewards(), None),
        watched={},
        tokens_per_pass=2048,
        seed=5,
    )
    maker.reference = ReferencePolicy(module.model, None, "cpu", "auto", offload=False)
    shaken(module.model)
    return maker.make(0, module, contextlib.nullcontext)


def gradient(module: OnPolicyModule, loss: Tensor) -> Tensor:
    parameters = list(module.model.parameters())
    return torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, parameters)])


def exact_gradient(module: OnPolicyModule, reference: np.ndarray, beta: float) -> Tensor:
    """Of -(E r − β KL(π ‖ π_ref)), over all responses."""
    tokens = module.model.response_logprobs(pack([RESPONSES.group(module.model)]))
    whole = torch.zeros(len(REWARDS)).index_add(0, tokens.responses, tokens.logprobs)
    earned = torch.tensor(REWARDS).float() - beta * (whole - torch.tensor(reference).float())
    return gradient(module, -(whole.exp() * earned).sum())


@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
def test_the_gradient_of_a_first_step_is_that_of_the_regularised_reward(
    kind: str, tmp_path: Path
) -> None:
    policy = start(tmp_path, seed=1)
    reference = RESPONSES.table(policy)
    module = module_of(kind, policy)
    rollouts = make_rollouts(tmp_path / "rollouts", module, prompts=320)
    module.begin_iteration(rollouts)
    table = RESPONSES.table(policy)
    assert np.abs(table - reference).max() > 0.1

    found = []
    for first in range(0, len(rollouts), 32):
        batch = pack([rollouts[i] for i in range(first, first + 32)])
        sums, _ = module.loss_sums(batch)
        policy_loss = (sums / module.count(batch))[:2].sum()  # without the critic's
        found.append(gradient(module, policy_loss))
    estimates = torch.stack(found)
    whole = RESPONSES.logprobs(reference)
    exact, unpenalised = (exact_gradient(module, whole, beta) for beta in (BETA, 0.0))

    def errors(expected: Tensor, direction: Tensor) -> float:
        """How many standard errors the mean is away, along a direction."""
        along = estimates @ direction
        return float((along.mean() - expected @ direction).abs() / along.std() * len(along) ** 0.5)

    directions = torch.randn(20, len(exact), generator=torch.Generator().manual_seed(0))
    for direction in (exact, exact - unpenalised, *directions):
        assert errors(exact, direction) < 4
    # The estimate is good enough to tell this gradient from others.
    assert errors(unpenalised, exact - unpenalised) > 6
    assert errors(torch.zeros_like(exact), exact) > 6


def test_what_is_on_the_disk_is_what_enumeration_says(tmp_path: Path) -> None:
    policy = start(tmp_path, seed=1)
    reference = RESPONSES.table(policy)
    module = module_of("reinforce", policy)
    rollouts = make_rollouts(tmp_path / "rollouts", module, prompts=320)
    own = RESPONSES.table(policy)
    np.testing.assert_allclose(np.exp(RESPONSES.logprobs(own)).sum(), 1, atol=1e-5)

    counts = np.zeros(len(REWARDS))
    number = {ids: i for i, ids in enumerate(RESPONSES.ids)}
    for index, group in enumerate(rollouts.groups()):
        assert group.response_ids is not None
        which = [number[ids] for ids in group.response_ids]
        np.add.at(counts, which, 1)
        np.testing.assert_allclose(group.rewards, REWARDS[which], atol=1e-6)
        columns = rollouts[index].rollout
        assert columns is not None
        first = 0
        for response in which:
            last = first + RESPONSES.lengths[response]
            for table, column in ((own, columns.logprobs), (reference, columns.ref_logprobs)):
                expected = RESPONSES.logprobs(table)[response]
                assert column[first:last].sum() == pytest.approx(expected, abs=1e-4)
            first = last
    # Samples follow the policy: Pearson's statistic is about the number of responses.
    expected = counts.sum() * np.exp(RESPONSES.logprobs(own))
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < len(counts) + 4 * (2 * len(counts)) ** 0.5
