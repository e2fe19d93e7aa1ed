"""One page over the runs in a folder: pictures to play with first, then the numbers, then how they were made.

write_report(folder) reads every complete run below the folder and writes index.html (no request to anywhere but the
files beside it; with embed=True to nothing at all) and metrics.csv (the runs' tables in one, with a column `run`). A
folder with a table but without any record, as in the committed results/reference, is taken as it is. The figures of a
run bring their captions and say whether they show images or numbers (figures.ShownFigure); a figure belongs to the
target that its file's name or its run names. Every number of a table knows the lines it is made of (report_sources).
"""

import base64
import csv
import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from backsight.app.frames import FRAME_TABLE
from backsight.app.report_frames import read_play
from backsight.app.report_sources import LINE, CitedFile, Ledger, Source, Traced, read_lines, sources_of, with_lines
from backsight.errors import BacksightError
from backsight.plots.cards import card_scores
from backsight.plots.style import (
    INVERSE_NAMES,
    MEASURE_NAMES,
    PICTURES,
    depth_curves,
    family_colour,
    inverse_order,
    over_seeds,
    png_bytes,
    taps_in_order,
    target_colour,
)
from backsight.project import FINISHED, METRICS, STARTED, project_root, read_json, shown, write_atomically
from backsight.tables.read import notebook_of
from backsight.tables.values import METRIC_COLUMNS

PAGE = "index.html"
TEMPLATE = "report.html.jinja"
STYLE, SCRIPT = "report.css", "report.js"  # written into the page
DIFFERENCE_GAIN = 2  # of the difference of input and reconstruction: more would be white all over for deep layers
TARGETS = "01_targets"  # the notebook whose table holds the scores of the models themselves
# Tables are read from the first of these notebooks that measured a target; the rest stays in metrics.csv.
TABLE_NOTEBOOKS = ("03_quality", "02_train_inverse", "00_quickstart")
# Notebooks in the order in which their figures are shown, and what each is about.
STUDIES: Mapping[str, str] = {
    "00_quickstart": "Single pictures",
    "03_quality": "Shape and detail",
    "04_cross_layer": "Do layers speak the same code?",
    "05_colour": "Colour",
    "08_explorer": "Where the hue is lost",
    "06_modular_vs_direct": "Modular against direct inverses",
    "11_exact": "Lost, or only hidden?",
    "10_tradeoff": "Trained to be invertible",
    "02_train_inverse": "Training of the inverses",
    TARGETS: "Classes and training",
}
NULL_FAMILIES = ("modular", "linear", "direct")  # whose nulls a table shows: the first that is there
TABLE_MEASURES: Mapping[str, int] = {"psnr": 1, "psnr_objects": 1, "ssim": 3, "r2": 3}  # decimals
DATASET_ORDER = ("scenes", "photographs")
FAMILY_NOTES: Mapping[str, str] = {
    "linear": "the best linear map (ridge regression, closed form): what can be read off directly",
    "direct": "one trained decoder for each layer, straight to pixels: what a strong decoder can recover",
    "modular": "one small module for each stage of the model, chained back to the pixels: where in the model "
    "information is lost",
    "modular_polished": "the same chain after a short joint training on pixels",
    "null_mean": "the mean training image, whatever the input: what knowing nothing about this image scores",
    "null_shuffled": "an inverse fed with another image's representation: what its habits alone score",
    "null_untrained": "a linear inverse of the same model with random weights: what the architecture alone keeps",
}


@dataclass(frozen=True)
class ReportRun:
    """A run's folder as the page reads it. problem: why it is no complete run, or "" for a complete one."""

    folder: Path
    record: Mapping[str, Any]
    metrics: pd.DataFrame
    problem: str

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def notebook(self) -> str:
        return str(self.record.get("notebook", ""))

    @property
    def parameters(self) -> Mapping[str, Any]:
        return self.record.get("parameters") or {}

    @property
    def targets(self) -> list[str]:
        """The targets that the run was asked for or recorded weights of."""
        asked = self.parameters.get("targets", self.parameters.get("target", []))
        names = [asked] if isinstance(asked, str) else [str(name) for name in asked or []]
        return list(dict.fromkeys([*names, *(self.record.get("weights") or {})]))


