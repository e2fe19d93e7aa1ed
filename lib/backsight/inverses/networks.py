"""The residual networks of inverse modules: one transformer, one upsampler, one MLP.

Each is called with what it reads, in units of its deviation, and with the positional code (1 | B, N, C) of the
destination's grid tokens, or None. Attention layers are pre-norm, which the zero start of the residual
needs: the last layer of every network starts at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.inverses.rows import PIXELS, area, over, pack_source, plan_layout, resized, unpatchify
from backsight.representation import Form, Grid, Tokens

if TYPE_CHECKING:
    from backsight.targets.base import Stage

SHALLOW = 2  # convolution pairs, however deep the stage was
LOCAL_STAGES = ("backbone", "convolution", "patch_embedding", "norm", "projection")  # without attention


@dataclass(frozen=True)
class Design:
    """What a residual network is built from: the whole of it can be written down as JSON.

    kind: of RESIDUALS; depth: layers, or convolution pairs on the grid; heads, hidden: of the attention layers and
    MLPs; width: channels of the convolutions on the grid; patch: pixels under a token (or under a cell of the map that
    reads a set); positioned: whether the destination has a positional code; mixing: what the tokens of "splitting" are
    mixed by, "attention" or "convolution".
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: str
    source: Form
    destination: Form
    depth: int
    heads: int
    hidden: int
    width: int
    patch: Grid
    positioned: bool
    mixing: str = "attention"


class Attention(nn.Module):
    """Multi-head attention of the normalised x to itself, or to a memory; codes are added to queries and keys."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.query, self.key = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.value, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor, code: Any, memory: Tensor | None = None, memory_code: Any = 0) -> Tensor:
        """x: (B, N, C); memory: (B, M, C), or None for x itself; codes: of their shapes, or 0."""
        x = self.norm(x)
        memory, memory_code = (x, code) if memory is None else (memory, memory_code)
        projected = self.query(x + code), self.key(memory + memory_code), self.value(memory)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in projected)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A pre-norm transformer layer: attention to itself (own), to a memory (crossed), and an MLP."""

    def __init__(self, channels: int, heads: int, hidden: int, *, own: bool = True, crossed: bool = False) -> None:
        super().__init__()
        self.own = Attention(channels, heads) if own else None
        self.crossed = Attention(channels, heads) if crossed else None
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels)
        )

    def forward(self, x: Tensor, code: Any, memory: Tensor | None = None, memory_code: Any = 0) -> Tensor:
        if self.own is not None:
            x = x + self.own(x, code)
        if self.crossed is not None:
            x = x + self.crossed(x, code, memory, memory_code)
        return x + self.mlp(x)


class GridCodes(nn.Module):
    """A learned code for each token, of its row and its column in its own grid; for each prefix token or query."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.rows = nn.ParameterList(_codes(grid[0], form.channels) for grid in form.grids)
        self.columns = nn.ParameterList(_codes(grid[1], form.channels) for grid in form.grids)
        alone = form.prefix or form.count
        self.prefix = _codes(alone, form.channels) if alone else None

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
        return unpatchify(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]), self.factors)


class Upsampling(nn.Module):
    """Tokens on one or more grids -> (B, channels, H, W): convolutions on the finest grid, then pixel shuffles.

    The number of shuffles follows from the prime factors of the patch (output cells a side of a grid cell), and the
    width halves with every shuffle, so that all resolutions cost about the same; the last shuffle makes the output, so
    that no convolution runs at the full resolution. What reaches beyond the size is cut off (or resized, where it is a
    patch or more). On other grids than it was built for the output is larger or smaller in proportion.

        grid (h, w), width -> [depth x convolutions] -> (2h, 2w), width / 2 -> [convolutions] -> … -> (H, W)
    """

    def __init__(self, source: Form, channels: int, size: Grid, patch: Grid, width: int, depth: int) -> None:
        super().__init__()
        self.grids, self.size = source.grids, size
        # Where whole patches do not make the size, what they do make is resized, so that no cell is cut away.
        self.fits = over(size, patch) == max(source.grids, key=area)
        *steps, last = _factors(patch)
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

    def forward(self, x: Tokens) -> Tensor:
        finest = max(x.grids, key=area)
        parts = [stem(whole.movedim(1, 3)).movedim(3, 1) for stem, whole in zip(self.stems, x.maps(), strict=True)]
        y = torch.stack([part if part.shape[2:] == finest else F.interpolate(part, finest) for part in parts]).sum(0)
        if self.from_prefix is not None:
            y = y + self.from_prefix(x.prefix_values.flatten(1))[:, :, None, None]
        for stage in self.stages:
            y = stage(y)
        y = self.shuffle(self.head(F.gelu(self.norm(y))))
        if x.grids != self.grids:
            return y
        return y[:, :, : self.size[0], : self.size[1]] if self.fits else F.interpolate(y, self.size, mode="bilinear")


class UpsamplingResidual(nn.Module):
    """Tokens -> pixels, or tokens of an equal or finer grid; a set is first read by a learned map."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        source, end, self.asking = design.source, design.destination, None
        self.flat = end.kind == "tokens"
        if design.kind == "set_upsampling":
            source = Form("tokens", design.width, (over(end.grids[0], design.patch),))
            self.asking = TransformerResidual(design, source)
        self.upsampling = Upsampling(source, end.channels, end.grids[0], design.patch, design.width, design.depth)

    def forward(self, x: Any, position: Tensor | None) -> Tensor:
        if self.asking is not None:
            x = Tokens(self.asking(x, None), self.upsampling.grids)
        y = self.upsampling(x)
        return y.flatten(2).transpose(1, 2) if self.flat else y


