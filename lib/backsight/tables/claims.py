"""FINDINGS.md: the claims of the paper (claims.yaml), what the runs measured, and a verdict by rule.

No number is typed. The verdict follows from the 95 % interval of each row of evidence alone: "agreed" where all of it
lies on the claim's side, "disagreed" where all of it lies on the other side, "cannot tell" where it holds the border,
or where a trained inverse was trained with fewer than LEAST_SEEDS seeds; "not measured" where no run has the numbers.

    backsight findings results/reference FINDINGS.md
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from backsight.tables import evidence
from backsight.tables.estimates import Estimate
from backsight.tables.evidence import Evidence
from backsight.tables.read import Study, read_study, write_text

AGREED, DISAGREED, UNDECIDED, UNMEASURED = "agreed", "disagreed", "cannot tell", "not measured"
VERDICTS = (AGREED, DISAGREED, UNDECIDED, UNMEASURED)
LEAST_SEEDS = 3  # training seeds behind a number of a trained inverse, before it may decide
FINDING_COLUMNS = (
    "claim",
    "target",
    "measured",
    "unit",
    "value",
    "low",
    "high",
    "n",
    "seeds",
    "run",
    "verdict",
    "why",
    "caution",
)


@dataclass(frozen=True)
class Claim:
    """key: short name; text: the paper's claim; rule: when a row agrees; caution: what must not be concluded;
    notebooks: the studies that measure it; evidence: the rows of a study."""

    key: str
    text: str
    rule: str
    caution: str
    notebooks: tuple[str, ...]
    evidence: Callable[[Study], Iterator[Evidence]]


def read_claims() -> tuple[Claim, ...]:
    """The claims, in the order of the page."""
    borders = {name: getattr(evidence, name) for name in ("AS_GOOD", "HALF_OF_IT", "HIDDEN")}
    listed = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
    return tuple(
        Claim(
            **(claim | {"rule": claim["rule"].format(**borders), "notebooks": tuple(claim["notebooks"])})
            | {"evidence": getattr(evidence, claim["evidence"])}
        )
        for claim in listed
    )


CLAIMS = read_claims()


def verdict(estimate: Estimate, border: float = 0.0, trained: bool = True) -> tuple[str, str]:
    """(verdict, why) of a claim that says: this number is above `border`."""
    if not all(map(math.isfinite, (estimate.value, estimate.low, estimate.high))):
        return UNDECIDED, "no interval"
    if trained and estimate.seeds < LEAST_SEEDS:
        return UNDECIDED, f"{estimate.seeds} training seed{'s' * (estimate.seeds > 1)}, {LEAST_SEEDS} are needed"
    place = f"{border:g}"
    if estimate.low > border:
        return AGREED, f"interval above {place}"
    if estimate.high < border:
        return DISAGREED, f"interval below {place}"
    return UNDECIDED, f"interval holds {place}"


def findings(study: Study, claims: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """One row for each claim and target (or pair of targets), columns FINDING_COLUMNS; a claim that no run measured
    has one row, "not measured", whose `why` names the notebook that would measure it."""
    rows: list[dict[str, Any]] = []
    for claim in claims:
        found = list(claim.evidence(study))
        for each in found:
            said, why = verdict(each.estimate, each.border, each.trained)
            estimate = each.estimate
            rows.append(
                {
                    "claim": claim.key,
                    "target": each.target,
                    "measured": each.measured,
                    "unit": each.unit,
                    "value": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "n": estimate.n,
                    "seeds": estimate.seeds,
                    "run": ", ".join(estimate.runs),
                    "verdict": said,
                    "why": why,
                    "caution": claim.caution,
                }
            )
        if not found:
            missing = " or ".join(f"`{name}`" for name in claim.notebooks)
            why = f"no run of {missing} has the numbers, or not of every target that the claim is on"
            rows.append({"claim": claim.key, "verdict": UNMEASURED, "why": why})
            rows[-1] |= {"caution": claim.caution, "value": np.nan, "low": np.nan, "high": np.nan}
    return pd.DataFrame(rows, columns=list(FINDING_COLUMNS))


def render_findings(study: Study, claims: Sequence[Claim] = CLAIMS) -> str:
    """The page FINDINGS.md as Markdown: an overview, then each claim with its rows, its rule and its caution."""
    table = findings(study, claims)
    source = study.name
    lines = [
        "# Findings",
        "",
        f"Made by `backsight findings {source} FINDINGS.md` from the tables of the runs in `{source}`; no "
        "number here is typed. Each row is a number with its 95 % interval, or the difference of two (interval by the "
        "method of Zou and Donner, 2008, from theirs). The verdict follows from the interval alone: *agreed* where "
        "all of it is on the claim's side, *disagreed* where all of it is on the other, *cannot tell* where it holds "
        f"the border or where fewer than {LEAST_SEEDS} training seeds stand behind a trained inverse. There are many "
        "rows and no correction for their number: one in twenty intervals misses by chance.",
        "",
        f"| claim of the paper | {' | '.join(VERDICTS)} |",
        f"| --- | {' | '.join('---' for _ in VERDICTS)} |",
    ]
    for claim in claims:
        counts = table.loc[table["claim"] == claim.key, "verdict"].value_counts()
        lines.append(f"| {claim.text} | {' | '.join(str(counts.get(said, 0) or '') for said in VERDICTS)} |")
    for number, claim in enumerate(claims, start=1):
        lines += ["", f"## {number}. {_title(claim.key)}", "", claim.text, "", f"A row agrees where {claim.rule}.", ""]
        lines += _table(table[table["claim"] == claim.key])
        lines += ["", f"**Do not conclude:** {claim.caution}"]
    if study.left_out:
        told = "; ".join(f"`{run}` ({why})" for run, why in study.left_out.items())
        lines += ["", f"Runs left out: {told}."]
    return "\n".join(lines) + "\n"


def _title(key: str) -> str:
    return key[0].upper() + key[1:]


def _table(rows: pd.DataFrame) -> list[str]:
    if (rows["verdict"] == UNMEASURED).all():
        return [f"**{UNMEASURED}**: {rows['why'].iloc[0]}."]
    lines = [
        "| target | measured | value [95 % interval] | n / seeds | verdict | run |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows.to_dict("records"):
        value, low, high = (_number(row[column]) for column in ("value", "low", "high"))
        runs = ", ".join(f"`{run}`" for run in str(row["run"]).split(", "))
        lines.append(
            f"| {row['target']} | {row['measured']} | {value} [{low}, {high}] {row['unit']} | "
            f"{row['n']:.0f} / {row['seeds']:.0f} | **{row['verdict']}** ({row['why']}) | {runs} |"
        )
    return lines


def _number(value: float) -> str:
    """Three digits, without the noise that differs between machines; with its sign."""
    if not math.isfinite(value):
        return "none"
    decimals = 2 if abs(value) < 100 else 0
    text = f"{value:.{decimals}f}" if abs(value) >= 0.1 else f"{value:.3f}"
    return text.replace("-", "−") if float(text) else text.replace("-", "")


def write_findings(results: str | Path, path: str | Path) -> Path:
    """Write FINDINGS.md from the runs in a folder; returns its path. Raises BacksightError where there is no run."""
    return write_text(path, render_findings(read_study(results)))
