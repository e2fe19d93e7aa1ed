"""Images for targets and inverses: scenes, photographs, folders, tar shards, COCO and ImageNet, all read in one way.

Every source gives uint8 RGB images of one size. Splits never share an image. A file that cannot be read is
named in `ImageSource.skipped` with the reason, warned about once and left out; it never stops a run and is
never lost silently.
"""

import contextlib
import io
import json
import operator
import os
import re
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from backsight.errors import BacksightError, SourceError
from backsight.project import available_cores
from backsight.scenes.photographs import PHOTOGRAPHS, photograph_path

if TYPE_CHECKING:
    from backsight.data.tar import Member

SPLITS = ("train", "validation", "test")
SCENES_COUNT = 1024  # scenes are made to order: this many where no count is given
VERIFIED_AT_OPEN = 2000  # sources up to this size are decoded once when opened, larger ones as they are read

# Shares of the hash range. Folders without split sub-folders are cut in three; where a data set has a
# training and a held-out part, the held-out part is the test split and validation is cut from training.
_THREE_WAY = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
_VALIDATION_FROM = 0.9

# The split in a tar shard's name: train-0000.tar, imagenet1k-validation-07.tar.
_SHARD_SPLIT = re.compile(r"(?:^|[^a-z])(train|val|test)(?:ing|id|idation)?[^a-z]")

_READABLE = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# Images as well, but of kinds that Pillow does not read in every build: named as skipped, not passed over.
_UNREADABLE = (
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".xcf", ".exr", ".hdr"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"),
)
_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_FITS = ("crop", "pad", "stretch")
Fit = Literal["crop", "pad", "stretch"]


class ImageError(BacksightError):
    """One image that cannot be read. `path` is the file, `reason` why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot read the image {path}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.path, self.reason)


# -------------------------------------------------------------------------------------------- one file to RGB


def read_rgb(path: str | Path) -> np.ndarray:
    """One image file as upright uint8 (H, W, 3) sRGB.

    Grey is repeated, transparency is laid over white, 16-bit samples are scaled, CMYK goes through its own
    ICC profile where it has a valid one, the EXIF orientation is applied, and of an animation the first frame
    is read. Raises ImageError for anything that is no complete image, and for samples without an agreed white
    (32-bit or signed integers, floats outside [0, 1]).
    """
    return np.array(_decode(str(path)))


def _decode(path: str, upright: bool = True, preview: bool = False, member: "Member | None" = None) -> Image.Image:
    """An RGB image. `preview`: a JPEG may come out smaller, with all of its bytes read nevertheless.

    member: where the bytes lie when `path` is no file of its own.
    """
    try:
        with Image.open(path if member is None else io.BytesIO(member.read())) as image:
            if preview:
                image.draft(None, (64, 64))
            _mend(image)
            image.load()
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except FileNotFoundError:
        raise ImageError(path, "there is no such file") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plug-ins raise whatever a malformed file makes them stumble over
        reason = str(error).replace(repr(path), "the file").replace(path, "the file")
        raise ImageError(path, reason or type(error).__name__) from error


def _mend(image: ImageFile.ImageFile) -> None:
    """What Pillow gets wrong without a word, set right, or refused, before the pixels are decoded."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(284) == 2 and max(tags.get(258, (8,))) > 8:  # TIFF: planar configuration, bits per sample
        raise ValueError("16-bit TIFF with separate planes: save it interleaved, or as PNG")
    key = image.info.get("transparency")
    if image.format == "PNG" and key is not None and image.tile:
        # The transparent colour is in the file's own depth, the pixels come in eight bits.
        depth = image.tile[0][3]
        if depth == "RGB;16B":
            image.info["transparency"] = tuple(level >> 8 for level in key)
        elif depth in ("L;2", "L;4"):
            image.info["transparency"] = key * (85 if depth == "L;2" else 17)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image)
    if image.mode == "CMYK" and (profile := image.info.get("icc_profile")):
        image = _from_profile(image, profile)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of more than eight bits as L, or as LA where one level is declared transparent."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError("its float samples leave [0, 1], so that white is not known: save it with 8 or 16 bits")
        white = 1.0
    elif image.mode == "I" and image.format != "PPM":
        raise ValueError("32-bit or signed samples have no agreed white: save it with 8 or 16 unsigned bits")
    else:
        white = 2.0 ** (tags.get(258, (16,))[0]) - 1  # TIFF: bits per sample
    grey = (values.astype(np.float32) * (255 / white) + 0.5).astype(np.uint8)
    if tags.get(262) == 0:  # TIFF: zero is white, which Pillow undoes for eight bits only
        grey = 255 - grey
    if "transparency" not in image.info:
        return Image.fromarray(grey)
    alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))


