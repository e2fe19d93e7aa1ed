"""What `backsight plan` predicts for a training, against what `backsight run` then takes for it.

About two minutes on two cores; both compute on one thread. SIZE=full: three families, more images and steps.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from table import Row, compare, write

from backsight.app.plan import plan_preset
from backsight.project import project_root

TARGET, FULL = "scenes-vit", os.environ.get("SIZE") == "full"
FAMILIES = ("linear", "direct", "modular") if FULL else ("modular",)
IMAGES, STEPS = (3000, 100) if FULL else (600, 6)


def seconds_of_run(preset: Path, family: str, folder: Path) -> float:
    """Of one training, with the parameters and threads that the run graph gives it."""
    notebook = project_root() / "notebooks" / "02_train_inverse.ipynb"
    command = [sys.executable, "-m", "backsight.app.cli", "run", str(notebook), "-f", str(preset)]
    for assignment in (f"target={TARGET}", "images=scenes", f"families=[{family}]", "seed=0"):
        command += ["-p", assignment]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BACKSIGHT_CACHE": str(folder / "cache")}
    started = time.perf_counter()
    subprocess.run([*command, "--out", str(folder / family)], env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> list[Row]:
    """One row for each training and one for all."""
    training = {"taps": "blocks", "steps": STEPS, "train_images": IMAGES, "validation_images": 32, "test_images": 16}
    graph = {
        "once": [],
        "targets": {TARGET: {"train": "scenes", "quality": []}},
        "families": list(FAMILIES),
        "seeds": [0],
    }
    with tempfile.TemporaryDirectory() as folder:
        preset = Path(folder) / "bench.yaml"
        preset.write_text(yaml.safe_dump({"02_train_inverse": training, "graph": graph}), encoding="utf-8")
        started = time.perf_counter()
        runs = plan_preset(str(preset), cores=1).runs
        planning = time.perf_counter() - started
        taken = {family: seconds_of_run(preset, family, Path(folder)) for family in FAMILIES}
    predicted = {row.kind.removeprefix("train "): row.seconds for row in runs.itertuples()}
    case, goal = f"{TARGET}, {IMAGES} images, {STEPS} steps", "0.5-2"
    rows = [
        compare("plan", f"{case}, {family}", "seconds, predicted / taken", predicted[family], "s", taken[family], goal)
        for family in FAMILIES
    ]
    whole = sum(taken.values())
    rows.append(
        compare("plan", f"{case}, all", "seconds, predicted / taken", sum(predicted.values()), "s", whole, goal)
    )
    rows.append(compare("plan", f"{case}, all", "seconds, planning / taken", planning, "s", whole, "< 60 s"))
    return rows


if __name__ == "__main__":
    write("plan", main())
