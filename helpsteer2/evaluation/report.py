"""Results of evaluations as tables that fit 100 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

UNKNOWN = "–"
NOT_COMPUTABLE = "not computable"
WEIGHTINGS_A_TABLE = 5
LONGEST_NAME = 24
ACCURACY_WIDTH = len("29.9 (=447)")


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash if it is not known."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share in percent, or a dash if it is not known."""
    return UNKNOWN if value is None else f"{100.0 * value:.1f}"


def with_interval(figure: Mapping[str, Any], digits: int = 3, scale: float = 1.0) -> str:
    """A figure with its interval on a second line."""
    if figure["value"] is None:
        return NOT_COMPUTABLE if figure.get("not_computable") else UNKNOWN
    value = f"{scale * figure['value']:.{digits}f}"
    if figure["low"] is None:
        return value
    return f"{value}\n{scale * figure['low']:.{digits}f}–{scale * figure['high']:.{digits}f}"


def percent_with_interval(figure: Mapping[str, Any]) -> str:
    """A share in percent with its interval on a second line."""
    return with_interval(figure, digits=1, scale=100.0)


def spread(outputs: Mapping[str, Any]) -> str:
    """Mean ± standard deviation."""
    return f"{number(outputs['mean'], 2)}±{number(outputs['std'], 2)}"


def _table(title: str, names: Sequence[str], left: int = 1, caption: str | None = None) -> Table:
    """A table whose first columns hold names and whose others hold figures."""
    table = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for index, name in enumerate(names):
        justify: Any = "left" if index < left else "right"
        table.add_column(name, justify=justify, overflow="fold")
    return table


def _keep_whole(table: Table, names: Sequence[str]) -> None:
    """Give the first column room for its names, so that the others fold before it does."""
    table.columns[0].min_width = min(LONGEST_NAME, max(map(len, names)))


def rating_tables(result: Mapping[str, Any]) -> list[Table]:
    """The model beside the trivial predictors, its gains, its rewards and its calibration."""
    return [
        _predictor_table(result),
        _gain_table(result),
        _reward_table(result),
        _calibration_table(result),
    ]


def _predictor_table(result: Mapping[str, Any]) -> Table:
    """The model beside the mean and the length-only predictor, attribute by attribute."""
    table = _table(
        f"{result['split']}: {result['responses']:,} responses to {result['prompts']:,} prompts",
        [
            "attribute",
            "by",
            "mean±std",
            "MSE",
            "MAE",
            "r",
            "ρ",
            "R²",
            "pairs %",
            "ties",
            "ECE",
        ],
        left=2,
        caption=(
            "mean, length: fitted on the ratings of "
            f"{result['baselines_fitted_on']!r}. pairs %: ordered as rated, predicted "
            "ties miss; ties: predicted + rated. Second line: 95 % interval over prompts."
        ),
    )
    for name, attribute in result["attributes"].items():
        if "predictors" not in attribute:
            table.add_row(f"{name}\nnot rated", "model", spread(attribute["outputs"]))
            continue
        label = f"{name}\n{attribute['known']:,} rated"
        for predictor, figures in attribute["predictors"].items():
            pairs = figures["pairs"]
            table.add_row(
                label,
                predictor,
                spread(attribute["outputs"]) if predictor == "model" else "",
                with_interval(figures["mse"], 2),
                number(figures["mae"]["value"], 2),
                number(figures["pearson"]["value"], 2),
                number(figures["spearman"]["value"], 2),
                number(figures["r2"]["value"], 2),
                percent_with_interval(pairs["accuracy"]),
                f"{pairs['predicted_ties']}+{pairs['rating_ties']}",
                number(figures["calibration_error"], 2),
            )
            label = ""
        table.add_section()
    _keep_whole(table, list(result["attributes"]))
    return table


def _gain_table(result: Mapping[str, Any]) -> Table:
    """What the model gains on the trivial predictors, with paired intervals."""
    table = _table(
        "gain of the model (positive is better)",
        ["attribute", "MSE, over mean", "MSE, over length", "pairs, points over length"],
    )
    for name, attribute in result["attributes"].items():
        if "differences" in attribute:
            gains = attribute["differences"]
            table.add_row(
                name,
                _on_one_line(gains["mse_gain_over_mean"], 3, 1.0),
                _on_one_line(gains["mse_gain_over_length"], 3, 1.0),
                _on_one_line(gains["pair_accuracy_gain_over_length"], 1, 100.0),
            )
    return table


def _on_one_line(figure: Mapping[str, Any], digits: int, scale: float) -> str:
    """A signed figure with its interval in brackets."""
    ends = [figure[key] for key in ("value", "low", "high")]
    if None in ends:
        return UNKNOWN
    value, low, high = (f"{scale * end:+.{digits}f}" for end in ends)
    return f"{value} [{low}, {high}]"


