"""The table of a run: one value an image, tap, inverse, training seed and measure, and nothing pooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd

from backsight.errors import BacksightError
from backsight.project import write_atomically

if TYPE_CHECKING:  # torch takes seconds to load, and the page of a run needs none of it
    from torch import Tensor

    Numbers = Tensor | np.ndarray | Sequence[float]

# Of the tidy table of every run, in this order; a study adds columns of its own behind them.
METRIC_COLUMNS = (
    *("target", "weights", "dataset", "split", "tap", "depth", "inverse"),
    *("measure", "value", "low", "high", "n", "seed"),
)
# What tells one value of a table from another of the same row of figures.
UNITS = ("image", "photograph", "train_seed")
COLUMNS = (
    *("target", "weights", "dataset", "split", "image", "photograph"),
    *("tap", "depth", "inverse", "train_seed", "measure", "value"),
)
MEASURED = ("value", "weight")
NO_SEED = -1  # train_seed of what was not trained


class Described(Protocol):
    """What a table says of a target."""

    name: str
    weights: str

    def depth(self, tap: str) -> float: ...


@dataclass
class Values:
    """Values in the making: what they have in common is said once.

    images: names of the N images, in the order in which values are given; photographs: (N,) what each was made from
    (crops of one photograph are not independent), default the images themselves.
    """

    target: Described
    dataset: str
    split: str
    images: Sequence[Any]
    photographs: Sequence[Any] | None = None
    _parts: list[tuple[dict[str, Any], np.ndarray, np.ndarray, list[Any]]] = field(default_factory=list)

    def add(
        self,
        measure: str,
        values: Numbers | Mapping[int, Numbers],
        tap: str | None = None,
        inverse: str | None = None,
        *,
        weight: Numbers | None = None,
        clusters: Sequence[Any] | np.ndarray | None = None,
        **columns: Any,
    ) -> None:
        """(N',) values of the first N' images, or {training seed: (N',)}; NaN: an image without this measure.

        weight: (N',) how much each value counts where they are pooled. With value = 1 − error / total and weight =
        total the mean is the R² of all images; with value = hits / trials and weight = trials it is their share.
        clusters: (N',) what is drawn for an interval, in the place of the photographs.
        """
        common: dict[str, Any] = {"target": self.target.name, "weights": self.target.weights}
        common |= {"dataset": self.dataset, "split": self.split, "tap": tap, "inverse": inverse, "measure": measure}
        common["depth"] = None if tap is None else self.target.depth(tap)
        drawn = next(names for names in (clusters, self.photographs, self.images) if names is not None)
        for train_seed, numbers in (values if isinstance(values, Mapping) else {NO_SEED: values}).items():
            array = _numbers(numbers)
            weights = np.ones(len(array)) if weight is None else _numbers(weight)
            row = {**common, **columns, "train_seed": train_seed}
            self._parts.append((row, array, weights, list(drawn[: len(array)])))

    def table(self) -> pd.DataFrame:
        """One row a value: COLUMNS, weight, and those of the study; train_seed is NO_SEED where nothing was trained."""
        rows, arrays, weights, clusters = zip(*self._parts, strict=True)
        counts = [len(array) for array in arrays]
        table = pd.DataFrame(list(rows)).loc[np.repeat(np.arange(len(counts)), counts)].reset_index(drop=True)
        table["image"] = [name for count in counts for name in self.images[:count]]
        table["photograph"] = [name for names in clusters for name in names]
        table["value"], table["weight"] = np.concatenate(arrays), np.concatenate(weights)
        return table.dropna(subset="value")[[*COLUMNS, *(name for name in table if name not in COLUMNS)]]


def _numbers(values: Numbers) -> np.ndarray:
    array = np.asarray(values.detach().cpu().double() if hasattr(values, "detach") else values, float)
    if array.ndim != 1:
        raise BacksightError(f"One value an image is needed, not an array of shape {array.shape}.")
    return array


def write_values(path: Path, values: pd.DataFrame) -> pd.DataFrame:
    """Write a table of values as Parquet, packed well, and return it as it is there: its numbers are float32."""
    values = values.astype(dict.fromkeys(MEASURED, "float32"))
    names = [name for name in values if name not in MEASURED]
    packing: dict[str, Any] = {"compression": "zstd", "compression_level": 15, "use_dictionary": names}
    split = dict.fromkeys(MEASURED, "BYTE_STREAM_SPLIT")  # numbers, byte by byte of all: what repeats stands together
    write_atomically(path, lambda file: values.to_parquet(file, index=False, column_encoding=split, **packing))
    return values
