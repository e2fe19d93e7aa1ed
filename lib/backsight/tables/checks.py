"""What a reviewer asks of every table, as checks over the CSV files: one row for each run and question.

The questions: were the reported images of the test split; stands a null beside every score of a reconstruction; has
every number a sound interval; were trained inverses trained with several seeds; can the seed be set; and were
families that are compared given the same images, steps, seeds and learning rates.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pandas as pd

from backsight.tables.claims import LEAST_SEEDS
from backsight.tables.read import EFFICIENCY, STUDIES, Study, used_columns

CHECKLIST_COLUMNS = ("run", "check", "holds", "detail")
REPORTED_SPLITS = ("test", "all")  # "all": a folder of photographs, none of which trained anything
SEEDED_FAMILIES = ("linear", "direct", "modular")  # fitted or trained once a seed, with what is named after them
TRAINED_FAMILIES = ("direct", "modular")  # by gradient descent, at a learning rate
# What says how well a reconstruction or a probe does; costs, controls and properties of a target have no null.
SCORES = (
    "psnr",
    "ssim",
    "r2",
    "mse",
    "psnr_objects",
    "psnr_boundary",
    "psnr_background",
    "perceptual",
    "edge_f1",
    "mask_iou",
    "texture_accuracy",
    "hue_error",
    "retrieval_top1",
    "retrieval_rank",
    "factor_score",
    "cross_psnr",
    "hue_error_shown",
    "reversion_index",
)
# Counted, not estimated: a number of these measures has no interval.
COUNTED = ("flops", "seconds", "parameters", "steps", "chance", "learning_rate")
SEARCH = "search"  # the part of the efficiency study that chooses learning rates
MATCHED = ("steps", "seeds", "n")  # what compared families must share
TOLERANCE = 1e-6  # of intervals of values that are all equal, after a round trip through text


def checklist(study: Study, notebooks: tuple[str, ...] = STUDIES) -> pd.DataFrame:
    """Every check on every run of these notebooks: columns run, check, holds, detail (what is wrong, or what holds)."""
    rows: list[dict[str, Any]] = []
    for run, raw in sorted(study.tables.items()):
        notebook = study.notebooks[run]
        if notebook not in notebooks:
            continue
        table = used_columns(raw).assign(inverse=raw["inverse"].astype(object).fillna(""))
        checks = [
            ("the split reported is test", _wrong_splits(table)),
            ("nulls stand beside every score", _without_null(table)),
            ("every number has an interval", _bad_intervals(table)),
            (f"at least {LEAST_SEEDS} training seeds", _few_seeds(table)),
            ("the seed is recorded", _seedless(table)),
        ]
        if notebook == EFFICIENCY:
            checks.append(("compared families are matched", _unmatched(table)))
        for check, problems in checks:
            wrong = list(problems)
            detail = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            rows.append(
                {"run": run, "check": check, "holds": not wrong, "detail": detail or f"{len(table):,} rows hold it"}
            )
    return pd.DataFrame(rows, columns=list(CHECKLIST_COLUMNS))


def _wrong_splits(table: pd.DataFrame) -> Iterator[str]:
    for split, rows in table.groupby(table["split"].astype(object).fillna("no split"), sort=True):
        allowed = {"test"} if (rows["dataset"] == "scenes").any() else set(REPORTED_SPLITS)
        if split == "train" and "factor" in rows:  # which photograph: no photograph is in two splits (factors.py)
            rows = rows[rows["factor"] != "background"]
        if split == "validation" and "part" in rows:  # where learning rates were searched: said to be so, not reported
            rows = rows[rows["part"] != SEARCH]
        if split not in allowed and len(rows):
            yield f"{len(rows):,} rows are of {split}, as {rows['measure'].iloc[0]}"


def _without_null(table: pd.DataFrame) -> Iterator[str]:
    """Scores of a measure that have no null of the same target, images and measure, at the same tap where taps count.

    The mean image, which is the same at every tap, counts for all of them, and so does a null without a tap.
    """
    # A target with a space in its name is a variant made to check a measure: it stands beside others as their control.
    scores = table[table["measure"].isin(SCORES) & ~table["target"].astype(str).str.contains(" ")].copy()
    if scores.empty:
        return
    null = scores["inverse"].astype(str).str.startswith("null_")
    keys = [key for key in ("target", "dataset", "measure", "factor") if key in scores]
    words = scores[keys].astype(object).fillna("").astype(str)
    scores["where"] = [" ".join(filter(None, line)) for line in words.itertuples(index=False)]
    taps = scores["tap"]
    scores["at"] = scores["where"] + " " + taps.astype(object).fillna("").astype(str)
    placed = set(scores.loc[null, "at"])
    everywhere = set(scores.loc[null & (taps.isna() | (scores["inverse"] == "null_mean")), "where"])
    lacking = scores[~null & ~scores["at"].isin(placed) & ~scores["where"].isin(everywhere)]
    for where, rows in lacking.groupby("where", sort=True):
        yield f"{where} at {', '.join(sorted(set(rows['tap'].astype(object).fillna('no tap')))[:2])}"


def _bad_intervals(table: pd.DataFrame) -> Iterator[str]:
    """Values without an interval, outside of it, or of a single image. A value that is NaN (nothing could be
    measured, such as the hue of a grey object) needs none."""
    rows = table[table["value"].notna() & ~table["measure"].isin(COUNTED)]
    bounds = rows.reindex(columns=["low", "high"])
    room = TOLERANCE * rows["value"].abs().clip(lower=1)
    faults = {
        "no interval": bounds.isna().any(axis=1),
        "value outside its interval": (bounds["low"] > rows["value"] + room) | (bounds["high"] < rows["value"] - room),
        "fewer than two images": ~(rows["n"] > 1),
    }
    for fault, wrong in faults.items():
        for measure, group in rows[wrong].groupby("measure", sort=True):
            yield f"{fault}: {measure} ({len(group):,} rows)"


def _few_seeds(table: pd.DataFrame) -> Iterator[str]:
    """Scores of inverses from too few training seeds; a value that is NaN says nothing and is let pass."""
    family = table["inverse"].astype(str).str.split("_").str[0]
    # A control beside the scored families may have fewer: claims.py then says "cannot tell".
    family = family.where(table["inverse"] != "linear_uniform")
    trained = table[family.isin(SEEDED_FAMILIES) & table["value"].notna() & ~table["measure"].isin(COUNTED)]
    if "part" in trained:  # neither the search on validation nor a handful of optimised images is reported as a score
        trained = trained[~trained["part"].isin([SEARCH, "per_image"])]
    few = trained[trained["seeds"] < LEAST_SEEDS]
    for name, rows in few.groupby("inverse", sort=True):
        yield f"{name} has {rows['seeds'].min()} ({len(rows):,} rows)"


def _seedless(table: pd.DataFrame) -> Iterator[str]:
    if count := int(table["seed"].isna().sum()):
        yield f"{count:,} rows have no seed"


def _unmatched(table: pd.DataFrame) -> Iterator[str]:
    """What differs between the trained families of the efficiency study: of each target and start, the sets of steps,
    numbers of seeds and judged images."""
    trained = table[table["inverse"].isin(TRAINED_FAMILIES) & (table["measure"] == "psnr")]
    if "part" in trained:
        trained = trained[trained["part"].isin([SEARCH, "curve", "data"])]
    if trained["inverse"].nunique() < 2:
        yield f"only {', '.join(sorted(set(trained['inverse']))) or 'no family'} was scored: nothing is compared"
        return
    keys = [key for key in ("target", "part", "start") if key in trained]
    for group, rows in trained.groupby(keys, sort=True):
        where = [str(word) for word in group]
        for column in MATCHED:
            sets = [(name, sorted(set(of[column].dropna()))) for name, of in rows.groupby("inverse", sort=True)]
            for (first, some), (second, others) in pairwise(sets):
                if some != others:
                    yield f"{' '.join(where)}: {column} of {first} is {_told(some)}, of {second} {_told(others)}"


def _told(values: list[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "none"
