"""Figures of 03_quality: regions, edges, bands, retrieval under noise, the cycle check and information maps.

All but the picture maps are drawn from the rows of a metrics.csv alone.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from backsight.errors import BacksightError
from backsight.plots.style import (
    COLUMN_WIDTH,
    INVERSE_NAMES,
    MEASURE_NAMES,
    SMALL,
    ShownFigure,
    _draw_curves,
    _legend_in_two_rows,
    inverse_order,
    styled_figure,
    taps_in_order,
)
from backsight.tables.pool import with_nulls_of

DETAIL_NAMES = MappingProxyType(
    {
        "psnr_boundary": "PSNR at object boundaries (dB)",
        "psnr_background": "PSNR of the background (dB)",
        "perceptual": "distance in the target's features",
        "texture_accuracy": "texture named (share of objects)",
        "hue_error": "hue error of the object (degrees)",
        "lost": "structure lost (share)",
        "invented": "structure invented (share)",
        "retrieval_top1": "own image found first (share)",
        "retrieval_rank": "rank of the own image (share before it)",
        "band_error": "error power / image power",
        "cycle_cosine": "cosine of features (1 = equal)",
        "patch_r2": "R² of each part of the picture",
    }
)


def measure_name(measure: str) -> str:
    """What a measure is called on an axis, with its unit."""
    return DETAIL_NAMES.get(measure) or MEASURE_NAMES.get(measure, measure)


def detail_curves(
    metrics: pd.DataFrame, measures: Sequence[str], family: str, columns: int = 2, width: float = COLUMN_WIDTH
) -> ShownFigure:
    """Several measures by depth in one figure: lines are inverse families with 95 % bands, dashed lines are nulls.

    metrics: rows of one target and data set; family: whose shuffled and untrained nulls are drawn. A dotted line is
    the measure on the images themselves, where there is such a ceiling. Raises BacksightError where none is there.
    """
    chosen = [measure for measure in measures if (metrics["measure"] == measure).any()]
    if not chosen:
        raise BacksightError(f"the table has none of the measures {', '.join(measures)}: run 03_quality.")
    rows = with_nulls_of(_clean(metrics), family)
    names = inverse_order(list(rows["inverse"]))
    lines = math.ceil(len(chosen) / columns)
    with styled_figure(width, 1.75 * lines + 0.75) as figure:
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
        for axes, measure in zip(panels, chosen, strict=False):
            at = rows[rows["measure"] == measure]
            _draw_curves(axes, at, names)
            axes.set_title(measure_name(measure))
            if "ceiling" in at and at["ceiling"].notna().any():
                axes.axhline(at["ceiling"].max(), color="black", linewidth=0.8, linestyle=":")
        for axes in panels[len(chosen) :]:
            axes.set_axis_off()
        _legend_in_two_rows(figure, names)
        figure.caption = (
            f"{_where(rows)}: measures by depth with 95 % intervals; dashed lines are nulls. {_counted(rows)}"
        )
        told = [
            f"{measure_name(m)}: {_first_and_last(rows[(rows.measure == m) & (rows.inverse == family)])}"
            for m in chosen
        ]
        figure.description = f"Curves by depth; {family} inverse: {'; '.join(told)}."
    return figure


def band_curves(metrics: pd.DataFrame, family: str, width: float = COLUMN_WIDTH) -> ShownFigure:
    """Error power over image power by spatial frequency, one line for each tap, shallow (dark) to deep (light)."""
    import seaborn

    rows = metrics[
        (metrics["measure"] == "band_error") & metrics["inverse"].isin([family, "null_mean", "null_shuffled"])
    ]
    rows = with_nulls_of(rows, family)
    if rows.empty:
        raise BacksightError("the table has no band_error: run 03_quality.")
    taps = taps_in_order(rows)
    colours = seaborn.color_palette("viridis", len(taps) + 1)
    with styled_figure(width, 2.9) as figure:
        axes = figure.subplots()
        for tap, colour in zip(taps, colours, strict=False):
            at = rows[(rows["tap"] == tap) & (rows["inverse"] == family)].sort_values("band")
            axes.plot(at["band"], at["value"], "o-", color=colour, markersize=3, label=tap)
            axes.fill_between(at["band"], at["low"], at["high"], color=colour, alpha=0.2, linewidth=0)
        for null, dashes in (("null_mean", (6, 2)), ("null_shuffled", (3, 1.5))):
            level = rows[rows["inverse"] == null].groupby("band")["value"].mean()
            axes.plot(
                level.index, level, color="#5f5f5f", linestyle=(0, dashes), linewidth=1.1, label=INVERSE_NAMES[null]
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(rows["band"].unique()), [f"{band:g}" for band in sorted(rows["band"].unique())])
        axes.set_xlabel("spatial frequency (cycles over the picture)")
        axes.set_ylabel(measure_name("band_error"))
        figure.legend(loc="outside right upper")
        figure.caption = (
            f"{_where(rows)}: error of the {family} inverse by spatial frequency, 95 % intervals; "
            f"1 is as wrong as nothing at all. {_counted(rows)}"
        )
        last = rows[(rows["tap"] == taps[-1]) & (rows["inverse"] == family)].sort_values("band")
        told = ", ".join(f"{value:.2f} at {band:g}" for band, value in zip(last["band"], last["value"], strict=True))
        figure.description = f"Curves of error power over image power; from {taps[-1]}: {told}."
    return figure


def noise_curves(
    metrics: pd.DataFrame, families: Sequence[str], measure: str = "retrieval_top1", width: float = COLUMN_WIDTH
) -> ShownFigure:
    """Retrieval of the own image by the noise in the representation: a panel for each family, a line for each tap."""
    import seaborn

    rows = metrics[metrics["measure"] == measure]
    chosen = [family for family in families if (rows["inverse"] == family).any()]
    if not chosen:
        raise BacksightError(f"the table has no {measure} of {', '.join(families)}: run 03_quality.")
    taps = taps_in_order(rows)
    colours = dict(zip(taps, seaborn.color_palette("viridis", len(taps) + 1), strict=False))
    chance = rows[rows["inverse"] == "null_shuffled"]["value"].mean()
    with styled_figure(width, 2.9) as figure:
        panels = figure.subplots(1, len(chosen), squeeze=False, sharey=True)[0]
        for axes, family in zip(panels, chosen, strict=True):
            for tap in taps:
                at = rows[(rows["inverse"] == family) & (rows["tap"] == tap)].sort_values("noise")
                axes.errorbar(
                    at["noise"],
                    at["value"],
                    yerr=np.stack([at["value"] - at["low"], at["high"] - at["value"]]).clip(min=0),
                    color=colours[tap],
                    marker="o",
                    markersize=3,
                    elinewidth=0.7,
                    label=tap if axes is panels[0] else None,
                )
            axes.axhline(chance, color="#5f5f5f", linestyle=(0, (3, 1.5)), linewidth=1.1)
            axes.set_title(INVERSE_NAMES.get(family, family))
            axes.set_xlabel("noise (standard deviations)")
        panels[0].set_ylabel(measure_name(measure))
        figure.legend(loc="outside right upper")
        figure.caption = (
            f"{_where(rows)}: does a reconstruction find its own image, with noise in the representation? 95 % "
            f"intervals; dashed: another image's features. {_counted(rows)}"
        )
        ends = [
            f"{family} {group['value'].mean():.2f} at noise {noise:g}"
            for family in chosen
            for noise, group in rows[rows["inverse"] == family].groupby("noise")
        ]
        figure.description = f"Curves of {measure_name(measure)} by noise, mean over taps: {'; '.join(ends)}."
    return figure


def cycle_matrix(metrics: pd.DataFrame, families: Sequence[str], width: float = COLUMN_WIDTH) -> ShownFigure:
    """Cosine between the target's features of image and reconstruction: source tap (rows) by compared tap (columns)."""
    rows = metrics[(metrics["measure"] == "cycle_cosine") & metrics["inverse"].isin([*families, "null_shuffled"])]
    rows = with_nulls_of(rows, families[0])
    chosen = [name for name in [*families, "null_shuffled"] if (rows["inverse"] == name).any()]
    if not chosen:
        raise BacksightError("the table has no cycle_cosine: run 03_quality.")
    taps = taps_in_order(rows)
    across = list(dict.fromkeys(rows["cycle_tap"]))
    with styled_figure(width, width / len(chosen) * 0.8 + 1.2) as figure:
        panels = figure.subplots(1, len(chosen), squeeze=False, sharey=True)[0]
        for axes, name in zip(panels, chosen, strict=True):
            at = rows[rows["inverse"] == name].pivot_table(index="tap", columns="cycle_tap", values="value")
            image = _heatmap(axes, at.reindex(index=taps, columns=across), low=0, high=1)
            axes.set_title(INVERSE_NAMES.get(name, name))
            axes.set_xlabel("compared at tap")
        panels[0].set_ylabel("reconstructed from tap")
        figure.colorbar(image, ax=list(panels), label=measure_name("cycle_cosine"), shrink=0.8)
        widest = float((rows["high"] - rows["low"]).max())
        figure.caption = (
            f"{_where(rows)}: the target's features of the reconstruction against those of the image; the widest 95 % "
            f"interval is {widest:.2f}. {_counted(rows)}"
        )
        told = [f"{name} {rows[rows['inverse'] == name]['value'].min():.2f} at the least" for name in chosen]
        figure.description = f"Matrices of cosines between features of image and reconstruction: {', '.join(told)}."
    return figure


