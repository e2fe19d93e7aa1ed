"""Images for targets and inverses: generated ones, folders, tar shards, COCO and ImageNet, all read in one way.

Every source gives uint8 RGB images of one size. Splits never share an image. A file that cannot be read is
named in `ImageSource.skipped` with the reason, warned about once and left out; it never stops a run and is
never lost silently.
"""

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import import_module
from itertools import chain, count, islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from backsight.data.coco import Box, Size
from backsight.data.decode import ImageError, decode
from backsight.data.folders import SPLITS, Entry, folder_entries
from backsight.errors import SourceError, nearest
from backsight.project import available_cores

# Sources that are no folders, each with the module and the function in it that finds the images.
GENERATORS = {
    "scenes": ("backsight.scenes.dataset", "generated"),
    "scenes-on-leaves": ("backsight.scenes.dataset", "generated_on_leaves"),
    "photographs": ("backsight.scenes.photographs", "generated"),
    "leaves": ("backsight.data.leaves", "generated"),
}
WITH_LEAVES = "+leaves"  # of a folder's training images: random parts of them too, and as many leaves as both
PARTS, LEAST_PART = 7, 0.3  # of every image, and of its area
WORTH_WORKERS = 2000  # images that are read by threads of their own, where there are cores to spare


class Preprocessed(Protocol):
    """What is asked of a target: preprocessing with size, interpolation and crop_fraction."""

    preprocessing: Any


@dataclass(eq=False, repr=False)
class ImageSource(Dataset[dict[str, Any]]):
    """Images of one split at one size; made by `open_images`.

    name: of the generator or the folder. split: "train", "validation", "test" or "all". size: (H, W). classes: names
    that "labels" and "label" are indices into, or (). skipped: [(path, reason)] of what could not be read so far.

    source[i] is a dictionary: "image" (3, H, W) uint8 RGB, "id", "index"; with class folders "label"; with masks=True
    "masks" (M, H, W) bool, "boxes" (M, 4) xyxy in pixels of "image", "labels" (M,) and "crowd" (M,) bool. source[i]
    raises ImageError for a file that cannot be read; iteration, `batches` and `tensor` go on without it.
    """

    name: str
    split: str
    size: Size
    entries: Sequence[Entry]
    interpolation: str = "bicubic"
    crop_fraction: float = 1.0
    classes: tuple[str, ...] = ()
    skipped: list[tuple[str, str]] = field(default_factory=list)
    _warned: bool = field(default=False, init=False)

    def __repr__(self) -> str:
        height, width = self.size
        return f"ImageSource({self.name!r}, {self.split!r}, {len(self)} images of {height} x {width})"

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        image, box, size = self._read(entry)
        item: dict[str, Any] = {"image": image, "id": entry.id, "index": index % len(self)}
        if entry.label is not None:
            item["label"] = entry.label
        if entry.objects is not None:
            item |= entry.objects.read(entry.path, size, box, self.size)
        return item

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self)):
            try:
                item = self[index]
            except ImageError as error:
                self.skip([error])
            else:
                yield item

    def image(self, index: int) -> Tensor:
        """The image alone, (3, H, W) uint8. Raises ImageError."""
        return self._read(self.entries[index])[0]

    def subset(self, which: slice) -> "ImageSource":
        """These images; nothing is copied."""
        part = copy.copy(self)
        part.entries = self.entries[which]
        return part

    def skip(self, failures: Sequence[ImageError]) -> None:
        """Put files on the list of what cannot be read; the first one met while reading is warned about."""
        named = dict.fromkeys((failure.path, failure.reason) for failure in failures)
        self.skipped += [failure for failure in named if failure not in self.skipped]
        if failures and not self._warned:
            self._warned = True
            warnings.warn(f"{self.name}: {failures[0]}; skipped, as others are (see `.skipped`)", stacklevel=3)

    def _read(self, entry: Entry) -> tuple[Tensor, Box, Size]:
        """uint8 (3, H, W), antialiased; which part of the file's image it shows; (width, height) of that image."""
        if entry.draw is not None:
            height, width = self.size
            drawn = torch.from_numpy(entry.draw(self.size)).permute(2, 0, 1).contiguous()
            return drawn, (0, 0, width, height), (width, height)
        objects, read = entry.objects, entry.member and entry.member.read
        enough = None if objects else round(2 * max(self.size) / self.crop_fraction)
        picture = decode(entry.path, read, enough=enough)
        if objects is not None and objects.size not in (None, picture.size):
            # Annotators may have seen the file without its EXIF orientation: their frame decides.
            upright, picture = picture.size, decode(entry.path, upright=False)
            if picture.size != objects.size:
                raise ImageError(entry.path, f"its size (width, height) is {upright}, annotated as {objects.size}")
        box = crop_box(picture.size, self.size, self.crop_fraction)
        framed, size = (self.size[1], self.size[0]), picture.size
        if entry.part is not None:
            random = np.random.default_rng(entry.part)
            box = _random_part(box, random)
            picture = ImageOps.mirror(picture) if random.random() < 0.5 else picture
        if size != framed or box != (0, 0, *size):
            picture = picture.resize(framed, Image.Resampling[self.interpolation.upper()], box=box)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous(), box, size


