"""Inverse modules: from what one tap holds to what an earlier tap held, or to the image.

Every module is  linear(x) + scale * residual(x):  a closed-form ridge map, kept as it is, and a network of
the kind of the stage it inverts, whose last layer starts at zero. Before any training a module *is* the ridge
map (the mean, where no ridge map is defined: between grids of different size), and training has only to learn
the rest.

    pixels  <- tokens                 upsampling:      convolutions on the grid, then pixel shuffles
    pixels  <- queries, predictions   set_upsampling:  a learned map that reads the set, then the same
    tokens  <- tokens                 blocks (timm blocks), encoder (attention with the positional code),
                                      convolution (other grid or CNN stage), mlp (norms, projections)
    tokens  <- queries, predictions   decoder:         the map's positional codes ask, the queries answer
    queries <- queries                queries:         self-attention with a learned query embedding
    queries <- predictions            heads:           an MLP from class distribution and box

All attention layers written here are pre-norm, which the zero start of the residual needs; nothing depends on
train or eval mode.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.linear import PIXELS, Form, LinearInverse, form_of
from backsight.representation import Grid, Queries, Representation, Tokens
from backsight.training import read_tensors, seeded, write_tensors

if TYPE_CHECKING:
    from backsight.targets.base import Stage, Target

FORMAT = 1  # of the files


@dataclass(frozen=True)
class InverseHeader:
    """Where an inverse comes from; it is written into every file.

    family: "linear" | "direct" | "modular" | "modular_polished"; target, weights, weights_hash: of the target;
    source, destination: taps, or "pixels"; data: name and split of the training images; seed; steps: trained
    (0 for linear); validation_loss: the best one, as a share of the destination's variance, or None.
    """

    family: str
    target: str
    weights: str
    weights_hash: str
    source: str
    destination: str
    data: str = "unknown"
    seed: int = 0
    steps: int = 0
    validation_loss: float | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions())


@dataclass(frozen=True)
class Design:
    """What a residual network is built from: the whole of it can be written down as JSON.

    kind: a key of RESIDUALS; depth: blocks or layers, or convolution pairs on the grid; heads, hidden: of the
    attention layers and MLPs; width: channels of the convolutions on the grid; patch: pixels under a token (or
    under a cell of the map that reads a set); positioned: whether the destination has a positional code.
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

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Design:
        ends: dict[str, Any] = {}
        for end in ("source", "destination"):
            grids = tuple((height, width) for height, width in values[end]["grids"])
            ends[end] = Form(**{**values[end], "grids": grids})
        return cls(**{**values, **ends, "patch": tuple(values["patch"])})


@dataclass(frozen=True)
class Moments:
    """First and second moments of a representation, of which the residuals take their units.

    mean, deviation: (P + 1, C): each prefix token by itself, then all grid tokens together; (1, C) for sets and
    for pixels. variance: of all values about these means, the unit of the losses.
    """

    mean: Tensor
    deviation: Tensor
    variance: float

    @classmethod
    def of(cls, values: Tensor, prefix: int = 0, padding: Tensor | None = None) -> Moments:
        """values: (B, N, C) of some hundred images; padding: (B, N - prefix) bool, True = left out."""
        grid = values[:, prefix:].flatten(0, 1) if padding is None else values[:, prefix:][~padding]
        groups = [values[:, number] for number in range(prefix)] + [grid]
        mean = torch.stack([group.double().mean(dim=0) for group in groups])
        spread = torch.stack([group.double().var(dim=0, unbiased=False) for group in groups])
        share = torch.tensor([1.0] * prefix + [values.shape[1] - prefix], dtype=torch.float64)
        variance = float((spread.mean(dim=1).cpu() * share).sum() / share.sum())
        deviation = spread.sqrt()
        # A channel that hardly moves is not blown up to the size of the others.
        deviation = deviation.clamp(min=0.01 * float(deviation.mean()) + 1e-12)
        return cls(mean.float(), deviation.float(), max(variance, 1e-12))


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
    output, so that no convolution runs at the full resolution. What reaches beyond the size is cut off.

        grid (h, w), width -> [depth x convolutions] -> (2h, 2w), width / 2 -> [convolutions] -> … -> (H, W)
    """

    def __init__(self, source: Form, channels: int, size: Grid, patch: Grid, width: int, depth: int) -> None:
        super().__init__()
        self.grids, self.prefix, self.size = source.grids, source.prefix, size
        self.grid = _finest(source.grids)
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
        return y[:, :, : self.size[0], : self.size[1]]


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

    def forward(self, x: Tensor, position: Tensor | None, padding: Tensor | None) -> Tensor:
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

    def forward(self, x: Tensor, position: Tensor | None, padding: Tensor | None) -> Tensor:
        memory = self.embed(x)
        asked = self.map.expand(len(x), -1, -1)
        for layer in self.layers:
            asked = layer(asked, None, memory, self.slots)
        return self.upsampling(asked)


class ConvolutionResidual(nn.Module):
    """Tokens -> tokens of an equal or finer grid, where the stage between them is a CNN's."""

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

    def forward(self, x: Tensor, position: Tensor | None, padding: Tensor | None) -> Tensor:
        return self.upsampling(x).flatten(2).transpose(1, 2)


