"""Half-steps to be solved, and what training images say of each, in closed form and float64.

Guesses of x from y = g(x), of what a norm took, and how usual a token is, by which one of several roots is chosen.
Numbers (P + 1, …) are of each prefix token and of the grid's tokens together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backsight.exact.solver import Settings, Solution, determinant_signs, solve
from backsight.exact.steps import Step
from backsight.inverses.ridge import RidgeAccumulator, best

DENSE = 256  # channels of a token up to which its derivative is factored, and no Krylov space is built
STAGES = 4  # of a staged start
STRENGTHS = tuple(10.0**exponent for exponent in range(-10, 2))
HELD_OUT = 5  # every fifth image chooses the ridge strength
BATCH = 64  # images whose features are held at once
USUAL = 0.75  # share of the training tokens that are not doubted
EXAMPLES = 4096  # training tokens whose guesses' errors further starts are made of
KNOWN_OFF = 0.5  # of their size: known tokens farther off are those of another root
FURTHER = 4  # such starts of a token
SIGNED = 512  # training tokens that tell whether a half-step folds
PRIOR_FLOOR = 1e-4  # of the mean variance: directions that never move get this, not an infinite weight


def groups(values: Tensor, prefix: int) -> list[Tensor]:
    """(B, n, c) as rows: of each prefix token (B, c), and of all others together (B (n − P), c)."""
    return [values[:, number] for number in range(prefix)] + [values[:, prefix:].flatten(0, 1)]


def by_group(values: Tensor, matrices: Tensor) -> Tensor:
    """(B, n, d) of tokens (B, n, c) times matrices (P + 1, c, d), the last of which is of all grid tokens."""
    prefix = len(matrices) - 1
    heads = torch.einsum("bpc,pcd->bpd", values[:, :prefix], matrices[:-1])
    return torch.cat([heads, values[:, prefix:] @ matrices[-1]], dim=1)


def covariance(rows: Tensor, floor: float) -> Tensor:
    """(c, c) of rows (M, c) about zero, in float64; floor: of its mean variance, added to every direction."""
    rows = rows.double()
    square = rows.T @ rows / len(rows)
    square.diagonal().add_(floor * square.diagonal().mean().clamp(min=1e-12))
    return square


def ridge(
    pairs: Iterable[tuple[Tensor, Tensor]], prefix: int, strengths: Sequence[float] = STRENGTHS, all_rows: bool = False
) -> Tensor:
    """(P + 1, d + 1, c) weights, the last row the constants, of (features (B, n, d), outputs (B, n, c)).

    The strength is that which is best on the images held out; all_rows: with it, these count in the solution as well.
    """
    training, validation = ([RidgeAccumulator() for _ in range(prefix + 1)] for _ in range(2))
    count = 0
    for features, outputs in pairs:
        held_out = (count + torch.arange(len(features), device=features.device)) % HELD_OUT == 0
        count += len(features)
        for rows, which in ((training, ~held_out), (validation, held_out)):
            parts = zip(groups(features[which], prefix), groups(outputs[which], prefix), strict=True)
            for moments, (x, y) in zip(rows, parts, strict=True):
                moments.update(x, y)
    weights = []
    for fitted, held in zip(training, validation, strict=True):
        solution = best(fitted, held, strengths)
        weight, bias = solution.factors[0], solution.bias - solution.center @ solution.factors[0]
        if all_rows:
            weight, bias = (fitted + held).solve(solution.alpha)
        weights.append(torch.cat([weight, bias[None]]))
    return torch.stack(weights)


class Numbers(nn.Module):
    """A module whose buffers come with a fit, or with the file that holds them."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def put(self, **numbers: Tensor) -> None:
        for name, tensor in numbers.items():
            self.register_buffer(name, tensor)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        for key, tensor in state_dict.items():
            if key.startswith(prefix) and "." not in (name := key.removeprefix(prefix)):
                self.put(**{name: tensor.float() if tensor.dtype == torch.float16 else tensor})
        super()._load_from_state_dict(state_dict, prefix, *others)


