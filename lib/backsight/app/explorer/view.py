"""What the explorer looks at, as one value: comparable, a link, lines of Python, an entry in a PNG's metadata."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_type_hints
from urllib.parse import parse_qsl, urlencode

from backsight.errors import BacksightError

Region = Literal["object", "image"]
Cells = tuple[int, ...]
Grid = tuple[int, int]
CELLS = ("erased", "shuffled", "swapped")  # the fields of a view that hold patches


@dataclass(frozen=True)
class View:
    """One picture, changed; one tap's representation of it, changed; one inverse.

    target, family, tap: whose representation, and the inverse that reads it; tap "": the first one.
    picture: "scene N", a built-in photograph, or the path of an image file.
    hue_shift: degrees; saturation: factor; region: of the scene's main "object" or of the whole "image".
    erased, shuffled: patches of the picture (row-major, of the target's grid) painted in the colour that the target
    takes for zero, or put in each other's places. noise: Gaussian, in standard deviations of the representation's
    channels over scenes; noise_seed: its seed. swapped: patches whose tokens come from `swap_picture` instead.
    inverse_tap: the tap whose inverse reads the representation; "": its own. removed: object queries put to their
    mean over scenes (predictions: to "no object"). compare: a second target, seen at the same relative depth, or "".
    Raises BacksightError on values that no view has.
    """

    target: str = "scenes-vit"
    family: str = "modular"
    tap: str = ""
    picture: str = "scene 0"
    hue_shift: float = 0.0
    saturation: float = 1.0
    region: Region = "object"
    erased: Cells = ()
    shuffled: Cells = ()
    noise: float = 0.0
    noise_seed: int = 0
    swapped: Cells = ()
    swap_picture: str = "scene 1"
    inverse_tap: str = ""
    removed: Cells = ()
    compare: str = ""

    def __post_init__(self) -> None:
        if self.region not in ("object", "image"):
            raise BacksightError(f"A colour is changed in the 'object' or in the 'image', not in {self.region!r}.")
        for name in (*CELLS, "removed"):
            numbers = getattr(self, name)
            if any(not isinstance(number, int) or number < 0 for number in numbers):
                raise BacksightError(f"{name} lists patches or queries from 0 on, not {numbers}.")
            object.__setattr__(self, name, tuple(sorted(set(numbers))))
        for name, lowest, highest in (("hue_shift", -360, 360), ("saturation", 0, 4), ("noise", 0, 10)):
            if not lowest <= getattr(self, name) <= highest:  # also refuses NaN
                raise BacksightError(f"{name} lies between {lowest} and {highest}, not at {getattr(self, name)}.")

    @property
    def changed(self) -> dict[str, Any]:
        """The fields that are not as in a fresh view, in order."""
        fresh = View()
        return {name: value for name, value in asdict(self).items() if value != getattr(fresh, name)}

    def to_query(self) -> str:
        """The view as the query of a link, without what is as in a fresh view."""
        return urlencode({name: _as_text(value) for name, value in self.changed.items()})

    def to_python(self) -> str:
        """Lines that compute this view and write the same PNG as the export."""
        inside = "".join(f"    {name}={value!r},\n" for name, value in self.changed.items())
        call = f"View(\n{inside})" if inside else "View()"
        return (
            "from pathlib import Path\n\n"
            "from backsight.app.explorer import View, Workbench\n\n"
            f"view = {call}\n"
            "workbench = Workbench()\n"
            "seen = workbench.see(view)  # seen.image, seen.reconstruction: (1, 3, H, W) in [0, 1]\n"
            "print({measure: round(value, 2) for measure, value in seen.measures.items()})\n"
            'Path("view.png").write_bytes(workbench.png(view))\n'
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def from_query(query: str) -> View:
    """The view of a link; "" and other applications' entries give a fresh one.

    Raises BacksightError, naming the entry, where a value cannot be read.
    """
    kinds = get_type_hints(View)
    values: dict[str, Any] = {}
    for name, text in parse_qsl(query.lstrip("?#"), keep_blank_values=True):
        kind = kinds.get(name)
        try:
            if kind == Cells:
                values[name] = tuple(int(part) for part in text.split(",") if part)
            elif kind is not None:
                values[name] = kind(text) if kind in (int, float) else text
        except ValueError as error:
            raise BacksightError(f"The link says {name}={text!r}, which cannot be read: correct it.") from error
    return View(**values)


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def carried(cells: Cells, before: Grid, after: Grid) -> Cells:
    """Patches of one grid as those of another that cover the same places: every patch that shares area with one."""
    if before == after:
        return cells
    kept = set()
    for cell in cells:
        row, column = divmod(cell, before[1])
        if row >= before[0]:
            continue
        rows = range(row * after[0] // before[0], -(-(row + 1) * after[0] // before[0]))
        columns = range(column * after[1] // before[1], -(-(column + 1) * after[1] // before[1]))
        kept |= {r * after[1] + c for r in rows for c in columns}
    return tuple(sorted(kept))


def with_cells(view: View, before: Grid, after: Grid) -> View:
    """The view with its patches carried to another grid."""
    moved: dict[str, Any] = {name: carried(getattr(view, name), before, after) for name in CELLS}
    return replace(view, **moved)
