"""The most probable picture behind a noisy representation: the model's own pass, a prior, and a noise level.

    y ──► trained inverse, steadied ──► start m(y) ──► Gauss–Newton on   |T(z) − y|² / noise  +  |z − m|² / error of m
          (Wiener in front, ridge behind)              └ conjugate gradients on products JᵀJ, one retained graph ┘

T is the target itself up to the tap, exact to round-off; the prior is the Gaussian of the start's own error, measured
on held-out images at that tap and noise. The unknown is whitened, z = m + w Lᵀ, and so is the residual: first with the
covariance that it has at the start (so that every direction of y is of size one, and few products go far), then, stage
by stage, with the noise alone. A step is taken only where the objective of its stage falls.

The start has read y as well as the likelihood does, so the two are not independent. A gain for each direction of the
prior, measured on the same held-out images, says how much of the way from m to the solution is worth going.

Sources: Tarantola, Inverse Problem Theory (2005), ch. 3 (Gaussian priors, least squares, posterior covariance);
Nocedal & Wright, Numerical Optimization (2006), ch. 7.1, 10.3 (truncated Newton, Levenberg–Marquardt).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from backsight.data.images import batches
from backsight.errors import BacksightError
from backsight.exact.batched_systems import factored
from backsight.inverses.patches import patchify, unpatchify
from backsight.inverses.ridge import RidgeAccumulator
from backsight.representation import Queries, Representation, Tokens, concatenate
from backsight.targets.base import PIXELS, Target

__all__ = [
    "KINDS",
    "Gaussian",
    "Likelihood",
    "Linearised",
    "MapInverse",
    "MapSettings",
    "MapSolution",
    "Noise",
    "conjugate_gradients",
    "fit_map",
    "map_solve",
    "noisy",
    "pixel_forward",
    "posterior_samples",
]

Forward = Callable[[Tensor], Tensor]
FLOOR = 1e-6  # of a covariance's mean variance: directions that never move get this, not an infinite weight
LEAST_DAMPING, MOST_DAMPING = 1e-4, 1e4
GOOD, POOR = 0.7, 0.25  # gain ratios above which the damping falls, below which it rises (Nocedal & Wright, 4.1)
SHRINK = 0.3  # of a step that did not lower the objective
TRIALS = 4  # lengths of one step
LEAST_STAGE = 1e-6  # share of the start's residual covariance at which the search ends
SIDE = 8  # of the pixel patches of the prior, where the target's tokens cover larger ones
AROUND = 5  # pixels, side of the window that clues of an error are taken over
HELD_OUT = 5  # every fifth calibration image chooses the ridge strength
STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 3))
ROUND_OFF = 4.0  # times the machine's ε of the values' deviation: the noise that no representation is without


# The noise

Kind = Literal["float32", "float16", "bfloat16", "int8", "gaussian"]
KINDS: tuple[Kind, ...] = ("float32", "float16", "bfloat16", "int8", "gaussian")
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LEVELS = 127  # of int8, on either side of zero


@dataclass(frozen=True)
class Noise:
    """kind: how a representation is stored, or "gaussian"; sigma: of Gaussian noise, relative to the deviation of the
    values at that tap (ignored by the other kinds)."""

    kind: Kind
    sigma: float = 0.0

    @property
    def name(self) -> str:
        return f"gaussian {self.sigma:g}" if self.kind == "gaussian" else self.kind


def noisy(values: Tensor, noise: Noise, generator: torch.Generator | None = None, scale: float | None = None) -> Tensor:
    """values (B, n, c) as they come back from the store; of the type they had.

    int8: rounded to 127 steps of the largest absolute value of each sample. gaussian: white, of the deviation
    noise.sigma · scale (default scale: the values' own deviation).
    """
    if noise.kind in STORED:
        return values.to(STORED[noise.kind]).to(values.dtype)
    if noise.kind == "int8":
        step = values.flatten(1).abs().amax(1).clamp(min=1e-30)[:, None, None] / LEVELS
        return (values / step).round() * step
    if noise.kind != "gaussian" or noise.sigma < 0:
        raise BacksightError(f"Noise is one of {', '.join(KINDS)} with a sigma from 0, not {noise}.")
    size = noise.sigma * (float(values.std()) if scale is None else scale)
    drawn = torch.randn(values.shape, generator=generator, dtype=values.dtype, device=values.device)
    return values + size * drawn


# The problem


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian of tokens: z = mean + w factorᵀ, w standard normal. mean: (B, n, c); factor: (c, c)."""

    mean: Tensor
    factor: Tensor

    def at(self, w: Tensor) -> Tensor:
        """(B, n, c) of whitened (B, n, c)."""
        return self.mean + w @ self.factor.T


@dataclass(frozen=True)
class Likelihood:
    """How far y may lie from T(z): noise, and how far it does lie at the start.

    noise, spread: covariances (c, c) or one a token (n, c, c); spread None: the noise's shape does for the start.
    """

    noise: Tensor
    spread: Tensor | None = None

    def whitener(self, stage: float) -> Tensor:
        """(n | 1, c, c), V with V Vᵀ = (noise + stage · spread)⁻¹; residuals are whitened as r @ V."""
        noise = self.noise if self.noise.ndim == 3 else self.noise[None]
        covariance = noise
        if self.spread is not None and stage > 0:
            covariance = noise + stage * (self.spread if self.spread.ndim == 3 else self.spread[None])
        # All grid tokens share one: it is decomposed once.
        different, which = torch.unique_consecutive(covariance.double(), return_inverse=True, dim=0)
        values, vectors = torch.linalg.eigh(different)
        least = values.amax(-1, keepdim=True) * torch.finfo(torch.float64).eps
        return (vectors * torch.maximum(values, least).rsqrt()[..., None, :])[which].to(self.noise)


@dataclass(frozen=True)
class MapSettings:
    """How long the search goes on.

    stages: shares of the start's residual covariance that are added to the noise's, in order (the last is the objective
    that counts; 0: the noise alone), None: decades down to the noise (`stages_down_to`); steps: Gauss–Newton steps of a
    stage; products: pairs of products (J, Jᵀ) of one step; tolerance: relative residual at which its linear solve ends;
    damping: first λ; enough: relative fall of the objective below which a stage ends; least: noise that `fit_map` takes
    at least, relative to the values' deviation: with less, the products go where hardly anything is to be gained.
    """

    stages: tuple[float, ...] | None = None
    steps: int = 2
    products: int = 25
    tolerance: float = 1e-3
    damping: float = 1.0
    enough: float = 1e-3
    least: float = 1e-3


def stages_down_to(likelihood: Likelihood) -> tuple[float, ...]:
    """Decades of the spread from 1 to the noise, then 0; where the noise is below LEAST_STAGE of it, that is the end.

    With still less noise the objective is so ill conditioned that the products go nowhere, and nothing is gained.
    """
    if likelihood.spread is None:
        return (0.0,)
    noise, spread = (each.diagonal(dim1=-2, dim2=-1).mean().item() for each in (likelihood.noise, likelihood.spread))
    ratio = noise / max(spread, 1e-300)
    decades = [10.0**-power for power in range(1 - round(math.log10(LEAST_STAGE)))]
    above = tuple(stage for stage in decades if stage > ratio)
    return above if ratio < LEAST_STAGE else (*above, 0.0)


@dataclass(frozen=True)
class MapSolution:
    """What a search found, a sample each.

    w, z: (B, n, c), whitened and not; objective, at_start: (B,) ½|r̃|² + ½|w|² of the last stage, at the end and at
    w = 0; misfit: (B,) mean square of the whitened residual (1: as the noise says); history: (steps, B) objective
    behind every step, of its own stage; stage_of: (steps,) number of that stage; products: pairs of (J, Jᵀ); seconds of
    the batch.
    """

    w: Tensor
    z: Tensor
    objective: Tensor
    at_start: Tensor
    misfit: Tensor
    history: Tensor
    stage_of: Tensor
    products: int
    seconds: float = field(default=0.0, compare=False)


class Linearised:
    """A function of (B, n, c) and the products with its derivative at one point, from one retained graph.

    Products Jᵀv are backward passes; Ju is the derivative of Jᵀv by v, which is a backward pass as well: ten times
    faster on CPU than forward-mode differentiation, and no fused kernel stands in the way.
    """

    def __init__(self, function: Forward, at: Tensor) -> None:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self.at = at.detach().requires_grad_(True)
            self.out = function(self.at)
            self.weights = torch.zeros_like(self.out, requires_grad=True)
            (self.pulled,) = torch.autograd.grad(self.out, self.at, self.weights, create_graph=True)

    @property
    def value(self) -> Tensor:
        return self.out.detach()

    def product(self, direction: Tensor) -> Tensor:
        """J u, shaped as the function's value; u: (B, n, c)."""
        if not self.pulled.requires_grad:
            return torch.zeros_like(self.out)
        return torch.autograd.grad(self.pulled, self.weights, direction, retain_graph=True)[0]

    def transposed(self, direction: Tensor) -> Tensor:
        """Jᵀ v, (B, n, c)."""
        return torch.autograd.grad(self.out, self.at, direction, retain_graph=True)[0]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """(B,) summed in float64."""
    return (a * b).flatten(1).sum(1, dtype=torch.float64)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like)[(...,) + (None,) * (like.ndim - 1)]


