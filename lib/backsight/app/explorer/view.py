"""What the explorer looks at, as one value: comparable, a link, lines of Python, an entry in a PNG."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal
from urllib.parse import parse_qsl, urlencode

from backsight.errors import BacksightError

Cells = tuple[int, ...]
CELLS = ("erased", "shuffled", "swapped")  # the fields that hold patches


@dataclass(frozen=True)
class View:
    """One picture, changed; one tap's representation of it, changed; one inverse.

    target, family, tap: whose representation, and the inverse that reads it; tap "": the first one.
    picture: a name as `app.pictures` takes it. hue_shift: degrees; saturation: factor; region: of the scene's largest
    "object" or of the whole "image".
    erased, shuffled: patches of the picture (row-major, of the target's grid) painted in the colour that the target
    takes for zero, or put in each other's places. noise: Gaussian, in standard deviations of the representation's
    channels over scenes. swapped: patches whose tokens come from `swap_picture` instead.
    inverse_tap: the tap whose inverse reads the representation; "": its own. removed: object queries put to their
    mean over scenes (predictions: to "no object"). Raises BacksightError on values that no view has.
    """

    target: str = "scenes-vit"
    family: str = "modular"
    tap: str = ""
    picture: str = "scene 0"
    hue_shift: float = 0.0
    saturation: float = 1.0
    region: Literal["object", "image"] = "object"
    erased: Cells = ()
    shuffled: Cells = ()
    noise: float = 0.0
    swapped: Cells = ()
    swap_picture: str = "scene 1"
    inverse_tap: str = ""
    removed: Cells = ()

    def __post_init__(self) -> None:
        if self.region not in ("object", "image"):
            raise BacksightError(f"A colour is changed in the 'object' or in the 'image', not in {self.region!r}.")
        for name in (*CELLS, "removed"):
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))
            if min(getattr(self, name), default=0) < 0:
                raise BacksightError(f"{name} lists patches or queries from 0 on, not {getattr(self, name)}.")
        for name, lowest, highest in (("hue_shift", -180, 180), ("saturation", 0, 2), ("noise", 0, 3)):
            if not lowest <= getattr(self, name) <= highest:  # also refuses NaN
                raise BacksightError(f"{name} lies between {lowest} and {highest}, not at {getattr(self, name)}.")

    @property
    def changed(self) -> dict[str, Any]:
        """The fields that are not as in a fresh view, in order."""
        return {name: value for name, value in asdict(self).items() if value != getattr(View(), name)}

    def to_query(self) -> str:
        """The view as the query of a link, without what is as in a fresh view."""
        lists = {name: value for name, value in self.changed.items() if isinstance(value, tuple)}
        return urlencode(self.changed | {name: ",".join(map(str, cells)) for name, cells in lists.items()})

    def to_python(self) -> str:
        """Lines that compute this view and write the same PNG as the export."""
        inside = "".join(f"    {name}={value!r},\n" for name, value in self.changed.items())
        return (
            "from pathlib import Path\n\n"
            "from backsight.app.explorer import View, Workbench\n\n"
            f"view = View(\n{inside})\n"
            "workbench = Workbench()\n"
            "seen = workbench.see(view)  # seen.image, seen.reconstruction: (1, 3, H, W) in [0, 1]\n"
            "print({measure: round(value, 2) for measure, value in seen.measures.items()})\n"
            'Path("view.png").write_bytes(workbench.png(view))\n'
        )


def from_query(query: str) -> View:
    """The view of a link; "" and other applications' entries give a fresh one.

    Raises BacksightError, naming the entry, where a value cannot be read.
    """
    kinds: dict[str, Any] = {name: type(value) for name, value in asdict(View()).items()}
    values: dict[str, Any] = {}
    for name, text in parse_qsl(query.lstrip("?")):
        try:
            if name in kinds:
                values[name] = tuple(map(int, text.split(","))) if kinds[name] is tuple else kinds[name](text)
        except ValueError as error:
            raise BacksightError(f"The link says {name}={text!r}, which cannot be read: correct it.") from error
    return View(**values)
