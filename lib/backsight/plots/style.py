"""Figures from arrays and tidy tables: every function returns a matplotlib Figure and changes no global state.

Colours mean the same thing everywhere: one for each inverse family (FAMILY_COLOURS), other ones for targets
(target_colour). Figures are 6.5 inches wide, a text column, and no text is smaller than 7 points.
"""

import io
import math
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import zip_longest
from types import MappingProxyType
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from backsight.errors import BacksightError

COLUMN_WIDTH = 6.5  # inches
PICTURES = "pictures"  # the Comment of a PNG that shows images
SMALL, NORMAL = 7.0, 8.0  # points

# seaborn's "colorblind" palette and two of Paul Tol's; families and targets never share a colour.
FAMILY_COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "linear": "#0173b2",
        "direct": "#de8f05",
        "modular": "#029e73",
        "modular_polished": "#cc78bc",
        "map": "#000000",
        "exact": "#8c510a",
    }
)
TARGET_COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "scenes-vit": "#d55e00",
        "scenes-deit": "#882255",
        "scenes-swin": "#ca9161",
        "scenes-detr": "#56b4e9",
        "scenes-deformable-detr": "#332288",
    }
)
_OTHER_COLOURS = ("#949494", "#ece133", "#fbafe4", "#44aa99")
_FAMILY_MARKERS: Mapping[str, str] = MappingProxyType(
    {"linear": "o", "direct": "s", "modular": "^", "modular_polished": "D", "map": "P", "exact": "X"}
)
_NULL_DASHES: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {"null_mean": (6, 2), "null_shuffled": (3, 1.5), "null_untrained": (1, 1.5)}
)
_NULL_COLOUR = "#5f5f5f"
INVERSE_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "linear": "linear",
        "direct": "direct",
        "modular": "modular",
        "modular_polished": "modular, polished",
        "map": "most probable (MAP)",
        "exact": "exact",
        "null_mean": "null: mean image",
        "null_shuffled": "null: other image",
        "null_untrained": "null: untrained target",
    }
)
MEASURE_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "psnr": "PSNR (dB)",
        "psnr_objects": "PSNR inside objects (dB)",
        "ssim": "SSIM (1 = identical)",
        "r2": "R² (share of variance)",
        "mse": "mean squared error (range²)",
        "feature_cosine": "cosine of features (1 = equal)",
        "hue_error": "hue error (degrees)",
        "delta_e": "colour difference ΔE",
        "edge_f1": "edge F1 (1 = all edges)",
        "mask_iou": "mask IoU (1 = identical)",
        "top1_agreement": "top-1 agreement (share of images)",
        "map50": "mAP50 (0 to 1)",
        "top1": "top-1 accuracy (share of images)",
        "ap50": "AP50 (0 to 1)",
        "ap": "AP (0 to 1)",
    }
)
_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "mathtext.fontset": "dejavusans",
    "font.size": NORMAL,
    "axes.labelsize": NORMAL,
    "axes.titlesize": NORMAL,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "backsight",
}


def family_colour(family: str) -> str:
    """The colour of an inverse family, the same in every figure."""
    if family.startswith("null_"):
        return _NULL_COLOUR
    return FAMILY_COLOURS.get(family) or _stable_choice(family)


def target_colour(target: str) -> str:
    """The colour of a target, the same in every figure that compares targets; other targets get one by their name."""
    return TARGET_COLOURS.get(target) or _stable_choice(target)


def _stable_choice(name: str) -> str:
    return _OTHER_COLOURS[crc32(name.encode()) % len(_OTHER_COLOURS)]


def inverse_order(names: Sequence[str]) -> list[str]:
    """Inverse names in the order of every figure and table: known families, other families, nulls."""
    known = list(INVERSE_NAMES)
    rank = {name: known.index(name) for name in known}
    return sorted(set(names), key=lambda name: (name.startswith("null_"), rank.get(name, len(known)), name))


