"""The explorer's page: controls of ipywidgets around the elements of the browser, and one thread that computes.

    page = explore()        # the last line of a notebook's cell shows it

A control changes the view and returns at once; the thread computes the newest view, the main picture first, then the
strip of all depths, then the curve of hues, and lets go of it as soon as there is a newer one.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from html import escape
from typing import Any

import ipywidgets as widgets
import torch

from backsight.app.explorer import pictures
from backsight.app.explorer.elements import Drop, Frame
from backsight.app.explorer.latest import Latest
from backsight.app.explorer.row import MODES, Row, classed
from backsight.app.explorer.seeing import Bench, Seen, Workbench
from backsight.app.explorer.view import View, from_query
from backsight.errors import BacksightError
from backsight.project import available_cores, results_root, shown, write_atomically
from backsight.targets import SHIPPED

SMALL_MODEL = 20e6  # parameters up to which one thread is as fast as two, and leaves a core to the browser
NO_TARGET = "(none)"
OWN_INVERSE = "(its own)"


def explore(query: str = "", fit_images: int = 2000) -> Page:
    """The explorer's page, at the view of a link's query ("": a fresh one); fit_images: see `Workbench`.

    A query that cannot be read is answered with a sentence in the page.
    """
    page = Page(Workbench(fit_images))
    page.open(query)
    return page


class Page:
    """The page. Its `view` is what it looks at; `look(view)` changes it from Python; `box` is the widget to show."""

    def __init__(self, workbench: Workbench | None = None) -> None:
        self.workbench = Workbench() if workbench is None else workbench
        self.view = View()
        self.seen: Seen | None = None
        self._laid_out: View | None = None  # the view of the target that the controls are set up for
        self._moves_from: View | None = None  # where a control has chosen another target, the view before
        self._taps: tuple[str, ...] = ()
        self._lock = threading.RLock()
        self._quiet: set[int] = set()  # threads that set controls themselves
        self._build()
        self._latest = Latest(self._steps, self._failed, self._show_busy)
        self.box = classed(widgets.VBox([self.frame, self.header, self.message, self._columns()]), "page")

    def _repr_mimebundle_(self, **options: Any) -> Any:
        shown = self.box._repr_mimebundle_(**options)
        words = "The explorer: it is alive while the notebook's kernel runs. Run this cell, or `make explore`."
        return {**(shown or {}), "text/plain": words}

    # ----------------------------------------------------------------------------------------------- what it is made of

    def _build(self) -> None:
        self.frame = Frame()
        self.frame.on_msg(self._heard)
        self.header = widgets.HTML(
            "<h1>What does this layer still see?</h1>"
            "<p class='backsight-soft'>Choose a depth: the picture is rebuilt from what the model holds there. "
            "Turn the object's hue, and see from which layer on the picture no longer follows.</p>"
        )
        self.message = widgets.HTML()
        self.status = classed(widgets.HTML(), "status")
        self.rows = (Row(self._heard), Row(None))
        self.rows[1].box.layout.display = "none"

        self.target = widgets.Dropdown(description="Target", options=list(SHIPPED))
        self.other = widgets.Text(
            description="any other", placeholder="timm name, DETR id, folder", continuous_update=False
        )
        self.family = widgets.Dropdown(description="Inverse", options=["modular"])
        self.depth = widgets.IntSlider(description="Depth", min=0, max=7, readout=False)
        self.play = widgets.Play(
            min=0, max=7, interval=500, repeat=True, show_repeat=False, description="Play the depths"
        )
        self.tap = classed(widgets.HTML(), "tap")
        widgets.jslink((self.play, "value"), (self.depth, "value"))
        self.inverse_tap = widgets.Dropdown(description="read with", options=[(OWN_INVERSE, "")])
        self.compare = widgets.Dropdown(description="Compare", options=[(NO_TARGET, ""), *((n, n) for n in SHIPPED)])

        self.picture = widgets.Dropdown(description="Picture", options=pictures.offered())
        self.drop = Drop()
        self.drop.on_msg(self._heard)
        self.folder = widgets.Text(description="a folder", placeholder="path of a folder", continuous_update=False)

        self.hue = widgets.IntSlider(description="Hue shift °", min=-180, max=180, step=15)
        self.saturation = widgets.FloatSlider(
            description="Saturation", min=0, max=2, step=0.1, readout_format=".1f", value=1
        )
        self.region = widgets.ToggleButtons(options=["object", "image"], tooltips=["the main object", "all"])
        self.mode = widgets.ToggleButtons(
            options=list(MODES),
            tooltips=["paint patches over", "exchange patches", "take their tokens from another picture"],
        )
        self.swap_picture = widgets.Dropdown(description="swap from", options=pictures.offered())
        self.clear = widgets.Button(description="Clear patches and queries")
        self.noise = widgets.FloatSlider(description="Noise σ", min=0, max=3, step=0.1, readout_format=".1f")
        self.reset = widgets.Button(description="Reset")
        self.export = widgets.Button(description="Export PNG", tooltip="the pictures, with this view in the file")
        self.link = widgets.Button(description="Copy link")
        self.copy = widgets.Button(description="Copy Python")
        code = widgets.Textarea(layout=widgets.Layout(width="100%", height="15rem"), disabled=True)
        self.code = classed(code, "code")

        self._plain = {  # controls of one field of the view each
            "target": self.target,
            "family": self.family,
            "inverse_tap": self.inverse_tap,
            "compare": self.compare,
            "picture": self.picture,
            "hue_shift": self.hue,
            "saturation": self.saturation,
            "region": self.region,
            "swap_picture": self.swap_picture,
            "noise": self.noise,
        }
        for name, control in self._plain.items():
            control.observe(self._changing(name), "value")
        self.depth.observe(self._depth_changed, "value")
        self.other.observe(self._other_changed, "value")
        self.folder.observe(self._open_folder, "value")
        self.mode.observe(lambda change: self.rows[0].given.set_trait("mode", MODES[change["new"]]), "value")
        self.clear.on_click(lambda _: self._apply(erased=(), shuffled=(), swapped=(), removed=()))
        self.reset.on_click(lambda _: self.look(View(target=self.view.target)))
        self.export.on_click(self._export)
        self.link.on_click(lambda _: self._copy(self.view.to_query(), "a link to this view", link=True))
        self.copy.on_click(lambda _: self._copy(self.view.to_python(), "the lines of Python"))

    def _columns(self) -> widgets.Box:
        # Two groups: where the page is narrow, the pictures stand between them.
        first = widgets.VBox(
            [
                _group("Model", self.target, self.other, self.family, self.compare),
                _group("Layer", widgets.HBox([self.play]), self.depth, self.tap, self.inverse_tap, self.noise),
                _group("Colour", self.hue, self.saturation, self.region),
            ]
        )
        second = widgets.VBox(
            [
                _group("Picture", self.picture, self.drop, self.folder),
                _group("Patches: click on the input", self.mode, self.swap_picture, self.clear),
                _group("Keep", classed(widgets.HBox([self.reset, self.export, self.link, self.copy]), "actions")),
            ]
        )
        lines = widgets.Accordion([self.code], titles=("Python that reproduces this view",), selected_index=None)
        views = widgets.VBox([self.status, *(row.box for row in self.rows), lines])
        columns = [
            classed(first, "controls", "first"),
            classed(views, "views"),
            classed(second, "controls", "second"),
        ]
        return classed(widgets.Box(columns), "columns")

    # -------------------------------------------------------------------------------------------- from controls to view

    def open(self, query: str) -> None:
        """Look at the view of a link's query. A query that cannot be read is answered with a sentence."""
        view = self.view
        with self._refusals():
            view = from_query(query)
        self.look(view)

    def look(self, view: View, moves_from: View | None = None) -> None:
        """Look at this view; returns at once. moves_from: a view of another target, whose depth and places it keeps."""
        with self._lock:
            self.view, self._moves_from = view, moves_from
        self._set_controls(view)
        self._latest.submit((view, moves_from))

    def wait(self, timeout: float = 60) -> bool:
        """Until the newest view is in the page; False after `timeout` seconds."""
        return self._latest.wait(timeout)

    def close(self) -> None:
        """End the thread, and the widgets."""
        self._latest.close()
        self.box.close()

    def _apply(self, **changes: Any) -> None:
        with self._refusals():
            view = replace(self.view, **changes)
            if view != self.view:
                self._say("")
                moves_from = self._laid_out if "target" in changes and self._moves_from is None else self._moves_from
                self.look(view, moves_from)

    def _changing(self, name: str) -> Callable[[Any], None]:
        def changed(change: Any) -> None:
            if threading.get_ident() not in self._quiet:
                value = change["new"]
                self._apply(**{name: float(value) if name == "hue_shift" else value})

        return changed

    def _depth_changed(self, change: Any) -> None:
        there = self._laid_out is not None and self._laid_out.target == self.view.target
        if threading.get_ident() not in self._quiet and there and change["new"] < len(self._taps):
            self._apply(tap=self._taps[change["new"]])

    def _other_changed(self, change: Any) -> None:
        if name := change["new"].strip():
            self._apply(target=name)

    def _open_folder(self, change: Any) -> None:
        if folder := change["new"].strip():
            with self._refusals():
                self._take(pictures.in_folder(folder))

    def _take(self, names: Sequence[str]) -> None:
        """Put pictures at the head of both lists, and look at the first."""
        with self._quietly():
            for control in (self.picture, self.swap_picture):
                value = control.value
                control.options = list(dict.fromkeys([*names, *control.options]))
                control.value = value
        self._apply(picture=names[0])

    def _heard(self, _element: Any, message: dict[str, Any], buffers: Any) -> None:
        """A message from an element of the browser."""
        kind = message.get("kind")
        if kind == "patch":
            name, patch = MODES[self.mode.value], {int(message["patch"])}
            cells = set(getattr(self.view, name))
            self._apply(**{name: tuple(cells | patch if message["on"] else cells - patch)})
        elif kind == "query":
            self._apply(removed=tuple(set(self.view.removed) ^ {int(message["query"])}))
        elif kind == "tap":
            self._apply(tap=str(message["tap"]))
        elif kind == "file":
            with self._refusals():
                self._take([pictures.keep_upload(str(message["name"]), bytes(buffers[0]) if buffers else b"")])
        elif kind in ("refused", "copied"):
            self._say(str(message["text"]))
        elif kind == "opened":
            self.open(str(message["query"]))

    # ---------------------------------------------------------------------------------------------------- in the thread

    def _steps(self, request: tuple[View, View | None]) -> Iterator[None]:
        """The view, drawn piece by piece; between two pieces it is given up where a newer one waits."""
        view, moves_from = request
        if not self.workbench.is_loaded(view.target):
            _share_cores()
        bench = self.workbench.bench(view.target, self._show_status)
        _share_cores(bench)
        view = self._placed(view, moves_from, bench)
        start = time.perf_counter()
        seen = self.workbench.see(view)
        self.seen = seen
        self.rows[0].show(seen, bench, True, view.removed)
        if self.workbench.knows_hues(view):
            self.rows[0].show_hues(self.workbench.hues(view), seen.tap, view.family)
        self._say(" ".join(seen.remarks), unless_said=True)
        milliseconds = 1000 * (time.perf_counter() - start)
        self.frame.query = view.to_query()
        self.code.value = view.to_python()
        yield
        views = [view]
        if view.compare:
            second = self.workbench.bench(view.compare, self._show_status)
            views.append(self.workbench.place(view, view.compare))
            self.rows[1].show(self.workbench.see(views[1]), second, False, ())
        self.rows[1].box.layout.display = "" if view.compare else "none"
        yield
        for row, shown_view in zip(self.rows, views, strict=False):
            row.show_depths(self.workbench.strip(shown_view), shown_view.tap)
            yield
        for row, shown_view in zip(self.rows, views, strict=False):
            row.show_hues(self.workbench.hues(shown_view), shown_view.tap, shown_view.family)
            yield
        self._show_status(f"Computed in {milliseconds:.0f} ms.")

    def _placed(self, view: View, moves_from: View | None, bench: Bench) -> View:
        """The view on its target; where a control chose another target, at the depth and places of the view before."""
        placed = view
        if moves_from is not None and moves_from.target != view.target:
            before = replace(view, target=moves_from.target, tap=moves_from.tap)
            placed = replace(self.workbench.place(before, view.target), compare=view.compare)
        if placed.family not in bench.families:
            placed = replace(placed, family=next(iter(bench.families)))
        placed = replace(placed, tap=bench.tap_of(placed))
        if placed.compare == placed.target:
            placed = replace(placed, compare="")
        with self._lock:
            if self.view == view:
                self.view, self._moves_from = placed, None
        self._lay_out(placed, bench)
        return placed

    def _lay_out(self, view: View, bench: Bench) -> None:
        """Set the controls up for the target."""
        with self._quietly():
            if self._laid_out is None or self._laid_out.target != view.target:
                self._taps = bench.taps
                self.depth.max = self.play.max = len(bench.taps) - 1
                self.family.options = list(bench.families)
                self.inverse_tap.options = [(OWN_INVERSE, ""), *((tap, tap) for tap in bench.taps)]
            self._laid_out = view
            self._set_controls(view)

    def _set_controls(self, view: View) -> None:
        """Every control as the view says, as far as it can."""
        with self._quietly():
            for name in ("target", "picture", "swap_picture", "compare"):
                _select(self._plain[name], getattr(view, name))
            self.hue.value = 180 if view.hue_shift == 180 else round((view.hue_shift + 180) % 360 - 180)
            self.saturation.value, self.noise.value = min(view.saturation, 2), min(view.noise, 3)
            self.region.value = view.region
            if self._laid_out is not None and self._laid_out.target == view.target:
                _select(self.family, view.family)
                _select(self.inverse_tap, view.inverse_tap)
                if view.tap in self._taps:
                    place = self._taps.index(view.tap)
                    self.depth.value = place
                    self.tap.value = (
                        f"{escape(view.tap)} <span class='backsight-soft'>({place + 1} of {len(self._taps)})</span>"
                    )

    def _failed(self, request: tuple[View, View | None], error: Exception) -> None:
        view, _ = request
        said = f"This view could not be computed ({type(error).__name__}: {error}). Reset brings the page back."
        self._say(str(error) if isinstance(error, BacksightError) else said)
        self._show_status("Not computed.")
        before = self._laid_out
        if before is not None and view.target != before.target:  # a target that could not be loaded
            with self._lock:
                if self.view == view:
                    self.view, self._moves_from = before, None
            self._set_controls(self.view)

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Controls set by this thread ask for no new view."""
        me = threading.get_ident()
        outer = me in self._quiet
        self._quiet.add(me)
        try:
            yield
        finally:
            if not outer:
                self._quiet.discard(me)

    # ---------------------------------------------------------------------------------------------------- what is said

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """An error that a user can mend is said at the head of the page, and the block left."""
        try:
            yield
        except BacksightError as error:
            self._say(str(error))

    def _say(self, text: str, unless_said: bool = False) -> None:
        """A sentence at the head of the page; "" takes it away. unless_said: an empty one leaves an earlier one."""
        if text or not unless_said:
            self.message.value = f"<div class='backsight-message' role='alert'>{escape(text)}</div>" if text else ""

    def _show_busy(self, busy: bool) -> None:
        (self.status.add_class if busy else self.status.remove_class)("backsight-busy")

    def _show_status(self, text: str) -> None:
        self.status.value = f"<span role='status'>{escape(text)}</span>"

    # ---------------------------------------------------------------------------------------------------- what is kept

    def _copy(self, text: str, what: str, link: bool = False) -> None:
        self.frame.send({"kind": "copy", "text": text, "what": what, "link": link})

    def _export(self, _: Any) -> None:
        """The PNG of the view: kept in results and handed to the browser."""
        self._latest.wait(60)  # the thread must not use the workbench meanwhile
        with self._refusals():
            content = self.workbench.png(self.view)
            place = "-".join(re.sub(r"[^\w.-]+", "-", part) for part in (self.view.target, self.view.tap))
            name = f"{place}-{datetime.now():%Y%m%d-%H%M%S-%f}.png"
            kept = results_root() / "08_explorer" / "exports" / name
            write_atomically(kept, lambda temporary: temporary.write_bytes(content))
            self.frame.send({"kind": "download", "name": name}, [content])
            self._say(f"Exported to {shown(kept)}; the lines of Python below write the same file.")


# ----------------------------------------------------------------------------------------------------- small parts


def _group(title: str, *controls: widgets.Widget) -> widgets.VBox:
    for control in controls:
        if hasattr(control, "layout") and not isinstance(control, widgets.Box):
            control.layout.width = "auto"
    return classed(widgets.VBox([widgets.HTML(f"<h2>{title}</h2>"), *controls]), "group")


def _select(control: widgets.Dropdown, value: str) -> None:
    """Choose the value, which is added to the list where it is not there."""
    options = [option[1] if isinstance(option, tuple) else option for option in control.options]
    if value not in options:
        control.options = [*control.options, (value, value) if isinstance(control.options[0], tuple) else value]
    control.value = value


def _share_cores(bench: Bench | None = None) -> None:
    """One thread for a small model (or none yet): as fast, and it leaves a core to the browser."""
    size = 0 if bench is None else sum(parameter.numel() for parameter in bench.target.model.parameters())
    torch.set_num_threads(1 if size < SMALL_MODEL else available_cores())
