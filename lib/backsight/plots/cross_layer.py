"""Figures of 04_cross_layer: matrices of taps, the loss by layer distance, half-steps, and the grid of pictures.

All but the grid are drawn from the tidy rows of metrics.csv alone.
"""

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from backsight.errors import BacksightError
from backsight.plots.grids import OWN_COLOUR, bare, decibels
from backsight.plots.style import (
    COLUMN_WIDTH,
    INVERSE_NAMES,
    NULL_COLOUR,
    SMALL,
    UNTRAINED_DASHES,
    ShownFigure,
    draw_band,
    is_null,
    legend_above,
    legend_line,
    measure_name,
    one_target,
    panels_of,
    reach,
    sample_size,
    styled_figure,
    target_colour,
)
from backsight.tables.names import SLOPES

_INVERSES: Mapping[str, str] = {**INVERSE_NAMES, "null_shuffled": "null: other image's tokens"}
_MATRICES = {"cka": "features", "procrustes": "features", "token_cosine": "features", "predictability_r2": "linear"}
_COMPONENTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "block": ("whole layer", {"color": "#3c3c3c", "marker": "o"}),
    "attention": ("attention", {"color": "#e8a33d", "marker": "s"}),
    "cross_attention": ("cross-attention", {"color": "#b05a9c", "marker": "D"}),
    "mlp": ("MLP", {"color": "#4a8fb8", "marker": "^"}),
}
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.2)))
_DOTTED: Mapping[str, Any] = MappingProxyType({"linestyle": UNTRAINED_DASHES, "linewidth": 1.1})


def short_tap(tap: str) -> str:
    """A tap's name as it fits beside a cell: `encoder.layers.1.attn` as `enc 1.attn`, `blocks.3` as `3`."""
    name = re.sub(r"^(encoder|decoder)\.layers\.", lambda found: found[1][:3] + " ", tap)
    name = re.sub(r"^blocks\.(?=\d)", "", name)
    name = re.sub(r"^layers\.(\d+)\.blocks\.", r"\1.", name)
    return {"patch_embed": "embed", "decoder.layernorm": "dec norm", "predictions": "pred"}.get(name, name)


def tap_matrix(rows: pd.DataFrame) -> pd.DataFrame:
    """The values of tidy rows as a table, source taps down and target taps across, shallow to deep."""
    depths = dict(zip(rows["source_tap"], rows["depth"], strict=True))
    taps = sorted(dict.fromkeys([*rows["source_tap"], *rows["target_tap"]]), key=lambda tap: depths.get(tap, np.inf))
    wide = rows.pivot_table(index="source_tap", columns="target_tap", values="value", sort=False)
    return wide.reindex(index=taps, columns=taps)


def _matrix_rows(metrics: pd.DataFrame, measure: str, inverse: str) -> pd.DataFrame:
    chosen = metrics[(metrics["measure"] == measure) & (metrics["inverse"] == inverse)]
    return one_target(chosen[chosen["source_tap"].notna() & (chosen["component"] == "block")])


