"""Perturbations of colour, of an object or of the whole image, and the objects they are made on.

Hue, saturation and value are those of the HSV hexcone (Smith, "Color gamut transform pairs", 1978). On `scenes` an
object's hue is changed by rendering the same scene again, which is an exact counterfactual; everything else, and every
other source, is changed pixel by pixel inside the mask.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from backsight.data.images import ImageSource, Preprocessed, open_images
from backsight.errors import BacksightError, nearest
from backsight.scenes.render import CLASS_NAMES, CLASSES, Scene, SceneOptions, render_many

Kind = Literal["none", "set_hue", "hue_shift", "grey", "saturation", "white_surroundings"]
KINDS: tuple[str, ...] = get_args(Kind)
EXACT: tuple[str, ...] = ("set_hue", "hue_shift", "grey", "white_surroundings")  # what scenes render by themselves
SET_HUES = (0.0, 60.0, 120.0, 180.0, 240.0, 300.0)  # red, green, blue as the paper, and the hues between them
CONCENTRATION = 0.5  # mean length of a class's hue vectors (0: any hue, 1: one hue) from which it has a prototype
FEWEST_EXAMPLES = 10  # training objects that a prototype needs
NO_NUMBER = float("nan")


@dataclass(frozen=True)
class Perturbation:
    """What is done to the colours, and where.

    kind: "set_hue" to `amount` degrees, "hue_shift" by `hue_shift` degrees, "grey" (saturation 0, value kept),
    "saturation" times `amount`, "white_surroundings" (all but the object is white) or "none". region: "object" (inside
    its mask) or "image".
    """

    kind: Kind
    region: Literal["object", "image"] = "object"
    hue_shift: float = NO_NUMBER
    amount: float = NO_NUMBER

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BacksightError(f"there is no perturbation {self.kind!r}; {nearest(self.kind, KINDS)}")
        if self.region not in ("object", "image"):
            raise BacksightError(f"a perturbation is of the 'object' or of the 'image', not of {self.region!r}")
        if self.kind == "hue_shift" and not math.isfinite(self.hue_shift):
            raise BacksightError("the perturbation hue_shift needs hue_shift, in degrees")
        if self.kind in ("set_hue", "saturation") and not math.isfinite(self.amount):
            raise BacksightError(f"the perturbation {self.kind} needs an amount")

    @property
    def inverted(self) -> bool:
        """Whether pictures are inverted under it; under the others the target alone is asked for its answer."""
        return self.kind in ("none", "hue_shift") or (self.kind, self.region) == ("set_hue", "object")

    @property
    def columns(self) -> dict[str, Any]:
        """What a row of metrics.csv says of it."""
        named = {"perturbation": self.kind, "region": self.region}
        return named | {"hue_shift": self.hue_shift, "amount": self.amount}


NONE = Perturbation("none", "image")


def hue_shifts(count: int, region: Literal["object", "image"] = "object") -> list[Perturbation]:
    """`count` shifts all round the circle, the first by 0 degrees."""
    return [Perturbation("hue_shift", region, 360.0 * i / count) for i in range(count)]


def colour_perturbations(shifts: int = 24) -> list[Perturbation]:
    """Every perturbation of the colour study: the unchanged image, then those of the object and of the image.

    shifts: points of the response curve; a multiple of 3, so that 120 and 240 degrees are among them. Raises
    BacksightError otherwise.
    """
    if shifts < 3 or shifts % 3:
        raise BacksightError(f"the response curve needs 3, 6, … 24 … hue shifts, not {shifts}: 120° is among them")
    chosen = [NONE]
    regions: tuple[Literal["object", "image"], ...] = ("object", "image")
    for region in regions:
        chosen += hue_shifts(shifts, region)
        chosen += [Perturbation("set_hue", region, amount=hue) for hue in SET_HUES] + [Perturbation("grey", region)]
    return [*chosen, Perturbation("white_surroundings", "image")]


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

    images: (B, 3, H, W) sRGB in [0, 1]; masks: (B, H, W) bool, True = the object. A pixel without hue keeps having
    none. Outside the region nothing changes. Raises BacksightError where the shapes do not fit.
    """
    if images.ndim != 4 or masks.shape != (images.shape[0], *images.shape[2:]):
        raise BacksightError(
            f"perturb() needs one mask for each image, not {tuple(masks.shape)} for {tuple(images.shape)}"
        )
    inside = masks[:, None]
    if perturbation.kind == "white_surroundings":
        return torch.where(inside, images, torch.ones_like(images))
    changed = (_changed(images, perturbation) * 255).round() / 255
    return torch.where(inside, changed, images) if perturbation.region == "object" else changed


