"""Images and representations as the rows of a regression, and rows as values again.

A map between grids is one ridge map of cells. Both ends are cut on the coarser of their two grids, side by side: a cell
reads its own token, or the k x k tokens of a finer grid, and gives one token, or the k x k tokens or pixels under it.
With a context a cell also reads its neighbours and the prefix tokens; where the source has several grids, the nearest
token of the coarser ones. Prefix tokens have maps of their own. A set (queries, predictions) is one row an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from torch import Tensor

from backsight.errors import BacksightError
from backsight.representation import Form, Grid, Queries, Representation, Tokens

PIXELS = "pixels"
MAXIMUM_INPUTS = 4096  # values of a set, or of the gathered tokens of a finer grid, that a row reads
MAXIMUM_PIXELS, MAXIMUM_TOKENS = 4096, 20_000  # values of a row's output; neighbouring pixels are nearly equal
DIRECTIONS = 128  # of a neighbour or a prefix token in a context
MANY_PREFIX_TOKENS = 8  # more of them share one map, as detection tokens do

Pair = tuple[str, str]


def form_of(value: Tensor | Representation) -> Form:
    """The form of a representation, or of images (B, 3, H, W)."""
    if not isinstance(value, Tensor):
        return value.form
    return Form(PIXELS, value.shape[1], ((value.shape[2], value.shape[3]),))


def area(grid: Grid) -> int:
    """Cells of a grid."""
    return grid[0] * grid[1]


def over(size: Grid, step: Grid) -> Grid:
    """Steps that cover a size, down and across."""
    return -(-size[0] // step[0]), -(-size[1] // step[1])


def nearest_level(grids: Sequence[Grid], grid: Grid) -> int:
    """Which of the grids is the same, else the coarsest of those that are finer on both sides, else the finest."""
    finer = [other for other in grids if other[0] >= grid[0] and other[1] >= grid[1]]
    return grids.index(min(finer, key=area) if finer else max(grids, key=area))


def patchify(images: Tensor, patch: Grid) -> Tensor:
    """Images (B, C, H, W) in patches (height, width), row by row: (B, N, C * height * width).

    Sides that are no multiple of the patch are continued with their last row or column. Inside a patch the order is
    channel, row, column (that of `torch.nn.functional.unfold` and `pixel_shuffle`).
    """
    rows, columns = over((images.shape[2], images.shape[3]), patch)
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


def resized(maps: Tensor, size: Grid) -> Tensor:
    """(B, C, h, w) at another size: means where it is smaller, bilinear where it is larger."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    if maps.shape[2] >= size[0] and maps.shape[3] >= size[1]:
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, size, mode="bilinear")


class Block(NamedTuple):
    """One ridge map: what its rows read and give.

    what: "cells" of the grid `level`, the "prefix" token number `level`, each of the "prefixes", the "mean" of all
    tokens, each of the "queries", or all of them, a "set"; gathered: tokens in a cell; coarser: further grids;
    directions: principal ones, through which all but the own token is read, or None; gives: grids of the destination,
    or its prefix token.
    """

    what: str
    level: int = 0
    gathered: Grid = (1, 1)
    coarser: tuple[int, ...] = ()
    context: int = 1
    directions: int | None = None
    gives: tuple[int, ...] = ()

    def cells(self, grids: Sequence[Grid]) -> Grid:
        """Rows of an image, down and across, of a source on these grids."""
        return over(grids[self.level], self.gathered) if self.what == "cells" else (1, 1)


