"""Figures of several runs: grids that they saved, one under another, and targets side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from backsight.errors import BacksightError
from backsight.plots.style import (
    COLUMN_WIDTH,
    NORMAL,
    NULL_COLOUR,
    TARGET_COLOURS,
    UNTRAINED_DASHES,
    ShownFigure,
    draw_band,
    is_null,
    legend_above,
    legend_line,
    measure_name,
    panels_of,
    styled_figure,
    taps_in_order,
    target_colour,
)
from backsight.tables.estimates import difference, estimate_of
from backsight.tables.evidence import AS_GOOD
from backsight.tables.names import LEADING_FAMILIES

TWIN_DASHES = (0, (4, 1.5))
DEPTH = "relative depth of the tap (0 = first, 1 = last)"


# ---------------------------------------------------------------------------------------------- pictures that runs drew


def stacked_pictures(pictures: Mapping[str, str | Path], rows: int | None = None) -> ShownFigure:
    """Grids that runs saved as PNG, one under another, each with its title, at the size they were drawn for.

    pictures: {title: path of a grid made by figures.reconstruction_grid}; rows: how many rows of pictures to keep of
    each, default all. Raises BacksightError where there is none, or a file is no picture.
    """
    from PIL import Image

    if not pictures:
        raise BacksightError("there is no picture to stack: give at least one PNG file.")
    arrays = {}
    for title, path in pictures.items():
        try:
            with Image.open(path) as image:
                array = np.asarray(image.convert("RGB"))
        except OSError as error:
            raise BacksightError(f"{Path(path).name} of {title} is no picture that can be read: {error}.") from error
        arrays[title] = array if rows is None else array[slice(*_extent(array, rows))]
    head, width = 0.2, COLUMN_WIDTH
    heights = {title: width * array.shape[0] / array.shape[1] for title, array in arrays.items()}
    height = sum(heights.values()) + head * len(arrays)
    with styled_figure(width, height, layout=None) as figure:
        top = 0.0
        for title, array in arrays.items():
            figure.text(0.01, 1 - (top + head / 2) / height, title, weight="bold", va="center", fontsize=NORMAL)
            top += head
            axes = figure.add_axes((0, 1 - (top + heights[title]) / height, 1, heights[title] / height))
            axes.imshow(array, aspect="auto", interpolation="antialiased")
            axes.set_axis_off()
            top += heights[title]
        figure.caption = "The input, then what was rebuilt from ever deeper taps."
        figure.description = f"Grids of pictures, one under another: {'; '.join(arrays)}."
        figure.shows_images = True
    return figure


def _extent(array: np.ndarray, rows: int) -> tuple[int, int]:
    """From where to where, in pixels from the top, the first rows of pictures of a saved grid reach: from the names of
    the taps, below the line that says what they are, to the caption of the last row.

    Pictures are the tall stretches between empty lines; what stands under one before the next is its caption.
    """
    inked = np.concatenate([[False], (array < 250).any(axis=(1, 2)), [False]])
    edges = np.flatnonzero(inked[1:] != inked[:-1])
    stretches = list(zip(edges[::2], edges[1::2], strict=True))
    tall = [i for i, (start, end) in enumerate(stretches) if end - start > 0.04 * array.shape[1]]
    first = int(stretches[0][1]) + 6 if tall and tall[0] > 1 else 0
    last = int(stretches[tall[rows] - 1][1]) + 6 if len(tall) > rows else array.shape[0]
    return first, last


# ------------------------------------------------------------------------------------------------- targets side by side


def in_order(targets: pd.Series) -> list[str]:
    """Targets in the order of every figure: the shipped ones, then others by name."""
    known = list(TARGET_COLOURS)
    return sorted(set(targets), key=lambda name: (known.index(name) if name in known else len(known), name))


def plain_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with one null of each kind: where nulls come once for each family, those of the family that leads."""
    if "family" not in rows or rows["family"].isna().all():
        return rows
    null = is_null(rows)
    named = set(rows.loc[null, "family"].dropna())
    lead = next((name for name in LEADING_FAMILIES if name in named), None)
    return rows[~null | rows["family"].isna() | (rows["family"] == lead)]


def leading_family(rows: pd.DataFrame) -> str:
    """The first of modular, direct, linear that every target of the rows has. Raises BacksightError without one."""
    per_target = [set(group["inverse"]) for _, group in rows.groupby("target")]
    for name in LEADING_FAMILIES:
        if per_target and all(name in names for names in per_target):
            return name
    raise BacksightError("the targets of this table share no inverse family: draw each of them by itself.")


