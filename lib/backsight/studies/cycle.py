"""Cycle check: does the target, fed with a reconstruction, see what it saw in the image?

The reconstruction goes through the target once. Compared are the representations at each tap, its early features (a
perceptual distance), and its answer: the top-1 class, or the detections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.errors import BacksightError
from backsight.measures.agreement import match
from backsight.measures.similarity import token_cosine
from backsight.measures.structure import Judged, Key, Measure, Scores
from backsight.representation import Predictions, Tokens
from backsight.targets import Target

EARLY = 3  # taps of the perceptual distance


def early_taps(target: Target) -> tuple[str, ...]:
    """The first three taps of the target's blocks that hold tokens on a grid: where `perceptual` is measured."""
    return tuple(target.tap_set("blocks")[:EARLY])


def cycle_taps(target: Target, taps: Sequence[str]) -> list[str]:
    """What must be recorded of the images for `cycle`: its taps, the early ones and the one the answer is made from."""
    wanted = {*taps, *early_taps(target), _last(target)}
    return [tap for tap in target.available_taps if tap in wanted]


def cycle(target: Target, taps: Sequence[str]) -> Measure:
    """Measure: `cycle_cosine` at each of `taps` (column cycle_tap), `perceptual`, and the agreement of the answers.

    perceptual: the distance of LPIPS (Zhang et al. 2018) without its learned weights, in the target's own features:
    at each early tap tokens are scaled to unit length, squared differences summed over channels and averaged over
    tokens; then the mean over the taps. 0 is equal; values of different targets do not compare.
    top1_agreement (classifiers): the share of images with the same likeliest class. map50 (detectors): AP at an IoU
    of 0.5, mean over classes, of the detections on the reconstruction, where the objects are the detections on the
    image of a score of CONFIDENT or more: `Matches`.
    """
    recorded_taps = cycle_taps(target, taps)

    def prepared(judged: Judged) -> Callable[[Tensor], Scores]:
        if missing := [tap for tap in recorded_taps if tap not in judged.recorded]:
            raise BacksightError(f"cycle() needs the recorded taps {', '.join(missing)}: record cycle_taps().")
        true = {tap: judged.recorded[tap] for tap in recorded_taps}
        early = {tap: _directions(true[tap]) for tap in early_taps(target) if isinstance(true[tap], Tokens)}
        answer = _answer(target, true)

        def measured(made: Tensor) -> Scores:
            seen = target.record(made, recorded_taps)
            values: dict[Key, Any] = {}
            for tap in taps:
                values["cycle_cosine", (("cycle_tap", tap),)] = token_cosine(true[tap], seen[tap])
            if early:
                apart = [(_directions(seen[tap]) - unit).square().sum(-1).mean(1) for tap, unit in early.items()]
                values["perceptual"] = torch.stack(apart).mean(0)
            other = _answer(target, seen)
            if isinstance(answer, Predictions) and isinstance(other, Predictions):
                values["map50"] = match(answer, other)
            elif isinstance(answer, Tensor) and isinstance(other, Tensor):
                values["top1_agreement"] = (answer.argmax(1) == other.argmax(1)).float()
            return values

        return measured

    return prepared


def _last(target: Target) -> str:
    return target.tap_set("blocks")[-1]


def _answer(target: Target, recorded: Mapping[str, Any]) -> Tensor | Predictions | None:
    """The target's output, from its last tap; None where the model is neither classifier nor detector."""
    last = recorded[_last(target)]
    if isinstance(last, Predictions):
        return last
    if target.kind not in ("classifier", "detector"):
        return None
    return target.from_tap(_last(target), last)


def _directions(representation: Any) -> Tensor:
    """(B, N, C) tokens on the grid, of unit length."""
    return F.normalize(representation.patches, dim=-1)
