"""What noise costs each inverse, tap by tap: decoders, the most probable picture, and exact solves, on the same values.

    images ──► target, float64 ──► clean           σ = size of what the noise did, relative to the clean values
       └─────► target, float32 ──► noise ──► y ──► linear, direct, modular │ steadied ──► map + deviation │ exact

For every tap and noise one disturbed representation is drawn, and all inverses read that one. Beside the scores: which
directions of a picture a tap shows more strongly than the noise, how much a half-step's inverse amplifies, whether the
MAP inverse knows where it is wrong, and what the directions that it cannot know look like: detail, colour, background.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import ImageSource, batches
from backsight.errors import BacksightError
from backsight.exact.inverse import ExactInverse, ExactModel
from backsight.exact.map import KINDS, MapInverse, Noise, noisy, pixel_forward
from backsight.exact.posterior import Gaussian, MapSettings, MapSolution, whitened
from backsight.exact.solver import Linearised
from backsight.exact.starts import Embedding, measured_embedding
from backsight.exact.steps import NotInvertibleError, in_precision
from backsight.inverses.families import Reconstruct
from backsight.inverses.rows import patchify
from backsight.measures.pixels import psnr, ssim
from backsight.representation import Representation, concatenate
from backsight.studies.amplification import amplification, chain_amplification
from backsight.studies.lanczos import NORMAL_95, crossing, least_seen, recoverable, relative_size, reliability, spectrum
from backsight.studies.nulls import null_mean
from backsight.studies.roots import map_base
from backsight.studies.tidy_rows import TidyRows
from backsight.studies.uncertainty import Uncertainty
from backsight.tables.values import METRIC_COLUMNS
from backsight.targets.base import Target

__all__ = [
    "BEST",
    "Probes",
    "Stability",
    "background_share",
    "colour_share",
    "detail_radius",
    "detail_share",
    "disturbed",
    "measure_stability",
    "parse_noises",
]

BEST = "best"  # of the trained decoders that are not linear, at that tap and noise
MAP, STEADIED, EXACT = "map", "steadied", "exact"
NULL_MEAN, NULL_SHUFFLED, NULL_CONSTANT, NULL_RANDOM = "null_mean", "null_shuffled", "null_constant", "null_random"
ERROR = "map_error"  # what went wrong in fact, beside what could not be known
BINS = 10  # of a reliability curve
RESAMPLES = 300  # of bootstraps of a calibration, a rank correlation and a crossing
SHOWN = 3  # images kept as pictures
ROUNDING = 2**-24 / 3**0.5  # of float32, relative: no stored value is known better, though two passes may agree
DETAIL = 0.1  # share of the images' own power above the radius from which on frequencies count as detail
COLUMNS = (*METRIC_COLUMNS, "noise", "sigma", "seeds", "against", "step", "note")
Job = tuple[str, str]  # tap, name of the noise


@dataclass(frozen=True)
class Probes:
    """How much is spent on what needs products with derivatives.

    images: of a spectrum, of directions and of amplifications, the first ones; vectors, steps: of a Lanczos quadrature;
    directions: least-seen ones of an image, found in `iterations` of `products` pairs (J, Jᵀ) each;
    amplified: noise vectors, and steps of the power iteration, of a half-step's amplification (0: not measured);
    krylov: largest space of one linear solve there.
    """

    images: int = 4
    vectors: int = 2
    steps: int = 60
    directions: int = 3
    iterations: int = 3
    products: int = 30
    amplified: int = 4
    krylov: int = 200


@dataclass(frozen=True)
class Stability:
    """metrics: tidy rows, METRIC_COLUMNS and noise, sigma (effective, relative), seeds, against, step, note.

    reliability: tap, noise, sigma, bin, predicted, actual, n, and `constant`, the deviation of the constant null;
    images: (k, 3, H, W), the first ones; pictures: {(tap, noise): {inverse: (k, 3, H, W)}} of the first training seed
    (exact: at most `exact_images`); deviations: {(tap, noise): (predicted, actual), each (k, H, W)} root mean square
    over the channels; directions: {tap: (patterns (d, 3, H, W), (d,) share of the prior's variance left)} of the first
    image at the least noise; random_directions: {tap: patterns of random directions of that prior}; maps: {tap: its MAP
    inverses at "float32", one of each of the first `map_seeds` training seeds}, where that is one of the noises.
    """

    metrics: pd.DataFrame
    reliability: pd.DataFrame
    images: Tensor
    pictures: dict[Job, dict[str, Tensor]]
    deviations: dict[Job, tuple[Tensor, Tensor]]
    directions: dict[str, tuple[Tensor, Tensor]]
    random_directions: dict[str, Tensor]
    maps: dict[str, list[MapInverse]]


# ------------------------------------------------------------------------------------------------------------- noises


def parse_noises(noises: Sequence[str | float]) -> list[Noise]:
    """Noises from names of a format ("float32", "int8", …) and sizes σ above 0 of Gaussian noise.

    σ is relative to the deviation of the tap's values. Raises BacksightError on anything else, and on one named twice.
    """
    formats = [kind for kind in KINDS if kind != "gaussian"]
    if isinstance(noises, str) or not isinstance(noises, Sequence) or not len(noises):
        raise BacksightError(f"Noises are a list such as ['float32', 'int8', 0.01], not {noises!r}.")
    found = []
    for each in noises:
        if isinstance(each, str) and each in formats:
            found.append(Noise(each))
            continue
        try:
            sigma = math.nan if isinstance(each, bool) else float(each)
        except (TypeError, ValueError):
            near = get_close_matches(str(each), formats, 1)
            hint = f"did you mean {near[0]!r}" if near else f"there are {', '.join(formats)}"
            raise BacksightError(f"There is no noise {each!r}: {hint}, or a number above 0 for a Gaussian σ?") from None
        if not 0 < sigma < math.inf:
            raise BacksightError(f"Gaussian noise has a finite σ above 0, not {each!r}: without noise it is 'float32'.")
        found.append(Noise("gaussian", sigma))
    names = [each.name for each in found]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise BacksightError(f"The noise {twice[0]!r} is there twice: name every noise once.")
    return found


def disturbed(clean: Representation, tap: str, noise: Noise, seed: int = 0) -> Representation:
    """The representation as the noise leaves it: the same numbers for the same seed, tap and noise, whoever reads."""
    generator = torch.Generator(device=clean.values.device)
    generator.manual_seed(crc32(f"{seed} {tap} {noise.name}".encode()))
    return clean.replace(noisy(clean.values, noise, generator))


# -------------------------------------------------------------------------------------------- what a pattern is made of


def colour_share(patterns: Tensor) -> Tensor:
    """(…,) share of a pattern's energy (…, 3, H, W) that is not grey; white noise: 2/3.

    The axes are orthonormal ((R+G+B)/√3 and what is left), so that the shares of grey and of colour sum to 1.
    """
    total = patterns.double().square().sum((-3, -2, -1))
    grey = 3 * patterns.double().mean(-3).square().sum((-2, -1))
    return 1 - grey / total.clamp(min=1e-300)


def _radii(height: int, width: int) -> Tensor:
    """(H, W) cycles a pixel."""
    return (torch.fft.fftfreq(height)[:, None].square() + torch.fft.fftfreq(width).square()).sqrt().double()


def _power(patterns: Tensor) -> Tensor:
    """(…, H, W) of (…, 3, H, W), over the channels."""
    return torch.fft.fft2(patterns.double()).abs().square().sum(-3)


def detail_radius(images: Tensor, share: float = DETAIL) -> float:
    """Spatial frequency (cycles a pixel) above which the images (N, 3, H, W) have this share of their power.

    Their means are left out. Raises BacksightError where every image is of one colour.
    """
    power = _power(images - images.mean((-2, -1), keepdim=True)).sum(0).flatten()
    if float(power.sum()) <= 1e-12 * images.numel():
        raise BacksightError("Images of one colour have no detail to compare with: give other ones.")
    radii, order = _radii(*images.shape[-2:]).flatten().sort()
    # All frequencies of one radius count together.
    above = power.sum() - torch.cumsum(power[order], 0)
    distinct = torch.cat([radii[1:] > radii[:-1] + 1e-9, torch.ones(1, dtype=torch.bool)])
    return float(radii[distinct & (above <= share * power.sum())][0])


def detail_share(patterns: Tensor, radius: float) -> Tensor:
    """(…,) share of a pattern's energy (…, 3, H, W) at spatial frequencies above the radius (cycles a pixel)."""
    power = _power(patterns)
    high = _radii(*patterns.shape[-2:]) > radius + 1e-9
    return (power * high).sum((-2, -1)) / power.sum((-2, -1)).clamp(min=1e-300)


def background_share(patterns: Tensor, masks: Tensor) -> Tensor:
    """(…, B) share of a pattern's energy (…, B, 3, H, W) outside the objects' masks (B, H, W)."""
    energy = patterns.double().square().sum(-3)
    return (energy * ~masks).sum((-2, -1)) / energy.sum((-2, -1)).clamp(min=1e-300)


def _kinds_of(patterns: Tensor, radius: float, masks: Tensor | None) -> dict[str, Tensor]:
    """{measure: (B,)} of (d, B, 3, H, W), each the mean over an image's directions, which count alike."""
    found = {"fragile_colour_share": colour_share(patterns), "fragile_detail_share": detail_share(patterns, radius)}
    if masks is not None:
        found["fragile_background_share"] = background_share(patterns, masks)
    return {measure: shares.mean(0) for measure, shares in found.items()}


# ----------------------------------------------------------------------------------------------------------- the MAP


@dataclass(frozen=True)
class Solved:
    """What one MAP inverse made of all images: images, steadied (N, 3, H, W), deviation (N, H, W), misfit (N,).

    kept: (representation, prior, solution) of the first batches, as many as `probes` look at.
    """

    inverse: MapInverse
    images: Tensor
    steadied: Tensor
    deviation: Tensor
    misfit: Tensor
    seconds: float
    seconds_steadied: float
    kept: list[tuple[Representation, Gaussian, MapSolution]]


def _parts(representation: Representation, size: int) -> Iterator[Representation]:
    for start in range(0, representation.batch, size):
        yield representation.index(torch.arange(start, min(start + size, representation.batch)))


def _solved(uncertainty: Uncertainty, y: Representation, batch_size: int, keep: int) -> Solved:
    inverse = uncertainty.inverse
    made: dict[str, list[Tensor]] = {"images": [], "steadied": [], "deviation": [], "misfit": []}
    seconds = start_seconds = 0.0
    kept: list[tuple[Representation, Gaussian, MapSolution]] = []

    for part in _parts(y, batch_size):
        began = time.perf_counter()
        prior, found, patches = inverse.solve(part)
        seconds += time.perf_counter() - began
        start_seconds += time.perf_counter() - began - found.seconds
        if sum(each.batch for each, _, _ in kept) < keep:
            kept.append((part, prior, found))
        made["images"].append(inverse.pictures(patches).clamp(0, 1))
        made["steadied"].append(inverse.pictures(prior.mean).clamp(0, 1))
        made["deviation"].append(uncertainty.deviation(part, prior, found))
        made["misfit"].append(found.misfit)
    whole = {name: torch.cat(parts).detach() for name, parts in made.items()}
    return Solved(inverse, **whole, seconds=seconds / y.batch, seconds_steadied=start_seconds / y.batch, kept=kept)


def _directions(
    inverse: MapInverse, part: Representation, prior: Gaussian, found: MapSolution, probes: Probes, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(patterns (d, B, 3, H, W), (d, B) share of the prior's variance left, patterns of random directions).

    About the MAP solution, with the noise taken larger where the residual is larger than it says, as for its draws.
    """
    residual = whitened(inverse.pass_to_tap, part.values, prior, inverse.likelihood, inverse.last_stage)
    excess = found.misfit.clamp(min=1.0).sqrt().to(part.values)[:, None, None]
    here = Linearised(lambda w: residual(w) / excess, found.w)
    seen, left = least_seen(here, probes.directions, probes.iterations, probes.products, seed)
    generator = torch.Generator(device=seen.device).manual_seed(seed)
    random = torch.randn(seen.shape, generator=generator, dtype=seen.dtype, device=seen.device)
    random = random / random.flatten(2).norm(dim=2)[:, :, None, None]
    seen, random = (_pictured(each, prior, inverse) for each in (seen, random))
    return seen.detach(), left.detach(), random


def _pictured(directions: Tensor, prior: Gaussian, inverse: MapInverse) -> Tensor:
    return torch.stack([inverse.pictures(each @ prior.factor.T) for each in directions])


# ------------------------------------------------------------------------------------- how strongly directions show


def recoverable_directions(
    target: Target,
    tap: str,
    images: Tensor,
    prior_images: Tensor,
    patch: tuple[int, int],
    sigmas: Sequence[float],
    scale: float,
    probes: Probes,
    embedding: Embedding | None = None,
    seed: int = 0,
) -> tuple[dict[float, Tensor], int, int]:
    """({σ: (B,) directions}, dimensions of an image, dimensions that the embedding passes on).

    A direction counts where one deviation of the images along it (Gaussian of patches, measured on prior_images) moves
    the tap's values by more than the noise: σ · scale in each. The same prior at every tap, so that taps compare; what
    a rank-deficient patch embedding drops is left out of the quadrature and counts as lost at every σ. NaN where the
    products did not reach down to σ.
    """
    patches = patchify(prior_images, patch).flatten(0, 1).double()
    away = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(away.T @ away / len(away))
    factor = vectors * values.clamp(min=1e-6 * float(values.mean())).sqrt()
    if embedding is not None and embedding.patch == patch and embedding.rank < len(embedding.matrix):
        shown = torch.linalg.svd(factor.T @ embedding.matrix.double(), full_matrices=False)[0][:, : embedding.rank]
        factor = factor @ shown
    factor = factor.to(images)
    height, width = images.shape[-2:]
    grid = (height // patch[0], width // patch[1])
    forward, at = pixel_forward(target, tap, patch, grid), patchify(images, patch)
    here = Linearised(lambda w: forward(at + w @ factor.T) / scale, at.new_zeros(len(at), at.shape[1], factor.shape[1]))
    found = spectrum(here, probes.steps, probes.vectors, seed)
    return {sigma: recoverable(found, sigma) for sigma in sigmas}, at[0].numel(), found.dimensions


# ------------------------------------------------------------------------------------------------- the uncertainty


@dataclass(frozen=True)
class Judged:
    """rows: {(inverse, measure): (value, low, high)}; images: {(inverse, measure): (S, N)}; table; constant."""

    rows: dict[tuple[str, str], tuple[float, float, float]]
    images: dict[tuple[str, str], Tensor]
    table: pd.DataFrame
    constant: float


def judged_uncertainty(deviation: Tensor, error: Tensor, seed: int = 0, bins: int = BINS) -> Judged:
    """How well deviations (S, N, H, W) tell the errors (S, N, 3, H, W), beside a constant of the same mean variance.

    Both are judged in the same bins, those of equally many pixels by the predicted deviation: a constant that is right
    on average is then off wherever errors are rightly said to be small or large. Its ranks are all alike, so that its
    rank correlation is 0 by definition. Log scores are of a Gaussian, nats a value, higher is better.
    """
    seeds, count = deviation.shape[:2]
    predicted = deviation[:, :, None].expand_as(error).double()
    whole = reliability(deviation.flatten(0, 1), error.flatten(0, 1), bins)
    constant = float(predicted.square().mean().sqrt())
    flat = predicted.flatten().numpy(), error.double().flatten().numpy()
    cell = np.repeat(np.arange(seeds * count), error[0, 0].numel())
    order = np.argsort(flat[0], kind="stable")
    label = np.empty(len(order), int)
    label[order] = np.repeat(np.arange(len(whole.table)), whole.table["n"].to_numpy())

    def by_bin(weights: np.ndarray | None) -> np.ndarray:
        size = seeds * count * len(whole.table)
        found = np.bincount(cell * len(whole.table) + label, weights, size)
        return found.reshape(seeds * count, len(whole.table))

    sums = by_bin(None), by_bin(flat[0] ** 2), by_bin(flat[1] ** 2)
    ranks = [
        np.argsort(np.argsort(each, kind="stable"), kind="stable") / len(cell) for each in (flat[0], np.abs(flat[1]))
    ]
    products = (ranks[0], ranks[1], ranks[0] ** 2, ranks[1] ** 2, ranks[0] * ranks[1])
    moments = np.stack([np.bincount(cell, each) for each in products], 1) / error[0, 0].numel()
    generator = np.random.default_rng(seed)
    by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)
    by_image = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    weights = (by_seed[:, :, None] * by_image[:, None, :]).reshape(RESAMPLES, -1).astype(float)
    number, variance, square = (weights @ each for each in sums)
    number = np.where(number > 0, number, np.nan)
    actual, said = np.sqrt(square / number), np.sqrt(variance / number)
    means = (weights @ moments / (seeds * count)).T
    spread = np.sqrt((means[2] - means[0] ** 2) * (means[3] - means[1] ** 2))
    draws = {
        (MAP, "calibration_error"): np.nanmean(np.abs(actual - said) / said, axis=1),
        (NULL_CONSTANT, "calibration_error"): np.nanmean(np.abs(actual - constant) / constant, axis=1),
        (MAP, "rank_correlation"): (means[4] - means[0] * means[1]) / np.where(spread > 0, spread, np.nan),
    }
    off = float((whole.table["actual"] - constant).abs().mean() / constant)
    values = {
        (MAP, "calibration_error"): whole.calibration_error,
        (NULL_CONSTANT, "calibration_error"): off,
        (MAP, "rank_correlation"): whole.correlation,
    }
    rows = {key: (values[key], *_interval(draws[key])) for key in draws}
    rows[NULL_CONSTANT, "rank_correlation"] = (0.0, 0.0, 0.0)
    images = {}
    for name, each in ((MAP, predicted), (NULL_CONSTANT, torch.full_like(predicted, constant))):
        score = -each.log() - (error.double() / each).square() / 2 - math.log(2 * math.pi) / 2
        images[name, "log_score"] = score.flatten(2).mean(2)
        images[name, "coverage"] = (error.double().abs() <= NORMAL_95 * each).double().flatten(2).mean(2)
    return Judged(rows, images, whole.table, constant)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    if np.isnan(draws).all():
        return math.nan, math.nan
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------------- the crossing


def crossing_row(sigmas: Sequence[float], decoder: np.ndarray, exact: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """value, low, high, n, note: the σ from which on the decoder's PSNR is above the exact solve's.

    decoder: (J, S, N), exact: (J, N) scores at the J ascending sigmas. Outside the measured range value and ends are
    NaN, and the note says on which side; the interval is over seeds and images.
    """

    def one(by_seed: Any, by_image: Any) -> float:
        made = decoder[:, by_seed][:, :, by_image].mean((1, 2))
        return crossing(list(sigmas), list(made), list(exact[:, by_image].mean(1)))

    seeds, count = decoder.shape[1:]
    generator = np.random.default_rng(seed)
    value = one(np.arange(seeds), np.arange(count))
    draws = np.array(
        [one(generator.integers(seeds, size=seeds), generator.integers(count, size=count)) for _ in range(RESAMPLES)]
    )
    low, high = np.quantile(draws, [0.025, 0.975], method="nearest")
    outside = {
        0.0: f"ahead from the least σ, {sigmas[0]:.3g}",
        math.inf: f"behind up to the largest σ, {sigmas[-1]:.3g}",
    }
    notes = [outside[value]] if value in outside else []
    if value not in outside:
        notes += ["interval open below"] if low == 0 else []
        notes += ["interval open above"] if high == math.inf else []
    ends = [math.nan if each in outside else float(each) for each in (value, low, high)]
    return {"value": ends[0], "low": ends[1], "high": ends[2], "n": count, "note": "; ".join(notes) or None}


# ---------------------------------------------------------------------------------------------------------- the study


@dataclass(frozen=True)
class _Study:
    """What every job needs; the names are those of `measure_stability`."""

    target: Target
    double: Target
    families: Mapping[int, Mapping[str, Mapping[str, Reconstruct]]]
    noises: list[Noise]
    images: Tensor
    held_out: Tensor
    mean: Tensor
    masks: Tensor | None
    exact: Mapping[str, ExactInverse]
    exact_images: int
    settings: MapSettings
    map_seeds: int
    checked: int
    probes: Probes
    batch_size: int
    seed: int
    radius: float
    embedding: Embedding | None


@dataclass
class _Collected(TidyRows):
    """What the jobs leave behind, in their order."""

    reliability: list[pd.DataFrame] = field(default_factory=list)
    pictures: dict[Job, dict[str, Tensor]] = field(default_factory=dict)
    deviations: dict[Job, tuple[Tensor, Tensor]] = field(default_factory=dict)
    directions: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    random_directions: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, list[MapInverse]] = field(default_factory=dict)


def measure_stability(
    target: Target,
    families: Mapping[int, Mapping[str, Mapping[str, Reconstruct]]],
    taps: str | Sequence[str],
    noises: Sequence[str | float],
    images: ImageSource | Tensor,
    calibration: ImageSource | Tensor,
    *,
    exact: Mapping[str, ExactInverse] | None = None,
    exact_images: int = 4,
    settings: MapSettings | None = None,
    map_seeds: int = 1,
    fitted: int = 128,
    checked: int = 8,
    probes: Probes | None = None,
    masks: Tensor | None = None,
    mean_image: Tensor | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Stability:
    """What every inverse makes of every tap's representation at every noise, and what noise takes away.

    families: {training seed: {family: {tap: reconstruction}}} (`families_by_seed`); taps that no family of the first
    seed has are refused; noises: as `parse_noises`; images: to judge on; calibration: held-out ones, of which the first
    `fitted` fit the MAP inverse of every tap and noise and `checked` are solved for its gain (`fit_map`); exact: {tap:
    exact inverse}, judged on the first `exact_images`; settings: of the search; map_seeds: training seeds of which a
    MAP inverse is fitted, from modular, direct or linear; masks: (N, H, W) bool, the objects; mean_image: (3, H, W) of
    the training images (default: of the calibration images); batch_size: images solved together.
    Measures: psnr, ssim, seconds (an image), psnr_difference; misfit; solved; calibration_error, coverage,
    rank_correlation and log_score of the MAP's deviation beside those of a constant; recoverable, dimensions; crossing;
    amplification_mean, amplification_largest of every half-step from the last tap to where exactness ends, and
    amplification_chain of all from there to the last tap; fragile_{colour,detail,background}_share of least-seen
    directions, of random ones and of what MAP got wrong, at the least noise, and their differences from random ones.
    MAP − decoder is paired image by image and seed by seed; `against` = "best" is the best of the trained decoders that
    are not linear at that tap and noise, chosen on the judged images, in its favour.
    Raises BacksightError on a target that is not float32, and on noises, taps, masks or counts that do not fit.
    """
    parsed, settings, probes, exact = parse_noises(noises), settings or MapSettings(), probes or Probes(), exact or {}
    taps = target.resolve_taps(taps)
    if _precision(target) != torch.float32:
        raise BacksightError(f"Stability is measured of float32 weights, but {target.name} has {_precision(target)}.")
    if not families or map_seeds < 1 or exact_images < 1:
        raise BacksightError("Give families of at least one training seed, and map_seeds and exact_images from 1.")
    first = families[next(iter(families))]
    if missing := [tap for tap in taps if not any(tap in made for made in first.values())]:
        raise BacksightError(f"No inverse family reads {missing[0]} of {target.name}: leave it out, or train one.")
    pictures = torch.cat(list(batches(images, 64)))
    if masks is not None and (masks.dtype != torch.bool or masks.shape != (len(pictures), *pictures.shape[2:])):
        raise BacksightError(
            f"Masks need the shape {(len(pictures), *pictures.shape[2:])} and the type bool, not {tuple(masks.shape)} "
            f"and {masks.dtype}."
        )
    held_out = _first(calibration, fitted)
    mean = null_mean(held_out) if mean_image is None else mean_image
    source = {} if isinstance(images, Tensor) else {"dataset": images.name, "split": images.split}
    collected = _Collected(target, {"target": target.name, "weights": target.weights, **source}, seed)
    double = in_precision(target, torch.float64)
    # A module's own target tells its values in float32, whatever the precision of its pass.
    wide = double.record(pictures[:1].double(), taps[:1])[taps[0]].values.dtype == torch.float64
    study = _Study(
        target=target,
        double=double,
        families=families,
        noises=parsed,
        images=pictures,
        held_out=held_out,
        mean=mean.clamp(0, 1),
        masks=masks,
        exact=exact,
        exact_images=min(exact_images, len(pictures)),
        settings=settings,
        map_seeds=map_seeds,
        checked=checked,
        probes=probes,
        batch_size=batch_size,
        seed=seed,
        radius=detail_radius(pictures),
        embedding=measured_embedding(double if wide else target),
    )
    total = len(taps) * (len(parsed) + 2) + 1
    with tqdm(total=total, desc=f"stability of {target.name}", leave=False, disable=not progress) as bar:
        for tap in taps:
            _measure_tap(study, tap, collected, bar.update)
        if study.probes.amplified:
            _measure_amplification(study, taps[-1], collected)
        bar.update()
    metrics = pd.DataFrame(collected.rows)
    metrics = metrics.reindex(columns=[*COLUMNS, *(each for each in metrics.columns if each not in COLUMNS)])
    return Stability(
        metrics,
        pd.concat(collected.reliability, ignore_index=True),
        pictures[:SHOWN],
        collected.pictures,
        collected.deviations,
        collected.directions,
        collected.random_directions,
        collected.maps,
    )


def _precision(target: Target) -> torch.dtype:
    return next(target.model.parameters()).dtype


def _first(images: ImageSource | Tensor, count: int) -> Tensor:
    parts: list[Tensor] = []
    for part in batches(images, 64):
        parts.append(part)
        if sum(map(len, parts)) >= count:
            break
    return torch.cat(parts)[:count]


def _recorded(target: Target, images: Tensor, tap: str, size: int = 32) -> Any:
    return concatenate([target.record(part, [tap])[tap] for part in images.split(size)])  # type: ignore[type-var]


def _measure_tap(study: _Study, tap: str, collected: _Collected, done: Callable[[], Any]) -> None:
    """One noise after the other, of which nothing stays but scores and the first pictures."""
    clean = _recorded(study.target, study.images, tap)
    double = _recorded(study.double, study.images.double(), tap).values
    sigmas = {
        noise: max(ROUNDING, relative_size(double, disturbed(clean, tap, noise, study.seed).values))
        for noise in study.noises
    }
    least = min(study.noises, key=sigmas.__getitem__)
    scores: dict[Noise, dict[str, np.ndarray]] = {}
    patch = None
    for noise in study.noises:
        y = disturbed(clean, tap, noise, study.seed)
        scores[noise], first, error = _measure_noise(study, tap, noise, sigmas[noise], y, collected)
        patch = first.inverse.start.patch
        done()
        if noise is least:
            _measure_directions(study, tap, first, error, {"noise": noise.name, "sigma": sigmas[noise]}, collected)
            done()
    _measure_crossing(study, tap, sigmas, scores, collected)
    if patch is not None:
        _measure_recoverable(study, tap, patch, float(clean.values.std()), collected)
    done()


def _measure_noise(
    study: _Study, tap: str, noise: Noise, sigma: float, y: Any, collected: _Collected
) -> tuple[dict[str, np.ndarray], Solved, Tensor]:
    """({inverse: (S, N) PSNR}, what the first seed's MAP inverse made, its errors (N, 3, H, W))."""
    images, count, job = study.images, len(study.images), (tap, noise.name)
    columns = {"noise": noise.name, "sigma": sigma}
    scores: dict[str, dict[str, list[np.ndarray]]] = {}
    seconds: dict[str, list[float]] = {}
    shown = collected.pictures.setdefault(job, {})

    def score(name: str, made: Tensor, spent: float | None = None) -> None:
        of = images[: len(made)]
        if name not in shown:
            shown[name] = made[:SHOWN].clone()
        for measure, function in (("psnr", psnr), ("ssim", ssim)):
            values = torch.full((count,), torch.nan, dtype=torch.float64)
            values[: len(made)] = function(of, made).double()
            scores.setdefault(name, {}).setdefault(measure, []).append(values.numpy())
        if spent is not None:
            seconds.setdefault(name, []).append(spent)

    for by_family in study.families.values():
        for family, inverses in by_family.items():
            if tap not in inverses:
                continue
            began = time.perf_counter()
            with torch.no_grad():
                made = torch.cat([inverses[tap](part) for part in _parts(y, 32)]).clamp(0, 1)
            score(family, made, (time.perf_counter() - began) / count)
    solved = []
    for by_family in list(study.families.values())[: study.map_seeds]:
        base = map_base(by_family, tap)
        fitted = Uncertainty.fitted(
            study.target, tap, base, study.held_out, noise, study.settings, len(study.held_out), study.checked,
            study.seed,
        )  # fmt: skip
        found = _solved(fitted, y, study.batch_size, study.probes.images)
        solved.append(found)
        if noise.kind == "float32":
            collected.maps.setdefault(tap, []).append(fitted.inverse)
        score(STEADIED, found.steadied, found.seconds_steadied)
        score(MAP, found.images, found.seconds)
        if count > 1:  # samples do not know of one another: another image's solution is the one of its representation
            score(NULL_SHUFFLED, found.images.roll(1, 0))
    score(NULL_MEAN, study.mean.expand_as(images))
    if tap in study.exact:
        part = y.index(torch.arange(study.exact_images))
        began = time.perf_counter()
        trace = study.exact[tap].trace(part)
        made = study.exact[tap].images(trace, part)
        score(EXACT, made, (time.perf_counter() - began) / study.exact_images)
        collected.pooled(trace.solved.double(), "solved", tap, EXACT, **columns)
    for name, measures in scores.items():
        for measure, values in measures.items():
            collected.pooled(np.stack(values), measure, tap, name, **columns)
    for name, spent in seconds.items():
        collected.one(
            (float(np.mean(spent)), math.nan, math.nan), "seconds", tap, name, count, seeds=len(spent), **columns
        )
    tables = {name: np.stack(measures["psnr"]) for name, measures in scores.items()}
    _pair(study, tap, tables, columns, collected)
    collected.pooled(torch.stack([each.misfit for each in solved]), "misfit", tap, MAP, **columns)
    error = torch.stack([each.images - images for each in solved])
    _measure_uncertainty(study, job, torch.stack([each.deviation for each in solved]), error, columns, collected)
    return tables, solved[0], error[0]


def _pair(
    study: _Study, tap: str, tables: Mapping[str, np.ndarray], columns: Mapping[str, Any], collected: _Collected
) -> None:
    """MAP − each other inverse."""
    of_map = tables[MAP]
    trained = [name for name in tables if name in study.families[next(iter(study.families))]]
    candidates = [name for name in trained if name != "linear"] or trained
    best = max(candidates, key=lambda name: float(tables[name].mean()))
    for against in [*trained, STEADIED, *([EXACT] if EXACT in tables else []), BEST]:
        other = tables[best if against == BEST else against][: len(of_map)]
        note = f"best: {best}" if against == BEST else None
        values = of_map - (other if len(other) == len(of_map) else other[:1])
        collected.pooled(values, "psnr_difference", tap, MAP, against=against, note=note, **columns)


def _measure_uncertainty(
    study: _Study, job: Job, deviation: Tensor, error: Tensor, columns: Mapping[str, Any], collected: _Collected
) -> None:
    tap, name = job
    judged = judged_uncertainty(deviation, error, study.seed)
    for (inverse, measure), value in judged.rows.items():
        note = "a constant ranks nothing" if (inverse, measure) == (NULL_CONSTANT, "rank_correlation") else None
        collected.one(value, measure, tap, inverse, error.shape[1], seeds=len(error), note=note, **columns)
    for (inverse, measure), values in judged.images.items():
        collected.pooled(values, measure, tap, inverse, **columns)
    difference = judged.images[MAP, "log_score"] - judged.images[NULL_CONSTANT, "log_score"]
    collected.pooled(difference, "log_score_difference", tap, MAP, against=NULL_CONSTANT, **columns)
    places = {"target": study.target.name, "tap": tap, "depth": study.target.depth(tap), **columns}
    table = judged.table.assign(**places, bin=range(len(judged.table)), constant=judged.constant)
    collected.reliability.append(table[[*places, "bin", "predicted", "actual", "n", "constant"]])
    actual = error[0, :SHOWN].square().mean(1).sqrt()
    collected.deviations[tap, name] = (deviation[0, :SHOWN].clone(), actual)


def _measure_directions(
    study: _Study,
    tap: str,
    solved: Solved,
    error: Tensor,
    columns: Mapping[str, Any],
    collected: _Collected,
) -> None:
    """What cannot be known, beside random directions of the prior and what went wrong in fact."""
    count = min(study.probes.images, len(study.images))
    found = [
        _directions(solved.inverse, *kept, study.probes, study.seed + number) for number, kept in enumerate(solved.kept)
    ]
    patterns, left, random = (torch.cat(each, dim=1)[:, :count] for each in zip(*found, strict=True))
    masks = None if study.masks is None else study.masks[:count]
    of = {MAP: patterns, NULL_RANDOM: random, ERROR: error[None, :count]}
    kinds = {name: _kinds_of(each, study.radius, masks) for name, each in of.items()}
    for name, shares in kinds.items():
        for measure, values in shares.items():
            collected.pooled(values, measure, tap, name, **columns)
            if name != NULL_RANDOM:
                more = values - kinds[NULL_RANDOM][measure]
                collected.pooled(more, f"{measure}_difference", tap, name, against=NULL_RANDOM, **columns)
    collected.pooled(left.mean(0), "fragile_variance_left", tap, MAP, **columns)
    collected.directions[tap] = (patterns[:, 0], left[:, 0])
    collected.random_directions[tap] = random[:, 0]


def _measure_recoverable(study: _Study, tap: str, patch: tuple[int, int], scale: float, collected: _Collected) -> None:
    gaussian = {each.sigma: each.name for each in study.noises if each.kind == "gaussian"}
    some = study.images[: study.probes.images]
    counts, dimensions, embedded = recoverable_directions(
        study.target, tap, some, study.held_out, patch, list(gaussian), scale, study.probes, study.embedding, study.seed
    )
    for sigma, values in counts.items():
        note = "the products did not reach σ: take more steps" if bool(values.isnan().any()) else None
        collected.pooled(values, "recoverable", tap, None, noise=gaussian[sigma], sigma=sigma, note=note)
    for measure, value in (("dimensions", dimensions), ("dimensions_embedded", embedded)):
        collected.one((float(value),) * 3, measure, tap, None, len(some))


def _measure_crossing(
    study: _Study,
    tap: str,
    sigmas: Mapping[Noise, float],
    scores: Mapping[Noise, Mapping[str, np.ndarray]],
    collected: _Collected,
) -> None:
    """On Gaussian noise alone: formats disturb in ways of their own."""
    gaussian = sorted((each for each in scores if each.kind == "gaussian"), key=sigmas.__getitem__)
    if tap not in study.exact or not gaussian:
        return
    kept = slice(None, study.exact_images)
    exact = np.stack([scores[each][EXACT][0, kept] for each in gaussian])
    for name in scores[gaussian[0]]:
        if name == EXACT or name.startswith("null_"):
            continue
        decoder = np.stack([scores[each][name][:, kept] for each in gaussian])
        row = crossing_row([sigmas[each] for each in gaussian], decoder, exact, study.seed)
        note, n = row.pop("note"), row.pop("n")
        extra = {"against": EXACT, "note": note, "seeds": decoder.shape[1]}
        collected.one((row["value"], row["low"], row["high"]), "crossing", tap, name, n, **extra)


def _measure_amplification(study: _Study, tap: str, collected: _Collected) -> None:
    """Of every residual half-step down to where exactness ends, at the true stream; alone, and all down to there."""
    double, probes = study.double, study.probes
    try:
        inverse = ExactInverse(ExactModel.of(study.target), tap)
    except NotInvertibleError:
        return
    if inverse.reached == tap:
        return
    steps = inverse.model.walk.between(tap, inverse.reached)
    if any(step.norm is not None for step in steps):
        return  # a norm takes the mean of its tokens: no error there has a way back
    stream = inverse.model.walk.taps
    places = sorted(stream, key=stream.__getitem__)
    start = double.record(study.images[: probes.images].double(), [inverse.reached])[inverse.reached].values
    grown = chain_amplification(steps, start, probes.amplified, probes.krylov, study.seed)[::-1]
    x, number = start, stream[inverse.reached]
    for step, chain in zip(steps, grown, strict=True):
        number += 1
        found = amplification(step, x, probes.amplified, probes.amplified, probes.krylov, study.seed)
        behind = next(each for each in places if stream[each] >= number)
        # Without an inverse the power iteration has no bound either, and ends at 0.
        alone = found.mean.isfinite() & found.largest.isfinite() & (found.largest > 0)
        measured = {"mean": (found.mean, alone), "largest": (found.largest, alone), "chain": (chain, chain.isfinite())}
        for measure, (values, reached) in measured.items():
            known = torch.where(reached, values, torch.nan)
            missing = int(known.isnan().sum())
            note = f"no inverse was reached for {missing} of {len(known)} images" if missing else None
            against = tap if measure == "chain" else None
            place = {"step": step.destination or behind, "against": against, "note": note}
            collected.pooled(known, f"amplification_{measure}", behind, EXACT, **place)
        with torch.no_grad():
            x = step(x)