class ShownFigure(Figure):
    """A Figure that a notebook shows by itself, without pyplot: nothing is registered, nothing is shown twice.

    caption (one line, for everybody) and description (for those who cannot see it: what is drawn, and the main
    numbers) travel in PNG and SVG files as Title and Description; a PNG that shows_images, not numbers, has the
    Comment PICTURES. There the report reads them.
    """

    caption: str = ""
    description: str = ""
    shows_images: bool = False

    def savefig(self, fname: Any, **options: Any) -> None:
        is_path = isinstance(fname, (str, os.PathLike))
        suffix = os.path.splitext(fname)[1][1:] if is_path else ""
        kind = (options.get("format") or suffix or "png").lower()
        if kind in ("png", "svg"):
            said = {"Title": self.caption, "Description": self.description}
            if kind == "png" and self.shows_images:
                said["Comment"] = PICTURES
            options["metadata"] = {key: text for key, text in said.items() if text} | (options.get("metadata") or {})
        super().savefig(fname, **options)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        width, height = self.get_size_inches() * 100
        return png_bytes(self), {"width": round(width), "height": round(height)}


def png_bytes(figure: Figure, dpi: int = 200) -> bytes:
    """The figure as PNG without date or writer: equal figures are equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def styled_figure(width: float, height: float, layout: str | None = "constrained") -> Iterator[ShownFigure]:
    """A new figure in our style, in inches.

    It is laid out before the style is left (ticks read it as late as that), and once: every later drawing, for a file
    or for the notebook, would lay it out anew, to the same places and for half of its time.
    """
    with rc_context(_STYLE):
        figure = ShownFigure(figsize=(width, height), layout=layout)  # type: ignore[arg-type]
        yield figure
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


# ------------------------------------------------------------------------------------------------- curves by depth


def depth_curves(
    metrics: pd.DataFrame,
    measure: str = "psnr",
    inverses: Sequence[str] | None = None,
    width: float = COLUMN_WIDTH,
    panel_height: float = 2.3,
) -> ShownFigure:
    """A measure by depth: one line for each inverse family with its 95 % band, nulls dashed.

    metrics: tidy rows (METRIC_COLUMNS). Columns of panels are targets (with their weights where these differ), rows
    are data sets and splits. With several seeds the line is their mean, the faint points are the seeds, and the band
    covers all of their intervals. inverses: which to draw, default all. width, panel_height: inches.
    Raises BacksightError for an unknown measure or inverse, and where two rows claim one point of one seed.
    """
    rows = _rows_of(metrics, measure, inverses)
    several_weights = rows.groupby("target")["weights"].nunique().max() > 1
    rows["panel"] = rows["target"] + (" (" + rows["weights"].astype(str) + ")" if several_weights else "")
    targets = list(dict.fromkeys(rows["panel"]))
    datasets = list(dict.fromkeys(zip(rows["dataset"], rows["split"], strict=True)))
    names = inverse_order(list(rows["inverse"]))
    with styled_figure(width, panel_height * len(datasets) + 0.75) as figure:
        grid = figure.subplots(len(datasets), len(targets), squeeze=False, sharey=True)
        for (row, column), axes in np.ndenumerate(grid):
            dataset, split = datasets[row]
            axes.set_title(f"{targets[column]} · {dataset}, {split}")
            at = (rows["panel"] == targets[column]) & (rows["dataset"] == dataset) & (rows["split"] == split)
            if at.any():
                _draw_curves(axes, rows[at], names)
            else:
                axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=_NULL_COLOUR)
                axes.set_xticks([])
            if column == 0:
                axes.set_ylabel(MEASURE_NAMES.get(measure, measure))
        figure.supxlabel("tap, shallow → deep", fontsize=NORMAL)
        _legend_in_two_rows(figure, names)
        label = MEASURE_NAMES.get(measure, measure)
        figure.caption = "Lines are inverses with their 95 % intervals; dashed lines are nulls."
        ends = [_ends(part) for _, part in rows.groupby(["panel", "dataset", "split"], sort=False)]
        figure.description = f"Curves of {label} by depth, one for each inverse. " + " ".join(ends)
    return figure


def _rows_of(metrics: pd.DataFrame, measure: str, inverses: Sequence[str] | None) -> pd.DataFrame:
    """A copy of the rows that belong to a measure (and to some inverses) and have a tap."""
    needed = ("target", "weights", "dataset", "split", "tap", "depth", "inverse", "measure", "value", "low", "high")
    if missing := [column for column in (*needed, "seed") if column not in metrics.columns]:
        raise BacksightError(f"the table lacks the columns {', '.join(missing)}: give rows of a metrics.csv.")
    rows = _only(metrics, "measure", [measure])
    rows = rows[rows["tap"].notna() & rows["value"].notna()]
    if inverses is not None:
        rows = _only(rows, "inverse", inverses)
    if rows.empty:
        raise BacksightError(f"the table has no value of {measure} at any tap: choose another measure.")
    rows = rows.copy()
    rows[["dataset", "split"]] = rows[["dataset", "split"]].astype(object).fillna("unnamed")
    keys = ["target", "weights", "dataset", "split", "tap", "inverse", "seed"]
    if (twice := rows.duplicated(keys)).any():
        first = rows[twice].iloc[0]
        raise BacksightError(
            f"the table holds several values of {measure} for {first.inverse} at {first.tap} of {first.target} on "
            f"{first.dataset} with seed {first.seed}: select the rows of one run or of one perturbation first."
        )
    return rows


def _only(rows: pd.DataFrame, column: str, wanted: Sequence[str]) -> pd.DataFrame:
    present = [str(value) for value in dict.fromkeys(rows[column].dropna())]
    for value in wanted:
        if value not in present:
            nearest = get_close_matches(value, present) or present
            raise BacksightError(f"the table has no {column} {value!r}; it has {', '.join(nearest) or 'none'}.")
    return rows[rows[column].isin(list(wanted))]


def taps_in_order(rows: pd.DataFrame) -> list[str]:
    """The taps of tidy rows by depth, in the order of the table where depths are equal."""
    return list(dict.fromkeys(rows.sort_values("depth", kind="stable")["tap"]))


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each tap and inverse: value is the mean over seeds, low and high cover the interval of every seed.

    rows: tidy rows of one measure, target and data set. Returns columns tap, inverse, value, low, high, n, seeds
    (n: images behind each seed's value, the smallest).
    """
    groups = rows.groupby(["tap", "inverse"], sort=False)
    aggregates = {"value": "mean", "low": "min", "high": "max", "n": "min", "seed": "nunique"}
    return groups.agg(aggregates).rename(columns={"seed": "seeds"}).reset_index()


