"""What noise costs each inverse, tap by tap: all of them read the very same disturbed values.

    images ──► target, float64 ──► clean           σ = size of what the noise did, relative to the clean values
       └─────► target, float32 ──► noise ──► y ──► linear, direct, modular │ steadied ──► MAP + deviation

*steadied* is a decoder that knows the noise: a Wiener filter before a trained decoder, a ridge map behind it. MAP
starts from it and searches the most probable picture with the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from tqdm.auto import tqdm

from backsight.errors import BacksightError, nearest
from backsight.exact.inverse import parts_of
from backsight.exact.map import MapInverse, MapSettings, fit_map_tap
from backsight.exact.steps import in_precision
from backsight.inverses.families import Reconstruct
from backsight.measures.pixels import psnr
from backsight.representation import Representation, concatenate
from backsight.studies.nulls import null_mean
from backsight.studies.roots import map_base
from backsight.studies.uncertainty import calibration_error, coverage, deviation, reliability
from backsight.tables.names import MAP, NULL_CONSTANT, NULL_MEAN, NULL_SHUFFLED, STEADIED
from backsight.tables.values import NO_SEED, Values
from backsight.targets.base import Target

Noise = str | float  # how a representation is stored, or σ of Gaussian noise, relative to the deviation of its values
SHOWN = 3  # images kept as pictures
ROUNDING = 2**-24 / 3**0.5  # of float32, relative: no stored value is known better, though two passes may agree
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LEVELS = 127  # of int8, on either side of zero


def noise_name(noise: Noise) -> str:
    """ "float32", "gaussian 0.1". Raises BacksightError on what is neither a format nor a finite σ above 0."""
    formats = [*STORED, "int8"]
    if isinstance(noise, str) and noise not in formats:
        raise BacksightError(f"There is no noise {noise!r}; {nearest(noise, formats)}, or a number for a Gaussian σ.")
    if not isinstance(noise, str) and not 0 < noise < math.inf:
        raise BacksightError(f"Gaussian noise has a finite σ above 0, not {noise!r}: without noise it is 'float32'.")
    return noise if isinstance(noise, str) else f"gaussian {noise:g}"


def noisy(values: Tensor, noise: Noise, generator: torch.Generator | None = None) -> Tensor:
    """values (B, n, c) as they come back from the store, or with noise; of the type they had. generator: of the CPU.

    int8: rounded to 127 steps of the largest absolute value of each sample. σ: white noise of σ times their deviation.
    """
    if not isinstance(noise, str):
        drawn = torch.randn(values.shape, generator=generator, dtype=values.dtype).to(values.device)
        return values + noise * float(values.std()) * drawn
    if noise in STORED:
        return values.to(STORED[noise]).to(values.dtype)
    step = values.flatten(1).abs().amax(1).clamp(min=1e-30)[:, None, None] / LEVELS
    return (values / step).round() * step


def disturbed(clean: Representation, tap: str, noise: Noise, seed: int = 0) -> Representation:
    """The representation as the noise leaves it: the same numbers for the same seed, tap and noise, whoever reads."""
    generator = torch.Generator().manual_seed(crc32(f"{seed} {tap} {noise_name(noise)}".encode()))
    return clean.replace(noisy(clean.values, noise, generator))


def relative_size(values: Tensor, disturbed: Tensor) -> float:
    """Root mean square of what a noise did, over the deviation of the values: its effective σ."""
    return float((disturbed.double() - values.double()).square().mean().sqrt() / values.double().std())


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
    seed: int = 0,
) -> dict[tuple[str, str], tuple[dict[str, Tensor], Tensor]]:
    """Adds what every inverse makes of every tap's representation at every noise (columns noise, sigma: as measured).

    families: {training seed: {family: {tap: reconstruction}}}; images: those of `values`; held_out: fit the MAP inverse
    of each tap and noise, from the modular, direct or linear one of each of map_seeds, and the last `checked` of them
    are solved for its gain. Measures: psnr; coverage of the MAP's posterior deviation; its calibration_error beside
    that of one constant deviation; predicted_variance and actual_variance by `bin` of it.
    Returns {(tap, noise): ({inverse: pictures of the first SHOWN images, by the first seed}, their MAP's deviation)}.
    Raises BacksightError on what is no noise, and on taps that no family reads.
    """
    first, mean = next(iter(families)), null_mean(held_out).clamp(0, 1)
    if missing := [tap for tap in taps if not any(tap in inverses for inverses in families[first].values())]:
        raise BacksightError(f"No inverse family reads {missing[0]} of {target.name}: leave it out, or train one.")
    names, double = {noise_name(noise): noise for noise in noises}, in_precision(target, torch.float64)
    shown: dict[tuple[str, str], tuple[dict[str, Tensor], Tensor]] = {}
    for tap, name in tqdm(list(product(taps, names)), desc=f"noise, {target.name}", leave=False):
        clean, exactly = _recorded(target, images, tap), _recorded(double, images.double(), tap)
        y = disturbed(clean, tap, names[name], seed)
        at = {"noise": name, "sigma": max(ROUNDING, relative_size(exactly.values, y.values))}
        read: dict[str, dict[int, Tensor]] = {MAP: {}, STEADIED: {}, NULL_SHUFFLED: {}}
        read[NULL_MEAN] = {NO_SEED: mean.expand_as(images)}
        for family in families[first]:
            if tap in families[first][family]:
                read[family] = {s: _decoded(of_seed[family][tap], y) for s, of_seed in families.items()}
        for s in map_seeds:
            draw = partial(noisy, noise=names[name], generator=torch.Generator().manual_seed(seed))
            start, effort = map_base(families[s], tap), (settings, len(held_out), checked)
            inverse = fit_map_tap(target, tap, start, held_out, draw, *effort)
            read[MAP][s], read[STEADIED][s], expected = _solved(inverse, y)
            if len(images) > 1:  # samples do not know of one another: a solution of another's representation
                read[NULL_SHUFFLED][s] = read[MAP][s].roll(1, 0)
            _add_calibration(values, s, expected, read[MAP][s] - images, {"tap": tap, **at})
            shown.setdefault((tap, name), ({}, expected[:SHOWN].clone()))
        for kind, by_seed in read.items():
            values.add("psnr", {s: psnr(images, pictures) for s, pictures in by_seed.items()}, tap, kind, **at)
            if by_seed:
                shown[tap, name][0][kind] = next(iter(by_seed.values()))[:SHOWN].clone()
    return shown


def _recorded(target: Target, images: Tensor, tap: str) -> Any:
    return concatenate([target.record(part, [tap])[tap] for part in images.split(32)])


@torch.no_grad()
def _decoded(inverse: Reconstruct, y: Representation) -> Tensor:
    return torch.cat([inverse(part) for part in parts_of(y, 32)]).clamp(0, 1)


def _solved(inverse: MapInverse, y: Representation) -> tuple[Tensor, Tensor, Tensor]:
    """The MAP's pictures and its start, the steadied decoder's (N, 3, H, W), and the deviation of the MAP's."""
    parts = []
    for part in parts_of(y, inverse.batch_size):
        posterior, solution, patches = inverse.solve(part)
        pictures = (inverse.pictures(z).clamp(0, 1) for z in (patches, posterior.mean))
        parts.append((*pictures, deviation(inverse, posterior, solution)))
    images, steadied, expected = (torch.cat(part).detach() for part in zip(*parts, strict=True))
    return images, steadied, expected


def _add_calibration(values: Values, seed: int, expected: Tensor, error: Tensor, at: Mapping[str, Any]) -> None:
    values.add("coverage", {seed: coverage(expected, error)}, inverse=MAP, **at)
    numbers, predicted, actual = reliability(expected, error)
    for inverse, of in zip((MAP, NULL_CONSTANT), calibration_error(numbers, predicted, actual), strict=True):
        values.add("calibration_error", {seed: of}, inverse=inverse, **at)
    for name, squares in (("predicted_variance", predicted), ("actual_variance", actual)):
        for place, (weight, sums) in enumerate(zip(numbers.T, squares.T, strict=True)):
            mean = sums / weight.clip(min=1)
            values.add(name, {seed: mean}, inverse=MAP, weight=weight, bin=place, **at)
