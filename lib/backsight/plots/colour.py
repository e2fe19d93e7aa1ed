"""Figures of the colour study: pictures by hue shift and depth, response curves, outcomes, and the reversion index.

All but the grid of pictures are drawn from the rows of metrics.csv alone.
"""

import colorsys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from backsight.errors import BacksightError, nearest
from backsight.plots.style import (
    COLUMN_WIDTH,
    NORMAL,
    SMALL,
    ShownFigure,
    family_colour,
    inverse_order,
    styled_figure,
    taps_in_order,
)
from backsight.tables.names import PERMUTATIONS, UNOWNED_HUES

COLOUR_MEASURES: Mapping[str, str] = MappingProxyType(
    {
        "hue_error_shown": "angle to the hue shown (degrees)",
        "hue_error_original": "angle to the original hue (degrees)",
        "hue_error_canonical": "angle to the canonical hue (degrees)",
        "chroma_kept": "chroma kept (share of chroma shown)",
        "share_keep": "objects that keep the hue shown (share)",
        "share_revert": "objects that revert to the canonical hue (share)",
        "share_grey": "objects that grey out (share)",
        "share_other": "objects in another hue (share)",
        "reversion_index": "reversion index (0 none, 1 painter)",
        "hue_follow": "colour that follows the hue shown",
        "prototype_pull": "colour pulled to the prototype",
        "top1": "top-1 accuracy (share of images)",
        "ap50": "AP50 (0 to 1)",
    }
)
COLOUR_INVERSES: Mapping[str, str] = MappingProxyType(
    {
        "linear_uniform": "linear, fitted on uniform hues",
        "null_untrained": "null: untrained target",
        "null_shuffled": "null: other image",
        "null_mean": "null: mean image",
        "painter": "painter of canonical hues",
    }
)
CATEGORY_NAMES: Mapping[str, str] = MappingProxyType(
    {"canonical": "classes with a canonical hue", "colour_free": "colour-free classes (placebo hue)"}
)
# Paul Tol's bright scheme: told apart by the colour-blind, and none of them is a hue that the scenes own.
OUTCOME_COLOURS: Mapping[str, str] = MappingProxyType(
    {"keep": "#4477aa", "revert": "#ee6677", "grey": "#bbbbbb", "other": "#ccbb44"}
)
OUTCOME_NAMES: Mapping[str, str] = MappingProxyType(
    {"keep": "keep the hue shown", "revert": "revert to canonical", "grey": "grey out", "other": "another hue"}
)
_NULL_COLOUR = "#5f5f5f"
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


def inverse_name(inverse: str) -> str:
    return COLOUR_INVERSES.get(inverse, inverse.replace("_", " "))


def hue_colour(hue: float) -> tuple[float, float, float]:
    """The hue as a colour that stands out on white."""
    return colorsys.hsv_to_rgb(hue % 360 / 360, 0.9, 0.85)


def rows_of(table: pd.DataFrame, measure: str, **columns: Any) -> pd.DataFrame:
    """The rows of a measure; columns: {name: value, a list of values, or None for empty}.

    Raises BacksightError where the table has no such measure or no row is left.
    """
    known = [str(each) for each in dict.fromkeys(table["measure"].dropna())]
    if measure not in known:
        raise BacksightError(f"the table has no measure {measure!r}; {nearest(measure, known)}.")
    rows = table[table["measure"] == measure]
    for name, value in columns.items():
        if value is None:
            rows = rows[rows[name].isna()]
        else:
            rows = rows[rows[name].isin(value if isinstance(value, (list, tuple)) else [value])]
    if rows.empty:
        asked = ", ".join(f"{name} {value!r}" for name, value in columns.items())
        raise BacksightError(f"the table has no {measure} with {asked}: run 05_colour with these.")
    return rows


def families_of(table: pd.DataFrame) -> list[str]:
    """The inverses that are no null and no painter, in the order of every figure."""
    names = [str(name) for name in dict.fromkeys(table["inverse"].dropna())]
    return inverse_order([name for name in names if not name.startswith("null_") and name != "painter"])


def _sizes(rows: pd.DataFrame) -> str:
    """How many images and training seeds are behind the rows."""
    return f"n = {_span(rows['n'])} images, {_span(rows['seeds'])} training seeds, 95 % bootstrap intervals"


