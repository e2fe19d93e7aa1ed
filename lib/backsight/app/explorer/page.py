"""The explorer's page: controls of ipywidgets around the elements of the browser.

    page = explore()        # the last line of a notebook's cell shows it

A control changes the view, and its pictures are there when the kernel answers; the strip of all depths and the curve of
hues follow while it has nothing else to do. ipywidgets keeps only the newest value of a control that is dragged.
"""

from __future__ import annotations

import asyncio
import base64
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import ipywidgets as widgets
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, from_numpy

from backsight.app.explorer.captions import HUES, hue_chart, hue_in_words, mean_errors, measures_table
from backsight.app.explorer.elements import Drop, Frame, Picture, Strip
from backsight.app.explorer.view import View, from_query
from backsight.app.explorer.workbench import Bench, Seen, Workbench, as_png, on_grid
from backsight.data.decode import ImageError, read_rgb
from backsight.errors import BacksightError
from backsight.measures.pixels import psnr
from backsight.project import results_root, shown, write_atomically
from backsight.scenes.photographs import PHOTOGRAPHS
from backsight.targets import SHIPPED

ERROR_RANGE = 0.5  # RMS error, of the range of a pixel, at the end of the error map's colours
MODES = {"erase": "erased", "shuffle": "shuffled", "swap": "swapped"}
OFFERED = (*(f"scene {number}" for number in range(12)), *PHOTOGRAPHS)
Element = TypeVar("Element", bound=widgets.DOMWidget)


def explore(query: str = "", fit_images: int = 2000) -> Page:
    """The explorer's page, at the view of a link's query ("": a fresh one); fit_images: see `Workbench`.

    A query that cannot be read is answered with a sentence in the page.
    """
    page = Page(Workbench(fit_images))
    page.look(View())
    with page.refusals():
        if (view := from_query(query)) != View():
            page.look(view)
    return page


