"""Adapters start as nothing, train alone, and merge into what they were."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from helpsteer2.data.packing import pack
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.models.attention import packed_hidden_states
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.lora import Lora, frozen_fingerprint, merged
from tests.models.adapters import wake
from tests.models.packed_reference import SIZES, make_groups, relative_error

if importlib.util.find_spec("peft") is None:
    pytest.skip("peft is not installed", allow_module_level=True)

MakeBackbone = Callable[..., PreTrainedModel]
LLAMA = {**SIZES, "model_type": "llama", "vocab_size": 320}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}  # of GPT-2
EVERYWHERE = Lora(rank=4, alpha=8, target_modules="all-linear")


def states(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return packed_hidden_states(model, pack(make_groups([2, 3, 1])))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_new_adapters_change_nothing_and_woken_ones_do(
    model_type: str, make_backbone: MakeBackbone
) -> None:
    model = make_backbone(model_type, **NO_DROPOUT)
    kind, before = type(model), states(model)
    EVERYWHERE.inject(model, seed=1)
    assert type(model) is kind
    assert torch.equal(states(model), before)
    wake(model)
    assert (states(model) - before).abs().max() > 0.1


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])  # qwen2's projections have a bias
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_fast_layers_compute_what_those_of_peft_do(
    model_type: str, precision: str, make_backbone: MakeBackbone
) -> None:
    from peft.tuners.lora import Linear

    batch, results = pack(make_groups([2, 3])), []
    for fast in (True, False):
        model = make_backbone(model_type, initializer_range=0.05)
        if precision == "bfloat16":
            model.to(torch.bfloat16)
        EVERYWHERE.inject(model, seed=1)
        wake(model)
        for layer in model.modules():
            if isinstance(layer, Linear):
                assert "forward" in vars(layer)
                if not fast:
                    del layer.forward  # that of its class is there again
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            output = packed_hidden_states(model, batch).float()
        torch.manual_seed(4)
        (output * torch.randn_like(output)).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append({"output": output.detach(), **gradients})
    tolerance = 1e-5 if precision == "float32" else 0.05
    for name, theirs in results[1].items():
        assert theirs is not None
        assert relative_error(results[0][name], theirs) < tolerance, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_adapters_train_and_in_fp32(dtype: str, tokenizer: PreTrainedTokenizerFast) -> None:
    lora: Any = {"lora": EVERYWHERE, "dtype": dtype}
    backbone = Backbone(TrainedTokenizer(300), init="random", config=LLAMA, **lora)
    model = backbone.build(tokenizer, seed=7)
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        expected = torch.float32 if parameter.requires_grad else getattr(torch, dtype)
        assert parameter.dtype == expected, name
    wake(model)
    packed_hidden_states(model, pack(make_groups([2, 3]))).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.abs().max() > 0, name


def test_first_weights_follow_the_seed_alone(make_backbone: MakeBackbone) -> None:
    models = [make_backbone() for _ in range(3)]
    state = torch.random.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        EVERYWHERE.inject(model, seed)
    assert torch.equal(state, torch.random.get_rng_state())
    name = "layers.0.self_attn.q_proj.lora_A.default.weight"
    first, same, other = (model.get_parameter(name) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def adapted(model: nn.Module) -> set[str]:
    return {
        name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name
    }


def test_all_linear_is_every_linear_layer(make_backbone: MakeBackbone) -> None:
    model = make_backbone()
    linear = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    EVERYWHERE.inject(model, seed=0)
    assert adapted(model) == linear


def test_a_longer_name_chooses_one_layer(make_backbone: MakeBackbone) -> None:
    model = make_backbone()
    Lora(target_modules=["layers.1.self_attn.q_proj", "mlp.up_proj"]).inject(model, seed=0)
    ups = {f"layers.{i}.mlp.up_proj" for i in range(2)}
    assert adapted(model) == {"layers.1.self_attn.q_proj", *ups}


@pytest.mark.parametrize("wrong", ["q_prj", "proj", "embed_tokens", "layers"])
def test_a_misspelt_layer_is_refused_with_those_there_are(
    wrong: str, make_backbone: MakeBackbone
) -> None:
    with pytest.raises(UserError, match=rf"'{wrong}'.*down_proj, gate_proj, k_proj.*all-linear"):
        Lora(target_modules=["v_proj", wrong]).inject(make_backbone(), seed=0)


def test_a_misspelt_layer_is_refused_before_the_weights_are_read(
    make_backbone: MakeBackbone, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    make_backbone().config.save_pretrained(tmp_path)  # no weights there
    backbone = Backbone(
        TrainedTokenizer(300), path=str(tmp_path), lora=Lora(target_modules=["q_prj"])
    )
    with pytest.raises(UserError, match="did you mean q_proj"):
        backbone.build(tokenizer, seed=0)


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"target_modules": []}],
)
def test_values_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"lora.*{next(iter(wrong))}"):
        Lora(**wrong)


def test_without_peft_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'helpsteer2\[lora\]'"):
        Lora()


def test_dropout_is_that_of_the_adapters_alone_and_seeded(make_backbone: MakeBackbone) -> None:
    model = make_backbone()
    Lora(rank=4, dropout=0.5).inject(model, seed=0)
    wake(model)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(states(model.train()))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(states(model.eval()), states(model.eval()))


def test_gradient_checkpointing_changes_no_gradient(tokenizer: PreTrainedTokenizerFast) -> None:
    # No input of a layer needs a gradient: the embedding is frozen.
    batch, gradients = pack(make_groups([2, 3])), []
    for checkpointing in (False, True):
        backbone = Backbone(
            TrainedTokenizer(300), init="random", config=LLAMA,
            gradient_checkpointing=checkpointing, lora=EVERYWHERE,
        )  # fmt: skip
        model = backbone.build(tokenizer, seed=7)
        wake(model)
        packed_hidden_states(model, batch).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_merged_is_the_same_model_of_plain_layers(
    model_type: str, make_backbone: MakeBackbone
) -> None:
    plain = {name: type(part) for name, part in make_backbone(model_type).named_modules()}
    model = make_backbone(model_type, **NO_DROPOUT)
    EVERYWHERE.inject(model, seed=1)
    wake(model)
    parts, before = dict(model.named_modules()), states(model)
    with merged(model):
        assert {name: type(part) for name, part in model.named_modules()} == plain
        torch.testing.assert_close(states(model), before, rtol=0, atol=2e-5)
    assert dict(model.named_modules()) == parts
    assert torch.equal(states(model), before)


def test_adapters_come_back_after_an_error(make_backbone: MakeBackbone) -> None:
    model = make_backbone()
    EVERYWHERE.inject(model, seed=1)
    parts = dict(model.named_modules())
    with pytest.raises(OSError, match="full"), merged(model):
        raise OSError("the disk is full")
    assert dict(model.named_modules()) == parts


def test_merging_into_bf16_rounds_once(make_backbone: MakeBackbone) -> None:
    model = make_backbone().to(torch.bfloat16)
    EVERYWHERE.inject(model, seed=1)
    wake(model)
    layer: Any = model.get_submodule("layers.1.mlp.up_proj")
    with torch.no_grad():
        exact = layer.base_layer.weight.float()
        exact += 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    with merged(model):
        weight = model.get_parameter("layers.1.mlp.up_proj.weight")
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, exact.bfloat16())


def test_a_model_without_adapters_is_merged_already(make_backbone: MakeBackbone) -> None:
    model = make_backbone()
    parts = dict(model.named_modules())
    with merged(model):
        assert dict(model.named_modules()) == parts


def test_fingerprint_tells_bases_apart_whatever_their_type(make_backbone: MakeBackbone) -> None:
    assert frozen_fingerprint(make_backbone()) is None

    def fingerprint(change: Callable[[PreTrainedModel], Any], seed: int = 1) -> str | None:
        model = make_backbone()
        change(model)
        EVERYWHERE.inject(model, seed)
        wake(model)
        return frozen_fingerprint(model)

    same = fingerprint(lambda model: None)
    assert same is not None
    assert fingerprint(lambda model: model.to(torch.bfloat16), seed=2) == same
    assert fingerprint(lambda model: nn.init.zeros_(model.norm.weight)) != same


@pytest.mark.slow
def test_peft_is_imported_only_where_it_is_used() -> None:
    code = "import helpsteer2.commands.train, sys; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
