"""How sure a MAP inverse is, pixel by pixel: draws from the Gaussian about its solution, and whether they are right.

    posterior_samples, deviation                    root mean square error expected of every pixel
    reliability, calibration_error, coverage        whether that is the actual one

Sources: Tarantola, Inverse Problem Theory (2005), 3.2.3 (posterior covariance); Papandreou & Yuille, NIPS 2010 (perturb
and optimise); Levi et al., Sensors 22 (2022) (expected normalised calibration error of a regression's uncertainty).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from backsight.exact.map import MapInverse, MapSolution, Posterior
from backsight.exact.solver import Linearised, conjugate_gradients, dot
from backsight.tables.pooling import influence

SAMPLES = 4  # draws about a solution
AROUND = 5  # pixels, side of the window that a deviation is taken over: a few draws tell little of one pixel alone
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


def deviation(inverse: MapInverse, posterior: Posterior, solution: MapSolution) -> Tensor:
    """(B, H, W): the root mean square of draws about a solution, over the channels and the pixels around."""
    drawn = posterior_samples(posterior, solution, products=inverse.settings.products)
    squares = torch.stack([inverse.pictures(z).square().mean(1, keepdim=True) for z in drawn]).mean(0)
    return torch.nn.functional.avg_pool2d(squares, AROUND, 1, AROUND // 2, count_include_pad=False)[:, 0].sqrt()


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


def coverage(deviation: Tensor, error: Tensor) -> Tensor:
    """(N,) share of errors (N, C, H, W) within 1.96 deviations (N, H, W); 0.95 of normal errors."""
    return (error.abs() <= NORMAL_95 * deviation[:, None]).double().flatten(1).mean(1)
