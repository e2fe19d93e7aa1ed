"""Cycle check: does the target, fed with a reconstruction, see what it saw in the image?

The reconstruction goes through the target once. Compared are the representations at each tap, its early features (a
perceptual distance), and its answer: the top-1 class, or the detections.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.representation import Predictions

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
