"""Cycle check: does the target, fed with a reconstruction, see what it saw in the image?

The reconstruction goes through the target once. Compared are the representations at each tap, its early features (a
perceptual distance), and its answer: the top-1 class, or the detections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.errors import BacksightError
from backsight.measures.pixels import feature_cosine
from backsight.measures.structure import Judged, Key, Measure, Values
from backsight.representation import Predictions, Tokens
from backsight.tables.pool import metrics_row
from backsight.targets import Target

CONFIDENT = 0.5  # score from which a detection on the image counts as something that the target has seen
OVERLAP = 0.5  # intersection over union from which two boxes are the same object
DETECTIONS = 32  # of an image, at most
RECALLS = np.linspace(0, 1, 101)  # COCO's
RESAMPLES = 200
EARLY = 3  # taps of the perceptual distance


@dataclass(frozen=True)
class Matches:
    """Detections on reconstructions held against those on the images.

    scores, classes, hits: (B, D) of each detection, hit = it is one of the image's; counted: (B, D) bool, False for
    places that hold no detection; truth: (B, K) number of objects of each class that were seen in the image.
    """

    scores: Tensor
    classes: Tensor
    hits: Tensor
    counted: Tensor
    truth: Tensor


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

    def prepared(judged: Judged) -> Callable[[Tensor], Values]:
        if missing := [tap for tap in recorded_taps if tap not in judged.recorded]:
            raise BacksightError(f"cycle() needs the recorded taps {', '.join(missing)}: record cycle_taps().")
        true = {tap: judged.recorded[tap] for tap in recorded_taps}
        early = {tap: _directions(true[tap]) for tap in early_taps(target) if isinstance(true[tap], Tokens)}
        answer = _answer(target, true)

        def measured(made: Tensor) -> Values:
            seen = target.record(made, recorded_taps)
            values: dict[Key, Any] = {}
            for tap in taps:
                values["cycle_cosine", (("cycle_tap", tap),)] = feature_cosine(true[tap], seen[tap])
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


# ------------------------------------------------------------------------------------------------------ detections


def detections(predictions: Predictions) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B, D), classes (B, D) and boxes (B, D, 4) x, y, x, y in [0, 1], the best first.

    With softmax a query names its likeliest class; with sigmoid each pair of query and class is a detection.
    """
    chances = predictions.objects
    if predictions.activation == "softmax":
        scores, classes = chances.max(-1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        classes, query = classes.gather(1, order), order
    else:
        scores, place = chances.flatten(1).topk(min(DETECTIONS, chances[0].numel()), dim=1)
        query, classes = place.div(chances.shape[2], rounding_mode="floor"), place % chances.shape[2]
    boxes = predictions.boxes.gather(1, query[..., None].expand(-1, -1, 4))
    corners = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)
    most = min(DETECTIONS, scores.shape[1])
    return scores[:, :most], classes[:, :most], corners[:, :most]


def match(image: Predictions, reconstruction: Predictions) -> Matches:
    """Which detections on the reconstruction find one on the image, each at most once, the best first (COCO)."""
    true_scores, true_classes, true_boxes = detections(image)
    scores, classes, boxes = detections(reconstruction)
    seen = true_scores >= CONFIDENT
    overlap = _overlap(boxes, true_boxes)
    same = classes[:, :, None] == true_classes[:, None]
    free = seen.clone()
    hits = torch.zeros_like(scores, dtype=torch.bool)
    each = torch.arange(len(scores))
    for place in range(scores.shape[1]):
        fit = overlap[:, place].masked_fill(~(same[:, place] & free), -1.0)
        best = fit.argmax(1)
        hit = fit[each, best] >= OVERLAP
        hits[:, place] = hit
        free[each, best] &= ~hit
    kinds = image.objects.shape[2]
    truth = F.one_hot(true_classes, kinds).mul(seen[..., None]).sum(1)
    return Matches(scores, classes, hits, torch.ones_like(hits), truth)


