"""Figures of exact inversion and of uniqueness, from the tidy table of 11_exact (pictures: from arrays).

What became of an image has one colour everywhere: back blue, another exact root orange, not solved grey, error grown
purple. Trained weights are drawn with full lines and marks, untrained ones with dashed lines and open marks. From left
to right the way goes back, from the deepest half-step to the first.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from backsight.errors import BacksightError
from backsight.plots.grids import decibels, picture_table, scored_table
from backsight.plots.style import (
    COLUMN_WIDTH,
    INVERSE_NAMES,
    NORMAL,
    NULL_COLOUR,
    ShownFigure,
    depth_colours,
    legend_above,
    legend_line,
    name_taps,
    reach,
    rows_of,
    styled_figure,
)
from backsight.tables.names import (
    ALL_TOKENS,
    ANOTHER_ROOT,
    BACK,
    CHAIN_FATES,
    ERROR_GROWN,
    FATES,
    LOST,
    MAP,
    NEAR,
    NEARBY,
    ONE_TOKEN,
    RANDOM_MOVE,
    RIGHT,
    TRUE_STREAM,
    UNSOLVED,
)


class SecondRoots(Protocol):
    """What `second_root_figure` reads of the study's record of the same name."""

    @property
    def metrics(self) -> pd.DataFrame: ...
    @property
    def images(self) -> torch.Tensor: ...
    @property
    def pictures(self) -> Mapping[str, Mapping[str, torch.Tensor]]: ...
    @property
    def reached(self) -> Mapping[str, torch.Tensor]: ...
    @property
    def tap(self) -> str: ...
    @property
    def destination(self) -> str: ...


FATE_COLOURS: Mapping[str, str] = {
    BACK: "#0173b2",
    ANOTHER_ROOT: "#de8f05",
    UNSOLVED: "#949494",
    ERROR_GROWN: "#cc78bc",
}
FATE_NAMES: Mapping[str, str] = {
    BACK: "back (error ≤ 1e-5)",
    ANOTHER_ROOT: "another exact root",
    UNSOLVED: "not solved",
    ERROR_GROWN: "error grown",
}
UNTRAINED = "random"
DASHES = (0, (3, 1.5))


def _rows(metrics: pd.DataFrame, study: str, *measures: str) -> pd.DataFrame:
    """The rows of a study's measures; raises BacksightError where there are none."""
    if missing := [name for name in ("weights", "step") if name not in metrics]:
        raise BacksightError(f"the table lacks the columns {', '.join(missing)}: give the metrics of 11_exact.")
    return rows_of(metrics, measures, **({"study": study} if "study" in metrics else {}))


def _weights(rows: pd.DataFrame) -> list[str]:
    """Trained weights first."""
    return sorted(dict.fromkeys(rows["weights"]), key=lambda name: name == UNTRAINED)


def _words(weights: str) -> str:
    return "untrained" if weights == UNTRAINED else "trained"


def _counted(rows: pd.DataFrame) -> str:
    told = []
    for weights in _weights(rows):
        part = rows[rows["weights"] == weights]
        seeds = int(part["seeds"].max())
        more = f" and {seeds} seeds" if seeds > 1 else ""
        told.append(f"{_words(weights)}: n = {int(part['n'].max())} images{more}")
    return f"{'; '.join(told)}; 95 % intervals"


def _order(rows: pd.DataFrame) -> list[str]:
    """Half-steps from the first to the last of the model."""
    return list(dict.fromkeys(rows.sort_values("depth", kind="stable")["step"]))


def _draw_stack(
    axes: Axes, rows: pd.DataFrame, fates: Mapping[str, str], index: str | list[str], places: Sequence[Any]
) -> None:
    """Stacked shares of fates, {fate: colour}, with the interval of "back"; places: values of the index, in order."""
    bottom = np.zeros(len(places))
    for fate, colour in fates.items():
        at = rows[rows["measure"] == fate].set_index(index).reindex(places)
        axes.bar(range(len(places)), at["value"], 0.72, bottom, color=colour, linewidth=0)
        if fate == BACK:
            axes.errorbar(range(len(places)), at["value"], reach(at), fmt="none", ecolor="black", capsize=2)
        bottom += at["value"].fillna(0).to_numpy(float)
    axes.set(ylim=(0, 1.02), ylabel="share of images")


