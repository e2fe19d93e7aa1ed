"""Heat maps: a value for every two taps, or for every place in the picture."""

import numpy as np
import pandas as pd

from backsight.errors import BacksightError
from backsight.plots.style import (
    COLUMN_WIDTH,
    SMALL,
    ShownFigure,
    captioned,
    drawn_panels,
    name_of,
    short_tap,
    styled_figure,
)

_MOST_NUMBERS = 8  # cells a side


def matrices(
    rows: pd.DataFrame,
    title: str,
    down: str = "source_tap",
    across: str = "target_tap",
    panel: str = "inverse",
    *,
    columns: int = 2,
    limits: tuple[float, float] | None = None,
    labels: tuple[str, str] = ("representation of tap", "inverse made for tap"),
    scale: str = "",
) -> ShownFigure:
    """`value` by two columns of the rows, a panel for each value of `panel`, all on one scale of colours.

    rows: tidy, one row a cell; cells without a row stay empty. labels: of the two directions, "" leaves the axes away;
    scale: what the colours say. Above 8 x 8 cells there are no numbers in them; shares are written as hundredths.
    """
    if rows.empty:
        raise BacksightError(f"there is nothing to draw of {title!r}: the table has no such rows.")
    low, high = limits or (float(rows["value"].min()), float(rows["value"].max()))
    count = rows[panel].nunique()
    columns = min(columns, count)
    tall = COLUMN_WIDTH / max(columns, 2) * 0.85 * -(-count // columns) + 0.8
    unit = 100 if low >= -1 and high <= 1 else 1  # shares are written as hundredths
    told, grid = [], []
    with styled_figure(COLUMN_WIDTH, tall) as figure:
        for axes, which, at in drawn_panels(figure, rows, panel, columns, [down, across], labels[::-1], False):
            table = at.pivot_table(index=down, columns=across, values="value", sort=False)
            orders = [_order(at, down, down), _order(at, across, down)]
            values = table.reindex(index=orders[0], columns=orders[1]).to_numpy(float)
            image = axes.imshow(values, vmin=low, vmax=high, cmap="viridis")
            grid.append(axes)
            told.append(f"{name_of(which)}: {np.nanmin(values):.3g} to {np.nanmax(values):.3g}")
            axes.grid(False)
            if not labels[0]:
                axes.set_axis_off()
                continue
            names = [[short_tap(str(name)) for name in order] for order in orders]
            axes.set_yticks(range(len(names[0])), names[0])
            axes.set_xticks(range(len(names[1])), names[1], rotation=90)
            axes.tick_params(length=0)
            for (i, j), value in np.ndenumerate(values) if columns <= 2 and max(values.shape) <= _MOST_NUMBERS else ():
                if np.isfinite(value):
                    colour = "white" if value < low + 0.55 * (high - low) else "black"
                    axes.text(j, i, f"{unit * value:.0f}", ha="center", va="center", fontsize=SMALL, color=colour)
        figure.colorbar(image, ax=grid, label=scale, shrink=0.7, aspect=25)
        half = (rows["high"] - rows["low"]) / 2
        note = f"Half an interval is {half.min():.2g} to {half.max():.2g}."
        return captioned(figure, title, rows, told, note)


def _order(rows: pd.DataFrame, column: str, down: str) -> list[str]:
    """By depth, which is that of a source tap, or of a tap."""
    names = list(dict.fromkeys(rows[column]))
    if pd.api.types.is_numeric_dtype(rows[column]):
        return sorted(names)
    depths = dict(zip(rows[down], rows["depth"], strict=True))
    return sorted(names, key=lambda name: depths.get(name, np.inf))
