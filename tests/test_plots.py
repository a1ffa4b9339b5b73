"""Figures show the numbers they are given, look the same everywhere, and are written whole."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpsteer2 import plots
from helpsteer2.errors import UserError
from helpsteer2.functional import statistics

pytest.importorskip("matplotlib")

RANDOM = np.random.default_rng(0)
RATED = RANDOM.integers(0, 5, 300).astype(float)
PREDICTED = RATED * 0.5 + 1.0 + RANDOM.normal(0.0, 0.3, 300)
MATRIX = np.array([[1.0, -0.3, math.nan], [-0.3, 1.0, 0.9], [math.nan, 0.9, 1.0]])


def every_figure():
    pair = {"helpfulness": (PREDICTED, RATED)}
    bins = {"helpfulness": statistics.calibration(PREDICTED, RATED)}
    series = {"policy": [{"value": 2.0, "low": 1.5, "high": 2.25}]}
    return {
        "bars": plots.bars(series, ["helpfulness"], title="t", limits=(0, 4)),
        "histograms": plots.histograms({"rated": RATED, "length": PREDICTED}, title="t"),
        "heat_map": plots.heat_map(MATRIX, ["a", "b", "c"], title="t"),
        "heat_maps": plots.heat_maps({"p": MATRIX[:2]}, "ab", "abc", unit="u", title="t"),
        "interval_curves": plots.interval_curves(
            {"a": series}, [0.0], labels=("x", "y"), limits=(0, 4), title="t"
        ),
        "scatter": plots.scatter(pair, title="t"),
        "calibration": plots.calibration(bins, title="t"),
    }


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        for name, figure in every_figure().items():
            plots.save(figure, tmp_path / folder / f"{name}.png")
    for path in (tmp_path / "one").iterdir():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert content == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_settings_of_the_user_change_nothing_and_are_left_alone(tmp_path: Path) -> None:
    import matplotlib

    plots.save(every_figure()["scatter"], tmp_path / "plain.png")
    with matplotlib.rc_context({"font.size": 30, "figure.facecolor": "black", "savefig.dpi": 10}):
        plots.save(every_figure()["scatter"], tmp_path / "set.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "set.png").read_bytes()


def test_no_display_is_asked_for() -> None:
    code = (
        "import sys; from helpsteer2 import plots; assert 'matplotlib' not in sys.modules; "
        "plots.histograms({'a': [1, 2]}, title='t'); print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    figure = every_figure()["heat_map"]
    path = tmp_path / "plot.png"
    path.write_bytes(b"old")

    def broken(file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    figure.savefig = broken
    with pytest.raises(UserError, match="No space left"):
        plots.save(figure, path)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["plot.png"]


def test_histogram_counts_every_known_value() -> None:
    values = [0, 0, 1, 3, 3, 3, None, math.nan]
    figure = plots.histograms({"rating (0–4)": values, "length": np.linspace(0, 9, 50)}, title="t")
    whole, continuous = figure.axes
    bars = {round(bar.get_center()[0], 6): bar.get_height() for bar in whole.patches}
    assert bars == {0.0: 2, 1.0: 1, 2.0: 0, 3.0: 3}
    assert sum(bar.get_height() for bar in continuous.patches) == 50
    assert len(continuous.patches) == plots.MOST_BARS
    assert whole.get_xlabel() == "rating (0–4)"
    assert whole.get_ylabel() == "count"
    assert "n 6" in whole.get_title()


def test_heat_map_says_every_number() -> None:
    axes = plots.heat_map(MATRIX, ["a", "b", "c"], title="t").axes[0]
    texts = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert texts[0, 0] == "1.00"
    assert texts[1, 0] == texts[0, 1] == "-0.30"
    assert texts[2, 0] == "–"
    assert len(texts) == 9
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"2 by 2 labels for shape \(3, 3\)"):
        plots.heat_map(MATRIX, ["a", "b"], title="t")


def test_heat_maps_of_several_models_share_their_colours() -> None:
    matrices = {"one": [[0.5, None]], "other": [[2.0, -0.5]]}
    figure = plots.heat_maps(
        matrices, ["asked"], ["a", "b"], labels=("moved", "asked"), unit="points", title="t"
    )
    *panels, colours = figure.axes
    assert [axes.get_title() for axes in panels] == ["one", "other"]
    assert [[text.get_text() for text in axes.texts] for axes in panels] == [
        ["0.50", "–"],
        ["2.00", "-0.50"],
    ]
    for axes in panels:
        assert [label.get_text() for label in axes.get_yticklabels()] == ["asked"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
        # White is 0, in every panel.
        assert axes.images[0].get_clim() == (-1.0, 1.0)
    assert colours.get_ylabel() == "points"
    with pytest.raises(ValueError, match=r"1 by 2 labels for shape \(1, 1\)"):
        plots.heat_maps({"x": [[0.0]]}, ["asked"], ["a", "b"], unit="points", title="t")


def test_scatter_moves_dots_sideways_only_and_marks_the_means() -> None:
    rated = np.array([0.0, 0.0, 2.0, 2.0, math.nan])
    predicted = np.array([0.5, 1.5, 2.0, 3.0, 9.0])
    [axes] = plots.scatter({"x": (predicted, rated)}, title="t").axes
    dots = np.asarray(axes.collections[0].get_offsets())
    assert np.array_equal(dots[:, 1], predicted[:4])
    # Less than half the way to the next rating, so that none is taken for another.
    assert np.all(np.abs(dots[:, 0] - rated[:4]) < 0.5 * 2.0)
    means = next(line for line in axes.lines if line.get_label() == "mean")
    assert means.get_xydata().tolist() == [[0.0, 1.0], [2.0, 2.5]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rated x", "predicted x")
    with pytest.raises(ValueError, match="predictions for"):
        plots.scatter({"x": (predicted[:2], rated)}, title="t")


def test_bars_have_the_heights_and_the_ends_that_are_known() -> None:
    series = {
        "before": [
            {"value": 1.0, "low": 0.5, "high": 2.0},
            {"value": 3.0, "low": None, "high": None},
        ],
        "after": [
            {"value": 2.0, "low": 2.0, "high": 2.5},
            {"value": None, "low": None, "high": None},
        ],
    }
    [axes] = plots.bars(series, ["a", "b"], title="t", limits=(0, 4)).axes
    assert axes.get_ylim() == (0, 4)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["before", "after"]
    before, after = (list(container) for container in axes.containers[1::2])
    assert [bar.get_height() for bar in before] == [1.0, 3.0]
    assert after[0].get_height() == 2.0
    assert math.isnan(after[1].get_height())
    # Side by side, around the place of their label.
    assert before[0].get_x() + before[0].get_width() <= after[0].get_x()
    assert before[0].get_center()[0] == pytest.approx(-after[0].get_center()[0])
    lines = axes.collections[0].get_segments()
    assert [line[:, 1].tolist() for line in lines] == [[0.5, 2.0], [3.0, 3.0]]
    with pytest.raises(ValueError, match="2 figures for 1 labels"):
        plots.bars(series, ["a"], title="t", limits=(0, 4))


def test_calibration_shows_the_bins() -> None:
    bins = statistics.calibration(PREDICTED, RATED, bins=5)
    [axes] = plots.calibration({"x": bins}, title="t").axes
    dots = axes.collections[0]
    assert np.allclose(dots.get_offsets(), np.stack([bins.mean_predicted, bins.mean_rating], 1))
    assert np.allclose(dots.get_sizes() / dots.get_sizes()[0], bins.counts / bins.counts[0])
    assert f"{bins.error:.2f}" in axes.get_title()


def test_curves_go_from_point_to_point_and_leave_out_what_is_not_known() -> None:
    x, y = {"a": [0.0, 2.0, 1.0], "b": [0.0]}, {"a": [1.0, math.nan, 3.0], "b": [5.0]}
    [axes] = plots.curves(x, y, labels=("KL", "score"), title="t").axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 1], [1, 3]], [[0, 5]]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("KL", "score")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_interval_curves_hold_the_figures_beside_the_identity() -> None:
    one = [{"value": 1.0, "low": 0.5, "high": 2.0}, {"value": None, "low": None, "high": None}]
    other = [{"value": 3.0, "low": 3.0, "high": 3.0}, {"value": 4.0, "low": None, "high": None}]
    figure = plots.interval_curves(
        {"a": {"one": one, "other": other}, "b": {"one": other, "other": one}},
        [0.0, 4.0],
        labels=("asked", "got"),
        limits=(0, 4),
        title="t",
    )
    first, second = figure.axes
    for axes in (first, second):
        assert axes.get_xlim() == axes.get_ylim() == (0, 4)
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("asked", "got")
        identity = axes.lines[-1]
        assert (identity.get_xy1(), identity.get_slope()) == ((0.0, 0.0), 1.0)
    lines, others = ([container[0] for container in axes.containers] for axes in (first, second))
    np.testing.assert_equal(lines[0].get_ydata(), [1.0, math.nan])
    np.testing.assert_equal(lines[1].get_ydata(), others[0].get_ydata())
    # Moved aside by less than could be taken for another x.
    assert np.abs(lines[0].get_xdata() - [0.0, 4.0]).max() < 0.1
    assert np.all(lines[0].get_xdata() < lines[1].get_xdata())
    bar = first.containers[0][2][0].get_segments()[0]
    assert bar[:, 1].tolist() == [0.5, 2.0]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "other"]
    with pytest.raises(ValueError, match="2 figures for 1 places"):
        plots.interval_curves({"a": {"one": one}}, [0.0], labels=("", ""), limits=(0, 4), title="t")


def test_names_are_no_formulas_and_nothing_known_is_said(tmp_path: Path) -> None:
    unknown = np.full(3, math.nan)
    empty = statistics.calibration(unknown, unknown)
    for figure in (
        plots.histograms({"$5 and $\\frac": unknown}, title="costs $5 or $_{"),
        plots.scatter({"$x": (unknown, unknown)}, title="t"),
        plots.calibration({"$x": empty}, title="t"),
    ):
        assert [text.get_text() for text in figure.axes[0].texts] == ["no value"]
        plots.save(figure, tmp_path / "plot.png")
    with pytest.raises(ValueError, match="no column"):
        plots.histograms({}, title="t")


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_every_column_has_a_panel(count: int) -> None:
    figure = plots.histograms({f"column {i}": [1.0] for i in range(count)}, title="all")
    assert [axes.get_xlabel() for axes in figure.axes] == [f"column {i}" for i in range(count)]
    assert figure.get_suptitle() == "all"
