"""Which roots a half-step has, and which of them an exact inverse meets: the instruments of several studies.

    starts ──► Newton ──► no root? ──► the curve g(x) = y + t (g(start) − y) from t = 1 to t = 0, around its folds
                            root ───► the curve g(x) = y ± t u, u the direction in which g is nearly flat: behind
                                      the fold lies the partner that the root merges with; and so on from each

A branch behind a LayerNorm is bounded, so that g covers the space once on balance: the signs of det g′ over all roots
of a token sum to 1 (Brouwer). A token has an odd number of roots; where the truth has a negative sign, at least two
others exist; and a sum other than 1 says that a root is missing. That is a check, and no proof: pairs of roots that
cancel in the sum can hide. `RootChoosing` is the exact inverse that looks for them; `judged` tells what a trace met.

Sources: Allgower & Georg, Introduction to Numerical Continuation Methods (2003), 2, 6; Deimling, Nonlinear Functional
Analysis (1985), 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.inverse import ExactInverse, Trace, solve_step
from backsight.exact.solver import CHUNK, Score, Settings, Solution, dense, factored, newton, solved
from backsight.exact.steps import Step
from backsight.representation import Representation
from backsight.tables.names import RIGHT

STRAIGHT = 0.9  # least cosine between the tangents of two points that follow one another
INSIDE = tuple(number / 8 for number in range(1, 9))  # places between two points of a curve where t is looked at
COARSE = 1e-5  # relative residual that float32 reaches
NEAR = 3e-3  # relative distance within which a root in float32 counts as a known one
CONTRACTION = 0.5  # of a corrector's error an iteration; above it a step is too long
SAME_ROOT = 0.1  # of a solution's distance from the truth: nearer to the truth's own root, it is that one
BASES = ("modular", "direct", "linear")  # of a MAP inverse, the first that is there

Value = Callable[[Tensor], Tensor]  # (T, c) -> (T, c)
Jacobian = Callable[[Tensor], Tensor]  # (T, c) -> (T, c, c)


@dataclass(frozen=True)
class TokenMap:
    """g and its derivative, tokens one by one: value (T, c) -> (T, c), jacobian (T, c) -> (T, c, c)."""

    value: Value
    jacobian: Jacobian


@dataclass(frozen=True)
class Search:
    """How long roots are looked for.

    tolerance: relative residual of a root; goal: where iterations end; newton: iterations; points: of a curve;
    rounds: of curves through the known roots of tokens whose signs do not sum to 1; crossings: of t = 0 on a curve,
    before it is left; apart: relative distance of two roots; far: curves are left where |x| is this many times as long
    as y and the start of the curve.
    """

    tolerance: float = 1e-10
    goal: float = 1e-14
    newton: int = 40
    points: int = 150
    rounds: int = 1
    crossings: int = 2
    apart: float = 1e-6
    far: float = 4.0


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
        order = torch.argsort(score, descending=True, stable=True)
        found = torch.full((self.tokens,), -1, dtype=torch.long)
        # Written in descending order one by one: the last to be written is the lowest.
        rank = torch.empty_like(order).index_copy(0, order, torch.arange(len(order)))
        last = torch.full((self.tokens,), -1, dtype=torch.long).scatter_reduce(0, self.token, rank, "amax")
        has = last >= 0
        found[has] = order[last[has]]
        return found


def token_map(step: Step) -> TokenMap:
    return TokenMap(lambda x: step.forward(x[:, None])[:, 0], step.slopes)


def polished(tokens: TokenMap, y: Tensor, x: Tensor, search: Search | None = None) -> tuple[Tensor, Tensor]:
    """(x, relative residual) of Newton's method from a start for each token. y, x: (T, c)."""
    search = search or Search()
    if not len(y):
        return x, y.new_zeros(0)

    def function(x: Tensor) -> Tensor:
        return tokens.value(x[:, 0])[:, None]

    y, x = y[:, None], x[:, None]
    effort = Settings(search.tolerance, search.goal, search.newton)
    x, residual, _, _ = newton(function, y, x, dense(function, y, tokens.jacobian), effort)
    return x[:, 0], residual


@dataclass(frozen=True)
class Crossings:
    """Where curves met t = 0: token (K,) number of the curve, x (K, c) near a root (not yet polished)."""

    token: Tensor
    x: Tensor


