"""One page over the runs in a folder: pictures to play with first, then the numbers, then how they were made.

write_report(folder) reads every complete run below the folder and writes index.html (no request to anywhere but the
files beside it) and metrics.csv (the runs' tables in one, with a column `run`). A folder with a table but without any
record, as in the committed results/reference, is taken as it is. The figures of a run bring their captions and say
whether they show images or numbers (plots.style.ShownFigure); a figure belongs to the target that its file's name or
its run names. Every number of a table knows the lines it is made of (report_sources).
"""

import base64
import csv
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from backsight.app.frames import FRAME_TABLE
from backsight.app.report_frames import read_play
from backsight.app.report_sources import LINE, CitedFile, Ledger, listed, read_lines
from backsight.app.report_tables import (
    CARD_COLUMNS,
    Group,
    card_facts,
    card_name,
    card_tables,
    dataset_rank,
    depth_groups,
    depth_tables,
    glance,
    is_null,
    plural,
)
from backsight.errors import BacksightError
from backsight.plots.style import (
    INVERSE_NAMES,
    PICTURES,
    depth_curves,
    family_colour,
    inverse_order,
    png_bytes,
    target_colour,
)
from backsight.project import FINISHED, METRICS, STARTED, project_root, read_json, shown, write_atomically
from backsight.tables.read import notebook_of, read_metrics, write_text
from backsight.tables.values import METRIC_COLUMNS

PAGE = "index.html"
TEMPLATE = "report.html.jinja"
STYLE, SCRIPT = "report.css", "report.js"  # written into the page
DIFFERENCE_GAIN = 2  # of the difference of input and reconstruction: more would be white all over for deep layers
TARGETS = "01_targets"  # the notebook whose table holds the scores of the models themselves
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
    """A figure of a run: what it shows, and for which target ("" for none); table: link of its metrics.csv, or ""."""

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


