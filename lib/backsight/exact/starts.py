"""Closed-form starts of exact inverses, fitted on training images; how usual a token is; the patch embedding, measured.

    StagedStart     x from y = g(x): a ridge map of y, then ridge maps that also read g at the last guess
    Prior           the Gaussian of a stream's tokens, by which one of several roots is chosen
    LostDegrees     mean and deviation that a LayerNorm took, guessed from what it left
    Embedding       the patch embedding as an affine map

All are fitted in float64, each prefix token apart and the grid's tokens together: (P + 1, …).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from backsight.exact.steps import Step
from backsight.inverses.ridge import RidgeAccumulator, best
from backsight.inverses.rows import patchify, unpatchify
from backsight.representation import Tokens
from backsight.targets.base import Target

STAGES = 4  # of a staged start
STRENGTHS = tuple(10.0**exponent for exponent in range(-10, 2))
HELD_OUT = 5  # every fifth image chooses the ridge strength
BATCH = 64  # images whose features are held at once
USUAL = 0.75  # share of the training tokens that are not doubted
EXAMPLES = 4096  # training tokens whose guesses' errors further starts are made of
FURTHER = 4  # such starts of a token
SIGNED = 512  # training tokens that tell whether a half-step folds
PRIOR_FLOOR = 1e-4  # of the mean variance: directions that never move get this, not an infinite weight
RANK_TOLERANCE = 1e-6  # singular values below this share of the largest one count as zero


def groups(values: Tensor, prefix: int) -> list[Tensor]:
    """(B, n, c) as rows: of each prefix token (B, c), and of all others together (B (n − P), c)."""
    return [values[:, number] for number in range(prefix)] + [values[:, prefix:].flatten(0, 1)]


def by_group(values: Tensor, matrices: Tensor) -> Tensor:
    """(B, n, d) of tokens (B, n, c) times matrices (P + 1, c, d), the last of which is of all grid tokens."""
    prefix = len(matrices) - 1
    heads = torch.einsum("bpc,pcd->bpd", values[:, :prefix], matrices[:-1])
    return torch.cat([heads, values[:, prefix:] @ matrices[-1]], dim=1)


def of_tokens(rows: Tensor, tokens: int) -> Tensor:
    """(n, …) of (P + 1, …): the last row is every grid token's."""
    return torch.cat([rows[:-1], rows[-1:].expand(tokens - len(rows) + 1, *rows.shape[1:])])