def conjugate_gradients(
    operator: Forward, right: Tensor, products: int, tolerance: float = 1e-3, start: Tensor | None = None
) -> tuple[Tensor, int]:
    """x with operator(x) = right for a symmetric positive operator that acts on each sample alone, and the products.

    right: (B, …); every sample has step lengths of its own, and what has converged stands still.
    Source: Nocedal & Wright, algorithm 5.2.
    """
    x = torch.zeros_like(right) if start is None else start.clone()
    rest = right.clone() if start is None else right - operator(x)
    direction, square = rest.clone(), dot(rest, rest)
    goal, used = tolerance**2 * dot(right, right), int(start is not None)
    while used < products:
        live = square > goal
        if not bool(live.any()):
            break
        pushed = operator(direction)
        used += 1
        curvature = dot(direction, pushed)
        live &= curvature > 0
        length = _wide(torch.where(live, square / curvature.clamp(min=1e-300), 0.0), x)
        x, rest = x + length * direction, rest - length * pushed
        after = dot(rest, rest)
        direction = rest + _wide(torch.where(live, after / square.clamp(min=1e-300), 0.0), x) * direction
        square = torch.where(live, after, torch.zeros_like(after))
    return x, used


def map_solve(
    forward: Forward, y: Tensor, prior: Gaussian, likelihood: Likelihood, settings: MapSettings | None = None
) -> MapSolution:
    """The z of least ½|(T(z) − y) V|² + ½|w|², z = prior.at(w), found from w = 0.

    forward: T, (B, n, c) -> (B, m, d), acting on each sample alone; y: (B, m, d). A step is taken only where it lowers
    the objective, sample by sample. Raises BacksightError where y or T's value is not finite or of another shape.
    """
    settings = settings or MapSettings()
    stages = settings.stages or stages_down_to(likelihood)
    began = time.perf_counter()
    w = torch.zeros_like(prior.mean)
    damping = torch.full((len(y),), settings.damping, dtype=torch.float64, device=y.device)
    history, stage_of, used = [], [], 0
    for number, stage in enumerate(stages):
        whitened = _whitened(forward, y, prior, likelihood, stage)
        for _ in range(settings.steps):
            before, w, damping, after, products = _step(whitened, w, damping, settings)
            used += products
            history.append(after)
            stage_of.append(number)
            if bool((before - after <= settings.enough * before).all()):
                break
    with torch.no_grad():
        last = _whitened(forward, y, prior, likelihood, stages[-1])
        residual, first = last(w), last(torch.zeros_like(w))
        start = 0.5 * dot(first, first)
        objective = 0.5 * dot(residual, residual) + 0.5 * dot(w, w)
        # Earlier stages lower another objective: where they raised this one, there is nothing to be gained from them.
        worse = objective > start
        w = torch.where(_wide(worse, w).bool(), torch.zeros_like(w), w)
        square = torch.where(worse, 2 * start, dot(residual, residual))
        objective = torch.where(worse, start, objective)
    misfit = square / y[0].numel()
    seconds = time.perf_counter() - began
    record = torch.stack(history) if history else y.new_zeros(0, len(y), dtype=torch.float64)
    return MapSolution(
        w, prior.at(w), objective, start, misfit, record, torch.tensor(stage_of, dtype=torch.long), used, seconds
    )


