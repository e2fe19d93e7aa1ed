"""Ridge regression in closed form, from the moments of a stream of rows.

Moments are accumulated in float64. Features of deep layers are nearly collinear and hold a few huge channels:
directions whose spread is below 3e-4 of the largest are lost in a float32 Gram matrix, but they are present in the
float32 features. Inputs are standardised, so that a strength means the same at every tap.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor

from backsight.data.distributed import processes
from backsight.errors import BacksightError

CHUNK_VALUES = 2**24  # values that an update converts at once
WIDE, SKETCH = 1024, 512  # from WIDE inputs on, strengths are compared on SKETCH random combinations of the outputs
EVERY = slice(None)


class RidgeAccumulator:
    """Moments of inputs x (M, D) and outputs y (M, E), from which ridge solutions and errors follow.

    input_mean (D,), output_mean (E,); gram (D, D), cross (D, E), square (E,): sums of products about these means. They
    are float64, on the device of the rows (on the CPU for mps, which has no float64).
    """

    def __init__(self) -> None:
        self.count = 0
        self.input_mean = self.output_mean = self.gram = self.cross = self.square = torch.empty(0)

    def _start(self, input_mean: Tensor, output_mean: Tensor) -> None:
        self.input_mean, self.output_mean, self.square = input_mean, output_mean, torch.zeros_like(output_mean)
        self.gram = input_mean.new_zeros(len(input_mean), len(input_mean))
        self.cross = input_mean.new_zeros(len(input_mean), len(output_mean))

    def _join(self, count: int, input_mean: Tensor, output_mean: Tensor) -> None:
        """Count further rows, of these means; the sums about them have been added already."""
        moved_x, moved_y = input_mean - self.input_mean, output_mean - self.output_mean
        share = count / (self.count + count)
        self.gram.addr_(moved_x, moved_x, alpha=share * self.count)
        self.cross.addr_(moved_x, moved_y, alpha=share * self.count)
        self.square += share * self.count * moved_y.square()
        self.input_mean, self.output_mean = self.input_mean + share * moved_x, self.output_mean + share * moved_y
        self.count += count

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add rows (M, D) and (M, E)."""
        step = max(64, CHUNK_VALUES // (inputs.shape[1] + outputs.shape[1]))
        device = torch.device("cpu") if inputs.device.type == "mps" else inputs.device
        for start in range(0, len(inputs), step):
            x, y = (rows[start : start + step].to(device, torch.float64) for rows in (inputs, outputs))
            means = x.mean(0), y.mean(0)
            if self.count == 0:
                self._start(*means)
            x, y = x - means[0], y - means[1]
            self.gram.addmm_(x.T, x)
            self.cross.addmm_(x.T, y)
            self.square += y.square().sum(0)
            self._join(len(x), *means)

    def __add__(self, other: RidgeAccumulator) -> RidgeAccumulator:
        """The moments of the rows of both."""
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        total = RidgeAccumulator()
        total.count, total.input_mean, total.output_mean = self.count, self.input_mean, self.output_mean
        total.gram, total.cross = self.gram + other.gram, self.cross + other.cross
        total.square = self.square + other.square
        total._join(other.count, other.input_mean, other.output_mean)
        return total

    def gathered(self) -> RidgeAccumulator:
        """The moments of the rows of all processes of a distributed run, the same on each; alone: these."""
        state = processes()
        if state.num_processes == 1:
            return self
        sizes = [size for size in gather_object([(len(self.input_mean), len(self.output_mean))]) if any(size)]
        if not sizes:
            return self
        device = state.device if state.device.type == "cuda" else "cpu"
        if self.count == 0:
            self._start(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes[0]))
        total = RidgeAccumulator()
        total.count = sum(gather_object([self.count]))
        means = (reduce(mean * self.count, "sum") / total.count for mean in (self.input_mean, self.output_mean))
        total.input_mean, total.output_mean = means
        sums = self.about(total.input_mean, total.output_mean)
        total.gram, total.cross, total.square = (reduce(part, "sum") for part in sums)
        return total

    def about(
        self, input_center: Tensor, output_center: Tensor, columns: slice = EVERY
    ) -> tuple[Tensor, Tensor, Tensor]:
        """gram (D, D), cross (D, E) and square (E,) about other centres; columns: of the outputs."""
        moved_x, moved_y = self.input_mean - input_center, self.output_mean[columns] - output_center
        return (
            torch.addr(self.gram, moved_x, moved_x, alpha=self.count),
            torch.addr(self.cross[:, columns], moved_x, moved_y, alpha=self.count),
            self.square[columns] + self.count * moved_y.square(),
        )

    def standardised(self) -> tuple[Tensor, Tensor]:
        """(D, D) correlations of the inputs, and (D,) the scales that make them: 0 for constant channels."""
        if self.count == 0:
            raise ValueError("a ridge accumulator without rows has no solution")
        covariance = self.gram / self.count
        if not torch.isfinite(covariance).all():
            raise BacksightError(
                "The inputs of a linear fit are not finite (NaN or infinity in the features): "
                "check the target's weights and the images."
            )
        variance = covariance.diagonal()
        # A channel whose spread is below the float32 rounding of its mean carries no information.
        resolvable = variance.sqrt() > torch.finfo(torch.float32).eps * self.input_mean.abs()
        scale = torch.where(resolvable & (variance > 0), variance.clamp(min=1e-300).rsqrt(), 0.0)
        return covariance * scale[:, None] * scale, scale

    def solve(self, alpha: float, columns: slice = EVERY) -> tuple[Tensor, Tensor]:
        """(weight (D, E), bias (E,)) of y = x @ weight + bias, minimising

        mean over rows of |y - ŷ|² + alpha |weight * standard deviation of x|², with a free bias. This is
        scikit-learn's Ridge(alpha * rows) on standardised inputs.
        """
        correlation, scale = self.standardised()
        cross = scale[:, None] * self.cross[:, columns] / self.count
        weight = scale[:, None] * _solved(correlation, alpha, cross)
        return weight, self.output_mean[columns] - self.input_mean @ weight


