"""Intervals over training seeds and images."""

import numpy as np
import pytest
import torch

from backsight.errors import BacksightError
from backsight.tables.pool import bootstrap_interval, bootstrap_statistic, pooled_interval, pooled_ratio, pooled_rows


def test_the_mean_lies_in_its_interval_and_counts_are_right() -> None:
    values = {seed: torch.arange(40.0) + 10 * seed for seed in range(3)}
    (row,) = pooled_rows(values, "psnr", target="t", tap="a")
    assert row["value"] == pytest.approx(29.5)
    assert row["low"] < row["value"] < row["high"]
    assert (row["n"], row["seeds"], row["target"]) == (40, 3, "t")


def test_seeds_that_differ_widen_the_interval() -> None:
    generator = np.random.default_rng(0)
    images = generator.normal(size=200)
    alike = np.stack([images] * 3)
    apart = alike + np.array([[-1.0], [0.0], [1.0]])
    narrow, wide = pooled_interval(alike), pooled_interval(apart)
    assert narrow[0] == pytest.approx(wide[0])
    assert wide[2] - wide[1] > 2 * (narrow[2] - narrow[1])
    assert wide[2] - wide[1] > 1  # the spread of the seeds, however many images there are


def test_one_seed_is_the_bootstrap_over_images() -> None:
    values = np.random.default_rng(1).normal(size=500)
    _, low, high = pooled_interval(values)
    np.testing.assert_allclose((low, high), bootstrap_interval(values), atol=0.02)


def test_images_without_a_value_are_left_out() -> None:
    values = np.array([[1.0, np.nan, 3.0], [1.0, np.nan, np.nan]])
    (row,) = pooled_rows(values, "hue_error")
    assert row["n"] == 2
    assert row["value"] == pytest.approx(5 / 3)
    (empty,) = pooled_rows(np.full((2, 3), np.nan), "hue_error")
    assert empty["n"] == 0
    assert np.isnan([empty["value"], empty["low"], empty["high"]]).all()


def test_the_ratio_of_sums() -> None:
    value, low, high = pooled_ratio(np.array([[1.0, 2.0, 3.0]]), np.array([[2.0, 4.0, 6.0]]))
    assert value == low == high == 0.5


def test_a_statistic_of_images_and_its_clusters() -> None:
    values = np.repeat([0.0, 1.0, 2.0, 3.0], 25)
    low, high = bootstrap_statistic(lambda drawn: values[drawn].mean(), 100)
    wide_low, wide_high = bootstrap_statistic(lambda drawn: values[drawn].mean(), 100, clusters=np.repeat(range(4), 25))
    assert wide_low < low < 1.5 < high < wide_high
    lows, highs = bootstrap_statistic(lambda drawn: [values[drawn].mean(), 7.0], 100)
    assert lows.shape == highs.shape == (2,)
    assert lows[1] == highs[1] == 7.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: pooled_interval({0: [1.0, 2.0], 1: [1.0]}),
        lambda: pooled_interval([]),
        lambda: pooled_interval([1.0], level=1.5),
        lambda: pooled_ratio([1.0, 2.0], [1.0]),
        lambda: bootstrap_statistic(lambda drawn: 0.0, 0),
        lambda: bootstrap_statistic(lambda drawn: 0.0, 3, clusters=[0, 1]),
    ],
)
def test_bad_tables_are_refused(call) -> None:
    with pytest.raises(BacksightError):
        call()
