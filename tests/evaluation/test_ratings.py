from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from helpsteer2.attributes import AttributeWeights
from helpsteer2.data.groups import Group
from helpsteer2.errors import DataError, UserError
from helpsteer2.evaluation.baselines import length_predictor, mean_predictor, read_rated
from helpsteer2.evaluation.meaning import ScoreMeaning
from helpsteer2.evaluation.ratings import RatingEvaluation
from helpsteer2.losses.preference import BradleyTerry, MarginBradleyTerry, ScaledBradleyTerry
from helpsteer2.modules.regression import RegressionModule

QUICK = 60


def text_of(ratings, filler):
    """A response that carries its ratings, so that a fake scorer can read them."""
    return "".join(str(int(rating)) for rating in ratings) + " " + "x" * filler


def ratings_in(prompt, response):
    return [float(digit) for digit in response[:5]]


def groups_of(fakes, n, seed=0, responses=2, length_of=lambda rng, row: int(rng.integers(1, 200))):
    rng = np.random.default_rng(seed)
    made = []
    for index in range(n):
        rows = rng.integers(0, 5, (responses, 5))
        texts = [text_of(row, length_of(rng, row)) for row in rows]
        made.append(fakes.group(index, texts, tuple(tuple(map(float, row)) for row in rows)))
    return made


@pytest.fixture
def source(fakes):
    return fakes.source(
        {"train": groups_of(fakes, 60, seed=1), "validation": groups_of(fakes, 40, seed=2)}
    )


def test_a_model_that_knows_the_ratings_is_perfect_and_gains_on_both_baselines(
    fakes, source, context
):
    evaluation = RatingEvaluation(source, resamples=QUICK)
    result = evaluation.evaluate(fakes.scorer(ratings_in), context)
    for attribute in result["attributes"].values():
        model = attribute["predictors"]["model"]
        assert model["mse"] == {"value": 0.0, "low": 0.0, "high": 0.0}
        assert (model["mae"]["value"], model["r2"]["value"]) == (0.0, 1.0)
        assert model["pearson"]["value"] == pytest.approx(1.0)
        assert model["spearman"]["value"] == pytest.approx(1.0)
        assert model["calibration_error"] == 0.0
        pairs = model["pairs"]
        assert (pairs["wrong"], pairs["predicted_ties"], pairs["unknown"]) == (0, 0, 0)
        assert pairs["right"] + pairs["rating_ties"] == 40
        assert pairs["rating_ties"] > 0
        gains = attribute["differences"]
        assert gains["mse_gain_over_mean"]["low"] > 0.0
        assert gains["mse_gain_over_length"]["low"] > 0.0
        assert gains["pair_accuracy_gain_over_length"]["low"] > 0.0


def test_the_mean_predictor_only_ties_and_explains_nothing(fakes, source, context):
    result = RatingEvaluation(source, resamples=QUICK).evaluate(fakes.scorer(ratings_in), context)
    mean = result["attributes"]["coherence"]["predictors"]["mean"]
    assert mean["pairs"]["accuracy"]["value"] == 0.0
    assert mean["pairs"]["half_credit_accuracy"] == 0.5
    assert mean["pairs"]["predicted_ties"] == mean["pairs"]["decided"]
    assert mean["pearson"]["value"] is None
    assert mean["r2"]["value"] <= 0.0


def test_the_length_predictor_finds_ratings_that_follow_length(fakes):
    splits = {
        name: groups_of(fakes, 50, seed, length_of=lambda rng, row: 1 + 100 * int(row[4]))
        for seed, name in enumerate(["train", "validation"])
    }
    train, test = (read_rated(fakes.source(splits), name) for name in splits)
    length, mean = length_predictor(train, test), mean_predictor(train, test)
    errors = [((p - test.ratings) ** 2).mean(axis=0) for p in (length, mean)]
    assert errors[0][4] < 0.1 * errors[1][4]
    assert errors[0][0] > 0.8 * errors[1][0]


def test_baselines_never_see_the_evaluated_ratings(fakes, context):
    train = groups_of(fakes, 30, seed=1)
    shifted = [
        replace(group, attributes=tuple((4.0,) * 5 for _ in group.responses))
        for group in groups_of(fakes, 20, seed=2)
    ]
    source = fakes.source({"train": train, "validation": shifted})
    fitted_apart = RatingEvaluation(source, resamples=QUICK).evaluate(
        fakes.scorer(ratings_in), context
    )
    assert fitted_apart["attributes"]["helpfulness"]["predictors"]["mean"]["mse"]["value"] > 1.0
    fitted_here = RatingEvaluation(source, train_split=None, resamples=QUICK).evaluate(
        fakes.scorer(ratings_in), context
    )
    assert fitted_here["baselines_fitted_on"] == "validation"
    assert fitted_here["attributes"]["helpfulness"]["predictors"]["mean"]["mse"]["value"] == (
        pytest.approx(0.0)
    )


