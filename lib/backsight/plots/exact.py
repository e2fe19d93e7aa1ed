"""Figures of exact inversion and of uniqueness, from the tidy table of 11_exact (pictures: from arrays).

What became of an image has one colour everywhere: back blue, another exact root orange, not solved grey, error grown
purple. Trained weights are drawn with full lines and marks, untrained ones with dashed lines and open marks. From left
to right the way goes back, from the deepest half-step to the first.
"""

from collections.abc import Mapping, Sequence
from typing import Any

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
    ShownFigure,
    depth_colours,
    draw_band,
    draw_bars,
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

FATE_COLOURS: Mapping[str, str] = {
    BACK: "#0173b2",
    ANOTHER_ROOT: "#de8f05",
    UNSOLVED: "#949494",
    ERROR_GROWN: "#cc78bc",
}
FATE_NAMES: Mapping[str, str] = {
    BACK: f"back (error ≤ {RIGHT:g})",
    ANOTHER_ROOT: "another exact root",
    UNSOLVED: "not solved",
    ERROR_GROWN: "error grown",
}
# Of whole chains, solved together.
WHOLE_COLOURS: Mapping[str, str] = {
    BACK: FATE_COLOURS[BACK],
    ANOTHER_ROOT: FATE_COLOURS[ANOTHER_ROOT],
    NEARBY: "#56b4e9",
    LOST: FATE_COLOURS[UNSOLVED],
}
WHOLE_NAMES: Mapping[str, str] = {**FATE_NAMES, NEARBY: f"near (error ≤ {NEAR:g})", LOST: "lost"}
UNTRAINED = "random"
DASHES = (0, (3, 1.5))


def _rows(metrics: pd.DataFrame, study: str, *measures: str) -> pd.DataFrame:
    """The rows of a study's measures; raises BacksightError where there are none."""
    return rows_of(metrics, measures, study=study)


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
    axes: Axes, rows: pd.DataFrame, fates: Mapping[str, str], index: str | list[str], places: list[Any]
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
    weights, steps = _weights(rows), _order(rows)[::-1]
    with styled_figure(COLUMN_WIDTH, 2.9) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
        drawn = [(left, name, colour, marker) for name, (_, colour, marker) in shares.items()]
        drawn.append((right, "roots", "#000000", "o"))
        for number, name in enumerate(weights):
            open_marks = {"linestyle": DASHES, "markerfacecolor": "white"} if name == UNTRAINED else {}
            for place, (axes, measure, colour, marker) in enumerate(drawn):
                at = rows[(rows["measure"] == measure) & (rows["weights"] == name)].set_index("step").reindex(steps)
                shift = 0.13 * (place - 1.5) + 0.05 * number if axes is left else 0.12 * (number - 0.5)
                draw_bars(
                    axes, np.arange(len(steps)) + shift, at, color=colour, marker=marker, linewidth=0.9, **open_marks
                )
        left.set(ylim=(-0.03, 1.03), ylabel="share of tokens")
        right.set_ylabel("roots found of a token, mean")
        right.set_ylim(bottom=0.9)
        for axes in (left, right):
            _steps_below(axes, steps)
            axes.set_xlim(-0.5, len(steps) - 0.5)
        handles = [legend_line(label, color=c, marker=m, linestyle="none") for label, c, m in shares.values()]
        handles.append(legend_line("trained", color="#000000", marker="o"))
        if UNTRAINED in weights:
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


def rules_figure(metrics: pd.DataFrame) -> ShownFigure:
    """How often each rule picks the truth among the roots of a token; trained weights, a colour a half-step.

    Half-steps of which fewer than one token in fifty has several roots are left out: nothing has to be chosen there.
    """
    rows = _rows(metrics, "roots", "tokens_right", "several_roots")
    rows = rows[(rows["weights"] != UNTRAINED) & rows["value"].notna()]
    often = rows.loc[(rows["measure"] == "several_roots") & (rows["value"] > 0.02), "step"]
    rows = rows[(rows["measure"] == "tokens_right") & rows["step"].isin(often)]
    if rows.empty:
        raise BacksightError("No half-step of this table has tokens with several roots: there is nothing to choose.")
    colours = depth_colours(_order(rows), end=0.9)
    rules = list(rows.groupby("rule", sort=False)["value"].mean().sort_values().index)
    with styled_figure(COLUMN_WIDTH, 2.9) as figure:
        axes = figure.subplots()
        for number, (step, colour) in enumerate(colours.items()):
            at = rows[rows["step"] == step].set_index("rule").reindex(rules)
            y = np.arange(len(rules)) + 0.18 * (number - (len(colours) - 1) / 2)
            style = {"color": colour, "marker": "osD^vP"[number % 6], "linestyle": "none", "elinewidth": 0.8}
            axes.errorbar(at["value"], y, xerr=reach(at), label=step, capsize=2, **style)
        starts = [rule.endswith("start") and "nearest" not in rule for rule in rules]
        names = [f"Newton from the {rule}" if start else rule for rule, start in zip(rules, starts, strict=True)]
        axes.set_yticks(range(len(rules)), names)
        axes.set(xlim=(-0.02, 1.02), xlabel="share of tokens of which the rule picks the truth")
        figure.legend(loc="outside upper center", ncols=min(6, len(colours)))
        figure.caption = (
            "Which rule picks the true token without knowing it. Starts: where Newton's method ends; the others choose "
            f"among all roots that were found. {_counted(rows)}."
        )
        told = (
            f"{step}: {', '.join(f'{r.rule} {r.value:.3g}' for r in rows[rows['step'] == step].itertuples())}."
            for step in colours
        )
        figure.description = "Share right by rule. " + " ".join(told)
    return figure


