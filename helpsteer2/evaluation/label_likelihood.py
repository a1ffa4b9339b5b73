"""How probable held-out ratings are under the attribute likelihood of SteerLM 2.0."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from rich.table import Table

from helpsteer2.data.groups import GroupSource, read_all
from helpsteer2.errors import UserError
from helpsteer2.evaluation.baselines import RatedSplit, read_rated
from helpsteer2.evaluation.report import NO_RATINGS, UNKNOWN, keep_whole, named_table, with_interval
from helpsteer2.evaluation.scoring import EvaluationContext, ModelKind, score_groups
from helpsteer2.functional.beta_ratings import (
    CONCENTRATIONS,
    LEVELS,
    PAPER_CONCENTRATION,
    READINGS,
    Reading,
    fit_concentration,
    log_mass,
    minimum_on_grid,
)
from helpsteer2.functional.statistics import (
    FloatArray,
    IntArray,
    Interval,
    cluster_bootstrap,
    percentile_interval,
)
from helpsteer2.records import plain
from helpsteer2.rewards.likelihood import BetaLikelihood, outside
from helpsteer2.rewards.rewarder import Scorer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID: FloatArray = np.geomspace(*CONCENTRATIONS, 51)
"""Concentrations of the curve, and of the resampled fits."""

TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
"""Of the logarithmic axis."""

ALL = "all attributes"
"""Name of the row in which every attribute's ratings share one concentration."""


@dataclass(frozen=True)
class _Rated:
    """Scores that have a rating, of one attribute or of several.

    Attributes:
        scores: ``(N,)`` of the model.
        levels: ``(N,)`` ratings, rounded to whole ones.
        prompts: ``(N,)`` number of the prompt.
    """

    scores: FloatArray
    levels: IntArray
    prompts: IntArray

    @classmethod
    def of(cls, scores: FloatArray, ratings: FloatArray, prompts: IntArray) -> _Rated:
        """Leave out what has no rating; halves are rounded to even, as in labels."""
        known = ~np.isnan(ratings)
        levels = np.rint(np.clip(ratings[known], 0, LEVELS - 1)).astype(np.int64)
        return cls(scores[known], levels, prompts[known])

    @classmethod
    def together(cls, parts: Sequence[_Rated]) -> _Rated:
        """All of some attributes."""
        return cls(
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.levels for part in parts]),
            np.concatenate([part.prompts for part in parts]),
        )

    def where(self, chosen: npt.NDArray[np.bool_]) -> _Rated:
        """Some of them."""
        return _Rated(self.scores[chosen], self.levels[chosen], self.prompts[chosen])

    def nll(self, concentration: float, reading: Reading) -> FloatArray:
        """``(N,)`` nats."""
        return -log_mass(self.scores, self.levels, concentration, reading)

    def nll_on_grid(self, reading: Reading) -> FloatArray:
        """``(N, K)`` nats at the concentrations of ``GRID``."""
        return -log_mass(self.scores[:, None], self.levels[:, None], GRID, reading)