class BlocksResidual(nn.Module):
    """Tokens -> tokens through timm's transformer blocks."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        channels = design.source.channels
        self.blocks = nn.Sequential(
            *(
                Block(channels, design.heads, mlp_ratio=design.hidden / channels, qkv_bias=True)
                for _ in range(design.depth)
            )
        )
        self.head = _head(channels, design.destination.channels)

    def forward(self, x: Tensor, position: Tensor | None, padding: Tensor | None) -> Tensor:
        return self.head(self.blocks(x))


class EncoderResidual(nn.Module):
    """Tokens -> tokens through encoder layers; padded tokens are not looked at."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.prefix, channels = design.source.prefix, design.source.channels
        self.layers = nn.ModuleList(AttentionLayer(channels, design.heads, design.hidden) for _ in range(design.depth))
        self.head = _head(channels, design.destination.channels)

    def forward(self, x: Tensor, position: Tensor | None, padding: Tensor | None) -> Tensor:
        if self.prefix and position is not None:
            position = F.pad(position, (0, 0, self.prefix, 0))
        if self.prefix and padding is not None:
            padding = F.pad(padding, (self.prefix, 0))
        for layer in self.layers:
            x = layer(x, position, padding=padding)
        return self.head(x)


class DecoderResidual(nn.Module):
    """Queries or predictions -> tokens: zeros with the map's positional code read the set.

    The memory is the set, with a learned query embedding as its position; where the map has no positional code,
    one is learned.
    """

    def __init__(self, design: Design) -> None:
        super().__init__()
        source, destination = design.source, design.destination
        channels = destination.channels
        self.embed = nn.Linear(source.channels, channels)
        self.slots = _codes(source.count, channels)
        self.prefix_codes = _codes(destination.prefix, channels) if destination.prefix else None
        area = sum(height * width for height, width in destination.grids)
        self.codes = None if design.positioned else _codes(area, channels)
        self.layers = nn.ModuleList(
            AttentionLayer(channels, design.heads, design.hidden, crossed=True) for _ in range(design.depth)
        )
        self.head = _head(channels, channels)

    def forward(self, x: Tensor, position: Tensor | None, padding: Tensor | None) -> Tensor:
        """position, padding: of the destination."""
        position = self.codes if self.codes is not None else position
        assert position is not None
        if self.prefix_codes is not None:
            position = torch.cat([self.prefix_codes.expand(len(position), -1, -1), position], dim=1)
            padding = None if padding is None else F.pad(padding, (self.prefix_codes.shape[1], 0))
        memory = self.embed(x)
        asked = torch.zeros_like(position).expand(len(x), -1, -1)
        for layer in self.layers:
            asked = layer(asked, position, memory, self.slots, padding)
        return self.head(asked)