def _span(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


# ------------------------------------------------------------------------------------------------------- pictures


def hue_shift_grid(
    pictures: Any, reconstructions: Mapping[str, Any], titles: Sequence[str], width: float = COLUMN_WIDTH
) -> ShownFigure:
    """One object under several changes of colour (columns): the picture shown, then what each tap gives back (rows).

    pictures: (K, 3, H, W) in [0, 1]; reconstructions: {tap: (K, 3, H, W)} in forward order; titles: K names.
    """
    rows = {"shown": np.asarray(pictures), **{tap: np.asarray(made) for tap, made in reconstructions.items()}}
    if any(len(each) != len(titles) for each in rows.values()):
        raise BacksightError(f"{len(titles)} titles need as many pictures in every row.")
    cell = (width - 0.95) / len(titles)
    with styled_figure(width, cell * len(rows) + 0.3) as figure:
        figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
        grid = figure.subplots(len(rows), len(titles), squeeze=False)
        for (name, each), line in zip(rows.items(), grid, strict=True):
            for picture, axes in zip(each, line, strict=True):
                axes.imshow(picture.transpose(1, 2, 0), interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(False)
                axes.spines[:].set_visible(False)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=SMALL)
        for title, axes in zip(titles, grid[0], strict=True):
            axes.set_title(title, fontsize=SMALL)
        figure.caption = "One object in other colours (columns) and what comes back from ever deeper taps (rows)."
        figure.description = f"Grid of pictures: {', '.join(titles)} across; {', '.join(rows)} down."
        figure.shows_images = True
    return figure


# --------------------------------------------------------------------------------------------------------- curves


def response_curves(
    table: pd.DataFrame,
    measure: str = "hue_error_shown",
    category: str = "canonical",
    inverses: Sequence[str] | None = None,
    width: float = COLUMN_WIDTH,
) -> ShownFigure:
    """A measure against the hue shift, one line a tap (dark = shallow), a panel for each inverse and region.

    table: rows of 05_colour. Bands are 95 % intervals. Raises BacksightError where there is nothing to draw.
    """
    curve = rows_of(table, measure, perturbation="hue_shift", category=category)
    curve = curve[curve["hue_shift"].notna()]
    names = [name for name in families_of(curve) if inverses is None or name in inverses]
    curve = curve[curve["inverse"].isin(names)]
    if curve.empty:
        raise BacksightError(f"the table has no response curve of {measure} for {category}: run 05_colour for it.")
    regions = [region for region in ("object", "image") if region in set(curve["region"])]
    panels = [(target, name) for target in dict.fromkeys(curve["target"]) for name in names]
    taps = taps_in_order(curve)
    palette = {tap: colormaps["viridis"](0.92 * i / max(len(taps) - 1, 1)) for i, tap in enumerate(taps)}
    with styled_figure(width, 2.0 * len(panels) + 0.75) as figure:
        grid = figure.subplots(len(panels), len(regions), squeeze=False, sharex=True, sharey=True)
        for (target, name), line in zip(panels, grid, strict=True):
            for region, axes in zip(regions, line, strict=True):
                here = curve[(curve.target == target) & (curve.inverse == name) & (curve.region == region)]
                _draw_response(axes, here, palette)
                place = "object recoloured" if region == "object" else "whole image recoloured"
                axes.set_title(f"{target} · {inverse_name(name)}\n{place}", fontsize=SMALL)
        figure.supylabel(COLOUR_MEASURES.get(measure, measure), fontsize=NORMAL)
        figure.supxlabel("hue shift (degrees)", fontsize=NORMAL)
        handles = [Line2D([], [], color=palette[tap], label=tap) for tap in taps]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(taps), 5))
        label, which = COLOUR_MEASURES.get(measure, measure), CATEGORY_NAMES.get(category, category)
        figure.caption = f"{label}, by hue shift and tap; {which}; {_sizes(curve)}."
        figure.description = f"Curves of {label} over the hue shift, {which}. " + _extremes(curve)
    return figure


def _draw_response(axes: Axes, rows: pd.DataFrame, palette: Mapping[str, Any]) -> None:
    for tap, line in rows.groupby("tap", sort=False):
        line = line.sort_values("hue_shift")
        axes.plot(line["hue_shift"], line["value"], color=palette[str(tap)], linewidth=1.2)
        axes.fill_between(line["hue_shift"], line["low"], line["high"], color=palette[str(tap)], alpha=0.15, lw=0)
    axes.set_xticks(range(0, 360, 60))


