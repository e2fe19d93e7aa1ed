"""From a module's tensor to canonical tokens and back: axis orders, grids, prefix tokens, permuted tokens.

Axis orders: B batch, C channels, h w grid, N tokens (prefix tokens first).
    "bchw"  convolutional map     "bnc"  tokens               "nbc"  tokens, sequence first
    "bhwc"  channels-last map     "bcn"  tokens, channels first   "bc"  one vector, a grid of one token

A shape alone has several readings (29 tokens are 4 x 7 behind one token, or 4 x 6 behind five). Where a pass can be
made, a reading is checked: squares of the picture are changed, one at a time, and the token that moves most has to lie
there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.representation import Grid, Tokens

Order = Literal["bchw", "bhwc", "bnc", "bcn", "nbc", "bc"]
LARGEST_PREFIX = 16  # class, distillation and register tokens of any published model
USUAL_PREFIX = 5  # a class token and four registers
EQUAL = 1e-5  # of the largest value: the same numbers, from two passes
# Centres of the squares that are changed, down and across, as shares of the picture, and their side.
SQUARES = ((0.1, 0.3), (0.3, 0.82), (0.55, 0.15), (0.9, 0.6), (0.2, 0.55), (0.7, 0.92), (0.45, 0.45), (0.8, 0.2))
SIDE = 0.125
UNLIKELY = 0.01  # that so many squares are found by chance


@dataclass(frozen=True)
class Axes:
    """How a module's tensor is to be read.

    order: of its axes; grid: (h, w); prefix: tokens before the grid's; places: for each grid token in row-major
    order, its place among the tensor's tokens behind the prefix (None: they are in row-major order); windows: the
    tensor's shape without batch, where it keeps its tokens on more axes than `order` has.
    """

    order: Order
    grid: Grid
    prefix: int = 0
    places: tuple[int, ...] | None = None
    windows: tuple[int, ...] | None = None

    def tokens(self, tensor: Tensor) -> Tokens:
        """Canonical tokens (B, P + N, C). Raises BacksightError where the tensor is not of this form."""
        values = tensor if self.windows is None else tensor.flatten(1, -2)
        if values.ndim != len(self.order):
            raise BacksightError(f"A tensor with the axes {self.order} was expected, not {tuple(tensor.shape)}.")
        if self.order == "bchw":
            values = values.flatten(2).transpose(1, 2)
        elif self.order == "bhwc":
            values = values.flatten(1, 2)
        elif self.order in ("bcn", "nbc"):
            values = values.transpose(1, 2) if self.order == "bcn" else values.transpose(0, 1)
        elif self.order == "bc":
            values = values.unsqueeze(1)
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
        if self.windows is not None:
            return values.reshape(len(values), *self.windows)
        if self.order in ("bchw", "bcn"):
            values = values.transpose(1, 2)
            return values.unflatten(2, self.grid) if self.order == "bchw" else values
        if self.order == "bhwc":
            return values.unflatten(1, self.grid)
        if self.order == "nbc":
            return values.transpose(0, 1)
        return values.squeeze(1) if self.order == "bc" else values

    def channels(self, shape: Sequence[int]) -> int:
        return shape[-1] if self.windows is not None else shape[self.order.index("c")]


def readings(
    shape: Sequence[int], axis: int, size: Grid, order: Order | None = None, grid: Grid | None = None
) -> list[Axes]:
    """The plausible axes of a tensor, the likeliest first; none where it is no representation of a picture.

    axis: of the images; size: (H, W) of the images; order, grid: where they are declared, which then need not be
    plausible. The likeliest have the usual prefix, tokens before channels, a grid that a stride makes, a small prefix.
    """
    orders: list[Order] = [each for each in _ORDERS if len(each) == len(shape) and each.index("b") == axis]
    found: list[tuple[tuple[bool | int | float, ...], Axes]] = []
    for place, each in enumerate(orders if order is None else [one for one in orders if one == order]):
        count = 1 if each == "bc" else shape[each.index("n")] if "n" in each else 0
        own = (shape[each.index("h")], shape[each.index("w")]) if "h" in each else (1, 1)
        if not count:  # a map: the one with the picture's proportions
            if (grid == own) if grid is not None else (order or own == (1, 1) or _fits(own, size)):
                found.append(((own != (1, 1), abs(own[0] * size[1] / (own[1] * size[0]) - 1), place), Axes(each, own)))
        elif count == 1 and grid in (None, (1, 1)):
            return [Axes(each, (1, 1))]
        elif 1 in shape and order is None and grid is None:
            continue  # N tokens of one channel: a vector, by another order
        else:
            largest_prefix = 0 if each == "bcn" and not order else LARGEST_PREFIX
            for one in [grid] if grid is not None else _grids(count, size, largest_prefix):
                if (prefix := count - one[0] * one[1]) >= 0:
                    unusual = prefix > USUAL_PREFIX
                    found.append(((unusual, place, one not in _strides(size), prefix), Axes(each, one, prefix)))
    return [axes for _, axes in sorted(found, key=lambda pair: pair[0])]


_ORDERS: tuple[Order, ...] = ("bchw", "bhwc", "bnc", "bcn", "nbc", "bc")


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


def _strides(size: Grid) -> set[Grid]:
    """Grids that a stride makes of an image, rounding either way."""
    (height, width), strides = size, range(1, max(size) + 1)
    up = {(-(-height // stride), -(-width // stride)) for stride in strides}
    return up | {(max(1, height // stride), max(1, width // stride)) for stride in strides}


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


def moved(tensor: Tensor, axis: int) -> dict[str, Tensor]:
    """{order: (squares, places)}: how far each place is moved by each square, for the orders that the shape can have.

    tensor: of `with_squares`, along `axis`. A place that every square moves counts less.
    """
    images = tensor.movedim(axis, 0).float()
    change = (images[1 : 1 + len(SQUARES)] - images[:1]).abs()
    batch_first = {3: {"bnc": 2, "bcn": 1}, 4: {"bchw": 1, "bhwc": 3}}.get(tensor.ndim, {})
    channels = batch_first if axis == 0 else {"nbc": 2} if tensor.ndim == 3 else {}
    sums = {order: change.sum(place).flatten(1) for order, place in channels.items()}
    return {order: (s * (s / s.mean(0).clamp(min=1e-30)).square()).cpu() for order, s in sums.items()}


def squares_found(axes: Axes, change: Mapping[str, Tensor]) -> tuple[int, bool]:
    """How many squares are found where they are, if the tensor is read so; is that more than chance would find?"""
    places = change[axes.order][:, axes.prefix :]
    strongest, most = places.max(1)
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


def match(tensor: Tensor, intermediate: Tensor) -> Axes | None:
    """The axes by which the tensor holds the same numbers as a map (B, C, h, w) of the same pass, or None."""
    batch, channels, *sides = intermediate.shape
    if tensor.ndim < 3 or tensor.shape[0] != batch or tensor.numel() < intermediate.numel():
        return None
    grid, shape = (sides[0], sides[1]), tuple(tensor.shape[1:])
    count = grid[0] * grid[1]
    known = intermediate.flatten(2).transpose(1, 2)
    forms: list[tuple[Order, tuple[int, ...]]] = [("bchw", (channels, *grid)), ("bhwc", (*grid, channels))]
    forms.append(("bcn", (channels, count)))
    for order, form in forms:
        if shape == form and _equal((axes := Axes(order, grid)).tokens(tensor).values, known):
            return axes
    if shape[-1] != channels:
        return None
    tokens = tensor.flatten(1, -2)
    prefix = tokens.shape[1] - count
    if not 0 <= prefix <= LARGEST_PREFIX or (prefix and tensor.ndim > 3):
        return None
    patches, windows = tokens[:, prefix:], shape if tensor.ndim > 3 else None
    if _equal(patches, known):
        return Axes("bnc", grid, prefix, windows=windows)
    places = _places(patches[0], known[0])
    if _equal(patches[:, places], known):
        return Axes("bnc", grid, prefix, tuple(places.tolist()), windows)
    return None


def _equal(tensor: Tensor, other: Tensor) -> bool:
    return bool((tensor - other).abs().max() <= EQUAL * other.abs().max())


def _places(tokens: Tensor, known: Tensor) -> Tensor:
    """(N,): for each known token its place among the tokens, if these are the same ones (N, C) in another order.

    Tokens are sorted by their values along a random direction, in which no two different ones coincide.
    """
    direction = torch.randn(tokens.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, sought = ((each.double() @ direction.to(each.device)).argsort() for each in (tokens, known))
    return torch.empty_like(found).scatter_(0, sought, found)