class TransformerResidual(nn.Module):
    """Tokens or queries -> the same form (values alone): layers that see positional codes.

    Queries, and tokens on several grids, have learned codes too, which tell them apart. A set becomes another form by
    reading: zeros with the form's codes, learned where there is no positional one, ask it in every layer. asked: the
    map that reads a set for an upsampling: without a last layer, and without attention to itself.
    """

    def __init__(self, design: Design, asked: Form | None = None) -> None:
        super().__init__()
        source, self.form = design.source, asked or design.destination
        form, channels, own = self.form, self.form.channels, asked is None
        self.crossed = design.kind in ("decoder", "set_upsampling")
        self.embed = nn.Linear(source.channels, channels) if self.crossed else None
        self.slots = _codes(source.count, channels) if source.count else None
        learned = not (own and design.positioned) or form.prefix > 0 if self.crossed else len(source.grids) > 1
        self.codes = GridCodes(form) if learned else None
        self.layers = nn.ModuleList(
            Layer(channels, design.heads, design.hidden, own=own, crossed=self.crossed) for _ in range(design.depth)
        )
        self.head = _head(channels, channels) if own else nn.Identity()

    def forward(self, x: Any, position: Tensor | None) -> Tensor:
        form, slots = self.form, 0 if self.slots is None else self.slots
        code = 0 if position is None else F.pad(position, (0, 0, form.prefix, 0))
        code = code if self.codes is None else code + self.codes()
        y, memory = x.values, None
        if self.embed is None:
            code = code + slots
        else:
            size = form.count or form.prefix + sum(map(area, form.grids))
            memory, y = self.embed(y), y.new_zeros(len(y), size, form.channels)
        for layer in self.layers:
            y = layer(y, code, memory, slots)
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
        self.layout = plan_layout(source, end, maximum_inputs=2**31)  # it learns what to read
        attends = design.mixing == "attention"
        self.codes, self.end_codes = (GridCodes(form) if attends else None for form in (source, end))

        def layers(form: Form, count: int, hidden: int) -> nn.Sequential:
            sizes = (form.channels, gcd(form.channels, design.heads), hidden)
            kinds = (Layer(*sizes) if attends else ResidualConvolutions(form.channels) for _ in range(count))
            return nn.Sequential(*kinds)

        self.before = layers(source, design.depth, design.hidden)
        self.after = layers(end, 1, 2 * end.channels)
        self.split = nn.ModuleDict()
        for patch, (name, block) in zip(self.layout.patches, self.layout.blocks.items(), strict=False):
            read = area(block.gathered) + len(block.coarser)
            self.split[name] = nn.Linear(source.channels * read, end.channels * area(patch))
        self.first = nn.Linear(source.channels, end.channels) if end.prefix else None
        self.first_codes = _codes(end.prefix, end.channels) if end.prefix else None
        self.head = _head(end.channels, end.channels)

    def forward(self, x: Tokens, position: Tensor | None) -> Tensor:
        end, layout = self.destination, self.layout
        x = self._mixed(self.before, x, 0 if self.codes is None else self.codes())
        parts = []
        if self.first is not None:
            read = x.prefix_values if x.prefix == end.prefix else x.values.mean(1, keepdim=True)
            parts.append(self.first(read) + self.first_codes)
        for level, (name, linear) in enumerate(self.split.items()):
            block = layout.blocks[name]
            rows = linear(pack_source(x, block)).unflatten(0, (x.batch, -1))
            cells, canvas = block.cells(x.grids), layout.canvas(block, level)
            whole = resized(unpatchify(rows, cells, layout.patches[level], canvas), end.grids[level])
            parts.append(whole.flatten(2).transpose(1, 2))
        code: Any = 0 if self.end_codes is None else self.end_codes()
        if position is not None:
            code = code + F.pad(position, (0, 0, end.prefix, 0))
        y = Tokens(torch.cat(parts, dim=1), end.grids, end.prefix)
        return self.head(self._mixed(self.after, y, code).values)

    def _mixed(self, layers: nn.Sequential, x: Tokens, code: Any) -> Tokens:
        if self.codes is None:
            maps = [layers(whole).flatten(2).transpose(1, 2) for whole in x.maps()]
            return x.replace(torch.cat([x.prefix_values, *maps], dim=1))
        for layer in layers:
            x = x.replace(layer(x.values, code))
        return x


