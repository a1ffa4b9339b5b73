"""ExPO where the second stage went on with some of the first one's attributes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.data.chat import BoundChat
from helpsteer2.data.packing import PackedBatch
from helpsteer2.models.expo import open_parents, write_extrapolated
from helpsteer2.models.loading import open_reward
from helpsteer2.models.reward import RewardModel

from .extrapolation import perturbed, tensors_of

MakeModel = Callable[..., RewardModel]
Packed = Callable[[BoundChat], tuple[PackedBatch, list[list[int]]]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("names", [("helpfulness",), ("verbosity", "helpfulness")])
def test_a_second_stage_of_some_attributes_starts_from_their_rows(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    names: tuple[str, ...],
    bias: bool,
) -> None:
    make_model().save_pretrained(tmp_path / "weak", tokenizer)
    second = perturbed(make_model(attribute_names=names, weights=None))
    second.save_pretrained(tmp_path / "strong", tokenizer)
    for folder, n in ((tmp_path / "weak", 5), (tmp_path / "strong", len(names))):
        if bias:  # an export has none; a model of others may
            tensors = {**tensors_of(folder), "score.bias": torch.arange(n) + 0.5}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    first, last = tensors_of(tmp_path / "weak"), tensors_of(tmp_path / "strong")
    rows = [HELPSTEER2_ATTRIBUTES.index(name) for name in names]
    parents = open_parents(tmp_path / "weak", tmp_path / "strong")
    for alpha in (0.0, 1.0, 1.52):
        write_extrapolated(parents, alpha, tmp_path / "made")
        made = tensors_of(tmp_path / "made")
        for name in ("score.weight", "score.bias")[: 1 + bias]:
            start = first[name][rows]
            expected = start + alpha * (last[name] - start)
            torch.testing.assert_close(made[name], expected, rtol=0, atol=1e-6)
        model, _, _ = RewardModel.from_pretrained(tmp_path / "made")
        assert model.spec.attribute_names == names


@torch.inference_mode()
def test_both_stages_of_a_chain_give_the_ends(
    export: tuple[Path, RewardModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    packed: Packed,
) -> None:
    """The first stage's score of the attribute at 0, the second one's at 1."""
    weak, first = export
    opened = open_reward(weak)
    head = torch.nn.Linear(32, 1, bias=False)
    head.weight.copy_(first.head.weight[[4]])
    spec = replace(opened.spec, attribute_names=("verbosity",), weights=None, rating_means=None)
    batch = packed(opened.chat)[0]
    start = first(batch)[:, [4]]
    second = perturbed(RewardModel(first.backbone, spec, head))
    second.save_pretrained(tmp_path / "strong", tokenizer)
    parents = open_parents(weak, tmp_path / "strong")
    for alpha, expected in ((0.0, start), (1.0, second(batch))):
        write_extrapolated(parents, alpha, tmp_path / "made")
        made, _, _ = RewardModel.from_pretrained(tmp_path / "made")
        torch.testing.assert_close(made(batch), expected, rtol=0, atol=1e-6)
