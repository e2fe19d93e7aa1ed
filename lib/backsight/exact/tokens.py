"""All the roots that can be found of a half-step that acts on every token alone: y = x + f(x), with dense derivatives.

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from backsight.errors import BacksightError
from backsight.exact.batched_systems import factored, signs, solved

Value = Callable[[Tensor], Tensor]  # (T, c) -> (T, c)
Jacobian = Callable[[Tensor], Tensor]  # (T, c) -> (T, c, c)

DENSE = 256  # channels of a token up to which its derivative is factored, and no Krylov space is built
CHUNK = 2**23  # entries of dense derivatives at once, 64 MB
FEW = 32  # tokens that are differentiated at once
ARMIJO = 1e-4
SHORTEST = 2.0**-8
STRAIGHT = 0.9  # least cosine between the tangents of two points that follow one another
INSIDE = tuple(number / 8 for number in range(1, 9))  # places between two points of a curve where t is looked at
COARSE = 1e-5  # relative residual that float32 reaches
NEAR = 3e-3  # relative distance within which a root in float32 counts as a known one
SLOW = 0.8  # five Newton iterations that keep more than this of the residual have failed
CONTRACTION = 0.5  # of a corrector's error an iteration; above it a step is too long


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


def token_map(function: Callable[[Tensor], Tensor], jacobian: Jacobian | None = None) -> TokenMap:
    """Of a step's function (B, n, c) -> (B, n, c), and its derivative (default: by forward-mode differentiation)."""

    def value(x: Tensor) -> Tensor:
        return function(x[:, None])[:, 0]

    def differentiated(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            slope: Tensor = torch.func.vmap(torch.func.jacfwd(lambda one: value(one[None])[0]), chunk_size=FEW)(x)
        return slope

    return TokenMap(value, jacobian or differentiated)


def newton(tokens: TokenMap, y: Tensor, x: Tensor, search: Search | None = None) -> tuple[Tensor, Tensor]:
    """(x, relative residual) from a start for each token, by full derivatives and backtracking. y, x: (T, c)."""
    search = search or Search()
    parts = [_newton(tokens, y[at], x[at], search) for at in torch.arange(len(y)).split(_chunk(y))]
    if not parts:
        return x, y.new_zeros(0)
    return torch.cat([each[0] for each in parts]), torch.cat([each[1] for each in parts])


def _newton(tokens: TokenMap, y: Tensor, start: Tensor, search: Search) -> tuple[Tensor, Tensor]:
    size = _size(y)
    x, made = start.clone(), tokens.value(start)
    residual = _relative(y - made, size)
    live = (residual > search.goal) & residual.isfinite()
    history = [residual.clone()]
    for _ in range(search.newton):
        at = live.nonzero().flatten()
        if not len(at):
            break
        step = solved(tokens.jacobian(x[at]), y[at] - made[at])
        length = torch.ones_like(size[at])
        before = residual[at]
        open_ = torch.arange(len(at))
        moved = torch.zeros(len(at), dtype=torch.bool)
        while len(open_):
            here = at[open_]
            trial = x[here] + length[open_, None] * step[open_]
            there = tokens.value(trial)
            error = _relative(y[here] - there, size[here])
            enough = error <= (1 - ARMIJO * length[open_]) * before[open_]
            # Round-off: at the bottom any gain is taken.
            enough |= (error < before[open_]) & (before[open_] <= search.tolerance)
            took = here[enough]
            x[took], made[took], residual[took] = trial[enough], there[enough], error[enough]
            moved[open_[enough]] = True
            length[open_] = torch.where(enough, length[open_], 0.4 * length[open_])
            open_ = open_[~enough & (length[open_] >= SHORTEST)]
        ended = ~moved | (residual[at] <= search.goal)
        ended |= (residual[at] <= search.tolerance) & (residual[at] > 0.5 * before)
        history.append(residual.clone())
        if len(history) > 5:
            ended |= (residual[at] > search.tolerance) & (residual[at] > SLOW * history[-6][at])
        live[at[ended]] = False
    return x, residual


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
    tokens: TokenMap,
    y: Tensor,
    starts: Sequence[Tensor],
    search: Search | None = None,
    single: TokenMap | None = None,
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
        near, residual = newton(single, y[token].float(), start.float(), coarse)
        # What float32 already shows to be a known root needs no polish; what it cannot solve is lost with this start.
        kept = (residual <= 10 * COARSE) & _fresh(roots, token, near.to(y), NEAR)
        token, start = token[kept], near[kept].to(y)
        if not len(token):
            return roots
    x, residual = newton(tokens, y[token], start, search)
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
