"""Images and representations as the rows of a regression, and rows as values again.

A map between grids is one ridge map of cells. Both ends are cut on the coarser of their two grids, side by side:

    same grid            a cell reads its own token              and gives one token
    coarser -> finer     a cell reads its own token              and gives the k x k tokens, or pixels, under it
    finer -> coarser     a cell reads the k x k tokens under it  and gives one token

With a context a cell also reads its neighbours and the prefix tokens; where the source has several grids it reads the
nearest token of the coarser ones. A destination on several grids has one block for each, prefix tokens have blocks of
their own, and a set (queries, predictions) is one row an image. What would make a row too wide is read through its
leading principal directions (`Layout.directions`): the own token never is, and the context does not shrink.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.errors import BacksightError
from backsight.representation import Grid, Queries, Representation, Tokens

PIXELS = "pixels"
MAXIMUM_INPUTS = 4096  # values of a set, or of the gathered tokens of a finer grid, that a row reads
MAXIMUM_PIXELS, MAXIMUM_TOKENS = 4096, 20_000  # values of a row's output; neighbouring pixels are nearly equal
DIRECTIONS = 128  # of a neighbour or a prefix token in a context
MANY_PREFIX_TOKENS = 8  # more of them share one map, as detection tokens do

Pair = tuple[str, str]
Described = TypeVar("Described")


def from_json(dataclass: type[Described], values: Mapping[str, Any]) -> Described:
    """A dataclass of these fields, lists as tuples. Raises ValueError that names a field that is unknown or missing."""
    names = {field.name for field in fields(dataclass)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - names):
        raise ValueError(f"it has the field {unknown[0]!r}, which {dataclass.__name__} does not know")
    try:
        return dataclass(**{name: _tuples(value) for name, value in values.items()})
    except TypeError as error:
        raise ValueError(str(error)) from error


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(part) for part in value)
    if isinstance(value, Mapping) and {field.name for field in fields(Form)} == set(value):
        return from_json(Form, value)
    return value


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

    def __str__(self) -> str:
        sides = " + ".join(f"{height} x {width}" for height, width in self.grids)
        if self.kind == PIXELS:
            return f"images of {sides} pixels"
        if self.kind == "tokens":
            return f"{self.prefix} prefix and {sides} grid tokens of {self.channels} channels"
        return f"{self.count} {self.kind} of {self.channels} channels"


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


def nearest_level(grids: Sequence[Grid], grid: Grid) -> int:
    """Which of the grids is the same, else the coarsest of those that are finer on both sides, else the finest."""
    if grid in grids:
        return list(grids).index(grid)
    finer = [level for level, (tall, wide) in enumerate(grids) if tall >= grid[0] and wide >= grid[1]]
    if finer:
        return min(finer, key=lambda level: area(grids[level]))
    return max(range(len(grids)), key=lambda level: area(grids[level]))


def patchify(images: Tensor, patch: Grid) -> Tensor:
    """Images (B, C, H, W) in patches (height, width), row by row: (B, N, C * height * width).

    Sides that are no multiple of the patch are continued with their last row or column. Inside a patch the order is
    channel, row, column (that of `torch.nn.functional.unfold` and `pixel_shuffle`).
    """
    rows, columns = -(-images.shape[2] // patch[0]), -(-images.shape[3] // patch[1])
    missing = (rows * patch[0] - images.shape[2], columns * patch[1] - images.shape[3])
    if any(missing):
        images = F.pad(images, (0, missing[1], 0, missing[0]), mode="replicate")
    cells = images.unflatten(3, (columns, patch[1])).unflatten(2, (rows, patch[0]))
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, grid: Grid, patch: Grid, size: Grid | None = None) -> Tensor:
    """The inverse of `patchify`: (B, N, C * height * width) -> (B, C, H, W), cut to `size` where it is given.

    Raises ValueError when the tokens do not fill the grid or the patch.
    """
    if tokens.shape[1] != area(grid) or tokens.shape[2] % area(patch):
        raise ValueError(f"{tuple(tokens.shape)} tokens do not fill a grid of {grid} with patches of {patch}")
    cells = tokens.unflatten(2, (-1, *patch)).unflatten(1, grid)
    images = cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return images if size is None else images[:, :, : size[0], : size[1]]


class Reading(NamedTuple):
    """What the rows of a block read; blocks of equal reading share their Gram matrix.

    what: "cells" of the grid `level`, the "prefix" token number `level`, each of the "prefixes", the "mean" of all
    tokens, each of the "queries", or all of them, a "set". rows: grid of the cells; gathered: tokens in one of them.
    """

    what: Literal["cells", "prefix", "prefixes", "mean", "queries", "set"]
    level: int = 0
    rows: Grid = (1, 1)
    gathered: Grid = (1, 1)
    coarser: tuple[int, ...] = ()
    context: int = 1
    directions: int | None = None


@dataclass(frozen=True)
class Layout:
    """How the values at both ends of a map become the rows of a regression; `plan_layout` makes it.

    rows: "cells" (of a grid), "queries" (a query is a row) or "set" (an image is a row). patches: cells of the
    destination that a row gives, down and across, for each of its grids. context: side of the square of tokens that a
    cell reads. directions: through which neighbours, prefix tokens, gathered tokens or the queries of a set are read,
    or None for all their channels.
    """

    source: Form
    destination: Form
    rows: Literal["cells", "queries", "set"]
    patches: tuple[Grid, ...] = ()
    context: int = 1
    directions: int | None = None

    @property
    def main(self) -> tuple[str, ...]:
        """The blocks that make everything but prefix tokens: one for each grid of the destination."""
        if self.rows != "cells" or len(self.destination.grids) == 1:
            return (self.rows,)
        return tuple(f"cells_{level}" for level in range(len(self.destination.grids)))

    @property
    def blocks(self) -> tuple[str, ...]:
        """The maps that make up the inverse: the main ones, then those of the prefix tokens."""
        count = self.destination.prefix if self.rows == "cells" else 0
        if count > MANY_PREFIX_TOKENS and count == self.source.prefix:
            return (*self.main, "prefixes")
        return (*self.main, *(f"prefix_{index}" for index in range(count)))

    def reading(self, block: str, grids: Sequence[Grid] | None = None) -> Reading:
        """What the rows of a block read, of a source on the grids `grids` (default: those it was fitted on)."""
        if block in ("queries", "set", "prefixes"):
            return Reading(block, directions=self.directions if block == "set" else None)  # type: ignore[arg-type]
        if block.startswith("prefix_"):
            equal = self.source.prefix == self.destination.prefix
            return Reading("prefix", int(block.removeprefix("prefix_"))) if equal else Reading("mean")
        level = int(block.partition("_")[2] or 0)
        own, gathered, coarser = _cells(self.source, self.destination, level)
        tall, wide = (grids or self.source.grids)[own]
        rows = (-(-tall // gathered[0]), -(-wide // gathered[1]))
        context = self.context if gathered == (1, 1) else 1
        directions = self.directions if context > 1 or gathered != (1, 1) else None
        return Reading("cells", own, rows, gathered, coarser, context, directions)

    def inputs(self, block: str) -> int:
        """Values in a row of the block's input."""
        reading, channels = self.reading(block), self.source.channels
        width = reading.directions or channels
        if reading.what == "set":
            return self.source.count * width
        if reading.what != "cells":
            return channels
        further = channels * len(reading.coarser)
        if reading.context > 1:
            return channels + width * (reading.context**2 - 1 + self.source.prefix) + further
        return width * area(reading.gathered) + further

    def outputs(self, block: str) -> int:
        """Values in a row of the block's output."""
        if block == "set":
            return self.destination.channels * (sum(map(area, self.patches)) + self.destination.prefix)
        number = self.main.index(block) if block in self.main and self.rows == "cells" else None
        return self.destination.channels * (1 if number is None else area(self.patches[number]))

    def canvas(self, level: int) -> Grid:
        """The size of a grid of the destination on which its rows lie side by side, edges cut off where they fit."""
        grid, patch = self.destination.grids[level], self.patches[level]
        rows = (1, 1) if self.rows == "set" else self.reading(self.main[level]).rows
        return grid if _fits(grid, patch, rows) else (rows[0] * patch[0], rows[1] * patch[1])


