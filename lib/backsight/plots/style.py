"""One look for all figures: what every inverse and measure is called and drawn like, and the forms that figures share.

Every function returns a matplotlib Figure, or draws into axes, and changes no global state. Colours mean the same thing
everywhere: one for each inverse (LOOKS), other ones for targets. Figures are 6.5 inches wide, a text column, and no
text is smaller than 7 points. Tidy rows are those of a metrics.csv.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from types import MappingProxyType
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from backsight.errors import BacksightError, nearest
from backsight.tables.names import RANDOM_HUES

COLUMN_WIDTH = 6.5  # inches
PICTURES = "pictures"  # the Comment of a PNG that shows images
SMALL, NORMAL = 7.0, 8.0  # points
NULL_COLOUR = "#5f5f5f"
UNTRAINED_DASHES = (0, (1, 1.5))


@dataclass(frozen=True)
class Look:
    """How an inverse is called and drawn; dashes: lengths on and off, () is a full line."""

    label: str
    colour: str = NULL_COLOUR
    marker: str = ""
    dashes: tuple[float, ...] = ()

    @property
    def line(self) -> dict[str, Any]:
        """The style of its line."""
        dashed = {"linestyle": (0, self.dashes), "linewidth": 1.1} if self.dashes else {}
        return {"color": self.colour, **({"marker": self.marker} if self.marker else {}), **dashed}


# seaborn's "colorblind" palette and two of Paul Tol's; inverses and targets never share a colour.
LOOKS: Mapping[str, Look] = MappingProxyType(
    {
        "linear": Look("linear", "#0173b2", "o"),
        "linear_uniform": Look("linear, fitted on uniform hues", "#ee7733", "o"),
        "direct": Look("direct", "#de8f05", "s"),
        "modular": Look("modular", "#029e73", "^"),
        "modular_components": Look("modular, components", "#5a3d1a", "v"),
        "modular_polished": Look("modular, polished", "#cc78bc", "D"),
        "optimised_tv": Look("optimised, total variation", "#222222", "X"),
        "optimised_prior": Look("optimised, deep image prior", "#7f7f7f", "P"),
        "steadied": Look("start of MAP: decoder, steadied", "#6a51a3", "v", (3, 1.5)),
        "map": Look("most probable (MAP)", "#000000", "P"),
        "exact": Look("exact", "#8c510a", "X"),
        "painter": Look("painter of canonical hues", "#ee6677"),
        "null_mean": Look("null: mean image", dashes=(6, 2)),
        "null_shuffled": Look("null: other image", dashes=(3, 1.5)),
        "null_untrained": Look("null: untrained target", dashes=(1, 1.5)),
        "null_colour_position": Look("null: colours, no model", dashes=(5, 1.5, 1, 1.5)),
        "null_guess": Look("null: a guess", dashes=(1, 1.5)),
        "null_constant": Look("null: constant deviation", dashes=(4, 1, 1, 1)),
        "null_random": Look("null: random directions of the prior", dashes=(5, 2)),
    }
)
INVERSE_NAMES: Mapping[str, str] = MappingProxyType({name: look.label for name, look in LOOKS.items()})
FAMILY_COLOURS: Mapping[str, str] = MappingProxyType(
    {name: look.colour for name, look in LOOKS.items() if not look.label.startswith("null")}
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
MEASURE_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "psnr": "PSNR (dB)",
        "psnr_objects": "PSNR inside objects (dB)",
        "psnr_boundary": "PSNR at object boundaries (dB)",
        "psnr_background": "PSNR of the background (dB)",
        "ssim": "SSIM (1 = identical)",
        "r2": "R² (share of variance)",
        "mse": "mean squared error (range²)",
        "feature_cosine": "cosine of features (1 = equal)",
        "cycle_cosine": "cosine of features (1 = equal)",
        "perceptual": "distance in the target's features",
        "hue_error": "hue error of the object (degrees)",
        "delta_e": "colour difference ΔE",
        "edge_f1": "edge F1 (1 = all edges)",
        "mask_iou": "mask IoU (1 = identical)",
        "texture_accuracy": "texture named (share of objects)",
        "lost": "structure lost (share)",
        "invented": "structure invented (share)",
        "retrieval_top1": "own image found first (share)",
        "retrieval_rank": "rank of the own image (share before it)",
        "band_error": "error power / image power",
        "patch_r2": "R² of each part of the picture",
        "top1_agreement": "top-1 agreement (share of images)",
        "map50": "mAP50 (0 to 1)",
        "top1": "top-1 accuracy (share of images)",
        f"top1_{RANDOM_HUES}": "top-1, random hues",
        "probe_top1": "top-1 of a linear probe fitted anew",
        "ap50": "AP50 (0 to 1)",
        f"ap50_{RANDOM_HUES}": "AP50, random hues",
        "ap": "AP (0 to 1)",
        "cross_psnr": "PSNR (dB)",
        "cross_psnr_standardised": "PSNR (dB), channels standardised",
        "cka": "CKA (debiased)",
        "procrustes": "Procrustes similarity",
        "token_cosine": "cosine of tokens",
        "predictability_r2": "R², linear",
        "cka_to_start": "CKA to the untouched target",
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
        "hue_shift_kept": "share of a hue shift that is followed",
        "colour_follow": "slope of colour made over shown",
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


def look_of(name: str) -> Look:
    """The look of an inverse, the same in every figure; another one gets its look by its name."""
    if name in LOOKS:
        return LOOKS[name]
    label = name.replace("_", " ")
    return Look(label, dashes=(4, 1, 1, 1)) if name.startswith("null_") else Look(label, _stable_choice(name), "v")


def family_colour(family: str) -> str:
    """The colour of an inverse family, the same in every figure."""
    return look_of(family).colour


def target_colour(target: str) -> str:
    """The colour of a target, the same in every figure that compares targets; other targets get one by their name."""
    return TARGET_COLOURS.get(target) or _stable_choice(target)


def _stable_choice(name: str) -> str:
    return _OTHER_COLOURS[crc32(name.encode()) % len(_OTHER_COLOURS)]


def depth_colours(names: Sequence[Any], colours: str = "viridis", end: float = 0.92) -> dict[Any, Any]:
    """{name: colour}, from dark (shallow) to light (deep); the palest colours are left out."""
    return {name: colormaps[colours](end * i / max(len(names) - 1, 1)) for i, name in enumerate(names)}


def measure_name(measure: str) -> str:
    """What a measure is called on an axis, with its unit."""
    return MEASURE_NAMES.get(measure, measure)


def inverse_order(names: Sequence[str]) -> list[str]:
    """Inverse names in the order of every figure and table: known families, other families, nulls."""
    known = list(LOOKS)
    rank = {name: known.index(name) for name in known}
    return sorted(set(names), key=lambda name: (name.startswith("null_"), rank.get(name, len(known)), name))


def is_null(rows: pd.DataFrame) -> pd.Series:
    """(rows,) bool: whether a row is of a null."""
    return rows["inverse"].astype(str).str.startswith("null_")


# ------------------------------------------------------------------------------------------------------- the figure


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


def panels_of(figure: Figure, count: int, columns: int, **options: Any) -> list[Axes]:
    """`count` axes in rows of at most `columns`; options: of Figure.subplots. What is left over is empty."""
    across = min(count, columns)
    grid = figure.subplots(-(-count // across), across, squeeze=False, **options)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return list(grid.flat[:count])


def name_taps(axes: Axes, names: Sequence[str], rotation: float = 40) -> None:
    """The names of taps, or steps, under the axis, one a place."""
    axes.set_xticks(range(len(names)), list(names), rotation=rotation, ha="right", rotation_mode="anchor")


def legend_line(label: str, **style: Any) -> Line2D:
    """A line of a legend."""
    return Line2D([], [], label=label, **style)


def legend_above(figure: Figure, handles: Sequence[Any], columns: int = 4, **options: Any) -> None:
    """The legend above all panels."""
    handles = list(handles)
    style: dict[str, Any] = {"loc": "outside upper center", "ncols": min(columns, len(handles))} | options
    figure.legend(handles=handles, **style)


def legend_of_inverses(figure: Figure, names: Sequence[str]) -> None:
    """Families in the first row, nulls in the second; a legend is filled by columns, hence the pairs."""
    families = [name for name in names if not name.startswith("null_")]
    nulls = [name for name in names if name.startswith("null_")]
    rows = [row for row in (families, nulls) if row]
    blank = legend_line(" ", linestyle="none")
    handles = [
        legend_line(look_of(name).label, **look_of(name).line) if name else blank
        for column in zip_longest(*rows)
        for name in column
    ]
    legend_above(figure, handles, max(map(len, rows)), handlelength=2.8)


# --------------------------------------------------------------------------------------------------------- tidy rows


def rows_of(table: pd.DataFrame, measure: str | Sequence[str], **columns: Any) -> pd.DataFrame:
    """The rows of a measure (or of several); columns: {name: value, a list of values, or None for empty}.

    Raises BacksightError where a column or the measure is missing, or where no row is left.
    """
    measures = [measure] if isinstance(measure, str) else list(measure)
    if missing := [name for name in ("measure", *columns) if name not in table]:
        raise BacksightError(f"the table lacks the columns {', '.join(missing)}: give rows of a metrics.csv.")
    rows = table[table["measure"].isin(measures)]
    if rows.empty:
        known = [str(name) for name in dict.fromkeys(table["measure"].dropna())]
        raise BacksightError(f"the table has no measure {' or '.join(measures)}; {nearest(measures[0], known)}.")
    for name, value in columns.items():
        wanted = value if isinstance(value, (list, tuple)) else [value]
        rows = rows[rows[name].isna() if value is None else rows[name].isin(wanted)]
    if rows.empty:
        asked = ", ".join(f"{name} {value!r}" for name, value in columns.items())
        raise BacksightError(f"the table has no {' or '.join(measures)} with {asked}: it was not measured in this run.")
    return rows


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


def one_target(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows; raises BacksightError where they are of several targets."""
    if rows["target"].nunique() > 1:
        raise BacksightError(f"the table holds {', '.join(rows['target'].unique())}: select one target's rows first.")
    return rows


