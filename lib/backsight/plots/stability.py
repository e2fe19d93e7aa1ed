"""Figures of the stability study, from the tables and pictures of `stability_study.measure_stability`.

Inverse families keep the colours that they have everywhere; the most probable picture (MAP) is black, its noise-aware
start violet, the exact solve brown; nulls are grey and dashed. The effective size of a noise is on a log axis, since
formats and Gaussians lie six decades apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D

from backsight.errors import BacksightError
from backsight.plots.style import (
    COLUMN_WIDTH,
    FAMILY_COLOURS,
    INVERSE_NAMES,
    NORMAL,
    SMALL,
    ShownFigure,
    _pixels,
    _psnr,
    family_colour,
    styled_figure,
    taps_in_order,
)

NULL_COLOUR = "#5f5f5f"
STUDY_COLOURS: Mapping[str, str] = {"steadied": "#6a51a3"}
STUDY_NAMES: Mapping[str, str] = {
    **INVERSE_NAMES,
    "map": "most probable (MAP)",
    "steadied": "start of MAP: decoder, steadied",
    "exact": "exact solve",
    "best": "best of direct and modular",
    "null_constant": "null: constant deviation",
    "null_random": "null: random directions of the prior",
    "map_error": "what MAP got wrong",
}
_MARKERS: Mapping[str, str] = {
    "linear": "o",
    "direct": "s",
    "modular": "^",
    "modular_polished": "D",
    "map": "o",
    "steadied": "v",
    "exact": "P",
}
_DASHES: Mapping[str, Any] = {"steadied": (0, (3, 1.5)), "null_mean": (0, (6, 2)), "null_shuffled": (0, (3, 1.5))}
FORMATS = ("float32", "float16", "bfloat16", "int8")
ALLOWED = -0.1  # dB that MAP may lie below the best trained decoder
SIZE = "effective noise σ, relative to the deviation of the tap's values"


def _colour(name: str) -> str:
    return STUDY_COLOURS.get(name) or family_colour(name)


def _order(names: Sequence[str]) -> list[str]:
    known = [*FAMILY_COLOURS, "steadied", "map", "exact", "null_mean", "null_shuffled"]
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def _rows(metrics: pd.DataFrame, measure: str, by_noise: bool = True) -> pd.DataFrame:
    needed = ["tap", "depth", "inverse", "measure", "value", "low", "high", "n", "noise", "sigma", "seeds", "against"]
    if missing := [column for column in needed if column not in metrics.columns]:
        raise BacksightError(f"the table lacks the columns {', '.join(missing)}: give the metrics of 11_exact.")
    rows = metrics[(metrics["measure"] == measure) & metrics["tap"].notna()]
    rows = rows[rows["sigma"].notna()] if by_noise else rows
    if rows.empty:
        raise BacksightError(f"the table has no {measure}: measure_stability writes it.")
    return rows.sort_values(["depth", "sigma"], kind="stable")


def _counted(rows: pd.DataFrame) -> str:
    low, high = int(rows["n"].min()), int(rows["n"].max())
    images = f"{low} to {high}" if low < high else f"{high}"
    known = rows["seeds"].dropna()
    few, many = (int(known.min()), int(known.max())) if len(known) else (1, 1)
    seeds = f"{few} to {many}" if few < many else f"{many}"
    return f"n = {images} images, {seeds} training seed{'' if many == 1 else 's'}, 95 % bootstrap intervals"


def _panels(figure: Any, count: int, **shared: Any) -> list[Axes]:
    columns = min(count, 3)
    grid = figure.subplots(-(-count // columns), columns, squeeze=False, sharey=True, **shared)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return list(grid.flat[:count])


def _size(count: int, panel: float, above: float) -> float:
    return panel * -(-count // 3) + above


def _line(axes: Axes, rows: pd.DataFrame, x: str, name: str, label: str | None = None) -> Line2D:
    """A line with its band; formats are hollow, Gaussian noise is filled."""
    colour, dashes = _colour(name), _DASHES.get(name, "-")
    null = name.startswith("null_")
    axes.plot(rows[x], rows["value"], color=colour, linestyle=dashes, linewidth=1.0 if null else 1.4)
    axes.fill_between(rows[x], rows["low"], rows["high"], color=colour, alpha=0 if null else 0.15, linewidth=0)
    marker = "" if null else _MARKERS.get(name, "d")
    formats = rows["noise"].isin(FORMATS) if "noise" in rows else pd.Series(False, index=rows.index)
    for part, face in ((rows[~formats], colour), (rows[formats], "white")):
        axes.plot(part[x], part["value"], color=colour, linestyle="none", marker=marker, markersize=4, mfc=face)
    return Line2D([], [], color=colour, linestyle=dashes, marker=marker, label=label or STUDY_NAMES.get(name, name))


def _mark_formats(axes: Axes, rows: pd.DataFrame) -> None:
    """Where the named formats lie at this tap, as thin lines with their names at the top."""
    places = rows[rows["noise"].isin(FORMATS)].groupby("noise")["sigma"].first()
    for noise, sigma in places.items():
        axes.axvline(sigma, color="#999999", linewidth=0.6, linestyle=(0, (1, 2)), zorder=0)
        axes.annotate(
            str(noise),
            (sigma, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-1.5, -2),
            textcoords="offset points",
            rotation=90,
            va="top",
            ha="right",
            fontsize=SMALL,
            color=NULL_COLOUR,
        )


def _legend(figure: Any, handles: Sequence[Line2D], across: int = 4) -> None:
    figure.legend(handles=list(handles), loc="outside upper center", ncols=min(across, len(handles)), handlelength=2.8)


def _log_sigma(axes: Axes, rows: pd.DataFrame) -> None:
    axes.set_xscale("log")
    low, high = rows["sigma"].min(), rows["sigma"].max()
    axes.set_xlim(low / 5, high * 2.5)


def psnr_by_noise(metrics: pd.DataFrame, width: float = COLUMN_WIDTH, panel_height: float = 2.3) -> ShownFigure:
    """PSNR by the size of the noise, one panel a tap, one line an inverse; named formats are hollow, nulls dashed."""
    rows = _rows(metrics, "psnr")
    taps, names = taps_in_order(rows), _order(list(rows["inverse"]))
    with styled_figure(width, _size(len(taps), panel_height, 0.75)) as figure:
        handles: dict[str, Line2D] = {}
        for axes, tap in zip(_panels(figure, len(taps)), taps, strict=True):
            at = rows[rows["tap"] == tap]
            for name in names:
                if len(line := at[at["inverse"] == name]):
                    handles[name] = _line(axes, line, "sigma", name)
            _mark_formats(axes, at)
            _log_sigma(axes, at)
            axes.set_title(tap)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.22 * (high - low))  # shared; room for the formats' names
        figure.supxlabel(SIZE, fontsize=NORMAL)
        figure.supylabel("PSNR (dB)", fontsize=NORMAL)
        _legend(figure, [handles[name] for name in names])
        own = rows[~rows["inverse"].str.startswith("null_")]
        figure.caption = (
            "All inverses read the same disturbed values; hollow: storage formats, filled: Gaussian noise; bands: "
            f"intervals; dashed grey: nulls. {_counted(own)}."
        )
        figure.description = "PSNR by noise. " + " ".join(_ends(rows, tap, names) for tap in taps)
    return figure


def _ends(rows: pd.DataFrame, tap: str, names: Sequence[str]) -> str:
    told = []
    for name in names:
        line = rows[(rows["tap"] == tap) & (rows["inverse"] == name)]
        if len(line):
            least, most = line.iloc[0], line.iloc[-1]
            told.append(f"{name} {least.value:.2f} dB at σ = {least.sigma:.1e}, {most.value:.2f} at {most.sigma:.1e}")
    return f"{tap}: {'; '.join(told)}."


def map_gain(
    metrics: pd.DataFrame, against: str = "best", width: float = COLUMN_WIDTH, height: float = 2.8
) -> ShownFigure:
    """MAP − a decoder (default: the best one of each tap and noise) by the size of the noise, one line a tap."""
    rows = _rows(metrics, "psnr_difference")
    rows = rows[rows["against"] == against]
    if rows.empty:
        raise BacksightError(f"the table has no psnr_difference against {against!r}.")
    taps = taps_in_order(rows)
    with styled_figure(width, height) as figure:
        axes = figure.subplots()
        handles = []
        for place, tap in enumerate(taps):
            at = rows[rows["tap"] == tap]
            colour = _depth_colour(place, len(taps))
            x = at["sigma"] * 1.06 ** (place - (len(taps) - 1) / 2)  # side by side, not on top of one another
            spread = np.abs(at[["low", "high"]].to_numpy(float).T - at["value"].to_numpy(float))
            marker = "os^Dv<>"[place % 7]
            axes.plot(x, at["value"], color=colour, linewidth=1.1)
            for formats in (False, True):
                which = (at["noise"].isin(FORMATS) == formats).to_numpy()
                axes.errorbar(
                    x[which],
                    at["value"][which],
                    yerr=spread[:, which],
                    color=colour,
                    marker=marker,
                    mfc="white" if formats else colour,
                    markersize=4,
                    linestyle="none",
                    capsize=2,
                    elinewidth=0.8,
                )
            handles.append(Line2D([], [], color=colour, marker=marker, label=tap))
        axes.axhline(0, color="#000000", linewidth=0.7)
        axes.axhline(ALLOWED, color="#b2182b", linewidth=1, linestyle=(0, (5, 2)))
        handles.append(
            Line2D([], [], color="#b2182b", linestyle=(0, (5, 2)), label=f"{ALLOWED:g} dB".replace("-", "−"))
        )
        _log_sigma(axes, rows)
        _legend(figure, handles, 5)
        axes.set_xlabel(SIZE)
        axes.set_ylabel(f"MAP − {STUDY_NAMES.get(against, against)} (dB)")
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


def _depth_colour(place: int, count: int) -> Any:
    return colormaps["viridis"](0.05 + 0.8 * place / max(1, count - 1))


def recoverable_by_depth(metrics: pd.DataFrame, width: float = COLUMN_WIDTH, height: float = 2.8) -> ShownFigure:
    """Number of a picture's directions that a tap shows more strongly than the noise, one line a σ."""
    rows = _rows(metrics, "recoverable")
    reached = rows[rows["value"].notna()]
    taps, sigmas = taps_in_order(rows), sorted(set(reached["sigma"]))
    place = {tap: x for x, tap in enumerate(taps)}
    limits = {name: metrics.loc[metrics["measure"] == name, "value"] for name in ("dimensions", "dimensions_embedded")}
    with styled_figure(width, height) as figure:
        axes = figure.subplots()
        handles = []
        for number, sigma in enumerate(sigmas):
            at = rows[rows["sigma"] == sigma]
            colour = colormaps["plasma"](0.05 + 0.8 * number / max(1, len(sigmas) - 1))
            x = at["tap"].map(place)
            axes.plot(x, at["value"], color=colour, marker="o")
            axes.fill_between(x, at["low"], at["high"], color=colour, alpha=0.15, linewidth=0)
            handles.append(Line2D([], [], color=colour, marker="o", label=f"σ = {sigma:g}"))
        labels = {"dimensions": "all of a picture", "dimensions_embedded": "what the embedding passes on"}
        for (name, values), dashes in zip(limits.items(), ((6, 2), (2, 1.5)), strict=True):
            if len(values) and (name == "dimensions" or values.iloc[0] < limits["dimensions"].iloc[0]):
                axes.axhline(values.iloc[0], color=NULL_COLOUR, linewidth=1, linestyle=(0, dashes))
                label = f"{labels[name]}: {values.iloc[0]:.0f}"
                handles.append(Line2D([], [], color=NULL_COLOUR, linestyle=(0, dashes), label=label))
        axes.set_xticks(range(len(taps)), taps, rotation=40, ha="right", rotation_mode="anchor")
        if bool((rows["value"].dropna() > 0).all()):
            axes.set_yscale("log")  # a few hundred of many thousands, at deep taps
        axes.set_xlabel("tap, shallow → deep")
        axes.set_ylabel("recoverable directions")
        _legend(figure, handles)
        missing = rows["value"].isna().sum()
        smallest = f"σ = {sorted(set(rows.loc[rows['value'].isna(), 'sigma']))[-1]:g}" if missing else ""
        more = f" Not drawn: what the products did not reach, at most {smallest}." if missing else ""
        figure.caption = (
            "Directions of the images' own prior that move a tap's values by more than Gaussian noise σ. "
            f"{_counted(rows[rows['n'] > 0])}.{more}"
        )
        told = (f"{r.value:.0f} at {r.tap}, σ = {r.sigma:g}" for r in rows.dropna(subset=["value"]).itertuples())
        figure.description = "Recoverable directions by depth: " + "; ".join(told) + "."
    return figure


