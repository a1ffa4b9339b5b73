"""Figures in one style: drawn without a display, the same bytes for the same numbers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from helpsteer2.functional.statistics import Calibration, pearson
from helpsteer2.records import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FloatArray = npt.NDArray[np.float64]

# Okabe and Ito's palette: told apart by everybody, and in print.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"

COLOURS = 5
"""In the cycle of the style; further lines are dashed."""

DPI = 150

MOST_BARS = 30
"""Bins of a histogram; whole numbers over a shorter range get a bar each."""

COLUMNS = 3
"""Panels side by side."""

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.prop_cycle": f"cycler('color', ['{BLUE}', '{ORANGE}', '#009E73', '#CC79A7', '#E69F00'])",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.dpi": DPI,
    "figure.facecolor": "white",
    "figure.titlesize": 11,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that it is the same everywhere
    "font.size": 9,
    "grid.color": "#E0E0E0",
    "legend.frameon": False,
    "savefig.dpi": DPI,
    "savefig.facecolor": "white",
    "text.parse_math": False,  # a $ in a name is a $
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw in the project's style until the end of the block, whatever a ``matplotlibrc`` says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all.

    Args:
        figure: What to write.
        path: The file; its folder is made if need be. The same figure gives the same bytes, as long
            as the version of matplotlib is the same.

    Raises:
        UserError: If it cannot be written.
    """

    def write(file: Any) -> None:
        # matplotlib would note its version.
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})

    with style():
        write_atomic(path, write)


def histograms(columns: Mapping[str, Sequence[float]], *, title: str) -> Figure:
    """How the values of some columns are distributed, a panel each.

    Args:
        columns: Values by name; the name stands below its axis, so it should say the unit. NaN and
            None are left out. Whole numbers over a short range get a bar each.
        title: Stands above.

    Returns:
        A figure, not shown anywhere yet.

    Raises:
        ValueError: If there is no column.
    """
    with style():
        figure, panels = _panels(len(columns), title)
        for axes, (name, values) in zip(panels, columns.items(), strict=True):
            known = _finite(values)
            axes.set_xlabel(name)
            axes.set_ylabel("count")
            if not known.size:
                _say_nothing_is_known(axes)
                continue
            edges, width = _bars(known)
            axes.hist(known, bins=edges.tolist(), rwidth=width, color=BLUE)
            axes.axvline(float(known.mean()), color=ORANGE)
            axes.set_title(f"mean {known.mean():.2f}, std {known.std():.2f}, n {known.size:,}")
    return figure


def heat_map(matrix: npt.ArrayLike, labels: Sequence[str], *, title: str) -> Figure:
    """A square matrix of correlations, as ``heat_maps``."""
    return heat_maps({"": matrix}, labels, labels, unit="correlation (−1 … 1)", title=title)


def heat_maps(
    matrices: Mapping[str, npt.ArrayLike],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    unit: str,
    title: str,
    labels: tuple[str, str] = ("", ""),
) -> Figure:
    """Matrices of one shape, a panel each, every cell with its number.

    Args:
        matrices: ``(R, C)`` values by name, coloured from −1 to 1; NaN and None are not known.
        rows: R names.
        columns: C names.
        unit: What the numbers are, beside their colours.
        title: Stands above.
        labels: Names of the axes, of the columns and of the rows.

    Raises:
        ValueError: If there is no matrix, or one is not R × C.
    """
    with style():
        sides = (1.8 + 0.7 * len(columns), 1.8 + 0.7 * len(rows))
        figure, panels = _panels(len(matrices), title, *sides)
        for axes, (name, matrix) in zip(panels, matrices.items(), strict=True):
            values = np.asarray(matrix, dtype=np.float64)
            if values.shape != (len(rows), len(columns)):
                raise ValueError(f"{len(rows)} by {len(columns)} labels for shape {values.shape}")
            image = axes.imshow(values, cmap="RdBu_r", vmin=-1.0, vmax=1.0)
            axes.grid(visible=False)  # and the face is seen where nothing is known
            axes.set(xlabel=labels[0], ylabel=labels[1], title=name, facecolor="#DDDDDD")
            axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
            axes.set_yticks(range(len(rows)), rows)
            for (row, column), value in np.ndenumerate(values):
                text = "–" if math.isnan(value) else f"{value:.2f}"
                colour = "white" if abs(value) > 0.65 else "black"
                axes.text(column, row, text, ha="center", va="center", color=colour)
        figure.colorbar(image, ax=panels, label=unit)
    return figure