def write_report(folder: str | Path) -> Path:
    """Write index.html and metrics.csv over the runs in the sub-folders of `folder`; returns the page's path.

    Figures are loaded from the runs' folders beside the page, frames are inside it. Runs that failed or never finished
    are listed as missing. Raises BacksightError where the folder does not exist or holds no complete run.
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
    metrics = _collected(complete)
    page = _rendered(folder, runs, metrics)
    table = metrics.drop(columns=LINE, errors="ignore")
    try:
        write_atomically(folder / METRICS, lambda temporary: table.to_csv(temporary, index=False))
        return write_text(folder / PAGE, page)
    except OSError as error:
        raise BacksightError(f"cannot write the page to {shown(folder)}: {error.strerror}.") from error


# ------------------------------------------------------------------------------------------------------ reading runs


def read_runs(folder: Path) -> list[ReportRun]:
    """The runs in the sub-folders, complete or not, in the order of their notebooks."""
    places = [place for place in sorted(folder.iterdir()) if place.is_dir() and not place.name.startswith(".")]
    traces = (FINISHED, STARTED, METRICS, "log.txt")
    runs = [
        _read_run(place)
        for place in places
        if any((place / name).exists() for name in traces) or any(place.glob("*.ipynb"))
    ]
    return sorted(runs, key=lambda run: (run.notebook == "", run.notebook, run.name))


def _read_run(folder: Path) -> ReportRun:
    """One run: its record and its table. What hinders its use is told in `problem`, never raised."""
    finished = read_json(folder / FINISHED)
    record = finished or read_json(folder / STARTED) or {}
    metrics, problem = None, ""
    # Only results, as in the committed run: a table, and no trace of an unfinished run.
    bare = (folder / METRICS).exists() and not any((folder / name).exists() for name in (FINISHED, STARTED, "log.txt"))
    if finished is None and not bare:
        problem = "it was started and did not finish" if record else "it never started"
        if (folder / FINISHED).exists():
            problem = f"its {FINISHED} cannot be read"
    elif finished is not None and finished.get("status") != "complete":
        problem = f"its status is {finished.get('status')!r}, not 'complete'"
    elif (folder / METRICS).exists():
        metrics, problem = read_metrics(folder)
    if metrics is not None:
        try:
            metrics = metrics.assign(**{LINE: list(read_lines(folder / METRICS)[1])})
        except (ValueError, csv.Error) as error:  # lines and rows that do not agree
            metrics, problem = None, f"its {METRICS} cannot be read ({type(error).__name__})"
    if metrics is None:
        metrics = pd.DataFrame(columns=list(METRIC_COLUMNS))
    elif finished is None:
        record = _guessed_record(folder, metrics)
    return ReportRun(folder, record, metrics, problem)


def _guessed_record(folder: Path, metrics: pd.DataFrame) -> dict[str, Any]:
    """What a table without a record tells: its notebook (read.notebook_of), targets and, where it is one, data set."""
    datasets = [str(name) for name in metrics["dataset"].dropna().unique()]
    parameters: dict[str, Any] = {"targets": [str(name) for name in metrics["target"].dropna().unique()]}
    if len(datasets) == 1:
        parameters["images"] = datasets[0]
    return {"notebook": notebook_of(folder.name, metrics), "parameters": parameters}


def _collected(runs: Sequence[ReportRun]) -> pd.DataFrame:
    """The tables of all runs in one, METRIC_COLUMNS first, then what studies add, then LINE and `run`."""
    tables = [run.metrics.assign(run=run.name) for run in runs if len(run.metrics)]
    if not tables:
        return pd.DataFrame(columns=[*METRIC_COLUMNS, "run"])
    table = pd.concat(tables, ignore_index=True)
    added = [column for column in table.columns if column not in METRIC_COLUMNS and column != "run"]
    return table[[*METRIC_COLUMNS, *added, "run"]]


def _read_pictures(run: ReportRun, page_folder: Path, targets: Sequence[str]) -> list[Picture]:
    """The figures of a run with the captions that they carry; what is no PNG is left out.

    targets: those of the page, whose own figures are not taken from 07_figures, which draws them again.
    """
    from PIL import Image

    pictures = []
    for path in sorted((run.folder / "figures").glob("*.png")):
        if _is_elsewhere(run, path.stem, targets):
            continue
        try:
            with Image.open(path, formats=("PNG",)) as image:
                width, height = image.size
                told = {key: str(image.info.get(key, "")) for key in ("Title", "Description", "Comment")}
        except OSError:
            continue
        named = [target for target in run.targets if target in path.stem]
        target = named[0] if named else run.targets[0] if len(run.targets) == 1 else ""
        title = _title(run, path.stem.replace(target, "") if target else path.stem)
        pictures.append(
            Picture(
                link=_link(path, page_folder),
                table=_link(run.folder / METRICS, page_folder) if len(run.metrics) else "",
                width=width,
                height=height,
                title=title,
                caption=told["Title"],
                alt=told["Description"] or f"{title}{f' of {target}' if target else ''} (run {run.name}).",
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
    for word, proper in (("psnr", "PSNR"), ("ssim", "SSIM"), ("r2", "R²")):
        words = re.sub(rf"\b{word}\b", proper, words)
    images = run.parameters.get("images") or run.parameters.get("photograph") or ""
    title = ", ".join(part for part in (words, Path(str(images)).name) if part) or run.name
    return title[0].upper() + title[1:]


def _link(path: Path, page_folder: Path) -> str:
    return quote(path.relative_to(page_folder).as_posix())


def _cited_files(runs: Sequence[ReportRun], cards: Mapping[str, Mapping[str, Any]], page_folder: Path) -> Ledger:
    """The ledger of all files that a number of the page can come from. cards: {target: card}."""
    cited: dict[str, CitedFile] = {}
    for run in runs:
        for name in (METRICS, FRAME_TABLE):
            if (run.folder / name).is_file():
                columns, rows = read_lines(run.folder / name)
                cited[f"{run.name}/{name}"] = CitedFile(_link(run.folder / name, page_folder), "line", columns, rows)
    for target, card in cards.items():
        entries = {
            place: [str(score.get(column, "")) for column in CARD_COLUMNS]
            for place, score in enumerate(card.get("scores") or [], start=1)
        }
        cited[card_name(target)] = CitedFile(_card_link(target, page_folder), "entry", CARD_COLUMNS, entries)
    return Ledger(cited)


def _read_card(target: str) -> dict[str, Any] | None:
    """data/weights/<target>/card.json of the project around us, or None."""
    try:
        return read_json(project_root() / card_name(target))
    except BacksightError:
        return None


def _card_link(target: str, page_folder: Path) -> str:
    """The card as seen from a page inside the project; "" from one outside, which may be moved without the project."""
    try:
        root = project_root().resolve()
        page_folder.resolve().relative_to(root)
    except (BacksightError, ValueError):
        return ""
    card = root / card_name(target)
    return quote(Path(os.path.relpath(card, page_folder.resolve())).as_posix()) if card.is_file() else ""


def _measured_scores(runs: Sequence[ReportRun], target: str) -> pd.DataFrame | None:
    """The rows in which the last run of 01_targets scored the target itself; None where none did."""
    for run in reversed(runs):
        if run.notebook == TARGETS and {"rule", "classes"} <= set(run.metrics.columns):
            rows = run.metrics[(run.metrics["target"] == target) & run.metrics["rule"].notna()]
            if len(rows):
                return rows.assign(run=run.name)
    return None


# -------------------------------------------------------------------------------------------------------- run facts


def _run_facts(run: ReportRun, page_folder: Path) -> dict[str, Any]:
    """What the table of runs says about one run."""
    seconds = dict(run.record.get("seconds") or {})
    total = seconds.pop("total", None)
    commit = run.record.get("commit")
    tables = [*run.folder.glob("*.csv"), *run.folder.glob("*.md")]
    return {
        "name": run.name,
        "notebook": run.notebook or "unknown notebook",
        "problem": run.problem,
        "notebooks": [(path.name, _link(path, page_folder)) for path in sorted(run.folder.glob("*.ipynb"))],
        "tables": [(path.name, _link(path, page_folder)) for path in sorted(tables) if not path.name.startswith(".")],
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
        parts.append(plural(cores, "core"))
    if memory := hardware.get("memory_gib"):
        parts.append(f"{memory:.0f} GiB")
    return ", ".join(parts) or "unknown"


def _versions(runs: Iterable[ReportRun]) -> list[tuple[str, str]]:
    """(package, its versions in these runs); more than one version shows as such."""
    versions: dict[str, dict[str, None]] = {}
    for run in runs:
        for package, version in (run.record.get("versions") or {}).items():
            versions.setdefault(package, {})[version] = None
    return [(package, ", ".join(known)) for package, known in versions.items()]


# ---------------------------------------------------------------------------------------------------------- the page


def _rendered(folder: Path, runs: Sequence[ReportRun], metrics: pd.DataFrame) -> str:
    """The page's HTML; the same runs give the same text."""
    from jinja2 import Environment, StrictUndefined

    complete = [run for run in runs if not run.problem]
    notebooks = {run.name: run.notebook for run in complete}
    # Targets in the order in which the runs name them (the quickstart names them all), then by name.
    measured = sorted(str(name) for name in metrics["target"].dropna().unique())
    names = list(dict.fromkeys([*(name for run in complete for name in run.targets), *measured]))
    cards = {name: card for name in names if (card := _read_card(name))}
    pictures = [picture for run in _by_picture_order(complete) for picture in _read_pictures(run, folder, names)]
    play, unplayable = read_play([run.folder for run in complete])
    hero = [] if play else _hero(pictures, names)
    groups = {name: depth_groups(metrics, notebooks, name) for name in names}
    targets = [
        _target_section(name, complete, pictures, groups[name], hero, cards.get(name, {}), folder) for name in names
    ]
    shown_groups = [group for name in names for group in groups[name][:1]]
    used = inverse_order([inverse for name in names for group in groups[name] for inverse in group.rows["inverse"]])
    known = [_run_facts(run, folder) for run in complete]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style, script, template = (
        (files("backsight.app") / name).read_text(encoding="utf-8") for name in (STYLE, SCRIPT, TEMPLATE)
    )
    return environment.from_string(template).render(
        name=folder.resolve().name,
        rebuilt=listed([name for name in names if groups[name] or (play and name in play.targets)]),
        style=style,
        script=script,
        ledger=_cited_files(complete, cards, folder),
        play=play,
        gain=DIFFERENCE_GAIN,
        unplayable=unplayable,
        hero=hero,
        targets=targets,
        glances=[row for group in shown_groups if (row := glance(group))],
        curves=_curves(shown_groups),
        inverses=[
            {
                "title": INVERSE_NAMES.get(name, name),
                "colour": family_colour(name),
                "is_null": is_null(name),
                "note": FAMILY_NOTES.get(name, ""),
            }
            for name in used
        ],
        others=[picture for picture in pictures if picture.target not in names and picture not in hero],
        runs=known,
        hardware=[told for told in dict.fromkeys(run["hardware"] for run in known) if told != "unknown"],
        missing=[_run_facts(run, folder) for run in runs if run.problem],
        versions=_versions(complete),
        metrics_file=METRICS,
        metrics_rows=len(metrics),
    )