def _from_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """CMYK to sRGB as the file's own profile describes it; a broken profile leaves the image as it is."""
    try:
        converted = ImageCms.profileToProfile(
            image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError):
        return image
    return converted or image


# ----------------------------------------------------------------------------------- geometry: image to frame


@dataclass(frozen=True)
class Frame:
    """Where an image comes to lie: the source rectangle `box` fills the top left (height, width) `content` of
    `size`.

    box: left, top, right, bottom in source pixels. content, size: (H, W) in pixels of the result.

        fit = "crop"       "pad"            "stretch"
        +--+----+--+       +--------+       +----------+
        |  | box|  |       | content|       | all of it|
        +--+----+--+       |--------|       +----------+
                           | padding|
    """

    box: tuple[float, float, float, float]
    content: tuple[int, int]
    size: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float]:
        """Result pixels per source pixel, across and down."""
        left, top, right, bottom = self.box
        return self.content[1] / (right - left), self.content[0] / (bottom - top)

    @property
    def padding(self) -> Tensor:
        """(H, W) bool, True where there is no image."""
        padding = torch.ones(self.size, dtype=torch.bool)
        padding[: self.content[0], : self.content[1]] = False
        return padding


def frame(height: int, width: int, size: tuple[int, int], fit: Fit) -> Frame:
    """The frame of a (height, width) image in `size`; "crop" is: resize the short side, then centre crop."""
    if fit == "stretch":
        return Frame((0.0, 0.0, float(width), float(height)), size, size)
    if fit == "pad":
        scale = min(size[0] / height, size[1] / width)
        content = (
            min(max(round(height * scale), 1), size[0]),
            min(max(round(width * scale), 1), size[1]),
        )
        return Frame((0.0, 0.0, float(width), float(height)), content, size)
    scale = max(size[0] / height, size[1] / width)
    across, down = min(size[1] / scale, width), min(size[0] / scale, height)
    left, top = (width - across) / 2, (height - down) / 2
    return Frame((left, top, min(left + across, width), min(top + down, height)), size, size)


def _framed(image: Image.Image, placed: Frame, resampling: Image.Resampling) -> Tensor:
    """uint8 (3, H, W); antialiased; padding is black."""
    height, width = placed.content
    if image.size != (width, height) or placed.box != (0, 0, width, height):
        image = image.resize((width, height), resampling, box=placed.box)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    if placed.content == placed.size:
        return pixels
    canvas = torch.zeros(3, *placed.size, dtype=torch.uint8)
    canvas[:, :height, :width] = pixels
    return canvas


def _framed_masks(masks: np.ndarray, placed: Frame) -> np.ndarray:
    """(M, height, width) bool in the source to (M, H, W) bool in the frame, by nearest neighbour."""
    left, top, right, bottom = placed.box
    height, width = placed.content
    rows = (top + (np.arange(height) + 0.5) * (bottom - top) / height).astype(int)
    columns = (left + (np.arange(width) + 0.5) * (right - left) / width).astype(int)
    framed = np.zeros((len(masks), *placed.size), dtype=bool)
    framed[:, :height, :width] = masks[:, rows[:, None], columns[None, :]]
    return framed


# ------------------------------------------------------------------------------------------- COCO annotations


class Annotations:
    """One `instances_*.json`, read by pycocotools (in silence).

    classes: category names in the order of their ids; labels are indices into it.
    """

    def __init__(self, path: Path) -> None:
        from pycocotools.coco import COCO

        self.path = path
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco = COCO(str(path))
            self.images = {Path(image["file_name"]).name: image for image in self.coco.imgs.values()}
            categories = sorted(self.coco.cats.values(), key=lambda category: category["id"])
        except (
            json.JSONDecodeError,
            UnicodeDecodeError,
            KeyError,
            TypeError,
            AssertionError,
            OSError,
        ) as error:
            raise SourceError(
                f"{path} is not a COCO instances file ({error}): download annotations_trainval2017.zip again"
            ) from error
        self.classes = tuple(category["name"] for category in categories)
        self._labels = {category["id"]: index for index, category in enumerate(categories)}

    def objects(self, path: str, placed: Frame) -> dict[str, Tensor]:
        """What lies in the frame of an image, in file order; an object that keeps no pixel is dropped.

        masks (M, H, W) bool, boxes (M, 4) xyxy in pixels of the frame, labels (M,), crowd (M,) bool.
        """
        record = self.images[Path(path).name]
        annotations = self.coco.imgToAnns[record["id"]]
        masks = np.zeros((len(annotations), record["height"], record["width"]), dtype=bool)
        boxes = np.zeros((len(annotations), 4))
        for i, annotation in enumerate(annotations):
            try:
                masks[i] = self.coco.annToMask(annotation)
                x, y, width, height = annotation["bbox"]
            except Exception as error:  # pycocotools raises bare Exception for malformed polygons
                reason = f"annotation {annotation.get('id')} in {self.path.name} is malformed ({error})"
                raise ImageError(path, reason) from error
            boxes[i] = x, y, x + width, y + height
        boxes = _framed_boxes(boxes, masks, placed)
        masks = _framed_masks(masks, placed)
        kept = masks.any((1, 2)) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        labels = np.array([self._labels[a["category_id"]] for a in annotations], dtype=np.int64)
        crowd = np.array([a.get("iscrowd", 0) for a in annotations], dtype=bool)
        return {
            "masks": torch.from_numpy(masks[kept]),
            "boxes": torch.from_numpy(boxes[kept]).float(),
            "labels": torch.from_numpy(labels[kept]),
            "crowd": torch.from_numpy(crowd[kept]),
        }


