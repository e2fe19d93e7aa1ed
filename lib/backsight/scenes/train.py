"""The recipes of the shipped targets, and the classifiers among them; the detectors are in detectors.py.

Matrices of the blocks are trained by Muon, the rest by AdamW, in the library's one loop. All see the training
photographs only. Beside its own task, a classifier's tokens are trained too: each predicts which share of its
patch each class covers, with a linear head that exists during training only and leaves a stock architecture behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.project import write_atomically, write_json
from backsight.scenes.card import write_card
from backsight.scenes.dataset import BACKGROUND, MEAN, SIZE, STD, Batch, batch_of, drawn, patch_shares, scene_arrays
from backsight.scenes.detectors import DeformableDetrTraining, DetrTraining
from backsight.scenes.render import CLASS_NAMES
from backsight.scenes.score import evaluate
from backsight.targets import load_target
from backsight.targets.base import seeded
from backsight.training.loop import train
from backsight.training.muon import Group

VIT_ARGUMENTS: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 2,
    "num_classes": len(CLASS_NAMES),
    "class_token": True,
    "global_pool": "token",
}
SWIN_ARGUMENTS: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 64,
    "depths": [2, 2, 2],
    "num_heads": [2, 4, 8],
    "mlp_ratio": 2,
    "drop_path_rate": 0.0,
    "num_classes": len(CLASS_NAMES),
}


class VitTraining(nn.Module):
    """A classifier of timm that names the dominant object; the patch tokens after the last norm predict the shares."""

    slow: ClassVar[tuple[str, ...]] = ()
    architecture: ClassVar[str] = "vit_tiny_patch16_224"
    model: Any

    def __init__(self, arguments: dict[str, Any] = VIT_ARGUMENTS) -> None:
        super().__init__()
        import timm

        self.arguments, self.model = arguments, timm.create_model(self.architecture, **arguments)
        self.patch_head = nn.Linear(self.model.num_features, BACKGROUND + 1)

    def loss(self, batch: Batch) -> Tensor:
        tokens = self.model.forward_features(batch.pixels)
        named = F.cross_entropy(self.model.forward_head(tokens), batch.labels[:, 0])
        return named + share_loss(self.patch_head(tokens[:, 1:]), batch, self.arguments["patch_size"])

    def outputs(self, pixels: Tensor) -> Tensor:
        """Class logits (B, K) of normalised pixels."""
        return self.model(pixels)

    def save(self, folder: Path) -> None:
        """As timm reads it: weights, and the architecture's name and arguments."""
        weights = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        write_atomically(folder / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))
        description = {
            "architecture": self.architecture,
            "model_args": self.arguments,
            "num_classes": len(CLASS_NAMES),
            "label_names": list(CLASS_NAMES),
            "pretrained_cfg": {
                "input_size": [3, SIZE, SIZE],
                "mean": MEAN,
                "std": STD,
                "interpolation": "bicubic",
                "crop_pct": 1.0,
            },
        }
        write_json(folder / "config.json", description)


class DeitTraining(VitTraining):
    """The same with a distillation token, whose head learns the hard decision of the shipped scenes-vit.

    The class token's head learns the label, and the model answers with the mean of both (Touvron et al. 2021). Size and
    blocks are those of scenes-vit, so that the two differ by the distillation only.
    """

    architecture = "deit_tiny_distilled_patch16_224"

    def __init__(self) -> None:
        super().__init__()
        self.teacher = [load_target("scenes-vit", device="cpu").model]  # in a list: no part of what is trained or saved

    def loss(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            decided = self.teacher[0].to(batch.pixels.device)(batch.pixels).argmax(1)
        tokens = self.model.forward_features(batch.pixels)
        labelled = F.cross_entropy(self.model.head(tokens[:, 0]), batch.labels[:, 0])
        taught = F.cross_entropy(self.model.head_dist(tokens[:, 1]), decided)
        return (labelled + taught) / 2 + share_loss(self.patch_head(tokens[:, 2:]), batch, self.arguments["patch_size"])


class SwinTraining(VitTraining):
    """A Swin; the tokens at the end of the second and of the last stage predict the shares."""

    architecture = "swin_tiny_patch4_window7_224"

    def __init__(self) -> None:
        super().__init__(SWIN_ARGUMENTS)
        width = 2 * SWIN_ARGUMENTS["embed_dim"]
        self.middle_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, BACKGROUND + 1))

    def loss(self, batch: Batch) -> Tensor:
        model, patch = self.model, self.arguments["patch_size"]
        first, second, third = model.layers
        middle = second(first(model.patch_embed(batch.pixels)))
        last = model.norm(third(middle))
        total = F.cross_entropy(model.forward_head(last), batch.labels[:, 0])
        total = total + share_loss(self.middle_head(middle).flatten(1, 2), batch, 2 * patch)
        return total + share_loss(self.patch_head(last).flatten(1, 2), batch, 4 * patch)


def share_loss(logits: Tensor, batch: Batch, patch: int) -> Tensor:
    """Cross-entropy of the tokens' predictions (B, N, classes + 1) against the shares of the classes in each patch."""
    return -(patch_shares(batch, patch) * F.log_softmax(logits, -1)).sum(-1).mean()