def _ends(rows: pd.DataFrame) -> str:
    """A panel in words: each inverse at the first and at the last tap that it has."""
    order = taps_in_order(rows)
    first = rows.iloc[0]
    told = []
    for name in inverse_order(list(rows["inverse"])):
        values = over_seeds(rows[rows["inverse"] == name]).set_index("tap")["value"]
        taps = [tap for tap in order if tap in values.index]
        told.append(f"{name} {values[taps[0]]:.3g} at {taps[0]}, {values[taps[-1]]:.3g} at {taps[-1]}")
    return f"{first['panel']} on {first['dataset']}, {first['split']}: {'; '.join(told)}."


def _draw_curves(axes: Axes, rows: pd.DataFrame, names: Sequence[str]) -> None:
    taps = taps_in_order(rows)
    place = {tap: x for x, tap in enumerate(taps)}
    means = over_seeds(rows)
    for name in names:
        line = means[means["inverse"] == name]
        line = line.assign(x=line["tap"].map(place)).sort_values("x")
        if line.empty:
            continue
        axes.plot(line["x"], line["value"], **_line_style(name))
        if name.startswith("null_"):
            continue
        axes.fill_between(line["x"], line["low"], line["high"], color=family_colour(name), alpha=0.18, linewidth=0)
        if line["seeds"].max() > 1:
            points = rows[rows["inverse"] == name]
            axes.scatter(points["tap"].map(place), points["value"], s=7, color=family_colour(name), alpha=0.35)
    axes.set_xticks(range(len(taps)), taps, rotation=40, ha="right", rotation_mode="anchor")
    axes.margins(x=0.03)


