"""Ridge regression in closed form: moments of the data, and from them the solutions for every strength.

Moments are accumulated in float64 about the mean of the first rows. Features of deep layers are nearly collinear and
hold a few huge channels: directions whose spread is below 3e-4 of the largest are lost in a float32 Gram matrix, but
they are present in the float32 features. Inputs are standardised, so that a strength means the same at every tap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor

from backsight.data.distributed import processes
from backsight.errors import BacksightError

CHUNK_VALUES = 2**24  # values that an update converts at once
WIDE = 1024  # inputs from which a few Cholesky factors cost less than one eigendecomposition
SKETCH = 64  # random combinations of the outputs by which these few strengths are compared


class RidgeAccumulator:
    """The moments of inputs x and of one or more outputs y, from which ridge solutions and errors follow.

    `update(x, y, …)` adds rows; nothing else is kept of the data. All outputs share the Gram matrix of the inputs. Sums
    are float64, on the device of the rows (on the CPU for mps, which has no float64).
    """

    def __init__(self) -> None:
        self.count = 0
        self.input_shift = self.input_sum = self.gram = torch.empty(0)
        self.output_shifts: list[Tensor] = []
        self.output_sums: list[Tensor] = []
        self.output_squares: list[Tensor] = []
        self.crosses: list[Tensor] = []
        self._spectrum: Spectrum | None = None

    def update(self, inputs: Tensor, *outputs: Tensor) -> None:
        """Add rows. inputs: (M, D); outputs: each (M, E_i), the same number of them in every call."""
        if not len(inputs):
            return
        if self.count == 0:
            device = torch.device("cpu") if inputs.device.type == "mps" else inputs.device
            shifts = [rows.to(device=device, dtype=torch.float64).mean(0) for rows in (inputs, *outputs)]
            self._start(shifts[0], shifts[1:])
        self._spectrum = None
        step = max(64, CHUNK_VALUES // (inputs.shape[1] + sum(output.shape[1] for output in outputs)))
        for start in range(0, len(inputs), step):
            x = inputs[start : start + step].to(self.input_shift) - self.input_shift
            self.input_sum += x.sum(0)
            self.gram.addmm_(x.T, x)
            for index, output in enumerate(outputs):
                y = output[start : start + step].to(self.input_shift) - self.output_shifts[index]
                self.output_sums[index] += y.sum(0)
                self.output_squares[index] += y.square().sum(0)
                self.crosses[index].addmm_(x.T, y)
        self.count += len(inputs)

    def _start(self, input_shift: Tensor, output_shifts: Sequence[Tensor]) -> None:
        self.input_shift, self.output_shifts = input_shift, list(output_shifts)
        self.input_sum = torch.zeros_like(input_shift)
        self.gram = input_shift.new_zeros(len(input_shift), len(input_shift))
        self.output_sums = [torch.zeros_like(shift) for shift in output_shifts]
        self.output_squares = [torch.zeros_like(shift) for shift in output_shifts]
        self.crosses = [input_shift.new_zeros(len(input_shift), len(shift)) for shift in output_shifts]

    def _sums(self) -> list[Tensor]:
        return [self.gram, self.input_sum, *self.output_sums, *self.output_squares, *self.crosses]

    def about(self, input_shift: Tensor, output_shifts: Sequence[Tensor]) -> RidgeAccumulator:
        """The same moments about other shifts: a copy, to which moments about these can be added entry by entry."""
        moved = RidgeAccumulator()
        moved._start(input_shift, output_shifts)
        if self.count == 0:
            return moved
        moved.count, moved.gram = self.count, self.gram_about(input_shift)
        moved.input_sum = self.input_sum + self.count * (self.input_shift - input_shift)
        for part, shift in enumerate(output_shifts):
            moved.output_sums[part] = self.output_sums[part] + self.count * (self.output_shifts[part] - shift)
            moved.output_squares[part] = self.square_about(shift, part)
            moved.crosses[part] = self.cross_about(input_shift, shift, part)
        return moved

    def __add__(self, other: RidgeAccumulator) -> RidgeAccumulator:
        """The moments of the rows of both."""
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        total = other.about(self.input_shift, self.output_shifts)
        total.count += self.count
        for sums, own in zip(total._sums(), self._sums(), strict=True):
            sums += own
        return total

    def gathered(self) -> RidgeAccumulator:
        """The moments of the rows of all processes of a distributed run, the same on each; alone: these."""
        state = processes()
        if state.num_processes == 1:
            return self
        shifts = [self.input_shift.cpu(), *(shift.cpu() for shift in self.output_shifts)] if self.count else []
        first = next((each for each in gather_object([shifts]) if each), None)
        if first is None:
            return self
        device = state.device if state.device.type == "cuda" else "cpu"
        moved = self.about(first[0].to(device), [shift.to(device) for shift in first[1:]])
        for sums in moved._sums():
            sums.copy_(reduce(sums, "sum"))
        moved.count = sum(gather_object([self.count]))
        return moved

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
        return torch.addmm(self.crosses[part], left, torch.stack([moved_y, self.output_sums[part]]))

    def square_about(self, center: Tensor, part: int = 0) -> Tensor:
        """(E,): sum over rows of (y - center)²."""
        moved = self.output_shifts[part] - center
        return self.output_squares[part] + 2 * moved * self.output_sums[part] + self.count * moved.square()

    def standardised(self) -> tuple[Tensor, Tensor]:
        """(D, D) correlations of the inputs, and (D,) the scales that make them: 0 for constant channels."""
        covariance = self.gram_about(self.input_mean()) / self.count
        if not torch.isfinite(covariance).all():
            raise BacksightError(
                "The inputs of a linear fit are not finite (NaN or infinity in the features): "
                "check the target's weights and the images."
            )
        variance = covariance.diagonal()
        # A channel whose spread is below the float32 rounding of its mean carries no information.
        resolvable = variance.sqrt() > torch.finfo(torch.float32).eps * self.input_mean().abs()
        scale = torch.where(resolvable & (variance > 0), variance.clamp(min=1e-300).rsqrt(), 0.0)
        return covariance * scale[:, None] * scale, scale

    def spectrum(self) -> Spectrum:
        """The eigendecomposition of the standardised inputs' covariance, computed once."""
        if self._spectrum is None:
            if self.count == 0:
                raise ValueError("a ridge accumulator without rows has no solution")
            correlation, scale = self.standardised()
            eigenvalues, vectors = torch.linalg.eigh(correlation)
            self._spectrum = Spectrum(self.input_mean(), scale[:, None] * vectors, eigenvalues.clamp(min=0))
        return self._spectrum

    def path(self, part: int = 0) -> RidgePath:
        """The solutions for all ridge strengths."""
        spectrum, mean = self.spectrum(), self.output_mean(part)
        rotated = spectrum.rotation.T @ self.cross_about(spectrum.mean, mean, part) / self.count
        return RidgePath(spectrum, rotated, mean)

    def solve(self, alpha: float, part: int = 0) -> tuple[Tensor, Tensor]:
        """(weight (D, E), bias (E,)) of y = x @ weight + bias, minimising

        mean over rows of |y - ŷ|² + alpha |weight * standard deviation of x|², with a free bias. This is
        scikit-learn's Ridge(alpha * rows) on standardised inputs.
        """
        path = self.path(part)
        weight = path.weight(alpha)
        return weight, path.output_mean - path.spectrum.mean @ weight

    def mse(self, weight: Tensor, bias: Tensor, part: int = 0, right: Tensor | None = None) -> float:
        """Mean squared error, a value, of y = x @ weight (D, E) + bias on the accumulated rows.

        right: (R, E) where the weight is weight (D, R) @ right.
        """
        x, y = self.input_mean(), self.output_mean(part)
        cross, fitted = self.cross_about(x, y, part), self.gram_about(x) @ weight
        if right is None:
            explained, squares, mean = (weight * cross).sum(), (fitted * weight).sum(), x @ weight
        else:
            explained = ((weight.T @ cross) * right).sum()
            squares, mean = ((weight.T @ fitted) * (right @ right.T)).sum(), (x @ weight) @ right
        total = self.square_about(y, part).sum() - 2 * explained + squares
        return max(0.0, float(total + self.count * (y - mean - bias).square().sum())) / (self.count * len(y))

    def total_variance(self, center: Tensor, part: int = 0) -> float:
        """Mean squared distance, a value, of the outputs from `center` (E,): the error of a constant."""
        return float(self.square_about(center, part).sum()) / (self.count * len(center))


