from __future__ import annotations

import gzip
import json
from collections import defaultdict
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, AttributeWeights
from helpsteer2.data.groups import Group, read_all
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.data.pairing import PairCounts, Pairing
from helpsteer2.data.sources.helpsteer import HelpSteer2
from helpsteer2.errors import UserError

HELPFULNESS = AttributeWeights("helpfulness_only", {"helpfulness": 1.0})
RLHF = AttributeWeights("rlhf", {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45})


def group(responses: Any, attributes: Any = None, identity: str = "a", **known: Any) -> Group:
    prompt = ({"role": "user", "content": "what is it?"},)
    return Group(identity, "file:1", prompt, tuple(responses), attributes, **known)


def rated(*helpfulness: float | None, **known: Any) -> Group:
    texts = [f"answer {i}" for i in range(len(helpfulness))]
    return group(texts, tuple((rating,) for rating in helpfulness), **known)


def made(pairing: Pairing, *groups: Group, names: Any = ("helpfulness",)) -> Any:
    counts = PairCounts()
    pairs = list(pairing.pairs(groups, names, counts))
    assert len(pairs) == counts.pairs
    outcomes = (counts.ties, counts.below_min_gap, counts.one_response, counts.unknown)
    assert counts.groups == len(groups) == counts.pairs + sum(outcomes)
    return pairs, counts


BY_RATINGS = Pairing("ratings", HELPFULNESS)


@pytest.mark.parametrize(
    ("ratings", "strength"),
    [((3, 1), -2), ((1, 3), 2), ((0, 4), 3), ((4, 3), -1), ((2.0, 2.4), 1), ((0.0, 2.5), 3)],
)
def test_the_order_stays_and_the_strength_tells_who_is_better_by_how_much(
    ratings: Any, strength: int
) -> None:
    ((pair,), _) = made(BY_RATINGS, rated(*ratings))
    assert pair.responses == ("answer 0", "answer 1")
    assert pair.preference_strength == strength
    assert pair.rewards == ratings


def test_the_strength_is_in_rating_points_whatever_the_weights_sum_to() -> None:
    ratings = ((4.0, 4.0, 4.0, 0.0, 0.0), (3.0, 3.0, 3.0, 4.0, 4.0))
    known = group(["x", "y"], ratings)
    ((pair,), _) = made(Pairing("ratings", RLHF), known, names=HELPSTEER2_ATTRIBUTES)
    assert pair.preference_strength == -1
    assert pair.rewards == pytest.approx((7.6, 5.7))
    against = AttributeWeights("brief", {"verbosity": -0.5})
    ((pair,), _) = made(Pairing("ratings", against), known, names=HELPSTEER2_ATTRIBUTES)
    assert pair.preference_strength == -3
    assert pair.rewards == (0.0, -2.0)


def test_of_many_responses_the_best_stands_against_the_worst() -> None:
    ((pair,), _) = made(BY_RATINGS, rated(2, 0, 4, 0, 4))
    assert pair.responses == ("answer 1", "answer 2")
    assert pair.rewards == (0, 4)
    assert pair.preference_strength == 3


def test_everything_known_of_the_two_is_carried_along() -> None:
    known = Group(
        id="a", source="file:1", prompt=({"role": "user", "content": "?"},),
        responses=("x", "y", "z"),
        attributes=((1.0,), (2.0,), (3.0,)),
        annotations=(((1,),), ((2,),), ((3,),)),
        response_ids=((5, 2), (6, 7), (8, 2)),
        tokenizer="hash",
        finish_reasons=("stop", "length", "stop"),
        logprobs=((-1.0, -0.5), (-2.0, -0.5), (-3.0, -0.5)),
        scores=((0.5, 9.0), (7.5, 9.0), (-3.0, 9.0)),
        score_names=("helpfulness", "verbosity"),
        rewards=(0.0, 0.0, 0.0),
        label=AttributeLabel.of({"helpfulness": 4}),
    )  # fmt: skip
    ((pair,), _) = made(Pairing("scores", HELPFULNESS), known)
    assert {field.name: getattr(pair, field.name) for field in fields(pair)} == {
        "id": "a",
        "source": "file:1",
        "prompt": known.prompt,
        "responses": ("y", "z"),
        "attributes": ((2.0,), (3.0,)),
        "annotations": (((2,),), ((3,),)),
        "preference_strength": -1,
        "response_ids": ((6, 7), (8, 2)),
        "tokenizer": "hash",
        "finish_reasons": ("length", "stop"),
        "logprobs": ((-2.0, -0.5), (-3.0, -0.5)),
        "scores": ((7.5, 9.0), (-3.0, 9.0)),
        "score_names": ("helpfulness", "verbosity"),
        "rewards": (7.5, -3.0),
        "label": known.label,
    }


def test_a_preference_stays_as_it_is_and_may_be_too_weak() -> None:
    groups = [
        group(["x", "y"], identity=str(strength), preference_strength=strength)
        for strength in (-3, -1, 0, 2, None)
    ]
    pairs, counts = made(Pairing("preference", HELPFULNESS), *groups, names=())
    assert pairs == [groups[0], groups[1], groups[3]]
    assert (counts.ties, counts.unknown) == (1, 1)
    pairs, counts = made(Pairing("preference", HELPFULNESS, min_gap=2), *groups, names=())
    assert pairs == [groups[0], groups[3]]
    assert counts.below_min_gap == 1


