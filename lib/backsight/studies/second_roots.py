"""Is the picture the only one behind a representation? The roots of half-steps on tokens, and what they look like.

find_roots             the roots of a half-step on tokens, and which rule picks the right one
root_rows              how many there are, in tidy rows
second_root_pictures   the same y, another x: does it look different?
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from backsight.errors import BacksightError, nearest
from backsight.exact.inverse import ExactInverse
from backsight.exact.solver import Settings
from backsight.inverses.families import Reconstruct
from backsight.measures.pixels import psnr
from backsight.representation import Tokens
from backsight.studies.continuation import TOLERANCE, TokenRoots, polished, token_roots, token_signs
from backsight.studies.roots import Case, RootChoosing, relative_error
from backsight.studies.tidy_rows import TidyRows
from backsight.tables.names import ALL_TOKENS, EXACT, ONE_TOKEN, RANDOM_MOVE, RIGHT, TRUE_STREAM
from backsight.targets.base import Target

COLUMNS = ("step", "to", "rule", "seeds")


@dataclass(frozen=True)
class FoundRoots:
    """The roots of one half-step on tokens, from the true y of N images with n tokens each.

    roots: of all N n tokens; truth: (N n, c); near: (K,) bool, the root is the truth; signs: (N n,) of det g′ at the
    truth; right: {rule: (N n,) bool} whether it picks the truth: "staged start": Newton's method from there ends at it,
    "most usual": it is the nearest of all roots to the mean of training tokens.
    """

    step: str
    to: str
    roots: TokenRoots
    truth: Tensor
    near: Tensor
    signs: Tensor
    right: Mapping[str, Tensor]
    images: int

    def nearest_other(self) -> tuple[Tensor, Tensor]:
        """(numbers of tokens that have another root, number of the nearest of these roots)."""
        distance = (self.roots.x - self.truth[self.roots.token]).norm(dim=1).masked_fill(self.near, torch.inf)
        best = self.roots.best(distance)
        has = best >= 0
        has[has.clone()] &= distance[best[has]].isfinite()
        return has.nonzero().flatten(), best[has]


def foldable_steps(inverse: ExactInverse) -> list[str]:
    """The half-steps of which roots can be listed: those that act on every token alone and end in no norm."""
    return [step.destination for step in inverse.steps if step.tokenwise and step.norm is None]


def find_roots(case: Case, destination: str, examples: int = 8, rounds: int = 1) -> FoundRoots:
    """The roots of the half-step that leads to `destination`, from the true y, and what rules make of them.

    Starts: the staged ridge guess, its first stage (linear), y itself, the staged guess made longer, the errors of the
    nearest training tokens (as many as `examples`); the truth is no start. rounds: of curves through known roots.
    Raises BacksightError on half-steps that mix tokens.
    """
    inverse, streams = case.inverse, case.streams
    halves = inverse.fitted()
    if destination not in halves:
        raise BacksightError(f"There is no half-step {destination!r}; {nearest(destination, list(halves))}.")
    half = halves[destination]
    step, y = half.step, streams[destination].values
    single = {step.destination: step for step in inverse.model.single.between(inverse.source, inverse.reached)}
    flat, tokens = streams[step.source].values.flatten(0, 1), y.shape[1]
    with torch.no_grad():
        guesses = half.guesses(y)
        starts = [guesses[0], guesses[-1], y, 1.4 * guesses[0]]
        if examples and half.prior:
            starts += half.further_starts(y, guesses[0])[:examples]
        roots = token_roots(
            step, y.flatten(0, 1), [start.flatten(0, 1) for start in starts], rounds, single[destination]
        )
        ended, residual = polished(step, y.flatten(0, 1), guesses[0].flatten(0, 1))
        near = _near(roots.x, flat[roots.token])
        right = {"staged start": _near(ended, flat) & (residual <= TOLERANCE)}
        if half.prior:
            best = roots.best(half.distance(roots.x, roots.token % tokens))
            right["most usual"] = best >= 0
            right["most usual"][best >= 0] = near[best[best >= 0]]
        signs = token_signs(step, flat)
    return FoundRoots(destination, step.source, roots, flat, near, signs, right, len(y))


def _near(x: Tensor, truth: Tensor) -> Tensor:
    return (x - truth).norm(dim=1) <= RIGHT * truth.norm(dim=1)


def root_rows(target: Target, found: Sequence[FoundRoots], dataset: str = "scenes", seed: int = 0) -> pd.DataFrame:
    """How many x a half-step on tokens takes to one y, and which rule picks the truth.

    found: of one half-step, by seed of the weights. Shares of tokens: negative_determinant (of the truth: then it has
    at least two other roots), several_roots, complete (signs sum to 1: no root is known to be missing), truth_found,
    and tokens_right of every rule (column `rule`). roots: mean number found of a token.
    """
    step = found[0].step
    rows = TidyRows.about(target, dataset, "test", seed, step=step, to=found[0].to)

    def by_image(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([value.double().view(found[0].images, -1) for value in values])

    def share(measure: str, flags: Sequence[Tensor], **columns: str) -> None:
        table = by_image(flags)
        rows.share(table.sum(2), measure, step, EXACT, torch.ones_like(table).sum(2), **columns)

    share("negative_determinant", [one.signs < 0 for one in found])
    share("several_roots", [one.roots.count > 1 for one in found])
    share("complete", [one.roots.degree == 1 for one in found])
    share("truth_found", [torch.bincount(one.roots.token[one.near], minlength=len(one.truth)) > 0 for one in found])
    rows.pooled(by_image([one.roots.count for one in found]).mean(2), "roots", step, EXACT)
    for rule in found[0].right:
        share("tokens_right", [one.right[rule] for one in found], rule=rule)
    return rows.table(*COLUMNS)


# ------------------------------------------------------------------------------------------ what a second root shows


@dataclass(frozen=True)
class SecondRoots:
    """Pictures of streams that the model takes to the very same y.

    metrics: tidy rows, column `picture`: which stream; images: (N, 3, H, W); pictures: {picture: {family: (N, 3, H,
    W)}}, of TRUE_STREAM, ONE_TOKEN, ALL_TOKENS and RANDOM_MOVE; reached: {picture: (N,) bool} whether there is such a
    stream, and it leads back to the tap where it is decoded: other pictures are of no solution, and count nowhere.
    """

    metrics: pd.DataFrame
    images: Tensor
    pictures: Mapping[str, Mapping[str, Tensor]]
    reached: Mapping[str, Tensor]


def second_root_pictures(
    case: Case,
    found: FoundRoots,
    images: Tensor,
    families: Mapping[str, Mapping[str, Reconstruct]],
    settings: Settings | None = None,
    *,
    dataset: str = "scenes",
    seed: int = 0,
    progress: bool = True,
) -> SecondRoots:
    """Whether a second root looks different: the true stream decoded, and streams with other roots in its place.

    case, images (N, 3, H, W): whose roots were `found`; families: {family: {tap: representation -> images}}. The stream
    is decoded at the nearest tap before the half-step that all families have; half-steps in between are inverted
    exactly, so that what is decoded still leads to the very same y. ONE_TOKEN: the token of the grid whose nearest
    other root is the farthest; ALL_TOKENS: every token that has another root; RANDOM_MOVE: the same tokens moved as far
    in a random direction, which changes y.

    Measures: reached (share of images whose stream leads back to that tap); residual_largest, |g(x) − y| / |y| of the
    model's own pass; psnr_between (to the picture of the true stream, dB) for each family. Images without a second root
    have none of these. Raises BacksightError where no tap is decoded by all families.
    """
    tap, truth = _decoded_at(case.inverse, found.to, families), case.streams[found.to].values
    streams = {TRUE_STREAM: truth} | _replaced(found, case.streams[found.to], seed)
    pictures: dict[str, dict[str, Tensor]] = {}
    reached: dict[str, Tensor] = {}
    rows = TidyRows.about(case.inverse.model.target, dataset, "test", seed, step=found.step, to=found.to)
    for name, values in tqdm(streams.items(), desc="second roots", leave=False, disable=not progress):
        x, solved = _back_to(case, found.to, tap, values, settings)
        has = (values != truth).flatten(1).any(1) if name != TRUE_STREAM else torch.ones_like(solved)
        rows.share(solved & has, "reached", tap, EXACT, has, picture=name)
        kept = reached[name] = has & solved
        if name != RANDOM_MOVE:
            residual = _residual(case.inverse, tap, found.step, x, case.streams[found.step].values)[kept]
            largest = float(residual.max()) if len(residual) else math.nan
            interval = (largest, math.nan, math.nan)
            rows.one(interval, "residual_largest", tap, EXACT, len(residual), seeds=1, picture=name)
        at = case.streams[tap].replace(x.float())
        pictures[name] = {family: taps[tap](at).detach().clamp(0, 1).float() for family, taps in families.items()}
        if name != TRUE_STREAM:
            for family, picture in pictures[name].items():
                between = psnr(pictures[TRUE_STREAM][family], picture).double()
                rows.pooled(np.where(kept, between, np.nan), "psnr_between", tap, family, picture=name)
    return SecondRoots(rows.table(*COLUMNS), images.float(), pictures, reached)


def _decoded_at(inverse: ExactInverse, stream: str, families: Mapping[str, Mapping[str, Reconstruct]]) -> str:
    walked = inverse.model
    first, last = walked.taps[inverse.reached], walked.streams.index(stream)
    inside = [tap for tap, place in walked.taps.items() if first <= place <= last]
    known = [tap for tap in inside if families and all(tap in taps for taps in families.values())]
    if not known:
        raise BacksightError(
            f"No tap between {inverse.reached} and {stream} is decoded by all of the families "
            f"{', '.join(families) or 'given (none)'}: give inverses of such a tap."
        )
    return max(known, key=walked.taps.__getitem__)


def _replaced(found: FoundRoots, stream: Tokens, seed: int) -> dict[str, Tensor]:
    """{picture: (N, n, c)} with other roots in place of tokens, and the null that moves as far."""
    n, flat = stream.values.shape[1], stream.values.flatten(0, 1)
    token, root = found.nearest_other()
    distance = (found.roots.x[root] - flat[token]).norm(dim=1)
    every, one = flat.clone(), flat.clone()
    every[token] = found.roots.x[root]
    for image in range(stream.batch):
        # Prefix tokens stand for no place of the picture.
        inside = ((token // n == image) & (token % n >= stream.prefix)).nonzero().flatten()
        if len(inside):
            farthest = inside[distance[inside].argmax()]
            one[token[farthest]] = found.roots.x[root[farthest]]
    drawn = torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed), dtype=flat.dtype)
    moved = every - flat
    null = flat + drawn / drawn.norm(dim=1, keepdim=True) * moved.norm(dim=1, keepdim=True)
    shape = stream.values.shape
    return {ONE_TOKEN: one.view(shape), ALL_TOKENS: every.view(shape), RANDOM_MOVE: null.view(shape)}


def _back_to(case: Case, stream: str, tap: str, values: Tensor, settings: Settings | None) -> tuple[Tensor, Tensor]:
    """(x at the tap, solved) of a stream behind it."""
    if stream == tap:
        return values, torch.ones(len(values), dtype=torch.bool)
    made, solved = [], []
    for part in torch.arange(len(values)).split(case.inverse.batch_size):
        here = case.streams[stream].index(part).replace(values[part])
        near = {name: tokens.values[part] for name, tokens in case.streams.items()}
        trace = RootChoosing.of(case.inverse, near=near).at(stream, settings).trace(here, tap)
        made.append(trace.values)
        solved.append(trace.solved)
    return torch.cat(made), torch.cat(solved)


def _residual(inverse: ExactInverse, tap: str, destination: str, x: Tensor, y: Tensor) -> Tensor:
    """(N,) |g(x) − y| / |y| of the model's own half-steps from the tap to `destination`."""
    place = inverse.model.streams.index
    with torch.no_grad():
        for step in inverse.steps:
            if place(tap) <= place(step.source) and place(step.destination) <= place(destination):
                x = step(x)
    return relative_error(x, y)