def _overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """(B, D, T) intersection over union of (B, D, 4) and (B, T, 4)."""
    low = torch.maximum(boxes[:, :, None, :2], others[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], others[:, None, :, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    area, other = ((each[..., 2:] - each[..., :2]).prod(-1) for each in (boxes, others))
    return both / (area[:, :, None] + other[:, None] - both).clamp(min=1e-9)


def average_precision(matches: Matches, weights: np.ndarray | None = None) -> np.ndarray:
    """(R,) mean over classes of COCO's interpolated average precision (101 recalls).

    weights: (R, B), how often each image counts in each of R resamples; default: every image once. Classes that no
    image shows in a resample are left out of its mean; NaN where there is no class at all.
    """
    counts = np.ones((1, len(matches.scores))) if weights is None else weights
    scores, classes, hits, counted = (
        each.numpy() for each in (matches.scores, matches.classes, matches.hits, matches.counted)
    )
    image = np.broadcast_to(np.arange(len(scores))[:, None], scores.shape)
    order = np.argsort(-scores[counted], kind="stable")
    image, classes, hits = image[counted][order], classes[counted][order], hits[counted][order]
    truth = matches.truth.numpy()
    precisions = np.full((len(counts), truth.shape[1]), np.nan)
    for kind in np.flatnonzero(truth.any(0)):
        chosen = classes == kind
        weight = counts[:, image[chosen]]
        found, all_found = (weight * hits[chosen]).cumsum(1), weight.cumsum(1)
        objects = counts @ truth[:, kind]
        there = objects > 0
        precisions[there, kind] = _interpolated(found[there], all_found[there], objects[there])
    some = ~np.isnan(precisions).all(1)
    means = np.full(len(counts), np.nan)
    means[some] = np.nanmean(precisions[some], axis=1)
    return means


def _interpolated(found: np.ndarray, all_found: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """(R,) mean precision over RECALLS from (R, D) running counts of hits and detections."""
    if not found.shape[1]:
        return np.zeros(len(found))
    precision = np.divide(found, all_found, out=np.zeros_like(found), where=all_found > 0)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    envelope = np.concatenate([envelope, np.zeros((len(found), 1))], 1)
    # the first detection at which each recall is reached; counts are whole numbers, so the rounding is exact
    needed = np.ceil(RECALLS * objects[:, None] - 1e-9)
    offset = np.arange(len(found))[:, None] * (found.max() + objects.max() + 2)
    places = np.searchsorted((found + offset).ravel(), (needed + offset).ravel(), side="left").reshape(needed.shape)
    places -= np.arange(len(found))[:, None] * found.shape[1]
    return np.take_along_axis(envelope, places.clip(0, found.shape[1]), axis=1).mean(1)


def pooled_precision(
    measure: str, by_seed: Mapping[int, Sequence[Matches]], seed: int, columns: Mapping[str, Any]
) -> dict[str, Any]:
    """One tidy row: AP50 over all images, mean over training seeds; both are resampled for its 95 % interval."""
    joined = [_joined(parts) for parts in by_seed.values()]
    images = len(joined[0].scores)
    value = float(np.mean([average_precision(each)[0] for each in joined]))
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(images, np.full(images, 1 / images), size=RESAMPLES).astype(float)
    every = np.stack([average_precision(each, weights) for each in joined])  # (S, R)
    drawn = generator.integers(len(joined), size=(len(joined), RESAMPLES))
    resampled = np.take_along_axis(every, drawn, axis=0).mean(0)
    low, high = (
        np.nanquantile(resampled, [0.025, 0.975]) if not np.isnan(resampled).all() else (float("nan"), float("nan"))
    )
    return metrics_row(measure, value, float(low), float(high), images, seed, seeds=len(joined), **columns)


def _joined(parts: Sequence[Matches]) -> Matches:
    names = ("scores", "classes", "hits", "counted", "truth")
    return Matches(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
