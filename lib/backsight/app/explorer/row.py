"""What the explorer's page shows of one target: four pictures, the strip of all depths, and the details."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, TypeVar

import ipywidgets as widgets
import numpy as np
import torch
from torch import Tensor

from backsight.app.explorer import charts
from backsight.app.explorer.elements import Picture, Strip
from backsight.app.explorer.judging import HUES, Answer, hue_in_words
from backsight.app.explorer.pictures import as_png
from backsight.app.explorer.seeing import Bench, Depth, Seen
from backsight.plots.style import INVERSE_NAMES

ERROR_RANGE = 0.5  # RMS error, of the range of a pixel, at the end of the error map's colours
MODES = {"erase": "erased", "shuffle": "shuffled", "swap": "swapped"}
Element = TypeVar("Element", bound=widgets.DOMWidget)


def classed(element: Element, *names: str) -> Element:
    for name in names:
        element.add_class(f"backsight-{name}")
    return element


class Row:
    """What is seen of one target: four pictures, the strip, and the details."""

    def __init__(self, clicked: Callable[[Any, dict[str, Any], Any], None] | None) -> None:
        self.given, self.made, self.difference, self.errors = (Picture() for _ in range(4))
        self.strip = Strip()
        self.heading = widgets.HTML()
        self.sentence = classed(widgets.HTML(), "sentence")
        self.measures, self.answers, self.spectrum, self.hue = (widgets.HTML() for _ in range(4))
        grid = classed(widgets.Box([self.given, self.made, self.difference, self.errors]), "pictures")
        details = classed(widgets.Box([self.hue, self.measures, self.spectrum, self.answers]), "details")
        self.box = classed(widgets.VBox([self.heading, grid, self.sentence, self.strip, details]), "row")
        if clicked is not None:
            self.given.on_msg(clicked)
            self.strip.on_msg(clicked)

    def show(self, seen: Seen, bench: Bench, clickable: bool, removed: Sequence[int]) -> None:
        view = seen.view
        reader = view.inverse_tap or seen.tap
        inverse = f"{INVERSE_NAMES.get(view.family, view.family)} inverse of {reader}"
        self.heading.value = (
            f"<h2>{escape(view.target)}, {escape(seen.tap)} "
            f"<span class='backsight-soft'>read by the {escape(inverse)}</span></h2>"
        )
        self.strip.chosen = seen.tap
        psnr = f"{seen.measures['psnr']:.1f} dB"
        before, after = (answer.in_words() for answer in seen.answers)
        clicks: dict[str, Any] = {}
        if clickable:
            clicks = {"queries": bench.target.kind == "detector"} | dict(
                zip(("rows", "columns"), bench.grid, strict=True)
            )
            clicks["marks"] = {name: list(getattr(view, name)) for name in MODES.values()}
        self.given.show(
            seen.image,
            title="Input",
            caption=seen.what,
            alt=f"Input: {seen.what}. The model finds {before}.",
            boxes=_boxes(seen.answers[0], removed),
            **clicks,
        )
        self.made.show(
            seen.reconstruction,
            title="Reconstruction",
            caption=f"from {seen.tap}, {psnr}",
            alt=f"Reconstruction from {seen.tap} by the {inverse}; PSNR {psnr}. The model finds {after}.",
            boxes=_boxes(seen.answers[1], ()),
        )
        self.difference.show(
            seen.difference,
            title="Difference",
            caption="absolute, black = equal",
            alt=f"Absolute difference of input and reconstruction, mean {float(seen.difference.mean()):.3f}",
        )
        worst = float(seen.errors.max())
        row, column = divmod(int(seen.errors.argmax()), seen.errors.shape[1])
        self.errors.show(
            _coloured(seen.errors),
            title="Error by patch",
            caption=f"RMS of each patch, at most {worst:.2f} (yellow: {ERROR_RANGE} and more)",
            alt=f"RMS error of each patch; the worst, {worst:.2f}, in row {row + 1}, column {column + 1}",
        )
        self.measures.value = charts.measures_table(seen)
        self.answers.value = charts.answers_table(seen)
        self.spectrum.value = charts.spectrum_chart(seen.spectra, view.family)

    def show_depths(self, depths: Sequence[Depth], chosen: str) -> None:
        self.strip.depths = [
            {
                "tap": depth.tap,
                "png": _address(depth.image),
                "score": f"{depth.psnr:.1f} dB",
                "hue": "" if math.isnan(depth.hue_error) else f"hue {depth.hue_error:.0f}°",
            }
            for depth in depths
        ]
        self.strip.chosen = chosen

    def show_hues(self, curve: dict[str, float], chosen: str, family: str) -> None:
        self.sentence.value = f"<p><strong>{escape(hue_in_words(curve))}</strong></p>"
        self.hue.value = charts.hue_chart(curve, chosen, family, HUES)


def _address(image: Tensor) -> str:
    """A data address of (3, H, W) in [0, 1]."""
    return "data:image/png;base64," + base64.b64encode(as_png(image)).decode()


def _coloured(errors: np.ndarray) -> Tensor:
    """(1, 3, rows, columns): the errors in the colours of cividis, from 0 to ERROR_RANGE."""
    from matplotlib import colormaps

    colours = colormaps["cividis"](np.clip(errors / ERROR_RANGE, 0, 1))[..., :3]
    return torch.from_numpy(colours).permute(2, 0, 1)[None].float()


def _boxes(answer: Answer, removed: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {
            "query": box.query,
            "label": f"{box.label} {box.probability:.0%}",
            "says": f"query {box.query}, {box.label}, {box.probability:.0%}",
            "removed": box.query in removed,
            **dict(zip("xywh", (round(side, 4) for side in box.place), strict=True)),
        }
        for box in answer.boxes
    ]
