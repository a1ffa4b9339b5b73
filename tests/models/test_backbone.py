"""Backbones are loaded whole, set up for packing, or refused with what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from helpsteer2.data.packing import pack
from helpsteer2.data.tokenizer import PretrainedTokenizer, TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.models.attention import packed_hidden_states
from helpsteer2.models.backbone import Backbone

from .packed_reference import SIZES, last_states_one_by_one, last_states_packed, make_groups

RANDOM = {**SIZES, "model_type": "llama"}
TRAINED = TrainedTokenizer(300)


def save_causal_lm(folder: Path, tokenizer: PreTrainedTokenizerFast, **options: object) -> Path:
    torch.manual_seed(5)
    config = AutoConfig.for_model("llama", **{**SIZES, "vocab_size": len(tokenizer), **options})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_random_weights_follow_the_seed_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    backbone = Backbone(TRAINED, init="random", config={**RANDOM, "vocab_size": 320})
    torch.manual_seed(1)
    first = backbone.build(tokenizer, seed=7)
    state = torch.random.get_rng_state()
    second = backbone.build(tokenizer, seed=7)
    assert torch.equal(state, torch.random.get_rng_state())
    other = backbone.build(tokenizer, seed=8)
    weights = [model.get_input_embeddings().weight for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.training


def test_random_weights_have_the_dtype_asked_for_from_the_first_bit(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = save_causal_lm(tmp_path, tokenizer, dtype="bfloat16")
    model = Backbone(TRAINED, path=str(folder), init="random").build(tokenizer, seed=7)
    weight = model.get_input_embeddings().weight
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("tied", [True, False])
def test_pretrained_weights_arrive_whole(
    tied: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = save_causal_lm(tmp_path, tokenizer, tie_word_embeddings=tied)
    model = Backbone(TRAINED, path=str(folder)).build(tokenizer, seed=0)
    plain = AutoModelForCausalLM.from_pretrained(folder).base_model
    groups = make_groups([2, 1])
    torch.testing.assert_close(
        last_states_packed(model, pack(groups)),
        last_states_one_by_one(plain, groups),
        atol=1e-5,
        rtol=1e-5,
    )


def test_gradient_checkpointing_changes_no_gradient(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = pack(make_groups([2, 3]))
    gradients = []
    for checkpointing in (False, True):
        config = {**RANDOM, "vocab_size": 320}
        backbone = Backbone(
            TRAINED, init="random", config=config, gradient_checkpointing=checkpointing
        )
        model = backbone.build(tokenizer, seed=7)
        packed_hidden_states(model, batch).square().sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_nothing_is_left_to_chance_in_training(tokenizer: PreTrainedTokenizerFast) -> None:
    # OPT calls it plainly `dropout`.
    config = {
        "model_type": "opt", "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512, "ffn_dim": 48,
        "word_embed_proj_dim": 32, "dropout": 0.5, "layerdrop": 0.5,
    }  # fmt: skip
    model = Backbone(TRAINED, init="random", config=config).build(tokenizer, seed=7)
    batch = pack(make_groups([2, 3]))
    first, second = (packed_hidden_states(model, batch) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"num_hidden_layers": 3}, r"layers\.2"), ({"intermediate_size": 16}, r"mlp\.down_proj")],
)
def test_the_checkpoint_of_another_backbone_is_refused(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: dict[str, int],
    named: str,
) -> None:
    folder = save_causal_lm(tmp_path, tokenizer)
    changed = Backbone(TRAINED, path=str(folder), config=change)
    with pytest.raises(UserError, match=f"lacks weights.*{named}.*checkpoint of another backbone"):
        changed.build(tokenizer, seed=0)
    assert "[transformers]" not in capfd.readouterr().err


def test_damaged_weights_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = save_causal_lm(tmp_path, tokenizer)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"the backbone .*cannot be loaded"):
        Backbone(TRAINED, path=str(folder)).build(tokenizer, seed=0)


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    small = Backbone(TRAINED, init="random", config={**RANDOM, "vocab_size": 50})
    with pytest.raises(UserError, match="do not belong"):
        small.build(tokenizer, seed=0)


def test_what_cannot_be_built_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"needs backbone\.path"):
        Backbone(TRAINED).build(tokenizer, seed=0)
    with pytest.raises(UserError, match="model_type"):
        Backbone(TRAINED, init="random").build(tokenizer, seed=0)
    with pytest.raises(UserError, match="cannot be loaded"):
        Backbone(TRAINED, path=str(tmp_path)).build(tokenizer, seed=0)


def test_a_misspelt_size_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    misspelt = Backbone(TRAINED, init="random", config={**RANDOM, "num_hiden_layers": 2})
    with pytest.raises(UserError, match=r"num_hiden_layers.*did you mean num_hidden_layers"):
        misspelt.build(tokenizer, seed=0)
    with pytest.raises(UserError, match=r"model_type=lama"):
        Backbone(TRAINED, init="random", config={"model_type": "lama"}).build(tokenizer, seed=0)


def test_a_hub_id_without_network_names_the_local_way(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"'meta-llama/Nothing-Here': .*; give a local folder"):
        Backbone(TRAINED, path="meta-llama/Nothing-Here").build(tokenizer, seed=0)


def test_a_missing_folder_is_not_looked_for_on_the_hub(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helpsteer2.models.backbone.hub_unreachable", None)
    with pytest.raises(UserError, match="gone' cannot be loaded: there is no such folder"):
        Backbone(TRAINED, path=str(tmp_path / "gone")).build(tokenizer, seed=0)


def test_the_real_small_model_loads(real_data: Path, tmp_path: Path) -> None:
    path = str(real_data / "tinystories_656k")
    tokenizer = PretrainedTokenizer(path).build(lambda: iter(()), tmp_path)
    model = Backbone(PretrainedTokenizer(path), path=path).build(tokenizer, seed=0)
    plain = AutoModelForCausalLM.from_pretrained(path).base_model
    groups = make_groups([2])
    torch.testing.assert_close(
        last_states_packed(model, pack(groups)),
        last_states_one_by_one(plain, groups),
        atol=1e-4,
        rtol=1e-4,
    )