def _line_style(name: str) -> dict[str, Any]:
    style: dict[str, Any] = {"color": family_colour(name)}
    if name.startswith("null_"):
        return style | {"linestyle": (0, _NULL_DASHES.get(name, (4, 1, 1, 1))), "linewidth": 1.1}
    return style | {"marker": _FAMILY_MARKERS.get(name, "v")}


def _legend_in_two_rows(figure: Figure, names: Sequence[str]) -> None:
    """Families in the first row, nulls in the second; a legend is filled by columns, hence the pairs."""
    families = [name for name in names if not name.startswith("null_")]
    nulls = [name for name in names if name.startswith("null_")]
    rows = [row for row in (families, nulls) if row]
    blank = Line2D([], [], linestyle="none", label=" ")
    handles = [_legend_line(name) if name else blank for column in zip_longest(*rows) for name in column]
    figure.legend(handles=handles, loc="outside upper center", ncols=max(map(len, rows)), handlelength=2.8)


def _legend_line(name: str) -> Line2D:
    return Line2D([], [], label=INVERSE_NAMES.get(name, name), **_line_style(name))


# -------------------------------------------------------------------------------------------------- grids of images


@dataclass(frozen=True)
class _Row:
    """A row of a grid: the (3, H, W) input, {tap: (3, H, W)} and {tap: text under it}."""

    label: str
    colour: str
    image: np.ndarray
    pictures: Mapping[str, np.ndarray]
    captions: Mapping[str, str]


def reconstruction_grid(
    images: Any,
    reconstructions: Mapping[str, Any],
    titles: Sequence[str] | None = None,
    captions: Mapping[str, Any] | None = None,
    width: float = COLUMN_WIDTH,
) -> ShownFigure:
    """Images as rows; the input and its reconstruction from every tap, shallow to deep, as columns.

    images: (B, 3, H, W) in [0, 1], tensor or array; reconstructions: {tap: (B, 3, H, W)} in forward order.
    titles: one name for each image. captions: {tap: PSNR in dB, one number or (B,)}; default: computed for each
    picture; {} for none. Many taps continue in further blocks of rows, so that pictures stay large enough to see.
    Raises BacksightError where shapes disagree or values leave [0, 1].
    """
    inputs = _pixels(images, "images")
    if titles is not None and len(titles) != len(inputs):
        raise BacksightError(f"{len(inputs)} images need as many titles, not {len(titles)}.")
    made = {tap: _pixels(values, tap, inputs.shape) for tap, values in reconstructions.items()}
    if not made:
        raise BacksightError("there is no reconstruction to draw: give at least one tap.")
    if captions is None:
        captions = {tap: _psnr(inputs, values) for tap, values in made.items()}
    texts = {
        tap: [f"{value:.1f} dB" for value in np.broadcast_to(np.asarray(values, float), len(inputs))]
        for tap, values in captions.items()
    }
    rows = [
        _Row(
            label=titles[i] if titles is not None else "",
            colour="black",
            image=inputs[i],
            pictures={tap: values[i] for tap, values in made.items()},
            captions={tap: values[i] for tap, values in texts.items()},
        )
        for i in range(len(inputs))
    ]
    figure = _picture_grid(rows, list(made), width)
    figure.caption = "Each row is one image: the input, then what was rebuilt from ever deeper taps, with its PSNR."
    return figure