def scatter(columns: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]], *, title: str) -> Figure:
    """Predictions against ratings, a panel each, with the mean prediction of each rating.

    Args:
        columns: By name (which should say the unit): ``(N,)`` predictions and ``(N,)`` ratings, NaN
            where unknown.
        title: Stands above.

    Returns:
        A figure, not shown anywhere yet. Dots are moved sideways a little, always by the same
        amounts, because many share a rating.

    Raises:
        ValueError: If there is no column, or a prediction too many or too few.
    """
    random = np.random.default_rng(0)
    with style():
        figure, panels = _panels(len(columns), title)
        for axes, (name, (predictions, ratings)) in zip(panels, columns.items(), strict=True):
            axes.set_xlabel(f"rated {name}")
            axes.set_ylabel(f"predicted {name}")
            predicted, rated = _both_finite(predictions, ratings)
            if not rated.size:
                _say_nothing_is_known(axes)
                continue
            levels, level_of = np.unique(rated, return_inverse=True)
            gap = float(np.diff(levels).min()) if levels.size > 1 else 1.0
            shifts = random.uniform(-0.2, 0.2, rated.size) * gap
            axes.scatter(rated + shifts, predicted, s=6, alpha=0.35, color=BLUE, linewidths=0)
            if levels.size <= MOST_BARS:
                means = np.bincount(level_of, predicted) / np.bincount(level_of)
                axes.plot(levels, means, "o-", color=ORANGE, label="mean")
                axes.legend(loc="upper left")
            _identity(axes)
            axes.set_title(f"Pearson {pearson(predicted, rated):.2f}, n {rated.size:,}")
    return figure


def calibration(columns: Mapping[str, Calibration], *, title: str) -> Figure:
    """Whether a prediction means what it says: mean rating against mean prediction of each bin.

    Args:
        columns: Bins by name, which should say the unit; the area of a dot is its bin's share of
            the entries.
        title: Stands above.

    Returns:
        A figure, not shown anywhere yet.

    Raises:
        ValueError: If there is no column.
    """
    with style():
        figure, panels = _panels(len(columns), title)
        for axes, (name, bins) in zip(panels, columns.items(), strict=True):
            axes.set_xlabel(f"predicted {name}, mean of a bin")
            axes.set_ylabel(f"rated {name}, mean of a bin")
            if not bins.counts.size:
                _say_nothing_is_known(axes)
                continue
            areas = 300.0 * bins.counts / bins.counts.sum()
            axes.plot(bins.mean_predicted, bins.mean_rating, color=BLUE)
            axes.scatter(bins.mean_predicted, bins.mean_rating, s=areas, color=BLUE)
            _identity(axes)
            axes.set_title(f"calibration error {bins.error:.2f}, n {bins.counts.sum():,}")
    return figure


