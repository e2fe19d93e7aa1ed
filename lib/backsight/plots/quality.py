"""Figures of 03_quality, from the rows of a metrics.csv: regions, edges, bands, retrieval under noise, the cycle check
and information maps."""

import math
from collections.abc import Sequence

import pandas as pd

from backsight.errors import BacksightError
from backsight.plots.style import (
    COLUMN_WIDTH,
    INVERSE_NAMES,
    ShownFigure,
    depth_colours,
    draw_band,
    draw_bars,
    draw_curves,
    ends,
    inverse_order,
    is_null,
    legend_of_inverses,
    look_of,
    measure_name,
    panels_of,
    rows_of,
    sample_size,
    styled_figure,
    taps_in_order,
    where,
)
from backsight.tables.pool import with_nulls_of


def detail_curves(metrics: pd.DataFrame, measures: Sequence[str], family: str, columns: int = 2) -> ShownFigure:
    """Several measures by depth in one figure: lines are inverse families with 95 % bands, dashed lines are nulls.

    metrics: rows of one target and data set; family: whose shuffled and untrained nulls are drawn. A dotted line is
    the measure on the images themselves, where there is such a ceiling. Raises BacksightError where none is there.
    """
    chosen = [measure for measure in measures if (metrics["measure"] == measure).any()]
    if not chosen:
        raise BacksightError(f"the table has none of the measures {', '.join(measures)}: run 03_quality.")
    clean = metrics[~(metrics["noise"] > 0)] if "noise" in metrics else metrics
    rows = with_nulls_of(clean, family)
    names = inverse_order(list(rows["inverse"]))
    with styled_figure(COLUMN_WIDTH, 1.75 * math.ceil(len(chosen) / columns) + 0.75) as figure:
        for axes, measure in zip(panels_of(figure, len(chosen), columns, sharex=True), chosen, strict=True):
            at = rows[rows["measure"] == measure]
            draw_curves(axes, at, names)
            axes.set_title(measure_name(measure))
            if "ceiling" in at and at["ceiling"].notna().any():
                axes.axhline(at["ceiling"].max(), color="black", linewidth=0.8, linestyle=":")
        legend_of_inverses(figure, names)
        figure.caption = f"{where(rows)}: measures by depth with 95 % intervals; dashed lines are nulls. {_sizes(rows)}"
        own = rows[rows["inverse"] == family]
        told = [f"{measure_name(measure)}: {ends(own[own['measure'] == measure])}" for measure in chosen]
        figure.description = f"Curves by depth; {family} inverse: {'; '.join(told)}."
    return figure


def band_curves(metrics: pd.DataFrame, family: str) -> ShownFigure:
    """Error power over image power by spatial frequency, one line for each tap, shallow (dark) to deep (light)."""
    nulls = ("null_mean", "null_shuffled")
    rows = with_nulls_of(rows_of(metrics, "band_error", inverse=[family, *nulls]), family)
    taps, bands = taps_in_order(rows), sorted(rows["band"].unique())
    with styled_figure(COLUMN_WIDTH, 2.9) as figure:
        axes = figure.subplots()
        for tap, colour in depth_colours(taps).items():
            at = rows[(rows["tap"] == tap) & (rows["inverse"] == family)].sort_values("band")
            draw_band(axes, at["band"], at, color=colour, marker="o", markersize=3, label=tap)
        for null in nulls:
            level = rows[rows["inverse"] == null].groupby("band")["value"].mean()
            axes.plot(level.index, level, label=look_of(null).label, **look_of(null).line)
        axes.set_xscale("log", base=2)
        axes.set_xticks(bands, [f"{band:g}" for band in bands])
        axes.set(xlabel="spatial frequency (cycles over the picture)", ylabel=measure_name("band_error"))
        figure.legend(loc="outside right upper")
        figure.caption = (
            f"{where(rows)}: error of the {family} inverse by spatial frequency, 95 % intervals; "
            f"1 is as wrong as nothing at all. {_sizes(rows)}"
        )
        told = ", ".join(f"{row.value:.2f} at {row.band:g}" for row in at.itertuples())
        figure.description = f"Curves of error power over image power; from {taps[-1]}: {told}."
    return figure