def _changed(images: Tensor, perturbation: Perturbation) -> Tensor:
    if perturbation.kind == "none":
        return images
    hue, saturation, value = to_hsv(images).unbind(1)
    if perturbation.kind == "set_hue":
        hue = torch.full_like(hue, perturbation.amount)
    elif perturbation.kind == "hue_shift":
        hue = hue + perturbation.hue_shift
    elif perturbation.kind == "grey":
        saturation = torch.zeros_like(saturation)
    else:
        saturation = (saturation * perturbation.amount).clamp(0, 1)
    return to_rgb(torch.stack([hue, saturation, value], 1))


def painted(images: Tensor, masks: Tensor, hues: Tensor) -> Tensor:
    """The images with each object in its own hue (B,), in degrees; NaN leaves the object as it is.

    A painter of canonical colours: the upper reference of the reversion index.
    """
    hue, saturation, value = to_hsv(images).unbind(1)
    wanted = torch.where(hues.isnan()[:, None, None], hue, hues[:, None, None].to(hue))
    return torch.where(masks[:, None], to_rgb(torch.stack([wanted, saturation, value], 1)), images)


# --------------------------------------------------------------------------------------------- the objects judged


@dataclass(frozen=True)
class Truth:
    """All objects of one image: labels (M,) into the classes, boxes (M, 4) xyxy as shares of the image."""

    labels: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class JudgedObjects:
    """One object in each image, and what is known about it.

    images: (N, 3, H, W) sRGB in [0, 1]; masks: (N, H, W) bool; labels: (N,) into `classes`, -1 where there are none;
    hues: (N,) degrees, the canonical hue of the object's class; for a class without one a hue that it does not own
    (the placebo: how often is a hue met by chance?); NaN where nothing is known. canonical: (N,) bool, whether the
    class has a hue of its own. truth: all objects of each image, the judged one first. rendered: split, seed, indices
    and options of the scenes, else None.
    """

    name: str
    split: str
    images: Tensor
    masks: Tensor
    labels: np.ndarray
    classes: tuple[str, ...]
    hues: np.ndarray
    canonical: np.ndarray
    truth: tuple[Truth, ...]
    rendered: tuple[str, int, tuple[int, ...], SceneOptions] | None = None

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
        exact = perturbation.kind == "white_surroundings" or perturbation.region == "object"
        if self.rendered is None or not exact or perturbation.kind not in EXACT:
            return perturb(self.images, self.masks, perturbation)
        split, seed, indices, options = self.rendered
        changes: dict[str, dict[str, Any]] = {
            "set_hue": {"set_hue": perturbation.amount},
            "hue_shift": {"hue_shift": perturbation.hue_shift},
            "grey": {"grey": True},
            "white_surroundings": {"white_surroundings": True},
        }
        options = replace(options, recolour="dominant", **changes[perturbation.kind])
        scenes = render_many(split, len(indices), seed, self.images.shape[-1], options, indices[0])
        return _pictures([scene.image for scene in scenes])


def open_objects(
    source: str,
    target_or_size: Preprocessed | tuple[int, int],
    n: int,
    seed: int = 0,
    minimum_area: float = 0.3,
    rule: str = "mixed",
    split: str = "test",
) -> JudgedObjects:
    """Up to n images, each with one object that covers at least `minimum_area` of it.

    source: "scenes" (the dominant object; drawn large), a COCO root (the largest object; images without a large one
    are passed over; prototypical hues are those of the training split, see `class_hues`) or a folder of images
    without masks (the whole image is the object, nothing is known of it). rule: the colour rule of scenes.
    Raises BacksightError where no image has such an object.
    """
    if source == "scenes":
        size = getattr(target_or_size, "image_size", cast(tuple[int, int], target_or_size))
        return _scene_objects(size, n, seed, minimum_area, rule, split)
    try:
        images = open_images(source, split, target_or_size, seed=seed, masks=True)
    except BacksightError:
        images = open_images(source, None if source != "photographs" else split, target_or_size, n, seed)
        pictures = _pictures([item["image"].permute(1, 2, 0).numpy() for item in images])
        masks = torch.ones(len(pictures), *pictures.shape[2:], dtype=torch.bool)
        nothing = np.full(len(pictures), -1)
        unknown = np.full(len(pictures), np.nan)
        truth = tuple(Truth(np.zeros(0, int), np.zeros((0, 4))) for _ in pictures)
        canonical = np.zeros(len(pictures), bool)
        return JudgedObjects(images.name, images.split, pictures, masks, nothing, (), unknown, canonical, truth)
    prototypes = class_hues(open_images(source, "train", target_or_size, 20 * n, seed, masks=True))
    return _annotated_objects(images, source, prototypes, n, minimum_area)


