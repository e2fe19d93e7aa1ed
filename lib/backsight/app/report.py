"""One page over the runs in a folder: pictures to play with first, then the numbers, then how they were made.

The page needs no request to anywhere but the files beside it. Figures bring their captions and say whether they show
images or numbers (plots.style.ShownFigure); a figure belongs to the target that its file's name or its run names.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from pydantic import ConfigDict, ValidationError

from backsight.app.frames import strips
from backsight.app.pictures import data_address
from backsight.app.runs import check_file, file_name
from backsight.errors import BacksightError
from backsight.plots import depth
from backsight.plots.style import (
    MEASURE_NAMES,
    inverse_order,
    is_null,
    look_of,
    taps_in_order,
    with_nulls_of,
)
from backsight.project import FINISHED, METRICS, read_json
from backsight.tables.claims import findings
from backsight.tables.read import QUALITY, Record, Study, read_study, span, study_folder, write_text
from backsight.tables.sentences import number
from backsight.tables.values import METRIC_COLUMNS

PAGE = "index.html"
NO_ROWS = pd.DataFrame(columns=METRIC_COLUMNS)
DIFFERENCE_GAIN = 2  # of the difference of input and reconstruction: more would be white all over for deep layers
TRAINING, FIGURES = "02_train_inverse", "07_figures"  # shown last; drawn again of what other runs show
TABLE_MEASURES: Mapping[str, int] = {"psnr": 1, "psnr_objects": 1, "ssim": 3, "r2": 3}  # by depth; decimals


class PageRun(Record):
    """A finished run as the page reads it; table: its metrics.csv, empty where it has none."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    folder: Path
    notebook: str
    table: pd.DataFrame
    seed: Any = "–"
    started: Any = ""
    commit: str | None = None
    modified: Any = None

    @property
    def targets(self) -> list[str]:
        """The targets that the run recorded weights of, or measured: not what it was asked for and could not have."""
        return list(dict.fromkeys([*self.weights, *self.table["target"].dropna()]))

    @property
    def question(self) -> str:
        """The title of the run's notebook."""
        cells = (read_json(self.folder / f"{self.notebook}.ipynb") or {}).get("cells") or [{}]
        return "".join(cells[0].get("source", "")).partition("\n")[0].removeprefix("# ") or self.notebook

    @property
    def images(self) -> str:
        """The images that the run is about, where they are of one kind."""
        measured = self.table["dataset"].dropna().unique()
        return str(self.parameters.get("images") or (measured[0] if len(measured) == 1 else ""))

    def files(self, *suffixes: str) -> list[tuple[str, str]]:
        """(name, link) of the files in the run's folder with these suffixes."""
        return [(path.name, self.link(path)) for path in sorted(self.folder.glob("[!.]*")) if path.suffix in suffixes]

    def link(self, file: str | Path) -> str:
        return quote((self.folder / file).relative_to(self.folder.parent).as_posix())


def write_report(folder: str | Path) -> Path:
    """Write index.html, and metrics.csv with the tables of all runs, over the runs in the sub-folders of `folder`.

    Figures are loaded from the runs' folders beside the page, frames are inside it. Returns the page's path. Raises
    BacksightError where the folder does not exist, holds no finished run (read_study), or files of these names that
    are not of backsight.
    """
    folder = Path(folder)
    check_file(folder / PAGE, "<title>backsight: ")
    check_file(folder / METRICS, ",".join(METRIC_COLUMNS))
    study = read_study(folder)
    runs, left_out = [], {**study.left_out}
    for place in sorted(folder.iterdir()):
        record = read_json(place / FINISHED) or {}
        if record.get("notebook") and place.name not in left_out:
            table = study.table[study.table["run"] == place.name]
            try:
                runs.append(PageRun.model_validate(record | {"folder": place, "table": table}))
            except ValidationError:  # of a run that is no part of the study
                left_out[place.name] = f"its {FINISHED} is damaged"
    metrics = study.table.drop(columns="notebook")
    metrics["run"] = metrics.pop("run")  # the last column
    page = _rendered(replace(study, left_out=left_out), runs, metrics)
    write_text(folder / METRICS, metrics.to_csv(index=False, float_format="%.6g"))
    return write_text(folder / PAGE, page)


