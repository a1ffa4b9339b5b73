"""Choosing how far to extrapolate a reward model: on one half of the prompts, told on the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from rich.table import Table

from helpsteer2.data.groups import Group, GroupSource, read_all
from helpsteer2.errors import UserError
from helpsteer2.evaluation.comparisons import LONGER_RESPONSE, Comparison, Wins, compare
from helpsteer2.evaluation.preference_files import load_pairs
from helpsteer2.evaluation.report import named_table, percent_with_interval, with_interval
from helpsteer2.evaluation.scoring import EvaluationContext, usable_weightings
from helpsteer2.functional.statistics import Interval, percentile_interval
from helpsteer2.records import plain
from helpsteer2.rewards.rewarder import Scorer

CHOOSING, REPORTING = "choosing", "reporting"
"""The half of the prompts that α is chosen on, and the half that it is reported on."""

SETTING = "search.pairs.path"


class Pairs(Protocol):
    """Where the pairs of a search come from."""

    def load(self) -> list[Comparison]:
        """Pairs of a better and a worse response; their subset does not matter."""
        ...


@dataclass(frozen=True)
class DataPairs:
    """Pairs of a data set: by preference where there is one, else by the ratings.

    Pairs without preference (strength 0, equal or unknown ratings) are left out.

    Args:
        data: Where to read.
        split: Which split.
        attribute: The rating that orders responses without a preference.
    """

    data: GroupSource
    split: str = "validation"
    attribute: str = "helpfulness"

    def load(self) -> list[Comparison]:
        """Read the split.

        Raises:
            DataError: If a row is bad.
            UserError: If no pair is decided.
        """
        pairs = [pair for group in read_all(self.data, self.split) for pair in self._of(group)]
        if not pairs:
            raise UserError(
                f"no two responses of the split {self.split!r} differ in preference_strength or in "
                f"the rating of {self.attribute}: choose other pairs"
            )
        return pairs

    def _of(self, group: Group) -> Iterator[Comparison]:
        """The decided pairs of a group, the better response first."""
        if group.preference_strength is not None and len(group.responses) == 2:
            # Below 0 the first response is the better one.
            worths: list[float | None] = [-float(group.preference_strength), 0.0]
        elif group.attributes is not None and self.attribute in self.data.attribute_names:
            column = self.data.attribute_names.index(self.attribute)
            worths = [ratings[column] for ratings in group.attributes]
        else:
            return
        for first, second in itertools.permutations(range(len(worths)), 2):
            better, worse = worths[first], worths[second]
            if better is not None and worse is not None and better > worse:
                texts = (group.responses[first], group.responses[second])
                pair = Group(group.id, group.source, group.prompt, texts)
                yield Comparison(self.split, pair)


@dataclass(frozen=True)
class FilePairs:
    """Pairs of a file with the columns ``prompt``, ``chosen`` and ``rejected``, as RewardBench's.

    Args:
        path: JSONL or Parquet, a folder that holds it, or a Hub id.
        split: The Hub's split, and the stem of the file in a folder.
    """

    path: str
    split: str = "validation"

    def load(self) -> list[Comparison]:
        """Read the file.

        Raises:
            DataError: If a row is bad.
            UserError: If there is no such file.
        """
        return list(load_pairs(self.path, self.split, None, SETTING))


Candidate = Callable[[float], tuple[Scorer, str | None]]
"""From α to the model, and the key that its scores are kept under."""


@dataclass(frozen=True)
class AlphaSearch:
    """Choose α on one half of the prompts and report every α on the other half too.

    The α with the highest pair accuracy on the first half is chosen; of equal ones that nearest to
    1, the strong model itself, which is always among the candidates. The procedure by which
    arXiv 2410.01257 found its 1.52 is not known to us: this one is our own.

    Args:
        pairs: What to choose and report on; a split that neither model was trained on.
        grid: The candidates.
        resamples: Bootstrap draws.
    """

    pairs: Pairs
    grid: Sequence[float] = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0)
    resamples: int = 1000

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise UserError("search.resamples must be at least 1")
        if not self.grid or not all(math.isfinite(alpha) for alpha in self.grid):
            raise UserError(f"search.grid needs one or more finite numbers, got {list(self.grid)}")

    def run(self, candidate: Candidate, context: EvaluationContext) -> dict[str, Any]:
        """Score all pairs with the model of every α.

        Args:
            candidate: Makes the model of an α; called once for each.
            context: One weighting, the seed of halves and bootstrap, and the folder of the scores.

        Returns:
            The chosen ``alpha``, ``alphas`` (accuracy on both halves with 95 % intervals, ties, and
            the gain on α = 1 on the reporting half), and the counts.

        Raises:
            DataError: If a row of the pairs is bad.
            UserError: If there are not two prompts, or the weighting does not fit.
        """
        pairs = in_halves(self.pairs.load(), context.seed)
        wins: dict[float, Wins] = {}
        record: dict[str, Any] = {}
        for alpha in sorted({1.0, *map(float, self.grid)}):
            scorer, key = candidate(alpha)
            weights = usable_weightings(context.weightings, scorer.attribute_names).weightings[0]
            compared = compare(
                f"alpha-{alpha:g}",
                pairs,
                (CHOOSING, REPORTING),
                scorer,
                replace(context, weightings=(weights,), model_key=key),
                self.resamples,
            )
            wins[alpha] = compared.wins[weights.name]
            record = {
                "fingerprint": compared.record["fingerprint"],
                "weighting": weights.name,
                "pairs": compared.counts,
                LONGER_RESPONSE: _on_halves(compared.wins[LONGER_RESPONSE]),
            }
        return dict(plain({**record, "alpha": chosen(wins), "alphas": _figures(wins)}))

    def table(self, result: Mapping[str, Any]) -> Table:
        """Show a result of ``run`` within 100 columns."""
        counts = result["pairs"]
        table = named_table(
            f"ExPO: pair accuracy in % by α, reward {result['weighting']}",
            [
                "α",
                f"choosing ({counts[CHOOSING]:,} pairs)",
                f"reporting ({counts[REPORTING]:,} pairs)",
                "gain on α = 1, points",
                "ties",
            ],
            caption=(
                f"α = {result['alpha']:g} is chosen on one half of the prompts; what it is worth "
                "stands under 'reporting', on the other half. Ties count as misses. Second line: "
                "95 % interval over prompts, of the gain paired."
            ),
        )
        for figures in result["alphas"]:
            mark = " ←" if figures["alpha"] == result["alpha"] else ""
            table.add_row(
                f"{figures['alpha']:g}{mark}",
                percent_with_interval(figures[CHOOSING]),
                percent_with_interval(figures[REPORTING]),
                with_interval(figures["gain"], 1, 100.0),
                f"{figures['ties']:,}",
            )
        longer = (percent_with_interval(result[LONGER_RESPONSE][h]) for h in (CHOOSING, REPORTING))
        table.add_row(LONGER_RESPONSE.replace("_", " "), *longer)
        return table


def in_halves(pairs: Sequence[Comparison], seed: int) -> list[Comparison]:
    """Put each prompt, with all its pairs, in one of two halves by chance.

    Args:
        pairs: Pairs.
        seed: Seed of the draw.

    Returns:
        The pairs, their half as their subset: no prompt is in both, and each has half of them.

    Raises:
        UserError: If there are fewer than two prompts.
    """
    prompts = sorted({repr(pair.group.prompt) for pair in pairs})
    if len(prompts) < 2:
        raise UserError(f"a search needs pairs of two prompts or more, got {len(prompts)}")
    order = np.random.default_rng(seed).permutation(len(prompts))
    first = {prompts[number] for number in order[: (len(prompts) + 1) // 2]}
    return [
        replace(pair, subset=CHOOSING if repr(pair.group.prompt) in first else REPORTING)
        for pair in pairs
    ]


def chosen(wins: Mapping[float, Wins]) -> float:
    """The α that is right most often on the choosing half; of equal ones that nearest to 1."""
    best = max(float(of.accuracy[CHOOSING]) for of in wins.values())
    equal = [alpha for alpha, of in wins.items() if float(of.accuracy[CHOOSING]) == best]
    return min(equal, key=lambda alpha: (abs(alpha - 1.0), alpha))


def _figures(wins: Mapping[float, Wins]) -> list[dict[str, Any]]:
    """What is told of each α; all have the same bootstrap draws, so gains are paired."""
    strong = wins[1.0]
    figures = []
    for alpha, of in wins.items():
        gain = float(of.accuracy[REPORTING] - strong.accuracy[REPORTING])
        figures.append(
            {
                "alpha": alpha,
                **_on_halves(of),
                "gain": percentile_interval(gain, of.draws[REPORTING] - strong.draws[REPORTING]),
                "ties": int((of.margins == 0.0).sum()),
            }
        )
    return figures


def _on_halves(wins: Wins) -> dict[str, Interval]:
    return {
        half: percentile_interval(float(wins.accuracy[half]), wins.draws[half])
        for half in (CHOOSING, REPORTING)
    }
