"""Scores of classifiers and detectors on `scenes`: top-1, and COCO's average precision."""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
from torch import Tensor
from torchvision.ops import box_convert

from backsight.errors import BacksightError
from backsight.measures.agreement import detections
from backsight.representation import Predictions, concatenate
from backsight.scenes.dataset import SIZE, SceneTensors, scene_tensors
from backsight.scenes.render import CLASS_NAMES, CLASSES

BATCH = 250
BLOCKS = 10  # of images, whose spread gives the intervals of AP
_CANONICAL = [kind.name for kind in CLASSES if kind.hue is not None]
_GROUPS = {
    "all": [*CLASS_NAMES],
    "canonical": _CANONICAL,
    "colour-free": [name for name in CLASS_NAMES if name not in _CANONICAL],
    **{name: [name] for name in CLASS_NAMES},
}
_scenes = lru_cache(maxsize=2)(scene_tensors)  # of both rules: one target after the other is scored on them


@torch.no_grad()
def evaluate(training: Any, data: SceneTensors) -> float:
    """The score of a model in training: top-1 of a classifier, AP50 of a detector."""
    training.eval()
    outputs = [training.outputs(pixels) for pixels in data.pixels.split(BATCH)]
    if isinstance(outputs[0], Tensor):
        return float(_hits(outputs, data).mean())
    return float(average_precision(concatenate(outputs), data)["ap50"]["all"])


def _hits(logits: list[Tensor], data: SceneTensors) -> np.ndarray:
    """Which images' dominant object the largest logit names: (N,) bool."""
    return (torch.cat(logits).argmax(1) == data.labels[:, 0]).numpy()


def average_precision(predictions: Predictions, data: SceneTensors) -> pd.DataFrame:
    """COCO's average precision of predicted sets: columns "ap50", "ap"; rows "all", "canonical", …, and each class.

    predictions: of the images of `data`, in their order; their first K classes are those of `scenes`.
    """
    from torchmetrics.detection import MeanAveragePrecision

    scores, classes, boxes = detections(predictions)
    parts = zip(boxes * SIZE, scores, classes, strict=True)
    found = [{"boxes": corners, "scores": score, "labels": label} for corners, score, label in parts]
    true_boxes = box_convert(data.boxes, "cxcywh", "xyxy") * SIZE
    truth = [{"boxes": box[k >= 0], "labels": k[k >= 0]} for box, k in zip(true_boxes, data.labels, strict=True)]
    overlaps, recalls = (np.linspace(*span).tolist() for span in ((0.5, 0.95, 10), (0, 1, 101)))  # its own: float32
    metric = MeanAveragePrecision("xyxy", "bbox", overlaps, recalls, extended_summary=True)
    metric.update(found, truth)
    result = metric.compute()
    precision = result["precision"][..., 0, -1].double().numpy()  # (overlaps, recalls, classes seen)
    means = {"ap50": precision[0].mean(0), "ap": precision.mean((0, 1))}  # -1 where the truth lacks a class
    by_class = pd.DataFrame(means, [CLASS_NAMES[k] for k in result["classes"].reshape(-1).tolist()])
    by_class = by_class.where(by_class >= 0)
    return pd.DataFrame({group: by_class.reindex(names).mean() for group, names in _GROUPS.items()}).T


@torch.no_grad()
def score_target(target: Any, count: int = 5000, seed: int = 0) -> pd.DataFrame:
    """Scores of a target on test scenes, with the canonical colours and with uniformly random object hues.

    target: a `scenes` classifier (top-1 of the dominant object) or detector (AP50, AP by COCO's rules).
    Returns a table: rule, measure, classes ("all", "canonical", "colour-free" or one class), value, low, high, n.
    Intervals of top-1 are Wilson's 95 %; those of AP come from the spread over ten disjoint blocks of images.
    Raises BacksightError when the target does not know the classes of `scenes`.
    """
    if target.classes is None or tuple(target.classes)[: len(CLASSES)] != CLASS_NAMES:
        raise BacksightError(f"{target.name} does not know the classes of scenes: score it on its own data set")
    if count < 500:
        raise BacksightError(f"{count} images are too few for an interval: score on 500 or more")
    tables = []
    for rule in ("mixed", "uniform"):
        data = _scenes("test", count, seed, rule)
        outputs = [target(images.float() / 255) for images in data.images.split(BATCH)]
        scores = _top1(outputs, data) if target.kind == "classifier" else _precision(outputs, data)
        tables.append(scores.assign(rule=rule))
    return pd.concat(tables, ignore_index=True)[["rule", "measure", "classes", "value", "low", "high", "n"]]


def _top1(logits: list[Tensor], data: SceneTensors) -> pd.DataFrame:
    hits = pd.Series(_hits([part.cpu() for part in logits], data), np.array(CLASS_NAMES)[data.labels[:, 0]])
    rows = []
    for group, names in _GROUPS.items():
        own = hits[hits.index.isin(names)]
        low, high = binomtest(int(own.sum()), len(own)).proportion_ci(method="wilson")
        rows.append({"classes": group, "value": own.mean(), "low": low, "high": high, "n": len(own)})
    return pd.DataFrame(rows).assign(measure="top1")


def _precision(outputs: list[Predictions], data: SceneTensors) -> pd.DataFrame:
    predictions = concatenate(outputs).to("cpu")
    places = [torch.arange(start, len(data), BLOCKS) for start in range(BLOCKS)]
    blocks = [average_precision(predictions.index(chosen), data.take(chosen)).T.stack() for chosen in places]
    half = 1.96 / math.sqrt(BLOCKS) * pd.concat(blocks, axis=1).std(axis=1)
    value = average_precision(predictions, data).T.stack()
    table = pd.DataFrame({"value": value, "low": value - half, "high": value + half, "n": len(data)})
    return table.rename_axis(["measure", "classes"]).reset_index()
