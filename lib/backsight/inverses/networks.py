"""The residual networks of inverse modules, by kind, and which kind there is between two forms.

    pixels  <- tokens                 upsampling:      convolutions on the finest grid, then pixel shuffles
    pixels  <- queries, predictions   set_upsampling:  a learned map that reads the set, then the same
    tokens  <- tokens                 blocks (timm blocks), encoder (attention with the positional code, over all
                                      grids), mlp (norms, projections), convolution (CNN stages),
                                      splitting (stages that merged tokens, and every other change of grids)
    tokens  <- queries, predictions   decoder:         the maps' positional codes ask, the queries answer
    queries <- queries                queries:         self-attention with a learned query embedding
    queries <- predictions            heads:           an MLP from class distribution and box

All attention layers written here are pre-norm, which the zero start of the residual needs; nothing depends on
train or eval mode. The last layer of every network starts at zero. Attention is global up to GLOBAL_TOKENS tokens;
beyond, it runs in windows that also read a summary of every grid, so that the cost is in proportion to the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.inverses.layouts import PIXELS, Form, Layout, area, join, pack_source
from backsight.representation import Grid, Tokens

if TYPE_CHECKING:
    from backsight.targets.base import Stage

GLOBAL_TOKENS = 1024  # more tokens attend in windows
WINDOW = 8  # tokens a side
SUMMARY = 4  # cells a side of what a window reads of every whole grid
SPLIT_PARAMETERS = 2**24  # a larger linear map between grids is factored
SHALLOW = 2  # convolution pairs, however deep the stage was


@dataclass(frozen=True)
class Design:
    """What a residual network is built from: the whole of it can be written down as JSON.

    kind: a key of RESIDUALS; depth: blocks or layers, or convolution pairs on the grid; heads, hidden: of the
    attention layers and MLPs; width: channels of the convolutions on the grid; patch: pixels under a token (or
    under a cell of the map that reads a set); positioned: whether the destination has a positional code; mixing: what
    the tokens of "splitting" are mixed by.
    """

    kind: str
    source: Form
    destination: Form
    depth: int
    heads: int
    hidden: int
    width: int
    patch: Grid
    positioned: bool
    mixing: Literal["attention", "convolution"] = "attention"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Design:
        ends: dict[str, Any] = {}
        for end in ("source", "destination"):
            grids = tuple((height, width) for height, width in values[end]["grids"])
            ends[end] = Form(**{**values[end], "grids": grids})
        return cls(**{**values, **ends, "patch": tuple(values["patch"])})


@dataclass(frozen=True)
class Surroundings:
    """What a residual knows beside the values.

    position: (1 | B, N, C) positional code and padding: (B, N) bool of the destination's grid tokens, or None;
    source_padding: (B, M) bool of the source's. Values of padded tokens are zero already.
    """

    position: Tensor | None = None
    padding: Tensor | None = None
    source_padding: Tensor | None = None


class AttentionLayer(nn.Module):
    """A pre-norm transformer layer that adds positional codes to queries and keys, as DETR does.

    x: (B, N, C); position: (1 | B, N, C) or None; memory: (B, M, C) with its own position, for layers with
    cross-attention; padding: (B, N) bool, True = not to be looked at. Returns (B, N, C).
    """

    def __init__(self, channels: int, heads: int, hidden: int, *, own: bool = True, crossed: bool = False) -> None:
        super().__init__()
        self.own = Attention(channels, heads) if own else None
        self.crossed = Attention(channels, heads) if crossed else None
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels)
        )

    def forward(
        self,
        x: Tensor,
        position: Tensor | None = None,
        memory: Tensor | None = None,
        memory_position: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        if self.own is not None:
            x = x + self.own(x, position, None, position, padding)
        if self.crossed is not None:
            x = x + self.crossed(x, position, memory, memory_position, None)
        return x + self.mlp(x)


class Attention(nn.Module):
    """Multi-head attention of the normalised x to itself, or to a memory."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(
        self,
        x: Tensor,
        position: Tensor | None,
        memory: Tensor | None,
        memory_position: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor:
        x = self.norm(x)
        memory = x if memory is None else memory
        query = self._split(self.query(x if position is None else x + position))
        key = self._split(self.key(memory if memory_position is None else memory + memory_position))
        seen = None if padding is None else ~padding[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, self._split(self.value(memory)), attn_mask=seen)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def attend(
    layer: nn.Module,
    x: Tensor,
    grids: Sequence[Grid],
    prefix: int = 0,
    position: Tensor | None = None,
    padding: Tensor | None = None,
    memory: Tensor | None = None,
    memory_position: Tensor | None = None,
    shifted: bool = False,
) -> Tensor:
    """A layer over tokens on grids: over all at once, or, beyond GLOBAL_TOKENS, window by window.

    x: (B, P + N, C); position: (1 | B, P + N, C) or None; padding: (B, P + N) bool or None; memory as of the layer;
    shifted: windows that start half a window further out, so that layers in turn reach across their borders. A window
    also reads the prefix tokens and the mean tokens of SUMMARY x SUMMARY cells of every grid; the prefix tokens
    become the mean of what the windows make of them.
    """
    if x.shape[1] <= GLOBAL_TOKENS:
        return layer(x, position, memory, memory_position, padding)
    batch, _, channels = x.shape
    code = torch.zeros_like(x) if position is None else position.expand(batch, -1, -1)
    hidden = x.new_zeros(batch, x.shape[1]) if padding is None else padding.to(x)
    # Values, codes and padding travel together, so that they are cut alike.
    carried = torch.cat([x, code, hidden[..., None]], dim=2)
    maps = Tokens(carried[:, prefix:], tuple(grids)).maps()
    read = torch.cat([carried[:, :prefix], *(_summary(each) for each in maps)], dim=1)
    made, firsts = [], []
    for whole in maps:
        windows, layout = _windows(whole, WINDOW // 2 if shifted else 0)
        count = len(windows) // batch
        sequence = torch.cat([read.repeat_interleave(count, dim=0), windows], dim=1)
        values, codes, masked = sequence.split([channels, channels, 1], dim=2)
        repeated = None if memory is None else memory.repeat_interleave(count, dim=0)
        out = layer(values, codes, repeated, memory_position, masked[..., 0] > 0.5)
        firsts.append(out[:, :prefix].unflatten(0, (batch, count)).mean(dim=1))
        made.append(_from_windows(out[:, read.shape[1] :], layout))
    return torch.cat([torch.stack(firsts).mean(dim=0), *made], dim=1)


def _summary(carried: Tensor) -> Tensor:
    """(B, 2C + 1, h, w) values, code and padding -> (B, cells, 2C + 1): means over what is no padding."""
    size = (min(SUMMARY, carried.shape[2]), min(SUMMARY, carried.shape[3]))
    seen = 1 - carried[:, -1:]
    share = F.adaptive_avg_pool2d(seen, size)
    mean = F.adaptive_avg_pool2d(carried[:, :-1] * seen, size) / share.clamp(min=1e-6)
    return torch.cat([mean, (share < 1e-6).to(mean)], dim=1).flatten(2).transpose(1, 2)


def _windows(carried: Tensor, shift: int) -> tuple[Tensor, tuple[int, ...]]:
    """(B, 2C + 1, h, w) -> (B * windows, WINDOW², 2C + 1), and what `_from_windows` needs; the margin is padding."""
    batch, width, rows, columns = carried.shape
    down, across = -(-(rows + shift) // WINDOW), -(-(columns + shift) // WINDOW)
    margins = (shift, across * WINDOW - columns - shift, shift, down * WINDOW - rows - shift)
    whole = torch.cat([F.pad(carried[:, :-1], margins), F.pad(carried[:, -1:], margins, value=1.0)], dim=1)
    cells = whole.reshape(batch, width, down, WINDOW, across, WINDOW).permute(0, 2, 4, 3, 5, 1)
    return cells.reshape(-1, WINDOW * WINDOW, width), (batch, rows, columns, down, across, shift)


def _from_windows(windows: Tensor, layout: tuple[int, ...]) -> Tensor:
    """(B * windows, WINDOW², C) -> (B, h * w, C)."""
    batch, rows, columns, down, across, shift = layout
    cells = windows.reshape(batch, down, across, WINDOW, WINDOW, -1).transpose(2, 3)
    whole = cells.reshape(batch, down * WINDOW, across * WINDOW, -1)
    return whole[:, shift : shift + rows, shift : shift + columns].flatten(1, 2)


class GridCodes(nn.Module):
    """A learned code for each token: of its row and its column in its own grid, and of each prefix token."""

    def __init__(self, grids: Sequence[Grid], channels: int, prefix: int = 0) -> None:
        super().__init__()
        self.rows = nn.ParameterList(_codes(grid[0], channels) for grid in grids)
        self.columns = nn.ParameterList(_codes(grid[1], channels) for grid in grids)
        self.prefix = _codes(prefix, channels) if prefix else None

    def forward(self) -> Tensor:
        """(1, P + N, C)."""
        parts: list[Tensor] = [] if self.prefix is None else [self.prefix]
        for row, column in zip(self.rows, self.columns, strict=True):
            parts.append((row[:, :, None] + column[:, None]).flatten(1, 2))
        return torch.cat(parts, dim=1)


class ResidualConvolutions(nn.Module):
    """(B, C, h, w) -> (B, C, h, w): group norm and two 3 x 3 convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(self.norm(x))))


class Upsampling(nn.Module):
    """Maps on one or more grids -> (B, channels, H, W): convolutions on the finest grid, then pixel shuffles.

    The number of shuffles follows from the prime factors of the patch (output cells a side of a grid cell), and
    the width halves with every shuffle, so that all resolutions cost about the same; the last shuffle makes the
    output, so that no convolution runs at the full resolution. What reaches beyond the size is cut off (or
    resized, where it is a patch or more).

        grid (h, w), width -> [depth x convolutions] -> (2h, 2w), width / 2 -> [convolutions] -> … -> (H, W)
    """

    def __init__(self, source: Form, channels: int, size: Grid, patch: Grid, width: int, depth: int) -> None:
        super().__init__()
        self.grids, self.prefix, self.size = source.grids, source.prefix, size
        self.grid = _finest(source.grids)
        # Where whole patches do not make the size, what they do make is resized, so that no cell is cut away.
        self.fits = all(-(-side // step) == cells for side, step, cells in zip(size, patch, self.grid, strict=True))
        *steps, last = _factors(*patch)
        self.stems = nn.ModuleList(nn.Linear(source.channels, width) for _ in self.grids)
        self.from_prefix = nn.Linear(source.prefix * source.channels, width) if source.prefix else None
        self.stages = nn.ModuleList([nn.Sequential(*(ResidualConvolutions(width) for _ in range(depth)))])
        for step in steps:
            narrower = max(16, width // 2 // 16 * 16)
            self.stages.append(
                nn.Sequential(
                    nn.Conv2d(width, narrower * step[0] * step[1], 1),
                    PixelShuffle(step),
                    ResidualConvolutions(narrower),
                )
            )
            width = narrower
        self.norm = nn.GroupNorm(1, width)
        self.head = _zeroed(nn.Conv2d(width, channels * last[0] * last[1], 3, padding=1))
        self.shuffle = PixelShuffle(last)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, P + N, C) -> (B, channels, H, W)."""
        maps, start = [], self.prefix
        for stem, (height, width) in zip(self.stems, self.grids, strict=True):
            piece = stem(x[:, start : start + height * width])
            start += height * width
            map_ = piece.transpose(1, 2).unflatten(2, (height, width))
            maps.append(map_ if (height, width) == self.grid else F.interpolate(map_, self.grid))
        y = torch.stack(maps).sum(dim=0) if len(maps) > 1 else maps[0]
        if self.from_prefix is not None:
            y = y + self.from_prefix(x[:, : self.prefix].flatten(1))[:, :, None, None]
        for stage in self.stages:
            y = stage(y)
        y = self.shuffle(self.head(F.gelu(self.norm(y))))
        return y[:, :, : self.size[0], : self.size[1]] if self.fits else F.interpolate(y, self.size, mode="bilinear")


class PixelShuffle(nn.Module):
    """(B, C * fh * fw, h, w) -> (B, C, h * fh, w * fw); torch's own, for factors that differ by side too."""

    def __init__(self, factors: Grid) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        tall, wide = self.factors
        if tall == wide:
            return F.pixel_shuffle(x, tall)
        batch, channels, height, width = x.shape
        cells = x.reshape(batch, channels // (tall * wide), tall, wide, height, width)
        return cells.permute(0, 1, 4, 2, 5, 3).reshape(batch, -1, height * tall, width * wide)


class UpsamplingResidual(nn.Module):
    """Tokens -> pixels."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        size = design.destination.grids[0]
        self.upsampling = Upsampling(design.source, 3, size, design.patch, design.width, design.depth)

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        return self.upsampling(x)


class SetUpsamplingResidual(nn.Module):
    """Queries or predictions -> pixels: a learned map asks the set, twice, and is then upsampled."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        size, width = design.destination.grids[0], design.width
        grid = (-(-size[0] // design.patch[0]), -(-size[1] // design.patch[1]))
        self.embed = nn.Linear(design.source.channels, width)
        self.slots = _codes(design.source.count, width)
        self.map = _codes(grid[0] * grid[1], width)
        self.layers = nn.ModuleList(
            AttentionLayer(width, design.heads, 2 * width, own=False, crossed=True) for _ in range(2)
        )
        tokens = Form("tokens", width, (grid,))
        self.upsampling = Upsampling(tokens, 3, size, design.patch, width, design.depth)

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        memory = self.embed(x)
        asked = self.map.expand(len(x), -1, -1)
        for layer in self.layers:
            asked = layer(asked, None, memory, self.slots)
        return self.upsampling(asked)


class ConvolutionResidual(nn.Module):
    """Tokens -> tokens of an equal or finer grid, where the stage between them is of convolutions or pooling."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        destination = design.destination
        self.upsampling = Upsampling(
            design.source,
            destination.channels,
            destination.grids[0],
            design.patch,
            design.width,
            design.depth,
        )

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        return self.upsampling(x).flatten(2).transpose(1, 2)


class BlocksResidual(nn.Module):
    """Tokens -> tokens through timm's transformer blocks; padded tokens are not looked at."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.prefix, channels = design.source.prefix, design.source.channels
        self.blocks = nn.Sequential(
            *(
                Block(channels, design.heads, mlp_ratio=design.hidden / channels, qkv_bias=True)
                for _ in range(design.depth)
            )
        )
        self.head = _head(channels, design.destination.channels)

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        mask = None
        if around.padding is not None:
            padding = _with_prefix(around.padding, self.prefix)
            mask = torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, -torch.inf)[:, None, None]
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        return self.head(x)


class EncoderResidual(nn.Module):
    """Tokens -> tokens of the same form through encoder layers over all grids; padded tokens are not looked at.

    Tokens on several grids have learned codes too, which tell the levels apart.
    """

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.form, channels = design.source, design.source.channels
        self.codes = GridCodes(self.form.grids, channels, self.form.prefix) if len(self.form.grids) > 1 else None
        self.layers = nn.ModuleList(AttentionLayer(channels, design.heads, design.hidden) for _ in range(design.depth))
        self.head = _head(channels, design.destination.channels)

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        prefix = self.form.prefix
        position = None if around.position is None else F.pad(around.position, (0, 0, prefix, 0))
        if self.codes is not None:
            position = self.codes() if position is None else position + self.codes()
        padding = None if around.padding is None else _with_prefix(around.padding, prefix)
        for number, layer in enumerate(self.layers):
            x = attend(layer, x, self.form.grids, prefix, position, padding, shifted=number % 2 == 1)
        return self.head(x)


class SplittingResidual(nn.Module):
    """Tokens -> tokens on other grids, of other channels or with other prefix tokens: any form to any other.

    What the stage did after it merged tokens is undone on the source's grids (its blocks, of its heads and width),
    then every cell is split into the tokens under it by one linear map (a finer grid is gathered instead), and one
    more layer runs on the destination's grids. A stage of convolutions or pooling has residual convolutions in both
    places. Padded tokens are not looked at.

        (h, w), C -> [depth x blocks] -> linear C -> k * k * C' -> (k h, k w), C' -> [block] -> (k h, k w), C'
    """

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.source, self.destination, self.mixing = design.source, design.destination, design.mixing
        self.layout = Layout(design.source, design.destination, "patches")
        channels, wanted = design.source.channels, design.destination.channels
        self.before, self.after = nn.ModuleList(), nn.ModuleList()
        if self.mixing == "attention":
            self.codes = GridCodes(self.source.grids, channels, self.source.prefix)
            self.wanted_codes = GridCodes(self.destination.grids, wanted, self.destination.prefix)
            for _ in range(design.depth):
                self.before.append(AttentionLayer(channels, _divisor(channels, design.heads), design.hidden))
            self.after.append(AttentionLayer(wanted, _divisor(wanted, design.heads), 2 * wanted))
        else:
            self.before.extend(ResidualConvolutions(channels) for _ in range(design.depth))
            self.after.append(ResidualConvolutions(wanted))
        self.split = nn.ModuleDict(
            {block: _linear(self.layout.inputs(block), self.layout.outputs(block)) for block in self.layout.main}
        )
        self.first = nn.Linear(channels, wanted) if self.destination.prefix else None
        self.first_codes = _codes(self.destination.prefix, wanted) if self.destination.prefix else None
        self.head = _head(wanted, wanted)

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        source, destination = self.source, self.destination
        position = self.codes() if self.mixing == "attention" else None
        x = self._mixed(self.before, x, source, position, around.source_padding)
        tokens = Tokens(x, source.grids, source.prefix, around.source_padding)
        parts = [] if self.first is None else [self._prefix(tokens)]
        for block, linear in self.split.items():
            grid, size = self.layout.row_grid(block), destination.grids[self.layout.level(block)]
            rows = linear(pack_source(tokens, self.layout, block)).unflatten(0, (len(x), -1))
            whole = join(rows, grid, self.layout.patch_of(block), size)
            parts.append(whole.flatten(2).transpose(1, 2))
        y = torch.cat(parts, dim=1)
        if self.mixing == "attention":
            position = self.wanted_codes()
            if around.position is not None:
                position = position + F.pad(around.position, (0, 0, destination.prefix, 0))
        return self.head(self._mixed(self.after, y, destination, position, around.padding))

    def _prefix(self, tokens: Tokens) -> Tensor:
        """(B, P', C'): each from its own prefix token, or all from the mean where the numbers differ."""
        assert self.first is not None
        assert self.first_codes is not None
        equal = self.source.prefix == self.destination.prefix
        read = tokens.prefix_values if equal else tokens.values.mean(dim=1, keepdim=True)
        return self.first(read) + self.first_codes

    def _mixed(
        self, layers: nn.ModuleList, x: Tensor, form: Form, position: Tensor | None, padding: Tensor | None
    ) -> Tensor:
        if self.mixing == "attention":
            masked = None if padding is None else _with_prefix(padding, form.prefix)
            for number, layer in enumerate(layers):
                x = attend(layer, x, form.grids, form.prefix, position, masked, shifted=number % 2 == 1)
            return x
        parts = [x[:, : form.prefix]]
        for whole in Tokens(x, form.grids, form.prefix).maps():
            for layer in layers:
                whole = layer(whole)
            parts.append(whole.flatten(2).transpose(1, 2))
        return torch.cat(parts, dim=1)


class DecoderResidual(nn.Module):
    """Queries or predictions -> tokens, or another number of queries: zeros with positional codes read the set.

    The memory is the set, with a learned query embedding as its position; where the destination has no positional
    code, one is learned.
    """

    def __init__(self, design: Design) -> None:
        super().__init__()
        source, self.destination = design.source, design.destination
        channels = self.destination.channels
        self.embed = nn.Linear(source.channels, channels)
        self.slots = _codes(source.count, channels)
        self.prefix_codes = _codes(self.destination.prefix, channels) if self.destination.prefix else None
        count = self.destination.count or sum(map(area, self.destination.grids))
        self.codes = None if design.positioned else _codes(count, channels)
        self.layers = nn.ModuleList(
            AttentionLayer(channels, design.heads, design.hidden, crossed=True) for _ in range(design.depth)
        )
        self.head = _head(channels, channels)

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        position, padding = self.codes if self.codes is not None else around.position, around.padding
        assert position is not None
        if self.prefix_codes is not None:
            position = torch.cat([self.prefix_codes.expand(len(position), -1, -1), position], dim=1)
            padding = None if padding is None else _with_prefix(padding, self.destination.prefix)
        memory = self.embed(x)
        asked = torch.zeros_like(position).expand(len(x), -1, -1)
        # Queries have no grid: one row of them.
        grids = self.destination.grids or ((1, self.destination.count),)
        for number, layer in enumerate(self.layers):
            shifted = number % 2 == 1
            asked = attend(layer, asked, grids, self.destination.prefix, position, padding, memory, self.slots, shifted)
        return self.head(asked)


class QueriesResidual(nn.Module):
    """Queries -> queries through self-attention with a learned query embedding."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        channels = design.source.channels
        self.slots = _codes(design.source.count, channels)
        self.layers = nn.ModuleList(AttentionLayer(channels, design.heads, design.hidden) for _ in range(design.depth))
        self.head = _head(channels, design.destination.channels)

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.slots)
        return self.head(x)


class MlpResidual(nn.Module):
    """Each token or query by itself; queries are told apart by a learned embedding."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        source = design.source
        self.embed = nn.Linear(source.channels, design.hidden)
        self.slots = None if source.kind == "tokens" else _codes(source.count, design.hidden)
        self.middle = nn.Linear(design.hidden, design.hidden)
        self.head = _head(design.hidden, design.destination.channels)

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        x = self.embed(x)
        if self.slots is not None:
            x = x + self.slots
        return self.head(F.gelu(self.middle(F.gelu(x))))


LAYERS = (Block, AttentionLayer, ResidualConvolutions)  # what a training may compute again instead of keeping
RESIDUALS: dict[str, type[nn.Module]] = {
    "upsampling": UpsamplingResidual,
    "set_upsampling": SetUpsamplingResidual,
    "convolution": ConvolutionResidual,
    "blocks": BlocksResidual,
    "encoder": EncoderResidual,
    "splitting": SplittingResidual,
    "decoder": DecoderResidual,
    "queries": QueriesResidual,
    "heads": MlpResidual,
    "mlp": MlpResidual,
}


def design_for(
    source: Form,
    destination: Form,
    stage: Stage | None = None,
    *,
    positioned: bool = False,
    reduction: Grid | None = None,
    width: int | None = None,
    depth: int | None = None,
) -> Design:
    """The residual for these two ends and the stage of the target between them (None for direct decoders).

    positioned: whether the destination has a positional code; reduction: pixels a token side, used where it
    fits the grid; width: channels of the convolutions on the grid, by default three quarters of the source's; depth: at
    most so many layers of attention, by default as many as the stage has.
    Raises BacksightError where there is no module from the one form to the other.
    """
    kind, patch = _kind(source, destination, stage), (1, 1)
    between = "" if stage is None else stage.kind
    if kind in ("upsampling", "convolution"):
        pixels = destination.kind == PIXELS
        patch = _patch(_finest(source.grids), destination.grids[0], reduction if pixels else None)
    elif kind == "set_upsampling":
        patch = reduction or (8, 8)
    if width is None:
        width = min(384, max(64 if kind == "set_upsampling" else 32, source.channels * 3 // 4 // 16 * 16))
    layers, heads, hidden = SHALLOW, 4, 2 * max(source.channels, destination.channels)
    mixing: Literal["attention", "convolution"] = "convolution" if between in LOCAL_STAGES else "attention"
    if stage is not None and kind in ("blocks", "encoder", "decoder", "queries", "splitting") and mixing == "attention":
        layers = max(1, min(stage.depth, depth or stage.depth))
        heads, hidden = stage.heads or heads, stage.hidden or hidden
    heads = _divisor(_attention_width(kind, source, destination, width), heads)
    return Design(kind, source, destination, layers, heads, hidden, width, patch, positioned, mixing)


def _attention_width(kind: str, source: Form, destination: Form, width: int) -> int:
    """Channels of the attention layers of a kind."""
    return {"decoder": destination.channels, "set_upsampling": width}.get(kind, source.channels)


LOCAL_STAGES = ("backbone", "convolution", "patch_embedding", "norm", "projection")  # without attention


def _kind(source: Form, destination: Form, stage: Stage | None) -> str:
    ends = (source.kind, destination.kind)
    between = "" if stage is None else stage.kind
    if ends == ("tokens", PIXELS):
        return "upsampling"
    if destination.kind == PIXELS:
        return "set_upsampling"
    if ends == ("tokens", "tokens"):
        return _kind_between_tokens(source, destination, between)
    if source.kind in ("queries", "predictions") and destination.kind == "tokens":
        return "decoder"
    if destination.kind == "queries" and source.kind in ("queries", "predictions"):
        if source.count != destination.count:
            return "decoder"
        if source.kind == "predictions":
            return "heads"
        return "mlp" if between == "norm" else "queries"
    raise BacksightError(
        f"There is no inverse module from {words(source)} to {words(destination)}: inverses run against the forward "
        "pass, in which tokens come before queries and predictions come last; swap the taps."
    )


def _kind_between_tokens(source: Form, destination: Form, between: str) -> str:
    same = (source.grids, source.prefix) == (destination.grids, destination.prefix)
    if between in ("backbone", "convolution", "patch_embedding"):
        finest, plain = _finest(source.grids), destination.prefix == 0 and len(destination.grids) == 1
        if plain and all(side >= cells for side, cells in zip(destination.grids[0], finest, strict=True)):
            return "convolution"
        return "splitting"
    if not same:
        return "splitting"
    if between not in ("blocks", "encoder", "decoder"):
        return "mlp"
    if source.channels != destination.channels:
        return "splitting"
    if between == "encoder" or len(source.grids) > 1:
        return "encoder"
    # Beyond, tokens attend in windows, whose attention needs codes that say where in the window a token is.
    return "blocks" if source.prefix + area(source.grids[0]) <= GLOBAL_TOKENS else "splitting"


def _patch(grid: Grid, size: Grid, reduction: Grid | None) -> Grid:
    """Output cells a side of a grid cell: the reduction where it fits, else size / grid, rounded up."""
    if reduction is not None and all(-(-s // r) == g for s, r, g in zip(size, reduction, grid, strict=True)):
        return reduction
    return -(-size[0] // grid[0]), -(-size[1] // grid[1])


def words(form: Form) -> str:
    if form.kind == PIXELS:
        return f"images of {form.grids[0][0]} x {form.grids[0][1]} pixels"
    if form.kind != "tokens":
        return f"{form.count} {form.kind} of {form.channels} channels"
    grids = " + ".join(f"{height} x {width}" for height, width in form.grids)
    return f"{form.prefix} prefix and {grids} grid tokens of {form.channels} channels"


def _finest(grids: tuple[Grid, ...]) -> Grid:
    return max(grids, key=area)


def _with_prefix(padding: Tensor, prefix: int) -> Tensor:
    """(B, N) -> (B, P + N): prefix tokens are never padding."""
    return F.pad(padding, (prefix, 0))


def _divisor(channels: int, heads: int) -> int:
    """The largest number of heads, `heads` at most, that divides the channels."""
    return next(number for number in range(min(heads, channels), 0, -1) if channels % number == 0)


def _linear(inputs: int, outputs: int) -> nn.Module:
    """A linear map, in two factors where it would have more than SPLIT_PARAMETERS."""
    if inputs * outputs <= SPLIT_PARAMETERS:
        return nn.Linear(inputs, outputs)
    rank = max(16, SPLIT_PARAMETERS // (inputs + outputs))
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs))


def _factors(tall: int, wide: int) -> list[Grid]:
    """Prime factors of both sides, in pairs, the largest last; (1, 1) for sides of one."""
    sides = []
    for number in (tall, wide):
        found, divisor = [], 2
        while number > 1:
            while number % divisor == 0:
                found.append(divisor)
                number //= divisor
            divisor += 1
        sides.append(found)
    length = max(1, *map(len, sides))
    first, second = ([1] * (length - len(side)) + side for side in sides)
    return list(zip(first, second, strict=True))


def _codes(count: int, channels: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(1, count, channels) * 0.5)


def _head(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(inputs), _zeroed(nn.Linear(inputs, outputs)))


def _zeroed(layer: nn.Linear | nn.Conv2d) -> Any:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
