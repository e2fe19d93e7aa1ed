"""Frames: one small picture for every tap, so that a page without a server can leaf through the depths of a model.

A run keeps them as <run>/frames/*/*.png, and its metrics.csv tells them: beside the PSNR and SSIM of each
reconstruction stand `file` and `input`, the paths of both pictures, and `shows`, the picture in words.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from backsight.app.pictures import as_png, data_address, open_picture
from backsight.app.runs import file_name
from backsight.project import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from backsight.targets import Target

FRAMES = "frames"
LARGEST_SIDE = 256  # pixels of a frame, all of which are inside the page
PIXELATED_BELOW = 129  # pixels; larger frames are smoothed when the browser scales them


def save_frames(
    folder: Path,
    target: "Target",
    names: Sequence[str],
    images: "Tensor",
    reconstructions: Mapping[str, Mapping[str, "Tensor"]],
    seed: int,
) -> list[dict[str, Any]]:
    """Write the B pictures as they go into a target and come back from it; returns their tidy rows, one image each.

    names: of the pictures, as `app.pictures` has them; images: (B, 3, H, W) in [0, 1]; reconstructions: {family: {tap:
    (B, 3, H, W)}}. PSNR and SSIM are of the reconstructions themselves, before they are rounded or made smaller.
    """
    from torch.nn.functional import interpolate

    from backsight.measures.pixels import psnr, ssim

    def save(image: "Tensor", *words: str) -> str:
        if (scale := LARGEST_SIDE / max(image.shape)) < 1:
            image = interpolate(image[None], scale_factor=scale, mode="bilinear", antialias=True)[0]
        file = "/".join((FRAMES, file_name(target.name), f"{'--'.join(map(file_name, words))}.png"))
        write_atomically(folder / file, lambda path: path.write_bytes(as_png(image, optimize=True)))
        return file

    kinds = [f"{number} {name}" for number, name in enumerate(names)]  # two names may be one as the name of a file
    inputs = [save(image, kind, "input") for kind, image in zip(kinds, images, strict=True)]
    shows = [open_picture(name, (64, 64)).words for name in names]
    whole = {"target": target.name, "weights": target.weights, "split": "test", "n": 1, "seed": seed}
    rows = []
    for family, taps in reconstructions.items():
        for tap, pictures in taps.items():
            scores = {"psnr": psnr(images, pictures).tolist(), "ssim": ssim(images, pictures).tolist()}
            for at, name in enumerate(names):
                file = save(pictures[at], kinds[at], family, tap)
                place = {"dataset": name, "tap": tap, "depth": target.depth(tap), "inverse": family}
                shown = {"low": math.nan, "high": math.nan, "file": file, "input": inputs[at], "shows": shows[at]}
                rows += [{**whole, **place, "measure": name, "value": scores[name][at], **shown} for name in scores]
    return rows


def strips(folder: Path, metrics: pd.DataFrame) -> tuple[list[dict[str, Any]], list[str]]:
    """Every picture, target and family of the runs below a folder with all its taps, the pictures inside as data URIs.

    metrics: the rows of all runs, with the column `run`; of two runs that show the same the last counts, and one that
    was committed without its frames not at all. Also returns what could not be read.
    """
    if "file" not in metrics:
        return [], []
    key = ["dataset", "target", "inverse"]
    rows = metrics[metrics["file"].notna() & metrics["run"].map(lambda run: (folder / run / FRAMES).is_dir())]
    rows = rows[rows["run"] == rows.groupby(key)["run"].transform("max")]
    playable, problems = [], []
    for names, part in rows.groupby(key, sort=False):
        run, first = folder / part["run"].iloc[0], part.iloc[0]
        scores = part.pivot(index=["depth", "tap", "file"], columns="measure", values="value")
        strip = dict(zip(("picture", "target", "family"), names, strict=True)) | {"shows": first["shows"]}
        try:
            strip["image"] = _address(run, first["input"])
            with Image.open(run / first["input"], formats=("PNG",)) as image:
                strip |= {"width": image.width, "height": image.height, "pixelated": max(image.size) < PIXELATED_BELOW}
            strip["steps"] = [
                {"image": _address(run, file), "tap": tap, "psnr": f"{psnr:.1f}", "ssim": f"{ssim:.3f}"}
                for (_, tap, file), psnr, ssim in scores[["psnr", "ssim"]].itertuples()
            ]
            playable.append(strip)
        except (OSError, ValueError) as error:
            problems.append(f"{run.name}: {error}")
    return playable, problems


def _address(run: Path, file: str) -> str:
    """The address inside a page of a file of the run's own folder. Raises OSError, ValueError where it is none."""
    path = (run / file).resolve()
    if not path.is_relative_to(run.resolve()):
        raise ValueError(f"{file!r} is not below the run's folder")
    return data_address(path.read_bytes())
