"""Figures of the colour study, from the rows of metrics.csv: response curves, outcomes, and the reversion index."""

import colorsys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from backsight.errors import BacksightError
from backsight.plots.style import (
    COLUMN_WIDTH,
    NORMAL,
    SMALL,
    ShownFigure,
    depth_colours,
    draw_band,
    draw_bars,
    ends,
    inverse_order,
    legend_above,
    legend_line,
    look_of,
    measure_name,
    name_taps,
    panels_of,
    reach,
    rows_of,
    sample_size,
    styled_figure,
    taps_in_order,
)
from backsight.tables.names import PERMUTATIONS, UNOWNED_HUES

CATEGORY_NAMES: Mapping[str, str] = MappingProxyType(
    {"canonical": "classes with a canonical hue", "colour_free": "colour-free classes (placebo hue)"}
)
CATEGORY_COLOURS: Mapping[str, str] = MappingProxyType({"canonical": "#aa3377", "colour_free": "#228833"})
# Paul Tol's bright scheme: told apart by the colour-blind, and none of them is a hue that the scenes own.
OUTCOME_COLOURS: Mapping[str, str] = MappingProxyType(
    {"keep": "#4477aa", "revert": "#ee6677", "grey": "#bbbbbb", "other": "#ccbb44"}
)
OUTCOME_NAMES: Mapping[str, str] = MappingProxyType(
    {"keep": "keep the hue shown", "revert": "revert to canonical", "grey": "grey out", "other": "another hue"}
)
KIND_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "none": "unchanged",
        "set_hue": "hue {amount:.0f}°",
        "grey": "grey",
        "channels": "channels {order}",
        "saturation": "saturation × {amount:g}",
        "brightness": "brightness × {amount:g}",
        "white_surroundings": "white surroundings",
    }
)


def families_of(table: pd.DataFrame) -> list[str]:
    """The inverses that are no null and no painter, in the order of every figure."""
    names = [str(name) for name in dict.fromkeys(table["inverse"].dropna())]
    return inverse_order([name for name in names if not name.startswith("null_") and name != "painter"])


def _sizes(rows: pd.DataFrame) -> str:
    return f"{sample_size(rows)}, 95 % bootstrap intervals"


def _panels(rows: pd.DataFrame, names: Sequence[str]) -> list[tuple[str, str]]:
    """(target, inverse) of every row of panels."""
    return [(target, name) for target in dict.fromkeys(rows["target"]) for name in names]


def _extremes(rows: pd.DataFrame) -> str:
    parts = rows.groupby(["target", "inverse"], sort=False)
    return " ".join(f"{target}, {inverse}: mean {ends(part)}." for (target, inverse), part in parts)


def response_curves(table: pd.DataFrame, measure: str = "hue_error_shown", category: str = "canonical") -> ShownFigure:
    """A measure against the hue shift, one line a tap (dark = shallow), a panel for each inverse and region.

    table: rows of 05_colour. Bands are 95 % intervals. Raises BacksightError where there is nothing to draw.
    """
    curve = rows_of(table, measure, perturbation="hue_shift", category=category)
    curve = curve[curve["hue_shift"].notna()]
    curve = curve[curve["inverse"].isin(names := families_of(curve))]
    if curve.empty:
        raise BacksightError(f"the table has no response curve of {measure} for {category}: run 05_colour for it.")
    regions = [region for region in ("object", "image") if region in set(curve["region"])]
    panels = _panels(curve, names)
    palette = depth_colours(taps_in_order(curve))
    with styled_figure(COLUMN_WIDTH, 2.0 * len(panels) + 0.75) as figure:
        grid = figure.subplots(len(panels), len(regions), squeeze=False, sharex=True, sharey=True)
        for (target, name), line in zip(panels, grid, strict=True):
            for region, axes in zip(regions, line, strict=True):
                here = curve[(curve.target == target) & (curve.inverse == name) & (curve.region == region)]
                for tap, points in here.sort_values("hue_shift").groupby("tap", sort=False):
                    draw_band(axes, points["hue_shift"], points, 0.15, color=palette[tap], linewidth=1.2)
                axes.set_xticks(range(0, 360, 60))
                place = "object recoloured" if region == "object" else "whole image recoloured"
                axes.set_title(f"{target} · {look_of(name).label}\n{place}", fontsize=SMALL)
        label, which = measure_name(measure), CATEGORY_NAMES.get(category, category)
        figure.supylabel(label, fontsize=NORMAL)
        figure.supxlabel("hue shift (degrees)", fontsize=NORMAL)
        legend_above(figure, [legend_line(tap, color=colour) for tap, colour in palette.items()], 5)
        figure.caption = f"{label}, by hue shift and tap; {which}; {_sizes(curve)}."
        figure.description = f"Curves of {label} over the hue shift, {which}. " + _extremes(curve)
    return figure


