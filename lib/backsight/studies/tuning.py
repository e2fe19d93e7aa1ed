"""A target and its inverses trained together, (1 − t) · task + t · reconstruction, and the images with their truth.

The caller's target is copied; of the copy every weight learns, in eval mode, so that neither dropout nor statistics
of a batch differ between the values of t.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Self, cast

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backsight.data.images import ImageSource, open_images
from backsight.errors import BacksightError
from backsight.inverses.linear import LinearInverse, fit_linear_pairs
from backsight.representation import Predictions, Representation
from backsight.scenes.dataset import drawn
from backsight.scenes.render import CLASS_NAMES, SceneOptions, render_many
from backsight.targets import PIXELS, Target
from backsight.targets.detection import PREDICTIONS
from backsight.targets.hooks import Place, recording
from backsight.training.loop import train
from backsight.training.muon import Group

UNIT_IMAGES = 256  # training images that give the two losses at the start, their units
WARMUP = 0.1  # share of the steps


# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class LabelledImages:
    """Images with what the task asks of them.

    images: (N, 3, H, W) uint8; labels: (N, M) int64, the target's classes, the largest object first, -1 = none;
    boxes: (N, M, 4) centre x, centre y, width, height in [0, 1]; objects: (N, H, W) bool, the largest object, or None.
    name, split: of the data set.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor
    objects: Tensor | None
    name: str
    split: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labelled(self) -> bool:
        """Whether the task can be scored on them."""
        return bool((self.labels[:, 0] >= 0).all())


def labelled_images(
    source: str, split: str, target: Target, count: int, seed: int = 0, rule: str = "mixed", required: bool = True
) -> LabelledImages:
    """Images of one split with the truth of the target's task.

    source: "scenes" (rule: how objects are coloured), a COCO root with the target's classes, or class folders.
    required: refuse a source that does not tell the truth of the task; else its labels are -1.
    Raises BacksightError where there is no truth, or the classes are not the target's.
    """
    if source == "scenes":
        found = _scenes(split, count, seed, target, rule)
    else:
        found = _from_source(source, split, target, count, seed)
    if required and not found.labelled:
        raise BacksightError(
            f"{source} does not say which classes of {target.name} its images show: a trade-off with the task needs "
            "scenes, a COCO root or class folders."
        )
    return found


def _scenes(split: str, count: int, seed: int, target: Target, rule: str) -> LabelledImages:
    side = max(target.image_size)
    classes = torch.tensor([*_class_numbers(CLASS_NAMES, target), -1])
    images = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    labels = torch.full((count, 4), -1)
    boxes = torch.zeros(count, 4, 4)
    objects = torch.zeros(count, side, side, dtype=torch.bool)
    options = SceneOptions(rule=rule)  # type: ignore[arg-type]
    for number, scene in enumerate(render_many(split, count, seed, side, options)):
        images[number] = torch.from_numpy(scene.image).permute(2, 0, 1)
        labels[number, : len(scene.labels)] = torch.from_numpy(scene.labels)
        boxes[number, : len(scene.boxes)] = _centred(torch.from_numpy(scene.boxes).float() / side)
        objects[number] = torch.from_numpy(scene.masks[0])
    return LabelledImages(images, classes[labels], boxes, objects, "scenes", split)


