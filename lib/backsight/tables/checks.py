"""What a reviewer asks of every table, as checks over the runs' tables: one row for each run and question.

Were the reported images of the test split; stands a null beside every score of a reconstruction; has every number a
sound interval; were trained inverses trained with several seeds?
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from backsight.tables.judge import LEAST_SEEDS
from backsight.tables.read import Study

REPORTED_SPLITS = ("test", "all")  # "all": a folder of photographs, none of which trained anything
TRAINED_FAMILIES = ("direct", "modular", "steadied", "map")  # by gradient descent, or from what was
TRAINING = "02_train_inverse"  # one seed a run
# What says how well a reconstruction or a probe does; costs, controls and properties of a target have no null.
SCORES = (
    *("psnr", "ssim", "r2", "mse", "psnr_objects", "psnr_boundary", "psnr_background", "perceptual", "edge_f1"),
    *("mask_iou", "texture_accuracy", "hue_error", "retrieval_top1", "retrieval_rank", "factor_score", "cross_psnr"),
    *("hue_error_shown", "reversion_index"),
)


def checklist(study: Study) -> pd.DataFrame:
    """Every check on every run: columns run, check, holds, detail (what is wrong, or what holds)."""
    rows = []
    for run, table in sorted(study.tables.items()):
        checks = {
            "the split reported is test": _wrong_splits(table),
            "nulls stand beside every score": _without_null(table),
            "every number has an interval": _bad_intervals(table),
        }
        if study.notebooks[run] != TRAINING:
            checks[f"at least {LEAST_SEEDS} training seeds"] = _few_seeds(table)
        for check, problems in checks.items():
            wrong = list(problems)
            detail = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            rows.append((run, check, not wrong, detail or f"{len(table):,} rows hold it"))
    return pd.DataFrame(rows, columns=["run", "check", "holds", "detail"])


def _wrong_splits(table: pd.DataFrame) -> Iterator[str]:
    for split, rows in table.groupby(table["split"].astype(object).fillna("no split"), sort=True):
        allowed = {"test"} if (rows["dataset"] == "scenes").any() else set(REPORTED_SPLITS)
        if split == "train" and "factor" in rows:  # which photograph: no photograph is in two splits (factors.py)
            rows = rows[rows["factor"] != "background"]
        if split not in allowed and len(rows):
            yield f"{len(rows):,} rows are of {split}, as {rows['measure'].iloc[0]}"


def _without_null(table: pd.DataFrame) -> Iterator[str]:
    """Scores without a null of the same target, images, measure and tap. The mean image is the same at every tap."""
    # A target with a space in its name is a variant made to check a measure: it stands beside others as their control.
    scores = table[table["measure"].isin(SCORES) & ~table["target"].astype(str).str.contains(" ")]
    inverse = scores["inverse"].astype(object).fillna("").astype(str)
    keys = [key for key in ("target", "dataset", "measure", "factor") if key in scores]
    where = scores[keys].astype(object).fillna("").astype(str).agg(" ".join, axis="columns").str.strip()
    at = where + " " + scores["tap"].astype(object).fillna("").astype(str)
    null = inverse.str.startswith("null_")
    everywhere = where[null & (scores["tap"].isna() | (inverse == "null_mean"))]
    lacking = ~null & ~at.isin(at[null]) & ~where.isin(everywhere)
    for score in sorted(set(where[lacking])):
        yield f"{score} at {', '.join(sorted(set(scores[lacking & (where == score)]['tap'].astype(str)))[:2])}"


def _bad_intervals(table: pd.DataFrame) -> Iterator[str]:
    """Numbers of several images without an interval, or outside of it, but for the noise of a text file."""
    rows = table[table["value"].notna() & (table["n"] > 1)]
    room = 1e-6 * rows["value"].abs().clip(lower=1)
    outside = (rows["low"] > rows["value"] + room) | (rows["high"] < rows["value"] - room)
    faults = {"no interval": rows[["low", "high"]].isna().any(axis=1), "value outside its interval": outside}
    for fault, wrong in faults.items():
        for measure, group in rows[wrong].groupby("measure", sort=True):
            yield f"{fault}: {measure} ({len(group):,} rows)"


def _few_seeds(table: pd.DataFrame) -> Iterator[str]:
    """Scores of inverses from too few training seeds."""
    scores = table[table["inverse"].isin(TRAINED_FAMILIES) & table["measure"].isin(SCORES) & table["value"].notna()]
    for name, rows in scores[scores["seeds"] < LEAST_SEEDS].groupby("inverse", sort=True):
        yield f"{name} has {rows['seeds'].min()} ({len(rows):,} rows)"