def crop_box(size: Size, framed: Size, fraction: float = 1.0) -> Box:
    """What a (width, height) image shows in a frame of (H, W): left, top, right, bottom in its pixels.

    As if the short side were resized to the frame's over `fraction` and the centre cut out, as models are evaluated.
    """
    (width, height), (rows, columns) = size, framed
    scale = max(rows / height, columns / width)
    across, down = fraction * min(columns / scale, width), fraction * min(rows / scale, height)
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, min(left + across, width), min(top + down, height)


def _random_part(box: Box, random: np.random.Generator) -> Box:
    """A smaller box of the same proportions inside of a box: left, top, right, bottom."""
    left, top, right, bottom = box
    share = math.sqrt(random.uniform(LEAST_PART, 1))
    width, height = share * (right - left), share * (bottom - top)
    left, top = random.uniform(left, right - width), random.uniform(top, bottom - height)
    return left, top, left + width, top + height


def _with_leaves(entries: Sequence[Entry], seed: int) -> list[Entry]:
    """A folder's images, PARTS random parts of each, and as many leaves as both."""
    from backsight.data.leaves import generated

    whole = [entry._replace(objects=None) for entry in entries]
    parts = [
        entry._replace(id=f"{entry.id}#{seed}-{number}", part=(seed, place, number))
        for place, entry in enumerate(whole)
        for number in range(PARTS)
    ]
    return [*whole, *parts, *generated("train", len(whole + parts), seed, 0, False).entries]


def open_images(
    source: str | Path,
    split: str | None = None,
    target_or_size: Preprocessed | int | Size = 64,
    count: int | None = None,
    seed: int = 0,
    *,
    masks: bool = False,
) -> ImageSource:
    """Images of one split of a source, all of one size.

    source: "scenes" (made on first use) | "scenes-on-leaves" (to train on: their backgrounds are endless) |
        "photographs" (ten real ones, offline) | "leaves" (endless, drawn as they are read) | a folder (see
        data/folders.py) | "FOLDER+leaves" (where it has few images to train on: its training split with random parts
        of them, some mirrored, and as many leaves as both; its other splits as they are).
    split: "train" | "validation" | "test" share no image. "all" is everything (not for scenes). None: "all" for a
        folder without splits, which is cut 8:1:1 otherwise, and "test" for all else.
    target_or_size: a target, whose own size, crop and interpolation are used; or (H, W) in pixels, or one side of a
        square: as much as possible, bicubic.
    count: at most this many, chosen by `seed` (a larger count contains the smaller ones), in stable order. For scenes
        and leaves: exactly this many (default 1024), `seed` being their seed.
    masks: also read masks, boxes and labels (scenes and COCO only).
    Raises SourceError, a sentence that says what is missing and what to do.
    """
    name = str(source)
    if (given := getattr(target_or_size, "preprocessing", None)) is not None:
        size, interpolation, crop_fraction = given.size, given.interpolation, given.crop_fraction
    else:
        size, interpolation, crop_fraction = _sides(target_or_size), "bicubic", 1.0
    if split not in (None, *SPLITS, "all"):
        raise SourceError(f"no split {split!r}; choose one of {', '.join((*SPLITS, 'all'))}")
    if count is not None and count < 1:
        raise SourceError(f"count is {count}; it is a number of images from 1")
    if name in GENERATORS:
        module, function = GENERATORS[name]
        found = getattr(import_module(module), function)(split, count, seed, max(size), masks)
        crop_fraction = 1.0 if found.to_size else crop_fraction
    elif not name or not (root := Path(os.path.expanduser(name.removesuffix(WITH_LEAVES)))).exists():
        raise SourceError(f"there is no folder {name!r}, nor a source of that name; {nearest(name, tuple(GENERATORS))}")
    else:
        found, joined = folder_entries(root, split, masks), name.endswith(WITH_LEAVES)
        name = root.resolve().name
        if joined and found.split == "train":
            found.entries, name = _with_leaves(found.entries, seed), name + WITH_LEAVES
    if masks and not any(entry.objects for entry in found.entries):
        raise SourceError(f"{name!r} has no masks (annotations/instances_*.json): leave masks out, or open scenes")
    entries = found.entries
    if count is not None:
        chosen = np.random.default_rng(seed).permutation(len(entries))[:count]
        entries = [entries[index] for index in sorted(chosen.tolist())]
    if found.skipped:
        which = f"{name}: {len(found.skipped)} files skipped (see `.skipped`)"
        warnings.warn(f"{which}, such as {found.skipped[0][0]} ({found.skipped[0][1]})", stacklevel=2)
    return ImageSource(name, found.split, size, entries, interpolation, crop_fraction, found.classes, found.skipped)


