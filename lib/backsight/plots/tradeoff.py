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
from backsight.plots.grids import as_pictures, scored_table
from backsight.plots.style import (
    COLUMN_WIDTH,
    MEASURE_NAMES,
    NORMAL,
    NULL_COLOUR,
    ShownFigure,
    draw_band,
    draw_bars,
    legend_above,
    legend_line,
    look_of,
    measure_name,
    name_taps,
    panels_of,
    sample_size,
    styled_figure,
    taps_in_order,
)
from backsight.tables.names import FRESH, RANDOM_HUES, START

START_COLOUR = "#000000"
START_LOOK: Mapping[str, Any] = {"color": START_COLOUR, "linestyle": (0, (1, 1))}
NAMES: Mapping[str, str] = {
    **MEASURE_NAMES,
    "token_cosine": "cosine with the next tap",
    "cross_psnr": "PSNR of the next tap (dB)",
    "hue_error": "hue error in the object (°)",
}
HUE_TICKS = (0, 2, 4, 6, 8, 10, 20, 45, 90, 180)  # degrees


def t_colour(t: float) -> Any:
    """The colour of a share of the reconstruction loss."""
    return colormaps["turbo"](0.1 + 0.85 * t)


def _rows(metrics: pd.DataFrame, measure: str, inverse: str | None = None) -> pd.DataFrame:
    """Rows of one measure and inverse (None: of the target itself), one row for each t and tap; it may have none."""
    if missing := [column for column in ("t", "tuned", "measure", "inverse", "tap") if column not in metrics.columns]:
        raise BacksightError(f"the table lacks the columns {', '.join(missing)}: give the metrics of 10_tradeoff.")
    rows = metrics[metrics["measure"] == measure]
    return rows[rows["inverse"].isna() if inverse is None else rows["inverse"] == inverse]


def _score_of(metrics: pd.DataFrame) -> str:
    score = next((measure for measure in ("top1", "ap50") if len(_rows(metrics, measure))), "")
    if not score:
        raise BacksightError("the table has neither top1 nor ap50: the task was not scored in this run.")
    return score


def _sizes(rows: pd.DataFrame) -> str:
    return f"{sample_size(rows)}, 95 % bootstrap intervals"


def task_by_t(metrics: pd.DataFrame) -> ShownFigure:
    """The task's score by t: on usual and on random hues, and of a linear probe fitted anew; the start as lines."""
    score = _score_of(metrics)
    lines: list[tuple[str, str | None, str, str]] = [
        (score, None, "#0173b2", "o"),
        (f"{score}_{RANDOM_HUES}", None, "#de8f05", "s"),
        ("probe_top1", "probe", "#029e73", "^"),
    ]
    lines = [line for line in lines if len(_rows(metrics, *line[:2]))]
    dotted: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (1, 1))}
    dashed: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (5, 3))}
    with styled_figure(COLUMN_WIDTH, 2.7) as figure:
        axes = figure.subplots()
        handles, drawn, told = [], [], []
        for place, (measure, inverse, colour, marker) in enumerate(lines):
            rows, name = _rows(metrics, measure, inverse), measure_name(measure)
            tuned = rows[rows["tuned"].astype(bool)].sort_values("t")
            draw_bars(axes, tuned["t"] + 0.008 * (place - (len(lines) - 1) / 2), tuned, color=colour, marker=marker)
            axes.axhline(rows.loc[~rows["tuned"].astype(bool), "value"].iloc[0], color=colour, **dotted)
            null = _rows(metrics, measure, "null_untrained" if inverse else "null_shuffled")
            null = null[~null["tuned"].astype(bool)]
            if len(null):
                axes.axhline(null["value"].iloc[0], color=colour, alpha=0.6, **dashed)
            handles.append(legend_line(name, color=colour, marker=marker))
            drawn.append(tuned)
            told.append(f"{name}: {', '.join(f'{row.value:.3f} at t = {row.t:g}' for row in tuned.itertuples())}.")
        handles.append(legend_line("untouched target", color=NULL_COLOUR, **dotted))
        handles.append(legend_line("null", color=NULL_COLOUR, **dashed))
        legend_above(figure, handles, 3)
        axes.set_xlabel("t: share of the reconstruction loss (0 = tuned for the task alone)")
        axes.set(ylabel="score (0 to 1)", ylim=(-0.03, 1.03))
        figure.caption = (
            "The task's score after tuning with (1 − t) · task + t · reconstruction; dotted: the untouched target; "
            f"dashed: nulls (another image's answer; a probe on random weights). {_sizes(pd.concat(drawn))}."
        )
        figure.description = "Task score by t. " + " ".join(told)
    return figure


