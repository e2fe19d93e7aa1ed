"""Model cards: the facts of a training, the scores on the test split, and both in words."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from backsight.project import write_atomically, write_json
from backsight.scenes.dataset import SIZE
from backsight.scenes.render import CLASSES, SPLIT_PHOTOGRAPHS

DESCRIPTIONS = {
    "scenes-vit": "a timm `VisionTransformer` that names the dominant object of a scene",
    "scenes-deit": "a timm `VisionTransformerDistilled`, taught by scenes-vit, that names the dominant object",
    "scenes-swin": "a timm `SwinTransformer` that names the dominant object of a scene",
    "scenes-detr": "a transformers `DetrForObjectDetection` that detects all objects of a scene",
    "scenes-deformable-detr": "a transformers `DeformableDetrForObjectDetection` that detects all objects of a scene",
}


def write_card(folder: Path, target: str, facts: dict[str, Any]) -> None:
    """The model card's facts about the training; `score_target` adds the scores on the test split."""
    data = {"dataset": "scenes", "split": "train", "photographs": SPLIT_PHOTOGRAPHS["train"], "rule": "mixed"}
    write_json(folder / "card.json", {"target": target, "data": data, **facts, "torch": torch.__version__})


def add_scores(folder: Path, scores: pd.DataFrame, count: int) -> None:
    """The table of `score_target` into the model card of a folder, and the card in words beside it."""
    card = json.loads((folder / "card.json").read_text())
    records = json.loads(scores.to_json(orient="records", double_precision=4))
    card |= {"scores": records, "scored_on": {"dataset": "scenes", "split": "test", "images": count}}
    write_json(folder / "card.json", card)
    write_atomically(folder / "README.md", lambda path: path.write_text(card_text(card)))


def card_text(card: dict[str, Any]) -> str:
    """The model card in Markdown: what it is, what it was trained on, its scores, and the command that remakes it."""
    name, recipe, data = card["target"], card["recipe"], card["data"]
    scores = pd.DataFrame(card["scores"])
    scores["text"] = [f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in scores.itertuples()]
    table = scores.set_index(["measure", "classes", "rule"])["text"].unstack(sort=False)
    rows = [f"| {m} | {c} | {usual} | {any_hue} |" for (m, c), usual, any_hue in table.itertuples()]
    return f"""\
# {name}

{name} is {DESCRIPTIONS[name]}: {card["parameters"]:,} parameters, {SIZE} x {SIZE} pixels, {len(CLASSES)} classes.
Trained by the backsight authors on the project's own procedural data; same licence as the project.

- **Data**: {recipe["images"]:,} `scenes` of the training split (seed {recipe["seed"]}, colour rule "{data["rule"]}"), \
on crops of {", ".join(data["photographs"])}.
- **Training**: {recipe["steps"]:,} steps of {recipe["batch"]} images, seed {recipe["seed"]}, \
{card["minutes"]["training"]:.1f} minutes on {card["device"]}, torch {card["torch"]}.
- **Scores**: test split, photographs {", ".join(SPLIT_PHOTOGRAPHS["test"])}, {card["scored_on"]["images"]:,} scenes \
for each colour rule; 95 % intervals in brackets.
- **Remake**: `backsight run notebooks/18_targets.ipynb -p retrain={name}`

| measure | classes | usual hues | random hues |
| --- | --- | --- | --- |
{chr(10).join(rows)}
"""
