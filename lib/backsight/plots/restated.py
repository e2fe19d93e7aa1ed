"""Figures of the study's questions restated, from the table and pictures of `restated.measure_restated`.

Inverse families keep the colours that they have everywhere, the most probable picture (MAP) is black, nulls are grey
and dashed, as in the figures of the stability study.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from backsight.errors import BacksightError
from backsight.plots.cross_layer import _draw_matrix, sample_size, short_tap, tap_matrix
from backsight.plots.quality import measure_name
from backsight.plots.style import (
    COLUMN_WIDTH,
    FAMILY_COLOURS,
    NORMAL,
    SMALL,
    ShownFigure,
    _merged_order,
    _picture_grid,
    _pixels,
    _psnr,
    _Row,
    family_colour,
    styled_figure,
    taps_in_order,
)
from backsight.tables.names import LOWER_IS_BETTER, MAP

NULL_COLOUR = "#5f5f5f"
MAP_COLOUR = "#000000"
NAMES: Mapping[str, str] = {
    "linear": "linear",
    "direct": "direct",
    "modular": "modular",
    "modular_polished": "modular, polished",
    "map": "most probable (MAP)",
    "null_mean": "null: mean image",
    "null_shuffled": "null: MAP of another image",
    "null_guess": "null: a guess",
}
_MARKERS: Mapping[str, str] = {"linear": "o", "direct": "s", "modular": "^", "modular_polished": "D", "map": "o"}
_DASHES: Mapping[str, Any] = {
    "null_mean": (0, (6, 2)),
    "null_shuffled": (0, (3, 1.5)),
    "null_guess": (0, (1, 1.5)),
}
LARGEST_PICTURE = 1.15  # inches; of few taps more would only be larger
DETAIL = ("psnr", "psnr_background", "psnr_objects", "edge_f1", "ssim", "texture_accuracy")
COLOUR: Mapping[str, str] = {
    "hue_shift_kept": "share of a hue shift that is followed",
    "colour_follow": "slope of colour made over shown",
    "hue_error": "hue error of the object (degrees)",
}
WHOLE: Mapping[str, float] = {"hue_shift_kept": 1.0, "colour_follow": 1.0, "hue_error": 0.0}


def _colour(name: str) -> str:
    return MAP_COLOUR if name == MAP else family_colour(name)


def _order(names: Sequence[str]) -> list[str]:
    known = [*FAMILY_COLOURS, MAP, *_DASHES]
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(FAMILY_COLOURS), name))


def _rows(metrics: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Rows of a measure at every tap; of hue shifts the mean over them; of no noise and no pair of taps."""
    needed = ("target", "tap", "depth", "inverse", "measure", "value", "low", "high", "n", "seeds")
    if missing := [column for column in needed if column not in metrics.columns]:
        raise BacksightError(f"the table lacks the columns {', '.join(missing)}: give metrics of measure_restated.")
    rows = metrics[(metrics["measure"] == measure) & metrics["tap"].notna() & metrics["value"].notna()]
    for column in ("hue_shift", "noise", "source_tap"):
        if column in rows:
            rows = rows[rows[column].isna()]
    if rows["target"].nunique() > 1:
        raise BacksightError(f"the table holds {', '.join(rows['target'].unique())}: select one target's rows first.")
    return rows.sort_values("depth", kind="stable")


def _line(axes: Axes, rows: pd.DataFrame, name: str, taps: Sequence[str], shift: float) -> Line2D:
    """A line with its band; nulls dashed, without."""
    line = rows[rows["inverse"] == name]
    x = np.array([taps.index(tap) for tap in line["tap"]]) + shift
    null = name.startswith("null_")
    style: dict[str, Any] = {"color": _colour(name), "linestyle": _DASHES.get(name, "-"), "linewidth": 1.4 - 0.4 * null}
    style["marker"] = "" if null else _MARKERS.get(name, "v")
    axes.plot(x, line["value"], **style)
    if not null:
        low, high = (line[end].to_numpy(float) for end in ("low", "high"))
        axes.fill_between(x, low, high, color=_colour(name), alpha=0.13, linewidth=0)
        axes.vlines(x, low, high, color=_colour(name), linewidth=0.8)
    return Line2D([], [], label=NAMES.get(name, name.replace("_", " ")), **style)


