"""Small charts and tables of the explorer as SVG and HTML: drawn in a millisecond, and readable aloud."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from backsight.app.explorer.seeing import HUE_KEPT, HUE_OF_A_GUESS, Answer, Hue, Seen
from backsight.plots.style import FAMILY_COLOURS

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 380, 190, 46, 34, 10
INPUT_COLOUR = "#949494"


def measures_table(seen: Seen) -> str:
    """PSNR, SSIM, hue error, and the object's colour in both pictures."""
    error = seen.measures["hue_error"]
    hue = "this picture has no hue" if math.isnan(error) else f"{error:.1f}°"
    of = "of the object" if seen.mask is not None else "of coloured pixels"
    rows = [
        ("PSNR", f"{seen.measures['psnr']:.1f} dB"),
        ("SSIM", f"{seen.measures['ssim']:.3f}"),
        (f"hue error {of}", hue),
    ]
    if seen.hues is not None:
        rows += [("object, input", _swatch(seen.hues[0])), ("object, reconstruction", _swatch(seen.hues[1]))]
    body = "".join(f"<tr><td>{name}</td><td class='number'>{value}</td></tr>" for name, value in rows)
    return f"<h2>How near it comes</h2><table class='backsight-measures'>{body}</table>"


def _swatch(hue: Hue) -> str:
    colour = "rgb({}, {}, {})".format(*(round(255 * channel) for channel in hue.colour))
    said = f"{hue.degrees:.0f}°" if hue.chroma > 0.02 else "grey"
    return f"<span class='backsight-swatch' style='background: {colour}'></span>{said}"


def answers_table(seen: Seen) -> str:
    """What the model says of the input and of the reconstruction, side by side."""
    given, made = seen.answers
    if given.boxes or made.boxes or not given.classes:
        rows = "".join(
            f"<tr><td>{name}</td><td>{escape(answer.in_words())}</td></tr>"
            for name, answer in (("input", given), ("reconstruction", made))
        )
        return (
            f"<h2>What {escape(seen.view.target)} finds</h2><table class='backsight-answers'>{_wrapping(rows)}</table>"
        )
    rows = "".join(
        f"<tr><td>{_likely(given, place)}</td><td>{_likely(made, place)}</td></tr>"
        for place in range(len(given.classes))
    )
    return (
        f"<h2>What {escape(seen.view.target)} says</h2><table class='backsight-answers'>"
        f"<tr><th>of the input</th><th>of the reconstruction</th></tr>{rows}</table>"
    )


def _wrapping(rows: str) -> str:
    return rows.replace("<td>", "<td style='white-space: normal; vertical-align: top'>")


def _likely(answer: Answer, place: int) -> str:
    if place >= len(answer.classes):
        return ""
    name, probability = answer.classes[place]
    bar = f"<span class='backsight-bar' style='width: {3 * probability:.2f}rem'></span>"
    return f"{escape(name)} {probability:.0%} {bar}"


