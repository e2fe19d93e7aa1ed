"""Figures that need several runs, or pictures that the runs drew: the method, and targets side by side.

Numbers come from the tidy tables of finished runs (study.Study) alone; pictures from the PNG files beside them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch

from backsight.errors import BacksightError
from backsight.inverses.files import load, shipped_inverses
from backsight.plots.colour import accuracy_curves, outcome_bars, response_curves, reversion_by_depth
from backsight.plots.cross_layer import cross_matrix, decay_curve, half_step_curves, similarity_matrices
from backsight.plots.efficiency import (
    chain_errors,
    cost_of_pictures,
    data_size_curves,
    efficiency_curves,
    search_curves,
    tap_scores,
)
from backsight.plots.factors import factor_curves, factor_heatmap
from backsight.plots.quality import band_curves, cycle_matrix, information_maps, noise_curves
from backsight.plots.style import (
    COLUMN_WIDTH,
    MEASURE_NAMES,
    NORMAL,
    PICTURES,
    SMALL,
    TARGET_COLOURS,
    ShownFigure,
    depth_curves,
    inverse_order,
    styled_figure,
    taps_in_order,
    target_colour,
)
from backsight.plots.tradeoff import by_depth, score_against_psnr, task_by_t
from backsight.project import write_atomically
from backsight.scenes.render import render
from backsight.tables.claims import AS_GOOD, difference, estimate_of
from backsight.tables.names import LEADING_FAMILIES
from backsight.tables.read import (
    COLOUR,
    CROSS_LAYER,
    EFFICIENCY,
    QUALITY,
    TRADEOFF,
    Study,
    counted,
    fullest_run,
    used_columns,
    write_text,
)
from backsight.targets import load_target

NULL_COLOUR = "#5f5f5f"
CAPTIONS = "captions.md"
STUDY_MEASURES: Mapping[str, str] = MappingProxyType(
    {
        **MEASURE_NAMES,
        "psnr_background": "PSNR of the background (dB)",
        "psnr_boundary": "PSNR at object borders (dB)",
        "perceptual": "perceptual distance",
        "texture_accuracy": "texture told (share of objects)",
        "retrieval_top1": "own image found first (share)",
        "retrieval_rank": "mean rank (0 = first, 1 = last)",
        "cycle_cosine": "cosine after a second pass",
        "hue_error_shown": "hue error to the colour shown (degrees)",
        "reversion_index": "reversion index (1 = prototype)",
    }
)


# ------------------------------------------------------------------------------------------------- figures and captions


@dataclass(frozen=True)
class StudyFigure:
    """A figure of the study: a file name without suffix, a title, the picture and the rows that it shows.

    rows: the tidy rows drawn; None where the figure shows pictures. runs: the runs that they come from.
    note: what else a reader has to know.
    """

    name: str
    title: str
    figure: Figure
    rows: pd.DataFrame | None = None
    runs: tuple[str, ...] = ()
    note: str = ""


def save_figure(folder: str | Path, name: str, figure: Figure) -> list[Path]:
    """Save <name>.png (200 dots per inch) and <name>.svg; equal figures are equal bytes. Returns the two paths."""
    folder = Path(folder)
    # An SVG names its parts by random identifiers unless a salt is set while it is written, and tells the date.
    with rc_context({"svg.hashsalt": "backsight", "svg.fonttype": "path"}):
        return [
            write_atomically(
                folder / f"{name}.png",
                lambda temporary: figure.savefig(temporary, dpi=200, bbox_inches="tight", metadata={"Software": None}),
            ),
            write_atomically(
                folder / f"{name}.svg",
                lambda temporary: figure.savefig(temporary, bbox_inches="tight", metadata={"Date": None}),
            ),
        ]


def caption(drawn: StudyFigure) -> str:
    """A figure's caption in Markdown: title, what it shows, n, seeds, intervals, runs; counted from its rows."""
    said = getattr(drawn.figure, "caption", "")
    parts = [f"**{drawn.title}.**", said, drawn.note]
    runs: Iterable[str] = drawn.runs
    if drawn.rows is not None and len(drawn.rows):
        rows = drawn.rows
        parts.append(f"n = {counted(rows['n'], 'images')}; {counted(rows['seeds'], 'training seeds')};")
        with_interval = rows[["low", "high"]].notna().all(axis=1)
        if with_interval.all():
            parts.append("95 % bootstrap intervals.")
        elif with_interval.any():
            parts.append(f"95 % bootstrap intervals for {with_interval.sum()} of {len(rows)} values.")
        else:
            parts.append("no intervals.")
        datasets = rows[["dataset", "split"]].dropna().drop_duplicates()
        where = [f"{dataset} ({split})" for dataset, split in datasets.itertuples(index=False)]
        parts.append(f"Images: {', '.join(where)}.")
        runs = runs or sorted(set(rows["run"]))
    if runs := list(runs):
        parts.append(f"Runs: {', '.join(f'`{run}`' for run in runs)}.")
    return " ".join(part.strip() for part in parts if part)


