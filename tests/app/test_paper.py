"""The graph of the preset paper from end to end: models of its shapes with random weights, a few images of full size.

Targets are folders, images synthetic, counts small; notebooks, taps, families and all else are the preset's own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image, ImageDraw
from timm.models import save_for_hf

from backsight.app.parameters import read_preset
from backsight.app.plan import graph_runs
from backsight.data.leaves import dead_leaves

VIT, DETR = "vit_base_patch16_224.augreg_in21k_ft_in1k", "facebook/detr-resnet-50"
SEEDS = {VIT: 1, DETR: 1}  # of the graph, the first ones: an hour each on one core
CATEGORIES = {1: "apple", 44: "ball", 90: "cup"}  # as COCO numbers them: with gaps
SMALL: dict[str, dict[str, Any]] = {
    "02_train_inverse": {"steps": 2, "batch_size": 4, "train_images": 8, "validation_images": 4, "test_images": 4},
    "03_quality": {
        **{"n": 4, "measured": 3, "candidates": 4, "noises": [1.0], "noise_images": 2, "null_images": 8},
        **{"null_seeds": 1, "probe_images": 8, "cycled": 2},
    },
    "04_cross_layer": {"n": 3, "trained_images": 2, "train_images": 12, "null_seeds": [0]},
    "05_colour": {"n": 3, "shifts": 3, "fit_images": 8},
    "06_modular_vs_direct": {"n": 2, "steps": [1, 2], "batch_size": 2, "train_images": 4, "validation_images": 2},
    "10_tradeoff": {
        **{"ts": [0.0, 1.0], "n": 20, "train_images": 4, "fit_images": 12, "steps": 2, "batch_size": 2},
        **{"set_inputs": 256},
    },
}


def picture(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(dead_leaves((0, 0, seed), (height, width)))


def write_vit(folder: Path) -> None:
    torch.manual_seed(100)  # the untrained twins have the seeds of the graph
    save_for_hf(timm.create_model(VIT, pretrained=False), folder, safe_serialization=True)


def write_imagenet(folder: Path) -> None:
    """train/ and val/ of a thousand class folders with a photograph each, of which some are the same file."""
    pictures = [folder / f"{number}.jpg" for number in range(16)]
    folder.mkdir()
    for number, path in enumerate(pictures):
        picture(number, 240, 320 if number % 2 else 240).save(path)
    for part in ("train", "val"):
        for label in range(1000):
            place = folder / part / f"n{label:08d}"
            place.mkdir(parents=True)
            os.link(pictures[label % 16], place / f"{part}_{label}.JPEG")
    for path in pictures:
        path.unlink()


def write_detr(folder: Path) -> None:
    torch.manual_seed(100)
    labels = dict.fromkeys(range(91), "N/A") | CATEGORIES
    config = transformers.DetrConfig(backbone="resnet50", use_timm_backbone=True, use_pretrained_backbone=False)
    config.id2label, config.label2id = labels, {name: number for number, name in labels.items()}
    transformers.DetrForObjectDetection(config).save_pretrained(folder)
    transformers.DetrImageProcessor(size={"shortest_edge": 224, "longest_edge": 373}).save_pretrained(folder)


def write_coco(folder: Path) -> None:
    """train2017/ and val2017/ of 24 pictures, each with two coloured rectangles, and their annotations."""
    categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    for part in ("train2017", "val2017"):
        images, annotations = [], []
        (folder / part).mkdir(parents=True)
        for number in range(24):
            image = picture(number + 100 * (part == "val2017"), 240, 320)
            for index, (left, top, right, bottom) in enumerate(((20, 30, 170, 210), (200, 60, 290, 150))):
                ImageDraw.Draw(image).rectangle((left, top, right, bottom), (200 * index, 40 * (number % 5), 200))
                outline = [left, top, right, top, right, bottom, left, bottom]
                box = [left, top, right - left, bottom - top]
                about = {"id": 2 * number + index, "image_id": number, "category_id": [*CATEGORIES][number % 3]}
                annotations.append({**about, "segmentation": [outline], "bbox": box, "iscrowd": 0})
            image.save(folder / part / f"{number:04d}.jpg")
            images.append({"id": number, "file_name": f"{number:04d}.jpg", "width": 320, "height": 240})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def small_graph(target: str, folder: Path) -> tuple[list[str], dict[str, str], Path]:
    """Write model, images and preset; the command that runs the graph, its environment, and the preset."""
    model, images, preset = folder / "model", folder / "images", folder / "paper.yaml"
    if target == VIT:
        write_vit(model)
        write_imagenet(images)
    else:
        write_detr(model)
        write_coco(images)
    sections = read_preset("paper")
    for notebook, small in SMALL.items():
        sections[notebook] |= small
    graph = sections["graph"]
    graph["targets"] = {str(model): graph["targets"][target]}
    graph["seeds"] = graph["seeds"][: SEEDS[target]]
    preset.write_text(yaml.safe_dump(sections))
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--nolock", "--keep-going", "--quiet", "rules"]
    command += ["--config", f"preset={preset}", f"results={folder / 'results'}"]
    return command, {graph["targets"][str(model)]["train"]: str(images)}, preset


@pytest.mark.slow
@pytest.mark.parametrize("target", [VIT, DETR])
def test_the_graph_of_the_paper_runs_to_its_end(target: str, root: Path, tmp_path: Path) -> None:
    command, folders, preset = small_graph(target, tmp_path)
    done = subprocess.run(command, cwd=root, env=os.environ | folders, capture_output=True, text=True, check=False)
    results = tmp_path / "results" / "paper"
    runs = graph_runs(str(preset))
    logs = {run: results / run / "log.txt" for run in runs if not (results / run / "run.json").exists()}
    assert not logs, {run: log.read_text()[-400:] if log.exists() else "not begun" for run, log in logs.items()}
    assert done.returncode == 0, done.stderr[-3000:]
    assert (results / "index.html").is_file()
    for metrics in results.glob("*/metrics.csv"):
        assert pd.read_csv(metrics)["value"].notna().any(), metrics
