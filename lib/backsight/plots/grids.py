"""Grids of pictures, each picture with its PSNR below it: by tap, by inverse, by pair of taps.

Pictures are tensors or arrays of numbers in [0, 1]; functions raise BacksightError where they are of another kind.
"""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes

from backsight.errors import BacksightError
from backsight.plots.style import (
    COLUMN_WIDTH,
    NULL_COLOUR,
    SMALL,
    ShownFigure,
    family_colour,
    inverse_order,
    styled_figure,
)

OWN_COLOUR = "#d55e00"  # around what a tap's own inverse makes
_MOST_COLUMNS = 12  # at 6.5 inches a picture is then half an inch wide, and a tap's name still fits above it


@dataclass(frozen=True)
class GridRow:
    """A row of a grid: the (3, H, W) input and {tap: (3, H, W)}, with {tap: text under it}."""

    label: str
    colour: str
    image: np.ndarray
    pictures: Mapping[str, np.ndarray]
    captions: Mapping[str, str] = field(default_factory=dict)


def as_pictures(values: Any, name: str, shape: tuple[int, ...] | None = None, dimensions: int = 4) -> np.ndarray:
    """float32 pictures (B, 3, H, W), or (3, H, W); shape: that they have to have; name: what an error calls them."""
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.ndim != dimensions or array.shape[-3] != 3:
        form = "(B, 3, H, W)" if dimensions == 4 else "(3, H, W)"
        raise BacksightError(f"{name}: pictures have the shape {form}, not {array.shape}.")
    if shape is not None and array.shape != shape:
        raise BacksightError(f"{name}: the shape is {array.shape}, but the images have {shape}.")
    if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):
        raise BacksightError(
            f"{name}: pictures are numbers in [0, 1], not {array.dtype} in [{array.min():.4g}, {array.max():.4g}]."
        )
    return array.astype(np.float32)


def decibels(images: np.ndarray, made: np.ndarray) -> np.ndarray:
    """(B,) what stands below pictures (B, 3, H, W): their PSNR in dB, as measures.pixels.psnr has it."""
    error = np.square(images - made).reshape(len(images), -1).mean(1)
    return -10 * np.log10(np.maximum(error, 1e-10))


def show_picture(axes: Axes, picture: np.ndarray, text: str = "") -> None:
    """A picture (3, H, W) without ticks or frame, and a text below it."""
    axes.imshow(picture.transpose(1, 2, 0), interpolation="nearest", vmin=0, vmax=1)
    bare(axes, text)


