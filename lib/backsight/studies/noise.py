"""What noise costs each inverse, tap by tap: all of them read the very same disturbed values.

    images ──► target, float64 ──► clean           σ = size of what the noise did, relative to the clean values
       └─────► target, float32 ──► noise ──► y ──► linear, direct, modular │ steadied ──► MAP + deviation

*steadied* is a decoder that knows the noise: a Wiener filter before a trained decoder, a ridge map behind it. MAP
starts from it and searches the most probable picture with the model itself. How sure it is, pixel by pixel, say draws
from the Gaussian about its solution; whether that is right, say calibration error and coverage.

Sources: Tarantola, Inverse Problem Theory (2005), 3.2.3 (posterior covariance); Papandreou & Yuille, NIPS 2010 (perturb
and optimise); Levi et al., Sensors 22 (2022) (expected normalised calibration error of a regression's uncertainty).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import ImageSource
from backsight.errors import BacksightError, nearest
from backsight.exact.inverse import parts_of
from backsight.exact.map import MapInverse, MapSettings, MapSolution, Posterior, fit_map_tap
from backsight.exact.solver import Linearised, conjugate_gradients, dot
from backsight.exact.starts import by_group
from backsight.exact.steps import in_precision
from backsight.inverses.families import Reconstruct
from backsight.measures.pixels import psnr
from backsight.representation import Representation, concatenate
from backsight.studies.by_seed import map_base
from backsight.studies.nulls import null_mean
from backsight.tables.names import MAP, NULL_CONSTANT, NULL_MEAN, NULL_SHUFFLED, STEADIED
from backsight.tables.pooling import influence
from backsight.tables.values import NO_SEED, Values
from backsight.targets.base import Target

Noise = str | float  # how a representation is stored, or σ of Gaussian noise, relative to the deviation of its values
STORED = ("float32", "float16", "bfloat16", "int8")
LEVELS = 127  # of int8, on either side of zero
ROUNDING = 2**-24 / 3**0.5  # of float32, relative: no stored value is known better, though two passes may agree
SHOWN = 3  # images kept as pictures
SAMPLES = 4  # draws about a solution
AROUND = 5  # pixels, side of the window that a deviation is taken over: a few draws tell little of one pixel alone
NORMAL_95 = 1.959964  # deviations on either side that hold 95 % of a normal distribution
BINS = 10  # of equally many pixels, by predicted deviation


def noise_name(noise: Noise) -> str:
    """ "float32", "gaussian 0.1". Raises BacksightError on what is neither a format nor a finite σ above 0."""
    if noise not in STORED and (isinstance(noise, str) or not 0 < noise < math.inf):
        raise BacksightError(f"There is no noise {noise!r} ({nearest(str(noise), STORED)}); a number is a σ above 0.")
    return noise if isinstance(noise, str) else f"gaussian {noise:g}"


def noisy(values: Tensor, noise: Noise, generator: torch.Generator | None = None) -> Tensor:
    """values (B, n, c) as they come back from the store, or with noise; of the type they had. generator: of the CPU.

    int8: rounded to 127 steps of the largest absolute value of each sample. σ: white noise of σ times their deviation.
    """
    if not isinstance(noise, str):
        drawn = torch.randn(values.shape, generator=generator, dtype=values.dtype).to(values.device)
        return values + noise * float(values.std()) * drawn
    if noise != "int8":
        return values.to(getattr(torch, noise)).to(values.dtype)
    step = values.flatten(1).abs().amax(1).clamp(min=1e-30)[:, None, None] / LEVELS
    return (values / step).round() * step


def disturbed(clean: Representation, tap: str, noise: Noise, seed: int = 0) -> Representation:
    """The representation as the noise leaves it: the same numbers for the same seed, tap and noise, whoever reads."""
    generator = torch.Generator().manual_seed(crc32(f"{seed} {tap} {noise_name(noise)}".encode()))
    return clean.replace(noisy(clean.values, noise, generator))


def measure_noise(
    target: Target,
    families: Mapping[int, Mapping[str, Mapping[str, Reconstruct]]],
    taps: Sequence[str],
    noises: Sequence[Noise],
    images: Tensor,
    held_out: Tensor,
    values: Values,
    *,
    map_seeds: Sequence[int] = (0,),
    settings: MapSettings | None = None,
    checked: int = 8,
    further: ImageSource | None = None,
    seed: int = 0,
) -> dict[tuple[str, str], tuple[dict[str, Tensor], Tensor]]:
    """Adds what every inverse makes of every tap's representation at every noise (columns noise, sigma: as measured).

    families: {training seed: {family: {tap: reconstruction}}}; images: those of `values`; held_out: fit the MAP inverse
    of each tap and noise, from the modular, direct or linear one of each of map_seeds, and the last `checked` of them
    are solved for its gain; further: fit linear maps on the way back from deep taps of large pictures. Measures: psnr;
    coverage of the MAP's posterior deviation; its calibration_error beside that of one constant deviation;
    predicted_variance and actual_variance by `bin` of it.
    Returns {(tap, noise): ({inverse: pictures of the first SHOWN images, by the first seed}, their MAP's deviation)}.
    Raises BacksightError on what is no noise, and on taps that no family reads.
    """
    first, mean = next(iter(families)), null_mean(held_out).clamp(0, 1)
    if missing := [tap for tap in taps if not any(tap in inverses for inverses in families[first].values())]:
        raise BacksightError(f"No inverse family reads {missing[0]} of {target.name}: leave it out, or train one.")
    names, double = {noise_name(noise): noise for noise in noises}, in_precision(target, torch.float64)
    shown: dict[tuple[str, str], tuple[dict[str, Tensor], Tensor]] = {}
    for tap, name in tqdm(list(product(taps, names)), desc=f"noise, {target.name}", leave=False):
        clean, exact = _recorded(target, images, tap), _recorded(double, images.double(), tap).values
        y = disturbed(clean, tap, names[name], seed)
        sigma = float((y.values.double() - exact).square().mean().sqrt() / exact.std())
        at = {"tap": tap, "noise": name, "sigma": max(ROUNDING, sigma)}
        read: dict[str, dict[int, Tensor]] = {MAP: {}, STEADIED: {}, NULL_SHUFFLED: {}}
        deviations = []
        for s in map_seeds:
            draw = partial(noisy, noise=names[name], generator=torch.Generator().manual_seed(seed))
            bases = {other: map_base(families[s], other) for inverses in families[s].values() for other in inverses}
            inverse = fit_map_tap(target, tap, bases, held_out, draw, settings, checked, further)
            read[MAP][s], read[STEADIED][s], expected = _solved(inverse, y)
            if len(images) > 1:  # samples do not know of one another: a solution of another's representation
                read[NULL_SHUFFLED][s] = read[MAP][s].roll(1, 0)
            _add_calibration(values, s, expected, read[MAP][s] - images, at)
            deviations.append(expected[:SHOWN].clone())
        read[NULL_MEAN] = {NO_SEED: mean.expand_as(images)}
        for family in (family for family, inverses in families[first].items() if tap in inverses):
            read[family] = {s: _decoded(of_seed[family][tap], y) for s, of_seed in families.items()}
        for kind, by_seed in read.items():
            values.add("psnr", {s: psnr(images, pictures) for s, pictures in by_seed.items()}, inverse=kind, **at)
        pictures = {kind: next(iter(by_seed.values()))[:SHOWN].clone() for kind, by_seed in read.items() if by_seed}
        shown[tap, name] = pictures, deviations[0]
    return shown


def _recorded(target: Target, images: Tensor, tap: str) -> Any:
    return concatenate([target.record(part, [tap])[tap] for part in images.split(32)])


@torch.no_grad()
def _decoded(inverse: Reconstruct, y: Representation) -> Tensor:
    return torch.cat([inverse(part) for part in parts_of(y, 32)]).clamp(0, 1)


def _solved(inverse: MapInverse, y: Representation) -> list[Tensor]:
    """The MAP's pictures and its start, the steadied decoder's (N, 3, H, W), and the deviation of the MAP's."""
    parts = []
    for part in parts_of(y, inverse.batch_size):
        posterior, solution, *patches = inverse.solve(part)
        pictures = [inverse.pictures(z).clamp(0, 1) for z in patches]
        parts.append([*pictures, deviation(inverse, posterior, solution)])
    return [torch.cat(part).detach() for part in zip(*parts, strict=True)]


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
        shapes = solution.w.shape, y.shape
        white, noise = (torch.randn(shape, generator=generator, dtype=y.dtype, device=y.device) for shape in shapes)
        right = here.transposed(noise) / excess.sqrt() + white
        drawn.append(conjugate_gradients(operator, right, products, 1e-3, white))
    return torch.stack([by_group(white, posterior.factor.mT) for white in drawn])


def deviation(inverse: MapInverse, posterior: Posterior, solution: MapSolution) -> Tensor:
    """(B, H, W): the root mean square of draws about a solution, over the channels and the pixels around."""
    drawn = posterior_samples(posterior, solution, products=inverse.settings.products)
    squares = torch.stack([inverse.pictures(z).square().mean(1) for z in drawn]).mean(0)
    return F.avg_pool2d(squares, AROUND, 1, AROUND // 2, count_include_pad=False).sqrt()


def _add_calibration(values: Values, seed: int, deviation: Tensor, error: Tensor, at: Mapping[str, Any]) -> None:
    values.add("coverage", {seed: coverage(deviation, error)}, inverse=MAP, **at)
    sums = reliability(deviation, error)
    for inverse, of in zip((MAP, NULL_CONSTANT), calibration_error(sums), strict=True):
        values.add("calibration_error", {seed: of}, inverse=inverse, **at)
    for name, squares in zip(("predicted_variance", "actual_variance"), sums[1:], strict=True):
        for place, (weight, summed) in enumerate(zip(sums[0].T, squares.T, strict=True)):
            values.add(name, {seed: summed / weight.clip(min=1)}, inverse=MAP, weight=weight, bin=place, **at)


def coverage(deviation: Tensor, error: Tensor) -> Tensor:
    """(N,) share of errors (N, C, H, W) within 1.96 deviations (N, H, W); 0.95 of normal errors."""
    return (error.abs() <= NORMAL_95 * deviation[:, None]).double().flatten(1).mean(1)


def reliability(deviation: Tensor, error: Tensor) -> np.ndarray:
    """(3, N, BINS): how many values of every image lie in each of BINS bins of equally many pixels, by the predicted
    deviation (N, H, W), and there the sums of predicted and actual squared error, of errors (N, C, H, W)."""
    predicted = deviation[:, None].expand_as(error).double()
    order = predicted.flatten().argsort(stable=True)
    cells = torch.arange(len(error)).repeat_interleave(error[0].numel())
    cells[order] = cells[order] * BINS + torch.arange(len(order)) // -(-len(order) // BINS)
    summed = torch.stack([torch.ones_like(predicted), predicted.square(), error.double().square()]).flatten(1)
    return torch.zeros(3, len(error) * BINS).double().index_add(1, cells, summed).view(3, -1, BINS).numpy()


def calibration_error(sums: np.ndarray) -> np.ndarray:
    """(2, N) of `reliability`'s sums: of the predicted deviations, and of one constant deviation of the same mean
    variance, what every image contributes to the mean over the bins of |actual − predicted| / predicted, root mean
    squares. 0 is perfect."""
    constant = np.sqrt(sums[1].sum() / sums[0].sum())

    def of(weights: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            expected, true = (np.sqrt(weights @ squares / (weights @ sums[0])) for squares in sums[1:])
        return np.stack([np.nanmean(np.abs(true - one) / one, axis=1) for one in (expected, constant)], axis=1)

    return influence(of, sums.shape[1]).T
