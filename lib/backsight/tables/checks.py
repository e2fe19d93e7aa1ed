"""What a reviewer asks of every table, as checks over the runs' tables: one row for each run and question.

Were the reported images of the test split; stands a null beside every score of a reconstruction; has every number a
sound interval; were trained inverses trained with several seeds?
"""

from __future__ import annotations

import pandas as pd

from backsight.tables.judge import LEAST_SEEDS
from backsight.tables.read import Study

TRAINED_FAMILIES = ("direct", "modular", "steadied", "map")  # by gradient descent, or from what was
TRAINING = "02_train_inverse"  # one seed a run
# What says how well a reconstruction or a probe does; costs, controls and properties of a target have no null.
SCORES = (
    *("psnr", "ssim", "r2", "psnr_objects", "psnr_boundary", "psnr_background", "perceptual", "edge_f1", "mask_iou"),
    *("texture_accuracy", "hue_error", "retrieval_top1", "retrieval_rank", "factor_score", "cross_psnr"),
    *("hue_error_shown", "reversion_index", "stitch_r2"),
)


def checklist(study: Study) -> pd.DataFrame:
    """Every check on every run: columns run, check, holds, detail (what is wrong, or what holds)."""
    rows = []
    for (run, notebook), table in study.table.groupby(["run", "notebook"]):
        for check, faults in _faults(table).items():
            if check.endswith("seeds") and notebook == TRAINING:
                continue
            wrong = [f"{fault} ({count:,} rows)" for fault, count in faults.value_counts().sort_index().items()]
            detail = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            rows.append((run, check, not wrong, detail or f"{len(table):,} rows hold it"))
    return pd.DataFrame(rows, columns=["run", "check", "holds", "detail"])


def _faults(table: pd.DataFrame) -> dict[str, pd.Series]:
    """{check: what is wrong with each row for which it does not hold}."""
    texts = ("target", "dataset", "split", "tap", "inverse", "family", "measure", "factor")
    row = table.assign(**table.reindex(columns=texts).astype(object).fillna("").astype(str))
    # Another data set is "all" where it is a folder of photographs, none of which trained anything. Which photograph a
    # picture lies on is asked of the training split, for no photograph is in two (factors.py).
    tested = (row["split"] == "test") | ((row["split"] == "all") & (row["dataset"] != "scenes"))
    tested |= (row["split"] == "train") & (row["factor"] == "background")

    # A null of the same target, images, measure and tap; the mean image is the same at every tap. A target with a
    # space in its name is a variant made to check a measure: it stands beside others as their control. What is told of
    # one picture is no score of an inverse.
    score = row["measure"].isin(SCORES) & (row["n"] > 1) & ~row["target"].str.contains(" ")
    score &= row["inverse"] != "painter"  # a control of 05_colour, which no null can match
    null = row["inverse"].str.startswith("null_")
    what = (row["target"] + " " + row["dataset"] + " " + row["measure"] + " " + row["factor"]).str.strip()
    place = what + " at " + row["tap"]
    everywhere = null & ((row["tap"] == "") | (row["inverse"] == "null_mean"))
    lacking = score & ~null & ~place.isin(place[score & null]) & ~what.isin(what[score & everywhere])

    known = row["value"].notna() & (row["n"] > 1)
    room = 1e-6 * row["value"].abs().clip(lower=1)  # the noise of a text file
    outside = (row["low"] > row["value"] + room) | (row["high"] < row["value"] - room)
    fault = outside.map({True: "value outside its interval: ", False: "no interval: "}) + row["measure"]

    # Of random weights, too, an inverse is trained, whose name then is the null's family.
    inverse = row["inverse"].where(row["inverse"] != "null_untrained", row["family"])
    few = inverse.isin(TRAINED_FAMILIES) & score & row["value"].notna() & (row["seeds"] < LEAST_SEEDS)
    of = inverse + null.map({True: ", untrained target,", False: ""}) + " has " + row["seeds"].astype(str)
    return {
        "the split reported is test": ("of split " + row["split"].replace("", "none"))[~tested],
        "nulls stand beside every score": place[lacking],
        "every number has an interval": fault[known & (outside | row[["low", "high"]].isna().any(axis=1))],
        f"at least {LEAST_SEEDS} training seeds": of[few],
    }
