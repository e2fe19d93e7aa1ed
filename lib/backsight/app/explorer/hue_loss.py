"""At which depth does a target lose the hue of an object? The explorer's curve over several scenes, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from backsight.app.explorer.judging import HUE_KEPT, HUE_OF_A_GUESS, HUES
from backsight.app.explorer.pictures import Subject, subject
from backsight.app.explorer.seeing import Bench, Workbench
from backsight.app.explorer.view import View
from backsight.measures.structure import hue_errors, mean_hue
from backsight.plots.style import COLUMN_WIDTH, ShownFigure, styled_figure, target_colour
from backsight.tables.pool import metrics_rows


def hue_rows(workbench: Workbench, targets: Sequence[str], scenes: int, seed: int = 0) -> list[dict[str, Any]]:
    """Tidy rows of `hue_error` in degrees: targets x families x taps, mean over HUES hues of each of `scenes` objects.

    The interval is over scenes. Rows whose inverse is `null_shuffled` judge the modular (else first) family's
    reconstruction of another scene, in another hue: what a guess scores. An object that comes back grey counts as a
    guess (90°).
    """
    rows: list[dict[str, Any]] = []
    for name in targets:
        bench = workbench.bench(name)
        views = [
            View(picture=f"scene {scene}", hue_shift=360.0 * i / HUES) for scene in range(scenes) for i in range(HUES)
        ]
        shown = [subject(view, bench.target.image_size) for view in views]
        place: dict[str, Any] = {"target": name, "weights": bench.target.weights, "dataset": "scenes", "split": "test"}
        for family, tap, values in _errors(bench, shown, scenes):
            tap_of: dict[str, Any] = {"tap": tap, "depth": bench.target.depth(tap), "inverse": family}
            rows += metrics_rows(values, "hue_error", seed, **place, **tap_of)
    return rows


def _errors(bench: Bench, shown: Sequence[Subject], scenes: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """(family, tap, (scenes,) mean error over hues), of every family, and of the null."""
    images = torch.cat([one.image for one in shown])
    masks = torch.cat([one.mask for one in shown if one.mask is not None])
    true = mean_hue(images, masks)
    recorded = bench.target.record(images)
    null = "modular" if "modular" in bench.families else next(iter(bench.families))
    elsewhere = torch.arange(len(images)).roll(HUES + HUES // 2 - 1)  # another scene, another hue
    for family, inverses in bench.families.items():
        for tap in (tap for tap in bench.taps if tap in inverses):
            with torch.no_grad():
                made = inverses[tap](recorded[tap])
            yield family, tap, _by_scene(hue_errors(true, mean_hue(made, masks)), scenes)
            if family == null and scenes > 1:
                yield "null_shuffled", tap, _by_scene(hue_errors(true, mean_hue(made[elsewhere], masks)), scenes)


def _by_scene(errors: Tensor, scenes: int) -> np.ndarray:
    return np.nanmean(errors.reshape(scenes, HUES).double().numpy(), axis=1)


def lost_from(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row for each target and inverse: the last tap that keeps the hue, the first that loses it.

    Kept: the interval's upper end lies within HUE_KEPT; lost: its lower end lies above; else `cannot_tell` names the
    taps between.
    """
    found = []
    judged = metrics[(metrics.measure == "hue_error") & ~metrics.inverse.str.startswith("null")]
    for (target, inverse), group in judged.groupby(["target", "inverse"], sort=False):
        group = group.sort_values("depth")
        kept, lost = group[group.high <= HUE_KEPT], group[group.low > HUE_KEPT]
        unsure = group[(group.high > HUE_KEPT) & (group.low <= HUE_KEPT)]
        found.append(
            {
                "target": target,
                "inverse": inverse,
                "kept down to": kept.tap.iloc[-1] if len(kept) else "-",
                "lost from": lost.tap.iloc[0] if len(lost) else "-",
                "cannot tell": ", ".join(unsure.tap) or "-",
                "first error (°)": round(group.value.iloc[0], 1),
                "last error (°)": round(group.value.iloc[-1], 1),
            }
        )
    return pd.DataFrame(found)


def hue_loss_figure(metrics: pd.DataFrame, inverse: str = "modular") -> ShownFigure:
    """Hue error by relative depth, one line for each target with its interval; the guess and the bound dashed.

    A target without this inverse is drawn with its linear one.
    """
    with styled_figure(COLUMN_WIDTH, 3.2) as figure:
        axes = figure.subplots()
        ends = []
        for target, group in metrics[metrics.measure == "hue_error"].groupby("target", sort=False):
            own = group[group.inverse == inverse]
            own = (own if len(own) else group[group.inverse == "linear"]).sort_values("depth")
            depth, colour = np.linspace(0, 1, len(own)), target_colour(str(target))
            axes.plot(depth, own.value, color=colour, marker="o", markersize=3, label=target)
            axes.fill_between(depth, own.low, own.high, color=colour, alpha=0.2, linewidth=0)
            ends.append(f"{target} {own.value.iloc[0]:.0f} to {own.value.iloc[-1]:.0f}")
        axes.axhline(HUE_OF_A_GUESS, color="#5f5f5f", linestyle="--", linewidth=1, label="a guess")
        axes.axhline(HUE_KEPT, color="#5f5f5f", linestyle=":", linewidth=1, label="kept below")
        axes.set_ylim(0, 120)
        axes.set_xlabel("relative depth (0: first tap, 1: last tap)")
        axes.set_ylabel(f"hue error (degrees)\nmean over {HUES} hues")
        axes.legend(ncols=2, loc="upper left")
        n = int(metrics.n.max())
        figure.caption = (
            f"Hue error of the main object by depth, {inverse} inverses, {n} scenes in {HUES} hues; bands: 95 % "
            "intervals over scenes."
        )
        figure.description = f"One line for each target, from the first to the last tap, in degrees: {'; '.join(ends)}."
    return figure