def _extremes(rows: pd.DataFrame) -> str:
    told = []
    for (target, inverse), part in rows.groupby(["target", "inverse"], sort=False):
        taps = taps_in_order(part)
        means = part.groupby("tap")["value"].mean()
        told.append(
            f"{target}, {inverse}: mean {means[taps[0]]:.3g} at {taps[0]}, {means[taps[-1]]:.3g} at {taps[-1]}."
        )
    return " ".join(told)


def hues_by_depth(
    table: pd.DataFrame, measure: str = "share_keep", category: str = "canonical", width: float = COLUMN_WIDTH
) -> ShownFigure:
    """A measure by depth where the object is set to one hue: a line in that hue for each; dashed: owned by no class."""
    rows = rows_of(table, measure, perturbation="set_hue", region="object", category=category)
    names = families_of(rows)
    panels = [(target, name) for target in dict.fromkeys(rows["target"]) for name in names]
    hues = sorted(rows["amount"].unique())
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    with styled_figure(width, 2.1 * lines + 0.75) as figure:
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for (target, name), axes in zip(panels, grid, strict=False):
            here = rows[(rows.target == target) & (rows.inverse == name)]
            taps = taps_in_order(here)
            for place, hue in enumerate(hues):
                line = here[here["amount"] == hue].set_index("tap").reindex(taps)
                style = {"color": hue_colour(hue), "linestyle": "--" if hue in UNOWNED_HUES else "-"}
                places = np.arange(len(taps)) + 0.09 * (place - (len(hues) - 1) / 2)
                error = np.stack([line["value"] - line["low"], line["high"] - line["value"]]).clip(0)
                axes.errorbar(places, line["value"], error, marker="o", markersize=2.5, elinewidth=0.6, **style)
            _name_taps(axes, taps)
            axes.set_title(f"{target} · {inverse_name(name)}")
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        figure.supylabel(COLOUR_MEASURES.get(measure, measure), fontsize=NORMAL)
        handles = [
            Line2D([], [], color=hue_colour(hue), linestyle="--" if hue in UNOWNED_HUES else "-", label=f"{hue:.0f}°")
            for hue in hues
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(hues), title="object set to")
        which = CATEGORY_NAMES.get(category, category)
        figure.caption = f"{COLOUR_MEASURES[measure]} of objects set to one hue; {which}; {_sizes(rows)}."
        means = rows.groupby("amount")["value"].mean()
        told = "; ".join(f"{hue:.0f} degrees {means[hue]:.3g}" for hue in hues)
        figure.description = f"Lines by depth, one for each hue; means over taps and inverses: {told}."
    return figure


def _name_taps(axes: Axes, taps: Sequence[str]) -> None:
    axes.set_xticks(range(len(taps)), taps, rotation=40, ha="right", rotation_mode="anchor")


# --------------------------------------------------------------------------------------------- outcomes and index


