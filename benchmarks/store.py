"""What the feature store costs and saves: training from it against features in memory, writing, disk and memory.

Under a minute on two cores. SIZE=full adds ViT-B/16 at 224 pixels, and takes minutes. The weights are random, which
changes no time.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from table import Row, compare, interleaved, write
from torch import Tensor

from backsight.data.features import FeatureStore, record_features
from backsight.data.images import batches, index_batches
from backsight.inverses.module import TrainedInverse
from backsight.representation import Representation
from backsight.targets import PIXELS, Target, load_target
from backsight.training.fit import fit_modular

FULL = os.environ.get("SIZE") == "full"
STEPS = 40 if FULL else 10
RECORDING_BATCH = 32
MEMORY_IMAGES = 128
FEATURE_BYTES = 8 * 65 * 128 * 4  # of an image: eight taps of scenes-vit

Batch = tuple[Tensor, Mapping[str, Representation]]


def _images(count: int, target: Target) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, *target.image_size), generator=generator, dtype=torch.uint8)


def _step(inverses: Mapping[str, TrainedInverse]) -> Callable[[Batch], None]:
    """A training step of all modules: the batch is all that it is given."""
    parameters = [each for inverse in inverses.values() for each in inverse.residual.requires_grad_(True).parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-4)

    def step(batch: Batch) -> None:
        images, recorded = batch
        losses = []
        for tap, inverse in inverses.items():
            ends: Any = inverse.raw(recorded[tap]), recorded.get(inverse.destination, images)
            losses.append(
                F.mse_loss(*(x if inverse.destination == PIXELS else x.values for x in ends)) / inverse.variance
            )
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()

    return step


def training(target: Target, count: int, batch_size: int) -> list[Row]:
    """Steps of modular training from the store, against the same steps from float32 features in memory."""
    images = _images(count, target)
    untrained = fit_modular(target, images, ridge_images=0, steps=0, progress=False)
    step = _step(untrained.modules)
    with tempfile.TemporaryDirectory() as folder:
        store = record_features(target, images, folder=folder, batch_size=RECORDING_BATCH, progress=False)
        pixels, features = store.read(range(count))

        def from_memory() -> Iterable[Batch]:
            stream = index_batches(count, batch_size, 0, endless=True)
            for _, indices in zip(range(STEPS), stream, strict=False):
                chosen = torch.from_numpy(indices)
                yield pixels[chosen], {tap: each.index(chosen) for tap, each in features.items()}

        def train(source: Iterable[Batch]) -> None:
            for batch in source:
                step(batch)

        seconds = interleaved(
            {"store": lambda: train(store.passes(batch_size, 0, STEPS)), "memory": lambda: train(from_memory())}
        )
    case = f"{len(target.taps)} taps of {target.name}, modular, batch {batch_size}"
    ours, theirs = (seconds[name] / STEPS for name in ("store", "memory"))
    return [compare("store", case, "seconds a step, store / memory", ours, "s", theirs, "<= 1.05")]


def recording(target: Target, count: int) -> list[Row]:
    """Recording, and reading what was recorded, against the plain forward pass; bytes and error of an image."""
    images = _images(count, target)
    stores: list[FeatureStore] = []
    with tempfile.TemporaryDirectory() as folder:

        def record() -> None:
            place = tempfile.mkdtemp(dir=folder)
            stores.append(record_features(target, images, folder=place, batch_size=RECORDING_BATCH, progress=False))

        def forward() -> None:
            for batch in batches(images, RECORDING_BATCH):
                target.record(batch)

        def read() -> None:
            for _ in stores[0].passes(RECORDING_BATCH, shuffle_seed=0):
                pass

        seconds = interleaved({"record": record, "forward": forward, "read": read})
        store = stores[0]
        features = sum(each.values[0].nbytes for each in store.read([0])[1].values())
        size = store.row.itemsize
        error = max(store.errors.values())
    case = f"{len(target.taps)} taps of {target.name}, {count} images"
    full = features + images[0].nbytes
    return [
        compare("store", case, "seconds, recording / forward", seconds["record"], "s", seconds["forward"], "< 1.5"),
        compare("store", case, "seconds, reading / forward", seconds["read"], "s", seconds["forward"], "< 0.2"),
        compare("store", case, "bytes an image, store / float32", size, "B", full, "< 0.6"),
        Row("store", case, "relative RMS error, worst tap", error, "1", 2.0**-11, error / 2.0**-11, "< 1"),
    ]


def _growth(count: int) -> int:
    """In a process of its own: bytes by which recording raises its peak."""
    target = load_target("scenes-vit", pretrained=False)
    images = _images(count, target)
    target.record(images[:RECORDING_BATCH].float() / 255)
    with tempfile.TemporaryDirectory() as folder:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        before = _kibibytes("VmRSS")
        record_features(target, images, folder=Path(folder), batch_size=RECORDING_BATCH, progress=False)
        return (_kibibytes("VmHWM") - before) * 1024


def _kibibytes(field: str) -> int:
    """Of this process, as Linux tells it."""
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


def memory() -> list[Row]:
    """Growth of the peak with four times the images: a batch or two, however many they are."""
    count = MEMORY_IMAGES * (4 if FULL else 1)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        few, many = pool.map(_growth, [count, 4 * count], chunksize=1)
    case = f"scenes-vit, {4 * count} images after {count}"
    more = 3 * count * FEATURE_BYTES
    return [
        compare(
            "store", case, "growth of the peak / float32 features of the further images", many - few, "B", more, "< 0.3"
        )
    ]


if __name__ == "__main__":
    small = load_target("scenes-vit", pretrained=False)
    rows = [*training(small, 512, 16), *recording(small, 256), *memory()]
    if FULL:
        large = load_target("vit_base_patch16_224", pretrained=False)
        rows += [*training(large, 64, 8), *recording(large, 64)]
    write("store", rows)
