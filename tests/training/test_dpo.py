"""DPO: exact steps, figures of the pairs, and data that teach something."""

from __future__ import annotations

import json
import math
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpsteer2.commands.train import train
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.datamodule import Batching, GroupDataModule
from helpsteer2.data.groups import Group
from helpsteer2.data.packing import pack
from helpsteer2.data.tokenise import tokenise
from helpsteer2.errors import UserError
from helpsteer2.losses.dpo import DPOLoss, ScaledDPOLoss
from helpsteer2.losses.rpo import BackwardKLRPOLoss
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec
from helpsteer2.models.start import PolicyStart
from helpsteer2.modules.dpo import DPOModule, RPOModule
from tests.training.policies import dpo, refer
from tests.training.runs import ToyGroups, arguments, backbone, start, start_ranks
from tests.training.runs import run as run_command
from tests.training.test_resume import assert_same_run, rows
from tests.training.test_step import LIMITS, fit, relative

LN_2 = math.log(2)


def make_data(cache: Path, tokens: int) -> tuple[GroupDataModule, Any, Any]:
    """Toy pairs with made-up reference log-probabilities."""
    tokenizer = backbone().tokenizer.build(lambda: iter(["red green blue sun moon"]), cache)
    chat = ChatFormat().bind(tokenizer)
    splits = []
    for split in ("train", "validation"):
        groups = tokenise(ToyGroups(), split, chat, LIMITS, (), cache, close_cut=False)
        rng = np.random.default_rng(0)
        sums = rng.normal(-5.6 * groups.response_lengths, 3).astype(np.float32)
        splits.append(DPOModule.usable(groups.with_ref_logprobs(sums), split))
    batching = Batching(global_batch=12, tokens_per_microbatch=tokens, max_steps=1)
    return GroupDataModule(*splits, batching, seed=3), tokenizer, chat


def make_module(tokenizer: Any, chat: Any, **options: Any) -> DPOModule:
    causal_lm = backbone().build(tokenizer, seed=5, lm_head=True)
    settings: dict[str, Any] = {
        "loss": ScaledDPOLoss(0.2),
        "optimizer": partial(torch.optim.SGD, lr=0.0),
        "sft_weight": 0.3,
        "gradient_clip": None,
    }
    return DPOModule(Policy(causal_lm, PolicySpec(chat, LIMITS, "toy")), **settings | options)


def step_gradient(cache: Path, tokens: int, **options: Any) -> dict[str, torch.Tensor]:
    data, tokenizer, chat = make_data(cache, tokens)
    module = make_module(tokenizer, chat)
    fit(module, data, **options)
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def rank_gradient(cache: Path, path: Path, tokens: int) -> None:
    gradient = step_gradient(cache, tokens, devices=2, strategy="ddp")
    if torch.distributed.get_rank() == 0:
        torch.save(gradient, path)


def test_step_gradient_does_not_depend_on_the_micro_batches(tmp_path: Path) -> None:
    whole = step_gradient(tmp_path, tokens=100_000)
    for tokens in (1, 400):
        assert relative(step_gradient(tmp_path, tokens), whole) <= 1e-5


@pytest.mark.slow
def test_step_gradient_does_not_depend_on_the_ranks(tmp_path: Path) -> None:
    whole = step_gradient(tmp_path, tokens=100_000)
    for rank in start_ranks(rank_gradient, tmp_path, tmp_path, tmp_path / "gradient.pt", 1):
        rank.join()
    assert relative(torch.load(tmp_path / "gradient.pt"), whole) <= 1e-5


