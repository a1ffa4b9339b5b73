"""What holds a policy back: limits and prices of nats, and a critic that begins first."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpsteer2.callbacks.checkpoints import LAST, read_checkpoint
from helpsteer2.commands.train import train
from helpsteer2.errors import UserError
from helpsteer2.losses.kl_penalty import KLPenalty
from helpsteer2.modules.ppo import PPOModule
from tests.rollouts.runs import Run, iteration, metrics
from tests.rollouts.test_steps import PLAIN, moved, trained
from tests.training.test_resume import assert_same

FAST: dict[str, Any] = {"optimizer": partial(torch.optim.AdamW, lr=2e-2, fused=True)}


def kl_of(run_dir: Path, number: int) -> float:
    return iteration(run_dir, number).metrics["rollout/kl"]


def test_a_run_that_leaves_its_reference_too_far_ends_in_order(tmp_path: Path, policy: str) -> None:
    run_dir = tmp_path / "run"
    run = Run(policy, "reinforce", module=FAST, rollouts={"max_kl": 0.05})
    value = run.train(run_dir)
    made = len(list((run_dir / "rollouts").iterdir()))
    assert made == 2  # the first one is of the reference itself
    assert kl_of(run_dir, 1) > 0.05 > kl_of(run_dir, 0)
    result = json.loads((run_dir / "result.json").read_text())
    assert result["steps"] == 4  # none on rollouts that are beyond it
    assert value == result["metrics"]["rollout/reward"] == metrics(run_dir)[4]["rollout/reward"]
    AutoModelForCausalLM.from_pretrained(run_dir / "export")
    weights = trained(run_dir)["model.causal_lm.model.embed_tokens.weight"]
    exported = load_file(run_dir / "export/model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weights, exported)
    told = (run_dir / "run.log").read_text()
    assert re.findall(r"iteration \d+:", told) == ["iteration 1:", "iteration 2:"]
    assert re.search(r"KL divergence .* rollouts\.max_kl=0\.05: the run ends", told)
    before = (run_dir / "metrics.csv").read_bytes()
    assert run.train(run_dir) == value  # finished, which the same command finds
    assert (run_dir / "metrics.csv").read_bytes() == before


def test_a_run_that_begins_too_far_away_says_so(
    tmp_path: Path, policy: str, other_policy: str
) -> None:
    run = Run(policy, "reinforce", rollouts={"max_kl": 0.05, "reference": other_policy})
    with pytest.raises(UserError, match=r"rollouts\.max_kl=0\.05, before the first step"):
        run.train(tmp_path / "run")


def test_too_far_away_may_halve_the_rates(tmp_path: Path, policy: str) -> None:
    run = Run(
        policy, max_steps=16, module=FAST, rollouts={"max_kl": 0.02, "beyond_max_kl": "shrink"}
    )
    run.train(tmp_path / "run")
    expected, factors = 1.0, []
    for number in range(4):
        if kl_of(tmp_path / "run", number) > 0.02:
            expected /= 2
        factors.append(expected)
        assert metrics(tmp_path / "run")[4 * number + 1]["rollout/rate_factor"] == expected
    assert factors[0] == 1.0 > factors[1] > factors[-1]


def test_a_halved_rate_makes_half_the_step(tmp_path: Path, policy: str, other_policy: str) -> None:
    """One step of plain gradient descent, which is then half as far, critic included."""
    weights = []
    for max_kl in (None, 1e-3):
        run_dir = tmp_path / str(max_kl)
        changes = {"max_kl": max_kl, "beyond_max_kl": "shrink", "reference": other_policy}
        module = {**PLAIN, "critic_gradient_clip": None}
        Run(policy, max_steps=1, module=module, rollouts=changes).train(run_dir)
        head = trained(run_dir)["critic.head.weight"]  # begins at 0
        weights.append({**moved(run_dir, policy), "head": head})
    for name, whole in weights[0].items():
        assert torch.allclose(weights[1][name], whole / 2, atol=2e-7, rtol=1e-3), name
    assert weights[0]["head"].any()


def test_an_adaptive_coefficient_follows_the_divergence_also_when_resumed(
    tmp_path: Path, policy: str, other_policy: str
) -> None:
    kl = KLPenalty(0.05, target=3.0, horizon=64)
    run = Run(policy, max_steps=16, module={"kl": kl}, rollouts={"reference": other_policy})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run.train(whole)
    replace(run, max_steps=8).train(cut)
    run.train(cut)  # the same run, made longer
    coefficient = 0.05
    for number in range(4):
        found = metrics(whole)[4 * number + 1]["rollout/kl_coefficient"]
        assert found == pytest.approx(coefficient)
        # arXiv 1909.08593, section 2.2, with 32 responses an iteration.
        error = max(-0.2, min(0.2, kl_of(whole, number) / 3.0 - 1))
        coefficient *= 1 + error * 32 / 64
    assert coefficient != pytest.approx(0.05)
    assert (cut / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert_same(trained(cut), trained(whole))


def test_a_critic_that_begins_first_leaves_the_policy_alone(tmp_path: Path, policy: str) -> None:
    run = Run(policy, max_steps=3, module={"critic_first_steps": 3, "warmup_steps": 2})
    run.train(tmp_path / "run")
    checkpoint = read_checkpoint(tmp_path / "run/checkpoints" / LAST)
    assert all(not change.any() for change in moved(tmp_path / "run", policy).values())
    assert checkpoint["state_dict"]["critic.head.weight"].any()
    [optimizer] = checkpoint["optimizer_states"]
    of_policy = {
        i for group in optimizer["param_groups"] if not group.get("critic") for i in group["params"]
    }
    of_critic = {
        i for group in optimizer["param_groups"] if group.get("critic") for i in group["params"]
    }
    assert of_policy
    assert set(optimizer["state"]) == of_critic  # not even a moment
    replace(run, max_steps=4).train(tmp_path / "run")
    assert any(change.any() for change in moved(tmp_path / "run", policy).values())
    found = metrics(tmp_path / "run")
    assert [found[step]["train/grad_norm"] == 0 for step in (1, 2, 3, 4)] == [True] * 3 + [False]


class Rates(PPOModule):
    """Keeps the rates of every step."""

    kept: list[tuple[float, float]]

    def update(self, optimizer: Any) -> None:
        groups = optimizer.param_groups
        of_policy = {group["lr"] for group in groups if not group.get("critic")}
        of_critic = {group["lr"] for group in groups if group.get("critic")}
        self.kept.append((*of_policy, *of_critic))
        super().update(optimizer)


def test_policy_and_critic_have_their_own_rates_and_warm_ups(tmp_path: Path, policy: str) -> None:
    run = Run(
        policy, max_steps=8,
        module={"critic_first_steps": 2, "warmup_steps": 4, "critic_warmup_steps": 2},
    )  # fmt: skip
    given = run.arguments(tmp_path / "run")
    Rates.kept = []
    train(**given | {"module": partial(Rates, **given["module"].keywords)})
    of_policy, of_critic = zip(*Rates.kept, strict=True)
    # Steps 0 and 1 make nothing of the policy's rate.
    assert of_policy[2:] == pytest.approx([3e-3 * f for f in (0.25, 0.5, 0.75, 1, 1, 1)])
    assert of_critic == pytest.approx([1e-2 * f for f in (0.5, 1, 1, 1, 1, 1, 1, 1)])


def test_policy_and_critic_are_clipped_apart(tmp_path: Path, policy: str) -> None:
    """Steps of gradient descent are as long as what each part is clipped to."""
    module = {
        "optimizer": partial(torch.optim.SGD, lr=1.0), "critic_lr": 1.0, "gradient_clip": 1e-2,
        "critic_gradient_clip": 3e-2,
    }  # fmt: skip
    Run(policy, max_steps=1, module=module).train(tmp_path / "run")
    step = metrics(tmp_path / "run")[1]
    assert step["train/grad_norm"] > 1e-2
    assert step["train/critic_grad_norm"] > 3e-2

    def length(changes: Any) -> float:
        return float(sum(change.double().square().sum() for change in changes) ** 0.5)

    assert length(moved(tmp_path / "run", policy).values()) == pytest.approx(1e-2, rel=1e-3)
    state = trained(tmp_path / "run")
    before = load_file(f"{policy}/model.safetensors")
    prefix = "critic.backbone."
    of_critic = [
        state[name] - before.get(f"model.{name.removeprefix(prefix)}", torch.zeros(()))
        for name in state
        if name.startswith("critic.")
    ]
    assert length(of_critic) == pytest.approx(3e-2, rel=1e-3)
