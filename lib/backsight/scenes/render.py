"""`scenes`: a procedural, seeded, COCO-format data set whose truth is known to the pixel.

A scene is a crop of a real photograph with one to four textured, anti-aliased silhouettes on it. Splits differ by
seed *and* by photograph. Hue is a cue and never the label: every canonical hue is shared by two silhouettes, a
canonical object shows its hue with probability 0.85 only, a third of the classes has no hue of its own, and the hues
180 and 300 degrees are owned by no class.

Geometry, colour and background are drawn from separate random streams, so the same (split, seed, index) rendered with
other colour options is an exact counterfactual. Everything that reaches a pixel is integer arithmetic (or plain
products), so the bytes do not depend on the processor.
"""

import colorsys
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw

from backsight.data.leaves import dead_leaves
from backsight.errors import BacksightError, SourceError
from backsight.scenes.photographs import SPLIT_PHOTOGRAPHS, photograph

Array = np.ndarray
Polygon = tuple[tuple[float, float], ...]

VERSION = 1  # part of the cache key: raise it whenever a change alters a rendered byte
SUPERSAMPLING = 4
_STEP = 15  # brightness of one covered sub-pixel in the mean of 16: keeps that mean an exact integer below 256
CANONICAL_PROBABILITY = 0.85
CANONICAL_SPREAD = 10.0  # degrees to either side
ROTATION = 25.0  # degrees to either side
DOMINANCE = 2.5  # area of the dominant object over the area of the next one
DOMINANT_AREA = (0.08, 0.32)  # share of the image
SMALLEST_AREA = 0.022
LARGE_AREA_SPAN = 0.12  # width of the range of areas when `minimum_area` asks for large objects

_SPLIT_CODE = {"train": 1, "validation": 2, "test": 3}
_STREAMS = (1, 2, 3)  # of random numbers: geometry, colour, background


def _circle(radius: float = 1.0) -> Polygon:
    angles = [2 * math.pi * i / 40 for i in range(40)]
    return tuple((radius * math.cos(a), radius * math.sin(a)) for a in angles)


def _star() -> Polygon:
    polar = [((1.0, 0.5)[i % 2], math.pi * i / 5 - math.pi / 2) for i in range(10)]
    return tuple((radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in polar)


def _crescent() -> Polygon:
    outer = [(math.cos(a), math.sin(a)) for a in np.linspace(math.radians(55), math.radians(305), 28).tolist()]
    # the inner edge runs back from the last outer corner to the first, on a circle further right
    (x, y), (start, end) = (0.62, 0.0), (outer[-1], outer[0])
    radius = math.dist(start, (x, y))
    first, last = (math.atan2(corner[1] - y, corner[0] - x) % (2 * math.pi) for corner in (start, end))
    angles = np.linspace(first, last, 18)[1:-1].tolist()
    return (*outer, *((x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles))


def _heart() -> Polygon:
    def height(t: float) -> float:
        return 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)

    angles = [2 * math.pi * i / 36 for i in range(36)]
    return tuple((16 * math.sin(t) ** 3 / 16, -height(t) / 16) for t in angles)


def _capsule() -> Polygon:
    angles = np.linspace(-math.pi / 2, math.pi / 2, 12).tolist()
    right = [(0.6 + 0.45 * math.cos(a), 0.45 * math.sin(a)) for a in angles]
    return tuple(right + [(-x, -y) for x, y in right])


_SQUARE: Polygon = ((-1, -1), (1, -1), (1, 1), (-1, 1))
_TRIANGLE: Polygon = ((0, -1), (1, 0.8), (-1, 0.8))
_PLUS: Polygon = (
    *((-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33)),
    *((0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33)),
)
_ARROW: Polygon = ((-1, -0.32), (0, -0.32), (0, -0.95), (1, 0), (0, 0.95), (0, 0.32), (-1, 0.32))
_BOWTIE: Polygon = ((-1, -0.8), (0, -0.18), (1, -0.8), (1, 0.8), (0, 0.18), (-1, 0.8))
_TEE: Polygon = ((-1, -1), (1, -1), (1, -0.4), (0.32, -0.4), (0.32, 1), (-0.32, 1), (-0.32, -0.4), (-1, -0.4))


@dataclass(frozen=True)
class SceneClass:
    """A category: silhouette in unit coordinates, its hole if any, and its canonical hue in degrees or None."""

    name: str
    hue: float | None
    outline: Polygon
    hole: Polygon = ()

    @property
    def area(self) -> float:
        return _area(self.outline) - _area(self.hole)


def _area(polygon: Polygon) -> float:
    pairs = zip(polygon, (*polygon[1:], *polygon[:1]), strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs) / 2)