def _from_source(source: str, split: str, target: Target, count: int, seed: int) -> LabelledImages:
    try:
        images = open_images(source, split, target, count, seed, masks=True)
    except BacksightError:  # no COCO root: class folders, or photographs without any truth
        images = open_images(source, split, target, count, seed)
    items = list(images)
    classes = _numbers_of(images, target)
    height, width = target.image_size
    most = max([1, *(len(item.get("labels", ())) for item in items)])
    labels, boxes = torch.full((len(items), most), -1), torch.zeros(len(items), most, 4)
    objects = torch.zeros(len(items), height, width, dtype=torch.bool)
    for number, item in enumerate(items):
        if "label" in item and classes:
            labels[number, 0] = classes[item["label"]]
        if "labels" in item and len(item["labels"]):
            order = torch.as_tensor(item["masks"]).flatten(1).sum(1).argsort(descending=True)
            corners = torch.as_tensor(item["boxes"]).float()[order] / torch.tensor([width, height] * 2)
            sides = corners[:, 2:] - corners[:, :2]
            boxes[number, : len(order)] = _centred(torch.cat([corners[:, :2], sides], 1))
            if classes:
                labels[number, : len(order)] = torch.tensor(classes)[torch.as_tensor(item["labels"])[order]]
            objects[number] = torch.as_tensor(item["masks"])[order[0]]
    stacked = torch.stack([item["image"] for item in items])
    return LabelledImages(stacked, labels, boxes, objects if objects.any() else None, images.name, images.split)


def _numbers_of(images: ImageSource, target: Target) -> list[int]:
    """The target's class for each class of a source; [] where neither names nor number agree."""
    known = target.classes
    if known is None or (len(images.classes) == len(known) and not set(images.classes) & set(known)):
        return list(range(len(images.classes)))  # class folders in the order of the target's classes, as ImageNet's
    try:
        return _class_numbers(images.classes, target)
    except BacksightError:
        return []


def _class_numbers(names: Sequence[str], target: Target) -> list[int]:
    known = {name: number for number, name in enumerate(target.classes or ())}
    if missing := [name for name in names if name not in known]:
        raise BacksightError(
            f"{target.name} does not know {len(missing)} of the classes, such as {missing[0]!r}: choose a target that "
            "was trained on them."
        )
    return [known[name] for name in names]


def _centred(boxes: Tensor) -> Tensor:
    """Left, top, width, height -> centre x, centre y, width, height."""
    return torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], 1)


# ----------------------------------------------------------------------------------------------------------- losses


def task_loss(output: Tensor | Predictions, labels: Tensor, boxes: Tensor) -> Tensor:
    """The task's own loss, a scalar: cross-entropy on the largest object's class, or the loss of a set of boxes.

    output: logits (B, K), or Predictions; labels: (B, M), -1 = none; boxes: (B, M, 4) centre x, y, width, height.
    A detector's loss is that of transformers: DETR's (Carion et al. 2020) for a softmax over classes, Deformable
    DETR's focal loss (Zhu et al. 2021) for sigmoids; the coefficients are the published ones.
    """
    if isinstance(output, Tensor):
        return F.cross_entropy(output, labels[:, 0])
    from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    softmax = output.activation == "softmax"
    costs = {"class_cost": 1 if softmax else 2, "bbox_cost": 5, "giou_cost": 2}
    weights = {"bbox_loss_coefficient": 5, "giou_loss_coefficient": 2, "eos_coefficient": 0.1, "focal_alpha": 0.25}
    classes = output.logits.shape[2] - softmax
    settings = SimpleNamespace(num_labels=classes, auxiliary_loss=False, **costs, **weights)
    truth = [
        {"class_labels": label[label >= 0], "boxes": box[label >= 0]} for label, box in zip(labels, boxes, strict=True)
    ]
    loss = ForObjectDetectionLoss if softmax else DeformableDetrForObjectDetectionLoss
    return loss(output.logits, truth, output.logits.device, output.boxes, settings)[0]


def reconstruction_loss(
    images: Tensor, recorded: Mapping[str, Representation], inverses: Mapping[str, LinearInverse], variance: float
) -> Tensor:
    """Mean over taps of mean squared error / variance of the training images about their mean image: 1 - R²."""
    errors = [(images - cast(Tensor, inverse.raw(recorded[tap]))).square().mean() for tap, inverse in inverses.items()]
    return torch.stack(errors).mean() / variance


