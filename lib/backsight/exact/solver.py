"""Solving g(x) = y for x, many samples at once, each with its own iterations.

    starts ──► Anderson (g alone) ──► Newton–Krylov ──► solved?  no ──► the next start, then perturbed ones
               cheap, linear          GMRES on products with the derivative, step lengths by backtracking

Every sample has a Krylov space, a step length and an end of its own; what is solved is computed no further. A sample
that no start solves keeps its best iterate and is marked: a residual is never hidden.

Sources: Walker & Ni, Anderson acceleration for fixed-point iterations (2011); Knoll & Keyes, Jacobian-free
Newton–Krylov methods (2004); Eisenstat & Walker, Choosing the forcing terms in an inexact Newton method (1996).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from backsight.errors import BacksightError

Function = Callable[..., Tensor]  # (x, *context) -> g(x)
Products = Literal["difference", "derivative"]
Product = Callable[[Tensor, Tensor], Tensor]  # (directions (K, N), which samples (K,)) -> (K, N)

DERIVATIVE_COST = 4  # forward passes that one forward-mode product takes (measured on the shipped ViT: 4 to 5)
TINY = 1e-300
ARMIJO = 1e-4  # least decrease of a residual, as a share of what the full linear step promises
SHORTEST = 2.0**-7  # step length below which a line search gives up
STALLED = 0.5  # below the tolerance, an iteration that keeps more than this of the residual has met round-off
SLOW = 0.8  # above it, five iterations that keep more than this have failed


@dataclass(frozen=True)
class Settings:
    """How long a solver tries.

    tolerance: relative residual |g(x) − y| / |y| of a solved sample; goal: where iterations end (below `tolerance` they
    also end as soon as they gain nothing more); anderson: fixed-point iterations tried before Newton's, which remember
    as many earlier iterates as `memory`; newton: iterations; krylov: products of one iteration; restarts: perturbed
    starts behind the given ones, `spread` of the start's own deviation each; alternatives: further starts of doubtful
    tokens, and curves: rounds of curves through their roots (`exact.inverse.solve_step`); forcing, tightest: the
    loosest and tightest linear solve; products: "difference", one forward pass (float64, error about 1e-8), or
    "derivative", forward-mode differentiation; precision: of that derivative (default: y's own), which only steers:
    residuals are of y's precision always.
    """

    tolerance: float = 1e-10
    goal: float = 1e-14
    anderson: int = 0
    memory: int = 5
    newton: int = 30
    krylov: int = 200
    restarts: int = 2
    alternatives: int = 4
    curves: int = 0
    spread: float = 0.1
    forcing: float = 0.1
    tightest: float = 1e-4
    products: Products = "difference"
    precision: torch.dtype | None = None
    seed: int = 0


@dataclass(frozen=True)
class Solution:
    """What a solver found, a sample each.

    x: (B, n, c); residual: (B,) relative; iterations: (B,) of Newton, over all starts; passes: (B,) forward passes or
    their equivalent; solved: (B,) bool; start: (B,) number of the start that led here (given ones first, then perturbed
    ones); method: (B,) 0 Anderson, 1 Newton with Krylov spaces, 2 with dense derivatives (which iterations and passes
    leave out); seconds: of the whole batch.
    """

    x: Tensor
    residual: Tensor
    iterations: Tensor
    passes: Tensor
    solved: Tensor
    start: Tensor
    method: Tensor
    seconds: float = field(default=0.0, compare=False)

    def grouped(self, count: int) -> Solution:
        """Samples that are parts (tokens) of `count` images, joined: the worst residual, iterations and start."""

        def parts(values: Tensor) -> Tensor:
            return values.reshape(count, -1)

        return Solution(
            self.x.reshape(count, -1, self.x.shape[2]),
            parts(self.residual).amax(1),
            parts(self.iterations).amax(1),
            parts(self.passes).double().mean(1),
            parts(self.solved).all(1),
            parts(self.start).amax(1),
            parts(self.method).amax(1),
            self.seconds,
        )


def solve(
    function: Function,
    y: Tensor,
    starts: Sequence[Tensor],
    settings: Settings | None = None,
    derivative: Function | None = None,
    context: Sequence[Tensor] = (),
) -> Solution:
    """x with function(x, *context) = y, for every sample of a batch.

    function: (K, n, c) -> (K, n, c), acting on every sample alone, for any K; y: (B, n, c) float; starts: each
    (B, n, c), tried one after the other for the samples that are not solved yet; derivative: the same function in
    settings.precision, with which the Newton steps are computed; context: tensors (B, …) that `function` reads beside
    x, taken apart by sample with it. Raises BacksightError on unfit shapes and on values that are not finite.
    """
    settings = settings or Settings()
    _check(y, starts)
    begun = time.perf_counter()
    work = _Work(function, y, settings, derivative or function, context)
    generator = torch.Generator(device=y.device).manual_seed(settings.seed)
    for number in range(len(starts) + settings.restarts):
        pending = (~work.solved).nonzero().flatten()
        if not len(pending):
            break
        if number < len(starts):
            start = starts[number][pending]
        else:
            base = starts[number % len(starts)][pending]
            noise = torch.randn(base.shape, generator=generator, device=base.device, dtype=base.dtype)
            start = base + settings.spread * (number - len(starts) + 1) * _spread(base) * noise
        work.attempt(pending, start, number)
    return work.solution(time.perf_counter() - begun)


def _check(y: Tensor, starts: Sequence[Tensor]) -> None:
    if y.ndim != 3 or not y.is_floating_point():
        raise BacksightError(f"A solver takes float values (batch, tokens, channels), not {y.dtype} {tuple(y.shape)}.")
    if not starts:
        raise BacksightError("A solver needs at least one start: give y itself where nothing better is known.")
    for start in starts:
        if start.shape != y.shape:
            raise BacksightError(f"A start has the shape {tuple(start.shape)}, but y has {tuple(y.shape)}.")
    if not bool(torch.isfinite(y).all()):
        raise BacksightError("The values to be inverted are not all finite: look at the pass that made them.")


@dataclass(frozen=True)
class Roots:
    """Solutions of one equation from several starts.

    x: (S, B, n, c), one for each start; solved: (S, B); fresh: (S, B) solved, and unlike those of all earlier starts;
    count: (B,) different roots that were found (there may be more).
    """

    x: Tensor
    solved: Tensor
    fresh: Tensor

    @property
    def count(self) -> Tensor:
        return self.fresh.sum(0)


def roots(
    function: Function,
    y: Tensor,
    starts: Sequence[Tensor],
    settings: Settings | None = None,
    apart: float = 1e-6,
    context: Sequence[Tensor] = (),
) -> Roots:
    """The roots that each of the starts leads to; two are different where they lie `apart` (relative). See `solve`."""
    settings = replace(settings or Settings(), restarts=0)
    found = [solve(function, y, [start], settings, context=context) for start in starts]
    x, solved = torch.stack([each.x for each in found]), torch.stack([each.solved for each in found])
    fresh = solved.clone()
    for number in range(1, len(found)):
        for earlier in range(number):
            distance = _norm(x[number] - x[earlier]) / _norm(x[earlier]).clamp(min=TINY)
            fresh[number] &= ~(fresh[earlier] & (distance <= apart))
    return Roots(x, solved, fresh)


class _Work:
    """The state of a batch: best iterates so far, and what they cost."""

    def __init__(
        self, function: Function, y: Tensor, settings: Settings, derivative: Function, context: Sequence[Tensor]
    ) -> None:
        count = len(y)
        self.function, self.y, self.settings, self.derivative = function, y, settings, derivative
        self.context = context
        self.size = _norm(y).clamp(min=torch.finfo(y.dtype).tiny)
        self.x = y.clone()
        self.residual = torch.full((count,), torch.inf, dtype=y.dtype, device=y.device)
        self.solved = torch.zeros(count, dtype=torch.bool, device=y.device)
        self.iterations, self.passes, self.start, self.method = (
            torch.zeros(count, dtype=torch.long, device=y.device) for _ in range(4)
        )

    def value(self, x: Tensor, which: Tensor) -> Tensor:
        return self.function(x, *(each[which] for each in self.context))

    def attempt(self, which: Tensor, x: Tensor, number: int) -> None:
        """Anderson, then Newton, from one start for these samples."""
        goal, tolerance = self.settings.goal, self.settings.tolerance
        if self.settings.anderson:
            x, residual = self._anderson(which, x)
        else:
            residual = _relative(self.y[which] - self.value(x, which), self.size[which])
            self.passes[which] += 1
        self._settle(which, x, residual, number, 0)
        left = residual > goal
        if bool(left.any()):
            x_left, residual_left = self._newton(which[left], x[left])
            self._settle(which[left], x_left, residual_left, number, 1)
        self.solved[which] = self.residual[which] <= tolerance

    def _settle(self, which: Tensor, x: Tensor, residual: Tensor, number: int, method: int) -> None:
        better = residual < self.residual[which]
        chosen = which[better]
        self.x[chosen], self.residual[chosen] = x[better], residual[better]
        self.start[chosen], self.method[chosen] = number, method

    def _anderson(self, which: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Accelerated fixed-point iteration x + (y − g(x)); returns each sample's best iterate and its residual."""
        y, size = self.y[which], self.size[which]
        best, best_residual = x, torch.full_like(size, torch.inf)
        places: list[Tensor] = []
        errors: list[Tensor] = []
        live = torch.arange(len(x), device=x.device)
        for _ in range(self.settings.anderson):
            error = y[live] - self.value(x, which[live])
            self.passes[which[live]] += 1
            residual = _relative(error, size[live])
            improved = residual < best_residual[live]
            best, best_residual = best.clone(), best_residual.clone()
            best[live[improved]], best_residual[live[improved]] = x[improved], residual[improved]
            on = (residual > self.settings.goal) & (residual < 1e3 * best_residual[live])
            if not bool(on.any()):
                break
            if not bool(on.all()):
                live, x, error = live[on], x[on], error[on]
                places, errors = [each[on] for each in places], [each[on] for each in errors]
            places, errors = [*places, x][-self.settings.memory - 1 :], [*errors, error][-self.settings.memory - 1 :]
            x = _mixed(places, errors)
        return best, best_residual

    def _newton(self, which: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        settings, y, size = self.settings, self.y[which], self.size[which]
        x = x.clone()
        made = self.value(x, which)
        self.passes[which] += 1
        residual = _relative(y - made, size)
        previous = 2 * residual
        history = [residual.clone()]
        live = (residual > settings.goal) & torch.isfinite(residual)
        for _ in range(settings.newton):
            at = live.nonzero().flatten()
            if not len(at):
                break
            error = y[at] - made[at]
            # Eisenstat and Walker's second choice: solve as tightly as the outer iteration is already fast.
            ratio = residual[at] / previous[at]
            forcing = (0.9 * ratio.square()).clamp(settings.tightest, settings.forcing)
            forcing = torch.maximum(forcing, 0.3 * settings.goal / residual[at]).clamp(max=0.5)
            product = self._product(x[at], made[at], which[at])
            direction, used = gmres(product, error.flatten(1), forcing, settings.krylov)
            cost = DERIVATIVE_COST if settings.products == "derivative" else 1
            self.passes[which[at]] += used * cost
            self.iterations[which[at]] += 1
            moved, made_there, there, searched = self._searched(
                which[at], x[at], direction.view_as(error), y[at], size[at], residual[at], forcing
            )
            self.passes[which[at]] += searched
            previous[at] = residual[at]
            gained = there < residual[at]
            took = at[gained]
            x[took], made[took], residual[took] = moved[gained], made_there[gained], there[gained]
            history.append(residual.clone())
            ended = ~gained | (residual[at] <= settings.goal)
            ended |= (residual[at] <= settings.tolerance) & (residual[at] > STALLED * previous[at])
            if len(history) > 5:
                ended |= (residual[at] > settings.tolerance) & (residual[at] > SLOW * history[-6][at])
            live[at[ended]] = False
        return x, residual

    def _searched(
        self,
        which: Tensor,
        x: Tensor,
        direction: Tensor,
        y: Tensor,
        size: Tensor,
        residual: Tensor,
        forcing: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Backtracking, a step length a sample: (x, g(x), residual, passes); unmoved where none is good."""
        length = torch.ones_like(size)
        best, best_made, best_residual = x.clone(), torch.zeros_like(x), residual.clone()
        passes = torch.zeros(len(x), dtype=torch.long, device=x.device)
        open_ = torch.arange(len(x), device=x.device)
        while len(open_):
            trial = x[open_] + length[open_, None, None] * direction[open_]
            made = self.value(trial, which[open_])
            passes[open_] += 1
            there = _relative(y[open_] - made, size[open_])
            better = there < best_residual[open_]
            chosen = open_[better]
            best[chosen], best_made[chosen], best_residual[chosen] = trial[better], made[better], there[better]
            enough = there <= (1 - ARMIJO * length[open_] * (1 - forcing[open_])) * residual[open_]
            # The minimum of the parabola through |F|² at 0, its slope there and the trial.
            square, start = there.square(), residual[open_].square()
            factor = (start / (square + start).clamp(min=TINY)).nan_to_num(0.1).clamp(0.1, 0.5)
            length[open_] = torch.where(enough, length[open_], length[open_] * factor)
            open_ = open_[~enough & (length[open_] >= SHORTEST)]
        return best, best_made, best_residual, passes

    def _product(self, x: Tensor, made: Tensor, which: Tensor) -> Product:
        """Products with the derivative at x, of the samples `which`."""
        context = [each[which] for each in self.context]
        if self.settings.products == "difference":
            return difference_product(self.function, x, made, context)
        return derivative_product(self.derivative, x, self.settings.precision or x.dtype, context)

    def solution(self, seconds: float) -> Solution:
        return Solution(
            self.x, self.residual, self.iterations, self.passes, self.solved, self.start, self.method, seconds
        )


def difference_product(function: Function, x: Tensor, made: Tensor, context: Sequence[Tensor] = ()) -> Product:
    """(g(x + h v) − g(x)) / h with the h that balances round-off and curvature, one forward pass; x: (B, n, c)."""
    scale = torch.finfo(x.dtype).eps ** 0.5 * (1 + _norm(x))

    def product(directions: Tensor, which: Tensor) -> Tensor:
        step = (scale[which] / directions.norm(dim=1).clamp(min=TINY))[:, None]
        moved = x[which] + (step * directions).view_as(x[which])
        there = function(moved, *(each[which] for each in context))
        return (there - made[which]).flatten(1) / step

    return product


def derivative_product(
    function: Function, x: Tensor, precision: torch.dtype | None = None, context: Sequence[Tensor] = ()
) -> Product:
    """Forward-mode products of a function of this precision, at x (B, n, c)."""
    point = x.to(precision or x.dtype)
    around = [each.to(point.dtype) if each.is_floating_point() else each for each in context]

    def product(directions: Tensor, which: Tensor) -> Tensor:
        here = point[which]
        beside = [each[which] for each in around]
        # The fused attention of torch has no forward derivative.
        with sdpa_kernel(SDPBackend.MATH):
            made = torch.func.jvp(
                lambda value: function(value, *beside), (here,), (directions.view_as(here).to(here.dtype),)
            )[1]
        return made.flatten(1).to(directions.dtype)

    return product


def gmres(product: Product, right: Tensor, tolerance: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Solutions d of product(d) = right, a Krylov space a sample, from d = 0.

    right: (B, N); tolerance: (B,) of |right − product(d)| / |right|; limit: products. Returns (B, N) and the products
    (B,) that each sample needed. Classical Gram–Schmidt, twice; Givens rotations (Saad & Schultz, 1986).
    """
    count, size = right.shape
    result = torch.zeros_like(right)
    used = torch.zeros(count, dtype=torch.long, device=right.device)
    length = right.norm(dim=1)
    which = (length > 0).nonzero().flatten()
    limit = min(limit, size)
    basis = right.new_zeros(len(which), min(limit, 16) + 1, size)
    basis[:, 0] = right[which] / length[which, None]
    triangle = right.new_zeros(len(which), limit, limit)
    rotations = torch.eye(limit + 1, dtype=right.dtype, device=right.device).repeat(len(which), 1, 1)
    ends = right.new_zeros(len(which), limit + 1)
    ends[:, 0] = length[which]
    done = torch.zeros(len(which), dtype=torch.bool, device=right.device)
    for k in range(limit):
        if not len(which):
            break
        vector = product(basis[:, k], which)
        column = right.new_zeros(len(which), k + 1)
        for _ in range(2):
            part = torch.bmm(basis[:, : k + 1], vector[:, :, None])
            vector = vector - torch.bmm(part.transpose(1, 2), basis[:, : k + 1])[:, 0]
            column += part[:, :, 0]
        below = vector.norm(dim=1)
        if k + 1 == basis.shape[1]:
            room = min(limit + 1, 2 * basis.shape[1]) - basis.shape[1]
            basis = torch.cat([basis, basis.new_zeros(len(which), room, size)], dim=1)
        broken = below <= 1e-14 * column.norm(dim=1)
        below = below.masked_fill(broken, 0.0)
        basis[:, k + 1] = torch.where(broken[:, None], 0.0, vector / below.clamp(min=TINY)[:, None])
        # All rotations so far in one product, not one after the other.
        column = torch.bmm(rotations[:, : k + 1, : k + 1], column[:, :, None])[:, :, 0]
        radius = torch.hypot(column[:, k], below)
        empty = radius == 0
        cosine = torch.where(empty, 1.0, column[:, k] / radius)
        sine = torch.where(empty, 0.0, below / radius)
        column[:, k] = torch.where(empty, 1.0, radius)
        triangle[:, : k + 1, k] = column
        turned = rotations[:, k, : k + 1].clone()
        rotations[:, k, : k + 1] = cosine[:, None] * turned
        rotations[:, k, k + 1] = sine
        rotations[:, k + 1, : k + 1] = -sine[:, None] * turned
        rotations[:, k + 1, k + 1] = cosine
        ends[:, k + 1] = -sine * ends[:, k]
        ends[:, k] = cosine * ends[:, k]
        met = (ends[:, k + 1].abs() <= tolerance[which] * length[which]) | broken | (k + 1 == limit)
        # A sample ends when it has met its tolerance, whatever the others do: results do not depend on the batch.
        fresh = met & ~done
        if bool(fresh.any()):
            weights = torch.linalg.solve_triangular(
                triangle[fresh, : k + 1, : k + 1], ends[fresh, : k + 1, None], upper=True
            )
            result[which[fresh]] = torch.bmm(weights.transpose(1, 2), basis[fresh, : k + 1])[:, 0]
            used[which[fresh]] = k + 1
            done = done | met
        # The rows of those that have ended go when they are half of all: taking them out copies the whole basis.
        if int(done.sum()) * 2 >= len(which):
            keep = ~done
            which, basis, triangle, ends = which[keep], basis[keep], triangle[keep], ends[keep]
            rotations, done = rotations[keep], done[keep]
    return result, used


def _mixed(places: Sequence[Tensor], errors: Sequence[Tensor]) -> Tensor:
    """Anderson's next iterate from the last ones and their errors y − g(x), a least-squares problem a sample."""
    x, error = places[-1], errors[-1]
    if len(places) == 1:
        return x + error
    moves = torch.stack([b - a for a, b in pairwise(places)], dim=1).flatten(2)
    changes = torch.stack([b - a for a, b in pairwise(errors)], dim=1).flatten(2)
    gram = changes @ changes.transpose(1, 2)
    size = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=TINY)
    gram = gram + 1e-12 * size[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve_ex(gram, changes @ error.flatten(1)[:, :, None])[0].nan_to_num(0.0)
    return x + error - ((moves + changes).transpose(1, 2) @ weights)[:, :, 0].view_as(x)


def _norm(values: Tensor) -> Tensor:
    return values.flatten(1).norm(dim=1)


def _spread(values: Tensor) -> Tensor:
    """(B, 1, 1) deviation of each sample's values, its size where it has only one."""
    if values[0].numel() == 1:
        return values.abs()
    return values.flatten(1).std(dim=1)[:, None, None]


def _relative(error: Tensor, size: Tensor) -> Tensor:
    """(B,) residuals; values that are not finite count as infinite."""
    return (_norm(error) / size).nan_to_num(torch.inf, torch.inf)
