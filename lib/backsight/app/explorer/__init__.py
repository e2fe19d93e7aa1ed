"""The explorer: one picture, one layer, one inverse, seen by hand.

from backsight.app.explorer import View, Workbench

seen = Workbench().see(View(target="scenes-detr", tap="encoder.layers.1", picture="scene 4", hue_shift=120.0))
seen.reconstruction  # (1, 3, H, W) in [0, 1]

view.py     what is looked at, as a value: it can be a link, lines of Python, an entry in a PNG
pictures.py where the pictures come from
seeing.py   the computation, without any widget
page.py     the widgets of notebooks/08_explorer.ipynb, over elements.py (what draws in the browser)
latest.py   the thread that computes the newest request and drops the others
serve.py    the page alone, by voila
"""

from importlib import import_module
from typing import Any

__all__ = ["Page", "View", "Workbench", "explore"]

_HOMES = {"Page": "page", "View": "view", "Workbench": "seeing", "explore": "page"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'backsight.app.explorer' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(import_module(f"backsight.app.explorer.{_HOMES[name]}"), name)
