"""Supervised fine-tuning: exact steps, figures a token, unrated data, and a policy that learned."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpsteer2.commands.train import train
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.datamodule import Batching, GroupDataModule
from helpsteer2.data.groups import Group
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.packing import pack
from helpsteer2.data.tokenise import tokenise
from helpsteer2.losses.sft import SFTLoss
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec
from helpsteer2.modules.sft import SFTModule
from tests.training.runs import ToyGroups, arguments, backbone, start_ranks
from tests.training.runs import run as run_command
from tests.training.test_step import LIMITS, fit, relative


def make_data(cache: Path, tokens: int, max_steps: int = 1) -> tuple[GroupDataModule, Any, Any]:
    tokenizer = backbone().tokenizer.build(lambda: iter(["red green blue sun moon"]), cache)
    chat = ChatFormat().bind(tokenizer)
    splits = (
        tokenise(ToyGroups(), split, chat, LIMITS, (), cache, close_cut=False)
        for split in ("train", "validation")
    )
    batching = Batching(global_batch=12, tokens_per_microbatch=tokens, max_steps=max_steps)
    return GroupDataModule(*splits, batching, seed=3), tokenizer, chat


def make_module(tokenizer: Any, chat: Any, **options: Any) -> SFTModule:
    causal_lm = backbone().build(tokenizer, seed=5, lm_head=True)
    settings: dict[str, Any] = {
        "loss": SFTLoss(),
        "optimizer": partial(torch.optim.SGD, lr=0.01),
        "gradient_clip": None,
    }
    return SFTModule(Policy(causal_lm, PolicySpec(chat, LIMITS, "toy")), **settings | options)


def step_gradient(cache: Path, tokens: int, **options: Any) -> dict[str, torch.Tensor]:
    data, tokenizer, chat = make_data(cache, tokens)
    module = make_module(tokenizer, chat)
    fit(module, data, **options)
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def rank_gradient(cache: Path, path: Path, tokens: int) -> None:
    gradient = step_gradient(cache, tokens, devices=2, strategy="ddp")
    if torch.distributed.get_rank() == 0:
        torch.save(gradient, path)


def plain_nll(module: SFTModule, groups: list[Any]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Sum of −log p, tokens guessed right, and their number, one response at a time."""
    total, greedy, n = torch.zeros(()), torch.zeros(()), 0
    model = AutoModelForCausalLM.from_config(module.model.causal_lm.config)
    model.set_attn_implementation("eager")
    state = dict(module.model.causal_lm.named_parameters())
    for group in groups:
        for response in group.response_ids:
            ids = torch.tensor([*group.prompt_ids.tolist(), *response.tolist()])
            output = torch.func.functional_call(model, state, kwargs={"input_ids": ids[None]})
            logits = output.logits[0, len(group.prompt_ids) - 1 : -1]
            targets = ids[len(group.prompt_ids) :]
            total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            greedy = greedy + (logits.argmax(dim=1) == targets).sum()
            n += len(targets)
    return total, greedy, n


def test_step_gradient_does_not_depend_on_the_micro_batches(tmp_path: Path) -> None:
    whole = step_gradient(tmp_path, tokens=100_000)
    for tokens in (1, 400):
        assert relative(step_gradient(tmp_path, tokens), whole) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 400])
def test_step_gradient_does_not_depend_on_the_ranks(tmp_path: Path, tokens: int) -> None:
    whole = step_gradient(tmp_path, tokens=100_000)
    for rank in start_ranks(rank_gradient, tmp_path, tmp_path, tmp_path / "gradient.pt", tokens):
        rank.join()
    assert relative(torch.load(tmp_path / "gradient.pt"), whole) <= 1e-5


def test_gradient_is_that_of_the_mean_over_tokens(tmp_path: Path) -> None:
    data, tokenizer, chat = make_data(tmp_path, tokens=150)
    module = make_module(tokenizer, chat)
    groups = [data.train[int(i)] for i in data.plan(1).groups(0)]
    total, _, n = plain_nll(module, groups)
    (total / n).backward()
    theirs = {name: p.grad for name, p in module.named_parameters()}
    assert relative(step_gradient(tmp_path, tokens=150), theirs) <= 1e-5


