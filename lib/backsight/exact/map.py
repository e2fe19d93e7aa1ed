"""The most probable picture behind a noisy representation: the model's own pass, a prior, and a noise level.

    y ──► trained inverse, steadied ──► start m(y) ──► Gauss–Newton on   |T(z) − y|² / noise  +  |z − m|² / error of m
          (Wiener in front, ridge behind)              └ conjugate gradients on products JᵀJ, one retained graph ┘

T is the target itself up to the tap; the prior is the Gaussian of the start's own error, measured on held-out images.
Behind many blocks of a large model that search does not come far: there the representation is led back one half-step
y = x + f(x) at a time, each with a linear prior of x given y, and y as uncertain as its own error on held-out images.

Sources: Tarantola, Inverse Problem Theory (2005), ch. 3; Nocedal & Wright, Numerical Optimization (2006), 7.1, 10.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from backsight.data.images import ImageSource, batches
from backsight.errors import BacksightError
from backsight.exact.inverse import completed, parts_of, tell_left_out
from backsight.exact.solver import Linearised, conjugate_gradients, dot, factored, line_search
from backsight.exact.starts import HELD_OUT, Half, Numbers, affine, by_group, covariance, groups, ridge
from backsight.exact.steps import Step, walk
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
FURTHER = 128  # images that linear maps of half-steps are fitted on, beside the held-out ones
DEEP = 8  # half-steps that the whole search crosses; behind more, one is solved after the other


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


LARGE: dict[str, Any] = {"first": 1e-2, "steps": 1, "damping": 1e-2}  # a third of the products, see benchmarks/real.py
TOKENS = MapSettings(stages=(0.0,), steps=3, products=40, tolerance=0.03, damping=1e-2, enough=0.03)  # of a half-step
TOGETHER = replace(TOKENS, products=100, tolerance=0.01)  # of tokens that see one another


class MapSolution(NamedTuple):
    """What a search found: w, z (B, n, c), whitened and not; the last stage."""

    w: Tensor
    z: Tensor
    stage: float


@dataclass(frozen=True)
class Posterior:
    """What y = T(z) + noise and a Gaussian say of z: ½ |(T(z) − y) V|² + ½ |w|², V the whitener, z = mean + w factorᵀ.

    forward: T, (B, n, c) -> (B, m, d), acting on each sample alone; y: (B, m, d); mean (B, n, c), factor (P + 1, c, c):
    of the prior; noise, spread: (P + 1, d, d) covariances of the noise, and of what T(mean) is off beside it.
    """

    forward: Forward
    y: Tensor
    mean: Tensor
    factor: Tensor
    noise: Tensor
    spread: Tensor

    def at(self, w: Tensor, which: Tensor | slice = slice(None)) -> Tensor:
        """z (K, n, c) of whitened w."""
        return self.mean[which] + by_group(w, self.factor.mT)

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
    read y as well as the likelihood does, so that the two are not independent. halves: from a deep tap of a large
    picture back to a middle one, each with factor and noise (P + 1, c, c) beside its guess; middle: from there on.
    """

    kind = family = "map"
    destination = PIXELS
    batch_size = 8
    header: InverseHeader | None = None

    def __init__(
        self,
        target: Target,
        tap: str,
        base: Base,
        patch: tuple[int, int],
        settings: MapSettings,
        way: Sequence[Step] = (),
    ) -> None:
        super().__init__()
        self.target, self.source, self.base, self.patch, self.settings = target, tap, base, patch, settings
        height, width = target.image_size
        self.grid = height // patch[0], width // patch[1]
        self.pass_to_tap = pixel_forward(target, tap, patch, self.grid)
        self.halves: Any = nn.ModuleList(map(Half, way[::-1]))
        self.middle: MapInverse | None = None

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

    def solve(
        self, representation: Representation, led_back: Tensor | None = None
    ) -> tuple[Posterior, MapSolution, Tensor, Tensor]:
        """(posterior, its solution, patches (B, N, 3 p q) behind the gain, those of the start) of a batch.

        led_back: (B, n, c) what its half-steps give at the middle tap, where that is known; both first are of that tap.
        """
        start = self.start(representation)
        if self.middle is None:
            numbers = start, self.factor[None], self.noise, self.spread
            posterior = Posterior(self.pass_to_tap, representation.values, *numbers)
            solution = posterior.most_probable(self.settings)
            return posterior, solution, self.gained(start, solution.z), start
        if led_back is None:
            led_back = representation.values
            for half in self.halves:
                led_back = one_back(half, led_back)
        posterior, solution, patches, _ = self.middle.solve(representation.replace(led_back))
        return posterior, solution, self.gained(start, patches), start

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
        middle = None if self.middle is None else self.middle.configuration()
        return {"tap": self.source, "patch": self.patch, "settings": settings, "base": base, "middle": middle}

    @classmethod
    def build(cls, configuration: Mapping[str, Any], target: Target) -> Self:
        """An inverse without numbers."""
        tap, patch, base, middle = (configuration[name] for name in ("tap", "patch", "base", "middle"))
        rest = (
            tuple(patch),
            MapSettings(**configuration["settings"]),
            way_back(target, tap, [middle["tap"]]) if middle else (),
        )
        inverse = cls(target, tap, rebuilt(base, target), *rest)
        inverse.middle = None if middle is None else cls.build(middle, target)
        return inverse

    def measure(self, pictures: Tensor, clean: Any, disturbed: Any, variance: Tensor) -> None:
        """All numbers but the gain, from held-out images; variance: (P + 1, c, c) of the noise."""
        prefix = len(variance) - 1

        def covariances(values: Tensor) -> Tensor:
            """(P + 1, c, c) about zero of (B, n, c), in float64."""
            return torch.stack([covariance(rows, FLOOR) for rows in groups(values, prefix)])

        signal = covariances(clean.values)
        self.put(
            mean=torch.stack([rows.mean(0) for rows in groups(clean.values, prefix)]),
            wiener=torch.linalg.lu_solve(*factored(signal + variance), signal).to(clean.values),
            noise=variance.to(clean.values),
        )
        truth = patchify(pictures, self.patch)
        with torch.no_grad():
            features = torch.cat([self.features(part) for part in parts_of(disturbed, 32)])
            fit = zip(features.split(32), truth.split(32), strict=True)
            self.put(weight=ridge(fit, 0, STRENGTHS, all_rows=True).to(clean.values))
            begin = affine(features, self.weight)
            passed = torch.cat([self.pass_to_tap(part) for part in begin.split(32)])
        eigenvalues, basis = torch.linalg.eigh(covariance((truth - begin).flatten(0, 1), FLOOR))
        factor = basis * eigenvalues.clamp(min=float(eigenvalues.mean()) * FLOOR).sqrt()
        numbers = {"basis": basis, "factor": factor, "spread": covariances(passed - clean.values)}
        self.put(gain=torch.ones_like(begin[0, 0]), **{name: part.to(begin) for name, part in numbers.items()})


