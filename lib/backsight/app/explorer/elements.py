"""What the explorer draws in the browser beyond the controls of ipywidgets: four small elements, by anywidget.

Their JavaScript and the page's style lie in browser/; they ask no other host for anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anywidget
import traitlets
from torch import Tensor

from backsight.app.explorer.pictures import as_png

BROWSER = Path(__file__).resolve().parent / "browser"


class Picture(anywidget.AnyWidget):
    """A picture with a grid of patches to choose from, and boxes of object queries.

    png: the file's bytes; rows, columns: of patches, 0 where none can be chosen; marks: {"erased" | "shuffled" |
    "swapped": patches}; mode: which of them a click changes; boxes: query, label, says, x, y, w, h (shares of the
    picture, from its centre), removed; queries: whether boxes can be clicked.
    Messages: {"kind": "patch", "patch", "on"} and {"kind": "query", "query"}.
    """

    _esm = BROWSER / "picture.js"
    png = traitlets.Bytes().tag(sync=True)
    title = traitlets.Unicode().tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)
    caption = traitlets.Unicode().tag(sync=True)
    rows = traitlets.Int(0).tag(sync=True)
    columns = traitlets.Int(0).tag(sync=True)
    marks = traitlets.Dict().tag(sync=True)
    mode = traitlets.Unicode("erased").tag(sync=True)
    boxes: traitlets.List = traitlets.List().tag(sync=True)
    queries = traitlets.Bool(False).tag(sync=True)

    def show(self, image: Tensor, **traits: Any) -> None:
        """Put the image (1, 3, H, W) and the traits into the page at once."""
        with self.hold_sync():
            self.set_trait("png", as_png(image[0], enlarged=True))
            for name, value in traits.items():
                self.set_trait(name, value)


class Strip(anywidget.AnyWidget):
    """All depths, one button each. depths: tap, png (a data address), score; chosen: the tap that is looked at.

    Message: {"kind": "tap", "tap"}.
    """

    _esm = BROWSER / "strip.js"
    depths: traitlets.List = traitlets.List().tag(sync=True)
    chosen = traitlets.Unicode().tag(sync=True)
    label = traitlets.Unicode("All depths").tag(sync=True)


class Drop(anywidget.AnyWidget):
    """A place for an image file. Messages: {"kind": "file", "name"} with its bytes, {"kind": "refused", "text"}."""

    _esm = BROWSER / "drop.js"


class Frame(anywidget.AnyWidget):
    """The browser around the page. query: of the address, which follows it; started: the page was opened already.

    Messages from it: {"kind": "opened", "query"}, {"kind": "copied", "text"}; to it: {"kind": "download", "name"} with
    the file, {"kind": "copy", "text", "what", "link"}.
    """

    _esm = BROWSER / "frame.js"
    _css = BROWSER / "page.css"
    query = traitlets.Unicode().tag(sync=True)
    started = traitlets.Bool(False).tag(sync=True)
