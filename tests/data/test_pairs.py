"""Which groups a loss on pairs sees: decided pairs of its own split, the others counted."""

from __future__ import annotations

import gzip
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_tokenizers as sample

from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.pairs import decided_pairs
from helpsteer2.data.sources.helpsteer import HelpSteer2
from helpsteer2.data.sources.hh_rlhf import HHRLHF
from helpsteer2.data.token_store import TokenisedGroups, TokenWriter, open_store
from helpsteer2.data.tokenise import tokenise
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.errors import UserError

NAN = math.nan


def store(
    folder: Path, strengths: list[float], n_responses: int | list[int] = 2
) -> TokenisedGroups:
    """Group i has i + 1 prompt tokens, and ratings i where it has any."""
    counts = [n_responses] * len(strengths) if isinstance(n_responses, int) else n_responses
    with TokenWriter(folder, ("helpfulness",)) as writer:
        for i, (strength, n) in enumerate(zip(strengths, counts, strict=True)):
            group = TokenGroup(
                prompt_ids=np.full(i + 1, i, np.int32),
                response_ids=tuple(np.full(2 + r, 100 + i, np.int32) for r in range(n)),
                attributes=np.full((n, 1), i if i % 2 else NAN, np.float32),
                preference_strength=strength,
                index=i,
            )
            writer.add(group, f"id-{i}")
        writer.finish("key", {})
    opened = open_store(folder, "key")
    assert opened is not None
    return opened


def test_zeros_and_unknown_ones_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    groups = store(tmp_path / "x", [-3, 0, NAN, 2, 0, 1])
    with caplog.at_level(logging.INFO):
        pairs = decided_pairs(groups, "train")
    assert pairs.preference_strength.tolist() == [-3, 2, 1]
    assert len(pairs) == 3
    assert pairs.report["pairs_decided"] == 3
    assert pairs.report["pairs_undecided"] == 2
    assert pairs.report["groups_without_preference"] == 1
    assert "train: 3 decided pairs; 2 without a winner" in caplog.text
    assert "and 1 groups" in caplog.text
    # The store itself is as it was.
    assert len(groups) == 6
    assert "pairs_decided" not in groups.report


def test_nothing_is_said_where_nothing_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert len(decided_pairs(store(tmp_path / "x", [-1, 1]), "train")) == 2
    assert caplog.text == ""


def test_a_selection_is_the_same_groups(tmp_path: Path) -> None:
    groups = store(tmp_path / "x", [0, 1, 0, -2, 3, 0])
    pairs = decided_pairs(groups, "train")
    assert pairs.lengths.tolist() == [groups.lengths[i] for i in (1, 3, 4)]
    assert list(pairs.ids) == ["id-1", "id-3", "id-4"]
    for position, i in enumerate((1, 3, 4)):
        ours, theirs = pairs[position], groups[i]
        assert ours.index == i  # its place in the data set, for messages and reports
        assert np.array_equal(ours.prompt_ids, theirs.prompt_ids)
        assert all(map(np.array_equal, ours.response_ids, theirs.response_ids))
        assert np.array_equal(ours.attributes, theirs.attributes, equal_nan=True)
        assert ours.preference_strength == theirs.preference_strength
    assert pairs[-1].index == 4
    with pytest.raises(IndexError):
        pairs[3]
    # Ratings of the groups left out are not in its means.
    assert pairs.rating_means().tolist() == [2.0]
    assert groups.rating_means().tolist() == [3.0]
    last = pairs.select(np.array([2]), {"why": 1})
    assert (last[0].index, list(last.ids), last.report["why"]) == (4, ["id-4"], 1)
    assert math.isnan(last.rating_means()[0])


def test_ratings_are_not_made_into_preferences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no group of the train data .* none is made up"):
        decided_pairs(store(tmp_path / "x", [NAN, NAN]), "train")


def test_all_ties_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"every preference_strength of the train data \(2\) is 0"):
        decided_pairs(store(tmp_path / "x", [0, NAN, 0]), "train")


def test_a_preference_among_three_is_refused_by_name(tmp_path: Path) -> None:
    groups = store(tmp_path / "x", [1, NAN, -1], [2, 3, 3])
    with pytest.raises(UserError, match=r"'id-2' .* 3 responses"):
        decided_pairs(groups, "train")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ChatFormat().bind(sample.trained(str(tmp_path_factory.mktemp("trained"))))


def tokenised(source: Any, split: str, chat: Any, cache: Path) -> TokenisedGroups:
    return tokenise(source, split, chat, LengthLimits(200, 200), (), cache)


def prompts(groups: TokenisedGroups, chat: Any) -> list[str]:
    return [chat.tokenizer.decode(groups[i].prompt_ids) for i in range(len(groups))]


def test_validation_rows_of_the_one_table_are_never_trained_on(tmp_path: Path, chat: Any) -> None:
    # The Hub's preference table holds both splits, in any order.
    rows = [
        {
            "split": "validation" if i % 3 == 1 else "train",
            "prompt": "held out" if i % 3 == 1 else "question",
            "response_1": f"one {i}",
            "response_2": f"two {i}",
            "preference_strength": (-3, 2, 0, 1)[i % 4],
        }
        for i in range(24)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "preference.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    source = HelpSteer2(str(tmp_path), config="preference")
    for split, word, other in (("train", "question", "held"), ("validation", "held", "question")):
        groups = tokenised(source, split, chat, tmp_path / "cache")
        pairs = decided_pairs(groups, split)
        expected = [
            row["preference_strength"]
            for row in rows
            if row["split"] == split and row["preference_strength"]
        ]
        assert pairs.preference_strength.tolist() == expected
        assert pairs.report["pairs_undecided"] == len(groups) - len(expected) > 0
        texts = prompts(pairs, chat)
        assert all(word in text and other not in text for text in texts)


def test_comparisons_of_hh_rlhf_are_pairs_of_strength_one(tmp_path: Path, chat: Any) -> None:
    start = "\n\nHuman: Hi\n\nAssistant:"
    rows = [{"chosen": f"{start} yes {i}", "rejected": f"{start} no {i}"} for i in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    pairs = decided_pairs(tokenised(HHRLHF(str(tmp_path)), "train", chat, tmp_path), "train")
    assert pairs.preference_strength.tolist() == [-1, -1, -1]
    assert "yes" in chat.tokenizer.decode(pairs[0].response_ids[0])
