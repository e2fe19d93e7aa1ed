"""Does the target itself still get it right under other colours? Top-1 of classifiers, AP50 of detectors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from backsight.errors import BacksightError
from backsight.representation import Predictions
from backsight.studies.recolour import JudgedObjects, Perturbation, Truth
from backsight.tables.pool import metrics_row, pooled_rows
from backsight.targets import Target

OVERLAP = 0.5  # intersection over union from which a box is found
RESAMPLES = 300


def answer_refusal(target: Target, objects: JudgedObjects) -> str:
    """Why the target's answers cannot be judged on these objects, in one sentence, or "" where they can."""
    if target.kind not in ("classifier", "detector") or target.classes is None:
        return f"{target.name} names no classes: its answers are not judged."
    if not objects.labelled:
        return f"{objects.name} has no labels: the answers of {target.name} are not judged."
    if unknown := [name for name in objects.classes if name not in target.classes]:
        return f"{target.name} does not know {unknown[0]} and other classes of {objects.name}: answers are not judged."
    return ""


def accuracy_rows(
    target: Target,
    objects: JudgedObjects,
    perturbations: Sequence[Perturbation],
    outputs: Sequence[Tensor | Predictions],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """top1 of the judged object (classifier) or AP50 of all objects (detector), for each perturbation and category.

    outputs: of each perturbation, for all images. A target has no training seed here: `seeds` is 1 and the intervals
    are over images. AP50 is the mean over the category's classes; under white surroundings the judged object is the
    only one. Columns tap, depth and inverse stay empty.
    """
    if refusal := answer_refusal(target, objects):
        raise BacksightError(refusal)
    assert target.classes is not None
    number = np.array([target.classes.index(name) for name in objects.classes])
    rows: list[dict[str, Any]] = []
    about = {"target": target.name, "weights": target.weights, "dataset": objects.name, "split": objects.split}
    for perturbation, output in zip(perturbations, outputs, strict=True):
        common = about | perturbation.columns
        if isinstance(output, Tensor):
            hits = (output.argmax(1).cpu().numpy() == number[objects.labels]).astype(float)
            for category, members in objects.categories.items():
                rows += pooled_rows(hits[members], "top1", seed, category=category, **common)
            continue
        alone = perturbation.kind == "white_surroundings"
        truth = [Truth(t.labels[:1], t.boxes[:1]) if alone else t for t in objects.truth]
        rows += [row | common | {"seeds": 1} for row in _precision_rows(output, truth, number, objects, seed)]
    return rows


def _precision_rows(
    output: Predictions, truth: Sequence[Truth], number: np.ndarray, objects: JudgedObjects, seed: int
) -> list[dict[str, Any]]:
    """Rows of AP50 for each category, from one set of resampled images."""
    generator = np.random.default_rng(seed)
    count = len(truth)
    drawn = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    weights = np.vstack([np.ones(count), drawn])
    owns = {int(label): bool(own) for label, own in zip(objects.labels, objects.canonical, strict=True)}
    every = average_precisions(output, truth, number, weights)
    rows = []
    for category in objects.categories:
        chosen = [label for label, own in owns.items() if own == (category == "canonical") and label in every]
        if not chosen:
            continue
        mean = np.nanmean(np.stack([every[label] for label in chosen]), axis=0)
        low, high = np.nanquantile(mean[1:], [0.025, 0.975])
        rows.append(metrics_row("ap50", float(mean[0]), float(low), float(high), count, seed, category=category))
    return rows


def average_precisions(
    predictions: Predictions, truth: Sequence[Truth], number: np.ndarray, weights: np.ndarray
) -> dict[int, np.ndarray]:
    """{class: AP50 (R,)} of every class that the truth holds, for R weightings of the images.

    predictions: one detection a query, its likeliest class; number: (K,) the target's index of each class of the
    truth; weights: (R, N), how often each image counts. The average precision is the area under the interpolated
    precision-recall curve. Source: Everingham et al., The PASCAL VOC challenge: a retrospective, 2015.
    """
    scores, classes = (each.cpu().numpy() for each in predictions.objects.max(-1))
    centre, size = predictions.boxes.cpu().numpy()[..., :2], predictions.boxes.cpu().numpy()[..., 2:]
    boxes = np.concatenate([centre - size / 2, centre + size / 2], -1)
    order = np.argsort(-scores, axis=1, kind="stable")
    hits = np.zeros(scores.shape, bool)
    for image, known in enumerate(truth):
        overlaps = _overlaps(boxes[image], known.boxes)
        free = np.ones(len(known.labels), bool)
        for query in order[image]:
            fits = np.where(free & (number[known.labels] == classes[image, query]), overlaps[query], 0.0)
            if len(fits) and fits.max() >= OVERLAP:
                hits[image, query] = True
                free[fits.argmax()] = False
    held = [np.bincount(known.labels, minlength=len(number)) for known in truth]
    positives = weights @ np.stack(held)  # (R, K)
    found: dict[int, np.ndarray] = {}
    for label in np.flatnonzero(np.stack(held).sum(0)):
        of_image, of_query = np.nonzero(classes == number[label])
        ranked = np.argsort(-scores[of_image, of_query], kind="stable")
        hit = hits[of_image, of_query][ranked]
        counted = weights[:, of_image[ranked]]
        right, all_found = np.cumsum(counted * hit, 1), np.cumsum(counted, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = np.where(all_found > 0, right / all_found, 0)
            recall_steps = counted * hit / positives[:, [label]]
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        found[int(label)] = np.where(positives[:, label] > 0, (recall_steps * envelope).sum(1), np.nan)
    return found


def _overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(Q, M) intersection over union of boxes (Q, 4) and (M, 4), xyxy."""
    corner = np.maximum(first[:, None, :2], second[None, :, :2])
    opposite = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = (opposite - corner).clip(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(-1) for boxes in (first, second)]
    return common / np.maximum(areas[0][:, None] + areas[1][None] - common, 1e-12)
