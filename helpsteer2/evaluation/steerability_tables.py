"""Results of ``SteerabilityEvaluation`` as tables, headlines and plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from helpsteer2.attributes import RATING_MAX, RATING_MIN
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.evaluation.report import keep_whole, named_table, with_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = ("complexity", "verbosity")
"""What can be asked for in any amount without making an answer better or worse by itself."""

UNLABELLED = "the policy was trained without labels: one set of answers counts for every request"


def steerability_tables(result: Mapping[str, Any]) -> list[Table]:
    """What was asked for and got, and what else moved.

    Args:
        result: As made by ``SteerabilityEvaluation.evaluate``.
    """
    return [_asked_got_table(result), _cross_talk_table(result)]


def _asked_got_table(result: Mapping[str, Any]) -> Table:
    """Mean rating at each level asked for, and how closely levels were followed."""
    attributes = result["attributes"]
    with_baseline = result["baseline"] is not None
    levels = list(next(iter(attributes.values()))["got"])
    names = ["asked", *levels, "Spearman", "gap", *(["less baseline"] if with_baseline else [])]
    if result["label_attributes"]:
        where = f"all else at {AttributeLabel.of(result['base']).text}"
    else:
        where = UNLABELLED
    table = named_table(
        f"{result['prompts']:,} prompts of {result['split']!r}, {result['samples']} answers to "
        "each request: mean rating by the level asked for",
        names,
        caption=f"{where}. gap: mean |asked - got|. Second line: 95 % interval over prompts.",
    )
    gaps = ("gap", "gap_difference") if with_baseline else ("gap",)
    for name, figures in attributes.items():
        cells = [*figures["got"].values(), *(figures[key] for key in ("spearman", *gaps))]
        table.add_row(name, *(with_interval(cell, 2) for cell in cells))
    table.add_section()
    empty = [""] * (len(levels) + 1)
    table.add_row("mean", *empty, *(with_interval(result[key], 2) for key in gaps))
    keep_whole(table, list(attributes))
    return table


def _cross_talk_table(result: Mapping[str, Any]) -> Table:
    """Slope of every rating a point asked of each attribute."""
    attributes = result["attributes"]
    moved = list(next(iter(attributes.values()))["slopes"])
    table = named_table(
        "cross-talk: points by which each rating moves for a point asked",
        ["asked", *moved, "|slope|", "moves"],
        caption="|slope|: mean of the other ratings. moves: their mean distance from the base, in "
        "points, over all levels. Noise alone puts both above 0.",
    )
    for name, figures in attributes.items():
        cells = [*figures["slopes"].values(), figures["cross_talk"], figures["moves"]]
        table.add_row(name, *(with_interval(cell, 2) for cell in cells))
    table.add_section()
    means = (with_interval(result[key], 2) for key in ("cross_talk", "moves"))
    table.add_row("mean", *[""] * len(moved), *means)
    keep_whole(table, list(attributes))
    return table


def steerability_headlines(result: Mapping[str, Any]) -> dict[str, str]:
    """The main figures as text, by name; arguments as ``steerability_tables``."""
    rows = {"mean gap": with_interval(result["gap"], 2)}
    if result["baseline"] is not None:
        rows["mean gap, less baseline"] = with_interval(result["gap_difference"], 2)
    for name in STYLE:
        if name in result["attributes"]:
            rows[f"{name}, Spearman"] = with_interval(result["attributes"][name]["spearman"], 2)
    return rows | {
        "cross-talk, |slope|": with_interval(result["cross_talk"], 2),
        "cross-talk, moves": with_interval(result["moves"], 2),
    }


def steerability_figures(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
    """Asked against got, and the slopes, of one or more policies, by file name without suffix.

    Args:
        results: Of policies that were asked for the same, by name.
    """
    from helpsteer2.plots import heat_maps, interval_curves

    first = next(iter(results.values()))
    asked, names = first["attributes"], list(results)
    panels = {
        name: {
            policy: list(results[policy]["attributes"][name]["got"].values()) for policy in names
        }
        for name in asked
    }
    levels = [float(level) for level in next(iter(asked.values()))["got"]]
    slopes = {
        policy: [
            [slope["value"] for slope in figures["slopes"].values()]
            for figures in result["attributes"].values()
        ]
        for policy, result in results.items()
    }
    return {
        "asked_got": interval_curves(
            panels,
            levels,
            labels=("asked", "got"),
            limits=(RATING_MIN, RATING_MAX),
            title=f"answers to {first['prompts']:,} prompts: mean rating by the level asked for",
        ),
        "cross_talk": heat_maps(
            slopes,
            list(asked),
            list(next(iter(asked.values()))["slopes"]),
            labels=("moved", "asked"),
            unit="points a point asked",
            title="points by which each rating moves for a point asked",
        ),
    }
