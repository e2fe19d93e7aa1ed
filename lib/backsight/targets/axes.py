"""From a module's tensor to canonical tokens and back: axis orders, grids, prefix tokens.

Axis orders: B batch, C channels, h w grid, N tokens (prefix tokens first).
    "bchw"  convolutional map     "bnc"  tokens               "nbc"  tokens, sequence first
    "bhwc"  channels-last map     "bcn"  tokens, channels first   "bc"  one vector, a grid of one token

A shape alone has several readings (29 tokens are 4 x 7 behind one token, or 4 x 6 behind five). `survey.py` checks
them: squares of the picture are changed, one at a time, and the token that moves most has to lie there.
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
ORDERS: tuple[Order, ...] = ("bchw", "bhwc", "bnc", "bcn", "nbc", "bc")
LARGEST_PREFIX = 16  # class, distillation and register tokens of any published model
USUAL_PREFIX = 5  # a class token and four registers
# Centres of the squares that are changed, down and across, as shares of the picture, and their side.
SQUARES = ((0.1, 0.3), (0.3, 0.82), (0.55, 0.15), (0.9, 0.6), (0.2, 0.55), (0.7, 0.92), (0.45, 0.45), (0.8, 0.2))
SIDE = 0.125
UNLIKELY = 0.01  # that so many squares are found by chance


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

    @property
    def _canonical(self) -> str:
        return "".join(axis for axis in "bnhwc" if axis in self.order)

    def tokens(self, tensor: Tensor) -> Tokens:
        """Canonical tokens (B, P + N, C). Raises BacksightError where the tensor is not of this form."""
        if self.places is not None:  # some keep their tokens on more axes than one
            tensor = tensor.flatten(1, -2)
        if tensor.ndim != len(self.order):
            raise BacksightError(f"A tensor with the axes {self.order} was expected, not {tuple(tensor.shape)}.")
        values = tensor.permute([self.order.index(axis) for axis in self._canonical])
        values = values.reshape(len(values), -1, values.shape[-1])
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
        sides = dict(zip("bnhwc", (*values.shape[:2], *tokens.grids[0], values.shape[2]), strict=True))
        values = values.reshape([sides[axis] for axis in self._canonical])
        return values.permute([self._canonical.index(axis) for axis in self.order])

    def channels(self, shape: Sequence[int]) -> int:
        return shape[self.order.index("c") - len(self.order)]


def readings(
    shape: Sequence[int], axis: int, size: Grid, order: Order | None = None, grid: Grid | None = None
) -> list[Axes]:
    """The plausible axes of a tensor, the likeliest first; none where it is no representation of a picture.

    axis: of the images; size: (H, W) of the images; order, grid: where they are declared, which then need not be
    plausible. The likeliest have the usual prefix, tokens before channels, a small prefix.
    """
    fitting = [each for each in ORDERS if len(each) == len(shape) and each.index("b") == axis and order in (None, each)]
    found: list[tuple[tuple[bool | int | float, ...], Axes]] = []
    for place, each in enumerate(fitting):
        count = 1 if each == "bc" else shape[each.index("n")] if "n" in each else 0
        if "h" in each:  # a map: the one with the picture's proportions
            own = (shape[each.index("h")], shape[each.index("w")])
            if (grid == own) if grid is not None else (order or own == (1, 1) or _fits(own, size)):
                found.append(((own != (1, 1), abs(own[0] * size[1] / (own[1] * size[0]) - 1), place), Axes(each, own)))
        elif count == 1 and grid in (None, (1, 1)):
            return [Axes(each, (1, 1))]
        elif 1 not in shape or order is not None or grid is not None:  # not N tokens of one channel: a vector
            largest_prefix = 0 if each == "bcn" and not order else LARGEST_PREFIX
            for one in [grid] if grid is not None else _grids(count, size, largest_prefix):
                if (prefix := count - one[0] * one[1]) >= 0:
                    found.append(((prefix > USUAL_PREFIX, place, prefix), Axes(each, one, prefix)))
    return [axes for _, axes in sorted(found, key=lambda pair: pair[0])]


def _fits(grid: Grid, size: Grid) -> bool:
    """The picture's proportions, up to one cell, and not finer than it."""
    if grid[0] > size[0] or grid[1] > size[1]:
        return False
    return abs(grid[0] - grid[1] * size[0] / size[1]) <= 1 or abs(grid[1] - grid[0] * size[1] / size[0]) <= 1


