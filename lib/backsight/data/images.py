"""Images for targets and inverses: generated ones, folders, tar shards, COCO and ImageNet, all read in one way.

Every source gives uint8 RGB images of one size. Splits never share an image. A file that cannot be read is
named in `ImageSource.skipped` with the reason, warned about once and left out; it never stops a run and is
never lost silently.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from backsight.data.coco import Box, Size
from backsight.data.decode import ImageError, decode, opened
from backsight.data.folders import SPLITS, Entry, Found, Part, folder_entries
from backsight.errors import SourceError, nearest
from backsight.project import available_cores

# Sources that are no folders, each with the function that gives a `Generated`.
GENERATORS = {
    "scenes": "backsight.scenes.render:generated",
    "photographs": "backsight.scenes.photographs:generated",
}
VERIFIED_AT_OPEN = 2000  # of a source up to this size the files' headers are looked at when it is opened
WORTH_WORKERS = 2000  # images that are read by processes of their own, where there are cores to spare


class Preprocessed(Protocol):
    """What is asked of a target: preprocessing with size, interpolation and crop_fraction."""

    preprocessing: Any


@dataclass(frozen=True)
class Generated:
    """What a generator gives: a split, {id: file}, and COCO annotations where it knows the truth.

    to_size: the images were made for the size that was asked for: nothing is cropped.
    """

    split: str
    files: Mapping[str, Path]
    annotations: Path | None = None
    to_size: bool = False


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
            item |= entry.objects.read(size, box, self.size)
        return item

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self)):
            try:
                item = self[index]
            except ImageError as error:
                self.skip([(error.path, error.reason)])
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

    def skip(self, failures: Sequence[tuple[str, str]]) -> None:
        """Put files on the list of what cannot be read; the first one met while reading is warned about."""
        self.skipped += [failure for failure in failures if failure not in self.skipped]
        if failures and not self._warned:
            self._warned = True
            _warn(self.name, failures, " (others as they are met; `.skipped` lists them all)")

    def _read(self, entry: Entry) -> tuple[Tensor, Box, Size]:
        """uint8 (3, H, W), antialiased; which part of the file's image it shows; (width, height) of that image."""
        objects = entry.objects
        enough = None if objects else round(2 * max(self.size) / self.crop_fraction)
        picture = decode(entry.path, member=entry.member, enough=enough)
        if objects is not None and objects.size not in (None, picture.size):
            # Annotators may have seen the file without its EXIF orientation: their frame decides.
            upright, picture = picture.size, decode(entry.path, upright=False)
            if picture.size != objects.size:
                raise ImageError(entry.path, f"its size (width, height) is {upright}, annotated as {objects.size}")
        box = crop_box(picture.size, self.size, self.crop_fraction)
        framed, size = (self.size[1], self.size[0]), picture.size
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


def open_images(
    source: str | Path,
    split: str | None = None,
    target_or_size: Preprocessed | int | Size = 64,
    count: int | None = None,
    seed: int = 0,
    *,
    masks: bool = False,
    options: object = None,
) -> ImageSource:
    """Images of one split of a source, all of one size.

    source: "scenes" (made on first use) | "photographs" (ten real ones, offline) | a folder of images, of folders for
        each split, of COCO or ImageNet, or of tar shards (backsight.data.folders says which layouts there are).
    split: "train" | "validation" | "test" share no image. "all" is everything (not for scenes). None: "all" for a
        folder without splits, which is cut 8:1:1 otherwise, and "test" for all else.
    target_or_size: a target, whose own size, crop and interpolation are used; or (H, W) in pixels, or one side of a
        square: as much as possible, bicubic.
    count: at most this many, chosen by `seed` (a larger count contains the smaller ones), in stable order. For scenes:
        exactly this many (default 1024), `seed` being the seed of the scenes.
    masks: also read masks, boxes and labels (scenes and COCO only). options: SceneOptions, for scenes only.
    Raises SourceError, a sentence that says what is missing and what to do.
    """
    name = str(source)
    size, interpolation, crop_fraction = _wanted(target_or_size)
    if split not in (None, *SPLITS, "all"):
        raise SourceError(f"no split {split!r}; choose one of {', '.join((*SPLITS, 'all'))}")
    if count is not None and count < 1:
        raise SourceError(f"count is {count}; it is a number of images from 1")
    if options is not None and name != "scenes":
        raise SourceError(f"options are for the source 'scenes'; {name!r} has none: leave options out")
    if name in GENERATORS:
        module, function = GENERATORS[name].split(":")
        made: Generated = getattr(import_module(module), function)(split, count, seed, max(size), options)
        found = Found(made.split)
        files = {path.name: Entry(id, str(path)) for id, path in made.files.items()}
        annotations = made.annotations if masks else None
        found.add(annotations.parent if annotations else Path(), files, annotations, Part())
        crop_fraction = 1.0 if made.to_size else crop_fraction
    elif not (root := Path(source).expanduser()).exists():
        raise SourceError(f"there is no folder {root}, nor a source of that name; {nearest(name, tuple(GENERATORS))}")
    else:
        found = folder_entries(root, split, masks)
        name = root.resolve().name
    if masks and not any(entry.objects for entry in found.entries):
        raise SourceError(f"{name!r} has no masks: leave masks out, or open scenes or a COCO folder")
    entries = _chosen(found, count, seed, name not in GENERATORS and len(found.entries) <= VERIFIED_AT_OPEN)
    if found.skipped:
        _warn(name, found.skipped, " (`.skipped` lists them all)")
    if not entries:
        path, reason = found.skipped[0]
        raise SourceError(f"none of the {len(found.skipped)} images in {source} can be read; one is {path} ({reason})")
    return ImageSource(name, found.split, size, entries, interpolation, crop_fraction, found.classes, found.skipped)


