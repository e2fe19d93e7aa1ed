"""How much of an image each layer keeps: every inverse family at every tap, beside its null models.

One pass over the images: the target runs once a batch, and all training seeds, families and taps read the same
recording. What is measured beyond PSNR, SSIM and R² is handed in as measures (`detail.detail`, `cycle.cycle`, …).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.decode import read_rgb
from backsight.data.images import ImageSource, Preprocessed, open_images, tensor
from backsight.errors import BacksightError
from backsight.inverses.families import Reconstruct
from backsight.measures.agreement import Matches, average_precision
from backsight.measures.pixels import PSNR_CEILING, region_psnr, ssim
from backsight.measures.structure import Judged, Key, Measure, Ratio
from backsight.scenes.photographs import PHOTOGRAPHS, crops
from backsight.scenes.render import SPLIT_PHOTOGRAPHS
from backsight.studies.nulls import shuffled
from backsight.tables.names import SHUFFLED_FAMILIES
from backsight.tables.pooling import influence
from backsight.tables.values import NO_SEED, Values
from backsight.targets import Target

Families = Mapping[str, Mapping[str, Reconstruct]]
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
    families: Mapping[int, Families],
    mean_image: Tensor,
    untrained: Mapping[int, tuple[Target, Families]] | None = None,
    dataset: str | None = None,
    split: str | None = None,
    seed: int = 0,
    batch_size: int = 50,
    keep: int = 8,
    progress: bool = True,
    *,
    photographs: Sequence[str] | None = None,
    shuffled_families: Sequence[str] | None = None,
    null_seeds: int | None = None,
    measures: Sequence[Measure] = (),
    measured: int | None = None,
    also_record: Sequence[str] = (),
    maps_of: str = "",
) -> Quality:
    """Scores of every inverse on images that no inverse was trained on.

    images: ImageSource (with masks=True where the object regions are to be scored as well) or (N, 3, H, W) in
    [0, 1]; families: {training seed: {family: {tap: inverse}}}; mean_image: (3, H, W) mean of the *training* images,
    the `null_mean`; untrained: {seed: (a target of the same architecture with random weights, {family: {tap:
    inverse}})}, the `null_untrained` of each family. `null_shuffled` is a family fed with another image's
    representation: shuffled_families, default the first of SHUFFLED_FAMILIES; column `family` says whose null a row is.
    photographs: (N,) what each image was cut from, where several are of one; null_seeds: training seeds that the
    shuffled and untrained nulls are made for, default all.

    Measures: mse, psnr (dB), ssim, r2 (against the mean image), psnr_objects (dB, inside the masks), and what
    `measures` give for the first `measured` images (default all); these read `also_record` taps beside the
    families', and of the nulls only the first seed. maps_of: a family of which `patch_r2` is made as well, R² of each
    of CELLS x CELLS parts of the picture (columns row, column). Raises BacksightError for fewer than two images.
    """
    if len(images) < 2:
        raise BacksightError("quality needs at least two images: shuffled features come from another image")
    dataset = dataset or (images.name if isinstance(images, ImageSource) else "images")
    split = split or (images.split if isinstance(images, ImageSource) else "test")
    first = next(iter(families))
    names = list(dict.fromkeys(family for each in families.values() for family in each))
    inverted = {tap for each in families.values() for inverses in each.values() for tap in inverses}
    taps = [tap for tap in target.available_taps if tap in inverted]
    if missing := inverted - set(taps):
        raise BacksightError(f"{target.name} has no taps {', '.join(sorted(missing))}: these inverses are of another")
    mixed = [f for f in SHUFFLED_FAMILIES if f in names][:1] if shuffled_families is None else list(shuffled_families)
    nulls = dict(list((untrained or {}).items())[:null_seeds])
    with_nulls = list(families)[:null_seeds]
    generator = torch.Generator().manual_seed(seed)
    scores = _Scores(mean_image, len(images) if measured is None else measured, measures, maps_of)
    image_names: list[str] = []
    kept_images: list[Tensor] = []
    kept: dict[str, dict[str, list[Tensor]]] = {}
    with tqdm(total=len(images), desc=f"{target.name} on {dataset}", leave=False, disable=not progress) as bar:
        for batch, masks, largest, ids in _with_masks(images, batch_size):
            recorded: dict[str, Any] = dict(target.record(batch, list(dict.fromkeys([*taps, *also_record]))))
            places = torch.arange(len(image_names), len(image_names) + len(batch))
            scores.start(Judged(batch, masks, largest, places, recorded))
            image_names += ids
            room = keep - sum(len(part) for part in kept_images)
            if room > 0:
                kept_images.append(batch[:room])
            mean = mean_image.expand_as(batch)
            for tap in taps:
                scores.note(("null_mean", None, tap), NO_SEED, mean, True)
                other = shuffled(recorded[tap], generator) if len(batch) > 1 else None
                for train_seed, of_seed in families.items():
                    for family, inverses in of_seed.items():
                        if tap not in inverses:
                            continue
                        reconstruction = inverses[tap](recorded[tap])
                        scores.note((family, family, tap), train_seed, reconstruction, True)
                        if room > 0 and train_seed == first:
                            kept.setdefault(family, {}).setdefault(tap, []).append(reconstruction[:room].clamp(0, 1))
                        if other is not None and family in mixed and train_seed in with_nulls:
                            null = ("null_shuffled", family, tap)
                            scores.note(null, train_seed, inverses[tap](other), train_seed == first)
            for number, (train_seed, (null_target, null_families)) in enumerate(nulls.items()):
                seen = {tap for inverses in null_families.values() for tap in inverses}
                null_recorded = null_target.record(batch, [tap for tap in null_target.available_taps if tap in seen])
                for family, inverses in null_families.items():
                    for tap, reconstruct in inverses.items():
                        null = ("null_untrained", family, tap)
                        scores.note(null, train_seed, reconstruct(null_recorded[tap]), number == 0)
            bar.update(len(batch))
    values = Values(target, dataset, split, image_names, photographs)
    for (inverse, own_family, tap), of_place in scores.collected.items():
        for key, by_seed in of_place.items():
            measure, further = (key, {}) if isinstance(key, str) else (key[0], dict(key[1]))
            for train_seed, parts in by_seed.items():
                numbers, weight = _joined(parts)
                at: dict[str, Any] = {"tap": tap, "inverse": inverse, "family": own_family, **further}
                values.add(measure, {train_seed: numbers}, weight=weight, **at)
    pictures = {family: {tap: torch.cat(parts) for tap, parts in per.items()} for family, per in kept.items()}
    return Quality(values, torch.cat(kept_images), pictures)


@dataclass
class _Scores:
    """Collects the values of every reconstruction: {(inverse, family, tap): {measure: {training seed: [values]}}}.

    `start` takes a batch and computes what its truth alone decides; `note` then takes reconstructions of it.
    """

    mean_image: Tensor
    measured: int
    measures: Sequence[Measure]
    maps_of: str
    collected: dict[Place, dict[Key, dict[int, list[Any]]]] = field(default_factory=dict)

    def start(self, judged: Judged) -> None:
        self.judged = judged
        self.total = (judged.images - self.mean_image).square()
        self.most = max(0, min(len(judged.images), self.measured - int(judged.places[0])))
        detailed = judged.first(self.most)
        self.prepared = [measure(detailed) for measure in self.measures] if self.most else []

    def note(self, place: Place, train_seed: int, reconstruction: Tensor, detailed: bool) -> None:
        reconstruction = reconstruction.clamp(0, 1)
        images, masks = self.judged.images, self.judged.masks
        error = (images - reconstruction).square()
        squared = error.mean(1)
        mse = squared.flatten(1).mean(1)
        values: dict[Key, Any] = {
            "mse": mse,
            "psnr": -10 * mse.clamp(min=10 ** (-PSNR_CEILING / 10)).log10(),
            "ssim": ssim(images, reconstruction),
        }
        if masks is not None:
            values["psnr_objects"] = region_psnr(squared, masks)
        values["r2"] = Ratio(mse, self.total.flatten(1).mean(1), complement=True)
        if place[0] == self.maps_of:
            parts, wholes = (_cells(each) for each in (error, self.total))
            for cell in range(CELLS * CELLS):
                where = (("row", cell // CELLS), ("column", cell % CELLS))
                values["patch_r2", where] = Ratio(parts[:, cell], wholes[:, cell], complement=True)
        if detailed:
            for measured in self.prepared:
                values |= measured(reconstruction[: self.most])
        at = self.collected.setdefault(place, {})
        for key, value in values.items():
            at.setdefault(key, {}).setdefault(train_seed, []).append(value)


def _cells(error: Tensor) -> Tensor:
    """(B, CELLS * CELLS) mean squared error of each part of the pictures."""
    return F.adaptive_avg_pool2d(error.mean(1, keepdim=True), CELLS).flatten(1)


def _joined(parts: Sequence[Any]) -> tuple[Tensor | np.ndarray, Tensor | None]:
    """(N,) values of all batches and their weights; of average precision what each image contributes to it."""
    if isinstance(parts[0], Ratio):
        whole = torch.cat([part.whole for part in parts])
        ratio = torch.cat([part.part for part in parts]) / whole
        return (1 - ratio if parts[0].complement else ratio), whole
    if isinstance(parts[0], Matches):
        names = ("scores", "classes", "hits", "truth")
        matches = Matches(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
        return influence(lambda weights: average_precision(matches, weights), len(matches.scores)), None
    return torch.cat(list(parts)), None


def _with_masks(
    images: ImageSource | Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None, list[str]]]:
    """Batches of (images (B, 3, H, W) in [0, 1], masks of all objects and of the largest (B, H, W) or None, names)."""
    if isinstance(images, Tensor):
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            part = part.float() / 255 if part.dtype == torch.uint8 else part
            yield part, None, None, [str(start + i) for i in range(len(part))]
        return
    items: list[dict[str, Any]] = []
    for item in images:
        items.append(item)
        if len(items) == batch_size:
            yield _stacked(items)
            items = []
    if items:
        yield _stacked(items)


def _stacked(items: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor | None, Tensor | None, list[str]]:
    pictures = torch.stack([item["image"] for item in items]).float() / 255
    names = [str(item["id"]) for item in items]
    if "masks" not in items[0]:
        return pictures, None, None, names
    nothing = torch.zeros(pictures.shape[2:], dtype=torch.bool)
    every = [item["masks"].bool() for item in items]
    union = torch.stack([masks.any(0) if len(masks) else nothing for masks in every])
    largest = torch.stack([masks[masks.flatten(1).sum(1).argmax()] if len(masks) else nothing for masks in every])
    return pictures, union, largest, names


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
    masked = source == "scenes" or (Path(source) / "annotations").is_dir()
    images = open_images(source, None, target_or_size, n, seed, masks=masked)
    return images, images.name, images.split, None


def gallery_images(
    source: str,
    target_or_size: Preprocessed | tuple[int, int],
    judged: ImageSource | Tensor,
    count: int,
    seed: int = 0,
) -> Tensor:
    """(M, 3, H, W) in [0, 1]: the judged images first, then others of the same split, all different.

    M is `count` or more where the source has so many images, else all there are.
    """
    own = tensor(judged)
    more = quality_images(source, target_or_size, count, seed)[0] if len(own) < count else own
    seen: dict[bytes, Tensor] = {}
    for picture in torch.cat([own, tensor(more)]):
        seen.setdefault((picture * 255).round().byte().numpy().tobytes(), picture)
    others = list(seen.values())[len(own) :]  # a judged image that is there twice leaves one place fewer
    return torch.cat([own, torch.stack(others)[: max(0, count - len(own))]]) if others else own


def picture(name: str, size: tuple[int, int]) -> Tensor:
    """(1, 3, H, W) in [0, 1]: the largest centred crop of a built-in photograph, or of the image file `name`."""
    if name in PHOTOGRAPHS:
        pixels = crops((name,), 1, size)[0][0]
    elif Path(name).is_file():
        image = Image.fromarray(read_rgb(name))
        placed = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
        pixels = np.asarray(placed)
    else:
        raise BacksightError(
            f"{name!r} is neither a file nor a built-in photograph: give a path, or one of {', '.join(PHOTOGRAPHS)}"
        )
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
