"""FINDINGS.md: the claims of claims.yaml, what the runs of a study say of each, and a verdict by rule.

No number is typed, and every one is a mean of values that the runs' values.parquet hold, image by image.

    backsight findings results/reference FINDINGS.md
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from backsight.project import shown
from backsight.tables.judge import LEAST_SEEDS, Claim, judge
from backsight.tables.read import Study, read_study, write_text
from backsight.tables.sentences import number

UNMEASURED, PICTURES = "not measured", ("scenes", "real")
JUDGED = ("tap", "value", "low", "high", "n", "seeds", "photographs", "border", "p", "verdict", "why")
RULES = f"""
A row is a mean over training seeds and images with its 95 % interval, of values or of differences of the same image by
the same training seed. *agreed*: the interval lies beyond the smallest effect that matters, the border; *disagreed*: on
the other side; *cannot tell*: it holds the border, or fewer than {LEAST_SEEDS} training seeds stand behind a trained
inverse; *at the floor*: the values do not beat their null, so that they decide nothing. p values are corrected for the
number of rows on this page (Holm), scenes and real apart. The targets of *scenes* are small models that we trained on
rendered scenes, one of each kind: what is found of them is not thereby found of the paper's models. *Real* is a
pretrained DINOv2 ViT-S/14 on photographs of which no truth is known but the pixels (and masks of COCO): neither a model
of the paper nor a classifier, no DETR beside it, and few photographs, so that small differences stay open."""


def read_claims() -> list[Claim]:
    """The claims, in the order of the page; what an entry says of `real` pictures takes the place of its other fields
    in a claim of its own."""
    claims = []
    for entry in yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8")):
        real = entry.pop("real", None)
        claims += [Claim(**entry)] + ([Claim(**{**entry, **real, "pictures": "real"})] if real else [])
    return claims


def findings(study: Study) -> pd.DataFrame:
    """One row a claim, kind of pictures and target, as of `judge`, with text, source, unit, notebook and caution; what
    no run measured has one row, "not measured"."""
    claims, key = read_claims(), ["claim", "pictures"]
    about = pd.DataFrame([vars(claim) for claim in claims])[[*key, "text", "source", "notebook", "unit", "caution"]]
    measures = {measure for claim in claims for measure in np.atleast_1d(claim.rows["measure"])}
    values = study.values([claim.notebook for claim in claims], measures)
    judged = [
        judge(values, [claim for claim in claims if claim.pictures == pictures]).assign(pictures=pictures)
        for pictures in PICTURES
    ]
    table = about.merge(pd.concat(judged).reindex(columns=[*key, "target", *JUDGED]), on=key, how="left")
    return table.assign(verdict=table["verdict"].fillna(UNMEASURED))


def render_findings(study: Study, table: pd.DataFrame) -> str:
    """The page FINDINGS.md as Markdown: all verdicts, then each claim with its numbers and its caution.

    table: the study's `findings`.
    """
    name = shown(study.folder)
    name = study.folder.name if Path(name).is_absolute() else name  # the same on every machine
    lines = ["# Findings", "", f"Made by `backsight findings {name} FINDINGS.md` from the runs in `{name}`.", RULES]
    lines += ["", f"| claim | source | {' | '.join(PICTURES)} |", "| --- | --- | --- | --- |"]
    for claim, rows in table.groupby("claim", sort=False):
        cells = []
        for pictures in PICTURES:
            known = rows[(rows["pictures"] == pictures) & (rows["verdict"] != UNMEASURED)]
            cells.append(", ".join(f"{row.target}: **{row.verdict}**" for row in known.itertuples()) or UNMEASURED)
        lines.append(f"| {claim} | {rows['source'].iloc[0]} | {' | '.join(cells)} |")
    for position, (claim, rows) in enumerate(table.groupby("claim", sort=False), start=1):
        title, first = str(claim), rows.iloc[0]
        lines += ["", f"## {position}. {title[0].upper()}{title[1:]}", "", f"{first['text']} ({first['source']})"]
        for kind, of in rows.groupby("pictures", sort=False):
            lines += ["", *_numbers(of, str(kind))]
            if of["verdict"].iloc[0] != UNMEASURED:
                lines += ["", f"**Do not conclude:** {of['caution'].iloc[0]}"]
    if study.left_out:
        lines += ["", f"Runs left out: {'; '.join(f'`{run}` ({why})' for run, why in study.left_out.items())}."]
    return "\n".join(lines) + "\n"


def _numbers(rows: pd.DataFrame, pictures: str) -> list[str]:
    first, of = rows.iloc[0], "" if pictures == PICTURES[0] else f" of {pictures} pictures"
    if first["verdict"] == UNMEASURED:
        return [f"No run of `{first['notebook']}`{of} measured it."]
    lines = [f"Measured by `{first['notebook']}`{of}: {first['unit']}.", ""]
    lines += ["| target | tap | value [95 %] | images / photographs / seeds | border | p | verdict |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for _, row in rows.iterrows():
        counts = f"{row['n']:.0f} / {row['photographs']:.0f} / {row['seeds']:.0f}"
        said = f"{row['border']} | {row['p']:.2g} | **{row['verdict']}** ({row['why']})"
        lines.append(f"| {row['target']} | {row['tap']} | {number(row, signed=True)} | {counts} | {said} |")
    return lines


def write_findings(results: str | Path, path: str | Path) -> Path:
    """Write FINDINGS.md from the runs in a folder; returns its path. Raises BacksightError where there is no run."""
    study = read_study(results)
    return write_text(path, render_findings(study, findings(study)))
