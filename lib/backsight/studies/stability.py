"""What noise costs each inverse, tap by tap: decoders, the most probable picture, and exact solves, on the same values.

    images ──► target, float64 ──► clean           σ = size of what the noise did, relative to the clean values
       └─────► target, float32 ──► noise ──► y ──► linear, direct, modular │ steadied ──► map + deviation │ exact

For every tap and noise one disturbed representation is drawn, and all inverses read that one. Beside the scores: which
directions of a picture a tap shows more strongly than the noise, how much a half-step's inverse amplifies, whether the
MAP inverse knows where it is wrong, and what the directions that it cannot know look like.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import ImageSource, batches
from backsight.errors import BacksightError, nearest
from backsight.exact.inverse import ExactInverse, parts_of
from backsight.exact.map import MapInverse, MapSettings, MapSolution, Posterior
from backsight.exact.solver import Linearised
from backsight.exact.steps import Embedding, ExactModel, NotInvertibleError, in_precision, measured_embedding
from backsight.inverses.families import Reconstruct
from backsight.measures.pixels import psnr
from backsight.representation import Representation, concatenate
from backsight.studies.amplification import amplification, chain_amplification
from backsight.studies.lanczos import least_seen, recoverable_directions, relative_size
from backsight.studies.nulls import null_mean
from backsight.studies.roots import map_base
from backsight.studies.tidy_rows import TidyRows
from backsight.studies.uncertainty import Uncertainty, reliability
from backsight.tables.names import EXACT, MAP, NULL_MEAN, NULL_SHUFFLED, STEADIED
from backsight.targets.base import Target

BEST = "best"  # of the trained decoders that are not linear, at that tap and noise
SHOWN = 3  # images kept as pictures
TOGETHER = 8  # images solved at once
ROUNDING = 2**-24 / 3**0.5  # of float32, relative: no stored value is known better, though two passes may agree
COLUMNS = ("noise", "sigma", "seeds", "against", "step", "note")
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LEVELS = 127  # of int8, on either side of zero
Job = tuple[str, str]  # tap, name of the noise


@dataclass(frozen=True)
class Probes:
    """How much is spent on what needs products with derivatives.

    images: of a spectrum and of amplifications, the first ones; vectors, steps: of a Lanczos quadrature;
    directions: least-seen ones of an image, found in `iterations` of `products` pairs (J, Jᵀ) each;
    amplified: noise vectors, and steps of the power iteration, of a half-step's amplification (0: not measured).
    """

    images: int = 4
    vectors: int = 2
    steps: int = 60
    directions: int = 3
    iterations: int = 3
    products: int = 30
    amplified: int = 4


@dataclass
class Stability:
    """metrics: tidy rows, METRIC_COLUMNS and noise, sigma (effective, relative), seeds, against, step, note.

    reliability: tap, noise, sigma, bin, predicted, actual, n, and `constant`, the deviation of the constant null;
    images: (k, 3, H, W), the first ones; pictures: {(tap, noise): {inverse: (k, 3, H, W)}} of the first training seed
    (exact: at most `exact_images`); deviations: {(tap, noise): (predicted, actual), each (k, H, W)} root mean square
    over the channels; directions: {tap: (patterns (d, 3, H, W), (d,) share of the prior's variance left)} of the first
    image at the least noise; random_directions: {tap: patterns of random directions of that prior}.
    """

    images: Tensor
    metrics: pd.DataFrame = field(default_factory=pd.DataFrame)
    reliability: pd.DataFrame = field(default_factory=pd.DataFrame)
    pictures: dict[Job, dict[str, Tensor]] = field(default_factory=dict)
    deviations: dict[Job, tuple[Tensor, Tensor]] = field(default_factory=dict)
    directions: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    random_directions: dict[str, Tensor] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------- noises


@dataclass(frozen=True)
class Noise:
    """kind: how a representation is stored, or "gaussian"; sigma: of Gaussian noise, relative to the deviation of the
    values at that tap (ignored by the other kinds)."""

    kind: str
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
    drawn = torch.randn(values.shape, generator=generator, dtype=values.dtype).to(values.device)
    return values + noise.sigma * float(values.std()) * drawn


def parse_noises(noises: Sequence[str | float]) -> list[Noise]:
    """Noises from names of a format ("float32", "int8", …) and sizes σ above 0 of Gaussian noise.

    σ is relative to the deviation of the tap's values. Raises BacksightError on anything else, and on one named twice.
    """
    formats = [*STORED, "int8"]
    if isinstance(noises, str) or not len(noises):
        raise BacksightError(f"Noises are a list such as ['float32', 'int8', 0.01], not {noises!r}.")
    parsed = {}
    for name in noises:
        try:
            noise = Noise(str(name)) if name in formats else Noise("gaussian", float(name))
        except ValueError:
            raise BacksightError(
                f"There is no noise {name!r}; {nearest(str(name), formats)}, or a number above 0 for a Gaussian σ."
            ) from None
        if noise.kind == "gaussian" and not 0 < noise.sigma < math.inf:
            raise BacksightError(f"Gaussian noise has a finite σ above 0, not {name!r}: without noise it is 'float32'.")
        if noise.name in parsed:
            raise BacksightError(f"The noise {noise.name!r} is there twice: name every noise once.")
        parsed[noise.name] = noise
    return list(parsed.values())


def disturbed(clean: Representation, tap: str, noise: Noise, seed: int = 0) -> Representation:
    """The representation as the noise leaves it: the same numbers for the same seed, tap and noise, whoever reads."""
    generator = torch.Generator(device=clean.values.device)
    generator.manual_seed(crc32(f"{seed} {tap} {noise.name}".encode()))
    return clean.replace(noisy(clean.values, noise, generator))


# ----------------------------------------------------------------------------------------------------------- the MAP


def _solved(uncertainty: Uncertainty, y: Representation) -> tuple[list[Tensor], tuple[Posterior, MapSolution]]:
    """([images, steadied (N, 3, H, W), deviation (N, H, W), misfit (N,)], (posterior, solution) of the first batch)."""
    inverse, made = uncertainty.inverse, []
    first: Any = None
    for part in parts_of(y, TOGETHER):
        posterior, solution, patches = inverse.solve(part)
        first = first or (posterior, solution)
        pictures = [inverse.pictures(z).clamp(0, 1) for z in (patches, posterior.mean)]
        made.append((*pictures, uncertainty.deviation(posterior, solution), solution.misfit))
    return [torch.cat(parts).detach() for parts in zip(*made, strict=True)], first


def _directions(
    inverse: MapInverse, posterior: Posterior, solution: MapSolution, probes: Probes, seed: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((patterns (d, 3, H, W), (d,) share of the prior's variance left), patterns of random directions), first image.

    About the MAP solution, with the noise taken larger where the residual is larger than it says, as for its draws.
    """
    residual = posterior.residual(solution.stage)
    excess = solution.misfit.clamp(min=1.0).sqrt().to(solution.w)[:, None, None]
    here = Linearised(lambda w: residual(w) / excess, solution.w)
    seen, left = least_seen(here, probes.directions, probes.iterations, probes.products, seed)
    generator = torch.Generator(device=seen.device).manual_seed(seed)
    random = torch.randn(seen.shape, generator=generator, dtype=seen.dtype, device=seen.device)
    random = random / random.flatten(2).norm(dim=2)[:, :, None, None]
    seen, random = (
        torch.stack([inverse.pictures(direction @ posterior.factor.T) for direction in directions])[:, 0]
        for directions in (seen, random)
    )
    return (seen.detach(), left[:, 0].detach()), random


# ---------------------------------------------------------------------------------------------------------- the study


@dataclass(frozen=True)
class _Study:
    """What every job needs (the names are those of `measure_stability`), and what the jobs leave behind."""

    target: Target
    double: Target
    families: Mapping[int, Mapping[str, Mapping[str, Reconstruct]]]
    noises: list[Noise]
    images: Tensor
    held_out: Tensor
    exact: Mapping[str, ExactInverse]
    exact_images: int
    settings: MapSettings
    checked: int
    probes: Probes
    seed: int
    rows: TidyRows
    made: Stability


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
    fitted: int = 128,
    checked: int = 8,
    probes: Probes | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Stability:
    """What every inverse makes of every tap's representation at every noise, and what noise takes away.

    families: {training seed: {family: {tap: reconstruction}}} (`families_by_seed`); taps that no family of the first
    seed has are refused; noises: as `parse_noises`; images: to judge on; calibration: held-out ones, of which the first
    `fitted` fit the MAP inverse of every tap and noise (from the first seed's modular, direct or linear) and `checked`
    are solved for its gain (`fit_map`); exact: {tap: exact inverse}, judged on the first `exact_images`; settings: of
    the search. Measures: psnr, psnr_difference; misfit; solved; calibration_error and coverage of the MAP's deviation
    beside those of a constant; recoverable, dimensions; amplification_mean, amplification_largest of every half-step
    from the last tap to where exactness ends, and amplification_chain of all from there to the last tap. MAP − decoder
    is paired image by image; `against` = "best" is the best of the trained decoders that are not linear at that tap and
    noise, chosen on the judged images, in its favour.
    Raises BacksightError on a target that is not float32, and on noises or taps that do not fit.
    """
    parsed, taps = parse_noises(noises), target.resolve_taps(taps)
    if target.dtype != torch.float32:
        raise BacksightError(f"Stability is measured of float32 weights, but {target.name} has {target.dtype}.")
    first = next(iter(families.values()))
    if missing := [tap for tap in taps if not any(tap in made for made in first.values())]:
        raise BacksightError(f"No inverse family reads {missing[0]} of {target.name}: leave it out, or train one.")
    pictures = torch.cat(list(batches(images, 64)))
    dataset, split = (None, None) if isinstance(images, Tensor) else (images.name, images.split)
    double = in_precision(target, torch.float64)
    rows, made = TidyRows.about(target, dataset, split, seed), Stability(pictures[:SHOWN])
    held_out, exact_images = next(batches(calibration, fitted)), min(exact_images, len(pictures))
    effort = settings or MapSettings(), checked, probes or Probes(), seed
    study = _Study(target, double, families, parsed, pictures, held_out, exact or {}, exact_images, *effort, rows, made)
    # A module's own target tells its values in float32, whatever the precision of its pass.
    wide = double.record(pictures[:1].double(), taps[:1])[taps[0]].values.dtype == torch.float64
    embedding = measured_embedding(double if wide else target)
    tables: list[pd.DataFrame] = []
    total = len(taps) * (len(parsed) + 1) + 1
    with tqdm(total=total, desc=f"stability of {target.name}", leave=False, disable=not progress) as bar:
        for tap in taps:
            tables += _measure_tap(study, tap, embedding, bar.update)
        if study.probes.amplified:
            _measure_amplification(study, taps[-1])
        bar.update()
    made.metrics, made.reliability = rows.table(*COLUMNS), pd.concat(tables, ignore_index=True)
    return made


def _recorded(target: Target, images: Tensor, tap: str, size: int = 32) -> Representation:
    recorded: list[Any] = [target.record(part, [tap])[tap] for part in images.split(size)]  # of one form
    return concatenate(recorded)


def _measure_tap(
    study: _Study, tap: str, embedding: Embedding | None, done: Callable[[], Any]
) -> Iterable[pd.DataFrame]:
    """One noise after the other, of which nothing stays but scores and the first pictures; tables of reliability."""
    clean = _recorded(study.target, study.images, tap)
    double = _recorded(study.double, study.images.double(), tap).values
    sigmas = {
        noise: max(ROUNDING, relative_size(double, disturbed(clean, tap, noise, study.seed).values))
        for noise in study.noises
    }
    least = min(study.noises, key=sigmas.__getitem__)
    tables = []
    for noise, sigma in sigmas.items():
        columns = {"noise": noise.name, "sigma": sigma}
        y = disturbed(clean, tap, noise, study.seed)
        by_seed = list(study.families.values())
        uncertainty = Uncertainty.fitted(
            study.target, tap, map_base(by_seed[0], tap), study.held_out,
            partial(noisy, noise=noise, generator=torch.Generator().manual_seed(study.seed)),
            study.settings, len(study.held_out), study.checked,
        )  # fmt: skip
        (images, steadied, deviation, misfit), solution = _solved(uncertainty, y)
        study.rows.pooled(misfit, "misfit", tap, MAP, **columns)
        _score(study, tap, y, images, steadied, columns)
        tables.append(_measure_uncertainty(study, tap, deviation, images - study.images, columns))
        if noise is least:
            made = study.made
            made.directions[tap], made.random_directions[tap] = _directions(
                uncertainty.inverse, *solution, study.probes, study.seed
            )
        done()
    _measure_recoverable(study, tap, uncertainty.inverse.patch, float(clean.values.std()), embedding)
    done()
    return tables


def _score(
    study: _Study, tap: str, y: Representation, solved: Tensor, steadied: Tensor, columns: Mapping[str, Any]
) -> None:
    """PSNR of every inverse, and MAP − the best trained one."""
    images, rows = study.images, study.rows
    made: dict[str, list[Tensor]] = {}
    for by_family in study.families.values():
        for family, inverses in by_family.items():
            if tap in inverses:
                with torch.no_grad():
                    pictures = torch.cat([inverses[tap](part) for part in parts_of(y, 32)]).clamp(0, 1)
                made.setdefault(family, []).append(pictures)
    trained = list(made)
    made |= {STEADIED: [steadied], MAP: [solved]}
    if len(images) > 1:  # samples do not know of one another: another image's solution is the one of its representation
        made[NULL_SHUFFLED] = [solved.roll(1, 0)]
    made[NULL_MEAN] = [null_mean(study.held_out).clamp(0, 1).expand_as(images)]
    if tap in study.exact:
        part = y.index(torch.arange(study.exact_images))
        trace = study.exact[tap].trace(part)
        made[EXACT] = [study.exact[tap].images(trace, part)]
        rows.pooled(trace.solved.double(), "solved", tap, EXACT, **columns)
    scores: dict[str, np.ndarray] = {}
    for name, by_seed in made.items():
        scores[name] = np.full((len(by_seed), len(images)), np.nan)
        for line, pictures in zip(scores[name], by_seed, strict=True):
            line[: len(pictures)] = psnr(images[: len(pictures)], pictures).double().numpy()
        rows.pooled(scores[name], "psnr", tap, name, **columns)
    study.made.pictures[tap, columns["noise"]] = {name: by_seed[0][:SHOWN].clone() for name, by_seed in made.items()}
    candidates = [name for name in trained if name != "linear"] or trained
    best = max(candidates, key=lambda name: float(scores[name].mean()))
    gain = scores[MAP] - scores[best][:1]
    rows.pooled(gain, "psnr_difference", tap, MAP, against=BEST, note=f"best: {best}", **columns)


def _measure_uncertainty(
    study: _Study, tap: str, deviation: Tensor, error: Tensor, columns: Mapping[str, Any]
) -> pd.DataFrame:
    table, judged = reliability(deviation, error, study.seed)
    for inverse, (interval, coverage) in judged.items():
        study.rows.one(interval, "calibration_error", tap, inverse, len(error), seeds=1, **columns)
        study.rows.pooled(coverage, "coverage", tap, inverse, **columns)
    actual = error[:SHOWN].square().mean(1).sqrt()
    study.made.deviations[tap, columns["noise"]] = (deviation[:SHOWN].clone(), actual)
    return table.assign(target=study.target.name, tap=tap, depth=study.target.depth(tap), **columns)


def _measure_recoverable(
    study: _Study, tap: str, patch: tuple[int, int], scale: float, embedding: Embedding | None
) -> None:
    gaussian = {noise.sigma: noise.name for noise in study.noises if noise.kind == "gaussian"}
    some = study.images[: study.probes.images]
    effort = {"steps": study.probes.steps, "probes": study.probes.vectors, "seed": study.seed}
    counts, dimensions, embedded = recoverable_directions(
        study.target, tap, some, study.held_out, patch, list(gaussian), scale, embedding, **effort
    )
    for sigma, values in counts.items():
        note = "the products did not reach σ: take more steps" if bool(values.isnan().any()) else None
        study.rows.pooled(values, "recoverable", tap, None, noise=gaussian[sigma], sigma=sigma, note=note)
    for measure, value in (("dimensions", dimensions), ("dimensions_embedded", embedded)):
        study.rows.one((float(value),) * 3, measure, tap, None, len(some))


def _measure_amplification(study: _Study, tap: str) -> None:
    """Of every residual half-step down to where exactness ends, at the true stream; alone, and all down to there."""
    probes = study.probes
    try:
        inverse = ExactInverse(ExactModel.of(study.target), tap)
    except NotInvertibleError:
        return
    steps = inverse.model.between(tap, inverse.reached)
    if any(step.norm is not None for step in steps):
        return  # a norm takes the mean of its tokens: no error there has a way back
    x = study.double.record(study.images[: probes.images].double(), [inverse.reached])[inverse.reached].values
    grown = chain_amplification(steps, x, probes.amplified, seed=study.seed)[::-1]
    stream = inverse.model.taps
    places = sorted(stream, key=stream.__getitem__)
    for number, (step, chain) in enumerate(zip(steps, grown, strict=True), stream[inverse.reached] + 1):
        mean, largest = amplification(step, x, probes.amplified, probes.amplified, seed=study.seed)
        behind = next(name for name in places if stream[name] >= number)
        # Without an inverse the power iteration has no bound either, and ends at 0.
        bounded = mean.isfinite() & largest.isfinite() & (largest > 0)
        measured = {"mean": mean.where(bounded, torch.nan), "largest": largest.where(bounded, torch.nan)}
        for measure, values in (measured | {"chain": chain.where(chain.isfinite(), torch.nan)}).items():
            missing = int(values.isnan().sum())
            note = f"no inverse was reached for {missing} of {len(values)} images" if missing else None
            place = {"step": step.destination, "against": tap if measure == "chain" else None, "note": note}
            study.rows.pooled(values, f"amplification_{measure}", behind, EXACT, **place)
        with torch.no_grad():
            x = step(x)
