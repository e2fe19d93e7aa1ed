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

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from backsight.errors import BacksightError
from backsight.exact.solver import derivative_product, gmres
from backsight.exact.steps import Step
from backsight.exact.tokens import token_map

DAMPINGS = (0.0, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)  # of a step within the span, shares of its largest value
LENGTHS = (1.0, 0.4, 0.16)


@dataclass(frozen=True)
class ChainSettings:
    """How long a whole chain is searched.

    iterations: Gauss–Newton steps; damping: of the half-steps' inverses, absolute (their derivatives are 1 + f′);
    cycles: of such inverses in one step, each of what the last left; krylov, tolerance: of the inverse of a step that
    mixes tokens; memory: last steps that are kept as directions; goal: relative residual that counts as solved; end:
    relative residual at which a sample rests; least: relative fall of the residual below which a sample is given up;
    precision: of the directions (the residuals keep y's).
    """

    iterations: int = 30
    damping: tuple[float, ...] = (0.0, 1e-3, 1e-2, 1e-1)
    cycles: int = 2
    krylov: int = 60
    tolerance: float = 1e-2
    memory: int = 6
    goal: float = 1e-10
    end: float = 1e-12
    least: float = 1e-3
    precision: torch.dtype = torch.float32


@dataclass(frozen=True)
class ChainSolution:
    """What a search found, a sample each.

    x: (B, n, c); residual: (B,) |T(x) − y| / |y|; iterations, passes: (B,) steps, and passes through the chain or their
    equivalents; solved: (B,) residual at most `goal`; history: (steps + 1, B) residuals; seconds of the batch.
    """

    x: Tensor
    residual: Tensor
    iterations: Tensor
    passes: Tensor
    solved: Tensor
    history: Tensor
    seconds: float


def through(steps: Sequence[Step], x: Tensor) -> list[Tensor]:
    """Every stream of a chain, x the first of them."""
    streams = [x]
    for step in steps:
        streams.append(step(streams[-1]))
    return streams


def solve_chain(
    steps: Sequence[Step],
    singles: Sequence[Step],
    y: Tensor,
    start: Tensor,
    known: int = 0,
    settings: ChainSettings | None = None,
    told: Callable[[int, Tensor], None] | None = None,
) -> ChainSolution:
    """x with T(x) = y from a start, T the steps one after the other.

    steps: in y's precision; singles: the same in `settings.precision`; y, start: (B, n, c); known: prefix tokens of the
    start that stay as they are; told: called with the number of every step and the residuals (B,). Steps are taken only
    where they lower the residual. Raises BacksightError on post-norm steps, whose equations do not determine x, and on
    a start of another shape.
    """
    settings = settings or ChainSettings()
    if any(step.norm is not None for step in steps):
        raise BacksightError(
            "A chain with norms behind its steps does not determine its first stream: solve it step by step."
        )
    if start.shape != y.shape or not steps:
        raise BacksightError(f"A chain is solved from a start of y's shape {tuple(y.shape)}, not {tuple(start.shape)}.")
    began = time.perf_counter()
    size = y.flatten(1).norm(dim=1)
    x = start.to(y).clone()
    with torch.no_grad():
        residual = _residuals(steps, x, y, size)
        iterations, passes = torch.zeros(len(y), dtype=torch.long), torch.ones(len(y), dtype=torch.long)
        history, past = [residual.clone()], y.new_zeros(0, *y.shape)
        live = torch.arange(len(y))
        for number in range(settings.iterations):
            live = live[(residual[live] > settings.end) & residual[live].isfinite()]
            if not len(live):
                break
            moved, after, used = _stepped(
                steps, singles, x[live], y[live], size[live], residual[live], past[:, live], known, settings
            )
            last = torch.zeros_like(y)
            last[live] = moved - x[live]
            past = torch.cat([past, last[None]])[-settings.memory :]
            x[live] = moved
            fell = after < (1 - settings.least) * residual[live]
            residual[live] = after
            iterations[live] += 1
            passes[live] += used
            history.append(residual.clone())
            live = live[fell]
            if told is not None:
                told(number, residual)
    solved = residual <= settings.goal
    return ChainSolution(x, residual, iterations, passes, solved, torch.stack(history), time.perf_counter() - began)