def hue_chart(curve: Mapping[str, float], chosen: str, family: str, hues: int) -> str:
    """Mean hue error by depth, with the error of a guess and the bound from which a hue counts as kept."""
    taps = list(curve)
    known = [(i, tap, error) for i, (tap, error) in enumerate(curve.items()) if not math.isnan(error)]
    if not known:
        return ""
    places = max(1, len(taps) - 1)

    def x(index: float) -> float:
        return LEFT + (WIDTH - LEFT - 8) * index / places

    def y(error: float) -> float:
        return TOP + (HEIGHT - BOTTOM - TOP) * (1 - min(error, 120) / 120)

    colour = FAMILY_COLOURS.get(family, "#cc78bc")
    line = " ".join(f"{x(i):.1f},{y(error):.1f}" for i, _, error in known)
    dots = "".join(
        f"<circle cx='{x(i):.1f}' cy='{y(error):.1f}' r='{6 if tap == chosen else 3.5}' fill='{colour}'>"
        f"<title>{escape(tap)}: {error:.0f}°</title></circle>"
        for i, tap, error in known
    )
    ticks = "".join(
        f"<line class='axis' x1='{LEFT}' x2='{WIDTH - 8}' y1='{y(v):.1f}' y2='{y(v):.1f}'/>"
        f"<text x='{LEFT - 5}' y='{y(v) + 4:.1f}' text-anchor='end'>{v}°</text>"
        for v in (0, 30, 60, 90, 120)
    )
    guess = (
        f"<line class='guess' x1='{LEFT}' x2='{WIDTH - 8}' y1='{y(HUE_OF_A_GUESS):.1f}' y2='{y(HUE_OF_A_GUESS):.1f}'/>"
        f"<text x='{WIDTH - 8}' y='{y(HUE_OF_A_GUESS) - 4:.1f}' text-anchor='end'>a guess</text>"
    )
    ends = (
        f"<text x='{LEFT}' y='{HEIGHT - 16}'>{escape(taps[0])}</text>"
        f"<text x='{WIDTH - 8}' y='{HEIGHT - 16}' text-anchor='end'>{escape(taps[-1])}</text>"
        f"<text x='{(LEFT + WIDTH) / 2:.0f}' y='{HEIGHT - 3}' text-anchor='middle'>depth</text>"
    )
    said = "; ".join(f"{tap} {error:.0f}" for _, tap, error in known)
    return (
        f"<h2>Hue error, mean over {hues} hues</h2>"
        f"<svg class='backsight-chart' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='Hue error in degrees by "
        f"depth, kept up to {HUE_KEPT:.0f}: {escape(said, quote=True)}'>{ticks}{guess}"
        f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='2'/>{dots}{ends}</svg>"
    )


def spectrum_chart(spectra: Sequence[tuple[float, float, float]], family: str) -> str:
    """Power by octave of spatial frequency, of the input and of the reconstruction, both axes logarithmic."""
    shown = [octave for octave in spectra if octave[1] > 0 and octave[2] > 0]
    if len(shown) < 2:
        return ""
    powers = [math.log10(power) for octave in shown for power in octave[1:]]
    low, high = math.floor(min(powers)), math.ceil(max(powers))
    first, last = math.log2(shown[0][0]), math.log2(shown[-1][0])

    def x(frequency: float) -> float:
        return LEFT + (WIDTH - LEFT - 14) * (math.log2(frequency) - first) / (last - first)

    def y(power: float) -> float:
        return TOP + (HEIGHT - BOTTOM - TOP) * (1 - (math.log10(power) - low) / max(high - low, 1))

    colour = FAMILY_COLOURS.get(family, "#cc78bc")
    lines = ""
    for index, stroke, dash in ((1, INPUT_COLOUR, "6 3"), (2, colour, "")):
        points = " ".join(f"{x(octave[0]):.1f},{y(octave[index]):.1f}" for octave in shown)
        lines += (
            f"<polyline points='{points}' fill='none' stroke='{stroke}' stroke-width='2' stroke-dasharray='{dash}'/>"
        )
    step = max(1, math.ceil((high - low) / 4))
    ticks = "".join(
        f"<line class='axis' x1='{LEFT}' x2='{WIDTH - 14}' y1='{y(10.0**v):.1f}' y2='{y(10.0**v):.1f}'/>"
        f"<text x='{LEFT - 5}' y='{y(10.0**v) + 4:.1f}' text-anchor='end'>10"
        f"<tspan dy='-4' font-size='8'>{v}</tspan></text>"
        for v in range(low, high + 1, step)
    )
    marks = "".join(
        f"<text x='{x(octave[0]):.1f}' y='{HEIGHT - 18}' text-anchor='middle'>{octave[0]:.3g}</text>"
        for octave in shown
    )
    lost = "; ".join(f"at {f:.3g} cycles {made / given:.0%} of the power" for f, given, made in shown)
    return (
        "<h2>Spectrum</h2>"
        f"<svg class='backsight-chart' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='Power of the "
        f"reconstruction by spatial frequency: {lost}'>{ticks}{lines}{marks}"
        f"<text x='{(LEFT + WIDTH) / 2:.0f}' y='{HEIGHT - 3}' text-anchor='middle'>cycles an image (dashed: input)"
        "</text></svg>"
    )