@dataclass(frozen=True)
class LabelLikelihoodEvaluation:
    """Which concentration, and which reading of the paper, a reward model's errors ask for.

    For each attribute and for all together: the mean negative log-likelihood of held-out ratings
    under Beta distributions around the scores, at the paper's α + β = 24 and at the most likely
    one, for the three readings of scaling and bin edges; beside a predictor that has no idea
    (log 5) and one that knows how frequent each level is. What is fitted is fitted on one half of
    the prompts, drawn by the seed of the run; all likelihoods are of the other half. Intervals are
    95 % and resample prompts. A model whose scores are no ratings has no likelihood.

    Args:
        data: Rated groups.
        split: Split to evaluate on, both halves.
        concentration: What stands beside the fitted one.
        resamples: Bootstrap draws.

    Raises:
        UserError: If an option is out of range.
    """

    data: GroupSource
    split: str = "validation"
    concentration: float = PAPER_CONCENTRATION
    resamples: int = 1000

    takes: ClassVar[ModelKind] = "reward model"

    def __post_init__(self) -> None:
        BetaLikelihood(concentration=self.concentration)
        if self.resamples < 1:
            raise UserError("resamples must be at least 1")

    @cached_property
    def _test(self) -> RatedSplit:
        return read_rated(self.data, self.split)

    def check(self) -> None:
        """Read the split, and keep its numbers.

        Raises:
            UserError: If a row is bad, or fewer than two prompts have a rating.
        """
        rated = ~np.isnan(self._test.ratings).all(axis=1)
        if np.unique(self._test.prompts[rated]).size < 2:
            raise UserError(
                f"the split {self.split!r} has fewer than two prompts with ratings: one half of "
                "them fits the concentration, the other tells how good it is"
            )

    def evaluate(self, scorer: Scorer, context: EvaluationContext) -> dict[str, Any]:
        """Score the split once and compute every figure.

        Args:
            scorer: The model.
            context: Seed of the halves and of the bootstrap, and the folder that keeps the scores.

        Returns:
            ``attributes`` and ``all``, each with ``predictors`` and ``readings``; the ``curve`` of
            all over the concentration, and the counts behind them.

        Raises:
            DataError: If a row of the data is bad.
            UserError: If a score is not finite.
        """
        test = self._test
        # By the name of the ratings' evaluator, which scores the same texts.
        scores = score_groups(
            f"ratings-{self.split}",
            self.data.fingerprint(self.split),
            lambda: read_all(self.data, self.split),
            test.sizes,
            scorer,
            context,
        ).astype(np.float64)
        clipped = dict(zip(scorer.attribute_names, outside(scores), strict=True))
        rated = {
            name: _Rated.of(
                scores[:, scorer.attribute_names.index(name)],
                test.ratings[:, self.data.attribute_names.index(name)],
                test.prompts,
            )
            for name in scorer.attribute_names
            if context.meaning.are_ratings and name in self.data.attribute_names
        }
        order = np.random.default_rng(context.seed).permutation(len(test.sizes))
        fitting = np.isin(np.arange(len(test.sizes)), order[: len(order) // 2])
        result: dict[str, Any] = {
            "split": self.split,
            "fingerprint": self.data.fingerprint(self.split),
            "concentration": self.concentration,
            "prompts": len(test.sizes),
            "prompts_fitted_on": int(fitting.sum()),
            "responses": len(test.ratings),
            "scores_are_ratings": context.meaning.are_ratings,
            "scores_outside": clipped,
            "attributes": {
                name: self._figures(of_one, fitting, context.seed) for name, of_one in rated.items()
            },
            "all": None,
            "curve": None,
        }
        if rated:
            together = _Rated.together(list(rated.values()))
            result["all"] = self._figures(together, fitting, context.seed)
            result["curve"] = _curve(together.where(~fitting[together.prompts]))
        return dict(plain(result))

    def _figures(
        self, rated: _Rated, fitting: npt.NDArray[np.bool_], seed: int
    ) -> dict[str, Any] | None:
        """What is told of one attribute, or of all; None if a half has no rating of it."""
        in_fit = fitting[rated.prompts]
        fit, rest = rated.where(in_fit), rated.where(~in_fit)
        if not fit.levels.size or not rest.levels.size:
            return None
        concentrations = {
            key: self._concentration(fit, reading, seed) for key, reading in READINGS.items()
        }
        columns = {"marginal": -np.log(level_shares(fit.levels))[rest.levels]}
        for key, reading in READINGS.items():
            columns[key] = rest.nll(self.concentration, reading)
            columns[f"{key} fitted"] = rest.nll(concentrations[key].value, reading)
        # Told apart by the same draws.
        table = np.stack(list(columns.values()), axis=1)
        draws = cluster_bootstrap(
            lambda rows: table[rows].mean(axis=0),
            rest.prompts,
            resamples=self.resamples,
            seed=seed,
        )
        nll = {
            name: percentile_interval(float(table[:, place].mean()), draws[:, place])
            for place, name in enumerate(columns)
        }
        return {
            "ratings": int(rest.levels.size),
            "ratings_fitted_on": int(fit.levels.size),
            "predictors": {"uniform": math.log(LEVELS), "marginal": nll["marginal"]},
            "readings": {
                key: {
                    "nll": nll[key],
                    "nll_fitted": nll[f"{key} fitted"],
                    "concentration": concentrations[key],
                }
                for key in READINGS
            },
        }

    def _concentration(self, fit: _Rated, reading: Reading, seed: int) -> Interval:
        """The most likely concentration, with its interval."""
        prompts, row = np.unique(fit.prompts, return_inverse=True)
        # The sum over a prompt's ratings is all that a draw of prompts needs.
        sums = np.zeros((prompts.size, GRID.size))
        np.add.at(sums, row, fit.nll_on_grid(reading))
        draws = cluster_bootstrap(
            lambda rows: minimum_on_grid(sums[rows].sum(axis=0), GRID),
            prompts,
            resamples=self.resamples,
            seed=seed,
        )
        return percentile_interval(fit_concentration(fit.scores, fit.levels, reading), draws[:, 0])

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Show a result of ``evaluate`` within 100 columns."""
        return [likelihood_table(result)]

    def headlines(self, result: Mapping[str, Any]) -> dict[str, str]:
        """All attributes together: the likelihoods of each reading and of the predictors."""
        figures = result["all"]
        if figures is None:
            return {}
        rows = {"marginal, nats": with_interval(figures["predictors"]["marginal"])}
        for key, of_reading in figures["readings"].items():
            rows[f"{key} at {result['concentration']:g}, nats"] = with_interval(of_reading["nll"])
            rows[f"{key} fitted, nats"] = with_interval(of_reading["nll_fitted"])
            rows[f"{key}, concentration"] = with_interval(of_reading["concentration"], 1)
        return rows

    def figures(self, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
        """A plot a model: likelihood of all ratings against the concentration."""
        plots = {}
        for name, result in results.items():
            if result["all"] is not None:
                suffix = "" if len(results) == 1 else "_" + re.sub(r"[^\w.-]", "_", name)
                plots[f"concentration{suffix}"] = likelihood_figure(result)
        return plots


def level_shares(levels: IntArray) -> FloatArray:
    """How frequent each level is, one more of each added: none has probability 0.

    Args:
        levels: ``(N,)`` whole ratings 0–4.

    Returns:
        ``(5,)``, all above 0.
    """
    counts = np.bincount(levels, minlength=LEVELS) + 1.0
    return np.asarray(counts / counts.sum())


def _curve(rest: _Rated) -> dict[str, Any] | None:
    """Mean nats at each concentration, by reading."""
    if not rest.levels.size:
        return None
    nll = {key: rest.nll_on_grid(reading).mean(axis=0) for key, reading in READINGS.items()}
    return {"concentrations": GRID, "nll": nll}


def likelihood_table(result: Mapping[str, Any]) -> Table:
    """Readings and predictors, attribute by attribute.

    Args:
        result: As made by ``LabelLikelihoodEvaluation.evaluate``.
    """
    beyond = sum(result["scores_outside"].values())
    table = named_table(
        f"{result['split']}: −log P(rating | score), nats a rating",
        ["attribute", "by", f"c = {result['concentration']:g}", "c fitted", "fitted c"],
        left=2,
        caption=(
            "A: r/4, nearest level; B: r/4, fifths; C: (r + ½)/5, fifths. c = α + β, fitted on "
            f"{result['prompts_fitted_on']:,} of {result['prompts']:,} prompts, like the shares of "
            "the levels (marginal); nats on the others. In brackets: 95 % interval over prompts. "
            f"{beyond:,} scores outside 0–4 count as 0 or 4."
            + ("" if result["scores_are_ratings"] else f" {NO_RATINGS}")
        ),
    )
    for name, figures in {**result["attributes"], ALL: result["all"]}.items():
        if figures is None:
            table.add_row(name, *[UNKNOWN] * 4)
            continue
        label = f"{name}\n{figures['ratings']:,} ratings"
        for key, of_reading in figures["readings"].items():
            table.add_row(
                label if key == "A" else "",
                key,
                _bracketed(of_reading["nll"], 3),
                _bracketed(of_reading["nll_fitted"], 3),
                _bracketed(of_reading["concentration"], 1),
            )
            label = ""
        table.add_row("", "marginal", "", _bracketed(figures["predictors"]["marginal"], 3), "")
        table.add_row("", "uniform", f"{figures['predictors']['uniform']:.3f}", "", "")
        table.add_section()
    keep_whole(table, [*result["attributes"], ALL])
    return table


def _bracketed(figure: Mapping[str, Any], digits: int) -> str:
    """A figure with its interval on one line."""
    value, *ends = with_interval(figure, digits).split("\n")
    return f"{value} [{ends[0]}]" if ends else value


def likelihood_figure(result: Mapping[str, Any]) -> Figure:
    """Mean nats of all ratings against the concentration.

    Args:
        result: As made by ``LabelLikelihoodEvaluation.evaluate``, of a model with a likelihood.
    """
    from helpsteer2.plots import curves

    readings, marginal = result["all"]["readings"], result["all"]["predictors"]["marginal"]["value"]
    names = {
        key: f"{key}, fitted {of['concentration']['value']:.1f}" for key, of in readings.items()
    }
    grid, nll = result["curve"]["concentrations"], result["curve"]["nll"]
    figure = curves(
        {name: grid for name in names.values()},
        {name: nll[key] for key, name in names.items()},
        labels=("concentration α + β", "−log P(rating | score), nats a rating"),
        title=f"{result['split']}: all attributes, fitted on the other half of the prompts",
    )
    axes = figure.axes[0]
    for line, of_reading in zip(axes.get_lines(), readings.values(), strict=True):
        fitted = of_reading["concentration"]["value"], of_reading["nll_fitted"]["value"]
        axes.plot(*fitted, marker="D", markersize=8, color=line.get_color())
        line.set_clip_on(True)  # what rises beyond the axes shall not run over the title
    paper = result["concentration"]
    axes.axvline(paper, color="black", linestyle="--", linewidth=1.0, label=f"α + β = {paper:g}")
    axes.axhline(marginal, color="black", linestyle=":", linewidth=1.0, label="marginal")
    # Far from the fit the curves rise out of all proportion, and would flatten all that matters.
    shown = [of["nll"]["value"] for of in readings.values()] + [marginal]
    top = max(shown) + 0.2
    visible = [c for c, *heights in zip(grid, *nll.values(), strict=True) if min(heights) < top]
    bottom = min(map(min, nll.values())) - 0.05
    axes.set(xscale="log", ylim=(bottom, top), xlim=(min(visible), max(visible)))
    ticks = [tick for tick in TICKS if min(visible) <= tick <= max(visible)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend()
    return figure
