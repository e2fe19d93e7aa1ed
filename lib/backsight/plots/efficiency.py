"""Figures of the comparison of modular and direct inverses: all from tidy rows, the pictures from arrays."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from backsight.errors import BacksightError
from backsight.plots.grids import scored_table
from backsight.plots.style import (
    COLUMN_WIDTH,
    INVERSE_NAMES,
    SMALL,
    ShownFigure,
    legend_above,
    legend_line,
    look_of,
    name_taps,
    one_target,
    rows_of,
    sample_size,
    styled_figure,
)
from backsight.tables.names import ALL_TAPS

METHODS = ("linear", "direct", "modular", "modular_components", "modular_polished", "optimised_tv", "optimised_prior")
NAMES: Mapping[str, str] = MappingProxyType(
    dict(INVERSE_NAMES) | {"modular": "modular, every block", "modular_polished": "modular, then polished"}
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


def efficiency_curves(metrics: pd.DataFrame) -> ShownFigure:
    """PSNR (mean over the judged taps) against steps, FLOPs, seconds and numbers held, one line a method, with 95 %
    bars.

    metrics: tidy rows of one target; drawn are those with part "curve" and tap "all".
    """
    rows = _part(metrics, "curve", ALL_TAPS)
    lines = _by_method(rows, "steps")
    with styled_figure(COLUMN_WIDTH, 4.6) as figure:
        panels = figure.subplots(2, 2, sharey=True).flatten()
        for axes, (cost, (label, unit)) in zip(panels, COSTS.items(), strict=True):
            for method, line in lines.items():
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
            "Held-out PSNR (mean over the judged taps) against what the training took. The first point of a line is "
            "its closed-form start (that of direct is the linear family); each other point is a whole training of that "
            f"length. {_sizes(rows)} The images are the same for all: differences are surer than these bars, see the "
            "paired table."
        )
        figure.description = "Curves of PSNR by cost. " + "; ".join(
            f"{method} from {line['value'].iloc[0]:.2f} to {line['value'].iloc[-1]:.2f} dB with "
            f"{line['flops'].iloc[-1] / 1e12:.3g} TFLOPs"
            for method, line in lines.items()
        )
    return figure


def tap_scores(metrics: pd.DataFrame) -> ShownFigure:
    """PSNR at every tap after the longest training, one line a method, with 95 % bars.

    metrics: tidy rows of one target with part "curve".
    """
    rows = _part(metrics, "curve")
    rows = rows[rows["tap"] != ALL_TAPS]
    rows = rows[rows["steps"] == rows.groupby("inverse")["steps"].transform("max")]
    taps = list(dict.fromkeys(rows.sort_values("depth", kind="stable")["tap"]))
    lines = _by_method(rows, "depth")

    def draw(axes: Axes) -> None:
        for number, (method, line) in enumerate(lines.items()):
            _errors(axes, line["tap"].map(taps.index) + 0.05 * (number - (len(lines) - 1) / 2), line, method)
        name_taps(axes, taps, 30)
        axes.set(ylabel=PSNR, xlabel="tap, shallow → deep")

    return _one_panel(
        rows,
        draw,
        "Held-out PSNR from every tap after the longest training.",
        "Curves of PSNR by tap. "
        + "; ".join(
            f"{method}: {', '.join(f'{row.tap} {row.value:.1f}' for row in line.itertuples())}"
            for method, line in lines.items()
        ),
    )


def chain_errors(metrics: pd.DataFrame) -> ShownFigure:
    """dB lost at every module, one panel for chains of every block and one for the judged taps alone.

    metrics: tidy rows of one target with part "chain" and measure "chain_error".
    """
    rows = _part(metrics, "chain", measure="chain_error").sort_values("depth", kind="stable")
    coarse = set(rows.loc[rows["inverse"] == "modular_components", "module"])
    fine = [name for name in ("linear", "modular", "modular_polished") if name in set(rows["inverse"])]
    parts = {
        "every block": (fine, rows[rows["inverse"].isin(fine)]),
        "components": (["direct", "modular_components"], rows[rows["module"].isin(coarse)]),
    }
    panels = {title: (names, part[part["inverse"].isin(names)]) for title, (names, part) in parts.items()}
    panels = {title: (names, part) for title, (names, part) in panels.items() if len(part)}
    if not panels:
        raise BacksightError("the table has no chain_error: give the metrics.csv of 06_modular_vs_direct.")
    with styled_figure(COLUMN_WIDTH, 3.0) as figure:
        ratios = [max(2, part["module"].nunique()) for _, part in panels.values()]
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True, width_ratios=ratios)[0]
        for axes, (title, (methods, part)) in zip(grid, panels.items(), strict=True):
            modules = list(dict.fromkeys(part["module"]))
            bar = 0.8 / len(methods)
            for number, method in enumerate(methods):
                line = part[part["inverse"] == method]
                x = line["module"].map(modules.index) + bar * (number - (len(methods) - 1) / 2)
                axes.bar(x, line["value"], bar * 0.92, color=look_of(method).colour)
                _whiskers(axes, x, line, "0.25")
            axes.axhline(0, color="0.3", linewidth=0.6)
            axes.set_title(title)
            name_taps(axes, modules)
            axes.grid(False, axis="x")
        grid[0].set_ylabel("PSNR lost at the module (dB)")
        figure.supxlabel("module of the tap, shallow → deep", fontsize=SMALL + 1)
        _legend(figure, rows, markers=False)
        figure.caption = (
            "PSNR lost at each module: from the tap before it minus from its own tap, both fed with the true "
            f"representation. Linear and direct inverses are no chains: theirs is what is read less. {_sizes(rows)}"
        )
        figure.description = "Bars of dB lost by module. " + "; ".join(
            f"{method}: most at {line['module'].iloc[-1]} ({line['value'].iloc[-1]:.2f} dB)"
            for method, line in _by_method(rows, "value").items()
        )
    return figure


def data_size_curves(metrics: pd.DataFrame) -> ShownFigure:
    """PSNR against the number of training images, one line a method, with 95 % bars.

    metrics: tidy rows of one target with part "data" and tap "all".
    """
    rows = _part(metrics, "data", ALL_TAPS)
    sizes, lines = sorted(set(rows["train_images"])), _by_method(rows, "train_images")

    def draw(axes: Axes) -> None:
        for method, line in lines.items():
            _errors(axes, line["train_images"], line, method)
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        axes.minorticks_off()
        axes.set(xlabel="training images", ylabel=PSNR)

    steps = int(rows["steps"].max())
    return _one_panel(
        rows,
        draw,
        f"Held-out PSNR (mean over the judged taps) by training images, at {steps} steps each.",
        "Curves of PSNR by training images. "
        + "; ".join(
            f"{method} {line['value'].iloc[0]:.2f} dB with {line['train_images'].iloc[0]}, "
            f"{line['value'].iloc[-1]:.2f} with {line['train_images'].iloc[-1]}"
            for method, line in lines.items()
        ),
    )


def search_curves(metrics: pd.DataFrame) -> ShownFigure:
    """Validation PSNR against the learning rate, one line a method; dashed: from random weights.

    metrics: tidy rows of one target with part "search" and tap "all".
    """
    rows = _part(metrics, "search", ALL_TAPS)

    def draw(axes: Axes) -> None:
        for start, style in (("closed_form", "-"), ("random", "--")):
            for method, line in _by_method(rows[rows["start"] == start], "learning_rate").items():
                _errors(axes, line["learning_rate"], line, method, style)
        _logarithmic(axes)
        axes.set(xlabel="peak learning rate", ylabel="validation PSNR (dB)")

    dashed = " Dashed: from random weights." if "random" in set(rows["start"]) else ""
    best = rows.loc[rows.groupby(["inverse", "start"])["value"].idxmax()]
    return _one_panel(
        rows,
        draw,
        f"PSNR on validation images by learning rate, which it is chosen on.{dashed}",
        "Curves of validation PSNR by learning rate; best: "
        + ", ".join(f"{row.inverse} ({row.start}) {row.learning_rate:.2g}" for row in best.itertuples()),
    )


def start_scores(metrics: pd.DataFrame) -> ShownFigure:
    """PSNR at every judged tap from a closed-form start (filled) and from random weights (hollow).

    metrics: tidy rows of one target: part "start", and the rows of part "curve" with as many steps.
    """
    plain, started = _part(metrics, "start"), _part(metrics, "curve")
    steps, methods = plain["steps"].max(), list(dict.fromkeys(plain["inverse"]))
    shared = set.intersection(*(set(plain.loc[plain["inverse"] == method, "tap"]) for method in methods))
    both = pd.concat([started[started["steps"] == steps], plain])
    both = both[both["tap"].isin(shared) & both["inverse"].isin(methods)].sort_values("depth", kind="stable")
    taps = list(dict.fromkeys(both["tap"]))

    def draw(axes: Axes) -> None:
        for number, method in enumerate(methods):
            for start in ("closed_form", "random"):
                line = both[(both["inverse"] == method) & (both["start"] == start)]
                x = line["tap"].map(taps.index) + 0.18 * (number - (len(methods) - 1) / 2)
                _errors(axes, x, line, method, "none", start == "closed_form")
        axes.set_xticks(range(len(taps)), ["mean of these" if tap == ALL_TAPS else tap for tap in taps])
        axes.set(ylabel=PSNR, xlabel="tap")

    means = both[both["tap"] == ALL_TAPS]
    return _one_panel(
        both,
        draw,
        "Filled: from the closed-form start; hollow: from random weights with the paper's plain losses; "
        f"{int(steps)} steps each.",
        "Points of PSNR by tap and start. Mean over taps: "
        + ", ".join(f"{row.inverse} ({row.start}) {row.value:.2f}" for row in means.itertuples()),
    )


def cost_of_pictures(metrics: pd.DataFrame) -> ShownFigure:
    """PSNR of the same few images against FLOPs: optimised one by one, beside trained inverses (training included).

    metrics: tidy rows of one target with part "per_image".
    """
    rows = _part(metrics, "per_image")

    def draw(axes: Axes) -> None:
        for method, line in _by_method(rows, "steps").items():
            _errors(axes, line["flops"] / 1e12, line, method)
        _logarithmic(axes)
        axes.set(xlabel="cost of these pictures, training included (TFLOPs)", ylabel=PSNR)

    return _one_panel(
        rows,
        draw,
        f"The same {int(rows['n'].max())} held-out images from {rows['tap'].iloc[0]}: optimised each by itself, or "
        "rebuilt by inverses whose whole training is charged to them.",
        "Points of PSNR by FLOPs: "
        + ", ".join(
            f"{name} {value:.2f} dB at {flops / 1e12:.3g} TFLOPs"
            for name, value, flops in zip(rows["inverse"], rows["value"], rows["flops"], strict=True)
        ),
    )


def method_grid(images: Any, made: Mapping[str, Any], tap: str) -> ShownFigure:
    """Images as rows; the input and what every method made of it as columns, with the PSNR in dB.

    images: (B, 3, H, W) in [0, 1]; made: {method: (B, 3, H, W)}; tap: where the representation was taken.
    """
    pictures = {name: np.asarray(values) for name, values in made.items()}
    names = {name: text.replace(", ", ",\n") for name, text in NAMES.items()}
    figure = scored_table(np.asarray(images), pictures, names)
    figure.caption = f"The input and what each method makes of its representation at {tap}, with the PSNR."
    return figure


def _one_panel(rows: pd.DataFrame, draw: Callable[[Axes], None], caption: str, description: str) -> ShownFigure:
    with styled_figure(COLUMN_WIDTH, 2.9) as figure:
        draw(figure.subplots())
        _legend(figure, rows)
        figure.caption, figure.description = f"{caption} {_sizes(rows)}", description
    return figure


def _part(metrics: pd.DataFrame, part: str, tap: str | None = None, measure: str = "psnr") -> pd.DataFrame:
    """The rows of a part of the study, of one target. Raises BacksightError where there are none."""
    return one_target(rows_of(metrics, measure, part=part, **({"tap": tap} if tap else {})))


def _by_method(rows: pd.DataFrame, order: str) -> dict[str, pd.DataFrame]:
    present = set(rows["inverse"])
    ordered = rows.sort_values(order, kind="stable")
    return {name: ordered[ordered["inverse"] == name] for name in METHODS if name in present}


def _errors(axes: Axes, x: pd.Series, line: pd.DataFrame, method: str, style: str = "-", filled: bool = True) -> None:
    colour, marker = look_of(method).colour, look_of(method).marker
    face = colour if filled else "white"
    look: dict[str, Any] = {"color": colour, "marker": marker, "markerfacecolor": face, "linestyle": style}
    axes.plot(x.to_numpy(float), line["value"].to_numpy(float), zorder=3, **look)
    _whiskers(axes, x, line, colour)


def _whiskers(axes: Axes, x: pd.Series, line: pd.DataFrame, colour: str) -> None:
    low, high = (line[end].to_numpy(float) for end in ("low", "high"))
    axes.vlines(x.to_numpy(float), low, high, color=colour, linewidth=0.9)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis of costs whose numbers are written out."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _legend(figure: ShownFigure, rows: pd.DataFrame, markers: bool = True) -> None:
    def handle(name: str) -> Any:
        look = look_of(name)
        form = {"marker": look.marker} if markers else {"marker": "s", "linestyle": "none"}
        return legend_line(NAMES.get(name, name), color=look.colour, **form)

    present: Sequence[str] = [name for name in METHODS if name in set(rows["inverse"])]
    legend_above(figure, [handle(name) for name in present], 3)


def _sizes(rows: pd.DataFrame) -> str:
    return f"{sample_size(rows)}, 95 % intervals."
