"""Is the picture the only one behind a representation? The roots of half-steps on tokens, and what they look like.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.errors import BacksightError, nearest
from backsight.exact.inverse import ExactInverse
from backsight.exact.solver import CHUNK, Settings, dense, determinant_signs, factored, newton
from backsight.exact.steps import Step
from backsight.inverses.families import Reconstruct
from backsight.measures.pixels import psnr
from backsight.representation import Tokens
from backsight.studies.exact import ALONE, Case
from backsight.tables.names import ALL_TOKENS, EXACT, ONE_TOKEN, RANDOM_MOVE, RIGHT, TRUE_STREAM
from backsight.tables.values import NO_SEED, Values

FIRST, USUAL = "first start", "most usual"  # rules that pick one of the roots
ROOT = Settings(tolerance=1e-10, goal=1e-14, newton=40)
APART = 1e-6  # relative distance of two roots
POINT = Settings(tolerance=1e-9, goal=1e-9, newton=5)  # of a curve
POINTS = 150  # of a curve
CROSSINGS = 2  # of t = 0 on a curve, before it is left
FAR = 4.0  # curves are left where |x| is this many times as long as y and the start of the curve
STRAIGHT = 0.9  # least cosine between the tangents of two points that follow one another


@dataclass(frozen=True)
class FoundRoots:
    """The roots of one half-step on the T tokens of `images`, from the true y, in R places.

    x: (T, R, c), NaN where there is none; sign: (T, R) of det g′, 1 or −1 (0: singular, or no root); truth: (T, c);
    near: (T, R) bool, the root is the truth; negative: (T,) bool, det g′ at the truth is; right: {rule: (T,) bool}
    whether it picks the truth: FIRST: Newton's method from the fitted start ends there, USUAL: it is the nearest of all
    roots to the mean of training tokens.
    """

    step: Step
    x: Tensor
    sign: Tensor
    truth: Tensor
    near: Tensor
    negative: Tensor
    right: Mapping[str, Tensor]
    images: int

    def add_to(self, values: Values, train_seed: int = NO_SEED) -> None:
        """Values of the study "roots", means over an image's tokens: negative_determinant, several_roots, complete
        (signs sum to 1: no root is known to be missing; shares), roots (number), and of each `rule` tokens_right
        (share)."""
        step, count = self.step, self.x[..., 0].isfinite().sum(1)

        def add(measure: str, tokens: Tensor, rule: str | None = None) -> None:
            by_image = {train_seed: tokens.double().view(self.images, -1).mean(1)}
            values.add(measure, by_image, step.destination, EXACT, study="roots", step=step.destination, rule=rule)

        add("roots", count)
        add("several_roots", count > 1)
        add("complete", self.sign.sum(1) == 1)
        add("negative_determinant", self.negative)
        for rule, right in self.right.items():
            add("tokens_right", right, rule)

    def other(self) -> tuple[Tensor, Tensor, Tensor]:
        """(T, c) the nearest other root of each token, (T,) its distance, and whether there is one."""
        place, has = _least((self.x - self.truth[:, None]).norm(dim=2).masked_fill(self.near, torch.inf))
        x = self.x[torch.arange(len(place)), place].where(has[:, None], self.truth)
        return x, (x - self.truth).norm(dim=1), has


def _least(score: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) place of the root with the lowest score (T, R) of each token, and whether it has one; inf, NaN: not this."""
    least = score.nan_to_num(torch.inf, torch.inf).min(1)
    return least.indices, least.values.isfinite()


def foldable_steps(inverse: ExactInverse) -> list[str]:
    """The half-steps of which roots can be listed: those that act on every token alone and end in no norm."""
    return [step.destination for step in inverse.steps if step.tokenwise and step.norm is None]


@torch.no_grad()
def find_roots(case: Case, destination: str, curves: bool = True) -> FoundRoots:
    """The roots of the half-step that leads to `destination`, from the true y, and what rules make of them.

    Starts: the fitted guess, its first stage (linear), y itself, the guess made longer, and moved by the errors of the
    nearest training tokens; the truth is no start. curves: as `token_roots`. Raises BacksightError on half-steps that
    mix tokens, or end in a norm.
    """
    if destination not in (known := foldable_steps(case.inverse)):
        raise BacksightError(f"{destination!r} is no half-step on tokens alone; {nearest(destination, known)}.")
    half, stream = case.inverse.fitted()[destination], case.streams[destination].values
    step, y, truth = half.step, stream.flatten(0, 1), case.streams[half.step.source].values.flatten(0, 1)
    guesses = half.guesses(stream)
    starts = [guesses[0], guesses[-1], stream, 1.4 * guesses[0]]
    starts += half.further_starts(stream, guesses[0]) if half.prior else []
    x, sign = token_roots(step, y, [start.flatten(0, 1) for start in starts], curves)
    size = RIGHT * truth.norm(dim=1)
    near = (x - truth[:, None]).norm(dim=2) <= size[:, None]
    ended, residual = polished(step, y, guesses[0].flatten(0, 1))
    right = {FIRST: ((ended - truth).norm(dim=1) <= size) & (residual <= ROOT.tolerance)}
    if half.prior:
        token = torch.arange(stream.shape[1], device=y.device).repeat(len(stream)).repeat_interleave(x.shape[1])
        place, has = _least(half.distance(x.flatten(0, 1), token).view(sign.shape))
        right[USUAL] = has & near.gather(1, place[:, None])[:, 0]
    return FoundRoots(step, x, sign, truth, near, _signs(step, truth) < 0, right, len(stream))


