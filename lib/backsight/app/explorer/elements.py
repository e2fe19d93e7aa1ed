"""What the explorer draws in the browser beyond the controls of ipywidgets: four small elements, by anywidget.

Their JavaScript and the page's style lie in browser/; they ask no other host for anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anywidget
import traitlets
from torch import Tensor

from backsight.app.explorer.workbench import ENLARGED
from backsight.app.pictures import as_png

BROWSER = Path(__file__).resolve().parent / "browser"


class Picture(anywidget.AnyWidget):
    """A picture with a grid of patches to choose from, and boxes of object queries.

    png: the file's bytes; mode: which of the view's patches a click changes; shown: title, caption, alt, boxes (of
    `workbench.Answer`) and, where these and patches can be clicked, view (a dict) and grid (rows, columns).
    Messages: {"kind": "patch", "patch", "on"} and {"kind": "query", "query"}.
    """

    _esm = BROWSER / "picture.js"
    png = traitlets.Bytes().tag(sync=True)
    mode = traitlets.Unicode("erased").tag(sync=True)
    shown = traitlets.Dict().tag(sync=True)

    def show(self, image: Tensor, **shown: Any) -> None:
        """Put the image (1, 3, H, W), and what is shown with it, into the page at once."""
        with self.hold_sync():
            self.png, self.shown = as_png(image[0], ENLARGED), shown


class Strip(anywidget.AnyWidget):
    """All depths, one button each. depths: tap, png (a data address), text; chosen: the tap that is looked at."""

    _esm = BROWSER / "strip.js"
    depths: traitlets.List = traitlets.List().tag(sync=True)
    chosen = traitlets.Unicode().tag(sync=True)


class Drop(anywidget.AnyWidget):
    """A place for an image file. Messages: {"kind": "file", "name"} with its bytes, {"kind": "refused", "text"}."""

    _esm = BROWSER / "drop.js"


class Frame(anywidget.AnyWidget):
    """The browser around the page. query: of the address, which follows it where the page stands alone.

    Message to it: {"kind": "download", "name"} with the file.
    """

    _esm = BROWSER / "frame.js"
    _css = BROWSER / "page.css"
    query = traitlets.Unicode().tag(sync=True)