class QueriesResidual(nn.Module):
    """Queries -> queries through self-attention with a learned query embedding."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        channels = design.source.channels
        self.slots = _codes(design.source.count, channels)
        self.layers = nn.ModuleList(AttentionLayer(channels, design.heads, design.hidden) for _ in range(design.depth))
        self.head = _head(channels, design.destination.channels)

    def forward(self, x: Tensor, position: Tensor | None, padding: Tensor | None) -> Tensor:
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

    def forward(self, x: Tensor, position: Tensor | None, padding: Tensor | None) -> Tensor:
        x = self.embed(x)
        if self.slots is not None:
            x = x + self.slots
        return self.head(F.gelu(self.middle(F.gelu(x))))


RESIDUALS: dict[str, type[nn.Module]] = {
    "upsampling": UpsamplingResidual,
    "set_upsampling": SetUpsamplingResidual,
    "convolution": ConvolutionResidual,
    "blocks": BlocksResidual,
    "encoder": EncoderResidual,
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
) -> Design:
    """The residual for these two ends and the stage of the target between them (None for direct decoders).

    positioned: whether the destination has a positional code; reduction: pixels a token side, used where it
    fits the grid; width: channels of the convolutions on the grid, by default three quarters of the source's.
    Raises BacksightError where there is no module from the one form to the other.
    """
    kind, patch = _kind(source, destination, stage), (1, 1)
    if kind in ("upsampling", "convolution"):
        patch = _patch(_finest(source.grids), destination.grids[0], reduction)
    elif kind == "set_upsampling":
        patch = reduction or (8, 8)
    if width is None:
        width = min(384, max(64 if kind == "set_upsampling" else 32, source.channels * 3 // 4 // 16 * 16))
    depth, heads, hidden = 2, 4, 2 * max(source.channels, destination.channels)
    if stage is not None and kind in ("blocks", "encoder", "decoder", "queries"):
        depth, heads, hidden = max(1, stage.depth), stage.heads or heads, stage.hidden or hidden
    return Design(kind, source, destination, depth, heads, hidden, width, patch, positioned)


def _kind(source: Form, destination: Form, stage: Stage | None) -> str:
    ends = (source.kind, destination.kind)
    between = "" if stage is None else stage.kind
    if ends == ("tokens", PIXELS):
        return "upsampling"
    if destination.kind == PIXELS:
        return "set_upsampling"
    if ends == ("tokens", "tokens"):
        on_one_grid = destination.prefix == 0 and len(destination.grids) == 1
        if on_one_grid and (between == "backbone" or source.grids != destination.grids):
            return "convolution"
        if (source.grids, source.prefix) == (destination.grids, destination.prefix):
            own_kind = between in ("blocks", "encoder") and source.channels == destination.channels
            return between if own_kind else "mlp"
    elif destination.kind == "tokens":
        return "decoder"
    elif ends == ("queries", "queries"):
        return "mlp" if between == "norm" else "queries"
    elif ends == ("predictions", "queries"):
        return "heads"
    raise BacksightError(f"There is no inverse module from {_words(source)} to {_words(destination)}.")


def _patch(grid: Grid, size: Grid, reduction: Grid | None) -> Grid:
    """Output cells a side of a grid cell: the reduction where it fits, else size / grid, rounded up."""
    if size[0] < grid[0] or size[1] < grid[1]:
        raise BacksightError(f"There is no inverse module from the grid {grid} to the smaller one {size}.")
    if reduction is not None and all(-(-s // r) == g for s, r, g in zip(size, reduction, grid, strict=True)):
        return reduction
    return -(-size[0] // grid[0]), -(-size[1] // grid[1])


class Inverse(nn.Module):
    """A map from one tap's representation to an earlier tap's, or to images.

    inverse(representation) -> images (B, 3, H, W) in [0, 1], or a Representation; `raw` gives the values without
    clamping. header: where it comes from; source_form, destination_form: what enters and leaves; history: the
    training, if it was trained in this process (step, module, split, loss, seconds).
    A representation of another tap is accepted where its form agrees. What the fits return is frozen (and still
    differentiable in the representation).
    Raises BacksightError where it does not.
    """

    source_mean: Tensor
    source_deviation: Tensor
    destination_mean: Tensor
    destination_deviation: Tensor
    position: Tensor | None

    def __init__(
        self,
        header: InverseHeader,
        design: Design,
        linear: LinearInverse | None,
        source: Moments,
        destination: Moments,
        position: Tensor | None = None,
    ) -> None:
        """position: (1, N, C) of an unpadded destination, used where the source brings none."""
        super().__init__()
        self.header, self.design = header, design
        self.history = pd.DataFrame()
        self.linear = None if linear is None else linear.requires_grad_(False)
        self.residual = RESIDUALS[design.kind](design)
        self.variance = destination.variance
        for name, moments in (("source", source), ("destination", destination)):
            self.register_buffer(f"{name}_mean", moments.mean.clone())
            self.register_buffer(f"{name}_deviation", moments.deviation.clone())
        self.register_buffer("position", None if position is None else position.clone())

    @property
    def source(self) -> str:
        return self.header.source

    @property
    def destination(self) -> str:
        return self.header.destination

    def raw(self, representation: Representation, layout: Tokens | None = None) -> Tensor:
        """Images (B, 3, H, W) or values (B, N, C) before any clamping; arguments as `forward`."""
        self._check(representation)
        with torch.autocast(representation.values.device.type, enabled=False):
            values = representation.values.float()
            x = (values - self._spread(self.source_mean, self.design.source)) / self._spread(
                self.source_deviation, self.design.source
            )
            start = self._start(representation)
        position, padding = self._surroundings(representation, layout)
        rest = self.residual(x, position, padding).float()
        return start + rest * self._spread(self.destination_deviation, self.design.destination)

    def _start(self, representation: Representation) -> Tensor:
        """What the module makes before training: the ridge map, or the mean."""
        if self.linear is None:
            return self._spread(self.destination_mean, self.design.destination)
        made = self.linear.raw(representation)
        return made if isinstance(made, Tensor) else made.values

    def forward(self, representation: Representation, layout: Tokens | None = None) -> Tensor | Representation:
        """layout: tokens whose padding and positional code the destination shares; an inverse from queries to a
        padded map needs it, all others find both in what they are given."""
        return self.wrap(self.raw(representation, layout), representation, layout)

    def wrap(
        self, values: Tensor, representation: Representation, layout: Tokens | None = None
    ) -> Tensor | Representation:
        """What `forward` makes of `raw`: clamped images, or a representation with everything that travels along."""
        form = self.design.destination
        if form.kind == PIXELS:
            return values.clamp(0, 1)
        if form.kind == "queries":
            return Queries(values)
        position, padding = self._surroundings(representation, layout)
        if not self.design.positioned:
            position = None
        elif position is None:
            position = self.position
        return Tokens(values, form.grids, form.prefix, padding, position)

    def _surroundings(
        self, representation: Representation, layout: Tokens | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Positional code and padding for the residual, and, on the same grid, for what it makes.

        They come from the source where it is on the destination's grid, else from the layout, else the code is
        the stored one and nothing is padded.
        """
        form = self.design.destination
        if isinstance(representation, Tokens):
            fits = representation.grids == form.grids
            if form.kind == "tokens" and fits and representation.channels == form.channels:
                own = representation.position
                return self.position if own is None else own, representation.padding
            return self.position, representation.padding if fits else None
        if layout is None or form.kind != "tokens":
            return self.position, None
        if (layout.grids, layout.channels) != (form.grids, form.channels):
            raise BacksightError(
                f"The inverse of {self.source!r} ends in {_words(form)}, but its layout has "
                f"{_words(form_of(layout))}: give tokens of {self.destination!r} as the layout."
            )
        return layout.position, layout.padding

    def _check(self, representation: Representation) -> None:
        given = form_of(representation)
        if given != self.design.source:
            raise BacksightError(
                f"The inverse of {self.source!r} of {self.header.target} reads {_words(self.design.source)}, but "
                f"was given {_words(given)}: feed it a representation of the same form."
            )

    def _spread(self, moments: Tensor, form: Form) -> Tensor:
        """(P + 1, C) -> (P + N, C), one row for each token; (3, 1, 1) for pixels."""
        if form.kind == PIXELS:
            return moments[0][:, None, None]
        if form.prefix == 0:
            return moments
        area = sum(height * width for height, width in form.grids)
        return torch.cat([moments[:-1], moments[-1:].expand(area, -1)])