CLASSES: tuple[SceneClass, ...] = (
    SceneClass("disc", 0.0, _circle()),
    SceneClass("star", 0.0, _star()),
    SceneClass("square", 60.0, _SQUARE),
    SceneClass("crescent", 60.0, _crescent()),
    SceneClass("triangle", 120.0, _TRIANGLE),
    SceneClass("heart", 120.0, _heart()),
    SceneClass("plus", 240.0, _PLUS),
    SceneClass("ring", 240.0, _circle(), _circle(0.52)),
    SceneClass("arrow", None, _ARROW),
    SceneClass("bowtie", None, _BOWTIE),
    SceneClass("capsule", None, _capsule()),
    SceneClass("tee", None, _TEE),
)
CLASS_NAMES: tuple[str, ...] = tuple(c.name for c in CLASSES)
UNOWNED_HUES: tuple[float, ...] = (180.0, 300.0)
TEXTURES = ("plain", "stripes", "checks", "dots", "gradient")

Rule = Literal["mixed", "uniform"]


@dataclass(frozen=True)
class SceneOptions:
    """What a scene shows; the defaults are the data set that the shipped targets were trained on.

    rule: how a class with a canonical hue is coloured: "mixed" (its hue ±10° with probability 0.85, else any) or
        "uniform" (any hue, as colour-free classes always).
    hue_shift: degrees added to the hue of the recoloured objects. set_hue: their hue in degrees, or None.
    grey: the recoloured objects lose their saturation, their value stays.
    recolour: which objects `hue_shift`, `set_hue` and `grey` act on.
    minimum_area: share of the image that the dominant object covers at least (0.3 for the colour study).
    background: a crop of one of the split's photographs, or "leaves", of which there are endlessly many (not for tests:
        leaves are cut out of the photographs that trained).
    """

    rule: Rule = "mixed"
    hue_shift: float = 0.0
    set_hue: float | None = None
    grey: bool = False
    recolour: Literal["all", "dominant"] = "all"
    minimum_area: float = 0.0
    background: Literal["photographs", "leaves"] = "photographs"

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise BacksightError(f"no colour rule {self.rule!r}; choose one of {', '.join(get_args(Rule))}")
        if not 0 <= self.minimum_area <= 0.5:
            raise BacksightError(f"minimum_area is {self.minimum_area}; it is a share of the image from 0 to 0.5")


DEFAULT_OPTIONS = SceneOptions()


@dataclass(frozen=True)
class Scene:
    """One rendered image and the truth about it. Objects are ordered by area, the dominant one first.

    image: (H, W, 3) uint8 sRGB; masks: (M, H, W) bool, the visible pixels of each object (at least half covered);
    boxes: (M, 4) float, x, y, width, height in pixels, tight around the masks; labels: (M,) index into CLASSES;
    hues: (M,) degrees in [0, 360), NaN for a grey object; background: name of the photograph, or "leaves".
    """

    image: Array
    masks: Array
    boxes: Array
    labels: Array
    hues: Array
    textures: tuple[str, ...]
    background: str

    @property
    def dominant(self) -> int:
        """Class index of the dominant object."""
        return int(self.labels[0])


def render(split: str, index: int, seed: int = 0, size: int = 64, options: SceneOptions = DEFAULT_OPTIONS) -> Scene:
    """Scene `index` of a split: the same arguments give the same bytes.

    Raises BacksightError for an unknown split or a size below 16 pixels.
    """
    if split not in SPLIT_PHOTOGRAPHS:
        raise SourceError(f"scenes have no split {split!r}; choose one of {', '.join(SPLIT_PHOTOGRAPHS)}")
    if size < 16:
        raise BacksightError(f"scenes of {size} pixels cannot show their silhouettes; choose a size of 16 or more")
    place = [VERSION, seed, _SPLIT_CODE[split], index]
    geometry, colour, ground = (np.random.Generator(np.random.PCG64([*place, stream])) for stream in _STREAMS)
    if options.background == "leaves":
        image, background = dead_leaves((*place, *_STREAMS), (size, size)).astype(np.int32), "leaves"
    else:
        image, background = _background(ground, split, size)
    coverages, labels = _arrange(geometry, size, options)
    recoloured = [options.recolour == "all" or position == 0 for position in range(len(labels))]
    filled = [_fill(colour, CLASSES[k], size, options, own) for k, own in zip(labels, recoloured, strict=True)]
    fills, hues, textures = zip(*filled, strict=True)
    seen = np.zeros((size, size), int)  # 1 + the object that is seen
    for position in (*range(1, len(labels)), 0):  # later ones lie on earlier ones, and the dominant object on top
        image = _compose(image, fills[position], coverages[position])
        seen[coverages[position] >= 8] = 1 + position
    masks = seen == np.arange(1, 1 + len(labels))[:, None, None]
    truth = np.array(labels), np.array(hues, dtype=float), textures, background
    return Scene(image.astype(np.uint8), masks, _boxes(masks), *truth)