def _steps_below(axes: Axes, names: Sequence[str]) -> None:
    name_taps(axes, names)
    axes.grid(False, axis="x")


def half_step_figure(metrics: pd.DataFrame) -> ShownFigure:
    """What becomes of images at every half-step alone, from the true stream: stacked shares, a panel for each weights.

    The line on top of "back" is its interval.
    """
    rows = _rows(metrics, "half_step", *FATES)
    weights, steps = _weights(rows), _order(rows)[::-1]
    with styled_figure(COLUMN_WIDTH, 1.9 * len(weights) + 0.9) as figure:
        grid = figure.subplots(len(weights), 1, squeeze=False, sharex=True)[:, 0]
        for axes, name in zip(grid, weights, strict=True):
            part = rows[rows["weights"] == name]
            _draw_stack(axes, part, FATE_COLOURS, "step", steps)
            axes.set_title(f"{_words(name)} weights, n = {int(part['n'].max())}", loc="left")
            _steps_below(axes, steps)
        _fate_legend(figure, rows)
        grid[-1].set_xlabel("stream behind the half-step that is inverted, deep → shallow")
        figure.caption = f"Every half-step alone, from its true output. {_counted(rows)} (on “back”)."
        figure.description = "Shares of images by half-step. " + _told(rows[rows["measure"] == BACK], "back")
    return figure


def _fate_legend(figure: ShownFigure, rows: pd.DataFrame) -> None:
    met = [fate for fate in FATES if (rows.loc[rows["measure"].isin([fate, f"lost_{fate}"]), "value"] > 0).any()]
    legend_above(figure, [Patch(color=FATE_COLOURS[fate], label=FATE_NAMES[fate]) for fate in met], 4, ncols=4)


def _told(rows: pd.DataFrame, what: str) -> str:
    told = []
    for name in _weights(rows):
        part = rows[rows["weights"] == name].sort_values("depth", kind="stable")
        told.append(f"{_words(name)}, {what}: " + ", ".join(f"{r.value:.3g} at {r.step}" for r in part.itertuples()))
    return "; ".join(told) + "."


def roots_figure(metrics: pd.DataFrame) -> ShownFigure:
    """Where half-steps on tokens fold, and how many roots a token has, by half-step; trained full, untrained open."""
    shares = {
        "negative_determinant": ("det < 0 at the truth: it folds", "#de8f05", "s"),
        "several_roots": ("several roots were found", "#d55e00", "D"),
        "truth_found": ("the truth is among the roots", "#0173b2", "o"),
        "complete": ("signs sum to 1 (none known missing)", "#949494", "^"),
    }
    rows = _rows(metrics, "roots", *shares, "roots")
    steps = _order(rows)[::-1]
    with styled_figure(COLUMN_WIDTH, 2.9) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
        for number, name in enumerate(_weights(rows)):
            trained = name != UNTRAINED
            for place, (measure, (_, colour, marker)) in enumerate(shares.items()):
                shift = 0.13 * (place - (len(shares) - 1) / 2) + 0.05 * number
                part = rows[(rows["measure"] == measure) & (rows["weights"] == name)]
                _points(left, part, steps, shift, trained, colour, marker)
            part = rows[(rows["measure"] == "roots") & (rows["weights"] == name)]
            _points(right, part, steps, 0.12 * (number - 0.5), trained, "#000000", "o")
        left.set_ylim(-0.03, 1.03)
        left.set_ylabel("share of tokens")
        right.set_ylabel("roots found of a token, mean")
        right.set_ylim(bottom=0.9)
        for axes in (left, right):
            _steps_below(axes, steps)
            axes.set_xlim(-0.5, len(steps) - 0.5)
        handles = [legend_line(label, color=c, marker=m, linestyle="none") for label, c, m in shares.values()]
        handles.append(legend_line("trained", color="#000000", marker="o"))
        if UNTRAINED in _weights(rows):
            handles.append(legend_line("untrained", color="#000000", marker="o", linestyle=DASHES, mfc="white"))
        legend_above(figure, handles, 3)
        figure.supxlabel("MLP half-step (stream behind it), deep → shallow", fontsize=NORMAL)
        figure.caption = (
            "The roots of half-steps that act on every token alone. A negative determinant means at least two further "
            f"roots; where signs sum to 1, no root is known to be missing. {_counted(rows)}."
        )
        figure.description = "Shares and numbers of roots by half-step. " + " ".join(
            _told(rows[rows["measure"] == measure], words)
            for measure, words in (("negative_determinant", "share that folds"), ("roots", "roots of a token"))
        )
    return figure


