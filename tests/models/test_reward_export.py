"""An exported reward model is the same model: for us and for plain transformers."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.packing import PackedBatch
from helpsteer2.errors import UserError
from helpsteer2.models import export as export_module
from helpsteer2.models.reward import RewardModel, RewardSpec
from tests.full_disk import largest_file

Export = tuple[Path, RewardModel]
MakeModel = Callable[..., RewardModel]
Packed = Callable[[BoundChat], tuple[PackedBatch, list[list[int]]]]
PackedScores = Callable[[RewardModel, BoundChat], torch.Tensor]


@pytest.fixture
def packed_scores(packed: Packed) -> PackedScores:
    def scores(model: RewardModel, chat: BoundChat) -> torch.Tensor:
        with torch.inference_mode():
            return model(packed(chat)[0])

    return scores


@torch.inference_mode()
def plain_scores(
    model: Any, sequences: list[list[int]], pad: int, side: str, batch_size: int
) -> torch.Tensor:
    scores = []
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        longest = max(map(len, batch)) + 3  # pads even in batches of one
        rows, masks = [], []
        for ids in batch:
            pads, ones = [pad] * (longest - len(ids)), [1] * len(ids)
            zeros = [0] * len(pads)
            rows.append(pads + ids if side == "left" else ids + pads)
            masks.append(zeros + ones if side == "left" else ones + zeros)
        output = model(input_ids=torch.tensor(rows), attention_mask=torch.tensor(masks))
        scores.append(output.logits.float())
    return torch.cat(scores)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_transformers_gives_the_same_scores(
    model_type: str,
    side: str,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    packed_scores: PackedScores,
    packed: Packed,
) -> None:
    model = make_model(model_type)
    chat = ChatFormat().bind(tokenizer)
    model.save_pretrained(tmp_path / "export", tokenizer)
    ours = packed_scores(model, chat)
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "export", dtype=torch.float32
    ).eval()
    sequences = packed(chat)[1]
    for batch_size in (1, 2, 6):
        theirs = plain_scores(plain, sequences, tokenizer.pad_token_id, side, batch_size)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert ours.std(0).min() > 0.1  # equal scores would prove nothing


def test_loading_gives_back_the_very_same_model(
    export: Export,
    make_model: MakeModel,
    packed_scores: PackedScores,
) -> None:
    folder, model = export
    loaded, _, chat = RewardModel.from_pretrained(folder)
    assert not loaded.training
    assert loaded.head.weight.dtype == torch.float32
    assert torch.equal(packed_scores(loaded, chat), packed_scores(model, chat))
    assert replace(loaded.spec, tokenizer_hash=model.spec.tokenizer_hash) == model.spec


def test_an_export_can_be_exported_again(
    export: Export,
    tmp_path: Path,
    packed_scores: PackedScores,
) -> None:
    loaded, tokenizer, chat = RewardModel.from_pretrained(export[0])
    loaded.save_pretrained(tmp_path / "second", tokenizer)
    again, _, _ = RewardModel.from_pretrained(tmp_path / "second")
    assert torch.equal(packed_scores(again, chat), packed_scores(loaded, chat))
    assert again.spec == loaded.spec


def test_config_says_what_the_scores_are(
    export: Export, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = json.loads((export[0] / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert [config["id2label"][str(i)] for i in range(5)] == list(HELPSTEER2_ATTRIBUTES)
    assert config["problem_type"] == "regression"
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert "auto_map" not in config
    assert "helpsteer2" not in json.dumps(config)  # our attention is none of transformers' business


def test_bf16_body_keeps_an_fp32_head(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    packed_scores: PackedScores,
    packed: Packed,
) -> None:
    model = make_model()
    exact = packed_scores(model, ChatFormat().bind(tokenizer))
    model.backbone.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "export", tokenizer)
    assert json.loads((tmp_path / "export/config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "export/model.safetensors", "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert dtypes.pop("score.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    loaded, _, chat = RewardModel.from_pretrained(tmp_path / "export", "bfloat16")
    assert torch.equal(loaded.head.weight, model.head.weight)
    scores = packed_scores(loaded, chat)
    assert scores.dtype == torch.float32
    # In bf16 itself: ours against plain transformers, whose head is rounded as well.
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "export", dtype=torch.bfloat16
    ).eval()
    theirs = plain_scores(plain, packed(chat)[1], tokenizer.pad_token_id, "right", 2)
    # Largest difference over eight seeds, as a share of the scores' standard deviation: 0.095 to
    # fp32 and 0.071 to plain bf16 at these (large) weights; 0.018 and 0.023 at std 0.02.
    assert (scores - exact).abs().max() < 0.15 * exact.std()
    assert (theirs - scores).abs().max() < 0.15 * exact.std()


def test_forward_is_fp32_under_autocast(
    export: Export,
    packed_scores: PackedScores,
) -> None:
    loaded, _, chat = RewardModel.from_pretrained(export[0])
    exact = packed_scores(loaded, chat)
    with torch.autocast("cpu", torch.bfloat16):
        scores = packed_scores(loaded, chat)
    assert scores.dtype == torch.float32
    # A bf16 head would leave 8 bits of every score.
    assert not torch.equal(scores, scores.bfloat16().float())
    assert (scores - exact).abs().max() < 0.1 * exact.std()


def test_large_models_are_cut_into_shards(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packed_scores: PackedScores,
) -> None:
    monkeypatch.setattr(export_module, "SHARD_SIZE", "40KB")
    model = make_model()
    model.save_pretrained(tmp_path / "export", tokenizer)
    assert len(list((tmp_path / "export").glob("model-*-of-*.safetensors"))) > 1
    loaded, _, chat = RewardModel.from_pretrained(tmp_path / "export")
    assert torch.equal(packed_scores(loaded, chat), packed_scores(model, chat))


def test_template_and_limits_come_back(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_model(chat=ChatFormat("extra_id", "Be kind."))
    model.save_pretrained(tmp_path / "export", tokenizer)
    _, _, chat = RewardModel.from_pretrained(tmp_path / "export")
    messages = [{"role": "user", "content": "Hi"}]
    expected = ChatFormat("extra_id", "Be kind.").bind(tokenizer)
    assert chat.template_name == "extra_id"
    assert chat.prompt_ids(messages) == expected.prompt_ids(messages)
    assert chat.response_ids(messages, "Yo") == expected.response_ids(messages, "Yo")


@pytest.mark.parametrize("template", ["auto", "plain", "extra_id"])
def test_the_code_on_the_model_card_gives_our_scores(
    template: str,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system = 'Say "please".' if template == "extra_id" else None
    model = make_model(chat=ChatFormat(template, system))
    model.save_pretrained(tmp_path / "export", tokenizer)
    card = (tmp_path / "export/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "export")
    names: dict[str, Any] = {}
    exec(code, names)
    chat = ChatFormat(template, system).bind(tokenizer)
    messages = [{"role": "user", "content": "What is 2+2?"}]
    ids = chat.prompt_ids(messages) + chat.response_ids(messages, "4.")[0]
    assert names["ids"].tolist() == [ids]
    plain = AutoModelForSequenceClassification.from_pretrained(".", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(torch.tensor([ids])).logits, names["scores"])


def test_card_says_what_is_known_and_what_is_not(export: Export) -> None:
    card = (export[0] / "README.md").read_text()
    spec = RewardSpec.read(export[0])
    assert spec is not None
    for known in (
        "made-up rows",
        spec.template_hash,
        "`two`: helpfulness 0.65, verbosity -0.4",
        "4.000",
    ):
        assert known in card
    assert "Objective: not recorded" in card
    for name in HELPSTEER2_ATTRIBUTES:
        assert name in card


def test_an_attribute_without_ratings_has_no_mean(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_model()
    model.spec = replace(model.spec, rating_means=(math.nan, 1.0, 2.0, 3.0, 4.0))
    model.save_pretrained(tmp_path / "export", tokenizer)
    assert "NaN" not in (tmp_path / "export/reward_model.json").read_text()  # which is no JSON
    assert "| 0 | helpfulness | no ratings |" in (tmp_path / "export/README.md").read_text()
    loaded, _, _ = RewardModel.from_pretrained(tmp_path / "export")
    assert loaded.spec.rating_means is not None
    assert math.isnan(loaded.spec.rating_means[0])
    assert loaded.spec.rating_means[1:] == (1.0, 2.0, 3.0, 4.0)


def test_a_card_holds_no_path_of_the_author(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    chat, limits = ChatFormat().bind(tokenizer), LengthLimits(9, 9)
    spec = RewardSpec.of(("a",), chat, tokenizer, limits, "/home/jane/llama")
    assert spec.base_model == "llama"
    assert RewardSpec.of(("a",), chat, tokenizer, limits, "meta/llama").base_model == "meta/llama"


# ---- writing that fails


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_write_that_fails_leaves_the_old_export(
    export: Export, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder, _ = export
    before = contents(folder)
    with largest_file(20_000), pytest.raises(UserError, match="untouched"):
        make_model(num_hidden_layers=3).save_pretrained(folder, tokenizer)
    assert contents(folder) == before
    assert os.listdir(folder.parent) == [folder.name]  # nothing half-written is left behind


@pytest.mark.parametrize("at", ["weights", "card", "sync"])
def test_a_full_disk_leaves_the_old_export(
    at: str,
    export: Export,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder, _ = export
    before = contents(folder)
    target = {
        "weights": "transformers.modeling_utils.safe_save_file",
        "card": "helpsteer2.models.export.model_card",
        "sync": "os.fsync",
    }[at]
    monkeypatch.setattr(target, full)
    with pytest.raises(UserError, match="No space left"):
        make_model(num_hidden_layers=3).save_pretrained(folder, tokenizer)
    assert contents(folder) == before
    assert os.listdir(folder.parent) == [folder.name]


def test_a_new_export_replaces_the_old_one_whole(
    export: Export,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    packed_scores: PackedScores,
) -> None:
    folder, _ = export
    (folder / "left_over.txt").write_text("from the old one")
    model = make_model(num_hidden_layers=3)
    model.save_pretrained(folder, tokenizer)
    loaded, _, chat = RewardModel.from_pretrained(folder)
    assert torch.equal(packed_scores(loaded, chat), packed_scores(model, chat))
    assert not (folder / "left_over.txt").exists()
    assert os.listdir(folder.parent) == [folder.name]


def test_the_old_export_is_whole_until_the_swap(
    export: Export,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _ = export
    before = contents(folder)
    seen: list[dict[str, bytes]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if not seen or seen[-1] != contents(folder):
            seen.append(contents(folder))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    make_model(num_hidden_layers=3).save_pretrained(folder, tokenizer)
    # All synced while the old one stood; then the swap, and the folder above synced.
    assert seen == [before, contents(folder)]


def test_killed_between_the_two_renames(
    export: Export,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    packed_scores: PackedScores,
) -> None:
    folder, model = export
    folder.rename(export_module.previous_folder(folder))
    loaded, _, chat = RewardModel.from_pretrained(folder)  # the old one, from where it was put
    assert torch.equal(packed_scores(loaded, chat), packed_scores(model, chat))
    make_model(num_hidden_layers=3).save_pretrained(folder, tokenizer)
    assert os.listdir(folder.parent) == [folder.name]


def test_a_folder_with_other_files_is_not_replaced(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="other files"):
        make_model().save_pretrained(tmp_path, tokenizer)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_pad_equal_to_eos_is_not_exported(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_model(eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id])
    with pytest.raises(UserError, match="end-of-sequence"):
        model.save_pretrained(tmp_path / "export", tokenizer)
    assert not (tmp_path / "export").exists()


def test_push_fails_at_once_without_network(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="stays usable in"):
        export_module.push_to_hub(export[0], "someone/model")
    with pytest.raises(UserError, match="no export"):
        export_module.push_to_hub(export[0].parent, "someone/model")
