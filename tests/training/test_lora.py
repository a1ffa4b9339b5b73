"""Runs that train adapters: exact steps, small checkpoints, and the same end after a kill."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helpsteer2.callbacks.checkpoints import BEST, LAST, read_checkpoint
from helpsteer2.commands.train import train
from helpsteer2.errors import UserError
from helpsteer2.losses.regression import RegressionLoss
from helpsteer2.models.lora import Lora
from helpsteer2.models.reward import RewardModel, RewardSpec
from helpsteer2.modules.regression import RegressionModule
from tests.models.adapters import wake
from tests.training.runs import NAMES, arguments, backbone, start, start_ranks
from tests.training.test_resume import assert_same_run, rows
from tests.training.test_step import LIMITS, fit, make_data, relative

if importlib.util.find_spec("peft") is None:
    pytest.skip("peft is not installed", allow_module_level=True)

LORA = Lora(rank=4, target_modules="all-linear")
DROPPING = replace(LORA, dropout=0.2)


def make_module(
    tokenizer: Any, chat: Any, lora: Lora = LORA, seed: int = 5, dtype: Any = "float32"
) -> RegressionModule:
    model = replace(backbone(lora), dtype=dtype).build(tokenizer, seed=seed)
    wake(model)
    torch.manual_seed(7)
    spec = RewardSpec.of(NAMES, chat, tokenizer, LIMITS, "toy")
    return RegressionModule(
        RewardModel(model, spec),
        loss=RegressionLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.01),
        gradient_clip=None,
    )


def step_gradient(
    cache: Path,
    tokens: int,
    lora: Lora = LORA,
    dtype: Any = "float32",
    **options: Any,
) -> dict[str, torch.Tensor]:
    data, tokenizer, chat = make_data(cache, tokens)
    module = make_module(tokenizer, chat, lora, dtype=dtype)
    fit(module, data, **options)
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_step_gradient_does_not_depend_on_the_micro_batches(tmp_path: Path) -> None:
    whole = step_gradient(tmp_path, tokens=100_000)
    assert "model.head.weight" in whole
    assert all(".lora_" in name for name in whole if name != "model.head.weight")
    assert len(whole) == 1 + 2 * 7 * 2
    for tokens in (1, 150):
        assert relative(step_gradient(tmp_path, tokens), whole) <= 1e-5


def rank_gradient(cache: Path, path: Path) -> None:
    gradient = step_gradient(cache, tokens=150, devices=2, strategy="ddp")
    if torch.distributed.get_rank() == 0:
        torch.save(gradient, path)


@pytest.mark.slow
def test_step_gradient_does_not_depend_on_the_ranks(tmp_path: Path) -> None:
    whole = step_gradient(tmp_path, tokens=100_000)
    for rank in start_ranks(rank_gradient, tmp_path, tmp_path, tmp_path / "gradient.pt"):
        rank.join()
    assert relative(torch.load(tmp_path / "gradient.pt"), whole) <= 1e-5


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", "float32"), ("bf16-mixed", "bfloat16"), ("32-true", "bfloat16")],
)
def test_bf16_computes_near_the_same_gradient(tmp_path: Path, precision: str, dtype: str) -> None:
    exact = step_gradient(tmp_path, tokens=150)
    rounded = step_gradient(tmp_path, 150, precision=precision, dtype=dtype)
    assert all(gradient.dtype == torch.float32 for gradient in rounded.values())
    assert 0 < relative(rounded, exact) < 0.05


def test_what_is_dropped_follows_the_step_and_not_what_was_drawn_before(tmp_path: Path) -> None:
    gradients = []
    for drawn in (0, 3):
        data, tokenizer, chat = make_data(tmp_path, tokens=150)
        module = make_module(tokenizer, chat, DROPPING)
        torch.rand(drawn)
        fit(module, data)
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert relative(*gradients) == 0
    assert relative(step_gradient(tmp_path, 150, replace(LORA, dropout=0.0)), gradients[0]) > 0.01


def test_checkpoint_holds_what_trains_and_loads_whole(tmp_path: Path) -> None:
    data, tokenizer, chat = make_data(tmp_path, tokens=1000, max_steps=2)
    module = make_module(tokenizer, chat)
    fit(module, data).save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert checkpoint["state_dict"].keys() == trained
    other = make_module(tokenizer, chat)
    other.load_state_dict(checkpoint["state_dict"])  # strictly: nothing else may be missing
    assert all(
        torch.equal(p, q) for p, q in zip(module.parameters(), other.parameters(), strict=True)
    )
    del checkpoint["state_dict"]["model.head.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.weight"):
        other.load_state_dict(checkpoint["state_dict"])


def test_a_checkpoint_of_another_base_is_refused(tmp_path: Path) -> None:
    data, tokenizer, chat = make_data(tmp_path, tokens=1000)
    fit(make_module(tokenizer, chat), data).save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = read_checkpoint(tmp_path / "x.ckpt")
    make_module(tokenizer, chat).on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match=r"other frozen weights: backbone\.path"):
        make_module(tokenizer, chat, seed=6).on_load_checkpoint(checkpoint)


def test_a_run_trains_adapters_and_exports_a_plain_model(tmp_path: Path) -> None:
    train(**arguments(tmp_path / "run", max_steps=6, validate_every=3, lora=LORA))
    loaded, _, _ = RewardModel.from_pretrained(tmp_path / "run/export")
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["steps"] == 6
    for name in (LAST, BEST):
        weights = read_checkpoint(tmp_path / "run/checkpoints" / name)["state_dict"]
        assert all(".lora_" in key or key == "model.head.weight" for key in weights)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["regression", "sft"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, module: str) -> None:
    options: dict[str, Any] = {"lora": DROPPING, "module": module}
    whole = tmp_path / "whole/run"
    whole.parent.mkdir()
    start(whole, **options).join()
    (tmp_path / "killed").mkdir()
    shutil.copytree(whole.parent / "cache", tmp_path / "killed/cache")
    killed = tmp_path / "killed/run"
    target = random.uniform(2, rows(whole) - 2)
    child = start(killed, step_seconds=0.02, **options)
    child.wait_for(lambda: rows(killed) >= target)
    child.signal(signal.SIGKILL)
    child.process.join(60)
    assert not (killed / "result.json").exists()
    start(killed, **options).join()
    assert_same_run(killed, whole)
