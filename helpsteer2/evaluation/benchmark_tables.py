"""Results of RewardBench, RM-Bench and JudgeBench as tables that fit 100 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from helpsteer2.evaluation.report import (
    keep_whole,
    named_table,
    percent,
    percent_with_interval,
)

WEIGHTINGS_A_TABLE = 5
ACCURACY_WIDTH = len("29.9 (=447)")

DOMAIN_TITLES = {"chat": "Chat", "math": "Math", "code": "Code", "safety": "Safety"}


def rewardbench_tables(result: Mapping[str, Any]) -> list[Table]:
    """Sections, the other averages, and the subsets, under every weighting."""
    figures = result["weightings"]
    sections = list(next(iter(figures.values()))["sections"])
    overall = _figure_table(
        result,
        f"RewardBench, {result['pairs']:,} pairs: accuracy in %",
        {"overall": ("section_mean",), **{name: ("sections", name) for name in sections}},
        "overall: mean of the sections. ties count as misses. Second line: 95 % interval.",
        with_ties=True,
    )
    averages = {
        "micro": "micro_average",
        "macro": "macro_average",
        "old overall": "section_mean_before_2024_09",
        "old Safety": "safety_before_2024_09",
        "prior sets": "prior_sets",
        "leaderboard score": "leaderboard_score",
    }
    first = next(iter(figures.values()))
    others = _figure_table(
        result,
        "RewardBench, other averages in %",
        {title: (key,) for title, key in averages.items() if key in first},
        "micro: every prompt weighs the same; macro: every subset does; old: the leaderboard's "
        "weights until 10 September 2024, with the two XSTest counts interchanged.",
    )
    return [overall, others, *_subset_tables(result, "RewardBench subsets", "prompts")]


def rm_bench_tables(result: Mapping[str, Any]) -> list[Table]:
    """Domains, difficulties under both averages, style against style, and the subsets."""
    prompts = f"{result['prompts']:,} prompts"
    domains = _figure_table(
        result,
        f"RM-Bench, {prompts}: accuracy in %",
        {
            "overall": ("macro_average",),
            **{title: ("domains", name) for name, title in DOMAIN_TITLES.items()},
            "micro": ("micro_average",),
        },
        "overall: mean of the four domains (macro); micro: every prompt weighs the same. ties "
        "count as misses. Second line: 95 % interval.",
        with_ties=True,
    )
    difficulties = _figure_table(
        result,
        "RM-Bench by difficulty in %: mean of the domains (macro), and of all prompts (micro)",
        {
            f"{level} {average}": (average, level)
            for average in ("macro", "micro")
            for level in ("easy", "normal", "hard")
        },
        "easy: the chosen response is in the richer style; normal: both are in the same; hard: the "
        "rejected one is in the richer style.",
    )
    styles = _style_table(result)
    return [domains, difficulties, styles, *_subset_tables(result, "RM-Bench subsets", "pairs")]


def judge_bench_tables(result: Mapping[str, Any]) -> list[Table]:
    """Both averages and the categories, then the counts behind them."""
    first = next(iter(result["weightings"].values()))
    overall = _figure_table(
        result,
        f"JudgeBench ({result['split']}), {result['pairs']:,} pairs: accuracy in %",
        {
            "micro": ("micro_average",),
            "macro": ("macro_average",),
            **{name.capitalize(): ("subsets", name, "accuracy") for name in first["subsets"]},
        },
        "micro: all pairs alike, the official figure; macro: mean of the categories. ties count as "
        "misses. Second line: 95 % interval.",
        with_ties=True,
    )
    return [overall, *_subset_tables(result, "JudgeBench categories", "pairs")]


def headlines(result: Mapping[str, Any], figures: Mapping[str, str]) -> dict[str, str]:
    """The main figures of a benchmark as text, for models side by side.

    Args:
        result: The benchmark's result.
        figures: Keys of a weighting's figures, by title.

    Returns:
        Each figure under each weighting, in percent with its interval.
    """
    return {
        f"{name}, {title} %": percent_with_interval(of_weighting[key])
        for name, of_weighting in result["weightings"].items()
        for title, key in figures.items()
    }


def _figure_table(
    result: Mapping[str, Any],
    title: str,
    columns: Mapping[str, Sequence[str]],
    caption: str,
    *,
    with_ties: bool = False,
) -> Table:
    """Weightings by figures, each column with its place in a weighting's figures."""
    weightings = result["weightings"]
    cells = {
        name: [_at(of_weighting, place) for place in columns.values()]
        for name, of_weighting in weightings.items()
    }
    if with_ties:
        caption += _caveats(result, [figure for figures in cells.values() for figure in figures])
    names = ["weighting", *columns, *(["ties"] if with_ties else [])]
    table = named_table(title, names, caption=caption)
    for name, figures in cells.items():
        row = [percent_with_interval(figure) for figure in figures]
        if with_ties:
            subsets = weightings[name]["subsets"].values()
            row.append(f"{sum(subset['ties'] for subset in subsets):,}")
        table.add_row(name, *row)
    if with_ties:
        for name in result["skipped_weightings"]:
            table.add_row(name, "skipped")
    keep_whole(table, list(weightings))
    return table


def _at(figures: Mapping[str, Any], place: Sequence[str]) -> Any:
    found: Any = figures
    for key in place:
        found = found[key]
    return found


def _caveats(result: Mapping[str, Any], figures: Sequence[Mapping[str, Any]]) -> str:
    """What to know of a result's data: subsets of unusual size, and those that are not there."""
    text = ""
    odd = result["unusual_counts"]
    if odd:
        text += f" {len(odd)} subsets do not have their usual number of prompts."
    missing = {figure["not_computable"] for figure in figures if figure.get("not_computable")}
    if missing:
        text += " Not computable (–): " + "; ".join(sorted(missing)) + "."
    return text


def _style_table(result: Mapping[str, Any]) -> Table:
    """Accuracy of each chosen style against each rejected style."""
    weightings = result["weightings"]
    styles = list(next(iter(weightings.values()))["styles"])
    shown = [style.replace("_", " ") for style in styles]
    table = named_table(
        "RM-Bench, chosen against rejected style (columns): accuracy in %, mean of the domains",
        ["weighting", "chosen", *shown],
        left=2,
    )
    for name, of_weighting in weightings.items():
        for style, title in zip(styles, shown, strict=True):
            row = of_weighting["styles"][style].values()
            table.add_row(name if style == styles[0] else "", title, *map(percent, row))
    keep_whole(table, list(weightings))
    return table


def _subset_tables(result: Mapping[str, Any], title: str, unit: str) -> Iterator[Table]:
    """Subsets by weightings, a few weightings a table."""
    weightings = list(result["weightings"])
    for start in range(0, len(weightings), WEIGHTINGS_A_TABLE):
        shown = weightings[start : start + WEIGHTINGS_A_TABLE]
        table = named_table(
            f"{title}: accuracy in % (=ties)",
            # Blanks let a long name break at its words.
            ["subset", unit, *(name.replace("_", " ") for name in shown)],
        )
        subsets = list(result["weightings"][shown[0]]["subsets"])
        for subset in subsets:
            cells = [result["weightings"][name]["subsets"][subset] for name in shown]
            table.add_row(
                subset,
                f"{cells[0]['comparisons']:,}",
                *(
                    percent(cell["accuracy"]["value"])
                    + (f" (={cell['ties']})" if cell["ties"] else "")
                    for cell in cells
                ),
            )
        keep_whole(table, subsets)
        for column in table.columns[2:]:
            column.max_width = ACCURACY_WIDTH
        yield table
