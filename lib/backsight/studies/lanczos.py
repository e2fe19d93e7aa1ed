"""How much of a picture survives when its representation is known only up to noise.

    spectrum(linearised)                    how strongly each direction of the picture shows at a tap: Lanczos on JᵀJ
    recoverable(spectrum, sigma)            how many directions show more strongly than noise of the size σ
    least_seen(linearised)                  the directions that show least: what an error looks like
    noise_gain(inverse, y, sizes)           how much an inverse amplifies noise, measured
    crossing(sigmas, decoder, exact)        the noise from which on a trained decoder beats an exact solve
    reliability(predicted, actual)          whether a predicted uncertainty means what it says, and its number

The derivative is asked for products alone (`backsight.exact.solver.Linearised`), so that nothing grows with the square
of an image.

Sources: Golub & Meurant, Matrices, Moments and Quadrature (2010), ch. 7, and Ubaru, Chen & Saad, SIAM J. Matrix Anal.
38 (2017) (spectral densities by Lanczos quadrature); Halko, Martinsson & Tropp, SIAM Review 53 (2011) (subspace
iteration); Levi et al., Sensors 22 (2022) (expected normalised calibration error of a regression's uncertainty).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.map import KINDS, Noise, noisy
from backsight.exact.solver import Linearised, conjugate_gradients, dot

__all__ = [
    "KINDS",
    "Noise",
    "Reliability",
    "Spectrum",
    "crossing",
    "least_seen",
    "noise_gain",
    "noisy",
    "recoverable",
    "relative_size",
    "reliability",
    "spectrum",
]

NORMAL_95 = 1.959964  # deviations on either side that hold 95 % of a normal distribution


def relative_size(values: Tensor, disturbed: Tensor) -> float:
    """Root mean square of what a noise did, over the deviation of the values: its effective σ."""
    return float((disturbed.double() - values.double()).square().mean().sqrt() / values.double().std())


# How strongly directions show


@dataclass(frozen=True)
class Spectrum:
    """Squared singular values of a derivative J, as a quadrature of their density.

    values, weights: (probes, B, steps); the weights of a probe sum to 1. dimensions: columns of J (the null space
    counted). The large ones are sharp; the smallest are smeared over the gaps between the values.
    """

    values: Tensor
    weights: Tensor
    dimensions: int


def spectrum(here: Linearised, steps: int = 60, probes: int = 2, seed: int = 0) -> Spectrum:
    """The density of the eigenvalues of JᵀJ by Lanczos quadrature, for every sample of a batch.

    steps: products (J, Jᵀ) of one probe; the vectors are kept orthogonal in float64: probes · steps · B · n · c numbers
    of a probe are held.
    """
    shape = here.at.shape
    size = here.at[0].numel()
    generator = torch.Generator(device=here.at.device).manual_seed(seed)
    values, weights = [], []
    for _ in range(probes):
        vector = torch.randn((shape[0], size), generator=generator, dtype=torch.float64, device=here.at.device)
        basis = [vector / vector.norm(dim=1, keepdim=True)]
        diagonal, beside = [], []
        for number in range(min(steps, size)):
            direction = basis[-1].to(here.at).view(shape)
            pushed = here.transposed(here.product(direction)).double().flatten(1)
            diagonal.append((pushed * basis[-1]).sum(1))
            known = torch.stack(basis, dim=1)
            for _twice in range(2):  # once is not enough where a value has converged
                pushed = pushed - torch.einsum("bks,bk->bs", known, torch.einsum("bks,bs->bk", known, pushed))
            length = pushed.norm(dim=1)
            if number + 1 == min(steps, size):
                break
            beside.append(length)
            basis.append(pushed / length.clamp(min=1e-300)[:, None])
        matrix = torch.diag_embed(torch.stack(diagonal, 1))
        if beside:
            off = torch.stack(beside, 1)
            matrix = matrix + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
        found, vectors = torch.linalg.eigh(matrix)
        values.append(found.clamp(min=0))
        weights.append(vectors[:, 0].square())
    return Spectrum(torch.stack(values), torch.stack(weights), size)


def recoverable(found: Spectrum, sigma: float) -> Tensor:
    """(B,) directions whose singular value is above σ: seen more strongly than noise of that size.

    Of J as it was whitened: with z = m + w Lᵀ and a residual in units of the tap, a direction of unit prior deviation.
    NaN where σ is below the least value that the products reached: what lies there, a null space say, is not told apart
    from what lies a little higher (take more steps, or leave a known null space out of the columns).
    """
    if sigma < 0:
        raise BacksightError(f"A noise has a size from 0, not {sigma}.")
    count = found.dimensions * (found.weights * (found.values > sigma**2)).sum(-1).mean(0)
    reached = found.values.amin(-1).amin(0) <= sigma**2
    whole = found.values.shape[-1] >= found.dimensions
    return count if whole else torch.where(reached, count, torch.nan)


def least_seen(
    here: Linearised, count: int = 3, iterations: int = 4, products: int = 40, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(directions (count, B, n, c) of unit length, (count, B) share of the prior's variance that is left in them).

    The top eigenvectors of (1 + JᵀJ)⁻¹, by subspace iteration with conjugate gradients: where an error may lie that
    neither representation nor noise level rules out. The widest comes first.
    """
    shape = here.at.shape
    generator = torch.Generator(device=here.at.device).manual_seed(seed)
    block = torch.randn((count, *shape), generator=generator, dtype=here.at.dtype, device=here.at.device)

    def operator(direction: Tensor) -> Tensor:
        return here.transposed(here.product(direction)) + direction

    def orthonormal(each: Tensor) -> Tensor:
        return torch.linalg.qr(each.flatten(2).permute(1, 2, 0))[0].permute(2, 0, 1).reshape(each.shape)

    block = orthonormal(block)
    for _ in range(iterations):
        block = orthonormal(torch.stack([conjugate_gradients(operator, each, products, 1e-6)[0] for each in block]))
    pushed = torch.stack([operator(each) for each in block])
    small = torch.einsum("kbs,lbs->bkl", block.flatten(2), pushed.flatten(2))
    left, vectors = torch.linalg.eigh((small + small.mT) / 2)
    turned = torch.einsum("kbs,bkl->lbs", block.flatten(2), vectors).reshape(block.shape)
    return turned, (1 / left.clamp(min=1.0)).T


