"""Solving g(x) = y for x, many samples at once, each with its own iterations; and products with derivatives.

    starts ──► damped Newton steps ──► solved, and a usual root?  no ──► the next start, then perturbed ones
               dense: J⁻¹ (y − g) by LU; krylov: by GMRES on differences; step lengths by backtracking

Sources: Knoll & Keyes (2004); Eisenstat & Walker (1996), forcing terms; Walker & Zhou, A simpler GMRES (1994); Nocedal
& Wright, Numerical Optimization (2006).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Function = Callable[[Tensor, Tensor], Tensor]  # (x (K, n, c), which samples (K,)) -> g(x), each sample's alone
Product = Callable[[Tensor, Tensor], Tensor]  # (directions (K, N), which samples (K,)) -> (K, N)
Propose = Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]]

TINY = 1e-300
ARMIJO = 1e-4  # least decrease, as a share of what the full linear step promises
SHRINK = 0.4  # of a step that did not lower the residual enough
SHORTEST = 2.0**-8  # step length below which a line search gives up
STALLED = 0.5  # below the tolerance, an iteration that keeps more than this of the residual has met round-off
SLOW = 0.8  # above it, five iterations that keep more than this have failed
LOOSEST, TIGHTEST = 0.1, 1e-4  # of a linear solve
SPREAD = 0.1  # of a perturbed start, in the start's own deviations, times its number
CHUNK = 2**23  # entries of dense derivatives at once, 64 MB
ROOM = 32  # products that a Krylov space grows by: each time it is copied whole
WIDE = 128  # columns up to which torch's own batches of LU factorizations are sound on a CPU


@dataclass(frozen=True)
class Settings:
    """How long a solver tries.

    tolerance: relative residual |g(x) − y| / |y| of a solved sample; goal: where iterations end; newton: iterations;
    krylov: products of one iteration; restarts: perturbed starts behind the given ones; choose: whether unusual roots
    are doubted, and further starts tried.
    """

    tolerance: float = 1e-10
    goal: float = 1e-14
    newton: int = 30
    krylov: int = 200
    restarts: int = 2
    choose: bool = True


class Solution(NamedTuple):
    """x (B, n, c), relative residual (B,) and whether solved (B,): without a start that did, x is the best iterate."""

    x: Tensor
    residual: Tensor
    solved: Tensor


def solve(
    function: Function,
    y: Tensor,
    starts: Sequence[Tensor],
    settings: Settings | None = None,
    jacobian: Callable[[Tensor], Tensor] | None = None,
    doubt: Function | None = None,
    wrong: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """x with g(x) = y, for every sample of a batch.

    starts: each (B, n, c) as y, tried one after the other for the samples that are not solved yet; jacobian: (K, c) ->
    (K, c, c) of samples that are one token (n = 1) each; doubt: (K,) of roots: a sample that found one above 0 tries
    all starts, and keeps the root of the least; wrong: x (K, n, c) -> (K,) what cannot be the x that was there: it
    solves nothing, and anything else is preferred.
    """
    settings = settings or Settings()
    if not bool(torch.isfinite(y).all()):
        raise ValueError("the values to be inverted are not all finite: look at the pass that made them")
    x, residual = y.clone(), torch.full_like(y[:, 0, 0], torch.inf)
    scores, solved = residual.clone(), torch.zeros_like(residual, dtype=torch.bool)
    suspect = solved.clone()
    generator = torch.Generator(device=y.device).manual_seed(0)
    for number in range(len(starts) + settings.restarts):
        at = (~solved | suspect if number < len(starts) else ~solved).nonzero().flatten()
        if not len(at):
            continue
        start = starts[number % len(starts)][at]
        if number >= len(starts):
            noise = torch.randn(start.shape, generator=generator, device=y.device, dtype=y.dtype)
            size = start.flatten(1).std(1) if start[0].numel() > 1 else start.flatten().abs()
            start = start + SPREAD * (number - len(starts) + 1) * size[:, None, None] * noise

        def part(x: Tensor, which: Tensor, at: Tensor = at) -> Tensor:
            return function(x, at[which])

        propose = krylov(part, y[at], settings) if jacobian is None else dense(part, y[at], jacobian)
        found, error = newton(part, y[at], start, propose, settings)
        if wrong is not None:
            error = error + wrong(found)
        ended = error <= settings.tolerance
        rated = torch.zeros_like(error) if doubt is None else doubt(found, at)
        better = torch.where(solved[at], ended & (rated < scores[at]), ended | (error < residual[at]))
        took = at[better]
        x[took], residual[took], scores[took], solved[took] = found[better], error[better], rated[better], ended[better]
        suspect |= solved & (scores > 0)
    return Solution(x, residual, solved)


def newton(
    function: Function,
    y: Tensor,
    x: Tensor,
    propose: Propose,
    settings: Settings,
    slow: float = SLOW,
    shortest: float = SHORTEST,
) -> tuple[Tensor, Tensor]:
    """(x, relative residual), a sample each: the one loop of damped Newton steps.

    propose: (x, residual, its ratio to the last one, which samples) -> directions, the best of which is taken; slow:
    share of the residual that five iterations may keep.
    """
    size = y.flatten(1).norm(dim=1).clamp(min=torch.finfo(y.dtype).tiny)
    everything = torch.arange(len(y), device=y.device)

    def loss(x: Tensor, which: Tensor) -> Tensor:
        error = y[which] - function(x, which)
        return (error.flatten(1).norm(dim=1) / size[which]).nan_to_num(torch.inf, torch.inf)

    x, residual = x.clone(), loss(x, everything)
    history = [2 * residual, residual.clone()]
    live = (residual > settings.goal) & residual.isfinite()
    for _ in range(settings.newton):
        at = live.nonzero().flatten()
        if not len(at):
            break
        before = residual[at]

        def lower(value: Tensor, part: Tensor, at: Tensor = at) -> Tensor:
            return loss(value, at[part])

        best, after = x[at], before
        for direction in propose(x[at], before, before / history[-2][at], at):
            trial, lowered = line_search(lower, x[at], direction, before, shortest=shortest)
            best = torch.where(_wide(lowered < after, best), trial, best)
            after = torch.minimum(after, lowered)
        x[at], residual[at] = best, after
        history.append(residual.clone())
        ended = (after >= before) | (after <= settings.goal)
        ended |= (after <= settings.tolerance) & (after > STALLED * before)
        if len(history) > 6:
            ended |= (after > settings.tolerance) & (after > slow * history[-6][at])
        live[at[ended]] = False
    return x, residual


def line_search(
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    direction: Tensor,
    before: Tensor,
    shortest: float = SHORTEST,
    armijo: float = ARMIJO,
) -> tuple[Tensor, Tensor]:
    """(x, loss (B,)) of the best step along a direction, a length a sample; unmoved where none is lower.

    loss: (x, which samples) -> (K,); before: (B,) of x.
    """
    best, after, length = x.clone(), before.clone(), torch.ones_like(before)
    at = torch.arange(len(x), device=x.device)
    while len(at):
        trial = x[at] + _wide(length[at], x) * direction[at]
        value = loss(trial, at)
        better = value < after[at]
        best[at[better]], after[at[better]] = trial[better], value[better]
        enough = value < (1 - armijo * length[at]) * before[at]
        length[at] *= SHRINK
        at = at[~enough & (length[at] >= shortest)]
    return best, after


def dense(function: Function, y: Tensor, jacobian: Callable[[Tensor], Tensor]) -> Propose:
    """Newton's directions of samples that are one token (K, 1, c) each, from their whole derivatives."""

    def propose(x: Tensor, _residual: Tensor, _ratio: Tensor, which: Tensor) -> list[Tensor]:
        error = (y[which] - function(x, which))[:, 0]
        size = max(1, CHUNK // x.shape[2] ** 2)
        parts = zip(x[:, 0].split(size), error.split(size), strict=True)
        return [torch.cat([solved(jacobian(at), rest) for at, rest in parts])[:, None]]

    return propose


def krylov(function: Function, y: Tensor, settings: Settings) -> Propose:
    """Newton's directions from products alone, solved as tightly as the outer iteration is already fast."""

    def propose(x: Tensor, residual: Tensor, ratio: Tensor, which: Tensor) -> list[Tensor]:
        value = function(x, which)
        forcing = (0.9 * ratio.square()).clamp(TIGHTEST, LOOSEST)
        forcing = torch.maximum(forcing, 0.3 * settings.goal / residual).clamp(max=0.5)
        product = differences(lambda moved, part: function(moved, which[part]), x, value)
        return [gmres(product, (y[which] - value).flatten(1), forcing, settings.krylov).view_as(x)]

    return propose


def differences(function: Function, x: Tensor, value: Tensor) -> Product:
    """(g(x + h v) − g(x)) / h with the h that balances round-off and curvature, one forward pass; x: (B, n, c)."""
    scale = torch.finfo(x.dtype).eps ** 0.5 * (1 + x.flatten(1).norm(dim=1))

    def product(directions: Tensor, which: Tensor) -> Tensor:
        step = (scale[which] / directions.norm(dim=1).clamp(min=TINY))[:, None]
        moved = x[which] + (step * directions).view_as(x[which])
        return (function(moved, which) - value[which]).flatten(1) / step

    return product


class Linearised:
    """A function of (B, n, c), acting on each sample alone, and the products with its derivative at one point.

    Ju is the derivative of Jᵀv by v, a backward pass of the same retained graph: ten times faster on CPU than
    forward-mode differentiation.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], at: Tensor) -> None:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
            self.at = at.detach().requires_grad_(True)
            self.out = function(self.at)
            self.weights = torch.zeros_like(self.out, requires_grad=True)
            (self.pulled,) = torch.autograd.grad(self.out, self.at, self.weights, create_graph=True)
        self.value = self.out.detach()

    def product(self, direction: Tensor) -> Tensor:
        """J u, shaped as the function's value; u: (B, n, c)."""
        if not self.pulled.requires_grad:
            return torch.zeros_like(self.out)
        return torch.autograd.grad(self.pulled, self.weights, direction, retain_graph=True)[0]

    def transposed(self, direction: Tensor) -> Tensor:
        """Jᵀ v, (B, n, c)."""
        return torch.autograd.grad(self.out, self.at, direction, retain_graph=True)[0]

    def of_samples(self, multiply: Callable[[Tensor], Tensor]) -> Product:
        """`product` or `transposed` as `gmres` asks for it, where value and point have one shape."""

        def product(directions: Tensor, which: Tensor) -> Tensor:
            every = torch.zeros_like(self.value)
            every[which] = directions.view(-1, *every.shape[1:])
            return multiply(every)[which].flatten(1)

        return product


def gmres(product: Product, right: Tensor, tolerance: Tensor, limit: int) -> Tensor:
    """Solutions d (B, N) of product(d) = right of least residual in a Krylov space a sample, from d = 0.

    right: (B, N); tolerance: (B,) of |right − product(d)| / |right|; limit: products. Images of moves are made
    orthonormal (classical Gram–Schmidt, twice); the next move is the last image.
    """
    result, length = torch.zeros_like(right), right.norm(dim=1)
    at = (length > 0).nonzero().flatten()
    rest, move = right[at], right[at] / length[at, None]
    moves = images = right.new_zeros(len(at), 0, right.shape[1])
    for count in range(min(limit, right.shape[1])):
        if not len(at):
            break
        image = product(move, at)
        before = image.norm(dim=1)
        for _ in range(2):
            along = images[:, :count] @ image[:, :, None]
            image = image - (along.mT @ images[:, :count])[:, 0]
            move = move - (along.mT @ moves[:, :count])[:, 0]
        size = image.norm(dim=1, keepdim=True)
        broken = size[:, 0] <= 1e-14 * before  # nothing new: the space is whole
        image, move = (values.masked_fill(broken[:, None], 0.0) / size.clamp(min=TINY) for values in (image, move))
        share = (image * rest).sum(1, keepdim=True)
        result[at], rest = result[at] + share * move, rest - share * image
        if count == images.shape[1]:
            room = image.new_empty(len(image), ROOM, image.shape[1])
            images, moves = torch.cat([images, room], 1), torch.cat([moves, room], 1)
        images[:, count], moves[:, count] = image, move
        live = ~broken & (rest.norm(dim=1) > tolerance[at] * length[at])
        if not bool(live.all()):
            at, rest, image, images, moves = (held[live] for held in (at, rest, image, images, moves))
        move = image
    return result


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    right: Tensor,
    products: int,
    tolerance: float = 1e-3,
    start: Tensor | None = None,
) -> Tensor:
    """x with operator(x) = right (B, …), for a symmetric positive operator on each sample; what converged stands still.

    products: with the operator, at most, that of a `start` included.
    """
    x, rest = (torch.zeros_like(right), right) if start is None else (start, right - operator(start))
    direction, square, goal = rest, dot(rest, rest), tolerance**2 * dot(right, right)
    for _ in range(products - (start is not None)):
        if not bool((square > goal).any()):
            break
        pushed = operator(direction)
        curvature = dot(direction, pushed)
        live = (square > goal) & (curvature > 0)
        length = _wide(torch.where(live, square / curvature.clamp(min=TINY), 0.0), x)
        x, rest = x + length * direction, rest - length * pushed
        after = dot(rest, rest)
        direction = rest + _wide(torch.where(live, after / square.clamp(min=TINY), 0.0), x) * direction
        square = torch.where(live, after, 0.0)
    return x


