"""The pictures of the explorer: scenes with a known object, the built-in photographs, image files."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from backsight.app.explorer.view import View
from backsight.data.decode import READABLE, ImageError, read_rgb
from backsight.errors import BacksightError
from backsight.project import project_root, results_root, shown, write_atomically
from backsight.scenes.photographs import PHOTOGRAPHS, photograph
from backsight.scenes.render import CLASS_NAMES, SceneOptions, render
from backsight.studies.recolour import Perturbation, perturb

SCENES = 12  # offered in the list; any number can be named
LARGEST_FILE = 64 * 2**20  # bytes
ENLARGED = 256  # pixels a side of a picture that is sent or exported: enough that it is of use outside the page
LARGEST_SIDE = 20_000  # pixels: what a person photographs, and not a bomb
# One large object, so that its colour can be seen, and others beside it.
SCENE_OPTIONS = SceneOptions(minimum_area=0.25)
_SCENE = re.compile(r"scene (\d{1,6})")


@dataclass(frozen=True)
class Subject:
    """A picture as a target sees it. image: (1, 3, H, W) in [0, 1]; mask: (1, H, W) bool, the main object, or None.

    what: what it shows, in words.
    """

    image: Tensor
    mask: Tensor | None
    what: str


def offered() -> list[str]:
    """The names of the built-in pictures, scenes first."""
    return [f"scene {number}" for number in range(SCENES)] + list(PHOTOGRAPHS)


def in_folder(folder: str) -> list[str]:
    """The image files of a folder, by name, at most 500. Raises BacksightError where there is no folder or none."""
    place = project_root() / os.path.expanduser(folder)
    if not os.path.isdir(place):
        raise BacksightError(f"There is no folder {folder!r}: give the path of a folder with image files.")
    files = sorted(file for file in place.iterdir() if file.suffix.lower() in READABLE)
    if not files:
        raise BacksightError(f"The folder {folder!r} holds no image file ({', '.join(READABLE)}).")
    return [shown(file) for file in files[:500]]


def keep_upload(name: str, content: bytes) -> str:
    """Check an uploaded file and keep its picture in results/08_explorer/pictures; returns the path for a view.

    Equal pictures are one file. Raises BacksightError, with the file's name, on what is no picture or too large.
    """
    said = Path(name).name or "the file"
    if len(content) > LARGEST_FILE:
        raise BacksightError(
            f"{said} has {len(content) / 2**20:.0f} MB; pictures of up to {LARGEST_FILE / 2**20:.0f} MB are taken: "
            "make it smaller first."
        )
    if not content:
        raise BacksightError(f"{said} is empty: choose another file.")
    stem = re.sub(r"[^\w.-]+", "_", Path(said).stem)[:40] or "picture"
    kept = results_root() / "08_explorer" / "pictures" / f"{stem}-{hashlib.sha256(content).hexdigest()[:12]}.png"
    if not kept.exists():
        pixels = _decoded(said, content)
        write_atomically(kept, lambda temporary: Image.fromarray(pixels).save(temporary))
    return shown(kept)


def _decoded(said: str, content: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except Exception as error:  # Pillow's plug-ins raise whatever a malformed file makes them stumble over
        raise BacksightError(
            f"{said} is no picture that can be read: choose a PNG, JPEG, WebP, GIF, TIFF or BMP."
        ) from error
    if max(width, height) > LARGEST_SIDE or width * height > (Image.MAX_IMAGE_PIXELS or 0):
        raise BacksightError(f"{said} has {width} x {height} pixels, more than is looked at: make it smaller first.")
    with tempfile.NamedTemporaryFile(suffix=re.sub(r"[^\w.]", "", Path(said).suffix)[:8] or ".bin") as file:
        file.write(content)
        file.flush()
        try:
            return read_rgb(file.name)
        except ImageError as error:
            raise BacksightError(f"{said} is damaged: {str(error).replace(file.name, said)}") from error


def subject(view: View, size: tuple[int, int]) -> Subject:
    """The view's picture at (H, W), with the view's hue and saturation.

    On scenes the object's hue is changed by rendering it anew, which is exact; all else pixel by pixel.
    Raises BacksightError on an unknown picture or a file that is none.
    """
    name, hue = view.picture, view.hue_shift % 360
    if scene := _SCENE.fullmatch(name):
        exact = hue if view.region == "object" else 0.0
        picture = _scene(int(scene[1]), size, exact)
        hue = hue - exact
    else:
        words = f"photograph {name!r}" if name in PHOTOGRAPHS else f"image file {Path(name).name}"
        picture = Subject(_pixels(name, size), None, words)
    image = picture.image
    inside = picture.mask if view.region == "object" and picture.mask is not None else None
    where = torch.ones(1, *size, dtype=torch.bool) if inside is None else inside
    if hue:
        image = perturb(image, where, Perturbation("hue_shift", "object", hue_shift=hue))
    if view.saturation != 1:
        image = perturb(image, where, Perturbation("saturation", "object", amount=view.saturation))
    return replace(picture, image=image)


@lru_cache(maxsize=64)
def _scene(number: int, size: tuple[int, int], hue_shift: float) -> Subject:
    options = replace(SCENE_OPTIONS, hue_shift=hue_shift, recolour="dominant")
    scene = render("test", number, 0, max(size), options)
    mask = ImageOps.fit(Image.fromarray(scene.masks[0]), (size[1], size[0]), Image.Resampling.NEAREST)
    first, *others = [CLASS_NAMES[label] for label in scene.labels]
    beside = f" and {', '.join(others)}" if others else ""
    words = f"{first}{beside} on a crop of {scene.background}"
    return Subject(_fitted(scene.image, size), torch.from_numpy(np.array(mask))[None], words)


@lru_cache(maxsize=32)
def _pixels(name: str, size: tuple[int, int]) -> Tensor:
    if name in PHOTOGRAPHS:
        return _fitted(photograph(name), size)
    path = project_root() / name
    if not os.path.isfile(path):
        raise BacksightError(
            f"There is no picture {name!r}: give 'scene 0', 'scene 1', …, a built-in photograph "
            f"({', '.join(PHOTOGRAPHS)}) or the path of an image file."
        )
    return _fitted(read_rgb(path), size)


def _fitted(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(1, 3, H, W) in [0, 1]: the largest centred crop, bicubic."""
    fitted = np.array(ImageOps.fit(Image.fromarray(pixels), (size[1], size[0]), Image.Resampling.BICUBIC))
    return torch.from_numpy(fitted).permute(2, 0, 1)[None].float() / 255


def as_pixels(image: Tensor, enlarged: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 of (3, H, W) in [0, 1]; enlarged: every pixel a square, about ENLARGED pixels a side."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    factor = max(1, ENLARGED // max(pixels.shape[:2])) if enlarged else 1
    return pixels.repeat(factor, 0).repeat(factor, 1)


def as_png(image: Tensor, enlarged: bool = False) -> bytes:
    """A PNG file of (3, H, W) in [0, 1], made fast."""
    file = io.BytesIO()
    Image.fromarray(as_pixels(image, enlarged)).save(file, "PNG", compress_level=1)
    return file.getvalue()
