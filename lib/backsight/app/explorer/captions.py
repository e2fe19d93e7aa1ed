"""What the explorer's page says of a view: a sentence, a table, and the curve of hue errors by depth."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from backsight.app.explorer.workbench import Seen
from backsight.measures.hue import hue_of, object_chroma
from backsight.plots.style import LOOKS

HUES = tuple(range(-180, 180, 45))  # degrees all round the circle, over which the loss of hue is judged
GUESS = 90.0  # degrees, the mean error of a hue drawn at random
HUE_KEPT = 30.0  # degrees: half the distance between two neighbouring main hues
GREY = "#808080"  # seen on light and on dark ground


def measures_table(seen: Seen) -> str:
    """What the model and the measures say of the input and of the reconstruction, in two columns."""
    of = "" if seen.picture.mask.all() else " of the object"
    error, grey = (seen.measures[name] for name in ("hue_error", "share_grey"))
    hue = "it comes back grey" if grey == 1 else f"{error:.1f}°" if error == error else "this picture has no hue"
    rows = [
        ("", "<b>input</b>", "<b>reconstruction</b>"),
        (f"{escape(seen.view.target)} finds", *(escape(answer.words) for answer in seen.answers)),
        (f"mean colour{of}", *(_swatch(image, seen.picture.mask) for image in (seen.image, seen.reconstruction))),
        (f"hue error{of}", "", hue),
        ("PSNR", "", f"{seen.measures['psnr']:.1f} dB"),
        ("SSIM", "", f"{seen.measures['ssim']:.3f}"),
    ]
    body = "".join(f"<tr><th>{name}</th><td>{first}</td><td>{second}</td></tr>" for name, first, second in rows)
    return f"<h2>How near it comes</h2><table>{body}</table>"


def _swatch(image: Tensor, mask: Tensor) -> str:
    (hue,) = hue_of(object_chroma(image, mask))
    colour = ", ".join(f"{255 * float(channel):.0f}" for channel in image[0][:, mask[0]].mean(1))
    said = f"{hue:.0f}°" if hue == hue else "grey"
    return f"<span class='backsight-swatch' style='background: rgb({colour})'></span>{said}"


def mean_errors(depths: Mapping[str, tuple[Tensor, Mapping[str, np.ndarray]]]) -> dict[str, float]:
    """{tap: mean hue error in degrees, of what comes back with a hue; NaN where most comes back grey}.

    depths: of `Workbench.depths`. Nothing where the picture has no hue.
    """
    means = {}
    for tap, (_, scores) in depths.items():
        grey = scores["share_grey"][~np.isnan(scores["share_grey"])]
        if len(grey):
            means[tap] = math.nan if grey.mean() > 0.5 else float(np.nanmean(scores["hue_error"]))
    return means


def _degrees(error: float) -> str:
    return f"{error:.0f}°" if error == error else "grey"


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
        return f"The hue comes back from no layer (at best: {_degrees(least)}; {of})."
    if list(errors) == kept + lost:
        down, back = f"{kept[-1]} ({_degrees(errors[kept[-1]])})", f"{lost[0]} on ({_degrees(errors[lost[0]])})"
        return f"The hue comes back down to {down} and is lost from {back}; {of}."
    return f"The hue is lost at {', '.join(lost)} (above {HUE_KEPT:.0f}°) and comes back from the other layers; {of}."


def hue_chart(errors: Mapping[str, float], chosen: str, family: str) -> str:
    """Mean hue error by depth, with that of a guess; the chosen tap is marked."""
    if not errors:
        return ""
    taps, colour = list(errors), LOOKS[family].colour
    grey: Any = dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor"), GREY)
    with rc_context(grey | {"font.size": 8, "svg.fonttype": "none"}):
        figure = Figure(figsize=(3.9, 1.9), layout="constrained")
        axes = figure.subplots()
        axes.axhline(GUESS, color=GREY, linestyle="--", linewidth=1)
        axes.text(len(taps) - 1, GUESS + 3, "a guess", ha="right")
        axes.plot(range(len(taps)), list(errors.values()), "o-", color=colour, markersize=4)
        axes.plot([taps.index(tap) for tap in taps if tap == chosen], [errors[chosen]], "o", color=colour, markersize=8)
        axes.set(ylim=(0, 120), yticks=range(0, 121, 30), ylabel="degrees", xlabel="depth")
        axes.set_xticks([0, len(taps) - 1], [taps[0], taps[-1]])
        axes.spines[["top", "right"]].set_visible(False)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True)
    said = f"Hue error in degrees by depth: {'; '.join(f'{tap} {_degrees(error)}' for tap, error in errors.items())}"
    address = f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
    title = f"<h2>Hue error, mean over {len(HUES)} hues</h2>"
    return f"{title}<img class='backsight-chart' src='{address}' alt='{escape(said, quote=True)}'>"
