"""Figures of 04_cross_layer: matrices of taps, the loss by layer distance, half-steps, and the grid of pictures.

All but the grid are drawn from the tidy rows of metrics.csv alone.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from backsight.errors import BacksightError
from backsight.plots.style import (
    COLUMN_WIDTH,
    INVERSE_NAMES,
    SMALL,
    ShownFigure,
    _psnr,
    styled_figure,
    target_colour,
)
from backsight.tables.names import SLOPES

MEASURES: Mapping[str, str] = {
    "cross_psnr": "PSNR (dB)",
    "cross_psnr_standardised": "PSNR (dB), channels standardised",
    "cka": "CKA (debiased)",
    "procrustes": "Procrustes similarity",
    "token_cosine": "cosine of tokens",
    "predictability_r2": "R², linear",
}
_INVERSES: Mapping[str, str] = {**INVERSE_NAMES, "features": "features", "null_shuffled": "null: other image's tokens"}
_MATRICES = (
    ("cka", "features"),
    ("procrustes", "features"),
    ("token_cosine", "features"),
    ("predictability_r2", "linear"),
)
_NULL_MATRICES = ("null_untrained", "null_shuffled")
_DASHES = {"null_untrained": (1, 1.5), "null_shuffled": (3, 1.5)}
_COMPONENTS: Mapping[str, tuple[str, str, str]] = {
    "block": ("whole layer", "#3c3c3c", "o"),
    "attention": ("attention", "#e8a33d", "s"),
    "cross_attention": ("cross-attention", "#b05a9c", "D"),
    "mlp": ("MLP", "#4a8fb8", "^"),
}
_LINES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.2)))
_MARKERS = ("o", "s", "^", "D", "v")


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


def sample_size(rows: pd.DataFrame) -> str:
    """ "n = 100 images; 3 training seeds." of tidy rows, as ranges where they differ."""

    def span(numbers: pd.Series) -> str:
        low, high = int(numbers.min()), int(numbers.max())
        return f"{low}" if low == high else f"{low} to {high}"

    seeds = span(rows["seeds"].fillna(1))
    return f"n = {span(rows['n'])} images; {seeds} training seed{'' if seeds == '1' else 's'}."


def _matrix_rows(metrics: pd.DataFrame, measure: str, inverse: str) -> pd.DataFrame:
    chosen = metrics[(metrics["measure"] == measure) & (metrics["inverse"] == inverse)]
    chosen = chosen[chosen["source_tap"].notna() & (chosen["component"] == "block")]
    if "target" in chosen and chosen["target"].nunique() > 1:
        raise BacksightError(
            f"the table holds {measure} of {', '.join(chosen['target'].unique())}: select one target's rows first."
        )
    return chosen


def cross_matrix(
    metrics: pd.DataFrame,
    inverses: Sequence[str] | None = None,
    measure: str = "cross_psnr",
    width: float = COLUMN_WIDTH,
) -> ShownFigure:
    """PSNR from the representation of tap i (down) through the inverse made for tap j (across), a panel an inverse.

    metrics: tidy rows of one target; inverses: default all families and nulls that have a whole matrix. A cell gives
    the value and, where there is room, half the width of its 95 % interval; the diagonal, outlined, is the plain
    reconstruction. All panels share one scale of colours. Empty: the two taps do not have one form.
    """
    if inverses is None:
        at = metrics[(metrics["measure"] == measure) & (metrics["source_tap"] != metrics["target_tap"])]
        at = at[at["component"] == "block"]
        inverses = sorted(dict.fromkeys(at["inverse"]), key=lambda name: (name.startswith("null_"), name))
    panels = {name: _matrix_rows(metrics, measure, name) for name in inverses}
    panels = {name: rows for name, rows in panels.items() if len(rows)}
    if not panels:
        raise BacksightError(f"the table has no matrix of {measure}: give metrics.csv of 04_cross_layer.")
    first = next(iter(panels.values()))
    columns = min(2, len(panels))
    down = -(-len(panels) // columns)
    values = np.concatenate([rows["value"].to_numpy(float) for rows in panels.values()])
    limits = float(np.nanmin(values)), float(np.nanmax(values))
    with styled_figure(width, (width / columns * 0.95) * down + 0.2) as figure:
        grid = figure.subplots(down, columns, squeeze=False).flatten()
        for empty in grid[len(panels) :]:
            empty.set_axis_off()
        for axes, (name, rows) in zip(grid, panels.items(), strict=False):
            reach = rows.assign(value=(rows["high"] - rows["low"]) / 2)
            image = _draw_matrix(axes, tap_matrix(rows), limits, "viridis", tap_matrix(reach), width / columns)
            axes.set_title(_INVERSES.get(name, name))
            axes.set_xlabel("inverse made for tap")
            axes.set_ylabel("representation of tap")
        every = pd.concat(panels.values())
        half = (every["high"] - every["low"]) / 2
        figure.colorbar(image, ax=list(grid), label=MEASURES.get(measure, measure), shrink=0.7 / down**0.5, aspect=25)
        figure.caption = (
            f"{first['target'].iloc[0]}: PSNR of the representation of one tap through the inverse made for another, "
            f"± half the 95 % interval (here {half.min():.1f} to {half.max():.1f} dB); outlined: its own inverse. "
            + sample_size(every)
        )
        figure.description = " ".join(_matrix_in_words(name, tap_matrix(rows)) for name, rows in panels.items())
    return figure


def similarity_matrices(metrics: pd.DataFrame, width: float = COLUMN_WIDTH) -> ShownFigure:
    """CKA, Procrustes, cosine and linear predictability side by side; below, the same of the nulls.

    metrics: tidy rows of one target. Rows of panels: the target, the untrained architecture, tokens of another image.
    Symmetric but for predictability, which reads: tap i (down) predicts tap j (across). All share the scale 0 to 1;
    lower values are drawn as 0. In the cells: hundredths, where they
    are two digits and have room.
    """
    shown = [pair for pair in _MATRICES if len(_matrix_rows(metrics, *pair))]
    if not shown:
        raise BacksightError("the table has no similarity of taps: give metrics.csv of 04_cross_layer.")
    lines: list[tuple[str, list[pd.DataFrame]]] = []
    for null in ("", *_NULL_MATRICES):
        tables = [_matrix_rows(metrics, measure, null or inverse) for measure, inverse in shown]
        if any(len(table) for table in tables):
            lines.append((_INVERSES[null].removeprefix("null: ") if null else "the target", tables))
    order = tap_matrix(pd.concat(_matrix_rows(metrics, *pair) for pair in shown)).index
    cell = width / len(shown)
    with styled_figure(width, (cell * 0.8 + 0.1) * len(lines) + 0.55) as figure:
        grid = figure.subplots(len(lines), len(shown), squeeze=False, sharex=True, sharey=True)
        for row, (label, tables) in enumerate(lines):
            for column, (table, (measure, _)) in enumerate(zip(tables, shown, strict=True)):
                axes = grid[row, column]
                if row == 0:
                    axes.set_title(MEASURES[measure])
                if not len(table):
                    axes.set_axis_off()
                    axes.text(
                        0.5, 0.5, "not defined", transform=axes.transAxes, ha="center", color="#5f5f5f", size=SMALL
                    )
                    continue
                matrix = tap_matrix(table).reindex(index=order, columns=order)
                image = _draw_matrix(axes, matrix, (0.0, 1.0), "cividis", None, cell)
            grid[row, 0].set_ylabel(label)
        figure.colorbar(image, ax=grid, shrink=0.6, aspect=30, pad=0.01)
        figure.caption = (
            f"{metrics['target'].iloc[0]}: how alike every two taps are, by four measures; below, nulls. "
            "R²: tap down predicts tap across. In the cells: hundredths, from 0 to 99. "
            + sample_size(pd.concat(_matrix_rows(metrics, *pair) for pair in shown))
        )
        told = [
            _matrix_in_words(f"{label}, {measure}", tap_matrix(table))
            for label, tables in lines
            for table, (measure, _) in zip(tables, shown, strict=True)
            if len(table)
        ]
        figure.description = " ".join(told)
    return figure


def _draw_matrix(
    axes: Axes,
    matrix: pd.DataFrame,
    limits: tuple[float, float],
    colours: str,
    half: pd.DataFrame | None,
    inches: float,
) -> Any:
    """half: half-widths of intervals; None for a share in [0, 1]."""
    taps = list(matrix.index)
    values = matrix.to_numpy(float)
    axes.grid(False)
    axes.set_facecolor("#f4f4f4")
    image = axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="equal")
    room = inches * 72 * 0.7 / len(taps)  # points a cell has; 12.3 needs 18 of them, 12 and hundredths 9
    as_share = half is None
    if room >= 9:
        middle = limits[0] + 0.55 * (limits[1] - limits[0])
        for (row, column), value in np.ndenumerate(values):
            # Of a share: its hundredths, where they are two digits.
            if np.isnan(value) or (as_share and not 0 <= round(100 * value) < 100):
                continue
            text = f"{100 * value:.0f}" if as_share else f"{value:.{int(room >= 18)}f}"
            if half is not None and room >= 18:
                text += f"\n±{half.to_numpy(float)[row, column]:.1f}"
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALL, "linespacing": 0.95}
            axes.text(column, row, text, color="white" if value < middle else "black", **style)
    if half is not None:
        for place in range(len(taps)):
            box = axes.add_patch(_outline(place))
            box.set_clip_on(False)
    every = math.ceil(7.5 / room)  # taps a label, so that labels do not touch
    names = [short_tap(tap) for tap in taps][::every]
    axes.set_xticks(range(0, len(taps), every), names, rotation=90)
    axes.set_yticks(range(0, len(taps), every), names)
    axes.tick_params(length=0)
    return image


def _outline(place: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((place - 0.5, place - 0.5), 1, 1, fill=False, edgecolor="#d55e00", linewidth=1.2)


def _matrix_in_words(name: str, matrix: pd.DataFrame) -> str:
    values = matrix.to_numpy(float)
    apart = ~np.eye(len(values), dtype=bool) & ~np.isnan(values)
    own = np.diagonal(values)[~np.isnan(np.diagonal(values))]
    told = f"diagonal {own.min():.3g} to {own.max():.3g}, " if len(own) else ""
    elsewhere = f"elsewhere {values[apart].min():.3g} to {values[apart].max():.3g}" if apart.any() else ""
    return f"{name}: {told}{elsewhere}."


def cross_grid(
    image: Any,
    pictures: Mapping[tuple[str, str], Any],
    width: float = COLUMN_WIDTH,
) -> ShownFigure:
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
    cell = min((width - left) / len(taps) - gap, 0.9)
    tall = cell * np.shape(image)[1] / np.shape(image)[2]
    across = left + len(taps) * (cell + gap)
    height = top + len(taps) * (tall + gap) + 0.02
    with styled_figure(across, height, layout=None) as figure:

        def draw(x: float, y: float, picture: Any, wide: float = cell, high: float = tall) -> Axes:
            axes = figure.add_axes((x / across, 1 - (y + high) / height, wide / across, high / height))
            axes.imshow(np.clip(_array(picture).transpose(1, 2, 0), 0, 1), interpolation="nearest", aspect="auto")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)
            for spine in axes.spines.values():
                spine.set_visible(False)
            return axes

        small = min(0.36, tall)
        draw(0.1, 0.04, image, small, small * np.shape(image)[1] / np.shape(image)[2])
        _write(figure, across, height, left + len(taps) * (cell + gap) / 2, 0.1, "inverse made for tap")
        _write(figure, across, height, 0.06, top + len(taps) * (tall + gap) / 2, "representation of tap", rotation=90)
        for place, tap in enumerate(taps):
            name = short_tap(tap).replace("rojection", "roj.")
            _write(figure, across, height, left + place * (cell + gap) + cell / 2, top - 0.1, name)
            _write(figure, across, height, left - 0.05, top + place * (tall + gap) + tall / 2, name, ha="right")
        for (source, wanted), picture in pictures.items():
            if source not in taps or wanted not in taps:
                continue
            x, y = left + taps.index(wanted) * (cell + gap), top + taps.index(source) * (tall + gap)
            axes = draw(x, y, picture)
            if cell > 0.4:
                style: dict[str, Any] = {"facecolor": "white", "alpha": 0.75, "pad": 0.6, "edgecolor": "none"}
                axes.text(
                    0.97,
                    0.04,
                    f"{_psnr(_array(image)[None], _array(picture)[None])[0]:.0f}",
                    transform=axes.transAxes,
                    ha="right",
                    va="bottom",
                    fontsize=SMALL,
                    bbox=style,
                )
            if source == wanted:
                for spine in axes.spines.values():
                    spine.set(visible=True, linewidth=1.5, color="#d55e00")
        figure.caption = (
            "One image (top left): the representation of each tap (down) through the inverse made for each tap "
            "(across), with the PSNR in dB; outlined: its own inverse."
        )
        figure.description = f"Grid of {len(pictures)} reconstructions between the taps {', '.join(taps)}."
        figure.shows_images = True
    return figure


def _array(picture: Any) -> np.ndarray:
    return np.asarray(picture.detach().cpu() if hasattr(picture, "detach") else picture, np.float32)


def _write(figure: Figure, width: float, height: float, x: float, y: float, text: str, **options: Any) -> None:
    style: dict[str, Any] = {"fontsize": SMALL, "ha": "center", "va": "center"} | options
    figure.text(x / width, 1 - y / height, text, **style)


def decay_curve(
    metrics: pd.DataFrame, measure: str = "cross_loss", width: float = COLUMN_WIDTH, height: float = 2.7
) -> ShownFigure:
    """dB lost by reading a representation with the inverse of another layer, by the distance between the layers.

    metrics: tidy rows of one or several targets; a panel for each inverse family, a line for each target and group
    with its 95 % band, the untrained architecture dotted in the same colour. Slopes (dB a layer, with intervals) in
    the legend.
    """
    rows = metrics[metrics["measure"] == measure]
    families = [name for name in dict.fromkeys(rows["inverse"]) if not str(name).startswith("null_")]
    if rows.empty or not families:
        raise BacksightError(
            f"the table has no {measure}: give metrics.csv of 04_cross_layer with two taps of a stack."
        )
    slopes = metrics[metrics["measure"] == measure.replace("cross_loss", "decay_slope")]
    lines = list(dict.fromkeys(zip(rows["target"], rows["group"], strict=True)))
    targets = list(dict.fromkeys(rows["target"]))
    with styled_figure(width, height + 0.17 * len(lines)) as figure:
        panels = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
        told: dict[tuple[str, str], list[str]] = {}
        looks: dict[tuple[str, str], dict[str, Any]] = {}
        for axes, family in zip(panels, families, strict=True):
            for number, (target, group) in enumerate(lines):
                # One target: groups differ in colour; several: colour is the target, the dashes are the group.
                groups = list(dict.fromkeys(each for name, each in lines if name == target))
                place = groups.index(group)
                colour = target_colour(target) if len(targets) > 1 or not place else "#44aa99"
                dash = _LINES[place]
                at = rows[(rows["target"] == target) & (rows["group"] == group)]
                line = at[at["inverse"] == family].sort_values("distance")
                null = at[(at["inverse"] == "null_untrained") & (at["family"] == family)].sort_values("distance")
                if line.empty:
                    continue
                marker = _MARKERS[number % len(_MARKERS)]
                axes.plot(line["distance"], line["value"], color=colour, linestyle=dash, marker=marker)
                axes.fill_between(line["distance"], line["low"], line["high"], color=colour, alpha=0.18, linewidth=0)
                axes.plot(null["distance"], null["value"], color=colour, linestyle=(0, (1, 1.5)), linewidth=1.1)
                slope = slopes[
                    (slopes["target"] == target) & (slopes["group"] == group) & (slopes["inverse"] == family)
                ]
                looks[target, group] = {"color": colour, "linestyle": dash, "marker": marker}
                if len(slope):
                    found = slope.iloc[0]
                    text = f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
                    told.setdefault((target, group), []).append(f"{INVERSE_NAMES.get(family, family)} {text}")
            axes.axhline(0, color="#5f5f5f", linewidth=0.6)
            axes.set_title(INVERSE_NAMES.get(family, family))
            axes.set_xlabel("distance between layers |i - j|")
            axes.set_xticks(range(int(rows["distance"].max()) + 1))
        labels = {
            (target, group): f"{target}, {group}: {', '.join(told.get((target, group), ['no slope']))}"
            for target, group in looks
        }
        handles = [Line2D([], [], label=labels[each], **look) for each, look in looks.items()]
        handles.append(Line2D([], [], color="#5f5f5f", linestyle=(0, (1, 1.5)), label=_INVERSES["null_untrained"]))
        largest = f" up to distance {slopes['distance'].max():.0f}" if len(slopes) else ""
        figure.legend(handles=handles, loc="outside lower center", ncols=1, title=f"slope in dB a layer{largest}")
        panels[0].set_ylabel("PSNR lost (dB)")
        figure.caption = (
            "PSNR lost by the inverse of a layer so many layers away, with 95 % intervals; dotted: untrained. "
            + sample_size(rows)
        )
        figure.description = f"Curves of the loss by layer distance. {'; '.join(labels.values())}."
    return figure


def half_step_curves(metrics: pd.DataFrame, width: float = COLUMN_WIDTH, height: float = 2.4) -> ShownFigure:
    """Attention and MLP steps by depth: their size, how alike they leave the tokens, what they cost an inverse.

    metrics: tidy rows of one target. Panels: residual_update (of whole layers too), 1 - CKA of before and after, and
    step_loss, each with its 95 % interval; dotted: the untrained architecture.
    """
    names = {
        "residual_update": "relative update ‖f(x)‖ / ‖x‖",
        "cka": "1 - CKA, before and after",
        "step_loss": "PSNR lost by the inverse\nmade before the step (dB)",
    }
    steps = metrics["component"].isin(["attention", "cross_attention", "mlp"])
    chosen = metrics[steps | ((metrics["measure"] == "residual_update") & (metrics["component"] == "block"))]
    measures = [name for name in names if name in set(chosen["measure"])]
    if not measures:
        raise BacksightError("the table has no step between taps: give metrics.csv of 04_cross_layer.")
    components = [name for name in _COMPONENTS if name in set(chosen["component"])]
    with styled_figure(width, height + 0.3) as figure:
        panels = figure.subplots(1, len(measures), squeeze=False)[0]
        for axes, measure in zip(panels, measures, strict=True):
            at = chosen[(chosen["measure"] == measure) & (chosen["inverse"] != "null_shuffled")]
            end = at["tap"] if measure == "residual_update" else at["target_tap" if measure == "cka" else "source_tap"]
            at = at.assign(layer=[_layer_of(tap) for tap in end])
            if measure == "cka":
                at = at.assign(value=1 - at["value"], low=1 - at["high"], high=1 - at["low"])
            order = metrics[metrics["measure"] == "residual_update"].sort_values("depth")["tap"]
            layers = [each for each in dict.fromkeys(_layer_of(tap) for tap in order) if each in set(at["layer"])]
            for component in components:
                _, colour, marker = _COMPONENTS[component]
                for null in (False, True):
                    line = (
                        at[(at["component"] == component) & (at["inverse"] == "null_untrained")]
                        if null
                        else at[(at["component"] == component) & (at["inverse"] != "null_untrained")]
                    )
                    for part in _stacks(line, layers):
                        x = [layers.index(layer) for layer in part["layer"]]
                        if null:
                            axes.plot(x, part["value"], color=colour, linestyle=(0, (1, 1.5)), linewidth=1.1)
                            continue
                        reach = [part["value"] - part["low"], part["high"] - part["value"]]
                        axes.errorbar(x, part["value"], yerr=np.abs(reach), color=colour, marker=marker, capsize=1.5)
            # An untrained first step can be many times its input (DETR's projection is near 0): it may leave the panel.
            highest = float(at.loc[at["inverse"] != "null_untrained", "high"].max())
            lowest = min(0.0, float(at["low"].min()))
            axes.set_ylim(lowest - 0.04 * highest, min(axes.get_ylim()[1], 1.5 * highest))
            axes.set_xticks(range(len(layers)), [short_tap(layer) for layer in layers], rotation=60)
            axes.set_ylabel(names[measure])
            axes.set_xlabel("layer, shallow → deep")
        handles = [
            Line2D([], [], color=_COMPONENTS[name][1], marker=_COMPONENTS[name][2], label=_COMPONENTS[name][0])
            for name in components
        ]
        handles.append(Line2D([], [], color="#5f5f5f", linestyle=(0, (1, 1.5)), label=_INVERSES["null_untrained"]))
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        figure.caption = (
            f"{metrics['target'].iloc[0]}: attention and MLP steps by depth, with 95 % intervals; dotted: untrained "
            "(may leave the panel). " + sample_size(chosen)
        )
        means = chosen[(chosen["inverse"] == "features") & (chosen["measure"] == "residual_update")]
        told = [f"{name} {value:.2f}" for name, value in means.groupby("component")["value"].mean().items()]
        figure.description = f"Curves by depth; mean relative update: {', '.join(told)}."
    return figure


def _layer_of(tap: str) -> str:
    """The block that a half-step belongs to."""
    return re.sub(r"\.(attn|cross_attn)$", "", tap)


def _stacks(rows: pd.DataFrame, layers: Sequence[str]) -> list[pd.DataFrame]:
    """The rows by stack (encoder, decoder, blocks), each in forward order: lines do not join stacks."""
    ordered = rows.assign(place=[layers.index(layer) for layer in rows["layer"]]).sort_values("place")
    return [part for _, part in ordered.groupby("group", sort=False)]


def slope_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """The decay of each group, one row for each group and inverse, one column for each slope: value [low, high]."""
    rows = metrics[metrics["measure"].isin(list(SLOPES))].copy()
    rows["text"] = [
        f"{value:.2f} [{low:.2f}, {high:.2f}]"
        for value, low, high in zip(rows["value"], rows["low"], rows["high"], strict=True)
    ]
    order = [name for name in SLOPES if name in set(rows["measure"])]
    wide = rows.pivot_table(index=["group", "inverse"], columns="measure", values="text", aggfunc="first", sort=False)
    return wide[order].fillna("")