def follow(
    tokens: TokenMap, y: Tensor, x: Tensor, t: Tensor, direction: Tensor, sense: Tensor, search: Search | None = None
) -> Crossings:
    """The curves g(x) = y + t · direction, and where they meet t = 0, by arc length and so around every fold.

    y, x: (T, c) with g(x) = y + t · direction; t: (T,); direction: (T, c) unit vectors; sense: (T,) 1 or −1, which way
    t moves first. A curve ends after `crossings`, far out, or after `points`.
    """
    search = search or Search()
    parts = []
    for at in torch.arange(len(y)).split(_chunk(y)):
        made = _follow(tokens, y[at], x[at], t[at], direction[at], sense[at], search)
        parts.append(replace(made, token=at[made.token]))
    if not parts:
        return Crossings(torch.zeros(0, dtype=torch.long), y[:0])
    token, places = (torch.cat([getattr(each, name) for each in parts]) for name in ("token", "x"))
    return Crossings(token, places)


def _follow(
    tokens: TokenMap, y: Tensor, x: Tensor, t: Tensor, direction: Tensor, sense: Tensor, search: Search
) -> Crossings:
    count, channels = y.shape
    size = _size(y)
    place = torch.cat([x, t[:, None]], dim=1)  # (T, c + 1)
    tangent = _first_tangent(tokens.jacobian(x), direction, sense)
    scale = torch.maximum(size, x.norm(dim=1))
    length = 1e-3 * scale
    met = torch.zeros(count, dtype=torch.long)
    steps = torch.zeros(count, dtype=torch.long)
    live = tangent.isfinite().all(1)
    found_token, found_x = [], []
    for _ in range(2 * search.points):
        at = live.nonzero().flatten()
        if not len(at):
            break
        guess = place[at] + length[at, None] * tangent[at]
        bordered = y.new_zeros(len(at), channels + 1, channels + 1)
        bordered[:, :channels, :channels] = tokens.jacobian(guess[:, :channels])
        bordered[:, :channels, channels] = -direction[at]
        bordered[:, channels] = tangent[at]
        factors, pivots = factored(bordered)
        there, good, quick = _corrected(tokens, y[at], direction[at], guess, factors, pivots, size[at])
        unit = y.new_zeros(len(at), channels + 1, 1)
        unit[:, channels] = 1
        turned = torch.linalg.lu_solve(factors, pivots, unit)[:, :, 0]
        turned = turned / turned.norm(dim=1, keepdim=True)
        good &= turned.isfinite().all(1) & ((turned * tangent[at]).sum(1) > STRAIGHT)
        good &= (there - guess).norm(dim=1) <= 0.5 * length[at]
        took = at[good]
        for which, near in _between(place[took], tangent[took], there[good], turned[good], length[took]):
            found_token.append(took[which])
            found_x.append(near[:, :channels])
            met[took[which]] += 1
        place[took], tangent[took] = there[good], turned[good]
        steps[at] += 1
        factor = torch.where(good, torch.where(quick, 2.0, 1.2), 0.4)
        length[at] = length[at] * factor
        ended = (met[at] >= search.crossings) | (place[at, :channels].norm(dim=1) > search.far * scale[at])
        ended |= (length[at] < 1e-9 * scale[at]) | (steps[at] >= search.points)
        live[at[ended]] = False
    if not found_token:
        return Crossings(torch.zeros(0, dtype=torch.long), y[:0])
    return Crossings(torch.cat(found_token), torch.cat(found_x))


def _first_tangent(jacobian: Tensor, direction: Tensor, sense: Tensor) -> Tensor:
    """(T, c + 1) unit vectors (dx, dt) with J dx = direction dt; where J is singular, its null vector with dt = 0."""
    tangent = torch.cat([solved(jacobian, direction), torch.ones_like(sense)[:, None]], dim=1)
    singular = ~tangent.isfinite().all(1)
    if bool(singular.any()):
        wide = torch.cat([jacobian[singular], -direction[singular, :, None]], dim=2)
        tangent[singular] = torch.linalg.svd(wide).Vh[:, -1]
    return sense[:, None] * tangent / tangent.norm(dim=1, keepdim=True).clamp(min=1e-300)