def _points(
    axes: Axes, rows: pd.DataFrame, steps: Sequence[str], shift: float, trained: bool, colour: str, marker: str
) -> None:
    at = rows.set_index("step").reindex(list(steps))
    style: dict[str, Any] = {"color": colour, "marker": marker, "capsize": 2, "elinewidth": 0.8, "markersize": 4}
    style |= {"linewidth": 0.9} if trained else {"linewidth": 0.9, "linestyle": DASHES, "markerfacecolor": "white"}
    axes.errorbar(np.arange(len(steps)) + shift, at["value"], reach(at), **style)


def distances_figure(metrics: pd.DataFrame) -> ShownFigure:
    """How far other roots lie from the truth: share of roots up to a distance, in deviations of the stream.

    Left the nearest other root of a token, right all of them; one line a half-step, with its band. Dashed at √2: two
    unrelated tokens of the stream.
    """
    panels = {
        "nearest_other_in_deviations": "nearest other root of a token",
        "other_distance_in_deviations": "all other roots",
    }
    rows = _rows(metrics, "roots", *panels)
    rows = rows[rows["value"].notna() & rows["quantile"].notna() & (rows["weights"] != UNTRAINED)]
    if rows.empty:
        raise BacksightError("No token has a second root in this table: there is no distance to draw.")
    colours = depth_colours(_order(rows), end=0.9)
    unrelated = {"color": NULL_COLOUR, "linestyle": (0, (5, 3)), "linewidth": 0.9}
    with styled_figure(COLUMN_WIDTH, 2.7) as figure:
        grid = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, (measure, title) in zip(grid, panels.items(), strict=True):
            for step, colour in colours.items():
                line = rows[(rows["measure"] == measure) & (rows["step"] == step)].sort_values("quantile")
                axes.plot(line["value"], line["quantile"], color=colour, label=step)
                band = line[["quantile", "low", "high"]].to_numpy(float).T
                axes.fill_betweenx(*band, color=colour, alpha=0.15, linewidth=0)
            axes.axvline(2**0.5, **unrelated)
            axes.set_xscale("log")
            axes.set_title(title, loc="left")
            axes.set_xlabel("distance from the truth (deviations of the stream)")
        grid[0].set_ylabel("share of roots")
        grid[0].set_ylim(0, 1)
        handles = [legend_line(step, color=colour) for step, colour in colours.items()]
        legend_above(figure, [*handles, legend_line("two unrelated tokens", **unrelated)], 7)
        figure.caption = (
            "How far other exact roots lie from the true token, trained weights. A deviation is the root mean square "
            f"distance of the stream's tokens from their mean. {_counted(rows)}, bands."
        )
        middle = rows[(rows["quantile"] == 0.5) & (rows["measure"] == "nearest_other_in_deviations")]
        figure.description = "Distribution of distances. " + _told(middle, "median distance of the nearest other root")
    return figure