def test_nulls_are_masked_and_change_no_other_attribute(fakes, source, context):
    def blank(group: Group, index: int) -> Group:
        first = (None, *group.attributes[0][1:]) if index % 2 else group.attributes[0]
        return replace(group, attributes=(first, *group.attributes[1:]))

    holed = fakes.source(
        {
            "train": source.splits["train"],
            "validation": [blank(g, i) for i, g in enumerate(source.splits["validation"])],
        }
    )
    scorer = fakes.scorer(lambda prompt, response: [len(response) / 50] * 5)
    full = RatingEvaluation(source, resamples=QUICK).evaluate(scorer, context)["attributes"]
    some = RatingEvaluation(holed, resamples=QUICK).evaluate(scorer, context)["attributes"]
    assert (full["helpfulness"]["known"], some["helpfulness"]["known"]) == (80, 60)
    pairs = some["helpfulness"]["predictors"]["model"]["pairs"]
    assert pairs["unknown"] == 20
    assert pairs["decided"] + pairs["rating_ties"] == 20
    assert some["verbosity"] == full["verbosity"]


def test_an_attribute_without_any_rating_is_unknown_and_not_zero(fakes, context, as_text):
    groups = [
        replace(g, attributes=tuple((None, *row[1:]) for row in g.attributes))
        for g in groups_of(fakes, 12)
    ]
    source = fakes.source({"train": groups, "validation": groups})
    evaluation = RatingEvaluation(source, resamples=QUICK)
    result = evaluation.evaluate(fakes.scorer(ratings_in), context)
    model = result["attributes"]["helpfulness"]["predictors"]["model"]
    assert model["mse"] == {"value": None, "low": None, "high": None}
    assert model["pairs"]["accuracy"]["value"] is None
    assert result["weightings"]["uniform"]["pairs_by_helpfulness"]["decided"] == 0
    assert "0 rated" in as_text(evaluation.tables(result))


def test_every_weighting_is_held_against_helpfulness(fakes, source, context):
    result = RatingEvaluation(source, resamples=QUICK).evaluate(fakes.scorer(ratings_in), context)
    rewards = result["weightings"]
    assert set(rewards) == {"helpfulness_only", "uniform", "brief"}
    assert rewards["helpfulness_only"]["pairs_by_helpfulness"]["accuracy"]["value"] == 1.0
    test = read_rated(source, "validation")
    first, second = test.ratings[0::2], test.ratings[1::2]
    decided = first[:, 0] != second[:, 0]
    agree = (first[:, 0] > second[:, 0]) == (first.sum(1) > second.sum(1))
    strict = agree & (first.sum(1) != second.sum(1))
    assert rewards["uniform"]["pairs_by_helpfulness"]["accuracy"]["value"] == pytest.approx(
        strict[decided].mean()
    )
    assert rewards["brief"]["outputs"]["mean"] == pytest.approx(-test.ratings[:, 4].mean())


def test_ten_responses_a_prompt_give_all_their_pairs(fakes, context):
    groups = groups_of(fakes, 5, responses=10)
    source = fakes.source({"train": groups, "validation": groups})
    result = RatingEvaluation(source, resamples=QUICK).evaluate(fakes.scorer(ratings_in), context)
    assert (result["prompts"], result["responses"], result["pairs"]) == (5, 50, 225)


def test_a_second_run_reads_the_scores_of_the_first(fakes, source, context):
    scorer = fakes.scorer(ratings_in)
    evaluation = RatingEvaluation(source, resamples=QUICK)
    first = evaluation.evaluate(scorer, context)
    assert scorer.scored == 40
    assert evaluation.evaluate(scorer, context) == first
    assert scorer.scored == 40
    evaluation.evaluate(scorer, replace(context, model_key="another model"))
    assert scorer.scored == 80
    evaluation.evaluate(scorer, replace(context, model_key=None))
    evaluation.evaluate(scorer, replace(context, model_key=None))
    assert scorer.scored == 160


def test_damaged_or_foreign_kept_scores_cost_a_pass_and_nothing_else(fakes, source, context):
    scorer = fakes.scorer(ratings_in)
    evaluation = RatingEvaluation(source, resamples=QUICK)
    first = evaluation.evaluate(scorer, context)
    (kept,) = context.scores_dir.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert evaluation.evaluate(scorer, context) == first
    assert scorer.scored == 80
    other = fakes.source({**source.splits, "validation": groups_of(fakes, 40, seed=9)})
    RatingEvaluation(other, resamples=QUICK).evaluate(scorer, context)
    assert scorer.scored == 120


def test_scores_that_are_not_finite_are_refused(fakes, source, context):
    scorer = fakes.scorer(lambda prompt, response: [float("nan")] * 5)
    with pytest.raises(UserError, match="group 1 are not finite"):
        RatingEvaluation(source, resamples=QUICK).evaluate(scorer, context)
    assert not context.scores_dir.exists()