class Half(Numbers):
    """A half-step, and what was fitted for it (`fit`); every buffer may be missing.

    stage0: (P + 1, c + 1, c) guess of x from y, stage1, …: (P + 1, 5 c + 1, c) of y, the last guess x, g(x), and g a
    whole and half a fixed-point step on, in float32, since they only steer; taken: (1, C + 1, 2) mean and log deviation
    that a norm took, from û. Where the derivative of a token is known: mean (P + 1, c) and precision (P + 1, c, c), the
    Gaussian of the tokens before the step; usual: (P + 1,) squared Mahalanobis distance that the share `USUAL` stays
    below; folding: () share of tokens where the determinant of the derivative is negative, so that other roots exist;
    behind, errors: (M, c) tokens behind the step, and how far the guesses of them were off.
    """

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    @property
    def prior(self) -> bool:
        return "mean" in self._buffers

    @property
    def folds(self) -> bool:
        return self.prior and bool(self.folding > 0)

    def fit(self, x: Tensor, y: Tensor, prefix: int, stages: int = STAGES) -> None:
        """x, y: (B, n, c) streams of training images before and behind the step."""
        step, norm = self.step, self.step.norm
        if norm is not None and step.lossy:

            def taken(part: Tensor) -> tuple[Tensor, Tensor]:
                z = step.forward(part)
                log = (z.var(-1, unbiased=False, keepdim=True) + norm.module.eps).sqrt().log()
                return norm.normalised(z), torch.cat([part.mean(-1, keepdim=True), log], dim=-1)

            self.put(taken=ridge((taken(part) for part in x.split(BATCH)), 0))
        guesses = self.fit_guesses(x, y, prefix, stages)
        if step.jacobian is None or x.shape[2] > DENSE:
            return
        rows, tokens, behind = groups(x, prefix), x.flatten(0, 1), y.flatten(0, 1)
        means = [part.mean(0) for part in rows]
        away = [part - mean for part, mean in zip(rows, means, strict=True)]
        precisions = [torch.linalg.inv(covariance(part, PRIOR_FLOOR)) for part in away]
        distances = (_square(part[:100_000], matrix) for part, matrix in zip(away, precisions, strict=True))
        some = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[:EXAMPLES].to(x.device)
        signs = determinant_signs(step.jacobian(tokens[:: max(1, len(tokens) // SIGNED)]))
        self.put(
            mean=torch.stack(means),
            precision=torch.stack(precisions),
            usual=torch.stack([part.quantile(USUAL) for part in distances]),
            folding=(signs <= 0).double().mean(),
            behind=behind[some].float(),
            errors=(tokens - guesses.flatten(0, 1))[some].float(),
        )

    def fit_guesses(self, x: Tensor, y: Tensor, prefix: int, stages: int, all_rows: bool = False) -> Tensor:
        """Fits the stages alone, all_rows as of `ridge`; (B, n, c) what the last of them makes of y."""
        guesses: list[Any] = [None] * len(x.split(BATCH))
        for number in range(stages):
            features = map(self._features, y.split(BATCH), guesses)
            weight = ridge(zip(features, x.split(BATCH), strict=True), prefix, all_rows=all_rows).float()
            guesses = [affine(self._features(*pair), weight) for pair in zip(y.split(BATCH), guesses, strict=True)]
            self.put(**{f"stage{number}": weight})
        return torch.cat(guesses)

    def _features(self, y: Tensor, x: Tensor | None) -> Tensor:
        if x is None:
            return y
        value = self.step(x)
        error = y - value
        return torch.cat([y, x, value, self.step(x + error), self.step(x + 0.5 * error)], dim=2)

    def guesses(self, y: Tensor) -> list[Tensor]:
        """(B, n, c) of x, the last and best stage first; none without a fit."""
        guesses: list[Tensor] = []
        while (weight := self._buffers.get(f"stage{len(guesses)}")) is not None:
            guesses.append(affine(self._features(y, guesses[-1] if guesses else None), weight))
        return guesses[::-1]

    def starts(self, y: Tensor, choose: bool = True) -> list[Tensor]:
        """(B, n, c) of x, in the order in which they are tried."""
        guesses = self.guesses(y)
        # The last and best stage, the first, which errs in another way, and those between.
        starts = [*guesses[:1], *guesses[1:][-1:], *guesses[1:-1], y]
        return [*starts, *self.further_starts(y, starts[0])] if choose and self.folds else starts

    def further_starts(self, y: Tensor, guess: Tensor) -> list[Tensor]:
        """(B, n, c) each: the guess, moved by the errors of the nearest training tokens, the nearest first."""
        count = min(FURTHER, len(self.behind))
        distances = (torch.cdist(part, self.behind.to(y)) for part in y.flatten(0, 1).split(1024))
        near = torch.cat([part.topk(count, largest=False).indices for part in distances])
        return [guess + self.errors[near[:, number]].to(y).view_as(y) for number in range(count)]

    def distance(self, x: Tensor, token: Tensor) -> Tensor:
        """(K,) squared Mahalanobis distances of single tokens (K, c), `token` their numbers within an image."""
        distance, group = x.new_zeros(len(x)), token.clamp(max=len(self.mean) - 1)
        for number in group.unique().tolist():
            at = group == number
            distance[at] = _square(x[at] - self.mean[number], self.precision[number])
        return distance

    def doubt(self, x: Tensor, token: Tensor) -> Tensor:
        """(K,) how much farther than usual they lie from the mean."""
        return self.distance(x, token) - self.usual[token.clamp(max=len(self.usual) - 1)]

    def solve(
        self,
        y: Tensor,
        starts: Sequence[Tensor],
        settings: Settings | None = None,
        square: Tensor | None = None,
        stripped: bool = False,
    ) -> Solution:
        """x with step(x) = y, for a batch of streams (B, n, c); tokens that do not see one another are solved alone.

        square: (B, n, 1) mean square of x̂ (1: unknown) of a step between norms; stripped: y has lost its last digits in
        float32. A norm's û = û(x + f(x)) holds C − 1 equations a token. Where x left a norm, x̂ has the mean 0 and a
        known mean square: added along 1, which û never has, and along û. Else mean and scale are guessed.
        """
        step, norm, before, settings = self.step, self.step.norm, self.step.before, settings or Settings()
        right, squares = y, torch.ones_like(y[..., :1]) if square is None else square
        if norm is not None:
            right = norm.stripped(y)
        if norm is not None and step.lossy:
            weight = self._buffers.get("taken")
            taken = torch.zeros_like(y[..., :2]) if weight is None else affine(right, weight)
            kept = torch.full_like(y[..., :1], torch.nan) if stripped else norm.deviation(right)
            right = right * torch.where(kept.isnan(), taken[..., 1:].exp(), kept) + taken[..., :1]
        if step.tokenwise:
            right, squares, *starts = (part.reshape(-1, 1, part.shape[-1]) for part in (right, squares, *starts))

        def function(x: Tensor, which: Tensor) -> Tensor:
            z = step.forward(x)
            if norm is None:
                return z
            if before is None:
                return z - z.mean(-1, keepdim=True) + x.mean(-1, keepdim=True)
            hat = before.stripped(x)
            excess = hat.square().mean(-1, keepdim=True) - squares[which]
            return norm.normalised(z) * (1 + excess) + hat.mean(-1, keepdim=True)

        known: Any = step.known

        def wrong(x: Tensor) -> Tensor:
            return (x[:, : len(known)] - known).flatten(1).norm(dim=1) > KNOWN_OFF * known.norm()

        def doubt(x: Tensor, which: Tensor) -> Tensor:
            return self.doubt(x[:, 0], which % y.shape[1])

        if not step.tokenwise:
            return solve(function, right, starts, settings, wrong=None if known is None else wrong)
        jacobian = step.jacobian if norm is None and y.shape[2] <= DENSE else None
        chosen = doubt if settings.choose and self.folds else None
        alone = solve(function, right, starts, settings, jacobian, chosen)  # of the residuals of tokens, the worst
        return Solution(
            alone.x.view_as(y), alone.residual.view(len(y), -1).amax(1), alone.solved.view(len(y), -1).all(1)
        )


def affine(features: Tensor, weight: Tensor) -> Tensor:
    return by_group(F.pad(features, (0, 1), value=1.0), weight.to(features))


def _square(away: Tensor, precision: Tensor) -> Tensor:
    return (away @ precision * away).sum(-1)