def family_grid(
    image: Any, reconstructions: Mapping[str, Mapping[str, Any]], width: float = COLUMN_WIDTH
) -> ShownFigure:
    """One image, from every tap (columns) by every inverse family (rows), with the PSNR of each picture in dB.

    image: (3, H, W) in [0, 1], tensor or array; reconstructions: {family: {tap: (3, H, W)}} in forward order.
    A family that lacks a tap leaves its place empty.
    Raises BacksightError where shapes disagree or values leave [0, 1].
    """
    original = _pixels(image, "image", dimensions=3)
    rows = []
    for family in inverse_order(list(reconstructions)):
        pictures = {
            tap: _pixels(values, f"{family} at {tap}", original.shape, dimensions=3)
            for tap, values in reconstructions[family].items()
        }
        captions = {tap: f"{_psnr(original[None], made[None])[0]:.1f} dB" for tap, made in pictures.items()}
        rows.append(_Row(family, family_colour(family), original, pictures, captions))
    taps = _merged_order([list(pictures) for pictures in reconstructions.values()])
    if not taps:
        raise BacksightError("there is no reconstruction to draw: give at least one family with one tap.")
    figure = _picture_grid(rows, taps, width)
    figure.caption = "One image, rebuilt from ever deeper taps (columns) by each inverse (rows), with the PSNR."
    return figure


def _merged_order(sequences: Sequence[Sequence[str]]) -> list[str]:
    """All names once, so that the order of each sequence is kept where the sequences agree with one another."""
    merged: list[str] = []
    for sequence in sequences:
        place = 0
        for name in sequence:
            if name in merged:
                place = merged.index(name) + 1
            else:
                merged.insert(place, name)
                place += 1
    return merged


def _pixels(values: Any, name: str, shape: tuple[int, ...] | None = None, dimensions: int = 4) -> np.ndarray:
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.ndim != dimensions or array.shape[-3] != 3:
        form = "(B, 3, H, W)" if dimensions == 4 else "(3, H, W)"
        raise BacksightError(f"{name}: pictures have the shape {form}, not {array.shape}.")
    if shape is not None and array.shape != shape:
        raise BacksightError(f"{name}: the shape is {array.shape}, but the images have {shape}.")
    if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):
        raise BacksightError(
            f"{name}: pictures are numbers in [0, 1], not {array.dtype} in [{array.min():.4g}, {array.max():.4g}]."
        )
    return array.astype(np.float32)


def _psnr(images: np.ndarray, made: np.ndarray) -> np.ndarray:
    """(B,) what stands below a picture, in dB, as measures.pixels.psnr has it."""
    error = np.square(images - made).reshape(len(images), -1).mean(1)
    return -10 * np.log10(np.maximum(error, 1e-10))


_MOST_COLUMNS = 12  # at 6.5 inches a picture is then half an inch wide, and a tap's name still fits above it