@dataclass(frozen=True)
class Picture:
    """A figure of a run: where it lies, what it shows, and for which target ("" for none).

    source: what the page loads, the file's link or a data URI; table: the link of the run's metrics.csv, or "".
    """

    source: str
    link: str
    table: str
    width: int
    height: int
    title: str
    caption: str
    alt: str
    target: str
    colour: str
    shows_images: bool
    notebook: str


@dataclass(frozen=True)
class Cell(Traced):
    """One number of a table; share: 0 to 1, its place between the mean image and the best."""

    best: bool = False
    share: float | None = None


@dataclass(frozen=True)
class Column:
    title: str
    colour: str
    is_null: bool


@dataclass(frozen=True)
class Table:
    """A measure by depth (rows) and inverse (columns) of one target on one data set."""

    title: str
    measure: str
    facts: str
    columns: Sequence[Column]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    has_difference: bool


def write_report(folder: str | Path, embed: bool = False) -> Path:
    """Write index.html and metrics.csv over the runs in the sub-folders of `folder`; returns the page's path.

    embed: figures inside the page, which is then one file that can be sent; else they are loaded from the runs' folders
    beside it. Frames are inside in both cases. Runs that failed or never finished are listed as missing. Raises
    BacksightError where the folder does not exist or holds no complete run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BacksightError(f"{shown(folder)} is not a folder: give the folder that holds the runs.")
    runs = read_runs(folder)
    complete = [run for run in runs if not run.problem]
    if not complete:
        unfinished = f" (unfinished: {', '.join(run.name for run in runs)})" if runs else ""
        raise BacksightError(
            f"{shown(folder)} holds no complete run{unfinished}: run a notebook into a folder below it first."
        )
    metrics = collect_metrics(complete)
    page = render_page(folder, runs, metrics, embed)
    table = metrics.drop(columns=LINE, errors="ignore")
    try:
        write_atomically(folder / METRICS, lambda temporary: table.to_csv(temporary, index=False))
        return write_atomically(
            folder / PAGE, lambda temporary: temporary.write_text(page, encoding="utf-8", newline="\n")
        )
    except OSError as error:
        raise BacksightError(f"cannot write the page to {shown(folder)}: {error.strerror}.") from error


# ------------------------------------------------------------------------------------------------------ reading runs


def read_runs(folder: Path) -> list[ReportRun]:
    """The runs in the sub-folders, complete or not, in the order of their notebooks."""
    found = [
        read_run(place)
        for place in sorted(folder.iterdir())
        if place.is_dir() and not place.name.startswith(".") and _is_run(place)
    ]
    return sorted(found, key=lambda run: (run.notebook == "", run.notebook, run.name))


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (FINISHED, STARTED, METRICS, "log.txt")) or any(
        folder.glob("*.ipynb")
    )


def _has_no_record(folder: Path) -> bool:
    """Whether only results are there, as in the committed run: a table, and no trace of an unfinished run."""
    traces = (FINISHED, STARTED, "log.txt")
    return (folder / METRICS).exists() and not any((folder / name).exists() for name in traces)


def read_run(folder: Path) -> ReportRun:
    """One run: its record and its table. What hinders its use is told in `problem`, never raised."""
    finished = read_json(folder / FINISHED)
    record = finished or read_json(folder / STARTED) or {}
    nothing = pd.DataFrame(columns=list(METRIC_COLUMNS))
    if finished is None and not _has_no_record(folder):
        problem = "it was started and did not finish" if record else "it never started"
        if (folder / FINISHED).exists():
            problem = f"its {FINISHED} cannot be read"
        return ReportRun(folder, record, nothing, problem)
    if finished is not None and finished.get("status") != "complete":
        return ReportRun(folder, record, nothing, f"its status is {finished.get('status')!r}, not 'complete'")
    if not (folder / METRICS).exists():
        return ReportRun(folder, record, nothing, "")
    try:
        metrics = with_lines(pd.read_csv(folder / METRICS, low_memory=False), folder / METRICS)
    except (OSError, ValueError, csv.Error) as error:
        return ReportRun(folder, record, nothing, f"its {METRICS} cannot be read ({type(error).__name__})")
    if missing := [column for column in METRIC_COLUMNS if column not in metrics.columns]:
        return ReportRun(folder, record, nothing, f"its {METRICS} lacks the columns {', '.join(missing)}")
    if finished is None:
        record = _guessed_record(folder, metrics)
    return ReportRun(folder, record, metrics, "")


def _guessed_record(folder: Path, metrics: pd.DataFrame) -> dict[str, Any]:
    """What a table without a record tells: its notebook (study.notebook_of), targets and, where it is one, data set."""
    datasets = [str(name) for name in metrics["dataset"].dropna().unique()]
    parameters: dict[str, Any] = {"targets": [str(name) for name in metrics["target"].dropna().unique()]}
    if len(datasets) == 1:
        parameters["images"] = datasets[0]
    return {"notebook": notebook_of(folder.name, metrics), "parameters": parameters}


def collect_metrics(runs: Sequence[ReportRun]) -> pd.DataFrame:
    """The tables of all runs in one, METRIC_COLUMNS first, then what studies add, then LINE and `run`."""
    tables = [run.metrics.assign(run=run.name) for run in runs if len(run.metrics)]
    if not tables:
        return pd.DataFrame(columns=[*METRIC_COLUMNS, "run"])
    table = pd.concat(tables, ignore_index=True)
    added = [column for column in table.columns if column not in METRIC_COLUMNS and column != "run"]
    return table[[*METRIC_COLUMNS, *added, "run"]]


def read_pictures(run: ReportRun, page_folder: Path, targets: Sequence[str] = (), embed: bool = False) -> list[Picture]:
    """The figures of a run with the captions that they carry (figures.ShownFigure); what is no PNG is left out.

    targets: those of the page, whose own figures are not taken from 07_figures, which draws them again; embed: with
    their pixels, not with a link to them.
    """
    from PIL import Image

    pictures = []
    for path in sorted((run.folder / "figures").glob("*.png")):
        if _is_elsewhere(run, path.stem, targets):
            continue
        data = path.read_bytes()
        try:
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                width, height = image.size
                told = {key: str(image.info.get(key, "")) for key in ("Title", "Description", "Comment")}
        except OSError:
            continue
        named = [target for target in run.targets if target in path.stem]
        target = named[0] if named else run.targets[0] if len(run.targets) == 1 else ""
        title = _title(run, path.stem.replace(target, "") if target else path.stem)
        alt = told["Description"] or f"{title}{f' of {target}' if target else ''} (run {run.name})."
        pictures.append(
            Picture(
                source=_embedded(data) if embed else _link(path, page_folder),
                link=_link(path, page_folder),
                table=_link(run.folder / METRICS, page_folder) if len(run.metrics) else "",
                width=width,
                height=height,
                title=title,
                caption=told["Title"],
                alt=alt,
                target=target,
                colour=target_colour(target),
                shows_images=told["Comment"] == PICTURES,
                notebook=run.notebook,
            )
        )
    return pictures


def _is_elsewhere(run: ReportRun, stem: str, targets: Sequence[str]) -> bool:
    """Whether the page shows this figure in another place: 07_figures draws those of single targets again, and the
    pictures of a training are those of the quality of its inverses."""
    if run.notebook == "07_figures":
        return stem.startswith("pictures") or any(target in stem for target in targets)
    return run.notebook == "02_train_inverse" and stem.startswith("pictures")


def _title(run: ReportRun, stem: str) -> str:
    """A figure's name in words: its file's name without the target, and the images that the run is about."""
    words = re.sub(r"[-_\s]+", " ", stem).strip()
    for written, proper in (("psnr", "PSNR"), ("ssim", "SSIM"), ("r2", "R²")):
        words = re.sub(rf"\b{written}\b", proper, words)
    images = run.parameters.get("images") or run.parameters.get("photograph") or ""
    title = ", ".join(part for part in (words, Path(str(images)).name) if part) or run.name
    return title[0].upper() + title[1:]


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _link(path: Path, page_folder: Path) -> str:
    return quote(path.relative_to(page_folder).as_posix())


# ------------------------------------------------------------------------------------------------------------ tables


@dataclass(frozen=True)
class Group:
    """What one table or glance is made of: the depth rows of one target on one data set and split."""

    target: str
    weights: str
    dataset: str
    split: str
    rows: pd.DataFrame


def depth_groups(metrics: pd.DataFrame, notebooks: Mapping[str, str], target: str) -> list[Group]:
    """The rows of a target that have a tap, by weights, data set and split; test splits and scenes first.

    notebooks: {run: notebook}. Only rows of the first of TABLE_NOTEBOOKS that measured this target are taken. Where
    two runs give the same number of the same seed, the run that comes last by name counts.
    """
    rows = metrics[
        (metrics["target"] == target) & metrics["tap"].notna() & metrics["measure"].isin(list(TABLE_MEASURES))
    ]
    made_by = rows["run"].map(notebooks)
    chosen = next((name for name in TABLE_NOTEBOOKS if (made_by == name).any()), None)
    if chosen is None:
        return []
    rows = one_null_each(rows[made_by == chosen])
    names = ["weights", "dataset", "split"]
    rows[names] = rows[names].astype(object).fillna("unnamed").astype(str)
    rows = rows.sort_values("run", kind="stable")
    rows = rows.drop_duplicates([*names, "tap", "inverse", "measure", "seed"], keep="last")
    keys = rows[names].drop_duplicates().itertuples(index=False, name=None)
    groups = [
        Group(target, weights, dataset, split, rows[(rows[names] == [weights, dataset, split]).all(axis=1)])
        for weights, dataset, split in keys
    ]
    return sorted(groups, key=lambda g: (g.split != "test", _dataset_rank(g.dataset), g.dataset, g.weights))


def one_null_each(rows: pd.DataFrame) -> pd.DataFrame:
    """A copy with the nulls of one inverse family, the first of NULL_FAMILIES that has them, where several have."""
    if "family" not in rows:
        return rows.copy()
    families = rows["family"].where(rows["inverse"].map(_is_null))
    rank = families.map({family: place for place, family in enumerate(NULL_FAMILIES)}).fillna(len(NULL_FAMILIES))
    keys = [rows[name] for name in ("weights", "dataset", "split", "tap", "inverse", "measure")]
    least = rank.groupby(keys, dropna=False).transform("min")
    return rows[families.isna() | (rank == least)].copy()


def _dataset_rank(dataset: str) -> int:
    return DATASET_ORDER.index(dataset) if dataset in DATASET_ORDER else len(DATASET_ORDER)


def depth_tables(group: Group) -> list[Table]:
    """One table for each measure that the group has."""
    return [
        _depth_table(group, measure, rows)
        for measure in TABLE_MEASURES
        if len(rows := group.rows[group.rows["measure"] == measure])
    ]


def _sources_by_cell(rows: pd.DataFrame) -> dict[tuple[str, str], tuple[Source, ...]]:
    """{(tap, inverse): the places that `_numbers` averages}."""
    groups = rows.groupby([rows["tap"].astype(str), rows["inverse"].astype(str)], sort=False)
    return {(str(tap), str(inverse)): sources_of(part) for (tap, inverse), part in groups}


def _numbers(rows: pd.DataFrame) -> dict[tuple[str, str], tuple[float, float, float]]:
    """{(tap, inverse): (value, low, high)} over seeds, of rows of one measure."""
    table = over_seeds(rows)
    keys = zip(table["tap"].astype(str), table["inverse"].astype(str), strict=True)
    return dict(zip(keys, table[["value", "low", "high"]].itertuples(index=False, name=None), strict=True))


def _is_null(inverse: str) -> bool:
    return inverse.startswith("null_")


def _depth_table(group: Group, measure: str, rows: pd.DataFrame) -> Table:
    decimals = TABLE_MEASURES[measure]
    inverses = inverse_order(list(rows["inverse"]))
    families = [name for name in inverses if not _is_null(name)]
    nulls = [name for name in inverses if _is_null(name)]
    numbers = _numbers(rows)
    sources = _sources_by_cell(rows)
    values = {key: number[0] for key, number in numbers.items() if not math.isnan(number[0])}
    floor = min((v for (_, name), v in values.items() if name == "null_mean"), default=0.0)
    ceiling = max((v for (_, name), v in values.items() if name in families), default=floor)
    has_difference = measure.startswith("psnr") and {"modular", "direct"} <= set(families)

    def cell(tap: str, inverse: str) -> Cell:
        if (tap, inverse) not in values:
            return Cell("–")
        value, low, high = numbers[tap, inverse]
        interval = "" if math.isnan(low) else f"{_number(low, decimals)} to {_number(high, decimals)}"
        text, places = _number(value, decimals), sources[tap, inverse]
        if inverse in nulls:
            return Cell(text, interval, places)
        best = max(values[tap, name] for name in families if (tap, name) in values)
        share = min(max((value - floor) / (ceiling - floor), 0.0), 1.0) if ceiling > floor else None
        is_best = len(families) > 1 and round(value, decimals) == round(best, decimals)
        return Cell(text, interval, places, best=is_best, share=share)

    def difference(tap: str) -> Cell:
        if (tap, "modular") not in values or (tap, "direct") not in values:
            return Cell("–")
        return Cell(
            _number(values[tap, "modular"] - values[tap, "direct"], decimals, sign=True),
            sources=sources[tap, "modular"],
            minus=sources[tap, "direct"],
        )

    columns = [Column(INVERSE_NAMES.get(name, name), family_colour(name), False) for name in families]
    columns += [Column("chain minus direct (dB)", "", False)] if has_difference else []
    columns += [Column(INVERSE_NAMES.get(name, name).removeprefix("null: "), "", True) for name in nulls]
    body = []
    for tap in taps_in_order(rows):
        middle = [difference(tap)] if has_difference else []
        body.append((tap, [*(cell(tap, f) for f in families), *middle, *(cell(tap, null) for null in nulls)]))
    title = MEASURE_NAMES.get(measure, measure)
    return Table(title, measure, _facts(group, rows), columns, body, has_difference)


def _facts(group: Group, rows: pd.DataFrame) -> str:
    images = "image" if rows["n"].max() == 1 else "images"
    if "seeds" in rows and rows["seeds"].notna().any():
        seeds = _plural(int(rows["seeds"].max()), "training seed")
    else:
        each = sorted(int(seed) for seed in rows["seed"].dropna().unique())
        seeds = f"{_plural(len(each), 'seed')} ({', '.join(map(str, each))})"
    return (
        f"n = {_span(rows['n'])} {images}, {seeds}, "
        f"data set {group.dataset}, split {group.split}, {group.weights} weights"
    )


def _span(numbers: pd.Series) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _number(value: float, decimals: int, sign: bool = False) -> str:
    value = round(float(value), decimals) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{value:{'+' if sign and value else ''}.{decimals}f}".replace("-", "−")


@dataclass(frozen=True)
class Glance:
    """The best family's PSNR of one target at its first and last tap, and the tap step that costs most of it."""

    target: str
    colour: str
    data: str
    first: str
    first_value: Traced
    last: str
    last_value: Traced
    last_family: str
    step: str
    step_value: Traced
    mean_image: Traced


