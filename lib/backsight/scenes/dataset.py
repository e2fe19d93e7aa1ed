"""The scenes that the shipped targets are trained on, as arrays and batches."""

from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.scenes.render import CLASSES, SceneOptions, render_many

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SIZE = 64
MAXIMUM_OBJECTS = 4
BACKGROUND = len(CLASSES)


@dataclass(frozen=True)
class SceneArrays:
    """A split as arrays. images: (N, H, W, 3) uint8; objects: (N, H, W) uint8, 0 = background, k = k-th object;
    labels: (N, 4) int64, -1 = no object; boxes: (N, 4, 4) float32 centre x, centre y, width, height in [0, 1]."""

    images: np.ndarray
    objects: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def _render_chunk(split: str, start: int, count: int, seed: int, rule: str) -> SceneArrays:
    images = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    objects = np.zeros((count, SIZE, SIZE), np.uint8)
    labels = np.full((count, MAXIMUM_OBJECTS), -1, np.int64)
    boxes = np.zeros((count, MAXIMUM_OBJECTS, 4), np.float32)
    options = SceneOptions(rule=rule)  # type: ignore[arg-type]
    for i, scene in enumerate(render_many(split, count, seed, SIZE, options, start)):
        images[i] = scene.image
        number = len(scene.labels)
        labels[i, :number] = scene.labels
        x, y, width, height = scene.boxes.T / SIZE
        boxes[i, :number] = np.stack([x + width / 2, y + height / 2, width, height], 1)
        for k, mask in enumerate(scene.masks):
            objects[i][mask] = k + 1
    return SceneArrays(images, objects, labels, boxes)


def scene_arrays(split: str, count: int, seed: int = 0, rule: str = "mixed", processes: int = 1) -> SceneArrays:
    """Render a split into memory, 16 KB an image, on several processes."""
    if processes <= 1:
        return _render_chunk(split, 0, count, seed, rule)
    from concurrent.futures import ProcessPoolExecutor

    starts = range(0, count, 2000)
    sizes = [min(2000, count - start) for start in starts]
    with ProcessPoolExecutor(processes) as pool:
        parts = list(pool.map(_render_chunk, repeat(split), starts, sizes, repeat(seed), repeat(rule)))
    fields = ("images", "objects", "labels", "boxes")
    return SceneArrays(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


@dataclass(frozen=True)
class Batch:
    """Some scenes on the device, with what the losses compare with."""

    pixels: Tensor  # (B, 3, H, W) normalised
    objects: Tensor  # (B, H, W) int64
    labels: Tensor  # (B, 4) int64, -1 = none
    boxes: Tensor  # (B, 4, 4)


def batch_of(data: SceneArrays, chosen: np.ndarray, device: str) -> Batch:
    arrays = (data.images, data.objects, data.labels, data.boxes)
    images, objects, labels, boxes = (torch.from_numpy(array[chosen]).to(device) for array in arrays)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
    return Batch(pixels.contiguous(), objects.long(), labels, boxes)


def drawn(count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """The indices of batch `step` of an endless shuffled stream: a function of (seed, step) only."""
    epoch, place = divmod(step, count // batch)
    return np.random.default_rng([seed, epoch]).permutation(count)[place * batch : (place + 1) * batch]


def patch_shares(batch: Batch, patch: int) -> Tensor:
    """Share of each patch that each class (and the background, last) covers: (B, N, classes + 1)."""
    lookup = torch.cat([torch.full_like(batch.labels[:, :1], BACKGROUND), batch.labels], 1)
    classes = lookup.gather(1, batch.objects.flatten(1)).view_as(batch.objects)
    one_hot = F.one_hot(classes, BACKGROUND + 1).float().permute(0, 3, 1, 2)
    return F.avg_pool2d(one_hot, patch).flatten(2).transpose(1, 2)