def span(numbers: Any) -> str:
    """The smallest and the largest of some whole numbers, in words."""
    numbers = pd.Series(numbers).dropna()
    low, high = (int(numbers.min()), int(numbers.max())) if len(numbers) else (1, 1)
    return f"{low}" if low == high else f"{low} to {high}"


def sample_size(rows: pd.DataFrame) -> str:
    """ "n = 100 images; 3 training seeds" of tidy rows, as ranges where they differ."""
    seeds = span(rows["seeds"]) if "seeds" in rows else "1"
    return f"n = {span(rows['n'])} images; {seeds} training seed{'' if seeds == '1' else 's'}"


def where(rows: pd.DataFrame) -> str:
    """Target, data set and split of tidy rows."""
    first = rows.iloc[0]
    return f"{first['target']} on {first['dataset']}, {first['split']}"


def ends(rows: pd.DataFrame) -> str:
    """A curve in words: its mean at the first and at the last tap that it has."""
    if rows.empty:
        return "not measured"
    taps = taps_in_order(rows)
    values = rows.groupby("tap")["value"].mean()
    return f"{values[taps[0]]:.3g} at {taps[0]}, {values[taps[-1]]:.3g} at {taps[-1]}"


def reach(rows: pd.DataFrame) -> np.ndarray:
    """(2, n) lengths of error bars below and above the values."""
    return np.abs(rows[["low", "high"]].to_numpy(float).T - rows["value"].to_numpy(float))


