"""The method as a scheme with real pictures."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from backsight.errors import BacksightError
from backsight.plots.grids import broken, place_picture
from backsight.plots.style import COLUMN_WIDTH, NORMAL, NULL_COLOUR, SMALL, ShownFigure, styled_figure


def method_scheme(image: np.ndarray, reconstructions: Mapping[str, np.ndarray], target: str = "") -> ShownFigure:
    """The method with real pictures: a frozen target's modules, an inverse of each, what comes back from each tap.

    image: (3, H, W) in [0, 1]; reconstructions: {tap: (3, H, W)} in forward order. Raises BacksightError where there
    is no reconstruction.
    """
    if not reconstructions:
        raise BacksightError("there is no reconstruction to draw: give at least one tap.")
    count, width = len(reconstructions), COLUMN_WIDTH
    left, gap = 0.95, 0.1
    cell = (width - left - 0.05) / count - gap
    picture = min(cell, 0.95)
    box, top = 0.3, 0.22
    rows = (top, top + 0.62, top + 1.18)  # upper edges: modules, inverses, pictures, in inches from the top
    height = rows[2] + picture + 0.3
    with styled_figure(width, height, layout=None) as figure:
        page = figure.add_axes((0, 0, 1, 1))
        page.set_xlim(0, width)
        page.set_ylim(height, 0)
        page.set_axis_off()
        middles = [left + gap + cell / 2 + i * (cell + gap) for i in range(count)]
        side = min(picture, 0.8)
        place_picture(figure, image, 0.45 - side / 2, rows[0] + 0.06, side, side)
        page.text(0.45, top - 0.02, "image", ha="center", va="bottom", fontsize=SMALL, weight="bold")
        for number, (tap, middle) in enumerate(zip(reconstructions, middles, strict=True), start=1):
            before = middles[number - 2] + cell / 2 if number > 1 else 0.05 + 0.8
            _box(page, middle, rows[0], cell, box, f"$f_{{{number}}}$", "#e8eef5", "#0173b2")
            _box(page, middle, rows[1], cell, box, f"$g_{{{number}}}$", "#e5f3ee", "#029e73")
            _arrow(page, (before, rows[0] + box / 2), (middle - cell / 2, rows[0] + box / 2), "#0173b2")
            _arrow(page, (middle - cell / 2, rows[1] + box / 2), (before, rows[1] + box / 2), "#029e73")
            _arrow(page, (middle, rows[0] + box), (middle, rows[1]), NULL_COLOUR)
            page.text(middle, top - 0.02, "\n".join(broken(tap, cell)), ha="center", va="bottom", fontsize=SMALL)
            _arrow(page, (middle, rows[1] + box), (middle, rows[2]), "#029e73")
            place_picture(figure, reconstructions[tap], middle - picture / 2, rows[2], picture, picture)
        page.text(0.45, rows[2] + picture / 2, "pictures\nfrom tap", ha="center", va="center", fontsize=SMALL)
        rule = (
            r"$f_i$: frozen modules.  $g_i$: inverses, trained to turn $f_i$'s output into its input.  "
            r"From tap $i$: $g_1 \circ \dots \circ g_i$"
        )
        page.text(left + gap, height - 0.06, rule, ha="left", va="bottom", fontsize=SMALL)
        figure.caption = f"The frozen target{f' {target}' if target else ''} above, an inverse of each module below."
        figure.description = (
            f"Scheme: {count} frozen modules in a row, an inverse under each that leads back to the module before it, "
            f"and under each the picture rebuilt from it: {', '.join(reconstructions)}."
        )
    return figure


def _box(page: Axes, middle: float, top: float, wide: float, tall: float, text: str, face: str, edge: str) -> None:
    shape = FancyBboxPatch(
        (middle - wide / 2, top), wide, tall, boxstyle="round,pad=0,rounding_size=0.05", facecolor=face, edgecolor=edge
    )
    page.add_patch(shape)
    page.text(middle, top + tall / 2, text, ha="center", va="center", fontsize=NORMAL)


def _arrow(page: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    style = {"arrowstyle": "->", "color": colour, "shrinkA": 1, "shrinkB": 1, "lw": 0.9}
    page.annotate("", xy=end, xytext=start, arrowprops=style)