class Solution(NamedTuple):
    """ŷ = bias + (x - center) @ the product of `factors`; error, total: squared errors of the validation rows, of
    this map and of the bias alone, summed over rows and outputs.
    """

    alpha: float
    center: Tensor
    bias: Tensor
    factors: tuple[Tensor, ...]
    error: float
    total: float


def best(
    training: RidgeAccumulator,
    validation: RidgeAccumulator,
    alphas: Sequence[float],
    columns: slice = EVERY,
    rank: int | None = None,
) -> Solution:
    """The ridge map of the strength that does best on the validation rows; rank: of the map, None for full rank.

    The error falls, then rises with the strength: a few are compared, by bisection, each by one Cholesky factor.
    """
    correlation, scale = training.standardised()
    center, bias = training.input_mean, training.output_mean[columns]
    cross = scale[:, None] * training.cross[:, columns] / training.count
    gram, held_out, square = validation.about(center, bias, columns)
    gram, held_out = gram * scale[:, None] * scale, scale[:, None] * held_out
    sketch = None
    if len(center) >= WIDE and len(bias) > SKETCH:
        sketch = torch.randn(len(bias), SKETCH, generator=torch.Generator().manual_seed(0)).to(cross)

    def error(weight: Tensor, cross: Tensor) -> float:
        """Up to a constant, the sum of the squared outputs."""
        return float(((gram @ weight - 2 * cross) * weight).sum())

    @cache
    def compared(number: int) -> float:
        given, seen = (cross, held_out) if sketch is None else (cross @ sketch, held_out @ sketch)
        return error(_solved(correlation, alphas[number], given), seen)

    low, high = 0, len(alphas) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if compared(middle) <= compared(middle + 1) else (middle + 1, high)
    weight, total = _solved(correlation, alphas[low], cross), float(square.sum())
    factors: tuple[Tensor, ...] = (weight,)
    if rank is not None:
        factors = _low_rank(correlation, weight, rank)
        weight = factors[0] @ factors[1]
    left, *right = factors
    return Solution(
        alphas[low], center, bias, (scale[:, None] * left, *right), max(0.0, total + error(weight, held_out)), total
    )


def _solved(correlation: Tensor, alpha: float, cross: Tensor) -> Tensor:
    regular = correlation + alpha * torch.eye(len(correlation)).to(correlation)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(regular))


def _low_rank(correlation: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(D, R), (R, E): the map of rank <= R whose fitted values are nearest to those of weight (D, E).

    They are projected on their first R principal axes. Source: reduced-rank ridge regression, Mukherjee & Zhu,
    Statistical Analysis and Data Mining 4, 2011.
    """
    spread = torch.linalg.cholesky(correlation + 1e-12 * torch.eye(len(correlation)).to(correlation)).T @ weight
    energies, left = torch.linalg.eigh(spread @ spread.T)
    kept = energies[-rank:] > 1e-14 * energies[-1]
    axes = spread.T @ left[:, -rank:][:, kept] * energies[-rank:][kept].rsqrt()
    return weight @ axes, axes.T


def leading_directions(moments: RidgeAccumulator, count: int) -> Tensor:
    """(D, count): the principal directions of the standardised inputs, the leading ones first; float32.

    Zero where the rows have no more: what their rounding tells would be blown up in other rows.
    """
    correlation, scale = moments.standardised()
    energies, vectors = torch.linalg.eigh(correlation)
    return (scale[:, None] * vectors * (energies > 1e-9 * energies[-1]))[:, -count:].flip(1).float()
