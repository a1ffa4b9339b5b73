"""Agreement of raters: figures worked by hand, poolings against what they say, and real lists."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES as NAMES
from helpsteer2.data.rater_agreement import DIVERGENCES, POOLINGS, Annotations, RaterAgreement
from helpsteer2.data.sources.helpsteer import HelpSteer2
from helpsteer2.functional.agreement import quadratic_kappa

FIRST = (((0, 2, 4),), ((4, 4, 4),))
SECOND = (((1, 1),), ((3, 3, 1),))


def figures(
    *prompts: Annotations, names: tuple[str, ...] = ("helpfulness",), resamples: int = 50
) -> dict[str, Any]:
    agreement = RaterAgreement(names, resamples=resamples, seed=0)
    for prompt in prompts:
        agreement.add(prompt)
    result = agreement.result()
    assert result is not None
    return result


def random_prompts(number: int, seed: int = 0) -> list[Annotations]:
    """Two responses a prompt, two to five raters around a common truth."""
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(number):
        raters = int(rng.integers(2, 6))
        truths = rng.integers(0, 5, 2)
        ratings = np.clip(truths[:, None] + rng.integers(-1, 2, (2, raters)), 0, 4)
        prompts.append(tuple((tuple(map(int, row)),) for row in ratings))
    return prompts


def test_two_prompts_worked_by_hand() -> None:
    found = figures(FIRST, SECOND)["all"]
    assert found["prompts"] == 2
    assert found["raters_a_response"].value == 11 / 4
    of = found["attributes"]["helpfulness"]
    assert (of["rated"], of["pairs"], of["raters"].value) == (4, 10, 11 / 4)
    kappas = {pooling: interval.value for pooling, interval in of["kappa"].items()}
    # Ten pairs of mean squared difference 3.2; 4.16 and 4.08 are expected. Response by response
    # the squared differences are 8, 0, 0 and 8/3, and 37/9 is expected.
    assert kappas == pytest.approx(
        {"file_order": 3 / 13, "both_orders": 11 / 51, "one_pair": 13 / 37}
    )
    # The second prompt has two ratings of one response and three of the other.
    preferences = found["preferences"]
    assert (preferences["compared"], preferences["not_comparable"]) == (1, 1)
    assert preferences["shares"]["one-sided"].value == 1.0


def test_the_final_filter_drops_a_prompt_with_one_disputed_response() -> None:
    kept = figures(FIRST, SECOND)["final_filter"]
    assert kept["prompts"] == 1
    assert kept["attributes"]["helpfulness"]["rated"] == 2
    # Two more raters settle the dispute, or do not.
    settled = (((0, 2, 4, 4, 3),), ((4, 4, 4, 4, 4),))
    unsettled = (((0, 4, 0, 4),), ((4, 4, 4, 4),))
    assert figures(settled)["final_filter"]["prompts"] == 1
    assert "final_filter" not in figures(unsettled)
    alone = (((1,),), ((1,),))
    assert "final_filter" not in figures(alone)


def test_every_class_of_divergence_is_counted() -> None:
    pairs = [
        ((2, 2), (2, 2)),
        ((1, 2), (2, 2)),
        ((2, 2), (1, 2)),
        ((1, 3), (2, 2)),
        ((0, 4), (2, 2)),
    ]
    found = figures(*[((first,), (second,)) for first, second in pairs])["all"]["preferences"]
    shares = {name: interval.value for name, interval in found["shares"].items()}
    assert found["compared"] == 5
    # As published: diverging holds the substantial ones.
    assert shares == pytest.approx(
        {"tied": 0.2, "one-sided": 0.4, "diverging": 0.4, "substantially diverging": 0.2}
    )
    assert tuple(shares) == DIVERGENCES


def test_responses_of_one_prompt_are_compared_two_by_two() -> None:
    three = (((0, 1),), ((1, 0),), ((2, 2),))
    found = figures(three)["all"]["preferences"]
    assert found["compared"] == 3
    assert found["shares"]["diverging"].value == pytest.approx(1 / 3)


def test_one_response_has_raters_and_no_preferences() -> None:
    found = figures((((1, 2, 2),),))["all"]
    assert found["preferences"] == {"compared": 0, "not_comparable": 0, "shares": None}
    assert found["attributes"]["helpfulness"]["pairs"] == 3


def test_attributes_and_responses_that_nobody_rated() -> None:
    names = ("helpfulness", "wit")
    found = figures((((), (1, 2)), ((), ())), names=names)["all"]
    assert found["attributes"]["helpfulness"]["rated"] == 0
    assert np.isnan(found["attributes"]["helpfulness"]["kappa"]["file_order"].value)
    assert found["attributes"]["wit"]["rated"] == 1
    assert found["raters_a_response"].value == 2.0
    assert found["preferences"] == {"compared": 0, "not_comparable": 1, "shares": None}


def test_nothing_annotated_is_nothing() -> None:
    agreement = RaterAgreement(NAMES, resamples=5, seed=0)
    agreement.add((((),) * 5, ((),) * 5))
    assert agreement.result() is None


def test_without_helpfulness_there_is_no_filter_and_no_preference() -> None:
    found = figures((((1, 2),), ((2, 2),)), names=("wit",))
    assert set(found) == {"all"}
    assert found["all"]["preferences"] is None


def test_one_pair_a_response_is_what_drawing_pairs_gives_on_average() -> None:
    prompts = random_prompts(400)
    exact = figures(*prompts)["all"]["attributes"]["helpfulness"]["kappa"]["one_pair"].value
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(200):
        pairs = [
            rng.choice(ratings, 2, replace=False)
            for response in itertools.chain(*prompts)
            for ratings in response
        ]
        drawn.append(quadratic_kappa(*np.transpose(pairs)))
    assert exact == pytest.approx(np.mean(drawn), abs=0.003)


def test_intervals_hold_the_figure_and_narrow_with_more_prompts() -> None:
    few, many = (figures(*random_prompts(n), resamples=500)["all"] for n in (60, 960))
    widths = {}
    for name, found in {"few": few, "many": many}.items():
        kappas = found["attributes"]["helpfulness"]["kappa"]
        assert all(kappas[pooling].low < kappas[pooling].value for pooling in POOLINGS)
        assert all(kappas[pooling].high > kappas[pooling].value for pooling in POOLINGS)
        widths[name] = kappas["both_orders"].high - kappas["both_orders"].low
    # Sixteen times the prompts, about a quarter of the width.
    assert 2.5 < widths["few"] / widths["many"] < 6


def test_order_of_raters_matters_to_file_order_alone() -> None:
    prompts = random_prompts(200)
    turned = [
        tuple((ratings[1:] + ratings[:1],) for (ratings,) in prompt)  # type: ignore[operator]
        for prompt in prompts
    ]
    here, there = (
        figures(*data)["all"]["attributes"]["helpfulness"]["kappa"] for data in (prompts, turned)
    )
    for pooling in ("both_orders", "one_pair"):
        assert here[pooling].value == pytest.approx(there[pooling].value)
    assert here["file_order"].value != pytest.approx(there["file_order"].value, abs=1e-6)


def test_real_lists_agree_with_kappa_of_the_listed_pairs(real_data: Path) -> None:
    path = real_data / "helpsteer2_slice" / "disagreements.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    agreement = RaterAgreement(NAMES, resamples=20, seed=0)
    problems: list[Any] = []
    for group in HelpSteer2(str(path), config="disagreements").read("train", problems.append):
        assert group.annotations is not None
        agreement.add(group.annotations)
    result = agreement.result()
    assert result is not None
    assert not problems
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    for name in NAMES:
        lists = [row[name] for row in rows if row[name]]
        pairs = [pair for ratings in lists for pair in itertools.combinations(ratings, 2)]
        first, second = np.transpose(pairs) if pairs else ((), ())
        found = result["all"]["attributes"][name]
        assert (found["rated"], found["pairs"]) == (len(lists), len(pairs))
        assert found["raters"].value == pytest.approx(np.mean([len(one) for one in lists]))
        kappa = found["kappa"]["file_order"].value
        assert kappa == pytest.approx(quadratic_kappa(first, second), nan_ok=True)
