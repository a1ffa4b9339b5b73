"""Steps on rollouts: the stated gradient, whatever the packing and the number of processes."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpsteer2.callbacks.checkpoints import LAST, read_checkpoint
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.losses.kl_penalty import KLPenalty
from helpsteer2.losses.policy_gradient import ClippedLoss, PolicyGradientLoss
from helpsteer2.rollouts.advantages import GAE, AgainstBaseline
from tests.rollouts.runs import Run, ToyScorer, iteration, metrics, run_child
from tests.training.runs import start_ranks
from tests.training.test_step import relative

PLAIN = {
    "optimizer": partial(torch.optim.SGD, lr=1.0),
    "gradient_clip": None,
}
"""Steps that move weights by their gradient."""


def exported(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "export/model.safetensors")


def trained(run_dir: Path) -> dict[str, Tensor]:
    """Weights of policy and critic after the last step."""
    return read_checkpoint(run_dir / "checkpoints" / LAST)["state_dict"]


def moved(run_dir: Path, policy: str) -> dict[str, Tensor]:
    """Where a run has moved the weights that were exported."""
    before = load_file(f"{policy}/model.safetensors")
    return {name: before[name] - weight for name, weight in exported(run_dir).items()}


def plain_gradient(run_dir: Path, policy: str, kl: float, by_tokens: bool) -> dict[str, Tensor]:
    """Of the first iteration as one step, one response at a time through transformers' own model.

    Policy gradient and ½ (log π − log π_ref)² of the counted tokens, over the same count: a nat has
    one price.
    """
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    rollouts = iteration(run_dir)
    gain = penalty = torch.zeros(())
    tokens = responses = 0
    for index in range(len(rollouts)):
        group = rollouts[index]
        first = 0
        assert group.rollout is not None
        for response in group.response_ids:
            own = slice(first, first + len(response))
            first = own.stop
            counted = group.rollout.counted[own]
            assert counted.all() or not counted.any()
            if not counted.any():
                continue
            ids = torch.tensor([*group.prompt_ids.tolist(), *response.tolist()])
            logits = model(ids[None]).logits[0, len(group.prompt_ids) - 1 : -1]
            logprobs = logits.log_softmax(1).gather(1, ids[-len(response) :, None])[:, 0]
            gain = gain + (torch.tensor(group.rollout.advantages[own]) * logprobs).sum()
            gap = logprobs - torch.tensor(group.rollout.ref_logprobs[own])
            penalty = penalty + gap.square().sum() / 2
            tokens, responses = tokens + len(response), responses + 1
    ((kl * penalty - gain) / (tokens if by_tokens else responses)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("unfinished", ["keep", "mask"])
@pytest.mark.parametrize("kind", ["ppo", "reinforce"])
def test_the_gradient_is_that_of_the_stated_means(
    tmp_path: Path, policy: str, other_policy: str, kind: str, unfinished: str
) -> None:
    run = Run(
        policy, kind, max_steps=1, global_batch=8,
        module={**PLAIN, "kl": KLPenalty(0.2, "k2", place="loss")},
        rollouts={"epochs": 1, "unfinished": unfinished, "reference": other_policy},
    )  # fmt: skip
    run.train(tmp_path / "run")
    expected = plain_gradient(tmp_path / "run", policy, kl=0.2, by_tokens=kind == "ppo")
    ours = moved(tmp_path / "run", policy)
    assert relative({name: ours[name] for name in expected}, expected) <= 1e-5
    counted = [iteration(tmp_path / "run")[i].rollout.counted for i in range(8)]
    assert all(part.all() for part in counted) == (unfinished == "keep")


class Watching(ClippedLoss):
    """Keeps how far the ratios of every call are from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.furthest: list[float] = []

    def terms(self, logprobs: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        assert logprobs.dtype == old.dtype == torch.float32
        self.furthest.append(float((logprobs - old).exp().sub(1).abs().max()))
        return super().terms(logprobs, old, advantages)


@pytest.mark.parametrize(("precision", "bound"), [("32-true", 1e-5), ("bf16-mixed", 0.02)])
def test_the_first_pass_of_every_iteration_has_ratios_of_1(
    tmp_path: Path, policy: str, precision: str, bound: float
) -> None:
    loss = Watching()
    run = Run(
        policy, max_steps=6, global_batch=8, tokens=100_000, precision=precision,
        module={"loss": loss},
    )  # fmt: skip
    run.train(tmp_path / "run")
    found = metrics(tmp_path / "run")
    # Two passes an iteration, each a step of one row; the rollouts were made two prompts at a time.
    assert len(loss.furthest) == 6
    for step in (1, 3, 5):
        assert loss.furthest[step - 1] <= bound
        assert found[step]["train/ratio"] == pytest.approx(1, abs=bound / 10)
        if precision == "32-true":
            assert found[step]["train/clip_fraction"] == 0
        assert loss.furthest[step] > 2 * bound  # then it moves


def test_rollouts_know_nothing_of_the_precision_but_rounding(tmp_path: Path, policy: str) -> None:
    """The sampler and the separate stage under autocast stay near what fp32 says."""
    Run(policy, max_steps=1, precision="bf16-mixed").train(tmp_path / "run")
    found = iteration(tmp_path / "run").metrics
    assert 0 < found["rollout/sampler_gap_mean"] < 0.02
    assert found["rollout/kl"] == pytest.approx(0, abs=1e-6)  # it is its own reference


@pytest.mark.parametrize("kind", ["ppo", "reinforce"])
def test_packing_changes_nothing(tmp_path: Path, policy: str, kind: str) -> None:
    sampled, weights = [], []
    for tokens in (1, 90, 100_000):
        run_dir = tmp_path / str(tokens)
        Run(policy, kind, max_steps=6, tokens=tokens).train(run_dir)
        sampled.append((iteration(run_dir).folder / "groups.jsonl").read_bytes())
        weights.append(trained(run_dir))
    assert sampled[0] == sampled[1] == sampled[2]
    for other in weights[1:]:
        assert relative(other, weights[0]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppo", "reinforce"])
def test_two_ranks_are_one_process(tmp_path: Path, policy: str, kind: str) -> None:
    run = Run(policy, kind, max_steps=6)
    ranked = Run(policy, kind, max_steps=6, devices=2)
    for rank in start_ranks(run_child, tmp_path, ranked, tmp_path / "ranks"):
        assert "value " in rank.join()
    run.train(tmp_path / "one")
    # The first iteration is of equal weights, the second of weights that differ in their last bits.
    for name in ("groups.jsonl", "columns.npy"):
        ours, theirs = (iteration(tmp_path / x).folder / name for x in ("ranks", "one"))
        assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = (list(iteration(tmp_path / x, 1).groups()) for x in ("ranks", "one"))
    assert [one.response_ids for one in ours] == [one.response_ids for one in theirs]
    assert relative(trained(tmp_path / "ranks"), trained(tmp_path / "one")) <= 1e-5
    of_ranks, of_one = metrics(tmp_path / "ranks"), metrics(tmp_path / "one")
    for step, values in of_one.items():
        assert of_ranks[step] == pytest.approx(values, rel=1e-3, abs=1e-4)


KL = {"kl": KLPenalty(0.2, "k2", place="loss")}


@pytest.mark.parametrize("kind", ["ppo", "reinforce"])
@pytest.mark.parametrize(
    "module", [{}, {"advantages": "whitened"}, {"advantages": "grpo"}, KL], ids=str
)
def test_an_iteration_of_masked_responses_teaches_nothing(
    tmp_path: Path, policy: str, kind: str, module: dict[str, Any]
) -> None:
    made = {"whitened": AgainstBaseline(whiten=True), "grpo": AgainstBaseline(normalise=True)}
    changes = dict(module)
    if "advantages" in changes:
        changes["advantages"] = GAE() if kind == "ppo" else made[changes["advantages"]]
    cut = SamplingParams(n=4, max_tokens=1)
    run = Run(
        policy, kind, max_steps=4, module={**PLAIN, **changes},
        rollouts={"unfinished": "mask", "sampling": cut},
    )  # fmt: skip
    run.train(tmp_path / "run")
    assert iteration(tmp_path / "run").metrics["rollout/unfinished"] == 1
    assert all(not change.any() for change in moved(tmp_path / "run", policy).values())
    for values in metrics(tmp_path / "run").values():
        assert all(map(math.isfinite, values.values()))
        assert values["train/grad_norm"] == values["train/loss"] == 0
    head = trained(tmp_path / "run").get("critic.head.bias")
    assert head is None or head == 0


@pytest.mark.parametrize(
    ("kind", "advantages"),
    [
        ("ppo", GAE()),
        ("reinforce", AgainstBaseline(whiten=True)),
        ("reinforce", AgainstBaseline(normalise=True)),
        ("reinforce", AgainstBaseline("batch_mean")),
    ],
)
def test_equal_rewards_are_no_trouble(
    tmp_path: Path, policy: str, kind: str, advantages: Any
) -> None:
    run = Run(
        policy, kind, max_steps=4, module={"advantages": advantages, "kl": KLPenalty(0.0)},
        rollouts={"rewarder": partial(ToyScorer, constant=True)},
    )  # fmt: skip
    run.train(tmp_path / "run")
    found = metrics(tmp_path / "run")
    assert all(math.isfinite(value) for step in found.values() for value in step.values())
    assert found[1]["rollout/reward_std"] == found[1]["rollout/reward_std_in_prompt"] == 0
    if kind == "reinforce":
        assert found[1]["train/grad_norm"] == pytest.approx(0, abs=1e-6)


def test_reinforce_has_no_ratio_in_its_loss(tmp_path: Path, policy: str) -> None:
    """Its gradient at later steps is that of log π too: nothing is clipped."""
    run = Run(policy, "reinforce", max_steps=4, module={"loss": PolicyGradientLoss("tokens")})
    run.train(tmp_path / "run")
    assert all(step["train/clip_fraction"] == 0 for step in metrics(tmp_path / "run").values())
