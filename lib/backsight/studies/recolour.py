"""Perturbations of colour, of an object or of the whole image, and the objects they are made on.

Hue, saturation and value are those of the HSV hexcone (Smith, "Color gamut transform pairs", 1978). On `scenes` an
object is recoloured by rendering the same scene again, which is an exact counterfactual; everything else, and every
other source, is changed pixel by pixel inside the mask.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from torch import Tensor

from backsight.data.images import ImageSource, Preprocessed, open_images
from backsight.errors import BacksightError, nearest
from backsight.measures.hue import hue_of, object_chroma
from backsight.scenes.render import CLASS_NAMES, CLASSES, Scene, SceneOptions, render_many

Kind = Literal["none", "hue_shift", "grey", "saturation"]
Region = Literal["object", "objects", "image"]
KINDS: tuple[str, ...] = get_args(Kind)
CONCENTRATION = 0.5  # mean length of a class's hue vectors (0: any hue, 1: one hue) from which it has a prototype
FEWEST_EXAMPLES = 10  # training objects that a prototype needs


@dataclass(frozen=True)
class Perturbation:
    """What is done to the colours, and where.

    kind: "hue_shift" (by `amount` degrees), "grey" (saturation 0, value kept), "saturation" (times `amount`) or
    "none"; region: the judged "object", all "objects" or the whole "image".
    """

    kind: Kind
    region: Region = "object"
    amount: float = math.nan

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BacksightError(f"there is no perturbation {self.kind!r}; {nearest(self.kind, KINDS)}")
        if self.kind in ("hue_shift", "saturation") and not math.isfinite(self.amount):
            raise BacksightError(f"the perturbation {self.kind} needs an amount")

    @property
    def columns(self) -> dict[str, Any]:
        """What a row of a table says of it."""
        return {"perturbation": self.kind, "region": self.region, "hue_shift": self.amount}


NONE = Perturbation("none", "image")


def hue_shifts(count: int, region: Region = "object") -> list[Perturbation]:
    """`count` turns of the hue all round the circle, the first by 0 degrees."""
    return [Perturbation("hue_shift", region, 360.0 * i / count) for i in range(count)]


# -------------------------------------------------------------------------------------------------- pixel by pixel


def to_hsv(images: Tensor) -> Tensor:
    """(B, 3, …) of hue in degrees [0, 360), saturation and value in [0, 1]; images: (B, 3, …) sRGB in [0, 1]."""
    red, green, blue = images.unbind(1)
    value, lowest = images.amax(1), images.amin(1)
    chroma = value - lowest
    divisor = chroma.clamp(min=torch.finfo(images.dtype).tiny)
    hue = torch.where(
        value == red,
        ((green - blue) / divisor) % 6,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    hue = torch.where(chroma > 0, 60 * hue, torch.zeros_like(hue))
    saturation = chroma / value.clamp(min=torch.finfo(images.dtype).tiny)
    return torch.stack([hue, saturation, value], 1)


def to_rgb(hsv: Tensor) -> Tensor:
    """The inverse of `to_hsv`; hues of any size wrap around."""
    hue, saturation, value = hsv.unbind(1)
    channels = []
    for start in (5, 3, 1):
        place = (start + hue / 60) % 6
        channels.append(value - value * saturation * torch.minimum(place, 4 - place).clamp(0, 1))
    return torch.stack(channels, 1)


def perturb(images: Tensor, masks: Tensor, perturbation: Perturbation) -> Tensor:
    """The images with other colours, pixel by pixel, in steps of 1/255 as a file would hold them.

    images: (B, 3, H, W) sRGB in [0, 1]; masks: (B, H, W) bool, True = the region. A pixel without hue keeps having
    none. Outside the region nothing changes. Raises BacksightError where the shapes do not fit.
    """
    if images.ndim != 4 or masks.shape != (images.shape[0], *images.shape[2:]):
        raise BacksightError(
            f"perturb() needs one mask for each image, not {tuple(masks.shape)} for {tuple(images.shape)}"
        )
    hue, saturation, value = to_hsv(images).unbind(1)
    if perturbation.kind == "hue_shift":
        hue = hue + perturbation.amount
    elif perturbation.kind == "grey":
        saturation = torch.zeros_like(saturation)
    elif perturbation.kind == "saturation":
        saturation = (saturation * perturbation.amount).clamp(0, 1)
    else:
        return images
    changed = (to_rgb(torch.stack([hue, saturation, value], 1)) * 255).round() / 255
    return changed if perturbation.region == "image" else torch.where(masks[:, None], changed, images)


# --------------------------------------------------------------------------------------------- the objects judged


@dataclass(frozen=True)
class JudgedObjects:
    """One object in each image, and what is known about it.

    images: (N, 3, H, W) sRGB in [0, 1]; masks: (N, H, W) bool, of the object, and every: of all objects; labels: (N,)
    into `classes`, -1 where there are none;
    hues: (N,) degrees, the canonical hue of the object's class; for a class without one a hue that it does not own
    (the placebo: how often is a hue met by chance?); NaN where nothing is known. canonical: (N,) bool, whether the
    class has a hue of its own. present: (N, T) the labels of all objects of each image, -1 = none, and boxes: (N, T, 4)
    theirs, x, y, x, y as shares of the image. rendered: seed and options of the scenes, else None.
    """

    name: str
    split: str
    images: Tensor
    masks: Tensor
    every: Tensor
    labels: np.ndarray
    classes: tuple[str, ...]
    hues: np.ndarray
    canonical: np.ndarray
    present: Tensor
    boxes: Tensor
    rendered: tuple[int, SceneOptions] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labelled(self) -> bool:
        return bool((self.labels >= 0).all())

    @property
    def categories(self) -> dict[str, np.ndarray]:
        """{"canonical" | "colour_free": (N,) bool}; {"unlabelled": all} where classes are not known."""
        if not self.labelled:
            return {"unlabelled": np.ones(len(self), bool)}
        both = {"canonical": self.canonical, "colour_free": ~self.canonical}
        return {name: members for name, members in both.items() if members.any()}

    def perturbed(self, perturbation: Perturbation) -> Tensor:
        """(N, 3, H, W): the images under the perturbation, rendered anew where scenes can show it exactly."""
        changes: dict[str, Any] = {"hue_shift": {"hue_shift": perturbation.amount}, "grey": {"grey": True}}
        if self.rendered is None or perturbation.region == "image" or perturbation.kind not in changes:
            return perturb(self.images, self.every if perturbation.region == "objects" else self.masks, perturbation)
        seed, options = self.rendered
        recolour = "all" if perturbation.region == "objects" else "dominant"
        options = replace(options, recolour=recolour, **changes[perturbation.kind])  # type: ignore[arg-type]
        return _pictures([s.image for s in render_many(self.split, len(self), seed, self.images.shape[-1], options)])


def open_objects(
    source: str, target_or_size: Preprocessed | tuple[int, int], n: int, seed: int = 0, minimum_area: float = 0.3
) -> JudgedObjects:
    """Up to n images of the test split, each with one object that covers at least `minimum_area` of it.

    source: "scenes" (the dominant object; drawn large), a COCO root (the largest object; images without a large one
    are passed over; prototypical hues are those of the training split, see `class_hues`) or a folder of images
    without masks (the whole image is the object, nothing is known of it).
    Raises BacksightError where no image has such an object.
    """
    if source == "scenes":
        size = getattr(target_or_size, "image_size", cast(tuple[int, int], target_or_size))
        return _scene_objects(size, n, seed, minimum_area)
    if (Path(source) / "annotations").is_dir():
        images = open_images(source, "test", target_or_size, seed=seed, masks=True)
        prototypes = class_hues(open_images(source, "train", target_or_size, 20 * n, seed, masks=True))
        return _annotated_objects(images, source, prototypes, n, minimum_area)
    images = open_images(source, "test" if source == "photographs" else None, target_or_size, n, seed)
    pictures = _pictures([item["image"].permute(1, 2, 0).numpy() for item in images])
    count, masks = len(pictures), torch.ones(len(pictures), *pictures.shape[2:], dtype=torch.bool)
    unknown = masks, np.full(count, -1), (), np.full(count, np.nan), np.zeros(count, bool)
    return JudgedObjects(images.name, images.split, pictures, masks, *unknown, *_padded([()] * count, [()] * count))


def _scene_objects(size: tuple[int, int], n: int, seed: int, minimum_area: float) -> JudgedObjects:
    if size[0] != size[1]:
        raise BacksightError(f"scenes are square; {size[0]} x {size[1]} needs photographs: give a COCO root as images")
    options = SceneOptions(minimum_area=minimum_area)
    scenes: list[Scene] = list(render_many("test", n, seed, size[0], options))
    hues, canonical = known_hues({kind.name: kind.hue for kind in CLASSES}, CLASS_NAMES)
    labels = np.array([scene.dominant for scene in scenes])
    pictures, every = _pictures([s.image for s in scenes]), torch.from_numpy(np.stack([s.masks.any(0) for s in scenes]))
    masks = torch.from_numpy(np.stack([scene.masks[0] for scene in scenes]))
    corners = [np.concatenate([s.boxes[:, :2], s.boxes[:, :2] + s.boxes[:, 2:]], 1) / size[0] for s in scenes]
    known = (
        every,
        labels,
        CLASS_NAMES,
        hues[labels],
        canonical[labels],
        *_padded([scene.labels for scene in scenes], corners),
    )
    return JudgedObjects("scenes", "test", pictures, masks, *known, (seed, options))


def _padded(labels: Sequence[Any], boxes: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """(N, T) labels and (N, T, 4) boxes of images with up to T objects; -1 where an image has fewer."""
    most = max(map(len, labels), default=0)
    present, corners = torch.full((len(labels), most), -1), torch.zeros(len(labels), most, 4)
    for image, (own, places) in enumerate(zip(labels, boxes, strict=True)):
        if len(own):
            present[image, : len(own)], corners[image, : len(own)] = torch.as_tensor(own), torch.as_tensor(places)
    return present, corners


def _annotated_objects(
    images: ImageSource, source: str, prototypes: dict[str, float | None], n: int, minimum_area: float
) -> JudgedObjects:
    pictures, masks, every, labels, present, boxes = [], [], [], [], [], []
    height, width = images.size
    for item in images:
        areas = item["masks"].flatten(1).float().mean(1).masked_fill(item["crowd"], 0)
        if not len(areas) or float(areas.max()) < minimum_area:
            continue
        largest = int(areas.argmax())
        counted = [i for i in range(len(areas)) if i == largest or not item["crowd"][i]]
        pictures.append(item["image"].permute(1, 2, 0).numpy())
        masks.append(item["masks"][largest])
        every.append(item["masks"][counted].bool().any(0))
        labels.append(int(item["labels"][largest]))
        present.append(item["labels"][counted])
        boxes.append(item["boxes"][counted] / torch.tensor([width, height, width, height]))
        if len(pictures) == n:
            break
    if not pictures:
        raise BacksightError(f"no image of {source} has an object of {minimum_area:.0%} of it: lower minimum_area")
    hues, canonical = known_hues(prototypes, images.classes)
    chosen = np.array(labels)
    known = torch.stack(every), chosen, images.classes, hues[chosen], canonical[chosen], *_padded(present, boxes)
    return JudgedObjects(images.name, images.split, _pictures(pictures), torch.stack(masks), *known)


def class_hues(images: ImageSource) -> dict[str, float | None]:
    """{class: prototypical hue in degrees, or None}, from the annotated objects of the training split.

    The hue is the direction of the mean of the objects' unit hue vectors. A class has one where that mean is at least
    CONCENTRATION long and at least FEWEST_EXAMPLES objects have a hue at all. Source: Mardia & Jupp, 2.2.
    """
    vectors: dict[int, list[complex]] = {}
    for item in images:
        if not len(item["masks"]):
            continue
        picture = item["image"].float()[None].expand(len(item["masks"]), -1, -1, -1) / 255
        hues = hue_of(object_chroma(picture, item["masks"]))
        for label, hue in zip(item["labels"].tolist(), hues.tolist(), strict=True):
            if not math.isnan(hue):
                vectors.setdefault(label, []).append(complex(np.exp(1j * math.radians(hue))))
    found: dict[str, float | None] = dict.fromkeys(images.classes)
    for label, each in vectors.items():
        mean = complex(np.mean(each))
        if len(each) >= FEWEST_EXAMPLES and abs(mean) >= CONCENTRATION:
            found[images.classes[label]] = math.degrees(math.atan2(mean.imag, mean.real)) % 360
    return found


def known_hues(prototypes: Mapping[str, float | None], classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hue of each class (K,), whether it owns it (K,)): classes without a hue get those of the others in turn."""
    owned = sorted({hue for hue in prototypes.values() if hue is not None})
    canonical = np.array([prototypes[name] is not None for name in classes])
    hues = np.full(len(classes), np.nan)
    for place, name in enumerate(classes):
        own = prototypes[name]
        if own is not None:
            hues[place] = own
        elif owned:
            hues[place] = owned[int((~canonical[:place]).sum()) % len(owned)]
    return hues, canonical


def _pictures(images: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


class SceneObjects(NamedTuple):
    """Scenes and their dominant objects. images: (N, 3, H, W) in [0, 1]; inside: (N, H, W) bool; textures: names."""

    images: Tensor
    inside: Tensor
    textures: tuple[str, ...]


def scene_objects(split: str, count: int, size: int, seed: int = 0) -> SceneObjects:
    """The first scenes of a split, rendered: the same that `open_images("scenes", split, size, count, seed)` reads."""
    scenes = list(render_many(split, count, seed, size))
    inside = torch.from_numpy(np.stack([scene.masks[0] for scene in scenes]))
    return SceneObjects(_pictures([s.image for s in scenes]), inside, tuple(scene.textures[0] for scene in scenes))
