"""One look for all figures: what every inverse, target and measure is called and drawn like, and what figures share.

Figures are 6.5 inches wide, a text column, with text of 8 and 9 points; nulls are grey and dashed. Nothing global
changes, and nothing is computed: values and intervals are those of the tidy rows (a metrics.csv).
"""

import io
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import fill
from typing import Any
from zlib import crc32

import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from backsight.errors import BacksightError, nearest
from backsight.tables.names import RANDOM_HUES, SHUFFLED_FAMILIES
from backsight.tables.read import span

COLUMN_WIDTH = 6.5  # inches
SMALL, NORMAL = 8.0, 9.0  # points
NULL_COLOUR = "#5f5f5f"


@dataclass(frozen=True)
class Look:
    """How a line, a bar or a share is called and drawn; dashes: lengths on and off, () is a full line."""

    label: str
    colour: str = NULL_COLOUR
    marker: str = ""
    dashes: tuple[float, ...] = ()

    @property
    def line(self) -> dict[str, Any]:
        """The style of its line."""
        dashed = {"linestyle": (0, self.dashes), "linewidth": 1.1} if self.dashes else {}
        return {"color": self.colour, **({"marker": self.marker} if self.marker else {}), **dashed}


# seaborn's "colorblind" palette and three of Paul Tol's; an inverse and a target never share a colour.
LOOKS: dict[str, Look] = {
    "scenes-vit": Look("scenes-vit", "#d55e00", "o"),
    "scenes-deit": Look("scenes-deit", "#882255", "s"),
    "scenes-swin": Look("scenes-swin", "#ca9161", "^"),
    "scenes-detr": Look("scenes-detr", "#56b4e9", "D"),
    "scenes-deformable-detr": Look("scenes-deformable-detr", "#332288", "v"),
    # inverses and nulls
    "linear": Look("linear", "#0173b2", "o"),
    "linear_3x3": Look("linear, 3 x 3 tokens", "#6ea6cd", "p"),
    "linear_leaves": Look("linear, fitted on leaves", "#33bbee", "v", (3, 1.5)),
    "linear_with": Look("this tap and deeper ones", "#0173b2", "o"),
    "linear_chain": Look("linear chain", "#4a6fe3", "v", (3, 1.5)),
    "linear_uniform": Look("linear, uniform hues", "#ee7733", "o"),
    "direct": Look("direct", "#de8f05", "s"),
    "modular": Look("modular", "#029e73", "^"),
    "modular_components": Look("modular, components", "#5a3d1a", "v"),
    "modular_polished": Look("modular, polished", "#cc78bc", "D"),
    "steadied": Look("decoder, steadied", "#6a51a3", "v", (3, 1.5)),
    "map": Look("most probable (MAP)", "#000000", "P"),
    "exact": Look("exact", "#8c510a", "X"),
    "probe": Look("probe", "#d55e00", "o"),
    "painter": Look("painter", "#ee6677"),
    "null_mean": Look("mean image", dashes=(6, 2)),
    "null_mosaic_1": Look("mean colour", "0.65", dashes=(1, 1)),
    "null_mosaic_4": Look("4 × 4 mean colours", "0.65", dashes=(2, 1)),
    "null_mosaic_16": Look("16 × 16 mean colours", "0.65", dashes=(4, 1)),
    "null_shuffled": Look("other image", dashes=(3, 1.5)),
    "null_untrained": Look("untrained", dashes=(1, 1.5)),
    "null_colour_position": Look("colours, no model", dashes=(5, 1.5, 1, 1.5)),
    "null_constant": Look("constant deviation", dashes=(4, 1, 1, 1)),
    # parts of a layer, of a data set, of what became of an image
    "block": Look("whole layer", "#3c3c3c", "o"),
    "attention": Look("attention", "#e8a33d", "s"),
    "cross_attention": Look("cross-attention", "#b05a9c", "D"),
    "mlp": Look("MLP", "#4a8fb8", "^"),
    "mixed": Look("typical hue", "#d55e00"),
    "uniform": Look("any hue", "#ecb48f"),
    "canonical": Look("a hue of its own", "#aa3377", "o"),
    "colour_free": Look("colour-free (placebo)", "#228833", "s"),
    "random": Look("random weights", "#7f7f7f", "v"),
    "trained": Look("trained", "#0173b2", "o"),
    "untrained": Look("untrained", "#000000", "s", (3, 1.5)),
    "share_keep": Look("keep the hue shown", "#4477aa"),
    "share_revert": Look("revert to canonical", "#ee6677"),
    "share_grey": Look("grey out", "#bbbbbb"),
    "share_other": Look("another hue", "#ccbb44"),
    "back": Look("back (error ≤ 1e-5)", "#0173b2"),
    "another_root": Look("another exact root", "#de8f05"),
    "near": Look("near (error ≤ 0.01)", "#56b4e9"),
    "unsolved": Look("not solved", "#949494"),
    "lost": Look("lost", "#949494"),
    "error_grown": Look("error grown", "#cc78bc"),
    "amplification": Look("this half-step alone", "#0173b2", "o"),
    "amplification_chain": Look("all the way back", "#029e73", "s"),
}
_OTHER_COLOURS = ("#949494", "#999933", "#aa4499", "#44aa99")
MEASURE_NAMES = {
    "psnr": "PSNR (dB)",
    "psnr_objects": "PSNR inside objects (dB)",
    "psnr_boundary": "PSNR at boundaries (dB)",
    "psnr_background": "PSNR of the background (dB)",
    "ssim": "SSIM (1 = identical)",
    "r2": "R² (share of variance)",
    "cycle_cosine": "cosine of features (1 = equal)",
    "perceptual": "distance in early features",
    "frechet_distance": "Fréchet distance (0: the same)",
    "hue_error": "hue error of the object (°)",
    "edge_f1": "edge F1 (1 = all edges)",
    "mask_iou": "mask IoU (1 = identical)",
    "texture_accuracy": "texture named (share)",
    "lost": "structure lost (share)",
    "invented": "structure invented (share)",
    "retrieval_top1": "own image found first (share)",
    "retrieval_rank": "rank of own image (share)",
    "band_error": "error power / image power",
    "top1_agreement": "top-1 agreement (share)",
    "map50": "mAP50 (0 to 1)",
    "top1": "top-1 accuracy (share)",
    f"top1_{RANDOM_HUES}": "top-1, random hues",
    "probe_top1": "top-1, probe fitted anew",
    "ap50": "AP50 (0 to 1)",
    f"ap50_{RANDOM_HUES}": "AP50, random hues",
    "cross_psnr": "PSNR of another tap (dB)",
    "token_cosine": "cosine of tokens",
    "cka_to_start": "CKA to the untouched target",
    "hue_error_shown": "angle to the hue shown (°)",
    "share_grey": "comes back grey (share)",
    "share_nearer": "nearer to the natural hue (share)",
    "feature_cosine": "cosine to the unchanged picture",
    "same_neighbour": "same nearest neighbour (share)",
    "reverted_above_deals": "reverts, above chance (share)",
    "reversion_index": "reversion index (1: painter)",
    "recoverable": "directions shown (share)",
}
_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": NORMAL,
    "axes.labelsize": NORMAL,
    "axes.titlesize": NORMAL,
    "axes.titlelocation": "left",
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
}


