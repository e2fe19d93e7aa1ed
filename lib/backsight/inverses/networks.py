"""The residual networks of inverse modules: one transformer, one upsampler, one MLP.

    pixels  <- tokens                 upsampling: convolutions on the finest grid, then pixel shuffles
    pixels  <- queries, predictions   transformer of a learned map that reads the set, then the same
    tokens  <- tokens                 transformer on the source's grids; where the grids change, every cell is split
                                      into the tokens under it and one more layer runs there; stages of convolutions
                                      are upsampled, or split between residual convolutions; mlp for norms, projections
    tokens  <- queries, predictions   transformer of the maps' codes, which reads the set
    queries <- queries, predictions   transformer with a learned code for each query; mlp for heads and norms

All attention layers are pre-norm, which the zero start of the residual needs; nothing depends on train or eval mode.
The last layer of every network starts at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.inverses.rows import PIXELS, Form, area, pack_source, plan_layout, resized, unpatchify
from backsight.representation import Grid, Tokens

if TYPE_CHECKING:
    from backsight.targets.base import Stage

SPLIT_PARAMETERS = 2**24  # a larger linear map between grids is factored
SHALLOW = 2  # convolution pairs, however deep the stage was
LOCAL_STAGES = ("backbone", "convolution", "patch_embedding", "norm", "projection")  # without attention

Kind = Literal["upsampling", "set_upsampling", "convolution", "encoder", "splitting", "decoder", "queries", "mlp"]


@dataclass(frozen=True)
class Design:
    """What a residual network is built from: the whole of it can be written down as JSON.

    depth: layers, or convolution pairs on the grid; heads, hidden: of the attention layers and MLPs; width: channels of
    the convolutions on the grid; patch: pixels under a token (or under a cell of the map that reads a set); positioned:
    whether the destination has a positional code; mixing: what the tokens of "splitting" are mixed by.
    """

    kind: Kind
    source: Form
    destination: Form
    depth: int
    heads: int
    hidden: int
    width: int
    patch: Grid
    positioned: bool
    mixing: Literal["attention", "convolution"] = "attention"


@dataclass(frozen=True)
class Surroundings:
    """What a residual knows beside the values.

    position: (1 | B, N, C) positional code and padding: (B, N) bool of the destination's grid tokens, or None;
    source_padding: (B, M) bool and grids: of the source's tokens. Values of padded tokens are zero already.
    """

    position: Tensor | None = None
    padding: Tensor | None = None
    source_padding: Tensor | None = None
    grids: tuple[Grid, ...] = ()


class Attention(nn.Module):
    """Multi-head attention of the normalised x to itself, or to a memory; codes are added to queries and keys."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.query, self.key = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.value, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(
        self,
        x: Tensor,
        code: Tensor | None,
        memory: Tensor | None = None,
        memory_code: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """x, code: (B, N, C); memory, memory_code: (B, M, C), or None for x itself; hidden: (B, M) bool or None."""
        x = self.norm(x)
        memory, memory_code = (x, code) if memory is None else (memory, memory_code)
        query, key, value = (
            projected.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projected in (
                self.query(x if code is None else x + code),
                self.key(memory if memory_code is None else memory + memory_code),
                self.value(memory),
            )
        )
        mask = None if hidden is None else ~hidden[:, None, None, :]
        return self.out(F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A pre-norm transformer layer: attention to itself (own), to a memory (crossed), and an MLP."""

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
        code: Tensor | None = None,
        hidden: Tensor | None = None,
        memory: Tensor | None = None,
        memory_code: Tensor | None = None,
    ) -> Tensor:
        if self.own is not None:
            x = x + self.own(x, code, hidden=hidden)
        if self.crossed is not None:
            x = x + self.crossed(x, code, memory, memory_code)
        return x + self.mlp(x)


class GridCodes(nn.Module):
    """A learned code for each token: of its row and its column in its own grid, and of each prefix token."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.rows = nn.ParameterList(_codes(grid[0], form.channels) for grid in form.grids)
        self.columns = nn.ParameterList(_codes(grid[1], form.channels) for grid in form.grids)
        self.prefix = _codes(form.prefix, form.channels) if form.prefix else None

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


class Shuffle(nn.Module):
    """(B, C * fh * fw, h, w) -> (B, C, h * fh, w * fw); `nn.PixelShuffle` for factors that may differ by side."""

    def __init__(self, factors: Grid) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        if self.factors[0] == self.factors[1]:
            return F.pixel_shuffle(x, self.factors[0])
        grid = (x.shape[2], x.shape[3])
        return unpatchify(x.flatten(2).transpose(1, 2), grid, self.factors)


class Upsampling(nn.Module):
    """Maps on one or more grids -> (B, channels, H, W): convolutions on the finest grid, then pixel shuffles.

    The number of shuffles follows from the prime factors of the patch (output cells a side of a grid cell), and the
    width halves with every shuffle, so that all resolutions cost about the same; the last shuffle makes the output, so
    that no convolution runs at the full resolution. What reaches beyond the size is cut off (or resized, where it is a
    patch or more). On other grids than it was built for the output is larger or smaller in proportion.

        grid (h, w), width -> [depth x convolutions] -> (2h, 2w), width / 2 -> [convolutions] -> … -> (H, W)
    """

    def __init__(self, source: Form, channels: int, size: Grid, patch: Grid, width: int, depth: int) -> None:
        super().__init__()
        self.grids, self.prefix, self.size = source.grids, source.prefix, size
        finest = max(source.grids, key=area)
        # Where whole patches do not make the size, what they do make is resized, so that no cell is cut away.
        self.fits = all(-(-side // step) == cells for side, step, cells in zip(size, patch, finest, strict=True))
        *steps, last = _factors(*patch)
        self.stems = nn.ModuleList(nn.Linear(source.channels, width) for _ in source.grids)
        self.from_prefix = nn.Linear(source.prefix * source.channels, width) if source.prefix else None
        self.stages = nn.ModuleList([nn.Sequential(*(ResidualConvolutions(width) for _ in range(depth)))])
        for step in steps:
            narrower = max(16, width // 2 // 16 * 16)
            spread = nn.Conv2d(width, narrower * area(step), 1)
            self.stages.append(nn.Sequential(spread, Shuffle(step), ResidualConvolutions(narrower)))
            width = narrower
        self.norm = nn.GroupNorm(1, width)
        self.head = _zeroed(nn.Conv2d(width, channels * area(last), 3, padding=1))
        self.shuffle = Shuffle(last)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, grids: tuple[Grid, ...] = ()) -> Tensor:
        """x: (B, P + N, C) on `grids` (default: those it was built for) -> (B, channels, H, W)."""
        grids = grids or self.grids
        maps = Tokens(x, grids, self.prefix).maps()
        finest = max(grids, key=area)
        parts = [stem(whole.movedim(1, 3)).movedim(3, 1) for stem, whole in zip(self.stems, maps, strict=True)]
        y = torch.stack([part if part.shape[2:] == finest else F.interpolate(part, finest) for part in parts]).sum(0)
        if self.from_prefix is not None:
            y = y + self.from_prefix(x[:, : self.prefix].flatten(1))[:, :, None, None]
        for stage in self.stages:
            y = stage(y)
        y = self.shuffle(self.head(F.gelu(self.norm(y))))
        if grids != self.grids:
            return y
        return y[:, :, : self.size[0], : self.size[1]] if self.fits else F.interpolate(y, self.size, mode="bilinear")


class UpsamplingResidual(nn.Module):
    """Tokens -> pixels, or tokens of an equal or finer grid."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        end = design.destination
        self.flat = end.kind == "tokens"
        self.upsampling = Upsampling(
            design.source, end.channels, end.grids[0], design.patch, design.width, design.depth
        )

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        y = self.upsampling(x, around.grids)
        return y.flatten(2).transpose(1, 2) if self.flat else y


class SetUpsamplingResidual(nn.Module):
    """Queries or predictions -> pixels: a learned map asks the set, twice, and is then upsampled."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        size, width = design.destination.grids[0], design.width
        grid = (-(-size[0] // design.patch[0]), -(-size[1] // design.patch[1]))
        self.embed = nn.Linear(design.source.channels, width)
        self.slots, self.map = _codes(design.source.count, width), _codes(area(grid), width)
        self.layers = nn.ModuleList(Layer(width, design.heads, 2 * width, own=False, crossed=True) for _ in range(2))
        self.upsampling = Upsampling(Form("tokens", width, (grid,)), 3, size, design.patch, width, design.depth)

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        memory, y = self.embed(x), self.map.expand(len(x), -1, -1)
        for layer in self.layers:
            y = layer(y, memory=memory, memory_code=self.slots)
        return self.upsampling(y)


class TransformerResidual(nn.Module):
    """Tokens or queries -> the same form: layers that see positional codes.

    Queries, and tokens on several grids, have learned codes too, which tell them apart. With a memory ("decoder") zeros
    with the destination's codes read the set; where it has no positional code, one is learned.
    """

    def __init__(self, design: Design) -> None:
        super().__init__()
        source, end, self.crossed = design.source, design.destination, design.kind == "decoder"
        channels, self.prefix = end.channels, end.prefix
        self.embed = nn.Linear(source.channels, channels) if self.crossed else None
        self.slots = _codes(source.count, channels) if source.count else None
        self.codes: nn.Parameter | GridCodes | None = None
        if self.crossed and not design.positioned:
            self.codes = _codes(end.count or sum(map(area, end.grids)), channels)
        elif len(source.grids) > 1:
            self.codes = GridCodes(source)
        self.prefix_codes = _codes(self.prefix, channels) if self.crossed and self.prefix else None
        self.layers = nn.ModuleList(
            Layer(channels, design.heads, design.hidden, crossed=self.crossed) for _ in range(design.depth)
        )
        self.head = _head(channels, channels)

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        hidden = None if around.padding is None else F.pad(around.padding, (self.prefix, 0))
        code = None if around.position is None else F.pad(around.position, (0, 0, self.prefix, 0))
        if not self.crossed:
            learned = self.codes() if isinstance(self.codes, GridCodes) else self.slots
            code = learned if code is None else code if learned is None else code + learned
            for layer in self.layers:
                x = layer(x, code, hidden)
            return self.head(x)
        if isinstance(self.codes, Tensor):
            code = F.pad(self.codes, (0, 0, self.prefix, 0))
        assert code is not None
        assert self.embed is not None
        if self.prefix_codes is not None:
            code = code + F.pad(self.prefix_codes, (0, 0, 0, code.shape[1] - self.prefix))
        memory, y = self.embed(x), torch.zeros_like(code).expand(len(x), -1, -1)
        for layer in self.layers:
            y = layer(y, code, hidden, memory, self.slots)
        return self.head(y)


class SplittingResidual(nn.Module):
    """Tokens -> tokens on other grids, of other channels or with other prefix tokens: any form to any other.

    What the stage did after it merged tokens is undone on the source's grids, then every cell is split into the tokens
    under it by one linear map (a finer grid is gathered instead), and one more layer runs on the destination's grids. A
    stage of convolutions or pooling has residual convolutions in both places.

        (h, w), C -> [depth x layers] -> linear C -> k * k * C' -> (k h, k w), C' -> [layer] -> (k h, k w), C'
    """

    def __init__(self, design: Design) -> None:
        super().__init__()
        source, end = self.source, self.destination = design.source, design.destination
        self.layout = plan_layout(("", ""), source, end)
        self.codes: GridCodes | None = None
        self.end_codes: GridCodes | None = None
        before: list[nn.Module]
        after: list[nn.Module]
        if design.mixing == "attention":
            self.codes, self.end_codes = GridCodes(source), GridCodes(end)
            heads = [_divisor(form.channels, design.heads) for form in (source, end)]
            before = [Layer(source.channels, heads[0], design.hidden) for _ in range(design.depth)]
            after = [Layer(end.channels, heads[1], 2 * end.channels)]
        else:
            before = [ResidualConvolutions(source.channels) for _ in range(design.depth)]
            after = [ResidualConvolutions(end.channels)]
        self.before, self.after = nn.ModuleList(before), nn.ModuleList(after)
        self.split = nn.ModuleDict(
            {
                name: _linear(block.inputs, block.outputs)
                for name, block in self.layout.blocks.items()
                if block.reading.what == "cells"
            }
        )
        self.first = nn.Linear(source.channels, end.channels) if end.prefix else None
        self.first_codes = _codes(end.prefix, end.channels) if end.prefix else None
        self.head = _head(end.channels, end.channels)

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        source, end = self.source, self.destination
        code = None if self.codes is None else self.codes()
        x = self._mixed(self.before, x, source, code, around.source_padding)
        tokens = Tokens(x, source.grids, source.prefix, around.source_padding)
        parts = []
        if self.first is not None:
            equal = source.prefix == end.prefix
            parts.append(self.first(tokens.prefix_values if equal else x.mean(1, keepdim=True)) + self.first_codes)
        for level, (name, linear) in enumerate(self.split.items()):
            block = self.layout.blocks[name]
            rows = linear(pack_source(tokens, block)).unflatten(0, (len(x), -1))
            grid, patch = block.reading.cells(source.grids), self.layout.patches[level]
            whole = resized(unpatchify(rows, grid, patch, self.layout.canvas(block, level)), end.grids[level])
            parts.append(whole.flatten(2).transpose(1, 2))
        code = None if self.end_codes is None else self.end_codes()
        if code is not None and around.position is not None:
            code = code + F.pad(around.position, (0, 0, end.prefix, 0))
        return self.head(self._mixed(self.after, torch.cat(parts, dim=1), end, code, around.padding))

    def _mixed(
        self, layers: nn.ModuleList, x: Tensor, form: Form, code: Tensor | None, padding: Tensor | None
    ) -> Tensor:
        if code is not None:
            hidden = None if padding is None else F.pad(padding, (form.prefix, 0))
            for layer in layers:
                x = layer(x, code, hidden)
            return x
        maps = [nn.Sequential(*layers)(whole) for whole in Tokens(x, form.grids, form.prefix).maps()]
        return torch.cat([x[:, : form.prefix], *(whole.flatten(2).transpose(1, 2) for whole in maps)], dim=1)


class MlpResidual(nn.Module):
    """Each token or query by itself; queries are told apart by a learned embedding."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.embed = nn.Linear(design.source.channels, design.hidden)
        self.slots = _codes(design.source.count, design.hidden) if design.source.count else None
        self.middle = nn.Linear(design.hidden, design.hidden)
        self.head = _head(design.hidden, design.destination.channels)

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        x = self.embed(x) if self.slots is None else self.embed(x) + self.slots
        return self.head(F.gelu(self.middle(F.gelu(x))))


RESIDUALS: dict[Kind, type[nn.Module]] = {
    "upsampling": UpsamplingResidual,
    "convolution": UpsamplingResidual,
    "set_upsampling": SetUpsamplingResidual,
    "encoder": TransformerResidual,
    "decoder": TransformerResidual,
    "queries": TransformerResidual,
    "splitting": SplittingResidual,
    "mlp": MlpResidual,
}


def design_for(
    source: Form,
    destination: Form,
    stage: Stage | None = None,
    *,
    positioned: bool = False,
    reduction: Grid | None = None,
) -> Design:
    """The residual for these two ends and the stage of the target between them (None for direct decoders).

    positioned: whether the destination has a positional code; reduction: pixels a token side, used where it fits.
    Raises BacksightError where there is no module from the one form to the other.
    """
    kind, patch = _kind(source, destination, stage), (1, 1)
    between = "" if stage is None else stage.kind
    if kind in ("upsampling", "convolution"):
        size, grid = destination.grids[0], max(source.grids, key=area)
        patch = (-(-size[0] // grid[0]), -(-size[1] // grid[1]))
        given = zip(size, reduction or patch, grid, strict=True)
        if destination.kind == PIXELS and all(-(-side // step) == cells for side, step, cells in given):
            patch = reduction or patch
    elif kind == "set_upsampling":
        patch = reduction or (8, 8)
    width = min(384, max(64 if kind == "set_upsampling" else 32, source.channels * 3 // 4 // 16 * 16))
    layers, heads, hidden = SHALLOW, 4, 2 * max(source.channels, destination.channels)
    mixing: Literal["attention", "convolution"] = "convolution" if between in LOCAL_STAGES else "attention"
    if stage is not None and kind in ("encoder", "decoder", "queries", "splitting") and mixing == "attention":
        layers = max(1, stage.depth)
        heads, hidden = stage.heads or heads, stage.hidden or hidden
    channels = {"decoder": destination.channels, "set_upsampling": width}.get(kind, source.channels)
    heads = _divisor(channels, heads)
    return Design(kind, source, destination, layers, heads, hidden, width, patch, positioned, mixing)


def _kind(source: Form, destination: Form, stage: Stage | None) -> Kind:
    between = "" if stage is None else stage.kind
    if destination.kind == PIXELS:
        return "upsampling" if source.kind == "tokens" else "set_upsampling"
    if source.kind == destination.kind == "tokens":
        return _kind_between_tokens(source, destination, between)
    if source.kind == "tokens" or destination.kind == "predictions":
        raise BacksightError(
            f"There is no inverse module from {source} to {destination}: inverses run against the forward pass, in "
            "which tokens come before queries and predictions come last; swap the taps."
        )
    if destination.kind == "tokens" or source.count != destination.count:
        return "decoder"
    return "mlp" if source.kind == "predictions" or between == "norm" else "queries"


def _kind_between_tokens(source: Form, destination: Form, between: str) -> Kind:
    if between in ("backbone", "convolution", "patch_embedding"):
        finest, single = max(source.grids, key=area), destination.prefix == 0 and len(destination.grids) == 1
        if single and all(side >= cells for side, cells in zip(destination.grids[0], finest, strict=True)):
            return "convolution"
        return "splitting"
    if (source.grids, source.prefix) != (destination.grids, destination.prefix):
        return "splitting"
    if between not in ("blocks", "encoder", "decoder"):
        return "mlp"
    return "encoder" if source.channels == destination.channels else "splitting"


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
    sides: list[list[int]] = []
    for number in (tall, wide):
        factors, divisor = [], 2
        while number > 1:
            while number % divisor == 0:
                factors.append(divisor)
                number //= divisor
            divisor += 1
        sides.append(factors)
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
