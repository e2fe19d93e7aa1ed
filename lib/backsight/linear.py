"""Linear inverses: ridge regression in closed form, for every tap in one pass over the images.

    images ──► target ──► tap 1 … tap n          one forward pass a batch, shared by all taps
                            │        │
                     Gram + cross moments         features are never stored
                            │        │
              one eigendecomposition a tap        the whole path of ridge strengths
                            │        │
           moments of the validation images       choose the strength, give R²

Moments are accumulated in float64 about the mean of the first batch. Features of deep layers are nearly
collinear and hold a few huge channels: directions whose spread is below 3e-4 of the largest are lost in a
float32 Gram matrix, but they are present in the float32 features (tests/test_linear.py shows both).
Inputs are standardised, so that a ridge strength means the same at every tap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backsight.data import batches
from backsight.errors import BacksightError
from backsight.measures import bootstrap_interval, determination, psnr
from backsight.patches import patchify, unpatchify
from backsight.progress import progress_bar
from backsight.representation import Grid, Queries, Representation, Tokens

PIXELS = "pixels"
ALPHAS: tuple[float, ...] = tuple(10 ** (exponent / 2) for exponent in range(-16, 5))
RANK = 128  # of the maps that read a whole set of queries
MAXIMUM_INPUTS = 4096  # a longer flattened set is projected, query by query
# From a set, a map with more values is regressed at 1/2, 1/4, 1/8 … of its resolution. Neighbouring pixels
# are nearly equal, so that pixels are pooled earlier than tokens.
MAXIMUM_PIXELS = 4096
MAXIMUM_TOKENS = 20_000
SAMPLE_BYTES = 256 * 2**20  # validation images kept for intervals, over all taps
CHUNK_VALUES = 2**24  # float64 values that an update converts at once

Pair = tuple[str, str]


# ---------------------------------------------------------------------------------------------------- ridge
class RidgeAccumulator:
    """The moments of inputs x and of one or more outputs y, from which ridge solutions and errors follow.

    `update(x, y, …)` adds rows; accumulators of different rows add (`+`); nothing else is kept of the data.
    All outputs share the Gram matrix of the inputs and its one eigendecomposition (`spectrum`).
    """

    def __init__(self) -> None:
        self.count = 0
        self.input_shift = torch.empty(0)
        self.input_sum = torch.empty(0)
        self.gram = torch.empty(0)
        self.output_shifts: list[Tensor] = []
        self.output_sums: list[Tensor] = []
        self.output_squares: list[Tensor] = []
        self.crosses: list[Tensor] = []
        self._spectrum: Spectrum | None = None

    def update(self, inputs: Tensor, *outputs: Tensor) -> None:
        """Add rows. inputs: (M, D); outputs: each (M, E_i), the same number of them in every call."""
        if not len(inputs):
            return
        self._spectrum = None
        if self.count == 0:
            self._start(inputs, outputs)
        widths = [inputs.shape[1], *(each.shape[1] for each in outputs)]
        if widths != [len(self.input_sum), *(len(each) for each in self.output_sums)]:
            raise BacksightError(
                f"A ridge accumulator was started with {len(self.input_sum)} inputs and "
                f"{[len(each) for each in self.output_sums]} outputs a row, "
                f"but got {widths[0]} and {widths[1:]}."
            )
        rows = max(64, CHUNK_VALUES // sum(widths))
        for start in range(0, len(inputs), rows):
            x = inputs[start : start + rows].to(self.gram, copy=True).sub_(self.input_shift)
            self.input_sum += x.sum(0)
            self.gram.addmm_(x.T, x)
            for index, output in enumerate(outputs):
                y = output[start : start + rows].to(self.gram, copy=True).sub_(self.output_shifts[index])
                self.output_sums[index] += y.sum(0)
                self.output_squares[index] += torch.linalg.vector_norm(y, dim=0).square_()
                self.crosses[index].addmm_(x.T, y)
        self.count += len(inputs)

    def _start(self, inputs: Tensor, outputs: Sequence[Tensor]) -> None:
        device = torch.device("cpu") if inputs.device.type == "mps" else inputs.device  # mps has no float64
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.input_shift = inputs.to(**options).mean(0)
        self.input_sum = torch.zeros(inputs.shape[1], **options)
        self.gram = torch.zeros(inputs.shape[1], inputs.shape[1], **options)
        self.output_shifts = [each.to(**options).mean(0) for each in outputs]
        self.output_sums = [torch.zeros(each.shape[1], **options) for each in outputs]
        self.output_squares = [torch.zeros(each.shape[1], **options) for each in outputs]
        self.crosses = [torch.zeros(inputs.shape[1], each.shape[1], **options) for each in outputs]

    def __add__(self, other: RidgeAccumulator) -> RidgeAccumulator:
        """The moments of the rows of both."""
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        total = RidgeAccumulator()
        total.count = self.count + other.count
        total.input_shift, total.output_shifts = self.input_shift, self.output_shifts
        total.gram = self.gram + other.gram_about(self.input_shift)
        total.input_sum = self.input_sum + other.input_sum + other.count * (other.input_shift - self.input_shift)
        for part, shift in enumerate(self.output_shifts):
            moved = other.output_shifts[part] - shift
            total.output_sums.append(self.output_sums[part] + other.output_sums[part] + other.count * moved)
            total.output_squares.append(self.output_squares[part] + other.square_about(shift, part))
            total.crosses.append(self.crosses[part] + other.cross_about(self.input_shift, shift, part))
        return total

    def input_mean(self) -> Tensor:
        """(D,) mean of the inputs."""
        return self.input_shift + self.input_sum / self.count

    def output_mean(self, part: int = 0) -> Tensor:
        """(E,) mean of the outputs."""
        return self.output_shifts[part] + self.output_sums[part] / self.count

    def gram_about(self, center: Tensor) -> Tensor:
        """(D, D): sum over rows of (x - center)(x - center)ᵀ."""
        moved = self.input_shift - center
        mixed = torch.outer(self.input_sum, moved)
        return self.gram + mixed + mixed.T + self.count * torch.outer(moved, moved)

    def cross_about(self, input_center: Tensor, output_center: Tensor, part: int = 0) -> Tensor:
        """(D, E): sum over rows of (x - input_center)(y - output_center)ᵀ."""
        moved_x = self.input_shift - input_center
        moved_y = self.output_shifts[part] - output_center
        left = torch.stack([self.input_sum + self.count * moved_x, moved_x], dim=1)
        right = torch.stack([moved_y, self.output_sums[part]])
        return torch.addmm(self.crosses[part], left, right)

    def square_about(self, center: Tensor, part: int = 0) -> Tensor:
        """(E,): sum over rows of (y - center)²."""
        moved = self.output_shifts[part] - center
        return self.output_squares[part] + 2 * moved * self.output_sums[part] + self.count * moved.square()

    def spectrum(self) -> Spectrum:
        """The eigendecomposition of the standardised inputs' covariance, computed once."""
        if self._spectrum is None:
            if self.count == 0:
                raise BacksightError("A ridge accumulator without rows has no solution: call update() first.")
            self._spectrum = _spectrum(self)
        return self._spectrum

    def path(self, part: int = 0) -> RidgePath:
        """The solutions for all ridge strengths."""
        spectrum = self.spectrum()
        cross = self.cross_about(spectrum.mean, self.output_mean(part), part)
        rotated = spectrum.rotation.T @ cross / self.count
        return RidgePath(spectrum, rotated, self.output_mean(part))

    def solve(self, alpha: float, part: int = 0) -> tuple[Tensor, Tensor]:
        """(weight (D, E), bias (E,)) of y = x @ weight + bias, minimising

        mean over rows of |y - ŷ|² + alpha |weight * standard deviation of x|², with a free bias. This is
        scikit-learn's Ridge(alpha * rows) on standardised inputs.
        """
        path = self.path(part)
        weight = path.weight(alpha)
        return weight, path.output_mean - path.spectrum.mean @ weight

    def solve_path(self, alphas: Sequence[float], part: int = 0) -> list[tuple[Tensor, Tensor]]:
        """`solve` for every alpha, from one eigendecomposition."""
        path = self.path(part)
        weights = [path.weight(alpha) for alpha in alphas]
        return [(weight, path.output_mean - path.spectrum.mean @ weight) for weight in weights]

    def mse(self, weight: Tensor | tuple[Tensor, Tensor], bias: Tensor, part: int = 0) -> float:
        """Mean squared error, a value, of y = x @ weight + bias on the accumulated rows.

        weight: (D, E), or its factors (D, R), (R, E).
        """
        left, right = weight if isinstance(weight, tuple) else (weight, None)
        x, y = self.input_mean(), self.output_mean(part)
        gram, cross = self.gram_about(x), self.cross_about(x, y, part)
        if right is None:
            explained = (left * cross).sum()
            fitted = ((gram @ left) * left).sum()
            offset = y - x @ left - bias
        else:
            explained = ((left.T @ cross) * right).sum()
            fitted = ((left.T @ gram @ left) * (right @ right.T)).sum()
            offset = y - (x @ left) @ right - bias
        total = self.square_about(y, part).sum() - 2 * explained + fitted + self.count * offset.square().sum()
        return max(0.0, float(total)) / (self.count * len(y))

    def total_variance(self, center: Tensor, part: int = 0) -> float:
        """Mean squared distance, a value, of the outputs from `center` (E,): the error of a constant."""
        return float(self.square_about(center, part).sum()) / (self.count * len(center))


