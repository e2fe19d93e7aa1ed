"""What of a scene can be read off each tap: background, shape, texture, hue and position, by a linear probe.

Only `scenes` know the truth. Shape, texture, hue and position of the dominant object: fitted on training scenes, the
ridge strength chosen on validation scenes, judged on test scenes, whose photographs the probe has never seen. No
photograph is in two splits, so the background is asked otherwise: which of the six *training* photographs lies behind a
scene of the training split with another seed, the strength chosen by generalised cross-validation.

What a probe reads is in the representation, whatever an inverse makes of it; what it cannot read may be there all the
same, in a form that is not linear or finer than the summary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import center_crop

from backsight.errors import BacksightError
from backsight.inverses.ridge import RidgeAccumulator
from backsight.representation import Representation, Tokens
from backsight.scenes.render import CLASSES, SPLIT_PHOTOGRAPHS, TEXTURES, render_many
from backsight.studies.nulls import another
from backsight.tables.values import Values
from backsight.targets import Target

BACKGROUNDS = SPLIT_PHOTOGRAPHS["train"]
UNITS = {"background": "accuracy", "shape": "accuracy", "texture": "accuracy", "hue": "R2", "position": "R2"}
CHANCE = {"shape": 1 / len(CLASSES), "texture": 1 / len(TEXTURES), "hue": 0.0, "position": 0.0}
CHANCE["background"] = 1 / len(BACKGROUNDS)
FACTORS = tuple(UNITS)
BACKGROUND_SEED = 9001  # of the training-split scenes on which the background is judged: no target saw them
STRENGTHS = tuple(10.0**power for power in np.arange(-3, 1.1, 0.5).tolist())

CELLS = 4  # a side: finer grids are averaged down; 8 with fewer channels each read less of validation scenes
PLACED = 512  # numbers of a summary that say what is where
POOLED = 64  # channels whose mean, spread and maximum over all places are kept
THUMBNAIL = 8  # a side, of the image that the colour null sees
STANDARDISED_BY = 100  # training scenes whose statistics standardise the channels of a summary
BATCH = 50  # images

Summary = Callable[[Representation], Tensor]


@dataclass(frozen=True)
class Truth:
    """What is true of N scenes. images: (N, 3, H, W) uint8; outputs: {factor: (N, K)}: one-hot classes of background
    (zero where it is no training photograph), shape and texture of the dominant object; (cos, sin) of its hue; the
    centre (x, y) of its box in [0, 1]."""

    images: Tensor
    outputs: Mapping[str, Tensor]


def scene_truth(split: str, count: int, seed: int, size: tuple[int, int]) -> Truth:
    """Square scenes, of which size (H, W) shows the centre, and what is true of them."""
    side = max(size)
    scenes = list(render_many(split, count, seed, side))
    hues = np.radians([scene.hues[0] for scene in scenes])
    known = {
        "background": [[scene.background == name for name in BACKGROUNDS] for scene in scenes],
        "shape": np.eye(len(CLASSES))[[scene.dominant for scene in scenes]],
        "texture": [[scene.textures[0] == name for name in TEXTURES] for scene in scenes],
        "hue": np.stack([np.cos(hues), np.sin(hues)], 1),
        "position": [(scene.boxes[0, :2] + scene.boxes[0, 2:] / 2) / side for scene in scenes],
    }
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    outputs = {factor: torch.from_numpy(np.array(values, float)) for factor, values in known.items()}
    return Truth(center_crop(images, size), outputs)


# ------------------------------------------------------------------------------------------------------ summaries


def summary_of(representation: Representation) -> Summary:
    """(B, D) float32 of any representation of this form: a bounded summary that keeps what is where.

    Channels are standardised by this batch (a few of deep layers are huge) and projected at random, the same way
    everywhere. Each cell of a grid (at most CELLS a side, finer grids are averaged down) gives PLACED / cells numbers,
    and so does each query; all places together give the mean, spread and maximum of POOLED channels; class and
    register tokens give 2 * POOLED numbers. Several grids share these numbers.
    """
    generator = torch.Generator().manual_seed(0)
    parts = [_summarised(*maps, generator) for maps in _maps(representation)]

    def summary(representation: Representation) -> Tensor:
        maps = zip(parts, _maps(representation), strict=True)
        return torch.cat([part(values) for part, (values, *_) in maps], dim=1).float().cpu()

    return summary


def _maps(representation: Representation) -> list[tuple[Tensor, tuple[int, int], int, int]]:
    """Maps (B, C, h, w) of grids or queries, and the prefix tokens as one (B, P * C, 1, 1); of each the cells that a
    summary keeps apart, the numbers of all cells, and the channels that are pooled over them."""
    if not isinstance(representation, Tokens):
        queries = representation.values.transpose(1, 2)[:, :, None]
        return [(queries, (1, min(queries.shape[3], PLACED)), PLACED, POOLED)]
    maps = representation.maps()
    sizes = [(min(grid.shape[2], CELLS), min(grid.shape[3], CELLS)) for grid in maps]
    listed = [(v, cells, PLACED // len(maps), POOLED // len(maps)) for v, cells in zip(maps, sizes, strict=True)]
    if representation.prefix:
        listed.append((representation.prefix_values.flatten(1)[:, :, None, None], (1, 1), 2 * POOLED, 0))
    return listed


def _summarised(
    values: Tensor, cells: tuple[int, int], placed: int, pooled: int, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """(B, D) of maps (B, C, h, w) like these."""
    centre, spread, channels = values.mean((0, 2, 3)), values.std((0, 2, 3), correction=0), values.shape[1]
    known = spread > 1e-6 * centre.abs()  # below that it is the rounding of the mean
    usual = spread[known].median() if known.any() else torch.ones_like(spread[0])
    scale = 1 / torch.where(known, spread, usual)  # a channel that sleeps here may wake on other images

    def projection(width: int) -> Tensor:
        drawn = torch.eye(channels)
        if width < channels:
            drawn = torch.linalg.qr(torch.randn(channels, width, generator=generator))[0]
        return drawn.to(values)

    to_placed, to_pooled = projection(max(1, placed // (cells[0] * cells[1]))), projection(pooled)

    def summarised(values: Tensor) -> Tensor:
        standard = (values - centre[:, None, None]) * scale[:, None, None]
        in_cells = F.adaptive_avg_pool2d(standard, cells).flatten(2).transpose(1, 2) @ to_placed
        over_all = standard.flatten(2).transpose(1, 2) @ to_pooled
        spread = over_all.std(1, correction=0) if pooled else over_all[:, 0]
        return torch.cat([in_cells.flatten(1), over_all.mean(1), spread, over_all.amax(1)], dim=1)

    return summarised


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


def fit_probes(
    scenes: Mapping[str, Truth], features: Mapping[str, Tensor], order: Tensor
) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
    """{factor: (N,) scores of the judged scenes and their weights, of their own predictions and of others'}.

    scenes, features (N, D): of "train", "validation", "test" and "background"; order: whose predictions a scene gets.
    Ridge regression of the outputs, in closed form; strength: of STRENGTHS that with the smallest squared error on the
    validation scenes, for the background by generalised cross-validation on the training scenes (Golub, Heath & Wahba,
    Technometrics 21, 1979).
    """
    outputs = {name: torch.cat([truth.outputs[factor] for factor in FACTORS], dim=1) for name, truth in scenes.items()}
    moments = RidgeAccumulator()
    moments.update(features["train"], outputs["train"])
    fits = [moments.solve(strength) for strength in STRENGTHS]
    predictions = {
        name: [values.double() @ weight + bias for weight, bias in fits] for name, values in features.items()
    }
    eigenvalues = torch.linalg.eigvalsh(moments.standardised()[0])
    left = [moments.count - 1 - float((eigenvalues / (eigenvalues + strength)).sum()) for strength in STRENGTHS]
    judged, start = {}, 0
    for factor, unit in UNITS.items():
        columns = slice(start, start := start + scenes["train"].outputs[factor].shape[1])
        chooser, place = ("train", "background") if factor == "background" else ("validation", "test")
        losses = np.array([float((of - outputs[chooser])[:, columns].square().sum()) for of in predictions[chooser]])
        if chooser == "train":
            losses /= np.maximum(left, 1e-9) ** 2
        predicted, truth = predictions[place][int(losses.argmin())][:, columns], outputs[place][:, columns]
        mean = moments.output_mean[columns]
        judged[factor] = [_scores(unit, of, truth, mean) for of in (predicted, predicted[order])]
    return judged


def _scores(unit: str, predicted: Tensor, truth: Tensor, mean: Tensor) -> tuple[Tensor, Tensor | None]:
    """(N,) and their weights: 1 where the largest output is the true class, or shares of variance whose weighted mean
    is R² against the training scenes' mean."""
    if unit == "accuracy":
        return (predicted.argmax(1) == truth.argmax(1)).double(), None
    total = (mean - truth).square().sum(1)
    return 1 - (predicted - truth).square().sum(1) / total, total


# ----------------------------------------------------------------------------------------------------- the table


@torch.no_grad()
def factor_table(target: Target, train_count: int, test_count: int, seeds: Sequence[int]) -> pd.DataFrame:
    """How well each factor of a scene can be read off each selected tap, beside its nulls: one value a scene.

    train_count, seeds: scenes that a probe is fitted on, drawn anew with each seed; test_count: judged scenes, the same
    for all seeds, and as many to choose a strength by. Measure "factor_score", with the columns factor, unit
    ("accuracy", or "R2" against the training mean, of cos and sin of the hue, of x and y), chance (0 for R2). inverse:
    "probe"; "null_shuffled" (it reads another scene's features), "null_untrained" (random weights, drawn anew each
    seed), "null_colour_position" (`colour_summary` of the image, the same at every tap).
    Raises BacksightError with the training seed BACKGROUND_SEED, and for fewer than two scenes.
    """
    if BACKGROUND_SEED in seeds:
        raise BacksightError(f"The background is judged on scenes of the seed {BACKGROUND_SEED}: train on others.")
    if min(train_count, test_count) < 2:
        raise BacksightError("The factor table needs at least two scenes to fit, to choose and to judge.")
    size = target.image_size
    held = {split: scene_truth(split, test_count, 0, size) for split in ("validation", "test")}
    held["background"] = scene_truth("train", test_count, BACKGROUND_SEED, size)
    draws = {s: scene_truth("train", train_count, s, size) for s in seeds}
    standard = draws[seeds[0]].images[:STANDARDISED_BY]
    names = {split: [f"{split} {number}" for number in range(test_count)] for split in ("train", "test")}
    by_split = {split: Values(target, "scenes", split, images) for split, images in names.items()}
    order = another(test_count, torch.Generator().manual_seed(0))
    summaries = _summaries(target, standard)
    seen = _features(target, held, summaries)
    for train_seed, train in draws.items():
        scenes, model = held | {"train": train}, target.untrained(train_seed)
        colours = {name: colour_summary(truth.images / 255) for name, truth in scenes.items()}
        features = {
            "probe": seen | _features(target, {"train": train}, summaries),
            "null_untrained": _features(model, scenes, _summaries(model, standard)),
            "null_colour_position": {name: dict.fromkeys(target.taps, of) for name, of in colours.items()},
        }
        for (inverse, by_name), tap in product(features.items(), target.taps):
            judged = fit_probes(scenes, {name: by_tap[tap] for name, by_tap in by_name.items()}, order)
            inverses = [inverse, "null_shuffled"] if inverse == "probe" else [inverse]
            for factor, unit in UNITS.items():
                values = by_split["train" if factor == "background" else "test"]
                about: dict[str, Any] = {"factor": factor, "unit": unit, "chance": CHANCE[factor]}
                for name, (scores, weight) in zip(inverses, judged[factor], strict=False):
                    values.add("factor_score", {train_seed: scores}, tap, name, weight=weight, **about)
    return pd.concat([values.table() for values in by_split.values()], ignore_index=True)


def _summaries(model: Target, images: Tensor) -> dict[str, Summary]:
    return {tap: summary_of(representation) for tap, representation in model.record(images / 255, model.taps).items()}


def _features(
    model: Target, scenes: Mapping[str, Truth], summaries: Mapping[str, Summary]
) -> dict[str, dict[str, Tensor]]:
    """{name of the scenes: {tap: (N, D)}}: one pass for all taps, of which only summaries are kept."""

    def summarised(batch: Tensor) -> dict[str, Tensor]:
        recorded = model.record(batch / 255, list(summaries))
        return {tap: summary(recorded[tap]) for tap, summary in summaries.items()}

    parts = {name: [summarised(batch) for batch in truth.images.split(BATCH)] for name, truth in scenes.items()}
    return {name: {tap: torch.cat([part[tap] for part in of]) for tap in summaries} for name, of in parts.items()}
