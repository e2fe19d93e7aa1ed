"""Numbers in words."""

import pandas as pd
import pytest

from backsight.errors import BacksightError
from backsight.tables.sentences import number, row_of


def test_a_number_keeps_the_decimals_that_its_size_deserves() -> None:
    assert number({"value": 22.14, "low": 21.83, "high": 22.48}, "dB") == "22.1 dB [21.8, 22.5]"
    assert number({"value": -0.124, "low": -0.19, "high": 0.058}, "dB", signed=True) == "−0.12 dB [−0.19, +0.06]"
    assert number({"value": 0.05, "low": 0.0123, "high": 0.0987}) == "0.050 [0.012, 0.099]"
    assert number({"value": 47.0, "low": float("nan"), "high": float("nan")}, "°") == "47.0° (no interval)"


def test_one_row_of_a_table_or_a_sentence_of_why_not() -> None:
    table = pd.DataFrame({"measure": ["psnr", "psnr", "ssim"], "tap": ["a", "b", "a"], "value": [1.0, 2.0, 3.0]})
    assert row_of(table, "psnr", tap="b").value == 2.0
    with pytest.raises(BacksightError, match="has 0 rows of psnr with tap c"):
        row_of(table, "psnr", tap="c")
