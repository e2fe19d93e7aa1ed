"""The frames of the runs (app.frames) as the page shows them: all depths of each picture, target and family.

Their pictures are inside the page, since a page opened from a file may not compute with pictures beside it.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from backsight.app.frames import FRAME_TABLE, Frame, read_frames
from backsight.app.report_sources import Source, Traced
from backsight.errors import BacksightError
from backsight.plots.style import INVERSE_NAMES, inverse_order

LARGEST_SIDE = 256  # pixels of a frame inside the page; larger ones are shown reduced
PIXELATED_BELOW = 129  # pixels; larger frames are smoothed when the browser scales them


@dataclass(frozen=True)
class Step:
    """One frame of a strip: the picture (a data URI), the tap and its scores."""

    image: str
    tap: str
    psnr: Traced
    ssim: Traced


@dataclass(frozen=True)
class Strip:
    """A picture (input: a data URI) as one family of inverses returns it from every tap of a target.

    picture, target: places in Play; reduced: whether frames are shown smaller.
    """

    picture: int
    target: int
    family: str
    title: str
    input: str
    width: int
    height: int
    pixelated: bool
    reduced: bool
    steps: Sequence[Step]


@dataclass(frozen=True)
class Play:
    """What can be chosen ({name: words} of pictures and families), and a strip for every choice that exists."""

    pictures: dict[str, str]
    targets: list[str]
    families: dict[str, str]
    strips: Sequence[Strip]

    @property
    def reduced(self) -> bool:
        return any(strip.reduced for strip in self.strips)


def read_play(folders: Sequence[Path]) -> tuple[Play | None, list[str]]:
    """The frames of all runs in one; of two runs that show the same, the last counts. Also says what could not be read.

    folders: of complete runs. None where no run saved frames.
    """
    shown: dict[tuple[str, str, str], list[tuple[Path, Frame, int]]] = {}  # by picture, target and family
    inputs: dict[tuple[Path, str, str], Frame] = {}
    problems = []
    for folder in folders:
        try:
            frames = read_frames(folder)
        except BacksightError as error:
            problems.append(str(error).rstrip("."))
            continue
        of_this_run: dict[tuple[str, str, str], list[tuple[Path, Frame, int]]] = {}
        for line, frame in enumerate(frames, start=2):
            if frame.is_input:
                inputs[folder, frame.picture, frame.target] = frame
            else:
                key = (frame.picture, frame.target, frame.family)
                of_this_run.setdefault(key, []).append((folder, frame, line))
        shown |= of_this_run
    if not shown:
        return None, problems
    pictures = {frame.picture: frame.shows for frames in shown.values() for _, frame, _ in frames}
    targets = list(dict.fromkeys(target for _, target, _ in shown))
    families = inverse_order([family for _, _, family in shown])
    names = list(pictures)
    strips = []
    for picture, target, family in sorted(
        shown, key=lambda key: (names.index(key[0]), targets.index(key[1]), families.index(key[2]))
    ):
        steps = sorted(shown[picture, target, family], key=lambda step: step[1].depth or 0)
        folder = steps[0][0]
        image, (width, height), reduced = _embedded(folder / inputs[folder, picture, target].file)
        strips.append(
            Strip(
                picture=names.index(picture),
                target=targets.index(target),
                family=family,
                title=f"{picture}: {target}, {INVERSE_NAMES.get(family, family)}",
                input=image,
                width=width,
                height=height,
                pixelated=max(width, height) < PIXELATED_BELOW,
                reduced=reduced,
                steps=[_step(*step) for step in steps],
            )
        )
    return Play(pictures, targets, {name: INVERSE_NAMES.get(name, name) for name in families}, strips), problems


def _step(folder: Path, frame: Frame, line: int) -> Step:
    source = (Source(f"{folder.name}/{FRAME_TABLE}", line),)
    return Step(
        image=_embedded(folder / frame.file)[0],
        tap=frame.tap,
        psnr=Traced(f"{frame.psnr:.1f}", sources=source, column="psnr"),
        ssim=Traced(f"{frame.ssim:.3f}".replace("-", "−"), sources=source, column="ssim"),
    )


def _embedded(path: Path) -> tuple[str, tuple[int, int], bool]:
    """A frame as data URI, its width and height in pixels, and whether it was made smaller."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if reduced := max(image.size) > LARGEST_SIDE:
            image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, "PNG", optimize=True)
            data = buffer.getvalue()
        return "data:image/png;base64," + base64.b64encode(data).decode("ascii"), image.size, reduced
