"""SteerLM 2.0: exact steps, figures of the weights, and groups that teach something."""

from __future__ import annotations

import json
import logging
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
from helpsteer2.losses.steerlm2 import SteerLM2Loss
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec
from helpsteer2.models.start import PolicyStart
from helpsteer2.modules.steerlm2 import SteerLM2Module
from tests.training.policies import dpo, refer
from tests.training.runs import Child, ToyGroups, backbone, slow_down, start_ranks
from tests.training.test_resume import assert_same_run, rows
from tests.training.test_step import LIMITS, fit, relative


@dataclass(frozen=True)
class WeighedGroups(ToyGroups):
    """Prompts with two to five answers, and targets by which the longer of two is likelier.

    Args:
        change: What is done to some of the groups.
        scale: Of the differences between targets.
        targets: Others, one a response.
    """

    change: str = ""
    scale: float = 1.0
    targets: tuple[float, ...] = ()

    def read(self, split: str, report: Any) -> Iterator[Group]:
        given = iter(self.targets)
        answers = [answer for group in super().read(split, report) for answer in group.responses]
        for i, group in enumerate(super().read(split, report)):
            responses = tuple(dict.fromkeys(answers[i : i + 2 + i % 4]))
            if self.change == "one" or (self.change == "some" and i % 4 == 0):
                responses = responses[:1]
            if self.change == "some" and i % 4 == 1:
                responses = (responses[0],) * 3
            targets = tuple(
                next(given, self.scale * 0.02 * len(answer) - 90) for answer in responses
            )
            yield replace(
                group,
                responses=responses,
                attributes=None,
                preference_strength=None,
                rewards=None if self.change == "none" and i % 2 else targets,
            )

    def fingerprint(self, split: str) -> str:
        return f"{super().fingerprint(split)} {self.change} {self.scale} {self.targets}"


def make_data(cache: Path, tokens: int) -> tuple[GroupDataModule, Any, Any]:
    """Groups with made-up targets, and log-probabilities of a proposal that are not far."""
    tokenizer = backbone().tokenizer.build(lambda: iter(["red green blue sun moon"]), cache)
    chat = ChatFormat().bind(tokenizer)
    splits = []
    for split in ("train", "validation"):
        read = partial(
            tokenise, split=split, chat=chat, limits=LIMITS, attribute_names=(), cache_dir=cache
        )
        rng = np.random.default_rng(0)
        sums = rng.normal(-5.6 * read(WeighedGroups()).response_lengths, 1).astype(np.float32)
        groups = read(WeighedGroups(targets=tuple(rng.normal(sums, 1).tolist())))
        splits.append(SteerLM2Module.usable(groups.with_ref_logprobs(sums), split))
    batching = Batching(global_batch=12, tokens_per_microbatch=tokens, max_steps=1)
    return GroupDataModule(*splits, batching, seed=3), tokenizer, chat


def make_module(tokenizer: Any, chat: Any, *loss: Any) -> SteerLM2Module:
    causal_lm = backbone().build(tokenizer, seed=5, lm_head=True)
    return SteerLM2Module(
        Policy(causal_lm, PolicySpec(chat, LIMITS, "toy")),
        loss=SteerLM2Loss(*loss),
        optimizer=partial(torch.optim.SGD, lr=0.0),
        gradient_clip=None,
    )


def step_gradient(cache: Path, tokens: int, *loss: Any, **options: Any) -> dict[str, torch.Tensor]:
    data, tokenizer, chat = make_data(cache, tokens)
    module = make_module(tokenizer, chat, *loss)
    fit(module, data, **options)
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def plain_loss(module: SteerLM2Module, groups: list[Any], by_length: bool) -> torch.Tensor:
    """D by its definition, one response at a time through transformers' own model."""
    model = AutoModelForCausalLM.from_config(module.model.causal_lm.config)
    model.set_attn_implementation("eager")
    state = dict(module.model.causal_lm.named_parameters())
    total = torch.zeros(())
    for group in groups:
        ratios = []
        for response, ref in zip(group.response_ids, group.ref_logprobs, strict=True):
            ids = torch.tensor([*group.prompt_ids.tolist(), *response.tolist()])
            output = torch.func.functional_call(model, state, kwargs={"input_ids": ids[None]})
            logits = output.logits[0, len(group.prompt_ids) - 1 : -1]
            places = torch.arange(len(response))
            logprob = logits.log_softmax(1)[places, ids[len(group.prompt_ids) :]].double().sum()
            ratios.append(logprob - float(ref))
        b = torch.stack(ratios).softmax(0)
        w = torch.tensor(group.rewards - group.ref_logprobs).double().softmax(0)
        distance = (w * (w / b).log()).sum()
        total = total + distance / (np.mean([len(ids) for ids in group.response_ids]) ** by_length)
    return total / len(groups)


