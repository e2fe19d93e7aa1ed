"""The recipes of the shipped targets, and the classifiers among them; the detectors are in detectors.py.

Matrices of the blocks are trained by Muon, the rest by AdamW, in the library's one loop. All see the training
photographs only. Beside its own task, a classifier's tokens are trained too: each predicts which share of its
patch each class covers, with a linear head that exists during training only and leaves a stock architecture behind.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import Tensor, nn

from backsight.errors import BacksightError, nearest
from backsight.scenes.card import write_card
from backsight.scenes.dataset import BACKGROUND, MEAN, SIZE, STD, SceneTensors, drawn, scene_tensors
from backsight.scenes.detectors import DeformableDetrTraining, DetrTraining
from backsight.scenes.render import CLASS_NAMES
from backsight.scenes.score import evaluate
from backsight.targets import load_target
from backsight.targets.base import seeded
from backsight.training.loop import train
from backsight.training.muon import Group

_ARGUMENTS: dict[str, Any] = {"img_size": SIZE, "mlp_ratio": 2, "num_classes": len(CLASS_NAMES)}


class VitTraining(nn.Module):
    """A classifier of timm that names the dominant object; the patch tokens after the last norm predict the shares."""

    slow: ClassVar[tuple[str, ...]] = ()
    architecture: ClassVar[str] = "vit_tiny_patch16_224"
    arguments: ClassVar[dict[str, Any]] = _ARGUMENTS | {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
    model: Any

    def __init__(self) -> None:
        super().__init__()
        look = {"mean": (MEAN,) * 3, "std": (STD,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
        look |= {"input_size": (3, SIZE, SIZE)}
        self.model = timm.create_model(self.architecture, pretrained_cfg_overlay=look, **self.arguments)
        self.patch_head = nn.Linear(self.model.num_features, BACKGROUND + 1)

    def loss(self, scenes: SceneTensors) -> Tensor:
        tokens = self.model.forward_features(scenes.pixels)
        named = F.cross_entropy(self.model.forward_head(tokens), scenes.labels[:, 0])
        return named + share_loss(self.patch_head(tokens[:, 1:]), scenes, self.arguments["patch_size"])

    def outputs(self, pixels: Tensor) -> Tensor:
        """Class logits (B, K) of normalised pixels."""
        return self.model(pixels)

    def save(self, folder: Path) -> None:
        """As timm reads it: weights, and the architecture's name and arguments."""
        labels = {"label_names": [*CLASS_NAMES]}
        save_for_hf(self.model, str(folder), labels, self.arguments, safe_serialization=True)


class DeitTraining(VitTraining):
    """The same with a distillation token, whose head learns the hard decision of the shipped scenes-vit.

    The class token's head learns the label, and the model answers with the mean of both (Touvron et al. 2021). Size and
    blocks are those of scenes-vit, so that the two differ by the distillation only.
    """

    architecture = "deit_tiny_distilled_patch16_224"

    def __init__(self) -> None:
        super().__init__()
        self.teacher = [load_target("scenes-vit", device="cpu").model]  # in a list: no part of what is trained or saved

    def loss(self, scenes: SceneTensors) -> Tensor:
        pixels = scenes.pixels
        with torch.no_grad():
            decided = self.teacher[0](pixels).argmax(1)
        tokens = self.model.forward_features(pixels)
        labelled = F.cross_entropy(self.model.head(tokens[:, 0]), scenes.labels[:, 0])
        taught = F.cross_entropy(self.model.head_dist(tokens[:, 1]), decided)
        shares = share_loss(self.patch_head(tokens[:, 2:]), scenes, self.arguments["patch_size"])
        return (labelled + taught) / 2 + shares


class SwinTraining(VitTraining):
    """A Swin; the tokens at the end of the second and of the last stage predict the shares."""

    architecture = "swin_tiny_patch4_window7_224"
    arguments: ClassVar[dict[str, Any]] = _ARGUMENTS | {
        **{"patch_size": 4, "window_size": 4, "embed_dim": 64, "depths": [2, 2, 2], "num_heads": [2, 4, 8]},
        "drop_path_rate": 0.0,
    }

    def __init__(self) -> None:
        super().__init__()
        width = 2 * self.arguments["embed_dim"]
        self.middle_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, BACKGROUND + 1))

    def loss(self, scenes: SceneTensors) -> Tensor:
        model, patch = self.model, self.arguments["patch_size"]
        first, second, third = model.layers
        middle = second(first(model.patch_embed(scenes.pixels)))
        last = model.norm(third(middle))
        total = F.cross_entropy(model.forward_head(last), scenes.labels[:, 0])
        total = total + share_loss(self.middle_head(middle).flatten(1, 2), scenes, 2 * patch)
        return total + share_loss(self.patch_head(last).flatten(1, 2), scenes, 4 * patch)


def share_loss(logits: Tensor, scenes: SceneTensors, patch: int) -> Tensor:
    """Cross-entropy of the tokens' predictions (B, N, classes + 1) against the share of each patch that each class (and
    the background, last) covers."""
    lookup = torch.cat([torch.full_like(scenes.labels[:, :1], BACKGROUND), scenes.labels], 1)
    classes = lookup.gather(1, scenes.objects.long().flatten(1)).view_as(scenes.objects)
    one_hot = F.one_hot(classes, BACKGROUND + 1).float().permute(0, 3, 1, 2)
    shares = F.avg_pool2d(one_hot, patch).flatten(2).transpose(1, 2)
    return F.cross_entropy(logits.flatten(0, 1), shares.flatten(0, 1))


