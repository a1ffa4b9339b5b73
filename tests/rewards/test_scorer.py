"""Scores do not depend on how groups are batched, and come in order while more are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import logging

from helpsteer2.attributes import AttributeWeights
from helpsteer2.data.groups import Group
from helpsteer2.errors import UserError
from helpsteer2.rewards.scorer import WAITING_GROUPS, RewardScorer
from tests.rewards.tiny import WEIGHTS, group, tiny_reward_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reward_model(tmp_path_factory.mktemp("scorer"))


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
        for i in range(200, 400):
            n_read += 1
            yield group("Hi", f"Hello {i}")

    scores = scorer.score(stream())
    for _ in range(20):
        next(scores)
    per_pass = 80 // len(scorer.encode(group("Hi", "Hello 200")).response_ids[0])
    assert per_pass > 1
    assert n_read <= 20 + per_pass + 1


def test_equal_groups_do_not_wait_without_end(folder: Path) -> None:
    n_read = 0

    def stream() -> Iterator[Group]:
        nonlocal n_read
        for _ in range(3 * WAITING_GROUPS):
            n_read += 1
            yield GROUPS[1]

    next(RewardScorer.from_pretrained(folder).score(stream()))
    assert n_read == WAITING_GROUPS + 1


@pytest.fixture(scope="module")
def counting(folder: Path) -> tuple[RewardScorer, list[int]]:
    """A scorer, and the tokens of each of its passes."""
    scorer, tokens = RewardScorer.from_pretrained(folder), []
    scorer.model.register_forward_pre_hook(lambda _, given: tokens.append(given[0].layout.n_tokens))
    return scorer, tokens


def test_each_prompt_and_each_of_its_responses_is_computed_once(
    counting: tuple[RewardScorer, list[int]],
) -> None:
    scorer, tokens = counting
    groups = [
        group("To be?", "Yes", "No", "Yes"),
        group("Or not?", "Yes"),
        group("To be?", "No", "Perhaps"),
        group("To be?", "Yes"),
    ]
    once = [group("To be?", "Yes", "No", "Perhaps"), group("Or not?", "Yes")]
    scores = list(scorer.score(groups))
    first, second = scorer.score(once)
    assert tokens[-2] == tokens[-1] == sum(scorer.encode(one).n_tokens for one in once)
    expected = [first[[0, 1, 0]], second, first[[1, 2]], first[[0]]]
    for of_group, wanted in zip(scores, expected, strict=True):
        np.testing.assert_array_equal(of_group, wanted)
    assert abs(first[0] - second[0]).max() > 1e-3  # the same response to another prompt


def test_a_group_longer_than_a_pass_is_scored_in_several(
    counting: tuple[RewardScorer, list[int]], folder: Path
) -> None:
    scorer, tokens = counting
    answers = [f"{'Answer ' * (i % 4)}{i}" for i in range(20)]
    groups = [GROUPS[0], group("To be?", *answers, *answers[::-1]), group("To be?", answers[3])]
    encoded = [scorer.encode(one) for one in groups]
    prompt, responses = encoded[1].prompt_ids, encoded[1].response_ids[:20]
    longest = len(prompt) + max(map(len, responses))
    whole = list(RewardScorer.from_pretrained(folder).score_encoded(encoded))
    for budget in (1, longest, longest + 25):
        scorer.tokens_per_microbatch = budget
        tokens.clear()
        for scores, wanted in zip(scorer.score_encoded(encoded), whole, strict=True):
            np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-5)
            if len(scores) == 40:  # what is equal is equal to the last bit
                np.testing.assert_array_equal(scores[:20], scores[20:][::-1])
        assert max(tokens) <= max(budget, longest)
        if budget == 1:  # each response alone, and alone longer than the budget
            lengths = [len(prompt) + len(ids) for ids in responses]
            assert [count for count in tokens if count in lengths][-21:-1] == lengths


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.sampled_from("uvwxyz"), min_size=1)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 200),
)
def test_any_mixture_of_equal_groups_has_the_scores_of_each_alone(
    counting: tuple[RewardScorer, list[int]], drawn: list[tuple[str, list[str]]], budget: int
) -> None:
    scorer, _ = counting
    scorer.tokens_per_microbatch = budget
    groups = [group(prompt, *responses) for prompt, responses in drawn]
    for one, scores in zip(groups, scorer.score(groups), strict=True):
        (alone,) = scorer.score([one])
        np.testing.assert_allclose(scores, alone, rtol=0, atol=1e-5)


def test_weights_make_one_reward_of_the_scores(folder: Path) -> None:
    scorer = RewardScorer.from_pretrained(folder)
    (scores,) = scorer.score([GROUPS[0]])
    rewards = WEIGHTS.reward(scores, scorer.attribute_names)
    np.testing.assert_allclose(rewards, 0.65 * scores[:, 0] - 0.4 * scores[:, 4], rtol=1e-6)
    with pytest.raises(UserError, match=r"'x' need humour.*scores helpfulness"):
        AttributeWeights("x", {"humour": 1.0}).reward(scores, scorer.attribute_names)


def test_a_sampled_response_may_be_empty(folder: Path) -> None:
    scorer = RewardScorer.from_pretrained(folder)
    sampled = replace(group("To be?", "", "Yes"), finish_reasons=("stop", "length"))
    (scores,) = scorer.score([sampled])
    assert np.isfinite(scores).all()
    assert abs(scores[0] - scores[1]).max() > 1e-3
    with pytest.raises(UserError, match=r"group 'seven' \(here\): the response is empty"):
        list(scorer.score([group("To be?", "", identity="seven")]))


def test_the_hash_is_that_of_the_model(folder: Path, tmp_path: Path) -> None:
    scorer = RewardScorer.from_pretrained(folder)
    assert scorer.model_hash == RewardScorer.from_pretrained(folder).model_hash
    other = RewardScorer.from_pretrained(tiny_reward_model(tmp_path, seed=1))
    assert other.model_hash != scorer.model_hash
    assert RewardScorer.from_pretrained(folder, dtype="bfloat16").model_hash != scorer.model_hash
    changed = RewardScorer.from_pretrained(folder)
    with torch.no_grad():
        changed.model.head.weight[0, 0] += 1e-3
    assert changed.model_hash != scorer.model_hash


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


def test_a_pass_that_does_not_fit_names_both_ways_to_make_it_smaller(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = RewardScorer.from_pretrained(folder)

    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(scorer.model, "forward", fail)
    with pytest.raises(UserError, match=r"lower tokens_per_microbatch \(--batch-tokens\)"):
        next(scorer.score(GROUPS))


def test_loading_draws_no_bar_and_leaves_those_of_others(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        RewardScorer.from_pretrained(folder)
        assert logging.is_progress_bar_enabled()
    finally:
        if not shown:
            logging.disable_progress_bar()
    assert capfd.readouterr().err == ""
