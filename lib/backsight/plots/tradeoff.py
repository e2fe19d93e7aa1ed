"""Figures of the trade-off between task and reconstruction, from the tidy table of 10_tradeoff (pictures: from arrays).

The share t of the reconstruction loss goes from blue to red-brown; what was not tuned is black, nulls are grey and
dashed, as everywhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from backsight.errors import BacksightError
from backsight.plots.style import (
    COLUMN_WIDTH,
    MEASURE_NAMES,
    NORMAL,
    SMALL,
    ShownFigure,
    _pixels,
    _psnr,
    styled_figure,
    taps_in_order,
)
from backsight.tables.names import FRESH, RANDOM_HUES, START

NULL_COLOUR = "#5f5f5f"
START_COLOUR = "#000000"
NAMES: Mapping[str, str] = {
    **MEASURE_NAMES,
    f"top1_{RANDOM_HUES}": "top-1, random hues",
    f"ap50_{RANDOM_HUES}": "AP50, random hues",
    "probe_top1": "top-1 of a linear probe fitted anew",
    "cka_to_start": "CKA to the untouched target",
    "token_cosine": "cosine with the next tap",
    "cross_psnr": "PSNR of the next tap (dB)",
    "hue_error": "hue error in the object (°)",
}
SCORES = ("top1", "ap50")


def t_colour(t: float) -> Any:
    """The colour of a share of the reconstruction loss."""
    return colormaps["turbo"](0.1 + 0.85 * t)


def _rows(metrics: pd.DataFrame, measure: str, inverse: str | None = None) -> pd.DataFrame:
    """Rows of one measure and inverse (None: of the target itself), one row for each t and tap."""
    if missing := [column for column in ("t", "tuned", "measure", "inverse", "tap") if column not in metrics.columns]:
        raise BacksightError(f"the table lacks the columns {', '.join(missing)}: give the metrics of 10_tradeoff.")
    rows = metrics[metrics["measure"] == measure]
    return rows[rows["inverse"].isna() if inverse is None else rows["inverse"] == inverse]


def _score_of(metrics: pd.DataFrame) -> str:
    found = [measure for measure in SCORES if len(_rows(metrics, measure))]
    if not found:
        raise BacksightError("the table has neither top1 nor ap50: the task was not scored in this run.")
    return found[0]


def _counted(rows: pd.DataFrame) -> str:
    """n and seeds of the rows, for captions; the untouched target's answers have no training seed."""
    low, high = int(rows["n"].min()), int(rows["n"].max())
    images = f"{low} to {high}" if low < high else f"{high}"
    return f"n = {images} images, {int(rows['seeds'].max())} training seeds, 95 % bootstrap intervals"


def _error_bars(axes: Axes, x: Any, rows: pd.DataFrame, **style: Any) -> None:
    value = rows["value"].to_numpy(float)
    spread = np.abs(rows[["low", "high"]].to_numpy(float).T - value)
    axes.errorbar(x, value, yerr=spread, **{"capsize": 2, "elinewidth": 0.8, "markersize": 4, **style})


