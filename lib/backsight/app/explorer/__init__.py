"""The explorer: one picture, one layer, one inverse, seen by hand.

view.py: what is looked at, as a value; workbench.py: what it shows, without any widget; page.py: the widgets of
notebooks/08_explorer.ipynb, with what they say (captions.py) and draw in the browser (elements.py, browser/);
serve.py: the page alone, by voila.
"""

from importlib import import_module
from typing import Any

__all__ = ["Page", "View", "Workbench", "explore"]

_HOMES = {"Page": "page", "View": "view", "Workbench": "workbench", "explore": "page"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'backsight.app.explorer' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(import_module(f"backsight.app.explorer.{_HOMES[name]}"), name)