def rules_figure(metrics: pd.DataFrame) -> ShownFigure:
    """How often each rule picks the truth among the roots of a token; trained weights, a colour a half-step.

    Counted are tokens with several roots. Half-steps of which fewer than one token in fifty has several roots are left
    out: nothing has to be chosen there.
    """
    rows = _rows(metrics, "roots", "tokens_right_several")
    rows = rows[(rows["weights"] != UNTRAINED) & rows["rule"].notna() & rows["value"].notna()]
    often = _rows(metrics, "roots", "several_roots")
    often = often[(often["weights"] != UNTRAINED) & (often["value"] > 0.02)]
    rows = rows[rows["step"].isin(often["step"])]
    if rows.empty:
        raise BacksightError("No half-step of this table has tokens with several roots: there is nothing to choose.")
    colours = depth_colours(_order(rows), end=0.9)
    rules = list(rows.groupby("rule", sort=False)["value"].mean().sort_values().index)
    with styled_figure(COLUMN_WIDTH, 2.9) as figure:
        axes = figure.subplots()
        told = []
        for number, (step, colour) in enumerate(colours.items()):
            at = rows[rows["step"] == step]
            told.append(f"{step}: {', '.join(f'{r.rule} {r.value:.3g}' for r in at.itertuples())}.")
            at = at.set_index("rule").reindex(rules)
            y = np.arange(len(rules)) + 0.18 * (number - (len(colours) - 1) / 2)
            style = {"color": colour, "marker": "osD^vP"[number % 6], "linestyle": "none", "elinewidth": 0.8}
            axes.errorbar(at["value"], y, xerr=reach(at), label=step, capsize=2, **style)
        starts = [rule.endswith("start") and "nearest" not in rule for rule in rules]
        names = [f"Newton from the {rule}" if start else rule for rule, start in zip(rules, starts, strict=True)]
        axes.set_yticks(range(len(rules)), names)
        axes.set(xlim=(-0.02, 1.02), xlabel="share of tokens with several roots where the rule picks the truth")
        figure.legend(loc="outside upper center", ncols=min(6, len(colours)))
        figure.caption = (
            "Which rule picks the true token without knowing it. Starts: where Newton's method ends; the others choose "
            f"among all roots that were found. {_counted(rows)}."
        )
        figure.description = "Share right by rule. " + " ".join(told)
    return figure


def chain_figure(metrics: pd.DataFrame) -> ShownFigure:
    """The fate of images on the way back: which share is still right behind each half-step, and where it was lost why.

    Above: the shares that survive, one line for each weights and rule, with bands. Below: for trained weights, a panel
    a rule, the share lost first at each half-step, by reason.
    """
    rows = _rows(metrics, "chain", "survived", *(f"lost_{fate}" for fate in FATES[1:]))
    # Rows are in the order of the chain, from the deepest half-step back.
    steps = list(dict.fromkeys(rows["step"]))
    kinds = list(dict.fromkeys(zip(rows["weights"], rows["rule"], strict=True)))
    trained = [kind for kind in kinds if kind[0] != UNTRAINED]
    colours = dict(zip(trained, ["#0173b2", "#029e73", "#882255", "#56b4e9"] * 3, strict=False))
    with styled_figure(COLUMN_WIDTH, 2.0 * (1 + 0.8 * len(trained)) + 1.0) as figure:
        ratios = [1.0, *[0.75] * len(trained)]
        grid = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        handles = []
        x = np.arange(len(steps) + 1) - 0.5
        for weights, rule in kinds:
            kind = (weights, rule)
            part = rows[(rows["weights"] == weights) & (rows["rule"] == rule) & (rows["measure"] == "survived")]
            at = part.set_index("step").reindex(steps)
            style: dict[str, Any] = {"color": colours.get(kind, "#000000")}
            style["linestyle"] = DASHES if weights == UNTRAINED else "-"
            # Before the first half-step every image is right.
            value, low, high = (np.concatenate([[1.0], at[name].to_numpy(float)]) for name in ("value", "low", "high"))
            grid[0].plot(x, value, marker="o", markersize=3, **style)
            grid[0].fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
            handles.append(legend_line(f"{_words(weights)}, {rule}", **style))
        grid[0].set_ylim(-0.03, 1.03)
        grid[0].set_ylabel("share still right")
        grid[0].legend(handles=handles, loc="best")
        top = max(0.05, float(rows.loc[rows["measure"] != "survived", "value"].max()))
        for axes, (weights, rule) in zip(grid[1:], trained, strict=True):
            bottom = np.zeros(len(steps))
            for fate in FATES[1:]:
                at = rows[(rows["weights"] == weights) & (rows["rule"] == rule) & (rows["measure"] == f"lost_{fate}")]
                value = at.set_index("step").reindex(steps)["value"].fillna(0).to_numpy(float)
                axes.bar(range(len(steps)), value, 0.7, bottom, color=FATE_COLOURS[fate], linewidth=0)
                bottom += value
            axes.set_ylim(0, min(1.02, 1.15 * top))
            axes.set_ylabel("share lost here")
            axes.set_title(f"{_words(weights)}, {rule}", loc="left")
        _steps_below(grid[-1], steps)
        for axes in grid:
            axes.grid(False, axis="x")
        _fate_legend(figure, rows)
        grid[-1].set_xlabel("stream behind the half-step that is inverted, deep → shallow")
        figure.caption = (
            "Above: images that are still right (error ≤ 1e-5) behind each half-step of the chain. Below: where the "
            f"others were lost first, and to what. {_counted(rows[rows['measure'] == 'survived'])}."
        )
        ends = rows[(rows["measure"] == "survived") & (rows["step"] == steps[-1])]
        figure.description = (
            "Survival along the chain. Right at its end: "
            + ", ".join(
                f"{_words(r.weights)}, {r.rule} {r.value:.3g} [{r.low:.3g}, {r.high:.3g}]" for r in ends.itertuples()
            )
            + "."
        )
    return figure


