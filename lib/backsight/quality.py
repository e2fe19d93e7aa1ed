"""How much of an image each layer keeps: every inverse family at every tap, beside its null models.

One pass over the images: the target runs once a batch, all families and taps read the same recording.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor

from backsight.data import ImageSource, open_images, read_rgb
from backsight.errors import BacksightError
from backsight.families import Reconstruct
from backsight.measures import determination, metrics_row, metrics_rows, score, shuffled
from backsight.photographs import PHOTOGRAPHS, crops
from backsight.progress import progress_bar
from backsight.scenes import SPLIT_PHOTOGRAPHS
from backsight.targets import Target

Families = Mapping[str, Mapping[str, Reconstruct]]
SHUFFLED_FAMILIES = ("modular", "linear", "direct")  # whose inverse makes `null_shuffled`: the first that is there


@dataclass(frozen=True)
class Quality:
    """metrics: tidy rows (METRIC_COLUMNS); per_image: target, dataset, tap, inverse, image, psnr, ssim;
    images: (K, 3, H, W) the first images; reconstructions: {family: {tap: (K, 3, H, W)}} of them."""

    metrics: pd.DataFrame
    per_image: pd.DataFrame
    images: Tensor
    reconstructions: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@torch.no_grad()
def evaluate_quality(
    target: Target,
    images: ImageSource | Tensor,
    families: Families,
    mean_image: Tensor,
    untrained: tuple[Target, Mapping[str, Reconstruct]] | None = None,
    dataset: str | None = None,
    split: str | None = None,
    seed: int = 0,
    batch_size: int = 50,
    keep: int = 8,
    progress: bool = True,
) -> Quality:
    """Scores of every inverse on images that no inverse was trained on.

    images: ImageSource (with masks=True where the object regions are to be scored as well) or (N, 3, H, W) in
    [0, 1]; families: {family: {tap: inverse}}; mean_image: (3, H, W) mean of the *training* images, the
    `null_mean`; untrained: an untrained target of the same architecture and its linear inverses, the
    `null_untrained`. `null_shuffled` is the first family of SHUFFLED_FAMILIES, fed with another image's
    representation. Measures: mse, psnr (dB), ssim, r2 (against the mean image), psnr_objects (dB, inside the masks).
    Intervals: 95 % bootstrap over images. Raises BacksightError for fewer than two images.
    """
    if len(images) < 2:
        raise BacksightError("quality needs at least two images: shuffled features come from another image")
    dataset = dataset or (images.name if isinstance(images, ImageSource) else "images")
    split = split or (images.split if isinstance(images, ImageSource) else "test")
    collected: dict[tuple[str, str], dict[str, list[Tensor]]] = {}
    names: list[str] = []
    kept_images: list[Tensor] = []
    kept: dict[str, dict[str, list[Tensor]]] = {}
    generator = torch.Generator().manual_seed(seed)
    reference = next((family for family in SHUFFLED_FAMILIES if family in families), None)
    taps = [tap for tap in target.available_taps if any(tap in inverses for inverses in families.values())]
    if missing := {t for inverses in families.values() for t in inverses} - set(taps):
        raise BacksightError(f"{target.name} has no taps {', '.join(sorted(missing))}: these inverses are of another")

    def note(family: str, tap: str, batch: Tensor, made: Tensor, masks: Tensor | None) -> None:
        place = collected.setdefault((family, tap), {})
        values = score(batch, made.clamp(0, 1), masks)
        values["total"] = (batch - mean_image).square().flatten(1).mean(1)
        for measure, value in values.items():
            place.setdefault(measure, []).append(value)

    total = len(images)
    with progress_bar(total=total, desc=f"{target.name} on {dataset}", show=progress) as bar:
        for batch, masks, ids in _with_masks(images, batch_size):
            recorded = target.record(batch, taps)
            names += ids
            room = keep - sum(len(part) for part in kept_images)
            if room > 0:
                kept_images.append(batch[:room])
            mean = mean_image.expand_as(batch)
            for tap in taps:
                note("null_mean", tap, batch, mean, masks)
                if reference and tap in families[reference] and len(batch) > 1:
                    representation: Any = recorded[tap]
                    other = shuffled(representation, generator)
                    note("null_shuffled", tap, batch, families[reference][tap](other), masks)
                for family, inverses in families.items():
                    if tap not in inverses:
                        continue
                    made = inverses[tap](recorded[tap])
                    note(family, tap, batch, made, masks)
                    if room > 0:
                        kept.setdefault(family, {}).setdefault(tap, []).append(made[:room])
            if untrained is not None:
                null_target, null_inverses = untrained
                null_recorded = null_target.record(batch, list(null_inverses))
                for tap, inverse in null_inverses.items():
                    note("null_untrained", tap, batch, inverse(null_recorded[tap]), masks)
            bar.update(len(batch))
    common: dict[str, Any] = {"target": target.name, "weights": target.weights, "dataset": dataset, "split": split}
    rows: list[dict[str, Any]] = []
    tables = []
    for (family, tap), measures in collected.items():
        columns = common | {"tap": tap, "depth": target.depth(tap), "inverse": family}
        values = {measure: torch.cat(parts) for measure, parts in measures.items()}
        for measure, numbers in values.items():
            if measure != "total":
                rows += metrics_rows(numbers, measure, seed, **columns)
        value, low, high = determination(values["mse"], values["total"], seed)
        rows.append(metrics_row("r2", value, low, high, len(values["mse"]), seed, **columns))
        if len(values["psnr"]) == len(names):
            tables.append(
                pd.DataFrame(
                    {
                        "target": target.name,
                        "dataset": dataset,
                        "tap": tap,
                        "inverse": family,
                        "image": names,
                        "psnr": values["psnr"].numpy(),
                        "ssim": values["ssim"].numpy(),
                    }
                )
            )
    pictures = {family: {tap: torch.cat(parts) for tap, parts in per.items()} for family, per in kept.items()}
    return Quality(pd.DataFrame(rows), pd.concat(tables, ignore_index=True), torch.cat(kept_images), pictures)


def _with_masks(images: ImageSource | Tensor, batch_size: int) -> Any:
    """Batches of (images (B, 3, H, W) in [0, 1], masks of all objects (B, H, W) or None, names)."""
    if isinstance(images, Tensor):
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            part = part.float() / 255 if part.dtype == torch.uint8 else part
            yield part, None, [str(start + i) for i in range(len(part))]
        return
    pictures: list[Tensor] = []
    masks: list[Tensor] = []
    names: list[str] = []
    for item in images:
        pictures.append(item["image"].float() / 255)
        names.append(item["id"])
        if "masks" in item:
            masks.append(item["masks"].any(0) if len(item["masks"]) else torch.zeros(item["image"].shape[1:]).bool())
        if len(pictures) == batch_size:
            yield torch.stack(pictures), torch.stack(masks) if masks else None, names
            pictures, masks, names = [], [], []
    if pictures:
        yield torch.stack(pictures), torch.stack(masks) if masks else None, names


def compare_families(metrics: pd.DataFrame, first: str, second: str, measure: str = "psnr") -> pd.DataFrame:
    """`first` minus `second` of a measure at every tap both have: target, dataset, tap, depth, difference."""
    chosen = metrics[metrics.measure == measure]
    keys = ["target", "dataset", "tap", "depth"]
    wide = chosen.pivot_table(index=keys, columns="inverse", values="value").reset_index()
    if missing := [name for name in (first, second) if name not in wide]:
        raise BacksightError(f"the metrics hold no inverse {' or '.join(missing)}: train it with 02_train_inverse")
    wide["difference"] = wide[first] - wide[second]
    return wide[[*keys, first, second, "difference"]].sort_values(["target", "dataset", "depth"], ignore_index=True)


def paired_difference(
    per_image: pd.DataFrame, first: str, second: str, taps: Sequence[str], measure: str = "psnr", seed: int = 0
) -> pd.DataFrame:
    """Mean over images of `first` minus `second` at each tap, with its 95 % bootstrap interval over images."""
    rows = []
    for tap in taps:
        at = per_image[per_image.tap == tap].pivot_table(index="image", columns="inverse", values=measure)
        if first in at and second in at:
            row = metrics_rows((at[first] - at[second]).to_numpy(), f"{measure}_difference", seed)[0]
            rows.append({"tap": tap, **{key: row[key] for key in ("value", "low", "high", "n")}})
    return pd.DataFrame(rows, columns=["tap", "value", "low", "high", "n"])


def quality_images(source: str, size: tuple[int, int], n: int, seed: int = 0) -> tuple[ImageSource | Tensor, str, str]:
    """Images to judge inverses on, none of which trained one: (images, data set, split).

    "photographs": crops of the test photographs. "scenes" and COCO come with the masks of their objects. A folder of
    photographs is taken whole (split "all"). n: at most this many.
    """
    if source == "photographs":
        pictures, _ = crops(SPLIT_PHOTOGRAPHS["test"], n, size, seed)
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, "photographs", "test"
    masked = source == "scenes" or (Path(source) / "annotations").is_dir()
    images = open_images(source, size=size, count=n, seed=seed, masks=masked)
    return images, images.name, images.split


def check_claims(metrics: pd.DataFrame, tolerance: float = 0.5, inside_objects: float = 1.5) -> pd.DataFrame:
    """What one expects of sound inverses, held against a run's numbers: claim, holds, worst tap, margin in dB.

    Claims: every family beats the mean image and the shuffled features at every tap; trained families are not below
    the closed form; the chain is at most `tolerance` dB below the direct decoder; from a detector's decoder the
    chain is `inside_objects` dB above the mean image inside objects. Only claims that the families of this run can
    decide are listed; the margin is the smallest over taps.
    """
    means = metrics.groupby(["measure", "inverse", "tap"], sort=False)["value"].mean()
    rows = []

    def claim(text: str, measure: str, first: str, second: str, least: float, only: str = "") -> None:
        if (measure, first) not in means.index or (measure, second) not in means.index:
            return
        margin = (means[measure, first] - means[measure, second]).dropna() - least
        margin = margin[margin.index.str.contains(only)]
        if len(margin):
            tap = str(margin.idxmin())
            rows.append({"claim": text, "holds": bool(margin.min() >= 0), "worst tap": tap, "margin": margin.min()})

    families = [name for name in means.index.get_level_values("inverse").unique() if not name.startswith("null_")]
    for family in families:
        claim(f"{family} is above the mean image", "psnr", family, "null_mean", 0)
        claim(f"{family} is above shuffled features", "psnr", family, "null_shuffled", 0)
        if family != "linear":
            claim(f"{family} is not below linear", "psnr", family, "linear", 0)
        if family.startswith("modular"):
            claim(f"{family} is within {tolerance} dB of direct", "psnr", family, "direct", -tolerance)
            claim(
                f"{family} is {inside_objects} dB above the mean image inside objects, from the decoder",
                *("psnr_objects", family, "null_mean", inside_objects, r"^decoder\."),
            )
    return pd.DataFrame(rows, columns=["claim", "holds", "worst tap", "margin"])


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
