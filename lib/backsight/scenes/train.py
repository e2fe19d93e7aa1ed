"""The recipes of the shipped targets and the loop that follows them.

Matrices of the transformer blocks are trained by Muon, the rest by AdamW, with warm-up and cosine decay. All see the
training photographs only. The help that each gets beside the task's own loss is told where it is built.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from backsight.errors import BacksightError
from backsight.scenes.card import write_card
from backsight.scenes.classifiers import ClassifierTraining, SwinTraining, VitTraining
from backsight.scenes.dataset import batch_of, scene_arrays, shuffled
from backsight.scenes.detectors import DeformableDetrTraining, DetectorTraining, DetrTraining
from backsight.scenes.distilled import DeitTraining
from backsight.scenes.score import evaluate
from backsight.targets import load_target

Training = ClassifierTraining | DetectorTraining


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

    def changed(self, steps: int = 0, seed: int | None = None) -> "Recipe":
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

TRAININGS: dict[str, Callable[[Recipe], Training]] = {
    "scenes-vit": lambda recipe: VitTraining(),
    "scenes-deit": lambda recipe: DeitTraining(),
    "scenes-detr": lambda recipe: DetrTraining(recipe.query_groups),
    "scenes-deformable-detr": lambda recipe: DeformableDetrTraining(recipe.query_groups),
    "scenes-swin": lambda recipe: SwinTraining(),
}


def _optimisers(training: Training, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices, others, plain, slow = [], [], [], []
    for name, parameter in training.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(part in name for part in training.slow):
            slow.append(parameter)
        elif parameter.ndim == 2 and (".blocks." in name or ".layers." in name) and not _kept_from_muon(name):
            matrices.append(parameter)
        elif parameter.ndim >= 2 and not any(part in name for part in ("embed", "token", "group", "bias")):
            others.append(parameter)
        else:
            plain.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": others, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if slow:
        groups.append({"params": slow, "weight_decay": 0.0, "lr": 0.1 * recipe.rate})
    return [
        torch.optim.Muon(
            matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98)),
    ]


def _kept_from_muon(name: str) -> bool:
    """Box heads, and the tables of relative position biases, which are no maps between streams."""
    return "bbox" in name or "bias_table" in name


def train_target(
    recipe: Recipe, folder: str | Path, device: str = "cpu", processes: int = 1, progress: bool = True
) -> Path:
    """Train a shipped target from nothing and write its weights, configuration and model card into `folder`.

    Raises BacksightError when the loss is no longer a number, with the step. The curve of the validation score goes
    into `curve.csv`.
    """
    import pandas as pd

    if recipe.target not in RECIPES:
        raise BacksightError(f"no recipe for {recipe.target!r}; there are recipes for {', '.join(RECIPES)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    data = scene_arrays("train", recipe.images, recipe.seed, processes=processes)
    validation = scene_arrays("validation", recipe.evaluate_images, recipe.seed, processes=processes)
    rendered = time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        training = TRAININGS[recipe.target](recipe)
    training.to(device).train()
    optimisers = _optimisers(training, recipe)
    rates = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    curve: list[dict[str, float]] = []
    bar = tqdm(range(recipe.steps), desc=recipe.target, leave=False, disable=not progress)
    batches = shuffled(len(data), recipe.batch, recipe.seed)
    running = 0.0
    for step in bar:
        factor = (
            min(1.0, (step + 1) / recipe.warmup)
            * 0.5
            * (1 + math.cos(math.pi * step / (recipe.schedule or recipe.steps)))
        )
        for optimiser, starts in zip(optimisers, rates, strict=True):
            for group, start in zip(optimiser.param_groups, starts, strict=True):
                group["lr"] = start * factor
        loss = training.loss(batch_of(data, next(batches), device))
        if not torch.isfinite(loss):
            raise BacksightError(f"the loss of {recipe.target} is {loss.item()} at step {step}: lower the rates")
        loss.backward()
        nn.utils.clip_grad_norm_(training.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.3f}")
        if (step + 1) % recipe.evaluate_every == 0 or step + 1 == recipe.steps:
            score = evaluate(training, validation, device)["all"]
            curve.append({"step": step + 1, "seconds": time.monotonic() - began, "loss": running, **score})
            pd.DataFrame(curve).to_csv(folder / "curve.csv", index=False)
            if progress:
                bar.write(json.dumps(curve[-1]))
            training.train()
            training.save(folder)
    minutes = {"rendering": (rendered - began) / 60, "training": (time.monotonic() - rendered) / 60}
    parameters = sum(p.numel() for p in training.model.parameters())
    taps = load_target(str(folder)).available_taps
    write_card(folder, recipe.target, asdict(recipe), parameters, taps, minutes, device, processes)
    return folder