WHOLE_COLOURS: Mapping[str, str] = {
    BACK: FATE_COLOURS[BACK],
    ANOTHER_ROOT: FATE_COLOURS[ANOTHER_ROOT],
    NEARBY: "#56b4e9",
    LOST: FATE_COLOURS[UNSOLVED],
}
WHOLE_NAMES: Mapping[str, str] = {
    BACK: FATE_NAMES[BACK],
    ANOTHER_ROOT: FATE_NAMES[ANOTHER_ROOT],
    NEARBY: f"near (error ≤ {NEAR:g})",
    LOST: "lost",
}


def whole_chain_figure(metrics: pd.DataFrame, outcomes: pd.DataFrame) -> ShownFigure:
    """All half-steps solved together. Left: the fate of images by tap, and of starts from another image's picture.
    Right: each image's error at the start (open) and at the end (full), one column a tap; the line: what counts as
    back."""
    rows = _rows(metrics, "whole", *CHAIN_FATES)
    taps = list(dict.fromkeys(rows.sort_values("depth", kind="stable")["tap"]))
    bars = [(tap, inverse) for tap in taps for inverse in ("exact", "null_shuffled")]
    bars = [(t, i) for t, i in bars if ((rows["tap"] == t) & (rows["inverse"] == i)).any()]
    with styled_figure(COLUMN_WIDTH, 2.8) as figure:
        left, right = figure.subplots(1, 2)
        _draw_stack(left, rows, WHOLE_COLOURS, ["tap", "inverse"], bars)
        counts = rows[rows["measure"] == CHAIN_FATES[-1]].set_index(["tap", "inverse"]).reindex(bars)["n"]
        names = [f"{t}{'' if i == 'exact' else ', null'}, n = {n:.0f}" for (t, i), n in zip(bars, counts, strict=True)]
        _steps_below(left, names)
        told = outcomes[outcomes["start"] == MAP]
        for place, tap in enumerate(taps):
            own = told[told["tap"] == tap].sort_values("error")
            x = place + np.linspace(-0.3, 0.3, len(own)) if len(own) > 1 else np.array([float(place)])
            right.plot(x, own["error_start"], "o", markersize=3, mfc="none", mec="#555555", linestyle="none")
            for fate in CHAIN_FATES:
                of = (own["fate"] == fate).to_numpy()
                errors = own["error"].to_numpy(float)
                right.plot(x[of], errors[of].clip(1e-16), "o", markersize=3, color=WHOLE_COLOURS[fate])
        right.axhline(RIGHT, color="#999999", linewidth=0.8, linestyle=DASHES)
        right.set_yscale("log")
        right.set_ylabel("relative error of the first stream")
        _steps_below(right, taps)
        handles: list[Any] = [Patch(color=WHOLE_COLOURS[fate], label=WHOLE_NAMES[fate]) for fate in CHAIN_FATES]
        handles.append(legend_line("its start (MAP)", marker="o", mfc="none", mec="#555555", linestyle="none"))
        legend_above(figure, handles, 3)
        figure.caption = (
            "All half-steps from a tap back to the embedding, solved together. Left: the fate of images, 95 % Wilson "
            "interval of “back”; null: the search begins at another image's picture. Right: every image's error at the "
            "start and at the end."
        )
        back = rows[(rows["measure"] == BACK) & (rows["inverse"] == "exact")]
        figure.description = "Share of images that are back: " + ", ".join(
            f"{r.tap} {r.value:.3g} [{r.low:.3g}, {r.high:.3g}] of {r.n}" for r in back.itertuples()
        )
    return figure


