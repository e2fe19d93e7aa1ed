"""How errors grow when half-steps are inverted: singular values of the inverse's derivative.

    amplification         one half-step: white noise, and the worst direction
    chain_amplification   white noise at a tap, on its way back through all half-steps

Tokens that do not see one another have small matrices as derivatives, which are factored; half-steps of attention are
solved in Krylov spaces. An error is one so small that the derivative tells its way: roots are not changed by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.solver import Linearised, Product, gmres, solved
from backsight.exact.starts import DENSE
from backsight.exact.steps import Step

UNREACHED = 1e-3  # relative residual of a linear solve that counts as none
TIGHT = 1e-8  # relative residual that linear solves aim at


@dataclass(frozen=True)
class Amplification:
    """How an error in y grows on its way back to x, of each sample.

    mean: (B,) root mean square of |J⁻¹ e| / |e| over white noise e; largest: (B,) of all directions (where tokens see
    one another a lower bound, from power iteration); both infinite where the derivative is singular (a projection has
    no inverse), or so nearly that a Krylov space of the given size does not reach the inverse.
    """

    mean: Tensor
    largest: Tensor


def amplification(
    step: Step, x: Tensor, probes: int = 8, iterations: int = 10, krylov: int = 200, seed: int = 0
) -> Amplification:
    """Singular values of the derivative of a residual step's inverse at x (B, n, c).

    probes: noise vectors of the mean; iterations: of the power iteration on J⁻ᵀJ⁻¹.
    """
    _check(step)
    x = x.detach()
    if _factored(step, x):
        assert step.jacobian is not None
        # Tokens do not see one another: their singular values are those of small matrices.
        values = torch.linalg.svdvals(step.jacobian(x.flatten(0, 1))).view(len(x), -1)
        return Amplification((1 / values.square()).mean(1).sqrt(), 1 / values.amin(1))
    here = Linearised(step.forward, x)
    forward, backward = here.of_samples(here.product), here.of_samples(here.transposed)
    tolerance = torch.full((len(x),), TIGHT, dtype=x.dtype, device=x.device)
    generator = torch.Generator(device=x.device).manual_seed(seed)
    shape = (len(x), x[0].numel())
    with torch.no_grad():
        total = x.new_zeros(len(x))
        for _ in range(probes):
            noise = torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)
            back = _solved_product(forward, noise, tolerance, krylov)
            total += back.square().sum(1) / noise.square().sum(1)
        vector = torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)
        largest, missed = x.new_zeros(len(x)), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(iterations):
            vector = vector / vector.norm(dim=1, keepdim=True)
            back = _solved_product(forward, vector, tolerance, krylov)
            pulled = _solved_product(backward, back.nan_to_num(0.0, 0.0), tolerance, krylov)
            missed |= ~(back.isfinite().all(1) & pulled.isfinite().all(1))
            largest = back.norm(dim=1)
            vector = pulled.nan_to_num(1.0, 1.0)
    return Amplification((total / probes).sqrt(), largest.masked_fill(missed, torch.inf))


def chain_amplification(
    steps: Sequence[Step], x: Tensor, probes: int = 8, krylov: int = 200, seed: int = 0
) -> list[Tensor]:
    """Growth of white noise at the end of residual steps on its way back, at the stream before each, the last first.

    x: (B, n, c) the stream before the first step. Each (B,): root mean square over `probes` noise vectors e of
    |J⁻¹ e| / |e|, J the derivative of all steps from there on; infinite from where a solve was not reached.
    """
    for step in steps:
        _check(step)
    streams = [x.detach()]
    with torch.no_grad():
        for step in steps[:-1]:
            streams.append(step(streams[-1]))
    generator = torch.Generator(device=x.device).manual_seed(seed)
    noise = torch.randn((probes, *x.shape), generator=generator, dtype=x.dtype, device=x.device)
    size = noise.flatten(2).square().sum(2)
    grown = []
    for step, there in zip(reversed(steps), reversed(streams), strict=True):
        noise = torch.stack([_pulled_back(step, there, each, krylov) for each in noise])
        growth = (noise.flatten(2).square().sum(2) / size).mean(0).sqrt()
        grown.append(growth.nan_to_num(torch.inf, torch.inf))
    return grown


def _pulled_back(step: Step, x: Tensor, error: Tensor, krylov: int) -> Tensor:
    """d with J d = error at x (B, n, c); not finite where it was not reached."""
    if _factored(step, x):
        assert step.jacobian is not None
        return solved(step.jacobian(x.flatten(0, 1)), error.flatten(0, 1)).view_as(x)
    lost = ~error.flatten(1).isfinite().all(1)
    tolerance = torch.full((len(x),), TIGHT, dtype=x.dtype, device=x.device)
    known = error.flatten(1).masked_fill(lost[:, None], 0.0)
    here = Linearised(step.forward, x)
    found = _solved_product(here.of_samples(here.product), known, tolerance, krylov)
    return found.masked_fill(lost[:, None], torch.inf).view_as(x)


def _factored(step: Step, x: Tensor) -> bool:
    return step.tokenwise and step.jacobian is not None and x.shape[2] <= DENSE


def _check(step: Step) -> None:
    if step.norm is not None:
        raise BacksightError(
            f"{step.destination} ends in a norm, which takes the mean of every token, so that its inverse has no "
            "derivative in all directions: ask for the amplification of a residual step x + f(x)."
        )


def _solved_product(product: Product, right: Tensor, tolerance: Tensor, krylov: int) -> Tensor:
    """d with product(d) = right; infinite where there is none (or the Krylov space is too small for it)."""
    found = gmres(product, right, tolerance, krylov)[0]
    missed = (product(found, torch.arange(len(found), device=found.device)) - right).norm(dim=1)
    return found.masked_fill((missed > UNREACHED * right.norm(dim=1))[:, None], torch.inf)
