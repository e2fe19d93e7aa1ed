"""Figures of the stability study, from the tables and pictures of `studies.stability.measure_stability`.

The effective size of a noise is on a log axis, since formats and Gaussians lie six decades apart; formats are hollow.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from torch import Tensor

from backsight.errors import BacksightError
from backsight.plots.grids import as_pictures, bare, decibels, show_picture
from backsight.plots.style import (
    COLUMN_WIDTH,
    INVERSE_NAMES,
    NORMAL,
    NULL_COLOUR,
    SMALL,
    ShownFigure,
    depth_colours,
    draw_band,
    draw_bars,
    inverse_order,
    is_null,
    legend_above,
    legend_line,
    look_of,
    name_taps,
    panels_of,
    rows_of,
    sample_size,
    styled_figure,
    taps_in_order,
)

FORMATS = ("float32", "float16", "bfloat16", "int8")
ALLOWED = -0.1  # dB that MAP may lie below the best trained decoder
SIZE = "effective noise σ, relative to the deviation of the tap's values"
MARKERS = "os^Dv<>"
KINDS_OF_SHARE = MappingProxyType({"fragile_colour_share": "colour", "fragile_detail_share": "detail"})
_AS_PREDICTED: Mapping[str, Any] = MappingProxyType({"color": "#000000", "linewidth": 0.7, "linestyle": (0, (5, 2))})


def _rows(metrics: pd.DataFrame, *measures: str, by_noise: bool = True) -> pd.DataFrame:
    rows = rows_of(metrics, measures)
    rows = rows[rows["tap"].notna() & (rows["sigma"].notna() | (not by_noise))]
    if rows.empty:
        raise BacksightError(f"the table has no {' or '.join(measures)}: measure_stability writes it.")
    return rows.sort_values(["depth", "sigma"], kind="stable")


def _counted(rows: pd.DataFrame) -> str:
    return f"{sample_size(rows)}, 95 % bootstrap intervals"


def _line(axes: Axes, rows: pd.DataFrame, name: str) -> Line2D:
    """A line with its band by noise; formats are hollow, Gaussian noise is filled; nulls dashed, without."""
    look, null = look_of(name), name.startswith("null_")
    draw_band(axes, rows["sigma"], rows, 0 if null else 0.15, **(look.line | {"marker": ""}))
    formats = rows["noise"].isin(FORMATS)
    for part, face in ((rows[~formats], look.colour), (rows[formats], "white")) if not null else ():
        style: dict[str, Any] = {
            "color": look.colour,
            "linestyle": "none",
            "marker": look.marker,
            "markersize": 4,
            "mfc": face,
        }
        axes.plot(part["sigma"], part["value"], **style)
    return legend_line(look.label, **look.line)


def _log_sigma(axes: Axes, rows: pd.DataFrame) -> None:
    axes.set_xscale("log")
    axes.set_xlim(rows["sigma"].min() / 5, rows["sigma"].max() * 2.5)


def psnr_by_noise(metrics: pd.DataFrame) -> ShownFigure:
    """PSNR by the size of the noise, one panel a tap, one line an inverse; named formats are hollow, nulls dashed."""
    rows = _rows(metrics, "psnr")
    taps, names = taps_in_order(rows), inverse_order(list(rows["inverse"]))
    with styled_figure(COLUMN_WIDTH, 2.3 * -(-len(taps) // 3) + 0.75) as figure:
        handles: dict[str, Line2D] = {}
        told = []
        for axes, tap in zip(panels_of(figure, len(taps), 3, sharey=True), taps, strict=True):
            at = rows[rows["tap"] == tap]
            ends = []
            for name in names:
                if len(line := at[at["inverse"] == name]):
                    handles[name] = _line(axes, line, name)
                    first, last = line.iloc[0], line.iloc[-1]
                    said = f"{first.value:.2f} dB at σ = {first.sigma:.1e}, {last.value:.2f} at {last.sigma:.1e}"
                    ends.append(f"{name} {said}")
            # Where the named formats lie at this tap, as thin lines with their names at the top.
            for noise, sigma in at[at["noise"].isin(FORMATS)].groupby("noise")["sigma"].first().items():
                axes.axvline(sigma, color="#999999", linewidth=0.6, linestyle=(0, (1, 2)), zorder=0)
                style: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
                style |= {"rotation": 90, "va": "top", "ha": "right", "fontsize": SMALL, "color": NULL_COLOUR}
                axes.annotate(str(noise), (sigma, 1.0), xytext=(-1.5, -2), **style)
            _log_sigma(axes, at)
            axes.set_title(tap)
            told.append(f"{tap}: {'; '.join(ends)}.")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.22 * (high - low))  # shared; room for the formats' names
        figure.supxlabel(SIZE, fontsize=NORMAL)
        figure.supylabel("PSNR (dB)", fontsize=NORMAL)
        legend_above(figure, [handles[name] for name in names], handlelength=2.8)
        figure.caption = (
            "All inverses read the same disturbed values; hollow: storage formats, filled: Gaussian noise; bands: "
            f"intervals; dashed grey: nulls. {_counted(rows[~is_null(rows)])}."
        )
        figure.description = "PSNR by noise. " + " ".join(told)
    return figure


def map_gain(metrics: pd.DataFrame) -> ShownFigure:
    """MAP − the best trained decoder of each tap and noise, by the size of the noise, one line a tap."""
    rows = _rows(metrics, "psnr_difference")
    rows = rows[rows["against"] == "best"]
    taps = taps_in_order(rows)
    border: dict[str, Any] = {"color": "#b2182b", "linestyle": (0, (5, 2))}
    with styled_figure(COLUMN_WIDTH, 2.8) as figure:
        axes = figure.subplots()
        handles = []
        for place, (tap, colour) in enumerate(depth_colours(taps, end=0.85).items()):
            at = rows[rows["tap"] == tap]
            x = at["sigma"] * 1.06 ** (place - (len(taps) - 1) / 2)  # side by side, not on top of one another
            marker = MARKERS[place % 7]
            axes.plot(x, at["value"], color=colour, linewidth=1.1)
            formats = at["noise"].isin(FORMATS)
            for which, face in ((~formats, colour), (formats, "white")):
                draw_bars(axes, x[which], at[which], color=colour, marker=marker, mfc=face, linestyle="none")
            handles.append(legend_line(tap, color=colour, marker=marker))
        axes.axhline(0, color="#000000", linewidth=0.7)
        axes.axhline(ALLOWED, linewidth=1, **border)
        handles.append(legend_line(f"{ALLOWED:g} dB".replace("-", "−"), **border))
        _log_sigma(axes, rows)
        legend_above(figure, handles, 5, handlelength=2.8)
        axes.set(xlabel=SIZE, ylabel="MAP − best of direct and modular (dB)")
        worst = rows.sort_values("low").iloc[0]
        figure.caption = (
            "PSNR of the MAP inverse minus that of the better trained decoder at the same tap and noise, paired image "
            f"by image; hollow: storage formats. {_counted(rows)}."
        )
        figure.description = (
            f"Differences from {rows['value'].min():.2f} to {rows['value'].max():.2f} dB; the lowest interval begins "
            f"at {worst.low:.2f} dB ({worst.tap}, {worst.noise})."
        )
    return figure


def recoverable_by_depth(metrics: pd.DataFrame) -> ShownFigure:
    """Number of a picture's directions that a tap shows more strongly than the noise, one line a σ."""
    rows = _rows(metrics, "recoverable")
    taps, sigmas = taps_in_order(rows), sorted(set(rows.loc[rows["value"].notna(), "sigma"]))
    labels = {"dimensions": "all of a picture", "dimensions_embedded": "what the embedding passes on"}
    with styled_figure(COLUMN_WIDTH, 2.8) as figure:
        axes = figure.subplots()
        handles = []
        for sigma, colour in depth_colours(sigmas, "plasma", 0.85).items():
            at = rows[rows["sigma"] == sigma]
            draw_band(axes, at["tap"].map(taps.index), at, 0.15, color=colour, marker="o")
            handles.append(legend_line(f"σ = {sigma:g}", color=colour, marker="o"))
        for (name, label), dashes in zip(labels.items(), ((6, 2), (2, 1.5)), strict=True):
            limit = metrics.loc[metrics["measure"] == name, "value"].iloc[0]
            style: dict[str, Any] = {"color": NULL_COLOUR, "linestyle": (0, dashes)}
            axes.axhline(limit, linewidth=1, **style)
            handles.append(legend_line(f"{label}: {limit:.0f}", **style))
        name_taps(axes, taps)
        if bool((rows["value"].dropna() > 0).all()):
            axes.set_yscale("log")  # a few hundred of many thousands, at deep taps
        axes.set(xlabel="tap, shallow → deep", ylabel="recoverable directions")
        legend_above(figure, handles, handlelength=2.8)
        missing = rows.loc[rows["value"].isna(), "sigma"]
        more = f" Not drawn: what the products did not reach, at most σ = {missing.max():g}." if len(missing) else ""
        figure.caption = (
            "Directions of the images' own prior that move a tap's values by more than Gaussian noise σ. "
            f"{_counted(rows[rows['n'] > 0])}.{more}"
        )
        told = (f"{r.value:.0f} at {r.tap}, σ = {r.sigma:g}" for r in rows.dropna(subset=["value"]).itertuples())
        figure.description = "Recoverable directions by depth: " + "; ".join(told) + "."
    return figure


