"""Results of evaluations as tables that fit 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

UNKNOWN = "–"
LONGEST_NAME = 24
NO_RATINGS = f"{UNKNOWN}: the scores, learned from preferences or extrapolated, have no unit."


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash if it is not known."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share in percent, or a dash if it is not known."""
    return UNKNOWN if value is None else f"{100.0 * value:.1f}"


def with_interval(figure: Mapping[str, Any], digits: int = 3, scale: float = 1.0) -> str:
    """A figure with its interval on a second line."""
    if figure["value"] is None:
        return UNKNOWN
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


def named_table(
    title: str, names: Sequence[str], left: int = 1, caption: str | None = None
) -> Table:
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


def keep_whole(table: Table, names: Sequence[str]) -> None:
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
    table = named_table(
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
            + ("" if result["scores_are_ratings"] else f" {NO_RATINGS}")
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
    keep_whole(table, list(result["attributes"]))
    return table


def _gain_table(result: Mapping[str, Any]) -> Table:
    """What the model gains on the trivial predictors, with paired intervals."""
    table = named_table(
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
    table = named_table(
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
    for name in result["skipped_weightings"]:
        table.add_row(name, "skipped")
    return table


def _calibration_table(result: Mapping[str, Any]) -> Table:
    """Mean score and mean rating in bins of rising score."""
    rated = {
        name: attribute["calibration"]
        for name, attribute in result["attributes"].items()
        if "calibration" in attribute
    }
    bins = max((len(bins["counts"]) for bins in rated.values()), default=0)
    table = named_table(
        "calibration: responses sorted by score, in bins",
        ["attribute", "mean", *(str(index + 1) for index in range(bins))],
        left=2,
    )
    for name, of_attribute in rated.items():
        for label, key in (("score", "mean_predicted"), ("rating", "mean_rating")):
            cells = [number(value, 2) for value in of_attribute[key]]
            table.add_row(name if key == "mean_predicted" else "", label, *cells)
    return table


def side_by_side_table(title: str, columns: Mapping[str, Mapping[str, str]]) -> Table:
    """Models beside each other.

    Args:
        title: What they were evaluated on.
        columns: For each model its main figures as text, by name.

    Returns:
        A row a figure, a column a model; a dash where a model has no such figure.
    """
    table = named_table(f"{title}: models side by side", [title, *columns])
    rows = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    for name in rows:
        table.add_row(name, *(figures.get(name, UNKNOWN) for figures in columns.values()))
    keep_whole(table, rows)
    return table