class Page:
    """The page. Its `view` is what it looks at; `look(view)` changes it from Python; `box` is the widget to show."""

    def __init__(self, workbench: Workbench | None = None) -> None:
        self.workbench = workbench or Workbench()
        self.view = View()
        self.bench: Bench | None = None
        self._is_setting = False  # the controls, which then ask for no new view
        self._rest: asyncio.Task[None] | None = None

        self.frame, self.drop, self.strip = Frame(), Drop(), Strip()
        titles = ("Input", "Reconstruction", "Difference", "Error by patch")
        self.given, self.made, self.difference, self.errors = (Picture(title=title) for title in titles)
        self.message, self.heading, self.measures, self.hues = (widgets.HTML() for _ in range(4))
        self.status, self.tap, self.sentence = (classed(widgets.HTML(), name) for name in ("status", "tap", "sentence"))
        self.code = classed(widgets.Textarea(layout={"width": "100%", "height": "15rem"}, disabled=True), "code")
        self.depth = widgets.IntSlider(description="Depth", max=7, readout=False)
        self.play = widgets.Play(max=7, interval=500, repeat=True, show_repeat=False)
        self.mode = widgets.ToggleButtons(options=MODES)
        self.clear = widgets.Button(description="Clear patches and queries")
        self.reset = widgets.Button(description="Reset")
        self.export = widgets.Button(description="Export PNG", tooltip="the pictures, with this view in the file")
        self.fields: dict[str, Any] = {  # controls of one field of the view each
            "target": widgets.Dropdown(description="Target", options=list(SHIPPED)),
            "family": widgets.Dropdown(description="Inverse"),
            "inverse_tap": widgets.Dropdown(description="read with"),
            "noise": widgets.FloatSlider(description="Noise σ", max=3, step=0.1, readout_format=".1f"),
            "hue_shift": widgets.IntSlider(description="Hue shift °", min=-180, max=180, step=15),
            "saturation": widgets.FloatSlider(description="Saturation", max=2, step=0.1, readout_format=".1f"),
            "region": widgets.ToggleButtons(options=["object", "image"]),
            "picture": widgets.Dropdown(description="Picture", options=OFFERED),
            "swap_picture": widgets.Dropdown(description="swap from", options=OFFERED),
        }
        self.box = self._laid_out()

        widgets.jslink((self.play, "value"), (self.depth, "value"))
        for name, control in self.fields.items():
            control.observe(partial(self._control_changed, name), "value")
        self.depth.observe(partial(self._control_changed, "tap"), "value")
        self.mode.observe(lambda change: self.given.set_trait("mode", change["new"]), "value")
        self.clear.on_click(lambda _: self._apply(erased=(), shuffled=(), swapped=(), removed=()))
        self.reset.on_click(lambda _: self.look(View(target=self.view.target)))
        self.export.on_click(self._export)
        for element in (self.given, self.strip, self.drop):
            element.on_msg(self._heard)

    def _laid_out(self) -> widgets.Box:
        # Two groups of controls: where the page is narrow, the pictures stand between them.
        header = (
            "<h1>What does this layer still see?</h1><p class='backsight-soft'>Choose a depth: the picture is rebuilt "
            "from what the model holds there. Turn the object's hue, and see from which layer on it no longer follows."
            "</p>"
        )
        part = self.fields
        first = [
            _group("Model", part["target"], part["family"]),
            _group("Layer", widgets.HBox([self.play]), self.depth, self.tap, part["inverse_tap"], part["noise"]),
            _group("Colour", part["hue_shift"], part["saturation"], part["region"]),
        ]
        second = [
            _group("Picture", part["picture"], self.drop),
            _group("Patches: click on the input", self.mode, part["swap_picture"], self.clear),
            _group("Keep", classed(widgets.HBox([self.reset, self.export]), "actions")),
        ]
        pictures = classed(widgets.Box([self.given, self.made, self.difference, self.errors]), "pictures")
        details = classed(widgets.Box([self.hues, self.measures]), "details")
        lines = widgets.Accordion([self.code], titles=("Python that reproduces this view",), selected_index=None)
        views = [self.status, self.heading, pictures, self.sentence, self.strip, details, lines]
        columns = [
            classed(widgets.VBox(first), "controls", "first"),
            classed(widgets.VBox(views), "views"),
            classed(widgets.VBox(second), "controls", "second"),
        ]
        columns_box = classed(widgets.Box(columns), "columns")
        return classed(widgets.VBox([self.frame, widgets.HTML(header), self.message, columns_box]), "page")

    def _repr_mimebundle_(self, **options: Any) -> Any:
        words = "The explorer: it is alive while the notebook's kernel runs. Run this cell, or `make explore`."
        return {**(self.box._repr_mimebundle_(**options) or {}), "text/plain": words}

    # -------------------------------------------------------------------------------------------- from controls to view

    def look(self, view: View) -> None:
        """Look at this view: its pictures now, and the strip and the curve as soon as nothing else is asked for.

        What cannot be seen is said in the page, which then stays where it is.
        """
        if self._rest is not None:
            self._rest.cancel()
        self.status.add_class("backsight-busy")
        with self.refusals():
            self._look(view)
        self._set_controls()

    def _look(self, view: View) -> None:
        self._say("")
        bench = self._loaded(view.target)
        start = time.perf_counter()
        family = view.family if view.family in bench.families else next(iter(bench.families))
        seen = self.workbench.see(replace(view, family=family, tap=view.tap or bench.taps[0]))
        self.view, self.bench = seen.view, bench
        self._show(seen)
        self._show_status(f"Computed in {1000 * (time.perf_counter() - start):.0f} ms.")
        parts = self._parts(seen)
        try:
            self._rest = asyncio.get_running_loop().create_task(self._follow(parts))
        except RuntimeError:  # no notebook: nothing else can be asked for meanwhile
            list(parts)

    def _loaded(self, target: str) -> Bench:
        self._show_status(f"Loading {target}: minutes where inverses have to be fitted to a large model.")
        return self.workbench.bench(target)

    def _apply(self, **changes: Any) -> None:
        view = replace(self.view, **changes)
        if view != self.view:
            self.look(view)

    def _control_changed(self, name: str, change: Mapping[str, Any]) -> None:
        if self._is_setting or self.bench is None:
            return
        if name == "target":
            with self.refusals():
                return self.look(self._moved(change["new"]))
            self._set_controls()
        else:
            self._apply(**{name: self.bench.taps[change["new"]] if name == "tap" else change["new"]})

    def _moved(self, target: str) -> View:
        """The view on another target, at the same relative depth and places."""
        before, after = self.workbench.bench(self.view.target), self._loaded(target)
        share = before.taps.index(self.view.tap) / max(1, len(before.taps) - 1)
        view = on_grid(self.view, before.grid, after.grid)
        tap = after.taps[round(share * (len(after.taps) - 1))]
        return replace(view, target=target, tap=tap, inverse_tap="", removed=())

    def _heard(self, _element: Any, message: Mapping[str, Any], buffers: Sequence[bytes]) -> None:
        """A message from an element of the browser."""
        kind = message["kind"]
        if kind == "patch":
            cells = set(getattr(self.view, self.mode.value)) - {message["patch"]}
            self._apply(**{self.mode.value: tuple(cells | ({message["patch"]} if message["on"] else set()))})
        elif kind == "query":
            self._apply(removed=tuple(set(self.view.removed) ^ {message["query"]}))
        elif kind == "tap":
            self._apply(tap=message["tap"])
        elif kind == "refused":
            self._say(message["text"])
        elif kind == "file":
            with self.refusals():
                self._apply(picture=keep_upload(message["name"], bytes(buffers[0])))

    def _set_controls(self) -> None:
        """Every control as the view says."""
        view, bench = self.view, self.bench
        if bench is None:
            return
        self._is_setting = True
        taps, place = bench.taps, bench.taps.index(view.tap)
        self.depth.max = self.play.max = len(taps) - 1
        self.depth.value = self.play.value = place  # linked in the browser, too
        self.tap.value = f"{escape(view.tap)} <span class='backsight-soft'>({place + 1} of {len(taps)})</span>"
        self.fields["family"].options = list(bench.families)
        self.fields["inverse_tap"].options = [("(its own)", ""), *((tap, tap) for tap in taps)]
        self.fields["target"].options = list(dict.fromkeys([*SHIPPED, view.target]))
        pictures = list(dict.fromkeys([*self.fields["picture"].options, view.picture, view.swap_picture]))
        self.fields["picture"].options = self.fields["swap_picture"].options = pictures
        for name, control in self.fields.items():
            control.value = getattr(view, name)
        self._is_setting = False

    # ---------------------------------------------------------------------------------------------------- what is shown

    def _show(self, seen: Seen) -> None:
        view, grid = seen.view, self.workbench.bench(seen.view.target).grid
        reader = f"the {view.family} inverse of {view.inverse_tap or seen.tap}"
        decibels = f"{seen.measures['psnr']:.1f} dB"
        before, after = seen.answers
        by = f"<span class='backsight-soft'>read by {escape(reader)}</span>"
        self.heading.value = f"<h2>{escape(f'{view.target}, {seen.tap}')} {by}</h2>"
        self.given.show(
            seen.image,
            caption=seen.picture.words,
            alt=f"Input: {seen.picture.words}. The model finds {before.words}.",
            boxes=list(before.boxes),
            removed=list(view.removed),
            clickable=True,
            grid=list(grid),
            marks={name: list(getattr(view, name)) for name in MODES.values()},
        )
        self.made.show(
            seen.reconstruction,
            caption=f"from {seen.tap}, {decibels}",
            alt=f"Reconstruction from {seen.tap} by {reader}; PSNR {decibels}. The model finds {after.words}.",
            boxes=list(after.boxes),
        )
        self.difference.show(
            seen.difference,
            caption="absolute, black = equal",
            alt=f"Absolute difference of input and reconstruction, mean {float(seen.difference.mean()):.3f}",
        )
        errors = F.adaptive_avg_pool2d(seen.difference.square().mean(1), grid)[0].sqrt()
        colours = colormaps["cividis"]((errors / ERROR_RANGE).clamp(max=1).numpy())[..., :3]
        worst = f"RMS of each patch, at most {float(errors.max()):.2f} (yellow: {ERROR_RANGE} and more)"
        image = from_numpy(colours).permute(2, 0, 1)[None].float()
        self.errors.show(image, caption=worst, alt=worst)
        self.measures.value = measures_table(seen)
        self.strip.chosen, self.code.value, self.frame.query = seen.tap, view.to_python(), view.to_query()
        if seen.remarks:
            self._say(" ".join(seen.remarks))

    def _parts(self, seen: Seen) -> Iterator[None]:
        """What follows the pictures, piece by piece: it is given up where a newer view comes between."""
        depths = self.workbench.depths(seen.view, seen.view.hue_shift)
        self.strip.depths = [
            {
                "tap": tap,
                "png": _address(made[0]),
                "text": f"{float(psnr(seen.image, made)):.1f} dB\n{_hue(scores)}".rstrip(),
            }
            for tap, (made, scores) in depths.items()
        ]
        yield
        errors = mean_errors(self.workbench.depths(seen.view, *HUES))
        self.sentence.value = f"<p><strong>{escape(hue_in_words(errors))}</strong></p>"
        self.hues.value = hue_chart(errors, seen.tap, seen.view.family)
        self.status.remove_class("backsight-busy")
        yield

    async def _follow(self, parts: Iterator[None]) -> None:
        with self.refusals():
            await asyncio.sleep(0.05)  # a control that is dragged comes first
            for _ in parts:
                await asyncio.sleep(0.15)

    # ---------------------------------------------------------------------------------------------------- what is said

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """An error is said at the head of the page, which lives on, and the block left."""
        try:
            yield
        except Exception as error:
            said = f"This view could not be computed ({type(error).__name__}: {error}). Reset brings the page back."
            self._say(str(error) if isinstance(error, BacksightError) else said)
            self._show_status("Not computed.")
            self.status.remove_class("backsight-busy")

    def _say(self, text: str) -> None:
        """A sentence at the head of the page; "" takes it away."""
        self.message.value = f"<div class='backsight-message' role='alert'>{escape(text)}</div>" if text else ""

    def _show_status(self, text: str) -> None:
        self.status.value = f"<span role='status'>{escape(text)}</span>"

    def _export(self, _: Any) -> None:
        """The PNG of the view: kept in results and handed to the browser."""
        with self.refusals():
            content = self.workbench.png(self.view)
            place = re.sub(r"[^\w.-]+", "-", f"{self.view.target}-{self.view.tap}")
            kept = results_root() / "08_explorer" / "exports" / f"{place}-{datetime.now():%Y%m%d-%H%M%S-%f}.png"
            write_atomically(kept, lambda temporary: temporary.write_bytes(content))
            self.frame.send({"kind": "download", "name": kept.name}, [content])
            self._say(f"Exported to {shown(kept)}; the lines of Python below write the same file.")