def fit_way(
    halves: Sequence[Half], streams: Sequence[Tensor], y: Tensor, noise: Tensor, least: float
) -> tuple[Tensor, Tensor]:
    """Fits half-steps, from the last on, on streams (B, n, c); solves the y (K, n, c) of the last images by them.

    noise: (P + 1, c, c) of y; least: error that is taken at least, in deviations of a stream. Returns what the last
    images have before the first half-step, and the covariances of its error.
    """
    prefix, rest = len(noise) - 1, slice(len(streams[0]) - len(y))

    def covariances(errors: Tensor, least: Tensor | float) -> Tensor:
        """(P + 1, c, c) of few rows, shrunk (Ledoit & Wolf, 2004)."""
        from sklearn.covariance import ledoit_wolf  # its import draws random numbers

        rows = [ledoit_wolf(part.double().numpy(), assume_centered=True)[0] for part in groups(errors.cpu(), prefix)]
        return torch.from_numpy(np.stack(rows)).to(errors.device) + least**2 * torch.eye(errors.shape[2]).to(errors)

    for half, x, after in zip(halves, streams[-2::-1], streams[::-1], strict=False):
        known = (after + draws(noise, after.shape))[rest]
        guesses = half.fit_guesses(x[rest], known, prefix, 1, all_rows=True)
        half.put(noise=noise.to(y), factor=roots(covariances(guesses - x[rest], 0.0)).to(y))
        y = torch.cat([one_back(half, part) for part in y.split(MapInverse.batch_size)])
        noise = covariances(y - x[-len(y) :], least * x.std())
    return y, noise


def roots(covariances: Tensor) -> Tensor:
    """(P + 1, c, c) F with F Fᵀ = the covariances."""
    values, vectors = torch.linalg.eigh(covariances)
    return vectors * values.clamp(min=0).sqrt()[:, None]


