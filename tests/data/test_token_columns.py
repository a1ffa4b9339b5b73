"""What a store keeps beside ids and ratings: rewards, learned turns, and a reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sample_tokenizers as sample
from given_groups import GivenGroups

from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import Group, Message
from helpsteer2.data.lengths import CutReport, LengthLimits
from helpsteer2.data.packing import pack
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.data.tokenise import encode_group, tokenise

LIMITS = LengthLimits(140, 12)
CHAT = ChatFormat().bind(sample.llama3_like())


def group(i: int) -> Group:
    """Groups of 1 to 3 responses: rewarded or not, learned turns or none, sampled or written."""
    n = i % 3 + 1
    prompt = (
        Message(role="user", content=f"question {i}"),
        Message(role="assistant", content="Which egg? " * (i % 4), train=i % 2 == 0)
        if i % 4
        else Message(role="assistant", content="Which?", train=True),
        Message(role="user", content="That one. " * (i % 5 + 1)),
    )
    made = Group(f"id-{i}", f"rows.jsonl:{i + 1}", prompt, ("Six minutes. ",) * n)
    if i % 5 < 3:
        made = replace(made, rewards=tuple(i + r / 2 for r in range(n)))
    if i % 7 < 3:
        made = replace(
            made,
            response_ids=tuple((i, r, 9) for r in range(n)),
            tokenizer=CHAT.ids_hash if i % 7 else "another",
            finish_reasons=("length",) * n,
        )
    return made


GROUPS = tuple(group(i) for i in range(70))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> TokenisedGroups:
    cache = tmp_path_factory.mktemp("cache")
    return tokenise(GivenGroups(GROUPS), "train", CHAT, LIMITS, (), cache, close_cut=False)


def test_every_column_comes_back(stored: TokenisedGroups) -> None:
    for i, original in enumerate(GROUPS):
        expected = encode_group(original, i, CHAT, LIMITS, (), (), CutReport(), close_cut=False)
        found = stored[i]
        assert np.array_equal(found.prompt_ids, expected.prompt_ids)
        assert found.ref_logprobs is None
        for ours, theirs in zip(found.response_ids, expected.response_ids, strict=True):
            assert np.array_equal(ours, theirs)
        assert found.rewards is not None
        assert found.rewards.dtype == np.float32
        if original.rewards is None:
            assert np.isnan(found.rewards).all()
        else:
            assert found.rewards.tolist() == list(original.rewards)
        if expected.prompt_mask is None:
            assert found.prompt_mask is None
        else:
            assert np.array_equal(found.prompt_mask, expected.prompt_mask)
    masks = [stored[i].prompt_mask for i in range(len(stored))]
    n_trained = sum(int(mask.sum()) for mask in masks if mask is not None)
    assert stored.report["prompt_tokens_trained"] == n_trained > 0
    assert any(mask is None for mask in masks)


def test_the_report_counts_where_ids_came_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored = tokenise(GivenGroups(GROUPS), "train", CHAT, LIMITS, (), tmp_path, close_cut=False)
    by_ids = [g for g in GROUPS if g.tokenizer == CHAT.ids_hash]
    foreign = [g for g in GROUPS if g.tokenizer == "another"]
    n = {name: sum(len(g.responses) for g in gs) for name, gs in (("own", by_ids), ("o", foreign))}
    assert stored.report["responses_by_ids"] == n["own"] > 0
    assert stored.report["responses_by_text"] == stored.report["responses"] - n["own"]
    assert stored.report["responses_of_other_ids"] == n["o"] > 0
    assert f"the sampled ids of {n['o']} of {stored.report['responses']} responses" in caplog.text
    caplog.clear()
    tokenise(GivenGroups(GROUPS), "train", CHAT, LIMITS, (), tmp_path, close_cut=True)
    assert "sampled ids" not in caplog.text


def test_turns_that_cannot_be_learned_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    qwen = ChatFormat().bind(sample.qwen3_like())
    stored = tokenise(GivenGroups(GROUPS), "train", qwen, LIMITS, (), tmp_path, close_cut=False)
    marked = sum(bool(m.get("train")) for g in GROUPS for m in g.prompt)
    found = stored.report["turns_not_trained"]
    assert 0 < found <= marked
    assert stored.report["turns_trained"] == stored.report["prompt_tokens_trained"] == 0
    assert f"{found} of {found} answers marked for training" in caplog.text


def test_a_reference_goes_with_its_responses(stored: TokenisedGroups) -> None:
    n_responses = stored.n_responses
    sums = -np.arange(n_responses.sum(), dtype=np.float32)
    starts = np.cumsum(n_responses) - n_responses
    joined = stored.with_ref_logprobs(sums)
    chosen = np.array([40, 3, 4, 69])
    selected = joined.select(chosen, {})
    for position, i in enumerate(chosen):
        expected = sums[starts[i] : starts[i] + n_responses[i]]
        for found in (joined[i], selected[position]):
            assert found.index == i
            assert np.array_equal(found.ref_logprobs, expected)
            assert found.ref_logprobs.dtype == np.float32
    assert stored[3].ref_logprobs is None
    batch = pack([selected[i] for i in range(4)])
    assert (
        batch.ref_logprobs.tolist()
        == np.concatenate([sums[starts[i] :][: n_responses[i]] for i in chosen]).tolist()
    )


def test_a_reference_of_a_selection_is_in_its_order(stored: TokenisedGroups) -> None:
    chosen = np.array([40, 3, 4, 69])
    selected = stored.select(chosen, {})
    sums = -np.arange(selected.n_responses.sum(), dtype=np.float32)
    joined = selected.with_ref_logprobs(sums)
    found = np.concatenate([joined[i].ref_logprobs for i in range(4)])
    assert np.array_equal(found, sums)
    with pytest.raises(ValueError, match="one a response"):
        selected.with_ref_logprobs(sums[:-1])
