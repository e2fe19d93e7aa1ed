"""One page over the runs in a folder: pictures to play with first, then the numbers, then how they were made.

The page needs no request to anywhere but the files beside it. Figures bring their captions and say whether they show
images or numbers (plots.style.ShownFigure); a figure belongs to the target that its file's name or its run names.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from PIL import Image

from backsight.app.frames import strips
from backsight.app.runs import file_name
from backsight.errors import BacksightError
from backsight.plots import depth
from backsight.plots.style import (
    MEASURE_NAMES,
    colour_of,
    inverse_order,
    is_null,
    look_of,
    png_bytes,
    taps_in_order,
    with_nulls_of,
)
from backsight.project import FINISHED, METRICS, read_json, write_atomically
from backsight.tables.claims import findings
from backsight.tables.read import QUALITY, Study, read_study, span, study_folder, write_text
from backsight.tables.sentences import number
from backsight.tables.values import METRIC_COLUMNS

PAGE = "index.html"
NO_ROWS = pd.DataFrame(columns=METRIC_COLUMNS)
DIFFERENCE_GAIN = 2  # of the difference of input and reconstruction: more would be white all over for deep layers
# Notebooks in the order in which their figures are shown, and what each is about.
STUDIES: Mapping[str, str] = {
    "00_quickstart": "Single pictures",
    "03_quality": "Shape and detail",
    "04_cross_layer": "Do layers speak the same code?",
    "05_colour": "Colour",
    "08_explorer": "Where the hue is lost",
    "06_modular_vs_direct": "Modular against direct inverses",
    "11_exact": "Is the picture the only one?",
    "12_noise": "Lost, or only hidden?",
    "10_tradeoff": "Trained to be invertible",
    "02_train_inverse": "Training of the inverses",
    "18_targets": "Classes and training",
}
TABLE_MEASURES: Mapping[str, int] = {"psnr": 1, "psnr_objects": 1, "ssim": 3, "r2": 3}  # by depth; decimals
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
class PageRun:
    """A finished run as the page reads it; table: its metrics.csv, empty where it has none."""

    folder: Path
    notebook: str
    record: Mapping[str, Any]
    table: pd.DataFrame

    @property
    def targets(self) -> list[str]:
        """The targets that the run was asked for, recorded weights of, or measured."""
        parameters = self.record.get("parameters") or {}
        asked = parameters.get("targets", parameters.get("target", []))
        names = [asked] if isinstance(asked, str) else asked or []
        return list(dict.fromkeys([*names, *(self.record.get("weights") or {}), *self.table["target"].dropna()]))

    @property
    def images(self) -> str:
        """The images that the run is about, where they are of one kind."""
        measured = self.table["dataset"].dropna().unique()
        return str((self.record.get("parameters") or {}).get("images") or (measured[0] if len(measured) == 1 else ""))

    def link(self, file: str | Path) -> str:
        return quote((self.folder / file).relative_to(self.folder.parent).as_posix())


def write_report(folder: str | Path) -> Path:
    """Write index.html, and metrics.csv with the tables of all runs, over the runs in the sub-folders of `folder`.

    Figures are loaded from the runs' folders beside the page, frames are inside it. Returns the page's path. Raises
    BacksightError where the folder does not exist, holds no finished run (read_study), or files of these names that
    are not of backsight.
    """
    folder = Path(folder)
    for file, mark in ((PAGE, "<title>backsight: "), (METRICS, ",".join(METRIC_COLUMNS))):
        if (folder / file).is_file() and mark not in (folder / file).read_text(encoding="utf-8", errors="replace"):
            raise BacksightError(f"{folder / file} is not of backsight: move it away, or name another folder.")
    study = read_study(folder)
    runs = [
        PageRun(place, record["notebook"], record, study.tables.get(place.name, NO_ROWS))
        for place in sorted(folder.iterdir())
        if place.name not in study.left_out and (record := read_json(place / FINISHED) or {}).get("notebook")
    ]
    metrics = pd.concat(list(study.tables.values()), ignore_index=True)
    added = [name for name in metrics if name not in METRIC_COLUMNS and name != "run"]
    metrics = metrics[[*METRIC_COLUMNS, *added, "run"]]
    page = _rendered(study, runs, metrics)
    write_atomically(folder / METRICS, lambda temporary: metrics.to_csv(temporary, index=False))
    return write_text(folder / PAGE, page)


def _rendered(study: Study, runs: Sequence[PageRun], metrics: pd.DataFrame) -> str:
    """The page's HTML; the same runs give the same text."""
    from jinja2 import Environment, StrictUndefined

    by_notebook = sorted(runs, key=lambda run: (run.notebook, run.folder.name))
    names = list(dict.fromkeys(name for run in by_notebook for name in run.targets))  # the quickstart names them all
    order = list(STUDIES)
    shown = sorted(by_notebook, key=lambda run: order.index(run.notebook) if run.notebook in order else len(order))
    pictures = [picture for run in shown for picture in _pictures(run, names)]
    by_depth = {name: [rows for run in by_notebook if len(rows := _depth_rows(run, name))] for name in names}
    frames, unplayable = strips(study.folder, metrics)
    played = {key: list(dict.fromkeys(strip[key] for strip in frames)) for key in ("picture", "target", "family")}
    tables = [rows for name in names for rows in by_depth[name]]
    versions = pd.DataFrame([run.record.get("versions", {}) for run in runs])
    used = inverse_order([inverse for rows in tables for inverse in rows["inverse"]])
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"look": look_of, "notes": FAMILY_NOTES, "gain": DIFFERENCE_GAIN}
    style, script, template = (
        (files("backsight.app") / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html.jinja")
    )
    return environment.from_string(template).render(
        name=study.folder.resolve().name,
        style=style,
        script=script,
        frames=frames,
        played=played,
        families=inverse_order(played["family"]),
        shows={strip["picture"]: strip["shows"] for strip in frames},
        unplayable=unplayable,
        targets=[_target(name, runs, pictures, by_depth[name]) for name in names],
        curves=_curves(tables),
        claims=_claims(study),
        inverses=used,
        others=[picture for picture in pictures if picture["target"] not in names],
        runs=[_facts(run) for run in by_notebook],
        left_out=study.left_out,
        hardware=list(dict.fromkeys(text for run in runs if (text := _hardware(run.record.get("hardware") or {})))),
        versions={package: ", ".join(versions[package].dropna().unique()) for package in versions},
        metrics_file=METRICS,
        metrics_rows=len(metrics),
    )


def _pictures(run: PageRun, targets: Sequence[str]) -> list[dict[str, Any]]:
    """The figures of a run with the captions that they carry; what is no PNG is left out.

    07_figures draws those of single targets again, and the pictures of a training are those of the quality of its
    inverses: the page shows them there.
    """
    pictures = []
    for path in sorted((run.folder / "figures").glob("*.png")):
        named = [target for target in targets if file_name(target) in path.stem]
        target = max(named, key=len) if named else run.targets[0] if len(run.targets) == 1 else ""
        of_pictures = path.stem.startswith("pictures")
        if {"02_train_inverse": of_pictures, "07_figures": of_pictures or target}.get(run.notebook):
            continue
        try:
            with Image.open(path, formats=("PNG",)) as image:
                (width, height), told = image.size, image.info
        except OSError:
            continue
        title = _title(path.stem.replace(file_name(target), "") if target else path.stem, run)
        place = {"link": run.link(path), "table": run.link(METRICS) if len(run.table) else "", "notebook": run.notebook}
        words = {"title": title, "caption": told.get("Title", ""), "alt": told.get("Description", title)}
        pictures.append({**place, **words, "width": width, "height": height, "target": target})
    return pictures


def _title(stem: str, run: PageRun) -> str:
    """A figure's name in words: its file's name without the target, and the images that the run is about."""
    words = re.sub(r"[-_\s]+", " ", stem).strip()
    for word, proper in (("psnr", "PSNR"), ("ssim", "SSIM"), ("r2", "R²")):
        words = re.sub(rf"\b{word}\b", proper, words)
    title = ", ".join(part for part in (words, Path(run.images).name) if part) or run.folder.name
    return title[0].upper() + title[1:]


# ------------------------------------------------------------------------------------------------------ the numbers


def _depth_rows(run: PageRun, target: str) -> pd.DataFrame:
    """What a quality run measured of a target by depth; of the nulls, those of the chain where it has some."""
    if run.notebook != QUALITY:
        return NO_ROWS
    rows = with_nulls_of(run.table, "modular").dropna(subset=["tap", "value"])
    return rows[(rows["target"] == target) & rows["measure"].isin(list(TABLE_MEASURES))]


def _depth_table(rows: pd.DataFrame, measure: str) -> dict[str, Any]:
    """One measure by tap (rows) and inverse (columns), nulls last.

    A cell holds the number, its interval over images and seeds, whether it is the best of its row, and its share of the
    way from the mean image (or 0) to the best of the table, None for nulls.
    """
    pooled, inverses = rows.dropna(subset="value"), inverse_order(list(rows["inverse"]))
    columns = pooled[["tap", "inverse", "value", "low", "high"]]
    numbers: dict[Any, Any] = {row[:2]: row[2:] for row in columns.itertuples(index=False, name=None)}
    best = pooled[~is_null(pooled)].groupby("tap")["value"].max()
    floor, ceiling = pooled.loc[pooled["inverse"] == "null_mean", "value"].min(), best.max()
    floor = 0.0 if pd.isna(floor) else floor

    def text(value: float) -> str:
        decimals = TABLE_MEASURES[measure]
        return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")

    def cell(tap: str, inverse: str) -> dict[str, Any]:
        if (tap, inverse) not in numbers:
            return {"text": "–", "interval": "", "is_best": False, "share": None}
        value, low, high = numbers[tap, inverse]
        is_family = not inverse.startswith("null_") and ceiling > floor
        return {
            "text": text(value),
            "interval": "" if pd.isna(low) else f"{text(low)} to {text(high)}",
            "is_best": is_family and value == best[tap],
            "share": min(max((value - floor) / (ceiling - floor), 0.0), 1.0) if is_family else None,
        }

    first, seeds = rows.iloc[0], int(pooled["seeds"].max())
    source = f"data set {first['dataset']}, split {first['split']}, {first['weights']} weights"
    return {
        "title": MEASURE_NAMES.get(measure, measure),
        "facts": f"n = {span(rows['n'])}, training seeds: {seeds}, {source}",
        "run": first["run"],
        "inverses": inverses,
        "rows": [(tap, [cell(tap, name) for name in inverses]) for tap in taps_in_order(rows)],
    }


def _target(
    name: str, runs: Sequence[PageRun], pictures: Sequence[dict[str, Any]], by_depth: Sequence[pd.DataFrame]
) -> dict[str, Any]:
    """The section of one target: facts, tables by quality run, figures by study."""
    studies: dict[str, list[dict[str, Any]]] = {}
    for picture in pictures:
        if picture["target"] == name:
            studies.setdefault(STUDIES.get(picture["notebook"], picture["notebook"]), []).append(picture)
    noted = [run.record.get("weights") or {} for run in runs]
    weights: Mapping[str, Any] = next((of_run[name] for of_run in noted if name in of_run), {})
    tables = [
        (
            ", ".join(rows.iloc[0][["dataset", "split"]]),
            [_depth_table(own, name) for name in TABLE_MEASURES if len(own := rows[rows["measure"] == name])],
        )
        for rows in by_depth
    ]
    return {
        "name": name,
        "anchor": f"target-{file_name(name).lower()}",
        "colour": colour_of(name),
        "facts": [(key, weights[key]) for key in ("weights", "hash") if key in weights],
        "studies": list(studies.items()),
        "groups": tables,
    }


def _claims(study: Study) -> list[dict[str, Any]]:
    """The claims that the runs measured: their numbers beside those, and the verdicts, of the committed run."""
    committed, key = study_folder(), ["claim", "target", "tap"]
    own = findings(study).dropna(subset="value").fillna({"tap": ""})
    if own.empty or study.folder.resolve() == committed.resolve():
        return []
    try:
        reference = findings(read_study(committed)).dropna(subset="value").fillna({"tap": ""}).set_index(key)
    except BacksightError:  # it is not there, or is just being remade
        return []

    def told(row: pd.Series, *more: str) -> list[str]:
        return [number(row, signed=True), f"n = {row['n']:.0f}, training seeds: {row['seeds']:.0f}", *more]

    rows = []
    for _, row in own.iterrows():
        beside = reference[reference.index == tuple(row[key])]
        there = told(beside.iloc[0], beside["verdict"].iloc[0]) if len(beside) else ["not measured"]
        rows.append({**{name: row[name] for name in (*key, "unit")}, "runs": [told(row), there]})
    return rows


def _curves(tables: Sequence[pd.DataFrame]) -> dict[str, Any] | None:
    """PSNR by depth of all targets in one figure, embedded; None without PSNR."""
    rows = pd.concat([table[table["measure"] == "psnr"] for table in tables] or [pd.DataFrame()])
    if rows.empty:
        return None
    figure = depth.by_depth(rows, "psnr", "PSNR by depth", columns=2)
    width, height = (round(side * 200) for side in figure.get_size_inches())
    source = "data:image/png;base64," + base64.b64encode(png_bytes(figure, dpi=200)).decode("ascii")
    return {"source": source, "width": width, "height": height, "caption": figure.caption, "alt": figure.description}


# -------------------------------------------------------------------------------------------------------- run facts


def _facts(run: PageRun) -> dict[str, Any]:
    """What the table of runs says about one run."""
    seconds = dict(run.record.get("seconds") or {})
    total, commit = seconds.pop("total", 0.0), str(run.record.get("commit") or "")[:10]
    linked = [(path.name, run.link(path)) for path in sorted(run.folder.glob("*.*")) if not path.name.startswith(".")]
    return {
        "name": run.folder.name,
        "notebooks": [pair for pair in linked if pair[0].endswith(".ipynb")],
        "tables": [pair for pair in linked if pair[0].endswith((".csv", ".parquet", ".md"))],
        "notebook": run.notebook,
        "seed": run.record.get("seed", "–"),
        "seconds": _duration(total),
        "record": run.link(FINISHED),
        "phases": [(name, _duration(value)) for name, value in seconds.items()],
        "started": str(run.record.get("started", "")).replace("T", " ").replace("+00:00", " UTC"),
        "commit": commit and f"commit {commit}{' + changes' if run.record.get('modified') else ''}",
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.{0 if seconds >= 9.95 else 1}f} s"


def _hardware(hardware: Mapping[str, Any]) -> str:
    parts = [str(hardware[key]) for key in ("gpu", "processor", "system") if hardware.get(key)]
    units = {"cores": "cores", "memory_gib": "GiB"}
    return ", ".join([*parts, *(f"{hardware[key]:.0f} {unit}" for key, unit in units.items() if hardware.get(key))])
