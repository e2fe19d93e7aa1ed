"""Small made-up runs for the tests of the page over them, as backsight.app.runs and backsight.app.frames leave them."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from backsight.app.frames import save_frames

VIT, DETR = "scenes-vit", "a/detr <b>"
VALUES = {  # (tap, inverse): PSNR in dB
    ("patch_embed", "linear"): 31.84,
    ("patch_embed", "direct"): 33.21,
    ("patch_embed", "modular"): 33.62,
    ("patch_embed", "null_mean"): 12.6,
    ("norm", "linear"): 23.93,
    ("norm", "direct"): 25.81,
    ("norm", "modular"): 25.5,
    ("norm", "null_mean"): 12.6,
}


def rows(target: str, dataset: str = "scenes", split: str = "test", better: float = 0.0, seed: int = 0) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "target": target,
            "weights": "shipped",
            "dataset": dataset,
            "split": split,
            "tap": tap,
            "depth": ("patch_embed", "norm").index(tap),
            "inverse": inverse,
            "measure": measure,
            "value": scale * (value + better),
            "low": scale * (value + better - 0.4),
            "high": scale * (value + better + 0.4),
            "n": 500,
            "seed": seed,
        }
        for (tap, inverse), value in VALUES.items()
        for measure, scale in (("psnr", 1.0), ("ssim", 0.02), ("mse", 0.0001))
    )


def save_png(path: Path, description: str = "") -> None:
    told = PngInfo()
    if description:
        told.add_text("Title", "Each row is one image.")
        told.add_text("Comment", "pictures" if "picture" in description else "")
        told.add_text("Description", description)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (26, 10), (20, 90, 160)).save(path, pnginfo=told)


def save_run(
    folder: Path,
    notebook: str,
    parameters: dict[str, Any],
    metrics: pd.DataFrame | None = None,
    figures: dict[str, str] | None = None,
    status: str | None = "complete",
) -> Path:
    """A run folder as backsight.app.runs leaves it; status None: killed before its end."""
    folder.mkdir(parents=True)
    record = {
        "notebook": notebook,
        "parameters": parameters,
        "seed": 7,
        "started": "2026-02-01T10:00:00+00:00",
        "versions": {"python": "3.11.2", "torch": "2.15.0"},
        "commit": "0123456789abcdef",
        "modified": True,
        "hardware": {"processor": "a processor", "cores": 2, "memory_gib": 15.6, "gpu": None},
        "weights": {parameters["target"]: {"weights": "shipped", "hash": "feed"}} if "target" in parameters else {},
        "seconds": {"fit": 61.0, "total": 125.4},
    }
    (folder / "started.json").write_text(json.dumps(record))
    if status is not None:
        (folder / "run.json").write_text(json.dumps({"status": status, **record}))
    (folder / f"{notebook}{'.partial' if status is None else ''}.ipynb").write_text("{}")
    if metrics is not None:
        metrics.to_csv(folder / "metrics.csv", index=False)
    for stem, description in (figures or {}).items():
        save_png(folder / "figures" / f"{stem}.png", description)
    return folder


class FrameTarget:
    """What save_frames asks of a target."""

    weights = "shipped"
    taps = ("patch_embed", "blocks.0", "norm")

    def __init__(self, name: str) -> None:
        self.name = name

    def depth(self, tap: str) -> int:
        return self.taps.index(tap)


def made_up_frames(run: Path, pictures: tuple[str, ...] = ("chelsea", "scene 22 hue 240")) -> pd.DataFrame:
    """Frames of 16 pixels: both families of VIT, one of DETR; the deeper a tap, the nearer to grey, tap by tap."""
    images = torch.linspace(0, 1, len(pictures) * 3 * 16 * 16).reshape(len(pictures), 3, 16, 16)
    made = {tap: 0.5 + share * (images - 0.5) for tap, share in zip(FrameTarget.taps, (0.9, 0.5, 0.2), strict=True)}
    vit, detr = FrameTarget(VIT), FrameTarget(DETR)
    rows = save_frames(run, vit, pictures, images, {"linear": made, "modular": made}, seed=3)  # type: ignore[arg-type]
    two = {"linear": dict(list(made.items())[:2])}
    rows += save_frames(run, detr, pictures, images, two, seed=3)  # type: ignore[arg-type]
    table = pd.DataFrame(rows)
    table.to_csv(run / "metrics.csv", index=False)
    return table


def save_results(project: Path) -> Path:
    """A project with results/default: complete runs, and some that are not. Returns that folder."""
    results = project / "results" / "default"
    targets = {"targets": [VIT, DETR], "photograph": "chelsea"}
    quickstart = save_run(
        results / "quickstart", "00_quickstart", targets, None, {VIT: "pictures of a cat, ever more blurred"}
    )
    made_up_frames(quickstart)
    quality = {"target": VIT, "images": "scenes"}
    save_run(results / "quality-vit", "03_quality", quality, rows(VIT), {"pictures-modular": "pictures", "psnr": ""})
    other = {"target": VIT, "images": "/somewhere/photographs"}
    save_run(results / "quality-vit-photographs", "03_quality", other, rows(VIT, "photographs"))
    save_run(results / "train-vit", "02_train_inverse", {"target": VIT}, rows(VIT, split="validation", better=5))
    save_run(results / "train-detr", "02_train_inverse", {"target": DETR}, rows(DETR, split="validation"))
    again = rows(DETR, split="validation", better=1, seed=1)
    save_run(results / "train-detr-again", "02_train_inverse", {"target": DETR}, again)
    save_run(results / "quality-detr", "03_quality", {"target": DETR}, rows(DETR), {"grid": ""}, status=None)
    save_run(results / "quality-odd", "03_quality", {"target": DETR}, rows(DETR).drop(columns="low"))
    (results / "notes").mkdir()  # no run: not named at all
    (results / "quality-vit" / "figures" / "broken_picture.png").write_text("no PNG")
    return results
