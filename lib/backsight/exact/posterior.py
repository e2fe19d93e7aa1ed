"""The most probable z behind y = T(z) + noise, z from a Gaussian: Levenberg–Marquardt on whitened residuals.

    ½ |(T(z) − y) V|²  +  ½ |w|²,   z = mean + w factorᵀ;   first V of the residual's covariance at the start, so that
    every direction of y is of size one and few products go far, then, stage by stage, of the noise alone

Sources: Tarantola, Inverse Problem Theory (2005), ch. 3; Nocedal & Wright, Numerical Optimization (2006), 7.1, 10.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.solver import Linearised, conjugate_gradients, dot, line_search
from backsight.exact.starts import by_group

Forward = Callable[[Tensor], Tensor]
LEAST_DAMPING, MOST_DAMPING = 1e-4, 1e4
GOOD, POOR = 0.7, 0.25  # gain ratios above which the damping falls, below which it rises (Nocedal & Wright, 4.1)
LEAST_STAGE = 1e-6  # share of the start's residual covariance at which the search ends
SHORTEST = 0.06  # length of a step below which a search gives up


@dataclass(frozen=True)
class MapSettings:
    """How long the search goes on.

    stages: shares of the start's residual covariance that are added to the noise's, in order (the last is the objective
    that counts; 0: the noise alone), None: decades down to the noise; steps: Gauss–Newton steps of a stage; products:
    pairs of products (J, Jᵀ) of one step; tolerance: relative residual at which its linear solve ends; damping: first
    λ; enough: relative fall of the objective below which a stage ends; least: noise that is taken at least, relative to
    the values' deviation: with less, the products go where hardly anything is to be gained.
    """

    stages: Sequence[float] | None = None
    steps: int = 2
    products: int = 25
    tolerance: float = 1e-3
    damping: float = 1.0
    enough: float = 1e-3
    least: float = 1e-3


@dataclass(frozen=True)
class MapSolution:
    """What a search found, a sample each.

    w, z: (B, n, c), whitened and not; objective, at_start: (B,) ½|r̃|² + ½|w|² of the last stage, at the end and at
    w = 0; misfit: (B,) mean square of the whitened residual (1: as the noise says); stage: the last.
    """

    w: Tensor
    z: Tensor
    objective: Tensor
    at_start: Tensor
    misfit: Tensor
    stage: float


@dataclass(frozen=True)
class Posterior:
    """What y and a Gaussian say of z.

    forward: T, (B, n, c) -> (B, m, d), acting on each sample alone; y: (B, m, d); mean (B, n, c), factor (c, c): of the
    prior, z = mean + w factorᵀ with w standard normal; noise, spread: (P + 1, d, d) covariances of y − T(z), of the
    noise, and of what T(mean) is off beside it.
    """

    forward: Forward
    y: Tensor
    mean: Tensor
    factor: Tensor
    noise: Tensor
    spread: Tensor

    def at(self, w: Tensor, which: Tensor | slice = slice(None)) -> Tensor:
        """z (K, n, c) of whitened (K, n, c), of these samples."""
        return self.mean[which] + w @ self.factor.T

    def stages(self) -> tuple[float, ...]:
        """Decades of the spread from 1 to the noise, then 0; where the noise is below LEAST_STAGE of it, that is the
        end: with less, the objective is so ill conditioned that the products go nowhere, and nothing is gained."""
        noise, spread = (float(part.diagonal(dim1=-2, dim2=-1).mean()) for part in (self.noise, self.spread))
        ratio = noise / max(spread, 1e-300)
        decades = [10.0**-power for power in range(1 - round(math.log10(LEAST_STAGE)))]
        above = tuple(stage for stage in decades if stage > ratio)
        return above if ratio < LEAST_STAGE else (*above, 0.0)

    def whitener(self, stage: float) -> Tensor:
        """(P + 1, d, d), V with V Vᵀ = (noise + stage · spread)⁻¹."""
        values, vectors = torch.linalg.eigh((self.noise + stage * self.spread).double())
        least = values.amax(-1, keepdim=True) * torch.finfo(torch.float64).eps
        return (vectors * torch.maximum(values, least).rsqrt()[..., None, :]).to(self.noise)

    def residual(self, stage: float) -> Callable[..., Tensor]:
        """w (K, n, c), and which samples -> (K, m, d) the whitened residual."""
        whitener = self.whitener(stage)

        def residual(w: Tensor, which: Tensor | slice = slice(None)) -> Tensor:
            return by_group(self.forward(self.at(w, which)) - self.y[which], whitener)

        return residual

    def most_probable(self, settings: MapSettings | None = None) -> MapSolution:
        """The z of least ½|(T(z) − y) V|² + ½|w|² at the last stage, found from w = 0.

        A step is taken only where it lowers the objective, sample by sample. Raises BacksightError where the pass of
        the start is not finite.
        """
        settings, w = settings or MapSettings(), torch.zeros_like(self.mean)
        damping = torch.full((len(w),), settings.damping, dtype=torch.float64, device=w.device)
        for stage in settings.stages or self.stages():
            residual = self.residual(stage)

            def objective(w: Tensor, which: Tensor | slice = slice(None), residual: Any = residual) -> Tensor:
                with torch.no_grad():
                    away = residual(w, which)
                    return 0.5 * dot(away, away) + 0.5 * dot(w, w)

            for _ in range(settings.steps):
                move, before, promised = _step(residual, w, damping, settings)
                w, after, _ = line_search(objective, w, move, before, shortest=SHORTEST, armijo=0.0)
                ratio = (before - after) / promised.clamp(min=1e-300)
                damping = torch.where(ratio > GOOD, damping / 4, torch.where(ratio < POOR, damping * 4, damping))
                damping = damping.clamp(LEAST_DAMPING, MOST_DAMPING)
                if bool((before - after <= settings.enough * before).all()):
                    break
        # Earlier stages lower another objective: where they raised this one, there is nothing to be gained from them.
        start, end = objective(torch.zeros_like(w)), objective(w)
        w = torch.where((end > start)[:, None, None], torch.zeros_like(w), w)
        end = torch.minimum(start, end)
        return MapSolution(w, self.at(w), end, start, (2 * end - dot(w, w)) / self.y[0].numel(), stage)


def _step(residual: Forward, w: Tensor, damping: Tensor, settings: MapSettings) -> tuple[Tensor, Tensor, Tensor]:
    """(move, objective before, promised fall) of one Levenberg–Marquardt step of every sample."""
    here = Linearised(residual, w)
    before = 0.5 * dot(here.value, here.value) + 0.5 * dot(w, w)
    if not bool(torch.isfinite(before).all()):
        raise BacksightError("The pass of the start is not finite: look at the representation and at the prior.")
    slope, weight = here.transposed(here.value) + w, (1 + damping).to(w)[:, None, None]
    move, _ = conjugate_gradients(
        lambda direction: here.transposed(here.product(direction)) + weight * direction,
        -slope,
        settings.products,
        settings.tolerance,
    )
    pushed = here.product(move)
    return move, before, -(dot(slope, move) + 0.5 * dot(pushed, pushed) + 0.5 * dot(move, move))