def test_groups_that_make_no_pair_are_counted_by_their_reason() -> None:
    same = group(["x", "x"], ((0.0,), (4.0,)))
    groups = [rated(2, 2), rated(1), same, rated(None, 3), group(["x", "y"]), rated(1, 2)]
    pairs, counts = made(Pairing("ratings", HELPFULNESS, min_gap=1.5), *groups, rated(0, 2))
    assert len(pairs) == 1
    assert asdict(counts) == {
        "groups": 7, "pairs": 1, "ties": 1, "below_min_gap": 1, "one_response": 2, "unknown": 2,
        "duplicate_texts": 1,
    }  # fmt: skip


def test_an_equal_text_is_left_out_before_the_best_is_looked_for() -> None:
    twice = group(["x", "x", "y"], ((1.0,), (4.0,), (3.0,)))
    ((pair,), counts) = made(BY_RATINGS, twice)
    assert pair.rewards == (1.0, 3.0)
    assert counts.duplicate_texts == 1


def test_an_unknown_rating_that_weighs_nothing_is_no_loss() -> None:
    half = group(["x", "y"], ((3.0, None), (1.0, 2.0)))
    (pairs, _) = made(BY_RATINGS, half, names=("helpfulness", "verbosity"))
    assert len(pairs) == 1


def test_rounding_noise_makes_no_pair() -> None:
    # 0.8 · 3 − 0.4 · 4 and 0.8 · 2 − 0.4 · 2 are the same, but not in floating point.
    weights = AttributeWeights("w", {"correctness": 0.8, "verbosity": -0.4})
    tie = group(["x", "y"], ((3.0, 4.0), (2.0, 2.0)))
    _, counts = made(Pairing("ratings", weights), tie, names=("correctness", "verbosity"))
    assert counts.ties == 1


@given(st.lists(st.integers(0, 4), min_size=2, max_size=6))
def test_the_best_is_preferred_in_whatever_order_they_come(ratings: list[int]) -> None:
    pairs, _ = made(BY_RATINGS, rated(*ratings))
    turned, _ = made(BY_RATINGS, rated(*ratings[::-1]))
    if len(set(ratings)) == 1:
        assert pairs == turned == []
        return
    strengths = set()
    for pair in (pairs[0], turned[0]):
        assert set(pair.rewards) == {min(ratings), max(ratings)}
        better = pair.rewards.index(max(ratings))
        assert (pair.preference_strength > 0) == (better == 1)
        strengths.add(abs(pair.preference_strength))
    assert len(strengths) == 1


def test_a_weighting_of_what_the_data_lack_is_told_before_any_group_is_read() -> None:
    def never() -> Any:
        raise AssertionError

    pairs = Pairing("ratings", RLHF).pairs((never() for _ in "x"), ("helpfulness",), PairCounts())
    with pytest.raises(UserError, match=r"'rlhf' need correctness, coherence.* of helpfulness:"):
        next(pairs)
    names = ("coherence", "verbosity")
    scored = group(["x", "y"], scores=((1.0, 2.0), (2.0, 3.0)), score_names=names)
    with pytest.raises(UserError, match=r"need helpfulness, but the scores .* of coherence, verb"):
        made(Pairing("scores", HELPFULNESS), scored)


def test_a_single_score_is_the_reward_whatever_its_name() -> None:
    scored = group(["x", "y"], scores=((-1.5,), (2.0,)), score_names=("reward",))
    ((pair,), _) = made(Pairing("scores", RLHF), scored)
    assert pair.rewards == (-1.5, 2.0)
    ((pair,), _) = made(
        Pairing("scores", HELPFULNESS), replace(scored, score_names=("helpfulness",))
    )
    assert pair.preference_strength == 1


@pytest.mark.parametrize("gap", [-1.0, float("inf"), float("nan")])
def test_a_gap_that_makes_no_sense_is_refused(gap: float) -> None:
    with pytest.raises(UserError, match="min_gap"):
        Pairing("ratings", HELPFULNESS, gap)


def test_real_rows_give_the_pairs_that_a_count_by_hand_gives(real_data: Path) -> None:
    source = HelpSteer2(str(real_data / "helpsteer2_slice"))
    counts = PairCounts()
    pairs = list(BY_RATINGS.pairs(read_all(source, "train"), source.attribute_names, counts))

    path = real_data / "helpsteer2_slice" / "train.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    expected: dict[str, list[Any]] = defaultdict(list)
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["prompt"] == second["prompt"]
        ratings = [first["helpfulness"], second["helpfulness"]]
        texts = (first["response"], second["response"])
        if texts[0] == texts[1]:
            outcome = "one_response"
        elif None in ratings:
            outcome = "unknown"
        else:
            outcome = "ties" if ratings[0] == ratings[1] else "pairs"
        expected[outcome].append((texts, ratings))
    for outcome in ("pairs", "ties", "unknown", "one_response"):
        assert getattr(counts, outcome) == len(expected[outcome]), outcome
    assert counts.groups == len(rows) // 2
    assert counts.pairs > 500
    for pair, (texts, ratings) in zip(pairs, expected["pairs"], strict=True):
        assert pair.responses == texts
        assert pair.rewards == tuple(ratings)
        better = ratings.index(max(ratings))
        assert (pair.preference_strength or 0) * (1 if better else -1) == min(
            3, abs(ratings[0] - ratings[1])
        )