@dataclass(frozen=True)
class Layout:
    """How the values at both ends of a map become the rows of a regression; `plan_layout` makes it.

    rows: "cells" (of a grid), "queries" (a query is a row) or "set" (an image is a row). patches: cells of the
    destination that a row gives, down and across, for each of its grids. context: side of the square of tokens that a
    cell reads. directions: through which neighbours, prefix tokens, gathered tokens or the queries of a set are read,
    or None for all their channels: the own token always has all, and the context does not shrink.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    source: Form
    destination: Form
    rows: str
    patches: tuple[Grid, ...] = ()
    context: int = 1
    directions: int | None = None

    @cached_property
    def blocks(self) -> dict[str, Block]:
        """The maps by name: one for each grid of the destination, then those of the prefix tokens."""
        source, end, levels = self.source, self.destination, range(len(self.patches))
        if self.rows != "cells":
            return {self.rows: Block(self.rows, directions=self.directions, gives=tuple(levels))}
        cells = [_cells(source, end, level, self.context, self.directions) for level in levels]
        blocks = {"cells" if len(cells) == 1 else f"cells_{level}": cells[level] for level in levels}
        equal = source.prefix == end.prefix
        if equal and end.prefix > MANY_PREFIX_TOKENS:
            return blocks | {"prefixes": Block("prefixes")}
        prefix = [Block("prefix", index) if equal else Block("mean") for index in range(end.prefix)]
        return blocks | {f"prefix_{index}": block._replace(gives=(index,)) for index, block in enumerate(prefix)}

    def canvas(self, block: Block, level: int) -> Grid:
        """The size of a grid of the destination on which its rows lie side by side, edges cut off where they fit."""
        grid, patch, cells = self.destination.grids[level], self.patches[level], block.cells(self.source.grids)
        return grid if over(grid, patch) == cells else (cells[0] * patch[0], cells[1] * patch[1])


def _cells(source: Form, end: Form, level: int, context: int = 1, directions: int | None = None) -> Block:
    """That gives a grid of the destination."""
    same, grid = source.grids == end.grids, end.grids[level]
    own = level if same else nearest_level(source.grids, grid)
    read, gathered = source.grids[own], (1, 1)
    if read != grid and read[0] >= grid[0] and read[1] >= grid[1]:
        gathered, context = over(read, grid), 1
    coarser = tuple(place for place, other in enumerate(source.grids) if place != own and area(other) < area(read))
    near = context == 1 and gathered == (1, 1)
    return Block("cells", own, gathered, () if same else coarser, context, None if near else directions, (level,))


def is_mappable(source: Form, destination: Form) -> bool:
    """Whether a linear map is defined: to tokens and pixels, and from sets to as many queries."""
    as_many = source.kind in ("queries", "predictions") and source.count == destination.count
    return destination.kind in ("tokens", PIXELS) or (destination.kind == "queries" and as_many)


def plan_layout(
    source: Form,
    destination: Form,
    reduction: Grid | None = None,
    context: int = 1,
    maximum_inputs: int = MAXIMUM_INPUTS,
) -> Layout:
    """The layout of the map between two forms.

    reduction: pixels a token side, used where it fits the grid of the tap; maximum_inputs: values of a set, or of
    gathered tokens, beyond which they are read through directions. A row that would give more than MAXIMUM_PIXELS or
    MAXIMUM_TOKENS values gives them at 1/2, 1/4, … of the resolution.
    Raises BacksightError where no linear map between these kinds is defined.
    """
    if not is_mappable(source, destination):
        raise BacksightError(
            f"No linear map from {source} to {destination}: tokens map to tokens or pixels, queries and predictions "
            "map to as many queries, to tokens or pixels."
        )
    if destination.kind == "queries":
        return Layout(source, destination, "queries")
    rows, together = ("cells", max) if source.kind == "tokens" else ("set", sum)
    cells, many, context = [(1, 1)] * len(destination.grids), source.count, context if rows == "cells" else 1
    if rows == "cells":
        blocks = [_cells(source, destination, level) for level in range(len(destination.grids))]
        cells, many = [block.cells(source.grids) for block in blocks], max(area(block.gathered) for block in blocks)
    patches = [over(grid, count) for grid, count in zip(destination.grids, cells, strict=True)]
    if destination.kind == PIXELS and reduction and over(destination.grids[0], reduction) == cells[0]:
        patches = [reduction]
    directions = DIRECTIONS if context > 1 and source.channels > DIRECTIONS else None
    if many > 1 and many * source.channels > maximum_inputs:
        directions = max(1, maximum_inputs // many)
    largest = MAXIMUM_PIXELS if destination.kind == PIXELS else MAXIMUM_TOKENS
    while destination.channels * together(map(area, patches)) > largest and max(map(max, patches)) > 1:
        patches = [over(patch, (2, 2)) for patch in patches]
    return Layout(source, destination, rows, tuple(patches), context, directions)


# Values to rows, and back


def pack_source(
    representation: Representation,
    block: Block,
    projection: Tensor | None = None,
    prefix_projection: Tensor | None = None,
    drawn: Tensor | slice = slice(None),
) -> Tensor:
    """The input rows (M, inputs): images in order, rows of an image together.

    projection: (C, directions), prefix_projection: (P, C, directions), where the reading has directions; drawn: which
    rows of every image.
    """
    what, values = block.what, representation.values
    if what == "set":
        return (values if projection is None else values @ projection).flatten(1)
    if not isinstance(representation, Tokens):
        return values[:, drawn].flatten(0, 1)
    prefix = representation.prefix_values
    if what in ("prefix", "prefixes"):
        return prefix[:, block.level] if what == "prefix" else prefix[:, drawn].flatten(0, 1)
    if what == "mean":
        return values.mean(1)
    maps, cells = representation.maps(), block.cells(representation.grids)
    parts, projected = [maps[block.level].flatten(2)[:, :, drawn].transpose(1, 2)], maps[block.level]
    if projection is not None:
        projected = torch.einsum("bchw,cd->bdhw", projected, projection)
    if block.gathered != (1, 1):
        parts = [patchify(projected, block.gathered)[:, drawn]]
    elif block.context > 1:
        around = F.unfold(projected, block.context, padding=block.context // 2)[:, :, drawn].transpose(1, 2)
        if projection is None:
            parts = [around]
        else:  # the own token stands before its neighbours, with all of its channels
            square, centre = around.unflatten(2, (-1, block.context**2)), block.context**2 // 2
            parts.append(torch.cat([square[..., :centre], square[..., centre + 1 :]], dim=3).flatten(2))
    for level in block.coarser:
        coarse = F.interpolate(maps[level], cells, mode="nearest-exact").flatten(2)
        parts.append(coarse[:, :, drawn].transpose(1, 2))
    if block.context > 1 and representation.prefix:
        if prefix_projection is not None:
            prefix = torch.einsum("bpc,pcd->bpd", prefix, prefix_projection)
        parts.append(prefix.flatten(1)[:, None].expand(-1, parts[0].shape[1], -1))
    return torch.cat(parts, dim=2).flatten(0, 1) if len(parts) > 1 else parts[0].flatten(0, 1)


def pack_destination(value: Tensor | Representation, layout: Layout, block: Block) -> Tensor:
    """The output rows (M, outputs), in the order of `pack_source`."""
    if not isinstance(value, Tensor | Tokens):
        return value.values.flatten(0, 1)
    prefix = value.prefix_values if isinstance(value, Tokens) else value.new_zeros(len(value), 0, 3)
    if block.what in ("prefix", "mean", "prefixes"):
        return prefix.flatten(0, 1) if block.what == "prefixes" else prefix[:, block.gives[0]]
    maps = (value,) if isinstance(value, Tensor) else value.maps()
    parts = [patchify(resized(maps[n], layout.canvas(block, n)), layout.patches[n]) for n in block.gives]
    if block.what == "set":
        parts.append(prefix.flatten(1)[:, None])
    return torch.cat(parts, dim=2).flatten(0, 1) if len(parts) > 1 else parts[0].flatten(0, 1)


def unpack(
    rows: Mapping[str, Tensor], layout: Layout, source: Representation, position: Tensor | None
) -> Tensor | Representation:
    """Images (not clamped) or a representation from the output rows of every block; undoes `pack_destination`.

    source: the representation that was inverted; position: the positional code that the resulting tokens carry. On
    other grids than were fitted the result is larger or smaller in proportion.
    """
    destination, batch = layout.destination, source.batch
    if layout.rows == "queries":
        return Queries(rows["queries"].unflatten(0, (batch, -1)))
    grids: Any = source.grids if isinstance(source, Tokens) else ()
    maps, prefix = [], []
    for name, block in layout.blocks.items():
        rest = rows[name].unflatten(0, (batch, -1))
        for level in block.gives if block.what in ("cells", "set") else ():
            grid, canvas, patch = destination.grids[level], layout.canvas(block, level), layout.patches[level]
            piece, rest = rest.tensor_split([destination.channels * area(patch)], dim=2)
            fitted = grids == layout.source.grids
            whole = unpatchify(piece, block.cells(grids), patch, canvas if fitted else None)
            if not fitted:
                grid = (whole.shape[2] * grid[0] // canvas[0], whole.shape[3] * grid[1] // canvas[1])
            maps.append(resized(whole, grid))
        prefix.append(rest.reshape(batch, rest.shape[1] * rest.shape[2] // destination.channels, destination.channels))
    if destination.kind == PIXELS:
        return maps[0]
    ends = tuple((whole.shape[2], whole.shape[3]) for whole in maps)
    values = torch.cat([*prefix, *(whole.flatten(2).transpose(1, 2) for whole in maps)], dim=1)
    padding = carried_padding(source, ends) if isinstance(source, Tokens) else None
    return Tokens(values, ends, destination.prefix, padding, position)


def carried_padding(source: Tokens, grids: Sequence[Grid]) -> Tensor | None:
    """(B, N) padding of tokens on other grids of the same images: that of the nearest token, or None."""
    if source.padding is None or tuple(grids) == source.grids:
        return source.padding
    maps = Tokens(source.padding[..., None].float(), source.grids).maps()
    parts = [F.interpolate(maps[nearest_level(source.grids, g)], g, mode="nearest-exact").flatten(1) for g in grids]
    return torch.cat(parts, dim=1) > 0