@dataclass(frozen=True)
class Spectrum:
    """mean: (D,); rotation: (D, D), standardises and rotates x - mean; eigenvalues: (D,) ascending."""

    mean: Tensor
    rotation: Tensor
    eigenvalues: Tensor


def _spectrum(accumulator: RidgeAccumulator) -> Spectrum:
    mean = accumulator.input_mean()
    covariance = accumulator.gram_about(mean) / accumulator.count
    if not torch.isfinite(covariance).all():
        raise BacksightError(
            "The inputs of a linear fit are not finite (NaN or infinity in the features): "
            "check the target's weights and the images."
        )
    variance = covariance.diagonal()
    # A channel whose spread is below the float32 rounding of its mean carries no information.
    resolvable = variance.sqrt() > torch.finfo(torch.float32).eps * mean.abs()
    inverse = torch.where(resolvable & (variance > 0), variance.clamp(min=1e-300).rsqrt(), 0.0)
    eigenvalues, vectors = torch.linalg.eigh(covariance * inverse[:, None] * inverse)
    return Spectrum(mean, inverse[:, None] * vectors, eigenvalues.clamp(min=0))


@dataclass(frozen=True)
class RidgePath:
    """Ridge solutions as a function of the strength; rotated: (D, E) cross covariance in the eigenbasis."""

    spectrum: Spectrum
    rotated: Tensor
    output_mean: Tensor

    @cached_property
    def inner(self) -> Tensor:
        """(D, D): rotated @ rotatedᵀ, all that the errors and the ranks need of the outputs."""
        return self.rotated @ self.rotated.T

    def _shrinkage(self, alpha: float) -> Tensor:
        if not alpha > 0:
            raise BacksightError(f"A ridge strength must be above 0, but alpha is {alpha}.")
        return 1 / (self.spectrum.eigenvalues + alpha)

    def weight(self, alpha: float) -> Tensor:
        """(D, E) of ŷ = output mean + (x - mean) @ weight."""
        return self.spectrum.rotation @ (self._shrinkage(alpha)[:, None] * self.rotated)

    def low_rank(self, alpha: float, rank: int) -> tuple[Tensor, Tensor]:
        """(D, R), (R, E): the ridge map of rank <= R whose fitted values are nearest to the full one's.

        The fitted values are projected on their first R principal axes. Source: reduced-rank ridge
        regression, Mukherjee & Zhu, Statistical Analysis and Data Mining 4, 2011.
        """
        shrinkage = self._shrinkage(alpha)
        spread = self.spectrum.eigenvalues.sqrt() * shrinkage
        energies, axes = torch.linalg.eigh(self.inner * spread[:, None] * spread)
        kept = energies[-rank:] > 1e-14 * energies[-1]
        scale = energies[-rank:][kept].rsqrt()
        axes = spread[:, None] * axes[:, -rank:][:, kept] * scale
        left = self.spectrum.rotation @ (shrinkage[:, None] * (self.inner @ axes))
        return left, axes.T @ self.rotated

    def errors(self, validation: RidgeAccumulator, alphas: Sequence[float], part: int = 0) -> list[float]:
        """Mean squared error, a value, on the rows of `validation` for every alpha, from its moments."""
        rotation, mean = self.spectrum.rotation, self.spectrum.mean
        gram = rotation.T @ validation.gram_about(mean) @ rotation
        cross = rotation.T @ validation.cross_about(mean, self.output_mean, part)
        linear = (self.rotated * cross).sum(1)
        quadratic = gram * self.inner
        square = validation.square_about(self.output_mean, part).sum()
        cells = validation.count * len(self.output_mean)
        errors = []
        for alpha in alphas:
            shrinkage = self._shrinkage(alpha)
            error = square - 2 * shrinkage @ linear + shrinkage @ quadratic @ shrinkage
            errors.append(max(0.0, float(error)) / cells)
        return errors


