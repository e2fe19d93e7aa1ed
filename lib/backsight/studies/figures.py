"""Where the taps of several targets lie side by side, for the figures that compare targets."""

import pandas as pd

from backsight.errors import BacksightError
from backsight.tables.read import QUALITY


def placed(rows: pd.DataFrame, dataset: str | None = None) -> pd.DataFrame:
    """The rows with a value at a tap, in forward order; place: where it lies from the first tap (0) to the last (1).

    dataset: whose rows alone are wanted. Raises BacksightError where there is none.
    """
    rows = rows[rows["tap"].notna() & rows["value"].notna() & ((rows["dataset"] == dataset) | (dataset is None))]
    if rows.empty:
        raise BacksightError(f"no run of {QUALITY} in this study has such rows: run it on {dataset or 'scenes'}.")
    rank = rows.groupby("target")["depth"].rank("dense") - 1
    place = rank / rank.groupby(rows["target"]).transform("max").clip(lower=1)
    return rows.assign(place=place).sort_values("place", kind="stable")