def score_against_psnr(metrics: pd.DataFrame) -> ShownFigure:
    """The task's score against PSNR: one line a tap through all t, the untouched target as a star.

    PSNR is of linear inverses fitted anew to each tuned target. At most seven taps are drawn, evenly by depth.
    """
    score = _score_of(metrics)
    scores, psnr = _rows(metrics, score).set_index("t"), _rows(metrics, "psnr", FRESH)
    taps = taps_in_order(psnr)
    chosen = [taps[i] for i in np.unique(np.linspace(0, len(taps) - 1, min(7, len(taps))).round().astype(int))]
    ts = sorted(set(psnr["t"].dropna()))
    start_score = scores.loc[~scores["tuned"].astype(bool), "value"].iloc[0]
    null_look = look_of("null_mean").line
    with styled_figure(COLUMN_WIDTH, 3.2) as figure:
        axes = figure.subplots()
        for marker, tap in zip("osD^vPX", chosen, strict=False):
            at = psnr[psnr["tap"] == tap]
            tuned, untouched = at[at["t"].notna()].sort_values("t"), at[at["t"].isna()].iloc[0]
            y = scores.loc[tuned["t"]]
            axes.plot(tuned["value"], y["value"], color="#bbbbbb", linewidth=1, zorder=1)
            for row, (_, value) in zip(tuned.itertuples(), y.iterrows(), strict=True):
                style = {"color": t_colour(row.t), "marker": marker, "markersize": 4.5, "elinewidth": 0.7}
                across = [[row.value - row.low], [row.high - row.value]]
                # The interval of the score is the same at every tap: once is enough.
                up = [[value["value"] - value["low"]], [value["high"] - value["value"]]] if tap == taps[-1] else None
                axes.errorbar([row.value], [value["value"]], xerr=across, yerr=up, **style)
            axes.plot(untouched["value"], start_score, "*", color=START_COLOUR, markersize=8, zorder=3)
        null = _rows(metrics, "psnr", "null_mean")["value"]
        if len(null):
            axes.axvline(null.iloc[0], **null_look)
        handles = [legend_line(tap, color="#888888", marker=m) for m, tap in zip("osD^vPX", chosen, strict=False)]
        handles += [legend_line(f"t = {t:g}", color=t_colour(t), marker="o", linestyle="none") for t in ts]
        handles.append(legend_line("untouched", color=START_COLOUR, marker="*", linestyle="none"))
        handles.append(legend_line(look_of("null_mean").label, **null_look))
        figure.legend(handles=handles, loc="outside right upper")
        axes.set(xlabel="PSNR of linear inverses fitted anew (dB)", ylabel=measure_name(score))
        figure.caption = (
            "Task score against reconstruction, one line a tap, through all values of t; the interval of the score is "
            f"drawn at the deepest tap. {_sizes(psnr[psnr['t'].notna()])}."
        )
        told = []
        for tap in (chosen[0], chosen[-1]):
            values = psnr[psnr["tap"] == tap].set_index("t")["value"]
            told.append(f"{tap}: " + ", ".join(f"{values[t]:.2f} dB at t = {t:g}" for t in ts))
        figure.description = f"{measure_name(score)} against PSNR. {'; '.join(told)}."
    return figure