@dataclass(frozen=True)
class Recipe:
    """Every number that training a shipped target depends on.

    schedule: steps over which the rates would fall to zero (cosine); 0: `steps`. scenes-vit and scenes-detr stop
    half-way down, scenes-deformable-detr at three fifths: their validation scores had passed what they are for.
    """

    target: str
    steps: int
    schedule: int = 0
    batch: int = 128
    images: int = 120_000
    seed: int = 0
    muon_rate: float = 2e-3
    rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 200
    query_groups: int = 3
    evaluate_every: int = 500
    evaluate_images: int = 1000

    def changed(self, steps: int = 0, seed: int | None = None) -> Recipe:
        """The recipe with another number of steps (0: its own) or another seed."""
        schedule = 0 if steps else self.schedule
        return replace(self, steps=steps or self.steps, schedule=schedule, seed=self.seed if seed is None else seed)


RECIPES: dict[str, Recipe] = {
    recipe.target: recipe
    for recipe in (
        Recipe("scenes-vit", steps=3500, schedule=7000, batch=64, images=64_000, evaluate_every=250),
        Recipe("scenes-deit", steps=2600, batch=64, images=64_000, evaluate_every=260),
        Recipe("scenes-detr", steps=2000, schedule=4400, batch=64, images=48_000, evaluate_every=250),
        Recipe("scenes-deformable-detr", steps=1140, schedule=1900, batch=64, images=48_000, evaluate_every=190),
        Recipe("scenes-swin", steps=2800, batch=64, images=64_000, evaluate_every=280),
    )
}
TRAININGS: dict[str, Callable[[Recipe], Any]] = {
    "scenes-vit": lambda recipe: VitTraining(),
    "scenes-deit": lambda recipe: DeitTraining(),
    "scenes-detr": lambda recipe: DetrTraining(recipe.query_groups),
    "scenes-deformable-detr": lambda recipe: DeformableDetrTraining(recipe.query_groups),
    "scenes-swin": lambda recipe: SwinTraining(),
}


def group_of(name: str, parameter: Tensor, slow: tuple[str, ...] = (), muon_rate: float = 2.0) -> Group:
    """Muon for the maps between streams in the blocks, no decay for what is no map; muon_rate: a multiple."""
    if any(part in name for part in slow):
        return Group(False, 0.1, 0.0)
    in_blocks = ".blocks." in name or ".layers." in name
    if parameter.ndim == 2 and in_blocks and "bbox" not in name and "bias_table" not in name:
        return Group(True, muon_rate)
    plain = parameter.ndim < 2 or any(part in name for part in ("embed", "token", "group", "bias"))
    return Group(False, 1.0, 0.0 if plain else 1.0)


def train_target(
    recipe: Recipe, folder: str | Path, device: str = "cpu", processes: int = 1, progress: bool = True
) -> Path:
    """Train a shipped target from nothing and write its weights, configuration and model card into `folder`.

    The weights are those of the best validation score, whose curve goes into `curve.csv`; an interrupted training is
    resumed. Raises BacksightError when the loss is no longer a number, with the step.
    """
    if recipe.target not in RECIPES:
        raise BacksightError(f"no recipe for {recipe.target!r}; there are recipes for {', '.join(RECIPES)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    data = scene_arrays("train", recipe.images, recipe.seed, processes=processes)
    validation = scene_arrays("validation", recipe.evaluate_images, recipe.seed, processes=processes)
    rendered = time.monotonic()
    with seeded(recipe.seed):
        training = TRAININGS[recipe.target](recipe).to(device)
    measure = "ap50" if hasattr(training, "set_loss") else "top1"

    def losses(batch: Batch, _step: int) -> Iterator[tuple[str, Tensor]]:
        yield recipe.target, training.loss(batch)

    history = train(
        {recipe.target: training},
        losses,
        lambda step: batch_of(data, drawn(len(data), recipe.batch, recipe.seed, step), device),
        steps=recipe.steps,
        schedule=recipe.schedule or None,
        learning_rate=recipe.rate,
        weight_decay=recipe.weight_decay,
        warmup=recipe.warmup / (recipe.schedule or recipe.steps),
        group=partial(group_of, slow=training.slow, muon_rate=recipe.muon_rate / recipe.rate),
        seed=recipe.seed,
        validate=lambda: {recipe.target: -evaluate(training, validation, device)["all"][measure]},
        validate_every=recipe.evaluate_every,
        checkpoint=folder / "checkpoint.safetensors",
        identity=asdict(recipe),
        title=recipe.target,
        progress=progress,
    )
    training.save(folder)
    scores, seen = (history[history.split == split].set_index("step") for split in ("validation", "train"))
    curve = scores.assign(loss=seen.loss.reindex(scores.index, method="ffill"), **{measure: -scores.loss})
    curve.reset_index()[["step", "seconds", "loss", measure]].to_csv(folder / "curve.csv", index=False)
    minutes = {"rendering": (rendered - began) / 60, "training": (time.monotonic() - rendered) / 60}
    parameters = sum(p.numel() for p in training.model.parameters())
    taps = load_target(str(folder)).available_taps
    write_card(folder, recipe.target, asdict(recipe), parameters, taps, minutes, device, processes)
    return folder
