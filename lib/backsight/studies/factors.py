"""What of a scene can be read off each tap: background, shape, texture, hue and position, by a linear probe.

Only `scenes` know the truth. Everything fitted is judged on other scenes. Shape, texture, hue and position of the
dominant object: fitted on training scenes, the ridge strength chosen on validation scenes, judged on test scenes, whose
photographs the probe has never seen. The background cannot be asked across splits, since no photograph is in two of
them: the question is which of the six *training* photographs lies behind the scene, judged on scenes of the training
split with another seed (other crops, other objects), the strength chosen by generalised cross-validation on the scenes
that it was fitted on.

No reconstruction takes part: what a probe reads is in the representation, whatever an inverse makes of it. What it
cannot read may be there all the same, in a form that is not linear or finer than the summary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import open_images
from backsight.errors import BacksightError
from backsight.inverses.ridge import RidgeAccumulator
from backsight.project import read_json
from backsight.representation import Representation, Tokens
from backsight.scenes.dataset import cached
from backsight.scenes.render import CLASSES, SPLIT_PHOTOGRAPHS, TEXTURES
from backsight.tables.values import Values
from backsight.targets import Target

FACTORS = ("background", "shape", "texture", "hue", "position")
UNITS: Mapping[str, str] = MappingProxyType(
    {"background": "accuracy", "shape": "accuracy", "texture": "accuracy", "hue": "R2", "position": "R2"}
)
BACKGROUNDS = SPLIT_PHOTOGRAPHS["train"]
CHANCE: Mapping[str, float] = MappingProxyType(
    {
        "background": 1 / len(BACKGROUNDS),
        "shape": 1 / len(CLASSES),
        "texture": 1 / len(TEXTURES),
        "hue": 0.0,
        "position": 0.0,
    }
)
NULLS = ("null_shuffled", "null_untrained", "null_colour_position")
BACKGROUND_SEED = 9001  # of the training-split scenes on which the background is judged: no target saw them
STRENGTHS = tuple(10.0**power for power in np.arange(-3, 1.1, 0.5).tolist())

CELLS = 4  # a side: finer grids are averaged down; 8 with fewer channels each read less of validation scenes
PLACED = 512  # numbers of a summary that say what is where
POOLED = 64  # channels whose mean, spread and maximum over all places are kept
THUMBNAIL = 8  # a side, of the image that the colour null sees
STANDARDISED_BY = 100  # training scenes whose statistics standardise the channels of a summary
ANY_TAP = ""  # of the colour null, which reads no tap


@dataclass(frozen=True)
class Truth:
    """What is true of N scenes. images: (N, 3, H, W) uint8; outputs: {factor: (N, K)}: one-hot classes of background
    (zero where it is no training photograph), shape and texture of the dominant object; (cos, sin) of its hue; the
    centre (x, y) of its box in [0, 1]."""

    images: Tensor
    outputs: Mapping[str, Tensor]


def scene_truth(split: str, count: int, seed: int, size: tuple[int, int]) -> Truth:
    """Scenes and their truth, from the data set's own annotations; size: (H, W) of the images in pixels."""
    side = max(size)
    folder = cached(split, count, seed, side)
    content = read_json(Path(folder) / "annotations" / f"instances_{split}2017.json") or {}
    photographs = [str(image["background"]) for image in content["images"]]
    dominant = [each for each in content["annotations"] if each["dominant"]]
    boxes = torch.tensor([each["bbox"] for each in dominant])
    hues = torch.deg2rad(torch.tensor([float(each["hue"]) for each in dominant]))
    outputs = {
        "background": torch.tensor([[float(name == known) for known in BACKGROUNDS] for name in photographs]),
        "shape": F.one_hot(torch.tensor([each["category_id"] - 1 for each in dominant]), len(CLASSES)).float(),
        "texture": F.one_hot(torch.tensor([TEXTURES.index(each["texture"]) for each in dominant]), len(TEXTURES)),
        "hue": torch.stack([hues.cos(), hues.sin()], dim=1),
        "position": (boxes[:, :2] + boxes[:, 2:] / 2) / side,
    }
    source = open_images("scenes", split, size, count, seed)
    images = torch.stack([source.image(index) for index in range(len(source))])
    return Truth(images, {factor: values.double() for factor, values in outputs.items()})


# ------------------------------------------------------------------------------------------------------ summaries


@dataclass(frozen=True)
class _Part:
    """How tokens of one grid become numbers. centre, scale: (C,); placed: (C, k); pooled: (C, w); cells: (h, w)."""

    centre: Tensor
    scale: Tensor
    placed: Tensor
    pooled: Tensor
    cells: tuple[int, int]


