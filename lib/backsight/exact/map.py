"""The most probable picture behind a noisy representation: the model's own pass, a prior, and a noise level.

    y ──► trained inverse, steadied ──► start m(y) ──► Gauss–Newton on   |T(z) − y|² / noise  +  |z − m|² / error of m
          (Wiener in front, ridge behind)              └ conjugate gradients on products JᵀJ, one retained graph ┘

T is the target itself up to the tap; the prior is the Gaussian of the start's own error, measured on held-out images.

Sources: Tarantola, Inverse Problem Theory (2005), ch. 3; Nocedal & Wright, Numerical Optimization (2006), 7.1, 10.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from backsight.data.images import ImageSource, batches
from backsight.errors import BacksightError
from backsight.exact.inverse import completed, parts_of, tell_left_out
from backsight.exact.solver import Linearised, conjugate_gradients, dot, factored, line_search
from backsight.exact.starts import HELD_OUT, Numbers, affine, by_group, covariance, groups, ridge
from backsight.inverses.module import InverseHeader, Inverses, described, header_for, rebuilt
from backsight.inverses.rows import patchify, unpatchify
from backsight.representation import Queries, Representation, Tokens, concatenate
from backsight.targets.base import PIXELS, Target

Base = Callable[[Representation], Tensor]
Forward = Callable[[Tensor], Tensor]
LEAST_DAMPING, MOST_DAMPING = 1e-4, 1e4
GOOD, POOR = 0.7, 0.25  # gain ratios above which the damping falls, below which it rises (Nocedal & Wright, 4.1)
LEAST_STAGE = 1e-6  # share of the start's residual covariance at which the search ends
SHORTEST = 0.06  # length of a step below which a search gives up
FLOOR = 1e-6  # of a covariance's mean variance: directions that never move get this, not an infinite weight
SIDE = 8  # of the pixel patches of the prior, where the target's tokens cover larger ones
STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 3))
SMALL = 64 * 64  # pixels of a picture; of larger ones, which have more patches, fewer are measured and solved
GAINS = 16  # groups of neighbouring directions that share a gain


@dataclass(frozen=True)
class MapSettings:
    """How long the search goes on.

    stages: shares of the start's residual covariance that are added to the noise's, in order (the last is what counts;
    0: the noise alone), None: decades from `first` down to the noise; steps: Gauss–Newton steps of a stage; products:
    pairs (J, Jᵀ) of one step; tolerance: relative residual of its linear solve; damping: first λ; enough: relative fall
    of the objective below which a stage ends; least: noise that is taken at least, in deviations of the values.
    """

    stages: Sequence[float] | None = None
    first: float = 1.0
    steps: int = 2
    products: int = 25
    tolerance: float = 1e-3
    damping: float = 1.0
    enough: float = 1e-3
    least: float = 1e-3


LARGE = MapSettings(first=1e-2, steps=1, damping=1e-2)  # a third of the products, see benchmarks/real.py


class MapSolution(NamedTuple):
    """What a search found: w, z (B, n, c), whitened and not; the last stage."""

    w: Tensor
    z: Tensor
    stage: float


@dataclass(frozen=True)
class Posterior:
    """What y = T(z) + noise and a Gaussian say of z: ½ |(T(z) − y) V|² + ½ |w|², V the whitener, z = mean + w factorᵀ.

    forward: T, (B, n, c) -> (B, m, d), acting on each sample alone; y: (B, m, d); mean (B, n, c), factor (c, c): of the
    prior; noise, spread: (P + 1, d, d) covariances of the noise, and of what T(mean) is off beside it.
    """

    forward: Forward
    y: Tensor
    mean: Tensor
    factor: Tensor
    noise: Tensor
    spread: Tensor

    def at(self, w: Tensor, which: Tensor | slice = slice(None)) -> Tensor:
        """z (K, n, c) of whitened w."""
        return self.mean[which] + w @ self.factor.T

    def stages(self) -> tuple[float, ...]:
        """Decades of the spread from 1 to the noise, then 0; at least LEAST_STAGE: below, products go nowhere."""
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
        """The z of the least objective at the last stage, by Levenberg–Marquardt from w = 0, each sample on its own.

        First V is of the residual's covariance at the start, so that few products go far, then, stage by stage, of the
        noise alone. Raises BacksightError where the pass of the start is not finite.
        """
        settings, w = settings or MapSettings(), torch.zeros_like(self.mean)
        damping = torch.full((len(w),), settings.damping, dtype=torch.float64, device=w.device)
        for stage in settings.stages or [stage for stage in self.stages() if stage <= settings.first]:
            residual = self.residual(stage)

            def objective(w: Tensor, which: Tensor | slice = slice(None), residual: Any = residual) -> Tensor:
                with torch.no_grad():
                    away = residual(w, which)
                    return 0.5 * dot(away, away) + 0.5 * dot(w, w)

            for _ in range(settings.steps):
                move, before, promised = _step(residual, w, damping, settings)
                w, after = line_search(objective, w, move, before, shortest=SHORTEST, armijo=0.0)
                ratio = (before - after) / promised.clamp(min=1e-300)
                damping = torch.where(ratio > GOOD, damping / 4, torch.where(ratio < POOR, damping * 4, damping))
                damping = damping.clamp(LEAST_DAMPING, MOST_DAMPING)
                if bool((before - after <= settings.enough * before).all()):
                    break
        # Earlier stages lower another objective: where they raised this one, there is nothing to be gained from them.
        raised = objective(w) > objective(torch.zeros_like(w))
        w = torch.where(raised[:, None, None], torch.zeros_like(w), w)
        return MapSolution(w, self.at(w), stage)


def _step(residual: Forward, w: Tensor, damping: Tensor, settings: MapSettings) -> tuple[Tensor, Tensor, Tensor]:
    """(move, objective before, promised fall) of one Levenberg–Marquardt step of every sample."""
    here = Linearised(residual, w)
    before = 0.5 * dot(here.value, here.value) + 0.5 * dot(w, w)
    if not bool(torch.isfinite(before).all()):
        raise BacksightError("The pass of the start is not finite: look at the representation and at the prior.")
    slope, weight = here.transposed(here.value) + w, (1 + damping).to(w)[:, None, None]
    move = conjugate_gradients(
        lambda direction: here.transposed(here.product(direction)) + weight * direction,
        -slope,
        settings.products,
        settings.tolerance,
    )
    pushed = here.product(move)
    return move, before, -(dot(slope, move) + 0.5 * dot(pushed, pushed) + 0.5 * dot(move, move))


def pixel_forward(target: Target, tap: str, patch: tuple[int, int], grid: tuple[int, int]) -> Forward:
    """T from patches (B, N, 3 p q), also outside [0, 1], to values (B, n, c): the model's own pass, differentiable."""
    (tap,) = target.resolve_taps([tap])

    def forward(patches: Tensor) -> Tensor:
        images = unpatchify(patches, grid, patch)
        with sdpa_kernel(SDPBackend.MATH):
            normalised = target.preprocessing.normalise(images)
            return target._recorded(images, normalised, (tap,), None, torch.is_grad_enabled())[tap].values

    return forward