def information_maps(metrics: pd.DataFrame, width: float = COLUMN_WIDTH) -> ShownFigure:
    """`patch_r2` over the picture, one map for each tap: 1 is all of a place's variance, 0 no better than the mean."""
    rows = metrics[metrics["measure"] == "patch_r2"]
    if rows.empty:
        raise BacksightError("the table has no patch_r2: run 03_quality.")
    taps = taps_in_order(rows)
    across = min(len(taps), 6)
    down = math.ceil(len(taps) / across)
    low = min(0.0, float(rows["value"].min()))
    with styled_figure(width, down * (width / across + 0.1) + 0.35) as figure:
        panels = figure.subplots(down, across, squeeze=False).ravel()
        for axes, tap in zip(panels, taps, strict=False):
            at = rows[rows["tap"] == tap]
            table = at.pivot_table(index="row", columns="column", values="value")
            image = axes.imshow(table, vmin=low, vmax=1, cmap="viridis")
            axes.set_title(f"{tap}\n{at['value'].mean():.2f} ± {(at['high'] - at['low']).mean() / 2:.2f}")
        for axes in panels:
            axes.set_axis_off()
        figure.colorbar(image, ax=list(panels), label="R²", shrink=0.7)
        figure.caption = (
            f"{_where(rows)}: R² of each part of the picture, inverse {rows['inverse'].iloc[0]}; above each map "
            f"its mean and the mean half-width of the 95 % intervals. {_counted(rows)}"
        )
        told = ", ".join(f"{rows[rows['tap'] == tap]['value'].mean():.2f} at {tap}" for tap in (taps[0], taps[-1]))
        figure.description = f"Maps of R² over the picture by tap; their means: {told}."
    return figure