def _rendered(study: Study, runs: Sequence[PageRun], metrics: pd.DataFrame) -> str:
    """The page's HTML; the same runs give the same text."""
    runs = sorted(runs, key=lambda run: (run.notebook, run.folder.name))
    names = list(dict.fromkeys(name for run in runs for name in run.targets))  # the quickstart names them all
    shown = sorted(runs, key=lambda run: run.notebook == TRAINING)
    pictures = [picture for run in shown for picture in _pictures(run, names)]
    by_depth = {name: [rows for run in runs if len(rows := _depth_rows(run, name))] for name in names}
    tables = pd.concat([rows for name in names for rows in by_depth[name]] or [NO_ROWS])
    frames, unplayable = strips(study.folder, metrics)
    versions = pd.DataFrame([run.versions for run in runs])
    environment = Environment(
        loader=PackageLoader("backsight.app", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"look": look_of, "number": number, "in_order": inverse_order, "gain": DIFFERENCE_GAIN}
    return environment.get_template("report.html.jinja").render(
        name=study.folder.resolve().name,
        frames=frames,
        unplayable=unplayable,
        targets=[_target(name, runs, pictures, by_depth[name]) for name in names],
        curves=_curves(tables[tables["measure"] == "psnr"]),
        claims=_claims(study),
        inverses=inverse_order(list(tables["inverse"])),
        others=[picture for picture in pictures if picture["target"] not in names],
        runs=runs,
        left_out=study.left_out,
        hardware=list(dict.fromkeys(text for run in runs if (text := _hardware(run.hardware)))),
        versions={package: ", ".join(versions[package].dropna().unique()) for package in versions},
        metrics_file=METRICS,
        metrics_rows=len(metrics),
    )


def _pictures(run: PageRun, targets: Sequence[str]) -> list[dict[str, Any]]:
    """The figures of a run with the captions that they carry; what is no PNG is left out."""
    pictures, question = [], run.question
    only = run.targets[0] if len(run.targets) == 1 else ""
    for path in sorted((run.folder / "figures").glob("*.png")):
        target = max((target for target in targets if file_name(target) in path.stem), key=len, default=only)
        of_pictures = path.stem.startswith("pictures")  # which the runs of 03_quality show
        if {TRAINING: of_pictures, FIGURES: of_pictures or target}.get(run.notebook):
            continue
        try:
            with Image.open(path, formats=("PNG",)) as image:
                (width, height), texts = image.size, image.info
        except OSError:
            continue
        title = _title(path.stem.replace(file_name(target), "") if target else path.stem, run)
        pictures.append(
            {
                "link": run.link(path),
                "table": run.link(METRICS) if len(run.table) else "",
                "study": question,
                "target": target,
                "title": title,
                "caption": texts.get("Title", ""),
                "alt": texts.get("Description", title),
                "width": width,
                "height": height,
            }
        )
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


def _depth_table(rows: pd.DataFrame) -> dict[str, Any]:
    """One measure by tap and inverse; a cell is a row with `best`, of its tap, and `share`, of the way from the mean
    image (or 0) to the best of the table, which nulls do not have."""
    values = rows["value"].where(~is_null(rows))
    floor = rows.loc[rows["inverse"] == "null_mean", "value"].min()
    floor, ceiling = 0.0 if pd.isna(floor) else floor, values.max()
    shares = ((values - floor) / (ceiling - floor)).clip(0, 1) if ceiling > floor else math.nan
    cells = rows.assign(share=shares, best=values.groupby(rows["tap"]).transform("max"))
    first = rows.iloc[0]
    shown = {"training seeds": ~is_null(rows), "of the untrained target": rows["inverse"] == "null_untrained"}
    trained = ", ".join(f"{name}: {span(rows[of]['seeds'])}" for name, of in shown.items() if of.any())
    source = f"data set {first['dataset']}, split {first['split']}, {first['weights']} weights"
    return {
        "title": MEASURE_NAMES.get(first["measure"], first["measure"]),
        "decimals": TABLE_MEASURES[first["measure"]],
        "facts": f"n = {span(rows['n'])}, {trained}, {source}",
        "run": first["run"],
        "inverses": inverse_order(list(rows["inverse"])),
        "taps": taps_in_order(rows),
        "cells": {(cell.tap, cell.inverse): cell for cell in cells.itertuples()},
    }


def _target(
    name: str, runs: Sequence[PageRun], pictures: Sequence[dict[str, Any]], by_depth: Sequence[pd.DataFrame]
) -> dict[str, Any]:
    """The section of one target: facts, tables by quality run, figures by study."""
    weights = next((run.weights[name] for run in runs if name in run.weights), {})
    own = (picture for picture in pictures if picture["target"] == name)
    groups = []
    for rows in by_depth:
        measured = [part for measure in TABLE_MEASURES if len(part := rows[rows["measure"] == measure])]
        groups.append((", ".join(rows.iloc[0][["dataset", "split"]]), [_depth_table(part) for part in measured]))
    return {
        "name": name,
        "anchor": f"target-{file_name(name).lower()}",
        "colour": look_of(name).colour,
        "facts": [(key, weights[key]) for key in ("weights", "hash") if key in weights],
        "studies": [(study, list(drawn)) for study, drawn in groupby(own, itemgetter("study"))],
        "groups": groups,
    }


def _claims(study: Study) -> list[tuple[Mapping[Any, Any], Mapping[Any, Any] | None]]:
    """The claims that the runs measured, each with what the committed run says of it, None where it says nothing."""

    def measured(of: Study) -> dict[tuple[str, str, str, str], Mapping[Any, Any]]:
        rows = findings(of).dropna(subset="value").fillna({"tap": ""}).to_dict("records")
        return {(row["claim"], row["pictures"], row["target"], row["tap"]): row for row in rows}

    if study.folder.resolve() == study_folder().resolve() or not (own := measured(study)):
        return []
    try:
        reference = measured(read_study(study_folder()))
    except BacksightError:  # it is not there, or is just being remade
        return []
    return [(row, reference.get(key)) for key, row in own.items()]


def _curves(rows: pd.DataFrame) -> dict[str, Any] | None:
    """PSNR by depth of all targets in one figure, embedded; None without PSNR."""
    if rows.empty:
        return None
    figure = depth.by_depth(rows, "psnr", "PSNR by depth", columns=2)
    png, size = figure._repr_png_()
    return {"source": data_address(png), **size, "caption": figure.caption, "alt": figure.description}


def _hardware(hardware: Mapping[str, Any]) -> str:
    parts = [str(hardware[key]) for key in ("gpu", "processor", "system") if hardware.get(key)]
    units = {"cores": "cores", "memory_gib": "GiB"}
    sizes = [(hardware.get(key), unit) for key, unit in units.items()]
    return ", ".join([*parts, *(f"{size:.0f} {unit}" for size, unit in sizes if isinstance(size, int | float))])