class MapInverse(Numbers):
    """inverse(representation) -> images (B, 3, H, W) in [0, 1], for one tap and one noise; `fit_map` makes it.

    The start m(y) is `base` behind a Wiener filter, and a ridge map of its patches and, where the tokens lie on their
    grid, of the token: mean (P + 1, c), wiener (P + 1, c, c); weight (1, d + 1, 3 p q). noise, spread: (P + 1, c, c)
    covariances of the representation; factor: (3 p q, 3 p q) of the start's error; gain: (3 p q,) share of the way from
    the start to the solution that is worth going, for each direction (`basis`, columns) of that error: the start has
    read y as well as the likelihood does, so that the two are not independent.
    """

    kind = family = "map"
    destination = PIXELS
    batch_size = 8
    header: InverseHeader | None = None

    def __init__(self, target: Target, tap: str, base: Base, patch: tuple[int, int], settings: MapSettings) -> None:
        super().__init__()
        self.target, self.source, self.base, self.patch, self.settings = target, tap, base, patch, settings
        height, width = target.image_size
        self.grid = height // patch[0], width // patch[1]
        self.pass_to_tap = pixel_forward(target, tap, patch, self.grid)

    def features(self, representation: Representation) -> Tensor:
        """(B, N, d) that the start is read from."""
        values = representation.values
        mean = torch.cat([self.mean[:-1], self.mean[-1:].expand(values.shape[1] - len(self.mean) + 1, -1)])
        filtered = by_group(values - mean, self.wiener) + mean
        patches = patchify(self.base(representation.replace(filtered)), self.patch)
        if isinstance(representation, Tokens) and values.shape[1] - representation.prefix == patches.shape[1]:
            return torch.cat([patches, filtered[:, representation.prefix :]], dim=2)
        return patches

    def start(self, representation: Representation) -> Tensor:
        return affine(self.features(representation), self.weight)

    def pictures(self, patches: Tensor) -> Tensor:
        return unpatchify(patches, self.grid, self.patch)

    def solve(self, representation: Representation) -> tuple[Posterior, MapSolution, Tensor]:
        """(posterior, its solution, patches (B, N, 3 p q) behind the gain) of a batch."""
        numbers = self.start(representation), self.factor, self.noise, self.spread
        posterior = Posterior(self.pass_to_tap, representation.values, *numbers)
        solution = posterior.most_probable(self.settings)
        return posterior, solution, self.gained(posterior.mean, solution.z)

    def gained(self, start: Tensor, solution: Tensor) -> Tensor:
        return start + ((solution - start) @ self.basis * self.gain) @ self.basis.T

    def forward(self, representation: Representation) -> Tensor:
        patches = torch.cat([self.solve(part)[2] for part in parts_of(representation, self.batch_size)])
        return self.pictures(patches).clamp(0, 1)

    def configuration(self) -> dict[str, Any]:
        """All but the numbers, for a file. Raises TypeError where the base is no module that a file can hold."""
        if not isinstance(self.base, nn.Module):
            raise TypeError(f"a file holds a MAP inverse whose base is a module, not {type(self.base).__name__}")
        base, settings = described(self.base), asdict(self.settings)
        return {"tap": self.source, "patch": self.patch, "settings": settings, "base": base}

    @classmethod
    def build(cls, configuration: Mapping[str, Any], target: Target) -> Self:
        """An inverse without numbers."""
        tap, patch, settings, base = (configuration[name] for name in ("tap", "patch", "settings", "base"))
        return cls(target, tap, rebuilt(base, target), tuple(patch), MapSettings(**settings))


