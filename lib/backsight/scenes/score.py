"""Scores of classifiers and detectors on `scenes`: top-1, and COCO's average precision."""

import contextlib
import io
import math
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from backsight.errors import BacksightError
from backsight.representation import Predictions, concatenate
from backsight.scenes.dataset import SIZE, SceneArrays, batch_of, scene_arrays
from backsight.scenes.render import CLASS_NAMES, CLASSES

DETECTIONS = 32  # of an image, at most: as many as two for each query of the shipped detectors


@torch.no_grad()
def evaluate(training: Any, data: SceneArrays, device: str = "cpu", batch: int = 250) -> dict[str, dict[str, float]]:
    """Scores of a model in training on a split: {"all": {measure: score}, class name: …}.

    The measures are top-1 for a classifier, AP50 and AP (COCO, 0.5:0.95) for a detector.
    """
    training.eval()
    outputs = [
        training.outputs(batch_of(data, np.arange(start, min(start + batch, len(data))), device).pixels)
        for start in range(0, len(data), batch)
    ]
    if isinstance(outputs[0], Tensor):
        return {"all": {"top1": float(_hits(outputs, data).mean())}}
    return average_precision(concatenate([each.to("cpu") for each in outputs]), data)


def _hits(logits: list[Tensor], data: SceneArrays) -> np.ndarray:
    """Which images' dominant object the largest logit names: (N,) bool."""
    return torch.cat(logits).argmax(1).cpu().numpy() == data.labels[:, 0]


def _detections(predictions: Predictions) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and classes (N, D), boxes (N, D, 4) as each family's post-processing gives them.

    With softmax a query names its likeliest class; with sigmoid each (query, class) is a detection, the best are kept.
    """
    chances = predictions.objects
    if predictions.activation == "softmax":
        scores, classes = chances.max(-1)
        return scores, classes, predictions.boxes
    scores, place = chances.flatten(1).topk(min(DETECTIONS, chances[0].numel()), dim=1)
    query = place.div(chances.shape[2], rounding_mode="floor")
    boxes = predictions.boxes.gather(1, query[..., None].expand(-1, -1, 4))
    return scores, place % chances.shape[2], boxes


def _corners(boxes: Tensor) -> Tensor:
    """Centre, width and height in [0, 1] to COCO's left, top, width and height in pixels."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., 2:]], -1) * SIZE


