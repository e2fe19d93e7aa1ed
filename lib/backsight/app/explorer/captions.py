"""What the explorer's page says of a view: a sentence, a table, and the curve of hue errors by depth."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from backsight.app.explorer.workbench import Seen
from backsight.measures.structure import HUE_OF_A_GUESS, mean_hue
from backsight.plots.style import LOOKS

HUES = tuple(range(-180, 180, 45))  # degrees all round the circle, over which the loss of hue is judged
HUE_KEPT = 30.0  # degrees: half the distance between two neighbouring main hues
GREY = "#808080"  # seen on light and on dark ground


def measures_table(seen: Seen) -> str:
    """What the model and the measures say of the input and of the reconstruction, in two columns."""
    error, of = seen.measures["hue_error"], "" if seen.picture.mask.all() else " of the object"
    rows = [
        ("", "<b>input</b>", "<b>reconstruction</b>"),
        (f"{escape(seen.view.target)} finds", *(escape(answer.words) for answer in seen.answers)),
        (f"mean colour{of}", *(_swatch(image, seen.picture.mask) for image in (seen.image, seen.reconstruction))),
        (f"hue error{of}", "", f"{error:.1f}°" if error == error else "this picture has no hue"),
        ("PSNR", "", f"{seen.measures['psnr']:.1f} dB"),
        ("SSIM", "", f"{seen.measures['ssim']:.3f}"),
    ]
    body = "".join(f"<tr><th>{name}</th><td>{first}</td><td>{second}</td></tr>" for name, first, second in rows)
    return f"<h2>How near it comes</h2><table>{body}</table>"


def _swatch(image: Tensor, mask: Tensor) -> str:
    (hue,), (chroma,) = mean_hue(image, mask)
    colour = ", ".join(f"{255 * float(channel):.0f}" for channel in image[0][:, mask[0]].mean(1))
    said = f"{hue:.0f}°" if chroma > 0.02 else "grey"
    return f"<span class='backsight-swatch' style='background: rgb({colour})'></span>{said}"


def mean_errors(depths: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """{tap: mean hue error in degrees}, of the depths at which the picture has a hue."""
    means = {tap: float(torch.nanmean(errors)) for tap, (_, errors) in depths.items()}
    return {tap: error for tap, error in means.items() if error == error}


def hue_in_words(errors: Mapping[str, float]) -> str:
    """Down to which depth the hue comes back within HUE_KEPT degrees, in one sentence. errors: of `mean_errors`."""
    if not errors:
        return "This picture has no hue to lose."
    kept = [tap for tap, error in errors.items() if error <= HUE_KEPT]
    lost = [tap for tap in errors if tap not in kept]
    of = f"mean error over {len(HUES)} hues; a guess: 90°"
    if not lost:
        return f"The hue comes back from every layer (at most {max(errors.values()):.0f}°; {of})."
    if not kept:
        return f"The hue comes back from no layer (at least {min(errors.values()):.0f}°; {of})."
    if list(errors) == kept + lost:
        down, back = f"{kept[-1]} ({errors[kept[-1]]:.0f}°)", f"{lost[0]} on ({errors[lost[0]]:.0f}°)"
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
        axes.axhline(HUE_OF_A_GUESS, color=GREY, linestyle="--", linewidth=1)
        axes.text(len(taps) - 1, HUE_OF_A_GUESS + 3, "a guess", ha="right")
        axes.plot(range(len(taps)), list(errors.values()), "o-", color=colour, markersize=4)
        axes.plot([taps.index(tap) for tap in taps if tap == chosen], [errors[chosen]], "o", color=colour, markersize=8)
        axes.set(ylim=(0, 120), yticks=range(0, 121, 30), ylabel="degrees", xlabel="depth")
        axes.set_xticks([0, len(taps) - 1], [taps[0], taps[-1]])
        axes.spines[["top", "right"]].set_visible(False)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True)
    said = f"Hue error in degrees by depth: {'; '.join(f'{tap} {error:.0f}' for tap, error in errors.items())}"
    address = f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
    title = f"<h2>Hue error, mean over {len(HUES)} hues</h2>"
    return f"{title}<img class='backsight-chart' src='{address}' alt='{escape(said, quote=True)}'>"
