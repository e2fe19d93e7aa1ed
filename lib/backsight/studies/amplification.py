"""How errors grow when half-steps are inverted: singular values of the inverse's derivative.

    amplification         one half-step: white noise, and the worst direction
    chain_amplification   white noise at a tap, on its way back through all half-steps

Tokens that do not see one another have small matrices as derivatives, which are factored; half-steps of attention are
solved in Krylov spaces. An error is one so small that the derivative tells its way: roots are not changed by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.solver import Linearised, Product, gmres, solved
from backsight.exact.starts import DENSE
from backsight.exact.steps import Step

UNREACHED = 1e-3  # relative residual of a linear solve that counts as none
TIGHT, KRYLOV = 1e-8, 200  # relative residual that linear solves aim at, and their products


def amplification(step: Step, x: Tensor, probes: int = 8, iterations: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(mean (B,), largest (B,)) growth |J⁻¹ e| / |e| of an error e in y on its way back to x (B, n, c).

    mean: root mean square over white noise (where tokens see one another, `probes` vectors of it); largest: of all
    directions (there a lower bound, from so many `iterations` of the power method on J⁻ᵀJ⁻¹). Both are infinite where
    the derivative J has no inverse, or a Krylov space does not reach it.
    """
    _check(step)
    x = x.detach()
    if _factored(step, x):
        # Tokens do not see one another: their singular values are those of small matrices.
        values = torch.linalg.svdvals(step.slopes(x.flatten(0, 1))).view(len(x), -1)
        return (1 / values.square()).mean(1).sqrt(), 1 / values.amin(1)
    generator = torch.Generator(device=x.device).manual_seed(seed)
    noise = torch.randn((probes, *x.shape), generator=generator, dtype=x.dtype, device=x.device)
    vector = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device).flatten(1)
    here = Linearised(step.forward, x)
    forward, backward = here.of_samples(here.product), here.of_samples(here.transposed)
    largest = x.new_zeros(len(x))
    with torch.no_grad():
        for _ in range(iterations):
            vector = vector / vector.norm(dim=1, keepdim=True)
            back = _solved_product(forward, vector)
            vector = _solved_product(backward, back.nan_to_num(0.0, 0.0))
            reached = back.isfinite().all(1) & vector.isfinite().all(1) & largest.isfinite()
            largest = back.norm(dim=1).masked_fill(~reached, torch.inf)
            vector = vector.nan_to_num(1.0, 1.0)
    return _grown([step], [x], noise)[0], largest


def chain_amplification(steps: Sequence[Step], x: Tensor, probes: int = 8, seed: int = 0) -> list[Tensor]:
    """Growth of white noise at the end of residual steps on its way back, at the stream before each, the last first.

    x: (B, n, c) the stream before the first step. Each (B,): root mean square over `probes` noise vectors e of
    |J⁻¹ e| / |e|, J the derivative of all steps from there on; infinite from where a solve was not reached.
    """
    streams = [x.detach()]
    with torch.no_grad():
        for step in steps:
            _check(step)
            streams.append(step(streams[-1]))
    generator = torch.Generator(device=x.device).manual_seed(seed)
    noise = torch.randn((probes, *x.shape), generator=generator, dtype=x.dtype, device=x.device)
    return _grown(steps, streams[:-1], noise)


def _grown(steps: Sequence[Step], streams: Sequence[Tensor], noise: Tensor) -> list[Tensor]:
    size, grown = noise.flatten(2).square().sum(2), []
    for step, x in zip(reversed(steps), reversed(streams), strict=True):
        noise = torch.stack([_pulled_back(step, x, error) for error in noise])
        growth = (noise.flatten(2).square().sum(2) / size).mean(0).sqrt()
        grown.append(growth.nan_to_num(torch.inf, torch.inf))
    return grown


def _pulled_back(step: Step, x: Tensor, error: Tensor) -> Tensor:
    """d with J d = error at x (B, n, c); not finite where it was not reached."""
    if _factored(step, x):
        return solved(step.slopes(x.flatten(0, 1)), error.flatten(0, 1)).view_as(x)
    lost = ~error.flatten(1).isfinite().all(1, keepdim=True)
    here = Linearised(step.forward, x)
    found = _solved_product(here.of_samples(here.product), error.flatten(1).masked_fill(lost, 0.0))
    return found.masked_fill(lost, torch.inf).view_as(x)


def _factored(step: Step, x: Tensor) -> bool:
    return step.tokenwise and step.jacobian is not None and x.shape[2] <= DENSE


def _check(step: Step) -> None:
    if step.norm is not None:
        raise BacksightError(
            f"{step.destination} ends in a norm, which takes the mean of every token, so that its inverse has no "
            "derivative in all directions: ask for the amplification of a residual step x + f(x)."
        )


def _solved_product(product: Product, right: Tensor) -> Tensor:
    """d with product(d) = right; infinite where there is none (or the Krylov space is too small for it)."""
    found = gmres(product, right, torch.full_like(right[:, 0], TIGHT), KRYLOV)
    missed = (product(found, torch.arange(len(found), device=found.device)) - right).norm(dim=1)
    return found.masked_fill((missed > UNREACHED * right.norm(dim=1))[:, None], torch.inf)