def amplification_by_step(metrics: pd.DataFrame, width: float = COLUMN_WIDTH, height: float = 2.8) -> ShownFigure:
    """How much inverting half-steps amplifies an error: each alone, in the worst direction, and all on the way."""
    known = [name for name in ("mean", "largest", "chain") if f"amplification_{name}" in set(metrics["measure"])]
    rows = pd.concat([_rows(metrics, f"amplification_{name}", by_noise=False) for name in known or ["mean"]])
    deepest = [each for each in rows.get("against", pd.Series(dtype=object)).dropna().unique()]
    steps = list(dict.fromkeys(metrics.loc[metrics["measure"] == "amplification_mean", "step"]))
    place = {step: x for x, step in enumerate(steps)}
    styles = {
        "mean": ("#0173b2", "o", "white noise (root mean square)"),
        "largest": ("#d55e00", "^", "worst direction"),
        "chain": ("#029e73", "s", f"white noise of {', '.join(deepest)}, all the way back to here"),
    }
    styles = {name: style for name, style in styles.items() if name in known}
    with styled_figure(width, height) as figure:
        axes = figure.subplots()
        handles = []
        for number, (name, (colour, marker, label)) in enumerate(styles.items()):
            at = rows[rows["measure"] == f"amplification_{name}"]
            at = at.assign(x=at["step"].map(place)).sort_values("x")
            x = at["x"] + 0.1 * (number - 1)
            spread = np.abs(at[["low", "high"]].to_numpy(float).T - at["value"].to_numpy(float))
            axes.errorbar(x, at["value"], yerr=spread, color=colour, marker=marker, capsize=2, elinewidth=0.8)
            handles.append(Line2D([], [], color=colour, marker=marker, label=label))
            for missing in at.loc[at["value"].isna(), "x"]:
                axes.text(missing, 0.97, "∞", transform=axes.get_xaxis_transform(), color=colour, va="top")
        axes.axhline(1, color=NULL_COLOUR, linewidth=1, linestyle=(0, (6, 2)))
        handles.append(Line2D([], [], color=NULL_COLOUR, linestyle=(0, (6, 2)), label="no amplification"))
        axes.set_yscale("log")
        axes.set_xticks(range(len(steps)), steps, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.6, len(steps) - 0.4)
        axes.set_xlabel("half-step that is inverted, shallow → deep")
        axes.set_ylabel("growth of an error, |J⁻¹e| / |e|")
        _legend(figure, handles)
        figure.caption = (
            "At the true stream, for small errors; the worst direction of attention is a lower bound. "
            f"{_counted(rows[rows['n'] > 0])}."
        )
        told = (f"{r.step} {str(r.measure).removeprefix('amplification_')} {r.value:.3g}" for r in rows.itertuples())
        figure.description = "Amplification by half-step: " + "; ".join(told) + "."
    return figure


