"""How far exact inversion reaches, half-step by half-step, and what becomes of an image on the way back.

    where_exactness_ends   how far back each tap is exact, and what ends it           (no solving: the walk alone)
    half_steps             every half-step alone, from the true y: back, another root, not solved, error grown
    chain                  from a tap to the embedding, an image as long as it is right, and where it was lost first

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
from tqdm.auto import tqdm

from backsight.errors import BacksightError
from backsight.exact.inverse import ExactInverse
from backsight.exact.solver import Settings
from backsight.exact.starts import Half
from backsight.exact.steps import ExactModel, NotInvertibleError, Step, walk
from backsight.representation import Tokens, concatenate
from backsight.tables.names import ANOTHER_ROOT, BACK, ERROR_GROWN, EXACT, FATES, RIGHT, UNSOLVED
from backsight.tables.values import NO_SEED, Values
from backsight.targets.base import PIXELS, Target

ALONE = Settings(restarts=0, newton=20)
SAME_ROOT = 0.1  # of a solution's distance from the truth: nearer to the truth's own root, it is that one


def where_exactness_ends(target: Target) -> pd.DataFrame:
    """How far back exactness reaches from each tap of the target, and what ends it; nothing is solved.

    A row a tap: exact_to (tap; "pixels" where nothing is lost; "" where not one step back is exact), half_steps,
    means_lost (values an image that norms on the way take: what lies behind is exact up to these), and why it ends.
    """
    model, rows = walk(target), []
    for tap in target.taps:
        try:
            steps, reached = model.back_from(tap)
            why = _end(model, reached)
        except NotInvertibleError as error:
            steps, reached, why = (), "", str(error)
        norms = [step.norm.module.normalized_shape[0] for step in steps if step.norm and step.lossy]
        lost = sum(model.sizes[tap] // channels for channels in norms)
        exact_to = reached if why else PIXELS
        rows.append({"tap": tap, "exact_to": exact_to, "half_steps": len(steps), "means_lost": lost, "why": why})
    return pd.DataFrame(rows)


def _end(model: ExactModel, reached: str) -> str:
    """What ends exactness at a tap, "" where nothing is lost."""
    order, embedding = (PIXELS, *model.target.available_taps), model.embedding
    if reached != order[1] or embedding is None:
        return model.gap(reached, order[order.index(reached) - 1])
    values, rank = len(embedding.matrix), embedding.rank
    lost = f"the patch embedding holds {rank} of {values} directions of a patch; the linear inverse completes it"
    return lost if rank < values else ""


@dataclass(frozen=True)
class Case:
    """One set of weights: its inverse, every stream on the way of its exact chain in float64, and the effort."""

    inverse: ExactInverse
    streams: Mapping[str, Tokens]
    settings: Settings = ALONE

    @classmethod
    def of(cls, inverse: ExactInverse, images: Tensor) -> Case:
        """The truth of images (N, 3, H, W). Raises BacksightError where no exact step leads back from the tap."""
        first, target = inverse.reached, inverse.model.target
        if first == inverse.source:
            raise BacksightError(f"No exact step leads back from {first}: choose a later tap.")
        stream: Any = concatenate([target.record(part.double(), [first])[first] for part in images.split(64)])
        streams = {first: stream}
        with torch.no_grad():
            for step in inverse.steps:
                streams[step.destination] = stream = stream.replace(step(stream.values))
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
        inside = [name for name in self.streams if name in self.inverse.model.taps]
        return [(later, earlier) for earlier, later in pairwise(inside)][::-1]


def half_steps(values: Values, case: Case, train_seed: int = NO_SEED) -> None:
    """Every half-step by itself, from the true stream behind it (`step`) to the one before.

    Where a block has no tap between its halves, both together. Measures, of the study "half_step": the four FATES
    (0 or 1).
    """
    for tap, before in tqdm(case.spans(), desc="half-steps", leave=False):
        fates, _ = taken_back(case, tap, before, case.streams[tap])
        for fate in FATES:
            values.add(fate, {train_seed: fates == fate}, tap, EXACT, study="half_step", step=tap)


def chain(values: Values, case: Case, train_seed: int = NO_SEED) -> None:
    """From the tap of the inverse to where exactness ends, an image followed, tap by tap, as long as it is right.

    Measures, of the study "chain": the four FATES of the whole way (0 or 1), and by `step` lost_another_root,
    lost_unsolved, lost_error_grown (lost first here).
    """
    source = case.inverse.source
    fates, alive, tokens = np.full(case.count, BACK, dtype=object), np.arange(case.count), case.streams[source]
    for tap, before in tqdm(case.spans(), desc="chain", leave=False):
        here = np.full(case.count, BACK, dtype=object)
        if len(alive):
            here[alive], x = taken_back(case.of_images(torch.tensor(alive)), tap, before, tokens)
            right = here[alive] == BACK
            alive = alive[right]
            tokens = case.streams[before].index(torch.tensor(alive)).replace(x[torch.tensor(right)])
        for fate in FATES[1:]:
            values.add(f"lost_{fate}", {train_seed: here == fate}, source, EXACT, study="chain", step=tap)
        fates = np.where(here == BACK, fates, here)
    for fate in FATES:
        values.add(fate, {train_seed: fates == fate}, source, EXACT, study="chain")


def taken_back(case: Case, tap: str, to: str, tokens: Tokens) -> tuple[np.ndarray, Tensor]:
    """(the fate of every image of a case, values at `to`) of `tokens` at a tap."""
    inverse, fates, ends = case.inverse.at(tap, case.settings), [], []
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
                another &= _elsewhere(step, y, truth, x, trace.squares.get(step.source), case.settings)
            kind = np.where(another.cpu(), ANOTHER_ROOT, np.where(solution.solved.cpu(), ERROR_GROWN, UNSOLVED))
            fate, right, y = np.where(lost.cpu(), kind, fate), right & ~lost, x
        fates.append(np.where(error.cpu() <= RIGHT, BACK, fate))
        ends.append(trace.values)
    return np.concatenate(fates), torch.cat(ends)


def relative_error(x: Tensor, truth: Tensor) -> Tensor:
    """(B,) |x − truth| / |truth|."""
    return (x - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)


def _elsewhere(step: Step, y: Tensor, truth: Tensor, x: Tensor, square: Tensor | None, settings: Settings) -> Tensor:
    """(B,) whether x is another root than the truth's own, and not this one with the error of y grown."""
    own = Half(step).solve(y, [truth], replace(settings, restarts=0, choose=False), square)
    away = (x - truth).flatten(1).norm(dim=1)
    return ~(own.solved & ((x - own.x).flatten(1).norm(dim=1) <= SAME_ROOT * away))