def test_a_weighting_that_does_not_fit_is_skipped_and_says_why(fakes, source, context, as_text):
    scorer = fakes.scorer(lambda prompt, response: [len(response)], ("helpfulness",))
    evaluation = RatingEvaluation(source, resamples=QUICK)
    result = evaluation.evaluate(scorer, context)
    assert set(result["weightings"]) == {"own_reward", "helpfulness_only"}
    assert "need" in result["skipped_weightings"]["brief"]
    assert "skipped" in as_text(evaluation.tables(result))


def test_a_single_score_of_any_name_is_its_own_reward(fakes, source, context):
    scorer = fakes.scorer(lambda prompt, response: [float(response[0])], ("LABEL_0",))
    evaluation = RatingEvaluation(source, resamples=QUICK)
    result = evaluation.evaluate(scorer, context)
    assert set(result["weightings"]) == {"own_reward"}
    assert result["weightings"]["own_reward"]["pairs_by_helpfulness"]["accuracy"]["value"] == 1.0
    assert "known" not in result["attributes"]["LABEL_0"]


def test_the_stored_weighting_comes_first(fakes, source, context, as_text):
    stored = AttributeWeights("uniform", {"verbosity": 1.0})  # another one of the same name
    own = replace(context, meaning=ScoreMeaning(stored))
    evaluation = RatingEvaluation(source, resamples=QUICK)
    rewards = evaluation.evaluate(fakes.scorer(ratings_in), own)["weightings"]
    assert list(rewards) == ["own_reward", "helpfulness_only", "uniform", "brief"]
    brief, verbose = (rewards[name]["outputs"]["mean"] for name in ("brief", "own_reward"))
    assert verbose == pytest.approx(-brief)


def test_scores_without_a_unit_are_judged_by_order_alone(fakes, source, context, as_text):
    evaluation = RatingEvaluation(source, resamples=QUICK)
    scorer = fakes.scorer(ratings_in)
    known = evaluation.evaluate(scorer, context)["attributes"]["helpfulness"]
    unitless = replace(context, meaning=ScoreMeaning(are_ratings=False))
    result = evaluation.evaluate(scorer, unitless)
    found = result["attributes"]["helpfulness"]
    model = found["predictors"]["model"]
    for error in ("mse", "mae", "r2"):
        assert model[error]["value"] is None
    assert model["calibration_error"] is None
    for kept in ("pearson", "spearman", "pairs"):
        assert model[kept] == known["predictors"]["model"][kept]
    for predictor in ("mean", "length"):
        assert found["predictors"][predictor] == known["predictors"][predictor]
    assert found["differences"]["mse_gain_over_mean"]["value"] is None
    gain = "pair_accuracy_gain_over_length"
    assert found["differences"][gain] == known["differences"][gain]
    text = as_text(evaluation.tables(result))
    assert "have no unit" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100
    assert evaluation.headlines(result)["helpfulness, MSE"] == "–"


def test_the_objective_and_the_extrapolation_tell_whether_scores_are_ratings():
    rating = RegressionModule.objective
    preferences = [
        loss.objective for loss in (BradleyTerry, MarginBradleyTerry, ScaledBradleyTerry)
    ]
    told = {
        objective: ScoreMeaning.of(spec(objective)).are_ratings
        for objective in ("", rating, *preferences, f"{rating}, then {preferences[0]}")
    }
    assert [objective for objective, ratings in told.items() if ratings] == ["", rating]
    assert ScoreMeaning.of(spec(f"{preferences[0]}, then {rating}")).are_ratings
    assert not ScoreMeaning.of(spec(rating, extrapolation=object())).are_ratings


def spec(objective, extrapolation=None):
    return SimpleNamespace(weights=None, objective=objective, extrapolation=extrapolation)


def test_no_weighting_that_fits_is_an_error(fakes, source, context):
    scorer = fakes.scorer(lambda prompt, response: [1.0, 2.0], ("creativity", "humor"))
    with pytest.raises(UserError, match="no weighting fits"):
        RatingEvaluation(source, resamples=QUICK).evaluate(scorer, context)


def test_bad_rows_stop_the_evaluation_before_the_model_runs(fakes, context):
    source = fakes.source({"train": [], "validation": groups_of(fakes, 3)})
    scorer = fakes.scorer(ratings_in)
    with pytest.raises(DataError, match="no rows"):
        RatingEvaluation(source, resamples=QUICK).evaluate(scorer, context)
    assert scorer.scored == 0


def test_tables_fit_100_columns_and_show_model_and_baselines_together(
    fakes, source, context, as_text
):
    evaluation = RatingEvaluation(source, resamples=QUICK)
    text = as_text(evaluation.tables(evaluation.evaluate(fakes.scorer(ratings_in), context)))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    # Nothing is cut off at the right: R², pair accuracy, ties and calibration error close each row.
    rows = [line for line in text.splitlines() if " length " in line and "+" in line]
    assert len(rows) == 5
    assert all(re.search(r"\d\.\d +\d+\+\d+ +\d\.\d\d *$", row) for row in rows)
    for word in ("helpfulness", "model", "mean", "length", "MSE", "ECE", "brief"):
        assert word in text
