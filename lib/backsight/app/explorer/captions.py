"""What the explorer's page says of a view, in sentences and in HTML (page.html.jinja)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from backsight.app.explorer.workbench import Depths, Seen
from backsight.measures.hue import hue_of, object_chroma

HUES = tuple(range(-180, 180, 45))  # degrees all round the circle, over which the loss of hue is judged
GUESS = 90.0  # degrees, the mean error of a hue drawn at random
HUE_KEPT = 30.0  # degrees: half the distance between two neighbouring main hues


@cache
def html() -> Any:
    """The macros of page.html.jinja, by name."""
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(
        "page.html.jinja", globals={"degrees": degrees, "hues": len(HUES), "guess": GUESS}
    ).module


def degrees(angle: float, decimals: int = 0, without: str = "grey") -> str:
    return f"{angle:.{decimals}f}°" if angle == angle else without


def measures_table(seen: Seen) -> str:
    """What the model and the measures say of the input and of the reconstruction, in two columns."""
    colours, mask = [], seen.picture.mask
    for image in (seen.image, seen.reconstruction):
        mean = (255 * image[0][:, mask[0]].mean(1)).round().int().tolist()
        colours.append((f"rgb{tuple(mean)}", *hue_of(object_chroma(image, mask))))
    return html().measures(seen, colours)


def mean_errors(turned: Sequence[Depths]) -> dict[str, float]:
    """{tap: mean hue error in degrees, of what comes back with a hue; NaN where most comes back grey}.

    turned: of `Workbench.depths`, of one picture in several hues. Nothing where the picture has no hue.
    """
    means = {}
    for tap in turned[0]:
        errors, grey = ([float(depths[tap][1][name][0]) for depths in turned] for name in ("hue_error", "share_grey"))
        if not np.isnan(grey).all():
            means[tap] = math.nan if np.nanmean(grey) > 0.5 else float(np.nanmean(errors))
    return means


def hue_in_words(errors: Mapping[str, float]) -> str:
    """Down to which depth the hue comes back within HUE_KEPT degrees, in one sentence. errors: of `mean_errors`."""
    if not errors:
        return "This picture has no hue to lose."
    kept = [tap for tap, error in errors.items() if error <= HUE_KEPT]
    lost = [tap for tap in errors if tap not in kept]
    of = f"mean error over {len(HUES)} hues; a guess: {GUESS:.0f}°"
    if not lost:
        return f"The hue comes back from every layer (at most {max(errors.values()):.0f}°; {of})."
    if not kept:
        least = min((error for error in errors.values() if error == error), default=math.nan)
        return f"The hue comes back from no layer (at best: {degrees(least)}; {of})."
    if list(errors) == kept + lost:
        down, back = (f"{tap}{on} ({degrees(errors[tap])})" for tap, on in ((kept[-1], ""), (lost[0], " on")))
        return f"The hue comes back down to {down} and is lost from {back}; {of}."
    return f"The hue is lost at {', '.join(lost)} (above {HUE_KEPT:.0f}°) and comes back from the other layers; {of}."