def amplification_by_step(metrics: pd.DataFrame) -> ShownFigure:
    """How much inverting half-steps amplifies an error: each alone, in the worst direction, and all on the way."""
    known = ("mean", "largest", "chain")
    rows = _rows(metrics, *(f"amplification_{name}" for name in known), by_noise=False)
    deepest = rows["against"].dropna().unique()
    steps = list(dict.fromkeys(rows.loc[rows["measure"] == "amplification_mean", "step"]))
    looks = {
        "mean": ("#0173b2", "o", "white noise (root mean square)"),
        "largest": ("#d55e00", "^", "worst direction"),
        "chain": ("#029e73", "s", f"white noise of {', '.join(deepest)}, all the way back to here"),
    }
    none: dict[str, Any] = {"color": NULL_COLOUR, "linestyle": (0, (6, 2))}
    with styled_figure(COLUMN_WIDTH, 2.8) as figure:
        axes = figure.subplots()
        handles = []
        for number, name in enumerate(known):
            colour, marker, label = looks[name]
            at = rows[rows["measure"] == f"amplification_{name}"]
            at = at.assign(x=at["step"].map(steps.index)).sort_values("x")
            draw_bars(axes, at["x"] + 0.1 * (number - 1), at, color=colour, marker=marker)
            handles.append(legend_line(label, color=colour, marker=marker))
            for missing in at.loc[at["value"].isna(), "x"]:
                axes.text(missing, 0.97, "∞", transform=axes.get_xaxis_transform(), color=colour, va="top")
        axes.axhline(1, linewidth=1, **none)
        axes.set_yscale("log")
        name_taps(axes, steps)
        axes.set_xlim(-0.6, len(steps) - 0.4)
        axes.set(xlabel="half-step that is inverted, shallow → deep", ylabel="growth of an error, |J⁻¹e| / |e|")
        legend_above(figure, [*handles, legend_line("no amplification", **none)], handlelength=2.8)
        figure.caption = (
            "At the true stream, for small errors; the worst direction of attention is a lower bound. "
            f"{_counted(rows[rows['n'] > 0])}."
        )
        told = (f"{r.step} {str(r.measure).removeprefix('amplification_')} {r.value:.3g}" for r in rows.itertuples())
        figure.description = "Amplification by half-step: " + "; ".join(told) + "."
    return figure


