"""Grids of pictures, each with its PSNR below it: a tap a column, or any columns.

Pictures are tensors or arrays of numbers in [0, 1]; functions raise BacksightError where they are of another kind.
"""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from backsight.errors import BacksightError
from backsight.plots.style import (
    COLUMN_WIDTH,
    NULL_COLOUR,
    SMALL,
    Look,
    ShownFigure,
    inverse_order,
    look_of,
    styled_figure,
)

_MOST_COLUMNS = 11  # at 6.5 inches a picture is then half an inch wide, and its PSNR still fits below it
_LARGEST = 1.4  # inches a side of a picture
_LETTER, _LINE, _GAP = 0.068, 0.13, 0.05  # inches: a letter, a line of text, between two pictures


def as_pictures(values: Any, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """float32 pictures (B, 3, H, W); shape: that they have to have; name: what an error calls them."""
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.ndim != 4 or array.shape[1] != 3:
        raise BacksightError(f"{name}: pictures have the shape (B, 3, H, W), not {array.shape}.")
    if shape is not None and array.shape != shape:
        raise BacksightError(f"{name}: the shape is {array.shape}, but the images have {shape}.")
    if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):
        raise BacksightError(
            f"{name}: pictures are numbers in [0, 1], not {array.dtype} in [{array.min():.4g}, {array.max():.4g}]."
        )
    return array.astype(np.float32)


def decibels(images: np.ndarray, made: np.ndarray) -> list[str]:
    """What stands below pictures (B, 3, H, W): their PSNR in dB, as measures.pixels.psnr has it."""
    error = np.square(images - made).reshape(len(images), -1).mean(1)
    return [f"{value:.1f} dB" for value in -10 * np.log10(np.maximum(error, 1e-10))]


def merged_order(sequences: Sequence[Sequence[str]]) -> list[str]:
    """All names once, so that the order of each sequence is kept where the sequences agree with one another."""
    merged: list[str] = []
    for sequence in sequences:
        place = 0
        for name in sequence:
            if name in merged:
                place = merged.index(name) + 1
            else:
                merged.insert(place, name)
                place += 1
    return merged


def reconstruction_grid(images: Any, reconstructions: Mapping[str, Any]) -> ShownFigure:
    """Images as rows; the input and its reconstruction from every tap, shallow to deep, as columns, with the PSNR.

    images: (B, 3, H, W); reconstructions: {tap: (B, 3, H, W)} in forward order.
    """
    inputs = as_pictures(images, "images")
    made = {tap: as_pictures(values, tap, inputs.shape) for tap, values in reconstructions.items()}
    caption = "Each row is one image: the input, then what was rebuilt from ever deeper taps, with its PSNR."
    return _tap_grid(inputs, made, (), caption)


def family_grid(image: Any, reconstructions: Mapping[str, Mapping[str, Any]]) -> ShownFigure:
    """One image, from every tap (columns) by every inverse family (rows), with the PSNR of each picture in dB.

    image: (3, H, W); reconstructions: {family: {tap: (3, H, W)}} in forward order. A family that lacks a tap leaves
    its place empty.
    """
    original, families = as_pictures(image[None], "image"), inverse_order(list(reconstructions))
    made = {
        (family, tap): as_pictures(picture[None], f"{family} at {tap}", original.shape)[0]
        for family, taps in reconstructions.items()
        for tap, picture in taps.items()
    }
    taps = merged_order([[*reconstructions[family]] for family in families])
    columns = {tap: [made.get((family, tap)) for family in families] for tap in taps}
    caption = "One image, rebuilt from ever deeper taps (columns) by each inverse (rows), with the PSNR."
    return _tap_grid(np.repeat(original, len(families), 0), columns, [*map(look_of, families)], caption)


def _tap_grid(inputs: np.ndarray, columns: Mapping[str, Any], looks: Sequence[Look], caption: str) -> ShownFigure:
    if not columns:
        raise BacksightError("there is no reconstruction to draw: give at least one tap.")
    scores = {
        tap: ["" if x is None else decibels(image[None], x[None])[0] for image, x in zip(inputs, made, strict=True)]
        for tap, made in columns.items()
    }
    shallow, *_, deep = [*columns] * 2
    told = [
        f"{looks[row].label if looks else f'row {row + 1}'} {scores[tap][row]} from {tap}"
        for row in range(len(inputs))
        for tap in dict.fromkeys((shallow, deep))
        if scores[tap][row]
    ]
    columns = {"input": inputs, **columns}
    above = "reconstructed from tap, shallow → deep"
    return picture_table(columns, caption, scores, looks, ", ".join(told), above)