def _wanted(target_or_size: Preprocessed | int | Size) -> tuple[Size, str, float]:
    """Size, interpolation and crop fraction."""
    if (preprocessing := getattr(target_or_size, "preprocessing", None)) is not None:
        if preprocessing.interpolation.upper() not in Image.Resampling.__members__:
            kinds = ", ".join(Image.Resampling.__members__).lower()
            raise SourceError(f"the target's interpolation {preprocessing.interpolation!r} is none of {kinds}")
        return preprocessing.size, preprocessing.interpolation, preprocessing.crop_fraction
    sides: Any = (target_or_size,) * 2 if isinstance(target_or_size, int) else target_or_size
    fits = isinstance(sides, tuple | list) and [isinstance(side, int) and side > 0 for side in sides] == [True, True]
    if not fits:
        raise SourceError(
            f"{sides!r} is neither a target nor a size, (height, width) in pixels or one side of a square"
        )
    return (sides[0], sides[1]), "bicubic", 1.0


def _warn(source: str, failures: Sequence[tuple[str, str]], remark: str) -> None:
    named = "; ".join(f"{Path(path).name} ({reason})" for path, reason in failures[:3])
    more = f" and {len(failures) - 3} more" if len(failures) > 3 else ""
    plural = "file" if len(failures) == 1 else "files"
    warnings.warn(f"{source}: {len(failures)} {plural} skipped{remark}: {named}{more}", stacklevel=3)


def _chosen(found: Found, count: int | None, seed: int, verify: bool) -> list[Entry]:
    """The first `count` entries in an order drawn from `seed`, back in the order of the source.

    verify: those whose header is no image's are skipped, and others taken in their place.
    """
    number = len(found.entries)
    order = np.arange(number) if count is None else np.random.default_rng(seed).permutation(number)
    kept: list[int] = []
    for index in order.tolist():
        if len(kept) == count:
            break
        entry = found.entries[index]
        try:
            if verify:
                with opened(entry.path, entry.member):
                    pass
            kept.append(index)
        except ImageError as error:
            found.skipped.append((error.path, error.reason))
    return [found.entries[index] for index in sorted(kept)]


# ---------------------------------------------------------------------------------------------------- batches

Failures = list[tuple[int, str, str]]  # (index, path, reason)


def batches(
    images: ImageSource | Tensor,
    batch_size: int,
    shuffle_seed: int | None = None,
    workers: int | Literal["auto"] = "auto",
    steps: int | None = None,
    start: int = 0,
    raw: bool = False,
) -> Iterator[Tensor]:
    """Batches of float (B, 3, H, W) in [0, 1], or, raw, as they are kept (uint8 is), read as they are asked for.

    images: an ImageSource, or a tensor (N, 3, H, W) of uint8 or of float in [0, 1]. steps=None: one pass, the last
    batch may be smaller. steps=n: batches 0 to n - 1 of an endless stream of epochs, all of full size. shuffle_seed:
    order of the images, another one for each epoch; None: their own order. Batch k depends on k, shuffle_seed and
    batch_size alone: `start` skips the first batches without reading them, for an exact resume. workers: processes
    that read ahead, "auto": as many as pay here; they do not change the result. An unreadable image is left out of its
    batch and recorded in `images.skipped`.
    Raises SourceError where nothing can be read. Random state outside is not touched.
    """
    if batch_size < 1 or start < 0 or (steps is not None and steps < 0):
        raise SourceError(f"batch_size {batch_size}, steps {steps}, start {start}: sizes begin at 1, the others at 0")
    if isinstance(images, Tensor) and (images.ndim != 4 or images.shape[1] != 3 or images.dtype == torch.int64):
        raise SourceError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; they are (N, 3, H, W), uint8 or float in [0, 1]"
        )
    if not len(images):
        raise SourceError("there are no images to make batches of")
    if workers == "auto":
        workers = paying_workers(len(images) if steps is None else (steps - start) * batch_size)
    return _batches(images, batch_size, shuffle_seed, workers, steps, start, raw)