def cross_matrix(metrics: pd.DataFrame, measure: str = "cross_psnr") -> ShownFigure:
    """PSNR from the representation of tap i (down) through the inverse made for tap j (across), a panel an inverse.

    metrics: tidy rows of one target; drawn are all families and nulls that have a whole matrix. A cell gives the value
    and, where there is room, half the width of its 95 % interval; the diagonal, outlined, is the plain reconstruction.
    All panels share one scale of colours. Empty: the two taps do not have one form.
    """
    at = metrics[(metrics["measure"] == measure) & (metrics["source_tap"] != metrics["target_tap"])]
    inverses = sorted(dict.fromkeys(at.loc[at["component"] == "block", "inverse"]), key=lambda n: ("null_" in n, n))
    panels = {name: _matrix_rows(metrics, measure, name) for name in inverses}
    if not panels:
        raise BacksightError(f"the table has no matrix of {measure}: give metrics.csv of 04_cross_layer.")
    every = pd.concat(panels.values())
    limits = float(every["value"].min()), float(every["value"].max())
    columns = min(2, len(panels))
    down, side = -(-len(panels) // columns), COLUMN_WIDTH / columns
    with styled_figure(COLUMN_WIDTH, side * 0.95 * down + 0.2) as figure:
        for axes, (name, rows) in zip(panels_of(figure, len(panels), columns), panels.items(), strict=True):
            image = draw_matrix(axes, rows, limits, side)
            axes.set_title(_INVERSES.get(name, name))
        figure.colorbar(image, ax=figure.axes, label=measure_name(measure), shrink=0.7 / down**0.5, aspect=25)
        half = (every["high"] - every["low"]) / 2
        figure.caption = (
            f"{every['target'].iloc[0]}: PSNR of the representation of one tap through the inverse made for another, "
            f"± half the 95 % interval (here {half.min():.1f} to {half.max():.1f} dB); outlined: its own inverse. "
            f"{sample_size(every)}."
        )
        figure.description = " ".join(_matrix_in_words(name, tap_matrix(rows)) for name, rows in panels.items())
    return figure


def similarity_matrices(metrics: pd.DataFrame) -> ShownFigure:
    """CKA, Procrustes, cosine and linear predictability side by side; below, the same of the nulls.

    metrics: tidy rows of one target. Rows of panels: the target, the untrained architecture, tokens of another image.
    Symmetric but for predictability, which reads: tap i (down) predicts tap j (across). All share the scale 0 to 1;
    lower values are drawn as 0. In the cells: hundredths, where they are two digits and have room.
    """
    own = {measure: _matrix_rows(metrics, measure, inverse) for measure, inverse in _MATRICES.items()}
    own = {measure: rows for measure, rows in own.items() if len(rows)}
    if not own:
        raise BacksightError("the table has no similarity of taps: give metrics.csv of 04_cross_layer.")
    lines = {"the target": own}
    for null in ("null_untrained", "null_shuffled"):
        of_null = {measure: _matrix_rows(metrics, measure, null) for measure in own}
        if any(map(len, of_null.values())):
            lines[_INVERSES[null].removeprefix("null: ")] = of_null
    every = pd.concat(own.values())
    order = tap_matrix(every).index
    cell = COLUMN_WIDTH / len(own)
    with styled_figure(COLUMN_WIDTH, (cell * 0.8 + 0.1) * len(lines) + 0.55) as figure:
        grid = figure.subplots(len(lines), len(own), squeeze=False, sharex=True, sharey=True)
        told = []
        for row, (label, tables) in zip(grid, lines.items(), strict=True):
            for axes, (measure, rows) in zip(row, tables.items(), strict=True):
                if label == "the target":
                    axes.set_title(measure_name(measure))
                if not len(rows):
                    axes.set_axis_off()
                    style = {"ha": "center", "color": NULL_COLOUR, "size": SMALL}
                    axes.text(0.5, 0.5, "not defined", transform=axes.transAxes, **style)
                    continue
                matrix = tap_matrix(rows).reindex(index=order, columns=order)
                image = _draw_cells(axes, matrix, (0.0, 1.0), "cividis", None, cell)
                told.append(_matrix_in_words(f"{label}, {measure}", tap_matrix(rows)))
            row[0].set_ylabel(label)
        figure.colorbar(image, ax=grid, shrink=0.6, aspect=30, pad=0.01)
        figure.caption = (
            f"{metrics['target'].iloc[0]}: how alike every two taps are, by four measures; below, nulls. "
            f"R²: tap down predicts tap across. In the cells: hundredths, from 0 to 99. {sample_size(every)}."
        )
        figure.description = " ".join(told)
    return figure


def draw_matrix(axes: Axes, rows: pd.DataFrame, limits: tuple[float, float], inches: float, what: str = "") -> Any:
    """A matrix of PSNR between taps, each cell with half its interval; inches: of the panel's side; what: a tap holds.

    Returns the image, for a colour bar."""
    half = tap_matrix(rows.assign(value=(rows["high"] - rows["low"]) / 2))
    image = _draw_cells(axes, tap_matrix(rows), limits, "viridis", half, inches)
    axes.set(xlabel="inverse made for tap", ylabel=f"{what or 'representation'} of tap")
    return image


def _draw_cells(
    axes: Axes,
    matrix: pd.DataFrame,
    limits: tuple[float, float],
    colours: str,
    half: pd.DataFrame | None,
    inches: float,
) -> Any:
    """half: half-widths of intervals; None for a share in [0, 1]."""
    taps, values = list(matrix.index), matrix.to_numpy(float)
    axes.grid(False)
    axes.set_facecolor("#f4f4f4")
    image = axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="equal")
    room = inches * 72 * 0.7 / len(taps)  # points a cell has; 12.3 needs 18 of them, 12 and hundredths 9
    middle = limits[0] + 0.55 * (limits[1] - limits[0])
    for (row, column), value in np.ndenumerate(values) if room >= 9 else ():
        # Of a share: its hundredths, where they are two digits.
        if np.isnan(value) or (half is None and not 0 <= round(100 * value) < 100):
            continue
        text = f"{100 * value:.0f}" if half is None else f"{value:.{int(room >= 18)}f}"
        if half is not None and room >= 18:
            text += f"\n±{half.to_numpy(float)[row, column]:.1f}"
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALL, "linespacing": 0.95}
        axes.text(column, row, text, color="white" if value < middle else "black", **style)
    for place in range(len(taps)) if half is not None else ():
        outline = Rectangle((place - 0.5, place - 0.5), 1, 1, fill=False, edgecolor=OWN_COLOUR, linewidth=1.2)
        axes.add_patch(outline).set_clip_on(False)
    every = math.ceil(7.5 / room)  # taps a label, so that labels do not touch
    names = [short_tap(tap) for tap in taps][::every]
    axes.set_xticks(range(0, len(taps), every), names, rotation=90)
    axes.set_yticks(range(0, len(taps), every), names)
    axes.tick_params(length=0)
    return image


