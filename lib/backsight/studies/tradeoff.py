"""What it costs a model to be invertible: target and inverses trained together, task against reconstruction.

    images ──► target ──► tap 1 … tap n ──► answer ──► task loss          / its value at the start
                            │        │
                     linear inverses, trained along ──► images' ──► reconstruction loss / its value at the start

    loss = (1 − t) · task + t · reconstruction

The caller's target is copied; of the copy every weight learns, in eval mode, so that neither dropout nor statistics
of a batch differ between the values of t. What the tuned target keeps is then judged by linear inverses fitted anew.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from backsight.data.images import ImageSource, open_images
from backsight.errors import BacksightError
from backsight.inverses.families import Reconstruct
from backsight.inverses.linear import LinearInverse, fit_linear_pairs
from backsight.measures.hue import hue_error
from backsight.measures.pixels import psnr
from backsight.measures.similarity import TokenSample, cka_products, shuffled_rows, token_cosine
from backsight.representation import Predictions, Representation, concatenate
from backsight.scenes.dataset import drawn
from backsight.scenes.render import CLASS_NAMES, SceneOptions, render_many
from backsight.studies.by_seed import families_by_seed
from backsight.studies.colour_accuracy import average_precisions
from backsight.studies.nulls import null_mean, shuffled
from backsight.studies.recolour import Truth
from backsight.tables.names import FRESH, JOINT, OF_START, RANDOM_HUES, START, TASK_ONLY
from backsight.tables.pool import metrics_row, pooled_rows
from backsight.targets import PIXELS, Target
from backsight.targets.detection import PREDICTIONS
from backsight.targets.hooks import Place, recording
from backsight.training.loop import train
from backsight.training.muon import Group

TUNING_SEEDS, FITTING_SEEDS = 1000, 2000  # added to a training seed: scenes that trained neither target nor inverse
UNIT_IMAGES = 256  # training images that give the two losses at the start, their units
WARMUP = 0.1  # share of the steps
PROBE_STRENGTHS = tuple(10.0**exponent for exponent in range(-5, 3))
RESAMPLES = 300  # of the bootstraps of CKA and AP50
MINIBATCH = 10  # images whose tokens make one minibatch of the CKA
PICTURE_MEASURES = ("psnr", "psnr_objects", "hue_error")
# Measures whose change against the start, and against t = 0, is paired image by image.
PAIRED = (*PICTURE_MEASURES, "token_cosine", "cross_psnr", "top1", "probe_top1")


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
    errors = [(images - inverse.raw(recorded[tap])).square().mean() for tap, inverse in inverses.items()]
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
    for chosen in _pieces(count, 64):
        images, labels, boxes = (each.to(target.device) for each in _batch(data, chosen))
        recorded, output = _pass(target, images, list(inverses))
        losses = task_loss(output, labels, boxes), reconstruction_loss(images, recorded, inverses, variance)
        totals = [total + float(loss) * len(images) / count for total, loss in zip(totals, losses, strict=True)]
    return Units(max(totals[0], 1e-6), max(totals[1], 1e-6), variance)


def _batch(data: LabelledImages, chosen: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, H, W) in [0, 1], labels and boxes."""
    return data.images[chosen].float() / 255, data.labels[chosen], data.boxes[chosen]


