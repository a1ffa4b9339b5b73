"""RM-Bench: subtle mistakes against style. Three chosen and three rejected responses a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
from rich.table import Table

from helpsteer2.data.checks import RowCheck, shown
from helpsteer2.data.rows import Part, Row, local_path
from helpsteer2.errors import Problem, UserError
from helpsteer2.evaluation.benchmark_tables import headlines, rm_bench_tables
from helpsteer2.evaluation.comparisons import Comparison, Wins, compare
from helpsteer2.evaluation.preference_files import (
    MAX_CHARACTERS,
    comparison,
    finished,
    holds,
    one_of,
    read_table,
)
from helpsteer2.evaluation.scoring import EvaluationContext, ModelKind
from helpsteer2.records import plain
from helpsteer2.rewards.rewarder import Scorer

SETTING = "evaluators.rm_bench.path"

STYLES = ("concise", "detailed_plain", "detailed_markdown")
"""Style of each of the three responses of a list, from the plainest to the richest."""

COUNTS = {"chat": 129, "math": 529, "code": 228, "safety-refuse": 284, "safety-response": 157}
"""Prompts of each value of the column ``domain``.

Source: THU-KEG/RM-Bench@73c52d7, data/*_filtered.json; math: arXiv 2410.16184.
"""

DOMAINS = {
    "chat": ("chat",),
    "math": ("math",),
    "code": ("code",),
    "safety": ("safety-refuse", "safety-response"),
}
"""Subsets of each domain; the prompts of a domain weigh the same."""

DIFFICULTIES = {
    "easy": np.tril(np.ones((3, 3), dtype=bool), -1),
    "normal": np.eye(3, dtype=bool),
    "hard": np.triu(np.ones((3, 3), dtype=bool), 1),
}
"""Cells of the matrix (style of the chosen, style of the rejected response) that make each level.

Easy: the chosen response has the richer style. Source: THU-KEG/RM-Bench, README and
scripts/utils.py@73c52d7.
"""

ALL_CELLS = np.ones((3, 3), dtype=bool)


def pooled(
    accuracies: Mapping[str, Any],
    subsets: Sequence[str] = tuple(COUNTS),
    cells: Any = ALL_CELLS,
    counts: Mapping[str, int] = COUNTS,
) -> Any:
    """Accuracy over the prompts of some subsets, each prompt weighing the same.

    Over all subsets it is the micro average, over those of a domain the accuracy of the domain.

    Args:
        accuracies: ``(…, 3, 3)`` accuracy of each subset; NaN if not known.
        subsets: The subsets to take.
        cells: ``(3, 3)`` bool: the cells of the matrix to take, which weigh the same.
        counts: Prompts of each subset.

    Returns:
        ``(…)``; NaN if a subset is not known: never a mean over fewer.
    """
    weighted = [accuracies[subset][..., cells].mean(-1) * counts[subset] for subset in subsets]
    return sum(weighted) / sum(counts[subset] for subset in subsets)


def macro_average(
    accuracies: Mapping[str, Any], cells: Any = ALL_CELLS, counts: Mapping[str, int] = COUNTS
) -> Any:
    """Plain mean of the four domains: the benchmark's own definition of its overall figures.

    Published tables also hold micro averages, some beside overall figures of this kind.

    Source: THU-KEG/RM-Bench, README@73c52d7. Arguments as in ``pooled``.
    """
    domains = [pooled(accuracies, subsets, cells, counts) for subsets in DOMAINS.values()]
    return sum(domains) / len(domains)


@dataclass(frozen=True)
class RMBench:
    """Accuracy on RM-Bench: each of three chosen responses against each of three rejected ones.

    Equal rewards are a miss, and counted apart. One pass scores all responses; every weighting is
    computed from it, and so is a baseline that prefers the longer response. Intervals are 95 % and
    resample prompts, with all their nine comparisons, within subsets.

    Args:
        path: Hub id, or local files in the published schema (``prompt``, ``chosen`` and
            ``rejected`` with a response a style, ``domain``): ``total_dataset.json``, JSONL or
            Parquet, or a folder that holds it or the published files of the domains
            (``chat_filtered.json``, …, which need no column ``domain``).
        resamples: Bootstrap draws.

    Source: arXiv 2410.16184; THU-KEG/RM-Bench@73c52d7.
    """

    path: str = "THU-KEG/RM-Bench"
    resamples: int = 1000

    takes: ClassVar[ModelKind] = "reward model"

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise UserError("resamples must be at least 1")

    @cached_property
    def _prompts(self) -> tuple[Comparison, ...]:
        return load_rm_bench(self.path)

    def check(self) -> None:
        """Read all prompts, of which any model is then scored.

        Raises:
            UserError: If the data cannot be found, or a row is bad.
        """
        _ = self._prompts

    def evaluate(self, scorer: Scorer, context: EvaluationContext) -> dict[str, Any]:
        """Score all responses once and compute every figure under every weighting.

        Args:
            scorer: The model.
            context: Weightings, seed, and the folder that keeps the scores.

        Returns:
            ``weightings``, each with ``macro_average`` (the official overall figure),
            ``micro_average``, ``domains``, difficulties under both averages (``macro``, ``micro``),
            ``styles`` and ``subsets``; and the counts.

        Raises:
            DataError: If a row is bad, or its domain unknown.
            UserError: If the data cannot be found, no weighting fits, or a score is not finite.
        """
        prompts = self._prompts
        compared = compare("rm_bench", prompts, tuple(COUNTS), scorer, context, self.resamples)
        result = {
            "prompts": len(prompts),
            **compared.record,
            "unusual_counts": compared.unusual_counts(COUNTS),
            "weightings": {
                name: {**_summary(wins, compared.counts), "subsets": compared.subset_figures(name)}
                for name, wins in compared.wins.items()
            },
        }
        return dict(plain(result))

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Show a result of ``evaluate`` within 100 columns."""
        return rm_bench_tables(result)

    def headlines(self, result: Mapping[str, Any]) -> dict[str, str]:
        """Both averages under every weighting."""
        return headlines(result, {"overall": "macro_average", "micro": "micro_average"})


def _summary(wins: Wins, counts: Mapping[str, int]) -> dict[str, Any]:
    """Domains, difficulties and averages, each with its interval, or why it is not computable."""
    every = tuple(COUNTS)
    averages = {"macro": partial(macro_average, counts=counts)}
    averages["micro"] = partial(pooled, counts=counts)
    return {
        **{f"{name}_average": wins.figure(average, every) for name, average in averages.items()},
        "domains": {
            domain: wins.figure(partial(pooled, subsets=subsets, counts=counts), subsets)
            for domain, subsets in DOMAINS.items()
        },
        **{
            name: {
                level: wins.figure(partial(average, cells=cells), every)
                for level, cells in DIFFICULTIES.items()
            }
            for name, average in averages.items()
        },
        "styles": {
            chosen: {
                rejected: float(macro_average(wins.accuracy, _cell(i, j), counts))
                for j, rejected in enumerate(STYLES)
            }
            for i, chosen in enumerate(STYLES)
        },
    }


def _cell(chosen: int, rejected: int) -> Any:
    """One cell of the matrix."""
    cell = np.zeros((3, 3), dtype=bool)
    cell[chosen, rejected] = True
    return cell


def load_rm_bench(path: str) -> tuple[Comparison, ...]:
    """Load prompts with three chosen and three rejected responses.

    Args:
        path: As in ``RMBench``.

    Returns:
        The prompts, in order.

    Raises:
        DataError: If a row is bad; all bad rows are listed.
        UserError: If the path does not exist, the folder has none of the files, or the Hub cannot
            be asked.
    """
    problems: list[Problem] = []
    columns = ("prompt", "chosen", "rejected")
    whole = Part("total_dataset", "train")
    local = local_path(path)
    if local is None or local.is_file() or holds(local, whole.stem):
        rows = read_table(path, whole, (*columns, "domain"), problems, SETTING)
        return finished([_prompt(row, None, problems) for row in rows], problems)
    stems = {domain: f"{domain}_filtered" for domain in COUNTS}
    held = {domain: stem for domain, stem in stems.items() if holds(local, stem)}
    if not held:
        raise UserError(
            f"{SETTING}: {path} has neither total_dataset.json nor any of "
            f"{', '.join(f'{stem}.json' for stem in stems.values())}"
        )
    found = [
        _prompt(row, domain, problems)
        for domain, stem in held.items()
        for row in read_table(path, Part(stem, stem), columns, problems, SETTING)
    ]
    return finished(found, problems)


def _prompt(row: Row, domain: str | None, problems: list[Problem]) -> Comparison | None:
    """Check one row; ``domain`` None reads it from the column."""
    check = RowCheck(row, problems.append, MAX_CHARACTERS)
    if row.values is None:
        return None
    prompt = check.text("prompt")
    responses = _responses(check, "chosen") + _responses(check, "rejected")
    if domain is None:
        domain = one_of(check, "domain", tuple(COUNTS))
    if not check.ok or prompt is None or domain is None:
        return None
    return comparison(row, domain, prompt, tuple(responses), better=len(STYLES))


def _responses(check: RowCheck, column: str) -> list[str]:
    """The three responses of a list; fewer after a report."""
    value = check.value(column)
    if isinstance(value, list) and len(value) == len(STYLES):
        texts = [check.text_of(f"{column}[{i}]", text) for i, text in enumerate(value)]
        return [text for text in texts if text is not None]
    if column in (check.row.values or {}):  # or else the column's absence is reported already
        got = str(len(value)) if isinstance(value, list) else shown(value)
        check.fail(column, f"expected {len(STYLES)} responses ({', '.join(STYLES)}), got {got}")
    return []
