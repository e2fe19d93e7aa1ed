"""The explorer's page: controls of ipywidgets around the elements of the browser.

    page = explore()        # the last line of a notebook's cell shows it

A control changes the view, and its pictures are there when the kernel answers; the strip of all depths and the curve of
hues follow while it has nothing else to do. ipywidgets keeps only the newest value of a control that is dragged.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import torch.nn.functional as F
import traitlets
from matplotlib import colormaps
from torch import from_numpy

from backsight.app.explorer.captions import HUES, html, hue_in_words, mean_errors, measures_table
from backsight.app.explorer.elements import Drop, Frame, Picture, Strip
from backsight.app.explorer.view import CELLS, View, from_query
from backsight.app.explorer.workbench import Seen, Workbench, carried
from backsight.app.pictures import as_png, data_address
from backsight.app.runs import file_name
from backsight.data.decode import ImageError, decode
from backsight.errors import BacksightError
from backsight.measures.pixels import psnr
from backsight.plots.style import look_of
from backsight.project import results_root, shown, write_atomically
from backsight.scenes.photographs import PHOTOGRAPHS
from backsight.targets import SHIPPED
from backsight.targets.wheels import WHEELS

TARGETS = (*WHEELS, *SHIPPED)
AT_HAND = View("scenes-vit", picture="scene 0")  # what is looked at where nothing else can be
STRIP = 128  # pixels a side, at most, of a picture in the strip of all depths
ERROR_RANGE = 0.5  # RMS error, of the range of a pixel, at the end of the error map's colours
OFFERED = (
    "chelsea",
    *(name for name in PHOTOGRAPHS if name != "chelsea"),
    *(f"scene {number}" for number in range(12)),
)
# The controls in two columns of groups: where the page is narrow, the pictures stand between them.
GROUPS = {
    "first": {
        "Model": ("target", "family"),
        "Layer": ("play", "tap", "depth", "inverse_tap", "noise"),
        "Colour": ("hue_shift", "saturation", "region"),
    },
    "second": {
        "Picture": ("picture", "drop"),
        "Patches: click on the input": ("mode", "swap_picture", "clear"),
        "Keep": ("actions",),
    },
}


def explore(query: str = "") -> Page:
    """The explorer's page, at the view of a link's query ("": a fresh one).

    Where that cannot be read, or its target's weights cannot be had, the page says so and shows a scene.
    """
    page = Page()
    with page.refusals():
        page.look(from_query(query))
    if not page.view.tap:  # nothing is shown yet
        reason = page.message.value
        page.look(AT_HAND)
        page.message.value = reason
    return page


class Page:
    """The page. Its `view` is what it looks at; `look(view)` changes it from Python; `box` is the widget to show."""

    def __init__(self) -> None:
        self.workbench = Workbench()
        self.view = View()
        self._is_setting = False  # the controls, which then ask for no new view
        self._rest: asyncio.Task[None] | None = None

        self.frame, self.drop, self.strip = Frame(), Drop(), Strip()
        self.given, self.made, self.difference, self.errors = (Picture() for _ in range(4))
        self.message, self.heading, self.measures, self.hues, self.sentence = (widgets.HTML() for _ in range(5))
        self.status, self.depth = (widgets.HTML().add_class(f"backsight-{name}") for name in ("status", "tap"))
        self.code = widgets.Textarea(layout={"width": "100%", "height": "15rem"}, disabled=True)
        self.play = widgets.Play(interval=500, repeat=True, show_repeat=False)
        self.mode = widgets.ToggleButtons(options={"erase": "erased", "shuffle": "shuffled", "swap": "swapped"})
        self.export = widgets.Button(description="Export PNG", tooltip="the pictures, with this view in the file")
        self.controls: dict[str, Any] = {  # of one field of the view each
            "target": widgets.Dropdown(description="Target", options=TARGETS),
            "family": widgets.Dropdown(description="Inverse"),
            "tap": widgets.SelectionSlider(description="Depth", options=[""], readout=False),
            "inverse_tap": widgets.Dropdown(description="read with"),
            "noise": widgets.FloatSlider(description="Noise σ", max=3, step=0.1, readout_format=".1f"),
            "hue_shift": widgets.IntSlider(description="Hue shift °", min=-180, max=180, step=15),
            "saturation": widgets.FloatSlider(description="Saturation", max=2, step=0.1, readout_format=".1f"),
            "region": widgets.ToggleButtons(options=["object", "image"]),
            "picture": widgets.Dropdown(description="Picture", options=OFFERED),
            "swap_picture": widgets.Dropdown(description="swap from", options=OFFERED),
        }
        clear, reset = (widgets.Button(description=text) for text in ("Clear patches and queries", "Reset"))
        actions = widgets.HBox([reset, self.export]).add_class("backsight-actions")
        others = {"play": widgets.HBox([self.play]), "depth": self.depth, "drop": self.drop, "mode": self.mode}
        self.box = self._laid_out({**self.controls, **others, "clear": clear, "actions": actions})

        widgets.jslink((self.play, "value"), (self.controls["tap"], "index"))
        traitlets.dlink((self.mode, "value"), (self.given, "mode"))
        traitlets.link((self.controls["tap"], "value"), (self.strip, "chosen"))
        for name, control in self.controls.items():
            control.observe(lambda change, name=name: self._apply(**{name: change["new"]}), "value")
        clear.on_click(lambda _: self._apply(erased=(), shuffled=(), swapped=(), removed=()))
        reset.on_click(lambda _: self.look(View(target=self.view.target)))
        self.export.on_click(self._export)
        for element in (self.given, self.drop):
            element.on_msg(self._heard)

    def _laid_out(self, parts: Mapping[str, widgets.Widget]) -> widgets.Box:
        def box(name: str, *children: widgets.Widget) -> widgets.Box:
            return widgets.VBox(children).add_class(f"backsight-{name}")

        def group(title: str, names: Sequence[str]) -> widgets.Box:
            for control in (parts[name] for name in names):
                if isinstance(control, widgets.ValueWidget | widgets.Button):
                    control.layout.width = "auto"
            return box("group", widgets.HTML(f"<h2>{title}</h2>"), *(parts[name] for name in names))

        first, second = (
            box("controls", *(group(*titled) for titled in groups.items())).add_class(f"backsight-{column}")
            for column, groups in GROUPS.items()
        )
        pictures = box("pictures", self.given, self.made, self.difference, self.errors)
        details = box("details", self.hues, self.measures)
        code = self.code.add_class("backsight-code")
        lines = widgets.Accordion([code], titles=("Python that reproduces this view",), selected_index=None)
        middle = box("views", self.status, self.heading, pictures, self.sentence, self.strip, details, lines)
        header = widgets.HTML(html().header())
        return box("page", self.frame, header, self.message, box("columns", first, middle, second))

    def _repr_mimebundle_(self, **options: Any) -> Any:
        words = "The explorer: it is alive while the notebook's kernel runs. Run this cell, or `make explore`."
        return {**(self.box._repr_mimebundle_(**options) or {}), "text/plain": words}

    # -------------------------------------------------------------------------------------------- from controls to view

    def look(self, view: View, carry: bool = False) -> None:
        """Look at this view: its pictures now, and the strip and the curve as soon as nothing else is asked for.

        What cannot be seen is said in the page, which then stays where it is. carry: on another target the relative
        depth and the places of the patches stay those of the view before.
        """
        if self._rest is not None:
            self._rest.cancel()
        self.status.add_class("backsight-busy")
        self._say("")
        self._show_status(f"Loading {view.target}: minutes where inverses have to be fitted to a large model.")
        with self.refusals():
            if carry and view.target != self.view.target:
                view = self._carried(view.target)
            self.workbench.bench(view.target)
            start = time.perf_counter()
            seen = self.workbench.see(view)
            self.view = seen.view
            self._show(seen)
            self._show_status(f"Computed in {1000 * (time.perf_counter() - start):.0f} ms.")
            follow = self._follow(seen)
            try:
                self._rest = asyncio.get_running_loop().create_task(follow)
            except RuntimeError:  # no notebook: nothing else can be asked for meanwhile
                asyncio.run(follow)
        if self.view.tap:  # something is shown
            with self.refusals():
                self._set_controls()

    def _apply(self, **changes: Any) -> None:
        if not self._is_setting and (view := replace(self.view, **changes)) != self.view:
            self.look(view, carry=True)

    def _carried(self, target: str) -> View:
        """The view on another target, at the same relative depth and places."""
        before, after = (self.workbench.bench(name) for name in (self.view.target, target))
        share = before.taps.index(self.view.tap) / max(1, len(before.taps) - 1)
        tap = after.taps[round(share * (len(after.taps) - 1))]
        cells: dict[str, Any] = {name: carried(getattr(self.view, name), before.grid, after.grid) for name in CELLS}
        family = self.view.family if self.view.family in after.families else ""
        return replace(self.view, target=target, family=family, tap=tap, inverse_tap="", removed=(), **cells)

    def _heard(self, _element: Any, message: Mapping[str, Any], buffers: Sequence[bytes]) -> None:
        """A message from an element of the browser."""
        match message:
            case {"kind": "patch", "patch": patch, "on": on}:
                cells = {*getattr(self.view, self.mode.value)} - {patch}
                self._apply(**{self.mode.value: cells | {patch} if on else cells})
            case {"kind": "query", "query": query}:
                self._apply(removed={*self.view.removed} ^ {query})
            case {"kind": "refused", "text": text}:
                self._say(text)
            case {"kind": "file", "name": name}:
                with self.refusals():
                    self._apply(picture=keep_upload(name, bytes(buffers[0])))

    def _set_controls(self) -> None:
        """Every control as the view says."""
        view, bench = self.view, self.workbench.bench(self.view.target)
        place, pictures = bench.taps.index(view.tap), self.controls["picture"].options
        options = {
            "target": [*TARGETS, view.target],
            "family": bench.families,
            "tap": bench.taps,
            "inverse_tap": [("(its own)", ""), *((tap, tap) for tap in bench.taps)],
            "picture": [*pictures, view.picture, view.swap_picture],
            "swap_picture": [*pictures, view.picture, view.swap_picture],
        }
        self._is_setting = True
        for name, control in self.controls.items():
            with control.hold_sync():
                if name in options:
                    control.options = list(dict.fromkeys(options[name]))
                control.value = getattr(view, name)
        self.play.max, self.play.value = len(bench.taps) - 1, place  # linked to the depth in the browser, too
        self.depth.value = html().depth(bench.taps, view.tap)
        self._is_setting = False

    # ---------------------------------------------------------------------------------------------------- what is shown

    def _show(self, seen: Seen) -> None:
        view, grid = seen.view, self.workbench.bench(seen.view.target).grid
        reader = f"the {view.family} inverse of {view.inverse_tap or view.tap}"
        decibels = f"{seen.measures['psnr']:.1f} dB"
        before, after = seen.answers
        self.heading.value = html().heading(view, reader)
        self.given.show(
            seen.image,
            title="Input",
            caption=seen.picture.words,
            alt=f"Input: {seen.picture.words}. The model finds {before.words}.",
            boxes=before.boxes,
            grid=grid,
            view=asdict(view),
        )
        self.made.show(
            seen.reconstruction,
            title="Reconstruction",
            caption=f"from {view.tap}, {decibels}",
            alt=f"Reconstruction from {view.tap} by {reader}; PSNR {decibels}. The model finds {after.words}.",
            boxes=after.boxes,
        )
        self.difference.show(
            seen.difference,
            title="Difference",
            caption="absolute, black = equal",
            alt=f"Absolute difference of input and reconstruction, mean {float(seen.difference.mean()):.3f}",
        )
        errors = F.adaptive_avg_pool2d(seen.difference.square().mean(1), grid)[0].sqrt()
        colours = colormaps["cividis"]((errors / ERROR_RANGE).clamp(max=1).numpy())[..., :3]
        worst = f"RMS of each patch, at most {float(errors.max()):.2f} (yellow: {ERROR_RANGE} and more)"
        image = from_numpy(colours).permute(2, 0, 1)[None].float()
        self.errors.show(image, title="Error by patch", caption=worst, alt=worst)
        self.measures.value = measures_table(seen)
        self.code.value, self.frame.query = view.to_python(), view.to_query()
        if seen.remarks:
            self._say(" ".join(seen.remarks))

    async def _follow(self, seen: Seen) -> None:
        """What follows the pictures, piece by piece: it is given up where a newer view comes between."""
        with self.refusals():
            await asyncio.sleep(0.05)  # a control that is dragged comes first
            self.strip.depths = [
                {
                    "tap": tap,
                    "png": data_address(as_png(F.avg_pool2d(made, math.ceil(made.shape[3] / STRIP))[0], STRIP)),
                    "text": f"{float(psnr(seen.image, made)):.1f} dB\n{_hue(scores)}".rstrip(),
                }
                for tap, (made, scores) in self.workbench.depths(seen.view).items()
            ]
            turned = []
            for hue in HUES:
                await asyncio.sleep(0.02)
                turned.append(self.workbench.depths(replace(seen.view, hue_shift=hue)))
            errors = mean_errors(turned)
            self.sentence.value = html().sentence(hue_in_words(errors))
            self.hues.value = html().chart(errors, seen.view.tap, look_of(seen.view.family).colour) if errors else ""
            self.status.remove_class("backsight-busy")

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
        self.message.value = html().message(text)

    def _show_status(self, text: str) -> None:
        self.status.value = html().status(text)

    def _export(self, _: Any) -> None:
        """The PNG of the view: kept in results and handed to the browser."""
        with self.refusals():
            content = self.workbench.png(self.view)
            name = f"{file_name(f'{self.view.target}-{self.view.tap}')}-{datetime.now():%Y%m%d-%H%M%S-%f}.png"
            kept = results_root() / "08_explorer" / "exports" / name
            write_atomically(kept, lambda temporary: temporary.write_bytes(content))
            self.frame.send({"kind": "download", "name": name}, [content])
            self._say(f"Exported to {shown(kept)}; the lines of Python below write the same file.")


def keep_upload(name: str, content: bytes) -> str:
    """Keep an uploaded picture in results/08_explorer/pictures; returns its path. Equal pictures are one file.

    Raises BacksightError, with the file's name, on what is no picture.
    """
    stem = f"{file_name(Path(name).stem)[:40]}-{sha256(content).hexdigest()[:12]}"
    kept = results_root() / "08_explorer" / "pictures" / f"{stem}.png"
    try:
        image = decode(name, lambda: content)
    except ImageError as error:
        raise BacksightError(f"{Path(name).name} is no picture that can be read: {error.reason}.") from error
    write_atomically(kept, image.save)
    return str(kept)


def _hue(scores: Mapping[str, Any]) -> str:
    """What came back of the hue of one picture; nothing where it has none."""
    (error,), (grey,) = scores["hue_error"], scores["share_grey"]
    return "grey" if grey == 1 else f"hue {error:.0f}°" if error == error else ""