@dataclass(frozen=True)
class Units:
    """Both losses at the start, by which they are divided; variance: of the training images about their mean."""

    task: float
    reconstruction: float
    variance: float


@torch.no_grad()
def starting_units(target: Target, inverses: Mapping[str, LinearInverse], data: LabelledImages) -> Units:
    """The losses of the untouched target and its closed-form inverses on the first UNIT_IMAGES of `data`."""
    count = min(len(data), UNIT_IMAGES)
    variance = float((data.images[:count].float() / 255).var(0, unbiased=False).mean())
    totals = [0.0, 0.0]
    for chosen in pieces(count, 64):
        images, labels, boxes = (each.to(target.device) for each in batch_of(data, chosen))
        recorded, output = answer_of(target, images, list(inverses))
        losses = task_loss(output, labels, boxes), reconstruction_loss(images, recorded, inverses, variance)
        totals = [total + float(loss) * len(images) / count for total, loss in zip(totals, losses, strict=True)]
    return Units(max(totals[0], 1e-6), max(totals[1], 1e-6), variance)


def batch_of(data: LabelledImages, chosen: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, H, W) in [0, 1], labels and boxes."""
    return data.images[chosen].float() / 255, data.labels[chosen], data.boxes[chosen]


def answer_of(
    target: Target, images: Tensor, taps: Sequence[str], gradient: bool = False
) -> tuple[dict[str, Representation], Any]:
    """What the taps hold, and the model's answer, of one forward pass."""
    if target.kind == "detector":
        recorded = target.record(images, list(dict.fromkeys([*taps, PREDICTIONS])), gradient=gradient)
        return recorded, recorded[PREDICTIONS]
    with recording(target.model, {"answer": Place("")}) as seen:
        recorded = target.record(images, list(taps), gradient=gradient)
    return recorded, seen["answer"]


# ------------------------------------------------------------------------------------------------------ fine-tuning


@dataclass(frozen=True)
class Tuned:
    """target: the tuned copy, frozen again; inverses: {tap: the linear inverse that was trained along};
    history: step, task, reconstruction (each divided by its value at the start; NaN where it was not computed)."""

    target: Target
    inverses: dict[str, LinearInverse]
    history: pd.DataFrame


def fine_tune(
    target: Target,
    inverses: Mapping[str, LinearInverse],
    data: LabelledImages,
    t: float,
    *,
    steps: int = 60,
    batch_size: int = 32,
    learning_rate: float = 3e-4,
    seed: int = 0,
    units: Units | None = None,
) -> Tuned:
    """Train a copy of the target, and of its inverses, on (1 - t) · task + t · reconstruction.

    inverses: {tap: linear inverse to pixels}, where the joint training starts; units: both losses at the start
    (computed here where not given); seed: order of the batches. Adam without weight decay, so that a weight that no
    loss reaches (the head at t = 1, the inverses at t = 0) stays as it was; 10 % warm-up, then a cosine. The same seed
    gives the same batches for every t. The target and the inverses that are given stay as they are.
    Raises BacksightError for a t outside [0, 1], a target without a task, and a loss that is no longer a number.
    """
    _check(target, inverses, data, t, steps, batch_size)
    units = units or starting_units(target, inverses, data)
    tuned, along = copy.deepcopy(target), {tap: copy.deepcopy(inverse) for tap, inverse in inverses.items()}
    tuned.model.eval().requires_grad_(True)
    history: list[dict[str, float]] = []

    def losses(batch: tuple[Tensor, ...], step: int) -> Iterator[tuple[str, Tensor]]:
        images, labels, boxes = batch
        recorded, output = answer_of(tuned, images, list(along), gradient=True)
        parts: dict[str, Tensor] = {}
        if t < 1:
            parts["task"] = task_loss(output, labels, boxes) / units.task
        if t > 0:
            parts["reconstruction"] = (
                reconstruction_loss(images, recorded, along, units.variance) / units.reconstruction
            )
        history.append({"step": step, **{name: part.item() for name, part in parts.items()}})
        yield f"{target.name} at t = {t}", sum(share * parts[n] for n, share in weights.items() if n in parts)  # type: ignore[misc]

    def batch_at(step: int) -> tuple[Tensor, ...]:
        chosen = torch.from_numpy(drawn(len(data), batch_size, seed, step))
        return tuple(part.to(tuned.device) for part in batch_of(data, chosen))

    weights = {"task": 1 - t, "reconstruction": t}
    maps = [part for inverse in along.values() for part in inverse.maps.values()]
    numbers = [tensor.requires_grad_() for part in maps for tensor in (*part.factors, part.bias)]
    both = _Both(tuned.model, numbers)
    train(
        {f"{target.name} at t = {t}": both},
        losses,
        batch_at,
        steps=steps,
        learning_rate=learning_rate,
        warmup=WARMUP,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        gradient_norm=math.inf,
        group=lambda name, parameter: Group(False),
        seed=seed,
        progress=False,
    )
    for tensor in both.parameters():
        tensor.requires_grad_(False).grad = None
    tuned.__dict__.pop("weights_hash", None)  # of the weights it started from
    return Tuned(tuned, along, pd.DataFrame(history, columns=["step", "task", "reconstruction"]))


