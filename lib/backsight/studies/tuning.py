"""A target and its inverses trained together, (1 − t) · task + t · reconstruction, and the images with their truth."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple, Self

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from backsight.data.images import open_images, unit_floats
from backsight.errors import BacksightError
from backsight.inverses.linear import LinearInverse, fit_linear_pairs
from backsight.representation import Predictions, Representation
from backsight.scenes.dataset import cached, drawn
from backsight.scenes.render import SceneOptions
from backsight.studies.objects import Objects, has_objects
from backsight.targets import PIXELS, Target
from backsight.targets.detection import PREDICTIONS
from backsight.targets.hooks import Place, recording
from backsight.training.loop import train
from backsight.training.muon import Group

UNIT_IMAGES = 256  # training images that give the two losses at the start, their units
WARMUP = 0.1  # share of the steps


def batch_of(data: Objects, chosen: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, H, W) in [0, 1], labels, and boxes as centre x, centre y, width, height."""
    boxes = box_convert(data.boxes[chosen], "xyxy", "cxcywh")
    return unit_floats(data.images[chosen]), data.labels[chosen], boxes


def labelled_images(
    source: str, split: str, target: Target, count: int, seed: int = 0, required: bool = True, random_hues: bool = False
) -> Objects:
    """Images of one split with the truth of the target's task: labels into its classes.

    source: "scenes", a COCO root with the target's classes (images without objects are left out), or class folders.
    required: refuse a source that does not tell the truth of the task; else its labels are -1. random_hues: of scenes,
    with hues that say nothing of the class.
    """
    masked, size = has_objects(source), target.image_size
    if random_hues:
        source = str(cached(split, count, seed, max(size), SceneOptions(rule="uniform")))
        images = open_images(source, "all", size, masks=True)
    else:
        images = open_images(source, split, target, count, seed, masks=masked)
    # Class folders are in the order of the target's classes where it has no names, or others, as ImageNet's.
    own, known = images.classes, target.classes or ()
    if (target.classes is None and not masked) or (len(own) == len(known) and not {*own} & {*known}):
        known = own
    numbers = torch.tensor([*(known.index(name) if {*own} <= {*known} else -1 for name in own), -1])  # -1: none
    objects = Objects.read(images, minimum_area=0.0 if masked else None)
    objects = replace(objects, labels=numbers[objects.labels])
    if required and not objects.labelled:
        raise BacksightError(
            f"{source} does not say which classes of {target.name} its images show: a trade-off with the task needs "
            "scenes, a COCO root or class folders, of classes that the target was trained on."
        )
    return objects


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
    loss = ForObjectDetectionLoss if softmax else DeformableDetrForObjectDetectionLoss
    costs = {"class_cost": 1 if softmax else 2, "bbox_cost": 5, "giou_cost": 2}
    weights = {"bbox_loss_coefficient": 5, "giou_loss_coefficient": 2, "eos_coefficient": 0.1, "focal_alpha": 0.25}
    settings = SimpleNamespace(num_labels=output.logits.shape[2] - softmax, auxiliary_loss=False, **costs, **weights)
    truth = [
        {"class_labels": label[label >= 0], "boxes": box[label >= 0]} for label, box in zip(labels, boxes, strict=True)
    ]
    return loss(output.logits, truth, output.logits.device, output.boxes, settings)[0]


def losses_of(
    target: Target,
    inverses: Mapping[str, LinearInverse],
    batch: Sequence[Tensor],
    variance: float,
    t: float = 0.5,
    gradient: bool = False,
) -> dict[str, Tensor]:
    """{"task" where t < 1, "reconstruction" where t > 0} of one batch: images, labels, boxes.

    The second is the mean over taps of mean squared error / variance of the training images, 1 - R².
    """
    images, labels, boxes = (part.to(target.device) for part in batch)
    recorded, output = answer_of(target, images, list(inverses), gradient)
    losses = {"task": task_loss(output, labels, boxes)} if t < 1 else {}
    if t > 0:
        errors = [(images - inverse.raw(recorded[tap])).square().mean() for tap, inverse in inverses.items()]
        losses["reconstruction"] = torch.stack(errors).mean() / variance
    return losses


