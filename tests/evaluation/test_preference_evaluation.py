"""Held-out preferences: strict accuracy by strength under every weighting, ties and zeros apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpsteer2.data.groups import Group
from helpsteer2.errors import UserError
from helpsteer2.evaluation.preferences import PreferenceEvaluation

QUICK = 50


def pair(index: int, first: float, second: float, strength: int | None) -> Group:
    """A pair whose texts are numbers, so that a fake scorer can read its scores."""
    prompt = ({"role": "user", "content": f"prompt {index}"},)
    responses = (f"{first:g}", f"{second:g}")
    return Group(str(index), f"file:{index}", prompt, responses, preference_strength=strength)


def reads_number(prompt: str, response: str) -> list[float]:
    return [float(response)] * 5


PAIRS = (
    pair(0, 4, 1, -3),  # right
    pair(1, 1, 4, 3),  # right
    pair(2, 4, 1, 1),  # wrong
    pair(3, 2, 2, 2),  # equal scores
    pair(4, 1, 2, 1),  # right
    pair(5, 3, 1, 0),  # no winner
    pair(6, 3, 1, None),  # not known
)


def source(fakes, groups):
    return replace(fakes.source({"validation": tuple(groups)}), attribute_names=())


def test_every_figure_by_hand(fakes, context):
    result = PreferenceEvaluation(source(fakes, PAIRS), resamples=QUICK).evaluate(
        fakes.scorer(reads_number), context
    )
    assert (result["pairs"], result["undecided"], result["without_preference"]) == (5, 1, 1)
    ours = result["weightings"]["helpfulness_only"]
    assert (ours["right"], ours["wrong"], ours["ties"]) == (3, 1, 1)
    assert ours["accuracy"]["value"] == pytest.approx(3 / 5)
    assert ours["half_credit_accuracy"] == pytest.approx(3.5 / 5)
    accuracies = {name: of["accuracy"]["value"] for name, of in ours["subsets"].items()}
    assert accuracies == {"strength 1": 0.5, "strength 2": 0.0, "strength 3": 1.0}
    # Signed: second minus first, against −3 … 3.
    expected = np.corrcoef([-3, 3, -3, 0, 1], [-3, 3, 1, 2, 1])[0, 1]
    assert ours["strength_pearson"] == pytest.approx(expected)
    # A weighting with the sign turned round orders every pair the other way round.
    brief = result["weightings"]["brief"]
    assert (brief["right"], brief["wrong"], brief["ties"]) == (1, 3, 1)
    assert brief["strength_pearson"] == pytest.approx(-expected)


def test_the_order_in_which_a_pair_is_told_changes_no_figure(fakes, context, tmp_path):
    swapped = [
        replace(
            group,
            responses=group.responses[::-1],
            preference_strength=group.preference_strength and -group.preference_strength,
        )
        for group in PAIRS
    ]
    results = [
        PreferenceEvaluation(source(fakes, groups), resamples=QUICK).evaluate(
            fakes.scorer(reads_number), replace(context, scores_dir=tmp_path / str(i))
        )["weightings"]
        for i, groups in enumerate((PAIRS, swapped))
    ]
    for name, figures in results[0].items():
        pearson = figures.pop("strength_pearson")
        other = results[1][name].pop("strength_pearson")
        assert other is None if pearson is None else other == pytest.approx(pearson)
    assert results[0] == results[1]


def test_a_model_of_one_score_is_judged_by_it(fakes, context):
    scorer = fakes.scorer(lambda prompt, text: [float(text)], attribute_names=("reward",))
    evaluation = PreferenceEvaluation(source(fakes, PAIRS), resamples=QUICK)
    result = evaluation.evaluate(scorer, context)
    assert set(result["weightings"]) == {"own_reward", "longer_response"}
    assert result["weightings"]["own_reward"]["accuracy"]["value"] == pytest.approx(3 / 5)
    assert evaluation.headlines(result)["own_reward, all %"].startswith("60.0")
    assert result["outcomes"] == "110=1"


def test_gains_on_the_first_model_are_paired(fakes, context, tmp_path):
    pairs = [pair(i, 1, 2, 1 if i % 3 else -1) for i in range(60)]
    evaluation = PreferenceEvaluation(source(fakes, pairs), resamples=400)
    functions = {
        "first": lambda prompt, text: [float(text)],
        "same order": lambda prompt, text: [float(text) ** 3],
        "opposite": lambda prompt, text: [-float(text)],
        "nearly": lambda prompt, text: [float(text) * (-1 if prompt == "prompt 1" else 1)],
    }
    results = {
        name: evaluation.evaluate(
            fakes.scorer(function, attribute_names=("reward",)),
            replace(context, scores_dir=tmp_path / name),
        )
        for name, function in functions.items()
    }
    results["several scores"] = evaluation.evaluate(
        fakes.scorer(reads_number), replace(context, scores_dir=tmp_path / "several")
    )
    gains = evaluation.gains(results, seed=1)
    assert "first" not in gains
    assert gains["same order"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert gains["opposite"]["value"] == pytest.approx(1 / 3 - 2 / 3)
    assert gains["nearly"]["value"] == pytest.approx(-1 / 60)
    # One pair of sixty decides: far narrower than the interval of either accuracy.
    assert gains["nearly"]["high"] - gains["nearly"]["low"] < 0.1
    accuracy = results["first"]["weightings"]["own_reward"]["accuracy"]
    assert accuracy["high"] - accuracy["low"] > 0.15
    assert gains["several scores"] == {"value": None, "low": None, "high": None}


def test_the_table_tells_ties_and_what_was_left_out(fakes, context, as_text):
    evaluation = PreferenceEvaluation(source(fakes, PAIRS), resamples=QUICK)
    result = evaluation.evaluate(fakes.scorer(reads_number), context)
    text = as_text(evaluation.tables(result))
    assert "5 pairs" in text
    assert "1 pairs without a winner" in " ".join(text.split())
    assert "70.0" in text  # with half a win for the tie
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("strengths", [(0, 0), (None, None), (0, None)])
def test_nothing_decided_is_refused(fakes, context, strengths):
    groups = [pair(i, 1, 2, strength) for i, strength in enumerate(strengths)]
    scorer = fakes.scorer(reads_number)
    with pytest.raises(UserError, match="no preference of the split 'validation' has a winner"):
        PreferenceEvaluation(source(fakes, groups)).evaluate(scorer, context)
    assert scorer.scored == 0


def test_a_preference_among_three_is_refused_by_its_place(fakes, context):
    bad = replace(PAIRS[0], responses=("1", "2", "3"))
    with pytest.raises(UserError, match=r"file:0: .* 3 responses"):
        PreferenceEvaluation(source(fakes, [bad])).evaluate(fakes.scorer(reads_number), context)


def test_no_resamples_are_refused(fakes, tmp_path: Path):
    with pytest.raises(UserError, match="resamples"):
        PreferenceEvaluation(source(fakes, PAIRS), resamples=0)
