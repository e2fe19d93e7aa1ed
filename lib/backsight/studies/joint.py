"""A whole chain of half-steps solved at once: T(x) = y for the first stream, all equations of it together.

    x ──► half-step ──► half-step ──► … ──► T(x)          one Gauss–Newton step moves x so that T(x) comes to y
          └ J₁            └ J₂                 in the span of  J₁⁻¹ J₂⁻¹ … r (damped, several times), Jᵀr, last steps

Solved one by one, each half-step has to choose among its own roots, and a wrong choice is final. Solved together, the
roots have to agree: the first stream's prefix tokens (class, registers) are the same for every image, so that T has
more equations than unknowns, and what fits all of them to round-off is the picture that was there, up to accidents.
The price is a search from a good start (a MAP inverse). The damped inverses of the half-steps precondition it.

Sources: Nocedal & Wright, Numerical Optimization (2006), ch. 10.3; Saad, SIAM J. Sci. Comput. 14 (1993) (flexible
GMRES: a preconditioner that is itself a few steps of a solver).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor

from backsight.exact.solver import Linearised, Settings, Solution, gmres, newton
from backsight.exact.steps import Step

GOAL, END = 1e-10, 1e-12  # relative residuals: of what counts as solved, and at which a sample rests
DAMPINGS = (0.0, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)  # of a step within the span, shares of its largest value
DAMPED = (0.0, 1e-3, 1e-2, 1e-1)  # of the half-steps' inverses, absolute: their derivatives are 1 + f′
CYCLES = 2  # of such inverses in one step, each of what the last left
KRYLOV, LOOSE = 60, 1e-2  # products and tolerance of the inverse of a step that mixes tokens
MEMORY = 6  # last steps that are kept as directions
SHORTEST = 0.15  # least length of a step
LEAST = 0.995  # share of the residual that five steps may keep before a sample is given up


def through(steps: Sequence[Step], x: Tensor) -> Tensor:
    """The last stream of a chain, x the first."""
    return reduce(lambda stream, step: step(stream), steps, x)


@torch.no_grad()
def solve_joint(
    steps: Sequence[Step],
    singles: Sequence[Step],
    y: Tensor,
    start: Tensor,
    known: int = 0,
    iterations: int = 30,
    precision: torch.dtype = torch.float32,
) -> Solution:
    """x with T(x) = y from a start, T the steps one after the other; none may have a norm behind it.

    steps: in y's precision; singles: the same in `precision`, that of the directions; y, start: (B, n, c); known:
    prefix tokens of the start that stay as they are; iterations: Gauss–Newton steps, taken only where they lower the
    residual.
    """
    directions = _directions(steps, singles, y, start := start.to(y), known, precision)
    effort = Settings(GOAL, END, iterations)
    x, residual = newton(lambda x, _: through(steps, x), y, start, directions, effort, LEAST, SHORTEST)
    return Solution(x, residual, residual <= GOAL)


def _directions(
    steps: Sequence[Step], singles: Sequence[Step], y: Tensor, start: Tensor, known: int, precision: torch.dtype
) -> Callable[..., list[Tensor]]:
    """Gauss–Newton steps in the span of several directions, one a damping, for `newton`."""
    last, past = start.clone(), deque[Tensor](maxlen=MEMORY)

    def propose(x: Tensor, residual: Tensor, _ratio: Tensor, which: Tensor) -> list[Tensor]:
        move = torch.zeros_like(y)
        move[which] = x - last[which]
        if bool(move.any()):
            past.append(move)
        last[which] = x
        streams = list(accumulate(steps, lambda stream, step: step(stream), initial=x))
        # In units of y, so that float32 holds it however small it is.
        scale = (y[which].flatten(1).norm(dim=1) * residual)[:, None, None]
        right = ((y[which] - streams[-1]) / scale).to(precision)
        streams = [stream.to(precision) for stream in streams]
        chain = Linearised(lambda value: through(singles, value), streams[0])
        inverses = [_inverse(step, stream) for step, stream in zip(singles, streams, strict=False)]
        new = [chain.transposed(right), *(move[which].to(precision) for move in past)]
        basis = pushed = right.new_zeros(len(x), right[0].numel(), 0)
        left, flat = right, right.double().flatten(1)[:, :, None]
        for _ in range(CYCLES):
            back = left.repeat(len(DAMPED), 1, 1)
            for inverse in reversed(inverses):
                back = inverse(back)
            basis, fresh = _extended(basis, [*new, *back.nan_to_num(0.0, 0.0, 0.0).split(len(right))], known)
            images = [chain.product(column.reshape(x.shape)).flatten(1) for column in fresh.unbind(2)]
            pushed = torch.cat([pushed, torch.stack(images, dim=2)], dim=2)
            u, values, v = torch.linalg.svd(pushed.double(), full_matrices=False)
            along = u.mT @ flat
            left, new = (flat - u @ along).view_as(right).to(right), []
        directions = []
        for damping in DAMPINGS:
            shares = values / (values.square() + (damping * values.amax(1, keepdim=True)).square()).clamp(min=1e-300)
            directions.append(scale * (basis.to(x) @ (v.mT @ (shares[:, :, None] * along)).to(x)).view_as(x))
        return directions

    return propose


def _inverse(step: Step, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Damped inverses of a step's derivative at x: (L B, n, c) -> the same, the first B with the first damping, …"""
    count = len(x)
    if step.tokenwise:
        u, values, v = torch.linalg.svd(step.slopes(x.flatten(0, 1)))

        def dense(directions: Tensor) -> Tensor:
            parts = []
            for damping, part in zip(DAMPED, directions.split(count), strict=True):
                shares = values / (values.square() + damping**2).clamp(min=1e-30)
                along = shares[:, :, None] * (u.mT @ part.flatten(0, 1)[:, :, None])
                parts.append((v.mT @ along)[:, :, 0].view_as(part))
            return torch.cat(parts)

        return dense
    here = Linearised(step.forward, x.repeat(len(DAMPED), 1, 1))
    product = here.of_samples(here.product)

    def mixed(directions: Tensor) -> Tensor:
        goal = directions.new_full((len(directions),), LOOSE)
        return gmres(product, directions.flatten(1), goal, KRYLOV).view_as(directions)

    return mixed


def _extended(basis: Tensor, new: Sequence[Tensor], known: int) -> tuple[Tensor, Tensor]:
    """(basis, what was added): orthonormal columns (B, n c, k) that leave the known tokens alone."""
    columns = [direction[:, known:].flatten(1) for direction in new]
    fresh = torch.stack([column / column.norm(dim=1, keepdim=True).clamp(min=1e-30) for column in columns], dim=2)
    free = basis[:, known * new[0].shape[2] :]
    for _ in range(2):
        fresh = fresh - free @ (free.mT @ fresh)
    # The known rows stay out of the factorisation, whose round-off would move them.
    fresh = torch.linalg.qr(fresh)[0]
    fresh = torch.cat([fresh.new_zeros(len(fresh), basis.shape[1] - fresh.shape[1], fresh.shape[2]), fresh], dim=1)
    return torch.cat([basis, fresh], dim=2), fresh
