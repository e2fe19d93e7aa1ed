"""How much of an image each layer keeps: every inverse family at every tap, beside its null models.

One pass over the images: the target runs once a batch, and all training seeds, families and taps read the same
recording. What is measured beyond PSNR, SSIM and R² is handed in as measures (`detail.detail`, `cycle.cycle`, …).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, product
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import ImageSource, Preprocessed, images_at_once, open_images, tensor, unit_floats
from backsight.errors import BacksightError
from backsight.measures.agreement import Matches, average_precision
from backsight.measures.pixels import psnr, region_psnr, ssim
from backsight.measures.structure import Judged, Key, Measure, Ratio
from backsight.scenes.photographs import crops
from backsight.scenes.render import SPLIT_PHOTOGRAPHS
from backsight.studies.nulls import BySeed, Untrained, another, read_taps, with_nulls
from backsight.studies.objects import has_objects, objects_of
from backsight.tables.names import SHUFFLED_FAMILIES
from backsight.tables.pooling import influence
from backsight.tables.values import NO_SEED, Values
from backsight.targets import Target

KEPT = 8  # images that are kept, with what comes back of them
CELLS = 8  # rows and columns of an information map: patches of 8 x 8 pixels in the shipped targets
Place = tuple[str, str | None, str]  # inverse, family, tap


@dataclass
class Quality:
    """values: one an image, tap, inverse, family, training seed and measure; images: (K, 3, H, W) the first images;
    reconstructions: {family: {tap: (K, 3, H, W)}} of them, by the first training seed."""

    values: Values
    images: Tensor
    reconstructions: dict[str, dict[str, Tensor]]


@torch.no_grad()
def evaluate_quality(
    target: Target,
    images: ImageSource | Tensor,
    families: BySeed,
    mean_image: Tensor,
    untrained: Untrained | None = None,
    dataset: str | None = None,
    split: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    *,
    photographs: Sequence[str] | None = None,
    shuffled_families: Sequence[str] | None = None,
    measures: Sequence[Measure] = (),
    measured: int | None = None,
    maps_of: str = "",
) -> Quality:
    """Scores of every inverse on images that no inverse was trained on.

    images: ImageSource (with masks=True where objects are scored as well) or (N, 3, H, W) in [0, 1]; mean_image: (3, H,
    W) mean of the *training* images, `null_mean`; families, untrained: as of `by_seed`. `null_shuffled` is a family fed
    with another image's representation: shuffled_families, default the first of SHUFFLED_FAMILIES; column `family` says
    whose null a row is. photographs: (N,) what each image was cut from, where several are of one.

    Measures: psnr (dB), ssim, r2 (against the mean image), psnr_objects (dB, inside the masks), and what `measures`
    give for the first `measured` images (default all); of untrained targets these see only the first seed. maps_of: a
    family of which `patch_r2` is made too, R² of CELLS x CELLS parts of the picture (columns row, column).
    Raises BacksightError for fewer than two images.
    """
    if len(images) < 2:
        raise BacksightError("quality needs at least two images: shuffled features come from another image")
    if isinstance(images, ImageSource):
        dataset, split = dataset or images.name, split or images.split
    untrained = untrained or {}
    names = {family for of_seed in families.values() for family in of_seed}
    mixed = [f for f in SHUFFLED_FAMILIES if f in names][:1] if shuffled_families is None else shuffled_families
    of_others = {s: {f: of_seed[f] for f in mixed if f in of_seed} for s, of_seed in families.items()}
    taps, first, generator = read_taps(target, families), next(iter(families)), torch.Generator().manual_seed(seed)
    scores = _Scores(mean_image, len(images) if measured is None else measured, measures, maps_of)
    image_names: list[str] = []
    kept_images: list[Tensor] = []
    kept: dict[str, dict[str, list[Tensor]]] = {}
    with tqdm(total=len(images), desc=f"{target.name} on {dataset}", leave=False) as bar:
        for judged, ids in _judged(images, batch_size or images_at_once(images)):
            scores.start(judged)
            room = max(0, KEPT - len(image_names))
            kept_images.append(judged.images[:room])
            image_names += ids
            scores.note([("null_mean", None, tap) for tap in taps], NO_SEED, mean_image.expand_as(judged.images), True)
            recorded = target.record(judged.images, taps)
            others = {tap: recorded[tap].index(another(len(ids), generator)) for tap in taps if len(ids) > 1}
            several = with_nulls(recorded, families, others, of_others, judged.images, untrained)
            for inverse, family, tap, train_seed, pictures in several:
                detailed = inverse != "null_untrained" or train_seed == next(iter(untrained))
                scores.note([(inverse, family, tap)], train_seed, pictures, detailed)
                if room and inverse == family and train_seed == first:
                    kept.setdefault(family, {}).setdefault(tap, []).append(pictures[:room].clamp(0, 1))
            bar.update(len(ids))
    values = Values(target, dataset or "images", split or "test", image_names, photographs)
    scores.add_to(values)
    reconstructed = {family: {tap: torch.cat(parts) for tap, parts in per.items()} for family, per in kept.items()}
    return Quality(values, torch.cat(kept_images), reconstructed)


@dataclass
class _Scores:
    """The values of every reconstruction: `start` takes a batch, `note` reconstructions of it."""

    mean_image: Tensor
    measured: int
    measures: Sequence[Measure]
    maps_of: str
    collected: dict[tuple[Place, Key, int], list[Any]] = field(default_factory=dict)  # by training seed, of each batch

    def start(self, judged: Judged) -> None:
        self.judged = judged
        self.total = (judged.images - self.mean_image).square()
        self.most = max(0, min(len(judged.images), self.measured - int(judged.places[0])))
        self.prepared = [measure(judged.first(self.most)) for measure in self.measures] if self.most else []

    def note(self, places: Sequence[Place], train_seed: int, reconstruction: Tensor, detailed: bool) -> None:
        """places: several where their reconstruction is the same."""
        reconstruction, images = reconstruction.clamp(0, 1), self.judged.images
        error = (images - reconstruction).square()
        values: dict[Key, Any] = {"psnr": psnr(images, reconstruction), "ssim": ssim(images, reconstruction)}
        if self.judged.masks is not None:
            values["psnr_objects"] = region_psnr(error.mean(1), self.judged.masks)
        values["r2"] = Ratio(error.flatten(1).mean(1), self.total.flatten(1).mean(1), complement=True)
        if places[0][0] == self.maps_of:
            parts, wholes = (F.adaptive_avg_pool2d(x.mean(1, True), CELLS).flatten(1).T for x in (error, self.total))
            for cell, (part, whole) in enumerate(zip(parts, wholes, strict=True)):
                where = (("row", cell // CELLS), ("column", cell % CELLS))
                values["patch_r2", where] = Ratio(part, whole, complement=True)
        for measure in self.prepared if detailed else ():
            values |= measure(reconstruction[: self.most])
        plain = {key: _plain(value) for key, value in values.items()}
        for place, (key, value) in product(places, plain.items()):
            self.collected.setdefault((place, key, train_seed), []).append(value)

    def add_to(self, values: Values) -> None:
        for ((inverse, family, tap), key, train_seed), parts in self.collected.items():
            measure, further = (key, {}) if isinstance(key, str) else (key[0], dict(key[1]))
            numbers, weight = _joined(parts)
            values.add(measure, {train_seed: numbers}, tap, inverse, weight=weight, family=family, **further)


def _plain(value: Any) -> Any:
    """Numbers in the place of tensors: a hundred thousand small ones leave no room for large ones between them."""
    if isinstance(value, Ratio):
        return value.part.tolist(), value.whole.tolist(), value.complement
    return value.tolist() if isinstance(value, Tensor) else value


def _joined(parts: Sequence[Any]) -> tuple[Tensor | np.ndarray, Tensor | None]:
    """(N,) values of all batches and their weights; of average precision what each image contributes to it."""
    if isinstance(parts[0], tuple):  # of a Ratio
        *numbers, (complement, *_) = zip(*parts, strict=True)
        part, whole = (torch.tensor(list(chain.from_iterable(of_batches))) for of_batches in numbers)
        return (1 - part / whole if complement else part / whole), whole
    if isinstance(parts[0], Matches):
        matches = Matches(*(torch.cat(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))
        return influence(lambda weights: average_precision(matches, weights), len(matches.scores)), None
    return torch.tensor(list(chain.from_iterable(parts))), None


def _judged(images: ImageSource | Tensor, batch_size: int) -> Iterator[tuple[Judged, list[str]]]:
    """Batches, with the masks of all objects and of the largest where the source has them, and the images' names."""
    count = 0
    items = ({"image": image, "id": n} for n, image in enumerate(images)) if torch.is_tensor(images) else iter(images)
    while batch := list(islice(items, batch_size)):
        pictures = unit_floats(torch.stack([item["image"] for item in batch]))
        known = zip(*(objects_of(item)[:2] for item in batch), strict=True) if "masks" in batch[0] else ()
        largest, union = map(torch.stack, known) if known else (None, None)
        places = torch.arange(count, count + len(batch))
        yield Judged(pictures, union, largest, places), [str(item["id"]) for item in batch]
        count += len(batch)


