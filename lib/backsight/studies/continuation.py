"""Which roots a half-step that acts on every token alone has: Newton's method from starts, then along curves.

    starts ──► Newton ──► no root? ──► the curve g(x) = y + t (g(start) − y) from t = 1 to t = 0, around its folds
                            root ───► the curve g(x) = y ± t u, u the direction in which g is nearly flat: behind
                                      the fold lies the partner that the root merges with; and so on from each

A branch behind a LayerNorm is bounded, so that g covers the space once on balance: the signs of det g′ over all roots
of a token sum to 1 (Brouwer). A token has an odd number of roots; where the truth has a negative sign, at least two
others exist; and a sum other than 1 says that a root is missing. That is a check, and no proof: pairs of roots that
cancel in the sum can hide.

Sources: Allgower & Georg, Introduction to Numerical Continuation Methods (2003), 2, 6; Deimling, Nonlinear Functional
Analysis (1985), 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.solver import CHUNK, Settings, dense, factored, newton, solved
from backsight.exact.steps import Step

STRAIGHT = 0.9  # least cosine between the tangents of two points that follow one another
INSIDE = tuple(number / 8 for number in range(1, 9))  # places between two points of a curve where t is looked at
COARSE = 1e-5  # relative residual that float32 reaches
NEAR = 3e-3  # relative distance within which a root in float32 counts as a known one
TOLERANCE, GOAL = 1e-10, 1e-14  # relative residual of a root, and where iterations end
NEWTON, POINTS = 40, 150  # iterations from a start, points of a curve
CROSSINGS = 2  # of t = 0 on a curve, before it is left
APART = 1e-6  # relative distance of two roots
FAR = 4.0  # curves are left where |x| is this many times as long as y and the start of the curve
CONTRACTION = 0.5  # of a corrector's error an iteration; above it a step is too long


@dataclass(frozen=True)
class TokenRoots:
    """Different roots, any number a token.

    token: (K,) long, ascending; x: (K, c); residual: (K,) relative; sign: (K,) of det g′, 1 or −1 (0: singular);
    tokens: how many there were.
    """

    token: Tensor
    x: Tensor
    residual: Tensor
    sign: Tensor
    tokens: int

    @property
    def count(self) -> Tensor:
        """(T,) roots of each token."""
        return torch.bincount(self.token, minlength=self.tokens)

    @property
    def degree(self) -> Tensor:
        """(T,) sum of the signs: 1 where a bounded branch has no root missing."""
        return torch.zeros(self.tokens, dtype=self.sign.dtype).index_add(0, self.token, self.sign)

    def best(self, score: Tensor) -> Tensor:
        """(T,) number of the root with the lowest score (K,) of each token, −1 where it has none."""
        # Written in descending order one by one: the last to be written is the lowest.
        order = torch.argsort(score, descending=True, stable=True)
        rank = torch.empty_like(order).index_copy(0, order, torch.arange(len(order)))
        last = torch.full((self.tokens,), -1, dtype=torch.long).scatter_reduce(0, self.token, rank, "amax")
        return torch.where(last >= 0, order[last.clamp(min=0)], last) if len(order) else last


def _value(step: Step, x: Tensor) -> Tensor:
    """g of tokens (T, c), one by one."""
    return step.forward(x[:, None])[:, 0]


def polished(
    step: Step, y: Tensor, x: Tensor, tolerance: float = TOLERANCE, goal: float = GOAL
) -> tuple[Tensor, Tensor]:
    """(x, relative residual) of Newton's method from a start for each token. y, x: (T, c)."""
    if not len(y):
        return x, y.new_zeros(0)

    def function(x: Tensor, _which: Tensor) -> Tensor:
        return _value(step, x[:, 0])[:, None]

    y, x = y[:, None], x[:, None]
    effort = Settings(tolerance, goal, NEWTON)
    x, residual, _ = newton(function, y, x, dense(function, y, step.slopes), effort)
    return x[:, 0], residual


