"""Figures that need several runs, or pictures that the runs drew: the method, and targets side by side.

Numbers come from the tidy tables of finished runs (study.Study) alone; pictures from the PNG files beside them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

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
from backsight.plots.scheme import method_scheme
from backsight.plots.style import (
    PICTURES,
    ShownFigure,
    depth_curves,
    inverse_order,
)
from backsight.plots.targets import (
    in_order,
    modular_against_direct,
    plain_rows,
    stacked_pictures,
    targets_by_depth,
)
from backsight.plots.tradeoff import by_depth, score_against_psnr, task_by_t
from backsight.project import write_atomically
from backsight.scenes.render import render
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

CAPTIONS = "captions.md"


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
    lines = ["# Figures", "", f"Drawn from the tables (metrics.csv) and pictures of the runs in `{study.name}`."]
    for number, drawn in enumerate(figures, start=1):
        save_figure(folder, drawn.name, drawn.figure)
        lines += ["", f"## {number}. {drawn.name}", "", f"![{drawn.title}]({drawn.name}.png)", "", caption(drawn)]
    text = "\n".join(lines) + "\n"
    return write_text(Path(folder) / CAPTIONS, text)


# ----------------------------------------------------------------------------------------------------------- the method


def example_pictures(target: str = "scenes-vit", seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A test scene and its reconstruction from every tap, by the modular inverses that are shipped with a target.

    Returns ((3, H, W), {tap: (3, H, W)}) in [0, 1]. Raises BacksightError where the target has no such inverses.
    """
    frozen = load_target(target)
    folder = shipped_inverses(frozen)
    chains: Mapping[str, torch.nn.Module]
    chains = load(folder, frozen).get("modular", {}) if folder is not None else {}
    if not chains:
        raise BacksightError(f"no modular inverses are shipped with {target}: the scheme is drawn with scenes-vit.")
    scene = render("test", 2, seed, size=max(frozen.image_size)).image
    image = torch.from_numpy(scene.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        recorded = frozen.record(image, list(chains))
        made = {tap: chain(recorded[tap])[0].clamp(0, 1).numpy() for tap, chain in chains.items()}
    return image[0].numpy(), made


# --------------------------------------------------------------------------------------------- all figures of the study

Say = Callable[[str], object]


def _scenes_first(datasets: Iterable[str]) -> list[str]:
    return sorted(set(datasets), key=lambda name: (name != "scenes", name))


def study_figures(
    study: Study, scheme: bool = True, seed: int = 0, say: Say = print, only: Sequence[str] = ()
) -> list[StudyFigure]:
    """Every figure that the runs of a study allow, in the order of the story.

    scheme: draw the method as well, with a shipped target; seed: which test scene it shows; only: notebooks, such as
    "05_colour", to whose figures it is limited. What cannot be drawn is told through `say`, in a sentence that names
    the run which would make it. Raises BacksightError where `only` names a notebook without figures.
    """
    titles = {
        QUALITY: "reconstructions and quality",
        CROSS_LAYER: "cross-application and similarity",
        COLOUR: "colour",
        EFFICIENCY: "efficiency",
        TRADEOFF: "trade-off",
    }
    if unknown := [notebook for notebook in only if notebook not in titles]:
        raise BacksightError(f"There are no figures of {unknown[0]!r}; there are some of {', '.join(titles)}.")
    drawn = list(_scheme(seed, say)) if scheme else []
    for notebook, title in titles.items():
        if only and notebook not in only:
            continue
        if not study.runs(notebook):
            say(f"No figures of {title}: {study.name} has no run of {notebook}; `backsight run` that notebook.")
            continue
        if notebook == QUALITY:
            drawn += _quality_of_targets(study, say)
        elif notebook == CROSS_LAYER:
            tables = [study.tables[run] for run in study.runs(CROSS_LAYER)]
            every = used_columns(fullest_run(pd.concat(tables, ignore_index=True)))
            title = "PSNR lost by layer distance, targets compared"
            drawn += _attempt(say, "layer-distance", title, _of(every, "cross_loss"), partial(decay_curve, every))
        for run, label, table in _each_run(study, notebook):
            for name, what, rows, draw in _PLANS[notebook](table):
                if rows.empty and notebook == EFFICIENCY:
                    say(f"No figure {name}-{label}: {run} has no rows for it; run {EFFICIENCY} with that part.")
                elif len(rows) or notebook != QUALITY:
                    drawn += _attempt(say, f"{name}-{label}", f"{what}: {label}", rows, draw)
            if notebook != QUALITY:
                drawn += _pictures_of(study, run, label)
    return drawn


def _scheme(seed: int, say: Say) -> Iterator[StudyFigure]:
    target, title = "scenes-vit", "Inverting a frozen target module by module"
    try:
        image, made = example_pictures(target, seed)
    except BacksightError as error:
        say(f"No scheme of the method: {error}")
        return
    note = f"One test scene and the modular inverses that are shipped with {target}; no run."
    yield StudyFigure("method", title, method_scheme(image, made, target), note=note)


Plan = tuple[str, str, pd.DataFrame, Callable[[], ShownFigure]]  # name, title, rows that are drawn, how


def _quality_plan(table: pd.DataFrame) -> list[Plan]:
    families = inverse_order([name for name in set(table["inverse"].dropna()) if name in LEADING_FAMILIES])
    lead = next((name for name in LEADING_FAMILIES if name in families), "")
    psnr, bands, noisy = _of(plain_rows(table), "psnr"), _of(table, "band_error"), _of(table, "retrieval_top1")
    cycle, maps = _of(table, "cycle_cosine"), _of(table, "patch_r2")
    noisy = noisy if "noise" in table else noisy[:0]
    return [
        ("psnr", "PSNR by depth", psnr, partial(depth_curves, psnr, "psnr")),
        ("bands", "Error by spatial frequency", bands, partial(band_curves, table, lead)),
        ("retrieval", "Invert or guess, under noise", noisy, partial(noise_curves, table, families)),
        ("cycle", "The target looks at its reconstructions", cycle, partial(cycle_matrix, table, families)),
        ("information", "Where in the picture information is", maps, partial(information_maps, maps)),
    ]


def _cross_layer_plan(table: pd.DataFrame) -> list[Plan]:
    title, alike = "Representation of one tap in the inverse of another", ("cka", "procrustes", "token_cosine")
    similar, steps = _of(table, *alike, "predictability_r2"), _of(table, "residual_update", "step_loss")
    return [
        ("cross-application", title, _of(table, "cross_psnr"), partial(cross_matrix, table)),
        ("similarity", "Similarity of layers", similar, partial(similarity_matrices, table)),
        ("half-steps", "Attention and MLP half-steps", steps, partial(half_step_curves, table)),
    ]


def _colour_plan(table: pd.DataFrame) -> list[Plan]:
    # A name with a space is a variant made for a check inside of the run.
    table = table[~table["target"].astype(str).str.contains(" ")]
    error, index = "Hue error along the circle of shifts", "Prototype-reversion index by depth"
    shares = _of(table, "share_keep", "share_revert", "share_grey")
    answers = "The target's own accuracy when colours change"
    return [
        ("colour-response", error, _of(table, "hue_error_shown"), partial(response_curves, table)),
        ("colour-outcomes", "Kept, reverted, greyed out", shares, partial(outcome_bars, table)),
        ("colour-reversion", index, _of(table, "reversion_index"), partial(reversion_by_depth, table)),
        ("colour-accuracy", answers, _of(table, "top1", "ap50"), partial(accuracy_curves, table)),
    ]


def _efficiency_plan(table: pd.DataFrame) -> list[Plan]:
    plans: tuple[tuple[str, str, str, Callable[[pd.DataFrame], ShownFigure]], ...] = (
        ("efficiency", "Held-out PSNR against cost", "curve", efficiency_curves),
        ("efficiency-taps", "PSNR at every tap after the longest training", "curve", tap_scores),
        ("chain-errors", "Which module of the chain adds the error", "chain", chain_errors),
        ("data-size", "Images needed by each family", "data", data_size_curves),
        ("optimised", "Optimisation of single images against trained inverses", "per_image", cost_of_pictures),
        ("search", "The search for learning rates (validation split)", "search", search_curves),
    )
    parts = table["part"] if "part" in table else pd.Series("", index=table.index)
    return [(name, title, table[parts == part], partial(draw, table)) for name, title, part, draw in plans]


def _tradeoff_plan(table: pd.DataFrame) -> list[Plan]:
    depth, scores = ("psnr", "hue_error", "cka_to_start", "cross_psnr"), _of(table, "top1", "ap50")
    both, title = _of(table, "top1", "ap50", "psnr"), "What changes with t, by depth"
    return [
        ("tradeoff", "The task's score against PSNR", both, partial(score_against_psnr, table)),
        ("tradeoff-task", "The task's score by t", scores, partial(task_by_t, table)),
        ("tradeoff-depth", title, _of(table, *depth), partial(by_depth, table, depth)),
    ]


_PLANS: Mapping[str, Callable[[pd.DataFrame], list[Plan]]] = {
    QUALITY: _quality_plan,
    CROSS_LAYER: _cross_layer_plan,
    COLOUR: _colour_plan,
    EFFICIENCY: _efficiency_plan,
    TRADEOFF: _tradeoff_plan,
}


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


def _quality_of_targets(study: Study, say: Say) -> Iterator[StudyFigure]:
    yield from _pictures_by_target(study, say)
    plain = fullest_run(study.rows(QUALITY, list(COMPARED)))
    for dataset in _scenes_first(plain["dataset"].dropna()):
        rows = plain[plain["dataset"] == dataset]
        ending = "" if dataset == "scenes" else f"-{_file_name(dataset)}"
        title = f"Quality by depth, targets compared, on {dataset}"
        yield from _attempt(say, f"quality-targets{ending}", title, rows, partial(targets_by_depth, rows, COMPARED))
        psnr = _of(rows, "psnr")
        both, title = psnr["inverse"].isin(["modular", "direct"]), "The modular chain against direct decoders"
        name, draw = f"modular-against-direct{ending}", partial(modular_against_direct, psnr)
        yield from _attempt(say, name, f"{title}, on {dataset}", psnr[both], draw)
    factors = fullest_run(study.rows(QUALITY, "factor_score"))
    if factors.empty:
        say(f"No factor table: no run of {QUALITY} in {study.name} scored factors; run it on scenes.")
        return
    yield from _attempt(say, "factors", "What a probe reads, by factor", factors, partial(factor_heatmap, factors))
    yield from _attempt(say, "factor-curves", "Factors by depth, with nulls", factors, partial(factor_curves, factors))


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
    for dataset in _scenes_first(grids):
        pictures = {
            f"{target}, {grids[dataset][target][0]}": grids[dataset][target][1]
            for target in in_order(pd.Series(list(grids[dataset])))
        }
        ending = "" if dataset == "scenes" else f"-{_file_name(dataset)}"
        yield StudyFigure(
            f"reconstructions{ending}",
            f"Reconstructions by depth and target, on {dataset}",
            stacked_pictures(pictures, rows=1 if len(pictures) > 2 else 2),
            runs=tuple(runs[dataset]),
            note="Pictures of single images (n = 1 each), PSNR of each below it; the scores are in the curves.",
        )


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
