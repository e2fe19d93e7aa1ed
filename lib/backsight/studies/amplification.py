"""How errors grow when half-steps are inverted: what the inverse of their derivative makes of white noise.

Tokens that do not see one another have small matrices as derivatives, which are factored; half-steps of attention are
solved in Krylov spaces. An error is one so small that the derivative tells its way: roots are not changed by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backsight.exact.inverse import ExactInverse
from backsight.exact.solver import Linearised, gmres, solved
from backsight.exact.starts import DENSE
from backsight.exact.steps import ExactModel, NotInvertibleError, Step
from backsight.tables.names import EXACT
from backsight.tables.values import Values
from backsight.targets.base import Target

UNREACHED = 1e-3  # relative residual of a linear solve that counts as none
TIGHT, KRYLOV = 1e-8, 200  # relative residual that linear solves aim at, and their products


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
    grown = zip(inverse.steps, *amplification(inverse.steps, x, probes, seed), strict=True)
    for step, alone, chain in grown:
        for measure, growth in (("amplification", alone), ("amplification_chain", chain)):
            decades = growth.log10().where(growth.isfinite(), torch.nan)
            values.add(measure, decades, tap, EXACT, step=step.destination)


def amplification(
    steps: Sequence[Step], x: Tensor, probes: int = 8, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """(alone, chain), a (B,) for each step: growth |J⁻¹ e| / |e| of white noise e that comes back to before the step,
    from behind the step itself, and from behind the last one.

    x: (B, n, c) the stream before the first step, which none of them norms. Root mean squares over `probes` noise
    vectors (alone, where tokens do not see one another, over all); infinite where a solve was not reached.
    """
    streams = [x.detach()]
    with torch.no_grad():
        for step in steps:
            streams.append(step(streams[-1]))
    generator = torch.Generator(device=x.device).manual_seed(seed)
    noise = torch.randn((probes, *x.shape), generator=generator, dtype=x.dtype, device=x.device)
    carried, alone, chain = noise, [], []
    for step, stream in zip(reversed(steps), reversed(streams[:-1]), strict=True):
        carried = torch.stack([_pulled_back(step, stream, error) for error in carried])
        chain.append(_growth(carried, noise))
        if _factored(step, stream):
            values = torch.linalg.svdvals(step.slopes(stream.flatten(0, 1))).view(len(stream), -1)
            alone.append((1 / values.square()).mean(1).sqrt())
        else:
            alone.append(_growth(torch.stack([_pulled_back(step, stream, error) for error in noise]), noise))
    return alone[::-1], chain[::-1]


def _growth(errors: Tensor, noise: Tensor) -> Tensor:
    ratio = errors.flatten(2).square().sum(2) / noise.flatten(2).square().sum(2)
    return ratio.mean(0).sqrt().nan_to_num(torch.inf, torch.inf)


def _pulled_back(step: Step, x: Tensor, error: Tensor) -> Tensor:
    """d with J d = error at x (B, n, c); not finite where it was not reached."""
    if _factored(step, x):
        return solved(step.slopes(x.flatten(0, 1)), error.flatten(0, 1)).view_as(x)
    lost = ~error.flatten(1).isfinite().all(1)
    here, right = Linearised(step.forward, x), error.flatten(1).masked_fill(lost[:, None], 0.0)
    product = here.of_samples(here.product)
    back = gmres(product, right, torch.full_like(right[:, 0], TIGHT), KRYLOV)
    off = (product(back, torch.arange(len(back), device=x.device)) - right).norm(dim=1)
    return back.masked_fill((lost | (off > UNREACHED * right.norm(dim=1)))[:, None], torch.inf).view_as(x)


def _factored(step: Step, x: Tensor) -> bool:
    return step.tokenwise and step.jacobian is not None and x.shape[2] <= DENSE