def reliability_curves(
    reliability: pd.DataFrame, metrics: pd.DataFrame | None = None, width: float = COLUMN_WIDTH, panel: float = 2.2
) -> ShownFigure:
    """Actual against predicted deviation, one panel a tap, one line a noise; a constant would be one predicted value.

    metrics: for the calibration errors of MAP and of the constant, in the description.
    """
    if missing := [each for each in ("tap", "noise", "sigma", "predicted", "actual", "n") if each not in reliability]:
        raise BacksightError(f"the table lacks the columns {', '.join(missing)}: give the reliability of 11_exact.")
    taps = taps_in_order(reliability)
    noises = list(dict.fromkeys(reliability.sort_values("sigma")["noise"]))
    both = reliability[["predicted", "actual"]].to_numpy()
    low, high = both[both > 0].min() / 1.3, both.max() * 1.3
    with styled_figure(width, _size(len(taps), panel, 0.75)) as figure:
        for axes, tap in zip(_panels(figure, len(taps), sharex=True), taps, strict=True):
            axes.plot([low, high], [low, high], color="#000000", linewidth=0.7, linestyle=(0, (5, 2)))
            for place, noise in enumerate(noises):
                at = reliability[(reliability["tap"] == tap) & (reliability["noise"] == noise)].sort_values("bin")
                colour = colormaps["plasma"](0.05 + 0.8 * place / max(1, len(noises) - 1))
                axes.plot(at["predicted"], at["actual"], color=colour, marker="os^Dv<>"[place % 7], markersize=3)
                if "constant" in at and len(at):
                    overall = np.sqrt(np.average(at["actual"] ** 2, weights=at["n"]))
                    axes.plot(at["constant"].iloc[0], overall, "x", color=colour, markersize=6, markeredgewidth=1.5)
            axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), title=tap)
            axes.set_aspect("equal")
        figure.supxlabel("predicted deviation of a pixel (range 0 to 1)", fontsize=NORMAL)
        figure.supylabel("actual error (root mean square)", fontsize=NORMAL)
        handles = [
            Line2D(
                [],
                [],
                color=colormaps["plasma"](0.05 + 0.8 * place / max(1, len(noises) - 1)),
                marker="os^Dv<>"[place % 7],
                markersize=3,
                label=noise,
            )
            for place, noise in enumerate(noises)
        ]
        handles.append(Line2D([], [], color="#000000", linewidth=0.7, linestyle=(0, (5, 2)), label="as predicted"))
        handles.append(Line2D([], [], color=NULL_COLOUR, marker="x", linestyle="none", label="null: one constant"))
        _legend(figure, handles, 5)
        figure.caption = (
            "Bins of equally many pixels by predicted deviation of the MAP inverse; on the dashed line it means what "
            "it says. A constant deviation is one cross: it cannot say where."
        )
        figure.description = "Reliability of predicted deviations. " + _calibration_in_words(metrics)
    return figure