def _curves(
    metrics: pd.DataFrame, measures: Sequence[str], names: Mapping[str, str], width: float, panel: float
) -> tuple[ShownFigure, dict[str, pd.DataFrame]]:
    """Panels of measures by depth, one line an inverse; (figure, {measure: its rows})."""
    found = {measure: _rows(metrics, measure) for measure in measures}
    found = {measure: rows for measure, rows in found.items() if len(rows)}
    if not found:
        raise BacksightError(f"the table has none of {', '.join(measures)}: give metrics of measure_restated.")
    taps = taps_in_order(pd.concat(found.values()))
    inverses = _order([name for rows in found.values() for name in rows["inverse"]])
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    with styled_figure(width, panel * lines + 0.75) as figure:
        grid = figure.subplots(lines, columns, squeeze=False)
        handles: dict[str, Line2D] = {}
        for axes, (measure, rows) in zip(grid.flat, found.items(), strict=False):
            there = [name for name in inverses if (rows["inverse"] == name).any()]
            lit = [name for name in there if not name.startswith("null_")]
            for name in there:
                # Side by side, so that intervals can be told apart.
                shift = 0.05 * (lit.index(name) - (len(lit) - 1) / 2) if name in lit else 0.0
                handles[name] = _line(axes, rows, name, taps, shift)
            _without_far_nulls(axes, rows)
            if measure in WHOLE:
                axes.axhline(WHOLE[measure], color="#000000", linewidth=0.7)
            axes.set_title(_in_two_lines(names.get(measure, measure)), fontsize=NORMAL)
            axes.set_xticks(range(len(taps)), taps, rotation=40, ha="right", rotation_mode="anchor")
            axes.set_xlim(-0.25, len(taps) - 0.75)
        for axes in grid.flat[len(found) :]:
            axes.set_axis_off()
        figure.supxlabel("tap, shallow → deep", fontsize=NORMAL)
        shown = [handles[name] for name in inverses]
        figure.legend(handles=shown, loc="outside upper center", ncols=min(4, len(shown)), handlelength=2.8)
    return figure, found


def _without_far_nulls(axes: Axes, rows: pd.DataFrame) -> None:
    """Where every null of an error lies far above, the inverses get the panel and the nulls a word at its top."""
    null = rows["inverse"].str.startswith("null_")
    if rows["measure"].iloc[0] not in LOWER_IS_BETTER or not null.any() or null.all():
        return
    most, least = rows.loc[~null, "high"].max(), rows.loc[null, "value"].min()
    if least > 2 * most:
        axes.set_ylim(-0.06 * most, 1.3 * most)
        text = f"↑ nulls: {least:.0f} to {rows.loc[null, 'value'].max():.0f}"
        axes.text(0.5, 0.97, text, transform=axes.transAxes, ha="center", va="top", fontsize=SMALL, color=NULL_COLOUR)


def _in_two_lines(title: str) -> str:
    """Broken before a bracket or in the middle, where it would run into the next panel's."""
    if len(title) <= 24:
        return title
    if "(" in title:
        return title.replace(" (", "\n(", 1)
    spaces = [found.start() for found in re.finditer(" ", title)]
    middle = min(spaces, key=lambda place: abs(place - len(title) / 2)) if spaces else 0
    return f"{title[:middle]}\n{title[middle + 1 :]}" if spaces else title


def _ends(rows: pd.DataFrame) -> str:
    told = []
    for name in _order(list(rows["inverse"])):
        line = rows[rows["inverse"] == name]
        first, last = line.iloc[0], line.iloc[-1]
        told.append(f"{name} {first.value:.3g} at {first.tap}, {last.value:.3g} at {last.tap}")
    return "; ".join(told)


