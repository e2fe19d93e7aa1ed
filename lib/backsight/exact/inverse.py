"""Exact inverses: y = x + f(x) solved for x, half-step by half-step, as far back as nothing is lost.

    tap ──► solve ──► solve ──► … ──► embedding ──► A⁺y + (1 − A⁺A) x_linear ──► image
            attention or MLP half       (patches)      what the patch embedding holds, and the linear
            of a block, float64                        inverse's word on what it does not hold

What is exact is what the model computes: a solved half-step has a residual at round-off. Whether that x is the one that
was there is another question: x ↦ x + f(x) may take several x to one y, and where the truth is known the report says
which samples met another root. Starts are closed-form: ridge regression from y to x, then further ones that also read
the model's own f at the last guess (`StagedStart`). An unsolved sample is marked, and the chain goes on from its best.
Half-steps that act on every token alone are solved with dense derivatives where Krylov spaces fail, and where they fold
the roots of doubtful tokens are listed (`step_roots`), of which the most usual is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from backsight.data.images import batches
from backsight.errors import BacksightError, nearest
from backsight.exact.joint import ChainSettings, solve_chain
from backsight.exact.solver import Roots, Settings, Solution, roots, solve
from backsight.exact.steps import Lost, NotInvertibleError, Step, Walk, in_precision, residual_steps, walk
from backsight.exact.tokens import DENSE, Search, TokenRoots, newton, token_map, token_roots, token_signs
from backsight.inverses.patches import patchify, unpatchify
from backsight.inverses.ridge import RidgeAccumulator
from backsight.representation import Representation, Tokens
from backsight.targets.base import PIXELS, Target

__all__ = [
    "ChainSettings",
    "Embedding",
    "ExactInverse",
    "ExactModel",
    "Lost",
    "NotInvertibleError",
    "Roots",
    "Search",
    "Settings",
    "Solution",
    "StagedStart",
    "Step",
    "TokenRoots",
    "Trace",
    "fit_exact",
    "residual_steps",
    "roots",
    "solve",
    "solve_step",
    "step_roots",
]

RIGHT = 1e-5  # relative error up to which a solution counts as the input that was there
SAME_ROOT = 0.1  # of a solution's distance from the truth: nearer to the truth's own root, it is that one
STAGES = 4  # of a staged start
ALPHAS = tuple(10.0**exponent for exponent in range(-10, 2))
SWEEPS = 3  # of a post-norm chain: each brings the norms' ε in more exactly, by a factor of about 1e-5
USUAL = 0.75  # share of the training tokens that are not doubted
PRIOR_FLOOR = 1e-4  # of the mean variance
HELD_OUT = 5  # every fifth training image chooses the ridge strengths
EXAMPLES = 4096  # training tokens whose guesses' errors further starts are drawn from
SIGNED = 512  # training tokens that tell whether a half-step folds


@dataclass(frozen=True)
class StagedStart:
    """A guess of x from y = g(x) in closed form, in stages.

    The first stage is a ridge map of y; each further one a ridge map of y, the last guess x, g(x), and g a whole and
    half a fixed-point step on. maps: for each stage, for each prefix token and then for all others, (weight, bias).
    """

    maps: tuple[tuple[tuple[Tensor, Tensor], ...], ...]

    def __call__(self, step: Step, y: Tensor) -> list[Tensor]:
        """(B, n, c) guesses, the last and best stage first."""
        guesses: list[Tensor] = []
        for stage in self.maps:
            features = stage_features(step, y, guesses[-1] if guesses else None)
            prefix = len(stage) - 1
            parts = [features[:, number : number + 1] @ w + b for number, (w, b) in enumerate(stage[:-1])]
            weight, bias = stage[-1]
            guesses.append(torch.cat([*parts, features[:, prefix:] @ weight + bias], dim=1))
        return guesses[::-1]


@dataclass(frozen=True)
class Examples:
    """Training tokens behind a step, and how far its guesses of them were off: y, error (M, c)."""

    y: Tensor
    error: Tensor

    def starts(self, y: Tensor, guess: Tensor, count: int) -> list[Tensor]:
        """(T, c) each: the guess, moved by the errors of the nearest training tokens, the nearest first."""
        near = torch.cat(
            [torch.cdist(part, self.y).topk(min(count, len(self.y)), largest=False).indices for part in y.split(1024)]
        )
        return [guess + self.error[near[:, number]] for number in range(near.shape[1])]


@dataclass(frozen=True)
class Prior:
    """How usual a stream's tokens are: the Gaussian of the training images, each prefix token apart.

    mean: (P + 1, c); precision: (P + 1, c, c); usual: (P + 1,) squared Mahalanobis distance that the share
    `USUAL` of the training tokens stays below.
    """

    mean: Tensor
    precision: Tensor
    usual: Tensor

    def distance(self, x: Tensor) -> Tensor:
        """(B, n) of a stream (B, n, c)."""
        prefix = len(self.mean) - 1
        groups = [x[:, number : number + 1] for number in range(prefix)] + [x[:, prefix:]]
        parts = []
        for group, mean, precision in zip(groups, self.mean, self.precision, strict=True):
            away = group - mean
            parts.append((away @ precision * away).sum(-1))
        return torch.cat(parts, dim=1)

    def limits(self, tokens: int) -> Tensor:
        """(n,) usual distances of the tokens of an image."""
        return torch.cat([self.usual[:-1], self.usual[-1:].expand(tokens - len(self.usual) + 1)])


def fit_prior(x: Tensor, prefix: int) -> Prior:
    """x: (B, n, c) streams of training images."""
    groups = [x[:, number] for number in range(prefix)] + [x[:, prefix:].flatten(0, 1)]
    means, precisions = [], []
    for group in groups:
        away = group - group.mean(0)
        covariance = away.T @ away / len(group)
        # Directions that never move (and more channels than images) get a floor, not an infinite weight.
        floor = PRIOR_FLOOR * covariance.diagonal().mean().clamp(min=1e-12)
        means.append(group.mean(0))
        precisions.append(torch.linalg.inv(covariance + floor * torch.eye(len(covariance), dtype=x.dtype)))
    prior = Prior(torch.stack(means), torch.stack(precisions), x.new_zeros(prefix + 1))
    distance = prior.distance(x)
    parts = [distance[:, number] for number in range(prefix)] + [distance[:, prefix:].flatten()]
    usual = torch.stack([part[:100_000].quantile(USUAL) for part in parts])
    return replace(prior, usual=usual)


def stage_features(step: Step, y: Tensor, x: Tensor | None) -> Tensor:
    """(B, n, c) of the first stage, (B, n, 5 c) behind a guess x."""
    if x is None:
        return y
    made = step(x)
    error = y - made
    return torch.cat([y, x, made, step(x + error), step(x + 0.5 * error)], dim=2)


def fit_staged_start(step: Step, x: Tensor, prefix: int, stages: int = STAGES) -> StagedStart:
    """x: (B, n, c) streams of training images before the step."""
    y = torch.cat([step(part) for part in x.split(64)])
    held_out = torch.arange(len(x)) % HELD_OUT == 0
    guess: Tensor | None = None
    maps = []
    for _ in range(stages):
        guesses = (None,) * len(x) if guess is None else guess.split(64)
        parts = [stage_features(step, a, b) for a, b in zip(y.split(64), guesses, strict=False)]
        features = torch.cat(parts)
        groups = [slice(number, number + 1) for number in range(prefix)] + [slice(prefix, None)]
        stage = tuple(_ridge(features[:, group], x[:, group], held_out) for group in groups)
        guess = torch.cat(
            [features[:, group] @ weight + bias for group, (weight, bias) in zip(groups, stage, strict=True)], dim=1
        )
        maps.append(stage)
    return StagedStart(tuple(maps))


def _ridge(features: Tensor, wanted: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, bias), of the strength that is best on the images held out."""
    training, validation = RidgeAccumulator(), RidgeAccumulator()
    training.update(features[~held_out].flatten(0, 1), wanted[~held_out].flatten(0, 1))
    validation.update(features[held_out].flatten(0, 1), wanted[held_out].flatten(0, 1))
    errors = training.path().errors(validation, ALPHAS)
    weight, bias = training.solve(min(zip(errors, ALPHAS, strict=True))[1])
    return weight.to(features), bias.to(features)


