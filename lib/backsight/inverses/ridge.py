"""Ridge regression in closed form: moments of the data, and from them the solutions for every strength.

Moments are accumulated in float64 about the mean of the first batch. Features of deep layers are nearly
collinear and hold a few huge channels: directions whose spread is below 3e-4 of the largest are lost in a
float32 Gram matrix, but they are present in the float32 features (tests/test_linear.py shows both). The products of
blocks of rows may be taken in float32 all the same (`products`), which halves the cost where float64 runs at half
speed; their rounding errors are independent and average out over blocks, since the blocks are summed in float64.
Inputs are standardised, so that a ridge strength means the same at every tap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor

from backsight.data.distributed import processes
from backsight.errors import BacksightError

CHUNK_VALUES = 2**24  # values that an update converts at once
BLOCK_ROWS = 4096  # rows whose products are summed in float32 before they enter the float64 sums
PANELS = 2  # column panels of a Gram matrix: only those on and above the diagonal are computed, 3/4 of the work
PANEL_WIDTH = 256  # a panel is at least as wide; narrower matrix products run below the machine's peak


class RidgeAccumulator:
    """The moments of inputs x and of one or more outputs y, from which ridge solutions and errors follow.

    `update(x, y, …)` adds rows; accumulators of different rows add (`+`); nothing else is kept of the data.
    All outputs share the Gram matrix of the inputs and its one eigendecomposition (`spectrum`).
    products: the precision of the matrix products of a block of rows; sums are float64 always.
    """

    def __init__(self, products: torch.dtype = torch.float64) -> None:
        self.products = products
        self.count = 0
        self.input_shift = torch.empty(0)
        self.input_sum = torch.empty(0)
        self.upper = torch.empty(0)  # of the Gram matrix; below the diagonal there are parts of it only
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
        if self.products != torch.float64:
            rows = min(rows, BLOCK_ROWS)
        shifts = [shift.to(self.products) for shift in (self.input_shift, *self.output_shifts)]
        for start in range(0, len(inputs), rows):
            x = self._centred(inputs[start : start + rows], shifts[0])
            self.input_sum += x.sum(0)
            for first, last in _panels(len(shifts[0])):
                _add_product(self.upper[first:last, first:], x[:, first:last], x[:, first:])
            for index, output in enumerate(outputs):
                y = self._centred(output[start : start + rows], shifts[index + 1])
                self.output_sums[index] += y.sum(0)
                self.output_squares[index] += torch.linalg.vector_norm(y, dim=0).double().square_()
                _add_product(self.crosses[index], x, y)
        self.count += len(inputs)

    def _centred(self, rows: Tensor, shift: Tensor) -> Tensor:
        if rows.dtype == self.products and rows.device == shift.device:
            return rows - shift
        return rows.to(shift, copy=True).sub_(shift)

    @property
    def gram(self) -> Tensor:
        """(D, D): sum over rows of (x - shift)(x - shift)ᵀ."""
        return self.upper.triu() + self.upper.triu(1).T

    def _start(self, inputs: Tensor, outputs: Sequence[Tensor]) -> None:
        device = torch.device("cpu") if inputs.device.type == "mps" else inputs.device  # mps has no float64
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.input_shift = inputs.to(**options).mean(0)
        self.input_sum = torch.zeros(inputs.shape[1], **options)
        self.upper = torch.zeros(inputs.shape[1], inputs.shape[1], **options)
        self.output_shifts = [each.to(**options).mean(0) for each in outputs]
        self.output_sums = [torch.zeros(each.shape[1], **options) for each in outputs]
        self.output_squares = [torch.zeros(each.shape[1], **options) for each in outputs]
        self.crosses = [torch.zeros(inputs.shape[1], each.shape[1], **options) for each in outputs]

    def about(self, input_shift: Tensor, output_shifts: Sequence[Tensor]) -> RidgeAccumulator:
        """The same moments about other shifts: a copy, to which moments about these can be added entry by entry."""
        moved = RidgeAccumulator(self.products)
        moved.count = self.count
        moved.input_shift, moved.output_shifts = input_shift, list(output_shifts)
        moved.upper = self.gram_about(input_shift)
        moved.input_sum = self.input_sum + self.count * (self.input_shift - input_shift)
        for part, shift in enumerate(output_shifts):
            moved.output_sums.append(self.output_sums[part] + self.count * (self.output_shifts[part] - shift))
            moved.output_squares.append(self.square_about(shift, part))
            moved.crosses.append(self.cross_about(input_shift, shift, part))
        return moved

    def __add__(self, other: RidgeAccumulator) -> RidgeAccumulator:
        """The moments of the rows of both."""
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        total = other.about(self.input_shift, self.output_shifts)
        total.count += self.count
        for sums, own in zip(total.sums(), self.sums(), strict=True):
            sums += own
        return total

    def sums(self) -> list[Tensor]:
        """All that is summed over rows; of the Gram matrix, the part above the diagonal counts."""
        return [self.upper, self.input_sum, *self.output_sums, *self.output_squares, *self.crosses]

    def gathered(self) -> RidgeAccumulator:
        """The moments of the rows of all processes of a distributed run, the same on each; alone: these.

        The moments are moved to the shifts of the first process that has rows, then summed.
        """
        state = processes()
        if state.num_processes == 1:
            return self
        shifts = [self.input_shift.cpu(), *(each.cpu() for each in self.output_shifts)] if self.count else []
        first = next((each for each in gather_object([shifts]) if each), None)
        if first is None:
            return self
        input_shift, *output_shifts = (
            each.to(state.device if state.device.type == "cuda" else "cpu") for each in first
        )
        if self.count:
            moved = self.about(input_shift, output_shifts)
        else:
            moved = RidgeAccumulator(self.products)
            moved._start(input_shift[None], [each[None] for each in output_shifts])
        for sums in moved.sums():
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


def _panels(width: int) -> list[tuple[int, int]]:
    """(first, last) columns of the panels of a symmetric matrix."""
    panels = max(1, min(PANELS, width // PANEL_WIDTH))
    bounds = [width * number // panels for number in range(panels + 1)]
    return list(pairwise(bounds))


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums (D, E) float64 += leftᵀ @ right, of (M, D) and (M, E)."""
    if left.dtype == sums.dtype:
        sums.addmm_(left.T, right)
    else:
        sums += left.T @ right


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