@pytest.mark.parametrize("form", ["kl", "score"])
@pytest.mark.parametrize("normalisation", ["none", "group_mean"])
def test_gradient_is_that_of_the_stated_mean_however_it_is_cut(
    tmp_path: Path, form: str, normalisation: str
) -> None:
    data, tokenizer, chat = make_data(tmp_path, tokens=400)
    module = make_module(tokenizer, chat)
    groups = [data.train[int(i)] for i in data.plan(1).groups(0)]
    assert len({len(group.response_ids) for group in groups}) > 2
    plain_loss(module, groups, normalisation == "group_mean").backward()
    theirs = {name: p.grad for name, p in module.named_parameters()}
    for tokens in (1, 400, 100_000):
        assert relative(step_gradient(tmp_path, tokens, form, normalisation), theirs) <= 1e-5


def rank_gradient(cache: Path, path: Path, tokens: int) -> None:
    gradient = step_gradient(cache, tokens, devices=2, strategy="ddp")
    if torch.distributed.get_rank() == 0:
        torch.save(gradient, path)


@pytest.mark.slow
def test_step_gradient_does_not_depend_on_the_ranks(tmp_path: Path) -> None:
    whole = step_gradient(tmp_path, tokens=100_000)
    for rank in start_ranks(rank_gradient, tmp_path, tmp_path, tmp_path / "gradient.pt", 1):
        rank.join()
    assert relative(torch.load(tmp_path / "gradient.pt"), whole) <= 1e-5


@pytest.mark.parametrize("normalisation", ["none", "group_mean"])
def test_validation_is_one_set_of_figures_over_the_split(
    tmp_path: Path, normalisation: str
) -> None:
    figures = []
    for tokens in (1, 100_000):
        data, tokenizer, chat = make_data(tmp_path, tokens)
        module = make_module(tokenizer, chat, "score", normalisation)
        trainer = fit(module, data, limit_val_batches=1.0)
        figures.append({k: float(v) for k, v in trainer.callback_metrics.items()})
    assert figures[0] == pytest.approx(figures[1], rel=1e-4, abs=1e-5)
    assert data.validation is not None
    groups = [data.validation[i] for i in range(len(data.validation))]
    for name, by_length in (("loss", normalisation == "group_mean"), ("distance", False)):
        expected = float(plain_loss(module, groups, by_length).detach())
        assert figures[0][f"val/{name}"] == pytest.approx(expected, rel=1e-4)
    assert 0 < figures[0]["val/ess_share"] < 1 < figures[0]["val/ess"] < 5


def test_fillers_count_nothing_and_leave_no_rows(tmp_path: Path) -> None:
    data, tokenizer, chat = make_data(tmp_path, 1)
    module = make_module(tokenizer, chat)
    batch = pack([data.train[0], data.train[1]])
    assert module.count(batch) == 2
    filler = batch.as_filler()
    assert module.count(filler) == 0
    sums, logged = module.loss_sums(filler)
    assert not sums.any()
    assert not logged.any()
    sums.sum().backward()
    assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)
    assert [len(column) for column in module.validation_columns(filler)] == [0] * 5


def steerlm2(run_dir: Path, policy: str, reference: str, **options: Any) -> dict[str, Any]:
    """Arguments of a run on weighed groups."""
    data = options.pop("data", WeighedGroups())
    given = dpo(run_dir, policy, reference, **options) | {"data": data}
    given["config"]["module"]["kind"] = "steerlm2"
    keywords = given["module"].keywords
    module = partial(SteerLM2Module, **keywords | {"loss": SteerLM2Loss(), "warmup_steps": 4})
    return given | {"module": module}