def _corrected(
    tokens: TokenMap, y: Tensor, direction: Tensor, guess: Tensor, factors: Tensor, pivots: Tensor, size: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(place, good, quick): back on the curve across the tangent, with the derivative of the guess kept."""
    channels = y.shape[1]
    place, last = guess, torch.full_like(size, torch.inf)
    good, quick = torch.ones_like(size, dtype=torch.bool), torch.zeros_like(size, dtype=torch.bool)
    for number in range(6):
        error = y + place[:, channels:] * direction - tokens.value(place[:, :channels])
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
    tokens: TokenMap, y: Tensor, starts: Sequence[Tensor], search: Search | None = None, single: TokenMap | None = None
) -> TokenRoots:
    """The roots of every token that the starts and the curves behind them lead to.

    y: (T, c); starts: each (T, c); single: the same map in float32, which brings starts near a root at half the cost;
    every root is polished in y's precision. Tokens that no start solves are followed along curves from their starts;
    the curves through roots are followed for `search.rounds`. Raises BacksightError on unfit shapes.
    """
    search = search or Search()
    if y.ndim != 2 or not starts or any(each.shape != y.shape for each in starts):
        raise BacksightError(
            f"Roots are looked for from starts of the shape of y (tokens, channels), not from "
            f"{[tuple(each.shape) for each in starts]} for {tuple(y.shape)}."
        )
    everywhere = torch.arange(len(y))
    roots = _none(y)
    for start in starts:
        roots = _added(tokens, y, roots, everywhere, start, search, single)
    for start in starts:
        left = (roots.count == 0).nonzero().flatten()
        if not len(left):
            break
        away = tokens.value(start[left]) - y[left]
        t = away.norm(dim=1)
        direction = away / t.clamp(min=1e-300)[:, None]
        met = follow(tokens, y[left], start[left], t, direction, -torch.ones_like(t), replace(search, crossings=1))
        roots = _added(tokens, y, roots, left[met.token], met.x, search)
    followed = 0
    for _ in range(search.rounds):
        # Roots are appended, so that those not yet followed are the last; a sum of 1 gives no reason to go on.
        at = torch.arange(followed, len(roots.token))
        at = at[roots.degree[roots.token[at]] != 1]
        followed = len(roots.token)
        if not len(at):
            break
        roots = _through(tokens, y, roots, at, search)
    order = torch.argsort(roots.token, stable=True)
    return TokenRoots(roots.token[order], roots.x[order], roots.residual[order], roots.sign[order], len(y))


def _through(tokens: TokenMap, y: Tensor, roots: TokenRoots, at: Tensor, search: Search) -> TokenRoots:
    """With what lies on the curves through these roots along the direction that g hardly moves in, both ways."""
    x, token = roots.x[at], roots.token[at]
    flat = torch.cat([torch.linalg.svd(tokens.jacobian(part)).U[:, :, -1] for part in x.split(_chunk(x))])
    for sense in (1.0, -1.0):
        begin = torch.zeros(len(at), dtype=y.dtype)
        met = follow(tokens, y[token], x, begin, flat, torch.full_like(begin, sense), search)
        roots = _added(tokens, y, roots, token[met.token], met.x, search)
    return roots


def token_signs(tokens: TokenMap, x: Tensor) -> Tensor:
    """(T,) signs of det g′ at x (T, c)."""
    return torch.cat([signs(tokens.jacobian(part)) for part in x.split(_chunk(x))])


def _chunk(values: Tensor) -> int:
    return max(1, CHUNK // values.shape[1] ** 2)


def _none(y: Tensor) -> TokenRoots:
    return TokenRoots(torch.zeros(0, dtype=torch.long), y[:0], y.new_zeros(0), y.new_zeros(0), len(y))


def _added(
    tokens: TokenMap,
    y: Tensor,
    roots: TokenRoots,
    token: Tensor,
    start: Tensor,
    search: Search,
    single: TokenMap | None = None,
) -> TokenRoots:
    """With those that Newton finds from starts (K, c) of the tokens (K,), where they are new."""
    if not len(token):
        return roots
    if single is not None:
        coarse = replace(search, tolerance=COARSE, goal=COARSE)
        near, residual = polished(single, y[token].float(), start.float(), coarse)
        # What float32 already shows to be a known root needs no polish; what it cannot solve is lost with this start.
        kept = (residual <= 10 * COARSE) & _fresh(roots, token, near.to(y), NEAR)
        token, start = token[kept], near[kept].to(y)
        if not len(token):
            return roots
    x, residual = polished(tokens, y[token], start, search)
    ended = residual <= search.tolerance
    token, x, residual = token[ended], x[ended], residual[ended]
    fresh = _fresh(roots, token, x, search.apart)
    token, x, residual = token[fresh], x[fresh], residual[fresh]
    if not len(token):
        return roots
    sign = token_signs(tokens, x)
    return TokenRoots(
        torch.cat([roots.token, token]),
        torch.cat([roots.x, x]),
        torch.cat([roots.residual, residual]),
        torch.cat([roots.sign, sign]),
        roots.tokens,
    )


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


def step_roots(
    step: Step, y: Tensor, starts: Sequence[Tensor], search: Search | None = None, single: Step | None = None
) -> TokenRoots:
    """The roots of a step that acts on every token alone, of all tokens (B n) of streams y (B, n, c).

    starts: each (B, n, c); single: the same step in float32. Raises BacksightError for other steps.
    """
    if not step.tokenwise or step.norm is not None:
        raise BacksightError(f"{step.destination} mixes tokens or ends in a norm: its roots cannot be listed.")
    coarse = None if single is None else token_map(single)
    return token_roots(token_map(step), y.flatten(0, 1), [start.flatten(0, 1) for start in starts], search, coarse)


# An exact inverse that looks for roots


class RootChoosing(ExactInverse):
    """An exact inverse that follows tokens along curves where no start solves them, or where a root is doubted.

    curves: rounds of curves through known roots; truth: {stream: (B, n, c)}, an oracle: the root nearest to the truth
    is kept, which no inverse can do; near: {stream: (B, n, c)} guesses that are tried first.
    """

    curves: int = 0
    truth: Mapping[str, Tensor] | None = None
    near: Mapping[str, Tensor] = {}

    @classmethod
    def of(cls, inverse: ExactInverse, settings: Settings | None = None, **how: Any) -> RootChoosing:
        """The same inverse, looking for roots as the attributes `how` say."""
        kept = {name: getattr(inverse, name) for name in HOW if isinstance(inverse, RootChoosing)}
        made = cls(inverse.model, inverse.source, None, inverse.completion, settings or inverse.settings)
        made.batch_size = inverse.batch_size
        made.starts, made.degrees, made.priors = inverse.starts, inverse.degrees, inverse.priors
        for name, value in {**kept, **how}.items():
            setattr(made, name, value)
        return made

    def at(self, tap: str, settings: Settings | None = None) -> RootChoosing:
        return RootChoosing.of(super().at(tap, settings), **{name: getattr(self, name) for name in HOW})

    def starts_of(self, step: Step, y: Tensor, last: Tensor | None) -> list[Tensor]:
        starts = super().starts_of(step, y, last)
        return [self.near[step.source], *starts] if step.source in self.near else starts

    def choice(self, step: Step, y: Tensor) -> tuple[Score | None, Tensor | None]:
        score, usual = super().choice(step, y)
        if score is None or self.truth is None or step.source not in self.truth:
            return score, usual
        truth = self.truth[step.source].flatten(0, 1)

        def distance(x: Tensor, which: Tensor) -> Tensor:
            return (x[:, 0] - truth[which]).norm(dim=1) / truth[which].norm(dim=1)

        return distance, torch.full_like(truth[:, 0], RIGHT)

    def solve(
        self, step: Step, y: Tensor, square: Tensor | None = None, last: Tensor | None = None, stripped: bool = False
    ) -> Solution:
        solution = super().solve(step, y, square, last, stripped)
        if not step.tokenwise or step.kind != "residual":
            return solution
        began, flat, x = time.perf_counter(), y.flatten(0, 1), solution.x.flatten(0, 1).clone()
        tokens, (score, usual) = token_map(step), self.choice(step, y)
        every = torch.arange(len(x), device=x.device)
        size = flat.norm(dim=1)
        residual = ((tokens.value(x) - flat).norm(dim=1) / size).nan_to_num(torch.inf, torch.inf)
        solved_tokens = residual <= self.settings.tolerance
        rated = torch.zeros_like(residual) if score is None else score(x[:, None], every)
        doubted = ~solved_tokens if usual is None else ~solved_tokens | (rated > usual)
        at = doubted.nonzero().flatten()
        if not len(at):
            return solution
        starts = [start.flatten(0, 1)[at] for start in self.starts_of(step, y, last)]
        rounds = 0 if score is None else self.curves
        roots = token_roots(tokens, flat[at], starts, Search(tolerance=self.settings.tolerance, rounds=rounds))
        scores = roots.residual if score is None else score(roots.x[:, None], at[roots.token])
        best = roots.best(scores)
        has = best >= 0
        has[has.clone()] &= (scores[best[has]] < rated[at[has]]) | ~solved_tokens[at[has]]
        x[at[has]], residual[at[has]] = roots.x[best[has]], roots.residual[best[has]]
        residual = residual.view(len(y), -1).amax(1)
        seconds = solution.seconds + time.perf_counter() - began
        solved_images = residual <= self.settings.tolerance
        return replace(solution, x=x.view_as(y), residual=residual, solved=solved_images, seconds=seconds)


HOW = ("curves", "truth", "near")


def wilson_interval(hits: float, count: int) -> tuple[float, float]:
    """(low, high): Wilson's 95 % interval of a proportion; also of 0 and of all hits it has a length."""
    if count < 1:
        return math.nan, math.nan
    z, share = 1.959964, hits / count  # hits may be a mean over seeds, which scipy does not take
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def map_base(families: Mapping[str, Mapping[str, Any]], tap: str) -> Any:
    """The inverse that a MAP inverse of this tap starts from: modular, direct or linear, the first that is there."""
    order = [*BASES, *(name for name in families if name not in BASES)]
    return next(families[name][tap] for name in order if tap in families.get(name, {}))


# What a trace met


@dataclass(frozen=True)
class StepReport:
    """A half-step's solution (its x left out), against the truth where that is known.

    error: (B,) relative error of x, NaN without truth; another_root: (B,) solved, from a right y, to another x;
    right_tokens: (B,) share of the tokens whose own error is at most RIGHT.
    """

    step: str
    source: str
    solution: Solution
    error: Tensor
    another_root: Tensor
    right_tokens: Tensor


def judged(
    inverse: ExactInverse, trace: Trace, representation: Representation, truth: Mapping[str, Representation]
) -> list[StepReport]:
    """A report for each step of a trace, from the last to the first; truth: by stream, in float64."""
    reports, y = [], representation.values.double()
    right = torch.ones(len(y), dtype=torch.bool, device=y.device)
    for step, solution in zip(trace.steps, trace.solutions, strict=True):
        x = trace.streams[step.source]
        error = share = torch.full_like(solution.residual, torch.nan)
        another = torch.zeros_like(right)
        if step.source in truth:
            there = truth[step.source].values.double()
            error = (x - there).flatten(1).norm(dim=1) / there.flatten(1).norm(dim=1)
            share = ((x - there).norm(dim=-1) <= RIGHT * there.norm(dim=-1)).double().mean(1)
            # What a norm took is lost, and no root is another.
            if step.norm is None or step.before is not None:
                another = solution.solved & right & (error > RIGHT)
                if bool(another.any()):
                    another &= _elsewhere(inverse, step, y, there, x, trace.squares.get(step.source), another)
            right = error <= RIGHT
        reports.append(StepReport(step.destination, step.source, replace(solution, x=x[:, :0]), error, another, share))
        y = x
    return reports


def _elsewhere(
    inverse: ExactInverse, step: Step, y: Tensor, truth: Tensor, x: Tensor, square: Tensor | None, doubted: Tensor
) -> Tensor:
    """(B,) whether x is another root than the truth's own, and not this one with the error of y grown."""
    which = doubted.nonzero().flatten()
    settings = replace(inverse.settings, restarts=0, choose=False)
    own = solve_step(step, y[which], [truth[which]], settings, None if square is None else square[which])
    away = (x[which] - truth[which]).flatten(1).norm(dim=1)
    same = own.solved & ((x[which] - own.x).flatten(1).norm(dim=1) <= SAME_ROOT * away)
    elsewhere = doubted.clone()
    elsewhere[which[same]] = False
    return elsewhere


def table_of(reports: Sequence[StepReport]) -> pd.DataFrame:
    """A row for each sample and step."""
    frames = []
    for report in reports:
        solution, count = report.solution, len(report.error)
        columns = {name: getattr(solution, name).tolist() for name in ("residual", "iterations", "passes", "solved")}
        columns |= {name: getattr(report, name).tolist() for name in ("error", "another_root", "right_tokens")}
        place = {"sample": range(count), "step": report.step, "to": report.source}
        frames.append(pd.DataFrame({**place, **columns, "seconds": solution.seconds / max(1, count)}))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