def draws(covariances: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, n, c) of the Gaussians about zero, float32; always the same."""
    white = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(covariances.device)
    return by_group(white, roots(covariances).float().mT)


def one_back(half: Half, y: Tensor) -> Tensor:
    """(B, n, c): the most probable stream before a half-step, given that behind it; tokenwise: of each token alone."""
    mean, single = half.guesses(y)[0], half.step.tokenwise
    sides = [[rows[:, None] for rows in groups(side, len(half.noise) - 1)] if single else [side] for side in (y, mean)]
    sides += [list(side.split(1) if single else [side]) for side in (half.factor, half.noise)]
    found = [
        Posterior(half.step, part, guess, factor, noise, noise).most_probable(TOKENS if single else TOGETHER).z
        for part, guess, factor, noise in zip(*sides, strict=True)
    ]
    return torch.cat([part.reshape(len(y), -1, y.shape[2]) for part in found], dim=1)


def way_back(target: Target, tap: str, known: Iterable[str]) -> tuple[Step, ...]:
    """The half-steps, in forward order, to a deep tap of large pictures from the last `known` one searched from pixels.

    () where the tap itself is searched from pixels: of small pictures, and where other layers lie between.
    """
    if target.image_size[0] * target.image_size[1] <= SMALL:
        return ()
    model = walk(target, False)
    near = sorted((name for name in known if model.taps.get(name, DEEP + 1) <= DEEP), key=model.taps.__getitem__)
    if not near or model.taps.get(tap, 0) <= DEEP or model.gap(tap, near[-1]):
        return ()
    steps = model.between(tap, near[-1])
    return () if any(step.norm is not None for step in steps) else steps


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
    fitted on `images` where missing.
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
    needed = kept + [way[0].source for tap in kept if (way := way_back(target, tap, target.tap_set("blocks")))]
    bases = completed(given, needed, target, images, validation, seed=seed, progress=progress)
    inverses, share = {}, max(1, target.image_size[0] * target.image_size[1] // SMALL)
    held_out, checked = next(batches(validation, max(32, 128 // share))), max(6, 8 // share)
    for tap in tqdm(kept, desc="MAP inverses", leave=False, disable=not progress):
        inverses[tap] = fit_map_tap(target, tap, bases, held_out, checked=checked, further=images)
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
    bases: Mapping[str, Base],
    held_out: Tensor,
    noise: Callable[[Tensor], Tensor] | None = None,
    settings: MapSettings | None = None,
    checked: int = 8,
    further: ImageSource | Tensor | None = None,
) -> MapInverse:
    """The maximum-a-posteriori inverse of one tap at one noise level, started from a trained inverse.

    bases: {tap: representation there -> images in [0, 1]} of `tap`, and of taps that deep ones of large pictures are
    led back to (without such, or where nothing is checked, the search begins at the pixels); held_out: images that
    neither the bases nor the model was trained on: all measure the start's error and its covariance, the last `checked`
    of them, solved in full, the gain (0: a gain of 1); noise: what it does to values (B, n, c), None: only round-off,
    of which `settings.least` is assumed at least; further: images, also of those that the bases were trained on, the
    first FURTHER of which fit linear maps on the way.
    """
    settings, pictures = settings or MapSettings(), held_out.to(target.device)
    if target.image_size[0] * target.image_size[1] > SMALL:
        settings = replace(settings, **LARGE)
    if len(pictures) < HELD_OUT:
        raise BacksightError(f"A MAP inverse needs at least {HELD_OUT} held-out images, not {len(pictures)}.")
    clean: Any = concatenate([target.record(part, [tap])[tap] for part in pictures.split(64)])
    if reason := _refusal(tap, clean):
        raise BacksightError(reason)
    sizes = zip(target.image_size, target.reduction, strict=True)
    down, across = (token if side % SIDE or (token <= SIDE and side % token == 0) else SIDE for side, token in sizes)
    disturbed = clean if noise is None else clean.replace(noise(clean.values))
    prefix = clean.prefix if isinstance(clean, Tokens) else 0

    least = (settings.least * float(clean.values.std())) ** 2
    squares = [rows.double().square().mean(0) for rows in groups(disturbed.values - clean.values, prefix)]
    variance = torch.stack(squares).add(least).diag_embed()
    steps = way_back(target, tap, bases) if checked else ()
    inverse = MapInverse(target, tap, bases[tap], (down, across), settings, steps)
    inverse.measure(pictures, clean, disturbed, variance)
    truth, led_back = patchify(pictures, inverse.patch), None
    last = torch.arange(len(truth) - min(checked, len(truth)), len(truth), device=truth.device)
    if steps:
        middle = steps[0].source
        seen = pictures if further is None else torch.cat([next(batches(further, FURTHER)).to(pictures), pictures])
        begun: Any = concatenate([target.record(part, [middle])[middle] for part in seen.split(64)])
        streams = [begun.values]
        with torch.no_grad():
            for step in steps:
                streams.append(torch.cat([step(part) for part in streams[-1].split(8)]))
        led_back, left = fit_way(inverse.halves, streams, disturbed.values[last], variance, settings.least)
        inverse.middle = MapInverse(target, middle, bases[middle], inverse.patch, settings)
        inverse.middle.measure(seen, begun, begun.replace(begun.values + draws(left, begun.values.shape)), left)
    way, there = [], []
    for which in last.split(inverse.batch_size) if checked else ():
        part = None if led_back is None else led_back[which - last[0]]
        _, solution, patches, start = inverse.solve(disturbed.index(which), part)
        way.append(((solution.z if part is None else patches) - start) @ inverse.basis)
        there.append((truth[which] - start) @ inverse.basis)
    if way:
        inverse.put(gain=_gains(torch.cat(way).flatten(0, 1), torch.cat(there).flatten(0, 1)).to(inverse.gain))
    return inverse


def _gains(way: Tensor, there: Tensor) -> Tensor:
    """(c,) least-squares shares of `way` (rows, c) towards `there`, in [0, 1], shared by neighbouring directions."""
    pairs = zip(way.double().chunk(GAINS, 1), there.double().chunk(GAINS, 1), strict=True)
    shares = [((a * b).sum() / a.square().sum().clamp(min=1e-300)).clamp(0, 1).expand(a.shape[1]) for a, b in pairs]
    return torch.cat(shares)
