"""How much of an image each layer keeps: every inverse family at every tap, beside its null models.

One pass over the images: the target runs once a batch, and all training seeds, families and taps read the same
recording. What is measured beyond PSNR, SSIM and R² is handed in as measures (`detail.detail`, `cycle.cycle`, …).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
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
from backsight.measures.pixels import PSNR_CEILING, ssim
from backsight.measures.structure import Judged, Key, Measure, Ratio, region_psnr
from backsight.scenes.photographs import PHOTOGRAPHS, crops
from backsight.scenes.render import SPLIT_PHOTOGRAPHS
from backsight.studies.nulls import shuffled
from backsight.tables.names import SHUFFLED_FAMILIES
from backsight.tables.pool import metrics_row, pooled_interval, pooled_ratio, pooled_rows, with_nulls_of
from backsight.targets import Target

Families = Mapping[str, Mapping[str, Reconstruct]]
FamiliesBySeed = Mapping[int, Families]
UntrainedBySeed = Mapping[int, tuple[Target, Families]]
PRECISION_RESAMPLES = 200
CEILING = "_ceiling"  # a measure of this ending is the column `ceiling` of the measure without it
CELLS = 8  # rows and columns of an information map: patches of 8 x 8 pixels in the shipped targets
CLAIMED = (  # measure, what a sound inverse does better than one that reads another image's features, lower is better
    ("edge_f1", "keeps more edges", False),
    ("mask_iou", "keeps more of the outline", False),
    ("hue_error", "is nearer to the hue", True),
    ("perceptual", "is nearer in the target's features", True),
    ("retrieval_rank", "ranks the own image better", True),
)
Place = tuple[str, str, str]  # inverse, family, tap


@dataclass(frozen=True)
class Quality:
    """metrics: tidy rows (METRIC_COLUMNS, `seeds`, `family`, and the columns of the measures); per_image: target,
    dataset, tap, inverse, family, train_seed, image, psnr, ssim; images: (K, 3, H, W) the first images;
    reconstructions: {family: {tap: (K, 3, H, W)}} of them, by the first training seed."""

    metrics: pd.DataFrame
    per_image: pd.DataFrame
    images: Tensor
    reconstructions: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@torch.no_grad()
def evaluate_quality(
    target: Target,
    images: ImageSource | Tensor,
    families: Families | FamiliesBySeed,
    mean_image: Tensor,
    untrained: tuple[Target, Mapping[str, Reconstruct]] | UntrainedBySeed | None = None,
    dataset: str | None = None,
    split: str | None = None,
    seed: int = 0,
    batch_size: int = 50,
    keep: int = 8,
    progress: bool = True,
    *,
    shuffled_families: Sequence[str] | None = None,
    null_seeds: int | None = None,
    measures: Sequence[Measure] = (),
    measured: int | None = None,
    also_record: Sequence[str] = (),
    maps_of: str = "",
) -> Quality:
    """Scores of every inverse on images that no inverse was trained on.

    images: ImageSource (with masks=True where the object regions are to be scored as well) or (N, 3, H, W) in
    [0, 1]; families: {family: {tap: inverse}} of one training seed, or {training seed: {family: {tap: inverse}}};
    mean_image: (3, H, W) mean of the *training* images, the `null_mean`; untrained: an untrained target of the same
    architecture and its linear inverses, or {seed: (untrained target, {family: {tap: inverse}})}, the
    `null_untrained` of each family. `null_shuffled` is a family fed with another image's representation:
    shuffled_families, default the first of SHUFFLED_FAMILIES; column `family` says whose null a row is.
    null_seeds: training seeds that the shuffled and untrained nulls are made for, default all (column `seeds`).

    Measures: mse, psnr (dB), ssim, r2 (against the mean image), psnr_objects (dB, inside the masks), and what
    `measures` give for the first `measured` images (default all); these read `also_record` taps beside the
    families', and of the nulls only the first seed. maps_of: a family of which `patch_r2` is made as well, R² of each
    of CELLS x CELLS parts of the picture (columns row, column).
    Intervals: 95 % bootstrap over training seeds (clusters) and images, see `intervals`. Raises BacksightError for
    fewer than two images.
    """
    if len(images) < 2:
        raise BacksightError("quality needs at least two images: shuffled features come from another image")
    dataset = dataset or (images.name if isinstance(images, ImageSource) else "images")
    split = split or (images.split if isinstance(images, ImageSource) else "test")
    by_seed, nulls = _by_seed(families), _untrained_by_seed(untrained)
    first = next(iter(by_seed))
    names = list(dict.fromkeys(family for each in by_seed.values() for family in each))
    inverted = {tap for each in by_seed.values() for inverses in each.values() for tap in inverses}
    taps = [tap for tap in target.available_taps if tap in inverted]
    if missing := inverted - set(taps):
        raise BacksightError(f"{target.name} has no taps {', '.join(sorted(missing))}: these inverses are of another")
    mixed = [f for f in SHUFFLED_FAMILIES if f in names][:1] if shuffled_families is None else list(shuffled_families)
    with_nulls = list(by_seed)[: null_seeds or len(by_seed)]
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
                scores.note(("null_mean", "", tap), first, mean, True)
                other = shuffled(recorded[tap], generator) if len(batch) > 1 else None
                for train_seed, each in by_seed.items():
                    for family, inverses in each.items():
                        if tap not in inverses:
                            continue
                        made = inverses[tap](recorded[tap])
                        scores.note((family, family, tap), train_seed, made, True)
                        if room > 0 and train_seed == first:
                            kept.setdefault(family, {}).setdefault(tap, []).append(made[:room].clamp(0, 1))
                        if other is not None and family in mixed and train_seed in with_nulls:
                            null = ("null_shuffled", family, tap)
                            scores.note(null, train_seed, inverses[tap](other), train_seed == first)
            for number, (train_seed, (null_target, null_families)) in enumerate(nulls.items()):
                if number >= (null_seeds or len(nulls)):
                    break
                seen = {tap for inverses in null_families.values() for tap in inverses}
                null_recorded = null_target.record(batch, [tap for tap in null_target.available_taps if tap in seen])
                for family, inverses in null_families.items():
                    for tap, reconstruct in inverses.items():
                        null = ("null_untrained", family, tap)
                        scores.note(null, train_seed, reconstruct(null_recorded[tap]), number == 0)
            bar.update(len(batch))
    common: dict[str, Any] = {"target": target.name, "weights": target.weights, "dataset": dataset, "split": split}
    rows = []
    for (inverse, family, tap), values in scores.collected.items():
        columns = common | {"tap": tap, "depth": target.depth(tap), "inverse": inverse, "family": family or None}
        rows += _rows(values, seed, columns)
    table = pd.DataFrame(rows)
    pictures = {family: {tap: torch.cat(parts) for tap, parts in per.items()} for family, per in kept.items()}
    listed = _per_image(scores.collected, image_names, target.name, dataset)
    return Quality(table, listed, torch.cat(kept_images), pictures)


def _by_seed(families: Families | FamiliesBySeed) -> FamiliesBySeed:
    if not families or all(isinstance(key, str) for key in families):
        return {0: cast(Families, families)}
    return cast(FamiliesBySeed, families)


def _untrained_by_seed(untrained: Any) -> UntrainedBySeed:
    if untrained is None:
        return {}
    return {0: (untrained[0], {"linear": untrained[1]})} if isinstance(untrained, tuple) else untrained


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

    def note(self, place: Place, train_seed: int, made: Tensor, detailed: bool) -> None:
        made = made.clamp(0, 1)
        images, masks = self.judged.images, self.judged.masks
        error = (images - made).square()
        squared = error.mean(1)
        mse = squared.flatten(1).mean(1)
        values: dict[Key, Any] = {
            "mse": mse,
            "psnr": -10 * mse.clamp(min=10 ** (-PSNR_CEILING / 10)).log10(),
            "ssim": ssim(images, made),
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
                values |= measured(made[: self.most])
        at = self.collected.setdefault(place, {})
        for key, value in values.items():
            at.setdefault(key, {}).setdefault(train_seed, []).append(value)


def _cells(error: Tensor) -> Tensor:
    """(B, CELLS * CELLS) mean squared error of each part of the pictures."""
    return F.adaptive_avg_pool2d(error.mean(1, keepdim=True), CELLS).flatten(1)


def _rows(values: Mapping[Key, Mapping[int, list[Any]]], seed: int, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each measure, pooled over training seeds and images by the kind of its values."""
    rows: list[dict[str, Any]] = []
    for key, by_seed in values.items():
        measure, further = (key, ()) if isinstance(key, str) else key
        if measure.endswith(CEILING):
            continue
        given = dict(columns) | dict(further)
        sample = next(iter(by_seed.values()))[0]
        if isinstance(sample, Ratio):
            part = {s: torch.cat([each.part for each in parts]) for s, parts in by_seed.items()}
            whole = {s: torch.cat([each.whole for each in parts]) for s, parts in by_seed.items()}
            value, low, high = pooled_ratio(part, whole, seed)
            if sample.complement:
                value, low, high = 1 - value, 1 - high, 1 - low
            count = len(next(iter(part.values())))
            rows.append(metrics_row(measure, value, low, high, count, seed, seeds=len(part), **given))
        elif isinstance(sample, Matches):
            rows.append(_pooled_precision(measure, by_seed, seed, given))
        else:
            if ceiling := values.get(f"{measure}{CEILING}"):
                given["ceiling"] = float(torch.cat(next(iter(ceiling.values()))).nanmean())
            rows += pooled_rows({s: torch.cat(parts) for s, parts in by_seed.items()}, measure, seed, **given)
    return rows