def reliability_curves(reliability: pd.DataFrame, metrics: pd.DataFrame) -> ShownFigure:
    """Actual against predicted deviation, one panel a tap, one line a noise; a constant is one predicted value.

    metrics: for the calibration errors of MAP and of the constant, in the description.
    """
    taps = taps_in_order(reliability)
    noises = depth_colours(list(dict.fromkeys(reliability.sort_values("sigma")["noise"])), "plasma", 0.85)
    looks = {
        noise: {"color": colour, "marker": MARKERS[place % 7], "markersize": 3}
        for place, (noise, colour) in enumerate(noises.items())
    }
    both = reliability[["predicted", "actual"]].to_numpy()
    low, high = both[both > 0].min() / 1.3, both.max() * 1.3
    with styled_figure(COLUMN_WIDTH, 2.2 * -(-len(taps) // 3) + 0.75) as figure:
        for axes, tap in zip(panels_of(figure, len(taps), 3, sharex=True, sharey=True), taps, strict=True):
            axes.plot([low, high], [low, high], **_AS_PREDICTED)
            for noise, look in looks.items():
                at = reliability[(reliability["tap"] == tap) & (reliability["noise"] == noise)].sort_values("bin")
                axes.plot(at["predicted"], at["actual"], **look)
                overall = np.sqrt(np.average(at["actual"] ** 2, weights=at["n"]))
                cross = {"color": look["color"], "markersize": 6, "markeredgewidth": 1.5}
                axes.plot(at["constant"].iloc[0], overall, "x", **cross)
            axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), title=tap, aspect="equal")
        figure.supxlabel("predicted deviation of a pixel (range 0 to 1)", fontsize=NORMAL)
        figure.supylabel("actual error (root mean square)", fontsize=NORMAL)
        handles = [legend_line(noise, **look) for noise, look in looks.items()]
        handles.append(legend_line("as predicted", **_AS_PREDICTED))
        handles.append(legend_line("null: one constant", color=NULL_COLOUR, marker="x", linestyle="none"))
        legend_above(figure, handles, 5, handlelength=2.8)
        figure.caption = (
            "Bins of equally many pixels by predicted deviation of the MAP inverse; on the dashed line it means what "
            "it says. A constant deviation is one cross: it cannot say where."
        )
        errors = rows_of(metrics, "calibration_error").itertuples()
        told = "; ".join(f"{r.inverse} {r.value:.2f} at {r.tap}, {r.noise}" for r in errors)
        figure.description = f"Reliability of predicted deviations. Calibration errors: {told}."
    return figure


