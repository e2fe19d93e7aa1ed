"""The most probable picture behind a noisy representation: the model's own pass, a prior, and a noise level.

    y ──► trained inverse, steadied ──► start m(y) ──► Gauss–Newton on   |T(z) − y|² / noise  +  |z − m|² / error of m
          (Wiener in front, ridge behind)              └ conjugate gradients on products JᵀJ, one retained graph ┘

T is the target itself up to the tap, exact to round-off; the prior is the Gaussian of the start's own error, measured
on held-out images at that tap and noise; `posterior` has the search. Covariances are of each prefix token and of all
grid tokens together, (P + 1, c, c).

The start has read y as well as the likelihood does, so the two are not independent. A gain for each direction of the
prior, measured on the same held-out images, says how much of the way from m to the solution is worth going.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from backsight.data.images import ImageSource, batches
from backsight.errors import BacksightError
from backsight.exact.inverse import tell_left_out
from backsight.exact.posterior import Forward, Gaussian, Likelihood, MapSettings, MapSolution, map_solve
from backsight.exact.solver import factored
from backsight.exact.starts import HELD_OUT, by_group, covariance, groups, of_tokens, ridge
from backsight.inverses.linear import fit_linear
from backsight.inverses.module import InverseHeader, Inverses, described, header_for, rebuilt
from backsight.inverses.rows import patchify, unpatchify
from backsight.representation import Queries, Representation, Tokens, concatenate
from backsight.targets.base import PIXELS, Target

Base = Callable[[Representation], Tensor]
Watch = Callable[[Representation, Gaussian, MapSolution, Tensor], None]
FLOOR = 1e-6  # of a covariance's mean variance: directions that never move get this, not an infinite weight
SIDE = 8  # of the pixel patches of the prior, where the target's tokens cover larger ones
STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 3))
ROUND_OFF = 4.0  # times the machine's ε of the values' deviation: the noise that no representation is without
GAINS = 16  # groups of neighbouring directions that share a gain

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


def noisy(values: Tensor, noise: Noise, generator: torch.Generator | None = None) -> Tensor:
    """values (B, n, c) as they come back from the store; of the type they had. generator: of the CPU.

    int8: rounded to 127 steps of the largest absolute value of each sample. gaussian: white, of the deviation
    noise.sigma times the values' own.
    """
    if noise.kind in STORED:
        return values.to(STORED[noise.kind]).to(values.dtype)
    if noise.kind == "int8":
        step = values.flatten(1).abs().amax(1).clamp(min=1e-30)[:, None, None] / LEVELS
        return (values / step).round() * step
    if noise.kind != "gaussian" or noise.sigma < 0:
        raise ValueError(f"noise is one of {', '.join(KINDS)} with a sigma from 0, not {noise}")
    drawn = torch.randn(values.shape, generator=generator, dtype=values.dtype).to(values.device)
    return values + noise.sigma * float(values.std()) * drawn


def pixel_forward(target: Target, tap: str, patch: tuple[int, int], grid: tuple[int, int]) -> Forward:
    """T from patches (B, N, 3 p q) of pixels to the values (B, n, c) at `tap`: the model's own pass, differentiable.

    Unlike `target.record` it takes pixels outside [0, 1], where a search may go on its way.
    """
    (tap,) = target.resolve_taps([tap])

    def forward(patches: Tensor) -> Tensor:
        images = unpatchify(patches, grid, patch)
        with sdpa_kernel(SDPBackend.MATH):
            normalised = target.preprocessing.normalise(images)
            return target._recorded(images, normalised, (tap,), None, torch.is_grad_enabled())[tap].values

    return forward


class Steadied(nn.Module):
    """A trained inverse for one noise level: a Wiener filter in front of it, a ridge map of its patches behind it.

    mean: (P + 1, c), wiener: (P + 1, c, c) of the representation; weight: (d, 3 p q), bias: (3 p q,) read its patches
    and, where the tokens lie on the patches' grid, the token as well.
    """

    mean: Tensor
    wiener: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, base: Base, patch: tuple[int, int], mean: Tensor, wiener: Tensor, features: int) -> None:
        super().__init__()
        self.base, self.patch = base, patch
        values = 3 * patch[0] * patch[1]
        self.register_buffer("mean", mean)
        self.register_buffer("wiener", wiener)
        self.register_buffer("weight", mean.new_zeros(features, values))
        self.register_buffer("bias", mean.new_zeros(values))

    def forward(self, representation: Representation) -> Tensor:
        """(B, N, 3 p q)."""
        return self.features(representation) @ self.weight + self.bias

    def features(self, representation: Representation) -> Tensor:
        """(B, N, d)."""
        values = representation.values
        mean = of_tokens(self.mean, values.shape[1])
        filtered = by_group(values - mean, self.wiener) + mean
        patches = patchify(self.base(representation.replace(filtered)), self.patch)
        if isinstance(representation, Tokens) and values.shape[1] - representation.prefix == patches.shape[1]:
            return torch.cat([patches, filtered[:, representation.prefix :]], dim=2)
        return patches


class MapInverse(nn.Module):
    """inverse(representation) -> images (B, 3, H, W) in [0, 1], for one tap and one noise; `fit_map` makes it.

    noise_covariance, spread: (P + 1, c, c) of the representation; factor: (3 p q, 3 p q) of the start's error; gain:
    (3 p q,) share of the way from the start to the solution that is worth going, for each direction (`basis`, columns)
    of that error.
    """

    kind = family = "map"
    destination = PIXELS
    precise = ("noise_covariance", "spread", "factor", "basis", "gain", "start.mean", "start.wiener")
    noise_covariance: Tensor
    spread: Tensor
    factor: Tensor
    basis: Tensor
    gain: Tensor

    def __init__(
        self, target: Target, tap: str, noise: Noise, start: Steadied, settings: MapSettings, batch_size: int = 8
    ) -> None:
        super().__init__()
        self.target, self.source, self.noise, self.start = target, tap, noise, start
        self.settings, self.batch_size = settings, batch_size
        self.header: InverseHeader | None = None
        values, like = len(start.bias), start.mean
        self.register_buffer("noise_covariance", torch.zeros_like(start.wiener))
        self.register_buffer("spread", torch.zeros_like(start.wiener))
        self.register_buffer("factor", like.new_zeros(values, values))
        self.register_buffer("basis", like.new_zeros(values, values))
        self.register_buffer("gain", like.new_ones(values))

    @property
    def likelihood(self) -> Likelihood:
        return Likelihood(self.noise_covariance, self.spread)

    @property
    def last_stage(self) -> float:
        return (self.settings.stages or self.likelihood.stages())[-1]

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.target.image_size
        return height // self.start.patch[0], width // self.start.patch[1]

    @property
    def pass_to_tap(self) -> Forward:
        return pixel_forward(self.target, self.source, self.start.patch, self.grid)

    def pictures(self, patches: Tensor) -> Tensor:
        """(B, 3, H, W) of (B, N, 3 p q), not clamped."""
        return unpatchify(patches, self.grid, self.start.patch)

    def solve(self, representation: Representation) -> tuple[Gaussian, MapSolution, Tensor]:
        """(prior, solution, patches (B, N, 3 p q) behind the gain) of a batch."""
        prior = Gaussian(self.start(representation), self.factor)
        solution = map_solve(self.pass_to_tap, representation.values, prior, self.likelihood, self.settings)
        return prior, solution, self.gained(prior.mean, solution.z)

    def gained(self, start: Tensor, solution: Tensor) -> Tensor:
        return start + ((solution - start) @ self.basis * self.gain) @ self.basis.T

    def forward(self, representation: Representation) -> Tensor:
        patches = torch.cat([self.solve(part)[2] for part in parts_of(representation, self.batch_size)])
        return self.pictures(patches).clamp(0, 1)

    def configuration(self) -> dict[str, Any]:
        """All but the numbers, for a file. Raises TypeError where the base is no module that a file can hold."""
        if not isinstance(self.start.base, nn.Module):
            raise TypeError(f"a file holds a MAP inverse whose base is a module, not {type(self.start.base).__name__}")
        return {
            "source": self.source,
            "image_size": list(self.target.image_size),
            "patch": list(self.start.patch),
            "noise": asdict(self.noise),
            "settings": asdict(self.settings),
            "batch_size": self.batch_size,
            "sizes": [*self.start.mean.shape, len(self.start.weight)],
            "base": described(self.start.base),
        }

    @classmethod
    def build(cls, configuration: Mapping[str, Any], target: Target) -> Self:
        """An inverse with empty buffers. Raises BacksightError where the target takes other images."""
        size = tuple(configuration["image_size"])
        if size != tuple(target.image_size):
            raise BacksightError(f"The inverse was fitted on images of {size}, but {target.name} takes another size.")
        rows, channels, features = configuration["sizes"]
        like = torch.zeros(rows, channels, device=target.device)
        base, wiener = rebuilt(configuration["base"], target), like.new_zeros(rows, channels, channels)
        start = Steadied(base, tuple(configuration["patch"]), like, wiener, features)
        noise, settings = Noise(**configuration["noise"]), MapSettings(**configuration["settings"])
        (tap,) = target.resolve_taps([configuration["source"]])
        return cls(target, tap, noise, start, settings, configuration["batch_size"])


def parts_of(representation: Representation, size: int) -> list[Representation]:
    every = torch.arange(representation.batch, device=representation.values.device)
    return [representation.index(part) for part in every.split(size)]


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

    validation: held-out images, which nothing was fitted on; modules: trained inverses to start from, else linear ones,
    of which those that are missing are fitted on `images`. Raises BacksightError without held-out
    images, and where no tap can be read.
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
    ready = {**(linear or {}), **(modules or {})}
    bases = {tap: ready[tap] for tap in kept if tap in ready}
    missing = [tap for tap in kept if tap not in bases]
    if missing:
        bases |= fit_linear(target, images, validation, taps=missing, seed=seed, progress=progress)
    inverses = {}
    for tap in tqdm(kept, desc="MAP inverses", leave=False, disable=not progress):
        inverses[tap] = fit_map_tap(target, tap, bases[tap], validation, Noise("float32"), seed=seed)
        inverses[tap].header = header_for(target, "map", tap, PIXELS, images, seed)
    return Inverses(inverses)


def _refusal(tap: str, representation: Representation) -> str:
    """Why a MAP inverse cannot read this; "" where it can."""
    if not isinstance(representation, Tokens | Queries):
        return f"A MAP inverse reads tokens or queries, and {tap} holds {type(representation).__name__.lower()}."
    if isinstance(representation, Tokens) and representation.padding is not None:
        return f"A MAP inverse reads unpadded tokens, and those of {tap} are padded: crop or stretch images instead."
    return ""


def fit_map_tap(
    target: Target,
    tap: str,
    base: Base,
    images: ImageSource | Tensor,
    noise: Noise,
    settings: MapSettings | None = None,
    count: int = 128,
    checked: int = 8,
    seed: int = 0,
    watch: Watch | None = None,
) -> MapInverse:
    """The maximum-a-posteriori inverse of one tap at one noise level, started from a trained inverse.

    base: representation at `tap` -> images in [0, 1]; images: held-out ones, which neither the base nor the model was
    trained on: the first `count` measure the start's error and its covariance, the last `checked` of them, solved in
    full, the gain (0: a gain of 1); watch: called with the representation, prior, solution and true patches of these.
    """
    settings, device = settings or MapSettings(), target.device
    pictures: list[Tensor] = []
    recorded: list[Representation] = []
    for part in batches(images, 64):
        part = part[: count - sum(map(len, pictures))].to(device)
        pictures.append(part)
        recorded.append(target.record(part, [tap])[tap])
        if reason := _refusal(tap, recorded[-1]):
            raise BacksightError(reason)
        if sum(map(len, pictures)) >= count:
            break
    if sum(map(len, pictures)) < HELD_OUT:
        raise BacksightError(f"A MAP inverse needs at least {HELD_OUT} held-out images, not {sum(map(len, pictures))}.")
    chosen, clean = torch.cat(pictures), recorded[0] if len(recorded) == 1 else concatenate(recorded)
    disturbed = clean.replace(noisy(clean.values, noise, torch.Generator().manual_seed(seed)))
    prefix = clean.prefix if isinstance(clean, Tokens) else 0
    patch = _patch(target)
    # A pass in another order of operations is off by round-off: no noise is smaller.
    least = (max(settings.least, ROUND_OFF * torch.finfo(torch.float32).eps) * float(clean.values.std())) ** 2
    variances = [rows.double().square().mean(0) for rows in groups(disturbed.values - clean.values, prefix)]
    variance = torch.stack(variances).add(least).diag_embed()
    signal = covariances(clean.values, prefix)
    wiener = torch.linalg.lu_solve(*factored(signal + variance), signal).to(clean.values)
    means = torch.stack([rows.mean(0) for rows in groups(clean.values, prefix)])
    begun = Steadied(base, patch, means, wiener, 0)
    truth = patchify(chosen, patch)
    features = torch.cat([begun.features(part) for part in parts_of(disturbed, 32)])
    start = Steadied(base, patch, means, wiener, features.shape[2])
    fit = zip(features.split(32), truth.split(32), strict=True)
    (weight,), (bias,) = ridge(fit, 0, STRENGTHS, all_rows=True)
    start.weight.copy_(weight)
    start.bias.copy_(bias)
    inverse = MapInverse(target, tap, noise, start, settings)
    begin = features @ start.weight + start.bias
    eigenvalues, basis = torch.linalg.eigh(covariance((truth - begin).flatten(0, 1), FLOOR))
    inverse.basis.copy_(basis)
    inverse.factor.copy_(basis * eigenvalues.clamp(min=float(eigenvalues.mean()) * FLOOR).sqrt())
    with torch.no_grad():
        passed = torch.cat([inverse.pass_to_tap(part) for part in begin.split(32)])
    inverse.spread.copy_(covariances(passed - clean.values, prefix))
    inverse.noise_covariance.copy_(variance)
    last = torch.arange(len(truth) - min(checked, len(truth)), len(truth), device=device)
    way, there = [], []
    for which in last.split(inverse.batch_size) if checked else ():
        prior, solution, _ = inverse.solve(disturbed.index(which))
        way.append((solution.z - prior.mean) @ inverse.basis)
        there.append((truth[which] - prior.mean) @ inverse.basis)
        if watch is not None:
            watch(disturbed.index(which), prior, solution, truth[which])
    if way:
        inverse.gain.copy_(_gains(torch.cat(way).flatten(0, 1), torch.cat(there).flatten(0, 1)))
    return inverse


def covariances(values: Tensor, prefix: int) -> Tensor:
    """(P + 1, c, c) about zero of (B, n, c), in float64."""
    return torch.stack([covariance(rows, FLOOR) for rows in groups(values, prefix)])


def _patch(target: Target) -> tuple[int, int]:
    """Patch of the prior: what a token covers, or SIDE where that is large."""
    sides = []
    for side, covered in zip(target.image_size, target.reduction, strict=True):
        small = covered <= SIDE and side % covered == 0
        sides.append(covered if small or side % SIDE else SIDE)
    return sides[0], sides[1]


def _gains(way: Tensor, there: Tensor) -> Tensor:
    """(c,) least-squares shares of `way` (rows, c) towards `there`, in [0, 1], shared by neighbouring directions."""
    together, square = (way.double() * there.double()).sum(0), way.double().square().sum(0)
    parts = [
        (top.sum() / bottom.sum().clamp(min=1e-300)).clamp(0, 1).expand(len(top))
        for top, bottom in zip(together.chunk(GAINS), square.chunk(GAINS), strict=True)
    ]
    return torch.cat(parts)