def glance(group: Group) -> Glance | None:
    """What a newcomer should know of a target first, in numbers; None without any PSNR."""
    rows = group.rows[group.rows["measure"] == "psnr"]
    numbers = _numbers(rows)
    best: dict[str, tuple[float, str]] = {}
    for tap in taps_in_order(rows):
        found = [(numbers[tap, f][0], f) for t, f in numbers if t == tap and not _is_null(f)]
        if found := [(value, family) for value, family in found if not math.isnan(value)]:
            best[tap] = max(found)
    if not best:
        return None
    taps = list(best)
    sources = _sources_by_cell(rows)
    places = {tap: sources[tap, family] for tap, (_, family) in best.items()}
    steps = [(best[after][0] - best[before][0], before, after) for before, after in pairwise(taps)]
    step, step_value = "–", Traced("")
    if steps:
        change, before, after = min(steps)
        step = f"{before} → {after}"
        step_value = Traced(_number(change, 1, sign=True), sources=places[after], minus=places[before])
    means = rows[(rows["inverse"] == "null_mean") & rows["value"].notna()]
    return Glance(
        target=group.target,
        colour=target_colour(group.target),
        data=f"{group.dataset}, {group.split}",
        first=taps[0],
        first_value=Traced(_number(best[taps[0]][0], 1), sources=places[taps[0]]),
        last=taps[-1],
        last_value=Traced(_number(best[taps[-1]][0], 1), sources=places[taps[-1]]),
        last_family=INVERSE_NAMES.get(best[taps[-1]][1], best[taps[-1]][1]),
        step=step,
        step_value=step_value,
        mean_image=Traced(_number(means["value"].mean(), 1), sources=sources_of(means)) if len(means) else Traced("–"),
    )


