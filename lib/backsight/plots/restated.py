"""Figures of the study's questions restated, from the table and pictures of `restated.measure_restated`."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from types import MappingProxyType

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor

from backsight.errors import BacksightError
from backsight.plots.cross_layer import draw_matrix, short_tap
from backsight.plots.grids import GridRow, as_pictures, decibels, merged_order, picture_grid
from backsight.plots.style import (
    COLUMN_WIDTH,
    INVERSE_NAMES,
    NORMAL,
    NULL_COLOUR,
    SMALL,
    ShownFigure,
    draw_band,
    ends,
    inverse_order,
    is_null,
    legend_above,
    legend_line,
    look_of,
    measure_name,
    name_taps,
    one_target,
    panels_of,
    sample_size,
    styled_figure,
    taps_in_order,
)
from backsight.tables.names import LOWER_IS_BETTER, MAP

NAMES: Mapping[str, str] = MappingProxyType(dict(INVERSE_NAMES) | {"null_shuffled": "null: MAP of another image"})
LARGEST_PICTURE = 1.15  # inches; of few taps more would only be larger
DETAIL = ("psnr", "psnr_background", "psnr_objects", "edge_f1", "ssim", "texture_accuracy")
WHOLE: Mapping[str, float] = MappingProxyType({"hue_shift_kept": 1.0, "colour_follow": 1.0, "hue_error": 0.0})
SHOWN = ("modular", MAP)


def _rows(metrics: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Rows of a measure at every tap; of hue shifts the mean over them, and of no pair of taps."""
    rows = metrics[(metrics["measure"] == measure) & metrics["tap"].notna() & metrics["value"].notna()]
    rows = rows[rows["hue_shift"].isna() & rows["source_tap"].isna()]
    return one_target(rows).sort_values("depth", kind="stable")


def _line(axes: Axes, rows: pd.DataFrame, name: str, taps: Sequence[str], shift: float) -> Line2D:
    """A line with its band; nulls dashed, without."""
    line, look = rows[rows["inverse"] == name], look_of(name)
    x = np.array([taps.index(tap) for tap in line["tap"]]) + shift
    if name.startswith("null_"):
        axes.plot(x, line["value"], **look.line)
    else:
        draw_band(axes, x, line, 0.13, **look.line)
        axes.vlines(x, line["low"], line["high"], color=look.colour, linewidth=0.8)
    return legend_line(NAMES.get(name, look.label), **look.line)


