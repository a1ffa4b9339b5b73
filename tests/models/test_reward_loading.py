"""A folder that could silently give wrong scores is refused with what is wrong about it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.packing import PackedBatch
from helpsteer2.errors import UserError
from helpsteer2.models.attention import packed_hidden_states
from helpsteer2.models.reward import RewardModel

Export = tuple[Path, RewardModel]
Packed = Callable[[BoundChat], tuple[PackedBatch, list[list[int]]]]
ScoresOf = Callable[[Path], tuple[torch.Tensor, list[int], RewardModel]]


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes a key away."""
    values = {**json.loads(path.read_text()), **changes}
    gone = {key for key, value in changes.items() if value is None}
    path.write_text(json.dumps({key: values[key] for key in values.keys() - gone}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without_head(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("score.weight"))


def two_labels(folder: Path) -> None:
    (folder / "reward_model.json").unlink()
    edit_json(folder / "config.json", id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id=None)


def labels_of_another_model(folder: Path) -> None:
    edit_json(folder / "config.json", id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id=None)


def labels_in_another_order(folder: Path) -> None:
    labels = json.loads((folder / "config.json").read_text())["id2label"]
    edit_json(folder / "config.json", id2label={**labels, "0": labels["1"], "1": labels["0"]})


def pad_is_eos(folder: Path) -> None:
    edit_json(folder / "config.json", pad_token_id=2)


def pad_is_eos_of_the_tokenizer(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token="<|pad|>")


def no_pad(folder: Path) -> None:
    edit_json(folder / "config.json", pad_token_id=None)


def pads_differ(folder: Path) -> None:
    edit_json(folder / "config.json", pad_token_id=5)


def template_changed(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|end|>", "<|user|>"))


def template_changed_in_the_spec(folder: Path) -> None:
    edit_json(folder / "reward_model.json", template_text="{{ messages[-1]['content'] }}")


def tokenizer_changed(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def another_depth(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=3)


def fewer_layers(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=1)


def another_width(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=48)


def another_hidden_size(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_size=64)


def another_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="qwen3")


def unknown_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="never_heard_of")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def broken_spec(folder: Path) -> None:
    (folder / "reward_model.json").write_text('{"format_version": 1}')


def newer_spec(folder: Path) -> None:
    edit_json(folder / "reward_model.json", format_version=99)


def truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    no_weights(folder)


def missing_shard(folder: Path) -> None:
    no_weights(folder)
    index = {"weight_map": {"score.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter_only(folder: Path) -> None:
    no_weights(folder)
    (folder / "adapter_config.json").write_text("{}")


REFUSED = {
    without_head: r"no reward head \(score.weight\)",
    two_labels: "2 unnamed labels",
    labels_of_another_model: r"2 labels \(LABEL_0, LABEL_1\), reward_model.json has 5",
    labels_in_another_order: "belongs to another model",
    pad_is_eos: "end-of-sequence",
    pad_is_eos_of_the_tokenizer: "end-of-sequence",
    no_pad: "the pad token is gone",
    pads_differ: "pads with id 5, the tokenizer with 0",
    template_changed: "chat template changed",
    template_changed_in_the_spec: "chat template changed",
    tokenizer_changed: "the tokenizer changed",
    no_tokenizer: "no tokenizer",
    another_depth: "9 missing .*checkpoint of another backbone",
    fewer_layers: "9 unknown .*checkpoint of another backbone",
    another_width: "6 of another shape .*checkpoint of another backbone",
    another_hidden_size: r"the head is \(5, 32\), config.json wants \(5, 64\)",
    another_architecture: "4 missing .*checkpoint of another backbone",
    unknown_architecture: "config.json cannot be used.*never_heard_of",
    no_config: "config.json cannot be used",
    broken_config: "config.json cannot be used",
    broken_spec: "reward_model.json is damaged.*export again",
    newer_spec: "of format 99",
    truncated_weights: "damaged weights",
    no_weights: "no model.safetensors",
    pickled_weights: "pickled weights",
    missing_shard: "lacks model-00001-of-00001.safetensors",
    adapter_only: "adapter only: merge",
}


@pytest.mark.parametrize("damage", REFUSED, ids=lambda damage: damage.__name__)
def test_refused(damage: Callable[[Path], None], export: Export) -> None:
    folder, _ = export
    damage(folder)
    with pytest.raises(UserError, match=REFUSED[damage]) as raised:
        RewardModel.from_pretrained(folder)
    assert str(folder) in str(raised.value)


def test_a_language_model_is_refused(
    export: Export, make_model: Callable[..., RewardModel], tmp_path: Path
) -> None:
    config = make_model().backbone.config
    folder = tmp_path / "lm"
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(folder)
    for path in export[0].glob("tokenizer*"):
        shutil.copy(path, folder)
    with pytest.raises(UserError, match="no reward head"):
        RewardModel.from_pretrained(folder)


def test_an_encoder_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = AutoConfig.for_model(
        "bert", vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=1,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="encoder"):
        RewardModel.from_pretrained(tmp_path / "bert")


def test_an_encoder_with_a_head_called_score_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    test_folder = tmp_path / "bert"
    config = AutoConfig.for_model(
        "bert", vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=1,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(test_folder)
    tokenizer.save_pretrained(test_folder)
    edit_weights(test_folder, lambda t: t.update({"score.weight": torch.zeros(1, 32)}))
    with pytest.raises(UserError, match="BertForSequenceClassification is no decoder"):
        RewardModel.from_pretrained(test_folder)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "no-such-folder", "a/b/c", ""])
def test_no_such_folder(path: str) -> None:
    with pytest.raises(UserError):
        RewardModel.from_pretrained(path)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is a file"):
        RewardModel.from_pretrained(tmp_path / "model.safetensors")


def test_a_hub_id_without_network_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    with pytest.raises(UserError, match="local folder"):
        RewardModel.from_pretrained("someone/never-published-this")
    assert time.monotonic() - started < 5


def test_dropout_is_off(
    make_model: Callable[..., RewardModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_model()
    model.backbone.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path / "export", tokenizer)
    loaded, _, _ = RewardModel.from_pretrained(tmp_path / "export")
    assert loaded.backbone.config.attention_dropout == 0
    assert loaded.backbone.layers[0].self_attn.attention_dropout == 0


# ---- classifiers of others


@pytest.fixture
def make_foreign(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> Callable[..., tuple[Path, Any]]:
    """A folder as transformers writes it, without anything of ours."""

    def make(**options: Any) -> tuple[Path, Any]:
        torch.manual_seed(1)
        config = AutoConfig.for_model(
            "llama", vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
            max_position_embeddings=255,
            **{"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, **options},
        )  # fmt: skip
        model = AutoModelForSequenceClassification.from_config(config).eval()
        model.save_pretrained(tmp_path / "foreign")
        tokenizer.save_pretrained(tmp_path / "foreign")
        return tmp_path / "foreign", model

    return make


@pytest.fixture
def scores_of(packed: Packed) -> ScoresOf:
    """Scores of a folder's first conversation, its ids, and the model."""

    def scores(folder: Path) -> tuple[torch.Tensor, list[int], RewardModel]:
        model, _, chat = RewardModel.from_pretrained(folder)
        batch, sequences = packed(chat)
        with torch.inference_mode():
            return model(batch)[0], sequences[0], model

    return scores


@pytest.mark.parametrize("pad", [0, None])
def test_one_label_of_another_project(
    make_foreign: Callable[..., Any], scores_of: ScoresOf, pad: int | None
) -> None:
    folder, theirs = make_foreign(num_labels=1, pad_token_id=pad)
    score, ids, model = scores_of(folder)
    assert model.spec.attribute_names == ("score",)
    assert model.spec.weights is None
    assert model.spec.limits.max_prompt_tokens + model.spec.limits.max_response_tokens == 255
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], score, rtol=0, atol=1e-5)


def test_named_labels_of_another_project(
    make_foreign: Callable[..., Any], scores_of: ScoresOf
) -> None:
    folder, theirs = make_foreign(id2label={0: "helpful", 1: "safe"})
    score, ids, model = scores_of(folder)
    assert model.spec.attribute_names == ("helpful", "safe")
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], score, rtol=0, atol=1e-5)


def test_a_bias_in_the_head_is_kept(make_foreign: Callable[..., Any], scores_of: ScoresOf) -> None:
    folder, theirs = make_foreign(num_labels=1)
    edit_weights(folder, lambda tensors: tensors.update({"score.bias": torch.tensor([1.5])}))
    score, ids, _ = scores_of(folder)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0] + 1.5
    torch.testing.assert_close(expected, score, rtol=0, atol=1e-5)


def test_pad_equal_to_eos_is_refused_for_others_too(make_foreign: Callable[..., Any]) -> None:
    folder, _ = make_foreign(num_labels=1, pad_token_id=2)
    with pytest.raises(UserError, match="end-of-sequence"):
        RewardModel.from_pretrained(folder)


def test_a_foreign_model_without_template_uses_plain(
    make_foreign: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    folder, _ = make_foreign(num_labels=1)
    (folder / "chat_template.jinja").unlink()
    _, _, chat = RewardModel.from_pretrained(folder)
    assert chat.template_hash == ChatFormat("plain").bind(tokenizer).template_hash


def test_a_foreign_model_becomes_an_export(
    make_foreign: Callable[..., Any], scores_of: ScoresOf, tmp_path: Path
) -> None:
    folder, _ = make_foreign(num_labels=1)
    score, _, model = scores_of(folder)
    _, tokenizer, _ = RewardModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "ours", tokenizer)
    again, _, loaded = scores_of(tmp_path / "ours")
    assert torch.equal(again, score)
    assert loaded.spec.attribute_names == ("score",)


def test_weights_stay_where_transformers_finds_them_in_a_mixture_of_experts(
    make_model: Callable[..., RewardModel],
    tokenizer: PreTrainedTokenizerFast,
    packed: Packed,
    tmp_path: Path,
) -> None:
    """Its experts are renamed and stacked between disk and memory."""
    model = make_model("mixtral", num_local_experts=2)
    model.save_pretrained(tmp_path / "export", tokenizer)
    loaded, _, chat = RewardModel.from_pretrained(tmp_path / "export")
    batch = packed(chat)[0]
    with torch.inference_mode():
        torch.testing.assert_close(
            packed_hidden_states(loaded.backbone, batch),
            packed_hidden_states(model.backbone, batch),
        )