def keep_upload(name: str, content: bytes) -> str:
    """Keep an uploaded picture in results/08_explorer/pictures; returns its path. Equal pictures are one file.

    Raises BacksightError, with the file's name, on what is no picture.
    """
    stem = re.sub(r"[^\w.-]+", "_", Path(name).stem)[:40] or "picture"
    kept = results_root() / "08_explorer" / "pictures" / f"{stem}-{sha256(content).hexdigest()[:12]}.png"
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            pixels = read_rgb(file.name)
        except ImageError as error:
            raise BacksightError(f"{Path(name).name} is no picture that can be read: {error.reason}.") from error
    write_atomically(kept, lambda temporary: Image.fromarray(pixels).save(temporary))
    return str(kept)


def classed(element: Element, *names: str) -> Element:
    for name in names:
        element.add_class(f"backsight-{name}")
    return element


def _group(title: str, *controls: widgets.DOMWidget) -> widgets.VBox:
    for control in controls:
        if isinstance(control, widgets.ValueWidget | widgets.Button):
            control.layout.width = "auto"
    return classed(widgets.VBox([widgets.HTML(f"<h2>{title}</h2>"), *controls]), "group")


def _address(image: Tensor) -> str:
    """A data address of (3, H, W) in [0, 1]."""
    return "data:image/png;base64," + base64.b64encode(as_png(image)).decode()


def _hue(scores: Mapping[str, Any]) -> str:
    """What came back of the hue of one picture; nothing where it has none."""
    (error,), (grey,) = scores["hue_error"], scores["share_grey"]
    return "grey" if grey == 1 else f"hue {error:.0f}°" if error == error else ""