def _scene_objects(
    size: tuple[int, int], n: int, seed: int, minimum_area: float, rule: str, split: str
) -> JudgedObjects:
    if size[0] != size[1]:
        raise BacksightError(f"scenes are square; {size[0]} x {size[1]} needs photographs: give a COCO root as images")
    options = SceneOptions(rule=rule, minimum_area=minimum_area)  # type: ignore[arg-type]
    scenes: list[Scene] = list(render_many(split, n, seed, size[0], options))
    labels = np.array([scene.dominant for scene in scenes])
    hues, canonical = known_hues({name: kind.hue for name, kind in zip(CLASS_NAMES, CLASSES, strict=True)}, CLASS_NAMES)
    boxes = [np.concatenate([s.boxes[:, :2], s.boxes[:, :2] + s.boxes[:, 2:]], 1) / size[0] for s in scenes]
    return JudgedObjects(
        "scenes",
        split,
        _pictures([scene.image for scene in scenes]),
        torch.from_numpy(np.stack([scene.masks[0] for scene in scenes])),
        labels,
        CLASS_NAMES,
        hues[labels],
        canonical[labels],
        tuple(Truth(scene.labels, box) for scene, box in zip(scenes, boxes, strict=True)),
        (split, seed, tuple(range(n)), options),
    )


def _annotated_objects(
    images: ImageSource, source: str, prototypes: dict[str, float | None], n: int, minimum_area: float
) -> JudgedObjects:
    pictures, masks, labels, truth = [], [], [], []
    height, width = images.size
    for item in images:
        areas = item["masks"].flatten(1).float().mean(1).masked_fill(item["crowd"], 0)
        if not len(areas) or float(areas.max()) < minimum_area:
            continue
        largest = int(areas.argmax())
        order = [largest, *(i for i in range(len(areas)) if i != largest and not item["crowd"][i])]
        pictures.append(item["image"].permute(1, 2, 0).numpy())
        masks.append(item["masks"][largest])
        labels.append(int(item["labels"][largest]))
        scale = np.array([width, height, width, height])
        truth.append(Truth(item["labels"][order].numpy(), item["boxes"][order].numpy() / scale))
        if len(pictures) == n:
            break
    if not pictures:
        raise BacksightError(f"no image of {source} has an object of {minimum_area:.0%} of it: lower minimum_area")
    hues, canonical = known_hues(prototypes, images.classes)
    chosen = np.array(labels)
    return JudgedObjects(
        images.name,
        images.split,
        _pictures(pictures),
        torch.stack(masks),
        chosen,
        images.classes,
        hues[chosen],
        canonical[chosen],
        tuple(truth),
    )


def class_hues(images: ImageSource) -> dict[str, float | None]:
    """{class: prototypical hue in degrees, or None}, from the annotated objects of the training split.

    The hue is the direction of the mean of the objects' unit hue vectors. A class has one where that mean is at least
    CONCENTRATION long and at least FEWEST_EXAMPLES objects have a hue at all. Source: Mardia & Jupp, 2.2.
    """
    from backsight.measures.hue import hue_of, object_chroma

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


@dataclass(frozen=True)
class SceneObjects:
    """Scenes and their dominant objects. images: (N, 3, H, W) in [0, 1]; inside: (N, H, W) bool; textures: names."""

    images: Tensor
    inside: Tensor
    textures: tuple[str, ...]


def scene_objects(split: str, count: int, size: int, seed: int = 0) -> SceneObjects:
    """The first scenes of a split, rendered: the same that `open_images("scenes", split, size, count, seed)` reads."""
    scenes = list(render_many(split, count, seed, size))
    pixels = np.stack([scene.image for scene in scenes])
    return SceneObjects(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255,
        torch.from_numpy(np.stack([scene.masks[0] for scene in scenes])),
        tuple(scene.textures[0] for scene in scenes),
    )
