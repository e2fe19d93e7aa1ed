"""Does the target itself still get it right under other colours? Top-1 of classifiers, AP50 of detectors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.measures.agreement import Matches, class_precisions, find_objects
from backsight.representation import Predictions
from backsight.studies.recolour import JudgedObjects, Perturbation, Truth
from backsight.tables.pool import metrics_row, pooled_rows
from backsight.targets import Target

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
    precision-recall curve.
    """
    scores, classes = predictions.objects.cpu().max(-1)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    classes = classes.gather(1, order)
    centred = predictions.boxes.cpu().gather(1, order[..., None].expand(-1, -1, 4))
    boxes = torch.cat([centred[..., :2] - centred[..., 2:] / 2, centred[..., :2] + centred[..., 2:] / 2], -1)
    most = max(len(known.labels) for known in truth)
    labels, true_boxes = torch.full((len(truth), most), -1), torch.zeros(len(truth), most, 4, dtype=boxes.dtype)
    for image, known in enumerate(truth):
        labels[image, : len(known.labels)] = torch.as_tensor(number[known.labels])
        true_boxes[image, : len(known.labels)] = torch.as_tensor(known.boxes)
    hits = find_objects(classes, boxes, labels, true_boxes, labels >= 0)
    kinds = max(int(number.max()), int(classes.max())) + 1
    counts = torch.zeros(len(truth), kinds).scatter_add_(1, labels.clamp(min=0), (labels >= 0).float())
    found = class_precisions(Matches(scores, classes, hits, counts.long()), weights, whole_area=True)
    return {label: found[int(index)] for label, index in enumerate(number) if int(index) in found}
