"""Frames: one small picture for every tap, so that a page without a server can leaf through the depths of a model.

    <run>/frames/<target>/<picture>--<family>--<tap>.png    at the target's own size
    <run>/frames.csv                                        what each file shows, with its PSNR and SSIM

The pictures are named as `app.pictures` names them.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from backsight.app.pictures import open_picture
from backsight.errors import BacksightError
from backsight.project import shown, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

FRAMES, FRAME_TABLE = "frames", "frames.csv"
INPUT = "input"  # the family of a picture's own frame; its tap is `pixels`
PIXELS = "pixels"


@dataclass(frozen=True)
class Frame:
    """One row of frames.csv: a picture as it comes back from one tap, or (family "input", tap "pixels") as it goes in.

    file: relative to the run's folder, "" before it is written; shows: the picture in words; depth: of the tap, None
    for the input; psnr in dB and ssim against the input, NaN for the input.
    """

    file: str
    target: str
    picture: str
    shows: str
    family: str
    tap: str
    depth: int | None
    psnr: float
    ssim: float

    @property
    def is_input(self) -> bool:
        return self.family == INPUT


COLUMNS = tuple(field.name for field in fields(Frame))


# ----------------------------------------------------------------------------------------------------- making frames


def make_frames(
    target: str,
    depths: Mapping[str, int],
    names: Sequence[str],
    images: Tensor,
    reconstructions: Mapping[str, Mapping[str, Tensor]],
) -> list[tuple[Frame, np.ndarray]]:
    """(Frame, pixels (H, W, 3) uint8) of every picture: the input first, then each family from shallow to deep.

    depths: {tap: depth}; names: of the B pictures; images: (B, 3, H, W) in [0, 1]; reconstructions: {family: {tap:
    (B, 3, H, W)}}. PSNR and SSIM are of the reconstructions themselves, before they are rounded to 8 bits.
    """
    from backsight.measures.pixels import psnr, ssim

    described = [open_picture(name, (64, 64)).words for name in names]
    frames: dict[str, list[tuple[Frame, np.ndarray]]] = {
        name: [(Frame("", target, name, shows, INPUT, PIXELS, None, math.nan, math.nan), _pixels(image))]
        for name, shows, image in zip(names, described, images, strict=True)
    }
    for family, taps in reconstructions.items():
        for tap in sorted(taps, key=lambda tap: depths[tap]):
            scores = zip(psnr(images, taps[tap]).tolist(), ssim(images, taps[tap]).tolist(), strict=True)
            for name, shows, image, (decibels, similarity) in zip(names, described, taps[tap], scores, strict=True):
                frame = Frame("", target, name, shows, family, tap, depths[tap], decibels, similarity)
                frames[name].append((frame, _pixels(image)))
    return [frame for name in names for frame in frames[name]]


def _pixels(image: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] as (H, W, 3) uint8."""
    return (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def frame_metrics(frames: Iterable[Frame], weights: Mapping[str, str], seed: int) -> list[dict[str, Any]]:
    """Tidy rows (values.METRIC_COLUMNS) of the PSNR and SSIM of frames; one image each, so without an interval.

    weights: {target: weights}; the column `dataset` holds the picture's name.
    """
    from backsight.tables.pool import metrics_row

    rows = []
    for frame in (frame for frame in frames if not frame.is_input):
        place: dict[str, Any] = {"tap": frame.tap, "depth": frame.depth, "inverse": frame.family}
        place |= {"target": frame.target, "weights": weights[frame.target], "dataset": frame.picture, "split": "test"}
        for measure in ("psnr", "ssim"):
            rows.append(metrics_row(measure, getattr(frame, measure), math.nan, math.nan, 1, seed, **place))
    return rows


# ------------------------------------------------------------------------------------------------------------- files


def write_frames(folder: str | Path, frames: Iterable[tuple[Frame, np.ndarray]]) -> list[Frame]:
    """Write the frames of a run's folder, in place of earlier ones: the PNGs, and frames.csv last.

    Returns them with their files.
    """
    folder = Path(folder)
    (folder / FRAME_TABLE).unlink(missing_ok=True)  # first: without its table no half-written set is taken for whole
    shutil.rmtree(folder / FRAMES, ignore_errors=True)
    written: list[Frame] = []
    taken: set[str] = set()
    for frame, pixels in frames:
        frame = replace(frame, file=_file(frame, taken))
        taken.add(frame.file.lower())
        write_atomically(folder / frame.file, partial(Image.fromarray(pixels).save, optimize=True))
        written.append(frame)
    table = pd.DataFrame(written, columns=COLUMNS).astype({"depth": "Int64"})
    write_atomically(folder / FRAME_TABLE, lambda temporary: table.to_csv(temporary, index=False, float_format="%.6g"))
    return written


def _file(frame: Frame, taken: set[str]) -> str:
    """A file name that every system can hold; a number is added where two names come out alike."""
    target, *rest = (
        re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.") or "unnamed"
        for part in (frame.target, frame.picture, frame.family, frame.tap)
    )
    stem = f"{FRAMES}/{target}/{'--'.join(rest)}"
    names = (f"{stem}{suffix}.png" for suffix in ("", *(f"--{number}" for number in range(2, len(taken) + 3))))
    return next(name for name in names if name.lower() not in taken)


def read_frames(folder: str | Path) -> list[Frame]:
    """The frames of a run, in the order of frames.csv; none where it saved none.

    Raises BacksightError, with the line, on a table that cannot be read, lacks columns, names a file that is not there
    or lies outside the run's folder, or shows a picture twice, in two sizes or without its input.
    """
    folder = Path(folder)
    where = shown(folder / FRAME_TABLE)
    if not (folder / FRAME_TABLE).is_file():
        return []
    try:
        table = pd.read_csv(folder / FRAME_TABLE, dtype=str, keep_default_na=False)
        if missing := [name for name in COLUMNS if name not in table.columns]:
            raise ValueError(f"it lacks the columns {', '.join(missing)}")
    except (OSError, ValueError) as error:
        raise BacksightError(f"{where} cannot be read ({error}): run 00_quickstart again.") from error
    frames: list[Frame] = []
    keys: set[tuple[str, str, str, str]] = set()
    sizes: dict[tuple[str, str], tuple[int, int]] = {}
    for number, row in enumerate(table.to_dict("records"), start=2):
        try:
            frame = _frame(row)
            size = _size_of(folder, frame.file)
            key = (frame.target, frame.picture, frame.family, frame.tap)
            if key in keys:
                raise ValueError(f"{' / '.join(key)} is there twice")
            if sizes.setdefault(key[:2], size) != size:
                raise ValueError(
                    f"{frame.file} is {size[0]} x {size[1]} pixels, other frames of {frame.picture!r} are not"
                )
        except ValueError as error:
            raise BacksightError(f"{where}, line {number}: {error}: run 00_quickstart again.") from error
        keys.add(key)
        frames.append(frame)
    for frame in frames:
        if (frame.target, frame.picture, INPUT, PIXELS) not in keys:
            raise BacksightError(f"{where}: {frame.picture!r} of {frame.target} has no input frame beside it.")
    return frames


def _frame(row: Mapping[Any, str]) -> Frame:
    numbers: dict[str, float] = {}
    for name in ("depth", "psnr", "ssim"):
        try:
            numbers[name] = float(row[name] or math.nan)
        except ValueError:
            raise ValueError(f"{name} is {row[name]!r}, not a number") from None
    depth = None if math.isnan(numbers["depth"]) else round(numbers["depth"])
    if depth is None and row["family"] != INPUT:
        raise ValueError(f"{row['family']} at {row['tap']} of {row['target']} has no depth")
    return Frame(**{name: row[name] for name in COLUMNS if name not in numbers}, **numbers | {"depth": depth})  # type: ignore[arg-type]


def _size_of(folder: Path, file: str) -> tuple[int, int]:
    """Width and height of a frame's PNG. Raises ValueError where it is none of the run's."""
    inside = PurePosixPath(file)
    if inside.is_absolute() or ".." in inside.parts or inside.suffix != ".png":
        raise ValueError(f"{file!r} is no PNG below the run's folder")
    if not (folder / file).is_file():
        raise ValueError(f"there is no file {file}")
    try:
        with Image.open(folder / file, formats=("PNG",)) as image:
            return image.size
    except OSError as error:
        raise ValueError(f"{file} cannot be read") from error
