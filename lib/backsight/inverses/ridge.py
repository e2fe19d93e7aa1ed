"""Ridge regression in closed form, from the moments of a stream of rows.

Moments are accumulated in float64. Features of deep layers are nearly collinear and hold a few huge channels:
directions whose spread is below 3e-4 of the largest are lost in a float32 Gram matrix, but they are present in the
float32 features. Inputs are standardised, so that a strength means the same at every tap.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from backsight.data.distributed import processes
from backsight.errors import BacksightError

CHUNK_VALUES = 2**24  # values that an update converts at once
WIDE, SKETCH = 1024, 512  # from WIDE inputs on, strengths are compared on SKETCH random combinations of the outputs
EVERY = slice(None)


class RidgeAccumulator:
    """Moments of inputs x (M, D) and outputs y (M, E), from which ridge solutions and errors follow.

    input_mean (D,), output_mean (E,); gram (D, D), cross (D, E): sums of products about these means. In float64, on the
    device of the rows (on the CPU for mps, which has none).
    """

    def __init__(self) -> None:
        self.count = 0
        self.input_mean = self.output_mean = self.gram = self.cross = torch.empty(0)

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add rows (M, D) and (M, E)."""
        step = max(64, CHUNK_VALUES // (inputs.shape[1] + outputs.shape[1]))
        device = torch.device("cpu") if inputs.device.type == "mps" else inputs.device
        for start in range(0, len(inputs), step):
            part = RidgeAccumulator()
            x, y = (rows[start : start + step].to(device, torch.float64) for rows in (inputs, outputs))
            part.count, part.input_mean, part.output_mean = len(x), x.mean(0), y.mean(0)
            x, y = x - part.input_mean, y - part.output_mean
            part.gram, part.cross = _gram(x), x.T @ y
            self._add(part)

    def _add(self, other: RidgeAccumulator) -> None:
        """The rows of another, which may be of another process and lie on another device."""
        if self.count == 0 or other.count == 0:
            if other.count:
                vars(self).update(copy.deepcopy(vars(other)))
            return
        share = other.count / (self.count + other.count)
        moved_x = other.input_mean.to(self.gram) - self.input_mean
        moved_y = other.output_mean.to(self.gram) - self.output_mean
        self.gram.add_(other.gram.to(self.gram)).addr_(moved_x, moved_x, alpha=share * self.count)
        self.cross.add_(other.cross.to(self.gram)).addr_(moved_x, moved_y, alpha=share * self.count)
        self.input_mean, self.output_mean = self.input_mean + share * moved_x, self.output_mean + share * moved_y
        self.count += other.count

    def __add__(self, other: RidgeAccumulator) -> RidgeAccumulator:
        """The moments of the rows of both."""
        total = RidgeAccumulator()
        for part in (self, other):
            total._add(part)
        return total

    def gathered(self) -> RidgeAccumulator:
        """The moments of the rows of all processes of a distributed run, the same on each; alone: these."""
        if processes().num_processes == 1:
            return self
        return sum(gather_object([self]), RidgeAccumulator())

    def standardised(self) -> tuple[Tensor, Tensor]:
        """(D, D) correlations of the inputs, and (D,) the scales that make them: 0 for constant channels."""
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
    """ŷ = bias + (x - center) @ the product of `factors`."""

    alpha: float
    center: Tensor
    bias: Tensor
    factors: tuple[Tensor, ...]


def best(
    training: RidgeAccumulator,
    validation: RidgeAccumulator,
    alphas: Sequence[float],
    columns: slice = EVERY,
    rank: int | None = None,
) -> Solution:
    """The ridge map of the strength that does best on the validation rows; rank: of the map, None for full rank.

    Every second strength is compared, then those beside the best, each by one Cholesky factor. (The error may have
    several minima: in features that are nearly collinear the small directions can say much.)
    """
    correlation, scale = training.standardised()
    center, bias = training.input_mean, training.output_mean[columns]
    cross = scale[:, None] * training.cross[:, columns] / training.count
    moved_x, moved_y = validation.input_mean - center, validation.output_mean[columns] - bias
    gram = torch.addr(validation.gram, moved_x, moved_x, alpha=validation.count)
    held_out = torch.addr(validation.cross[:, columns], moved_x, moved_y, alpha=validation.count)
    gram, held_out = gram * scale[:, None] * scale, scale[:, None] * held_out
    sketched = cross
    if len(center) >= WIDE and len(bias) > SKETCH:
        sketch = torch.randn(len(bias), SKETCH, generator=torch.Generator().manual_seed(0)).to(cross)
        sketched, held_out = cross @ sketch, held_out @ sketch

    @cache
    def error(number: int) -> float:
        """Up to a constant, the sum of the squared errors."""
        weight = _solved(correlation, alphas[number], sketched)
        return float(((gram @ weight - 2 * held_out) * weight).sum())

    coarse = min(range(0, len(alphas), 2), key=error)
    number = min(range(max(coarse - 1, 0), min(coarse + 2, len(alphas))), key=error)
    weight = _solved(correlation, alphas[number], cross)
    left, *right = (weight,) if rank is None else _low_rank(correlation, weight, rank)
    return Solution(alphas[number], center, bias, (scale[:, None] * left, *right))


def _gram(rows: Tensor) -> Tensor:
    """rowsᵀ rows; NumPy sees that both are one, and computes a half."""
    return torch.from_numpy(rows.numpy().T @ rows.numpy()) if rows.device.type == "cpu" else rows.T @ rows


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
