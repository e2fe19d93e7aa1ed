"""Figures of training and of targets: losses by step, the scores on a model card, the scenes themselves."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from backsight.errors import BacksightError
from backsight.plots.grids import bare
from backsight.plots.style import (
    COLUMN_WIDTH,
    NULL_COLOUR,
    ShownFigure,
    depth_colours,
    legend_line,
    measure_name,
    panels_of,
    styled_figure,
    target_colour,
)

_RULE_NAMES: Mapping[str, str] = MappingProxyType({"mixed": "typical hue", "uniform": "any hue"})


def training_curves(history: pd.DataFrame) -> ShownFigure:
    """The loss of every module by step, on a logarithmic scale: lines in training, points on the validation split.

    history: columns step, module, split ("train" or "validation"), loss, seconds, as training.train returns.
    Modules are coloured by their order, first to last.
    """
    if missing := [c for c in ("step", "module", "split", "loss", "seconds") if c not in history.columns]:
        raise BacksightError(f"the history lacks the columns {', '.join(missing)}: give what training.train returns.")
    if history.empty:
        raise BacksightError("the history has no rows: nothing was trained.")
    colours = depth_colours(list(dict.fromkeys(history["module"])))
    with styled_figure(COLUMN_WIDTH, 2.8) as figure:
        axes = figure.subplots()
        for module, colour in colours.items():
            rows = history[history["module"] == module]
            trained, validated = rows[rows["split"] == "train"], rows[rows["split"] != "train"]
            axes.plot(trained["step"], trained["loss"], color=colour, linewidth=0.9, label=module)
            axes.plot(validated["step"], validated["loss"], "o", color=colour, markersize=3)
        axes.set(yscale="log", xlabel="step", ylabel="loss (mean squared error)")
        axes.set_title(f"{history['step'].max():,.0f} steps in {history['seconds'].max():,.0f} s")
        kinds = [
            legend_line("training", color=NULL_COLOUR, linewidth=0.9),
            legend_line("validation", color=NULL_COLOUR, marker="o", markersize=3, linestyle="none"),
        ]
        handles = [*kinds, *axes.get_legend_handles_labels()[0]]
        figure.legend(handles=handles, loc="outside right upper", ncols=math.ceil(len(handles) / 16))
        figure.caption = "Loss of every module by training step: lines in training, points on the validation split."
        last = history[history["step"] == history["step"].max()].drop_duplicates("module", keep="last")
        told = [f"{module} {loss:.3g}" for module, loss in zip(last["module"], last["loss"], strict=True)]
        figure.description = f"Curves of the loss by step; at step {history['step'].max():,}: {', '.join(told)}."
    return figure


def card_scores(card: Mapping[str, Any]) -> pd.DataFrame:
    """The scores of a model card (card.json) as a table.

    Returns columns rule ("mixed": the classes' typical hues; "uniform": any hue), measure, classes ("all",
    "canonical", "colour-free" or one class), value, low, high, n; low and high are NaN where there is no interval.
    Raises BacksightError where the card has no such scores.
    """
    scores = pd.DataFrame(card.get("scores") or [])
    if missing := [c for c in ("rule", "measure", "classes", "value") if c not in scores.columns]:
        raise BacksightError(
            f"the card of {card.get('target', 'a target')} has no scores with {', '.join(missing)}: run 01_targets."
        )
    return scores.reindex(columns=["rule", "measure", "classes", "value", "low", "high", "n"])


def class_scores(card: Mapping[str, Any], hues: Mapping[str, float | None]) -> ShownFigure:
    """Horizontal bars for each class of `scenes`: the score with the typical hues, and with uniformly random hues.

    card: a model card (see card_scores), of which the first measure is drawn; hues: {class: its canonical hue in
    degrees, or None}, in the order of the bars. Classes with a canonical hue and colour-free ones stand apart; whiskers
    are 95 % intervals where the card has them; dashed and dotted lines are the scores over all classes.
    """
    scores = card_scores(card)
    measure = str(scores["measure"].iloc[0])
    scores = scores[scores["measure"] == measure]
    table = scores.pivot_table(index="classes", columns="rule", values="value")
    classes = [name for name in hues if name in table.index]
    if not classes or "mixed" not in table or "uniform" not in table:
        raise BacksightError("the card has no scores of single classes with both colour rules: run 01_targets.")
    owned = [name for name in classes if hues[name] is not None]
    classes = [*owned, *(name for name in classes if hues[name] is None)]
    places = np.arange(len(classes)) + 0.8 * (np.arange(len(classes)) >= len(owned))
    colour, label = target_colour(str(card.get("target", ""))), measure_name(measure)
    looks = {"mixed": (1.0, (6, 2), -0.19), "uniform": (0.4, (1, 1.5), 0.19)}
    with styled_figure(COLUMN_WIDTH, 0.27 * len(classes) + 1.1) as figure:
        axes = figure.subplots()
        for rule, (alpha, dashes, shift) in looks.items():
            at = scores[scores["rule"] == rule].set_index("classes").loc[classes]
            values, name = at["value"].to_numpy(float), _RULE_NAMES[rule]
            axes.barh(places + shift, values, height=0.36, label=f"{name}, each class", color=colour, alpha=alpha)
            around = np.abs(at[["low", "high"]].to_numpy(float).T - values)
            axes.errorbar(values, places + shift, xerr=around, fmt="none", ecolor="0.35", elinewidth=0.7, capsize=1.5)
            if "all" in table.index:
                whole = float(table[rule]["all"])
                said = f"{name}, all classes: {whole:.3f}"
                axes.axvline(whole, color="black", linewidth=0.9, linestyle=(0, dashes), label=said)
        axes.set_yticks(places, [f"{n} ({hues[n]:.0f}°)" if n in owned else f"{n} (any hue)" for n in classes])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set(xlim=(0, 1), xlabel=label, ylabel="class (its canonical hue)")
        figure.legend(loc="outside upper center", ncols=2)
        figure.caption = "Scores of each class with the typical hues, and of the same scenes with any hue."
        told = [f"{name} {table['mixed'][name]:.2f} and {table['uniform'][name]:.2f}" for name in classes]
        figure.description = f"Bars of {label} with typical hues and with any hue: {', '.join(told)}."
    return figure


def score_curve(curves: Mapping[str, pd.DataFrame]) -> ShownFigure:
    """The validation score of targets by training step. curves: {target: table with step and top1 or ap50 and ap}."""
    names = {"top1": "top-1 accuracy", "ap50": "AP50", "ap": "AP"}
    with styled_figure(COLUMN_WIDTH, 2.3 * -(-len(curves) // 3)) as figure:
        panels = panels_of(figure, len(curves), 3)
        for axes, (target, curve) in zip(panels, curves.items(), strict=True):
            for measure, style in zip([name for name in names if name in curve], ("-", "--"), strict=False):
                axes.plot(curve["step"], curve[measure], style, color=target_colour(target), label=names[measure])
            axes.set(ylim=(0, 1), title=target, xlabel="training step")
            axes.legend(loc="lower right")
        for axes in panels[::3]:
            axes.set_ylabel("score on validation scenes")
        figure.caption = "The targets' score on validation scenes while they were trained."
        told = [f"{target} {curve.iloc[-1].to_dict()}" for target, curve in curves.items()]
        figure.description = f"Curves of the score by training step; at the end: {'; '.join(told)}."
    return figure


def scenes_sheet(scenes: Mapping[str, Sequence[np.ndarray]]) -> ShownFigure:
    """Scenes of the data set, one row for each colour rule: the same geometry, other hues.

    scenes: {rule: pictures (H, W, 3) uint8}, equally many of each.
    """
    count, names = len(next(iter(scenes.values()))), [_RULE_NAMES.get(rule, rule) for rule in scenes]
    with styled_figure(COLUMN_WIDTH, COLUMN_WIDTH / count * len(scenes) + 0.1) as figure:
        grid = figure.subplots(len(scenes), count, squeeze=False)
        for row, name, pictures in zip(grid, names, scenes.values(), strict=True):
            for axes, picture in zip(row, pictures, strict=True):
                axes.imshow(picture, interpolation="nearest")
                bare(axes)
            row[0].set_ylabel(name)
        figure.caption = "Scenes of the data set: the same geometry in each column, another colour rule in each row."
        figure.description = f"Grid of {count} scenes, textured silhouettes on photographs, in {', '.join(names)}."
        figure.shows_images = True
    return figure