def _picture_grid(rows: Sequence[_Row], taps: Sequence[str], width: float) -> ShownFigure:
    """Place every picture by hand: in inches, so that captions keep their size whatever the number of pictures."""
    blocks = math.ceil(len(taps) / (_MOST_COLUMNS - 1))
    across = math.ceil(len(taps) / blocks)
    left = 0.34 if any(row.label for row in rows) else 0.02
    gap, caption, between = 0.05, 0.17 if any(row.captions for row in rows) else 0.05, 0.16
    cell = (width - left - 0.02) / (across + 1) - gap
    tall = cell * rows[0].image.shape[1] / rows[0].image.shape[2]
    names = {tap: _broken(tap, cell) for tap in taps}
    header = 0.25 + 0.12 * max(len(lines) for lines in names.values())
    block = header + len(rows) * (tall + caption)
    height = blocks * block + (blocks - 1) * between + 0.02

    with styled_figure(width, height, layout=None) as figure:

        def write(x: float, y: float, text: str, **options: Any) -> None:
            figure.text(x / width, 1 - y / height, text, **{"fontsize": SMALL, "ha": "center", **options})

        def draw(x: float, y: float, picture: np.ndarray) -> None:
            box = (x / width, 1 - (y + tall) / height, cell / width, tall / height)
            axes = figure.add_axes(box)
            axes.imshow(picture.transpose(1, 2, 0), interpolation="nearest", aspect="auto", vmin=0, vmax=1)
            axes.set_axis_off()

        for number in range(blocks):
            shown = taps[number * across : (number + 1) * across]
            top = number * (block + between)
            middle = left + (cell + gap) * (1 + len(shown) / 2)
            write(middle, top + 0.03, "reconstructed from tap, shallow → deep", va="top", color=_NULL_COLOUR)
            write(left + cell / 2, top + header - 0.05, "input", va="baseline", weight="bold")
            for column, tap in enumerate(shown, start=1):
                x = left + column * (cell + gap) + cell / 2
                for line, text in enumerate(reversed(names[tap])):
                    write(x, top + header - 0.05 - 0.12 * line, text, va="baseline")
            for line, row in enumerate(rows):
                y = top + header + line * (tall + caption)
                label = _fitted(row.label, tall + caption)
                write(0.16, y + tall / 2, label, rotation=90, va="center", color=row.colour, weight="bold")
                draw(left, y, row.image)
                for column, tap in enumerate(shown, start=1):
                    x = left + column * (cell + gap)
                    if tap in row.pictures:
                        draw(x, y, row.pictures[tap])
                    write(x + cell / 2, y + tall + 0.02, row.captions.get(tap, ""), va="top")
        figure.description = _grid_in_words(rows, taps)
        figure.shows_images = True
    return figure


def _grid_in_words(rows: Sequence[_Row], taps: Sequence[str]) -> str:
    told = []
    for number, row in enumerate(rows, start=1):
        found = [f"{row.captions[tap]} from {tap}" for tap in taps if tap in row.captions]
        if found:
            told.append(f"{row.label or f'row {number}'}: {', '.join(dict.fromkeys((found[0], found[-1])))}")
    start = f"Grid of pictures, {len(rows)} rows: the input, then reconstructions from {', '.join(taps)}."
    return f"{start} {'; '.join(told)}." if told else start


def _broken(tap: str, inches: float) -> list[str]:
    """A tap's name as the lines that stay within its column, broken after dots and underscores."""
    most = int(inches / 0.06)
    lines = [""]
    for part in re.findall(r"[^._]+[._]?", tap):
        if lines[-1] and len(lines[-1] + part.rstrip(".")) > most:
            lines.append("")
        lines[-1] += part
    return [line.removesuffix(".") for line in lines]


def _fitted(label: str, inches: float) -> str:
    """A row's label on at most two lines, cut where it would run into the next row's."""
    most = max(6, int(inches / 0.066))
    words = [word if len(word) <= most else word[: most - 1] + "…" for word in label.replace("_", " ").split()]
    return textwrap.fill(" ".join(words), most, max_lines=2, placeholder="…")


# ------------------------------------------------------------------------------------------- training and scores


