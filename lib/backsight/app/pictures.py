"""Pictures by name: a built-in photograph ("chelsea"), the path of an image file, a test scene ("scene 22"), or that
scene with its largest object recoloured ("scene 22 hue 240"). The same word is the same picture everywhere.
"""

from __future__ import annotations

import base64
import io
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from backsight.data.decode import read_rgb
from backsight.errors import BacksightError

if TYPE_CHECKING:
    from torch import Tensor

_SCENE = re.compile(r"scene (\d{1,6})(?: hue ([0-2]?\d{1,2}|3[0-5]\d))?")


class Picture(NamedTuple):
    """image: (1, 3, H, W) in [0, 1]; mask: (1, H, W) bool, a scene's largest object, else all; words: for people."""

    image: Tensor
    mask: Tensor
    words: str


def open_picture(name: str, size: tuple[int, int], hue_shift: float = 0.0) -> Picture:
    """The largest centred crop at (H, W). hue_shift: degrees by which a scene's largest object is rendered in another
    hue; photographs and files stay as they are. Raises BacksightError on a name that is none of the kinds.
    """
    import torch  # late: it takes seconds, and a page of pictures that are made needs none of it

    from backsight.scenes.photographs import PHOTOGRAPHS, photograph
    from backsight.scenes.render import CLASS_NAMES, DEFAULT_OPTIONS, render

    if match := _SCENE.fullmatch(name):
        number, hue = match.groups()
        set_hue = None if hue is None else float(hue)
        options = replace(DEFAULT_OPTIONS, set_hue=set_hue, hue_shift=hue_shift, recolour="dominant")
        scene = render("test", int(number), 0, max(size), options)  # the split that no shipped target was trained on
        image, mask, objects = scene.image, scene.masks[0], [CLASS_NAMES[label] for label in scene.labels]
        words = f"test scene {number}: {', '.join(objects)} in front of a crop of {scene.background}"
        words += f", the {objects[0]} recoloured to a hue of {hue}°" if hue else ""
    elif name in PHOTOGRAPHS or os.path.isfile(name):  # also of a name that can be no path
        image = photograph(name) if name in PHOTOGRAPHS else read_rgb(name)
        mask = np.ones(image.shape[:2], bool)
        words = f"the photograph {name}" if name in PHOTOGRAPHS else f"the image {Path(name).name}"
    else:
        raise BacksightError(
            f"no picture {name!r}: give 'scene 22', 'scene 22 hue 240' (0 to 359), the path of an image file, or one "
            f"of {', '.join(PHOTOGRAPHS)}."
        )

    def fitted(pixels: np.ndarray, resampling: Image.Resampling) -> Tensor:
        return torch.from_numpy(np.array(ImageOps.fit(Image.fromarray(pixels), (size[1], size[0]), resampling)))

    pixels = fitted(image, Image.Resampling.BICUBIC).permute(2, 0, 1)[None].float() / 255
    return Picture(pixels, fitted(mask, Image.Resampling.NEAREST)[None], words)


def picture(name: str, size: tuple[int, int]) -> Tensor:
    """(1, 3, H, W) in [0, 1]: the image of `open_picture`."""
    return open_picture(name, size).image


def as_png(image: Tensor, side: int = 0, **options: Any) -> bytes:
    """A PNG file of (3, H, W) in [0, 1], made fast; every pixel a square, so that the picture is about `side` high."""
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    factor, file = max(1, side // image.shape[1]), io.BytesIO()
    Image.fromarray(pixels.repeat(factor, 0).repeat(factor, 1)).save(file, "PNG", compress_level=1, **options)
    return file.getvalue()


def data_address(png: bytes) -> str:
    """The address of a PNG that lies inside a page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