@pytest.fixture(scope="module")
def weighed(policy: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the policy that training starts from says of the groups."""
    return refer(tmp_path_factory.mktemp("weighed"), policy, data=WeighedGroups())


def test_a_run_begins_at_the_proposal_and_nears_the_posterior(
    tmp_path: Path, policy: str, weighed: str
) -> None:
    options: dict[str, Any] = {"max_steps": 40, "validate_every": 40, "lr": 3e-3, "tokens": 2000}
    value = train(**steerlm2(tmp_path / "run", policy, weighed, **options))
    log = (tmp_path / "run/metrics.csv").read_text().splitlines()[1:]
    rows_by_name = {tuple(line.split(",")[:2]): float(line.split(",")[2]) for line in log}
    first = {name: rows_by_name["1", f"train/{name}"] for name in ("distance", "start_distance")}
    assert first["distance"] == pytest.approx(first["start_distance"], rel=1e-4)
    assert rows_by_name["1", "train/policy_ess_share"] == pytest.approx(1, abs=1e-5)
    assert rows_by_name["1", "train/kl_to_reference"] == pytest.approx(0, abs=1e-3)
    result = json.loads((tmp_path / "run/result.json").read_text())
    metrics = result["metrics"]
    assert value == metrics["val/loss"] == metrics["val/distance"]
    assert metrics["val/distance"] < 0.6 * metrics["val/start_distance"]
    report = result["data"]["train"]
    assert report["groups_weighed"] == report["groups"] == 40
    assert (tmp_path / "run/plots/weights.png").stat().st_size > 1000
    assert "SteerLM 2.0 loss" in (tmp_path / "run/export/README.md").read_text("utf-8")
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/export")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("one", "no group of the train data has two different responses"),
        ("none", r"20 of 40 groups of the train data lack the rewards.*'train-1'\): make groups "
                 "that have them with helpsteer2 weigh"),
    ],
)  # fmt: skip
def test_groups_that_teach_nothing_are_refused_before_the_model_is_built(
    tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch, change: str, message: str
) -> None:
    data = WeighedGroups(change=change)
    made = refer(tmp_path / "reference", policy, data=data)
    monkeypatch.setattr(PolicyStart, "build", lambda *_: pytest.fail("built"))
    with pytest.raises(UserError, match=message):
        train(**steerlm2(tmp_path / "run", policy, made, data=data))


def test_groups_of_one_and_of_equal_responses_are_left_out_and_counted(
    tmp_path: Path, policy: str
) -> None:
    data = WeighedGroups(change="some")
    made = refer(tmp_path / "reference", policy, data=data)
    train(**steerlm2(tmp_path / "run", policy, made, data=data))
    report = json.loads((tmp_path / "run/result.json").read_text())["data"]["train"]
    counts = {name: report[f"groups_{name}"] for name in ("of_one_response", "of_equal_responses")}
    assert counts == {"of_one_response": 10, "of_equal_responses": 10}
    assert report["groups_weighed"] == 20


@pytest.mark.parametrize(("scale", "level"), [(1.0, logging.INFO), (2000.0, logging.WARNING)])
def test_weights_of_one_response_alone_are_told_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scale: float, level: int
) -> None:
    tokenizer = backbone().tokenizer.build(lambda: iter(["red green blue sun moon"]), tmp_path)
    chat = ChatFormat().bind(tokenizer)
    groups = tokenise(WeighedGroups(scale=scale), "train", chat, LIMITS, (), tmp_path)
    sums = np.full(len(groups.rewards), -90, np.float32)
    with caplog.at_level(logging.INFO, "helpsteer2.modules.steerlm2"):
        SteerLM2Module.usable(groups.with_ref_logprobs(sums), "train")
    (record,) = caplog.records
    assert record.levelno == level
    weights = [group.rewards for group in WeighedGroups(scale=scale).read("train", None)]
    ess = []
    for of_group in weights:
        w = np.exp(np.array(of_group) - max(of_group))
        ess.append(w.sum() ** 2 / (w**2).sum())
    assert f"responses a prompt {np.mean(ess):.1f} count effectively" in record.getMessage()
    assert ("likelihood.concentration" in record.getMessage()) == (level == logging.WARNING)


def run_slowly(run_dir: Path, policy: str, reference: str, seconds: float) -> int:
    if seconds:
        slow_down(seconds)
    train(**steerlm2(run_dir, policy, reference, max_steps=12, validate_every=5))
    return 0


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, policy: str, weighed: str) -> None:
    def start(run_dir: Path, seconds: float = 0.0) -> Child:
        output = run_dir.with_suffix(".out")
        return Child(run_slowly, output, run_dir, policy, weighed, seconds)

    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    start(whole).join()
    target = random.uniform(0, rows(whole) - 12)
    child = start(run_dir, 0.02)
    child.wait_for(lambda: rows(run_dir) >= target)
    child.signal(signal.SIGKILL)
    child.process.join(60)
    assert child.process.exitcode == -signal.SIGKILL, child.text
    start(run_dir).join()
    assert_same_run(run_dir, whole)