def _framed_boxes(boxes: np.ndarray, masks: np.ndarray, placed: Frame) -> np.ndarray:
    """Boxes (M, 4) xyxy of the source in the frame; a box that the crop cuts shrinks to what is seen."""
    left, top, right, bottom = placed.box
    clipped = boxes.copy()
    clipped[:, 0::2] = boxes[:, 0::2].clip(left, right)
    clipped[:, 1::2] = boxes[:, 1::2].clip(top, bottom)
    for i in np.flatnonzero((np.abs(clipped - boxes) > 1).any(1)):
        row, column = int(top), int(left)
        seen = masks[i, row : int(np.ceil(bottom)), column : int(np.ceil(right))]
        rows, columns = np.flatnonzero(seen.any(1)) + row, np.flatnonzero(seen.any(0)) + column
        if len(rows):
            clipped[i, :2] = np.maximum(clipped[i, :2], (columns[0], rows[0]))
            clipped[i, 2:] = np.minimum(clipped[i, 2:], (columns[-1] + 1, rows[-1] + 1))
    across, down = placed.scale
    return (clipped - (left, top, left, top)) * (across, down, across, down)


# ---------------------------------------------------------------------------------------------------- sources


class Entry(NamedTuple):
    """One image of a source: its id (unique and stable), its file, and what is known about it.

    member: where it lies in a tar shard; `path` is then "shard.tar::name", to be read by people only.
    """

    id: str
    path: str
    label: int | None = None
    annotations: Annotations | None = None
    member: "Member | None" = None


class ImageSource(Dataset[dict[str, Any]]):
    """Images of one split at one size; made by `open_images`.

    name: "scenes", "photographs" or the folder's name. split: "train", "validation", "test" or "all".
    size: (H, W). classes: names that "labels" and "label" are indices into, or ().
    skipped: [(path, reason)] of what could not be read so far.

    source[i] is a dictionary: "image" (3, H, W) uint8 RGB, "id", "index";
    with class folders "label"; with fit="pad" "padding" (H, W) bool, True where there is no image;
    with masks=True "masks" (M, H, W) bool, "boxes" (M, 4) xyxy in pixels of "image", "labels" (M,) and
    "crowd" (M,) bool. source[i] raises ImageError for a file that cannot be read; iteration, `batches` and
    `tensor` record such a file in `skipped` and go on.
    """

    def __init__(
        self,
        name: str,
        split: str,
        size: tuple[int, int],
        entries: Sequence[Entry],
        fit: Fit = "crop",
        interpolation: str = "bicubic",
        classes: tuple[str, ...] = (),
        skipped: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.name, self.split, self.size, self.classes = name, split, size, classes
        self.entries = entries
        self.fit, self.interpolation = fit, interpolation
        self._skipped = dict(skipped)
        self._warned = False

    def __repr__(self) -> str:
        height, width = self.size
        return f"ImageSource({self.name!r}, {self.split!r}, {len(self)} images of {height} x {width})"

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        picture, placed = self._read(entry)
        item: dict[str, Any] = {"image": picture, "id": entry.id, "index": index % len(self)}
        if entry.label is not None:
            item["label"] = entry.label
        if self.fit == "pad":
            item["padding"] = placed.padding
        if entry.annotations is not None:
            item |= entry.annotations.objects(entry.path, placed)
        return item

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self)):
            try:
                item = self[index]
            except ImageError as error:
                self.skip([(error.path, error.reason)])
            else:
                yield item

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return list(self._skipped.items())

    def skip(self, failures: Sequence[tuple[str, str]]) -> None:
        """Put files on the list of what cannot be read; the first one met while reading is warned about."""
        self._skipped.update(failures)
        if failures and not self._warned:
            self._warned = True
            _warn(self.name, failures, ", others as they are met; `.skipped` lists them all")

    def image(self, index: int) -> Tensor:
        """The image alone, (3, H, W) uint8. Raises ImageError."""
        return self._read(self.entries[index])[0]

    def _read(self, entry: Entry) -> tuple[Tensor, Frame]:
        picture = _decode(entry.path, member=entry.member)
        if entry.annotations is not None:
            # Annotators may have seen the file without its EXIF orientation: their frame decides.
            record = entry.annotations.images[Path(entry.path).name]
            annotated = (record["width"], record["height"])
            if picture.size != annotated:
                upright, picture = picture.size, _decode(entry.path, upright=False)
            if picture.size != annotated:
                sizes = f"{upright[0]} x {upright[1]}, annotated as {annotated[0]} x {annotated[1]}"
                raise ImageError(entry.path, f"its size is {sizes}")
        placed = frame(picture.height, picture.width, self.size, self.fit)
        return _framed(picture, placed, _INTERPOLATIONS[self.interpolation]), placed