# How noise grows


def noise_gain(inverse: Callable[[Tensor], Tensor], y: Tensor, size: float, probes: int = 8, seed: int = 0) -> Tensor:
    """(B,) root mean square of |g(y + e) − g(y)| / |e| over white noise e of the given size (absolute).

    For a linear inverse ‖g‖_F / √columns whatever the size; a model's exact inverse, where it is one, amplifies alike
    only as long as the noise stays within its linear range, and an infinite or undefined value is one that left it.
    """
    generator = torch.Generator(device=y.device).manual_seed(seed)
    clean, total = inverse(y).double(), torch.zeros(len(y), dtype=torch.float64)
    for _ in range(probes):
        noise = size * torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        moved = inverse(y + noise).double() - clean
        total += dot(moved, moved) / dot(noise, noise)
    return (total / probes).sqrt()


def crossing(sigmas: Sequence[float], decoder: Sequence[float], exact: Sequence[float]) -> float:
    """The least σ from which on the decoder's score is the higher one, by interpolation in log σ.

    sigmas: ascending, above 0; decoder, exact: scores (PSNR, dB). 0 where the decoder is ahead at all of them,
    infinite where it is behind at the last.
    """
    lengths = {len(sigmas), len(decoder), len(exact)}
    if len(lengths) != 1 or not sigmas or min(sigmas) <= 0 or list(sigmas) != sorted(sigmas):
        raise BacksightError("crossing() takes ascending sigmas above 0 and as many scores of either inverse.")
    ahead = [a - b for a, b in zip(decoder, exact, strict=True)]
    behind = [number for number, each in enumerate(ahead) if not each > 0]
    if not behind:
        return 0.0
    last = behind[-1]
    if last == len(sigmas) - 1:
        return math.inf
    share = -ahead[last] / (ahead[last + 1] - ahead[last])
    low, high = math.log(sigmas[last]), math.log(sigmas[last + 1])
    return math.exp(low + share * (high - low))


# Whether an uncertainty means what it says


@dataclass(frozen=True)
class Reliability:
    """A reliability curve and its numbers.

    table: a row a bin of equally many pixels, by predicted deviation: `predicted` and `actual` root mean square, `n`;
    calibration_error: mean over bins of |actual − predicted| / predicted (0 is perfect); coverage: share of errors
    within 1.96 predicted deviations (0.95 of normal errors of the right size); correlation: of ranks, predicted with
    actual: whether the map says where.
    """

    table: pd.DataFrame
    calibration_error: float
    coverage: float
    correlation: float


def reliability(predicted: Tensor, error: Tensor, bins: int = 10) -> Reliability:
    """predicted: deviations above 0; error: what went wrong, of the same shape, or with one more axis behind the first
    (channels: (B, 3, H, W) beside (B, H, W)) that share a prediction. Raises BacksightError on other shapes."""
    if error.ndim == predicted.ndim + 1 and error[:, 0].shape == predicted.shape:
        predicted = predicted[:, None].expand_as(error)
    if error.shape != predicted.shape or not bool((predicted > 0).all()):
        raise BacksightError(
            f"reliability() takes deviations above 0 and errors of one shape, not {tuple(predicted.shape)} and "
            f"{tuple(error.shape)}."
        )
    deviation, away = predicted.flatten().double(), error.flatten().double()
    order = deviation.argsort()
    rows = []
    for p, a in zip(deviation[order].chunk(bins), away[order].chunk(bins), strict=True):
        rows.append(
            {"predicted": float(p.square().mean().sqrt()), "actual": float(a.square().mean().sqrt()), "n": len(p)}
        )
    table = pd.DataFrame(rows)
    off = float(((table["actual"] - table["predicted"]).abs() / table["predicted"]).mean())
    coverage = float((away.abs() <= NORMAL_95 * deviation).double().mean())
    ranks = torch.stack([each.argsort().argsort().double() for each in (deviation, away.abs())])
    return Reliability(table, off, coverage, float(torch.corrcoef(ranks)[0, 1]))