def by_depth(metrics: pd.DataFrame, measures: Sequence[str]) -> ShownFigure:
    """Measures by depth, one panel each, one line for each t; nulls dashed. Inverses are linear ones, fitted anew.

    measures: with a value at taps, such as psnr, psnr_objects, hue_error, cka_to_start, token_cosine, cross_psnr.
    Those that the table does not have are left out. Raises BacksightError where it has none of them.
    """
    panels = {measure: metrics[(metrics["measure"] == measure) & metrics["tap"].notna()] for measure in measures}
    panels = {measure: rows for measure, rows in panels.items() if len(rows)}
    if not panels:
        raise BacksightError(f"the table has none of {', '.join(measures)} at any tap: choose other measures.")
    own = {m: rows[rows["inverse"].isna() | (rows["inverse"] == FRESH)] for m, rows in panels.items()}
    with styled_figure(COLUMN_WIDTH, 2.5 * -(-len(panels) // 2) + 0.5) as figure:
        nulls: dict[str, Line2D] = {}
        for axes, (measure, rows) in zip(panels_of(figure, len(panels), 2), panels.items(), strict=True):
            taps = taps_in_order(own[measure])
            place = {tap: x for x, tap in enumerate(taps)}
            _draw_by_depth(axes, own[measure], place)
            for name in ("null_mean", "null_shuffled", "null_untrained"):
                null = rows[(rows["inverse"] == name) & rows["tap"].isin(taps)]
                # Shuffled features of the untouched target stand for those of all t, unless only tuned ones have any.
                null = null[null["t"].isna()] if null["t"].isna().any() else null.drop_duplicates("tap")
                if len(null):
                    null = null.assign(x=null["tap"].map(place)).sort_values("x")
                    style = look_of(name).line | {"linewidth": 1}
                    axes.plot(null["x"], null["value"], **style)
                    nulls[name] = legend_line(look_of(name).label, **style)
            name_taps(axes, taps)
            axes.set_ylabel(NAMES.get(measure, measure))
            if measure == "hue_error":  # small errors and the null of about 90 degrees both have to be seen
                axes.set_yscale("symlog", linthresh=10, linscale=2)
                axes.set_yticks(HUE_TICKS, [str(tick) for tick in HUE_TICKS])
                axes.set_ylim(0, 180)
        drawn = pd.concat([rows[rows["tuned"].astype(bool)] for rows in panels.values()])
        handles = [legend_line("untouched target", **START_LOOK)]
        handles += [
            legend_line(f"t = {t:g}", color=t_colour(t), marker="o", markersize=3)
            for t in sorted(set(drawn["t"].dropna()))
        ]
        legend_above(figure, [*handles, *nulls.values()], 5)
        figure.supxlabel("tap, shallow → deep", fontsize=NORMAL)
        figure.caption = f"Lines are values of t, bands their intervals; dashed: nulls. {_sizes(drawn)}."
        told = " ".join(_ends_in_words(measure, rows) for measure, rows in own.items())
        figure.description = f"Curves by depth, one for each t. {told}"
    return figure


def _draw_by_depth(axes: Axes, rows: pd.DataFrame, place: Mapping[str, int]) -> None:
    """One line for each t with its band, the untouched target in black."""
    for t in [None, *sorted(set(rows["t"].dropna()))]:
        line = rows[rows["t"].isna()] if t is None else rows[rows["t"] == t]
        if len(line):
            line = line.assign(x=line["tap"].map(place)).sort_values("x")
            style = START_LOOK if t is None else {"color": t_colour(t), "marker": "o"}
            draw_band(axes, line["x"], line, 0.13, markersize=3, **style)


def _ends_in_words(measure: str, rows: pd.DataFrame) -> str:
    taps = taps_in_order(rows)
    told = []
    for tap in dict.fromkeys((taps[0], taps[-1])):
        at = rows[rows["tap"] == tap].sort_values("t", na_position="first")
        names = [START if pd.isna(t) else f"t = {t:g}" for t in at["t"]]
        values = ", ".join(f"{value:.3g} ({name})" for value, name in zip(at["value"], names, strict=True))
        told.append(f"{values} at {tap}")
    return f"{NAMES.get(measure, measure)}: {'; '.join(told)}."


def pictures_by_t(images: Any, pictures: Mapping[str, Any], tap: str) -> ShownFigure:
    """Images as rows; the input and its reconstruction at one tap from the untouched and from each tuned target.

    images: (B, 3, H, W) in [0, 1], of which five are shown; pictures: {"start" or "t = …": (B, 3, H, W)}; each with
    its PSNR in dB. Raises BacksightError where shapes disagree or values leave [0, 1].
    """
    inputs = as_pictures(images, "images")[:5]
    made = {name: as_pictures(values, name)[:5] for name, values in pictures.items()}
    if not made or any(values.shape != inputs.shape for values in made.values()):
        raise BacksightError("pictures by t need reconstructions of the shape of the images, at least for one t.")
    figure = scored_table(inputs, made, {START: "untouched"})
    figure.caption = f"Rebuilt from {tap} of the untouched and of each tuned target, by linear inverses fitted anew."
    return figure