def training_curves(history: pd.DataFrame, width: float = COLUMN_WIDTH, height: float = 2.8) -> ShownFigure:
    """The loss of every module by step, on a logarithmic scale: lines in training, points on the validation split.

    history: columns step, module, split ("train" or "validation"), loss, seconds, as training.train returns.
    Modules are coloured by their order, first to last. width, height: inches.
    """
    import seaborn

    if missing := [c for c in ("step", "module", "split", "loss", "seconds") if c not in history.columns]:
        raise BacksightError(f"the history lacks the columns {', '.join(missing)}: give what training.train returns.")
    if history.empty:
        raise BacksightError("the history has no rows: nothing was trained.")
    modules = list(dict.fromkeys(history["module"]))
    colours = seaborn.color_palette("viridis", len(modules) + 1)[: len(modules)]  # the last, yellow, is too pale
    with styled_figure(width, height) as figure:
        axes = figure.subplots()
        for module, colour in zip(modules, colours, strict=True):
            rows = history[history["module"] == module]
            trained, validated = rows[rows["split"] == "train"], rows[rows["split"] != "train"]
            axes.plot(trained["step"], trained["loss"], color=colour, linewidth=0.9, label=module)
            axes.plot(validated["step"], validated["loss"], "o", color=colour, markersize=3)
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (mean squared error)")
        axes.set_title(f"{history['step'].max():,.0f} steps in {history['seconds'].max():,.0f} s")
        kinds = [
            Line2D([], [], color=_NULL_COLOUR, linewidth=0.9, label="training"),
            Line2D([], [], color=_NULL_COLOUR, marker="o", markersize=3, linestyle="none", label="validation"),
        ]
        handles, _ = axes.get_legend_handles_labels()
        columns = math.ceil((len(handles) + len(kinds)) / 16)
        figure.legend(handles=[*kinds, *handles], loc="outside right upper", ncols=columns)
        figure.caption = "Loss of every module by training step: lines in training, points on the validation split."
        last = history[history["step"] == history["step"].max()].drop_duplicates("module", keep="last")
        ends = [f"{module} {loss:.3g}" for module, loss in zip(last["module"], last["loss"], strict=True)]
        figure.description = f"Curves of the loss by step; at step {history['step'].max():,}: {', '.join(ends)}."
    return figure


def card_scores(card: Mapping[str, Any]) -> pd.DataFrame:
    """The scores of a model card (card.json, made by recipes.score_target) as a table.

    Returns columns rule ("mixed": the classes' typical hues; "uniform": any hue), measure, classes ("all",
    "canonical", "colour-free" or one class), value, low, high, n; low and high are NaN where there is no interval.
    Raises BacksightError where the card has no such scores.
    """
    scores = pd.DataFrame(card.get("scores") or [])
    if missing := [c for c in ("rule", "measure", "classes", "value") if c not in scores.columns]:
        raise BacksightError(
            f"the card of {card.get('target', 'a target')} has no scores with {', '.join(missing)}: run 01_targets."
        )
    return scores.reindex(columns=["rule", "measure", "classes", "value", "low", "high", "n"])


_RULE_NAMES = MappingProxyType({"mixed": "typical hue", "uniform": "any hue"})


def class_scores(card: Mapping[str, Any], hues: Mapping[str, float | None], width: float = COLUMN_WIDTH) -> ShownFigure:
    """Horizontal bars for each class of `scenes`: the score with the typical hues, and with uniformly random hues.

    card: a model card (see card_scores), of which the first measure is drawn; hues: {class: its canonical hue in
    degrees, or None}, in the order of the bars. Classes with a
    canonical hue and colour-free ones stand apart; whiskers are 95 % intervals where the card has them; dashed and
    dotted lines are the scores over all classes.
    """
    scores = card_scores(card)
    measure = str(scores["measure"].iloc[0])
    scores = scores[scores["measure"] == measure]
    table = scores.pivot_table(index="classes", columns="rule", values="value")
    classes = [name for name in hues if name in table.index]
    if not classes or "mixed" not in table or "uniform" not in table:
        raise BacksightError("the card has no scores of single classes with both colour rules: run 01_targets.")
    free = [name for name in classes if hues[name] is None]
    owned = [name for name in classes if hues[name] is not None]
    places = {name: float(place) for place, name in enumerate(owned)}
    places |= {name: place + len(owned) + 0.8 for place, name in enumerate(free)}
    colour = target_colour(str(card.get("target", "")))
    look: dict[str, dict[str, Any]] = {"mixed": {"color": colour}, "uniform": {"color": colour, "alpha": 0.4}}
    dashes = {"mixed": (0, (6, 2)), "uniform": (0, (1, 1.5))}
    with styled_figure(width, 0.27 * len(classes) + 1.1) as figure:
        axes = figure.subplots()
        for rule, shift in (("mixed", -0.19), ("uniform", 0.19)):
            values = table.loc[classes, rule].to_numpy(float)
            where = [places[name] + shift for name in classes]
            axes.barh(where, values, height=0.36, label=f"{_RULE_NAMES[rule]}, each class", **look[rule])
            at = scores[scores["rule"] == rule].set_index("classes").loc[classes]
            reach = np.abs(np.stack([values - at["low"].to_numpy(float), at["high"].to_numpy(float) - values]))
            axes.errorbar(values, where, xerr=reach, fmt="none", ecolor="0.35", elinewidth=0.7, capsize=1.5)
            if "all" in table.index:
                whole = float(table[rule]["all"])
                label = f"{_RULE_NAMES[rule]}, all classes: {whole:.3f}"
                axes.axvline(whole, color="black", linewidth=0.9, linestyle=dashes[rule], label=label)
        labels = [f"{name} ({hues[name]:.0f}°)" if name in owned else f"{name} (any hue)" for name in classes]
        axes.set_yticks([places[name] for name in classes], labels)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlim(0, 1)
        axes.set_xlabel(MEASURE_NAMES.get(measure, measure))
        axes.set_ylabel("class (its canonical hue)")
        figure.legend(loc="outside upper center", ncols=2)
        figure.caption = "Scores of each class with the typical hues, and of the same scenes with any hue."
        told = [f"{name} {table['mixed'][name]:.2f} and {table['uniform'][name]:.2f}" for name in classes]
        label = MEASURE_NAMES.get(measure, measure)
        figure.description = f"Bars of {label} with typical hues and with any hue: {', '.join(told)}."
    return figure