def ridge(
    batches: Iterable[tuple[Tensor, Tensor]],
    prefix: int,
    strengths: Sequence[float] = STRENGTHS,
    all_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """(weight (P + 1, d, c), bias (P + 1, c)) of (features (B, n, d), outputs (B, n, c)), by running moments.

    The strength is that which is best on the images held out; all_rows: with it, these count in the solution as well.
    """
    training, validation = ([RidgeAccumulator() for _ in range(prefix + 1)] for _ in range(2))
    count = 0
    for features, outputs in batches:
        held_out = (count + torch.arange(len(features), device=features.device)) % HELD_OUT == 0
        count += len(features)
        for rows, which in ((training, ~held_out), (validation, held_out)):
            parts = zip(groups(features[which], prefix), groups(outputs[which], prefix), strict=True)
            for moments, (x, y) in zip(rows, parts, strict=True):
                moments.update(x, y)
    weights, biases = [], []
    for fitted, held in zip(training, validation, strict=True):
        solution = best(fitted, held, strengths)
        weight, bias = solution.factors[0], solution.bias - solution.center @ solution.factors[0]
        if all_rows:
            weight, bias = (fitted + held).solve(solution.alpha)
        weights.append(weight)
        biases.append(bias)
    return torch.stack(weights), torch.stack(biases)


class Fitted(nn.Module):
    """Numbers by name, as buffers of their own dtypes."""

    def __init__(self, **numbers: Tensor) -> None:
        super().__init__()
        for name, tensor in numbers.items():
            self.register_buffer(name, tensor)


class StagedStart(Fitted):
    """Guesses of x from y = g(x) in closed form, in stages; kept in float32, since they only steer.

    first: (P + 1, c, c) of y; maps: (S − 1, P + 1, 5 c, c) of y, the last guess x, g(x), and g a whole and half a
    fixed-point step on; biases: (S, P + 1, c).
    """

    first: Tensor
    maps: Tensor
    biases: Tensor

    def forward(self, step: Step, y: Tensor) -> list[Tensor]:
        """(B, n, c) guesses, the last and best stage first."""
        guesses: list[Tensor] = []
        for number, bias in enumerate(self.biases):
            weight = self.first if number == 0 else self.maps[number - 1]
            guesses.append(_guess(_features(step, y, guesses[-1] if guesses else None), weight, bias))
        return guesses[::-1]


def _guess(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return by_group(features, weight.to(features)) + of_tokens(bias.to(features), features.shape[1])


def _features(step: Step, y: Tensor, x: Tensor | None) -> Tensor:
    """(B, n, c) of the first stage, (B, n, 5 c) behind a guess x."""
    if x is None:
        return y
    value = step(x)
    error = y - value
    return torch.cat([y, x, value, step(x + error), step(x + 0.5 * error)], dim=2)


def fit_staged_start(step: Step, x: Tensor, y: Tensor, prefix: int, stages: int = STAGES) -> StagedStart:
    """x, y: (B, n, c) streams of training images before and behind the step."""
    weights, biases = [], []
    guesses: list[Tensor | None] = [None] * len(x.split(BATCH))
    for _ in range(stages):
        triples = list(zip(y.split(BATCH), guesses, x.split(BATCH), strict=True))
        fitted = ridge(((_features(step, behind, guess), before) for behind, guess, before in triples), prefix)
        weight, bias = (part.float() for part in fitted)
        guesses = [_guess(_features(step, behind, guess), weight, bias) for behind, guess, _ in triples]
        weights.append(weight)
        biases.append(bias)
    maps = torch.stack(weights[1:]) if stages > 1 else weight.new_zeros(0, prefix + 1, 5 * x.shape[2], x.shape[2])
    return StagedStart(first=weights[0], maps=maps, biases=torch.stack(biases))


class Prior(Fitted):
    """How usual a stream's tokens are: the Gaussian of the training images.

    mean: (P + 1, c); precision: (P + 1, c, c); usual: (P + 1,) squared Mahalanobis distance that the share `USUAL` of
    the training tokens stays below; folding: () share of training tokens where the determinant of the step's derivative
    is negative, so that other roots exist; behind, errors: (M, c) training tokens behind the step, and how far its
    guesses of them were off, from which further starts are made.
    """

    mean: Tensor
    precision: Tensor
    usual: Tensor
    folding: Tensor
    behind: Tensor
    errors: Tensor

    def of_rows(self, x: Tensor, token: Tensor) -> Tensor:
        """(K,) distances of single tokens (K, c), `token` their numbers within an image."""
        distance, group = x.new_zeros(len(x)), token.clamp(max=len(self.usual) - 1)
        for number in group.unique().tolist():
            away = x[group == number] - self.mean[number]
            distance[group == number] = (away @ self.precision[number] * away).sum(-1)
        return distance

    def further_starts(self, y: Tensor, guess: Tensor) -> list[Tensor]:
        """(B, n, c) each: the guess, moved by the errors of the nearest training tokens, the nearest first."""
        rows, count = y.flatten(0, 1), min(FURTHER, len(self.behind))
        distances = (torch.cdist(part, self.behind.to(y)) for part in rows.split(1024))
        near = torch.cat([part.topk(count, largest=False).indices for part in distances])
        return [guess + self.errors[near[:, number]].to(y).view_as(y) for number in range(count)]


def fit_prior(step: Step, x: Tensor, y: Tensor, start: StagedStart, prefix: int) -> Prior:
    """x, y: (B, n, c) streams of training images before and behind a step on tokens with a known derivative."""
    assert step.jacobian is not None
    means, precisions, usual = [], [], []
    for rows in groups(x, prefix):
        means.append(rows.mean(0))
        away = rows - means[-1]
        precisions.append(torch.linalg.inv(covariance(away, PRIOR_FLOOR)))
        usual.append((away @ precisions[-1] * away).sum(-1)[:100_000].quantile(USUAL))
    guess = torch.cat([start(step, part)[0] for part in y.split(BATCH)])
    count = x.shape[0] * x.shape[1]
    some = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:EXAMPLES].to(x.device)
    some_of_all = x.flatten(0, 1)[:: max(1, count // SIGNED)]
    # One by one: see `solver.factored`.
    signs = torch.stack([torch.linalg.slogdet(matrix).sign for matrix in step.jacobian(some_of_all)])
    return Prior(
        mean=torch.stack(means),
        precision=torch.stack(precisions),
        usual=torch.stack(usual),
        folding=(signs <= 0).double().mean(),
        behind=y.flatten(0, 1)[some].float(),
        errors=(x - guess).flatten(0, 1)[some].float(),
    )


def covariance(rows: Tensor, floor: float) -> Tensor:
    """(c, c) of rows (M, c) about zero, in float64; floor: of its mean variance, added to every direction."""
    rows = rows.double()
    found = rows.T @ rows / max(1, len(rows))
    found.diagonal().add_(floor * found.diagonal().mean().clamp(min=1e-12))
    return found


class LostDegrees(Fitted):
    """Guess of what a LayerNorm takes from a token: mean and log deviation, from û. weight: (C, 2); bias: (2,)."""

    weight: Tensor
    bias: Tensor

    def forward(self, stripped: Tensor) -> tuple[Tensor, Tensor]:
        """(…, 1) mean and deviation."""
        mean, log = (stripped @ self.weight + self.bias).split(1, dim=-1)
        return mean, log.exp()


def fit_lost_degrees(step: Step, x: Tensor) -> LostDegrees:
    norm = step.norm
    assert norm is not None

    def rows(part: Tensor) -> tuple[Tensor, Tensor]:
        z = step.forward(part)
        log = (z.var(-1, unbiased=False, keepdim=True) + norm.epsilon).sqrt().log()
        return norm.normalised(z), torch.cat([part.mean(-1, keepdim=True), log], dim=-1)

    weight, bias = ridge((rows(part) for part in x.split(BATCH)), 0)
    return LostDegrees(weight=weight[0], bias=bias[0])


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


def measured_embedding(target: Target) -> Embedding | None:
    """The target's first tap as an affine map of its patches, measured on single pixels; None where it is none."""
    tap = target.available_taps[0]
    weights = next(target.model.parameters())
    channels, (height, width), patch = len(target.preprocessing.mean), target.image_size, target.reduction
    count = channels * patch[0] * patch[1]
    if height % patch[0] or width % patch[1] or count > 4096:
        return None
    grid = (height // patch[0], width // patch[1])

    def embedded(patches: Tensor) -> Tokens:
        images = unpatchify(patches.expand(-1, grid[0] * grid[1], -1), grid, patch)
        tokens = target.record(images, [tap])[tap]
        # A module's own target tells its values in float32, whatever the precision of its pass.
        return tokens.replace(tokens.values.to(weights)) if isinstance(tokens, Tokens) else cast("Tokens", tokens)

    blank = embedded(weights.new_zeros(1, 1, count))
    if not isinstance(blank, Tokens) or blank.grids != (grid,):
        return None
    lines = torch.eye(count, dtype=weights.dtype, device=weights.device)[:, None].split(BATCH)
    matrix = torch.cat([(embedded(part).patches - blank.patches)[:, 0] for part in lines])
    probe = torch.rand(2, grid[0] * grid[1], count, generator=torch.Generator().manual_seed(0)).to(weights)
    values = embedded(probe).patches
    if float((values - probe @ matrix - blank.patches).norm()) > 1e-4 * float(values.norm()):
        return None
    rank = int(torch.linalg.matrix_rank(matrix, rtol=RANK_TOLERANCE))
    return Embedding(matrix, blank.patches[0], rank, patch, blank.prefix_values[0], (height, width))
