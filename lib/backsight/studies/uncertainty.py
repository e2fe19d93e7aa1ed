"""How sure a MAP inverse is, pixel by pixel: draws about its solution, and what of them and of other clues counts.

    with Uncertainty.fitted(…) -> inverse, uncertainty      the fit of an inverse also measures the shares of its clues
    uncertainty.deviation(representation, prior, solution)  (B, H, W) root mean square error expected of a pixel

Sources: Tarantola, Inverse Problem Theory (2005), 3.2.3 (posterior covariance); Papandreou & Yuille, NIPS 2010 (perturb
and optimise); McCullagh & Nelder, Generalized Linear Models (1989), ch. 8 (regression of variances).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import nnls
from torch import Tensor

from backsight.exact.map import MapInverse, fit_map_tap
from backsight.exact.posterior import Gaussian, Likelihood, MapSolution, whitened
from backsight.exact.solver import Linearised, conjugate_gradients, dot
from backsight.representation import Representation

AROUND = 5  # pixels, side of the window that clues of an error are taken over
ROUNDS = 8  # of the reweighted fit


def posterior_samples(
    forward: Any,
    y: Tensor,
    prior: Gaussian,
    likelihood: Likelihood,
    solution: MapSolution,
    stage: float,
    count: int = 8,
    products: int = 25,
    seed: int = 0,
) -> Tensor:
    """(count, B, n, c) draws of z − z_MAP from the Gaussian about the solution, covariance L (1 + J̃ᵀJ̃)⁻¹ Lᵀ.

    A draw solves (1 + J̃ᵀJ̃) d = w₀ + J̃ᵀe with white w₀, e (perturb and optimise). Its solve starts from w₀, so that what
    the products have not reached keeps the prior's own width. The whitened residual has to be about 1; where it is
    larger (the search did not end, or the model is not linear between) the noise is taken larger by that factor.
    """
    here = Linearised(whitened(forward, y, prior, likelihood, stage), solution.w)
    excess = (dot(here.value, here.value) / y[0].numel()).clamp(min=1.0).to(y)[:, None, None]
    generator = torch.Generator(device=y.device).manual_seed(seed)

    def operator(direction: Tensor) -> Tensor:
        return here.transposed(here.product(direction)) / excess + direction

    drawn = []
    for _ in range(count):
        white = torch.randn(solution.w.shape, generator=generator, dtype=y.dtype, device=y.device)
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        right = here.transposed(noise) / excess.sqrt() + white
        drawn.append(conjugate_gradients(operator, right, products, 1e-3, white)[0] @ prior.factor.T)
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
        seen: list[tuple[Representation, Gaussian, MapSolution, Tensor]] = []
        inverse = fit_map_tap(*arguments, **named, watch=lambda *solved: seen.append(solved))
        if not seen:
            return cls(inverse, torch.tensor([0.0, 1.0, 0.0, 0.0]))
        made, clues, errors = cls(inverse, torch.zeros(4)), [], []
        for representation, prior, solution, truth in seen:
            clues.append(made.clues(representation, prior, solution))
            patches = inverse.gained(prior.mean, solution.z)
            errors.append((inverse.pictures(patches).clamp(0, 1) - inverse.pictures(truth)).square().mean(1))
        return cls(inverse, variance_shares(torch.cat(clues), torch.cat(errors)))

    def deviation(self, representation: Representation, prior: Gaussian, solution: MapSolution) -> Tensor:
        """(B, H, W) of what `inverse.solve` gave."""
        clues = self.clues(representation, prior, solution)
        return torch.einsum("bkhw,k->bhw", clues, self.shares.to(clues)).clamp(min=1e-12).sqrt()

    def clues(self, part: Representation, prior: Gaussian, solution: MapSolution, samples: int = 2) -> Tensor:
        """(B, 4, H, W), each a variance: one; of draws about the solution; the way from the start, squared; the
        detail of the solution, squared. All but the first are means over the channels and the pixels around: a few
        draws are a rough measure of one pixel alone.
        """
        inverse, products = self.inverse, self.inverse.settings.products
        problem = (inverse.pass_to_tap, part.values, prior, inverse.likelihood, solution, inverse.last_stage)
        drawn = posterior_samples(*problem, count=samples, products=products).square().mean(0)
        way, solved, spread = (inverse.pictures(each) for each in (solution.z - prior.mean, solution.z, drawn))
        detail = solved - _around(solved)
        squares = [_around(each.mean(1, keepdim=True)) for each in (spread, way.square(), detail.square())]
        return torch.cat([torch.ones_like(squares[0]), *squares], dim=1)


def _around(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, AROUND, 1, AROUND // 2, count_include_pad=False)