class MlpResidual(nn.Module):
    """Each token or query by itself; queries are told apart by a learned embedding."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.embed = nn.Linear(design.source.channels, design.hidden)
        self.slots = _codes(design.source.count, design.hidden) if design.source.count else None
        self.middle = nn.Linear(design.hidden, design.hidden)
        self.head = _head(design.hidden, design.destination.channels)

    def forward(self, x: Any, position: Tensor | None) -> Tensor:
        y = self.embed(x.values) if self.slots is None else self.embed(x.values) + self.slots
        return self.head(F.gelu(self.middle(F.gelu(y))))


RESIDUALS: dict[str, type[nn.Module]] = {
    "upsampling": UpsamplingResidual,  # tokens -> pixels
    "convolution": UpsamplingResidual,  # tokens -> the tokens before a backbone
    "set_upsampling": UpsamplingResidual,  # queries, predictions -> pixels
    "encoder": TransformerResidual,  # tokens -> tokens on the same grids
    "decoder": TransformerResidual,  # queries, predictions -> tokens, or another number of queries
    "queries": TransformerResidual,  # queries -> queries
    "splitting": SplittingResidual,  # tokens -> tokens on other grids, of other channels or prefix
    "mlp": MlpResidual,  # through norms, projections and heads
}


def design_for(
    source: Form,
    destination: Form,
    stage: Stage | None = None,
    positioned: bool = False,
    reduction: Grid | None = None,
) -> Design:
    """The residual for these two ends and the stage of the target between them (None for direct decoders).

    positioned: whether the destination has a positional code; reduction: pixels a token side, used where it fits.
    Raises BacksightError where there is no module from the one form to the other.
    """
    between = "" if stage is None else stage.kind
    kind, patch = _kind(source, destination, between), (1, 1)
    width = min(384, max(32, source.channels * 3 // 4 // 16 * 16))
    layers, heads, hidden = SHALLOW, 4, 2 * max(source.channels, destination.channels)
    if kind in ("upsampling", "convolution"):
        size, grid = destination.grids[0], max(source.grids, key=area)
        patch = over(size, grid)
        if destination.kind == PIXELS and reduction and over(size, reduction) == grid:
            patch = reduction
    elif kind == "set_upsampling":
        patch, width = reduction or (8, 8), max(64, width)
        hidden = 2 * width
    mixing = "convolution" if between in LOCAL_STAGES else "attention"
    if stage is not None and kind in ("encoder", "decoder", "queries", "splitting") and mixing == "attention":
        layers = max(1, stage.depth)
        heads, hidden = stage.heads or heads, stage.hidden or hidden
    channels = {"decoder": destination.channels, "set_upsampling": width}.get(kind, source.channels)
    heads = gcd(channels, heads)
    return Design(kind, source, destination, layers, heads, hidden, width, patch, positioned, mixing)


def _kind(source: Form, destination: Form, between: str) -> str:
    if destination.kind == PIXELS:
        return "upsampling" if source.kind == "tokens" else "set_upsampling"
    if source.kind == destination.kind == "tokens":
        if between in ("backbone", "convolution", "patch_embedding"):
            finest, single = max(source.grids, key=area), destination.prefix == 0 and len(destination.grids) == 1
            tall, wide = destination.grids[0]
            return "convolution" if single and tall >= finest[0] and wide >= finest[1] else "splitting"
        if (source.grids, source.prefix) != (destination.grids, destination.prefix):
            return "splitting"
        if between not in ("blocks", "encoder", "decoder"):
            return "mlp"
        return "encoder" if source.channels == destination.channels else "splitting"
    if source.kind == "tokens" or destination.kind == "predictions":
        raise BacksightError(
            f"There is no inverse module from {source} to {destination}: inverses run against the forward pass, in "
            "which tokens come before queries and predictions come last; swap the taps."
        )
    if destination.kind == "tokens" or source.count != destination.count:
        return "decoder"
    return "mlp" if source.kind == "predictions" or between == "norm" else "queries"


def _factors(patch: Grid) -> list[Grid]:
    """Prime factors of both sides, in pairs, the largest last; (1, 1) for sides of one."""
    sides: list[list[int]] = [[], []]
    for side, factors in zip(patch, sides, strict=True):
        for prime in range(2, side + 1):
            while side % prime == 0:
                factors.insert(0, prime)
                side //= prime
    pairs: Any = zip_longest(*sides, fillvalue=1)
    return list(pairs)[::-1] or [(1, 1)]


def _codes(count: int, channels: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(1, count, channels) * 0.5)


def _head(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(inputs), _zeroed(nn.Linear(inputs, outputs)))


def _zeroed(layer: Any) -> Any:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