@dataclass(frozen=True)
class Summary:
    """A bounded summary of a representation that keeps what is where; made from a first batch by `Summary.of`.

    Channels are standardised (a few of deep layers are huge) and projected at random, the same way everywhere. Each
    cell of a grid (at most CELLS a side, finer grids are averaged down) gives PLACED / cells numbers, and so does each
    query; all places together give the mean, spread and maximum of POOLED channels; class and register tokens give
    2 * POOLED numbers. Several grids share these numbers.
    """

    parts: tuple[_Part, ...]

    @classmethod
    def of(cls, representation: Representation) -> "Summary":
        """The summary of representations of this form; its channels are standardised by this batch."""
        maps, prefix = _maps(representation)
        generator = torch.Generator().manual_seed(0)
        parts = []
        for values in maps:
            cells = (min(values.shape[2], CELLS), min(values.shape[3], CELLS))
            if not isinstance(representation, Tokens):
                cells = (1, min(values.shape[3], PLACED))
            width = max(1, PLACED // (len(maps) * cells[0] * cells[1]))
            parts.append(_part(values, width, POOLED // len(maps), cells, generator))
        if prefix is not None:
            parts.append(_part(prefix, 2 * POOLED, 0, (1, 1), generator))
        return cls(tuple(parts))

    def __call__(self, representation: Representation) -> Tensor:
        """(B, D) float32 on the CPU."""
        maps, prefix = _maps(representation)
        every = [*maps, *([] if prefix is None else [prefix])]
        return torch.cat([_summarised(v, part) for v, part in zip(every, self.parts, strict=True)], dim=1).float().cpu()


def _maps(representation: Representation) -> tuple[list[Tensor], Tensor | None]:
    """Maps (B, C, h, w) of grids or queries, and the prefix tokens as one (B, P * C, 1, 1) or None."""
    if isinstance(representation, Tokens):
        prefix = representation.prefix_values.flatten(1)[:, :, None, None] if representation.prefix else None
        return list(representation.maps()), prefix
    return [representation.values.transpose(1, 2)[:, :, None]], None


def _part(values: Tensor, width: int, pooled: int, cells: tuple[int, int], generator: torch.Generator) -> _Part:
    centre = values.mean((0, 2, 3))
    spread = values.std((0, 2, 3), correction=0)
    known = spread > 1e-6 * centre.abs()  # below that it is the rounding of the mean
    usual = spread[known].median() if known.any() else torch.ones_like(spread[0])
    scale = 1 / torch.where(known, spread, usual)  # a channel that sleeps here may wake on other images
    channels = values.shape[1]

    def projection(wanted: int) -> Tensor:
        if wanted >= channels:
            return torch.eye(channels).to(values)
        drawn = torch.randn(channels, wanted, generator=generator)
        return torch.linalg.qr(drawn)[0].to(values) if wanted else drawn.to(values)

    return _Part(centre, scale, projection(width), projection(pooled), cells)


def _summarised(values: Tensor, part: _Part) -> Tensor:
    """(B, D) of maps (B, C, h, w)."""
    standard = (values - part.centre[:, None, None]) * part.scale[:, None, None]
    placed = F.adaptive_avg_pool2d(standard, part.cells)
    numbers = [(placed.flatten(2).transpose(1, 2) @ part.placed).flatten(1)]
    if part.pooled.shape[1]:
        channels = standard.flatten(2).transpose(1, 2) @ part.pooled
        numbers += [channels.mean(1), channels.std(1, correction=0), channels.amax(1)]
    return torch.cat(numbers, dim=1)


def colour_summary(images: Tensor) -> Tensor:
    """(B, 203) of images (B, 3, H, W) in [0, 1]: what the colours alone say, without any model.

    A thumbnail of THUMBNAIL² mean colours (each in its place), the mean, spread and maximum of these colours, and the
    centre (x, y) of their saturation (maximum minus minimum channel).
    """
    thumbnail = F.adaptive_avg_pool2d(images, THUMBNAIL)
    cells = thumbnail.flatten(2)
    saturation = thumbnail.amax(1) - thumbnail.amin(1) + 1e-6
    weight = saturation / saturation.sum((1, 2), keepdim=True)
    places = (torch.arange(THUMBNAIL) + 0.5) / THUMBNAIL
    centre = torch.stack([(weight.sum(1) * places).sum(1), (weight.sum(2) * places).sum(1)], dim=1)
    return torch.cat([cells.flatten(1), cells.mean(2), cells.std(2, correction=0), cells.amax(2), centre], dim=1)


# --------------------------------------------------------------------------------------------------------- probes


@dataclass(frozen=True)
class Judged:
    """One probe on N judged scenes. predicted, truth: (N, K); mean: (K,) of the training scenes."""

    predicted: Tensor
    truth: Tensor
    mean: Tensor

    def scores(self, unit: str, order: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(N,) and their weights: 1 where the largest output is the true class, or shares of variance whose weighted
        mean is R² against the training scenes' mean; order: whose predictions each scene gets."""
        predicted = self.predicted if order is None else self.predicted[order]
        if unit == "accuracy":
            return (predicted.argmax(1) == self.truth.argmax(1)).double(), None
        total = (self.mean - self.truth).square().sum(1)
        return 1 - (predicted - self.truth).square().sum(1) / total, total


def fit_probes(scenes: Mapping[str, Truth], features: Mapping[str, Tensor]) -> dict[str, Judged]:
    """{factor: judged probe}; scenes, features (N, D): of "train", "validation", "test" and "background".

    Ridge regression of the outputs, in closed form; strength: of STRENGTHS
    that with the smallest squared error on the validation scenes, for the background by generalised cross-validation
    on the training scenes (Golub, Heath & Wahba, Technometrics 21, 1979).
    """
    accumulator = RidgeAccumulator()
    outputs = [scenes["train"].outputs[factor] for factor in FACTORS]
    accumulator.update(features["train"], torch.cat(outputs, dim=1))
    eigenvalues = torch.linalg.eigvalsh(accumulator.standardised()[0])
    centred = {name: values.double() - accumulator.input_mean for name, values in features.items()}
    count, means = accumulator.count, accumulator.output_mean.split([len(each.T) for each in outputs])
    solved = [accumulator.solve(strength)[0].split([len(mean) for mean in means], dim=1) for strength in STRENGTHS]
    judged = {}
    for number, factor in enumerate(FACTORS):
        mean, weights = means[number], [weight[number] for weight in solved]
        chooser = "train" if factor == "background" else "validation"
        wanted = scenes[chooser].outputs[factor] - mean
        losses = [float((wanted - centred[chooser] @ weight).square().sum()) for weight in weights]
        if chooser == "train":
            freedom = [1 + float((eigenvalues / (eigenvalues + s)).sum()) for s in STRENGTHS]
            losses = [loss / max(count - used, 1e-9) ** 2 for loss, used in zip(losses, freedom, strict=True)]
        place = _judged_on(factor)
        predicted = mean + centred[place] @ weights[int(np.argmin(losses))]
        judged[factor] = Judged(predicted, scenes[place].outputs[factor], mean)
    return judged


def _judged_on(factor: str) -> str:
    return "background" if factor == "background" else "test"


# ----------------------------------------------------------------------------------------------------- the table


@torch.no_grad()
def factor_table(
    target: Target,
    train_count: int = 2000,
    test_count: int = 500,
    seeds: Sequence[int] = (0, 1, 2),
    taps: str | Sequence[str] | None = None,
    progress: bool = True,
    validation_count: int = 300,
    seed: int = 0,
    batch_size: int = 50,
) -> pd.DataFrame:
    """How well each factor of a scene can be read off each tap, beside its nulls: one value a scene.

    train_count, seeds: scenes that a probe is fitted on, drawn anew with each seed; test_count: judged scenes, the
    same for all seeds (of the test split with scene seed `seed`; for the background of the training split with the
    scene seed BACKGROUND_SEED); taps: default, the target's selected ones.
    Measure "factor_score", with the columns factor, unit ("accuracy": share of scenes, or "R2":
    share of variance against the training mean, of cos and sin of the hue, of x and y), chance (uniform guess; 0 for
    R2). inverse: "probe"; "null_shuffled" (the same probe reads another scene's features), "null_untrained" (the same
    on the architecture with random weights, drawn anew each seed), "null_colour_position" (`colour_summary` of the
    image, no model; the same at every tap).
    Raises BacksightError without seeds, with a training seed that is BACKGROUND_SEED or twice the same, and for
    fewer than two judged scenes.
    """
    if not seeds or len(set(seeds)) < len(seeds) or BACKGROUND_SEED in seeds:
        raise BacksightError(
            f"seeds are {list(seeds)}: give at least one, each once, and none that is {BACKGROUND_SEED}, "
            "which the background is judged with."
        )
    if min(train_count, test_count, validation_count) < 2:
        raise BacksightError("The factor table needs at least two scenes to fit, to choose and to judge.")
    selected = target.resolve_taps(target.taps if taps is None else taps)
    size = target.image_size
    scenes = {
        "validation": scene_truth("validation", validation_count, seed, size),
        "test": scene_truth("test", test_count, seed, size),
        "background": scene_truth("train", test_count, BACKGROUND_SEED, size),
    }
    found: dict[tuple[str, str], list[dict[str, Judged]]] = {}
    held = validation_count + 2 * test_count
    total = held + len(seeds) * (2 * train_count + held)
    with tqdm(total=total, desc=f"factors of {target.name}", leave=False, disable=not progress) as bar:

        def read(model: Target, truth: Truth, summaries: Mapping[str, Summary]) -> dict[str, Tensor]:
            return _features(model, truth.images, summaries, batch_size, bar)

        def note(inverse: str, features: Mapping[str, Mapping[str, Tensor]]) -> None:
            for tap in features["train"]:
                of_tap = {name: values[tap] for name, values in features.items()}
                found.setdefault((inverse, tap), []).append(fit_probes(scenes, of_tap))

        standard = scene_truth("train", train_count, seeds[0], size).images[:STANDARDISED_BY]
        summaries = _summaries(target, selected, standard)
        seen = {name: read(target, truth, summaries) for name, truth in scenes.items()}
        for training_seed in seeds:
            scenes["train"] = scene_truth("train", train_count, training_seed, size)
            note("probe", seen | {"train": read(target, scenes["train"], summaries)})
            untrained = target.untrained(training_seed)
            others = _summaries(untrained, selected, standard)
            note("null_untrained", {name: read(untrained, truth, others) for name, truth in scenes.items()})
            note("null_colour_position", {name: {ANY_TAP: _colours(truth)} for name, truth in scenes.items()})
    return pd.concat([_values(target, selected, found, seeds, factor, seed) for factor in FACTORS], ignore_index=True)


def _another(count: int, seed: int) -> Tensor:
    """(N,) a random cyclic permutation: the scene whose features each scene gets, never its own."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    taken = torch.empty_like(order)
    taken[order] = order.roll(1)
    return taken


def _summaries(model: Target, taps: Sequence[str], images: Tensor) -> dict[str, Summary]:
    recorded = model.record(images.float() / 255, taps)
    return {tap: Summary.of(recorded[tap]) for tap in taps}


def _features(
    model: Target, images: Tensor, summaries: Mapping[str, Summary], batch_size: int, bar: Any
) -> dict[str, Tensor]:
    """{tap: (N, D)} of (N, 3, H, W) uint8 images: one pass for all taps, of which only summaries are kept."""
    parts: dict[str, list[Tensor]] = {tap: [] for tap in summaries}
    for batch in images.split(batch_size):
        recorded = model.record(batch.float() / 255, list(summaries))
        for tap, summary in summaries.items():
            parts[tap].append(summary(recorded[tap]))
        bar.update(len(batch))
    return {tap: torch.cat(part) for tap, part in parts.items()}


def _colours(truth: Truth) -> Tensor:
    return torch.cat([colour_summary(batch.float() / 255) for batch in truth.images.split(256)])


def _values(
    target: Target,
    taps: Sequence[str],
    probes: Mapping[tuple[str, str], list[dict[str, Judged]]],
    seeds: Sequence[int],
    factor: str,
    seed: int,
) -> pd.DataFrame:
    """Values of the probes and nulls of all training seeds, the colour null repeated at every tap."""
    count = len(probes["probe", taps[0]][0][factor].truth)
    split = "train" if _judged_on(factor) == "background" else "test"
    said: dict[str, Any] = {"factor": factor, "unit": UNITS[factor], "chance": CHANCE[factor]}
    values = Values(target, "scenes", split, [f"{split} {index}" for index in range(count)], **said)
    order = _another(count, seed)
    for tap in taps:
        for inverse, fitted, taken in (
            ("probe", ("probe", tap), None),
            ("null_shuffled", ("probe", tap), order),
            ("null_untrained", ("null_untrained", tap), None),
            ("null_colour_position", ("null_colour_position", ANY_TAP), None),
        ):
            for train_seed, judged in zip(seeds, probes[fitted], strict=True):
                scores, weight = judged[factor].scores(UNITS[factor], taken)
                values.add("factor_score", {train_seed: scores}, tap, inverse, weight=weight)
    return values.table()
