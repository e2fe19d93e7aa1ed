"""What the explorer looks at, as one value: comparable, a link, lines of Python, an entry in a PNG."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlencode

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, NonNegativeInt, ValidationError
from pydantic.dataclasses import dataclass

from backsight.errors import BacksightError

# Patches or queries, from 0 on; as text with commas.
Cells = Annotated[
    tuple[NonNegativeInt, ...],
    BeforeValidator(lambda cells: cells.split(",") if isinstance(cells, str) else cells),
    AfterValidator(lambda cells: tuple(sorted(set(cells)))),
]
CELLS = ("erased", "shuffled", "swapped")  # the fields that hold patches


@dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False))
class View:
    """One picture, changed; one tap's representation of it, changed; one inverse.

    target, family, tap: whose representation, and the inverse that reads it; "": the target's last, its first.
    picture: a name as `app.pictures` takes it. hue_shift: degrees; saturation: factor; region: of the scene's largest
    "object" or of the whole "image".
    erased, shuffled: patches of the picture (row-major, of the target's grid) painted in the colour that the target
    takes for zero, or put in each other's places. noise: Gaussian, in standard deviations of the representation's
    channels over scenes. swapped: patches whose tokens come from `swap_picture` instead.
    inverse_tap: the tap whose inverse reads the representation; "": its own. removed: object queries put to their
    mean over scenes (predictions: to "no object"). Raises ValidationError on values that no view has.
    """

    target: str = "dinov2-small"
    family: str = ""
    tap: str = ""
    picture: str = "chelsea"
    hue_shift: Annotated[float, Field(ge=-180, le=180)] = 0.0
    saturation: Annotated[float, Field(ge=0, le=2)] = 1.0
    region: Literal["object", "image"] = "object"
    erased: Cells = ()
    shuffled: Cells = ()
    noise: Annotated[float, Field(ge=0, le=3)] = 0.0
    swapped: Cells = ()
    swap_picture: str = "china"
    inverse_tap: str = ""
    removed: Cells = ()

    @property
    def changed(self) -> dict[str, Any]:
        """The fields that are not as in a fresh view, in order."""
        return {name: value for name, value in asdict(self).items() if value != getattr(View(), name)}

    def to_query(self) -> str:
        """The view as the query of a link, without what is as in a fresh view."""
        texts = {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in self.changed.items()}
        return urlencode(texts)

    def to_python(self) -> str:
        """Lines that compute this view and write the same PNG as the export."""
        inside = "".join(f"    {name}={value!r},\n" for name, value in self.changed.items())
        return (
            "from pathlib import Path\n\n"
            "from backsight.app.explorer.view import View\n"
            "from backsight.app.explorer.workbench import Workbench\n\n"
            f"view = View(\n{inside})\n"
            "workbench = Workbench()\n"
            "seen = workbench.see(view)  # seen.image, seen.reconstruction: (1, 3, H, W) in [0, 1]\n"
            "print({measure: round(value, 2) for measure, value in seen.measures.items()})\n"
            'Path("view.png").write_bytes(workbench.png(view))\n'
        )


def from_query(query: str) -> View:
    """The view of a link, "" a fresh one; other applications' entries are passed over.

    Raises BacksightError, naming the entry, where a value cannot be read.
    """
    entries: dict[str, Any] = dict(parse_qsl(query.lstrip("?")))
    try:
        return View(**entries)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise BacksightError(f"The link says {wrong['loc'][0]}={wrong['input']!r}: {wrong['msg'].lower()}.") from error