def _matrix_in_words(name: str, matrix: pd.DataFrame) -> str:
    values = matrix.to_numpy(float)
    apart = ~np.eye(len(values), dtype=bool) & ~np.isnan(values)
    own = np.diagonal(values)[~np.isnan(np.diagonal(values))]
    told = f"diagonal {own.min():.3g} to {own.max():.3g}, " if len(own) else ""
    elsewhere = f"elsewhere {values[apart].min():.3g} to {values[apart].max():.3g}" if apart.any() else ""
    return f"{name}: {told}{elsewhere}."


def cross_grid(image: Any, pictures: Mapping[tuple[str, str], Any]) -> ShownFigure:
    """One image: from the representation of every tap (down) through the inverse made for every tap (across).

    image: (3, H, W) in [0, 1], tensor or array, shown at the top left; pictures: {(source tap, target tap):
    (3, H, W)}; the PSNR in dB is written into the corner of each. Pairs that are absent are left empty; taps that read
    nothing but their own representation are left out.
    """
    apart = {tap for pair in pictures if pair[0] != pair[1] for tap in pair}
    taps = [tap for tap in dict.fromkeys(tap for pair in pictures for tap in pair) if tap in apart]
    if not taps:
        raise BacksightError("there is no cross-application to draw: no two of the taps have one form.")
    left, top, gap = 0.62, 0.5, 0.03
    cell = min((COLUMN_WIDTH - left) / len(taps) - gap, 0.9)
    shape = np.shape(image)[1] / np.shape(image)[2]
    tall = cell * shape
    width, height = left + len(taps) * (cell + gap), top + len(taps) * (tall + gap) + 0.02
    with styled_figure(width, height, layout=None) as figure:

        def draw(x: float, y: float, picture: Any, wide: float = cell) -> Axes:
            high = wide * shape
            axes = figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))
            axes.imshow(np.clip(_array(picture).transpose(1, 2, 0), 0, 1), interpolation="nearest", aspect="auto")
            bare(axes)
            return axes

        def write(x: float, y: float, text: str, **options: Any) -> None:
            style: dict[str, Any] = {"fontsize": SMALL, "ha": "center", "va": "center"} | options
            figure.text(x / width, 1 - y / height, text, **style)

        draw(0.1, 0.04, image, min(0.36, tall))
        write(left + len(taps) * (cell + gap) / 2, 0.1, "inverse made for tap")
        write(0.06, top + len(taps) * (tall + gap) / 2, "representation of tap", rotation=90)
        for place, tap in enumerate(taps):
            name = short_tap(tap).replace("rojection", "roj.")
            write(left + place * (cell + gap) + cell / 2, top - 0.1, name)
            write(left - 0.05, top + place * (tall + gap) + tall / 2, name, ha="right")
        for (source, wanted), picture in pictures.items():
            if source not in taps or wanted not in taps:
                continue
            x, y = left + taps.index(wanted) * (cell + gap), top + taps.index(source) * (tall + gap)
            axes = draw(x, y, picture)
            if cell > 0.4:
                text = f"{decibels(_array(image)[None], _array(picture)[None])[0]:.0f}"
                box = {"facecolor": "white", "alpha": 0.75, "pad": 0.6, "edgecolor": "none"}
                style: dict[str, Any] = {"ha": "right", "va": "bottom", "fontsize": SMALL, "bbox": box}
                axes.text(0.97, 0.04, text, transform=axes.transAxes, **style)
            if source == wanted:
                for spine in axes.spines.values():
                    spine.set(visible=True, linewidth=1.5, color=OWN_COLOUR)
        figure.caption = (
            "One image (top left): the representation of each tap (down) through the inverse made for each tap "
            "(across), with the PSNR in dB; outlined: its own inverse."
        )
        figure.description = f"Grid of {len(pictures)} reconstructions between the taps {', '.join(taps)}."
        figure.shows_images = True
    return figure