def task_by_t(metrics: pd.DataFrame, width: float = COLUMN_WIDTH, height: float = 2.7) -> ShownFigure:
    """The task's score by t: on usual and on random hues, and of a linear probe fitted anew; the start as lines."""
    score = _score_of(metrics)
    lines: list[tuple[str, str | None, str, str]] = [
        (score, None, "#0173b2", "o"),
        (f"{score}_{RANDOM_HUES}", None, "#de8f05", "s"),
        ("probe_top1", "probe", "#029e73", "^"),
    ]
    lines = [line for line in lines if len(_rows(metrics, *line[:2]))]
    with styled_figure(width, height) as figure:
        axes = figure.subplots()
        handles, drawn = [], []
        for place, (measure, inverse, colour, marker) in enumerate(lines):
            rows = _rows(metrics, measure, inverse)
            tuned = rows[rows["tuned"].astype(bool)].sort_values("t")
            shift = 0.008 * (place - (len(lines) - 1) / 2)
            _error_bars(axes, tuned["t"] + shift, tuned, color=colour, marker=marker)
            untouched = rows[~rows["tuned"].astype(bool)]
            axes.axhline(untouched["value"].iloc[0], color=colour, linewidth=0.9, linestyle=(0, (1, 1)))
            null = _rows(metrics, measure, "null_untrained" if inverse else "null_shuffled")
            null = null[~null["tuned"].astype(bool)]
            if len(null):
                axes.axhline(null["value"].iloc[0], color=colour, linewidth=0.9, linestyle=(0, (5, 3)), alpha=0.6)
            handles.append(Line2D([], [], color=colour, marker=marker, label=NAMES.get(measure, measure)))
            drawn.append(tuned)
        handles.append(Line2D([], [], color=NULL_COLOUR, linestyle=(0, (1, 1)), label="untouched target"))
        handles.append(Line2D([], [], color=NULL_COLOUR, linestyle=(0, (5, 3)), label="null"))
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
        axes.set_xlabel("t: share of the reconstruction loss (0 = tuned for the task alone)")
        axes.set_ylabel("score (0 to 1)")
        axes.set_ylim(-0.03, 1.03)
        figure.caption = (
            "The task's score after tuning with (1 − t) · task + t · reconstruction; dotted: the untouched target; "
            f"dashed: nulls (another image's answer; a probe on random weights). {_counted(pd.concat(drawn))}."
        )
        figure.description = "Task score by t. " + " ".join(
            f"{NAMES.get(line[0], line[0])}: "
            + ", ".join(f"{r.value:.3f} at t = {r.t:g}" for r in rows.itertuples())
            + "."
            for line, rows in zip(lines, drawn, strict=True)
        )
    return figure


def score_against_psnr(metrics: pd.DataFrame, width: float = COLUMN_WIDTH, height: float = 3.2) -> ShownFigure:
    """The task's score against PSNR: one line a tap through all t, the untouched target as a star.

    PSNR is of linear inverses fitted anew to each tuned target. At most seven taps are drawn, evenly by depth.
    """
    score = _score_of(metrics)
    scores = _rows(metrics, score).set_index("t")
    psnr = _rows(metrics, "psnr", FRESH)
    taps = taps_in_order(psnr)
    chosen = [taps[i] for i in np.unique(np.linspace(0, len(taps) - 1, min(7, len(taps))).round().astype(int))]
    ts = sorted(set(psnr["t"].dropna()))
    start_score = scores[~scores["tuned"].astype(bool)].iloc[0]
    markers = "osD^vPX"
    with styled_figure(width, height) as figure:
        axes = figure.subplots()
        for place, tap in enumerate(chosen):
            at = psnr[psnr["tap"] == tap]
            tuned, untouched = at[at["t"].notna()].sort_values("t"), at[at["t"].isna()].iloc[0]
            y = scores.loc[tuned["t"]]
            axes.plot(tuned["value"], y["value"], color="#bbbbbb", linewidth=1, zorder=1)
            for row, (_, value) in zip(tuned.itertuples(), y.iterrows(), strict=True):
                style = {"color": t_colour(row.t), "marker": markers[place], "markersize": 4.5, "elinewidth": 0.7}
                across = [[row.value - row.low], [row.high - row.value]]
                # The interval of the score is the same at every tap: once is enough.
                up = [[value["value"] - value["low"]], [value["high"] - value["value"]]] if tap == taps[-1] else None
                axes.errorbar([row.value], [value["value"]], xerr=across, yerr=up, **style)
            axes.plot(untouched["value"], start_score["value"], "*", color=START_COLOUR, markersize=8, zorder=3)
        null = _rows(metrics, "psnr", "null_mean")["value"]
        if len(null):
            axes.axvline(null.iloc[0], color=NULL_COLOUR, linestyle=(0, (6, 2)), linewidth=1)
        handles = [
            Line2D([], [], color="#888888", marker=m, label=tap) for m, tap in zip(markers, chosen, strict=False)
        ]
        handles += [Line2D([], [], color=t_colour(t), marker="o", linestyle="none", label=f"t = {t:g}") for t in ts]
        handles += [Line2D([], [], color=START_COLOUR, marker="*", linestyle="none", label="untouched")]
        handles += [Line2D([], [], color=NULL_COLOUR, linestyle=(0, (6, 2)), label="null: mean image")]
        figure.legend(handles=handles, loc="outside right upper")
        axes.set_xlabel("PSNR of linear inverses fitted anew (dB)")
        axes.set_ylabel(NAMES[score])
        figure.caption = (
            "Task score against reconstruction, one line a tap, through all values of t; the interval of the score is "
            f"drawn at the deepest tap. {_counted(psnr[psnr['t'].notna()])}."
        )
        figure.description = f"{NAMES[score]} against PSNR. " + _psnr_in_words(psnr, chosen, ts)
    return figure


