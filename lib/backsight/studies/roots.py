"""An exact inverse that looks for roots, and what its way back met: the instruments of several studies.

Truth is recorded in float64 (`Case.of`): in float32, round-off alone makes wrong roots.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.inverse import ExactInverse, Trace
from backsight.exact.solver import Settings, Solution
from backsight.exact.starts import Half
from backsight.exact.steps import Step
from backsight.inverses.families import Reconstruct
from backsight.representation import Representation, Tokens, concatenate
from backsight.studies.continuation import token_roots
from backsight.tables.names import RIGHT

SAME_ROOT = 0.1  # of a solution's distance from the truth: nearer to the truth's own root, it is that one
BASES = ("modular", "direct", "linear")  # of a MAP inverse, the first that is there


class RootChoosing(ExactInverse):
    """An exact inverse that follows tokens along curves where no start solves them, or where a root is doubted.

    near: {stream: (B, n, c)} guesses that are tried first.
    """

    near: Mapping[str, Tensor] = {}

    @classmethod
    def of(
        cls, inverse: ExactInverse, settings: Settings | None = None, near: Mapping[str, Tensor] | None = None
    ) -> RootChoosing:
        """The same inverse, looking for roots."""
        given = inverse.fitted(), inverse.completion, settings or inverse.settings, inverse.batch_size
        made = cls(inverse.model, inverse.source, *given)
        made.near = getattr(inverse, "near", {}) if near is None else near
        return made

    def at(self, tap: str, settings: Settings | None = None) -> RootChoosing:
        return RootChoosing.of(super().at(tap, settings), near=self.near)

    def solve(
        self, half: Half, y: Tensor, starts: Sequence[Tensor], square: Tensor | None = None, stripped: bool = False
    ) -> Solution:
        step = half.step
        starts = [self.near[step.source], *starts] if step.source in self.near else starts
        solution = super().solve(half, y, starts, square, stripped)
        if not step.tokenwise or step.norm is not None:
            return solution
        began, flat, x = time.perf_counter(), y.flatten(0, 1), solution.x.flatten(0, 1).clone()
        doubts = self.settings.choose and half.folds
        token = torch.arange(len(x), device=x.device) % y.shape[1]
        off = (step(solution.x) - y).norm(dim=2) / y.norm(dim=2)
        residual = off.flatten().nan_to_num(torch.inf, torch.inf)
        solved_tokens = residual <= self.settings.tolerance
        rated = half.doubt(x, token) if doubts else torch.zeros_like(residual)
        doubted = ~solved_tokens | (rated > 0)
        at = doubted.nonzero().flatten()
        if not len(at):
            return solution
        given = [start.flatten(0, 1)[at] for start in starts]
        roots = token_roots(step, flat[at], given, rounds=0, tolerance=self.settings.tolerance)
        scores = half.doubt(roots.x, token[at[roots.token]]) if doubts else roots.residual
        best = roots.best(scores)
        has = best >= 0
        has[has.clone()] &= (scores[best[has]] < rated[at[has]]) | ~solved_tokens[at[has]]
        x[at[has]], residual[at[has]] = roots.x[best[has]], roots.residual[best[has]]
        residual = residual.view(len(y), -1).amax(1)
        seconds = solution.seconds + time.perf_counter() - began
        solved_images = residual <= self.settings.tolerance
        return replace(solution, x=x.view_as(y), residual=residual, solved=solved_images, seconds=seconds)


def map_base(families: Mapping[str, Mapping[str, Reconstruct]], tap: str) -> Reconstruct:
    """The inverse that a MAP inverse of this tap starts from: modular, direct or linear, the first that is there."""
    order = [*BASES, *(name for name in families if name not in BASES)]
    return next(families[name][tap] for name in order if tap in families.get(name, {}))


# The truth


@dataclass(frozen=True)
class Case:
    """One set of weights: its inverse, and every stream on the way of its exact chain, in float64."""

    inverse: ExactInverse
    streams: Mapping[str, Tokens]

    @classmethod
    def of(cls, inverse: ExactInverse, images: Tensor, batch_size: int = 64) -> Case:
        """The truth of images (N, 3, H, W); streams that are no tap are made by the model's own steps.

        Raises BacksightError where no exact step leads back from the tap.
        """
        if inverse.reached == inverse.source:
            raise BacksightError(f"No exact step leads back from {inverse.source}: choose a later tap.")
        chain = {inverse.reached, *(step.destination for step in inverse.steps)}
        taps = [tap for tap in inverse.model.taps if tap in chain]
        parts = [inverse.model.target.record(part.double(), taps) for part in images.split(batch_size)]
        streams: dict[str, Any] = {tap: concatenate([part[tap] for part in parts]) for tap in taps}
        with torch.no_grad():
            for step in inverse.steps:
                before = streams[step.source]
                streams.setdefault(step.destination, before.replace(step(before.values)))
        return cls(inverse, streams)

    @property
    def count(self) -> int:
        return next(iter(self.streams.values())).batch

    def first(self, count: int) -> Case:
        """Of the first images alone."""
        few = torch.arange(min(count, self.count))
        return Case(self.inverse, {name: tokens.index(few) for name, tokens in self.streams.items()})


# What a trace met


def judged(
    inverse: ExactInverse, trace: Trace, representation: Representation, truth: Mapping[str, Tokens]
) -> pd.DataFrame:
    """A row for each sample and step of a trace, steps from the last to the first; truth: by stream, in float64.

    sample, step, to, solved, seconds (of a sample); error: relative, of x, NaN without truth; another_root: solved,
    from a right y, to another x; right_tokens: share of the tokens whose own error is at most RIGHT.
    """
    frames, y = [], representation.values.double()
    right = torch.ones(len(y), dtype=torch.bool, device=y.device)
    for step, solution in zip(trace.steps, trace.solutions, strict=True):
        x = solution.x
        error = share = torch.full_like(solution.residual, torch.nan)
        another = torch.zeros_like(right)
        if step.source in truth:
            exact = truth[step.source].values.double()
            error = relative_error(x, exact)
            share = ((x - exact).norm(dim=-1) <= RIGHT * exact.norm(dim=-1)).double().mean(1)
            # What a norm took is lost, and no root is another.
            if step.norm is None or step.before is not None:
                another = solution.solved & right & (error > RIGHT)
                if bool(another.any()):
                    another &= _elsewhere(inverse, step, y, exact, x, trace.squares.get(step.source), another)
            right = error <= RIGHT
        columns = {"solved": solution.solved.tolist(), "error": error.tolist(), "another_root": another.tolist()}
        place = {"sample": range(len(y)), "step": step.destination, "to": step.source}
        times = {"right_tokens": share.tolist(), "seconds": solution.seconds / len(y)}
        frames.append(pd.DataFrame({**place, **columns, **times}))
        y = x
    return pd.concat(frames, ignore_index=True)


def relative_error(x: Tensor, truth: Tensor) -> Tensor:
    """(B,) |x − truth| / |truth|."""
    return (x - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)


def _elsewhere(
    inverse: ExactInverse, step: Step, y: Tensor, truth: Tensor, x: Tensor, square: Tensor | None, doubted: Tensor
) -> Tensor:
    """(B,) whether x is another root than the truth's own, and not this one with the error of y grown."""
    which = doubted.nonzero().flatten()
    settings = replace(inverse.settings, restarts=0, choose=False)
    own = Half(step).solve(y[which], [truth[which]], settings, None if square is None else square[which])
    away = (x[which] - truth[which]).flatten(1).norm(dim=1)
    same = own.solved & ((x[which] - own.x).flatten(1).norm(dim=1) <= SAME_ROOT * away)
    elsewhere = doubted.clone()
    elsewhere[which[same]] = False
    return elsewhere
