"""Is the picture the only one behind a representation? The roots of half-steps on tokens, and what they look like.

find_roots             the roots of a half-step on tokens, and which rule picks the right one
root_rows              how many there are and how far apart they lie, in tidy rows
second_root_pictures   the same y, another x: does it look different?
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from backsight.errors import BacksightError, nearest
from backsight.exact.inverse import ExactInverse
from backsight.exact.solver import Settings
from backsight.exact.steps import NotInvertibleError, Step
from backsight.inverses.families import Reconstruct
from backsight.inverses.module import Chain
from backsight.measures.pixels import psnr
from backsight.representation import Tokens
from backsight.studies.continuation import Search, TokenRoots, polished, step_roots, token_map, token_signs
from backsight.studies.roots import Case, RootChoosing, Truth, cases_of, relative_error
from backsight.studies.tidy_rows import TidyRows
from backsight.tables.names import ALL_TOKENS, EXACT, ONE_TOKEN, RANDOM_MOVE, RIGHT, TRUE_STREAM
from backsight.tables.pool import bootstrap_statistic
from backsight.targets.base import Target

COLUMNS = ("step", "to", "rule", "seeds")
Guess = Callable[[Tokens], Tensor]


@dataclass(frozen=True)
class FoundRoots:
    """The roots of one half-step on tokens, from the true y of N images with n tokens each.

    roots: of all N n tokens; truth: (N n, c); near: (K,) bool, the root is the truth; signs: (N n,) of det g′ at the
    truth; right: {rule: (N n,) bool} whether it picks the truth: "… start": Newton's method from there ends at it, the
    others choose among all roots; seconds: an image.
    """

    step: str
    to: str
    roots: TokenRoots
    truth: Tensor
    near: Tensor
    signs: Tensor
    right: Mapping[str, Tensor]
    images: int
    seconds: float

    @property
    def found(self) -> Tensor:
        """(N n,) bool: the truth is among the roots."""
        has = torch.zeros(self.roots.tokens, dtype=torch.bool)
        has[self.roots.token[self.near]] = True
        return has

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


def modular_guess(inverse: ExactInverse, destination: str, modular: Reconstruct | None) -> Guess | None:
    """A trained modular inverse's word on the stream before a half-step, from the one behind it, or None.

    modular: the family's reconstruction at `destination` (a `Chain`, whose first module ends at an earlier tap); the
    model's own half-steps lead on from there.
    """
    if not isinstance(modular, Chain):
        return None
    module: Any = modular.path[0]
    walked = inverse.model
    if module.source != destination or module.destination not in walked.taps:
        return None
    try:
        between = [one for one in walked.between(destination, module.destination) if one.destination != destination]
    except NotInvertibleError:
        return None

    def guess(behind: Tokens) -> Tensor:
        with torch.no_grad():
            x = module(behind.replace(behind.values.float())).values.double()
            for later in between:
                x = later(x)
        return x

    return guess


def _step(inverse: ExactInverse, destination: str, single: bool = False) -> Step:
    walked = inverse.model.single if single else inverse.model
    steps = {step.destination: step for step in walked.between(inverse.source, inverse.reached)}
    if destination not in steps:
        raise BacksightError(f"There is no half-step {destination!r}; {nearest(destination, list(steps))}.")
    return steps[destination]


def find_roots(
    inverse: ExactInverse,
    destination: str,
    truth: Truth,
    guesses: Mapping[str, Guess] | None = None,
    examples: int = 8,
    search: Search | None = None,
    progress: bool = True,
    batch_size: int = 4,
) -> FoundRoots:
    """The roots of the half-step that leads to `destination`, from the true y, and what rules make of them.

    Starts: the staged ridge guess, its first stage (linear), y itself, the staged guess made longer, the errors of the
    nearest training tokens (as many as `examples`), and `guesses` {name: stream behind -> (B, n, c) before}; the truth
    is no start. search: how long; batch_size: images at once. Raises BacksightError on half-steps that mix tokens.
    """
    search = search or Search()
    streams = cases_of(inverse, truth)[0].streams
    step, single = (_step(inverse, destination, single) for single in (False, True))
    x, behind = streams[step.source], streams[destination]
    began, parts = time.perf_counter(), []
    split = torch.arange(x.batch).split(batch_size)
    with torch.no_grad():
        for part in tqdm(split, desc=f"roots of {destination}", leave=False, disable=not progress):
            y = behind.index(part)
            parts.append(_roots_of(inverse, step, single, x.values[part], y, guesses or {}, examples, search))
        seconds = (time.perf_counter() - began) / x.batch
        truths = x.values.flatten(0, 1)
        signs = token_signs(token_map(step), truths)
    found = [roots for roots, _, _ in parts]
    offsets = np.cumsum([0, *(roots.tokens for roots in found)])
    token = torch.cat([part.token + int(offset) for part, offset in zip(found, offsets, strict=False)])
    values, residual, sign = (torch.cat([getattr(part, name) for part in found]) for name in ("x", "residual", "sign"))
    roots = TokenRoots(token, values, residual, sign, len(truths))
    near = torch.cat([near for _, near, _ in parts])
    right = {rule: torch.cat([rules[rule] for _, _, rules in parts]) for rule in parts[0][2]}
    return FoundRoots(destination, step.source, roots, truths, near, signs, right, x.batch, seconds)


def _roots_of(
    inverse: ExactInverse,
    step: Step,
    single: Step,
    x: Tensor,
    behind: Tokens,
    guesses: Mapping[str, Guess],
    examples: int,
    search: Search,
) -> tuple[TokenRoots, Tensor, dict[str, Tensor]]:
    """(roots, which are the truth (K,), {rule: which tokens it gets right}) of a batch of images."""
    y, half = behind.values, inverse.fitted()[step.destination]
    staged = half.guesses(y)
    informed = {"linear start": staged[-1], "staged start": staged[0]}
    informed |= {f"{name} start": guess(behind) for name, guess in guesses.items()}
    starts = [*informed.values(), y, 1.4 * staged[0]]
    if examples and half.prior:
        starts += half.further_starts(y, staged[0])[:examples]
    roots = step_roots(step, y, starts, search, single)
    tokens, flat, truth = token_map(step), y.flatten(0, 1), x.flatten(0, 1)
    near = _near(roots.x, truth[roots.token])
    right, scores = {}, {}
    for rule, values in informed.items():
        ended, residual = polished(tokens, flat, values.flatten(0, 1), search)
        right[rule] = _near(ended, truth) & (residual <= search.tolerance)
        scores[f"nearest to the {rule}"] = (roots.x - values.flatten(0, 1)[roots.token]).norm(dim=1)
    scores["shortest"] = roots.x.norm(dim=1)
    if half.prior:
        scores["most usual"] = half.distance(roots.x, roots.token % y.shape[1])
    for rule, score in scores.items():
        best = roots.best(score)
        right[rule] = best >= 0
        right[rule][best >= 0] = near[best[best >= 0]]
    return roots, near, right


def _near(x: Tensor, truth: Tensor) -> Tensor:
    return (x - truth).norm(dim=1) <= RIGHT * truth.norm(dim=1)


def root_rows(target: Target, found: Sequence[FoundRoots], dataset: str = "scenes", seed: int = 0) -> pd.DataFrame:
    """How many x a half-step on tokens takes to one y, how far apart they are, and which rule picks the truth.

    found: of one half-step, by seed of the weights. Shares of tokens: negative_determinant (of the truth: then it has
    at least two other roots), several_roots, solved, complete (signs sum to 1: no root is known to be missing),
    truth_found. roots: mean number found of a token. other_distance, nearest_other: medians, relative to |truth|. Rules
    (column `rule`): tokens_right, images_right (all tokens).
    """
    step = found[0].step
    columns = {"step": step, "to": found[0].to}
    rows = TidyRows.about(target, dataset, "test", seed, **columns)

    def by_image(flags: Tensor, roots: FoundRoots) -> Tensor:
        return flags.double().view(roots.images, -1)

    def share(measure: str, flags: Callable[[FoundRoots], Tensor], whole: bool = False, **more: str) -> None:
        tables = [by_image(flags(roots), roots) for roots in found]
        if whole:
            rows.share(torch.stack([table.amin(1) for table in tables]), measure, step, EXACT, **more)
        else:
            trials = torch.stack([torch.full((len(table),), table.shape[1]).double() for table in tables])
            rows.share(torch.stack([table.sum(1) for table in tables]), measure, step, EXACT, trials, **more)

    share("negative_determinant", lambda roots: roots.signs < 0)
    share("several_roots", lambda roots: roots.roots.count > 1)
    share("solved", lambda roots: roots.roots.count > 0)
    share("complete", lambda roots: roots.roots.degree == 1)
    share("truth_found", lambda roots: roots.found)
    rows.pooled(torch.stack([by_image(roots.roots.count, roots).mean(1) for roots in found]), "roots", step, EXACT)
    rows.pooled([[roots.seconds] * roots.images for roots in found], "seconds", step, EXACT)
    _add_distances(rows, "other_distance", found, [~roots.near for roots in found])
    _add_distances(rows, "nearest_other", found, [roots.nearest_other()[1] for roots in found])

    def right(rule: str) -> Callable[[FoundRoots], Tensor]:
        return lambda roots: roots.right[rule]

    for rule in found[0].right:
        share("tokens_right", right(rule), rule=rule)
        share("images_right", right(rule), whole=True, rule=rule)
    return rows.table(*COLUMNS)


def _add_distances(rows: TidyRows, measure: str, found: Sequence[FoundRoots], which: Sequence[Tensor]) -> None:
    """The median distance of these roots from the truth; images are drawn anew, each with all of its tokens."""
    images, distances = [], []
    for roots, at in zip(found, which, strict=True):
        truth, tokens = roots.truth[roots.roots.token[at]], roots.roots.tokens // roots.images
        images.append(roots.roots.token[at] // tokens)
        distances.append((roots.roots.x[at] - truth).norm(dim=1) / truth.norm(dim=1))
    image, distance = torch.cat(images).numpy(), torch.cat(distances).numpy()
    of_image = [distance[image == number] for number in range(found[0].images)]

    def median(drawn: np.ndarray) -> float:
        values = np.concatenate([of_image[number] for number in drawn])
        return float(np.median(values)) if len(values) else math.nan

    interval = (math.nan, math.nan, math.nan)
    if len(distance):
        interval = (float(np.median(distance)), *bootstrap_statistic(median, len(of_image), rows.seed))
    count = sum(len(values) > 0 for values in of_image)
    rows.one(interval, measure, found[0].step, EXACT, count, seeds=len(found))


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

    Measures: replaced (share of tokens), reached (share of images whose stream leads back to that tap),
    residual_largest, |g(x) − y| / |y| of the model's own pass; psnr_between (to the picture of the true stream, dB) and
    psnr (to the image) for each family. Images without a second root have none of these. Raises BacksightError where no
    tap is decoded by all families.
    """
    tap, truth = _decoded_at(case.inverse, found.to, families), case.streams[found.to].values
    streams = {TRUE_STREAM: truth} | _replaced(found, case.streams[found.to], seed)
    pictures: dict[str, dict[str, Tensor]] = {}
    reached: dict[str, Tensor] = {}
    rows = TidyRows.about(case.inverse.model.target, dataset, "test", seed, step=found.step, to=found.to)
    for name, values in tqdm(streams.items(), desc="second roots", leave=False, disable=not progress):
        x, solved = _back_to(case, found.to, tap, values, settings)
        moved = (values != truth).any(2)
        has = moved.any(1) if name != TRUE_STREAM else torch.ones_like(solved)
        rows.pooled(np.where(has, moved.double().mean(1), np.nan), "replaced", tap, EXACT, picture=name)
        rows.share(solved & has, "reached", tap, EXACT, has, picture=name)
        kept = reached[name] = has & solved
        if name != RANDOM_MOVE:
            residual = _residual(case.inverse, tap, found.step, x, case.streams[found.step].values)[kept]
            largest = float(residual.max()) if len(residual) else math.nan
            rows.one(
                (largest, math.nan, math.nan), "residual_largest", tap, EXACT, len(residual), seeds=1, picture=name
            )
        at = case.streams[tap].replace(x.float())
        made = {family: taps[tap](at).detach().clamp(0, 1).float() for family, taps in families.items()}
        pictures[name] = made
        for family, picture in made.items():
            scores = {"psnr": images.float()}
            if name != TRUE_STREAM:
                scores["psnr_between"] = pictures[TRUE_STREAM][family]
            for measure, reference in scores.items():
                score = np.where(kept, psnr(reference, picture).double(), np.nan)
                rows.pooled(score, measure, tap, family, picture=name)
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