def _whitened(forward: Forward, y: Tensor, prior: Gaussian, likelihood: Likelihood, stage: float) -> Forward:
    whitener = likelihood.whitener(stage)

    def function(w: Tensor) -> Tensor:
        made = forward(prior.at(w))
        if made.shape != y.shape:
            raise BacksightError(
                f"The pass makes values {tuple(made.shape)}, but y has {tuple(y.shape)}: give its own."
            )
        return torch.einsum("bnc,ncd->bnd", made - y, whitener.expand(y.shape[1], -1, -1))

    return function


def _step(
    function: Forward, w: Tensor, damping: Tensor, settings: MapSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """(objective before, w, damping, objective behind, products) of one Levenberg–Marquardt step of every sample."""
    here = Linearised(function, w)
    residual = here.value
    before = 0.5 * dot(residual, residual) + 0.5 * dot(w, w)
    if not bool(torch.isfinite(before).all()):
        raise BacksightError("The pass of the start is not finite: look at the representation and at the prior.")
    slope = here.transposed(residual) + w

    def damped(direction: Tensor) -> Tensor:
        return here.transposed(here.product(direction)) + _wide(1 + damping, direction) * direction

    move, used = conjugate_gradients(damped, -slope, settings.products, settings.tolerance)
    pushed = here.product(move)
    promised = -(dot(slope, move) + 0.5 * dot(pushed, pushed) + 0.5 * dot(move, move))
    best, after = w.clone(), before.clone()
    pending = torch.ones_like(before, dtype=torch.bool)
    length, ratio = torch.ones_like(before), torch.zeros_like(before)
    with torch.no_grad():
        for trial in range(TRIALS):
            candidate = w + _wide(length, w) * move
            made = function(candidate)
            there = 0.5 * dot(made, made) + 0.5 * dot(candidate, candidate)
            if trial == 0:
                ratio = (before - there) / promised.clamp(min=1e-300)
            taken = pending & (there < before)
            best = torch.where(_wide(taken, w).bool(), candidate, best)
            after = torch.where(taken, there, after)
            pending &= ~taken
            if not bool(pending.any()):
                break
            length = torch.where(pending, length * SHRINK, length)
    damping = torch.where(ratio > GOOD, damping / 4, torch.where(ratio < POOR, damping * 4, damping))
    return before, best, damping.clamp(LEAST_DAMPING, MOST_DAMPING), after, used


def posterior_samples(
    forward: Forward,
    y: Tensor,
    prior: Gaussian,
    likelihood: Likelihood,
    solution: MapSolution,
    count: int = 8,
    products: int = 25,
    stage: float | None = None,
    seed: int = 0,
) -> Tensor:
    """(count, B, n, c) draws of z − z_MAP from the Gaussian about the solution, covariance L (1 + J̃ᵀJ̃)⁻¹ Lᵀ.

    A draw solves (1 + J̃ᵀJ̃) d = w₀ + J̃ᵀe with white w₀, e (perturb and optimise). Its solve starts from w₀, so that what
    the products have not reached keeps the prior's own width. The whitened residual has to be about 1; where it is
    larger (the search did not end, or the model is not linear between) the noise is taken larger by that factor.
    Source: Tarantola, 3.2.3 (posterior covariance); Papandreou & Yuille, NIPS 2010 (perturb and optimise).
    """
    stage = stages_down_to(likelihood)[-1] if stage is None else stage
    function = _whitened(forward, y, prior, likelihood, stage)
    here = Linearised(function, solution.w)
    excess = (dot(here.value, here.value) / y[0].numel()).clamp(min=1.0)
    generator = torch.Generator(device=y.device).manual_seed(seed)

    def operator(direction: Tensor) -> Tensor:
        return here.transposed(here.product(direction)) / _wide(excess, direction) + direction

    drawn = []
    for _ in range(count):
        white = torch.randn(solution.w.shape, generator=generator, dtype=y.dtype, device=y.device)
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        right = here.transposed(noise) / _wide(excess.sqrt(), white) + white
        drawn.append(conjugate_gradients(operator, right, products, 1e-3, white)[0] @ prior.factor.T)
    return torch.stack(drawn)


# Of a target


def pixel_forward(target: Target, tap: str, patch: tuple[int, int], grid: tuple[int, int]) -> Forward:
    """T from patches (B, N, 3 p q) of pixels to the values (B, n, c) at `tap`: the model's own pass, differentiable.

    Unlike `target.record` it takes pixels outside [0, 1], where a search may go on its way.
    """
    (tap,) = target.resolve_taps([tap])

    def forward(patches: Tensor) -> Tensor:
        images = unpatchify(patches, grid, patch)
        with sdpa_kernel(SDPBackend.MATH):
            normalised = target.preprocessing.normalise(images)
            found = target._recorded(images, normalised, (tap,), None, torch.is_grad_enabled())[tap]
        return found.values

    return forward


@dataclass(frozen=True)
class Steadied:
    """A trained inverse for one noise level: a Wiener filter in front of it, a ridge map of its patches behind it.

    mean: (n | 1, c), wiener: (n | 1, c, c) of the representation; weight: (d, 3 p q), bias: (3 p q,) read its patches
    and, where the tokens lie on the patches' grid, the token as well.
    """

    base: Callable[[Representation], Tensor]
    patch: tuple[int, int]
    mean: Tensor
    wiener: Tensor
    weight: Tensor
    bias: Tensor

    def patches(self, representation: Representation) -> Tensor:
        """(B, N, 3 p q)."""
        return self.features(representation) @ self.weight + self.bias

    def features(self, representation: Representation) -> Tensor:
        """(B, N, d)."""
        values = representation.values
        size = values.shape[1]
        filtered = torch.einsum("bnc,ncd->bnd", values - self.mean, self.wiener.expand(size, -1, -1)) + self.mean
        images = self.base(representation.replace(filtered))
        patches = patchify(images, self.patch)
        if isinstance(representation, Tokens) and size - representation.prefix == patches.shape[1]:
            return torch.cat([patches, filtered[:, representation.prefix :]], dim=2)
        return patches


@dataclass(frozen=True)
class MapInverse:
    """inverse(representation) -> images (B, 3, H, W) in [0, 1], for one tap and one noise; `fit_map` makes it.

    factor: (3 p q, 3 p q) of the start's error; gain: (3 p q,) share of the way from the start to the solution that is
    worth going, for each direction (`basis`, columns) of that error; shares: (4,) of each clue in the error's variance.
    """

    target: Target
    source: str
    noise: Noise
    start: Steadied
    factor: Tensor
    basis: Tensor
    gain: Tensor
    likelihood: Likelihood
    settings: MapSettings
    shares: Tensor = field(default_factory=lambda: torch.tensor([0.0, 1.0, 0.0, 0.0]))
    batch_size: int = 8
    family = "map"
    destination = PIXELS

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.target.image_size
        return height // self.start.patch[0], width // self.start.patch[1]

    def solve(self, representation: Representation) -> tuple[Gaussian, MapSolution, Tensor]:
        """(prior, solution, patches (B, N, 3 p q) behind the gain) of a batch."""
        prior = Gaussian(self.start.patches(representation), self.factor)
        forward = pixel_forward(self.target, self.source, self.start.patch, self.grid)
        found = map_solve(forward, representation.values, prior, self.likelihood, self.settings)
        return prior, found, self.gained(prior.mean, found.z)

    def gained(self, start: Tensor, found: Tensor) -> Tensor:
        return start + ((found - start) @ self.basis * self.gain) @ self.basis.T

    def __call__(self, representation: Representation) -> Tensor:
        parts = [self.solve(part)[2] for part in _parts(representation, self.batch_size)]
        return unpatchify(torch.cat(parts), self.grid, self.start.patch).clamp(0, 1)

    def with_deviation(self, representation: Representation, samples: int = 2) -> tuple[Tensor, Tensor]:
        """(images (B, 3, H, W) in [0, 1], deviation (B, H, W): root mean square error expected of a pixel's channels).

        The draws about the solution are one of its clues; which of them count, and how much, was measured on held-out
        images (`clues`), so that what the linearisation does not see is in it as well.
        """
        images, maps = [], []
        for part in _parts(representation, self.batch_size):
            prior, found, patches = self.solve(part)
            images.append(unpatchify(patches, self.grid, self.start.patch).clamp(0, 1))
            maps.append(self.deviation(self.clues(part, prior, found, samples)))
        return torch.cat(images), torch.cat(maps)

    def deviation(self, clues: Tensor) -> Tensor:
        """(B, H, W) of clues (B, 4, H, W)."""
        return torch.einsum("bkhw,k->bhw", clues, self.shares.to(clues)).clamp(min=1e-12).sqrt()

    def clues(self, part: Representation, prior: Gaussian, found: MapSolution, samples: int = 2) -> Tensor:
        """(B, 4, H, W), each a variance: one; of draws about the solution; the way from the start, squared; the
        detail of the solution, squared. All but the first are means over the channels and the pixels around: a few
        draws are a rough measure of one pixel alone.
        """
        forward = pixel_forward(self.target, self.source, self.start.patch, self.grid)
        last = (self.settings.stages or stages_down_to(self.likelihood))[-1]
        drawn = posterior_samples(
            forward, part.values, prior, self.likelihood, found, samples, self.settings.products, last
        )
        way, solved, spread = (
            unpatchify(each, self.grid, self.start.patch)
            for each in (found.z - prior.mean, found.z, drawn.square().mean(0))
        )
        detail = solved - _around(solved, AROUND)
        squares = [_around(each.mean(1, keepdim=True), AROUND) for each in (spread, way.square(), detail.square())]
        return torch.cat([torch.ones_like(squares[0]), *squares], dim=1)


def _around(images: Tensor, size: int) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, size, 1, size // 2, count_include_pad=False)


def _parts(representation: Representation, size: int) -> list[Representation]:
    count = representation.batch
    return [
        representation.index(torch.arange(start, min(start + size, count), device=representation.values.device))
        for start in range(0, count, size)
    ]


def fit_map(
    target: Target,
    tap: str,
    base: Callable[[Representation], Tensor],
    images: Any,
    noise: Noise,
    settings: MapSettings | None = None,
    count: int = 128,
    checked: int = 8,
    seed: int = 0,
) -> MapInverse:
    """The maximum-a-posteriori inverse of one tap at one noise level, started from a trained inverse.

    base: representation at `tap` -> images in [0, 1] (modular, direct or linear); images: held-out ones (ImageSource or
    (N, 3, H, W)), which neither the base nor the model was trained on: the first `count` measure the start's error and
    its covariance, the last `checked` of them, solved in full, the gain and what the uncertainty is made of (0: a gain
    of 1, and the variance of the draws alone).
    """
    settings = settings or MapSettings()
    chosen = _first(images, count)
    if len(chosen) < HELD_OUT:
        raise BacksightError(f"A MAP inverse needs at least {HELD_OUT} held-out images, not {len(chosen)}.")
    recorded: list[Any] = [target.record(part, [tap])[tap] for part in chosen.split(64)]
    first = recorded[0]
    if not isinstance(first, Tokens | Queries) or getattr(first, "padding", None) is not None:
        raise BacksightError(f"A MAP inverse of {tap} reads unpadded tokens or queries, not {type(first).__name__}.")
    clean: Tokens | Queries = first if len(recorded) == 1 else concatenate(recorded)
    disturbed = clean.replace(noisy(clean.values, noise, torch.Generator().manual_seed(seed)))
    prefix = clean.prefix if isinstance(clean, Tokens) else 0
    # A pass in another order of operations is off by round-off: no noise is smaller.
    least = (max(settings.least, ROUND_OFF * torch.finfo(torch.float32).eps) * float(clean.values.std())) ** 2
    difference = disturbed.values - clean.values
    variance = _by_group(difference, prefix, _variances) + least * torch.eye(clean.values.shape[2])
    down, across = target.reduction
    height, width = target.image_size
    patch = (_divisor(height, down), _divisor(width, across))
    start = _fit_start(base, clean, disturbed, variance, chosen, prefix, patch)
    wanted = patchify(chosen, patch)
    made = torch.cat([start.patches(part) for part in _parts(disturbed, 32)])
    covariance = _covariance((wanted - made).flatten(0, 1))
    eigenvalues, basis = torch.linalg.eigh(covariance)
    factor = (basis * eigenvalues.clamp(min=float(eigenvalues.mean()) * FLOOR).sqrt()).to(wanted)
    forward = pixel_forward(target, tap, patch, (height // patch[0], width // patch[1]))
    with torch.no_grad():
        passed = torch.cat([forward(part) for part in made.split(32)])
    spread = _by_group(passed - clean.values, prefix, _covariance)
    likelihood = Likelihood(variance.to(wanted), spread.to(wanted))
    gain = torch.ones(len(basis), dtype=wanted.dtype)
    inverse = MapInverse(target, tap, noise, start, factor, basis.to(wanted), gain, likelihood, settings)
    return _checked(inverse, wanted, disturbed, checked) if checked else inverse


def _first(images: Any, count: int) -> Tensor:
    parts: list[Tensor] = []
    for part in batches(images, 64):
        parts.append(part)
        if sum(map(len, parts)) >= count:
            break
    return torch.cat(parts)[:count] if parts else torch.zeros(0)


def _divisor(side: int, covered: int) -> int:
    """Patch side of the prior: what a token covers, or SIDE where that is large."""
    return covered if covered <= SIDE and side % covered == 0 else SIDE if side % SIDE == 0 else covered


def _fit_start(
    base: Callable[[Representation], Tensor],
    clean: Any,
    disturbed: Any,
    variance: Tensor,
    images: Tensor,
    prefix: int,
    patch: tuple[int, int],
) -> Steadied:
    means = _by_group(clean.values, prefix, lambda values: values.mean(0))
    signal = _by_group(clean.values, prefix, _covariance)
    wiener = torch.linalg.lu_solve(*factored(signal + variance), signal).to(clean.values)
    channels = 3 * patch[0] * patch[1]
    begun = Steadied(base, patch, means.to(clean.values), wiener, torch.eye(channels), torch.zeros(channels))
    features = torch.cat([begun.features(part) for part in _parts(disturbed, 32)])
    weight, bias = _ridge(features, patchify(images, patch))
    return replace(begun, weight=weight, bias=bias)


def _ridge(features: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    held_out = torch.arange(len(features)) % HELD_OUT == 0
    training, validation, every = RidgeAccumulator(), RidgeAccumulator(), RidgeAccumulator()
    training.update(features[~held_out].flatten(0, 1), wanted[~held_out].flatten(0, 1))
    validation.update(features[held_out].flatten(0, 1), wanted[held_out].flatten(0, 1))
    every.update(features.flatten(0, 1), wanted.flatten(0, 1))
    errors = training.path().errors(validation, STRENGTHS)
    weight, bias = every.solve(min(zip(errors, STRENGTHS, strict=True))[1])
    return weight.to(features), bias.to(features)


def _covariance(rows: Tensor) -> Tensor:
    """(c, c) about zero, in float64, with a floor on directions that never move."""
    rows = rows.double()
    found = rows.T @ rows / max(1, len(rows))
    return found + FLOOR * found.diagonal().mean() * torch.eye(len(found), dtype=found.dtype)


def _variances(rows: Tensor) -> Tensor:
    return rows.double().square().mean(0).diag()


def _by_group(values: Tensor, prefix: int, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """(n, …): each prefix token measured apart, all others together."""
    if not prefix:
        return measure(values.flatten(0, 1))[None]
    heads = [measure(values[:, number]) for number in range(prefix)]
    rest = measure(values[:, prefix:].flatten(0, 1))
    return torch.stack(heads + [rest] * (values.shape[1] - prefix))


def _checked(inverse: MapInverse, wanted: Tensor, disturbed: Any, count: int) -> MapInverse:
    """The inverse with its gain and the shares of its clues, measured on the last `count` images."""
    which = torch.arange(len(wanted) - min(count, len(wanted)), len(wanted))
    starts, found, clues = [], [], []
    for each in _parts(disturbed.index(which), inverse.batch_size):
        prior, solution, _ = inverse.solve(each)
        starts.append(prior.mean)
        found.append(solution.z)
        clues.append(inverse.clues(each, prior, solution))
    start, solved, truth = torch.cat(starts), torch.cat(found), wanted[which]
    way, there = ((each - start) @ inverse.basis for each in (solved, truth))
    inverse = replace(inverse, gain=_gains(way.flatten(0, 1), there.flatten(0, 1)).to(wanted))
    made = unpatchify(inverse.gained(start, solved), inverse.grid, inverse.start.patch).clamp(0, 1)
    error = (made - unpatchify(truth, inverse.grid, inverse.start.patch)).square().mean(1)
    return replace(inverse, shares=variance_shares(torch.cat(clues), error))


def variance_shares(clues: Tensor, square: Tensor, rounds: int = 8) -> Tensor:
    """(k,) shares, none below 0, with Σ shares · clues (B, k, H, W) the variance of errors whose squares are (B, H, W).

    Every pixel counts in proportion to its own variance, as in a gamma regression with an identity link, fitted by
    reweighted non-negative least squares. Source: McCullagh & Nelder, Generalized Linear Models (1989), ch. 8.
    """
    rows, goal = clues.movedim(1, -1).flatten(0, -2).double(), square.flatten().double()
    size = rows.mean(0).clamp(min=1e-300)
    rows = rows / size
    variance = goal.mean().expand_as(goal)
    found = rows.new_zeros(rows.shape[1])
    for _ in range(rounds):
        weighted = rows / variance[:, None]
        # The small triangle has the same minimum as the tall matrix.
        q, triangle = torch.linalg.qr(weighted)
        solved, _misfit = nnls(triangle.numpy(), (q.T @ (goal / variance)).numpy())
        found = torch.from_numpy(solved)
        variance = (rows @ found).clamp(min=1e-3 * float(goal.mean()))
    return found / size


def _gains(way: Tensor, there: Tensor, groups: int = 16) -> Tensor:
    """(c,) least-squares shares of `way` (rows, c) towards `there`, in [0, 1], shared by neighbouring directions."""
    together = (way.double() * there.double()).sum(0)
    square = way.double().square().sum(0)
    parts = [
        (top.sum() / bottom.sum().clamp(min=1e-300)).clamp(0, 1).expand(len(top))
        for top, bottom in zip(together.chunk(groups), square.chunk(groups), strict=True)
    ]
    return torch.cat(parts)