@dataclass(frozen=True)
class Spectrum:
    """mean: (D,); rotation: (D, D), standardises and rotates x - mean; eigenvalues: (D,) ascending."""

    mean: Tensor
    rotation: Tensor
    eigenvalues: Tensor


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

    def weight(self, alpha: float) -> Tensor:
        """(D, E) of ŷ = output mean + (x - mean) @ weight; alpha > 0."""
        return self.spectrum.rotation @ (self.rotated / (self.spectrum.eigenvalues + alpha)[:, None])

    def low_rank(self, alpha: float, rank: int) -> tuple[Tensor, Tensor]:
        """(D, R), (R, E): the ridge map of rank <= R whose fitted values are nearest to the full one's.

        The fitted values are projected on their first R principal axes. Source: reduced-rank ridge
        regression, Mukherjee & Zhu, Statistical Analysis and Data Mining 4, 2011.
        """
        shrinkage = 1 / (self.spectrum.eigenvalues + alpha)
        spread = self.spectrum.eigenvalues.sqrt() * shrinkage
        energies, axes = torch.linalg.eigh(self.inner * spread[:, None] * spread)
        kept = energies[-rank:] > 1e-14 * energies[-1]
        axes = spread[:, None] * axes[:, -rank:][:, kept] * energies[-rank:][kept].rsqrt()
        return self.spectrum.rotation @ (shrinkage[:, None] * (self.inner @ axes)), axes.T @ self.rotated

    def errors(self, validation: RidgeAccumulator, alphas: Sequence[float], part: int = 0) -> list[float]:
        """Mean squared error, a value, on the rows of `validation` for every alpha, from its moments."""
        rotation, mean = self.spectrum.rotation, self.spectrum.mean
        cross = rotation.T @ validation.cross_about(mean, self.output_mean, part)
        linear = (self.rotated * cross).sum(1)
        quadratic = (rotation.T @ validation.gram_about(mean) @ rotation) * self.inner
        square = validation.square_about(self.output_mean, part).sum()
        errors = []
        for alpha in alphas:
            shrinkage = 1 / (self.spectrum.eigenvalues + alpha)
            errors.append(float(square - 2 * shrinkage @ linear + shrinkage @ quadratic @ shrinkage))
        return [max(0.0, error) / (validation.count * len(self.output_mean)) for error in errors]