def noise_curves(metrics: pd.DataFrame, families: Sequence[str]) -> ShownFigure:
    """Retrieval of the own image by the noise in the representation: a panel for each family, a line for each tap."""
    rows = rows_of(metrics, "retrieval_top1")
    chosen = [family for family in families if (rows["inverse"] == family).any()]
    if not chosen:
        raise BacksightError(f"the table has no retrieval_top1 of {', '.join(families)}: run 03_quality.")
    colours = depth_colours(taps_in_order(rows))
    chance = rows[rows["inverse"] == "null_shuffled"]["value"].mean()
    with styled_figure(COLUMN_WIDTH, 2.9) as figure:
        panels = panels_of(figure, len(chosen), len(chosen), sharey=True)
        for axes, family in zip(panels, chosen, strict=True):
            for tap, colour in colours.items():
                at = rows[(rows["inverse"] == family) & (rows["tap"] == tap)].sort_values("noise")
                label = tap if axes is panels[0] else None
                draw_bars(axes, at["noise"], at, color=colour, marker="o", markersize=3, capsize=0, label=label)
            axes.axhline(chance, **look_of("null_shuffled").line)
            axes.set(title=look_of(family).label, xlabel="noise (standard deviations)")
        panels[0].set_ylabel(measure_name("retrieval_top1"))
        figure.legend(loc="outside right upper")
        figure.caption = (
            f"{where(rows)}: does a reconstruction find its own image, with noise in the representation? 95 % "
            f"intervals; dashed: another image's features. {_sizes(rows)}"
        )
        told = [
            f"{family} {group['value'].mean():.2f} at noise {noise:g}"
            for family in chosen
            for noise, group in rows[rows["inverse"] == family].groupby("noise")
        ]
        figure.description = f"Curves of {measure_name('retrieval_top1')} by noise, mean over taps: {'; '.join(told)}."
    return figure


def cycle_matrix(metrics: pd.DataFrame, families: Sequence[str]) -> ShownFigure:
    """Cosine between the target's features of image and reconstruction: source tap (rows) by compared tap (columns)."""
    rows = with_nulls_of(rows_of(metrics, "cycle_cosine", inverse=[*families, "null_shuffled"]), families[0])
    chosen = [name for name in [*families, "null_shuffled"] if (rows["inverse"] == name).any()]
    taps, across = taps_in_order(rows), list(dict.fromkeys(rows["cycle_tap"]))
    with styled_figure(COLUMN_WIDTH, COLUMN_WIDTH / len(chosen) * 0.8 + 1.2) as figure:
        panels = panels_of(figure, len(chosen), len(chosen), sharey=True)
        for axes, name in zip(panels, chosen, strict=True):
            table = rows[rows["inverse"] == name].pivot_table(index="tap", columns="cycle_tap", values="value")
            values = table.reindex(index=taps, columns=across).to_numpy(float)
            image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axes.set_xticks(range(len(across)), across, rotation=90)
            axes.set_yticks(range(len(taps)), taps)
            axes.grid(False)
            axes.set(title=INVERSE_NAMES.get(name, name), xlabel="compared at tap")
        panels[0].set_ylabel("reconstructed from tap")
        figure.colorbar(image, ax=panels, label=measure_name("cycle_cosine"), shrink=0.8)
        widest = float((rows["high"] - rows["low"]).max())
        figure.caption = (
            f"{where(rows)}: the target's features of the reconstruction against those of the image; the widest 95 % "
            f"interval is {widest:.2f}. {_sizes(rows)}"
        )
        told = [f"{name} {rows[rows['inverse'] == name]['value'].min():.2f} at the least" for name in chosen]
        figure.description = f"Matrices of cosines between features of image and reconstruction: {', '.join(told)}."
    return figure


def information_maps(metrics: pd.DataFrame) -> ShownFigure:
    """`patch_r2` over the picture, one map for each tap: 1 is all of a place's variance, 0 no better than the mean."""
    rows = rows_of(metrics, "patch_r2")
    taps = taps_in_order(rows)
    across = min(len(taps), 6)
    low = min(0.0, float(rows["value"].min()))
    with styled_figure(COLUMN_WIDTH, math.ceil(len(taps) / across) * (COLUMN_WIDTH / across + 0.1) + 0.35) as figure:
        panels = panels_of(figure, len(taps), across)
        for axes, tap in zip(panels, taps, strict=True):
            at = rows[rows["tap"] == tap]
            table = at.pivot_table(index="row", columns="column", values="value")
            image = axes.imshow(table, vmin=low, vmax=1, cmap="viridis")
            axes.set_title(f"{tap}\n{at['value'].mean():.2f} ± {(at['high'] - at['low']).mean() / 2:.2f}")
            axes.set_axis_off()
        figure.colorbar(image, ax=figure.axes, label="R²", shrink=0.7)
        figure.caption = (
            f"{where(rows)}: R² of each part of the picture, inverse {rows['inverse'].iloc[0]}; above each map "
            f"its mean and the mean half-width of the 95 % intervals. {_sizes(rows)}"
        )
        figure.description = f"Maps of R² over the picture by tap; their means: {ends(rows)}."
    return figure


def _sizes(rows: pd.DataFrame) -> str:
    """n and seeds as a sentence: of the inverses, not of their nulls."""
    null = is_null(rows)
    return f"{sample_size(rows if null.all() else rows[~null])}."
