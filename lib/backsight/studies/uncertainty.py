"""How sure a MAP inverse is, pixel by pixel: draws about its solution, and what of them and of other clues counts.

    with Uncertainty.fitted(…) -> inverse, uncertainty      the fit of an inverse also measures the shares of its clues
    uncertainty.deviation(posterior, solution)  (B, H, W) root mean square error expected of a pixel

    reliability(deviation, error)                          whether it means what it says, and its number

Sources: Tarantola, Inverse Problem Theory (2005), 3.2.3 (posterior covariance); Papandreou & Yuille, NIPS 2010 (perturb
and optimise); McCullagh & Nelder, Generalized Linear Models (1989), ch. 8 (regression of variances); Levi et al.,
Sensors 22 (2022) (expected normalised calibration error of a regression's uncertainty).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import nnls
from torch import Tensor

from backsight.exact.map import MapInverse, MapSolution, Posterior, fit_map_tap
from backsight.exact.solver import Linearised, conjugate_gradients, dot
from backsight.representation import Representation
from backsight.tables.names import MAP, NULL_CONSTANT

AROUND = 5  # pixels, side of the window that clues of an error are taken over
ROUNDS = 8  # of the reweighted fit
NORMAL_95 = 1.959964  # deviations on either side that hold 95 % of a normal distribution
RESAMPLES = 300  # of the bootstrap of a calibration


def posterior_samples(
    posterior: Posterior, solution: MapSolution, count: int = 8, products: int = 25, seed: int = 0
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
    rows = rows / size
    variance = goal.mean().expand_as(goal)
    shares = rows.new_zeros(rows.shape[1])
    for _ in range(ROUNDS):
        # The small triangle has the same minimum as the tall matrix.
        q, triangle = torch.linalg.qr(rows / variance[:, None])
        solved, _ = nnls(triangle.cpu().numpy(), (q.T @ (goal / variance)).cpu().numpy())
        shares = torch.from_numpy(solved).to(rows)
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
        inverse = fit_map_tap(*arguments, **{**named, "watch": lambda *solved: seen.append(solved)})
        if not seen:
            return cls(inverse, torch.tensor([0.0, 1.0, 0.0, 0.0]))
        made, clues, errors = cls(inverse, torch.zeros(4)), [], []
        for _, posterior, solution, truth in seen:
            clues.append(made.clues(posterior, solution))
            patches = inverse.gained(posterior.mean, solution.z)
            errors.append((inverse.pictures(patches).clamp(0, 1) - inverse.pictures(truth)).square().mean(1))
        return cls(inverse, variance_shares(torch.cat(clues), torch.cat(errors)))

    def deviation(self, posterior: Posterior, solution: MapSolution) -> Tensor:
        """(B, H, W) of what `inverse.solve` gave."""
        clues = self.clues(posterior, solution)
        return torch.einsum("bkhw,k->bhw", clues, self.shares.to(clues)).clamp(min=1e-12).sqrt()

    def clues(self, posterior: Posterior, solution: MapSolution, samples: int = 2) -> Tensor:
        """(B, 4, H, W), each a variance: one; of draws about the solution; the way from the start, squared; the
        detail of the solution, squared. All but the first are means over the channels and the pixels around: a few
        draws are a rough measure of one pixel alone.
        """
        inverse, products = self.inverse, self.inverse.settings.products
        drawn = posterior_samples(posterior, solution, samples, products).square().mean(0)
        way, solved, spread = (inverse.pictures(each) for each in (solution.z - posterior.mean, solution.z, drawn))
        detail = solved - _around(solved)
        squares = [_around(each.mean(1, keepdim=True)) for each in (spread, way.square(), detail.square())]
        return torch.cat([torch.ones_like(squares[0]), *squares], dim=1)


def _around(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, AROUND, 1, AROUND // 2, count_include_pad=False)


def reliability(
    deviation: Tensor, error: Tensor, seed: int = 0, bins: int = 10
) -> tuple[pd.DataFrame, dict[str, tuple[tuple[float, float, float], Tensor]]]:
    """Whether predicted deviations (N, H, W) above 0 are those of errors (N, C, H, W).

    Returns a row a bin of equally many pixels, by predicted deviation (`bin`, `predicted` and `actual` root mean
    square, `n`, and `constant`, one deviation of the same mean variance), and {inverse: (calibration error, coverage)}
    of MAP and of that constant. Calibration error: (value, low, high), mean over these bins of |actual − predicted| /
    predicted (0 is perfect; a constant that is right on average is off wherever errors are rightly said to be small or
    large), images drawn anew; coverage: (N,) share of errors within 1.96 deviations (0.95 of normal errors).
    """
    predicted, count = deviation[:, None].expand_as(error).double(), len(error)
    constant = float(predicted.square().mean().sqrt())
    label = torch.empty(error.numel(), dtype=torch.long)
    for place, part in enumerate(predicted.flatten().argsort(stable=True).chunk(bins)):
        label[part] = place
    cell = (torch.arange(count).repeat_interleave(error[0].numel()) * bins + label).numpy()
    number, variance, square = (
        np.bincount(cell, weights, count * bins).reshape(count, bins)
        for weights in (None, predicted.square().flatten().numpy(), error.double().square().flatten().numpy())
    )

    def in_bins(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(predicted, actual), each (K, bins), of images that count as often as weights (K, N) say."""
        drawn = weights @ number
        drawn = np.where(drawn > 0, drawn, np.nan)
        return np.sqrt(weights @ variance / drawn), np.sqrt(weights @ square / drawn)

    def errors(said: np.ndarray, actual: np.ndarray) -> np.ndarray:
        """(2, K) of MAP and of the constant."""
        return np.stack([np.nanmean(np.abs(actual - one) / one, axis=1) for one in (said, constant)])

    said, actual = in_bins(np.ones((1, count)))
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(float)
    low, high = np.nanquantile(errors(*in_bins(drawn)), [0.025, 0.975], axis=1)
    intervals = zip(errors(said, actual)[:, 0].tolist(), low.tolist(), high.tolist(), strict=True)
    columns = {"bin": range(bins), "predicted": said[0], "actual": actual[0], "n": number.sum(0).astype(int)}
    covered = [(error.double().abs() <= NORMAL_95 * size).double().flatten(1).mean(1) for size in (predicted, constant)]
    judged = dict(zip((MAP, NULL_CONSTANT), zip(intervals, covered, strict=True), strict=True))
    return pd.DataFrame({**columns, "constant": constant}), judged