@dataclass(frozen=True)
class Conversations:
    """Conversations of one to four answers, whole with every answer marked, or cut at each."""

    # Room for the longest: where turns are dropped, their answers cannot be learned.
    LIMITS: ClassVar[LengthLimits] = LengthLimits(512, 128)

    whole: bool
    attribute_names: tuple[str, ...] = ()

    def read(self, split: str, report: Any) -> Iterator[Group]:
        for i in range(4):
            turns: list[Any] = [{"role": "system", "content": "red green"}] * (i % 2)
            for k in range(i + 1):
                question = {"role": "user", "content": " ".join(["blue sun"] * (k + 1))}
                answer = " ".join(["moon red"] * (i + k + 1))
                if not self.whole or k == i:
                    prompt = (*turns, question)
                    yield Group(id=f"{i}.{k}", source="here:1", prompt=prompt, responses=(answer,))
                said = {"role": "assistant", "content": answer}
                turns += [question, {**said, "train": True} if self.whole else said]

    def fingerprint(self, split: str) -> str:
        return f"{self.whole} {split}"


@pytest.mark.parametrize("template", ["auto", "plain"])
def test_a_conversation_teaches_what_its_answers_teach_one_by_one(
    tmp_path: Path, template: str
) -> None:
    results = []
    for whole in (True, False):
        tokenizer = backbone().tokenizer.build(lambda: iter(["red green blue sun moon"]), tmp_path)
        chat = ChatFormat(template).bind(tokenizer)
        source, limits = Conversations(whole), Conversations.LIMITS
        groups = tokenise(source, "train", chat, limits, (), tmp_path, close_cut=False)
        batch = pack([groups[i] for i in range(len(groups))])
        module = make_module(tokenizer, chat)
        sums, logged = module.loss_sums(batch)
        sums.sum().backward()
        gradient = {name: p.grad for name, p in module.named_parameters()}
        results.append((len(groups), module.count(batch), sums.detach(), logged, gradient))
    (n, count, loss, logged, gradient), (n_alone, count_alone, loss_alone, *alone) = results
    assert (n, n_alone) == (4, 10)
    assert torch.equal(count, count_alone)
    assert torch.equal(logged, alone[0])
    torch.testing.assert_close(loss, loss_alone, rtol=1e-5, atol=0)
    assert relative(gradient, alone[1]) <= 1e-5


def test_validation_learns_of_answers_inside_prompts(tmp_path: Path) -> None:
    figures = []
    for whole in (True, False):
        data, tokenizer, chat = make_data(tmp_path, 100_000)
        source, limits = Conversations(whole), Conversations.LIMITS
        data.validation = tokenise(
            source, "validation", chat, limits, (), tmp_path, close_cut=False
        )
        module = make_module(tokenizer, chat, optimizer=partial(torch.optim.SGD, lr=0.0))
        trainer = fit(module, data, limit_val_batches=1.0)
        figures.append({k: float(v) for k, v in trainer.callback_metrics.items()})
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_a_random_model_is_as_surprised_as_chance(tmp_path: Path) -> None:
    train(**arguments(tmp_path / "run", module="sft", max_steps=1, validate_every=None,
                      optimized_metric=None))  # fmt: skip
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()
    [loss] = [float(row.split(",")[2]) for row in rows if row.startswith("1,train/loss,")]
    assert loss == pytest.approx(math.log(270), abs=0.05)


