"""From a module's tensor to canonical tokens and back: axis orders, prefix tokens, permuted tokens.

Axis orders: B batch, C channels, h w grid, N tokens (prefix tokens first).
    "bchw"  convolutional map     "bnc"  tokens               "nbc"  tokens, sequence first
    "bhwc"  channels-last map     "bcn"  tokens, channels first   "bc"  one vector, a grid of one token
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.representation import Grid, Tokens

Order = Literal["bchw", "bhwc", "bnc", "bcn", "nbc", "bc"]
LARGEST_PREFIX = 16  # class, distillation and register tokens of any published model
USUAL_PREFIX = 5  # a class token and four registers: with more, channels-first tokens without any are likelier


@dataclass(frozen=True)
class Axes:
    """How a module's tensor is to be read.

    order: of its axes; grid: (h, w); prefix: tokens before the grid's; places: for each grid token in row-major
    order, its place among the tensor's tokens behind the prefix (None: they are in row-major order).
    """

    order: Order
    grid: Grid
    prefix: int = 0
    places: tuple[int, ...] | None = None

    def tokens(self, tensor: Tensor) -> Tokens:
        """Canonical tokens (B, P + N, C). Raises BacksightError where the tensor is not of this form."""
        if tensor.ndim != len(self.order):
            raise BacksightError(
                f"A tensor with the axes {self.order} was expected, not the shape {tuple(tensor.shape)}."
            )
        if self.order == "bchw":
            values = tensor.flatten(2).transpose(1, 2)
        elif self.order == "bhwc":
            values = tensor.flatten(1, 2)
        elif self.order == "bcn":
            values = tensor.transpose(1, 2)
        elif self.order == "nbc":
            values = tensor.transpose(0, 1)
        else:
            values = tensor.unsqueeze(1) if self.order == "bc" else tensor
        if self.places is not None:
            patches = values[:, self.prefix :][:, torch.tensor(self.places, device=values.device)]
            values = torch.cat([values[:, : self.prefix], patches], dim=1)
        return Tokens(values, (self.grid,), self.prefix)

    def tensor(self, tokens: Tokens) -> Tensor:
        """The tensor that `tokens` would make these tokens of."""
        values = tokens.values
        if self.places is not None:
            order = torch.tensor(self.places, device=values.device).argsort()
            values = torch.cat([tokens.prefix_values, tokens.patches[:, order]], dim=1)
        if self.order == "bchw":
            return values.transpose(1, 2).unflatten(2, self.grid)
        if self.order == "bhwc":
            return values.unflatten(1, self.grid)
        if self.order == "bcn":
            return values.transpose(1, 2)
        if self.order == "nbc":
            return values.transpose(0, 1)
        return values.squeeze(1) if self.order == "bc" else values


def guess_axes(
    shape: Sequence[int], batch: int, size: Grid, channels: int | None = None, grid: Grid | None = None
) -> Axes | None:
    """The most plausible axes of a tensor of this shape, or None where it is no representation of a picture.

    batch: images in the pass (2 or more tells a batch axis from others); size: (H, W) of the images; channels, grid:
    where they are known. Of several readings, tokens before channels come first (unless they need an unusual number of
    prefix tokens and channels before tokens need none), then the fewest prefix tokens, then the finest grid.
    """
    if len(shape) == 2 and shape[0] == batch:
        return Axes("bc", (1, 1))
    if len(shape) == 4 and shape[0] == batch:
        return _map_axes(shape, size, channels, grid)
    if len(shape) != 3 or batch not in shape[:2]:
        return None
    sequence_first = shape[0] != batch
    ends = (shape[0], shape[2]) if sequence_first else (shape[1], shape[2])
    readings: list[tuple[bool, int, int, Axes]] = []
    for place, (count, width) in enumerate((ends, ends[::-1])):
        if (channels is not None and width != channels) or (sequence_first and place):
            continue
        order: Order = "nbc" if sequence_first else "bcn" if place else "bnc"
        for each in [grid] if grid is not None else _grids(size):
            prefix = count - each[0] * each[1]
            if 0 <= prefix <= LARGEST_PREFIX and (order != "bcn" or prefix == 0):
                readings.append((prefix > USUAL_PREFIX, place, prefix, Axes(order, each, prefix)))
    return min(readings, key=lambda reading: reading[:3])[3] if readings else None


def _map_axes(shape: Sequence[int], size: Grid, channels: int | None, grid: Grid | None) -> Axes | None:
    first, last = Axes("bchw", (shape[2], shape[3])), Axes("bhwc", (shape[1], shape[2]))
    if grid is not None:
        return next((each for each in (first, last) if each.grid == grid), None)
    if channels is not None and (shape[1] == channels) != (shape[3] == channels):
        return first if shape[1] == channels else last
    return min((first, last), key=lambda each: abs(math.log(each.grid[0] * size[1] / (each.grid[1] * size[0]))))


def _grids(size: Grid) -> list[Grid]:
    """Grids that a stride makes of an image, rounding either way, the finest first; a single token is none."""
    found: dict[Grid, None] = {}
    for stride in range(1, max(size) + 1):
        found[math.ceil(size[0] / stride), math.ceil(size[1] / stride)] = None
        found[max(1, size[0] // stride), max(1, size[1] // stride)] = None
    return [grid for grid in found if grid != (1, 1)]