def hues_by_depth(table: pd.DataFrame, measure: str = "share_keep") -> ShownFigure:
    """A measure by depth where the object is set to one hue: a line in that hue for each; dashed: owned by no class."""
    rows = rows_of(table, measure, perturbation="set_hue", region="object", category="canonical")
    panels, hues = _panels(rows, families_of(rows)), sorted(rows["amount"].unique())
    looks: dict[float, dict[str, Any]] = {
        hue: {
            "color": colorsys.hsv_to_rgb(hue % 360 / 360, 0.9, 0.85),  # stands out on white
            "linestyle": "--" if hue in UNOWNED_HUES else "-",
        }
        for hue in hues
    }
    with styled_figure(COLUMN_WIDTH, 2.1 * -(-len(panels) // 2) + 0.75) as figure:
        for (target, name), axes in zip(panels, panels_of(figure, len(panels), 2, sharey=True), strict=True):
            here = rows[(rows.target == target) & (rows.inverse == name)]
            taps = taps_in_order(here)
            for place, (hue, look) in enumerate(looks.items()):
                line = here[here["amount"] == hue].set_index("tap").reindex(taps)
                x = np.arange(len(taps)) + 0.09 * (place - (len(hues) - 1) / 2)
                draw_bars(axes, x, line, marker="o", markersize=2.5, elinewidth=0.6, capsize=0, **look)
            name_taps(axes, taps)
            axes.set_title(f"{target} · {look_of(name).label}")
        figure.supylabel(measure_name(measure), fontsize=NORMAL)
        handles = [legend_line(f"{hue:.0f}°", **look) for hue, look in looks.items()]
        legend_above(figure, handles, len(hues), title="object set to")
        which = CATEGORY_NAMES["canonical"]
        figure.caption = f"{measure_name(measure)} of objects set to one hue; {which}; {_sizes(rows)}."
        told = "; ".join(
            f"{hue:.0f} degrees {mean:.3g}" for hue, mean in rows.groupby("amount")["value"].mean().items()
        )
        figure.description = f"Lines by depth, one for each hue; means over taps and inverses: {told}."
    return figure


# --------------------------------------------------------------------------------------------- outcomes and index


def outcome_bars(table: pd.DataFrame) -> ShownFigure:
    """Shares of objects that keep, revert, grey out or get another hue, over the whole circle of shifts, by depth.

    Rows of panels are inverses, columns the categories; a bar a tap. The line at the top of the keep and of the
    revert segment is that share's own 95 % interval. Counted are the cases whose hue shown is 60 degrees or more from
    the canonical one.
    """
    measures = [f"share_{name}" for name in OUTCOME_COLOURS]
    rows = rows_of(table, measures, perturbation="hue_shift", hue_shift=None, region="object")
    names = [*families_of(rows), *(["null_untrained"] if "null_untrained" in set(rows["inverse"]) else [])]
    rows = rows[rows["inverse"].isin(names) & ((rows["inverse"] != "null_untrained") | (rows["family"] == "linear"))]
    categories = [name for name in CATEGORY_NAMES if name in set(rows["category"])]
    panels = _panels(rows, names)
    with styled_figure(COLUMN_WIDTH, 1.35 * len(panels) + 1.1) as figure:
        grid = figure.subplots(len(panels), len(categories), squeeze=False, sharey=True, sharex="col")
        for (target, name), line in zip(panels, grid, strict=True):
            for category, axes in zip(categories, line, strict=True):
                here = rows[(rows.target == target) & (rows.inverse == name) & (rows.category == category)]
                name_taps(axes, _draw_stack(axes, here))
                title = f"{target} · {look_of(name).label}" if category == categories[0] else ""
                above = f"{CATEGORY_NAMES[category]}\n" if (target, name) == panels[0] else ""
                axes.set_title(above + title, fontsize=SMALL)
        figure.supylabel("share of objects", fontsize=NORMAL)
        legend_above(figure, [Patch(color=c, label=OUTCOME_NAMES[name]) for name, c in OUTCOME_COLOURS.items()])
        figure.caption = (
            "What becomes of the object when the object's hue is turned; black: intervals of the shares that keep and "
            f"that revert; {_sizes(rows)}."
        )
        told = rows[(rows.category == categories[0]) & (rows.measure == "share_revert")]
        figure.description = f"Stacked bars by tap. Share that reverts, {categories[0]}: {_extremes(told)}"
    return figure


def _draw_stack(axes: Axes, rows: pd.DataFrame) -> list[str]:
    taps = taps_in_order(rows)
    base = np.zeros(len(taps))
    for name, colour in OUTCOME_COLOURS.items():
        share = rows[rows["measure"] == f"share_{name}"].set_index("tap").reindex(taps)
        value = share["value"].to_numpy()
        axes.bar(range(len(taps)), value, 0.8, base, color=colour)
        if name in ("keep", "revert"):
            x = np.arange(len(taps)) + (-0.12 if name == "keep" else 0.12)
            axes.errorbar(x, base + value, reach(share), fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
        base = base + np.nan_to_num(value)
    axes.set_ylim(0, 1.02)
    return taps


def reversion_by_depth(table: pd.DataFrame) -> ShownFigure:
    """The reversion index by depth: a line an inverse, the untrained target dashed, the painter at 1.

    Thin dotted lines are the placebo: the index of colour-free classes towards a hue that they do not own.
    """
    rows = rows_of(table, "reversion_index", region="object")
    families, targets = families_of(rows), list(dict.fromkeys(rows["target"]))
    painter = rows[(rows.inverse == "painter") & (rows.category == "canonical")]["value"].mean()
    untrained: dict[str, Any] = look_of("null_untrained").line | {"linestyle": "--"}
    with styled_figure(COLUMN_WIDTH, 2.4 * -(-len(targets) // 2) + 0.9) as figure:
        for target, axes in zip(targets, panels_of(figure, len(targets), 2, sharey=True), strict=True):
            here = rows[(rows.target == target) & ~rows.inverse.isin(["painter", "null_mean"])]
            taps = taps_in_order(here)
            of_linear = here[(here["inverse"] != "null_untrained") | (here["family"] == "linear")]

            def draw(name: str, category: str, shade: float, rows: pd.DataFrame = of_linear, **style: Any) -> None:
                line = rows[(rows.inverse == name) & (rows.category == category)]
                if len(line):
                    line = line.set_index("tap").reindex(taps)  # noqa: B023
                    draw_band(axes, range(len(taps)), line, shade, **style)  # noqa: B023

            for name in families:
                colour = look_of(name).colour
                draw(name, "canonical", 0.15, color=colour, marker="o")
                draw(name, "colour_free", 0.06, color=colour, linestyle=":", linewidth=0.9)
            draw("null_untrained", "canonical", 0.15, **untrained)
            axes.axhline(0, color="black", linewidth=0.6)
            if np.isfinite(painter):
                axes.axhline(painter, color=OUTCOME_COLOURS["revert"], linewidth=1)
            name_taps(axes, taps)
            axes.set_title(target)
        figure.supylabel(measure_name("reversion_index"), fontsize=NORMAL)
        handles = [legend_line(look_of(name).label, color=look_of(name).colour, marker="o") for name in families]
        handles += [
            legend_line(look_of("null_untrained").label, **untrained),
            legend_line("placebo (colour-free classes)", color="black", linestyle=":", linewidth=0.9),
            legend_line(look_of("painter").label, color=OUTCOME_COLOURS["revert"]),
        ]
        legend_above(figure, handles, 3)
        drawn = rows[rows.inverse.isin(families) & (rows.category == "canonical")]
        figure.caption = f"Reversion to the canonical hue by depth; {_sizes(drawn)}."
        figure.description = "Lines by depth; 0 is a perfect inverse, 1 a painter. " + _extremes(drawn)
    return figure


# --------------------------------------------------------------------------------------------------- the answers


def accuracy_curves(table: pd.DataFrame) -> ShownFigure:
    """The target's own accuracy: against the hue shift (left), under every other perturbation (right).

    Solid: the object is recoloured; dashed: the whole image. Colours are the two categories of classes. One row of
    panels for each target.
    """
    rows = rows_of(table, ("top1", "ap50"))
    targets = list(dict.fromkeys(rows["target"]))
    with styled_figure(COLUMN_WIDTH, 3.0 * len(targets) + 0.55) as figure:
        grid = figure.subplots(len(targets), 2, squeeze=False, width_ratios=[1.15, 1])
        for target, (left, right) in zip(targets, grid, strict=True):
            here = rows[rows["target"] == target]
            curve = here[(here["perturbation"] == "hue_shift") & here["hue_shift"].notna()].sort_values("hue_shift")
            for (category, region), line in curve.groupby(["category", "region"], sort=False):
                style = {"color": CATEGORY_COLOURS[category], "linestyle": "-" if region == "object" else "--"}
                draw_band(left, line["hue_shift"], line, 0.1, **style)
            left.set_xticks(range(0, 360, 60))
            labels = _draw_points(right, here[here["perturbation"] != "hue_shift"])
            right.set_yticks(range(len(labels)), labels)
            right.invert_yaxis()
            measure = measure_name(str(here["measure"].iloc[0]))
            left.set(title=target, ylabel=measure, xlabel="hue shift (degrees)", ylim=(0, 1.02))
            right.set(xlabel=measure, xlim=(0, 1.02))
        handles = [
            legend_line(name.split(" (")[0], color=CATEGORY_COLOURS[category])
            for category, name in CATEGORY_NAMES.items()
            if category in set(rows["category"])
        ]
        handles += [
            legend_line("object recoloured", color="black", marker="o"),
            legend_line("whole image", color="black", marker="s", mfc="white", linestyle="--"),
        ]
        legend_above(figure, handles, 2)
        figure.caption = f"The target's own accuracy under other colours; {_sizes(rows)} (a target has no such seed)."
        names = rows["target"] + " " + rows["category"] + " " + rows["perturbation"]
        told = rows["value"].groupby(names, sort=False).mean()
        figure.description = "; ".join(f"{key} {value:.3g}" for key, value in told.items()) + "."
    return figure


def _draw_points(axes: Axes, rows: pd.DataFrame) -> list[str]:
    """Intervals of the perturbations that are no hue shift, one line a perturbation; returns their names."""

    def label(kind: str, amount: float) -> str:
        order = "".join("RGB"[c] for c in PERMUTATIONS[int(amount)]) if kind == "channels" else ""
        return KIND_NAMES[kind].format(amount=amount, order=order)

    rows = rows.assign(label=[label(*each) for each in zip(rows["perturbation"], rows["amount"], strict=True)])
    labels = list(dict.fromkeys(rows["label"]))
    for (category, region), part in rows.groupby(["category", "region"], sort=False):
        lift = (-0.1 if region == "object" else 0.1) + (-0.2 if category == "canonical" else 0.2)
        places = [labels.index(name) + lift for name in part["label"]]
        colour = CATEGORY_COLOURS[str(category)]
        style: dict[str, Any] = {"fmt": "o", "mfc": colour} if region == "object" else {"fmt": "s", "mfc": "white"}
        axes.errorbar(part["value"], places, xerr=reach(part), color=colour, ms=3, lw=0.8, **style)
    return labels