def open_images(
    source: str | Path,
    split: str | None = None,
    size: int | tuple[int, int] = (64, 64),
    count: int | None = None,
    seed: int = 0,
    fit: Fit = "crop",
    interpolation: str = "bicubic",
    options: Any = None,
    masks: bool = False,
) -> ImageSource:
    """Images of one split of a source, all of one size.

    source: "scenes" (made on first use) | "photographs" (ten real ones, offline) | a folder of images,
        searched to its depths | a COCO root (annotations/instances_*.json, train2017/, val2017/) | a root
        with train/ and val/ (and perhaps validation/ or test/) of images or, as in ImageNet, of class
        folders | a folder of tar shards, train-*.tar and val-*.tar, of key.jpg and key.cls.
    split: "train" | "validation" | "test" share no image. Where a root has no validation part it is a tenth
        of the training part, chosen by a hash of the image id, and val is the test split. A plain folder is
        cut by hash 8:1:1. "all" is everything (not for scenes). None: "all" for a plain folder, "test"
        otherwise.
    size: (H, W) in pixels, or one side of a square. fit: "crop" (resize the short side, then centre crop) |
        "pad" (keep the aspect, black at the bottom or right, "padding" tells where) | "stretch".
    count: at most this many, chosen by `seed` (a larger count contains the smaller ones), in stable order.
        For scenes: exactly this many (default 1024), `seed` being the seed of the scenes.
    options: SceneOptions, for scenes only. masks: also read masks, boxes and labels (scenes and COCO only).
    Raises SourceError or ImageError, each a sentence that says what is missing and what to do.
    """
    side = _checked_size(size)
    _checked("fit", fit, _FITS)
    _checked("interpolation", interpolation, tuple(_INTERPOLATIONS))
    if split is not None:
        _checked("split", split, (*SPLITS, "all"))
    if count is not None and count < 1:
        raise SourceError(f"count is {count}; it is a number of images from 1")
    if options is not None and str(source) != "scenes":
        raise SourceError(f"options are for the source 'scenes'; {str(source)!r} has none: leave options out")
    classes: tuple[str, ...] = ()
    skipped: list[tuple[str, str]] = []
    if str(source) == "scenes":
        name = "scenes"
        split, entries, classes = _scenes(split, count or SCENES_COUNT, seed, max(side), options, masks)
    else:
        if str(source) == "photographs":
            name = "photographs"
            split, found = _photographs(split)
        else:
            root = Path(source).expanduser()
            name = root.resolve().name
            split, found, classes, skipped = _folder(root, split, masks)
        if masks and not any(entry.annotations for entry in found):
            raise SourceError(f"{str(source)!r} has no masks: leave masks out, or open scenes or a COCO folder")
        entries, broken = _chosen(found, count, seed, verify=name != "photographs")
        skipped += broken
    if skipped:
        _warn(str(source), skipped, "; `.skipped` lists them all")
    if not entries:
        raise SourceError(
            f"none of the {len(skipped)} images in {source} can be read; the first is {skipped[0][0]} ({skipped[0][1]})"
        )
    return ImageSource(name, split, side, entries, fit, interpolation, classes, skipped)