def _calibration_in_words(metrics: pd.DataFrame | None) -> str:
    if metrics is None:
        return ""
    rows = metrics[(metrics["measure"] == "calibration_error") & metrics["inverse"].isin(["map", "null_constant"])]
    told = [f"{r.inverse} {r.value:.2f} at {r.tap}, {r.noise}" for r in rows.itertuples()]
    return f"Calibration errors: {'; '.join(told)}." if told else ""


def uncertainty_pictures(
    images: Any,
    pictures: Mapping[tuple[str, str], Mapping[str, Any]],
    deviations: Mapping[tuple[str, str], tuple[Any, Any]],
    jobs: Sequence[tuple[str, str]] | None = None,
    count: int = 2,
    width: float = COLUMN_WIDTH,
) -> ShownFigure:
    """Image, MAP reconstruction, predicted deviation and actual error, for a few taps and noises (jobs).

    images: (k, 3, H, W); pictures, deviations: of `Stability`; jobs: (tap, noise's name), default the first noise of
    every tap, at most four; count: images of each. Deviation and error of a job share one colour scale.
    """
    inputs = _pixels(images, "images")[:count]
    if jobs is None:
        first = {tap: (tap, noise) for tap, noise in reversed(list(pictures))}
        jobs = [job for job in pictures if job in first.values()][:4]
    if not jobs or (unknown := [job for job in jobs if job not in pictures or job not in deviations]):
        known = ", ".join(f"{tap} at {noise}" for tap, noise in pictures)
        raise BacksightError(f"there are no pictures of {unknown if jobs else 'no job'}; there are: {known}.")
    rows = [(job, number) for job in jobs for number in range(len(inputs))]
    side = (width - 0.75) / 4.3
    tall = side * inputs.shape[2] / inputs.shape[3]
    tall, side = (tall, side) if tall * len(rows) < 8 else (8 / len(rows), side)
    titles = ("image", "most probable (MAP)", "predicted deviation", "actual error")
    with styled_figure(width, (tall + 0.12) * len(rows) + 0.3) as figure:
        grid = figure.subplots(len(rows), 4, squeeze=False)
        for line, (job, number) in enumerate(rows):
            made = _pixels(pictures[job]["map"], f"map at {job[0]}")[: len(inputs)]
            maps = [np.asarray(each)[: len(inputs)] for each in deviations[job]]
            scale = Normalize(0, max(float(np.quantile(np.stack(maps), 0.995)), 1e-6))
            for column, values in enumerate((inputs[number], made[number])):
                grid[line, column].imshow(values.transpose(1, 2, 0), interpolation="nearest", vmin=0, vmax=1)
            for column, values in enumerate(maps, start=2):
                drawn = grid[line, column].imshow(values[number], norm=scale, cmap="magma", interpolation="nearest")
            if number == len(inputs) - 1:
                here = [grid[at, column] for at in range(line - number, line + 1) for column in (2, 3)]
                bar = figure.colorbar(drawn, ax=here, shrink=0.85, pad=0.01, aspect=12 * len(inputs))
                bar.outline.set_visible(False)
            grid[line, 1].set_xlabel(f"{_psnr(inputs, made)[number]:.1f} dB", fontsize=SMALL, labelpad=1)
            middle = number == 0
            grid[line, 0].set_ylabel(f"{job[0]}\n{job[1]}" if middle else "", fontsize=SMALL)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(title, fontsize=NORMAL)
        figure.caption = (
            "What the MAP inverse expects to get wrong, and what it got wrong: root mean square over the channels, one "
            "scale for each tap and noise."
        )
        correlated = []
        for job in jobs:
            said, wrong = (np.asarray(each).ravel() for each in deviations[job])
            correlated.append(f"{job[0]} at {job[1]}: {np.corrcoef(said, wrong)[0, 1]:.2f}")
        figure.description = (
            f"Grid of {len(rows)} rows, {len(jobs)} taps and noises. Correlation of predicted and actual error: "
            + "; ".join(correlated)
            + "."
        )
        figure.shows_images = True
    return figure