class Chain(nn.Module):
    """Inverse modules, one after the other: from `start` down to where no module goes on.

    modules: {tap: its inverse}, modular or linear; those that `start` does not lead to are left out.
    chain(representation) -> images, or the representation where the last module ends.
    Raises BacksightError where the ends do not meet: no module for `start`, other forms, other weights, a circle.
    """

    def __init__(self, modules: Mapping[str, Inverse | LinearInverse], start: str) -> None:
        super().__init__()
        if start not in modules:
            nearest = get_close_matches(start, modules, n=3, cutoff=0.3) or list(modules)
            raise BacksightError(f"The chain has no module for its start {start!r}; nearest: {', '.join(nearest)}.")
        path = [modules[start]]
        while (tap := path[-1].destination) in modules:
            _check_joint(path[-1], modules[tap], tap)
            if modules[tap] in path:
                raise BacksightError(
                    f"The chain from {start!r} runs in a circle at {tap!r}: leave one of its modules out."
                )
            path.append(modules[tap])
        self.path = nn.ModuleList(path)

    @property
    def modules_in_order(self) -> tuple[Inverse | LinearInverse, ...]:
        return tuple(module for module in self.path if isinstance(module, Inverse | LinearInverse))

    @property
    def source(self) -> str:
        return self.modules_in_order[0].source

    @property
    def destination(self) -> str:
        return self.modules_in_order[-1].destination

    def forward(self, representation: Representation, layout: Tokens | None = None) -> Any:
        """Images (B, 3, H, W) in [0, 1], or the last representation; layout: see `Inverse.forward`."""
        return self.intermediate(representation, layout)[self.destination]

    def intermediate(self, representation: Representation, layout: Tokens | None = None) -> dict[str, Any]:
        """{tap: what the chain makes of it} on the way down; images under "pixels"."""
        made: dict[str, Any] = {}
        for module in self.modules_in_order:
            plain = isinstance(module, LinearInverse)
            made[module.destination] = module(representation) if plain else module(representation, layout)
            representation = made[module.destination]
        return made


