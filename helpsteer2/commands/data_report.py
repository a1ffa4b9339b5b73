"""The description of a data set as tables (for the terminal and Markdown) and figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpsteer2.data.description import LENGTHS, REFERENCE, SAMPLE_SIZE
from helpsteer2.data.rater_agreement import POOLINGS, STAGES
from helpsteer2.functional.agreement import SUBSTANTIAL
from helpsteer2.functional.statistics import FloatArray

if TYPE_CHECKING:
    from rich.console import RenderableType

UNKNOWN = "–"

CONVENTIONS = {
    "std": "sample standard deviation, n − 1 (the paper does not say which it prints)",
    "r": f"Pearson correlation with {REFERENCE}, over the responses where both are known",
    "prompt turns": "all messages of the prompt but a system one; counted once a response",
    "prompt characters": "characters of its messages, without the markers between turns; counted "
    "once a response",
    "ties": "pairs of responses to one prompt with equal ratings",
    "intervals": "95 %, bootstrap over prompts",
    **{f"κ, {name.replace('_', ' ')}": text for name, text in POOLINGS.items()},
    "κ": "Cohen's κ with quadratic weights; the paper does not say how it pools pairs of raters",
    "diverging": "one rater or more rated the first response higher on helpfulness, and one or "
    "more the second; thresholds are our reading of arXiv 2410.14632. Raters are matched by their "
    "place in the two lists",
    "substantially diverging": f"as diverging, each side by {SUBSTANTIAL} or more",
}
"""What the figures are, by the name they are printed under."""


@dataclass(frozen=True)
class Sheet:
    """A table to be shown in the terminal or as Markdown.

    Attributes:
        title: What it is about.
        columns: Headings; the first column holds names.
        rows: Cells; without any the sheet is no table, and its caption says why.
        caption: What stands below.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    caption: str = ""

    def rich(self) -> RenderableType:
        """As a table of the terminal; title and caption may be wider than it."""
        from rich.console import Group
        from rich.markup import escape
        from rich.text import Text

        from helpsteer2.evaluation.report import named_table

        title, caption = Text(self.title, "bold"), Text(f"{self.caption}\n")
        if not self.rows:
            return Group(title, caption)
        table = named_table("", [*map(escape, self.columns)])
        for row in self.rows:
            table.add_row(*map(escape, row))
        return Group(title, table, caption)

    def markdown(self) -> str:
        """As a heading, a table of GitHub's Markdown, and a paragraph."""
        if not self.rows:
            return f"### {self.title}\n\n{self.caption}\n"
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [" | ".join(cells) for cells in (self.columns, rule, *self.rows)]
        table = "\n".join(f"| {line} |" for line in lines)
        caption = f"\n\n{self.caption}" if self.caption else ""
        return f"### {self.title}\n\n{table}{caption}\n"


def printed(description: Mapping[str, Any]) -> Iterator[Sheet]:
    """Tables for the terminal: ratings of every split, the rest for all splits together.

    Args:
        description: As written to ``description.json``.
    """
    name = f"{description['data']}, {description['kind']}"
    for split, figures in description["splits"].items():
        yield _rating_sheet(f"{name}, split {split}", figures)
    last = list(description["splits"].values())[-1]
    yield from _preference_sheets(last)
    yield from _rater_sheets(last)


def markdown(description: Mapping[str, Any], images: Sequence[str]) -> str:
    """The whole description as Markdown.

    Args:
        description: As written to ``description.json``.
        images: Names of the figures beside it.
    """
    blocks = [f"# {description['data']}\n", f"Made by `{description['command']}`.\n"]
    if description["problems"]:
        blocks.append(f"Left out: {description['problems']:,} problems of the files.\n")
    blocks.append("\n".join(f"- {name}: {text}" for name, text in CONVENTIONS.items()) + "\n")
    blocks += [f"![{Path(image).stem}]({image})\n" for image in images]
    for split, figures in description["splits"].items():
        blocks.append(f"## {split}\n")
        sheets = [_rating_sheet("ratings and lengths", figures), _correlation_sheet(figures)]
        sheets += [*_preference_sheets(figures), *_rater_sheets(figures)]
        blocks += [sheet.markdown() for sheet in sheets]
    return "\n".join(blocks)


def write_figures(
    folder: Path, title: str, figures: Mapping[str, Any], columns: Mapping[str, FloatArray]
) -> list[str]:
    """Draw histograms, preferences and correlations.

    Args:
        folder: Where to write.
        title: Stands above every figure.
        figures: Of one split, or of all together.
        columns: Known values by column, as ``DataStatistics.columns`` gives them.

    Returns:
        Names of the files.

    Raises:
        UserError: If one cannot be written.
    """
    from helpsteer2 import plots

    number = figures["responses"]["number"]
    if number > SAMPLE_SIZE:
        title += f", {SAMPLE_SIZE:,} of {number:,} responses drawn at random"
    values = {name: column.tolist() for name, column in columns.items()}
    lengths = {name: values[name] for name in LENGTHS}
    drawn = {"lengths.png": plots.histograms(lengths, title=title)}
    rated = {name: column for name, column in values.items() if name not in LENGTHS and column}
    if rated:
        drawn["ratings.png"] = plots.histograms(rated, title=title)
    if figures["preferences"]:
        pairs = figures["preferences"]["strengths"].items()
        strengths = [float(strength) for strength, times in pairs for _ in range(times)]
        drawn["preferences.png"] = plots.histograms({"preference strength": strengths}, title=title)
    names, matrix = figures["correlations"]["columns"], figures["correlations"]["matrix"]
    cells = np.array(matrix, dtype=np.float64)  # None becomes NaN.
    varied = np.flatnonzero(~np.isnan(np.diag(cells)))
    if varied.size > 1:
        kept = cells[np.ix_(varied, varied)]
        drawn["correlations.png"] = plots.heat_map(kept, [names[i] for i in varied], title=title)
    for file, figure in drawn.items():
        plots.save(figure, folder / file)
    return list(drawn)