def paying_workers(images: int) -> int:
    """Processes that read so many images ahead.

    Measured on two cores (256 JPEGs of 500 x 375 in batches of 32, 3 ms an image): beside a consumer that computes on
    both cores, one or two workers took as long as none, and small PNGs 1.5 times as long. So there are none on two
    cores. On more, one core is left to the consumer.
    """
    cores = available_cores()
    return min(cores - 1, 8) if cores > 2 and images >= WORTH_WORKERS else 0


def _batches(
    images: ImageSource | Tensor,
    batch_size: int,
    shuffle_seed: int | None,
    workers: int,
    steps: int | None,
    start: int,
    raw: bool,
) -> Iterator[Tensor]:
    number, failed = start, 0
    if steps is not None and number >= steps:
        return
    indices = index_batches(len(images), batch_size, shuffle_seed, endless=steps is not None, start=start)
    for stack, failures in read_batches(images, indices, workers):
        failed = 0 if stack is not None else failed + len(failures)
        if failed >= len(images):
            _, path, reason = failures[-1]
            raise SourceError(f"none of the {len(images)} images can be read; the last is {path} ({reason})")
        if stack is not None:
            number += 1
            yield stack if raw else unit_floats(stack)
        if number == steps:
            return


def unit_floats(images: Tensor) -> Tensor:
    """uint8 as float in [0, 1]; what is float is that already."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def read_batches(
    images: ImageSource | Tensor, indices: Iterable[np.ndarray], workers: int = 0
) -> Iterator[tuple[Tensor | None, Failures]]:
    """For each list of indices (B, 3, H, W) as it is kept, or None where nothing can be read, and what cannot be."""
    if isinstance(images, Tensor):
        for chosen in indices:
            yield images[torch.from_numpy(chosen)], []
        return
    sampler: Any = indices  # lists of indices
    own = torch.Generator().manual_seed(0)  # without one a DataLoader draws from the global random state
    loader = DataLoader(_Reader(images), batch_size=None, sampler=sampler, num_workers=workers, generator=own)
    for stack, failures in loader:
        images.skip([(path, reason) for _, path, reason in failures])
        yield stack, failures


class _Reader(Dataset[tuple[Tensor | None, Failures]]):
    """Reads a list of indices at once; failures travel with the batch: a worker has its own copy of the source."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __getitem__(self, indices: np.ndarray) -> tuple[Tensor | None, Failures]:
        read: list[Tensor] = []
        failures: Failures = []
        for index in indices.tolist():
            try:
                read.append(self.source.image(index))
            except ImageError as error:
                failures.append((index, error.path, error.reason))
        return (torch.stack(read) if read else None), failures


def index_batches(
    number: int, batch_size: int, shuffle_seed: int | None, endless: bool, start: int
) -> Iterator[np.ndarray]:
    """Lists of at most batch_size of `number` indices, from batch `start` on.

    Of one epoch (the last list may be shorter), or, where endless, across epochs and all of full size.
    shuffle_seed: another order for each epoch; None: their own order.
    """

    def order(epoch: int) -> np.ndarray:
        if shuffle_seed is None:
            return np.arange(number)
        return np.random.default_rng([shuffle_seed, epoch]).permutation(number)

    if not endless:
        indices = order(0)
        for first in range(start * batch_size, number, batch_size):
            yield indices[first : first + batch_size]
        return
    epoch, offset = divmod(start * batch_size, number)
    waiting = order(epoch)[offset:]
    while True:
        while len(waiting) < batch_size:
            epoch += 1
            waiting = np.concatenate([waiting, order(epoch)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def tensor(images: ImageSource | Tensor, limit: int | None = None) -> Tensor:
    """The first `limit` readable images (all of them by default) as one float tensor (N, 3, H, W) in [0, 1].

    Takes 12 bytes a pixel and image, and twice that for a moment. Raises SourceError where nothing can be read.
    """
    wanted = len(images) if limit is None else min(limit, len(images))
    read: list[Tensor] = []
    for batch in batches(images, min(wanted, 64)):
        read.append(batch)
        if sum(map(len, read)) >= wanted:
            break
    return torch.cat(read)[:wanted]
