"""The benchmark of SteerLM 2.0 lists what it says, its estimates are right, and it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.benchmarks.steerlm2_exact.gradient import (
    bias,
    jacobian,
    largest_push_at_the_posterior,
    slope,
)
from experiments.benchmarks.steerlm2_exact.training import Training
from experiments.benchmarks.steerlm2_exact.world import (
    World,
    divergence,
    log_probabilities,
    pushes,
    tables_of,
    weighed,
)
from helpsteer2.losses.steerlm2 import SteerLM2Loss, WeighedResponses

ROOT = Path(__file__).resolve().parent.parent
WORLD = World(sharpness=2.0, seed=3)


def test_tables_are_distributions_over_all_outcomes_and_back() -> None:
    logprobs = log_probabilities(WORLD.proposal)
    np.testing.assert_allclose(logprobs.exp().sum(dim=1), 1, rtol=1e-12)
    again = log_probabilities(tables_of(logprobs))
    np.testing.assert_allclose(again, logprobs, atol=1e-12)
    np.testing.assert_allclose(WORLD.posterior.exp().sum(dim=1), 1, rtol=1e-12)


def test_outcomes_drawn_several_times_weigh_as_often() -> None:
    own = log_probabilities(WORLD.proposal.flip(1))[:1]
    proposal, targets = log_probabilities(WORLD.proposal)[:1], WORLD.log_targets[:1]
    listed = torch.tensor([5, 9, 5, 40, 5, 9])
    counts = torch.zeros(1, 1, 64).double()
    counts[0, 0, [5, 9, 40]] = torch.tensor([3.0, 2, 1]).double()
    leaf = own[0, listed].requires_grad_()
    loss, _ = SteerLM2Loss()(
        WeighedResponses(
            logprobs=leaf,
            ref_logprobs=proposal[0, listed],
            log_targets=targets[0, listed],
            n_tokens=torch.ones(6).long(),
            owners=torch.zeros(6).long(),
            n_groups=1,
        )
    )
    (by_sample,) = torch.autograd.grad(loss, leaf)
    expected = torch.zeros(64).double().index_add(0, listed, by_sample)
    np.testing.assert_allclose(pushes(counts, own, proposal, targets)[0, 0], expected, atol=1e-14)
    merged, _ = weighed(counts, own, proposal, targets)
    assert SteerLM2Loss()(merged)[0].item() == pytest.approx(loss.item())


def test_exact_groups_have_the_divergence_and_its_gradient() -> None:
    tables = WORLD.proposal.flip(2).requires_grad_()
    own, proposal = log_probabilities(tables), log_probabilities(WORLD.proposal)
    groups, _ = weighed(proposal.exp()[None], own, proposal, WORLD.log_targets)
    loss, sums = SteerLM2Loss()(groups)
    exact = divergence(WORLD.posterior, own)
    assert (loss / sums["groups"]).item() == pytest.approx(exact.item(), rel=1e-12)
    ours, theirs = (
        torch.autograd.grad(value, tables, retain_graph=True)[0]
        for value in (loss / sums["groups"], exact)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-14)
    push = own.exp() - WORLD.posterior.exp()
    by_chain = torch.einsum("ka,kad->kd", push, jacobian(tables.detach())).reshape(tables.shape)
    np.testing.assert_allclose(by_chain.detach(), 4 * theirs, atol=1e-12)


def test_the_measured_bias_of_pairs_is_that_of_all_pairs() -> None:
    tables = tables_of(WORLD.posterior) * 0.5 + WORLD.proposal * 0.5
    own, proposal = log_probabilities(tables), log_probabilities(WORLD.proposal)
    first, second = torch.cartesian_prod(torch.arange(64), torch.arange(64)).unbind(dim=1)
    counts = torch.zeros(len(first), 1, 64).double()
    for drawn in (first, second):
        counts[torch.arange(len(drawn)), 0, drawn] += 1
    directions = jacobian(tables)
    errors, norms = [], []
    for k in range(len(own)):
        one = slice(k, k + 1)
        found = pushes(counts, own[one], proposal[one], WORLD.log_targets[one])[:, 0]
        chances = (proposal[k, first] + proposal[k, second]).exp()
        exact = own[k].exp() - WORLD.posterior[k].exp()
        errors.append((chances @ found - exact) @ directions[k])
        norms.append(exact @ directions[k])
    expected = torch.stack(errors).norm() / torch.stack(norms).norm()
    measured = bias(WORLD, tables, n=2, groups=20_000, seed=0)
    assert abs(measured["bias"] - expected.item()) < 4 * measured["standard_error"] < 0.02
    # A lone response weighs 1 under both, so nothing is learned of it.
    assert bias(WORLD, tables, n=1, groups=10, seed=0)["bias"] == pytest.approx(1)


def test_for_many_responses_the_bias_is_its_term_in_one_over_n() -> None:
    found = bias(WORLD, WORLD.proposal, n=300, groups=10_000, seed=0)
    assert found["bias"] == pytest.approx(found["predicted"], abs=4 * found["standard_error"])
    assert found["predicted"] > 6 * found["standard_error"]


def test_the_slope_is_that_of_a_power() -> None:
    rows = [{"n": n, "bias": 3 / n, "standard_error": 0.01 / n} for n in (2, 30, 100, 1000)]
    assert slope(rows, first=2)["slope"] == pytest.approx(-1)
    rows[0]["bias"] = 0.1
    assert slope(rows, first=2)["slope"] != pytest.approx(-1)
    assert slope(rows, first=30)["slope"] == pytest.approx(-1)
    assert np.isnan(slope(rows, first=1000)["slope"])


def test_nothing_is_learned_at_the_posterior_and_exact_groups_lead_there() -> None:
    assert largest_push_at_the_posterior(WORLD, seed=0) < 1e-10
    start, end = Training("exact", None, steps=200, lr=0.1).run(WORLD, seed=0)
    assert end < 0.01 < 0.3 < start


@pytest.mark.slow
def test_steerlm2_exact_runs(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    options = ["--groups", "100", "--steps", "3", "--output", str(output)]
    command = [sys.executable, "-m", "experiments.benchmarks.steerlm2_exact", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text(encoding="utf-8"))
    assert record["command"].startswith("python -m experiments.benchmarks.steerlm2_exact --groups")
    assert record["largest_gradient_at_the_posterior"] < 1e-10
    assert len(record["bias"]) == 8 * 8
    assert len(record["fits"]) == 2 * 8
    assert all(np.isfinite(row["divergence"]).all() for row in record["trainings"])
    assert output.with_suffix(".png").exists()
