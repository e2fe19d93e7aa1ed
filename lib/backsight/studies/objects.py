"""Images with their objects, of any source that tells them: masks, classes and boxes, the largest object first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from backsight.data.images import ImageSource, unit_floats
from backsight.errors import BacksightError
from backsight.measures.hue import hue_of, object_chroma


def has_objects(source: str) -> bool:
    """Whether a source tells the objects of its images: scenes, or a COCO root."""
    root = Path(source)
    return source == "scenes" or any((*root.glob("annotations/instances_*"), *root.glob("*/_annotations.coco.json")))


def objects_of(item: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masks (H, W) bool of the largest object and of all, labels (M,) and boxes (M, 4) of all, the largest first.

    item: of an ImageSource. Boxes are x, y, x, y as shares of the image; crowds are no objects. Of class folders the
    label alone is known, of others nothing (-1).
    """
    height, width = item["image"].shape[1:]
    real = (~item["crowd"]).nonzero().flatten() if "crowd" in item else ()
    if not len(real):
        nothing = torch.zeros(height, width, dtype=torch.bool)
        return nothing, nothing, torch.tensor([item.get("label", -1)]), torch.zeros(1, 4)
    largest = real[item["masks"][real].flatten(1).sum(1).argmax()]
    order = torch.cat([largest[None], real[real != largest]])
    masks, labels, boxes = (item[name][order] for name in ("masks", "labels", "boxes"))
    return masks[0], masks.any(0), labels, boxes / torch.tensor([width, height, width, height])


def _apart(item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Items of one object each, of those that have a hue."""
    pictures = unit_floats(item["image"]).expand(len(item["masks"]), -1, -1, -1)
    for which in np.flatnonzero(~np.isnan(hue_of(object_chroma(pictures, item["masks"])))):
        yield {**item, **{name: item[name][[which]] for name in ("masks", "labels", "boxes", "crowd")}}


@dataclass(frozen=True)
class Objects:
    """N images and what is known of their objects.

    images: (N, 3, H, W) uint8; masks: (N, H, W) bool, of the largest object, every: of all; labels: (N, M) int64 into
    `classes`, the largest object's first, -1 = none; boxes: (N, M, 4) x, y, x, y as shares of the image; photographs:
    (N,) their places in the source. name, split: of the data set.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    images: Tensor
    masks: Tensor
    every: Tensor
    labels: Tensor
    boxes: Tensor
    photographs: Tensor

    @classmethod
    def read(
        cls, images: ImageSource, count: int | None = None, minimum_area: float | None = None, apart: bool = False
    ) -> Self:
        """The first `count` images; minimum_area: of those with an object that covers this share of them at least.

        apart: every such object that has a hue, in an image of its own. Raises BacksightError where there is none.
        """
        items = (part for item in images for part in (_apart(item) if apart else [item]))
        every = ((item["image"], *objects_of(item), torch.tensor(item["index"])) for item in items)
        large = (
            row for row in every if minimum_area is None or (row[1].any() and row[1].float().mean() >= minimum_area)
        )
        if not (rows := list(islice(large, count))):
            raise BacksightError(
                f"no image of {images.name} has an object of {minimum_area or 0:.0%} of it: lower minimum_area"
            )
        *pictures, labels, boxes, places = (list(parts) for parts in zip(*rows, strict=True))
        padded = {"labels": pad_sequence(labels, True, -1), "boxes": pad_sequence(boxes, True)}
        padded["photographs"] = torch.stack(places)
        return cls(images.name, images.split, images.classes, *map(torch.stack, pictures), **padded)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labelled(self) -> bool:
        """Whether the class of every largest object is known."""
        return bool((self.labels[:, 0] >= 0).all())
