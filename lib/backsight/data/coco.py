"""COCO annotations of images: masks, boxes, labels and crowds, in the frame of what is seen of each image."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from backsight.data.decode import ImageError
from backsight.errors import SourceError

Size = tuple[int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom


class ImageObjects(NamedTuple):
    """The objects of one image, in file order.

    size: (width, height) in which they were annotated, if the file says so; labels: {category id: index}.
    """

    file: str
    size: Size | None
    annotations: Sequence[Mapping[str, Any]]
    labels: Mapping[int, int]

    def read(self, path: str, size: Size, box: Box, framed: Size) -> dict[str, Tensor]:
        """What lies in the frame; an object without an outline, or of which no pixel is seen, is left out.

        path, size: of the image, (width, height); box: the part of it that is seen, in the frame of (H, W) = framed.
        masks (M, H, W) bool, boxes (M, 4) xyxy around them in pixels of the frame, labels (M,), crowd (M,) bool.
        Raises ImageError on a malformed annotation.
        """
        from torchvision.ops import masks_to_boxes  # takes long to import

        (left, top, right, bottom), (height, width) = box, framed
        rows = (top + (np.arange(height) + 0.5) * (bottom - top) / height).astype(int)
        columns = (left + (np.arange(width) + 0.5) * (right - left) / width).astype(int)
        masks, labels, crowd = [np.zeros((0, height, width), bool)], [], []
        for annotation in self.annotations:
            if annotation.get("segmentation") in (None, []):
                continue
            try:
                seen = _mask(annotation["segmentation"], size)[rows[:, None], columns]  # nearest neighbour
                label = self.labels[annotation["category_id"]]
            except Exception as error:  # pycocotools raises bare Exception for malformed polygons
                where = f"annotation {annotation.get('id')} in {self.file}"
                raise ImageError(path, f"{where} is malformed ({type(error).__name__} {error})") from error
            if seen.any():
                masks.append(seen[None])
                labels.append(label)
                crowd.append(bool(annotation.get("iscrowd", 0)))
        kept = torch.from_numpy(np.concatenate(masks))
        return {
            "masks": kept,
            "boxes": masks_to_boxes(kept).float() + torch.tensor([0, 0, 1, 1]),  # inclusive there
            "labels": torch.tensor(labels, dtype=torch.long),
            "crowd": torch.tensor(crowd, dtype=torch.bool),
        }


def read_annotations(path: Path) -> tuple[dict[str, ImageObjects], tuple[str, ...]]:
    """{file name: objects} and the names of the categories, of a file of COCO instances; labels are places among them.

    Raises SourceError for a file that is none, or whose ids name two things or nothing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        images, categories, annotations = (content[kind] for kind in ("images", "categories", "annotations"))
        categories = sorted(categories, key=lambda category: category["id"])
        labels = {category["id"]: place for place, category in enumerate(categories)}
        of_image = defaultdict(list)
        for annotation in annotations:
            of_image[annotation["image_id"]].append(annotation)
        sizes = {i["id"]: (i["width"], i["height"]) if "width" in i and "height" in i else None for i in images}
        objects = {i["file_name"]: ImageObjects(path.name, sizes[i["id"]], of_image[i["id"]], labels) for i in images}
        names = tuple(category["name"] for category in categories)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise SourceError(
            f"{path} is not a COCO instances file ({type(error).__name__} {error}): it needs images, annotations and "
            "categories; download or export it again"
        ) from error
    if len(sizes) < len(images) or len(labels) < len(categories):
        raise SourceError(f"{path} gives two images, or two categories, one id: number them anew")
    if annotations and not any(of_image[key] for key in sizes):
        raise SourceError(f"no image_id of the annotations in {path} is the id of an image: is one of them text?")
    if annotations and not any(annotation.get("segmentation") for annotation in annotations):
        raise SourceError(f"{path} has boxes but no masks: leave masks out")
    return objects, names


def of_files(objects: Mapping[str, ImageObjects], paths: Iterable[str]) -> dict[str, ImageObjects]:
    """{path: objects} of the files (relative, as posix) that are listed: by path, or by a base name that is unique."""
    often = Counter(Path(name).name for name in objects)
    by_name = {Path(name).name: found for name, found in objects.items() if often[Path(name).name] == 1}
    return {path: found for path in paths if (found := objects.get(path) or by_name.get(Path(path).name))}


def _mask(outline: Any, size: Size) -> np.ndarray:
    """(H, W) bool of polygons, or of run lengths, which must fill the image."""
    width, height = size
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
