"""Intervals over training seeds and images: what every number of a study carries.

A study trains its inverses with several seeds and judges all of them on the same images. Both were drawn, so both are
drawn again: seeds as clusters, and images, which all seeds share.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from backsight.errors import BacksightError
from backsight.tables.values import METRIC_COLUMNS

RESAMPLES = 1000
LEVEL = 0.95
DRAWS_AT_ONCE = 2**21  # numbers of a bootstrap held in memory
Values = Tensor | np.ndarray | Sequence[Any]


def pooled_rows(
    values: Mapping[int, Values] | Values, measure: str, seed: int = 0, **columns: Any
) -> list[dict[str, Any]]:
    """One tidy row: the mean over training seeds and images, with its 95 % interval.

    values: {training seed: (N,)} or (S, N), one value an image, NaN where an image has none; seed: of the bootstrap;
    columns: as of `measures.metrics_row`. `n` counts the images that have a value in any seed, `seeds` the training
    seeds. The interval is NaN where nothing has a value.
    """
    table = as_table(values)
    value, low, high = pooled_interval(table, seed)
    images = int((~np.isnan(table)).any(0).sum())
    return [metrics_row(measure, value, low, high, images, seed, seeds=len(table), **columns)]


def pooled_interval(
    values: Mapping[int, Values] | Values, seed: int = 0, level: float = LEVEL, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """(mean, low, high) over (S, N) values of S training seeds for N images: a bootstrap of seeds and of images.

    Each resample draws S seeds and N images with replacement; the images drawn are the same for every seed, since
    seeds were judged on the same images. With one seed it is the bootstrap over images alone, and says nothing of how
    training varies. NaN: an image without a value. Source: Davison & Hinkley, Bootstrap Methods, 3.8 (crossed units).
    """
    return pooled_ratio(table := as_table(values), np.ones_like(table), seed, level, resamples)


def pooled_ratio(
    numerator: Mapping[int, Values] | Values,
    denominator: Mapping[int, Values] | Values,
    seed: int = 0,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> tuple[float, float, float]:
    """(value, low, high) of sum(numerator) / sum(denominator), both (S, N), such as the 1 - R² of a set of images."""
    above, below = as_table(numerator), as_table(denominator)
    if above.shape != below.shape:
        raise BacksightError(f"pooled_ratio() needs two tables of one shape, not {above.shape} and {below.shape}.")
    if not 0 < level < 1:
        raise BacksightError(f"The level of an interval lies between 0 and 1, but level is {level}.")
    seen = ~(np.isnan(above) | np.isnan(below))
    above, below = np.where(seen, above, 0.0), np.where(seen, below, 0.0)
    if below.sum() == 0:
        return float("nan"), float("nan"), float("nan")
    ratios = []
    for by_seed, by_image in _draws(seed, resamples, *above.shape):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(((by_seed @ above) * by_image).sum(1) / ((by_seed @ below) * by_image).sum(1))
    every = np.concatenate(ratios)
    low, high = np.quantile(every[np.isfinite(every)], [(1 - level) / 2, (1 + level) / 2])
    return float(above.sum() / below.sum()), float(low), float(high)


def bootstrap_statistic(
    statistic: Callable[[np.ndarray], Any],
    count: int,
    seed: int = 0,
    resamples: int = 300,
    clusters: Sequence[Any] | np.ndarray | None = None,
    level: float = LEVEL,
) -> tuple[Any, Any]:
    """(low, high) of a statistic of images, such as a CKA, a slope or an average precision.

    statistic: of the indices (integers, some of them several times) of the images drawn, a number or an array;
    clusters: (count,) labels; whole clusters are drawn. Resamples in which a value is NaN do not count for it.
    """
    if count < 1:
        raise BacksightError("bootstrap_statistic() needs at least one image.")
    groups = _members(np.arange(count) if clusters is None else np.asarray(clusters), count)
    generator = np.random.default_rng(seed)
    drawn = [
        np.concatenate([groups[i] for i in generator.integers(len(groups), size=len(groups))]) for _ in range(resamples)
    ]
    every = np.stack([np.asarray(statistic(indices), float) for indices in drawn])
    if np.isnan(every).all():
        return np.nan, np.nan
    low, high = np.nanquantile(every, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return (float(low), float(high)) if every.ndim == 1 else (low, high)


def as_table(values: Mapping[int, Values] | Values) -> np.ndarray:
    """(S, N) float64 from {seed: (N,)}, (S, N) or, of one seed, (N,)."""
    if isinstance(values, Mapping):
        if len({len(each) for each in values.values()}) > 1:
            raise BacksightError("Every training seed needs one value for each of the same images.")
        values = [_numpy(each) for each in values.values()]
    table = np.atleast_2d(np.asarray(_numpy(values), float))
    if table.ndim != 2 or not table.size:
        raise BacksightError(f"Values need the shape (seeds, images) with at least one of each, not {table.shape}.")
    return table


def _numpy(values: Any) -> Any:
    return values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values


def _draws(seed: int, resamples: int, seeds: int, images: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """How often each resample draws each training seed and each image: (draws, seeds), (draws, images), in parts."""
    if resamples * images <= DRAWS_AT_ONCE // 8:  # a study asks for the same draws thousands of times
        return _kept_draws(seed, resamples, seeds, images)
    return _made_draws(seed, resamples, seeds, images)


@lru_cache(maxsize=16)
def _kept_draws(*key: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    return tuple(_made_draws(*key))


def _made_draws(seed: int, resamples: int, seeds: int, images: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, step := max(1, DRAWS_AT_ONCE // images)):
        draws = min(step, resamples - start)
        yield _weights(generator, draws, seeds), _weights(generator, draws, images)


def _weights(generator: np.random.Generator, draws: int, count: int) -> np.ndarray:
    """(draws, count): how often each of `count` units is drawn in each of the resamples."""
    drawn = generator.integers(count, size=(draws, count)) + count * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * count).reshape(draws, count).astype(float)


def _members(labels: np.ndarray, count: int) -> list[np.ndarray]:
    if labels.shape != (count,):
        raise BacksightError(f"bootstrap_statistic() needs one cluster for each of {count} images, not {labels.shape}.")
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


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
