"""Grids of pictures, each with its PSNR below it: a tap a column, or any columns.

Pictures are tensors or arrays of numbers in [0, 1]; functions raise BacksightError where they are of another kind.
"""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from backsight.errors import BacksightError
from backsight.plots.style import (
    COLUMN_WIDTH,
    NULL_COLOUR,
    SMALL,
    ShownFigure,
    inverse_order,
    look_of,
    styled_figure,
)

_MOST_COLUMNS = 11  # at 6.5 inches a picture is then half an inch wide, and its PSNR still fits below it
_LARGEST = 1.4  # inches a side of a picture


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


# ------------------------------------------------------------------------------------------------------ a tap a column


def reconstruction_grid(images: Any, reconstructions: Mapping[str, Any]) -> ShownFigure:
    """Images as rows; the input and its reconstruction from every tap, shallow to deep, as columns, with the PSNR.

    images: (B, 3, H, W); reconstructions: {tap: (B, 3, H, W)} in forward order. Many taps continue in further blocks of
    rows, so that pictures stay large enough to see.
    """
    inputs = as_pictures(images, "images")
    made = {tap: as_pictures(values, tap, inputs.shape) for tap, values in reconstructions.items()}
    figure = _tap_grid(inputs, [("", {tap: values[i] for tap, values in made.items()}) for i in range(len(inputs))])
    figure.caption = "Each row is one image: the input, then what was rebuilt from ever deeper taps, with its PSNR."
    return figure


def family_grid(image: Any, reconstructions: Mapping[str, Mapping[str, Any]]) -> ShownFigure:
    """One image, from every tap (columns) by every inverse family (rows), with the PSNR of each picture in dB.

    image: (3, H, W); reconstructions: {family: {tap: (3, H, W)}} in forward order. A family that lacks a tap leaves
    its place empty.
    """
    original = as_pictures(image[None], "image")
    rows = []
    for family in inverse_order(list(reconstructions)):
        own = reconstructions[family].items()
        made = {tap: as_pictures(x[None], f"{family} at {tap}", original.shape)[0] for tap, x in own}
        rows.append((family, made))
    figure = _tap_grid(np.repeat(original, len(rows), 0), rows)
    figure.caption = "One image, rebuilt from ever deeper taps (columns) by each inverse (rows), with the PSNR."
    return figure


def _tap_grid(inputs: np.ndarray, rows: Sequence[tuple[str, Mapping[str, np.ndarray]]]) -> ShownFigure:
    """rows: (family or "", {tap: (3, H, W)}), one for each of the inputs (B, 3, H, W).

    Every picture is placed by hand, in inches, so that captions keep their size whatever the number of pictures.
    """
    taps = merged_order([list(pictures) for _, pictures in rows])
    if not taps:
        raise BacksightError("there is no reconstruction to draw: give at least one tap.")
    gap, caption, between = 0.05, 0.18, 0.16
    blocks = math.ceil(len(taps) / (_MOST_COLUMNS - 1))
    across = math.ceil(len(taps) / blocks)
    left = 0.36 if any(label for label, _ in rows) else 0.02
    cell = min((COLUMN_WIDTH - left - 0.02) / (across + 1) - gap, _LARGEST)
    width = left + 0.02 + (across + 1) * (cell + gap)
    tall = cell * inputs.shape[2] / inputs.shape[3]
    names = {tap: _broken(tap, cell) for tap in taps}
    header = 0.27 + 0.13 * max(len(lines) for lines in names.values())
    block = header + len(rows) * (tall + caption)
    height = blocks * block + (blocks - 1) * between + 0.02
    told = []

    with styled_figure(width, height, layout=None) as figure:

        def write(x: float, y: float, text: str, **options: Any) -> None:
            figure.text(x / width, 1 - y / height, text, **{"fontsize": SMALL, "ha": "center", **options})

        def draw(x: float, y: float, picture: np.ndarray) -> None:
            axes = figure.add_axes((x / width, 1 - (y + tall) / height, cell / width, tall / height))
            axes.imshow(picture.transpose(1, 2, 0), interpolation="nearest", aspect="auto", vmin=0, vmax=1)
            axes.set_axis_off()

        for number in range(blocks):
            shown = taps[number * across : (number + 1) * across]
            top = number * (block + between)
            middle = left + (cell + gap) * (1 + len(shown) / 2)
            write(middle, top + 0.02, "reconstructed from tap, shallow → deep", va="top", color=NULL_COLOUR)
            write(left + cell / 2, top + header - 0.05, "input", va="baseline", weight="bold")
            places = {tap: left + (cell + gap) * column for column, tap in enumerate(shown, start=1)}
            for tap, x in places.items():
                for line, text in enumerate(reversed(names[tap])):
                    write(x + cell / 2, top + header - 0.05 - 0.13 * line, text, va="baseline")
            for line, (label, pictures) in enumerate(rows):
                y = top + header + line * (tall + caption)
                look = look_of(label) if label else None
                if look:
                    text = textwrap.shorten(look.label, max(8, int((tall + caption) / 0.075)), placeholder="…")
                    write(0.16, y + tall / 2, text, rotation=90, va="center", color=look.colour, weight="bold")
                draw(left, y, inputs[line])
                for tap, x in places.items():
                    if tap in pictures:
                        draw(x, y, pictures[tap])
                        score = decibels(inputs[line][None], pictures[tap][None])[0]
                        write(x + cell / 2, y + tall + 0.02, score, va="top")
                        if tap in (taps[0], taps[-1]):
                            told.append(f"{label or f'row {line + 1}'} {score} from {tap}")
        figure.description = (
            f"Grid of pictures: the input, then reconstructions from {', '.join(taps)}; {', '.join(told)}."
        )
    return figure