def error_maps(
    images: Any, reconstructions: Mapping[str, Any], cells: int = 8, width: float = COLUMN_WIDTH
) -> ShownFigure:
    """Images (rows) and the error of each part of their reconstructions from each tap (columns), one scale for all.

    images: (B, 3, H, W) in [0, 1]; reconstructions: {tap: (B, 3, H, W)}; cells: parts down and across. The colour is
    the root mean squared error of a part, in full ranges.
    """
    import torch
    import torch.nn.functional as F

    inputs = torch.as_tensor(images)
    taps = list(reconstructions)
    maps = {
        tap: F.adaptive_avg_pool2d((torch.as_tensor(made) - inputs).square().mean(1, keepdim=True), cells)[:, 0].sqrt()
        for tap, made in reconstructions.items()
    }
    most = max(float(each.max()) for each in maps.values())
    with styled_figure(width, len(inputs) * (width / (len(taps) + 2)) + 0.5) as figure:
        grid = figure.subplots(len(inputs), len(taps) + 1, squeeze=False)
        for axes in grid.ravel():
            axes.set_axis_off()
        for line, row in enumerate(grid):
            row[0].imshow(inputs[line].permute(1, 2, 0), interpolation="nearest")
            for axes, tap in zip(row[1:], taps, strict=True):
                shown = axes.imshow(maps[tap][line], vmin=0, vmax=most, cmap="magma")
                if line == 0:
                    axes.set_title(tap.replace(".", ".\n"), fontsize=SMALL)
        figure.colorbar(shown, ax=list(grid.ravel()), label="RMS error", shrink=0.8)
        figure.caption = f"Where the error lies: {len(inputs)} images, root mean squared error of each part, by tap."
        told = ", ".join(f"{float(maps[tap].mean()):.3f} at {tap}" for tap in (taps[0], taps[-1]))
        figure.description = f"Maps of the error over {len(inputs)} pictures by tap; their means: {told}."
        figure.shows_images = True
    return figure


def _clean(metrics: pd.DataFrame) -> pd.DataFrame:
    """Without the rows of noised representations."""
    return metrics[~(metrics["noise"] > 0)] if "noise" in metrics else metrics


def _heatmap(axes: Axes, table: pd.DataFrame, low: float, high: float) -> Any:
    image = axes.imshow(table.to_numpy(float), vmin=low, vmax=high, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(table.columns)), list(table.columns), rotation=90)
    axes.set_yticks(range(len(table.index)), list(table.index))
    axes.grid(False)
    return image


def _where(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    return f"{first['target']} on {first['dataset']}, {first['split']}"


def _counted(rows: pd.DataFrame) -> str:
    """n and seeds as a sentence: of the inverses, not of their nulls."""
    ours = rows[~rows["inverse"].str.startswith("null_")]
    ours = rows if ours.empty else ours
    images = sorted(set(ours["n"].astype(int)))
    seeds = sorted(set(ours["seeds"].fillna(1).astype(int))) if "seeds" in ours else [1]
    return f"n = {_span(images)} images, training seeds: {_span(seeds)}."


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _first_and_last(rows: pd.DataFrame) -> str:
    if rows.empty:
        return "not measured"
    taps = taps_in_order(rows)
    values = rows.groupby("tap")["value"].mean()
    return f"{values[taps[0]]:.3g} at {taps[0]}, {values[taps[-1]]:.3g} at {taps[-1]}"
