"""Which roots a half-step that acts on every token alone has: Newton's method from starts, then along curves.

    starts ──► Newton ──► roots ──► the curve g(x) = y ± t u, u the direction in which g is nearly flat: behind the fold
                                    lies the partner that the root merges with, where t is 0 again

A branch behind a LayerNorm is bounded, so that g covers the space once on balance: the signs of det g′ over all roots
of a token sum to 1 (Brouwer). A token has an odd number of roots; where the truth has a negative sign, at least two
others exist; and a sum other than 1 says that a root is missing. That is a check, and no proof: pairs of roots that
cancel in the sum can hide.

Sources: Allgower & Georg, Introduction to Numerical Continuation Methods (2003), 2, 6; Deimling, Nonlinear Functional
Analysis (1985), 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.solver import CHUNK, Settings, dense, determinant_signs, factored, newton
from backsight.exact.steps import Step

STRAIGHT = 0.9  # least cosine between the tangents of two points that follow one another
PLACES = 8  # between two points of a curve where t is looked at
TOLERANCE, GOAL = 1e-10, 1e-14  # relative residual of a root, and where iterations end
NEWTON, POINTS = 40, 150  # iterations from a start, points of a curve
CROSSINGS = 2  # of t = 0 on a curve, before it is left
APART = 1e-6  # relative distance of two roots
FAR = 4.0  # curves are left where |x| is this many times as long as y and the start of the curve
ON_CURVE, CORRECTIONS, QUICK = 1e-9, 6, 2  # relative residual of a point, iterations to it, and so few are quick
CONTRACTION = 0.5  # of a corrector's error an iteration; above it a step is too long


@dataclass(frozen=True)
class TokenRoots:
    """Different roots of T tokens, R at most. x: (T, R, c), NaN where a token has no more; sign: (T, R) of det g′, 1 or
    −1 (0: singular, or no root)."""

    x: Tensor
    sign: Tensor

    @property
    def known(self) -> Tensor:
        """(T, R) bool"""
        return self.x[..., 0].isfinite()

    @property
    def count(self) -> Tensor:
        """(T,) roots of each token."""
        return self.known.sum(1)

    @property
    def degree(self) -> Tensor:
        """(T,) sum of the signs: 1 where a bounded branch has no root missing."""
        return self.sign.sum(1)

    def best(self, score: Tensor) -> tuple[Tensor, Tensor]:
        """(T,) number of the root with the lowest score (T, R) of each token, and whether it has one; inf: not this."""
        least = F.pad(score.masked_fill(~self.known, torch.inf), (0, 1), value=torch.inf).min(1)
        return least.indices.clamp(max=score.shape[1] - 1), least.values.isfinite()


def token_roots(step: Step, y: Tensor, starts: Sequence[Tensor], curves: bool = True) -> TokenRoots:
    """The roots of every token that the starts and the curves through what they find lead to.

    step: one that acts on every token alone; y, starts: (T, c); curves: followed both ways from the roots of tokens
    whose signs do not sum to 1. Raises BacksightError for other steps.
    """
    if not step.tokenwise or step.norm is not None:
        raise BacksightError(f"{step.destination} mixes tokens or ends in a norm: its roots cannot be listed.")
    parts = []
    for at in torch.arange(len(y), device=y.device).split(max(1, CHUNK // y.shape[1] ** 2)):
        roots = TokenRoots(y[at, None][:, :0], y[at, :0])
        for start in starts:
            roots = _with(step, y[at], roots, start[at])
        unsure = roots.degree != 1  # a sum of 1 gives no reason to look for more
        for number in range(roots.x.shape[1] if curves else 0):
            which = (unsure & roots.known[:, number]).nonzero().flatten()
            for met in follow(step, y[at][which], roots.x[which, number]).unbind(1) if len(which) else ():
                start = torch.full_like(y[at], math.nan).index_copy(0, which, met)
                roots = _with(step, y[at], roots, start)
        parts.append(roots)
    most = max(part.x.shape[1] for part in parts)
    x = [F.pad(part.x, (0, 0, 0, most - part.x.shape[1]), value=math.nan) for part in parts]
    return TokenRoots(torch.cat(x), torch.cat([F.pad(part.sign, (0, most - part.sign.shape[1])) for part in parts]))


def _with(step: Step, y: Tensor, roots: TokenRoots, start: Tensor) -> TokenRoots:
    """With those that Newton finds from a start for each token (T, c), NaN: none, where they are new."""
    at = start.isfinite().all(1).nonzero().flatten()
    x, residual = polished(step, y[at], start[at])
    near = (x[:, None] - roots.x[at]).norm(dim=2) <= APART * x.norm(dim=1, keepdim=True)
    fresh = (residual <= TOLERANCE) & ~near.any(1)
    at, found = at[fresh], x[fresh]
    place = at, roots.count[at]
    x, sign = F.pad(roots.x, (0, 0, 0, 1), value=math.nan), F.pad(roots.sign, (0, 1))
    x[place], sign[place] = found, determinant_signs(step.slopes(found))
    most = int(x[..., 0].isfinite().sum(1).amax())
    return TokenRoots(x[:, :most], sign[:, :most])


def polished(step: Step, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(x, relative residual) of Newton's method from a start for each token. y, x: (T, c)."""

    def function(x: Tensor, _which: Tensor) -> Tensor:
        return step.forward(x)

    propose = dense(function, y[:, None], step.slopes)
    x, residual = newton(function, y[:, None], x[:, None], propose, Settings(TOLERANCE, GOAL, NEWTON))
    return x[:, 0], residual


