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
    taps: str | Sequence[str] = "blocks",
    families: str | Sequence[str] | None = None,
) -> ShownFigure:
    """The figure of one picture and of what the inverses make of it at every tap, with the PSNR of each in dB.

    picture: the path of an image file, or a name as `open_picture` takes it ("chelsea", "scene 22"); target, taps: as
    `load_target` takes them, or a target with its taps; families: of inverses, by default all that there are. The
    inverses are those shipped with the target, else those kept from an earlier call, else linear ones fitted here on
    dead leaves, with a progress bar. Raises BacksightError on an unknown picture, target, tap or family.
    """
    import torch

    from backsight.app.pictures import open_picture
    from backsight.inverses.families import kept_inverses
    from backsight.plots.grids import family_grid
    from backsight.targets import load_target

    open_picture(str(picture), (8, 8))  # a wrong name is refused before the target is loaded
    frozen = load_target(target, taps=taps) if isinstance(target, str) else target
    image = open_picture(str(picture), frozen.image_size).image
    known = kept_inverses(frozen)
    chosen = [families] if isinstance(families, str) else list(known) if families is None else families
    for family in chosen:
        if family not in known:
            raise BacksightError(f"there are no {family!r} inverses of {frozen.name}; {nearest(family, list(known))}.")
    with torch.no_grad():
        recorded = frozen.record(image.to(frozen.device))
        made = {
            family: {tap: known[family][tap](recorded[tap])[0].cpu() for tap in frozen.taps if tap in known[family]}
            for family in chosen
        }
    figure = family_grid(image[0], made)
    figure.caption = f"{Path(picture).name} as {frozen.name} ({frozen.weights}) holds it, from every tap: PSNR in dB."
    return figure


def save_look(figure: ShownFigure, path: Path) -> Path:
    """Write the figure as PNG, 200 dots an inch, whole or not at all."""
    return write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=200, metadata={"Software": None}))
