"""One picture through one model: every layer turned back, as one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backsight.errors import BacksightError, nearest
from backsight.project import write_atomically

if TYPE_CHECKING:
    from backsight.plots.style import ShownFigure
    from backsight.targets import Target


def look(
    picture: str | Path,
    target: str | Target = "dinov2-small",
    taps: str | Sequence[str] | None = None,
    families: str | Sequence[str] | None = None,
    inverses: str | Path | None = None,
) -> ShownFigure:
    """The figure of one picture and of what the inverses make of it at every tap, with the PSNR of each in dB.

    picture: the path of an image file, or a name as `open_picture` takes it ("chelsea", "scene 22"); target, taps: as
    `load_target` takes them, by default every block, or a target and, by default, its taps; families: of inverses, by
    default all that are shipped, or linear ones. The inverses are those shipped with the target, else those kept from
    an earlier call, else they are fitted here on dead leaves, with a progress bar; "map" takes minutes a tap. inverses:
    a folder of `save` or of 02_train_inverse (of one training seed), taken before all others.
    Raises BacksightError on an unknown picture, target, tap or family.
    """
    import torch

    from backsight.app.pictures import open_picture
    from backsight.inverses.families import FAMILIES, kept_inverses
    from backsight.inverses.files import load
    from backsight.plots.grids import family_grid
    from backsight.targets import load_target

    open_picture(str(picture), (8, 8))  # a wrong name is refused before the target is loaded
    asked = [families] if isinstance(families, str) else list(families or ())
    for family in asked:
        if family not in FAMILIES:
            raise BacksightError(f"there is no inverse family {family!r}; {nearest(family, list(FAMILIES))}.")
    if isinstance(target, str):
        frozen = load_target(target, taps="blocks" if taps is None else taps)
    else:
        frozen = target if taps is None else target.select(taps)
    image = open_picture(str(picture), frozen.image_size).image
    own = {} if inverses is None else load(inverses, frozen)
    known = kept_inverses(frozen, asked=[family for family in asked if family not in own]) | own
    with torch.no_grad():
        recorded = frozen.record(image.to(frozen.device))
        made = {
            family: {tap: known[family][tap](recorded[tap])[0].cpu() for tap in frozen.taps if tap in known[family]}
            for family in asked or known
        }
    figure = family_grid(image[0], made)
    figure.caption = f"{Path(picture).name} as {frozen.name} ({frozen.weights}) holds it, from every tap: PSNR in dB."
    return figure


def save_look(figure: ShownFigure, path: Path) -> Path:
    """Write the figure as PNG, 200 dots an inch, whole or not at all."""
    return write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=200, metadata={"Software": None}))