# --------------------------------------------------------------------------------------------------- layout
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


@dataclass(frozen=True)
class Layout:
    """How the values at both ends of a map become the rows of a regression.

    rows: "patches" (a token is a row), "levels" (a cell of the finest of several grids, with what the coarser
    grids say there), "queries" (a query is a row) or "set" (an image is a row: all its queries at once).
    patch: pixels under a token; pooling: factor at which a whole map is regressed; projected: channels of a
    query after the fixed projection of a long set; context: side of the square of tokens that a row of "patches"
    reads (1: the token alone; more: its neighbours, zero outside the grid or in the padding, and the prefix tokens).
    Each is None or 1 where it does not apply.
    """

    source: Form
    destination: Form
    rows: Literal["patches", "levels", "queries", "set"]
    patch: tuple[int, int] | None = None
    pooling: int = 1
    projected: int | None = None
    context: int = 1

    @property
    def blocks(self) -> tuple[str, ...]:
        """The maps that make up the inverse: one for the rows, one for each prefix token."""
        prefix = self.destination.prefix if self.rows in ("patches", "levels") else 0
        return (self.rows, *(f"prefix_{index}" for index in range(prefix)))

    @property
    def pooled(self) -> Grid:
        """The size at which a whole map is regressed."""
        height, width = self.destination.grids[0]
        return -(-height // self.pooling), -(-width // self.pooling)

    def inputs(self, block: str) -> int:
        """Values in a row of the block's input."""
        if block == "levels":
            return self.source.channels * len(self.source.grids)
        if block == "set":
            return self.source.count * (self.projected or self.source.channels)
        if block == "patches" and self.context > 1:
            return self.source.channels * (self.context**2 + self.source.prefix)
        return self.source.channels

    def outputs(self, block: str) -> int:
        """Values in a row of the block's output."""
        if block == "set":
            return self.destination.channels * (math.prod(self.pooled) + self.destination.prefix)
        return self.destination.channels * (math.prod(self.patch) if self.patch else 1)


def plan_layout(
    pair: Pair,
    source: Form,
    destination: Form,
    reduction: tuple[int, int] | None = None,
    maximum_inputs: int = MAXIMUM_INPUTS,
    maximum_outputs: int | None = None,
    context: int = 1,
) -> Layout:
    """The layout of the map `pair` (source tap, destination tap or "pixels").

    reduction: pixels a token side, used where it fits the grid; maximum_inputs, maximum_outputs: values of a
    set and of a map that are regressed as they are (default: MAXIMUM_PIXELS or MAXIMUM_TOKENS).
    Raises BacksightError where no linear map between these kinds, or these grids, is defined.
    """
    if source.kind == "tokens" and destination.kind == "pixels":
        patch = _patch_size(pair, source, destination, reduction)
        if len(source.grids) > 1:
            return Layout(source, destination, "levels", patch=patch)
        return Layout(source, destination, "patches", patch=patch, context=context)
    if source.kind == "tokens" and destination.kind == "tokens":
        if destination.prefix not in (0, source.prefix):
            raise BacksightError(
                f"No linear map from {pair[0]!r} to {pair[1]!r}: they have {source.prefix} and "
                f"{destination.prefix} prefix tokens; choose taps with the same number."
            )
        if source.grids == destination.grids:
            return Layout(source, destination, "patches", context=context if len(source.grids) == 1 else 1)
        if destination.grids == source.grids[:1]:
            return Layout(source, destination, "levels")
        raise BacksightError(
            f"No linear map from {pair[0]!r} to {pair[1]!r}: their grids are {source.grids} and "
            f"{destination.grids}; choose taps on the same grid, or to='pixels'."
        )
    if source.kind in ("queries", "predictions") and destination.kind == "queries":
        if source.count != destination.count:
            raise BacksightError(
                f"No linear map from {pair[0]!r} to {pair[1]!r}: they have {source.count} and "
                f"{destination.count} queries; choose taps with the same number."
            )
        return Layout(source, destination, "queries")
    if source.kind in ("queries", "predictions") and destination.kind in ("tokens", "pixels"):
        if len(destination.grids) != 1:
            raise BacksightError(
                f"No linear map from {pair[0]!r} to {pair[1]!r}: the destination has "
                f"{len(destination.grids)} grids; choose a tap on one grid, or to='pixels'."
            )
        long = source.count * source.channels > maximum_inputs
        projected = max(1, maximum_inputs // source.count) if long else None
        largest = maximum_outputs or (MAXIMUM_PIXELS if destination.kind == "pixels" else MAXIMUM_TOKENS)
        pooling = 1
        while Layout(source, destination, "set", pooling=pooling).outputs("set") > largest:
            if pooling > max(destination.grids[0]):
                break
            pooling *= 2
        return Layout(source, destination, "set", pooling=pooling, projected=projected)
    raise BacksightError(
        f"No linear map from {source.kind} at {pair[0]!r} to {destination.kind} at {pair[1]!r}: "
        "tokens map to tokens or pixels, queries and predictions map to queries, tokens or pixels."
    )


def _patch_size(pair: Pair, source: Form, destination: Form, reduction: tuple[int, int] | None) -> tuple[int, int]:
    """Pixels under one token: the target's reduction where it fits the grid, else size / grid, rounded up."""
    sides = []
    for axis in (0, 1):
        pixels, cells = destination.grids[0][axis], source.grids[0][axis]
        candidates = ([reduction[axis]] if reduction else []) + [-(-pixels // cells)]
        fitting = [side for side in candidates if -(-pixels // side) == cells]
        if not fitting:
            raise BacksightError(
                f"No linear map from {pair[0]!r} to pixels: images of {destination.grids[0]} pixels do not "
                f"fall into a grid of {source.grids[0]} tokens; choose an image size that is a multiple of it."
            )
        sides.append(fitting[0])
    return sides[0], sides[1]


def pack_source(representation: Representation, layout: Layout, block: str, projection: Tensor | None = None) -> Tensor:
    """The input rows (M, layout.inputs(block)) of one block: images in order, rows of an image together."""
    if block.startswith("prefix_"):
        return representation.values[:, int(block.removeprefix("prefix_"))]
    if block == "set":
        values = representation.values if projection is None else representation.values @ projection
        return values.flatten(1)
    if block == "queries":
        return representation.values.flatten(0, 1)
    if not isinstance(representation, Tokens):
        raise BacksightError(f"This linear inverse reads tokens, but was given {form_of(representation).kind}.")
    if block == "levels":
        size = representation.grids[0]
        maps = [F.interpolate(each, size=size, mode="nearest-exact") for each in representation.maps()]
        return torch.cat(maps, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    if layout.context > 1:
        return _neighbourhoods(representation, layout.context).flatten(0, 1)
    return representation.patches.flatten(0, 1)


def _neighbourhoods(tokens: Tokens, context: int) -> Tensor:
    """(B, N, C * (context² + P)): each token with those around it, and the prefix tokens."""
    whole = tokens.map()
    if tokens.padding is not None:
        whole = whole.masked_fill(tokens.padding.unflatten(1, tokens.grids[0])[:, None], 0.0)
    around = F.unfold(whole, context, padding=context // 2).transpose(1, 2)
    prefix = tokens.prefix_values.flatten(1)[:, None].expand(-1, around.shape[1], -1)
    return torch.cat([around, prefix], dim=2)


def pack_destination(value: Tensor | Representation, layout: Layout, block: str) -> Tensor:
    """The output rows (M, layout.outputs(block)) of one block, in the order of `pack_source`."""
    if isinstance(value, Tensor):
        if block == "set":
            return _pool(value, layout).flatten(1)
        return patchify(value, layout.patch or (1, 1)).flatten(0, 1)
    if block == "queries":
        return value.values.flatten(0, 1)
    if not isinstance(value, Tokens):
        raise BacksightError(f"This linear inverse gives tokens, but was given {form_of(value).kind} to fit.")
    if block.startswith("prefix_"):
        return value.values[:, int(block.removeprefix("prefix_"))]
    if block == "set":
        patches = value.patches
        if value.padding is not None:
            patches = patches.masked_fill(value.padding[..., None], 0.0)
        whole = patches.transpose(1, 2).unflatten(2, value.grids[0])
        return torch.cat([_pool(whole, layout).flatten(1), value.prefix_values.flatten(1)], dim=1)
    return value.patches.flatten(0, 1)


def unpack(
    rows: dict[str, Tensor], layout: Layout, source: Representation, position: Tensor | None
) -> Tensor | Representation:
    """Images (not clamped) or a representation from the output rows of every block.

    Undoes `pack_destination`.

    source: the representation that was inverted; its grid, padding and batch are the result's.
    position: the positional code that the resulting tokens carry.
    """
    main = rows[layout.rows]
    batch = source.batch
    if layout.rows == "queries":
        return Queries(main.unflatten(0, (batch, -1)))
    if layout.rows == "set":
        channels, count = layout.destination.channels, layout.destination.prefix
        whole, prefix = main.split([channels * math.prod(layout.pooled), channels * count], dim=1)
        whole = whole.reshape(batch, channels, *layout.pooled)
        if layout.pooling > 1:
            whole = F.interpolate(whole, size=layout.destination.grids[0], mode="bilinear")
        if layout.destination.kind == "pixels":
            return whole
        values = torch.cat([prefix.reshape(batch, count, channels), whole.flatten(2).transpose(1, 2)], dim=1)
        return Tokens(values, layout.destination.grids, count, None, position)
    if not isinstance(source, Tokens):
        raise BacksightError(f"This linear inverse reads tokens, but was given {form_of(source).kind}.")
    patches = main.unflatten(0, (batch, -1))
    if layout.destination.kind == "pixels":
        grid, patch = source.grids[0], layout.patch or (1, 1)
        size = layout.destination.grids[0] if source.grids == layout.source.grids else None
        return unpatchify(patches, grid, patch, size)
    prefix_rows = [rows[block] for block in layout.blocks[1:]]
    values = torch.cat([torch.stack(prefix_rows, dim=1), patches], dim=1) if prefix_rows else patches
    grids = source.grids if layout.rows == "patches" else source.grids[:1]
    return Tokens(values, grids, len(prefix_rows), _row_padding(source, layout), position)


def _pool(whole: Tensor, layout: Layout) -> Tensor:
    return whole if layout.pooling == 1 else F.adaptive_avg_pool2d(whole, layout.pooled)


def _row_padding(source: Representation, layout: Layout) -> Tensor | None:
    """(B, rows) bool, True = padding: the tokens that are neither fitted nor predicted."""
    if layout.rows not in ("patches", "levels") or not isinstance(source, Tokens) or source.padding is None:
        return None
    return source.padding[:, : math.prod(source.grids[0])] if layout.rows == "levels" else source.padding


# -------------------------------------------------------------------------------------------------- inverse
class AffineMap(nn.Module):
    """x -> bias + (x - center) @ weight, with weight (D, E) or its factors left (D, R), right (R, E).

    Subtracting the mean first keeps the digits of channels with a large offset in float32.
    """

    center: Tensor
    bias: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int | None = None) -> None:
        super().__init__()
        self.rank = rank
        self.register_buffer("center", torch.zeros(inputs))
        self.register_buffer("bias", torch.zeros(outputs))
        if rank is None:
            self.register_buffer("matrix", torch.zeros(inputs, outputs))
        else:
            self.register_buffer("left", torch.zeros(inputs, rank))
            self.register_buffer("right", torch.zeros(rank, outputs))

    @property
    def factors(self) -> tuple[Tensor, ...]:
        if self.rank is None:
            return (self.get_buffer("matrix"),)
        return self.get_buffer("left"), self.get_buffer("right")

    def forward(self, rows: Tensor) -> Tensor:
        result = rows - self.center
        for factor in self.factors:
            result = result @ factor
        return result + self.bias


@dataclass(frozen=True)
class LinearScore:
    """How well a linear inverse does on the validation split, with 95 % intervals over images.

    alpha: ridge strength of the main block; r2: against the training mean, from the moments of all
    validation images, in the space that was regressed; psnr: dB, mean over images, None for taps; the
    intervals (and psnr) come from the `images` validation images that were kept in memory.
    """

    alpha: float = math.nan
    r2: float = math.nan
    r2_low: float = math.nan
    r2_high: float = math.nan
    psnr: float | None = None
    psnr_low: float | None = None
    psnr_high: float | None = None
    images: int = 0


class LinearInverse(nn.Module):
    """A linear map from the representation at `source` to `destination` (an earlier tap or "pixels")."""

    family = "linear"

    def __init__(
        self,
        source: str,
        destination: str,
        layout: Layout,
        ranks: dict[str, int | None] | None = None,
        score: LinearScore | None = None,
        position: Literal["none", "source", "fixed"] = "none",
        position_shape: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        self.source, self.destination, self.layout = source, destination, layout
        self.score = score or LinearScore()
        self.position_rule = position
        ranks = ranks or {}
        self.maps = nn.ModuleDict(
            {block: AffineMap(layout.inputs(block), layout.outputs(block), ranks.get(block)) for block in layout.blocks}
        )
        if layout.projected is not None:
            self.register_buffer("projection", torch.zeros(layout.source.channels, layout.projected))
        if position == "fixed":
            self.register_buffer("position", torch.zeros(tuple(position_shape)))

    @property
    def alpha(self) -> float:
        return self.score.alpha

    @property
    def r2(self) -> float:
        return self.score.r2

    @property
    def psnr(self) -> float | None:
        return self.score.psnr

    def affine(self, block: str | None = None) -> tuple[Tensor, Tensor]:
        """(weight (D, E), bias (E,)) of y = x @ weight + bias for one block (default: the rows).

        This is what an `nn.Linear` (weight transposed) starts from.
        """
        block = block or self.layout.rows
        if block not in self.maps:
            raise BacksightError(f"This linear inverse has no block {block!r}; its blocks are {', '.join(self.maps)}.")
        linear = self.maps[block]
        assert isinstance(linear, AffineMap)
        weight = linear.factors[0] if linear.rank is None else linear.factors[0] @ linear.factors[1]
        bias = linear.bias.double() - linear.center.double() @ weight.double()
        return weight, bias.to(weight.dtype)

    @property
    def weight(self) -> Tensor:
        """(D, E) of the rows' map."""
        return self.affine()[0]

    @property
    def bias(self) -> Tensor:
        """(E,) of the rows' map."""
        return self.affine()[1]

    def pack(self, representation: Representation) -> dict[str, Tensor]:
        """The input rows of every block."""
        projection = self.get_buffer("projection") if self.layout.projected is not None else None
        return {block: pack_source(representation, self.layout, block, projection) for block in self.layout.blocks}

    def raw(self, representation: Representation) -> Any:
        """Like `forward`, but images are not clamped to [0, 1]."""
        self._check(representation)
        rows = {block: self.maps[block](each) for block, each in self.pack(representation).items()}
        padding = _row_padding(representation, self.layout)
        if padding is not None:
            main = self.layout.rows
            rows[main] = torch.where(padding.reshape(-1, 1), self.maps[main].get_buffer("bias"), rows[main])
        return unpack(rows, self.layout, representation, self._position(representation))

    def forward(self, representation: Representation) -> Any:
        """Images (B, 3, H, W) in [0, 1], or the representation at `destination`.

        Differentiable in the representation. Maps of single tokens also read other grids than they were
        fitted on. Padded tokens give the training mean. Raises BacksightError where shapes do not agree.
        """
        result = self.raw(representation)
        return result.clamp(0, 1) if isinstance(result, Tensor) else result

    def _check(self, representation: Representation) -> None:
        given, fitted = form_of(representation), self.layout.source
        fits = given.kind == fitted.kind and given.channels == fitted.channels
        if self.layout.rows == "set":
            fits = fits and given.count == fitted.count
        if len(self.layout.blocks) > 1:
            fits = fits and given.prefix == fitted.prefix
        if self.layout.rows == "levels":
            fits = fits and len(given.grids) == len(fitted.grids)
        elif self.layout.rows == "patches" and (self.layout.patch or self.layout.context > 1):
            fits = fits and len(given.grids) == 1
        if self.layout.context > 1:
            fits = fits and given.prefix == fitted.prefix
        if not fits:
            raise BacksightError(
                f"The linear inverse of {self.source!r} reads {_words(fitted)}, "
                f"but was given {_words(given)}; feed it a representation of the same shape."
            )

    def _position(self, representation: Representation) -> Tensor | None:
        if self.position_rule == "none":
            return None
        if self.position_rule == "source":
            return representation.position if isinstance(representation, Tokens) else None
        grids = representation.grids if isinstance(representation, Tokens) else self.layout.source.grids
        return self.get_buffer("position") if grids == self.layout.source.grids else None

    def configuration(self) -> dict[str, Any]:
        """Everything but the numbers in `state_dict()`, as JSON."""
        fixed = self.position_rule == "fixed"
        return {
            "family": self.family,
            "source": self.source,
            "destination": self.destination,
            "layout": asdict(self.layout),
            "ranks": {block: each.rank for block, each in self.maps.items() if isinstance(each, AffineMap)},
            "score": asdict(self.score),
            "position": self.position_rule,
            "position_shape": list(self.get_buffer("position").shape) if fixed else [0],
        }

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> LinearInverse:
        """An inverse whose numbers are still to be loaded by `load_state_dict`."""
        layout = dict(configuration["layout"])
        for end in ("source", "destination"):
            form = dict(layout[end])
            form["grids"] = tuple((height, width) for height, width in form["grids"])
            layout[end] = Form(**form)
        if layout["patch"] is not None:
            layout["patch"] = tuple(layout["patch"])
        return cls(
            configuration["source"],
            configuration["destination"],
            Layout(**layout),
            configuration["ranks"],
            LinearScore(**configuration["score"]),
            configuration["position"],
            configuration["position_shape"],
        )


def _words(form: Form) -> str:
    if form.kind == "tokens":
        grids = " + ".join(f"{height} x {width}" for height, width in form.grids)
        return f"tokens on {grids} with {form.prefix} prefix tokens and {form.channels} channels"
    return f"{form.count} {form.kind} with {form.channels} channels"


# ------------------------------------------------------------------------------------------------------ fit
@dataclass
class _Group:
    """Maps that read the same rows: one Gram matrix, one eigendecomposition."""

    members: list[tuple[Pair, Layout]]
    block: str
    projection: Tensor | None
    training: RidgeAccumulator = field(default_factory=RidgeAccumulator)
    validation: RidgeAccumulator = field(default_factory=RidgeAccumulator)

    def update(
        self,
        images: Tensor,
        recorded: dict[str, Representation],
        validation: bool,
        packed: dict[tuple[str, str, Any, int], Tensor],
    ) -> None:
        """Add a batch. packed: the destinations' rows of this batch, shared with the other groups."""
        (source, _), layout = self.members[0]
        representation = recorded[source]
        inputs = pack_source(representation, layout, self.block, self.projection)
        padding = None if self.block.startswith("prefix_") else _row_padding(representation, layout)
        kept = slice(None) if padding is None else ~padding.flatten()
        outputs = []
        for (_, destination), each in self.members:
            key = (destination, self.block, each.patch, each.pooling)
            if key not in packed:
                value = images if destination == PIXELS else recorded[destination]
                packed[key] = pack_destination(value, each, self.block)
            outputs.append(packed[key][kept])
        (self.validation if validation else self.training).update(inputs[kept], *outputs)


@dataclass
class _Sample:
    """The first validation images and their representations, as many as the memory allows."""

    room: int = SAMPLE_BYTES
    batches: list[tuple[Tensor, dict[str, Representation]]] = field(default_factory=list)

    def add(self, images: Tensor, recorded: dict[str, Representation]) -> None:
        tensors = [images, *(each.values for each in recorded.values())]
        size = sum(each[0].numel() * each.element_size() for each in tensors)
        count = min(len(images), self.room // size)
        self.room -= count * size
        if count < len(images):
            self.room = 0
        if count:
            which = torch.arange(count)
            self.batches.append(
                (images[:count].cpu(), {tap: each.index(which).to("cpu") for tap, each in recorded.items()})
            )


def fit_linear(
    target: Any,
    images: Any,
    taps: Sequence[str] | str | None = None,
    to: str = PIXELS,
    validation: Any = None,
    alphas: Sequence[float] = ALPHAS,
    batch_size: int = 64,
    rank: int | None = None,
    seed: int = 0,
    progress: bool = True,
    context: int = 1,
) -> dict[str, LinearInverse]:
    """The linear inverse of every tap, to pixels or to the tap `to`, in one pass over the images.

    taps: names, default all of the target's (without `to` itself). Returns {tap: LinearInverse}.
    For the rest see `fit_linear_pairs`.
    """
    names = [taps] if isinstance(taps, str) else list(target.taps if taps is None else taps)
    if taps is None:
        names = [tap for tap in names if tap != to]
    fitted = fit_linear_pairs(
        target,
        images,
        [(tap, to) for tap in names],
        validation,
        alphas,
        batch_size,
        rank,
        seed,
        progress,
        context=context,
    )
    return {tap: fitted[tap, to] for tap in names}


def fit_linear_pairs(
    target: Any,
    images: Any,
    pairs: Iterable[Pair],
    validation: Any = None,
    alphas: Sequence[float] = ALPHAS,
    batch_size: int = 64,
    rank: int | None = None,
    seed: int = 0,
    progress: bool = True,
    maximum_inputs: int = MAXIMUM_INPUTS,
    maximum_outputs: int | None = None,
    context: int = 1,
    floors: Mapping[Pair, float] | None = None,
) -> dict[Pair, LinearInverse]:
    """Linear maps between many pairs of taps, in one pass over the images.

    target: a Target; images: ImageSource, or (N, 3, H, W) in [0, 1]; pairs: (source tap, destination tap or
    "pixels"); validation: images of another split, on which the ridge strength is chosen from their moments
    alone (default: every fifth image of `images` is held out of the fit); alphas: strengths to choose from,
    in units of the variance of a standardised input; rank: of the maps from a whole set of queries
    (default 128); seed: of the projection of a long set and of the bootstrap; maximum_inputs,
    maximum_outputs: see `plan_layout`; context: side of the square of tokens that the map of one token reads, 1 (what
    that token alone says, the `linear` family) or an odd number above (a convolution in closed form); floors: the least
    strength for some pairs, for maps that will read an input with errors in it.

    Returns {(source, destination): LinearInverse}, each scored on the validation images. Raises
    BacksightError on an unknown tap, on ends between which no map is defined, and on too few images.
    """
    pairs = list(dict.fromkeys(pairs))
    _check_request(target, pairs, alphas, context)
    for each in (images, validation):
        if getattr(each, "fit", None) == "pad":
            raise BacksightError(
                f"The images {each.name!r} are padded, and linear maps are fitted on whole images: open them with "
                "fit='crop' or fit='stretch'."
            )
    taps = list(dict.fromkeys(tap for pair in pairs for tap in pair if tap != PIXELS))
    groups: list[_Group] = []
    layouts: dict[Pair, Layout] = {}
    positions: dict[Pair, tuple[Literal["none", "source", "fixed"], Tensor | None]] = {}
    sample = _Sample()
    for batch, recorded, held_out in _passes(target, images, validation, taps, batch_size, progress):
        if not layouts:
            for pair in pairs:
                ends = recorded[pair[0]], batch if pair[1] == PIXELS else recorded[pair[1]]
                reduction = getattr(target, "reduction", None)
                layouts[pair] = plan_layout(
                    pair, form_of(ends[0]), form_of(ends[1]), reduction, maximum_inputs, maximum_outputs, context
                )
                positions[pair] = _position_rule(*ends)
            groups = _grouped(layouts, seed, batch.device)
        packed: dict[tuple[str, str, Any, int], Tensor] = {}
        for group in groups:
            group.update(batch, recorded, held_out, packed)
        if held_out:
            sample.add(batch, recorded)

    if not groups or any(min(each.training.count, each.validation.count) == 0 for each in groups):
        raise BacksightError(
            "A linear fit needs at least 5 images, or images both to fit and to validate on: "
            "give a larger `images`, or a `validation` that is not empty."
        )
    inverses = {}
    for pair, layout in layouts.items():
        rule, position = positions[pair]
        blocks = {
            group.block: (group, [each for each, _ in group.members].index(pair))
            for group in groups
            if any(each == pair for each, _ in group.members)
        }
        allowed = [alpha for alpha in alphas if alpha >= (floors or {}).get(pair, 0)] or [max(alphas)]
        inverses[pair] = _solve(pair, layout, blocks, allowed, rank or RANK, rule, position)
    _score_sample(inverses, sample, seed)
    return inverses


def _check_request(target: Any, pairs: Sequence[Pair], alphas: Sequence[float], context: int) -> None:
    if not pairs:
        raise BacksightError("A linear fit needs at least one tap to invert.")
    if not alphas or min(alphas) <= 0:
        raise BacksightError(f"Ridge strengths must be above 0, but alphas is {list(alphas)}.")
    if context < 1 or context % 2 == 0:
        raise BacksightError(f"The context of a linear map is an odd number of tokens from 1, not {context}.")
    available = getattr(target, "available_taps", target.taps)
    for source, destination in pairs:
        for tap, allowed in ((source, tuple(available)), (destination, (PIXELS, *available))):
            if tap not in allowed:
                nearest = get_close_matches(tap, allowed, n=3, cutoff=0.3) or list(allowed[:5])
                raise BacksightError(
                    f"The target {target.name!r} has no tap {tap!r} to map "
                    f"{'from' if tap == source else 'to'}; nearest: {', '.join(nearest)}."
                )
        if source == destination:
            raise BacksightError(f"A linear map from {source!r} to itself is the identity: choose two taps.")


def _passes(
    target: Any, images: Any, validation: Any, taps: Sequence[str], batch_size: int, progress: bool
) -> Iterator[tuple[Tensor, dict[str, Representation], bool]]:
    """Every batch with its representations and whether it is held out: one forward pass an image."""
    device = next((each.device for each in target.model.parameters()), torch.device("cpu"))
    seen = 0
    for held_out, source in ((False, images), (True, validation)):
        if source is None:
            continue
        bar = progress_bar(
            batches(source, batch_size),
            total=-(-len(source) // batch_size),
            desc=f"{'validating' if held_out else 'fitting'} linear maps",
            show=progress,
        )
        for batch in bar:
            batch = batch.to(device)
            recorded = {tap: _without_context(each) for tap, each in target.record(batch, taps).items()}
            if validation is not None:
                yield batch, recorded, held_out
                continue
            order = torch.arange(seen, seen + len(batch)) % 5 == 4
            seen += len(batch)
            for which, is_held_out in ((~order, False), (order, True)):
                if which.any():
                    chosen = which.nonzero().flatten().to(device)
                    part = {tap: each.index(chosen) for tap, each in recorded.items()}
                    yield batch[chosen], part, is_held_out


def _without_context(representation: Representation) -> Representation:
    """Queries without the encoder's output: an inverse must not see it."""
    return Queries(representation.values) if isinstance(representation, Queries) else representation


def _grouped(layouts: dict[Pair, Layout], seed: int, device: torch.device) -> list[_Group]:
    groups: dict[tuple[str, str], _Group] = {}
    for pair, layout in layouts.items():
        for block in layout.blocks:
            key = (pair[0], block)
            if key not in groups:
                groups[key] = _Group([], block, _projection(layout, seed, device) if block == "set" else None)
            groups[key].members.append((pair, layout))
    return list(groups.values())


def _projection(layout: Layout, seed: int, device: torch.device) -> Tensor | None:
    """(C, C') with orthonormal columns, the same for every query."""
    if layout.projected is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(layout.source.channels, layout.projected, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(directions).Q.float().to(device)


def _position_rule(
    source: Representation, destination: Tensor | Representation
) -> tuple[Literal["none", "source", "fixed"], Tensor | None]:
    """Where the positional code of the destination comes from: nowhere, the source, or the first image."""
    if not isinstance(destination, Tokens) or destination.position is None:
        return "none", None
    carried = source.position if isinstance(source, Tokens) else None
    if carried is not None and carried.shape == destination.position.shape and carried.equal(destination.position):
        return "source", None
    return "fixed", destination.position[:1].clone()


def _solve(
    pair: Pair,
    layout: Layout,
    blocks: dict[str, tuple[_Group, int]],
    alphas: Sequence[float],
    rank: int,
    rule: Literal["none", "source", "fixed"],
    position: Tensor | None,
) -> LinearInverse:
    states: dict[str, dict[str, Tensor]] = {}
    ranks: dict[str, int | None] = {}
    chosen: dict[str, float] = {}
    unexplained = total = 0.0
    for block, (group, part) in blocks.items():
        path = group.training.path(part)
        errors = path.errors(group.validation, alphas, part)
        best = min(range(len(alphas)), key=errors.__getitem__)
        chosen[block], error = alphas[best], errors[best]
        center = path.spectrum.mean
        if layout.rows == "set" and rank < min(layout.inputs(block), layout.outputs(block)):
            left, right = path.low_rank(alphas[best], rank)
            error = group.validation.mse((left, right), path.output_mean - (center @ left) @ right, part)
            ranks[block], state = left.shape[1], {"left": left, "right": right}
        else:
            ranks[block], state = None, {"matrix": path.weight(alphas[best])}
        states[block] = state | {"center": center, "bias": path.output_mean}
        cells = group.validation.count * layout.outputs(block)
        unexplained += error * cells
        total += group.validation.total_variance(path.output_mean, part) * cells
        # The largest matrices of a fit; they are not read again.
        group.training.crosses[part] = group.validation.crosses[part] = torch.empty(0)
    score = LinearScore(alpha=chosen[layout.rows], r2=1 - unexplained / total if total > 0 else math.nan)
    inverse = LinearInverse(*pair, layout, ranks, score, rule, (0,) if position is None else tuple(position.shape))
    for block, state in states.items():
        inverse.maps[block].load_state_dict({name: tensor.float() for name, tensor in state.items()})
    group = blocks[layout.rows][0]
    if group.projection is not None:
        inverse.get_buffer("projection").copy_(group.projection)
    if position is not None:
        inverse.get_buffer("position").copy_(position)
    return inverse.to(group.training.gram.device).eval()


def _score_sample(inverses: dict[Pair, LinearInverse], sample: _Sample, seed: int) -> None:
    """Add PSNR and the intervals over images to the scores."""
    if not sample.batches:
        return
    for (source, destination), inverse in inverses.items():
        device = next(inverse.buffers()).device
        errors, totals, ratios = [], [], []
        for images, recorded in sample.batches:
            wanted = images if destination == PIXELS else recorded[destination]
            representation = recorded[source].to(device)
            with torch.no_grad():
                error, total = _image_errors(inverse, representation, wanted)
                errors.append(error)
                totals.append(total)
                if destination == PIXELS:
                    ratios.append(psnr(images, inverse(representation).cpu()))
        scores = asdict(inverse.score)
        _, scores["r2_low"], scores["r2_high"] = determination(torch.cat(errors), torch.cat(totals), seed=seed)
        scores["images"] = sum(len(each) for each in errors)
        if ratios:
            values = torch.cat(ratios)
            scores["psnr"] = float(values.mean())
            scores["psnr_low"], scores["psnr_high"] = bootstrap_interval(values, seed=seed)
        inverse.score = LinearScore(**scores)


def _image_errors(
    inverse: LinearInverse, source: Representation, wanted: Tensor | Representation
) -> tuple[Tensor, Tensor]:
    """(B,), (B,): squared error of each image, and of the training mean, in the space that was regressed."""
    batch = source.batch
    errors, totals = torch.zeros(batch), torch.zeros(batch)
    for block, inputs in inverse.pack(source).items():
        truth = pack_destination(wanted, inverse.layout, block)
        found = inverse.maps[block](inputs).cpu()
        mean = inverse.maps[block].get_buffer("bias").cpu()
        padding = None if block.startswith("prefix_") else _row_padding(source, inverse.layout)
        counted = 1.0 if padding is None else (~padding).reshape(-1, 1).float().cpu()
        errors += ((truth - found).square() * counted).reshape(batch, -1).sum(1)
        totals += ((truth - mean).square() * counted).reshape(batch, -1).sum(1)
    return errors, totals
