"""What the derivative of a target tells of noise: what a tap shows above it, and how it grows on the way back.

    measure_recoverable     the share of a picture's directions that a tap shows: spectra of JᵀJ by Lanczos quadrature
    measure_amplification   what the inverse of a half-step's derivative makes of white noise, alone and along a chain

The derivative of a pass is asked for products alone, so that nothing grows with the square of an image. Half-steps on
tokens that do not see one another have small matrices, which are factored; those of attention are solved in Krylov
spaces. An error is one so small that the derivative tells its way: roots are not changed by it.

Sources: Golub & Meurant, Matrices, Moments and Quadrature (2010), ch. 7; Ubaru, Chen & Saad, SIAM J. Matrix Anal. 38
(2017) (spectral densities by Lanczos quadrature).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.exact.inverse import ExactInverse
from backsight.exact.map import SIDE, Forward, pixel_forward
from backsight.exact.solver import Linearised, factored, gmres
from backsight.exact.starts import DENSE
from backsight.exact.steps import ExactModel, NotInvertibleError, Step
from backsight.inverses.rows import patchify
from backsight.tables.names import EXACT
from backsight.tables.values import Values
from backsight.targets.base import Target

UNREACHED = 1e-3  # relative residual of a linear solve that counts as none
TIGHT, KRYLOV = 1e-8, 200  # relative residual that linear solves aim at, and their products


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
    points = at.repeat(probes, 1, 1)
    for tap in taps:
        scale = float(target.record(images, [tap])[tap].values.std())
        forward = pixel_forward(target, tap, (down, across), grid)

        def whitened(w: Tensor, forward: Forward = forward) -> Tensor:
            return forward(points + w @ factor.T)

        density = spectrum(Linearised(whitened, torch.zeros_like(points)), steps, seed)
        eigenvalues, weights = (part.view(probes, len(images), -1) for part in density)
        for sigma in sigmas:
            share = recoverable(eigenvalues, weights, at[0].numel(), sigma * scale) / at[0].numel()
            values.add("recoverable", share, tap, noise=f"gaussian {sigma:g}", sigma=sigma)


def spectrum(here: Linearised, steps: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(values, weights), each (B, steps): the density of the eigenvalues of JᵀJ by Lanczos quadrature, one probe each.

    The weights of a sample sum to 1. The large values are sharp; the smallest are smeared over the gaps between them.
    steps: products (J, Jᵀ); the vectors are kept orthogonal in float64: steps · B · n · c numbers are held.
    """
    at = here.at.flatten(1)
    generator = torch.Generator(device=at.device).manual_seed(seed)
    vector = torch.randn(at.shape, generator=generator, dtype=torch.float64, device=at.device)
    basis, diagonal, beside = F.normalize(vector)[:, None], [], []
    for _ in range(min(steps, at.shape[1])):
        pushed = here.transposed(here.product(basis[:, -1].to(at).view_as(here.at))).double().flatten(1)
        diagonal.append((pushed * basis[:, -1]).sum(1))
        for _twice in range(2):  # once is not enough where a value has converged
            pushed = pushed - torch.einsum("bks,bk->bs", basis, torch.einsum("bks,bs->bk", basis, pushed))
        beside.append(pushed.norm(dim=1))
        basis = torch.cat([basis, F.normalize(pushed, eps=1e-300)[:, None]], dim=1)
    off = torch.stack(beside, 1)[:, :-1]
    matrix = torch.diag_embed(torch.stack(diagonal, 1)) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=0), vectors[:, 0].square()


def recoverable(values: Tensor, weights: Tensor, dimensions: int, least: float) -> Tensor:
    """(B,) directions, of so many dimensions (columns of J), whose singular value is above `least`.

    values, weights: (probes, B, steps) of the spectrum. NaN where `least` is below the least value that the products
    reached: what lies there is not told apart from what lies a little higher.
    """
    count = dimensions * (weights * (values > least**2)).sum(-1).mean(0)
    reached = values.amin(-1).amin(0) <= least**2
    return count if values.shape[-1] >= dimensions else torch.where(reached, count, torch.nan)