def token_roots(step: Step, y: Tensor, starts: Sequence[Tensor], curves: bool = True) -> tuple[Tensor, Tensor]:
    """x (T, R, c) and sign (T, R), as in `FoundRoots`, of all roots that starts and curves through them lead to.

    y, starts: (T, c); curves: followed both ways from the roots of tokens whose signs do not sum to 1, of as many of
    them as the starts led to at most.
    """
    x, sign = _distinct(step, y, torch.stack(list(starts), dim=1))
    unsure = sign.sum(1) != 1  # a sum of 1 gives no reason to look for more
    for place in range(x.shape[1] if curves else 0):
        met = x.new_full((len(y), 2 * CROSSINGS, x.shape[2]), math.nan)
        at = (unsure & x[:, place, 0].isfinite()).nonzero().flatten()
        for which in at.split(max(1, CHUNK // x.shape[2] ** 2)) if len(at) else ():
            met[which] = follow(step, y[which], x[which, place])
        x, sign = _distinct(step, y, torch.cat([x, met], dim=1))
    return x, sign


def _distinct(step: Step, y: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """(x, sign) of what Newton's method finds from starts (T, R, c), NaN: none; of roots that are one, the first."""
    x, at = torch.full_like(starts, math.nan), starts[..., 0].isfinite().nonzero().unbind(1)
    ended, residual = polished(step, y[at[0]], starts[at])
    x[at] = ended.where((residual <= ROOT.tolerance)[:, None], math.nan)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    x[(distance <= APART * x.norm(dim=2)[..., None]).tril(-1).any(2)] = math.nan
    none = x[..., 0].isnan()
    order = none.long().argsort(dim=1, stable=True)[:, : max(1, int((~none).sum(1).amax()))]
    x = x.take_along_dim(order[..., None], dim=1)
    sign, at = torch.zeros_like(x[..., 0]), x[..., 0].isfinite().nonzero().unbind(1)
    sign[at] = _signs(step, x[at])
    return x, sign


def _signs(step: Step, x: Tensor) -> Tensor:
    """(K,) of det g′ at tokens (K, c)."""
    return torch.cat([determinant_signs(step.slopes(part)) for part in x.split(max(1, CHUNK // x.shape[1] ** 2))])


def polished(step: Step, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(x, relative residual) of Newton's method from a start for each token. y, x: (T, c)."""

    def function(x: Tensor, _which: Tensor) -> Tensor:
        return step.forward(x)

    x, residual = newton(function, y[:, None], x[:, None], dense(function, y[:, None], step.slopes), ROOT)
    return x[:, 0], residual


def follow(step: Step, y: Tensor, x: Tensor) -> Tensor:
    """(K, 2 CROSSINGS, c) where the curves g(x) = y ± t u through roots meet t = 0 again, near other roots; else NaN.

    y, x: (K, c) with g(x) = y; u: the direction in which g is flattest. Curves are followed by arc length, and so
    around every fold, until CROSSINGS, far out, or POINTS.
    """
    u, slope, v = torch.linalg.svd(step.slopes(x))
    flat = torch.cat([u[:, :, -1], -u[:, :, -1]])
    # J v = σ u: along the curve x moves by v while t moves by σ; t rises at first.
    tangent = F.normalize(torch.cat([torch.cat([v[:, -1], -v[:, -1]]), slope[:, -1:].repeat(2, 1)], dim=1))
    place, y = F.pad(x, (0, 1)).repeat(2, 1), y.repeat(2, 1)
    scale = torch.maximum(y.norm(dim=1), place.norm(dim=1))
    length, live = 1e-3 * scale, tangent.isfinite().all(1)
    side, met = torch.ones_like(scale), torch.zeros_like(scale, dtype=torch.long)
    crossings = y.new_full((len(y), CROSSINGS, y.shape[1]), math.nan)
    for _ in range(POINTS):
        at = live.nonzero().flatten()
        if not len(at):
            break
        guess = place[at] + length[at, None] * tangent[at]
        corrected, turned, good = _corrected(step, y[at], flat[at], guess, tangent[at])
        off = (corrected - guess).norm(dim=1) / length[at]
        good &= ((turned * tangent[at]).sum(1) > STRAIGHT) & (off <= 0.5)
        length[at] *= torch.where(good, torch.where(off < 0.05, 2.0, 1.2), 0.4)
        at, before, after = at[good], place[at[good]], corrected[good]
        crossed = side[at] * after[:, -1] <= 0
        which, share = at[crossed], (before[:, -1] / (before - after)[:, -1])[crossed, None]
        crossings[which, met[which]] = torch.lerp(before[crossed], after[crossed], share)[:, :-1]
        met[which] += 1
        side[at], place[at], tangent[at] = after[:, -1].sign(), after, turned[good]
        live &= (met < CROSSINGS) & (place[:, :-1].norm(dim=1) <= FAR * scale) & (length >= 1e-9 * scale)
    return torch.cat(crossings.chunk(2), dim=1)


def _corrected(step: Step, y: Tensor, flat: Tensor, guess: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(place, its tangent, whether it is on the curve): across the tangent, with the derivative of the guess kept."""
    jacobian = torch.cat([step.slopes(guess[:, :-1]), -flat[:, :, None]], dim=2)
    lu, pivots = factored(torch.cat([jacobian, tangent[:, None]], dim=1))
    right = F.pad(y, (0, 1))[:, None]

    def function(place: Tensor, which: Tensor) -> Tensor:
        across = ((place - guess[which, None]) * tangent[which, None]).sum(2, keepdim=True)
        return torch.cat([step.forward(place[..., :-1]) - place[..., -1:] * flat[which, None], across], dim=2)

    def propose(place: Tensor, _residual: Tensor, _ratio: Tensor, which: Tensor) -> list[Tensor]:
        return [torch.linalg.lu_solve(lu[which], pivots[which], (right[which] - function(place, which)).mT).mT]

    place, residual = newton(function, right, guess[:, None], propose, POINT)
    ahead = F.pad(torch.zeros_like(y), (0, 1), value=1.0)[:, :, None]
    turned = F.normalize(torch.linalg.lu_solve(lu, pivots, ahead)[:, :, 0])
    return place[:, 0], turned, residual <= POINT.tolerance


def second_root_pictures(
    values: Values, case: Case, roots: FoundRoots, decoders: Mapping[str, Reconstruct], family: str, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Whether a second root looks different: the true stream decoded, and streams with other roots in its place.

    decoders: {tap: representation -> images} of a family; the nearest tap before the half-step is decoded, and steps in
    between are inverted from the truth on, so that what is decoded leads to the very same y. ONE_TOKEN: the token of
    the grid whose nearest other root is the farthest; ALL_TOKENS: every token that has another root; RANDOM_MOVE: the
    same tokens moved as far in a random direction, which changes y. Returns {picture: ((N, 3, H, W), (N,) whether there
    is such a stream, and it leads back to that tap)}: other pictures are of no solution, and count nowhere.

    Values of the study "second_root", by `picture`: psnr_between (to the picture of the true stream, dB). Raises
    BacksightError without a decoder.
    """
    inverse, step, pictures = case.inverse, roots.step, {}
    sources = [step.source for step in inverse.steps]
    last = sources.index(step.source)
    first = max((place for place, tap in enumerate(sources[: last + 1]) if tap in decoders), default=None)
    if first is None:
        raise BacksightError(f"No tap between {inverse.reached} and {step.source} is decoded by {family} inverses.")
    tap, between = sources[first], [inverse.fitted()[name] for name in sources[first + 1 : last + 1]]
    stream = case.streams[step.source]
    for name, x in ({TRUE_STREAM: stream.values} | _replaced(roots, stream, seed)).items():
        reached = (x != stream.values).flatten(1).any(1) | (name == TRUE_STREAM)
        with torch.no_grad():
            for half in reversed(between):
                solution = half.solve(x, [case.streams[half.step.source].values, *half.starts(x)], ALONE)
                x, reached = solution.x, reached & solution.solved
        picture = decoders[tap](case.streams[tap].replace(x.float())).detach().clamp(0, 1)
        pictures[name] = picture.cpu(), reached.cpu()
        if name != TRUE_STREAM:
            score = psnr(pictures[TRUE_STREAM][0], picture.cpu()).where(reached.cpu(), torch.nan)
            values.add("psnr_between", score, tap, family, study="second_root", step=step.destination, picture=name)
    return pictures


def _replaced(roots: FoundRoots, stream: Tokens, seed: int) -> dict[str, Tensor]:
    """{picture: (N, n, c)} with other roots in place of tokens, and the null that moves as far."""
    shape, (every, distance, has) = stream.values.shape, roots.other()
    moves = (distance * has).view(shape[:2]).clone()
    moves[:, : stream.prefix] = 0  # prefix tokens stand for no place of the picture
    farthest = F.one_hot(moves.argmax(1), shape[1]).bool() & (moves > 0)
    drawn = torch.randn(every.shape, generator=torch.Generator().manual_seed(seed)).to(every)
    null = roots.truth + F.normalize(drawn) * distance[:, None]
    one = every.where(farthest.view(-1, 1), roots.truth)
    return {ONE_TOKEN: one.view(shape), ALL_TOKENS: every.view(shape), RANDOM_MOVE: null.view(shape)}
