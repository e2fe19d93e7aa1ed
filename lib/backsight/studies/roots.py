"""Truth and fate of exact inverses: every stream of a chain in float64, and what became of each image on the way back.

An image is back where its error is at most `RIGHT`. Everything else is one of three: it met another exact root of a
half-step, a half-step was not solved, or its error grew (by bad conditioning, or by what a norm takes).
Truth is recorded in float64: in float32, round-off alone makes wrong roots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.inverse import ExactInverse
from backsight.exact.solver import Settings
from backsight.exact.starts import Half
from backsight.exact.steps import Step
from backsight.inverses.families import Reconstruct
from backsight.representation import Tokens, concatenate
from backsight.tables.names import ANOTHER_ROOT, BACK, ERROR_GROWN, RIGHT, UNSOLVED

ALONE = Settings(restarts=0, newton=20)
SAME_ROOT = 0.1  # of a solution's distance from the truth: nearer to the truth's own root, it is that one
LEAST_ERROR = 1e-17  # of which a logarithm is taken
BASES = ("modular", "direct", "linear")  # of a MAP inverse, the first that is there


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
        return self.streams[self.inverse.source].batch

    def of_images(self, which: Tensor) -> Case:
        return replace(self, streams={name: tokens.index(which) for name, tokens in self.streams.items()})

    def first(self, count: int) -> Case:
        return self.of_images(torch.arange(min(count, self.count)))

    def spans(self) -> list[tuple[str, str]]:
        """(tap, tap before it), from the last to the first: one half-step each, where every stream is a tap."""
        places, inverse = self.inverse.model.taps, self.inverse
        inside = [tap for tap in places if places[inverse.reached] <= places[tap] <= places[inverse.source]]
        return [(later, earlier) for earlier, later in pairwise(sorted(inside, key=places.__getitem__))][::-1]


def taken_back(case: Case, settings: Settings, tap: str, to: str, tokens: Tokens) -> tuple[pd.DataFrame, Tensor]:
    """(fate, tokens_right, log10_error: a row an image; values at `to`) of `tokens` at a tap, of a case's images."""
    inverse, rows, ends = case.inverse.at(tap, settings), [], []
    for which in torch.arange(case.count).split(inverse.batch_size):
        given, true = tokens.index(which), case.of_images(which).streams
        trace = inverse.trace(given, to)
        y, right, fate = given.values.double(), torch.tensor(True), np.full(len(which), BACK)
        for step, solution in zip(trace.steps, trace.solutions, strict=True):
            x, truth = solution.x, true[step.source].values
            error = relative_error(x, truth)
            lost = right & ~(error <= RIGHT)  # NaN is no error that is small
            # What a norm took is lost, and no root is another.
            another = lost & solution.solved & (not step.lossy)
            if bool(another.any()):
                another &= _elsewhere(step, y, truth, x, trace.squares.get(step.source), settings)
            kind = np.where(another.cpu(), ANOTHER_ROOT, np.where(solution.solved.cpu(), ERROR_GROWN, UNSOLVED))
            fate, right, y = np.where(lost.cpu(), kind, fate), right & ~lost, x
        share = ((x - truth).norm(dim=-1) <= RIGHT * truth.norm(dim=-1)).double().mean(1)
        columns = {"tokens_right": share.cpu(), "log10_error": log10(error).cpu()}
        rows.append(pd.DataFrame({"fate": np.where(error.cpu() <= RIGHT, BACK, fate), **columns}))
        ends.append(trace.values)
    return pd.concat(rows, ignore_index=True), torch.cat(ends)


def relative_error(x: Tensor, truth: Tensor) -> Tensor:
    """(B,) |x − truth| / |truth|."""
    return (x - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)


def _elsewhere(step: Step, y: Tensor, truth: Tensor, x: Tensor, square: Tensor | None, settings: Settings) -> Tensor:
    """(B,) whether x is another root than the truth's own, and not this one with the error of y grown."""
    own = Half(step).solve(y, [truth], replace(settings, restarts=0, choose=False), square)
    away = (x - truth).flatten(1).norm(dim=1)
    return ~(own.solved & ((x - own.x).flatten(1).norm(dim=1) <= SAME_ROOT * away))


def map_base(families: Mapping[str, Mapping[str, Reconstruct]], tap: str) -> Reconstruct:
    """The inverse that a MAP inverse of this tap starts from: of BASES, else of any other family."""
    return next(families[name][tap] for name in [*BASES, *families] if tap in families.get(name, {}))


def log10(errors: Tensor) -> Tensor:
    return errors.clamp(min=LEAST_ERROR).log10()