def write_figures(folder: str | Path, figures: Sequence[StudyFigure], study: Study) -> Path:
    """Save every figure as PNG and SVG, and their captions as captions.md beside them; returns that file.

    Raises BacksightError where two figures have one name.
    """
    names = [drawn.name for drawn in figures]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BacksightError(f"two figures are called {', '.join(twice)}: give each a name of its own.")
    lines = [
        "# Figures",
        "",
        f"Drawn from the tables (metrics.csv) and pictures of the runs in `{study.name}`.",
    ]
    for number, drawn in enumerate(figures, start=1):
        save_figure(folder, drawn.name, drawn.figure)
        lines += ["", f"## {number}. {drawn.name}", "", f"![{drawn.title}]({drawn.name}.png)", "", caption(drawn)]
    text = "\n".join(lines) + "\n"
    return write_text(Path(folder) / CAPTIONS, text)


# ----------------------------------------------------------------------------------------------------------- the method


def example_pictures(
    target: str = "scenes-vit", seed: int = 0, index: int = 2
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A test scene and its reconstruction from every tap, by the modular inverses that are shipped with a target.

    Returns ((3, H, W), {tap: (3, H, W)}) in [0, 1]. Raises BacksightError where the target has no such inverses.
    """
    frozen = load_target(target)
    folder = shipped_inverses(frozen)
    chains = load(folder, frozen).get("modular", {}) if folder is not None else {}
    if not chains:
        raise BacksightError(f"no modular inverses are shipped with {target}: the scheme is drawn with scenes-vit.")
    scene = render("test", index, seed, size=max(frozen.image_size)).image
    image = torch.from_numpy(scene.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        recorded = frozen.record(image, list(chains))
        made = {tap: chain(recorded[tap])[0].clamp(0, 1).numpy() for tap, chain in chains.items()}
    return image[0].numpy(), made


def method_scheme(
    image: np.ndarray, reconstructions: Mapping[str, np.ndarray], target: str = "", width: float = COLUMN_WIDTH
) -> ShownFigure:
    """The method with real pictures: a frozen target's modules, an inverse of each, what comes back from each tap.

    image: (3, H, W) in [0, 1]; reconstructions: {tap: (3, H, W)} in forward order. width: inches.
    Raises BacksightError where there is no reconstruction.
    """
    if not reconstructions:
        raise BacksightError("there is no reconstruction to draw: give at least one tap.")
    count = len(reconstructions)
    left, gap = 0.95, 0.1
    cell = (width - left - 0.05) / count - gap
    picture = min(cell, 0.95)
    box, top = 0.3, 0.22
    rows = (top, top + 0.62, top + 1.18)  # upper edges: modules, inverses, pictures, in inches from the top
    height = rows[2] + picture + 0.3
    with styled_figure(width, height, layout=None) as figure:
        page = figure.add_axes((0, 0, 1, 1))
        page.set_xlim(0, width)
        page.set_ylim(height, 0)
        page.set_axis_off()
        middles = [left + gap + cell / 2 + i * (cell + gap) for i in range(count)]
        _show(figure, image, 0.05 + 0.4, rows[0] + 0.06, min(picture, 0.8))
        page.text(0.45, top - 0.02, "image", ha="center", va="bottom", fontsize=SMALL, weight="bold")
        for number, (tap, middle) in enumerate(zip(reconstructions, middles, strict=True), start=1):
            before = middles[number - 2] + cell / 2 if number > 1 else 0.05 + 0.8
            _box(page, middle, rows[0], cell, box, f"$f_{{{number}}}$", "#e8eef5", "#0173b2")
            _box(page, middle, rows[1], cell, box, f"$g_{{{number}}}$", "#e5f3ee", "#029e73")
            _arrow(page, (before, rows[0] + box / 2), (middle - cell / 2, rows[0] + box / 2), "#0173b2")
            _arrow(page, (middle - cell / 2, rows[1] + box / 2), (before, rows[1] + box / 2), "#029e73")
            _arrow(page, (middle, rows[0] + box), (middle, rows[1]), NULL_COLOUR)
            page.text(middle, top - 0.02, _short(tap), ha="center", va="bottom", fontsize=SMALL)
            _arrow(page, (middle, rows[1] + box), (middle, rows[2]), "#029e73")
            _show(figure, reconstructions[tap], middle, rows[2], picture)
        page.text(0.45, rows[2] + picture / 2, "pictures\nfrom tap", ha="center", va="center", fontsize=SMALL)
        rule = (
            r"$f_i$: frozen modules.  $g_i$: inverses, trained to turn $f_i$'s output into its input.  "
            r"From tap $i$: $g_1 \circ \dots \circ g_i$"
        )
        page.text(left + gap, height - 0.06, rule, ha="left", va="bottom", fontsize=SMALL)
        figure.caption = f"The frozen target{f' {target}' if target else ''} above, an inverse of each module below."
        figure.description = (
            f"Scheme: {count} frozen modules in a row, an inverse under each that leads back to the module before it, "
            f"and under each the picture rebuilt from it: {', '.join(reconstructions)}."
        )
        figure.shows_images = True
    return figure


def _short(tap: str) -> str:
    """A tap's name on at most two lines that fit a column of the scheme."""
    head, dot, number = tap.rpartition(".")
    return f"{head}\n.{number}" if dot and len(tap) > 8 else tap.replace("_", "_\n", 1) if len(tap) > 9 else tap


def _box(page: Axes, middle: float, top: float, wide: float, tall: float, text: str, face: str, edge: str) -> None:
    shape = FancyBboxPatch(
        (middle - wide / 2, top), wide, tall, boxstyle="round,pad=0,rounding_size=0.05", facecolor=face, edgecolor=edge
    )
    page.add_patch(shape)
    page.text(middle, top + tall / 2, text, ha="center", va="center", fontsize=NORMAL)


def _arrow(page: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    page.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops={"arrowstyle": "->", "color": colour, "shrinkA": 1, "shrinkB": 1, "lw": 0.9},
    )


def _show(figure: ShownFigure, picture: np.ndarray, middle: float, top: float, side: float) -> None:
    width, height = figure.get_size_inches()
    axes = figure.add_axes(
        ((middle - side / 2) / width, 1 - (top + side) / height, side / width, side / height), zorder=2
    )
    axes.imshow(np.asarray(picture).transpose(1, 2, 0), interpolation="nearest", vmin=0, vmax=1)
    axes.set_axis_off()


# ---------------------------------------------------------------------------------------------- pictures that runs drew


def stacked_pictures(
    pictures: Mapping[str, str | Path], rows: int | None = None, width: float = COLUMN_WIDTH
) -> ShownFigure:
    """Grids that runs saved as PNG, one under another, each with its title, at the size they were drawn for.

    pictures: {title: path of a grid made by figures.reconstruction_grid}; rows: how many rows of pictures to keep of
    each, default all. Raises BacksightError where there is none, or a file is no picture.
    """
    from PIL import Image

    if not pictures:
        raise BacksightError("there is no picture to stack: give at least one PNG file.")
    arrays = {}
    for title, path in pictures.items():
        try:
            with Image.open(path) as image:
                array = np.asarray(image.convert("RGB"))
        except OSError as error:
            raise BacksightError(f"{Path(path).name} of {title} is no picture that can be read: {error}.") from error
        arrays[title] = array if rows is None else array[slice(*_extent(array, rows))]
    head = 0.2
    heights = {title: width * array.shape[0] / array.shape[1] for title, array in arrays.items()}
    height = sum(heights.values()) + head * len(arrays)
    with styled_figure(width, height, layout=None) as figure:
        top = 0.0
        for title, array in arrays.items():
            figure.text(0.01, 1 - (top + head / 2) / height, title, weight="bold", va="center", fontsize=NORMAL)
            top += head
            axes = figure.add_axes((0, 1 - (top + heights[title]) / height, 1, heights[title] / height))
            axes.imshow(array, aspect="auto", interpolation="antialiased")
            axes.set_axis_off()
            top += heights[title]
        figure.caption = "The input, then what was rebuilt from ever deeper taps."
        figure.description = f"Grids of pictures, one under another: {'; '.join(arrays)}."
        figure.shows_images = True
    return figure


def _extent(array: np.ndarray, rows: int) -> tuple[int, int]:
    """From where to where, in pixels from the top, the first rows of pictures of a saved grid reach: from the names of
    the taps, below the line that says what they are, to the caption of the last row.

    Pictures are the tall stretches between empty lines; what stands under one before the next is its caption.
    """
    inked = np.concatenate([[False], (array < 250).any(axis=(1, 2)), [False]])
    edges = np.flatnonzero(inked[1:] != inked[:-1])
    stretches = list(zip(edges[::2], edges[1::2], strict=True))
    tall = [i for i, (start, end) in enumerate(stretches) if end - start > 0.04 * array.shape[1]]
    first = int(stretches[0][1]) + 6 if tall and tall[0] > 1 else 0
    last = int(stretches[tall[rows] - 1][1]) + 6 if len(tall) > rows else array.shape[0]
    return first, last


# ------------------------------------------------------------------------------------------------- targets side by side


def _in_order(targets: pd.Series) -> list[str]:
    """Targets in the order of every figure: the shipped ones, then others by name."""
    known = list(TARGET_COLOURS)
    return sorted(set(targets), key=lambda name: (known.index(name) if name in known else len(known), name))


def plain_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with one null of each kind: where nulls come once for each family, those of the family that leads."""
    if "family" not in rows or rows["family"].isna().all():
        return rows
    null = rows["inverse"].astype(str).str.startswith("null_")
    named = set(rows.loc[null, "family"].dropna())
    lead = next((name for name in LEADING_FAMILIES if name in named), None)
    return rows[~null | rows["family"].isna() | (rows["family"] == lead)]


def leading_family(rows: pd.DataFrame) -> str:
    """The first of modular, direct, linear that every target of the rows has. Raises BacksightError without one."""
    per_target = [set(group["inverse"]) for _, group in rows.groupby("target")]
    for name in LEADING_FAMILIES:
        if per_target and all(name in names for names in per_target):
            return name
    raise BacksightError("the targets of this table share no inverse family: draw each of them by itself.")


def targets_by_depth(
    rows: pd.DataFrame, measures: Sequence[str], width: float = COLUMN_WIDTH, panel_height: float = 2.0
) -> ShownFigure:
    """Targets compared along their relative depth: a panel a measure, a line a target with its 95 % band.

    rows: tidy rows, one run for each target; the inverse is the first of modular, direct and linear that all targets
    have. Dashed lines: the same on each target's untrained twin; dotted: the mean image. width, panel_height: inches.
    Raises BacksightError where no measure has values at taps.
    """
    chosen = plain_rows(rows[rows["measure"].isin(list(measures)) & rows["tap"].notna() & rows["value"].notna()])
    measures = [name for name in measures if (chosen["measure"] == name).any()]
    if not measures:
        raise BacksightError("the table has none of these measures at any tap: choose others.")
    columns = min(2, len(measures))
    lines = -(-len(measures) // columns)
    targets = _in_order(chosen["target"])
    told, families = [], []
    with styled_figure(width, panel_height * lines + 0.55) as figure:
        panels = figure.subplots(lines, columns, squeeze=False).flatten()
        for empty in panels[len(measures) :]:
            empty.set_axis_off()
        for axes, measure in zip(panels, measures, strict=False):
            of = chosen[chosen["measure"] == measure]
            family = leading_family(of)
            for target in targets:
                _target_line(axes, of[of["target"] == target], family, target)
            axes.set_ylabel(STUDY_MEASURES.get(measure, measure))
            families.append(family)
            ends = of[(of["inverse"] == family)].sort_values("depth").groupby("target", sort=False)["value"].last()
            told.append(
                f"{measure} at the last tap: {', '.join(f'{name} {value:.3g}' for name, value in ends.items())}"
            )
        figure.supxlabel("relative depth of the tap (0 = first, 1 = last)", fontsize=NORMAL)
        handles = [Line2D([], [], color=target_colour(name), marker="o", label=name) for name in targets]
        handles.append(Line2D([], [], color=NULL_COLOUR, linestyle=(0, (4, 1.5)), label="untrained twin"))
        handles.append(Line2D([], [], color=NULL_COLOUR, linestyle=(0, (1, 1.5)), label="mean image"))
        figure.legend(handles=handles, loc="outside upper center", ncols=4)
        kinds = " and ".join(dict.fromkeys(families))
        figure.caption = (
            f"Targets by relative depth, {kinds} inverses; bands: 95 % intervals, dashed and dotted: nulls."
        )
        figure.description = f"Curves by relative depth, one for each target. {'; '.join(told)}."
    return figure


def _target_line(axes: Axes, rows: pd.DataFrame, family: str, target: str) -> None:
    taps = taps_in_order(rows)
    place = {tap: i / max(1, len(taps) - 1) for i, tap in enumerate(taps)}
    looks: dict[str, dict[str, Any]] = {
        family: {"marker": "o", "markersize": 3},
        "null_untrained": {"linestyle": (0, (4, 1.5)), "linewidth": 0.9},
        "null_mean": {"linestyle": (0, (1, 1.5)), "linewidth": 0.9},
    }
    for inverse, look in looks.items():
        line = rows[rows["inverse"] == inverse].assign(x=lambda of: of["tap"].map(place)).sort_values("x")
        if line.empty:
            continue
        colour = NULL_COLOUR if inverse == "null_mean" else target_colour(target)
        axes.plot(line["x"], line["value"], color=colour, **look)
        if inverse == family:
            axes.fill_between(line["x"], line["low"], line["high"], color=colour, alpha=0.18, linewidth=0)


def modular_against_direct(rows: pd.DataFrame, width: float = COLUMN_WIDTH, panel_height: float = 2.2) -> ShownFigure:
    """PSNR of the chain minus the direct decoder's at every tap, a line a target; 0: as good.

    rows: tidy rows of psnr, one run for each target. Bands: 95 % intervals of the difference of two (findings.py).
    Raises BacksightError where no target has both families.
    """
    both = rows[(rows["measure"] == "psnr") & rows["inverse"].isin(["modular", "direct"])]
    lines: dict[str, pd.DataFrame] = {}
    for target in _in_order(both["target"]):
        of = both[both["target"] == target]
        taps = taps_in_order(of)
        found = []
        for place, tap in enumerate(taps):
            at = of[of["tap"] == tap]
            better = difference(*(estimate_of(at[at["inverse"] == name]) for name in ("modular", "direct")))
            if better is not None:
                x = place / max(1, len(taps) - 1)
                found.append({"x": x, "value": better.value, "low": better.low, "high": better.high})
        if found:
            lines[target] = pd.DataFrame(found)
    if not lines:
        raise BacksightError("no target has both a modular and a direct inverse: train both with 02_train_inverse.")
    with styled_figure(width, panel_height + 0.5) as figure:
        axes = figure.subplots()
        for target, line in lines.items():
            axes.plot(line["x"], line["value"], marker="o", markersize=3, color=target_colour(target), label=target)
            axes.fill_between(
                line["x"], line["low"], line["high"], color=target_colour(target), alpha=0.18, linewidth=0
            )
        axes.axhline(0, color=NULL_COLOUR, linewidth=0.9)
        axes.axhline(-AS_GOOD, color=NULL_COLOUR, linewidth=0.9, linestyle=(0, (4, 1.5)))
        axes.set_xlabel("relative depth of the tap (0 = first, 1 = last)")
        axes.set_ylabel("PSNR, modular − direct (dB)")
        figure.legend(loc="outside upper center", ncols=3)
        figure.caption = f"Above 0 the chain is better; dashed: {AS_GOOD} dB below, still taken as as good."
        ends = [f"{target} {line['value'].iloc[-1]:.2f} dB at the last tap" for target, line in lines.items()]
        figure.description = f"Difference of PSNR by relative depth: {', '.join(ends)}."
    return figure


# --------------------------------------------------------------------------------------------- all figures of the study

Say = Callable[[str], object]


def study_figures(
    study: Study, scheme: bool = True, seed: int = 0, say: Say = print, only: Sequence[str] = ()
) -> list[StudyFigure]:
    """Every figure that the runs of a study allow, in the order of the story.

    scheme: draw the method as well, with a shipped target; seed: which test scene it shows; only: notebooks, such as
    "05_colour", to whose figures it is limited. What cannot be drawn is told through `say`, in a sentence that names
    the run which would make it. Raises BacksightError where `only` names a notebook without figures.
    """
    makers: list[tuple[str, str, Callable[[Study, Say], Iterator[StudyFigure]]]] = [
        ("reconstructions and quality", QUALITY, _quality_figures),
        ("cross-application and similarity", CROSS_LAYER, _cross_layer_figures),
        ("colour", COLOUR, _colour_figures),
        ("efficiency", EFFICIENCY, _efficiency_figures),
        ("trade-off", TRADEOFF, _tradeoff_figures),
    ]
    with_figures = [notebook for _, notebook, _ in makers]
    if unknown := [notebook for notebook in only if notebook not in with_figures]:
        raise BacksightError(f"There are no figures of {unknown[0]!r}; there are some of {', '.join(with_figures)}.")
    drawn = list(_scheme(seed, say)) if scheme else []
    for title, notebook, maker in makers:
        if only and notebook not in only:
            continue
        if study.runs(notebook):
            drawn += maker(study, say)
        else:
            say(f"No figures of {title}: {study.name} has no run of {notebook}; `backsight run` that notebook.")
    return drawn


def _scheme(seed: int, say: Say) -> Iterator[StudyFigure]:
    target = "scenes-vit"
    try:
        image, made = example_pictures(target, seed)
    except BacksightError as error:
        say(f"No scheme of the method: {error}")
        return
    note = f"One test scene and the modular inverses that are shipped with {target}; no run."
    yield StudyFigure(
        "method", "Inverting a frozen target module by module", method_scheme(image, made, target), note=note
    )


def _attempt(
    say: Say, name: str, title: str, rows: pd.DataFrame, draw: Callable[[], ShownFigure]
) -> Iterator[StudyFigure]:
    """A figure, or a sentence why a table does not allow it: tables may be of other sizes, targets and versions."""
    try:
        figure = draw()
    except (BacksightError, KeyError, ValueError, IndexError) as error:
        runs = ", ".join(sorted(set(rows["run"]))) or "the runs"
        reason = str(error) if isinstance(error, BacksightError) else f"{type(error).__name__}: {error}"
        say(f"No figure {name}: the table of {runs} does not allow it ({reason.rstrip('.')}).")
        return
    yield StudyFigure(name, title, figure, rows)


def _each_run(study: Study, notebook: str) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(run, what to call its figures after, its table) of the runs of a notebook: its target, with the data set where
    that is not scenes; the whole run's name where two runs would be called the same."""
    labels = {}
    for run in study.runs(notebook):
        first = study.tables[run][["target", "dataset"]].dropna().iloc[:1]
        for target, dataset in first.itertuples(index=False):
            labels[run] = target if dataset == "scenes" else f"{target}-{dataset}"
    for run, label in labels.items():
        alone = list(labels.values()).count(label) == 1
        yield run, _file_name(label if alone else run), used_columns(study.tables[run])


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-")


def _of(table: pd.DataFrame, *measures: str) -> pd.DataFrame:
    return table[table["measure"].isin(measures)]


COMPARED = ("psnr", "ssim", "psnr_background", "psnr_objects", "edge_f1", "mask_iou", "hue_error", "texture_accuracy")


def _quality_figures(study: Study, say: Say) -> Iterator[StudyFigure]:
    yield from _pictures_by_target(study, say)
    plain = fullest_run(study.rows(QUALITY, list(COMPARED)))
    for dataset in sorted(set(plain["dataset"].dropna()), key=lambda name: (name != "scenes", name)):
        rows = plain[plain["dataset"] == dataset]
        ending = "" if dataset == "scenes" else f"-{_file_name(dataset)}"
        yield from _attempt(
            say,
            f"quality-targets{ending}",
            f"Quality by depth, targets compared, on {dataset}",
            rows,
            partial(targets_by_depth, rows, COMPARED),
        )
        psnr = _of(rows, "psnr")
        yield from _attempt(
            say,
            f"modular-against-direct{ending}",
            f"The modular chain against direct decoders, on {dataset}",
            psnr[psnr["inverse"].isin(["modular", "direct"])],
            partial(modular_against_direct, psnr),
        )
    factors = fullest_run(study.rows(QUALITY, "factor_score"))
    if len(factors):
        yield from _attempt(say, "factors", "What a probe reads, by factor", factors, partial(factor_heatmap, factors))
        title = "Factors by depth, with nulls"
        yield from _attempt(say, "factor-curves", title, factors, partial(factor_curves, factors))
    else:
        say(f"No factor table: no run of {QUALITY} in {study.name} scored factors; run it on scenes.")
    for _, label, table in _each_run(study, QUALITY):
        yield from _quality_of_one(label, table, say)


def _quality_of_one(label: str, table: pd.DataFrame, say: Say) -> Iterator[StudyFigure]:
    families = inverse_order([name for name in set(table["inverse"].dropna()) if name in LEADING_FAMILIES])
    lead = next((name for name in LEADING_FAMILIES if name in families), "")
    plain = _of(plain_rows(table), "psnr")
    yield from _attempt(say, f"psnr-{label}", f"PSNR by depth: {label}", plain, partial(depth_curves, plain, "psnr"))
    if "band" in table:
        rows = _of(table, "band_error")
        title = f"Error by spatial frequency: {label}"
        yield from _attempt(say, f"bands-{label}", title, rows, partial(band_curves, table, lead))
    if "noise" in table:
        rows = _of(table, "retrieval_top1")
        title = f"Invert or guess, under noise: {label}"
        yield from _attempt(say, f"retrieval-{label}", title, rows, partial(noise_curves, table, families))
    if "cycle_tap" in table:
        rows = _of(table, "cycle_cosine")
        title = f"The target looks at its reconstructions: {label}"
        yield from _attempt(say, f"cycle-{label}", title, rows, partial(cycle_matrix, table, families))
    if (table["measure"] == "patch_r2").any():
        rows = _of(table, "patch_r2")
        title = f"Where in the picture information is: {label}"
        yield from _attempt(say, f"information-{label}", title, rows, partial(information_maps, rows))


def _pictures_by_target(study: Study, say: Say) -> Iterator[StudyFigure]:
    """The grids of reconstructions that quality runs drew: the first images of each target, then each grid whole."""
    grids: dict[str, dict[str, tuple[str, Path]]] = {}
    runs: dict[str, list[str]] = {}
    for run in study.runs(QUALITY):
        table = study.tables[run]
        drawn = study.folder / run / "figures"
        found = next((path for name in LEADING_FAMILIES if (path := drawn / f"pictures-{name}.png").is_file()), None)
        if found is None:
            say(f"No pictures of {run}: it has no figures/pictures-*.png; run {QUALITY} again for them.")
            continue
        dataset = str(table["dataset"].iloc[0])
        family = found.stem.removeprefix("pictures-")
        grids.setdefault(dataset, {})[str(table["target"].iloc[0])] = (f"{family} inverses", found)
        runs.setdefault(dataset, []).append(run)
    for dataset in sorted(grids, key=lambda name: (name != "scenes", name)):
        pictures = {
            f"{target}, {grids[dataset][target][0]}": grids[dataset][target][1]
            for target in _in_order(pd.Series(list(grids[dataset])))
        }
        ending = "" if dataset == "scenes" else f"-{_file_name(dataset)}"
        yield StudyFigure(
            f"reconstructions{ending}",
            f"Reconstructions by depth and target, on {dataset}",
            stacked_pictures(pictures, rows=1 if len(pictures) > 2 else 2),
            runs=tuple(runs[dataset]),
            note="Pictures of single images (n = 1 each), PSNR of each below it; the scores are in the curves.",
        )


def _cross_layer_figures(study: Study, say: Say) -> Iterator[StudyFigure]:
    every = fullest_run(pd.concat([study.tables[run] for run in study.runs(CROSS_LAYER)], ignore_index=True))
    decay = _of(every, "cross_loss")
    title = "PSNR lost by layer distance, targets compared"
    yield from _attempt(say, "layer-distance", title, decay, partial(decay_curve, used_columns(every)))
    for run, label, table in _each_run(study, CROSS_LAYER):
        rows = _of(table, "cross_psnr")
        title = f"Representation of one tap in the inverse of another: {label}"
        yield from _attempt(say, f"cross-application-{label}", title, rows, partial(cross_matrix, table))
        rows = _of(table, "cka", "procrustes", "token_cosine", "predictability_r2")
        title = f"Similarity of layers: {label}"
        yield from _attempt(say, f"similarity-{label}", title, rows, partial(similarity_matrices, table))
        rows = _of(table, "residual_update", "step_loss")
        title = f"Attention and MLP half-steps: {label}"
        yield from _attempt(say, f"half-steps-{label}", title, rows, partial(half_step_curves, table))
        yield from _pictures_of(study, run, label)


def _pictures_of(study: Study, run: str, label: str) -> Iterator[StudyFigure]:
    """The grids of pictures that a run drew (their PNG says so), at the size they were drawn for."""
    from PIL import Image

    for path in sorted((study.folder / run / "figures").glob("*.png")):
        with Image.open(path) as image:
            shows_images = image.info.get("Comment") == PICTURES
            said = str(image.info.get("Title", ""))
        if shows_images:
            name = f"pictures-{_file_name(run)}-{_file_name(path.stem.removeprefix('pictures'))}".rstrip("-")
            figure = stacked_pictures({f"{label}: {re.sub('[-_]+', ' ', path.stem)}": path})
            figure.caption = said
            yield StudyFigure(name, f"Pictures of {run}", figure, runs=(run,), note="Single images (n = 1 each).")


def _colour_figures(study: Study, say: Say) -> Iterator[StudyFigure]:
    for run, label, raw in _each_run(study, COLOUR):
        # A name with a space is a variant made for a check inside of the run.
        table = raw[~raw["target"].astype(str).str.contains(" ")]
        for name, title, measures, draw in (
            ("response", "Hue error along the circle of shifts", ["hue_error_shown"], response_curves),
            ("outcomes", "Kept, reverted, greyed out", ["share_keep", "share_revert", "share_grey"], outcome_bars),
            ("reversion", "Prototype-reversion index by depth", ["reversion_index"], reversion_by_depth),
            ("accuracy", "The target's own accuracy when colours change", ["top1", "ap50"], accuracy_curves),
        ):
            rows = _of(table, *measures)
            yield from _attempt(say, f"colour-{name}-{label}", f"{title}: {label}", rows, partial(draw, table))
        yield from _pictures_of(study, run, label)


def _efficiency_figures(study: Study, say: Say) -> Iterator[StudyFigure]:
    for run, label, table in _each_run(study, EFFICIENCY):
        for name, title, part, draw in (
            ("efficiency", "Held-out PSNR against cost", "curve", efficiency_curves),
            ("efficiency-taps", "PSNR at every tap after the longest training", "curve", tap_scores),
            ("chain-errors", "Which module of the chain adds the error", "chain", chain_errors),
            ("data-size", "Images needed by each family", "data", data_size_curves),
            ("optimised", "Optimisation of single images against trained inverses", "per_image", cost_of_pictures),
            ("search", "The search for learning rates (validation split)", "search", search_curves),
        ):
            rows = table[table["part"] == part] if "part" in table else table.iloc[:0]
            if rows.empty:
                say(f"No figure {name}-{label}: {run} has no part {part!r}; run {EFFICIENCY} with it.")
                continue
            yield from _attempt(say, f"{name}-{label}", f"{title}: {label}", rows, partial(draw, table))
        yield from _pictures_of(study, run, label)


def _tradeoff_figures(study: Study, say: Say) -> Iterator[StudyFigure]:
    for run, label, table in _each_run(study, TRADEOFF):
        depth = ("psnr", "hue_error", "cka_to_start", "cross_psnr")
        scores = ("top1", "ap50")
        for name, title, measures, draw in (
            ("tradeoff", "The task's score against PSNR", (*scores, "psnr"), score_against_psnr),
            ("tradeoff-task", "The task's score by t", scores, task_by_t),
            ("tradeoff-depth", "What changes with t, by depth", depth, partial(by_depth, measures=depth)),
        ):
            rows = _of(table, *measures)
            yield from _attempt(say, f"{name}-{label}", f"{title}: {label}", rows, partial(draw, table))
        yield from _pictures_of(study, run, label)
