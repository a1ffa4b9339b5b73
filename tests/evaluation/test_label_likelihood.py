from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.errors import UserError
from helpsteer2.evaluation.label_likelihood import (
    GRID,
    LabelLikelihoodEvaluation,
    level_shares,
)
from helpsteer2.evaluation.meaning import ScoreMeaning
from helpsteer2.functional.beta_ratings import READINGS, log_mass, mean_nll

QUICK = 40


def scores_in(prompt, response):
    """Scores that a response carries in its text."""
    return [float(score) for score in response.split()]


def groups_of(fakes, n, concentration=8.0, seed=0, low=0.3, high=3.7):
    """Two responses a prompt with scores, and ratings drawn around them as reading C has it."""
    random = np.random.default_rng(seed)
    made = []
    for index in range(n):
        scores = random.uniform(low, high, (2, 5)).round(3)
        u = (scores + 0.5) / 5
        ratings = np.floor(5 * random.beta(concentration * u, concentration * (1 - u)))
        texts = [" ".join(map(str, row)) for row in scores]
        made.append(fakes.group(index, texts, tuple(map(tuple, ratings.tolist()))))
    return made


@pytest.fixture
def evaluate(fakes, context):
    def run(groups, function=scores_in, seed=1, are_ratings=True, **options):
        source = fakes.source({"validation": groups})
        evaluation = LabelLikelihoodEvaluation(source, resamples=QUICK, **options)
        evaluation.check()
        told = replace(context, seed=seed, meaning=ScoreMeaning(are_ratings=are_ratings))
        return evaluation.evaluate(fakes.scorer(function), replace(told, model_key=None))

    return run


def test_the_concentration_that_made_the_ratings_is_found_on_one_half(fakes, evaluate):
    result = evaluate(groups_of(fakes, 300))
    figures = result["all"]
    of_c = figures["readings"]["C"]
    assert of_c["concentration"]["low"] < 8.0 < of_c["concentration"]["high"]
    assert of_c["nll_fitted"]["value"] < of_c["nll"]["value"]
    assert of_c["nll_fitted"]["high"] < figures["predictors"]["marginal"]["low"]
    assert of_c["nll_fitted"]["value"] < min(
        figures["readings"][name]["nll_fitted"]["value"] for name in "AB"
    )
    assert figures["predictors"]["uniform"] == pytest.approx(math.log(5))
    assert (result["prompts"], result["prompts_fitted_on"], figures["ratings"]) == (300, 150, 1500)
    for interval in (of_c["nll"], of_c["nll_fitted"], of_c["concentration"]):
        assert interval["low"] < interval["value"] < interval["high"]


def test_scores_that_know_nothing_gain_nothing_on_the_frequencies(fakes, evaluate):
    def constant(prompt, response):
        return [2.0] * 5

    figures = evaluate(groups_of(fakes, 200), constant)["all"]
    marginal = figures["predictors"]["marginal"]
    for of_reading in figures["readings"].values():
        assert of_reading["nll_fitted"]["high"] > marginal["value"]
        assert of_reading["nll"]["value"] > marginal["high"]


def test_every_prompt_is_fitted_on_or_told_about_and_never_both(fakes, evaluate):
    groups = groups_of(fakes, 9, seed=3)

    def figures(changed=None):
        flipped = [
            replace(g, attributes=tuple(tuple(4.0 - r for r in row) for row in g.attributes))
            if index == changed
            else g
            for index, g in enumerate(groups)
        ]
        found = evaluate(flipped)["all"]["readings"]["C"]
        return found["concentration"]["value"], found["nll"]["value"]

    before = figures()
    fitted_on = 0
    for index in range(len(groups)):
        concentration, nll = figures(index)
        assert (concentration == before[0]) != (nll == before[1])
        fitted_on += nll == before[1]
    assert fitted_on == 4