def look_of(name: str) -> Look:
    """The look of a name, the same in every figure; what LOOKS does not have gets a look by its name."""
    if name in LOOKS:
        return LOOKS[name]
    if name.startswith("null_"):
        return Look(name.removeprefix("null_").replace("_", " "), dashes=(4, 1, 1, 1))
    return Look(name.replace("_", " "), _OTHER_COLOURS[crc32(name.encode()) % len(_OTHER_COLOURS)], "v")


def name_of(value: Any) -> str:
    """What a measure (with its unit), an inverse, a target or a number is called in a figure."""
    if not isinstance(value, str):
        return f"{value:g}"
    known = value in LOOKS or value.startswith("null_")
    return MEASURE_NAMES.get(value) or (look_of(value).label if known else value)


def inverse_order(names: Sequence[str]) -> list[str]:
    """Names in the order of every figure and table: known ones as in LOOKS, other ones, nulls."""
    rank = {name: place for place, name in enumerate(LOOKS)}
    return sorted(set(names), key=lambda name: (name.startswith("null_"), rank.get(name, len(rank)), name))


def depth_colours(names: Sequence[Any]) -> dict[Any, Any]:
    """{name: colour}, from dark (shallow) to light (deep); the palest colours are left out."""
    return {name: colormaps["viridis"](0.9 * i / max(len(names) - 1, 1)) for i, name in enumerate(names)}