def fit_map(
    target: Target,
    images: ImageSource | Tensor,
    validation: ImageSource | Tensor | None = None,
    *,
    taps: Sequence[str] | str | None = None,
    seed: int = 0,
    progress: bool = True,
    modules: Inverses | None = None,
    linear: Inverses | None = None,
) -> Inverses:
    """The MAP inverse of every tap, for what float32 keeps; taps that cannot be read are left out with a warning.

    validation: images that nothing was fitted on; modules: trained inverses to start from, else linear ones, which are
    fitted on `images` where missing. Behind all blocks of a large model (`blocks.11` of dinov2-small) the search stays
    near its start: no linear model of the pass holds as far as the truth.
    Raises BacksightError without validation, and where no tap can be read.
    """
    if validation is None:
        raise BacksightError(
            "A MAP inverse is measured on held-out images: give `validation`, images that nothing was fitted on."
        )
    names = target.taps if taps is None else target.resolve_taps(taps)
    recorded = target.record(next(batches(validation, 1)), names)
    refused = {tap: reason for tap in names if (reason := _refusal(tap, recorded[tap]))}
    tell_left_out("map", target, refused, len(refused) < len(names))
    kept = [tap for tap in names if tap not in refused]
    given = {**(linear or {}), **(modules or {})}
    bases = completed(given, kept, target, images, validation, seed=seed, progress=progress)
    inverses, share = {}, max(1, target.image_size[0] * target.image_size[1] // SMALL)
    settings, effort = LARGE if share > 1 else None, (max(32, 128 // share), max(2, 8 // share))
    for tap in tqdm(kept, desc="MAP inverses", leave=False, disable=not progress):
        inverses[tap] = fit_map_tap(target, tap, bases[tap], validation, None, settings, *effort)
        inverses[tap].header = header_for(target, "map", tap, PIXELS, images, seed)
    return Inverses(inverses)


def _refusal(tap: str, representation: Representation) -> str:
    """Why a MAP inverse cannot read this; "" where it can."""
    if isinstance(representation, Queries) or (isinstance(representation, Tokens) and representation.padding is None):
        return ""
    return f"A MAP inverse reads queries or unpadded tokens, and {tap} holds other {type(representation).__name__}."


def fit_map_tap(
    target: Target,
    tap: str,
    base: Base,
    images: ImageSource | Tensor,
    noise: Callable[[Tensor], Tensor] | None = None,
    settings: MapSettings | None = None,
    count: int = 128,
    checked: int = 8,
) -> MapInverse:
    """The maximum-a-posteriori inverse of one tap at one noise level, started from a trained inverse.

    base: representation at `tap` -> images in [0, 1]; images: held-out ones, which neither the base nor the model was
    trained on: the first `count` measure the start's error and its covariance, the last `checked` of them, solved in
    full, the gain (0: a gain of 1); noise: what it does to values (B, n, c), None: only round-off.
    """
    settings, pictures = settings or MapSettings(), next(batches(images, count)).to(target.device)
    if len(pictures) < HELD_OUT:
        raise BacksightError(f"A MAP inverse needs at least {HELD_OUT} held-out images, not {len(pictures)}.")
    clean: Any = concatenate([target.record(part, [tap])[tap] for part in pictures.split(64)])
    if reason := _refusal(tap, clean):
        raise BacksightError(reason)
    sizes = zip(target.image_size, target.reduction, strict=True)
    down, across = (token if side % SIDE or (token <= SIDE and side % token == 0) else SIDE for side, token in sizes)
    disturbed = clean if noise is None else clean.replace(noise(clean.values))
    prefix = clean.prefix if isinstance(clean, Tokens) else 0

    def covariances(values: Tensor) -> Tensor:
        """(P + 1, c, c) about zero of (B, n, c), in float64."""
        return torch.stack([covariance(rows, FLOOR) for rows in groups(values, prefix)])

    least = (settings.least * float(clean.values.std())) ** 2
    squares = [rows.double().square().mean(0) for rows in groups(disturbed.values - clean.values, prefix)]
    variance, signal = torch.stack(squares).add(least).diag_embed(), covariances(clean.values)
    inverse = MapInverse(target, tap, base, (down, across), settings)
    inverse.put(
        mean=torch.stack([rows.mean(0) for rows in groups(clean.values, prefix)]),
        wiener=torch.linalg.lu_solve(*factored(signal + variance), signal).to(clean.values),
        noise=variance.to(clean.values),
    )
    truth = patchify(pictures, inverse.patch)
    with torch.no_grad():
        features = torch.cat([inverse.features(part) for part in parts_of(disturbed, 32)])
        fit = zip(features.split(32), truth.split(32), strict=True)
        inverse.put(weight=ridge(fit, 0, STRENGTHS, all_rows=True).to(clean.values))
        begin = affine(features, inverse.weight)
        passed = torch.cat([inverse.pass_to_tap(part) for part in begin.split(32)])
    eigenvalues, basis = torch.linalg.eigh(covariance((truth - begin).flatten(0, 1), FLOOR))
    factor = basis * eigenvalues.clamp(min=float(eigenvalues.mean()) * FLOOR).sqrt()
    numbers = {"basis": basis, "factor": factor, "spread": covariances(passed - clean.values)}
    inverse.put(gain=torch.ones_like(begin[0, 0]), **{name: part.to(begin) for name, part in numbers.items()})
    way, there = [], []
    last = torch.arange(len(truth) - min(checked, len(truth)), len(truth), device=truth.device)
    for which in last.split(inverse.batch_size) if checked else ():
        posterior, solution, _ = inverse.solve(disturbed.index(which))
        way.append((solution.z - posterior.mean) @ inverse.basis)
        there.append((truth[which] - posterior.mean) @ inverse.basis)
    if way:
        inverse.put(gain=_gains(torch.cat(way).flatten(0, 1), torch.cat(there).flatten(0, 1)).to(begin))
    return inverse


def _gains(way: Tensor, there: Tensor) -> Tensor:
    """(c,) least-squares shares of `way` (rows, c) towards `there`, in [0, 1], shared by neighbouring directions."""
    pairs = zip(way.double().chunk(GAINS, 1), there.double().chunk(GAINS, 1), strict=True)
    shares = [((a * b).sum() / a.square().sum().clamp(min=1e-300)).clamp(0, 1).expand(a.shape[1]) for a, b in pairs]
    return torch.cat(shares)