def score_curve(curves: Mapping[str, pd.DataFrame], width: float = COLUMN_WIDTH, height: float = 2.3) -> ShownFigure:
    """The validation score of targets by training step. curves: {target: table with step and top1 or ap50 and ap}."""
    names = {"top1": "top-1 accuracy", "ap50": "AP50", "ap": "AP"}
    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    with styled_figure(width, height * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for empty in panels[len(curves) :]:
            empty.set_axis_off()
        for axes, (target, curve) in zip(panels, curves.items(), strict=False):
            for measure, style in zip([name for name in names if name in curve], ("-", "--"), strict=False):
                axes.plot(curve["step"], curve[measure], style, color=target_colour(target), label=names[measure])
            axes.set_ylim(0, 1)
            axes.set_title(target)
            axes.set_xlabel("training step")
            axes.legend(loc="lower right")
        for axes in panels[::columns]:
            axes.set_ylabel("score on validation scenes")
        figure.caption = "The targets' score on validation scenes while they were trained."
        ends = [f"{target} {curve.iloc[-1].to_dict()}" for target, curve in curves.items()]
        figure.description = f"Curves of the score by training step; at the end: {'; '.join(ends)}."
    return figure


def scenes_sheet(scenes: Mapping[str, Sequence[np.ndarray]], width: float = COLUMN_WIDTH) -> ShownFigure:
    """Scenes of the data set, one row for each colour rule: the same geometry, other hues.

    scenes: {rule: pictures (H, W, 3) uint8}, equally many of each.
    """
    count = len(next(iter(scenes.values())))
    with styled_figure(width, width / count * len(scenes) + 0.1) as figure:
        grid = figure.subplots(len(scenes), count, squeeze=False)
        for row, (rule, pictures) in zip(grid, scenes.items(), strict=True):
            for axes, picture in zip(row, pictures, strict=True):
                axes.imshow(picture, interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(False)
            row[0].set_ylabel(_RULE_NAMES.get(rule, rule))
        figure.caption = "Scenes of the data set: the same geometry in each column, another colour rule in each row."
        names = ", ".join(_RULE_NAMES.get(rule, rule) for rule in scenes)
        figure.description = f"Grid of {count} scenes, textured silhouettes on photographs, in {names}."
        figure.shows_images = True
    return figure