def _sides(size: Any) -> Size:
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, tuple | list) or [isinstance(side, int) and side > 0 for side in sides] != [True, True]:
        raise SourceError(f"{size!r} is neither a target nor a size, (height, width) in pixels or one side of a square")
    return sides[0], sides[1]


def images_at_once(images: ImageSource | Tensor) -> int:
    """How many of these a study holds at once: 50 of 64 x 64 pixels, of larger ones as many pixels, four at least."""
    size = images.shape[2:] if isinstance(images, Tensor) else images.size
    return max(4, min(50, 50 * 64**2 // math.prod(size)))


def batches(
    images: ImageSource | Tensor,
    batch_size: int,
    shuffle_seed: int | None = None,
    steps: int | None = None,
    start: int = 0,
    raw: bool = False,
) -> Iterator[Tensor]:
    """Batches of float (B, 3, H, W) in [0, 1], or, raw, as they are kept (uint8 is), read as they are asked for.

    images: an ImageSource, or a tensor (N, 3, H, W) of uint8 or of float in [0, 1]. steps=None: one pass, the last
    batch may be smaller. steps=n: batches 0 to n - 1 of an endless stream of epochs, all of full size. shuffle_seed:
    order of the images, another one for each epoch; None: their own order. Batch k depends on k, shuffle_seed and
    batch_size alone: `start` skips the first batches without reading them, for an exact resume. An unreadable
    image is left out of its batch and recorded in `images.skipped`.
    Raises SourceError where nothing can be read. Random state outside is not touched.
    """
    if not len(images) or batch_size < 1:
        raise SourceError(f"there are no batches of {batch_size} of {len(images)} images")
    indices = index_batches(len(images), batch_size, shuffle_seed, endless=steps is not None, start=start)
    left = None if steps is None else max(0, steps - start)
    number = len(images) if left is None else left * batch_size
    read = (stack for stack, _ in read_batches(images, indices, number) if stack is not None)
    return islice(read if raw else map(unit_floats, read), left)


def unit_floats(images: Tensor) -> Tensor:
    """uint8 as float in [0, 1]; what is float is that already."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def read_batches(
    images: ImageSource | Tensor, indices: Iterable[np.ndarray], number: int
) -> Iterator[tuple[Tensor | None, dict[int, ImageError]]]:
    """For each list of indices (B, 3, H, W) as it is kept, or None where nothing can be read, and what cannot be.

    number: of images, about. Threads read ahead where that pays: beside a consumer that computes on both of two cores
    none does.
    """
    if isinstance(images, Tensor):
        yield from ((images[torch.from_numpy(chosen)], {}) for chosen in indices)
        return

    cores = available_cores()
    workers = min(cores - 1, 8) if cores > 2 and number >= WORTH_WORKERS else 0

    def read(index: int) -> Tensor | ImageError:
        try:
            return images.image(index)
        except ImageError as error:
            return error

    def begun(index: int) -> Callable[[], Tensor | ImageError]:
        return pool.submit(read, index).result if workers else partial(read, index)

    failed = 0
    with ThreadPoolExecutor(max(1, workers)) as pool:
        called = ([(index, begun(index)) for index in chosen.tolist()] for chosen in indices)
        for batch, _ in pairwise(chain(called, [[]])):  # the pair is there when its second is submitted
            results = [(index, result()) for index, result in batch]
            failures = {index: result for index, result in results if isinstance(result, ImageError)}
            readable = [result for _, result in results if isinstance(result, Tensor)]
            if failures:
                images.skip([*failures.values()])
            failed = 0 if readable else failed + len(failures)
            if failed >= len(images):
                raise SourceError(f"none of the {len(images)} images can be read; the last: {results[-1][1]}")
            yield torch.stack(readable) if readable else None, failures


def index_batches(
    number: int, batch_size: int, shuffle_seed: int | None, endless: bool, start: int = 0
) -> Iterator[np.ndarray]:
    """Lists of at most batch_size of `number` indices, from batch `start` on.

    Of one epoch (the last list may be shorter), or, where endless, across epochs and all of full size.
    shuffle_seed: another order for each epoch; None: their own order.
    """

    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        if shuffle_seed is None:
            return np.arange(number)
        return np.random.default_rng([shuffle_seed, epoch]).permutation(number)

    for first in count(start * batch_size, batch_size):
        places = range(first, first + batch_size if endless else min(first + batch_size, number))
        if not places:
            return
        yield np.array([order(place // number)[place % number] for place in places])


def tensor(images: ImageSource | Tensor, limit: int | None = None) -> Tensor:
    """The first `limit` readable images (all of them by default) as one float tensor (N, 3, H, W) in [0, 1].

    Takes 12 bytes a pixel and image, and twice that for a moment. Raises SourceError where nothing can be read.
    """
    read = (image for batch in batches(images, min(len(images), limit or 64, 64)) for image in batch)
    return torch.stack(list(islice(read, limit)))
