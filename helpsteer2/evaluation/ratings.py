"""Held-out ratings: how far a reward model's scores are from them, beside trivial predictors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from rich.table import Table

from helpsteer2.data.groups import GroupSource, read_all
from helpsteer2.errors import UserError
from helpsteer2.evaluation.baselines import (
    RatedSplit,
    length_predictor,
    mean_predictor,
    read_rated,
)
from helpsteer2.evaluation.report import percent_with_interval, rating_tables, with_interval
from helpsteer2.evaluation.scoring import (
    EvaluationContext,
    ModelKind,
    model_weightings,
    score_groups,
    told_together,
)
from helpsteer2.functional import statistics
from helpsteer2.functional.statistics import FloatArray, IntArray, Interval
from helpsteer2.records import plain
from helpsteer2.rewards.rewarder import Scorer

REFERENCE = "helpfulness"
"""The attribute whose order a weighted reward is held against."""

ROW_FIGURES = {
    "mse": statistics.mse,
    "mae": statistics.mae,
    "pearson": statistics.pearson,
    "spearman": statistics.spearman,
    "r2": statistics.r2,
}


UNKNOWN = Interval(np.nan, np.nan, np.nan)


@dataclass(frozen=True)
class RatingEvaluation:
    """Compare scores with held-out ratings.

    For each attribute: error, correlation, explained variance, accuracy on pairs of responses to
    one prompt (ties apart) and calibration, for the model and for two predictors fitted on the
    training split: its mean, and least squares on the length of the response. For each weighting:
    how often the reward orders a pair as its helpfulness ratings do. Intervals are 95 % and
    resample prompts; differences are paired. Of a model whose scores are no ratings, errors are
    unknown: it is judged by order and correlation.

    Args:
        data: Rated groups.
        split: Split to evaluate on.
        train_split: Split that the trivial predictors are fitted on; None fits them on the
            evaluated rows themselves, which flatters them.
        resamples: Bootstrap draws.
        calibration_bins: Most bins of the calibration table.
    """

    data: GroupSource
    split: str = "validation"
    train_split: str | None = "train"
    resamples: int = 1000
    calibration_bins: int = 10

    takes: ClassVar[ModelKind] = "reward model"

    def __post_init__(self) -> None:
        if self.resamples < 1 or self.calibration_bins < 1:
            raise UserError("resamples and calibration_bins must be at least 1")

    @cached_property
    def _test(self) -> RatedSplit:
        return read_rated(self.data, self.split)

    @cached_property
    def _train(self) -> RatedSplit:
        return self._test if self.train_split is None else read_rated(self.data, self.train_split)

    def check(self) -> None:
        """Read both splits, and keep their numbers: the texts are streamed to every model.

        Raises:
            UserError: If a row is bad.
        """
        told_together(lambda: self._test, lambda: self._train)

    def evaluate(self, scorer: Scorer, context: EvaluationContext) -> dict[str, Any]:
        """Score the split once and compute every figure.

        Args:
            scorer: The model.
            context: Weightings, seed, and the folder that keeps the scores.

        Returns:
            ``attributes``, ``weightings``, ``scores_are_ratings`` and the counts behind them.

        Raises:
            DataError: If a row of the data is bad.
            UserError: If no weighting fits the model, or a score is not finite.
        """
        chosen = model_weightings(context, scorer.attribute_names)
        train, test = self._train, self._test
        scores = score_groups(
            f"ratings-{self.split}",
            self.data.fingerprint(self.split),
            lambda: read_all(self.data, self.split),
            test.sizes,
            scorer,
            context,
        ).astype(np.float64)
        baselines = {"mean": mean_predictor(train, test), "length": length_predictor(train, test)}
        pairs = statistics.pairs_within(test.prompts)
        attributes = {}
        for column, name in enumerate(scorer.attribute_names):
            attributes[name] = {"outputs": _spread(scores[:, column])}
            if name in self.data.attribute_names:
                rated = self.data.attribute_names.index(name)
                predictors = {"model": scores[:, column]}
                predictors |= {key: values[:, rated] for key, values in baselines.items()}
                figures = self._attribute(predictors, rated, test, pairs, context.seed)
                unit = context.meaning.are_ratings
                attributes[name] |= figures if unit else _without_errors(figures)
        rewards = {
            weights.name: np.asarray(weights.reward(scores, scorer.attribute_names))
            for weights in chosen.weightings
        }
        result = {
            "split": self.split,
            "fingerprint": self.data.fingerprint(self.split),
            "baselines_fitted_on": self.train_split or self.split,
            "prompts": len(test.sizes),
            "responses": len(test.ratings),
            "scores_are_ratings": context.meaning.are_ratings,
            "pairs": len(pairs),
            "attributes": attributes,
            "weightings": {
                name: self._reward(reward, test, pairs, context.seed)
                for name, reward in rewards.items()
            },
            "skipped_weightings": chosen.skipped,
        }
        return dict(plain(result))

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Show a result of ``evaluate`` within 100 columns."""
        return rating_tables(result)

    def headlines(self, result: Mapping[str, Any]) -> dict[str, str]:
        """Pair accuracy of each weighting, then error, correlation and pairs of each attribute."""
        figures = {}
        for name, reward in result["weightings"].items():
            if reward["pairs_by_helpfulness"] is not None:
                accuracy = reward["pairs_by_helpfulness"]["accuracy"]
                figures[f"{name}, pairs by helpfulness %"] = percent_with_interval(accuracy)
        for name, attribute in result["attributes"].items():
            if "predictors" in attribute:
                model = attribute["predictors"]["model"]
                figures[f"{name}, MSE"] = with_interval(model["mse"], 2)
                figures[f"{name}, r"] = with_interval(model["pearson"], 2)
                figures[f"{name}, pairs %"] = percent_with_interval(model["pairs"]["accuracy"])
        return figures

    def _attribute(
        self,
        predictors: Mapping[str, FloatArray],
        rated: int,
        test: RatedSplit,
        pairs: IntArray,
        seed: int,
    ) -> dict[str, Any]:
        """Figures of one attribute for the model and the baselines."""
        rating = test.ratings[:, rated]
        known = ~np.isnan(rating)
        figures: dict[str, Any] = {
            "known": int(known.sum()),
            "ratings": _spread(rating),
            "predictors": {
                name: self._predictor(predicted, rating, test, pairs, seed)
                for name, predicted in predictors.items()
            },
            "calibration": asdict(
                statistics.calibration(predictors["model"], rating, self.calibration_bins)
            ),
        }
        errors = {key: (predicted - rating) ** 2 for key, predicted in predictors.items()}
        wins = {
            key: statistics.strict_wins(predicted, rating, pairs)
            for key, predicted in predictors.items()
        }
        prompts, of_pairs = test.prompts, test.prompts[pairs[:, 0]]
        figures["differences"] = {
            "mse_gain_over_mean": self._mean(errors["mean"] - errors["model"], prompts, seed),
            "mse_gain_over_length": self._mean(errors["length"] - errors["model"], prompts, seed),
            "pair_accuracy_gain_over_length": self._mean(
                wins["model"] - wins["length"], of_pairs, seed
            ),
        }
        return figures

    def _predictor(
        self,
        predicted: FloatArray,
        rating: FloatArray,
        test: RatedSplit,
        pairs: IntArray,
        seed: int,
    ) -> dict[str, Any]:
        """Figures of one predictor of one attribute, each as value, low and high."""
        known = np.flatnonzero(~np.isnan(predicted) & ~np.isnan(rating))
        values = [figure(predicted, rating) for figure in ROW_FIGURES.values()]
        if known.size == 0:
            intervals = [Interval(value, np.nan, np.nan) for value in values]
        else:
            draws = statistics.cluster_bootstrap(
                lambda rows: [
                    figure(predicted[known[rows]], rating[known[rows]])
                    for figure in ROW_FIGURES.values()
                ],
                test.prompts[known],
                resamples=self.resamples,
                seed=seed,
            )
            intervals = [
                statistics.percentile_interval(value, draws[:, column])
                for column, value in enumerate(values)
            ]
        bins = statistics.calibration(predicted, rating, self.calibration_bins)
        return {
            **dict(zip(ROW_FIGURES, intervals, strict=True)),
            "calibration_error": bins.error,
            "pairs": self._pairs(predicted, rating, test, pairs, seed),
        }

    def _pairs(
        self,
        predicted: FloatArray,
        rating: FloatArray,
        test: RatedSplit,
        pairs: IntArray,
        seed: int,
    ) -> dict[str, Any]:
        """Pair counts, both accuracies, and the interval of the strict one."""
        counts = statistics.count_pairs(predicted, rating, pairs)
        wins = statistics.strict_wins(predicted, rating, pairs)
        return {
            **asdict(counts),
            "decided": counts.decided,
            "accuracy": self._mean(wins, test.prompts[pairs[:, 0]], seed),
            "half_credit_accuracy": counts.half_credit_accuracy,
        }

    def _reward(
        self, reward: FloatArray, test: RatedSplit, pairs: IntArray, seed: int
    ) -> dict[str, Any]:
        """How a weighted reward orders pairs against the helpfulness ratings, if there are any."""
        figures: dict[str, Any] = {"outputs": _spread(reward), "pairs_by_helpfulness": None}
        if REFERENCE in self.data.attribute_names:
            rating = test.ratings[:, self.data.attribute_names.index(REFERENCE)]
            figures["pairs_by_helpfulness"] = self._pairs(reward, rating, test, pairs, seed)
        return figures

    def _mean(self, values: FloatArray, prompts: IntArray, seed: int) -> Interval:
        return statistics.mean_interval(values, prompts, resamples=self.resamples, seed=seed)


def _without_errors(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of an attribute whose scores have no unit: what compares them with ratings goes."""
    model = dict(figures["predictors"]["model"])
    model |= dict.fromkeys(("mse", "mae", "r2"), UNKNOWN) | {"calibration_error": np.nan}
    gains = dict.fromkeys(("mse_gain_over_mean", "mse_gain_over_length"), UNKNOWN)
    return {
        **figures,
        "predictors": {**figures["predictors"], "model": model},
        "differences": {**figures["differences"], **gains},
    }


def _spread(values: FloatArray) -> dict[str, float]:
    """Mean and standard deviation of the known values."""
    known = values[~np.isnan(values)]
    if known.size == 0:
        return {"mean": float("nan"), "std": float("nan")}
    return {"mean": float(known.mean()), "std": float(known.std())}