def _pass(
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
        recorded, output = _pass(tuned, images, list(along), gradient=True)
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
        return tuple(part.to(tuned.device) for part in _batch(data, chosen))

    weights = {"task": 1 - t, "reconstruction": t}
    maps = [part for inverse in along.values() for part in inverse.maps.values()]
    numbers = [tensor.requires_grad_() for part in maps for tensor in (*part.factors, part.bias)]  # type: ignore[misc]
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
    target: Target,
    inverses: Mapping[str, LinearInverse],
    data: LabelledImages,
    t: float,
    steps: int,
    batch_size: int,
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


# -------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Key:
    """What a value is of; next_tap: the deeper of two neighbours."""

    measure: str
    tap: str = ""
    inverse: str = ""
    next_tap: str = ""


@dataclass(frozen=True)
class Reading:
    """What one model shows on the judged images.

    values: {key: (N,)}, NaN where an image has none; products: {key: (M, 2, 2)}, of which a CKA is made;
    answers: {measure: Predictions} of a detector; pictures: {inverse: {tap: (K, 3, H, W)}} of the first images.
    """

    values: dict[Key, Tensor]
    products: dict[Key, np.ndarray] = field(default_factory=dict)
    answers: dict[str, Predictions] = field(default_factory=dict)
    pictures: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@torch.no_grad()
def read_model(
    target: Target,
    judged: LabelledImages,
    inverses: Mapping[str, Mapping[str, Reconstruct]],
    start: Target | None = None,
    recoloured: LabelledImages | None = None,
    seed: int = 0,
    batch_size: int = 50,
    keep: int = 6,
) -> Reading:
    """What a target's taps and answers show on images that trained nothing.

    inverses: {name: {tap: reconstruction}}; the first also makes `null_shuffled` and the cross-application to the
    neighbour; start: the untouched target, to which representations are compared; recoloured: the same images with
    hues that say nothing of the class, on which only the answers are judged.
    """
    reference = next(iter(inverses))
    taps = list(inverses[reference])
    generator = torch.Generator().manual_seed(seed)
    sample = TokenSample(images=len(judged), seed=seed)
    collected: dict[Key, list[Tensor]] = {}
    pictures: dict[str, dict[str, list[Tensor]]] = {}
    answers: list[Any] = []

    def note(key: Key, values: Tensor) -> None:
        collected.setdefault(key, []).append(values.cpu())

    for chosen in _pieces(len(judged), batch_size):
        images = _batch(judged, chosen)[0]
        objects = None if judged.objects is None else judged.objects[chosen]
        recorded, answer = _pass(target, images, taps)
        answers.append(answer)
        before = {} if start is None else start.record(images, taps)
        sample.add({tap: recorded[tap] for tap in taps} | {f"{START} {tap}": each for tap, each in before.items()})
        for tap, following in zip(taps, [*taps[1:], ""], strict=True):
            representation: Any = recorded[tap]
            for name, each in inverses.items():
                if tap not in each:
                    continue
                made = each[tap](representation).cpu().clamp(0, 1)
                for measure, values in _picture_scores(images, made, objects).items():
                    note(Key(measure, tap, name), values)
                if chosen.start < keep:
                    pictures.setdefault(name, {}).setdefault(tap, []).append(made[: keep - chosen.start])
            other = inverses[reference][tap](shuffled(representation, generator)).cpu().clamp(0, 1)
            for measure, values in _picture_scores(images, other, objects).items():
                note(Key(measure, tap, "null_shuffled"), values)
            if tap in before:
                note(Key("cosine_to_start", tap), token_cosine(representation, before[tap]))
            if following and recorded[following].signature == representation.signature:
                note(Key("token_cosine", tap, "", following), token_cosine(representation, recorded[following]))
                crossed = inverses[reference][tap](recorded[following]).cpu().clamp(0, 1)
                note(Key("cross_psnr", tap, reference, following), psnr(images, crossed))
    scores = {key: torch.cat(parts) for key, parts in collected.items()}
    products = _products(sample, [key for key in scores if key.measure in ("cosine_to_start", "token_cosine")])
    predictions: dict[str, Predictions] = {}
    for images_of, ending in ((judged, ""), (recoloured, f"_{RANDOM_HUES}")):
        if images_of is None or not images_of.labelled:
            continue
        given: list[Any] = answers if images_of is judged else [target(each) for each in _pictures(images_of)]
        if isinstance(given[0], Predictions):
            predictions[f"ap50{ending}"] = concatenate([each.to("cpu") for each in given])
        else:
            scores |= _hits(torch.cat(given).cpu(), images_of, f"top1{ending}", seed)
    shown = {name: {tap: torch.cat(parts) for tap, parts in per.items()} for name, per in pictures.items()}
    return Reading(scores, products, predictions, shown)


def _pieces(count: int, size: int) -> Iterator[slice]:
    """Slices of about `size`, none of a single image, which could not be shuffled with another."""
    number = max(1, count // size)
    edges = [round(count * place / number) for place in range(number + 1)]
    return (slice(low, high) for low, high in pairwise(edges))


def _pictures(data: LabelledImages, size: int = 50) -> Iterator[Tensor]:
    return (_batch(data, chosen)[0] for chosen in _pieces(len(data), size))


def _picture_scores(images: Tensor, made: Tensor, objects: Tensor | None) -> dict[str, Tensor]:
    """{measure: (B,)}: psnr, and inside the largest object psnr_objects and hue_error (NaN where there is none)."""
    scores = {"psnr": psnr(images, made)}
    if objects is not None:
        filled = objects.flatten(1).any(1)
        parts = images[filled], made[filled], objects[filled]
        for measure, function in (("psnr_objects", psnr), ("hue_error", hue_error)):
            scores[measure] = torch.full((len(images),), math.nan)
            if filled.any():
                scores[measure][filled] = torch.as_tensor(function(*parts), dtype=torch.float32)
    return scores


def _hits(logits: Tensor, data: LabelledImages, measure: str, seed: int) -> dict[Key, Tensor]:
    """Whether the largest logit names the largest object's class, and whether another image's logits do."""
    guesses, truth = logits.argmax(1), data.labels[:, 0]
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))
    hits = (guesses == truth).float()
    return {Key(measure): hits, Key(measure, inverse="null_shuffled"): (guesses[order] == truth).float()}