# ------------------------------------------------------------------------------------------------------------ curves


def draw_band(axes: Axes, x: Any, rows: pd.DataFrame, shade: float = 0.18, **style: Any) -> None:
    """A line with its 95 % band; style: of the line."""
    axes.plot(x, rows["value"], **style)
    axes.fill_between(x, rows["low"], rows["high"], color=style["color"], alpha=shade, linewidth=0)


def draw_bars(axes: Axes, x: Any, rows: pd.DataFrame, **style: Any) -> None:
    """Values with their intervals as error bars; style: of Axes.errorbar."""
    axes.errorbar(x, rows["value"], yerr=reach(rows), **{"capsize": 2, "elinewidth": 0.8, "markersize": 4, **style})


def draw_curves(axes: Axes, rows: pd.DataFrame, names: Sequence[str]) -> None:
    """One line for each inverse by depth with its band, nulls dashed and without; with several seeds their points."""
    taps = taps_in_order(rows)
    place = {tap: x for x, tap in enumerate(taps)}
    means = over_seeds(rows)
    for name in names:
        line = means[means["inverse"] == name]
        line = line.assign(x=line["tap"].map(place)).sort_values("x")
        if line.empty:
            continue
        look = look_of(name)
        if name.startswith("null_"):
            axes.plot(line["x"], line["value"], **look.line)
            continue
        draw_band(axes, line["x"], line, **look.line)
        if line["seeds"].max() > 1:
            points = rows[rows["inverse"] == name]
            axes.scatter(points["tap"].map(place), points["value"], s=7, color=look.colour, alpha=0.35)
    name_taps(axes, taps)
    axes.margins(x=0.03)


