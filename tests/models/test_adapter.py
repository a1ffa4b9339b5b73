"""An exported adapter is the trained model: merged, in plain peft, and on its base again."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
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

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.commands import score
from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.groups import Group
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.packing import PackedBatch
from helpsteer2.data.tokenizer import PretrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.expo import open_parents
from helpsteer2.models.loading import open_reward
from helpsteer2.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, HEAD, Lora
from helpsteer2.models.reward import RewardModel, RewardSpec
from helpsteer2.models.start import RewardStart
from helpsteer2.rewards.scorer import RewardScorer
from tests.models.adapters import wake

if importlib.util.find_spec("peft") is None:
    pytest.skip("peft is not installed", allow_module_level=True)

Packed = Callable[[BoundChat], tuple[PackedBatch, list[list[int]]]]


def save_base(folder: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Path:
    """A causal LM as others publish them: its config has no pad token."""
    torch.manual_seed(options.pop("seed", 5))
    config = AutoConfig.for_model(
        "llama",
        **{
            "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "initializer_range": 0.2, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None, **options,
        },
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Trained:
    """A reward model with adapters that do something, and its export."""

    base: Path
    model: RewardModel
    export: Path
    batch: PackedBatch
    sequences: list[list[int]]

    @property
    def adapter(self) -> Path:
        return self.export / "adapter"

    def scores(self, model: RewardModel | None = None) -> torch.Tensor:
        with torch.inference_mode():
            return (model or self.model)(self.batch)


@pytest.fixture
def make_trained(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, packed: Packed
) -> Callable[..., Trained]:
    def make(base: Path | None = None, **options: Any) -> Trained:
        base = base or save_base(tmp_path / "base", tokenizer)
        settings = {
            "path": str(base),
            "lora": Lora(rank=4, alpha=8, target_modules="all-linear"),
            **options,
        }
        backbone = Backbone(PretrainedTokenizer(str(base)), **settings).build(tokenizer, seed=1)
        wake(backbone)
        chat = ChatFormat().bind(tokenizer)
        limits = LengthLimits(64, 48)
        spec = RewardSpec.of(HELPSTEER2_ATTRIBUTES, chat, tokenizer, limits, str(base))
        model = RewardModel(backbone, spec).eval()
        model.save_pretrained(tmp_path / "export", tokenizer)
        return Trained(base, model, tmp_path / "export", *packed(chat))

    return make


@pytest.fixture
def trained(make_trained: Callable[..., Trained]) -> Trained:
    return make_trained()


@torch.inference_mode()
def plain_scores(model: Any, sequences: list[list[int]], pad: int) -> torch.Tensor:
    longest = max(map(len, sequences)) + 2
    rows = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in sequences])
    return model.eval()(input_ids=rows, attention_mask=(rows != pad).long()).logits


def test_the_export_is_the_merged_model_in_plain_transformers(
    trained: Trained, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(trained.export)
    assert not any("lora" in name for name in plain.state_dict())
    scores = plain_scores(plain, trained.sequences, tokenizer.pad_token_id)
    torch.testing.assert_close(scores, trained.scores(), rtol=0, atol=1e-5)
    assert trained.scores().std(0).min() > 0.1  # equal scores would prove nothing


def test_plain_peft_loads_the_adapter_onto_its_base(
    trained: Trained, tokenizer: PreTrainedTokenizerFast
) -> None:
    from peft import PeftModel

    base = AutoModelForSequenceClassification.from_pretrained(trained.base, num_labels=5)
    base.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(base, trained.adapter)
    scores = plain_scores(model, trained.sequences, tokenizer.pad_token_id)
    torch.testing.assert_close(scores, trained.scores(), rtol=0, atol=1e-5)
    # And merged by peft itself.
    scores = plain_scores(model.merge_and_unload(), trained.sequences, tokenizer.pad_token_id)
    torch.testing.assert_close(scores, trained.scores(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("place", [".", "adapter"])
def test_the_code_on_both_cards_gives_our_scores(
    place: str,
    trained: Trained,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    folder = trained.export / place
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(Path("README.md").read_text().split("```python\n")[1].split("```")[0], names)
    (ours,) = RewardScorer.from_pretrained(folder, device="cpu").score(
        [Group("id", "here", ({"role": "user", "content": "What is 2+2?"},), ("4.",))]
    )
    torch.testing.assert_close(names["scores"], torch.from_numpy(ours), rtol=0, atol=1e-5)


def test_the_merged_card_names_its_adapter_but_no_path_of_the_author(trained: Trained) -> None:
    card = (trained.export / "README.md").read_text()
    assert "`adapter/`" in card
    assert str(trained.base) not in card


def test_the_adapter_card_tells_what_to_do_if_the_base_moved(trained: Trained) -> None:
    card = (trained.adapter / "README.md").read_text()
    assert "`base_model_name_or_path` in `adapter_config.json`" in card


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_scores_as_it_did_in_training(
    dtype: Any, make_trained: Callable[..., Trained]
) -> None:
    trained = make_trained(dtype=dtype)
    loaded, _, _ = RewardModel.from_pretrained(trained.adapter, dtype)
    assert not loaded.training
    assert torch.equal(trained.scores(loaded), trained.scores())


def test_a_loaded_adapter_can_be_exported_again(trained: Trained, tmp_path: Path) -> None:
    loaded, tokenizer, _ = RewardModel.from_pretrained(trained.adapter)
    loaded.save_pretrained(tmp_path / "again", tokenizer)
    again, _, _ = RewardModel.from_pretrained(tmp_path / "again/adapter")
    assert torch.equal(trained.scores(again), trained.scores())


def test_a_base_that_moved_is_given(trained: Trained) -> None:
    moved = trained.base.rename(trained.base.with_name("moved"))
    scorer = RewardScorer.from_pretrained(trained.adapter, device="cpu", base=moved)
    assert torch.equal(trained.scores(scorer.model), trained.scores())


@pytest.mark.parametrize("base", ["a folder", "someone/never-published-this"])
def test_a_base_that_is_gone_is_told_with_what_helps_every_command(
    base: str, trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    moved = trained.base.rename(trained.base.with_name("moved"))
    if base == "a folder":
        base = str(trained.base)
    else:
        edit_config(trained.adapter, base_model_name_or_path=base)
    with pytest.raises(UserError) as raised:
        RewardModel.from_pretrained(trained.adapter)
    message = str(raised.value)
    assert f"is an adapter of {base}, which cannot be used" in message
    assert f"base_model_name_or_path into {trained.adapter / ADAPTER_CONFIG}" in message
    assert f"give {trained.export}, the same model with the adapter merged" in message
    for option in ("base=", "--base", "backbone=", "backbone.path"):
        assert option not in message
    # Alone, there is no merged model to give.
    alone = shutil.copytree(trained.adapter, tmp_path / "alone")
    with pytest.raises(UserError, match=r"base_model_name_or_path into .*alone/[\w.]+$"):
        RewardModel.from_pretrained(alone)
    edit_config(alone, base_model_name_or_path=str(moved))
    loaded, _, _ = RewardModel.from_pretrained(alone)
    assert torch.equal(trained.scores(loaded), trained.scores())


def test_score_takes_the_base_that_the_adapter_names_now(
    trained: Trained,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    tmp_path: Path,
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "What is 2+2?", "response": "4."}\n')

    def scores() -> dict[str, float]:
        with rows.open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            options = ["--model", str(trained.adapter), "--weights", '{"helpfulness": 1}']
            assert score.main(options) == 0
        found: dict[str, float] = json.loads(capfdbinary.readouterr().out)["scores"]
        return found

    before = scores()
    moved = trained.base.rename(trained.base.with_name("moved"))
    with pytest.raises(UserError, match="write its path as base_model_name_or_path"):
        scores()
    edit_config(trained.adapter, base_model_name_or_path=str(moved))
    assert scores() == before
    # What is named is still held against the weights of the training.
    other = save_base(tmp_path / "other", tokenizer, seed=6)
    edit_config(trained.adapter, base_model_name_or_path=str(other))
    with pytest.raises(UserError, match="not the weights that it was trained beside"):
        scores()


def test_training_and_expo_name_the_merged_model_above_an_adapter(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = f"adapter holds an adapter only: give {trained.export}, the same model"
    with pytest.raises(UserError, match=merged):
        RewardStart(str(trained.adapter)).attributes(("helpfulness",))
    with pytest.raises(UserError, match=merged):
        open_parents(trained.adapter, trained.export)
    monkeypatch.chdir(trained.adapter)
    with pytest.raises(UserError, match=merged.removeprefix("adapter")):
        open_reward(".")
    # A folder above that holds something else is not it.
    alone = shutil.copytree(trained.adapter, trained.base / "adapter")
    with pytest.raises(UserError, match="merge it into its base"):
        open_reward(alone)
    shutil.copy(trained.export / "reward_model.json", trained.base)
    edit_json(trained.base / "reward_model.json", data="another training")
    with pytest.raises(UserError, match="merge it into its base"):
        open_reward(alone)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_hidden_layers": 1}, r"14 missing \(base_model\.model\.model\.layers\.1\."),
        ({"num_hidden_layers": 3}, r"14 without a tensor \(base_model\.model\.model\.layers\.2\."),
        ({"intermediate_size": 64}, r"6 of another shape \(.*mlp\.down_proj\.lora_A"),
        ({"hidden_size": 48, "num_attention_heads": 6}, "of another shape"),
        ({"seed": 6}, "not the weights that it was trained beside"),
    ],
)
def test_another_base_is_refused(
    options: dict[str, Any],
    reason: str,
    trained: Trained,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    other = save_base(tmp_path / "other", tokenizer, **options)
    with pytest.raises(UserError, match=rf"no adapter of .*other: .*{reason}"):
        RewardModel.from_pretrained(trained.adapter, base=other)


def test_a_base_of_other_layer_names_is_refused(
    trained: Trained, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    other, config = tmp_path / "other", AutoConfig.for_model(
        "gpt2", vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=256,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match=r"no adapter of .*other: .*q_proj"):
        RewardModel.from_pretrained(trained.adapter, base=other)


def without_head(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    del tensors[HEAD]
    save_file(tensors, folder / ADAPTER_WEIGHTS)


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_config(folder: Path, **values: Any) -> None:
    edit_json(folder / ADAPTER_CONFIG, **values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_head, "no reward head"),
        (lambda folder: (folder / "reward_model.json").unlink(), "merge it into its base"),
        (lambda folder: (folder / ADAPTER_CONFIG).write_text("{"), "is damaged"),
        (lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b"x" * 99), "is damaged"),
        (lambda folder: edit_config(folder, peft_type="IA3"), "only LORA"),
        (lambda folder: edit_config(folder, base_model_name_or_path=None), "does not say"),
        (lambda folder: (folder / "chat_template.jinja").write_text("x"), "chat template changed"),
    ],
)
def test_a_damaged_adapter_is_refused(
    damage: Callable[[Path], Any], message: str, trained: Trained
) -> None:
    damage(trained.adapter)
    with pytest.raises(UserError, match=message):
        RewardModel.from_pretrained(trained.adapter)


def test_a_base_for_a_whole_model_is_refused(trained: Trained) -> None:
    with pytest.raises(UserError, match="is a whole model"):
        RewardModel.from_pretrained(trained.export, base=trained.base)


@pytest.mark.parametrize(
    "options", [{"init": "random"}, {"config": {"rms_norm_eps": 1e-4}}], ids=["random", "changed"]
)
def test_adapters_of_a_base_that_nobody_has_are_only_merged(
    options: dict[str, Any],
    make_trained: Callable[..., Trained],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        trained = make_trained(**options)
    assert "no folder with the adapters alone" in caplog.text
    assert not trained.adapter.exists()
    assert "adapter" not in (trained.export / "README.md").read_text()
    loaded, _, _ = RewardModel.from_pretrained(trained.export)
    torch.testing.assert_close(trained.scores(loaded), trained.scores(), rtol=0, atol=1e-5)


def test_an_adapter_stands_alone(trained: Trained, tmp_path: Path) -> None:
    """Published by itself it scores, and its files are as readable as others."""
    alone = shutil.copytree(trained.adapter, tmp_path / "alone")
    shutil.rmtree(trained.export)
    loaded, _, _ = RewardModel.from_pretrained(alone)
    assert torch.equal(trained.scores(loaded), trained.scores())
    assert len({path.stat().st_mode for path in alone.iterdir()}) == 1


def test_training_goes_on_from_a_model_with_adapters(
    trained: Trained, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The base of the second adapter is the first export, whose head trains on."""
    first, _, chat = RewardModel.from_pretrained(trained.export)
    backbone = Backbone(PretrainedTokenizer(str(trained.base)), lora=Lora(rank=4))
    loaded = open_reward(trained.export).load(torch.float32, backbone.implementation("cpu", None))
    backbone.prepare(loaded.backbone, tokenizer, 3, str(trained.export))
    second = RewardModel(loaded.backbone, loaded.spec, loaded.head)
    assert torch.equal(trained.scores(second), trained.scores(first))
    assert second.head.weight.requires_grad
    wake(second)
    torch.nn.init.normal_(second.head.weight)
    second.save_pretrained(tmp_path / "second", chat.tokenizer)
    again, _, _ = RewardModel.from_pretrained(tmp_path / "second/adapter")
    assert torch.equal(trained.scores(again), trained.scores(second))
    assert not torch.equal(trained.scores(again), trained.scores(first))