def bare(axes: Axes, text: str = "") -> None:
    """No ticks and no frame; a text below."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if text:
        axes.set_xlabel(text, fontsize=SMALL, labelpad=1)


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
    if not made:
        raise BacksightError("there is no reconstruction to draw: give at least one tap.")
    scores = {tap: decibels(inputs, values) for tap, values in made.items()}
    rows = [
        GridRow(
            "",
            "black",
            inputs[i],
            {tap: values[i] for tap, values in made.items()},
            {tap: f"{values[i]:.1f} dB" for tap, values in scores.items()},
        )
        for i in range(len(inputs))
    ]
    figure = picture_grid(rows, list(made))
    figure.caption = "Each row is one image: the input, then what was rebuilt from ever deeper taps, with its PSNR."
    return figure


def family_grid(image: Any, reconstructions: Mapping[str, Mapping[str, Any]]) -> ShownFigure:
    """One image, from every tap (columns) by every inverse family (rows), with the PSNR of each picture in dB.

    image: (3, H, W); reconstructions: {family: {tap: (3, H, W)}} in forward order. A family that lacks a tap leaves
    its place empty.
    """
    original = as_pictures(image, "image", dimensions=3)
    rows = []
    for family in inverse_order(list(reconstructions)):
        pictures = {
            tap: as_pictures(values, f"{family} at {tap}", original.shape, dimensions=3)
            for tap, values in reconstructions[family].items()
        }
        captions = {tap: f"{decibels(original[None], made[None])[0]:.1f} dB" for tap, made in pictures.items()}
        rows.append(GridRow(family, family_colour(family), original, pictures, captions))
    taps = merged_order([list(pictures) for pictures in reconstructions.values()])
    if not taps:
        raise BacksightError("there is no reconstruction to draw: give at least one family with one tap.")
    figure = picture_grid(rows, taps)
    figure.caption = "One image, rebuilt from ever deeper taps (columns) by each inverse (rows), with the PSNR."
    return figure


def picture_grid(rows: Sequence[GridRow], taps: Sequence[str], width: float = COLUMN_WIDTH) -> ShownFigure:
    """Place every picture by hand: in inches, so that captions keep their size whatever the number of pictures."""
    blocks = math.ceil(len(taps) / (_MOST_COLUMNS - 1))
    across = math.ceil(len(taps) / blocks)
    left = 0.34 if any(row.label for row in rows) else 0.02
    gap, caption, between = 0.05, 0.17, 0.16
    cell = (width - left - 0.02) / (across + 1) - gap
    tall = cell * rows[0].image.shape[1] / rows[0].image.shape[2]
    names = {tap: _broken(tap, cell) for tap in taps}
    header = 0.25 + 0.12 * max(len(lines) for lines in names.values())
    block = header + len(rows) * (tall + caption)
    height = blocks * block + (blocks - 1) * between + 0.02

    with styled_figure(width, height, layout=None) as figure:

        def write(x: float, y: float, text: str, **options: Any) -> None:
            figure.text(x / width, 1 - y / height, text, **{"fontsize": SMALL, "ha": "center", **options})

        def draw(x: float, y: float, picture: np.ndarray) -> None:
            box = (x / width, 1 - (y + tall) / height, cell / width, tall / height)
            axes = figure.add_axes(box)
            axes.imshow(picture.transpose(1, 2, 0), interpolation="nearest", aspect="auto", vmin=0, vmax=1)
            axes.set_axis_off()

        for number in range(blocks):
            shown = taps[number * across : (number + 1) * across]
            top = number * (block + between)
            middle = left + (cell + gap) * (1 + len(shown) / 2)
            write(middle, top + 0.03, "reconstructed from tap, shallow → deep", va="top", color=NULL_COLOUR)
            write(left + cell / 2, top + header - 0.05, "input", va="baseline", weight="bold")
            for column, tap in enumerate(shown, start=1):
                x = left + column * (cell + gap) + cell / 2
                for line, text in enumerate(reversed(names[tap])):
                    write(x, top + header - 0.05 - 0.12 * line, text, va="baseline")
            for line, row in enumerate(rows):
                y = top + header + line * (tall + caption)
                label = _fitted(row.label, tall + caption)
                write(0.16, y + tall / 2, label, rotation=90, va="center", color=row.colour, weight="bold")
                draw(left, y, row.image)
                for column, tap in enumerate(shown, start=1):
                    x = left + column * (cell + gap)
                    if tap in row.pictures:
                        draw(x, y, row.pictures[tap])
                    write(x + cell / 2, y + tall + 0.02, row.captions.get(tap, ""), va="top")
        told = []
        for number, row in enumerate(rows, start=1):
            captions = [f"{row.captions[tap]} from {tap}" for tap in taps if tap in row.captions]
            if captions:
                label = row.label or f"row {number}"
                told.append(f"{label}: {', '.join(dict.fromkeys((captions[0], captions[-1])))}")
        start = f"Grid of pictures, {len(rows)} rows: the input, then reconstructions from {', '.join(taps)}."
        figure.description = f"{start} {'; '.join(told)}." if told else start
        figure.shows_images = True
    return figure


def _broken(tap: str, inches: float) -> list[str]:
    """A tap's name as the lines that stay within its column, broken after dots and underscores."""
    most = int(inches / 0.06)
    lines = [""]
    for part in re.findall(r"[^._]+[._]?", tap):
        if lines[-1] and len(lines[-1] + part.rstrip(".")) > most:
            lines.append("")
        lines[-1] += part
    return [line.removesuffix(".") for line in lines]


def _fitted(label: str, inches: float) -> str:
    """A row's label on at most two lines, cut where it would run into the next row's."""
    most = max(6, int(inches / 0.066))
    words = [word if len(word) <= most else word[: most - 1] + "…" for word in label.replace("_", " ").split()]
    return textwrap.fill(" ".join(words), most, max_lines=2, placeholder="…")


# ------------------------------------------------------------------------------------------------------- other columns