def targets_by_depth(rows: pd.DataFrame, measures: Sequence[str]) -> ShownFigure:
    """Targets compared along their relative depth: a panel a measure, a line a target with its 95 % band.

    rows: tidy rows, one run for each target; the inverse is the first of modular, direct and linear that all targets
    have. Dashed lines: the same on each target's untrained twin; dotted: the mean image.
    Raises BacksightError where no measure has values at taps.
    """
    chosen = plain_rows(rows[rows["measure"].isin(list(measures)) & rows["tap"].notna() & rows["value"].notna()])
    measures = [name for name in measures if (chosen["measure"] == name).any()]
    if not measures:
        raise BacksightError("the table has none of these measures at any tap: choose others.")
    targets = in_order(chosen["target"])
    told, families = [], []
    with styled_figure(COLUMN_WIDTH, 2.0 * -(-len(measures) // 2) + 0.55) as figure:
        for axes, measure in zip(panels_of(figure, len(measures), 2), measures, strict=True):
            of = chosen[chosen["measure"] == measure]
            family = leading_family(of)
            for target in targets:
                _target_lines(axes, of[of["target"] == target], family, target)
            axes.set_ylabel(measure_name(measure))
            families.append(family)
            last = of[of["inverse"] == family].sort_values("depth").groupby("target", sort=False)["value"].last()
            told.append(f"{measure} at the last tap: {', '.join(f'{n} {value:.3g}' for n, value in last.items())}")
        figure.supxlabel(DEPTH, fontsize=NORMAL)
        handles = [legend_line(name, color=target_colour(name), marker="o") for name in targets]
        handles.append(legend_line("untrained twin", color=NULL_COLOUR, linestyle=TWIN_DASHES))
        handles.append(legend_line("mean image", color=NULL_COLOUR, linestyle=UNTRAINED_DASHES))
        legend_above(figure, handles, 4, ncols=4)
        kinds = " and ".join(dict.fromkeys(families))
        figure.caption = (
            f"Targets by relative depth, {kinds} inverses; bands: 95 % intervals, dashed and dotted: nulls."
        )
        figure.description = f"Curves by relative depth, one for each target. {'; '.join(told)}."
    return figure


def _relative(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows in forward order, with x: where the tap lies from the first (0) to the last (1)."""
    taps = taps_in_order(rows)
    place = {tap: i / max(1, len(taps) - 1) for i, tap in enumerate(taps)}
    return rows.assign(x=rows["tap"].map(place)).sort_values("x", kind="stable")


def _target_lines(axes: Axes, rows: pd.DataFrame, family: str, target: str) -> None:
    rows, colour = _relative(rows), target_colour(target)
    own = rows[rows["inverse"] == family]
    draw_band(axes, own["x"], own, color=colour, marker="o", markersize=3)
    for null, dashes in (("null_untrained", TWIN_DASHES), ("null_mean", UNTRAINED_DASHES)):
        line = rows[rows["inverse"] == null]
        null_colour = NULL_COLOUR if null == "null_mean" else colour
        axes.plot(line["x"], line["value"], color=null_colour, linestyle=dashes, linewidth=0.9)


def modular_against_direct(rows: pd.DataFrame) -> ShownFigure:
    """PSNR of the chain minus the direct decoder's at every tap, a line a target; 0: as good.

    rows: tidy rows of psnr, one run for each target. Bands: 95 % intervals of the difference of two (claims.py).
    Raises BacksightError where no target has both families.
    """
    both = rows[(rows["measure"] == "psnr") & rows["inverse"].isin(["modular", "direct"])]
    lines: dict[str, pd.DataFrame] = {}
    for target in in_order(both["target"]):
        found = []
        for x, at in _relative(both[both["target"] == target]).groupby("x", sort=False):
            better = difference(*(estimate_of(at[at["inverse"] == name]) for name in ("modular", "direct")))
            if better is not None:
                found.append({"x": x, "value": better.value, "low": better.low, "high": better.high})
        if found:
            lines[target] = pd.DataFrame(found)
    if not lines:
        raise BacksightError("no target has both a modular and a direct inverse: train both with 02_train_inverse.")
    with styled_figure(COLUMN_WIDTH, 2.7) as figure:
        axes = figure.subplots()
        for target, line in lines.items():
            draw_band(axes, line["x"], line, marker="o", markersize=3, color=target_colour(target), label=target)
        axes.axhline(0, color=NULL_COLOUR, linewidth=0.9)
        axes.axhline(-AS_GOOD, color=NULL_COLOUR, linewidth=0.9, linestyle=(0, (4, 1.5)))
        axes.set(xlabel=DEPTH, ylabel="PSNR, modular − direct (dB)")
        figure.legend(loc="outside upper center", ncols=3)
        figure.caption = f"Above 0 the chain is better; dashed: {AS_GOOD} dB below, still taken as as good."
        told = [f"{target} {line['value'].iloc[-1]:.2f} dB at the last tap" for target, line in lines.items()]
        figure.description = f"Difference of PSNR by relative depth: {', '.join(told)}."
    return figure
