"""Figures of the factor table, drawn from metrics.csv alone: a heat map by depth, and curves with their nulls."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from backsight.errors import BacksightError
from backsight.plots.style import (
    COLUMN_WIDTH,
    NORMAL,
    SMALL,
    ShownFigure,
    draw_band,
    legend_above,
    legend_line,
    look_of,
    name_taps,
    rows_of,
    sample_size,
    styled_figure,
    taps_in_order,
    target_colour,
)

FACTORS = ("background", "shape", "texture", "hue", "position")
UNITS: Mapping[str, str] = MappingProxyType({"accuracy": "accuracy", "R2": "R²"})
NULL_COLUMNS: Mapping[str, str] = MappingProxyType(
    {"null_untrained": "untrained", "null_colour_position": "colours", "null_shuffled": "other image"}
)
_PALE = "#a8a8a8"
_MOST_TAPS = 13  # beside one another in a heat map: with four columns of nulls a number still fits its cell
_LOWEST = -0.25  # R² below it is not drawn: how wrong another image's features are is no news


def factor_heatmap(metrics: pd.DataFrame) -> ShownFigure:
    """Score of every factor (rows) at every tap (columns), printed in its cell, and the nulls to the right.

    metrics: tidy rows with measure "factor_score" (factors.factor_table); other measures are left out. One block for
    each target, wide ones continue below. Colour: from chance (or R² = 0) to 1. Bold: the interval lies above the
    intervals of all nulls at this tap. Null columns show the highest value over the taps, and chance.
    Raises BacksightError where columns or scores are missing, or two rows claim one cell.
    """
    rows = _factor_rows(metrics)
    blocks = [
        (target, group, taps[start : start + _MOST_TAPS])
        for target, group in rows.groupby("target", sort=False)
        for taps in [taps_in_order(group)]
        for start in range(0, len(taps), _MOST_TAPS)
    ]
    factors = _factors(rows)
    with styled_figure(COLUMN_WIDTH, len(blocks) * (len(factors) * 0.23 + 0.95) + 0.35) as figure:
        grid = figure.subplots(len(blocks), 1, squeeze=False)[:, 0]
        for axes, (target, group, taps) in zip(grid, blocks, strict=True):
            _draw_cells(axes, group, factors, taps)
            axes.set_title(f"{target}: {_counts(group)}", loc="left")
        figure.supxlabel(
            "tap, shallow → deep (bold: above the intervals of all nulls at this tap); "
            "right: the highest of each null over the taps",
            fontsize=SMALL,
        )
        figure.caption = (
            "What a linear probe reads of each factor at each tap; bold: above the 95 % intervals of all nulls. "
            "Shape, texture, hue and position of the dominant object; background: which training photograph."
        )
        figure.description = f"Heat map of factor scores. {_in_words(rows)}"
    return figure


def factor_curves(metrics: pd.DataFrame) -> ShownFigure:
    """Score of each factor by depth with its 95 % band, its nulls dashed, chance a pale line; two rows a target.

    metrics: as of `factor_heatmap`. R² below -0.25 is not drawn.
    Raises BacksightError where columns or scores are missing, or two rows claim one point.
    """
    rows = _factor_rows(metrics)
    factors, targets = _factors(rows), list(dict.fromkeys(rows["target"]))
    across = min(3, len(factors))
    lines = math.ceil(len(factors) / across)
    with styled_figure(COLUMN_WIDTH, 1.75 * lines * len(targets) + 0.75) as figure:
        grid = figure.subplots(lines * len(targets), across, squeeze=False)
        for number, target in enumerate(targets):
            group = rows[rows["target"] == target]
            panels = grid[number * lines : (number + 1) * lines]
            spare = lines * across - len(factors)  # free places end the first row: all columns have taps below
            free = list(panels[0, across - spare :]) if spare else []
            for axes, factor in zip([axes for axes in panels.flat if axes not in free], factors, strict=True):
                _draw_factor(axes, group[group["factor"] == factor], taps_in_order(group), target_colour(target))
            for axes in panels[:-1].flat:
                axes.tick_params(labelbottom=False)
            for axes in free:
                axes.set_axis_off()
            if free:
                said = "\n".join([target, *_counts(group).split(", ")])
                free[0].text(0.05, 0.85, said, transform=free[0].transAxes, va="top", fontsize=SMALL)
        names = targets if len(targets) > 1 else [f"probe, {targets[0]}"]
        handles = [
            legend_line(name, color=target_colour(target), marker="o", markersize=3)
            for name, target in zip(names, targets, strict=True)
        ]
        handles += [legend_line(look_of(n).label, **look_of(n).line) for n in NULL_COLUMNS if n in set(rows["inverse"])]
        handles.append(legend_line("chance", color=_PALE, linewidth=0.8))
        legend_above(figure, handles, 3, handlelength=2.8)
        figure.supxlabel("tap, shallow → deep", fontsize=NORMAL)
        figure.caption = (
            "What a linear probe reads of each factor at each tap, with 95 % bands; dashed: nulls; pale: chance. "
            f"R² below {_LOWEST} is not drawn."
        )
        figure.description = f"Curves of factor scores by depth. {_in_words(rows)}"
    return figure


def _factor_rows(metrics: pd.DataFrame) -> pd.DataFrame:
    needed = ("target", "tap", "depth", "inverse", "value", "low", "high", "n", "factor", "unit", "chance")
    if missing := [column for column in needed if column not in metrics.columns]:
        raise BacksightError(f"the table lacks the columns {', '.join(missing)}: give rows of factors.factor_table.")
    rows = rows_of(metrics, "factor_score")
    rows = rows[rows["value"].notna()]
    if not (rows["inverse"] == "probe").any():
        raise BacksightError("the table has no factor_score of a probe: run factors.factor_table on scenes.")
    if (twice := rows.duplicated(["target", "tap", "inverse", "factor"])).any():
        first = rows[twice].iloc[0]
        raise BacksightError(
            f"the table holds several scores of {first.factor} for {first.inverse} at {first.tap} of {first.target}: "
            "select the rows of one run first."
        )
    return rows


def _factors(rows: pd.DataFrame) -> list[str]:
    present = list(dict.fromkeys(rows["factor"]))
    return [name for name in FACTORS if name in present] + [name for name in present if name not in FACTORS]


def _label(rows: pd.DataFrame, factor: str) -> str:
    unit = str(rows.loc[rows["factor"] == factor, "unit"].iloc[0])
    return f"{factor} ({UNITS.get(unit, unit)})"


def _counts(rows: pd.DataFrame) -> str:
    return f"{sample_size(rows).replace('images;', 'scenes,')}, 95 % intervals"


def _draw_cells(axes: Axes, rows: pd.DataFrame, factors: Sequence[str], taps: Sequence[str]) -> None:
    nulls = [null for null in NULL_COLUMNS if null in set(rows["inverse"])]
    gap = 0.35  # of a cell, between the taps and the nulls
    places = [*range(len(taps)), *(len(taps) + gap + i for i in range(len(nulls) + 1))]
    colours = colormaps["cividis"]
    for line, factor in enumerate(factors):
        of_factor = rows[rows["factor"] == factor]
        probe = of_factor[of_factor["inverse"] == "probe"].set_index("tap")
        of_nulls = of_factor[of_factor["inverse"] != "probe"]
        bar = of_nulls.groupby("tap")["high"].max()
        chance = float(of_factor["chance"].iloc[0])
        highest = of_nulls.groupby("inverse")["value"].max()
        numbers = [float(probe["value"].get(tap, np.nan)) for tap in taps]
        numbers += [float(highest.get(null, np.nan)) for null in nulls] + [chance]
        strong = [bool(probe["low"].get(tap, np.nan) > bar.get(tap, chance)) for tap in taps]
        strong += [False] * (len(nulls) + 1)
        for x, value, bold in zip(places, numbers, strong, strict=True):
            if np.isnan(value):
                continue
            share = min(max((value - chance) / (1 - chance), 0.0), 1.0)
            cell: dict[str, Any] = {"facecolor": colours(share), "edgecolor": "white", "linewidth": 0.6}
            axes.add_patch(Rectangle((x - 0.5, line - 0.5), 1, 1, **cell))
            text = f"{value:.2f}".replace("-", "−") if abs(value) >= 0.005 else "0.00"
            weight, color = "bold" if bold else "normal", "white" if share < 0.5 else "black"
            axes.text(x, line, text, ha="center", va="center", fontsize=SMALL, weight=weight, color=color)
    axes.set(xlim=(-0.5, places[-1] + 0.5), ylim=(len(factors) - 0.5, -0.5))
    names = [*taps, *(NULL_COLUMNS[null] for null in nulls), "chance"]
    axes.set_xticks(places, names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(factors)), [_label(rows, factor) for factor in factors])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _draw_factor(axes: Axes, rows: pd.DataFrame, taps: Sequence[str], colour: str) -> None:
    for inverse in ("probe", *NULL_COLUMNS):
        line = rows[rows["inverse"] == inverse].sort_values("depth")
        x = line["tap"].map({tap: x for x, tap in enumerate(taps)})
        if inverse == "probe":
            draw_band(axes, x, line, 0.2, color=colour, marker="o", markersize=3)
        elif not line.empty:
            axes.plot(x, line["value"], **look_of(inverse).line)
    axes.axhline(float(rows["chance"].iloc[0]), color=_PALE, linewidth=0.8, zorder=0.5)
    axes.set_title(_label(rows, str(rows["factor"].iloc[0])))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    axes.set_ylim(0 if str(rows["unit"].iloc[0]) == "accuracy" else _LOWEST, 1.03)
    name_taps(axes, taps)
    axes.margins(x=0.04)


def _in_words(rows: pd.DataFrame) -> str:
    told = []
    for target, group in rows[rows["inverse"] == "probe"].groupby("target", sort=False):
        parts = []
        for factor in _factors(group):
            of = group[group["factor"] == factor].sort_values("depth", kind="stable")
            first, last = of.iloc[0], of.iloc[-1]
            parts.append(f"{factor} {first.value:.2f} at {first.tap}, {last.value:.2f} at {last.tap}")
        told.append(f"{target}: {'; '.join(parts)}.")
    return " ".join(told)