# ------------------------------------------------------------------------------------------------------- model cards


def read_card(target: str) -> dict[str, Any] | None:
    """data/weights/<target>/card.json of the project around us, or None."""
    try:
        folder = project_root() / "data" / "weights" / target
    except BacksightError:
        return None
    return read_json(folder / "card.json")


CARD_COLUMNS = ("rule", "measure", "classes", "value", "low", "high", "n")


def measured_scores(runs: Sequence[ReportRun], target: str) -> pd.DataFrame | None:
    """The rows in which the last run of 01_targets scored the target itself; None where none did."""
    for run in reversed(runs):
        if run.notebook == TARGETS and {"rule", "classes"} <= set(run.metrics.columns):
            rows = run.metrics[(run.metrics["target"] == target) & run.metrics["rule"].notna()]
            if len(rows):
                return rows.assign(run=run.name)
    return None


def card_name(target: str) -> str:
    return f"data/weights/{target}/card.json"


def card_tables(card: Mapping[str, Any], target: str, measured: pd.DataFrame | None = None) -> dict[str, Any] | None:
    """The scores of a model itself as rows (classes, measure, typical hue, any hue): all classes, and class by class.

    measured: the rows of a run (measured_scores); without them the scores of the model's card.
    """
    if measured is None:
        try:
            scores = card_scores(card)
        except BacksightError:
            return None
        places: list[tuple[Source, ...]] = [(Source(card_name(target), place),) for place in range(1, len(scores) + 1)]
    else:
        scores = measured
        places = [(source,) for source in sources_of(scores)]
        if len(places) != len(scores):
            places = [()] * len(scores)
    scores = scores.reset_index(drop=True)
    overall: list[dict[str, Any]] = []
    single: list[dict[str, Any]] = []
    for (classes, measure), part in scores.groupby(["classes", "measure"], sort=False):
        row: dict[str, Any] = {"classes": str(classes), "measure": MEASURE_NAMES.get(str(measure), str(measure))}
        for rule in ("mixed", "uniform"):
            found = part[part["rule"] == rule]
            row[rule] = Traced("–")
            if len(found) and pd.notna(found.iloc[0]["value"]):
                score = found.iloc[0]
                interval = ""
                if pd.notna(score["low"]):
                    interval = f"{_number(score['low'], 3)} to {_number(score['high'], 3)}"
                row[rule] = Traced(_number(score["value"], 3), interval, places[int(found.index[0])])
        (overall if classes in ("all", "canonical", "colour-free") else single).append(row)
    names = {"all": "all classes", "canonical": "classes with a typical hue", "colour-free": "colour-free classes"}
    overall = [row | {"classes": names[row["classes"]]} for row in overall]
    counts = scores.loc[scores["classes"] == "all", "n"].dropna()
    return {"overall": overall, "single": single, "n": _span(counts) if len(counts) else "unknown"}