def measure_amplification(
    target: Target, tap: str, images: Tensor, values: Values, probes: int = 4, seed: int = 0
) -> None:
    """Adds `amplification` and `amplification_chain`, in decades, of every half-step (column `step`: the stream behind
    it) from the tap to where exactness ends, at the true streams of the first images of `values`.

    Adds nothing where no half-step is exact, or where one ends in a norm: it takes the mean of every token, and no
    error there has a way back. NaN where the derivative has no inverse, or a Krylov space does not reach it.
    """
    try:
        inverse = ExactInverse(ExactModel.of(target), tap)
    except NotInvertibleError:
        return
    if any(step.norm is not None for step in inverse.steps):
        return
    x = inverse.model.target.record(images.double(), [inverse.reached])[inverse.reached].values
    for step, *growths in zip(inverse.steps, *amplification(inverse.steps, x, probes, seed), strict=True):
        for measure, growth in zip(("amplification", "amplification_chain"), growths, strict=True):
            decades = growth.log10().where(growth.isfinite(), torch.nan)
            values.add(measure, decades, tap, EXACT, step=step.destination)


def amplification(
    steps: Sequence[Step], x: Tensor, probes: int = 8, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """(alone, chain), a (B,) for each step: growth |J⁻¹ e| / |e| of white noise e that comes back to before the step,
    from behind the step itself, and from behind the last one.

    x: (B, n, c) the stream before the first step, which none of them norms. Root mean squares over `probes` noise
    vectors (alone, where tokens do not see one another, over all); not finite where a solve was not reached.
    """
    with torch.no_grad():
        streams = list(accumulate(steps, lambda stream, step: step(stream), initial=x.detach()))
    generator = torch.Generator(device=x.device).manual_seed(seed)
    noise = torch.randn((probes, *x.shape), generator=generator, dtype=x.dtype, device=x.device)
    carried, alone, chain = noise, [], []
    for step, stream in zip(reversed(steps), reversed(streams[:-1]), strict=True):
        carried = _pulled_back(step, stream, carried)
        chain.append(_growth(carried, noise))
        if _factored(step, stream):
            values = torch.linalg.svdvals(step.slopes(stream.flatten(0, 1))).view(len(stream), -1)
            alone.append((1 / values.square()).mean(1).sqrt())
        else:
            alone.append(_growth(_pulled_back(step, stream, noise), noise))
    return alone[::-1], chain[::-1]


def _growth(errors: Tensor, noise: Tensor) -> Tensor:
    return (errors.flatten(2).square().sum(2) / noise.flatten(2).square().sum(2)).mean(0).sqrt()


def _pulled_back(step: Step, x: Tensor, errors: Tensor) -> Tensor:
    """d (K, B, n, c) with J d = errors at x (B, n, c); not finite where it was not reached."""
    if _factored(step, x):
        right = errors.flatten(1, 2).permute(1, 2, 0)  # of every token (c, K)
        back = torch.linalg.lu_solve(*factored(step.slopes(x.flatten(0, 1))), right)
        return back.permute(2, 0, 1).reshape(errors.shape)
    here, moves = Linearised(step.forward, x), []
    product = here.of_samples(here.product)
    for right in errors.flatten(2):
        move = gmres(product, right, torch.full_like(right[:, 0], TIGHT), KRYLOV)
        off = (product(move, torch.arange(len(move), device=x.device)) - right).norm(dim=1)
        moves.append(move.where((off <= UNREACHED * right.norm(dim=1))[:, None], torch.nan))
    return torch.stack(moves).view_as(errors)


def _factored(step: Step, x: Tensor) -> bool:
    return step.tokenwise and step.jacobian is not None and x.shape[2] <= DENSE