def dot(a: Tensor, b: Tensor) -> Tensor:
    """(B,) summed in float64."""
    return (a * b).flatten(1).sum(1, dtype=torch.float64)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, …), numbers of the other's type."""
    values = values if values.dtype == torch.bool else values.to(like.dtype)
    return values[(...,) + (None,) * (like.ndim - 1)]


def factored(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """(LU, pivots) of (T, c, c), as `torch.linalg.lu_solve` takes them; not finite where a matrix is singular.

    In torch's threads MKL's row swaps fail from about 150 columns on: wrong factors, or a process that never ends
    (pytorch issues 142815, 141358; torch 2.15).
    """
    if matrices.device.type != "cpu" or matrices.shape[-1] <= WIDE or len(matrices) < 2:
        return torch.linalg.lu_factor_ex(matrices)[:2]
    parts = [torch.linalg.lu_factor_ex(matrix) for matrix in matrices]
    return torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])


def solved(matrices: Tensor, right: Tensor) -> Tensor:
    """Solutions of square systems (T, c, c), (T, c); not finite where a matrix is singular."""
    return torch.linalg.lu_solve(*factored(matrices), right[:, :, None])[:, :, 0]


def determinant_signs(matrices: Tensor) -> Tensor:
    """(T,) 1, −1, or 0 where a matrix (c, c) is singular; one by one: see `factored`."""
    signs = [torch.linalg.slogdet(matrix).sign for matrix in matrices]
    return torch.stack(signs) if signs else matrices.new_zeros(0)