@dataclass(frozen=True)
class Recipe:
    """Every number that training a shipped target depends on.

    schedule: steps over which the rates would fall to zero (cosine); 0: `steps`. scenes-vit and scenes-detr stop
    half-way down, scenes-deformable-detr at three fifths: their validation scores had passed what they are for.
    """

    target: str
    steps: int
    schedule: int = 0
    batch: int = 64
    images: int = 64_000
    seed: int = 0
    muon_rate: float = 2e-3
    rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 200
    evaluate_every: int = 250
    evaluate_images: int = 1000


_RECIPES = {
    "scenes-vit": (VitTraining, Recipe("scenes-vit", steps=3500, schedule=7000)),
    "scenes-deit": (DeitTraining, Recipe("scenes-deit", steps=2600, evaluate_every=260)),
    "scenes-swin": (SwinTraining, Recipe("scenes-swin", steps=2800, evaluate_every=280)),
    "scenes-detr": (DetrTraining, Recipe("scenes-detr", steps=2000, schedule=4400, images=48_000)),
    "scenes-deformable-detr": (
        DeformableDetrTraining,
        Recipe("scenes-deformable-detr", steps=1140, schedule=1900, images=48_000, evaluate_every=190),
    ),
}
TRAININGS: dict[str, Any] = {name: training for name, (training, _) in _RECIPES.items()}
RECIPES: dict[str, Recipe] = {name: recipe for name, (_, recipe) in _RECIPES.items()}


def recipe_of(target: str, steps: int = 0, seed: int = 0) -> Recipe:
    """The recipe of a shipped target, with another number of steps (0: its own) and seed. Raises BacksightError."""
    if target not in RECIPES:
        raise BacksightError(f"no recipe for {target!r}; {nearest(target, [*RECIPES])}")
    recipe = replace(RECIPES[target], seed=seed)
    return replace(recipe, steps=steps, schedule=0) if steps else recipe


def group_of(name: str, parameter: Tensor, slow: tuple[str, ...] = (), muon_rate: float = 2.0) -> Group:
    """Muon for the maps between streams in the blocks, no decay for what is no map; muon_rate: a multiple."""
    if any(part in name for part in slow):
        return Group(False, 0.1, 0.0)
    in_blocks = ".blocks." in name or ".layers." in name
    if parameter.ndim == 2 and in_blocks and "bbox" not in name and "bias_table" not in name:
        return Group(True, muon_rate)
    plain = parameter.ndim < 2 or any(part in name for part in ("embed", "token", "bias"))
    return Group(False, 1.0, 0.0 if plain else 1.0)


def train_target(recipe: Recipe, folder: str | Path, processes: int = 1) -> Path:
    """Train a shipped target from nothing and write its weights, configuration and model card into `folder`.

    The weights are those of the best validation score, whose curve goes into `curve.csv`; an interrupted training is
    resumed. Raises BacksightError when the loss is no longer a number, with the step.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    data = scene_tensors("train", recipe.images, recipe.seed, processes=processes)
    validation = scene_tensors("validation", recipe.evaluate_images, recipe.seed, processes=processes)
    rendered = time.monotonic()
    with seeded(recipe.seed):
        training = TRAININGS[recipe.target]()
    measure = "ap50" if hasattr(training, "set_loss") else "top1"

    def losses(batch: SceneTensors, _step: int) -> Iterator[tuple[str, Tensor]]:
        yield recipe.target, training.loss(batch)

    history = train(
        {recipe.target: training},
        losses,
        lambda step: data.take(drawn(len(data), recipe.batch, recipe.seed, step)),
        steps=recipe.steps,
        schedule=recipe.schedule or None,
        learning_rate=recipe.rate,
        weight_decay=recipe.weight_decay,
        warmup=recipe.warmup / (recipe.schedule or recipe.steps),
        group=partial(group_of, slow=training.slow, muon_rate=recipe.muon_rate / recipe.rate),
        seed=recipe.seed,
        validate=lambda: {recipe.target: -evaluate(training, validation)},
        validate_every=recipe.evaluate_every,
        checkpoint=folder / "checkpoint.safetensors",
        identity=asdict(recipe),
        title=recipe.target,
    )
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # a kill leaves the files before, or these
        training.save(Path(temporary))
        for file in Path(temporary).iterdir():
            file.replace(folder / file.name)
    scores, seen = (history[history.split == split].set_index("step") for split in ("validation", "train"))
    curve = scores.assign(loss=seen.loss.reindex(scores.index, method="ffill"), **{measure: -scores.loss})
    curve.reset_index()[["step", "seconds", "loss", measure]].to_csv(folder / "curve.csv", index=False)
    facts = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "taps": list(load_target(str(folder)).available_taps),
        "minutes": {
            "rendering": round((rendered - began) / 60, 1),
            "training": round((time.monotonic() - rendered) / 60, 1),
        },
        "device": "cpu",
        "processes": processes,
    }
    write_card(folder, recipe.target, facts)
    return folder