def _checked(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        nearest = [a for a in allowed if a.startswith(str(value)) and value]
        nearest = nearest or get_close_matches(str(value), allowed, n=1, cutoff=0.4)
        hint = f" (nearest: {nearest[0]!r})" if nearest else ""
        raise SourceError(f"no {what} {value!r}{hint}; choose one of {', '.join(allowed)}")


def _checked_size(size: int | tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = (size, size) if isinstance(size, int) else (operator.index(side) for side in size)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise SourceError(f"size is {size!r}; it is (height, width) in pixels, or one side of a square")
    return height, width


def _warn(source: str, failures: Sequence[tuple[str, str]], remark: str) -> None:
    named = "; ".join(f"{Path(path).name} ({reason})" for path, reason in failures[:3])
    more = f" and {len(failures) - 3} more" if len(failures) > 3 else ""
    plural = "file" if len(failures) == 1 else "files"
    warnings.warn(f"{source}: {len(failures)} {plural} skipped {remark}: {named}{more}", stacklevel=3)


# ----------------------------------------------------------------------------- what a source has: its entries


def _scenes(
    split: str | None, count: int, seed: int, side: int, options: Any, masks: bool
) -> tuple[str, list[Entry], tuple[str, ...]]:
    from backsight.scenes.render import SceneOptions, cached

    split = split or "test"
    _checked("split of scenes", split, SPLITS)
    folder = cached(split, count, seed, side, SceneOptions() if options is None else options)
    entries, classes, _ = _coco_part(_Part(folder / f"{split}2017"), masks)
    return split, entries, classes


def _photographs(split: str | None) -> tuple[str, list[Entry]]:
    from backsight.scenes.render import SPLIT_PHOTOGRAPHS

    split = split or "test"
    names = PHOTOGRAPHS if split == "all" else SPLIT_PHOTOGRAPHS[split]
    return split, [Entry(name, str(photograph_path(name))) for name in names]


@dataclass(frozen=True)
class _Part:
    """A folder, or that part of it whose ids hash into [low, high)."""

    folder: Path
    low: float = 0.0
    high: float = 1.0

    def holds(self, id: str) -> bool:
        whole = self.low == 0 and self.high == 1
        return whole or self.low <= _fraction(id) < self.high


def _fraction(id: str) -> float:
    """A number in [0, 1) that depends on the id alone: the same on every machine and for every seed."""
    return int.from_bytes(sha256(id.encode()).digest()[:6], "big") / 2**48


_Found = tuple[str, list[Entry], tuple[str, ...], list[tuple[str, str]]]


def _folder(root: Path, split: str | None, masks: bool) -> _Found:
    """Split, entries, classes and skipped files of a folder on disk, whatever its layout."""
    if not root.exists():
        nearest = get_close_matches(str(root), ("scenes", "photographs"), n=1)
        hint = f"did you mean {nearest[0]!r}" if nearest else "give 'scenes', 'photographs' or the path of a folder"
        raise SourceError(f"there is no folder {root}: {hint}")
    if not root.is_dir():
        raise SourceError(f"{root} is a file: give the folder of images that holds it")
    listing = _children(root)
    annotated = any((root / "annotations").glob("instances_*.json"))
    if annotated or any(f"{part}2017" in listing for part in ("train", "val")):
        return _coco(root, split or "test", masks)
    if {"train", "val", "validation"} & set(listing) and not any(_is_image(name) for name in listing.values()):
        return _split_folder(root, split or "test")
    shards = [name for name in listing.values() if name.lower().endswith(".tar")]
    if shards and not any(not name or _is_image(name) for name in listing.values()):
        return _tar_shards(root, sorted(shards), split)
    return _plain_folder(root, split or "all")


def _plain_folder(root: Path, split: str) -> _Found:
    part = _Part(root) if split == "all" else _Part(root, *_THREE_WAY[split])
    paths, skipped = _listed(root)
    entries = [Entry(path, str(root / path)) for path in paths if part.holds(path)]
    if not entries:
        raise SourceError(
            f"split {split!r} of {root} is empty: its {len(paths)} images are cut 8:1:1 by a hash of "
            "their names; open it with split='all'"
        )
    return split, entries, (), skipped


def _split_folder(root: Path, split: str) -> _Found:
    """train/, val/, … of images or of class folders, as ImageNet has them."""
    present = {name: root / name for name in ("train", "val", "validation", "test") if (root / name).is_dir()}
    layout = present.get("train") or present.get("val") or present["validation"]
    classes = tuple(sorted(name for name, child in _children(layout).items() if not child))
    if classes and "test" in present and all(_children(present["test"]).values()):
        del present["test"]  # ImageNet's own test images come without classes
    parts = _parts(present, split)
    if not parts:
        raise SourceError(
            f"{root} has no folder for split {split!r} (it has {', '.join(present)}): add "
            + ("val/" if split == "test" else "train/")
        )
    number = {name: index for index, name in enumerate(classes)}
    entries: list[Entry] = []
    skipped: list[tuple[str, str]] = []
    for part in parts:
        paths, unread = _listed(part.folder)
        skipped += unread
        for path in paths:
            if part.holds(path):
                id = f"{part.folder.name}/{path}"
                entries.append(Entry(id, str(part.folder / path), number.get(path.split("/")[0])))
    _refuse_empty(entries, root, split)
    return split, entries, classes, skipped


def _tar_shards(root: Path, names: Sequence[str], split: str | None) -> _Found:
    """Shards named after their split, as imagenet1k-train-0000.tar; those named after none are cut as a plain folder.

    The held-out shards may be called val, valid or validation: it is one part, whatever its publisher writes.
    """
    from backsight.data.tar import Member, index_shards

    shards: dict[str, list[Path]] = {}
    for name in names:
        word = _SHARD_SPLIT.search(name.lower())
        shards.setdefault(word[1] if word else "", []).append(root / name)
    if "" not in shards:
        split = split or "test"
        if {"train", "test"} <= shards.keys():
            labelled = {name: index_shards(shards[name][:1], _READABLE)[0][0].label for name in ("train", "test")}
            if labelled["train"] is not None and labelled["test"] is None:
                del shards["test"]  # as above: ImageNet's own test images come without classes
        parts = [(shards[part.folder.name], part) for part in _parts({name: root / name for name in shards}, split)]
    elif len(shards) == 1:
        split = split or "all"
        parts = [(shards[""], _Part(root) if split == "all" else _Part(root, *_THREE_WAY[split]))]
    else:
        raise SourceError(f"{root} holds {shards[''][0].name} beside shards of named splits: call it train-… or val-…")
    if not parts:
        have = ", ".join(shards)
        raise SourceError(
            f"{root} has no shards for split {split!r} (it has {have}): add "
            + ("val-*.tar" if split == "test" else "train-*.tar")
        )
    entries = []
    for paths, part in parts:
        for shard, images in zip(paths, index_shards(paths, _READABLE), strict=True):
            for image in images:
                id = f"{shard.stem}/{image.name}"
                if part.holds(id):
                    member = Member(str(shard), image.offset, image.size)
                    entries.append(Entry(id, f"{shard}::{image.name}", image.label, None, member))
    _refuse_empty(entries, root, split)
    return split, entries, (), []


def _coco(root: Path, split: str, masks: bool) -> _Found:
    names = ["train", "val", "validation"]
    if (root / "annotations" / "instances_test2017.json").is_file():
        names.append("test")  # COCO's own test images come without instances
    present = {name: root / f"{name}2017" for name in names if (root / f"{name}2017").is_dir()}
    parts = _parts(present, split)
    if not parts:
        wanted = "val2017" if split == "test" else "train2017"
        raise SourceError(
            f"{root} has no folder {wanted} for split {split!r}: download {wanted}.zip of COCO 2017 "
            f"(and annotations_trainval2017.zip) and unpack both into {root}"
        )
    entries: list[Entry] = []
    classes: tuple[str, ...] = ()
    skipped: list[tuple[str, str]] = []
    for part in parts:
        more, names_here, unread = _coco_part(part, masks)
        if entries and names_here != classes:
            raise SourceError(f"the parts of {root} list different categories: open one split at a time")
        classes = names_here
        entries += more
        skipped += unread
    _refuse_empty(entries, root, split)
    return split, entries, classes, skipped


def _coco_part(part: _Part, masks: bool) -> tuple[list[Entry], tuple[str, ...], list[tuple[str, str]]]:
    """Entries of one `…2017` folder, classes, skipped files; the id of an image is its file name's stem."""
    paths, skipped = _listed(part.folder)
    chosen = {path: Path(path).stem for path in paths}
    chosen = {path: id for path, id in chosen.items() if part.holds(id)}
    if not masks:
        return [Entry(id, str(part.folder / path)) for path, id in chosen.items()], (), skipped
    file = part.folder.parent / "annotations" / f"instances_{part.folder.name}.json"
    if not file.is_file():
        raise SourceError(
            f"masks need {file}, which is missing: download annotations_trainval2017.zip of COCO 2017 and "
            f"unpack it into {part.folder.parent}, or open it with masks=False"
        )
    annotations = Annotations(file)
    entries = []
    for path, id in chosen.items():
        if Path(path).name in annotations.images:
            entries.append(Entry(id, str(part.folder / path), None, annotations))
        else:
            skipped.append((str(part.folder / path), f"{file.name} does not list it"))
    on_disk = {Path(path).name for path in paths}
    for name in sorted(annotations.images.keys() - on_disk):
        if part.holds(Path(name).stem):
            skipped.append((str(part.folder / name), f"listed in {file.name}, but not on disk"))
    return entries, annotations.classes, skipped


def _parts(present: dict[str, Path], split: str) -> list[_Part]:
    """Which folders, or which part of one, make up a split; present: the folders called train, val,
    validation, test.

    Without a test folder the held-out val is the test split; without a validation folder it is cut from
    train.
    """
    folders = dict(present)
    if "val" in folders:
        folders.setdefault("validation" if "test" in folders else "test", folders.pop("val"))
    if split == "all":
        return [_Part(folders[name]) for name in SPLITS if name in folders]
    if "train" in folders and "validation" not in folders:
        if split == "train":
            return [_Part(folders["train"], 0.0, _VALIDATION_FROM)]
        if split == "validation":
            return [_Part(folders["train"], _VALIDATION_FROM, 1.0)]
    return [_Part(folders[split])] if split in folders else []


def _refuse_empty(entries: Sequence[Entry], root: Path, split: str) -> None:
    if not entries:
        raise SourceError(f"split {split!r} of {root} holds no image: add images, or choose another split")


# ------------------------------------------------------------------------------------------ files of a folder


def _children(folder: Path) -> dict[str, str]:
    """Visible names in a folder: to themselves for files, to "" for folders."""
    try:
        with os.scandir(folder) as found:
            return {child.name: "" if child.is_dir() else child.name for child in found if child.name[0] != "."}
    except OSError as error:
        raise SourceError(f"cannot look into {folder}: {error.strerror}") from error


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _READABLE


def _listed(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Image files below a folder as sorted relative paths, and image files of kinds that cannot be read."""
    paths: list[str] = []
    unreadable: list[tuple[str, str]] = []
    extensions: Counter[str] = Counter()
    seen: set[str] = set()
    open_folders = [""]
    while open_folders:
        inside = open_folders.pop()
        real = os.path.realpath(folder / inside)
        if real in seen:  # a link back to a folder above
            continue
        seen.add(real)
        for name, file in _children(folder / inside).items():
            path = f"{inside}/{name}" if inside else name
            extension = os.path.splitext(name)[1].lower()
            if not file:
                open_folders.append(path)
            elif extension in _READABLE:
                paths.append(path)
            else:
                extensions[extension or "no extension"] += 1
                if extension in _UNREADABLE:
                    unreadable.append(
                        (str(folder / path), f"{extension} files are not supported: convert to PNG or JPEG")
                    )
    if not paths:
        if not extensions:
            raise SourceError(f"the folder {folder} is empty: put images into it")
        found = ", ".join(f"{extension} ({number})" for extension, number in extensions.most_common(5))
        raise SourceError(
            f"the folder {folder} holds no images, only {found}: images end in .jpg, .png, .webp, .tif, .gif or .bmp"
        )
    return sorted(paths), sorted(unreadable)


def _chosen(
    entries: Sequence[Entry], count: int | None, seed: int, verify: bool
) -> tuple[list[Entry], list[tuple[str, str]]]:
    """The first `count` readable entries in an order drawn from `seed`, back in the order of the source."""
    order = np.arange(len(entries)) if count is None else np.random.default_rng(seed).permutation(len(entries))
    wanted = len(entries) if count is None else min(count, len(entries))
    if not verify or len(entries) > VERIFIED_AT_OPEN:
        return [entries[i] for i in sorted(order[:wanted])], []
    kept: list[int] = []
    broken: list[tuple[str, str]] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        start = 0
        while len(kept) < wanted and start < len(order):
            tried = order[start : start + wanted - len(kept)]
            for i, error in zip(tried, threads.map(_failure, (entries[i] for i in tried)), strict=True):
                if error is None:
                    kept.append(int(i))
                else:
                    broken.append((error.path, error.reason))
            start += len(tried)
    return [entries[i] for i in sorted(kept)], sorted(broken)


def _failure(entry: Entry) -> ImageError | None:
    try:
        _decode(entry.path, preview=True, member=entry.member)
    except ImageError as error:
        return error
    return None


# ---------------------------------------------------------------------------------------------------- batches


def batches(
    images: ImageSource | Tensor,
    batch_size: int,
    shuffle_seed: int | None = None,
    workers: int | Literal["auto"] = 0,
    steps: int | None = None,
    start: int = 0,
) -> Iterator[Tensor]:
    """Batches of float (B, 3, H, W) in [0, 1], read as they are asked for.

    images: an ImageSource, or a tensor (N, 3, H, W) of uint8 or of float in [0, 1].
    steps=None: one pass, the last batch may be smaller. steps=n: batches 0 to n - 1 of an endless stream of
    epochs, all of full size. shuffle_seed: order of the images, another one for each epoch; None: their own
    order. Batch k depends on k, shuffle_seed and batch_size alone: `start` skips the first batches without
    reading them, for an exact resume. workers: processes that read ahead, "auto": as many as pay on this machine;
    they do not change the result. An unreadable image is left out of its batch and recorded in `images.skipped`.
    Raises SourceError where nothing can be read, and where such a process is killed. Random state outside is not
    touched.
    """
    if batch_size < 1 or start < 0 or (steps is not None and steps < 0):
        raise SourceError(
            f"batch_size {batch_size}, steps {steps} and start {start}: sizes begin at 1, the others at 0"
        )
    if isinstance(images, Tensor):
        _checked_tensor(images)
    if not len(images):
        raise SourceError("there are no images to make batches of")
    if workers == "auto":
        workers = _paying_workers(-(-len(images) // batch_size) if steps is None else steps - start)
    elif not isinstance(workers, int) or workers < 0:
        raise SourceError(f"workers is {workers!r}; it is 'auto' or a number of processes from 0")
    return _batches(images, batch_size, shuffle_seed, workers, steps, start)


def _paying_workers(number: int) -> int:
    """Processes that read `number` batches ahead.

    Measured on two cores (256 JPEGs of 500 x 375 in batches of 32, 3 ms an image): beside a consumer that computes
    on both cores for half a second a batch, one or two workers took as long as none, 0.97 to 1.05 of it, since reading
    takes what computing loses; the 1024 scenes of the embedded data took 1.5 times as long with them. So there are none
    on two cores. On more, one core is left to the consumer.
    """
    cores = available_cores()
    return 0 if cores <= 2 else max(min(cores - 1, 8, number), 0)


def _batches(
    images: ImageSource | Tensor,
    batch_size: int,
    shuffle_seed: int | None,
    workers: int,
    steps: int | None,
    start: int,
) -> Iterator[Tensor]:
    indices = index_batches(len(images), batch_size, shuffle_seed, endless=steps is not None, start=start)
    if isinstance(images, Tensor):
        for number, chosen in enumerate(indices, start):
            if steps is not None and number >= steps:
                return
            yield _unit(images[torch.from_numpy(chosen)])
        return
    reader = _Reader(images)
    fetched = _read_ahead(reader, indices, workers) if workers else (reader[chosen] for chosen in indices)
    number, failed = start, 0
    while steps is None or number < steps:
        stack, failures = next(fetched, (None, None))
        if failures is None:
            break
        images.skip(failures)
        if stack is None:
            failed += len(failures)
            if failed >= len(images):
                break
            continue
        failed = 0
        number += 1
        yield _unit(stack)
    if number == start and failed:
        path, reason = images.skipped[-1]
        raise SourceError(f"none of the images of {images.name} can be read; the last is {path} ({reason})")


def _read_ahead(
    reader: "_Reader", indices: Iterator[np.ndarray], workers: int
) -> Iterator[tuple[Tensor | None, list[tuple[str, str]]]]:
    """What the reader gives for each list of indices, read by processes.

    Raises SourceError, at the batch that is asked for, where one of them has died.
    """
    # torch's handler of SIGCHLD would raise wherever the caller happens to be; without it DataLoader itself finds
    # the dead process, within seconds, when the next batch does not come.
    handler = signal.getsignal(signal.SIGCHLD)
    # A sampler of index lists, and its own generator: without one DataLoader draws from the global random state.
    sampler: Any = indices
    fetched = iter(
        DataLoader(
            reader,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            collate_fn=_unchanged,
            generator=torch.Generator().manual_seed(0),
        )
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    while True:
        try:
            batch = next(fetched, None)
        except (RuntimeError, OSError, EOFError) as error:
            reason = str(error) or type(error).__name__
            if reason.startswith("Caught"):  # raised by the reader itself: an error of this program
                raise
            raise SourceError(
                f"a process that reads {reader.source.name} ahead was killed ({reason.splitlines()[0].rstrip('.')}): "
                "probably the memory ran out; use fewer workers (0 reads without them) or a smaller batch_size"
            ) from None
        if batch is None:
            return
        yield batch


class _Reader(Dataset[tuple[Tensor | None, list[tuple[str, str]]]]):
    """Reads a list of indices at once: what could be read as uint8 (B, 3, H, W), and what could not, with
    reasons.

    Failures travel with the batch because a worker process has its own copy of the source.
    """

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __getitem__(self, indices: np.ndarray) -> tuple[Tensor | None, list[tuple[str, str]]]:
        read: list[Tensor] = []
        failures: list[tuple[str, str]] = []
        for index in indices.tolist():
            try:
                read.append(self.source.image(index))
            except ImageError as error:
                failures.append((error.path, error.reason))
        return (torch.stack(read) if read else None), failures


def _unchanged(fetched: Any) -> Any:
    return fetched


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
        for first in range(start * batch_size, number, batch_size):
            yield order(0)[first : first + batch_size]
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

    Takes 12 bytes a pixel and image. Raises SourceError where nothing can be read.
    """
    if limit is not None and limit < 1:
        raise SourceError(f"limit is {limit}; it is a number of images from 1")
    wanted = len(images) if limit is None else min(limit, len(images))
    result: Tensor | None = None
    filled = 0
    for batch in batches(images, min(wanted, 64) or 1):
        batch = batch[: wanted - filled]
        if result is None:
            result = batch.new_empty(wanted, *batch.shape[1:])
        result[filled : filled + len(batch)] = batch
        filled += len(batch)
        if filled == wanted:
            break
    if result is None:
        raise SourceError("there are no images to stack")
    return result[:filled]


def _unit(images: Tensor) -> Tensor:
    """uint8 to float in [0, 1]; float stays as it is."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def _checked_tensor(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise SourceError(f"images have the shape {tuple(images.shape)}; they are (N, 3, H, W)")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise SourceError(f"images are {images.dtype}; they are uint8, or float in [0, 1]")
