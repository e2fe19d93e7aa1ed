"""How sure a MAP inverse is, pixel by pixel: draws about its solution, and what of them and of other clues counts.

    Uncertainty.fitted(…)            the fit of an inverse also measures the shares of its clues
    uncertainty.read(y)              pictures, the steadied start, root mean square error expected of every pixel
    reliability, calibration_error, coverage        whether the expected error is the actual one

Sources: Tarantola, Inverse Problem Theory (2005), 3.2.3 (posterior covariance); Papandreou & Yuille, NIPS 2010 (perturb
and optimise); McCullagh & Nelder, Generalized Linear Models (1989), ch. 8 (regression of variances); Levi et al.,
Sensors 22 (2022) (expected normalised calibration error of a regression's uncertainty).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from backsight.exact.inverse import parts_of
from backsight.exact.map import MapInverse, MapSolution, Posterior, fit_map_tap
from backsight.exact.solver import Linearised, conjugate_gradients, dot
from backsight.representation import Representation
from backsight.tables.pooling import influence

AROUND = 5  # pixels, side of the window that clues of an error are taken over
ROUNDS = 8  # of the reweighted fit
SAMPLES = 2  # draws about a solution
NORMAL_95 = 1.959964  # deviations on either side that hold 95 % of a normal distribution
BINS = 10  # of equally many pixels, by predicted deviation


def posterior_samples(
    posterior: Posterior, solution: MapSolution, count: int = SAMPLES, products: int = 25, seed: int = 0
) -> Tensor:
    """(count, B, n, c) draws of z − z_MAP from the Gaussian about the solution, covariance L (1 + J̃ᵀJ̃)⁻¹ Lᵀ.

    A draw solves (1 + J̃ᵀJ̃) d = w₀ + J̃ᵀe with white w₀, e (perturb and optimise). Its solve starts from w₀, so that what
    the products have not reached keeps the prior's own width. The whitened residual has to be about 1; where it is
    larger (the search did not end, or the model is not linear between) the noise is taken larger by that factor.
    """
    y, here = posterior.y, Linearised(posterior.residual(solution.stage), solution.w)
    excess = (dot(here.value, here.value) / y[0].numel()).clamp(min=1.0).to(y)[:, None, None]
    generator = torch.Generator(device=y.device).manual_seed(seed)

    def operator(direction: Tensor) -> Tensor:
        return here.transposed(here.product(direction)) / excess + direction

    drawn = []
    for _ in range(count):
        white = torch.randn(solution.w.shape, generator=generator, dtype=y.dtype, device=y.device)
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        right = here.transposed(noise) / excess.sqrt() + white
        drawn.append(conjugate_gradients(operator, right, products, 1e-3, white) @ posterior.factor.T)
    return torch.stack(drawn)


def variance_shares(clues: Tensor, square: Tensor) -> Tensor:
    """(k,) shares, none below 0, with Σ shares · clues (B, k, H, W) the variance of errors whose squares are (B, H, W).

    Every pixel counts in proportion to its own variance, as in a gamma regression with an identity link, fitted by
    reweighted non-negative least squares.
    """
    rows, goal = clues.movedim(1, -1).flatten(0, -2).double(), square.flatten().double()
    size = rows.mean(0).clamp(min=1e-300)
    rows, variance = rows / size, goal.mean().expand_as(goal)
    for _ in range(ROUNDS):
        # The small triangle has the same minimum as the tall matrix.
        q, triangle = torch.linalg.qr(rows / variance[:, None])
        shares = torch.from_numpy(nnls(triangle.cpu().numpy(), (q.T @ (goal / variance)).cpu().numpy())[0]).to(rows)
        variance = (rows @ shares).clamp(min=1e-3 * float(goal.mean()))
    return shares / size


@dataclass(frozen=True)
class Uncertainty:
    """shares: (4,) of each clue in the error's variance; without a measurement, that of the draws alone."""

    inverse: MapInverse
    shares: Tensor

    @classmethod
    def fitted(cls, *arguments: Any, **named: Any) -> Uncertainty:
        """With the inverse that `fit_map_tap` makes of the same arguments, measured on its `checked` images."""
        seen: list[tuple[Representation, Posterior, MapSolution, Tensor]] = []
        inverse = fit_map_tap(*arguments, **named, watch=lambda *solved: seen.append(solved))
        if not seen:
            return cls(inverse, torch.tensor([0.0, 1.0, 0.0, 0.0]))
        clues, errors = [], []
        for _, posterior, solution, truth in seen:
            clues.append(_clues(inverse, posterior, solution))
            patches = inverse.gained(posterior.mean, solution.z)
            errors.append((inverse.pictures(patches).clamp(0, 1) - inverse.pictures(truth)).square().mean(1))
        return cls(inverse, variance_shares(torch.cat(clues), torch.cat(errors)))

    def read(self, representation: Representation) -> tuple[Tensor, Tensor, Tensor]:
        """MAP pictures and the steadied start, (N, 3, H, W) in [0, 1], and the deviation (N, H, W) of the pictures."""
        parts = []
        for part in parts_of(representation, self.inverse.batch_size):
            posterior, solution, patches = self.inverse.solve(part)
            variance = torch.einsum(
                "bkhw,k->bhw", clues := _clues(self.inverse, posterior, solution), self.shares.to(clues)
            )
            pictures = (self.inverse.pictures(z).clamp(0, 1) for z in (patches, posterior.mean))
            parts.append((*pictures, variance.clamp(min=1e-12).sqrt()))
        images, steadied, deviation = (torch.cat(part).detach() for part in zip(*parts, strict=True))
        return images, steadied, deviation


