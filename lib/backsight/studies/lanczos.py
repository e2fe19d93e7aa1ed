"""How many directions of a picture a tap shows more strongly than noise: spectra of JᵀJ by Lanczos quadrature.

The derivative is asked for products alone (`backsight.exact.solver.Linearised`), so that nothing grows with the square
of an image.

Sources: Golub & Meurant, Matrices, Moments and Quadrature (2010), ch. 7; Ubaru, Chen & Saad, SIAM J. Matrix Anal. 38
(2017) (spectral densities by Lanczos quadrature).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backsight.exact.map import SIDE, Forward, pixel_forward
from backsight.exact.solver import Linearised
from backsight.inverses.rows import patchify
from backsight.tables.values import Values
from backsight.targets.base import Target


def measure_recoverable(
    target: Target,
    taps: Sequence[str],
    sigmas: Sequence[float],
    images: Tensor,
    prior_images: Tensor,
    values: Values,
    steps: int = 60,
    probes: int = 2,
    seed: int = 0,
) -> None:
    """Adds `recoverable`, the share of a picture's directions that a tap shows at each σ (columns noise, sigma), of the
    first images of `values`.

    A direction counts where one deviation of the images along it (Gaussian of patches, measured on prior_images) moves
    the tap's values by more than σ of their deviation. The same prior at every tap, so that taps compare.
    """
    down, across = (min(SIDE, cell) for cell in target.reduction)
    grid, at = (images.shape[-2] // down, images.shape[-1] // across), patchify(images, (down, across))
    patches = patchify(prior_images, (down, across)).flatten(0, 1).double()
    variances, vectors = torch.linalg.eigh(torch.cov(patches.T, correction=0))
    factor = (vectors * variances.clamp(min=1e-6 * float(variances.mean())).sqrt()).to(images)
    for tap in taps:
        scale = float(target.record(images, [tap])[tap].values.std())
        forward = pixel_forward(target, tap, (down, across), grid)

        def whitened(w: Tensor, forward: Forward = forward, scale: float = scale) -> Tensor:
            return forward(at + w @ factor.T) / scale

        density = spectrum(Linearised(whitened, torch.zeros_like(at)), steps, probes, seed)
        for sigma in sigmas:
            share = recoverable(*density, at[0].numel(), sigma) / at[0].numel()
            values.add("recoverable", share, tap, noise=f"gaussian {sigma:g}", sigma=sigma)


def spectrum(here: Linearised, steps: int = 60, probes: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(values, weights), each (probes, B, steps): the density of the eigenvalues of JᵀJ by Lanczos quadrature.

    The weights of a probe sum to 1. The large values are sharp; the smallest are smeared over the gaps between them.
    steps: products (J, Jᵀ) of one probe; the vectors are kept orthogonal in float64: probes · steps · B · n · c numbers
    of a probe are held.
    """
    size, batch = here.at[0].numel(), len(here.at)
    generator = torch.Generator(device=here.at.device).manual_seed(seed)
    values, weights = [], []
    for _ in range(probes):
        vector = torch.randn((batch, size), generator=generator, dtype=torch.float64, device=here.at.device)
        basis, diagonal, beside = (vector / vector.norm(dim=1, keepdim=True))[:, None], [], []
        for _ in range(min(steps, size)):
            pushed = here.transposed(here.product(basis[:, -1].to(here.at).view_as(here.at))).double().flatten(1)
            diagonal.append((pushed * basis[:, -1]).sum(1))
            for _twice in range(2):  # once is not enough where a value has converged
                pushed = pushed - torch.einsum("bks,bk->bs", basis, torch.einsum("bks,bs->bk", basis, pushed))
            beside.append(pushed.norm(dim=1))
            basis = torch.cat([basis, (pushed / beside[-1].clamp(min=1e-300)[:, None])[:, None]], dim=1)
        off = torch.stack(beside, 1)[:, :-1]
        matrix = torch.diag_embed(torch.stack(diagonal, 1)) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
        eigenvalues, vectors = torch.linalg.eigh(matrix)
        values.append(eigenvalues.clamp(min=0))
        weights.append(vectors[:, 0].square())
    return torch.stack(values), torch.stack(weights)


def recoverable(values: Tensor, weights: Tensor, dimensions: int, sigma: float) -> Tensor:
    """(B,) directions, of so many dimensions (columns of J), seen more strongly than noise of the size σ.

    Of J as it was whitened, with a residual in units of the tap: a direction of unit prior deviation. NaN where σ is
    below the least value that the products reached: what lies there is not told apart from what lies a little higher.
    """
    count = dimensions * (weights * (values > sigma**2)).sum(-1).mean(0)
    reached = values.amin(-1).amin(0) <= sigma**2
    return count if values.shape[-1] >= dimensions else torch.where(reached, count, torch.nan)