def _broken(tap: str, inches: float) -> list[str]:
    """A tap's name as the lines that stay within its column, broken after dots and underscores."""
    most = int(inches / 0.065)
    lines = [""]
    for part in re.findall(r"[^._]+[._]?", tap):
        if lines[-1] and len(lines[-1] + part.rstrip(".")) > most:
            lines.append("")
        lines[-1] += part
    return [line.removesuffix(".") for line in lines]


# ------------------------------------------------------------------------------------------------------- other columns


def show_picture(axes: Axes, picture: np.ndarray, text: str = "") -> None:
    """A picture (3, H, W) without ticks or frame, and a text below it."""
    axes.imshow(np.asarray(picture).transpose(1, 2, 0), interpolation="nearest", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if text:
        axes.set_xlabel(text, fontsize=SMALL, labelpad=1)


def picture_table(
    columns: Mapping[str, Any],
    caption: str,
    captions: Mapping[str, Sequence[str]] | None = None,
    row_labels: Sequence[str] = (),
    told: str = "",
) -> ShownFigure:
    """A column of pictures under each title.

    columns: {title: (K, 3, H, W), or K pictures, None for an empty place}; captions: {title: K texts below its
    pictures}; row_labels: K texts to the left; caption, told: what the figure shows, and its numbers.
    """
    columns = {title: list(pictures) for title, pictures in columns.items()}
    first = next(iter(columns.values()))
    shape = np.shape(next(picture for picture in first if picture is not None))
    labels = 0.075 * max(map(len, row_labels), default=0)
    cell = min((COLUMN_WIDTH - labels) / len(columns), _LARGEST)
    tall = cell * shape[1] / shape[2] + 0.18 * bool(captions)
    lines = max(title.count("\n") for title in columns) + 1
    with styled_figure(labels + cell * len(columns), tall * len(first) + 0.16 * lines + 0.1) as figure:
        figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
        grid = figure.subplots(len(first), len(columns), squeeze=False)
        for column, (title, pictures) in enumerate(columns.items()):
            grid[0, column].set_title(title, fontsize=SMALL, loc="center")
            texts = (captions or {}).get(title, [""] * len(first))
            for axes, picture, text in zip(grid[:, column], pictures, texts, strict=True):
                show_picture(axes, np.ones(shape) if picture is None else picture, text)
        for axes, label in zip(grid[:, 0], row_labels, strict=False):
            axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=SMALL)
        figure.caption = caption
        figure.description = f"Grid of {len(first)} rows of pictures: {', '.join(columns)}. {told}".replace("\n", " ")
    return figure


def scored_table(
    images: Any, made: Mapping[str, Any], caption: str, names: Mapping[str, str] | None = None
) -> ShownFigure:
    """`picture_table` of inputs (K, 3, H, W) and of what each of `made` made of them, with the PSNR; names: titles."""
    inputs = as_pictures(images, "images")
    pictures = {name: as_pictures(values, name, inputs.shape) for name, values in made.items()}
    titles = {name: (names or {}).get(name) or textwrap.fill(look_of(name).label, 14) for name in made}
    scores = {titles[name]: decibels(inputs, values) for name, values in pictures.items()}
    told = "; ".join(f"{name}: {', '.join(values)}" for name, values in scores.items())
    return picture_table({"input": inputs} | {titles[n]: x for n, x in pictures.items()}, caption, scores, (), told)
