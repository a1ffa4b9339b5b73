"""Scores do not depend on how groups are batched, and come in order while more are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import Group
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.models.attention import implementation_name
from helpsteer2.models.reward import RewardModel, RewardSpec
from helpsteer2.rewards.scorer import RewardScorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("scorer")
    tokenizer = TrainedTokenizer(300).build(lambda: iter(["to be or not to be"]), root)
    config = AutoConfig.for_model(
        "llama", vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    backbone = AutoModel.from_config(config, attn_implementation=implementation_name("sdpa"))
    chat = ChatFormat().bind(tokenizer)
    spec = RewardSpec.of(HELPSTEER2_ATTRIBUTES, chat, tokenizer, LengthLimits(60, 40), "random")
    RewardModel(backbone, spec).save_pretrained(root / "export", tokenizer)
    return root / "export"


def group(prompt: str, *responses: str) -> Group:
    return Group("id", "here", ({"role": "user", "content": prompt},), responses)


GROUPS = [
    group("To be?", "Not to be.", "To be, to be, to be."),
    group("Hi", "Hello"),
    group("One " * 9, *(f"{word} words" for word in ("ten", "other", "different", "more", "no"))),
    group("Why?", "Because it is so and was so.", "No."),
]


def test_scores_do_not_depend_on_the_batch(folder: Path) -> None:
    together = list(RewardScorer.from_pretrained(folder).score(GROUPS))
    assert [scores.shape for scores in together] == [(2, 5), (1, 5), (5, 5), (2, 5)]
    assert all(scores.dtype == np.float32 for scores in together)
    scorer = RewardScorer.from_pretrained(folder, tokens_per_microbatch=1)
    for scores, one in zip(together, GROUPS, strict=True):
        # One response at a time: neither other groups nor other responses matter.
        alone = [
            next(scorer.score([Group("id", "here", one.prompt, (response,))]))
            for response in one.responses
        ]
        np.testing.assert_allclose(scores, np.concatenate(alone), rtol=0, atol=1e-5)
    for budget in (40, 100):
        scorer = RewardScorer.from_pretrained(folder, tokens_per_microbatch=budget)
        for scores, again in zip(together, scorer.score(GROUPS), strict=True):
            np.testing.assert_allclose(scores, again, rtol=0, atol=1e-5)
    assert np.concatenate(together).std(0).min() > 0.1  # equal scores would prove nothing


def test_scores_come_while_more_groups_are_read(folder: Path) -> None:
    scorer = RewardScorer.from_pretrained(folder, tokens_per_microbatch=80)
    n_read = 0

    def stream() -> Iterator[Group]:
        nonlocal n_read
        for _ in range(200):
            n_read += 1
            yield GROUPS[1]

    scores = scorer.score(stream())
    for _ in range(20):
        next(scores)
    per_pass = 80 // scorer.encode(GROUPS[1]).n_tokens
    assert per_pass > 1
    assert n_read <= 20 + per_pass + 1


def test_nothing_in_nothing_out(folder: Path) -> None:
    assert list(RewardScorer.from_pretrained(folder).score([])) == []


def test_limits_of_training_hold_and_are_counted(folder: Path) -> None:
    scorer = RewardScorer.from_pretrained(folder)
    long = group("Q" * 5000, "A" * 5000)
    tokens = scorer.encode(long)
    assert len(tokens.prompt_ids) <= 60
    assert len(tokens.response_ids[0]) == 40
    assert tokens.response_ids[0][-1] == scorer.chat.closing_ids[-1]
    assert scorer.cuts.prompts_cut == scorer.cuts.responses_cut == 1
    assert np.isfinite(next(scorer.score([long]))).all()


def test_scoring_leaves_no_graph_and_no_training_mode(folder: Path) -> None:
    scorer = RewardScorer.from_pretrained(folder)
    next(scorer.score(GROUPS))
    assert not scorer.model.training
    assert all(parameter.grad is None for parameter in scorer.model.parameters())


def test_an_empty_budget_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="tokens_per_microbatch"):
        RewardScorer.from_pretrained(folder, tokens_per_microbatch=0)
