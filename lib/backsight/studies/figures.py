"""What 07_figures draws: the method with real pictures, and the tables of several runs brought into one."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from backsight.errors import BacksightError
from backsight.inverses.files import load, shipped_inverses
from backsight.scenes.render import render
from backsight.tables.names import LEADING_FAMILIES
from backsight.tables.pooling import pool
from backsight.tables.read import QUALITY, Study
from backsight.targets import load_target

COMPARED = ("psnr", "ssim", "psnr_background", "psnr_objects", "edge_f1", "mask_iou", "hue_error", "texture_accuracy")


def example_pictures(target: str = "scenes-vit", seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A test scene and its reconstruction from every tap, by the modular inverses that are shipped with a target.

    Returns ((3, H, W), {tap: (3, H, W)}) in [0, 1]. Raises BacksightError where the target has no such inverses.
    """
    frozen = load_target(target)
    folder = shipped_inverses(frozen)
    chains = load(folder, frozen).get("modular") if folder is not None else None
    if not chains:
        raise BacksightError(f"no modular inverses are shipped with {target}: the scheme is drawn with scenes-vit.")
    scene = render("test", 2, seed, size=max(frozen.image_size)).image
    image = torch.from_numpy(scene.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        recorded = frozen.record(image, list(chains))
        pictures = {tap: chain(recorded[tap])[0].clamp(0, 1).numpy() for tap, chain in chains.items()}
    return image[0].numpy(), pictures


def quality_of_targets(study: Study, dataset: str = "scenes", measures: Sequence[str] = COMPARED) -> pd.DataFrame:
    """The rows of the first of modular, direct and linear that all targets have, with `place` (see `placed`).

    Column `mean`: the same measure of the mean image. Raises BacksightError where no run has them, or no family.
    """
    rows = placed(study.rows(QUALITY, measures), dataset)
    names = [set(group["inverse"]) for _, group in rows.groupby("target")]
    family = next((name for name in LEADING_FAMILIES if all(name in known for known in names)), None)
    if family is None:
        raise BacksightError("the targets of this study share no inverse family: compare fewer of them.")
    mean = rows[rows["inverse"] == "null_mean"].groupby("measure")["value"].mean()
    rows = rows[rows["inverse"] == family]
    rows = rows.sort_values("measure", key=lambda names: names.map(list(measures).index), kind="stable")
    return rows.assign(mean=rows["measure"].map(mean))


def modular_minus_direct(study: Study, dataset: str = "scenes") -> pd.DataFrame:
    """PSNR of the chain minus the direct decoder's at every tap, image by image, with `place`."""
    values = study.values([QUALITY])
    values = values[values["inverse"].isin(["modular", "direct"])] if len(values) else values
    if len(values) == 0 or values["inverse"].nunique() < 2:
        raise BacksightError("no target has both a modular and a direct inverse: train both with 02_train_inverse.")
    values = values[values["measure"] == "psnr"].dropna(axis="columns", how="all")
    keys = ["target", "dataset", "split", "tap", "depth", "inverse", "measure"]
    return placed(pool(values, keys, {"inverse": "direct"}), dataset)


def placed(rows: pd.DataFrame, dataset: str | None = None) -> pd.DataFrame:
    """The rows with a value at a tap, in forward order; place: where it lies from the first tap (0) to the last (1).

    dataset: whose rows alone are wanted. Raises BacksightError where there is none.
    """
    rows = rows[rows["tap"].notna() & rows["value"].notna() & ((rows["dataset"] == dataset) | (dataset is None))]
    if rows.empty:
        raise BacksightError(f"no run of {QUALITY} in this study has such rows: run it on {dataset or 'scenes'}.")
    rank = rows.groupby("target")["depth"].rank("dense") - 1
    place = rank / rank.groupby(rows["target"]).transform("max").clip(lower=1)
    return rows.assign(place=place).sort_values("place", kind="stable")