def _check_joint(before: Inverse | LinearInverse, after: Inverse | LinearInverse, tap: str) -> None:
    made, read = _ends(before)[1], _ends(after)[0]
    if made != read or after.source != tap:
        raise BacksightError(
            f"The chain breaks at {tap!r}: the inverse of {before.source!r} makes {_words(made)}, and the next, of "
            f"{after.source!r}, reads {_words(read)}; fit both for the same taps and image size."
        )
    hashes = [each.header.weights_hash for each in (before, after) if isinstance(each, Inverse)]
    if len(set(hashes)) > 1:
        raise BacksightError(
            f"The chain breaks at {tap!r}: its modules invert different weights ({' and '.join(hashes)}); fit "
            "both for one target."
        )


def _ends(inverse: Inverse | LinearInverse) -> tuple[Form, Form]:
    ends = inverse.layout if isinstance(inverse, LinearInverse) else inverse.design
    return ends.source, ends.destination


def header_for(
    target: Target, family: str, source: str, destination: str, images: Any = None, seed: int = 0, steps: int = 0
) -> InverseHeader:
    """The header of an inverse of this target; images: what it was fitted on, an ImageSource or a tensor."""
    name, split = getattr(images, "name", None), getattr(images, "split", None)
    count = 0 if images is None else len(images)
    data = f"{name} {split}, {count} images" if isinstance(name, str) else f"{count} images"
    return InverseHeader(
        family, target.name, target.weights, target.weights_hash, source, destination, data, seed, steps
    )


def save_inverse(
    inverse: Inverse | LinearInverse | Chain,
    path: Path | str,
    half: bool = False,
    header: InverseHeader | None = None,
) -> Path:
    """Write an inverse of any family, or a chain, as one safetensors file with a JSON header in its metadata.

    half: store float16 (half the size; computing stays float32) wherever the values fit. header: of what holds
    none itself, a LinearInverse or a chain of them; see `header_for`.
    Raises BacksightError without a header, and where the file cannot be written.
    """
    tensors = dict(inverse.state_dict())
    if half:
        tensors = {key: _halved(tensor) for key, tensor in tensors.items()}
    first = inverse.modules_in_order[0] if isinstance(inverse, Chain) else inverse
    if isinstance(first, Inverse):
        header = replace(first.header, destination=inverse.destination)
    if header is None:
        raise BacksightError(
            f"The linear inverse of {inverse.source!r} does not know its target: save it with "
            "header=header_for(target, 'linear', source, destination, images)."
        )
    description = {"format": FORMAT, "header": asdict(header), **_describe(inverse)}
    return write_tensors(path, tensors, {"backsight": json.dumps(description)})