def picture_table(
    columns: Mapping[str, np.ndarray],
    captions: Mapping[str, Sequence[str]] | None = None,
    row_labels: Sequence[str] = (),
) -> ShownFigure:
    """A column of pictures under each title.

    columns: {title: (K, 3, H, W)}; captions: {title: K texts below its pictures}; row_labels: K texts to the left. The
    caller tells caption and description.
    """
    first = next(iter(columns.values()))
    count, side = len(first), (COLUMN_WIDTH - 0.95 * bool(row_labels)) / len(columns)
    lines = max(title.count("\n") for title in columns) + 1
    tall = side * first.shape[2] / first.shape[3] + 0.16 * bool(captions)
    with styled_figure(COLUMN_WIDTH, tall * count + 0.16 * lines + 0.1) as figure:
        figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
        grid = figure.subplots(count, len(columns), squeeze=False)
        for column, (title, pictures) in enumerate(columns.items()):
            grid[0, column].set_title(title, fontsize=SMALL)
            texts = (captions or {}).get(title, [""] * count)
            for axes, picture, text in zip(grid[:, column], pictures, texts, strict=True):
                show_picture(axes, picture, text)
        for axes, label in zip(grid[:, 0], row_labels, strict=False):
            axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=SMALL)
        figure.shows_images = True
    return figure


def scored_table(images: np.ndarray, made: Mapping[str, np.ndarray], names: Mapping[str, str]) -> ShownFigure:
    """`picture_table` of the inputs and of what was made of them, each with its PSNR; the description tells means.

    images: (K, 3, H, W); made: {name: (K, 3, H, W)}; names: what to call them.
    """
    scores = {name: decibels(images, pictures) for name, pictures in made.items()}
    titles = {name: names.get(name, name) for name in made}
    captions = {titles[name]: [f"{value:.1f} dB" for value in values] for name, values in scores.items()}
    figure = picture_table({"input": images} | {titles[name]: made[name] for name in made}, captions)
    means = ", ".join(f"{name} {float(values.mean()):.1f} dB" for name, values in scores.items())
    figure.description = f"Grid of {len(images)} images; mean PSNR: {means}."
    return figure


def hue_shift_grid(pictures: Any, reconstructions: Mapping[str, Any], titles: Sequence[str]) -> ShownFigure:
    """One object under several changes of colour (columns): the picture shown, then what each tap gives back (rows).

    pictures: (K, 3, H, W); reconstructions: {tap: (K, 3, H, W)} in forward order; titles: K names.
    """
    rows = {"shown": np.asarray(pictures), **{tap: np.asarray(made) for tap, made in reconstructions.items()}}
    if any(len(each) != len(titles) for each in rows.values()):
        raise BacksightError(f"{len(titles)} titles need as many pictures in every row.")
    columns = {title: np.stack([made[i] for made in rows.values()]) for i, title in enumerate(titles)}
    figure = picture_table(columns, row_labels=list(rows))
    figure.caption = "One object in other colours (columns) and what comes back from ever deeper taps (rows)."
    figure.description = f"Grid of pictures: {', '.join(titles)} across; {', '.join(rows)} down."
    return figure


def error_maps(images: Any, reconstructions: Mapping[str, Any]) -> ShownFigure:
    """Images (rows) and the error of each part of their reconstructions from each tap (columns), one scale for all.

    images: (B, 3, H, W); reconstructions: {tap: (B, 3, H, W)}. The colour is the root mean squared error of one of
    8 x 8 parts, in full ranges.
    """
    inputs, taps = torch.as_tensor(images), list(reconstructions)
    maps = {
        tap: F.adaptive_avg_pool2d((torch.as_tensor(made) - inputs).square().mean(1, keepdim=True), 8)[:, 0].sqrt()
        for tap, made in reconstructions.items()
    }
    most = max(float(values.max()) for values in maps.values())
    with styled_figure(COLUMN_WIDTH, len(inputs) * (COLUMN_WIDTH / (len(taps) + 2)) + 0.5) as figure:
        grid = figure.subplots(len(inputs), len(taps) + 1, squeeze=False)
        for axes in grid.ravel():
            axes.set_axis_off()
        for line, row in enumerate(grid):
            row[0].imshow(inputs[line].permute(1, 2, 0), interpolation="nearest")
            for axes, tap in zip(row[1:], taps, strict=True):
                shown = axes.imshow(maps[tap][line], vmin=0, vmax=most, cmap="magma")
                if line == 0:
                    axes.set_title(tap.replace(".", ".\n"), fontsize=SMALL)
        figure.colorbar(shown, ax=list(grid.ravel()), label="RMS error", shrink=0.8)
        figure.caption = f"Where the error lies: {len(inputs)} images, root mean squared error of each part, by tap."
        told = ", ".join(f"{float(maps[tap].mean()):.3f} at {tap}" for tap in (taps[0], taps[-1]))
        figure.description = f"Maps of the error over {len(inputs)} pictures by tap; their means: {told}."
        figure.shows_images = True
    return figure