def _reward_table(result: Mapping[str, Any]) -> Table:
    """How each weighting orders pairs against the helpfulness ratings."""
    table = _table(
        "weighted reward against helpfulness",
        ["weighting", "mean±std", "pairs", "right", "wrong", "ties", "right %", "ties ½ %"],
    )
    for name, figures in result["weightings"].items():
        pairs = figures["pairs_by_helpfulness"]
        if pairs is None:
            table.add_row(name, spread(figures["outputs"]), "not rated")
            continue
        table.add_row(
            name,
            spread(figures["outputs"]),
            f"{pairs['decided']:,}",
            f"{pairs['right']:,}",
            f"{pairs['wrong']:,}",
            f"{pairs['predicted_ties']:,}",
            percent_with_interval(pairs["accuracy"]),
            percent(pairs["half_credit_accuracy"]),
        )
    for name, reason in result["skipped_weightings"].items():
        table.add_row(name, f"skipped: {reason}")
    return table


def _calibration_table(result: Mapping[str, Any]) -> Table:
    """Mean score and mean rating in bins of rising score."""
    rated = {
        name: attribute["calibration"]
        for name, attribute in result["attributes"].items()
        if "calibration" in attribute
    }
    bins = max((len(bins["counts"]) for bins in rated.values()), default=0)
    table = _table(
        "calibration: responses sorted by score, in bins",
        ["attribute", "mean", *(str(index + 1) for index in range(bins))],
        left=2,
    )
    for name, of_attribute in rated.items():
        for label, key in (("score", "mean_predicted"), ("rating", "mean_rating")):
            cells = [number(value, 2) for value in of_attribute[key]]
            table.add_row(name if key == "mean_predicted" else "", label, *cells)
    return table


def rewardbench_tables(result: Mapping[str, Any]) -> list[Table]:
    """Sections, the other averages, and the subsets, under every weighting."""
    return [_section_table(result), _average_table(result), *_subset_tables(result)]


def _section_table(result: Mapping[str, Any]) -> Table:
    figures = result["weightings"]
    sections = list(next(iter(figures.values()))["sections"])
    caption = "overall: mean of the sections. ties count as misses. Second line: 95 % interval."
    missing = {
        reason
        for of_weighting in figures.values()
        for section in of_weighting["sections"].values()
        if (reason := section["not_computable"])
    }
    odd = result["unusual_counts"]
    if odd:
        caption += f" {len(odd)} subsets do not have their usual number of prompts."
    if missing:
        caption += " Not computable: " + "; ".join(sorted(missing)) + "."
    table = _table(
        f"RewardBench, {result['pairs']:,} pairs: accuracy in %",
        ["weighting", "overall", *sections, "ties"],
        caption=caption,
    )
    for name, of_weighting in figures.items():
        table.add_row(
            name,
            percent_with_interval(of_weighting["section_mean"]),
            *(percent_with_interval(of_weighting["sections"][section]) for section in sections),
            f"{sum(subset['ties'] for subset in of_weighting['subsets'].values()):,}",
        )
    for name in result["skipped_weightings"]:
        table.add_row(name, "skipped")
    _keep_whole(table, list(figures))
    return table


def _average_table(result: Mapping[str, Any]) -> Table:
    names = {
        "micro_average": "micro",
        "macro_average": "macro",
        "section_mean_before_2024_09": "old overall",
        "safety_before_2024_09": "old Safety",
    }
    figures = result["weightings"]
    if "leaderboard_score" in next(iter(figures.values())):
        names |= {"prior_sets": "prior sets", "leaderboard_score": "leaderboard score"}
    table = _table(
        "RewardBench, other averages in %",
        ["weighting", *names.values()],
        caption=(
            "micro: every prompt weighs the same; macro: every subset does; old: the leaderboard's "
            "weights until 10 September 2024, with the two XSTest counts interchanged."
        ),
    )
    for name, of_weighting in figures.items():
        table.add_row(name, *(percent_with_interval(of_weighting[key]) for key in names))
    _keep_whole(table, list(figures))
    return table


def _subset_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """Subsets by weightings, a few weightings a table."""
    weightings = list(result["weightings"])
    for start in range(0, len(weightings), WEIGHTINGS_A_TABLE):
        shown = weightings[start : start + WEIGHTINGS_A_TABLE]
        table = _table(
            "RewardBench subsets: accuracy in % (=ties)",
            # Blanks let a long name break at its words.
            ["subset", "prompts", *(name.replace("_", " ") for name in shown)],
        )
        for subset in result["weightings"][shown[0]]["subsets"]:
            cells = [result["weightings"][name]["subsets"][subset] for name in shown]
            table.add_row(
                subset,
                f"{cells[0]['prompts']:,}",
                *(
                    percent(cell["accuracy"]["value"])
                    + (f" (={cell['ties']})" if cell["ties"] else "")
                    for cell in cells
                ),
            )
        _keep_whole(table, list(result["weightings"][shown[0]]["subsets"]))
        for column in table.columns[2:]:
            column.max_width = ACCURACY_WIDTH
        yield table