def outcome_bars(table: pd.DataFrame, region: str = "object", width: float = COLUMN_WIDTH) -> ShownFigure:
    """Shares of objects that keep, revert, grey out or get another hue, over the whole circle of shifts, by depth.

    Rows of panels are inverses, columns the categories; a bar a tap. The line at the top of the keep and of the
    revert segment is that share's own 95 % interval. Counted are the cases whose hue shown is 60 degrees or more from
    the canonical one.
    """
    pooled: dict[str, Any] = {"perturbation": "hue_shift", "hue_shift": None, "region": region}
    rows = pd.concat([rows_of(table, f"share_{name}", **pooled) for name in OUTCOME_COLOURS])
    names = [*families_of(rows), *(["null_untrained"] if "null_untrained" in set(rows["inverse"]) else [])]
    rows = rows[rows["inverse"].isin(names)]
    rows = rows[(rows["inverse"] != "null_untrained") | (rows["family"] == "linear")]
    categories = [name for name in CATEGORY_NAMES if name in set(rows["category"])]
    panels = [(target, name) for target in dict.fromkeys(rows["target"]) for name in names]
    with styled_figure(width, 1.35 * len(panels) + 1.1) as figure:
        grid = figure.subplots(len(panels), len(categories), squeeze=False, sharey=True, sharex="col")
        for (target, name), line in zip(panels, grid, strict=True):
            for category, axes in zip(categories, line, strict=True):
                here = rows[(rows.target == target) & (rows.inverse == name) & (rows.category == category)]
                taps = _draw_stack(axes, here)
                axes.set_title(f"{target} · {inverse_name(name)}" if category == categories[0] else "", fontsize=SMALL)
                if (target, name) == panels[0]:
                    axes.set_title(f"{CATEGORY_NAMES[category]}\n{axes.get_title()}", fontsize=SMALL)
                _name_taps(axes, taps)
        figure.supylabel("share of objects", fontsize=NORMAL)
        handles = [Patch(color=colour, label=OUTCOME_NAMES[name]) for name, colour in OUTCOME_COLOURS.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=4)
        place = "the object's" if region == "object" else "the whole image's"
        figure.caption = (
            f"What becomes of the object when {place} hue is turned; black: intervals of the shares that keep and that "
            f"revert; {_sizes(rows)}."
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
            error = np.stack([value - share["low"], share["high"] - value]).clip(0)
            shift = -0.12 if name == "keep" else 0.12
            places = np.arange(len(taps)) + shift
            axes.errorbar(places, base + value, error, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
        base = base + np.nan_to_num(value)
    axes.set_ylim(0, 1.02)
    return taps


def reversion_by_depth(table: pd.DataFrame, region: str = "object", width: float = COLUMN_WIDTH) -> ShownFigure:
    """The reversion index by depth: a line an inverse, the untrained target dashed, the painter at 1.

    Thin dotted lines are the placebo: the index of colour-free classes towards a hue that they do not own.
    """
    rows = rows_of(table, "reversion_index", region=region)
    families = families_of(rows)
    targets = list(dict.fromkeys(rows["target"]))
    columns = min(2, len(targets))
    lines = -(-len(targets) // columns)
    painter = rows[(rows.inverse == "painter") & (rows.category == "canonical")]["value"].mean()
    with styled_figure(width, 2.4 * lines + 0.9) as figure:
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for target, axes in zip(targets, grid, strict=False):
            here = rows[(rows.target == target) & ~rows.inverse.isin(["painter", "null_mean"])]
            taps = taps_in_order(here)
            for name in families:
                _draw_line(axes, here, taps, name, "canonical", {"color": _colour(name), "marker": "o"})
                dotted = {"color": _colour(name), "linestyle": ":", "linewidth": 0.9}
                _draw_line(axes, here, taps, name, "colour_free", dotted, shade=0.06)
            untrained = here[here["family"] == "linear"]
            dashed = {"color": _NULL_COLOUR, "linestyle": "--", "linewidth": 1.1}
            _draw_line(axes, untrained, taps, "null_untrained", "canonical", dashed)
            axes.axhline(0, color="black", linewidth=0.6)
            if np.isfinite(painter):
                axes.axhline(painter, color=OUTCOME_COLOURS["revert"], linewidth=1)
            _name_taps(axes, taps)
            axes.set_title(target)
        for axes in grid[len(targets) :]:
            axes.set_visible(False)
        figure.supylabel(COLOUR_MEASURES["reversion_index"], fontsize=NORMAL)
        handles = [Line2D([], [], color=_colour(name), marker="o", label=inverse_name(name)) for name in families]
        handles += [
            Line2D([], [], color=_NULL_COLOUR, linestyle="--", label=inverse_name("null_untrained")),
            Line2D([], [], color="black", linestyle=":", linewidth=0.9, label="placebo (colour-free classes)"),
            Line2D([], [], color=OUTCOME_COLOURS["revert"], label=inverse_name("painter")),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
        drawn = rows[rows.inverse.isin(families) & (rows.category == "canonical")]
        figure.caption = f"Reversion to the canonical hue by depth; {_sizes(drawn)}."
        figure.description = "Lines by depth; 0 is a perfect inverse, 1 a painter. " + _extremes(drawn)
    return figure


def _colour(name: str) -> str:
    return "#ee7733" if name == "linear_uniform" else family_colour(name)


def _draw_line(
    axes: Axes,
    rows: pd.DataFrame,
    taps: Sequence[str],
    inverse: str,
    category: str,
    style: Mapping[str, Any],
    shade: float = 0.15,
) -> None:
    line = rows[(rows.inverse == inverse) & (rows.category == category)]
    if line.empty:
        return
    line = line.set_index("tap").reindex(list(taps))
    axes.plot(range(len(taps)), line["value"], **style)
    axes.fill_between(range(len(taps)), line["low"], line["high"], color=style["color"], alpha=shade, lw=0)


# --------------------------------------------------------------------------------------------------- the answers


def accuracy_curves(table: pd.DataFrame, width: float = COLUMN_WIDTH) -> ShownFigure:
    """The target's own accuracy: against the hue shift (left), under every other perturbation (right).

    Solid: the object is recoloured; dashed: the whole image. Colours are the two categories of classes. One row of
    panels for each target.
    """
    measures = [name for name in ("top1", "ap50") if name in set(table["measure"])]
    if not measures:
        raise BacksightError("the table holds neither top1 nor ap50: the target's answers were not judged.")
    rows = table[table["measure"].isin(measures)]
    targets = list(dict.fromkeys(rows["target"]))
    with styled_figure(width, 3.0 * len(targets) + 0.55) as figure:
        grid = figure.subplots(len(targets), 2, squeeze=False, width_ratios=[1.15, 1])
        for target, (left, right) in zip(targets, grid, strict=True):
            here = rows[rows["target"] == target]
            _draw_accuracy(left, here)
            labels = _draw_points(right, here)
            right.set_yticks(range(len(labels)), labels)
            right.invert_yaxis()
            measure = COLOUR_MEASURES[str(here["measure"].iloc[0])]
            left.set_title(target)
            left.set_ylabel(measure)
            left.set_xlabel("hue shift (degrees)")
            right.set_xlabel(measure)
        categories = [name for name in CATEGORY_NAMES if name in set(rows["category"])]
        handles = [
            Line2D([], [], color=_category_colour(c), label=CATEGORY_NAMES[c].split(" (")[0]) for c in categories
        ]
        handles += [
            Line2D([], [], color="black", marker="o", label="object recoloured"),
            Line2D([], [], color="black", marker="s", mfc="white", linestyle="--", label="whole image"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=2)
        figure.caption = f"The target's own accuracy under other colours; {_sizes(rows)} (a target has no such seed)."
        names = rows["target"] + " " + rows["category"] + " " + rows["perturbation"]
        told = rows["value"].groupby(names, sort=False).mean()
        figure.description = "; ".join(f"{key} {value:.3g}" for key, value in told.items()) + "."
    return figure


def _category_colour(category: str) -> str:
    return {"canonical": "#aa3377", "colour_free": "#228833"}.get(category, _NULL_COLOUR)


def _draw_accuracy(axes: Axes, rows: pd.DataFrame) -> None:
    curve = rows[(rows["perturbation"] == "hue_shift") & rows["hue_shift"].notna()]
    for (category, region), line in curve.groupby(["category", "region"], sort=False):
        line, colour = line.sort_values("hue_shift"), _category_colour(str(category))
        axes.plot(line["hue_shift"], line["value"], color=colour, linestyle="-" if region == "object" else "--")
        axes.fill_between(line["hue_shift"], line["low"], line["high"], color=colour, alpha=0.1, lw=0)
    axes.set_xticks(range(0, 360, 60))
    axes.set_ylim(0, 1.02)


def _order(amount: float) -> str:
    return "".join("RGB"[channel] for channel in PERMUTATIONS[int(amount)])


def _draw_points(axes: Axes, rows: pd.DataFrame) -> list[str]:
    """Intervals of the perturbations that are no hue shift, one line a perturbation; returns their names."""
    rows = rows[rows["perturbation"] != "hue_shift"]
    rows = rows.assign(
        label=[
            KIND_NAMES[kind].format(amount=amount, order=_order(amount) if kind == "channels" else "")
            for kind, amount in zip(rows["perturbation"], rows["amount"], strict=True)
        ]
    )
    labels = list(dict.fromkeys(rows["label"]))
    offsets = {"object": -0.1, "image": 0.1}
    for (category, region), part in rows.groupby(["category", "region"], sort=False):
        colour = _category_colour(str(category))
        lift = offsets[str(region)] + (-0.2 if category == "canonical" else 0.2)
        places = [labels.index(label) + lift for label in part["label"]]
        error = np.stack([part["value"] - part["low"], part["high"] - part["value"]]).clip(0)
        face = colour if region == "object" else "white"
        axes.errorbar(
            part["value"],
            places,
            xerr=error,
            fmt="o" if region == "object" else "s",
            color=colour,
            mfc=face,
            ms=3,
            lw=0.8,
        )
    axes.set_xlim(0, 1.02)
    return labels
