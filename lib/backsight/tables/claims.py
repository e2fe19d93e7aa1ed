"""FINDINGS.md: the claims of claims.yaml, what the runs of a study say of each, and a verdict by rule.

No number is typed, and every one is a mean of values that the runs' values.parquet hold, image by image.

    backsight findings results/reference FINDINGS.md
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import yaml

from backsight.project import shown
from backsight.tables.judge import LEAST_SEEDS, Claim, judge
from backsight.tables.read import Study, read_study, write_text
from backsight.tables.sentences import number

UNMEASURED = "not measured"
JUDGED = ("tap", "value", "low", "high", "n", "seeds", "photographs", "border", "p", "verdict", "why")
RULES = f"""
A row is a mean over training seeds and images with its 95 % interval, of values or of differences of the same image by
the same training seed. *agreed*: the interval lies beyond the smallest effect that matters, the border; *disagreed*: on
the other side; *cannot tell*: it holds the border, or fewer than {LEAST_SEEDS} training seeds stand behind a trained
inverse; *at the floor*: the values do not beat their null, so that they decide nothing. p values are corrected for the
number of rows on this page (Holm). The targets are small models that we trained on rendered scenes, one of each kind:
what is found of them is not thereby found of the paper's models."""


def read_claims() -> list[Claim]:
    """The claims, in the order of the page."""
    listed = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
    return [Claim(**entry) for entry in listed]


def findings(study: Study) -> pd.DataFrame:
    """One row a claim and target, as of `judge`, with text, source, unit, notebook and caution; a claim that no run
    measured has one row, "not measured"."""
    claims = read_claims()
    about = pd.DataFrame([vars(claim) for claim in claims])[["claim", "text", "source", "notebook", "unit", "caution"]]
    values = study.values([claim.notebook for claim in claims])
    judged = judge(values, claims).reindex(columns=["claim", "target", *JUDGED])
    table = about.merge(judged, on="claim", how="left")
    return table.assign(verdict=table["verdict"].fillna(UNMEASURED))


def render_findings(study: Study) -> str:
    """The page FINDINGS.md as Markdown: all verdicts, then each claim with its numbers and its caution."""
    table, name = findings(study), shown(study.folder)
    name = study.folder.name if Path(name).is_absolute() else name  # the same on every machine
    lines = ["# Findings", "", f"Made by `backsight findings {name} FINDINGS.md` from the runs in `{name}`.", RULES]
    lines += ["", "| claim | source | verdicts |", "| --- | --- | --- |"]
    for claim, rows in table.groupby("claim", sort=False):
        verdicts = [f"{row.target}: **{row.verdict}**" for row in rows.itertuples() if row.verdict != UNMEASURED]
        lines.append(f"| {claim} | {rows['source'].iloc[0]} | {', '.join(verdicts) or UNMEASURED} |")
    for position, (_, rows) in enumerate(table.groupby("claim", sort=False), start=1):
        first = rows.iloc[0]
        title = first["claim"][0].upper() + first["claim"][1:]
        lines += ["", f"## {position}. {title}", "", f"{first['text']} ({first['source']})", ""]
        lines += _numbers(rows) if first["verdict"] != UNMEASURED else [f"No run of `{first['notebook']}` measured it."]
        lines += ["", f"**Do not conclude:** {first['caution']}"]
    if study.left_out:
        lines += ["", f"Runs left out: {'; '.join(f'`{run}` ({why})' for run, why in study.left_out.items())}."]
    return "\n".join(lines) + "\n"


def _numbers(rows: pd.DataFrame) -> list[str]:
    lines = [f"Measured by `{rows['notebook'].iloc[0]}`: {rows['unit'].iloc[0]}.", ""]
    lines += ["| target | tap | value [95 %] | images / photographs / seeds | border | p | verdict |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for _, row in rows.iterrows():
        counts = f"{row['n']:.0f} / {row['photographs']:.0f} / {row['seeds']:.0f}"
        said = f"{row['border']} | {row['p']:.2g} | **{row['verdict']}** ({row['why']})"
        lines.append(f"| {row['target']} | {row['tap']} | {number(row, signed=True)} | {counts} | {said} |")
    return lines


def write_findings(results: str | Path, path: str | Path) -> Path:
    """Write FINDINGS.md from the runs in a folder; returns its path. Raises BacksightError where there is no run."""
    return write_text(path, render_findings(read_study(results)))