def uncertainty_pictures(
    images: Tensor,
    pictures: Mapping[tuple[str, str], Mapping[str, Tensor]],
    deviations: Mapping[tuple[str, str], tuple[Tensor, Tensor]],
) -> ShownFigure:
    """Image, MAP reconstruction, predicted deviation and actual error, at the first noise of at most four taps.

    images: (k, 3, H, W), of which two are shown; pictures, deviations: of `Stability`, by tap and noise. Deviation and
    error of a tap share one colour scale.
    """
    inputs = as_pictures(images, "images")[:2]
    first = {tap: (tap, noise) for tap, noise in reversed(list(pictures))}
    jobs = [job for job in pictures if job in first.values()][:4]
    rows = [(job, number) for job in jobs for number in range(len(inputs))]
    tall = min((COLUMN_WIDTH - 0.75) / 4.3 * inputs.shape[2] / inputs.shape[3], 8 / len(rows))
    correlated = []
    with styled_figure(COLUMN_WIDTH, (tall + 0.12) * len(rows) + 0.3) as figure:
        grid = figure.subplots(len(rows), 4, squeeze=False)
        for line, (job, number) in zip(grid, rows, strict=True):
            made = as_pictures(pictures[job]["map"], f"map at {job[0]}")[: len(inputs)]
            maps = np.stack([np.asarray(values)[: len(inputs)] for values in deviations[job]])
            scale = Normalize(0, max(float(np.quantile(maps, 0.995)), 1e-6))
            show_picture(line[0], inputs[number])
            show_picture(line[1], made[number], f"{decibels(inputs, made)[number]:.1f} dB")
            for axes, values in zip(line[2:], maps, strict=True):
                drawn = axes.imshow(values[number], norm=scale, cmap="magma", interpolation="nearest")
                bare(axes)
            bar = figure.colorbar(drawn, ax=list(line[2:]), shrink=0.85, pad=0.01, aspect=12)
            bar.outline.set_visible(False)
            if number == 0:
                line[0].set_ylabel(f"{job[0]}\n{job[1]}", fontsize=SMALL)
                correlated.append(f"{job[0]} at {job[1]}: {np.corrcoef(*maps.reshape(2, -1))[0, 1]:.2f}")
        titles = ("image", "most probable (MAP)", "predicted deviation", "actual error")
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(title, fontsize=NORMAL)
        figure.caption = (
            "What the MAP inverse expects to get wrong, and what it got wrong: root mean square over the channels, one "
            "scale for each tap and noise."
        )
        figure.description = f"Correlation of predicted and actual error: {'; '.join(correlated)}."
        figure.shows_images = True
    return figure


