"""Model cards: the facts of a training, the scores on the test split, and both in words."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def write_card(
    folder: Path,
    target: str,
    recipe: dict[str, Any],
    parameters: int,
    taps: Sequence[str],
    minutes: dict[str, float],
    device: str,
    processes: int,
) -> None:
    """The model card's facts about the training; `score_target` adds the scores on the test split."""
    card = {
        "target": target,
        "data": {"dataset": "scenes", "split": "train", "photographs": SPLIT_PHOTOGRAPHS["train"], "rule": "mixed"},
        "recipe": recipe,
        "parameters": parameters,
        "taps": list(taps),
        "minutes": {name: round(value, 1) for name, value in minutes.items()},
        "device": device,
        "processes": processes,
        "torch": torch.__version__,
    }
    write_json(folder / "card.json", card)


def add_scores(card_file: Path, scores: Any, count: int, save: bool) -> dict[str, Any]:
    """The model card with the table of `score_target` in it; save: also write it, and the card in words beside it."""
    card = json.loads(card_file.read_text())
    records = json.loads(scores.to_json(orient="records", double_precision=4))
    card |= {"scores": records, "scored_on": {"dataset": "scenes", "split": "test", "images": count}}
    if save:
        write_json(card_file, card)
        write_atomically(card_file.with_name("README.md"), lambda path: path.write_text(card_text(card)))
    return card


def card_text(card: dict[str, Any]) -> str:
    """The model card in Markdown: what it is, what it was trained on, its scores, and the command that remakes it."""
    recipe, minutes, data = card["recipe"], card["minutes"], card["data"]
    name = card["target"]
    lines = [
        f"# {name}",
        "",
        f"{name} is {DESCRIPTIONS[name]}: {card['parameters']:,} parameters, {SIZE} x {SIZE} pixels, "
        f"{len(CLASSES)} classes.",
        "Trained by the backsight authors on the project's own procedural data; same licence as the project.",
        "",
        f"- **Data**: {recipe['images']:,} `scenes` of the training split (seed {recipe['seed']}, colour rule "
        f'"{data["rule"]}"), on crops of {", ".join(data["photographs"])}.',
        f"- **Training**: {recipe['steps']:,} steps of {recipe['batch']} images, seed {recipe['seed']}, "
        f"{minutes['training']} minutes on {card['device']} (one thread of two busy cores), torch {card['torch']}.",
        f"- **Scores**: test split, photographs {', '.join(SPLIT_PHOTOGRAPHS['test'])}, "
        f"{card['scored_on']['images']:,} scenes for each colour rule; 95 % intervals in brackets.",
        f"- **Remake**: `backsight run notebooks/18_targets.ipynb -p retrain={name}`",
        "",
        "| measure | classes | usual hues | random hues |",
        "| --- | --- | --- | --- |",
    ]
    table: dict[tuple[str, str], dict[str, str]] = {}
    for row in card["scores"]:
        text = f"{row['value']:.3f}"
        if row.get("low") is not None:
            text += f" [{row['low']:.3f}, {row['high']:.3f}]"
        table.setdefault((row["measure"], row["classes"]), {})[row["rule"]] = text
    lines += [f"| {m} | {c} | {cell['mixed']} | {cell['uniform']} |" for (m, c), cell in table.items()]
    return "\n".join(lines) + "\n"