@dataclass(frozen=True)
class LostDegrees:
    """Closed-form guess of what a LayerNorm takes from a token: mean and log deviation, from û.

    weight: (C, 2); bias: (2,).
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, stripped: Tensor) -> tuple[Tensor, Tensor]:
        """(…, 1) mean and deviation."""
        mean, log = (stripped @ self.weight + self.bias).split(1, dim=-1)
        return mean, log.exp()


@dataclass(frozen=True)
class Embedding:
    """The patch embedding as it was measured: y = patches @ matrix + bias, patches and tokens row-major.

    matrix: (3 p q, C) on pixels in [0, 1]; bias: (n, C); rank; patch: (p, q); prefix: (P, C) the prefix tokens, which
    are the same for every image.
    """

    matrix: Tensor
    bias: Tensor
    rank: int
    patch: tuple[int, int]
    prefix: Tensor
    size: tuple[int, int]

    def stream(self, images: Tensor) -> Tensor:
        """(B, P + n, C) of images (B, 3, H, W), which may leave [0, 1]."""
        patches = patchify(images.to(self.matrix), self.patch) @ self.matrix + self.bias
        return torch.cat([self.prefix.expand(len(images), -1, -1), patches], dim=1)

    def pixels(self, values: Tensor, start: Tensor | None = None) -> Tensor:
        """Unclamped images (B, 3, H, W) whose embedding is `values`, the nearest to `start` (default: grey).

        start + A⁺(y − A start): exact in what the embedding holds, `start` in what it does not.
        """
        if start is None:
            start = values.new_full((len(values), 3, *self.size), 0.5)
        patches = patchify(start.to(values), self.patch)
        missing = values[:, len(self.prefix) :] - self.bias - patches @ self.matrix
        inverse = torch.linalg.pinv(self.matrix, rtol=RANK_TOLERANCE)
        grid = (self.size[0] // self.patch[0], self.size[1] // self.patch[1])
        return unpatchify(patches + missing @ inverse, grid, self.patch)


RANK_TOLERANCE = 1e-6  # singular values below this share of the largest one count as zero


def measured_embedding(target: Target) -> Embedding | None:
    """The target's first tap as an affine map of its patches, measured on single pixels; None where it is none."""
    tap = target.available_taps[0]
    weights = next(target.model.parameters())
    channels, (height, width), (down, across) = len(target.preprocessing.mean), target.image_size, target.reduction
    if height % down or width % across or channels * down * across > 4096:
        return None
    grid = (height // down, width // across)
    count = channels * down * across

    def embedded(patches: Tensor) -> Any:
        return target.record(unpatchify(patches, grid, (down, across)), [tap])[tap]

    blank = embedded(weights.new_zeros(1, grid[0] * grid[1], count))
    if not isinstance(blank, Tokens) or blank.grids != (grid,):
        return None
    rows = []
    for part in torch.eye(count, dtype=weights.dtype, device=weights.device).split(64):
        made = embedded(part[:, None].expand(-1, grid[0] * grid[1], -1).contiguous())
        rows.append((made.patches - blank.patches)[:, 0])
    matrix = torch.cat(rows)
    bias, prefix = blank.patches[0], blank.prefix_values[0]
    probe = torch.rand(2, grid[0] * grid[1], count, generator=torch.Generator().manual_seed(0)).to(weights)
    made = embedded(probe)
    if float((made.patches - probe @ matrix - bias).norm()) > 1e-4 * float(made.patches.norm()):
        return None
    rank = int(torch.linalg.matrix_rank(matrix, rtol=RANK_TOLERANCE))
    return Embedding(matrix, bias, rank, (down, across), prefix, (height, width))


# One step


def step_roots(
    step: Step,
    y: Tensor,
    starts: Sequence[Tensor],
    search: Search | None = None,
    single: Step | None = None,
) -> TokenRoots:
    """The roots of a step that acts on every token alone, of all tokens (B n) of streams y (B, n, c).

    starts: each (B, n, c); single: the same step in float32. Raises BacksightError for other steps.
    """
    if not step.tokenwise or step.norm is not None:
        raise BacksightError(
            f"{step.destination} mixes tokens or ends in a norm: its roots are looked for by `roots`, a start each."
        )
    coarse = None if single is None else token_map(single.forward, single.jacobian)
    parts = [start.flatten(0, 1) for start in starts]
    return token_roots(token_map(step.forward, step.jacobian), y.flatten(0, 1), parts, search, coarse)


Score = Callable[[Tensor], Tensor]


def solve_step(
    step: Step,
    y: Tensor,
    starts: Sequence[Tensor],
    settings: Settings | None = None,
    single: Step | None = None,
    square: Tensor | None = None,
    degrees: tuple[Tensor, Tensor] | None = None,
    score: Score | None = None,
    usual: Tensor | None = None,
    examples: Examples | None = None,
) -> Solution:
    """x with step(x) = y, for a batch of streams (B, n, c).

    single: the same step in settings.precision, for the Newton steps; square: (B, n, 1) mean square of x̂ (1 where not
    known) of a post-norm step behind another norm; degrees: (mean of x, deviation of x + f(x)), each (B, n, 1), for a
    post-norm step behind none. Tokens that do not see one another are solved one by one, each with its own end, and
    with dense derivatives where Krylov spaces fail.

    score: (B, n, c) -> (B, n), of which of a token's roots the lowest is kept; looked for where it is above usual (n,),
    from all starts and from settings.alternatives that `examples` make of the first.
    """
    settings = settings or Settings()
    function, derivative, wanted, context = _system(step, single, y, square, degrees)
    batch, tokens, channels = y.shape
    shape = (batch * tokens, 1, channels) if step.tokenwise else (batch, tokens, channels)
    wanted, parts = wanted.reshape(shape), [start.reshape(shape) for start in starts]
    context = [each.reshape(*shape[:2], -1) for each in context]
    dense = step.tokenwise and step.norm is None and step.jacobian is not None and channels <= DENSE
    # Where a token's derivative is a small known matrix, only the cheap first try goes without it.
    first = replace(settings, newton=0, restarts=0) if dense else settings
    found = solve(function, wanted, parts[:1] if dense else parts, first, derivative, context)
    if dense:
        found = _densely(step, y, found, [part[:, 0] for part in parts], settings)
    if step.tokenwise and step.norm is None:
        found = _rooted(step, y, found, [part[:, 0] for part in parts], settings, score, usual, examples)
    return found.grouped(batch) if step.tokenwise else found


def _densely(step: Step, y: Tensor, found: Solution, starts: list[Tensor], settings: Settings) -> Solution:
    """With what Newton's method with full derivatives finds for the tokens that are not solved yet."""
    began = time.perf_counter()
    tokens, flat = token_map(step.forward, step.jacobian), y.flatten(0, 1)
    search = Search(tolerance=settings.tolerance, goal=settings.goal, newton=settings.newton)
    x, residual, number = found.x[:, 0].clone(), found.residual.clone(), found.start.clone()
    solved, method = found.solved.clone(), found.method.clone()
    generator = torch.Generator(device=y.device).manual_seed(settings.seed)
    for attempt in range(len(starts) + settings.restarts):
        at = (~solved).nonzero().flatten()
        if not len(at):
            break
        start = starts[attempt % len(starts)][at]
        if attempt >= len(starts):
            noise = torch.randn(start.shape, generator=generator, dtype=y.dtype, device=y.device)
            size = start.std(1, keepdim=True)
            start = start + settings.spread * (attempt - len(starts) + 1) * size * noise
        made, off = newton(tokens, flat[at], start, search)
        better = off < residual[at]
        took = at[better]
        x[took], residual[took], number[took], method[took] = made[better], off[better], attempt, 2
        solved[at] = residual[at] <= settings.tolerance
    seconds = found.seconds + time.perf_counter() - began
    return replace(found, x=x[:, None], residual=residual, solved=solved, start=number, method=method, seconds=seconds)


def _rooted(
    step: Step,
    y: Tensor,
    found: Solution,
    starts: list[Tensor],
    settings: Settings,
    score: Score | None,
    usual: Tensor | None,
    examples: Examples | None,
) -> Solution:
    """With roots of the tokens that were not solved, and with the best-scored root of the doubtful ones."""
    began = time.perf_counter()
    tokens = token_map(step.forward, step.jacobian)
    flat, x = y.flatten(0, 1), found.x[:, 0]
    scores = x.new_zeros(len(x))
    which = ~found.solved
    if score is not None and usual is not None and settings.alternatives:
        scores = score(x.view_as(y)).flatten()
        which = which | (scores > usual.repeat(len(y)))
    scores = scores.masked_fill(~found.solved, torch.inf)
    at = which.nonzero().flatten()
    if not len(at):
        return found
    here = [start[at] for start in starts]
    if score is not None and settings.alternatives and examples is not None:
        here += examples.starts(flat[at], here[0], settings.alternatives)
    search = Search(tolerance=settings.tolerance, rounds=settings.curves if score is not None else 0)
    made = token_roots(tokens, flat[at], here, search)
    if not len(made.token):
        return found
    token = at[made.token]
    # A score is one of whole streams: each root is put into its place, one root of every token at a time.
    rated = x.new_zeros(len(token))
    if score is not None:
        number = torch.arange(len(token)) - torch.searchsorted(made.token, made.token)
        for each in range(int(number.max()) + 1):
            chosen = number == each
            stream = x.clone()
            stream[token[chosen]] = made.x[chosen]
            rated[chosen] = score(stream.view_as(y)).flatten()[token[chosen]]
    best = made.best(rated)
    has = best >= 0
    has[has.clone()] &= rated[best[has]] < scores[at[has]]
    took, root = at[has], best[has]
    x, residual, solved, method = x.clone(), found.residual.clone(), found.solved.clone(), found.method.clone()
    x[took], residual[took], solved[took], method[took] = made.x[root], made.residual[root], True, 2
    return replace(
        found,
        x=x[:, None],
        residual=residual,
        solved=solved,
        method=method,
        seconds=found.seconds + time.perf_counter() - began,
    )


def _system(
    step: Step,
    single: Step | None,
    y: Tensor,
    square: Tensor | None,
    degrees: tuple[Tensor, Tensor] | None,
) -> tuple[Any, Any, Tensor, list[Tensor]]:
    """(function, its copy for the derivative, right side, context) of a square system for x.

    Residual: x + f(x) = y. Post-norm: û(x + f(x)) = û holds C − 1 equations a token (and the scale only in its last
    digits); x itself left a norm, which gives the missing ones: x̂ has the mean 0 and a known mean square. They are
    added along 1, which û never has, and along û, whose length is known. Without a norm before it, mean and scale have
    to be given.
    """
    if step.norm is None:
        return step.forward, None if single is None else single.forward, y, []
    stripped = step.norm.stripped(y)
    if step.before is not None:
        systems = [None if each is None else _behind_norm(each) for each in (step, single)]
        known = torch.ones_like(y[..., :1]) if square is None else square
        return systems[0], systems[1], stripped, [known]
    if degrees is None:
        raise BacksightError(
            f"{step.destination} is normalised, and nothing before it says what mean and scale its tokens had: "
            "give them as `degrees`."
        )
    mean, deviation = degrees
    systems = [None if each is None else _behind_stream(each) for each in (step, single)]
    return systems[0], systems[1], stripped * deviation + mean, []


def _behind_norm(step: Step) -> Any:
    assert step.norm is not None
    assert step.before is not None
    norm, before = step.norm, step.before

    def function(x: Tensor, square: Tensor) -> Tensor:
        hat = before.stripped(x)
        excess = hat.square().mean(-1, keepdim=True) - square
        return norm.normalised(step.forward(x)) * (1 + excess) + hat.mean(-1, keepdim=True)

    return function


def _behind_stream(step: Step) -> Any:
    def function(x: Tensor) -> Tensor:
        z = step.forward(x)
        return z - z.mean(-1, keepdim=True) + x.mean(-1, keepdim=True)

    return function


# A chain of steps


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


@dataclass(frozen=True)
class Trace:
    """What an exact inverse did. values: (B, n, c) where it ended, at the tap `destination`; reports: a step each, from
    the last to the first; lost: what does not come through on the way to the pixels; prefix_error: (B,) relative
    distance of the prefix tokens from the constants that they are at the embedding, NaN elsewhere: it tells a wrong
    root without the truth.
    """

    values: Tensor
    destination: str
    reports: tuple[StepReport, ...]
    lost: tuple[Lost, ...]
    prefix_error: Tensor
    seconds: float

    @property
    def solved(self) -> Tensor:
        """(B,) every step on the way."""
        flags = [each.solution.solved for each in self.reports]
        return torch.stack(flags).all(0) if flags else torch.ones(len(self.values), dtype=torch.bool)

    def table(self) -> pd.DataFrame:
        """A row for each sample and step."""
        frames = []
        for report in self.reports:
            found = report.solution
            frames.append(
                pd.DataFrame(
                    {
                        "sample": range(len(found.residual)),
                        "step": report.step,
                        "to": report.source,
                        "residual": found.residual.tolist(),
                        "iterations": found.iterations.tolist(),
                        "passes": found.passes.tolist(),
                        "solved": found.solved.tolist(),
                        "start": found.start.tolist(),
                        "error": report.error.tolist(),
                        "another_root": report.another_root.tolist(),
                        "right_tokens": report.right_tokens.tolist(),
                        "seconds": found.seconds / max(1, len(found.residual)),
                    }
                )
            )
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


@dataclass(frozen=True)
class ExactModel:
    """All that exact inverses of one target share; `fit_exact` makes it.

    target: in float64; walk, single: its steps in float64 and in float32; starts: {stream behind a step: its start};
    degrees: {stream behind a norm: what it takes, guessed}; priors: {stream: how usual its tokens are}; embedding: None
    where it is no affine map of patches; completion: {tap: linear inverse to pixels}; examples: {stream behind a step
    on tokens: errors of its guesses}; folding: {the same: share of training tokens where det of the derivative is
    negative, so that other roots exist}.
    """

    target: Target
    walk: Walk
    single: Walk
    starts: Mapping[str, StagedStart]
    degrees: Mapping[str, LostDegrees]
    priors: Mapping[str, Prior]
    embedding: Embedding | None
    completion: Mapping[str, Any] = field(default_factory=dict)
    examples: Mapping[str, Examples] = field(default_factory=dict)
    folding: Mapping[str, float] = field(default_factory=dict)


class ExactInverse:
    """The exact inverse of one tap: inverse(representation) -> images (B, 3, H, W) in [0, 1], in float32.

    Where exactness ends before the pixels, the linear inverse of the last exact tap makes the image; `lost` says where.
    trace(representation, truth) gives the report. Raises `NotInvertibleError` where not even one step back from the
    tap is exact.
    """

    family = "exact"
    destination = PIXELS

    def __init__(self, model: ExactModel, tap: str, settings: Settings | None = None, batch_size: int = 32) -> None:
        known = model.target.available_taps
        if tap not in known:
            raise BacksightError(f"{model.target.name} has no tap {tap!r}; {nearest(tap, known)}.")
        first = known[0]
        self.model, self.source, self.settings = model, tap, settings or Settings()
        self.batch_size = batch_size
        reached = model.walk.exact_from(tap)
        if not reached and tap != first:
            before = known[known.index(tap) - 1]
            model.walk.between(tap, before)  # raises, with the reason
        self.reached = reached[-1] if reached else tap
        self.lost = self._losses()

    def _losses(self) -> tuple[Lost, ...]:
        walk, order = self.model.walk, self.model.target.available_taps
        found = []
        for step in walk.between(self.source, self.reached) if self.reached != self.source else ():
            if step.norm is not None and step.before is None:
                size, tokens = walk.sizes[self.source], walk.sizes[self.source] // walk.channels[self.source]
                found.append(
                    Lost(
                        step.destination,
                        step.source,
                        size,
                        size - tokens,
                        "its norm takes the mean of every token (in float32 the scale too), and regression guesses it",
                    )
                )
        embedding = self.model.embedding
        if self.reached != order[0] or embedding is None:
            before = PIXELS if self.reached == order[0] else order[order.index(self.reached) - 1]
            try:
                walk.between(self.reached, before)
            except NotInvertibleError as error:
                found.append(error.lost)
        else:
            patches = len(embedding.bias)
            if embedding.rank < len(embedding.matrix):
                found.append(
                    Lost(
                        order[0],
                        PIXELS,
                        patches * len(embedding.matrix),
                        patches * embedding.rank,
                        "the patch embedding has no full rank, and the linear inverse completes its null space",
                    )
                )
        return tuple(found)

    def __call__(self, representation: Representation) -> Tensor:
        made = [
            self._images(representation.index(torch.arange(start, min(start + self.batch_size, representation.batch))))
            for start in range(0, representation.batch, self.batch_size)
        ]
        return torch.cat(made)

    def _images(self, representation: Representation) -> Tensor:
        trace = self.trace(representation)
        return self.images(trace, representation)

    def images(self, trace: Trace, representation: Representation) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of a trace that ends where exactness does."""
        completion = self.model.completion.get(trace.destination)
        ended = representation.replace(trace.values.float()) if isinstance(representation, Tokens) else None
        linear = completion.raw(ended) if completion is not None and ended is not None else None
        if self.model.embedding is not None and trace.destination == self.model.target.available_taps[0]:
            images = self.model.embedding.pixels(trace.values, linear)
        elif linear is not None:
            images = linear
        else:
            raise BacksightError(
                f"Exactness ends at {trace.destination} of {self.model.target.name}, and there is no linear inverse "
                "from there to pixels: fit one, and give it as `completion`."
            )
        return images.clamp(0, 1).float()

    def trace(
        self,
        representation: Representation,
        truth: Mapping[str, Representation] | None = None,
        to: str | None = None,
        extra_starts: Mapping[str, Tensor] | None = None,
        oracle: bool = False,
    ) -> Trace:
        """Back to the tap `to` (default: as far as exactness goes).

        truth: representations at earlier taps, for errors; extra_starts: {stream: (B, n, c)} tried behind the
        closed-form ones (of a trained modular inverse); oracle: of the roots found at a step that folds, the
        one nearest to the truth is kept, which no inverse can do: the best that a choice among them could reach.
        Raises BacksightError on padded or unfit tokens, and for an oracle without truth.
        """
        if oracle and truth is None:
            raise BacksightError("An oracle chooses by the truth: give it as `truth`.")
        if not isinstance(representation, Tokens) or representation.padding is not None:
            raise BacksightError(f"The exact inverse of {self.source} reads unpadded tokens, not {representation}.")
        began = time.perf_counter()
        to = to or self.reached
        steps = self.model.walk.between(self.source, to) if to != self.source else ()
        singles = self.model.single.between(self.source, to) if steps else ()
        y = representation.values.double()
        roundoff = torch.finfo(representation.values.dtype).eps
        streams: dict[str, Tensor] = {}
        reports: list[StepReport] = []
        post_norm = any(step.kind == "post_norm" for step in steps)
        with torch.no_grad():
            for _ in range(SWEEPS if post_norm else 1):
                squares = self._squares(steps, streams)
                reports, streams = self._down(
                    steps, singles, y, roundoff, truth, extra_starts or {}, squares, streams, oracle
                )
        values = streams[to] if steps else y
        constants = None if self.model.embedding is None else self.model.embedding.prefix
        prefix_error = torch.full((len(y),), torch.nan, dtype=y.dtype)
        if constants is not None and len(constants) and to == self.model.target.available_taps[0]:
            prefix_error = (values[:, : len(constants)] - constants).flatten(1).norm(dim=1) / constants.norm()
        return Trace(values, to, tuple(reports), self.lost, prefix_error, time.perf_counter() - began)

    def whole(
        self,
        representation: Representation,
        start: Tensor,
        truth: Mapping[str, Representation] | None = None,
        settings: ChainSettings | None = None,
        progress: Callable[[int, Tensor], None] | None = None,
    ) -> Trace:
        """Back to the first tap in one search over all half-steps together (`solve_chain`), from a start's images.

        start: (B, 3, H, W), which may leave [0, 1], of a MAP inverse say; the prefix tokens are the constants that they
        are, which rules out roots of single steps that do not agree. Raises BacksightError where the chain does not
        reach the target's first tap, or where that is no affine map of patches.
        """
        first, embedding = self.model.target.available_taps[0], self.model.embedding
        if self.reached != first or self.source == first or embedding is None:
            raise BacksightError(
                f"A whole chain is solved from a tap back to {first}, where the first stream is an affine map of "
                f"patches; from {self.source} exactness ends at {self.reached}: use trace()."
            )
        if not isinstance(representation, Tokens) or representation.padding is not None:
            raise BacksightError(f"The exact inverse of {self.source} reads unpadded tokens, not {representation}.")
        steps, singles = (each.between(self.source, first) for each in (self.model.walk, self.model.single))
        y, known = representation.values.double(), len(embedding.prefix)
        found = solve_chain(steps, singles, y, embedding.stream(start.double()), known, settings, progress)
        error, right = torch.full_like(found.residual, torch.nan), torch.full_like(found.residual, torch.nan)
        if truth is not None:
            there = truth[first].values.double()
            error = (found.x - there).flatten(1).norm(dim=1) / there.flatten(1).norm(dim=1)
            right = ((found.x - there).norm(dim=-1) <= RIGHT * there.norm(dim=-1)).double().mean(1)
        zeros = torch.zeros(len(y), dtype=torch.long)
        solution = Solution(
            y[:, :0], found.residual, found.iterations, found.passes, found.solved, zeros, zeros + 1, found.seconds
        )
        report = StepReport(self.source, first, solution, error, found.solved & (error > RIGHT), right)
        return Trace(found.x, first, (report,), self.lost, torch.zeros_like(found.residual), found.seconds)

    def _squares(self, steps: Sequence[Step], streams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean square of x̂ at the streams that left a norm, from the last sweep: variance / (variance + ε)."""
        found = {}
        for step in steps:
            if step.norm is not None and step.source in streams:
                made = step.forward(streams[step.source])
                found[step.destination] = step.norm.normalised(made).square().mean(-1, keepdim=True)
        return found

    def _down(
        self,
        steps: Sequence[Step],
        singles: Sequence[Step],
        y: Tensor,
        roundoff: float,
        truth: Mapping[str, Representation] | None,
        extra: Mapping[str, Tensor],
        squares: Mapping[str, Tensor],
        previous: Mapping[str, Tensor],
        oracle: bool = False,
    ) -> tuple[list[StepReport], dict[str, Tensor]]:
        """All steps once, from the last to the first."""
        reports, streams = [], {}
        right = torch.ones(len(y), dtype=torch.bool)
        for step, single in zip(reversed(steps), reversed(singles), strict=True):
            told = truth[step.source].values.double() if oracle and truth and step.source in truth else None
            solution = self._one(step, single, y, roundoff, extra, squares, previous, told)
            error = torch.full((len(y),), torch.nan, dtype=y.dtype)
            another, share = torch.zeros(len(y), dtype=torch.bool), error
            if truth is not None and step.source in truth:
                there = truth[step.source].values.double()
                error = (solution.x - there).flatten(1).norm(dim=1) / there.flatten(1).norm(dim=1)
                another = solution.solved & right & (error > RIGHT)
                if step.norm is not None and step.before is None:
                    another = torch.zeros_like(another)  # what its norm took is lost, and no root is another
                elif bool(another.any()):
                    another &= self._elsewhere(step, y, there, solution.x, squares.get(step.source), another)
                right = error <= RIGHT
                share = ((solution.x - there).norm(dim=-1) <= RIGHT * there.norm(dim=-1)).double().mean(1)
            without = replace(solution, x=y[:, :0])
            reports.append(StepReport(step.destination, step.source, without, error, another, share))
            y = streams[step.source] = solution.x
        return reports, streams

    def _elsewhere(
        self, step: Step, y: Tensor, truth: Tensor, x: Tensor, square: Tensor | None, doubted: Tensor
    ) -> Tensor:
        """(B,) whether x is another root than the truth's own, and not this one with the error of y grown."""
        which = doubted.nonzero().flatten()
        settings = replace(self.settings, restarts=0, alternatives=0, anderson=0)
        part = None if square is None else square[which]
        own = solve_step(step, y[which], [truth[which]], settings, square=part)
        away = (x[which] - truth[which]).flatten(1).norm(dim=1)
        same = own.solved & ((x[which] - own.x).flatten(1).norm(dim=1) <= SAME_ROOT * away)
        found = doubted.clone()
        found[which[same]] = False
        return found

    def _one(
        self,
        step: Step,
        single: Step,
        y: Tensor,
        roundoff: float,
        extra: Mapping[str, Tensor],
        squares: Mapping[str, Tensor],
        previous: Mapping[str, Tensor],
        told: Tensor | None = None,
    ) -> Solution:
        degrees = None
        if step.norm is not None and step.before is None:
            degrees = self._degrees(step, y, roundoff)
        if step.kind == "norm":
            assert degrees is not None
            assert step.norm is not None
            x = step.norm.stripped(y) * degrees[1] + degrees[0]
            return _closed_form(x, (step(x) - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1))
        if step.source in previous:
            starts = [previous[step.source]]
        else:
            start = self.model.starts.get(step.destination)
            staged = [] if start is None else start(step, y)
            # The last and best stage, the first, which errs in another way, and those between.
            starts = [staged[0], staged[-1], *staged[1:-1]] if len(staged) > 1 else staged
            starts += [extra[step.source]] if step.source in extra else []
        starts.append(y)
        precise = single if self.settings.precision is not None else None
        score, usual = self._choice(step, y.shape[1], told)
        examples = self.model.examples.get(step.destination)
        square = squares.get(step.source)
        return solve_step(step, y, starts, self.settings, precise, square, degrees, score, usual, examples)

    def _choice(self, step: Step, tokens: int, told: Tensor | None) -> tuple[Score | None, Tensor | None]:
        """(score of a stream's tokens, what is usual) where the step folds; nowhere else is there a choice."""
        prior = self.model.priors.get(step.source)
        if not self.model.folding.get(step.destination, 0.0):
            return None, None
        if told is not None:
            return lambda x: (x - told).norm(dim=-1) / told.norm(dim=-1), told.new_full((tokens,), RIGHT)
        return (None, None) if prior is None else (prior.distance, prior.limits(tokens))

    def _degrees(self, step: Step, y: Tensor, roundoff: float) -> tuple[Tensor, Tensor]:
        """(mean of x, deviation of x + f(x)) of tokens that a norm took them from."""
        assert step.norm is not None
        stripped = step.norm.stripped(y)
        guessed = self.model.degrees.get(step.destination)
        mean, deviation = (torch.zeros_like(y[..., :1]), torch.ones_like(y[..., :1]))
        if guessed is not None:
            mean, deviation = guessed(stripped)
        if roundoff <= torch.finfo(torch.float64).eps:
            found = step.norm.deviation(stripped)
            deviation = torch.where(found.isnan(), deviation, found)
        return mean, deviation


def _closed_form(x: Tensor, residual: Tensor) -> Solution:
    zeros = torch.zeros(len(x), dtype=torch.long)
    return Solution(x, residual, zeros, zeros + 1, residual < 1e-3, zeros, zeros)


def fit_exact(
    target: Target,
    images: Any,
    taps: Sequence[str] | str | None = None,
    completion: Mapping[str, Any] | None = None,
    count: int = 256,
    settings: Settings | None = None,
    stages: int = STAGES,
) -> dict[str, ExactInverse]:
    """The exact inverse of every tap that has one: {tap: inverse}.

    images: ImageSource or (N, 3, H, W), of which the first `count` fit the closed-form starts; completion: {tap: linear
    inverse to pixels}, for what no step holds (`fit_linear`); taps: default all of the target's. Taps without an exact
    step are left out; ask `ExactInverse(model, tap)` for the reason.
    """
    double = in_precision(target, torch.float64)
    walked = walk(double)
    names = list(target.taps) if taps is None else list(target.resolve_taps(taps))
    deepest = max((walked.taps[tap] for tap in names if tap in walked.taps), default=-1)
    model = _fitted(double, walked, walk(target), images, count, stages, completion or {}, deepest)
    found = {}
    for tap in names:
        if model.walk.exact_from(tap) or tap == target.available_taps[0]:
            found[tap] = ExactInverse(model, tap, settings)
    return found


def _fitted(
    double: Target,
    walked: Walk,
    single: Walk,
    images: Any,
    count: int,
    stages: int,
    completion: Mapping[str, Any],
    deepest: int,
) -> ExactModel:
    """Of the steps up to the stream number `deepest`."""
    order = sorted(walked.taps, key=walked.taps.__getitem__)
    collected: dict[str, list[Tensor]] = {tap: [] for tap in order}
    prefix = {}
    seen = 0
    for batch in batches(images, 64):
        recorded = double.record(batch[: count - seen].double(), order)
        for tap in order:
            collected[tap].append(recorded[tap].values)
            prefix[tap] = getattr(recorded[tap], "prefix", 0)
        seen += len(batch)
        if seen >= count:
            break
    starts, degrees, priors, examples, folding = {}, {}, {}, {}, {}
    with torch.no_grad():
        for number, step in walked.steps.items():
            if number > deepest:
                continue
            # The nearest tap before the step, and from there the steps themselves.
            near = max((tap for tap in order if walked.taps[tap] < number), key=walked.taps.__getitem__, default=None)
            if near is None or any(each not in walked.steps for each in range(walked.taps[near] + 1, number)):
                continue
            x = torch.cat(collected[near])
            for each in range(walked.taps[near] + 1, number):
                x = torch.cat([walked.steps[each](part) for part in x.split(64)])
            if step.norm is not None and step.before is None:
                degrees[step.destination] = _fit_degrees(step, x)
            if step.kind != "norm":
                starts[step.destination] = fit_staged_start(step, x, prefix[near], stages)
                priors[step.source] = fit_prior(x, prefix[near])
            if step.tokenwise and step.norm is None and step.kind == "residual":
                examples[step.destination] = _fit_examples(step, starts[step.destination], x)
                some = x.flatten(0, 1)
                some = some[:: max(1, len(some) // SIGNED)]
                sign = token_signs(token_map(step.forward, step.jacobian), some)
                folding[step.destination] = float((sign <= 0).double().mean())
    embedding = measured_embedding(double)
    return ExactModel(double, walked, single, starts, degrees, priors, embedding, completion, examples, folding)


def _fit_examples(step: Step, start: StagedStart, x: Tensor) -> Examples:
    y = torch.cat([step(part) for part in x.split(64)])
    guess = torch.cat([start(step, part)[0] for part in y.split(64)])
    some = torch.randperm(y.shape[0] * y.shape[1], generator=torch.Generator().manual_seed(0))[:EXAMPLES]
    return Examples(y.flatten(0, 1)[some], (x - guess).flatten(0, 1)[some])


def _fit_degrees(step: Step, x: Tensor) -> LostDegrees:
    assert step.norm is not None
    z = torch.cat([step.forward(part) for part in x.split(64)])
    mean = x.mean(-1, keepdim=True)
    deviation = (z.var(-1, unbiased=False, keepdim=True) + step.norm.epsilon).sqrt()
    held_out = torch.arange(len(x)) % HELD_OUT == 0
    return LostDegrees(*_ridge(step.norm.normalised(z), torch.cat([mean, deviation.log()], dim=-1), held_out))