def render_many(
    split: str, count: int, seed: int = 0, size: int = 64, options: SceneOptions = DEFAULT_OPTIONS, start: int = 0
) -> Iterator[Scene]:
    """Scenes `start` to `start + count` of a split, one at a time."""
    return (render(split, index, seed, size, options) for index in range(start, start + count))


@cache
def _photograph(name: str) -> Image.Image:
    return Image.fromarray(photograph(name))


def _background(random: np.random.Generator, split: str, size: int) -> tuple[Array, str]:
    """A crop of one of the split's photographs, flipped, with its channels permuted half of the time."""
    names = SPLIT_PHOTOGRAPHS[split]
    name = names[int(random.integers(len(names)))]
    picture = _photograph(name)
    shortest = min(picture.size)
    side = int(shortest * (0.15 + 0.85 * random.random() ** 1.5))
    left = int(random.integers(picture.width - side + 1))
    top = int(random.integers(picture.height - side + 1))
    box = (left, top, left + side, top + side)
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box, 2.0))
    if random.random() < 0.5:
        pixels = pixels[:, ::-1]
    order = random.permutation(3)
    if random.random() < 0.5:
        pixels = pixels[:, :, order]
    gain = int(random.integers(160, 272))  # in 256ths: brightness from 0.63 to 1.06
    return np.minimum(pixels.astype(np.int32) * gain // 256, 255), name


def _arrange(random: np.random.Generator, size: int, options: SceneOptions) -> tuple[list[Array], list[int]]:
    """Coverage of each object in 16ths of a pixel, (H, W) int, and its class; the dominant one first.

    The numbers drawn do not depend on the outcome of the tries, only on the options that change geometry.
    """
    count = int(random.integers(1, 5))
    label = int(random.integers(len(CLASSES)))
    least, most = DOMINANT_AREA
    share = least + (most - least) * float(random.random())
    if options.minimum_area > 0:
        share = options.minimum_area + LARGE_AREA_SPAN * (share - least) / (most - least)
    angle, across, down = (float(v) for v in random.random(3))
    dominant = _draw(CLASSES[label], share, angle, across, down, size)
    smallest = options.minimum_area * size * size
    while np.count_nonzero(dominant >= 8) < smallest:  # a silhouette too slender for the frame may leave it
        share *= 1.06
        dominant = _draw(CLASSES[label], share, angle, across, down, size, inside=False)
    coverages, labels, taken = [dominant], [label], dominant >= 8
    dominant_area = np.count_nonzero(taken)
    largest = min(float(dominant_area) / (size * size) / DOMINANCE * 0.97, 0.2)
    for _ in range(count - 1):
        label = int(random.integers(len(CLASSES)))
        share = SMALLEST_AREA + (largest - SMALLEST_AREA) * float(random.random())
        for angle, across, down in random.random((8, 3)).tolist():
            coverage = _draw(CLASSES[label], share, angle, across, down, size)
            mask = coverage >= 8
            area = np.count_nonzero(mask)
            if 0 < area * DOMINANCE <= dominant_area and np.count_nonzero(mask & taken) <= 0.12 * area:
                coverages.append(coverage)
                labels.append(label)
                taken = taken | mask
                break
    order = [0, *sorted(range(1, len(labels)), key=lambda i: -np.count_nonzero(coverages[i] >= 8))]
    return [coverages[i] for i in order], [labels[i] for i in order]


def _draw(
    kind: SceneClass, share: float, angle: float, across: float, down: float, size: int, inside: bool = True
) -> Array:
    """Coverage of a silhouette that fills `share` of the image, in 16ths of a pixel: (size, size) int32.

    angle, across, down: numbers in [0, 1) that choose rotation and place; `inside` shrinks it to fit the frame.
    """
    turn = math.radians((2 * angle - 1) * ROTATION)
    cosine, sine = math.cos(turn), math.sin(turn)

    def turned(polygon: Polygon, scale: float) -> list[tuple[float, float]]:
        return [(scale * (x * cosine - y * sine), scale * (x * sine + y * cosine)) for x, y in polygon]

    scale = math.sqrt(share * size * size / kind.area)
    xs, ys = zip(*turned(kind.outline, scale), strict=True)
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    room = size - 1.0
    shrink = min(1.0, room / (right - left), room / (bottom - top)) if inside else 1.0
    centre_x = _place(left * shrink, right * shrink, across, size)
    centre_y = _place(top * shrink, bottom * shrink, down, size)
    fine = SUPERSAMPLING
    canvas = Image.new("L", (size * fine, size * fine))
    for polygon, value in ((kind.outline, _STEP * fine * fine), (kind.hole, 0)):
        placed = [(centre_x + x, centre_y + y) for x, y in turned(polygon, shrink * scale)]
        if placed:
            ImageDraw.Draw(canvas).polygon([(round(x * fine), round(y * fine)) for x, y in placed], fill=value)
    return np.asarray(canvas.reduce(fine)).astype(np.int32) // _STEP


def _place(low: float, high: float, fraction: float, size: int) -> float:
    """A centre for an extent [low, high] around it, inside [0, size] where it fits, else in the middle."""
    first, last = 0.5 - low, size - 0.5 - high
    return first + (last - first) * fraction if first <= last else (first + last) / 2


def _fill(
    random: np.random.Generator, kind: SceneClass, size: int, options: SceneOptions, recoloured: bool
) -> tuple[Array, float, str]:
    """Colour of every pixel if the object covered it, (H, W, 3) int32; its hue in degrees (NaN if grey); texture.

    One hue for the whole object: the texture changes the value only. Always draws the same count of numbers.
    """
    chance, free_hue, spread, saturation, value, contrast, turn, period, offset = (float(v) for v in random.random(9))
    texture = TEXTURES[int(random.integers(len(TEXTURES)))]
    hue = 360.0 * free_hue
    if kind.hue is not None and options.rule == "mixed" and chance < CANONICAL_PROBABILITY:
        hue = kind.hue + (2 * spread - 1) * CANONICAL_SPREAD
    saturation = 0.6 + 0.4 * saturation
    if recoloured:
        hue = (hue if options.set_hue is None else options.set_hue) + options.hue_shift
        saturation = 0.0 if options.grey else saturation
    hue %= 360.0
    colour = [round(1024 * channel) for channel in colorsys.hsv_to_rgb(hue / 360.0, saturation, 1.0)]
    high = 160 + int(95 * value)
    low = high - int(high * (0.2 + 0.35 * contrast))
    brightness = _texture(texture, size, low, high, turn, period, offset)
    fill = (brightness[:, :, None] * np.array(colour, np.int32) + 512) // 1024
    return fill, math.nan if saturation == 0 else hue, texture


def _texture(name: str, size: int, low: int, high: int, turn: float, period: float, offset: float) -> Array:
    """Brightness from low to high, (size, size) int32; the pattern scales with the image."""
    angle = math.pi * turn
    cosine, sine = round(1024 * math.cos(angle)), round(1024 * math.sin(angle))
    wave = round(1024 * size / 64 * (4 + 6 * period))  # 4 to 10 pixels at size 64
    y, x = np.mgrid[:size, :size].astype(np.int32)
    along = (x * cosine + y * sine + round(offset * wave)) % wave
    across = (y * cosine - x * sine + round(offset * wave)) % wave
    if name == "stripes":
        bright = 2 * along < wave
    elif name == "checks":
        bright = (2 * along < wave) ^ (2 * across < wave)
    elif name == "dots":
        bright = (2 * along - wave) ** 2 // 64 + (2 * across - wave) ** 2 // 64 > wave * wave // 150
    elif name == "gradient":
        distance = x * cosine + y * sine
        first, last = int(distance.min()), int(distance.max())
        return low + (distance - first) * (high - low) // max(last - first, 1)
    else:
        return np.full((size, size), high, dtype=np.int32)
    return np.where(bright, high, low).astype(np.int32)


def _compose(image: Array, fill: Array, coverage: Array) -> Array:
    part = coverage[:, :, None]
    whole = SUPERSAMPLING * SUPERSAMPLING
    return (image * (whole - part) + fill * part + whole // 2) // whole


def _boxes(masks: Array) -> Array:
    boxes = np.zeros((len(masks), 4))
    for i, mask in enumerate(masks):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes[i] = columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1
    return boxes