def whole_chain_pictures(images: torch.Tensor, pictures: Mapping[str, torch.Tensor], tap: str) -> ShownFigure:
    """Four images as rows; the input, what decoders and MAP make of a tap, the exact solution, the true embedding
    decoded, with the PSNR to the input (dB). images: (k, 3, H, W); pictures: {inverse: (k, 3, H, W)} of `WholeChains`.
    """
    made = {family: picture.numpy()[:4] for family, picture in pictures.items()}
    figure = scored_table(images.numpy()[:4], made, {**INVERSE_NAMES, "embedding": "true embedding"})
    figure.caption = (
        f"What comes back from {tap}. Exact: all half-steps solved together, then the patch embedding, with a "
        "linear inverse for what it drops; true embedding: the same of the true one, so what there is to get back."
    )
    return figure


def second_root_figure(shown: SecondRoots) -> ShownFigure:
    """Four images as rows: the input, and for each family the true stream decoded beside streams with other roots.

    Under the pictures: PSNR to the picture of the true stream (dB).
    """
    names = {TRUE_STREAM: "true stream", ONE_TOKEN: "1 token", ALL_TOKENS: "all tokens", RANDOM_MOVE: "null: random"}
    # Images of which there is something to see come first.
    seen = sum(shown.reached[name].int() for name in (ONE_TOKEN, ALL_TOKENS))
    lines = torch.argsort(-torch.as_tensor(seen), stable=True)[:4]
    columns, captions = {"input": shown.images[lines].numpy()}, {}
    for family, true in shown.pictures[TRUE_STREAM].items():
        for name, label in names.items():
            above = INVERSE_NAMES.get(family, family) + ":" if name == TRUE_STREAM else " " * len(columns)
            made = shown.pictures[name][family][lines].numpy().copy()
            scores = decibels(true[lines].numpy(), made)
            reached = shown.reached[name][lines].tolist()
            made[~np.array(reached)] = 1.0
            title = f"{above}\n{label}"
            columns[title] = made
            told = [f"{score:.1f} dB" if there else "–" for score, there in zip(scores, reached, strict=True)]
            captions[title] = [""] * len(told) if name == TRUE_STREAM else told
    figure = picture_table(columns, captions)
    figure.caption = (
        f"Streams that lead to the very same {shown.destination}, decoded at {shown.tap}: the true one, one with "
        "the farthest second root of one token, one with second roots of all tokens that have one; null: the same "
        "tokens moved as far in a random direction. In dB: PSNR to the picture of the true stream. –: no token has "
        f"another root, or no stream at {shown.tap} was found that leads there (such images come last)."
    )
    between = shown.metrics[shown.metrics["measure"] == "psnr_between"]
    told = ", ".join(f"{r.inverse}, {r.picture} {r.value:.1f} dB" for r in between.itertuples())
    figure.description = f"Pictures of second roots of {shown.destination}. PSNR to the true stream's picture: {told}."
    return figure
