"""Attribute labels: their text, their order, and ratings that become one."""

from __future__ import annotations

import math
import random
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, STEERLM_ATTRIBUTES
from helpsteer2.data.labels import INFERENCE_VALUES, AttributeLabel, in_order
from helpsteer2.errors import UserError

NAMES = st.one_of(
    st.sampled_from(STEERLM_ATTRIBUTES),
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,8}", fullmatch=True),
)
RATINGS = st.dictionaries(NAMES, st.integers(0, 4), min_size=1, max_size=12)

NEMO_LABEL = (
    "quality:4,toxicity:0,humor:1,creativity:0,"
    "helpfulness:3,correctness:4,coherence:4,complexity:2,verbosity:2"
)
"""All nine attributes in the order in which NeMo-Aligner writes them."""


@given(RATINGS)
def test_text_and_label_say_the_same(ratings: dict[str, int]) -> None:
    label = AttributeLabel.of(ratings)
    assert AttributeLabel.parse(label.text) == label
    assert label.as_dict() == ratings
    parts = label.text.split(",")
    assert sorted(parts) == sorted(f"{name}:{value}" for name, value in ratings.items())


@given(RATINGS, st.randoms(use_true_random=False))
def test_the_order_in_which_ratings_are_given_does_not_matter(
    ratings: dict[str, int], order: random.Random
) -> None:
    label = AttributeLabel.of(ratings)
    names = list(ratings)
    order.shuffle(names)
    shuffled = AttributeLabel.of({name: ratings[name] for name in names})
    assert shuffled == label
    assert hash(shuffled) == hash(label)
    assert shuffled.text == label.text
    assert AttributeLabel.parse(",".join(f"{name}:{ratings[name]}" for name in names)) == label


def test_nine_attributes_stand_in_the_order_of_nemo_aligner() -> None:
    parts = NEMO_LABEL.split(",")
    for seed in range(20):
        random.Random(seed).shuffle(parts)
        assert AttributeLabel.parse(",".join(parts)).text == NEMO_LABEL
    others = [*reversed(HELPSTEER2_ATTRIBUTES), "zeal", "apt"]
    assert in_order(others) == (*HELPSTEER2_ATTRIBUTES, "apt", "zeal")
    assert AttributeLabel.parse("apt:1,verbosity:2,quality:3").text == "quality:3,verbosity:2,apt:1"


def test_white_space_around_a_label_is_let_be() -> None:
    assert AttributeLabel.parse(" helpfulness:4\n") == AttributeLabel.of({"helpfulness": 4})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected NAME:RATING"),
        ("helpfulness", "got 'helpfulness'"),
        ("helpfulness:", "got 'helpfulness:'"),
        ("helpfulness:4,", "got ''"),
        ("helpfulness:4,helpfulness:4", "every name once"),
        ("helpfulness:2.5", "got 'helpfulness:2.5'"),
        ("helpfulness:-1", "got 'helpfulness:-1'"),
        ("helpfulness:٣", "got 'helpfulness:٣'"),
        ("helpfulness:" + "9" * 5000, "expected NAME:RATING"),
        ("helpfulness:5", "helpfulness is 5, must be a whole number 0 to 4"),
        ("helpfulness:4, correctness:4", "' correctness' is no name"),
        (":4", "'' is no name"),
        ("help fulness:4", "is no name of an attribute"),
    ],
)
def test_a_text_that_is_no_label_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match="attribute label") as error:
        AttributeLabel.parse(text)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "value", [True, False, math.nan, math.inf, 2.5, -1, 5, 10**400, "4", None, [4], 1j]
)
def test_only_whole_numbers_of_the_scale_are_ratings(value: Any) -> None:
    with pytest.raises(UserError, match=r"verbosity is .*must be a whole number 0 to 4"):
        AttributeLabel.of({"helpfulness": 4, "verbosity": value})


@pytest.mark.parametrize("value", [4, 4.0, np.int64(4), np.float32(4.0)])
def test_a_whole_number_may_be_of_any_type(value: Any) -> None:
    label = AttributeLabel.of({"helpfulness": value})
    assert label.text == "helpfulness:4"
    assert type(label.values[0]) is int


def test_all_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        AttributeLabel.of({"a,b": 1, "humor": 7, "verbosity": 2, "quality": True})
    assert all(word in str(error.value) for word in ("'a,b'", "humor is 7", "quality is True"))
    assert "verbosity" not in str(error.value)
    with pytest.raises(UserError, match="names no attribute"):
        AttributeLabel.of({})


@pytest.mark.parametrize(
    ("rating", "level"),
    [
        (0.5, 0), (1.5, 2), (2.5, 2), (3.5, 4),  # Halves go to the even level.
        (0.51, 1), (2.51, 3), (3.49, 3), (-0.0, 0),
        (-7.0, 0), (-0.2, 0), (4.2, 4), (4.6, 4), (99.0, 4), (np.float32(2.5), 2),
    ],
)  # fmt: skip
def test_a_rating_becomes_the_nearest_level(rating: float, level: int) -> None:
    assert AttributeLabel.rounded(["verbosity"], [rating]).as_dict() == {"verbosity": level}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_rounding_is_that_of_decimals(rating: float) -> None:
    level = AttributeLabel.rounded(["verbosity"], [rating]).values[0]
    in_range = sorted((Decimal(0), Decimal(rating), Decimal(4)))[1]
    assert level == in_range.to_integral_value(ROUND_HALF_EVEN)


@pytest.mark.parametrize("rating", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_rounded(rating: float) -> None:
    with pytest.raises(UserError, match="not every rating is finite"):
        AttributeLabel.rounded(["helpfulness", "verbosity"], [1.0, rating])


def test_rounding_keeps_names_and_ratings_together() -> None:
    label = AttributeLabel.rounded(["verbosity", "helpfulness"], [0.8, 3.2])
    assert label.text == "helpfulness:3,verbosity:1"


def test_a_label_is_completed_with_what_is_usual() -> None:
    """arXiv 2406.08673, section 4.5: complexity and verbosity 2, the other three 4."""
    label = AttributeLabel.of({"verbosity": 0})
    assert label.completed(HELPSTEER2_ATTRIBUTES).as_dict() == {
        "helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 0
    }  # fmt: skip
    assert set(label.completed(STEERLM_ATTRIBUTES).as_dict()) == set(STEERLM_ATTRIBUTES)
    assert label.completed(["verbosity"]) == label
    assert set(INFERENCE_VALUES) == set(STEERLM_ATTRIBUTES)
    with pytest.raises(
        UserError, match=r"not trained with verbosity: .*of helpfulness, correctness"
    ):
        label.completed(["helpfulness", "correctness"])
    with pytest.raises(UserError, match="says nothing of zeal"):
        label.completed(["verbosity", "zeal", "humor"])
    own = AttributeLabel.of({"verbosity": 0, "zeal": 3})
    assert own.completed(["zeal", "verbosity", "humor"]).text == "humor:0,verbosity:0,zeal:3"
