"""What there is to say of an input and its reconstruction: the model's answers, hues, errors, spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backsight.measures.pixels import psnr, ssim
from backsight.measures.structure import bands, hue_errors, mean_hue, spectrum
from backsight.representation import Predictions
from backsight.studies.recolour import to_hsv
from backsight.targets import Target

LEAST_CHROMA = 0.1  # of a pixel that counts for the hue error of a picture without a known object
HUE_OF_A_GUESS = 90.0  # degrees: the mean error of a random hue, counted where a reconstruction has none
HUES = 8  # all round the circle, over which the loss of hue is judged
HUE_KEPT = 30.0  # degrees: half the distance between two neighbouring main hues
CERTAIN = 0.5  # probability from which a query's box is drawn


@dataclass(frozen=True)
class Box:
    """An object of a detector's answer; place: centre x, centre y, width, height in [0, 1] of the picture."""

    query: int
    label: str
    probability: float
    place: tuple[float, float, float, float]


@dataclass(frozen=True)
class Answer:
    """What the model says of a picture. classes: five (name, probability); boxes: what a detector is certain of."""

    classes: tuple[tuple[str, float], ...] = ()
    boxes: tuple[Box, ...] = ()

    def in_words(self) -> str:
        if self.classes:
            name, probability = self.classes[0]
            return f"{name} ({probability:.0%})"
        return ", ".join(f"{box.label} ({box.probability:.0%})" for box in self.boxes) or "no object"


@dataclass(frozen=True)
class Hue:
    """The object's colour in a picture: hue in degrees, chroma in [0, 1] (0: grey), mean colour, sRGB in [0, 1]."""

    degrees: float
    chroma: float
    colour: tuple[float, float, float]


def answer(target: Target, image: Tensor) -> Answer:
    """The target's answer to one picture (1, 3, H, W); an empty one of a model without classes."""
    output = target(image)

    def name(index: int) -> str:
        return target.classes[index] if target.classes and index < len(target.classes) else f"class {index}"

    if isinstance(output, Predictions):
        probabilities, labels = output.objects[0].max(-1)
        sure = [query for query in probabilities.argsort(descending=True).tolist() if probabilities[query] > CERTAIN]
        return Answer(
            boxes=tuple(
                Box(
                    query, name(int(labels[query])), float(probabilities[query]), tuple(output.boxes[0, query].tolist())
                )
                for query in sure[:20]
            )
        )
    if not isinstance(output, Tensor) or output.ndim != 2:
        return Answer()
    best = output[0].softmax(0).topk(min(5, output.shape[1]))
    return Answer(tuple((name(i), value) for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)))


def measures_of(image: Tensor, made: Tensor, mask: Tensor | None) -> dict[str, float]:
    errors = {"psnr": float(psnr(image, made)), "ssim": float(ssim(image, made))}
    return errors | {"hue_error": hue_error(image, made, mask)}


def hue_error(image: Tensor, made: Tensor, mask: Tensor | None) -> float:
    """Of the object, else mean absolute hue error in degrees of the pixels that have a hue; NaN where there is none.

    A pixel that comes back grey counts as a guess.
    """
    if mask is not None:
        return float(hue_errors(mean_hue(image, mask), mean_hue(made, mask)))
    before, after = to_hsv(image), to_hsv(made)
    coloured = (before[:, 1] * before[:, 2]) > LEAST_CHROMA
    apart = (before[:, 0] - after[:, 0]).abs() % 360
    error = torch.minimum(apart, 360 - apart)
    grey = (after[:, 1] * after[:, 2]) <= LEAST_CHROMA / 4
    return float(error.masked_fill(grey, HUE_OF_A_GUESS)[coloured].mean())


def mean(values: Sequence[float]) -> float:
    """Of those that are defined; NaN where none is."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def hue_of(image: Tensor, mask: Tensor) -> Hue:
    degrees, chroma = mean_hue(image, mask)
    red, green, blue = ((image * mask[:, None]).flatten(2).sum(2)[0] / mask.sum()).tolist()
    return Hue(float(degrees), float(chroma), (red, green, blue))


def spectra_of(image: Tensor, made: Tensor) -> list[tuple[float, float, float]]:
    before, after = spectrum(image)[0], spectrum(made)[0]
    octaves = bands(image.shape[2:])
    return [(centre, float(before[inside].mean()), float(after[inside].mean())) for centre, inside in octaves]


def hue_in_words(curve: Mapping[str, float]) -> str:
    """Down to which depth the hue comes back within HUE_KEPT degrees, in one sentence. curve: of `Workbench.hues`."""
    known = {tap: error for tap, error in curve.items() if not math.isnan(error)}
    if not known:
        return "This picture has no hue to lose."
    mean = f"mean error over {HUES} hues"
    kept = [tap for tap, error in known.items() if error <= HUE_KEPT]
    lost = [tap for tap in known if tap not in kept]
    if not lost:
        return f"The hue comes back from every layer ({mean} at most {max(known.values()):.0f}°)."
    if not kept:
        return f"The hue comes back from no layer ({mean} at least {min(known.values()):.0f}°; a guess: 90°)."
    if list(known) == kept + lost:
        return (
            f"The hue comes back down to {kept[-1]} ({known[kept[-1]]:.0f}°) and is lost from {lost[0]} on "
            f"({known[lost[0]]:.0f}°; {mean}, a guess: 90°)."
        )
    return f"The hue is lost at {', '.join(lost)} ({mean} above {HUE_KEPT:.0f}°) and comes back from the other layers."