def test_the_halves_follow_the_seed(fakes, evaluate):
    groups = groups_of(fakes, 30)
    runs = [evaluate(groups, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0]["all"]["readings"] != runs[2]["all"]["readings"]


def test_an_attribute_is_told_of_as_if_it_were_the_only_one(fakes, evaluate, context):
    groups = groups_of(fakes, 30)
    every = evaluate(groups)["attributes"]
    assert tuple(every) == HELPSTEER2_ATTRIBUTES
    alone = [replace(g, attributes=tuple((row[3],) for row in g.attributes)) for g in groups]
    source = fakes.source({"validation": alone}, attribute_names=("complexity",))
    result = LabelLikelihoodEvaluation(source, resamples=QUICK).evaluate(
        fakes.scorer(scores_in), context
    )
    assert result["attributes"]["complexity"] == result["all"]
    assert result["all"]["readings"] == every["complexity"]["readings"]


def test_more_responses_of_the_same_kind_tell_no_more(fakes, evaluate):
    """Intervals resample prompts: a response written down four times is one piece of evidence."""
    groups = groups_of(fakes, 40)
    repeated = [replace(g, responses=g.responses * 4, attributes=g.attributes * 4) for g in groups]
    once, often = (evaluate(of)["all"]["readings"]["C"] for of in (groups, repeated))
    for name, interval in once.items():
        assert often[name] == pytest.approx(interval, rel=1e-3), name


def test_the_order_of_a_prompts_responses_does_not_matter(fakes, evaluate):
    groups = groups_of(fakes, 30)
    turned = [
        replace(g, responses=g.responses[::-1], attributes=g.attributes[::-1]) for g in groups
    ]
    for name, of_reading in evaluate(groups)["all"]["readings"].items():
        for figure, interval in evaluate(turned)["all"]["readings"][name].items():
            assert interval == pytest.approx(of_reading[figure], rel=1e-6), (name, figure)


def test_ratings_between_levels_are_rounded_and_unknown_ones_left_out(fakes, evaluate):
    groups = groups_of(fakes, 20)
    between = [
        replace(
            g,
            attributes=tuple(tuple(r + 0.4 if r < 4 else r for r in row) for row in g.attributes),
        )
        for g in groups
    ]
    assert evaluate(between)["attributes"] == evaluate(groups)["attributes"]
    holed = [replace(g, attributes=((None, *g.attributes[0][1:]), g.attributes[1])) for g in groups]
    some, full = evaluate(holed)["attributes"], evaluate(groups)["attributes"]
    assert (some["helpfulness"]["ratings"], full["helpfulness"]["ratings"]) == (10, 20)
    assert some["verbosity"] == full["verbosity"]


def test_an_attribute_without_ratings_is_unknown(fakes, evaluate, as_text, context):
    groups = [
        replace(g, attributes=tuple((None, *row[1:]) for row in g.attributes))
        for g in groups_of(fakes, 20)
    ]
    result = evaluate(groups)
    assert result["attributes"]["helpfulness"] is None
    assert result["all"]["ratings"] == 4 * result["attributes"]["verbosity"]["ratings"]
    table = as_text(LabelLikelihoodEvaluation(fakes.source({})).tables(result))
    assert any(line.split() == ["helpfulness", *"––––"] for line in table.splitlines())


def test_scores_outside_the_scale_are_counted_and_taken_as_its_ends(fakes, evaluate):
    groups = groups_of(fakes, 12)

    def wild(prompt, response):
        return [*scores_in(prompt, response)[:4], 5.5]

    def end(prompt, response):
        return [*scores_in(prompt, response)[:4], 4.0]

    beyond, within = evaluate(groups, wild), evaluate(groups, end)
    assert beyond["scores_outside"] == dict.fromkeys(HELPSTEER2_ATTRIBUTES, 0) | {"verbosity": 24}
    assert beyond["attributes"] == within["attributes"]


def test_scores_that_are_no_ratings_have_no_likelihood(fakes, evaluate, as_text):
    result = evaluate(groups_of(fakes, 12), are_ratings=False)
    assert (result["attributes"], result["all"], result["curve"]) == ({}, None, None)
    evaluation = LabelLikelihoodEvaluation(fakes.source({}))
    assert "have no unit" in " ".join(as_text(evaluation.tables(result)).split())
    assert evaluation.headlines(result) == {}
    assert evaluation.figures({"policy": result}) == {}


def test_the_curve_is_of_the_half_that_is_told_about(fakes, evaluate):
    result = evaluate(groups_of(fakes, 30))
    curve = result["curve"]
    assert curve["concentrations"] == pytest.approx(list(GRID))
    for name, of_reading in result["all"]["readings"].items():
        at_24 = np.interp(np.log(24.0), np.log(GRID), curve["nll"][name])
        assert at_24 == pytest.approx(of_reading["nll"]["value"], rel=0.01)


def test_frequencies_are_never_zero():
    shares = level_shares(np.array([4, 4, 3]))
    assert shares == pytest.approx([1 / 8, 1 / 8, 1 / 8, 2 / 8, 3 / 8])


def test_another_concentration_can_stand_beside_the_fitted_one(fakes, evaluate):
    groups = groups_of(fakes, 12)
    first = evaluate(groups, concentration=5.0)
    fitted_half = {name: of["concentration"] for name, of in first["all"]["readings"].items()}
    at_24 = evaluate(groups)
    for name, of_reading in at_24["all"]["readings"].items():
        assert of_reading["concentration"] == fitted_half[name]
        assert of_reading["nll"] != first["all"]["readings"][name]["nll"]
    with pytest.raises(UserError, match="concentration=0"):
        LabelLikelihoodEvaluation(fakes.source({}), concentration=0)
    with pytest.raises(UserError, match="resamples"):
        LabelLikelihoodEvaluation(fakes.source({}), resamples=0)


def test_one_prompt_is_too_few_for_two_halves(fakes):
    groups = groups_of(fakes, 3)
    unrated = [groups[0], *(replace(g, attributes=None) for g in groups[1:])]
    with pytest.raises(UserError, match="fewer than two prompts with ratings"):
        LabelLikelihoodEvaluation(fakes.source({"validation": unrated})).check()


def test_the_mean_is_that_of_single_ratings(fakes, evaluate):
    """All prompts rated alike: whatever the halves, the figure is that of one of them."""
    group = groups_of(fakes, 1)[0]
    figures = evaluate([group] * 6)["all"]["readings"]
    scores = np.array([scores_in("", text) for text in group.responses])
    levels = np.array(group.attributes).astype(int)
    for name, of_reading in figures.items():
        single = -log_mass(scores, levels, 24.0, READINGS[name])
        assert of_reading["nll"]["value"] == pytest.approx(single.mean())
        fitted = of_reading["concentration"]["value"]
        assert of_reading["nll_fitted"]["value"] == pytest.approx(
            mean_nll(scores.ravel(), levels.ravel(), fitted, READINGS[name])
        )


def test_what_is_shown_fits_and_names_everything(fakes, evaluate, as_text):
    evaluation = LabelLikelihoodEvaluation(fakes.source({}))
    result = evaluate(groups_of(fakes, 20))
    text = as_text(evaluation.tables(result))
    assert max(map(len, text.splitlines())) <= 100
    for word in (*HELPSTEER2_ATTRIBUTES, "all attributes", "marginal", "uniform", "c = 24"):
        assert word in text
    assert "C at 24, nats" in evaluation.headlines(result)
    one = evaluation.figures({"policy": result})
    assert set(one) == {"concentration"}
    axes = one["concentration"].axes[0]
    assert {"α + β = 24", "marginal"} <= {line.get_label() for line in axes.get_lines()}
    several = evaluation.figures({"a/x": result, "b": result})
    assert set(several) == {"concentration_a_x", "concentration_b"}