def _psnr_in_words(psnr: pd.DataFrame, taps: Sequence[str], ts: Sequence[float]) -> str:
    told = []
    for tap in (taps[0], taps[-1]):
        values = psnr[psnr["tap"] == tap].set_index("t")["value"]
        told.append(f"{tap}: " + ", ".join(f"{values[t]:.2f} dB at t = {t:g}" for t in ts))
    return "; ".join(told) + "."


def _draw_by_depth(axes: Axes, rows: pd.DataFrame, taps: Sequence[str]) -> None:
    """One line for each t with its band, the untouched target in black."""
    place = {tap: x for x, tap in enumerate(taps)}
    for t in [None, *sorted(set(rows["t"].dropna()))]:
        line = rows[rows["t"].isna()] if t is None else rows[rows["t"] == t]
        if line.empty:
            continue
        line = line.assign(x=line["tap"].map(place)).sort_values("x")
        style = (
            {"color": START_COLOUR, "linestyle": (0, (1, 1))} if t is None else {"color": t_colour(t), "marker": "o"}
        )
        axes.plot(line["x"], line["value"], markersize=3, **style)
        axes.fill_between(line["x"], line["low"], line["high"], color=style["color"], alpha=0.13, linewidth=0)


def _t_handles(rows: pd.DataFrame) -> list[Line2D]:
    ts = sorted(set(rows["t"].dropna()))
    start = Line2D([], [], color=START_COLOUR, linestyle=(0, (1, 1)), label="untouched target")
    return [start, *(Line2D([], [], color=t_colour(t), marker="o", markersize=3, label=f"t = {t:g}") for t in ts)]


HUE_TICKS = (0, 2, 4, 6, 8, 10, 20, 45, 90, 180)  # degrees
NULL_DASHES = {"null_mean": (6, 2), "null_shuffled": (3, 1.5), "null_untrained": (1, 1.5)}
NULL_LABELS = {
    "null_mean": "null: mean image",
    "null_shuffled": "null: other image",
    "null_untrained": "null: untrained target",
}


