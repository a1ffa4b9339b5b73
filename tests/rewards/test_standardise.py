"""Standardised rewards have mean 0 and standard deviation 1, under any weighting, from one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpsteer2.attributes import AttributeWeights
from helpsteer2.errors import UserError
from helpsteer2.rewards.standardise import ScoreStatistics

NAMES = ("a", "b", "c")
MIX = AttributeWeights("mix", {"a": 0.65, "c": -0.4})


def scores(n: int = 500) -> np.ndarray:
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(n, 3)) @ rng.normal(size=(3, 3)) + [1.0, 2.0, 1000.0]
    return mixed.astype(np.float32)


def statistics(values: np.ndarray) -> ScoreStatistics:
    return ScoreStatistics.of(values, NAMES, "model", "data")


@pytest.mark.parametrize("weights", [MIX, AttributeWeights("one", {"b": -2.0})])
def test_standardised_rewards_have_mean_0_and_std_1(weights: AttributeWeights) -> None:
    values = scores()
    standardise = statistics(values).standardisation(weights)
    rewards = standardise(weights.reward(values.astype(np.float64), NAMES))
    assert rewards.mean() == pytest.approx(0, abs=1e-6)
    assert rewards.std() == pytest.approx(1, abs=1e-6)


def test_standardising_keeps_the_order_and_what_it_is_given() -> None:
    import torch

    standardise = statistics(scores()).standardisation(MIX)
    rewards = torch.tensor([0.0, 1.0, 5.0])
    assert (standardise(rewards).diff() > 0).all()
    assert standardise(1.0) == pytest.approx(float(standardise(rewards)[1]))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    made = statistics(scores())
    made.save(tmp_path / "statistics.json")
    assert ScoreStatistics.load(tmp_path / "statistics.json") == made


def test_equal_rewards_cannot_be_standardised() -> None:
    values = scores()
    values[:, 0] = values[:, 2]
    opposite = AttributeWeights("opposite", {"a": 1.0, "c": -1.0})
    with pytest.raises(UserError, match=r"'opposite' give all 500 responses the same reward"):
        statistics(values).standardisation(opposite)
    with pytest.raises(UserError, match="same reward"):
        statistics(values[:1]).standardisation(MIX)


def test_a_weighting_of_other_attributes_names_both() -> None:
    with pytest.raises(UserError, match=r"'x' need d.*scores a, b, c"):
        statistics(scores()).standardisation(AttributeWeights("x", {"d": 1.0}))


@pytest.mark.parametrize("values", [np.empty((0, 3)), np.array([[0.0, 1.0, np.nan]])])
def test_scores_without_statistics(values: np.ndarray) -> None:
    with pytest.raises(UserError):
        statistics(values.astype(np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"means": [0.0, 1.0]}, "do not fit 3 attributes"),
        ({"means": [0.0, 1.0, "2"]}, "have to be numbers"),
        ({"means": [0.0, 1.0, None]}, "have to be numbers"),
        ({"means": 3}, "have to be lists"),
        ({"covariance": [[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]}, "none"),
        ({"covariance": [[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]}, "none"),
        ({"responses": 0}, "1 or more"),
        ({"responses": 2.5}, "whole number"),
        ({"attribute_names": ["a", "b", "b"]}, "distinct"),
        ({"format_version": 2}, "format 2"),
        ({"model_hash": None}, "texts"),
        ({"more": 1}, "and no more"),
    ],
)
def test_a_file_that_was_edited_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "statistics.json"
    statistics(scores()).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message) as error:
        ScoreStatistics.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"means": [NaN]}', "null"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "statistics.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"statistics\.json"):
        ScoreStatistics.load(path)


def test_a_missing_file_says_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="helpsteer2 annotate"):
        ScoreStatistics.load(tmp_path / "nothing.json")