def _fits(size: Grid, patch: Grid, rows: Grid) -> bool:
    """Whether patches side by side, the last ones cut off, are the cells of a grid."""
    return all(-(-side // step) == cells for side, step, cells in zip(size, patch, rows, strict=True))


def _cells(source: Form, destination: Form, level: int) -> tuple[int, Grid, tuple[int, ...]]:
    """(grid of the source that is read, tokens gathered in a cell, coarser grids that are read too)."""
    grids, end = source.grids, destination.grids[level]
    same, pixels = grids == destination.grids, destination.kind == PIXELS
    own = level if same else nearest_level(grids, end)
    if pixels:
        own = max(range(len(grids)), key=lambda number: area(grids[number]))
    tall, wide = grids[own]
    finer = not pixels and (tall, wide) != end and tall >= end[0] and wide >= end[1]
    gathered = (-(-tall // end[0]), -(-wide // end[1])) if finer else (1, 1)
    limit = area(end) + 1 if finer else tall * wide
    coarser = tuple(number for number in range(len(grids)) if number != own and area(grids[number]) < limit)
    return own, gathered, coarser if pixels or not same else ()


def plan_layout(
    pair: Pair,
    source: Form,
    destination: Form,
    reduction: Grid | None = None,
    context: int = 1,
    maximum_inputs: int = MAXIMUM_INPUTS,
) -> Layout:
    """The layout of the map `pair` (source tap, destination tap or "pixels").

    reduction: pixels a token side, used where it fits the grid of the tap; maximum_inputs: values of a set, or of
    gathered tokens, beyond which they are read through directions. A row that would give more than MAXIMUM_PIXELS or
    MAXIMUM_TOKENS values gives them at 1/2, 1/4, … of the resolution.
    Raises BacksightError where no linear map between these kinds is defined.
    """
    largest = MAXIMUM_PIXELS if destination.kind == PIXELS else MAXIMUM_TOKENS
    if source.kind == "tokens" and destination.kind in ("tokens", PIXELS):
        gathered = [_cells(source, destination, level)[1] for level in range(len(destination.grids))]
        many, directions = max(map(area, gathered)), None
        if many * source.channels > maximum_inputs:
            directions = max(1, maximum_inputs // many)
        elif context > 1 and source.channels > DIRECTIONS:
            directions = DIRECTIONS
        layout = Layout(source, destination, "cells", (), context, directions)
        rows = [layout.reading(block).rows for block in layout.main]
        patches = [
            (-(-end[0] // tall), -(-end[1] // wide)) for end, (tall, wide) in zip(destination.grids, rows, strict=True)
        ]
        if destination.kind == PIXELS and reduction is not None and _fits(destination.grids[0], reduction, rows[0]):
            patches = [reduction]
        while max(destination.channels * area(patch) for patch in patches) > largest:
            patches = [(-(-tall // 2), -(-wide // 2)) for tall, wide in patches]
        return Layout(source, destination, "cells", tuple(patches), context, directions)
    if source.kind in ("queries", "predictions") and destination.kind == "queries":
        if source.count != destination.count:
            raise BacksightError(
                f"No linear map from {pair[0]!r} to {pair[1]!r}: they have {source.count} and "
                f"{destination.count} queries; choose taps with the same number."
            )
        return Layout(source, destination, "queries")
    if source.kind in ("queries", "predictions") and destination.kind in ("tokens", PIXELS):
        long = source.count * source.channels > maximum_inputs
        patches = list(destination.grids)
        while destination.channels * sum(map(area, patches)) > largest and max(map(max, patches)) > 1:
            patches = [(-(-tall // 2), -(-wide // 2)) for tall, wide in patches]
        directions = max(1, maximum_inputs // source.count) if long else None
        return Layout(source, destination, "set", tuple(patches), 1, directions)
    raise BacksightError(
        f"No linear map from {source.kind} at {pair[0]!r} to {destination.kind} at {pair[1]!r}: "
        "tokens map to tokens or pixels, queries and predictions map to queries, tokens or pixels."
    )


# Values to rows, and back


def resized(maps: Tensor, size: Grid) -> Tensor:
    """(B, C, h, w) at another size: means where it is smaller, bilinear where it is larger."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    if maps.shape[2] >= size[0] and maps.shape[3] >= size[1]:
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, size, mode="bilinear")


def pack_source(
    representation: Representation,
    layout: Layout,
    block: str,
    projection: Tensor | None = None,
    prefix_projection: Tensor | None = None,
) -> Tensor:
    """The input rows (M, layout.inputs(block)) of one block: images in order, rows of an image together.

    projection: (C, directions), prefix_projection: (P, C, directions), where the reading has directions.
    """
    values = representation.values
    what = layout.reading(block).what
    if what == "set":
        return (values if projection is None else values @ projection).flatten(1)
    if what == "queries":
        return values.flatten(0, 1)
    assert isinstance(representation, Tokens)
    reading = layout.reading(block, representation.grids)
    if what == "prefix":
        return representation.prefix_values[:, reading.level]
    if what == "prefixes":
        return representation.prefix_values.flatten(0, 1)
    if what == "mean":
        hidden = representation.values.new_zeros(values.shape[:2])
        if representation.padding is not None:
            hidden[:, representation.prefix :] = representation.padding.to(hidden)
        return (values * (1 - hidden)[..., None]).sum(1) / (1 - hidden).sum(1, keepdim=True).clamp(min=1)
    alone = reading.context == 1 and not reading.coarser and reading.gathered == (1, 1)
    shown = representation if alone else _without_padding(representation)
    maps = shown.maps()
    parts = _own(maps[reading.level], reading, projection)
    for level in reading.coarser:
        nearest = F.interpolate(maps[level], reading.rows, mode="nearest-exact")
        parts.append(nearest.flatten(2).transpose(1, 2))
    if reading.context > 1 and representation.prefix:
        prefix = representation.prefix_values
        if prefix_projection is not None:
            prefix = torch.einsum("bpc,pcd->bpd", prefix, prefix_projection)
        parts.append(prefix.flatten(1)[:, None].expand(-1, area(reading.rows), -1))
    return torch.cat(parts, dim=2).flatten(0, 1) if len(parts) > 1 else parts[0].flatten(0, 1)


def _own(own: Tensor, reading: Reading, projection: Tensor | None) -> list[Tensor]:
    """(B, N, …) of what each cell reads of its own grid."""
    projected = own if projection is None else torch.einsum("bchw,cd->bdhw", own, projection)
    if reading.gathered != (1, 1):
        return [patchify(projected, reading.gathered)]
    if reading.context == 1:
        return [own.flatten(2).transpose(1, 2)]
    around = F.unfold(projected, reading.context, padding=reading.context // 2).transpose(1, 2)
    if projection is None:
        return [around]
    cells = around.unflatten(2, (-1, reading.context**2))
    centre = reading.context**2 // 2
    neighbours = torch.cat([cells[..., :centre], cells[..., centre + 1 :]], dim=3).flatten(2)
    return [own.flatten(2).transpose(1, 2), neighbours]


def _without_padding(tokens: Tokens) -> Tokens:
    """The grid tokens, zero in the padding: what is not looked at must not matter."""
    patches = tokens.patches
    if tokens.padding is not None:
        patches = patches.masked_fill(tokens.padding[..., None], 0.0)
    return Tokens(patches, tokens.grids)


def pack_destination(value: Tensor | Representation, layout: Layout, block: str) -> Tensor:
    """The output rows (M, layout.outputs(block)) of one block, in the order of `pack_source`."""
    if not isinstance(value, Tensor | Tokens):
        return value.values.flatten(0, 1)
    if isinstance(value, Tokens) and block == "prefixes":
        return value.prefix_values.flatten(0, 1)
    if isinstance(value, Tokens) and block.startswith("prefix_"):
        return value.prefix_values[:, int(block.removeprefix("prefix_"))]
    maps = (value,) if isinstance(value, Tensor) else value.maps()
    if block == "set":
        maps = maps if isinstance(value, Tensor) else _without_padding(value).maps()
        parts = [resized(each, patch).flatten(1) for each, patch in zip(maps, layout.patches, strict=True)]
        return torch.cat([*parts, value.prefix_values.flatten(1)] if isinstance(value, Tokens) else parts, dim=1)
    level = layout.main.index(block)
    return patchify(resized(maps[level], layout.canvas(level)), layout.patches[level]).flatten(0, 1)


def unpack(
    rows: Mapping[str, Tensor], layout: Layout, source: Representation, position: Tensor | None
) -> Tensor | Representation:
    """Images (not clamped) or a representation from the output rows of every block; undoes `pack_destination`.

    source: the representation that was inverted; position: the positional code that the resulting tokens carry.
    """
    destination, batch = layout.destination, source.batch
    if layout.rows == "queries":
        return Queries(rows["queries"].unflatten(0, (batch, -1)))
    if layout.rows == "set":
        areas = [destination.channels * area(patch) for patch in layout.patches]
        *pieces, first = rows["set"].split([*areas, destination.channels * destination.prefix], dim=1)
        maps = [
            resized(piece.unflatten(1, (destination.channels, *patch)), grid)
            for piece, patch, grid in zip(pieces, layout.patches, destination.grids, strict=True)
        ]
        prefix, padding = first.unflatten(1, (destination.prefix, destination.channels)), None
    else:
        assert isinstance(source, Tokens)
        maps = [_joined(rows[block], layout, block, source) for block in layout.main]
        grids = [(each.shape[2], each.shape[3]) for each in maps]
        padding = carried_padding(source, grids) if destination.kind != PIXELS else None
        prefix = maps[0].new_zeros(batch, 0, destination.channels)
        if "prefixes" in rows:
            prefix = rows["prefixes"].unflatten(0, (batch, -1))
        elif destination.prefix:
            prefix = torch.stack([rows[block] for block in layout.blocks[len(layout.main) :]], dim=1)
    if destination.kind == PIXELS:
        return maps[0]
    values = torch.cat([prefix, *(each.flatten(2).transpose(1, 2) for each in maps)], dim=1)
    return Tokens(values, tuple((each.shape[2], each.shape[3]) for each in maps), prefix.shape[1], padding, position)


def _joined(rows: Tensor, layout: Layout, block: str, source: Tokens) -> Tensor:
    """(B, C, H, W) of a main block; on another grid than was fitted, of a size in proportion."""
    level = layout.main.index(block)
    grid, canvas, patch = layout.destination.grids[level], layout.canvas(level), layout.patches[level]
    cells = layout.reading(block, source.grids).rows
    as_fitted = source.grids == layout.source.grids
    whole = unpatchify(rows.unflatten(0, (source.batch, -1)), cells, patch, canvas if as_fitted else None)
    if not as_fitted:
        grid = (whole.shape[2] * grid[0] // canvas[0], whole.shape[3] * grid[1] // canvas[1])
    return resized(whole, grid)


def row_padding(source: Representation, layout: Layout, block: str) -> Tensor | None:
    """(B, rows) bool, True = padding: the rows that are neither fitted nor predicted, or None."""
    if block not in layout.main or not isinstance(source, Tokens) or source.padding is None:
        return None
    reading = layout.reading(block, source.grids)
    own = Tokens(source.padding[..., None].float(), source.grids).maps()[reading.level]
    return patchify(own, reading.gathered).amin(dim=2) > 0


def carried_padding(source: Tokens, grids: Sequence[Grid]) -> Tensor | None:
    """(B, N) padding of tokens on other grids of the same images: that of the nearest token, or None."""
    if source.padding is None or tuple(grids) == source.grids:
        return source.padding
    maps = Tokens(source.padding[..., None].float(), source.grids).maps()
    parts = [
        F.interpolate(maps[nearest_level(source.grids, grid)], size=grid, mode="nearest-exact").flatten(1) > 0
        for grid in grids
    ]
    return torch.cat(parts, dim=1)