def _by_picture_order(runs: Sequence[ReportRun]) -> list[ReportRun]:
    order = {notebook: place for place, notebook in enumerate(STUDIES)}

    def rank(run: ReportRun) -> tuple[int, int, str]:
        return order.get(run.notebook, len(order)), dataset_rank(str(run.parameters.get("images", ""))), run.name

    return sorted(runs, key=rank)


def _hero(pictures: Sequence[Picture], names: Sequence[str]) -> list[Picture]:
    """The first picture of every target, else the first that belongs to none."""
    shows = [picture for picture in pictures if picture.shows_images]
    firsts = [next((picture for picture in shows if picture.target == name), None) for name in names]
    return [picture for picture in firsts if picture is not None] or shows[:1]


def _target_section(
    name: str,
    runs: Sequence[ReportRun],
    pictures: Sequence[Picture],
    groups: Sequence[Group],
    hero: Sequence[Picture],
    card: Mapping[str, Any],
    page_folder: Path,
) -> dict[str, Any]:
    own: dict[str, list[Picture]] = {}
    for picture in pictures:
        if picture.target == name and picture not in hero:
            own.setdefault(picture.notebook, []).append(picture)
    weights: Mapping[str, Any] = next((w[name] for run in runs if name in (w := run.record.get("weights") or {})), {})
    facts = [(title, str(weights[key])) for title, key in (("weights", "weights"), ("hash", "hash")) if key in weights]
    return {
        "name": name,
        "anchor": "target-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "colour": target_colour(name),
        "facts": [*facts, *card_facts(card)],
        "studies": [(STUDIES.get(notebook, notebook), figures) for notebook, figures in own.items()],
        "groups": [(f"{group.dataset}, {group.split}", depth_tables(group)) for group in groups],
        "card": card_tables(card, name, _measured_scores(runs, name)),
        "card_link": _card_link(name, page_folder) if card else "",
    }


def _curves(groups: Sequence[Group]) -> dict[str, Any] | None:
    """PSNR by depth of all targets in one figure, embedded; None without PSNR."""
    rows = [part for group in groups if len(part := group.rows[group.rows["measure"] == "psnr"])]
    if not rows:
        return None
    figure = depth_curves(pd.concat(rows, ignore_index=True), "psnr")
    width, height = figure.get_size_inches() * 200
    return {
        "source": "data:image/png;base64," + base64.b64encode(png_bytes(figure, dpi=200)).decode("ascii"),
        "width": round(width),
        "height": round(height),
        "caption": figure.caption,
        "alt": figure.description,
    }