# ------------------------------------------------------------------------------------------------------- the figure


class ShownFigure(Figure):
    """A Figure that a notebook shows by itself, without pyplot: nothing is registered, nothing is shown twice.

    caption (one line, for everybody) and description (for those who cannot see it: what is drawn, and the main
    numbers) travel in PNG files as Title and Description. There the page of a run reads them.
    """

    caption: str = ""
    description: str = ""

    def savefig(self, fname: Any, **options: Any) -> None:
        texts = {"Title": self.caption, "Description": self.description} | options.pop("metadata", {})
        # Nothing is cut off, on screen as in files; how many ticks there are is decided while they are drawn.
        with rc_context(_STYLE):
            super().savefig(fname, **{"bbox_inches": "tight", "metadata": texts, **options})

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        shown = png_bytes(self)
        width, height = struct.unpack(">II", shown[16:24])  # of the PNG's header
        return shown, {"width": width // 2, "height": height // 2}


def png_bytes(figure: Figure, dpi: int = 200) -> bytes:
    """The figure as PNG without date or writer: equal figures are equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def styled_figure(width: float, height: float, layout: str | None = "constrained") -> Iterator[ShownFigure]:
    """A new figure in our style, in inches.

    It is laid out once: every later drawing, for a file or for the notebook, would lay it out anew, to the same places
    and for half of its time.
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


def drawn_panels(
    figure: Figure, rows: pd.DataFrame, panel: str, columns: int, same: list[str], labels: Sequence[str], sharey: bool
) -> Iterator[tuple[Axes, Any, pd.DataFrame]]:
    """(axes, value, its rows) for each value of the column `panel`, to draw in; then axes have titles and labels.

    same: columns; where all panels have the same values of them, names of ticks stand below (and at the left) only.
    labels: of x and y.
    """
    names = list(dict.fromkeys(rows[panel]))
    columns = min(columns, len(names))
    alike = all(rows.groupby(panel)[column].agg(frozenset).nunique() == 1 for column in same)
    several = len(names) > columns
    for place, axes in enumerate(panels_of(figure, len(names), columns, sharey=sharey)):
        name = names[place]
        yield axes, name, rows[rows[panel] == name]
        lowest, leftmost = place >= len(names) - columns, place % columns == 0
        if len(names) > 1 or panel != "measure":
            axes.set_title(fill(name_of(name), 28 if columns > 2 else 60, replace_whitespace=False))
        axes.set_xlabel(labels[0] if lowest else "")
        axes.set_ylabel(labels[1] if leftmost and not several else "")
        if alike and not lowest:
            axes.tick_params(labelbottom=False)
        if alike and len(same) > 1 and not leftmost:
            axes.tick_params(labelleft=False)
    if several and labels[1]:
        figure.supylabel(labels[1], fontsize=NORMAL)


def captioned(figure: ShownFigure, title: str, rows: pd.DataFrame, told: Sequence[str], note: str = "") -> ShownFigure:
    """Title above; below it, and in the caption, what else has to be known, images, n, seeds and intervals of the rows.

    told: the main numbers in words, for the description.
    """
    null = is_null(rows) if "inverse" in rows else pd.Series(False, rows.index)
    rows = rows if null.all() else rows[~null]
    about = "; ".join(filter(None, (where(rows), sample_size(rows))))
    below = " ".join(filter(None, (note, f"{about}." if about else "")))
    figure.suptitle(fill(title, 80), fontsize=NORMAL, weight="bold", x=0.01, ha="left")
    figure.supxlabel(fill(below, 108), fontsize=SMALL, color=NULL_COLOUR, x=0.01, ha="left")
    title = title if title.endswith("?") else f"{title}."
    figure.caption, figure.description = f"{title} {below}", f"{title} {'; '.join(told)}."
    return figure


# --------------------------------------------------------------------------------------------------------- tidy rows


def is_null(rows: pd.DataFrame) -> pd.Series:
    """(rows,) bool: whether a row is of a null."""
    return rows["inverse"].astype(str).str.startswith("null_")


def rows_of(table: pd.DataFrame, measure: str | Sequence[str], **columns: Any) -> pd.DataFrame:
    """The rows of a measure (or of several) that have a value; columns: {name: value, a list of them, None: empty}.

    Raises BacksightError where a column or the measure is missing, or where no row is left.
    """
    measures = [measure] if isinstance(measure, str) else list(measure)
    if missing := [name for name in ("measure", "value", *columns) if name not in table]:
        raise BacksightError(f"the table lacks the columns {', '.join(missing)}: give rows of a metrics.csv.")
    known = [str(name) for name in dict.fromkeys(table["measure"].dropna())]
    if not set(measures) & set(known):
        raise BacksightError(f"the table has no measure {' or '.join(measures)}; {nearest(measures[0], known)}.")
    rows = table[table["measure"].isin(measures) & table["value"].notna()]
    for name, value in columns.items():
        allowed = value if isinstance(value, (list, tuple, set)) else [value]
        rows = rows[rows[name].isna() if value is None else rows[name].isin(allowed)]
    if rows.empty:
        asked = ", ".join(f"{name} {value!r}" for name, value in columns.items()) or "a value"
        raise BacksightError(f"the table has no {' or '.join(measures)} with {asked}: it was not measured in this run.")
    return rows


def with_nulls_of(metrics: pd.DataFrame, family: str) -> pd.DataFrame:
    """The rows of all families, and of the nulls only those that were made for `family` (and the mean image).

    Figures that draw one line for each inverse need it where nulls of several families stand in one table.
    """
    if "family" not in metrics:
        return metrics
    kept = metrics["family"].isna() | ~metrics["inverse"].str.startswith("null_")
    for null, rows in metrics[~kept].groupby("inverse"):
        known = list(dict.fromkeys(rows["family"]))
        owner = next((name for name in (family, *SHUFFLED_FAMILIES) if name in known), known[0])
        kept |= (metrics["inverse"] == null) & (metrics["family"] == owner)
    return metrics[kept]


def taps_in_order(rows: pd.DataFrame, column: str = "tap") -> list[str]:
    """The taps of tidy rows by depth, in the order of the table where depths are equal."""
    return list(dict.fromkeys(rows.sort_values("depth", kind="stable")[column]))


def short_tap(tap: str) -> str:
    """A tap's name where there is little room: `encoder.layers.1.attn` as `enc 1.attn`, `blocks.3` as `3`."""
    name = re.sub(r"^(encoder|decoder)\.layers\.", lambda found: found[1][:3] + " ", tap)
    name = re.sub(r"^layers\.(\d+)\.blocks\.", r"\1.", re.sub(r"^blocks\.(?=\d)", "", name))
    return {"patch_embed": "embed", "decoder.layernorm": "dec norm", "predictions": "pred"}.get(name, name)


def sample_size(rows: pd.DataFrame) -> str:
    """ "n = 100 images, 3 training seeds, 95 % intervals" of tidy rows, as ranges where they differ."""
    counted = []
    for column, unit in (("n", "images"), ("seeds", "training seeds")):
        numbers = rows[column].dropna() if column in rows else pd.Series([1] if column == "seeds" else [])
        if len(numbers):
            counted.append(f"{'n = ' * (column == 'n')}{span(numbers)} {unit[: -1 if numbers.max() == 1 else None]}")
    return ", ".join(counted + ["95 % intervals"] * ("low" in rows and bool(rows["low"].notna().any())))


def where(rows: pd.DataFrame) -> str:
    """Targets, data sets and splits of tidy rows, as far as they say."""
    names = ", ".join(dict.fromkeys(rows["target"].dropna().astype(str))) if "target" in rows else ""
    images = rows.reindex(columns=["dataset", "split"]).dropna().drop_duplicates().itertuples(index=False)
    return " on ".join(filter(None, (names, ", ".join(f"{dataset} ({split})" for dataset, split in images))))
