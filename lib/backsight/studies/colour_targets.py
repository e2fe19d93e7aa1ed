"""Targets whose habit of colour is known, on which the reversion index is tried.

A target with prototype eyes is shown every object in its canonical hue, whatever hue the picture judged has: its layers
hold the prototype, and the index of its honest inverses must say so. Small ViTs trained on scenes of one colour rule
have learned that hue tells the class ("strict") or that it tells nothing ("uniform": any hue for any class).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.scenes.dataset import MEAN, STD, Batch
from backsight.scenes.render import CLASS_NAMES, SceneOptions, render_many
from backsight.scenes.train import VitTraining
from backsight.studies.by_seed import families_by_seed
from backsight.studies.colour import ColourRecord, Families, index_values, merged, record_colours, uniform_by_seed
from backsight.studies.recolour import JudgedObjects, hue_shifts, open_objects
from backsight.targets import Target
from backsight.targets.base import Preprocessing, seeded
from backsight.targets.timm_models import TimmTarget
from backsight.training.loop import train
from backsight.training.muon import Group

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2,
    "num_classes": len(CLASS_NAMES),
    "global_pool": "token",
}
SANITY = "sanity_"  # before the measures of these targets, so that no figure takes them for a study's target
BATCH = 64
RATE = 2e-3
WARMUP = 20  # steps
MOST_SCENES = 6000


def train_small_vit(rule: str, steps: int, seed: int = 0, progress: bool = True) -> Target:
    """A ViT of 32 x 32 pixels (16 tokens, 4 blocks) that names the dominant object of scenes of one colour rule.

    rule: "strict" | "mixed" | "jittered" | "uniform". It sees up to MOST_SCENES scenes of the training split. The
    patch tokens learn the share of each class in their patch beside it, as in the shipped classifiers' recipes.
    """
    if steps < 1:
        raise BacksightError(f"{steps} steps train nothing: give 1 or more")
    data = _small_scenes(rule, min(BATCH * steps, MOST_SCENES), seed)
    with seeded(seed):
        training = VitTraining(SMALL)

    def batch_at(step: int) -> Batch:
        chosen = torch.from_numpy(np.random.default_rng([seed, step]).integers(len(data.pixels), size=BATCH))
        return Batch(data.pixels[chosen], data.objects[chosen], data.labels[chosen], data.boxes[chosen])

    train(
        {"vit": training},
        lambda batch, _step: [("vit", training.loss(batch))],
        batch_at,
        steps=steps,
        learning_rate=RATE,
        weight_decay=0.05,
        warmup=WARMUP / max(steps, WARMUP),
        group=lambda name, parameter: Group(False),
        seed=seed,
        title=f"small ViT, {rule} hues",
        progress=progress,
    )
    model = training.model
    size = (SMALL["img_size"], SMALL["img_size"])
    name = f"small ViT, {rule} hues"
    return TimmTarget(model, name, f"trained {steps} steps", Preprocessing(MEAN, STD, size), CLASS_NAMES)


def _small_scenes(rule: str, count: int, seed: int) -> Batch:
    """Training scenes of one rule at the small size, all in one batch."""
    side = SMALL["img_size"]
    options = SceneOptions(rule=rule)  # type: ignore[arg-type]
    images = np.zeros((count, side, side, 3), np.uint8)
    objects = np.zeros((count, side, side), np.int64)
    labels = np.full((count, 4), -1)
    for i, scene in enumerate(render_many("train", count, seed, side, options)):
        images[i], labels[i, : len(scene.labels)] = scene.image, scene.labels
        for k, mask in enumerate(scene.masks):
            objects[i][mask] = k + 1
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    preprocessing = Preprocessing(MEAN, STD, (side, side))
    boxes = torch.zeros(count, 4, 4)
    return Batch(preprocessing.normalise(pixels), torch.from_numpy(objects), torch.from_numpy(labels), boxes)


def small_accuracy(target: Target, rules: Sequence[str] = ("strict", "uniform"), count: int = 300) -> pd.DataFrame:
    """Top-1 on test scenes of each rule: target, rule, top1, n."""
    rows = []
    for rule in rules:
        options = SceneOptions(rule=rule)  # type: ignore[arg-type]
        scenes = list(render_many("test", count, 0, target.image_size[0], options))
        images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float() / 255
        logits = target(images)
        assert isinstance(logits, Tensor)
        hits = logits.argmax(1).numpy() == [scene.dominant for scene in scenes]
        rows.append({"target": target.name, "rule": rule, "top1": float(np.mean(hits)), "n": count})
    return pd.DataFrame(rows)


def habit_values(
    target: Target, n: int, seeds: Sequence[int], fit_images: int, shifts: int = 12, seed: int = 0
) -> pd.DataFrame:
    """Values of the reversion index of a target on test scenes, by linear inverses that know typical colours and not.

    The measures are called sanity_reversion_index, sanity_hue_follow and sanity_prototype_pull. Inverse "linear" is
    fitted on scenes of the mixed rule, "linear_uniform" on scenes of uniform hues.
    """
    objects = open_objects("scenes", target, n, seed)
    families = merged(families_by_seed(target, "", seeds, fit_images), uniform_by_seed(target, seeds, fit_images))
    record = record_colours(
        target, objects, [*hue_shifts(shifts)], families, answers=False, nulls=False, seed=seed, progress=False
    )
    return _sanity(record)


def prototype_eyes_values(
    target: Target, objects: JudgedObjects, families: Families, share: float, shifts: int = 12, seed: int = 0
) -> pd.DataFrame:
    """Values of the reversion index of a target that is shown its objects `share` of the way to their canonical hue.

    families: of the target itself. A perfect inverse would have an index of about `share`.
    """
    record = record_colours(
        target,
        objects,
        hue_shifts(shifts),
        families,
        answers=False,
        nulls=False,
        prototype_eyes=share,
        seed=seed,
        progress=False,
    )
    return _sanity(record).assign(target=f"{target.name}, prototype eyes {share:g}")


def _sanity(record: ColourRecord) -> pd.DataFrame:
    values = index_values(record)
    values = values[values["inverse"] != "painter"]
    return values.assign(measure=SANITY + values["measure"])


def told_apart(rows: pd.DataFrame, first: str, second: str, category: str = "canonical") -> pd.DataFrame:
    """The reversion index of two targets side by side, by inverse and tap, and whether their intervals are disjoint."""
    index = rows[(rows.measure == f"{SANITY}reversion_index") & (rows.category == category)]
    sides = [index[index.target == name].set_index(["inverse", "depth", "tap"]) for name in (first, second)]
    table = sides[0].join(sides[1], lsuffix="_first", rsuffix="_second", how="inner")
    apart = (table.low_first > table.high_second) | (table.low_second > table.high_first)
    shown = table[[f"{part}_{side}" for side in ("first", "second") for part in ("value", "low", "high")]]
    return shown.assign(apart=apart).sort_index().reset_index()
