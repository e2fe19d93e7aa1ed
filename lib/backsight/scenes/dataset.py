"""Scenes as files in COCO's layout, and as the tensors that the shipped targets are trained on."""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.folders import Entry, Found
from backsight.errors import SourceError
from backsight.project import cache_folder
from backsight.scenes.render import CLASSES, DEFAULT_OPTIONS, VERSION, Rule, SceneOptions, render, render_many

SCENES_COUNT = 1024  # where no count is given
MEAN, STD = 0.5, 0.5  # of all channels
SIZE = 64
MAXIMUM_OBJECTS = 4
BACKGROUND = len(CLASSES)
_CHUNK = 2000  # scenes that a process renders at a time


@dataclass(frozen=True)
class SceneTensors:
    """Scenes with what the losses compare with. images: (N, 3, H, W) uint8; objects: (N, H, W) uint8, 0 = background,
    k = k-th object; labels: (N, 4), -1 = no object; boxes: (N, 4, 4) centre x, centre y, width, height in [0, 1]."""

    images: Tensor
    objects: Tensor
    labels: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def pixels(self) -> Tensor:
        """(N, 3, H, W) normalised."""
        return (self.images.float() / 255 - MEAN) / STD

    def take(self, chosen: np.ndarray | Tensor) -> SceneTensors:
        """Some of the scenes."""
        return SceneTensors(*(tensor[chosen] for tensor in vars(self).values()))


def _render_chunk(split: str, start: int, count: int, seed: int, rule: Rule) -> list[np.ndarray]:
    images = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    objects = np.zeros((count, SIZE, SIZE), np.uint8)
    labels = np.full((count, MAXIMUM_OBJECTS), -1, np.int64)
    boxes = np.zeros((count, MAXIMUM_OBJECTS, 4), np.float32)
    for i, scene in enumerate(render_many(split, count, seed, SIZE, SceneOptions(rule=rule), start)):
        images[i], number = scene.image, len(scene.labels)
        labels[i, :number] = scene.labels
        x, y, width, height = scene.boxes.T / SIZE
        boxes[i, :number] = np.stack([x + width / 2, y + height / 2, width, height], 1)
        for k, mask in enumerate(scene.masks):
            objects[i][mask] = k + 1
    return [images.transpose(0, 3, 1, 2), objects, labels, boxes]


def scene_tensors(split: str, count: int, seed: int = 0, rule: Rule = "mixed", processes: int = 1) -> SceneTensors:
    """Render a split into memory, 16 KB an image, on several processes."""
    starts = range(0, count, _CHUNK)
    work = repeat(split), starts, [min(_CHUNK, count - start) for start in starts], repeat(seed), repeat(rule)
    if processes <= 1:
        chunks = [*map(_render_chunk, *work)]
    else:
        with ProcessPoolExecutor(processes) as pool:
            chunks = [*pool.map(_render_chunk, *work)]
    return SceneTensors(*(torch.from_numpy(np.concatenate(parts)) for parts in zip(*chunks, strict=True)))


def drawn(count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """The indices of batch `step` of an endless shuffled stream: a function of (seed, step) only."""
    epoch, place = divmod(step, count // batch)
    return np.random.default_rng([seed, epoch]).permutation(count)[place * batch : (place + 1) * batch]


# ---------------------------------------------------------------------------------------------- COCO layout on disk


def write_coco(
    folder: Path, split: str, count: int, seed: int = 0, size: int = 64, options: SceneOptions = DEFAULT_OPTIONS
) -> None:
    """Render a split into `folder` in COCO's layout: `{split}2017/*.png`, `annotations/instances_{split}2017.json`.

    The annotations carry, beside COCO's own keys, the object's hue, texture and whether it dominates; the images
    carry the name of the photograph behind them.
    """
    from pycocotools import mask as coco_mask

    pictures = folder / f"{split}2017"
    pictures.mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    scenes = render_many(split, count, seed, size, options)
    for index, scene in enumerate(tqdm(scenes, desc=f"scenes {split}", total=count, leave=False)):
        name = f"{index:012d}.png"
        Image.fromarray(scene.image).save(pictures / name, compress_level=1)
        images.append({"id": index, "file_name": name, "height": size, "width": size, "background": scene.background})
        codes = coco_mask.encode(np.asfortranarray(scene.masks.transpose(1, 2, 0).astype(np.uint8)))
        for position, (code, hue) in enumerate(zip(codes, scene.hues.tolist(), strict=True)):
            annotations.append(
                {
                    **{"id": len(annotations) + 1, "image_id": index, "iscrowd": 0},
                    "category_id": int(scene.labels[position]) + 1,
                    "bbox": scene.boxes[position].tolist(),
                    "area": int(scene.masks[position].sum()),
                    "segmentation": {"size": code["size"], "counts": code["counts"].decode("ascii")},
                    "hue": None if math.isnan(hue) else hue,
                    **{"texture": scene.textures[position], "dominant": position == 0},
                }
            )
    categories = [{"id": i + 1, "name": c.name, "hue": c.hue} for i, c in enumerate(CLASSES)]
    information = {"description": "backsight scenes", "version": VERSION, "seed": seed, "options": asdict(options)}
    content = {"info": information, "images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def generated(
    split: str | None,
    count: int | None,
    seed: int,
    size: int,
    masks: bool,
    options: SceneOptions = DEFAULT_OPTIONS,
) -> Found:
    """Scenes of a split (default: test; 1024 where no count is given), as `open_images` asks for them."""
    split = split or "test"
    folder = cached(split, SCENES_COUNT if count is None else count, seed, size, options)
    files = {path.name: Entry(path.stem, str(path)) for path in sorted((folder / f"{split}2017").iterdir())}
    found = Found(split, to_size=True)
    found.add(files, folder / "annotations" / f"instances_{split}2017.json" if masks else None)
    return found


def generated_on_leaves(split: str | None, count: int | None, seed: int, size: int, masks: bool) -> Found:
    """Scenes whose backgrounds are dead leaves, as `open_images` asks for them: to train and to select inverses on."""
    if split not in ("train", "validation"):
        raise SourceError("scenes-on-leaves are for training (split train or validation); test on scenes")
    return generated(split, count, seed, size, masks, SceneOptions(background="leaves"))


def cached(split: str, count: int, seed: int = 0, size: int = 64, options: SceneOptions = DEFAULT_OPTIONS) -> Path:
    """The folder of `write_coco`, made on first use and kept; of several processes that ask at once, one makes it."""
    render(split, 0, seed, size, options)  # bad arguments are refused before anything is written
    key = json.dumps([VERSION, split, count, seed, size, asdict(options)], sort_keys=True)
    name = f"{split}-{count}-{size}px-seed{seed}-{sha256(key.encode()).hexdigest()[:10]}"
    scenes = cache_folder() / "scenes"
    folder, unfinished = scenes / name, scenes / f".making-{name}"
    if folder.is_dir():
        return folder
    scenes.mkdir(parents=True, exist_ok=True)
    with FileLock(scenes / f".{name}.lock"):
        if not folder.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
            write_coco(unfinished, split, count, seed, size, options)
            unfinished.rename(folder)
    return folder