def test_validation_is_one_mean_over_the_tokens_of_the_split(tmp_path: Path) -> None:
    figures = []
    for tokens in (1, 100_000):
        data, tokenizer, chat = make_data(tmp_path, tokens)
        module = make_module(tokenizer, chat, optimizer=partial(torch.optim.SGD, lr=0.0))
        trainer = fit(module, data, limit_val_batches=1.0)
        figures.append({k: float(v) for k, v in trainer.callback_metrics.items()})
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    groups = [data.validation[i] for i in range(len(data.validation))]
    with torch.no_grad():
        total, greedy, n = plain_nll(module, groups)
    assert figures[0]["val/loss"] == pytest.approx(float(total) / n, rel=1e-5)
    assert figures[0]["val/perplexity"] == pytest.approx(math.exp(float(total) / n), rel=1e-4)
    assert figures[0]["val/token_accuracy"] == pytest.approx(float(greedy) / n, rel=1e-5)


def test_validation_does_not_count_fillers(tmp_path: Path) -> None:
    data, tokenizer, chat = make_data(tmp_path, 1)
    module = make_module(tokenizer, chat)
    batch = pack([data.validation[0]])
    counted, fillers = map(module.validation_columns, (batch, batch.as_filler()))
    assert len(counted[0]) == 2
    assert all(len(column) == 0 for column in fillers)


@dataclass(frozen=True)
class Unrated(ToyGroups):
    """The same few groups, of which nothing is known but their texts."""

    n: int = 6
    attribute_names: tuple[str, ...] = ()

    def read(self, split: str, report: Any) -> Iterator[Group]:
        more = ("red",) if split == "train" else ()  # or else it would be the same groups
        for group in super().read("train", report):
            texts = group.responses + more
            yield replace(group, responses=texts, attributes=None, preference_strength=None)


def test_a_policy_learns_unrated_texts_by_heart_and_is_exported(tmp_path: Path, capsys) -> None:
    options: dict[str, Any] = {"module": "sft", "max_steps": 60, "lr": 2e-2, "tokens": 1000}
    options |= {"validate_every": 60, "checkpoint_every": 60}
    run = arguments(tmp_path / "run", **options) | {"data": Unrated(), "attributes": []}
    value = train(**run)
    metrics = json.loads((tmp_path / "run/result.json").read_text())["metrics"]
    assert metrics["val/loss"] == value < 2.7 < math.log(270)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(value), rel=1e-5)
    shown = capsys.readouterr().out
    assert "token_accuracy" in shown
    assert "helpsteer2 evaluate" not in shown  # that is for reward models
    # Plain transformers sees the policy that was validated.
    folder = tmp_path / "run/export"
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = ChatFormat().bind(AutoTokenizer.from_pretrained(folder))
    total, n = 0.0, 0
    for group in Unrated().read("validation", None):
        prompt = chat.prompt_ids(group.prompt)
        for response in group.responses:
            ids = torch.tensor(prompt + chat.response_ids(group.prompt, response)[0])
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
            total += float(
                torch.nn.functional.cross_entropy(logits, ids[len(prompt) :], reduction="sum")
            )
            n += len(ids) - len(prompt)
    assert total / n == pytest.approx(value, rel=1e-5)


def test_bf16_training_keeps_fp32_weights_and_losses(tmp_path: Path) -> None:
    train(**arguments(tmp_path / "run", module="sft", max_steps=3, precision="bf16-mixed"))
    exact = arguments(tmp_path / "exact", module="sft", max_steps=3)
    result = json.loads((tmp_path / "run/result.json").read_text())["metrics"]
    assert train(**exact) == pytest.approx(result["val/loss"], abs=0.02)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export")
    assert model.dtype == torch.float32


@pytest.mark.slow
def test_two_ranks_give_the_run_of_one(tmp_path: Path) -> None:
    options = {"module": "sft", "max_steps": 4, "tokens": 100}
    for rank in start_ranks(run_command, tmp_path, tmp_path / "two", {**options, "devices": 2}):
        rank.join()
    value = train(**arguments(tmp_path / "one", **options))
    result = json.loads((tmp_path / "two/result.json").read_text())
    assert result["metrics"]["val/loss"] == pytest.approx(value, rel=1e-4)
    assert result["metrics"]["train/token_accuracy"] == pytest.approx(
        json.loads((tmp_path / "one/result.json").read_text())["metrics"]["train/token_accuracy"]
    )
