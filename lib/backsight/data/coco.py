"""COCO annotations of images: masks, boxes, labels and crowds, in the frame of what is seen of each image."""

import contextlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backsight.data.decode import ImageError
from backsight.errors import SourceError

Record = dict[str, Any]
Size = tuple[int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom


class Annotations:
    """One file of COCO instances, read by pycocotools (in silence).

    classes: category names in the order of their ids; labels are indices into it. notes: [(file, what is odd)].
    Raises SourceError for a file that is none, or whose ids name two things or nothing.
    """

    def __init__(self, path: Path) -> None:
        from pycocotools.coco import COCO

        self.path = path
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco = COCO(str(path))
            images, categories, annotations = (
                self.coco.dataset[kind] for kind in ("images", "categories", "annotations")
            )
            self.images: dict[str, Record] = {image["file_name"]: image for image in images}
            self.classes = tuple(each["name"] for each in sorted(categories, key=lambda category: category["id"]))
            self.labels = {id: index for index, id in enumerate(sorted(self.coco.cats))}
            lost = sum(annotation["image_id"] not in self.coco.imgs for annotation in annotations)
            twice = len(self.coco.imgs) < len(images) or len(self.coco.cats) < len(categories)
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, OSError, RecursionError) as error:
            raise SourceError(
                f"{path} is not a COCO instances file ({type(error).__name__} {error}): it needs images, annotations "
                "and categories; download or export it again"
            ) from error
        if twice:
            raise SourceError(f"{path} gives two images, or two categories, one id: number them anew")
        if annotations and lost == len(annotations):
            raise SourceError(f"no image_id of the annotations in {path} is the id of an image: is one of them text?")
        if annotations and not any(annotation.get("segmentation") for annotation in annotations):
            raise SourceError(f"{path} has boxes but no masks: leave masks out")
        self.notes = [(str(path), f"{lost} annotations are of images that it does not list")] if lost else []

    def match(self, paths: Sequence[str]) -> dict[str, Record]:
        """{path: its image's record} of the files (relative, as posix) that are listed.

        A file is found by its path, or by its base name where only one file and one record have it.
        """
        on_disk, listed = (Counter(Path(name).name for name in names) for names in (paths, self.images))
        by_name = {Path(name).name: record for name, record in self.images.items() if listed[Path(name).name] == 1}
        alone = {path: by_name.get(Path(path).name) for path in paths if on_disk[Path(path).name] == 1}
        return {path: record for path in paths if (record := self.images.get(path) or alone.get(path))}


@dataclass(frozen=True)
class ImageObjects:
    """The objects of one image."""

    source: Annotations
    record: Record
    path: str

    @property
    def size(self) -> Size | None:
        """(width, height) in which the image was annotated, if the file says so."""
        return (self.record["width"], self.record["height"]) if {"width", "height"} <= self.record.keys() else None

    def read(self, size: Size, box: Box, framed: Size) -> dict[str, Tensor]:
        """What lies in the frame, in file order; an object that keeps no pixel is dropped.

        size: (width, height) of the image; box: the part of it that is seen, in the frame of (H, W) = framed.
        masks (M, H, W) bool, boxes (M, 4) xyxy in pixels of the frame, labels (M,), crowd (M,) bool.
        Raises ImageError on a malformed annotation.
        """
        annotations: list[Record] = self.source.coco.imgToAnns[self.record["id"]]
        masks = np.zeros((len(annotations), size[1], size[0]), dtype=bool)
        boxes, labels = np.zeros((len(annotations), 4)), np.zeros(len(annotations), dtype=np.int64)
        for i, annotation in enumerate(annotations):
            try:
                labels[i] = self.source.labels[annotation["category_id"]]
                masks[i] = _mask(annotation, size)
                boxes[i] = _box(annotation.get("bbox"), masks[i], size)
            except Exception as error:  # pycocotools raises bare Exception for malformed polygons
                where = f"annotation {annotation.get('id')} in {self.source.path.name}"
                raise ImageError(self.path, f"{where} is malformed ({type(error).__name__} {error})") from error
        crowd = np.array([bool(annotation.get("iscrowd", 0)) for annotation in annotations], dtype=bool)
        seen = _framed(masks, box, framed)
        boxes = _framed_boxes(boxes, seen, box, framed)
        kept = seen.any((1, 2)) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        return {
            "masks": torch.from_numpy(seen[kept]),
            "boxes": torch.from_numpy(boxes[kept]).float(),
            "labels": torch.from_numpy(labels[kept]),
            "crowd": torch.from_numpy(crowd[kept]),
        }


def _mask(annotation: Mapping[str, Any], size: Size) -> np.ndarray:
    """(H, W) bool of polygons, or of run lengths, which must fill the image."""
    from pycocotools import mask as coco_mask

    width, height = size
    outline = annotation.get("segmentation")
    if not outline:
        raise ValueError("it has a box but no mask")
    if isinstance(outline, list):
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(outline, height, width))).astype(bool)
    code = outline
    if isinstance(outline["counts"], list):
        code = coco_mask.frPyObjects(outline, height, width)
    mask = coco_mask.decode(code).astype(bool)
    filled = not isinstance(outline["counts"], list) or sum(outline["counts"]) == width * height
    if not filled or mask.shape != (height, width) or mask.sum() != coco_mask.area(code):  # decode() leaves the rest
        raise ValueError(f"its run lengths do not fill {width} x {height} pixels")  # as it finds it in memory
    return mask


def _box(box: Any, mask: np.ndarray, size: Size) -> Box:
    """Of an annotation in xyxy; of its mask where the box is missing, empty, or outside the image."""
    with contextlib.suppress(TypeError, ValueError):
        x, y, width, height = (float(side) for side in box)
        if 0 < width < np.inf and 0 < height < np.inf and -width < x < size[0] and -height < y < size[1]:
            return x, y, x + width, y + height
    return _bounds(mask)


def _bounds(mask: np.ndarray) -> Box:
    """The box around the pixels of a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)


def _framed(masks: np.ndarray, box: Box, framed: Size) -> np.ndarray:
    """(M, height, width) bool of the image to (M, H, W) bool of the frame, by nearest neighbour."""
    left, top, right, bottom = box
    rows = (top + (np.arange(framed[0]) + 0.5) * (bottom - top) / framed[0]).astype(int)
    columns = (left + (np.arange(framed[1]) + 0.5) * (right - left) / framed[1]).astype(int)
    return masks[:, rows[:, None], columns[None, :]]


def _framed_boxes(boxes: np.ndarray, masks: np.ndarray, box: Box, framed: Size) -> np.ndarray:
    """Boxes (M, 4) of the image in the frame; one that the frame cuts shrinks to what is seen of its mask there."""
    left, top, right, bottom = box
    across, down = framed[1] / (right - left), framed[0] / (bottom - top)
    moved = (boxes - (left, top, left, top)) * (across, down, across, down)
    inside = moved.clip(0, (framed[1], framed[0]) * 2)
    for i in np.flatnonzero((np.abs(inside - moved) > (across, down, across, down)).any(1)):
        seen = np.array(_bounds(masks[i]))
        inside[i] = (*np.maximum(inside[i, :2], seen[:2]), *np.minimum(inside[i, 2:], seen[2:]))
    return inside
