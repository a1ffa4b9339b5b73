"""ExPO: exact ends, the formula beyond them, a folder like any other, or one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.packing import PackedBatch
from helpsteer2.errors import UserError
from helpsteer2.models import export as export_module
from helpsteer2.models.expo import (
    extrapolate,
    open_parents,
    weights_hash,
    write_extrapolated,
)
from helpsteer2.models.loading import WeightFiles
from helpsteer2.models.reward import RewardModel, RewardSpec

from .extrapolation import perturbed, tensors_of

MakeModel = Callable[..., RewardModel]
Stages = Callable[..., tuple[Path, Path]]
Packed = Callable[[BoundChat], tuple[PackedBatch, list[list[int]]]]


@pytest.fixture
def stages(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Stages:
    """Two stages of one model, each in the type asked for."""

    def make(
        weak: torch.dtype = torch.float32, strong: torch.dtype = torch.float32, **options: Any
    ) -> tuple[Path, Path]:
        for name, dtype in (("weak", weak), ("strong", strong)):
            model = make_model(**options)
            if name == "strong":
                perturbed(model)
            model.backbone.to(dtype)
            model.save_pretrained(tmp_path / name, tokenizer)
        return tmp_path / "weak", tmp_path / "strong"

    return make


def test_the_ends_are_the_two_tensors_to_the_last_bit() -> None:
    torch.manual_seed(0)
    # Far apart, so that weak + (strong − weak) is rounded.
    weak, strong = 1e4 * torch.randn(1000), torch.randn(1000)
    assert not torch.equal(weak + (strong - weak), strong)
    assert torch.equal(extrapolate(weak, strong, 0.0), weak)
    assert torch.equal(extrapolate(weak, strong, 1.0), strong)
    for dtype in (torch.bfloat16, torch.float16):
        low = weak.to(dtype)
        assert torch.equal(extrapolate(low, strong.to(dtype), 0.0), low)


@pytest.mark.parametrize("alpha", [-0.5, 0.3, 0.5, 1.0, 1.52, 3.0])
def test_the_formula_in_fp32(alpha: float) -> None:
    torch.manual_seed(0)
    weak = torch.randn(1000, dtype=torch.float32)
    strong = weak + 1e-3 * torch.randn(1000)
    exact = weak.double() + alpha * (strong.double() - weak.double())
    # Rounding of fp32, not of the difference of two near numbers scaled up.
    assert (extrapolate(weak, strong, alpha) - exact).abs().max() < 1e-6
    # In bf16 the result is rounded once.
    low = [tensor.bfloat16() for tensor in (weak, strong)]
    exact = low[0].double() + alpha * (low[1].double() - low[0].double())
    result = extrapolate(*low, alpha)
    assert result.dtype == torch.bfloat16
    assert ((result.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-9).all()


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.52])
def test_all_weights_and_the_head_alike(stages: Stages, tmp_path: Path, alpha: float) -> None:
    weak, strong = stages()
    write_extrapolated(open_parents(weak, strong), alpha, tmp_path / "made")
    first, second, made = (tensors_of(folder) for folder in (weak, strong, tmp_path / "made"))
    assert made.keys() == first.keys() == second.keys()
    assert "score.weight" in made
    for name, tensor in made.items():
        if alpha in (0.0, 1.0):
            assert torch.equal(tensor, (first if alpha == 0.0 else second)[name])
        else:
            expected = first[name] + alpha * (second[name] - first[name])
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
            assert not torch.equal(tensor, second[name])


@torch.inference_mode()
def test_a_head_that_differs_alone_extrapolates_the_scores(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, packed: Packed
) -> None:
    scores = []
    for name in ("weak", "strong"):
        model = make_model()
        if name == "strong":
            model.head.weight += 1.0
        model.save_pretrained(tmp_path / name, tokenizer)
        scores.append(model(packed(ChatFormat().bind(tokenizer))[0]))
    parents = open_parents(tmp_path / "weak", tmp_path / "strong")
    write_extrapolated(parents, 1.52, tmp_path / "made")
    made, _, chat = RewardModel.from_pretrained(tmp_path / "made")
    expected = scores[0] + 1.52 * (scores[1] - scores[0])
    torch.testing.assert_close(made(packed(chat)[0]), expected, rtol=0, atol=1e-4)


def test_the_folder_is_an_export_like_any_other(
    stages: Stages, tmp_path: Path, packed: Packed
) -> None:
    weak, strong = stages()
    parents = open_parents(weak, strong)
    write_extrapolated(parents, 1.52, tmp_path / "made")
    made = tmp_path / "made"
    assert {path.name for path in made.iterdir()} == {path.name for path in strong.iterdir()}
    assert (made / "config.json").read_text() == (strong / "config.json").read_text()
    modes = {path.stat().st_mode for path in made.iterdir()}
    assert len(modes) == 1  # safetensors would make its files private
    model, _, chat = RewardModel.from_pretrained(made)
    batch, sequences = packed(chat)
    plain = AutoModelForSequenceClassification.from_pretrained(made, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = plain(torch.tensor([sequences[0]])).logits[0]
        torch.testing.assert_close(model(batch)[0], theirs, rtol=0, atol=1e-5)


def test_alpha_and_both_hashes_are_on_record(stages: Stages, tmp_path: Path) -> None:
    weak, strong = stages()
    parents = open_parents(weak, strong)
    write_extrapolated(parents, 1.52, tmp_path / "made")
    spec, before = RewardSpec.read(tmp_path / "made"), RewardSpec.read(strong)
    assert spec is not None
    assert spec.extrapolation is not None
    assert spec.extrapolation.alpha == 1.52
    assert replace(spec, extrapolation=None) == before
    card = (tmp_path / "made" / "README.md").read_text()
    for text in ("1.52", parents.weak_hash, parents.strong_hash, "arXiv 2404.16792"):
        assert text in card
        assert text not in (strong / "README.md").read_text()
    assert len({parents.weak_hash, parents.strong_hash}) == 2
    # It stays known when the model is read and written again.
    model, tokenizer, _ = RewardModel.from_pretrained(tmp_path / "made")
    model.save_pretrained(tmp_path / "again", tokenizer)
    again = RewardSpec.read(tmp_path / "again")
    assert again is not None
    assert again.extrapolation == spec.extrapolation


def test_an_export_of_before_there_was_expo_is_read(stages: Stages) -> None:
    weak, _ = stages()
    path = weak / "reward_model.json"
    content = json.loads(path.read_text())
    del content["extrapolation"]
    path.write_text(json.dumps(content))
    spec = RewardSpec.read(weak)
    assert spec is not None
    assert spec.extrapolation is None


@pytest.mark.parametrize(
    ("weak_type", "strong_type", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_types_are_kept_or_widened_and_the_head_stays_fp32(
    stages: Stages,
    tmp_path: Path,
    weak_type: torch.dtype,
    strong_type: torch.dtype,
    expected: torch.dtype,
) -> None:
    weak, strong = stages(weak_type, strong_type)
    parents = open_parents(weak, strong)
    for alpha, end in ((0.0, weak), (1.0, strong)):
        write_extrapolated(parents, alpha, tmp_path / "made")
        made = tensors_of(tmp_path / "made")
        assert made["score.weight"].dtype == torch.float32
        assert {t.dtype for name, t in made.items() if name != "score.weight"} == {expected}
        for name, tensor in tensors_of(end).items():
            assert torch.equal(made[name], tensor.to(made[name].dtype))
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["dtype"] == str(expected).removeprefix("torch.")
    RewardModel.from_pretrained(tmp_path / "made")


@pytest.mark.parametrize("shards", [("40KB", "5GB"), ("5GB", "40KB"), ("40KB", "64KB")])
def test_weights_cut_into_files_in_different_ways(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shards: tuple[str, str],
) -> None:
    for name, size in zip(("weak", "strong"), shards, strict=True):
        monkeypatch.setattr(export_module, "SHARD_SIZE", size)
        model = make_model() if name == "weak" else perturbed(make_model())
        model.save_pretrained(tmp_path / name, tokenizer)
    folders = tmp_path / "weak", tmp_path / "strong"
    write_extrapolated(open_parents(*folders), 1.5, tmp_path / "made")
    assert {p.name for p in (tmp_path / "made").iterdir()} == {p.name for p in folders[1].iterdir()}
    first, second, made = (tensors_of(folder) for folder in (*folders, tmp_path / "made"))
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, first[name] + 1.5 * (second[name] - first[name]))
    RewardModel.from_pretrained(tmp_path / "made")


def test_the_hash_is_that_of_the_weights_and_not_of_the_files(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashes = []
    for size in ("5GB", "40KB"):
        monkeypatch.setattr(export_module, "SHARD_SIZE", size)
        make_model().save_pretrained(tmp_path / size, tokenizer)
        hashes.append(weights_hash(WeightFiles(tmp_path / size)))
    assert hashes[0] == hashes[1]
    path = tmp_path / "5GB" / "model.safetensors"
    tensors = load_file(path)
    tensors["score.weight"][0, 0] += 1e-3
    save_file(tensors, path)
    assert weights_hash(WeightFiles(tmp_path / "5GB")) != hashes[0]


# ---- what does not belong together


def test_every_difference_is_told_at_once(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path / "weak", tokenizer)
    other = make_model(
        attribute_names=("helpfulness", "verbosity", "style"),
        chat=ChatFormat("plain", "Be kind."),
        num_hidden_layers=1,
        intermediate_size=48,
    )
    other.save_pretrained(tmp_path / "strong", tokenizer)
    with pytest.raises(UserError) as error:
        open_parents(tmp_path / "weak", tmp_path / "strong")
    text = str(error.value)
    for part in (
        "not two stages of one model",
        "config.json, num_hidden_layers: 2 and 1",
        "config.json, intermediate_size: 64 and 48",
        "tensors only in weak: model.layers.1.",
        "tensors of two shapes: model.layers.0.mlp",
        f"attributes: weak has no style, only {', '.join(HELPSTEER2_ATTRIBUTES)}",
        "chat template: ",
        "system prompt: None and 'Be kind.'",
    ):
        assert part in text
    assert not (tmp_path / "made").exists()


def test_another_architecture(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path / "weak", tokenizer)
    make_model("qwen3").save_pretrained(tmp_path / "strong", tokenizer)
    with pytest.raises(UserError, match="architecture: llama and qwen3"):
        open_parents(tmp_path / "weak", tmp_path / "strong")


def test_settings_that_change_the_function_but_no_shape(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path / "weak", tokenizer)
    perturbed(make_model(rms_norm_eps=1e-3)).save_pretrained(tmp_path / "strong", tokenizer)
    with pytest.raises(UserError, match=r"rms_norm_eps: 1e-06 and 0\.001"):
        open_parents(tmp_path / "weak", tmp_path / "strong")


def test_another_tokenizer(stages: Stages) -> None:
    weak, strong = stages()
    path = strong / "reward_model.json"
    path.write_text(path.read_text().replace('"tokenizer_hash": "', '"tokenizer_hash": "0'))
    with pytest.raises(UserError, match="tokenizer changed"):
        open_parents(weak, strong)


def test_quantised_weights(stages: Stages) -> None:
    weak, strong = stages()
    path = strong / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"whole numbers: model\.norm\.weight"):
        open_parents(weak, strong)


def test_the_very_same_weights(stages: Stages) -> None:
    weak, _ = stages()
    with pytest.raises(UserError, match="very same weights"):
        open_parents(weak, weak)


def test_a_model_of_another_project(stages: Stages) -> None:
    weak, strong = stages()
    (strong / "reward_model.json").unlink()
    with pytest.raises(UserError, match=r"strong has no reward_model\.json"):
        open_parents(weak, strong)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e39])
def test_an_alpha_that_fp32_cannot_hold(stages: Stages, tmp_path: Path, alpha: float) -> None:
    parents = open_parents(*stages())
    with pytest.raises(UserError, match="finite"):
        write_extrapolated(parents, alpha, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_parent_is_never_overwritten(stages: Stages) -> None:
    weak, strong = stages()
    parents = open_parents(weak, strong)
    for folder in (weak, strong):
        before = tensors_of(folder)
        with pytest.raises(UserError, match="one of the two models"):
            write_extrapolated(parents, 1.52, folder / ".." / folder.name)
        assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(folder).items())


def test_weights_that_overflow_leave_the_older_export_as_it_was(
    stages: Stages, tmp_path: Path
) -> None:
    weak, strong = stages()
    write_extrapolated(open_parents(weak, strong), 1.5, tmp_path / "made")
    before = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    tensors = load_file(strong / "model.safetensors")
    tensors["score.weight"][0, 0] = 3e38
    save_file(tensors, strong / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"score\.weight is not finite at alpha=2:"):
        write_extrapolated(open_parents(weak, strong), 2.0, tmp_path / "made")
    assert {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".made")]
