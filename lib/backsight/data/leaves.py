"""Dead leaves: endless training images, cut out of six photographs, that look like photographs to a model.

Opaque shapes of power-law sizes lie on one another in random order, each with a colour, a shading and a texture of its
own, a piece of one of the six photographs of the built-in training split: turned, scaled, and half of them recoloured.
Few or many of them lie on the ground, which is a leaf itself. Lee, Mumford & Huang (2001) showed that dead leaves share
the statistics of natural images; Baradad et al. (2021) that models learn from them. What is matched, and from where:
amplitude spectra that fall as 1/f (Field 1987; Ruderman & Bialek 1994), root-mean-square contrast of about 0.2 to 0.3
of full scale, heavy-tailed differences of neighbouring pixels (Ruderman & Bialek 1994), and colours that vary mostly
together (Ruderman, Cronin & Chiao 1998).
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from backsight.data.folders import SPLITS, Entry, Found
from backsight.data.images import open_images, tensor

VERSION = 2  # raised with every change of what is drawn: recorded features are known by it
COUNT = 1024  # where no count is given
FINER = 2  # pixels are drawn so many times finer, each way, and averaged
# Chosen, within what the literature allows, by how well ridge inverses of DINOv2 fitted on leaves read photographs.
SMALLEST, LARGEST = 1.2, 0.7  # radii of leaves: in pixels, and as a share of the shorter side
POWER = 1.0  # of the tail of the radii: the share of leaves larger than r falls as r ** -POWER
COVER = 0.02, 6.0  # area of all leaves of an image, in images
SHADE, ABOVE = 0.4, 0.08  # brightness across an image that a leaf's slope makes, and by which its top is lighter
OWN = 0.5  # share of leaves in the colours of their photograph
CONTRAST, SCALE = (0.6, 1.6), (0.7, 3.0)  # of a photograph on a leaf, and its pixels per drawn pixel
SQUASH, BLUR = 1.8, 0.8  # steepness of the tone curve; pixels at most
MEAN, OF_IMAGE, OF_LEAF = (0.78, 0.03, 0.015), (0.25, 0.07, 0.05), (0.4, 0.12, 0.05)  # and deviations, along AXES
# Unit vectors of light, of yellow against blue, and of red against green.
AXES = np.array([[1, 1, 1], [0.5, 0.5, -1], [1, -1, 0]]) / np.sqrt(np.array([[3], [1.5], [2]]))
CORNERS = 24  # of a leaf's outline
TILE = 512  # side of a photograph, which is mirrored and repeats
MIRROR = np.concatenate([np.arange(TILE), np.arange(TILE)[::-1]])


def generated(split: str | None, count: int | None, seed: int, size: int, masks: bool) -> Found:
    """`count` images of a split, as `open_images` asks for them; of any size, drawn when they are read."""
    split = split or "test"
    place = (*SPLITS, "all").index(split)
    entries = [
        Entry(f"leaves-{VERSION}-{split}-{seed}-{index}", "", draw=partial(dead_leaves, (place, seed, index)))
        for index in range(count or COUNT)
    ]
    return Found(split, entries, to_size=True)


def dead_leaves(seed: tuple[int, ...], size: tuple[int, int]) -> np.ndarray:
    """One image, uint8 (H, W, 3), that depends on seed and size alone."""
    random = np.random.default_rng(seed)
    height, width = (FINER * side for side in size)
    outlines = _outlines(random, height, width, float(_between(random, COVER)))
    canvas = Image.new("I", (width, height), 0)
    pen = ImageDraw.Draw(canvas)
    for leaf, outline in enumerate(outlines.tolist(), 1):
        pen.polygon(outline, fill=leaf)
    top = np.asarray(canvas)  # the leaf that lies on top, 0 for the ground

    number = len(outlines) + 1
    pictures, means = _pictures()
    picture, own = random.integers(len(means), size=number), random.random(number) < OWN
    colour = MEAN + random.normal(0, OF_IMAGE) + random.normal(0, OF_LEAF, (number, 3))
    contrast = _between(random, CONTRAST, (number, 1)) * random.normal((1, 0, 0), (0, 1, 0.8), (number, 3))
    colour[own], contrast[own] = means[picture[own]], 1
    slope = random.normal((-random.exponential(ABOVE), 0), SHADE, (number, 2)) / min(height, width)
    turn = np.where(random.random(number) < 0.5, random.normal(0, 0.15, number), random.uniform(0, 2 * np.pi, number))
    step, mirrored = _between(random, SCALE, number), random.choice((-1, 1), number)
    row, column = (random.uniform(0, 2 * TILE, number) for _ in range(2))

    def at(values: np.ndarray) -> np.ndarray:  # what each leaf has, at its pixels
        return values.astype(np.float32)[top]

    down, across = (axis.astype(np.float32) for axis in np.ogrid[:height, :width])
    light = at(slope[:, 0]) * (down - height / 2) + at(slope[:, 1]) * (across - width / 2)
    cosine, sine = at(step * np.cos(turn)), at(step * np.sin(turn))
    flipped = at(mirrored) * across
    rows = (cosine * down - sine * flipped + at(row)).astype(int) % (2 * TILE)
    columns = (sine * down + cosine * flipped + at(column)).astype(int) % (2 * TILE)
    image = at(colour) + at(contrast) * pictures[picture[top], MIRROR[rows], MIRROR[columns]]
    image[..., 0] += np.sqrt(3) * light
    image = image.reshape(size[0], FINER, size[1], FINER, 3).mean((1, 3)) @ AXES.astype(np.float32)
    blur = random.uniform(0, BLUR)
    image = 0.5 + 0.5 * np.tanh(SQUASH * (gaussian_filter(image, (blur, blur, 0)) - 0.5))
    return (image * 255 + 0.5).astype(np.uint8)


def _between(random: np.random.Generator, ends: tuple[float, float], size: int | tuple[int, ...] = ()) -> np.ndarray:
    """Numbers whose logarithms are evenly spread."""
    low, high = np.log(ends)
    return np.exp(random.uniform(low, high, size))


def _outlines(random: np.random.Generator, height: int, width: int, cover: float) -> np.ndarray:
    """(leaves, 2 · CORNERS) x and y of each corner in turn: blobs, and polygons of three to six corners."""
    shares = np.array([FINER * SMALLEST, max(LARGEST * min(height, width), 2 * FINER * SMALLEST)]) ** -POWER
    expected = (shares[0] - np.linspace(0, 1, 1000, endpoint=False) * (shares[0] - shares[1])) ** (-1 / POWER)
    number = round(cover * height * width / (np.pi * np.square(expected).mean()))
    radii = (shares[0] - random.random((number, 1)) * (shares[0] - shares[1])) ** (-1 / POWER)
    angles, waves = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False), np.arange(2, 6)
    bumps = np.cos(waves[:, None] * angles + random.uniform(0, 2 * np.pi, (number, 4, 1)))
    reach = 1 + (random.normal(0, 0.25, (number, 4, 1)) / waves[:, None] * bumps).sum(1)
    turns = 2 * np.pi / random.integers(3, 7, (number, 1))
    straight = random.random((number, 1)) < 0.4
    angles = np.where(straight, np.floor(angles / turns) * turns, angles)
    stretch, tilt = np.exp(random.normal(0, 0.45, (number, 1))), random.uniform(0, 2 * np.pi, (number, 1))
    reach = radii * np.where(straight, 1.2, reach)
    along, aside = reach * np.cos(angles) * stretch, reach * np.sin(angles) / stretch
    x = along * np.cos(tilt) - aside * np.sin(tilt) + width * random.random((number, 1))
    y = along * np.sin(tilt) + aside * np.cos(tilt) + height * random.random((number, 1))
    return np.stack([x, y], 2).reshape(number, 2 * CORNERS)


@cache
def _pictures() -> tuple[np.ndarray, np.ndarray]:
    """Along AXES: (6, TILE, TILE, 3) differences from (6, 3) the means of the built-in training photographs."""
    pictures = tensor(open_images("photographs", "train", TILE)).permute(0, 2, 3, 1).numpy() @ AXES.T
    means = pictures.mean((1, 2))
    return (pictures - means[:, None, None]).astype(np.float32), means