class _Both(nn.Module):
    """The target's model, in eval mode always, and the numbers of closed-form maps, which are buffers there."""

    def __init__(self, model: nn.Module, numbers: Sequence[Tensor]) -> None:
        super().__init__()
        self.model, self.numbers = model, numbers

    def named_parameters(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, Any]]:
        yield from super().named_parameters(*arguments, **options)
        yield from ((f"number {place}", number) for place, number in enumerate(self.numbers))

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


def check_grid(ts: Sequence[float]) -> list[float]:
    """The values of t, in order. Raises BacksightError on one outside [0, 1], on none, and on one given twice."""
    for t in ts:
        if not 0 <= t <= 1:
            raise BacksightError(f"t = {t} is outside [0, 1]: 0 trains for the task alone, 1 to be inverted alone.")
    if not ts or len(set(ts)) < len(ts):
        raise BacksightError(f"ts = {list(ts)}: give at least one value of t, and each of them once.")
    return sorted(float(t) for t in ts)


def _check(
    target: Target, inverses: Mapping[str, LinearInverse], data: LabelledImages, t: float, steps: int, batch_size: int
) -> None:
    check_grid([t])
    if target.kind not in ("classifier", "detector"):
        raise BacksightError(f"{target.name} has no task to trade for: choose a classifier or a detector.")
    if not inverses:
        raise BacksightError(f"There is no inverse of {target.name} to train along: give one of at least one tap.")
    if steps < 1 or not 1 <= batch_size <= len(data):
        raise BacksightError(
            f"steps = {steps} and batch_size = {batch_size} with {len(data)} images: give at least one step, and a "
            "batch of at least one and at most all images."
        )


def fit_inverses(
    target: Target, images: Tensor, taps: Sequence[str], set_inputs: int = 512, seed: int = 0
) -> dict[str, LinearInverse]:
    """{tap: linear inverse to pixels} in closed form; images: (N, 3, H, W) uint8 or float in [0, 1].

    set_inputs: most inputs of a map that reads a whole set of queries; a longer set is projected first.
    """
    pairs = [(tap, PIXELS) for tap in taps]
    fitted = fit_linear_pairs(target, images, pairs, seed=seed, progress=False, maximum_inputs=set_inputs)
    return {tap: inverse for (tap, _), inverse in fitted.items()}


def pieces(count: int, size: int) -> Iterator[slice]:
    """Slices of about `size`, none of a single image, which could not be shuffled with another."""
    number = max(1, count // size)
    edges = [round(count * place / number) for place in range(number + 1)]
    return (slice(low, high) for low, high in pairwise(edges))