def plain_figures(module: DPOModule, groups: list[Any]) -> dict[str, torch.Tensor]:
    """Loss and figures of pairs, one response at a time through transformers' own model."""
    model = AutoModelForCausalLM.from_config(module.model.causal_lm.config)
    model.set_attn_implementation("eager")
    state = dict(module.model.causal_lm.named_parameters())
    sums = {name: torch.zeros(()) for name in ("loss", "chosen", "rejected", "kl", "won", "tokens")}
    for group in groups:
        logprobs = []
        for response in group.response_ids:
            ids = torch.tensor([*group.prompt_ids.tolist(), *response.tolist()])
            output = torch.func.functional_call(model, state, kwargs={"input_ids": ids[None]})
            logits = output.logits[0, len(group.prompt_ids) - 1 : -1]
            places = torch.arange(len(response))
            logprobs.append(logits.log_softmax(1)[places, ids[len(group.prompt_ids) :]].sum())
        better = int(group.preference_strength > 0)
        ratios = [p - r for p, r in zip(logprobs, group.ref_logprobs, strict=True)]
        gap = ratios[better] - ratios[1 - better]
        m = abs(group.preference_strength)
        sums["loss"] = sums["loss"] - m * torch.nn.functional.logsigmoid(0.2 * gap)
        sums["chosen"] = sums["chosen"] + logprobs[better]
        sums["rejected"] = sums["rejected"] + logprobs[1 - better]
        sums["kl"] = sums["kl"] - sum(ratios) / 2
        sums["won"] = sums["won"] + (gap > 0)
        sums["tokens"] = sums["tokens"] + len(group.response_ids[better])
    n = len(groups)
    sft = -sums["chosen"] / sums["tokens"]
    return {
        "loss": sums["loss"] / n + 0.3 * sft,
        "sft_loss": sft,
        "chosen_logprob": sums["chosen"] / n,
        "rejected_logprob": sums["rejected"] / n,
        "kl_to_reference": sums["kl"] / n,
        "pair_accuracy": sums["won"] / n,
    }


def test_gradient_is_that_of_the_two_stated_means(tmp_path: Path) -> None:
    data, tokenizer, chat = make_data(tmp_path, tokens=150)
    module = make_module(tokenizer, chat)
    groups = [data.train[int(i)] for i in data.plan(1).groups(0)]
    plain_figures(module, groups)["loss"].backward()
    theirs = {name: p.grad for name, p in module.named_parameters()}
    assert relative(step_gradient(tmp_path, tokens=150), theirs) <= 1e-5


def test_validation_is_one_set_of_figures_over_the_split(tmp_path: Path) -> None:
    figures = []
    for tokens in (1, 100_000):
        data, tokenizer, chat = make_data(tmp_path, tokens)
        module = make_module(tokenizer, chat)
        trainer = fit(module, data, limit_val_batches=1.0)
        figures.append({k: float(v) for k, v in trainer.callback_metrics.items()})
    assert figures[0] == pytest.approx(figures[1], rel=1e-4, abs=1e-5)
    with torch.no_grad():
        theirs = plain_figures(module, [data.validation[i] for i in range(len(data.validation))])
    for name, value in theirs.items():
        assert figures[0][f"val/{name}"] == pytest.approx(float(value), rel=1e-4), name


def test_fillers_count_nothing(tmp_path: Path) -> None:
    data, tokenizer, chat = make_data(tmp_path, 1)
    module = make_module(tokenizer, chat)
    batch = pack([data.train[0]]).as_filler()
    assert module.count(batch).tolist() == [0, 0]
    sums, logged = module.loss_sums(batch)
    assert not sums.any()
    assert not logged.any()


def test_a_run_learns_what_is_preferred_and_records_it(
    tmp_path: Path, policy: str, initial: str
) -> None:
    options: dict[str, Any] = {"max_steps": 30, "validate_every": 30, "lr": 3e-3, "tokens": 2000}
    value = train(**dpo(tmp_path / "run", policy, initial, **options))
    result = json.loads((tmp_path / "run/result.json").read_text())
    metrics = result["metrics"]
    assert value == metrics["val/loss"] < LN_2
    assert metrics["val/pair_accuracy"] > 0.8
    assert metrics["val/reward_margin"] > 0
    assert metrics["train/reward_margin"] > 0
    assert {"train/grad_norm", "train/chosen_logprob", "val/kl_to_reference"} <= metrics.keys()
    undecided = sum(group.preference_strength == 0 for group in ToyGroups().read("train", None))
    assert result["data"]["train"]["pairs_undecided"] == undecided > 0
    assert result["data"]["train"]["pairs_of_equal_responses"] == 0
    assert "DPO loss −log σ(βD)" in (tmp_path / "run/export/README.md").read_text("utf-8")
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/export")


@dataclass(frozen=True)
class Changed(ToyGroups):
    """Toy groups of which something is changed."""

    change: str = ""

    def read(self, split: str, report: Any) -> Iterator[Group]:
        for i, group in enumerate(super().read(split, report)):
            if self.change == "equal" or (self.change == "some equal" and i % 2):
                first = group.responses[0]
                yield replace(group, responses=(first, first), preference_strength=1)
            elif self.change == "one":
                yield replace(group, responses=group.responses[:1], attributes=None)
            elif self.change == "ties":
                yield replace(group, preference_strength=0)
            elif self.change == "rewards" or (self.change == "some rewards" and i % 2):
                yield replace(group, rewards=tuple(map(float, map(len, group.responses))))
            else:
                yield group

    def fingerprint(self, split: str) -> str:
        return f"{super().fingerprint(split)} {self.change}"


