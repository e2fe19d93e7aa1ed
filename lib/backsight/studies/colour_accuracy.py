"""Does the target itself still get it right under other colours? Top-1 of classifiers, AP50 of detectors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.measures.agreement import Matches, class_precisions, find_objects
from backsight.representation import Predictions
from backsight.studies.recolour import JudgedObjects, Perturbation, Truth
from backsight.tables.pooling import influence
from backsight.tables.values import Values
from backsight.targets import Target


def answer_refusal(target: Target, objects: JudgedObjects) -> str:
    """Why the target's answers cannot be judged on these objects, in one sentence, or "" where they can."""
    if target.kind not in ("classifier", "detector") or target.classes is None:
        return f"{target.name} names no classes: its answers are not judged."
    if not objects.labelled:
        return f"{objects.name} has no labels: the answers of {target.name} are not judged."
    if unknown := [name for name in objects.classes if name not in target.classes]:
        return f"{target.name} does not know {unknown[0]} and other classes of {objects.name}: answers are not judged."
    return ""


def accuracy_values(
    target: Target,
    objects: JudgedObjects,
    perturbations: Sequence[Perturbation],
    outputs: Sequence[Tensor | Predictions],
) -> pd.DataFrame:
    """top1 of the judged object (classifier) or AP50 of all objects (detector), for each perturbation and category.

    outputs: of each perturbation, for all images. AP50 is the mean over the category's classes; under white
    surroundings the judged object is the only one. Columns tap, depth and inverse stay empty.
    """
    if refusal := answer_refusal(target, objects):
        raise BacksightError(refusal)
    assert target.classes is not None
    number = np.array([target.classes.index(name) for name in objects.classes])
    values = Values(target, objects.name, objects.split, range(len(objects)))
    for perturbation, output in zip(perturbations, outputs, strict=True):
        alone = perturbation.kind == "white_surroundings"
        truth = [Truth(t.labels[:1], t.boxes[:1]) if alone else t for t in objects.truth]
        for category, members in objects.categories.items():
            given: dict[str, Any] = {"category": category, **perturbation.columns}
            if isinstance(output, Tensor):
                hits = (output.argmax(1).cpu().numpy() == number[objects.labels]).astype(float)
                values.add("top1", np.where(members, hits, np.nan), **given)
                continue
            chosen = set(objects.labels[members])

            def precision(weights: np.ndarray) -> np.ndarray:
                by_class = average_precisions(output, truth, number, weights)  # noqa: B023
                return np.nanmean(np.stack([p for label, p in by_class.items() if label in chosen]), axis=0)  # noqa: B023

            values.add("ap50", influence(precision, len(objects)), **given)
    return values.table()


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