def _pooled_precision(
    measure: str, by_seed: Mapping[int, Sequence[Matches]], seed: int, columns: Mapping[str, Any]
) -> dict[str, Any]:
    """One tidy row: AP50 over all images, mean over training seeds; both are resampled for its 95 % interval."""
    joined = [_joined(parts) for parts in by_seed.values()]
    images = len(joined[0].scores)
    value = float(np.mean([average_precision(each)[0] for each in joined]))
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(images, np.full(images, 1 / images), size=PRECISION_RESAMPLES).astype(float)
    every = np.stack([average_precision(each, weights) for each in joined])  # (S, R)
    drawn = generator.integers(len(joined), size=(len(joined), PRECISION_RESAMPLES))
    resampled = np.take_along_axis(every, drawn, axis=0).mean(0)
    low, high = (
        np.nanquantile(resampled, [0.025, 0.975]) if not np.isnan(resampled).all() else (float("nan"), float("nan"))
    )
    return metrics_row(measure, value, float(low), float(high), images, seed, seeds=len(joined), **columns)


def _joined(parts: Sequence[Matches]) -> Matches:
    names = ("scores", "classes", "hits", "truth")
    return Matches(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _per_image(
    collected: Mapping[Place, Mapping[Key, Mapping[int, list[Tensor]]]], names: Sequence[str], target: str, dataset: str
) -> pd.DataFrame:
    """PSNR and SSIM of every reconstruction of every image."""
    tables = []
    for (inverse, family, tap), values in collected.items():
        for train_seed, parts in values["psnr"].items():
            psnr, ssim = torch.cat(parts).numpy(), torch.cat(values["ssim"][train_seed]).numpy()
            if len(psnr) < len(names):  # the last batch held a single image, which has no other to be shuffled with
                continue
            columns: dict[str, Any] = {
                "target": target,
                "dataset": dataset,
                "tap": tap,
                "inverse": inverse,
                "family": family,
            }
            columns |= {"train_seed": train_seed, "image": names, "psnr": psnr, "ssim": ssim}
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


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


def paired_difference(
    per_image: pd.DataFrame, first: str, second: str, taps: Sequence[str], measure: str = "psnr", seed: int = 0
) -> pd.DataFrame:
    """Mean over images (and training seeds) of `first` minus `second` at each tap, with its 95 % bootstrap interval.

    The difference is taken image by image and, where both have them, training seed by training seed; n counts images.
    """
    listed = with_nulls_of(
        per_image[per_image.inverse.isin([first, second])],
        next((name for name in (first, second) if not name.startswith("null_")), ""),
    )
    rows = []
    for tap in taps:
        at = listed[listed.tap == tap]
        tables = [
            at[at.inverse == name].pivot_table(index="train_seed", columns="image", values=measure)
            for name in (first, second)
        ]
        if all(len(table) for table in tables):
            ours, theirs = tables
            shared = [s for s in ours.index if s in theirs.index] or [ours.index[0]]
            paired = ours.loc[shared].to_numpy() - theirs.reindex(shared).fillna(theirs.mean()).to_numpy()
            value, low, high = pooled_interval(paired, seed)
            rows.append({"tap": tap, "value": value, "low": low, "high": high, "n": paired.shape[1]})
    return pd.DataFrame(rows, columns=["tap", "value", "low", "high", "n"])


def quality_images(
    source: str, target_or_size: Preprocessed | tuple[int, int], n: int, seed: int = 0
) -> tuple[ImageSource | Tensor, str, str]:
    """Images to judge inverses on, none of which trained one: (images, data set, split).

    "photographs": crops of the test photographs. "scenes" and COCO come with the masks of their objects. A folder of
    photographs is taken whole (split "all"). n: at most this many.
    """
    if source == "photographs":
        size = getattr(target_or_size, "image_size", cast(tuple[int, int], target_or_size))
        pictures, _ = crops(SPLIT_PHOTOGRAPHS["test"], n, size, seed)
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, "photographs", "test"
    masked = source == "scenes" or (Path(source) / "annotations").is_dir()
    images = open_images(source, None, target_or_size, n, seed, masks=masked)
    return images, images.name, images.split


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
    more, _, _ = quality_images(source, target_or_size, count, seed) if len(own) < count else (own, "", "")
    seen: dict[bytes, Tensor] = {}
    for picture in torch.cat([own, tensor(more)]):
        seen.setdefault((picture * 255).round().byte().numpy().tobytes(), picture)
    others = list(seen.values())[len(own) :]  # a judged image that is there twice leaves one place fewer
    return torch.cat([own, torch.stack(others)[: max(0, count - len(own))]]) if others else own


def check_claims(metrics: pd.DataFrame, tolerance: float = 0.5, inside_objects: float = 1.5) -> pd.DataFrame:
    """What one expects of sound inverses, held against a run's numbers: claim, holds, worst tap, margin.

    Claims: every family beats the mean image and the shuffled features at every tap, in PSNR and in what it keeps of
    edges, outline, hue and its own features, and finds its image among others; trained families are not below the
    closed form; the chain is at most `tolerance` dB below the direct decoder; from a detector's decoder the chain is
    `inside_objects` dB above the mean image inside objects. Only claims that the families of this run can decide are
    listed; the margin, in the measure's unit, is the smallest over taps.
    """
    rows = []
    metrics = metrics[~(metrics["noise"] > 0)] if "noise" in metrics else metrics
    tables = {}

    def claim(
        text: str, measure: str, first: str, second: str, least: float = 0, only: str = "", lower: bool = False
    ) -> None:
        if first not in tables:
            chosen = with_nulls_of(metrics, first).groupby(["measure", "inverse"], sort=False)
            tables[first] = {pair: rows.groupby("tap", sort=False)["value"].mean() for pair, rows in chosen}
        means = tables[first]
        if (measure, first) not in means or (measure, second) not in means:
            return
        difference = (means[measure, first] - means[measure, second]).dropna()
        margin = (-difference if lower else difference) - least
        margin = margin[margin.index.str.contains(only)]
        if len(margin):
            tap = str(margin.idxmin())
            rows.append({"claim": text, "holds": bool(margin.min() >= 0), "worst tap": tap, "margin": margin.min()})

    for family in [name for name in metrics["inverse"].unique() if not name.startswith("null_")]:
        claim(f"{family} is above the mean image", "psnr", family, "null_mean")
        claim(f"{family} is above shuffled features", "psnr", family, "null_shuffled")
        for measure, what, lower in CLAIMED:
            text = f"{family} {what} than shuffled features"
            claim(text, measure, family, "null_shuffled", lower=lower)
        if family != "linear":
            claim(f"{family} is not below linear", "psnr", family, "linear")
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