def depth_curves(metrics: pd.DataFrame, measure: str = "psnr") -> ShownFigure:
    """A measure by depth: one line for each inverse family with its 95 % band, nulls dashed.

    metrics: tidy rows (METRIC_COLUMNS). Columns of panels are targets (with their weights where these differ), rows
    are data sets and splits. With several seeds the line is their mean, the faint points are the seeds, and the band
    covers all of their intervals. Raises BacksightError for an unknown measure, and where two rows claim one point of
    one seed.
    """
    rows = _rows_at_taps(metrics, measure)
    several_weights = rows.groupby("target")["weights"].nunique().max() > 1
    rows["panel"] = rows["target"] + (" (" + rows["weights"].astype(str) + ")" if several_weights else "")
    targets = list(dict.fromkeys(rows["panel"]))
    datasets = list(dict.fromkeys(zip(rows["dataset"], rows["split"], strict=True)))
    names = inverse_order(list(rows["inverse"]))
    label = measure_name(measure)
    with styled_figure(COLUMN_WIDTH, 2.3 * len(datasets) + 0.75) as figure:
        grid = figure.subplots(len(datasets), len(targets), squeeze=False, sharey=True)
        for (row, column), axes in np.ndenumerate(grid):
            dataset, split = datasets[row]
            axes.set_title(f"{targets[column]} · {dataset}, {split}")
            at = (rows["panel"] == targets[column]) & (rows["dataset"] == dataset) & (rows["split"] == split)
            if at.any():
                draw_curves(axes, rows[at], names)
            else:
                axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=NULL_COLOUR)
                axes.set_xticks([])
            if column == 0:
                axes.set_ylabel(label)
        figure.supxlabel("tap, shallow → deep", fontsize=NORMAL)
        legend_of_inverses(figure, names)
        figure.caption = "Lines are inverses with their 95 % intervals; dashed lines are nulls."
        told = []
        for (panel, dataset, split), part in rows.groupby(["panel", "dataset", "split"], sort=False):
            lines = [f"{name} {ends(part[part['inverse'] == name])}" for name in inverse_order(list(part["inverse"]))]
            told.append(f"{panel} on {dataset}, {split}: {'; '.join(lines)}.")
        figure.description = f"Curves of {label} by depth, one for each inverse. {' '.join(told)}"
    return figure


def _rows_at_taps(metrics: pd.DataFrame, measure: str) -> pd.DataFrame:
    """A copy of the rows of a measure that have a tap and a value."""
    needed = ("target", "weights", "dataset", "split", "tap", "depth", "inverse", "value", "low", "high", "seed")
    if missing := [column for column in needed if column not in metrics]:
        raise BacksightError(f"the table lacks the columns {', '.join(missing)}: give rows of a metrics.csv.")
    rows = rows_of(metrics, measure)
    rows = rows[rows["tap"].notna() & rows["value"].notna()].copy()
    if rows.empty:
        raise BacksightError(f"the table has no value of {measure} at any tap: choose another measure.")
    rows[["dataset", "split"]] = rows[["dataset", "split"]].astype(object).fillna("unnamed")
    keys = ["target", "weights", "dataset", "split", "tap", "inverse", "seed"]
    if (twice := rows.duplicated(keys)).any():
        first = rows[twice].iloc[0]
        raise BacksightError(
            f"the table holds several values of {measure} for {first.inverse} at {first.tap} of {first.target} on "
            f"{first.dataset} with seed {first.seed}: select the rows of one run or of one perturbation first."
        )
    return rows
