"""The pictures of the explorer: scenes with a known object, the built-in photographs, image files."""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
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
from backsight.scenes.render import CLASS_NAMES, Scene, SceneOptions, render
from backsight.studies.recolour import Perturbation, perturb

SCENES = 12  # offered in the list; any number can be named
LARGEST_FILE = 64 * 2**20  # bytes
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


def in_folder(folder: str | Path) -> list[str]:
    """The image files of a folder, by name, at most 500. Raises BacksightError where there is no folder or none."""
    place = Path(folder).expanduser()
    place = place if place.is_absolute() else project_root() / place
    if not place.is_dir():
        raise BacksightError(f"There is no folder {str(folder)!r}: give the path of a folder with image files.")
    found = sorted(file for file in place.iterdir() if file.suffix.lower() in READABLE)
    if not found:
        raise BacksightError(f"The folder {str(folder)!r} holds no image file ({', '.join(READABLE)}).")
    return [shown(file) for file in found[:500]]


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
    folder = results_root() / "08_explorer" / "pictures"
    stem = re.sub(r"[^\w.-]+", "_", Path(said).stem)[:40] or "picture"
    kept = folder / f"{stem}-{hashlib.sha256(content).hexdigest()[:12]}.png"
    if not kept.exists():
        pixels = _decoded(said, content)
        write_atomically(kept, lambda temporary: Image.fromarray(pixels).save(temporary))
    return shown(kept)


def _decoded(said: str, content: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content)) as image:
            if max(image.size) > LARGEST_SIDE or image.width * image.height > Image.MAX_IMAGE_PIXELS:  # type: ignore[operator]
                raise BacksightError(
                    f"{said} has {image.width} x {image.height} pixels, more than is looked at: make it smaller first."
                )
    except BacksightError:
        raise
    except Exception as error:  # Pillow's plug-ins raise whatever a malformed file makes them stumble over
        raise BacksightError(
            f"{said} is no picture that can be read: choose a PNG, JPEG, WebP, GIF, TIFF or BMP."
        ) from error
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=Path(said).suffix or ".bin") as file:
        file.write(content)
        file.flush()
        try:
            return read_rgb(file.name)
        except ImageError as error:
            reason = str(error).replace(file.name, said)
            raise BacksightError(f"{said} is damaged: {reason}") from error


def subject(view: View, size: tuple[int, int], name: str | None = None) -> Subject:
    """The view's picture (or the one named), at (H, W), with the view's hue and saturation.

    On scenes the object's hue is changed by rendering it anew, which is exact; all else pixel by pixel.
    Raises BacksightError on an unknown picture or a file that is none.
    """
    name = view.picture if name is None else name
    hue = view.hue_shift % 360
    if found := _SCENE.fullmatch(name):
        exact = hue if view.region == "object" else 0.0
        picture = _scene(int(found[1]), size, exact)
        hue = hue - exact
    else:
        picture = Subject(_pixels(name, size), None, _words(name))
    image = picture.image
    inside = picture.mask if view.region == "object" and picture.mask is not None else None
    where = torch.ones(1, *size, dtype=torch.bool) if inside is None else inside
    if hue:
        image = perturb(image, where, Perturbation("hue_shift", "object", hue_shift=hue))
    if view.saturation != 1:
        image = perturb(image, where, Perturbation("saturation", "object", amount=view.saturation))
    return Subject(image, picture.mask, picture.what)


@lru_cache(maxsize=64)
def _scene(number: int, size: tuple[int, int], hue_shift: float) -> Subject:
    from dataclasses import replace

    options = replace(SCENE_OPTIONS, hue_shift=hue_shift, recolour="dominant")
    scene = render("test", number, 0, max(size), options)
    picture = ImageOps.fit(Image.fromarray(scene.image), (size[1], size[0]))
    mask = ImageOps.fit(Image.fromarray(scene.masks[0]), (size[1], size[0]), Image.Resampling.NEAREST)
    return Subject(_tensor(np.asarray(picture)), torch.from_numpy(np.array(mask))[None], _scene_in_words(scene))


def _scene_in_words(scene: Scene) -> str:
    names = [CLASS_NAMES[label] for label in scene.labels]
    others = f" and {', '.join(names[1:])}" if names[1:] else ""
    return f"{names[0]}{others} on a crop of {scene.background}"


def _words(name: str) -> str:
    return f"photograph {name!r}" if name in PHOTOGRAPHS else f"image file {Path(name).name}"


@lru_cache(maxsize=32)
def _pixels(name: str, size: tuple[int, int]) -> Tensor:
    return _tensor(np.asarray(ImageOps.fit(_opened(name), (size[1], size[0]), Image.Resampling.BICUBIC)))


def _opened(name: str) -> Image.Image:
    if name in PHOTOGRAPHS:
        return Image.fromarray(photograph(name))
    path = Path(name) if Path(name).is_absolute() else project_root() / name
    if not path.is_file():
        raise BacksightError(
            f"There is no picture {name!r}: give 'scene 0', 'scene 1', …, a built-in photograph "
            f"({', '.join(PHOTOGRAPHS)}) or the path of an image file."
        )
    return Image.fromarray(read_rgb(path))


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