KINDS_OF_SHARE: Mapping[str, str] = {
    "fragile_colour_share": "colour",
    "fragile_detail_share": "detail",
    "fragile_background_share": "background",
}


def fragile_directions(
    metrics: pd.DataFrame,
    images: Any,
    directions: Mapping[str, tuple[Any, Any]],
    random_directions: Mapping[str, Any] | None = None,
    width: float = COLUMN_WIDTH,
    rows: int = 4,
) -> ShownFigure:
    """What cannot be known: least-seen directions as pictures, and what they are made of beside random ones.

    images: (k, 3, H, W), the first one is shown; directions, random_directions: of `Stability`; at most `rows` taps.
    """
    shares = metrics[metrics["measure"].isin(list(KINDS_OF_SHARE)) & metrics["tap"].isin(list(directions))]
    if shares.empty or not directions:
        raise BacksightError("the table has no fragile shares at the taps of the directions: give those of one study.")
    taps = taps_in_order(shares)
    chosen = [taps[i] for i in np.unique(np.linspace(0, len(taps) - 1, min(rows, len(taps))).round().astype(int))]
    shown = _pixels(images, "images")[0]
    kinds = [measure for measure in KINDS_OF_SHARE if measure in set(shares["measure"])]
    count = min(3, *(len(directions[tap][0]) for tap in chosen))
    columns = 1 + count + (random_directions is not None)
    side = min(1.3, (width - 0.6) / columns)
    with styled_figure(width, (side + 0.18) * len(chosen) + 2.75) as figure:
        halves: Any = figure.subfigures(2, 1, height_ratios=[(side + 0.18) * len(chosen) + 0.2, 2.5])
        above, below = halves
        grid = above.subplots(len(chosen), columns, squeeze=False)
        for line, tap in enumerate(chosen):
            patterns, left = (
                np.asarray(each.detach() if hasattr(each, "detach") else each) for each in directions[tap]
            )
            cells = [(shown, "image")]
            cells += [(_as_picture(patterns[k]), f"{100 * left[k]:.0f} % left") for k in range(count)]
            if random_directions is not None:
                cells.append((_as_picture(np.asarray(random_directions[tap])[0]), "random"))
            for axes, (values, text) in zip(grid[line], cells, strict=True):
                axes.imshow(values.transpose(1, 2, 0), interpolation="nearest", vmin=0, vmax=1)
                axes.set_xlabel(text, fontsize=SMALL, labelpad=1)
                axes.set(xticks=[], yticks=[])
                axes.grid(False)
                axes.spines[:].set_visible(False)
            grid[line, 0].set_ylabel(tap, fontsize=SMALL)
        handles: list[Line2D] = []
        styles = (
            ("map", "#000000", "o", "least-seen directions"),
            ("map_error", "#b2182b", "D", STUDY_NAMES["map_error"]),
            ("null_random", NULL_COLOUR, "_", STUDY_NAMES["null_random"]),
        )
        for axes, measure in zip(below.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
            for number, (name, colour, marker, label) in enumerate(styles):
                at = shares[(shares["measure"] == measure) & (shares["inverse"] == name)]
                at = at.assign(x=[taps.index(tap) for tap in at["tap"]]).sort_values("x")
                if at.empty:
                    continue
                spread = np.abs(at[["low", "high"]].to_numpy(float).T - at["value"].to_numpy(float))
                style: dict[str, Any] = {
                    "linestyle": (0, (5, 2)) if name.startswith("null_") else "-",
                    "marker": marker,
                }
                axes.errorbar(
                    at["x"] + 0.1 * (number - 1), at["value"], spread, color=colour, capsize=2, markersize=4,
                    elinewidth=0.8, **style,
                )  # fmt: skip
                if measure == kinds[0]:
                    handles.append(Line2D([], [], color=colour, label=label, **style))
            axes.set_xticks(range(len(taps)), taps, rotation=40, ha="right", rotation_mode="anchor")
            axes.set(title=KINDS_OF_SHARE[measure], ylim=(-0.03, 1.03))
            axes.margins(x=0.1)
            if measure == kinds[0]:
                axes.set_ylabel("share of energy")
        below.legend(handles=handles, loc="outside upper center", ncols=3, handlelength=2.8)
        some = shares[shares["inverse"] == "map"]
        figure.caption = (
            "Directions that the tap shows least, and the share of the prior's variance left in them, at the least "
            "noise; below, the share of their energy that is colour, fine detail (frequencies above which images have "
            f"10 % of their power), or outside the object. {_counted(some)}."
        )
        told = (
            f"{KINDS_OF_SHARE[str(r.measure)]} at {r.tap}: {r.value:.2f} ({STUDY_NAMES[str(r.inverse)]})"
            for r in shares.itertuples()
        )
        figure.description = "Shares of energy: " + "; ".join(told) + "."
        figure.shows_images = True
    return figure


def _as_picture(pattern: np.ndarray) -> np.ndarray:
    """A signed pattern about mid-grey, its 99.5 % quantile at black or white."""
    size = max(float(np.quantile(np.abs(pattern), 0.995)), 1e-12)
    return np.clip(0.5 + 0.5 * pattern / size, 0, 1)