def cited_files(runs: Sequence[ReportRun], cards: Mapping[str, Mapping[str, Any]], page_folder: Path) -> Ledger:
    """The ledger of all files that a number of the page can come from. cards: {target: card}."""
    files: dict[str, CitedFile] = {}
    for run in runs:
        for name in (METRICS, FRAME_TABLE):
            if (run.folder / name).is_file():
                columns, rows = read_lines(run.folder / name)
                link = _link(run.folder / name, page_folder)
                files[f"{run.name}/{name}"] = CitedFile(f"{run.name}/{name}", link, "line", columns, rows)
    for target, card in cards.items():
        entries = {
            place: [str(score.get(column, "")) for column in CARD_COLUMNS]
            for place, score in enumerate(card.get("scores") or [], start=1)
        }
        name = card_name(target)
        files[name] = CitedFile(name, _card_link(target, page_folder), "entry", CARD_COLUMNS, entries)
    return Ledger(files)


def _card_link(target: str, page_folder: Path) -> str:
    """The card as seen from a page inside the project; "" from one outside, which may be moved without the project."""
    try:
        root = project_root().resolve()
        page_folder.resolve().relative_to(root)
    except (BacksightError, ValueError):
        return ""
    card = root / card_name(target)
    return quote(Path(os.path.relpath(card, page_folder.resolve())).as_posix()) if card.is_file() else ""