def average_precision(predictions: Predictions, data: SceneArrays) -> dict[str, dict[str, float]]:
    """COCO average precision of predicted sets: {"all": {"ap50", "ap"}, class name: …}. Source: pycocotools.COCOeval.

    predictions: of the images of `data`, in their order; their first K classes are those of `scenes`.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = [
        {
            "image_id": image,
            "category_id": int(label),
            "bbox": box.tolist(),
            "area": float(box[2:].prod()),
            "iscrowd": 0,
        }
        for image, labels in enumerate(data.labels)
        for label, box in zip(labels, _corners(torch.from_numpy(data.boxes[image])), strict=True)
        if label >= 0
    ]
    scores, classes, boxes = _detections(predictions)
    images = torch.arange(len(data))[:, None].expand_as(scores)
    found = torch.cat([images[..., None], _corners(boxes), scores[..., None], classes[..., None]], -1).flatten(0, 1)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(len(data))],
            "annotations": [{"id": number, **box} for number, box in enumerate(truth, 1)],
            "categories": [{"id": i, "name": n} for i, n in enumerate(CLASS_NAMES)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found.double().numpy()), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # (IoU thresholds, recall levels, classes)
    precision = np.where(precision < 0, np.nan, precision)
    per_class = {
        name: {"ap": float(np.nanmean(precision[:, :, i])), "ap50": float(np.nanmean(precision[0, :, i]))}
        for i, name in enumerate(CLASS_NAMES)
    }
    return {"all": {"ap50": float(evaluation.stats[1]), "ap": float(evaluation.stats[0])}, **per_class}


@torch.no_grad()
def score_target(target: Any, count: int = 5000, seed: int = 0, split: str = "test", batch: int = 250) -> Any:
    """Scores of a target on unseen photographs, with the canonical colours and with uniformly random object hues.

    target: a `scenes` classifier (top-1 of the dominant object) or detector (AP50, AP by COCO's rules).
    Returns a table: rule, measure, classes ("all", "canonical", "colour-free" or one class), value, low, high, n.
    Intervals of top-1 are Wilson's 95 %; those of AP come from the spread over ten disjoint blocks of images.
    Raises BacksightError when the target does not know the classes of `scenes`.
    """
    import pandas as pd

    if target.classes is None or tuple(target.classes)[: len(CLASSES)] != CLASS_NAMES:
        raise BacksightError(f"{target.name} does not know the classes of scenes: score it on its own data set")
    if count < 500:
        raise BacksightError(f"{count} images are too few for an interval: score on 500 or more")
    rows: list[dict[str, Any]] = []
    for rule in ("mixed", "uniform"):
        data = scene_arrays(split, count, seed, rule)
        outputs = []
        for start in range(0, count, batch):
            images = torch.from_numpy(data.images[start : start + batch]).permute(0, 3, 1, 2).float() / 255
            outputs.append(target(images))
        scored = _top1_rows(outputs, data) if target.kind == "classifier" else _precision_rows(outputs, data)
        rows += [{"rule": rule, **row} for row in scored]
    return pd.DataFrame(rows)


def _top1_rows(logits: list[Tensor], data: SceneArrays) -> list[dict[str, Any]]:
    hits = _hits(logits, data)
    names = np.array(CLASS_NAMES)[data.labels[:, 0]]
    rows = []
    for group, members in _class_groups().items():
        chosen = np.isin(names, members)
        low, high = binomtest(int(hits[chosen].sum()), int(chosen.sum())).proportion_ci(method="wilson")
        scores = {"value": float(hits[chosen].mean()), "low": low, "high": high, "n": int(chosen.sum())}
        rows.append({"measure": "top1", "classes": group, **scores})
    return rows


def _precision_rows(outputs: list[Predictions], data: SceneArrays) -> list[dict[str, Any]]:
    predictions, blocks = concatenate(outputs), 10
    everything = _grouped(average_precision(predictions, data))
    parts = []
    for start in range(blocks):
        chosen = np.arange(start, len(data), blocks)
        block = SceneArrays(data.images[chosen], data.objects[chosen], data.labels[chosen], data.boxes[chosen])
        parts.append(_grouped(average_precision(predictions.index(torch.from_numpy(chosen)), block)))
    rows = []
    for (measure, group), value in everything.items():
        spread = 1.96 * float(np.nanstd([part[measure, group] for part in parts], ddof=1)) / math.sqrt(blocks)
        interval = {"value": value, "low": value - spread, "high": value + spread, "n": len(data)}
        rows.append({"measure": measure, "classes": group, **interval})
    return rows


def _class_groups() -> dict[str, list[str]]:
    """{"all", "canonical": classes with a hue of their own, "colour-free": the others, and each class}."""
    canonical = [kind.name for kind in CLASSES if kind.hue is not None]
    free = [kind.name for kind in CLASSES if kind.hue is None]
    singles = {name: [name] for name in CLASS_NAMES}
    return {"all": [*CLASS_NAMES], "canonical": canonical, "colour-free": free, **singles}


def _grouped(scores: dict[str, dict[str, float]]) -> dict[tuple[str, str], float]:
    """{(measure, classes): score} for all classes, the canonical and the colour-free ones, and each class."""
    return {
        (measure, group): float(np.mean([scores[name][measure] for name in (["all"] if group == "all" else names)]))
        for measure in ("ap50", "ap")
        for group, names in _class_groups().items()
    }
