"""Statistics of groups, held against the standard library and against figures worked by hand."""

from __future__ import annotations

import random
import statistics
from typing import Any

import numpy as np
import pytest

from helpsteer2.data import description
from helpsteer2.data.description import DataStatistics
from helpsteer2.data.groups import Group, Message

USER = Message(role="user", content="question")
ANSWER = Message(role="assistant", content="answer")


def group(*responses: str, prompt: tuple[Message, ...] = (USER,), **other: Any) -> Group:
    return Group("g", "", prompt, responses or ("a", "b"), **other)


def described(names: tuple[str, ...], *groups: Group) -> dict[str, Any]:
    made = DataStatistics(names, resamples=20)
    for one in groups:
        made.add(one)
    return made.result()


def random_groups(number: int) -> list[Group]:
    """Helpfulness known, wit not always, one length of prompt, responses of any length."""
    rng = random.Random(0)
    return [
        group(
            *("x" * rng.randint(1, 2000) for _ in "ab"),
            attributes=tuple(
                (float(rng.randint(0, 4)), rng.choice([None, 0.0, 2.5, 4.0])) for _ in "ab"
            ),
        )
        for _ in range(number)
    ]


def test_columns_agree_with_the_standard_library() -> None:
    groups = random_groups(700)
    found = described(("helpfulness", "wit"), *groups)["columns"]
    rows = [row for one in groups for row in one.attributes or ()]
    helpfulness = [row[0] or 0.0 for row in rows]
    known = [(row[0] or 0.0, row[1]) for row in rows if row[1] is not None]
    lengths = [len(response) for one in groups for response in one.responses]
    wit = found["wit"]
    assert wit["known"] == len(known)
    assert wit["mean"] == pytest.approx(statistics.mean(w for _, w in known))
    assert wit["std"] == pytest.approx(statistics.stdev(w for _, w in known))
    correlation = statistics.correlation(*zip(*known, strict=True))
    assert wit["pearson_with_helpfulness"] == pytest.approx(correlation)
    characters = found["response characters"]
    assert characters["mean"] == pytest.approx(statistics.mean(lengths))
    assert characters["std"] == pytest.approx(statistics.stdev(lengths))
    correlation = statistics.correlation(lengths, helpfulness)
    assert characters["pearson_with_helpfulness"] == pytest.approx(correlation)
    assert np.isnan(found["prompt characters"]["pearson_with_helpfulness"])  # Constant.
    ties = [a == b for a, b in zip(helpfulness[::2], helpfulness[1::2], strict=True)]
    assert found["helpfulness"]["ties"] == pytest.approx(statistics.mean(ties))
    assert found["helpfulness"]["counts"] == [helpfulness.count(i) for i in range(5)]


def test_matrix_is_symmetric_and_its_first_row_is_the_column_of_the_table() -> None:
    found = described(("helpfulness", "wit"), *random_groups(300))
    matrix = found["correlations"]["matrix"]
    np.testing.assert_allclose(matrix, matrix.T)
    assert list(found["correlations"]["columns"]) == list(found["columns"])
    shown = [column["pearson_with_helpfulness"] for column in found["columns"].values()]
    np.testing.assert_array_equal(matrix[0], shown)
    assert matrix[0, 0] == pytest.approx(1.0)


def test_turns_are_counted_with_the_assistants_and_without_a_system_message() -> None:
    system = Message(role="system", content="12345")
    found = described((), group("a", prompt=(system, USER, ANSWER, USER)))["columns"]
    assert found["prompt turns"]["mean"] == 3
    assert found["prompt characters"]["mean"] == 5 + 2 * len("question") + len("answer")
    assert np.isnan(found["prompt turns"]["std"])


def test_a_prompt_counts_once_a_response() -> None:
    long = (Message(role="user", content="x" * 100),)
    short = (Message(role="user", content="x" * 10),)
    found = described((), group("a", "b", "c", prompt=long), group("a", prompt=short))
    assert found["columns"]["prompt characters"]["mean"] == pytest.approx((300 + 10) / 4)
    assert found["responses"] == {"number": 4, "fewest": 1, "most": 3}


def test_one_response_groups_have_no_ties_and_unrated_ones_no_ratings() -> None:
    rated = group("a", attributes=((3.0,),))
    found = described(("helpfulness",), rated, group("a"), group("a", attributes=((None,),)))
    helpfulness = found["columns"]["helpfulness"]
    assert helpfulness["known"] == 1
    assert helpfulness["mean"] == 3.0
    assert np.isnan(helpfulness["ties"])
    assert np.isnan(helpfulness["std"])
    assert helpfulness["counts"] == [0, 0, 0, 1, 0]
    assert found["columns"]["response characters"]["known"] == 3
    assert found["preferences"] is None
    assert found["raters"] is None


def test_data_without_helpfulness_have_no_correlation_with_it() -> None:
    found = described(("wit",), *[group(attributes=((1.0,), (2.0,))) for _ in range(3)])
    assert np.isnan(found["columns"]["wit"]["pearson_with_helpfulness"])
    assert found["correlations"]["matrix"][0, 0] == pytest.approx(1.0)


def test_no_groups_at_all() -> None:
    found = described(("helpfulness",))
    assert found["groups"] == 0
    assert found["responses"] == {"number": 0, "fewest": 0, "most": 0}
    assert np.isnan(found["columns"]["helpfulness"]["mean"])


def test_preferences_are_counted_by_strength() -> None:
    strengths = [-3, 0, 0, 2, 2, 2]
    groups = [group(preference_strength=strength) for strength in strengths]
    found = described((), *groups, group())["preferences"]
    assert found["known"] == 6
    assert found["ties"] == pytest.approx(2 / 6)
    counts = {-3: 1, -2: 0, -1: 0, 0: 2, 1: 0, 2: 3, 3: 0}
    assert found["strengths"] == counts


def test_annotations_are_told_of() -> None:
    annotations = (((3, 4, 4),), ((1, 1, 2),))
    found = described(("helpfulness",), group(annotations=annotations))["raters"]
    assert found["all"]["attributes"]["helpfulness"]["pairs"] == 6


def test_columns_for_histograms_are_whole_until_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = random_groups(300)
    made = DataStatistics(("helpfulness", "wit"), resamples=2)
    monkeypatch.setattr(description, "SAMPLE_SIZE", 100)
    few = DataStatistics(("helpfulness", "wit"), resamples=2)
    for one in groups:
        made.add(one)
        few.add(one)
    whole, sample = made.columns(), few.columns()
    assert len(whole["helpfulness"]) == 600
    assert whole["helpfulness"].mean() == pytest.approx(
        made.result()["columns"]["helpfulness"]["mean"]
    )
    assert len(whole["wit"]) == made.result()["columns"]["wit"]["known"]
    assert len(sample["helpfulness"]) == 100
    assert set(sample["response characters"]) <= set(whole["response characters"])