def read_header(path: Path | str) -> InverseHeader:
    """The header of a file that `save_inverse` wrote, without its target. Raises BacksightError as it does."""
    return _read(path)[0]


def load_inverse(path: Path | str, target: Target) -> Inverse | LinearInverse | Chain:
    """Read what `save_inverse` wrote, on the target's device.

    Raises BacksightError where the file is missing, damaged or of another kind, and where it inverts another
    target (the weight hash decides, not the name).
    """
    header, description, tensors = _read(path)
    if header.weights_hash != target.weights_hash:
        raise BacksightError(
            f"The inverse {path} was made for {header.target} with the weights {header.weights_hash}, not for "
            f"{target.name} with {target.weights_hash}: load that target, or fit an inverse for this one."
        )
    try:
        with seeded(0):
            inverse = _rebuild(description)
        inverse.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise BacksightError(
            f"The inverse {path} does not fit its own header ({reason}): it is damaged, fit it again."
        ) from error
    return inverse.eval().requires_grad_(False).to(next(target.model.parameters()).device)


def _read(path: Path | str) -> tuple[InverseHeader, dict[str, Any], dict[str, Tensor]]:
    tensors, metadata = read_tensors(path, "inverse")
    try:
        description = json.loads(metadata["backsight"])
        return InverseHeader(**description["header"]), description, tensors
    except (KeyError, TypeError, ValueError) as error:
        raise BacksightError(f"{path} holds no inverse of backsight: name a file that save_inverse() wrote.") from error


def library_versions() -> dict[str, str]:
    """Of the libraries that decide what an inverse computes."""
    return {name: version(name) for name in ("backsight", "torch", "timm", "transformers")}


def _describe(inverse: nn.Module) -> dict[str, Any]:
    if isinstance(inverse, Chain):
        return {"kind": "chain", "path": [_describe(each) for each in inverse.modules_in_order]}
    if isinstance(inverse, LinearInverse):
        return {"kind": "linear", "linear": inverse.configuration()}
    assert isinstance(inverse, Inverse)
    return {
        "kind": "inverse",
        "header": asdict(inverse.header),
        "design": asdict(inverse.design),
        "linear": None if inverse.linear is None else inverse.linear.configuration(),
        "variance": inverse.variance,
        "position": None if inverse.position is None else list(inverse.position.shape),
    }


def _rebuild(description: Mapping[str, Any]) -> Inverse | LinearInverse | Chain:
    if description["kind"] == "chain":
        parts = [_rebuild(each) for each in description["path"]]
        modules = {each.source: each for each in parts if not isinstance(each, Chain)}
        return Chain(modules, parts[0].source)
    linear = None
    if description["linear"] is not None:
        linear = LinearInverse.from_configuration(description["linear"])
    if description["kind"] == "linear":
        assert linear is not None
        return linear
    design = Design.from_json(description["design"])
    empty = [torch.ones(form.prefix + 1, form.channels) for form in (design.source, design.destination)]
    source, destination = (Moments(each, each, description["variance"]) for each in empty)
    shape = description["position"]
    position = None if shape is None else torch.zeros(shape)
    return Inverse(InverseHeader(**description["header"]), design, linear, source, destination, position)


def _words(form: Form) -> str:
    if form.kind == PIXELS:
        return f"images of {form.grids[0][0]} x {form.grids[0][1]} pixels"
    if form.kind != "tokens":
        return f"{form.count} {form.kind} of {form.channels} channels"
    grids = " + ".join(f"{height} x {width}" for height, width in form.grids)
    return f"{form.prefix} prefix and {grids} grid tokens of {form.channels} channels"


def _finest(grids: tuple[Grid, ...]) -> Grid:
    return max(grids, key=lambda grid: grid[0] * grid[1])


def _halved(tensor: Tensor) -> Tensor:
    half = tensor.half() if tensor.dtype == torch.float32 else tensor
    return half if bool(torch.isfinite(half).all()) else tensor


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