@pytest.mark.parametrize(
    ("change", "module", "message"),
    [
        ("one", DPOModule, "has a preference_strength and 1 responses"),
        ("ties", DPOModule, r"every preference_strength of the train data \(40\) is 0"),
        ("equal", DPOModule, "both responses of every pair of the train data have the same ids"),
        ("some rewards", RPOModule, r"pairs of the train data lack the reward.* 'train-0'\)"),
    ],
)
def test_data_that_teach_nothing_are_refused_before_the_model_is_built(
    tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch, change: str, module: Any,
    message: str,
) -> None:  # fmt: skip
    data = Changed(change=change)
    made = refer(tmp_path / "reference", policy, data=data)
    monkeypatch.setattr(PolicyStart, "build", lambda *_: pytest.fail("built"))
    run = dpo(tmp_path / "run", policy, made) | {"data": data}
    run["module"] = partial(module, **run["module"].keywords)
    with pytest.raises(UserError, match=message):
        train(**run)


def test_pairs_of_equal_responses_are_left_out_and_counted(tmp_path: Path, policy: str) -> None:
    data = Changed(change="some equal")
    made = refer(tmp_path / "reference", policy, data=data)
    train(**dpo(tmp_path / "run", policy, made) | {"data": data})
    report = json.loads((tmp_path / "run/result.json").read_text())["data"]["train"]
    assert report["pairs_of_equal_responses"] == 20
    assert report["pairs_decided"] + report["pairs_undecided"] == 40


def test_rpo_learns_how_much_better_a_response_is(tmp_path: Path, policy: str) -> None:
    data = Changed(change="rewards")
    made = refer(tmp_path / "reference", policy, data=data)
    options: dict[str, Any] = {"max_steps": 30, "validate_every": 30, "lr": 3e-3, "tokens": 2000}
    run = dpo(tmp_path / "run", policy, made, **options) | {"data": data}
    settings = run["module"].keywords | {"loss": BackwardKLRPOLoss(0.1, eta=0.02)}
    value = train(**run | {"module": partial(RPOModule, **settings)})
    rewards = [sorted(map(len, group.responses)) for group in data.read("validation", None)]
    gaps = np.array([0.02 * (more - less) for less, more in rewards])
    chance = 1 / (1 + np.exp(-gaps))
    at_start = np.mean(LN_2 + chance * np.log(chance) + (1 - chance) * np.log(1 - chance))
    assert value is not None
    assert value < 0.7 * at_start


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, policy: str, initial: str) -> None:
    options: dict[str, Any] = {"module": "dpo", "policy": policy, "reference": initial}
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    start(whole, **options).join()
    target = random.uniform(0, rows(whole) - 8)
    child = start(run_dir, step_seconds=0.02, **options)
    child.wait_for(lambda: rows(run_dir) >= target)
    child.signal(signal.SIGKILL)
    child.process.join(60)
    assert child.process.exitcode == -signal.SIGKILL, child.text
    start(run_dir, **options).join()
    assert_same_run(run_dir, whole)


@pytest.mark.slow
def test_two_ranks_give_the_figures_of_one(tmp_path: Path, policy: str, initial: str) -> None:
    options = {
        "module": "dpo", "policy": policy, "reference": initial, "max_steps": 4,
        "validate_every": 4,
    }  # fmt: skip
    ranked = {**options, "devices": 2}
    for rank in start_ranks(run_command, tmp_path, tmp_path / "ranks", ranked):
        rank.join()
    train(**arguments(tmp_path / "one", **options))
    ours, theirs = (
        json.loads((tmp_path / name / "result.json").read_text())["metrics"]
        for name in ("ranks", "one")
    )
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_the_loss_may_be_joined_by_that_of_sft(tmp_path: Path) -> None:
    _, tokenizer, chat = make_data(tmp_path, 1)
    module = make_module(tokenizer, chat, loss=DPOLoss(0.1))
    assert module.objective.endswith("and 0.3 × SFT loss of the preferred responses")
    assert "SFT" not in make_module(tokenizer, chat, sft_weight=0.0).objective
