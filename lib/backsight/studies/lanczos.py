"""How much of a picture survives when its representation is known only up to noise.

    spectrum(linearised)                    how strongly each direction of the picture shows at a tap: Lanczos on JᵀJ
    recoverable(spectrum, sigma)            how many directions show more strongly than noise of the size σ
    recoverable_directions(target, tap, …)  the same of a tap, with the images' own Gaussian of patches as prior
    least_seen(linearised)                  the directions that show least: what an error looks like
    relative_size(values, disturbed)        how large a noise was

The derivative is asked for products alone (`backsight.exact.solver.Linearised`), so that nothing grows with the square
of an image.

Sources: Golub & Meurant, Matrices, Moments and Quadrature (2010), ch. 7, and Ubaru, Chen & Saad, SIAM J. Matrix Anal.
38 (2017) (spectral densities by Lanczos quadrature); Halko, Martinsson & Tropp, SIAM Review 53 (2011) (subspace
iteration).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backsight.exact.map import pixel_forward
from backsight.exact.solver import Linearised, conjugate_gradients
from backsight.exact.steps import Embedding
from backsight.inverses.rows import patchify
from backsight.targets.base import Target


def relative_size(values: Tensor, disturbed: Tensor) -> float:
    """Root mean square of what a noise did, over the deviation of the values: its effective σ."""
    return float((disturbed.double() - values.double()).square().mean().sqrt() / values.double().std())


# How strongly directions show


def spectrum(here: Linearised, steps: int = 60, probes: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(values, weights), each (probes, B, steps): the density of the eigenvalues of JᵀJ by Lanczos quadrature.

    The weights of a probe sum to 1. The large values are sharp; the smallest are smeared over the gaps between them.
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
    return torch.stack(values), torch.stack(weights)


def recoverable(values: Tensor, weights: Tensor, dimensions: int, sigma: float) -> Tensor:
    """(B,) directions, of so many dimensions (columns of J), seen more strongly than noise of the size σ.

    Of J as it was whitened: with z = m + w Lᵀ and a residual in units of the tap, a direction of unit prior deviation.
    NaN where σ is below the least value that the products reached: what lies there, a null space say, is not told apart
    from what lies a little higher (take more steps, or leave a known null space out of the columns).
    """
    count = dimensions * (weights * (values > sigma**2)).sum(-1).mean(0)
    reached = values.amin(-1).amin(0) <= sigma**2
    return count if values.shape[-1] >= dimensions else torch.where(reached, count, torch.nan)


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

    def orthonormal(rows: Tensor) -> Tensor:
        return torch.linalg.qr(rows.flatten(2).permute(1, 2, 0))[0].permute(2, 0, 1).reshape(rows.shape)

    block = orthonormal(block)
    for _ in range(iterations):
        block = orthonormal(torch.stack([conjugate_gradients(operator, each, products, 1e-6) for each in block]))
    pushed = torch.stack([operator(each) for each in block])
    small = torch.einsum("kbs,lbs->bkl", block.flatten(2), pushed.flatten(2))
    left, vectors = torch.linalg.eigh((small + small.mT) / 2)
    turned = torch.einsum("kbs,bkl->lbs", block.flatten(2), vectors).reshape(block.shape)
    return turned, (1 / left.clamp(min=1.0)).T


# How many a tap shows


def recoverable_directions(
    target: Target,
    tap: str,
    images: Tensor,
    prior_images: Tensor,
    patch: tuple[int, int],
    sigmas: Sequence[float],
    scale: float,
    embedding: Embedding | None = None,
    steps: int = 60,
    probes: int = 2,
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
    values, weights = spectrum(here, steps, probes, seed)
    dimensions = here.at[0].numel()
    counts = {sigma: recoverable(values, weights, dimensions, sigma) for sigma in sigmas}
    return counts, at[0].numel(), dimensions