def _curves(
    metrics: pd.DataFrame, measures: Sequence[str], panel: float
) -> tuple[ShownFigure, dict[str, pd.DataFrame]]:
    """Panels of measures by depth, one line an inverse; (figure, {measure: its rows})."""
    tables = {measure: _rows(metrics, measure) for measure in measures}
    tables = {measure: rows for measure, rows in tables.items() if len(rows)}
    if not tables:
        raise BacksightError(f"the table has none of {', '.join(measures)}: give metrics of measure_restated.")
    every = pd.concat(tables.values())
    taps, inverses = taps_in_order(every), inverse_order(list(every["inverse"]))
    with styled_figure(COLUMN_WIDTH, panel * -(-len(tables) // 3) + 0.75) as figure:
        handles: dict[str, Line2D] = {}
        for axes, (measure, rows) in zip(panels_of(figure, len(tables), 3), tables.items(), strict=True):
            present = [name for name in inverses if (rows["inverse"] == name).any()]
            lit = [name for name in present if not name.startswith("null_")]
            for name in present:
                # Side by side, so that intervals can be told apart.
                shift = 0.05 * (lit.index(name) - (len(lit) - 1) / 2) if name in lit else 0.0
                handles[name] = _line(axes, rows, name, taps, shift)
            _without_far_nulls(axes, rows)
            if measure in WHOLE:
                axes.axhline(WHOLE[measure], color="#000000", linewidth=0.7)
            axes.set_title(fill(measure_name(measure), 24), fontsize=NORMAL)
            name_taps(axes, taps)
            axes.set_xlim(-0.25, len(taps) - 0.75)
        figure.supxlabel("tap, shallow → deep", fontsize=NORMAL)
        legend_above(figure, [handles[name] for name in inverses], handlelength=2.8)
        told = []
        for measure, rows in tables.items():
            lines = [f"{name} {ends(rows[rows['inverse'] == name])}" for name in inverse_order(list(rows["inverse"]))]
            told.append(f"{measure_name(measure)}: {'; '.join(lines)}.")
        figure.description = " ".join(told)
    return figure, tables


def _without_far_nulls(axes: Axes, rows: pd.DataFrame) -> None:
    """Where every null of an error lies far above, the inverses get the panel and the nulls a word at its top."""
    null = is_null(rows)
    if rows["measure"].iloc[0] not in LOWER_IS_BETTER or not null.any() or null.all():
        return
    most, least = rows.loc[~null, "high"].max(), rows.loc[null, "value"].min()
    if least > 2 * most:
        axes.set_ylim(-0.06 * most, 1.3 * most)
        text = f"↑ nulls: {least:.0f} to {rows.loc[null, 'value'].max():.0f}"
        axes.text(0.5, 0.97, text, transform=axes.transAxes, ha="center", va="top", fontsize=SMALL, color=NULL_COLOUR)


def detail_by_depth(metrics: pd.DataFrame) -> ShownFigure:
    """Shape and detail by depth, a panel a measure: what trained decoders read, and what MAP gets back; nulls dashed.

    metrics: of `measure_restated`, one target's; measures that the table lacks are left out. Raises BacksightError
    where none is there.
    """
    figure, tables = _curves(metrics, DETAIL, 2.0)
    every = pd.concat(tables.values())
    figure.caption = (
        "All inverses read the same float32 states; bars and bands: 95 % intervals; dashed: nulls. "
        f"{sample_size(every[~is_null(every)])}."
    )
    return figure


def hue_kept_by_depth(metrics: pd.DataFrame) -> ShownFigure:
    """What comes back of an object's hue, and of a shift of it in the same scene, by depth; thin: a perfect inverse.

    metrics: of `measure_restated`, one target's; several shifts count as their mean.
    """
    figure, tables = _curves(metrics, list(WHOLE), 2.3)
    turned = ", ".join(f"{shift:g}°" for shift in sorted(metrics["hue_shift"].dropna().unique()))
    counts = "; ".join(f"{measure_name(m)}: {sample_size(rows[~is_null(rows)])}" for m, rows in tables.items())
    figure.caption = (
        f"The same scenes, their main object turned by {turned} of hue and nothing else changed; thin black: a "
        f"perfect inverse; dashed: nulls; 95 % intervals. {counts}."
    )
    return figure


def cross_figure(metrics: pd.DataFrame) -> ShownFigure:
    """PSNR of tap i's state (down) through the inverse made for tap j (across), a matrix an inverse, on one scale.

    metrics: of `measure_restated`, one target's. Outlined: each tap's own inverse; empty: too far apart, or not of one
    form. Raises BacksightError where neither the modular inverse nor MAP has a matrix.
    """
    rows = one_target(metrics[(metrics["measure"] == "cross_psnr") & metrics["source_tap"].notna()])
    panels = {name: rows[rows["inverse"] == name] for name in SHOWN if (rows["inverse"] == name).any()}
    if not panels:
        raise BacksightError(f"the table holds no cross_psnr of {', '.join(SHOWN)}: give one target's metrics.")
    levels = {null: rows.loc[rows["inverse"] == null, "value"].mean() for null in ("null_mean", "null_shuffled")}
    levels = {null: level for null, level in levels.items() if not np.isnan(level)}
    every = pd.concat(panels.values())
    limits = min([every["value"].min(), *levels.values()]), every["value"].max()
    side = COLUMN_WIDTH / max(2, len(panels))
    with styled_figure(COLUMN_WIDTH, side + 0.25) as figure:
        for axes, (name, own) in zip(panels_of(figure, len(panels), 2), panels.items(), strict=True):
            image = draw_matrix(axes, own, limits, side, "state")
            axes.set_title(NAMES[name])
        bar = figure.colorbar(image, ax=figure.axes, label="PSNR (dB)", shrink=0.8, aspect=22)
        for level in levels.values():
            bar.ax.axhline(level, color="white", linewidth=1.8)
        nulls = ", ".join(f"{NAMES[null].removeprefix('null: ')} {level:.1f} dB" for null, level in levels.items())
        figure.caption = (
            "PSNR of the state of one tap through the inverse made for another, ± half the 95 % interval; outlined: "
            f"its own. Nulls, white on the scale: {nulls}. {sample_size(every)}."
        )
        told = []
        for name, of in panels.items():
            diagonal = of.loc[of["source_tap"] == of["target_tap"], "value"]
            cells = "; ".join(
                f"{short_tap(str(r.source_tap))} through {short_tap(str(r.target_tap))} {r.value:.1f}"
                for r in of[of["source_tap"] != of["target_tap"]].itertuples()
            )
            told.append(f"{name}: own {diagonal.min():.1f} to {diagonal.max():.1f} dB; {cells}.")
        figure.description = " ".join(told)
    return figure


def restated_pictures(images: Tensor, pictures: Mapping[str, Mapping[str, Tensor]]) -> ShownFigure:
    """Three images down, taps across; of each image a row of the modular inverse and of MAP, with the PSNR.

    images: (k, 3, H, W); pictures: {inverse: {tap: (k, 3, H, W)}}, of `Restated`.
    """
    chosen = [name for name in SHOWN if pictures.get(name)]
    inputs = as_pictures(images, "images")[:3]
    made = {
        name: {tap: as_pictures(values, f"{name} at {tap}")[: len(inputs)] for tap, values in pictures[name].items()}
        for name in chosen
    }
    scores = {name: {tap: decibels(inputs, values) for tap, values in per.items()} for name, per in made.items()}
    rows = [
        GridRow(
            "MAP" if name == MAP else name,
            look_of(name).colour,
            inputs[number],
            {tap: values[number] for tap, values in made[name].items()},
            {tap: f"{values[number]:.1f} dB" for tap, values in scores[name].items()},
        )
        for number in range(len(inputs))
        for name in chosen
    ]
    taps = merged_order([list(per) for per in made.values()])
    figure = picture_grid(rows, taps, min(COLUMN_WIDTH, (LARGEST_PICTURE + 0.05) * (len(taps) + 1) + 0.4))
    figure.caption = (
        f"The same float32 states, read by {' and by '.join(NAMES[name] for name in chosen)}: what is the picture's, "
        "and what is the reader's."
    )
    means = "; ".join(
        f"{name} {', '.join(f'{values.mean():.1f} dB at {tap}' for tap, values in per.items())}"
        for name, per in scores.items()
    )
    figure.description = f"{figure.description} Means over {len(inputs)} images: {means}."
    return figure
