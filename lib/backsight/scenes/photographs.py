"""The ten real photographs inside the scikit-image and scikit-learn packages: no download, ever."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from backsight.data.folders import Entry, Found
from backsight.errors import BacksightError, nearest

# Read directly, because the packages' own loaders may reach for the network.
_FILES = {
    "astronaut": "skimage/data/astronaut.png",
    "chelsea": "skimage/data/chelsea.png",
    "coffee": "skimage/data/coffee.png",
    "rocket": "skimage/data/rocket.jpg",
    "hubble_deep_field": "skimage/data/hubble_deep_field.jpg",
    "immunohistochemistry": "skimage/data/ihc.png",
    "retina": "skimage/data/retina.jpg",
    "stereo_motorcycle": "skimage/data/motorcycle_left.png",
    "china": "sklearn/datasets/images/china.jpg",
    "flower": "sklearn/datasets/images/flower.jpg",
}

PHOTOGRAPHS: tuple[str, ...] = tuple(_FILES)
SPLIT_PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "train": ("astronaut", "coffee", "flower", "hubble_deep_field", "retina", "stereo_motorcycle"),
    "validation": ("immunohistochemistry", "rocket"),
    "test": ("chelsea", "china"),
}


def generated(split: str | None, count: int | None, seed: int, size: int, masks: bool) -> Found:
    """The photographs of a split (default: test), or all, as `open_images` asks for them."""
    split = split or "test"
    names = SPLIT_PHOTOGRAPHS.get(split, PHOTOGRAPHS)
    return Found(split, [Entry(name, str(photograph_path(name))) for name in names])


def photograph_path(name: str) -> Path:
    """Where the installed package keeps a photograph. Raises BacksightError on an unknown name or a missing file."""
    if name not in _FILES:
        raise BacksightError(f"There is no photograph {name!r}; {nearest(name, PHOTOGRAPHS)}.")
    package, _, inside = _FILES[name].partition("/")
    spec = find_spec(package)  # finds the folder without importing the package
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder, inside)).is_file():
            return path
    raise BacksightError(f"The photograph {name!r} ({inside}) is not in the installed {package}: reinstall it.")


@cache
def photograph(name: str) -> np.ndarray:
    """One photograph at its own size, uint8 (H, W, 3) sRGB; decoded once, shared, therefore read-only.

    Source: the files of scikit-image (skimage.data) and scikit-learn (sklearn.datasets).
    """
    with Image.open(photograph_path(name)) as image:
        pixels = np.array(image.convert("RGB"))
    pixels.setflags(write=False)
    return pixels


def crops(names: tuple[str, ...], count: int, size: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """`count` crops of photographs, at random places and scales, the photographs taken in turn.

    The first crop of each photograph is the largest centred one. size: (H, W) in pixels.
    Returns images (count, H, W, 3) uint8 and the photograph's name of each. Crops of one photograph are not
    independent: resample whole photographs, or say so beside an interval.
    """
    random = np.random.default_rng(seed)
    height, width = size
    images, sources = np.zeros((count, height, width, 3), np.uint8), []
    for index in range(count):
        name = names[index % len(names)]
        picture = Image.fromarray(photograph(name))
        largest = min(picture.width / width, picture.height / height)
        share, across, down = (1.0, 0.5, 0.5) if index < len(names) else random.random(3).tolist()
        scale = largest * (share if index < len(names) else 0.25 + 0.75 * share)
        left, top = across * (picture.width - scale * width), down * (picture.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        images[index] = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box))
        sources.append(name)
    return images, sources