def follow(step: Step, y: Tensor, x: Tensor) -> Tensor:
    """(K, 2 CROSSINGS, c) where the curves g(x) = y ± t u through roots meet t = 0 again, near other roots; else NaN.

    y, x: (K, c) with g(x) = y; u: the direction in which g is flattest. Curves are followed by arc length, and so
    around every fold, until CROSSINGS, far out, or POINTS.
    """
    u, slope, v = torch.linalg.svd(step.slopes(x))
    flat = torch.cat([u[:, :, -1], -u[:, :, -1]])
    # J v = σ u: along the curve x moves by v while t moves by σ; t rises at first.
    tangent = F.pad(torch.cat([v[:, -1], -v[:, -1]]), (0, 1))
    tangent[:, -1] = slope[:, -1].repeat(2)
    tangent = tangent / tangent.norm(dim=1, keepdim=True)
    place, y = F.pad(x, (0, 1)).repeat(2, 1), y.repeat(2, 1)
    count, channels = y.shape
    size = y.norm(dim=1).clamp(min=torch.finfo(y.dtype).tiny)
    scale = torch.maximum(size, place.norm(dim=1))
    length, live = 1e-3 * scale, tangent.isfinite().all(1)
    met, points = torch.zeros(2, count, dtype=torch.long, device=y.device)
    crossings = y.new_full((count, CROSSINGS, channels), math.nan)
    while len(at := live.nonzero().flatten()):
        guess = place[at] + length[at, None] * tangent[at]
        jacobian = torch.cat([step.slopes(guess[:, :-1]), -flat[at, :, None]], dim=2)
        factors = factored(torch.cat([jacobian, tangent[at, None]], dim=1))
        corrected, good, quick = _corrected(step, y[at], flat[at], guess, factors, size[at])
        ahead = F.pad(torch.zeros_like(y[at]), (0, 1), value=1.0)
        turned = torch.linalg.lu_solve(*factors, ahead[:, :, None])[:, :, 0]
        turned = turned / turned.norm(dim=1, keepdim=True)
        good &= turned.isfinite().all(1) & ((turned * tangent[at]).sum(1) > STRAIGHT)
        good &= (corrected - guess).norm(dim=1) <= 0.5 * length[at]
        took, stride = at[good], length[at[good], None]
        path = place[took], stride * tangent[took], corrected[good], stride * turned[good]
        for which, near in _met(*path):
            curve = took[which]
            free = met[curve] < CROSSINGS
            crossings[curve[free], met[curve[free]]] = near[free]
            met[curve] += 1
        place[took], tangent[took] = corrected[good], turned[good]
        points[at] += 1
        length[at] *= torch.where(good, torch.where(quick, 2.0, 1.2), 0.4)
        ended = (met[at] >= CROSSINGS) | (place[at, :-1].norm(dim=1) > FAR * scale[at])
        ended |= (length[at] < 1e-9 * scale[at]) | (points[at] >= POINTS)
        live[at[ended]] = False
    return torch.cat(crossings.chunk(2), dim=1)


def _corrected(
    step: Step, y: Tensor, flat: Tensor, guess: Tensor, factors: tuple[Tensor, Tensor], size: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(place, good, quick): back on the curve across the tangent, with the derivative of the guess kept."""
    place, last, good, quick = guess, torch.full_like(size, torch.inf), size > 0, size < 0
    for number in range(CORRECTIONS):
        error = y + place[:, -1:] * flat - step.forward(place[:, None, :-1])[:, 0]
        now = (error.norm(dim=1) / size).nan_to_num(torch.inf, torch.inf)
        done = now <= ON_CURVE
        quick |= done & (number <= QUICK)
        good &= done | (now <= CONTRACTION * last)
        if bool((done | ~good).all()):
            break
        move = torch.linalg.lu_solve(*factors, F.pad(error, (0, 1))[:, :, None])[:, :, 0]
        place, last = torch.where((done | ~good)[:, None], place, place + move), now
    return place, good & done, quick


def _met(a: Tensor, slope_a: Tensor, b: Tensor, slope_b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(which, x near) where t changes its sign between two points, on the cubic through them (Hermite)."""
    s = torch.linspace(0, 1, PLACES + 1).to(a)[:, None, None]
    path = (1 + 2 * s) * (1 - s) ** 2 * a + s * (1 - s) ** 2 * slope_a
    path = path + s * s * (3 - 2 * s) * b + s * s * (s - 1) * slope_b
    before, after = path[:-1, :, -1], path[1:, :, -1]
    # A curve that begins at a root has t = 0 there: that is no crossing.
    for number, crossed in enumerate((before * after < 0) | ((after == 0) & (before != 0))):
        if len(which := crossed.nonzero().flatten()):
            share = before[number, which] / (before[number, which] - after[number, which])
            yield which, torch.lerp(path[number, which], path[number + 1, which], share[:, None])[:, :-1]