class Solution(NamedTuple):
    """ŷ = bias + (x - center) @ the product of `factors`; error: its mean squared error on the validation rows."""

    alpha: float
    center: Tensor
    bias: Tensor
    factors: tuple[Tensor, ...]
    error: float


def best(
    training: RidgeAccumulator,
    validation: RidgeAccumulator,
    alphas: Sequence[float],
    part: int = 0,
    rank: int | None = None,
) -> Solution:
    """The ridge map of the strength that does best on the validation rows; rank: of the map, None for full rank.

    All strengths are compared where the inputs are few; from WIDE inputs on, a few by bisection (the error falls, then
    rises with the strength), each by one Cholesky factor.
    """
    center, bias = training.input_mean(), training.output_mean(part)
    if len(center) >= WIDE and rank is None:
        alpha, weight = _bisected(training, validation, alphas, part)
        factors: tuple[Tensor, ...] = (weight,)
    else:
        path = training.path(part)
        errors = path.errors(validation, alphas, part)
        alpha = alphas[min(range(len(alphas)), key=errors.__getitem__)]
        factors = (path.weight(alpha),) if rank is None else path.low_rank(alpha, rank)
    offset = bias - (center @ factors[0] if rank is None else (center @ factors[0]) @ factors[1])
    error = validation.mse(factors[0], offset, part, None if rank is None else factors[1])
    return Solution(alpha, center, bias, factors, error)


def _bisected(
    training: RidgeAccumulator, validation: RidgeAccumulator, alphas: Sequence[float], part: int
) -> tuple[float, Tensor]:
    """(strength, weight)."""
    correlation, scale = training.standardised()
    center, bias = training.input_mean(), training.output_mean(part)
    cross = scale[:, None] * training.cross_about(center, bias, part) / training.count
    generator = torch.Generator().manual_seed(0)
    sketch = torch.eye(cross.shape[1]).to(cross)
    if len(sketch) > SKETCH:
        sketch = torch.randn(len(sketch), SKETCH, generator=generator).to(cross)
    gram = validation.gram_about(center)
    held_out = validation.cross_about(center, bias, part) @ sketch
    errors: dict[int, float] = {}

    def factor(alpha: float) -> Tensor:
        return torch.linalg.cholesky(correlation + alpha * torch.eye(len(correlation)).to(correlation))

    def error(number: int) -> float:
        """Of the sketched outputs, up to a constant."""
        if number not in errors:
            weight = scale[:, None] * torch.cholesky_solve(cross @ sketch, factor(alphas[number]))
            errors[number] = float(((gram @ weight - 2 * held_out) * weight).sum())
        return errors[number]

    low, high = 0, len(alphas) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) <= error(middle + 1) else (middle + 1, high)
    return alphas[low], scale[:, None] * torch.cholesky_solve(cross, factor(alphas[low]))


def leading_directions(moments: RidgeAccumulator, count: int) -> Tensor:
    """(D, count): the principal directions of the standardised inputs, the leading ones first; float32."""
    return moments.spectrum().rotation[:, -count:].flip(1).float()
