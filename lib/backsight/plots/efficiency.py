"""Figures of the comparison of modular and direct inverses: all from tidy rows, the pictures from arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from backsight.errors import BacksightError
from backsight.plots.style import COLUMN_WIDTH, INVERSE_NAMES, SMALL, ShownFigure, family_colour, styled_figure

NAMES: Mapping[str, str] = MappingProxyType(
    dict(INVERSE_NAMES)
    | {
        "modular": "modular, every block",
        "modular_components": "modular, components",
        "modular_polished": "modular, then polished",
        "optimised_tv": "optimised, total variation",
        "optimised_prior": "optimised, deep image prior",
    }
)
COLOURS: Mapping[str, str] = MappingProxyType(
    {"modular_components": "#5a3d1a", "optimised_tv": "#222222", "optimised_prior": "#949494"}
)
MARKERS: Mapping[str, str] = MappingProxyType(
    {
        "linear": "o",
        "direct": "s",
        "modular": "^",
        "modular_components": "v",
        "modular_polished": "D",
        "optimised_tv": "X",
        "optimised_prior": "P",
    }
)
COSTS: Mapping[str, tuple[str, float]] = MappingProxyType(
    {
        "steps": ("training steps", 1.0),
        "flops": ("training cost (TFLOPs)", 1e12),
        "seconds": ("training time (s)", 1.0),
        "parameters": ("numbers held by all inverses (millions)", 1e6),
    }
)
PSNR = "held-out PSNR (dB)"


def efficiency_curves(metrics: pd.DataFrame, tap: str = "all", width: float = COLUMN_WIDTH) -> ShownFigure:
    """PSNR against steps, FLOPs, seconds and numbers held, one line a method, with 95 % bars.

    metrics: tidy rows of one target; those with part "curve" and this tap ("all": the mean over the judged taps).
    """
    rows = _part(metrics, "curve", tap)
    with styled_figure(width, 4.6) as figure:
        panels = figure.subplots(2, 2, sharey=True).flatten()
        for axes, (cost, (label, unit)) in zip(panels, COSTS.items(), strict=True):
            for method, line in _by_method(rows):
                _errors(axes, line[cost] / unit, line, method)
            # No step at all is a point of the steps' axis, which a logarithm has no place for.
            if cost == "steps":
                lengths = sorted(set(rows["steps"]))
                axes.set_xscale("symlog", linthresh=max([1.0, *lengths[1:2]]))
                axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
                axes.minorticks_off()
            else:
                _logarithmic(axes)
            axes.set_xlabel(label)
        for axes in panels[::2]:
            axes.set_ylabel(PSNR)
        _legend(figure, rows)
        figure.caption = (
            f"Held-out PSNR {_where(tap)} against what the training took. The first point of a line is its closed-form "
            "start (that of direct is the linear family); each other point is a whole training of that length. "
            f"{_sizes(rows)} The images are the same for all: differences are surer than these bars, see the paired "
            "table."
        )
        figure.description = "Curves of PSNR by cost. " + "; ".join(
            f"{method} from {line['value'].iloc[0]:.2f} to {line['value'].iloc[-1]:.2f} dB with "
            f"{line['flops'].iloc[-1] / 1e12:.3g} TFLOPs"
            for method, line in _by_method(rows)
        )
    return figure


def tap_scores(metrics: pd.DataFrame, width: float = COLUMN_WIDTH) -> ShownFigure:
    """PSNR at every tap after the longest training, one line a method, with 95 % bars.

    metrics: tidy rows of one target with part "curve".
    """
    rows = _of(metrics, "curve")
    rows = rows[(rows["measure"] == "psnr") & (rows["tap"] != "all")]
    longest = rows.groupby("inverse")["steps"].transform("max")
    rows = rows[rows["steps"] == longest].sort_values("depth", kind="stable")
    taps = list(dict.fromkeys(rows["tap"]))
    with styled_figure(width, 2.9) as figure:
        axes = figure.subplots()
        methods = _by_method(rows)
        for number, (method, line) in enumerate(methods):
            shift = 0.05 * (number - (len(methods) - 1) / 2)
            line = line.sort_values("depth", kind="stable")
            _errors(axes, line["tap"].map(taps.index) + shift, line, method)
        axes.set_xticks(range(len(taps)), taps, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_ylabel(PSNR)
        axes.set_xlabel("tap, shallow → deep")
        _legend(figure, rows)
        figure.caption = f"Held-out PSNR from every tap after the longest training. {_sizes(rows)}"
        figure.description = "Curves of PSNR by tap. " + "; ".join(
            f"{method}: " + ", ".join(f"{t} {v:.1f}" for t, v in zip(line["tap"], line["value"], strict=True))
            for method, line in methods
        )
    return figure


def chain_errors(metrics: pd.DataFrame, width: float = COLUMN_WIDTH) -> ShownFigure:
    """dB lost at every module, one panel for chains of every block and one for the judged taps alone.

    metrics: tidy rows of one target with part "chain" and measure "chain_error".
    """
    rows = _of(metrics, "chain")
    rows = rows[rows["measure"] == "chain_error"].sort_values("depth", kind="stable")
    coarse = set(rows.loc[rows["inverse"] == "modular_components", "module"])
    fine = [name for name in ("linear", "modular", "modular_polished") if name in set(rows["inverse"])]
    panels = [
        ("every block", fine, rows[rows["inverse"].isin(fine)]),
        ("components", ["direct", "modular_components"], rows[rows["module"].isin(coarse)]),
    ]
    panels = [(title, methods, part[part["inverse"].isin(methods)]) for title, methods, part in panels]
    panels = [panel for panel in panels if len(panel[2])]
    if not panels:
        raise BacksightError("the table has no chain_error: give the metrics.csv of 06_modular_vs_direct.")
    counts = [panel[2]["module"].nunique() for panel in panels]
    with styled_figure(width, 3.0) as figure:
        grid = figure.subplots(
            1, len(panels), squeeze=False, sharey=True, gridspec_kw={"width_ratios": [max(2, c) for c in counts]}
        )
        for axes, (title, methods, part) in zip(grid[0], panels, strict=True):
            modules = list(dict.fromkeys(part["module"]))
            bar = 0.8 / len(methods)
            for number, method in enumerate(methods):
                line = part[part["inverse"] == method]
                x = line["module"].map(modules.index) + bar * (number - (len(methods) - 1) / 2)
                axes.bar(x, line["value"], bar * 0.92, color=_colour(method))
                _whiskers(axes, x, line)
            axes.axhline(0, color="0.3", linewidth=0.6)
            axes.set_title(title)
            axes.set_xticks(range(len(modules)), modules, rotation=40, ha="right", rotation_mode="anchor")
            axes.grid(False, axis="x")
        grid[0, 0].set_ylabel("PSNR lost at the module (dB)")
        figure.supxlabel("module of the tap, shallow → deep", fontsize=SMALL + 1)
        _legend(figure, rows, markers=False)
        figure.caption = (
            "PSNR lost at each module: from the tap before it minus from its own tap, both fed with the true "
            f"representation. Linear and direct inverses are no chains: theirs is what is read less. {_sizes(rows)}"
        )
        figure.description = "Bars of dB lost by module. " + "; ".join(
            f"{method}: most at {line['module'].iloc[-1]} ({line['value'].iloc[-1]:.2f} dB)"
            for method, line in _by_method(rows, "value")
        )
    return figure


def data_size_curves(metrics: pd.DataFrame, width: float = COLUMN_WIDTH) -> ShownFigure:
    """PSNR against the number of training images, one line a method, with 95 % bars.

    metrics: tidy rows of one target with part "data" and tap "all".
    """
    rows = _part(metrics, "data", "all").sort_values("train_images")
    with styled_figure(width, 2.9) as figure:
        axes = figure.subplots()
        for method, line in _by_method(rows, "train_images"):
            _errors(axes, line["train_images"], line, method)
        axes.set_xscale("log")
        sizes = sorted(set(rows["train_images"]))
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        axes.minorticks_off()
        axes.set_xlabel("training images")
        axes.set_ylabel(PSNR)
        _legend(figure, rows)
        steps = int(rows["steps"].max())
        figure.caption = f"Held-out PSNR {_where('all')} by training images, at {steps} steps each. {_sizes(rows)}"
        figure.description = "Curves of PSNR by training images. " + "; ".join(
            f"{method} {line['value'].iloc[0]:.2f} dB with {line['train_images'].iloc[0]}, "
            f"{line['value'].iloc[-1]:.2f} with {line['train_images'].iloc[-1]}"
            for method, line in _by_method(rows, "train_images")
        )
    return figure


def search_curves(metrics: pd.DataFrame, width: float = COLUMN_WIDTH) -> ShownFigure:
    """Validation PSNR against the learning rate, one line a method; dashed: from random weights.

    metrics: tidy rows of one target with part "search" and tap "all".
    """
    rows = _part(metrics, "search", "all")
    with styled_figure(width, 2.9) as figure:
        axes = figure.subplots()
        for start, style in (("closed_form", "-"), ("random", "--")):
            for method, line in _by_method(rows[rows["start"] == start], "learning_rate"):
                _errors(axes, line["learning_rate"], line, method, style)
        _logarithmic(axes)
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel("validation PSNR (dB)")
        _legend(figure, rows)
        dashed = " Dashed: from random weights." if "random" in set(rows["start"]) else ""
        figure.caption = f"PSNR on validation images by learning rate, which it is chosen on.{dashed} {_sizes(rows)}"
        best = rows.loc[rows.groupby(["inverse", "start"])["value"].idxmax()]
        figure.description = "Curves of validation PSNR by learning rate; best: " + ", ".join(
            f"{row['inverse']} ({row['start']}) {row['learning_rate']:.2g}" for row in best.to_dict("records")
        )
    return figure


def start_scores(metrics: pd.DataFrame, width: float = COLUMN_WIDTH) -> ShownFigure:
    """PSNR at every judged tap from a closed-form start (filled) and from random weights (hollow).

    metrics: tidy rows of one target: part "start", and the rows of part "curve" with as many steps.
    """
    plain = _of(metrics, "start")
    plain = plain[plain["measure"] == "psnr"]
    steps = plain["steps"].max()
    started = _of(metrics, "curve")
    started = started[(started["measure"] == "psnr") & (started["steps"] == steps)]
    methods = list(dict.fromkeys(plain["inverse"]))
    shared = set.intersection(*(set(plain.loc[plain["inverse"] == m, "tap"]) for m in methods))
    both = pd.concat([started, plain])
    both = both[both["tap"].isin(shared) & both["inverse"].isin(methods)].sort_values("depth", kind="stable")
    taps = list(dict.fromkeys(both["tap"]))
    with styled_figure(width, 2.9) as figure:
        axes = figure.subplots()
        for number, method in enumerate(methods):
            for start, filled in (("closed_form", True), ("random", False)):
                line = both[(both["inverse"] == method) & (both["start"] == start)]
                x = line["tap"].map(taps.index) + 0.18 * (number - (len(methods) - 1) / 2)
                _errors(axes, x, line, method, "none", filled)
        names = ["mean of these" if tap == "all" else tap for tap in taps]
        axes.set_xticks(range(len(taps)), names)
        axes.set_ylabel(PSNR)
        axes.set_xlabel("tap")
        _legend(figure, both)
        figure.caption = (
            f"Filled: from the closed-form start; hollow: from random weights with the paper's plain losses; "
            f"{int(steps)} steps each. {_sizes(both)}"
        )
        means = both[both["tap"] == "all"]
        figure.description = "Points of PSNR by tap and start. Mean over taps: " + ", ".join(
            f"{row['inverse']} ({row['start']}) {row['value']:.2f}" for row in means.to_dict("records")
        )
    return figure


def cost_of_pictures(metrics: pd.DataFrame, width: float = COLUMN_WIDTH) -> ShownFigure:
    """PSNR of the same few images against FLOPs: optimised one by one, beside trained inverses (training included).

    metrics: tidy rows of one target with part "per_image".
    """
    rows = _of(metrics, "per_image")
    rows = rows[rows["measure"] == "psnr"]
    tap = str(rows["tap"].iloc[0])
    with styled_figure(width, 2.9) as figure:
        axes = figure.subplots()
        for method, line in _by_method(rows):
            _errors(axes, line["flops"] / 1e12, line, method)
        _logarithmic(axes)
        axes.set_xlabel("cost of these pictures, training included (TFLOPs)")
        axes.set_ylabel(PSNR)
        _legend(figure, rows)
        figure.caption = (
            f"The same {int(rows['n'].max())} held-out images from {tap}: optimised each by itself, or rebuilt by "
            f"inverses whose whole training is charged to them. {_sizes(rows)}"
        )
        figure.description = "Points of PSNR by FLOPs: " + ", ".join(
            f"{row['inverse']} {row['value']:.2f} dB at {row['flops'] / 1e12:.3g} TFLOPs"
            for row in rows.to_dict("records")
        )
    return figure


def method_grid(images: Any, made: Mapping[str, Any], tap: str, width: float = COLUMN_WIDTH) -> ShownFigure:
    """Images as rows; the input and what every method made of it as columns, with the PSNR in dB.

    images: (B, 3, H, W) in [0, 1]; made: {method: (B, 3, H, W)}; tap: where the representation was taken.
    """
    inputs = np.asarray(images)
    columns = len(made) + 1
    cell = width / columns
    tall = cell * inputs.shape[2] / inputs.shape[3]
    with styled_figure(width, (tall + 0.17) * len(inputs) + 0.4) as figure:
        grid = figure.subplots(len(inputs), columns, squeeze=False)
        for row, image in enumerate(inputs):
            for axes, (name, picture) in zip(
                grid[row],
                [("input", image), *((name, np.asarray(each)[row]) for name, each in made.items())],
                strict=True,
            ):
                axes.imshow(picture.transpose(1, 2, 0), interpolation="nearest", vmin=0, vmax=1)
                axes.grid(False)
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                if row == 0:
                    axes.set_title(NAMES.get(name, name).replace(", ", ",\n"), fontsize=SMALL)
                if name != "input":
                    axes.set_xlabel(f"{_psnr(image, picture):.1f} dB", fontsize=SMALL)
        figure.caption = f"The input and what each method makes of its representation at {tap}, with the PSNR."
        means = {
            name: np.mean([_psnr(i, p) for i, p in zip(inputs, np.asarray(m), strict=True)]) for name, m in made.items()
        }
        figure.description = f"Grid of {len(inputs)} images; mean PSNR from {tap}: " + ", ".join(
            f"{name} {value:.1f} dB" for name, value in means.items()
        )
        figure.shows_images = True
    return figure


def _psnr(image: np.ndarray, picture: np.ndarray) -> float:
    return -10 * math.log10(max(float(np.square(image - picture).mean()), 1e-10))


def _of(metrics: pd.DataFrame, part: str) -> pd.DataFrame:
    if missing := [name for name in ("part", "steps", "flops", "seconds", "start") if name not in metrics.columns]:
        raise BacksightError(
            f"the table lacks the columns {', '.join(missing)}: give the metrics.csv of 06_modular_vs_direct."
        )
    rows = metrics[metrics["part"] == part]
    if rows.empty:
        present = ", ".join(dict.fromkeys(metrics["part"].dropna().astype(str)))
        raise BacksightError(f"the table has no rows of the part {part!r}; it has {present or 'none'}.")
    if rows["target"].nunique() > 1:
        raise BacksightError(
            f"the table has rows of {', '.join(dict.fromkeys(rows['target']))}: select one target for this figure."
        )
    return rows


def _part(metrics: pd.DataFrame, part: str, tap: str) -> pd.DataFrame:
    rows = _of(metrics, part)
    rows = rows[(rows["measure"] == "psnr") & (rows["tap"] == tap)]
    if rows.empty:
        raise BacksightError(f"the table has no PSNR of the part {part!r} at {tap!r}: choose another tap.")
    return rows


def _by_method(rows: pd.DataFrame, order: str = "steps") -> list[tuple[str, pd.DataFrame]]:
    present = set(rows["inverse"])
    names = [name for name in MARKERS if name in present]
    return [(name, rows[rows["inverse"] == name].sort_values(order, kind="stable")) for name in names]


def _colour(method: str) -> str:
    return COLOURS.get(method) or family_colour(method)


def _errors(axes: Axes, x: pd.Series, line: pd.DataFrame, method: str, style: str = "-", filled: bool = True) -> None:
    axes.plot(
        x.to_numpy(float),
        line["value"].to_numpy(float),
        linestyle=style,
        color=_colour(method),
        marker=MARKERS.get(method, "o"),
        markerfacecolor=_colour(method) if filled else "white",
        zorder=3,
    )
    _whiskers(axes, x, line, _colour(method))


def _whiskers(axes: Axes, x: pd.Series, line: pd.DataFrame, colour: str = "0.25") -> None:
    axes.vlines(
        x.to_numpy(float), line["low"].to_numpy(float), line["high"].to_numpy(float), color=colour, linewidth=0.9
    )


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis of costs whose numbers are written out."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _legend(figure: ShownFigure, rows: pd.DataFrame, markers: bool = True) -> None:
    present = [name for name in MARKERS if name in set(rows["inverse"])]
    handles = [
        Line2D(
            [],
            [],
            color=_colour(name),
            marker=MARKERS[name] if markers else "s",
            linestyle="-" if markers else "none",
            label=NAMES.get(name, name),
        )
        for name in present
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(3, len(handles)))


def _where(tap: str) -> str:
    return "(mean over the judged taps)" if tap == "all" else f"from {tap}"


def _sizes(rows: pd.DataFrame) -> str:
    """n, seeds and intervals in words."""

    def span(values: Any) -> str:
        low, high = int(min(values)), int(max(values))
        return str(low) if low == high else f"{low} to {high}"

    return f"n = {span(rows['n'])} images, {span(rows['seeds'])} training seeds, 95 % intervals."