def follow(
    step: Step, y: Tensor, x: Tensor, t: Tensor, direction: Tensor, sense: Tensor, crossings: int = CROSSINGS
) -> tuple[Tensor, Tensor]:
    """The curves g(x) = y + t · direction, and where they meet t = 0, by arc length and so around every fold.

    y, x: (T, c) with g(x) = y + t · direction; t: (T,); direction: (T, c) unit vectors; sense: (T,) 1 or −1, which way
    t moves first. A curve ends after `crossings`, far out, or after `points`. Returns (number of the curve (K,), x near
    a root (K, c), not yet polished).
    """
    curves, places = [torch.zeros(0, dtype=torch.long)], [y[:0]]
    for at in torch.arange(len(y)).split(_chunk(y)):
        curve, place = _follow(step, y[at], x[at], t[at], direction[at], sense[at], crossings)
        curves.append(at[curve])
        places.append(place)
    return torch.cat(curves), torch.cat(places)


def _follow(
    step: Step, y: Tensor, x: Tensor, t: Tensor, direction: Tensor, sense: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    count, channels = y.shape
    size = _size(y)
    place = torch.cat([x, t[:, None]], dim=1)  # (T, c + 1)
    tangent = _first_tangent(step.slopes(x), direction, sense)
    scale = torch.maximum(size, x.norm(dim=1))
    length = 1e-3 * scale
    met = torch.zeros(count, dtype=torch.long)
    steps = torch.zeros(count, dtype=torch.long)
    live = tangent.isfinite().all(1)
    crossed, crossings = [torch.zeros(0, dtype=torch.long)], [y[:0]]
    for _ in range(2 * POINTS):
        at = live.nonzero().flatten()
        if not len(at):
            break
        guess = place[at] + length[at, None] * tangent[at]
        bordered = y.new_zeros(len(at), channels + 1, channels + 1)
        bordered[:, :channels, :channels] = step.slopes(guess[:, :channels])
        bordered[:, :channels, channels] = -direction[at]
        bordered[:, channels] = tangent[at]
        factors, pivots = factored(bordered)
        corrected, good, quick = _corrected(step, y[at], direction[at], guess, factors, pivots, size[at])
        unit = y.new_zeros(len(at), channels + 1, 1)
        unit[:, channels] = 1
        turned = torch.linalg.lu_solve(factors, pivots, unit)[:, :, 0]
        turned = turned / turned.norm(dim=1, keepdim=True)
        good &= turned.isfinite().all(1) & ((turned * tangent[at]).sum(1) > STRAIGHT)
        good &= (corrected - guess).norm(dim=1) <= 0.5 * length[at]
        took = at[good]
        for which, near in _between(place[took], tangent[took], corrected[good], turned[good], length[took]):
            crossed.append(took[which])
            crossings.append(near[:, :channels])
            met[took[which]] += 1
        place[took], tangent[took] = corrected[good], turned[good]
        steps[at] += 1
        factor = torch.where(good, torch.where(quick, 2.0, 1.2), 0.4)
        length[at] = length[at] * factor
        ended = (met[at] >= most) | (place[at, :channels].norm(dim=1) > FAR * scale[at])
        ended |= (length[at] < 1e-9 * scale[at]) | (steps[at] >= POINTS)
        live[at[ended]] = False
    return torch.cat(crossed), torch.cat(crossings)


def _first_tangent(jacobian: Tensor, direction: Tensor, sense: Tensor) -> Tensor:
    """(T, c + 1) unit vectors (dx, dt) with J dx = direction dt; where J is singular, its null vector with dt = 0."""
    tangent = torch.cat([solved(jacobian, direction), torch.ones_like(sense)[:, None]], dim=1)
    singular = ~tangent.isfinite().all(1)
    if bool(singular.any()):
        wide = torch.cat([jacobian[singular], -direction[singular, :, None]], dim=2)
        tangent[singular] = torch.linalg.svd(wide).Vh[:, -1]
    return sense[:, None] * tangent / tangent.norm(dim=1, keepdim=True).clamp(min=1e-300)


def _corrected(
    step: Step, y: Tensor, direction: Tensor, guess: Tensor, factors: Tensor, pivots: Tensor, size: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(place, good, quick): back on the curve across the tangent, with the derivative of the guess kept."""
    channels = y.shape[1]
    place, last = guess, torch.full_like(size, torch.inf)
    good, quick = torch.ones_like(size, dtype=torch.bool), torch.zeros_like(size, dtype=torch.bool)
    for number in range(6):
        error = y + place[:, channels:] * direction - _value(step, place[:, :channels])
        now = _relative(error, size)
        done = now <= 1e-9
        quick |= done & (number <= 2)
        good &= done | (now <= CONTRACTION * last)
        if bool((done | ~good).all()):
            return place, good & done, quick
        right = torch.cat([error, torch.zeros_like(error[:, :1])], dim=1)[:, :, None]
        move = torch.linalg.lu_solve(factors, pivots, right)[:, :, 0]
        place = torch.where((done | ~good)[:, None], place, place + move)
        last = now
    return place, good & done, quick


def _between(a: Tensor, slope_a: Tensor, b: Tensor, slope_b: Tensor, length: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(which, (K, c + 1) near) where t changes its sign between two points, on the cubic through them (Hermite)."""
    found = []
    h = length[:, None]
    earlier = a
    for number, s in enumerate(INSIDE):
        later = (
            (1 + 2 * s) * (1 - s) ** 2 * a
            + s * (1 - s) ** 2 * h * slope_a
            + s * s * (3 - 2 * s) * b
            + s * s * (s - 1) * h * slope_b
        )
        before, after = earlier[:, -1], later[:, -1]
        # A curve that begins at a root has t = 0 there: that is no crossing.
        crossed = (before * after < 0) | ((after == 0) & (before != 0))
        which = crossed.nonzero().flatten()
        if len(which) and (number > 0 or bool((a[which, -1] != 0).any())):
            share = (before / (before - after))[which, None]
            found.append((which, earlier[which] + share * (later - earlier)[which]))
        earlier = later
    return found


def token_roots(
    step: Step,
    y: Tensor,
    starts: Sequence[Tensor],
    rounds: int = 1,
    single: Step | None = None,
    tolerance: float = TOLERANCE,
) -> TokenRoots:
    """The roots of every token that the starts and the curves behind them lead to.

    step: one that acts on every token alone; y, starts: (T, c); single: the same step in float32, which brings starts
    near a root at half the cost; tolerance: relative residual of a root, which is polished in y's precision. Tokens
    that no start solves are followed along curves from their starts; tokens whose signs do not sum to 1 along the
    curves through their roots, for so many rounds. Raises BacksightError for other steps.
    """
    if not step.tokenwise or step.norm is not None:
        raise BacksightError(f"{step.destination} mixes tokens or ends in a norm: its roots cannot be listed.")
    everywhere = torch.arange(len(y))
    roots = TokenRoots(everywhere[:0], y[:0], y.new_zeros(0), y.new_zeros(0), len(y))
    for start in starts:
        roots = _added(step, y, roots, everywhere, start, tolerance, single)
    for start in starts:
        left = (roots.count == 0).nonzero().flatten()
        if not len(left):
            break
        away = _value(step, start[left]) - y[left]
        t = away.norm(dim=1)
        direction = away / t.clamp(min=1e-300)[:, None]
        curve, met = follow(step, y[left], start[left], t, direction, -torch.ones_like(t), crossings=1)
        roots = _added(step, y, roots, left[curve], met, tolerance)
    followed = 0
    for _ in range(rounds):
        # Roots are appended, so that those not yet followed are the last; a sum of 1 gives no reason to go on.
        at = torch.arange(followed, len(roots.token))
        at = at[roots.degree[roots.token[at]] != 1]
        followed = len(roots.token)
        if not len(at):
            break
        # Both ways along the direction that g hardly moves in.
        x, token = roots.x[at], roots.token[at]
        flat = torch.cat([torch.linalg.svd(step.slopes(part)).U[:, :, -1] for part in x.split(_chunk(x))])
        for sense in (1.0, -1.0):
            begin = torch.zeros(len(at), dtype=y.dtype)
            curve, met = follow(step, y[token], x, begin, flat, torch.full_like(begin, sense))
            roots = _added(step, y, roots, token[curve], met, tolerance)
    order = torch.argsort(roots.token, stable=True)
    return TokenRoots(roots.token[order], roots.x[order], roots.residual[order], roots.sign[order], len(y))


def token_signs(step: Step, x: Tensor) -> Tensor:
    """(T,) signs of det g′ at x (T, c)."""
    return torch.cat([signs(step.slopes(part)) for part in x.split(_chunk(x))])


def _chunk(values: Tensor) -> int:
    return max(1, CHUNK // values.shape[1] ** 2)


def _added(
    step: Step, y: Tensor, roots: TokenRoots, token: Tensor, start: Tensor, tolerance: float, single: Step | None = None
) -> TokenRoots:
    """With those that Newton finds from starts (K, c) of the tokens (K,), where they are new."""
    if single is not None:
        near, residual = polished(single, y[token].float(), start.float(), COARSE, COARSE)
        # What float32 already shows to be a known root needs no polish; what it cannot solve is lost with this start.
        kept = (residual <= 10 * COARSE) & _fresh(roots, token, near.to(y), NEAR)
        token, start = token[kept], near[kept].to(y)
    x, residual = polished(step, y[token], start)
    ended = residual <= tolerance
    token, x, residual = token[ended], x[ended], residual[ended]
    fresh = _fresh(roots, token, x, APART)
    token, x, residual = token[fresh], x[fresh], residual[fresh]
    if not len(token):
        return roots
    new = (token, x, residual, token_signs(step, x))
    known = (roots.token, roots.x, roots.residual, roots.sign)
    token, x, residual, sign = (torch.cat(both) for both in zip(known, new, strict=True))
    return TokenRoots(token, x, residual, sign, roots.tokens)


def _fresh(roots: TokenRoots, token: Tensor, x: Tensor, apart: float) -> Tensor:
    """(K,) bool: unlike the roots that are known, and unlike earlier ones of these."""
    known = torch.cat([roots.token, token])
    places = torch.cat([roots.x, x])
    order = torch.argsort(known, stable=True)  # earlier ones first within a token
    fresh = torch.ones(len(known), dtype=torch.bool)
    sorted_token, sorted_x = known[order], places[order]
    for back in range(1, int(torch.bincount(known).max()) if len(known) else 0):
        same = sorted_token[back:] == sorted_token[:-back]
        near = (sorted_x[back:] - sorted_x[:-back]).norm(dim=1) <= apart * sorted_x[back:].norm(dim=1)
        fresh[order[back:][same & near]] = False
    return fresh[len(roots.token) :]


def _size(y: Tensor) -> Tensor:
    return y.norm(dim=1).clamp(min=torch.finfo(y.dtype).tiny)


def _relative(error: Tensor, size: Tensor) -> Tensor:
    return (error.norm(dim=1) / size).nan_to_num(torch.inf, torch.inf)


def signs(matrices: Tensor) -> Tensor:
    """(T,) signs of the determinants of (T, c, c)."""
    factors, pivots = factored(matrices)
    swaps = (pivots != torch.arange(1, pivots.shape[-1] + 1, device=pivots.device)).sum(-1)
    diagonal = factors.diagonal(dim1=-2, dim2=-1)
    odd = (swaps + (diagonal < 0).sum(-1)) % 2
    return (1.0 - 2.0 * odd).to(matrices).masked_fill((diagonal == 0).any(-1), 0.0)