@torch.no_grad()
def starting_units(target: Target, inverses: Mapping[str, LinearInverse], data: Objects) -> dict[str, float]:
    """{"task", "reconstruction"}: both losses of the untouched target and its closed-form inverses on the first
    UNIT_IMAGES, by which they are divided; "variance" of these images about their mean."""
    count = min(len(data), UNIT_IMAGES)
    variance = float((data.images[:count].float() / 255).var(0, unbiased=False).mean())
    totals = {"task": 0.0, "reconstruction": 0.0}
    for chosen in torch.arange(count).tensor_split(max(1, count // 64)):
        for name, loss in losses_of(target, inverses, batch_of(data, chosen), variance).items():
            totals[name] += float(loss) * len(chosen) / count
    return {name: max(total, 1e-6) for name, total in totals.items()} | {"variance": variance}


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


class Tuned(NamedTuple):
    """target: the tuned copy, frozen again; inverses: {tap: the linear inverse that was trained along};
    history: step, task, reconstruction (each divided by its value at the start; NaN where it was not computed)."""

    target: Target
    inverses: dict[str, LinearInverse]
    history: pd.DataFrame


def fine_tune(
    target: Target,
    inverses: Mapping[str, LinearInverse],
    data: Objects,
    t: float,
    *,
    steps: int = 60,
    batch_size: int = 32,
    learning_rate: float = 3e-4,
    seed: int = 0,
) -> Tuned:
    """Train a copy of the target, and of its inverses, on (1 - t) · task + t · reconstruction.

    inverses: {tap: linear inverse to pixels}, where the joint training starts; seed: order of the batches, the same for
    every t. Adam without weight decay, so that a weight that no loss reaches (the head at t = 1, the inverses at t = 0)
    stays as it was; 10 % warm-up, then a cosine. The target and the inverses that are given stay as they are.
    Raises BacksightError for a t outside [0, 1], a target without a task, and a loss that is no longer a number.
    """
    check_grid([t])
    if target.kind == "module" or not target.answers:
        raise BacksightError(f"{target.name} has no task to trade for: choose a classifier or a detector.")
    if steps < 1 or not 1 <= batch_size <= len(data):
        raise BacksightError(
            f"steps = {steps} and batch_size = {batch_size} with {len(data)} images: give at least one step, and a "
            "batch of at least one and at most all images."
        )
    units = starting_units(target, inverses, data)
    tuned, along = copy.deepcopy(target), {tap: copy.deepcopy(inverse) for tap, inverse in inverses.items()}
    tuned.model.requires_grad_(True)
    history: list[dict[str, float]] = []
    title, shares = f"{target.name} at t = {t}", {"task": 1 - t, "reconstruction": t}

    def losses(batch: tuple[Tensor, ...], step: int) -> Iterator[tuple[str, Tensor]]:
        losses = losses_of(tuned, along, batch, units["variance"], t, gradient=True)
        parts = {name: loss / units[name] for name, loss in losses.items()}
        history.append({"step": step, **{name: part.item() for name, part in parts.items()}})
        yield title, torch.stack([shares[name] * part for name, part in parts.items()]).sum()

    maps = [part for inverse in along.values() for part in inverse.maps.values()]
    both = _Both(tuned.model, [number.requires_grad_() for part in maps for number in (*part.factors, part.bias)])
    train(
        {title: both},
        losses,
        lambda step: batch_of(data, torch.from_numpy(drawn(len(data), batch_size, seed, step))),
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
    for number in both.parameters():
        number.requires_grad_(False).grad = None
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


def fit_inverses(
    target: Target, images: Tensor, taps: Sequence[str], set_inputs: int = 512, seed: int = 0
) -> dict[str, LinearInverse]:
    """{tap: linear inverse to pixels} in closed form; images: (N, 3, H, W) uint8 or float in [0, 1].

    set_inputs: most inputs of a map that reads a whole set of queries; a longer set is projected first.
    """
    pairs = [(tap, PIXELS) for tap in taps]
    fitted = fit_linear_pairs(target, images, pairs, seed=seed, progress=False, maximum_inputs=set_inputs)
    return {tap: inverse for (tap, _), inverse in fitted.items()}
