"""Training goes on from a reward model as it is, or is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.groups import Group
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.packing import PackedBatch
from helpsteer2.data.tokenise import tokenise
from helpsteer2.data.tokenizer import PretrainedTokenizer, TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.reward import RewardModel
from helpsteer2.models.start import ModelSetup, PolicyStart, RewardStart

Export = tuple[Path, RewardModel]
Packed = Callable[[BoundChat], tuple[PackedBatch, list[list[int]]]]
LIMITS = LengthLimits(64, 48)
SHAPE = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16,
         "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
TINY = Backbone(TrainedTokenizer(300), init="random", config=SHAPE)


@dataclass(frozen=True)
class OneGroup:
    attribute_names: tuple[str, ...] = HELPSTEER2_ATTRIBUTES

    def read(self, split: str, report: Any) -> Iterator[Group]:
        ratings = ((1.0, 2.0, 3.0, 4.0, 0.0),) * 2
        prompt = ({"role": "user", "content": "Hi"},)
        yield Group("1", "here:1", prompt, ("Good morning!", "To you!"), ratings)

    def fingerprint(self, split: str) -> str:
        return split


def texts() -> Iterator[str]:
    yield "Good morning to you!"


def setup(
    start: RewardStart | PolicyStart,
    cache: Path,
    attributes: tuple[str, ...] = HELPSTEER2_ATTRIBUTES,
    chat: ChatFormat | None = None,
    backbone: Backbone = TINY,
) -> ModelSetup:
    names = start.attributes(attributes)
    bound = start.chat(chat or ChatFormat(), backbone, texts, str(cache))
    train = tokenise(OneGroup(), "train", bound, LIMITS, names, cache)
    return ModelSetup(backbone, bound, LIMITS, train, "new rows", weights=None, seed=3)


def test_it_starts_with_the_scores_of_the_model(
    export: Export, packed: Packed, tmp_path: Path
) -> None:
    folder, trained = export
    start = RewardStart(str(folder))
    made = setup(start, tmp_path)
    model = start.build(made)
    assert model.training
    batch = packed(made.chat)[0]
    with torch.no_grad():
        assert torch.equal(model(batch), trained(batch))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.spec.template_hash == trained.spec.template_hash


def test_attributes_are_picked_from_the_head_in_the_order_asked_for(
    export: Export, packed: Packed, tmp_path: Path
) -> None:
    folder, trained = export
    start = RewardStart(str(folder))
    made = setup(start, tmp_path, ("verbosity", "helpfulness"))
    model, batch = start.build(made), packed(made.chat)[0]
    with torch.no_grad():
        torch.testing.assert_close(model(batch), trained(batch)[:, [4, 0]])
    assert model.spec.attribute_names == ("verbosity", "helpfulness")
    assert model.spec.rating_means == (0.0, 1.0)


def test_the_card_will_tell_both_trainings(export: Export, tmp_path: Path) -> None:
    start = RewardStart(str(export[0]))
    spec = start.build(setup(start, tmp_path)).spec
    assert spec.data == "made-up rows, then new rows"
    assert spec.base_model == "random Llama"


def test_it_can_be_exported_and_read_again(export: Export, packed: Packed, tmp_path: Path) -> None:
    start = RewardStart(str(export[0]))
    made = setup(start, tmp_path, ("coherence",))
    model = start.build(made)
    model.save_pretrained(tmp_path / "second", made.chat.tokenizer)
    again, _, chat = RewardModel.from_pretrained(tmp_path / "second")
    batch = packed(chat)[0]
    with torch.no_grad():
        assert torch.equal(again(batch), model(batch))


def test_the_backbone_still_says_how_it_is_trained(export: Export, tmp_path: Path) -> None:
    start = RewardStart(str(export[0]))
    how = replace(TINY, dtype="bfloat16", gradient_checkpointing=True)
    model = start.build(setup(start, tmp_path, backbone=how))
    assert model.backbone.dtype == torch.bfloat16
    assert model.backbone.is_gradient_checkpointing
    assert model.head.weight.dtype == torch.float32


def test_attributes_that_the_model_lacks_are_named(export: Export) -> None:
    with pytest.raises(UserError, match=r"asks for quality, style: set attributes=\[helpfulness,"):
        RewardStart(str(export[0])).attributes(("quality", "helpfulness", "style"))
    with pytest.raises(UserError, match="attributes is empty"):
        RewardStart().attributes(())


def test_another_template_is_refused(export: Export, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chat\.template=plain: set chat\.template=auto"):
        setup(RewardStart(str(export[0])), tmp_path, chat=ChatFormat("plain"))


def test_another_system_prompt_is_refused(export: Export, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chat\.system_prompt is 'Be kind\.': set it"):
        setup(RewardStart(str(export[0])), tmp_path, chat=ChatFormat(system_prompt="Be kind."))


def test_another_tokenizer_is_refused(
    export: Export, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    other = TrainedTokenizer(320).build(lambda: iter(["and something else"]), tmp_path)
    other.save_pretrained(tmp_path / "other")
    asked = replace(TINY, tokenizer=PretrainedTokenizer(str(tmp_path / "other")))
    start = RewardStart(str(export[0]))
    with pytest.raises(
        UserError, match=r"another vocabulary than backbone\.tokenizer\.path=.*other"
    ):
        setup(start, tmp_path, backbone=asked)
    tokenizer.save_pretrained(tmp_path / "same")
    same = replace(TINY, tokenizer=PretrainedTokenizer(str(tmp_path / "same")))
    assert setup(start, tmp_path, backbone=same).chat.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    start = PolicyStart()
    made = setup(start, tmp_path)
    start.build(made).save_pretrained(tmp_path / "policy", made.chat.tokenizer)
    with pytest.raises(UserError, match="no reward head"):
        RewardStart(str(tmp_path / "policy")).attributes(("helpfulness",))


def test_a_head_with_a_bias_is_refused_before_any_training(export: Export) -> None:
    folder, _ = export
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "score.bias": torch.zeros(5)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="head has a bias"):
        RewardStart(str(folder)).attributes(("helpfulness",))


def test_a_new_head_has_a_score_for_each_attribute(tmp_path: Path) -> None:
    start = RewardStart()
    made = setup(start, tmp_path, ("coherence", "verbosity"))
    model = start.build(made)
    assert tuple(model.head.weight.shape) == (2, 16)
    assert model.spec.base_model == "random llama"


def test_a_policy_reads_no_ratings(tmp_path: Path) -> None:
    made = setup(PolicyStart(), tmp_path, ("anything",))
    assert made.train[0].attributes.shape == (2, 0)
    assert np.isnan(made.train[0].preference_strength)


def test_a_policy_needs_a_template_that_ends_answers(tmp_path: Path) -> None:
    endless = tmp_path / "endless.jinja"
    endless.write_text("{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"
                       "{% if add_generation_prompt %}\nassistant: {% endif %}")  # fmt: skip
    with pytest.raises(UserError, match="could not learn where to stop"):
        setup(PolicyStart(), tmp_path, chat=ChatFormat(str(endless)))


def test_a_policy_is_not_taught_to_stop_at_a_cut(tmp_path: Path) -> None:
    limits = LengthLimits(64, 3)
    bound = PolicyStart().chat(ChatFormat(), TINY, texts, str(tmp_path))
    closed, cut = (
        tokenise(OneGroup(), "train", bound, limits, (), tmp_path, close_cut=close_cut)[0]
        for close_cut in (RewardStart.closes_cut_responses, PolicyStart.closes_cut_responses)
    )
    whole = bound.response_ids([{"role": "user", "content": "Hi"}], "Good morning!")[0]
    assert len(whole) == 4
    assert closed.response_ids[0].tolist() == [*whole[:2], *bound.closing_ids]
    assert cut.response_ids[0].tolist() == whole[:3]
