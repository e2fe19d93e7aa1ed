"""Dead leaves: endless training images that look like photographs to a model, and are photographs of nothing.

Opaque shapes of power-law sizes lie on one another in random order, each with a colour, a shading and a texture of its
own. Lee, Mumford & Huang (2001) showed that such pictures share the statistics of natural ones; Baradad et al. (2021)
that models learn from them. What is matched, and from where: amplitude spectra that fall as 1/f (Field 1987; Ruderman &
Bialek 1994), root-mean-square contrast of about 0.2 to 0.3 of full scale, heavy-tailed differences of neighbouring
pixels (Ruderman & Bialek 1994), and colours that vary mostly together: yellow against blue less, red against green
least (Ruderman, Cronin & Chiao 1998).
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from backsight.data.folders import SPLITS, Entry, Found

VERSION = 1  # raised with every change of what is drawn: recorded features are known by it
COUNT = 1024  # where no count is given
FINER = 2  # pixels are drawn so many times finer, each way, and averaged
# Chosen, within what the literature allows, by how well ridge inverses of DINOv2 fitted on leaves read photographs.
SMALLEST, LARGEST = 1.2, 0.7  # radii of leaves: in pixels, and as a share of the shorter side
POWER = 1.2  # of the tail of the radii: the share of leaves larger than r falls as r ** -POWER
COVER = 6.0  # area of all leaves, in images
SHADE, GRAIN = 0.3, 0.06  # brightness across an image that a leaf's slope makes, and mean strength of its texture
BLUR = 0.6  # pixels at most
GREY = 0.45
OF_IMAGE, OF_LEAF = (0.2, 0.08, 0.04), (0.42, 0.11, 0.05)  # deviations along AXES
# Unit vectors of light, of yellow against blue, and of red against green.
AXES = np.array([[1, 1, 1], [0.5, 0.5, -1], [1, -1, 0]]) / np.sqrt(np.array([[3], [1.5], [2]]))
CORNERS = 24  # of a leaf's outline
TILE = 512  # side of a texture, which repeats


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
    outlines = _outlines(random, height, width)
    canvas = Image.new("I", (width, height), 0)
    pen = ImageDraw.Draw(canvas)
    for leaf, outline in enumerate(outlines.tolist(), 1):
        pen.polygon(outline, fill=leaf)
    top = np.asarray(canvas)  # the leaf that lies on top, 0 for the ground

    number = len(outlines) + 1
    colour = GREY + (random.normal(0, OF_IMAGE) + random.normal(0, OF_LEAF, (number, 3))) @ AXES
    slope = random.normal(0, SHADE, (2, number)) / min(height, width)
    strength, kind = random.gamma(1.0, GRAIN, number), random.integers(len(_textures()), size=number)
    down, across = np.ogrid[:height, :width]
    light = slope[0].astype(np.float32)[top] * (down - height / 2).astype(np.float32)
    light += slope[1].astype(np.float32)[top] * (across - width / 2).astype(np.float32)
    rolled = random.integers(TILE, size=2)
    light += (
        strength.astype(np.float32)[top]
        * _textures()[kind[top], (down + rolled[0]) % TILE, (across + rolled[1]) % TILE]
    )
    image = colour.astype(np.float32)[top] + light[..., None]
    image = image.reshape(size[0], FINER, size[1], FINER, 3).mean((1, 3))
    blur = random.uniform(0, BLUR)
    return (gaussian_filter(image, (blur, blur, 0)).clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _outlines(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(leaves, 2 · CORNERS) x and y of each corner in turn: blobs, and polygons of three to six corners."""
    shares = np.array([FINER * SMALLEST, max(LARGEST * min(height, width), 2 * FINER * SMALLEST)]) ** -POWER
    expected = (shares[0] - np.linspace(0, 1, 1000, endpoint=False) * (shares[0] - shares[1])) ** (-1 / POWER)
    number = int(COVER * height * width / (np.pi * np.square(expected).mean()))
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
    return np.stack([x, y], 2).reshape(number, -1)


@cache
def _textures() -> np.ndarray:
    """(K, TILE, TILE) fields of mean 0 and deviation 1: noise of several slopes, and waves along one direction."""
    random = np.random.default_rng(0)
    rows, columns = np.fft.fftfreq(TILE)[:, None], np.fft.fftfreq(TILE)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = 1
    fields = []
    for slope, along in ((0.6, None), (1.0, None), (1.4, None), (0.8, 0.3), (0.8, 1.9)):
        amplitude = frequency**-slope
        if along is not None:
            amplitude *= np.exp(-(((rows * np.cos(along) - columns * np.sin(along)) / 0.01) ** 2) / 2)
        amplitude[0, 0] = 0
        field = np.fft.ifft2(np.fft.fft2(random.normal(size=(TILE, TILE))) * amplitude).real
        fields.append(field / field.std())
    return np.stack(fields).astype(np.float32)