def chain_figure(metrics: pd.DataFrame) -> ShownFigure:
    """The fate of images on the way back. Above: which share is still right behind each half-step, with bands; below:
    for trained weights, the share lost first at each half-step, by reason."""
    rows = _rows(metrics, "chain", "survived", *(f"lost_{fate}" for fate in FATES[1:]))
    steps = list(dict.fromkeys(rows["step"]))  # in the order of the chain, from the deepest half-step back
    survived, lost = rows[rows["measure"] == "survived"], rows[rows["measure"] != "survived"]
    with styled_figure(COLUMN_WIDTH, 4.6) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.0, 0.75])
        for weights in _weights(rows):
            style = {"color": "#000000", "linestyle": DASHES} if weights == UNTRAINED else {"color": "#0173b2"}
            start = pd.DataFrame(
                {"value": 1.0, "low": 1.0, "high": 1.0}, index=[0]
            )  # before the first every one is right
            at = survived[survived["weights"] == weights].set_index("step").reindex(steps)
            at = pd.concat([start, at[["value", "low", "high"]]])
            draw_band(
                above, np.arange(len(at)) - 0.5, at, 0.12, marker="o", markersize=3, label=_words(weights), **style
            )
        above.set(ylim=(-0.03, 1.03), ylabel="share still right")
        above.legend(loc="best")
        bottom, trained = np.zeros(len(steps)), lost[lost["weights"] != UNTRAINED]
        for fate in FATES[1:]:
            at = trained[trained["measure"] == f"lost_{fate}"].drop_duplicates("step").set_index("step")
            value = at.reindex(steps)["value"].fillna(0).to_numpy(float)
            below.bar(range(len(steps)), value, 0.7, bottom, color=FATE_COLOURS[fate], linewidth=0)
            bottom += value
        below.set(ylim=(0, min(1.02, 1.15 * max(0.05, bottom.max()))), ylabel="share lost here, trained")
        _steps_below(below, steps)
        above.grid(False, axis="x")
        _fate_legend(figure, rows)
        below.set_xlabel("stream behind the half-step that is inverted, deep → shallow")
        figure.caption = (
            f"Above: images still right (error ≤ {RIGHT:g}) behind each half-step of the chain. Below: where the "
            f"others were lost first, and to what. {_counted(survived)}."
        )
        ends = survived[survived["step"] == steps[-1]]
        told = (f"{_words(r.weights)} {r.value:.3g} [{r.low:.3g}, {r.high:.3g}]" for r in ends.itertuples())
        figure.description = f"Survival along the chain. Right at its end: {', '.join(told)}."
    return figure


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


def second_root_figure(
    images: torch.Tensor,
    pictures: Mapping[str, Mapping[str, torch.Tensor]],
    reached: Mapping[str, torch.Tensor],
    metrics: pd.DataFrame,
) -> ShownFigure:
    """Four images as rows: the input, and for each family the true stream decoded beside streams with other roots.

    images: (N, 3, H, W); pictures: {stream: {family: (N, 3, H, W)}}; reached: {stream: (N,) bool} whether there is such
    a stream; metrics: of `SecondRoots`. Under the pictures: PSNR to the picture of the true stream (dB).
    """
    names = {TRUE_STREAM: "true stream", ONE_TOKEN: "1 token", ALL_TOKENS: "all tokens", RANDOM_MOVE: "null: random"}
    # Images of which there is something to see come first.
    seen = sum(reached[name].int() for name in (ONE_TOKEN, ALL_TOKENS))
    lines = torch.argsort(-torch.as_tensor(seen), stable=True)[:4]
    columns, captions = {"input": images[lines].numpy()}, {}
    for family, true in pictures[TRUE_STREAM].items():
        for name, label in names.items():
            above = INVERSE_NAMES.get(family, family) + ":" if name == TRUE_STREAM else " " * len(columns)
            made = pictures[name][family][lines].numpy().copy()
            scores = decibels(true[lines].numpy(), made)
            has = reached[name][lines].tolist()
            made[~np.array(has)] = 1.0
            title = f"{above}\n{label}"
            columns[title] = made
            told = [f"{score:.1f} dB" if is_one else "–" for score, is_one in zip(scores, has, strict=True)]
            captions[title] = [""] * len(told) if name == TRUE_STREAM else told
    figure = picture_table(columns, captions)
    destination, tap = metrics["step"].iloc[0], metrics["tap"].iloc[0]
    figure.caption = (
        f"Streams that lead to the very same {destination}, decoded at {tap}: the true one, one with "
        "the farthest second root of one token, one with second roots of all tokens that have one; null: the same "
        "tokens moved as far in a random direction. In dB: PSNR to the picture of the true stream. –: no token has "
        f"another root, or no stream at {tap} was found that leads there (such images come last)."
    )
    between = metrics[metrics["measure"] == "psnr_between"]
    shown = ", ".join(f"{r.inverse}, {r.picture} {r.value:.1f} dB" for r in between.itertuples())
    figure.description = f"Pictures of second roots of {destination}. PSNR to the true stream's picture: {shown}."
    return figure