def card_facts(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the card says about the training, as far as it says it."""
    facts = []
    if parameters := card.get("parameters"):
        facts.append(("size", f"{parameters / 1e6:.2f} million parameters"))
    if data := card.get("data"):
        facts.append(("trained on", f"{data.get('dataset')}, split {data.get('split')}"))
    if recipe := card.get("recipe"):
        asked = [f"{recipe['steps']:,} steps"] if recipe.get("steps") else []
        facts.append(("training", ", ".join([*asked, f"seed {recipe.get('seed')}"])))
    if minutes := card.get("minutes"):
        facts.append(("minutes", ", ".join(f"{name} {value}" for name, value in minutes.items())))
    return facts


# -------------------------------------------------------------------------------------------------------- run facts


def run_facts(run: ReportRun, page_folder: Path) -> dict[str, Any]:
    """What the table of runs says about one run."""
    seconds = dict(run.record.get("seconds") or {})
    total = seconds.pop("total", None)
    commit = run.record.get("commit")
    return {
        "name": run.name,
        "notebook": run.notebook or "unknown notebook",
        "problem": run.problem,
        "notebooks": [(path.name, _link(path, page_folder)) for path in sorted(run.folder.glob("*.ipynb"))],
        "tables": [
            (path.name, _link(path, page_folder))
            for path in sorted([*run.folder.glob("*.csv"), *run.folder.glob("*.md")])
            if not path.name.startswith(".")
        ],
        "seed": run.record.get("seed", "–"),
        "seconds": "–" if total is None else _duration(total),
        "record": _link(run.folder / FINISHED, page_folder) if (run.folder / FINISHED).exists() else "",
        "phases": [(name, _duration(value)) for name, value in seconds.items()],
        "started": str(run.record.get("started", "no record kept")).replace("T", " ").replace("+00:00", " UTC"),
        "commit": f"{str(commit)[:10]}{' + changes' if run.record.get('modified') else ''}" if commit else "none",
        "hardware": _hardware(run.record.get("hardware") or {}),
    }


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _hardware(hardware: Mapping[str, Any]) -> str:
    parts = [str(hardware.get(key)) for key in ("gpu", "processor", "system") if hardware.get(key)]
    if cores := hardware.get("cores"):
        parts.append(_plural(cores, "core"))
    if memory := hardware.get("memory_gib"):
        parts.append(f"{memory:.0f} GiB")
    return ", ".join(parts) or "unknown"


def _versions(runs: Iterable[ReportRun]) -> list[tuple[str, str]]:
    """(package, its versions in these runs); more than one version shows as such."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for package, version in (run.record.get("versions") or {}).items():
            if version not in found.setdefault(package, []):
                found[package].append(version)
    return [(package, ", ".join(versions)) for package, versions in found.items()]


# ---------------------------------------------------------------------------------------------------------- the page


def render_page(folder: Path, runs: Sequence[ReportRun], metrics: pd.DataFrame, embed: bool = False) -> str:
    """The page's HTML; the same runs give the same text. embed: as write_report."""
    from jinja2 import Environment, StrictUndefined

    complete = [run for run in runs if not run.problem]
    notebooks = {run.name: run.notebook for run in complete}
    names = _target_order(complete, metrics)
    cards = {name: card for name in names if (card := read_card(name))}
    ledger = cited_files(complete, cards, folder)
    pictures = [each for run in _by_picture_order(complete) for each in read_pictures(run, folder, names, embed)]
    play, unplayable = read_play([run.folder for run in complete])
    hero = [] if play else list(_hero(pictures, names))
    groups = {name: depth_groups(metrics, notebooks, name) for name in names}
    targets = [
        _target_section(name, complete, pictures, groups[name], hero, cards.get(name, {}), folder) for name in names
    ]
    shown_groups = [group for name in names for group in groups[name][:1]]
    used = inverse_order([inverse for name in names for group in groups[name] for inverse in group.rows["inverse"]])
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    package = files("backsight")
    template = environment.from_string((package / TEMPLATE).read_text(encoding="utf-8"))
    known = [run_facts(run, folder) for run in complete]
    return template.render(
        name=folder.resolve().name,
        rebuilt=_listed([name for name in names if groups[name] or (play and name in play.target_names)]),
        style=(package / STYLE).read_text(encoding="utf-8"),
        script=(package / SCRIPT).read_text(encoding="utf-8"),
        embed=embed,
        ledger=ledger,
        play=play,
        gain=DIFFERENCE_GAIN,
        unplayable=unplayable,
        hero=hero,
        targets=targets,
        glances=[found for group in shown_groups if (found := glance(group))],
        curves=_curves(shown_groups),
        inverses=[
            {
                "title": INVERSE_NAMES.get(name, name),
                "colour": family_colour(name),
                "is_null": _is_null(name),
                "note": FAMILY_NOTES.get(name, ""),
            }
            for name in used
        ],
        others=[picture for picture in pictures if picture.target not in names and picture not in hero],
        runs=known,
        hardware=[told for told in dict.fromkeys(run["hardware"] for run in known) if told != "unknown"],
        missing=[run_facts(run, folder) for run in runs if run.problem],
        versions=_versions(complete),
        metrics_file=METRICS,
        metrics_rows=len(metrics),
    )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def _by_picture_order(runs: Sequence[ReportRun]) -> list[ReportRun]:
    order = list(STUDIES)

    def rank(run: ReportRun) -> tuple[int, int, str]:
        known = run.notebook in order
        images = str(run.parameters.get("images", ""))
        return order.index(run.notebook) if known else len(order), _dataset_rank(images), run.name

    return sorted(runs, key=rank)


def _target_order(runs: Sequence[ReportRun], metrics: pd.DataFrame) -> list[str]:
    """Targets in the order in which the runs name them (the quickstart names them all), then by name."""
    measured = sorted(str(name) for name in metrics["target"].dropna().unique())
    return list(dict.fromkeys([*(name for run in runs for name in run.targets), *measured]))


def _hero(pictures: Sequence[Picture], names: Sequence[str]) -> Iterator[Picture]:
    """The first picture of every target, else the first that belongs to none."""
    firsts = [next((p for p in pictures if p.shows_images and p.target == name), None) for name in names]
    found = [picture for picture in firsts if picture is not None]
    yield from found or [p for p in pictures if p.shows_images][:1]


def _target_section(
    name: str,
    runs: Sequence[ReportRun],
    pictures: Sequence[Picture],
    groups: Sequence[Group],
    hero: Sequence[Picture],
    card: Mapping[str, Any],
    page_folder: Path,
) -> dict[str, Any]:
    own = [picture for picture in pictures if picture.target == name and picture not in hero]
    notebooks = list(dict.fromkeys(picture.notebook for picture in own))
    weights: Mapping[str, Any] = next((w[name] for run in runs if name in (w := run.record.get("weights") or {})), {})
    measured = measured_scores(runs, name)
    return {
        "name": name,
        "anchor": "target-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "colour": target_colour(name),
        "facts": [*_weight_facts(weights), *card_facts(card)],
        "studies": [
            (STUDIES.get(notebook, notebook), [picture for picture in own if picture.notebook == notebook])
            for notebook in notebooks
        ],
        "groups": [(f"{group.dataset}, {group.split}", depth_tables(group)) for group in groups],
        "card": card_tables(card, name, measured),
        "card_link": _card_link(name, page_folder) if card else "",
    }


def _weight_facts(weights: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, str(weights[key])) for name, key in (("weights", "weights"), ("hash", "hash")) if key in weights]


def _curves(groups: Sequence[Group]) -> dict[str, Any] | None:
    """PSNR by depth of all targets in one figure, embedded; None without PSNR."""
    rows = [group.rows[group.rows["measure"] == "psnr"] for group in groups]
    rows = [part for part in rows if len(part)]
    if not rows:
        return None
    figure = depth_curves(pd.concat(rows, ignore_index=True), "psnr")
    width, height = figure.get_size_inches() * 200
    return {
        "source": _embedded(png_bytes(figure, dpi=200)),
        "width": round(width),
        "height": round(height),
        "caption": figure.caption,
        "alt": figure.description,
    }
