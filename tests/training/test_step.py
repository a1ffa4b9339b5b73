"""One optimizer step: exact whatever its cut, counted once, and stopped before it does harm."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.datamodule import Batching, GroupDataModule
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.packing import pack
from helpsteer2.data.tokenise import tokenise
from helpsteer2.losses.regression import RegressionLoss
from helpsteer2.models.reward import RewardModel, RewardSpec
from helpsteer2.modules.regression import RegressionModule
from helpsteer2.modules.step import NonFiniteError, decay_groups, rate_factor
from tests.training.runs import NAMES, ToyGroups, backbone, start_ranks

LIMITS = LengthLimits(64, 128)


def make_data(
    cache: Path, tokens: int, max_steps: int = 1, names: tuple[str, ...] = NAMES
) -> tuple[GroupDataModule, Any, Any]:
    tokenizer = backbone().tokenizer.build(lambda: iter(["red green blue sun moon"]), cache)
    chat = ChatFormat().bind(tokenizer)
    train, validation = (
        tokenise(ToyGroups(), split, chat, LIMITS, names, cache)
        for split in ("train", "validation")
    )
    batching = Batching(global_batch=12, tokens_per_microbatch=tokens, max_steps=max_steps)
    return GroupDataModule(train, validation, batching, seed=3), tokenizer, chat


def make_module(
    tokenizer: Any, chat: Any, names: tuple[str, ...] = NAMES, **options: Any
) -> RegressionModule:
    model = backbone().build(tokenizer, seed=5)
    torch.manual_seed(7)
    spec = RewardSpec.of(names, chat, tokenizer, LIMITS, "toy")
    settings: dict[str, Any] = {
        "loss": RegressionLoss({"verbosity": 0.5}),
        "optimizer": partial(torch.optim.SGD, lr=0.01),
        "gradient_clip": None,
    }
    return RegressionModule(RewardModel(model, spec), **settings | options)


def fit(module: RegressionModule, data: GroupDataModule, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        max_steps=data.total_steps, check_val_every_n_epoch=None,
        **{"devices": 1, "limit_val_batches": 0, "val_check_interval": 1} | options,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer


def step_gradient(cache: Path, tokens: int, **options: Any) -> dict[str, torch.Tensor]:
    data, tokenizer, chat = make_data(cache, tokens)
    module = make_module(tokenizer, chat)
    fit(module, data, **options)
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def rank_gradient(cache: Path, path: Path, tokens: int) -> None:
    gradient = step_gradient(cache, tokens, devices=2, strategy="ddp")
    if torch.distributed.get_rank() == 0:
        torch.save(gradient, path)


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    difference = sum((a[name] - b[name]).double().square().sum() for name in a)
    norm = sum(b[name].double().square().sum() for name in b)
    return math.sqrt(difference / norm)


def test_step_gradient_does_not_depend_on_the_micro_batches(tmp_path: Path) -> None:
    whole = step_gradient(tmp_path, tokens=100_000)
    for tokens in (1, 150, 400):
        cut = step_gradient(tmp_path, tokens)
        assert relative(cut, whole) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 400])
def test_step_gradient_does_not_depend_on_the_ranks(tmp_path: Path, tokens: int) -> None:
    whole = step_gradient(tmp_path, tokens=100_000)
    for rank in start_ranks(rank_gradient, tmp_path, tmp_path, tmp_path / "gradient.pt", tokens):
        rank.join()
    assert relative(torch.load(tmp_path / "gradient.pt"), whole) <= 1e-5


def test_gradient_is_that_of_the_stated_mean(tmp_path: Path) -> None:
    data, tokenizer, chat = make_data(tmp_path, tokens=150)
    ours = step_gradient(tmp_path, tokens=150)
    module = make_module(tokenizer, chat)
    squares, known = torch.zeros(()), 0
    for i in data.plan(1).groups(0):
        batch = pack([data.train[int(i)]])
        error = module.model(batch) - batch.attributes
        mask = ~batch.attributes.isnan()
        weight = torch.tensor([1.0, 0.5]).expand_as(error)
        squares = squares + (weight[mask] * error[mask] ** 2).sum()
        known += int(mask.sum())
    (squares / known).backward()
    assert relative(ours, {n: p.grad for n, p in module.named_parameters()}) <= 1e-5


def test_one_global_step_a_step_whatever_the_micro_batches(tmp_path: Path) -> None:
    data, tokenizer, chat = make_data(tmp_path, tokens=60, max_steps=4)
    assert len(data.plan(1).step(0)[0]) > 3
    module = make_module(tokenizer, chat)
    assert fit(module, data).global_step == 4
    assert module.groups_seen == 4 * 12


def test_what_was_seen_does_not_depend_on_the_micro_batches(tmp_path: Path) -> None:
    names = NAMES[:1]  # some groups have no rating of it
    for tokens in (1, 100_000):
        data, tokenizer, chat = make_data(tmp_path, tokens, max_steps=2, names=names)
        groups = np.concatenate([data.plan(1).groups(step) for step in range(2)])
        assert any(np.isnan(data.train[int(i)].attributes).all() for i in groups)
        module = make_module(tokenizer, chat, names, loss=RegressionLoss())
        fit(module, data)
        assert module.groups_seen == 24
        assert module.tokens_seen == data.train.lengths[groups].sum()


def test_warmup_is_linear_then_constant() -> None:
    assert [rate_factor(s, 4, "constant", 6) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [rate_factor(s, 0, "constant", 2) for s in range(2)] == [1, 1]
    assert [rate_factor(s, 1, "constant", 2) for s in range(2)] == [1, 1]


def test_linear_decay_reaches_zero_after_the_last_step() -> None:
    assert [rate_factor(s, 0, "linear", 4) for s in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert rate_factor(0, 2, "linear", 4) == 0.5


def test_each_step_runs_at_its_warmup_rate(tmp_path: Path) -> None:
    data, tokenizer, chat = make_data(tmp_path, tokens=1000, max_steps=5)
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rates.append(outputs["metrics"]["lr"])

    fit(make_module(tokenizer, chat, warmup_steps=3), data, callbacks=[Rates()])
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.01])


def test_biases_and_norms_do_not_decay_and_frozen_ones_are_left_out() -> None:
    module = nn.ModuleDict(
        {"embed": nn.Embedding(3, 4), "norm": nn.LayerNorm(4), "linear": nn.Linear(4, 5)}
    )
    module["frozen"] = nn.Linear(2, 2).requires_grad_(False)
    decayed, plain = decay_groups(module)
    assert "weight_decay" not in decayed
    assert plain["weight_decay"] == 0
    assert {tuple(p.shape) for p in decayed["params"]} == {(3, 4), (5, 4)}
    assert [tuple(p.shape) for p in plain["params"]] == [(4,), (4,), (5,)]
    assert len(decay_groups(nn.Linear(2, 2, bias=False))) == 1


def test_clipping_bounds_the_update_and_logs_the_norm_before_it(tmp_path: Path) -> None:
    data, tokenizer, chat = make_data(tmp_path, tokens=1000)
    module = make_module(
        tokenizer,
        chat,
        gradient_clip=0.1,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        warmup_steps=0,
    )
    before = torch.cat([p.detach().flatten().clone() for p in module.parameters()])
    trainer = fit(module, data)
    after = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.1, rel=1e-3)
    assert trainer.global_step == 1


def test_model_left_in_eval_is_trained_in_train_mode(tmp_path: Path) -> None:
    data, tokenizer, chat = make_data(tmp_path, tokens=1000)
    module = make_module(tokenizer, chat)
    module.eval()
    seen: list[bool] = []
    module.model.register_forward_hook(
        lambda model, *_: seen.append(all(m.training for m in model.modules()))
    )
    fit(module, data)
    assert seen
    assert all(seen)


def test_bf16_weights_are_cast_once_a_step_and_the_head_stays_fp32(tmp_path: Path) -> None:
    data, tokenizer, chat = make_data(tmp_path, tokens=150)
    micro_batches = len(data.plan(1).step(0)[0])
    assert micro_batches > 2
    module = make_module(tokenizer, chat)
    weight = next(p for n, p in module.named_parameters() if n.endswith("q_proj.weight"))
    hidden: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []
    casts: list[int] = []

    def keep(_, inputs, output):
        hidden.append(inputs[0].detach())
        scores.append(output.detach())

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].data_ptr() == weight.data_ptr():
                casts.append(1)
            return func(*args, **(kwargs or {}))

    module.model.head.register_forward_hook(keep)
    with Casts():
        fit(module, data, precision="bf16-mixed")
    assert len(hidden) == micro_batches
    assert len(casts) == 1
    assert hidden[0].dtype == scores[0].dtype == torch.float32
    # The head's gradient from its own inputs and outputs, in fp32: bf16 would be off by 1e-3.
    expected = torch.zeros_like(module.model.head.weight)
    known = 0
    for batch_hidden, batch_scores, batch in zip(
        hidden, scores, data.plan(1).step(0)[0], strict=True
    ):
        ratings = torch.cat([torch.from_numpy(data.train[i].attributes) for i in batch.groups])
        mask = ~ratings.isnan()
        known += int(mask.sum())
        error = torch.where(mask, batch_scores - ratings.nan_to_num(), 0.0)
        expected += (2 * error * torch.tensor([1.0, 0.5])).T @ batch_hidden
    assert module.model.head.weight.grad is not None
    assert torch.allclose(module.model.head.weight.grad, expected / known, rtol=1e-5, atol=1e-6)


def test_recomputed_layers_have_the_same_gradients_under_bf16(tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        data, tokenizer, chat = make_data(tmp_path, tokens=150)
        module = make_module(tokenizer, chat)
        if checkpointing:
            module.model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        fit(module, data, precision="bf16-mixed")
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    assert relative(*gradients) <= 1e-6


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_non_finite_step_is_not_applied(tmp_path: Path, poison: str) -> None:
    data, tokenizer, chat = make_data(tmp_path, tokens=150, max_steps=3)
    module = make_module(tokenizer, chat)
    if poison == "loss":
        module.model.head.weight.data[0, 0] = math.inf
    else:
        weight = module.model.head.weight
        weight.register_hook(lambda gradient: torch.full_like(gradient, math.nan))
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(NonFiniteError, match="step 0 "):
        fit(module, data)
    after = list(module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_checkpoint_holds_each_weight_once_and_plain_data(tmp_path: Path) -> None:
    data, tokenizer, chat = make_data(tmp_path, tokens=1000, max_steps=2)
    module = make_module(tokenizer, chat, optimizer=partial(torch.optim.AdamW, lr=0.01))
    trainer = fit(module, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert len(checkpoint["state_dict"]) == len(list(module.parameters()))
    assert not checkpoint.get("hyper_parameters")


def test_validation_is_one_mean_over_the_split(tmp_path: Path) -> None:
    figures = []
    for tokens in (1, 100_000):
        data, tokenizer, chat = make_data(tmp_path, tokens)
        module = make_module(tokenizer, chat, optimizer=partial(torch.optim.SGD, lr=0.0))
        trainer = fit(module, data, limit_val_batches=1.0)
        figures.append({k: float(v) for k, v in trainer.callback_metrics.items()})
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    batch = pack([data.validation[i] for i in range(len(data.validation))])
    with torch.no_grad():
        error = (module.model(batch) - batch.attributes) ** 2 * torch.tensor([1.0, 0.5])
    assert figures[0]["val/loss"] == pytest.approx(error.nanmean().item(), rel=1e-5)
    columns = batch.attributes[:, 1].numpy(), module.model(batch)[:, 1].detach().numpy()
    assert figures[0]["val/verbosity/pearson"] == pytest.approx(
        np.corrcoef(*columns)[0, 1], rel=1e-4
    )