def _clues(inverse: MapInverse, posterior: Posterior, solution: MapSolution) -> Tensor:
    """(B, 4, H, W), each a variance: one; of draws about the solution; the way from the start, squared; the detail of
    the solution, squared. All but the first are means over the channels and the pixels around: a few draws are a rough
    measure of one pixel alone."""
    drawn = posterior_samples(posterior, solution, products=inverse.settings.products).square().mean(0)
    way, picture, spread = map(inverse.pictures, (solution.z - posterior.mean, solution.z, drawn))
    detail = picture - _around(picture)
    squares = [_around(square.mean(1, keepdim=True)) for square in (spread, way.square(), detail.square())]
    return torch.cat([torch.ones_like(squares[0]), *squares], dim=1)


def _around(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, AROUND, 1, AROUND // 2, count_include_pad=False)


def reliability(deviation: Tensor, error: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values, predicted, actual), each (N, BINS): of every image, how many of its values lie in each of BINS bins of
    equally many pixels, by predicted deviation (N, H, W), and there the sums of predicted and actual squared error.

    error: (N, C, H, W).
    """
    predicted, count = deviation[:, None].expand_as(error).double(), len(error)
    label = torch.empty(error.numel(), dtype=torch.long)
    for place, part in enumerate(predicted.flatten().argsort(stable=True).chunk(BINS)):
        label[part] = place
    cell = (torch.arange(count).repeat_interleave(error[0].numel()) * BINS + label).numpy()
    sums = (None, predicted.square().flatten().numpy(), error.double().square().flatten().numpy())
    values, said, actual = (np.bincount(cell, each, count * BINS).reshape(count, BINS).astype(float) for each in sums)
    return values, said, actual


def calibration_error(values: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(of the predicted deviations, of one constant deviation of the same mean variance), (N,) each: what every image
    contributes to the mean over the bins of |actual − predicted| / predicted, root mean squares. 0 is perfect."""
    constant = np.sqrt(predicted.sum() / values.sum())

    def of(weights: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            said, true = (np.sqrt(weights @ squares / (weights @ values)) for squares in (predicted, actual))
        return np.stack([np.nanmean(np.abs(true - one) / one, axis=1) for one in (said, constant)], axis=1)

    own, of_constant = influence(of, len(values)).T
    return own, of_constant


def coverage(deviation: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """(of the deviations (N, H, W), of one constant of the same mean variance): (N,) share of errors (N, C, H, W)
    within 1.96 of them; 0.95 of normal errors."""
    constant = deviation.double().square().mean().sqrt().expand_as(deviation)
    own, of_constant = (
        (error.abs() <= NORMAL_95 * size[:, None]).double().flatten(1).mean(1) for size in (deviation, constant)
    )
    return own, of_constant
