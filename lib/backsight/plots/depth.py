"""Curves: a measure along the depth of a target, or along anything else that a table has a column for."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.optimize import isotonic_regression

from backsight.errors import BacksightError
from backsight.plots.style import (
    COLUMN_WIDTH,
    NULL_COLOUR,
    SMALL,
    ShownFigure,
    captioned,
    depth_colours,
    drawn_panels,
    inverse_order,
    look_of,
    name_of,
    rows_of,
    short_tap,
    styled_figure,
    taps_in_order,
)

FORWARD = "tap, shallow → deep"
_MOST_LINES, _MOST_NAMES = 4, 8
_BY_DEPTH = ("tap", "step", "layer", "module")  # columns whose values are in the order of `depth`


def by_depth(
    metrics: pd.DataFrame, measures: str | Sequence[str], title: str = "", columns: int = 3, **options: Any
) -> ShownFigure:
    """Measures by depth, a panel each (of one measure: a panel for each target and data set), a line an inverse.

    metrics: tidy rows; measures that they lack are left out. Raises BacksightError where they have none of them.
    """
    measures = [measures] if isinstance(measures, str) else list(measures)
    rows = rows_of(metrics, measures)
    rows = rows[rows["tap"].notna()].sort_values("measure", key=lambda names: names.map(measures.index), kind="stable")
    several = rows[["target", "dataset", "split"]].astype(object).fillna("")
    if len(several.drop_duplicates()) > 1:
        rows = rows.assign(panel=several["target"] + " · " + several["dataset"] + ", " + several["split"])
        options = {"panel": "panel"} | options
    return curves(rows, title or f"{', '.join(map(name_of, measures))} by depth", columns=columns, **options)


def curves(
    rows: pd.DataFrame,
    title: str,
    x: str = "tap",
    line: str = "inverse",
    panel: str = "measure",
    *,
    columns: int = 3,
    levels: Mapping[str, Any] | None = None,
    looks: Mapping[Any, Mapping[str, Any]] | None = None,
    xlabel: str = FORWARD,
    ylabel: str = "",
    log: str = "",
    ylim: tuple[float, float] | None = None,
    band: bool = True,
    note: str = "",
) -> ShownFigure:
    """`value` against the column `x`: a panel for each value of `panel`, a named line for each value of `line`.

    rows: tidy, with low and high for intervals, one row a point. Along a numeric x, lines follow the order of the
    rows; names stand side by side, taps by depth. Of lines that are taps at most four are drawn, evenly by depth.
    levels: {name: a number, or the column that has it}, grey dashed lines; looks: {line: style of Axes.plot}; log:
    axes in "xy" with a logarithmic scale; band: intervals as bands, else as bars; note: what a reader has to know.
    Raises BacksightError where there is nothing to draw, or where two rows claim one point.
    """
    rows = rows[rows["value"].notna() & rows[x].notna()]
    if rows.empty:
        raise BacksightError(f"there is nothing to draw of {title!r}: the rows have no value.")
    if (twice := rows.duplicated([panel, line, x])).any():
        first = rows[twice].iloc[0]
        raise BacksightError(
            f"several values of {first[line]} at {first[x]} in one panel: select one run's rows first."
        )
    names = _ordered(rows, line)
    if line in _BY_DEPTH and len(names) > _MOST_LINES:
        names = [names[i] for i in np.linspace(0, len(names) - 1, _MOST_LINES).round().astype(int)]
        rows = rows[rows[line].isin(names)]
    styles = _styles(rows, line, names) | dict(looks or {})
    measures = set(rows["measure"]) if "measure" in rows else set()
    ylabel = ylabel or (name_of(*measures) if len(measures) == 1 else "")
    count = rows[panel].nunique()
    down, told = -(-count // columns), []
    with styled_figure(COLUMN_WIDTH, (2.6 if count == 1 else 1.75 * down + 0.4) + 0.7) as figure:
        ends: dict[Axes, dict[Any, tuple[float, str]]] = {}
        for axes, which, at in drawn_panels(figure, rows, panel, columns, [x], (xlabel, ylabel), len(measures) == 1):
            ends[axes] = {}
            _scale(axes, at, x, log, count > 1)
            if ylim:
                axes.set_ylim(*ylim)
            for number, name in enumerate(names):
                if len(drawn := at[at[line] == name]):
                    ends[axes][name] = _draw(axes, at, drawn, x, number - (len(names) - 1) / 2, band, styles[name])
                    first, last = drawn.iloc[0], drawn.iloc[-1]
                    told.append(f"{name_of(which)}, {name_of(name)}: {first.value:.3g} to {last.value:.3g}")
            for label, level in (levels or {}).items():
                known = at.get(level, pd.Series()).dropna().to_list() if isinstance(level, str) else [level]
                for height in known[:1]:
                    axes.axhline(height, color=NULL_COLOUR, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
                    ends[axes][label] = (height, NULL_COLOUR)
        _name_lines(list(ends), ends, columns, 1.2 * SMALL / (72 * 0.6 * figure.get_size_inches()[1] / down))
        return captioned(figure, title, rows, told, note)


def _ordered(rows: pd.DataFrame, column: str) -> list[Any]:
    if column in _BY_DEPTH:
        return taps_in_order(rows, column) if "depth" in rows else list(dict.fromkeys(rows[column]))
    if pd.api.types.is_numeric_dtype(rows[column]):
        return sorted(set(rows[column]))
    return inverse_order(list(rows[column]))


def _styles(rows: pd.DataFrame, column: str, names: Sequence[Any]) -> dict[Any, dict[str, Any]]:
    """{line: its style}; taps and numbers have the colour of their place."""
    if column in _BY_DEPTH or pd.api.types.is_numeric_dtype(rows[column]):
        colours = depth_colours(names)
        return {name: {"color": colours[name], "marker": "os^Dv<>"[place % 7]} for place, name in enumerate(names)}
    return {name: look_of(name).line for name in names}


def _names(rows: pd.DataFrame, x: str) -> list[str]:
    """What stands below the axis, by depth or as the rows have it; nothing below numbers."""
    if pd.api.types.is_numeric_dtype(rows[x]):
        return []
    return taps_in_order(rows, x) if x in _BY_DEPTH and rows["depth"].notna().all() else list(dict.fromkeys(rows[x]))


def _scale(axes: Axes, rows: pd.DataFrame, x: str, log: str, short: bool) -> None:
    if names := _names(rows, x):
        shown = range(0, len(names), -(-len(names) // _MOST_NAMES))
        texts = [short_tap(names[i]) if short else names[i] for i in shown]
        axes.set_xticks(shown, texts, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.3, len(names) - 0.7)
    elif "x" in log:  # no step at all has no logarithm, and still is a point
        axes.set_xscale("symlog", linthresh=rows.loc[rows[x] > 0, x].min())
    if not names:
        places = sorted(set(rows[x]))
        apart = np.diff(np.log(places) if "x" in log and places[0] > 0 else places)
        even = len(places) <= _MOST_NAMES and bool((apart > 0.08 * apart.sum()).all())
        if even or "x" in log:
            places = places if even else [places[0], places[-1]]
            axes.set_xticks(places, [f"{place:.3g}" for place in places])
            axes.minorticks_off()
    if "y" in log:
        axes.set_yscale("log")


def _draw(
    axes: Axes, rows: pd.DataFrame, line: pd.DataFrame, x: str, side: float, band: bool, style: dict[str, Any]
) -> tuple[float, str]:
    """A line with its interval, of nulls without; returns where it ends, and its colour."""
    places = line[x]
    if names := _names(rows, x):
        places = (line[x].map(names.index) + (0 if band else 0.08 * side)).sort_values()
        line = line.loc[places.index]
    null = "inverse" in line and str(line["inverse"].iloc[0]).startswith("null_")
    if len(line) == 1 and "marker" not in style:
        style = style | {"marker": "_", "markersize": 12}
    if band or null:
        axes.plot(places, line["value"], **style)
        if not null and "low" in line:
            axes.fill_between(places, line["low"], line["high"], color=style["color"], alpha=0.18, linewidth=0)
    else:
        reach = np.abs(line[["low", "high"]].to_numpy(float).T - line["value"].to_numpy(float))
        axes.errorbar(places, line["value"], yerr=reach, capsize=2, elinewidth=0.8, **style)
    return float(line["value"].iloc[-1]), style["color"]


def _name_lines(
    grid: Sequence[Axes], ends: Mapping[Axes, Mapping[Any, tuple[float, str]]], columns: int, gap: float
) -> None:
    """Every line is named once, at its right end: in the last panel of the first row, else where it is met.

    gap: between two names, as a share of a panel's height.
    """
    named: set[Any] = set()
    for axes in sorted(grid, key=lambda axes: grid.index(axes) != min(columns, len(grid)) - 1):
        new = {name: end for name, end in ends[axes].items() if name not in named}
        named |= set(new)
        axes.autoscale_view()
        to_axes = axes.transData + axes.transAxes.inverted()
        order = sorted(new, key=lambda name: new[name][0])
        ends_at = np.clip([to_axes.transform((1, new[name][0]))[1] for name in order], 0, 1)
        above = gap * np.arange(len(order))  # as near to the ends as names apart from one another can be
        heights = np.minimum(isotonic_regression(ends_at - above).x + above, 1.02 - above[::-1]) if new else ()
        outside = axes is grid[-1] or grid.index(axes) % columns == columns - 1
        x, across, down = (1.02, "left", "center") if outside else (0.99, "right", "bottom")
        for name, height in zip(order, heights, strict=True):
            style: dict[str, Any] = {"color": new[name][1], "fontsize": SMALL, "transform": axes.transAxes}
            axes.text(x, height, name_of(name), ha=across, va=down, **style)