def _residuals(steps: Sequence[Step], x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    found = (y - through(steps, x)[-1]).flatten(1).norm(dim=1) / size
    return found.nan_to_num(torch.inf, torch.inf)


def _stepped(
    steps: Sequence[Step],
    singles: Sequence[Step],
    x: Tensor,
    y: Tensor,
    size: Tensor,
    before: Tensor,
    past: Tensor,
    known: int,
    settings: ChainSettings,
) -> tuple[Tensor, Tensor, int]:
    """(x, residuals, passes) of one Gauss–Newton step in the span of the directions."""
    streams = through(steps, x)
    # In units of y, so that float32 holds it however small it is.
    rest = (y - streams[-1]) / (size * before)[:, None, None]
    streams = [each.to(settings.precision) for each in streams]
    here, right = streams[0], rest.to(settings.precision)
    inverses = [_inverse(step, each, settings) for step, each in zip(singles, streams, strict=False)]
    used = 2 + len(DAMPINGS) * len(LENGTHS)
    new = [_gradient(singles, here, right), *past.to(settings.precision)]
    basis = pushed = right.new_zeros(len(x), right[0].numel(), 0)
    left = right
    factors = None
    for _ in range(settings.cycles):
        new += _backward(inverses, left, settings)
        basis, fresh = _extended(basis, new, known)
        made = [_pushed(singles, here, fresh[:, :, number]) for number in range(fresh.shape[2])]
        pushed = torch.cat([pushed, torch.stack(made, dim=2)], dim=2)
        used += 3 * len(made) + 3 * settings.krylov * len(settings.damping)
        u, values, v = torch.linalg.svd(pushed.double(), full_matrices=False)
        along = (u.mT @ right.double().flatten(1)[:, :, None])[:, :, 0]
        left = (right.double().flatten(1) - (u @ along[:, :, None])[:, :, 0]).view_as(right).to(right)
        factors, new = (values, v, along), []
    assert factors is not None
    values, v, along = factors
    best, after = x.clone(), before.clone()
    for damping in DAMPINGS:
        shares = values / (values.square() + (damping * values.amax(1, keepdim=True)).square()).clamp(min=1e-300)
        move = (basis.to(y) @ (v.mT @ (shares * along)[:, :, None]).to(y))[:, :, 0].view_as(x)
        for length in LENGTHS:
            trial = x + length * (size * before)[:, None, None] * move
            there = _residuals(steps, trial, y, size)
            better = there < after
            best = torch.where(better[:, None, None], trial, best)
            after = torch.where(better, there, after)
    return best, after, used


def _inverse(step: Step, x: Tensor, settings: ChainSettings) -> Callable[[Tensor], Tensor]:
    """Damped inverses of a step's derivative at x: (L B, n, c) -> the same, the first B with the first damping, …"""
    dampings, count = settings.damping, len(x)
    if step.tokenwise:
        slopes = token_map(step.forward, step.jacobian).jacobian(x.flatten(0, 1))
        u, values, v = torch.linalg.svd(slopes)

        def dense(directions: Tensor) -> Tensor:
            parts = []
            for damping, part in zip(dampings, directions.split(count), strict=True):
                along = (u.mT @ part.flatten(0, 1)[:, :, None])[:, :, 0]
                shares = values / (values.square() + damping**2).clamp(min=1e-30)
                parts.append((v.mT @ (shares * along)[:, :, None])[:, :, 0].view_as(part))
            return torch.cat(parts)

        return dense
    product = derivative_product(step.forward, x.repeat(len(dampings), 1, 1))

    def mixed(directions: Tensor) -> Tensor:
        goal = directions.new_full((len(directions),), settings.tolerance)
        return gmres(product, directions.flatten(1), goal, settings.krylov)[0].view_as(directions)

    return mixed


def _backward(inverses: Sequence[Callable[[Tensor], Tensor]], right: Tensor, settings: ChainSettings) -> list[Tensor]:
    """right (B, n, c) through the damped inverses of all steps, the last first; one result a damping."""
    made = right.repeat(len(settings.damping), 1, 1)
    for inverse in reversed(inverses):
        made = inverse(made)
    return list(made.nan_to_num(0.0, 0.0, 0.0).split(len(right)))


def _gradient(steps: Sequence[Step], x: Tensor, right: Tensor) -> Tensor:
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        here = x.detach().requires_grad_(True)
        return torch.autograd.grad(through(steps, here)[-1], here, right)[0]


def _pushed(steps: Sequence[Step], x: Tensor, direction: Tensor) -> Tensor:
    """(B, n c) of the derivative's product with a direction (B, n c)."""
    with sdpa_kernel(SDPBackend.MATH):
        made: Tensor = torch.func.jvp(
            lambda value: through(steps, value)[-1], (x,), (direction.reshape(x.shape).contiguous(),)
        )[1]
    return made.flatten(1)


def _extended(basis: Tensor, new: Sequence[Tensor], known: int) -> tuple[Tensor, Tensor]:
    """(basis, what was added): orthonormal columns (B, n c, k) that leave the known tokens alone."""
    columns = []
    for each in new:
        flat = each[:, known:].flatten(1)
        columns.append(flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-30))
    free = basis[:, known * new[0].shape[2] :]
    fresh = torch.stack(columns, dim=2)
    for _ in range(2):
        fresh = fresh - free @ (free.mT @ fresh)
    # The known rows stay out of the factorisation, whose round-off would move them.
    fresh = torch.linalg.qr(fresh)[0]
    fresh = torch.cat([fresh.new_zeros(len(fresh), basis.shape[1] - fresh.shape[1], fresh.shape[2]), fresh], dim=1)
    return torch.cat([basis, fresh], dim=2), fresh
