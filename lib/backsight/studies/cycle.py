"""Cycle check: does the target, fed with a reconstruction, see what it saw in the image?

The reconstruction goes through the target once. Compared are the representations at each tap, its early features (a
perceptual distance), and its answer: the top-1 class, or the detections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.measures.agreement import match
from backsight.measures.similarity import token_cosine
from backsight.measures.structure import Judged, Key, Measure, Scores
from backsight.representation import Predictions, Tokens
from backsight.targets import Target

EARLY = 3  # taps of the perceptual distance


def cycle(target: Target, taps: Sequence[str]) -> Measure:
    """Measure: `cycle_cosine` at each of `taps` (column cycle_tap), `perceptual`, and the agreement of the answers.

    perceptual: the distance of LPIPS (Zhang et al. 2018) without its learned weights, in the target's own features:
    at each of the first EARLY taps of its blocks, tokens on the grid are scaled to unit length, squared differences
    summed over channels and averaged over tokens; then the mean over the taps. 0 is equal; values of different targets
    do not compare. top1_agreement (classifiers): the share of images with the same likeliest class. map50 (detectors):
    AP at an IoU of 0.5, mean over classes, of the detections on the reconstruction, where the objects are the
    detections on the image of a score of CONFIDENT or more: `Matches`.
    """
    blocks = target.tap_set("blocks")
    recorded_taps = [tap for tap in target.available_taps if tap in {*taps, *blocks[:EARLY], blocks[-1]}]

    def seen(images: Tensor) -> tuple[dict[str, Any], list[Tensor], Tensor | Predictions | None]:
        """What is recorded, the directions of early tokens, and the answer, if classes or objects are named."""
        recorded = target.record(images, recorded_taps)
        early = [recorded[tap] for tap in blocks[:EARLY]]
        directions = [F.normalize(tokens.patches, dim=-1) for tokens in early if isinstance(tokens, Tokens)]
        answer: Any = recorded[blocks[-1]]
        if not isinstance(answer, Predictions):
            answer = target.from_tap(blocks[-1], answer) if target.answers else None
        return recorded, directions, answer

    def prepared(judged: Judged) -> Callable[[Tensor], Scores]:
        true, early, answer = seen(judged.images)

        def measured(reconstruction: Tensor) -> Scores:
            again, early_again, other = seen(reconstruction)
            values: dict[Key, Any] = {
                ("cycle_cosine", (("cycle_tap", tap),)): token_cosine(true[tap], again[tap]) for tap in taps
            }
            if early:
                pairs = zip(early_again, early, strict=True)
                values["perceptual"] = torch.stack([(a - b).square().sum(-1).mean(1) for a, b in pairs]).mean(0)
            if isinstance(answer, Predictions) and isinstance(other, Predictions):
                values["map50"] = match(answer, other)
            elif isinstance(answer, Tensor) and isinstance(other, Tensor):
                values["top1_agreement"] = (answer.argmax(1) == other.argmax(1)).float()
            return values

        return measured

    return prepared
