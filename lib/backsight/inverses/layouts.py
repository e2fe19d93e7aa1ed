"""How the values at both ends of a linear map become the rows of a regression, and rows become values again.

A map between grids has one block for each grid of its destination. The rows of a block are the cells of one of
the source's grids (or groups of its cells, where the destination is coarser):

    same grid            a cell reads its own token           and gives one token
    coarser -> finer     a cell reads its own token           and gives the k x k tokens, or pixels, under it
    finer -> coarser     a cell reads the k x k tokens under it  and gives one token

and it may also read the neighbours of its token (context) and the tokens of coarser grids above it. Sides that do
not divide are rounded up and cut; where that leaves cells over, patches overlap evenly and are averaged (`cut`).
Prefix tokens have blocks of their own, and a set (queries, predictions) is one row an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.errors import BacksightError
from backsight.inverses.patches import patchify, unpatchify
from backsight.representation import Grid, Queries, Representation, Tokens

PIXELS = "pixels"
MAXIMUM_INPUTS = 4096  # values that a row reads; beyond, context and gathered tokens shrink and sets are projected
# A row that would give more values gives them at 1/2, 1/4, 1/8 … of the map's resolution. Neighbouring pixels
# are nearly equal, so that pixels are pooled earlier than tokens.
MAXIMUM_PIXELS = 4096
MAXIMUM_TOKENS = 20_000
MANY_PREFIX_TOKENS = 8  # more of them share one map, as detection tokens do

Pair = tuple[str, str]


@dataclass(frozen=True)
class Form:
    """The shape of one end of a map, without the batch.

    grids: of tokens; for pixels the one image size (H, W). count: of queries or predictions.
    """

    kind: Literal["pixels", "tokens", "queries", "predictions"]
    channels: int
    grids: tuple[Grid, ...] = ()
    prefix: int = 0
    count: int = 0


def form_of(value: Tensor | Representation) -> Form:
    """The form of a representation, or of images (B, 3, H, W)."""
    if isinstance(value, Tensor):
        return Form("pixels", value.shape[1], ((value.shape[2], value.shape[3]),))
    if isinstance(value, Tokens):
        return Form("tokens", value.channels, tuple((h, w) for h, w in value.grids), value.prefix)
    kind: Literal["queries", "predictions"] = "queries" if isinstance(value, Queries) else "predictions"
    return Form(kind, value.channels, count=value.values.shape[1])


def area(grid: Grid) -> int:
    """Cells of a grid."""
    return grid[0] * grid[1]


def nearest_level(grids: Sequence[Grid], wanted: Grid) -> int:
    """Which of the grids a destination on the grid `wanted` reads first.

    The same grid, else the coarsest of those that are finer on both sides, else the finest there is.
    """
    if wanted in grids:
        return list(grids).index(wanted)
    finer = [level for level, (tall, wide) in enumerate(grids) if tall >= wanted[0] and wide >= wanted[1]]
    if finer:
        return min(finer, key=lambda level: area(grids[level]))
    return max(range(len(grids)), key=lambda level: area(grids[level]))


@dataclass(frozen=True)
class Reading:
    """What the rows of one block read of the source; blocks of equal reading share their Gram matrix.

    what: "cells" (of the grid `level`), "prefix" (the prefix token `level`), "prefixes" (each prefix token), "summary"
    (the mean of the grid tokens, and the prefix tokens), "queries" (each query) or "set" (all of them at once).
    gathered: tokens of the grid in one row, down and across; averaged: whether their mean is read instead of all;
    context: side of the square of tokens about a cell; coarser: further grids, of which the nearest token is read.
    """

    what: Literal["cells", "prefix", "prefixes", "summary", "queries", "set"]
    level: int = 0
    gathered: Grid = (1, 1)
    averaged: bool = False
    context: int = 1
    coarser: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layout:
    """How the values at both ends of a map become the rows of a regression.

    rows: "patches" (a cell of a grid is a row), "queries" (a query is a row) or "set" (an image is a row: all its
    queries at once). patch: pixels under a cell; pooling: factor at which the map is regressed where a row would
    give too many values; projected: channels of a query after the fixed projection of a long set; context: side of
    the square of tokens that a cell reads (1: its own alone; more: its neighbours, zero outside the grid or in the
    padding, and the prefix tokens); inputs_limit: values up to which a row reads context and gathered tokens in full.
    Each is None or 1 where it does not apply.
    """

    source: Form
    destination: Form
    rows: Literal["patches", "queries", "set"]
    patch: Grid | None = None
    pooling: int = 1
    projected: int | None = None
    context: int = 1
    inputs_limit: int = MAXIMUM_INPUTS

    @property
    def main(self) -> tuple[str, ...]:
        """The blocks that make everything but prefix tokens: one for each grid of the destination."""
        if self.rows != "patches" or len(self.destination.grids) == 1:
            return (self.rows,)
        return tuple(f"patches_{level}" for level in range(len(self.destination.grids)))

    @property
    def blocks(self) -> tuple[str, ...]:
        """The maps that make up the inverse: the main ones, then those of the prefix tokens."""
        count = self.destination.prefix if self.rows == "patches" else 0
        if count > MANY_PREFIX_TOKENS and count == self.source.prefix:
            return (*self.main, "prefixes")
        return (*self.main, *(f"prefix_{index}" for index in range(count)))

    def level(self, block: str) -> int:
        """The grid of the destination that a main block makes."""
        return int(block.removeprefix("patches_")) if block.startswith("patches_") else 0

    def reading(self, block: str) -> Reading:
        """What the rows of a block read."""
        if block == "queries":
            return Reading("queries")
        if block == "set":
            return Reading("set")
        if block == "prefixes":
            return Reading("prefixes")
        if block.startswith("prefix_"):
            equal = self.source.prefix == self.destination.prefix
            return Reading("prefix", int(block.removeprefix("prefix_"))) if equal else Reading("summary")
        return self._cells(self.level(block))

    def _cells(self, level: int) -> Reading:
        grids, wanted = self.source.grids, self.destination.grids[level]
        same = grids == self.destination.grids
        if self.destination.kind == PIXELS:
            own = max(range(len(grids)), key=lambda each: area(grids[each]))
        else:
            own = level if same else nearest_level(grids, wanted)
        tall, wide = grids[own]
        coarser: tuple[int, ...] = ()
        if not same or self.destination.kind == PIXELS:
            coarser = tuple(each for each in range(len(grids)) if each != own and area(grids[each]) < tall * wide)
        if self.destination.kind != PIXELS and (tall, wide) != wanted and tall >= wanted[0] and wide >= wanted[1]:
            gathered = (-(-tall // wanted[0]), -(-wide // wanted[1]))
            coarser = tuple(each for each in coarser if area(grids[each]) <= area(wanted))
            averaged = self.source.channels * (area(gathered) + len(coarser)) > self.inputs_limit
            return Reading("cells", own, gathered, averaged, 1, coarser)
        context = self.context
        while context > 1 and self._width(context, len(coarser)) > self.inputs_limit:
            context -= 2
        return Reading("cells", own, context=context, coarser=coarser)

    def _width(self, context: int, coarser: int) -> int:
        prefix = self.source.prefix if context > 1 else 0
        return self.source.channels * (context**2 + coarser + prefix)

    def inputs(self, block: str) -> int:
        """Values in a row of the block's input."""
        reading, channels = self.reading(block), self.source.channels
        if reading.what == "set":
            return self.source.count * (self.projected or channels)
        if reading.what == "summary":
            return channels * (1 + self.source.prefix)
        if reading.what != "cells":
            return channels
        if reading.gathered != (1, 1):
            return channels * ((1 if reading.averaged else area(reading.gathered)) + len(reading.coarser))
        return self._width(reading.context, len(reading.coarser))

    def outputs(self, block: str) -> int:
        """Values in a row of the block's output."""
        if block == "set":
            return self.destination.channels * (sum(map(area, self.pooled_grids)) + self.destination.prefix)
        return self.destination.channels * (area(self.patch_of(block)) if block in self.main else 1)

    @property
    def pooled_grids(self) -> tuple[Grid, ...]:
        """The sizes at which the destination's maps are regressed."""
        return tuple(self._pooled(level) for level in range(len(self.destination.grids)))

    def _pooled(self, level: int) -> Grid:
        height, width = self.destination.grids[level]
        least = self._row_grid(level) if self.rows == "patches" else (1, 1)
        tall, wide = -(-height // self.pooling), -(-width // self.pooling)
        return max(tall, min(height, least[0])), max(wide, min(width, least[1]))

    def _row_grid(self, level: int) -> Grid:
        reading = self._cells(level)
        return self.source.grids[reading.level] if reading.gathered == (1, 1) else self.destination.grids[level]

    def patch_of(self, block: str) -> Grid:
        """Cells of the (pooled) destination that a row of a main block gives, down and across."""
        if self.rows == "queries":
            return (1, 1)
        if self.patch is not None:
            return self.patch
        level = self.level(block)
        (height, width), (rows, columns) = self._pooled(level), self._row_grid(level)
        return -(-height // rows), -(-width // columns)

    def row_grid(self, block: str, given: Sequence[Grid] | None = None) -> Grid:
        """The grid of the rows of a main block, for a source on the grids `given` (default: those it was fitted on)."""
        fitted = self._row_grid(self.level(block))
        if given is None or tuple(given) == self.source.grids:
            return fitted
        reading = self.reading(block)
        rows, columns = given[reading.level]
        return -(-rows // reading.gathered[0]), -(-columns // reading.gathered[1])


def plan_layout(
    pair: Pair,
    source: Form,
    destination: Form,
    reduction: Grid | None = None,
    maximum_inputs: int = MAXIMUM_INPUTS,
    maximum_outputs: int | None = None,
    context: int = 1,
) -> Layout:
    """The layout of the map `pair` (source tap, destination tap or "pixels").

    reduction: pixels a token side, used where it fits the grid of the tap; maximum_inputs: values that a row may
    read: a longer set is projected, query by query, and cells whose context or gathered tokens exceed it read less
    context, or the mean of the tokens. maximum_outputs: values that a row may give; a map is pooled until it fits
    (default: MAXIMUM_PIXELS or MAXIMUM_TOKENS).
    Raises BacksightError where no linear map between these kinds is defined.
    """
    largest = maximum_outputs or (MAXIMUM_PIXELS if destination.kind == PIXELS else MAXIMUM_TOKENS)
    if source.kind == "tokens" and destination.kind in ("tokens", PIXELS):
        layout = Layout(source, destination, "patches", context=context, inputs_limit=maximum_inputs)
        layout = replace(layout, pooling=_pooling(layout, largest))
        return replace(layout, patch=_patch_size(layout, reduction))
    if source.kind in ("queries", "predictions") and destination.kind == "queries":
        if source.count != destination.count:
            raise BacksightError(
                f"No linear map from {pair[0]!r} to {pair[1]!r}: they have {source.count} and "
                f"{destination.count} queries; choose taps with the same number."
            )
        return Layout(source, destination, "queries")
    if source.kind in ("queries", "predictions") and destination.kind in ("tokens", PIXELS):
        long = source.count * source.channels > maximum_inputs
        projected = max(1, maximum_inputs // source.count) if long else None
        layout = Layout(source, destination, "set", projected=projected)
        return replace(layout, pooling=_pooling(layout, largest))
    raise BacksightError(
        f"No linear map from {source.kind} at {pair[0]!r} to {destination.kind} at {pair[1]!r}: "
        "tokens map to tokens or pixels, queries and predictions map to queries, tokens or pixels."
    )


def _pooling(layout: Layout, largest: int) -> int:
    """The least power of two at which no row gives more than `largest` values, as far as pooling can help."""
    pooling, sides = 1, max(max(grid) for grid in layout.destination.grids)
    while pooling <= sides:
        pooled = replace(layout, pooling=pooling)
        if max(map(pooled.outputs, pooled.main)) <= largest:
            break
        pooling *= 2
    return pooling


def _patch_size(layout: Layout, reduction: Grid | None) -> Grid | None:
    """Pixels under one cell: the target's reduction where it fits the grid, else size / grid, rounded up."""
    if layout.destination.kind != PIXELS:
        return None
    size, grid = layout.pooled_grids[0], layout.row_grid("patches")
    patch = layout.patch_of("patches")
    if reduction is None or layout.pooling > 1:
        return patch
    rows, columns = (
        wanted if -(-pixels // wanted) == cells else default
        for wanted, default, pixels, cells in zip(reduction, patch, size, grid, strict=True)
    )
    return (rows, columns) if _fills(size, grid, (rows, columns)) else patch


# ----------------------------------------------------------------------------------------- maps to rows and back
def _fills(size: Grid, grid: Grid, patch: Grid) -> bool:
    """Whether patches side by side, the last ones cut off, are the cells of the grid."""
    return all(-(-side // step) == cells for side, step, cells in zip(size, patch, grid, strict=True))


def cut(maps: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """(B, C, H, W) -> (B, N, C * height * width): the patch that belongs to each cell of a grid.

    Side by side where that fills the grid, as `patchify` cuts them; else, with patch = size / grid rounded up, the
    patch of cell i starts at i * size // cells, so that neighbours overlap and every pixel belongs to some cell.
    """
    size = (maps.shape[2], maps.shape[3])
    if _fills(size, grid, patch):
        return patchify(maps, patch)
    down, across = (_places(*axis, maps.device) for axis in zip(size, grid, patch, strict=True))
    cells = maps[:, :, down[:, :, None, None], across]
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def join(rows: Tensor, grid: Grid, patch: Grid, size: Grid | None) -> Tensor:
    """The inverse of `cut`, (B, N, C * height * width) -> (B, C, H, W); where patches overlap, their mean.

    size: None for the size that the patches side by side have.
    """
    if size is None or _fills(size, grid, patch):
        return unpatchify(rows, grid, patch, size)
    channels = rows.shape[2] // area(patch)
    cells = rows.reshape(len(rows), *grid, channels, *patch).permute(0, 3, 1, 4, 2, 5)
    cells = cells.reshape(len(rows), channels, grid[0] * patch[0], grid[1] * patch[1])
    for axis in (0, 1):
        places = _places(size[axis], grid[axis], patch[axis], rows.device).flatten()
        shape = list(cells.shape)
        shape[2 + axis] = size[axis]
        counts = torch.bincount(places, minlength=size[axis]).to(cells)
        total = cells.new_zeros(shape).index_add(2 + axis, places, cells)
        cells = total / counts.reshape(-1, *([1] * (1 - axis)))
    return cells


def _places(size: int, cells: int, patch: int, device: torch.device) -> Tensor:
    """(cells, patch) positions along one axis."""
    starts = torch.arange(cells, device=device) * size // cells
    return starts[:, None] + torch.arange(patch, device=device)


def pack_source(representation: Representation, layout: Layout, block: str, projection: Tensor | None = None) -> Tensor:
    """The input rows (M, layout.inputs(block)) of one block: images in order, rows of an image together."""
    reading = layout.reading(block)
    if reading.what == "set":
        values = representation.values if projection is None else representation.values @ projection
        return values.flatten(1)
    if reading.what == "queries":
        return representation.values.flatten(0, 1)
    if not isinstance(representation, Tokens):
        raise BacksightError(f"This linear inverse reads tokens, but was given {form_of(representation).kind}.")
    if reading.what == "prefix":
        return representation.prefix_values[:, reading.level]
    if reading.what == "prefixes":
        return representation.prefix_values.flatten(0, 1)
    if reading.what == "summary":
        return torch.cat([_mean(representation)[:, None], representation.prefix_values], dim=1).flatten(1)
    return _cells(representation, reading, layout.row_grid(block, representation.grids)).flatten(0, 1)


def _cells(tokens: Tokens, reading: Reading, grid: Grid) -> Tensor:
    """(B, N, inputs): what each cell of the rows' grid reads."""
    alone = reading.gathered == (1, 1) and reading.context == 1
    maps = tokens.maps() if alone and not reading.coarser else _without_padding(tokens).maps()
    own = maps[reading.level]
    if reading.gathered != (1, 1):
        read = cut(own, grid, reading.gathered)
        if reading.averaged:
            read = read.unflatten(2, (tokens.channels, -1)).mean(dim=3)
    elif reading.context > 1:
        read = F.unfold(own, reading.context, padding=reading.context // 2).transpose(1, 2)
    else:
        read = own.flatten(2).transpose(1, 2)
    parts = [read]
    for level in reading.coarser:
        parts.append(F.interpolate(maps[level], grid, mode="nearest-exact").flatten(2).transpose(1, 2))
    if reading.context > 1:
        parts.append(tokens.prefix_values.flatten(1)[:, None].expand(-1, read.shape[1], -1))
    return torch.cat(parts, dim=2) if len(parts) > 1 else read


def _without_padding(tokens: Tokens) -> Tokens:
    """The grid tokens, zero in the padding: what is not looked at must not matter."""
    patches = tokens.patches
    if tokens.padding is not None:
        patches = patches.masked_fill(tokens.padding[..., None], 0.0)
    return Tokens(patches, tokens.grids)


def _mean(tokens: Tokens) -> Tensor:
    """(B, C): mean of the grid tokens that are no padding."""
    if tokens.padding is None:
        return tokens.patches.mean(dim=1)
    seen = (~tokens.padding).to(tokens.values)[..., None]
    return (_without_padding(tokens).values.sum(dim=1)) / seen.sum(dim=1).clamp(min=1)


def pack_destination(value: Tensor | Representation, layout: Layout, block: str) -> Tensor:
    """The output rows (M, layout.outputs(block)) of one block, in the order of `pack_source`."""
    if block == "queries":
        assert not isinstance(value, Tensor)
        return value.values.flatten(0, 1)
    if not isinstance(value, Tensor | Tokens):
        raise BacksightError(f"This linear inverse gives tokens, but was given {form_of(value).kind} to fit.")
    if isinstance(value, Tokens) and block == "prefixes":
        return value.prefix_values.flatten(0, 1)
    if isinstance(value, Tokens) and block.startswith("prefix_"):
        return value.prefix_values[:, int(block.removeprefix("prefix_"))]
    if block == "set":
        maps = (value,) if isinstance(value, Tensor) else _without_padding(value).maps()
        parts = [_pool(each, size).flatten(1) for each, size in zip(maps, layout.pooled_grids, strict=True)]
        if isinstance(value, Tokens):
            parts.append(value.prefix_values.flatten(1))
        return torch.cat(parts, dim=1)
    level = layout.level(block)
    whole = value if isinstance(value, Tensor) else value.maps()[level]
    return cut(_pool(whole, layout.pooled_grids[level]), layout.row_grid(block), layout.patch_of(block)).flatten(0, 1)


def _pool(whole: Tensor, size: Grid) -> Tensor:
    return whole if tuple(whole.shape[2:]) == size else F.adaptive_avg_pool2d(whole, size)


def _unpool(whole: Tensor, size: Grid) -> Tensor:
    return whole if tuple(whole.shape[2:]) == size else F.interpolate(whole, size=size, mode="bilinear")


def unpack(
    rows: dict[str, Tensor], layout: Layout, source: Representation, position: Tensor | None
) -> Tensor | Representation:
    """Images (not clamped) or a representation from the output rows of every block.

    Undoes `pack_destination`.

    source: the representation that was inverted; its grids, padding and batch are the result's.
    position: the positional code that the resulting tokens carry.
    """
    batch, destination = source.batch, layout.destination
    if layout.rows == "queries":
        return Queries(rows["queries"].unflatten(0, (batch, -1)))
    if layout.rows == "set":
        areas = [destination.channels * area(grid) for grid in layout.pooled_grids]
        *pieces, prefix = rows["set"].split([*areas, destination.channels * destination.prefix], dim=1)
        maps = [
            _unpool(piece.reshape(batch, destination.channels, *pooled), grid)
            for piece, pooled, grid in zip(pieces, layout.pooled_grids, destination.grids, strict=True)
        ]
        if destination.kind == PIXELS:
            return maps[0]
        first = prefix.reshape(batch, destination.prefix, destination.channels)
        return _tokens(maps, first, None, position)
    if not isinstance(source, Tokens):
        raise BacksightError(f"This linear inverse reads tokens, but was given {form_of(source).kind}.")
    as_fitted = source.grids == layout.source.grids
    maps = []
    for block in layout.main:
        level, grid, patch = layout.level(block), layout.row_grid(block, source.grids), layout.patch_of(block)
        pieces_of_block = rows[block].unflatten(0, (batch, -1))
        whole = join(pieces_of_block, grid, patch, layout.pooled_grids[level] if as_fitted else None)
        if as_fitted:
            whole = _unpool(whole, destination.grids[level])
        elif layout.pooling > 1:
            whole = F.interpolate(whole, scale_factor=layout.pooling, mode="bilinear")
        maps.append(whole)
    if destination.kind == PIXELS:
        return maps[0]
    if "prefixes" in rows:
        first = rows["prefixes"].unflatten(0, (batch, -1))
    else:
        first = maps[0].new_zeros(batch, destination.prefix, destination.channels)
        if destination.prefix:
            first = torch.stack([rows[block] for block in layout.blocks[len(layout.main) :]], dim=1)
    grids = [(each.shape[2], each.shape[3]) for each in maps]
    return _tokens(maps, first, carried_padding(source, grids), position)


def _tokens(maps: Sequence[Tensor], prefix: Tensor, padding: Tensor | None, position: Tensor | None) -> Tokens:
    values = torch.cat([prefix, *(each.flatten(2).transpose(1, 2) for each in maps)], dim=1)
    grids = tuple((each.shape[2], each.shape[3]) for each in maps)
    return Tokens(values, grids, prefix.shape[1], padding, position)


def row_padding(source: Representation, layout: Layout, block: str) -> Tensor | None:
    """(B, rows) bool, True = padding: the rows that are neither fitted nor predicted, or None."""
    if block not in layout.main or not isinstance(source, Tokens) or source.padding is None:
        return None
    reading = layout.reading(block)
    own = _padding_maps(source)[reading.level]
    if reading.gathered == (1, 1):
        return own.flatten(1) > 0
    return cut(own, layout.row_grid(block, source.grids), reading.gathered).amin(dim=2) > 0


def carried_padding(source: Tokens, grids: Sequence[Grid]) -> Tensor | None:
    """(B, N) padding of tokens on other grids of the same images: that of the nearest token, or None."""
    if source.padding is None or tuple(grids) == source.grids:
        return source.padding
    maps = _padding_maps(source)
    parts = [
        F.interpolate(maps[nearest_level(source.grids, grid)], size=grid, mode="nearest-exact").flatten(1) > 0
        for grid in grids
    ]
    return torch.cat(parts, dim=1)


def _padding_maps(source: Tokens) -> tuple[Tensor, ...]:
    """(B, 1, h, w) for each grid, 1 = padding."""
    assert source.padding is not None
    return Tokens(source.padding[..., None].float(), source.grids).maps()