def _own(found: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    rows = pd.concat(found.values())
    return rows[~rows["inverse"].str.startswith("null_")]


def detail_by_depth(
    metrics: pd.DataFrame,
    measures: Sequence[str] = DETAIL,
    width: float = COLUMN_WIDTH,
    panel_height: float = 2.0,
) -> ShownFigure:
    """Shape and detail by depth, a panel a measure: what trained decoders read, and what MAP gets back; nulls dashed.

    metrics: of `measure_restated`, one target's; measures that the table lacks are left out. Raises BacksightError
    where none is there.
    """
    names = {measure: measure_name(measure) for measure in measures}
    figure, found = _curves(metrics, measures, names, width, panel_height)
    recovered = metrics[(metrics["measure"] == "depth_cost_recovered") & (metrics["against"] == "modular")]
    recovered = recovered[recovered["value"].notna() & recovered["of"].isin(list(found))]
    said = ""
    if len(recovered):
        deepest = recovered[recovered["depth"] == recovered["depth"].max()]
        shares = "; ".join(
            f"{r.of} {100 * r.value:.0f} % [{100 * r.low:.0f}, {100 * r.high:.0f}]" for r in deepest.itertuples()
        )
        said = f" Share of the modular inverse's loss down to {deepest['tap'].iloc[0]} that is gone with MAP: {shares}."
    figure.caption = (
        "All inverses read the same float32 states; bars and bands: 95 % intervals; dashed: nulls. "
        + sample_size(_own(found))
    )
    figure.description = " ".join(f"{names[m]}: {_ends(rows)}." for m, rows in found.items()) + said
    return figure


def hue_kept_by_depth(metrics: pd.DataFrame, width: float = COLUMN_WIDTH, panel_height: float = 2.3) -> ShownFigure:
    """What comes back of an object's hue, and of a shift of it in the same scene, by depth; thin: a perfect inverse.

    metrics: of `measure_restated`, one target's; several shifts count as their mean.
    """
    figure, found = _curves(metrics, list(COLOUR), COLOUR, width, panel_height)
    shifts: list[float] = sorted(metrics["hue_shift"].dropna().unique()) if "hue_shift" in metrics else []
    turned = ", ".join(f"{shift:g}°" for shift in shifts)
    counts = "; ".join(
        f"{COLOUR[measure]}: {sample_size(_own({measure: rows})).removesuffix('.')}" for measure, rows in found.items()
    )
    figure.caption = (
        f"The same scenes, their main object turned by {turned or 'no'} of hue and nothing else changed; thin black: a "
        f"perfect inverse; dashed: nulls; 95 % intervals. {counts}."
    )
    figure.description = " ".join(f"{COLOUR[measure]}: {_ends(rows)}." for measure, rows in found.items())
    return figure


def cross_figure(
    metrics: pd.DataFrame, inverses: Sequence[str] = ("modular", MAP), width: float = COLUMN_WIDTH
) -> ShownFigure:
    """PSNR of tap i's state (down) through the inverse made for tap j (across), a matrix an inverse, on one scale.

    metrics: of `measure_restated`, one target's. Outlined: each tap's own inverse; empty: too far apart, or not of one
    form. Raises BacksightError where none of the inverses has a matrix.
    """
    rows = metrics[(metrics["measure"] == "cross_psnr") & metrics["source_tap"].notna()]
    panels = {name: rows[rows["inverse"] == name] for name in inverses}
    panels = {name: found for name, found in panels.items() if len(found)}
    if not panels or rows["target"].nunique() > 1:
        held = ", ".join(dict.fromkeys(rows["target"])) or "no cross_psnr"
        raise BacksightError(f"the table holds {held} of {', '.join(inverses)}: give one target's metrics.")
    levels = {null: rows.loc[rows["inverse"] == null, "value"].mean() for null in ("null_mean", "null_shuffled")}
    levels = {null: level for null, level in levels.items() if not np.isnan(level)}
    values = np.concatenate([found["value"].to_numpy(float) for found in panels.values()])
    limits = min([*values, *levels.values()]), max(values)
    with styled_figure(width, width / max(2, len(panels)) + 0.25) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (name, found) in zip(grid, panels.items(), strict=True):
            reach = found.assign(value=(found["high"] - found["low"]) / 2)
            inches = width / max(2, len(panels))
            image = _draw_matrix(axes, tap_matrix(found), limits, "viridis", tap_matrix(reach), inches)
            axes.set_title(NAMES.get(name, name))
            axes.set_xlabel("inverse made for tap")
            axes.set_ylabel("state of tap")
        bar = figure.colorbar(image, ax=list(grid), label="PSNR (dB)", shrink=0.8, aspect=22)
        for level in levels.values():
            bar.ax.axhline(level, color="white", linewidth=1.8)
        nulls = ", ".join(f"{NAMES[null].removeprefix('null: ')} {level:.1f} dB" for null, level in levels.items())
        figure.caption = (
            "PSNR of the state of one tap through the inverse made for another, ± half the 95 % interval; outlined: "
            f"its own. Nulls, white on the scale: {nulls}. " + sample_size(pd.concat(panels.values()))
        )
        told = []
        for name, found in panels.items():
            apart = found[found["source_tap"] != found["target_tap"]]
            own = found[found["source_tap"] == found["target_tap"]]
            cells = "; ".join(
                f"{short_tap(str(r.source_tap))} through {short_tap(str(r.target_tap))} {r.value:.1f}"
                for r in apart.itertuples()
            )
            told.append(f"{name}: own {own['value'].min():.1f} to {own['value'].max():.1f} dB; {cells}.")
        figure.description = " ".join(told)
    return figure


def restated_pictures(
    images: Any,
    pictures: Mapping[str, Mapping[str, Any]],
    inverses: Sequence[str] = ("modular", MAP),
    count: int = 3,
    width: float = COLUMN_WIDTH,
) -> ShownFigure:
    """Images down, taps across; of each image a row of each inverse, one below the other, with the PSNR.

    images: (k, 3, H, W); pictures: {inverse: {tap: (k, 3, H, W)}}, of `Restated`; count: images. Raises BacksightError
    where none of the inverses is there.
    """
    chosen = [name for name in inverses if pictures.get(name)]
    if not chosen:
        raise BacksightError(f"there are no pictures of {', '.join(inverses)}; there are {', '.join(pictures)}.")
    inputs = _pixels(images, "images")[:count]
    made = {
        name: {tap: _pixels(each, f"{name} at {tap}")[: len(inputs)] for tap, each in pictures[name].items()}
        for name in chosen
    }
    decibels = {name: {tap: _psnr(inputs, each) for tap, each in per.items()} for name, per in made.items()}
    rows = [
        _Row(
            "MAP" if name == MAP else name,
            _colour(name),
            inputs[number],
            {tap: each[number] for tap, each in made[name].items()},
            {tap: f"{each[number]:.1f} dB" for tap, each in decibels[name].items()},
        )
        for number in range(len(inputs))
        for name in chosen
    ]
    taps = _merged_order([list(per) for per in made.values()])
    figure = _picture_grid(rows, taps, min(width, (LARGEST_PICTURE + 0.05) * (len(taps) + 1) + 0.4))
    figure.caption = (
        f"The same float32 states, read by {' and by '.join(NAMES.get(name, name) for name in chosen)}: what is the "
        "picture's, and what is the reader's."
    )
    means = "; ".join(
        f"{name} {', '.join(f'{each.mean():.1f} dB at {tap}' for tap, each in per.items())}"
        for name, per in decibels.items()
    )
    figure.description = f"{figure.description} Means over {len(inputs)} images: {means}."
    return figure