def _array(picture: Any) -> np.ndarray:
    return np.asarray(picture.detach().cpu() if hasattr(picture, "detach") else picture, np.float32)


def decay_curve(metrics: pd.DataFrame) -> ShownFigure:
    """dB lost by reading a representation with the inverse of another layer, by the distance between the layers.

    metrics: tidy rows of one or several targets; a panel for each inverse family, a line for each target and group
    with its 95 % band, the untrained architecture dotted in the same colour. Slopes (dB a layer, with intervals) in
    the legend.
    """
    rows = metrics[metrics["measure"] == "cross_loss"]
    families = list(dict.fromkeys(rows.loc[~is_null(rows), "inverse"]))
    if not families:
        raise BacksightError(
            "the table has no cross_loss: give metrics.csv of 04_cross_layer with two taps of a stack."
        )
    slopes = metrics[metrics["measure"] == "decay_slope"]
    lines = list(dict.fromkeys(zip(rows["target"], rows["group"], strict=True)))
    several = rows["target"].nunique() > 1
    looks: dict[tuple[str, str], dict[str, Any]] = {}
    told: dict[tuple[str, str], list[str]] = {}
    for number, (target, group) in enumerate(lines):
        # One target: groups differ in colour; several: colour is the target, the dashes are the group.
        place = [name for owner, name in lines if owner == target].index(group)
        colour = target_colour(target) if several or not place else "#44aa99"
        looks[target, group] = {"color": colour, "linestyle": _DASHES[place], "marker": "os^Dv"[number % 5]}
    with styled_figure(COLUMN_WIDTH, 2.7 + 0.17 * len(lines)) as figure:
        panels = panels_of(figure, len(families), len(families), sharey=True)
        for axes, family in zip(panels, families, strict=True):
            name = INVERSE_NAMES.get(family, family)
            for (target, group), look in looks.items():
                at = rows[(rows["target"] == target) & (rows["group"] == group)].sort_values("distance")
                line = at[at["inverse"] == family]
                if line.empty:
                    continue
                null = at[(at["inverse"] == "null_untrained") & (at["family"] == family)]
                draw_band(axes, line["distance"], line, **look)
                axes.plot(null["distance"], null["value"], color=look["color"], **_DOTTED)
                of = (slopes["target"] == target) & (slopes["group"] == group) & (slopes["inverse"] == family)
                told.setdefault((target, group), []).extend(
                    f"{name} {row.value:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in slopes[of][:1].itertuples()
                )
            axes.axhline(0, color=NULL_COLOUR, linewidth=0.6)
            axes.set(title=name, xlabel="distance between layers |i - j|")
            axes.set_xticks(range(int(rows["distance"].max()) + 1))
        labels = {key: f"{key[0]}, {key[1]}: {', '.join(texts or ['no slope'])}" for key, texts in told.items()}
        handles = [legend_line(label, **looks[key]) for key, label in labels.items()]
        handles.append(legend_line(_INVERSES["null_untrained"], color=NULL_COLOUR, **_DOTTED))
        largest = f" up to distance {slopes['distance'].max():.0f}" if len(slopes) else ""
        legend_above(figure, handles, 1, loc="outside lower center", title=f"slope in dB a layer{largest}")
        panels[0].set_ylabel("PSNR lost (dB)")
        figure.caption = (
            "PSNR lost by the inverse of a layer so many layers away, with 95 % intervals; dotted: untrained. "
            f"{sample_size(rows)}."
        )
        figure.description = f"Curves of the loss by layer distance. {'; '.join(labels.values())}."
    return figure