def fragile_directions(
    metrics: pd.DataFrame,
    images: Tensor,
    directions: Mapping[str, tuple[Tensor, Tensor]],
    random_directions: Mapping[str, Tensor],
) -> ShownFigure:
    """What cannot be known: least-seen directions as pictures, and what they are made of beside random ones.

    images: (k, 3, H, W), the first one is shown; directions, random_directions: of `Stability`; at most four taps.
    """
    shares = rows_of(metrics, list(KINDS_OF_SHARE))
    taps = taps_in_order(shares)
    chosen = [taps[i] for i in np.unique(np.linspace(0, len(taps) - 1, min(4, len(taps))).round().astype(int))]
    count = min(3, *(len(directions[tap][0]) for tap in chosen))
    above_height = (min(1.3, (COLUMN_WIDTH - 0.6) / (2 + count)) + 0.18) * len(chosen)
    styles = {
        "map": ("least-seen directions", {"color": "#000000", "marker": "o"}),
        "map_error": ("what MAP got wrong", {"color": "#b2182b", "marker": "D"}),
        "null_random": (INVERSE_NAMES["null_random"], look_of("null_random").line | {"marker": "_"}),
    }
    with styled_figure(COLUMN_WIDTH, above_height + 2.75) as figure:
        halves: Any = figure.subfigures(2, 1, height_ratios=[above_height + 0.2, 2.5])
        above, below = halves
        for line, tap in zip(above.subplots(len(chosen), 2 + count, squeeze=False), chosen, strict=True):
            patterns, left = (np.asarray(values) for values in directions[tap])
            cells = [(as_pictures(images, "images")[0], "image")]
            cells += [(_as_picture(patterns[k]), f"{100 * left[k]:.0f} % left") for k in range(count)]
            cells.append((_as_picture(np.asarray(random_directions[tap])[0]), "random"))
            for axes, (picture, text) in zip(line, cells, strict=True):
                show_picture(axes, picture, text)
            line[0].set_ylabel(tap, fontsize=SMALL)
        for axes, (measure, title) in zip(panels_of(below, 2, 2, sharey=True), KINDS_OF_SHARE.items(), strict=True):
            for number, (name, (_, style)) in enumerate(styles.items()):
                at = shares[(shares["measure"] == measure) & (shares["inverse"] == name)]
                at = at.assign(x=at["tap"].map(taps.index)).sort_values("x")
                draw_bars(axes, at["x"] + 0.1 * (number - 1), at, **style)
            name_taps(axes, taps)
            axes.set(title=title, ylim=(-0.03, 1.03))
            axes.margins(x=0.1)
        below.axes[0].set_ylabel("share of energy")
        legend_above(below, [legend_line(label, **style) for label, style in styles.values()], 3, handlelength=2.8)
        figure.caption = (
            "Directions that the tap shows least, and the share of the prior's variance left in them, at the least "
            "noise; below, the share of their energy that is colour, or fine detail (frequencies above which images "
            f"have 10 % of their power). {_counted(shares[shares['inverse'] == 'map'])}."
        )
        told = (
            f"{KINDS_OF_SHARE[str(r.measure)]} at {r.tap}: {r.value:.2f} ({styles[str(r.inverse)][0]})"
            for r in shares.itertuples()
        )
        figure.description = "Shares of energy: " + "; ".join(told) + "."
        figure.shows_images = True
    return figure


def _as_picture(pattern: np.ndarray) -> np.ndarray:
    """A signed pattern about mid-grey, its 99.5 % quantile at black or white."""
    size = max(float(np.quantile(np.abs(pattern), 0.995)), 1e-12)
    return np.clip(0.5 + 0.5 * pattern / size, 0, 1)
