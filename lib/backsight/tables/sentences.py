"""Numbers of a pooled table in the words of a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from backsight.errors import BacksightError


def row_of(table: pd.DataFrame, measure: str, **columns: Any) -> pd.Series:
    """The one row of a pooled table with this measure and these values. Raises BacksightError where none or several."""
    rows = table[table["measure"] == measure]
    for column, value in columns.items():
        rows = rows[rows[column] == value]
    if len(rows) != 1:
        said = ", ".join(f"{column} {value}" for column, value in columns.items())
        raise BacksightError(f"The table has {len(rows)} rows of {measure} with {said}, not one.")
    return rows.iloc[0]


def number(row: Mapping[Any, Any] | pd.Series, unit: str = "", signed: bool = False) -> str:
    """ "22.1 dB [21.8, 22.4]": a value with its 95 % interval, with as many decimals as its size deserves."""
    value, low, high = (float(row[name]) for name in ("value", "low", "high"))
    size = np.nanmax(np.abs([value, low, high])) if np.isfinite(value) else 0.0
    decimals = 1 if size >= 10 else 2 if size >= 0.1 else 3
    shown = [f"{x:{'+' if signed else ''}.{decimals}f}".replace("-", "−") for x in (value, low, high)]
    unit = unit if not unit or unit in "°%" else f" {unit}"
    interval = f" [{shown[1]}, {shown[2]}]" if np.isfinite([low, high]).all() else " (no interval)"
    return f"{shown[0]}{unit}{interval}"