def _products(sample: TokenSample, pairs: Sequence[Key]) -> dict[Key, np.ndarray]:
    """Products of CKA (M, 2, 2): of a tap with the start, and of two neighbours; with those of shuffled images."""
    tokens = sample.minibatches(MINIBATCH)
    found: dict[Key, np.ndarray] = {}
    for pair in pairs:
        to_start = pair.measure == "cosine_to_start"
        other = tokens[f"{START} {pair.tap}" if to_start else pair.next_tap]
        images = max(1, min(MINIBATCH, sample.images // 4))
        key = Key("cka_to_start" if to_start else "cka", pair.tap, "", pair.next_tap)
        found[key] = cka_products([tokens[pair.tap], other])
        null = cka_products([tokens[pair.tap], shuffled_rows(other, images)])
        found[replace(key, inverse="null_shuffled")] = null
    return found


@torch.no_grad()
def probe_hits(target: Target, tap: str, fitting: LabelledImages, judged: LabelledImages) -> Tensor:
    """(N,) whether a linear probe, fitted anew at a tap, names the class of the largest object.

    It reads the prefix tokens (if there are any), and mean and maximum over the other tokens; ridge regression on the
    classes, its strength chosen on every fifth fitting image. It tells a class that is lost from a head that no longer
    fits what it reads.
    """
    x, wanted = _pooled(target, tap, fitting), fitting.labels[:, 0]
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, judged_x = (x - mean) / deviation, (_pooled(target, tap, judged) - mean) / deviation
    y = F.one_hot(wanted).double()
    held_out = torch.arange(len(x)) % 5 == 4

    def guesses(rows: Tensor, strength: float, inputs: Tensor) -> Tensor:
        middle = y[rows].mean(0)
        ridge = strength * int(rows.sum()) * torch.eye(x.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(x[rows].T @ x[rows] + ridge, x[rows].T @ (y[rows] - middle))
        return (inputs @ weights + middle).argmax(1)

    shares = [
        float((guesses(~held_out, strength, x[held_out]) == wanted[held_out]).double().mean())
        for strength in PROBE_STRENGTHS
    ]
    best = PROBE_STRENGTHS[int(np.argmax(shares))]
    return (guesses(torch.ones_like(held_out), best, judged_x) == judged.labels[:, 0]).float()


def _pooled(target: Target, tap: str, data: LabelledImages) -> Tensor:
    """(N, features): prefix tokens, mean and maximum over the other tokens."""
    rows = []
    for images in _pictures(data, 100):
        representation = target.record(images, [tap])[tap]
        prefix, values = getattr(representation, "prefix", 0), representation.values
        tokens = values[:, prefix:]
        rows.append(torch.cat([values[:, :prefix].flatten(1), tokens.mean(1), tokens.amax(1)], 1).cpu())
    return torch.cat(rows).double()


# -------------------------------------------------------------------------------------------------------- the study


@dataclass(frozen=True)
class Tradeoff:
    """metrics: tidy rows; history: t, seed, step, task, reconstruction (each over its value at the start);
    images: (K, 3, H, W) the first judged; pictures: {"start" or "t = …": {tap: (K, 3, H, W)}} of the first seed."""

    metrics: pd.DataFrame
    history: pd.DataFrame
    images: Tensor
    pictures: dict[str, dict[str, Tensor]]


def measure_tradeoff(
    target: Target,
    ts: Sequence[float],
    seeds: Sequence[int] = (0, 1, 2),
    *,
    images: str = "scenes",
    trained_on: str = "scenes",
    inverses: str = "",
    n: int = 200,
    train_images: int = 2000,
    fit_images: int = 800,
    steps: int = 60,
    batch_size: int = 32,
    learning_rate: float = 3e-4,
    set_inputs: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> Tradeoff:
    """Fine-tune copies of the target for every t and training seed, and measure them on images that trained nothing.

    target: its selected taps are inverted, trained for and measured; ts: shares of the reconstruction loss; seeds: of
    the training images and their order, the same for every t; images: of the test split, to judge on; trained_on:
    training split with the truth of the task, for the tuning, the inverses and the probe; inverses: a folder of
    02_train_inverse runs, whose inverses of the untouched target then read the tuned ones too; n: judged images;
    train_images, fit_images: of a seed, to tune on and to fit inverses and probe on (other images); seed: of the
    judged images and the bootstrap. For the rest see `fine_tune` and `fit_inverses`.
    Raises BacksightError on settings that cannot be measured.
    """
    ts, taps = check_grid(ts), list(target.taps)
    if n < 20:
        raise BacksightError(f"n = {n} judged images are too few for an interval of a CKA: give 20 or more.")
    judged = labelled_images(images, "test", target, n, seed, required=False)
    recoloured = labelled_images(images, "test", target, n, seed, "uniform") if images == "scenes" else None
    others = families_by_seed(target, inverses, seeds, fit_images, trained_on) if inverses else {}
    readings: dict[float | None, dict[int, Reading]] = {label: {} for label in (None, *ts)}
    nulls: dict[int, Reading] = {}
    histories = []
    last = [tap for tap in taps if tap != PREDICTIONS][-1]
    bar = tqdm(total=len(seeds) * (len(ts) + 2), desc=f"trade-off of {target.name}", leave=False, disable=not progress)
    with bar:
        for each in seeds:
            tuning = labelled_images(trained_on, "train", target, train_images, TUNING_SEEDS + each)
            fitting = labelled_images(trained_on, "train", target, fit_images, FITTING_SEEDS + each)

            def read(
                model: Target,
                made: Mapping[str, Mapping[str, Reconstruct]],
                start: Target | None = None,
                fitting: LabelledImages = fitting,
            ) -> Reading:
                reading = read_model(model, judged, made, start, recoloured, seed)
                if judged.labelled:
                    hits = probe_hits(model, last, fitting, judged)
                    reading.values[Key("probe_top1", last, "probe")] = hits
                bar.update()
                return reading

            closed = fit_inverses(target, fitting.images, taps, set_inputs, each)
            trained = {name: family for name, family in others.get(each, {}).items() if name != FRESH}
            of_start = {f"{name}_of_start": family for name, family in trained.items()}
            units = starting_units(target, closed, tuning)
            readings[None][each] = read(target, {FRESH: closed, **of_start})
            mean = null_mean(fitting.images)
            readings[None][each].values.update(_mean_image(judged, mean, taps))
            random = target.untrained(each)
            nulls[each] = read(random, {"null_untrained": fit_inverses(random, fitting.images, taps, set_inputs, each)})
            for t in ts:
                tuned = fine_tune(
                    target,
                    closed,
                    tuning,
                    t,
                    steps=steps,
                    batch_size=batch_size,
                    learning_rate=learning_rate,
                    seed=each,
                    units=units,
                )
                fresh = fit_inverses(tuned.target, fitting.images, taps, set_inputs, each)
                readers: dict[str, Mapping[str, Reconstruct]] = {
                    FRESH: fresh,
                    JOINT: tuned.inverses,
                    OF_START: closed,
                    **of_start,
                }
                readings[t][each] = read(tuned.target, readers, target)
                histories.append(tuned.history.assign(t=t, seed=each))
    metrics = tidy_rows(target, readings, nulls, judged, recoloured, seed)
    first = {label: per_seed[seeds[0]].pictures[FRESH] for label, per_seed in readings.items()}
    pictures = {START if t is None else f"t = {t:g}": shown for t, shown in first.items()}
    kept = len(next(iter(pictures[START].values())))
    return Tradeoff(metrics, pd.concat(histories), judged.images[:kept].float() / 255, pictures)


def _mean_image(judged: LabelledImages, mean: Tensor, taps: Sequence[str]) -> dict[Key, Tensor]:
    """The scores of the mean training image, the same at every tap."""
    pictures = judged.images.float() / 255
    scores = _picture_scores(pictures, mean.expand_as(pictures).clamp(0, 1), judged.objects)
    return {Key(measure, tap, "null_mean"): values for measure, values in scores.items() for tap in taps}


def tidy_rows(
    target: Target,
    readings: Mapping[float | None, Mapping[int, Reading]],
    nulls: Mapping[int, Reading],
    judged: LabelledImages,
    recoloured: LabelledImages | None,
    seed: int = 0,
) -> pd.DataFrame:
    """One row for each value of t (None: the untouched target), measure, tap and inverse, pooled over seeds.

    Columns beside METRIC_COLUMNS: seeds, t (NaN: untouched, or untrained), tuned, next_tap, and `against`: of the
    measures <name>_change, what is subtracted: the untouched target ("start") or the one tuned for the task ("t = 0").
    """
    rows: list[dict[str, Any]] = []
    common = {"target": target.name, "weights": target.weights, "dataset": judged.name, "split": judged.split}

    def row_of(key: Key, t: float | None, against: str = "") -> dict[str, Any]:
        places = {"tap": key.tap or None, "depth": target.depth(key.tap) if key.tap else None}
        columns = {"t": math.nan if t is None else t, "tuned": t is not None, "next_tap": key.next_tap or None}
        return {**common, **places, "inverse": key.inverse or None, **columns, "against": against or None}

    truths = {"ap50": judged, f"ap50_{RANDOM_HUES}": recoloured}
    precisions = {t: _precisions(per_seed, truths, seed) for t, per_seed in readings.items()}
    for t, per_seed in readings.items():
        first = next(iter(per_seed.values()))
        references = {START: None} | ({TASK_ONLY: 0.0} if 0.0 in readings and t != 0 else {})
        references = {} if t is None else references
        for key in first.values:
            values = _table(per_seed, key)
            rows += pooled_rows(values, key.measure, seed, **row_of(key, t))
            for against, reference in references.items():
                if (
                    key.measure.removesuffix(f"_{RANDOM_HUES}") in PAIRED
                    and key in readings[reference][min(per_seed)].values
                ):
                    changes = values - _table(readings[reference], key)
                    rows += pooled_rows(changes, f"{key.measure}_change", seed, **row_of(key, t, against))
        for key in first.products:
            resampled = _resampled_cka(np.stack([each.products[key] for each in per_seed.values()]), seed)
            rows.append(_resampled_row(key.measure, resampled, len(judged), seed, len(per_seed), row_of(key, t)))
        for key, scores in precisions[t].items():
            row = row_of(key, t)
            rows.append(_resampled_row(key.measure, _over_seeds(scores, seed), len(judged), seed, len(per_seed), row))
            for against, reference in references.items():
                changes = _over_seeds(scores - precisions[reference][key], seed)
                row = row_of(key, t, against)
                rows.append(_resampled_row(f"{key.measure}_change", changes, len(judged), seed, len(per_seed), row))
    for key in next(iter(nulls.values())).values:
        if key.inverse in ("null_untrained", "probe"):
            renamed = replace(key, inverse="null_untrained")
            rows += pooled_rows(_table(nulls, key), key.measure, seed, **row_of(renamed, None))
    table = pd.DataFrame(rows)
    return table[~((table["measure"].str.endswith("_change")) & table["inverse"].astype(str).str.startswith("null_"))]


def _table(per_seed: Mapping[int, Reading], key: Key) -> np.ndarray:
    """(S, N) values of one key."""
    return np.stack([each.values[key].double().numpy() for each in per_seed.values()])


def _resampled_row(
    measure: str, resampled: np.ndarray, n: int, seed: int, seeds: int, columns: Mapping[str, Any]
) -> dict[str, Any]:
    """A tidy row of (1 + R,) values: of all images, and of each resample."""
    low, high = (math.nan, math.nan) if np.isnan(resampled[1:]).all() else np.nanquantile(resampled[1:], [0.025, 0.975])
    return metrics_row(measure, float(resampled[0]), float(low), float(high), n, seed, **columns) | {"seeds": seeds}


def _weights(count: int, seed: int) -> np.ndarray:
    """(1 + R, count) how often each unit counts: once, then as drawn in each resample."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return np.vstack([np.ones(count), drawn])


def _over_seeds(scores: np.ndarray, seed: int) -> np.ndarray:
    """(1 + R,) mean over training seeds of (S, 1 + R) scores; in each resample over seeds that are drawn too."""
    return (_weights(len(scores), seed + 1) * scores.T).sum(1) / len(scores)


def _resampled_cka(products: np.ndarray, seed: int) -> np.ndarray:
    """(1 + R,) CKA, mean over seeds, of products (S, M, 2, 2); minibatches and seeds are drawn in each resample."""
    totals = np.einsum("rm,smij->srij", _weights(products.shape[1], seed), products)
    scale = np.sqrt(np.clip(totals[..., 0, 0], 0, None) * np.clip(totals[..., 1, 1], 0, None))
    ckas = np.divide(totals[..., 0, 1], scale, out=np.zeros_like(scale), where=scale > 0)
    return _over_seeds(ckas, seed)


def _precisions(
    per_seed: Mapping[int, Reading], truths: Mapping[str, LabelledImages | None], seed: int
) -> dict[Key, np.ndarray]:
    """{key: (S, 1 + R)} AP50, mean over classes, on all images and on the images of each resample.

    With another image's boxes (`null_shuffled`) too.
    """
    found: dict[Key, list[np.ndarray]] = {}
    for reading in per_seed.values():
        for measure, predictions in reading.answers.items():
            data = truths[measure]
            assert data is not None
            weights, truth = _weights(len(data), seed), _truth(data)
            number = np.arange(predictions.objects.shape[2])
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
            for inverse, given in (("", predictions), ("null_shuffled", predictions.index(order))):
                classes = average_precisions(given, truth, number, weights)
                found.setdefault(Key(measure, inverse=inverse), []).append(np.nanmean(list(classes.values()), axis=0))
    return {key: np.stack(scores) for key, scores in found.items()}


def _truth(data: LabelledImages) -> list[Truth]:
    corners = torch.cat(
        [data.boxes[..., :2] - data.boxes[..., 2:] / 2, data.boxes[..., :2] + data.boxes[..., 2:] / 2], 2
    )
    return [
        Truth(labels[labels >= 0].numpy(), boxes[labels >= 0].numpy())
        for labels, boxes in zip(data.labels, corners, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------- the answers


def answers(metrics: pd.DataFrame) -> pd.DataFrame:
    """What each t changed against tuning for the task alone (t = 0; where that is not there, against the start).

    One row for each t and question, for inverses fitted anew at the deepest tap (of a detector, at the ends of encoder
    and decoder) and for the score of the task:
    t, what, tap, against, value, low, high, n, seeds, and the verdict "up", "down" or "cannot tell" of the interval.
    """
    changes = metrics[metrics["measure"].str.endswith("_change")]
    if changes.empty:
        raise BacksightError("the table holds no change along t: give the metrics of 10_tradeoff.")
    fresh = metrics[(metrics["measure"] == "psnr") & (metrics["inverse"] == FRESH)].sort_values("depth", kind="stable")
    taps = list(dict.fromkeys(fresh["tap"]))
    inside = [[tap for tap in taps if tap.startswith(stage)] for stage in ("encoder", "decoder")]
    ends = [stage[-1] for stage in inside if stage] or taps[-1:]
    asked: list[tuple[str, str | None]] = [(measure, tap) for tap in ends for measure in PICTURE_MEASURES]
    asked += [
        (measure, None) for measure in ("top1", "ap50", f"top1_{RANDOM_HUES}", f"ap50_{RANDOM_HUES}", "probe_top1")
    ]
    rows = []
    for t in sorted(set(changes["t"].dropna())):
        at = changes[changes["t"] == t]
        against = TASK_ONLY if (at["against"] == TASK_ONLY).any() else START
        for measure, tap in asked:
            of = at[(at["measure"] == f"{measure}_change") & (at["against"] == against)]
            if tap is not None:
                of = of[(of["tap"] == tap) & (of["inverse"] == FRESH)]
            for _, row in of.iterrows():
                verdict = "up" if row["low"] > 0 else "down" if row["high"] < 0 else "cannot tell"
                told = {name: row[name] for name in ("value", "low", "high", "n", "seeds")}
                rows.append(
                    {"t": t, "what": measure, "tap": row["tap"], "against": against, **told, "verdict": verdict}
                )
    return pd.DataFrame(rows)