def half_step_curves(metrics: pd.DataFrame) -> ShownFigure:
    """Attention and MLP steps by depth: their size, how alike they leave the tokens, what they cost an inverse.

    metrics: tidy rows of one target. Panels: residual_update (of whole layers too), 1 - CKA of before and after, and
    step_loss, each with its 95 % interval; dotted: the untrained architecture.
    """
    names = {
        "residual_update": "relative update ‖f(x)‖ / ‖x‖",
        "cka": "1 - CKA, before and after",
        "step_loss": "PSNR lost by the inverse\nmade before the step (dB)",
    }
    ends = {"residual_update": "tap", "cka": "target_tap", "step_loss": "source_tap"}
    steps = metrics["component"].isin(["attention", "cross_attention", "mlp"])
    chosen = metrics[steps | ((metrics["measure"] == "residual_update") & (metrics["component"] == "block"))]
    measures = [name for name in names if name in set(chosen["measure"])]
    if not measures:
        raise BacksightError("the table has no step between taps: give metrics.csv of 04_cross_layer.")
    components = {name: look for name, look in _COMPONENTS.items() if name in set(chosen["component"])}
    order = metrics[metrics["measure"] == "residual_update"].sort_values("depth")["tap"].map(_layer_of)
    with styled_figure(COLUMN_WIDTH, 2.7) as figure:
        for axes, measure in zip(panels_of(figure, len(measures), 3), measures, strict=True):
            at = chosen[(chosen["measure"] == measure) & (chosen["inverse"] != "null_shuffled")]
            at = at.assign(layer=at[ends[measure]].map(_layer_of))
            if measure == "cka":
                at = at.assign(value=1 - at["value"], low=1 - at["high"], high=1 - at["low"])
            layers = [layer for layer in dict.fromkeys(order) if layer in set(at["layer"])]
            at = at.assign(x=at["layer"].map(layers.index)).sort_values("x")
            untrained = at["inverse"] == "null_untrained"
            for component, (_, look) in components.items():
                of = at["component"] == component
                # Lines do not join stacks (encoder, decoder, blocks).
                for _, line in at[of & ~untrained].groupby("group", sort=False):
                    axes.errorbar(line["x"], line["value"], yerr=reach(line), capsize=1.5, **look)
                for _, line in at[of & untrained].groupby("group", sort=False):
                    axes.plot(line["x"], line["value"], color=look["color"], **_DOTTED)
            # An untrained first step can be many times its input (DETR's projection is near 0): it may leave the panel.
            highest, lowest = float(at.loc[~untrained, "high"].max()), min(0.0, float(at["low"].min()))
            axes.set_ylim(lowest - 0.04 * highest, min(axes.get_ylim()[1], 1.5 * highest))
            axes.set_xticks(range(len(layers)), [short_tap(layer) for layer in layers], rotation=60)
            axes.set(ylabel=names[measure], xlabel="layer, shallow → deep")
        handles = [legend_line(label, **look) for label, look in components.values()]
        handles.append(legend_line(_INVERSES["null_untrained"], color=NULL_COLOUR, **_DOTTED))
        legend_above(figure, handles, len(handles))
        figure.caption = (
            f"{metrics['target'].iloc[0]}: attention and MLP steps by depth, with 95 % intervals; dotted: untrained "
            f"(may leave the panel). {sample_size(chosen)}."
        )
        means = chosen[(chosen["inverse"] == "features") & (chosen["measure"] == "residual_update")]
        told = [f"{name} {value:.2f}" for name, value in means.groupby("component")["value"].mean().items()]
        figure.description = f"Curves by depth; mean relative update: {', '.join(told)}."
    return figure


def _layer_of(tap: str) -> str:
    """The block that a half-step belongs to."""
    return re.sub(r"\.(attn|cross_attn)$", "", str(tap))


def slope_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """The decay of each group, one row for each group and inverse, one column for each slope: value [low, high]."""
    rows = metrics[metrics["measure"].isin(list(SLOPES))]
    rows = rows.assign(text=[f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in rows.itertuples()])
    order = [name for name in SLOPES if name in set(rows["measure"])]
    wide = rows.pivot_table(index=["group", "inverse"], columns="measure", values="text", aggfunc="first", sort=False)
    return wide[order].fillna("")