def by_depth(
    metrics: pd.DataFrame, measures: Sequence[str], width: float = COLUMN_WIDTH, panel_height: float = 2.5
) -> ShownFigure:
    """Measures by depth, one panel each, one line for each t; nulls dashed. Inverses are linear ones, fitted anew.

    measures: with a value at taps, such as psnr, psnr_objects, hue_error, cka_to_start, token_cosine, cross_psnr.
    Those that the table does not have are left out. Raises BacksightError where it has none of them.
    """
    panels = []
    for measure in measures:
        rows = metrics[(metrics["measure"] == measure) & metrics["tap"].notna()]
        if len(rows):
            panels.append((measure, rows))
    if not panels:
        raise BacksightError(f"the table has none of {', '.join(measures)} at any tap: choose other measures.")
    lines = max(1, (len(panels) + 1) // 2)
    columns = min(2, len(panels))
    with styled_figure(width, panel_height * lines + 0.5) as figure:
        grid = figure.subplots(lines, columns, squeeze=False)
        nulls: dict[str, None] = {}
        for axes, (measure, rows) in zip(grid.flat, panels, strict=False):
            own = rows[rows["inverse"].isna() | (rows["inverse"] == FRESH)]
            taps = taps_in_order(own)
            _draw_by_depth(axes, own, taps)
            for name, dashes in NULL_DASHES.items():
                null = rows[(rows["inverse"] == name) & rows["tap"].isin(taps)]
                # Shuffled features of the untouched target stand for those of all t, unless only tuned ones have any.
                null = null[null["t"].isna()] if null["t"].isna().any() else null.drop_duplicates("tap")
                if len(null):
                    nulls[name] = None
                    x = null["tap"].map({tap: x for x, tap in enumerate(taps)})
                    order = np.argsort(x.to_numpy())
                    values = null["value"].to_numpy()[order]
                    axes.plot(x.to_numpy()[order], values, color=NULL_COLOUR, linestyle=(0, dashes), linewidth=1)
            axes.set_xticks(range(len(taps)), taps, rotation=40, ha="right", rotation_mode="anchor")
            axes.set_ylabel(NAMES.get(measure, measure))
            if measure == "hue_error":  # small errors and the null of about 90 degrees both have to be seen
                axes.set_yscale("symlog", linthresh=10, linscale=2)
                axes.set_yticks(HUE_TICKS, [str(tick) for tick in HUE_TICKS])
                axes.set_ylim(0, 180)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
        drawn = pd.concat([rows[rows["tuned"].astype(bool)] for _, rows in panels])
        handles = _t_handles(drawn)
        handles += [
            Line2D([], [], color=NULL_COLOUR, linestyle=(0, NULL_DASHES[name]), label=NULL_LABELS[name])
            for name in nulls
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(handles)))
        figure.supxlabel("tap, shallow → deep", fontsize=NORMAL)
        figure.caption = f"Lines are values of t, bands their intervals; dashed: nulls. {_counted(drawn)}."
        figure.description = "Curves by depth, one for each t. " + " ".join(
            _ends_in_words(measure, rows[rows["inverse"].isna() | (rows["inverse"] == FRESH)])
            for measure, rows in panels
        )
    return figure


def _ends_in_words(measure: str, rows: pd.DataFrame) -> str:
    taps = taps_in_order(rows)
    told = []
    for tap in dict.fromkeys((taps[0], taps[-1])):
        at = rows[rows["tap"] == tap].sort_values("t", na_position="first")
        names = [START if pd.isna(t) else f"t = {t:g}" for t in at["t"]]
        values = ", ".join(f"{value:.3g} ({name})" for value, name in zip(at["value"], names, strict=True))
        told.append(f"{values} at {tap}")
    return f"{NAMES.get(measure, measure)}: {'; '.join(told)}."


def pictures_by_t(
    images: Any, pictures: Mapping[str, Any], tap: str, width: float = COLUMN_WIDTH, rows: int = 5
) -> ShownFigure:
    """Images as rows; the input and its reconstruction at one tap from the untouched and from each tuned target.

    images: (B, 3, H, W) in [0, 1]; pictures: {"start" or "t = …": (B, 3, H, W)}; each with its PSNR in dB.
    Raises BacksightError where shapes disagree or values leave [0, 1].
    """
    inputs = _pixels(images, "images")[:rows]
    made = {name: _pixels(values, name)[:rows] for name, values in pictures.items()}
    if not made or any(each.shape != inputs.shape for each in made.values()):
        raise BacksightError("pictures by t need reconstructions of the shape of the images, at least for one t.")
    names = {"input": inputs, **{("untouched" if name == START else name): each for name, each in made.items()}}
    side = width / len(names)
    with styled_figure(width, (side + 0.1) * len(inputs) + 0.2) as figure:
        grid = figure.subplots(len(inputs), len(names), squeeze=False)
        for column, (name, values) in enumerate(names.items()):
            psnr = _psnr(inputs, values)
            for line, picture in enumerate(values):
                axes = grid[line, column]
                axes.imshow(picture.transpose(1, 2, 0), interpolation="nearest", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
                axes.grid(False)
                axes.spines[:].set_visible(False)
                if column:
                    axes.set_xlabel(f"{psnr[line]:.1f} dB", fontsize=SMALL, labelpad=1)
            grid[0, column].set_title(name, fontsize=NORMAL)
        figure.caption = (
            f"Rebuilt from {tap} of the untouched and of each tuned target, by linear inverses fitted anew."
        )
        figure.description = f"Grid of {len(inputs)} images by {len(names) - 1} targets, reconstructed from {tap}."
        figure.shows_images = True
    return figure