def _grids(count: int, size: Grid, largest_prefix: int) -> list[Grid]:
    """Those of the picture's proportions that `count` tokens can make, behind prefix tokens."""
    found = []
    for height in range(1, min(count, size[0]) + 1):
        middle = round(height * size[1] / size[0])
        for width in [height] if size[0] == size[1] else range(max(1, middle - 1), middle + 2):
            within = 0 <= count - height * width <= largest_prefix
            if within and (height, width) != (1, 1) and _fits((height, width), size):
                found.append((height, width))
    return found


def guess(
    shape: Sequence[int], forms: Sequence[tuple[Grid, int]], size: Grid, usual: Order | None = None
) -> Axes | None:
    """The likeliest axes of a tensor of a model whose intermediate maps have these (grid, channels).

    usual: the order of its other maps, which decides where channels, height and width are alike.
    """
    if len(shape) not in (3, 4):
        return None
    likely = sorted(readings(shape, 0, size), key=lambda axes: "h" in axes.order and axes.order != usual)
    known = [axes for axes in likely if (axes.grid, axes.channels(shape)) in forms]
    # By the shape alone, one token is a class token, and channels before tokens are not believed: PiT's class token has
    # as many channels as a grid could have tokens.
    believed = [axes for axes in likely if axes.grid != (1, 1) and axes.order != "bcn"]
    return next(iter((*known, *believed)), None)


def with_squares(image: Tensor) -> Tensor:
    """(1, C, H, W) to (1 + squares, C, H, W): the picture, then with one square made white (or black)."""
    height, width = image.shape[2:]
    changed = image.repeat(1 + len(SQUARES), 1, 1, 1)
    for number, (down, across) in enumerate(SQUARES, 1):
        top, left = int((down - SIDE / 2) * height), int((across - SIDE / 2) * width)
        rows = slice(top, top + max(1, round(SIDE * height)))
        square = changed[number, :, rows, left : left + max(1, round(SIDE * width))]
        square.fill_(float(square.mean() < 0.5))
    return changed


def squares_found(axes: Axes, tensor: Tensor) -> tuple[int, bool]:
    """How many squares are found where they are, if the tensor is read so; is that more than chance would find?

    tensor: of `with_squares`, and perhaps of more images. A place that every square moves counts less.
    """
    tokens = axes.tokens(tensor).patches.float()
    change = (tokens[1 : 1 + len(SQUARES)] - tokens[:1]).abs().sum(2)
    strongest, most = (change * (change / change.mean(0).clamp(min=1e-30)).square()).max(1)
    height, width = axes.grid
    found, chance = 0, 0.0
    for (down, across), strength, place in zip(SQUARES, strongest.tolist(), most.tolist(), strict=True):
        # A cell is right where it overlaps the square, or nearly so.
        rows = [row for row in range(height) if abs((row + 0.5) / height - down) <= 0.6 / height + SIDE / 2]
        columns = [column for column in range(width) if abs((column + 0.5) / width - across) <= 0.6 / width + SIDE / 2]
        found += place // width in rows and place % width in columns and 0 < strength < float("inf")
        chance += len(rows) * len(columns) / (height * width * len(SQUARES))
    count = len(SQUARES)
    tail = sum(math.comb(count, n) * chance**n * (1 - chance) ** (count - n) for n in range(found, count + 1))
    return found, found >= count - 1 or tail <= UNLIKELY