def picture_table(
    columns: Mapping[str, Any],
    caption: str,
    captions: Mapping[str, Sequence[str]] | None = None,
    row_labels: Sequence[str | Look] = (),
    told: str = "",
    above: str = "",
) -> ShownFigure:
    """A column of pictures under each title; many continue below, beside the first column once more.

    columns: {title: (K, 3, H, W), or K pictures, None for an empty place}; captions: {title: K texts below its
    pictures}; row_labels: K texts, or looks, to the left; caption, told: what is shown, and its numbers; above: what
    stands above all titles but the first. Every picture is placed by hand, in inches, so that texts keep their size.
    """
    first, *others = columns
    shape = next(np.shape(picture) for picture in columns[first] if picture is not None)
    blocks = max(1, math.ceil(len(others) / (_MOST_COLUMNS - 1)))
    across = math.ceil(len(others) / blocks)
    ratio, below = shape[1] / shape[2], 0.18 if captions else _GAP
    most = max(8, int(min((COLUMN_WIDTH - 0.4) / (across + 1), _LARGEST) * ratio / _LETTER))  # letters beside a picture
    looks = [label if isinstance(label, Look) else Look(label, "0.15") for label in row_labels]
    labels = [textwrap.wrap(look.label, most) for look in looks]
    left = 0.04 + 0.14 * max(map(len, labels), default=0)
    cell = min((COLUMN_WIDTH - left) / (across + 1) - _GAP, _LARGEST)
    tall = cell * ratio
    titles = {title: broken(title, cell) for title in columns}
    header = _LINE * max(map(len, titles.values())) + 0.07 + (0.2 if above else 0)
    block = header + len(columns[first]) * (tall + below)
    width, height = left + (across + 1) * (cell + _GAP), blocks * block + (blocks - 1) * 0.16 + 0.02
    with styled_figure(width, height, layout=None) as figure:

        def write(x: float, y: float, text: str, **options: Any) -> None:
            figure.text(x / width, 1 - y / height, text, **{"fontsize": SMALL, "ha": "center", **options})

        for number in range(blocks):
            shown, top = [first, *others[number * across : (number + 1) * across]], number * (block + 0.16)
            if above:
                write(left + (cell + _GAP) * (1 + len(shown)) / 2, top + 0.02, above, va="top", color=NULL_COLOUR)
            for row, (look, lines) in enumerate(zip(looks, labels, strict=True)):
                middle = top + header + row * (tall + below) + tall / 2
                write(left / 2, middle, "\n".join(lines), rotation=90, va="center", color=look.colour)
            for column, title in enumerate(shown):
                x = left + (cell + _GAP) * column
                for line, text in enumerate(reversed(titles[title])):
                    write(x + cell / 2, top + header - 0.05 - _LINE * line, text, va="baseline")
                texts = (captions or {}).get(title, [""] * len(columns[first]))
                for row, (picture, text) in enumerate(zip(columns[title], texts, strict=True)):
                    y = top + header + row * (tall + below)
                    if picture is not None:
                        place_picture(figure, picture, x, y, cell, tall)
                    write(x + cell / 2, y + tall + 0.02, text, va="top")
        figure.caption = caption
        titled = ", ".join(columns).replace("\n", " ")
        figure.description = f"Grid of {len(columns[first])} rows of pictures: {titled}. {told}"
    return figure


def place_picture(figure: Figure, picture: Any, left: float, top: float, wide: float, tall: float) -> None:
    """A picture (3, H, W) without ticks or frame; all in inches from the figure's upper left corner."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 1 - (top + tall) / height, wide / width, tall / height), zorder=2)
    axes.imshow(np.asarray(picture).transpose(1, 2, 0), interpolation="nearest", aspect="auto", vmin=0, vmax=1)
    axes.set_axis_off()


def broken(title: str, inches: float) -> list[str]:
    """A title as the lines that stay within its column, broken after dots, underscores and spaces."""
    most, lines = int(inches / _LETTER), []
    for given in title.split("\n"):
        lines.append("")
        for part in re.findall(r"[^._ ]+[._ ]?", given):
            if lines[-1] and len(lines[-1] + part.rstrip(". ")) > most:
                lines.append("")
            lines[-1] += part
    return [line.rstrip(". ") for line in lines]


def scored_table(
    images: Any, made: Mapping[str, Any], caption: str, names: Mapping[str, str] | None = None
) -> ShownFigure:
    """`picture_table` of inputs (K, 3, H, W) and of what each of `made` made of them, with the PSNR; names: titles."""
    inputs = as_pictures(images, "images")
    titles = {name: (names or {}).get(name) or look_of(name).label for name in made}
    pictures = {titles[name]: as_pictures(values, name, inputs.shape) for name, values in made.items()}
    scores = {title: decibels(inputs, values) for title, values in pictures.items()}
    told = "; ".join(f"{title}: {', '.join(values)}" for title, values in scores.items())
    return picture_table({"input": inputs, **pictures}, caption, scores, told=told)
