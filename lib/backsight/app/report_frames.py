"""The frames of the runs (backsight.app.frames) as the page shows them: one strip of all depths for each picture,
target and family, with the pictures inside the page, since a page opened from a file may not compute with pictures
beside it.
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
from backsight.plots.style import INVERSE_NAMES, family_colour, inverse_order, target_colour

LARGEST_SIDE = 256  # pixels of a frame inside the page; larger ones are shown reduced
PIXELATED_BELOW = 129  # pixels; larger frames are smoothed when the browser scales them


@dataclass(frozen=True)
class Step:
    """One frame of a strip: the picture (a data URI), the tap and, but for the input, its scores."""

    image: str
    tap: str
    psnr: Traced | None
    ssim: Traced | None


@dataclass(frozen=True)
class Strip:
    """A picture as one family of inverses returns it from every tap of a target; picture, target: places in Play."""

    picture: int
    target: int
    family: str
    title: str
    width: int
    height: int
    pixelated: bool
    given: Step
    steps: Sequence[Step]


@dataclass(frozen=True)
class Choice:
    name: str
    text: str
    colour: str = ""


@dataclass(frozen=True)
class Play:
    """What can be chosen, and a strip for every choice that exists. reduced: some frames are shown smaller."""

    pictures: Sequence[Choice]
    targets: Sequence[Choice]
    families: Sequence[Choice]
    strips: Sequence[Strip]
    reduced: bool

    @property
    def target_names(self) -> list[str]:
        return [choice.name for choice in self.targets]


def read_play(folders: Sequence[Path]) -> tuple[Play | None, list[str]]:
    """The frames of all runs in one; of two runs that show the same, the last counts. Also says what could not be read.

    folders: of complete runs. None where no run saved frames.
    """
    found: dict[tuple[str, str, str], list[tuple[Path, Frame, int]]] = {}
    inputs: dict[tuple[Path, str, str], Frame] = {}
    problems = []
    for folder in folders:
        try:
            frames = read_frames(folder)
        except BacksightError as error:
            problems.append(str(error).rstrip("."))
            continue
        inputs |= {(folder, frame.picture, frame.target): frame for frame in frames if frame.is_input}
        new: dict[tuple[str, str, str], list[tuple[Path, Frame, int]]] = {}
        for line, frame in enumerate(frames, start=2):
            if not frame.is_input:
                new.setdefault((frame.picture, frame.target, frame.family), []).append((folder, frame, line))
        found |= new
    if not found:
        return None, problems
    pictures = {frame.picture: frame.shows for frames in found.values() for _, frame, _ in frames}
    targets = list(dict.fromkeys(target for _, target, _ in found))
    families = inverse_order([family for _, _, family in found])
    order = sorted(found, key=lambda key: (list(pictures).index(key[0]), targets.index(key[1]), families.index(key[2])))
    strips = []
    reduced = False
    for picture, target, family in order:
        steps = sorted(found[picture, target, family], key=lambda each: each[1].depth or 0)
        folder = steps[0][0]
        given = inputs[folder, picture, target]
        image, width, height, smaller = _embedded(folder / given.file)
        reduced |= smaller
        strips.append(
            Strip(
                picture=list(pictures).index(picture),
                target=targets.index(target),
                family=family,
                title=f"{picture}: {target}, {INVERSE_NAMES.get(family, family)}",
                width=width,
                height=height,
                pixelated=max(width, height) < PIXELATED_BELOW,
                given=Step(image, given.tap, None, None),
                steps=[_step(*each) for each in steps],
            )
        )
    play = Play(
        pictures=[Choice(name, shows) for name, shows in pictures.items()],
        targets=[Choice(name, name, target_colour(name)) for name in targets],
        families=[Choice(name, INVERSE_NAMES.get(name, name), family_colour(name)) for name in families],
        strips=strips,
        reduced=reduced,
    )
    return play, problems


def _step(folder: Path, frame: Frame, line: int) -> Step:
    source = (Source(f"{folder.name}/{FRAME_TABLE}", line),)
    return Step(
        image=_embedded(folder / frame.file)[0],
        tap=frame.tap,
        psnr=Traced(f"{frame.psnr:.1f}", sources=source, column="psnr"),
        ssim=Traced(f"{frame.ssim:.3f}".replace("-", "−"), sources=source, column="ssim"),
    )


def _embedded(path: Path) -> tuple[str, int, int, bool]:
    """A frame as data URI, its width and height in pixels, and whether it was made smaller."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if smaller := max(image.size) > LARGEST_SIDE:
            image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, "PNG", optimize=True)
            data = buffer.getvalue()
        width, height = image.size
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii"), width, height, smaller
