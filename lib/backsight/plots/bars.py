"""Bars: shares that add up to one, or values side by side."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from backsight.errors import BacksightError
from backsight.plots.style import (
    COLUMN_WIDTH,
    ShownFigure,
    captioned,
    drawn_panels,
    look_of,
    name_of,
    short_tap,
    styled_figure,
    taps_in_order,
)


def bars(
    rows: pd.DataFrame,
    title: str,
    x: str = "tap",
    part: str = "measure",
    panel: str = "inverse",
    *,
    stacked: bool = True,
    whiskers: Sequence[str] = (),
    columns: int = 2,
    backward: bool = False,
    xlabel: str = "tap, shallow → deep",
    ylabel: str = "share",
) -> ShownFigure:
    """A bar for each value of `x` and `part`, stacked or side by side; a panel for each value of `panel`.

    rows: tidy, one row a bar; x is in the order of `depth`, backward the other way round; parts have the order in which
    the rows name them. whiskers: the parts whose 95 % intervals are drawn; side by side all have them.
    Raises BacksightError where there is nothing to draw.
    """
    if rows.empty:
        raise BacksightError(f"there is nothing to draw of {title!r}: the table has no such rows.")
    parts, count = list(dict.fromkeys(rows[part])), rows[panel].nunique()
    with styled_figure(COLUMN_WIDTH, 1.25 * -(-count // columns) + 1.4) as figure:
        for axes, _, at in drawn_panels(figure, rows, panel, columns, [x], (xlabel, ylabel), True):
            names = taps_in_order(at, x) if at["depth"].notna().all() else list(dict.fromkeys(at[x]))
            names = names[::-1] if backward else names
            base = np.zeros(len(names))
            for number, name in enumerate(parts):
                of = at[at[part] == name].set_index(x).reindex(names)
                values, wide = of["value"].to_numpy(float), 0.8 if stacked else 0.8 / len(parts)
                places = np.arange(len(names)) + (0 if stacked else wide * (number - (len(parts) - 1) / 2))
                axes.bar(places, values, wide, base if stacked else 0, color=look_of(name).colour, linewidth=0)
                if not stacked or name in whiskers:
                    shift = 0.15 * (whiskers.index(name) - (len(whiskers) - 1) / 2) if stacked else 0
                    _whiskers(axes, places + shift, base + values if stacked else values, of)
                base += np.nan_to_num(values)
            texts = names if count == 1 else [short_tap(str(name)) for name in names]
            axes.set_xticks(range(len(names)), texts, rotation=40, ha="right", rotation_mode="anchor")
            axes.grid(False, axis="x")
            if stacked:
                axes.set_ylim(0, min(1.02, axes.get_ylim()[1]))  # shares: no interval goes beyond 1
        handles = [Patch(color=look_of(name).colour, label=look_of(name).label) for name in parts]
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        told = [
            f"{name_of(which)}, {look_of(str(name)).label}: {of.value.min():.3g} to {of.value.max():.3g}"
            for (which, name), of in rows.groupby([panel, part], sort=False)
        ]
        return captioned(figure, title, rows, told)


def _whiskers(axes: Axes, places: Any, tops: Any, rows: pd.DataFrame) -> None:
    reach = np.abs(rows[["low", "high"]].to_numpy(float).T - rows["value"].to_numpy(float))
    axes.errorbar(places, tops, reach, fmt="none", ecolor="0.2", elinewidth=0.8, capsize=1.5)