def quality_images(
    source: str, target_or_size: Preprocessed | tuple[int, int], n: int, seed: int = 0
) -> tuple[ImageSource | Tensor, str, str, list[str] | None]:
    """Images to judge inverses on, none of which trained one: (images, data set, split, photograph of each or None).

    "photographs": crops of the test photographs. "scenes" and COCO come with the masks of their objects. A folder of
    photographs is taken whole (split "all"). n: at most this many.
    """
    if source == "photographs":
        size = getattr(target_or_size, "image_size", cast(tuple[int, int], target_or_size))
        pictures, cut_from = crops(SPLIT_PHOTOGRAPHS["test"], n, size, seed)
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, "photographs", "test", cut_from
    images = open_images(source, None, target_or_size, n, seed, masks=has_objects(source))
    return images, images.name, images.split, None


def gallery_images(
    source: str, target_or_size: Preprocessed | tuple[int, int], judged: ImageSource | Tensor, count: int, seed: int = 0
) -> Tensor:
    """(M, 3, H, W) in [0, 1]: the judged images first, then others of the same split, all different.

    M is `count` or more where the source has so many images, else all there are.
    """
    if count < 1:
        raise BacksightError(f"an image is found among some candidates, not among {count}")
    own = tensor(judged)
    more = tensor(quality_images(source, target_or_size, count, seed)[0]) if len(own) < count else own[:0]
    every = torch.cat([own, more])
    _, first = np.unique((every * 255).round().byte().flatten(1).numpy(), axis=0, return_index=True)
    return every[sorted({*range(len(own)), *first.tolist()})][: max(count, len(own))]