def _rating_sheet(title: str, figures: Mapping[str, Any]) -> Sheet:
    """Table 2 of the paper, with the number of known values and the ties."""
    responses, groups = figures["responses"], figures["groups"]
    caption = "no groups"
    if groups:
        caption = f"{groups:,} groups, {responses['number'] / groups:.2f} responses each"
    if responses["fewest"] != responses["most"]:
        caption += f" ({responses['fewest']} to {responses['most']})"
    rows = [
        (
            name,
            f"{column['known']:,}",
            _number(column["mean"]),
            _number(column["std"]),
            _number(column[f"pearson_with_{REFERENCE}"]),
            _percent(column.get("ties")),
        )
        for name, column in figures["columns"].items()
    ]
    columns = ("", "known", "mean", "std", f"r with {REFERENCE}", "ties")
    return Sheet(title, columns, rows, caption)


def _correlation_sheet(figures: Mapping[str, Any]) -> Sheet:
    names, matrix = figures["correlations"]["columns"], figures["correlations"]["matrix"]
    rows = [
        (name, *(_number(value) for value in row)) for name, row in zip(names, matrix, strict=True)
    ]
    return Sheet("Pearson correlations", ("", *names), rows)


def _preference_sheets(figures: Mapping[str, Any]) -> Iterator[Sheet]:
    preferences = figures["preferences"]
    if not preferences:
        return
    rows = [
        (str(strength), f"{pairs:,}", _percent(pairs / preferences["known"]))
        for strength, pairs in preferences["strengths"].items()
    ]
    caption = (
        f"{preferences['known']:,} preferences, {_percent(preferences['ties'])} ties; "
        "−3: the first response is much better, 3: the second"
    )
    yield Sheet("preference strengths", ("strength", "pairs", "share"), rows, caption)


def _rater_sheets(figures: Mapping[str, Any]) -> Iterator[Sheet]:
    """κ and diverging preferences, also of what the final filter keeps if it drops any."""
    stages = figures["raters"] or {}
    for stage, found in stages.items():
        if stage != "all" and found["prompts"] == stages["all"]["prompts"]:
            continue
        where = f"{found['prompts']:,} prompts: {STAGES[stage]}"
        yield _kappa_sheet(where, found)
        yield _divergence_sheet(where, found)


def _kappa_sheet(where: str, found: Mapping[str, Any]) -> Sheet:
    """Table 1 of the paper, under every pooling."""
    rows = [
        (
            name,
            f"{attribute['rated']:,}",
            _number(attribute["raters"]["value"], 2),
            *(_interval(attribute["kappa"][pooling], 3) for pooling in POOLINGS),
        )
        for name, attribute in found["attributes"].items()
    ]
    poolings = (f"κ, {pooling.replace('_', ' ')}" for pooling in POOLINGS)
    return Sheet(
        "agreement of raters",
        ("", "rated", "raters", *poolings),
        rows,
        f"{where}. {_interval(found['raters_a_response'], 2)} raters a response. κ: quadratic "
        "weights; the paper does not say how it pools pairs of raters",
    )


def _divergence_sheet(where: str, found: Mapping[str, Any]) -> Sheet:
    """Shares of diverging pairs, or why there are none."""
    title, columns = "preferences of single raters", ("pairs of responses", "%")
    preferences = found["preferences"]
    if preferences is None or not preferences["compared"]:
        return Sheet(title, columns, (), f"{where}. 0 pairs compared: {_why_none(found)}")
    rows = [(name, _interval(share, 1, 100.0)) for name, share in preferences["shares"].items()]
    return Sheet(
        title,
        columns,
        rows,
        f"{where}. {preferences['compared']:,} pairs compared, {preferences['not_comparable']:,} "
        "without the same number of raters, two at least, on both. diverging: raters on both "
        f"sides; substantially: by {SUBSTANTIAL} or more on both, our reading of the paper. "
        "diverging holds the substantial ones too",
    )


def _why_none(found: Mapping[str, Any]) -> str:
    """What keeps the raters' preferences from being compared."""
    if found["preferences"] is None:
        return f"no attribute is named {REFERENCE}"
    pairs = found["preferences"]["not_comparable"]
    if not pairs:
        return "no prompt has two responses"
    raters = _number(found["attributes"][REFERENCE]["raters"]["value"], 2)
    return (
        f"a pair needs the same number of {REFERENCE} ratings, two at least, on both responses, "
        f"and none of the {pairs:,} has (raters of a response's {REFERENCE}: {raters} on average)"
    )


def _number(value: float | None, digits: int = 4) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.1%}"


def _interval(figure: Mapping[str, float | None], digits: int, scale: float = 1.0) -> str:
    """A figure with its interval in brackets."""
    value, low, high = (figure[end] for end in ("value", "low", "high"))
    if value is None:
        return UNKNOWN
    text = f"{scale * value:.{digits}f}"
    if low is None or high is None:
        return text
    return f"{text} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"
