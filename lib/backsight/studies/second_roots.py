"""Is the picture the only one behind a representation? The roots of half-steps on tokens, and what they look like.

find_roots             the roots of a half-step on tokens, and which rule picks the right one
second_root_pictures   the same y, another x: does it look different?
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backsight.errors import BacksightError, nearest
from backsight.exact.inverse import ExactInverse
from backsight.exact.solver import determinant_signs
from backsight.inverses.families import Reconstruct
from backsight.measures.pixels import psnr
from backsight.representation import Tokens
from backsight.studies.continuation import TOLERANCE, TokenRoots, polished, token_roots
from backsight.studies.roots import ALONE, Case, log10, relative_error
from backsight.tables.names import ALL_TOKENS, EXACT, ONE_TOKEN, RANDOM_MOVE, RIGHT, TRUE_STREAM
from backsight.tables.values import NO_SEED, Values

FIRST, USUAL = "first start", "most usual"  # rules that pick one of the roots


@dataclass(frozen=True)
class FoundRoots:
    """The roots of one half-step on T tokens (of `images`), from the true y.

    truth: (T, c); near: (T, R) bool, the root is the truth; negative: (T,) bool, det g′ at the truth is; right: {rule:
    (T,) bool} whether it picks the truth: FIRST: Newton's method from the fitted start ends there, USUAL: it is the
    nearest of all roots to the mean of training tokens.
    """

    step: str
    to: str
    roots: TokenRoots
    truth: Tensor
    near: Tensor
    negative: Tensor
    right: Mapping[str, Tensor]
    images: int

    def add_to(self, values: Values, train_seed: int = NO_SEED) -> None:
        """Values of the study "roots", means over an image's tokens: negative_determinant, several_roots, complete
        (signs sum to 1: no root is known to be missing), truth_found (shares), roots (number), and of each `rule`
        tokens_right (share)."""
        count, degree = self.roots.count, self.roots.degree
        measures = {"roots": count, "several_roots": count > 1, "complete": degree == 1}
        measures |= {"negative_determinant": self.negative, "truth_found": self.near.any(1)}
        place: dict[str, Any] = {"study": "roots", "step": self.step, "to": self.to}
        rules: list[Any] = [("tokens_right", right, {"rule": rule}) for rule, right in self.right.items()]
        for measure, tokens, rule in [*((name, tokens, {}) for name, tokens in measures.items()), *rules]:
            by_image = tokens.double().view(self.images, -1).mean(1)
            values.add(measure, {train_seed: by_image}, self.step, EXACT, **place, **rule)

    def other(self) -> tuple[Tensor, Tensor, Tensor]:
        """(N n, c) the nearest other root of each token, (N n,) its distance, and whether there is one."""
        distance = (self.roots.x - self.truth[:, None]).norm(dim=2).masked_fill(self.near, torch.inf)
        number, has = self.roots.best(distance)
        every = torch.arange(len(self.truth), device=self.truth.device)
        x = torch.where(has[:, None], self.roots.x[every, number], self.truth)
        return x, (x - self.truth).norm(dim=1), has


def foldable_steps(inverse: ExactInverse) -> list[str]:
    """The half-steps of which roots can be listed: those that act on every token alone and end in no norm."""
    return [step.destination for step in inverse.steps if step.tokenwise and step.norm is None]


def find_roots(case: Case, destination: str, curves: bool = True) -> FoundRoots:
    """The roots of the half-step that leads to `destination`, from the true y, and what rules make of them.

    Starts: the fitted guess, its first stage (linear), y itself, the guess made longer, and moved by the errors of the
    nearest training tokens; the truth is no start. Raises BacksightError on half-steps that mix tokens.
    """
    halves, streams = case.inverse.fitted(), case.streams
    if destination not in halves:
        raise BacksightError(f"There is no half-step {destination!r}; {nearest(destination, list(halves))}.")
    half, y = halves[destination], streams[destination].values
    step, flat, tokens = half.step, streams[half.step.source].values.flatten(0, 1), y.shape[1]
    with torch.no_grad():
        guesses = half.guesses(y)
        starts = [guesses[0], guesses[-1], y, 1.4 * guesses[0]]
        starts += half.further_starts(y, guesses[0]) if half.prior else []
        roots = token_roots(step, y.flatten(0, 1), [start.flatten(0, 1) for start in starts], curves)
        ended, residual = polished(step, y.flatten(0, 1), guesses[0].flatten(0, 1))
        size = RIGHT * flat.norm(dim=1)
        near = (roots.x - flat[:, None]).norm(dim=2) <= size[:, None]
        right = {FIRST: ((ended - flat).norm(dim=1) <= size) & (residual <= TOLERANCE)}
        if half.prior:
            token = (torch.arange(len(flat), device=y.device) % tokens).repeat_interleave(roots.x.shape[1])
            distance = half.distance(roots.x.flatten(0, 1), token).view(roots.sign.shape)
            number, has = roots.best(distance)
            right[USUAL] = has & near.gather(1, number[:, None])[:, 0]
        negative = determinant_signs(step.slopes(flat)) < 0
    return FoundRoots(destination, step.source, roots, flat, near, negative, right, len(y))


def second_root_pictures(
    values: Values, case: Case, found: FoundRoots, decoders: Mapping[str, Reconstruct], family: str, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Whether a second root looks different: the true stream decoded, and streams with other roots in its place.

    decoders: {tap: representation -> images} of a family; the nearest tap before the half-step is decoded, and steps in
    between are inverted from the truth on, so that what is decoded leads to the very same y. ONE_TOKEN: the token of
    the grid whose nearest other root is the farthest; ALL_TOKENS: every token that has another root; RANDOM_MOVE: the
    same tokens moved as far in a random direction, which changes y. Returns {picture: ((N, 3, H, W), (N,) whether there
    is such a stream, and it leads back to that tap)}: other pictures are of no solution, and count nowhere.

    Values of the study "second_root", by `picture`: reached (0 or 1), log10_residual (of |g(x) − y| / |y|, in the
    model's own pass), psnr_between (to the picture of the true stream, dB). Raises BacksightError without a decoder.
    """
    model, stream = case.inverse.model, case.streams[found.to]
    first, last = model.taps[case.inverse.reached], model.streams.index(found.to)
    inside = [tap for tap, place in model.taps.items() if first <= place <= last and tap in decoders]
    if not inside:
        raise BacksightError(f"No tap between {case.inverse.reached} and {found.to} is decoded by {family} inverses.")
    tap = max(inside, key=model.taps.__getitem__)
    steps = [model.steps[number] for number in range(model.taps[tap] + 1, last + 2)]  # from the tap to y
    truth, halves, pictures = stream.values, case.inverse.fitted(), {}
    for name, replaced in ({TRUE_STREAM: truth} | _replaced(found, stream, seed)).items():
        has = (replaced != truth).flatten(1).any(1) | (name == TRUE_STREAM)
        x, solved = replaced, truth.isfinite().all((1, 2))
        with torch.no_grad():
            for half in (halves[step.destination] for step in steps[-2::-1]):
                solution = half.solve(x, [case.streams[half.step.source].values, *half.starts(x)], ALONE)
                x, solved = solution.x, solved & solution.solved
            y = x
            for step in steps:
                y = step(y)
        picture = decoders[tap](case.streams[tap].replace(x.float())).detach().clamp(0, 1)
        pictures[name] = (picture.cpu(), (has & solved).cpu())
        residual = log10(relative_error(y, case.streams[found.step].values))
        between = psnr(pictures[TRUE_STREAM][0], picture)
        place: dict[str, Any] = {"study": "second_root", "step": found.step, "to": found.to, "picture": name}
        nothing = torch.tensor(torch.nan)
        values.add("reached", torch.where(has, solved.double(), nothing), tap, EXACT, **place)
        values.add("log10_residual", torch.where(has & solved, residual, nothing), tap, EXACT, **place)
        if name != TRUE_STREAM:
            values.add("psnr_between", torch.where(has & solved, between, nothing), tap, family, **place)
    return pictures


def _replaced(found: FoundRoots, stream: Tokens, seed: int) -> dict[str, Tensor]:
    """{picture: (N, n, c)} with other roots in place of tokens, and the null that moves as far."""
    shape, flat = stream.values.shape, stream.values.flatten(0, 1)
    every, distance, has = found.other()
    moves = (distance * has).view(shape[:2]).clone()
    moves[:, : stream.prefix] = 0  # prefix tokens stand for no place of the picture
    farthest = torch.nn.functional.one_hot(moves.argmax(1), shape[1]).bool() & (moves > 0)
    one = torch.where(farthest.view(-1, 1), every, flat)
    drawn = torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed)).to(flat)
    null = flat + drawn / drawn.norm(dim=1, keepdim=True) * distance[:, None]
    return {ONE_TOKEN: one.view(shape), ALL_TOKENS: every.view(shape), RANDOM_MOVE: null.view(shape)}
