"""Tidy rows of values that no study stores, and the nulls of one family."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from backsight.errors import BacksightError
from backsight.tables.values import METRIC_COLUMNS

DRAWS_AT_ONCE = 2**21  # numbers of a bootstrap held in memory


def metrics_rows(
    values: Tensor | np.ndarray | Sequence[float],
    measure: str,
    seed: int = 0,
    clusters: Sequence[Any] | None = None,
    **columns: Any,
) -> list[dict[str, Any]]:
    """One tidy row: the mean of the values over images with its 95 % interval, and their number.

    values: (B,); columns: the other METRIC_COLUMNS (target, weights, dataset, split, tap, depth, inverse) and
    whatever a study adds. Columns that are not given are empty.
    """
    numbers = _numbers(values)
    defined = numbers[~np.isnan(numbers)]
    low, high = bootstrap_interval(numbers, seed, clusters=clusters)
    value = float(defined.mean()) if len(defined) else float("nan")
    return [metrics_row(measure, value, low, high, len(defined), seed, **columns)]


def metrics_row(
    measure: str, value: float, low: float, high: float, n: int, seed: int = 0, **columns: Any
) -> dict[str, Any]:
    """One tidy row of a value that has its interval already, such as `r2`."""
    row: dict[str, Any] = dict.fromkeys(METRIC_COLUMNS)
    row |= {"measure": measure, "value": value, "low": low, "high": high, "n": n, "seed": seed}
    return row | columns


def bootstrap_interval(
    values: Tensor | np.ndarray | Sequence[float],
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 1000,
    clusters: Tensor | np.ndarray | Sequence[Any] | None = None,
) -> tuple[float, float]:
    """(low, high): percentile bootstrap interval of the mean over images.

    values: (B,); NaN values (a measure that does not exist for an image) are left out. clusters: (B,) labels,
    such as the training seed of each value: whole clusters are resampled, so that images that share one are
    not taken for independent. A single value gives an interval of zero length; none gives NaN.
    """
    numbers = _numbers(values)
    if not 0 < level < 1:
        raise BacksightError(f"The level of an interval lies between 0 and 1, but level is {level}.")
    labels = np.arange(len(numbers)) if clusters is None else np.asarray(clusters)
    if labels.shape != numbers.shape:
        raise BacksightError(
            f"bootstrap_interval() needs one cluster for each value, not {labels.shape} for {numbers.shape}."
        )
    defined = ~np.isnan(numbers)
    if not defined.any():
        return float("nan"), float("nan")
    _, group = np.unique(labels[defined], return_inverse=True)
    return _interval_of_ratio(np.bincount(group, weights=numbers[defined]), np.bincount(group), seed, level, resamples)


def _interval_of_ratio(
    numerator: np.ndarray, denominator: np.ndarray, seed: int, level: float, resamples: int
) -> tuple[float, float]:
    """Percentile interval of sum(numerator) / sum(denominator), both resampled together."""
    generator = np.random.default_rng(seed)
    ratios = []
    for start in range(0, resamples, step := max(1, DRAWS_AT_ONCE // len(numerator))):
        drawn = generator.integers(len(numerator), size=(min(step, resamples - start), len(numerator)))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(numerator[drawn].sum(1) / denominator[drawn].sum(1))
    every = np.concatenate(ratios)
    low, high = np.quantile(every[np.isfinite(every)], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _numbers(values: Tensor | np.ndarray | Sequence[float]) -> np.ndarray:
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, float)
    if array.ndim != 1 or not len(array):
        raise BacksightError(f"One value for each of at least one image is needed, not an array {array.shape}.")
    return array
