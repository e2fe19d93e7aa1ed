"""Perturbations of colour, of an object or of the whole image, and the objects they are made on.

Hue, saturation and value are those of the HSV hexcone (Smith, "Color gamut transform pairs", 1978). On `scenes` an
object is recoloured by rendering the same scene again, which is an exact counterfactual; everything else, and every
other source, is changed pixel by pixel inside the mask.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from skimage.color import hsv2rgb, rgb2hsv
from torch import Tensor

from backsight.data.images import Preprocessed, open_images, unit_floats
from backsight.errors import BacksightError
from backsight.measures.hue import hue_of, object_chroma
from backsight.scenes.dataset import cached
from backsight.scenes.render import CLASSES, Scene, SceneOptions, render_many
from backsight.studies.objects import Objects, has_objects

Region = Literal["object", "objects", "image"]


class Perturbation(NamedTuple):
    """What is done to the colours, and where: columns of a table.

    perturbation: "hue_shift" (by `hue_shift` degrees), "grey" (saturation 0, value kept) or "none"; region: the judged
    "object", all "objects" or the whole "image".
    """

    perturbation: Literal["none", "hue_shift", "grey"]
    region: Region = "object"
    hue_shift: float = math.nan


NONE = Perturbation("none", "image")


def hue_shifts(count: int, region: Region = "object") -> list[Perturbation]:
    """`count` turns of the hue all round the circle, the first by 0 degrees."""
    return [Perturbation("hue_shift", region, 360.0 * i / count) for i in range(count)]


def recoloured(images: Tensor, where: Tensor, hue_shift: float = 0.0, saturation: float = 1.0) -> Tensor:
    """The images with other colours, pixel by pixel, in steps of 1/255 as a file would hold them.

    images: (B, 3, H, W) sRGB in [0, 1]; where: (B, H, W) bool, True = changed; hue_shift: degrees added to the hue (a
    pixel without one keeps having none); saturation: factor.
    """
    hsv = rgb2hsv(images.numpy(), channel_axis=1)
    hsv[:, 0] = (hsv[:, 0] + hue_shift / 360) % 1
    hsv[:, 1] = (hsv[:, 1] * saturation).clip(0, 1)
    changed = (torch.from_numpy(hsv2rgb(hsv, channel_axis=1)) * 255).round() / 255
    return torch.where(where[:, None], changed, images)


# --------------------------------------------------------------------------------------------- the objects judged


@dataclass(frozen=True)
class JudgedObjects(Objects):
    """Objects that have a hue to which they may revert.

    hues: (N,) degrees, of scenes the canonical hue of the object's class; for a class without one a hue that it does
    not own (the placebo: how often is a hue met by chance?); of photographs the natural hue, which the object has
    there. canonical: (N,) bool, False for a placebo. rendered: seed and options of the scenes, else None.
    """

    hues: np.ndarray
    canonical: np.ndarray
    rendered: tuple[int, SceneOptions] | None = None

    @property
    def categories(self) -> dict[str, np.ndarray]:
        """{"canonical" | "colour_free": (N,) bool} of scenes, {"natural": all} of photographs."""
        if self.natural:
            return {"natural": self.canonical}
        both = {"canonical": self.canonical, "colour_free": ~self.canonical}
        return {name: members for name, members in both.items() if members.any()}

    @property
    def natural(self) -> bool:
        """Whether the hues are the objects' own, and not those of their classes."""
        return self.rendered is None

    def perturbed(self, change: Perturbation) -> Tensor:
        """(N, 3, H, W) in [0, 1]: the images under the perturbation, rendered anew where scenes can show it exactly."""
        if change == NONE:
            return unit_floats(self.images)
        turn, grey = (0.0, True) if change.perturbation == "grey" else (change.hue_shift, False)
        if self.rendered is None or change.region == "image":
            regions = {"object": self.masks, "objects": self.every, "image": torch.ones_like(self.masks)}
            return recoloured(unit_floats(self.images), regions[change.region], turn, 0.0 if grey else 1.0)
        seed, options = self.rendered
        which: Any = "all" if change.region == "objects" else "dominant"
        options = replace(options, recolour=which, hue_shift=turn, grey=grey)
        return _pictures(render_many(self.split, len(self), seed, self.images.shape[-1], options))


def open_objects(
    source: str, target_or_size: Preprocessed | tuple[int, int], n: int, seed: int = 0, minimum_area: float | None = 0.3
) -> JudgedObjects:
    """Up to n objects of the test split that cover at least `minimum_area` of their image.

    source: "scenes" (one object an image, drawn large), a COCO root or a folder without masks (the whole image is the
    object). Of photographs all objects count that have a hue; minimum_area None: the largest of each image, of any hue.
    Raises BacksightError where there is no such object.
    """
    if source == "scenes":
        height, width = getattr(target_or_size, "image_size", cast(tuple[int, int], target_or_size))
        if height != width:
            raise BacksightError(f"scenes are square; {height} x {width} needs photographs: give a COCO root as images")
        rendered = seed, SceneOptions(minimum_area=minimum_area or 0.0)
        images = open_images(cached("test", n, seed, width, rendered[1]), "all", width, masks=True)
        objects = replace(Objects.read(images, n, minimum_area), name="scenes", split="test")
        hues, canonical = known_hues({kind.name: kind.hue for kind in CLASSES}, objects.classes)
        own = objects.labels[:, 0].numpy()
        return JudgedObjects(**vars(objects), hues=hues[own], canonical=canonical[own], rendered=rendered)
    if has_objects(source):
        images = open_images(source, "test", target_or_size, seed=seed, masks=True)
        objects = Objects.read(images, n, minimum_area or 0.0, apart=minimum_area is not None)
    else:
        objects = Objects.read(open_images(source, None, target_or_size, n, seed))
        whole = torch.ones_like(objects.masks)
        objects = replace(objects, masks=whole, every=whole, labels=torch.full_like(objects.labels, -1))
    hues = hue_of(object_chroma(unit_floats(objects.images), objects.masks))
    kept = (minimum_area is None) | ~np.isnan(hues)
    if not kept.any():
        raise BacksightError(f"all objects of {objects.name} are grey: there is no hue to turn")
    chosen = {name: of[torch.from_numpy(kept)] if isinstance(of, Tensor) else of for name, of in vars(objects).items()}
    return JudgedObjects(**chosen, hues=hues[kept], canonical=np.ones(kept.sum(), bool))  # type: ignore[arg-type]


def known_hues(prototypes: Mapping[str, float | None], classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hue of each class (K,), whether it owns it (K,)): classes without a hue get those of the others in turn."""
    placebos = cycle(sorted({hue for hue in prototypes.values() if hue is not None}) or [math.nan])
    own = [prototypes.get(name) for name in classes]
    hues = [next(placebos) if hue is None else hue for hue in own]
    return np.array(hues, float), np.array([hue is not None for hue in own], bool)


def _pictures(scenes: Iterable[Scene]) -> Tensor:
    return torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float() / 255


def scene_objects(split: str, count: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The first scenes of a split, as `open_images("scenes", split, size, count, seed)` reads them, (N, 3, H, W) in
    [0, 1], and their dominant objects: masks (N, H, W) bool and names of textures."""
    scenes = list(render_many(split, count, seed, size))
    masks = torch.from_numpy(np.stack([scene.masks[0] for scene in scenes]))
    return _pictures(scenes), masks, tuple(scene.textures[0] for scene in scenes)
