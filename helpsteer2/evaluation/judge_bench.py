"""JudgeBench: pairs of which one response is right by construction, however it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

from rich.table import Table

from helpsteer2.data.checks import RowCheck
from helpsteer2.data.rows import Part, Row, local_path
from helpsteer2.errors import Problem, UserError
from helpsteer2.evaluation.benchmark_tables import headlines, judge_bench_tables
from helpsteer2.evaluation.comparisons import Comparison, compare
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

SETTING = "evaluators.judge_bench.path"

Split = Literal["gpt", "claude"]

COUNTS: dict[Split, dict[str, int]] = {
    "gpt": {"knowledge": 154, "reasoning": 98, "math": 56, "coding": 42},
    "claude": {"knowledge": 154, "reasoning": 51, "math": 34, "coding": 31},
}
"""Pairs of each category in each split. Source: ScalerLab/JudgeBench@e2c52c2, data."""

SOURCES = {
    "knowledge": "mmlu-pro",
    "reasoning": "livebench-reasoning",
    "math": "livebench-math",
    "coding": "livecodebench",
}
"""How the column ``source`` begins in each category. Source: run_judge.py, same commit."""

FILES: dict[Split, str] = {
    "gpt": "dataset=judgebench,response_model=gpt-4o-2024-05-13",
    "claude": "dataset=judgebench,response_model=claude-3-5-sonnet-20240620",
}
"""Name of the file in the repository that holds each split, without its suffix."""


def micro_average(accuracies: Mapping[str, Any], counts: Mapping[str, int]) -> Any:
    """Accuracy over all pairs: JudgeBench's own overall figure.

    Args:
        accuracies: Accuracy of each category (numbers, or arrays of one shape); NaN if not known.
        counts: Pairs of each category.

    Returns:
        The accuracy, NaN if a category is not known: never a mean over fewer.
    """
    total = sum(counts.values())
    return sum(accuracies[category] * n for category, n in counts.items()) / total


def macro_average(accuracies: Mapping[str, Any]) -> Any:
    """Plain mean of the four categories, as some tables give it (Skywork-Reward-V2's)."""
    return sum(accuracies[category] for category in SOURCES) / len(SOURCES)


@dataclass(frozen=True)
class JudgeBench:
    """Accuracy on JudgeBench's pairs, strictly: equal rewards are a miss, and counted apart.

    A reward model scores each response by itself, so a pair is decided once, in any order. (The
    repository's own code calls a tie ``B>A``, which is right for nearly half of the pairs.) One
    pass scores all responses; every weighting is computed from it, and so is a baseline that
    prefers the longer response. Intervals are 95 % and resample questions within categories.

    Args:
        path: Hub id, or local files in the published schema (``question``, ``response_A``,
            ``response_B``, ``label``, ``source``): a JSONL or Parquet file, or a folder that holds
            the split under its published name or as ``gpt.jsonl``.
        split: Who wrote the responses: ``gpt`` (GPT-4o, 350 pairs, the usual one) or ``claude``
            (Claude 3.5 Sonnet, 270 pairs).
        resamples: Bootstrap draws.

    Source: arXiv 2410.12784; ScalerLab/JudgeBench@e2c52c2.
    """

    path: str = "ScalerLab/JudgeBench"
    split: Split = "gpt"
    resamples: int = 1000

    takes: ClassVar[ModelKind] = "reward model"

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise UserError("resamples must be at least 1")

    @cached_property
    def _pairs(self) -> tuple[Comparison, ...]:
        return load_judge_bench(self.path, self.split)

    def check(self) -> None:
        """Read all pairs, of which any model is then scored.

        Raises:
            UserError: If the data cannot be found, or a row is bad.
        """
        _ = self._pairs

    def evaluate(self, scorer: Scorer, context: EvaluationContext) -> dict[str, Any]:
        """Score all pairs once and compute every figure under every weighting.

        Args:
            scorer: The model.
            context: Weightings, seed, and the folder that keeps the scores.

        Returns:
            ``weightings``, each with ``micro_average`` (the official overall figure),
            ``macro_average`` and the categories as ``subsets``; and the counts.

        Raises:
            DataError: If a row is bad, or its label or source unknown.
            UserError: If the data cannot be found, no weighting fits, or a score is not finite.
        """
        pairs = self._pairs
        every = tuple(SOURCES)
        name = f"judge_bench-{self.split}"
        compared = compare(name, pairs, every, scorer, context, self.resamples)
        result = {
            "split": self.split,
            "pairs": len(pairs),
            **compared.record,
            "unusual_counts": compared.unusual_counts(COUNTS[self.split]),
            "weightings": {
                weighting: {
                    "micro_average": wins.figure(
                        partial(micro_average, counts=compared.counts), every
                    ),
                    "macro_average": wins.figure(macro_average, every),
                    "subsets": compared.subset_figures(weighting),
                }
                for weighting, wins in compared.wins.items()
            },
        }
        return dict(plain(result))

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Show a result of ``evaluate`` within 100 columns."""
        return judge_bench_tables(result)

    def headlines(self, result: Mapping[str, Any]) -> dict[str, str]:
        """Both averages under every weighting."""
        return headlines(result, {"micro": "micro_average", "macro": "macro_average"})


def load_judge_bench(path: str, split: Split) -> tuple[Comparison, ...]:
    """Load pairs, the right response first.

    Args:
        path: As in ``JudgeBench``.
        split: Which pairs of a folder or the Hub.

    Returns:
        The pairs, in order.

    Raises:
        DataError: If a row is bad; all bad rows are listed.
        UserError: If the path does not exist, or the Hub cannot be asked.
    """
    problems: list[Problem] = []
    columns = ("question", "response_A", "response_B", "label", "source")
    local = local_path(path)
    published = local is not None and local.is_dir() and holds(local, FILES[split])
    part = Part(FILES[split] if published else split, split)
    rows = read_table(path, part, columns, problems, SETTING)
    return finished([_pair(row, problems) for row in rows], problems)


def _pair(row: Row, problems: list[Problem]) -> Comparison | None:
    """Check one row."""
    check = RowCheck(row, problems.append, MAX_CHARACTERS)
    if row.values is None:
        return None
    question = check.text("question")
    first, second = check.text("response_A"), check.text("response_B")
    label = one_of(check, "label", ("A>B", "B>A"))
    category = _category(check)
    if not check.ok or question is None or first is None or second is None or category is None:
        return None
    responses = (first, second) if label == "A>B" else (second, first)
    return comparison(row, category, question, responses)


def _category(check: RowCheck) -> str | None:
    """Category of a pair by its source; None after a report."""
    source = check.text("source")
    for category, prefix in SOURCES.items():
        if source is not None and source.startswith(prefix):
            return category
    if source is not None:
        known = ", ".join(f"{prefix}…" for prefix in SOURCES.values())
        check.fail("source", f"unknown source {source!r}; known: {known}")
    return None