def bars(
    series: Mapping[str, Sequence[Mapping[str, float]]],
    labels: Sequence[str],
    *,
    title: str,
    limits: tuple[float, float],
) -> Figure:
    """Figures beside each other, with their intervals: a group of bars a label.

    Args:
        series: By name ``value``, ``low`` and ``high`` of each label, as an ``Interval`` is stored;
            the ends of one that is not known are None.
        labels: What the figures are of.
        title: Stands above.
        limits: Ends of the axis.

    Returns:
        A figure, not shown anywhere yet.

    Raises:
        ValueError: If there is no series, or one has not a figure for each label.
    """
    with style():
        figure, (axes,) = _panels(1, title, 1.5 + 1.5 * len(labels))
        width, places = 0.8 / max(1, len(series)), np.arange(len(labels))
        for i, (name, intervals) in enumerate(series.items()):
            if len(intervals) != len(labels):
                raise ValueError(f"{name}: {len(intervals)} figures for {len(labels)} labels")
            value, ends = _with_ends(intervals)
            shifted = places + (i - (len(series) - 1) / 2) * width
            axes.bar(shifted, value, 0.9 * width, label=name, yerr=ends, ecolor="black")
        axes.set_xticks(places, labels)
        axes.set_ylim(limits)
        axes.legend(ncols=len(series), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def curves(
    x: Mapping[str, npt.ArrayLike],
    y: Mapping[str, npt.ArrayLike],
    *,
    labels: tuple[str, str],
    title: str,
) -> Figure:
    """Lines with a mark at each point: the paths that trainings took.

    Args:
        x: ``(N,)`` of each line, by its name, in the order of time.
        y: Likewise.
        labels: Names of the two axes.
        title: Title of the figure.

    Returns:
        The figure.
    """
    with style():
        figure, (axes,) = _panels(1, title, 6.4, 3.9)
        for i, (name, values) in enumerate(y.items()):
            known_x, known = _both_finite(x[name], values)
            _line(axes, i, known_x, known, name=name)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        if len(y) > 1:
            axes.legend()
    return figure


def interval_curves(
    panels: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]],
    x: Sequence[float],
    *,
    labels: tuple[str, str],
    limits: tuple[float, float],
    title: str,
) -> Figure:
    """Figures with their intervals along an axis, beside the line where both axes are equal.

    Args:
        panels: By panel and line the figures at ``x``, each as in ``bars``; the same lines in all.
        x: Where the figures stand; lines are moved a little, to tell their intervals apart.
        labels: Names of the two axes.
        limits: Ends of both axes.
        title: Stands above.

    Raises:
        ValueError: If there is no panel, or a line has not a figure for each x.
    """
    with style():
        figure, found = _panels(len(panels), title)
        for axes, (panel, lines) in zip(found, panels.items(), strict=True):
            for i, (name, intervals) in enumerate(lines.items()):
                if len(intervals) != len(x):
                    raise ValueError(f"{name}: {len(intervals)} figures for {len(x)} places")
                shifted = np.asarray(x) + 0.04 * (i - (len(lines) - 1) / 2)
                _line(axes, i, shifted, *_with_ends(intervals), name=name)
            axes.set(xlabel=labels[0], ylabel=labels[1], xlim=limits, ylim=limits, title=panel)
            _identity(axes)
        if len(lines) > 1:  # the same in all panels
            figure.legend(*axes.get_legend_handles_labels(), ncols=3, loc="outside lower center")
    return figure


def _panels(
    count: int, title: str, width: float = 3.2, height: float = 2.8
) -> tuple[Figure, list[Axes]]:
    """A figure with a title and panels in rows of three."""
    # Not through pyplot, which would keep every figure alive and choose a display.
    from matplotlib.figure import Figure

    if count < 1:
        raise ValueError("nothing to draw: there is no column")
    columns = min(count, COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, 0.5 + height * rows), layout="constrained")
    figure.suptitle(title)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def _with_ends(intervals: Sequence[Mapping[str, float]]) -> tuple[FloatArray, FloatArray]:
    """Values ``(N,)``, and how far below and above them their intervals end ``(2, N)``."""
    value, low, high = (
        np.array([interval[end] for interval in intervals], dtype=np.float64)
        for end in ("value", "low", "high")
    )
    # Rounding may put a value a hair beside its own interval.
    return value, np.nan_to_num(np.maximum([value - low, high - value], 0.0))


def _line(axes: Axes, number: int, x: Any, y: Any, ends: Any = None, *, name: str) -> None:
    """A line with a mark at each point, and bars to ``ends``; further lines are dashed."""
    dashes = ("-", "--", ":")[number // COLOURS % 3]
    axes.errorbar(x, y, ends, fmt="o", linestyle=dashes, markersize=3, label=name, clip_on=False)


def _finite(values: npt.ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)  # None becomes NaN
    return array[np.isfinite(array)]


def _both_finite(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"{first.shape} predictions for {second.shape} ratings")
    known = np.isfinite(first) & np.isfinite(second)
    return first[known], second[known]


def _bars(known: FloatArray) -> tuple[FloatArray, float]:
    """Edges of a histogram's bins, and the share of a bin that its bar fills."""
    low, high = float(known.min()), float(known.max())
    if high - low < MOST_BARS and not np.any(known % 1.0):
        return np.arange(low - 0.5, high + 1.0), 0.85
    return np.histogram_bin_edges(known, MOST_BARS), 1.0


def _identity(axes: Axes) -> None:
    """A square panel with a dashed line where prediction and rating are equal."""
    ends = (*axes.get_xlim(), *axes.get_ylim())
    limits = (min(ends), max(ends))
    axes.set(xlim=limits, ylim=limits, box_aspect=1)
    axes.axline((0.0, 0.0), slope=1.0, color=GREY, linestyle="--", linewidth=1.0, zorder=0)


def _say_nothing_is_known(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no value", ha="center", va="center", transform=axes.transAxes)
