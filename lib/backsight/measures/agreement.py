"""Detections held against objects: which are found, and average precision over any weighting of the images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from backsight.representation import Predictions

CONFIDENT = 0.5  # score from which a detection on the image counts as something that the target has seen
OVERLAP = 0.5  # intersection over union from which two boxes are the same object
DETECTIONS = 32  # of an image, at most
RECALLS = np.linspace(0, 1, 101)  # COCO's


@dataclass(frozen=True)
class Matches:
    """Detections and which of them find an object.

    scores, classes, hits: (B, D) of each detection, hit = it is one of the image's objects; truth: (B, K) number of
    objects of each class in the image.
    """

    scores: Tensor
    classes: Tensor
    hits: Tensor
    truth: Tensor


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
    """Which detections on the reconstruction find one on the image that has a score of CONFIDENT or more."""
    scores, classes, boxes = detections(image)
    return match_objects(reconstruction, classes.masked_fill(scores < CONFIDENT, -1), boxes)


def match_objects(predictions: Predictions, labels: Tensor, boxes: Tensor) -> Matches:
    """Which detections find an object. labels: (B, T) of the objects, -1 for none; boxes: (B, T, 4) x, y, x, y."""
    scores, classes, corners = (values.cpu() for values in detections(predictions))
    labels, boxes = labels.cpu(), boxes.cpu().to(corners)
    hits = find_objects(classes, corners, labels, boxes, labels >= 0)
    truth = F.one_hot(labels.clamp(min=0), predictions.objects.shape[2]).mul((labels >= 0)[..., None]).sum(1)
    return Matches(scores, classes, hits, truth)


def find_objects(classes: Tensor, boxes: Tensor, true_classes: Tensor, true_boxes: Tensor, known: Tensor) -> Tensor:
    """(B, D) bool: whether a detection, the best first, finds an object that none before it has found (COCO).

    classes (B, D), boxes (B, D, 4) of detections; true_classes (B, T), true_boxes (B, T, 4), known (B, T) bool of
    objects; boxes are x, y, x, y. The object is of the same class, overlaps by OVERLAP or more, and most of all.
    """
    overlap = box_iou(boxes, true_boxes)
    same = classes[:, :, None] == true_classes[:, None]
    free = known.clone()
    hits = torch.zeros(classes.shape, dtype=torch.bool)
    rows = torch.arange(len(classes))
    for place in range(classes.shape[1]) if true_classes.shape[1] else ():
        fit = overlap[:, place].masked_fill(~(same[:, place] & free), -1.0)
        best = fit.argmax(1)
        hits[:, place] = hit = fit[rows, best] >= OVERLAP
        free[rows, best] &= ~hit
    return hits


def average_precision(matches: Matches, weights: np.ndarray | None = None) -> np.ndarray:
    """(R,) mean over classes of COCO's average precision; NaN where there is no class at all.

    weights: (R, B), how often each image counts in each of R resamples; default: every image once. Classes that no
    image shows in a resample are left out of its mean.
    """
    weights = np.ones((1, len(matches.scores))) if weights is None else weights
    by_class = list(class_precisions(matches, weights).values())
    precisions = np.stack(by_class) if by_class else np.full((1, len(weights)), np.nan)
    some = ~np.isnan(precisions).all(0)
    means = np.full(len(weights), np.nan)
    means[some] = np.nanmean(precisions[:, some], axis=0)
    return means


def class_precisions(matches: Matches, weights: np.ndarray) -> dict[int, np.ndarray]:
    """{class: (R,) average precision, at COCO's 101 recalls} of every class that the truth holds; NaN where a resample
    shows no object. weights: as of `average_precision`."""
    scores, classes, hits, truth = (
        values.numpy() for values in (matches.scores, matches.classes, matches.hits, matches.truth)
    )
    image = np.broadcast_to(np.arange(len(scores))[:, None], scores.shape)
    precisions = {}
    for kind in np.flatnonzero(truth.any(0)):
        chosen = classes == kind
        ranked = np.argsort(-scores[chosen], kind="stable")
        places, objects = np.flatnonzero(hits[chosen][ranked]), weights @ truth[:, kind]  # only hits change the curve
        ranked = image[chosen][ranked[: places[-1] + 1 if len(places) else 0]]
        made, right = np.zeros((2, len(places), len(scores)))  # detections, and hits, of each image up to each hit
        np.add.at(made, (np.searchsorted(places, np.arange(len(ranked))), ranked), 1)
        np.add.at(right, (np.arange(len(places)), ranked[places]), 1)
        every, found = weights @ made.cumsum(0).T, weights @ right.cumsum(0).T
        precision = np.divide(found, every, out=np.zeros(found.shape), where=every > 0)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        some = objects > 0
        values = np.full(len(weights), np.nan)
        values[some] = _at_recalls(envelope[some], found[some], objects[some])
        precisions[int(kind)] = values
    return precisions


def _at_recalls(envelope: np.ndarray, found: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """(R,) mean of the precisions (R, D) over RECALLS, from running counts of hits (R, D)."""
    if not found.shape[1]:
        return np.zeros(len(found))
    envelope = np.concatenate([envelope, np.zeros((len(found), 1))], 1)
    # the first detection at which each recall is reached; counts are whole numbers, so the rounding is exact
    needed = np.ceil(RECALLS * objects[:, None] - 1e-9)
    offset = np.arange(len(found))[:, None] * (found.max() + objects.max() + 2)
    places = np.searchsorted((found + offset).ravel(), (needed + offset).ravel(), side="left").reshape(needed.shape)
    places -= np.arange(len(found))[:, None] * found.shape[1]
    return np.take_along_axis(envelope, places.clip(0, found.shape[1]), axis=1).mean(1)
